// Attention of ragged queries over contiguous or paged keys and values on Hopper's own instructions (sm_90a): wgmma, the
// copy engine (TMA), register hand-over between warpgroups.
// One CTA computes work items of attention/prefill.cuh (PrefillItem means the same): kTileQ = 64 * kConsumers packed rows
// of one kv head over one range of keys, from the last tile of keys to the first. Each consumer warpgroup owns 64 rows; two
// producer warps keep kStages tiles of K and of V in flight (prefill_hopper_load.cuh).
// Grid: one CTA an item and kv head, or one a multiprocessor, which then claims one piece of work after the other and loads
// the next one's Q, K and V under the current one's end. Longest items first inside `heads_together` kv heads, whose K and V
// then share L2.
// Shared memory: Q [kSlots][kTileQ] | K [kStages][kTileKv] | V [kStages][kTileKv], each as panels of 64 columns, rows of
// 128 bytes, 128-byte swizzle | HopperShared. Registers: 512 threads start with 128; a producer keeps 32, a consumer takes 160.
// Why three warpgroups: the softmax of one hides behind the products of the other two, without being told to.
// Bytes moved: Q and O once; K and V once an item, mostly from L2. Arch: sm_90a only.
#pragma once
#include "attention/prefill_hopper_load.cuh"
#include "attention/prefill_hopper_logits.cuh"
#include "attention/prefill_hopper_store.cuh"
#include "attention/prefill_join.cuh"

namespace fi {

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
using MaskedTile = Constant<1>;
using PlainTile = Constant<0>;

// Tiles [first, last) of keys that a warpgroup's rows see; of those in [plain_first, plain_last) every row sees every key.
struct TileRange {
  int first, last, plain_first, plain_last;
};

// Two rows a lane (half 0: row lane / 4, half 1: that + 8): running maximum of raw logits and this lane's part of the sum.
struct HopperSoftmax {
  float m[2], d[2];
  float before[2];  // the maxima before the last tile
  float sum[2];     // of the last tile's weights
  bool rescale;     // some row of the warp has a new maximum

  FI_DEVICE void init() { m[0] = m[1] = -FI_INF, d[0] = d[1] = 0.f; }

  // Logits become weights. The sums and the output follow in `settle`, when the products that write the output are done.
  // base: what this lane's logits of a row have on top of s in this tile.
  template <int kRegs>
  FI_DEVICE void weigh(float (&s)[kRegs], float scale, const float (&base)[2]) {
    rescale = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = fmaxf(s[2 * h], s[2 * h + 1]);
#pragma unroll
      for (int n = 4; n < kRegs; n += 4) top = fmaxf(top, fmaxf(s[n + 2 * h], s[n + 2 * h + 1]));
      top += base[h];  // before the lanes compare theirs: base counts from a lane's own column
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 1));
      top = fmaxf(top, __shfl_xor_sync(kFullMask, top, 2));
      before[h] = m[h];
      // -inf - -inf is NaN and compares false: a row that has seen nothing stays as it is.
      const bool up = (top - m[h]) * scale > kRescaleThreshold;
      m[h] = up ? top : m[h];
      rescale = rescale || up;
    }
    rescale = __any_sync(kFullMask, rescale);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // Without a maximum all is -inf or NaN, by s or by base.
      const float shift = (m[h] == -FI_INF ? base[h] : base[h] - m[h]) * scale;
      sum[h] = 0.f;
#pragma unroll
      for (int n = 2 * h; n < kRegs; n += 4)
#pragma unroll
        for (int j = n; j < n + 2; ++j) {
          s[j] = math::ptx_exp2(fmaf(s[j], scale, shift));
          sum[h] += s[j];
        }
    }
  }

  template <int kRegs>
  FI_DEVICE void settle(float (&o)[kRegs], float scale) {
    if (rescale) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float ratio = before[h] == m[h] ? 1.f : math::ptx_exp2((before[h] - m[h]) * scale);
        d[h] *= ratio;
#pragma unroll
        for (int n = 2 * h; n < kRegs; n += 4) o[n] *= ratio, o[n + 1] *= ratio;
      }
    }
    d[0] += sum[0], d[1] += sum[1];
  }
};

// Maxima and denominators of a warpgroup's rows in the form of join_parts: one row tile of two halves.
struct HopperTotal {
  float m[1][2], d[1][2];
};

// A consumer warpgroup's share of a tile whose keys are split: 64 rows, which it joins without the other warpgroups.
template <class Config, class Params>
struct WarpgroupPart {
  const Params& params;
  HopperShared<Config>& shared;
  const HopperSlot& slot;
  int warpgroup;

