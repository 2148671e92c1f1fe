// One row of logits or probabilities, read in segments of 1024 elements that one warp holds in registers, and what is
// kept of them in shared memory. Segments are the fixed unit of every reduction; inside one, each 512 bytes form a block
// (32 lanes x 16 bytes) whose largest key is stored, so that later passes read only the blocks that can matter.
// A cluster of CTAs shares the row's segments in turn, and hands the results to its first CTA, which decides.
#pragma once
#include "common/vec.cuh"
#include "ptx/cluster.cuh"
#include "ptx/redux.cuh"
#include "sampling/mass.cuh"

namespace fi::sampling {

constexpr int kSegment = 1024;
constexpr int kBins = 2048, kBinBits = 11;  // of the histograms in select.cuh

// How a row is shared out: segment s belongs to CTA s % kCluster, and there to warp s / kCluster % kWarps.
template <int kThreads_, int kCluster_>
struct Shape {
  static constexpr int kThreads = kThreads_, kCluster = kCluster_, kWarps = kThreads / 32;
  static constexpr uint32_t kStep = kCluster * kWarps;
  static_assert(kStep <= 256, "RowShared has room for so many warps");

  FI_DEVICE static uint32_t rank() { return kCluster == 1 ? 0 : ptx::cluster_rank(); }
  FI_DEVICE static uint32_t first() { return rank() + kCluster * warp_id(); }
  FI_DEVICE static uint32_t row() { return blockIdx.x / kCluster; }
  // "This CTA has started, and its counters are set": its shared memory may be written when the others have waited.
  FI_DEVICE static void start() {
    if constexpr (kCluster > 1) {
      ptx::cluster_arrive();
    } else {
      __syncthreads();
    }
  }
  FI_DEVICE static void arrive() {
    if constexpr (kCluster > 1) ptx::cluster_arrive();
  }
  FI_DEVICE static void wait() {
    if constexpr (kCluster > 1) {
      ptx::cluster_wait();
    } else {
      __syncthreads();
    }
  }
  template <typename U>
  FI_DEVICE static U& at(U& here, uint32_t rank) {
    if constexpr (kCluster > 1) return *ptx::cluster_map(&here, rank);
    return here;
  }
};

// Waits once, as late as possible, for the other CTAs of the cluster to have started.
template <class Shape>
struct Started {
  bool done = Shape::kCluster == 1;
  FI_DEVICE void wait() {
    if (!done) ptx::cluster_wait();
    done = true;
  }
};

// Per-row results in shared memory. Blocks: 8 of 128 elements a segment for fp32, 4 of 256 for 16-bit types. kSelects:
// with room to search for thresholds; kList: for that many elements that may be kept ("candidates").
template <int kSegments_, bool kSelects, int kList_>
struct RowShared {
  static constexpr int kSegments = kSegments_, kList = kList_;
  uint64_t sum[kSegments];   // mass of each segment
  uint64_t warp_sum[32];
  // A warp of the cluster: mass of all it read, and of what lies in the band; the smallest and largest key there (band.cuh).
  uint64_t warp_total[kSelects ? 256 : 1], warp_inside[kSelects ? 256 : 1];
  uint2 warp_range[kSelects ? 256 : 1];
  uint64_t above, told_total;
  alignas(16) uint32_t bins[kSelects ? 2 * kBins : 4];  // two halves of 64-bit weights; also other short-lived arrays
  uint32_t top[kSegments];   // largest key of each segment
  uint32_t block_top[kSelects ? kSegments * 8 : 1];  // and of each block
  uint32_t key[kSelects ? kList : 1], index[kSelects ? kList : 1];
  uint32_t count, blocks, bin, threshold, token, bound, inside, low[2], high[2], told_key, told_top;
  float told_sum;

  FI_DEVICE uint64_t* masses() { return reinterpret_cast<uint64_t*>(bins); }  // kBins of them
};

// Before the cluster's start.
template <class Shared>
FI_DEVICE void set_counters(Shared& shared) {
  if (threadIdx.x == 0) {
    shared.count = shared.inside = shared.low[0] = shared.low[1] = 0;
    shared.high[0] = shared.high[1] = shared.bound = shared.threshold = 0xffffffffu;
  }
}

// Elements of T in memory. Lane `l` of a warp holds, of block b of a segment, elements l * kPer ... l * kPer + kPer - 1:
// index order is (segment, block, lane, element). Places past the end hold -inf.
template <typename T>
struct PlainRow {
  static constexpr int kPer = 16 / sizeof(T);
  static constexpr int kBlock = 32 * kPer;
  static constexpr int kBlocks = kSegment / kBlock;
  static constexpr uint32_t kAll = (1u << kBlocks) - 1;
  using Block = Vec<T, kPer>;

