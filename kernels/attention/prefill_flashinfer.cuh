// The prefill kernel with a variant written for FlashInfer's fa2 kernels: a struct with LogitsTransform, LogitsMask,
// update_m_d and OutputTransform, made by its REGISTER_* macros. Such a struct sees raw q k products, scales them by its own
// sm_scale_log2, and reads its arguments as params.<name>. It is built anew at every use: what its constructor computes
// does not depend on the element, and the compiler takes it out of the loops.
#pragma once
#include "attention/prefill.cuh"

namespace fi::math {
constexpr float inf = 1.f / 0.f;
}

#define REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, ...)             \
  template <typename Params, typename T>                                                                                \
  __device__ __forceinline__ T LogitsTransform(const Params& params, T logits, uint32_t batch_idx, uint32_t qo_idx,     \
                                               uint32_t kv_idx, uint32_t qo_head_idx, uint32_t kv_head_idx) {           \
    __VA_ARGS__                                                                                                         \
  }
#define REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, ...)                          \
  template <typename Params>                                                                                            \
  __device__ __forceinline__ bool LogitsMask(const Params& params, uint32_t batch_idx, uint32_t qo_idx,                 \
                                             uint32_t kv_idx, uint32_t qo_head_idx, uint32_t kv_head_idx) {             \
    __VA_ARGS__                                                                                                         \
  }
#define REGISTER_M_D_UPDATE(params, kv_tile_idx, qo_head_idx, m, d, scale, ...)                                         \
  template <typename Params, typename T_M>                                                                              \
  __device__ __forceinline__ void update_m_d(const Params& params, uint32_t kv_tile_idx, uint32_t qo_head_idx, T_M& m,  \
                                             float& d, float& scale) {                                                  \
    __VA_ARGS__                                                                                                         \
  }
#define REGISTER_OUTPUT_TRANSFORM(params, output, batch_idx, qo_idx, qo_head_idx, m, d, scale, ...)                     \
  template <typename Params, typename T, typename T_M>                                                                  \
  __device__ __forceinline__ T OutputTransform(const Params& params, T output, uint32_t batch_idx, uint32_t qo_idx,     \
                                               uint32_t qo_head_idx, T_M& m, float& d, float scale) {                   \
    __VA_ARGS__                                                                                                         \
  }

namespace fi {

struct AttentionVariantBase {
  static constexpr bool use_softmax = true;
  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, { return logits; })
  REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, { return true; })
  REGISTER_M_D_UPDATE(params, kv_tile_idx, qo_head_idx, m, d, scale, {})
  REGISTER_OUTPUT_TRANSFORM(params, output, batch_idx, qo_idx, qo_head_idx, m, d, scale, {
    return output * (m != -math::inf ? math::ptx_rcp(d) : 0.f);
  })
};

// What every variant can read of `params`; its own arguments are members of the struct derived from this.
struct FlashInferBase {
  uint32_t qo_len, kv_len, num_qo_heads, num_kv_heads;
  int32_t window_left;
  float sm_scale, logits_soft_cap;
  FI_DEVICE uint32_t get_qo_len(uint32_t) const { return qo_len; }
  FI_DEVICE uint32_t get_kv_len(uint32_t) const { return kv_len; }
};

template <class Variant, bool kMask, bool kOutput, bool kHeadScales = false>
struct FlashInferLogits {
  static constexpr bool kLinear = false;
  static constexpr bool kHasMask = kMask, kHasQuery = false, kHasKey = false, kHasOutput = kOutput;
  static constexpr bool kUseSoftmax = Variant::use_softmax;
  struct Row {
    int batch, qo_idx, qo_head, kv_head, qo_len, kv_len;
  };

  template <class Params>
  FI_DEVICE static Row row(const Params&, const PrefillItem& item, int qo_idx, int qo_head, int kv_head) {
    return {item.request, qo_idx, qo_head, kv_head, item.qo_len, item.kv_len};
  }

  template <class Params>
  FI_DEVICE static auto view(const Params& params, int qo_len, int kv_len) {
    const uint32_t heads = params.num_qo_heads;
    return flashinfer_params(params, FlashInferBase{uint32_t(qo_len), uint32_t(kv_len), heads,
                                                    heads / params.group.divisor, params.window_left, params.sm_scale,
                                                    params.soft_cap});
  }

  template <class Params>
  FI_DEVICE static float apply(const Params& params, const Row& row, float qk, int kv_idx, bool) {
    const auto p = view(params, row.qo_len, row.kv_len);
    Variant variant(p, row.batch, nullptr);
    if constexpr (kHeadScales) qk *= params.scales.logit(row.qo_head, row.kv_head);
    const float x = variant.LogitsTransform(p, qk, row.batch, row.qo_idx, kv_idx, row.qo_head, row.kv_head);
    if constexpr (kUseSoftmax)
      return x * variant.sm_scale_log2;
    else
      return x;
  }

  template <class Params>
  FI_DEVICE static bool mask(const Params& params, const Row& row, int kv_idx) {
    const auto p = view(params, row.qo_len, row.kv_len);
    Variant variant(p, row.batch, nullptr);
    return variant.LogitsMask(p, row.batch, row.qo_idx, kv_idx, row.qo_head, row.kv_head);
  }

  template <class Params>
  FI_DEVICE static void update(const Params& params, const PrefillItem& item, int qo_head, float& m, float& d,
                               float& weight) {
    if constexpr (kUseSoftmax) {
      const auto p = view(params, item.qo_len, item.kv_len);
      Variant variant(p, item.request, nullptr);
      variant.update_m_d(p, 0, qo_head, m, d, weight);  // once a row, when its chunks are joined
    }
  }

  template <class Params>
  FI_DEVICE static float output(const Params& params, const Row& row, float raw, float, float m, float d, float weight,
                                int) {
    const auto p = view(params, row.qo_len, row.kv_len);
    Variant variant(p, row.batch, nullptr);
    return variant.OutputTransform(p, raw, row.batch, row.qo_idx, row.qo_head, m, d, weight) * output_scale(params, row.kv_head);
  }
};

}  // namespace fi
