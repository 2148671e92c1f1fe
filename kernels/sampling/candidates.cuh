// Filters that keep few tokens: every warp lists what reaches a proven lower bound in its part of the row, and the first CTA
// compares that. If it is much, the first CTA gathers a longer list, in index order, or searches the row.
#pragma once
#include "sampling/filters.cuh"

namespace fi::sampling {

// What became of a row: the smallest kept key, and if candidates were few (`drawn`) also the mass of what is kept (both of
// them in warp 0) or the token, which one thread has (`mine`). Else the segments' sums hold the mass of what is kept: it is
// known if the threshold is a key that many have (`tied`).
struct Verdict {
  uint32_t threshold;
  uint64_t total;
  uint32_t token;
  bool drawn, mine, tied;
};

// Candidates in the first CTA, in the place of the bins.
struct alignas(16) Compared {
  uint64_t order[kPairs];  // key and index, so that the larger one comes first; padded with 0
  uint64_t load[kPairs];
  Candidate ranked[kPairs], placed[kPairs];  // as they come by key, and by index
};
static_assert(sizeof(Compared) <= 8 * kBins);
template <class Shared>
FI_DEVICE Compared& compared(Shared& shared) {
  return *reinterpret_cast<Compared*>(shared.bins);
}
// And behind them, segments' sums of what reaches ties.
template <class Shared>
FI_DEVICE uint64_t* tie_sums(Shared& shared) {
  static_assert(sizeof(Compared) + 8 * Shared::kSegments <= 8 * kBins);
  return reinterpret_cast<uint64_t*>(&compared(shared) + 1);
}

// Every one of n items is compared with all by 2^shift threads that follow each other, in rounds of 8 items a thread.
struct Split {
  int shift;
  uint32_t rounds, item, part;
  FI_DEVICE explicit Split(uint32_t n) : shift(n <= 32 ? 3 : n <= 64 ? 2 : n <= 128 ? 1 : 0) {
    rounds = ceil_div(n, 8u << shift);
    item = threadIdx.x >> shift;
    part = threadIdx.x & ((1u << shift) - 1);
  }
  FI_DEVICE uint32_t padded() const { return rounds * 8 << shift; }
  // Whether this thread's warp has items.
  FI_DEVICE bool works(uint32_t n) const { return uint32_t(warp_id() * 32) >> shift < n; }
  // How many items are ahead of `own` and, in the upper half (kIndices), how many have a lower half larger than its own.
  template <bool kIndices>
  FI_DEVICE uint32_t ranks(const uint64_t* order, uint64_t own) const {
    const uint4* pairs = reinterpret_cast<const uint4*>(order) + part;
    int32_t ahead[2] = {0, 0}, before[2] = {0, 0};  // negative
#pragma unroll 1
    for (uint32_t r = 0; r < rounds; ++r) {
      uint4 v[4];
#pragma unroll
      for (int j = 0; j < 4; ++j, pairs += 1 << shift) v[j] = *pairs;
      __syncwarp();  // all are on their way before the first is looked at: the compiler would take one after the other
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        ptx::count_less(ahead[0], own, uint64_t(v[j].y) << 32 | v[j].x);
        ptx::count_less(ahead[1], own, uint64_t(v[j].w) << 32 | v[j].z);
        if constexpr (kIndices) {
          ptx::count_less(before[0], uint32_t(own), v[j].x);
          ptx::count_less(before[1], uint32_t(own), v[j].z);
        }
      }
    }
    uint32_t both = uint32_t(-ahead[0] - ahead[1]) + (uint32_t(-before[0] - before[1]) << 16);
#pragma unroll 1
    for (int offset = (1 << shift) / 2; offset > 0; offset /= 2) both += __shfl_xor_sync(kFullMask, both, offset);
    return both;
  }
};

