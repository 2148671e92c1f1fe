// How the Hopper kernel of latent attention gets its tiles: shapes, barriers, and the producer warps.
// Pages of a multiple of 8 tokens come by the copy engine, one box a page (or its share of the tile) and quarter. Others are
// gathered row by row (cp.async), whose 16-byte pieces go to the same places; fp8 rows are widened on their way.
#pragma once
#include "attention/mla_params.cuh"
#include "attention/prefill_tiles.cuh"
#include "ptx/barrier.cuh"
#include "ptx/gather.cuh"
#include "ptx/pdl.cuh"
#include "ptx/hint.cuh"

namespace fi {

struct MlaHopperParams : MlaParams {
  // (64 columns, token % 8, panel, token / 8 in the page, page), boxes (64, 8, 1, box_rows / 8, 1).
  ptx::TensorMap ckv_map, kpe_map;
  uint32_t box_rows;  // tokens a box, a multiple of 8 that divides page_size and 64
};

constexpr int kMlaRows = 64, kMlaKeys = 64;                    // of a tile
constexpr int kMlaPanel = kMlaRows * 128;                      // bytes, as all of these: 64 rows of 64 columns
constexpr int kMlaQuarter = 2 * kMlaPanel, kMlaKpeAt = 4 * kMlaQuarter, kMlaStage = 9 * kMlaPanel, kMlaQ = 9 * kMlaPanel;

// Warpgroup 0 has the values of quarters 0 and 1, warpgroup 1 those of 2 and 3. The quarters of a stage in the order in which
// they become free: both warpgroups come to stage 0 first, warpgroup 0 before the other. The last has kpe, which holds the
// weights for its warpgroup.
FI_DEVICE constexpr int mla_quarter(int stage, int number) { return stage == 0 ? number : (number & 1 ? number >> 1 : 2 + (number >> 1)); }

// Barriers, who arrives, how often a phase; [stage][quarter].
struct alignas(16) MlaHopperShared : MlaShared {
  uint64_t full[2][4];   // the producer's expected bytes (1); rows: each thread of two warps (64); fp8: eight warps (8)
  uint64_t empty[2][4];  // lane 0 of the warps that read the quarter as values (4)
  uint64_t tail[4];      // expected bytes of a quarter of a tile that reaches past the request's last key (1)
  float m[2][kMlaRows], d[2][kMlaRows];  // maxima after the last tile of each stage; denominators of each warpgroup
};

// Named barriers: weights of stage 0 and 1 are there (owner arrives, other waits); both warpgroups; the
// first producer warp has asked for its first tile (it arrives, the second one waits).
constexpr int kMlaWeights = 1, kMlaConsumers = 3, kMlaFirst = 4;

// Where the boxes of a tile come from: lane b knows it of box b.
struct MlaBoxes {
  int count, page, group;  // boxes of the tile; page, and 8 tokens in it
};

// A producer warp, one a stage, where boxes fit pages: every second tile, from the last to the first, four quarters each.
template <class Params>
FI_DEVICE void produce_mla(const Params& params, MlaHopperShared& shared, uint8_t* stages, const PrefillItem& item, int stage) {
  const int lane = lane_id(), last = ceil_div(item.kv_end, kMlaKeys), tiles = last - item.kv_begin / kMlaKeys;
  const int box_rows = params.box_rows;
  // A page table is not read past its last key.
  auto find = [&](int start) {
    MlaBoxes r{0, 0, 0};
    const int row = lane * box_rows, token = start + row;
    const bool valid = row < kMlaKeys && token < item.kv_len && start >= 0;
    r.count = __popc(__ballot_sync(kFullMask, valid));
    if (valid) {
      const int page = params.page_size.quotient(token);
      r.group = (token - page * int(params.page_size.divisor)) >> 3;
      r.page = params.kv_indices[item.kv_base + page];
    }
    return r;
  };
  // Rows that two CTAs read at about the same time stay in L2 for the second one; others leave it first. So do those of split
  // tiles, whose partial results are what the L2 should keep.
  const bool once = item.num_chunks > 1 || item.qo_len * int(params.group.divisor) <= kMlaRows;
  const uint64_t policy = once ? ptx::kEvictFirst : ptx::kEvictNormal;
  MlaBoxes ahead{0, 0, 0};
  if (!params.table_ready) ptx::grid_wait();
  if (stage < tiles) ahead = find((last - 1 - stage) * kMlaKeys);
  ptx::grid_wait();
  if (stage == 1 && tiles > 1) ptx::barrier_sync(kMlaFirst, 64);
#pragma unroll 1
  for (int i = stage; i < tiles; i += 2) {
    const int phase = (i >> 1 & 1) ^ 1;
    const MlaBoxes boxes = ahead;
    if (i + 2 < tiles) ahead = find((last - 3 - i) * kMlaKeys);
    const uint32_t offset = stage * kMlaStage, address = ptx::smem_address(stages) + offset;
    // What lies behind a request's last key (a page's unused end, an earlier tile's rows) has weight 0, but 0 * NaN is not.
    // The first tile loaded can have such rows: its bytes arrive at a barrier of this warp's own, which clears them.
    const int tail_rows = i == 0 ? last * kMlaKeys - item.kv_len : 0;
#pragma unroll 1
    for (int number = 0; number < 4; ++number) {
      const int quarter = mla_quarter(stage, number);
      const uint32_t barrier = ptx::smem_address(tail_rows > 0 ? &shared.tail[quarter] : &shared.full[stage][quarter]);
      ptx::mbarrier_wait(ptx::smem_address(&shared.empty[stage][quarter]), phase);
      if (lane == 0) ptx::mbarrier_arrive_expect(barrier, boxes.count * box_rows * (number < 3 ? 256 : 256 + 128));
      __syncwarp();
      // A lane a box and panel: two of ckv, then kpe.
      const int box = lane & 7, page = __shfl_sync(kFullMask, boxes.page, box), group = __shfl_sync(kFullMask, boxes.group, box);
      const int own = lane >> 3, panel = 2 * quarter + own;
      if (box < boxes.count && own < 2) {
        const uint32_t to = address + panel * kMlaPanel + box * box_rows * 128;
        ptx::tma_load_5d(to, params.ckv_map, barrier, 0, 0, panel, group, page, policy);
      } else if (box < boxes.count && own == 2 && number == 3) {
        const uint32_t to = address + kMlaKpeAt + box * box_rows * 128;
        ptx::tma_load_5d(to, params.kpe_map, barrier, 0, 0, 0, group, page, policy);
      }
    }
    // Stage 1 begins when all of tile 0 has been asked for, or it would take half of the way from it.
    if (i == 0 && tiles > 1) ptx::barrier_arrive(kMlaFirst, 64);
    if (tail_rows > 0) {
#pragma unroll 1
      for (int quarter = 0; quarter < 4; ++quarter) {
        ptx::mbarrier_wait(ptx::smem_address(&shared.tail[quarter]), 0);
        for (int chunk = lane; chunk < tail_rows * 16; chunk += 32) {
          const int row = kMlaKeys - tail_rows + chunk / 16;
          const uint32_t at = quarter * kMlaQuarter + chunk % 16 / 8 * kMlaPanel + row * 128 + chunk % 8 * 16;
          *reinterpret_cast<uint4*>(stages + offset + at) = make_uint4(0, 0, 0, 0);
        }
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(ptx::smem_address(&shared.full[stage][quarter]));
      }
    }
  }
}

// The pages of a tile's rows: each lane knows those of rows lane and lane + 32.
struct MlaRows {
  int page[2];

