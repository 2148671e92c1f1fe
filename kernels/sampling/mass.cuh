// Probability as an integer. A token's mass is its probability in fixed point with 43 fractional bits, truncated.
// Integer sums do not depend on the order of addition, so totals, thresholds and draws are the same for every launch
// shape, architecture and backend. What is not integer below is only fp32 addition, multiplication, fma and power-of-two
// scaling, each rounded once (no hardware exponential), and fi_cupy/reference/sampling.py repeats it bit for bit.
// A mass is at most 2^44, a row has at most 2^19 tokens: totals stay within 2^63.
#pragma once
#include "common/math.cuh"

namespace fi::sampling {

constexpr int kMassBits = 43;
constexpr uint64_t kWeightOne = uint64_t(1) << 63;  // a segment's weight of 1
constexpr uint32_t kInfKey = 0xff800000u;           // key_of(inf); larger ones are NaN's

// Order-preserving bits of a float; -0 counts as 0. NaN must be the canonical 0x7fffffff: its key is the largest.
FI_DEVICE uint32_t key_of(float x) {
  uint32_t bits = __float_as_uint(x);
  if (bits == 0x80000000u) bits = 0;
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}
FI_DEVICE float value_of(uint32_t key) { return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

// trunc(e^d * 2^bits) for d <= 0 (-inf too; NaN counts as 0): 2^n * p(f) with n + f = d * log2(e), |f| <= 1/2.
// Relative error 2e-7, and of the argument's rounding 2^-25 for each unit of d. Below e^-87 it is 0 for any bits <= 63.
FI_DEVICE uint64_t exp_fixed(float d, int bits) {
  d = fmaxf(fminf(d, 0.f), -87.f);
  const float z = __fmaf_rn(d, math::log2e, 12582912.f);  // 1.5 * 2^23: rounds to the nearest integer
  const float f = __fmaf_rn(d, math::log2e, __fsub_rn(12582912.f, z));
  float p = __fmaf_rn(0.0013264716f, f, 0.009671514f);
  p = __fmaf_rn(p, f, 0.05550734f);
  p = __fmaf_rn(p, f, 0.24022242f);
  p = __fmaf_rn(p, f, 0.693147f);
  p = __fmaf_rn(p, f, 1.f);
  // The low bits of z are n: they go to the exponent, and 0x4b400000 << 23 vanishes.
  return __float2ull_rz(__uint_as_float(__float_as_uint(p) + (__float_as_uint(z) << 23) + (uint32_t(bits) << 23)));
}

// ceil(p * total), 0 < p < 1, by p * 2^64: exact, as that is an integer for every p >= 2^-40.
FI_DEVICE uint64_t share_factor(float p) { return __double2ull_rz(double(p) * 18446744073709551616.0); }
FI_DEVICE uint64_t share(uint64_t factor, uint64_t total) {
  return __umul64hi(factor, total) + (factor * total != 0);
}

// A segment's sum in the row's unit: sum * weight / 2^63.
FI_DEVICE uint64_t scaled(uint64_t sum, uint64_t weight) { return __umul64hi(sum << 1, weight); }

// Inputs are logits: probability e^x, relative to a reference value (the row's or a segment's largest). +inf takes all;
// -inf, none. A token below 2^-43 of the reference is never drawn.
struct Logits {
  static constexpr uint32_t kNothing = 0x007fffffu;  // key_of(-inf): up to there nothing has a mass
  static constexpr bool kOwnRef = true;  // sums of segments are relative to the segment's largest value
  struct Ref {
    float top;
  };
  FI_DEVICE static bool valid(float top) { return top > -FI_INF; }
  FI_DEVICE static Ref ref(float top) { return {top}; }
  // What has a mass has this key at least: e^-30 < 2^-43.
  FI_DEVICE static uint32_t lowest_key(float top) { return max_of(key_of(__fadd_rd(top, -30.f)), kNothing + 1); }
  // inf - inf is NaN, which counts as 0: the reference itself.
  FI_DEVICE static uint64_t mass(float x, Ref r) { return exp_fixed(__fsub_rn(x, r.top), kMassBits); }
  FI_DEVICE static uint64_t weight(Ref part, Ref whole) { return exp_fixed(__fsub_rn(part.top, whole.top), 63); }
  // The mass that top-p compares with: p of everything.
  FI_DEVICE static uint64_t absolute(float, uint64_t factor, uint64_t total, Ref) { return share(factor, total); }
  // The key that min-p's tokens reach: of probability min_p relative to the largest value.
  FI_DEVICE static uint32_t min_p_key(float min_p, float top) {
    return key_of(fminf(__fadd_rn(top, float(log(double(min_p)))), top));
  }
  // A value that has a mass of surely less than `mass`, and everything below it too.
  FI_DEVICE static float value_below(float mass, Ref r) {
    return __fadd_rd(r.top, (math::ptx_log2(mass) - (kMassBits + 1)) * math::loge2);
  }
};

// Inputs are probabilities (need not sum to 1); negative ones count as 0. The unit is 2^-43 if the row's largest value
// lies in [2^kFloor, 2), so that a row can be added up while it is read, else 2^-43 of that value's power of two.
template <int kFloor>
struct Probabilities {
  static constexpr uint32_t kNothing = 0x80000000u;  // key_of(0)
  static constexpr bool kOwnRef = false;
  struct Ref {
    float first, second;  // their product is 2^(kMassBits - exponent); two factors, since it may exceed the range
    int exponent;         // 0 or floor(log2(top))
  };
  FI_DEVICE static bool valid(float top) { return top > 0.f && top < FI_INF; }
  FI_DEVICE static uint32_t lowest_key(float) { return kNothing + 1; }
  FI_DEVICE static Ref ref(float top) {
    const uint32_t bits = top > 0.f ? __float_as_uint(top) : 1u;
    int exponent = bits >> 23 ? int(bits >> 23) - 127 : 31 - __clz(bits) - 149;
    if (kFloor <= exponent && exponent <= 0) exponent = 0;
    const int first = exponent < -40 ? 100 : 0;
    return {__int_as_float((first + 127) << 23), __int_as_float((kMassBits - exponent - first + 127) << 23), exponent};
  }
  FI_DEVICE static uint64_t mass(float x, Ref r) {
    return __float2ull_rz(__fmul_rn(__fmul_rn(fmaxf(x, 0.f), r.first), r.second));
  }
  // In the unit 2^-43.
  FI_DEVICE static uint64_t mass(float x) { return __float2ull_rz(__fmul_rn(fmaxf(x, 0.f), 8796093022208.f)); }
  // ceil(p * 2^(kMassBits - exponent)), saturating: top-p is a bound on the sum of probabilities as they stand.
  FI_DEVICE static uint64_t absolute(float p, uint64_t, uint64_t, Ref r) {
    return __double2ull_ru(double(p) * __longlong_as_double(int64_t(kMassBits - r.exponent + 1023) << 52));
  }
  FI_DEVICE static uint32_t min_p_key(float min_p, float top) { return key_of(fminf(__fmul_rn(min_p, top), top)); }
  FI_DEVICE static float value_below(float mass, Ref r) { return 0.5f * probability(uint64_t(mass), r); }
  // A mass as a probability.
  FI_DEVICE static float probability(uint64_t mass, Ref r) {
    return float(double(mass) * __longlong_as_double(int64_t(r.exponent - kMassBits + 1023) << 52));
  }
};
// Probabilities divided by their sum: correctly rounded but for a few, and at another scale if the row's is extreme.
struct Quotient {
  float scale, sum, reciprocal;
  FI_DEVICE explicit Quotient(float whole) {
    scale = whole < 1e-30f ? 0x1p100f : whole > 1e30f ? 0x1p-100f : 1.f;
    sum = whole * scale;
    reciprocal = math::ptx_rcp(sum);
  }
  FI_DEVICE float operator()(float p) const {
    const float x = fmaxf(p, 0.f) * scale, q = x * reciprocal;
    return __fmaf_rn(__fmaf_rn(-q, sum, x), reciprocal, q);  // the remainder corrects the quotient
  }
};

using Probs = Probabilities<-20>;     // a normalised row of 2^19 tokens is above
using Residuals = Probabilities<-8>;  // differences of probabilities: small sums keep a fine unit

}  // namespace fi::sampling
