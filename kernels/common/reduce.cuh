// Warp and CTA reductions. The order of additions is fixed by lane and warp number, so results repeat bit for bit.
#pragma once
#include "common/base.cuh"

namespace fi {

struct Sum {
  FI_DEVICE static float identity() { return 0.f; }
  FI_DEVICE static float apply(float a, float b) { return a + b; }
};
struct Max {
  FI_DEVICE static float identity() { return __int_as_float(0xff800000); }
  FI_DEVICE static float apply(float a, float b) { return fmaxf(a, b); }
};

// Every lane of each group of `width` lanes gets the result.
template <typename Op, int width = 32>
FI_DEVICE float warp_reduce(float x) {
#pragma unroll
  for (int offset = width / 2; offset > 0; offset /= 2) x = Op::apply(x, __shfl_xor_sync(kFullMask, x, offset));
  return x;
}

// Every thread of the CTA gets the result. `scratch`: one float a warp; a barrier before the call is the caller's
// business when scratch was in use, and one follows the write inside.
template <typename Op, int threads>
FI_DEVICE float block_reduce(float x, float* scratch) {
  static_assert(threads % 32 == 0 && threads <= 1024);
  x = warp_reduce<Op>(x);
  if constexpr (threads == 32) return x;
  if (lane_id() == 0) scratch[warp_id()] = x;
  __syncthreads();
  x = lane_id() < threads / 32 ? scratch[lane_id()] : Op::identity();
  return warp_reduce<Op>(x);
}

}  // namespace fi