  const T* data;
  uint32_t vocab;
  bool aligned;  // data is 16-byte aligned

  FI_DEVICE uint32_t segments() const { return ceil_div(vocab, uint32_t(kSegment)); }
  // Read kCount blocks from `block` on: those whose bit is set; the others become -inf.
  template <int kCount>
  FI_DEVICE void load(uint32_t segment, int block, uint32_t blocks, Block (&v)[kCount]) const {
    const uint32_t first = segment * kSegment + block * kBlock + lane_id() * kPer;
    const T none = from_float<T>(-FI_INF);
    if (aligned && (segment + 1) * kSegment <= vocab) {
#pragma unroll
      for (int b = 0; b < kCount; ++b) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) v[b][j] = none;
        if (blocks >> b & 1) v[b] = Block::load(data + first + b * kBlock);
      }
    } else {
#pragma unroll
      for (int b = 0; b < kCount; ++b) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          const uint32_t i = first + b * kBlock + j;
          v[b][j] = none;
          if ((blocks >> b & 1) && i < vocab) v[b][j] = data[i];
        }
      }
    }
  }
  FI_DEVICE float at(uint32_t i) const { return to_float(data[i]); }
  // kPer elements from `first` on, a multiple of kPer; places past the end become -inf.
  FI_DEVICE void load_at(uint32_t first, float (&v)[kPer]) const {
    if (aligned && first + kPer <= vocab) {
      Vec<T, kPer>::load(data + first).to_floats(v);
    } else {
#pragma unroll
      for (int j = 0; j < kPer; ++j) v[j] = first + j < vocab ? to_float(data[first + j]) : -FI_INF;
    }
  }
};

// Logits divided by a temperature: elements times its inverse, rounded to fp32. -inf stays -inf: an inverse of 0 is
// uniform over what is not masked.
template <typename T>
struct ScaledRow {
  using Plain = PlainRow<T>;
  static constexpr int kPer = Plain::kPer, kBlock = Plain::kBlock, kBlocks = Plain::kBlocks;
  static constexpr uint32_t kAll = Plain::kAll;
  struct Block {
    typename Plain::Block plain;
    float inverse;
    FI_DEVICE void to_floats(float (&out)[kPer]) const {
      plain.to_floats(out);
      scale(out, inverse);
    }
  };

  Plain plain;
  float inverse;
  uint32_t vocab;

  FI_DEVICE ScaledRow(const Plain& plain, float inverse) : plain(plain), inverse(inverse), vocab(plain.vocab) {}
  FI_DEVICE uint32_t segments() const { return plain.segments(); }
  template <int kCount>
  FI_DEVICE void load(uint32_t segment, int block, uint32_t blocks, Block (&v)[kCount]) const {
    typename Plain::Block p[kCount];
    plain.load(segment, block, blocks, p);
#pragma unroll
    for (int b = 0; b < kCount; ++b) v[b] = {p[b], inverse};
  }
  FI_DEVICE float at(uint32_t i) const { return scaled(plain.at(i), inverse); }
  FI_DEVICE void load_at(uint32_t first, float (&v)[kPer]) const {
    plain.load_at(first, v);
    scale(v, inverse);
  }

 private:
  FI_DEVICE static float scaled(float x, float inverse) { return x == -FI_INF ? -FI_INF : __fmul_rn(x, inverse); }
  FI_DEVICE static void scale(float (&v)[kPer], float inverse) {
#pragma unroll
    for (int j = 0; j < kPer; ++j) v[j] = scaled(v[j], inverse);
  }
};

// The row that a draw reads.
template <typename T, bool kScaled>
struct SourceRow {
  using Row = PlainRow<T>;
  FI_DEVICE static Row make(const PlainRow<T>& plain, float) { return plain; }
};
template <typename T>
struct SourceRow<T, true> {
  using Row = ScaledRow<T>;
  FI_DEVICE static Row make(const PlainRow<T>& plain, float inverse) { return Row(plain, inverse); }
};

// max(target - draft, 0): what a rejected draft token is replaced from. Without draft, the target alone.
template <typename T>
struct ResidualRow {
  using Plain = PlainRow<T>;
  static constexpr int kPer = Plain::kPer, kBlock = Plain::kBlock, kBlocks = Plain::kBlocks;
  static constexpr uint32_t kAll = Plain::kAll;
  struct Block {
    float data[kPer];
    FI_DEVICE void to_floats(float (&out)[kPer]) const {
#pragma unroll
      for (int j = 0; j < kPer; ++j) out[j] = data[j];
    }
  };

