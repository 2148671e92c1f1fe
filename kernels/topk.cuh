// The k largest elements of rows, exactly k of them: ties at the k-th go to the smallest or to the largest indices. Keys
// and places are integers: the result is the same for every launch shape. NaN counts as the largest value.
// A cluster of kCluster CTAs (1 below sm_90) of kThreads reads one row; grid = rows * kCluster. Every CTA finds a lower bound
// in the largest keys of all, and lists its elements that reach it, for the first CTA to rank (candidates.cuh). If they are
// many (ties, or k of hundreds), that one reads the blocks again that reach a bound and sorts a longer list, or finds the
// k-th key by a radix search over the row and counts its way through, in index order.
// Shared memory (dynamic): RowShared. Bytes moved: rows * length * sizeof(T). Architecture: any; clusters need sm_90.
#pragma once
#include "ptx/pdl.cuh"
#include "sampling/candidates.cuh"
#include "sampling/gather.cuh"

namespace fi {

enum TopKFlags : uint32_t {
  kTopKLargeTies = 1,  // of equal elements those with the largest indices, else the smallest
  kTopKSorted = 2,     // largest first; without, what did not fit the list is in index order
};

struct TopKParams {
  const void* input;
  void* values;                 // [rows, k], or null
  int64_t* indices;             // [rows, k], or null: then `output`
  int32_t* output;              // [rows, k]: indices after the transform, -1 behind the row's last
  int32_t* raw;                 // [rows, k], or null: indices before it
  const int32_t* lengths;       // elements of a row, or null for `vocab`
  const int32_t* row_starts;    // a row's first element, or null for 0
  const int32_t* offsets;       // added to indices, or null
  const int32_t* table;         // [batch, ...]: pages that indices are looked up in, or null
  const int32_t* table_starts;  // a row's first page in its line of the table, or null for row_starts
  const int32_t* row_to_batch;  // a row's line of the table, or null for the row's number
  int64_t stride;               // of input, elements
  int64_t table_stride;
  uint32_t vocab;
  uint32_t k;
  uint32_t page_size;
  uint32_t flags;
};

namespace sampling {

// All NaNs are alike: the largest key.
struct Canonical {
  FI_DEVICE float operator()(float x) const { return ptx::max_nan(x, x); }
};

// Order of results: by key, then by `tag`, both from the largest down. The tag is the index or, for small ties first,
// its complement.
FI_DEVICE bool ahead(uint32_t key, uint32_t tag, uint32_t other_key, uint32_t other_tag) {
  return key > other_key || (key == other_key && tag > other_tag);
}

// Sort n elements by compare(a, b), which puts a and b > a in order, with all threads of the CTA: a bitonic network
// whose comparators all point the same way, so that what would lie behind the end need not exist.
template <int kThreads, class Compare>
FI_DEVICE void sort_network(uint32_t n, Compare&& compare) {
#pragma unroll 1
  for (uint32_t half = 1; half < n; half *= 2) {
    __syncthreads();  // elements are in place
    for (uint32_t i = threadIdx.x; i < (n + 2 * half - 1) / (2 * half) * half; i += kThreads) {
      const uint32_t start = i / half * (2 * half), j = i % half;
      if (start + 2 * half - 1 - j < n) compare(start + j, start + 2 * half - 1 - j);
    }
#pragma unroll 1
    for (uint32_t stride = half / 2; stride > 0; stride /= 2) {
      __syncthreads();  // the step before is done
      for (uint32_t i = threadIdx.x; i < (n + 2 * stride - 1) / (2 * stride) * stride; i += kThreads) {
        const uint32_t a = i / stride * (2 * stride) + i % stride;
        if (a + stride < n) compare(a, a + stride);
      }
    }
  }
  __syncthreads();  // the order is complete
}

// What candidates are compared by: their order in the result.
struct OrderLoad {
  static constexpr bool kAdds = false;
  static constexpr uint32_t kNothing = Logits::kNothing;
  FI_DEVICE static uint32_t lowest(uint32_t) { return 0; }
  FI_DEVICE static bool valid(uint32_t) { return true; }
};
struct NoLeast {
  FI_DEVICE uint32_t operator()(uint32_t) const { return 0; }
};

// Where a row's results go.
template <typename T>
struct TopKOutput {
  const TopKParams& params;
  const T* data;  // the row
  int64_t row;
  const int32_t* table;
  int32_t offset;

