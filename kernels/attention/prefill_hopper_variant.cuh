// The Hopper kernel with a user's variant (VariantLogits). Queries and keys cannot be transformed there: the copy engine
// brings them and the tensor cores read them without a thread in between. Scores of a known shape (ScoreShape) take the
// built-in ALiBi's and soft cap's way; others are called element by element.
#pragma once
#include "attention/prefill_hopper.cuh"
#include "attention/prefill_variant.cuh"

namespace fi {

template <class Variant, ScoreShape kShape>
struct HopperScores : HopperByElement {};

template <class Variant>
struct HopperScores<Variant, ScoreShape::kPlain> : HopperPlain {};

// (score + bias) / sm_scale: the bias of a lane's first key is the user's own, once a row and tile, of what it loads once a
// row.
template <class Variant>
struct HopperScores<Variant, ScoreShape::kShifted> : HopperPlain {
  static constexpr bool kByTile = true, kHasBase = true;
  struct Rows {
    VariantContext ctx[2];  // kv_idx: the lane's column
    typename Variant::Values values[2];
    float slope[2], unit;
  };
  template <class Params>
  FI_DEVICE static Rows rows(const Params& params, const PrefillItem& item, const int (&qo_idx)[2], const int (&qo_head)[2],
                             int kv_head, int column) {
    Rows r;
    r.unit = 1.f / params.sm_scale;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      r.ctx[h] = {item.request, qo_idx[h], column, qo_head[h], kv_head, item.qo_len, item.kv_len, 0};
      r.values[h] = Variant::values(params, r.ctx[h]);
      r.slope[h] = Variant::slope(params, r.ctx[h], r.values[h]) * r.unit;
    }
    return r;
  }
  template <int kRegs>
  FI_DEVICE static void apply(const Rows& r, float (&s)[kRegs], int) {
    if constexpr (Variant::kHasSlope)
#pragma unroll
      for (int n = 0; n < kRegs; ++n) s[n] = fmaf(r.slope[n >> 1 & 1], float(n / 4 * 8 + n % 2), s[n]);
  }
  template <class Params>
  FI_DEVICE static float base(const Params& params, const Rows& r, int h, int start) {
    VariantContext ctx = r.ctx[h];
    ctx.kv_idx += start;
    return Variant::bias(params, ctx, r.values[h]) * r.unit;
  }
};

// The built-in cap's calculation with the user's numbers: s = +- 1 / (2^(inner qk + shift) + 1), scale = |factor|.
template <class Variant>
struct HopperScores<Variant, ScoreShape::kCapped> : HopperPlain {
  static constexpr bool kByTile = true, kShares = true;
  struct Rows {
    float inner, shift, sign;
  };
  template <class Params>
  FI_DEVICE static ScoreCap cap(const Params& params) {
    return Variant::cap(params, params.sm_scale, math::log2e);
  }
  // Not 0, with which no row would ever get a maximum; NaN stays.
  template <class Params>
  FI_DEVICE static float scale(const Params& params) {
    const float factor = fabsf(cap(params).factor);
    return factor < 1e-30f ? 1e-30f : factor;
  }
  template <class Params>
  FI_DEVICE static float offset(const Params& params) {
    return cap(params).offset;
  }
  template <class Params>
  FI_DEVICE static Rows rows(const Params& params, const PrefillItem&, const int (&)[2], const int (&)[2], int, int) {
    const ScoreCap c = cap(params);
    return {c.inner, c.shift, c.factor < 0.f ? -1.f : 1.f};
  }
  template <int kRegs>
  FI_DEVICE static void apply(const Rows& r, float (&s)[kRegs], int) {
    cap_elements(s, r.sign, [&](int, int, float x) { return fmaf(x, r.inner, r.shift); });
  }
};

// A mask function may hide any element, and those of a cap share a reciprocal; weights that are no softmax's have no scale.
template <class Variant>
constexpr ScoreShape hopper_shape() {
  constexpr ScoreShape kShape = Variant::kScoreShape;
  if (!Variant::kUseSoftmax || (kShape == ScoreShape::kCapped && Variant::kHasMask)) return ScoreShape::kAny;
  return kShape;
}
template <class Variant>
struct HopperLogits<VariantLogits<Variant, false, false, false, true>> : HopperScores<Variant, hopper_shape<Variant>()> {};

}  // namespace fi
