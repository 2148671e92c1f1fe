"""Options drawn together at random: the wrappers on CPU arrays against attention one row and head at a time."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_attention import Pages, naive

from fi_cupy import decode, prefill
from fi_cupy.testing.tolerances import assert_close

#: (name, values) of what any of the wrappers takes; the first value is the default.
OPTIONS = {
    "causal": st.booleans(),
    "window_left": st.sampled_from([-1, 0, 2, 5, 40]),
    "logits_soft_cap": st.sampled_from([None, 0.9, 20.0]),
    "sm_scale": st.sampled_from([None, 0.3]),
    "pos_encoding_mode": st.sampled_from(["NONE", "ALIBI", "ROPE_LLAMA"]),
    "rope_scale": st.sampled_from([None, 2.0]),
    "rope_theta": st.sampled_from([None, 500.0]),
}
SCALES = {name: st.sampled_from([None, 0.5, 3.0]) for name in ("q_scale", "k_scale", "v_scale")}
HEADS = st.sampled_from([(1, 1), (4, 2), (6, 1), (5, 5)])
DIMS = st.sampled_from([(8, 8), (16, 8), (8, 24)])


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def expected(parts, options, scales, masks=None, sinks=None):
    """What every request's naive attention gives, one after the other."""
    dim = parts[0][0].shape[-1]
    scale = (options["sm_scale"] or 1 / np.sqrt(dim)) * (scales.get("q_scale") or 1) * (scales.get("k_scale") or 1)
    made = [
        naive(
            q, k, v, causal=options.get("causal", False), window_left=options["window_left"],
            cap=options["logits_soft_cap"] or 0.0, sm_scale=scale, mode=options["pos_encoding_mode"],
            mask=None if masks is None else masks[b], sinks=sinks, rope_scale=options["rope_scale"] or 1.0,
            rope_theta=options["rope_theta"] or 1e4,
        )
        for b, (q, k, v) in enumerate(parts)
    ]  # fmt: skip
    out, lse = (np.concatenate(x) for x in zip(*made, strict=True))
    return out * (scales.get("v_scale") or 1), lse


def check(made, want):
    assert_close(made[0], want[0], "float32", "product")
    assert_close(made[1], want[1], "float32", "product")


