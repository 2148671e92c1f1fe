// Loads with hints for the L2, which is not emulated.
#pragma once
#include "ptx/tma.cuh"
namespace fi::ptx {
constexpr uint64_t kEvictFirst = 1, kEvictNormal = 2;
inline void tma_load_5d(uint32_t smem, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w, int u, uint64_t) {
  tma_load_5d(smem, map, barrier, x, y, z, w, u);
}
}  // namespace fi::ptx
