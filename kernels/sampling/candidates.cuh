// Filters that keep few tokens: gather what reaches a proven lower bound into a list, in index order, and decide there.
#pragma once
#include "sampling/filters.cuh"

namespace fi::sampling {

// What became of a row: the smallest kept key, and if the list was short (`drawn`; then known to warp 0 only) also the
// mass of what is kept and the token. Else the segments' sums hold the mass of what is kept.
struct Verdict {
  uint32_t threshold;
  uint64_t total;
  uint32_t token;
  bool drawn;
};

// Comparing everything with everything is worth it for so many items.
template <int kThreads>
FI_DEVICE bool few(uint32_t n) {
  return n <= kPairs && n * n <= 64 * kThreads;
}

// Every one of n items is compared with all by `split` threads: a power of two, so that n * split threads suffice.
template <int kThreads>
FI_DEVICE int threads_for_each(uint32_t n) {
  int split = 1;
  while (split < 32 && n * split * 2 <= kThreads) split *= 2;
  return split;
}
FI_DEVICE uint32_t split_sum(uint32_t x, int split) {
  for (int offset = split / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}
FI_DEVICE uint64_t split_sum(uint64_t x, int split) {
  for (int offset = split / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}
// Inclusive sums over the warp's lanes.
FI_DEVICE uint64_t warp_scan(uint64_t x) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const uint64_t other = __shfl_up_sync(kFullMask, x, offset);
    if (lane_id() >= offset) x += other;
  }
  return x;
}
// The warps' counts: those before this warp's, and all.
template <int kWarps>
FI_DEVICE uint32_t before(const uint32_t* counts, uint32_t& all) {
  const uint32_t count = lane_id() < kWarps ? counts[lane_id()] : 0;
  all = ptx::warp_sum_u32(count);
  return ptx::warp_sum_u32(lane_id() < warp_id() ? count : 0);
}

// A key that at least k elements reach: the k-th largest of the largest keys of segments, or of a power of two of blocks.
// The more of those there are, the fewer elements reach it that are not among the k largest. False if there are too few.
// shared.bound must be 0xffffffff, shared.inside 0, and a barrier behind that.
template <class State>
FI_DEVICE bool lower_bound(const State& state, uint32_t k, uint32_t& low) {
  constexpr int kThreads = State::kThreads, kBlocks = State::Row::kBlocks;
  auto& shared = state.shared;
  const uint32_t segments = state.row.segments(), blocks = segments * kBlocks;
  uint32_t groups = segments, size = kBlocks;
  while (size > 1 && groups < 2 * k) {
    groups *= 2;
    size /= 2;
  }
  if (k <= segments && !few<kThreads>(groups)) groups = segments;
  if (k <= groups && (groups == segments || few<kThreads>(groups))) {
    const uint32_t* keys = shared.top;
    if (groups != segments) {
      for (uint32_t g = threadIdx.x; g < groups; g += kThreads) {
        uint32_t key = 0;
        for (uint32_t b = 0; b < size; ++b) key = max_of(key, shared.block_top[g * size + b]);
        shared.bins[g] = key;
      }
      keys = shared.bins;
      __syncthreads();  // the groups' keys are known
    }
    const int split = threads_for_each<kThreads>(groups);
    const uint32_t mine = threadIdx.x / split;
    const uint32_t key = mine < groups ? keys[mine] : 0;
    uint32_t ranks = 0;  // larger ones; and in the upper half, equal ones
#pragma unroll 4
    for (uint32_t i = threadIdx.x % split; i < groups; i += split) {
      const uint32_t other = keys[i];
      ranks += other > key ? 1 : other == key ? 1 << 16 : 0;
    }
    ranks = split_sum(ranks, split);
    const uint32_t larger = ranks & 0xffff;
    if (mine < groups && larger < k && k <= larger + (ranks >> 16)) shared.bound = key;  // all the same one
    __syncthreads();  // the bound is known
    low = shared.bound;
    return true;
  }
  if (k > blocks - blocks / 4) return false;
  uint32_t least = 0xffffffffu, count = 0;
  for (uint32_t b = threadIdx.x; b < blocks; b += kThreads) {
    const uint32_t key = shared.block_top[b];
    if (key <= key_of(-FI_INF)) continue;  // nothing there
    least = min_of(least, key);
    ++count;
  }
  least = ptx::warp_min_u32(least);
  count = ptx::warp_sum_u32(count);
  if (lane_id() == 0) {
    atomicMin(&shared.bound, least);
    atomicAdd(&shared.inside, count);
  }
  __syncthreads();  // the tops' range is known
  if (shared.inside < k) return false;
  auto visit = [&](uint32_t from, uint32_t to, auto&& f) {
    for (uint32_t b = threadIdx.x; b < blocks; b += kThreads) {
      const uint32_t key = shared.block_top[b];
      if (from <= key && key <= to) f(0.f, key);
    }
  };
  // A lower bound may be rounded down: mostly, one histogram tells enough.
  low = select<kThreads>(visit, [](float) { return uint64_t(1); }, shared.bound, state.top_key, uint64_t(k), 14, shared);
  return true;
}

// List every element with a key of at least `low`, in index order, and (kMasses) the masses of the first kPairs. Returns
// how many; more than the list holds if it overflows. The State's shared memory is the dynamic one. Not inlined, as
// `search`.
template <class State, bool kMasses>
__device__ __noinline__ uint32_t gather(typename State::Row row, uint32_t low, uint32_t top_key) {
  using Row = typename State::Row;
  using Domain = typename State::Domain;
  constexpr int kPer = Row::kPer, kWarps = State::kThreads / 32, kList = State::Shared::kList;
  constexpr int kFlight = 16 / kPer;   // loads of a thread that are on their way together
  constexpr int kBits = 16;            // of a count of a block's elements, packed
  static_assert(kFlight * kBits <= 64 && State::Shared::kSelects);
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename State::Shared*>(smem);
  uint32_t* const counts = reinterpret_cast<uint32_t*>(shared.warp_sum);
  // The blocks, in order: a warp looks at some of them that follow each other.
  const uint32_t blocks = row.segments() * Row::kBlocks;
  const uint32_t own = round_up(ceil_div(blocks, uint32_t(kWarps)), 32u);
  const uint32_t from = min_of(warp_id() * own, blocks), to = min_of(from + own, blocks);
  auto takes = [&](uint32_t b) { return __ballot_sync(kFullMask, b + lane_id() < to && shared.block_top[b + lane_id()] >= low); };
  uint32_t found = 0;
  for (uint32_t b = from; b < to; b += 32) found += __popc(takes(b));
  if (lane_id() == 0) counts[warp_id()] = found;
  __syncthreads();  // blocks are counted, and the bins not in use
  uint32_t n;
  uint32_t at = before<kWarps>(counts, n);
  if (n > kList) return n;
  for (uint32_t b = from; b < to; b += 32) {
    const uint32_t taken = takes(b);
    if (taken >> lane_id() & 1) shared.bins[at + __popc(taken & ((1u << lane_id()) - 1))] = b + lane_id();
    at += __popc(taken);
  }
  __syncthreads();  // the list of blocks is complete
  // Their elements, in rounds of up to kFlight blocks a warp that follow each other in the list.
  uint32_t total = 0;
#pragma unroll 1
  for (uint32_t first = 0, round = 0; first < n && total <= kList; first += kFlight * kWarps, round ^= 1) {
    const uint32_t each = min_of(uint32_t(kFlight), ceil_div(n - first, uint32_t(kWarps)));
    const uint32_t start = first + warp_id() * each, end = min_of(start + each, n);
    float v[kFlight][kPer];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) v[f][j] = -FI_INF;
      if (start + f < end) row.load_at(shared.bins[start + f] * Row::kBlock + lane_id() * kPer, v[f]);
    }
    uint32_t marks = 0;
    uint64_t mine = 0;  // this lane's elements of every block
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      if (start + f >= end) break;
      const uint32_t index = shared.bins[start + f] * Row::kBlock + lane_id() * kPer;
      uint32_t marked = 0;
#pragma unroll
      for (int j = 0; j < kPer; ++j) marked |= uint32_t(key_of(v[f][j]) >= low && index + j < row.vocab) << j;
      marks |= marked << (f * kPer);
      mine |= uint64_t(__popc(marked)) << (f * kBits);
    }
    const uint64_t until = warp_scan(mine), all = __shfl_sync(kFullMask, until, 31);
    uint64_t places = until - mine;  // every block's first place, for this lane
    uint32_t count = 0, blocks_before[kFlight];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      blocks_before[f] = count + (uint32_t(places >> (f * kBits)) & ((1u << kBits) - 1));
      count += uint32_t(all >> (f * kBits)) & ((1u << kBits) - 1);
    }
    if (lane_id() == 0) counts[32 * round + warp_id()] = count;
    __syncthreads();  // elements are counted
    uint32_t of_round;
    const uint32_t base = total + before<kWarps>(counts + 32 * round, of_round);
    total += of_round;
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      if (start + f >= end) break;
      const uint32_t index = shared.bins[start + f] * Row::kBlock + lane_id() * kPer;
      uint32_t place = base + blocks_before[f];
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        if (!(marks >> (f * kPer + j) & 1)) continue;
        if (place < kList) {
          shared.key[place] = key_of(v[f][j]);
          shared.index[place] = index + j;
        }
        ++place;
      }
    }
    if constexpr (kMasses) {
      __syncwarp();
      const auto ref = Domain::ref(value_of(top_key));
      for (uint32_t i = base + lane_id(); i < min_of(base + count, kPairs); i += 32)
        shared.mass[i] = Domain::mass(value_of(shared.key[i]), ref);
    }
  }
  __syncthreads();  // the list is complete
  return total;
}

