// Warp reductions of 32-bit integers: one instruction from sm_80 on, shuffles on sm_75.
#pragma once
#include "common/base.cuh"

namespace fi::ptx {

// The largest x of the warp, in every lane.
FI_DEVICE uint32_t warp_max_u32(uint32_t x) {
#if FI_ARCH >= 800
  uint32_t y;
  asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const uint32_t other = __shfl_xor_sync(kFullMask, x, offset);
    x = x > other ? x : other;
  }
  return x;
#endif
}

}  // namespace fi::ptx
