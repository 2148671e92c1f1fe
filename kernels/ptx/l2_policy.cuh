// Copies of what is read once (sm_90; elsewhere the L2 is left to itself).
#pragma once
#include "ptx/cp_async.cuh"

namespace fi::ptx {

// The policy of lines that are the first to leave the L2.
FI_DEVICE uint64_t evict_first_policy() {
  uint64_t policy = 0;
#if FI_ARCH >= 900
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
#endif
  return policy;
}
// cp_async_16 under a policy.
FI_DEVICE void cp_async_16_policy(void* smem, const void* global, uint64_t policy, bool valid) {
#if FI_ARCH >= 900
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(smem_address(smem)),
               "l"(global), "r"(valid ? 16 : 0), "l"(policy)
               : "memory");
#else
  cp_async_16(smem, global, valid);
#endif
}

}  // namespace fi::ptx
