// Filters that keep few tokens: every warp lists what reaches a proven lower bound in its part of the row, and the first CTA
// compares that. If it is much, the first CTA gathers a longer list, in index order, or searches the row.
#pragma once
#include "sampling/filters.cuh"

namespace fi::sampling {

// What became of a row: the smallest kept key, and if candidates were few (`drawn`) also the mass of what is kept (both of
// them in warp 0) or the token, which one thread has (`mine`). Else the segments' sums hold the mass of what is kept.
struct Verdict {
  uint32_t threshold;
  uint64_t total;
  uint32_t token;
  bool drawn, mine;
};

// Every one of n items is compared with all by 2^shift threads that follow each other: few, as an exchange between lanes
// takes as long as many comparisons. Items are padded to `padded`, a multiple of 8 for each of the threads and at most
// round_up(n, 32).
struct Split {
  int shift;
  uint32_t padded, item, part;
  FI_DEVICE explicit Split(uint32_t n) : shift(n <= 32 ? 2 : n <= 64 ? 1 : 0) {
    padded = round_up(n, 8u << shift);
    item = threadIdx.x >> shift;
    part = threadIdx.x & ((1u << shift) - 1);
  }
  // Whether this thread's warp has items; their comparisons: f(other).
  FI_DEVICE bool works() const { return warp_id() * 32 < padded << shift; }
  template <class F>
  FI_DEVICE void compare(const Candidate* list, F&& f) const {
    const uint32_t each = padded >> shift;
    list += part * each;
#pragma unroll 1
    for (uint32_t i = 0; i < each; i += 8) {
#pragma unroll
      for (int j = 0; j < 8; ++j) f(list[i + j]);
    }
  }
  template <typename V>
  FI_DEVICE V sum(V x) const {
    if (shift > 1) x += __shfl_xor_sync(kFullMask, x, 2);
    if (shift > 0) x += __shfl_xor_sync(kFullMask, x, 1);
    return x;
  }
};
// What lists are padded with: less than any item, and without a mass.
FI_DEVICE Candidate padding() { return {0, 0xffffffffu, 0}; }

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
  static_assert(kThreads >= kPairs && kWarps % 8 == 0);
  const uint32_t* keys = shared.top;
  uint32_t groups = segments;
  if (size != kBlocks) {
    const bool parts = size < kBlocks;
    const uint32_t* const of = parts ? shared.block_top : shared.top;
    const uint32_t each = parts ? size : size / kBlocks, all = parts ? segments * kBlocks : segments;
    groups = (all + each - 1) >> (31 - __clz(each));
    if (threadIdx.x < kPairs) {
      uint32_t key = 0;
#pragma unroll 1
      for (uint32_t i = threadIdx.x * each; i < min_of(threadIdx.x * each + each, all); ++i) key = max_of(key, of[i]);
      shared.bins[threadIdx.x] = key;
    }
    keys = shared.bins;
    __syncthreads();  // the groups' keys are known
  }
  // Padded to 128 or 256 keys. A warp compares 32 of them, a lane one, with a part of all.
  const bool many = groups > 128;
  const uint32_t set = warp_id() & (many ? 7 : 3), part = warp_id() >> (many ? 3 : 2);
  const uint32_t parts = kWarps >> (many ? 3 : 2), each = (many ? 64 : 32) / parts;  // groups of four keys
  const uint4* const quads = reinterpret_cast<const uint4*>(keys);
  uint32_t* const counts = shared.bins + kPairs;
  const uint32_t key = keys[set * 32 + lane_id()];
  int32_t larger[2] = {0, 0};  // negative
#pragma unroll 1
  for (uint32_t i = part * each; i < part * each + each; i += 4) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint4 others = quads[i + j];
      ptx::count_less(larger[0], key, others.x);
      ptx::count_less(larger[1], key, others.y);
      ptx::count_less(larger[0], key, others.z);
      ptx::count_less(larger[1], key, others.w);
    }
  }
  counts[part * kPairs + set * 32 + lane_id()] = -(larger[0] + larger[1]);
  __syncthreads();  // parts are counted
  // The k-th largest is the smallest of those that fewer than k are larger than.
  uint32_t low = 0xffffffffu, top = 0;
