// What the producers of the Hopper prefill kernel do: they hand out work items and keep K and V coming.
// Two warps of the producer warpgroup work. The first claims items, publishes them in slots, and loads Q and K; the second
// loads V. Both run ahead of the consumers as far as slots and stages are free, into the next item, so that an item's
// first tiles are there when its rows' turn comes.
// Contiguous K or V: one box a tile, [panel of 64 columns][kTileKv][128 bytes]. Paged: a box is 8 rows x all panels x a
// number of such groups, [group of 8 rows][panel][8][128 bytes]: a page (or its share of the tile) is one copy.
#pragma once
#include "attention/prefill.cuh"
#include "ptx/tma.cuh"
#include "ptx/wgmma.cuh"

namespace fi {

struct PrefillHopperParams : PrefillParams {
  // q: (64 columns, head of the group, token, panel, kv head), box (64, group, q_box_rows / group, 1, 1).
  // k, v: contiguous (64, token, panel, kv head), box (64, kTileKv, panels, 1);
  // paged (64, token % 8, panel, token / 8, unit), box (64, 8, panels, box_rows / 8, 1): a unit is the largest number of
  // elements that divides the strides of pages, of heads and of 8 tokens, so that it alone says where a box begins.
  // counters: [0]: pieces of work handed out beyond the first of every CTA; [1 ..]: see join_parts.
  ptx::TensorMap q_map, k_map, v_map;
  uint32_t num_items, num_kv_heads;
  uint32_t heads_together;  // kv heads whose work is handed out side by side; divides num_kv_heads
  uint32_t kv_rows;   // contiguous: tokens of k and v, past which the copy engine writes zeros
  uint32_t box_rows;  // paged: tokens a box, a multiple of 8 that divides page_size and kTileKv
  uint32_t q_box_rows;  // 64, or kTileQ where the group does not divide 64
  uint32_t k_page_units, k_head_units, k_rows8_units, v_page_units, v_head_units, v_rows8_units;
};

// Config: T, kHeadDimQK, kHeadDimVO (multiples of 64), kConsumers, kTileKv (multiple of 16), kStages (of K and V), kSlots (of
// items and Q; 2: the next item is loaded ahead), kProducerRegs, kConsumerRegs, kPaged, kQueryBoxes (the group divides
// kTileQ: Q comes by TMA), Logits.
template <class Config>
struct HopperShape {
  static constexpr int kConsumers = Config::kConsumers, kTileKv = Config::kTileKv;
  static constexpr int kTileQ = 64 * kConsumers, kStages = Config::kStages, kSlots = Config::kSlots;
  static constexpr int kPanelsQK = Config::kHeadDimQK / 64, kPanelsVO = Config::kHeadDimVO / 64;
  static constexpr int kQPanel = kTileQ * 128;  // bytes, as all of these
  static constexpr int kQBytes = kPanelsQK * kQPanel, kKBytes = kPanelsQK * kTileKv * 128, kVBytes = kPanelsVO * kTileKv * 128;
  static constexpr int kK = kSlots * kQBytes, kV = kK + kStages * kKBytes, kShared = kV + kStages * kVBytes;
  // From a panel, and from 8 rows, of a K or V tile to the next.
  static constexpr int kKvPanel = Config::kPaged ? 1024 : kTileKv * 128;
  static constexpr int kKRows8 = Config::kPaged ? kPanelsQK * 1024 : 1024, kVRows8 = Config::kPaged ? kPanelsVO * 1024 : 1024;
  static constexpr int kSRegs = kTileKv / 2, kORegs = Config::kHeadDimVO / 2, kSteps = kTileKv / 16;
};

struct alignas(16) HopperSlot {
  PrefillItem item;
  int32_t kv_head;
  int32_t more;  // whether another slot follows; its qo_len is -1 if there was no item left
  int32_t unused[2];
};

// Barriers, who arrives, how often a phase:
template <class Config>
struct alignas(16) HopperShared {
  uint64_t k_full[Config::kStages], v_full[Config::kStages];    // producer's expected bytes (1)
  uint64_t k_empty[Config::kStages], v_empty[Config::kStages];  // lane 0 of every consumer warp (4 * kConsumers)
  uint64_t q_full[Config::kSlots];      // producer's expected bytes (1)
  // Every lane that writes a slot's words arrives, and every lane that has read them: one lane behind __syncwarp would do,
  // costs as much, and is an order that compute-sanitizer's racecheck does not follow.
  uint64_t slot_full[Config::kSlots];   // the first producer (32)
  uint64_t slot_empty[Config::kSlots];  // the second producer and the consumers (32 a warp)
  uint64_t tail;                        // expected bytes of a V tile that reaches past the request's last key (1)
  uint32_t arrived[4];                  // join_parts, a word a consumer warpgroup
  HopperSlot slots[Config::kSlots];
};

// A position in a ring of barriers. Who waits for "full" waits for `phase`, who waits for "empty" for the other one.
template <int kSize>
struct Ring {
  uint32_t at = 0, phase = 0;

