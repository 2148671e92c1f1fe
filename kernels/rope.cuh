// Rotary position embedding of q and k, in place or not: features (a, b) of a pair become
//   (a cos - b sin, b cos + a sin)  with the angle position * frequency[pair].
// The gridDim.y CTAs of a token share its q and k heads; grid = tokens x parts. The token's data are loaded first, then its cosines
// and sines are computed once (while the loads fly) and shared by all heads.
// Angles are fractions of a turn in 64-bit fixed point: position * turns[pair] modulo 2^64 is the exact range reduction,
// so the error does not grow with the position, and no slow path is needed.
// Shared memory: rotary_dim floats. Bytes moved: read and write of the rotated features. Architecture: any.
#pragma once
#include "common/segments.cuh"
#include "common/vec.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct alignas(64) RopeParams {
  uint64_t turns[128];    // by pair: frequency / 2 pi, in 2^-64 turns a position
  const void* q;          // [tokens, num_qo_heads, head_dim]
  const void* k;          // [tokens, num_kv_heads, head_dim]
  void* q_out;            // may be q
  void* k_out;            // may be k
  const void* positions;  // kSegments: offsets [batch]; else position of every token
  const void* indptr;     // kSegments: [batch + 1]
  const float* cos_sin;   // kCache: [max_position, rotary_dim], cosines first
  int64_t q_stride_n, q_stride_h, k_stride_n, k_stride_h;  // elements
  int64_t q_out_stride_n, q_out_stride_h, k_out_stride_n, k_out_stride_h;
  int64_t cos_sin_stride;
  uint32_t num_qo_heads, num_kv_heads;
  uint32_t batch;
};

