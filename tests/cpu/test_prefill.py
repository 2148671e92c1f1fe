"""The prefill functions and wrappers on CPU arrays: values against plain loops, traps, and error texts."""

from __future__ import annotations

import numpy as np
import pytest
from naive_attention import naive

from fi_cupy import errors, prefill
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

Paged, Ragged = prefill.BatchPrefillWithPagedKVCacheWrapper, prefill.BatchPrefillWithRaggedKVCacheWrapper


def workspace():
    return np.zeros(1 << 16, np.uint8)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_left": 3}, {"causal": True, "window_left": 0, "cap": 5.0}]
)
def test_single(rng, layout, options):
    q, k, v = normal(rng, (5, 6, 24), "float32"), normal(rng, (9, 2, 24), "float32"), normal(rng, (9, 2, 16), "float32")
    want, want_lse = naive(q, k, v, **options)
    if layout == "HND":
        k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
    given = {"logits_soft_cap" if name == "cap" else name: value for name, value in options.items()}
    out, lse = prefill.single_prefill_with_kv_cache_return_lse(q, k, v, kv_layout=layout, **given)
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")


def test_single_scales_and_custom_mask(rng):
    q, k, v = normal(rng, (5, 2, 8), "float32"), normal(rng, (7, 1, 8), "float32"), normal(rng, (7, 1, 8), "float32")
    mask = rng.random((5, 7)) < 0.5
    mask[2] = False
    want, want_lse = naive(q, k, v, mask=mask, sm_scale=0.3 * 2.0, window_left=5)
    packed = np.packbits(mask.reshape(-1), bitorder="little")
    for given in ({"custom_mask": mask}, {"packed_custom_mask": packed}):
        out, lse = prefill.single_prefill_with_kv_cache(
            q, k, v, causal=True, sm_scale=0.3, k_scale=2.0, v_scale=0.5, window_left=5, return_lse=True, **given
        )
        assert_close(out, want * 0.5, "float32", "product")
        assert_close(lse, want_lse, "float32", "product")
        assert (out[2] == 0).all() and np.isneginf(lse[2]).all()


def ragged_batch(rng, lens, heads=(6, 2), dims=(16, 16), dtype="float32"):
    qo, kv = (np.concatenate([[0], np.cumsum([x[i] for x in lens])]).astype(np.int32) for i in (0, 1))
    q = normal(rng, (qo[-1], heads[0], dims[0]), dtype)
    k, v = normal(rng, (kv[-1], heads[1], dims[0]), dtype), normal(rng, (kv[-1], heads[1], dims[1]), dtype)
    return qo, kv, q, k, v


def expect(qo, kv, q, k, v, masks=None, **options):
    parts = [
        naive(
            q[qo[b] : qo[b + 1]], k[kv[b] : kv[b + 1]], v[kv[b] : kv[b + 1]],
            mask=None if masks is None else masks[b], **options,
        )
        for b in range(len(qo) - 1)
    ]  # fmt: skip
    return tuple(np.concatenate([p[i] for p in parts]) for i in (0, 1))


LENS = [(3, 7), (0, 4), (5, 5), (2, 0), (6, 4), (1, 9)]


@pytest.mark.parametrize("causal", [False, True])
def test_trap_1_3_ragged_batch_with_empty_and_fully_masked_rows(rng, causal):
    qo, kv, q, k, v = ragged_batch(rng, LENS, dims=(16, 8))
    wrapper = Ragged(workspace())
    wrapper.plan(qo, kv, 6, 2, 16, 8, causal=causal, q_data_type="float32")
    out, lse = wrapper.run(q, k, v, return_lse=True)
    want, want_lse = expect(qo, kv, q, k, v, causal=causal)
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")
    empty = np.isneginf(want_lse)
    assert empty.any() and (out[empty] == 0).all()