// Items in order as a warp adds them up: a lane has some that follow each other.
struct Ordered {
  const Candidate* items;
  uint32_t first, end;
  FI_DEVICE Ordered(const Candidate* items, uint32_t n) : items(items) {
    const uint32_t each = ceil_div(n, 32u);
    first = lane_id() * each;
    end = min_of(first + each, n);
  }
  // One's mass, if its key is `least` or more.
  FI_DEVICE uint64_t mass(uint32_t i, uint32_t least) const {
    const uint4 words = *reinterpret_cast<const uint4*>(items + i);
    return words.x >= least ? uint64_t(words.w) << 32 | words.z : 0;
  }
  // The lane's.
  FI_DEVICE uint64_t mass_from(uint32_t least) const {
    uint64_t sum = 0;
#pragma unroll 1
    for (uint32_t i = first; i < end; ++i) sum += mass(i, least);
    return sum;
  }
  // Ordered by key: that of the first item with which the masses reach the target, or 0. `until`: those up to this lane's
  // last item, `own` of it the lane's.
  FI_DEVICE uint32_t key_reaching(uint64_t target, uint64_t until, uint64_t own) const {
    const uint32_t reaching = __ballot_sync(kFullMask, until >= target);
    if (!reaching) return 0;
    uint64_t sum = until - own;
    uint32_t key = 0;
#pragma unroll 1
    for (uint32_t i = first; i < end && sum < target; ++i) {
      key = items[i].key;
      sum += items[i].load;
    }
    return __shfl_sync(kFullMask, key, __ffs(reaching) - 1);
  }
};

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
  uint32_t ties;  // of a key just below `low`, with which the candidates are k or more; 0 without
};

// Before the keys are received, by one thread: places behind the last segment count as the smallest key.
template <class Row, class Shared>
FI_DEVICE void pad_tops(Shared& shared, uint32_t segments, uint32_t size) {
  if (size != Row::kBlocks) return;  // groups are made, with what they are padded with
#pragma unroll 1
  for (uint32_t i = segments; i < (segments > 128 ? 256 : 128); ++i) shared.top[i] = 0;
}

// The k-th largest of the groups' largest keys, which at least k elements reach, and the largest. `ties`: hardly a group is
// below it, but for those with no more than `nothing`. Every CTA for itself. Uses the bins, but not where candidates will be
// compared.
template <int kThreads, class Row, class Shared>
FI_DEVICE Bounds group_bounds(Shared& shared, uint32_t segments, uint32_t size, uint32_t k, uint32_t nothing, bool& ties) {
  constexpr uint32_t kBlocks = Row::kBlocks, kWarps = kThreads / 32;
  static_assert(kThreads >= kPairs && kWarps % 8 == 0);
  uint32_t* const made = shared.bins + 4 * kPairs;  // behind `order` and `load`
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
      made[threadIdx.x] = key;
    }
    keys = made;
    __syncthreads();  // the groups' keys are known
  }
  // Padded to 128 or 256 keys. A warp compares 32 of them, a lane one, with a part of all.
  const bool many = groups > 128;
  const uint32_t set = warp_id() & (many ? 7 : 3), part = warp_id() >> (many ? 3 : 2);
  const uint32_t parts = kWarps >> (many ? 3 : 2), each = (many ? 64 : 32) / parts;  // groups of four keys
  const uint4* const quads = reinterpret_cast<const uint4*>(keys);
  uint32_t* const counts = made + kPairs;
  const uint32_t padded = many ? 256 : 128;
  const uint32_t key = keys[set * 32 + lane_id()];
  int32_t larger[2] = {0, 0};  // negative
