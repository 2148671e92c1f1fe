// What the text of an attention variant is written with: the context of one element, the user's arrays, and functions.
// A variant is `struct Variant` with the constants kHasScore, kHasMask, kHasQuery, kHasKey, kHasOutput, kUseSoftmax and a
// static function for each that is true: (params, ctx, value); for scores logit(params, ctx, qk, scale, base, unit), which
// is base * score(scale * qk) with the factors that all elements share multiplied first. Its arrays and scalars are the
// members of params.user.
// kScoreShape says more about scores (fi_cupy/jit/score_shape.py), for kernels that then need not call logit an element.
#pragma once
#include "attention/logits.cuh"
#include "common/vec.cuh"

namespace fi {

struct VariantContext {
  int batch, qo_idx, kv_idx, qo_head, kv_head, qo_len, kv_len;
  int dim_idx;  // of query, key and output functions
};

enum class ScoreShape {
  kAny,
  kPlain,    // no score function
  kShifted,  // score + bias(params, ctx, v), v = values(params, ctx) of a row; a key adds slope(params, ctx, v), if kHasSlope
  kCapped,   // base * score(scale * qk) = factor / (2^(inner * qk + shift) + 1) + offset, by cap(params, scale, base)
};
struct ScoreCap {
  float inner, shift, factor, offset;  // the same for all elements of a launch
};

template <typename T>
FI_DEVICE auto variant_load(const T* p) {
  if constexpr (is_same_v<T, bool>)
    return __ldg(reinterpret_cast<const uint8_t*>(p)) != 0;
  else if constexpr (is_same_v<T, uint8_t> || is_same_v<T, int32_t>)
    return int(__ldg(p));
  else
    return to_float(__ldg(p));
}

// A user's array of up to kRank dimensions. Indices outside an extent are clamped to it: kernels compute padding
// elements beyond the last row and key, and no index of a user may read memory that is not the array's.
template <typename T, int kRank>
struct TensorRef {
  const T* data;
  int64_t stride[kRank];  // elements
  int64_t extent[kRank];

  template <class... Indices>
  FI_DEVICE auto operator()(Indices... indices) const {
    static_assert(sizeof...(Indices) <= kRank, "more indices than dimensions");
    const int index[] = {int(indices)...};
    int64_t offset = 0;
#pragma unroll
    for (int d = 0; d < int(sizeof...(Indices)); ++d)
      offset += min(max(index[d], 0), int(extent[d]) - 1) * stride[d];
    return variant_load(data + offset);
  }
  FI_DEVICE auto operator[](int index) const { return (*this)(index); }
};

// Python's and NumPy's functions by what the hardware has.
namespace ops {

FI_DEVICE float exp(float x) { return math::ptx_exp2(x * math::log2e); }
FI_DEVICE float log(float x) { return math::ptx_log2(x) * math::loge2; }
FI_DEVICE float tanh(float x) { return tanh_from_exp(x); }
FI_DEVICE float reciprocal(float x) { return math::ptx_rcp(x); }
FI_DEVICE float sigmoid(float x) { return math::ptx_rcp(1.f + exp(-x)); }

// sin and cos to 1e-6 absolute for |x| < 1e5: the hardware's, after a reduction to [-pi, pi] by 2 pi in two floats. The
// exact ones have a slow path that would be compiled once an element.
FI_DEVICE float reduce_angle(float x) {
  const float turns = rintf(x * 0.159154943f);
  return fmaf(turns, 1.74845553e-7f, fmaf(turns, -6.28318548f, x));
}
FI_DEVICE float sin(float x) { return __sinf(reduce_angle(x)); }
FI_DEVICE float cos(float x) { return __cosf(reduce_angle(x)); }
FI_DEVICE float tan(float x) { return sin(x) / cos(x); }

// Rounded towards minus infinity, the remainder with the divisor's sign; an integer divided by 0 is 0.
FI_DEVICE int floor_div(int a, int b) {
  if (b == 0) return 0;
  const int q = a / b;
  return q - (a % b != 0 && (a < 0) != (b < 0));
}
FI_DEVICE int floor_mod(int a, int b) {
  if (b == 0) return 0;
  const int r = a % b;
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
FI_DEVICE float floor_mod(float a, float b) {
  const float r = fmodf(a, b);
  return r != 0.f && (r < 0.f) != (b < 0.f) ? r + b : r;
}
FI_DEVICE float floor_div(float a, float b) {
  const float q = (a - floor_mod(a, b)) / b, down = floorf(q);
  return q - down > 0.5f ? down + 1.f : down;
}

}  // namespace ops
}  // namespace fi
