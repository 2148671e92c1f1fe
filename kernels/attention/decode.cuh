// Decode attention: one query token a request over a paged (or contiguous) KV cache, split along the keys.
// A CTA computes one work item: keys [kv_begin, kv_end) of one request for one block of up to 8 * kTilesN query heads that
// share a kv head. Grid: items * num_head_blocks, head block fastest; the items (longest first) are made by the host plan.
// Each warp walks tiles of 16 keys (warp, warp + kWarps, ..) through its own ring of kStages cp.async slots, so there is no
// CTA barrier before the merge. S^T = K Q^T and O^T = V^T P^T by mma m16n8k16: keys (then dims) in M, heads in N.
// The item that arrives last of a request's head block merges the partials of all of them (counter in global memory).
// Shared memory: [kWarps][kStages][K tile, V tile], rows padded to an odd number of 16-byte chunks (ldmatrix then has no
// bank conflicts for any head dim); the same bytes hold O of each warp in the merge; then m and d of each warp.
// Bytes moved: K and V once, plus 8 * (head_dim + 2) a head and chunk when split. Architecture: any (sm_75 loads plainly).
#pragma once
#include "attention/logits.cuh"
#include "common/vec.cuh"
#include "ptx/atomics.cuh"
#include "ptx/cp_async.cuh"
#include "ptx/mma.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct DecodeItem {
  int32_t request;     // row of q, out and lse; -1: nothing to do
  int32_t kv_begin;    // first key of this chunk
  int32_t kv_end;      // one past its last key
  int32_t page_begin;  // where the request's pages start in `indices`
  int32_t slot;        // partial slot of the request's first chunk
  int32_t num_chunks;  // 1: no partials
  int32_t chunk;       // this chunk's number
  int32_t kv_len;      // keys of the whole request
};

struct DecodeParams {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  float* lse;               // [rows, num_qo_heads] base 2, or null
  const DecodeItem* items;  // null: one request, chunks of chunk_keys keys
  const int32_t* indices;   // page numbers; null: contiguous keys, one page a request
  const float* sinks;       // [num_qo_heads] raw logits, or null
  float* partial_out;       // [slots][num_head_blocks][heads_per_block][head_dim]
  float2* partial_md;       // [slots][num_head_blocks][heads_per_block]: max and denominator, base 2
  uint32_t* counters;       // [slots][num_head_blocks]: zero between launches
  int64_t q_stride_row, q_stride_head;
  int64_t out_stride_row, out_stride_head;
  int64_t k_stride_page, k_stride_token, k_stride_head;  // elements
  int64_t v_stride_page, v_stride_token, v_stride_head;
  uint32_t page_size;
  uint32_t num_head_blocks;  // num_kv_heads * blocks_per_kv
  uint32_t blocks_per_kv;
  uint32_t heads_per_block;
  uint32_t group_size;       // query heads of one kv head
  uint32_t table_ready;      // 1: `indices` was complete before the kernel in front of this one started
  int32_t kv_len;            // the single request without items: its keys,
  int32_t first_key;         // the first that its window reads,
  int32_t chunk_keys;        // keys of a chunk (a multiple of 16)
  int32_t num_chunks;
  float logit_scale;         // see logits.cuh
  float logit_cap;
  float slope_scale;         // ALiBi slopes times this: log2(e), or 1 / cap
  float out_scale;           // v_scale
};

// With rotary embedding inside (ROPE_LLAMA): the frequency of pair i, dims i and i + head_dim / 2, in 2^-64 turns a position.
struct DecodeRopeParams {
  DecodeParams base;
  alignas(64) uint64_t turns[128];
};

