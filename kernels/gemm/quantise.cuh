// Rows to fp8 with a multiplier for each 128 elements: scale = max(amax, eps) / 448, q = x / scale rounded to e4m3.
// Half a warp quantises one group: 16 lanes x 8 elements; a CTA 2 groups a warp; grid = (ceil(groups / CTA), 1, 1), where
// the groups of all rows are counted through. With `rows`, row r of the results is made of row rows[r] / divisor of x, and
// negative entries leave their row alone. kGated: rows of x are [up, gate] of 2 k elements, and silu(gate) * up is quantised.
// Shared memory: none. Bytes moved: 2 m k in, m k out, m k / 32 of scales. Architecture: any.
#pragma once
#include "common/reduce.cuh"
#include "gemm/gemm.cuh"

namespace fi {

struct QuantiseParams {
  const void* x;        // [*, k]
  void* q;              // [m, k] e4m3
  float* scale;         // [m, k / 128]
  const int32_t* rows;  // [m] or null
  int64_t x_stride, q_stride, scale_stride;  // elements between rows
  uint32_t m, k, divisor;
};

// Config: T, kGated, kThreads
template <class Config>
FI_DEVICE void quantise_rows(const QuantiseParams& params) {
  using T = typename Config::T;
  constexpr float kMax = 448.f, kEps = 1e-10f;
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const uint32_t group = (blockIdx.x * Config::kThreads + threadIdx.x) / 16, lane = threadIdx.x % 16;
  const uint32_t groups = params.k / 128;
  const uint32_t row = group / groups, block = group % groups;
  bool valid = row < params.m;
  int64_t source = row;
  if (valid && params.rows) {
    const int32_t entry = params.rows[row];
    valid = entry >= 0;
    source = entry / int32_t(params.divisor);
  }
  float x[8] = {};
  if (valid) {
    const T* from = static_cast<const T*>(params.x) + source * params.x_stride + block * 128 + lane * 8;
    unpack8<T>(*reinterpret_cast<const uint4*>(from), x);
    if constexpr (Config::kGated) {
      float gate[8];
      unpack8<T>(*reinterpret_cast<const uint4*>(from + params.k), gate);
#pragma unroll
      for (int i = 0; i < 8; ++i) x[i] *= gate[i] * math::ptx_rcp(1.f + math::ptx_exp2(-gate[i] * math::log2e));
    }
  }
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float magnitude = fabsf(x[i]);
    amax = magnitude > amax || magnitude != magnitude ? magnitude : amax;  // NaN stays
  }
#pragma unroll
  for (int offset = 8; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kFullMask, amax, offset);
    amax = other > amax || other != other ? other : amax;
  }
  if (!valid) return;
  const float scale = (amax < kEps ? kEps : amax) / kMax;
  Vec<__nv_fp8_e4m3, 8> q;
#pragma unroll
  for (int i = 0; i < 8; ++i) q[i] = from_float<__nv_fp8_e4m3>(x[i] / scale);
  q.store(static_cast<__nv_fp8_e4m3*>(params.q) + row * params.q_stride + block * 128 + lane * 8);
  if (lane == 0) params.scale[row * params.scale_stride + block] = scale;
}

}  // namespace fi
