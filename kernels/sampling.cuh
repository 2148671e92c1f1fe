// Sampling from rows of logits or probabilities: one token a row, of those that a filter keeps, by inversion of the
// cumulative distribution in index order with one Philox number; and the same filters as renormalisation and as mask.
// One CTA of 512 threads computes one row; grid = output rows.
// Passes: 1. every segment's largest value and mass (the row from memory); 2. the filter's threshold (select.cuh: only
// blocks that reach a proven lower bound are read again, mostly from L2); 3. mass of what is kept, the segment that holds
// the draw, and the token in it. All decisions are integer (mass.cuh): the same for every launch shape and architecture.
// Shared memory: RowSummary 22 KB, SelectScratch 16 KB. Bytes moved: rows * vocab * sizeof(T), and what is read again.
// Architecture: any.
#pragma once
#include "common/philox.cuh"
#include "ptx/pdl.cuh"
#include "sampling/filters.cuh"

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
FI_DEVICE FilterArgs filter_args(const SamplingParams& params, uint32_t row) {
  const uint32_t flags = params.flags;
  int64_t k = params.top_k ? read_index(params.top_k, flags & kTopK64, row) : params.top_k_value;
  float p = params.p_value;
  if (params.p) p = flags & kP64 ? float(static_cast<const double*>(params.p)[row]) : static_cast<const float*>(params.p)[row];
  k = max_of<int64_t>(1, min_of<int64_t>(k, params.vocab));
  return {uint32_t(k), p, (flags & kJoint) != 0};
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

// Draw a token by 64 random bits: the first whose cumulative mass exceeds random * total / 2^64. The segments' sums must
// be in the row's unit; kWhole: each segment's own unit counts inside it (nothing is filtered). Warp 0 gets the result.
template <bool kWhole, class State>
FI_DEVICE uint32_t draw(const State& state, uint32_t threshold, uint64_t random) {
  using Domain = typename State::Domain;
  using Row = typename State::Row;
  uint64_t total;
  const uint64_t own = threadIdx.x < state.row.segments() ? state.summary.sum[threadIdx.x] : 0;
  const uint64_t end = block_scan<State::kThreads>(own, state.scratch.warp_sum, total);
  const uint64_t target = __umul64hi(random, total);
  if (end - own <= target && target < end) {  // one thread
    state.scratch.bin = threadIdx.x;
    state.scratch.above = target - (end - own);
  }
  __syncthreads();  // the segment is known
  if (warp_id() != 0) return 0;
  const uint32_t segment = state.scratch.bin;
  const uint64_t rest = state.scratch.above;
  const auto ref = kWhole ? Domain::ref(state.summary.top[segment]) : state.ref;
  const uint64_t weight = kWhole ? Domain::weight(ref, state.ref) : kWeightOne;
  float* values = reinterpret_cast<float*>(state.scratch.low) + lane_id();  // this lane's: read together, used one by one
  {
    typename Row::Values v;
    state.row.load(segment, 0, Row::kAll, v);
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) {
#pragma unroll
      for (int j = 0; j < Row::kPer; ++j) values[(b * Row::kPer + j) * 32] = v[b][j];
    }
  }
  uint64_t base = 0;
#pragma unroll 1
  for (int b = 0; b < Row::kBlocks; ++b) {
    uint64_t mass[Row::kPer], sum = 0;
#pragma unroll
    for (int j = 0; j < Row::kPer; ++j) {
      const float x = values[(b * Row::kPer + j) * 32];
      mass[j] = kWhole || key_of(x) >= threshold ? Domain::mass(x, ref) : 0;
      sum += mass[j];
    }
    uint64_t inclusive = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint64_t other = __shfl_up_sync(kFullMask, inclusive, offset);
      if (lane_id() >= offset) inclusive += other;
    }
    const uint32_t hits = __ballot_sync(kFullMask, scaled(base + inclusive, weight) > rest);
    if (hits) {
      uint64_t sums = base + inclusive - sum;
      uint32_t before = 0;  // this lane's elements in front of the one
#pragma unroll
      for (int j = 0; j < Row::kPer; ++j) {
        sums += mass[j];
        before += scaled(sums, weight) <= rest;
      }
      const int lane = __ffs(hits) - 1;
      return segment * kSegment + b * Row::kBlock + lane * Row::kPer + __shfl_sync(kFullMask, before, lane);
    }
    base += __shfl_sync(kFullMask, inclusive, 31);
  }
  return 0;  // not reached: the segment's whole sum exceeds `rest`
}

}  // namespace sampling

