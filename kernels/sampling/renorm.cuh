// Rows of probabilities after top-p: what it rejects at 0 and the rest divided by its sum.
// A cluster of kCluster CTAs (1 below sm_90) of kThreads computes one row; grid = rows * kCluster. The row stays on chip
// (kHold: a warp's last segment in its registers, the others in shared memory; without, all but the last are read again).
// The threshold is found by all CTAs together: while the row is read, every one adds its masses to a histogram, the
// histograms are added up where each CTA has a share of the bins, and of the bin that the target falls into, every CTA
// gets all elements and compares them. If they are many, or the row does not sum to about 1, the bins of more histograms
// divide the range until it holds one value: two or three rounds, whatever the row looks like.
// Shared memory (dynamic): RenormShared, and the held segments as T. Bytes moved: rows * vocab * 2 * sizeof(T), without
// kHold another sizeof(T). Architecture: any; clusters need sm_90.
#pragma once
#include "ptx/pdl.cuh"
#include "sampling/parameters.cuh"
#include "sampling/renorm_range.cuh"

namespace fi {

// Config: T, kThreads, kCluster, kSegments (at most), kHold, kSharedBytes (of RenormShared)
template <class Config>
FI_DEVICE void renorm_top_p(const SamplingParams& params) {
  using namespace sampling;
  using T = typename Config::T;
  using Domain = Probs;
  using Row = PlainRow<T>;
  using Block = typename Row::Block;
  using Shape = sampling::Shape<Config::kThreads, Config::kCluster>;
  using Shared = RenormShared<Shape>;
  constexpr int kThreads = Config::kThreads, kCluster = Config::kCluster, kStep = Shape::kStep, kPer = Row::kPer;
  constexpr int kShare = kBins / kCluster, kOwn = ceil_div(kShare, kThreads), kPart = 8 / kPer;
  static_assert(sizeof(Shared) == Config::kSharedBytes);
  extern __shared__ __align__(1024) uint8_t smem[];
  Shared& shared = *reinterpret_cast<Shared*>(smem);
  const Held<T, Shape, Config::kHold> held{reinterpret_cast<T*>(smem + sizeof(Shared))};

  if (threadIdx.x == 0) {
    ptx::mailbox_open(&shared.box[0]);
    ptx::mailbox_open(&shared.box[1]);
    ptx::mailbox_open(&shared.box[2], kCluster);
    shared.count = 0;
  }
  for (int i = threadIdx.x; i < kShare; i += kThreads) shared.own[i] = 0;
  for (int i = threadIdx.x; i < kFirstBins / 4; i += kThreads)
    reinterpret_cast<uint4*>(shared.bins)[i] = make_uint4(0, 0, 0, 0);
  Shape::start();
  if constexpr (kCluster > 1) __syncthreads();  // bins are clear
  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint32_t vocab = params.vocab;
  const int64_t row_number = Shape::row();
  const Row row{static_cast<const T*>(params.input) + row_number * params.stride, vocab,
                (params.flags & kAlignedInput) != 0};
  const FilterArgs args = {vocab, read_real(params.p, params.flags & kP64, row_number, params.p_value),
                           (params.flags & kJoint) != 0};
  const int first = Shape::first(), left = int(row.segments()) - 1 - first;
  const int last = left >= 0 ? first + left / kStep * kStep : -1;  // this warp's last segment
  Block v[Row::kBlocks];
  Exchange<Shape> exchange{shared.box};
  Started<Shape> started;
  // All tokens lighter than `least_first` cannot fill the gap between a mass of kLeastTotal and the target.
  const float gap = args.joint ? kLeastTotal - fmaxf(args.p, 0.f) : kLeastTotal * (1.f - args.p);
  const float least_first = args.has_top_p() ? fmaxf(gap * (0.99f / float(vocab)), __int_as_float(1)) : FI_INF;
  uint32_t top = 0;
  uint64_t sum = 0;
#pragma unroll
  for (int b = 0; b < Row::kBlocks; ++b) {
#pragma unroll
    for (int j = 0; j < kPer; ++j) v[b][j] = from_float<T>(-FI_INF);
  }
#pragma unroll 1
  for (int s = first; s <= last; s += kStep) {
    row.load(s, 0, Row::kAll, v);
    started.wait();
    if (s != last) held.put(s, v);
    uint4 keys;
    top = max_of(top, segment_top<false, Row>(v, keys));
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) {
      float x[kPer];
      uint32_t rough[kPer], bin[kPer], together = 0;
      v[b].to_floats(x);
      bool alike = true;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const uint64_t mass = Domain::mass(x[j]);
        sum += mass;
        rough[j] = uint32_t(mass >> (kMassBits - kRoughBits));
        bin[j] = x[j] < least_first ? kFirstBins : first_bin(__float_as_int(x[j]));
        together += rough[j];
        alike = alike && bin[j] == bin[0];
      }
      if (alike) {  // ties would queue up
        if (bin[0] < kFirstBins) atomicAdd(&shared.bins[bin[0]], together);
      } else {
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          if (bin[j] < kFirstBins) atomicAdd(&shared.bins[bin[j]], rough[j]);
        }
      }
    }
  }
  started.wait();
  // f(value) of everything that this warp has: the last segment, and the others in parts.
  auto visit = [&](auto&& f) {
    each_value<Row>(v, [&](float x, int, int) { f(x); });
#pragma unroll 1
    for (int s = first; s < last; s += kStep) {
#pragma unroll 1
      for (int b = 0; b < Row::kBlocks; b += kPart) {
        Block w[kPart];
        if constexpr (Config::kHold) {
#pragma unroll
          for (int i = 0; i < kPart; ++i) w[i] = Block::load(held.place(s, b + i));
        } else {
          row.load(s, b, (1u << kPart) - 1, w);
        }
#pragma unroll
        for (int i = 0; i < kPart; ++i) {
          float x[kPer];
          w[i].to_floats(x);
#pragma unroll
          for (int j = 0; j < kPer; ++j) f(x[j]);
        }
      }
    }
  };
  // Every warp learns the row's largest key and mass. Rows of an unusual scale are added up again, in their own unit.
  uint64_t total = 0;
  auto ref = Domain::ref(1.f);
  bool valid = true;
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    sum = ptx::warp_sum_u64(sum);
    if (lane_id() < kCluster) {
      const uint32_t warp = Shape::first();
      Shape::post(&shared.part_top[turn][warp], top, exchange.box(), lane_id());
      Shape::post(&shared.part_sum[turn][warp], sum, exchange.box(), lane_id());
    }
    exchange.receive(12 * kStep);
    total = 0;
    for (int w = lane_id(); w < kStep; w += 32) {
      top = max_of(top, shared.part_top[turn][w]);
      total += shared.part_sum[turn][w];
    }
    top = ptx::warp_max_u32(top);
    total = ptx::warp_sum_u64(total);
    valid = top <= kInfKey && Domain::valid(value_of(top));
    if (turn == 1 || !valid) break;
    ref = Domain::ref(value_of(top));
    if (ref.exponent == 0) break;
    sum = 0;
    visit([&](float x) { sum += Domain::mass(x, ref); });
  }

  const uint64_t target = args.has_top_p() ? args.target<Domain>(total, ref) : ~uint64_t(0);
  uint32_t threshold = valid ? key_of(-FI_INF) : 0xffffffffu;  // nothing is kept of an invalid row
  Threshold known = {false, 0, 0, 0};
  constexpr uint64_t kOne = uint64_t(1) << kMassBits;
  if (valid && target <= total && ref.exponent == 0 && total < 2 * kOne && total >= uint64_t(double(kLeastTotal) * double(kOne))) {
    __syncthreads();  // bins are complete
    const uint32_t from = first_bin(int(top & 0x7fffffffu)), to = first_bin(__float_as_int(least_first));
    const uint2 bins = find_bins(shared, exchange, from, to - from + 1, target, vocab);
    const uint32_t last = from + bins.x;
    known.low = last < kFirstBins - 1 ? uint32_t(kFirstTop) - ((last + 1) << kFirstShift) + 1 : 0;
    known.low = max_of(known.low, __float_as_uint(least_first)) | 0x80000000u;
    known.high = uint32_t(kFirstTop - ((from + bins.y) << kFirstShift)) | 0x80000000u;
    known = compare_range<Shape, Domain>(shared, ref, known.low, known.high, target, visit);
  }
  if (known.found) {
    threshold = known.low;
    total = known.total;
  } else if (valid && target <= total) {
    uint32_t lowest = key_of(0.f) + 1;
    // All tokens lighter than (total - target) / vocab together cannot fill the gap, so they are all rejected.
    const float light = __ull2float_rz(total - target) * (0.999f / float(vocab));
    if (light > 1.f) lowest = max_of(lowest, min_of(key_of(Domain::value_below(light, ref)), top));
    // The first round is rough: masses of 31 bits, so that additions are single instructions. The next ones are exact, and
    // have what lies above their range in bin 0; if the rough round was wrong, they start again with the whole range.
    const int down = max_of(33 - __clzll(total), 0);
    const float rough_unit = ref.second * __int_as_float((127 - down) << 23);
    bool rough = known.high == 0;
    uint32_t low = rough ? lowest : known.low, high = rough ? top : min_of(known.high, top);
    // What is known to be above needs not be added up again.
    const float ceiling = rough ? FI_INF : value_of(high);
    const uint64_t base = known.total;
#pragma unroll 1
    for (;;) {
      const int bits = low < high ? 32 - __clz(high - low) : 0, most = rough ? kBinBits : kBinBits - 1;
      const int shift = bits > most ? bits - most : 0;
      const uint32_t count = ((high - low) >> shift) + (rough ? 1 : 2), share = ceil_div(count, uint32_t(kCluster));
      for (int i = threadIdx.x; i < 2 * kBins; i += kThreads) shared.bins[i] = 0;
      __syncthreads();  // bins are clear
      // Bins count down from the largest key. A run of equal bins is added at once: ties would queue up at one bin.
      const float bound = value_of(low);            // positive: so are all that reach it, and their bits are keys
      const int top_bits = int(high & 0x7fffffffu);
      uint32_t latest = 0;
      if (rough) {
        uint32_t run = 0;
        visit([&](float x) {
          if (x < bound) return;
          const uint32_t bin = uint32_t(top_bits - __float_as_int(x)) >> shift;
          if (bin != latest) {
            if (run) atomicAdd(&shared.bins[latest], run);
            latest = bin;
            run = 0;
          }
          run += uint32_t(int(x * ref.first * rough_unit));
        });
        if (run) atomicAdd(&shared.bins[latest], run);
      } else {
        uint64_t run = 0;
        visit([&](float x) {
          if (x < bound || x > ceiling) return;
          const int below = top_bits - __float_as_int(x);
          const uint32_t bin = below < 0 ? 0 : 1 + (uint32_t(below) >> shift);
          if (bin != latest) {
            if (run) add_weight(shared.bins, latest, run);
            latest = bin;
            run = 0;
          }
          run += Domain::mass(x, ref);
        });
        if (run) add_weight(shared.bins, latest, run);
      }
      __syncthreads();  // bins are complete
      for (uint32_t i = threadIdx.x; i < share * kCluster; i += kThreads) {
        const uint64_t weight = i < count ? uint64_t(shared.bins[kBins + i]) << 32 | shared.bins[i] : 0;
        Shape::add(&shared.own[i % share], weight, exchange.box(), i / share);
      }
      exchange.receive(8 * share * kCluster);
      uint64_t own[kOwn], mine = 0, of_share;
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        const uint32_t bin = threadIdx.x * kOwn + i;
        own[i] = bin < share ? shared.own[bin] : 0;
        if (bin < share) shared.own[bin] = 0;
        mine += own[i];
      }
      uint64_t before = block_scan<kThreads>(mine, shared.warp_sum, of_share) - mine, all = 0;
      if (threadIdx.x < kCluster) Shape::post(&shared.share_sum[Shape::rank()], of_share, exchange.box(), threadIdx.x);
      exchange.receive(8 * kCluster);
#pragma unroll
      for (uint32_t r = 0; r < kCluster; ++r) {
        const uint64_t other = shared.share_sum[r];
        before += r < Shape::rank() ? other : 0;
        all += other;
      }
      before += base;
      all += base;
      const uint64_t goal = rough ? max_of<uint64_t>(target >> down, 1) : target;
      uint32_t found = 0;
      if (goal <= all) {
#pragma unroll
        for (int i = 0; i < kOwn; ++i) {
          if (before < goal && goal <= before + own[i]) {  // one bin of one thread
            const uint32_t bin = Shape::rank() * share + threadIdx.x * kOwn + i;
#pragma unroll 1
            for (uint32_t r = 0; r < kCluster; ++r) {
              Shape::post(&shared.found[0], uint64_t(bin), exchange.box(), r);
              Shape::post(&shared.found[1], before + own[i], exchange.box(), r);
            }
          }
          before += own[i];
        }
        exchange.receive(16);
        found = uint32_t(shared.found[0]);
      }
      if (rough && goal <= all) {  // the bin and its neighbours
        const uint32_t from = max_of(found, 1u) - 1, to = found + 2;
        low = high - low >> shift < to ? low : high - (to << shift) + 1;
        high -= from << shift;
      } else if (!rough && goal <= all && found > 0) {
        total = shared.found[1];
        high -= (found - 1) << shift;
        low = max_of(low, high - min_of(high, (1u << shift) - 1));
        if (shift <= kExactBits<T>) break;
      } else {  // the whole range: a range that was not narrowed holds the threshold
        low = lowest;
        high = top;
      }
      rough = false;
    }
    threshold = low;
  }

  const float least = value_of(threshold);  // NaN for an invalid row: nothing reaches it
  const Quotient quotient(valid ? Domain::probability(total, ref) : 1.f);
  T* const output = static_cast<T*>(params.output) + row_number * vocab;
  const bool vectors = (params.flags & kAlignedOutput) != 0;
  auto write = [&](uint32_t at, const Block& block) {
    float y[kPer];
    block.to_floats(y);
#pragma unroll
    for (int j = 0; j < kPer; ++j) y[j] = y[j] >= least ? quotient(y[j]) : 0.f;
    const auto kept = Block::from_floats(y);
    if (vectors && at + kPer <= vocab) {
      kept.store_streaming(output + at);  // the L2 holds rows that are read
    } else {
      kept.store_part(output, at, vocab, false);
    }
  };
#pragma unroll 1
  for (int s = last; s >= first; s -= kStep) {
    if (s != last) {
      if constexpr (Config::kHold) held.get(s, v);
      else row.load(s, 0, Row::kAll, v);
    }
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) write(s * kSegment + b * Row::kBlock + lane_id() * kPer, v[b]);
  }
}

}  // namespace fi
