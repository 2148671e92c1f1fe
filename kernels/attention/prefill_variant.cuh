// The prefill kernel with a user's variant between q k^T, the softmax and the output: what `VariantLogits` adds to a
// logits type. Per score: sm_scale * q k -> ALiBi -> Variant::score -> soft cap; then Variant::mask beside the built-in
// masks. Queries and keys are transformed in shared memory, once a tile, by the threads that read them; a pass over K
// costs one more barrier a tile. Everything else is attention/prefill.cuh.
#pragma once
#include "attention/prefill.cuh"
#include "attention/variant.cuh"

namespace fi {

// kPositiveScale: sm_scale > 0 is known, which the Hopper kernel uses.
template <class Variant, bool kAlibi, bool kSoftCap, bool kHeadScales = false, bool kPositiveScale = false>
struct VariantLogits {
  static constexpr bool kLinear = false;
  static constexpr bool kHasMask = Variant::kHasMask, kHasQuery = Variant::kHasQuery, kHasKey = Variant::kHasKey;
  static constexpr bool kHasOutput = Variant::kHasOutput, kUseSoftmax = Variant::kUseSoftmax;
  struct Row {
    VariantContext ctx;
    float slope, scale;
  };

  template <class Params>
  FI_DEVICE static Row row(const Params& params, const PrefillItem& item, int qo_idx, int qo_head, int kv_head) {
    return {{item.request, qo_idx, 0, qo_head, kv_head, item.qo_len, item.kv_len, 0},
            kAlibi ? alibi_slope(qo_head, params.num_qo_heads) : 0.f,
            kHeadScales ? params.sm_scale * params.scales.logit(qo_head, kv_head) : params.sm_scale};
  }

  template <class Params>
  FI_DEVICE static float apply(const Params& params, const Row& row, float qk, int kv_idx, bool unit) {
    VariantContext ctx = row.ctx;
    ctx.kv_idx = kv_idx;
    constexpr float kBase2 = kUseSoftmax ? math::log2e : 1.f;
    if constexpr (Variant::kHasScore && !kAlibi && !kSoftCap)
      return Variant::logit(params, ctx, qk, row.scale, kBase2, unit);
    float x = qk * row.scale;
    if constexpr (kAlibi) x = fmaf(row.slope, float(kv_idx - ctx.qo_idx), x);
    if constexpr (Variant::kHasScore) x = Variant::logit(params, ctx, x, 1.f, 1.f, unit);
    if constexpr (kSoftCap) x = params.soft_cap * tanh_from_exp(x * params.soft_cap_rcp);
    return x * kBase2;
  }

  template <class Params>
  FI_DEVICE static bool mask(const Params& params, const Row& row, int kv_idx) {
    VariantContext ctx = row.ctx;
    ctx.kv_idx = kv_idx;
    return Variant::mask(params, ctx);
  }

  // Before the normalisation: nothing; base-2 maximum, denominator, and the factor from the old maximum to the new.
  template <class Params>
  FI_DEVICE static void update(const Params&, const PrefillItem&, int, float&, float&, float&) {}

  // `normal` is the output as it is without a variant.
  template <class Params>
  FI_DEVICE static float output(const Params& params, const Row& row, float, float normal, float, float, float, int dim) {
    VariantContext ctx = row.ctx;
    ctx.dim_idx = dim;
    return Variant::output(params, ctx, normal);
  }

  // The rows of a warp from packed row `first` on, in place.
  template <class Config, class Params>
  FI_DEVICE static void transform_queries(const Params& params, const PrefillItem& item, uint8_t* smem, int first,
                                          int kv_head) {
    using T = typename Config::T;
    const int group = params.group.divisor;
#pragma unroll 1
    for (int i = lane_id(); i < 16 * Config::kRowTiles * Config::kHeadDimQK; i += 32) {
      const int r = i / Config::kHeadDimQK, dim = i % Config::kHeadDimQK, qo_idx = params.group.quotient(first + r);
      VariantContext ctx = row(params, item, qo_idx, kv_head * group + first + r - qo_idx * group, kv_head).ctx;
      ctx.dim_idx = dim;
      T* p = reinterpret_cast<T*>(smem + TileLayout<Config::kHeadDimQK>::offset(r, dim / 8)) + dim % 8;
      *p = from_float<T>(Variant::query(params, ctx, to_float(*p)));
    }
  }

  // The keys of a tile from key `first` on, in place, by the whole CTA.
  template <class Config, class Params>
  FI_DEVICE static void transform_keys(const Params& params, const PrefillItem& item, uint8_t* smem, int first,
                                       int kv_head) {
    using T = typename Config::T;
#pragma unroll 1
    for (int i = threadIdx.x; i < Config::kTileKv * Config::kHeadDimQK; i += Config::kWarps * 32) {
      const int r = i / Config::kHeadDimQK, dim = i % Config::kHeadDimQK;
      const VariantContext ctx{item.request, 0, first + r, 0, kv_head, item.qo_len, item.kv_len, dim};
      T* p = reinterpret_cast<T*>(smem + TileLayout<Config::kHeadDimQK>::offset(r, dim / 8)) + dim % 8;
      *p = from_float<T>(Variant::key(params, ctx, to_float(*p)));
    }
  }
};

}  // namespace fi