// A short list with its masses: everyone is compared with everyone, and warp 0 adds up what is kept, in order, and draws
// from it (kDraws). The State's shared memory is the dynamic one. Not inlined, as `search`.
template <class State, bool kDraws>
__device__ __noinline__ Verdict settle(typename State::Row row, uint32_t top_key, uint32_t n, FilterArgs args,
                                       uint64_t total, uint64_t random) {
  using Domain = typename State::Domain;
  constexpr int kThreads = State::kThreads;
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename State::Shared*>(smem);
  const uint64_t* const mass = shared.mass;
  uint64_t* const kept_mass = shared.kept_mass;
  const int split = threads_for_each<kThreads>(n);
  const uint32_t mine = threadIdx.x / split, part = threadIdx.x % split;
  const bool there = mine < n;
  const uint32_t key = there ? shared.key[mine] : 0;
  uint32_t ranks = 0;  // larger ones; and in the upper half, equal ones
  uint64_t above = 0;
#pragma unroll 4
  for (uint32_t i = part; i < n; i += split) {
    const uint32_t other = shared.key[i];
    ranks += other > key ? 1 : other == key ? 1 << 16 : 0;
    above += other > key ? mass[i] : 0;
  }
  ranks = split_sum(ranks, split);
  const uint32_t larger = ranks & 0xffff, equal = ranks >> 16, k = min_of(args.top_k, n);
  bool kept = there && larger < k;
  const uint64_t own = kept ? mass[mine] : 0;
  if (args.has_top_p()) {
    above = split_sum(above, split);
    if (!args.joint) {
      if (kept && k <= larger + equal) shared.above = above + equal * own;  // all the same: those on the k-th place
      __syncthreads();  // the mass of what top-k keeps is known
      total = shared.above;
    }
    kept = kept && above < args.target<Domain>(total, Domain::ref(value_of(top_key)));
  }
  kept = kept && key >= args.least;
  if (there && part == 0) kept_mass[mine] = kept ? own : 0;
  if (there && part == 0) shared.bins[mine] = kept ? key : 0xffffffffu;
  __syncthreads();  // kept masses are complete
  Verdict verdict = {0, 0, 0, true};
  if (warp_id() != 0) return verdict;
  const uint32_t each = ceil_div(n, 32u), first = lane_id() * each, end = min_of(first + each, n);
  uint64_t sum = 0;
  uint32_t lowest = 0xffffffffu;
  for (uint32_t i = first; i < end; ++i) {
    sum += kept_mass[i];
    lowest = min_of(lowest, shared.bins[i]);
  }
  verdict.threshold = ptx::warp_min_u32(lowest);
  uint64_t until = warp_scan(sum);
  verdict.total = __shfl_sync(kFullMask, until, 31);
  if constexpr (kDraws) {
    const uint64_t target = __umul64hi(random, verdict.total);
    uint32_t token = 0;
    if (until - sum <= target && target < until) {  // one lane
      until -= sum;
      for (uint32_t i = first; i < end; ++i) {
        until += kept_mass[i];
        if (target >= until) continue;
        token = shared.index[i] + 1;
        break;
      }
    }
    verdict.token = ptx::warp_max_u32(token) - 1;
  }
  return verdict;
}

}  // namespace fi::sampling
