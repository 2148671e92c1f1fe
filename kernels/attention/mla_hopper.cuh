// Latent attention over a paged cache on Hopper's own instructions (sm_90a): wgmma, the copy engine (TMA), register hand-over.
// One CTA computes one work item of attention/mla.cuh: 64 packed rows over a range of keys, from the last tile to the first.
// A tile is 64 latent rows, and there is room for two: even tiles lie in stage 0, odd ones in stage 1. Consumer warpgroup w
// computes the logits and weights of the tiles in stage w (64 rows x 64 keys); both add p v of every tile to their half of
// the 512 columns, since 64 x 512 accumulators are two warpgroups' registers. Weights go to the other warpgroup through the
// tile's kpe columns, which nobody reads any more.
// A tile is loaded in quarters of ckv, the last one with kpe. Each comes as soon as the one warpgroup that reads it as values
// (and the weights on kpe) is done with it: there is no memory for a third tile, so that a load begins early is what counts.
// Grid: items, longest first. Shared memory: Q [9 panels][64 rows][128 B] | stages [2]: quarters [4] of ckv [8 groups of 8
// rows][2 panels][8][128 B], kpe [64][128 B], all with the 128-byte swizzle | MlaHopperShared.
// Bytes moved: q and o once, a latent row once an item. Arch: sm_90a only.
#pragma once
#include "attention/mla_hopper_load.cuh"
#include "attention/mla_join.cuh"
#include "attention/mla_output.cuh"
#include "attention/prefill_logits.cuh"
#include "attention/prefill_softmax.cuh"
#include "ptx/barrier.cuh"
#include "ptx/wgmma.cuh"

