// fp8: out[m, n] = (a b) * a_scale * b_scale + bias for a few rows, as gemm/few.cuh: a unit of its fragments is two fp8, a step of
// 64 units 128 elements of k. Factors a row of a and a column of b at the end; or a row and 128 of k, and 128 columns and 128 of k,
// which every step's sums are multiplied with before they are added in fp32.
// grid, shared memory and what bounds it: as there. Bytes moved: n k + (n / 16) m k from L1/L2. Architecture: any.
#pragma once
#include "gemm/few.cuh"
#include "ptx/mma_fp8.cuh"

namespace fi {

struct FewFp8Params {
  const void* a;
  const void* b;
  const void* bias;  // [n] in Out, or null
  void* out;
  const float* a_scale;
  const float* b_scale;
  int64_t a_stride, b_stride, out_stride, a_batch, b_batch, out_batch;  // elements
  int64_t a_scale_row, a_scale_k, b_scale_column, b_scale_k;            // 0: one for all; column: of b, in blocks 128 of them
  uint32_t m, n, k;
};

// The factors of a lane's rows of a, 8 i + 2 t and the next, for the steps in flight.
template <class Config>
struct FewBlockScales {
  static constexpr bool kScaled = true;
  const float* a[Config::kATiles][2];
  const float* b;
  int64_t a_k, b_k;
  uint32_t k;
  float held_a[Config::kDepth][Config::kATiles][2], held_b[Config::kDepth];

  FI_DEVICE explicit FewBlockScales(const FewFp8Params& p) : a_k(p.a_scale_k), b_k(p.b_scale_k), k(p.k / 2) {
#pragma unroll
    for (int i = 0; i < Config::kATiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32_t row = blockIdx.y * FewShape<Config>::kRows + 8 * i + 2 * (lane_id() & 3) + h;
        a[i][h] = p.a_scale + min(row, p.m - 1) * p.a_scale_row;
      }
    b = p.b_scale + blockIdx.x * FewShape<Config>::kColumns / 128 * p.b_scale_column;
  }
  FI_DEVICE void load(int d, uint32_t step) {
    const uint32_t block = step / 64;
    if (step >= k) return;  // its products are zeros
    held_b[d] = b[block * b_k];
#pragma unroll
    for (int i = 0; i < Config::kATiles; ++i)
#pragma unroll
      for (int h = 0; h < 2; ++h) held_a[d][i][h] = a[i][h][block * a_k];
  }
  FI_DEVICE float at(int d, int i, int h) const { return held_a[d][i][h] * held_b[d]; }
};

// Config: FewShape's, and TA, TB, Out, kBlocks
template <class Config>
FI_DEVICE void gemm_few_fp8(const FewFp8Params& params) {
  using Out = typename Config::Out;
  using Shape = FewShape<Config>;
  constexpr int kWarpsK = Config::kWarpsK, kRows = Shape::kRows, kPitch = Shape::kPitch;
  __shared__ __align__(16) float partial[kWarpsK][kRows][kPitch];

  ptx::grid_launch_dependents();
  const FewOperands operands{
      reinterpret_cast<const uint16_t*>(static_cast<const uint8_t*>(params.a) + blockIdx.z * params.a_batch),
      reinterpret_cast<const uint16_t*>(static_cast<const uint8_t*>(params.b) + blockIdx.z * params.b_batch),
      params.a_stride / 2, params.b_stride / 2, params.m, params.n, params.k / 2};
  // The weight is the left operand.
  auto mma = [](float(&c)[4], const uint32_t(&fw)[4], const uint32_t(&fa)[2]) {
    ptx::mma_m16n8k32<typename Config::TB, typename Config::TA>(c, fw, fa);
  };
  if constexpr (Config::kBlocks) {
    FewBlockScales<Config> scales(params);
    few_partials<Config>(operands, partial, mma, scales);
  } else {
    FewUnscaled unscaled;
    few_partials<Config>(operands, partial, mma, unscaled);
  }

  const uint32_t n_first = blockIdx.x * Shape::kColumns, m_first = blockIdx.y * Shape::kRows;
  Out* out = static_cast<Out*>(params.out) + blockIdx.z * params.out_batch;
  for (uint32_t e = threadIdx.x; e < Shape::kRows * Shape::kColumns / 2; e += Shape::kThreads) {
    const uint32_t r = e / (Shape::kColumns / 2), c = e % (Shape::kColumns / 2) * 2;
    const uint32_t row = m_first + r, column = n_first + c;
    if (row >= params.m || column >= params.n) continue;
    float2 sum = Shape::total(partial, r, c);
    if constexpr (!Config::kBlocks) {
      const float scale = params.a_scale[row * params.a_scale_row];
      sum.x *= scale * params.b_scale[column * params.b_scale_column];
      sum.y *= scale * params.b_scale[(column + 1) * params.b_scale_column];
      if (params.bias != nullptr) {
        const Out* const bias = static_cast<const Out*>(params.bias) + column;
        sum.x += to_float(bias[0]), sum.y += to_float(bias[1]);
      }
    }
    store2(out + row * params.out_stride + column, sum.x, sum.y);
  }
}

}  // namespace fi
