// The end of a latent attention tile whose keys are split: the CTAs of its chunks put it together, each a slice of columns.
// Every CTA leaves its accumulators and (m, d) in the workspace and counts itself. If the schedule says that all chunks run
// at a time, it then waits for the others, but not for long: whoever is there computes his slice of the result from all
// chunks, and the last one to come does what nobody has claimed. So few rows over many chunks end in about a chunk's time,
// and nothing depends on CTAs running together.
// o = sum_c 2^(m_c - m) o_c, d likewise, in an order of the chunks' own: the bits do not depend on who does it.
#pragma once
#include "attention/mla_output.cuh"
#include "ptx/count.cuh"

namespace fi {

// Marks on a slice's word: its own CTA takes it, or gives it up; the last CTA takes it, or finds it taken.
constexpr uint32_t kSliceTaken = 1, kSliceGivenUp = 2, kSliceLast = 4;
// Looks at the count before a CTA goes: some 50 us.
constexpr int kJoinPatience = 64;

// kRows rows held by kThreads threads: thread t has rows row_of(t) + {0, 8} and, of vector n, columns column_of(t) + 8 n +
// {0, 1}. Threads with `writes_md` leave (m, d). memory: kRows * num_chunks floats of shared memory. sync: a barrier of the
// kThreads threads.
template <class Config, int kRows, int kThreads, int kVectors>
struct MlaJoin {
  static constexpr int kPer = kThreads / kRows;  // neighbouring threads a row, where each row has some

  template <class Params, class Sync>
  FI_DEVICE static void run(const Params& params, MlaShared& shared, float* memory, const float (&o)[kVectors * 4],
                            const MlaTotal& total, float scale, int row, int column, bool writes_md, const Sync& sync) {
    const int thread = threadIdx.x, chunks = shared.item.num_chunks, chunk = shared.item.chunk;
    const int64_t first_slot = shared.item.first_slot;
    float4* const partial = params.partial_o + first_slot * (kVectors * kThreads) + thread;
    {
      float4* const to = partial + int64_t(chunk) * (kVectors * kThreads);
#pragma unroll
      for (int n = 0; n < kVectors; ++n) to[n * kThreads] = make_float4(o[4 * n], o[4 * n + 1], o[4 * n + 2], o[4 * n + 3]);
      if (writes_md) {
#pragma unroll
        for (int h = 0; h < 2; ++h)
          params.partial_md[(first_slot + chunk) * kRows + row + 8 * h] = make_float2(total.m[0][h], total.d[0][h]);
      }
    }
    sync();  // every thread's writes are in front of the one count
    if (thread == 0) shared.arrived[0] = meet(params.counters + 2 * first_slot, chunk, chunks, shared.item.unused[0]);
    sync();
    const uint32_t state = shared.arrived[0];
    if ((state & (kMine | kLast)) == 0) return;

    weights(params, shared.item, memory, scale, chunk == 0 || (state & kLast));
    sync();  // weights: written by a row's threads, read by others
    // His own slice; and, for the last one, those of who went, or has not noticed yet.
    const int slices = state & kLast ? min(chunks, kVectors) : 0;
    bool taken = (state & kMine) == 0;
    int s = chunk;
#pragma unroll 1
    for (int next = 0; true; ++next) {
      if (!taken && chunks <= 4)
        add<4, 4>(params, shared.item, partial, memory, s, row, column);
      else if (!taken)
        add<1, 16>(params, shared.item, partial, memory, s, row, column);
      if (next == chunk) ++next;
      if (next >= slices) break;
      s = next;
      sync();  // shared.arrived has been read by all
      if (thread == 0) shared.arrived[0] = mark(params.counters + 2 * (first_slot + s) + 1, kSliceLast);
      sync();
      taken = shared.arrived[0] == kSliceTaken;
    }
  }

 private:
  static constexpr uint32_t kLast = 1, kMine = 2;

  // Adds a mark to a slice's word; what was there. The words of all slices but that of the last CTA get two
  // marks, the second of which leaves zero.
  FI_DEVICE static uint32_t mark(uint32_t* word, uint32_t value) {
    const uint32_t before = ptx::count_add(word, value);
    if (before != 0) *word = 0;
    return before;
  }

  // By one thread: counts this CTA, waits for the others, and says what it has to do. counters: {count, mark of slice 0},
  // {unused, mark of slice 1} ..., zero between launches.
  FI_DEVICE static uint32_t meet(uint32_t* counters, int chunk, int chunks, bool waits) {
    const bool last = (ptx::count_add(counters, 1) & 0xffff) + 1 == uint32_t(chunks);
    const bool all = last || (waits && ptx::count_wait(counters, 0xffff, chunks, kJoinPatience));
    // The high half counts those who do not look any more; the last of them leaves zero.
    if (ptx::count_add(counters, 0x10000) >> 16 == uint32_t(chunks - 1)) *counters = 0;
    if (chunk >= kVectors) return last ? kLast : 0;
    if (last) return kLast | kMine;
    const uint32_t before = mark(counters + 2 * chunk + 1, all ? kSliceTaken : kSliceGivenUp);
    return all && before == 0 ? kMine : 0;
  }

