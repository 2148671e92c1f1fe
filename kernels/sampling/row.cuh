// One row of logits or probabilities, read in segments of 1024 elements that one warp holds in registers, and what is
// kept of them in shared memory. Segments are the fixed unit of every reduction; inside one, each 512 bytes form a block
// (32 lanes x 16 bytes) whose largest key is stored, so that later passes read only the blocks that can matter.
#pragma once
#include "common/vec.cuh"
#include "ptx/redux.cuh"
#include "sampling/mass.cuh"

namespace fi::sampling {

constexpr int kSegment = 1024;
constexpr int kMaxSegments = 512;  // vocabularies of up to 2^19

// Per-row results in shared memory. Blocks: 8 of 128 elements a segment for fp32, 4 of 256 for 16-bit types.
struct RowSummary {
  uint64_t sum[kMaxSegments];  // mass of each segment
  float top[kMaxSegments];     // its largest value
  uint32_t block_top[kMaxSegments * 8];  // largest key of each block
};

// Elements of T in memory. Lane `l` of a warp holds, of block b of a segment, elements l * kPer ... l * kPer + kPer - 1:
// index order is (segment, block, lane, element). Places past the end hold -inf.
template <typename T>
struct PlainRow {
  static constexpr int kPer = 16 / sizeof(T);
  static constexpr int kBlock = 32 * kPer;
  static constexpr int kBlocks = kSegment / kBlock;
  static constexpr uint32_t kAll = (1u << kBlocks) - 1;
  using Values = float[kBlocks][kPer];

  const T* data;
  uint32_t vocab;
  bool aligned;  // data is 16-byte aligned

  FI_DEVICE uint32_t segments() const { return ceil_div(vocab, uint32_t(kSegment)); }
  // Read kCount blocks from `block` on: those whose bit is set; the others become -inf.
  template <int kCount>
  FI_DEVICE void load(uint32_t segment, int block, uint32_t blocks, float (&v)[kCount][kPer]) const {
    const uint32_t first = segment * kSegment + block * kBlock + lane_id() * kPer;
    if (aligned && (segment + 1) * kSegment <= vocab) {
#pragma unroll
      for (int b = 0; b < kCount; ++b) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) v[b][j] = -FI_INF;
        if (blocks >> b & 1) Vec<T, kPer>::load(data + first + b * kBlock).to_floats(v[b]);
      }
    } else {
#pragma unroll
      for (int b = 0; b < kCount; ++b) {
#pragma unroll
        for (int j = 0; j < kPer; ++j) {
          const uint32_t i = first + b * kBlock + j;
          v[b][j] = -FI_INF;
          if ((blocks >> b & 1) && i < vocab) v[b][j] = to_float(data[i]);
        }
      }
    }
  }
};

// max(target - draft, 0): what a rejected draft token is replaced from. Without draft, the target alone.
template <typename T>
struct ResidualRow {
  using Plain = PlainRow<T>;
  static constexpr int kPer = Plain::kPer, kBlock = Plain::kBlock, kBlocks = Plain::kBlocks;
  static constexpr uint32_t kAll = Plain::kAll;
  using Values = typename Plain::Values;

  Plain target, draft;  // draft.data may be null

  FI_DEVICE uint32_t segments() const { return target.segments(); }
  template <int kCount>
  FI_DEVICE void load(uint32_t segment, int block, uint32_t blocks, float (&v)[kCount][kPer]) const {
    target.load(segment, block, blocks, v);
    if (draft.data == nullptr) return;
    float q[kCount][kPer];
    draft.load(segment, block, blocks, q);
#pragma unroll
    for (int b = 0; b < kCount; ++b) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const float rest = __fsub_rn(v[b][j], q[b][j]);
        // Places past the end are -inf - -inf = NaN: they stay -inf. A NaN of the input stays NaN.
        v[b][j] = v[b][j] == -FI_INF ? -FI_INF : (rest < 0.f ? 0.f : rest);
      }
    }
  }
};

// The first pass: every segment's largest value, its mass relative to that value (if `want_sums`), and the blocks' largest
// keys (if kBlockTops). Returns whether this thread saw NaN. No barrier inside.
template <class Domain, bool kBlockTops, int kThreads, class Row>
FI_DEVICE bool summarise(const Row& row, RowSummary& summary, bool want_sums) {
  bool nan = false;
  const uint32_t segments = row.segments();
#pragma unroll 1
  for (uint32_t s = warp_id(); s < segments; s += kThreads / 32) {
    typename Row::Values v;
    row.load(s, 0, Row::kAll, v);
    uint32_t top = 0;
#pragma unroll
    for (int b = 0; b < Row::kBlocks; ++b) {
      float largest = v[b][0];
#pragma unroll
      for (int j = 0; j < Row::kPer; ++j) {
        largest = fmaxf(largest, v[b][j]);
        nan |= v[b][j] != v[b][j];
      }
      uint32_t key = key_of(largest);
      if constexpr (kBlockTops) {
        key = ptx::warp_max_u32(key);
        if (lane_id() == 0) summary.block_top[s * Row::kBlocks + b] = key;
      }
      top = max_of(top, key);
    }
    if constexpr (!kBlockTops) top = ptx::warp_max_u32(top);
    const float largest = value_of(top);
    uint64_t sum = 0;
    if (want_sums) {
      const auto ref = Domain::ref(largest);
#pragma unroll
      for (int b = 0; b < Row::kBlocks; ++b) {
#pragma unroll
        for (int j = 0; j < Row::kPer; ++j) sum += Domain::mass(v[b][j], ref);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
    }
    if (lane_id() == 0) {
      summary.top[s] = largest;
      summary.sum[s] = sum;
    }
  }
  return nan;
}

// The row's largest value, in every thread; after a barrier that follows summarise.
FI_DEVICE float row_top(const RowSummary& summary, uint32_t segments) {
  uint32_t key = 0;
  for (uint32_t s = lane_id(); s < segments; s += 32) key = max_of(key, key_of(summary.top[s]));
  return value_of(ptx::warp_max_u32(key));
}

// Call element(value, key) for every element with low <= key <= high, and end(segment) after each
// segment; a warp takes a segment. Only blocks whose largest key is at least `low` are read.
template <int kThreads, class Row, class Element, class End>
FI_DEVICE void for_each(const Row& row, const RowSummary& summary, uint32_t low, uint32_t high, Element&& element,
                        End&& end) {
  constexpr int kPart = Row::kBlocks / 2;  // in two halves: the body is long, and inlined once an element
  const uint32_t segments = row.segments();
#pragma unroll 1
  for (uint32_t s = warp_id(); s < segments; s += kThreads / 32) {
#pragma unroll 1
    for (int first = 0; first < Row::kBlocks; first += kPart) {
      uint32_t blocks = 0;
#pragma unroll
      for (int b = 0; b < kPart; ++b)
        blocks |= uint32_t(summary.block_top[s * Row::kBlocks + first + b] >= low) << b;
      if (!blocks) continue;
      float v[kPart][Row::kPer];
      row.load(s, first, blocks, v);
#pragma unroll
      for (int b = 0; b < kPart; ++b) {
        if (!(blocks >> b & 1)) continue;
#pragma unroll
        for (int j = 0; j < Row::kPer; ++j) {
          const uint32_t key = key_of(v[b][j]);
          if (low <= key && key <= high) element(v[b][j], key);
        }
      }
    }
    end(s);
  }
}

}  // namespace fi::sampling
