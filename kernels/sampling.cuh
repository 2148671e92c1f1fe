// Sampling from rows of logits or probabilities: one token a row, of those that a filter keeps, by inversion of the
// cumulative distribution in index order with one Philox number; and the same filters as renormalisation and as mask.
// A cluster of kCluster CTAs (1 below sm_90) of kThreads reads one row; grid = output rows * kCluster. Its first CTA
// collects what the others found, in its shared memory, and decides; where rows are written, all of them write.
// The row is read once; then only blocks that reach a proven lower bound (candidates.cuh), a pivot or a threshold
// (draw.cuh). All decisions are integer (mass.cuh): tokens and kept sets are the same for every launch shape and
// architecture.
// Shared memory (dynamic): RowShared, and the row's segments if they are held. Bytes moved: rows * vocab * sizeof(T),
// and as much for rows written. Architecture: any; clusters need sm_90.
#pragma once
#include "ptx/pdl.cuh"
#include "sampling/draw.cuh"
#include "sampling/gather.cuh"
#include "sampling/parameters.cuh"

namespace fi {

namespace sampling {

template <class Filter>
FI_DEVICE FilterArgs filter_args(const SamplingParams& params, uint32_t row) {
  const uint32_t flags = params.flags;
  int64_t k = params.top_k ? read_index(params.top_k, flags & kTopK64, row) : params.top_k_value;
  k = max_of<int64_t>(1, min_of<int64_t>(k, params.vocab));
  FilterArgs args = {uint32_t(k), read_real(params.p, flags & kP64, row, params.p_value), (flags & kJoint) != 0};
  if constexpr (Filter::kTop && Filter::kMin) args.min_p = read_real(params.min_p, flags & kMinP64, row, params.min_p_value);
  return args;
}

// The filters' kinds: kTop, top-k; kMass, and then top-p; kMin, min-p, which keeps p >= min_p * max, inclusive, of what
// they left.
struct NoFilter {
  static constexpr bool kFilters = false, kTop = false, kMass = false, kMin = false;
};
struct TopP {  // alone: by rejection, as the filters with kMass do if a row's top-k and min-p keep all
  static constexpr bool kFilters = false, kTop = false, kMass = false, kMin = false;
};
struct MinP {  // alone: by the largest value
  static constexpr bool kFilters = false, kTop = false, kMass = false, kMin = false;
};
struct TopK {
  static constexpr bool kFilters = true, kTop = true, kMass = false, kMin = false;
};
struct TopKTopP {
  static constexpr bool kFilters = true, kTop = true, kMass = true, kMin = false;
};
struct AllFilters {
  static constexpr bool kFilters = true, kTop = true, kMass = true, kMin = true;
};

// What the cluster's first CTA found out about a row; the other CTAs come back with `first` false.
struct Judged {
  bool first;
  bool nan, valid;
  bool whole;   // nothing is filtered: the sums are the first pass's
  uint32_t low;  // this CTA's candidates are everything of its segments from this key on (where rows are written)
  Verdict verdict;
  uint64_t random;  // without a filter
};

// The key of min-p's bound, for candidates of min-p alone.
template <class Domain>
struct MinPBound {
  float min_p;
  FI_DEVICE uint32_t operator()(uint32_t top_key) const { return Domain::min_p_key(min_p, value_of(top_key)); }
};

// Read a row by the whole cluster, and in its first CTA find what the filter keeps. `held`: what becomes of the segments
// while they are read; fresh(): the random bits of a draw (kDraws).
template <class Filter, class Shape, int exact_bits, class Domain, bool kDraws, class Row, class Shared, class Held, class Fresh>
FI_DEVICE Judged judge_row(const Row& row, const FilterArgs& args, Shared& shared, const Held& held, Fresh&& fresh) {
  using State = RowState<Domain, Shape::kThreads, Row, Shared>;
  const bool top_k = Filter::kTop && args.has_top_k(row.vocab), top_p = Filter::kMass && args.has_top_p();
  const bool whole = !Filter::kFilters || (!top_k && !top_p && !args.has_min_p());
  const bool alone = top_p && !top_k;  // no bound is known for it: the row is searched
  const bool joint = Domain::kOwnRef && top_p && args.joint;  // top-p compares with the whole row's mass
  const bool sums = whole || alone || joint;
  using Load = MassLoad<Domain, kDraws, kDraws || Filter::kMass || !Domain::kOwnRef>;
  Judged judged = {Shape::rank() == 0, false, false, whole, 0xffffffffu, {}, 0};
  uint32_t size = 0;  // not 0: every CTA lists its candidates
  if (Filter::kFilters && !whole && !alone) size = group_size<Row>(row.segments(), top_k ? args.top_k : 0);
  const Tell tell = tell_of<Row>(size);
  Started<Shape> started;
  summarise<Domain, Filter::kFilters, Filter::kFilters, Shape>(row, shared, sums, started, held, tell);
  if (!judged.first && size == 0) return judged;
  // Random bits, while others are awaited: with filters by the warp that has least to read.
  if (kDraws && judged.first && (!Filter::kFilters || warp_id() == Shape::kThreads / 32 - 1)) {
    judged.random = fresh();
    asm volatile("" : "+l"(judged.random));  // now
    if (Filter::kFilters && lane_id() == 0) shared.random = judged.random;
  }
  if (Filter::kFilters && threadIdx.x == 0) pad_tops<Row>(shared, row.segments(), size);
  Shape::receive(&shared.box[0], 0, summary_bytes<Filter::kFilters>(row, sums, tell, judged.first));
  Bounds bounds = {0, 0, 0};
  if constexpr (Filter::kFilters) {
    if (size != 0) {
      bounds = shortlist<Shape, Load, Held::kKeeps, Row, Shared>(row, size, top_k ? args.top_k : 0,
                                                                 MinPBound<Domain>{args.min_p});
      judged.low = bounds.low;
      if (Load::kAdds && bounds.ties) add_ties<Domain, Shape, Row, Shared>(row, bounds.top, bounds.ties);
      if (!judged.first) return judged;
    }
  }
  const State state(row, shared, size != 0 ? bounds.top : row_top(shared, row.segments()));
  judged.nan = state.nan();
  judged.valid = state.valid();
  if (!judged.valid) return judged;
  if (whole) {
    state.correct_unit();
  } else if constexpr (Filter::kFilters) {
    FilterArgs left = args;
    if constexpr (Filter::kMin) {
      if (args.has_min_p()) left.least = Domain::min_p_key(args.min_p, state.top);
    }
    uint32_t low = bounds.low, listed = kWholeRow, finer = 0;
    uint64_t total = 0;
    if (alone) state.correct_unit();
    if (size != 0) {
      judged.verdict = settle<State, Shape, Load, kDraws>(row, state.top_key, left, bounds.ties);
      if (judged.verdict.drawn || judged.verdict.tied) return judged;
      judged.low = 0xffffffffu;  // they give way to the list
    }
    if (alone || joint) total = state.total();
    if (size != 0) listed = gather<State>(row, low);
    if (listed > Shared::kList && top_k && lower_bound(state, args.top_k, finer) && finer > low) {
      low = finer;
      listed = gather<State>(row, low);
    }
    if (threadIdx.x < row.segments()) shared.sum[threadIdx.x] = 0;
    __syncthreads();  // sums are clear
    const Rest rest = {listed <= Shared::kList ? listed : kWholeRow, low, state.top_key};
    judged.verdict.threshold = search<exact_bits, State>(row, state.top_key, left, rest, total);
  }
  return judged;
}

}  // namespace sampling

// Config: T, Domain (sampling::Logits or Probs), Filter (sampling::NoFilter, TopP, MinP, TopK, TopKTopP or AllFilters),
// kScaled (by temperature), kThreads, kCluster, kSegments, kList (RowShared), kSharedBytes (its size)
template <class Config>
FI_DEVICE void sample(const SamplingParams& params) {
  using namespace sampling;
  using T = typename Config::T;
  using Domain = typename Config::Domain;
  using Filter = typename Config::Filter;
  using Source = SourceRow<T, Config::kScaled>;
  using Row = typename Source::Row;
  using Shape = sampling::Shape<Config::kThreads, Config::kCluster>;
  using Shared = RowShared<Config::kSegments, !is_same_v<Filter, NoFilter>, Config::kList>;
  static_assert(sizeof(Shared) == Config::kSharedBytes);
  extern __shared__ __align__(1024) uint8_t smem[];
  Shared& shared = *reinterpret_cast<Shared*>(smem);

  set_counters<Shape>(shared);
  Shape::start();
  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint32_t output_row = Shape::row(), flags = params.flags;
  const int64_t index = params.indices ? read_index(params.indices, flags & kIndices64, output_row) : output_row;
  uint32_t token = 0;
  bool nan = false, valid = false, writes = threadIdx.x == 0;
  if (0 <= index && index < params.rows) {
    const PlainRow<T> plain{static_cast<const T*>(params.input) + index * params.stride, params.vocab,
                            (flags & kAlignedInput) != 0};
    const float inverse =
        Config::kScaled ? read_inverse(params.temperature, flags & kTemperature64, output_row, params.inverse_value) : 1.f;
    const Row row = Source::make(plain, inverse);
    const FilterArgs args = filter_args<Filter>(params, output_row);
    // Random bits are made where they are needed: in front of the first loads they would delay them.
    auto fresh = [&](uint32_t draw) {
      return Stream(params.seed, params.offset, params.seed_value, params.offset_value, flags, output_row).bits64(draw);
    };
    Outcome drawn = {false, false, false, 0};
    bool done = false;
    if constexpr (is_same_v<Filter, MinP>) {
      drawn = draw_min_p<Domain, Shape>(row, args, shared, fresh);
      done = true;
    } else if constexpr (is_same_v<Filter, TopP> || Filter::kMass) {
      done = is_same_v<Filter, TopP> || !(args.has_top_k(params.vocab) || args.has_min_p());
      if (done) drawn = draw_top_p<Filter::kMass, Domain, Shape>(row, args, shared, fresh);
    }
    if (done) {
      if (!drawn.first) return;
      nan = drawn.nan;
      valid = drawn.valid;
      token = drawn.token;
    } else if constexpr (!is_same_v<Filter, TopP> && !is_same_v<Filter, MinP>) {
      const Judged judged = judge_row<Filter, Shape, Config::kScaled ? 0 : kExactBits<T>, Domain, true>(
          row, args, shared, NotHeld{}, [&] { return fresh(0); });
      if (!judged.first) return;
      nan = judged.nan;
      valid = judged.valid;
      using State = RowState<Domain, Config::kThreads, Row, Shared>;
      if (Filter::kFilters && valid && judged.verdict.drawn) {
        token = judged.verdict.token;
        writes = judged.verdict.mine;
      } else if (valid) {
        const State state(row, shared);
        if constexpr (!Filter::kFilters) {
          token = draw<true>(state, 0, judged.random).token;
        } else if (Filter::kMass || !judged.whole) {
          token = draw_apart<false, State>(row, state.top_key, judged.verdict.threshold, fresh(0)).token;
        } else {
          token = draw_apart<true, State>(row, state.top_key, 0, fresh(0)).token;
        }
      }
    }
  } else if (Shape::rank() != 0) {
    return;
  }
  if (writes) {
    write_index(params.output, flags & kIndices64, output_row, token);
    if (params.valid) params.valid[output_row] = valid;
    if (params.nan) params.nan[output_row] = nan;
  }
}

// Rows with what Filter rejects at 0 and the rest divided by its sum (Probs), or at -inf and the rest as it is (Logits).
// If top-k rejects, the output is filled while the row is read, and only what is kept is written again; else the row is
// read again, from L2 if clusters are so large that the rows in flight fit there. Config: as for `sample` without kScaled
template <class Config>
FI_DEVICE void filter_rows(const SamplingParams& params) {
  using namespace sampling;
  using T = typename Config::T;
  using Domain = typename Config::Domain;
  using Filter = typename Config::Filter;
  using Row = PlainRow<T>;
  using Shape = sampling::Shape<Config::kThreads, Config::kCluster>;
  using Shared = RowShared<Config::kSegments, true, Config::kList>;
  constexpr int kPer = Row::kPer;
  constexpr bool kMask = is_same_v<Domain, Logits>;
  static_assert(sizeof(Shared) == Config::kSharedBytes && Config::kSharedBytes % 16 == 0);
  extern __shared__ __align__(1024) uint8_t smem[];
  Shared& shared = *reinterpret_cast<Shared*>(smem);

  set_counters<Shape>(shared);
  Shape::start();
  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint32_t vocab = params.vocab;
  const int64_t row_number = Shape::row();
  const Row row{static_cast<const T*>(params.input) + row_number * params.stride, vocab,
                (params.flags & kAlignedInput) != 0};
  T* const output = static_cast<T*>(params.output) + row_number * vocab;
  const bool vectors = (params.flags & kAlignedOutput) != 0;
  const FilterArgs args = filter_args<Filter>(params, uint32_t(row_number));
  const bool fills = args.has_top_k(vocab);
  const Filled<T> filled{fills ? output : nullptr, from_float<T>(kMask ? -FI_INF : 0.f), vocab, vectors};
  const Judged judged = judge_row<Filter, Shape, kExactBits<T>, Domain, false>(
      row, args, shared, filled, [] { return uint64_t(0); });
  if (judged.first) {
    uint32_t threshold = 0xffffffffu;  // nothing is kept of an invalid row
    float sum = 1.f;
    if (judged.valid) {
      threshold = max_of(judged.verdict.threshold, key_of(-FI_INF));
      if constexpr (!kMask) {
        const RowState<Domain, Config::kThreads, Row, Shared> state(row, shared);
        sum = Domain::probability(judged.verdict.drawn ? judged.verdict.total : state.kept(), state.ref);
      }
    }
    const uint64_t told = uint64_t(__float_as_uint(sum)) << 32 | threshold;
    if (threadIdx.x == 0) shared.told = told;
    else if (threadIdx.x < Shape::kCluster) Shape::post(&shared.told, told, &shared.box[1], threadIdx.x);
    __syncthreads();  // this CTA knows, too
  } else {
    Shape::receive(&shared.box[1], 0, 8);
  }
  const uint32_t threshold = uint32_t(shared.told);
  const float told_sum = __uint_as_float(uint32_t(shared.told >> 32));
  const float least = value_of(threshold);  // NaN for an invalid row: nothing reaches it
  const Quotient quotient(told_sum);
  const bool listed = fills && threshold >= judged.low && judged.low != 0xffffffffu;
  if (listed) __syncthreads();  // this CTA's candidates are complete, and its fill is written
  if (listed && shared.count <= Shared::room(Shape::kCluster)) {
    for (uint32_t i = threadIdx.x; i < shared.count; i += Config::kThreads) {
      const uint64_t candidate = shared.candidates()[i];
      const uint32_t key = uint32_t(candidate), index = uint32_t(candidate >> 32);
      if (key < threshold) continue;
      const float x = key == key_of(0.f) ? row.at(index) : value_of(key);  // the sign of 0 is not in its key
      output[index] = from_float<T>(kMask ? x : quotient(x));
    }
    return;
  }
  constexpr int kStep = Shape::kStep;
  const int first = Shape::first(), left = int(row.segments()) - 1 - first;
  __syncwarp();  // the warp's block tops are written
#pragma unroll 1
  for (int s = first + left / kStep * kStep; left >= 0 && s >= first; s -= kStep) {  // what was read last is nearest
    typename Row::Block v[Row::kBlocks];
    uint32_t blocks = Row::kAll;
    if (fills) {
      blocks = 0;
#pragma unroll
      for (int b = 0; b < Row::kBlocks; ++b)
        blocks |= uint32_t(shared.block_top[s * Row::kBlocks + b] >= threshold) << b;
      if (!blocks) continue;
    }
    row.load(s, 0, blocks, v);
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) {
      if (!(blocks >> b & 1)) continue;
      float y[kPer];
      v[b].to_floats(y);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const bool keep = y[j] >= least;
        if constexpr (kMask) {
          y[j] = keep ? y[j] : -FI_INF;
        } else {
          y[j] = keep ? quotient(y[j]) : 0.f;
        }
      }
      const uint32_t at = s * kSegment + b * Row::kBlock + lane_id() * kPer;
      const auto kept = Vec<T, kPer>::from_floats(y);
      if (vectors && at + kPer <= vocab) {
        kept.store_streaming(output + at);  // the L2 holds rows that will be read again
      } else {
        kept.store_part(output, at, vocab, false);
      }
    }
  }
}

}  // namespace fi
