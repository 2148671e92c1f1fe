#pragma once
#include "common/base.cuh"
namespace fi::ptx {
inline uint32_t atomic_inc_acq_rel(uint32_t* p, uint32_t limit) {
  const uint32_t old = *p;
  *p = old >= limit ? 0 : old + 1;
  return old;
}
}  // namespace fi::ptx
