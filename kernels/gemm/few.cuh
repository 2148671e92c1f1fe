// out[m, n] = a b + bias + residual for a few rows on the tensor cores: the weight is the left operand, 16 of its rows (b's
// memory, [n, k]) a fragment, straight from global memory to registers; eight rows of a are the right operand.
// One CTA computes 8 kATiles rows x 16 kWTiles columns (8 kWTiles when kGated); grid = (ceil(n / columns), ceil(m / rows),
// batch). Its kWarpsK warps share k: warp w takes the 64-element steps w, w + kWarpsK, ... and the partial tiles meet in
// shared memory in warp order. A lane's 16 bytes are the fragment of two k16 steps: mma.sync sums over k in any order, so
// a is loaded with the same permutation and neither shuffles nor shared memory are needed for the operands.
// kWide reads 4 rows x 128 B an instruction instead of 8 x 64 B: fragment row 2r + h then holds half h of row r's 64
// elements, and twice the mma, into an accumulator a half, keep what is wanted in the rows of that parity.
// kGated: b has 2 n columns, gate first; a fragment holds eight gate rows above the eight up rows of the same columns.
// kAhead: a goes through a ring of registers as deep as the weight's, for short k where its latency shows.
// Shared memory: the partial tiles, at most 48 KB. Bytes moved: n k + (n / columns) m k from L1/L2.
// Architecture: any (bf16 below sm_80 runs on the CUDA cores).
#pragma once
#include "gemm/gemm.cuh"

namespace fi {

// Operands in units of 16 bits: one element, or two of fp8.
struct FewOperands {
  const uint16_t* a;  // this batch's
  const uint16_t* b;
  int64_t a_stride, b_stride;
  uint32_t m, n, k;
};

// Sums that need no factor before the end.
struct FewUnscaled {
  static constexpr bool kScaled = false;
  FI_DEVICE void load(int, uint32_t) {}
  FI_DEVICE float at(int, int, int) const { return 1.f; }
  FI_DEVICE void see(int, const uint4&) {}
  FI_DEVICE void post() {}
};

struct FewNothing {
  FI_DEVICE void operator()() const {}
};

// Config: kATiles, kWTiles, kWide, kGated, kAhead, kDepth (steps of W in registers), kWarpsK, kOnce (all of k: 64 kDepth kWarpsK or less)
template <class Config>
struct FewShape {
  static constexpr int kRows = 8 * Config::kATiles, kPartColumns = 16 * Config::kWTiles;
  static constexpr int kColumns = Config::kGated ? 8 * Config::kWTiles : kPartColumns;
  static constexpr int kThreads = Config::kWarpsK * kWarpSize;
  static constexpr int kPitch = kPartColumns + 2;  // the pad spreads fragment columns over banks
  using Partial = float[Config::kWarpsK][kRows][kPitch];

