// From a tile's q k^T to what the softmax of the Hopper kernel works on: base-2 logit = scale * s + offset, where s is the
// product itself (times nothing) for plain logits. The special cases below keep the work an element small, because an
// element has some 10 instructions, and 2.25 of the multi-function unit's, before the tensor cores have to wait.
// A lane's rows (half 0 and 1) are lane / 4 and that + 8 of its warp's 16; element n + 2 h + j of s is key 2 n + j of the
// columns that begin at the lane's first.
#pragma once
#include "attention/prefill_logits.cuh"

namespace fi {

// What is asked of a logits type's HopperLogits: kByElement (Logits::apply for each element), or kByTile (apply for a tile;
// rows() once an item), or neither; kHasBase: base() joins a row's logits in a tile; kShares: elements of a row share a
// calculation, so that what is unseen must be cleared first.
struct HopperPlain {
  static constexpr bool kByElement = false, kByTile = false, kHasBase = false, kShares = false;
  struct Rows {};
  template <class Params>
  FI_DEVICE static float scale(const Params& params) {
    return params.sm_scale_log2;
  }
  template <class Params>
  FI_DEVICE static float offset(const Params&) {
    return 0.f;
  }
  template <class Params>
  FI_DEVICE static Rows rows(const Params&, const PrefillItem&, const int (&)[2], const int (&)[2], int, int) {
    return {};
  }
};
struct HopperByElement : HopperPlain {
  static constexpr bool kByElement = true;
  template <class Params>
  FI_DEVICE static float scale(const Params&) {
    return 1.f;
  }
};
template <bool kLinear>
struct HopperUsual : HopperByElement {};
template <>
struct HopperUsual<true> : HopperPlain {};
template <class Logits>
struct HopperLogits : HopperUsual<Logits::kLinear> {};

// s = sign / (2^exponent(h, key, s) + 1), key counted from the lane's first. One reciprocal serves four elements:
// 1 / a = (b c d) / (a b c d). The power is kept below 2^30 for that (tanh is 1 - 2^-29 there).
template <int kRegs, class Exponent>
FI_DEVICE void cap_elements(float (&s)[kRegs], float sign, const Exponent& exponent) {
  static_assert(kRegs % 8 == 0);
#pragma unroll
  for (int h = 0; h < 2; ++h)
#pragma unroll
    for (int n = 0; n < kRegs; n += 8) {
      float d[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = n + (i >> 1) * 4;
        d[i] = math::ptx_exp2(math::min_nan(exponent(h, 2 * key + (i & 1), s[key + 2 * h + (i & 1)]), 30.f)) + 1.f;
      }
      const float ab = d[0] * d[1], cd = d[2] * d[3], all = sign * math::ptx_rcp(ab * cd);
      const float over_ab = all * cd, over_cd = all * ab;
      s[n + 2 * h] = over_ab * d[1], s[n + 2 * h + 1] = over_ab * d[0];
      s[n + 2 * h + 4] = over_cd * d[3], s[n + 2 * h + 5] = over_cd * d[2];
    }
}

// cap tanh(x / cap) = cap - 2 cap / (e^(2 x / cap) + 1): s = -1 / (e + 1), scale = 2 cap log2(e), offset = cap log2(e).
template <bool kAlibi>
struct HopperLogits<PrefillLogits<kAlibi, true, true>> {
  static constexpr bool kByElement = false, kByTile = true, kHasBase = false, kShares = true;
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
  FI_DEVICE static Rows rows(const Params& params, const PrefillItem&, const int (&qo_idx)[2], const int (&qo_head)[2], int,
                             int column) {
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
    const float base[2] = {kAlibi ? r.slope[0] * (float(start) + r.first[0]) : 0.f,
                           kAlibi ? r.slope[1] * (float(start) + r.first[1]) : 0.f};
    cap_elements(s, -1.f, [&](int h, int key, float x) {
      return kAlibi ? fmaf(x, r.factor, fmaf(r.slope[h], float(key), base[h])) : x * r.factor;
    });
  }
};

// sm_scale q k + slope (kv - qo), divided by sm_scale: the part that changes inside a tile is one multiplication-addition;
// the rest is the same for a lane's whole row of a tile and joins its maximum (`base`): one rounding, so that no distance
// between the key and the query loses digits to their positions.
template <>
struct HopperLogits<PrefillLogits<true, false, true>> {
  static constexpr bool kByElement = false, kByTile = true, kHasBase = true, kShares = false;
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
  FI_DEVICE static Rows rows(const Params& params, const PrefillItem&, const int (&qo_idx)[2], const int (&qo_head)[2], int,
                             int column) {
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
  template <class Params>
  FI_DEVICE static float base(const Params&, const Rows& r, int h, int start) {
    return r.slope[h] * (float(start) + r.first[h]);
  }
};

}  // namespace fi
