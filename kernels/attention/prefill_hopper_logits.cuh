// From a tile's q k^T to what the softmax of the Hopper kernel works on: base-2 logit = scale * s + offset, where s is the
// product itself (times nothing) for plain logits. The special cases below keep the work an element small, because an
// element has some 10 instructions, and 2.25 of the multi-function unit's, before the tensor cores have to wait.
// A lane's rows (half 0 and 1) are lane / 4 and that + 8 of its warp's 16; element n + 2 h + j of s is key 2 n + j of the
// columns that begin at the lane's first.
#pragma once
#include "attention/prefill_logits.cuh"

namespace fi {

// Any logits type: plain ones need nothing, others are applied element by element, and give base-2 logits.
template <class Logits>
struct HopperLogits {
  static constexpr bool kByElement = !Logits::kLinear, kByTile = false, kHasBase = false;
  struct Rows {};
  template <class Params>
  FI_DEVICE static float scale(const Params& params) {
    return Logits::kLinear ? params.sm_scale_log2 : 1.f;
  }
  template <class Params>
  FI_DEVICE static float offset(const Params&) {
    return 0.f;
  }
  template <class Params>
  FI_DEVICE static Rows rows(const Params&, const int (&)[2], const int (&)[2], int) {
    return {};
  }
};

// cap tanh(x / cap) = cap - 2 cap / (e^(2 x / cap) + 1): s = -1 / (e + 1), scale = 2 cap log2(e), offset = cap log2(e).
// One reciprocal serves four elements: 1 / a = (b c d) / (a b c d). e is kept below 2^30 for that (tanh is 1 - 2^-29 there).
template <bool kAlibi>
struct HopperLogits<PrefillLogits<kAlibi, true, true>> {
  static constexpr bool kByElement = false, kByTile = true, kHasBase = false;
  struct Rows {
    float factor;              // of q k
    float slope[2], first[2];  // ALiBi in the exponent's unit, a key's share; the lane's column less the row's query
  };
  template <class Params>
  FI_DEVICE static float scale(const Params& params) {
    return params.soft_cap * (2.f * math::log2e);
  }
  template <class Params>
  FI_DEVICE static float offset(const Params& params) {
    return params.soft_cap * math::log2e;
  }
  template <class Params>
  FI_DEVICE static Rows rows(const Params& params, const int (&qo_idx)[2], const int (&qo_head)[2], int column) {
    const float unit = params.soft_cap_rcp * (2.f * math::log2e);
    Rows r;
    r.factor = params.sm_scale * unit;
    if constexpr (kAlibi)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        r.slope[h] = alibi_slope(qo_head[h], params.num_qo_heads) * unit;
        r.first[h] = float(column - qo_idx[h]);
      }
    return r;
  }
  template <int kRegs>
  FI_DEVICE static void apply(const Rows& r, float (&s)[kRegs], int start) {
    static_assert(kRegs % 8 == 0);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float base = kAlibi ? r.slope[h] * (float(start) + r.first[h]) : 0.f;
#pragma unroll
      for (int n = 0; n < kRegs; n += 8) {
        float d[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = n + (i >> 1) * 4;
          float x = s[key + 2 * h + (i & 1)];
          if constexpr (kAlibi)
            x = fmaf(x, r.factor, fmaf(r.slope[h], float(2 * key + (i & 1)), base));
          else
            x *= r.factor;
          d[i] = math::ptx_exp2(math::min_nan(x, 30.f)) + 1.f;
        }
        const float ab = d[0] * d[1], cd = d[2] * d[3], all = -math::ptx_rcp(ab * cd);
        const float over_ab = all * cd, over_cd = all * ab;
        s[n + 2 * h] = over_ab * d[1], s[n + 2 * h + 1] = over_ab * d[0];
        s[n + 2 * h + 4] = over_cd * d[3], s[n + 2 * h + 5] = over_cd * d[2];
      }
    }
  }
};

// sm_scale q k + slope (kv - qo), divided by sm_scale: the part that changes inside a tile is one multiplication-addition;
// the rest is the same for a lane's whole row of a tile and joins its maximum (`base`): one rounding, so that no distance
// between the key and the query loses digits to their positions.
template <>
struct HopperLogits<PrefillLogits<true, false, true>> {
  static constexpr bool kByElement = false, kByTile = true, kHasBase = true;
  struct Rows {
    float slope[2], first[2];  // of a key; the lane's column less the row's query
  };
  template <class Params>
  FI_DEVICE static float scale(const Params& params) {
    return params.sm_scale_log2;
  }
  template <class Params>
  FI_DEVICE static float offset(const Params&) {
    return 0.f;
  }
  template <class Params>
  FI_DEVICE static Rows rows(const Params& params, const int (&qo_idx)[2], const int (&qo_head)[2], int column) {
    Rows r;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      r.slope[h] = alibi_slope(qo_head[h], params.num_qo_heads) / params.sm_scale;
      r.first[h] = float(column - qo_idx[h]);
    }
    return r;
  }
  template <int kRegs>
  FI_DEVICE static void apply(const Rows& r, float (&s)[kRegs], int) {
#pragma unroll
    for (int n = 0; n < kRegs; ++n) s[n] = fmaf(r.slope[n >> 1 & 1], float(n / 4 * 8 + n % 2), s[n]);
  }
  FI_DEVICE static float base(const Rows& r, int h, int start) { return r.slope[h] * (float(start) + r.first[h]); }
};

}  // namespace fi
