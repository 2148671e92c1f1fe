"""Attention variants on the GPU against the float64 reference that runs the same Python functions."""

from __future__ import annotations

import numpy as np
import pytest

import fi_cupy
from fi_cupy import decode, prefill
from fi_cupy.arrays import view
from fi_cupy.customize import single_decode_with_kv_cache_with_jit_module, single_prefill_with_kv_cache_with_jit_module
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import CompileError
from fi_cupy.jit import ops
from fi_cupy.reference.attention import (
    attention,
    batch_decode_paged,
    batch_prefill_paged,
    batch_prefill_ragged,
    get_alibi_slopes,
)
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.usefixtures("kernel")  # both prefill kernels
define = fi_cupy.jit.define_variant
HEADS, KV_HEADS = 8, 2


def _slopes(rng, qo, kv):
    return {"slopes": get_alibi_slopes(HEADS)}


#: name -> (options of define_variant, arrays and numbers of a call).
VARIANTS = {
    "soft_cap": (
        {"score_fn": lambda s, c: c.cap * ops.tanh(s / c.cap), "scalars": ["cap"]},
        lambda rng, qo, kv: {"cap": 1.5},
    ),
    "alibi": (
        {"score_fn": lambda s, c: s + c.slopes[c.qo_head] * (c.kv_idx - c.qo_idx), "tensors": ["slopes"]},
        _slopes,
    ),
    "window": (
        {"mask_fn": lambda c: c.kv_len - c.qo_len + c.qo_idx - c.kv_idx <= c.width, "scalars": {"width": 33}},
        lambda rng, qo, kv: {},
    ),
    "relative_bias": (
        {
            "score_fn": lambda s, c: s + c.bias[c.qo_head, ops.clip(c.kv_idx - c.qo_idx, -64, 63) + 64],
            "tensors": {"bias": "float16"},
        },
        lambda rng, qo, kv: {"bias": rng.normal(size=(HEADS, 128)).astype(np.float16)},
    ),
    "full_bias": (
        {"score_fn": lambda s, c: s + c.bias[c.qo_head, c.qo_idx, c.kv_idx], "tensors": ["bias"]},
        lambda rng, qo, kv: {"bias": rng.normal(size=(HEADS, qo, kv)).astype(np.float32)},
    ),
    "document": (
        {
            "mask_fn": lambda c: c.ids[c.kv_len - c.qo_len + c.qo_idx] == c.ids[c.kv_idx],
            "tensors": {"ids": "int32"},
        },
        lambda rng, qo, kv: {"ids": np.sort(rng.integers(0, 4, kv)).astype(np.int32)},
    ),
    "sigmoid": (
        {"use_softmax": False, "score_fn": lambda s, c: ops.sigmoid(s + c.shift), "scalars": ["shift"]},
        lambda rng, qo, kv: {"shift": -1.0},
    ),
    "queries_and_keys": (
        {
            "query_fn": lambda q, c: q * c.gain[c.dim_idx],
            "key_fn": lambda k, c: ops.where((c.kv_idx + c.kv_head) % 3 == 0, -k, k),
            "tensors": ["gain"],
        },
        lambda rng, qo, kv: {"gain": rng.choice([0.5, 1.0, 2.0], 256).astype(np.float32)},
    ),
    "post_process": (
        {"post_process_fn": lambda out, c: ops.silu(4 * out) + 0.01 * c.qo_head + 0.001 * c.dim_idx},
        lambda rng, qo, kv: {},
    ),
    "everything": (
        {
            "score_fn": lambda s, c: c.cap * ops.tanh((s + c.slopes[c.qo_head] * (c.kv_idx - c.qo_idx)) / c.cap),
            "mask_fn": lambda c: c.flags[c.kv_idx] | (c.kv_idx == c.kv_len - c.qo_len + c.qo_idx),
            "query_fn": lambda q, c: q * 2,
            "post_process_fn": lambda out, c: out / 2,
            "tensors": {"slopes": "float32", "flags": "bool"},
            "scalars": {"cap": 4.0},
        },
        lambda rng, qo, kv: {**_slopes(rng, qo, kv), "flags": rng.random(kv) < 0.7},
    ),
}  # fmt: skip


def _inputs(rng, qo, kv, dim=128, dtype="bfloat16"):
    return [normal(rng, (n, h, dim), dtype) for n, h in ((qo, HEADS), (kv, KV_HEADS), (kv, KV_HEADS))]


