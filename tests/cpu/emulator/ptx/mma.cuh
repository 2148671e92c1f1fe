// mma.sync and ldmatrix on the CPU: lanes exchange their fragments, each computes its own elements.
#pragma once
#include "ptx/cp_async.cuh"
namespace fi::ptx {
inline uint32_t word_at(uint32_t address) {
  uint32_t x;
  memcpy(&x, smem_at(address), 4);
  return x;
}
template <bool kTrans, int kMatrices>
void ldmatrix(uint32_t* r, uint32_t row) {
  if (row % 16) emulator::fail("misaligned ldmatrix");
  const uint64_t* rows = emulator::exchange(row, 0xffffffffu, 20 + kTrans);
  const int lane = emulator::current->thread.x & 31, g = lane / 4, t = lane % 4;
  for (int i = 0; i < kMatrices; ++i) {
    const uint64_t* m = rows + 8 * i;
    if (!kTrans) {
      r[i] = word_at(uint32_t(m[g]) + t * 4);
    } else {
      uint16_t lo, hi;
      memcpy(&lo, smem_at(uint32_t(m[2 * t]) + g * 2), 2);
      memcpy(&hi, smem_at(uint32_t(m[2 * t + 1]) + g * 2), 2);
      r[i] = lo | uint32_t(hi) << 16;
    }
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t row) { ldmatrix<false, 4>(r, row); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t row) { ldmatrix<true, 4>(r, row); }
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) { ldmatrix_x4(r, smem_address(row)); }
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { ldmatrix_x4_trans(r, smem_address(row)); }
template <typename T>
float half_of(uint32_t word, int half) {
  T x;
  const uint16_t bits = uint16_t(word >> (16 * half));
  memcpy(&x, &bits, 2);
  if constexpr (is_same_v<T, __half>) return __half2float(x);
  else return __bfloat162float(x);
}
template <typename T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint64_t a01[32], a23[32], bb[32];
  memcpy(a01, emulator::exchange(a[0] | uint64_t(a[1]) << 32, 0xffffffffu, 22), sizeof(a01));
  memcpy(a23, emulator::exchange(a[2] | uint64_t(a[3]) << 32, 0xffffffffu, 23), sizeof(a23));
  memcpy(bb, emulator::exchange(b[0] | uint64_t(b[1]) << 32, 0xffffffffu, 24), sizeof(bb));
  const int lane = emulator::current->thread.x & 31, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int high = i >> 1, column = 2 * t + (i & 1);
    for (int k = 0; k < 16; ++k) {
      const int s = k % 8 / 2;
      const uint64_t from = k < 8 ? a01[4 * g + s] : a23[4 * g + s];
      c[i] += half_of<T>(uint32_t(from >> (32 * high)), k & 1) *
              half_of<T>(uint32_t(bb[4 * column + s] >> (k < 8 ? 0 : 32)), k & 1);
    }
  }
}
template <typename T>
void mma_m16n8k16_first(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  c[0] = c[1] = c[2] = c[3] = 0.f;
  mma_m16n8k16<T>(c, a, b);
}
// movmatrix: lane 4 g + t has (row g, columns 2 t and 2 t + 1) of the transpose.
inline uint32_t transpose_8x8(uint32_t x) {
  const uint64_t* all = emulator::exchange(x, 0xffffffffu, 36);
  const int lane = emulator::current->thread.x & 31, g = lane / 4, t = lane % 4;
  auto at = [&](int row, int column) { return uint32_t(all[4 * row + column / 2] >> (column % 2 * 16)) & 0xffffu; };
  return at(2 * t, g) | at(2 * t + 1, g) << 16;
}
template <typename T>
uint32_t pack2(float lo, float hi) {
  T x, y;
  if constexpr (is_same_v<T, __half>) x = __float2half_rn(lo), y = __float2half_rn(hi);
  else x = __float2bfloat16_rn(lo), y = __float2bfloat16_rn(hi);
  return x.bits | uint32_t(y.bits) << 16;
}
}  // namespace fi::ptx
