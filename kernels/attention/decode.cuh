// Decode attention: one query token a request over a paged (or contiguous) KV cache, split along the keys.
// A CTA computes one work item: keys [kv_begin, kv_end) of one request for a block of up to 8 * kTilesN query heads of
// one kv head. Grid: items * num_head_blocks, head block fastest; the host plan makes the items, longest first.
// With kHeadPair a CTA has all query heads of two neighbouring kv heads, even warps those of the first, odd warps those
// of the second: a token's rows of both lie side by side (NHD), and 128-byte rows of fp8 alone do not reach the memory's
// rate (64x8192 on an H100: 365 us instead of 381).
// Each warp walks tiles of 16 keys (walker, walker + kWalkers, ..) through its own ring of kStages cp.async slots: there
// is no CTA barrier before the merge. S^T = K Q^T and O^T = V^T P^T by mma m16n8k16: keys (then dims) in M, heads in N.
// The item that arrives last of a request's head block merges the partials of all of them (counter in global memory).
// Shared memory: [kWarps][kStages][K tile, V tile], rows padded to an odd number of 16-byte chunks (no bank conflicts
// of ldmatrix for any head dim); the same bytes hold O of each warp in the merge; then m and d of each warp.
// Bytes moved: K and V once, and 8 * (head_dim + 2) a head and chunk if split. Architecture: any (sm_75 loads plainly).
#pragma once
#include "attention/decode_merge.cuh"
#include "attention/decode_params.cuh"
#include "attention/decode_tiles.cuh"
#include "attention/logits.cuh"
#include "ptx/atomics.cuh"
#include "ptx/pdl.cuh"

namespace fi {

// Config: T (q), KV, O, kHeadDim, kTilesN, kWarps, kStages, kSmemBytes, kTileInPage (a tile of 16 keys never crosses a
// page), kSoftCap, kAlibi, kRope, kHeadScales (factors of q and k a head), kHeadPair (blocks_per_kv is 1), kSharedRows (it
// is more than 1)
// Computes one item for one head block; the CTA's threads may call it again after a barrier. kAlone: CTA number b of the
// launch computes item and head block b and nothing else.
template <class Config, bool kAlone = false>
FI_DEVICE void decode_item(const DecodeParams& params, const uint64_t* rope_turns, int index, uint32_t head_block) {
  using namespace decode_detail;
  using Tr = DecodeTraits<Config>;
  using T = typename Config::T;
  using M = typename select_type<Tr::kFp8, __half, T>::type;  // what the mma multiplies
  static_assert(Tr::kFp8 || is_same_v<T, typename Tr::KV>, "q and a 16-bit cache have one type");
  using Frag = Fragments<Tr>;
  constexpr int kTilesN = Tr::kTilesN, kSteps = Tr::kSteps, kWarps = Tr::kWarps, kStages = Tr::kStages;
  constexpr int kWalkers = Tr::kWalkers;
  constexpr int kLoadSteps = Tr::kFp8 ? 2 : 1;
  extern __shared__ __align__(1024) uint8_t smem[];

  const DecodeItem item = load_item(params, index);
  if (item.request < 0) {  // padding of a fixed grid
    ptx::grid_wait();
    return;
  }
  const int warp = warp_id(), lane = lane_id(), g = lane >> 2, t = lane & 3;
  const int walker = warp / Tr::kPair;
  uint32_t kv_head, first_in_group = 0;  // of this warp
  int heads;
  if constexpr (Config::kHeadPair) {
    kv_head = 2 * head_block + warp % 2;
    heads = params.group_size;
  } else {
    kv_head = head_block / params.blocks_per_kv;
    first_in_group = head_block % params.blocks_per_kv * params.heads_per_block;
    heads = min(params.heads_per_block, params.group_size - first_in_group);
  }
  const uint32_t first_head = kv_head * params.group_size + first_in_group;

  uint64_t* turns = reinterpret_cast<uint64_t*>(smem + Tr::kTurnsOffset);
  if constexpr (Config::kRope) {
    // Lanes read different entries at a time: from shared memory, which constant memory would do one by one.
    for (int i = threadIdx.x; i < Tr::kDim / 2; i += Tr::kThreads) turns[i] = rope_turns[i];
    __syncthreads();
  }
  // In a kernel of more than this the hint costs registers (mixed.cuh: 228 bytes of spills for 16).
  using Source = TileSource<Config, Tr, Tr::kReadOnce && kAlone>;
  const Source source(params, item, kv_head);
  const int tiles = source.num_tiles();
  uint8_t* ring = smem + warp * (kStages * 2 * Tr::kTileBytes);

  const T* query[kTilesN];
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    query[n] = static_cast<const T*>(params.q) + item.request * params.q_stride_row +
               (first_head + 8 * n + g) * params.q_stride_head;
    asm volatile("" : "+l"(query[n]));  // computed here, in front of the wait
  }

