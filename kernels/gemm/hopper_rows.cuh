// Few rows on Hopper's instructions (sm_90a): out = epilogue(a b) limited by reading b once; parts as in gemm/hopper.cuh.
// One CTA computes up to 64 rows x kOutN columns over its share of k: a cluster of kSplit CTAs shares a tile, and each adds a part of
// its columns up, which the others push into its shared memory. One warpgroup multiplies; one warp keeps the ring full, which is as deep as
// shared memory allows: 180 to 208 KB in flight a multiprocessor. Scales in blocks come by one more warp.
// grid = (tiles along n x kSplit, tiles of kRowsA rows, batch).
// With programmatic dependent launch b's first blocks are on their way before the kernel in front ends: b must be constant.
// Shared memory: a [kStages][kRowsA][128 B] | b [kStages][kBlockN][128 B] | HopperGemmShared | fp32 sums of the other ranks.
// Bytes moved: b once; a once a tile, from L2. Arch: sm_90a only.
#pragma once
#include "gemm/hopper.cuh"
#include "ptx/cluster.cuh"

namespace fi {

// One warp: blocks [first, last) of k. A dependent launch requests the first ones of b by `start`, before any other warp or kernel is
// waited for. Any other asks for a and b in turn: behind a ring full of b the first block of a would come microseconds late.
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
      for (uint32_t i = 0; i < min(ahead, params.early); ++i) load_weight(i, first + i);
    __syncwarp();
  }
  FI_DEVICE void run() const {
    ptx::grid_wait();
    if (lane_id() == 0)
      for (uint32_t i = 0; i < ahead; ++i) {
        if (i >= params.early) load_weight(i, first + i);
        load_rows(i, first + i);
      }
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

// How the ranks of a cluster add their sums up: each owns an equal part of the tile's columns, and the others send it theirs.
template <class Config>
struct RowsJoin {
  using Shape = HopperGemmShape<Config>;
  static constexpr int kSplit = Config::kSplit;
  static constexpr int kPart = Shape::kRegs / kSplit;                         // sums of a thread that belong to one rank
  static constexpr int kTiles = Shape::kOutN / 8 / kSplit;                    // their n8 tiles (gated: and as many of up)
  static constexpr int kThreads = ceil_div(Config::kRowsA, 16) * kWarpSize;  // with rows that are there
  static constexpr int kInbox = (kSplit - 1) * kPart * kThreads * 4;          // bytes; [sender][four sums][thread]
  static_assert(kPart % 4 == 0 && Shape::kOutN % (8 * kSplit) == 0, "fours of sums, and whole n8 tiles a rank");

  FI_DEVICE static float part(const float (&d)[Shape::kRegs], int rank, int i) {
    constexpr int kHalf = kPart / 2;
    if constexpr (!Config::kGated) return d[rank * kPart + i];
    return i < kHalf ? d[rank * kHalf + i] : d[Shape::kRegs / 2 + rank * kHalf + i - kHalf];
  }
  // Consumer threads. Nobody waits for what a peer's memory holds: sums are pushed, and added from a rank's own.
  FI_DEVICE static void join(float (&own)[kPart], const float (&d)[Shape::kRegs], float4* inbox, uint32_t rank) {
    ptx::cluster_wait();  // every rank runs
    const bool there = threadIdx.x < kThreads;
#pragma unroll
    for (int to = 0; to < kSplit; ++to) {
      if (to == rank || !there) continue;
      float4* const box = ptx::cluster_map(inbox, to) + (rank < to ? rank : rank - 1) * (kPart / 4) * kThreads + threadIdx.x;
#pragma unroll
      for (int i = 0; i < kPart; i += 4)
        box[i / 4 * kThreads] = make_float4(part(d, to, i), part(d, to, i + 1), part(d, to, i + 2), part(d, to, i + 3));
    }
    ptx::cluster_arrive();
#pragma unroll
    for (int i = 0; i < kPart; ++i) {
      own[i] = part(d, 0, i);
#pragma unroll
      for (int r = 1; r < kSplit; ++r)
        if (rank == r) own[i] = part(d, r, i);
    }
    ptx::cluster_wait();  // the others' sums are here
    if (!there) return;
#pragma unroll
    for (int from = 0; from < kSplit - 1; ++from)
#pragma unroll
      for (int i = 0; i < kPart; i += 4) {
        const float4 x = inbox[(from * (kPart / 4) + i / 4) * kThreads + threadIdx.x];
        own[i] += x.x, own[i + 1] += x.y, own[i + 2] += x.z, own[i + 3] += x.w;
      }
  }
};

// A rank's sums, finished and stored: 16 bytes of a row a lane where it has four n8 tiles, else its pairs of columns.
template <class Config>
FI_DEVICE void store_joined(const HopperGemmParams& params, const HopperGemmTile& tile,
                            const float (&own)[RowsJoin<Config>::kPart], uint32_t rank) {
  using Out = typename Config::Out;
  constexpr int kTiles = RowsJoin<Config>::kTiles, kUp = Config::kGated ? 4 * kTiles : 0;
  constexpr bool kQuads = sizeof(Out) == 2 && kTiles % 4 == 0;
  const HopperEpilogue<Config, false> epilogue(params, tile);
  const int lane = lane_id(), t = lane & 3;
  const uint32_t first = tile.n_first + rank * kTiles * 8;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const uint32_t row = tile.m_first + warp_id() * 16 + 8 * h + (lane >> 2);
    const bool there = row < tile.m_end;
    const float scale = epilogue.row_scale(min(row, tile.m_end - 1));
    Out* const out = static_cast<Out*>(params.out) + tile.batch * params.out_batch + row * params.out_stride;
#pragma unroll
    for (int j = 0; j < kTiles; j += kQuads ? 4 : 1) {
      uint32_t words[4];
#pragma unroll
      for (int q = 0; q < (kQuads ? 4 : 1); ++q) {
        const uint32_t column = first + 8 * (j + q) + 2 * t;
        const bool inside = there && column < params.n;
        const int i = 4 * (j + q) + 2 * h;
        const float2 v = epilogue.finish(make_float2(own[i], own[i + 1]), make_float2(own[i + kUp], own[i + 1 + kUp]), row, column,
                                         scale, inside);
        if constexpr (sizeof(Out) == 4) {
          if (inside) *reinterpret_cast<float2*>(out + column) = v;
        } else if constexpr (kQuads) {
          words[q] = ptx::pack2<Out>(v.x, v.y);
        } else {
          if (inside) *reinterpret_cast<uint32_t*>(out + column) = ptx::pack2<Out>(v.x, v.y);
        }
      }
      if constexpr (kQuads) {
        const uint4 chunk = gather_chunk(words);
        const uint32_t column = first + 8 * (j + t);
        if (there && column < params.n) *reinterpret_cast<uint4*>(out + column) = chunk;
      }
    }
  }
}

