// Merging attention states over disjoint keys through their base-2 log-sum-exp:
//   w_i = 2^(s_i - max s), v = sum w_i v_i / sum w_i, s = max s + log2 sum w_i; a state with s = -inf weighs nothing.
// One CTA merges kItems * kUnroll (row, head) items, kItems = kThreads / (kHeadDim / kVec), one vector a thread and item;
// grid = rows * heads / (kItems * kUnroll). Values are read once: the maximum is kept online, kBatch states at a time.
// Shared memory: none. Bytes moved: the states once, the result once; a thread has kBatch (or 2 * kUnroll) vectors in
// flight. Architecture: any.
#pragma once
#include "attention/fast_div.cuh"
#include "common/early.cuh"
#include "common/math.cuh"
#include "common/vec.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct MergePairParams {
  const void* v_a;  // [rows, heads, kHeadDim]
  const void* v_b;
  const float* s_a;  // [rows, heads]
  const float* s_b;
  void* v_out;    // may be v_a
  float* s_out;   // may be s_a
  const uint8_t* mask;  // [rows]: rows with 0 are left alone (in place only); null: all rows
  int64_t va_stride_n, va_stride_h, vb_stride_n, vb_stride_h, vo_stride_n, vo_stride_h;  // elements
  int64_t sa_stride_n, sa_stride_h, sb_stride_n, sb_stride_h, so_stride_n, so_stride_h;
  uint32_t items;  // rows * heads, below 2^31
  FastDiv heads;
};

// Config: T, kHeadDim, kVec, kThreads, kUnroll, kDense (no mask, and all arrays dense: the strides are not looked at. Of so few rows
// that nothing hides a thread's instructions, those of the strides are a third.)
template <class Config>
FI_DEVICE void merge_pair(const MergePairParams& params) {
  using T = typename Config::T;
  using V = Vec<T, Config::kVec>;
  constexpr int kVec = Config::kVec, kUnroll = Config::kUnroll, kVecs = Config::kHeadDim / kVec;
  constexpr int kItems = Config::kThreads / kVecs;
  static_assert(kItems > 0);

  ptx::grid_launch_dependents();

  const uint32_t slot = threadIdx.x / kVecs, column = threadIdx.x % kVecs * kVec;
  const uint32_t first = blockIdx.x * (kItems * kUnroll) + slot;
  V a[kUnroll], b[kUnroll];
  float sa[kUnroll], sb[kUnroll];
  int64_t row[kUnroll], head[kUnroll];
  bool active[kUnroll];
  // Elements from the start of an array to an item (`n` of this thread) whose strides are given.
  auto offset = [&](int n, int64_t stride_n, int64_t stride_h, int dim) {
    if constexpr (Config::kDense) return int64_t(first + n * kItems) * dim;
    return row[n] * stride_n + head[n] * stride_h;
  };
  // Of few dense items every address is computed in front of the wait.
  constexpr bool kDirect = Config::kDense && kUnroll == 1;
  const T* own_a = static_cast<const T*>(params.v_a) + column + offset(0, 0, 0, Config::kHeadDim);
  const T* own_b = static_cast<const T*>(params.v_b) + column + offset(0, 0, 0, Config::kHeadDim);
  const float *own_sa = params.s_a + first, *own_sb = params.s_b + first;
  if constexpr (kDirect)
    grid_wait_behind(own_a, own_b, own_sa, own_sb);
  else
    ptx::grid_wait();
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    const uint32_t item = first + n * kItems;
    active[n] = (Config::kThreads % kVecs == 0 || slot < kItems) && item < params.items;
    if constexpr (!Config::kDense) {
      row[n] = params.heads.quotient(item), head[n] = item - uint32_t(row[n]) * params.heads.divisor;
      if (active[n] && params.mask) active[n] = params.mask[row[n]] != 0;
    }
    if (kDirect && active[n]) {
      sa[n] = load_here<float>(own_sa), sb[n] = load_here<float>(own_sb);
      a[n] = load_here<V>(own_a), b[n] = load_here<V>(own_b);
    } else if (active[n]) {
      sa[n] = params.s_a[offset(n, params.sa_stride_n, params.sa_stride_h, 1)];
      sb[n] = params.s_b[offset(n, params.sb_stride_n, params.sb_stride_h, 1)];
      a[n] = V::load(static_cast<const T*>(params.v_a) + column +
                     offset(n, params.va_stride_n, params.va_stride_h, Config::kHeadDim));
      b[n] = V::load(static_cast<const T*>(params.v_b) + column +
                     offset(n, params.vb_stride_n, params.vb_stride_h, Config::kHeadDim));
    }
  }
  // In place: every thread of an item has read its s before one of them writes it.
  if constexpr (32 % kVecs == 0)
    __syncwarp();
  else
    __syncthreads();
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    if (active[n]) {
      const float top = fmaxf(sa[n], sb[n]);
      const float base = top == -FI_INF ? 0.f : top;
      const float wa = math::ptx_exp2(sa[n] - base), wb = math::ptx_exp2(sb[n] - base);
      const float total = wa + wb, inverse = total == 0.f ? 0.f : __fdividef(1.f, total);  // 1 <= total <= 2, 0 or NaN
      const float left = wa * inverse, right = wb * inverse;
      float x[kVec], y[kVec];
      a[n].to_floats(x);
      b[n].to_floats(y);
      // A state that weighs nothing may hold anything, NaN included. NaN weights are passed on.
#pragma unroll
      for (int j = 0; j < kVec; ++j)
        x[j] = fmaf(left, wa == 0.f ? 0.f : x[j], wb == 0.f ? 0.f : right * y[j]);
      V::from_floats(x).store(static_cast<T*>(params.v_out) + offset(n, params.vo_stride_n, params.vo_stride_h, Config::kHeadDim) +
                              column);
      if (column == 0)
        params.s_out[offset(n, params.so_stride_n, params.so_stride_h, 1)] = base == top ? top + math::ptx_log2(total) : top;
    }
  }
}