#pragma unroll 1
  for (uint32_t i = lane_id(); i < (many ? 64 : 32); i += 32) {
    const uint4 four = quads[i];
    uint4 above = make_uint4(0, 0, 0, 0);
#pragma unroll 1
    for (uint32_t r = 0; r < parts; ++r) {
      const uint4 more = reinterpret_cast<const uint4*>(counts)[r * (kPairs / 4) + i];
      above = make_uint4(above.x + more.x, above.y + more.y, above.z + more.z, above.w + more.w);
    }
    low = min_of(low, min_of(above.x < k ? four.x : 0xffffffffu, above.y < k ? four.y : 0xffffffffu));
    low = min_of(low, min_of(above.z < k ? four.z : 0xffffffffu, above.w < k ? four.w : 0xffffffffu));
    top = max_of(max_of(top, max_of(four.x, four.y)), max_of(four.z, four.w));
  }
  return {ptx::warp_min_u32(low), ptx::warp_max_u32(top)};
}

// What candidates are compared by: their mass,
template <class Domain>
struct MassLoad {
  typename Domain::Ref ref;
  static constexpr bool kTies = true;
  static constexpr uint32_t kLowest = Domain::kNothing + 1;  // what has no mass is never a candidate
  FI_DEVICE explicit MassLoad(uint32_t top_key) : ref(Domain::ref(value_of(top_key))) {}
  FI_DEVICE static bool valid(uint32_t top_key) { return top_key <= kInfKey && Domain::valid(value_of(top_key)); }
  FI_DEVICE uint64_t operator()(uint32_t key, uint32_t) const { return Domain::mass(value_of(key), ref); }
};

