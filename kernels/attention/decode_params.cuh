// What the decode kernel is given (mirrored in fi_cupy/decode_kernel.py), and its shapes at compile time.
#pragma once
#include "attention/fast_div.cuh"
#include "attention/head_scales.cuh"
#include "common/base.cuh"

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
  FastDiv page_size;
  uint32_t num_head_blocks;  // num_kv_heads * blocks_per_kv; with kHeadPair half of it
  uint32_t blocks_per_kv;
  uint32_t heads_per_block;  // query heads of a CTA; with kHeadPair those of two kv heads
  uint32_t group_size;       // query heads of one kv head
  uint32_t table_ready;      // 1: `indices` was complete before the kernel in front of this one started
  uint32_t resident;         // CTAs of this kernel that the device runs at once
  uint32_t shares;           // side by side lie: 1 a token's kv heads, 2 a head's tokens, 0 neither (TileSource::ask)
  int32_t kv_len;            // the single request without items: its keys,
  int32_t first_key;         // the first that its window reads,
  int32_t chunk_keys;        // keys of a chunk (a multiple of 16)
  int32_t num_chunks;
  float logit_scale;         // see logits.cuh
  float logit_cap;
  float slope_scale;         // ALiBi slopes times this: log2(e), or 1 / cap
  float out_scale;           // v_scale
  HeadScales scales;         // factors a head; q and k only with kHeadScales

  // `pair` kv heads a CTA.
  FI_DEVICE uint32_t num_qo_heads(int pair) const { return num_head_blocks / blocks_per_kv * group_size * pair; }
};

// With rotary embedding inside (ROPE_LLAMA): turns[i] is the frequency of dims i and i + head_dim / 2, in 2^-64 turns a
// position.
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
  static constexpr int kPair = Config::kHeadPair ? 2 : 1;           // kv heads of a CTA
  static constexpr int kWalkers = kWarps / kPair;                   // warps that share a kv head
  static constexpr int kThreads = kWarps * 32;
  static constexpr int kHeads = 8 * kTilesN;                        // columns of a warp's products
  static constexpr int kSteps = kDim / 16;                          // mma steps along the dims
  static constexpr int kTile = 16;                                  // keys
  static constexpr int kChunks = kDim * int(sizeof(KV)) / 16;       // 16-byte chunks of a row, padded
  static constexpr int kChunksRead = kHeadDim * int(sizeof(KV)) / 16;
  static constexpr int kPitch = (kChunks | 1) * 16;                 // bytes
  static constexpr int kTileBytes = kTile * kPitch;
  static constexpr int kRingBytes = kWarps * kStages * 2 * kTileBytes;
  static constexpr int kMergePitch = kDim + 4;                      // floats; 16 n + 4: no bank conflicts in the merge
  static constexpr int kMergeBytes = kWarps * kHeads * kMergePitch * 4;
  static constexpr int kStateOffset = max_of(kRingBytes, kMergeBytes);
  static constexpr int kTurnsOffset = kStateOffset + 2 * kWarps * kHeads * 4 + 16;
  static constexpr int kSmemBytes = kTurnsOffset + (Config::kRope ? kDim / 2 * 8 : 0);
  // Rows of 128 bytes are asked for one tile ahead of their copies: 64x8192 with fp8 379 -> 359 us, 16x4096 54 -> 50. Wider
  // rows lose by it (bf16 of 128 dims 16x4096 95 -> 102), and so do narrower ones.
  static constexpr bool kAskAhead = kHeadDim * int(sizeof(KV)) == 128 && Config::kTileInPage;
  // Wider rows leave L2 first once they are copied, and what the next CTAs asked for stays: 16x4096 95.0 -> 91.8 us. Not those
  // that are asked for a tile ahead (fp8 64x8192 362 -> 399, and as badly under an explicit evict_normal), whose last line
  // the next head's CTA reads, too (80 dims, 16x4096 66.7 -> 68.8), or that other heads' CTAs read (64/2 heads 245 -> 264).
  static constexpr bool kReadOnce =
      !Config::kSharedRows && kHeadDim * int(sizeof(KV)) % 128 == 0 && kHeadDim * int(sizeof(KV)) > 128;
  static_assert(kHeadDim % 8 == 0 && kHeadDim * int(sizeof(KV)) % 16 == 0, "rows must be whole 16-byte chunks");
  static_assert(!Config::kRope || kHeadDim % (kFp8 ? 64 : 32) == 0, "a pair's dims share a lane and register");
  static_assert(kWarps % kPair == 0, "as many warps for either kv head");
  static_assert(kSmemBytes == Config::kSmemBytes, "the host computes the same size");
  static_assert(kThreads * 24 <= kStateOffset, "the last merge's exchange");
};

}  // namespace fi
