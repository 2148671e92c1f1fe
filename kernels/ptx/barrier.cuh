// Barriers among some of a CTA's warps, by number; 0 is that of __syncthreads.
#pragma once
#include "common/base.cuh"

namespace fi::ptx {

// `threads` (a multiple of 32) threads have to arrive, these among them; what they wrote to shared memory is seen behind it.
FI_DEVICE void barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}
// Arrive, and do not wait.
FI_DEVICE void barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

}  // namespace fi::ptx
