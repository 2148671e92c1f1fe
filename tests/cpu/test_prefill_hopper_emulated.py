"""The Hopper prefill kernel run on the CPU (emulate.py): the reference's results, and only the arrays are touched.

A request's first tile may begin before its first row, and its last one end behind the last. What the kernel indexes
lies between pages that cannot be touched, against the one behind it or the one before it: an index that is out of range
ends the process.
"""

from __future__ import annotations

import ctypes
import mmap
import os

import emulate
import numpy as np
import pytest

from fi_cupy import prefill_batch, prefill_hopper, prefill_kernel
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.jit import define_variant, ops
from fi_cupy.prefill import BatchPrefillWithPagedKVCacheWrapper as Paged
from fi_cupy.prefill import BatchPrefillWithRaggedKVCacheWrapper as Ragged
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

pytestmark = pytest.mark.skipif(not emulate.available(), reason="emulating kernels needs g++ on x86-64")
#: Every kernel is compiled once, which takes some seconds.
EXTRA = pytest.mark.skipif(os.environ.get("FI_CUPY_EMULATE") != "all", reason="FI_CUPY_EMULATE=all runs it")
#: (query tokens, keys): a prompt, a chunk of one, fully masked rows, no keys, no queries, single tokens.
LENS = [(150, 150), (40, 203), (5, 3), (3, 0), (0, 40), (1, 129), (1, 1)]
SHORT = [(1, 9), (70, 90), (130, 170)]
CAUSAL, TALL = {"causal": True}, {"disable_split_kv": True}  # tiles of 192 rows whatever the batch