struct MergeStatesParams {
  const void* v;   // [rows, states, heads, kHeadDim]
  const float* s;  // [rows, states, heads]
  void* v_out;     // [rows, heads, kHeadDim], dense
  float* s_out;    // [rows, heads], dense
  int64_t v_stride_n, v_stride_i, v_stride_h;  // elements
  int64_t s_stride_n, s_stride_i, s_stride_h;
  uint32_t items;  // rows * heads, below 2^31
  FastDiv heads;
  uint32_t states;
};

// Config: T, kHeadDim, kVec, kThreads, kBatch
template <class Config>
FI_DEVICE void merge_states(const MergeStatesParams& params) {
  using T = typename Config::T;
  using V = Vec<T, Config::kVec>;
  constexpr int kVec = Config::kVec, kBatch = Config::kBatch, kVecs = Config::kHeadDim / kVec;
  constexpr int kItems = Config::kThreads / kVecs;
  static_assert(kItems > 0);

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint32_t slot = threadIdx.x / kVecs, column = threadIdx.x % kVecs * kVec;
  const uint32_t item = blockIdx.x * kItems + slot;
  if (slot >= kItems || item >= params.items) return;
  const int64_t row = params.heads.quotient(item), head = item - uint32_t(row) * params.heads.divisor;
  const T* v = static_cast<const T*>(params.v) + row * params.v_stride_n + head * params.v_stride_h + column;
  const float* s = params.s + row * params.s_stride_n + head * params.s_stride_h;

  float sum[kVec] = {};
  float top = -FI_INF, total = 0.f;
  for (uint32_t i0 = 0; i0 < params.states; i0 += kBatch) {
    V values[kBatch];
    float weights[kBatch];  // log-sum-exp first
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      weights[n] = -FI_INF;
      if (i0 + n < params.states) {
        weights[n] = *s;
        values[n] = load_streaming<V>(v);
      }
      s += params.s_stride_i, v += params.v_stride_i;
    }
    float batch_top = top;
#pragma unroll
    for (int n = 0; n < kBatch; ++n) batch_top = fmaxf(batch_top, weights[n]);
    const float base = batch_top == -FI_INF ? 0.f : batch_top;
    const float rescale = math::ptx_exp2(top - base);
    top = batch_top;
    total *= rescale;
#pragma unroll
    for (int j = 0; j < kVec; ++j) sum[j] *= rescale;
#pragma unroll
    for (int n = 0; n < kBatch; ++n) {
      const float weight = math::ptx_exp2(weights[n] - base);
      if (weight != 0.f) {  // a state that weighs nothing may hold anything, NaN included
        float x[kVec];
        values[n].to_floats(x);
        total += weight;
#pragma unroll
        for (int j = 0; j < kVec; ++j) sum[j] = fmaf(weight, x[j], sum[j]);
      }
    }
  }
  const float inverse = total > 0.f ? __frcp_rn(total) : 0.f;
#pragma unroll
  for (int j = 0; j < kVec; ++j) sum[j] *= inverse;
  V::from_floats(sum).store(static_cast<T*>(params.v_out) + int64_t(item) * Config::kHeadDim + column);
  if (column == 0) params.s_out[item] = top == -FI_INF ? top : top + math::ptx_log2(total);
}

}  // namespace fi
