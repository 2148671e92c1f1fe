// A row shared out to the CTAs of a cluster, and what is kept of it in shared memory: of every segment the largest key
// and the mass, of every block the largest key, so that later passes read only the blocks that can matter. Segments are
// the fixed unit of every reduction. The cluster's first CTA is sent the results, and decides.
#pragma once
#include "ptx/mailbox.cuh"
#include "ptx/redux.cuh"
#include "sampling/rows.cuh"

namespace fi::sampling {

constexpr int kBins = 2048, kBinBits = 11;  // of the histograms in select.cuh
constexpr uint32_t kPairs = 256;  // so many candidates at most are compared with each other (candidates.cuh)

// An element that may be kept, with its mass or what else it is compared by.
struct alignas(16) Candidate {
  uint32_t key, index;
  uint64_t load;
};

// How a row is shared out: segment s belongs to CTA s % kCluster, and there to warp s / kCluster % kWarps.
template <int kThreads_, int kCluster_>
struct Shape {
  static constexpr int kThreads = kThreads_, kCluster = kCluster_, kWarps = kThreads / 32;
  static constexpr uint32_t kStep = kCluster * kWarps;

  FI_DEVICE static uint32_t rank() { return kCluster == 1 ? 0 : ptx::cluster_rank(); }
  FI_DEVICE static uint32_t first() { return rank() + kCluster * warp_id(); }
  FI_DEVICE static uint32_t row() { return blockIdx.x / kCluster; }
  // "This CTA has started, and its mailboxes are open": they may be posted to when the others have waited.
  FI_DEVICE static void start() {
    if constexpr (kCluster == 1) {
      __syncthreads();
    } else {
      ptx::cluster_arrive_relaxed();
    }
  }
  // Store `value` where CTA `rank` has `at`, which counts it in its mailbox `box`.
  template <typename V>
  FI_DEVICE static void post(V* at, V value, uint64_t* box, uint32_t rank) {
    if constexpr (kCluster > 1) {
      ptx::post(at, value, box, rank);
    } else {
      *at = value;
    }
  }
  // The same, added to what is there.
  template <typename V>
  FI_DEVICE static void add(V* at, V value, uint64_t* box, uint32_t rank) {
    if constexpr (kCluster > 1) {
      ptx::post_add(at, value, box, rank);
    } else {
      *at += value;
    }
  }
  // Every thread waits for this CTA's mail of a phase, `bytes` in all. No barrier among the threads, except of one CTA.
  FI_DEVICE static void receive(uint64_t* box, uint32_t phase, uint32_t bytes) {
    if constexpr (kCluster > 1) {
      if (threadIdx.x == 0) ptx::mailbox_expect(box, bytes);
      ptx::mailbox_wait(box, phase & 1);
    } else {
      __syncthreads();
    }
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

// Per-row results in shared memory. Blocks: 8 of 128 elements a segment for fp32, 4 of 256 for 16-bit types. kTops: with
// the blocks' largest keys; kList: with room to search for thresholds, and for that many elements that may be kept
// ("candidates").
template <int kSegments_, bool kTops, int kList_>
struct RowShared {
  static constexpr int kSegments = kSegments_, kList = kList_;
  static constexpr bool kSelects = kList > 0;
  uint64_t sum[kSegments];   // mass of each segment
  uint64_t warp_sum[32];
  uint64_t found[kSelects ? 16 : 1];  // candidates of each CTA
  uint64_t above;
  uint64_t random;
  uint64_t told;    // two words from the first CTA
  uint64_t box[3];  // mailboxes: of what all CTAs send, of what the first one sends, and of candidates
  alignas(16) uint32_t bins[kSelects ? 2 * kBins : 4];  // two halves of 64-bit weights; also other short-lived arrays
  alignas(16) uint32_t top[kSegments];  // largest key of each segment
  alignas(16) uint32_t block_top[kTops ? kSegments * 8 : 4];  // and of each block
  alignas(16) uint32_t key[kSelects ? kList : 4];
  uint32_t index[kSelects ? kList : 4];
  uint32_t count, bin, threshold, token, bound, inside;

  // Candidates (key and, in the upper half, index) lie where the list will be, if it has to be made: for each CTA of the
  // cluster, so many.
  static constexpr uint32_t room(uint32_t cluster) { return kList / cluster < kPairs ? kList / cluster : kPairs; }
  FI_DEVICE uint64_t* candidates() { return reinterpret_cast<uint64_t*>(key); }
};

// Before the cluster's start.
template <class Shape, class Shared>
FI_DEVICE void set_counters(Shared& shared) {
  if (threadIdx.x == 0) {
    ptx::mailbox_open(&shared.box[0]);
    ptx::mailbox_open(&shared.box[1]);
    if constexpr (Shared::kSelects) {
      ptx::mailbox_open(&shared.box[2], Shape::kStep);
#pragma unroll
      for (int r = 0; r < Shape::kCluster; ++r) shared.found[r] = 0;
    }
    shared.count = shared.inside = 0;
    shared.bound = 0xffffffffu;
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
};
struct NotHeld {
  static constexpr bool kKeeps = false;
  template <class Values>
  FI_DEVICE void put(uint32_t, const Values&) const {}
};
// Rows of which few elements will be kept: while the row is read, the output is filled with what stands for a rejected
// one, and every CTA keeps its blocks' largest keys, to find the others again.
template <typename T>
struct Filled {
  using Row = PlainRow<T>;
  static constexpr bool kKeeps = true;
  T* output;           // the row; null: nothing is filled
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
};

// The segment's largest key, NaN's if one is there. kBlockKeys: and in lane i those of the blocks from
// i % (kBlocks / 4) * 4 on, four of them.
template <bool kBlockKeys, class Row>
FI_DEVICE uint32_t segment_top(const typename Row::Block (&v)[Row::kBlocks], uint4& keys) {
  uint32_t top = 0, quad[4] = {0, 0, 0, 0};
#pragma unroll
  for (int b = 0; b < Row::kBlocks; ++b) {
    float x[Row::kPer];
    v[b].to_floats(x);
    float largest = ptx::max_nan(x[0], x[1]);
#pragma unroll
    for (int j = 2; j < Row::kPer; ++j) largest = ptx::max_nan(largest, x[j]);
    uint32_t key = key_of(largest);
    if constexpr (kBlockKeys) {
      key = ptx::warp_max_u32(key);
      quad[b % 4] = lane_id() % (Row::kBlocks / 4) == b / 4 ? key : quad[b % 4];
    }
    top = max_of(top, key);
  }
  keys = make_uint4(quad[0], quad[1], quad[2], quad[3]);
  return kBlockKeys ? top : ptx::warp_max_u32(top);
}

// What every CTA of the cluster is told while the row is read, and not the first one only.
enum class Tell : uint32_t { kNothing, kTops, kBlockTops };

// What `summarise` sends to a CTA, bytes.
template <bool kSendTops, class Row>
FI_DEVICE uint32_t summary_bytes(const Row& row, bool sums, Tell tell = Tell::kNothing, bool first = true) {
  if (!first) return row.segments() * 4 * (tell == Tell::kTops ? 1 : Row::kBlocks);
  return row.segments() * (4 + (sums ? 8 : 0) + (kSendTops ? 4 * Row::kBlocks : 0));
}

// The first pass: to the first CTA, every segment's largest key, its mass (if `sums`; relative to its own largest value or
// in the unit of 2^-43), and the blocks' largest keys (with kSendTops); to the others, what `tell` says (with kSendTops).
// With kKeepTops every CTA has its own segments' blocks' largest keys. No barrier inside.
template <class Domain, bool kSendTops, bool kKeepTops, class Shape, class Row, class Shared, class Held>
FI_DEVICE void summarise(const Row& row, Shared& shared, bool sums, Started<Shape>& started, const Held& held,
                         Tell tell = Tell::kNothing) {
  constexpr bool kOne = Shape::kCluster == 1, kBlockKeys = kSendTops || kKeepTops;
  const uint32_t segments = row.segments();
#pragma unroll 1
  for (uint32_t s = Shape::first(); s < segments; s += Shape::kStep) {
    typename Row::Block v[Row::kBlocks];
    row.load(s, 0, Row::kAll, v);
    started.wait();
    held.put(s, v);
    uint4 keys;
    const uint32_t top = segment_top<kBlockKeys, Row>(v, keys);
    if constexpr (kBlockKeys) {
      constexpr int kQuads = Row::kBlocks / 4;
      uint4* const place = reinterpret_cast<uint4*>(shared.block_top + s * Row::kBlocks) + lane_id() % kQuads;
      // A CTA that is told all blocks' keys is told its own, too.
      const bool told = kSendTops && !kOne && (Shape::rank() == 0 || tell == Tell::kBlockTops);
      if ((kKeepTops || kOne) && !told && lane_id() < kQuads) *place = keys;
      if constexpr (kSendTops && !kOne) {
        const int to = lane_id() / kQuads;
        if (to < (tell == Tell::kBlockTops ? Shape::kCluster : 1)) Shape::post(place, keys, &shared.box[0], to);
        if (tell == Tell::kTops && 0 < lane_id() && lane_id() < Shape::kCluster)
          Shape::post(&shared.top[s], top, &shared.box[0], lane_id());
      }
    }
    uint64_t sum = 0;
    if (sums) {
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
      Shape::post(&shared.top[s], top, &shared.box[0], 0);
      if (sums) Shape::post(&shared.sum[s], sum, &shared.box[0], 0);
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