  FI_DEVICE TopKOutput(const TopKParams& params, const T* data, int64_t row)
      : params(params), data(data), row(row), table(params.table), offset(params.offsets ? params.offsets[row] : 0) {
    if (table != nullptr) {
      const int64_t line = params.row_to_batch ? params.row_to_batch[row] : row;
      const int32_t* starts = params.table_starts ? params.table_starts : params.row_starts;
      table += line * params.table_stride + (starts ? starts[row] : 0);
    }
  }
  FI_DEVICE void write(uint32_t place, uint32_t index) const { write(place, index, params.values ? data[index] : T()); }
  FI_DEVICE void write(uint32_t place, uint32_t index, T value) const {
    const int64_t at = row * params.k + place;
    if (params.values) static_cast<T*>(params.values)[at] = value;
    if (params.raw) params.raw[at] = index;
    if (params.indices) {
      params.indices[at] = index;
    } else if (table != nullptr) {
      const int32_t page = table[index / params.page_size];
      params.output[at] = page * int32_t(params.page_size) + int32_t(index % params.page_size);
    } else {
      params.output[at] = int32_t(index) + offset;
    }
  }
  FI_DEVICE void pad(uint32_t place) const {
    const int64_t at = row * params.k + place;
    if (params.raw) params.raw[at] = -1;
    params.output[at] = -1;
  }
};

// The list's n elements in order; `put(place, index)` for the first k. Tags are made of indices here.
template <int kThreads, class Shared, class Put>
FI_DEVICE void rank_list(Shared& shared, uint32_t n, uint32_t k, uint32_t flip, Put&& put) {
  sort_network<kThreads>(n, [&](uint32_t a, uint32_t b) {
    const uint32_t key_a = shared.key[a], key_b = shared.key[b], index_a = shared.index[a], index_b = shared.index[b];
    if (ahead(key_b, index_b ^ flip, key_a, index_a ^ flip)) {
      shared.key[a] = key_b;
      shared.key[b] = key_a;
      shared.index[a] = index_b;
      shared.index[b] = index_a;
    }
  });
  for (uint32_t i = threadIdx.x; i < k; i += kThreads) put(i, shared.index[i]);
}

// The n candidates: everyone is compared with everyone; `put(place, key, index)` for the first k.
template <class Put>
FI_DEVICE void rank_candidates(const Compared& list, uint32_t n, uint32_t k, uint32_t flip, Put&& put) {
  const Split split(n);
  if (!split.works(n)) return;
  const uint64_t own = list.order[split.item];
  const uint32_t place = split.ranks<false>(list.order, own);
  if (split.item < n && split.part == 0 && place < k) put(place, uint32_t(own >> 32), uint32_t(own) ^ flip);
}

// Fewer than k elements are candidates, as what is below them are ties, with this key: the first or the last ones, as many as
// are wanting, in put(place, index), by one warp. It reads only blocks that have a candidate or a tie.
template <class Row, class Shared, class Put>
FI_DEVICE void fill_up(const Row& row, const Shared& shared, uint32_t n, uint32_t k, uint32_t key, bool last, Put&& put) {
  constexpr int kPer = Row::kPer;
  const uint32_t blocks = row.segments() * Row::kBlocks, lane = last ? 31 - lane_id() : lane_id();
  auto block_of = [&](uint32_t i) { return last ? blocks - 1 - i : i; };
#pragma unroll 1
  for (uint32_t first = 0; first < blocks; first += 32) {
    const uint32_t own = first + lane_id();
    uint32_t taken = __ballot_sync(kFullMask, own < blocks && shared.block_top[block_of(own)] >= key);
#pragma unroll 1
    for (; taken; taken &= taken - 1) {
      const uint32_t at = block_of(first + __ffs(taken) - 1) * Row::kBlock + lane * kPer;
      typename Row::Raw v;
      float x[kPer];
      row.raw_at(at, v);
      row.values(v, x);
      uint32_t ties = 0;
#pragma unroll
      for (int j = 0; j < kPer; ++j) ties |= uint32_t(at + j < row.vocab && key_of(x[j]) == key) << j;
      const uint32_t until = n + uint32_t(warp_scan(__popc(ties)));
      uint32_t place = until - __popc(ties);
#pragma unroll 1
      for (; ties && place < k; ++place) {
        const uint32_t j = last ? 31 - __clz(ties) : __ffs(ties) - 1;
        put(place, at + j);
        ties ^= 1u << j;
      }
      n = __shfl_sync(kFullMask, until, 31);
      if (n >= k) return;
    }
  }
}

// The k largest of a row with more than k elements, in index order: put(place, key, index). Keys below `low` are surely
// not among them.
template <class State, class Put>
FI_DEVICE void count_through(const State& state, uint32_t k, uint32_t low, bool large_ties, Put&& put) {
  using Row = typename State::Row;
  constexpr int kThreads = State::kThreads, kPer = Row::kPer;
  const Row& row = state.row;
  auto& shared = state.shared;
  const uint32_t segments = row.segments();
  auto visit = [&](uint32_t least, uint32_t most, auto&& f) {
    for_each<kThreads>(row, shared, least, most, f, [](uint32_t) {});
  };
  const uint32_t kth =
      select<kThreads>(visit, [](float) { return uint64_t(1); }, low, state.top_key, uint64_t(k), 0, shared);
  // Of a lane's elements from `first` on, how many are larger (upper half) and how many equal (lower half).
  auto count = [&](uint32_t first, float (&v)[kPer]) {
    row.load_at(first, v);
    uint64_t sum = 0;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const uint32_t key = first + j < row.vocab ? key_of(v[j]) : 0;
      sum += key > kth ? uint64_t(1) << 32 : uint64_t(key == kth);
    }
    return sum;
  };
  // If nothing is larger than the k-th, k of the ties are enough, from the end that they are taken from.
  const bool ties_only = kth == state.top_key;
  if (threadIdx.x < segments) shared.sum[threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.inside = 0;
  __syncthreads();  // counts are clear
#pragma unroll 1
  for (uint32_t i = warp_id(); i < round_up(segments, uint32_t(kThreads / 32)); i += kThreads / 32) {
    if (ties_only) {
      const bool enough = shared.inside >= k;
      __syncthreads();  // everyone has seen that
      if (enough) break;
    }
    const uint32_t s = large_ties ? segments - 1 - i : i;
    uint64_t sum = 0;
    if (i < segments) {
#pragma unroll 4
      for (int b = 0; b < Row::kBlocks; ++b) {
        float v[kPer];
        if (shared.block_top[s * Row::kBlocks + b] >= kth)
          sum += count(s * kSegment + b * Row::kBlock + lane_id() * kPer, v);
      }
      sum = ptx::warp_sum_u64(sum);
      if (lane_id() == 0) shared.sum[s] = sum;
    }
    if (ties_only) {
      if (lane_id() == 0) atomicAdd(&shared.inside, uint32_t(sum));
      __syncthreads();  // these segments are counted
    }
  }
  __syncthreads();  // counts are complete
  uint64_t total;
  const uint64_t own = threadIdx.x < segments ? shared.sum[threadIdx.x] : 0;
  const uint64_t end = block_scan<kThreads>(own, shared.warp_sum, total);
  if (threadIdx.x < segments) shared.sum[threadIdx.x] = end - own;
  __syncthreads();  // what lies before each segment is known
  const uint32_t ties = uint32_t(total), wanted = k - uint32_t(total >> 32);
  const uint32_t first_tie = large_ties ? ties - wanted : 0, end_tie = first_tie + wanted;  // those that are taken
#pragma unroll 1
  for (uint32_t s = warp_id(); s < segments; s += kThreads / 32) {
    uint64_t before = shared.sum[s];
    const uint64_t behind = s + 1 < segments ? shared.sum[s + 1] : total;
    if (behind >> 32 == before >> 32 && (uint32_t(behind) <= first_tie || uint32_t(before) >= end_tie)) continue;
#pragma unroll 1
    for (int b = 0; b < Row::kBlocks; ++b) {
      if (shared.block_top[s * Row::kBlocks + b] < kth) continue;
      const uint32_t first = s * kSegment + b * Row::kBlock + lane_id() * kPer;
      float v[kPer];
      const uint64_t mine = count(first, v);
      uint64_t inclusive = mine;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const uint64_t other = __shfl_up_sync(kFullMask, inclusive, offset);
        if (lane_id() >= offset) inclusive += other;
      }
      uint64_t at = before + inclusive - mine;
      before += __shfl_sync(kFullMask, inclusive, 31);
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        const uint32_t key = first + j < row.vocab ? key_of(v[j]) : 0;
        if (key < kth) continue;
        const uint32_t larger = uint32_t(at >> 32), equal = uint32_t(at);
        const uint32_t taken = max_of(min_of(equal, end_tie), first_tie) - first_tie;
        if (key > kth || (first_tie <= equal && equal < end_tie)) put(larger + taken, key, first + j);
        at += key > kth ? uint64_t(1) << 32 : 1;
      }
    }
  }
}

}  // namespace sampling

