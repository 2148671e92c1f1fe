// Latent attention over a paged cache on mma.sync, keys' projection absorbed: softmax(sm_scale (q_nope ckv^T + q_pe kpe^T)) ckv.
// One CTA computes one work item: kTileQ = 16 * kRowWarps packed rows (query token, head) over a range of keys. All heads
// share the keys, so a tile of kTileKv latent rows, [ckv | kpe] of 576 columns, serves both products and every row.
// Grid: items, longest first. A tile whose keys are split is joined by its own CTAs (attention/mla_join.cuh).
// Shared memory: Q [kTileQ] | latent tiles [kStages][kTileKv] (fp8: their bytes, then one widened tile) | weights
// [kTileQ][kTileKv] | maxima [kColWarps][kTileQ] | MlaShared.
// kColWarps warps share 16 rows: in q k^T each has a part of the tile's keys, in p v a part of the 512 columns; maxima and
// weights go from one to the other through shared memory. So the accumulators of 512 columns fit the registers.
// Bytes moved: q and o once, a latent row once an item. Arch: any (sm_75 copies synchronously, bf16 emulated).
#pragma once
#include "attention/mla_join.cuh"
#include "attention/mla_output.cuh"
#include "attention/prefill_logits.cuh"
#include "attention/prefill_softmax.cuh"
#include "attention/prefill_tiles.cuh"
#include "ptx/barrier.cuh"
#include "ptx/cp_async_once.cuh"
#include "ptx/mma.cuh"
#include "ptx/pdl.cuh"

namespace fi {

// Config: T (what is multiplied), KV (T or fp8), O, kRowWarps, kColWarps (2 or 4), kTileKv (8 or 16 a column warp), kStages,
// kTokenScales (fp8: a factor each 128 columns of a token), kRope, Logits.
template <class Config>
struct MlaShape {
  using Layout = TileLayout<kMlaDim>;
  static constexpr int kWarps = Config::kRowWarps * Config::kColWarps, kThreads = 32 * kWarps;
  static constexpr int kTileQ = 16 * Config::kRowWarps, kTileKv = Config::kTileKv, kStages = Config::kStages;
  static constexpr bool kBytes = !is_same_v<typename Config::KV, typename Config::T>;
  static constexpr int kKeys = kTileKv / Config::kColWarps;    // of a warp, in q k^T
  static constexpr int kDims = kMlaCkv / Config::kColWarps;    // of a warp, in p v
  static constexpr int kTileBytes = kTileKv * Layout::kRowBytes, kStageBytes = kBytes ? kTileKv * kMlaDim : kTileBytes;
  static constexpr int kStage0 = kTileQ * Layout::kRowBytes, kWide = kStage0 + kStages * kStageBytes;
  static constexpr int kP = kWide + (kBytes ? kTileBytes : 0), kTops = kP + kTileQ * TileLayout<kTileKv>::kRowBytes;
  static constexpr int kShared = kTops + Config::kColWarps * kTileQ * 4;
  static_assert(kKeys == 8 || kKeys == 16);
};

// The latent rows of an item on their way to shared memory: eight threads a row, each with its own 16-byte pieces.
template <class Config, class Params>
struct MlaLoader {
  using Shape = MlaShape<Config>;
  using T = typename Config::T;
  using KV = typename Config::KV;
  static constexpr int kRows = Shape::kThreads / 8, kPasses = ceil_div(Shape::kTileKv, kRows);
  static_assert(Shape::kTileKv % kRows == 0);
  struct Pages {
    int32_t page[kPasses];
  };
  const Params& params;
  const int32_t* pages;
  int kv_end;
  ptx::AsyncCopies<Config::kRowWarps == 1> copies = {};

  FI_DEVICE static int row(int pass) { return (threadIdx.x >> 3) + pass * kRows; }

