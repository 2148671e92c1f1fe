// The end of an item of the latent attention kernels: normalisation, the log-sum-exp, and the way to global memory.
#pragma once
#include "attention/mla_params.cuh"
#include "common/math.cuh"
#include "common/vec.cuh"
#include "ptx/mma.cuh"

namespace fi {

// 4 x 4 words inside a quad of lanes: lane t gives w[0..3] and gets word t of lanes 0..3.
FI_DEVICE void swap_quad(uint32_t (&w)[4]) {
  const bool odd = lane_id() & 1, high = lane_id() & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(kFullMask, odd ? w[i] : w[i + 1], 1);
    (odd ? w[i] : w[i + 1]) = got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(kFullMask, high ? w[i] : w[i + 2], 2);
    (high ? w[i] : w[i + 2]) = got;
  }
}

// A warp's 16 rows from packed row `warp_row` on. Element n + 2 h + j (n a multiple of 4) of o is row lane / 4 + 8 h, column
// first_column + 2 n + 2 * (lane % 4) + j. base-2 maximum of a row: scale * m + offset. 16-byte stores where O has 16 bits.
template <class Config, class Params, int kRegs>
FI_DEVICE void store_mla(const Params& params, const PrefillItem& item, const float (&o)[kRegs], const MlaTotal& total,
                         float scale, float offset, int warp_row, int first_column, bool with_lse) {
  using O = typename Config::O;
  const int lane = lane_id(), heads = params.group.divisor, packed_rows = item.qo_len * heads;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int packed = warp_row + h * 8 + (lane >> 2), qo_idx = params.group.quotient(packed), head = packed - qo_idx * heads;
    const bool there = packed < packed_rows, empty = total.m[0][h] == -FI_INF;
    const float norm = empty ? 0.f : params.out_scale / total.d[0][h];
    if (with_lse && there && (lane & 3) == 0 && params.lse != nullptr)
      params.lse[int64_t(item.q_row + qo_idx) * heads + head] =
          empty ? -FI_INF : (fmaf(total.m[0][h], scale, offset) + math::ptx_log2(total.d[0][h])) * params.lse_factor;
    O* const out = static_cast<O*>(params.o) + (item.q_row + qo_idx) * params.o_stride_n + head * params.o_stride_h + first_column;
    if constexpr (sizeof(O) == 2) {
#pragma unroll
      for (int n = 0; n < kRegs; n += 16) {
        uint32_t w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) w[i] = ptx::pack2<O>(o[n + 4 * i + 2 * h] * norm, o[n + 4 * i + 2 * h + 1] * norm);
        swap_quad(w);
        if (there) *reinterpret_cast<uint4*>(out + 2 * n + 8 * (lane & 3)) = make_uint4(w[0], w[1], w[2], w[3]);
      }
    } else if (there) {
#pragma unroll
      for (int n = 0; n < kRegs; n += 4) {
        const float pair[2] = {o[n + 2 * h] * norm, o[n + 2 * h + 1] * norm};
        Vec<O, 2>::from_floats(pair).store(out + 2 * n + 2 * (lane & 3));
      }
    }
  }
}

}  // namespace fi
