#pragma once
#include "common/base.cuh"
namespace fi::ptx {
inline void barrier_sync(int number, int threads) { emulator::named_barrier(number, threads, true); }
inline void barrier_arrive(int number, int threads) { emulator::named_barrier(number, threads, false); }
}  // namespace fi::ptx