  // A page table is not read past the request's last key.
  template <class Params>
  FI_DEVICE void find(const Params& params, const PrefillItem& item, int start) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = start + lane_id() + 32 * i;
      page[i] = token < item.kv_len ? params.kv_indices[item.kv_base + params.page_size.quotient(token)] : 0;
    }
  }
  // Page of a row of the tile that begins at `start`, and its place there. All lanes of a warp call it, in the same half.
  template <class Params>
  FI_DEVICE int64_t place(const Params& params, int start, int row, int& entry) const {
    entry = start + row - params.page_size.quotient(start + row) * params.page_size.divisor;
    return __shfl_sync(kFullMask, row < 32 ? page[0] : page[1], row & 31);
  }
  // 16-bit rows to L2: by two warps, a row a thread.
  template <class Params>
  FI_DEVICE void prefetch(const Params& params, const PrefillItem& item, int start) const {
    const int row = threadIdx.x & 63, token = start + row;
    if (token >= item.kv_len) return;
    const int entry = token - params.page_size.quotient(token) * params.page_size.divisor;
    const int64_t at = row < 32 ? page[0] : page[1];
    const uint8_t* const ckv = static_cast<const uint8_t*>(params.k) + (at * params.k_stride_page + entry * params.k_stride_n) * 2;
#pragma unroll
    for (int j = 0; j < 2 * kMlaCkv; j += 128) ptx::prefetch_l2(ckv + j);
    ptx::prefetch_l2(static_cast<const uint8_t*>(params.v) + (at * params.v_stride_page + entry * params.v_stride_n) * 2);
  }
};