// Every warp lists what reaches a bound in its own segments, for the first CTA: the k-th largest of the groups' largest
// keys, or (k = 0) `least(top)`. In no order. With kKeeps every CTA also has its own candidates. Nothing is listed if k
// elements are ties of the largest (for a Load with kTies). Behind the summary; not inlined, as `search`. The shared memory
// is the dynamic one.
template <class Shape, class Load, bool kKeeps, class Row, class Shared, class Least>
__device__ __noinline__ Bounds shortlist(Row row, uint32_t size, uint32_t k, Least least) {
  constexpr int kBlocks = Row::kBlocks, kPer = Row::kPer, kStep = Shape::kStep;
  constexpr int kTogether = 64 / kBlocks;  // segments whose blocks a warp looks at together
  constexpr int kFlight = 32 / kPer;       // loads of a thread that are on their way together
  constexpr uint32_t kRoom = Shared::room(Shape::kCluster);
  static_assert(Shared::kSelects);
  extern __shared__ __align__(1024) uint8_t smem[];
  Shared& shared = *reinterpret_cast<Shared*>(smem);
  const uint32_t segments = row.segments(), rank = Shape::rank();
  Bounds bounds = group_bounds<Shape::kThreads, Row>(shared, segments, size, k);
  if (!Load::valid(bounds.top)) return bounds;
  bounds.low = max_of(k ? bounds.low : least(bounds.top), Load::kLowest);
  if (Load::kTies && k > 1 && bounds.low == bounds.top) return bounds;
  const float bound = value_of(bounds.low);
  uint32_t sent = 0, listed = 0;
  bool full = false;
#pragma unroll 1
  for (uint32_t first = Shape::first(); first < segments && !full; first += kTogether * kStep) {
    auto block_of = [&](uint32_t place) { return (first + place / kBlocks * kStep) * kBlocks + place % kBlocks; };
    auto reaches = [&](uint32_t place) {
      return __ballot_sync(kFullMask, first + place / kBlocks * kStep < segments && shared.block_top[block_of(place)] >= bounds.low);
    };
    uint64_t taken = reaches(lane_id());
    if (first + kTogether / 2 * kStep < segments) taken |= uint64_t(reaches(lane_id() + 32)) << 32;
#pragma unroll 1
    while (taken && !full) {
      // Loads without conditions, and conversions behind all of them: they would wait for one another.
      decltype(row.raw(0)) v[kFlight][kPer];
      float x = 0.f;
      uint64_t places = 0;  // a byte each
      const uint32_t count = min_of(__popcll(taken), kFlight);
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        if (f >= count) break;
        const uint32_t place = __ffsll(taken) - 1;
        taken &= taken - 1;
        places |= uint64_t(place) << (8 * f);
        const uint32_t at = block_of(place) * Row::kBlock + lane_id();
#pragma unroll
        for (int j = 0; j < kPer; ++j) v[f][j] = row.raw(min_of(at + 32 * j, row.vocab - 1));
      }
      auto index_of = [&](uint32_t bit) {
        return block_of(uint32_t(places >> (bit / kPer * 8)) & 0xff) * Row::kBlock + bit % kPer * 32 + lane_id();
      };
      uint32_t marks = 0;  // the last one's value is x
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        if (f >= count) break;
        const uint32_t at = index_of(f * kPer), left = at < row.vocab ? (row.vocab - 1 - at) / 32 + 1 : 0;
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          const float y = row.value(v[f][j]);
          if (y < bound || j >= left) continue;
          marks |= 1u << (f * kPer + j);
          x = y;
        }
      }
      if (marks) {
        uint32_t place = atomicAdd(&shared.count, __popc(marks));
        listed += __popc(marks);
        for (;; ++place) {
          const uint32_t bit = 31 - __clz(marks), index = index_of(bit);
          full = place >= kRoom;
          if (full) break;
          const uint64_t made = uint64_t(index) << 32 | key_of(x);
          if (kKeeps && rank != 0) shared.candidates()[place] = made;
          Shape::post(shared.candidates() + rank * kRoom + place, made, &shared.box[2], 0);
          ++sent;
          marks ^= 1u << bit;
          if (!marks) break;
          x = row.at(index_of(31 - __clz(marks)));  // once more: it is rare, and registers cannot be indexed
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
      ptx::mailbox_announce(&shared.box[2], 8 * sent + 8, 0);
    }
  }
  return bounds;
}

// The candidates, one behind the other. In the first CTA.
template <class Shared>
FI_DEVICE Candidate* collected(Shared& shared) {
  return reinterpret_cast<Candidate*>(shared.bins);
}
// Makes them, padded, and returns how many there are, or kWholeRow if they are too many.
template <class Shape, class Load, class Shared>
FI_DEVICE uint32_t collect(Shared& shared, const Load& load) {
  constexpr uint32_t kRoom = Shared::room(Shape::kCluster);
  uint32_t n = 0, from = threadIdx.x;
  bool fits = true;
  if constexpr (Shape::kCluster == 1) {
    __syncthreads();  // candidates are complete
    n = shared.count;
    fits = n <= kRoom;
  } else {
    ptx::mailbox_wait(&shared.box[2], 0);
#pragma unroll
    for (uint32_t r = 0; r < Shape::kCluster; ++r) {
      const uint32_t found = uint32_t(shared.found[r]);
      fits = fits && found <= kRoom;
      if (threadIdx.x >= n) from = r * kRoom + threadIdx.x - n;
      n += found;
    }
  }
  if (!fits || n > kPairs) return kWholeRow;
  if (threadIdx.x < n) {
    const uint64_t candidate = shared.candidates()[from];
    const uint32_t key = uint32_t(candidate), index = uint32_t(candidate >> 32);
    collected(shared)[threadIdx.x] = {key, index, load(key, index)};
  }
  if (n <= threadIdx.x && threadIdx.x < round_up(n, 32u)) collected(shared)[threadIdx.x] = padding();
  __syncthreads();  // candidates follow each other
  return n;
}