#pragma unroll 1
  for (uint32_t i = part * each; i < part * each + each; i += 4) {
    uint4 others[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) others[j] = quads[i + j];
    __syncwarp();  // all are on their way before the first is looked at, as in Split
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      ptx::count_less(larger[0], key, others[j].x);
      ptx::count_less(larger[1], key, others[j].y);
      ptx::count_less(larger[0], key, others[j].z);
      ptx::count_less(larger[1], key, others[j].w);
    }
  }
  counts[part * padded + set * 32 + lane_id()] = -(larger[0] + larger[1]);
  __syncthreads();  // parts are counted
  // The k-th largest is the smallest of those that fewer than k are larger than.
  uint32_t low = 0xffffffffu, top = 0, below = 0;
#pragma unroll 1
  for (uint32_t i = lane_id(); i < (many ? 64 : 32); i += 32) {
    const uint4 four = quads[i];
    uint4 above = make_uint4(0, 0, 0, 0);
#pragma unroll 1
    for (uint32_t r = 0; r < parts; ++r) {
      const uint4 more = reinterpret_cast<const uint4*>(counts)[r * (padded / 4) + i];
      above = make_uint4(above.x + more.x, above.y + more.y, above.z + more.z, above.w + more.w);
    }
    auto look = [&](uint32_t key, uint32_t above) {
      low = min_of(low, above < k ? key : 0xffffffffu);
      below += above >= k && key > nothing;
    };
    look(four.x, above.x);
    look(four.y, above.y);
    look(four.z, above.z);
    look(four.w, above.w);
    top = max_of(max_of(top, max_of(four.x, four.y)), max_of(four.z, four.w));
  }
  ties = ptx::warp_sum_u32(below) * 16 <= groups;
  return {ptx::warp_min_u32(low), ptx::warp_max_u32(top), 0};
}

// What candidates are compared by: their mass,
// (kAdds: ties are added up)
template <class Domain, bool kDraws, bool kAdds_>
struct MassLoad {
  typename Domain::Ref ref;
  static constexpr bool kAdds = kAdds_;
  static constexpr uint32_t kNothing = Domain::kNothing;
  // What has no mass is never a candidate.
  FI_DEVICE static uint32_t lowest(uint32_t top_key) {
    if constexpr (kDraws) return Domain::lowest_key(value_of(top_key));
    else return Domain::kNothing + 1;
  }
  FI_DEVICE explicit MassLoad(uint32_t top_key) : ref(Domain::ref(value_of(top_key))) {}
  FI_DEVICE static bool valid(uint32_t top_key) { return top_key <= kInfKey && Domain::valid(value_of(top_key)); }
  FI_DEVICE uint64_t operator()(uint32_t key) const { return Domain::mass(value_of(key), ref); }
};

