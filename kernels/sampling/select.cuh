// Exact selection without sorting: the smallest key v of a row such that the weight of all keys above v is less than a
// target. With weight 1 and target k that is the k-th largest value; with masses, the top-p threshold. Radix search from
// the top over histograms in shared memory (2048 bins; integer weights, so the order of the atomics does not matter),
// whose bins cover just the keys still possible: three rounds at most, two for 16-bit types.
#pragma once
#include "sampling/row.cuh"

namespace fi::sampling {

constexpr int kBins = 2048, kBinBits = 11;

struct SelectScratch {
  uint32_t low[kBins], high[kBins];  // a 64-bit weight in two halves: shared memory has no fast 64-bit addition
  uint64_t warp_sum[32];
  uint64_t above, total;
  uint32_t bin;
};

// Inclusive sums of x over the CTA's threads in order, and the total of all. Two barriers; warp_sum is free after them.
template <int kThreads>
FI_DEVICE uint64_t block_scan(uint64_t x, uint64_t* warp_sum, uint64_t& total) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(kFullMask, x, offset);
    if (lane_id() >= offset) x += other;
  }
  if (lane_id() == 31) warp_sum[warp_id()] = x;
  __syncthreads();
  uint64_t before = 0, all = 0;
#pragma unroll 4
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp_id()) before += warp_sum[w];
    all += warp_sum[w];
  }
  __syncthreads();
  total = all;
  return before + x;
}

FI_DEVICE void add_weight(SelectScratch& scratch, uint32_t bin, uint64_t weight) {
  const uint32_t part = uint32_t(weight);
  const uint32_t old = atomicAdd(&scratch.low[bin], part);
  const uint32_t rest = uint32_t(weight >> 32) + (old + part < part);
  if (rest) atomicAdd(&scratch.high[bin], rest);
}

// The keys' source: each(low, high, add) calls add(key, weight) for every element with low <= key <= high, spread over
// the CTA. `low`, `high`: bounds of the keys; everything under `low` must be known to be rejected. Stops when bins are
// 2^exact_bits keys wide (the caller's element type has no two values so near, or a lower bound is enough), and returns
// the lower end of the bin. If all weights sum to less than the target, `low` itself. Same result in every thread.
template <int kThreads, bool kCount, class Each>
FI_DEVICE uint32_t select(Each&& each, uint32_t low, uint32_t high, uint64_t target, int exact_bits,
                          SelectScratch& scratch) {
  constexpr int kOwn = kBins / kThreads;
  static_assert(kOwn * kThreads == kBins);
  while (low < high) {
    const int bits = 32 - __clz(high - low);
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      scratch.low[threadIdx.x + i * kThreads] = 0;
      if constexpr (!kCount) scratch.high[threadIdx.x + i * kThreads] = 0;
    }
    __syncthreads();  // bins are clear, and everyone has read the former round's result
    each(low, high, [&](uint32_t key, uint64_t weight) {
      const uint32_t bin = (key - low) >> shift;
      if constexpr (kCount) {
        atomicAdd(&scratch.low[bin], 1u);
      } else if (weight) {
        add_weight(scratch, bin, weight);
      }
    });
    __syncthreads();  // bins are complete
    // Thread t owns kOwn bins, from the top down.
    uint64_t own[kOwn], sum = 0, total;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int bin = kBins - 1 - (int(threadIdx.x) * kOwn + i);
      own[i] = kCount ? uint64_t(scratch.low[bin]) : uint64_t(scratch.high[bin]) << 32 | scratch.low[bin];
      sum += own[i];
    }
    uint64_t above = block_scan<kThreads>(sum, scratch.warp_sum, total) - sum;
    if (total < target) return low;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (above < target && target <= above + own[i]) {  // one bin of one thread
        scratch.bin = kBins - 1 - (threadIdx.x * kOwn + i);
        scratch.above = above;
      }
      above += own[i];
    }
    __syncthreads();  // the bin is known
    target -= scratch.above;
    low += scratch.bin << shift;
    high = min_of(high, low + ((1u << shift) - 1));
    if (shift <= exact_bits) break;
  }
  __syncthreads();  // the scratch may be used again
  return low;
}

}  // namespace fi::sampling