  FI_DEVICE void advance() {
    if constexpr (kSize == 1) {
      phase ^= 1;
    } else {
      const bool wraps = at == kSize - 1;
      at = wraps ? 0 : at + 1;
      phase ^= wraps;
    }
  }
};

// Boxes of a paged tile: lane b knows the page of box b and where in the page it begins, in units.
struct HopperBoxes {
  int page, inside;
};

// Tiles last - 1 down to first of an item's K or V, by one warp, through the ring of stages at `smem`. `meanwhile` is called
// once, when the first three are under way.
template <class Config, bool kIsV, class Params, class Meanwhile>
FI_DEVICE void load_tiles(const Params& params, HopperShared<Config>& shared, uint32_t smem, Ring<Config::kStages>& stage,
                          uint32_t& tail_phase, const PrefillItem& shared_item, int kv_head, const Meanwhile& meanwhile) {
  using Shape = HopperShape<Config>;
  constexpr int kTileKv = Config::kTileKv, kPanels = kIsV ? Shape::kPanelsVO : Shape::kPanelsQK;
  constexpr int kBytes = kIsV ? Shape::kVBytes : Shape::kKBytes, kRows8 = kIsV ? Shape::kVRows8 : Shape::kKRows8;
  const int lane = lane_id(), kv_base = shared_item.kv_base, kv_len = shared_item.kv_len;
  const int box_rows = params.box_rows;
  const int last = ceil_div(shared_item.kv_end, kTileKv), tiles = last - shared_item.kv_begin / kTileKv;
  const uint32_t full = ptx::smem_address(kIsV ? shared.v_full : shared.k_full);
  const uint32_t empty = ptx::smem_address(kIsV ? shared.v_empty : shared.k_empty);
  const ptx::TensorMap& map = kIsV ? params.v_map : params.k_map;

  auto find = [&](int start) {
    HopperBoxes r{0, 0};
    if constexpr (Config::kPaged) {
      const int row = lane * box_rows, token = start + row;
      if (row < kTileKv && token < kv_len) {  // a page table is not read past its last key
        const int page = params.page_size.quotient(token);
        r.inside = ((token - page * int(params.page_size.divisor)) >> 3) * (kIsV ? params.v_rows8_units : params.k_rows8_units) +
                   kv_head * (kIsV ? params.v_head_units : params.k_head_units);
        r.page = params.kv_indices[kv_base + page];  // and no more: to work with it would be to wait for it here
      }
    }
    return r;
  };
  // Rows of V past the request's last key are the next request's, a page's unused end, or an earlier tile's: their weights
  // are 0, but 0 * NaN is not. Only the first tile loaded can have them. Its bytes arrive at a barrier of this warp's own,
  // which clears the rows and then arrives.
  const int tail_rows = last * kTileKv - kv_len;
  bool tail = kIsV && tail_rows > 0 && (Config::kPaged || uint32_t(kv_base + kv_len) < params.kv_rows);
  int start = (last - 1) * kTileKv;
  HopperBoxes ahead{0, 0};
  if (tiles > 0) ahead = find(start);
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    // The next tile's pages are looked up now: their latency passes while the warp waits for a free stage.
    const HopperBoxes boxes = ahead;
    if (i + 1 < tiles) ahead = find(start - kTileKv);
    ptx::mbarrier_wait(empty + stage.at * 8, stage.phase ^ 1);
    const uint32_t address = smem + stage.at * kBytes;
    const uint32_t barrier = tail ? ptx::smem_address(&shared.tail) : full + stage.at * 8;
    if constexpr (Config::kPaged) {
      const int box_bytes = box_rows * kPanels * 128;
      const int begin = boxes.page * (kIsV ? params.v_page_units : params.k_page_units) + boxes.inside;
      const int count = __popc(__ballot_sync(kFullMask, lane * box_rows < min(kTileKv, kv_len - start)));
      if (lane == 0) ptx::mbarrier_arrive_expect(barrier, box_bytes * count);
      // Shuffles of several boxes at a time, so that their latencies overlap: with one box at a time a tile of ten took
      // 1,200 cycles to hand out.
      constexpr int kTogether = 5;
#pragma unroll 1
      for (int first = 0; first < count; first += kTogether) {
        int unit[kTogether];
#pragma unroll
        for (int b = 0; b < kTogether; ++b) unit[b] = __shfl_sync(kFullMask, begin, first + b);
        if (ptx::elect_one())
#pragma unroll
          for (int b = 0; b < kTogether; ++b)
            if (first + b < count)
              ptx::tma_load_5d(address + (first + b) * box_bytes, map, barrier, 0, 0, 0, 0, unit[b]);
      }
    } else if (lane == 0) {
      ptx::mbarrier_arrive_expect(barrier, kBytes);
      ptx::tma_load_4d(address, map, barrier, 0, kv_base + start, 0, kv_head);
    }
    if (kIsV && tail) {
      ptx::mbarrier_wait(barrier, tail_phase);
      tail_phase ^= 1;
      for (int chunk = lane; chunk < tail_rows * 8; chunk += 32) {
        const int row = kTileKv - tail_rows + chunk / 8;
        const uint32_t at = Config::kPaged ? row / 8 * kRows8 + row % 8 * 128 : row * 128;
#pragma unroll
        for (int p = 0; p < kPanels; ++p)
          asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address + at + p * Shape::kKvPanel + chunk % 8 * 16), "r"(0)
                       : "memory");
      }
      ptx::fence_proxy_async();
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(full + stage.at * 8);
      tail = false;
    }
    stage.advance();
    start -= kTileKv;
    if (i == min(2, tiles - 1)) meanwhile();
  }
  if (tiles <= 0) meanwhile();
}

