// Tiles of 2-byte elements in shared memory that ldmatrix reads without bank conflicts, and their cp.async loader.
#pragma once
#include "common/base.cuh"
#include "ptx/cp_async.cuh"

namespace fi {

// Rows of kDim elements, zero-padded to a multiple of 16 and cut into 16-byte chunks. Where a row is a multiple of 128
// bytes, chunk c of row r lies at c ^ (r & 7); otherwise an odd number of chunks a row spreads 8 rows over all banks.
template <int kDim>
struct TileLayout {
  static constexpr int kChunks = round_up(kDim, 16) / 8;
  static constexpr bool kSwizzle = kChunks % 8 == 0;
  static constexpr int kRowBytes = (kSwizzle ? kChunks : (kChunks | 1)) * 16;

  FI_DEVICE static uint32_t offset(int row, int chunk) {
    return row * kRowBytes + (kSwizzle ? (chunk ^ (row & 7)) : chunk) * 16;
  }
  // From the address of chunk 0 or 1 of a row to that of `chunk` (even) or chunk + 1: the XOR only touches bits 5 and 6.
  FI_DEVICE static uint32_t advance(uint32_t address, int chunk) {
    return kSwizzle ? (address ^ ((chunk & 6) * 16)) + (chunk & ~7) * 16 : address + chunk * 16;
  }
};

// threadIdx.x, read anew: a kernel whose accumulators fill the register file must not keep what it can compute again.
FI_DEVICE int thread_again() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// Copy kRows rows asynchronously; locate(row, valid) returns the row's first element, and rows that are not valid, like
// the padding behind kDim, are filled with zeros and not read.
template <int kDim, int kRows, int kThreads, class Locate>
FI_DEVICE void load_tile(uint8_t* smem, const Locate& locate) {
  using Layout = TileLayout<kDim>;
  const uint32_t thread = thread_again();
  constexpr int kChunks = Layout::kChunks;
  auto copy = [&](int row, int chunk) {
    bool valid = true;
    const auto* p = locate(row, valid);
    if constexpr (kDim % 16 != 0) valid = valid && chunk * 8 < kDim;
    ptx::cp_async_16(smem + Layout::offset(row, chunk), p + chunk * 8, valid);
  };
  if constexpr (kThreads % kChunks == 0) {  // a thread keeps its chunk
    constexpr int kStep = kThreads / kChunks;
    const int row = thread / kChunks, chunk = thread % kChunks;
#pragma unroll
    for (int pass = 0; pass < ceil_div(kRows, kStep); ++pass)
      if (kRows % kStep == 0 || row + pass * kStep < kRows) copy(row + pass * kStep, chunk);
  } else {
#pragma unroll 4
    for (int i = thread; i < kRows * kChunks; i += kThreads) copy(i / kChunks, i % kChunks);
  }
}

// Copy kRows rows that lie `stride` elements apart; rows from `there` on are filled with zeros and not read. Whole tiles
// take no predicates, and where the threads divide a row evenly one address serves all passes.
template <int kDim, int kRows, int kThreads, typename T>
FI_DEVICE void load_rows(uint8_t* smem, const T* first, int64_t stride, int there) {
  using Layout = TileLayout<kDim>;
  constexpr int kChunks = Layout::kChunks, kStep = kThreads % kChunks == 0 ? kThreads / kChunks : 1;
  if constexpr (kThreads % kChunks == 0 && kDim % 16 == 0 && kRows % kStep == 0 && (!Layout::kSwizzle || kStep % 8 == 0)) {
    if (there >= kRows) {
      const uint32_t thread = thread_again();
      const int row = thread / kChunks, chunk = thread % kChunks;
      const T* p = first + row * stride + chunk * 8;
      uint8_t* to = smem + Layout::offset(row, chunk);
#pragma unroll
      for (int pass = 0; pass < kRows / kStep; ++pass) {
        ptx::cp_async_16(to + pass * (kStep * Layout::kRowBytes), p);
        p += kStep * stride;
      }
      return;
    }
  }
  load_tile<kDim, kRows, kThreads>(smem, [&](int row, bool& valid) {
    valid = row < there;
    return first + row * stride;
  });
}

}  // namespace fi