  // Sum of all warps' partial tiles at a row and two columns; at r * kPitch + c.
  FI_DEVICE static float2 total(const Partial& partial, uint32_t r, uint32_t c) { return total(partial, r * kPitch + c); }
  FI_DEVICE static float2 total(const Partial& partial, uint32_t at) {
    float2 sum = make_float2(0.f, 0.f);
#pragma unroll
    for (int i = 0; i < Config::kWarpsK; ++i) {
      const float2 part = *reinterpret_cast<const float2*>(&partial[i][0][0] + at);
      sum.x += part.x;
      sum.y += part.y;
    }
    return sum;
  }
};

// The partial tiles of a CTA's warps, in shared memory when it returns. mma(c, a, b) multiplies fragments; `scales` has a factor for
// each step of 64 units and row of a (`FewUnscaled`: none), loaded a ring's depth ahead; it sees every lane's share of a, too, and may
// post what it makes of it to shared memory in front of the last barrier. ahead() asks for what the predecessor in the stream wrote.
template <class Config, class Mma, class Scales, class Ahead = FewNothing>
FI_DEVICE void few_partials(const FewOperands& operands, typename FewShape<Config>::Partial& partial, Mma mma, Scales& scales,
                            Ahead ahead_of_sums = {}) {
  constexpr int kATiles = Config::kATiles, kWTiles = Config::kWTiles, kDepth = Config::kDepth;
  constexpr bool kWide = Config::kWide, kGated = Config::kGated, kAhead = Config::kAhead, kOnce = Config::kOnce;
  constexpr int kRows = FewShape<Config>::kRows, kColumns = FewShape<Config>::kColumns, kPitch = FewShape<Config>::kPitch;
  constexpr uint32_t kStride = 64 * Config::kWarpsK;
  const int lane = lane_id(), warp = warp_id(), g = lane >> 2, t = lane & 3;
  const uint32_t n_first = blockIdx.x * kColumns, m_first = blockIdx.y * kRows;

  // Four loads a step and tile. Narrow: rows g and g + 8, two halves of 32. Wide: row 4 i + lane / 8, all 64 units.
  constexpr int kPointers = kWide ? 4 : 2;
  const uint16_t* w[kWTiles][kPointers];
#pragma unroll
  for (int wt = 0; wt < kWTiles; ++wt)
#pragma unroll
    for (int i = 0; i < kPointers; ++i) {
      const int r = kWide ? 4 * i + (lane >> 3) : 8 * i + g;  // row of the fragment
      uint32_t row;
      if constexpr (kGated) {
        row = min(n_first + 8 * wt + r % 8, operands.n - 1) + (r < 8 ? 0 : operands.n);
      } else {
        row = min(n_first + 16 * wt + r, operands.n - 1);  // rows past the end read the last one; their sums are not stored
      }
      w[wt][i] = operands.b + row * operands.b_stride + (kWide ? 8 * (lane & 7) : 8 * t);
    }
  uint4 ring[kDepth][kWTiles][4];
  auto fill = [&](uint4(&slot)[kWTiles][4], uint32_t step) {
#pragma unroll
    for (int wt = 0; wt < kWTiles; ++wt)
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // narrow: i = 2 half + (upper rows)
        const uint32_t at = step + (kWide ? 0 : i / 2 * 32);
        const bool inside = at + (kWide ? 8 * (lane & 7) : 8 * t) < operands.k;
        slot[wt][i] = inside ? load_weight(w[wt][kWide ? i : i % 2] + at) : make_uint4(0, 0, 0, 0);
      }
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) fill(ring[d], warp * 64 + d * kStride);

  const uint16_t* a[kATiles];
  bool a_row[kATiles];
#pragma unroll
  for (int i = 0; i < kATiles; ++i) {
    const uint32_t row = m_first + 8 * i + g;
    a_row[i] = row < operands.m;
    a[i] = operands.a + computed_here<kOnce>(min(row, operands.m - 1) * operands.a_stride + 8 * t);
  }
  ptx::grid_wait();  // weights are constant, a is what the kernel before this one wrote
  auto load_a = [&](int i, uint32_t k) {
    if (!a_row[i] || k + 8 * t >= operands.k) return make_uint4(0, 0, 0, 0);
    return load_rows<kAhead && kOnce>(a[i] + k);
  };
  uint4 ahead[kAhead ? kDepth : 1][kAhead ? kATiles : 1][2];
  auto fill_a = [&](int d, uint32_t step) {
    if constexpr (kAhead) {
#pragma unroll
      for (int i = 0; i < kATiles; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) ahead[d][i][half] = load_a(i, step + 32 * half);
    }
    scales.load(d, step);
  };
#pragma unroll
  for (int d = 0; d < kDepth; ++d) fill_a(d, warp * 64 + d * kStride);
  ahead_of_sums();

