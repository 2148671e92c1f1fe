// The end of a latent attention tile whose keys are split: the CTAs of its chunks put it together, each a slice of columns.
// Every CTA leaves its accumulators and (m, d) in the workspace and counts itself. If the schedule says that all chunks run
// at a time, it then waits for the others, but not for long: whoever sees them all computes his slice of the result from all
// chunks. The last one to come learns by the same count whether somebody went, and does their slices, too. So few rows over
// many chunks end in about a chunk's time, with one count on the way, and nothing depends on CTAs running together.
// o = sum_c 2^(m_c - m) o_c, d likewise, in an order of the chunks' own: the bits do not depend on who does it.
#pragma once
#include "attention/mla_output.cuh"
#include "ptx/count.cuh"

namespace fi {

// A tile's count: CTAs that have come, that went without waiting on, and that look no more (the last of them leaves zero).
constexpr uint32_t kCame = 1, kWent = 1 << 10, kLeft = 1 << 20, kCountMask = 1023;
// Looks at the count before a CTA goes: some 50 us.
constexpr int kJoinPatience = 64;

// kRows rows held by kThreads threads: thread t has rows row_of(t) + {0, 8} and, of vector n, columns column_of(t) + 8 n +
// {0, 1}. Threads with `writes_md` leave (m, d). memory: kRows * num_chunks floats of shared memory. sync: a barrier of the
// kThreads threads.
template <class Config, int kRows, int kThreads, int kVectors>
struct MlaJoin {
  static constexpr int kPer = kThreads / kRows;  // neighbouring threads a row, where each row has some
  static constexpr int kFlight = 16;             // 16-byte pieces that a thread has in flight

  template <class Params, class Sync>
  FI_DEVICE static void run(const Params& params, MlaShared& shared, float* memory, const float (&o)[kVectors * 4],
                            const MlaTotal& total, float scale, int row, int column, bool writes_md, const Sync& sync) {
    const int thread = threadIdx.x, chunks = shared.item.num_chunks, chunk = shared.item.chunk;
    const bool waits = shared.item.unused[0] != 0;
    const int64_t first_slot = shared.item.first_slot;
    float4* const partial = params.partial_o + first_slot * (kVectors * kThreads) + thread;
    // {count, mark of slice 0}, {unused, mark of slice 1} ..., zero between launches.
    uint32_t *const count = params.counters + 2 * first_slot, *const marks = count + 1;
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
    if (thread == 0) shared.arrived[0] = meet(count, marks, chunk, chunks, waits);
    sync();
    const uint32_t state = shared.arrived[0];
    if (state == 0) return;
    // Asked for now, looked at in the end.
    const bool leaves = waits && thread == 0 && !(state & kHasLeft);
    const uint32_t left = leaves ? ptx::count_relaxed(count, kLeft) : 0;

    const bool mine = state & kMine;
    float4 x[kFlight];
    // Maxima and denominators are in front of what is asked for then, which would delay them.
    float2 first[kBatch];
    read_md(params, shared.item, first, thread % kPer);
    if (mine) ask(x, partial, chunks, chunk);
    weights(params, shared.item, first, memory, scale, chunk == 0 || (state & kLast));
    sync();  // weights: written by a row's threads, read by others
    if (mine) add(params, shared.item, x, partial, memory, chunk, row, column);
    if (state & kOthers) {  // the last one to come: the slices of those who went, or all
      const int slices = min(chunks, kVectors);
      static_assert(kVectors <= 32);
      if (thread < 32) {
        const bool went = thread < slices && (!waits || __ldcg(marks + 2 * thread) != 0);
        const uint32_t all = __ballot_sync(kFullMask, went && !(mine && thread == chunk));
        if (waits && went) marks[2 * thread] = 0;
        if (thread == 0) shared.arrived[1] = all;
      }
      sync();
#pragma unroll 1
      for (uint32_t left_over = shared.arrived[1]; left_over != 0; left_over &= left_over - 1) {
        const int s = __ffs(left_over) - 1;
        ask(x, partial, chunks, s);
        add(params, shared.item, x, partial, memory, s, row, column);
      }
    }
    if (leaves && left / kLeft == uint32_t(chunks - 1)) *count = 0;
  }

 private:
  // What a CTA does: its own slice, others' slices; it is the last to come; it is counted as one that looks no more.
  static constexpr uint32_t kMine = 1, kOthers = 2, kLast = 4, kHasLeft = 8;

