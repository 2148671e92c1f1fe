// What the kernels that go through shared memory share: swizzled tiles, their copies, and the loop that multiplies them.
// A unit is 16 bits of an operand's row: one 16-bit element or two fp8. Tiles of kBlockK units are copied by cp.async in
// 16-byte chunks, read by ldmatrix and multiplied by mma.sync, which all see units only.
// kStages buffers go round: while one is multiplied the next kStages - 2 or more are in flight.
#pragma once
#include "gemm/gemm.cuh"
#include "ptx/cp_async.cuh"

namespace fi {

// Element offset of 16-byte chunk `chunk` of row `row` in a tile with kWidth elements a row. Eight rows at one chunk
// column, which is what ldmatrix reads, lie on different banks.
template <int kWidth>
FI_DEVICE int swizzled(int row, int chunk) {
  static_assert(kWidth == 32 || kWidth % 64 == 0, "a row is 64 bytes or a multiple of 128");
  return row * kWidth + (chunk ^ (kWidth == 32 ? (row >> 1) & 3 : row & 7)) * 8;
}

// Copies a tile of kRowsT x kWidth elements from a row-major matrix of `rows` x `columns`, zero outside it.
template <class T, int kRowsT, int kWidth, int kThreads>
struct TileLoader {
  static constexpr int kChunks = kWidth / 8, kRowStep = kThreads / kChunks, kCount = kRowsT / kRowStep;
  static_assert(kThreads % kChunks == 0 && kRowsT % kRowStep == 0 && kCount <= 32, "whole rows a pass");
  const T* source;   // this thread's chunk in its first row
  int64_t row_step;  // elements between this thread's rows
  uint32_t inside;   // bit i: this thread's row i exists; rows along k are tested at the copy instead
  int row, chunk;

  FI_DEVICE TileLoader(const T* matrix, int64_t stride, uint32_t first_row, uint32_t rows, uint32_t first_column) {
    row = threadIdx.x / kChunks;
    chunk = threadIdx.x % kChunks;
    source = matrix + int64_t(first_row + row) * stride + first_column + chunk * 8;
    row_step = kRowStep * stride;
    inside = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) inside |= uint32_t(first_row + row + i * kRowStep < rows) << i;
  }
  // Rows of two matrices in turn, eight of each: tile rows 16 p + j come from row first_row + 8 p + j of `matrix`, and rows
  // 16 p + 8 + j from the same row of `second`, so that a fragment pair holds one column of both products.
  FI_DEVICE TileLoader(const T* matrix, const T* second, int64_t stride, uint32_t first_row, uint32_t rows) {
    static_assert(kRowStep % 16 == 0, "a thread's rows all belong to one of the two");
    row = threadIdx.x / kChunks;
    chunk = threadIdx.x % kChunks;
    const uint32_t own = first_row + row / 16 * 8 + row % 8;
    source = (row & 8 ? second : matrix) + int64_t(own) * stride + chunk * 8;
    row_step = kRowStep / 2 * stride;
    inside = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) inside |= uint32_t(own + i * (kRowStep / 2) < rows) << i;
  }
  // Columns along k: `k` is the tile's first column.
  FI_DEVICE void copy_columns(T* tile, uint32_t k, uint32_t k_end) const {
    const bool column = k + chunk * 8 < k_end;
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      ptx::cp_async_16(tile + swizzled<kWidth>(row + i * kRowStep, chunk), source + k + i * row_step,
                       column && (inside >> i & 1));
  }
  // Rows along k: `k` is the tile's first row, `column` whether this thread's columns exist.
  FI_DEVICE void copy_rows(T* tile, int64_t stride, uint32_t k, uint32_t k_end, bool column) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      ptx::cp_async_16(tile + swizzled<kWidth>(row + i * kRowStep, chunk), source + k * stride + i * row_step,
                       column && k + row + i * kRowStep < k_end);
  }
};

