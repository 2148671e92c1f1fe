// Copies of the copy engine that say how long their lines should stay in L2 (sm_90). cp.async takes such a hint, too, but of
// one to a partly uniform address ptxas (13.0) makes an illegal instruction.
#pragma once
#include "ptx/tma.cuh"

namespace fi::ptx {

// What createpolicy.fractional makes of evict_first and evict_normal for all of the lines.
constexpr uint64_t kEvictFirst = 0x12f0000000000000ull, kEvictNormal = 0x1000000000000000ull;

FI_DEVICE void tma_load_5d(uint32_t smem, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w, int u,
                           uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], "
      "[%2], %8;" ::"r"(smem),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "r"(u), "l"(policy)
      : "memory");
}

}  // namespace fi::ptx
