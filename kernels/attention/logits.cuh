// From a raw q.k product to the logit that softmax sees, in base 2: scale, ALiBi bias, soft cap, in this order.
#pragma once
#include "common/math.cuh"

namespace fi {

// 1 / (2^z + 1) to 2 ulp, which tanh and sigmoid are made of. The special-function unit gives a warp a result in 8 cycles
// and has the exponentials to do: where many are computed at once, three of four reciprocals (`unit` false) take eight
// multiply-adds instead. The seed's exponent and mantissa are a constant less those of y, within 5.1 %; a cubic step
// leaves 1.3e-4, a quadratic one the rounding.
FI_DEVICE float rcp_exp2_plus_1(float z, bool unit = true) {
  if (unit) return math::ptx_rcp(math::ptx_exp2(z) + 1.f);
  const float y = math::ptx_exp2(math::min_nan(z, 120.f)) + 1.f;
  float r = __uint_as_float(0x7ef31000u - __float_as_uint(y));
  const float error = fmaf(-y, r, 1.f);
  r = fmaf(r, fmaf(error, error, error), r);
  return fmaf(r, fmaf(-y, r, 1.f), r);
}

// tanh to 3e-7 absolute (tanh.approx errs by 5e-4 near 1: a cap of 50 turns that into 2.5 % of a probability).
FI_DEVICE float tanh_from_exp(float x) { return fmaf(-2.f, rcp_exp2_plus_1(x * (2.f * math::log2e)), 1.f); }

// scale: sm_scale * log2(e) without a cap, sm_scale / cap with one. slope: the head's ALiBi slope in the same unit.
// cap: logits_soft_cap * log2(e).
template <bool kSoftCap, bool kAlibi>
struct StandardLogits {
  float scale, cap;

  FI_DEVICE float operator()(float qk, float slope, int kv_idx) const {
    float x = qk * scale;
    if constexpr (kAlibi) x = fmaf(slope, float(kv_idx), x);
    if constexpr (kSoftCap) x = cap * tanh_from_exp(x);
    return x;
  }
};

// 2^(-8 (h+1) / n) for h < n, 2^(-4 (2 (h-n) + 1) / n) after, n the largest power of two <= num_heads.
FI_DEVICE float alibi_slope(int head, int num_heads) {
  const float n = float(1 << (31 - __clz(num_heads)));
  const float exponent = head < n ? -8.f * (head + 1) / n : -4.f * (2 * (head - n) + 1) / n;
  return math::ptx_exp2(exponent);
}

}  // namespace fi
