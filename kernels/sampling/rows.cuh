// Rows of logits or probabilities as warps read them: plain, mapped, or as the difference of two. A row is divided into
// segments of 1024 elements that one warp holds in registers, and those into blocks of 512 bytes (32 lanes x 16 bytes).
#pragma once
#include "common/vec.cuh"
#include "sampling/mass.cuh"

namespace fi::sampling {

constexpr int kSegment = 1024;

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
  FI_DEVICE float at(uint32_t i) const { return value(raw(i)); }
  // In two steps: an element as it lies there, and its value.
  FI_DEVICE T raw(uint32_t i) const { return data[i]; }
  FI_DEVICE float value(T x) const { return to_float(x); }
  using Raw = Block;
  // The same for kPer elements from `first` on, a multiple of kPer; past the end stands anything.
  FI_DEVICE void raw_at(uint32_t first, Raw& v) const {
    if (aligned && first + kPer <= vocab) {
      v = Block::load(data + first);
    } else {
#pragma unroll
      for (int j = 0; j < kPer; ++j) v[j] = data[min_of(first + j, vocab - 1)];
    }
  }
  FI_DEVICE void values(const Raw& v, float (&x)[kPer]) const { v.to_floats(x); }
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

// A row whose elements are mapped as they are read. Map: float operator()(float) const
template <typename T, class Map>
struct MappedRow {
  using Plain = PlainRow<T>;
  static constexpr int kPer = Plain::kPer, kBlock = Plain::kBlock, kBlocks = Plain::kBlocks;
  static constexpr uint32_t kAll = Plain::kAll;
  struct Block {
    typename Plain::Block plain;
    Map map;
    FI_DEVICE void to_floats(float (&out)[kPer]) const {
      plain.to_floats(out);
#pragma unroll
      for (int j = 0; j < kPer; ++j) out[j] = map(out[j]);
    }
  };

  Plain plain;
  Map map;
  uint32_t vocab;

  FI_DEVICE MappedRow(const Plain& plain, Map map) : plain(plain), map(map), vocab(plain.vocab) {}
  FI_DEVICE uint32_t segments() const { return plain.segments(); }
  template <int kCount>
  FI_DEVICE void load(uint32_t segment, int block, uint32_t blocks, Block (&v)[kCount]) const {
    typename Plain::Block p[kCount];
    plain.load(segment, block, blocks, p);
#pragma unroll
    for (int b = 0; b < kCount; ++b) v[b] = {p[b], map};
  }
  FI_DEVICE float at(uint32_t i) const { return value(raw(i)); }
  FI_DEVICE T raw(uint32_t i) const { return plain.raw(i); }
  FI_DEVICE float value(T x) const { return map(to_float(x)); }
  using Raw = typename Plain::Block;
  FI_DEVICE void raw_at(uint32_t first, Raw& v) const { plain.raw_at(first, v); }
  FI_DEVICE void values(const Raw& v, float (&x)[kPer]) const {
    v.to_floats(x);
#pragma unroll
    for (int j = 0; j < kPer; ++j) x[j] = map(x[j]);
  }
  FI_DEVICE void load_at(uint32_t first, float (&v)[kPer]) const {
    plain.load_at(first, v);
#pragma unroll
    for (int j = 0; j < kPer; ++j) v[j] = map(v[j]);
  }
};

// Logits divided by a temperature: times its inverse, rounded to fp32. -inf stays -inf: an inverse of 0 is uniform over
// what is not masked.
struct Scale {
  float inverse;
  FI_DEVICE float operator()(float x) const { return x == -FI_INF ? -FI_INF : __fmul_rn(x, inverse); }
};

// The row that a draw reads.
template <typename T, bool kScaled>
struct SourceRow {
  using Row = PlainRow<T>;
  FI_DEVICE static Row make(const PlainRow<T>& plain, float) { return plain; }
};
template <typename T>
struct SourceRow<T, true> {
  using Row = MappedRow<T, Scale>;
  FI_DEVICE static Row make(const PlainRow<T>& plain, float inverse) { return Row(plain, Scale{inverse}); }
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

}  // namespace fi::sampling
