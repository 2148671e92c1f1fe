// Few rows on Hopper's instructions (sm_90a): out = epilogue(a b) limited by reading b once; parts as in gemm/hopper.cuh.
// One CTA computes up to 64 rows x kOutN columns over its share of k: a cluster of kSplit CTAs shares a tile, their sums meet through
// distributed shared memory in the order of ranks. One warpgroup multiplies; one warp keeps the ring full, which is as deep as
// shared memory allows: 180 to 208 KB in flight a multiprocessor. Scales in blocks come by one more warp.
// grid = (tiles along n x kSplit, tiles of kRowsA rows, batch).
// With programmatic dependent launch b's first blocks are on their way before the kernel in front ends: b must be constant.
// Shared memory: a [kStages][kRowsA][128 B] | b [kStages][kBlockN][128 B] | HopperGemmShared; afterwards fp32 sums.
// Bytes moved: b once; a once a tile, from L2. Arch: sm_90a only.
#pragma once
#include "gemm/hopper.cuh"
#include "ptx/cluster.cuh"

namespace fi {

// One warp: blocks [first, last) of k. The first ones of b are requested by `start`, before any other warp or kernel is waited for.
template <class Config>
struct RowsProducer {
  using Shape = HopperGemmShape<Config>;
  const HopperGemmParams& params;
  const HopperGemmTile& tile;
  uint32_t smem, full, empty, first, last, ahead;

  FI_DEVICE RowsProducer(const HopperGemmParams& p, HopperGemmShared<Config>& shared, const HopperGemmTile& t, uint32_t smem_,
                         uint32_t first_, uint32_t last_)
      : params(p), tile(t), smem(smem_), first(first_), last(last_), ahead(min(last_ - first_, uint32_t(Config::kStages))) {
    full = ptx::smem_address(shared.full), empty = ptx::smem_address(shared.empty);
  }
  FI_DEVICE void load_weight(uint32_t stage, uint32_t block) const {
    const uint32_t barrier = full + stage * 8, to = smem + Shape::kB + stage * Shape::kBBytes;
    ptx::mbarrier_arrive_expect(barrier, Shape::kABytes + Shape::kBBytes);
    load_b<Config>(params, to, barrier, block * Shape::kBlockK, tile.n_first, tile.weight * params.b_step);
  }
  FI_DEVICE void load_rows(uint32_t stage, uint32_t block) const {
    ptx::tma_load_4d(smem + stage * Shape::kABytes, params.a_map, full + stage * 8, block * Shape::kBlockK, tile.m_first,
                     tile.batch * params.a_step, 0);
  }
  FI_DEVICE void start() const {
    if (lane_id() == 0)
      for (uint32_t i = 0; i < ahead; ++i) load_weight(i, first + i);
    __syncwarp();
  }
  FI_DEVICE void run() const {
    ptx::grid_wait();
    if (lane_id() == 0)
      for (uint32_t i = 0; i < ahead; ++i) load_rows(i, first + i);
    __syncwarp();
    GemmRing<Config::kStages> ring;
    ring.phase = 1;
#pragma unroll 1
    for (uint32_t block = first + ahead; block < last; ++block) {
      ptx::mbarrier_wait(empty + ring.at * 8, ring.phase ^ 1);
      if (lane_id() == 0) {
        load_weight(ring.at, block);
        load_rows(ring.at, block);
      }
      ring.advance();
    }
    __syncwarp();
  }
};

// Sums of all ranks' tiles, finished and stored: this rank's share of the rows' fours of columns.
template <class Config>
FI_DEVICE void join_rows(const HopperGemmParams& params, const HopperGemmTile& tile, float* sums, uint32_t rank) {
  using Shape = HopperGemmShape<Config>;
  using Out = typename Config::Out;
  constexpr uint32_t kPitch = Shape::kBlockN + 8, kFours = Shape::kOutN / 4;
  const HopperEpilogue<Config, false> epilogue(params, tile);
  const uint32_t rows = min(tile.m_end - tile.m_first, uint32_t(Config::kRowsA)), all = rows * kFours;
  const float* part[Config::kSplit];
#pragma unroll
  for (int i = 0; i < Config::kSplit; ++i) part[i] = ptx::cluster_map(sums, i);
  for (uint32_t e = all * rank / Config::kSplit + threadIdx.x; e < all * (rank + 1) / Config::kSplit; e += blockDim.x) {
    const uint32_t r = e / kFours, c = e % kFours * 4, row = tile.m_first + r, column = tile.n_first + c;
    if (column >= params.n) continue;
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f), up = v;
#pragma unroll
    for (int i = 0; i < Config::kSplit; ++i) {
      const float4 x = *reinterpret_cast<const float4*>(part[i] + r * kPitch + c);
      v.x += x.x, v.y += x.y, v.z += x.z, v.w += x.w;
      if constexpr (Config::kGated) {
        const float4 y = *reinterpret_cast<const float4*>(part[i] + r * kPitch + Shape::kOutN + c);
        up.x += y.x, up.y += y.y, up.z += y.z, up.w += y.w;
      }
    }
    const float scale = epilogue.row_scale(row);
    const float2 lo = epilogue.finish(make_float2(v.x, v.y), make_float2(up.x, up.y), row, column, scale, true);
    const float2 hi = epilogue.finish(make_float2(v.z, v.w), make_float2(up.z, up.w), row, column + 2, scale, true);
    Out* const out = static_cast<Out*>(params.out) + tile.batch * params.out_batch + row * params.out_stride + column;
    if constexpr (sizeof(Out) == 4)
      *reinterpret_cast<float4*>(out) = make_float4(lo.x, lo.y, hi.x, hi.y);
    else
      *reinterpret_cast<uint2*>(out) = make_uint2(ptx::pack2<Out>(lo.x, lo.y), ptx::pack2<Out>(hi.x, hi.y));
  }
}