def paged_cache(rng, kv, k, v, page_size, layout="NHD"):
    lens = np.diff(kv)
    pages = -(-lens // page_size)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    indices = rng.permutation(int(indptr[-1]) + 2)[: indptr[-1]].astype(np.int32)
    last = np.where(lens > 0, (lens - 1) % page_size + 1, 1).astype(np.int32)
    caches = []
    for x in (k, v):
        cache = np.full((int(indptr[-1]) + 2, page_size, *x.shape[1:]), np.nan, x.dtype)
        for b, n in enumerate(lens):
            j = np.arange(n)
            cache[indices[indptr[b] + j // page_size], j % page_size] = x[kv[b] : kv[b + 1]]
        caches.append(cache if layout == "NHD" else np.ascontiguousarray(cache.swapaxes(1, 2)))
    return (indptr, indices, last), tuple(caches)


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_trap_5_10_paged_tails_do_not_leak(rng, page_size, layout):
    qo, kv, q, k, v = ragged_batch(rng, LENS)
    table, caches = paged_cache(rng, kv, k, v, page_size, layout)
    wrapper = Paged(workspace(), layout)
    wrapper.plan(qo, *table, 6, 2, 16, page_size, causal=True, window_left=4, q_data_type="float32")
    want, want_lse = expect(qo, kv, q, k, v, causal=True, window_left=4)
    packed = np.stack(caches, axis=1)
    for cache in (caches, packed):
        out = np.full(q.shape, np.nan, np.float32)
        lse = np.full(q.shape[:2], np.nan, np.float32)
        got = wrapper.run(q, cache, out=out, lse=lse, return_lse=True)
        assert got[0] is out and got[1] is lse
        assert_close(out, want, "float32", "product")
        assert_close(lse, want_lse, "float32", "product")
    wrapper.plan(
        qo, *table[:2], None, 6, 2, 16, page_size, causal=True, window_left=4, q_data_type="float32",
        seq_lens=np.diff(kv),
    )  # fmt: skip
    assert_close(wrapper.run(q, caches), want, "float32", "product")


def test_trap_12_custom_masks_are_packed_per_request(rng):
    qo, kv, q, k, v = ragged_batch(rng, LENS)
    masks = [rng.random((m, n)) < 0.6 for m, n in LENS]
    flat = np.concatenate([m.reshape(-1) for m in masks])
    packed = np.concatenate([np.packbits(m.reshape(-1), bitorder="little") for m in masks])
    want, want_lse = expect(qo, kv, q, k, v, masks)
    wrapper = Ragged(workspace())
    for given in ({"custom_mask": flat}, {"packed_custom_mask": packed}):
        wrapper.plan(qo, kv, 6, 2, 16, causal=True, q_data_type="float32", **given)
        out, lse = wrapper.run(q, k, v, return_lse=True)
        assert_close(out, want, "float32", "product")
        assert_close(lse, want_lse, "float32", "product")


def test_trap_11_scales_and_sinks(rng):
    qo, kv, q, k, v = ragged_batch(rng, LENS)
    sinks = normal(rng, (6,), "float32")
    wrapper = Ragged(workspace())
    wrapper.plan(qo, kv, 6, 2, 16, sm_scale=0.2, q_data_type="float32")
    out, lse = wrapper.run(q, k, v, q_scale=2.0, k_scale=3.0, v_scale=5.0, o_scale=2.0, sinks=sinks, return_lse=True)
    want, want_lse = expect(qo, kv, q, k, v, sm_scale=1.2, sinks=sinks)
    assert_close(out, want * 2.5, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")


def test_bfloat16_in_and_out(rng):
    qo, kv, q, k, v = ragged_batch(rng, LENS, dtype="bfloat16")
    wrapper = Ragged(workspace())
    wrapper.plan(qo, kv, 6, 2, 16, q_data_type="bfloat16")
    out = wrapper.run(q, k, v)
    assert out.dtype == q.dtype
    assert_close(out, expect(qo, kv, q, k, v)[0], "bfloat16", "product")


def test_torch_and_jax_arrays_come_back_as_their_own(rng):
    qo, kv, q, k, v = ragged_batch(rng, LENS)
    want = expect(qo, kv, q, k, v, causal=True)[0]
    torch = pytest.importorskip("torch")
    wrapper = Ragged(torch.empty(1 << 16, dtype=torch.uint8))
    wrapper.plan(torch.tensor(qo), torch.tensor(kv), 6, 2, 16, causal=True, q_data_type=torch.float32)
    out = wrapper.run(*map(torch.tensor, (q, k, v)))
    assert isinstance(out, torch.Tensor)
    assert_close(out.numpy(), want, "float32", "product")


def test_jax_arrays(rng):
    jnp = pytest.importorskip("jax.numpy")
    q, k = normal(rng, (3, 2, 8), "float32"), normal(rng, (5, 2, 8), "float32")
    out = prefill.single_prefill_with_kv_cache(jnp.asarray(q), jnp.asarray(k), jnp.asarray(k), causal=True)
    assert type(out).__module__.startswith("jax")
    assert_close(np.asarray(out), naive(q, k, k, causal=True)[0], "float32", "product")


def test_graph_buffers_are_filled_and_the_batch_is_frozen(rng):
    qo, kv, q, k, v = ragged_batch(rng, [(3, 7), (2, 4)])
    table, caches = paged_cache(rng, kv, k, v, 4)
    buffers = [np.full(n, -1, np.int32) for n in (3, 3, 10, 2)]
    wrapper = Paged(workspace(), "NHD", True, *buffers)
    wrapper.plan(qo, *table, 6, 2, 16, 4, causal=True, q_data_type="float32")
    for buffer, given in zip(buffers, (qo, *table), strict=True):
        assert (buffer[: len(given)] == given).all()
    assert_close(wrapper.run(q, caches), expect(qo, kv, q, k, v, causal=True)[0], "float32", "product")
    with pytest.raises(errors.PlanError, match="the batch is 1, expected 2"):
        wrapper.plan(qo[:2], table[0][:2], table[1], table[2][:1], 6, 2, 16, 4, q_data_type="float32")


def test_run_before_plan_and_contradictions(rng):
    qo, kv, q, k, v = ragged_batch(rng, [(3, 7)])
    wrapper = Ragged(workspace())
    with pytest.raises(errors.PlanError, match=r"run: plan\(\) must come first"):
        wrapper.run(q, k, v)
    wrapper.plan(qo, kv, 6, 2, 16, causal=True, q_data_type="float32")
    with pytest.raises(errors.PlanError, match=r"logits_soft_cap is 3\.0, planned 0\.0"):
        wrapper.forward(q, k, v, logits_soft_cap=3.0)
    table, caches = paged_cache(rng, kv, k, v, 4)
    paged = Paged(workspace())
    paged.plan(qo, *table, 6, 2, 16, 4, window_left=2, q_data_type="float32")
    with pytest.raises(errors.PlanError, match="window_left is 5, planned 2"):
        paged.run(q, caches, window_left=5)
    with pytest.raises(errors.ArgumentError, match="the cache has 1 pages"):
        paged.plan(qo, table[0], np.array([0, 3], np.int32), table[2], 6, 2, 16, 4, q_data_type="float32")
        paged.run(q, tuple(c[:1] for c in caches))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k": (9, 2, 12)}, errors.ShapeError, "single_prefill_with_kv_cache: k has shape"),
        ({"q": (5, 5, 16)}, errors.ArgumentError, "num_qo_heads is 5, expected a multiple of num_kv_heads = 2"),
        ({"q": (5, 16)}, errors.ShapeError, "q is 2-D"),
        ({"q": (10, 6, 16), "causal": True}, errors.ArgumentError, "qo_len is 10 with causal=True"),
        ({"kv_layout": "DNH"}, errors.ArgumentError, "kv_layout is 'DNH'"),
        ({"pos_encoding_mode": "ROPE"}, errors.ArgumentError, "pos_encoding_mode is 'ROPE'"),
        ({"custom_mask": np.ones((5, 8), bool)}, errors.ShapeError, r"custom_mask has shape \(5, 8\)"),
        ({"packed_custom_mask": np.ones(3, np.uint8)}, errors.ShapeError, "packed_custom_mask has 3 bytes, expected 6"),
        ({"scale_q": np.ones(6)}, errors.DTypeError, "scale_q has dtype float64, expected float32"),
        ({"scale_k": np.ones(6, np.float32)}, errors.ShapeError, r"scale_k has shape \(6,\), .* or \(2,\) factors"),
        ({"scale_v": 2.0, "v_scale": 2.0}, errors.ArgumentError, "scale_v and v_scale name the same thing"),
        ({"backend": "fa3"}, errors.UnsupportedError, "backend is 'fa3'"),
        ({"o_dtype": "int32"}, errors.DTypeError, "the output has dtype int32"),
    ],
)
def test_errors(rng, change, error, text):
    shapes = {"q": (5, 6, 16), "k": (9, 2, 16), "v": (9, 2, 16)}
    shapes.update({name: change.pop(name) for name in list(change) if name in shapes})
    with pytest.raises(error, match=text):
        prefill.single_prefill_with_kv_cache(*(normal(rng, s, "float32") for s in shapes.values()), **change)


def test_plan_errors():
    wrapper = Paged(workspace())
    good = ([0, 3], [0, 2], [0, 1], [3], 6, 2, 16, 4)

    def plan(**changes):
        names = ("qo", "indptr", "indices", "last", "heads", "kv_heads", "dim", "page_size")
        values = dict(zip(names, good, strict=True))
        values.update({name: changes.pop(name) for name in list(changes) if name in values})
        wrapper.plan(*values.values(), q_data_type="float32", **changes)

    plan()
    for changes, error, text in (
        ({"qo": [0, 3, 2], "indptr": [0, 1, 2], "last": [1, 1]}, errors.ArgumentError, "qo_indptr must start"),
        ({"qo": [0, 3, 4]}, errors.ArgumentError, "paged_kv_indptr has 2 entries, expected 3"),
        ({"last": [5]}, errors.ArgumentError, r"last_page_len\[0\] is 5, expected 1..4"),
        ({"indptr": [0, 3]}, errors.ArgumentError, "paged_kv_indptr ends at 3, but paged_kv_indices has 2"),
        ({"indices": [0, -1]}, errors.ArgumentError, "negative page number"),
        ({"heads": 5}, errors.ArgumentError, "num_qo_heads is 5"),
        ({"kv_data_type": "float16"}, errors.DTypeError, "keys and values have dtype float16, expected float32"),
        ({"block_tables": np.zeros(1)}, errors.UnsupportedError, "block_tables is not supported"),
        ({"custom_mask": np.ones(4, bool)}, errors.ShapeError, "custom_mask has 4 elements, expected 21"),
        ({"page_size": 0}, errors.ArgumentError, "page_size is 0"),
    ):
        with pytest.raises(error, match=text):
            plan(**changes)
