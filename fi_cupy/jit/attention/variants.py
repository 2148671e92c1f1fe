"""Declarations of variants in FlashInfer's form, by backend."""

from __future__ import annotations

from typing import NoReturn

from fi_cupy.errors import UnsupportedError


class _ByBackend(dict[str, str]):
    """Texts by backend; one that is not there raises what would work."""

    def __missing__(self, backend: str) -> NoReturn:
        raise UnsupportedError(f"attention_sink_decl: backend is {backend!r}, expected {' or '.join(map(repr, self))}")


#: A logit a head (``params.sink``, float32) that joins the denominator once. `sm_scale` scales the products alone.
attention_sink_decl = _ByBackend(
    fa2="""
struct AttentionSink : AttentionVariantBase {
  static constexpr bool use_softmax = true;
  uint32_t window_left, qo_len, kv_len;
  float sm_scale_log2;

  template <typename Params>
  __device__ __host__ AttentionSink(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = (params.window_left >= 0) ? params.window_left : kv_len;
    sm_scale_log2 = params.sm_scale * math::log2e;
  }

  // The maximum and the sum go on as if the sink were one more key of the first tile.
  REGISTER_M_D_UPDATE(params, kv_tile_idx, qo_head_idx, m, d, scale, {
    float log_sink = kv_tile_idx == 0 ? params.sink[qo_head_idx] * math::log2e : -math::inf;
    float m_new = (log_sink > m) ? log_sink : m;
    scale = math::ptx_exp2(m - m_new);
    d = math::ptx_exp2(log_sink - m_new) + d * scale;
    m = m_new;
  })

  REGISTER_OUTPUT_TRANSFORM(params, output, batch_idx, qo_idx, qo_head_idx, m, d, scale, {
    return output * scale * ((m != -math::inf) ? math::ptx_rcp(d) : 0.f);
  });
};
"""
)
