// The filters: tokens whose key reaches a threshold are kept, ties included. A filter looks at the row, as it was
// summarised, or at a list of candidates that surely holds everything it may keep.
#pragma once
#include "sampling/select.cuh"

namespace fi::sampling {

// A summarised row, in the CTA that decides.
template <class Domain_, int kThreads_, class Row_, class Shared_>
struct RowState {
  using Domain = Domain_;
  using Row = Row_;
  using Shared = Shared_;
  static constexpr int kThreads = kThreads_;
  static_assert(kThreads >= Shared::kSegments, "a thread a segment");

  const Row& row;
  Shared& shared;
  uint32_t top_key;
  float top;
  typename Domain::Ref ref;

  FI_DEVICE RowState(const Row& row, Shared& shared)
      : RowState(row, shared, row_top(shared, row.segments())) {}
  FI_DEVICE RowState(const Row& row, Shared& shared, uint32_t top_key)
      : row(row), shared(shared), top_key(top_key), top(value_of(top_key)), ref(Domain::ref(top)) {}

  FI_DEVICE bool nan() const { return top_key > kInfKey; }
  FI_DEVICE bool valid() const { return !nan() && Domain::valid(top); }

  // The first pass's sum of a segment in the row's unit.
  FI_DEVICE uint64_t part(uint32_t segment) const {
    if (segment >= row.segments()) return 0;
    const uint64_t sum = shared.sum[segment];
    if constexpr (!Domain::kOwnRef) return sum;
    else return scaled(sum, Domain::weight(Domain::ref(value_of(shared.top[segment])), ref));
  }
  FI_DEVICE uint64_t total() const { return block_sum<kThreads>(part(threadIdx.x), shared.warp_sum); }
  // The sum over what `keep_sums` or `list_sums` left.
  FI_DEVICE uint64_t kept() const {
    return block_sum<kThreads>(threadIdx.x < row.segments() ? shared.sum[threadIdx.x] : 0, shared.warp_sum);
  }
  // Probabilities: sums of segments anew, in the row's own unit. One barrier behind the sums.
  FI_DEVICE void add_up() const {
#pragma unroll 1
    for (uint32_t s = warp_id(); s < row.segments(); s += kThreads / 32) {
      uint64_t sum = 0;
#pragma unroll 1
      for (int b = 0; b < Row::kBlocks; ++b) {
        float v[Row::kPer];
        row.load_at(s * kSegment + b * Row::kBlock + lane_id() * Row::kPer, v);
#pragma unroll
        for (int j = 0; j < Row::kPer; ++j) sum += Domain::mass(v[j], ref);
      }
      sum = ptx::warp_sum_u64(sum);
      if (lane_id() == 0) shared.sum[s] = sum;
    }
    __syncthreads();  // sums are complete
  }
  // Rows of an unusual scale were summarised in the wrong unit.
  FI_DEVICE void correct_unit() const {
    if constexpr (!Domain::kOwnRef) {
      if (ref.exponent != 0) add_up();
    }
  }
  // Replace the segments' sums by the mass of what a threshold keeps. One barrier behind the sums.
  FI_DEVICE void keep_sums(uint32_t threshold) const {
    uint64_t lane = 0;
    for_each<kThreads>(
        row, shared, threshold, 0xffffffffu, [&](float x, uint32_t) { lane += Domain::mass(x, ref); },
        [&](uint32_t segment) {
          lane = ptx::warp_sum_u64(lane);
          if (lane_id() == 0) shared.sum[segment] = lane;
          lane = 0;
        });
    __syncthreads();  // sums are complete
  }
  // The same by adding those of the list; the sums hold what is kept beside it.
  FI_DEVICE void list_sums(uint32_t n, uint32_t threshold) const {
    for (uint32_t i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t key = shared.key[i];
      if (key >= threshold) {
        const unsigned long long mass = Domain::mass(value_of(key), ref);
        atomicAdd(reinterpret_cast<unsigned long long*>(&shared.sum[shared.index[i] / kSegment]), mass);
      }
    }
    __syncthreads();  // sums are complete
  }
};

struct FilterArgs {
  uint32_t top_k;  // 1 ... vocab; vocab keeps all
  float p;         // top-p (1 or more, or NaN, keeps all) or min-p
  bool joint;      // top-p looks at the row as it stands, else at what top-k left, renormalised
  float min_p = 0.f;   // beside top-k and top-p: p >= min_p * max, inclusive; 0 keeps all
  uint32_t least = 0;  // the key of that bound, once the row's largest value is known

