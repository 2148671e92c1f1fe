"""Casts fused with rope, paged append and SiLU: the kernels run on the CPU, against the reference."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from emulate import HOPPER, available, device, emulated

from fi_cupy import activation, page, page_quantized, quantization, rope, rope_quantize_kernel
from fi_cupy.quantization import kernels
from fi_cupy.reference import page as reference_page
from fi_cupy.reference import quantization as reference
from fi_cupy.reference import rope as reference_rope
from fi_cupy.testing.generators import normal

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++ on x86-64")
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
I32 = np.int32


@pytest.fixture(autouse=True)
def _on_the_emulator():
    with emulated(HOPPER, kernels, page, page_quantized, rope_quantize_kernel):
        yield


def pages_of(rng, lens, new, page_size, padding=2):
    """(batch_indices, positions, indices, indptr, last, number of pages) for the `new` last tokens of each request."""
    pages = [-(-n // page_size) for n in lens]
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(I32)
    indices = rng.permutation(int(indptr[-1]) + 3)[: indptr[-1]].astype(I32)
    last = np.array([(n - 1) % page_size + 1 if n else 1 for n in lens], I32)
    append = np.concatenate([[0], np.cumsum(new)]).astype(I32)
    b, p = reference_page.get_batch_indices_positions(append, np.array(lens, I32), int(append[-1]) + padding)
    return b, p, indices, indptr, last, int(indptr[-1]) + 3


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("scale", ["number", "heads", "one"])
@pytest.mark.parametrize("kind", [E4M3, np.int8], ids=lambda k: np.dtype(k).name)
def test_append_divides_by_the_scale(rng, layout, scale, kind):
    heads, dim, page_size = 3, 16, 4
    b, p, indices, indptr, last, pages = pages_of(rng, [7, 3, 5], [2, 0, 5], page_size)
    k, v = normal(rng, (len(b), heads, dim), "bfloat16", 4.0), normal(rng, (len(b), heads, dim), "bfloat16")
    k[0, 0, :3] = np.nan, np.inf, -0.0
    inner = (page_size, heads, dim) if layout == "NHD" else (heads, page_size, dim)
    cache = np.zeros((pages, 2, *inner), np.uint8).view(kind)
    want = cache.copy()
    scales = {
        "number": (0.5, 3.0),
        "one": (np.array([0.3], np.float32), np.array([0.01], np.float32)),
        "heads": (np.array([0.3, 2, 1e-3], np.float32), np.array([0.7, 0.2, 3], np.float32)),
    }[scale]
    table = (indices, indptr, last)
    given = device(cache)
    page.append_paged_kv_cache(
        *[device(a) for a in (k, v, b, p)], given, *[device(a) for a in table], layout,
        k_scale=scales[0] if scale == "number" else device(scales[0]),
        v_scale=scales[1] if scale == "number" else device(scales[1]),
    )  # fmt: skip
    k8, v8 = (
        reference.static_quant(x, s if np.size(s) == 1 else s[:, None], kind)
        for x, s in zip((k, v), scales, strict=True)
    )
    reference_page.append_paged_kv_cache_(k8, v8, b, p, want[:, 0], want[:, 1], indices, indptr, last, layout)
    got, want = (np.nan_to_num(np.asarray(c).astype(np.float32), nan=1e9) for c in (given, want))
    assert (got == want).all()


def test_append_mixes_a_cast_with_a_copy(rng):
    b, p, indices, indptr, last, pages = pages_of(rng, [7, 3], [2, 1], 4)
    ckv, kpe = normal(rng, (len(b), 32), "bfloat16"), normal(rng, (len(b), 8), "bfloat16")
    args = [device(a) for a in (indices, indptr, last)]
    for kinds, scales in (((E4M3, "bfloat16"), (0.5, None)), ((E4M3, E4M3), (0.5, 2.0)), ((E4M3, E5M2), (0.5, 2.0))):
        caches = [device(normal(rng, (pages, 4, n), kind)) for n, kind in zip((32, 8), kinds, strict=True)]
        want = [np.array(c) for c in caches]
        page.append_paged_mla_kv_cache(
            *[device(a) for a in (ckv, kpe, b, p)], *caches, *args, ckv_scale=scales[0], kpe_scale=scales[1]
        )
        for x, w, s in zip((ckv, kpe), want, scales, strict=True):
            cast = x if s is None else reference.static_quant(x, s, w.dtype)
            reference_page.append_paged_mla_kv_cache_(cast, None, b, p, w, None, indices, indptr)
        for got, w in zip(caches, want, strict=True):
            assert np.asarray(got).tobytes() == w.tobytes()


def rope_inputs(rng, tokens, heads, kv_heads, rope_dim, nope_dim, dtype="bfloat16", mla=False):
    k_shape = (tokens,) if mla else (tokens, kv_heads)
    q = normal(rng, (tokens, heads, nope_dim + rope_dim), dtype)
    k = normal(rng, (*k_shape, nope_dim + rope_dim), dtype)
    cache = rng.normal(size=(50, rope_dim)).astype(np.float32)
    return q, k, cache, rng.integers(0, 50, tokens).astype(I32)


def equal_fp8(got, want, ulps=1):
    """The same codes but for roundings of the last bit of an fp32 product: neighbours at most, and rarely."""
    got, want = (np.asarray(x).view(np.uint8).astype(np.int32) for x in (got, want))
    assert got.shape == want.shape
    assert np.abs(got - want).max(initial=0) <= ulps and (got != want).mean() < 0.002


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("mla,kind", [(False, E5M2), (True, E4M3)], ids=str)
def test_trap_23_rope_quantize_multiplies(rng, is_neox, kind, mla):
    for rope_dim, nope_dim in ((16, 48), (64, 64), (6, 10), (2, 0)):
        q, k, cache, pos = rope_inputs(rng, 5, 4, 2, rope_dim, nope_dim, mla=mla)
        parts = (
            q[..., nope_dim:],
            k[..., nope_dim:],
            *((q[..., :nope_dim], k[..., :nope_dim]) if nope_dim else (None,) * 2),
        )
        dq, dk = device(q), device(k)
        on = (
            dq[..., nope_dim:],
            dk[..., nope_dim:],
            *((dq[..., :nope_dim], dk[..., :nope_dim]) if nope_dim else (None,) * 2),
        )
        call = rope.mla_rope_quantize_fp8 if mla else rope.rope_quantize_fp8
        got = call(*on, device(cache), device(pos), is_neox, kind, 0.25, 3.0)
        want = reference_rope.rope_quantize_fp8(*parts, cache, pos, is_neox, kind, 0.25, 3.0)
        for g, w in zip(got, want, strict=True):
            if w is None:
                assert g is None
            else:
                equal_fp8(g, w)


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_rope_quantize_append(rng, mla, layout):
    page_size, rope_dim, nope_dim, heads = 4, 16, 32, 2
    b, p, indices, indptr, _, pages = pages_of(rng, [9, 3, 5], [2, 0, 5], page_size)
    q, k, cache, _ = rope_inputs(rng, len(b), 4, heads, rope_dim, nope_dim, mla=mla)
    v = None if mla else normal(rng, (len(b), heads, 24), "bfloat16")
    pos = (p + 3).astype(I32)
    if mla:
        caches = [normal(rng, (pages, page_size, n), E4M3) for n in (nope_dim, rope_dim)]
    else:
        shapes = [
            (pages, page_size, heads, n) if layout == "NHD" else (pages, heads, page_size, n)
            for n in (rope_dim + nope_dim, 24)
        ]
        caches = [normal(rng, s, E4M3) for s in shapes]
    on_device = tuple(device(c.copy()) for c in caches)
    dq, dk = device(q), device(k)
    got = rope.rope_quantize_fp8_append_paged_kv_cache(
        dq[..., nope_dim:], dk[..., nope_dim:], dq[..., :nope_dim], dk[..., :nope_dim], None if mla else device(v),
        device(cache), device(pos), on_device, device(indices), device(indptr), device(b), device(p),
        quant_scale_q=0.5, quant_scale_kv=2.0, page_size=page_size, kv_layout=layout,
    )  # fmt: skip
    want = reference_rope.rope_quantize_fp8_append_paged_kv_cache_(
        q[..., nope_dim:], k[..., nope_dim:], q[..., :nope_dim], k[..., :nope_dim], v, cache, pos, tuple(caches),
        indices, indptr, b, p, True, None, 0.5, 2.0, layout,
    )  # fmt: skip
    for g, w in zip((*got, *on_device), (*want, *caches), strict=True):
        equal_fp8(g, w)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("kind,scale", [("bfloat16", 1.0), (E4M3, 1.0), (E4M3, 3.0)], ids=str)
@pytest.mark.parametrize("sizes", [(16, 0), (8, 24), (6, 2)], ids=str)
def test_rope_append_keeps_queries(rng, sizes, kind, scale, is_neox):
    """q in place in its own type; keys and values in the cache's: rotated as `apply_rope_with_cos_sin_cache` does."""
    rope_dim, nope_dim = sizes
    page_size, heads = 4, 2
    b, p, indices, indptr, _, pages = pages_of(rng, [9, 3, 5], [2, 0, 5], page_size)
    q, k, cache, _ = rope_inputs(rng, len(b), 4, heads, rope_dim, nope_dim)
    v, pos = normal(rng, (len(b), heads, 24), "bfloat16"), (p + 3).astype(I32)
    caches = [normal(rng, (pages, page_size, heads, n), kind) for n in (rope_dim + nope_dim, 24)]
    on_device, dq, dk = tuple(device(c.copy()) for c in caches), device(q.copy()), device(k)
    none = (None, None)
    rest = (dq[..., rope_dim:], dk[..., rope_dim:]) if nope_dim else none
    got = rope.rope_append_paged_kv_cache(
        dq[..., :rope_dim], dk[..., :rope_dim], *rest, device(v), device(cache), device(pos), on_device,
        *[device(a) for a in (indices, indptr, b, p)], is_neox, scale, page_size, q_rope_out=dq[..., :rope_dim],
    )  # fmt: skip
    flat = [x[..., :rope_dim].astype(np.float32).reshape(len(b), -1) for x in (q, k)]
    turned = reference_rope.apply_rope_with_cos_sin_cache(pos, *flat, rope_dim, cache, is_neox)
    turned_q, turned_k = (x.reshape(len(b), -1, rope_dim) for x in turned)
    keys = np.concatenate([turned_k, k[..., rope_dim:].astype(np.float32)], axis=-1)
    values = v.astype(np.float32) * scale
    cast = (lambda x: x.astype("bfloat16")) if kind == "bfloat16" else lambda x: np.clip(x, -448, 448).astype(E4M3)
    reference_page.append_paged_kv_cache_(cast(keys * scale), cast(values), b, p, *caches, indices, indptr)
    one = np.asarray(turned_q.astype("bfloat16")).view(np.uint16).astype(np.int32)
    assert np.abs(np.asarray(dq)[..., :rope_dim].view(np.uint16).astype(np.int32) - one).max() <= 1
    if nope_dim:
        assert np.asarray(got[1]).tobytes() == np.ascontiguousarray(q[..., rope_dim:]).tobytes()
    for g, w in zip(on_device, caches, strict=True):
        codes = [np.ascontiguousarray(x).view(f"u{w.dtype.itemsize}").astype(np.int32) for x in (np.asarray(g), w)]
        assert np.abs(codes[0] - codes[1]).max() <= 1 and (codes[0] != codes[1]).mean() < 0.002