  // Page numbers run ahead of the tiles: those of the first kStages tiles now, then always one more.
  if (!params.table_ready) ptx::grid_wait();
  int pages[kStages];
#pragma unroll
  for (int s = 0; s < kStages; ++s) pages[s] = source.page_of(walker + s * kWalkers, tiles);
  int next_page = source.page_of(walker + kStages * kWalkers, tiles);
  // Only where all CTAs start together: in later waves those of a token's heads do not, and L2 is asked in vain.
  const bool ask = kAlone && gridDim.x <= params.resident;
  const bool ask_ahead = Tr::kAskAhead && ask && params.shares == 1;
  int later_page = ask_ahead ? source.page_of(walker + (kStages + 1) * kWalkers, tiles) : 0;
  // Where the first tiles lie is computed in front of the wait, too.
  constexpr bool kRegular = Source::kRegular;
  using KV = typename Tr::KV;
  const KV *from_k[kStages], *from_v[kStages];
  bool all_whole = kRegular;
  if constexpr (kRegular) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      const int tile = walker + s * kWalkers;
      from_k[s] = source.keys_of(tile, pages[s]), from_v[s] = source.values_of(tile, pages[s]);
      asm volatile("" : "+l"(from_k[s]), "+l"(from_v[s]));
      all_whole &= tile >= tiles || source.whole(tile);
    }
  }
  if (params.table_ready) {
    // L2 may be asked for the first keys while the kernel in front still runs: what it writes of them it writes in L2. With
    // fp8 not for a few tiles (1x4096 lost 0.5 us).
    if (ask && (!Tr::kFp8 || tiles > kStages * kWalkers)) {
#pragma unroll
      for (int s = 0; s < kStages; ++s)
        if (walker + s * kWalkers < tiles) source.ask(walker + s * kWalkers, pages[s], head_block, kv_head);
    }
    ptx::grid_wait();  // K, V and q may come from the kernel in front: not before this
  }

  // Queries are asked for in front of the keys, or they would arrive behind all of the ring; what is done with them comes
  // after the copies are under way.
  uint32_t q[kTilesN][kSteps][2];
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    if constexpr (!Config::kRope)
#pragma unroll
      for (int step = 0; step < kSteps; ++step)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int dim = step * 16 + Frag::kQueryStride * t + Frag::kQuerySecond * r;
          const bool there = 8 * n + g < heads && dim < Tr::kHeadDim;
          q[n][step][r] = there ? *reinterpret_cast<const uint32_t*>(query[n] + dim) : 0u;
        }
  }

  const auto first_slot = source.copies.address(ring);
  if (all_whole) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (walker + s * kWalkers < tiles) source.copy_whole(first_slot + s * 2 * Tr::kTileBytes, from_k[s], from_v[s]);
      ptx::cp_async_commit();
    }
  } else if constexpr (kRegular) {  // one warp of a short request, or of many keys: not unrolled
#pragma unroll 1
    for (int s = 0; s < kStages; ++s) {
      const int tile = walker + s * kWalkers;
      const KV *keys = from_k[0], *values = from_v[0];
#pragma unroll
      for (int i = 1; i < kStages; ++i) keys = s == i ? from_k[i] : keys, values = s == i ? from_v[i] : values;
      if (tile < tiles)
        source.copy_part(source.copies.address(ring + s * 2 * Tr::kTileBytes), tile, keys, values);
      ptx::cp_async_commit();
    }
  } else {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      const int tile = walker + s * kWalkers;
      if (tile < tiles) {
        source.issue_keys(first_slot + s * 2 * Tr::kTileBytes, tile, pages[s]);
        source.issue_values(first_slot + s * 2 * Tr::kTileBytes, tile, pages[s]);
      }
      ptx::cp_async_commit();
    }
  }

  if (ask_ahead && walker + kStages * kWalkers < tiles)
    source.ask(walker + kStages * kWalkers, next_page, head_block, kv_head);

  // Until here the queries stay as they were loaded: taken apart behind their loads, they would be waited for in front of the
  // first copy (fp8 1x4096 7.9 -> 7.4 us).
  if constexpr (!Config::kRope)
