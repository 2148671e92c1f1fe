"""Every operator and wrapper on a GPU made of the host's memory (fake_gpu.py): results of the CPU's reference."""

from __future__ import annotations

import inspect
import os

import emulate
import ml_dtypes
import numpy as np
import pytest
from fake_gpu import fake_gpu, memory, on_gpu
from interop_cases import CASES, WRAPPER_KEYS, Case, copied, received, wrapper_cases

import fi_cupy
from fi_cupy.interop.table import OPERATORS

EXTRA = pytest.mark.skipif(os.environ.get("FI_CUPY_EMULATE") != "all", reason="FI_CUPY_EMULATE=all runs it")
pytestmark = pytest.mark.skipif(not emulate.available(), reason="emulating kernels needs g++ on x86-64")


def flat(x):
    if isinstance(x, (tuple, list)):
        return [part for y in x for part in flat(y)]
    return [np.asarray(x)] if isinstance(x, np.ndarray) else []


def check(got, want, half=0.01):
    """Sums in another order, rounded once: two or three units of the last place of the largest element."""
    got, want = flat(got), flat(want)
    assert len(got) == len(want) > 0
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        if b.dtype.kind in "iub":
            assert (a == b).all()
            continue
        a, b, kind = a.astype(np.float64), b.astype(np.float64), b.dtype
        assert (np.isnan(a) == np.isnan(b)).all() and (np.isinf(a) == np.isinf(b)).all()
        a, b = (x[np.isfinite(b)] for x in (a, b))
        unit = {1: 0.125, 2: half}.get(kind.itemsize, 1e-4)
        assert (np.abs(a - b) <= unit * max(np.abs(b).max(initial=0), 1e-3)).all()


def arguments(made):
    return {name: copied(x) for name, x in made.items()}


#: The matrix products and attention of decoding; the others take minutes to compile.
ALWAYS = {("mm_bf16", ""), ("BatchDecodeWithPagedKVCacheWrapper", "")}


def cases(keys):
    return [pytest.param(*key, marks=() if key in ALWAYS else EXTRA) for key in keys]


@pytest.mark.parametrize(("name", "label"), cases(CASES))
def test_operator(rng, name, label):
    row, made = OPERATORS[name], CASES[name, label](Case(rng, "bfloat16"))
    function = row.function
    needed = {x.name for x in row.into if inspect.signature(function).parameters[x.name].default is inspect._empty}
    if needed - made.keys():
        made = received(row, made, ml_dtypes.float8_e4m3fn) | made
    changed = [x for x in (*row.mutated, *(x.name for x in row.into)) if x in made]
    on_host = arguments(made)
    want = function(**on_host)
    with fake_gpu():
        there = {x: on_gpu(y) for x, y in arguments(made).items()}
        got = function(**there)
    half = 0.05 if (name, label) == ("cutlass_fused_moe", "fp8") else 0.01  # between its products all is fp8
    check([got, [there[x] for x in changed]], [want, [on_host[x] for x in changed]], half)


@pytest.mark.parametrize(("name", "label"), cases(WRAPPER_KEYS))
def test_wrapper(rng, name, label):
    """Two runs: the second one finds the counters as the first has left them."""
    case, kind = wrapper_cases("bfloat16")[name, label], getattr(fi_cupy, name, None) or getattr(fi_cupy.sparse, name)
    run = case.run(Case(rng, "bfloat16"))
    plan = dict(case.plan)
    args = plan.pop("args")
    own = name == "BatchAttention"  # makes its workspace itself
    wrapper = kind(device="cpu") if own else kind(*case.before, np.zeros(1 << 22, np.uint8), **case.options)
    wrapper.plan(*args, **plan)
    want = wrapper.run(**arguments(run))
    with fake_gpu():
        space = memory(1 << 25, 0xFF).view(emulate.Device)
        wrapper = kind() if own else kind(*case.before, space, **case.options)
        wrapper.plan(*args, **plan)
        for _ in range(2):
            check(wrapper.run(**{x: on_gpu(y) for x, y in arguments(run).items()}), want)
