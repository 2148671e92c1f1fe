"""Reference matrix products and state merging against Python loops. `trap_NN` names what a test pins down."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy.reference import cascade, gemm
from fi_cupy.reference.attention import attention

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def naive_mm(a, b):
    m, k = a.shape
    out = np.zeros((m, b.shape[1]))
    for i in range(m):
        for j in range(b.shape[1]):
            out[i, j] = sum(float(a[i, t]) * float(b[t, j]) for t in range(k))
    return out


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BF16, E4M3])
@pytest.mark.parametrize("bias", [False, True])
def test_mm(dtype, bias):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(3, 5)).astype(dtype), rng.normal(size=(4, 5)).astype(dtype).T  # column-major b
    c = rng.normal(size=4).astype(np.float32) if bias else None
    out = gemm.mm(a, b, c)
    assert out.dtype == (BF16 if dtype is E4M3 else dtype)
    expected = naive_mm(a, b) + (0 if c is None else c)
    eps = float(ml_dtypes.finfo(out.dtype).eps)
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=max(eps, 1e-12), atol=8 * eps)
    assert gemm.mm(a, b, out_dtype=np.float32).dtype == np.float32


def test_bmm():
    rng = np.random.default_rng(2)
    a, b = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 4, 5))
    np.testing.assert_allclose(gemm.bmm(a, b), [naive_mm(x, y) for x, y in zip(a, b, strict=True)], rtol=1e-12)
    assert gemm.bmm(a.astype(BF16), b.astype(BF16), out_dtype=np.float16).dtype == np.float16


@pytest.mark.parametrize("types", [(E4M3, E4M3), (E5M2, E4M3)])
def test_trap_30_bmm_fp8_scales_multiply_and_b_is_a_transposed_view(types):
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(2, 3, 4)).astype(types[0]), rng.normal(size=(2, 5, 4)).astype(types[1]).swapaxes(1, 2)
    out = gemm.bmm_fp8(a, b, np.asarray([2.0], dtype=np.float32), np.asarray(0.25, dtype=np.float32))
    assert out.dtype == BF16 and out.shape == (2, 3, 5)
    expected = np.stack([naive_mm(x, y) for x, y in zip(a, b, strict=True)]) * 0.5
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize("column_major", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_segment_gemm(column_major, indexed):
    rng = np.random.default_rng(4)
    x, weights = rng.normal(size=(7, 3)), rng.normal(size=(4, 3, 2))
    indptr = np.asarray([0, 2, 2, 6], dtype=np.int64)
    index = np.asarray([3, 0, 1], dtype=np.int64) if indexed else None
    stored = np.ascontiguousarray(weights.swapaxes(1, 2)) if column_major else weights
    out = gemm.segment_gemm(x, stored, indptr, index, column_major)
    for i in range(3):
        rows = slice(indptr[i], indptr[i + 1])
        np.testing.assert_allclose(out[rows], naive_mm(x[rows], weights[i if index is None else index[i]]), rtol=1e-12)
    assert np.all(out[6:] == 0)
    assert gemm.segment_gemm(x.astype(E4M3), stored.astype(E4M3), indptr, index, column_major).dtype == BF16


@pytest.mark.parametrize("mode", ["MN", "K"])
@pytest.mark.parametrize("granularity", [(1, 2, 3), (2, 2, 3), (1, 5, 4)])
def test_trap_30_groupwise_scales(mode, granularity):
    rng = np.random.default_rng(5)
    m, n, k = 5, 4, 6
    gm, gn, gk = granularity
    a, b = rng.normal(size=(m, k)).astype(E4M3), rng.normal(size=(n, k)).astype(E4M3)
    a_scale = rng.random((-(-m // gm) + 3, -(-k // gk)))  # the token dimension may be padded
    b_scale = rng.random((-(-n // gn), -(-k // gk)))
    expected = np.zeros((m, n))
    for i in range(m):
        for j in range(n):
            for t in range(k):
                scale = a_scale[i // gm, t // gk] * b_scale[j // gn, t // gk]
                expected[i, j] += float(a[i, t]) * float(b[j, t]) * scale
    if mode == "MN":
        a_scale, b_scale = a_scale.T.copy(), b_scale.T.copy()
    out = gemm.gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, mode, granularity, out_dtype=np.float64)
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    assert gemm.gemm_fp8_nt_groupwise(a, b, a_scale, b_scale, mode, granularity).dtype == BF16


# --- merging states ---------------------------------------------------------------------------------------------------


def naive_merge(values, lses):
    finite = [s for s in lses if s != -math.inf]
    if not finite:
        return np.zeros_like(values[0]), -math.inf
    top = max(finite)
    weights = [2.0 ** (s - top) if s != -math.inf else 0.0 for s in lses]
    merged = sum(w * v for w, v in zip(weights, values, strict=True) if w > 0) / sum(weights)
    return merged, top + math.log2(sum(weights))


@pytest.mark.filterwarnings("error")
@given(st.lists(st.one_of(st.floats(-400, 400), st.just(-math.inf)), min_size=0, max_size=5), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_trap_14_merge_states(lses, seed):
    values = np.random.default_rng(seed).normal(size=(1, len(lses), 1, 3))
    v, s = cascade.merge_states(values, np.asarray(lses).reshape(1, -1, 1))
    if not lses:
        assert np.all(v == 0) and np.isneginf(s).all() and v.shape == (1, 1, 3)
        return
    expected_v, expected_s = naive_merge(list(values[0, :, 0]), lses)
    np.testing.assert_allclose(v[0, 0], expected_v, rtol=1e-10, atol=1e-12)
    assert s[0, 0] == expected_s or s[0, 0] == pytest.approx(expected_s, rel=1e-12, abs=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, BF16])
def test_trap_14_empty_states_weigh_nothing_even_if_their_value_is_nan(dtype):
    v = np.ones((2, 1, 4), dtype=dtype)
    s = np.asarray([[3.0], [-np.inf]], dtype=np.float32)
    nan, empty = np.full_like(v, np.nan), np.full_like(s, -np.inf)
    for args in ((v, s, nan, empty), (nan, empty, v, s)):
        merged, lse = cascade.merge_state(*args)
        assert merged.dtype == dtype and lse.dtype == (np.float64 if dtype is np.float64 else np.float32)
        assert np.all(merged[0] == 1) and lse[0, 0] == 3.0
        assert np.all(merged[1] == 0) and np.isneginf(lse[1, 0])


def test_trap_14_in_place_mask_is_by_row():
    rng = np.random.default_rng(6)
    v, other = rng.normal(size=(2, 3, 2, 4))
    s, s_other = rng.normal(size=(2, 3, 2))
    full = cascade.merge_state(v, s, other, s_other)
    for mask in (np.asarray([1, 0, 1], dtype=np.uint8), np.asarray([True, False, True])):
        got = cascade.merge_state_in_place(v, s, other, s_other, mask)
        for g, f, old in zip(got, full, (v, s), strict=True):
            np.testing.assert_array_equal(g[[0, 2]], f[[0, 2]])
            np.testing.assert_array_equal(g[1], old[1])
    for g, f in zip(cascade.merge_state_in_place(v, s, other, s_other), full, strict=True):
        np.testing.assert_array_equal(g, f)


def test_trap_15_chunks_of_keys_merge_to_the_whole():
    rng = np.random.default_rng(7)
    q, k, v = rng.normal(size=(3, 4, 8)), rng.normal(size=(11, 2, 8)), rng.normal(size=(11, 2, 8))
    whole = attention(q, k, v)
    parts = [attention(q, k[c], v[c]) for c in (slice(0, 4), slice(4, 4), slice(4, 11))]
    stacked = [np.stack(t, axis=1) for t in zip(*parts, strict=True)]
    for got, expected in zip(cascade.merge_states(*stacked), whole, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12)
    first = cascade.merge_state(*parts[0], *parts[2])
    np.testing.assert_allclose(first[0], whole[0], rtol=1e-12)