// Config: T, Domain (sampling::Logits or Probs), Filter (sampling::NoFilter, MinP or TopKTopP), kThreads
template <class Config>
FI_DEVICE void sample(const SamplingParams& params) {
  using namespace sampling;
  using T = typename Config::T;
  using Domain = typename Config::Domain;
  using Filter = typename Config::Filter;
  constexpr int kThreads = Config::kThreads;
  __shared__ RowSummary summary;
  __shared__ SelectScratch scratch;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint32_t output_row = blockIdx.x, flags = params.flags;
  const int64_t index = params.indices ? read_index(params.indices, flags & kIndices64, output_row) : output_row;
  uint32_t token = 0;
  bool nan = false, valid = false;
  if (0 <= index && index < params.rows) {
    const PlainRow<T> row{static_cast<const T*>(params.input) + index * params.stride, params.vocab,
                          (flags & kAlignedInput) != 0};
    const FilterArgs args = filter_args(params, output_row);
    const bool sums = Filter::needs_sums(args, params.vocab, is_same_v<Domain, Logits>);
    nan = summarise<Domain, Filter::kFilters, kThreads>(row, summary, sums);
    nan = __syncthreads_or(nan);  // and the summary is complete
    const RowState<Domain, kThreads, PlainRow<T>> state(row, summary, scratch);
    valid = !nan && Domain::valid(state.top);
    if (valid) {
      uint32_t threshold = 0;
      if constexpr (Filter::kFilters) {
        threshold = Filter::template threshold<kExactBits<T>>(state, args);
        state.keep_sums(threshold);
      } else {
        state.scale_sums();
      }
      const Stream stream(params.seed, params.offset, params.seed_value, params.offset_value, flags, output_row);
      token = draw<!Filter::kFilters>(state, threshold, stream.bits64(0));
    }
  }
  if (threadIdx.x == 0) {
    write_index(params.output, flags & kIndices64, output_row, token);
    if (params.valid) params.valid[output_row] = valid;
    if (params.nan) params.nan[output_row] = nan;
  }
}

// Rows with what TopKTopP rejects at 0 and the rest divided by its sum (Probs), or at -inf and the rest as it is (Logits).
// Config: T, Domain, kThreads
template <class Config>
FI_DEVICE void filter_rows(const SamplingParams& params) {
  using namespace sampling;
  using T = typename Config::T;
  using Domain = typename Config::Domain;
  using Row = PlainRow<T>;
  constexpr int kThreads = Config::kThreads, kPer = Row::kPer;
  constexpr bool kMask = is_same_v<Domain, Logits>;
  __shared__ RowSummary summary;
  __shared__ SelectScratch scratch;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint32_t vocab = params.vocab;
  const Row row{static_cast<const T*>(params.input) + blockIdx.x * params.stride, vocab,
                (params.flags & kAlignedInput) != 0};
  T* output = static_cast<T*>(params.output) + blockIdx.x * int64_t(vocab);
  const FilterArgs args = filter_args(params, blockIdx.x);
  bool nan = summarise<Domain, true, kThreads>(row, summary, TopKTopP::needs_sums(args, vocab, kMask));
  nan = __syncthreads_or(nan);
  const RowState<Domain, kThreads, Row> state(row, summary, scratch);
  const bool valid = !nan && Domain::valid(state.top);
  uint32_t threshold = 0xffffffffu;  // nothing is kept of an invalid row
  float sum = 1.f;
  if (valid) {
    threshold = TopKTopP::template threshold<kExactBits<T>>(state, args);
    if constexpr (!kMask) sum = Domain::probability(state.keep_sums(threshold), state.ref);
  }
  const bool vectors = (params.flags & kAlignedOutput) != 0;
#pragma unroll 1
  for (uint32_t s = warp_id(); s < row.segments(); s += kThreads / 32) {
    uint32_t blocks = 0;
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b)
      blocks |= uint32_t(valid && summary.block_top[s * Row::kBlocks + b] >= threshold) << b;
    typename Row::Values v;
    row.load(s, 0, blocks, v);
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) {
      const uint32_t first = s * kSegment + b * Row::kBlock + lane_id() * kPer;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const bool keep = key_of(v[b][j]) >= threshold;
        if constexpr (kMask) {
          v[b][j] = keep ? v[b][j] : -FI_INF;
        } else {
          v[b][j] = keep ? __fdiv_rn(fmaxf(v[b][j], 0.f), sum) : 0.f;
        }
      }
      if (vectors && first + kPer <= vocab) {
        Vec<T, kPer>::from_floats(v[b]).store(output + first);
      } else {
#pragma unroll
        for (int j = 0; j < kPer; ++j)
          if (first + j < vocab) output[first + j] = from_float<T>(v[b][j]);
      }
    }
  }
}

}  // namespace fi