// Lane 4 g + t holds word j of the quad's t-th pairs; afterwards it holds words 0..3 of chunk t: a 4 x 4 transpose.
FI_DEVICE uint4 transpose_quad(const uint32_t (&v)[4], int t) {
  // Exchange with t ^ 1 the words whose index differs in bit 0, then with t ^ 2 those that differ in bit 1.
  const bool odd = t & 1, high = t & 2;
  const uint32_t r0 = __shfl_xor_sync(kFullMask, odd ? v[0] : v[1], 1);
  const uint32_t r1 = __shfl_xor_sync(kFullMask, odd ? v[2] : v[3], 1);
  const uint32_t a0 = odd ? r0 : v[0], a1 = odd ? v[1] : r0;  // chunk (0 or 1) + parity, words of the lane pair
  const uint32_t a2 = odd ? r1 : v[2], a3 = odd ? v[3] : r1;
  const uint32_t s0 = __shfl_xor_sync(kFullMask, high ? a0 : a2, 2);
  const uint32_t s1 = __shfl_xor_sync(kFullMask, high ? a1 : a3, 2);
  return high ? make_uint4(s0, s1, a2, a3) : make_uint4(a0, a1, s0, s1);
}

// Which tile a CTA computes: groups of kGroup tile rows, down m inside a group, so that the CTAs in flight share rows of a
// and columns of b in L2.
template <int kGroup>
FI_DEVICE uint2 tile_of(uint32_t index, uint32_t tiles_m, uint32_t tiles_n) {
  const uint32_t group = index / (kGroup * tiles_n), in_group = index % (kGroup * tiles_n);
  const uint32_t group_rows = min(tiles_m - group * kGroup, uint32_t(kGroup));
  return make_uint2(group * kGroup + in_group % group_rows, in_group / group_rows);
}

// Fragments, accumulators and the loop over k of one CTA's tile.
// Shape: kBlockM, kBlockN, kBlockK (units: 32 or 64), kStages, kWarpsM, kWarpsN, kRowMajorB
template <class Shape>
struct TileProduct {
  static constexpr int kBlockM = Shape::kBlockM, kBlockN = Shape::kBlockN, kBlockK = Shape::kBlockK;
  static constexpr int kStages = Shape::kStages, kThreads = Shape::kWarpsM * Shape::kWarpsN * kWarpSize;
  static constexpr int kWarpM = kBlockM / Shape::kWarpsM, kWarpN = kBlockN / Shape::kWarpsN;
  static constexpr int kMTiles = kWarpM / 16, kNTiles = kWarpN / 8, kKSteps = kBlockK / 16;
  static constexpr bool kRowMajorB = Shape::kRowMajorB;
  static constexpr int kTileA = kBlockM * kBlockK, kTileB = kBlockN * kBlockK;
  static_assert(kWarpM % 16 == 0 && kWarpN % 32 == 0, "quads of n8 tiles make the 16-byte stores");
  static_assert(kKSteps % 2 == 0 && kStages >= 2, "fragments alternate between two register sets");

  uint16_t* tiles_a;
  uint16_t* tiles_b;
  int warp_m, warp_n;
  uint32_t frag_a[2][kMTiles][4], frag_b[2][kNTiles][2];
  float acc[kMTiles][kNTiles][4];

