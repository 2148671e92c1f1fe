// Dequantisation factors a head, on the device. A null pointer is a factor of 1; step 0 is one factor for all heads.
#pragma once
#include "common/base.cuh"

namespace fi {

struct HeadScales {
  const float* q;  // [num_qo_heads]
  const float* k;  // [num_kv_heads]
  const float* v;  // [num_kv_heads]
  uint32_t q_step, k_step, v_step, unused;

  // Multiplies sm_scale.
  FI_DEVICE float logit(int qo_head, int kv_head) const {
    return (q ? q[qo_head * q_step] : 1.f) * (k ? k[kv_head * k_step] : 1.f);
  }
  // Multiplies the output, not the lse.
  FI_DEVICE float output(int kv_head) const { return v ? v[kv_head * v_step] : 1.f; }
};

}  // namespace fi
