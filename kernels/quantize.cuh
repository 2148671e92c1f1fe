// Casts to 8 and 4 bits with scales, and back: x ~ q * scale.
// quantize_rows: a scale for each `group` elements of a row (token), or one that is given. kLanes threads compute one
// group, kRows of them one after the other; a CTA computes kThreads / kLanes * kRows (one row after another where a
// group needs more than a warp); grid = groups / those. Every load is issued before the first value is used. Groups that
// registers cannot hold are read a second time (from L2).
// quantize_blocks: one CTA casts one tile of kTileRows x kTileColumns elements with one scale.
// absolute_max: the largest magnitude of an array, by atomics; a second launch casts with it.
// tile_scales: scales row by row into the tiles that quantize_rows writes.
// Shared memory: one float a warp. Bytes moved: the elements once, their codes and scales. Architecture: any.
#pragma once
#include "activation.cuh"
#include "attention/fast_div.cuh"
#include "common/reduce.cuh"
#include "ptx/pdl.cuh"
#include "quantization/formats.cuh"

namespace fi {

struct QuantizeParams {
  const void* x;       // [tokens, width]; kGated: [tokens, 2 * width], the gate first
  uint8_t* q;          // [tokens, width], dense
  void* scales;        // of each group, float or byte
  const float* given;  // one number on the device (see ScaleMode), or null to use given_value
  int32_t x_stride;    // elements between tokens
  int32_t scale_stride_token, scale_stride_group;  // elements; kTile == 0
  uint32_t rows;       // padded tokens * padded groups, below 2^31
  FastDiv groups;      // of a token, padded
  uint32_t tokens;
  uint32_t width;
  uint32_t group;
  float eps;           // lower bound of a group's largest magnitude
  float given_value;
};

// Where a group's scale comes from.
enum class ScaleMode {
  kFloat,       // max(amax, eps) / max(O), fp32
  kPowerOfTwo,  // the same, rounded up to a power of two, fp32
  kE8m0,        // the same as a byte, of amax * given
  kE4m3,        // round(amax * (given / max(O))), a byte; the codes are x * (given / scale)
  kGiven,       // given, for all; written once, if anywhere
  kTensor,      // max(given, eps) / max(O), for all; given is the array's largest magnitude; written once
};

struct QuantizeShared {
  float scratch[32];
};

// A group's scale: what the codes are to be multiplied or divided by, and how it is stored.
template <typename O, ScaleMode kMode>
struct GroupScale {
  float scale = 1.f, inverse = 1.f, divisor = 1.f;
  uint32_t code = 0;

