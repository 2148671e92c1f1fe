// How the Hopper kernel of latent attention gets its tiles: shapes, barriers, and the producer warps.
// Pages of a multiple of 8 tokens come by the copy engine, one box a page (or its share of the tile) and quarter. Others are
// gathered row by row (cp.async), whose 16-byte pieces go to the same places; fp8 rows are widened on their way.
#pragma once
#include "attention/mla_params.cuh"
#include "attention/prefill_tiles.cuh"
#include "ptx/gather.cuh"
#include "ptx/pdl.cuh"
#include "ptx/tma.cuh"

namespace fi {

struct MlaHopperParams : MlaParams {
  // (64 columns, token % 8, panel, token / 8 in the page, page), boxes (64, 8, 2 or 1, box_rows / 8, 1).
  ptx::TensorMap ckv_map, kpe_map;
  uint32_t box_rows;  // tokens a box, a multiple of 8 that divides page_size and 64
};

constexpr int kMlaRows = 64, kMlaKeys = 64;                    // of a tile
constexpr int kMlaPanel = kMlaRows * 128;                      // bytes, as all of these: 64 rows of 64 columns
constexpr int kMlaQuarter = 2 * kMlaPanel, kMlaKpeAt = 4 * kMlaQuarter, kMlaStage = 9 * kMlaPanel, kMlaQ = 9 * kMlaPanel;
constexpr int kMlaRows8 = 2 * 1024;                            // from 8 rows of a quarter to the next

// Warpgroup 0 has the values of quarters 0 and 1, warpgroup 1 those of 2 and 3. The quarters of a stage in the order in which
// they become free: both warpgroups come to stage 0 first, warpgroup 0 before the other. The last has kpe, which holds the
// weights for its warpgroup.
FI_DEVICE constexpr int mla_quarter(int stage, int number) { return stage == 0 ? number : (number & 1 ? number >> 1 : 2 + (number >> 1)); }

// Barriers, who arrives, how often a phase; [stage][quarter].
struct alignas(16) MlaHopperShared : MlaShared {
  uint64_t full[2][4];   // the producer's expected bytes (1); rows: each thread of two warps (64)
  uint64_t empty[2][4];  // lane 0 of the warps that read the quarter as values (4)
  uint64_t tail;         // expected bytes of a tile that reaches past the request's last key (1)
  float m[2][kMlaRows], d[2][kMlaRows];  // maxima after the last tile of each stage; denominators of each warpgroup
};

// Named barriers: weights of stage 0 and 1 are there (owner arrives, other waits); both warpgroups.
constexpr int kMlaWeights = 1, kMlaConsumers = 3;

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
  MlaBoxes ahead{0, 0, 0};
  if (stage < tiles) ahead = find((last - 1 - stage) * kMlaKeys);
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
      const uint32_t barrier = ptx::smem_address(tail_rows > 0 ? &shared.tail : &shared.full[stage][quarter]);
      ptx::mbarrier_wait(ptx::smem_address(&shared.empty[stage][quarter]), phase);
      if (lane == 0) ptx::mbarrier_arrive_expect(barrier, boxes.count * box_rows * (number < 3 ? 256 : 256 + 128));
      __syncwarp();
      if (lane < boxes.count) {
        ptx::tma_load_5d(address + quarter * kMlaQuarter + lane * box_rows * 256, params.ckv_map, barrier, 0, 0, 2 * quarter,
                         boxes.group, boxes.page);
        if (number == 3)
          ptx::tma_load_5d(address + kMlaKpeAt + lane * box_rows * 128, params.kpe_map, barrier, 0, 0, 0, boxes.group, boxes.page);
      }
      if (tail_rows > 0) {
        ptx::mbarrier_wait(barrier, number & 1);
        for (int chunk = lane; chunk < tail_rows * 16; chunk += 32) {
          const int row = kMlaKeys - tail_rows + chunk / 16;
          const uint32_t at = quarter * kMlaQuarter + row / 8 * kMlaRows8 + chunk % 16 / 8 * 1024 + row % 8 * 128 + chunk % 8 * 16;
          *reinterpret_cast<uint4*>(stages + offset + at) = make_uint4(0, 0, 0, 0);
        }
        ptx::fence_proxy_async();
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(ptx::smem_address(&shared.full[stage][quarter]));
      }
    }
    // The next tile goes to L2 now: when its quarters become free, the memory's latency is behind it. Tiles of rows that
    // lie side by side run at a time over the same keys: one of two does it for both.
    if (i + 2 < tiles && lane < ahead.count && item.q_tile % 2 == 0) {
#pragma unroll
      for (int quarter = 0; quarter < 4; ++quarter)
        ptx::tma_prefetch_5d(params.ckv_map, 0, 0, 2 * quarter, ahead.group, ahead.page);
      ptx::tma_prefetch_5d(params.kpe_map, 0, 0, 0, ahead.group, ahead.page);
    }
  }
}