namespace fi {

// A consumer warpgroup's state: two rows a lane (half 0: row lane / 4 of the warp's 16, half 1: that + 8).
struct MlaRowState {
  float m[2], d[2];
  float next[2], sum[2];  // of the tile whose weights have just been made
};

template <class Config, int kWg, class Params>
FI_DEVICE void consume_mla(const Params& params, MlaHopperShared& shared, uint8_t* memory, float (&o)[2][64], MlaRowState& state) {
  using T = typename Config::T;
  using Logits = typename Config::Logits;
  constexpr int kOther = 1 - kWg, kRegs = kMlaKeys / 2;
  const PrefillItem& item = shared.item;
  const int lane = lane_id(), heads = params.group.divisor, warp_row = (warp_id() & 3) * 16;
  // REDUX leaves its result in a uniform register: the loop's counters and phases then are uniform, too.
  const int last = __reduce_max_sync(kFullMask, ceil_div(item.kv_end, kMlaKeys));
  const int tiles = last - __reduce_max_sync(kFullMask, item.kv_begin / kMlaKeys);
  const float scale = Logits::kLinear ? params.sm_scale_log2 : 1.f;

  const uint32_t smem = ptx::smem_address(memory), own = smem + kMlaQ + kWg * kMlaStage, other = smem + kMlaQ + kOther * kMlaStage;
  const uint64_t q_desc = ptx::wgmma_descriptor(smem, 16, 1024);
  const uint64_t k_desc = ptx::wgmma_descriptor(own, 16, 1024), kpe_desc = ptx::wgmma_descriptor(own + kMlaKpeAt, 16, 1024);
  const uint64_t v_own = ptx::wgmma_descriptor(own + 2 * kWg * kMlaQuarter, kMlaPanel, 1024);
  const uint64_t v_other = ptx::wgmma_descriptor(other + 2 * kWg * kMlaQuarter, kMlaPanel, 1024);
  const uint64_t p_other = ptx::wgmma_descriptor(other + kMlaKpeAt, 16, 1024);

  float(&all)[128] = reinterpret_cast<float(&)[128]>(o);
  uint32_t p[kMlaKeys / 16][4];

  auto multiply_qk = [&](float(&s)[kRegs], int phase) {
#pragma unroll
    for (int number = 0; number < 4; ++number) {
      const int quarter = mla_quarter(kWg, number);
      ptx::mbarrier_wait(ptx::smem_address(&shared.full[kWg][quarter]), phase);
      if constexpr (Config::kLoad == MlaLoad::kRows) ptx::fence_proxy_async();  // written by cp.async
      if (number == 0) ptx::wgmma_fence();
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        const int panel = step >> 2, inside = (step & 3) * 2;
        ptx::Wgmma<T, kMlaKeys>::ss(s, q_desc + (2 * quarter + panel) * (kMlaPanel / 16) + inside,
                                    k_desc + (2 * quarter + panel) * (kMlaPanel / 16) + inside, number + step != 0);
      }
    }
#pragma unroll
    for (int step = 0; step < 4; ++step)
      ptx::Wgmma<T, kMlaKeys>::ss(s, q_desc + 8 * (kMlaPanel / 16) + step * 2, kpe_desc + step * 2, 1);
    ptx::wgmma_commit();
  };
  // p v of both quarters: a group of products each, so that the first becomes free before the second, or one for both, which
  // reads the other's weights from shared memory once. Products of both widths on the same accumulators make ptxas wait
  // behind each (C7511).
  constexpr bool kBoth = Config::kColumns == 256;
  auto multiply_own = [&] {
    ptx::wgmma_fence();
#pragma unroll
    for (int q = 0; q < (kBoth ? 1 : 2); ++q) {
#pragma unroll
      for (int step = 0; step < kMlaKeys / 16; ++step) {
        if constexpr (kBoth)
          ptx::Wgmma<T, 256>::rs(all, p[step], v_own + step * (2 * 1024 / 16), 1);
        else
          ptx::Wgmma<T, 128>::rs(o[q], p[step], v_own + q * (kMlaQuarter / 16) + step * (2 * 1024 / 16), 1);
      }
      ptx::wgmma_commit();
    }
  };
  auto multiply_other = [&] {
    ptx::wgmma_fence();
#pragma unroll
    for (int q = 0; q < (kBoth ? 1 : 2); ++q) {
#pragma unroll
      for (int step = 0; step < kMlaKeys / 16; ++step) {
        if constexpr (kBoth)
          ptx::Wgmma<T, 256>::st(all, p_other + step * 2, v_other + step * (2 * 1024 / 16), 1);
        else
          ptx::Wgmma<T, 128>::st(o[q], p_other + step * 2, v_other + q * (kMlaQuarter / 16) + step * (2 * 1024 / 16), 1);
      }
      ptx::wgmma_commit();
    }
  };
  auto release = [&](int stage, int quarter) {
    if (lane == 0) ptx::mbarrier_arrive(ptx::smem_address(&shared.empty[stage][quarter]));
  };
  // The first quarter's product is done, if it is one of its own; then both.
  auto first_done = [&](int stage) {
    if constexpr (kBoth) return;
    ptx::wgmma_wait<1>();
    release(stage, 2 * kWg);
  };
  auto done = [&](int stage) {
    ptx::wgmma_wait<0>();
    if constexpr (kBoth) release(stage, 2 * kWg);
    release(stage, 2 * kWg + 1);
    ptx::wgmma_arrived(o[0]);
    ptx::wgmma_arrived(o[1]);
  };
  // Scale, cap, a variant's functions, and -inf for what a row does not see.
  auto transform = [&](float(&s)[kRegs], int start, bool masked) {
    if (!masked && Logits::kLinear && !Logits::kHasMask) return;
    int first_row = item.q_tile * kMlaRows + warp_row + (lane >> 2);
    asm volatile("" : "+r"(first_row));  // what follows from it is computed here: there are no registers to keep it in
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int packed = first_row + h * 8, qo_idx = params.group.quotient(packed);
      const int at = qo_idx + item.kv_len - item.qo_len, column = start + 2 * (lane & 3);
      const int last_seen = (params.causal ? min(at, item.kv_end - 1) : item.kv_end - 1) - column;
      const int first_seen = at - params.window_left - column;
      const auto row = Logits::row(params, item, qo_idx, packed - qo_idx * heads, 0);
#pragma unroll
      for (int n = 0; n < kRegs; n += 4)
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[n + 2 * h + j];
          if constexpr (!Logits::kLinear) x = Logits::apply(params, row, x, column + 2 * n + j, n % 16 == 0);
          bool seen = 2 * n + j <= last_seen && 2 * n + j >= first_seen;
          if constexpr (Logits::kHasMask) seen = seen && Logits::mask(params, row, column + 2 * n + j);
          if (!seen) x = -FI_INF;
        }
    }
  };
  // Logits become weights in p, for the maxima state.next, which lag behind as in the prefill kernels: with most tiles no
  // thread sees one rise, and then nobody needs its row's maximum.
  // Before the exponentials the other's first quarter may be released, `first_done` is called if `pending`.
  auto weigh = [&](float(&s)[kRegs], bool pending) {
    float top[2];
    bool up = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float tree[kRegs / 4];
#pragma unroll
      for (int n = 0; n < kRegs; n += 4) tree[n >> 2] = fmaxf(s[n + 2 * h], s[n + 2 * h + 1]);
#pragma unroll
      for (int half = kRegs / 8; half > 0; half >>= 1)
#pragma unroll
        for (int n = 0; n < half; ++n) tree[n] = fmaxf(tree[n], tree[n + half]);
      top[h] = tree[0], state.next[h] = state.m[h];
      // -inf - -inf is NaN and compares false: a row that has seen nothing stays as it is.
      up = up || (top[h] - state.m[h]) * scale > kRescaleThreshold;
    }
    if (__any_sync(kFullMask, up)) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        top[h] = fmaxf(top[h], __shfl_xor_sync(kFullMask, top[h], 1));
        top[h] = fmaxf(top[h], __shfl_xor_sync(kFullMask, top[h], 2));
        state.next[h] = (top[h] - state.m[h]) * scale > kRescaleThreshold ? top[h] : state.m[h];
      }
    }
    if (pending) first_done(kOther);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float shift = state.next[h] == -FI_INF ? 0.f : -state.next[h] * scale;
      state.sum[h] = 0.f;
