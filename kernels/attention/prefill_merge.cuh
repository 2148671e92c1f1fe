// Merges the partial results of a split query tile: o = sum_c 2^(lse_c - max) o_c / sum_c 2^(lse_c - max).
// One warp computes one packed row of one tile and kv head; grid (merge items * kTileQ / kWarps, kv heads).
// Shared memory: none. Bytes moved: chunks * (head_dim_vo + 1) * 4 read, head_dim_vo * 2 written a row. Arch: any.
#pragma once
#include "attention/fast_div.cuh"
#include "attention/head_scales.cuh"
#include "common/math.cuh"
#include "common/vec.cuh"
#include "ptx/pdl.cuh"

namespace fi {

// One query tile that was split; qo_len 0: nothing to do (graph padding).
struct alignas(16) PrefillMergeItem {
  int32_t q_row, qo_len, q_tile;  // as in PrefillItem
  int32_t first_slot, num_chunks;
  int32_t unused[3];
};

struct PrefillMergeParams {
  void* o;
  float* lse;  // or null
  const PrefillMergeItem* items;
  const float* partial_o;
  const float* partial_lse;
  int64_t o_stride_n, o_stride_h;  // elements
  FastDiv group;
  uint32_t num_qo_heads;
  float out_scale;
  HeadScales scales;
};

// Config: T, kHeadDimVO, kTileQ, kWarps
template <class Config>
FI_DEVICE void prefill_merge(const PrefillMergeParams& params) {
  using T = typename Config::T;
  constexpr int kDim = Config::kHeadDimVO, kTileQ = Config::kTileQ, kVec = 4;
  constexpr int kVecs = ceil_div(kDim, 32 * kVec), kBlocks = kTileQ / Config::kWarps;
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const PrefillMergeItem item = params.items[blockIdx.x / kBlocks];
  const int row = blockIdx.x % kBlocks * Config::kWarps + warp_id(), lane = lane_id();
  const int group = params.group.divisor, packed = item.q_tile * kTileQ + row;
  if (packed >= item.qo_len * group) return;
  const int64_t row_stride = int64_t(gridDim.y) * kTileQ;  // rows from one chunk to the next
  const int64_t first = (int64_t(item.first_slot) * gridDim.y + blockIdx.y) * kTileQ + row;

  float top = -FI_INF;
  for (int c = lane; c < item.num_chunks; c += 32) top = fmaxf(top, params.partial_lse[first + c * row_stride]);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, offset));

  float sum = 0.f, acc[kVecs][kVec] = {};
  if (top != -FI_INF) {
#pragma unroll 4
    for (int c = 0; c < item.num_chunks; ++c) {
      const float weight = math::ptx_exp2(params.partial_lse[first + c * row_stride] - top);
      const float* o = params.partial_o + (first + c * row_stride) * kDim;
      sum += weight;
#pragma unroll
      for (int i = 0; i < kVecs; ++i)
        if (const int d = (i * 32 + lane) * kVec; d < kDim) {
          const float4 x = *reinterpret_cast<const float4*>(o + d);
          acc[i][0] = fmaf(weight, x.x, acc[i][0]), acc[i][1] = fmaf(weight, x.y, acc[i][1]);
          acc[i][2] = fmaf(weight, x.z, acc[i][2]), acc[i][3] = fmaf(weight, x.w, acc[i][3]);
        }
    }
  }
  const float norm = sum > 0.f ? params.out_scale * params.scales.output(blockIdx.y) / sum : 0.f;
  const int qo_idx = params.group.quotient(packed), qo_head = blockIdx.y * group + packed - qo_idx * group;
  T* out = static_cast<T*>(params.o) + (item.q_row + qo_idx) * params.o_stride_n + qo_head * params.o_stride_h;
#pragma unroll
  for (int i = 0; i < kVecs; ++i)
    if (const int d = (i * 32 + lane) * kVec; d < kDim) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) acc[i][j] *= norm;
      Vec<T, kVec>::from_floats(acc[i]).store(out + d);
    }
  if (params.lse != nullptr && lane == 0)
    params.lse[int64_t(item.q_row + qo_idx) * params.num_qo_heads + qo_head] =
        top == -FI_INF ? top : top + math::ptx_log2(sum);
}

}  // namespace fi
