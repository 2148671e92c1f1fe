// Warp reductions: one instruction for 32-bit integers from sm_80 on, shuffles on sm_75.
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
FI_DEVICE uint32_t warp_min_u32(uint32_t x) { return ~warp_max_u32(~x); }

FI_DEVICE uint32_t warp_sum_u32(uint32_t x) {
#if FI_ARCH >= 800
  uint32_t y;
  asm volatile("redux.sync.add.u32 %0, %1, 0xffffffff;" : "=r"(y) : "r"(x));
  return y;
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
#endif
}

// The sum of the warp's x modulo 2^64, in every lane.
FI_DEVICE uint64_t warp_sum_u64(uint64_t x) {
#if FI_ARCH >= 800
  // Three limbs of 24, 24 and 16 bits, so that none of 32 summands overflows.
  const uint32_t low = warp_sum_u32(uint32_t(x) & 0xffffff), middle = warp_sum_u32(uint32_t(x >> 24) & 0xffffff),
                 high = warp_sum_u32(uint32_t(x >> 48));
  return low + (uint64_t(middle) << 24) + (uint64_t(high) << 48);
#else
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
#endif
}

// n -= a < b. Two instructions: the borrow is subtracted.
FI_DEVICE void count_less(int32_t& n, uint32_t a, uint32_t b) {
  asm("{ .reg .u32 t; sub.cc.u32 t, %1, %2; subc.s32 %0, %0, 0; }" : "+r"(n) : "r"(a), "r"(b));
}
FI_DEVICE void count_less(int32_t& n, uint64_t a, uint64_t b) {
  asm("{ .reg .u32 t; sub.cc.u32 t, %1, %3; subc.cc.u32 t, %2, %4; subc.s32 %0, %0, 0; }"
      : "+r"(n)
      : "r"(uint32_t(a)), "r"(uint32_t(a >> 32)), "r"(uint32_t(b)), "r"(uint32_t(b >> 32)));
}

// The larger of two floats; NaN (0x7fffffff) if one is NaN.
FI_DEVICE float max_nan(float a, float b) {
#if FI_ARCH >= 800
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a != a || b != b ? __int_as_float(0x7fffffff) : fmaxf(a, b);
#endif
}

}  // namespace fi::ptx