  FI_DEVICE explicit TileProduct(uint8_t* smem)
      : tiles_a(reinterpret_cast<uint16_t*>(smem)),
        tiles_b(tiles_a + kStages * kTileA),
        warp_m(warp_id() % Shape::kWarpsM),
        warp_n(warp_id() / Shape::kWarpsM) {
    clear();
  }
  FI_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int j = 0; j < kNTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = 0.f;
  }

  FI_DEVICE void load_fragments(int set, int stage, int ks) {
    const int lane = lane_id();
    const uint16_t* tile_a = tiles_a + stage * kTileA;
    const uint16_t* tile_b = tiles_b + stage * kTileB;
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
      ptx::ldmatrix_x4(frag_a[set][i],
                       tile_a + swizzled<kBlockK>(warp_m * kWarpM + i * 16 + lane % 16, ks * 2 + lane / 16));
#pragma unroll
    for (int j = 0; j < kNTiles; j += 2) {  // two n8 tiles a load: (tile j, k low), (j, k high), (j + 1, low), (j + 1, high)
      uint32_t r[4];
      if constexpr (kRowMajorB) {
        ptx::ldmatrix_x4_trans(r, tile_b + swizzled<kBlockN>(ks * 16 + lane % 16, (warp_n * kWarpN + j * 8) / 8 + lane / 16));
      } else {
        ptx::ldmatrix_x4(
            r, tile_b + swizzled<kBlockK>(warp_n * kWarpN + j * 8 + lane / 16 * 8 + lane % 8, ks * 2 + lane / 8 % 2));
      }
      frag_b[set][j][0] = r[0];
      frag_b[set][j][1] = r[1];
      frag_b[set][j + 1][0] = r[2];
      frag_b[set][j + 1][1] = r[3];
    }
  }

  // Sum over `steps` tiles. Stages 0..kStages - 2 are on their way, a group of copies each. copy(stage, step) requests tile
  // `step`; mma(c, a, b) multiplies fragments; after(step) runs when acc holds the tiles up to `step`.
  template <class Copy, class Mma, class After>
  FI_DEVICE void run(uint32_t steps, Copy copy, Mma mma, After after) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // every thread's part of tile 0 has landed
    int stage = 0, fill = kStages - 1;
    load_fragments(0, 0, 0);
    for (uint32_t step = 0; step < steps; ++step) {
#pragma unroll
      for (int ks = 0; ks < kKSteps; ++ks) {
        if (ks == 0) {
          // Tile step + kStages - 1 goes where tile step - 1 was, whose fragments all warps read before the last barrier.
          // Past the last step nothing is copied; the empty groups keep the count of the wait.
          if (step + kStages - 1 < steps) copy(fill, step + kStages - 1);
          ptx::cp_async_commit();
          fill = fill + 1 == kStages ? 0 : fill + 1;
        }
        if (ks == kKSteps - 1) {
          stage = stage + 1 == kStages ? 0 : stage + 1;
          ptx::cp_async_wait<kStages - 2>();
          __syncthreads();  // every thread's part of tile step + 1 has landed; tile `step` is read by all
        }
        // The next fragments while these multiply. After the last step they come from a tile that is not used.
        load_fragments((ks + 1) % 2, stage, (ks + 1) % kKSteps);
#pragma unroll
        for (int i = 0; i < kMTiles; ++i)
#pragma unroll
          for (int j = 0; j < kNTiles; ++j) mma(acc[i][j], frag_a[ks % 2][i], frag_b[ks % 2][j]);
      }
      after(step);
    }
    ptx::cp_async_wait<0>();
  }

  // Hands every row of this lane to row(i, half, index): index = the row inside the CTA's tile of acc[i][*][2 half ..].
  template <class Row>
  FI_DEVICE void for_rows(Row row) const {
#pragma unroll
    for (int i = 0; i < kMTiles; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) row(i, half, warp_m * kWarpM + i * 16 + half * 8 + (lane_id() >> 2));
  }
};

// Stores four n8 tiles of one row: pair(q) gives this lane's two values of tile q (columns first + 8 q + 2 t ..).
// 16-bit results leave in 16-byte pieces, exchanged inside the lane quad; every lane of the quad must call.
template <class Out, class Pair>
FI_DEVICE void store_quad(Out* out_row, uint32_t first, uint32_t n, bool row_valid, Pair pair) {
  const int t = lane_id() & 3;
  uint32_t words[4];
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const uint32_t column = first + q * 8 + 2 * t;
    const bool valid = row_valid && column < n;
    const float2 value = valid ? pair(q, column) : make_float2(0.f, 0.f);
    if constexpr (sizeof(Out) == 4) {
      if (valid) store2(out_row + column, value.x, value.y);
    } else {
      words[q] = ptx::pack2<Out>(value.x, value.y);
    }
  }
  if constexpr (sizeof(Out) == 2) {
    const uint4 chunk = transpose_quad(words, t);  // lane t: the eight columns of n8 tile t
    if (row_valid && first + 8 * t < n) *reinterpret_cast<uint4*>(out_row + first + 8 * t) = chunk;
  }
}

}  // namespace fi