  FI_DEVICE int thread() const { return thread_again() & 127; }
  FI_DEVICE void sync() const { asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory"); }
  FI_DEVICE uint32_t& arrived() const { return shared.arrived[warpgroup]; }
  FI_DEVICE uint32_t* counters() const { return params.counters + 1; }
  FI_DEVICE int chunk() const { return slot.item.chunk; }
  FI_DEVICE int chunks() const { return slot.item.num_chunks; }
  FI_DEVICE int64_t place(int chunk) const {
    return ((slot.item.first_slot + chunk) * int64_t(params.num_kv_heads) + slot.kv_head) * Config::kConsumers + warpgroup;
  }
};

// Tiles of keys for the rows [first_row, end_row) of a request, of which those before row 0 do not count.
template <class Config, class Params>
FI_DEVICE TileRange tile_range(const Params& params, const PrefillItem& item, int first_row, int end_row, int first, int last) {
  constexpr int kTileKv = Config::kTileKv;
  const int own = item.kv_len - item.qo_len, kv_end = item.kv_end;
  first_row = max(first_row, 0);
  if (first_row >= end_row) return {first, first, first, first};
  const int own_first = params.group.quotient(first_row) + own, own_last = params.group.quotient(end_row - 1) + own;
  TileRange r;
  const int seen_end = max(params.causal ? min(own_last + 1, kv_end) : kv_end, 0);
  const int plain_end = max(params.causal ? min(own_first + 1, kv_end) : kv_end, 0);
  const int seen_begin = max(own_first - params.window_left, 0), plain_begin = max(own_last - params.window_left, 0);
  r.last = max(min(ceil_div(seen_end, kTileKv), last), first);
  r.first = min(max(seen_begin / kTileKv, first), r.last);
  r.plain_last = max(min(plain_end / kTileKv, r.last), r.first);
  r.plain_first = max(min(ceil_div(plain_begin, kTileKv), r.plain_last), r.first);
  return r;
}

// One item's 64 rows, by a consumer warpgroup. The order of a step hides the softmax of tile i behind p v of tile i - 1 and the other
// warpgroups' products: q k of i, p v of i - 1, wait for q k, softmax of i, wait for p v, rescale.
template <class Config, class Params>
FI_DEVICE void consume(const Params& params, HopperShared<Config>& shared, uint32_t smem, int warpgroup,
                       const Ring<Config::kSlots>& slot, Ring<Config::kStages>& k_ring, Ring<Config::kStages>& v_ring) {
  using Shape = HopperShape<Config>;
  using T = typename Config::T;
  using Logits = typename Config::Logits;
  constexpr int kTileKv = Shape::kTileKv, kTileQ = Shape::kTileQ, kSteps = Shape::kSteps;
  const PrefillItem& item = shared.slots[slot.at].item;
  const int lane = lane_id(), group = params.group.divisor, kv_head = shared.slots[slot.at].kv_head;
  const int row0 = item_row(item, kTileQ) + warpgroup * 64;
  // REDUX leaves its result in a uniform register: the loops' counters, stages and descriptors then are uniform, too.
  const int first = __reduce_max_sync(kFullMask, item.kv_begin / kTileKv);
  const int last = __reduce_max_sync(kFullMask, ceil_div(item.kv_end, kTileKv));
  TileRange range = tile_range<Config>(params, item, row0, min(row0 + 64, item.qo_len * group), first, last);
  range.first = __reduce_max_sync(kFullMask, range.first), range.last = __reduce_max_sync(kFullMask, range.last);
  range.plain_first = __reduce_max_sync(kFullMask, range.plain_first);
  range.plain_last = __reduce_max_sync(kFullMask, range.plain_last);
  const uint32_t q_smem = smem + slot.at * Shape::kQBytes;

  if constexpr (Config::kQueryBoxes) {
    ptx::mbarrier_wait(ptx::smem_address(&shared.q_full[slot.at]), slot.phase);
  } else {
    // A group that does not divide the tile: packed rows are gathered by the warpgroup that reads them.
    constexpr int kChunks = Config::kHeadDimQK / 8;
    const T* const q = static_cast<const T*>(params.q) + item.q_row * params.q_stride_n + kv_head * group * params.q_stride_h;
    for (int i = threadIdx.x & 127; i < 64 * kChunks; i += 128) {
      const int row = i / kChunks, chunk = i % kChunks, packed = max(row0 + row, 0), qo_idx = params.group.quotient(packed);
      const uint32_t to = q_smem + chunk / 8 * Shape::kQPanel + (warpgroup * 64 + row) * 128 + (chunk % 8 ^ row % 8) * 16;
      const bool valid = row0 + row >= 0 && qo_idx < item.qo_len;
      const T* from = q + qo_idx * params.q_stride_n + (packed - qo_idx * group) * params.q_stride_h + chunk * 8;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    ptx::fence_proxy_async();
    asm volatile("bar.sync %0, 128;" ::"r"(warpgroup + 1) : "memory");  // named barrier of this warpgroup: its Q is there
  }

  // Descriptors of stage 0 and k step 0; in 16-byte units, a k step is 2 inside a panel of Q and K, and 16 rows down V.
  const uint64_t q_desc = ptx::wgmma_descriptor(q_smem + warpgroup * 64 * 128, 16, 1024);
  const uint64_t k_desc = ptx::wgmma_descriptor(smem + Shape::kK, 16, Shape::kKRows8);
  const uint64_t v_desc = ptx::wgmma_descriptor(smem + Shape::kV, Shape::kKvPanel, Shape::kVRows8);
  const uint32_t k_full = ptx::smem_address(shared.k_full), k_empty = ptx::smem_address(shared.k_empty);
  const uint32_t v_full = ptx::smem_address(shared.v_full), v_empty = ptx::smem_address(shared.v_empty);
  using Transform = HopperLogits<Logits>;
  const float scale = Transform::scale(params);

  float o[Shape::kORegs];
  uint32_t p[kSteps][4];
#pragma unroll
  for (int i = 0; i < Shape::kORegs; ++i) o[i] = 0.f;
  HopperSoftmax state;
  state.init();
  typename Transform::Rows rows;
  if constexpr (Transform::kByTile) {
    int qo_idx[2], qo_head[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int packed = max(row0 + (warp_id() & 3) * 16 + h * 8 + (lane >> 2), 0);  // nobody's row has row 0's head
      qo_idx[h] = params.group.quotient(packed), qo_head[h] = kv_head * group + packed - qo_idx[h] * group;
    }
    rows = Transform::rows(params, item, qo_idx, qo_head, kv_head, 2 * (lane & 3));
  }

  auto wait = [&](uint32_t full, const Ring<Config::kStages>& ring) { ptx::mbarrier_wait(full + ring.at * 8, ring.phase); };
  auto release = [&](uint32_t empty, Ring<Config::kStages>& ring) {
    if (lane == 0) ptx::mbarrier_arrive(empty + ring.at * 8);
    ring.advance();
  };
  auto multiply_qk = [&](float(&s)[Shape::kSRegs]) {
    const uint64_t k = k_desc + k_ring.at * (Shape::kKBytes / 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < Config::kHeadDimQK / 16; ++step) {
      const int inside = (step & 3) * 2, panel = step >> 2;
      ptx::Wgmma<T, kTileKv>::ss(s, q_desc + inside + panel * (Shape::kQPanel / 16),
                                 k + inside + panel * (Shape::kKvPanel / 16), step != 0);
    }
    ptx::wgmma_commit();
  };
  auto multiply_pv = [&] {
    const uint64_t v = v_desc + v_ring.at * (Shape::kVBytes / 16);
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) ptx::Wgmma<T, Config::kHeadDimVO>::rs(o, p[step], v + step * (Shape::kVRows8 / 8), 1);
    ptx::wgmma_commit();
  };
  auto pack = [&](const float(&s)[Shape::kSRegs]) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int j = 0; j < 4; ++j) p[step][j] = ptx::pack2<T>(s[8 * step + 2 * j], s[8 * step + 2 * j + 1]);
  };
  // Zeros for the keys of a tile that the built-in masks hide.
  auto clear_unseen = [&](float(&s)[Shape::kSRegs], int start) {
    const int thread = thread_again(), column = start + 2 * (thread & 3);
    const int warp_row = item_row(item, kTileQ) + (thread >> 5) * 16;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int packed = max(warp_row + h * 8 + ((thread & 31) >> 2), 0);
      const int own = params.group.quotient(packed) + item.kv_len - item.qo_len;
      const int last_seen = (params.causal ? min(own, item.kv_end - 1) : item.kv_end - 1) - column;
      const int first_seen = own - params.window_left - column;
#pragma unroll
      for (int n = 0; n < Shape::kSRegs; n += 4)
#pragma unroll
        for (int j = 0; j < 2; ++j)
          if (2 * n + j > last_seen || 2 * n + j < first_seen) s[n + 2 * h + j] = 0.f;
    }
  };
  // Scale, bias, cap and masks of the tile that starts at key `start`.
  auto transform = [&](float(&s)[Shape::kSRegs], int start, auto masked) {
    constexpr bool kMasked = decltype(masked)::value || Logits::kHasMask;
    if constexpr (Transform::kByTile) {
      // What a row does not see (NaN behind a request, say) must not reach what it sees.
      if constexpr (decltype(masked)::value && Transform::kShares) clear_unseen(s, start);
      Transform::apply(rows, s, start);
    }
    if constexpr (Transform::kByElement || kMasked) {
      const int thread = thread_again(), column = start + 2 * (thread & 3);
      const int warp_row = item_row(item, kTileQ) + (thread >> 5) * 16;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int packed = max(warp_row + h * 8 + ((thread & 31) >> 2), 0), qo_idx = params.group.quotient(packed);
        const int own = qo_idx + item.kv_len - item.qo_len, kv_end = item.kv_end;
        const int last_seen = (params.causal ? min(own, kv_end - 1) : kv_end - 1) - column;
        const int first_seen = own - params.window_left - column;
        const auto row = Logits::row(params, item, qo_idx, kv_head * group + packed - qo_idx * group, kv_head);
#pragma unroll
        for (int n = 0; n < Shape::kSRegs; n += 4)
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = s[n + 2 * h + j];
            if constexpr (Transform::kByElement) x = Logits::apply(params, row, x, column + 2 * n + j, n % 16 == 0);
            if constexpr (kMasked) {
              bool seen = 2 * n + j <= last_seen && 2 * n + j >= first_seen;
              if constexpr (Logits::kHasMask) seen = seen && Logits::mask(params, row, column + 2 * n + j);
              if (!seen) x = Logits::kUseSoftmax ? -FI_INF : 0.f;
            }
          }
      }
    }
  };
  struct Base {
    float of[2] = {0.f, 0.f};
  };
  auto base_of = [&](int start) {
    Base b;
    if constexpr (Transform::kHasBase)
#pragma unroll
      for (int h = 0; h < 2; ++h) b.of[h] = Transform::base(params, rows, h, start);
    return b;
  };
  auto softmax = [&](float(&s)[Shape::kSRegs], const Base& base) {
    if constexpr (Logits::kUseSoftmax) state.weigh(s, scale, base.of);
  };

  // Tiles are counted from the end: i is tile last - 1 - i.
  auto skip = [&] {  // a tile that no row of this warpgroup sees; waiting keeps its arrivals in their phase
    wait(k_full, k_ring);
    release(k_empty, k_ring);
    wait(v_full, v_ring);
    release(v_empty, v_ring);
  };
  auto step = [&](int i, auto masked) {
    float s[Shape::kSRegs];
    wait(k_full, k_ring);
    multiply_qk(s);
    wait(v_full, v_ring);
    multiply_pv();
    const Base base = base_of((last - 1 - i) * kTileKv);
    ptx::wgmma_wait<1>();
    ptx::wgmma_arrived(s);
    release(k_empty, k_ring);
    transform(s, (last - 1 - i) * kTileKv, masked);
    softmax(s, base);
    ptx::wgmma_wait<0>();
    ptx::wgmma_arrived(o);
    release(v_empty, v_ring);
    pack(s);
    if constexpr (Logits::kUseSoftmax) state.settle(o, scale);
  };

  int i = 0;
