// Matrix products on Hopper's own instructions (sm_90a): out = epilogue(a b), wgmma fed by the copy engine (TMA).
// One CTA a multiprocessor walks over tiles of kBlockM x kBlockN. A producer warpgroup keeps kStages blocks of 128 bytes of k in
// flight, across tiles; each consumer warpgroup owns 64 rows x kBlockN / kWarpsN columns and stores them without the others,
// so that one's epilogue hides behind another's products.
// Dense: a batch of matrices. Grouped: rows of a in segments, each with its own b; tiles are found from the segments' offsets on
// the device. b k-contiguous ([n, k] in memory), or n-contiguous for 16-bit types. fp8 with scales a row and column, or
// 1 x 128 and 128 x 128 blocks, whose sums leave the tensor cores every 128 of k (they keep about 14 bits there).
// Shared memory: a [kStages][kBlockM][128 B] | b [kStages][kBlockN][128 B] (n-contiguous: panels [64 k][128 B]), 128-byte swizzle |
// store buffers | HopperGemmShared. Registers: a producer keeps kProducerRegs, a consumer takes kConsumerRegs.
// Bytes moved: a ceil(n / kBlockN) times, b ceil(m / kBlockM) times, mostly from L2; out once. Arch: sm_90a only.
#pragma once
#include "gemm/hopper_load.cuh"
#include "gemm/hopper_store.cuh"

namespace fi {

// A consumer warpgroup's view of the ring: waits, products of one block of k, releases.
template <class Config>
struct HopperGemmConsumer {
  using Shape = HopperGemmShape<Config>;
  using Product = ptx::WgmmaShared<typename Config::TA, typename Config::TB, Shape::kWarpN>;
  GemmRing<Config::kStages> ring;
  uint32_t full, empty;
  uint64_t a, b;  // descriptors of stage 0

