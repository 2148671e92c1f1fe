// Bit packing: eight elements (true where not 0) a byte, whole array or segment by segment.
// packbits: a thread packs units of 16 elements into two bytes, kUnroll units kThreads apart, all loaded before the
// first is packed; one CTA packs kThreads * kUnroll units; grid = units / (kThreads * kUnroll).
// segment_packbits: the same over the output's byte pairs; a CTA whose output lies in one segment (the common case) looks
// that segment up once, others look it up byte by byte. Segments start at any element: a misaligned unit is read as an
// aligned window (whose last 16 bytes the next thread reads as well, from L1) and shifted.
// Shared memory: none. Bytes moved: the elements once, an eighth of a byte each out. Architecture: any.
#pragma once
#include "common/segments.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct PackbitsParams {
  const void* x;  // [n]
  uint8_t* y;     // [ceil(n / 8)], 2-byte aligned
  uint64_t n;
};

struct SegmentPackbitsParams {
  const void* x;           // [n]
  uint8_t* y;              // [bytes], 2-byte aligned
  const void* indptr;      // [segments + 1], elements
  const void* new_indptr;  // [segments + 1], bytes
  uint64_t n;
  uint64_t bytes;
  uint32_t segments;
};

template <int kItem>
struct ItemBits;
template <>
struct ItemBits<1> {
  using type = uint8_t;
};
template <>
struct ItemBits<2> {
  using type = uint16_t;
};
template <>
struct ItemBits<4> {
  using type = uint32_t;
};
template <>
struct ItemBits<8> {
  using type = uint64_t;
};

template <int kItem, bool kFloat, bool kBig>
struct Packer {
  using Item = typename ItemBits<kItem>::type;
  // What decides an element: -0.0 is false, so a float's sign does not count.
  static constexpr Item kBits = kFloat ? Item(Item(~Item(0)) >> 1) : Item(~Item(0));
  static constexpr int kWords = 4 * kItem;  // of 16 elements

  // 16 elements, or the aligned window of 16 bytes more in which they lie.
  struct Raw {
    uint32_t words[kWords + 4];

    template <int kParts>
    FI_DEVICE void load(const uint8_t* p) {
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const uint4 part = reinterpret_cast<const uint4*>(p)[i];
        words[4 * i] = part.x, words[4 * i + 1] = part.y, words[4 * i + 2] = part.z, words[4 * i + 3] = part.w;
      }
    }
    // Move the elements of a window, `misaligned` bytes in, to its start. The count is equal in all threads.
    FI_DEVICE void shift(uint32_t misaligned) {
      if (misaligned & 8) {
#pragma unroll
        for (int i = 0; i < kWords + 2; ++i) words[i] = words[i + 2];
      }
      if (misaligned & 4) {
#pragma unroll
        for (int i = 0; i < kWords + 1; ++i) words[i] = words[i + 1];
      }
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = __funnelshift_r(words[i], words[i + 1], (misaligned & 3) * 8);
    }
  };

  // Bit that element i (0..15) has in a pair of bytes.
  FI_DEVICE static int place(int i) { return kBig ? (i & 8) | (7 - (i & 7)) : i; }

  // Two bytes of output: the low one holds elements 0..7.
  FI_DEVICE static uint32_t pack(const Raw& raw) {
    uint32_t out = 0;
    if constexpr (kItem == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t ones = __vsetne4(raw.words[i] & (uint32_t(kBits) * 0x01010101u), 0);  // a 1 in each true byte
        // The product moves byte j's bit to bit 28 + j (little) or 31 - j (big); no two terms meet, so nothing carries.
        const uint32_t nibble = (ones * (kBig ? 0x80402010u : 0x10204080u)) >> 28;
        out |= nibble << (kBig ? (i ^ 1) * 4 : i * 4);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        bool set;
        if constexpr (kItem == 2) set = ((raw.words[i / 2] >> (16 * (i & 1))) & uint32_t(kBits)) != 0;
        if constexpr (kItem == 4) set = (raw.words[i] & uint32_t(kBits)) != 0;
        if constexpr (kItem == 8) set = (raw.words[2 * i] | (raw.words[2 * i + 1] & uint32_t(kBits >> 32))) != 0;
        out |= uint32_t(set) << place(i);
      }
    }
    return out;
  }

  // The same of the first `count` <= 16 elements at p, read one by one; the others are false.
  FI_DEVICE static uint32_t pack_some(const uint8_t* p, int count) {
    uint32_t out = 0;
    for (int i = 0; i < count; ++i) out |= uint32_t((reinterpret_cast<const Item*>(p)[i] & kBits) != 0) << place(i);
    return out;
  }
};

