// Which segment of a ragged array holds an element: search in `indptr` (n + 1 ascending offsets; empty segments allowed).
#pragma once
#include "common/base.cuh"

namespace fi {

// The s with indptr[s] <= element < indptr[s + 1]; -1 when no segment holds the element. One thread.
template <typename I>
FI_DEVICE int find_segment(const I* indptr, int n, int64_t element) {
  if (n <= 0 || element < int64_t(indptr[0]) || element >= int64_t(indptr[n])) return -1;
  int low = 0, high = n;  // indptr[low] <= element < indptr[high]
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (int64_t(indptr[middle]) <= element)
      low = middle;
    else
      high = middle;
  }
  return low;
}

// The same by a whole warp with equal arguments: 32 probes a step, so 1024 segments take two dependent loads.
template <typename I>
FI_DEVICE int warp_find_segment(const I* indptr, int n, int64_t element) {
  if (n <= 0 || element < int64_t(indptr[0]) || element >= int64_t(indptr[n])) return -1;
  int low = 0, high = n;  // indptr[low] <= element < indptr[high]
  while (high - low > 1) {
    const int step = ceil_div(high - low, kWarpSize);
    const int64_t probe = low + int64_t(lane_id() + 1) * step;
    const bool before = probe < high && int64_t(indptr[probe]) <= element;
    low += __popc(__ballot_sync(kFullMask, before)) * step;  // offsets ascend: the lanes that say yes come first
    high = min_of(high, low + step);
  }
  return low;
}

}  // namespace fi