// Config: as for gemm_hopper with kBlockM 64, one consumer warpgroup, no grouping or bulk store; and kSplit.
template <class Config>
FI_DEVICE void gemm_hopper_rows(const HopperGemmParams& params) {
  using Shape = HopperGemmShape<Config>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  const uint32_t smem = ptx::smem_address(smem_bytes);
  auto& shared = *reinterpret_cast<HopperGemmShared<Config>*>(smem_bytes + Shape::kShared);
  const uint32_t rank = blockIdx.x % Config::kSplit, blocks = ceil_div<uint32_t>(params.k, 128);
  const uint32_t first = blocks * rank / Config::kSplit, last = blocks * (rank + 1) / Config::kSplit;
  const HopperGemmTile tile{blockIdx.y * Config::kRowsA, min(params.m, (blockIdx.y + 1) * Config::kRowsA),
                            blockIdx.x / Config::kSplit * Shape::kOutN, blockIdx.z, blockIdx.z};
  const int warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);
  const RowsProducer<Config> producer(params, shared, tile, smem, first, last);
  ptx::grid_launch_dependents();
  if constexpr (Config::kSplit > 1) ptx::cluster_arrive_relaxed();
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
      HopperAhead<Config> ahead;
      ahead.plain = HopperFactors<Config>::plain(params);  // nothing was asked for: it was not there yet
      store_sums<Config>(params, tile, d, ahead, tile.m_first, tile.n_first, 0, 0);
    } else {
      constexpr int kInboxAt = round_up<int>(Shape::kShared + sizeof(HopperGemmShared<Config>), 16);
      float own[RowsJoin<Config>::kPart];
      RowsJoin<Config>::join(own, d, reinterpret_cast<float4*>(smem_bytes + kInboxAt), rank);
      store_joined<Config>(params, tile, own, rank);
    }
  }
  if constexpr (Config::kSplit > 1) {
    if (warp >= 4) {
      __syncwarp();
      ptx::cluster_wait();
      ptx::cluster_arrive();  // the consumers' barrier counts all threads of the cluster
    }
  }
}

}  // namespace fi