#pragma unroll
      for (int n = 2 * h; n < kRegs; n += 4)
#pragma unroll
        for (int j = n; j < n + 2; ++j) {
          s[j] = math::ptx_exp2(fmaf(s[j], scale, shift));
          state.sum[h] += s[j];
        }
    }
#pragma unroll
    for (int step = 0; step < kMlaKeys / 16; ++step)
#pragma unroll
      for (int j = 0; j < 4; ++j) p[step][j] = ptx::pack2<T>(s[8 * step + 2 * j], s[8 * step + 2 * j + 1]);
  };
  // Weights and maxima for the other warpgroup.
  auto publish = [&] {
    const int row = warp_row + (lane >> 2);
    if constexpr (Config::kLoad == MlaLoad::kFp8) {  // which has no register to spare for where stmatrix stores to
      uint8_t* const to = memory + kMlaQ + kWg * kMlaStage + kMlaKpeAt + row * 128 + (lane & 3) * 4;
#pragma unroll
      for (int step = 0; step < kMlaKeys / 16; ++step)
#pragma unroll
        for (int j = 0; j < 4; ++j)  // rows 8 apart have the same swizzle
          *reinterpret_cast<uint32_t*>(to + (j & 1) * 1024 + ((2 * step + (j >> 1)) ^ (row & 7)) * 16) = p[step][j];
    } else {
      const int stored = warp_row + (lane & 15);
      const uint32_t to = own + kMlaKpeAt + stored * 128;
#pragma unroll
      for (int step = 0; step < kMlaKeys / 16; ++step)
        ptx::stmatrix_x4(to + ((2 * step + (lane >> 4)) ^ (stored & 7)) * 16, p[step]);
    }
    if ((lane & 3) == 0) shared.m[kWg][row] = state.next[0], shared.m[kWg][row + 8] = state.next[1];
    ptx::fence_proxy_async();
    ptx::barrier_arrive(kMlaWeights + kWg, 256);
  };
  // The maxima become state.next: the output and the denominator follow. No product may be writing o.
  auto raise = [&] {
    if (__any_sync(kFullMask, state.next[0] != state.m[0] || state.next[1] != state.m[1])) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float ratio = state.next[h] == state.m[h] ? 1.f : math::ptx_exp2((state.m[h] - state.next[h]) * scale);
        state.m[h] = state.next[h];
        state.d[h] *= ratio;
#pragma unroll
        for (int n = 2 * h; n < 128; n += 4) o[n >> 6][n & 63] *= ratio, o[n >> 6][(n & 63) + 1] *= ratio;
      }
    }
  };
  auto follow = [&] {  // the other's weights and maxima are there
    ptx::barrier_sync(kMlaWeights + kOther, 256);
#pragma unroll
    for (int h = 0; h < 2; ++h) state.next[h] = shared.m[kOther][warp_row + h * 8 + (lane >> 2)];
    raise();
  };
  // Keys that every row of the item sees: no element of such a tile needs a look.
  const int first_row = item.q_tile * kMlaRows, end_row = min(first_row + kMlaRows, item.qo_len * heads);
  const int at_first = int(params.group.quotient(first_row)) + item.kv_len - item.qo_len;
  const int at_last = int(params.group.quotient(end_row - 1)) + item.kv_len - item.qo_len;
  const int plain_end = params.causal ? min(at_first + 1, item.kv_end) : item.kv_end, plain_begin = at_last - params.window_left;
  auto masked = [&](int start) { return start + kMlaKeys > plain_end || start < plain_begin; };

