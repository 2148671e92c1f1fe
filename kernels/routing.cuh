// DeepSeek-V3's routing: experts by sigmoid scores, first the best groups of experts, then the best experts in them.
// biased = sigmoid(score) + bias chooses; the weights are the sigmoids of the chosen, normalised and scaled. One warp a token,
// kWarps tokens a CTA; grid = ceil(tokens / kWarps). Equal values: the lower number first. NaN counts as -inf in the choice.
// A group belongs to 2^shift neighbouring lanes, each with kPer neighbouring experts in registers: the lanes are in the order of the
// experts, so that the lowest lane with the largest value holds the lowest number. Shared memory: none. Bytes moved: the scores once.
// Architecture: any.
#pragma once
#include "common/math.cuh"
#include "common/vec.cuh"
#include "ptx/pdl.cuh"
#include "ptx/redux.cuh"

namespace fi {

struct RoutingParams {
  const void* scores;  // [tokens, experts] in T
  const void* bias;    // [experts] in Bias
  void* values;        // [tokens, top_k] in Out
  void* indices;       // [tokens, top_k] int32 or int64
  int64_t scores_stride, values_stride, indices_stride;  // elements
  uint32_t tokens, top_groups;
  float factor;
  uint32_t wide;  // indices are int64
};

// `count` of N neighbouring elements as fp32, in accesses of 16 bytes if kVectors; nothing is loaded past them.
template <bool kVectors, typename T, int N>
FI_DEVICE void load_part(const T* p, int count, float (&out)[N]) {
  constexpr int kPart = 16 / sizeof(T);
  if constexpr (kVectors && N % kPart == 0) {
#pragma unroll
    for (int i = 0; i < N; i += kPart) {
      if (i >= count) continue;
      const auto part = Vec<T, kPart>::load(p + i);
#pragma unroll
      for (int j = 0; j < kPart; ++j) out[i + j] = to_float(part[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (i < count) out[i] = to_float(p[i]);
  }
}

FI_DEVICE float routing_sigmoid(float x) { return math::ptx_rcp(1.f + math::ptx_exp2(-math::log2e * x)); }

// Keys are in the order of the values; 0, below all of them, is what is not there, and counts as -inf.
FI_DEVICE uint32_t routing_key(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}
FI_DEVICE float routing_value(uint32_t key) {
  return __uint_as_float(key == 0 ? 0xff800000u : key >> 31 ? key ^ 0x80000000u : ~key);
}

// The larger first: Batcher's odd-even merges.
template <int N>
FI_DEVICE void sort_falling(uint32_t (&key)[N]) {
#pragma unroll
  for (int run = 1; run < N; run *= 2)
#pragma unroll
    for (int apart = run; apart > 0; apart /= 2)
#pragma unroll
      for (int i = 0; i < N - apart; ++i) {
        const bool lower = i >= apart % run && (i - apart % run) / apart % 2 == 0;
        if (!lower || i / (2 * run) != (i + apart) / (2 * run)) continue;
        const uint32_t high = max(key[i], key[i + apart]), low = min(key[i], key[i + apart]);
        key[i] = high, key[i + apart] = low;
      }
}

// Config: T, Bias, Out, kWarps, kGroups, kSize (experts of a group), kShift (a group has 2^kShift lanes), kPer, kTop (chosen),
// kVectors (scores and biases of a lane start on 16 bytes, and end with a whole access)
template <class Config>
FI_DEVICE void routing_topk(const RoutingParams& params) {
  using T = typename Config::T;
  using Bias = typename Config::Bias;
  constexpr int kGroups = Config::kGroups, kSize = Config::kSize, kShift = Config::kShift, kPer = Config::kPer, kTop = Config::kTop;
  constexpr int kLanes = 1 << kShift;          // of a group
  constexpr bool kFull = kSize == kLanes * kPer && kGroups * kLanes == kWarpSize;
  constexpr float kLowest = -3.402823466e38f;  // below every score, above -inf: what NaN and -inf count as
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const uint32_t token = blockIdx.x * Config::kWarps + warp_id(), lane = lane_id();
  if (token >= params.tokens) return;
  const uint32_t group = lane / kLanes, in_group = lane % kLanes * kPer, first = group * kSize + in_group;
  const int count = kFull ? kPer : group < kGroups ? max(kSize - int(in_group), 0) : 0;
  const T* const scores = static_cast<const T*>(params.scores) + token * params.scores_stride;

  uint32_t key[kPer], queue[kPer];  // in the order of the experts, and falling
  {
    float score[kPer] = {}, bias[kPer] = {};
    load_part<Config::kVectors>(scores + first, count, score);
    load_part<Config::kVectors>(static_cast<const Bias*>(params.bias) + first, count, bias);
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const float x = fmaxf(routing_sigmoid(score[j]) + bias[j], kLowest);
      queue[j] = key[j] = j < count ? routing_key(x) : 0;
    }
  }
  sort_falling(queue);

  if constexpr (kGroups > 1) {  // a group's score: the sum of its two best experts
    uint32_t best = queue[0], second = kPer > 1 ? queue[kPer > 1] : 0;
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) {
      const uint32_t other = __shfl_xor_sync(kFullMask, best, offset), next = __shfl_xor_sync(kFullMask, second, offset);
      second = max(min(best, other), max(second, next));
      best = max(best, other);
    }
    const float own = fmaxf(routing_value(best) + routing_value(second), kLowest);
    uint32_t rank = 0;  // each lane of a group compares it with some others
#pragma unroll
    for (int from = 0; from < kGroups; from += kLanes) {
      const uint32_t g = from + lane % kLanes;
      const float other = __shfl_sync(kFullMask, own, g * kLanes % kWarpSize);
      rank += (kGroups % kLanes == 0 || g < kGroups) && (other > own || (other == own && g < group));
    }
#pragma unroll
    for (int offset = 1; offset < kLanes; offset *= 2) rank += __shfl_xor_sync(kFullMask, rank, offset);
    if (rank >= params.top_groups) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) queue[j] = 0;
    }
  }