def swap(x, layout):
    return np.ascontiguousarray(x.swapaxes(-3, -2)) if layout == "HND" else x


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31), lens=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=4),
    heads=HEADS, dims=DIMS, options=st.fixed_dictionaries(OPTIONS), scales=st.fixed_dictionaries(SCALES),
    masked=st.sampled_from(["", "custom_mask", "packed_custom_mask"]), sinks=st.booleans(),
    layout=st.sampled_from(["NHD", "HND"]), page_size=st.sampled_from([0, 1, 3, 4]), split=st.booleans(),
)  # fmt: skip
def test_prefill_wrappers(seed, lens, heads, dims, options, scales, masked, sinks, layout, page_size, split):
    """Page size 0 is the ragged wrapper."""
    rng = np.random.default_rng(seed)
    parts = [
        (normal(rng, m, heads[0], dims[0]), normal(rng, n, heads[1], dims[0]), normal(rng, n, heads[1], dims[1]))
        for m, n in lens
    ]
    qo, kv = (np.concatenate([[0], np.cumsum(x)]) for x in zip(*lens, strict=True))
    masks, given_masks = None, {}
    if masked:
        masks = [rng.random((m, n)) < 0.6 for m, n in lens]
        flat = [np.packbits(x.reshape(-1), bitorder="little") if "packed" in masked else x.reshape(-1) for x in masks]
        given_masks = {masked: np.concatenate(flat)}
    sink = normal(rng, heads[0]) if sinks else None
    q = np.concatenate([p[0] for p in parts])
    more = {"q_data_type": "float32", "disable_split_kv": split, **given_masks, **options}
    if page_size:
        pages = [Pages(rng, 40, page_size, heads[1], d, layout=layout) for d in dims]
        pages[1].free = list(pages[0].free)
        table, same = (c.add([(p[i], p[i]) for p in parts]) for i, c in ((1, pages[0]), (2, pages[1])))
        assert all((a == b).all() for a, b in zip(table, same, strict=True))
        w = prefill.BatchPrefillWithPagedKVCacheWrapper(np.empty(16, np.uint8), layout)
        w.plan(qo, *table, *heads, dims[0], page_size, dims[1], **more)
        keys = ((pages[0].cache[0], pages[1].cache[1]),)
    else:
        w = prefill.BatchPrefillWithRaggedKVCacheWrapper(np.empty(16, np.uint8), layout)
        w.plan(qo, kv, *heads, *dims, **more)
        keys = tuple(swap(np.concatenate([p[i] for p in parts]), layout) for i in (1, 2))
    made = w.run(q, *keys, **scales, sinks=sink, return_lse=True)
    check(made, expected(parts, options, scales, masks, sink))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31), lens=st.lists(st.integers(0, 12), min_size=1, max_size=5), heads=HEADS,
    options=st.fixed_dictionaries(OPTIONS), scales=st.fixed_dictionaries(SCALES), sinks=st.booleans(),
    layout=st.sampled_from(["NHD", "HND"]), page_size=st.sampled_from([1, 3, 4]), split=st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_decode_wrapper(seed, lens, heads, options, scales, sinks, layout, page_size, split):
    rng = np.random.default_rng(seed)
    del options["causal"]
    parts = [(normal(rng, 1, heads[0], 8), normal(rng, n, heads[1], 8), normal(rng, n, heads[1], 8)) for n in lens]
    pages = Pages(rng, 70, page_size, heads[1], 8, layout=layout)
    table = pages.add([p[1:] for p in parts])
    sink = normal(rng, heads[0]) if sinks else None
    w = decode.BatchDecodeWithPagedKVCacheWrapper(np.empty(16, np.uint8), layout)
    w.plan(*table, *heads, 8, page_size, q_data_type="float32", fixed_split_size=split, **options)
    q = np.concatenate([p[0] for p in parts])
    made = w.run(q, pages.cache, **scales, sinks=sink, return_lse=True)
    check(made, expected(parts, options, scales, sinks=sink))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**31), rows=st.integers(1, 5), extra=st.integers(0, 6), heads=HEADS, dims=DIMS,
    options=st.fixed_dictionaries(OPTIONS), scales=st.fixed_dictionaries(SCALES),
    masked=st.sampled_from(["", "custom_mask", "packed_custom_mask"]), layout=st.sampled_from(["NHD", "HND"]),
)  # fmt: skip
def test_single_functions(seed, rows, extra, heads, dims, options, scales, masked, layout):
    rng = np.random.default_rng(seed)
    n = rows + extra
    q, k = normal(rng, rows, heads[0], dims[0]), normal(rng, n, heads[1], dims[0])
    v = normal(rng, n, heads[1], dims[1])
    masks, given_masks = None, {}
    if masked:
        masks = [rng.random((rows, n)) < 0.6]
        flat = np.packbits(masks[0].reshape(-1), bitorder="little")
        given_masks = {masked: flat if "packed" in masked else masks[0]}
    keys = (swap(k, layout), swap(v, layout))
    single = {name: x for name, x in scales.items() if name != "q_scale"}  # this function has none
    made = prefill.single_prefill_with_kv_cache(
        q, *keys, kv_layout=layout, return_lse=True, **single, **given_masks, **options
    )
    check(made, expected([(q, k, v)], options, single, masks))
    if dims[0] == dims[1]:
        del options["causal"]
        out, lse = decode.single_decode_with_kv_cache(q[0], *keys, layout, return_lse=True, **scales, **options)
        check((out[None], lse[None]), expected([(q[:1], k, v)], options, scales))