template <class Config>
struct DecodeTraits {
  using T = typename Config::T;
  using KV = typename Config::KV;
  static constexpr bool kFp8 = sizeof(KV) == 1;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kDim = round_up(kHeadDim, kFp8 ? 32 : 16);  // computed; the rest is zero
  static constexpr int kTilesN = Config::kTilesN, kWarps = Config::kWarps, kStages = Config::kStages;
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kHeads = 8 * kTilesN;
  static constexpr int kSteps = kDim / 16;                          // mma steps along the dims
  static constexpr int kTile = 16;                                  // keys
  static constexpr int kChunks = kDim * int(sizeof(KV)) / 16;       // 16-byte chunks of a row, padded
  static constexpr int kChunksRead = kHeadDim * int(sizeof(KV)) / 16;
  static constexpr int kPitch = (kChunks | 1) * 16;                 // bytes
  static constexpr int kTileBytes = kTile * kPitch;
  static constexpr int kRingBytes = kWarps * kStages * 2 * kTileBytes;
  static constexpr int kMergePitch = kDim + 4;                      // floats; 16 n + 4 keeps the merge's writes conflict-free
  static constexpr int kMergeBytes = kWarps * kHeads * kMergePitch * 4;
  static constexpr int kStateOffset = max_of(kRingBytes, kMergeBytes);
  static constexpr int kTurnsOffset = kStateOffset + 2 * kWarps * kHeads * 4 + 16;
  static constexpr int kSmemBytes = kTurnsOffset + (Config::kRope ? kDim / 2 * 8 : 0);
  static_assert(kHeadDim % 8 == 0 && kHeadDim * int(sizeof(KV)) % 16 == 0, "rows must be whole 16-byte chunks");
  static_assert(!Config::kRope || kHeadDim % (kFp8 ? 64 : 32) == 0, "both dims of a pair in the same lane and register");
  static_assert(kSmemBytes == Config::kSmemBytes, "the host computes the same size");
  static_assert(kThreads * 24 <= kStateOffset, "the last merge's exchange");
};

namespace decode_detail {

template <bool b, typename A, typename B>
struct select_type {
  using type = A;
};
template <typename A, typename B>
struct select_type<false, A, B> {
  using type = B;
};

// Two fp8 values (low byte first) as a pair of halves; exact.
template <typename KV>
FI_DEVICE uint32_t halves_of(uint32_t pair) {
  const __half2_raw h = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair),
                                                   is_same_v<KV, __nv_fp8_e4m3> ? __NV_E4M3 : __NV_E5M2);
  return uint32_t(h.x) | (uint32_t(h.y) << 16);
}

// 16-bit keys: A fragment = rows of 16 keys, 16 dims at a time.
// fp8: ldmatrix hands a lane 4 neighbouring dims, so a step's k index 2t, 2t+1, 2t+8, 2t+9 means dims 4t..4t+3; q agrees.
template <class Tr>
struct Fragments {
  using KV = typename Tr::KV;
  static constexpr int kQueryStride = Tr::kFp8 ? 4 : 2;  // dims between neighbouring lanes' first q element
  static constexpr int kQuerySecond = Tr::kFp8 ? 2 : 8;  // dims from the first to the second register

  // a[0] and, for fp8 which loads two steps at once, a[1].
  FI_DEVICE static void keys(uint32_t (&a)[2][4], const uint8_t* lane_row, int step) {
    if constexpr (!Tr::kFp8) {
      ptx::ldmatrix_x4(a[0], lane_row + step * 32);
    } else {
      uint32_t r[4];
      ptx::ldmatrix_x4(r, lane_row + step * 16);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        a[s][0] = halves_of<KV>(r[2 * s] & 0xffffu);
        a[s][1] = halves_of<KV>(r[2 * s + 1] & 0xffffu);
        a[s][2] = halves_of<KV>(r[2 * s] >> 16);
        a[s][3] = halves_of<KV>(r[2 * s + 1] >> 16);
      }
    }
  }
  // fp8: a transposed ldmatrix moves pairs of dims, so row g of the product is dim 2g and row g + 8 is dim 2g + 1.
  FI_DEVICE static void values(uint32_t (&a)[2][4], const uint8_t* lane_row, int step) {
    if constexpr (!Tr::kFp8) {
      ptx::ldmatrix_x4_trans(a[0], lane_row + step * 32);
    } else {
      uint32_t r[4];
      ptx::ldmatrix_x4_trans(r, lane_row + step * 16);
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint32_t lo = __byte_perm(r[s], 0, 0x3120), hi = __byte_perm(r[s + 2], 0, 0x3120);
        a[s][0] = halves_of<KV>(lo & 0xffffu);
        a[s][1] = halves_of<KV>(lo >> 16);
        a[s][2] = halves_of<KV>(hi & 0xffffu);
        a[s][3] = halves_of<KV>(hi >> 16);
      }
    }
  }
  FI_DEVICE static int out_dim(int step, int g, int half) { return step * 16 + (Tr::kFp8 ? 2 * g + half : g + 8 * half); }
};

