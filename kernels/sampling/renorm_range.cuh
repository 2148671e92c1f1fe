// Top-p's threshold by a histogram that was made while the row was read, and by comparing what lies in the bin that the
// target falls into: how the CTAs of a cluster share that out, and what they have in shared memory (renorm.cuh).
#pragma once
#include "sampling/candidates.cuh"

namespace fi::sampling {

// Every one of n items is compared with all by 2^shift threads that follow each other: few, as an exchange between lanes
// takes as long as many comparisons. Items are padded to `padded`, a multiple of 8 for each of the threads and at most
// round_up(n, 32).
struct Pairwise {
  int shift;
  uint32_t padded, item, part;
  FI_DEVICE explicit Pairwise(uint32_t n) : shift(n <= 32 ? 2 : n <= 64 ? 1 : 0) {
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

template <class Shape>
struct alignas(16) RenormShared {
  uint64_t part_sum[2][Shape::kStep];  // a warp of the cluster: the mass of what it read, and the largest key
  uint64_t share_sum[Shape::kCluster];
  uint64_t found[2];  // the bin, and the mass from the top to its end
  uint64_t part_inside[Shape::kStep], part_range[Shape::kStep];  // a warp: mass, largest and smallest bits of its bin
  uint64_t listed[Shape::kCluster];  // elements of the bin in each CTA
  uint64_t warp_sum[32];
  uint64_t box[3];
  alignas(16) uint64_t own[kBins / Shape::kCluster];  // of this CTA's share of the bins, the cluster's sums
  alignas(16) uint32_t bins[2 * kBins];  // later the elements of the bin
  uint32_t part_top[2][Shape::kStep];
  uint32_t count;

  static constexpr uint32_t kRoom = 2 * kPairs / Shape::kCluster < kPairs ? 2 * kPairs / Shape::kCluster : kPairs;
  FI_DEVICE Candidate* mail() { return reinterpret_cast<Candidate*>(bins); }                // kRoom a CTA
  FI_DEVICE Candidate* dense() { return reinterpret_cast<Candidate*>(bins) + 2 * kPairs; }  // kPairs
  FI_DEVICE uint32_t* own_list() { return bins + 12 * kPairs; }                             // kRoom
};

// The bins of the first histogram: 128 for each power of two, from 2 down; the last one has all that is smaller.
constexpr int kFirstBins = 2 * kBins, kFirstShift = 16, kFirstTop = 0x3fffffff;
// Its rough masses: their sum fits 32 bits if the row's mass is less than 2.
constexpr int kRoughBits = 31;
// It has only what may be kept if the row's mass is at least
constexpr float kLeastTotal = 0.995f;
FI_DEVICE uint32_t first_bin(int bits) { return min_of(uint32_t(kFirstTop - bits) >> kFirstShift, uint32_t(kFirstBins - 1)); }

// The exchanges of a cluster take the two mailboxes in turn: everyone is at most one ahead.
template <class Shape>
struct Exchange {
  uint64_t* boxes;
  uint32_t number = 0;

  FI_DEVICE uint64_t* box() const { return boxes + number % 2; }
  FI_DEVICE void receive(uint32_t bytes) {
    Shape::receive(box(), number / 2, bytes);
    ++number;
  }
};

// What is known of the threshold: it is the smallest key of what is kept, of which `total` is the mass (found); or lies
// between two keys, and `total` is the mass above them; or nothing (high = 0).
struct Threshold {
  bool found;
  uint32_t low, high;
  uint64_t total;
};

// The bins of the first histogram that the target may fall into, from the row's largest element on: the masses are
// rounded down, by less than one for every element. {most, least}. `from`, `count`: the bins to look at.
template <class Shape>
FI_DEVICE uint2 find_bins(RenormShared<Shape>& shared, Exchange<Shape>& exchange, uint32_t from, uint32_t count,
                          uint64_t target, uint32_t vocab) {
  constexpr int kThreads = Shape::kThreads, kCluster = Shape::kCluster;
  constexpr int kOwn = ceil_div(kFirstBins / kCluster, kThreads);
  uint32_t* const own_bins = reinterpret_cast<uint32_t*>(shared.own);
  const uint32_t share = ceil_div(count, uint32_t(kCluster));
  for (uint32_t i = threadIdx.x; i < share * kCluster; i += kThreads)
    Shape::add(&own_bins[i % share], i < count ? shared.bins[from + i] : 0u, exchange.box(), i / share);
  exchange.receive(4 * share * kCluster);
  uint32_t own[kOwn], mine = 0;
  uint64_t of_share, all = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t bin = threadIdx.x * kOwn + i;
    own[i] = bin < share ? own_bins[bin] : 0;
    if (bin < share) own_bins[bin] = 0;
    mine += own[i];
  }
  uint64_t before = block_scan<kThreads>(mine, shared.warp_sum, of_share) - mine;
  if (threadIdx.x < kCluster) Shape::post(&shared.share_sum[Shape::rank()], of_share, exchange.box(), threadIdx.x);
  exchange.receive(8 * kCluster);
#pragma unroll
  for (uint32_t r = 0; r < kCluster; ++r) {
    const uint64_t other = shared.share_sum[r];
    before += r < Shape::rank() ? other : 0;
    all += other;
  }
  const uint64_t most = (target + (1u << (kMassBits - kRoughBits)) - 1) >> (kMassBits - kRoughBits);
  const uint64_t least = most > vocab ? most - vocab : 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t bin = Shape::rank() * share + threadIdx.x * kOwn + i;
#pragma unroll
    for (int which = 0; which < 2; ++which) {
      const uint64_t goal = which == 0 ? most : least;
      if (before < goal && goal <= before + own[i]) {  // one bin of one thread
#pragma unroll 1
        for (uint32_t r = 0; r < kCluster; ++r) Shape::post(&shared.found[which], uint64_t(bin), exchange.box(), r);
      }
    }
    before += own[i];
  }
  exchange.receive(8 * ((most <= all) + (0 < least && least <= all)));
  return make_uint2(most <= all ? uint32_t(shared.found[0]) : count - 1,
                    least == 0 ? 0 : least <= all ? uint32_t(shared.found[1]) : count - 1);
}

// The elements between two keys are told to all CTAs, and compared there. `visit(f)`: f(value) for all that the warp has.
template <class Shape, class Domain, class Visit>
FI_DEVICE Threshold compare_range(RenormShared<Shape>& shared, typename Domain::Ref ref, uint32_t low, uint32_t high,
                                  uint64_t target, Visit&& visit) {
  constexpr int kThreads = Shape::kThreads, kCluster = Shape::kCluster, kStep = Shape::kStep, kWarps = Shape::kWarps;
  constexpr uint32_t kRoom = RenormShared<Shape>::kRoom;
  const float least_value = value_of(low), most_value = value_of(high);
  uint64_t above = 0, inside = 0;
  uint32_t least = 0xffffffffu, most = 0;
  visit([&](float x) {
    if (x < least_value) return;
    const uint64_t mass = Domain::mass(x, ref);
    if (x > most_value) {
      above += mass;
    } else {
      inside += mass;
      const uint32_t key = key_of(x), place = atomicAdd(&shared.count, 1u);
      least = min_of(least, key);
      most = max_of(most, key);
      if (place < kRoom) shared.own_list()[place] = key;
    }
  });
  above = ptx::warp_sum_u64(above);
  inside = ptx::warp_sum_u64(inside);
  const uint64_t range = uint64_t(ptx::warp_max_u32(most)) << 32 | ptx::warp_min_u32(least);
  if (lane_id() < kCluster) {
    const uint32_t warp = Shape::first();
    Shape::post(&shared.part_sum[0][warp], above, &shared.box[2], lane_id());
    Shape::post(&shared.part_inside[warp], inside, &shared.box[2], lane_id());
    Shape::post(&shared.part_range[warp], range, &shared.box[2], lane_id());
  }
  __syncthreads();  // this CTA's list is complete
  const uint32_t mine = min_of(shared.count, kRoom), rank = Shape::rank();
  for (uint32_t i = threadIdx.x; i < mine * kCluster; i += kThreads) {
    const uint32_t key = shared.own_list()[i / kCluster];
    const uint64_t mass = Domain::mass(value_of(key), ref);
    Shape::post(reinterpret_cast<uint4*>(shared.mail() + rank * kRoom + i / kCluster),
                make_uint4(key, 0, uint32_t(mass), uint32_t(mass >> 32)), &shared.box[2], i % kCluster);
  }
  if (threadIdx.x < kCluster) {
    Shape::post(&shared.listed[rank], uint64_t(shared.count), &shared.box[2], threadIdx.x);
    if constexpr (kCluster > 1) ptx::mailbox_announce(&shared.box[2], 24 * kWarps + 8 + 16 * mine, threadIdx.x);
  }
  if constexpr (kCluster > 1) ptx::mailbox_wait(&shared.box[2], 0);
  else __syncthreads();  // this CTA's mail is complete
  above = inside = 0;
  least = 0xffffffffu;
  most = 0;
  for (int w = lane_id(); w < kStep; w += 32) {
    above += shared.part_sum[0][w];
    inside += shared.part_inside[w];
    least = min_of(least, uint32_t(shared.part_range[w]));
    most = max_of(most, uint32_t(shared.part_range[w] >> 32));
  }
  above = ptx::warp_sum_u64(above);
  inside = ptx::warp_sum_u64(inside);
  least = ptx::warp_min_u32(least);
  most = ptx::warp_max_u32(most);
  if (least == most) return {above < target, least, high, above + inside};  // ties: all or nothing
  uint32_t n = 0, from = 0;
  bool fits = true;
#pragma unroll
  for (uint32_t r = 0; r < kCluster; ++r) {
    const uint32_t of = uint32_t(shared.listed[r]);
    fits = fits && of <= kRoom;
    if (threadIdx.x >= n) from = r * kRoom + threadIdx.x - n;
    n += of;
  }
  if (above >= target || target > above + inside) return {false, 0, 0, 0};
  if (!fits || n > kPairs) return {false, low, high, above};
  Candidate* const list = shared.dense();
  if (threadIdx.x < n) list[threadIdx.x] = shared.mail()[from];
  if (n <= threadIdx.x && threadIdx.x < round_up(n, 32u)) list[threadIdx.x] = padding();
  __syncthreads();  // elements follow each other
  const Pairwise split(n);
  Candidate own = padding();
  uint64_t before = above;
  if (split.works()) {
    own = list[split.item];
    uint64_t heavier = 0;
    split.compare(list, [&](const Candidate& other) { heavier += other.key > own.key ? other.load : 0; });
    before += split.sum(heavier);
  }
  const bool kept = own.key != 0 && before < target;
  const uint32_t lowest = ptx::warp_min_u32(kept ? own.key : 0xffffffffu);
  const uint64_t mass = ptx::warp_sum_u64(kept && split.part == 0 ? own.load : 0);
  uint32_t* const lowest_of = shared.own_list();
  if (lane_id() == 0) {
    shared.warp_sum[warp_id()] = mass;
    lowest_of[warp_id()] = lowest;
  }
  __syncthreads();  // the warps' parts are known
  const bool of_warp = lane_id() < kWarps;
  const uint32_t threshold = ptx::warp_min_u32(of_warp ? lowest_of[lane_id()] : 0xffffffffu);
  const uint64_t total = above + ptx::warp_sum_u64(of_warp ? shared.warp_sum[lane_id()] : 0);
  return {true, threshold, high, total};
}

}  // namespace fi::sampling