@pytest.mark.parametrize("kind", [E4M3, np.int8], ids=lambda k: np.dtype(k).name)
def test_silu_and_mul_quant(rng, kind):
    x = normal(rng, (7, 2 * 200), "bfloat16", 2.0)
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    exact = gate / (1 + np.exp(-gate)) * up
    for scale in (0.02, device(np.array([0.02], np.float32))):
        out = device(np.zeros((7, 200), kind))
        activation.silu_and_mul_quant(out, device(x), scale)
        want = reference.static_quant(exact.astype(np.float32), 0.02, kind)
        equal_fp8(out, want)
    q, scales = quantization.per_token_group_quant_8bit(device(x), 40, dst_dtype=kind, fuse_silu_and_mul=True)
    codes, wanted = reference.per_token_group_quant_8bit(exact.astype(np.float32), 40, dst_dtype=kind)
    np.testing.assert_allclose(np.asarray(scales), wanted, rtol=3e-6)
    equal_fp8(q, codes)


def test_silu_and_mul_nvfp4(rng):
    x = normal(rng, (5, 2 * 64), "bfloat16", 2.0)
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    exact = gate / (1 + np.exp(-gate)) * up
    given = 448 * 6 / np.abs(exact).max()
    q, scales = quantization.silu_and_mul_nvfp4_quantize(device(x), float(given))
    back = quantization.e2m1_and_ufp8sf_scale_to_float(q, scales, 1 / float(given))
    groups = np.abs(exact).reshape(5, 4, 16).max(-1, keepdims=True)
    error = np.abs(np.asarray(back) - exact).reshape(5, 4, 16)
    assert (error <= groups * (1 / 6 + 1 / 16)).all()  # half a step of the largest codes, and the scale's rounding