// A thread's kUnroll units of 16 elements, kThreads units apart, of the elements up to `stop` of the array x of n: the
// first starts at element `first` and goes to the byte pair at `out`.
template <class Config>
FI_DEVICE void pack_units(const uint8_t* x, uint64_t n, uint64_t first, uint64_t stop, uint8_t* out) {
  using P = Packer<Config::kItem, Config::kFloat, Config::kBig>;
  constexpr int kItem = Config::kItem, kThreads = Config::kThreads, kUnroll = Config::kUnroll;
  const uint32_t misaligned = uint32_t(reinterpret_cast<uint64_t>(x + first * kItem) & 15);  // of every unit
  auto start = [&](int i) { return first + uint64_t(i) * (16 * kThreads); };
  // A window must not leave the array; the units at its ends are read element by element.
  auto inside = [&](uint64_t at) {
    return misaligned == 0 || (at * kItem >= misaligned && at * kItem - misaligned + 16 * (kItem + 1) <= n * kItem);
  };
  typename P::Raw raw[kUnroll];
  if (misaligned == 0) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (start(i) + 16 <= stop) raw[i].template load<kItem>(x + start(i) * kItem);
  } else {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i)
      if (start(i) + 16 <= stop && inside(start(i)))
        raw[i].template load<kItem + 1>(x + start(i) * kItem - misaligned);
  }
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    const uint64_t at = start(i);
    uint8_t* pair = out + i * (2 * kThreads);
    if (at + 16 <= stop) {
      uint32_t bits;
      if (inside(at)) {
        if (misaligned) raw[i].shift(misaligned);
        bits = P::pack(raw[i]);
      } else {
        bits = P::pack_some(x + at * kItem, 16);
      }
      *reinterpret_cast<uint16_t*>(pair) = uint16_t(bits);
    } else if (at < stop) {
      const int count = int(stop - at);
      const uint32_t bits = P::pack_some(x + at * kItem, count);
      pair[0] = uint8_t(bits);
      if (count > 8) pair[1] = uint8_t(bits >> 8);
    }
  }
}

// Config: kItem (bytes an element), kFloat, kBig (bit order), kThreads, kUnroll
template <class Config>
FI_DEVICE void packbits(const PackbitsParams& params) {
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const uint64_t unit = uint64_t(blockIdx.x) * (Config::kThreads * Config::kUnroll) + threadIdx.x;
  pack_units<Config>(static_cast<const uint8_t*>(params.x), params.n, unit * 16, params.n, params.y + unit * 2);
}

// Config: as packbits, and I (int32_t or int64_t)
template <class Config>
FI_DEVICE void segment_packbits(const SegmentPackbitsParams& params) {
  using P = Packer<Config::kItem, Config::kFloat, Config::kBig>;
  using I = typename Config::I;
  constexpr int kItem = Config::kItem, kThreads = Config::kThreads, kUnroll = Config::kUnroll;

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const uint8_t* x = static_cast<const uint8_t*>(params.x);
  const I* indptr = static_cast<const I*>(params.indptr);
  const I* new_indptr = static_cast<const I*>(params.new_indptr);
  const int segments = int(params.segments);
  const uint64_t cta_first = uint64_t(blockIdx.x) * (2 * kThreads * kUnroll);  // bytes
  const uint64_t cta_last = min_of<uint64_t>(cta_first + 2 * kThreads * kUnroll, params.bytes) - 1;
  const int segment = warp_find_segment(new_indptr, segments, int64_t(cta_first));

  if (uint64_t(new_indptr[segment + 1]) > cta_last) {  // one segment: every byte pair but its last has 16 elements
    const uint64_t byte = cta_first + 2 * threadIdx.x;
    const uint64_t element = uint64_t(indptr[segment]) + (byte - uint64_t(new_indptr[segment])) * 8;
    pack_units<Config>(x, params.n, element, uint64_t(indptr[segment + 1]), params.y + byte);
    return;
  }
  for (uint64_t byte = cta_first + threadIdx.x; byte <= cta_last; byte += kThreads) {
    const int s = find_segment(new_indptr, segments, int64_t(byte));
    const uint64_t at = uint64_t(indptr[s]) + (byte - uint64_t(new_indptr[s])) * 8;
    const int count = int(min_of<uint64_t>(uint64_t(indptr[s + 1]) - at, 8));
    params.y[byte] = uint8_t(P::pack_some(x + at * kItem, count));
  }
}

}  // namespace fi
