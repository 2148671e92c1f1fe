// Attention of ragged queries over contiguous or paged keys and values, on mma.sync (FlashAttention-2).
// One CTA computes one work item: kTileQ packed query rows of one kv head over one range of keys. A packed row is
// qo_idx * group + (head in the group): a K/V tile serves the whole group whatever its size, and short queries still
// fill the matrix unit; the price is one multiplication-division a row.
// Grid (items, kv heads): items are longest first inside a head, so few heads' K/V compete for L2 at a time.
// A tile whose keys were split is put together by its own CTAs (attention/prefill_join.cuh): the last one writes it.
// Shared memory: Q [kTileQ] (later the output tile) | K [2][kTileKv] | V [2][kTileKv] | WarpRange [kWarps] |
// PrefillShared | PageOffset [2][kTileKv] | turns [kHeadDimQK / 2] (ROPE_LLAMA). fp8 keys and values: one buffer of K
// and V each, then their bytes, one tile ahead (attention/prefill_tiles.cuh).
// Each warp owns 16 * kRowTiles rows; with 2 row tiles a K or V fragment from ldmatrix feeds twice the mma's, which
// takes shared-memory bandwidth off the critical path. K and V have cp.async groups of their own, one tile ahead, issued
// behind the products that they hide under; the exponentials of 16 keys run between the products of the 16 before.
// Bytes moved: Q and O once; K and V once an item, mostly from L2. Arch: any (sm_75 copies synchronously, bf16 emulated).
#pragma once
#include "attention/prefill_join.cuh"
#include "attention/prefill_logits.cuh"
#include "attention/prefill_output.cuh"
#include "attention/prefill_params.cuh"
#include "attention/prefill_softmax.cuh"
#include "attention/prefill_tiles.cuh"
#include "attention/smem_tile.cuh"
#include "ptx/mma.cuh"
#include "ptx/pdl.cuh"

