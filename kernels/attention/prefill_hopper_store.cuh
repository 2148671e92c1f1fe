// The end of a warpgroup's 64 rows in the Hopper prefill kernel: normalised, through the memory of their own Q, which is
// dead then, to global memory. A warp writes its 16 rows with stmatrix and reads them back whole, so that a store
// instruction writes whole rows of up to 512 bytes.
#pragma once
#include "attention/prefill_hopper_load.cuh"

namespace fi {

// m: base-2 maxima of the lane's rows lane / 4 and that + 8 of its warp's 16, d: their denominators. q_smem: Q of the item.
template <class Config, class Params, int kRegs>
FI_DEVICE void store_hopper(const Params& params, const PrefillItem& item, const float (&o)[kRegs], const float (&m)[2],
                            const float (&d)[2], int kv_head, uint32_t q_smem, int warpgroup) {
  using Shape = HopperShape<Config>;
  using T = typename Config::T;
  using Logits = typename Config::Logits;
  static_assert(Shape::kPanelsVO <= Shape::kPanelsQK, "the output takes the place of Q");
  const int thread = thread_again(), lane = thread & 31, group = params.group.divisor;
  const uint32_t packed_rows = item.qo_len * group;  // against unsigned rows: those before the request are beyond it
  const int warp_row = item_row(item, Shape::kTileQ) + (thread >> 5) * 16;
  const uint32_t rows = q_smem + (thread >> 5) * 16 * 128;  // a panel's rows of this warp, 128 bytes each
  uint32_t words[kRegs / 2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // Rows before the request are computed as row 0, whose head's factors can be read, and not written.
    const int at = warp_row + h * 8 + (lane >> 2), packed = max(at, 0), qo_idx = params.group.quotient(packed);
    const int qo_head = kv_head * group + packed - qo_idx * group;
    const FinishedRow row =
        finish_row<Logits>(params, item, kv_head, qo_idx, qo_head, m[h], d[h], uint32_t(at) < packed_rows);
    auto value = [&](int n, int j) {  // column 2 n + 2 * (lane & 3) + j
      const float raw = o[n + 2 * h + j], normal = raw * row.norm;
      if constexpr (Logits::kHasOutput)
        return Logits::output(params, Logits::row(params, item, qo_idx, qo_head, kv_head), raw, normal, row.m, row.d,
                              row.weight, 2 * n + 2 * (lane & 3) + j);
      else
        return normal;
    };
#pragma unroll
    for (int n = 0; n < kRegs; n += 4) words[n / 2 + h] = ptx::pack2<T>(value(n, 0), value(n, 1));
  }
  // Every warp of the warpgroup is done with its products: they may have read any of the 64 rows of Q.
  asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");
  const uint32_t to = rows + (lane & 15) * 128;
  const int swizzle = (lane >> 4) ^ (lane & 7);
#pragma unroll
  for (int n = 0; n < kRegs; n += 8) {  // 16 columns: chunks n / 4 and n / 4 + 1 of 16 bytes
    const uint32_t(&w)[4] = reinterpret_cast<const uint32_t(&)[4]>(words[n / 2]);
    ptx::stmatrix_x4(to + n / 32 * Shape::kQPanel + (n / 4 % 8 ^ swizzle) * 16, w);
  }
  __syncwarp();
  constexpr int kChunks = Config::kHeadDimVO / 8, kRowsAtOnce = max_of(32 / kChunks, 1);
  T* const out = static_cast<T*>(params.o) + item.q_row * params.o_stride_n + kv_head * group * params.o_stride_h;
#pragma unroll
  for (int i = 0; i < 16 * kChunks / 32; ++i) {
    const int row = i * kRowsAtOnce + lane / kChunks, chunk = lane % kChunks, packed = warp_row + row;
    const int qo_idx = params.group.quotient(packed);
    const uint4 x = ptx::load_shared(rows + chunk / 8 * Shape::kQPanel + row * 128 + (chunk % 8 ^ row % 8) * 16);
    T* const p = out + qo_idx * params.o_stride_n + (packed - qo_idx * group) * params.o_stride_h + chunk * 8;
    if (uint32_t(packed) < packed_rows)
      asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
  }
}

}  // namespace fi
