// Warpgroup products on the CPU, as late as they can be: they run when they are waited for, on what memory holds then.
#pragma once
#include <unordered_map>

#include "ptx/mma.cuh"
namespace fi::ptx {
struct Products {
  std::vector<std::vector<std::function<void()>>> groups;
  std::vector<std::function<void()>> open;
  bool fenced = false;
};
inline Products& products() {
  static std::unordered_map<emulator::Fibre*, Products> all;
  return all[emulator::current];
}
inline void wgmma_fence() { products().fenced = true; }
inline void wgmma_commit() {
  Products& p = products();
  p.groups.push_back(std::move(p.open));
  p.open.clear();
}
template <int pending>
void wgmma_wait() {
  Products& p = products();
  p.fenced = false;
  while (int(p.groups.size()) > pending) {
    const auto group = std::move(p.groups.front());
    p.groups.erase(p.groups.begin());
    for (const auto& product : group) product();
  }
  emulator::exchange(0u, 0xffffffffu, 35);  // a warp waits as one: no lane goes on before all have their part
}
template <int kRegs>
void wgmma_arrived(float (&)[kRegs]) {}
inline void stmatrix_x4(uint32_t address, const uint32_t (&w)[4]) {
  if (address % 16) emulator::fail("misaligned stmatrix");
  uint64_t rows[32];
  memcpy(rows, emulator::exchange(address, 0xffffffffu, 34), sizeof(rows));
  const int lane = emulator::current->thread.x & 31;
  for (int i = 0; i < 4; ++i) memcpy(smem_at(uint32_t(rows[8 * i + lane / 4]) + lane % 4 * 4), &w[i], 4);
}
inline uint4 load_shared(uint32_t address) {
  if (address % 16) emulator::fail("misaligned load");
  uint4 x;
  memcpy(&x, smem_at(address), 16);
  return x;
}
inline uint64_t wgmma_descriptor(uint32_t address, uint32_t panel, uint32_t stride) {
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(panel >> 4) << 16 | uint64_t(stride >> 4) << 32 | uint64_t(1) << 62;
}
template <int kRegs>
void raise_registers() {}
template <int kRegs>
void lower_registers() {}

// An element of an operand in shared memory. Along rows (or n) and k; kAlongN: n is contiguous.
template <typename T, bool kAlongN>
float operand(uint64_t descriptor, int row, int k) {
  const uint32_t start = uint32_t(descriptor & 0x3fff) << 4, panel = uint32_t(descriptor >> 16 & 0x3fff) << 4,
                 stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
  uint32_t at = kAlongN ? start + row / 64 * panel + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                        : start + row / 8 * stride + row % 8 * 128 + k * 2;
  at ^= (at >> 7 & 7) << 4;
  T x;
  memcpy(&x, smem_at(at), 2);
  if constexpr (is_same_v<T, __half>) return __half2float(x);
  else return __bfloat162float(x);
}
template <typename T, int N>
struct Wgmma {
  template <class A, class B>
  static void add(float (&d)[N / 2], int accumulate, const A& a, const B& b) {
    const int lane = emulator::current->thread.x & 31, warp = emulator::current->thread.x / 32 % 4;
    float rows[2][16];
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 16; ++k) rows[h][k] = a(warp * 16 + lane / 4 + h * 8, k);
    for (int i = 0; i < N / 4; ++i) {
      float column[16];
      for (int k = 0; k < 16; ++k) column[k] = b(i / 2 * 8 + lane % 4 * 2 + (i & 1), k);
      for (int h = 0; h < 2; ++h) {
        float& x = d[i / 2 * 4 + h * 2 + (i & 1)];
        float sum = accumulate ? x : 0.f;
        for (int k = 0; k < 16; ++k) sum += rows[h][k] * column[k];
        x = sum;
      }
    }
  }
  static void queue(std::function<void()> product) {
    if (!products().fenced) emulator::fail("product without a fence");
    products().open.push_back(std::move(product));
  }
  static void ss(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    queue([&d, a, b, accumulate] {
      add(d, accumulate, [&](int r, int k) { return operand<T, false>(a, r, k); },
          [&](int n, int k) { return operand<T, false>(b, n, k); });
    });
  }
  static void st(float (&d)[N / 2], uint64_t a, uint64_t b, int accumulate) {
    queue([&d, a, b, accumulate] {
      add(d, accumulate, [&](int r, int k) { return operand<T, false>(a, r, k); },
          [&](int n, int k) { return operand<T, true>(b, n, k); });
    });
  }
  static void rs(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    const uint32_t words[4] = {a[0], a[1], a[2], a[3]};
    std::vector<uint64_t> all(128);
    for (int i = 0; i < 4; ++i) {
      const uint64_t* got = emulator::exchange(words[i], 0xffffffffu, 30 + i);
      for (int l = 0; l < 32; ++l) all[i * 32 + l] = got[l];
    }
    queue([&d, all, b, accumulate] {
      add(d, accumulate,
          [&](int r, int k) { return half_of<T>(uint32_t(all[((r >> 3 & 1) + (k >> 3) * 2) * 32 + r % 8 * 4 + k % 8 / 2]), k & 1); },
          [&](int n, int k) { return operand<T, true>(b, n, k); });
    });
  }
};
}  // namespace fi::ptx
