// Gated activations: output[r, i] = act(input[r, i]) * input[r, hidden + i], in fp32, rounded once.
// One CTA computes kThreads * kUnroll vectors of kVec elements of the flattened [rows, hidden] output, so that CTAs are
// full whatever the row length; grid = vectors / (kThreads * kUnroll). Row r starts at
// (r / inner) * stride_outer + (r % inner) * stride_inner.
// Shared memory: none. Bytes moved: rows * hidden * 3 * sizeof(T); a thread has 2 * kUnroll vectors in flight.
// Architecture: any.
#pragma once
#include "common/math.cuh"
#include "common/vec.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct ActivationParams {
  const void* input;
  void* output;
  int64_t in_stride_outer, in_stride_inner;    // elements
  int64_t out_stride_outer, out_stride_inner;  // elements
  uint64_t vectors;                            // rows * hidden / kVec
  uint32_t rows;
  uint32_t inner;   // rows that stride_inner separates
  uint32_t hidden;  // elements of an output row
};

// 1 / (1 + e^-x). kExact is for fp32 outputs; the other form is good to 1e-6, far below a 16-bit rounding.
template <bool kExact>
FI_DEVICE float sigmoid(float x) {
  if constexpr (kExact) return 1.f / (1.f + expf(-x));
  return math::ptx_rcp(1.f + math::ptx_exp2(-x * math::log2e));
}

struct Silu {
  template <bool kExact>
  FI_DEVICE static float apply(float x) {
    return x * sigmoid<kExact>(x);
  }
};
struct Gelu {
  template <bool kExact>
  FI_DEVICE static float apply(float x) {
    constexpr float kSqrtHalf = 0.70710678118654752440f;
    return 0.5f * x * (1.f + erff(x * kSqrtHalf));
  }
};
// x / 2 * (1 + tanh(u)) = x * sigmoid(2 u): the right form keeps its digits where tanh is near -1.
struct GeluTanh {
  template <bool kExact>
  FI_DEVICE static float apply(float x) {
    constexpr float kTwiceSqrt2OverPi = 1.59576912160573071f;
    return x * sigmoid<kExact>(kTwiceSqrt2OverPi * fmaf(0.044715f * x * x, x, x));
  }
};

// Config: T, Act (Silu, Gelu, GeluTanh), kVec, kUnroll, kThreads
template <class Config>
FI_DEVICE void act_and_mul(const ActivationParams& params) {
  using T = typename Config::T;
  using V = Vec<T, Config::kVec>;
  constexpr int kVec = Config::kVec, kUnroll = Config::kUnroll, kThreads = Config::kThreads;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint64_t first = uint64_t(blockIdx.x) * (kThreads * kUnroll) + threadIdx.x;
  const uint32_t row_vectors = params.hidden / kVec;
  V gate[kUnroll], up[kUnroll];
  T* target[kUnroll];
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    const uint64_t i = first + n * kThreads;
    target[n] = nullptr;
    if (i < params.vectors) {
      uint64_t row;
      uint32_t column;
      if (params.vectors <= 0xffffffffu) {  // uniform; a 32-bit division is four times cheaper
        row = uint32_t(i) / row_vectors;
        column = (uint32_t(i) - uint32_t(row) * row_vectors) * kVec;
      } else {
        row = i / row_vectors;
        column = uint32_t(i - row * row_vectors) * kVec;
      }
      int64_t outer = 0, inner = row;
      if (params.inner != params.rows) {
        outer = uint32_t(row) / params.inner;
        inner = uint32_t(row) % params.inner;
      }
      const T* source =
          static_cast<const T*>(params.input) + outer * params.in_stride_outer + inner * params.in_stride_inner + column;
      target[n] = static_cast<T*>(params.output) + outer * params.out_stride_outer + inner * params.out_stride_inner + column;
      gate[n] = load_streaming<V>(source);
      up[n] = load_streaming<V>(source + params.hidden);
    }
  }
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    if (target[n]) {
      float g[kVec], u[kVec];
      gate[n].to_floats(g);
      up[n].to_floats(u);
#pragma unroll
      for (int j = 0; j < kVec; ++j) g[j] = Config::Act::template apply<is_same_v<T, float>>(g[j]) * u[j];
      V::from_floats(g).store(target[n]);
    }
  }
}

}  // namespace fi