#pragma unroll 1
  for (int i = 0; i < tiles; i += 2) {
    const int phase = i >> 1 & 1, start = (last - 1 - i - kWg) * kMlaKeys;
    const bool odd = i + 1 < tiles;
    if constexpr (kWg == 0) {
      float s[kRegs];
      multiply_qk(s, phase);
      ptx::wgmma_wait<0>();
      ptx::wgmma_arrived(s);
      transform(s, start, masked(start));
      weigh(s, false);
      publish();
      raise();
      state.d[0] += state.sum[0], state.d[1] += state.sum[1];
      multiply_own();
      first_done(0);
      done(0);
      if (odd) {
        follow();
        multiply_other();
        first_done(1);
        done(1);
      }
    } else {
      float s[kRegs];
      if (odd) {
        multiply_qk(s, phase);
        ptx::wgmma_wait<0>();
        ptx::wgmma_arrived(s);
      }
      follow();
      multiply_other();
      if (odd) {  // the weights hide behind that product
        transform(s, start, masked(start));
        weigh(s, true);
        publish();
      } else {
        first_done(0);
      }
      done(0);
      if (odd) {
        raise();
        state.d[0] += state.sum[0], state.d[1] += state.sum[1];
        multiply_own();
        first_done(1);
        done(1);
      }
    }
  }
}

// Q, by the consumers: row r of panel c at its swizzled place; rows past the request's last are zeros.
template <class Config, class Params>
FI_DEVICE void load_mla_queries(const Params& params, const PrefillItem& item, uint8_t* smem) {
  using T = typename Config::T;
  const int heads = params.group.divisor, sub = threadIdx.x & 7;
#pragma unroll
  for (int pass = 0; pass < kMlaRows / 32; ++pass) {
    const int r = (threadIdx.x >> 3) + pass * 32, packed = item.q_tile * kMlaRows + r;
    const int qo_idx = params.group.quotient(packed), head = packed - qo_idx * heads;
    const T* const nope = static_cast<const T*>(params.q) + (item.q_row + qo_idx) * params.q_stride_n + head * params.q_stride_h;
    const T* const pe = static_cast<const T*>(params.q_pe) + (item.q_row + qo_idx) * params.q_pe_stride_n + head * params.q_pe_stride_h;
#pragma unroll
    for (int panel = 0; panel < 9; ++panel) {
      uint8_t* const to = smem + panel * kMlaPanel + r * 128 + (sub ^ (r & 7)) * 16;
      ptx::cp_async_16(to, (panel < 8 ? nope + panel * 64 : pe) + sub * 8, qo_idx < item.qo_len);
    }
  }
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  ptx::fence_proxy_async();
  ptx::barrier_sync(kMlaConsumers, 256);  // Q: written by both warpgroups, read by both
}

// The end of an item, by both consumer warpgroups: wg has columns [256 wg, 256 wg + 256).
template <class Config, class Params>
FI_DEVICE void finish_mla(const Params& params, MlaHopperShared& shared, uint8_t* memory, float (&o)[2][64], MlaRowState& state, int wg) {
  using Logits = typename Config::Logits;
  const PrefillItem& item = shared.item;
  const int lane = lane_id(), warp_row = (warp_id() & 3) * 16;
  const float scale = Logits::kLinear ? params.sm_scale_log2 : 1.f;
  float(&all)[128] = reinterpret_cast<float(&)[128]>(o);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float& d = state.d[h];
    d += __shfl_xor_sync(kFullMask, d, 1);
    d += __shfl_xor_sync(kFullMask, d, 2);
    if ((lane & 3) == 0) shared.d[wg][warp_row + h * 8 + (lane >> 2)] = d;
  }
  ptx::barrier_sync(kMlaConsumers, 256);  // denominators: of both warpgroups' tiles
  MlaTotal total;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = warp_row + h * 8 + (lane >> 2);
    total.m[0][h] = state.m[h], total.d[0][h] = shared.d[0][row] + shared.d[1][row];
  }
  if (item.num_chunks > 1) {  // Q's memory is free: both warpgroups' products are done
    MlaJoin<Config, kMlaRows, 256, 32>::run(params, shared, reinterpret_cast<float*>(memory), all, total, scale,
                                            warp_row + (lane >> 2), wg * 256 + 2 * (lane & 3), wg == 0 && (lane & 3) == 0,
                                            [] { ptx::barrier_sync(kMlaConsumers, 256); });
    return;
  }
  store_mla<Config>(params, item, all, total, scale, 0.f, item.q_tile * kMlaRows + warp_row, wg * 256, wg == 0);
}

