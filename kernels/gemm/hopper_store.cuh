// Hopper matrix products (gemm/hopper.cuh): from a warpgroup's sums to out.
// Two ways: 16-byte stores of each row's owner (any Out, any row), or 64 x 64 boxes through shared memory and the copy engine.
#pragma once
#include "gemm/hopper_load.cuh"
#include "ptx/gather.cuh"
#include "ptx/mma.cuh"
#include "common/math.cuh"
#include "common/vec.cuh"

namespace fi {

// What happens to the sums of one tile: scales, bias, gate, residual. A lane asks for its pairs of neighbouring columns.
// kPlain: no bias, no residual, one scale for all. A warpgroup that stores holds up the ring after kStages blocks of the others'
// products, so the usual case must be short: no loads, no tests.
template <class Config, bool kPlain>
struct HopperEpilogue {
  using Shape = HopperGemmShape<Config>;
  using Out = typename Config::Out;
  using Bias = typename Config::Bias;
  static constexpr bool kVectors = Config::kScale == HopperScale::vectors;
  const HopperGemmParams& params;
  const Bias* bias;
  const Out* residual;
  const float* a_scale;
  const float* b_scale;
  float uniform = 1.f;

  FI_DEVICE HopperEpilogue(const HopperGemmParams& p, const HopperGemmTile& t) : params(p) {
    bias = p.bias ? static_cast<const Bias*>(p.bias) + t.weight * p.bias_batch : nullptr;
    residual = p.residual ? static_cast<const Out*>(p.residual) + t.batch * p.residual_batch : nullptr;
    if constexpr (kVectors) {
      a_scale = p.a_scale + t.batch * p.a_scale_batch, b_scale = p.b_scale + t.weight * p.b_scale_batch;
      if constexpr (kPlain) uniform = a_scale[0] * b_scale[0];
    }
  }
  FI_DEVICE float row_scale(uint32_t row) const {
    return kPlain || !kVectors ? uniform : a_scale[row * uint32_t(params.a_scale_row)];
  }
  FI_DEVICE float2 linear(float2 sum, int column, float scale, bool there) const {
    if constexpr (kVectors && kPlain) {
      sum.x *= scale, sum.y *= scale;
    } else if constexpr (kVectors) {
      const int step = params.b_scale_column;
      sum.x *= there ? scale * b_scale[column * step] : 0.f;
      sum.y *= there ? scale * b_scale[(column + 1) * step] : 0.f;
    }
    if (!kPlain && bias != nullptr) {
      sum.x += there ? to_float(bias[column]) : 0.f;
      sum.y += there ? to_float(bias[column + 1]) : 0.f;
    }
    return sum;
  }
  FI_DEVICE static float silu(float x) { return x * math::ptx_rcp(1.f + math::ptx_exp2(-math::log2e * x)); }
  // Columns column, column + 1 of a row from their sums and, gated, those of the up projection. Nothing is
  // loaded for what is not `there`, outside the matrix.
  FI_DEVICE float2 finish(float2 v, float2 up, int row, int column, float scale, bool there) const {
    if constexpr (Config::kGated) {
      const float2 gate = linear(v, params.first_half + column, scale, there);
      up = linear(up, params.second_half + column, scale, there);
      v = make_float2(silu(gate.x) * up.x, silu(gate.y) * up.y);
    } else {
      v = linear(v, column, scale, there);
    }
    if (!kPlain && residual != nullptr && there) {
      const auto add = Vec<Out, 2>::load(residual + row * params.residual_stride + column);
      v.x += to_float(add[0]), v.y += to_float(add[1]);
    }
    return v;
  }
  // From a warpgroup's sums: d[i], d[i + 1] and, gated, those kWarpOutN columns further.
  FI_DEVICE float2 pair(const float (&d)[Shape::kRegs], int i, int row, int column, float scale, bool there) const {
    constexpr int kUp = Config::kGated ? Shape::kWarpOutN / 2 : 0;
    return finish(make_float2(d[i], d[i + 1]), make_float2(d[i + kUp], d[i + 1 + kUp]), row, column, scale, there);
  }
};

// What is added to the columns of a box of 64 and their factors: the lane's pairs of the box's eight n8 tiles, asked for in one go
// (with factors in two, for the registers). One after the other they cost a latency each (fp8 with a factor a column: 96 us of 1,079 at 8192 cubed).
template <class Config>
struct HopperColumns {
  static constexpr bool kVectors = Config::kScale == HopperScale::vectors;
  static constexpr int kTiles = kVectors ? 4 : 8;
  float factor[kVectors ? 2 * kTiles : 1], offset[2 * kTiles];

