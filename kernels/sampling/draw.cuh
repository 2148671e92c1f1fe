// Draws from a row that has been added up: by inversion of the cumulative distribution in index order, and top-p's by
// rejection.
#pragma once
#include "common/philox.cuh"
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

// Draw a token by 64 random bits: the first whose cumulative mass exceeds random * total / 2^64. With kWhole nothing is
// filtered, and the sums are the first pass's; else they are those of what the threshold keeps. Same result in every
// thread.
struct Drawn {
  uint32_t token;
  uint32_t key;    // with kKey
  uint64_t total;  // the mass of everything that could be drawn
};
template <bool kWhole, bool kKey = false, class State>
FI_DEVICE Drawn draw(const State& state, uint32_t threshold, uint64_t random) {
  using Domain = typename State::Domain;
  using Row = typename State::Row;
  static_assert(State::kThreads / 32 >= Row::kBlocks, "a warp a block");
  auto& shared = state.shared;
  uint64_t total, own = 0;
  if constexpr (kWhole) own = state.part(threadIdx.x);
  else if (threadIdx.x < state.row.segments()) own = shared.sum[threadIdx.x];
  const uint64_t end = block_scan<State::kThreads>(own, shared.warp_sum, total);
  const uint64_t target = __umul64hi(random, total);
  if (end - own <= target && target < end) {  // one thread
    shared.bin = threadIdx.x;
    shared.above = target - (end - own);
  }
  __syncthreads();  // the segment is known
  const uint32_t segment = shared.bin;
  const uint64_t rest = shared.above;
  auto ref = state.ref;
  uint64_t weight = kWeightOne;
  if constexpr (kWhole && Domain::kOwnRef) {
    ref = Domain::ref(value_of(shared.top[segment]));
    weight = Domain::weight(ref, state.ref);
  }
  uint64_t mass[Row::kPer], sum = 0, inclusive = 0;  // a warp a block
  if (warp_id() < Row::kBlocks) {
    float v[Row::kPer];
    state.row.load_at(segment * kSegment + warp_id() * Row::kBlock + lane_id() * Row::kPer, v);
#pragma unroll
    for (int j = 0; j < Row::kPer; ++j) {
      mass[j] = kWhole || key_of(v[j]) >= threshold ? Domain::mass(v[j], ref) : 0;
      sum += mass[j];
    }
    inclusive = sum;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint64_t other = __shfl_up_sync(kFullMask, inclusive, offset);
      if (lane_id() >= offset) inclusive += other;
    }
    if (lane_id() == 31) shared.warp_sum[warp_id()] = inclusive;
  }
  __syncthreads();  // the blocks' masses are known
  if (warp_id() < Row::kBlocks) {
    for (int w = 0; w < warp_id(); ++w) inclusive += shared.warp_sum[w];
    uint64_t start = inclusive - sum;
    if (scaled(start, weight) <= rest && rest < scaled(inclusive, weight)) {  // one lane
      uint32_t before = 0;
#pragma unroll
      for (int j = 0; j < Row::kPer; ++j) {
        start += mass[j];
        before += scaled(start, weight) <= rest;
      }
      shared.token = segment * kSegment + warp_id() * Row::kBlock + lane_id() * Row::kPer + before;
      if constexpr (kKey) shared.threshold = key_of(state.row.at(shared.token));  // once more: registers are short
    }
  }
  __syncthreads();  // the token is known
  return {shared.token, shared.threshold, total};
}

// Top-p alone, by rejection: draw from all; if the tokens likelier than the drawn one have the mass that top-p asks for,
// it is none of those that top-p keeps, and the next draw, with the next random number, is among the likelier ones. The
// draws that are accepted are distributed as top-p says, no threshold is ever searched for, and ties cost nothing. On
// average 1.1 rounds for p = 0.9 and 2 for p = 0.5 of logits with a deviation of 3; each costs a pass over the row, which
// L1 or L2 still has.
constexpr uint32_t kAccepted = 0xffffffffu;

struct Outcome {
  bool first;  // this is the cluster's first CTA; the others know no more
  bool nan, valid;
  uint32_t token;
};

// The pass of a round: every segment's mass of what is above the pivot, to the first CTA's `to`.
template <class Domain, class Shape, class Row, class Shared>
FI_DEVICE void add_above(const Row& row, typename Domain::Ref ref, float pivot, Shared& to) {
  const uint32_t segments = row.segments();
#pragma unroll 1
  for (uint32_t s = Shape::first(); s < segments; s += Shape::kStep) {
    typename Row::Block v[Row::kBlocks];
    row.load(s, 0, Row::kAll, v);
    uint64_t sum = 0;
    each_value<Row>(v, [&](float x, int, int) {
      const uint64_t mass = Domain::mass(x, ref);
      if (x > pivot) sum += mass;
    });
    sum = ptx::warp_sum_u64(sum);
    if (lane_id() == 0) to.sum[s] = sum;
  }
}

template <class Domain, class Shape, class Row, class Shared>
FI_DEVICE Outcome draw_top_p(const Row& row, const FilterArgs& args, Shared& shared, const Stream& stream) {
  using State = RowState<Domain, Shape::kThreads, Row, Shared>;
  Outcome out = {Shape::rank() == 0, false, true, 0};
  Shared& to = Shape::at(shared, 0);
  Started<Shape> started;
  summarise<Domain, false, Shape>(row, to, true, started, NotHeld{});
  Shape::arrive();
  Shape::wait();  // the first CTA has all sums
  uint32_t pivot = kAccepted;
  uint64_t target = 0;
#pragma unroll 1
  for (uint32_t round = 0;; ++round) {
    if (out.first) {
      const State state(row, shared);
      if (round == 0) {
        out.nan = state.nan();
        out.valid = state.valid();
        if (out.valid) {
          state.correct_unit();
          const Drawn drawn = draw<true, true>(state, 0, stream.bits64(0));
          out.token = drawn.token;
          target = args.has_top_p() ? args.template target<Domain>(drawn.total, state.ref) : ~uint64_t(0);
          pivot = drawn.key == state.top_key || target > drawn.total ? kAccepted : drawn.key;
        }
      } else {
        const uint64_t above = state.kept();
        if (above < target) {
          pivot = kAccepted;
        } else {
          const Drawn drawn = draw<false, true>(state, pivot + 1, stream.bits64(round));
          out.token = drawn.token;
          pivot = drawn.key == state.top_key ? kAccepted : drawn.key;
        }
      }
      if (threadIdx.x < Shape::kCluster) {
        Shared& there = Shape::at(shared, threadIdx.x);
        there.told_key = pivot;
        there.told_top = state.top_key;
      }
    }
    Shape::arrive();
    if (out.first && pivot == kAccepted) return out;
    Shape::wait();  // every CTA has been told the pivot
    pivot = shared.told_key;
    if (pivot == kAccepted) return out;
    add_above<Domain, Shape>(row, Domain::ref(value_of(shared.told_top)), value_of(pivot), to);
    Shape::arrive();
    Shape::wait();  // the first CTA has the new sums, and the pivot has been read
  }
}

}  // namespace sampling

}  // namespace fi
