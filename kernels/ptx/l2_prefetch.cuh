// The copy engine's prefetch into L2 (sm_90 and later; elsewhere nothing happens).
#pragma once
#include "common/base.cuh"

namespace fi::ptx {

// Address and size are multiples of 16 bytes. Nothing is ordered by it: who writes the bytes meanwhile writes them in L2,
// where they are found later.
FI_DEVICE void l2_prefetch(const void* global, int bytes) {
#if FI_ARCH >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
#endif
}

}  // namespace fi::ptx
