#pragma once
#include "common/base.cuh"
namespace fi::ptx {
inline uint32_t count_add(uint32_t* p, uint32_t x) {
  const uint32_t old = *p;
  *p = old + x;
  return old;
}
inline uint32_t count_relaxed(uint32_t* p, uint32_t x) { return count_add(p, x); }
inline bool count_wait(const uint32_t* p, uint32_t mask, uint32_t count, int looks) {
  for (int i = 0; i < looks * 100; ++i) {
    if ((*p & mask) == count) return true;
    emulator::current->at = "count";
    emulator::ready.push_back(emulator::current);
    emulator::pause();
  }
  return false;
}
}  // namespace fi::ptx
