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

// What a row's sums become: base-2 maximum and denominator with the sink, the factor from the old maximum to the new, and
// what the sums are multiplied by.
struct FinishedRow {
  float m, d, weight, norm;
};

// The end of a row whose base-2 maximum is m and denominator d, both the same in its four lanes, one of which writes the
// log-sum-exp. `there`: it is a row of the request.
template <class Logits, class Params>
FI_DEVICE FinishedRow finish_row(const Params& params, const PrefillItem& item, int kv_head, int qo_idx, int qo_head, float m,
                                 float d, bool there) {
  FinishedRow row{m, d, 1.f, 0.f};
  if (params.sinks != nullptr && there) {
    // exp(sink) joins the denominator alone.
    const float sink = params.sinks[qo_head] * math::log2e, top = fmaxf(row.m, sink);
    if (top != -FI_INF) {
      row.weight = math::ptx_exp2(row.m - top);
      row.d = fmaf(row.d, row.weight, math::ptx_exp2(sink - top));
      row.m = top;
    }
  }
  if constexpr (Logits::kHasOutput) Logits::update(params, item, qo_head, row.m, row.d, row.weight);
  const bool empty = row.m == -FI_INF;
  const float factor = output_scale(params, kv_head);
  row.norm = empty ? 0.f : row.weight * math::ptx_rcp(row.d) * factor;
  if constexpr (!Logits::kUseSoftmax) row.norm = factor;  // such tiles are never split
  if ((threadIdx.x & 3) == 0 && there && params.lse != nullptr)
    params.lse[int64_t(item.q_row + qo_idx) * params.num_qo_heads + qo_head] =
        empty ? -FI_INF : row.m + math::ptx_log2(row.d);
  return row;
}

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
      const float d = state.d[i][h], m = state.m[i][h] * scale;
      const int packed = warp_row + i * 16 + h * 8 + (lane >> 2), qo_idx = params.group.quotient(packed);
      const int qo_head = kv_head * group + packed - qo_idx * group;
      const FinishedRow row = finish_row<Logits>(params, item, kv_head, qo_idx, qo_head, m, d, packed < packed_rows);
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n) {
        float& x = o[i][n][2 * h];
        float& y = o[i][n][2 * h + 1];
        if constexpr (Logits::kHasOutput) {
          const auto of = Logits::row(params, item, qo_idx, qo_head, kv_head);
          x = Logits::output(params, of, x, x * row.norm, row.m, row.d, row.weight, n * 8 + 2 * (lane & 3));
          y = Logits::output(params, of, y, y * row.norm, row.m, row.d, row.weight, n * 8 + 2 * (lane & 3) + 1);
        } else {
          x *= row.norm, y *= row.norm;
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
