// Exact selection without sorting: the smallest key v of a set such that the weight of all keys above v is less than a
// target. With weight 1 and target k that is the k-th largest value; with masses, the top-p threshold. Radix search from
// the top over histograms in shared memory (2048 bins; integer weights, so the order of the atomics does not matter),
// whose bins cover just the keys still possible: three rounds at most, two for 16-bit types.
#pragma once
#include "sampling/row.cuh"

namespace fi::sampling {

// Inclusive sums over the warp's lanes.
FI_DEVICE uint64_t warp_scan(uint64_t x) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(kFullMask, x, offset);
    if (lane_id() >= offset) x += other;
  }
  return x;
}
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
  const uint64_t other = lane_id() < kThreads / 32 ? warp_sum[lane_id()] : 0;
  const uint64_t before = ptx::warp_sum_u64(lane_id() < warp_id() ? other : 0), all = ptx::warp_sum_u64(other);
  __syncthreads();
  total = all;
  return before + x;
}

// The sum of x over the CTA's threads. Two barriers.
template <int kThreads>
FI_DEVICE uint64_t block_sum(uint64_t x, uint64_t* warp_sum) {
  x = ptx::warp_sum_u64(x);
  if (lane_id() == 0) warp_sum[warp_id()] = x;
  __syncthreads();
  const uint64_t all = ptx::warp_sum_u64(lane_id() < kThreads / 32 ? warp_sum[lane_id()] : 0);
  __syncthreads();
  return all;
}

// Add to a 64-bit weight in two halves: shared memory has no fast 64-bit addition.
FI_DEVICE void add_weight(uint32_t* bins, uint32_t bin, uint64_t weight) {
  const uint32_t part = uint32_t(weight);
  const uint32_t old = atomicAdd(&bins[bin], part);
  const uint32_t rest = uint32_t(weight >> 32) + (old + part < part);
  if (rest) atomicAdd(&bins[kBins + bin], rest);
}

// Search among the elements of low <= key <= high, whose lower part must be known to be rejected: visit(low, high, f)
// calls f(value, key) for each, spread over the CTA, and weigh(value) is an element's weight. Stops when bins are
// 2^exact_bits keys wide (the element type has no two values so near), and returns the lower end of the bin. If all
// weights sum to less than the target, `low` itself. Same result in every thread.
template <int kThreads, class Shared, class Visit, class Weigh>
FI_DEVICE uint32_t select(Visit&& visit, Weigh&& weigh, uint32_t low, uint32_t high, uint64_t target, int exact_bits,
                          Shared& shared) {
  constexpr int kOwn = kBins / kThreads;
  static_assert(kOwn * kThreads == kBins);
  uint32_t* const bins = shared.bins;
  __syncthreads();  // the bins are no longer in use for anything else
#pragma unroll 1
  while (low < high) {
    const int bits = 32 - __clz(high - low);
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
#pragma unroll
    for (int i = 0; i < 2 * kOwn; ++i) bins[threadIdx.x + i * kThreads] = 0;
    __syncthreads();  // bins are clear, and everyone has read the former round's result
    // A run of equal bins is added at once: rows of ties would otherwise queue up at one bin.
    uint32_t last = 0;
    uint64_t run = 0;
    visit(low, high, [&](float x, uint32_t key) {
      const uint32_t bin = (key - low) >> shift;
      if (bin != last) {
        if (run) add_weight(bins, last, run);
        last = bin;
        run = 0;
      }
      run += weigh(x);
    });
    if (run) add_weight(bins, last, run);
    __syncthreads();  // bins are complete
    // Thread t owns kOwn bins, from the top down.
    uint64_t own[kOwn], sum = 0, total;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int bin = kBins - 1 - (int(threadIdx.x) * kOwn + i);
      own[i] = uint64_t(bins[kBins + bin]) << 32 | bins[bin];
      sum += own[i];
    }
    uint64_t above = block_scan<kThreads>(sum, shared.warp_sum, total) - sum;
    if (total < target) return low;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (above < target && target <= above + own[i]) {  // one bin of one thread
        shared.bin = kBins - 1 - (threadIdx.x * kOwn + i);
        shared.above = above;
      }
      above += own[i];
    }
    __syncthreads();  // the bin is known
    target -= shared.above;
    low += shared.bin << shift;
    high = min_of(high, low + ((1u << shift) - 1));
    if (shift <= exact_bits) break;
  }
  return low;
}

}  // namespace fi::sampling
