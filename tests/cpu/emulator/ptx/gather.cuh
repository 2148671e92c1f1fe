#pragma once
#include "ptx/mbarrier.cuh"
namespace fi::ptx {
inline void cp_async_arrive(uint32_t barrier) { mbarrier_arrive(barrier); }
inline void prefetch_l2(const void*) {}
}  // namespace fi::ptx
