// Long lists of what filters may keep, made by the first CTA alone, in index order: for k of hundreds, and where candidates
// (candidates.cuh) are too many.
#pragma once
#include "sampling/filters.cuh"

namespace fi::sampling {

// The warps' counts: those before this warp's, and all.
template <int kWarps>
FI_DEVICE uint32_t before(const uint32_t* counts, uint32_t& all) {
  const uint32_t count = lane_id() < kWarps ? counts[lane_id()] : 0;
  all = ptx::warp_sum_u32(count);
  return ptx::warp_sum_u32(lane_id() < warp_id() ? count : 0);
}

// A key that at least k elements reach, for larger k, by a histogram of the blocks' largest keys. False if they are too
// few. shared.bound must be 0xffffffff, shared.inside 0, and a barrier behind that.
template <class State>
FI_DEVICE bool lower_bound(const State& state, uint32_t k, uint32_t& low) {
  constexpr int kThreads = State::kThreads;
  auto& shared = state.shared;
  const uint32_t blocks = state.row.segments() * State::Row::kBlocks;
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

// List every element with a key of at least `low`, in index order. Returns how many; more than the list holds if it
// overflows. The State's shared memory is the dynamic one. Not inlined, as `search`.
template <class State>
__device__ __noinline__ uint32_t gather(typename State::Row row, uint32_t low) {
  using Row = typename State::Row;
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
  }
  __syncthreads();  // the list is complete
  return total;
}

}  // namespace fi::sampling