def _bound(variant, values, like):
    return variant.bind("reference", (), values, view(like))


def _gpu_values(values):
    return {name: cupy.asarray(x) if isinstance(x, np.ndarray) else x for name, x in values.items()}


def _check(out, want, dtype, lse=None, want_lse=None):
    assert_close(to_float64(out), want, to_dtype(dtype), "product")
    if lse is not None and want_lse is not None:
        got, seen = to_float64(lse), np.isfinite(want_lse)
        assert (np.isneginf(got) == ~seen).all()
        # Transformed queries and keys are rounded to 16 bits, which moves a logit by a few thousandths.
        assert np.abs(got - want_lse)[seen].max(initial=0) <= 2e-2


@pytest.mark.parametrize("mask_mode", ["full", "causal"])
@pytest.mark.parametrize("name", VARIANTS)
def test_single(rng, name, mask_mode):
    options, values_of = VARIANTS[name]
    variant = define(name=name, mask_mode=mask_mode, **options)
    kernel = fi_cupy.jit.compile(variant)
    for qo, kv, dim, dtype in ((300, 300, 128, "bfloat16"), (37, 213, 64, "float16"), (3, 1100, 128, "bfloat16")):
        q, k, v = _inputs(rng, qo, kv, dim, dtype)
        values = values_of(rng, qo, kv)
        q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
        bound = _bound(variant, values, q64)
        want, want_lse = attention(
            q64, k64, v64, causal=mask_mode == "causal", variant=bound, params=bound.params()
        )  # fmt: skip
        arrays = [on_gpu(x) for x in (q, k, v)]
        if variant.use_softmax:
            out, lse = kernel.run(*arrays, **_gpu_values(values), return_lse=True)
        else:
            out, lse = kernel.run(*arrays, **_gpu_values(values)), None
        _check(out, want, dtype, lse, want_lse)
        again = kernel.run(*arrays, **_gpu_values(values))
        assert (again.view("u2") == out.view("u2")).all()


def test_no_keys_and_masked_rows(rng):
    kernel = fi_cupy.jit.compile(define(name="nothing", mask_fn=lambda c: c.kv_idx >= c.first, scalars={"first": 0}))
    q, k, v = (on_gpu(x) for x in _inputs(rng, 40, 70))
    out, lse = kernel.run(q, k, v, first=1000, return_lse=True)
    assert (to_float64(out) == 0).all() and np.isneginf(to_float64(lse)).all()
    out, lse = kernel.run(q, k[:0], v[:0], return_lse=True)
    assert (to_float64(out) == 0).all() and np.isneginf(to_float64(lse)).all()


def test_custom_mask_window_and_built_in_options(rng):
    variant = define(
        name="combined", mask_mode="custom", score_fn=lambda s, c: s * 1.5, mask_fn=lambda c: c.kv_idx % 5 != 2
    )
    q, k, v = _inputs(rng, 90, 150)
    mask = rng.random((90, 150)) < 0.7
    options = {"window_left": 60, "logits_soft_cap": 3.0, "pos_encoding_mode": "ALIBI"}
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    bound = _bound(variant, {}, q64)
    want, want_lse = attention(q64, k64, v64, custom_mask=mask, variant=bound, params=bound.params(), **options)
    out, lse = fi_cupy.jit.compile(variant).run(
        *map(on_gpu, (q, k, v)), custom_mask=cupy.asarray(mask), return_lse=True, **options
    )
    _check(out, want, "bfloat16", lse, want_lse)


def test_indices_are_clamped_where_they_leave_the_array(rng):
    variant = define(name="clamped", tensors=["bias"], score_fn=lambda s, c: s + c.bias[c.kv_idx - 100, c.qo_idx * 9])
    bias = rng.normal(size=(7, 3)).astype(np.float32)
    q, k, v = _inputs(rng, 33, 140)
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    bound = _bound(variant, {"bias": bias}, q64)
    want, _ = attention(q64, k64, v64, variant=bound, params=bound.params())
    _check(fi_cupy.jit.compile(variant).run(*map(on_gpu, (q, k, v)), cupy.asarray(bias)), want, "bfloat16")


