"""Variants where kernels run in parts or in blocks, against the same wrapper on the NumPy reference."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from paged_cases import Pages, indptr_of

import fi_cupy
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.jit import ops
from fi_cupy.testing.generators import normal, on_gpu, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
define = fi_cupy.jit.define_variant
HEADS, KV_HEADS, DIM, PAGE = 8, 2, 64, 16
DTYPE = "float16"

BY_HEAD = define(
    name="by_head", score_fn=lambda s, c: c.cap * ops.tanh(s * c.gain[c.qo_head] / c.cap), tensors=["gain"],
    scalars={"cap": 2.0},
)  # fmt: skip
#: Looks at every index there is.
PLACED = define(
    name="placed",
    score_fn=lambda s, c: s + c.bias[c.qo_idx, c.kv_idx] * (1 + c.qo_head) - 0.1 * c.kv_head + 0.01 * c.batch
    + 0.001 * (c.kv_len - c.qo_len),
    mask_fn=lambda c: (c.qo_idx + 2 * c.kv_idx + c.qo_head) % 5 != 0,
    key_fn=lambda k, c: ops.where(c.kv_idx % 3 == 0, -k, k),
    tensors=["bias"],
)  # fmt: skip


def both(make, use):
    """``use(wrapper, convert, dtype)`` on the GPU and on the CPU: the pairs must agree."""
    out, lse = use(make(cupy.empty(32 << 20, cupy.uint8)), on_gpu, DTYPE)
    want, want_lse = use(make(np.empty(1 << 20, np.uint8)), _wide, "float32")
    assert_close(to_float64(out), want, to_dtype(DTYPE), "product")
    got, seen = to_float64(lse), np.isfinite(want_lse)
    assert (np.isneginf(got) == ~seen).all()
    assert np.abs(got[seen] - want_lse[seen]).max(initial=0) <= 2e-2


def _wide(x):
    return x.astype(np.float32) if x.dtype == np.float16 else x


@pytest.mark.parametrize("rows", [(1, 1, 1, 1), (30, 1, 200, 7)])
def test_cascade(rng, rows):
    pages = Pages(rng, 100, PAGE, KV_HEADS, DIM, DTYPE)
    tables = [pages.add([500])[0], pages.add([300, 17, 200, 40])[0]]
    qo = indptr_of(rows)
    q, gain = normal(rng, (sum(rows), HEADS, DIM), DTYPE), rng.uniform(0.5, 2, HEADS).astype(np.float32)

    def use(w, convert, dtype):
        table = [[t[i] for t in tables] for i in range(3)]
        w.plan([[0, sum(rows)], qo], *table, HEADS, KV_HEADS, DIM, PAGE, causal=True, q_data_type=dtype)
        return w.run(convert(q), convert(pages.kv), convert(gain), return_lse=True)

    both(lambda ws: fi_cupy.MultiLevelCascadeAttentionWrapper(2, ws, variant=BY_HEAD), use)


@pytest.mark.parametrize("decode", [False, True])
def test_shared_prefix(rng, decode):
    rows = (1, 1, 1) if decode else (40, 3, 130)
    pages = Pages(rng, 60, PAGE, KV_HEADS, DIM, DTYPE)
    table, _ = pages.add([140, 30, 300])
    shared = [normal(rng, (333, KV_HEADS, DIM), DTYPE) for _ in range(2)]
    q, gain = normal(rng, (sum(rows), HEADS, DIM), DTYPE), rng.uniform(0.5, 2, HEADS).astype(np.float32)

    def use(w, convert, dtype):
        if decode:
            w.begin_forward(*table, HEADS, KV_HEADS, DIM, PAGE, data_type=dtype)
        else:
            w.begin_forward(indptr_of(rows), *table, HEADS, KV_HEADS, DIM, PAGE, q_data_type=dtype)
        arrays = [convert(x) for x in (q, *shared, pages.kv)]
        return w.forward(*arrays, return_lse=True, variant_args={"gain": convert(gain), "cap": 3.0})

    kind = "Decode" if decode else "Prefill"
    make = getattr(fi_cupy, f"Batch{kind}WithSharedPrefixPagedKVCacheWrapper")
    both(lambda ws: make(ws, variant=BY_HEAD), use)


@pytest.mark.parametrize("causal", [False, True])
def test_block_sparse_functions_see_the_matrix(rng, causal):
    m, n, r, c = 96, 160, 32, 16
    seen = rng.random((m // r, n // c)) < 0.5
    indptr, indices = indptr_of(seen.sum(1)), np.nonzero(seen)[1].astype(np.int32)
    q, k, v = (normal(rng, (x, h, DIM), DTYPE) for x, h in ((m, HEADS), (n, KV_HEADS), (n, KV_HEADS)))
    bias = rng.standard_normal((m, n), np.float32)

    def use(w, convert, dtype):
        w.plan(indptr, indices, m, n, r, c, HEADS, KV_HEADS, DIM, causal=causal, q_data_type=dtype)
        return w.run(*map(convert, (q, k, v)), variant_args={"bias": convert(bias)}, return_lse=True)

    both(lambda ws: fi_cupy.BlockSparseAttentionWrapper(ws, variant=PLACED), use)


@pytest.mark.parametrize("causal", [False, True])
def test_variable_blocks_see_heads_and_positions(rng, causal):
    rows, columns = np.array([[30, 50, 40], [20, 0, 100]]), np.array([[48, 80, 16, 16], [80, 32, 48, 0]])
    blocks = rng.random((2, 3, 4)) < 0.7
    q = normal(rng, (HEADS, 120, DIM), DTYPE)
    k, v = (normal(rng, (KV_HEADS, 160, DIM), DTYPE) for _ in range(2))
    bias = rng.standard_normal((120, 160), np.float32)

    def use(w, convert, dtype):
        w.plan(blocks, rows, columns, HEADS, KV_HEADS, DIM, causal=causal, q_data_type=dtype)
        return w.run(*map(convert, (q, k, v)), variant_args={"bias": convert(bias)}, return_lse=True)

    both(lambda ws: fi_cupy.VariableBlockSparseAttentionWrapper(ws, variant=PLACED), use)


def test_pod(rng):
    pages = Pages(rng, 60, PAGE, KV_HEADS, DIM, DTYPE)
    table, _ = pages.add([140, 30, 300])
    q_p, k_p, v_p = (normal(rng, (n, h, DIM), DTYPE) for n, h in ((70, HEADS), (90, KV_HEADS), (90, KV_HEADS)))
    q_d, bias = normal(rng, (3, HEADS, DIM), DTYPE), rng.standard_normal((90, 300), np.float32)

    def use(w, convert, dtype, part):
        w.plan(*table, HEADS, KV_HEADS, DIM, PAGE, q_data_type=dtype)
        assert ("v_placed" in str(fi_cupy.attention.explain(w))) == (dtype == DTYPE)
        return w.run(*map(convert, (q_p, k_p, v_p, q_d, pages.kv)), causal_p=True, return_lse_p=True, return_lse_d=True,
                     variant_args={"bias": convert(bias)})[part]  # fmt: skip

    for part in (0, 1):
        both(lambda ws: fi_cupy.PODWithPagedKVCacheWrapper(ws, variant=PLACED), partial(use, part=part))


def test_batch_attention(rng):
    rows, lens = (90, 1, 1, 3, 17), (500, 333, 20, 3, 40)
    pages = Pages(rng, 80, PAGE, KV_HEADS, DIM, DTYPE)
    (indptr, indices, _), _ = pages.add(lens)
    q, gain = normal(rng, (sum(rows), HEADS, DIM), DTYPE), rng.uniform(0.5, 2, HEADS).astype(np.float32)

    def use(w, convert, dtype):
        w.plan(indptr_of(rows), indptr, indices, np.int32(lens), HEADS, KV_HEADS, DIM, DIM, PAGE, causal=True,
               q_data_type=dtype, kv_data_type=dtype)  # fmt: skip
        return w.run(convert(q), convert(pages.kv), variant_args={"gain": convert(gain)})

    both(
        lambda ws: fi_cupy.BatchAttention(device="cpu" if isinstance(ws, np.ndarray) else "cuda", variant=BY_HEAD), use
    )


@pytest.mark.parametrize("window_left", [-1, 20])
def test_flashinfers_sink_is_the_built_in_one(rng, window_left):
    pages = Pages(rng, 60, PAGE, KV_HEADS, DIM, DTYPE)
    table, _ = pages.add([140, 30, 300])
    qo, sinks = indptr_of([40, 3, 130]), on_gpu(rng.normal(size=HEADS).astype(np.float32))
    q, cache = on_gpu(normal(rng, (173, HEADS, DIM), DTYPE)), pages.gpu()
    text = fi_cupy.jit.attention.variants.attention_sink_decl["fa2"]
    jit_args = (
        "sinks", DTYPE, DTYPE, DTYPE, "int32", DIM, DIM, ["sink"], ["float"], ["sm_scale"], ["double"],
        "AttentionSink", text,
    )  # fmt: skip
    made = []
    for options in ({"jit_args": jit_args}, {}):
        w = fi_cupy.prefill.BatchPrefillWithPagedKVCacheWrapper(cupy.empty(32 << 20, cupy.uint8), **options)
        w.plan(
            qo, *table, HEADS, KV_HEADS, DIM, PAGE, causal=True, window_left=window_left, sm_scale=0.2,
            q_data_type=DTYPE,
        )  # fmt: skip
        made.append(w.run(q, cache, *([sinks, 0.2] if options else []), sinks=None if options else sinks))
    assert_close(to_float64(made[0]), to_float64(made[1]), to_dtype(DTYPE), "product")
