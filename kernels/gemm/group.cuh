// out[rows of group g] = epilogue(a[rows of group g] b[weight of group g]): segments, MoE experts, batches, and fp8 with scales.
// Groups are segments of rows that `indptr` bounds (walked on the device: no group needs a host's attention, empty ones
// cost nothing) or, without it, the matrices of a batch (blockIdx.z). One CTA computes kBlockM x kBlockN of one group's
// product; grid = (column tiles x row tiles, 1, batch), where segments have at most floor(rows / kBlockM) + groups row
// tiles: CTAs past the last one leave at once. Rows outside the segments are not written.
// kScale: kNone (16-bit operands); kEnd (a multiplier a row and a column, or one for all, after the sum); kBlocks (a
// multiplier for every kScaleK units of k, 256 bytes at most a step: sums of one step are scaled and added up in fp32).
// kGated: b holds 2 n columns, [gate, up] (kGateSecond: [up, gate]); out = silu(gate) * up.
// Shared memory, dynamic: kStages x (a tile, b tile), then kBlocks' (kStages + 1) x (kBlockM + kBlockN) scales.
// Bytes moved: each group's rows ceil(n / kBlockN) times, its weight once for each row tile. Architecture: any (fp8 is
// upcast below sm_89, bf16 below sm_80 runs on the CUDA cores).
#pragma once
#include "gemm/tile.cuh"
#include "ptx/cp_async_word.cuh"
#include "ptx/mma_fp8.cuh"

