// Softmax of rows of logits divided by a temperature, to fp32.
//   y = e^(x / t - max) / sum
// A cluster of kCluster CTAs (1 below sm_90) of kThreads computes one row; grid = rows * kCluster. Each segment of 1024
// elements (one warp) gives its maximum and its sum relative to it; every CTA gets them all and every warp combines them
// in the same fixed order, so the bits do not depend on the launch shape. With kHold a warp's last segment stays in its
// registers and its others in shared memory; without, the row is read again, last segment first.
// Shared memory (dynamic): 8 bytes a segment and 16, and the held segments as T. Bytes moved: rows * vocab * (sizeof(T) + 4), and
// without kHold sizeof(T) more. Architecture: any; clusters need sm_90.
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

// Config: T, kThreads, kCluster, kSegments (at most), kHold
template <class Config>
FI_DEVICE void softmax(const SoftmaxParams& params) {
  using namespace sampling;
  using T = typename Config::T;
  using Row = PlainRow<T>;
  using Values = typename Row::Block[Row::kBlocks];
  using Shape = sampling::Shape<Config::kThreads, Config::kCluster>;
  constexpr int kPer = Row::kPer, kStep = Shape::kStep;
  extern __shared__ __align__(1024) uint8_t smem[];
  struct alignas(16) Shared {
    uint64_t part[Config::kSegments];  // of every segment the sum (upper half) and the maximum
    uint64_t box;
  };
  Shared& shared = *reinterpret_cast<Shared*>(smem);
  const Held<T, Shape, Config::kHold> held{reinterpret_cast<T*>(smem + sizeof(Shared))};

  if (threadIdx.x == 0) ptx::mailbox_open(&shared.box);
  Shape::start();
  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint32_t vocab = params.vocab;
  const int64_t row_number = Shape::row();
  const Row row{static_cast<const T*>(params.input) + row_number * params.stride, vocab, (params.aligned & 1) != 0};
  float inverse = params.inverse_value;
  if (params.temperature) {
    const double t = params.temperature64 ? static_cast<const double*>(params.temperature)[row_number]
                                          : double(static_cast<const float*>(params.temperature)[row_number]);
    inverse = t == 0. ? 0.f : float(1. / t);
  }
  // -inf stays -inf: an inverse temperature of 0 is uniform over what is not masked.
  auto times_inverse = [&](float x) { return x == -FI_INF ? -FI_INF : x * inverse; };
  // fp32 is scaled where it lies; 16-bit elements, which lie packed, when they are used.
  constexpr bool kInPlace = sizeof(T) == 4;
  auto scale_in_place = [&](Values& v) {
    if constexpr (kInPlace) {
#pragma unroll
      for (int b = 0; b < Row::kBlocks; ++b) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) v[b][j] = times_inverse(v[b][j]);
      }
    }
  };
  auto scaled = [&](float x) { return kInPlace ? x : times_inverse(x); };
  const int segments = row.segments(), first = Shape::first(), left = segments - 1 - first;
  const int last = left >= 0 ? first + left / kStep * kStep : -1;  // this warp's last segment
  Values v;
  Started<Shape> started;
#pragma unroll 1
  for (int s = first; s < segments; s += kStep) {
    row.load(s, 0, Row::kAll, v);
    started.wait();
    if (s != last) held.put(s, v);
    scale_in_place(v);
    float top = -FI_INF, sum = 0.f;
    each_value<Row>(v, [&](float x, int, int) { top = fmaxf(top, scaled(x)); });
    top = warp_reduce<Max>(top);
    const float reference = top == -FI_INF ? 0.f : top;
    each_value<Row>(v, [&](float x, int, int) { sum += exp_full(scaled(x) - reference); });
    sum = warp_reduce<Sum>(sum);
    if (lane_id() < Shape::kCluster)
      Shape::post(&shared.part[s], uint64_t(__float_as_uint(sum)) << 32 | __float_as_uint(top), &shared.box, lane_id());
  }
  started.wait();
  Shape::receive(&shared.box, 0, 8 * segments);  // every CTA has all maxima and sums
  float top = -FI_INF, sum = 0.f;
  for (int s = lane_id(); s < segments; s += 32) top = fmaxf(top, __uint_as_float(uint32_t(shared.part[s])));
  top = warp_reduce<Max>(top);
  const float reference = top == -FI_INF ? 0.f : top;
  for (int s = lane_id(); s < segments; s += 32) {
    const float part = __uint_as_float(uint32_t(shared.part[s] >> 32));
    if (part != 0.f) sum += part * exp_full(__uint_as_float(uint32_t(shared.part[s])) - reference);  // 0: only -inf
  }
  sum = warp_reduce<Sum>(sum);
  const float scale = sum == 0.f ? 1.f : 1.f / sum;

  float* output = params.output + row_number * vocab;
#pragma unroll 1
  for (int s = last; s >= first; s -= kStep) {
    if (s != last) {
      if constexpr (Config::kHold) held.get(s, v);
      else row.load(s, 0, Row::kAll, v);
      scale_in_place(v);
    }
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) {
      const uint32_t at = s * kSegment + b * Row::kBlock + lane_id() * kPer;
      float y[kPer];
      forget(v[b]);
      v[b].to_floats(y);
#pragma unroll
      for (int j = 0; j < kPer; ++j) y[j] = exp_full(scaled(y[j]) - reference) * scale;
      if ((params.aligned & 2) && at + kPer <= vocab) {
#pragma unroll
        for (int j = 0; j < kPer; j += 4) Vec<float, 4>{{y[j], y[j + 1], y[j + 2], y[j + 3]}}.store(output + at + j);
      } else {
#pragma unroll
        for (int j = 0; j < kPer; ++j)
          if (at + j < vocab) output[at + j] = y[j];
      }
    }
  }
}

}  // namespace fi
