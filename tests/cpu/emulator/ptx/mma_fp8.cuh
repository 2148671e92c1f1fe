// mma.sync of 8-bit floats on the CPU: lanes exchange their fragments, each computes its own elements.
#pragma once
#include "ptx/mma.cuh"
namespace fi::ptx {
template <typename T>
float byte_of(uint32_t word, int byte) {
  const uint8_t bits = uint8_t(word >> (8 * byte));
  return is_same_v<T, __nv_fp8_e5m2> ? fp8_to_float<2>(bits) : fp8_to_float<3>(bits);
}
template <typename A, typename B>
void mma_m16n8k32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  uint64_t a01[32], a23[32], bb[32];
  memcpy(a01, emulator::exchange(a[0] | uint64_t(a[1]) << 32, 0xffffffffu, 25), sizeof(a01));
  memcpy(a23, emulator::exchange(a[2] | uint64_t(a[3]) << 32, 0xffffffffu, 26), sizeof(a23));
  memcpy(bb, emulator::exchange(b[0] | uint64_t(b[1]) << 32, 0xffffffffu, 27), sizeof(bb));
  const int lane = emulator::current->thread.x & 31, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int high = i >> 1, column = 2 * t + (i & 1);
    for (int k = 0; k < 32; ++k) {
      const int s = k % 16 / 4;
      const uint64_t from = k < 16 ? a01[4 * g + s] : a23[4 * g + s];
      c[i] += byte_of<A>(uint32_t(from >> (32 * high)), k & 3) *
              byte_of<B>(uint32_t(bb[4 * column + s] >> (k < 16 ? 0 : 32)), k & 3);
    }
  }
}
}  // namespace fi::ptx
