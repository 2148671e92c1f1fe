// Loads that say how long their lines should stay in L2 (sm_80 and later, the copy engine sm_90).
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
// cp_async_16 of what is read once.
FI_DEVICE void cp_async_16_once(void* smem, const void* global, bool valid) {
#if FI_ARCH >= 800
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(smem_address(smem)), "l"(global),
               "r"(valid ? 16 : 0), "l"(kEvictFirst)
               : "memory");
#else
  *static_cast<uint4*>(smem) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}

}  // namespace fi::ptx