// Two elements of a query row as a register of M pairs.
template <typename T, typename M>
FI_DEVICE uint32_t query_pair(const T* p) {
  if constexpr (is_same_v<T, M>) {
    return *reinterpret_cast<const uint32_t*>(p);
  } else {
    const auto v = Vec<T, 2>::load(p);
    return ptx::pack2<M>(to_float(v[0]), to_float(v[1]));
  }
}

// Rotates (lo, hi), two neighbouring pairs of features, to `position`.
FI_DEVICE void rotate(float (&lo)[2], float (&hi)[2], const uint64_t* turns, uint32_t position) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint64_t turn = turns[i];
    // The angle's fraction of a turn in 32 bits; as a signed number it is in (-1/2, 1/2) turns.
    const uint32_t fraction = position * uint32_t(turn >> 32) + __umulhi(position, uint32_t(turn));
    const float angle = float(int32_t(fraction)) * (3.14159265358979f * 0x1p-31f);
    const float c = math::ptx_cos(angle), s = math::ptx_sin(angle);
    const float x = lo[i], y = hi[i];
    lo[i] = x * c - y * s;
    hi[i] = y * c + x * s;
  }
}
template <typename M>
FI_DEVICE void rotate(uint32_t& lo, uint32_t& hi, const uint64_t* turns, uint32_t position) {
  float x[2], y[2];
  reinterpret_cast<const Vec<M, 2>&>(lo).to_floats(x);
  reinterpret_cast<const Vec<M, 2>&>(hi).to_floats(y);
  rotate(x, y, turns, position);
  lo = ptx::pack2<M>(x[0], x[1]);
  hi = ptx::pack2<M>(y[0], y[1]);
}

// exp2 of a difference to a maximum that may be -inf (nothing seen yet).
FI_DEVICE float finite_or_zero(float m) { return m == -FI_INF ? 0.f : m; }

// Where a tile's rows lie, and the cp.async of one tile. Everything about addresses of the cache is here.
template <class Config, class Tr>
struct TileSource {
  using KV = typename Tr::KV;
  const KV *k, *v;  // at this kv head
  const DecodeParams& params;
  const DecodeItem& item;
  int origin;  // key of row 0 of tile 0

  FI_DEVICE TileSource(const DecodeParams& p, const DecodeItem& i, uint32_t kv_head)
      : k(static_cast<const KV*>(p.k) + kv_head * p.k_stride_head),
        v(static_cast<const KV*>(p.v) + kv_head * p.v_stride_head),
        params(p),
        item(i),
        // With whole tiles inside pages the tiles start at multiples of 16 keys.
        origin(Config::kTileInPage ? i.kv_begin & ~(Tr::kTile - 1) : i.kv_begin) {}

  FI_DEVICE int num_tiles() const { return (item.kv_end - origin + Tr::kTile - 1) / Tr::kTile; }

  // The key whose page this lane looks up.
  FI_DEVICE int lookup_key(int tile) const {
    const int first = origin + tile * Tr::kTile;
    return Config::kTileInPage ? first : min(first + (lane_id() & 15), item.kv_end - 1);
  }
  // Page number for this lane's row (kTileInPage: of the whole tile). Contiguous keys are page 0.
  FI_DEVICE int page_of(int tile, int tiles) const {
    if (params.indices == nullptr || tile >= tiles) return 0;
    return params.indices[item.page_begin + uint32_t(lookup_key(tile)) / params.page_size];
  }