  uint32_t most = 0, votes = 0;  // lane i: choice i, and the lanes that have it; the lowest wins
#pragma unroll
  for (int i = 0; i < kTop; ++i) {
    const uint32_t top = ptx::warp_max_u32(queue[0]);
    const bool has = queue[0] == top;
    const uint32_t have = __ballot_sync(kFullMask, has);
    if (lane == i) most = top, votes = have;
    if (has && (have & ((1u << lane) - 1)) == 0) {
#pragma unroll
      for (int j = 0; j < kPer && j < kTop - 1 - i; ++j) queue[j] = j + 1 < kPer ? queue[j + 1 < kPer ? j + 1 : j] : 0;
    }
  }

  // Which of the winner's experts it is: the first with this key, or a later one where the choices before took those.
  const uint32_t winner = (__ffs(votes) - 1) & (kWarpSize - 1);
  const uint32_t before = __shfl_up_sync(kFullMask, most, 1), before_winner = __shfl_up_sync(kFullMask, winner, 1);
  const uint32_t again = __ballot_sync(kFullMask, lane > 0 && most == before && winner == before_winner);
  uint32_t matches = 0;
#pragma unroll
  for (int j = 0; j < kPer; ++j) matches |= uint32_t(__shfl_sync(kFullMask, key[j], winner) == most) << j;
#pragma unroll 1
  for (uint32_t skip = __clz(~(again << (kWarpSize - 1 - lane))); skip > 0; --skip) matches &= matches - 1;
  const uint32_t expert = winner / kLanes * kSize + winner % kLanes * kPer + __ffs(matches) - 1;

  const bool chosen = lane < kTop;
  const float weight = chosen ? routing_sigmoid(to_float(scores[expert])) : 0.f;
  float sum = weight;
#pragma unroll
  for (int offset = 1; offset < kTop; offset *= 2) sum += __shfl_xor_sync(kFullMask, sum, offset);
  if (chosen) {
    const float value = weight * math::ptx_rcp(sum + 1e-20f) * params.factor;
    static_cast<typename Config::Out*>(params.values)[token * params.values_stride + lane] =
        from_float<typename Config::Out>(value);
    const int64_t at = token * params.indices_stride + lane;
    if (params.wide) {
      static_cast<int64_t*>(params.indices)[at] = expert;
    } else {
      static_cast<int32_t*>(params.indices)[at] = expert;
    }
  }
}

}  // namespace fi