// Q of the item in slot `at`, by one lane: a box for every 64 columns of every warpgroup's rows. Boxes that lie before the
// request or behind it are left out: of 512 rows in tiles of 192 that is one of nine, and nobody reads them.
template <class Config, class Params>
FI_DEVICE void load_queries(const Params& params, HopperShared<Config>& shared, uint32_t smem, int at, int kv_head) {
  using Shape = HopperShape<Config>;
  const PrefillItem& item = shared.slots[at].item;
  const int group = params.group.divisor, rows = params.q_box_rows, row0 = item_row(item, Shape::kTileQ);
  const int first = max(-row0, 0) / rows, last = min(ceil_div(item.qo_len * group - row0, rows), Shape::kTileQ / rows);
  const uint32_t barrier = ptx::smem_address(&shared.q_full[at]), to = smem + at * Shape::kQBytes;
  ptx::mbarrier_arrive_expect(barrier, (last - first) * rows * Shape::kPanelsQK * 128);
#pragma unroll 1
  for (int box = first; box < last; ++box) {
    const int token = item.q_row + (row0 + box * rows) / group;
#pragma unroll
    for (int p = 0; p < Shape::kPanelsQK; ++p)
      ptx::tma_load_5d(to + p * Shape::kQPanel + box * rows * 128, params.q_map, barrier, 0, 0, token, p, kv_head);
  }
}

