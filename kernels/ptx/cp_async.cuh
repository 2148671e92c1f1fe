// cp.async (sm_80 and later); on sm_75 the same calls are plain loads and stores, complete at once.
#pragma once
#include "common/base.cuh"

namespace fi::ptx {

FI_DEVICE uint32_t smem_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copy 16 bytes past L1; `valid` false writes zeros and reads nothing.
FI_DEVICE void cp_async_16(void* smem, const void* global, bool valid = true) {
#if FI_ARCH >= 800
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(smem_address(smem)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(smem) = valid ? *static_cast<const uint4*>(global) : make_uint4(0, 0, 0, 0);
#endif
}
// Copy 16 or 8 bytes; the L1 cache takes part in those of 8.
template <int kBytes>
FI_DEVICE void cp_async(void* smem, const void* global, bool valid) {
  static_assert(kBytes == 16 || kBytes == 8);
  if constexpr (kBytes == 16) {
    cp_async_16(smem, global, valid);
  } else {
#if FI_ARCH >= 800
    asm volatile("cp.async.ca.shared.global.L2::128B [%0], [%1], 8, %2;" ::"r"(smem_address(smem)), "l"(global),
                 "r"(valid ? 8 : 0)
                 : "memory");
#else
    *static_cast<uint2*>(smem) = valid ? *static_cast<const uint2*>(global) : make_uint2(0, 0);
#endif
  }
}
FI_DEVICE void cp_async_commit() {
#if FI_ARCH >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Wait until at most `pending` of this thread's groups are in flight.
template <int pending>
FI_DEVICE void cp_async_wait() {
#if FI_ARCH >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

}  // namespace fi::ptx