  FI_DEVICE void issue(uint8_t* slot, int tile, int page) const {
    constexpr int kLoads = ceil_div(Tr::kTile * Tr::kChunks, 32);
    constexpr int kElements = 16 / int(sizeof(KV));
    const int first = origin + tile * Tr::kTile;
    const int64_t in_page = uint32_t(lookup_key(tile)) % params.page_size;
    const int64_t k_lane = page * params.k_stride_page + in_page * params.k_stride_token;
    const int64_t v_lane = page * params.v_stride_page + in_page * params.v_stride_token;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = lane_id() + 32 * i;
      const int row = index / Tr::kChunks, chunk = index % Tr::kChunks;
      int64_t k_offset, v_offset;
      if constexpr (Config::kTileInPage) {
        k_offset = k_lane + row * params.k_stride_token;
        v_offset = v_lane + row * params.v_stride_token;
      } else {  // the lane that looked the row up has its offset
        k_offset = __shfl_sync(kFullMask, k_lane, row & 15);
        v_offset = __shfl_sync(kFullMask, v_lane, row & 15);
      }
      if (Tr::kTile * Tr::kChunks % 32 != 0 && row >= Tr::kTile) continue;
      const bool inside = first + row >= item.kv_begin && first + row < item.kv_end;
      const bool valid = inside && (Tr::kChunks == Tr::kChunksRead || chunk < Tr::kChunksRead);
      // Rows outside become zeros: 0 * NaN from a stale page would be NaN.
      ptx::cp_async_16(slot + row * Tr::kPitch + chunk * 16, k + k_offset + chunk * kElements, valid);
      ptx::cp_async_16(slot + Tr::kTileBytes + row * Tr::kPitch + chunk * 16, v + v_offset + chunk * kElements, valid);
    }
  }
};

FI_DEVICE DecodeItem load_item(const DecodeParams& params, int index) {
  if (params.items) {
    const int4* words = reinterpret_cast<const int4*>(params.items + index);
    const int4 a = __ldg(words), b = __ldg(words + 1);
    return {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
  }
  const int start = (params.first_key & -16) + index * params.chunk_keys;
  return {0, max(start, params.first_key), min(start + params.chunk_keys, params.kv_len), 0, 0, params.num_chunks, index,
          params.kv_len};
}

// Running softmax over a set of keys for one head and four dims.
struct Partial {
  float m = -FI_INF, d = 0.f;
  float4 o = make_float4(0.f, 0.f, 0.f, 0.f);

  FI_DEVICE void scale(float f) {
    d *= f;
    o.x *= f, o.y *= f, o.z *= f, o.w *= f;
  }
  FI_DEVICE void add(float f, float other_d, const float4& other) {
    d = fmaf(f, other_d, d);
    o.x = fmaf(f, other.x, o.x), o.y = fmaf(f, other.y, o.y);
    o.z = fmaf(f, other.z, o.z), o.w = fmaf(f, other.w, o.w);
  }
};

// Writes four dims of one head's result, and its lse.
template <class Config>
FI_DEVICE void finish(const DecodeParams& params, int row, uint32_t head, int dim, Partial p) {
  using O = typename Config::O;
  if (params.sinks) {  // exp(sink) joins the denominator once, here
    const float sink = params.sinks[head] * math::log2e;
    const float m = fmaxf(p.m, sink), safe = finite_or_zero(m);
    p.scale(math::ptx_exp2(p.m - safe));
    p.d += math::ptx_exp2(sink - safe);
    p.m = m;
  }
  const float f = p.d > 0.f ? params.out_scale / p.d : 0.f;
  const float values[4] = {p.o.x * f, p.o.y * f, p.o.z * f, p.o.w * f};
  O* out = static_cast<O*>(params.out) + row * params.out_stride_row + head * params.out_stride_head + dim;
  Vec<O, 4>::from_floats(values).store(out);
  if (dim == 0 && params.lse) {
    const uint32_t num_qo_heads = params.num_head_blocks / params.blocks_per_kv * params.group_size;
    params.lse[int64_t(row) * num_qo_heads + head] = p.d > 0.f ? p.m + math::ptx_log2(p.d) : -FI_INF;
  }
}

}  // namespace decode_detail

