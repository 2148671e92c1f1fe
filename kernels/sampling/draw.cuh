// Draws from a row that has been added up: by inversion of the cumulative distribution in index order; top-p's by
// rejection, and min-p's among what a threshold keeps that the row's largest value gives.
#pragma once
#include "sampling/candidates.cuh"

namespace fi::sampling {

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
  const bool works = warp_id() < Row::kBlocks;
  uint32_t segment = 0;
  uint64_t rest = 0, weight = kWeightOne;
  uint64_t mass[Row::kPer], sum = 0, inclusive = 0;
  if (works) {
    // Each of these warps finds the segment: a lane has some that follow each other, mostly four.
    const uint32_t segments = state.row.segments(), each = max_of(ceil_div(segments, 32u), 4u), first = lane_id() * each;
    auto of = [&](uint32_t s) {
      if constexpr (kWhole) return state.part(s);
      else return s < segments ? shared.sum[s] : uint64_t(0);
    };
    uint64_t part[4], own = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) own += part[i] = of(first + i);
    for (uint32_t i = 4; i < each; ++i) own += of(first + i);
    const uint64_t end = warp_scan(own), total = __shfl_sync(kFullMask, end, 31), target = __umul64hi(random, total);
    uint64_t start = end - own;
    const bool here = start <= target && target < end;
    segment = first;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (segment == first + i && start + part[i] <= target) {
        start += part[i];
        ++segment;
      }
    }
    if (here && each > 4 && start + part[3] <= target && segment == first + 3) {
      for (start += part[3], ++segment;; ++segment) {
        const uint64_t next = of(segment);
        if (target < start + next) break;
        start += next;
      }
    }
    rest = target - start;
    const int source = __ffs(__ballot_sync(kFullMask, here)) - 1;
    segment = __shfl_sync(kFullMask, segment, source);
    rest = __shfl_sync(kFullMask, rest, source);
    auto ref = state.ref;
    if constexpr (kWhole && Domain::kOwnRef) {
      ref = Domain::ref(value_of(shared.top[segment]));
      weight = Domain::weight(ref, state.ref);
    }
    float v[Row::kPer];
    state.row.load_at(segment * kSegment + warp_id() * Row::kBlock + lane_id() * Row::kPer, v);
#pragma unroll
    for (int j = 0; j < Row::kPer; ++j) {
      mass[j] = kWhole || key_of(v[j]) >= threshold ? Domain::mass(v[j], ref) : 0;
      sum += mass[j];
    }
    inclusive = warp_scan(sum);
    if (lane_id() == 31) shared.warp_sum[warp_id()] = inclusive;
    if (threadIdx.x == 0) shared.above = total;
  }
  __syncthreads();  // the blocks' masses are known
  if (works) {
    for (int w = 0; w < warp_id(); ++w) inclusive += shared.warp_sum[w];
    uint64_t start = inclusive - sum;
    if (scaled(start, weight) <= rest && rest < scaled(inclusive, weight)) {  // one lane
      uint32_t lighter = 0;
#pragma unroll
      for (int j = 0; j < Row::kPer; ++j) {
        start += mass[j];
        lighter += scaled(start, weight) <= rest;
      }
      shared.token = segment * kSegment + warp_id() * Row::kBlock + lane_id() * Row::kPer + lighter;
      if constexpr (kKey) shared.threshold = key_of(state.row.at(shared.token));  // once more: registers are short
    }
  }
  __syncthreads();  // the token is known
  return {shared.token, shared.threshold, shared.above};
}

// The same, not inlined, as `search`. The State's shared memory is the dynamic one.
template <bool kWhole, class State>
__device__ __noinline__ Drawn draw_apart(typename State::Row row, uint32_t top_key, uint32_t threshold, uint64_t random) {
  extern __shared__ __align__(1024) uint8_t smem[];
  const State state(row, *reinterpret_cast<typename State::Shared*>(smem), top_key);
  return draw<kWhole, true>(state, threshold, random);
}

// With the token's key; kApart: not inlined.
template <bool kApart, bool kWhole, class State>
FI_DEVICE Drawn draw_as(const State& state, uint32_t threshold, uint64_t random) {
  if constexpr (kApart) return draw_apart<kWhole, State>(state.row, state.top_key, threshold, random);
  else return draw<kWhole, true>(state, threshold, random);
}

struct Outcome {
  bool first;  // this is the cluster's first CTA; the others know no more
  bool nan, valid;
  uint32_t token;
};

