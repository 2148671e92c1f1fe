// ptx/mma.cuh and ptx/mma_fp8.cuh in plain C++: the same fragments, exchanged between fibres.
#pragma once
#include "common/base.cuh"

namespace fi::ptx {

template <typename F>
FI_DEVICE void load_matrices(uint32_t (&r)[4], const void* row, F read) {
  for (int j = 0; j < 4; ++j) {
    uint64_t rows[8];
    for (int i = 0; i < 8; ++i) rows[i] = __shfl_sync(kFullMask, reinterpret_cast<uint64_t>(row), 8 * j + i);
    r[j] = read(rows);
  }
}
FI_DEVICE uint32_t element(uint64_t row, int column) { return reinterpret_cast<const uint16_t*>(row)[column]; }
FI_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
  load_matrices(r, row, [&](const uint64_t* rows) { return element(rows[g], 2 * t) | element(rows[g], 2 * t + 1) << 16; });
}
FI_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
  load_matrices(r, row, [&](const uint64_t* rows) { return element(rows[2 * t], g) | element(rows[2 * t + 1], g) << 16; });
}

// C[16,8] += A B where `value(word, i)` is element i of a register and a register holds `kValues` of them.
template <int kValues, typename VA, typename VB>
FI_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], VA value_a, VB value_b) {
  const int g = lane_id() >> 2, t = lane_id() & 3;
  for (int part = 0; part < 2; ++part)
    for (int s = 0; s < 4; ++s) {
      const uint32_t lo = __shfl_sync(kFullMask, a[2 * part], 4 * g + s), hi = __shfl_sync(kFullMask, a[2 * part + 1], 4 * g + s);
      const uint32_t b0 = __shfl_sync(kFullMask, b[part], 8 * t + s), b1 = __shfl_sync(kFullMask, b[part], 8 * t + 4 + s);
      for (int i = 0; i < kValues; ++i) {
        c[0] += value_a(lo, i) * value_b(b0, i);
        c[1] += value_a(lo, i) * value_b(b1, i);
        c[2] += value_a(hi, i) * value_b(b0, i);
        c[3] += value_a(hi, i) * value_b(b1, i);
      }
    }
}
template <typename T>
FI_DEVICE float half_value(uint32_t word, int i) {
  const uint16_t bits = uint16_t(word >> 16 * i);
  if constexpr (is_same_v<T, __half>) return __half2float({bits});
  return __bfloat162float({bits});
}
template <typename T>
FI_DEVICE float byte_value(uint32_t word, int i) {
  const uint32_t byte = word >> 8 * i & 0xff, magnitude = byte & 0x7f;
  float x;
  if constexpr (is_same_v<T, __nv_fp8_e5m2>) {
    return __half2float({uint16_t(byte << 8)});
  } else if (magnitude == 0x7f) {
    x = NAN;
  } else if (magnitude < 8) {
    x = ldexpf(float(magnitude), -9);
  } else {
    x = ldexpf(float(8 + (magnitude & 7)), int(magnitude >> 3) - 10);
  }
  return byte & 0x80 ? -x : x;
}
template <typename T>
FI_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<2>(c, a, b, half_value<T>, half_value<T>);
}
template <typename A, typename B>
FI_DEVICE void mma_m16n8k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<4>(c, a, b, byte_value<A>, byte_value<B>);
}

template <typename T>
FI_DEVICE uint32_t pack2(float lo, float hi) {
  if constexpr (is_same_v<T, __half>) return __float2half_rn(lo).bits | uint32_t(__float2half_rn(hi).bits) << 16;
  return __float2bfloat16_rn(lo).bits | uint32_t(__float2bfloat16_rn(hi).bits) << 16;
}

}  // namespace fi::ptx