namespace fi {

enum class GroupScale { kNone, kEnd, kBlocks };

struct GroupParams {
  const void* a;
  const void* b;
  const void* bias;      // [weights, columns of b] in the type of a (of out for fp8), or null
  const void* residual;  // like out, or null
  void* out;
  const void* indptr;   // [groups + 1] int32 or int64, or null: the batch is blockIdx.z
  const void* indices;  // [groups] weight of a group, or null: its own number; one below 0: its rows are left out
  const float* a_scale;  // null with kEnd: 1
  const float* b_scale;
  int64_t a_stride, b_stride;  // units of 16 bits between rows (of b's memory)
  int64_t a_batch, b_batch;    // units between matrices of a batch, between weights
  int64_t out_stride, out_batch, residual_stride, residual_batch, bias_batch;  // elements
  int64_t a_scale_row, a_scale_k, a_scale_batch;     // elements between scales
  int64_t b_scale_column, b_scale_k, b_scale_batch;  // batch: between weights
  uint32_t m, n, k;         // rows in all (of one matrix without indptr), columns of out, units of k
  uint32_t groups;
  uint32_t a_scale_rows;    // rows under one scale
  uint32_t b_scale_columns; // columns under one scale
  uint32_t scale_steps;     // tiles of k under one scale
  uint32_t wide;            // bit 0: indptr is int64; bit 1: indices are
};

struct GroupTile {
  uint32_t m_first, m_end;  // rows; empty when this CTA has none
  uint32_t group;
};

FI_DEVICE int64_t read_index(const void* p, uint32_t i, bool wide) {
  return wide ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}

// The `index`-th row tile of all segments, by every warp for itself: 32 segments a step, their tiles added up by lane.
template <int kBlockM>
FI_DEVICE GroupTile find_group_tile(const GroupParams& params, uint32_t index) {
  const bool wide = params.wide & 1;
  for (uint32_t base = 0; base < params.groups; base += kWarpSize) {
    const uint32_t s = base + lane_id();
    int64_t begin = 0, end = 0;
    if (s < params.groups) {
      begin = max(read_index(params.indptr, s, wide), int64_t(0));
      end = min(read_index(params.indptr, s + 1, wide), int64_t(params.m));
    }
    if (__shfl_sync(kFullMask, begin, 0) >= params.m) break;  // the segments that are left have no rows
    if (params.indices && s < params.groups && read_index(params.indices, s, params.wide & 2) < 0) end = begin;
    const uint32_t tiles = end > begin ? uint32_t((end - begin + kBlockM - 1) / kBlockM) : 0;
    uint32_t sum = tiles;
#pragma unroll
    for (int offset = 1; offset < kWarpSize; offset *= 2) {
      const uint32_t other = __shfl_up_sync(kFullMask, sum, offset);
      if (lane_id() >= offset) sum += other;
    }
    const uint32_t found = __ballot_sync(kFullMask, sum > index);
    if (found) {
      const int owner = __ffs(found) - 1;
      const uint32_t before = __shfl_sync(kFullMask, sum - tiles, owner);
      const uint32_t first = __shfl_sync(kFullMask, uint32_t(begin), owner);
      return {first + (index - before) * kBlockM, __shfl_sync(kFullMask, uint32_t(end), owner), base + owner};
    }
    index -= __shfl_sync(kFullMask, sum, kWarpSize - 1);
  }
  return {0, 0, 0};
}

// Config: A, B (types of the operands), Out, Bias, kScale, kSegments, kGated, kGateSecond, kBlockM, kBlockN, kBlockK (units),
// kStages, kWarpsM, kWarpsN, kGroup, kRowMajorB
template <class Config>
FI_DEVICE void gemm_group(const GroupParams& params) {
  using A = typename Config::A;
  using Out = typename Config::Out;
  using Product = TileProduct<Config>;
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kBlockK = Config::kBlockK;
  constexpr int kStages = Config::kStages, kThreads = Product::kThreads;
  constexpr bool kRowMajorB = Config::kRowMajorB, kGated = Config::kGated;
  constexpr bool kBlocks = Config::kScale == GroupScale::kBlocks;
  constexpr int kColumns = kGated ? kBlockN / 2 : kBlockN;  // of out
  static_assert(!kGated || !kRowMajorB, "gate and up rows alternate in the tile");
  static_assert(!kRowMajorB || sizeof(A) == 2, "ldmatrix transposes 16-bit elements");
  static_assert(sizeof(A) == 2 || Config::kScale != GroupScale::kNone, "fp8 has scales");
  extern __shared__ __align__(1024) uint8_t smem[];
  Product product(smem);
  float* const scales = reinterpret_cast<float*>(product.tiles_b + kStages * Product::kTileB);

  ptx::grid_launch_dependents();
  const uint32_t tiles_n = ceil_div<uint32_t>(params.n, kColumns), tiles_m = gridDim.x / tiles_n;
  const uint2 tile = tile_of<Config::kGroup>(blockIdx.x, tiles_m, tiles_n);
  ptx::grid_wait();  // the segments may come from the kernel before this one, too
  GroupTile rows{tile.x * kBlockM, params.m, blockIdx.z};
  if constexpr (Config::kSegments) {
    rows = find_group_tile<kBlockM>(params, tile.x);
    if (rows.m_first >= rows.m_end) return;
  }
  const int64_t batch = Config::kSegments ? 0 : blockIdx.z;
  const int64_t weight = params.indices ? read_index(params.indices, rows.group, params.wide & 2) : rows.group;
  const uint32_t n_first = tile.y * kColumns;

  using LoaderA = TileLoader<uint16_t, kBlockM, kBlockK, kThreads>;
  using LoaderB = TileLoader<uint16_t, kRowMajorB ? kBlockK : kBlockN, kRowMajorB ? kBlockN : kBlockK, kThreads>;
  const LoaderA loader_a(static_cast<const uint16_t*>(params.a) + batch * params.a_batch, params.a_stride, rows.m_first,
                         rows.m_end, 0);
  const uint16_t* b = static_cast<const uint16_t*>(params.b) + weight * params.b_batch;
  auto make_loader_b = [&] {
    if constexpr (kGated) {
      return LoaderB(b, b + int64_t(params.n) * params.b_stride, params.b_stride, n_first, params.n);
    } else {
      return kRowMajorB ? LoaderB(b, params.b_stride, 0, params.k, n_first)
                        : LoaderB(b, params.b_stride, n_first, params.n, 0);
    }
  };
  const LoaderB loader_b = make_loader_b();
  // The scales of a step lie in a ring of one slot more than the tiles': they are read after the barrier that frees a tile.
  const float* a_scale = params.a_scale + batch * params.a_scale_batch;
  const float* b_scale = params.b_scale + weight * params.b_scale_batch;
  auto scale_column = [&](uint32_t index) {  // column of b under tile row `index`
    if constexpr (!kGated) return n_first + index;
    return n_first + index / 16 * 8 + index % 8 + (index & 8 ? params.n : 0);
  };
  auto copy_scales = [&](uint32_t step) {
    float* slot = scales + step % (kStages + 1) * (kBlockM + kBlockN);
    const int64_t block = step / params.scale_steps;
    for (int i = threadIdx.x; i < kBlockM + kBlockN; i += kThreads) {
      const uint32_t row = min(rows.m_first + i, rows.m_end - 1);
      const uint32_t column = min(scale_column(i - kBlockM), (kGated ? 2 : 1) * params.n - 1);
      const float* source = i < kBlockM ? a_scale + row / params.a_scale_rows * params.a_scale_row + block * params.a_scale_k
                                        : b_scale + column / params.b_scale_columns * params.b_scale_column +
                                              block * params.b_scale_k;
      ptx::cp_async_4(slot + i, source);
    }
  };
  auto copy = [&](int stage, uint32_t step) {
    const uint32_t k = step * kBlockK;
    loader_a.copy_columns(product.tiles_a + stage * Product::kTileA, k, params.k);
    uint16_t* to = product.tiles_b + stage * Product::kTileB;
    if constexpr (kRowMajorB) {
      loader_b.copy_rows(to, params.b_stride, k, params.k, n_first + loader_b.chunk * 8 < params.n);
    } else {
      loader_b.copy_columns(to, k, params.k);
    }
    if constexpr (kBlocks) copy_scales(step);
  };
  const uint32_t steps = ceil_div<uint32_t>(params.k, kBlockK);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) copy(s, s);
    ptx::cp_async_commit();
  }

  constexpr int kMTiles = Product::kMTiles, kNTiles = Product::kNTiles;
  float total[kBlocks ? kMTiles : 1][kBlocks ? kNTiles : 1][4] = {};
  auto multiply = [](float(&c)[4], const uint32_t(&fa)[4], const uint32_t(&fb)[2]) {
    if constexpr (sizeof(A) == 2) {
      ptx::mma_m16n8k16<A>(c, fa, fb);
    } else {
      ptx::mma_m16n8k32<A, typename Config::B>(c, fa, fb);
    }
  };
  const int g = lane_id() >> 2, t = lane_id() & 3;
  auto after = [&](uint32_t step) {
    if constexpr (kBlocks) {
      const float* slot = scales + step % (kStages + 1) * (kBlockM + kBlockN);
#pragma unroll
      for (int i = 0; i < kMTiles; ++i) {
        const float* at = slot + product.warp_m * Product::kWarpM + i * 16 + g;
        const float lo = at[0], hi = at[8];
#pragma unroll
        for (int j = 0; j < kNTiles; ++j) {
          const float2 c = *reinterpret_cast<const float2*>(slot + kBlockM + product.warp_n * Product::kWarpN + j * 8 + 2 * t);
          total[i][j][0] = fmaf(product.acc[i][j][0], lo * c.x, total[i][j][0]);
          total[i][j][1] = fmaf(product.acc[i][j][1], lo * c.y, total[i][j][1]);
          total[i][j][2] = fmaf(product.acc[i][j][2], hi * c.x, total[i][j][2]);
          total[i][j][3] = fmaf(product.acc[i][j][3], hi * c.y, total[i][j][3]);
        }
      }
      product.clear();
    }
  };
  product.run(steps, copy, multiply, after);

  using Bias = typename Config::Bias;
  const Bias* bias = static_cast<const Bias*>(params.bias);
  if (bias) bias += weight * params.bias_batch;
  const Out* residual = static_cast<const Out*>(params.residual);
  if (residual) residual += batch * params.residual_batch;
  Out* out = static_cast<Out*>(params.out) + batch * params.out_batch;
  product.for_rows([&](int i, int half, int index) {
    const uint32_t row = rows.m_first + index;
    const bool valid = row < rows.m_end;
    float row_scale = 1.f;
    if constexpr (Config::kScale == GroupScale::kEnd) row_scale = params.a_scale && valid ? a_scale[row * params.a_scale_row] : 1.f;
    // One column of b: the sum in element `e` of n8 tile j, scaled, with its bias.
    auto value = [&](int j, int e, uint32_t column) {
      float x;
      if constexpr (kBlocks) {
        x = total[i][j][2 * half + e];
      } else {
        x = product.acc[i][j][2 * half + e];
      }
      if constexpr (Config::kScale == GroupScale::kEnd)
        x *= params.b_scale ? row_scale * b_scale[column * params.b_scale_column] : row_scale;
      return bias ? x + to_float(bias[column]) : x;
    };
    auto finish = [&](float x, uint32_t column) {
      return residual ? x + to_float(residual[row * params.residual_stride + column]) : x;
    };
    auto gated = [&](int j, int e, uint32_t column) {
      const float first = value(j, e, column), second = value(j + 1, e, column + params.n);
      const float gate = Config::kGateSecond ? second : first, up = Config::kGateSecond ? first : second;
      return gate * math::ptx_rcp(1.f + math::ptx_exp2(-gate * math::log2e)) * up;
    };
    constexpr int kOutTiles = kGated ? kNTiles / 2 : kNTiles;
    static_assert(kOutTiles % 4 == 0, "quads of n8 tiles make the 16-byte stores");
#pragma unroll
    for (int j = 0; j < kOutTiles; j += 4)
      store_quad(out + row * params.out_stride, n_first + product.warp_n * (kOutTiles * 8) + j * 8, params.n, valid,
                 [&](int q, uint32_t column) {
                   if constexpr (kGated) {
                     const int pair = 2 * (j + q);
                     return make_float2(finish(gated(pair, 0, column), column), finish(gated(pair, 1, column + 1), column + 1));
                   } else {
                     return make_float2(finish(value(j + q, 0, column), column), finish(value(j + q, 1, column + 1), column + 1));
                   }
                 });
  });
}

}  // namespace fi
