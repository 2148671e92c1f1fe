"""Merging, decode, paged append, norms and rope of few rows: the kernels run on the CPU, against the reference."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from emulate import HOPPER, available, device, emulated
from test_fused_quantization_emulated import pages_of

from fi_cupy import cascade, decode_kernel, decode_single, norm, page, page_quantized, rope, rope_kernel
from fi_cupy.reference import cascade as reference_cascade
from fi_cupy.reference import page as reference_page
from fi_cupy.testing.generators import normal

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++ on x86-64")


@pytest.fixture(autouse=True)
def _on_the_emulator():
    with emulated(HOPPER, cascade, decode_kernel, decode_single, norm, page, page_quantized, rope_kernel):
        yield


def wide(x):
    return np.asarray(x).astype(np.float64)


def test_merge_of_dense_states(rng):
    shape = (3, 32, 64)
    va, vb = normal(rng, shape, "float32"), normal(rng, shape, "float32")
    sa, sb = ((rng.standard_normal(shape[:2]) * 8).astype(np.float32) for _ in range(2))
    for v, s in ((va, sa), (vb, sb)):
        empty = rng.random(shape[:2]) < 0.3
        s[empty], v[empty] = -np.inf, np.nan
    want = reference_cascade.merge_state(*(wide(x) for x in (va, sa, vb, sb)))
    got = cascade.merge_state(*(device(x) for x in (va, sa, vb, sb)))
    np.testing.assert_allclose(wide(got[0]), want[0], rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(wide(got[1]), want[1], rtol=1e-6, atol=1e-6)
    v, s = device(va.copy()), device(sa.copy())
    cascade.merge_state_in_place(v, s, device(vb), device(sb))
    np.testing.assert_allclose(wide(v), want[0], rtol=2e-6, atol=2e-6)


# Several tokens a CTA; several CTAs a token, and four tokens a thread.
@pytest.mark.parametrize("heads,dim,scaled", [(1, 8, 1), (9, 128, 8)])
def test_append_copies(rng, heads, dim, scaled):
    lens = np.array([40, 30, 7]) * scaled
    b, p, indices, indptr, last, pages = pages_of(rng, lens.tolist(), (lens - 5).tolist(), 4)
    p[1] = 10**6  # past its request's pages: goes nowhere
    k, v = (normal(rng, (len(b), heads, dim), "bfloat16") for _ in range(2))
    cache = normal(rng, (pages, 2, 4, heads, dim), "bfloat16")
    want, given = cache.copy(), device(cache)
    page.append_paged_kv_cache(*[device(a) for a in (k, v, b, p)], given, *[device(a) for a in (indices, indptr, last)])
    b[1], p[1] = -1, 0
    reference_page.append_paged_kv_cache_(k, v, b, p, want[:, 0], want[:, 1], indices, indptr, last)
    assert np.asarray(given).tobytes() == want.tobytes()


def test_append_shape_covers_every_vector_once():
    for tokens in (1, 5, 1000):
        for vectors in (1, 2, 63, 64, 65, 72, 96, 127, 128, 129, 256, 1000):
            for unroll in (1, 4):
                threads, (x, y, z) = page_quantized.append_shape(tokens, vectors, unroll)
                side = threads // vectors if 2 * vectors <= threads else 1
                assert threads % 32 == 0 and threads <= 128 and z == 1
                assert (x - 1) * side * unroll < tokens <= x * side * unroll
                assert (y - 1) * threads < vectors <= y * threads


def test_rope_of_few_tokens(rng):
    q, k = (normal(rng, (5, heads, 64), "bfloat16") for heads in (9, 3))
    positions = rng.integers(0, 1 << 17, 5).astype(np.int32)
    want = rope.apply_rope_pos_ids(*(wide(x).astype(np.float32) for x in (q, k)), positions)
    rope.apply_rope_pos_ids_inplace(q := device(q), k := device(k), device(positions))
    for got, w in zip((q, k), want, strict=True):
        assert np.abs(wide(got) - w).max() < 0.02


# Rows that share a warp; of several warps; of several vectors a thread, the weight held or not.
@pytest.mark.parametrize("hidden", [40, 576, 2568])
def test_norms(rng, hidden):
    x, residual = (normal(rng, (3, hidden), "bfloat16") for _ in range(2))
    weight = normal(rng, (hidden,), "bfloat16")
    want = norm.gemma_rmsnorm(wide(x).astype(np.float32), wide(weight).astype(np.float32))
    np.testing.assert_allclose(wide(norm.gemma_rmsnorm(device(x), device(weight))), want, rtol=0.01, atol=1e-3)
    added = wide(x).astype(np.float32), wide(residual).astype(np.float32)
    norm.fused_add_rmsnorm(*added, wide(weight).astype(np.float32))
    norm.fused_add_rmsnorm(x := device(x), residual := device(residual), device(weight))
    for got, w in zip((x, residual), added, strict=True):
        np.testing.assert_allclose(wide(got), w, rtol=0.01, atol=1e-3)


# The last tile is a warp's first, or a later one; a window begins inside a tile. What lies behind the last key is NaN.
@pytest.mark.parametrize(("dim", "keys", "window"), [(64, 37, -1), (64, 133, -1), (64, 131, 50)])
def test_decode_of_parts_of_tiles(rng, dim, keys, window):
    q = normal(rng, (9, dim), "bfloat16")
    k, v = (normal(rng, (keys + 16, 3, dim), "bfloat16") for _ in range(2))
    k[keys:], v[keys:] = np.nan, np.nan
    call = decode_single.single_decode_with_kv_cache
    want = call(*(wide(x).astype(np.float32) for x in (q, k[:keys], v[:keys])), window_left=window)
    with mock.patch.object(decode_single, "single_chunks", lambda *_: (keys // 16 * 16 + 16, 1)):
        got = call(device(q), device(k)[:keys], device(v)[:keys], window_left=window)
    assert np.abs(wide(got) - want).max() < 0.01