  FI_DEVICE GroupScale(float amax, float given, float eps) {
    constexpr float kMax = quant::Format<O>::kMax, kShare = 1.f / kMax;
    if constexpr (kMode == ScaleMode::kFloat || kMode == ScaleMode::kTensor) {
      scale = quant::divide(quant::max_nan(kMode == ScaleMode::kTensor ? given : amax, eps), kMax, kShare);
      inverse = quant::reciprocal(scale);
    } else if constexpr (kMode == ScaleMode::kGiven) {
      scale = given;
      inverse = 1.f / given;
    } else if constexpr (kMode == ScaleMode::kPowerOfTwo) {
      code = quant::e8m0_code<O>(quant::max_nan(amax, eps));
      scale = quant::e8m0_decode(code);
      inverse = quant::e8m0_reciprocal(code);
    } else if constexpr (kMode == ScaleMode::kE8m0) {
      code = quant::e8m0_code<O>(amax * given);
      inverse = given * quant::e8m0_reciprocal(code);
    } else {
      code = quant::Format<__nv_fp8_e4m3>::encode_two(amax * quant::divide(given, kMax, kShare), 0.f) & 0xff;
      const float stored = quant::Format<__nv_fp8_e4m3>::decode(code);
      inverse = stored != 0.f ? quant::divide(given, stored, quant::reciprocal(stored)) : 0.f;
    }
    divisor = scale == FI_INF ? 0.f : scale;
  }
  FI_DEVICE float apply(float x) const {
    // Powers of two have exact reciprocals; the byte scales are defined by their reciprocal.
    if constexpr (kMode == ScaleMode::kPowerOfTwo || kMode == ScaleMode::kE8m0 || kMode == ScaleMode::kE4m3)
      return x * inverse;
    if constexpr (kMode == ScaleMode::kGiven) return quant::divide(x, scale, inverse);
    return quant::divide_finite(x, divisor, inverse);
  }
  FI_DEVICE void write(void* scales, int64_t place) const {
    if constexpr (kMode == ScaleMode::kE8m0 || kMode == ScaleMode::kE4m3)
      static_cast<uint8_t*>(scales)[place] = uint8_t(code);
    else
      static_cast<float*>(scales)[place] = scale;
  }
};

// Config: T, O, kMode, kTile (rows of a tile of scales: 0, 8 or 128), kGated, kVec, kVecs, kRows, kLanes, kThreads
template <class Config>
FI_DEVICE void quantize_rows(const QuantizeParams& params) {
  using T = typename Config::T;
  using O = typename Config::O;
  using V = Vec<T, Config::kVec>;
  constexpr ScaleMode kMode = Config::kMode;
  constexpr int kVec = Config::kVec, kVecs = Config::kVecs, kRows = Config::kRows, kLanes = Config::kLanes;
  constexpr int kThreads = Config::kThreads, kStep = kLanes * kVec;
  constexpr bool kLong = kLanes > 32;  // else registers hold a whole group
  constexpr bool kSearch = kMode != ScaleMode::kGiven && kMode != ScaleMode::kTensor;
  static_assert(kLanes == kThreads || kLanes <= 32, "a group belongs to a CTA or to a part of a warp");
  __shared__ QuantizeShared shared;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const float given = params.given ? *params.given : params.given_value;
  const uint32_t first = threadIdx.x % kLanes * kVec;

  // Neighbouring vectors of a thread share 32-byte sectors: the second comes from L1.
  auto load = [](const T* p) {
    if constexpr (kLanes == 1 && kVecs > 1) return V::load(p);
    return load_streaming<V>(p);
  };

  struct Row {
    const T* x;
    uint8_t* q;
    uint32_t token, group, length;  // length 0: nothing to read
    bool exists;                    // has a scale, if only padding
  };
  Row rows[kRows];
  V gate[kRows][kVecs];
  V up[Config::kGated ? kRows : 1][Config::kGated ? kVecs : 1];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    constexpr int kStride = kThreads / kLanes;  // groups a CTA computes side by side
    const uint32_t index = blockIdx.x * (kStride * kRows) + r * kStride + threadIdx.x / kLanes;
    Row& row = rows[r];
    row.exists = index < params.rows;
    row.token = params.groups.quotient(index);
    row.group = index - row.token * params.groups.divisor;
    const uint32_t column = row.group * params.group;
    const bool inside = row.exists && row.token < params.tokens && column < params.width;
    row.length = inside ? min_of(params.group, params.width - column) : 0;
    row.x = static_cast<const T*>(params.x) + (int64_t(int32_t(row.token)) * params.x_stride + column);
    row.q = params.q + (uint64_t(row.token) * params.width + column) * quant::kBits<O> / 8;
#pragma unroll
    for (int n = 0; n < kVecs; ++n) {
      const uint32_t i = first + n * kStep;
      gate[r][n] = V{};
      if (i < row.length) {
        gate[r][n] = load(row.x + i);
        if constexpr (Config::kGated) up[r][n] = load(row.x + params.width + i);
      } else if constexpr (Config::kGated) {
        up[r][n] = V{};
      }
    }
  }

