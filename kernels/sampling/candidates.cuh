// Filters that keep few tokens: gather what reaches a proven lower bound into a list, and decide there.
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

// Every one of n items is compared with all by 2^split threads, so that n << split threads suffice.
template <int kThreads>
FI_DEVICE int split_for(uint32_t n) {
  int split = 0;
  while (split < 5 && n << (split + 1) <= kThreads) ++split;
  return split;
}
template <class U>
FI_DEVICE U split_sum(U x, int split) {
  for (int offset = 1 << split >> 1; offset > 0; offset >>= 1) x += __shfl_xor_sync(kFullMask, x, offset);
  return x;
}
// Inclusive sums over the warp's lanes.
template <class U>
FI_DEVICE U warp_scan(U x) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const U other = __shfl_up_sync(kFullMask, x, offset);
    if (lane_id() >= offset) x += other;
  }
  return x;
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
    // A warp ranks some of them; equal ones by their place.
#pragma unroll 2
    for (uint32_t mine = warp_id(); mine < groups; mine += kThreads / 32) {
      const uint32_t key = keys[mine];
      uint32_t larger = 0;
#pragma unroll 4
      for (uint32_t i = lane_id(); i < groups; i += 32) {
        const uint32_t other = keys[i];
        larger += other > key || (other == key && i < mine);
      }
      larger = ptx::warp_sum_u32(larger);
      if (larger == k - 1) shared.bound = key;
    }
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

// List every element with a key of at least `low`, in no order, and (kMasses) the masses of the first kPairs. Returns how
// many; more than the list holds if it overflows. shared.count must be 0. The State's shared memory is the dynamic one.
// Not inlined, as `search`.
template <class State, bool kMasses>
__device__ __noinline__ uint32_t gather(typename State::Row row, uint32_t low, uint32_t top_key) {
  using Row = typename State::Row;
  using Domain = typename State::Domain;
  constexpr int kPer = Row::kPer, kWarps = State::kThreads / 32, kList = State::Shared::kList;
  constexpr int kFlight = 16 / kPer;           // loads of a thread that are on their way together
  constexpr int kTogether = 32 / Row::kBlocks;  // segments whose blocks a warp looks at together, a lane a block
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename State::Shared*>(smem);
  const uint32_t segments = row.segments();
  // Likely tokens may stand together: segments go to the warps in turn.
  auto takes = [&](uint32_t first) {
    const uint32_t s = first + lane_id() / Row::kBlocks * kWarps;
    return __ballot_sync(kFullMask, s < segments && shared.block_top[s * Row::kBlocks + lane_id() % Row::kBlocks] >= low);
  };
  bool fits = true;
#pragma unroll 1
  for (uint32_t first = warp_id(); first < segments && fits; first += 2 * kTogether * kWarps) {
    uint64_t taken = takes(first) | uint64_t(takes(first + kTogether * kWarps)) << 32;
#pragma unroll 1
    while (taken && fits) {
      float v[kFlight][kPer];
      uint32_t index[kFlight], marks = 0;
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        const uint32_t next = taken ? __ffsll(taken) - 1 : 64;
        taken &= taken - 1;
        index[f] = (first + next / Row::kBlocks * kWarps) * kSegment + next % Row::kBlocks * Row::kBlock + lane_id() * kPer;
#pragma unroll
        for (int j = 0; j < kPer; ++j) v[f][j] = -FI_INF;
        if (next < 64) row.load_at(index[f], v[f]);
        else index[f] = row.vocab;
      }
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
#pragma unroll
        for (int j = 0; j < kPer; ++j)
          marks |= uint32_t(key_of(v[f][j]) >= low && index[f] + j < row.vocab) << (f * kPer + j);
      }
      const uint32_t mine = __popc(marks), end = warp_scan(mine), count = __shfl_sync(kFullMask, end, 31);
      uint32_t base = 0;
      if (lane_id() == 0) base = atomicAdd(&shared.count, count);
      base = __shfl_sync(kFullMask, base, 0);
      fits = base + count <= kList;
      if (!fits) break;
      uint32_t place = base + end - mine;
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          if (!(marks >> (f * kPer + j) & 1)) continue;
          shared.key[place] = key_of(v[f][j]);
          shared.index[place] = index[f] + j;
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
  }
  __syncthreads();  // the list is complete
  return shared.count;
}

