// RMSNorm and LayerNorm over rows of `hidden` elements, with residual addition and fp8 output as options.
//   y = x / sqrt(mean(x^2) + eps) * (weight + weight_bias)          (weight_bias 1 for Gemma)
// kLanes threads compute one row, a CTA kThreads / kLanes of them (one where a row needs more than a warp); row r starts at
// (r / inner) * stride_outer + (r % inner) * stride_inner. grid = ceil(rows / rows of a CTA).
// Registers hold the row between the two passes, so each element is read once: kVecs vectors of kVec elements a thread;
// rows longer than kLanes * kVecs * kVec are read a second time (from L2). A 16-bit weight is asked for with the row: behind
// the reduction its latency would be a third of a short launch. Addresses are computed in front of the wait.
// Shared memory: a float a warp, twice. Bytes moved: rows * hidden * (read + write), plus as much again for the residual.
// Architecture: any.
#pragma once
#include "common/early.cuh"
#include "common/math.cuh"
#include "common/reduce.cuh"
#include "common/vec.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct NormParams {
  const void* input;  // in place for the fused residual form
  void* output;
  void* residual;
  const void* weight;
  const void* bias;         // layernorm's beta, or null
  const float* scale;       // quantising: one float on the device, or null to use scale_value
  int64_t in_stride_outer, in_stride_inner;    // elements
  int64_t out_stride_outer, out_stride_inner;  // elements
  int64_t res_stride_outer, res_stride_inner;  // elements
  uint32_t rows;
  uint32_t inner;  // rows that stride_inner separates
  uint32_t hidden;
  float eps;
  float weight_bias;
  float scale_value;
};

// Config: T (input), W (weight), O (output), kVec, kVecs, kLanes, kThreads, kResidual, kLayerNorm, kQuantize
template <class Config>
FI_DEVICE void norm(const NormParams& params) {
  using T = typename Config::T;
  using W = typename Config::W;
  using O = typename Config::O;
  constexpr int kVec = Config::kVec, kVecs = Config::kVecs, kLanes = Config::kLanes, kThreads = Config::kThreads;
  constexpr int kStep = kLanes * kVec;
  static_assert(kLanes == kThreads || kLanes <= 32, "a row belongs to a CTA or to a part of a warp");
  constexpr bool kLong = kLanes == 1024 && kVecs == 4;  // others hold all of their rows (norm_spec)
  __shared__ __align__(16) float scratch[2][32];

  ptx::grid_launch_dependents();

  uint32_t row = blockIdx.x;
  if constexpr (kLanes != kThreads) {
    row = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
    if (row - threadIdx.x % 32 / kLanes >= params.rows) return;  // the whole warp: its lanes take part in the reductions
  }
  const bool exists = kLanes == kThreads || row < params.rows;
  if (!exists) row = params.rows - 1;
  int64_t outer = 0, inner = row;
  if (params.inner != params.rows) {  // uniform; a division is a hundred cycles in front of the first load
    outer = row / params.inner;
    inner = row - uint32_t(outer) * params.inner;
  }
  // All pointers are to this thread's first vector; a row that does not exist is an empty one.
  const uint32_t first = threadIdx.x % kLanes * kVec, hidden = exists ? params.hidden : 0;
  const T* x = static_cast<const T*>(params.input) + first + outer * params.in_stride_outer + inner * params.in_stride_inner;
  O* y = static_cast<O*>(params.output) + first + outer * params.out_stride_outer + inner * params.out_stride_inner;
  const W* weight = static_cast<const W*>(params.weight) + first;
  T* residual = nullptr;
  if constexpr (Config::kResidual)
    residual = static_cast<T*>(params.residual) + first + outer * params.res_stride_outer + inner * params.res_stride_inner;
  constexpr bool kHoldWeight = sizeof(W) == 2 && kVecs <= (Config::kQuantize ? 1 : 2);
  float share = 1.f / float(params.hidden);  // of an element in a mean
  computed_early(share);
  if constexpr (Config::kLayerNorm)
    ptx::grid_wait();  // registers are short there
  else if constexpr (kHoldWeight)
    grid_wait_behind(x, residual, y, weight);
  else
    grid_wait_behind(x, residual, y);
  auto reduce = [&](float x, float* shared) {
    if constexpr (kLanes != kThreads) {
      return warp_reduce<Sum, min_of(kLanes, 32)>(x);
    } else if constexpr (kThreads % 128 != 0 || kThreads > 256) {
      return block_reduce<Sum, kThreads>(x, shared);
    } else {  // few warps: their sums by every thread, without another chain of shuffles
      x = warp_reduce<Sum>(x);
      if (lane_id() == 0) shared[warp_id()] = x;
      __syncthreads();
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < kThreads / 32; i += 4) {
        const float4 part = *reinterpret_cast<const float4*>(shared + i);
        total += (part.x + part.y) + (part.z + part.w);
      }
      return total;
    }
  };

  // Every load is issued before the first value is used: a thread's bytes in flight are what the bandwidth needs.
  using V = Vec<T, kVec>;
  using Weight = Vec<W, min_of<int>(kVec, 16 / sizeof(W))>;
  V loaded[kVecs], loaded_residual[kVecs];
  Weight held[kVecs];