  auto combine = [&](const V& a, const V& b, float(&v)[kVec]) {
    quant::to_floats(a, v);
    if constexpr (Config::kGated) {
      float u[kVec];
      quant::to_floats(b, u);
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[j] = Silu::apply<is_same_v<T, float>>(v[j]) * u[j];
    }
  };
  auto read = [&](const Row& row, uint32_t i, float(&v)[kVec]) {
    V b{};
    if constexpr (Config::kGated) b = V::load(row.x + params.width + i);
    combine(V::load(row.x + i), b, v);
  };
  auto largest = [&](float amax, const float(&v)[kVec]) {
#pragma unroll
    for (int j = 0; j < kVec; ++j) amax = quant::max_nan(fabsf(v[j]), amax);
    return amax;
  };

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const Row& row = rows[r];
    float values[kVecs][kVec];
    float amax = 0.f;
#pragma unroll
    for (int n = 0; n < kVecs; ++n) {
      combine(gate[r][n], up[Config::kGated ? r : 0][Config::kGated ? n : 0], values[n]);
      if constexpr (kSearch) amax = largest(amax, values[n]);
    }
    if constexpr (kSearch) {
      if constexpr (kLong) {
        for (uint32_t i = first + kVecs * kStep; i < row.length; i += kStep) {
          float v[kVec];
          read(row, i, v);
          amax = largest(amax, v);
        }
      }
      if constexpr (kLanes == kThreads && kThreads > 32) {
        if (r) __syncthreads();  // the scratch of the row before was read by every warp
        amax = block_reduce<quant::MaxNan, kThreads>(amax, shared.scratch);
      } else {
        amax = warp_reduce<quant::MaxNan, min_of(kLanes, 32)>(amax);
      }
    }
    const GroupScale<O, kMode> scale(amax, given, params.eps);
    auto write = [&](uint32_t i, float(&v)[kVec]) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[j] = scale.apply(v[j]);
      quant::store<O>(v, row.q + i * quant::kBits<O> / 8);
    };
    if constexpr (kLanes == 1 && quant::kBits<O> == 4) {
      // A thread's own group, which is whole: one store of 8 bytes.
      float all[kVecs * kVec];
#pragma unroll
      for (int i = 0; i < kVecs * kVec; ++i) all[i] = scale.apply(values[i / kVec][i % kVec]);
      if (row.length) quant::store<O>(all, row.q);
    } else {
#pragma unroll
      for (int n = 0; n < kVecs; ++n)
        if (first + n * kStep < row.length) write(first + n * kStep, values[n]);
    }
    if constexpr (kLong) {
      for (uint32_t i = first + kVecs * kStep; i < row.length; i += kStep) {
        float v[kVec];
        read(row, i, v);
        write(i, v);
      }
    }
    if constexpr (kSearch) {
      if (first == 0 && row.exists) {
        int64_t place = int64_t(int32_t(row.token)) * params.scale_stride_token +
                        int64_t(int32_t(row.group)) * params.scale_stride_group;
        if constexpr (Config::kTile) place = quant::tiled_place<Config::kTile>(row.token, row.group, params.groups.divisor);
        if (Config::kTile && row.length == 0)
          static_cast<uint8_t*>(params.scales)[place] = 0;  // padding
        else
          scale.write(params.scales, place);
      }
    } else {
      if (r == 0 && blockIdx.x == 0 && threadIdx.x == 0 && params.scales) scale.write(params.scales, 0);
    }
  }
}

struct QuantizeBlocksParams {
  const void* x;   // [batch, rows, columns]
  uint8_t* q;      // the same shape, dense
  float* scales;   // [batch, blocks of rows, blocks of columns]
  int64_t x_stride_batch, x_stride_row;                     // elements
  int64_t scale_stride_batch, scale_stride_row, scale_stride_column;  // elements
  FastDiv row_blocks, column_blocks;
  uint32_t rows, columns;
  float eps;
};

// Config: T, O, kMode (kFloat or kPowerOfTwo), kTileRows, kTileColumns, kVec, kThreads
template <class Config>
FI_DEVICE void quantize_blocks(const QuantizeBlocksParams& params) {
  using T = typename Config::T;
  using O = typename Config::O;
  using V = Vec<T, Config::kVec>;
  constexpr int kVec = Config::kVec, kLanes = Config::kTileColumns / kVec, kPass = Config::kThreads / kLanes;
  constexpr int kVecs = Config::kTileRows / kPass;
  static_assert(Config::kThreads % kLanes == 0 && Config::kTileRows % kPass == 0 && quant::kBits<O> == 8);
  __shared__ QuantizeShared shared;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint32_t strip = params.column_blocks.quotient(blockIdx.x);  // a row of blocks
  const uint32_t block_column = blockIdx.x - strip * params.column_blocks.divisor;
  const uint32_t batch = params.row_blocks.quotient(strip), block_row = strip - batch * params.row_blocks.divisor;
  const uint32_t column = block_column * Config::kTileColumns + threadIdx.x % kLanes * kVec;
  const uint32_t top = block_row * Config::kTileRows + threadIdx.x / kLanes;
  const T* x = static_cast<const T*>(params.x) + batch * params.x_stride_batch + column;
  uint8_t* q = params.q + int64_t(batch) * params.rows * params.columns + column;

  V loaded[kVecs];
#pragma unroll
  for (int n = 0; n < kVecs; ++n) {
    loaded[n] = V{};
    if (top + n * kPass < params.rows && column < params.columns)
      loaded[n] = load_streaming<V>(x + (top + n * kPass) * params.x_stride_row);
  }
  float amax = 0.f;
#pragma unroll
  for (int n = 0; n < kVecs; ++n) {
    float v[kVec];
    quant::to_floats(loaded[n], v);
#pragma unroll
    for (int j = 0; j < kVec; ++j) amax = quant::max_nan(fabsf(v[j]), amax);
  }
  amax = block_reduce<quant::MaxNan, Config::kThreads>(amax, shared.scratch);
  const GroupScale<O, Config::kMode> scale(amax, 1.f, params.eps);
#pragma unroll
  for (int n = 0; n < kVecs; ++n) {
    if (top + n * kPass < params.rows && column < params.columns) {
      float v[kVec];
      quant::to_floats(loaded[n], v);
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[j] = scale.apply(v[j]);
      quant::store<O>(v, q + int64_t(top + n * kPass) * params.columns);
    }
  }
  if (threadIdx.x == 0)
    scale.write(params.scales, batch * params.scale_stride_batch + block_row * params.scale_stride_row +
                                   block_column * params.scale_stride_column);
}