  FI_DEVICE void load(const HopperEpilogue<Config, false>& epilogue, uint32_t column, uint32_t n) {
    if constexpr (kVectors) {
      if (epilogue.params.b_scale_column == 0) {
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) factor[i] = epilogue.b_scale[0];
      } else {
        const float* const from = epilogue.b_scale + column;
#pragma unroll
        for (int i = 0; i < 2 * kTiles; ++i) factor[i] = column + i / 2 * 8 < n ? from[i / 2 * 8 + i % 2] : 0.f;
      }
    }
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i) offset[i] = 0.f;
    if (epilogue.bias == nullptr) return;
    const auto* const from = epilogue.bias + column;
#pragma unroll
    for (int i = 0; i < 2 * kTiles; ++i)
      if (column + i / 2 * 8 < n) offset[i] = to_float(from[i / 2 * 8 + i % 2]);
  }
  FI_DEVICE float2 apply(float2 sum, int pair, float scale) const {
    if constexpr (kVectors) sum.x *= scale * factor[2 * pair], sum.y *= scale * factor[2 * pair + 1];
    sum.x += offset[2 * pair], sum.y += offset[2 * pair + 1];
    return sum;
  }
};

// The residual of a box of 64 x 64: each warp's own 16 rows, 16 bytes a lane, four rows an instruction. On its way while the box
// before is stored; `put` lays it where the box will be built, so that a lane finds its fragments by ldmatrix.
template <class Out>
struct HopperResidual {
  uint4 held[4];

  FI_DEVICE static uint32_t in_row(int i) { return (warp_id() & 3) * 16 + i * 4 + lane_id() / 8; }
  FI_DEVICE void load(const Out* residual, int64_t stride, uint32_t m, uint32_t m_end, uint32_t n, uint32_t n_end) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t row = m + in_row(i), column = n + lane_id() % 8 * 8;
      held[i] = row < m_end && column < n_end ? *reinterpret_cast<const uint4*>(residual + row * stride + column)
                                              : make_uint4(0, 0, 0, 0);
    }
  }
  FI_DEVICE void put(uint32_t buffer) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t row = in_row(i), at = buffer + row * 128 + (lane_id() % 8 ^ (row & 7)) * 16;
      asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(held[i].x), "r"(held[i].y), "r"(held[i].z),
                   "r"(held[i].w)
                   : "memory");
    }
    __syncwarp();
  }
};

// The lines of a warpgroup's part of the residual into L2, while its products are computed.
template <class Config>
FI_DEVICE void prefetch_residual(const HopperGemmParams& params, const HopperGemmTile& tile, uint32_t m, uint32_t n) {
  using Out = typename Config::Out;
  constexpr int kLine = 128 / sizeof(Out), kLines = ceil_div(HopperGemmShape<Config>::kWarpOutN, kLine);
  const Out* const residual = static_cast<const Out*>(params.residual) + tile.batch * params.residual_batch;
#pragma unroll 1
  for (int i = threadIdx.x % 128; i < 64 * kLines; i += 128) {
    const uint32_t row = m + i / kLines, column = n + i % kLines * kLine;
    if (row < tile.m_end && column < params.n) ptx::prefetch_l2(residual + row * params.residual_stride + column);
  }
}

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// Lane 4 g + t holds word j of its pairs; afterwards words 0..3 of chunk t: a 4 x 4 transposition inside the quad.
FI_DEVICE uint4 gather_chunk(const uint32_t (&v)[4]) {
  const bool odd = lane_id() & 1, high = lane_id() & 2;
  const uint32_t r0 = __shfl_xor_sync(kFullMask, odd ? v[0] : v[1], 1);
  const uint32_t r1 = __shfl_xor_sync(kFullMask, odd ? v[2] : v[3], 1);
  const uint32_t a0 = odd ? r0 : v[0], a1 = odd ? v[1] : r0, a2 = odd ? r1 : v[2], a3 = odd ? v[3] : r1;
  const uint32_t s0 = __shfl_xor_sync(kFullMask, high ? a0 : a2, 2);
  const uint32_t s1 = __shfl_xor_sync(kFullMask, high ? a1 : a3, 2);
  return high ? make_uint4(s0, s1, a2, a3) : make_uint4(a0, a1, s0, s1);
}