  // Wide: fragment rows of loads 2 p and 2 p + 1, half h of the step, at 2 p + h. Narrow, several steps at once: half h at h, so that
  // fewer products wait for one another.
  constexpr int kAccs = kWide ? 4 : kOnce && kDepth > 1 ? 2 : 1;
  float acc[kWTiles][kATiles][kAccs][4] = {};
  float sums[Scales::kScaled ? kWTiles : 1][Scales::kScaled ? kATiles : 1][kAccs][4] = {};
  for (uint32_t base = warp * 64; base < operands.k; base += kDepth * kStride) {
#pragma unroll
    for (int d = 0; d < kDepth; ++d) {
      const uint32_t step = base + d * kStride;
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < kATiles; ++i) {
          uint4 x;
          if constexpr (kAhead) {
            x = ahead[d][i][half];
          } else {
            x = load_a(i, step + 32 * half);
          }
          scales.see(i, x);
          const uint32_t x_first[2] = {x.x, x.y}, x_second[2] = {x.z, x.w};
#pragma unroll
          for (int wt = 0; wt < kWTiles; ++wt)
#pragma unroll
            for (int p = 0; p < (kWide ? 2 : 1); ++p) {
              const uint4 lo = ring[d][wt][kWide ? 2 * p : 2 * half], hi = ring[d][wt][(kWide ? 2 * p : 2 * half) + 1];
              const uint32_t first[4] = {lo.x, hi.x, lo.y, hi.y}, second[4] = {lo.z, hi.z, lo.w, hi.w};
              float(&c)[4] = acc[wt][i][kWide ? 2 * p + half : kAccs == 2 ? half : 0];
              mma(c, first, x_first);
              mma(c, second, x_second);
            }
        }
      if constexpr (Scales::kScaled) {
#pragma unroll
        for (int wt = 0; wt < kWTiles; ++wt)
#pragma unroll
          for (int i = 0; i < kATiles; ++i)
#pragma unroll
            for (int q = 0; q < kAccs; ++q)
#pragma unroll
              for (int e = 0; e < 4; ++e) {
                sums[wt][i][q][e] = fmaf(acc[wt][i][q][e], scales.at(d, i, e & 1), sums[wt][i][q][e]);
                acc[wt][i][q][e] = 0.f;
              }
      }
      if constexpr (!kOnce) {
        fill(ring[d], step + kDepth * kStride);
        fill_a(d, step + kDepth * kStride);
      }
    }
    if constexpr (kOnce) break;
  }

#pragma unroll
  for (int wt = 0; wt < kWTiles; ++wt)
#pragma unroll
    for (int i = 0; i < kATiles; ++i) {
      float(&c)[kAccs][4] = Scales::kScaled ? sums[Scales::kScaled ? wt : 0][Scales::kScaled ? i : 0] : acc[wt][i];
      float* row = &partial[warp][8 * i + 2 * t][16 * wt];  // rows 2 t and 2 t + 1 of a
      if constexpr (kWide) {
#pragma unroll
        for (int p = 0; p < 2; ++p)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float own = g & 1 ? c[2 * p + 1][e] : c[2 * p][e];
            const float sum = own + __shfl_xor_sync(kFullMask, own, 4);  // both halves of a W row
            if (!(g & 1)) row[(e & 1) * kPitch + 8 * p + 4 * (e >> 1) + (g >> 1)] = sum;
          }
      } else {
#pragma unroll
        for (int e = 0; e < 4; ++e) row[(e & 1) * kPitch + 8 * (e >> 1) + g] = kAccs == 2 ? c[0][e] + c[kAccs - 1][e] : c[0][e];
      }
    }
  scales.post();
  __syncthreads();  // every partial tile is in shared memory
}

