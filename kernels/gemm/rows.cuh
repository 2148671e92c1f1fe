// out[m, n] = a b + bias + residual for m <= 4 on the CUDA cores: b is read once, at the speed of memory.
// One CTA computes all m rows of kWarpsN * kRows * (32 / kLanes) columns ("rows of W", W = b's memory, [n, k]);
// grid = (ceil(n / columns), 1, batch). kLanes lanes read 16 bytes each of one W row; a warp holds kDepth * kRows such
// loads in registers, all issued before the first is used and each slot refilled right after its use. kWarpsK warps share
// k; their sums meet in shared memory in warp order, so results repeat bit for bit. Rows of a come through L1; kAhead
// requests them as early as the weight, for short k where their latency would show once for every load.
// Many small CTAs (thousands of 1-4 columns) stream faster than few large ones: no persistence.
// Shared memory: kWarpsK * kM * columns floats. Bytes moved: n k + m (n + k). Architecture: any.
#pragma once
#include "common/reduce.cuh"
#include "gemm/gemm.cuh"

namespace fi {

// Config: T, Out, Epilogue, kM (rows of a, at least m), kLanes (8, 16 or 32), kRows, kDepth, kWarpsK, kWarpsN, kAhead, kResidual (there is one),
// kOnce (all of k: 8 kLanes kDepth kWarpsK or less)
template <class Config>
FI_DEVICE void gemm_rows(const GemmParams& params) {
  using T = typename Config::T;
  using Out = typename Config::Out;
  constexpr int kM = Config::kM, kLanes = Config::kLanes, kRows = Config::kRows, kDepth = Config::kDepth;
  constexpr int kWarpsK = Config::kWarpsK, kWarpsN = Config::kWarpsN;
  constexpr int kGroups = kWarpSize / kLanes;  // W rows under one load instruction of a warp
  constexpr int kColumns = kWarpsN * kRows * kGroups;
  constexpr uint32_t kStep = kLanes * 8;         // elements of k under one load
  constexpr uint32_t kStride = kStep * kWarpsK;  // a warp's next load: neighbouring warps read neighbouring pieces
  __shared__ float partial[kWarpsK][kM][kColumns];

  ptx::grid_launch_dependents();
  const int warp_k = warp_id() % kWarpsK, warp_n = warp_id() / kWarpsK;
  const int group = lane_id() / kLanes;
  const uint32_t k_first = warp_k * kStep + lane_id() % kLanes * 8;
  const uint32_t n_first = blockIdx.x * kColumns;
  const int c_first = warp_n * kRows * kGroups + group;  // column r of this lane: c_first + r * kGroups

  // W rows past the end read the last row; their sums are not stored.
  const T* w[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const uint32_t row = min(n_first + c_first + r * kGroups, params.n - 1);
    w[r] = static_cast<const T*>(params.b) + blockIdx.z * params.b_batch + row * params.b_stride;
  }
  uint4 ring[kDepth][kRows];
  auto fill = [&](uint4(&slot)[kRows], uint32_t k) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      slot[r] = k < params.k ? load_weight(w[r] + k) : make_uint4(0, 0, 0, 0);
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) fill(ring[d], k_first + d * kStride);

  constexpr bool kOnce = Config::kOnce;
  const T* a[kM];
#pragma unroll
  for (int i = 0; i < kM; ++i)
    a[i] = static_cast<const T*>(params.a) +
           computed_here<kOnce>(blockIdx.z * params.a_batch + min(uint32_t(i), params.m - 1) * params.a_stride);
  constexpr bool kSingle = kM * kColumns <= kWarpsK * kWarpsN * kWarpSize;  // a thread has at most one element of the result
  const uint32_t own_row = threadIdx.x / kColumns, own_column = n_first + threadIdx.x % kColumns;
  const bool own_inside = own_row < min(params.m, uint32_t(kM)) && own_column < params.n;
  Out* const out = static_cast<Out*>(params.out) + blockIdx.z * params.out_batch;
  Out* const own = out + computed_here<kOnce>(own_row * params.out_stride + own_column);
  ptx::grid_wait();  // weights are constant, a is what the kernel before this one wrote

