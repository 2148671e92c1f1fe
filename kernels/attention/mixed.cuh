// Prefill tiles and decode items of one call in one launch (POD, mixed batches): persistent CTAs that take tasks from two
// queues. A task is a PrefillItem for one kv head (attention/prefill.cuh) or a DecodeItem for one head block
// (attention/decode.cuh). Grid: as many CTAs as the device holds at a time, or fewer tasks than that.
// The first tile_ctas CTAs take tiles while there are any, then decode items; the others the other way round. CTAs start
// breadth first over the multiprocessors, so each of these has CTAs of both kinds: the one waits for memory while the
// other computes. Both lists lie longest first; all heads of an item follow each other, for tiles in sections of
// kSectionHeads kv heads, whose keys and values L2 can hold.
// A queue counts what it gave beyond the CTAs' first tasks, and every CTA asks in vain exactly once: the last question
// wraps it to zero for the next launch. An item that does nothing (padding of a captured graph) is a task like others.
// Shared memory: that of the tile or the item | MixedTurn. Bytes moved: those of both parts. Arch: any.
#pragma once
#include "attention/decode.cuh"
#include "attention/prefill.cuh"

namespace fi {

struct MixedParams {
  PrefillParams prefill;
  DecodeParams decode;
  uint32_t* queues;    // [2]: tiles, decode items; zero between launches
  uint32_t num_kv_heads;  // of the tiles
  uint32_t num_tiles;  // prefill items
  uint32_t num_items;  // decode items
  uint32_t tile_ctas;  // CTAs that begin with a tile: at most as many as there are tile tasks; the rest likewise
};

// What a CTA does next. Nothing of it stays in registers, of which the tile has none to spare: hence thread_again(), too.
struct alignas(16) MixedTurn {
  uint32_t kind;  // 0: tile, 1: decode item, 2: no more
  uint32_t task;
  uint32_t open;  // queues that this CTA has not found empty
};

namespace mixed_detail {

constexpr uint32_t kSectionHeads = 8;

// By one thread: the next task of the turn's kind or, when there is none, of the other.
FI_DEVICE void take(const MixedParams& params, MixedTurn& turn) {
  uint32_t kind = turn.kind;
  for (uint32_t open = turn.open; open > 0; --open, kind ^= 1) {
    const uint32_t tasks = kind == 0 ? params.num_tiles * params.num_kv_heads
                                     : params.num_items * params.decode.num_head_blocks;
    const uint32_t begun = kind == 0 ? params.tile_ctas : gridDim.x - params.tile_ctas;
    const uint32_t task = begun + atomicInc(params.queues + kind, tasks - begun + gridDim.x - 1);
    if (task < tasks) {
      turn = {kind, task, open};
      return;
    }
  }
  turn.kind = 2;
}

template <class Config>
FI_DEVICE void run_tile(const MixedParams& params, uint32_t task) {
  const uint32_t section = task / (params.num_tiles * kSectionHeads), first = section * kSectionHeads;
  const uint32_t width = min(kSectionHeads, params.num_kv_heads - first);
  task -= first * params.num_tiles;
  prefill_tile<typename Config::Prefill>(params.prefill, task / width, first + task % width);
}

template <class Config>
FI_DEVICE void run_item(const MixedParams& params, uint32_t task) {
  const uint32_t blocks = params.decode.num_head_blocks;
  decode_item<typename Config::Decode>(params.decode, nullptr, task / blocks, task % blocks);
}

}  // namespace mixed_detail

// Config: Prefill and Decode as their kernels take them (the same kWarps, no rope), kTurnOffset: bytes in front of the turn
template <class Config>
FI_DEVICE void mixed(const MixedParams& params) {
  using namespace mixed_detail;
  static_assert(Config::Prefill::kWarps == Config::Decode::kWarps, "one CTA runs both");
  static_assert(!Config::Decode::kRope, "the frequencies are no part of MixedParams");
  extern __shared__ __align__(1024) uint8_t smem[];
  MixedTurn& turn = *reinterpret_cast<MixedTurn*>(smem + Config::kTurnOffset);
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  if (thread_again() == 0) {
    const bool tile = blockIdx.x < params.tile_ctas;
    turn = {tile ? 0u : 1u, tile ? blockIdx.x : blockIdx.x - params.tile_ctas, 2};
  }
  __syncthreads();
#pragma unroll 1
  while (turn.kind != 2) {
    if (turn.kind == 0)
      run_tile<Config>(params, turn.task);
    else
      run_item<Config>(params, turn.task);
    __syncthreads();  // every thread is done with the shared memory of the task, and has read the turn
    if (thread_again() == 0) take(params, turn);
    __syncthreads();  // the turn is there
  }
}

}  // namespace fi
