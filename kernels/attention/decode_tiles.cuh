// Tiles of 16 keys for the decode kernel: from the page table to shared memory, and from there to mma fragments.
#pragma once
#include "attention/decode_params.cuh"
#include "attention/expand.cuh"
#include "common/math.cuh"
#include "common/vec.cuh"
#include "ptx/cp_async_once.cuh"
#include "ptx/l2_prefetch.cuh"
#include "ptx/mma.cuh"

namespace fi::decode_detail {

template <bool b, typename A, typename B>
struct select_type {
  using type = A;
};
template <typename A, typename B>
struct select_type<false, A, B> {
  using type = B;
};

// 16-bit keys: A fragment = rows of 16 keys, 16 dims at a time.
// fp8: ldmatrix hands a lane 4 neighbouring dims, so k index 2t, 2t+1, 2t+8, 2t+9 of a step means dims 4t..4t+3, and
// q is loaded likewise.
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
  FI_DEVICE static int out_dim(int step, int g, int half) {
    return step * 16 + (Tr::kFp8 ? 2 * g + half : g + 8 * half);
  }
};

// Two elements of a query row as a register of M pairs.
template <typename T, typename M>
FI_DEVICE uint32_t query_pair(uint32_t pair) {
  if constexpr (is_same_v<T, M>) {
    return pair;
  } else {
    const auto v = Vec<T, 2>::load(reinterpret_cast<const T*>(&pair));
    return ptx::pack2<M>(to_float(v[0]), to_float(v[1]));
  }
}

// Where a tile's rows lie, and the cp.async of one tile. Everything about addresses of the cache is here.
// kOnce: the lines of its rows are the first to leave L2 (ptx/cp_async_once.cuh).
template <class Config, class Tr, bool kOnce>
struct TileSource {
  using KV = typename Tr::KV;
  // Every lane copies the same chunk of rows that are equally far apart.
  static constexpr bool kRegular = Config::kTileInPage && Tr::kChunks == Tr::kChunksRead && 32 % Tr::kChunks == 0;
  static constexpr int kLoads = ceil_div(Tr::kTile * Tr::kChunks, 32);
  static constexpr int kElements = 16 / int(sizeof(KV));  // of a chunk
  const KV *k, *v;  // at this kv head
  const DecodeParams& params;
  const DecodeItem& item;
  int origin;  // key of row 0 of tile 0
  using Copies = ptx::AsyncCopies<kOnce>;
  using Address = typename Copies::Address;
  Copies copies;

  FI_DEVICE TileSource(const DecodeParams& p, const DecodeItem& i, uint32_t kv_head)
      : k(static_cast<const KV*>(p.k) + kv_head * p.k_stride_head),
        v(static_cast<const KV*>(p.v) + kv_head * p.v_stride_head),
        params(p),
        item(i),
        // With whole tiles inside pages the tiles start at multiples of 16 keys.
        origin(Config::kTileInPage ? i.kv_begin & ~(Tr::kTile - 1) : i.kv_begin) {}

  FI_DEVICE int num_tiles() const { return (item.kv_end - origin + Tr::kTile - 1) / Tr::kTile; }

  // The key whose page this lane looks up.
  FI_DEVICE uint32_t lookup_key(int tile) const {
    const int first = origin + tile * Tr::kTile;
    return Config::kTileInPage ? first : min(first + (lane_id() & 15), item.kv_end - 1);
  }
  // Page number for this lane's row (kTileInPage: of the whole tile). Contiguous keys are page 0.
  FI_DEVICE int page_of(int tile, int tiles) const {
    if (params.indices == nullptr || tile >= tiles) return 0;
    return params.indices[item.page_begin + params.page_size.quotient(lookup_key(tile))];
  }

  // All 16 keys of the tile are the item's.
  FI_DEVICE bool whole(int tile) const {
    const int first = origin + tile * Tr::kTile;
    return first >= item.kv_begin && first + Tr::kTile <= item.kv_end;
  }
  // kRegular: where this lane's first chunk of a tile lies, and the copies from there.
  FI_DEVICE const KV* keys_of(int tile, int page) const {
    return source(k, params.k_stride_page, params.k_stride_token, tile, page);
  }
  FI_DEVICE const KV* values_of(int tile, int page) const {
    return source(v, params.v_stride_page, params.v_stride_token, tile, page);
  }
  FI_DEVICE void copy_whole(Address slot, const KV* keys, const KV* values) const {
    copy(slot, keys, params.k_stride_token);
    copy(slot + Tr::kTileBytes, values, params.v_stride_token);
  }
  FI_DEVICE void copy_part(Address slot, int tile, const KV* keys, const KV* values) const {
    copy_part(slot, k, keys, params.k_stride_token, tile);
    copy_part(slot + Tr::kTileBytes, v, values, params.v_stride_token, tile);
  }