// How latent rows come: boxes of the copy engine, rows of pages of any size, or rows of fp8.
enum class MlaLoad { kBoxes, kRows, kFp8 };

// With pages of any size: two warps a stage copy rows, eight threads a row's 128 bytes. Rows past the request's last key become
// zeros. The copies' arrivals at the barriers are counted by the hardware, so that no thread waits for its own.
template <class Config, class Params>
FI_DEVICE void gather_mla(const Params& params, MlaHopperShared& shared, uint8_t* stages, const PrefillItem& item, int stage) {
  using T = typename Config::T;
  constexpr int kRows = kMlaKeys / 8;  // of a thread: line + 8 k
  const int lane = lane_id(), part = threadIdx.x & 63, sub = part & 7, line = part >> 3;
  const int last = ceil_div(item.kv_end, kMlaKeys), tiles = last - item.kv_begin / kMlaKeys;
  const T *const ckv = static_cast<const T*>(params.k) + sub * 8, *const kpe = static_cast<const T*>(params.v) + sub * 8;
  MlaRows rows;
  if (!params.table_ready) ptx::grid_wait();
  if (stage < tiles) rows.find(params, item, (last - 1 - stage) * kMlaKeys);
  ptx::grid_wait();
  uint8_t* const to = stages + stage * kMlaStage + line * 128 + (sub ^ line) * 16;
#pragma unroll 1
  for (int i = stage; i < tiles; i += 2) {
    const int phase = (i >> 1 & 1) ^ 1, start = (last - 1 - i) * kMlaKeys;
    // Where this thread's rows begin: once a tile, so that little lies between a quarter's release and its copies.
    const T* from[kRows];
#pragma unroll
    for (int k = 0; k < kRows; ++k) {
      int entry;
      const int64_t page = rows.place(params, start, line + 8 * k, entry);
      from[k] = ckv + page * params.k_stride_page + entry * params.k_stride_n;
    }
#pragma unroll 1
    for (int number = 0; number < 4; ++number) {
      const int quarter = mla_quarter(stage, number);
      ptx::mbarrier_wait(ptx::smem_address(&shared.empty[stage][quarter]), phase);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        const bool valid = start + line + 8 * k < item.kv_len;
        ptx::cp_async_16(to + quarter * kMlaQuarter + k * 1024, from[k] + quarter * 128, valid);
        ptx::cp_async_16(to + quarter * kMlaQuarter + kMlaPanel + k * 1024, from[k] + quarter * 128 + 64, valid);
      }
      if (number == 3) {
#pragma unroll
        for (int k = 0; k < kRows; ++k) {
          int entry;
          const int64_t page = rows.place(params, start, line + 8 * k, entry);
          ptx::cp_async_16(to + kMlaKpeAt + k * 1024, kpe + page * params.v_stride_page + entry * params.v_stride_n,
                           start + line + 8 * k < item.kv_len);
        }
      }
      ptx::cp_async_arrive(ptx::smem_address(&shared.full[stage][quarter]));
    }
    if (i + 2 < tiles) {
      rows.find(params, item, start - 2 * kMlaKeys);
      // Tiles of rows that lie side by side have the same keys: one of two does it for both.
      if (item.q_tile % 2 == 0) rows.prefetch(params, item, start - 2 * kMlaKeys);
    }
  }
}

