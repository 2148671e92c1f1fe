// Atomics with explicit memory order (sm_70 and later).
#pragma once
#include "common/base.cuh"

namespace fi::ptx {

// old = *p; *p = old >= limit ? 0 : old + 1. Acquire and release at device scope: what this CTA wrote before a barrier
// in front of the call is seen by whoever reads a later value, and the other way round.
FI_DEVICE uint32_t atomic_inc_acq_rel(uint32_t* p, uint32_t limit) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(limit) : "memory");
  return old;
}

}  // namespace fi::ptx