// Config: T, kThreads, kCluster, kSegments, kList (RowShared), kSharedBytes (its size)
template <class Config>
FI_DEVICE void top_k(const TopKParams& params) {
  using namespace sampling;
  using T = typename Config::T;
  using Row = MappedRow<T, Canonical>;  // what ranks
  using Shape = sampling::Shape<Config::kThreads, Config::kCluster>;
  using Shared = RowShared<Config::kSegments, true, Config::kList>;
  using State = RowState<Logits, Config::kThreads, Row, Shared>;
  static_assert(sizeof(Shared) == Config::kSharedBytes);
  extern __shared__ __align__(1024) uint8_t smem[];
  Shared& shared = *reinterpret_cast<Shared*>(smem);

  set_counters<Shape>(shared);
  Shape::start();
  ptx::grid_launch_dependents();
  ptx::grid_wait();

  const int64_t row_number = Shape::row();
  const uint32_t k = params.k, vocab = params.vocab;
  uint32_t start = 0, length = vocab;
  if (params.row_starts) start = min_of(uint32_t(max_of(params.row_starts[row_number], 0)), vocab);
  if (params.lengths) length = uint32_t(max_of(params.lengths[row_number], 0));
  length = min_of(length, vocab - start);
  const T* data = static_cast<const T*>(params.input) + row_number * params.stride + start;
  const Row row({data, length, reinterpret_cast<uint64_t>(data) % 16 == 0}, Canonical{});
  const bool all = length <= k && !(params.flags & kTopKSorted), first = Shape::rank() == 0;
  const uint32_t size = all ? 0 : group_size<Row>(row.segments(), k);  // not 0: every CTA lists its candidates
  const Tell tell = tell_of<Row>(size);
  Started<Shape> started;
  summarise<Logits, true, true, Shape>(row, shared, false, started, NotHeld{}, tell);
  if (!first && size == 0) return;
  if (threadIdx.x == 0) pad_tops<Row>(shared, row.segments(), size);
  Shape::receive(&shared.box[0], 0, summary_bytes<true>(row, false, tell, first));

  const TopKOutput<T> output(params, data, row_number);
  if (all) {
    for (uint32_t i = threadIdx.x; i < k; i += Config::kThreads) {
      if (i < length) output.write(i, i);
      else output.pad(i);
    }
    return;
  }
  const bool large = (params.flags & kTopKLargeTies) != 0;
  const uint32_t flip = large ? 0 : 0xffffffffu;
  Bounds bounds = {0, 0, 0};
  if (size != 0) {
    bounds = shortlist<Shape, OrderLoad, false, Row, Shared>(row, size, k, NoLeast{});
    if (!first) return;
    const uint32_t n = collect<Shape, false>(shared, flip, NoLeast{});
    if (n != kWholeRow) {
      rank_candidates(compared(shared), n, k, flip, [&](uint32_t place, uint32_t key, uint32_t index) {
        const bool exact = key <= kInfKey && key != key_of(0.f);  // the key has all of the element
        output.write(place, index, exact || !params.values ? from_float<T>(value_of(key)) : data[index]);
      });
      if (n < k && warp_id() == 0)
        fill_up(row, shared, n, k, bounds.ties, large, [&](uint32_t place, uint32_t index) { output.write(place, index); });
      return;
    }
  }
  const State state(row, shared, size != 0 ? bounds.top : row_top(shared, row.segments()));
  uint32_t low = bounds.low, listed = kWholeRow, finer = 0;
  if (size != 0 || length <= Shared::kList) listed = gather<State>(row, low);
  if (listed > Shared::kList && lower_bound(state, k, finer) && finer > low) {
    low = finer;
    listed = gather<State>(row, low);
  }
  if (listed <= Shared::kList) {
    rank_list<Config::kThreads>(shared, listed, k, flip, [&](uint32_t place, uint32_t index) { output.write(place, index); });
  } else if (k <= Shared::kList && (params.flags & kTopKSorted)) {
    count_through(state, k, low, large, [&](uint32_t place, uint32_t key, uint32_t index) {
      shared.key[place] = key;
      shared.index[place] = index;
    });
    __syncthreads();  // the list is complete
    rank_list<Config::kThreads>(shared, k, k, flip, [&](uint32_t place, uint32_t index) { output.write(place, index); });
  } else {
    count_through(state, k, low, large, [&](uint32_t place, uint32_t, uint32_t index) { output.write(place, index); });
  }
}

struct SortParams {
  void* values;      // [rows, k], sorted in place
  int64_t* indices;  // [rows, k]
  uint32_t k;
  uint32_t flags;    // TopKFlags
};

// Rows of results too long for the list, in global memory: one CTA of kThreads a row. Config: T, kThreads
template <class Config>
FI_DEVICE void sort_rows(const SortParams& params) {
  using namespace sampling;
  using T = typename Config::T;
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  T* const values = static_cast<T*>(params.values) + blockIdx.x * int64_t(params.k);
  int64_t* const indices = params.indices + blockIdx.x * int64_t(params.k);
  const uint32_t flip = params.flags & kTopKLargeTies ? 0 : 0xffffffffu;
  sort_network<Config::kThreads>(params.k, [&](uint32_t a, uint32_t b) {
    const T x = values[a], y = values[b];
    const int64_t i = indices[a], j = indices[b];
    const float p = to_float(x), q = to_float(y);
    if (ahead(key_of(ptx::max_nan(q, q)), uint32_t(j) ^ flip, key_of(ptx::max_nan(p, p)), uint32_t(i) ^ flip)) {
      values[a] = y;
      values[b] = x;
      indices[a] = j;
      indices[b] = i;
    }
  });
}

}  // namespace fi
