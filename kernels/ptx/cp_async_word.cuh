// cp.async of four bytes, for what lies too sparsely for more; a plain copy on sm_75.
#pragma once
#include "ptx/cp_async.cuh"

namespace fi::ptx {

FI_DEVICE void cp_async_4(void* smem, const void* global) {
#if FI_ARCH >= 800
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(smem_address(smem)), "l"(global) : "memory");
#else
  *static_cast<uint32_t*>(smem) = *static_cast<const uint32_t*>(global);
#endif
}

}  // namespace fi::ptx