// The candidates, if they are few: everyone is compared with everyone, by key to know what is kept, and by index to draw from
// it (kDraws). The State's shared memory is the dynamic one. Not inlined, as `search`.
template <class State, class Shape, bool kDraws>
__device__ __noinline__ Verdict settle(typename State::Row row, uint32_t top_key, FilterArgs args) {
  using Domain = typename State::Domain;
  constexpr int kWarps = Shape::kThreads / 32;
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename State::Shared*>(smem);
  Verdict verdict = {0, 0, 0, false, false};
  const MassLoad<Domain> load(top_key);
  // While candidates are awaited:
  const uint64_t factor = args.has_top_p() ? share_factor(args.p) : 0;
  const bool joint = Domain::kOwnRef && args.has_top_p() && args.joint;  // compares with the row's mass
  if (joint) {
    const uint64_t part = ptx::warp_sum_u64(State(row, shared, top_key).part(threadIdx.x));
    if (lane_id() == 0) shared.warp_sum[warp_id()] = part;
  }
  const uint32_t n = collect<Shape>(shared, load);
  if (n == kWholeRow) return verdict;
  verdict.drawn = true;
  const Candidate* const list = collected(shared);
  Candidate* const kept_list = collected(shared) + kPairs;
  const Split split(n);
  const uint32_t k = min_of(args.top_k, n);
  Candidate own = padding();
  uint64_t above = 0;
  int32_t larger = 0;  // negative
  uint32_t equal = 0;
  if (split.works()) {
    own = list[split.item];
    if (!args.has_top_p()) {
      split.compare(list, [&](const Candidate& other) { ptx::count_less(larger, own.key, other.key); });
    } else {
      split.compare(list, [&](const Candidate& other) {
        equal += other.key == own.key;
        if (other.key <= own.key) return;
        --larger;
        above += other.load;
      });
      above = split.sum(above);
      equal = split.sum(equal);
    }
    larger = split.sum(larger);
  }
  bool kept = own.key != 0 && larger + int32_t(k) > 0;
  if (args.has_top_p()) {
    uint64_t total = 0;
    if (joint) total = ptx::warp_sum_u64(lane_id() < kWarps ? shared.warp_sum[lane_id()] : 0);
    if (!args.joint) {
      if (kept && int32_t(k) <= int32_t(equal) - larger) shared.above = above + equal * own.load;  // those on the k-th place
      __syncthreads();  // the mass of what top-k keeps is known
      total = shared.above;
    }
    kept = kept && above < args.target<Domain>(total, load.ref, factor);
  }
  kept = kept && own.key >= args.least;
  if (split.works() && split.part == 0) kept_list[split.item] = {kept ? own.key : 0xffffffffu, own.index, kept ? own.load : 0};
  __syncthreads();  // what is kept is known
  if constexpr (kDraws) {
    if (split.works()) {
      uint64_t before = 0, all = 0;
      split.compare(kept_list, [&](const Candidate& other) {
        all += other.load;
        before += other.index < own.index ? other.load : 0;
      });
      before = split.sum(before);
      const uint64_t target = __umul64hi(shared.random, split.sum(all));
      verdict.token = own.index;
      verdict.mine = kept && split.part == 0 && before <= target && target - before < own.load;
    }
  } else if (warp_id() == 0) {
    uint64_t sum = 0;
    uint32_t lowest = 0xffffffffu;
    for (uint32_t i = lane_id(); i < n; i += 32) {
      sum += kept_list[i].load;
      lowest = min_of(lowest, kept_list[i].key);
    }
    verdict.total = ptx::warp_sum_u64(sum);
    verdict.threshold = ptx::warp_min_u32(lowest);
  }
  return verdict;
}

}  // namespace fi::sampling