namespace fi {

// Keys outside [seen_begin, seen_end) are seen by no row of a warp, those inside [plain_begin, plain_end) by every row.
struct alignas(16) WarpRange {
  int32_t seen_begin, seen_end, plain_begin, plain_end;
};

struct PageOffset {
  int64_t k, v;
};

// What the main loop reads back from shared memory, since it has no registers to keep it in.
struct alignas(16) PrefillShared {
  PrefillItem item;
  const void *k, *v;     // of this kv head; contiguous: of the request's first token
  const int32_t* pages;  // the request's page table
  int32_t kv_head;
  uint32_t arrived;      // join_chunks: CTAs that came before this one
};

// Config: T (what is multiplied), Q and KV (T or fp8), O (T is stored best), kHeadDimQK, kHeadDimVO (multiples of 8; of 16
// with kRope), kWarps, kRowTiles (1 or 2), kTileKv (multiple of 16), kPaged, kCustomMask, kRope, Logits. Params:
// PrefillParams, PrefillRopeParams with kRope, or what a variant derives from it.
// Computes one item for one kv head; the CTA's threads may call it again after a barrier.
template <class Config, class Params>
FI_DEVICE void prefill_tile(const Params& params, int index, int kv_head) {
  using T = typename Config::T;
  using Q = typename Config::Q;
  using KV = typename Config::KV;
  using Logits = typename Config::Logits;
  using LayoutQK = TileLayout<Config::kHeadDimQK>;
  using LayoutVO = TileLayout<Config::kHeadDimVO>;
  constexpr int kThreads = Config::kWarps * 32, kRowTiles = Config::kRowTiles, kTileKv = Config::kTileKv;
  constexpr int kWarpRows = 16 * kRowTiles, kTileQ = Config::kWarps * kWarpRows;
  constexpr int kSteps = round_up(Config::kHeadDimQK, 16) / 16;      // k16 steps of q k^T
  constexpr int kDimTiles = round_up(Config::kHeadDimVO, 16) / 8;    // n8 tiles of the output
  constexpr int kKeyTiles = kTileKv / 8;                             // n8 tiles of the logits
  constexpr int kKBytes = kTileKv * LayoutQK::kRowBytes, kVBytes = kTileKv * LayoutVO::kRowBytes;
  constexpr bool kBytes = !is_same_v<KV, T>;  // fp8 keys and values
  constexpr int kBuffers = kBytes ? 1 : 2;    // a tile of bytes is one ahead: one 16-bit buffer will do
  static_assert(!kBytes || sizeof(KV) == 1, "keys and values are T or fp8");
  static_assert(!Config::kRope || Config::kHeadDimQK % 16 == 0, "the halves of a row are whole chunks");
  extern __shared__ __align__(1024) uint8_t smem[];
  uint8_t* const smem_k = smem + Config::kWarps * kWarpQBytes<Config>;
  uint8_t* const smem_v = smem_k + kBuffers * kKBytes;
  uint8_t* const bytes_k = smem_v + kBuffers * kVBytes;
  uint8_t* const bytes_v = bytes_k + kBytes * kTileKv * Config::kHeadDimQK;
  WarpRange* const ranges = reinterpret_cast<WarpRange*>(bytes_v + kBytes * kTileKv * Config::kHeadDimVO);
  PrefillShared& shared = *reinterpret_cast<PrefillShared*>(ranges + Config::kWarps);
  PageOffset* const offsets = reinterpret_cast<PageOffset*>(&shared + 1);
  uint64_t* const turns = reinterpret_cast<uint64_t*>(offsets + 2 * kTileKv);

  const PrefillItem item = params.items[index];
  if (item.qo_len == 0) return;
  const int lane = lane_id(), warp = warp_id();
  const int group = params.group.divisor;
  const int packed_rows = item.qo_len * group;
  const int first_row = item.q_tile * kTileQ;
  const int kv_begin = item.kv_begin, kv_end = item.kv_end;
  // kv_begin is a multiple of kTileKv, so a tile's number is start / kTileKv; its parity is its buffer.
  auto parity = [](uint32_t start) { return start / kTileKv & 1; };
  auto buffer = [&](uint32_t start) { return kBytes ? 0 : parity(start); };

  const Q* const q = static_cast<const Q*>(params.q) + item.q_row * params.q_stride_n + kv_head * group * params.q_stride_h;
  const KV* k = static_cast<const KV*>(params.k) + kv_head * params.k_stride_h;
  const KV* v = static_cast<const KV*>(params.v) + kv_head * params.v_stride_h;
  if constexpr (!Config::kPaged) {
    k += item.kv_base * params.k_stride_n;
    v += item.kv_base * params.v_stride_n;
  }
  if (threadIdx.x == 0) {
    shared.item = item;
    shared.k = k, shared.v = v, shared.pages = params.kv_indices + item.kv_base;
    shared.kv_head = kv_head;
  }
  if constexpr (Config::kRope) {
    for (int i = threadIdx.x; i < Config::kHeadDimQK / 2; i += kThreads) turns[i] = params.turns[i];
  }
  __syncthreads();  // shared: written by thread 0, read by all

  // Page offsets of a tile: looked up in two steps, so that the load's latency is spent on something else.
  constexpr int kLookups = ceil_div(kTileKv, kThreads);
  int32_t page[kLookups];
  auto find_pages = [&](int start) {
    const int thread = thread_again();
#pragma unroll
    for (int i = 0; i < kLookups; ++i) {
      const int row = thread + i * kThreads;
      page[i] = 0;  // a request's page table is not read past its last key
      if (row < kTileKv && start + row < kv_end) page[i] = shared.pages[params.page_size.quotient(start + row)];
    }
  };
  auto store_pages = [&](int start) {
    const int thread = thread_again();
#pragma unroll
    for (int i = 0; i < kLookups; ++i) {
      const int row = thread + i * kThreads;
      const int entry = start + row - params.page_size.quotient(start + row) * params.page_size.divisor;
      if (row < kTileKv)
        offsets[parity(start) * kTileKv + row] = {page[i] * params.k_stride_page + entry * params.k_stride_n,
                                                  page[i] * params.v_stride_page + entry * params.v_stride_n};
    }
  };
  // Keys at and past kv_end are zeros: what a page holds behind its last token (NaN perhaps) is never read.
  auto load_k = [&](int start) {
    const KV* const k = static_cast<const KV*>(shared.k);
    uint8_t* const tile = kBytes ? bytes_k : smem_k + parity(start) * kKBytes;
    if constexpr (Config::kPaged) {
      const PageOffset* const rows = offsets + parity(start) * kTileKv;
      load_stage<kBytes, Config::kHeadDimQK, kTileKv, kThreads>(tile, [&](int row, bool& valid) {
        valid = start + row < kv_end;
        return k + rows[row].k;
      });
    } else if constexpr (kBytes) {
      load_bytes<Config::kHeadDimQK, kTileKv, kThreads>(tile, [&](int row, bool& valid) {
        valid = start + row < kv_end;
        return k + (start + row) * params.k_stride_n;
      });
    } else {
      load_rows<Config::kHeadDimQK, kTileKv, kThreads>(tile, k + start * params.k_stride_n, params.k_stride_n, kv_end - start);
    }
  };
  auto load_v = [&](int start) {
    const KV* const v = static_cast<const KV*>(shared.v);
    uint8_t* const tile = kBytes ? bytes_v : smem_v + parity(start) * kVBytes;
    if constexpr (Config::kPaged) {
      const PageOffset* const rows = offsets + parity(start) * kTileKv;
      load_stage<kBytes, Config::kHeadDimVO, kTileKv, kThreads>(tile, [&](int row, bool& valid) {
        valid = start + row < kv_end;
        return v + rows[row].v;
      });
    } else if constexpr (kBytes) {
      load_bytes<Config::kHeadDimVO, kTileKv, kThreads>(tile, [&](int row, bool& valid) {
        valid = start + row < kv_end;
        return v + (start + row) * params.v_stride_n;
      });
    } else {
      load_rows<Config::kHeadDimVO, kTileKv, kThreads>(tile, v + start * params.v_stride_n, params.v_stride_n, kv_end - start);
    }
  };

  // Prologue: groups {Q, K0}, {V0}.
  if constexpr (Config::kPaged) {
    find_pages(kv_begin);
    store_pages(kv_begin);
    find_pages(kv_begin + kTileKv);
    store_pages(kv_begin + kTileKv);
    __syncthreads();  // offsets of tiles 0 and 1: written by the first threads, read by all
  }
#pragma unroll
  for (int w = 0; w < Config::kWarps; ++w) {
    auto locate = [&](int row, bool& valid) {
      const int packed = first_row + w * kWarpRows + row;
      valid = packed < packed_rows;
      const int qo_idx = params.group.quotient(packed);
      return q + qo_idx * params.q_stride_n + (packed - qo_idx * group) * params.q_stride_h;
    };
    if constexpr (is_same_v<Q, T>)
      load_tile<Config::kHeadDimQK, kWarpRows, kThreads>(smem + w * kWarpQBytes<Config>, locate);
    else
      load_widened<T, Q, Config::kHeadDimQK, kWarpRows, kThreads>(smem + w * kWarpQBytes<Config>, locate);
  }
  if (kv_begin < kv_end) load_k(kv_begin);
  ptx::cp_async_commit();
  if (kv_begin < kv_end) load_v(kv_begin);
  ptx::cp_async_commit();

  // Key ranges of this warp's rows; packed rows past the end only widen them. own = the key at the query's own position.
  // They lie in shared memory because the loop below has no registers to spare.
  const int warp_row = first_row + warp * kWarpRows;
  {
    const int own_first = params.group.quotient(warp_row) + item.kv_len - item.qo_len;
    const int own_last = params.group.quotient(warp_row + kWarpRows - 1) + item.kv_len - item.qo_len;
    WarpRange range;
    range.seen_begin = own_first - params.window_left;
    range.seen_end = params.causal ? min(own_last + 1, kv_end) : kv_end;
    range.plain_begin = own_last - params.window_left;
    range.plain_end = params.causal ? min(own_first + 1, kv_end) : kv_end;
    if (warp_row >= packed_rows) range.seen_end = kv_begin;  // no rows, no work: short requests in tall tiles
    if (lane == 0) ranges[warp] = range;
    __syncwarp();
  }

  // ldmatrix row addresses of this lane (matrix lane / 8, row lane % 8): a few instructions a tile, or three registers.
  // Q's and V's matrices go down the rows first, K's along the row.
  auto q_address = [&](int thread) {
    return ptx::smem_address(smem + (thread >> 5) * kWarpQBytes<Config>) + LayoutQK::offset(thread & 15, thread >> 4 & 1);
  };
  auto k_address = [&](int thread, int start) {
    return ptx::smem_address(smem_k + buffer(start) * kKBytes) +
           LayoutQK::offset((thread >> 4 & 1) * 8 + (thread & 7), thread >> 3 & 1);
  };
  auto v_address = [&](int thread, int start) {
    return ptx::smem_address(smem_v + buffer(start) * kVBytes) + LayoutVO::offset(thread & 15, thread >> 4 & 1);
  };

  float o[kRowTiles][kDimTiles][4];
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) o[i][n][0] = o[i][n][1] = o[i][n][2] = o[i][n][3] = 0.f;
  SoftmaxState<kRowTiles> state;
  state.init();
  const float scale = Logits::kLinear ? params.sm_scale_log2 : 1.f;