  FI_DEVICE HopperGemmConsumer(HopperGemmShared<Config>& shared, uint32_t smem, int warp_m, int warp_n) {
    full = ptx::smem_address(shared.full), empty = ptx::smem_address(shared.empty);
    a = ptx::wgmma_descriptor(smem + warp_m * 64 * 128, 16, 1024);
    b = Config::kRowMajorB ? ptx::wgmma_descriptor(smem + Shape::kB + warp_n * (Shape::kWarpN / 64) * 8192, 8192, 1024)
                           : ptx::wgmma_descriptor(smem + Shape::kB + warp_n * Shape::kWarpN * 128, 16, 1024);
  }
  FI_DEVICE void wait() const { ptx::mbarrier_wait(full + ring.at * 8, ring.phase); }
  // Factors in blocks are read by every lane for itself, operands by the warp's products.
  FI_DEVICE void release(uint32_t stage) const {
    if (Shape::kBlocks || lane_id() == 0) ptx::mbarrier_arrive(empty + stage * 8);
  }
  // accumulate 0: the block starts the sums.
  FI_DEVICE void multiply(float (&d)[Shape::kRegs], int accumulate) const {
    const uint64_t at_a = a + ring.at * (Shape::kABytes / 16), at_b = b + ring.at * (Shape::kBBytes / 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {  // 32 bytes of k each; 16 rows down an n-contiguous b
      const int go = step == 0 ? accumulate : 1;
      if constexpr (Config::kRowMajorB)
        Product::run_n(d, at_a + step * 2, at_b + step * (16 * 128 / 16), go);
      else
        Product::run(d, at_a + step * 2, at_b + step * 2, go);
    }
    ptx::wgmma_commit();
  }
  FI_DEVICE void skip(uint32_t blocks) {
#pragma unroll 1
    for (uint32_t block = 0; block < blocks; ++block) {
      wait();
      release(ring.at);
      ring.advance();
    }
  }
};

// The sums of a tile: the tensor cores' own.
template <class Config>
FI_DEVICE void sum_tile(HopperGemmConsumer<Config>& consumer, float (&d)[HopperGemmShape<Config>::kRegs], uint32_t blocks) {
  uint32_t last = 0;
#pragma unroll 1
  for (uint32_t block = 0; block < blocks; ++block) {
    consumer.wait();
    consumer.multiply(d, block != 0);
    ptx::wgmma_wait<1>();  // the block before is done: its stage goes back
    if (block != 0) consumer.release(last);
    last = consumer.ring.at;
    consumer.ring.advance();
  }
  ptx::wgmma_wait<0>();
  ptx::wgmma_arrived(d);
  consumer.release(last);
}

// Factors of a block of k: of this lane's rows, for each of b's scales.
template <class Config>
FI_DEVICE void read_scales(const HopperGemmShared<Config>& shared, uint32_t stage, int row,
                           float (&scale)[2][HopperGemmShape<Config>::kScalesB]) {
#pragma unroll
  for (int g = 0; g < HopperGemmShape<Config>::kScalesB; ++g) {
    const float b = shared.b_scale[stage][g];
    scale[0][g] = shared.a_scale[stage][row] * b, scale[1][g] = shared.a_scale[stage][row + 8] * b;
  }
}

// The same, with sums in full fp32 that the tensor cores' are added to every kPromote blocks, scaled if scales come in blocks.
template <class Config>
FI_DEVICE void sum_promoted(HopperGemmConsumer<Config>& consumer, const HopperGemmShared<Config>& shared,
                            float (&total)[HopperGemmShape<Config>::kRegs], uint32_t blocks, int warp_m) {
  using Shape = HopperGemmShape<Config>;
  const int row = warp_m * 64 + (warp_id() & 3) * 16 + (lane_id() >> 2);
#pragma unroll
  for (int i = 0; i < Shape::kRegs; ++i) total[i] = 0.f;
#pragma unroll 1
  for (uint32_t block = 0; block < blocks;) {
    float d[Shape::kRegs], scale[2][Shape::kScalesB];
    uint32_t last = 0;
    const uint32_t count = min(blocks - block, uint32_t(Config::kPromote));
    block += count;
#pragma unroll 1
    for (uint32_t i = 0; i < count; ++i) {
      consumer.wait();
      const uint32_t stage = consumer.ring.at;
      consumer.multiply(d, i != 0);
      if constexpr (Shape::kBlocks) read_scales(shared, stage, row, scale);  // while the tensor cores are busy
      if (Config::kPromote > 1) {
        ptx::wgmma_wait<1>();
        if (i != 0) consumer.release(last);
      }
      last = consumer.ring.at;
      consumer.ring.advance();
    }
    ptx::wgmma_wait<0>();
    ptx::wgmma_arrived(d);
    consumer.release(last);
#pragma unroll
    for (int i = 0; i < Shape::kRegs; ++i) {
      if constexpr (Shape::kBlocks)
        total[i] = fmaf(d[i], scale[i / 2 % 2][Shape::kScalesB == 1 ? 0 : i / 32], total[i]);
      else
        total[i] += d[i];
    }
  }
}

// Sums scaled in blocks where registers allow two sets beside the total: the tensor cores compute one block while the one before is
// added up.
template <class Config>
FI_DEVICE void sum_overlapped(HopperGemmConsumer<Config>& consumer, const HopperGemmShared<Config>& shared,
                              float (&total)[HopperGemmShape<Config>::kRegs], uint32_t blocks, int warp_m) {
  using Shape = HopperGemmShape<Config>;
  const int row = warp_m * 64 + (warp_id() & 3) * 16 + (lane_id() >> 2);
  struct Set {
    float d[Shape::kRegs], scale[2][Shape::kScalesB];
    uint32_t stage;
  };
  Set even, odd;
  auto issue = [&](Set& set) {
    consumer.wait();
    set.stage = consumer.ring.at;
    consumer.multiply(set.d, 0);
    read_scales(shared, set.stage, row, set.scale);
    consumer.ring.advance();
  };
  auto add = [&](Set& set) {
    ptx::wgmma_arrived(set.d);
    consumer.release(set.stage);
#pragma unroll
    for (int i = 0; i < Shape::kRegs; ++i) total[i] = fmaf(set.d[i], set.scale[i / 2 % 2][Shape::kScalesB == 1 ? 0 : i / 32], total[i]);
  };
#pragma unroll
  for (int i = 0; i < Shape::kRegs; ++i) total[i] = 0.f;
  issue(even);
  uint32_t block = 1;
#pragma unroll 1
  for (; block + 1 < blocks; block += 2) {
    issue(odd);
    ptx::wgmma_wait<1>();
    add(even);
    issue(even);
    ptx::wgmma_wait<1>();
    add(odd);
  }
  if (block < blocks) {
    issue(odd);
    ptx::wgmma_wait<1>();
    add(even);
    ptx::wgmma_wait<0>();
    add(odd);
  } else {
    ptx::wgmma_wait<0>();
    add(even);
  }
}

template <class Config>
FI_DEVICE void consume_tiles(const HopperGemmParams& params, HopperGemmShared<Config>& shared, uint32_t smem, int warpgroup) {
  using Shape = HopperGemmShape<Config>;
  const int warp_m = warpgroup % Config::kWarpsM, warp_n = warpgroup / Config::kWarpsM;
  const uint32_t blocks = ceil_div<uint32_t>(params.k, 128);
  HopperGemmConsumer<Config> consumer(shared, smem, warp_m, warp_n);
  HopperGemmWalk<Config> walk(params);
  HopperGemmTile tile;
#pragma unroll 1
  for (uint32_t number = blockIdx.x; walk.find(number, tile); number += gridDim.x) {
    const uint32_t m = tile.m_first + warp_m * 64, n = tile.n_first + warp_n * Shape::kWarpOutN;
    if (m >= tile.m_end) {  // the segment ends above this warpgroup's rows
      consumer.skip(blocks);
      continue;
    }
    HopperAhead<Config> ahead;
    ahead.load(params, tile, m, n);
    float d[Shape::kRegs];
    if constexpr (Config::kPromote == 0)
      sum_tile<Config>(consumer, d, blocks);
    else if constexpr (Shape::kBlocks && 3 * Shape::kRegs + 30 <= Config::kConsumerRegs)
      sum_overlapped<Config>(consumer, shared, d, blocks, warp_m);
    else
      sum_promoted<Config>(consumer, shared, d, blocks, warp_m);
    store_sums<Config>(params, tile, d, ahead, m, n, smem + Shape::kStore + warpgroup * 2 * 8192, warpgroup);
  }
  if constexpr (Config::kBulkStore) ptx::tma_store_wait_read<0>();  // shared memory outlives its last reader
}

template <class Config>
FI_DEVICE void gemm_hopper(const HopperGemmParams& params) {
  using Shape = HopperGemmShape<Config>;
  extern __shared__ __align__(1024) uint8_t smem_bytes[];
  const uint32_t smem = ptx::smem_address(smem_bytes);
  auto& shared = *reinterpret_cast<HopperGemmShared<Config>*>(smem_bytes + Shape::kShared);
  // Uniform for the compiler: the warpgroup decides which branch's registers a warp has.
  const int warpgroup = __shfl_sync(kFullMask, threadIdx.x / 128, 0), warp = __shfl_sync(kFullMask, threadIdx.x / kWarpSize, 0);
  ptx::grid_launch_dependents();
  if (warp == 4 * Shape::kConsumers) init_barriers<Config>(params, shared);
  __syncthreads();  // barriers are there
  ptx::grid_wait();

  if (warpgroup == Shape::kConsumers) {
    ptx::lower_registers<Config::kProducerRegs>();
    if (warp == 4 * Shape::kConsumers) produce_operands<Config>(params, shared, smem);
    if (Shape::kBlocks && warp == 4 * Shape::kConsumers + 1) produce_scales<Config>(params, shared);
  } else {
    ptx::raise_registers<Config::kConsumerRegs>();
    consume_tiles<Config>(params, shared, smem, warpgroup);
  }
}

}  // namespace fi
