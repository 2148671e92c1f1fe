// Messages between the CTAs of a cluster (sm_90 and later): stores into another CTA's shared memory, and a barrier there
// that counts their bytes. The receiver waits for nothing else, and nobody for global memory: a cluster barrier that
// orders shared memory makes every warp wait for all its accesses and empty its L1.
// A mailbox has phases of parity 0, 1, 0, ...; each ends when the bytes that the receiver expects have come. Who sends
// must know that the receiver has opened it, and that what belongs to former phases has arrived.
#pragma once
#include "ptx/cluster.cuh"
#include "ptx/mbarrier.cuh"

namespace fi::ptx {

// By one thread, before the cluster's first barrier. A phase of several senders ends when each has said how much it sends.
FI_DEVICE void mailbox_open(uint64_t* box, uint32_t senders = 1) {
#if FI_ARCH >= 900
  mbarrier_init(smem_address(box), senders);
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
// By one thread, once in each phase.
FI_DEVICE void mailbox_expect(uint64_t* box, uint32_t bytes) {
#if FI_ARCH >= 900
  mbarrier_arrive_expect(smem_address(box), bytes);
#endif
}
// By one thread of each sender, once in each phase: so many bytes of this phase's mail for CTA `rank` are its own.
FI_DEVICE void mailbox_announce(uint64_t* box, uint32_t bytes, uint32_t rank) {
#if FI_ARCH >= 900
  asm volatile(
      "{\n"
      ".reg .b32 counter;\n"
      "mapa.shared::cluster.u32 counter, %0, %2;\n"
      "mbarrier.arrive.expect_tx.relaxed.cluster.shared::cluster.b64 _, [counter], %1;\n"
      "}" ::"r"(smem_address(box)),
      "r"(bytes), "r"(rank)
      : "memory");
#endif
}
// What was posted in the phase is seen behind this.
FI_DEVICE void mailbox_wait(uint64_t* box, uint32_t parity) {
#if FI_ARCH >= 900
  mbarrier_wait(smem_address(box), parity);
#endif
}
// `at` and `box` as this CTA has them; the value goes to CTA `rank`, which may be this one.
FI_DEVICE void post(uint32_t* at, uint32_t value, uint64_t* box, uint32_t rank) {
#if FI_ARCH >= 900
  asm volatile(
      "{\n"
      ".reg .b32 there, counter;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 counter, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [there], %1, [counter];\n"
      "}" ::"r"(smem_address(at)),
      "r"(value), "r"(smem_address(box)), "r"(rank)
      : "memory");
#endif
}
FI_DEVICE void post(uint64_t* at, uint64_t value, uint64_t* box, uint32_t rank) {
#if FI_ARCH >= 900
  asm volatile(
      "{\n"
      ".reg .b32 there, counter;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 counter, %2, %3;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.b64 [there], %1, [counter];\n"
      "}" ::"r"(smem_address(at)),
      "l"(value), "r"(smem_address(box)), "r"(rank)
      : "memory");
#endif
}
FI_DEVICE void post(uint4* at, uint4 value, uint64_t* box, uint32_t rank) {
#if FI_ARCH >= 900
  asm volatile(
      "{\n"
      ".reg .b32 there, counter;\n"
      "mapa.shared::cluster.u32 there, %0, %6;\n"
      "mapa.shared::cluster.u32 counter, %5, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%1, %2, %3, %4}, [counter];\n"
      "}" ::"r"(smem_address(at)),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(smem_address(box)), "r"(rank)
      : "memory");
#endif
}
// Added to what is there: the sum of many is complete when all have been counted.
FI_DEVICE void post_add(uint64_t* at, uint64_t value, uint64_t* box, uint32_t rank) {
#if FI_ARCH >= 900
  asm volatile(
      "{\n"
      ".reg .b32 there, counter;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 counter, %2, %3;\n"
      "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u64 [there], %1, [counter];\n"
      "}" ::"r"(smem_address(at)),
      "l"(value), "r"(smem_address(box)), "r"(rank)
      : "memory");
#endif
}
FI_DEVICE void post_add(uint32_t* at, uint32_t value, uint64_t* box, uint32_t rank) {
#if FI_ARCH >= 900
  asm volatile(
      "{\n"
      ".reg .b32 there, counter;\n"
      "mapa.shared::cluster.u32 there, %0, %3;\n"
      "mapa.shared::cluster.u32 counter, %2, %3;\n"
      "red.async.relaxed.cluster.shared::cluster.mbarrier::complete_tx::bytes.add.u32 [there], %1, [counter];\n"
      "}" ::"r"(smem_address(at)),
      "r"(value), "r"(smem_address(box)), "r"(rank)
      : "memory");
#endif
}

}  // namespace fi::ptx