// Stores of each row's own lanes: 64 contiguous bytes (fp32: 32) a row and instruction.
template <class Config, bool kPlain>
FI_DEVICE void store_rows(const HopperGemmParams& params, const HopperGemmTile& tile,
                          const float (&d)[HopperGemmShape<Config>::kRegs], uint32_t m, uint32_t n) {
  using Shape = HopperGemmShape<Config>;
  using Out = typename Config::Out;
  const HopperEpilogue<Config, kPlain> epilogue(params, tile);
  const int lane = lane_id(), t = lane & 3;
  const uint32_t row = m + (warp_id() & 3) * 16 + (lane >> 2);
  Out* const out = static_cast<Out*>(params.out) + tile.batch * params.out_batch + row * params.out_stride;
  bool there[2];
  float scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    there[h] = row + 8 * h < tile.m_end;
    scale[h] = epilogue.row_scale(min(row + 8 * h, tile.m_end - 1));
  }
#pragma unroll
  for (int j = 0; j < Shape::kWarpOutN / 8; j += 4) {
    if (!kPlain) asm volatile("" ::: "memory");  // loads for later columns would take the registers of several
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      Out* const out_row = out + 8 * h * params.out_stride;
      uint32_t words[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int column = n + 2 * t + 8 * (j + q);
        const bool inside = there[h] && column < int(params.n);
        const float2 v = epilogue.pair(d, 4 * (j + q) + 2 * h, row + 8 * h, column, scale[h], inside);
        if constexpr (sizeof(Out) == 2)
          words[q] = ptx::pack2<Out>(v.x, v.y);
        else if (inside)
          *reinterpret_cast<float2*>(out_row + column) = v;
      }
      if constexpr (sizeof(Out) == 2) {
        const uint4 chunk = gather_chunk(words);
        const uint32_t column = n + 8 * (j + t);
        if (there[h] && column < params.n) *reinterpret_cast<uint4*>(out_row + column) = chunk;
      }
    }
  }
}

