// Softmax of rows of logits divided by a temperature, to fp32.
//   y = e^(x / t - max) / sum
// One CTA of 512 threads computes one row; grid = rows. Each segment of 1024 elements (one warp) gives its maximum and
// its sum relative to it; every warp combines them in the same fixed order, so the bits do not depend on the launch
// shape. The second pass reads the row again, last segment first (from L2 where it fits).
// Shared memory: 4 KB. Bytes moved: rows * vocab * (2 * sizeof(T) + 4). Architecture: any.
#pragma once
#include "common/reduce.cuh"
#include "ptx/pdl.cuh"
#include "sampling/row.cuh"

namespace fi {

struct SoftmaxParams {
  const void* input;
  float* output;            // contiguous
  const void* temperature;  // one a row, or null for inverse_value
  int64_t stride;           // elements
  uint32_t vocab;
  float inverse_value;      // 1 / temperature; 0 for temperature 0
  uint32_t temperature64;   // temperature is float64, else float32
  uint32_t aligned;         // bit 0: input rows start on 16 bytes; bit 1: output rows do
};

namespace sampling {

// e^x, full fp32 range (denormal results too).
FI_DEVICE float exp_full(float x) { return exp2f(x * math::log2e); }

}  // namespace sampling

// Config: T, kThreads
template <class Config>
FI_DEVICE void softmax(const SoftmaxParams& params) {
  using namespace sampling;
  using T = typename Config::T;
  using Row = PlainRow<T>;
  constexpr int kThreads = Config::kThreads, kPer = Row::kPer;
  __shared__ float tops[kMaxSegments], sums[kMaxSegments];

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint32_t vocab = params.vocab;
  const Row row{static_cast<const T*>(params.input) + blockIdx.x * params.stride, vocab, (params.aligned & 1) != 0};
  float inverse = params.inverse_value;
  if (params.temperature) {
    const double t = params.temperature64 ? static_cast<const double*>(params.temperature)[blockIdx.x]
                                          : double(static_cast<const float*>(params.temperature)[blockIdx.x]);
    inverse = t == 0. ? 0.f : float(1. / t);
  }
  // -inf stays -inf: an inverse temperature of 0 is uniform over what is not masked.
  auto load = [&](uint32_t segment, typename Row::Values& v) {
    row.load(segment, 0, Row::kAll, v);
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) v[b][j] = v[b][j] == -FI_INF ? -FI_INF : v[b][j] * inverse;
    }
  };
  const int segments = row.segments();
#pragma unroll 1
  for (int s = warp_id(); s < segments; s += kThreads / 32) {
    typename Row::Values v;
    load(s, v);
    float top = -FI_INF, sum = 0.f;
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) top = fmaxf(top, v[b][j]);
    }
    top = warp_reduce<Max>(top);
    const float reference = top == -FI_INF ? 0.f : top;
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) sum += exp_full(v[b][j] - reference);
    }
    sum = warp_reduce<Sum>(sum);
    if (lane_id() == 0) {
      tops[s] = top;
      sums[s] = sum;
    }
  }
  __syncthreads();
  float top = -FI_INF, sum = 0.f;
  for (int s = lane_id(); s < segments; s += 32) top = fmaxf(top, tops[s]);
  top = warp_reduce<Max>(top);
  const float reference = top == -FI_INF ? 0.f : top;
  for (int s = lane_id(); s < segments; s += 32) {
    const float part = sums[s];
    if (part != 0.f) sum += part * exp_full(tops[s] - reference);  // 0: nothing but -inf
  }
  sum = warp_reduce<Sum>(sum);
  const float scale = sum == 0.f ? 1.f : 1.f / sum;

  float* output = params.output + blockIdx.x * int64_t(vocab);
#pragma unroll 1
  for (int s = (segments - 1 - warp_id()); s >= 0; s -= kThreads / 32) {
    typename Row::Values v;
    load(s, v);
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) {
      const uint32_t first = s * kSegment + b * Row::kBlock + lane_id() * kPer;
#pragma unroll
      for (int j = 0; j < kPer; ++j) v[b][j] = exp_full(v[b][j] - reference) * scale;
      if ((params.aligned & 2) && first + kPer <= vocab) {
#pragma unroll
        for (int j = 0; j < kPer; j += 4)
          Vec<float, 4>{{v[b][j], v[b][j + 1], v[b][j + 2], v[b][j + 3]}}.store(output + first + j);
      } else {
#pragma unroll
        for (int j = 0; j < kPer; ++j)
          if (first + j < vocab) output[first + j] = v[b][j];
      }
    }
  }
}

}  // namespace fi