// fp8 rows of pages of any size, by two warpgroups: a thread has a quarter of a row's pieces, holds those of the next two
// quarters of the tile in registers while they are still in use, then widens them into their place. kTokenScales: times a
// factor a row and quarter. kpe takes the ratio of its scale to that of ckv.
template <class Config, class Params>
FI_DEVICE void widen_mla(const Params& params, MlaHopperShared& shared, uint8_t* stages, const PrefillItem& item) {
  using T = typename Config::T;
  using KV = typename Config::KV;
  const int part = threadIdx.x & 255, sub = part & 3, row = part >> 2;
  const int last = ceil_div(item.kv_end, kMlaKeys), tiles = last - item.kv_begin / kMlaKeys;
  const int first = (last - 1) * kMlaKeys + row;  // this thread's token in tile 0; tile i: less 64 i
  const int32_t* const table = params.kv_indices + item.kv_base;
  // A page table is not read past the request's last key, nor before its first.
  auto page_of = [&](int i) {
    const int token = first - i * kMlaKeys;
    return i < tiles && token < item.kv_len ? table[params.page_size.quotient(token)] : 0;
  };
  auto entry_of = [&](int i) {
    const int token = first - i * kMlaKeys;
    return token - int(params.page_size.quotient(token) * params.page_size.divisor);
  };
  auto ckv_of = [&](int i, int page) {
    return static_cast<const KV*>(params.k) + page * params.k_stride_page + entry_of(i) * params.k_stride_n + sub * 16;
  };
  auto kpe_of = [&](int i, int page) {
    return static_cast<const KV*>(params.v) + page * params.v_stride_page + entry_of(i) * params.v_stride_n + sub * 16;
  };
  auto there = [&](int i) { return i < tiles && first - i * kMlaKeys < item.kv_len; };
  auto load = [&](const KV* p, bool there) { return there ? __ldg(reinterpret_cast<const uint4*>(p)) : make_uint4(0, 0, 0, 0); };
  auto factor_of = [&](int i, int page, int quarter) {
    return there(i) ? __ldg(params.token_scales + (int64_t(page) * params.page_size.divisor + entry_of(i)) * 4 + quarter) : 1.f;
  };
  // 16 values to two chunks of a row.
  auto put = [&](uint8_t* to, uint4 in, float factor) {
    uint4 lo = widen<T, KV>(make_uint2(in.x, in.y)), hi = widen<T, KV>(make_uint2(in.z, in.w));
    if (factor != 1.f) scale_mla<T>(lo, factor), scale_mla<T>(hi, factor);
    *reinterpret_cast<uint4*>(to + ((2 * sub) ^ (row & 7)) * 16) = lo;
    *reinterpret_cast<uint4*>(to + ((2 * sub + 1) ^ (row & 7)) * 16) = hi;
  };
  auto arrive = [&](int stage, int quarter) {
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane_id() == 0) ptx::mbarrier_arrive(ptx::smem_address(&shared.full[stage][quarter]));
  };

  if (!params.table_ready) ptx::grid_wait();
  int page = page_of(0), next_page = page_of(1);
  ptx::grid_wait();
  uint4 in[2][2], pe;
  float factors[2] = {1.f, 1.f};
  const KV* from = ckv_of(0, page);
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    in[n][0] = load(from + n * 128, there(0));
    in[n][1] = load(from + n * 128 + 64, there(0));
    if constexpr (Config::kTokenScales) factors[n] = factor_of(0, page, n);
  }
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    const int stage = i & 1, phase = (i >> 1 & 1) ^ 1, after_page = page_of(i + 2);
    uint8_t* const to = stages + stage * kMlaStage + row * 128;
#pragma unroll
    for (int number = 0; number < 4; ++number) {
      const int quarter = mla_quarter(stage, number);
      ptx::mbarrier_wait(ptx::smem_address(&shared.empty[stage][quarter]), phase);
      const float factor = factors[number & 1];
      put(to + quarter * kMlaQuarter, in[number & 1][0], factor);
      put(to + quarter * kMlaQuarter + kMlaPanel, in[number & 1][1], factor);
      if (number == 2) from = ckv_of(i + 1, next_page);
      // The quarter after the next one: of this tile, or of the next.
      const int then = number < 2 ? mla_quarter(stage, number + 2) : mla_quarter(stage ^ 1, number - 2);
      in[number & 1][0] = load(from + then * 128, there(number < 2 ? i : i + 1));
      in[number & 1][1] = load(from + then * 128 + 64, there(number < 2 ? i : i + 1));
      if constexpr (Config::kTokenScales)
        factors[number & 1] = factor_of(number < 2 ? i : i + 1, number < 2 ? page : next_page, then);
      if (number == 1) pe = load(kpe_of(i, page), there(i));
      if (number == 3) put(to + kMlaKpeAt, pe, params.pe_ratio);
      arrive(stage, quarter);
    }
    page = next_page, next_page = after_page;
    // To L2, a tile before it is asked for; of two tiles of rows that lie side by side one does it for both.
    if (item.q_tile % 2 == 0 && there(i + 2)) {
      ptx::prefetch_l2(ckv_of(i + 2, next_page) + sub * 112);
      if (sub == 0) ptx::prefetch_l2(kpe_of(i + 2, next_page));
    }
  }
}

}  // namespace fi