// Config: as for gemm_hopper with kBlockM 64, one consumer warpgroup, no grouping or bulk store; and kSplit.
template <class Config>
FI_DEVICE void gemm_hopper_rows(const HopperGemmParams& params) {
  using Shape = HopperGemmShape<Config>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  const uint32_t smem = ptx::smem_address(smem_bytes);
  auto& shared = *reinterpret_cast<HopperGemmShared<Config>*>(smem_bytes + Shape::kShared);
  static_assert(64 * (Shape::kBlockN + 8) * 4 <= Shape::kShared, "the sums take the ring's place");
  const uint32_t rank = blockIdx.x % Config::kSplit, blocks = ceil_div<uint32_t>(params.k, 128);
  const uint32_t first = blocks * rank / Config::kSplit, last = blocks * (rank + 1) / Config::kSplit;
  const HopperGemmTile tile{blockIdx.y * Config::kRowsA, min(params.m, (blockIdx.y + 1) * Config::kRowsA),
                            blockIdx.x / Config::kSplit * Shape::kOutN, blockIdx.z, blockIdx.z};
  float* const sums = reinterpret_cast<float*>(smem_bytes);
  constexpr int kPitch = Shape::kBlockN + 8;
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);
  const RowsProducer<Config> producer(params, shared, tile, smem, first, last);
  ptx::grid_launch_dependents();
  if (warp == 4) {
    init_barriers<Config>(params, shared);
    producer.start();
  }
  __syncthreads();  // barriers are there
  if (warp == 4) {
    producer.run();
  } else if (Shape::kBlocks && warp == 5) {
    ptx::grid_wait();
    GemmRing<Config::kStages> ring;
#pragma unroll 1
    for (uint32_t block = first; block < last; ++block) {
      ptx::mbarrier_wait(ptx::smem_address(&shared.empty[ring.at]), ring.phase ^ 1);
      load_scales<Config>(params, shared, tile, block, ring.at);
      ring.advance();
    }
  } else {
    if (params.residual != nullptr) prefetch_residual<Config>(params, tile, tile.m_first, tile.n_first);
    float d[Shape::kRegs];
    if (first < last) {
      HopperGemmConsumer<Config> consumer(shared, smem, 0, 0);
      if constexpr (Config::kPromote == 0)
        sum_tile<Config>(consumer, d, last - first);
      else
        sum_promoted<Config>(consumer, shared, d, last - first, 0);
    } else {
#pragma unroll
      for (int i = 0; i < Shape::kRegs; ++i) d[i] = 0.f;
    }
    ptx::grid_wait();  // what the epilogue reads, and out, are the kernel's in front until now
    if constexpr (Config::kSplit == 1) {
      store_sums<Config>(params, tile, d, tile.m_first, tile.n_first, 0, 0);
    } else {
      asm volatile("bar.sync 1, 128;" ::: "memory");  // all four warps' products have read the ring
      const int row = warp_id() * 16 + (lane_id() >> 2);
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (row + 8 * h < Config::kRowsA)
#pragma unroll
          for (int j = 0; j < Shape::kBlockN / 8; ++j)
            *reinterpret_cast<float2*>(sums + (row + 8 * h) * kPitch + 8 * j + 2 * (lane_id() & 3)) =
                make_float2(d[4 * j + 2 * h], d[4 * j + 2 * h + 1]);
    }
  }
  if constexpr (Config::kSplit > 1) {
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();  // every rank's sums are in its shared memory
    join_rows<Config>(params, tile, sums, rank);
    __syncwarp();
    ptx::cluster_arrive();
    ptx::cluster_wait();  // every rank has read this one's
  }
}

}  // namespace fi
