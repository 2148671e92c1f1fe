"""Decode attention on CPU arrays: values against loops in float64, layouts, plan/run rules and error texts."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from naive_attention import naive

from fi_cupy import decode, errors
from fi_cupy.decode_kernel import PARAMS, decode_spec, kernel_specs
from fi_cupy.dtypes import bfloat16
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

Wrapper = decode.BatchDecodeWithPagedKVCacheWrapper


def oracle(q, k, v, **options):
    """One request: q [Hq, D], k and v [n, Hkv, D]; (out, base-2 lse)."""
    out, lse = naive(q[None], k, v, **options)
    return out[0], lse[0]


class Batch:
    """A random page table and cache whose unused rows are NaN."""

    def __init__(self, rng, lens, heads, kv_heads, dim, page_size, layout="NHD", dtype="float32"):
        pages = [-(-n // page_size) for n in lens]
        self.args = (heads, kv_heads, dim, page_size)
        self.indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
        num_pages = int(self.indptr[-1]) + 2
        self.indices = rng.permutation(num_pages)[: self.indptr[-1]].astype(np.int32)
        self.last = np.array([(n - 1) % page_size + 1 if n else 1 for n in lens], np.int32)
        self.table = (self.indptr, self.indices, self.last)
        self.q = normal(rng, (len(lens), heads, dim), dtype)
        kv = np.full((num_pages, 2, page_size, kv_heads, dim), np.nan, self.q.dtype)
        self.k, self.v = [], []
        for b, n in enumerate(lens):
            for half, rows in ((0, self.k), (1, self.v)):
                rows.append(normal(rng, (n, kv_heads, dim), dtype))
                for j in range(n):
                    kv[self.indices[self.indptr[b] + j // page_size], half, j % page_size] = rows[-1][j]
        self.cache = kv if layout == "NHD" else np.ascontiguousarray(kv.transpose(0, 1, 3, 2, 4))
        self.layout = layout

    def expect(self, **options):
        results = [oracle(q, k, v, **options) for q, k, v in zip(self.q, self.k, self.v, strict=True)]
        return np.stack([r[0] for r in results]), np.stack([r[1] for r in results])

    def wrapper(self, **options):
        w = Wrapper(np.empty(1 << 16, np.uint8), self.layout)
        w.plan(*self.table, *self.args, q_data_type=self.q.dtype, **options)
        return w


LENS = [5, 0, 16, 17, 40]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("heads", "kv_heads", "page_size"), [(9, 3, 16), (4, 4, 1), (10, 2, 5)])
def test_values_and_layouts(rng, dtype, layout, heads, kv_heads, page_size):
    batch = Batch(rng, LENS, heads, kv_heads, 16, page_size, layout, dtype)
    out, lse = batch.wrapper().run(batch.q, batch.cache, return_lse=True)
    want, want_lse = batch.expect()
    assert out.dtype == batch.q.dtype and lse.dtype == np.float32
    assert_close(out, want, dtype, "product")
    assert_close(lse, want_lse, "float32", "product")
    pair = batch.wrapper().run(batch.q, (batch.cache[:, 0], batch.cache[:, 1]))
    assert (pair == out).all()


def test_trap_3_empty_kv_is_zero_and_minus_infinity(rng):
    batch = Batch(rng, [0, 3], 4, 2, 8, 4)
    out, lse = batch.wrapper().run_return_lse(batch.q, batch.cache)
    assert (out[0] == 0).all() and np.isneginf(lse[0]).all() and np.isfinite(lse[1]).all()


def test_trap_2_lse_is_base_2(rng):
    q, k = normal(rng, (2, 8), "float32"), normal(rng, (6, 1, 8), "float32")
    _, lse = decode.single_decode_with_kv_cache(q, k, k, return_lse=True)
    s = (q.astype(np.float64) @ k[:, 0].T.astype(np.float64)) / math.sqrt(8)
    assert_close(lse, np.log(np.exp(s).sum(-1)) * 1.4426950408889634, "float32", "product")


@pytest.mark.parametrize("window", [0, 3, 15, 16, 100])
def test_trap_6_window_counts_the_query_itself(rng, window):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    w = batch.wrapper(window_left=window)
    want, want_lse = batch.expect(window_left=window)
    out, lse = w.run(batch.q, batch.cache, return_lse=True, window_left=window)
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")
    with pytest.raises(errors.PlanError, match=f"window_left is 7, planned {window}"):
        w.run(batch.q, batch.cache, window_left=7)


def test_trap_7_soft_cap_and_sm_scale(rng):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    got = batch.wrapper(logits_soft_cap=2.0, sm_scale=1.5).run(batch.q, batch.cache)
    assert_close(got, batch.expect(cap=2.0, sm_scale=1.5)[0], "float32", "product")


def test_trap_8_alibi_uses_raw_key_indices(rng):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    out, lse = batch.wrapper(pos_encoding_mode="ALIBI").run(batch.q, batch.cache, return_lse=True)
    want, want_lse = batch.expect(mode="ALIBI")
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")


def test_trap_9_rope_inside_attention(rng):
    batch = Batch(rng, [5, 0, 33], 4, 2, 8, 4)
    got = batch.wrapper(pos_encoding_mode="ROPE_LLAMA", rope_theta=500.0, rope_scale=2.0).run(batch.q, batch.cache)
    assert_close(got, batch.expect(mode="ROPE_LLAMA", rope_theta=500.0, rope_scale=2.0)[0], "float32", "product")


def test_trap_11_scales(rng):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    out, lse = batch.wrapper().run(batch.q, batch.cache, q_scale=0.5, k_scale=3.0, v_scale=0.25, return_lse=True)
    want, want_lse = batch.expect(sm_scale=1.5 / math.sqrt(8))
    assert_close(out, 0.25 * want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")


def test_sinks(rng):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    sink = normal(rng, (4,), "float32")
    out, lse = batch.wrapper().run(batch.q, batch.cache, sinks=sink, return_lse=True)
    want, want_lse = batch.expect(sinks=sink)
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")


def test_trap_27_strided_views(rng):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    wide = np.full((batch.cache.shape[0], 3, 4, 5, 24), np.nan, np.float32)
    wide[:, ::2, :, 1::2, 8:16] = batch.cache
    q = np.full((len(LENS), 9, 8), np.nan, np.float32)
    q[:, 1::2] = batch.q
    got = batch.wrapper().run(q[:, 1::2], wide[:, ::2, :, 1::2, 8:16])
    assert_close(got, batch.expect()[0], "float32", "product")


def test_out_and_lse_are_honoured(rng):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    out, lse = np.full_like(batch.q, np.nan), np.full((len(LENS), 4), np.nan, np.float32)
    got = batch.wrapper().run(batch.q, batch.cache, out=out, lse=lse)
    assert got is out
    want, want_lse = batch.expect()
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")
    both = batch.wrapper().run(batch.q, batch.cache, out=out, lse=lse, return_lse=True)
    assert both[0] is out and both[1] is lse


def test_trap_28_graph_buffers_are_filled_and_the_batch_is_frozen(rng):
    first, second = Batch(rng, [5, 9], 4, 2, 8, 4), Batch(rng, [1, 30], 4, 2, 8, 4)
    buffers = [np.full(n, -7, np.int32) for n in (3, 20, 2)]
    w = decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(np.empty(1 << 16, np.uint8), *buffers)
    assert w.is_cuda_graph_enabled and not w.use_tensor_cores
    for batch in (first, second):
        w.plan(*batch.table, *batch.args, q_data_type="float32")
        for buffer, given in zip(buffers, batch.table, strict=True):
            assert (buffer[: len(given)] == given).all()
        assert_close(w.run(batch.q, batch.cache), batch.expect()[0], "float32", "product")
    third = Batch(rng, [1, 2, 3], 4, 2, 8, 4)
    with pytest.raises(errors.ShapeError, match="the batch size of the CUDA-graph buffers"):
        w.plan(*third.table, *third.args)
    long = Batch(rng, [40, 80], 4, 2, 8, 4)
    with pytest.raises(errors.ArgumentError, match="more than paged_kv_indices_buffer's 20"):
        w.plan(*long.table, *long.args)
    with pytest.raises(errors.ArgumentError, match="paged_kv_indices_buffer is missing"):
        Wrapper(np.empty(16, np.uint8), use_cuda_graph=True, paged_kv_indptr_buffer=buffers[0])


def test_other_ways_to_call(rng):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    want = batch.expect()[0]
    w = decode.BatchDecodeWrapper(workspace_buffer=np.empty(1024, np.uint8), kv_layout="NHD")
    w.begin_forward(
        batch.indptr.tolist(), batch.indices.tolist(), batch.last.tolist(), *batch.args, data_type=np.float32
    )
    assert_close(w.forward(batch.q, batch.cache), want, "float32", "product")
    assert_close(w.forward_return_lse(batch.q, batch.cache)[0], want, "float32", "product")
    w.end_forward()
    w.plan = partial(decode.fast_decode_plan, w)
    w.plan(*batch.table, *batch.args, q_data_type="float32", global_override_indptr_cpu=batch.indptr.astype(np.int64))
    assert_close(w.run(batch.q, batch.cache), want, "float32", "product")
    Wrapper.plan(w, *batch.table, *batch.args, q_data_type="float32", seq_lens=np.array(LENS))
    assert_close(w.run(batch.q, batch.cache, enable_pdl=True), want, "float32", "product")
    assert w.workspace_size(*batch.table, *batch.args) == (0, 0)


def test_forward_refuses_what_was_not_planned(rng):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    w = batch.wrapper(logits_soft_cap=3.0)
    w.forward(batch.q, batch.cache, logits_soft_cap=3.0)
    with pytest.raises(errors.PlanError, match=r"logits_soft_cap is 5.0, planned 3.0; pass it to plan\(\)"):
        w.forward(batch.q, batch.cache, logits_soft_cap=5.0)
    with pytest.raises(errors.PlanError, match=r"sm_scale is 2.0"):
        w.forward(batch.q, batch.cache, sm_scale=2.0)


def test_run_errors(rng):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    with pytest.raises(errors.PlanError, match=r"plan\(\) must come first"):
        Wrapper(np.empty(16, np.uint8)).run(batch.q, batch.cache)
    w = batch.wrapper()
    cases = [
        (errors.ShapeError, "q has shape", (batch.q[:2], batch.cache), {}),
        (errors.DTypeError, "q has dtype float16, expected float32", (batch.q.astype(np.float16), batch.cache), {}),
        (errors.ShapeError, "paged_kv_cache", (batch.q, batch.cache[:, 0]), {}),
        (errors.ShapeError, r"paged_kv_cache \(keys\) has shape", (batch.q, batch.cache[:, :, :3]), {}),
        (errors.ArgumentError, "expected .pages, 2", (batch.q, batch.cache[:, :1]), {}),
        (errors.ArgumentError, "indices holds page", (batch.q, batch.cache[:2]), {}),
        (errors.ShapeError, "out has shape", (batch.q, batch.cache), {"out": np.empty((1, 4, 8), np.float32)}),
        (errors.DTypeError, "lse has dtype", (batch.q, batch.cache), {"lse": np.empty((5, 4), np.float64)}),
        (errors.UnsupportedError, "extra arguments", (batch.q, batch.cache, 1), {}),
        (errors.DTypeError, "k_scale has dtype float64", (batch.q, batch.cache), {"k_scale": np.ones(2)}),
        (errors.ShapeError, "q_scale has shape", (batch.q, batch.cache), {"q_scale": np.ones(2, np.float32)}),
        (errors.UnsupportedError, "kv_cache_sf", (batch.q, batch.cache), {"kv_cache_sf": batch.q}),
        (errors.PlanError, "q_len_per_req is 2, planned 1", (batch.q, batch.cache), {"q_len_per_req": 2}),
        (errors.ShapeError, "sinks has shape", (batch.q, batch.cache), {"sinks": np.ones(3, np.float32)}),
    ]
    for error, words, args, options in cases:
        with pytest.raises(error, match=words):
            w.run(*args, **options)
    frozen = np.empty_like(batch.q)
    frozen.flags.writeable = False
    with pytest.raises(errors.ImmutableArrayError):
        w.run(batch.q, batch.cache, out=frozen)


def test_plan_errors(rng):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    w = Wrapper(np.empty(16, np.uint8))
    cases = [
        (errors.ArgumentError, "multiple of num_kv_heads = 3", (*batch.table, 4, 3, 8, 4), {}),
        (errors.ArgumentError, "page_size is 0", (*batch.table, 4, 2, 8, 0), {}),
        (errors.ArgumentError, "last_page_len.4. is 9", (*batch.table[:2], np.array([1, 1, 4, 1, 9]), *batch.args), {}),
        (errors.ArgumentError, "negative page", (batch.indptr, -1 - batch.indices, batch.last, *batch.args), {}),
        (errors.ShapeError, "last_page_len has shape", (batch.indptr, batch.indices, batch.last[1:], *batch.args), {}),
        (errors.DTypeError, "indptr has dtype", (batch.indptr.astype(np.float32), *batch.table[1:], *batch.args), {}),
        (errors.ArgumentError, "pos_encoding_mode", (*batch.table, *batch.args), {"pos_encoding_mode": "ROPE"}),
        (errors.ArgumentError, "q_len_per_req is 0", (*batch.table, *batch.args), {"q_len_per_req": 0}),
        (errors.UnsupportedError, "block_tables", (*batch.table, *batch.args), {"block_tables": batch.indices}),
        (errors.UnsupportedError, "window_right", (*batch.table, *batch.args), {"window_right": 1}),
        (errors.ArgumentError, "seq_lens and indptr disagree", (*batch.table, *batch.args), {"seq_lens": [9] * 5}),
        (errors.ArgumentError, "kv_layout is 'NDH'", None, {"kv_layout": "NDH"}),
        (errors.UnsupportedError, "backend is 'trtllm-gen'", None, {"backend": "trtllm-gen"}),
        (errors.ArgumentError, "jit_args has 1 entries", None, {"jit_args": ["x"]}),
    ]
    for error, words, args, options in cases:
        with pytest.raises(error, match=words):
            if args is None:
                Wrapper(np.empty(16, np.uint8), **options)
            else:
                if "seq_lens" in options:
                    options = {"seq_lens": np.array(options["seq_lens"])}
                w.plan(*args, **options)
    with pytest.raises(errors.ArgumentError, match="float_workspace_buffer is missing"):
        Wrapper()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("n", [0, 1, 33])
def test_single_decode(rng, layout, n):
    q, k, v = normal(rng, (6, 16)), normal(rng, (n, 2, 16)), normal(rng, (n, 2, 16))
    given = [x if layout == "NHD" else np.ascontiguousarray(x.transpose(1, 0, 2)) for x in (k, v)]
    out, lse = decode.single_decode_with_kv_cache(q, *given, layout, window_left=20, v_scale=2.0, return_lse=True)
    want, want_lse = oracle(q, k, v, window_left=20)
    assert_close(out, 2.0 * want, "bfloat16", "product")
    assert_close(lse, want_lse, "float32", "product")
    assert decode.single_decode_with_kv_cache(q, *given, layout).dtype == q.dtype


def test_single_decode_errors(rng):
    q, k = normal(rng, (6, 16), "float32"), normal(rng, (5, 2, 16), "float32")
    single = decode.single_decode_with_kv_cache
    with pytest.raises(errors.ShapeError, match="v has shape"):
        single(q, k, k[1:])
    with pytest.raises(errors.ArgumentError, match="q has 6 heads, expected a multiple of num_kv_heads = 5"):
        single(q, k, k, "HND")
    with pytest.raises(errors.DTypeError, match="k has dtype float16"):
        single(q, k.astype(np.float16), k.astype(np.float16))
    with pytest.raises(errors.ShapeError, match=r"k_scale has shape \(3,\), expected a number or \(2,\) factors"):
        single(q, k, k, k_scale=np.ones(3, np.float32))


def test_torch_and_jax_on_the_cpu(rng):
    batch = Batch(rng, LENS, 4, 2, 8, 4)
    want = batch.expect()[0]
    torch = pytest.importorskip("torch")
    w = Wrapper(torch.empty(1 << 16, dtype=torch.uint8))
    w.plan(*map(torch.from_numpy, batch.table), *batch.args, q_data_type=torch.float32)
    out = torch.full(batch.q.shape, float("nan"))
    assert w.run(torch.from_numpy(batch.q), torch.from_numpy(batch.cache), out=out) is out
    assert_close(out.numpy(), want, "float32", "product")
    jax = pytest.importorskip("jax")
    got = decode.single_decode_with_kv_cache(*(jax.numpy.asarray(x) for x in (batch.q[0], batch.k[0], batch.v[0])))
    assert isinstance(got, jax.Array)
    assert_close(np.asarray(got), want[0], "float32", "product")


def test_kernel_instances():
    specs = kernel_specs()
    assert len({s.symbol for s in specs}) == len(specs) <= 36
    spec = decode_spec(bfloat16, bfloat16, bfloat16, 128, 1, 4, 3, 2)
    assert spec.symbol == "batch_decode_bf16_d128_h8_w4s3b2" and spec.min_arch == 80
    assert PARAMS.size % 8 == 0
