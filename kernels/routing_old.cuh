// DeepSeek-V3's routing: experts by sigmoid scores, first the best groups of experts, then the best experts in them.
// biased = sigmoid(score) + bias chooses; the weights are the sigmoids of the chosen, normalised and scaled. One warp a token,
// kWarps tokens a CTA; grid = ceil(tokens / kWarps). Equal values: the lower number first. NaN counts as -inf in the choice.
// A group belongs to 2^shift neighbouring lanes, each with kPer neighbouring experts in registers: the lanes are in the order of the
// experts, so that the lowest lane with the largest value holds the lowest number. Shared memory: none. Bytes moved: the scores once.
// Architecture: any.
#pragma once
#include "common/math.cuh"
#include "common/reduce.cuh"
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
  uint32_t tokens, groups, top_groups, top_k;
  uint32_t size;   // experts of a group
  uint32_t shift;  // lanes of a group: 2^shift
  float factor;
  uint32_t wide;     // indices are int64
  uint32_t vectors;  // scores and biases of a lane start on 16 bytes, and end with a whole access
};

// `count` of N neighbouring elements as fp32, in accesses of 16 bytes if `vectors`; nothing is loaded past them.
template <typename T, int N>
FI_DEVICE void load_part(const T* p, int count, bool vectors, float (&out)[N]) {
  constexpr int kPart = 16 / sizeof(T);
  if constexpr (N % kPart == 0) {
    if (vectors) {
#pragma unroll
      for (int i = 0; i < N; i += kPart) {
        if (i >= count) continue;
        const auto part = Vec<T, kPart>::load(p + i);
#pragma unroll
        for (int j = 0; j < kPart; ++j) out[i + j] = to_float(part[j]);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < N; ++i)
    if (i < count) out[i] = to_float(p[i]);
}

FI_DEVICE float routing_sigmoid(float x) { return math::ptx_rcp(1.f + expf(-x)); }

// Config: T, Bias, Out, kWarps, kPer
template <class Config>
FI_DEVICE void routing_topk(const RoutingParams& params) {
  using T = typename Config::T;
  using Bias = typename Config::Bias;
  constexpr int kPer = Config::kPer;
  constexpr float kLowest = -3.402823466e38f;  // below every score, above -inf: what NaN and -inf count as
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const uint32_t token = blockIdx.x * Config::kWarps + warp_id(), lane = lane_id();
  if (token >= params.tokens) return;
  const uint32_t group = lane >> params.shift, in_group = (lane & ((1u << params.shift) - 1)) * kPer;
  const uint32_t first = group * params.size + in_group;
  const int count = group < params.groups ? max(int(params.size - in_group), 0) : 0;
  const T* const scores = static_cast<const T*>(params.scores) + token * params.scores_stride;

  // Keys are in the order of the values; 0, below all of them, is what is not there.
  uint32_t key[kPer];
  float best = __int_as_float(0xff800000), second = best;
  {
    float score[kPer] = {}, bias[kPer] = {};
    load_part(scores + first, count, params.vectors, score);
    load_part(static_cast<const Bias*>(params.bias) + first, count, params.vectors, bias);
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const float sum = routing_sigmoid(score[j]) + bias[j], x = sum > kLowest ? sum : kLowest;
      const uint32_t bits = __float_as_uint(x);
      key[j] = j < count ? bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u) : 0;
      if (j < count) second = fmaxf(second, fminf(best, x)), best = fmaxf(best, x);
    }
  }

  if (params.groups > 1) {  // a group's score: the sum of its two best experts
    for (uint32_t offset = 1; offset < 1u << params.shift; offset *= 2) {
      const float other_best = __shfl_xor_sync(kFullMask, best, offset), other_second = __shfl_xor_sync(kFullMask, second, offset);
      second = fmaxf(fminf(best, other_best), fmaxf(second, other_second));
      best = fmaxf(best, other_best);
    }
    const float own = fmaxf(best + second, kLowest);
    uint32_t rank = 0;
    for (uint32_t g = 0; g < params.groups; ++g) {
      const float other = __shfl_sync(kFullMask, own, g << params.shift);
      rank += other > own || (other == own && g < group);
    }
    if (rank >= params.top_groups) {
#pragma unroll
      for (int j = 0; j < kPer; ++j) key[j] = 0;
    }
  }

  uint32_t expert = 0;  // lane i: choice i
  for (uint32_t i = 0; i < params.top_k; ++i) {
    uint32_t mine = key[0];
#pragma unroll
    for (int j = 1; j < kPer; ++j) mine = max(mine, key[j]);
    const uint32_t most = ptx::warp_max_u32(mine);
    const uint32_t winner = __ffs(__ballot_sync(kFullMask, mine == most)) - 1;
    uint32_t slot = 0;
#pragma unroll
    for (int j = kPer - 1; j > 0; --j)
      if (key[j] == most) slot = j;
    if (key[0] == most) slot = 0;
    const uint32_t number = __shfl_sync(kFullMask, first + slot, winner);
    if (lane == i) expert = number;
    if (lane == winner) {
#pragma unroll
      for (int j = 0; j < kPer; ++j)
        if (j == slot) key[j] = 0;
    }
  }

  const float weight = lane < params.top_k ? routing_sigmoid(to_float(scores[expert])) : 0.f;
  const float sum = warp_reduce<Sum>(weight);
  if (lane < params.top_k) {
    const float value = weight / (sum + 1e-20f) * params.factor;
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