// Config: T (q), KV, O, kHeadDim, kTilesN, kWarps, kStages, kSmemBytes, kTileInPage (a tile of 16 keys never crosses a
// page), kSoftCap, kAlibi, kRope
template <class Config>
FI_DEVICE void decode_item(const DecodeParams& params, const uint64_t* rope_turns) {
  using namespace decode_detail;
  using Tr = DecodeTraits<Config>;
  using T = typename Config::T;
  using M = typename select_type<Tr::kFp8, __half, T>::type;  // what the mma multiplies
  static_assert(Tr::kFp8 || is_same_v<T, typename Tr::KV>, "q and a 16-bit cache have one type");
  using Frag = Fragments<Tr>;
  constexpr int kTilesN = Tr::kTilesN, kSteps = Tr::kSteps, kWarps = Tr::kWarps, kStages = Tr::kStages;
  constexpr int kLoadSteps = Tr::kFp8 ? 2 : 1;
  extern __shared__ __align__(1024) uint8_t smem[];

  ptx::grid_launch_dependents();
  const uint32_t head_block = blockIdx.x % params.num_head_blocks;
  const DecodeItem item = load_item(params, blockIdx.x / params.num_head_blocks);
  if (item.request < 0) {  // padding of a fixed grid
    ptx::grid_wait();
    return;
  }
  const uint32_t kv_head = head_block / params.blocks_per_kv;
  const uint32_t first_in_group = head_block % params.blocks_per_kv * params.heads_per_block;
  const int heads = min(params.heads_per_block, params.group_size - first_in_group);
  const uint32_t first_head = kv_head * params.group_size + first_in_group;
  const int warp = warp_id(), lane = lane_id(), g = lane >> 2, t = lane & 3;

  uint64_t* turns = reinterpret_cast<uint64_t*>(smem + Tr::kTurnsOffset);
  if constexpr (Config::kRope) {
    // Lanes read different entries at a time: from shared memory, which constant memory would do one by one.
    for (int i = threadIdx.x; i < Tr::kDim / 2; i += Tr::kThreads) turns[i] = rope_turns[i];
    __syncthreads();
  }
  const TileSource<Config, Tr> source(params, item, kv_head);
  const int tiles = source.num_tiles();
  uint8_t* ring = smem + warp * (kStages * 2 * Tr::kTileBytes);

  // Page numbers run ahead of the tiles: those of the first kStages tiles now, then always one more.
  if (!params.table_ready) ptx::grid_wait();
  int pages[kStages];
#pragma unroll
  for (int s = 0; s < kStages; ++s) pages[s] = source.page_of(warp + s * kWarps, tiles);
  int next_page = source.page_of(warp + kStages * kWarps, tiles);
  if (params.table_ready) ptx::grid_wait();  // K, V and q may come from the kernel in front: not before this

#pragma unroll
  for (int s = 0; s < kStages; ++s) {
    const int tile = warp + s * kWarps;
    if (tile < tiles) source.issue(ring + s * 2 * Tr::kTileBytes, tile, pages[s]);
    ptx::cp_async_commit();
  }

  uint32_t q[kTilesN][kSteps][2];
  float slope[kTilesN][2];
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    const int head = 8 * n + g;
    const T* row = static_cast<const T*>(params.q) + item.request * params.q_stride_row +
                   (first_head + head) * params.q_stride_head;
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int dim = step * 16 + Frag::kQueryStride * t + Frag::kQuerySecond * r;
        const bool there = head < heads && dim < Tr::kHeadDim;
        if constexpr (!Config::kRope) {
          q[n][step][r] = there ? query_pair<T, M>(row + dim) : 0u;
        } else if (step < kSteps / 2) {  // in fp32, rounded once
          float lo[2] = {0.f, 0.f}, hi[2] = {0.f, 0.f};
          if (there) {
            Vec<T, 2>::load(row + dim).to_floats(lo);
            Vec<T, 2>::load(row + dim + Tr::kDim / 2).to_floats(hi);
            rotate(lo, hi, turns + dim, item.kv_len - 1);
          }
          q[n][step][r] = ptx::pack2<M>(lo[0], lo[1]);
          q[n][step + kSteps / 2][r] = ptx::pack2<M>(hi[0], hi[1]);
        }
      }
