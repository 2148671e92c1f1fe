// From a tile's q k^T to base-2 logits, for kernels that hold rows in registers. A logits type has kLinear (the kernel
// multiplies by sm_scale * log2(e) inside its exponent and calls nothing) or row() once a row and tile, and apply() for
// each element (`unit`: see rcp_exp2_plus_1). The other constants say what else a variant's type has (attention/prefill_variant.cuh).
#pragma once
#include "attention/logits.cuh"

namespace fi {

// kHeadScales: a factor a query and kv head joins sm_scale; it may have any sign.
// log2(e) * cap(qk * sm_scale + slope * (kv_idx - qo_idx)), cap(x) = c tanh(x / c). A positive scale without cap and ALiBi
// is linear: it commutes with the maximum.
template <bool kAlibi, bool kSoftCap, bool kPositiveScale = true, bool kHeadScales = false>
struct PrefillLogits {
  static constexpr bool kLinear = !kAlibi && !kSoftCap && kPositiveScale && !kHeadScales;
  static constexpr bool kHasMask = false, kHasQuery = false, kHasKey = false, kHasOutput = false, kUseSoftmax = true;
  struct Row {
    float slope;
    int qo_idx;
    float scale;
  };

  template <class Params, class Item>
  FI_DEVICE static Row row(const Params& params, const Item&, int qo_idx, int qo_head, int kv_head) {
    return {kAlibi ? alibi_slope(qo_head, params.num_qo_heads) : 0.f, qo_idx,
            kHeadScales ? params.sm_scale * params.scales.logit(qo_head, kv_head) : params.sm_scale};
  }
  // Factors that are the same for all elements are multiplied first: an element costs one product for all of them.
  template <class Params>
  FI_DEVICE static float apply(const Params& params, const Row& row, float qk, int kv_idx, bool unit) {
    const float factor = kSoftCap ? params.soft_cap_rcp * (2.f * math::log2e) : math::log2e;
    float x = qk * (row.scale * factor);
    if constexpr (kAlibi) x = fmaf(row.slope * factor, float(kv_idx - row.qo_idx), x);
    if constexpr (!kSoftCap) return x;
    const float cap = params.soft_cap * math::log2e;
    return fmaf(-2.f * cap, rcp_exp2_plus_1(x, unit), cap);  // cap tanh(x / cap)
  }
};

}  // namespace fi
