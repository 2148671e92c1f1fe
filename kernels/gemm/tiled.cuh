// out[m, n] = a b + bias + residual for many rows on the tensor cores through shared memory (cp.async, ldmatrix, mma.sync).
// One CTA computes kBlockM x kBlockN; its kWarpsM x kWarpsN warps split the tile. grid = (tiles, 1, batch): tiles run in
// groups of kGroup tile rows, down m inside a group, so that the CTAs in flight share rows of a and columns of b in L2.
// b is [n, k] in memory, or [k, n] when kRowMajorB (ldmatrix transposes it). Edges are zero-filled by cp.async.
// The epilogue turns fragments into 16-byte stores with shuffles inside lane quads: no shared memory, no barrier.
// Shared memory, dynamic: kStages x (a tile, b tile), 16-byte chunks swizzled against bank conflicts.
// Bytes moved: m k ceil(n / kBlockN) + n k ceil(m / kBlockM), mostly from L2; m n out. Architecture: any.
#pragma once
#include "gemm/tile.cuh"

namespace fi {

// Config: T, Out, Epilogue, kBlockM, kBlockN, kBlockK (32 or 64), kStages, kWarpsM, kWarpsN, kGroup, kRowMajorB
template <class Config>
FI_DEVICE void gemm_tiled(const GemmParams& params) {
  using T = typename Config::T;
  using Out = typename Config::Out;
  using Product = TileProduct<Config>;
  constexpr int kBlockM = Config::kBlockM, kBlockN = Config::kBlockN, kBlockK = Config::kBlockK;
  constexpr int kStages = Config::kStages, kThreads = Product::kThreads;
  constexpr bool kRowMajorB = Config::kRowMajorB;
  extern __shared__ __align__(1024) uint8_t smem[];
  Product product(smem);

  ptx::grid_launch_dependents();
  const uint2 tile =
      tile_of<Config::kGroup>(blockIdx.x, ceil_div<uint32_t>(params.m, kBlockM), ceil_div<uint32_t>(params.n, kBlockN));
  const uint32_t m_first = tile.x * kBlockM, n_first = tile.y * kBlockN;

  using LoaderA = TileLoader<uint16_t, kBlockM, kBlockK, kThreads>;
  using LoaderB = TileLoader<uint16_t, kRowMajorB ? kBlockK : kBlockN, kRowMajorB ? kBlockN : kBlockK, kThreads>;
  const LoaderA loader_a(static_cast<const uint16_t*>(params.a) + blockIdx.z * params.a_batch, params.a_stride, m_first,
                         params.m, 0);
  const uint16_t* b = static_cast<const uint16_t*>(params.b) + blockIdx.z * params.b_batch;
  const LoaderB loader_b = kRowMajorB ? LoaderB(b, params.b_stride, 0, params.k, n_first)
                                      : LoaderB(b, params.b_stride, n_first, params.n, 0);
  auto copy_a = [&](int stage, uint32_t k) { loader_a.copy_columns(product.tiles_a + stage * Product::kTileA, k, params.k); };
  auto copy_b = [&](int stage, uint32_t k) {
    uint16_t* to = product.tiles_b + stage * Product::kTileB;
    if constexpr (kRowMajorB) {
      loader_b.copy_rows(to, params.b_stride, k, params.k, n_first + loader_b.chunk * 8 < params.n);
    } else {
      loader_b.copy_columns(to, k, params.k);
    }
  };

  // Weights are constant: their first tiles are requested before the wait for the kernel that writes a.
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) copy_b(s, s * kBlockK);
  ptx::grid_wait();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    copy_a(s, s * kBlockK);
    ptx::cp_async_commit();  // the first of these groups holds every b tile above as well
  }
  product.run(
      ceil_div<uint32_t>(params.k, kBlockK),
      [&](int stage, uint32_t step) {
        copy_a(stage, step * kBlockK);
        copy_b(stage, step * kBlockK);
      },
      [](float(&c)[4], const uint32_t(&fa)[4], const uint32_t(&fb)[2]) { ptx::mma_m16n8k16<T>(c, fa, fb); },
      [](uint32_t) {});

  const typename Config::Epilogue epilogue(params);
  Out* out = static_cast<Out*>(params.out) + blockIdx.z * params.out_batch;
  product.for_rows([&](int i, int half, int index) {
    const uint32_t row = m_first + index;
#pragma unroll
    for (int j = 0; j < Product::kNTiles; j += 4)
      store_quad(out + int64_t(row) * params.out_stride, n_first + product.warp_n * Product::kWarpN + j * 8, params.n,
                 row < params.m, [&](int q, uint32_t column) {
                   return make_float2(epilogue(product.acc[i][j + q][2 * half], row, column),
                                      epilogue(product.acc[i][j + q][2 * half + 1], row, column + 1));
                 });
  });
}

}  // namespace fi