  // Packed row of accumulator element (row tile i, half h) of this lane.
  auto row_of = [&](int thread, int i, int h) {
    return shared.item.q_tile * kTileQ + (thread >> 5) * kWarpRows + i * 16 + h * 8 + ((thread & 31) >> 2);
  };

#pragma unroll 1
  for (int start = kv_begin; start < kv_end; start += kTileKv) {
    const int next = start + kTileKv;
    ptx::cp_async_wait<1>();
    __syncthreads();  // K of this tile is there; every warp is done with K of the tile before
    if constexpr (Logits::kHasQuery) {
      if (start == kv_begin) {
        Logits::template transform_queries<Config>(params, shared.item, smem + warp * kWarpQBytes<Config>, warp_row, kv_head);
        __syncwarp();  // a warp reads its own rows of Q alone
      }
    }
    if constexpr (kBytes) {
      widen_tile<T, KV, Config::kHeadDimQK, kTileKv, kThreads>(smem_k, bytes_k);
      __syncthreads();  // K is there in 16 bits, and its bytes may be overwritten
    }
    if constexpr (Logits::kHasKey) {
      Logits::template transform_keys<Config>(params, shared.item, smem_k + buffer(start) * kKBytes, start, kv_head);
      __syncthreads();  // the whole tile is transformed
    }
    if constexpr (Config::kRope) {
      if (start == kv_begin) {
        rotate_tile<T, Config::kHeadDimQK, kWarpRows, 32>(
            smem + warp * kWarpQBytes<Config>, turns, lane,
            [&](int row) { return params.group.quotient(warp_row + row) + shared.item.kv_len - shared.item.qo_len; });
      }
      rotate_tile<T, Config::kHeadDimQK, kTileKv, kThreads>(smem_k + buffer(start) * kKBytes, turns, thread_again(),
                                                            [&](int row) { return start + row; });
      __syncthreads();  // K (and each warp's own Q) is rotated
    }
    const WarpRange range = ranges[thread_again() >> 5];
    const bool active = start < range.seen_end && next > range.seen_begin;
    const bool plain = start >= range.plain_begin && next <= range.plain_end;
    if constexpr (Config::kPaged) find_pages(next + kTileKv);

    float s[kRowTiles][kKeyTiles][4];
    if (active) {
      const int thread = thread_again();
      const uint32_t q_tile = q_address(thread), k_tile = k_address(thread, start);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint32_t a[kRowTiles][4];
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
          ptx::ldmatrix_x4(a[i], LayoutQK::advance(q_tile, 2 * step) + i * 16 * LayoutQK::kRowBytes);
#pragma unroll
        for (int n = 0; n < kKeyTiles; n += 2) {
          uint32_t b[4];
          ptx::ldmatrix_x4(b, LayoutQK::advance(k_tile, 2 * step) + n * 8 * LayoutQK::kRowBytes);
          const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            if (step == 0) {
              ptx::mma_m16n8k16_first<T>(s[i][n], a[i], b0);
              ptx::mma_m16n8k16_first<T>(s[i][n + 1], a[i], b1);
            } else {
              ptx::mma_m16n8k16<T>(s[i][n], a[i], b0);
              ptx::mma_m16n8k16<T>(s[i][n + 1], a[i], b1);
            }
          }
        }
      }
      if constexpr (!Logits::kLinear) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int packed = row_of(thread, i, h), qo_idx = params.group.quotient(packed);
            const auto row = Logits::row(params, shared.item, qo_idx, kv_head * group + packed - qo_idx * group, kv_head);
#pragma unroll
            for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
              for (int j = 0; j < 2; ++j)
                s[i][n][2 * h + j] =
                    Logits::apply(params, row, s[i][n][2 * h + j], start + n * 8 + 2 * (thread & 3) + j, n % 4 == 0);
          }
      }
    }
    // Masking costs nothing on tiles that every row sees whole: the branch is the same for the whole warp.
    if (active && (Config::kCustomMask || Logits::kHasMask || !plain)) {
      const int thread = thread_again();
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int packed = row_of(thread, i, h), qo_idx = params.group.quotient(packed);
          const int own = qo_idx + shared.item.kv_len - shared.item.qo_len;
          const int last = params.causal ? min(own, kv_end - 1) : kv_end - 1, first = own - params.window_left;
#pragma unroll
          for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              const int kv = start + n * 8 + 2 * (thread & 3) + j;
              bool seen = kv <= last && kv >= first;
              if constexpr (Config::kCustomMask) {
                if (seen && qo_idx < shared.item.qo_len) {
                  const uint64_t base = uint64_t(uint32_t(shared.item.mask_high)) << 32 | uint32_t(shared.item.mask_low);
                  const uint64_t bit = uint64_t(uint32_t(qo_idx)) * uint32_t(shared.item.kv_len) + uint32_t(kv);
                  seen = params.mask[base + (bit >> 3)] >> (bit & 7) & 1;
                }
              }
              if constexpr (Logits::kHasMask) {
                const auto row = Logits::row(params, shared.item, qo_idx, kv_head * group + packed - qo_idx * group, kv_head);
                seen = seen && Logits::mask(params, row, kv);
              }
              if (!seen) s[i][n][2 * h + j] = Logits::kUseSoftmax ? -FI_INF : 0.f;
            }
        }
    }
    if (next < kv_end) load_k(next);
    ptx::cp_async_commit();
    if constexpr (Config::kPaged) store_pages(next + kTileKv);  // over the offsets of this tile, whose loads are all issued
    if constexpr (Logits::kUseSoftmax) {
      if (active) state.raise(s, o, scale);
    }

    ptx::cp_async_wait<1>();
    __syncthreads();  // V of this tile is there; every warp is done with V of the tile before
    if constexpr (kBytes) {
      widen_tile<T, KV, Config::kHeadDimVO, kTileKv, kThreads>(smem_v, bytes_v);
      __syncthreads();  // V is there in 16 bits, and its bytes may be overwritten
    }
    if (active) {
      // The exponentials of one step of 16 keys run between the products of the step before: the tensor cores need not
      // wait for them.
      const int thread = thread_again();
      const uint32_t v_tile = v_address(thread, start);
      constexpr int kPairs = 4 * kRowTiles, kSlices = kDimTiles / 2;
      float shift[kRowTiles][2];
      if constexpr (Logits::kUseSoftmax) {
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) shift[i][0] = state.shift(i, 0, scale), shift[i][1] = state.shift(i, 1, scale);
      }
      uint32_t p[2][kRowTiles][4];
      // Pair x of a step's weights: the accumulator's layout is the A operand's.
      auto weigh = [&](int step, int x) {
        const int i = x >> 2, j = x & 3, h = j & 1;
        float(&pair)[4] = s[i][2 * step + (j >> 1)];
        if constexpr (Logits::kUseSoftmax) state.weigh(pair[2 * h], pair[2 * h + 1], i, h, scale, shift[i][h]);
        p[step & 1][i][j] = ptx::pack2<T>(pair[2 * h], pair[2 * h + 1]);
      };
