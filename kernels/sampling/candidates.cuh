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

// How many blocks the groups have whose largest keys give a bound for the k largest elements: a power of two, and the more
// groups there are, the fewer elements reach the k-th largest that are not among the k largest. 0: they would be too few.
template <class Row>
FI_DEVICE uint32_t group_size(uint32_t segments, uint32_t k) {
  uint32_t size = Row::kBlocks, groups = segments;
  while (groups > kPairs) {
    groups = ceil_div(groups, 2u);
    size *= 2;
  }
  while (size > 1 && groups < 2 * k && 2 * groups <= kPairs) {
    groups *= 2;
    size /= 2;
  }
  return k <= min_of(groups, kPairs / 8 * 5) ? size : 0;
}
// What the CTAs have to know for that.
template <class Row>
FI_DEVICE Tell tell_of(uint32_t size) {
  return size == 0 ? Tell::kNothing : size < Row::kBlocks ? Tell::kBlockTops : Tell::kTops;
}

struct Bounds {
  uint32_t low, top;
};

// The k-th largest of the groups' largest keys, which at least k elements reach, and the largest. Every CTA for itself.
template <int kThreads, class Row, class Shared>
FI_DEVICE Bounds group_bounds(Shared& shared, uint32_t segments, uint32_t size, uint32_t k) {
  constexpr uint32_t kBlocks = Row::kBlocks, kWarps = kThreads / 32;
  static_assert(kThreads >= kPairs && kWarps <= 32);
  const uint32_t* keys = shared.top;
  uint32_t groups = segments;
  if (size != kBlocks) {
    const bool parts = size < kBlocks;
    const uint32_t* const of = parts ? shared.block_top : shared.top;
    const uint32_t each = parts ? size : size / kBlocks, all = parts ? segments * kBlocks : segments;
    groups = ceil_div(all, each);
    if (threadIdx.x < groups) {
      uint32_t key = 0;
      for (uint32_t i = threadIdx.x * each; i < min_of(threadIdx.x * each + each, all); ++i) key = max_of(key, of[i]);
      shared.bins[threadIdx.x] = key;
    }
    keys = shared.bins;
    __syncthreads();  // the groups' keys are known
  }
  const uint32_t split = threads_for_each<kThreads>(groups);
  const uint32_t mine = threadIdx.x / split, part = threadIdx.x % split;
  const uint32_t key = mine < groups ? keys[mine] : 0;
  uint32_t larger = 0;
#pragma unroll 4
  for (uint32_t i = part; i < groups / 4; i += split) {
    const uint4 others = reinterpret_cast<const uint4*>(keys)[i];
    larger += (others.x > key) + (others.y > key) + (others.z > key) + (others.w > key);
  }
  for (uint32_t i = groups / 4 * 4 + part; i < groups; i += split) larger += keys[i] > key;
  larger = split_sum(larger, split);
  // The k-th largest is the smallest of those that fewer than k are larger than.
  uint2* const of_warps = reinterpret_cast<uint2*>(shared.kept_mass);
  const uint32_t least = ptx::warp_min_u32(mine < groups && larger < k ? key : 0xffffffffu), most = ptx::warp_max_u32(key);
  if (lane_id() == 0) of_warps[warp_id()] = make_uint2(least, most);
  __syncthreads();  // the warps' bounds are known
  const uint2 other = lane_id() < kWarps ? of_warps[lane_id()] : make_uint2(0xffffffffu, 0);
  return {ptx::warp_min_u32(other.x), ptx::warp_max_u32(other.y)};
}

// What candidates carry: their mass,
template <class Domain>
struct MassLoad {
  typename Domain::Ref ref;
  static constexpr bool kTies = true;
  static constexpr uint32_t kLowest = Domain::kNothing + 1;  // what has no mass is never a candidate
  FI_DEVICE explicit MassLoad(uint32_t top_key) : ref(Domain::ref(value_of(top_key))) {}
  FI_DEVICE static bool valid(uint32_t top_key) { return top_key <= kInfKey && Domain::valid(value_of(top_key)); }
  template <class Row>
  FI_DEVICE uint64_t operator()(const Row&, float x, uint32_t) const {
    return Domain::mass(x, ref);
  }
};

