// out[m, n] = a b + bias + residual for few rows (5 to about 64) on the tensor cores, with b straight from global memory to fragments.
// One CTA computes 16 kMTiles rows x 8 kNTiles columns; grid = (ceil(n / columns), ceil(m / rows), batch). Its kWarpsK
// warps share k: warp w takes the 64-element steps w, w + kWarpsK, ... and the partial tiles meet in shared memory in warp
// order. A lane's 16 bytes of a W row (b's memory, [n, k]) are the fragment of two k16 steps: mma.sync sums over k in any
// order, so a is loaded with the same permutation and neither shuffles nor shared memory are needed for either operand.
// kWide reads 4 rows x 128 B an instruction instead of 8 x 64 B (better on long streams): fragment column 2r + h then
// holds half h of row r's 64 elements, and twice the mma, into an accumulator a half, keep what is wanted on the diagonal.
// kAhead: a goes through a ring of registers as deep as the weight's, for short k where its latency shows.
// Shared memory: the partial tiles, at most 48 KB. Bytes moved: n k + (n / columns) m k from L1/L2.
// Architecture: any (bf16 below sm_80 runs on the CUDA cores).
#pragma once
#include "gemm/gemm.cuh"

namespace fi {

// Config: T, Out, Epilogue, kMTiles, kNTiles, kWide, kAhead, kDepth (steps of W in registers), kWarpsK, kResidual (there
// is one), kOnce (all of k: 64 kDepth kWarpsK or less)
template <class Config>
FI_DEVICE void gemm_stream(const GemmParams& params) {
  using T = typename Config::T;
  using Out = typename Config::Out;
  constexpr int kMTiles = Config::kMTiles, kNTiles = Config::kNTiles, kDepth = Config::kDepth;
  constexpr int kWarpsK = Config::kWarpsK;
  constexpr bool kWide = Config::kWide;
  constexpr int kRows = 16 * kMTiles, kColumns = 8 * kNTiles, kThreads = kWarpsK * kWarpSize;
  constexpr uint32_t kStride = 64 * kWarpsK;
  // Padding keeps the float2 stores of 8 fragment rows on different banks.
  constexpr int kPitch = kColumns + (kNTiles > 1 ? 8 : 0);
  // Large tiles: the upper half of the warps hands its sums to the lower half first, so that all fits in 48 KB.
  constexpr bool kFold = kWarpsK * kRows * kPitch * 4 > 48 * 1024;
  constexpr int kParts = kFold ? kWarpsK / 2 : kWarpsK;
  static_assert(!kFold || kWarpsK % 2 == 0, "the fold pairs warps");
  __shared__ __align__(16) float partial[kParts][kRows][kPitch];

  ptx::grid_launch_dependents();
  const int lane = lane_id(), warp = warp_id(), g = lane >> 2, t = lane & 3;
  const uint32_t n_first = blockIdx.x * kColumns, m_first = blockIdx.y * kRows;

  // Two loads a step and tile. Narrow: row g, 32-element half i. Wide: row 4 i + lane / 8, all 64 elements.
  const T* w[kNTiles][2];
#pragma unroll
  for (int nt = 0; nt < kNTiles; ++nt)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t row = min(n_first + 8 * nt + (kWide ? 4 * i + (lane >> 3) : g), params.n - 1);
      w[nt][i] = static_cast<const T*>(params.b) + blockIdx.z * params.b_batch + row * params.b_stride;
    }
  const uint32_t w_k[2] = {uint32_t(kWide ? 8 * (lane & 7) : 8 * t), uint32_t(kWide ? 8 * (lane & 7) : 32 + 8 * t)};
  uint4 ring[kDepth][kNTiles][2];
  auto fill = [&](uint4(&slot)[kNTiles][2], uint32_t step) {
#pragma unroll
    for (int nt = 0; nt < kNTiles; ++nt)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t k = step + w_k[i];
        slot[nt][i] = k < params.k ? load_weight(w[nt][i] + k) : make_uint4(0, 0, 0, 0);
      }
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) fill(ring[d], warp * 64 + d * kStride);

  // Rows m_first + 16 mt + 8 h + g of a; zero past the ends.
  constexpr bool kAhead = Config::kAhead, kOnce = Config::kOnce;
  const T* a[kMTiles][2];
  bool a_row[kMTiles][2];
