"""Variants whose scores the Hopper kernel computes as built-in ones (`fi_cupy.jit.score_shape`), against float64."""

from __future__ import annotations

import numpy as np
import pytest

import fi_cupy
from fi_cupy import prefill
from fi_cupy.arrays import view
from fi_cupy.device import device_info
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.jit import ops
from fi_cupy.reference.attention import batch_prefill_paged, batch_prefill_ragged
from fi_cupy.testing.generators import normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
HEADS, KV_HEADS = 8, 2
LENS = [(300, 700), (129, 130), (1, 90), (200, 200), (64, 512), (8, 0)]


@pytest.fixture(autouse=True)
def hopper():
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")


def define(name, function, **other):
    return fi_cupy.jit.define_variant(name, score_fn=function, tensors=["bias"], scalars=["cap"], **other)


VARIANTS = {
    "alibi": define("alibi", lambda s, c: s + c.bias[c.qo_head] * (c.kv_idx - c.qo_idx)),
    "steep": define("steep", lambda s, c: s - 3 * c.bias[c.qo_head] * c.kv_idx + c.cap),
    "by row": define("by_row", lambda s, c: s + c.bias[c.qo_head] * c.qo_idx),
    "by request": define("by_request", lambda s, c: s + 0.01 * (c.batch + c.kv_head) * (c.kv_len - c.kv_idx)),
    "cap": define("cap", lambda s, c: c.cap * ops.tanh(s / c.cap)),
    "negative cap": define("negative_cap", lambda s, c: 0.5 - c.cap * ops.tanh(s * 0.7 + 0.1)),
    "sigmoid": define("sigmoid", lambda s, c: 4 * ops.sigmoid(2 * s - c.cap)),
    "no cap left": define("no_cap_left", lambda s, c: (c.cap - 1.5) * ops.tanh(s)),
    "masked": define(
        "masked", lambda s, c: s + c.bias[c.qo_head] * c.kv_idx, mask_fn=lambda c: (c.kv_idx + c.qo_idx) % 3 != 0
    ),
    "masked cap": define("masked_cap", lambda s, c: c.cap * ops.tanh(s), mask_fn=lambda c: c.kv_idx % 5 != 1),
    "output": define("output", lambda s, c: s + c.bias[c.qo_head] * c.kv_idx, post_process_fn=lambda out, c: 2 * out),
    "plain": fi_cupy.jit.define_variant(
        "plain", post_process_fn=lambda out, c: out * c.cap + c.bias[c.qo_head], tensors=["bias"], scalars=["cap"]
    ),
}


def check(out, lse, want, want_lse):
    got, got_lse = to_float64(out), to_float64(lse)
    assert_close(got, want, to_dtype(out.dtype), "product")
    seen = np.isfinite(want_lse)
    assert (np.isneginf(got_lse) == ~seen).all()
    assert (np.abs(got_lse - want_lse)[seen] <= 2e-5 * np.maximum(np.abs(want_lse[seen]), 10)).all()


@pytest.mark.parametrize(
    ("name", "dim", "sm_scale"),
    [
        *((name, 128, 0.09) for name in VARIANTS),
        *((name, dim, 0.09) for name in ("alibi", "cap", "sigmoid") for dim in (64, 256)),
        *((name, 128, -0.05) for name in ("alibi", "cap")),
    ],
)
def test_ragged(rng, name, dim, sm_scale):
    """With NaN behind every other request, which tiles of keys reach into."""
    variant, causal = VARIANTS[name], dim != 64
    qo, kv = (np.concatenate([[0], np.cumsum(x)]) for x in zip(*LENS, strict=True))
    q, k, v = (normal(rng, (int(n), h, dim)) for n, h in ((qo[-1], HEADS), (kv[-1], KV_HEADS), (kv[-1], KV_HEADS)))
    dirty = [x.copy() for x in (k, v)]
    for x in dirty:
        for b in (1, 3):
            x[kv[b] : kv[b + 1]] = np.nan
    values = {"bias": rng.uniform(-0.5, 0.5, HEADS).astype(np.float32), "cap": 1.5}
    wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(
        cupy.empty(32 << 20, cupy.uint8), variant=variant, backend="fa3"
    )
    wrapper.plan(qo, kv, HEADS, KV_HEADS, dim, causal=causal, sm_scale=sm_scale, q_data_type="bfloat16")
    out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
    wrapper.run(*map(on_gpu, (q, *dirty)), cupy.asarray(values["bias"]), values["cap"], out=out, lse=lse)
    q64, k64, v64 = (x.astype(np.float64) for x in (q, k, v))
    bound = variant.bind("reference", (), values, view(q64))
    want = batch_prefill_ragged(
        q64, k64, v64, qo, kv, causal=causal, sm_scale=sm_scale, variant=bound, params=bound.params()
    )  # fmt: skip
    rows = np.concatenate([np.arange(qo[b], qo[b + 1]) for b in range(len(LENS)) if b not in (1, 3)])
    check(out[rows], lse[rows], want[0][rows], want[1][rows])


@pytest.mark.parametrize("name", ["alibi", "cap"])
def test_pages_and_split_keys(rng, name):
    variant, page = VARIANTS[name], 16
    lens = [(20, 3000), (100, 1000)]
    pages = [-(-n // page) for _, n in lens]
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    table = rng.permutation(int(indptr[-1])).astype(np.int32)
    last = np.array([(n - 1) % page + 1 for _, n in lens], np.int32)
    qo = np.concatenate([[0], np.cumsum([m for m, _ in lens])])
    q, cache = normal(rng, (120, HEADS, 128)), normal(rng, (len(table), 2, page, KV_HEADS, 128))
    values = {"bias": rng.uniform(-0.1, 0.1, HEADS).astype(np.float32), "cap": 1.5}
    wrapper = prefill.BatchPrefillWithPagedKVCacheWrapper(
        cupy.empty(64 << 20, cupy.uint8), variant=variant, backend="fa3"
    )
    wrapper.plan(qo, indptr, table, last, HEADS, KV_HEADS, 128, page, causal=True, q_data_type="bfloat16")
    assert wrapper._planned.work.num_split > 0
    out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
    wrapper.run(on_gpu(q), on_gpu(cache), cupy.asarray(values["bias"]), values["cap"], out=out, lse=lse)
    q64, k64, v64 = q.astype(np.float64), *(cache[:, i].astype(np.float64) for i in (0, 1))
    bound = variant.bind("reference", (), values, view(q64))
    want = batch_prefill_paged(
        q64, k64, v64, qo, indptr, table, last, causal=True, variant=bound, params=bound.params()
    )  # fmt: skip
    check(out, lse, *want)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_a_row_without_a_finite_bias(rng, value):
    """NaN is passed on; a row that is minus infinity everywhere has seen nothing."""
    q, k, v = (on_gpu(normal(rng, (200, h, 128))) for h in (HEADS, KV_HEADS, KV_HEADS))
    bias = np.zeros(200, np.float32)
    bias[7] = value
    variant = fi_cupy.jit.define_variant("rows", score_fn=lambda s, c: s + c.bias[c.qo_idx], tensors=["bias"])
    out, lse = fi_cupy.jit.compile(variant).run(q, k, v, cupy.asarray(bias), return_lse=True)
    got, got_lse = to_float64(out), to_float64(lse)
    others = np.arange(200) != 7
    assert np.isfinite(got[others]).all() and np.isfinite(got_lse[others]).all()
    if np.isnan(value):
        assert np.isnan(got[7]).all()
    else:
        assert (got[7] == 0).all() and np.isneginf(got_lse[7]).all()
