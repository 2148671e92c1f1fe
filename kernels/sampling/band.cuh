// Top-p alone, while the row is read once. A sample of the row (64 elements of every 1024) tells between which two values
// the threshold should lie. The pass over the row then adds up the mass above that band and lists what lies in it; the
// threshold is found in the list, exactly. If it lies elsewhere, or the list overflows, the radix search over the whole
// row decides instead: the result never depends on the estimate.
#pragma once
#include "sampling/candidates.cuh"

namespace fi::sampling {

struct Band {
  float low, high;  // low <= x < high
};

constexpr int kSampled = 64;                         // elements of a segment; the CTAs of a cluster all take them all
constexpr float kSampleWeight = float(kSegment) / kSampled;
constexpr int kOctaves = 32, kPerOctave = 32;        // histogram of the sample: 2^-30 ... 2^2
constexpr int kEstimateBins = 1024;
constexpr int kFirstBin = (127 - 30) * kPerOctave;

// Add the sample's elements (relative probabilities) to the histogram of counts.
template <class Domain, int kThreads, class Row>
FI_DEVICE void sample_row(const Row& row, typename Domain::Ref ref, uint32_t* bins) {
  constexpr int kLanes = kSampled / Row::kPer, kGroups = 32 / kLanes, kStep = kThreads / kLanes;
  constexpr int kFlight = 16 / Row::kPer;  // loads of a thread that are on their way together
  const uint32_t whole = row.vocab / kSegment;
#pragma unroll 1
  for (uint32_t first = warp_id() * kGroups; first < whole; first += kStep * kFlight) {
    float v[kFlight][Row::kPer];
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      const uint32_t segment = first + f * kStep + lane_id() / kLanes;
      const uint32_t place = __umulhi(segment * 0x9e3779b1u, kSegment / kSampled);  // scattered over the segment
#pragma unroll
      for (int j = 0; j < Row::kPer; ++j) v[f][j] = -FI_INF;
      if (segment < whole)
        row.load_at(segment * kSegment + place * kSampled + lane_id() % kLanes * Row::kPer, v[f]);
    }
#pragma unroll
    for (int f = 0; f < kFlight; ++f) {
      if (first + f * kStep + lane_id() / kLanes >= whole) break;
#pragma unroll
      for (int j = 0; j < Row::kPer; ++j) {
        const int bin = (__float_as_int(Domain::relative(v[f][j], ref)) >> 18) - kFirstBin;  // 5 bits of mantissa
        atomicAdd(&bins[max_of(0, min_of(bin, kOctaves * kPerOctave - 1))], 1u);
      }
    }
  }
}

// The band in which top-p's threshold should lie, if what it rejects has the relative probability `rejected`. All threads
// of the CTA get the same. shared.low and inside must be 0 and shared.high 0xffffffff, and a barrier behind that.
template <class Domain, class Shape, class Row, class Shared>
FI_DEVICE Band estimate(const Row& row, typename Domain::Ref ref, float rejected, Shared& shared) {
  if (row.vocab <= Shared::kList) return {-3.402823466e38f, FI_INF};  // the list holds everything but -inf
  constexpr int kThreads = Shape::kThreads, kOwn = kEstimateBins / kThreads;
  uint32_t* const bins = shared.bins;
  float2* const warp_part = reinterpret_cast<float2*>(bins + kEstimateBins);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) bins[threadIdx.x + i * kThreads] = 0;
  __syncthreads();  // bins are clear
  sample_row<Domain, kThreads>(row, ref, bins);
  __syncthreads();  // bins are complete
  // Sums and sums of squares of everything lighter than each bin: thread t owns kOwn bins.
  auto edge = [](int bin) { return __int_as_float(min_of(bin, kOctaves * kPerOctave) + kFirstBin << 18); };
  float sum = 0.f, squares = 0.f;
  auto add = [&](int bin) {
    const float centre = edge(bin) * (1.f + 0.5f / kPerOctave), mass = float(bins[bin]) * centre;
    sum += mass;
    squares += mass * centre;
  };