// Every warp lists what reaches a bound in its own segments, for the first CTA: the k-th largest of the groups' largest
// keys, or (k = 0) `least(top)`. In no order. With kKeeps every CTA also has its own candidates. Nothing is listed if k
// elements are ties of the largest (for a Load with kTies). Behind the summary; not inlined, as `search`. The shared memory
// is the dynamic one.
template <class Shape, class Load, bool kKeeps, class Row, class Shared, class Least>
__device__ __noinline__ Bounds shortlist(Row row, uint32_t size, uint32_t k, Least least) {
  constexpr int kBlocks = Row::kBlocks, kPer = Row::kPer, kStep = Shape::kStep;
  constexpr int kTogether = 32 / kBlocks;  // segments whose blocks a warp looks at together, a lane a block
  constexpr int kFlight = 16 / kPer;       // loads of a thread that are on their way together
  constexpr uint32_t kRoom = Shared::room(Shape::kCluster);
  static_assert(kFlight <= 4 && Shared::kSelects);
  extern __shared__ __align__(1024) uint8_t smem[];
  Shared& shared = *reinterpret_cast<Shared*>(smem);
  const uint32_t segments = row.segments(), rank = Shape::rank();
  Bounds bounds = group_bounds<Shape::kThreads, Row>(shared, segments, size, k);
  if (!Load::valid(bounds.top)) return bounds;
  bounds.low = max_of(k ? bounds.low : least(bounds.top), Load::kLowest);
  if (Load::kTies && k > 1 && bounds.low == bounds.top) return bounds;
  const Load load(bounds.top);
  uint32_t sent = 0, listed = 0;
  bool full = false;
#pragma unroll 1
  for (uint32_t first = Shape::first(); first < segments && !full; first += kTogether * kStep) {
    const uint32_t own = first + lane_id() / kBlocks * kStep;
    uint32_t taken =
        __ballot_sync(kFullMask, own < segments && shared.block_top[own * kBlocks + lane_id() % kBlocks] >= bounds.low);
#pragma unroll 1
    while (taken && !full) {
      float v[kFlight][kPer];
      uint32_t left[kFlight], blocks = 0;  // elements from this lane's on; a byte each
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        const uint32_t next = taken ? __ffs(taken) - 1 : 32, block = (first + next / kBlocks * kStep) * kBlocks + next % kBlocks;
        taken &= taken - 1;
        blocks |= next << (8 * f);
        const uint32_t at = block * Row::kBlock + lane_id() * kPer;
        if (next < 32) row.load_at(at, v[f]);
        left[f] = next < 32 && at < row.vocab ? row.vocab - at : 0;
      }
      uint32_t marks = 0;
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
#pragma unroll
        for (int j = 0; j < kPer; ++j)
          marks |= uint32_t(j < left[f] && key_of(v[f][j]) >= bounds.low) << (f * kPer + j);
      }
      if (marks) {
        uint32_t place = atomicAdd(&shared.count, __popc(marks));
        listed += __popc(marks);
        for (; marks; marks &= marks - 1, ++place) {
          const uint32_t bit = __ffs(marks) - 1, next = blocks >> (bit / kPer * 8) & 0xff;
          const uint32_t block = (first + next / kBlocks * kStep) * kBlocks + next % kBlocks;
          const uint32_t index = block * Row::kBlock + lane_id() * kPer + bit % kPer;
          full = place >= kRoom;
          if (full) break;
          const float x = row.at(index);  // once more: registers are short
          const uint64_t its = load(row, x, index);
          const uint4 made = make_uint4(key_of(x), index, uint32_t(its), uint32_t(its >> 32));
          if (kKeeps && rank != 0) *reinterpret_cast<uint4*>(shared.candidates() + place) = made;
          Shape::post(reinterpret_cast<uint4*>(shared.candidates() + rank * kRoom + place), made, &shared.box[2], 0);
          ++sent;
        }
      }
      full = __any_sync(kFullMask, full);
    }
  }
  if constexpr (Shape::kCluster > 1) {
    sent = ptx::warp_sum_u32(sent);
    listed = ptx::warp_sum_u32(listed);
    if (lane_id() == 0) {
      Shape::add(&shared.found[rank], uint64_t(listed), &shared.box[2], 0);
      ptx::mailbox_announce(&shared.box[2], 16 * sent + 8, 0);
    }
  }
  return bounds;
}

