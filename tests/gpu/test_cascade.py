"""The merging kernels against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import cascade
from fi_cupy.reference import cascade as reference
from fi_cupy.testing.generators import new_stream, normal, on_gpu, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
DTYPES = ["bfloat16", "float16", "float32"]
SHAPES = [
    (1, 1, 64),
    (5, 32, 128),
    (3, 9, 64),
    (7, 2, 80),
    (2, 16, 512),
    (3, 5, 36),
    (2, 3, 7),
    (0, 4, 64),
    (70, 8, 96),
]


def lse(rng, shape):
    """Base-2 log-sum-exp, a third of them -inf."""
    s = (rng.standard_normal(shape) * 8).astype(np.float32)
    s[rng.random(shape) < 0.33] = -np.inf
    return s


def with_nan(v, s):
    """States that saw no key hold NaN, which must not leak."""
    v[np.isneginf(s)] = np.nan
    return v


def check(got, want, dtype, what):
    assert_close(to_float64(got[0]), want[0], dtype, what=f"v {what}")
    assert_close(to_float64(got[1]), want[1], "float32", what=f"s {what}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_trap_14_merge_state(rng, dtype):
    for shape in SHAPES:
        sa, sb = lse(rng, shape[:2]), lse(rng, shape[:2])
        va, vb = with_nan(normal(rng, shape, dtype), sa), with_nan(normal(rng, shape, dtype), sb)
        wide = [x.astype(np.float64) for x in (va, sa, vb, sb)]
        want = reference.merge_state(*wide)
        check(cascade.merge_state(*(on_gpu(x) for x in (va, sa, vb, sb))), want, dtype, shape)

        v, s = on_gpu(va), on_gpu(sa)
        assert cascade.merge_state_in_place(v, s, on_gpu(vb), on_gpu(sb)) is None
        check((v, s), want, dtype, shape)

        clean = normal(rng, shape, dtype)
        for kind in (bool, np.uint8):
            mask = rng.integers(0, 2, shape[0]).astype(kind)
            v, s = on_gpu(clean), on_gpu(sa)
            cascade.merge_state_in_place(v, s, on_gpu(vb), on_gpu(sb), on_gpu(mask))
            check((v, s), reference.merge_state_in_place(clean.astype(np.float64), *wide[1:], mask), dtype, shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("states", [0, 1, 2, 7, 8, 9, 30])
def test_trap_14_merge_states(rng, dtype, states):
    for n, heads, dim in SHAPES:
        s = lse(rng, (n, states, heads))
        v = with_nan(normal(rng, (n, states, heads, dim), dtype), s)
        want = reference.merge_states(v.astype(np.float64), s.astype(np.float64))
        check(cascade.merge_states(on_gpu(v), on_gpu(s)), want, dtype, (n, states, heads, dim))


@pytest.mark.older_archs
def test_all_empty_gives_zero_and_minus_infinity(rng):
    v, s = np.full((3, 5, 2, 64), np.nan, np.float16), np.full((3, 5, 2), -np.inf, np.float32)
    merged, total = cascade.merge_states(on_gpu(v), on_gpu(s))
    assert (to_float64(merged) == 0).all() and np.isneginf(to_float64(total)).all()
    merged, total = cascade.merge_state(*(on_gpu(x) for x in (v[:, 0], s[:, 0], v[:, 1], s[:, 1])))
    assert (to_float64(merged) == 0).all() and np.isneginf(to_float64(total)).all()


@pytest.mark.older_archs
def test_strides_of_rows_states_and_heads(rng):
    v, s = normal(rng, (6, 8, 5, 70)), lse(rng, (5, 8, 6))
    gv, gs = on_gpu(v)[::2, 1::3, 1:, 3:67], on_gpu(s).transpose(2, 1, 0)[::2, 1::3, 1:]
    hv, hs = v[::2, 1::3, 1:, 3:67].astype(np.float64), s.transpose(2, 1, 0)[::2, 1::3, 1:].astype(np.float64)
    check(cascade.merge_states(gv, gs), reference.merge_states(hv, hs), "bfloat16", "strided")
    want = reference.merge_state(hv[:, 0], hs[:, 0], hv[:, 1], hs[:, 1])
    check(cascade.merge_state(gv[:, 0], gs[:, 0], gv[:, 1], gs[:, 1]), want, "bfloat16", "strided pair")
    cascade.merge_state_in_place(gv[:, 0], gs[:, 0], gv[:, 1], gs[:, 1])
    check((gv[:, 0], gs[:, 0]), want, "bfloat16", "strided in place")


def test_same_input_same_bits(rng):
    v, s = on_gpu(normal(rng, (64, 9, 8, 128))), on_gpu(lse(rng, (64, 9, 8)))
    first, second = cascade.merge_states(v, s), cascade.merge_states(v, s)
    assert (first[0].view("uint16") == second[0].view("uint16")).all()
    assert (first[1].view("uint32") == second[1].view("uint32")).all()


def test_graph_capture(rng):
    v, s = on_gpu(normal(rng, (4, 2, 64))), on_gpu(lse(rng, (4, 2)))
    other, s_other = on_gpu(normal(rng, (4, 2, 64))), on_gpu(np.zeros((4, 2), np.float32))
    wide = [to_float64(x) for x in (v, s)]
    cascade.merge_state_in_place(v.copy(), s.copy(), other, s_other)  # compiled and loaded before the capture
    cupy.cuda.get_current_stream().synchronize()
    stream = new_stream()
    with stream:
        stream.begin_capture()
        cascade.merge_state_in_place(v, s, other, s_other)
        graph = stream.end_capture()
        s_other[...] = 1.5
        graph.launch()
        stream.synchronize()
    check((v, s), reference.merge_state(*wide, to_float64(other), to_float64(s_other)), "bfloat16", "graph")