@pytest.mark.parametrize("name", ["soft_cap", "sigmoid", "post_process", "queries_and_keys"])
def test_cuda_text_equals_python(rng, name):
    options, values_of = VARIANTS[name]
    text = {
        "soft_cap": {"score_fn": "cap * ops::tanh(score / cap)"},
        "sigmoid": {"score_fn": "const float x = score + shift;\nreturn 1.f / (1.f + expf(-x));"},
        "post_process": {"post_process_fn": "4 * out / (1 + expf(-4 * out)) + 0.01f * qo_head + 0.001f * dim_idx"},
        "queries_and_keys": {"query_fn": "q * gain(dim_idx)", "key_fn": "(kv_idx + kv_head) % 3 == 0 ? -k : k"},
    }[name]
    q, k, v = (on_gpu(x) for x in _inputs(rng, 65, 130))
    values = _gpu_values(values_of(rng, 65, 130))
    outs = [fi_cupy.jit.compile(define(name=name, **o)).run(q, k, v, **values) for o in (options, {**options, **text})]
    assert_close(to_float64(outs[0]), to_float64(outs[1]), to_dtype("bfloat16"))


LENS = [(130, 130), (5, 40), (0, 9), (1, 700), (33, 64)]


def _batch_variant():
    return define(
        name="batched", tensors={"gain": "float32", "ids": "int32"}, scalars={"cap": 8.0},
        score_fn=lambda s, c: c.cap * ops.tanh(s / c.cap) * c.gain[c.batch, c.qo_head],
        mask_fn=lambda c: c.ids[c.batch, c.kv_idx] != 1,
    )  # fmt: skip


def _batch_values(rng):
    gain = rng.uniform(0.5, 2, (len(LENS), HEADS)).astype(np.float32)
    return gain, rng.integers(0, 4, (len(LENS), 700)).astype(np.int32)


def test_ragged_batch(rng):
    qo, kv = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in zip(*LENS, strict=True))
    q, k, v = _inputs(rng, int(qo[-1]), int(kv[-1]))
    gain, ids = _batch_values(rng)
    variant = _batch_variant()
    wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(cupy.empty(32 << 20, cupy.uint8), variant=variant)
    wrapper.plan(qo, kv, HEADS, KV_HEADS, 128, causal=True, q_data_type="bfloat16")
    out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
    wrapper.run(*map(on_gpu, (q, k, v)), cupy.asarray(gain), cupy.asarray(ids), out=out, lse=lse)
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    bound = _bound(variant, {"gain": gain, "ids": ids}, q64)
    want, want_lse = batch_prefill_ragged(
        q64, k64, v64, qo, kv, causal=True, variant=bound, params=bound.params()
    )  # fmt: skip
    _check(out, want, "bfloat16", lse, want_lse)


def test_paged_batch_in_a_graph(rng):
    qo_lens, kv_lens = (np.array(x) for x in zip(*LENS, strict=True))
    pages = -(-kv_lens // 16)
    qo, indptr = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (qo_lens, pages))
    indices = rng.permutation(int(indptr[-1]) + 2)[: indptr[-1]].astype(np.int32)
    last = ((kv_lens - 1) % 16 + 1).astype(np.int32)
    cache = normal(rng, (int(indptr[-1]) + 2, 2, 16, KV_HEADS, 128), "bfloat16")
    q = normal(rng, (int(qo[-1]), HEADS, 128), "bfloat16")
    gain, ids = _batch_values(rng)
    variant = _batch_variant()
    wrapper = prefill.BatchPrefillWithPagedKVCacheWrapper(cupy.empty(32 << 20, cupy.uint8), variant=variant)
    wrapper.plan(qo, indptr, indices, last, HEADS, KV_HEADS, 128, 16, causal=True, q_data_type="bfloat16")
    arrays = [on_gpu(q), on_gpu(cache), cupy.asarray(gain), cupy.asarray(ids)]
    out = poisoned(q.shape, "bfloat16")
    cupy.cuda.Device().synchronize()  # the plan and the inputs were made on the default stream
    stream = new_stream()
    with stream:
        wrapper.run(*arrays, out=out)
        stream.synchronize()
        stream.begin_capture()
        wrapper.run(*arrays, out=out)
        graph = stream.end_capture()
        out.fill(np.nan)
        graph.launch(stream)
        stream.synchronize()
    q64, k64, v64 = q.astype(np.float64), cache[:, 0].astype(np.float64), cache[:, 1].astype(np.float64)
    bound = _bound(variant, {"gain": gain, "ids": ids}, q64)
    want, _ = batch_prefill_paged(
        q64, k64, v64, qo, indptr, indices, last, causal=True, variant=bound, params=bound.params()
    )  # fmt: skip
    _check(out, want, "bfloat16")


