// Thread-block clusters (sm_90 and later): the barrier in two halves, and addresses in another CTA's shared memory.
// Older architectures have clusters of one CTA: there every function is trivial, and callers use __syncthreads.
#pragma once
#include "common/base.cuh"

namespace fi::ptx {

// This CTA's number in its cluster.
FI_DEVICE uint32_t cluster_rank() {
#if FI_ARCH >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
// The generic address of `p`, an object in this CTA's shared memory, as CTA `rank` of the cluster has it.
template <typename T>
FI_DEVICE T* cluster_map(T* p, uint32_t rank) {
#if FI_ARCH >= 900
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(address);
#else
  return p;
#endif
}
// All threads of the cluster arrive, and those that want to go on wait. What was written before an arrival, in global
// memory and in any CTA's shared memory, is seen behind the wait. A CTA may exit behind its arrival if nobody will
// touch its shared memory.
FI_DEVICE void cluster_arrive() {
#if FI_ARCH >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
}
// The same without any order of memory: "this CTA has started", and what mailbox_open did.
FI_DEVICE void cluster_arrive_relaxed() {
#if FI_ARCH >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
FI_DEVICE void cluster_wait() {
#if FI_ARCH >= 900
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

}  // namespace fi::ptx
