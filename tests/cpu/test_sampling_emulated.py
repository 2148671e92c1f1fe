"""The sampling and top-k kernels run on the CPU, results equal the reference's.

The kernels' own source, with fibres for threads (emulate.py): barriers, clusters and shared memory are real, in random
order. What this cannot show is the hardware's arithmetic; tests/gpu does. Two launch shapes by default; all of them,
and more sizes, with FI_CUPY_EMULATE=all in the environment.
"""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import emulate
import numpy as np
import pytest

from fi_cupy import sampling, sampling_launch, speculative, topk
from fi_cupy.reference import sampling_filters as sf
from fi_cupy.sampling_kernels import LaunchShape
from fi_cupy.testing.generators import ROW_KINDS, normal, odd_rows

pytestmark = pytest.mark.skipif(not emulate.available(), reason="emulating kernels needs g++ on x86-64")
#: FI_CUPY_EMULATE=all: every launch shape and size; some minutes, most of them for compiling.
EVERYTHING = os.environ.get("FI_CUPY_EMULATE") == "all"
#: CTAs a row, their threads, and the dtype that is tried.
SHAPES = {"portable": (1, 512, "bfloat16"), "eight": (8, 256, "float32")}
if EVERYTHING:
    SHAPES |= {
        "alone": (1, 256, "float16"), "two": (2, 512, "float32"), "wide": (2, 1024, "float32"),
        "sixteen": (16, 256, "bfloat16"),
    }  # fmt: skip
VOCABS = [1, 130, 1025, 9001, 40000] if EVERYTHING else [9001]
DTYPE = {name: shape[2] for name, shape in SHAPES.items()}


@pytest.fixture(params=list(SHAPES))
def shape(request):
    """Every launch in one shape, on an emulated device."""
    cluster, threads, _ = SHAPES[request.param]

    def chosen(kind, rows, vocab, device):
        holds = cluster > 1 and kind in ("softmax", "renorm")
        return LaunchShape(threads, max(cluster, 8) if holds else cluster, 1, holds)

    with emulate.emulated(emulate.HOPPER, sampling_launch, speculative, topk), contextlib.ExitStack() as stack:
        for module in (sampling_launch, speculative, topk):
            stack.enter_context(mock.patch.object(module, "launch_shape", chosen))
        yield request.param


def rows_of(rng, rows, vocab, dtype, logits):
    return odd_rows(
        rng, rows, vocab, dtype, logits, tuple(map(str, rng.permutation([*ROW_KINDS, "nan", "tied", "zeros"])))
    )


def on_device(value):
    return emulate.device(value) if isinstance(value, np.ndarray) else value


def check(function, x, **parameters):
    emulate.EmulatedKernel.order += 1
    got = function(on_device(x), **{k: on_device(v) for k, v in parameters.items()}, return_valid=True)
    want = function(x, **parameters, return_valid=True)
    for g, w in zip(got, want, strict=True):
        assert (np.asarray(g) == w).all(), (parameters, np.flatnonzero(np.asarray(g) != w))


@pytest.mark.parametrize("vocab", VOCABS)
def test_tokens(rng, shape, vocab):
    rows, dtype = 6, DTYPE[shape]
    logits, probs = rows_of(rng, rows, vocab, dtype, True), rows_of(rng, rows, vocab, dtype, False)
    at = {"seed": int(rng.integers(1 << 62)), "offset": int(rng.integers(1 << 40))}
    check(sampling.sampling_from_logits, logits, **at)
    check(sampling.sampling_from_probs, probs, **at)
    check(sampling.min_p_sampling_from_probs, probs, min_p=0.05, **at)
    ks = rng.choice([1, 2, 5, 20, 40, 50, 1500, 1 << 30], rows).astype(rng.choice([np.int32, np.int64]))
    ps = rng.choice([0.0, 0.1, 0.5, 0.9, 0.999, 1.0], rows).astype(rng.choice([np.float32, np.float64]))
    check(sampling.top_k_sampling_from_probs, probs, top_k=ks, **at)
    check(sampling.top_p_sampling_from_probs, probs, top_p=ps, **at)
    for order in ("top_k_first", "joint"):
        both = {"top_k": ks, "top_p": ps, "filter_apply_order": order, **at}
        check(sampling.top_k_top_p_sampling_from_logits, logits, **both)
        check(sampling.top_k_top_p_sampling_from_probs, probs, **both)