// Config: T, I (int32_t or int64_t), kRotaryDim, kVec, kRest, kThreads, kUnroll (units a thread at a time), kInterleave, kSegments, kCache
// kRest: features after kRotaryDim that are copied (0 in place). kUnroll 1: few tokens, of which each thread has one unit (the
// grid has CTAs enough), and whose time is that of a thread's own instructions.
template <class Config>
FI_DEVICE void rope(const RopeParams& params) {
  using T = typename Config::T;
  using I = typename Config::I;
  constexpr int kVec = Config::kVec, kThreads = Config::kThreads, kUnroll = Config::kUnroll;
  constexpr int kHalf = Config::kRotaryDim / 2, kPerHead = kHalf / kVec, kRestVecs = Config::kRest / kVec;
  // A thread's unit is two vectors: the halves of kVec pairs, or kVec / 2 whole pairs in each.
  constexpr bool kAdjacent = Config::kInterleave && kVec == 1;  // the pair is two neighbouring one-element vectors
  constexpr int kStep = kAdjacent ? 2 : kVec, kDistance = kAdjacent ? 1 : kHalf;
  static_assert(kHalf % kVec == 0 && Config::kRest % kVec == 0 && (Config::kCache || kHalf <= 128));
  using V = Vec<T, kVec>;
  __shared__ __align__(16) float cosines[kHalf];
  __shared__ __align__(16) float sines[kHalf];

  ptx::grid_launch_dependents();
  ptx::grid_wait();

  constexpr bool kOnce = kUnroll == 1;
  const uint32_t token = blockIdx.x;
  const uint32_t heads = params.num_qo_heads + params.num_kv_heads;
  const uint32_t units = heads * kPerHead;
  const T* q = static_cast<const T*>(params.q) + token * params.q_stride_n;
  const T* k = static_cast<const T*>(params.k) + token * params.k_stride_n;
  T* q_out = static_cast<T*>(params.q_out) + token * params.q_out_stride_n;
  T* k_out = static_cast<T*>(params.k_out) + token * params.k_out_stride_n;
  auto source = [&](uint32_t head) {
    const bool is_q = head < params.num_qo_heads;
    if constexpr (kOnce)  // which array is chosen before anything is multiplied: no branch
      return static_cast<const T*>(is_q ? params.q : params.k) + token * (is_q ? params.q_stride_n : params.k_stride_n) +
             (is_q ? head : head - params.num_qo_heads) * (is_q ? params.q_stride_h : params.k_stride_h);
    return is_q ? q + head * params.q_stride_h : k + (head - params.num_qo_heads) * params.k_stride_h;
  };
  auto target = [&](uint32_t head) {
    const bool is_q = head < params.num_qo_heads;
    if constexpr (kOnce)
      return static_cast<T*>(is_q ? params.q_out : params.k_out) +
             token * (is_q ? params.q_out_stride_n : params.k_out_stride_n) +
             (is_q ? head : head - params.num_qo_heads) * (is_q ? params.q_out_stride_h : params.k_out_stride_h);
    return is_q ? q_out + head * params.q_out_stride_h : k_out + (head - params.num_qo_heads) * params.k_out_stride_h;
  };

  V a[kUnroll], b[kUnroll];
  auto load = [&](uint32_t first) {
#pragma unroll
    for (int n = 0; n < kUnroll; ++n) {
      uint32_t unit = first + n * kThreads;
      // Without a branch ptxas multiplies by the position behind these loads; what it makes of a cache row's address, with one.
      constexpr bool kStraight = kOnce && !Config::kCache;
      if (kStraight) unit = min(unit, units - 1);
      if (kStraight || unit < units) {
        const T* x = source(unit / kPerHead) + (unit % kPerHead) * kStep;
        a[n] = V::load(x);
        b[n] = V::load(x + kDistance);
      }
    }
  };

  const uint32_t start = blockIdx.y * (kThreads * kUnroll) + threadIdx.x;
  T* first_target = nullptr;
  uint64_t first_turn = 0;
  int64_t position = 0;
  if constexpr (Config::kSegments) {
    const I* indptr = static_cast<const I*>(params.indptr);
    const int segment = warp_find_segment(indptr, int(params.batch), token);
    // Tokens outside every segment stay as they are: position 0.
    if (segment >= 0) position = int64_t(static_cast<const I*>(params.positions)[segment]) + token - indptr[segment];
    load(start);
  } else {
    // The position is asked for first and looked at last: everything else of the token is under way by then.
    I raw = static_cast<const I*>(params.positions)[token];
    load(start);
    if constexpr (kOnce) {
      first_target = target(start / kPerHead);
      // The frequency is asked for early: it comes from the launch's parameters, another 8 bytes a lane.
      if constexpr (!Config::kCache) first_turn = params.turns[threadIdx.x % kHalf];
    }
    keep_until_here(raw);
    // ptxas moves no load across it, and would move some of the data behind the wait for the position.
    if constexpr (kOnce && !Config::kCache) __syncthreads();
    position = raw;
  }

#pragma unroll
  for (int i = 0; i < ceil_div(kHalf, kThreads); ++i) {
    const int pair = threadIdx.x + i * kThreads;
    if (kHalf % kThreads != 0 && pair >= kHalf) break;
    if constexpr (Config::kCache) {
      const float* row = params.cos_sin + position * params.cos_sin_stride;
      cosines[pair] = row[pair];
      sines[pair] = row[kHalf + pair];
    } else {
      // The top 32 bits as a signed number are the angle in (-1/2, 1/2) turns; sincospi takes half turns.
      const uint64_t frequency = kOnce && !Config::kSegments && i == 0 ? first_turn : params.turns[pair];
      const int32_t turn = int32_t((uint64_t(position) * frequency) >> 32);
      if constexpr (sizeof(T) == 2) {  // the unit's own error there, 5e-7, is far below the rounding of a 16-bit feature
        const float angle = float(turn) * (0x1p-31f * 3.14159265f);
        sines[pair] = __sinf(angle), cosines[pair] = __cosf(angle);
      } else {
        sincospif(float(turn) * 0x1p-31f, &sines[pair], &cosines[pair]);
      }
    }
  }
  __syncthreads();  // cosines and sines are complete

  auto rotate_and_store = [&](uint32_t first) {
#pragma unroll
    for (int n = 0; n < kUnroll; ++n) {
      const uint32_t unit = first + n * kThreads;
      if (unit < units) {
        const uint32_t slot = unit % kPerHead;
        float x[kVec], y[kVec];
        a[n].to_floats(x);
        b[n].to_floats(y);
        if constexpr (Config::kInterleave && !kAdjacent) {
          constexpr int kPairs = kVec / 2;
          float cx[kPairs], sx[kPairs], cy[kPairs], sy[kPairs];
          load_floats(cosines + slot * kPairs, cx);
          load_floats(sines + slot * kPairs, sx);
          load_floats(cosines + kHalf / 2 + slot * kPairs, cy);
          load_floats(sines + kHalf / 2 + slot * kPairs, sy);
#pragma unroll
          for (int j = 0; j < kPairs; ++j) {
            const float x0 = x[2 * j], x1 = x[2 * j + 1], y0 = y[2 * j], y1 = y[2 * j + 1];
            x[2 * j] = x0 * cx[j] - x1 * sx[j];
            x[2 * j + 1] = x1 * cx[j] + x0 * sx[j];
            y[2 * j] = y0 * cy[j] - y1 * sy[j];
            y[2 * j + 1] = y1 * cy[j] + y0 * sy[j];
          }
        } else {
          float c[kVec], s[kVec];
          load_floats(cosines + slot * kVec, c);
          load_floats(sines + slot * kVec, s);
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            const float x0 = x[j], y0 = y[j];
            x[j] = x0 * c[j] - y0 * s[j];
            y[j] = y0 * c[j] + x0 * s[j];
          }
        }
        T* out = (kOnce && !Config::kSegments ? first_target : target(unit / kPerHead)) + slot * kStep;
        V::from_floats(x).store(out);
        V::from_floats(y).store(out + kDistance);
      }
    }
  };
  if constexpr (kOnce) {
    rotate_and_store(start);
  } else {
    const uint32_t step = gridDim.y * (kThreads * kUnroll);
    for (uint32_t first = start;;) {
      rotate_and_store(first);
      first += step;
      if (first >= units) break;
      load(first);
    }
  }

  if constexpr (kRestVecs > 0) {
    for (uint32_t i = blockIdx.y * kThreads + threadIdx.x; i < heads * kRestVecs; i += gridDim.y * kThreads) {
      const uint32_t column = Config::kRotaryDim + (i % kRestVecs) * kVec;
      V::load(source(i / kRestVecs) + column).store(target(i / kRestVecs) + column);
    }
  }
}

}  // namespace fi