#pragma unroll
  for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t row = m_first + 16 * mt + 8 * h + g;
      a_row[mt][h] = row < params.m;
      a[mt][h] = static_cast<const T*>(params.a) +
                 computed_here<kOnce>(blockIdx.z * params.a_batch + min(row, params.m - 1) * params.a_stride + 8 * t);
    }
  ptx::grid_wait();  // weights are constant, a is what the kernel before this one wrote
  auto load_a = [&](int mt, int h, uint32_t k) {
    if (!a_row[mt][h] || k + 8 * t >= params.k) return make_uint4(0, 0, 0, 0);
    return load_rows<kAhead && kOnce>(a[mt][h] + k);
  };
  uint4 ahead[kAhead ? kDepth : 1][kAhead ? kMTiles : 1][2][2];
  auto fill_a = [&](int d, uint32_t step) {
    if constexpr (kAhead) {
#pragma unroll
      for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
          for (int h = 0; h < 2; ++h) ahead[d][mt][half][h] = load_a(mt, h, step + 32 * half);
    }
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) fill_a(d, warp * 64 + d * kStride);
  // Two columns a thread; with kResidual that of a thread's first ones is on its way while the product is computed.
  constexpr uint32_t kPairs = kRows * kColumns / 2;
  auto row_of = [&](uint32_t e) { return m_first + e / (kColumns / 2); };
  auto column_of = [&](uint32_t e) { return n_first + e % (kColumns / 2) * 2; };
  auto inside = [&](uint32_t e) { return e < kPairs && row_of(e) < params.m && column_of(e) < params.n; };
  uint2 held = make_uint2(0, 0);
  if (Config::kResidual && inside(threadIdx.x))
    held = typename Config::Epilogue(params).residual_bits2(row_of(threadIdx.x), column_of(threadIdx.x));

  constexpr int kAccs = kWide ? 4 : 1;  // wide: load i, half h of the step, at 2 i + h
  float acc[kMTiles][kNTiles][kAccs][4] = {};
  for (uint32_t base = warp * 64; base < params.k; base += kDepth * kStride) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const uint32_t step = base + d * kStride;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int mt = 0; mt < kMTiles; ++mt) {
          uint4 lo, hi;
          if constexpr (kAhead) {
            lo = ahead[d][mt][half][0], hi = ahead[d][mt][half][1];
          } else {
            lo = load_a(mt, 0, step + 32 * half), hi = load_a(mt, 1, step + 32 * half);
          }
          const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y}, second[4] = {lo.z, hi.z, lo.w, hi.w};
#pragma unroll
          for (int nt = 0; nt < kNTiles; ++nt)
#pragma unroll
            for (int i = kWide ? 0 : half; i < (kWide ? 2 : half + 1); ++i) {
              const uint4 v = ring[d][nt][i];
              const uint32_t b_first[2] = {v.x, v.y}, b_second[2] = {v.z, v.w};
              float(&c)[4] = acc[mt][nt][kWide ? 2 * i + half : 0];
              ptx::mma_m16n8k16<T>(c, first, b_first);
              ptx::mma_m16n8k16<T>(c, second, b_second);
            }
        }
      }
      if constexpr (!kOnce) {
        fill(ring[d], step + kDepth * kStride);
        fill_a(d, step + kDepth * kStride);
      }
    }
    if constexpr (kOnce) break;
  }

  float* flat = &partial[0][0][0];
  constexpr int kFragments = kMTiles * kNTiles * kAccs * 4;
  float(&sums)[kFragments] = reinterpret_cast<float(&)[kFragments]>(acc);
  if constexpr (kFold) {
    static_assert(kFragments * kWarpSize <= kRows * kPitch, "a warp's fragments fit in one partial tile");
    if (warp >= kParts) {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) flat[((warp - kParts) * kFragments + i) * kWarpSize + lane] = sums[i];
    }
    __syncthreads();  // the upper warps' sums are in shared memory
    if (warp < kParts) {
#pragma unroll
      for (int i = 0; i < kFragments; ++i) sums[i] += flat[(warp * kFragments + i) * kWarpSize + lane];
    }
    __syncthreads();  // the lower warps have read them
  }
  if (!kFold || warp < kParts) {
#pragma unroll
    for (int mt = 0; mt < kMTiles; ++mt)
#pragma unroll
      for (int nt = 0; nt < kNTiles; ++nt) {
        float(&c)[kAccs][4] = acc[mt][nt];
        float* lo = &partial[warp][16 * mt + g][8 * nt];
        float* hi = lo + 8 * kPitch;
        if constexpr (kWide) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            lo[4 * i + t] = c[2 * i][0] + c[2 * i + 1][1];
            hi[4 * i + t] = c[2 * i][2] + c[2 * i + 1][3];
          }
        } else {
          *reinterpret_cast<float2*>(lo + 2 * t) = make_float2(c[0][0], c[0][1]);
          *reinterpret_cast<float2*>(hi + 2 * t) = make_float2(c[0][2], c[0][3]);
        }
      }
  }
  __syncthreads();  // every partial tile is in shared memory

  const typename Config::Epilogue epilogue(params);
  Out* out = static_cast<Out*>(params.out) + blockIdx.z * params.out_batch;
  for (uint32_t e = threadIdx.x; e < kPairs; e += kThreads) {
    if (!inside(e)) continue;
    const uint32_t row = row_of(e), column = column_of(e), r = row - m_first, c = column - n_first;
    float2 total = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const float2 part = *reinterpret_cast<const float2*>(&partial[i][r][c]);
      total.x += part.x;
      total.y += part.y;
    }
    Out* const to = out + row * params.out_stride + column;
    if constexpr (Config::kResidual) {
      const float2 residual = epilogue.residual_of(e == threadIdx.x ? held : epilogue.residual_bits2(row, column));
      store2(to, epilogue.plus(total.x, residual.x, column), epilogue.plus(total.y, residual.y, column + 1));
    } else {
      store2(to, epilogue(total.x, row, column), epilogue(total.y, row, column + 1));
    }
  }
}

}  // namespace fi