@pytest.mark.parametrize("vocab", VOCABS)
def test_rows(rng, shape, vocab):
    rows, dtype = 6, DTYPE[shape]
    tolerance = {"float32": 1e-6, "float16": 1e-3, "bfloat16": 1e-2}[dtype]
    logits, probs = rows_of(rng, rows, vocab, dtype, True), rows_of(rng, rows, vocab, dtype, False)
    ks = rng.choice([1, 3, 20, 40, 50, 1500, 1 << 30], rows).astype(np.int32)
    ps = rng.choice([0.1, 0.5, 0.9, 1.0], rows).astype(np.float32)
    for function, x, parameter in (
        (sampling.top_k_renorm_probs, probs, ks),
        (sampling.top_p_renorm_probs, probs, ps),
        (sampling.top_k_mask_logits, logits, ks),
        (sampling.softmax, logits, rng.choice([0.0, 0.5, 2.0], rows).astype(np.float32)),
    ):
        got = np.asarray(function(on_device(x), on_device(parameter))).astype(np.float64)
        want = function(x, parameter).astype(np.float64)
        assert ((got == 0) == (want == 0)).all()
        np.testing.assert_allclose(got, want, rtol=max(tolerance, 1e-5) if function is sampling.softmax else tolerance)


@pytest.mark.parametrize("logits", [True, False])
def test_every_filter_at_once(rng, shape, logits):
    """The kernels of pipelines: top-k, top-p, min-p and temperature, each of which may keep all of a row."""
    rows, name = 12, "logits" if logits else "probs"
    x = rows_of(rng, rows, 9001, DTYPE[shape], logits)
    ks = rng.choice([1, 5, 20, 50, 1500, 1 << 30], rows).astype(np.int32)
    ps, ms = (rng.choice(c, rows).astype(np.float32) for c in ([0.1, 0.5, 0.9, 1.0], [0.0, 0.0, 0.01, 0.1, 1.0]))
    more = {"temperature": rng.choice([0.0, 0.5, 1.3], rows).astype(np.float32)} if logits else {}
    rest = {"indices": None, "generator": None, "seed": 5, "offset": 2, "return_valid": True}
    for joint in (True, False):
        for given in ({"top_k": ks, "top_p": ps, "min_p": ms}, {"top_p": ps, "min_p": ms}, {"min_p": ms}):
            emulate.EmulatedKernel.order += 1
            given = {**given, **more}
            on = {k: on_device(v) for k, v in given.items()}
            got = sampling_launch.draw_tokens("pipe", name, on_device(x), joint=joint, **on, **rest)
            want = sampling_launch.draw_tokens("pipe", name, x, joint=joint, **given, **rest)
            for g, w in zip(got, want, strict=True):
                assert (np.asarray(g) == w).all(), (joint, list(given), np.flatnonzero(np.asarray(g) != w))
        if not logits:
            filters = (ks, ps, ms)
            got = sampling_launch.filtered_rows("pipe", name, on_device(x), *map(on_device, filters), joint)
            want = sampling_launch.filtered_rows("pipe", name, x, *filters, joint)
            assert ((np.asarray(got) == 0) == (want == 0)).all()


def test_renormalised_rows_of_any_scale(rng, shape):
    """Top-p's threshold is searched in the row's own unit; targets that nothing reaches keep all."""
    base = rng.integers(0, 9, (4, 3000)).astype(np.float32) * rng.random((4, 3000), np.float32)
    base[1] = base[1] > 4
    base[3] = 0
    for scale in (2.0**-149, 2.0**-100, 2.0**-12, 2.0**30, 2.0**90):
        probs = (base * np.float32(scale)).astype(np.float32)
        for p in (0.3, 0.9) if scale < 1 else (0.9,):
            got = np.asarray(sampling.top_p_renorm_probs(on_device(probs), p * scale * 5000 if scale < 1e-4 else p))
            want = sampling.top_p_renorm_probs(probs, p * scale * 5000 if scale < 1e-4 else p)
            assert ((got == 0) == (want == 0)).all()
            np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("vocab", VOCABS)