  // A request's page table is not read past its last key.
  FI_DEVICE Pages find(int start) const {
    Pages found;
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int token = start + row(i);
      found.page[i] = token < kv_end ? pages[params.page_size.quotient(token)] : 0;
    }
    return found;
  }
  // Rows at and past kv_end become zeros: what a page holds behind its last token (NaN perhaps) is never read.
  FI_DEVICE void load(uint8_t* stage, int start, const Pages& at) const {
    const int sub = threadIdx.x & 7;
    const auto to = copies.address(stage);
#pragma unroll
    for (int i = 0; i < kPasses; ++i) {
      const int token = start + row(i), entry = token - params.page_size.quotient(token) * params.page_size.divisor;
      const bool valid = token < kv_end;
      const KV* const ckv = static_cast<const KV*>(params.k) + at.page[i] * params.k_stride_page + entry * params.k_stride_n;
      const KV* const kpe = static_cast<const KV*>(params.v) + at.page[i] * params.v_stride_page + entry * params.v_stride_n;
      if constexpr (Shape::kBytes) {
        const auto own = to + row(i) * kMlaDim + sub * 16;
#pragma unroll
        for (int j = 0; j < kMlaCkv; j += 128) copies.copy_16(own + j, ckv + j + sub * 16, valid);
        if (sub < kMlaKpe / 16) copies.copy_16(own + kMlaCkv, kpe + sub * 16, valid);
      } else {
#pragma unroll
        for (int j = 0; j < kMlaCkv / 8; j += 8)
          copies.copy_16(to + Shape::Layout::offset(row(i), j + sub), ckv + (j + sub) * 8, valid);
        copies.copy_16(to + Shape::Layout::offset(row(i), kMlaCkv / 8 + sub), kpe + sub * 8, valid);
      }
    }
  }
  // Every thread widens the bytes that it copied itself.
  FI_DEVICE void widen_own(uint8_t* wide, const uint8_t* stage, int start) const {
    const int sub = threadIdx.x & 7;
#pragma unroll 1
    for (int i = 0; i < kPasses; ++i) {
      const float* scales = nullptr;
      if constexpr (Config::kTokenScales) {
        const int token = start + row(i), page = params.page_size.quotient(token);
        if (token < kv_end)
          scales = params.token_scales + (int64_t(pages[page]) * params.page_size.divisor + token - page * params.page_size.divisor) * 4;
      }
#pragma unroll
      for (int j = 0; j <= kMlaCkv; j += 128) {
        if (j == kMlaCkv && sub >= kMlaKpe / 16) break;
        const uint4 in = *reinterpret_cast<const uint4*>(stage + row(i) * kMlaDim + j + sub * 16);
        uint4 lo = widen<T, KV>(make_uint2(in.x, in.y)), hi = widen<T, KV>(make_uint2(in.z, in.w));
        if constexpr (Config::kTokenScales) {
          if (j < kMlaCkv && scales != nullptr) {
            const float factor = __ldg(scales + j / 128);
            scale_mla<T>(lo, factor), scale_mla<T>(hi, factor);
          }
        }
        const int chunk = j / 8 + sub * 2;
        *reinterpret_cast<uint4*>(wide + Shape::Layout::offset(row(i), chunk)) = lo;
        *reinterpret_cast<uint4*>(wide + Shape::Layout::offset(row(i), chunk + 1)) = hi;
      }
    }
  }
};

// Rotates the kpe columns of kRows rows of a 16-bit tile to position(row), neighbouring features against each other.
template <class Config, int kRows, class Params, class Position>
FI_DEVICE void rotate_mla(uint8_t* tile, const Params& params, const Position& position) {
  using T = typename Config::T;
#pragma unroll 1
  for (int i = threadIdx.x; i < kRows * (kMlaKpe / 4); i += MlaShape<Config>::kThreads) {
    const int row = i / (kMlaKpe / 4), unit = i % (kMlaKpe / 4), at = position(row);
    auto& v = *reinterpret_cast<Vec<T, 4>*>(tile + TileLayout<kMlaDim>::offset(row, kMlaCkv / 8 + unit / 2) + unit % 2 * 8);
    // A rotation by -p is the one by p with the two exchanged.
    const int lo = at < 0 ? 1 : 0;
    float x[2] = {to_float(v[lo]), to_float(v[lo + 2])}, y[2] = {to_float(v[1 - lo]), to_float(v[3 - lo])};
    rotate(x, y, params.turns + unit * 2, at < 0 ? -at : at);
    v[lo] = from_float<T>(x[0]), v[lo + 2] = from_float<T>(x[1]);
    v[1 - lo] = from_float<T>(y[0]), v[3 - lo] = from_float<T>(y[1]);
  }
}

