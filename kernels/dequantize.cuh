// Codes of 8 or 4 bits times the scale of their block, times one number for all: the inverse of kernels/quantize.cuh.
// One CTA computes kThreads * kUnroll vectors of kVec values of the flattened rows; grid = vectors / those.
// Shared memory: none. Bytes moved: the codes and their scales once, the values. Architecture: any.
#pragma once
#include "attention/fast_div.cuh"
#include "ptx/pdl.cuh"
#include "quantization/formats.cuh"

namespace fi {

struct DequantizeParams {
  const uint8_t* q;    // [batch, rows, width], rows dense
  const void* scales;  // of each block of block_rows x block_columns values
  void* out;           // [batch, rows, width], dense
  const float* given;  // one number on the device, or null to use given_value
  int64_t q_stride_batch, q_stride_row;                               // bytes
  int64_t scale_stride_batch, scale_stride_row, scale_stride_column;  // elements; kTile == 0
  uint64_t vectors;                                                   // batch * rows * width / kVec
  FastDiv row_vectors;                                                // of width / kVec
  uint32_t rows, width;
  uint32_t block_rows, block_columns;
  uint32_t padded_columns;  // of the scales; kTile != 0
  float given_value;
};

enum class ScaleType { kFloat, kE8m0, kE4m3 };

// Config: O (of the codes), T (of the values), kScale, kTile, kVec, kUnroll, kThreads
template <class Config>
FI_DEVICE void dequantize(const DequantizeParams& params) {
  using O = typename Config::O;
  using T = typename Config::T;
  constexpr int kVec = Config::kVec, kUnroll = Config::kUnroll, kThreads = Config::kThreads;
  constexpr int kBytes = kVec * quant::kBits<O> / 8;
  using Codes = Vec<uint8_t, kBytes>;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const float given = params.given ? *params.given : params.given_value;
  Codes codes[kUnroll];
  float scale[kUnroll];
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    const uint64_t i = uint64_t(blockIdx.x) * (kThreads * kUnroll) + n * kThreads + threadIdx.x;
    if (i < params.vectors) {
      const uint32_t line = params.row_vectors.quotient(uint32_t(i));
      const uint32_t column = (uint32_t(i) - line * params.row_vectors.divisor) * kVec;
      const uint32_t batch = line / params.rows, row = line - batch * params.rows;
      codes[n] = Codes::load(params.q + batch * params.q_stride_batch + row * params.q_stride_row +
                             column * quant::kBits<O> / 8);
      const uint32_t block_row = row / params.block_rows, block_column = column / params.block_columns;
      int64_t place = batch * params.scale_stride_batch + block_row * params.scale_stride_row +
                      block_column * params.scale_stride_column;
      if constexpr (Config::kTile) place = quant::tiled_place<Config::kTile>(row, block_column, params.padded_columns);
      if constexpr (Config::kScale == ScaleType::kFloat)
        scale[n] = static_cast<const float*>(params.scales)[place];
      else if constexpr (Config::kScale == ScaleType::kE8m0)
        scale[n] = quant::e8m0_decode(static_cast<const uint8_t*>(params.scales)[place]);
      else
        scale[n] = quant::Format<__nv_fp8_e4m3>::decode(static_cast<const uint8_t*>(params.scales)[place]);
    }
  }
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    const uint64_t i = uint64_t(blockIdx.x) * (kThreads * kUnroll) + n * kThreads + threadIdx.x;
    if (i < params.vectors) {
      float v[kVec];
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        uint32_t code = codes[n][quant::kBits<O> == 4 ? j / 2 : j];
        if constexpr (quant::kBits<O> == 4) code = j % 2 ? code >> 4 : code & 15;
        v[j] = quant::Format<O>::decode(code) * scale[n] * given;
      }
      constexpr int kPart = min_of<int>(kVec, 16 / sizeof(T));
#pragma unroll
      for (int j = 0; j < kVec; j += kPart) {
        Vec<T, kPart> part;
#pragma unroll
        for (int k = 0; k < kPart; ++k) part[k] = from_float<T>(v[j + k]);
        part.store(static_cast<T*>(params.out) + i * kVec + j);
      }
    }
  }
}

}  // namespace fi