// Word `lane` of the item of CTA-sized piece of work number `work`, and its kv head: items are the fast index inside
// 2^head_shift heads.
template <class Params>
FI_DEVICE int item_word(const Params& params, uint32_t work, int& kv_head) {
  const uint32_t together = params.heads_together, section = params.num_items * together;
  const uint32_t heads = work / section, inside = work - heads * section, item = inside / together;
  kv_head = heads * together + inside - item * together;
  return lane_id() < sizeof(PrefillItem) / 4 ? reinterpret_cast<const int*>(params.items + item)[lane_id()] : 0;
}

// The first producer: hands out items, loads Q and K. A grid smaller than the work claims more as it goes: the claim for the
// next item is made before the current one is loaded and its words are fetched behind the first tiles, so that neither
// latency stands between two items. The counter wraps to 0 with the last of its num_work claims.
template <class Config, class Params>
FI_DEVICE void produce_items(const Params& params, HopperShared<Config>& shared, uint32_t smem, int word, int kv_head) {
  using Shape = HopperShape<Config>;
  const int lane = lane_id();
  const uint32_t num_work = params.num_items * params.num_kv_heads;
  const bool claims = Config::kSlots > 1 && gridDim.x < num_work;
  Ring<Config::kSlots> slot;
  Ring<Config::kStages> stage;
  uint32_t no_tail = 0;
  bool published = false;
  auto take_slot = [&] { ptx::mbarrier_wait(ptx::smem_address(&shared.slot_empty[slot.at]), slot.phase ^ 1); };
#pragma unroll 1
  while (true) {
    uint32_t next = num_work;
    if (claims && lane == 0) next = gridDim.x + atomicInc(params.counters, num_work - 1);
    int next_word = 0, next_head = 0;
    auto fetch = [&] {
      next = __shfl_sync(kFullMask, next, 0);
      if (next < num_work) next_word = item_word(params, next, next_head);
    };
    if (__shfl_sync(kFullMask, word, 1) != 0) {  // qo_len: padding is not handed out
      take_slot();
      HopperSlot& to = shared.slots[slot.at];
      if (lane < int(sizeof(PrefillItem) / 4)) reinterpret_cast<int*>(&to.item)[lane] = word;
      if (lane == 0) to.kv_head = kv_head, to.more = claims;
      __syncwarp();
      ptx::mbarrier_arrive(ptx::smem_address(&shared.slot_full[slot.at]));
      if (lane == 0) {
        if constexpr (Config::kQueryBoxes) load_queries<Config>(params, shared, smem, slot.at, kv_head);
      }
      load_tiles<Config, false>(params, shared, smem + Shape::kK, stage, no_tail, to.item, kv_head, fetch);
      slot.advance();
      published = true;
    } else {
      fetch();
    }
    if (next >= num_work) break;
    word = next_word, kv_head = next_head;
  }
  if (claims || !published) {
    take_slot();
    if (lane == 0) shared.slots[slot.at].item.qo_len = -1;
    __syncwarp();
    ptx::mbarrier_arrive(ptx::smem_address(&shared.slot_full[slot.at]));
  }
}

// The second producer: V.
template <class Config, class Params>
FI_DEVICE void produce_v(const Params& params, HopperShared<Config>& shared, uint32_t smem) {
  Ring<Config::kSlots> slot;
  Ring<Config::kStages> stage;
  uint32_t tail_phase = 0;
#pragma unroll 1
  while (true) {
    ptx::mbarrier_wait(ptx::smem_address(&shared.slot_full[slot.at]), slot.phase);
    const HopperSlot& from = shared.slots[slot.at];
    if (from.item.qo_len < 0) break;
    const bool more = from.more;
    load_tiles<Config, true>(params, shared, smem + HopperShape<Config>::kV, stage, tail_phase, from.item, from.kv_head, [] {});
    if (!more) break;
    __syncwarp();
    ptx::mbarrier_arrive(ptx::smem_address(&shared.slot_empty[slot.at]));
    slot.advance();
  }
}

}  // namespace fi