// Every warp lists what reaches a bound in its own segments, for the first CTA: a lower bound of the k-th largest, or
// (k = 0) `least(top)`. In no order. With kKeeps every CTA also has its own candidates. Of a bound that nearly
// all groups reach, what is above it; its ties are announced (kAdds), too. Behind the summary. The shared memory is the
// dynamic one.
template <class Shape, class Load, bool kKeeps, class Row, class Shared, class Least>
FI_DEVICE Bounds shortlist(Row row, uint32_t size, uint32_t k, Least least) {
  constexpr int kBlocks = Row::kBlocks, kPer = Row::kPer, kStep = Shape::kStep;
  constexpr int kTogether = 32 / kBlocks;  // segments whose blocks a warp looks at together, a lane a block
  constexpr int kFlight = 4;               // loads of a thread that are on their way together
  constexpr uint32_t kRoom = Shared::room(Shape::kCluster);
  static_assert(Shared::kSelects && kFlight * kPer <= 32);
  extern __shared__ __align__(1024) uint8_t smem[];
  Shared& shared = *reinterpret_cast<Shared*>(smem);
  const uint32_t segments = row.segments(), rank = Shape::rank();
  bool ties;
  Bounds bounds = group_bounds<Shape::kThreads, Row>(shared, segments, size, k, Load::kNothing, ties);
  if (!Load::valid(bounds.top)) return bounds;
  if (k == 0) bounds.low = least(bounds.top);
  const uint32_t lowest = Load::lowest(bounds.top);
  if (bounds.low < lowest) {
    bounds.low = lowest;
  } else if (ties && k > 0 && bounds.low <= kInfKey) {
    bounds.ties = bounds.low++;
  }
  const float bound = value_of(bounds.low);
  uint32_t sent = 0, listed = 0;
  bool full = false;
#pragma unroll 1
  for (uint32_t first = Shape::first(); first < segments && !full; first += kTogether * kStep) {
    auto block_of = [&](uint32_t place) { return (first + place / kBlocks * kStep) * kBlocks + place % kBlocks; };
    uint32_t taken = __ballot_sync(kFullMask, first + lane_id() / kBlocks * kStep < segments &&
                                                  shared.block_top[block_of(lane_id())] >= bounds.low);
#pragma unroll 1
    while (taken && !full) {
      typename Row::Raw v[kFlight];
      uint32_t at[kFlight], places = 0;  // places: a byte each
      float x = 0.f;
      const uint32_t count = min_of(__popc(taken), kFlight);
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        if (f >= count) break;
        const uint32_t place = __ffs(taken) - 1;
        taken &= taken - 1;
        places |= place << (8 * f);
        at[f] = block_of(place) * Row::kBlock + lane_id() * kPer;
        row.raw_at(at[f], v[f]);
      }
      uint32_t marks = 0;  // the last one's value is x
#pragma unroll
      for (int f = 0; f < kFlight; ++f) {
        if (f >= count) break;
        const uint32_t left = at[f] < row.vocab ? row.vocab - at[f] : 0;
        float y[kPer];
        row.values(v[f], y);
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          if (y[j] < bound || j >= left) continue;
          marks |= 1u << (f * kPer + j);
          x = y[j];
        }
      }
      if (marks) {
        uint32_t place = atomicAdd(&shared.count, __popc(marks));
        listed += __popc(marks);
        auto index_of = [&](uint32_t bit) {
          return block_of(places >> (bit / kPer * 8) & 0xff) * Row::kBlock + lane_id() * kPer + bit % kPer;
        };
#pragma unroll 1
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
      const int left = int(segments) - 1 - int(Shape::first());
      const uint32_t own = Load::kAdds && bounds.ties && left >= 0 ? left / kStep + 1 : 0;  // sums of segments
      Shape::add(&shared.found[rank], uint64_t(listed), &shared.box[2], 0);
      ptx::mailbox_announce(&shared.box[2], 8 * (sent + 1 + own), 0);
    }
  }
  return bounds;
}

// The candidates, one behind the other: in the first CTA. Their order is by key and index ^ flip; `load(key)` is kept, too
// (kLoads). Returns how many there are, or kWholeRow if they are too many.
template <class Shape, bool kLoads, class Shared, class Load>
FI_DEVICE uint32_t collect(Shared& shared, uint32_t flip, const Load& load) {
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
  if (threadIdx.x < Split(n).padded()) {
    uint64_t order = 0;
    if (threadIdx.x < n) {
      const uint64_t candidate = shared.candidates()[from];
      const uint32_t key = uint32_t(candidate), index = uint32_t(candidate >> 32);
      order = uint64_t(key) << 32 | (index ^ flip);
      if constexpr (kLoads) compared(shared).load[threadIdx.x] = load(key);
    }
    compared(shared).order[threadIdx.x] = order;
  }
  __syncthreads();  // candidates follow each other
  return n;
}