def test_top_k(rng, shape, vocab):
    x = rows_of(rng, 6, vocab, DTYPE[shape], True)
    x[4] = -np.inf
    for k in {1, min(20, vocab), min(50, vocab), min(700, vocab), min(5000, vocab)}:
        for tie_break in topk.TopKTieBreak:
            emulate.EmulatedKernel.order += 1
            want = topk.top_k(x, k, sorted=True, tie_break=tie_break)
            for is_sorted in (True, False):
                values, indices = topk.top_k(on_device(x), k, sorted=is_sorted, tie_break=tie_break)
                values, indices = np.asarray(values), np.asarray(indices)
                assert np.array_equal(values, np.take_along_axis(x, indices, 1), equal_nan=True)
                assert (np.sort(indices, 1) == np.sort(want[1], 1)).all()
                assert not is_sorted or (indices == want[1]).all()


def test_top_k_transforms(rng, shape):
    rows, width = 6, 9001
    x = rows_of(rng, rows, width, DTYPE[shape], True)
    table = rng.integers(0, 1000, (4, 2 * width)).astype(np.int32)
    per_row = {
        name: rng.integers(0, most, rows).astype(np.int32)
        for name, most in (("lengths", width + 5), ("row_starts", 300), ("lines", 4), ("offsets", 1000))
    }
    per_row["lengths"][0] = 0
    for k in (1, 64, 2048, 6000):
        for starts in (None, per_row["row_starts"]):
            args = (per_row["offsets"], per_row["lengths"], k)
            got = topk.top_k_ragged_transform(on_device(x), *map(on_device, args), row_starts=on_device(starts))
            want = topk.top_k_ragged_transform(x, *args, row_starts=starts)
            assert (np.sort(np.asarray(got), 1) == np.sort(want, 1)).all()
            args = (table, per_row["lengths"], k, per_row["lines"])
            raw, raw_want = np.empty((rows, k), np.int32), np.empty((rows, k), np.int32)
            got = topk.top_k_page_table_transform(
                on_device(x), *map(on_device, args), row_starts=on_device(starts), page_size=3,
                out_raw_indices=on_device(raw),
            )  # fmt: skip
            want = topk.top_k_page_table_transform(x, *args, row_starts=starts, page_size=3, out_raw_indices=raw_want)
            assert (np.sort(np.asarray(got), 1) == np.sort(want, 1)).all()
            assert (np.sort(raw, 1) == np.sort(raw_want, 1)).all()


def test_chain_speculative(rng, shape):
    batch, n, vocab, dtype = 6, 3, 3500, DTYPE[shape]
    kind = normal(rng, (1,), dtype).dtype
    target = sf.softmax(normal(rng, (batch * (n + 1), vocab), "float32", 2.0)).reshape(batch, n + 1, vocab)
    draft = target[:, :n] * rng.uniform(0.7, 1.3, (batch, n, vocab)).astype(np.float32)
    draft[::3] = target[::3, :n]
    args = draft.astype(kind), np.argmax(draft, -1).astype(np.int32), target.astype(kind)
    args[0][2, 0], args[2][2, 0], args[1][2, 0] = 0.001, 0, 3  # nothing to draw from: token 0
    args[1][1, 0] = vocab  # out of range: rejected
    args[0][4], args[1][4, 1] = args[2][4, :n], vocab  # a residual of nothing: drawn from the target
    for order in range(3):
        emulate.EmulatedKernel.order = order
        got = sampling.chain_speculative_sampling(*map(on_device, args), seed=5 + order, offset=8)
        want = sampling.chain_speculative_sampling(*args, seed=5 + order, offset=8)
        for g, w in zip(got, want, strict=True):
            assert (np.asarray(g) == w).all()
