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

// What a warp's rows and columns of a tile are multiplied with and added to, asked for before the products, whose load on the L2 makes a
// latency a microsecond. Lane 4 j + t holds the pair that lanes 4 g + t want for n8 tile j of a box of 64 columns.
template <class Config>
struct HopperFactors {
  using Shape = HopperGemmShape<Config>;
  using Bias = typename Config::Bias;
  static constexpr bool kVectors = Config::kScale == HopperScale::vectors, kBlocks = Config::kScale == HopperScale::blocks;
  static constexpr int kBoxes = Shape::kWarpOutN / 64;
  // Gated products, which have a bias seldom, look at every pair for themselves; blocks are scaled already.
  static constexpr bool kUsed = Config::kBulkStore && !Config::kGated && !kBlocks;
  float row[2];
  float2 column[kUsed && kVectors ? kBoxes : 1];
  uint32_t bias[kUsed ? kBoxes : 1];

  FI_DEVICE static bool plain(const HopperGemmParams& params) {  // one factor for all, and nothing is added
    if (kBlocks) return true;
    const bool sums = params.bias == nullptr && params.residual == nullptr;
    return sums && (!kVectors || (params.a_scale_row == 0 && params.b_scale_column == 0));
  }
  FI_DEVICE void load(const HopperGemmParams& params, const HopperGemmTile& tile, uint32_t m, uint32_t n, bool plain) {
    if constexpr (kVectors) {
      const float* const a = params.a_scale + tile.batch * params.a_scale_batch;
      const float* const b = params.b_scale + tile.weight * params.b_scale_batch;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t at = min(m + (warp_id() & 3) * 16 + (lane_id() >> 2) + 8 * h, tile.m_end - 1);
        row[h] = a[at * uint32_t(params.a_scale_row)] * (plain ? b[0] : 1.f);
      }
    }
    if constexpr (kUsed) {
      if (plain) return;
      const float* const b = params.b_scale + tile.weight * params.b_scale_batch;
      const Bias* const add = static_cast<const Bias*>(params.bias) + tile.weight * params.bias_batch;
#pragma unroll
      for (int box = 0; box < kBoxes; ++box) {
        const uint32_t at = n + 64 * box + 2 * lane_id();
        const bool there = at < params.n;
        if constexpr (kVectors) {
          const uint32_t step = params.b_scale_column;
          column[box] = there ? make_float2(b[at * step], b[(at + 1) * step]) : make_float2(0.f, 0.f);
        }
        Vec<Bias, 2> pair;
        pair[0] = pair[1] = from_float<Bias>(0.f);
        if (params.bias != nullptr && there) pair[0] = add[at], pair[1] = add[at + 1];
        bias[box] = *reinterpret_cast<const uint32_t*>(&pair);
      }
    }
  }
  // Every lane of the warp: the factors of n8 tile j of a box, and what is added.
  FI_DEVICE void look(int box, int j, float2& factor, float2& add) const {
    const int from = 4 * j + (lane_id() & 3);
    if constexpr (kVectors)
      factor = make_float2(__shfl_sync(kFullMask, column[box].x, from), __shfl_sync(kFullMask, column[box].y, from));
    const uint32_t word = __shfl_sync(kFullMask, bias[box], from);
    const auto pair = Vec<Bias, 2>::load(&word);
    add = make_float2(to_float(pair[0]), to_float(pair[1]));
  }
};

// The residual of a box of 64 x 64: each warp's own 16 rows, 16 bytes a lane, four rows an instruction. Two boxes are on their way
// from before the products on; `put` lays one where the box will be built, so that a lane finds its fragments by ldmatrix.
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

// What a warpgroup asks for before a tile's products.
template <class Config>
struct HopperAhead {
  using Out = typename Config::Out;
  static constexpr bool kResidual = Config::kBulkStore && !Config::kGated && Config::kScale == HopperScale::none;
  HopperFactors<Config> factors;
  HopperResidual<Out> residual[kResidual ? 2 : 1];
  const Out* from;
  bool plain;

  FI_DEVICE void ask(const HopperGemmParams& params, const HopperGemmTile& tile, uint32_t m, uint32_t n, int box) {
    if constexpr (kResidual)
      if (box < HopperFactors<Config>::kBoxes)
        residual[box % 2].load(from, params.residual_stride, m, tile.m_end, n + box * 64, params.n);
  }
  FI_DEVICE void load(const HopperGemmParams& params, const HopperGemmTile& tile, uint32_t m, uint32_t n) {
    plain = HopperFactors<Config>::plain(params);
    factors.load(params, tile, m, n, plain);
    if (params.residual == nullptr) return;
    prefetch_residual<Config>(params, tile, m, n);
    from = static_cast<const Out*>(params.residual) + tile.batch * params.residual_batch;
    ask(params, tile, m, n, 0);
    ask(params, tile, m, n, 1);
  }
};

