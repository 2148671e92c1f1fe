// Segments of a grouped product from what DeepGEMM's layouts give: rows with a group's number each, or a number of rows a group.
//   row_runs: indices[row] -> runs of equal numbers: run r is rows [indptr[r], indptr[r + 1]), its weight weights[r], -1 for numbers that
//     are no group's. At most `most` runs; the entries after the last are empty. Rows of further runs are left out.
//   masked_runs: group g has rows [g size, g size + counts[g]): its run, then one of weight -1 to the next group's rows.
// One CTA; grid = 1. Each thread looks at kItems neighbouring rows a round, whose starts of runs are numbered by a scan.
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
    uint32_t sums[kWarps];
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
    const uint32_t first = base + threadIdx.x * kItems;
    int32_t group[kItems + 1];  // the row before, then this thread's
#pragma unroll
    for (int i = 0; i <= kItems; ++i) {
      const uint32_t row = first + i - 1;
      group[i] = first + i > 0 && row < params.rows ? group_of(row) : -2;
    }
    uint32_t starts = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) starts += first + i < params.rows && group[i] != group[i + 1];
    uint32_t sum = starts;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint32_t other = __shfl_up_sync(kFullMask, sum, offset);
      if (lane_id() >= offset) sum += other;
    }
    if (lane_id() == kWarpSize - 1) shared.sums[warp_id()] = sum;
    __syncthreads();  // every warp's sum is there
    uint32_t run = found + sum - starts;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp_id()) run += shared.sums[w];
      found += shared.sums[w];
    }
    __syncthreads();  // the sums are read
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      if (first + i >= params.rows || group[i] == group[i + 1]) continue;
      if (run <= params.most) params.indptr[run] = first + i;
      if (run < params.most) params.weights[run] = group[i + 1];
      ++run;
    }
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
