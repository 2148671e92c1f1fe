// Where a row's random numbers come from, and the flags of the sampling kernels' parameters.
#pragma once
#include "common/philox.cuh"

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

namespace sampling {

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