  Plain target, draft;  // draft.data may be null

  FI_DEVICE uint32_t segments() const { return target.segments(); }
  template <int kCount>
  FI_DEVICE void load(uint32_t segment, int block, uint32_t blocks, Block (&v)[kCount]) const {
    typename Plain::Block p[kCount], q[kCount];
    target.load(segment, block, blocks, p);
    if (draft.data != nullptr) draft.load(segment, block, blocks, q);
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
      p[b].to_floats(v[b].data);
      if (draft.data == nullptr) continue;
      float w[kPer];
      q[b].to_floats(w);
#pragma unroll
      for (int j = 0; j < kPer; ++j) v[b].data[j] = rest(v[b].data[j], w[j]);
    }
  }
  FI_DEVICE void load_at(uint32_t first, float (&v)[kPer]) const {
    target.load_at(first, v);
    if (draft.data == nullptr) return;
    float q[kPer];
    draft.load_at(first, q);
#pragma unroll
    for (int j = 0; j < kPer; ++j) v[j] = rest(v[j], q[j]);
  }

 private:
  // Places past the end are -inf - -inf = NaN: they stay -inf. A NaN of the input stays NaN.
  FI_DEVICE static float rest(float p, float q) {
    const float d = __fsub_rn(p, q);
    return p == -FI_INF ? -FI_INF : (d < 0.f ? 0.f : d);
  }
};

// Makes the compiler compute with the elements anew in every pass over a segment (convert 16-bit ones, for instance): it
// would keep what two passes have in common in registers, which are short.
template <typename T, int N>
FI_DEVICE void forget(Vec<T, N>& v) {
  uint4& word = *reinterpret_cast<uint4*>(&v);
  asm volatile("" : "+r"(word.x), "+r"(word.y), "+r"(word.z), "+r"(word.w));
}
template <class Block>
FI_DEVICE void forget(Block&) {}

// Calls f(value, block, element) for all of a segment's values.
template <class Row, class F>
FI_DEVICE void each_value(typename Row::Block (&v)[Row::kBlocks], F&& f) {
#pragma unroll
  for (int b = 0; b < Row::kBlocks; ++b) {
    float x[Row::kPer];
    forget(v[b]);
    v[b].to_floats(x);
#pragma unroll
    for (int j = 0; j < Row::kPer; ++j) f(x[j], b, j);
  }
}

// Rows of T that stay on chip between the passes: a CTA's segments one behind the other. With kHold false nothing does.
template <typename T, class Shape, bool kHold>
struct Held {
  using Row = PlainRow<T>;
  T* data;

  FI_DEVICE T* place(uint32_t segment, int block) const {
    return data + segment / Shape::kCluster * kSegment + block * Row::kBlock + lane_id() * Row::kPer;
  }
  FI_DEVICE void put(uint32_t segment, const typename Row::Block (&v)[Row::kBlocks]) const {
    if constexpr (kHold) {
#pragma unroll
      for (int b = 0; b < Row::kBlocks; ++b) v[b].store(place(segment, b));
    }
  }
  FI_DEVICE void get(uint32_t segment, typename Row::Block (&v)[Row::kBlocks]) const {
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) v[b] = Row::Block::load(place(segment, b));
  }
  FI_DEVICE uint32_t* tops(uint32_t) const { return nullptr; }
};
struct NotHeld {
  template <class Values>
  FI_DEVICE void put(uint32_t, const Values&) const {}
  FI_DEVICE uint32_t* tops(uint32_t) const { return nullptr; }
};
// Rows of which few elements will be kept: while the row is read, the output is filled with what stands for a rejected
// one, and this CTA keeps its blocks' largest keys, to find the others again.
template <typename T>
struct Filled {
  using Row = PlainRow<T>;
  T* output;           // the row; null: nothing is filled
  uint32_t* block_top;  // of this CTA
  T rejected;
  uint32_t vocab;
  bool aligned;        // output is

  FI_DEVICE void put(uint32_t segment, const typename Row::Block (&)[Row::kBlocks]) const {
    if (output == nullptr) return;
    typename Row::Block fill;
#pragma unroll
    for (int j = 0; j < Row::kPer; ++j) fill[j] = rejected;
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b)
      fill.store_part(output, segment * kSegment + b * Row::kBlock + lane_id() * Row::kPer, vocab, aligned);
  }
  FI_DEVICE uint32_t* tops(uint32_t segment) const { return block_top + segment * Row::kBlocks; }
};