// Boxes of 64 x 64 through two buffers of the warpgroup at `buffers`. The copy engine leaves out what is outside the
// matrix; where a segment ends inside the tile, threads store the rows that are left.
template <class Config, bool kPlain>
FI_DEVICE void store_boxes(const HopperGemmParams& params, const HopperGemmTile& tile,
                           const float (&d)[HopperGemmShape<Config>::kRegs], uint32_t m, uint32_t n, uint32_t buffers,
                           int warpgroup) {
  using Shape = HopperGemmShape<Config>;
  using Out = typename Config::Out;
  static_assert(sizeof(Out) == 2 && Shape::kWarpOutN % 64 == 0, "whole boxes of 128 bytes a row");
  const HopperEpilogue<Config, kPlain> epilogue(params, tile);
  const int lane = lane_id(), t = lane & 3, warp = warp_id() & 3;
  const uint32_t row = m + warp * 16 + (lane >> 2);
  bool there[2];
  float scale[2];
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    there[h] = row + 8 * h < tile.m_end;
    scale[h] = epilogue.row_scale(min(row + 8 * h, tile.m_end - 1));
  }
  const uint32_t to = buffers + (warp * 16 + lane % 16) * 128;
  const bool leader = (threadIdx.x & 127) == 0;
  auto sync = [&] { asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory"); };
  // Bias, residual and factors of columns come a box at a time; gated products, which have none as a rule, ask pair by pair.
  constexpr bool kAhead = !kPlain && !Config::kGated;
  HopperResidual<Out> residual;
  const bool adds = kAhead && Config::kScale == HopperScale::none && params.residual != nullptr;  // fp8 products have none
  auto ask = [&](int box) {
    if constexpr (kAhead)
      if (adds) residual.load(epilogue.residual, params.residual_stride, m, tile.m_end, n + box * 64, params.n);
  };
  ask(0);
#pragma unroll
  for (int box = 0; box < Shape::kWarpOutN / 64; ++box) {
    if (n + box * 64 >= params.n) break;
    HopperColumns<Config> columns;
    auto look = [&](int j) {
      if constexpr (kAhead)
        if (j % columns.kTiles == 0) columns.load(epilogue, n + box * 64 + 8 * j + 2 * t, params.n);
    };
    look(0);
    if (leader) {
      if (box == 0)
        ptx::tma_store_wait_read<0>();  // the tile before may have ended with either buffer
      else
        ptx::tma_store_wait_read<1>();
    }
    sync();  // the leader has seen this buffer's last store read it
    if (adds) {
      residual.put(buffers + box % 2 * 8192);
      if (box + 1 < Shape::kWarpOutN / 64) ask(box + 1);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      if (j > 0) look(j);
      const uint32_t at = to + box % 2 * 8192 + ((j + lane / 16) ^ (lane & 7)) * 16;
      uint32_t words[4], more[4] = {};
      if constexpr (!kPlain && Config::kGated) asm volatile("" ::: "memory");  // later loads would take the registers of several
      if (adds) ptx::ldmatrix_x4(more, at);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int chunk = box * 8 + j + q / 2, h = q % 2;
        float2 v;
        if constexpr (kAhead) {
          v = columns.apply(make_float2(d[4 * chunk + 2 * h], d[4 * chunk + 2 * h + 1]), (j + q / 2) % columns.kTiles, scale[h]);
          const auto add = Vec<Out, 2>::load(&more[q]);
          v.x += to_float(add[0]), v.y += to_float(add[1]);
        } else {
          const int column = n + 2 * t + 8 * chunk;
          v = epilogue.pair(d, 4 * chunk + 2 * h, row + 8 * h, column, scale[h], there[h] && column < int(params.n));
        }
        words[q] = ptx::pack2<Out>(v.x, v.y);
      }
      ptx::stmatrix_x4(at, words[0], words[1], words[2], words[3]);
    }
    ptx::fence_proxy_async();
    sync();  // the box is in shared memory
    if (Config::kGrouped && m + 64 > tile.m_end) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t in_row = warp * 16 + i * 4 + lane / 8, chunk = lane % 8, column = n + box * 64 + chunk * 8;
        uint4 v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                     : "r"(buffers + box % 2 * 8192 + in_row * 128 + (chunk ^ (in_row & 7)) * 16)
                     : "memory");
        if (m + in_row < tile.m_end && column < params.n)
          *reinterpret_cast<uint4*>(static_cast<Out*>(params.out) + (m + in_row) * params.out_stride + column) = v;
      }
    } else if (leader) {
      ptx::tma_store_4d(params.out_map, buffers + box % 2 * 8192, n + box * 64, m, tile.batch, 0);
      ptx::tma_store_commit();
    }
  }
}

// A warpgroup's sums of rows from m and columns (of out) from n to where they belong.
template <class Config>
FI_DEVICE void store_sums(const HopperGemmParams& params, const HopperGemmTile& tile,
                          const float (&d)[HopperGemmShape<Config>::kRegs], uint32_t m, uint32_t n, uint32_t buffers,
                          int warpgroup) {
  auto store = [&](auto plain) {
    constexpr bool kPlain = decltype(plain)::value;
    if constexpr (Config::kBulkStore)
      store_boxes<Config, kPlain>(params, tile, d, m, n, buffers, warpgroup);
    else
      store_rows<Config, kPlain>(params, tile, d, m, n);
  };
  if constexpr (Config::kScale == HopperScale::blocks) {
    store(Flag<true>{});  // such products have no bias and no residual
  } else {
    bool plain = params.bias == nullptr && params.residual == nullptr;
    if constexpr (Config::kScale == HopperScale::vectors)
      plain = plain && params.a_scale_row == 0 && params.b_scale_column == 0;
    if (plain)
      store(Flag<true>{});
    else
      store(Flag<false>{});
  }
}

}  // namespace fi
