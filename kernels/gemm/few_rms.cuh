// out[m, n] = norm(a) b + bias + residual for a few rows, norm(x) = x / sqrt(mean(x^2) + eps): gemm/few.cuh with RMSNorm in it (a
// norm's weight belongs into b). The factor of a row is the same for all its sums, so the product does not wait for it: each lane
// squares its share of a as it multiplies, and the factor comes in front of the epilogue.
// Grid, shared memory (8 bytes a warp and row more), bytes moved, architecture: as there.
#pragma once
#include "gemm/few.cuh"

namespace fi {

struct GemmRmsParams {
  GemmParams product;
  float eps;
};

// Sums of squares of the rows of a, by warp.
template <class Config>
struct FewSquares : FewUnscaled {
  using Shared = float[Config::kWarpsK][FewShape<Config>::kRows];
  Shared& shared;
  float sum[Config::kATiles] = {};

  FI_DEVICE explicit FewSquares(Shared& shared) : shared(shared) {}
  FI_DEVICE void see(int i, const uint4& x) {
    float v[8];
    unpack8<typename Config::T>(x, v);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum[i] = fmaf(v[j], v[j], sum[i]);
  }
  FI_DEVICE void post() {
#pragma unroll
    for (int i = 0; i < Config::kATiles; ++i) {  // the four lanes of a row
      float s = sum[i];
      s += __shfl_xor_sync(kFullMask, s, 1);
      s += __shfl_xor_sync(kFullMask, s, 2);
      if (lane_id() % 4 == 0) shared[warp_id()][8 * i + (lane_id() >> 2)] = s;
    }
  }
};

// Config: as gemm_few's
template <class Config>
FI_DEVICE void gemm_few_rms(const GemmRmsParams& params) {
  constexpr int kWarpsK = Config::kWarpsK, kRows = FewShape<Config>::kRows;
  __shared__ __align__(16) float squares[kWarpsK][kRows];
  FewSquares<Config> scales(squares);
  const uint32_t share = uint32_t(computed_here<true>(__float_as_uint(math::ptx_rcp(float(params.product.k)))));
  few_tile<Config>(params.product, scales, [&](uint32_t r) {
    float sum = 0.f;
#pragma unroll
    for (int i = 0; i < Config::kWarpsK; ++i) sum += squares[i][r];
    return math::rsqrt(fmaf(sum, __uint_as_float(share), params.eps));
  });
}

}  // namespace fi
