// DeepSeek-V3's routing: experts by sigmoid scores, first the best groups of experts, then the best experts in them.
// biased = sigmoid(score) + bias chooses; the weights are the sigmoids of the chosen, normalised and scaled. One warp a token,
// kWarps tokens a CTA; grid = ceil(tokens / kWarps). Equal values: the lower number first. NaN counts as -inf in the choice.
// Shared memory, dynamic: 2 x experts floats a warp. Bytes moved: the scores once. Architecture: any.
#pragma once
#include "common/vec.cuh"
#include "ptx/pdl.cuh"

namespace fi {

struct RoutingParams {
  const void* scores;  // [tokens, experts] in T
  const void* bias;    // [experts] in Bias
  void* values;        // [tokens, top_k] in Out
  void* indices;       // [tokens, top_k] int32 or int64
  int64_t scores_stride, values_stride, indices_stride;  // elements
  uint32_t tokens, experts, groups, top_groups, top_k;
  float factor;
  uint32_t wide;  // indices are int64
};

// The largest value and, among equals, its lowest number; every lane gets both.
FI_DEVICE void warp_argmax(float& value, uint32_t& number) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(kFullMask, value, offset);
    const uint32_t its = __shfl_xor_sync(kFullMask, number, offset);
    if (other > value || (other == value && its < number)) value = other, number = its;
  }
}

// Config: T, Bias, Out, kWarps
template <class Config>
FI_DEVICE void routing_topk(const RoutingParams& params) {
  constexpr float kLowest = -3.402823466e38f;  // below every score, above -inf: what NaN and -inf count as
  const float kTaken = __int_as_float(0xff800000);
  extern __shared__ __align__(1024) uint8_t smem[];
  ptx::grid_launch_dependents();
  ptx::grid_wait();
  const uint32_t token = blockIdx.x * Config::kWarps + warp_id(), lane = lane_id(), experts = params.experts;
  if (token >= params.tokens) return;
  float* const weight = reinterpret_cast<float*>(smem) + warp_id() * 2 * experts;  // sigmoids
  float* const biased = weight + experts;
  const auto* scores = static_cast<const typename Config::T*>(params.scores) + token * params.scores_stride;
  for (uint32_t e = lane; e < experts; e += kWarpSize) {
    const float s = 1.f / (1.f + expf(-to_float(scores[e])));
    const float b = s + to_float(static_cast<const typename Config::Bias*>(params.bias)[e]);
    weight[e] = s;
    biased[e] = b > kLowest ? b : kLowest;
  }
  __syncwarp();

  // Lane g holds group g's score: the sum of its two best experts.
  const uint32_t size = experts / params.groups;
  uint32_t kept = 0xffffffffu;
  if (params.groups > 1) {
    float group_score = kTaken;
    for (uint32_t g = 0; g < params.groups; ++g) {
      float first = kTaken, second = kTaken;
      for (uint32_t e = lane; e < size; e += kWarpSize) {
        const float x = biased[g * size + e];
        second = fmaxf(second, fminf(first, x));
        first = fmaxf(first, x);
      }
#pragma unroll
      for (int offset = 16; offset > 0; offset /= 2) {
        const float other_first = __shfl_xor_sync(kFullMask, first, offset);
        const float other_second = __shfl_xor_sync(kFullMask, second, offset);
        second = fmaxf(fminf(first, other_first), fmaxf(second, other_second));
        first = fmaxf(first, other_first);
      }
      if (lane == g) group_score = fmaxf(first + second, kLowest);
    }
    kept = 0;
    for (uint32_t i = 0; i < params.top_groups; ++i) {
      float best = group_score;
      uint32_t number = lane;
      warp_argmax(best, number);
      kept |= 1u << number;
      if (lane == number) group_score = kTaken;
    }
  }

  float sum = 0.f, own_weight = 0.f;
  uint32_t own_expert = 0;
  for (uint32_t i = 0; i < params.top_k; ++i) {
    float best = kTaken;
    uint32_t number = experts;
    for (uint32_t e = lane; e < experts; e += kWarpSize) {
      if (!(kept >> (e / size) & 1)) continue;
      const float x = biased[e];
      if (x > best) best = x, number = e;
    }
    warp_argmax(best, number);
    const float w = weight[number];
    sum += w;
    if (lane == i) own_weight = w, own_expert = number;
    __syncwarp();  // every lane has read this round's values
    if (lane == 0) biased[number] = kTaken;
    __syncwarp();  // the chosen one is out
  }
  if (lane < params.top_k) {
    const float value = own_weight / (sum + 1e-20f) * params.factor;
    static_cast<typename Config::Out*>(params.values)[token * params.values_stride + lane] =
        from_float<typename Config::Out>(value);
    const int64_t at = token * params.indices_stride + lane;
    if (params.wide) {
      static_cast<int64_t*>(params.indices)[at] = own_expert;
    } else {
      static_cast<int32_t*>(params.indices)[at] = own_expert;
    }
  }
}

}  // namespace fi