class Guarded:
    """A copy of an array at the end, or at the start, of memory between two pages that cannot be touched."""

    _protect = ctypes.CDLL(None).mprotect
    _protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

    def __init__(self, at_end=True):
        self.at_end = at_end

    def __call__(self, x):
        page, x = mmap.PAGESIZE, np.ascontiguousarray(x)
        size = -(-max(x.nbytes, 1) // page) * page
        memory = np.frombuffer(mmap.mmap(-1, size + 2 * page), np.uint8)  # which keeps it
        start = page + (size - x.nbytes if self.at_end else 0)
        memory[page : page + size] = 0xFF
        made = memory[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
        made[...] = x
        for at in (0, page + size):
            assert self._protect(memory.ctypes.data + at, page, 0) == 0
        return made.view(emulate.Device)


class PlanBuffer:
    """A plan buffer of no more than what was asked for."""

    def __init__(self, device, nbytes, counters=0):
        self.frozen = False

    ptr = property(lambda self: self.words.ctypes.data)
    counters_ptr = property(lambda self: self.counters.ctypes.data)

    def reserve(self, nbytes, counters=0):
        self.words, self.counters = (Guarded()(np.zeros(n, np.uint32)) for n in (nbytes // 4, counters))

    def stage(self, words):
        return np.zeros(words, np.int32)

    def upload(self, staged, stream):
        self.words[...] = staged.view(np.uint32)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """The wrappers on an emulated H100."""
    monkeypatch.setattr(prefill_batch, "device_info", lambda index: emulate.HOPPER)
    monkeypatch.setattr(prefill_batch, "PlanBuffer", PlanBuffer)
    monkeypatch.setattr(prefill_hopper, "has_driver_binding", lambda: True)
    monkeypatch.setattr(prefill_hopper, "_encode", emulate.tensor_map)
    prefill_hopper.map_values.cache_clear()
    with emulate.emulated(emulate.HOPPER, prefill_kernel):
        yield
    prefill_hopper.map_values.cache_clear()


def offsets(lens):
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)


def factors(rng, n):
    return (np.where(np.arange(n) % 2, -1, 1) * rng.uniform(0.5, 1.5, n)).astype(np.float32)


class Batch:
    """Random requests, contiguous and in pages, with NaN wherever a page holds no key."""

    def __init__(self, rng, lens, heads, dim=64, dtype="bfloat16", page_size=16):
        self.heads, self.dim, self.dtype, self.page_size = heads, dim, dtype, page_size
        self.qo, self.kv = (offsets([x[i] for x in lens]) for i in (0, 1))
        self.q = normal(rng, (int(self.qo[-1]), heads[0], dim), dtype)
        keys = np.diff(self.kv)
        indptr = offsets(-(-keys // page_size))
        indices = rng.permutation(int(indptr[-1])).astype(np.int32)
        self.table = indptr, indices, np.where(keys > 0, (keys - 1) % page_size + 1, 1).astype(np.int32)
        self.rows = [normal(rng, (int(self.kv[-1]), heads[1], dim), dtype) for _ in "kv"]
        self.cache = [np.full((len(indices), page_size, *x.shape[1:]), np.nan, x.dtype) for x in self.rows]
        for x, cache in zip(self.rows, self.cache, strict=True):
            for b, n in enumerate(keys):
                j = np.arange(n)
                cache[indices[indptr[b] + j // page_size], j % page_size] = x[self.kv[b] : self.kv[b + 1]]

    def run(self, kind, place, plan, variant, args, options):
        """(out, lse, wrapper); on the CPU where `place` is None."""
        emulates, place = place is not None, place or (lambda x: x)
        sizes = (*self.heads, self.dim, *(() if kind is Ragged else (self.page_size,)))
        where = (self.qo, self.kv) if kind is Ragged else (self.qo, *self.table)
        types = {"q_data_type": self.dtype, "o_data_type": self.dtype if emulates else "float32"}

        def wrapper(nbytes):
            made = place(np.full(nbytes, 0xFF, np.uint8))
            return kind(made, backend="fa3" if emulates else "auto", variant=variant)

        needed = wrapper(256).workspace_size(*where, *sizes, **types, **plan)[0]
        made = wrapper(max(needed, 256))
        made.plan(*where, *sizes, **types, **plan)
        if emulates:
            assert made._planned.geometry.hopper
            options = {
                **options,
                "out": np.full((*self.q.shape[:2], self.dim), np.nan, to_dtype(self.dtype).np),
                "lse": np.full(self.q.shape[:2], np.nan, np.float32),
            }
        options = {name: place(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        args = [place(x) if isinstance(x, np.ndarray) else x for x in args]
        kv = [place(x) for x in (self.rows if kind is Ragged else self.cache)]
        kv = kv if kind is Ragged else [tuple(kv)]
        return *made.run(place(self.q), *kv, *args, return_lse=True, **options), made

    def check(self, kind, plan, *, sides=(True,), variant=None, args=(), **options):
        want, want_lse, _ = self.run(kind, None, plan, variant, args, options)
        seen = np.isfinite(want_lse)
        for at_end in sides:
            out, lse, made = self.run(kind, Guarded(at_end), plan, variant, args, options)
            assert_close(out, want, self.dtype, "product")
            assert (np.isneginf(lse) == ~seen).all()
            assert (np.abs(lse - want_lse)[seen] <= 2e-5 * np.maximum(np.abs(want_lse[seen]), 10)).all()
            assert not np.asarray(made._plan_buffer.counters).any()
        return made._planned


@pytest.mark.parametrize("heads", [(3, 1), (3, 3)])
def test_strides_of_one_head_and_of_0(rng, heads):
    """The stride of a single head means nothing, and expanded heads have none."""
    batch = Batch(rng, SHORT, heads)
    rows = batch.rows = [np.repeat(x[:, :1], heads[1], 1) for x in batch.rows]

    def place(x):
        made = Guarded()(x)
        if not any(x is y for y in rows):
            return made
        step = 0 if heads[1] > 1 else 6
        return np.ndarray(x.shape, x.dtype, made, 0, (made.strides[0], step, made.strides[2])).view(emulate.Device)

    want, want_lse, _ = batch.run(Ragged, None, CAUSAL, None, (), {})
    out, lse, _ = batch.run(Ragged, place, CAUSAL, None, (), {})
    assert_close(out, want, batch.dtype, "product")
    assert (np.abs(lse - want_lse) <= 2e-5 * np.maximum(np.abs(want_lse), 10)).all()


@pytest.mark.parametrize("kind", [Paged, Ragged])
@pytest.mark.parametrize("at_end", [True, False])
def test_factors_a_head(rng, kind, at_end):
    batch = Batch(rng, LENS, (6, 2))
    q, k, v = factors(rng, 6), factors(rng, 2), factors(rng, 2)
    sinks = normal(rng, (6,), "float32")
    planned = batch.check(kind, CAUSAL, sides=[at_end], q_scale=q, k_scale=k, v_scale=v, sinks=sinks)
    assert planned.work.num_items == 8


# Groups that divide a tile, and two that do not, whose packed rows are gathered.
@pytest.mark.parametrize(
    ("kind", "heads", "plan"),
    [
        (Paged, (2, 1), {**CAUSAL, **TALL}),
        (Ragged, (3, 1), {"window_left": 1 << 40}),
        (Paged, (5, 1), {**CAUSAL, **TALL}),
        pytest.param(Ragged, (7, 1), {**CAUSAL, "window_left": 40}, marks=EXTRA),
    ],
)
def test_groups(rng, kind, heads, plan):
    batch = Batch(rng, SHORT, heads, page_size=8)
    sinks, scale = normal(rng, heads[:1], "float32"), factors(rng, heads[0])
    batch.check(kind, plan, sides=(True, False), q_scale=scale, sinks=sinks)


ALIBI, CAP = {"pos_encoding_mode": "ALIBI"}, {"logits_soft_cap": 5.0}


@pytest.mark.parametrize("plan", [{**ALIBI, **CAP}, pytest.param(ALIBI, marks=EXTRA), pytest.param(CAP, marks=EXTRA)])
def test_logits(rng, plan):
    Batch(rng, SHORT, (3, 1)).check(Paged, {**CAUSAL, **plan})


@pytest.mark.parametrize("heads", [(6, 2), (5, 1)])
def test_split_keys(rng, heads):
    """Partial results, of rows before the request, too, in a workspace of just their size."""
    batch = Batch(rng, [(70, 560), (5, 150)], heads)
    planned = batch.check(Paged, {**CAUSAL, "fixed_split_size": 8}, q_scale=factors(rng, heads[0]))
    assert planned.work.num_split > 1


@EXTRA
@pytest.mark.parametrize("heads", [(3, 1), (5, 1)])
def test_head_dim_128(rng, heads):
    Batch(rng, SHORT, heads, 128, "float16").check(Ragged, CAUSAL, k_scale=factors(rng, 1))


VARIANTS = {
    "shifted": define_variant("shifted", score_fn=lambda s, c: s + c.bias[c.qo_idx, c.qo_head], tensors=["bias"]),
    "any": define_variant(
        "any", score_fn=lambda s, c: s * ops.tanh(s + c.bias[c.qo_idx, c.qo_head]), tensors=["bias"],
        mask_fn=lambda c: c.bias[c.qo_idx, c.qo_head] * c.kv_idx < 60.0,
        post_process_fn=lambda out, c: out + c.bias[c.qo_idx, c.qo_head],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["any", pytest.param("shifted", marks=EXTRA)])
def test_variant(rng, name):
    bias = rng.uniform(0.5, 1.5, (130, 3)).astype(np.float32)
    batch = Batch(rng, SHORT, (3, 1))
    batch.check(Ragged, CAUSAL, sides=(True, False), variant=VARIANTS[name], args=[bias])