struct TileScalesParams {
  const uint8_t* x;  // [batch, rows, columns]
  uint8_t* out;      // [batch, padded rows, padded columns] in tiles
  int64_t x_stride_batch, x_stride_row;
  uint32_t words;       // of out, 4 bytes each
  FastDiv row_words;    // padded columns / 4
  FastDiv padded_rows;  // of a batch
  uint32_t rows, columns;
};

// Config: kTile (rows of a tile), kThreads. One thread moves the four scales of a row that lie side by side in a tile.
template <class Config>
FI_DEVICE void tile_scales(const TileScalesParams& params) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const uint32_t word = blockIdx.x * Config::kThreads + threadIdx.x;
  if (word >= params.words) return;
  const uint32_t line = params.row_words.quotient(word), column = (word - line * params.row_words.divisor) * 4;
  const uint32_t batch = params.padded_rows.quotient(line), row = line - batch * params.padded_rows.divisor;
  const uint8_t* x = params.x + batch * params.x_stride_batch + row * params.x_stride_row + column;
  Vec<uint8_t, 4> four;
#pragma unroll
  for (int j = 0; j < 4; ++j) four[j] = row < params.rows && column + j < params.columns ? x[j] : 0;
  const int64_t start = int64_t(batch) * params.padded_rows.divisor * params.row_words.divisor * 4;
  four.store(params.out + start + quant::tiled_place<Config::kTile>(row, column, params.row_words.divisor * 4));
}

struct AbsoluteMaxParams {
  const void* x;     // [rows, width]
  uint32_t* result;  // the fp32 bits, which order as the numbers do, NaN above all; 0 before the launch
  int64_t x_stride;  // elements between rows
  uint64_t vectors;  // rows * width / kVec
  uint32_t row_vectors;
};

// Config: T, kVec, kUnroll, kThreads
template <class Config>
FI_DEVICE void absolute_max(const AbsoluteMaxParams& params) {
  using T = typename Config::T;
  using V = Vec<T, Config::kVec>;
  constexpr int kVec = Config::kVec, kUnroll = Config::kUnroll, kThreads = Config::kThreads;
  __shared__ QuantizeShared shared;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  V loaded[kUnroll];
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    const uint64_t i = uint64_t(blockIdx.x) * (kThreads * kUnroll) + n * kThreads + threadIdx.x;
    loaded[n] = V{};
    if (i < params.vectors) {
      const uint64_t row = params.vectors <= 0xffffffffu ? uint32_t(i) / params.row_vectors : i / params.row_vectors;
      loaded[n] = load_streaming<V>(static_cast<const T*>(params.x) + row * params.x_stride +
                                    (i - row * params.row_vectors) * kVec);
    }
  }
  float amax = 0.f;
#pragma unroll
  for (int n = 0; n < kUnroll; ++n) {
    float v[kVec];
    quant::to_floats(loaded[n], v);
#pragma unroll
    for (int j = 0; j < kVec; ++j) amax = quant::max_nan(fabsf(v[j]), amax);
  }
  amax = block_reduce<quant::MaxNan, kThreads>(amax, shared.scratch);
  if (threadIdx.x == 0) atomicMax(params.result, __float_as_uint(amax) & 0x7fffffffu);
}

}  // namespace fi
