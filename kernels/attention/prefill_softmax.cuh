// The running softmax of the prefill kernel: maxima that lag behind, so that accumulators are rarely rescaled.
#pragma once
#include "common/base.cuh"
#include "common/math.cuh"

namespace fi {

// A row's maximum may lag behind by this many powers of two before the output is rescaled: weights stay <= 2^8, which
// fp16 and bf16 hold with full precision, and the rescaling of every accumulator becomes rare.
constexpr float kRescaleThreshold = 8.f;

// Running softmax of 16 * kRowTiles rows: lane 4g + t holds rows g and g + 8 of each row tile (half 0 and 1), m the
// same in the four lanes of a row, d this lane's part of the sum.
template <int kRowTiles>
struct SoftmaxState {
  float m[kRowTiles][2], d[kRowTiles][2];

  FI_DEVICE void init() {
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) m[i][0] = m[i][1] = -FI_INF, d[i][0] = d[i][1] = 0.f;
  }

  // Raise the maxima to those of the logits s (times `scale` = base-2 logits), and rescale o and d where one grew much. The
  // rule is each row's own, so a row's result does not depend on the rows beside it.
  template <int kKeyTiles, int kDimTiles>
  FI_DEVICE void raise(const float (&s)[kRowTiles][kKeyTiles][4], float (&o)[kRowTiles][kDimTiles][4], float scale) {
    float grown[kRowTiles][2];
    bool any = false;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float top = fmaxf(s[i][0][2 * h], s[i][0][2 * h + 1]);
#pragma unroll
        for (int n = 1; n < kKeyTiles; ++n) top = fmaxf(top, fmaxf(s[i][n][2 * h], s[i][n][2 * h + 1]));
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
        top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
        // -inf - -inf is NaN and compares false: a row that has seen nothing stays as it is.
        const bool up = (top - m[i][h]) * scale > kRescaleThreshold;
        grown[i][h] = up ? top : m[i][h];
        any = any || up;
      }
    if (!__any_sync(kFullMask, any)) return;
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float ratio = grown[i][h] == m[i][h] ? 1.f : math::ptx_exp2((m[i][h] - grown[i][h]) * scale);
        m[i][h] = grown[i][h];
        d[i][h] *= ratio;
#pragma unroll
        for (int n = 0; n < kDimTiles; ++n) o[i][n][2 * h] *= ratio, o[i][n][2 * h + 1] *= ratio;
      }
  }

  // What is added to scaled logits of row (i, h) before exp2: the same for a whole tile.
  FI_DEVICE float shift(int i, int h, float scale) const { return m[i][h] == -FI_INF ? 0.f : -m[i][h] * scale; }

  // Two neighbouring logits of row (i, h) become weights, which join the denominator.
  FI_DEVICE void weigh(float& a, float& b, int i, int h, float scale, float shift) {
    a = math::ptx_exp2(fmaf(a, scale, shift));
    b = math::ptx_exp2(fmaf(b, scale, shift));
    d[i][h] += a;
    d[i][h] += b;
  }
};

}  // namespace fi
