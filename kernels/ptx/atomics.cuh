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

// old = *p; *p = old + x, ordered likewise.
FI_DEVICE uint32_t atomic_add_acq_rel(uint32_t* p, uint32_t x) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x) : "memory");
  return old;
}
// Looks at *p up to `looks` times until its bits in `mask` are `count`; whether they are. What was written before the count
// by those who counted themselves is seen then.
FI_DEVICE bool wait_for_count(const uint32_t* p, uint32_t mask, uint32_t count, int looks) {
  for (int i = 0; i < looks; ++i) {
    uint32_t x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    if ((x & mask) == count) return true;
  }
  return false;
}

}  // namespace fi::ptx