// Config: T, KV (T, or fp8 with kLoad kFp8), O, kLoad, kColumns (128 or 256, of a product p v), kTokenScales (fp8: a factor
// each 128 columns of a token), Logits.
template <class Config, class Params>
FI_DEVICE void mla_hopper(const Params& params) {
  static_assert(!Config::Logits::kHasQuery && !Config::Logits::kHasKey && !Config::Logits::kHasOutput && Config::Logits::kUseSoftmax);
  constexpr bool kBoxes = Config::kLoad == MlaLoad::kBoxes, kFp8 = Config::kLoad == MlaLoad::kFp8;
  // A CTA starts with 384 x 168 or, with two warpgroups that widen, 512 x 128 registers, and has no more.
  constexpr int kProducers = kFp8 ? 2 : 1, kProducerRegs = kFp8 ? 48 : kBoxes ? 56 : 88, kConsumerRegs = kBoxes ? 224 : 208;
  static_assert(kProducers * kProducerRegs + 2 * kConsumerRegs <= (kFp8 ? 512 : 504));
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<MlaHopperShared*>(smem + kMlaQ + 2 * kMlaStage);
  // The same for a whole warpgroup and warp; the shuffle tells the compiler.
  const int warpgroup = __shfl_sync(kFullMask, threadIdx.x / 128, 0), warp = __shfl_sync(kFullMask, threadIdx.x / 32, 0);

  ptx::grid_launch_dependents();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 8; ++i) {
      ptx::mbarrier_init(ptx::smem_address(&shared.full[i >> 2][i & 3]), kBoxes ? 1 : kFp8 ? 8 : 64);
      ptx::mbarrier_init(ptx::smem_address(&shared.empty[i >> 2][i & 3]), 4);
    }
    for (int i = 0; i < 4; ++i) ptx::mbarrier_init(ptx::smem_address(&shared.tail[i]), 1);
    ptx::mbarrier_init_fence();
  } else if (kBoxes && threadIdx.x == 256) {
    ptx::tma_prefetch(params.ckv_map);
    ptx::tma_prefetch(params.kpe_map);
  }
  const PrefillItem item = params.items[blockIdx.x];
  if (item.qo_len == 0) {  // padding of a captured graph
    ptx::grid_wait();
    return;
  }
  if (threadIdx.x == 0) shared.item = item;
  __syncthreads();  // barriers and the item: written by the first thread, read by all

  if (warpgroup >= 2) {
    ptx::lower_registers<kProducerRegs>();
    if constexpr (Config::kLoad == MlaLoad::kRows)
      gather_mla<Config>(params, shared, smem + kMlaQ, item, (warp - 8) >> 1);
    else if constexpr (!kBoxes)
      widen_mla<Config>(params, shared, smem + kMlaQ, item);
    else if (warp < 10)
      produce_mla(params, shared, smem + kMlaQ, item, warp - 8);
  } else {
    ptx::raise_registers<kConsumerRegs>();
    ptx::grid_wait();
    load_mla_queries<Config>(params, item, smem);
    float o[2][64];  // of this warpgroup's quarters
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i >> 6][i & 63] = 0.f;
    MlaRowState state{{-FI_INF, -FI_INF}, {0.f, 0.f}, {-FI_INF, -FI_INF}, {0.f, 0.f}};
    if (warpgroup == 0)
      consume_mla<Config, 0>(params, shared, smem, o, state);
    else
      consume_mla<Config, 1>(params, shared, smem, o, state);
    finish_mla<Config>(params, shared, smem, o, state, warpgroup);
  }
}

}  // namespace fi
