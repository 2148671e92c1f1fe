"""Reference softmax and sampling filters against Python loops. `trap_NN` names the semantic a test pins down."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy.reference import sampling_filters as sf

#: Rows of multiples of 1/64: sums are exact in every type, so thresholds are met exactly, and ties are common.
rows = st.lists(st.integers(0, 16), min_size=1, max_size=9).filter(any)


def naive_top_k(p, k):
    return [sum(q > t for q in p) < k for t in p]


def naive_top_p(p, top_p):
    exact, limit = [Fraction(float(t)) for t in p], Fraction(float(top_p))
    kept = [sum(q for q in exact if q > t) < limit for t in exact]
    return kept if any(kept) else [t == max(exact) for t in exact]


def naive_min_p(p, min_p):
    return [t >= min_p * max(p) for t in p]


@given(rows, st.integers(1, 12))
@settings(max_examples=150, deadline=None)
def test_trap_16_top_k_keeps_ties(counts, k):
    p = np.asarray([counts]) / 64
    keep = sf.top_k_mask(p, k)[0].tolist()
    assert keep == naive_top_k(p[0], k)
    assert sum(keep) >= min(k, len(counts))


@given(rows, st.integers(0, 80))
@settings(max_examples=200, deadline=None)
def test_trap_16_top_p_keeps_ties_and_the_smallest_set(counts, mass):
    p = np.asarray([counts], dtype=np.float32) / 64
    keep = sf.top_p_mask(p, mass / 64)[0]
    assert keep.tolist() == naive_top_p(p[0], mass / 64)
    assert keep.any()
    if p.sum() >= mass / 64:
        assert p[0, keep].sum() >= mass / 64
        smallest = p[0, keep].min()
        assert mass == 0 or p[0, p[0] > smallest].sum() < mass / 64


@given(rows, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
@settings(max_examples=100, deadline=None)
def test_trap_16_min_p_is_inclusive(counts, min_p):
    p = np.asarray([counts]) / 64
    assert sf.min_p_mask(p, min_p)[0].tolist() == naive_min_p(p[0], min_p)


def test_trap_16_examples():
    p = np.asarray([[0.5, 0.2, 0.2, 0.1]])
    assert sf.top_k_mask(p, 2).tolist() == [[True, True, True, False]]
    assert sf.top_p_mask(p, 0.5).tolist() == [[True, False, False, False]]
    assert sf.top_p_mask(p, 0.51).tolist() == [[True, True, True, False]]
    assert sf.min_p_mask(p, 0.4).tolist() == [[True, True, True, False]]


@given(rows, st.integers(1, 10), st.integers(1, 64))
@settings(max_examples=150, deadline=None)
def test_trap_17_order_of_top_k_and_top_p(counts, k, mass):
    p, top_p = np.asarray([counts]) / sum(counts), mass / 64
    in_k = naive_top_k(p[0], k)
    joint = [a and b for a, b in zip(in_k, naive_top_p(p[0], top_p), strict=True)]
    got = sf.top_k_top_p_mask(p, k, top_p, "joint")[0].tolist()
    exact = [Fraction(c, sum(counts)) for c in counts]
    greater = [sum(q for q in exact if q > t) for t in exact]
    if min(abs(g - Fraction(top_p)) for g in greater) > 1e-12:  # else rounding decides
        assert got == joint
    kept_sum = sum(c for c, keep in zip(counts, in_k, strict=True) if keep)
    after = [Fraction(c, kept_sum) if keep else Fraction(0) for c, keep in zip(counts, in_k, strict=True)]
    greater = [sum(q for q in after if q > t) for t in after]
    if min(abs(g - Fraction(top_p)) for g in greater) > 1e-12:
        first = [keep and g < Fraction(top_p) for keep, g in zip(in_k, greater, strict=True)]
        assert sf.top_k_top_p_mask(p, k, top_p, "top_k_first")[0].tolist() == first


def test_trap_17_the_orders_differ():
    p = np.asarray([[0.4, 0.3, 0.2, 0.1]])
    # Top-2 renormalised is (4/7, 3/7): the first alone has mass 0.55. On the original it needs the second.
    assert sf.top_k_top_p_mask(p, 2, 0.55, "top_k_first").tolist() == [[True, False, False, False]]
    assert sf.top_k_top_p_mask(p, 2, 0.55, "joint").tolist() == [[True, True, False, False]]


@pytest.mark.filterwarnings("error")
def test_trap_19_nan_rows_keep_nothing_and_large_k_is_no_filter():
    p = np.asarray([[0.25, np.nan, 0.75], [0.5, 0.25, 0.25]], dtype=np.float32)
    for keep in (sf.top_k_mask(p, 2), sf.top_k_mask(p, 1 << 30), sf.top_p_mask(p, 0.9), sf.min_p_mask(p, 0.0)):
        assert not keep[0].any() and keep[1].any()
    assert sf.top_k_mask(p, 3)[1].all() and sf.top_k_mask(p, 1 << 30)[1].all()
    assert np.all(sf.top_k_renorm_probs(p, 1)[0] == 0)


@pytest.mark.filterwarnings("error")
def test_trap_19_denormal_probabilities():
    tiny = np.float32(1e-44)
    p = np.asarray([[1.0, tiny, 0.0]], dtype=np.float32)
    assert sf.top_k_mask(p, 2).tolist() == [[True, True, False]]
    assert sf.top_p_mask(p, 1.0).tolist() == [[True, False, False]]
    assert sf.top_k_renorm_probs(np.asarray([[tiny, tiny, 0]], dtype=np.float32), 2)[0].tolist() == [0.5, 0.5, 0.0]


def test_parameters_by_row():
    p = np.tile(np.asarray([[0.4, 0.3, 0.2, 0.1]], dtype=np.float32), (3, 1))
    assert sf.top_k_mask(p, np.asarray([1, 3, 9])).sum(axis=1).tolist() == [1, 3, 4]
    assert sf.top_p_mask(p, np.asarray([0.1, 0.65, 1.0])).sum(axis=1).tolist() == [1, 2, 4]
    assert sf.min_p_mask(p, np.asarray([1.0, 0.45, 0.0])).sum(axis=1).tolist() == [1, 3, 4]
    assert sf.top_k_mask(p, np.asarray([2])).sum(axis=1).tolist() == [2, 2, 2]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_renormalised_probabilities(dtype):
    raw = np.random.default_rng(1).random((4, 50))
    p = (raw / raw.sum(axis=1, keepdims=True)).astype(dtype)
    eps = float(ml_dtypes.finfo(dtype).eps)
    for got, keep in (
        (sf.top_k_renorm_probs(p, 7), [naive_top_k(r, 7) for r in p]),
        (sf.top_p_renorm_probs(p, 0.3), [naive_top_p(r, 0.3) for r in p]),
        (sf.min_p_renorm_probs(p, 0.5), None),
    ):
        assert got.dtype == dtype
        if keep is None:
            keep = sf.min_p_mask(p, 0.5)
        for row in range(4):
            total = sum(float(t) for t, k in zip(p[row], keep[row], strict=True) if k)
            expected = [float(t) / total if k else 0.0 for t, k in zip(p[row], keep[row], strict=True)]
            np.testing.assert_allclose(got[row].astype(np.float64), expected, rtol=2 * eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_top_k_mask_logits(dtype):
    x = np.round(4 * np.random.default_rng(2).normal(size=(5, 30))).astype(dtype)  # many ties
    x[0, :28] = -np.inf
    got = sf.top_k_mask_logits(x, np.asarray([5, 1, 3, 30, 1 << 30]))
    assert got.dtype == dtype
    for row, k in enumerate([5, 1, 3, 30, 1 << 30]):
        keep = naive_top_k([float(t) for t in x[row]], k)
        expected = [float(t) if m else -math.inf for t, m in zip(x[row], keep, strict=True)]
        assert got[row].astype(np.float64).tolist() == expected


def naive_softmax(row, inverse):
    scaled = [t * inverse if t != -math.inf else t for t in row]
    top = max(scaled)
    e = [math.exp(t - top) for t in scaled]
    return [t / sum(e) for t in e]


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("temperature", [None, 0.5, np.asarray([1.0, 2.0, 0.1])])
def test_softmax(dtype, temperature):
    x = (5 * np.random.default_rng(3).normal(size=(3, 20))).astype(dtype)
    x[1, 4:9] = -np.inf
    got = sf.softmax(x, temperature)
    assert got.dtype == (np.float64 if dtype == np.float64 else np.float32)
    for row in range(3):
        t = 1.0 if temperature is None else float(np.broadcast_to(temperature, (3,))[row])
        expected = naive_softmax([float(v) for v in x[row]], 1 / t)
        np.testing.assert_allclose(got[row], expected, rtol=1e-12 if dtype == np.float64 else 5e-5, atol=1e-30)


@pytest.mark.filterwarnings("error")
def test_trap_21_temperature_zero_is_uniform():
    x = np.asarray([[1.0, 5.0, -3.0, -np.inf], [1.0, 5.0, -3.0, 0.0]], dtype=np.float32)
    got = sf.softmax(x, np.asarray([0.0, 1e-3]))
    np.testing.assert_allclose(got[0], [1 / 3, 1 / 3, 1 / 3, 0], rtol=1e-6)
    assert got[1].tolist() == [0, 1, 0, 0]
    np.testing.assert_allclose(sf.softmax(x[1:], 0.0), 0.25)


@pytest.mark.filterwarnings("error")
def test_softmax_of_a_masked_row_is_zero_and_nan_stays_in_its_row():
    x = np.asarray([[-np.inf, -np.inf], [0.0, 0.0], [np.nan, 0.0]], dtype=np.float32)
    got = sf.softmax(x)
    assert got[0].tolist() == [0, 0] and got[1].tolist() == [0.5, 0.5] and np.all(np.isnan(got[2]))
