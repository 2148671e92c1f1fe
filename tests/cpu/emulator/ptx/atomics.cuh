#pragma once
#include "common/base.cuh"
namespace fi::ptx {
inline uint32_t atomic_inc_acq_rel(uint32_t* p, uint32_t limit) {
  const uint32_t old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}
inline uint32_t atomic_add_acq_rel(uint32_t* p, uint32_t x) {
  const uint32_t old = *p;
  *p = old + x;
  return old;
}
inline bool wait_for_count(const uint32_t* p, uint32_t mask, uint32_t count, int looks) {
  for (int i = 0; i < looks * 100; ++i) {
    if ((*p & mask) == count) return true;
    emulator::current->at = "count";
    emulator::ready.push_back(emulator::current);
    emulator::pause();
  }
  return false;
}
}  // namespace fi::ptx