#pragma unroll 1
  for (; i < last - range.last; ++i) skip();
  if (range.first < range.last) {
    {
      float s[Shape::kSRegs];
      wait(k_full, k_ring);
      multiply_qk(s);
      ptx::wgmma_wait<0>();
      ptx::wgmma_arrived(s);
      release(k_empty, k_ring);
      transform(s, (last - 1 - i) * kTileKv, MaskedTile{});
      softmax(s, base_of((last - 1 - i) * kTileKv));
      pack(s);
      if constexpr (Logits::kUseSoftmax) state.settle(o, scale);
      ++i;
    }
#pragma unroll 1
    for (; i < last - range.plain_last; ++i) step(i, MaskedTile{});
#pragma unroll 1
    for (; i < last - range.plain_first; ++i) step(i, PlainTile{});
#pragma unroll 1
    for (; i < last - range.first; ++i) step(i, MaskedTile{});
    wait(v_full, v_ring);
    multiply_pv();
    ptx::wgmma_wait<0>();
    ptx::wgmma_arrived(o);
    release(v_empty, v_ring);
  }
#pragma unroll 1
  for (; i < last - first; ++i) skip();

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    state.d[h] += __shfl_xor_sync(kFullMask, state.d[h], 1);
    state.d[h] += __shfl_xor_sync(kFullMask, state.d[h], 2);
  }
  if constexpr (Logits::kUseSoftmax) {
    if (item.num_chunks > 1) {
      const WarpgroupPart<Config, Params> part{params, shared, shared.slots[slot.at], warpgroup};
      HopperTotal total{{{state.m[0], state.m[1]}}, {{state.d[0], state.d[1]}}};
      if (!join_parts<4>(params, part, reinterpret_cast<float(&)[1][Shape::kORegs / 4][4]>(o), total, scale)) return;
#pragma unroll
      for (int h = 0; h < 2; ++h) state.m[h] = total.m[0][h], state.d[h] = total.d[0][h];
    }
  }
  const float offset = Transform::offset(params);
  const float m[2] = {fmaf(state.m[0], scale, offset), fmaf(state.m[1], scale, offset)};
  store_hopper<Config>(params, item, o, m, state.d, shared.slots[slot.at].kv_head, q_smem, warpgroup);
}