// Boxes of 64 x 64 through two buffers of the warpgroup at `buffers`. The copy engine leaves out what is outside the
// matrix; where a segment ends inside the tile, threads store the rows that are left.
template <class Config, bool kPlain>
FI_DEVICE void store_boxes(const HopperGemmParams& params, const HopperGemmTile& tile,
                           const float (&d)[HopperGemmShape<Config>::kRegs], HopperAhead<Config>& ahead, uint32_t m, uint32_t n,
                           uint32_t buffers, int warpgroup) {
  using Shape = HopperGemmShape<Config>;
  using Out = typename Config::Out;
  static_assert(sizeof(Out) == 2 && Shape::kWarpOutN % 64 == 0, "whole boxes of 128 bytes a row");
  constexpr bool kVectors = Config::kScale == HopperScale::vectors, kAhead = !kPlain && !Config::kGated;
  const HopperEpilogue<Config, kPlain> epilogue(params, tile);
  const int lane = lane_id(), t = lane & 3, warp = warp_id() & 3;
  const uint32_t row = m + warp * 16 + (lane >> 2);
  const uint32_t to = buffers + (warp * 16 + lane % 16) * 128;
  const bool leader = (threadIdx.x & 127) == 0, adds = kAhead && HopperAhead<Config>::kResidual && params.residual != nullptr;
  auto sync = [&] { asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory"); };
#pragma unroll
  for (int box = 0; box < Shape::kWarpOutN / 64; ++box) {
    if (n + box * 64 >= params.n) break;
    if (leader) {
      if (box == 0)
        ptx::tma_store_wait_read<0>();  // the tile before may have ended with either buffer
      else
        ptx::tma_store_wait_read<1>();
    }
    sync();  // the leader has seen this buffer's last store read it
    if (adds) {
      ahead.residual[HopperAhead<Config>::kResidual ? box % 2 : 0].put(buffers + box % 2 * 8192);
      ahead.ask(params, tile, m, n, box + 2);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const uint32_t at = to + box % 2 * 8192 + ((j + lane / 16) ^ (lane & 7)) * 16;
      uint32_t words[4], more[4] = {};
      if constexpr (!kPlain && Config::kGated) asm volatile("" ::: "memory");  // later loads would take the registers of several
      if (adds) ptx::ldmatrix_x4(more, at);
      float2 factor[2], add[2];
      if constexpr (kAhead) ahead.factors.look(box, j, factor[0], add[0]), ahead.factors.look(box, j + 1, factor[1], add[1]);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const int chunk = box * 8 + j + q / 2, h = q % 2, i = 4 * chunk + 2 * h;
        float2 v = make_float2(d[i], d[i + 1]);
        if constexpr (kVectors) v.x *= ahead.factors.row[h], v.y *= ahead.factors.row[h];
        if constexpr (kAhead) {
          if constexpr (kVectors) v.x *= factor[q / 2].x, v.y *= factor[q / 2].y;
          const auto residual = Vec<Out, 2>::load(&more[q]);
          v.x += add[q / 2].x + to_float(residual[0]), v.y += add[q / 2].y + to_float(residual[1]);
        } else if constexpr (Config::kGated) {
          const int column = n + 2 * t + 8 * chunk;
          const bool inside = row + 8 * h < tile.m_end && column < int(params.n);
          v = epilogue.pair(d, i, row + 8 * h, column, 1.f, inside);
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
                          const float (&d)[HopperGemmShape<Config>::kRegs], HopperAhead<Config>& ahead, uint32_t m, uint32_t n,
                          uint32_t buffers, int warpgroup) {
  auto store = [&](auto plain) {
    constexpr bool kPlain = decltype(plain)::value;
    if constexpr (Config::kBulkStore)
      store_boxes<Config, kPlain>(params, tile, d, ahead, m, n, buffers, warpgroup);
    else
      store_rows<Config, kPlain>(params, tile, d, m, n);
  };
  if constexpr (Config::kScale == HopperScale::blocks) {
    store(Flag<true>{});  // such products have no bias and no residual
  } else {
    if (ahead.plain)
      store(Flag<true>{});
    else
      store(Flag<false>{});
  }
}

}  // namespace fi