// A short list with its masses: everyone is compared with everyone, and warp 0 adds up what is kept, in index order, and
// draws from it (kDraws). The State's shared memory is the dynamic one. Not inlined, as `search`.
template <class State, bool kDraws>
__device__ __noinline__ Verdict settle(typename State::Row row, uint32_t top_key, uint32_t n, FilterArgs args,
                                       uint64_t total, uint64_t random) {
  using Domain = typename State::Domain;
  constexpr int kThreads = State::kThreads;
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename State::Shared*>(smem);
  const uint64_t* const mass = shared.mass;
  uint64_t* const kept_mass = shared.kept_mass;
  uint32_t* const kept_key = shared.bins;
  uint32_t* const kept_index = shared.bins + kPairs;
  const int split = split_for<kThreads>(n);
  const uint32_t mine = threadIdx.x >> split, part = threadIdx.x & ((1 << split) - 1);
  const bool there = mine < n;
  const uint32_t key = there ? shared.key[mine] : 0, index = there ? shared.index[mine] : 0;
  uint32_t ranks = 0;  // larger ones; equal ones; and those of a smaller index, each in 10 bits
  uint64_t above = 0;
  const uint64_t factor = args.has_top_p() ? share_factor(args.p) : 0;  // double precision is slow: not behind the barrier
#pragma unroll 4
  for (uint32_t i = part; i < n; i += 1 << split) {
    const uint32_t other = shared.key[i];
    ranks += (other > key ? 1 : other == key ? 1 << 10 : 0) + (shared.index[i] < index ? 1 << 20 : 0);
    above += other > key ? mass[i] : 0;
  }
  ranks = split_sum(ranks, split);
  const uint32_t larger = ranks & 1023, equal = ranks >> 10 & 1023, place = ranks >> 20, k = min_of(args.top_k, n);
  bool kept = there && larger < k;
  const uint64_t own = kept ? mass[mine] : 0;
  if (args.has_top_p()) {
    above = split_sum(above, split);
    if (!args.joint) {
      if (kept && k <= larger + equal) shared.above = above + equal * own;  // all the same: those on the k-th place
      __syncthreads();  // the mass of what top-k keeps is known
      total = shared.above;
    }
    kept = kept && above < args.target<Domain>(total, Domain::ref(value_of(top_key)), factor);
  }
  kept = kept && key >= args.least;
  if (there && part == 0) {
    kept_mass[place] = kept ? own : 0;
    kept_key[place] = kept ? key : 0xffffffffu;
    kept_index[place] = index;
  }
  __syncthreads();  // kept masses are complete
  Verdict verdict = {0, 0, 0, true};
  if (warp_id() != 0) return verdict;
  const uint32_t each = ceil_div(n, 32u), first = lane_id() * each, end = min_of(first + each, n);
  uint64_t sum = 0;
  uint32_t lowest = 0xffffffffu;
#pragma unroll 1
  for (uint32_t i = first; i < end; ++i) {  // mostly two
    sum += kept_mass[i];
    lowest = min_of(lowest, kept_key[i]);
  }
  verdict.threshold = ptx::warp_min_u32(lowest);
  uint64_t until = warp_scan(sum);
  verdict.total = __shfl_sync(kFullMask, until, 31);
  if constexpr (kDraws) {
    const uint64_t target = __umul64hi(random, verdict.total);
    uint32_t token = 0;
    if (until - sum <= target && target < until) {  // one lane
      until -= sum;
#pragma unroll 1
      for (uint32_t i = first; i < end; ++i) {
        until += kept_mass[i];
        if (target >= until) continue;
        token = kept_index[i] + 1;
        break;
      }
    }
    verdict.token = ptx::warp_max_u32(token) - 1;
  }
  return verdict;
}

}  // namespace fi::sampling