def test_a_broken_variant_leaves_the_process_and_the_gpu_alive(rng):
    q, k, v = (on_gpu(x) for x in _inputs(rng, 20, 20))
    with pytest.raises(CompileError, match=r"variant:broken:2: .*missing"):
        fi_cupy.jit.compile(define(name="broken", score_fn="score +\n missing(kv_idx)")).run(q, k, v)
    assert np.isfinite(to_float64(fi_cupy.jit.compile(define(name="whole", score_fn="score")).run(q, k, v))).all()


SIGMOID = """
struct FlashSigmoid : AttentionVariantBase {
  static constexpr bool use_softmax = false;
  float scale_log2, bias_log2;
  template <typename Params>
  __device__ __host__ FlashSigmoid(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    scale_log2 = params.logits_scale * math::log2e;
    bias_log2 = params.sigmoid_bias * math::log2e;
  }
  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    return math::ptx_rcp(1.f + math::ptx_exp2(-float(logits * scale_log2 + bias_log2)));
  });
  REGISTER_OUTPUT_TRANSFORM(params, output, batch_idx, qo_idx, qo_head_idx, m, d, scale, { return output; })
};
"""
DUMP = """
struct Dump : AttentionVariantBase {
  uint32_t window_left, qo_len, kv_len;
  float sm_scale_log2;
  template <typename Params>
  __device__ __host__ Dump(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = kv_len;
    sm_scale_log2 = params.sm_scale * math::log2e;
  }
  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    if (qo_idx < qo_len && kv_idx < kv_len)
      params.logits_out[(qo_head_idx * qo_len + qo_idx) * kv_len + kv_idx] = logits * params.sm_scale;
    return logits;
  })
  REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    return (params.bits[kv_idx / 8] >> (kv_idx % 8)) & 1;
  })
};
"""
SINK = """
struct Sink : AttentionVariantBase {
  float sm_scale_log2;
  template <typename Params>
  __device__ __host__ Sink(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    sm_scale_log2 = params.sm_scale * math::log2e;
  }
  REGISTER_M_D_UPDATE(params, kv_tile_idx, qo_head_idx, m, d, scale, {
    float log_sink = kv_tile_idx == 0 ? params.sink[qo_head_idx] * math::log2e : -math::inf;
    float m_new = (log_sink > m) ? log_sink : m;
    scale = math::ptx_exp2(m - m_new);
    d = math::ptx_exp2(log_sink - m_new) + d * scale;
    m = m_new;
  })
  REGISTER_OUTPUT_TRANSFORM(params, output, batch_idx, qo_idx, qo_head_idx, m, d, scale, {
    return output * scale * ((m != -math::inf) ? math::ptx_rcp(d) : 0.f);
  })
};
"""


def _module(name, text, tensors, types, scalars):
    return fi_cupy.jit.gen_customize_single_prefill_module(
        "fa2", f"test_{name}", "float16", "float16", "float16", 128, 128, tensors, types, scalars,
        ["double"] * len(scalars), name, text,
    ).build_and_load()  # fmt: skip


def test_flashinfer_sigmoid(rng):
    q, k, v = _inputs(rng, 128, 327, dtype="float16")
    module = _module("FlashSigmoid", SIGMOID, [], [], ["logits_scale", "sigmoid_bias"])
    out = single_prefill_with_kv_cache_with_jit_module(module, *map(on_gpu, (q, k, v)), 128**-0.5, 0.25)
    variant = define(name="same", use_softmax=False, score_fn=lambda s, c: ops.sigmoid(s + 0.25))
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    bound = _bound(variant, {}, q64)
    want, _ = attention(q64, k64, v64, variant=bound, params=bound.params())
    _check(out, want, "float16")