#pragma unroll
    for (int n = 0; n < kTilesN; ++n)
#pragma unroll
      for (int step = 0; step < kSteps; ++step) asm volatile("" : "+r"(q[n][step][0]), "+r"(q[n][step][1]));

  float slope[kTilesN][2], scale[kTilesN][2];
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if constexpr (!Config::kRope) {
          q[n][step][r] = query_pair<T, M>(q[n][step][r]);
        } else if (step < kSteps / 2) {  // in fp32, rounded once
          const int dim = step * 16 + Frag::kQueryStride * t + Frag::kQuerySecond * r;
          float lo[2] = {0.f, 0.f}, hi[2] = {0.f, 0.f};
          if (8 * n + g < heads && dim < Tr::kHeadDim) {
            Vec<T, 2>::load(query[n] + dim).to_floats(lo);
            Vec<T, 2>::load(query[n] + dim + Tr::kDim / 2).to_floats(hi);
            rotate(lo, hi, turns + dim, item.kv_len - 1);
          }
          q[n][step][r] = ptx::pack2<M>(lo[0], lo[1]);
          q[n][step + kSteps / 2][r] = ptx::pack2<M>(hi[0], hi[1]);
        }
      }
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int column = 8 * n + 2 * t + c;  // columns past the last head repeat it
      scale[n][c] = Config::kHeadScales
                        ? params.logit_scale * params.scales.logit(first_head + min(column, heads - 1), kv_head)
                        : params.logit_scale;
      slope[n][c] = Config::kAlibi ? params.slope_scale * alibi_slope(first_head + 8 * n + 2 * t + c,
                                                                      params.num_qo_heads(Tr::kPair))
                                   : 0.f;
    }
  }

  // This lane's columns of S^T and O^T are heads 8n + 2t and 8n + 2t + 1.
  float o[kTilesN][kSteps][4], m[kTilesN][2], d[kTilesN][2];
