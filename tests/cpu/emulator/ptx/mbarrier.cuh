// mbarrier on the CPU: 64 bits of shared memory, {expected, pending, bytes, phase}. Waiting gives way to the others.
#pragma once
#include "ptx/cp_async.cuh"
namespace fi::ptx {
struct MBarrier {
  int16_t expected, pending;
  int32_t bytes : 31;
  uint32_t phase : 1;
};
static_assert(sizeof(MBarrier) == 8);
inline MBarrier& mbarrier_at(uint32_t barrier) {
  if (barrier % 8) emulator::fail("misaligned mbarrier");
  return *reinterpret_cast<MBarrier*>(smem_at(barrier));
}
inline void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  mbarrier_at(barrier) = {int16_t(arrivals), int16_t(arrivals), 0, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_check(MBarrier& b) {
  if (b.pending < 0) emulator::fail("too many arrivals");
  if (b.pending == 0 && b.bytes == 0) b.pending = b.expected, b.phase ^= 1;
}
inline void mbarrier_arrive(uint32_t barrier) {
  MBarrier& b = mbarrier_at(barrier);
  --b.pending;
  mbarrier_check(b);
}
inline void mbarrier_arrive_expect(uint32_t barrier, uint32_t bytes) {
  MBarrier& b = mbarrier_at(barrier);
  b.bytes += int(bytes);
  --b.pending;
  mbarrier_check(b);
}
inline void mbarrier_complete(uint32_t barrier, uint32_t bytes) {
  MBarrier& b = mbarrier_at(barrier);
  b.bytes -= int(bytes);
  mbarrier_check(b);
}
inline void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  emulator::current->caller = __builtin_return_address(0);
  for (int i = 0; mbarrier_at(barrier).phase == parity; ++i) {
    if (i == 2000000) emulator::fail("mbarrier that nobody completes");
    emulator::current->at = "mbarrier";
    emulator::ready.push_back(emulator::current);
    emulator::pause();
  }
}
}  // namespace fi::ptx