// How latent rows come: boxes of the copy engine, rows of pages of any size, or rows of fp8.
enum class MlaLoad { kBoxes, kRows, kFp8 };

// With pages of any size: two warps a stage copy rows, eight threads a row's 128 bytes. Rows past the request's last key become
// zeros. The copies' arrivals at the barriers are counted by the hardware, so that no thread waits for its own.
template <class Config, class Params>
FI_DEVICE void gather_mla(const Params& params, MlaHopperShared& shared, uint8_t* stages, const PrefillItem& item, int stage) {
  using T = typename Config::T;
  const int lane = lane_id(), part = threadIdx.x & 63, sub = part & 7, line = part >> 3;  // this thread's rows: line + 8 k
  const int last = ceil_div(item.kv_end, kMlaKeys), tiles = last - item.kv_begin / kMlaKeys;
  const T *const ckv = static_cast<const T*>(params.k), *const kpe = static_cast<const T*>(params.v);
  // Pages of rows lane and lane + 32.
  int page[2];
  auto find = [&](int start) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = start + lane + 32 * i;
      page[i] = token < item.kv_len ? params.kv_indices[item.kv_base + params.page_size.quotient(token)] : 0;
    }
  };
  uint8_t* const to = stages + stage * kMlaStage + line * 128 + (sub ^ line) * 16;
  if (stage < tiles) find((last - 1 - stage) * kMlaKeys);
#pragma unroll 1
  for (int i = stage; i < tiles; i += 2) {
    const int phase = (i >> 1 & 1) ^ 1, start = (last - 1 - i) * kMlaKeys;
#pragma unroll 1
    for (int number = 0; number < 4; ++number) {
      const int quarter = mla_quarter(stage, number);
      ptx::mbarrier_wait(ptx::smem_address(&shared.empty[stage][quarter]), phase);
#pragma unroll 2
      for (int k = 0; k < kMlaKeys / 8; ++k) {
        const int token = start + line + 8 * k, entry = token - params.page_size.quotient(token) * params.page_size.divisor;
        const int64_t at = __shfl_sync(kFullMask, k < 4 ? page[0] : page[1], (line + 8 * k) & 31);
        const bool valid = token < item.kv_len;
        const T* const from = ckv + at * params.k_stride_page + entry * params.k_stride_n + quarter * 128 + sub * 8;
        ptx::cp_async_16(to + quarter * kMlaQuarter + k * kMlaRows8, from, valid);
        ptx::cp_async_16(to + quarter * kMlaQuarter + k * kMlaRows8 + 1024, from + 64, valid);
        if (number == 3)
          ptx::cp_async_16(to + kMlaKpeAt + k * 1024, kpe + at * params.v_stride_page + entry * params.v_stride_n + sub * 8, valid);
      }
      ptx::cp_async_arrive(ptx::smem_address(&shared.full[stage][quarter]));
    }
    if (i + 2 < tiles) find((last - 3 - i) * kMlaKeys);
    if (i + 2 < tiles && item.q_tile % 2 == 0) {  // the next tile goes to L2 now, as in produce_mla
#pragma unroll 1
      for (int j = part >> 5; j < 9 * 2; j += 2) {  // 9 lines of 128 bytes of this lane's two rows, by two warps
        const int token = (last - 3 - i) * kMlaKeys + lane + (j >= 9 ? 32 : 0), piece = j >= 9 ? j - 9 : j;
        const int entry = token - params.page_size.quotient(token) * params.page_size.divisor;
        const int64_t at = j >= 9 ? page[1] : page[0];
        const T* const from = piece < 8 ? ckv + at * params.k_stride_page + entry * params.k_stride_n + piece * 64
                                        : kpe + at * params.v_stride_page + entry * params.v_stride_n;
        if (token < item.kv_len) ptx::prefetch_l2(from);
      }
    }
  }
}

