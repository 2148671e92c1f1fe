// indptr[i] = sum of lengths[0 .. i): the offsets of ragged segments, int64. One CTA; grid = 1.
// Each thread adds up a run of neighbouring lengths, the runs' sums are scanned by warps, and each thread writes its run.
// Shared memory: one sum a warp. Bytes moved: 8 or 12 a segment, and the lengths twice. Architecture: any.
#pragma once
#include "common/base.cuh"

namespace fi {

struct OffsetsParams {
  const void* lengths;  // [n] int32 or int64; a negative one counts as 0
  int64_t* indptr;      // [n + 1]
  uint32_t n;
  uint32_t wide;  // lengths are int64
};

// Config: kThreads
template <class Config>
FI_DEVICE void segment_offsets(const OffsetsParams& params) {
  constexpr int kWarps = Config::kThreads / kWarpSize;
  struct Shared {
    int64_t sums[kWarps];
  };
  __shared__ Shared shared;
  auto length = [&](uint32_t i) {
    const int64_t x = params.wide ? static_cast<const int64_t*>(params.lengths)[i] : static_cast<const int32_t*>(params.lengths)[i];
    return x > 0 ? x : int64_t(0);
  };
  const uint32_t share = ceil_div<uint32_t>(params.n, Config::kThreads);
  const uint32_t first = min(threadIdx.x * share, params.n), last = min(first + share, params.n);
  int64_t own = 0;
  for (uint32_t i = first; i < last; ++i) own += length(i);
  int64_t scan = own;
#pragma unroll
  for (int offset = 1; offset < kWarpSize; offset *= 2) {
    const int64_t other = __shfl_up_sync(kFullMask, scan, offset);
    if (lane_id() >= offset) scan += other;
  }
  if (lane_id() == kWarpSize - 1) shared.sums[warp_id()] = scan;
  __syncthreads();  // every warp's sum is there
  int64_t at = scan - own;
  for (int w = 0; w < warp_id(); ++w) at += shared.sums[w];
  if (threadIdx.x == 0) params.indptr[0] = 0;
  for (uint32_t i = first; i < last; ++i) {
    at += length(i);
    params.indptr[i + 1] = at;
  }
}

}  // namespace fi