  FI_DEVICE void issue_keys(Address slot, int tile, int page) const {
    issue(slot, k, params.k_stride_page, params.k_stride_token, tile, page);
  }
  FI_DEVICE void issue_values(Address slot, int tile, int page) const {
    issue(slot + Tr::kTileBytes, v, params.v_stride_page, params.v_stride_token, tile, page);
  }
  // Ask L2 for this CTA's share of a tile (by a warp). Where a token's kv heads lie side by side, the CTAs of the other
  // heads run beside this one, and each asks for one piece of the bytes of all: a few KB that lie together, where a head's
  // own rows are pieces far apart. Where a head's tokens lie side by side, for its own tile.
  FI_DEVICE void ask(int tile, int page, uint32_t head_block, uint32_t kv_head) const {
    if constexpr (Config::kTileInPage) {
      constexpr int kPiece = Tr::kTile * Tr::kHeadDim * Tr::kPair;
      const uint32_t first = origin + tile * Tr::kTile;
      // One lane for the keys and one for the values; of a pair's warps, which walk the same tiles, one for either.
      const bool second = Config::kHeadPair ? warp_id() % 2 : lane_id();
      if (lane_id() >= (Config::kHeadPair ? 1 : 2) || params.shares == 0 || first + Tr::kTile > item.kv_len) return;
      const int64_t in_page = first - params.page_size.quotient(first) * params.page_size.divisor;
      const int64_t piece = params.shares == 1 ? int64_t(head_block) * kPiece
                                               : kv_head * (second ? params.v_stride_head : params.k_stride_head);
      ptx::l2_prefetch(static_cast<const KV*>(second ? params.v : params.k) +
                           page * (second ? params.v_stride_page : params.k_stride_page) +
                           in_page * (second ? params.v_stride_token : params.k_stride_token) + piece,
                       kPiece * int(sizeof(KV)));
    }
  }

 private:
  FI_DEVICE const KV* source(const KV* base, int64_t stride_page, int64_t stride_token, int tile, int page) const {
    const uint32_t key = lookup_key(tile);
    const uint32_t in_page = key - params.page_size.quotient(key) * params.page_size.divisor;
    return base + page * stride_page + (in_page + lane_id() / Tr::kChunks) * stride_token +
           lane_id() % Tr::kChunks * kElements;
  }
  FI_DEVICE void copy(Address slot, const KV* from, int64_t stride_token) const {
    constexpr int kRows = 32 / Tr::kChunks;
    const Address to = slot + lane_id() / Tr::kChunks * Tr::kPitch + lane_id() % Tr::kChunks * 16;
#pragma unroll
    for (int i = 0; i < kLoads; ++i, from += kRows * stride_token)
      copies.copy_16(to + i * kRows * Tr::kPitch, from);
  }
  // The first or last tile of an item: rows outside become zeros, as below. Straight, for a short request waits for them.
  FI_DEVICE void copy_part(Address slot, const KV* base, const KV* from, int64_t stride_token, int tile) const {
    constexpr int kRows = 32 / Tr::kChunks;
    const int key = origin + tile * Tr::kTile + lane_id() / Tr::kChunks;
    const Address to = slot + lane_id() / Tr::kChunks * Tr::kPitch + lane_id() % Tr::kChunks * 16;
    constexpr int kUnroll = 2;  // all at once would take the registers of a second CTA (1x4096 of 128 dims: 10.4 us, not 9.4)
#pragma unroll kUnroll
    for (int i = 0; i < kLoads; ++i, from += kRows * stride_token) {
      const bool valid = key + i * kRows >= item.kv_begin && key + i * kRows < item.kv_end;
      copies.copy_16_anywhere(to + i * kRows * Tr::kPitch, valid ? from : base, valid);
    }
  }
  // The slot waits for these instructions, so all that can be left out of a whole tile's copies is.
  FI_DEVICE void issue(Address slot, const KV* base, int64_t stride_page, int64_t stride_token, int tile,
                       int page) const {
    const int first = origin + tile * Tr::kTile;
    if constexpr (kRegular) {
      const KV* from = source(base, stride_page, stride_token, tile, page);
      if (whole(tile)) return copy(slot, from, stride_token);
      return copy_part(slot, base, from, stride_token, tile);
    }
    const uint32_t key = lookup_key(tile);
    const int64_t in_page = key - params.page_size.quotient(key) * params.page_size.divisor;
    const int64_t lane_offset = page * stride_page + in_page * stride_token;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int index = lane_id() + 32 * i;
      const int row = index / Tr::kChunks, chunk = index % Tr::kChunks;
      int64_t offset;
      if constexpr (Config::kTileInPage)
        offset = lane_offset + row * stride_token;
      else  // the lane that looked the row up has its offset
        offset = __shfl_sync(kFullMask, lane_offset, row & 15);
      if (Tr::kTile * Tr::kChunks % 32 != 0 && row >= Tr::kTile) continue;
      const bool inside = first + row >= item.kv_begin && first + row < item.kv_end;
      const bool valid = inside && (Tr::kChunks == Tr::kChunksRead || chunk < Tr::kChunksRead);
      // Rows outside become zeros: 0 * NaN from a stale page would be NaN. Their addresses may leave the allocation.
      copies.copy_16(slot + row * Tr::kPitch + chunk * 16, base + (valid ? offset + chunk * kElements : 0), valid);
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
  const int stop = min(start + params.chunk_keys, params.kv_len);
  return {0, max(start, params.first_key), stop, 0, 0, params.num_chunks, index, params.kv_len};
}

}  // namespace fi::decode_detail
