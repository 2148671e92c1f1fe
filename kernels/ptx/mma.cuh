// ldmatrix and mma.sync: C[16,8] += A[16,16] B[16,8] with fp32 accumulators, fp16 or bf16 operands.
// Fragments (lane = 4 g + t): A0 = (row g, k 2t..), A1 = (row g+8, k 2t..), A2 = (row g, k 2t+8..), A3 = (row g+8, k 2t+8..);
// B0 = (k 2t.., column g), B1 = (k 2t+8.., column g); C0,C1 = (row g, columns 2t, 2t+1), C2,C3 = row g+8.
// sm_75 has m16n8k8 for fp16 only: two of them make a step; bf16 runs on the CUDA cores there. No kernel branches on the
// architecture for it.
#pragma once
#include "common/base.cuh"
#include "ptx/cp_async.cuh"

namespace fi::ptx {

// `row`: this lane's row as an address in shared memory.
FI_DEVICE void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
FI_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}
FI_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}
FI_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(smem_address(row))
               : "memory");
}
FI_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_address(row))
               : "memory");
}
FI_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(smem_address(row))
               : "memory");
}

template <typename T>
FI_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

template <>
FI_DEVICE void mma_m16n8k16<__half>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if FI_ARCH >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[2]), "r"(a[3]), "r"(b[1]));
#endif
}

template <>
FI_DEVICE void mma_m16n8k16<__nv_bfloat16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if FI_ARCH >= 800
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // Turing has no bf16 matrix unit. Exact in fp32: lane (g, t) needs rows g and g+8 of A and columns 2t, 2t+1 of B, which
  // lanes 4g..4g+3 and 8t..8t+7 hold. 256 FMAs a warp step: slow, right, and without fp16's range.
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll 1  // a kernel has hundreds of these: unrolled, they take the compiler minutes
    for (int s = 0; s < 4; ++s) {
      const uint32_t a_lo = __shfl_sync(kFullMask, a[2 * half], 4 * g + s);
      const uint32_t a_hi = __shfl_sync(kFullMask, a[2 * half + 1], 4 * g + s);
      const uint32_t b_0 = __shfl_sync(kFullMask, b[half], 8 * t + s);
      const uint32_t b_1 = __shfl_sync(kFullMask, b[half], 8 * t + 4 + s);
      const float al0 = __uint_as_float(a_lo << 16), al1 = __uint_as_float(a_lo & 0xffff0000u);
      const float ah0 = __uint_as_float(a_hi << 16), ah1 = __uint_as_float(a_hi & 0xffff0000u);
      const float b00 = __uint_as_float(b_0 << 16), b01 = __uint_as_float(b_0 & 0xffff0000u);
      const float b10 = __uint_as_float(b_1 << 16), b11 = __uint_as_float(b_1 & 0xffff0000u);
      c[0] = fmaf(al1, b01, fmaf(al0, b00, c[0]));
      c[1] = fmaf(al1, b11, fmaf(al0, b10, c[1]));
      c[2] = fmaf(ah1, b01, fmaf(ah0, b00, c[2]));
      c[3] = fmaf(ah1, b11, fmaf(ah0, b10, c[3]));
    }
  }
#endif
}

// C = A B: the first product of a sum, without registers set to zero for it.
template <typename T>
FI_DEVICE void mma_m16n8k16_first(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if FI_ARCH >= 800
  constexpr bool kHalf = is_same_v<T, __half>;
  if constexpr (kHalf)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.f));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %10, %10, %10};"
        : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(0.f));
#else
  c[0] = c[1] = c[2] = c[3] = 0.f;
  mma_m16n8k16<T>(c, a, b);
#endif
}

// Two floats as one register of T pairs, `lo` in the low half.
template <typename T>
FI_DEVICE uint32_t pack2(float lo, float hi);
template <>
FI_DEVICE uint32_t pack2<__half>(float lo, float hi) {
  __half2 h = __floats2half2_rn(lo, hi);
  return *reinterpret_cast<uint32_t*>(&h);
}
template <>
FI_DEVICE uint32_t pack2<__nv_bfloat16>(float lo, float hi) {
  __nv_bfloat162 h = __floats2bfloat162_rn(lo, hi);
  return *reinterpret_cast<uint32_t*>(&h);
}

// Transpose an 8x8 matrix of 16-bit elements held in fragment layout (lane 4 g + t: row g, columns 2t, 2t+1).
FI_DEVICE uint32_t transpose_8x8(uint32_t x) {
  uint32_t y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace fi::ptx