#pragma unroll
    for (int c = 0; c < 2; ++c)
      slope[n][c] = Config::kAlibi ? params.slope_scale * alibi_slope(first_head + 8 * n + 2 * t + c,
                                                                      params.num_head_blocks / params.blocks_per_kv *
                                                                          params.group_size)
                                   : 0.f;
  }
  const StandardLogits<Config::kSoftCap, Config::kAlibi> logit{params.logit_scale, params.logit_cap};

  // This lane's columns of S^T and O^T are heads 8n + 2t and 8n + 2t + 1.
  float o[kTilesN][kSteps][4], m[kTilesN][2], d[kTilesN][2];
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    m[n][0] = m[n][1] = -FI_INF;
    d[n][0] = d[n][1] = 0.f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) o[n][step][0] = o[n][step][1] = o[n][step][2] = o[n][step][3] = 0.f;
  }
  const int k_lane = (lane & 15) * Tr::kPitch + (lane >> 4) * 16;
  const int v_lane = Tr::kTileBytes + ((lane & 7) + (lane >> 4 << 3)) * Tr::kPitch + (lane >> 3 & 1) * 16;

  int slot = 0;
  for (int tile = warp; tile < tiles; tile += kWarps) {
    uint8_t* buffer = ring + slot * 2 * Tr::kTileBytes;
    ptx::cp_async_wait<kStages - 1>();
    __syncwarp();

    // S^T = K Q^T, two accumulators a column tile to halve the chain.
    const int first = source.origin + tile * Tr::kTile;
    float s[kTilesN][2][4] = {};
    if constexpr (!Config::kRope) {
#pragma unroll
      for (int step = 0; step < kSteps; step += kLoadSteps) {
        uint32_t a[2][4];
        Frag::keys(a, buffer + k_lane, step);
#pragma unroll
        for (int part = 0; part < kLoadSteps; ++part)
#pragma unroll
          for (int n = 0; n < kTilesN; ++n) ptx::mma_m16n8k16<M>(s[n][(step + part) & 1], a[part], q[n][step + part]);
      }
    } else {
      constexpr int kHalf = kSteps / 2;  // the other dim of a pair lies this many steps on, in the same register
#pragma unroll
      for (int step = 0; step < kHalf; step += kLoadSteps) {
        uint32_t lo[2][4], hi[2][4];
        Frag::keys(lo, buffer + k_lane, step);
        Frag::keys(hi, buffer + k_lane, step + kHalf);
#pragma unroll
        for (int part = 0; part < kLoadSteps; ++part) {
#pragma unroll
          for (int r = 0; r < 4; ++r)
            rotate<M>(lo[part][r], hi[part][r],
                      turns + (step + part) * 16 + Frag::kQueryStride * t + Frag::kQuerySecond * (r >> 1),
                      first + g + 8 * (r & 1));
#pragma unroll
          for (int n = 0; n < kTilesN; ++n) {
            ptx::mma_m16n8k16<M>(s[n][0], lo[part], q[n][step + part]);
            ptx::mma_m16n8k16<M>(s[n][1], hi[part], q[n][step + part + kHalf]);
          }
        }
      }
    }

    const bool whole = first >= item.kv_begin && first + Tr::kTile <= item.kv_end;
    uint32_t p[kTilesN][2];
    bool grew = false;
    float tile_max[kTilesN][2];
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // i = 2 * (row half) + column
        const int key = first + g + 8 * (i >> 1);
        float x = logit(s[n][0][i] + s[n][1][i], slope[n][i & 1], key);
        if (!whole && (key < item.kv_begin || key >= item.kv_end)) x = -FI_INF;
        s[n][0][i] = x;
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float x = fmaxf(s[n][0][c], s[n][0][c + 2]);
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
        tile_max[n][c] = x;
        grew |= x > m[n][c];
      }
    }
    // After the first tiles the maximum seldom grows: the rescale of O runs only when it did for some head.
    if (__any_sync(kFullMask, grew)) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float next = fmaxf(m[n][c], tile_max[n][c]);
          const float f = math::ptx_exp2(m[n][c] - finite_or_zero(next));
          m[n][c] = next;
          d[n][c] *= f;
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            o[n][step][c] *= f;
            o[n][step][c + 2] *= f;
          }
        }
    }
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][0][i] = math::ptx_exp2(s[n][0][i] - finite_or_zero(m[n][i & 1]));
        d[n][i & 1] += s[n][0][i];
      }
      // The fragment of P^T (rows keys, columns heads) transposed is the B operand.
      p[n][0] = ptx::transpose_8x8(ptx::pack2<M>(s[n][0][0], s[n][0][1]));
      p[n][1] = ptx::transpose_8x8(ptx::pack2<M>(s[n][0][2], s[n][0][3]));
    }
