"""Interval arithmetic over masks: bounds hold for every element, and trimmed key ranges lose no visible key."""

from __future__ import annotations

from functools import partial

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy.jit import ops
from fi_cupy.jit.intervals import bounds, trim
from fi_cupy.jit.trace import BOOL, FLOAT, INT, trace
from fi_cupy.plan.prefill import plan_prefill

INDICES = ("batch", "qo_idx", "kv_idx", "qo_head", "kv_head", "qo_len", "kv_len")


def _mask(function):
    return trace(
        function, "mask", argument=None, indices=INDICES, tensors={"ids": INT}, scalars={"w": INT, "x": FLOAT},
        result=BOOL,
    )  # fmt: skip


class _Context:
    def __init__(self, **values):
        self.__dict__.update(values)


_ints = st.deferred(
    lambda: (
        st.sampled_from([("index", n) for n in INDICES])
        | st.just(("index", "w"))
        | st.integers(-20, 20).map(lambda v: ("const", v))
        | st.tuples(st.sampled_from(["add", "sub", "mul", "minimum", "maximum"]), _ints, _ints)
        | st.tuples(st.sampled_from(["floordiv", "mod"]), _ints, st.integers(1, 30).map(lambda v: ("const", v)))
        | st.tuples(st.just("where"), _bools, _ints, _ints)
        | st.tuples(st.sampled_from(["abs", "neg"]), _ints)
        | st.tuples(st.just("load"), _ints)
    )
)
_bools = st.deferred(
    lambda: (
        st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), _ints, _ints)
        | st.tuples(st.sampled_from(["and", "or", "xor"]), _bools, _bools)
        | st.tuples(st.just("not"), _bools)
    )
)
_FUNCTIONS = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "minimum": ops.minimum,
    "maximum": ops.maximum, "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b, "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
    "where": ops.where, "abs": ops.abs, "neg": lambda a: -a, "not": ops.logical_not,
}  # fmt: skip


def _evaluate(tree, ctx):
    head, *rest = tree
    if head == "index":
        return getattr(ctx, rest[0])
    if head == "const":
        return rest[0]
    values = [_evaluate(t, ctx) for t in rest]
    return ctx.ids[values[0]] if head == "load" else _FUNCTIONS[head](*values)


class _Ids:
    def __getitem__(self, index):
        return np.asarray(index) * 7 % 5


def _context(batch, qo, kv, qo_len, kv_len, w):
    return _Context(
        batch=batch, qo_idx=qo, kv_idx=kv, qo_head=np.int64(3), kv_head=np.int64(1), qo_len=qo_len, kv_len=kv_len, w=w,
        x=0.5, ids=_Ids(),
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(_bools, st.integers(0, 40), st.integers(0, 40), st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_bounds_hold(tree, qo, kv, rows, keys, w):
    root = _mask(lambda c: ops.bool_(_evaluate(tree, c)))
    known = {
        "batch": (2, 2), "qo_idx": (qo, qo + rows - 1), "kv_idx": (kv, kv + keys - 1), "qo_head": (0, 7),
        "kv_head": (0, 1), "qo_len": (60, 60), "kv_len": (70, 70), "w": (w, w),
    }  # fmt: skip
    low, high = bounds(root, known)
    ctx = _context(2, np.arange(qo, qo + rows)[:, None], np.arange(kv, kv + keys)[None, :], 60, 70, w)
    values = np.broadcast_to(np.asarray(_evaluate(tree, ctx), bool), (rows, keys))
    assert low <= values.min() and values.max() <= high


WINDOW = _mask(
    lambda c: (c.kv_idx <= c.kv_len - c.qo_len + c.qo_idx) & (c.kv_len - c.qo_len + c.qo_idx - c.kv_idx < 70)
)
SINK = _mask(lambda c: (c.kv_idx < 4) | (c.qo_idx - c.kv_idx < c.w))
BLOCKS = _mask(lambda c: abs(c.qo_idx // 128 - c.kv_idx // 128) <= 1)


def _ranges(root, scalars, qo_len, kv_len, tile_q=64, tile_kv=32):
    q_tile = np.arange(-(-qo_len // tile_q))
    first, last = q_tile * tile_q, np.minimum((q_tile + 1) * tile_q, qo_len) - 1
    ones = np.ones_like(q_tile)
    return trim(
        root, scalars, 0 * ones, kv_len * ones, tile_kv, first, last, 0 * ones, qo_len * ones, kv_len * ones
    )  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900))
def test_no_visible_key_is_lost(qo_len, kv_len):
    qo, kv = np.arange(qo_len)[:, None], np.arange(kv_len)[None, :]
    own = kv_len - qo_len + qo
    seen = {
        "window": (WINDOW, (kv <= own) & (own - kv < 70)),
        "sink": (SINK, (kv < 4) | (qo - kv < 100)),
        "blocks": (BLOCKS, np.abs(qo // 128 - kv // 128) <= 1),
    }
    for root, mask in seen.values():
        begin, end = _ranges(root, {"w": 100}, qo_len, kv_len)
        for t, (a, b) in enumerate(zip(begin, end, strict=True)):
            rows = mask[64 * t : 64 * t + 64]
            assert a % 32 == 0 and not rows[:, :a].any() and not rows[:, b:].any()


def test_dead_tiles_are_dropped():
    begin, end = _ranges(WINDOW, {}, 4096, 4096)
    assert (end - begin <= 64 + 70 + 3 * 64).all() and begin[-1] > 3800
    begin, end = _ranges(BLOCKS, {}, 4096, 4096)
    assert (end - begin <= 4 * 128).all()
    unknown = _ranges(SINK, {}, 512, 512)  # w is not known: everything stays
    assert (unknown[0] == 0).all() and (unknown[1] == 512).all()
    nothing = _ranges(_mask(lambda c: c.kv_idx > c.kv_len), {}, 256, 512)
    assert (nothing[0] == 0).all() and (nothing[1] == 0).all()


def test_the_schedule_uses_it():
    options = {"group": 1, "num_kv_heads": 8, "tile_q": 64, "tile_kv": 32, "slots": 264, "disable_split": True}
    lens = np.array([0, 2048]), np.array([2048]), np.array([0])
    plain = plan_prefill(*lens, **options)
    window = plan_prefill(*lens, **options, narrow=partial(trim, WINDOW, {}))
    work = [(p.items[:, 6] - p.items[:, 5]).sum() for p in (plain, window)]
    assert work[1] < work[0] / 8 and len(plain.items) == len(window.items)