// Another pass over the row: every segment's mass of what has at least the key `least`, to the first CTA's `sums`. Only blocks
// that have such elements are read again: a segment's together, where they are many.
template <class Domain, class Shape, class Row, class Shared>
FI_DEVICE void add_many_from(const Row& row, typename Domain::Ref ref, uint32_t least, Shared& shared, uint64_t* sums,
                             uint64_t* box) {
  const uint32_t segments = row.segments();
  const float bound = value_of(least);
  __syncwarp();  // the warp's block tops are written
#pragma unroll 1
  for (uint32_t s = Shape::first(); s < segments; s += Shape::kStep) {
    uint32_t blocks = 0;
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) blocks |= uint32_t(shared.block_top[s * Row::kBlocks + b] >= least) << b;
    uint64_t sum = 0;
    if (blocks) {
      typename Row::Block v[Row::kBlocks];
      row.load(s, 0, blocks, v);
      each_value<Row>(v, [&](float x, int, int) {
        const uint64_t mass = Domain::mass(x, ref);
        if (x >= bound) sum += mass;
      });
      sum = ptx::warp_sum_u64(sum);
    }
    if (lane_id() == 0) Shape::post(&sums[s], sum, box, 0);
  }
}

// The mass of what reaches ties, by every CTA of its own segments; behind `shortlist`, by the same mailbox. Not inlined, as
// `search`.
template <class Domain, class Shape, class Row, class Shared>
__device__ __noinline__ void add_ties(Row row, uint32_t top_key, uint32_t ties) {
  extern __shared__ __align__(1024) uint8_t smem[];
  Shared& shared = *reinterpret_cast<Shared*>(smem);
  add_many_from<Domain, Shape>(row, Domain::ref(value_of(top_key)), ties, shared, tie_sums(shared), &shared.box[2]);
}

// Mass from a key on where few blocks reach it: several at a time, whatever segments they are of.
template <class Domain, class Shape, class Row, class Shared>
FI_DEVICE void add_from(const Row& row, typename Domain::Ref ref, uint32_t least, Shared& shared, uint64_t* box) {
  constexpr int kBlocks = Row::kBlocks, kPer = Row::kPer;
  constexpr int kTogether = 32 / kBlocks;  // segments whose blocks a warp looks at together, a lane a block
  constexpr int kFlight = 16 / kPer;       // loads of a thread that are on their way together
  const uint32_t segments = row.segments();
  const float bound = value_of(least);
  __syncwarp();  // the warp's block tops are written
#pragma unroll 1
  for (uint32_t first = Shape::first(); first < segments; first += kTogether * Shape::kStep) {
    const uint32_t own = first + lane_id() / kBlocks * Shape::kStep;
    uint32_t taken = __ballot_sync(kFullMask, own < segments && shared.block_top[own * kBlocks + lane_id() % kBlocks] >= least);
    if (lane_id() % kBlocks == 0 && own < segments && !(taken >> lane_id() & ((1u << kBlocks) - 1)))
      Shape::post(&shared.sum[own], uint64_t(0), box, 0);
    uint64_t sum = 0;  // of this lane, of the segment whose blocks are being added up
#pragma unroll 1
    while (taken) {
      float v[kFlight][kPer];
      uint32_t next[kFlight];
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        next[f] = taken ? __ffs(taken) - 1 : 32;
        taken &= taken - 1;
        const uint32_t block = (first + next[f] / kBlocks * Shape::kStep) * kBlocks + next[f] % kBlocks;
        if (next[f] < 32) row.load_at(block * Row::kBlock + lane_id() * kPer, v[f]);
      }
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        if (next[f] == 32) break;
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          const uint64_t mass = Domain::mass(v[f][j], ref);
          if (v[f][j] >= bound) sum += mass;
        }
        const uint32_t following = f + 1 < kFlight ? next[f + 1] : taken ? __ffs(taken) - 1 : 32;
        if (following / kBlocks == next[f] / kBlocks) continue;
        sum = ptx::warp_sum_u64(sum);  // the segment's last block
        if (lane_id() == 0) Shape::post(&shared.sum[first + next[f] / kBlocks * Shape::kStep], sum, box, 0);
        sum = 0;
      }
    }
  }
}

