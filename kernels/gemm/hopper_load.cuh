// Hopper matrix products (gemm/hopper.cuh): parameters, shared memory, the walk over tiles, and the producers.
#pragma once
#include "common/segments.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/pdl.cuh"
#include "ptx/tma_store.cuh"
#include "ptx/wgmma_shared.cuh"

namespace fi {

struct HopperGemmParams {
  // a: (k, row, batch, 1), box (128 bytes, kBoxM). b: k-contiguous (k, column, weight, 1), box (128 bytes, kBoxN);
  // n-contiguous (column, k, weight, 1), box (64, 64). out: (column, row, batch, 1), box (64, 64).
  ptx::TensorMap a_map, b_map, out_map;
  void* out;
  const void* bias;       // [weight, columns of b] in the type Bias, or null
  const void* residual;   // like out, added last; or null
  const float* a_scale;   // a row (and 128 of k); kScale none: null
  const float* b_scale;   // a column; in blocks: 128 columns and 128 of k
  const void* indptr;     // grouped: first row of every segment and the end, [segments + 1]
  const void* weight_indices;  // grouped: [segments], or null: segment s has weight s; one below 0: its rows are left out
  int64_t out_stride, out_batch, residual_stride, residual_batch, bias_batch;  // elements, as all strides
  int64_t a_scale_batch, a_scale_row, a_scale_k, b_scale_batch, b_scale_column, b_scale_k;
  uint32_t m, n, k;       // n: columns of out; k: bytes of a row of a
  uint32_t batch;         // matrices; grouped: segments
  uint32_t a_step, b_step;       // 0: all matrices share a, b
  uint32_t first_half, second_half;  // gated: columns of b where the gate and the up projection start
  uint32_t wide_indptr, wide_indices;  // whether they are 64-bit
  uint32_t raster;                   // tile rows that are handed out together
  uint32_t early;                    // gemm_hopper_rows: stages of b that are requested before a is there
  uint32_t whole, pieces;            // dense: tiles from number `whole` on are `pieces` pieces of whole warpgroups' rows
};

enum class HopperScale {
  none,
  vectors,  // a factor a row of a and a factor a column of b (steps 0: one for all)
  blocks,   // a factor a row and 128 of k, and a factor 128 columns and 128 of k
};

// Config: TA, TB, Out, Bias, kBlockM, kBlockN, kStages, kWarpsM, kWarpsN (consumer warpgroups along m and n; each has 64 rows),
// kPromote (blocks of k after which the tensor cores' sums are added to others in full fp32; 0: never), kScale,
// kRowMajorB, kGrouped, kGated, kBulkStore (16-bit Out through shared memory and the copy engine), kProducerRegs, kConsumerRegs,
// kRowsA (rows of a in shared memory, copied in boxes of up to 64; past them products read what comes next, into rows that nobody
// stores).
template <class Config>
struct HopperGemmShape {
  static constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kStages = Config::kStages;
  static constexpr int kConsumers = Config::kWarpsM * Config::kWarpsN, kWarpN = kBlockN / Config::kWarpsN;
  static constexpr int kOutN = Config::kGated ? kBlockN / 2 : kBlockN;  // columns of out a tile
  static constexpr int kWarpOutN = kOutN / Config::kWarpsN;
  static constexpr int kBlockK = 128 / sizeof(typename Config::TA);
  static constexpr int kBoxesB = Config::kRowMajorB ? kBlockN / 64 : Config::kGated ? 2 * Config::kWarpsN : 1;
  static constexpr int kBoxN = kBlockN / kBoxesB;
  static constexpr int kABytes = Config::kRowsA * 128, kBBytes = kBlockN * 128;
  static constexpr int kBoxesA = ceil_div(Config::kRowsA, 64), kBoxM = Config::kRowsA / kBoxesA;
  static constexpr bool kBlocks = Config::kScale == HopperScale::blocks;
  static constexpr int kStoreBytes = Config::kBulkStore ? kConsumers * 2 * 8192 : 0;
  static constexpr int kB = kStages * kABytes, kStore = kB + kStages * kBBytes, kShared = kStore + kStoreBytes;
  static constexpr int kRegs = kWarpN / 2;
  static_assert(kBlockM == 64 * Config::kWarpsM, "a warpgroup's products have 64 rows");
  static_assert(kWarpOutN % 32 == 0, "four n8 tiles make 16-byte stores");
  static_assert(!(Config::kRowMajorB && sizeof(typename Config::TB) == 1), "fp8 operands are k-contiguous");
  static_assert(!(Config::kRowMajorB && kWarpN % (Config::kGated ? 128 : 64)), "whole panels of 64 columns");
  // Scales of b a tile and block of k: one, or one for each 64 columns of a tile that is not inside a block of 128.
  static constexpr int kScalesB = kBlocks && kBlockN > 128 ? kBlockN / 64 : 1;
  static_assert(!kBlocks || Config::kPromote == 1, "scales in blocks are applied every 128 of k");
  static_assert(!kBlocks || 128 % kBlockN == 0 || kBlockN % 64 == 0, "64 columns of a tile are inside a block of 128");
  static_assert(kScalesB == 1 || (Config::kWarpsN == 1 && kBlockN % 64 == 0), "all scales are every warpgroup's");
};

// Barriers, who arrives, how often a phase:
template <class Config>
struct HopperGemmShared {
  uint64_t full[Config::kStages];   // the producer's expected bytes (1); in blocks also each lane of the scales' producer (32)
  uint64_t empty[Config::kStages];  // lane 0 of every consumer warp; in blocks all lanes, which have read factors
  float a_scale[HopperGemmShape<Config>::kBlocks ? Config::kStages : 1][HopperGemmShape<Config>::kBlocks ? Config::kBlockM : 1];
  float b_scale[Config::kStages][HopperGemmShape<Config>::kScalesB];
};

// By one whole warp, before the CTA's barrier that shows them to the others.
template <class Config>
FI_DEVICE void init_barriers(const HopperGemmParams& params, HopperGemmShared<Config>& shared) {
  static_assert(Config::kStages <= kWarpSize);
  constexpr int kLanes = HopperGemmShape<Config>::kBlocks ? kWarpSize : 1;
  const int stage = lane_id();
  if (stage == 0) ptx::tma_prefetch(params.b_map);
  if (stage == 1) ptx::tma_prefetch(params.a_map);
  if (stage < Config::kStages) {
    ptx::mbarrier_init(ptx::smem_address(&shared.full[stage]), HopperGemmShape<Config>::kBlocks ? 1 + kWarpSize : 1);
    ptx::mbarrier_init(ptx::smem_address(&shared.empty[stage]), 4 * HopperGemmShape<Config>::kConsumers * kLanes);
  }
  ptx::mbarrier_init_fence();
  __syncwarp();
}

// A position in the ring of stages. Who waits for "full" waits for `phase`, who waits for "empty" for the other one.
template <int kSize>
struct GemmRing {
  uint32_t at = 0, phase = 0;
  FI_DEVICE void advance() {
    const bool wraps = at == kSize - 1;
    at = wraps ? 0 : at + 1;
    phase ^= wraps;
  }
};

struct HopperGemmTile {
  uint32_t m_first, m_end;  // rows of a and out; those from m_end on are not this tile's
  uint32_t n_first;         // column of out
  uint32_t batch, weight;   // of a and out, of b
};

// Tile numbers to tiles. Dense: batch by batch, `raster` tile rows at a time, m fastest inside; where the last round would leave
// most CTAs idle, its tiles are shared out in pieces. Grouped: segment by segment; a warp looks at 32 segments at a time, and the
// numbers it asks for ascend.
template <class Config>
struct HopperGemmWalk {
  using Shape = HopperGemmShape<Config>;
  const HopperGemmParams& params;
  uint32_t tiles_n;
  // Grouped: this lane's segment of the window, rows [first, end), and tile numbers up to its end.
  uint32_t window = 0, before = 0, first = 0, end = 0, until = 0;

