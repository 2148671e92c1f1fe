// The parts of a mixture of experts around its two grouped products: sort, gather, finish. An entry is one of the
// tokens x top_k choices, numbered token * top_k + slot; its expert decides which rows of the grouped products are its own.
//   moe_sort: grid = experts + 1. CTA e counts the entries of the experts before e, then numbers its own in entry order:
//     indptr[e], source[row] = entry, position[entry] = row. The last CTA does so for entries without a local expert, whose
//     rows follow all others: source -1, position -1. Every CTA reads all entries twice, from L2: none waits for another.
//   moe_gather: copies row source[row] / top_k of x to row `row`, 16 bytes a thread; grid = (rows, column chunks).
//   moe_finish: out[token] = sum over slots, in slot order, of scale * y[position]; grid = (tokens, column chunks).
// Shared memory: a few words. Bytes moved: 8 entries (experts + 1) from L2; 2 rows x hidden; top_k + 1 rows a token.
// Architecture: any.
#pragma once
#include "common/vec.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct MoeSortParams {
  const void* experts;  // [entries] int32 or int64, global numbers
  int32_t* indptr;      // [local experts + 1]
  int32_t* source;      // [entries]
  int32_t* position;    // [entries]
  uint32_t entries;
  uint32_t local;  // experts here
  int32_t first;   // number of the first of them
  uint32_t wide;   // experts are int64
};

// Config: kThreads, kItems (entries of a thread a step)
template <class Config>
FI_DEVICE void moe_sort(const MoeSortParams& params) {
  constexpr int kThreads = Config::kThreads, kItems = Config::kItems, kWarps = kThreads / kWarpSize;
  struct Shared {
    uint32_t sums[kWarps];
    uint32_t total;
  };
  __shared__ Shared shared;
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const uint32_t own = blockIdx.x;
  // The local expert of an entry; `local` for one without.
  auto expert_of = [&](uint32_t i) {
    const int64_t e = (params.wide ? static_cast<const int64_t*>(params.experts)[i]
                                   : int64_t(static_cast<const int32_t*>(params.experts)[i])) - params.first;
    return e >= 0 && e < params.local ? uint32_t(e) : params.local;
  };
  // Exclusive sum over the CTA's threads; shared.total holds the sum of all.
  auto scan = [&](uint32_t count) {
    uint32_t sum = count;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint32_t other = __shfl_up_sync(kFullMask, sum, offset);
      if (lane_id() >= offset) sum += other;
    }
    if (lane_id() == kWarpSize - 1) shared.sums[warp_id()] = sum;
    __syncthreads();  // every warp's sum is there
    uint32_t before = 0, total = 0;
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp_id()) before += shared.sums[w];
      total += shared.sums[w];
    }
    if (threadIdx.x == 0) shared.total = total;
    __syncthreads();  // the total is there, and the sums are read
    return before + sum - count;
  };

  uint32_t less = 0;
  for (uint32_t i = threadIdx.x; i < params.entries; i += kThreads) less += expert_of(i) < own;
  scan(less);
  uint32_t base = shared.total;
  if (threadIdx.x == 0) params.indptr[own] = base;
  for (uint32_t first = 0; first < params.entries; first += kThreads * kItems) {
    uint32_t mine = 0;  // bit j: entry j of this thread is one of ours
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const uint32_t i = first + threadIdx.x * kItems + j;
      if (i < params.entries && expert_of(i) == own) mine |= 1u << j;
    }
    uint32_t row = base + scan(__popc(mine));
    base += shared.total;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (!(mine >> j & 1)) continue;
      const uint32_t i = first + threadIdx.x * kItems + j;
      const bool here = own < params.local;
      params.source[row] = here ? int32_t(i) : -1;
      params.position[i] = here ? int32_t(row) : -1;
      ++row;
    }
  }
}

struct MoeGatherParams {
  const uint8_t* x;
  uint8_t* out;
  const int32_t* source;  // [rows]
  int64_t x_stride;       // bytes between rows
  uint32_t bytes;         // of a row, a multiple of 16
  uint32_t top_k;
};

// Config: kThreads
template <class Config>
FI_DEVICE void moe_gather(const MoeGatherParams& params) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int32_t entry = params.source[blockIdx.x];
  const uint32_t at = (blockIdx.y * Config::kThreads + threadIdx.x) * 16;
  if (entry < 0 || at >= params.bytes) return;
  *reinterpret_cast<uint4*>(params.out + int64_t(blockIdx.x) * params.bytes + at) =
      *reinterpret_cast<const uint4*>(params.x + entry / int32_t(params.top_k) * params.x_stride + at);
}

struct MoeFinishParams {
  const void* y;            // [rows, hidden]
  const float* scales;      // [tokens, top_k]
  const int32_t* position;  // [tokens, top_k]
  void* out;                // [tokens, hidden]
  int64_t y_stride, scale_stride, out_stride;  // elements
  uint32_t hidden;  // a multiple of 8
  uint32_t top_k;
};

// Config: T, Out, kThreads
template <class Config>
FI_DEVICE void moe_finish(const MoeFinishParams& params) {
  using T = typename Config::T;
  using Out = typename Config::Out;
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const uint32_t token = blockIdx.x, column = (blockIdx.y * Config::kThreads + threadIdx.x) * 8;
  if (column >= params.hidden) return;
  float sum[8] = {};
#pragma unroll 4
  for (uint32_t slot = 0; slot < params.top_k; ++slot) {
    const int32_t row = params.position[token * params.top_k + slot];
    if (row < 0) continue;
    const float scale = params.scales[token * params.scale_stride + slot];
    float y[8];
    load_floats<T, 8>(static_cast<const T*>(params.y) + row * params.y_stride + column, y);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum[i] = fmaf(scale, y[i], sum[i]);
  }
  Out* out = static_cast<Out*>(params.out) + token * params.out_stride + column;
  constexpr int kPart = 16 / sizeof(Out) < 8 ? 16 / sizeof(Out) : 8;
#pragma unroll
  for (int i = 0; i < 8; i += kPart) {
    Vec<Out, kPart> v;
#pragma unroll
    for (int j = 0; j < kPart; ++j) v[j] = from_float<Out>(sum[i + j]);
    v.store(out + i);
  }
}

}  // namespace fi