// How many candidates there are, or kWholeRow if they are too many; they lie at `list`. In the first CTA.
template <class Shape, class Shared>
FI_DEVICE uint32_t collect(Shared& shared, const Candidate*& list) {
  constexpr uint32_t kRoom = Shared::room(Shape::kCluster);
  list = shared.candidates();
  if constexpr (Shape::kCluster == 1) {
    __syncthreads();  // candidates are complete
    return shared.count <= kRoom ? shared.count : kWholeRow;
  } else {
    ptx::mailbox_wait(&shared.box[2], 0);
    uint32_t n = 0, from = 0;
    bool fits = true;
#pragma unroll
    for (uint32_t r = 0; r < Shape::kCluster; ++r) {
      const uint32_t found = uint32_t(shared.found[r]);
      fits = fits && found <= kRoom;
      if (threadIdx.x >= n) from = r * kRoom + threadIdx.x - n;
      n += found;
    }
    if (!fits || n > kPairs) return kWholeRow;
    Candidate* const dense = reinterpret_cast<Candidate*>(shared.bins);
    if (threadIdx.x < n) dense[threadIdx.x] = list[from];
    list = dense;
    __syncthreads();  // candidates follow each other
    return n;
  }
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

// The candidates, if they are few: everyone is compared with everyone, and warp 0 adds up what is kept, in index order, and
// draws from it (kDraws). The State's shared memory is the dynamic one. Not inlined, as `search`.
template <class State, class Shape, bool kDraws>
__device__ __noinline__ Verdict settle(uint32_t top_key, FilterArgs args, uint64_t total) {
  using Domain = typename State::Domain;
  constexpr int kThreads = State::kThreads;
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename State::Shared*>(smem);
  Verdict verdict = {0, 0, 0, false};
  const Candidate* list;
  const uint32_t n = collect<Shape>(shared, list);
  if (n == kWholeRow) return verdict;
  uint32_t* const order_key = shared.bins + 4 * kPairs;  // behind the candidates
  uint32_t* const order_index = order_key + kPairs;
  const uint32_t split = threads_for_each<kThreads>(n);
  const uint32_t mine = threadIdx.x / split, part = threadIdx.x % split;
  const bool there = mine < n;
  const Candidate own = there ? list[mine] : Candidate{0, 0, 0};
  uint32_t ranks = 0;  // ten bits each: larger ones, equal ones, and those of smaller indices
  uint64_t above = 0;
#pragma unroll 4
  for (uint32_t i = part; i < n; i += split) {
    const Candidate other = list[i];
    ranks += other.key > own.key ? 1 : other.key == own.key ? 1 << 10 : 0;
    ranks += other.index < own.index ? 1 << 20 : 0;
    above += other.key > own.key ? other.load : 0;
  }
  ranks = split_sum(ranks, split);
  const uint32_t larger = ranks & 0x3ff, equal = ranks >> 10 & 0x3ff, place = ranks >> 20, k = min_of(args.top_k, n);
  bool kept = there && larger < k;
  if (args.has_top_p()) {
    above = split_sum(above, split);
    if (!args.joint) {
      if (kept && k <= larger + equal) shared.above = above + equal * own.load;  // all the same: those on the k-th place
      __syncthreads();  // the mass of what top-k keeps is known
      total = shared.above;
    }
    kept = kept && above < args.target<Domain>(total, Domain::ref(value_of(top_key)));
  }
  kept = kept && own.key >= args.least;
  if (there && part == 0) {
    shared.kept_mass[place] = kept ? own.load : 0;
    order_key[place] = kept ? own.key : 0xffffffffu;
    order_index[place] = own.index;
  }
  __syncthreads();  // kept masses are complete
  verdict.drawn = true;
  if (warp_id() != 0) return verdict;
  const uint32_t each = ceil_div(n, 32u), first = lane_id() * each, end = min_of(first + each, n);
  uint64_t sum = 0;
  uint32_t lowest = 0xffffffffu;
  for (uint32_t i = first; i < end; ++i) {
    sum += shared.kept_mass[i];
    lowest = min_of(lowest, order_key[i]);
  }
  if constexpr (!kDraws) verdict.threshold = ptx::warp_min_u32(lowest);
  uint64_t until = warp_scan(sum);
  verdict.total = __shfl_sync(kFullMask, until, 31);
  if constexpr (kDraws) {
    const uint64_t target = __umul64hi(shared.random, verdict.total);
    uint32_t token = 0;
    if (until - sum <= target && target < until) {  // one lane
      until -= sum;
      for (uint32_t i = first; i < end; ++i) {
        until += shared.kept_mass[i];
        if (target >= until) continue;
        token = order_index[i] + 1;
        break;
      }
    }
    verdict.token = ptx::warp_max_u32(token) - 1;
  }
  return verdict;
}

}  // namespace fi::sampling