#pragma unroll 1
  for (int i = 0; i < kOwn; ++i) add(threadIdx.x * kOwn + i);
  const float own_sum = sum, own_squares = squares;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const float a = __shfl_up_sync(kFullMask, sum, offset), b = __shfl_up_sync(kFullMask, squares, offset);
    if (lane_id() >= offset) {
      sum += a;
      squares += b;
    }
  }
  if (lane_id() == 31) warp_part[warp_id()] = {sum, squares};
  __syncthreads();  // the warps' sums are complete
  for (int w = 0; w < warp_id(); ++w) {
    sum += warp_part[w].x;
    squares += warp_part[w].y;
  }
  sum -= own_sum;
  squares = fmaxf(squares - own_squares, 0.f);
  // A wide band, and one for rows of which the wide band would overflow the list.
  uint32_t low[2] = {0, 0}, high[2] = {0xffffffffu, 0xffffffffu};
#pragma unroll 1
  for (int i = 0; i < kOwn; ++i) {
    const int bin = threadIdx.x * kOwn + i;
    const float mass = kSampleWeight * sum, deviation = kSampleWeight * squares * math::rsqrt(fmaxf(squares, 1e-37f));
    // What is lighter surely has less than `rejected`: also if three tokens this heavy were missed in the sample.
    const float least = 1.003f * mass + 3.f * kSampleWeight * edge(bin) - rejected, most = 0.997f * mass - rejected;
#pragma unroll
    for (int w = 0; w < 2; ++w) {
      const float spread = (w == 0 ? 3.5f : 3.f) * deviation;
      if (least + spread <= 0.f) low[w] = bin;
      if (most - spread >= 0.f) high[w] = min_of(high[w], uint32_t(bin));
    }
    add(bin);
  }
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    const uint32_t lowest = ptx::warp_max_u32(low[w]), highest = ptx::warp_min_u32(high[w]);
    if (lane_id() == 0) {
      atomicMax(&shared.low[w], lowest);
      atomicMin(&shared.high[w], highest);
    }
  }
  __syncthreads();  // both bands are known
  uint32_t inside = 0;
  for (uint32_t bin = shared.low[0] + threadIdx.x; bin < min_of<uint32_t>(shared.high[0], kEstimateBins); bin += kThreads)
    inside += bins[bin];
  inside = ptx::warp_sum_u32(inside);
  if (lane_id() == 0) atomicAdd(&shared.inside, inside);
  __syncthreads();  // the wide band's elements are counted
  const int which = shared.inside * kSampleWeight > 0.85f * Shared::kList;
  const uint32_t from = min_of(shared.low[which], uint32_t(kOctaves * kPerOctave - 1)), to = shared.high[which];
  auto value = [&](int bin) { return Domain::value_at(edge(bin), ref); };
  return {value(from), to >= kOctaves * kPerOctave ? FI_INF : value(max_of(to, from + 1))};
}

