// What the host hands to the prefill kernels: work items and parameters (fi_cupy/plan/prefill.py, prefill_kernel.py).
#pragma once
#include "attention/fast_div.cuh"
#include "attention/head_scales.cuh"
#include "common/base.cuh"

namespace fi {

// One work item, made by the host. kv_begin is a multiple of kTileKv; [kv_begin, kv_end) is trimmed to what causality
// and the window leave visible, and empty for rows that see nothing. qo_len 0: nothing to do (graph padding).
struct alignas(16) PrefillItem {
  int32_t q_row;     // first row of the request in q, o and lse
  int32_t qo_len;    // query tokens of the request
  int32_t kv_base;   // first slot in kv_indices (paged) or first token in k and v
  int32_t kv_len;    // keys of the request
  int32_t q_tile;    // packed rows [q_tile * kTileQ, ...)
  int32_t kv_begin, kv_end;
  int32_t first_slot;  // slot of the tile's first chunk in the partial results; 0 without a split
  int32_t mask_low, mask_high;  // byte offset of the request's custom mask
  int32_t request;              // the request's number, for variants
  int32_t chunk, num_chunks;    // this range's number among the tile's; num_chunks 1: no split
  int32_t row_shift;            // the Hopper kernel's tiles begin so many packed rows earlier, the first before row 0
  int32_t unused[2];
};

// The Hopper kernel's first packed row of an item, which may be negative: such rows are nobody's.
FI_DEVICE int item_row(const PrefillItem& item, int tile_q) { return item.q_tile * tile_q - item.row_shift; }

struct PrefillParams {
  const void* q;
  const void* k;
  const void* v;
  void* o;
  float* lse;  // [rows, heads] base 2, or null
  const PrefillItem* items;
  const int32_t* kv_indices;
  const uint8_t* mask;   // custom mask bits, little-endian
  const float* sinks;    // [heads] raw logits, or null
  float4* partial_o;     // [slot][kv head][16-row tile of a warp][8 dims][thread], see prefill_join.cuh
  float2* partial_md;    // [slot][kv head][kTileQ]: maximum and denominator
  uint32_t* counters;    // [slot][kv head]: zero between launches
  int64_t q_stride_n, q_stride_h;  // elements, as all strides; multiples of 8 for q, k, v
  int64_t k_stride_page, k_stride_n, k_stride_h;
  int64_t v_stride_page, v_stride_n, v_stride_h;
  int64_t o_stride_n, o_stride_h;
  FastDiv group;      // query heads a kv head
  FastDiv page_size;
  uint32_t num_qo_heads;
  int32_t causal;       // 0 or 1
  int32_t window_left;  // 2^30 when off
  float sm_scale, sm_scale_log2;
  float out_scale;      // multiplies the output, not the lse
  float soft_cap, soft_cap_rcp;  // cap, 1 / cap
  HeadScales scales;
};

// With rotary embedding inside (ROPE_LLAMA): turns[i] is the frequency of dims i and i + head_dim_qk / 2, in 2^-64 turns a
// position.
struct PrefillRopeParams : PrefillParams {
  alignas(64) uint64_t turns[128];
};

// v_scale, of both kinds.
template <class Params>
FI_DEVICE float output_scale(const Params& params, int kv_head) {
  return params.out_scale * params.scales.output(kv_head);
}

}  // namespace fi
