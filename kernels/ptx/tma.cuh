// The copy engine (sm_90): boxes of a tensor, described by a tensor map that the host encodes (jit/driver.py), between
// global and shared memory. One thread starts a copy; the box's bytes arrive at an mbarrier. Elements outside the tensor
// are zeros. With the 128-byte swizzle a box is rows of 128 bytes, the 16-byte chunk c of row r at chunk c ^ (r % 8).
#pragma once
#include "ptx/mbarrier.cuh"

namespace fi::ptx {

// CUtensorMap: opaque, 64-byte aligned, in the kernel's parameters.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// True in one lane of a converged warp. The compiler knows that it is one, and starts a copy there without a loop over lanes.
FI_DEVICE bool elect_one() {
  uint32_t chosen;
  asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(chosen));
  return chosen != 0;
}
FI_DEVICE void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
FI_DEVICE void tma_load_4d(uint32_t smem, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          smem),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w)
      : "memory");
}
FI_DEVICE void tma_load_5d(uint32_t smem, const TensorMap& map, uint32_t barrier, int x, int y, int z, int w, int u) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(
          smem),
      "l"(&map), "r"(barrier), "r"(x), "r"(y), "r"(z), "r"(w), "r"(u)
      : "memory");
}
// The box into L2 alone, for a copy that comes later.
FI_DEVICE void tma_prefetch_5d(const TensorMap& map, int x, int y, int z, int w, int u) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global [%0, {%1, %2, %3, %4, %5}];" ::"l"(&map), "r"(x), "r"(y), "r"(z),
               "r"(w), "r"(u)
               : "memory");
}
// Shared memory written by ordinary stores of this thread becomes visible to the copy engine and the tensor cores.
FI_DEVICE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

}  // namespace fi::ptx
