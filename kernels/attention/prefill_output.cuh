// The end of a tile in the prefill kernel: sinks, a variant's last word, normalisation, and the way to global memory.
#pragma once
#include "attention/prefill_params.cuh"
#include "attention/prefill_softmax.cuh"
#include "attention/smem_tile.cuh"
#include "common/math.cuh"
#include "common/vec.cuh"
#include "ptx/mma.cuh"

namespace fi {

// A warp's rows of Q, and later of the output.
template <class Config>
constexpr int kWarpQBytes =
    16 * Config::kRowTiles * max_of(TileLayout<Config::kHeadDimQK>::kRowBytes, TileLayout<Config::kHeadDimVO>::kRowBytes);

// Normalise the accumulators and write them through this warp's own rows of shared memory (Q is dead) with 16-byte
// stores. state.d is the whole row's in each of its lanes.
template <class Config, class Params, int kRowTiles, int kDimTiles>
FI_DEVICE void store_output(const Params& params, const PrefillItem& shared_item, int kv_head, uint8_t* smem,
                            float (&o)[kRowTiles][kDimTiles][4], const SoftmaxState<kRowTiles>& state, float scale) {
  using T = typename Config::T;
  using Logits = typename Config::Logits;
  using O = typename Config::O;
  using LayoutVO = TileLayout<Config::kHeadDimVO>;
  constexpr int kWarpRows = 16 * kRowTiles, kTileQ = Config::kWarps * kWarpRows;
  const PrefillItem item = shared_item;  // in registers: the stores below could change what lies in shared memory
  const int thread = thread_again(), lane = thread & 31;
  const int group = params.group.divisor, packed_rows = item.qo_len * group;
  const int first_row = item.q_tile * kTileQ, warp_row = first_row + (thread >> 5) * kWarpRows;
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float d = state.d[i][h], m = state.m[i][h] * scale;
      const int packed = warp_row + i * 16 + h * 8 + (lane >> 2), qo_idx = params.group.quotient(packed);
      const int qo_head = kv_head * group + packed - qo_idx * group;
      float weight = 1.f;
      if (params.sinks != nullptr && packed < packed_rows) {
        // exp(sink) joins the denominator alone.
        const float sink = params.sinks[qo_head] * math::log2e, top = fmaxf(m, sink);
        if (top != -FI_INF) {
          weight = math::ptx_exp2(m - top);
          d = fmaf(d, weight, math::ptx_exp2(sink - top));
          m = top;
        }
      }
      if constexpr (Logits::kHasOutput) Logits::update(params, item, qo_head, m, d, weight);
      const bool empty = m == -FI_INF;
      const float factor = output_scale(params, kv_head);
      float norm = empty ? 0.f : weight * math::ptx_rcp(d) * factor;
      if constexpr (!Logits::kUseSoftmax) norm = factor;  // such tiles are never split
      if ((lane & 3) == 0 && packed < packed_rows && params.lse != nullptr)
        params.lse[int64_t(item.q_row + qo_idx) * params.num_qo_heads + qo_head] =
            empty ? -FI_INF : m + math::ptx_log2(d);
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        float& x = o[i][n][2 * h];
        float& y = o[i][n][2 * h + 1];
        if constexpr (Logits::kHasOutput) {
          const auto row = Logits::row(params, item, qo_idx, qo_head, kv_head);
          x = Logits::output(params, row, x, x * norm, m, d, weight, n * 8 + 2 * (lane & 3));
          y = Logits::output(params, row, y, y * norm, m, d, weight, n * 8 + 2 * (lane & 3) + 1);
        } else {
          x *= norm, y *= norm;
        }
      }
    }
  if constexpr (!is_same_v<O, T>) {  // another type: straight from registers
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int packed = warp_row + i * 16 + h * 8 + (lane >> 2), qo_idx = params.group.quotient(packed);
        if (packed >= packed_rows) continue;
        O* p = static_cast<O*>(params.o) + (item.q_row + qo_idx) * params.o_stride_n +
               (kv_head * group + packed - qo_idx * group) * params.o_stride_h + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < Config::kHeadDimVO / 8; ++n) {
          const float pair[2] = {o[i][n][2 * h], o[i][n][2 * h + 1]};
          Vec<O, 2>::from_floats(pair).store(p + n * 8);
        }
      }
    return;
  }
  uint8_t* const smem_o = smem + (thread >> 5) * kWarpQBytes<Config>;
#pragma unroll
  for (int n = 0; n < kDimTiles; ++n) {
    uint8_t* const p = smem_o + LayoutVO::offset(lane >> 2, n) + (lane & 3) * 4;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h)  // 8 rows on, the swizzle is the same
        *reinterpret_cast<uint32_t*>(p + (i * 16 + h * 8) * LayoutVO::kRowBytes) =
            ptx::pack2<T>(o[i][n][2 * h], o[i][n][2 * h + 1]);
  }
  __syncwarp();
  constexpr int kChunks = Config::kHeadDimVO / 8;
  T* const out = static_cast<T*>(params.o) + item.q_row * params.o_stride_n + kv_head * group * params.o_stride_h;
#pragma unroll 4
  for (int i = lane; i < kWarpRows * kChunks; i += 32) {
    const int row = i / kChunks, chunk = i % kChunks, packed = warp_row + row;
    if (packed >= packed_rows) break;
    const int qo_idx = params.group.quotient(packed);
    T* p = out + qo_idx * params.o_stride_n + (packed - qo_idx * group) * params.o_stride_h + chunk * 8;
    *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(smem_o + LayoutVO::offset(row, chunk));
  }
}

}  // namespace fi
