// Warpgroup products with both operands in shared memory on the CPU, of 16-bit types and of bytes.
#pragma once
#include "ptx/mma_fp8.cuh"
#include "ptx/wgmma.cuh"
namespace fi::ptx {
// An element of an operand that is contiguous along k.
template <typename T>
float element(uint64_t descriptor, int row, int k) {
  if constexpr (sizeof(T) == 2) {
    return operand<T, false>(descriptor, row, k);
  } else {
    const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    uint32_t at = start + row / 8 * stride + row % 8 * 128 + k;
    at ^= (at >> 7 & 7) << 4;
    return byte_of<T>(*smem_at(at), 0);
  }
}
template <typename A, typename B, int N>
struct WgmmaShared {
  static constexpr int kDepth = 32 / sizeof(A);
  template <class Get>
  static void add(float (&d)[N / 2], int accumulate, uint64_t a, const Get& b) {
    const int lane = emulator::current->thread.x & 31, warp = emulator::current->thread.x / 32 % 4;
    float rows[2][kDepth];
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < kDepth; ++k) rows[h][k] = element<A>(a, warp * 16 + lane / 4 + h * 8, k);
    for (int i = 0; i < N / 4; ++i) {
      float column[kDepth];
      for (int k = 0; k < kDepth; ++k) column[k] = b(i / 2 * 8 + lane % 4 * 2 + (i & 1), k);
      for (int h = 0; h < 2; ++h) {
        float& x = d[i / 2 * 4 + h * 2 + (i & 1)];
        float sum = accumulate ? x : 0.f;
        for (int k = 0; k < kDepth; ++k) sum += rows[h][k] * column[k];
        x = sum;
      }
    }
  }
  static void run(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    Wgmma<__half, N>::queue([&d, a, b, accumulate] { add(d, accumulate, a, [&](int n, int k) { return element<B>(b, n, k); }); });
  }
  static void run_n(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    Wgmma<__half, N>::queue([&d, a, b, accumulate] {
      if constexpr (sizeof(B) == 2) add(d, accumulate, a, [&](int n, int k) { return operand<B, true>(b, n, k); });
    });
  }
};
}  // namespace fi::ptx
