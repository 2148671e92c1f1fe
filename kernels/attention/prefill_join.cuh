// The end of a split query tile in the prefill kernel: its CTAs add their partial results up along a tree of degree four.
// Each CTA leaves its accumulators and (m, d) in the workspace and counts itself at its node; the last of a node's CTAs
// adds the children up and goes on to the next level, and the one that reaches the root takes the whole tile back.
// o = sum_c 2^(m_c - m) o_c, d likewise, in the order of the chunks: the bits do not depend on the order of arrival.
// A level is up to four reads and a write of a tile (64 KB at 128 x 128) with up to 16 loads a thread in flight, so that
// 16 chunks cost two levels and not sixteen tiles read by one CTA at the end.
// From memory to memory, so that the accumulators of the main loop are dead meanwhile: the tile has no registers to spare.
#pragma once
#include "attention/smem_tile.cuh"
#include "common/math.cuh"
#include "ptx/atomics.cuh"

namespace fi {

// Returns whether these threads have the whole tile, in o and state; the others are done. scale: from m to base 2.
// Part: the threads that share a tile: thread(), sync(), arrived() (a word in shared memory of theirs), and where their
// chunk's results lie: place(chunk), counters(), chunk(), chunks().
// Partial results lie in the workspace as the threads hold them: 16 bytes a thread, whole lines a warp. The node of the
// children c, c + step, .. (c a multiple of 4 step) counts at the second child's slot, which no other node does, and its
// sum replaces the first child's result: every thread's own elements, after it has read them.
template <int kWarps, class Part, class Params, class State, int kRowTiles, int kDimTiles>
FI_DEVICE bool join_parts(const Params& params, const Part& whose, float (&o)[kRowTiles][kDimTiles][4], State& state,
                          float scale) {
  constexpr int kDegree = 4, kThreads = kWarps * 32, kTileQ = kWarps * 16 * kRowTiles;
  constexpr int kVectors = kRowTiles * kDimTiles * kThreads;  // float4 of a partial result
  // 16 loads in flight where the registers do not limit the CTAs of a multiprocessor, or the main loop takes them all.
  constexpr bool kMany = kWarps == 1 || kRowTiles * kDimTiles >= 32;
  constexpr int kBatch = FI_ARCH < 800 ? 1 : kMany && kDimTiles % 4 == 0 ? 4 : 2;
  const int thread = whose.thread(), chunks = whose.chunks();
  auto vectors = [&](int chunk) { return params.partial_o + whose.place(chunk) * kVectors + thread; };
  // (m, d) of this thread's row 0; rows i, h: 16 i + 8 h on.
  auto sums = [&](int chunk) {
    return params.partial_md + whose.place(chunk) * kTileQ + (thread >> 5) * 16 * kRowTiles + (thread & 31) / 4;
  };

  int mine = whose.chunk();
  {
    float4* const to = vectors(mine);
    float2* const md = sums(mine);
#pragma unroll
    for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if ((thread & 3) == 0) md[i * 16 + h * 8] = make_float2(state.m[i][h], state.d[i][h]);
#pragma unroll
      for (int n = 0; n < kDimTiles; ++n)
        to[(i * kDimTiles + n) * kThreads] = make_float4(o[i][n][0], o[i][n][1], o[i][n][2], o[i][n][3]);
    }
  }
#pragma unroll 1
  for (int step = 1; step < chunks; step *= kDegree) {
    const int first = mine & ~(kDegree * step - 1), children = min(ceil_div(chunks - first, step), kDegree);
    if (children == 1) continue;  // nothing to add on this level
    // The barrier orders every thread's writes before the one atomic, which wraps to zero for the next launch.
    whose.sync();
    if (thread == 0) whose.arrived() = ptx::atomic_inc_acq_rel(whose.counters() + whose.place(first + step), children - 1);
    whose.sync();
    if (whose.arrived() != uint32_t(children - 1)) return false;
    mine = first;
    const float4* part[kDegree];
#pragma unroll
    for (int j = 0; j < kDegree; ++j) part[j] = vectors(first + j * step);
#pragma unroll 1
    for (int i = 0; i < kRowTiles; ++i) {
      float weight[2][kDegree];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float2 x[kDegree];
        float top = -FI_INF, d = 0.f;
#pragma unroll
        for (int j = 0; j < kDegree; ++j) {
          x[j] = j < children ? __ldcg(sums(first + j * step) + i * 16 + h * 8) : make_float2(-FI_INF, 0.f);
          top = fmaxf(top, x[j].x);
        }
#pragma unroll
        for (int j = 0; j < kDegree; ++j) {
          weight[h][j] = x[j].x == -FI_INF ? 0.f : math::ptx_exp2((x[j].x - top) * scale);
          d = fmaf(weight[h][j], x[j].y, d);
        }
        __syncwarp();  // the row's four lanes have read (m, d)
        if ((thread & 3) == 0) sums(first)[i * 16 + h * 8] = make_float2(top, d);
      }
#pragma unroll 1
      for (int n = i * kDimTiles; n < (i + 1) * kDimTiles; n += kBatch) {
        float4 x[kBatch][kDegree];
#pragma unroll
        for (int b = 0; b < kBatch; ++b)
#pragma unroll
          for (int j = 0; j < kDegree; ++j)
            x[b][j] = j < children ? __ldcg(part[j] + (n + b) * kThreads) : make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
          for (int j = 0; j < kDegree; ++j) {
            sum.x = fmaf(weight[0][j], x[b][j].x, sum.x), sum.y = fmaf(weight[0][j], x[b][j].y, sum.y);
            sum.z = fmaf(weight[1][j], x[b][j].z, sum.z), sum.w = fmaf(weight[1][j], x[b][j].w, sum.w);
          }
          vectors(first)[(n + b) * kThreads] = sum;
        }
      }
    }
  }
  const float4* const from = vectors(0);
  __syncwarp();  // (m, d) are written by one lane of four
#pragma unroll
  for (int i = 0; i < kRowTiles; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 md = __ldcg(sums(0) + i * 16 + h * 8);
      state.m[i][h] = md.x, state.d[i][h] = md.y;
    }
#pragma unroll
    for (int n = 0; n < kDimTiles; ++n) {
      const float4 x = __ldcg(from + (i * kDimTiles + n) * kThreads);
      o[i][n][0] = x.x, o[i][n][1] = x.y, o[i][n][2] = x.z, o[i][n][3] = x.w;
    }
  }
  return true;
}

// A CTA's tile.
template <class Params, class Shared>
struct CtaPart {
  const Params& params;
  Shared& shared;

  FI_DEVICE int thread() const { return thread_again(); }
  FI_DEVICE void sync() const { __syncthreads(); }
  FI_DEVICE uint32_t& arrived() const { return shared.arrived; }
  FI_DEVICE uint32_t* counters() const { return params.counters; }
  FI_DEVICE int chunk() const { return shared.item.chunk; }
  FI_DEVICE int chunks() const { return shared.item.num_chunks; }
  FI_DEVICE int64_t place(int chunk) const {
    return (shared.item.first_slot + chunk) * int64_t(params.group.quotient(params.num_qo_heads)) + shared.kv_head;
  }
};

template <class Config, class Params, class Shared, class State, int kRowTiles, int kDimTiles>
FI_DEVICE bool join_chunks(const Params& params, Shared& shared, float (&o)[kRowTiles][kDimTiles][4], State& state,
                           float scale) {
  return join_parts<Config::kWarps>(params, CtaPart<Params, Shared>{params, shared}, o, state, scale);
}

}  // namespace fi
