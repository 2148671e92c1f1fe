// out[b, r] = scale[b, r / rows]: multipliers of blocks of rows, once for each row, for kernels that want them so.
// One thread an element; grid = (ceil(m / kThreads), blocks of k, 1). Shared memory: none. Bytes moved: 4 m blocks.
// Architecture: any.
#pragma once
#include "common/base.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct ExpandScalesParams {
  const float* scale;
  float* out;                  // [blocks, m]
  int64_t scale_row, scale_k;  // elements between the scales of neighbouring blocks of rows, and of k
  uint32_t m, rows;            // rows of the operand, and under one scale
};

// Config: kThreads
template <class Config>
FI_DEVICE void expand_scales(const ExpandScalesParams& params) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const uint32_t row = blockIdx.x * Config::kThreads + threadIdx.x;
  if (row >= params.m) return;
  params.out[int64_t(blockIdx.y) * params.m + row] =
      params.scale[row / params.rows * params.scale_row + blockIdx.y * params.scale_k];
}

}  // namespace fi