  constexpr bool kAhead = Config::kAhead;
  uint4 ahead[kAhead ? kDepth : 1][kM];
  auto load_a = [&](uint4(&x)[kM], uint32_t k) {
#pragma unroll
    for (int i = 0; i < kM; ++i)
      x[i] = k < params.k ? load_rows<kAhead && kOnce>(a[i] + k) : make_uint4(0, 0, 0, 0);
  };
  if constexpr (kAhead) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) load_a(ahead[d], k_first + d * kStride);
  }
  uint32_t held = 0;
  if constexpr (Config::kResidual) {  // that of a thread's first element is on its way while the product is computed
    const typename Config::Epilogue epilogue(params);
    if (own_inside) held = epilogue.residual_bits(own_row, own_column);
  }
  // What stands behind the last barrier is waited for, so where there is no bias a thread knows before it what to do with its element.
  constexpr bool kStraight = kSingle && kOnce;
  uint32_t own_at = threadIdx.x, plain = 0, absent = 0;  // place in a warp's sums
  if constexpr (kStraight) {
    plain = !params.bias && (Config::kResidual || !params.residual), absent = !own_inside;
    asm volatile("" : "+r"(own_at), "+r"(plain), "+r"(absent));
  }

  constexpr int kChains = kOnce ? 2 : 1;  // of dependent additions
  float sum[kM][kRows][kChains] = {};
  for (uint32_t base = k_first; base < params.k; base += kDepth * kStride) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const uint32_t k = base + d * kStride;
      if constexpr (!kAhead) load_a(ahead[0], k);
      float x[kM][8];
#pragma unroll
      for (int i = 0; i < kM; ++i) unpack8<T>(ahead[kAhead ? d : 0][i], x[i]);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float v[8];
        unpack8<T>(ring[d][r], v);
#pragma unroll
        for (int i = 0; i < kM; ++i)
#pragma unroll
          for (int j = 0; j < 8; ++j) sum[i][r][j % kChains] = fmaf(v[j], x[i][j], sum[i][r][j % kChains]);
      }
      if constexpr (!kOnce) {
        fill(ring[d], k + kDepth * kStride);
        if constexpr (kAhead) load_a(ahead[d], k + kDepth * kStride);
      }
    }
    if constexpr (kOnce) break;
  }

#pragma unroll
  for (int i = 0; i < kM; ++i)
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float total = warp_reduce<Sum, kLanes>(kOnce ? sum[i][r][0] + sum[i][r][kChains - 1] : sum[i][r][0]);
      if (lane_id() % kLanes == 0) partial[warp_k][i][c_first + r * kGroups] = total;
    }
  __syncthreads();  // every warp's partial sums are in shared memory

  using Epilogue = typename Config::Epilogue;
  if constexpr (kStraight) {
    if (plain) {
      if (absent) return;
      float total = 0.f;
#pragma unroll
      for (int i = 0; i < kWarpsK; ++i) total += (&partial[i][0][0])[own_at];
      if constexpr (Config::kResidual) total += Epilogue::residual_of(make_uint2(held, 0)).x;
      *own = from_float<Out>(total);
      return;
    }
  }
  const Epilogue epilogue(params);
  for (uint32_t e = threadIdx.x; e < kM * kColumns; e += kSingle ? kM * kColumns : kWarpsK * kWarpsN * kWarpSize) {
    const uint32_t row = e / kColumns, c = e % kColumns, column = n_first + c;
    if (row >= params.m || column >= params.n) continue;
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < kWarpsK; ++i) total += partial[i][row][c];
    if constexpr (Config::kResidual) {
      const uint32_t bits = e == threadIdx.x ? held : epilogue.residual_bits(row, column);
      total = epilogue.plus(total, epilogue.residual_of(make_uint2(bits, 0)).x, column);
    } else {
      total = epilogue(total, row, column);
    }
    *(kSingle && kOnce ? own : out + row * params.out_stride + column) = from_float<Out>(total);
  }
}

}  // namespace fi