// The pass over the row: every segment's largest key and mass above the band, and everything in the band, to the first
// CTA's `to`; and each warp's mass of what lies in the band and (if `want_total`) of all it read. Elements in the band are
// few, so a lane only marks its own, and then reads them again. Probabilities are added up in the unit 2^-43. Not inlined,
// as `search`; Shared is the dynamic shared memory.
template <class Domain, class Shape, class Shared, class Row, class Held>
__device__ __noinline__ void read_with_band(Row row, typename Domain::Ref ref, Band band, bool want_total,
                                            Started<Shape> started, Held held) {
  extern __shared__ __align__(1024) uint8_t smem[];
  Shared& own = *reinterpret_cast<Shared*>(smem);
  Shared& to = Shape::at(own, 0);
  constexpr uint32_t kList = Shared::kList;
  constexpr int kPer = Row::kPer;
  static_assert(Row::kBlocks * kPer == 32, "a lane's elements are the bits of a word");
  auto mass_of = [&](float x) {
    if constexpr (Domain::kOwnRef) return Domain::mass(x, ref);
    else return Domain::mass(x);
  };
  const uint32_t segments = row.segments();
  uint32_t lowest = 0xffffffffu, highest = 0;
  if (lane_id() == 0) own.warp_total[Shape::first()] = own.warp_inside[Shape::first()] = 0;
#pragma unroll 1
  for (uint32_t s = Shape::first(); s < segments; s += Shape::kStep) {
    typename Row::Block v[Row::kBlocks];
    row.load(s, 0, Row::kAll, v);
    started.wait();
    held.put(s, v);
    uint4 keys;
    const uint32_t top = segment_top<false, Row>(v, keys);
    uint64_t sum = 0;
    uint32_t marks = 0;
    each_value<Row>(v, [&](float x, int b, int j) {
      const uint64_t mass = mass_of(x);
      if (x >= band.high) sum += mass;
      else if (x >= band.low) marks |= 1u << (b * kPer + j);
    });
    sum = ptx::warp_sum_u64(sum);
    uint64_t all = 0;
    if (want_total) {
      each_value<Row>(v, [&](float x, int, int) { all += mass_of(x); });
      all = ptx::warp_sum_u64(all);
    }
    if (lane_id() == 0) {
      to.top[s] = top;
      to.sum[s] = sum;
      own.warp_total[Shape::first()] += all;
    }
    const uint32_t mine = __popc(marks);
    uint32_t end = mine;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t other = __shfl_up_sync(kFullMask, end, offset);
      if (lane_id() >= offset) end += other;
    }
    const uint32_t found = __shfl_sync(kFullMask, end, 31);
    if (found == 0) continue;
    uint32_t at = 0;
    if (lane_id() == 0) at = atomicAdd(&to.count, found);
    at = __shfl_sync(kFullMask, at, 0) + end - mine;
    uint64_t inside = 0;
#pragma unroll 1
    for (; marks; marks &= marks - 1, ++at) {
      const uint32_t place = __ffs(marks) - 1;
      const uint32_t i = s * kSegment + place / kPer * Row::kBlock + lane_id() * kPer + place % kPer;
      const float x = row.at(i);
      const uint32_t key = key_of(x);
      inside += mass_of(x);
      lowest = min_of(lowest, key);
      highest = max_of(highest, key);
      if (at < kList) {
        to.key[at] = key;
        to.index[at] = i;
      }
    }
    inside = ptx::warp_sum_u64(inside);
    if (lane_id() == 0) own.warp_inside[Shape::first()] += inside;
  }
  started.wait();
  lowest = ptx::warp_min_u32(lowest);
  highest = ptx::warp_max_u32(highest);
  if (lane_id() == 0) {
    to.warp_total[Shape::first()] = own.warp_total[Shape::first()];
    to.warp_inside[Shape::first()] = own.warp_inside[Shape::first()];
    to.warp_range[Shape::first()] = {lowest, highest};
  }
}

// What is left to search of a row that was read with `band` by `warps` warps: the list, if the threshold lies in the
// band; the row's part in the band, if the list overflowed; or the row. `total`: the row's mass, known of logits.
template <class State>
FI_DEVICE Rest rest_of_band(const State& state, const FilterArgs& args, Band band, uint64_t& total, int warps) {
  using Domain = typename State::Domain;
  constexpr int kThreads = State::kThreads;
  auto& shared = state.shared;
  const uint32_t n = shared.count;
  uint64_t inside = threadIdx.x < warps ? shared.warp_inside[threadIdx.x] : 0;
  inside = block_sum<kThreads>(inside, shared.warp_sum);
  if constexpr (!Domain::kOwnRef) {
    if (!args.joint) total = block_sum<kThreads>(threadIdx.x < warps ? shared.warp_total[threadIdx.x] : 0, shared.warp_sum);
  }
  const uint64_t above = state.kept(), target = args.target<Domain>(total, state.ref);
  Rest rest = {kWholeRow, 0, state.top_key, 0};
  bool unit = true, found = false;
  if constexpr (!Domain::kOwnRef) unit = state.ref.exponent == 0;
  // What lies above the band is kept whole, unless min-p cuts there: then the row is read again.
  const bool cut = band.high < FI_INF && args.least >= key_of(band.high);
  if (unit && !cut && above < target && target <= above + inside) {
    // Of what lies in the band: ties need no search.
    uint32_t lowest = 0xffffffffu, highest = 0;
    for (int w = lane_id(); w < warps; w += 32) {
      const uint2 range = shared.warp_range[w];
      lowest = min_of(lowest, range.x);
      highest = max_of(highest, range.y);
    }
    found = true;
    rest = {n <= State::Shared::kList ? n : kWholeRow, ptx::warp_min_u32(lowest), ptx::warp_max_u32(highest), above};
  }
  if constexpr (!Domain::kOwnRef) {
    if (rest.listed == kWholeRow) {
      const uint32_t blocks = state.row.segments() * State::Row::kBlocks;
      for (uint32_t b = threadIdx.x; b < blocks; b += kThreads) shared.block_top[b] = kInfKey;  // not known
      if (!unit || (args.joint && !found)) {  // the total is not known, or not in the row's unit
        state.add_up();
        total = state.kept();
      }
      __syncthreads();  // the blocks' tops are set
    }
  }
  return rest;
}

}  // namespace fi::sampling