// fp8 rows of pages of any size: two warps a stage hold a quarter of the tile in registers while it is still in use, then
// widen it into its place. kTokenScales: times a factor a row and quarter. kpe takes the ratio of its scale to that of ckv.
template <class Config, class Params>
FI_DEVICE void widen_mla(const Params& params, MlaHopperShared& shared, uint8_t* stages, const PrefillItem& item, int stage) {
  using T = typename Config::T;
  using KV = typename Config::KV;
  constexpr int kRows = kMlaKeys / 8;  // of a thread: line + 8 k
  const int lane = lane_id(), part = threadIdx.x & 63, sub = part & 7, line = part >> 3;
  const int last = ceil_div(item.kv_end, kMlaKeys), tiles = last - item.kv_begin / kMlaKeys;
  const KV *const ckv = static_cast<const KV*>(params.k), *const kpe = static_cast<const KV*>(params.v);
  int page[2], slot[2];  // of rows lane and lane + 32; the token's number in the cache
  auto find = [&](int start) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = start + lane + 32 * i, number = params.page_size.quotient(token);
      page[i] = token < item.kv_len ? params.kv_indices[item.kv_base + number] : 0;
      if constexpr (Config::kTokenScales) slot[i] = page[i] * params.page_size.divisor + token - number * params.page_size.divisor;
    }
  };
  auto put = [&](uint8_t* to, int chunk, uint4 in, float factor) {  // 16 values to chunks `chunk` and the next of a row
    uint4 lo = widen<T, KV>(make_uint2(in.x, in.y)), hi = widen<T, KV>(make_uint2(in.z, in.w));
    if (factor != 1.f) scale_mla<T>(lo, factor), scale_mla<T>(hi, factor);
    *reinterpret_cast<uint4*>(to + (chunk ^ line) * 16) = lo;
    *reinterpret_cast<uint4*>(to + ((chunk + 1) ^ line) * 16) = hi;
  };
  uint8_t* const to = stages + stage * kMlaStage + line * 128;
  if (stage < tiles) find((last - 1 - stage) * kMlaKeys);
#pragma unroll 1
  for (int i = stage; i < tiles; i += 2) {
    const int phase = (i >> 1 & 1) ^ 1, start = (last - 1 - i) * kMlaKeys;
    auto place = [&](int k, int& entry) {  // page of row line + 8 k, and its place there
      const int token = start + line + 8 * k;
      entry = token - params.page_size.quotient(token) * params.page_size.divisor;
      return int64_t(__shfl_sync(kFullMask, k < 4 ? page[0] : page[1], (line + 8 * k) & 31));
    };
#pragma unroll 1
    for (int number = 0; number < 5; ++number) {  // the last is kpe: it joins the fourth quarter
      const int quarter = mla_quarter(stage, min(number, 3));
      uint4 in[kRows];
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        int entry;
        const int64_t at = place(k, entry);
        const KV* from = ckv + at * params.k_stride_page + entry * params.k_stride_n + quarter * 128 + sub * 16;
        if (number == 4) from = kpe + at * params.v_stride_page + entry * params.v_stride_n + (sub & 3) * 16;
        in[k] = start + line + 8 * k < item.kv_len ? __ldg(reinterpret_cast<const uint4*>(from)) : make_uint4(0, 0, 0, 0);
      }
      if (number < 4) ptx::mbarrier_wait(ptx::smem_address(&shared.empty[stage][quarter]), phase);
#pragma unroll
      for (int k = 0; k < kRows; ++k) {
        float factor = 1.f;
        if constexpr (Config::kTokenScales) {
          const uint32_t at = __shfl_sync(kFullMask, k < 4 ? slot[0] : slot[1], (line + 8 * k) & 31);
          if (number < 4 && start + line + 8 * k < item.kv_len) factor = __ldg(params.token_scales + int64_t(at) * 4 + quarter);
        }
        if (number < 4)
          put(to + quarter * kMlaQuarter + k * kMlaRows8 + (sub >> 2) * 1024, (sub & 3) * 2, in[k], factor);
        else if (sub < 4)
          put(to + kMlaKpeAt + k * 1024, sub * 2, in[k], params.pe_ratio);
      }
      if (number == 3) continue;
      ptx::fence_proxy_async();
      ptx::mbarrier_arrive(ptx::smem_address(&shared.full[stage][quarter]));
    }
    if (i + 2 < tiles) find((last - 3 - i) * kMlaKeys);
  }
}

}  // namespace fi
