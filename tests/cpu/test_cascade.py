"""The merging operators on CPU arrays."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import cascade, errors
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close


def naive(v, s):
    """Softmax of natural logarithms over axis 1; a state with s = -inf does not count."""
    v, s = v.astype(np.float64), s.astype(np.float64)
    out, lse = np.zeros((v.shape[0], *v.shape[2:])), np.full((v.shape[0], v.shape[2]), -np.inf)
    for n, h in np.ndindex(lse.shape):
        seen = [i for i in range(v.shape[1]) if s[n, i, h] > -np.inf]
        if seen:
            weights = np.array([2.0 ** (s[n, i, h] - s[n, seen[0], h]) for i in seen])
            out[n, h] = (weights[:, None] * v[n, seen, h]).sum(0) / weights.sum()
            lse[n, h] = s[n, seen[0], h] + np.log2(weights.sum())
    return out, lse


def states(rng, n, count, heads, dim, dtype):
    s = (rng.standard_normal((n, count, heads)) * 5).astype(np.float32)
    s[rng.random(s.shape) < 0.3] = -np.inf
    v = normal(rng, (n, count, heads, dim), dtype)
    v[np.isneginf(s)] = np.nan
    return v, s


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_trap_14_merge_states(rng, dtype, count):
    v, s = states(rng, 4, count, 3, 8, dtype)
    got, want = cascade.merge_states(v, s), naive(v, s)
    assert got[0].dtype == v.dtype and got[1].dtype == np.float32
    assert_close(got[0], want[0], dtype)
    assert_close(got[1], want[1], "float32")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mask_type", [None, bool, np.uint8])
def test_trap_14_merge_state_and_its_in_place_form(rng, dtype, mask_type):
    v, s = states(rng, 6, 2, 3, 8, dtype)
    want = naive(v, s)
    got = cascade.merge_state(v[:, 0], s[:, 0], v[:, 1], s[:, 1])
    mask = None if mask_type is None else rng.integers(0, 2, 6).astype(mask_type)
    rows = np.ones(6, bool) if mask is None else mask.astype(bool)
    before = v[:, 0].copy(), s[:, 0].copy()
    assert cascade.merge_state_in_place(v[:, 0], s[:, 0], v[:, 1], s[:, 1], mask) is None
    assert_close(got[0], want[0], dtype)
    assert_close(got[1], want[1], "float32")
    assert (v[rows, 0] == got[0][rows]).all() and (s[rows, 0] == got[1][rows]).all()
    assert v[~rows, 0].tobytes() == before[0][~rows].tobytes() and (s[~rows, 0] == before[1][~rows]).all()


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda v, s: cascade.merge_state(v, s, v[:1], s[:1]),
            errors.ShapeError,
            "v_b has shape (1, 2, 8)",
        ),
        (
            lambda v, s: cascade.merge_state(v, s[:, :1], v, s),
            errors.ShapeError,
            "s_a has shape (3, 1)",
        ),
        (lambda v, s: cascade.merge_state(v, s.astype(np.float64), v, s), errors.DTypeError, "s_a has dtype float64"),
        (lambda v, s: cascade.merge_state(v, s, v.astype(np.float16), s), errors.DTypeError, "v_b has dtype float16"),
        (lambda v, s: cascade.merge_states(v, s), errors.ShapeError, "merge_states: v is 3-D (3, 2, 8), expected 4-D"),
        (
            lambda v, s: cascade.merge_state_in_place(v, s, v, s, np.ones(2, bool)),
            errors.ShapeError,
            "merge_state_in_place: mask has shape (2,), expected (3,)",
        ),
        (
            lambda v, s: cascade.merge_state_in_place(v, s, v, s, np.ones(3, np.int32)),
            errors.DTypeError,
            "mask has dtype int32, expected bool or uint8",
        ),
    ],
)
def test_errors(rng, call, error, text):
    with pytest.raises(error) as caught:
        call(normal(rng, (3, 2, 8), "float32"), np.zeros((3, 2), np.float32))
    assert text in str(caught.value)


def test_read_only_states_are_refused_in_place(rng):
    v, s = normal(rng, (3, 2, 8), "float32"), np.zeros((3, 2), np.float32)
    s.flags.writeable = False
    with pytest.raises(errors.ImmutableArrayError, match="merge_state_in_place: s is a read-only"):
        cascade.merge_state_in_place(v, s, v, s)


@pytest.mark.parametrize(("dim", "size"), [(64, 2), (128, 2), (80, 2), (7, 2), (36, 4), (512, 2), (1024, 4)])
@pytest.mark.parametrize("first", [0, 1, 2, 4, 8, 12])
@pytest.mark.parametrize("step", [128, 70, 3])
def test_accesses_are_aligned(dim, size, first, step):
    """Every address of a vector is a multiple of its size, and a head fits into a CTA."""
    vec = cascade._vec("merge_state", dim, size, 4096 + first * size, step)
    assert 1 <= vec <= 16 // size and dim % vec == 0 and first % vec == 0 and step % vec == 0
    assert cascade._threads(dim, vec) >= dim // vec and cascade._threads(dim, vec) <= 1024