// q k^T of a warp: 16 rows by kKeys keys. Several accumulators, so that products do not wait for each other.
template <class Config>
FI_DEVICE void mla_logits(float (&s)[MlaShape<Config>::kKeys / 8][4], uint32_t q, uint32_t k, float pe_ratio) {
  using Shape = MlaShape<Config>;
  using Layout = typename Shape::Layout;
  using T = typename Config::T;
  constexpr int kTiles = Shape::kKeys / 8, kChains = 4 / kTiles;
  float part[kChains][kTiles][4] = {};
  auto multiply = [&](int step) {
    uint32_t a[4], b[4];
    ptx::ldmatrix_x4(a, Layout::advance(q, 2 * step));
    if constexpr (kTiles == 2) {
      ptx::ldmatrix_x4(b, Layout::advance(k, 2 * step));
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
      ptx::mma_m16n8k16<T>(part[step % kChains][0], a, b0);
      ptx::mma_m16n8k16<T>(part[step % kChains][1], a, b1);
    } else {  // two steps at a time
      ptx::ldmatrix_x4(b, Layout::advance(k, 2 * step));
      const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
      ptx::mma_m16n8k16<T>(part[step % kChains][0], a, b0);
      ptx::ldmatrix_x4(a, Layout::advance(q, 2 * step + 2));
      ptx::mma_m16n8k16<T>(part[(step + 1) % kChains][0], a, b1);
    }
  };
  constexpr int kStep = kTiles == 2 ? 1 : 2;
#pragma unroll
  for (int step = kMlaCkv / 16; step < kMlaDim / 16; step += kStep) multiply(step);
  if constexpr (Shape::kBytes) {
#pragma unroll
    for (int i = 0; i < kChains * kTiles * 4; ++i) part[i / (kTiles * 4)][i / 4 % kTiles][i % 4] *= pe_ratio;
  }
#pragma unroll
  for (int step = 0; step < kMlaCkv / 16; step += kStep) multiply(step);
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      s[n][j] = part[0][n][j];
#pragma unroll
      for (int c = 1; c < kChains; ++c) s[n][j] += part[c][n][j];
    }
}

template <class Config, class Params>
FI_DEVICE void mla(const Params& params) {
  using Shape = MlaShape<Config>;
  using Layout = typename Shape::Layout;
  using LayoutP = TileLayout<Shape::kTileKv>;
  using T = typename Config::T;
  using Logits = typename Config::Logits;
  using Loader = MlaLoader<Config, Params>;
  constexpr int kTileKv = Shape::kTileKv, kTileQ = Shape::kTileQ, kStages = Shape::kStages, kAhead = max_of(kStages - 1, 1);
  constexpr int kColWarps = Config::kColWarps, kKeyTiles = Shape::kKeys / 8, kDimTiles = Shape::kDims / 8;
  static_assert(!Logits::kHasQuery && !Logits::kHasKey && !Logits::kHasOutput && Logits::kUseSoftmax);
  extern __shared__ __align__(1024) uint8_t smem[];
  MlaShared& shared = *reinterpret_cast<MlaShared*>(smem + Shape::kShared);
  float* const tops = reinterpret_cast<float*>(smem + Shape::kTops);

  ptx::grid_launch_dependents();
  const PrefillItem item = params.items[blockIdx.x];
  if (!params.table_ready || item.qo_len == 0) ptx::grid_wait();
  if (item.qo_len == 0) return;
  if (threadIdx.x == 0) shared.item = item;
  const int lane = lane_id(), row_warp = warp_id() / kColWarps, column = warp_id() % kColWarps;
  const int heads = params.group.divisor, packed_rows = item.qo_len * heads, first_row = item.q_tile * kTileQ;
  const int tiles = ceil_div(item.kv_end - item.kv_begin, kTileKv);
  const Loader loader{params, params.kv_indices + item.kv_base, item.kv_end};
  auto stage = [&](int i) { return smem + Shape::kStage0 + i % kStages * Shape::kStageBytes; };
  auto start_of = [&](int i) { return item.kv_begin + i * kTileKv; };
  // The kColWarps warps of 16 rows.
  auto row_sync = [&] { ptx::barrier_sync(1 + row_warp, 32 * kColWarps); };

  // Prologue: groups {Q, tile 0}, {tile 1} ...; all pages are asked for before the first is needed.
  typename Loader::Pages ahead[kAhead], next;
#pragma unroll
  for (int i = 0; i < kAhead; ++i) ahead[i] = loader.find(start_of(i));
  if constexpr (kStages > 1) next = loader.find(start_of(kAhead));
  ptx::grid_wait();
#pragma unroll 1
  for (int r = threadIdx.x >> 3; r < kTileQ; r += Shape::kThreads / 8) {
    const int packed = first_row + r, qo_idx = params.group.quotient(packed), head = packed - qo_idx * heads, sub = threadIdx.x & 7;
    const bool valid = packed < packed_rows;
    const T* nope = static_cast<const T*>(params.q) + (item.q_row + qo_idx) * params.q_stride_n + head * params.q_stride_h;
    const T* pe = static_cast<const T*>(params.q_pe) + (item.q_row + qo_idx) * params.q_pe_stride_n + head * params.q_pe_stride_h;
#pragma unroll
    for (int j = 0; j < kMlaCkv / 8; j += 8) ptx::cp_async_16(smem + Layout::offset(r, j + sub), nope + (j + sub) * 8, valid);
    ptx::cp_async_16(smem + Layout::offset(r, kMlaCkv / 8 + sub), pe + sub * 8, valid);
  }
  if constexpr (kStages > 1) {
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < tiles) loader.load(stage(i), start_of(i), ahead[i]);
      ptx::cp_async_commit();
    }
  }

  float o[1][kDimTiles][4];