#pragma unroll
  for (int n = 0; n < kTilesN; ++n) {
    m[n][0] = m[n][1] = -FI_INF;
    d[n][0] = d[n][1] = 0.f;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) o[n][step][0] = o[n][step][1] = o[n][step][2] = o[n][step][3] = 0.f;
  }
  const int k_lane = (lane & 15) * Tr::kPitch + (lane >> 4) * 16;
  const int v_lane = Tr::kTileBytes + ((lane & 7) + (lane >> 4 << 3)) * Tr::kPitch + (lane >> 3 & 1) * 16;

  int slot = 0;
  for (int tile = walker; tile < tiles; tile += kWalkers) {
    uint8_t* buffer = ring + slot * 2 * Tr::kTileBytes;
    ptx::cp_async_wait<kStages - 1>();
    __syncwarp();

    // S^T = K Q^T, two accumulators a column tile to halve the chain.
    const int first = source.origin + tile * Tr::kTile;
    float s[kTilesN][2][4] = {};
    if constexpr (!Config::kRope) {
#pragma unroll
      for (int step = 0; step < kSteps; step += kLoadSteps) {
        uint32_t a[2][4];
        Frag::keys(a, buffer + k_lane, step);
#pragma unroll
        for (int part = 0; part < kLoadSteps; ++part)
#pragma unroll
          for (int n = 0; n < kTilesN; ++n) ptx::mma_m16n8k16<M>(s[n][(step + part) & 1], a[part], q[n][step + part]);
      }
    } else {
      constexpr int kHalf = kSteps / 2;  // the other dim of a pair lies this many steps on, in the same register
#pragma unroll
      for (int step = 0; step < kHalf; step += kLoadSteps) {
        uint32_t lo[2][4], hi[2][4];
        Frag::keys(lo, buffer + k_lane, step);
        Frag::keys(hi, buffer + k_lane, step + kHalf);
#pragma unroll
        for (int part = 0; part < kLoadSteps; ++part) {
#pragma unroll
          for (int r = 0; r < 4; ++r)
            rotate<M>(lo[part][r], hi[part][r],
                      turns + (step + part) * 16 + Frag::kQueryStride * t + Frag::kQuerySecond * (r >> 1),
                      first + g + 8 * (r & 1));
#pragma unroll
          for (int n = 0; n < kTilesN; ++n) {
            ptx::mma_m16n8k16<M>(s[n][0], lo[part], q[n][step + part]);
            ptx::mma_m16n8k16<M>(s[n][1], hi[part], q[n][step + part + kHalf]);
          }
        }
      }
    }

    const bool whole = first >= item.kv_begin && first + Tr::kTile <= item.kv_end;
    uint32_t p[kTilesN][2];
    bool grew = false;
    float tile_max[kTilesN][2];
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // i = 2 * (row half) + column
        const int key = first + g + 8 * (i >> 1);
        const StandardLogits<Config::kSoftCap, Config::kAlibi> logit{scale[n][i & 1], params.logit_cap};
        float x = logit(s[n][0][i] + s[n][1][i], slope[n][i & 1], key);
        if (!whole && (key < item.kv_begin || key >= item.kv_end)) x = -FI_INF;
        s[n][0][i] = x;
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        float x = fmaxf(s[n][0][c], s[n][0][c + 2]);
#pragma unroll
        for (int offset = 4; offset < 32; offset *= 2) x = fmaxf(x, __shfl_xor_sync(kFullMask, x, offset));
        tile_max[n][c] = x;
        grew |= x > m[n][c];
      }
    }
    // After the first tiles the maximum seldom grows: the rescale of O runs only when it did for some head.
    if (__any_sync(kFullMask, grew)) {
#pragma unroll
      for (int n = 0; n < kTilesN; ++n)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const float next = fmaxf(m[n][c], tile_max[n][c]);
          const float f = math::ptx_exp2(m[n][c] - finite_or_zero(next));
          m[n][c] = next;
          d[n][c] *= f;
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            o[n][step][c] *= f;
            o[n][step][c + 2] *= f;
          }
        }
    }
#pragma unroll
    for (int n = 0; n < kTilesN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][0][i] = math::ptx_exp2(s[n][0][i] - finite_or_zero(m[n][i & 1]));
        d[n][i & 1] += s[n][0][i];
      }
      // The fragment of P^T (rows keys, columns heads) transposed is the B operand.
      p[n][0] = ptx::transpose_8x8(ptx::pack2<M>(s[n][0][0], s[n][0][1]));
      p[n][1] = ptx::transpose_8x8(ptx::pack2<M>(s[n][0][2], s[n][0][3]));
    }
#pragma unroll
    for (int step = 0; step < kSteps; step += kLoadSteps) {
      uint32_t a[2][4];
      Frag::values(a, buffer + v_lane, step);
#pragma unroll
      for (int part = 0; part < kLoadSteps; ++part)
#pragma unroll
        for (int n = 0; n < kTilesN; ++n) ptx::mma_m16n8k16<M>(o[n][step + part], a[part], p[n]);
    }

    __syncwarp();  // every lane has read the slot that is filled again
    const int next_tile = tile + kStages * kWalkers;
    if (next_tile < tiles) {
      const auto to = source.copies.address(buffer);
      source.issue_keys(to, next_tile, next_page);
      source.issue_values(to, next_tile, next_page);
      if (ask_ahead) {
        if (next_tile + kWalkers < tiles) source.ask(next_tile + kWalkers, later_page, head_block, kv_head);
        next_page = later_page;
        later_page = source.page_of(next_tile + 2 * kWalkers, tiles);
      } else {
        next_page = source.page_of(next_tile + kWalkers, tiles);
      }
    }
    ptx::cp_async_commit();
    slot = slot + 1 == kStages ? 0 : slot + 1;
  }

  // Merge of the warps. All tiles issued were consumed, so a warp's ring is free, and O goes there if it is large enough.
  constexpr bool kOwnRing = Tr::kHeads * Tr::kMergePitch * 4 <= kStages * 2 * Tr::kTileBytes;
  constexpr int kMergeWarp = kOwnRing ? kStages * 2 * Tr::kTileBytes / 4 : Tr::kHeads * Tr::kMergePitch;  // floats
  float* merge = reinterpret_cast<float*>(smem);
  float* state_m = reinterpret_cast<float*>(smem + Tr::kStateOffset);
  float* state_d = state_m + kWarps * Tr::kHeads;
  uint32_t* flag = reinterpret_cast<uint32_t*>(state_d + kWarps * Tr::kHeads);
  if constexpr (kOwnRing)
    __syncwarp();
  else
    __syncthreads();