  FI_DEVICE bool has_top_k(uint32_t vocab) const { return top_k < vocab; }
  FI_DEVICE bool has_top_p() const { return p < 1.f; }
  FI_DEVICE bool has_min_p() const { return min_p > 0.f; }
  // The mass that top-p has to reach. `total`: of the row if joint (probabilities do without), else of top-k's tokens;
  // `factor`: share_factor(p).
  template <class Domain>
  FI_DEVICE uint64_t target(uint64_t total, typename Domain::Ref ref, uint64_t factor) const {
    uint64_t mass = 1;  // the likeliest tokens are always kept
    if (p > 0.f) mass = max_of(mass, joint ? Domain::absolute(p, factor, total, ref) : share(factor, total));
    return mass;
  }
  template <class Domain>
  FI_DEVICE uint64_t target(uint64_t total, typename Domain::Ref ref) const {
    return target<Domain>(total, ref, share_factor(p));
  }
};

// What a filter still has to look at: the first `listed` elements of the list, or (kWholeRow) the row. Keys below `low`
// are surely rejected, and there are none above `high`.
constexpr uint32_t kWholeRow = 0xffffffffu;
struct Rest {
  uint32_t listed, low, high;
};

// Top-k, then top-p: the threshold; the segments' sums become those of what it keeps. `total`: the row's mass, if the
// arguments ask for it. The State's shared memory is the dynamic one. Not inlined: it would cost the kernel's other
// parts registers.
template <int exact_bits, class State>
__device__ __noinline__ uint32_t search(typename State::Row row, uint32_t top_key, FilterArgs args, Rest rest,
                                        uint64_t total) {
  using Domain = typename State::Domain;
  constexpr int kThreads = State::kThreads;
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename State::Shared*>(smem);
  const State state(row, shared, top_key);
  const bool has_top_k = args.has_top_k(state.row.vocab);
  uint32_t threshold = rest.low;
  auto visit = [&](uint32_t low, uint32_t high, auto&& f) {
    if (rest.listed == kWholeRow) {
      for_each<kThreads>(state.row, shared, low, high, f, [](uint32_t) {});
    } else {
      for (uint32_t i = threadIdx.x; i < rest.listed; i += kThreads) {
        const uint32_t key = shared.key[i];
        if (low <= key && key <= high) f(value_of(key), key);
      }
    }
  };
#pragma unroll 1
  for (int stage = has_top_k ? 0 : 1; stage < (args.has_top_p() ? 2 : 1); ++stage) {  // by count, by mass
    uint64_t target = args.top_k;
    if (stage == 1) {
      if (has_top_k && !args.joint) {
        total = 0;
        visit(threshold, rest.high, [&](float x, uint32_t) { total += Domain::mass(x, state.ref); });
        total = block_sum<kThreads>(total, shared.warp_sum);
      }
      target = args.target<Domain>(total, state.ref);
      const uint64_t certain = total - (total >> 12);  // segment sums differ from the row's by far less than that
      if (rest.listed == kWholeRow && !has_top_k && certain > target) {
        // All tokens lighter than (total - target) / vocab together cannot fill the gap, so they are all rejected.
        const float light = __ull2float_rz(certain - target) * (0.999f / float(state.row.vocab));
        if (light > 1.f) threshold = max_of(threshold, min_of(key_of(Domain::value_below(light, state.ref)), rest.high));
      }
    }
    threshold = select<kThreads>(
        visit, [&](float x) { return stage == 0 ? uint64_t(1) : Domain::mass(x, state.ref); }, threshold, rest.high,
        target, exact_bits, shared);
  }
  threshold = max_of(threshold, args.least);
  if (rest.listed == kWholeRow) {
    state.keep_sums(threshold);
  } else {
    state.list_sums(rest.listed, threshold);
  }
  return threshold;
}

}  // namespace fi::sampling
