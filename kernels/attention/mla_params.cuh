// What the host hands to the latent attention kernels (fi_cupy/mla_kernel.py), and what an item's CTA knows of itself.
// Work items are those of attention/prefill.cuh with the query heads as the group of one kv head: packed row
// qo_idx * num_heads + head.
#pragma once
#include "attention/prefill_params.cuh"
#include "common/vec.cuh"

namespace fi {

constexpr int kMlaCkv = 512, kMlaKpe = 64, kMlaDim = kMlaCkv + kMlaKpe;

// q, k and v of the base are q_nope, the latent cache (ckv) and the cache of rotated keys (kpe).
struct MlaParams : PrefillParams {
  const void* q_pe;
  const float* token_scales;  // kTokenScales: [pages * page_size][4], a factor of 128 columns of ckv
  int64_t q_pe_stride_n, q_pe_stride_h;
  float pe_ratio;    // fp8: kpe_scale / ckv_scale; sm_scale and out_scale hold the latter
  float lse_factor;  // 1, or ln 2 for a lse in base e
  uint32_t table_ready;  // 1: kv_indices was complete before the kernel in front of this one started, as the items always are
};

// With rotary embedding inside: turns[i] is the frequency of dims 2 i and 2 i + 1 of q_pe and kpe, in 2^-64 turns a position.
struct MlaRopeParams : MlaParams {
  alignas(64) uint64_t turns[kMlaKpe / 2];
};

struct alignas(16) MlaShared {
  PrefillItem item;     // unused[0]: whether the chunks of this tile run at a time
  uint32_t arrived[4];  // MlaJoin
};

// Eight values times a factor, rounded again.
template <typename T>
FI_DEVICE void scale_mla(uint4& x, float factor) {
  auto& v = reinterpret_cast<Vec<T, 8>&>(x);
#pragma unroll
  for (int i = 0; i < 8; ++i) v[i] = from_float<T>(to_float(v[i]) * factor);
}

// A thread's two rows: maximum of the logits before their scale, and denominator.
struct MlaTotal {
  float m[1][2], d[1][2];
};

}  // namespace fi