#pragma unroll
  for (int n = 0; n < kDimTiles; ++n) o[0][n][0] = o[0][n][1] = o[0][n][2] = o[0][n][3] = 0.f;
  MlaTotal state{{{-FI_INF, -FI_INF}}, {{0.f, 0.f}}};
  const float scale = Logits::kLinear ? params.sm_scale_log2 : 1.f;
  const uint32_t q_tile = ptx::smem_address(smem + row_warp * 16 * Layout::kRowBytes) + Layout::offset(lane & 15, lane >> 4 & 1);

#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    const int start = start_of(i);
    if constexpr (kStages > 1) {
      ptx::cp_async_wait<max_of(kStages - 2, 0)>();
    } else {
      __syncthreads();  // every warp is done with the only stage
      if (i > 0) ahead[0] = loader.find(start);
      loader.load(stage(i), start, ahead[0]);
      ptx::cp_async_commit();
      ptx::cp_async_wait<0>();
    }
    __syncthreads();  // tile i is there (and Q); every warp is done with tile i - 1
    if constexpr (kStages > 1) {
      if (i + kAhead < tiles) loader.load(stage(i + kAhead), start_of(i + kAhead), next);
      ptx::cp_async_commit();
      next = loader.find(start_of(i + kAhead + 1));
    }
    uint8_t* const tile = Shape::kBytes ? smem + Shape::kWide : stage(i);
    if constexpr (Shape::kBytes) loader.widen_own(tile, stage(i), start);
    if constexpr (Config::kRope) {
      if (Shape::kBytes) __syncthreads();  // the tile is widened
      if (i == 0)
        rotate_mla<Config, kTileQ>(smem, params,
                                   [&](int r) { return int(params.group.quotient(first_row + r)) + item.kv_len - item.qo_len; });
      rotate_mla<Config, kTileKv>(tile, params, [&](int r) { return start + r; });
    }
    if constexpr (Shape::kBytes || Config::kRope) __syncthreads();  // the tile is as it will be multiplied

    float s[kKeyTiles][4];
    const int key_row = kKeyTiles == 2 ? (lane >> 4 & 1) * 8 + (lane & 7) : lane & 7, key_chunk = kKeyTiles == 2 ? lane >> 3 & 1 : lane >> 3;
    mla_logits<Config>(s, q_tile, ptx::smem_address(tile) + Layout::offset(column * Shape::kKeys + key_row, key_chunk), params.pe_ratio);

    const int first_key = start + column * Shape::kKeys + 2 * (lane & 3);
    float top[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int packed = first_row + row_warp * 16 + h * 8 + (lane >> 2), qo_idx = params.group.quotient(packed);
      const int own = qo_idx + item.kv_len - item.qo_len;
      const int last_seen = params.causal ? min(own, item.kv_end - 1) : item.kv_end - 1, first_seen = own - params.window_left;
      const auto row = Logits::row(params, item, qo_idx, packed - qo_idx * heads, 0);
      top[h] = -FI_INF;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int key = first_key + n * 8 + j;
          float& x = s[n][2 * h + j];
          if constexpr (!Logits::kLinear) x = Logits::apply(params, row, x, key, true);
          bool seen = key <= last_seen && key >= first_seen;
          if constexpr (Logits::kHasMask) seen = seen && Logits::mask(params, row, key);
          if (!seen) x = -FI_INF;
          top[h] = fmaxf(top[h], x);
        }
      top[h] = fmaxf(top[h], __shfl_xor_sync(kFullMask, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(kFullMask, top[h], 2));
      if ((lane & 3) == 0) tops[column * kTileQ + row_warp * 16 + h * 8 + (lane >> 2)] = top[h];
    }
    row_sync();  // maxima: written by each warp of the row, read by all

    float before[2];
    bool rescale = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int c = 0; c < kColWarps; ++c) top[h] = fmaxf(top[h], tops[c * kTileQ + row_warp * 16 + h * 8 + (lane >> 2)]);
      before[h] = state.m[0][h];
      // -inf - -inf is NaN and compares false: a row that has seen nothing stays as it is.
      const bool up = (top[h] - before[h]) * scale > kRescaleThreshold;
      state.m[0][h] = up ? top[h] : before[h];
      rescale = rescale || up;
    }
    if (__any_sync(kFullMask, rescale)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float ratio = before[h] == state.m[0][h] ? 1.f : math::ptx_exp2((before[h] - state.m[0][h]) * scale);
        state.d[0][h] *= ratio;
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n) o[0][n][2 * h] *= ratio, o[0][n][2 * h + 1] *= ratio;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float shift = state.m[0][h] == -FI_INF ? 0.f : -state.m[0][h] * scale;
      uint8_t* const p = smem + Shape::kP + (lane & 3) * 4;
