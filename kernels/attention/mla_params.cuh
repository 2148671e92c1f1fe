// What the host hands to the latent attention kernels (fi_cupy/mla_kernel.py), and what an item's CTA knows of itself.
// Work items are those of attention/prefill.cuh with the query heads as the group of one kv head: packed row
// qo_idx * num_heads + head.
#pragma once
#include "attention/prefill_params.cuh"

namespace fi {

constexpr int kMlaCkv = 512, kMlaKpe = 64, kMlaDim = kMlaCkv + kMlaKpe;

// q, k and v of the base are q_nope, the latent cache (ckv) and the cache of rotated keys (kpe).
struct MlaParams : PrefillParams {
  const void* q_pe;
  const float* token_scales;  // kTokenScales: [pages * page_size][4], a factor of 128 columns of ckv
  int64_t q_pe_stride_n, q_pe_stride_h;
  float pe_ratio;    // fp8: kpe_scale / ckv_scale; sm_scale and out_scale hold the latter
  float lse_factor;  // 1, or ln 2 for a lse in base e
};

// With rotary embedding inside: turns[i] is the frequency of dims 2 i and 2 i + 1 of q_pe and kpe, in 2^-64 turns a position.
struct MlaRopeParams : MlaParams {
  alignas(64) uint64_t turns[kMlaKpe / 2];
};

struct alignas(16) MlaShared {
  PrefillItem item;
  uint32_t arrived[4];  // join_parts
};

// The threads that join the chunks of a tile: `whole` CTA, or one of its warpgroups.
template <class Params>
struct MlaPart {
  const Params& params;
  MlaShared& shared;
  int part, parts;  // warpgroup and warpgroups; 0, 1: the CTA

  FI_DEVICE int thread() const { return parts == 1 ? threadIdx.x : threadIdx.x & 127; }
  FI_DEVICE void sync() const {
    if (parts == 1)
      __syncthreads();
    else
      asm volatile("bar.sync %0, 128;" ::"r"(part + 1) : "memory");
  }
  FI_DEVICE uint32_t& arrived() const { return shared.arrived[part]; }
  FI_DEVICE uint32_t* counters() const { return params.counters; }
  FI_DEVICE int chunk() const { return shared.item.chunk; }
  FI_DEVICE int chunks() const { return shared.item.num_chunks; }
  FI_DEVICE int64_t place(int chunk) const { return (shared.item.first_slot + chunk) * int64_t(parts) + part; }
};

// A thread's rows in the form of join_parts.
struct MlaTotal {
  float m[1][2], d[1][2];
};

}  // namespace fi