template <class Config, class Params>
FI_DEVICE void prefill_hopper(const Params& params) {
  using Shape = HopperShape<Config>;
  extern __shared__ __align__(1024) uint8_t smem[];
  auto& shared = *reinterpret_cast<HopperShared<Config>*>(smem + Shape::kShared);
  const uint32_t base = ptx::smem_address(smem);
  // The same for a whole warpgroup and warp; the shuffle tells the compiler.
  const int warpgroup = __shfl_sync(kFullMask, threadIdx.x / 128, 0), warp = __shfl_sync(kFullMask, threadIdx.x / 32, 0);
  constexpr int kConsumerWarps = 4 * Shape::kConsumers;

  ptx::grid_launch_dependents();
  if (threadIdx.x == 0) {
    ptx::mbarrier_init(ptx::smem_address(&shared.tail), 1);
    for (int s = 0; s < Shape::kStages; ++s) {
      ptx::mbarrier_init(ptx::smem_address(&shared.k_full[s]), 1);
      ptx::mbarrier_init(ptx::smem_address(&shared.v_full[s]), 1);
      ptx::mbarrier_init(ptx::smem_address(&shared.k_empty[s]), kConsumerWarps);
      ptx::mbarrier_init(ptx::smem_address(&shared.v_empty[s]), kConsumerWarps);
    }
    for (int s = 0; s < Shape::kSlots; ++s) {
      ptx::mbarrier_init(ptx::smem_address(&shared.q_full[s]), 1);
      ptx::mbarrier_init(ptx::smem_address(&shared.slot_full[s]), 32);
      ptx::mbarrier_init(ptx::smem_address(&shared.slot_empty[s]), 32 * (1 + kConsumerWarps));
    }
    ptx::mbarrier_init_fence();
  } else if (threadIdx.x == kConsumerWarps * 32) {
    ptx::tma_prefetch(params.q_map);
    ptx::tma_prefetch(params.k_map);
    ptx::tma_prefetch(params.v_map);
  }
  // Items are the plan's, which no kernel writes: their latency passes while the kernel in front ends.
  int word = 0, kv_head = 0;
  if (warp == kConsumerWarps) word = item_word(params, blockIdx.x, kv_head);
  ptx::grid_wait();
  __syncthreads();  // barriers: initialised by the first thread, used by all

  if (warpgroup == Shape::kConsumers) {
    ptx::lower_registers<Config::kProducerRegs>();
    if (warp == kConsumerWarps)
      produce_items<Config>(params, shared, base, word, kv_head);
    else if (warp == kConsumerWarps + 1)
      produce_v<Config>(params, shared, base);
  } else {
    ptx::raise_registers<Config::kConsumerRegs>();
    Ring<Config::kSlots> slot;
    Ring<Config::kStages> k_ring, v_ring;
    auto item = [&](int& more) {
      ptx::mbarrier_wait(ptx::smem_address(&shared.slot_full[slot.at]), slot.phase);
      if (__reduce_max_sync(kFullMask, shared.slots[slot.at].item.qo_len) < 0) {
        more = 0;
        return;
      }
      more = __reduce_max_sync(kFullMask, shared.slots[slot.at].more);
      consume<Config>(params, shared, base, warpgroup, slot, k_ring, v_ring);
    };
    int more = 1;
    if constexpr (Config::kSlots == 1) {
      item(more);  // one item a CTA, and no loop, which would keep the descriptors in ordinary registers
    } else {
#pragma unroll 1
      while (more) {
        item(more);
        ptx::fence_proxy_async();  // the output lay where the copy engine writes the Q after the next
        __syncwarp();
        ptx::mbarrier_arrive(ptx::smem_address(&shared.slot_empty[slot.at]));
        slot.advance();
      }
    }
  }
}

}  // namespace fi
