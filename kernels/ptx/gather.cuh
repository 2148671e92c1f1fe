// Rows gathered into shared memory by threads, their arrival told to a barrier (sm_90).
#pragma once
#include "ptx/mbarrier.cuh"

namespace fi::ptx {

// Arrives at the barrier, once for this thread, when its cp.async so far have landed.
FI_DEVICE void cp_async_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
// The line of 128 bytes into L2 alone.
FI_DEVICE void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

}  // namespace fi::ptx