  FI_DEVICE explicit HopperGemmWalk(const HopperGemmParams& p) : params(p), tiles_n(ceil_div<uint32_t>(p.n, Shape::kOutN)) {
    if constexpr (Config::kGrouped) load_window();
  }
  FI_DEVICE uint32_t offset(uint32_t i) const {
    return params.wide_indptr ? uint32_t(static_cast<const int64_t*>(params.indptr)[i])
                              : static_cast<const uint32_t*>(params.indptr)[i];
  }
  FI_DEVICE int32_t weight_of(uint32_t segment) const {
    return params.wide_indices ? int32_t(static_cast<const int64_t*>(params.weight_indices)[segment])
                               : static_cast<const int32_t*>(params.weight_indices)[segment];
  }
  FI_DEVICE static uint32_t tiles_of(uint32_t rows) { return ceil_div<uint32_t>(rows, Config::kBlockM); }
  FI_DEVICE void load_window() {
    const uint32_t segment = window + lane_id();
    first = end = 0;
    // Offsets are what a kernel before this one may have written: none leads past the rows that are there.
    if (segment < params.batch) first = min(offset(segment), params.m), end = min(offset(segment + 1), params.m);
    end = max(end, first);
    // Rows of a segment with a negative weight are nobody's.
    if (params.weight_indices != nullptr && segment < params.batch && weight_of(segment) < 0) end = first;
    uint32_t sum = tiles_of(end - first) * tiles_n;
#pragma unroll
    for (int step = 1; step < kWarpSize; step *= 2) {
      const uint32_t below = __shfl_up_sync(kFullMask, sum, step);
      if (lane_id() >= step) sum += below;
    }
    until = before + sum;
  }
  FI_DEVICE void inside(uint32_t number, uint32_t tiles_m, HopperGemmTile& tile) const {
    const uint32_t group = number / (params.raster * tiles_n), in_group = number - group * params.raster * tiles_n;
    const uint32_t rows = min(tiles_m - group * params.raster, params.raster), column = in_group / rows;
    tile.m_first = (group * params.raster + in_group - column * rows) * Config::kBlockM;
    tile.n_first = column * Shape::kOutN;
  }
  // Grouped: a whole warp with one number.
  FI_DEVICE bool find(uint32_t number, HopperGemmTile& tile) {
    if constexpr (!Config::kGrouped) {
      uint32_t above = 0, rows = Config::kBlockM;  // of the tile, before and in this piece
      if (Config::kWarpsM > 1 && number >= params.whole) {
        const uint32_t rest = number - params.whole, in_tiles = rest / params.pieces;
        rows = ceil_div<uint32_t>(Config::kWarpsM, params.pieces) * 64;
        above = (rest - in_tiles * params.pieces) * rows;
        rows = min(rows, Config::kBlockM - above);
        number = params.whole + in_tiles;
      }
      const uint32_t tiles_m = tiles_of(params.m), per_batch = tiles_m * tiles_n, batch = number / per_batch;
      if (batch >= params.batch) return false;
      inside(number - batch * per_batch, tiles_m, tile);
      tile.m_first += above, tile.m_end = min(params.m, tile.m_first + rows);
      tile.batch = tile.weight = batch;
      return true;
    } else {
      uint32_t holders;
#pragma unroll 1
      while ((holders = __ballot_sync(kFullMask, number < until)) == 0) {
        before = __shfl_sync(kFullMask, until, kWarpSize - 1);
        window += kWarpSize;
        if (window >= params.batch) return false;
        load_window();
        if (__shfl_sync(kFullMask, first, 0) >= params.m) return false;  // the segments that are left have no rows
      }
      // Through REDUX: results in uniform registers keep the loops and stages of the caller uniform.
      const int lane = __ffs(holders) - 1;
      const uint32_t from = __reduce_max_sync(kFullMask, __shfl_sync(kFullMask, first, lane));
      const uint32_t to = __reduce_max_sync(kFullMask, __shfl_sync(kFullMask, end, lane));
      const uint32_t tiles_m = tiles_of(to - from);
      const uint32_t start = __reduce_max_sync(kFullMask, __shfl_sync(kFullMask, until, lane)) - tiles_m * tiles_n;
      inside(number - start, tiles_m, tile);
      tile.m_first += from, tile.m_end = to, tile.batch = 0;
      const uint32_t segment = window + lane;
      tile.weight = params.weight_indices != nullptr ? weight_of(segment) : segment;
      return true;
    }
  }
};

// One thread: the block of b's columns of a tile that starts at element k, to `smem`.
template <class Config>
FI_DEVICE void load_b(const HopperGemmParams& params, uint32_t smem, uint32_t barrier, int k, uint32_t n_first, int weight) {
  using Shape = HopperGemmShape<Config>;
#pragma unroll
  for (int i = 0; i < Shape::kBoxesB; ++i) {
    int column = n_first + i * Shape::kBoxN;
    if constexpr (Config::kGated) {
      // A warpgroup's share of the tile is gate columns, then as many up columns.
      constexpr int kHalf = Shape::kBoxesB / (2 * Config::kWarpsN);  // boxes
      const int part = i / kHalf, in_part = i % kHalf;
      column = (part % 2 ? params.second_half : params.first_half) + n_first + part / 2 * Shape::kWarpOutN + in_part * Shape::kBoxN;
    }
    const uint32_t to = smem + i * Shape::kBoxN * 128;
    if constexpr (Config::kRowMajorB)
      ptx::tma_load_4d(to, params.b_map, barrier, column, k, weight, 0);
    else
      ptx::tma_load_4d(to, params.b_map, barrier, k, column, weight, 0);
  }
}

// One warp: a and b of all tiles of this CTA through the ring, as far ahead as stages are free.
template <class Config>
FI_DEVICE void produce_operands(const HopperGemmParams& params, HopperGemmShared<Config>& shared, uint32_t smem) {
  using Shape = HopperGemmShape<Config>;
  const uint32_t full = ptx::smem_address(shared.full), empty = ptx::smem_address(shared.empty);
  const uint32_t blocks = ceil_div<uint32_t>(params.k, 128);
  HopperGemmWalk<Config> walk(params);
  HopperGemmTile tile;
  GemmRing<Config::kStages> ring;
#pragma unroll 1
  for (uint32_t number = blockIdx.x; walk.find(number, tile); number += gridDim.x) {
    const int batch = tile.batch * params.a_step, weight = tile.weight * params.b_step;
    // Rows of warpgroups that this tile has no rows for stay as they are.
    const uint32_t rows = tile.m_end > tile.m_first ? tile.m_end - tile.m_first : 0;
    const uint32_t boxes = min(ceil_div<uint32_t>(rows, Shape::kBoxM), uint32_t(Shape::kBoxesA));
#pragma unroll 1
    for (uint32_t block = 0; block < blocks; ++block) {
      ptx::mbarrier_wait(empty + ring.at * 8, ring.phase ^ 1);
      if (lane_id() == 0) {
        const uint32_t barrier = full + ring.at * 8;
        const int k = block * Shape::kBlockK;
        ptx::mbarrier_arrive_expect(barrier, boxes * (Shape::kBoxM * 128) + Shape::kBBytes);
#pragma unroll
        for (int i = 0; i < Shape::kBoxesA; ++i)
          if (i < boxes)
            ptx::tma_load_4d(smem + ring.at * Shape::kABytes + i * Shape::kBoxM * 128, params.a_map, barrier, k,
                             tile.m_first + i * Shape::kBoxM, batch, 0);
        load_b<Config>(params, smem + Shape::kB + ring.at * Shape::kBBytes, barrier, k, tile.n_first, weight);
      }
      ring.advance();
    }
  }
}

// Scales in blocks, by one warp: those of a tile's rows and b's one for a block of k, to a stage. Any strides; the stage's
// barrier counts each lane when its copies are there.
template <class Config>
FI_DEVICE void load_scales(const HopperGemmParams& params, HopperGemmShared<Config>& shared, const HopperGemmTile& tile,
                           uint32_t block, uint32_t stage) {
  const int lane = lane_id();
  auto copy = [](float* to, const float* from, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(ptx::smem_address(to)), "l"(from), "r"(valid ? 4 : 0)
                 : "memory");
  };
  const float* const a = params.a_scale + (tile.m_first + lane) * params.a_scale_row + block * params.a_scale_k;
#pragma unroll
  for (int i = 0; i < ceil_div(Config::kRowsA, kWarpSize); ++i) {
    const bool valid = tile.m_first + lane + 32 * i < tile.m_end;
    copy(&shared.a_scale[stage][lane + 32 * i], valid ? a + 32 * i * params.a_scale_row : params.a_scale, valid);
  }
  if (lane < HopperGemmShape<Config>::kScalesB) {
    const uint32_t column = min(tile.n_first + 64 * lane, params.n - 1) / 128;
    copy(&shared.b_scale[stage][lane],
         params.b_scale + tile.weight * params.b_scale_batch + column * params.b_scale_column + block * params.b_scale_k, true);
  }
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(ptx::smem_address(&shared.full[stage])) : "memory");
}

// Scales in blocks for all tiles of this CTA, by another warp.
template <class Config>
FI_DEVICE void produce_scales(const HopperGemmParams& params, HopperGemmShared<Config>& shared) {
  const uint32_t empty = ptx::smem_address(shared.empty), blocks = ceil_div<uint32_t>(params.k, 128);
  HopperGemmWalk<Config> walk(params);
  HopperGemmTile tile;
  GemmRing<Config::kStages> ring;
#pragma unroll 1
  for (uint32_t number = blockIdx.x; walk.find(number, tile); number += gridDim.x) {
#pragma unroll 1
    for (uint32_t block = 0; block < blocks; ++block) {
      ptx::mbarrier_wait(empty + ring.at * 8, ring.phase ^ 1);
      load_scales<Config>(params, shared, tile, block, ring.at);
      ring.advance();
    }
  }
}

}  // namespace fi
