// The parameters of the sampling kernels, and how they are read.
#pragma once
#include "common/philox.cuh"
#include "common/vec.cuh"

namespace fi {

enum SamplingFlags : uint32_t {
  kIndices64 = 1,       // indices and output tokens (of chain sampling: all ids) are int64, else int32
  kTopK64 = 2,          // top_k is int64, else int32
  kP64 = 4,             // p is float64, else float32
  kSeedPerRow = 8,      // seed has one element a row: the row number stays out of the counter
  kOffsetPerRow = 16,   // offset has one element a row
  kJoint = 32,          // FilterArgs::joint
  kAlignedInput = 64,   // rows start on 16 bytes
  kAlignedOutput = 128,
  kNewAccepted = 256,   // chain sampling: this counter is written, not added to
  kNewEmitted = 512,
  kMinP64 = 1024,       // min_p is float64, else float32
  kTemperature64 = 2048,
};

struct SamplingParams {
  const void* input;
  void* output;         // tokens, or rows (contiguous)
  uint8_t* valid;       // or null; a row is invalid if it has NaN or nothing to draw from, or its index is out of range
  uint8_t* nan;         // or null; 1 where the row has NaN
  const void* indices;  // row of input for every output row, or null
  const void* top_k;    // parameters by output row, or null for the value
  const void* p;
  const uint64_t* seed;
  const uint64_t* offset;
  uint64_t seed_value, offset_value;
  int64_t stride;       // of input rows, elements
  uint32_t rows;        // of input
  uint32_t vocab;
  int32_t top_k_value;
  float p_value;
  uint32_t flags;
  float min_p_value;        // of pipelines: min-p beside top-k and top-p
  const void* min_p;
  const void* temperature;  // of pipelines on logits, or null for the value
  float inverse_value;      // 1 / temperature; 0 for temperature 0
};

namespace sampling {

template <typename T>
constexpr int kExactBits = is_same_v<T, float> ? 0 : (is_same_v<T, __half> ? 13 : 16);  // key bits that never differ

FI_DEVICE int64_t read_index(const void* p, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(p)[i] : static_cast<const int32_t*>(p)[i];
}
FI_DEVICE void write_index(void* p, bool wide, int64_t i, int64_t value) {
  if (wide) {
    static_cast<int64_t*>(p)[i] = value;
  } else {
    static_cast<int32_t*>(p)[i] = int32_t(value);
  }
}
// One a row, float64 or float32; without an array, the value.
FI_DEVICE float read_real(const void* p, bool wide, int64_t i, float value) {
  if (p == nullptr) return value;
  return wide ? float(static_cast<const double*>(p)[i]) : static_cast<const float*>(p)[i];
}
// One over it, if it is an array: rounded once.
FI_DEVICE float read_inverse(const void* p, bool wide, int64_t i, float inverse) {
  if (p == nullptr) return inverse;
  const double t = wide ? static_cast<const double*>(p)[i] : double(static_cast<const float*>(p)[i]);
  return t == 0. ? 0.f : float(1. / t);
}

// Where the row's random numbers start.
struct Stream {
  uint64_t seed, offset;
  uint32_t row;
  FI_DEVICE Stream(const uint64_t* seeds, const uint64_t* offsets, uint64_t seed_value, uint64_t offset_value,
                   uint32_t flags, uint32_t output_row) {
    seed = seeds ? seeds[flags & kSeedPerRow ? output_row : 0] : seed_value;
    offset = offsets ? offsets[flags & kOffsetPerRow ? output_row : 0] : offset_value;
    row = flags & kSeedPerRow ? 0 : output_row;
  }
  FI_DEVICE uint64_t bits64(uint32_t draw) const { return Philox::bits64(seed, offset, row, draw); }
};

}  // namespace sampling

}  // namespace fi
