// Filters that keep few tokens: gather what reaches a proven lower bound into a list, and decide there.
#pragma once
#include "sampling/filters.cuh"

namespace fi::sampling {

// What became of a row: the smallest kept key, and if the list was short also the mass of what is kept and the token.
// Else the segments' sums hold the mass of what is kept.
struct Verdict {
  uint32_t threshold;
  uint64_t total;
  uint32_t token;
  bool drawn;
};

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

// A key that at least k elements reach: the k-th largest of the segments' or of the blocks' tops. False if there are too
// few of them for that. shared.bound must be 0xffffffff, shared.inside 0, and a barrier behind that.
template <class State>
FI_DEVICE bool lower_bound(const State& state, uint32_t k, uint32_t& low) {
  constexpr int kThreads = State::kThreads;
  auto& shared = state.shared;
  const uint32_t segments = state.row.segments(), blocks = segments * State::Row::kBlocks;
  if (k <= segments) {
    const int split = threads_for_each<kThreads>(segments);
    const uint32_t mine = threadIdx.x / split;
    const uint32_t key = mine < segments ? shared.top[mine] : 0;
    uint32_t higher = 0;
#pragma unroll 4
    for (uint32_t i = threadIdx.x % split; i < segments; i += split) higher += shared.top[i] > key;
    higher = split_sum(higher, split);
    const uint32_t reached = ptx::warp_min_u32(mine < segments && higher < k ? key : 0xffffffffu);
    if (lane_id() == 0) atomicMin(&shared.bound, reached);
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

// List every element with a key of at least `low`. Returns how many; more than the list holds if it overflows. The
// State's shared memory is the dynamic one. Not inlined, as `search`.
template <class State>
__device__ __noinline__ uint32_t gather(typename State::Row row, uint32_t low) {
  using Row = typename State::Row;
  constexpr int kPer = Row::kPer, kWarps = State::kThreads / 32, kList = State::Shared::kList;
  constexpr int kFlight = 32 / kPer;  // loads of a thread that are on their way together
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename State::Shared*>(smem);
  const uint32_t blocks = row.segments() * Row::kBlocks, before = (1u << lane_id()) - 1;
  if (threadIdx.x == 0) shared.count = shared.blocks = 0;
  __syncthreads();  // counters are clear, and the bins not in use
  for (uint32_t first = warp_id() * 32; first < blocks; first += State::kThreads) {
    const uint32_t b = first + lane_id();
    const uint32_t takes = __ballot_sync(kFullMask, b < blocks && shared.block_top[b] >= low);
    if (!takes) continue;
    uint32_t at = 0;
    if (lane_id() == 0) at = atomicAdd(&shared.blocks, __popc(takes));
    at = __shfl_sync(kFullMask, at, 0);
    if (takes >> lane_id() & 1) shared.bins[at + __popc(takes & before)] = b;
  }
  __syncthreads();  // the list of blocks is complete
  const uint32_t n = shared.blocks;
  if (n > kList) return n;
#pragma unroll 1
  for (uint32_t first = warp_id(); first < n; first += kFlight * kWarps) {
    float v[kFlight][kPer];
    uint32_t block[kFlight];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      const uint32_t i = first + f * kWarps;
      block[f] = shared.bins[min_of(i, n - 1)];
      if (i < n) {
        row.load_at(block[f] * Row::kBlock + lane_id() * kPer, v[f]);
      } else {
#pragma unroll
        for (int j = 0; j < kPer; ++j) v[f][j] = -FI_INF;
      }
    }
    uint32_t at = 0;
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      if (first + f * kWarps >= n) break;
      const uint32_t index = block[f] * Row::kBlock + lane_id() * kPer;
      uint32_t takes[kPer], sum = 0;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        takes[j] = __ballot_sync(kFullMask, key_of(v[f][j]) >= low && index + j < row.vocab);
        sum += __popc(takes[j]);
      }
      if (lane_id() == 0) at = atomicAdd(&shared.count, sum);
      at = __shfl_sync(kFullMask, at, 0);
      uint32_t place = at;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const uint32_t mine = place + __popc(takes[j] & before);
        if ((takes[j] >> lane_id() & 1) && mine < kList) {
          shared.key[mine] = key_of(v[f][j]);
          shared.index[mine] = index + j;
        }
        place += __popc(takes[j]);
      }
    }
    if (at > kList) break;  // overflown
  }
  __syncthreads();  // the list is complete
  return shared.count;
}

// A list of at most kThreads: everyone is compared with everyone. shared.threshold must be 0xffffffff, and the State's
// shared memory the dynamic one. Not inlined, as `search`.
template <class State>
__device__ __noinline__ Verdict settle(typename State::Row row, uint32_t top_key, uint32_t n, FilterArgs args,
                                       uint64_t total, uint64_t random) {
  using Domain = typename State::Domain;
  constexpr int kThreads = State::kThreads;
  static_assert(2 * kThreads <= kBins);
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename State::Shared*>(smem);
  const State state(row, shared, top_key);
  uint64_t *const mass = shared.masses(), *const kept_mass = mass + kThreads;
  if (threadIdx.x < n) mass[threadIdx.x] = Domain::mass(value_of(shared.key[threadIdx.x]), state.ref);
  __syncthreads();  // masses are complete
  const int split = threads_for_each<kThreads>(n);
  const uint32_t mine = threadIdx.x / split, part = threadIdx.x % split;
  const bool there = mine < n;
  const uint32_t key = there ? shared.key[mine] : 0, index = there ? shared.index[mine] : 0;
  uint32_t higher = 0;
  uint64_t above = 0;
#pragma unroll 4
  for (uint32_t i = part; i < n; i += split) {
    const bool more = shared.key[i] > key;
    higher += more;
    above += more ? mass[i] : 0;
  }
  higher = split_sum(higher, split);
  above = split_sum(above, split);
  bool kept = there && higher < args.top_k;
  if (args.has_top_p()) {
    if (!args.joint) total = block_sum<kThreads>(kept && part == 0 ? mass[mine] : 0, shared.warp_sum);
    kept = kept && above < args.target<Domain>(total, state.ref);
  }
  kept = kept && key >= args.least;
  const uint64_t own = kept ? mass[mine] : 0;
  if (there && part == 0) kept_mass[mine] = own;
  const uint32_t lowest = ptx::warp_min_u32(kept ? key : 0xffffffffu);
  if (lane_id() == 0 && lowest != 0xffffffffu) atomicMin(&shared.threshold, lowest);
  __syncthreads();  // kept masses and the threshold are complete
  uint64_t start = 0, sum = 0;
#pragma unroll 4
  for (uint32_t i = part; i < n; i += split) {
    const uint64_t other = kept_mass[i];
    start += shared.index[i] < index ? other : 0;
    sum += other;
  }
  start = split_sum(start, split);
  sum = split_sum(sum, split);
  // Threads without an item of their own have the sum too: n is at least 1, and they add like the others.
  const uint64_t target = __umul64hi(random, sum);
  if (kept && part == 0 && start <= target && target < start + own) shared.token = index;
  __syncthreads();  // the token is known
  return {shared.threshold, sum, shared.token, true};
}

}  // namespace fi::sampling
