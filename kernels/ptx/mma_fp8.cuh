// mma.sync on fp8: C[16,8] += A[16,32] B[32,8] with fp32 accumulators, e4m3 and e5m2 in any mix.
// Fragments (lane = 4 g + t): A0 = (row g, k 4t..4t+3), A1 = (row g+8, same k), A2 = (row g, k 16+4t..), A3 = (row g+8, ..);
// B0 = (k 4t.., column g), B1 = (k 16+4t.., column g): the 16-bit fragments of ptx/mma.cuh with two fp8 in a half's place,
// so ldmatrix serves both. Below sm_89 each value becomes a half, exactly, and two fp16 products make a step: the low
// pairs of every register first, then the high ones, which is another order of k, the same for A and B.
#pragma once
#include "ptx/mma.cuh"

namespace fi::ptx {

// Four fp8 values as halves: `lo` holds bytes 0 and 1, `hi` bytes 2 and 3.
template <typename E>
FI_DEVICE void fp8_to_halves(uint32_t four, uint32_t& lo, uint32_t& hi);
template <>
FI_DEVICE void fp8_to_halves<__nv_fp8_e5m2>(uint32_t four, uint32_t& lo, uint32_t& hi) {
  lo = __byte_perm(four, 0, 0x1404);  // e5m2 is the upper byte of a half
  hi = __byte_perm(four, 0, 0x3424);
}
template <>
FI_DEVICE void fp8_to_halves<__nv_fp8_e4m3>(uint32_t four, uint32_t& lo, uint32_t& hi) {
  // Sign, then exponent and mantissa one place lower: a half with the exponent's bias 8 too small. 0x7f is NaN.
  auto convert = [](uint32_t pair) {
    const uint32_t magnitude = pair & 0x7f007f00u;
    uint32_t half = (pair & 0x80008000u) | (magnitude >> 1);
    const uint32_t nan = (magnitude + 0x01000100u) & 0x80008000u;
    const __half2 scaled = __hmul2(*reinterpret_cast<__half2*>(&half), __half2half2(__ushort_as_half(0x5c00)));  // 2^8
    return *reinterpret_cast<const uint32_t*>(&scaled) | (nan - (nan >> 15));
  };
  lo = convert(__byte_perm(four, 0, 0x1404));
  hi = convert(__byte_perm(four, 0, 0x3424));
}

template <typename A, typename B>
FI_DEVICE void mma_m16n8k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if FI_ARCH >= 890
#define FI_MMA_FP8(TA, TB)                                                                              \
  asm volatile("mma.sync.aligned.m16n8k32.row.col.f32." TA "." TB                                       \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                         \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  constexpr bool kA4 = is_same_v<A, __nv_fp8_e4m3>, kB4 = is_same_v<B, __nv_fp8_e4m3>;
  if constexpr (kA4 && kB4) FI_MMA_FP8("e4m3", "e4m3");
  if constexpr (kA4 && !kB4) FI_MMA_FP8("e4m3", "e5m2");
  if constexpr (!kA4 && kB4) FI_MMA_FP8("e5m2", "e4m3");
  if constexpr (!kA4 && !kB4) FI_MMA_FP8("e5m2", "e5m2");
#undef FI_MMA_FP8
#else
  uint32_t a_lo[4], a_hi[4], b_lo[2], b_hi[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) fp8_to_halves<A>(a[i], a_lo[i], a_hi[i]);
#pragma unroll
  for (int i = 0; i < 2; ++i) fp8_to_halves<B>(b[i], b_lo[i], b_hi[i]);
  mma_m16n8k16<__half>(c, a_lo, b_lo);
  mma_m16n8k16<__half>(c, a_hi, b_hi);
#endif
}

}  // namespace fi::ptx