#pragma unroll
  for (int n = 0; n < kVecs; ++n) {
    loaded[n] = loaded_residual[n] = V{};
    if (first + n * kStep < hidden) {
      loaded[n] = load_here<V>(x + n * kStep);
      if constexpr (Config::kResidual) loaded_residual[n] = load_here<V>(residual + n * kStep);
      if constexpr (kHoldWeight) held[n] = load_here<Weight>(weight + n * kStep);
    }
  }

  float values[kVecs][kVec];
  float sum = 0.f, squares[2] = {};  // two chains of dependent additions
  auto accumulate = [&](const float(&v)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      if constexpr (Config::kLayerNorm)
        sum += v[j];
      else
        squares[j % 2] = fmaf(v[j], v[j], squares[j % 2]);
    }
  };
  // x (+ residual, which is written back) in fp32.
  auto combine = [&](uint32_t at, const V& a, const V& b, float(&v)[kVec], bool write_residual) {
    a.to_floats(v);
    if constexpr (Config::kResidual) {
      float r[kVec];
      b.to_floats(r);
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[j] += r[j];
      if (write_residual) V::from_floats(v).store(residual + at);
    }
  };
  auto read = [&](uint32_t at, float(&v)[kVec], bool write_residual) {
    V b{};
    if constexpr (Config::kResidual) b = V::load(residual + at);
    combine(at, V::load(x + at), b, v, write_residual);
  };
#pragma unroll
  for (int n = 0; n < kVecs; ++n) {
    combine(n * kStep, loaded[n], loaded_residual[n], values[n], first + n * kStep < hidden);
    accumulate(values[n]);  // zeros where the row has ended
  }
  // The rest of a row that registers cannot hold: read again below, where the residual is written, once.
#pragma unroll 1
  for (uint32_t at = kVecs * kStep; kLong && first + at < hidden; at += kStep) {
    float v[kVec];
    read(at, v, false);
    accumulate(v);
  }
  float mean = 0.f, variance;
  if constexpr (!Config::kLayerNorm) {
    variance = reduce(squares[0] + squares[1], scratch[0]) * share;
  } else {
    mean = reduce(sum, scratch[1]) * share;
    // The centred second pass over registers: E[x^2] - mean^2 would cancel for rows far from zero.
    float centred = 0.f;
#pragma unroll
    for (int n = 0; n < kVecs; ++n)
      if (first + n * kStep < hidden) {
#pragma unroll
        for (int j = 0; j < kVec; ++j) centred = fmaf(values[n][j] - mean, values[n][j] - mean, centred);
      }
#pragma unroll 1
    for (uint32_t at = kVecs * kStep; kLong && first + at < hidden; at += kStep) {
      float v[kVec];
      read(at, v, false);
#pragma unroll
      for (int j = 0; j < kVec; ++j) centred = fmaf(v[j] - mean, v[j] - mean, centred);
    }
    variance = reduce(centred, scratch[0]) * share;
  }
  const float inverse = math::rsqrt(variance + params.eps);
  float quant = 1.f;
  if constexpr (Config::kQuantize) quant = 1.f / (params.scale ? *params.scale : params.scale_value);

  auto write = [&](uint32_t at, const float(&v)[kVec], const float(&w)[kVec]) {
    float out[kVec];
    if constexpr (Config::kLayerNorm) load_floats(static_cast<const float*>(params.bias) + first + at, out);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      const float normed = (v[j] - mean) * inverse * (w[j] + params.weight_bias);
      out[j] = Config::kLayerNorm ? normed + out[j] : normed;
      if constexpr (Config::kQuantize) out[j] *= quant;  // the conversion saturates and keeps NaN
    }
    Vec<O, kVec>::from_floats(out).store(y + at);
  };
  float w[kVec];
#pragma unroll
  for (int n = 0; n < kVecs; ++n) {
    if (first + n * kStep < hidden) {
      if constexpr (kHoldWeight)
        held[n].to_floats(w);
      else
        load_floats(weight + n * kStep, w);
      write(n * kStep, values[n], w);
    }
  }
#pragma unroll 1
  for (uint32_t at = kVecs * kStep; kLong && first + at < hidden; at += kStep) {
    float v[kVec];
    read(at, v, true);
    load_floats(weight + at, w);
    write(at, v, w);
  }
}

}  // namespace fi