#pragma unroll
    for (int step = 0; step < kSteps; step += kLoadSteps) {
      uint32_t a[2][4];
      Frag::values(a, buffer + v_lane, step);
#pragma unroll
      for (int part = 0; part < kLoadSteps; ++part)
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) ptx::mma_m16n8k16<M>(o[n][step + part], a[part], p[n]);
    }

    __syncwarp();  // every lane has read the slot that is filled again
    const int next_tile = tile + kStages * kWarps;
    if (next_tile < tiles) {
      source.issue(buffer, next_tile, next_page);
      next_page = source.page_of(next_tile + kWarps, tiles);
    }
    ptx::cp_async_commit();
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }

  // Merge of the warps. All tiles issued were consumed, so the ring's memory is free once every warp is here.
  float* merge = reinterpret_cast<float*>(smem);
  float* state_m = reinterpret_cast<float*>(smem + Tr::kStateOffset);
  float* state_d = state_m + kWarps * Tr::kHeads;
  uint32_t* flag = reinterpret_cast<uint32_t*>(state_d + kWarps * Tr::kHeads);
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kTilesN; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int head = 8 * n + 2 * t + c;
      float sum = d[n][c];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
      if (g == 0) {
        state_m[warp * Tr::kHeads + head] = m[n][c];
        state_d[warp * Tr::kHeads + head] = sum;
      }
      if (head < heads) {
        float* row = merge + (warp * Tr::kHeads + head) * Tr::kMergePitch;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          row[Frag::out_dim(step, g, 0)] = o[n][step][c];
          row[Frag::out_dim(step, g, 1)] = o[n][step][c + 2];
        }
      }
    }
  __syncthreads();

  constexpr int kQuads = Tr::kHeadDim / 4;  // units of four dims
  const int units = heads * kQuads;
  const int64_t first_state = (int64_t(item.slot) * params.num_head_blocks + head_block) * params.heads_per_block;
  const int64_t chunk_stride = int64_t(params.num_head_blocks) * params.heads_per_block;  // states from chunk to chunk
  for (int unit = threadIdx.x; unit < units; unit += Tr::kThreads) {
    const int head = unit / kQuads, dim = unit % kQuads * 4;
    Partial sum;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum.m = fmaxf(sum.m, state_m[w * Tr::kHeads + head]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int i = w * Tr::kHeads + head;
      const float f = math::ptx_exp2(state_m[i] - finite_or_zero(sum.m));
      sum.add(f, state_d[i], *reinterpret_cast<const float4*>(merge + i * Tr::kMergePitch + dim));
    }
    if (item.num_chunks == 1) {
      finish<Config>(params, item.request, first_head + head, dim, sum);
    } else {
      const int64_t state = first_state + item.chunk * chunk_stride + head;
      *reinterpret_cast<float4*>(params.partial_out + state * Tr::kHeadDim + dim) = sum.o;
      if (dim == 0) params.partial_md[state] = make_float2(sum.m, sum.d);
    }
  }
  if (item.num_chunks == 1) return;

  // The last CTA to arrive merges the chunks. The barrier orders every thread's partials before the one atomic, which
  // wraps the counter back to zero for the next launch.
  __syncthreads();
  if (threadIdx.x == 0)
    *flag = ptx::atomic_inc_acq_rel(params.counters + int64_t(item.slot) * params.num_head_blocks + head_block,
                                    item.num_chunks - 1);
  __syncthreads();
  if (*flag != uint32_t(item.num_chunks - 1)) return;

  // Threads are `slices` rows of `width` units; a slice takes every slices-th chunk, 8 loads in flight at a time.
  const int width = min(units, Tr::kThreads), slices = Tr::kThreads / width;
  const int slice = threadIdx.x / width, column = threadIdx.x % width;
  constexpr int kBatch = 8;
  float4* exchange_o = reinterpret_cast<float4*>(smem);
  float2* exchange_md = reinterpret_cast<float2*>(smem + Tr::kThreads * 16);
  for (int base = 0; base < units; base += width) {
    const int unit = base + column;
    const bool active = slice < slices && unit < units;
    const int head = unit / kQuads, dim = unit % kQuads * 4;
    Partial sum;
    if (active) {
      for (int chunk = slice; chunk < item.num_chunks; chunk += kBatch * slices) {
        float4 part[kBatch];
        float2 md[kBatch];
        float top = sum.m;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int c = chunk + i * slices;
          const int64_t state = first_state + c * chunk_stride + head;
          const bool there = c < item.num_chunks;
          md[i] = there ? __ldcg(params.partial_md + state) : make_float2(-FI_INF, 0.f);
          part[i] = there ? __ldcg(reinterpret_cast<const float4*>(params.partial_out + state * Tr::kHeadDim + dim))
                          : make_float4(0.f, 0.f, 0.f, 0.f);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) top = fmaxf(top, md[i].x);
        sum.scale(math::ptx_exp2(sum.m - finite_or_zero(top)));
        sum.m = top;
#pragma unroll
        for (int i = 0; i < kBatch; ++i) sum.add(math::ptx_exp2(md[i].x - finite_or_zero(top)), md[i].y, part[i]);
      }
      exchange_o[threadIdx.x] = sum.o;
      exchange_md[threadIdx.x] = make_float2(sum.m, sum.d);
    }
    if (slices > 1) {
      __syncthreads();
      if (active && slice == 0) {
        for (int other = 1; other < slices; ++other) {
          const float2 md = exchange_md[other * width + column];
          const float top = fmaxf(sum.m, md.x);
          sum.scale(math::ptx_exp2(sum.m - finite_or_zero(top)));
          sum.add(math::ptx_exp2(md.x - finite_or_zero(top)), md.y, exchange_o[other * width + column]);
          sum.m = top;
        }
      }
    }
    if (active && slice == 0) finish<Config>(params, item.request, first_head + head, dim, sum);
  }
}

template <class Config>
FI_DEVICE void batch_decode(const DecodeParams& params) {
  decode_item<Config>(params, nullptr);
}
template <class Config>
FI_DEVICE void batch_decode_rope(const DecodeRopeParams& params) {
  decode_item<Config>(params.base, params.turns);
}

}  // namespace fi