// The largest keys of a segment's blocks, NaN's if one is there; the largest of the segment is returned. kStore: lane b
// writes block b's to `to`, and to `here` unless that is null.
template <bool kStore, class Row>
FI_DEVICE uint32_t block_tops(const typename Row::Block (&v)[Row::kBlocks], uint32_t* to, uint32_t* here = nullptr) {
  uint32_t top = 0, own = 0;
#pragma unroll
  for (int b = 0; b < Row::kBlocks; ++b) {
    float x[Row::kPer];
    v[b].to_floats(x);
    float largest = ptx::max_nan(x[0], x[1]);
#pragma unroll
    for (int j = 2; j < Row::kPer; ++j) largest = ptx::max_nan(largest, x[j]);
    uint32_t key = key_of(largest);
    if constexpr (kStore) {
      key = ptx::warp_max_u32(key);
      own = lane_id() == b ? key : own;
    }
    top = max_of(top, key);
  }
  if constexpr (kStore) {
    if (lane_id() < Row::kBlocks) {
      to[lane_id()] = own;
      if (here != nullptr) here[lane_id()] = own;
    }
    return top;
  } else {
    return ptx::warp_max_u32(top);
  }
}

// The first pass: every segment's largest key, its mass (if `want_sums`; relative to its own largest value or in the
// unit of 2^-43), and the blocks' largest keys (if kBlockTops), to the first CTA's `to`. No barrier inside.
template <class Domain, bool kBlockTops, class Shape, class Row, class Shared, class Held>
FI_DEVICE void summarise(const Row& row, Shared& to, bool want_sums, Started<Shape>& started, const Held& held) {
  const uint32_t segments = row.segments();
#pragma unroll 1
  for (uint32_t s = Shape::first(); s < segments; s += Shape::kStep) {
    typename Row::Block v[Row::kBlocks];
    row.load(s, 0, Row::kAll, v);
    started.wait();
    held.put(s, v);
    const uint32_t top = block_tops<kBlockTops, Row>(v, to.block_top + (kBlockTops ? s * Row::kBlocks : 0), held.tops(s));
    uint64_t sum = 0;
    if (want_sums) {
      const float largest = value_of(top);
      each_value<Row>(v, [&](float x, int, int) {
        if constexpr (Domain::kOwnRef) {
          sum += Domain::mass(x, Domain::ref(largest));
        } else {
          sum += Domain::mass(x);
        }
      });
      sum = ptx::warp_sum_u64(sum);
    }
    if (lane_id() == 0) {
      to.top[s] = top;
      to.sum[s] = sum;
    }
  }
  started.wait();
}

// The row's largest key, in every thread; NaN's if the row has NaN.
template <class Shared>
FI_DEVICE uint32_t row_top(const Shared& shared, uint32_t segments) {
  uint32_t key = 0;
  for (uint32_t s = lane_id(); s < segments; s += 32) key = max_of(key, shared.top[s]);
  return ptx::warp_max_u32(key);
}

// Call element(value, key) for every element with low <= key <= high, and end(segment) after each
// segment; a warp takes a segment. Only blocks whose largest key is at least `low` are read.
template <int kThreads, class Row, class Shared, class Element, class End>
FI_DEVICE void for_each(const Row& row, const Shared& shared, uint32_t low, uint32_t high, Element&& element,
                        End&& end) {
  constexpr int kPart = Row::kBlocks / 4;  // in parts: the body is long, and inlined once an element
  const uint32_t segments = row.segments();
#pragma unroll 1
  for (uint32_t s = warp_id(); s < segments; s += kThreads / 32) {
#pragma unroll 1
    for (int first = 0; first < Row::kBlocks; first += kPart) {
      uint32_t blocks = 0;
#pragma unroll
      for (int b = 0; b < kPart; ++b)
        blocks |= uint32_t(shared.block_top[s * Row::kBlocks + first + b] >= low) << b;
      if (!blocks) continue;
      typename Row::Block v[kPart];
      row.load(s, first, blocks, v);
#pragma unroll
      for (int b = 0; b < kPart; ++b) {
        if (!(blocks >> b & 1)) continue;
        float x[Row::kPer];
        v[b].to_floats(x);
#pragma unroll
        for (int j = 0; j < Row::kPer; ++j) {
          const uint32_t key = key_of(x[j]);
          if (low <= key && key <= high) element(x[j], key);
        }
      }
    }
    end(s);
  }
}

}  // namespace fi::sampling
