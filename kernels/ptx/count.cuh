// A count in global memory by which CTAs of a grid meet (sm_70 and later).
#pragma once
#include "common/base.cuh"

namespace fi::ptx {

// old = *p; *p = old + x. Acquire and release at device scope: what this CTA wrote before a barrier in front of the call is
// seen by whoever reads a later value, and the other way round.
FI_DEVICE uint32_t count_add(uint32_t* p, uint32_t x) {
  uint32_t old;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x) : "memory");
  return old;
}
// The same without any order of memory.
FI_DEVICE uint32_t count_relaxed(uint32_t* p, uint32_t x) {
  uint32_t old;
  asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(x) : "memory");
  return old;
}
// Looks at *p up to `looks` times until its bits in `mask` are `count`; whether they are. Acquires, too.
FI_DEVICE bool count_wait(const uint32_t* p, uint32_t mask, uint32_t count, int looks) {
  for (int i = 0; i < looks; ++i) {
    uint32_t x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
    if ((x & mask) == count) return true;
  }
  return false;
}

}  // namespace fi::ptx