#pragma unroll
  for (int n = 0; n < kTilesN; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int head = 8 * n + 2 * t + c;
      float sum = d[n][c];
#pragma unroll
      for (int offset = 4; offset < 32; offset *= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
      if (g == 0) {
        state_m[warp * Tr::kHeads + head] = m[n][c];
        state_d[warp * Tr::kHeads + head] = sum;
      }
      if (head < heads) {
        float* row = merge + warp * kMergeWarp + head * Tr::kMergePitch;
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          row[Frag::out_dim(step, g, 0)] = o[n][step][c];
          row[Frag::out_dim(step, g, 1)] = o[n][step][c + 2];
        }
      }
    }
  __syncthreads();

  constexpr int kQuads = Tr::kHeadDim / 4;  // units of four dims
  const int units = Tr::kPair * heads * kQuads;
  const uint32_t first_of_cta = first_head - (Config::kHeadPair ? warp % 2 * heads : 0);
  const uint32_t first_state = (item.slot * params.num_head_blocks + head_block) * params.heads_per_block;
  const uint32_t chunk_stride = params.num_head_blocks * params.heads_per_block;  // states from chunk to chunk
  for (int unit = threadIdx.x; unit < units; unit += Tr::kThreads) {
    const int head = unit / kQuads, dim = unit % kQuads * 4;
    const int second = Config::kHeadPair && head >= heads;  // of the pair: its states are those of the odd warps
    const int row = head - second * heads;  // of its warps
    const int first_row = second * Tr::kHeads + row;
    Partial sum;
#pragma unroll
    for (int w = 0; w < kWalkers; ++w)
      sum.m = fmaxf(sum.m, state_m[w * Tr::kPair * Tr::kHeads + first_row]);
#pragma unroll
    for (int w = 0; w < kWalkers; ++w) {
      const int i = w * Tr::kPair * Tr::kHeads + first_row;
      const float f = math::ptx_exp2(state_m[i] - finite_or_zero(sum.m));
      sum.add(f, state_d[i],
              *reinterpret_cast<const float4*>(merge + (w * Tr::kPair + second) * kMergeWarp + row * Tr::kMergePitch + dim));
    }
    if (item.num_chunks == 1) {
      finish<Config>(params, item.request, first_of_cta + head, dim, sum);
    } else {
      const int64_t state = first_state + item.chunk * chunk_stride + head;
      __stcg(reinterpret_cast<float4*>(params.partial_out + state * Tr::kHeadDim + dim), sum.o);
      if (dim == 0) params.partial_md[state] = make_float2(sum.m, sum.d);
    }
  }
  if (item.num_chunks == 1) return;

  // The last CTA to arrive merges the chunks. The barrier orders every thread's partials before the one atomic, which
  // wraps the counter back to zero for the next launch.
  __syncthreads();
  if (threadIdx.x == 0)
    *flag = ptx::atomic_inc_acq_rel(params.counters + int64_t(item.slot) * params.num_head_blocks + head_block,
                                    item.num_chunks - 1);
  ChunkMerge<Config, Tr> merge_chunks(params, item, units, first_state, chunk_stride);
  __syncthreads();
  if (*flag != uint32_t(item.num_chunks - 1)) return;
  merge_chunks.run(first_of_cta, smem);
}

template <class Config>
FI_DEVICE void batch_decode(const DecodeParams& params) {
  ptx::grid_launch_dependents();
  decode_item<Config, true>(params, nullptr, blockIdx.x / params.num_head_blocks, blockIdx.x % params.num_head_blocks);
}
template <class Config>
FI_DEVICE void batch_decode_rope(const DecodeRopeParams& params) {
  ptx::grid_launch_dependents();
  const uint32_t blocks = params.base.num_head_blocks;
  decode_item<Config, true>(params.base, params.turns, blockIdx.x / blocks, blockIdx.x % blocks);
}

}  // namespace fi
