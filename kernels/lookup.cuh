// Rows of a table by number (the embedding), and the position of each row's largest value (greedy decoding).
// gather_rows: one CTA copies one row byte for byte; grid = rows. A row number outside the table gives zeros.
// argmax_rows: a cluster of kCluster CTAs reads one row once, kUnroll vectors a thread in flight; grid = rows * kCluster. Among
// equal values the lowest position wins, NaN never does, and a row without a number gives 0.
// Shared memory: none; 8 bytes a warp and 8 a CTA. Bytes moved: twice the rows; the values once. Architecture: any (kCluster 1).
#pragma once
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "ptx/cluster.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct GatherParams {
  const void* source;
  const void* rows;  // I [grid]
  void* out;
  int64_t source_stride, out_stride;  // bytes
  int64_t num_rows;                   // rows of the table
  uint32_t vectors;                   // of a row
};

// Config: I (int32_t or int64_t), kVec (bytes an access), kThreads
template <class Config>
FI_DEVICE void gather_rows(const GatherParams& params) {
  using V = Vec<uint8_t, Config::kVec>;
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const int64_t row = static_cast<const typename Config::I*>(params.rows)[blockIdx.x];
  const bool inside = row >= 0 && row < params.num_rows;
  const uint8_t* source = static_cast<const uint8_t*>(params.source) + (inside ? row : 0) * params.source_stride;
  uint8_t* out = static_cast<uint8_t*>(params.out) + blockIdx.x * params.out_stride;
  for (uint32_t i = threadIdx.x; i < params.vectors; i += Config::kThreads) {
    V v{};
    if (inside) v = V::load(source + i * Config::kVec);
    v.store(out + i * Config::kVec);
  }
}

struct ArgmaxParams {
  const void* x;
  int32_t* out;
  const int32_t* select;  // rows whose entry is 0 are left alone; null: every row
  int64_t stride;         // elements
  uint32_t columns;
};

// Config: T, kVec, kUnroll, kThreads, kCluster
template <class Config>
FI_DEVICE void argmax_rows(const ArgmaxParams& params) {
  using T = typename Config::T;
  constexpr int kVec = Config::kVec, kUnroll = Config::kUnroll, kThreads = Config::kThreads, kCluster = Config::kCluster;
  using V = Vec<T, kVec>;
  __shared__ float values[32];
  __shared__ uint32_t positions[32];
  __shared__ float cluster_values[kCluster];
  __shared__ uint32_t cluster_positions[kCluster];
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  if (params.select && params.select[blockIdx.x / kCluster] == 0) return;
  if constexpr (kCluster > 1) ptx::cluster_arrive_relaxed();  // this CTA has started

  const T* x = static_cast<const T*>(params.x) + blockIdx.x / kCluster * params.stride;
  float best = __int_as_float(0xff800000);
  uint32_t where = 0xffffffffu;
  // A lane's positions grow, so an equal value later in its sequence loses.
  auto consider = [&](float value, uint32_t position) {
    if (value > best || (value == best && position < where)) {
      best = value;
      where = position;
    }
  };
  const uint32_t vectors = params.columns / kVec;
  const uint32_t rank = blockIdx.x % kCluster;
  for (uint32_t base = rank * kThreads * kUnroll + threadIdx.x; base < vectors; base += kCluster * kThreads * kUnroll) {
    V v[kUnroll];
#pragma unroll
    for (int n = 0; n < kUnroll; ++n)
      if (base + n * kThreads < vectors) v[n] = load_streaming<V>(x + int64_t(base + n * kThreads) * kVec);
#pragma unroll
    for (int n = 0; n < kUnroll; ++n)
      if (base + n * kThreads < vectors) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) consider(to_float(v[n][j]), (base + n * kThreads) * kVec + j);
      }
  }
  for (uint32_t i = vectors * kVec + threadIdx.x; i < params.columns; i += kThreads) consider(to_float(x[i]), i);

  auto across_warp = [&] {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      const float value = __shfl_xor_sync(kFullMask, best, offset);
      consider(value, __shfl_xor_sync(kFullMask, where, offset));
    }
  };
  across_warp();
  if (lane_id() == 0) {
    values[warp_id()] = best;
    positions[warp_id()] = where;
  }
  __syncthreads();  // every warp's best is in shared memory
  if (kCluster == 1 && warp_id() != 0) return;
  auto among = [&](const float* v, const uint32_t* p, int count) {
    const bool there = lane_id() < count;
    best = there ? v[lane_id()] : __int_as_float(0xff800000);
    where = there ? p[lane_id()] : 0xffffffffu;
    across_warp();
  };
  among(values, positions, kThreads / 32);
  if constexpr (kCluster > 1) {
    ptx::cluster_wait();  // every CTA has started, and has the shared memory that is written here
    if (threadIdx.x == 0) {
      *ptx::cluster_map(&cluster_values[rank], 0) = best;
      *ptx::cluster_map(&cluster_positions[rank], 0) = where;
    }
    ptx::cluster_arrive();
    if (rank != 0 || warp_id() != 0) return;
    ptx::cluster_wait();  // every CTA's best is in the first one's shared memory
    among(cluster_values, cluster_positions, kCluster);
  }
  if (lane_id() == 0) params.out[blockIdx.x / kCluster] = where == 0xffffffffu ? 0 : int32_t(where);
}

}  // namespace fi