#pragma unroll
      for (int n = 0; n < kKeyTiles; ++n) {
        const float a = math::ptx_exp2(fmaf(s[n][2 * h], scale, shift)), b = math::ptx_exp2(fmaf(s[n][2 * h + 1], scale, shift));
        state.d[0][h] += a + b;
        *reinterpret_cast<uint32_t*>(p + LayoutP::offset(row_warp * 16 + h * 8 + (lane >> 2), column * kKeyTiles + n)) =
            ptx::pack2<T>(a, b);
      }
    }
    row_sync();  // weights: written by each warp of the row, read by all

    const uint32_t p_tile = ptx::smem_address(smem + Shape::kP) + LayoutP::offset(row_warp * 16 + (lane & 15), lane >> 4 & 1);
    const uint32_t v_tile = ptx::smem_address(tile) + Layout::offset(lane & 15, lane >> 4 & 1);
#pragma unroll
    for (int step = 0; step < kTileKv / 16; ++step) {
      uint32_t a[4];
      ptx::ldmatrix_x4(a, LayoutP::advance(p_tile, 2 * step));
#pragma unroll
      for (int n = 0; n < kDimTiles; n += 2) {
        uint32_t b[4];
        ptx::ldmatrix_x4_trans(b, Layout::advance(v_tile + column * (kDimTiles * 16), n) + step * 16 * Layout::kRowBytes);
        const uint32_t b0[2] = {b[0], b[1]}, b1[2] = {b[2], b[3]};
        ptx::mma_m16n8k16<T>(o[0][n], a, b0);
        ptx::mma_m16n8k16<T>(o[0][n + 1], a, b1);
      }
    }
  }
  ptx::cp_async_wait<0>();

  // Denominators: of the quad's keys, then of the row's warps.
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float& d = state.d[0][h];
    d += __shfl_xor_sync(kFullMask, d, 1);
    d += __shfl_xor_sync(kFullMask, d, 2);
    if ((lane & 3) == 0) tops[column * kTileQ + row_warp * 16 + h * 8 + (lane >> 2)] = d;
  }
  __syncthreads();  // denominators (and the item, where there was no tile)
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    state.d[0][h] = 0.f;
#pragma unroll
    for (int c = 0; c < kColWarps; ++c) state.d[0][h] += tops[c * kTileQ + row_warp * 16 + h * 8 + (lane >> 2)];
  }
  if (item.num_chunks > 1) {
    MlaJoin<Config, kTileQ, Shape::kThreads, kDimTiles>::run(
        params, shared, reinterpret_cast<float*>(smem), reinterpret_cast<float(&)[kDimTiles * 4]>(o), state, scale,
        row_warp * 16 + (lane >> 2), column * Shape::kDims + 2 * (lane & 3), column == 0 && (lane & 3) == 0,
        [] { __syncthreads(); });
    return;
  }
  store_mla<Config>(params, shared.item, reinterpret_cast<float(&)[kDimTiles * 4]>(o), state, scale, 0.f,
                    shared.item.q_tile * kTileQ + row_warp * 16, column * Shape::kDims, column == 0);
}

}  // namespace fi