// The candidates, if they are few: everyone is compared with everyone, so that they can be looked at in the order of their
// keys, to know what is kept, and of their indices, to draw from it (kDraws). That is done by one warp. With what is tied
// below them: if top-k wants it, only sums are known. The State's shared memory is the dynamic one.
template <class State, class Shape, class Load, bool kDraws>
FI_DEVICE Verdict settle(typename State::Row row, uint32_t top_key, FilterArgs args, uint32_t ties) {
  using Domain = typename State::Domain;
  constexpr int kWarps = Shape::kThreads / 32;
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<typename State::Shared*>(smem);
  Verdict verdict = {0, 0, 0, false, false, false};
  const Load load(top_key);
  // While candidates are awaited:
  const uint64_t factor = args.has_top_p() ? share_factor(args.p) : 0;
  const bool joint = Domain::kOwnRef && args.has_top_p() && args.joint;  // compares with the row's mass
  if (joint) {
    const uint64_t part = ptx::warp_sum_u64(State(row, shared, top_key).part(threadIdx.x));
    if (lane_id() == 0) shared.warp_sum[warp_id()] = part;
  }
  const uint32_t n = collect<Shape, true>(shared, 0xffffffffu, load);
  if (n == kWholeRow) return verdict;
  const bool tied = ties != 0 && n < args.top_k;
  uint64_t of_ties = 0;
  if (Load::kAdds && tied) {
    const uint64_t sum = threadIdx.x < row.segments() ? tie_sums(shared)[threadIdx.x] : 0;
    if (args.has_top_p() && !args.joint) of_ties = block_sum<Shape::kThreads>(sum, shared.warp_sum);
    if (threadIdx.x < row.segments()) shared.sum[threadIdx.x] = sum;
  }
  verdict.drawn = true;
  Compared& list = compared(shared);
  const Split split(n);
  if (split.works(n)) {
    const uint64_t own = list.order[split.item];
    const uint32_t ranks = split.ranks<kDraws>(list.order, own), ahead = ranks & 0xffff, before = ranks >> 16;
    if (split.part == 0 && split.item < n) {
      const uint64_t mass = list.load[split.item];
      const Candidate item = {uint32_t(own >> 32), ~uint32_t(own), mass};
      list.ranked[ahead] = item;
      if constexpr (kDraws) list.placed[before] = item;
    }
  }
  __syncthreads();  // both orders are complete
  if (warp_id() != 0 && !tied) return verdict;
  const Ordered by_key(list.ranked, n);
  uint32_t threshold = tied ? ties : list.ranked[min_of(args.top_k, n) - 1].key;
  if (args.has_top_p() && warp_id() == 0) {
    const uint64_t mass = by_key.mass_from(threshold), until = warp_scan(mass);
    uint64_t total = __shfl_sync(kFullMask, until, 31);
    if (tied) total = of_ties;
    if (joint) total = ptx::warp_sum_u64(lane_id() < kWarps ? shared.warp_sum[lane_id()] : 0);
    // The item with which the target is reached is the last one that is kept, with its ties.
    threshold = max_of(threshold, by_key.key_reaching(args.target<Domain>(total, load.ref, factor), until, mass));
  }
  threshold = max_of(threshold, args.least);
  if (tied) {
    if (threadIdx.x == 0) shared.threshold = threshold;
    __syncthreads();  // whether they are kept is known
    verdict.threshold = shared.threshold;
    verdict.tied = verdict.threshold == ties;
    verdict.drawn = !verdict.tied;
    if (verdict.tied || warp_id() != 0) return verdict;
  }
  if constexpr (kDraws) {
    const Ordered by_index(list.placed, n);
    const uint64_t mass = by_index.mass_from(threshold), until = warp_scan(mass);
    const uint64_t target = __umul64hi(shared.random, __shfl_sync(kFullMask, until, 31));
    uint64_t before = until - mass;
    verdict.mine = before <= target && target < until;  // one lane
    if (verdict.mine) {
#pragma unroll 1
      for (uint32_t i = by_index.first; before <= target; ++i) {
        verdict.token = list.placed[i].index;
        before += by_index.mass(i, threshold);
      }
    }
  } else {
    verdict.total = ptx::warp_sum_u64(by_key.mass_from(threshold));
    verdict.threshold = threshold;
  }
  return verdict;
}

}  // namespace fi::sampling