def test_flashinfer_mask_and_a_tensor_that_is_written(rng):
    q, k, v = _inputs(rng, 50, 77, dtype="float16")
    mask = rng.random(77) < 0.6
    bits = cupy.asarray(np.packbits(mask, bitorder="little"))
    logits = cupy.full((HEADS, 50, 77), np.nan, cupy.float32)
    module = _module("Dump", DUMP, ["logits_out", "bits"], ["float", "uint8_t"], ["sm_scale"])
    out = single_prefill_with_kv_cache_with_jit_module(module, *map(on_gpu, (q, k, v)), logits, bits, 128**-0.5)
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    want, _ = attention(q64, k64, v64, custom_mask=np.broadcast_to(mask, (50, 77)))
    _check(out, want, "float16")
    scores = np.einsum("qhd,khd->hqk", q64, np.repeat(k64, HEADS // KV_HEADS, 1)) * 128**-0.5
    np.testing.assert_allclose(cupy.asnumpy(logits), scores, rtol=1e-3, atol=1e-3)
    single = single_decode_with_kv_cache_with_jit_module(
        module, *map(on_gpu, (q[-1], k, v)), logits[:, :1].copy(), bits, 128**-0.5
    )
    _check(single, want[-1], "float16")


def test_flashinfer_sink(rng):
    q, k, v = _inputs(rng, 50, 77, dtype="float16")
    sinks = rng.normal(size=HEADS).astype(np.float32)
    module = _module("Sink", SINK, ["sink"], ["float"], ["sm_scale"])
    out, lse = single_prefill_with_kv_cache_with_jit_module(
        module, *map(on_gpu, (q, k, v)), cupy.asarray(sinks), 128**-0.5, mask_mode=1, return_lse=True
    )
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    want, want_lse = attention(q64, k64, v64, causal=True, sinks=sinks.astype(np.float64))
    _check(out, want, "float16", lse, want_lse)


def test_flashinfer_jit_args(rng):
    q, k, v = _inputs(rng, 60, 90, dtype="float16")
    jit_args = (
        "test_batch_sigmoid", "float16", "float16", "float16", "int32", 128, 128, [], [],
        ["logits_scale", "sigmoid_bias"], ["double", "double"], "FlashSigmoid", SIGMOID,
    )  # fmt: skip
    wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(cupy.empty(1 << 20, cupy.uint8), jit_args=jit_args)
    wrapper.plan([0, 20, 60], [0, 50, 90], HEADS, KV_HEADS, 128, q_data_type="float16")
    out = wrapper.run(*map(on_gpu, (q, k, v)), 128**-0.5, 0.25)
    module = _module("FlashSigmoid", SIGMOID, [], [], ["logits_scale", "sigmoid_bias"])
    for rows, keys in ((slice(0, 20), slice(0, 50)), (slice(20, 60), slice(50, 90))):
        parts = [on_gpu(x) for x in (q[rows], k[keys], v[keys])]
        single = single_prefill_with_kv_cache_with_jit_module(module, *parts, 128**-0.5, 0.25)
        assert_close(to_float64(out[rows]), to_float64(single), to_dtype("float16"))


@pytest.mark.parametrize("use_softmax", [True, False])
def test_batch_decode(rng, use_softmax):
    lens = np.array([1, 40, 700, 2000, 33])
    pages = -(-lens // 16)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    indices = rng.permutation(int(indptr[-1]) + 2)[: indptr[-1]].astype(np.int32)
    last = ((lens - 1) % 16 + 1).astype(np.int32)
    cache = normal(rng, (int(indptr[-1]) + 2, 2, 16, KV_HEADS, 128), "bfloat16")
    q = normal(rng, (len(lens), HEADS, 128), "bfloat16")
    gain = rng.uniform(0.5, 2, (len(lens), HEADS)).astype(np.float32)
    variant = define(
        name="decoded", tensors=["gain"], mask_fn=lambda c: c.kv_idx % 3 != 1, use_softmax=use_softmax,
        score_fn=lambda s, c: ops.sigmoid(s) * c.gain[c.batch, c.qo_head],
    )  # fmt: skip
    wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(cupy.empty(32 << 20, cupy.uint8), variant=variant)
    wrapper.plan(indptr, indices, last, HEADS, KV_HEADS, 128, 16, q_data_type="bfloat16")
    out = poisoned(q.shape, "bfloat16")
    assert wrapper.run(on_gpu(q), on_gpu(cache), cupy.asarray(gain), out=out) is out
    q64, k64, v64 = q.astype(np.float64), cache[:, 0].astype(np.float64), cache[:, 1].astype(np.float64)
    bound = _bound(variant, {"gain": gain}, q64)
    want, _ = batch_decode_paged(q64, k64, v64, indptr, indices, last, variant=bound, params=bound.params())
    _check(out, want, "bfloat16")