  // By one thread: counts this CTA, waits for the others if it may, and says what it has to do.
  FI_DEVICE static uint32_t meet(uint32_t* count, uint32_t* marks, int chunk, int chunks, bool waits) {
    const uint32_t before = ptx::count_add(count, kCame), own = chunk < kVectors ? kMine : 0;
    if ((before & kCountMask) + 1 == uint32_t(chunks)) {
      if (!waits) *count = 0;  // nobody else looks
      return kLast | own | (!waits || (before / kWent & kCountMask) ? kOthers : 0);
    }
    if (!waits) return 0;
    // Who has no slice is done when he is counted.
    if (own && ptx::count_wait(count, kCountMask, chunks, kJoinPatience)) return own;
    uint32_t* const mark = marks + 2 * chunk;
    if (own) *mark = 1;
    const uint32_t now = ptx::count_add(count, kLeft + (own ? kWent : 0));
    if (now / kLeft == uint32_t(chunks - 1)) *count = 0;
    if (!own || (now & kCountMask) != uint32_t(chunks)) return 0;
    *mark = 0;  // all have come in the meantime, and the last one does not know of this one's going
    return own | kHasLeft;
  }

  static constexpr int kBatch = 8;  // chunks of which a thread reads (m, d) at a time

  // (m, d) of this thread's row in chunks c, c + kPer, ...
  template <class Params>
  FI_DEVICE static void read_md(const Params& params, const PrefillItem& item, float2 (&x)[kBatch], int c) {
    const float2* const md = params.partial_md + int64_t(item.first_slot) * kRows + threadIdx.x / kPer;
#pragma unroll
    for (int b = 0; b < kBatch; ++b)
      x[b] = c + b * kPer < item.num_chunks ? __ldcg(md + (c + b * kPer) * kRows) : make_float2(-FI_INF, 0.f);
  }
  // Normalised weights of the chunks, memory[chunk][row], and the log-sum-exp. first: the first (m, d) of this thread.
  template <class Params>
  FI_DEVICE static void weights(const Params& params, const PrefillItem& item, const float2 (&first)[kBatch], float* memory,
                                float scale, bool with_lse) {
    const int row = threadIdx.x / kPer, part = threadIdx.x % kPer, chunks = item.num_chunks;
    float top = -FI_INF, d = 0.f;
    auto each = [&](auto use) {
#pragma unroll
      for (int b = 0; b < kBatch; ++b) use(part + b * kPer, first[b]);
#pragma unroll 1
      for (int c = part + kBatch * kPer; c < chunks; c += kBatch * kPer) {
        float2 x[kBatch];
        read_md(params, item, x, c);
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

  // Four vectors of up to four chunks at a time, or one of sixteen.
  FI_DEVICE static void ask(float4 (&x)[kFlight], const float4* partial, int chunks, int number) {
    if (chunks <= 4)
      ask<4, 4>(x, partial, chunks, number, 0);
    else
      ask<1, 16>(x, partial, chunks, number, 0);
  }
  template <class Params>
  FI_DEVICE static void add(const Params& params, const PrefillItem& item, float4 (&x)[kFlight], const float4* partial,
                            const float* memory, int number, int row, int column) {
    if (item.num_chunks <= 4)
      add<4, 4>(params, item, x, partial, memory, number, row, column);
    else
      add<1, 16>(params, item, x, partial, memory, number, row, column);
  }
  // Vectors first, first + slices, ... of chunks c, c + 1, ...
  template <int kN, int kC>
  FI_DEVICE static void ask(float4 (&x)[kFlight], const float4* partial, int chunks, int first, int c) {
    static_assert(kN * kC == kFlight);
    const int slices = min(chunks, kVectors);
#pragma unroll
    for (int i = 0; i < kFlight; ++i) {
      const int n = first + i / kC * slices, chunk = c + i % kC;
      x[i] = n < kVectors && chunk < chunks ? __ldcg(partial + (int64_t(chunk) * kVectors + n) * kThreads)
                                            : make_float4(0.f, 0.f, 0.f, 0.f);
    }
  }

  // Vectors number, number + slices, ... of the result; x: the first of them, asked for.
  template <int kN, int kC, class Params>
  FI_DEVICE static void add(const Params& params, const PrefillItem& item, float4 (&x)[kFlight], const float4* partial,
                            const float* memory, int number, int row, int column) {
    using O = typename Config::O;
    const int chunks = item.num_chunks, slices = min(chunks, kVectors), heads = params.group.divisor;
#pragma unroll 1
    for (int first = number; first < kVectors; first += kN * slices) {
      float4 sum[kN];
#pragma unroll
      for (int i = 0; i < kN; ++i) sum[i] = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll 1
      for (int c = 0; c < chunks; c += kC) {
        if (first != number || c != 0) ask<kN, kC>(x, partial, chunks, first, c);
#pragma unroll
        for (int b = 0; b < kC; ++b) {
          const bool there = c + b < chunks;
          const float lo = there ? memory[(c + b) * kRows + row] : 0.f, hi = there ? memory[(c + b) * kRows + row + 8] : 0.f;
#pragma unroll
          for (int i = 0; i < kN; ++i) {
            const float4& part = x[i * kC + b];
            sum[i].x = fmaf(lo, part.x, sum[i].x), sum[i].y = fmaf(lo, part.y, sum[i].y);
            sum[i].z = fmaf(hi, part.z, sum[i].z), sum[i].w = fmaf(hi, part.w, sum[i].w);
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
