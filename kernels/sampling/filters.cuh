// The filters: each turns a summarised row into a threshold key; tokens whose key reaches it are kept, ties included.
// A filter is a small struct with `threshold(row)`; `needs_sums` says whether the first pass must add up masses.
#pragma once
#include "sampling/select.cuh"

namespace fi::sampling {

// A summarised row and what the filters and the draw need of it.
template <class Domain_, int kThreads_, class Row_>
struct RowState {
  using Domain = Domain_;
  using Row = Row_;
  static constexpr int kThreads = kThreads_;

  const Row& row;
  RowSummary& summary;
  SelectScratch& scratch;
  float top;
  typename Domain::Ref ref;

  FI_DEVICE RowState(const Row& row, RowSummary& summary, SelectScratch& scratch)
      : row(row), summary(summary), scratch(scratch), top(row_top(summary, row.segments())), ref(Domain::ref(top)) {}

  FI_DEVICE uint32_t top_key() const { return key_of(top); }

  // Bring the segments' sums to the row's unit; returns their total. Each thread changes its own segment only.
  FI_DEVICE uint64_t scale_sums() const {
    static_assert(kThreads >= kMaxSegments);
    uint64_t sum = 0, total;
    if (threadIdx.x < row.segments()) {
      const auto part = Domain::ref(summary.top[threadIdx.x]);
      sum = scaled(summary.sum[threadIdx.x], Domain::weight(part, ref));
      summary.sum[threadIdx.x] = sum;
    }
    block_scan<kThreads>(sum, scratch.warp_sum, total);
    return total;
  }
  // Replace the segments' sums by the mass of what a threshold keeps; returns the total.
  FI_DEVICE uint64_t keep_sums(uint32_t threshold) const {
    uint64_t lane = 0;
    for_each<kThreads>(
        row, summary, threshold, 0xffffffffu, [&](float x, uint32_t) { lane += Domain::mass(x, ref); },
        [&](uint32_t segment) {
#pragma unroll
          for (int offset = 16; offset > 0; offset /= 2) lane += __shfl_xor_sync(kFullMask, lane, offset);
          if (lane_id() == 0) summary.sum[segment] = lane;
          lane = 0;
        });
    __syncthreads();  // sums are complete
    uint64_t total;
    block_scan<kThreads>(threadIdx.x < row.segments() ? summary.sum[threadIdx.x] : 0, scratch.warp_sum, total);
    return total;
  }
};

struct FilterArgs {
  uint32_t top_k;  // 1 ... vocab; vocab keeps all
  float p;         // top-p (1 or more, or NaN, keeps all) or min-p
  bool joint;      // top-p looks at the row as it stands, else at what top-k left, renormalised
};

struct NoFilter {
  static constexpr bool kFilters = false;
  FI_DEVICE static bool needs_sums(const FilterArgs&, uint32_t, bool) { return true; }
};

// p >= min_p * max, inclusive.
struct MinP {
  static constexpr bool kFilters = true;
  FI_DEVICE static bool needs_sums(const FilterArgs&, uint32_t, bool) { return false; }
  template <int exact_bits, class State>
  FI_DEVICE static uint32_t threshold(const State& state, const FilterArgs& args) {
    return min_of(key_of(__fmul_rn(args.p, state.top)), state.top_key());
  }
};

// Top-k: the k-th largest value. Then top-p: the smallest value whose strictly larger ones have a mass below p.
struct TopKTopP {
  static constexpr bool kFilters = true;
  FI_DEVICE static bool needs_sums(const FilterArgs& args, uint32_t vocab, bool logits) {
    return args.p < 1.f && (args.top_k >= vocab || (args.joint && logits));
  }
  template <int exact_bits, class State>
  FI_DEVICE static uint32_t threshold(const State& state, const FilterArgs& args) {
    using Domain = typename State::Domain;
    constexpr int kThreads = State::kThreads;
    const auto& row = state.row;
    const uint32_t vocab = row.vocab, top = state.top_key();
    uint32_t threshold = 0;
    if (args.top_k < vocab) {
      // k blocks have a top of at least `low`, so the k-th largest value is no smaller: what lies below is not read.
      const uint32_t blocks = row.segments() * State::Row::kBlocks;
      auto block_tops = [&](uint32_t low, uint32_t high, auto&& add) {
        for (uint32_t b = threadIdx.x; b < blocks; b += kThreads) {
          const uint32_t key = state.summary.block_top[b];
          if (low <= key && key <= high) add(key, 1);
        }
      };
      const uint32_t low = select<kThreads, true>(block_tops, 0, top, args.top_k, 10, state.scratch);
      auto counts = [&](uint32_t low, uint32_t high, auto&& add) {
        for_each<kThreads>(row, state.summary, low, high, [&](float, uint32_t key) { add(key, 1); }, [](uint32_t) {});
      };
      threshold = select<kThreads, true>(counts, low, top, args.top_k, exact_bits, state.scratch);
    }
    if (args.p < 1.f) {
      uint64_t total = 0;
      if (needs_sums(args, vocab, is_same_v<Domain, Logits>)) {
        total = state.scale_sums();
      } else if (!args.joint) {
        total = state.keep_sums(threshold);
      }
      uint64_t target = 1;  // the likeliest tokens are always kept
      if (args.p > 0.f)
        target = max_of(target, args.joint ? Domain::absolute(args.p, total, state.ref) : share(args.p, total));
      uint32_t low = threshold;
      const uint64_t certain = total - (total >> 12);  // segment sums differ from the row's by far less than that
      if (args.top_k >= vocab && certain > target) {
        // All tokens lighter than (total - target) / vocab together cannot fill the gap, so they are all rejected.
        const uint64_t light = (certain - target) / vocab;
        if (light > 1) low = min_of(key_of(Domain::value_below(light, state.ref)), top);
      }
      auto masses = [&](uint32_t low, uint32_t high, auto&& add) {
        for_each<kThreads>(
            row, state.summary, low, high, [&](float x, uint32_t key) { add(key, Domain::mass(x, state.ref)); },
            [](uint32_t) {});
      };
      threshold = select<kThreads, false>(masses, low, top, target, exact_bits, state.scratch);
    }
    return threshold;
  }
};

}  // namespace fi::sampling