#pragma unroll
      for (int x = 0; x < kPairs; ++x) weigh(0, x);
#pragma unroll
      for (int step = 0; step < kTileKv / 16; ++step) {
#pragma unroll
        for (int slice = 0; slice < kSlices; ++slice) {
          uint32_t b[4];
          ptx::ldmatrix_x4_trans(b, LayoutVO::advance(v_tile, 2 * slice) + step * 16 * LayoutVO::kRowBytes);
          const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
#pragma unroll
          for (int i = 0; i < kRowTiles; ++i) {
            ptx::mma_m16n8k16<T>(o[i][2 * slice], p[step & 1][i], b0);
            ptx::mma_m16n8k16<T>(o[i][2 * slice + 1], p[step & 1][i], b1);
          }
          if (step + 1 < kTileKv / 16) {
#pragma unroll
            for (int x = slice * kPairs / kSlices; x < (slice + 1) * kPairs / kSlices; ++x) weigh(step + 1, x);
          }
        }
      }
    }
    if (next < kv_end) load_v(next);
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<0>();
  __syncthreads();  // without a tile nothing has waited yet: Q has to land before its memory becomes the output

#pragma unroll
  for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state.d[i][h] += __shfl_xor_sync(kFullMask, state.d[i][h], 1);
      state.d[i][h] += __shfl_xor_sync(kFullMask, state.d[i][h], 2);
    }
  if constexpr (Logits::kUseSoftmax) {
    if (shared.item.num_chunks > 1 && !join_chunks<Config>(params, shared, o, state, scale)) return;
  }
  store_output<Config>(params, shared.item, shared.kv_head, smem, o, state, scale);
}

template <class Config, class Params>
FI_DEVICE void prefill(const Params& params) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  prefill_tile<Config>(params, blockIdx.x, blockIdx.y);
}

}  // namespace fi
