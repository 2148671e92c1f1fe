// out[m, n] = a b + bias for many rows on the tensor cores through shared memory (cp.async, ldmatrix, mma.sync).
// One CTA computes kBlockM x kBlockN; its kWarpsM x kWarpsN warps split the tile. grid = (tiles, 1, batch): tiles run in
// groups of kGroup tile rows, down m inside a group, so that the CTAs in flight share rows of a and columns of b in L2.
// kStages buffers of kBlockK columns go round: while a buffer is multiplied the next kStages - 2 or more are in flight.
// b is [n, k] in memory, or [k, n] when kRowMajorB (ldmatrix transposes it). Edges are zero-filled by cp.async.
// The epilogue turns fragments into 16-byte stores with shuffles inside lane quads: no shared memory, no barrier.
// Shared memory, dynamic: kStages x (a tile, b tile), 16-byte chunks swizzled against bank conflicts.
// Bytes moved: m k ceil(n / kBlockN) + n k ceil(m / kBlockM), mostly from L2; m n out. Architecture: any.
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
    source = matrix + (first_row + row) * stride + first_column + chunk * 8;
    row_step = kRowStep * stride;
    inside = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) inside |= uint32_t(first_row + row + i * kRowStep < rows) << i;
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

// Config: T, Out, Epilogue, kBlockM, kBlockN, kBlockK (32 or 64), kStages, kWarpsM, kWarpsN, kGroup, kRowMajorB
template <class Config>
FI_DEVICE void gemm_tiled(const GemmParams& params) {
  using T = typename Config::T;
  using Out = typename Config::Out;
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kBlockK = Config::kBlockK;
  constexpr int kStages = Config::kStages, kThreads = Config::kWarpsM * Config::kWarpsN * kWarpSize;
  constexpr int kWarpM = kBlockM / Config::kWarpsM, kWarpN = kBlockN / Config::kWarpsN;
  constexpr int kMTiles = kWarpM / 16, kNTiles = kWarpN / 8, kKSteps = kBlockK / 16;
  constexpr bool kRowMajorB = Config::kRowMajorB;
  static_assert(kWarpM % 16 == 0 && kWarpN % 32 == 0, "quads of n8 tiles make the 16-byte stores");
  static_assert(kKSteps % 2 == 0 && kStages >= 2, "fragments alternate between two register sets");
  constexpr int kTileA = kBlockM * kBlockK, kTileB = kBlockN * kBlockK;
  extern __shared__ __align__(1024) uint8_t smem[];
  T* const tiles_a = reinterpret_cast<T*>(smem);
  T* const tiles_b = tiles_a + kStages * kTileA;

  ptx::grid_launch_dependents();
  // Which tile: kGroup tile rows at a time, m fastest.
  const uint32_t tiles_m = ceil_div<uint32_t>(params.m, kBlockM), tiles_n = ceil_div<uint32_t>(params.n, kBlockN);
  const uint32_t group = blockIdx.x / (Config::kGroup * tiles_n), in_group = blockIdx.x % (Config::kGroup * tiles_n);
  const uint32_t group_rows = min(tiles_m - group * Config::kGroup, uint32_t(Config::kGroup));
  const uint32_t m_first = (group * Config::kGroup + in_group % group_rows) * kBlockM;
  const uint32_t n_first = in_group / group_rows * kBlockN;

  using LoaderA = TileLoader<T, kBlockM, kBlockK, kThreads>;
  using LoaderB = TileLoader<T, kRowMajorB ? kBlockK : kBlockN, kRowMajorB ? kBlockN : kBlockK, kThreads>;
  const LoaderA loader_a(static_cast<const T*>(params.a) + blockIdx.z * params.a_batch, params.a_stride, m_first, params.m, 0);
  const T* b = static_cast<const T*>(params.b) + blockIdx.z * params.b_batch;
  const LoaderB loader_b = kRowMajorB ? LoaderB(b, params.b_stride, 0, params.k, n_first)
                                      : LoaderB(b, params.b_stride, n_first, params.n, 0);
  auto copy_a = [&](int stage, uint32_t k) { loader_a.copy_columns(tiles_a + stage * kTileA, k, params.k); };
  auto copy_b = [&](int stage, uint32_t k) {
    if constexpr (kRowMajorB) {
      loader_b.copy_rows(tiles_b + stage * kTileB, params.b_stride, k, params.k, n_first + loader_b.chunk * 8 < params.n);
    } else {
      loader_b.copy_columns(tiles_b + stage * kTileB, k, params.k);
    }
  };

  // Weights are constant: their first tiles are requested before the wait for the kernel that writes a.
  const uint32_t steps = ceil_div<uint32_t>(params.k, kBlockK);
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy_b(s, s * kBlockK);
  ptx::grid_wait();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    copy_a(s, s * kBlockK);
    ptx::cp_async_commit();  // the first of these groups holds every b tile above as well
  }

  const int lane = lane_id(), warp_m = warp_id() % Config::kWarpsM, warp_n = warp_id() / Config::kWarpsM;
  uint32_t frag_a[2][kMTiles][4], frag_b[2][kNTiles][2];
  auto load_fragments = [&](int set, int stage, int ks) {
    const T* tile_a = tiles_a + stage * kTileA;
    const T* tile_b = tiles_b + stage * kTileB;
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
  };

  float acc[kMTiles][kNTiles][4] = {};
  ptx::cp_async_wait<kStages - 2>();
  __syncthreads();  // every thread's part of tile 0 has landed
  int stage = 0, fill = kStages - 1;
  load_fragments(0, 0, 0);
  for (uint32_t step = 0; step < steps; ++step) {
#pragma unroll
    for (int ks = 0; ks < kKSteps; ++ks) {
      if (ks == 0) {
        // Tile step + kStages - 1 goes where tile step - 1 was, whose fragments all warps read before the last barrier.
        // Past the last step zeros are copied, which nothing reads; the empty groups keep the count of the wait.
        if (step + kStages - 1 < steps) {
          copy_a(fill, (step + kStages - 1) * kBlockK);
          copy_b(fill, (step + kStages - 1) * kBlockK);
        }
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
        for (int j = 0; j < kNTiles; ++j) ptx::mma_m16n8k16<T>(acc[i][j], frag_a[ks % 2][i], frag_b[ks % 2][j]);
    }
  }
  ptx::cp_async_wait<0>();

  const typename Config::Epilogue epilogue(params);
  Out* out = static_cast<Out*>(params.out) + blockIdx.z * params.out_batch;
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < kMTiles; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = m_first + warp_m * kWarpM + i * 16 + half * 8 + g;
      Out* out_row = out + row * params.out_stride;
#pragma unroll
      for (int j = 0; j < kNTiles; j += 4) {
        const uint32_t first = n_first + warp_n * kWarpN + j * 8;
        uint32_t words[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          const uint32_t column = first + q * 8 + 2 * t;
          const bool valid = row < params.m && column < params.n;
          const float lo = valid ? epilogue(acc[i][j + q][2 * half], row, column) : 0.f;
          const float hi = valid ? epilogue(acc[i][j + q][2 * half + 1], row, column + 1) : 0.f;
          if constexpr (sizeof(Out) == 4) {
            if (valid) store2(out_row + column, lo, hi);
          } else {
            words[q] = ptx::pack2<Out>(lo, hi);
          }
        }
        if constexpr (sizeof(Out) == 2) {
          const uint4 chunk = transpose_quad(words, t);  // lane t: the eight columns of n8 tile j + t
          if (row < params.m && first + 8 * t < params.n) *reinterpret_cast<uint4*>(out_row + first + 8 * t) = chunk;
        }
      }
    }
}

}  // namespace fi