  // Normalised weights of the chunks, memory[chunk][row], and the log-sum-exp.
  template <class Params>
  FI_DEVICE static void weights(const Params& params, const PrefillItem& item, float* memory, float scale, bool with_lse) {
    constexpr int kBatch = 8;
    const int row = threadIdx.x / kPer, part = threadIdx.x % kPer, chunks = item.num_chunks;
    const float2* const md = params.partial_md + int64_t(item.first_slot) * kRows + row;
    float top = -FI_INF, d = 0.f;
    auto each = [&](auto use) {  // chunks part, part + kPer, ...
#pragma unroll 1
      for (int c = part; c < chunks; c += kBatch * kPer) {
        float2 x[kBatch];
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
          x[b] = c + b * kPer < chunks ? __ldcg(md + (c + b * kPer) * kRows) : make_float2(-FI_INF, 0.f);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) use(c + b * kPer, x[b]);
      }
    };
    each([&](int, const float2& x) { top = fmaxf(top, x.x); });
#pragma unroll
    for (int bits = 1; bits < kPer; bits *= 2) top = fmaxf(top, __shfl_xor_sync(kFullMask, top, bits));
    each([&](int c, const float2& x) {
      const float weight = x.x == -FI_INF ? 0.f : math::ptx_exp2((x.x - top) * scale);
      d = fmaf(weight, x.y, d);
      if (c < chunks) memory[c * kRows + row] = weight;
    });
#pragma unroll
    for (int bits = 1; bits < kPer; bits *= 2) d += __shfl_xor_sync(kFullMask, d, bits);
    const bool empty = top == -FI_INF;
    const float norm = empty ? 0.f : params.out_scale / d;
    for (int c = part; c < chunks; c += kPer) memory[c * kRows + row] *= norm;
    const int heads = params.group.divisor, packed = item.q_tile * kRows + row;
    if (with_lse && part == 0 && params.lse != nullptr && packed < item.qo_len * heads) {
      const int qo_idx = params.group.quotient(packed);
      params.lse[int64_t(item.q_row + qo_idx) * heads + packed - qo_idx * heads] =
          empty ? -FI_INF : fmaf(top, scale, math::ptx_log2(d)) * params.lse_factor;
    }
  }

  // Vectors number, number + slices, ... of the result, kN vectors of kC chunks in flight at a time.
  template <int kN, int kC, class Params>
  FI_DEVICE static void add(const Params& params, const PrefillItem& item, const float4* partial, const float* memory,
                            int number, int row, int column) {
    using O = typename Config::O;
    const int chunks = item.num_chunks, slices = min(chunks, kVectors), heads = params.group.divisor;
#pragma unroll 1
    for (int first = number; first < kVectors; first += kN * slices) {
      float4 sum[kN];
#pragma unroll
      for (int i = 0; i < kN; ++i) sum[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
      for (int c = 0; c < chunks; c += kC) {
        float4 x[kN][kC];
#pragma unroll
        for (int i = 0; i < kN; ++i)
#pragma unroll
          for (int b = 0; b < kC; ++b) {
            const int n = first + i * slices;
            x[i][b] = n < kVectors && c + b < chunks ? __ldcg(partial + (int64_t(c + b) * kVectors + n) * kThreads)
                                                     : make_float4(0.f, 0.f, 0.f, 0.f);
          }
#pragma unroll
        for (int b = 0; b < kC; ++b) {
          const bool there = c + b < chunks;
          const float lo = there ? memory[(c + b) * kRows + row] : 0.f, hi = there ? memory[(c + b) * kRows + row + 8] : 0.f;
#pragma unroll
          for (int i = 0; i < kN; ++i) {
            sum[i].x = fmaf(lo, x[i][b].x, sum[i].x), sum[i].y = fmaf(lo, x[i][b].y, sum[i].y);
            sum[i].z = fmaf(hi, x[i][b].z, sum[i].z), sum[i].w = fmaf(hi, x[i][b].w, sum[i].w);
          }
        }
      }
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int packed = item.q_tile * kRows + row + 8 * h, qo_idx = params.group.quotient(packed);
        if (packed >= item.qo_len * heads) continue;
        O* const out = static_cast<O*>(params.o) + (item.q_row + qo_idx) * params.o_stride_n +
                       (packed - qo_idx * heads) * params.o_stride_h + column;
#pragma unroll
        for (int i = 0; i < kN; ++i) {
          const int n = first + i * slices;
          const float pair[2] = {h ? sum[i].z : sum[i].x, h ? sum[i].w : sum[i].y};
          if (n < kVectors) Vec<O, 2>::from_floats(pair).store(out + 8 * n);
        }
      }
    }
  }
};

}  // namespace fi