// The CTA's tile of the product of 16-bit operands; factor(r) multiplies the sums of its row r before the epilogue. Config:
// FewShape's, and T, Out, Epilogue, kResidual (there is one)
template <class Config, class Scales, class Factor>
FI_DEVICE void few_tile(const GemmParams& params, Scales& scales, Factor factor) {
  using T = typename Config::T;
  using Out = typename Config::Out;
  using Shape = FewShape<Config>;
  constexpr int kWarpsK = Config::kWarpsK, kRows = Shape::kRows, kPitch = Shape::kPitch;
  __shared__ __align__(16) float partial[kWarpsK][kRows][kPitch];

  ptx::grid_launch_dependents();
  const FewOperands operands{static_cast<const uint16_t*>(params.a) + blockIdx.z * params.a_batch,
                             static_cast<const uint16_t*>(params.b) + blockIdx.z * params.b_batch,
                             params.a_stride, params.b_stride, params.m, params.n, params.k};
  const uint32_t n_first = blockIdx.x * Shape::kColumns, m_first = blockIdx.y * Shape::kRows;
  // Two columns a thread; with kResidual that of a thread's first ones is on its way while the product is computed.
  constexpr uint32_t kPairs = kRows * Shape::kColumns / 2;
  auto row_of = [&](uint32_t e) { return m_first + e / (Shape::kColumns / 2); };
  auto column_of = [&](uint32_t e) { return n_first + e % (Shape::kColumns / 2) * 2; };
  auto inside = [&](uint32_t e) { return e < kPairs && row_of(e) < params.m && column_of(e) < params.n; };
  uint2 held = make_uint2(0, 0);
  Out* const out = static_cast<Out*>(params.out) + blockIdx.z * params.out_batch;
  constexpr bool kOnce = Config::kOnce;
  Out* const first = out + computed_here<kOnce>(row_of(threadIdx.x) * params.out_stride + column_of(threadIdx.x));
  constexpr bool kSingle = kPairs <= Shape::kThreads;  // a thread has at most one pair
  // What stands behind the last barrier is waited for, so where there is no bias a thread knows before it what to do with its pair.
  constexpr bool kStraight = kSingle && kOnce;
  uint32_t own_row = 0, own_at = 0, plain = 0, absent = 0;  // of the pair: row and place in a partial tile
  few_partials<Config>(
      operands, partial,
      [](float(&c)[4], const uint32_t(&fa)[4], const uint32_t(&fb)[2]) { ptx::mma_m16n8k16<T>(c, fa, fb); }, scales,
      [&] {
        if (Config::kResidual && inside(threadIdx.x))
          held = typename Config::Epilogue(params).residual_bits2(row_of(threadIdx.x), column_of(threadIdx.x));
        if constexpr (kStraight) {
          own_row = threadIdx.x / (Shape::kColumns / 2);
          const uint32_t c = threadIdx.x % (Shape::kColumns / 2) * 2;
          own_at = own_row * kPitch + (Config::kGated ? c / 8 * 16 + c % 8 : c);
          plain = !params.bias && (Config::kResidual || !params.residual), absent = !inside(threadIdx.x);
          asm volatile("" : "+r"(own_row), "+r"(own_at), "+r"(plain), "+r"(absent));
        }
      });

  using Epilogue = typename Config::Epilogue;
  if constexpr (kStraight) {
    if (plain) {
      if (absent) return;
      const float f = factor(own_row);
      const float2 sum = Shape::total(partial, own_at);
      if constexpr (Config::kGated) {
        const float2 up = Shape::total(partial, own_at + 8);
        store2(first, Epilogue::gated(f * sum.x, f * up.x), Epilogue::gated(f * sum.y, f * up.y));
      } else if constexpr (Config::kResidual) {
        const float2 residual = Epilogue::residual_of(held);
        store2(first, f * sum.x + residual.x, f * sum.y + residual.y);
      } else {
        store2(first, f * sum.x, f * sum.y);
      }
      return;
    }
  }
  const Epilogue epilogue(params);
  for (uint32_t e = threadIdx.x; e < kPairs; e += kSingle ? kPairs : Shape::kThreads) {
    if (!inside(e)) continue;
    const uint32_t row = row_of(e), column = column_of(e), r = row - m_first, c = column - n_first;
    Out* to = kSingle && kOnce ? first : out + row * params.out_stride + column;
    const float f = factor(r);
    if constexpr (Config::kGated) {
      const uint32_t part = c / 8 * 16 + c % 8;
      const float2 gate = Shape::total(partial, r, part), up = Shape::total(partial, r, part + 8);
      store2(to, epilogue.gated(f * gate.x, f * up.x, row, column),
             epilogue.gated(f * gate.y, f * up.y, row, column + 1));
    } else if constexpr (!Config::kResidual) {
      const float2 sum = Shape::total(partial, r, c);
      store2(to, epilogue(f * sum.x, row, column), epilogue(f * sum.y, row, column + 1));
    } else {
      const float2 sum = Shape::total(partial, r, c);
      const float2 residual = epilogue.residual_of(e == threadIdx.x ? held : epilogue.residual_bits2(row, column));
      store2(to, epilogue.plus(f * sum.x, residual.x, column), epilogue.plus(f * sum.y, residual.y, column + 1));
    }
  }
}

template <class Config>
FI_DEVICE void gemm_few(const GemmParams& params) {
  FewUnscaled unscaled;
  few_tile<Config>(params, unscaled, [](uint32_t) { return 1.f; });
}

}  // namespace fi