// Top-p alone, by rejection: draw from all; if the tokens likelier than the drawn one have the mass that top-p asks for,
// it is none of those that top-p keeps, and the next draw, with the next random number, is among the likelier ones. The
// draws that are accepted are distributed as top-p says, no threshold is ever searched for, and ties cost nothing. On
// average 1.1 rounds for p = 0.9 and 2 for p = 0.5 of logits with a deviation of 3; each reads the likelier tokens' blocks
// again.
constexpr uint32_t kAccepted = 0xffffffffu;

template <bool kApart, class Domain, class Shape, class Row, class Shared, class Fresh>
FI_DEVICE Outcome draw_top_p(const Row& row, const FilterArgs& args, Shared& shared, Fresh&& fresh) {
  using State = RowState<Domain, Shape::kThreads, Row, Shared>;
  Outcome out = {Shape::rank() == 0, false, true, 0};
  Started<Shape> started;
  summarise<Domain, false, true, Shape>(row, shared, true, started, NotHeld{});
  uint32_t pivot = kAccepted, top_key = 0;
  uint64_t target = 0;
#pragma unroll 1
  for (uint32_t round = 0;; ++round) {
    if (out.first) {
      Shape::receive(&shared.box[0], round, round == 0 ? summary_bytes<false>(row, true) : 8 * row.segments());
      if (round == 0) top_key = row_top(shared, row.segments());
      const State state(row, shared, top_key);
      if (round == 0) {
        out.nan = state.nan();
        out.valid = state.valid();
        if (out.valid) {
          state.correct_unit();
          const Drawn drawn = draw_as<kApart, true>(state, 0, fresh(0));
          out.token = drawn.token;
          target = args.has_top_p() ? args.template target<Domain>(drawn.total, state.ref) : ~uint64_t(0);
          pivot = drawn.key == top_key || target > drawn.total ? kAccepted : drawn.key;
        }
      } else {
        const uint64_t above = state.kept();
        if (above < target) {
          pivot = kAccepted;
        } else {
          const Drawn drawn = draw_as<kApart, false>(state, pivot + 1, fresh(round));
          out.token = drawn.token;
          pivot = drawn.key == top_key ? kAccepted : drawn.key;
        }
      }
      if (0 < threadIdx.x && threadIdx.x < Shape::kCluster)
        Shape::post(&shared.told, uint64_t(top_key) << 32 | pivot, &shared.box[1], threadIdx.x);
    } else {
      Shape::receive(&shared.box[1], round, 8);
      pivot = uint32_t(shared.told);
      top_key = uint32_t(shared.told >> 32);
    }
    if (pivot == kAccepted) return out;
    __syncthreads();  // every thread knows the pivot: the next message may come
    add_many_from<Domain, Shape>(row, Domain::ref(value_of(top_key)), pivot + 1, shared, shared.sum, &shared.box[0]);
  }
}

// Min-p alone: every CTA learns the row's largest value, adds up what its threshold keeps, and the first one draws.
template <class Domain, class Shape, class Row, class Shared, class Fresh>
FI_DEVICE Outcome draw_min_p(const Row& row, const FilterArgs& args, Shared& shared, Fresh&& fresh) {
  Outcome out = {Shape::rank() == 0, false, true, 0};
  const uint32_t segments = row.segments();
  Started<Shape> started;
#pragma unroll 1
  for (uint32_t s = Shape::first(); s < segments; s += Shape::kStep) {
    typename Row::Block v[Row::kBlocks];
    row.load(s, 0, Row::kAll, v);
    started.wait();
    uint4 keys;
    const uint32_t top = segment_top<true, Row>(v, keys);
    if (lane_id() < Row::kBlocks / 4) reinterpret_cast<uint4*>(shared.block_top + s * Row::kBlocks)[lane_id()] = keys;
    if (lane_id() < Shape::kCluster) Shape::post(&shared.top[s], top, &shared.box[0], lane_id());
  }
  started.wait();
  Shape::receive(&shared.box[0], 0, 4 * segments);
  const RowState<Domain, Shape::kThreads, Row, Shared> state(row, shared);
  out.nan = state.nan();
  out.valid = state.valid();
  if (!out.valid) return out;
  uint32_t threshold = key_of(-FI_INF);
  if (args.p > 0.f) threshold = max_of(threshold, Domain::min_p_key(args.p, state.top));
  add_from<Domain, Shape>(row, state.ref, threshold, shared, &shared.box[1]);
  if (!out.first) return out;
  const uint64_t random = fresh(0);
  Shape::receive(&shared.box[1], 0, 8 * segments);
  out.token = draw<false>(state, threshold, random).token;
  return out;
}

}  // namespace fi::sampling
