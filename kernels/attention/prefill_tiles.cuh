// Tiles that do not lie in global memory as the matrix unit reads them. fp8 keys and values land as bytes in a stage of
// their own (cp.async cannot convert) and are widened once a tile by the whole CTA, so that the fragments of every warp
// come from an ordinary 16-bit tile; ROPE_LLAMA rotates the 16-bit tile in place.
#pragma once
#include "attention/expand.cuh"
#include "attention/smem_tile.cuh"

namespace fi {

// Copy kRows rows of kDim bytes, densely packed, asynchronously; rows that are not valid become zeros and are not read.
template <int kDim, int kRows, int kThreads, class Locate>
FI_DEVICE void load_bytes(uint8_t* smem, const Locate& locate) {
  constexpr int kPiece = kDim % 16 == 0 ? 16 : 8, kPieces = kDim / kPiece;
#pragma unroll 4
  for (int i = thread_again(); i < kRows * kPieces; i += kThreads) {
    bool valid = true;
    const auto* p = locate(i / kPieces, valid);
    ptx::cp_async<kPiece>(smem + i * kPiece, p + i % kPieces * kPiece, valid);
  }
}

// Copy a tile as it will be read: as bytes that are widened later, or in its final form.
template <bool kBytes, int kDim, int kRows, int kThreads, class Locate>
FI_DEVICE void load_stage(uint8_t* smem, const Locate& locate) {
  if constexpr (kBytes)
    load_bytes<kDim, kRows, kThreads>(smem, locate);
  else
    load_tile<kDim, kRows, kThreads>(smem, locate);
}

template <typename T, typename KV>
FI_DEVICE uint4 widen(uint2 bytes) {
  return make_uint4(widen_pair<T, KV>(bytes.x & 0xffffu), widen_pair<T, KV>(bytes.x >> 16),
                    widen_pair<T, KV>(bytes.y & 0xffffu), widen_pair<T, KV>(bytes.y >> 16));
}

// Bytes as `load_bytes` left them to a 16-bit tile; the padding of a row becomes zeros.
template <typename T, typename KV, int kDim, int kRows, int kThreads>
FI_DEVICE void widen_tile(uint8_t* smem, const uint8_t* bytes) {
  using Layout = TileLayout<kDim>;
#pragma unroll 2
  for (int i = thread_again(); i < kRows * Layout::kChunks; i += kThreads) {
    const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
    uint2 in = make_uint2(0, 0);
    if (kDim % 16 == 0 || chunk * 8 < kDim) in = *reinterpret_cast<const uint2*>(bytes + row * kDim + chunk * 8);
    *reinterpret_cast<uint4*>(smem + Layout::offset(row, chunk)) = widen<T, KV>(in);
  }
}

// Load and widen in one: for queries, which are loaded once.
template <typename T, typename Q, int kDim, int kRows, int kThreads, class Locate>
FI_DEVICE void load_widened(uint8_t* smem, const Locate& locate) {
  using Layout = TileLayout<kDim>;
#pragma unroll 4
  for (int i = thread_again(); i < kRows * Layout::kChunks; i += kThreads) {
    const int row = i / Layout::kChunks, chunk = i % Layout::kChunks;
    bool valid = true;
    const auto* p = locate(row, valid);
    if constexpr (kDim % 16 != 0) valid = valid && chunk * 8 < kDim;
    const uint2 in = valid ? *reinterpret_cast<const uint2*>(p + chunk * 8) : make_uint2(0, 0);
    *reinterpret_cast<uint4*>(smem + Layout::offset(row, chunk)) = widen<T, Q>(in);
  }
}

// Rotate the rows of a 16-bit tile to position(row), halves against halves, by `kThreads` threads from `thread` on. A
// rotation by -p is the one by p with the halves exchanged.
template <typename T, int kDim, int kRows, int kThreads, class Position>
FI_DEVICE void rotate_tile(uint8_t* smem, const uint64_t* turns, int thread, const Position& position) {
  using Layout = TileLayout<kDim>;
  constexpr int kHalf = kDim / 16;  // chunks of half a row
#pragma unroll 1
  for (int i = thread; i < kRows * kHalf * 2; i += kThreads) {  // half a chunk at a time: the registers are full
    const int row = i / (kHalf * 2), unit = i % (kHalf * 2), chunk = unit >> 1, at = position(row);
    const int first = at < 0 ? chunk + kHalf : chunk, second = at < 0 ? chunk : chunk + kHalf;
    uint2* const lo = reinterpret_cast<uint2*>(smem + Layout::offset(row, first) + (unit & 1) * 8);
    uint2* const hi = reinterpret_cast<uint2*>(smem + Layout::offset(row, second) + (unit & 1) * 8);
    uint2 x = *lo, y = *hi;
    const uint32_t distance = at < 0 ? -at : at;
    rotate<T>(x.x, y.x, turns + unit * 4, distance);
    rotate<T>(x.y, y.y, turns + unit * 4 + 2, distance);
    *lo = x, *hi = y;
  }
}

}  // namespace fi
