// Segments of a grouped product from what DeepGEMM's layouts give: rows with a group's number each, or a number of rows a group.
//   row_runs: indices[row] -> runs of equal numbers: run r is rows [indptr[r], indptr[r + 1]), its weight weights[r], -1 for numbers that
//     are no group's. At most `most` runs; the entries after the last are empty. Rows of further runs are left out.
//   masked_runs: group g has rows [g size, g size + counts[g]): its run, then one of weight -1 to the next group's rows.
// One CTA; grid = 1. A thread looks at kItems rows a round, kThreads apart; a warp numbers the starts of runs.
// Shared memory: a few words. Bytes moved: 4 or 8 a row; 8 a run. Architecture: any.
#pragma once
#include "common/base.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct RunsParams {
  const void* numbers;  // indices [rows] or counts [groups], int32 or int64
  int32_t* indptr;      // [most + 1]
  int32_t* weights;     // [most]
  uint32_t rows;        // of all; masked: of a group
  uint32_t groups;
  uint32_t most;
  uint32_t wide;  // numbers are int64
};

FI_DEVICE int64_t run_number(const RunsParams& params, uint32_t i) {
  return params.wide ? static_cast<const int64_t*>(params.numbers)[i] : static_cast<const int32_t*>(params.numbers)[i];
}

// Config: kThreads, kItems
template <class Config>
FI_DEVICE void row_runs(const RunsParams& params) {
  constexpr int kThreads = Config::kThreads, kItems = Config::kItems, kWarps = kThreads / kWarpSize;
  struct Shared {
    uint32_t counts[kItems * kWarps];
    uint32_t total;
  };
  __shared__ Shared shared;
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  auto group_of = [&](uint32_t row) {
    const int64_t number = run_number(params, row);
    return number >= 0 && number < params.groups ? int32_t(number) : -1;
  };
  uint32_t found = 0;  // runs before this round
  for (uint32_t base = 0; base < params.rows; base += kThreads * kItems) {
    int32_t group[kItems], before[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const uint32_t row = base + i * kThreads + threadIdx.x;
      group[i] = row < params.rows ? group_of(row) : -2;
      before[i] = row < params.rows && row > 0 ? group_of(row - 1) : -2;
    }
    uint32_t starts[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      starts[i] = __ballot_sync(kFullMask, group[i] != before[i]);
      if (lane_id() == 0) shared.counts[i * kWarps + warp_id()] = __popc(starts[i]);
    }
    __syncthreads();  // every warp's counts are there
    if (warp_id() == 0) {
      constexpr int kShare = kItems * kWarps / kWarpSize;  // neighbouring counts of a lane
      uint32_t own[kShare], sum = 0;
#pragma unroll
      for (int j = 0; j < kShare; ++j) own[j] = shared.counts[lane_id() * kShare + j], sum += own[j];
      uint32_t scan = sum;
#pragma unroll
      for (int offset = 1; offset < kWarpSize; offset *= 2) {
        const uint32_t other = __shfl_up_sync(kFullMask, scan, offset);
        if (lane_id() >= offset) scan += other;
      }
      uint32_t at = scan - sum;
#pragma unroll
      for (int j = 0; j < kShare; ++j) shared.counts[lane_id() * kShare + j] = at, at += own[j];
      if (lane_id() == kWarpSize - 1) shared.total = at;
    }
    __syncthreads();  // the counts are sums of those before
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (group[i] == before[i]) continue;
      const uint32_t row = base + i * kThreads + threadIdx.x;
      const uint32_t run = found + shared.counts[i * kWarps + warp_id()] + __popc(starts[i] & ((1u << lane_id()) - 1));
      if (run <= params.most) params.indptr[run] = row;
      if (run < params.most) params.weights[run] = group[i];
    }
    found += shared.total;
    __syncthreads();  // the sums are read
  }
  for (uint32_t run = found + threadIdx.x; run <= params.most; run += kThreads) {
    params.indptr[run] = params.rows;
    if (run < params.most) params.weights[run] = -1;
  }
}

// Config: kThreads
template <class Config>
FI_DEVICE void masked_runs(const RunsParams& params) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  for (uint32_t g = threadIdx.x; g < params.groups; g += Config::kThreads) {
    const int64_t number = run_number(params, g), count = number < 0 ? 0 : number < params.rows ? number : params.rows;
    params.indptr[2 * g] = g * params.rows;
    params.indptr[2 * g + 1] = g * params.rows + uint32_t(count);
    params.weights[2 * g] = g;
    params.weights[2 * g + 1] = -1;
  }
  if (threadIdx.x == 0) params.indptr[2 * params.groups] = params.groups * params.rows;
}

}  // namespace fi
