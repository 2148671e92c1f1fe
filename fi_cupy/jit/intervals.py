"""Which keys a traced mask can show at all: interval arithmetic over its expression, for many tiles at once.

Every value is a pair of arrays (lowest, highest possible). The result is never too small: what depends on a user's
array, or on an operation not listed here, may be anything. A mask over indices alone, such as a window, so loses its
dead tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fi_cupy.jit.trace import BOOL, Node

Array = np.ndarray[Any, np.dtype[Any]]
Interval = tuple[Any, Any]
_ANYTHING: Interval = (-np.inf, np.inf)
_MAYBE: Interval = (0.0, 1.0)


def bounds(root: Node, known: Mapping[str, Interval]) -> Interval:
    """Lowest and highest value of `root`; `known` has the intervals of indices and scalars by name."""
    found: dict[int, Interval] = {}

    def of(node: Node) -> Interval:
        result = found.get(id(node))
        if result is None:
            with np.errstate(invalid="ignore", over="ignore"):
                low, high = _bounds(node, known, of)
            # inf - inf and 0 * inf say nothing.
            bad = np.isnan(low) | np.isnan(high)
            unknown = _MAYBE if node.kind == BOOL else _ANYTHING
            result = found[id(node)] = np.where(bad, unknown[0], low), np.where(bad, unknown[1], high)
        return result

    return of(root)


def _bounds(node: Node, known: Mapping[str, Interval], of: Any) -> Interval:
    op = node.op
    if op == "const":
        return float(node.value), float(node.value)
    if op in ("index", "scalar"):
        return known.get(node.value, _ANYTHING)
    args = [of(a) for a in node.args]
    if op == "cast" and node.kind != BOOL:
        if node.kind == "int" and node.args[0].kind == "float":
            return np.trunc(args[0][0]), np.trunc(args[0][1])
        return args[0]
    if op in _ARITHMETIC:
        return _ARITHMETIC[op](*args)
    if op in ("floordiv", "mod") and node.args[1].op == "const" and node.args[1].value > 0:
        d = float(node.args[1].value)
        if op == "floordiv":
            return np.floor(args[0][0] / d), np.floor(args[0][1] / d)
        same = np.floor(args[0][0] / d) == np.floor(args[0][1] / d)
        return np.where(same, np.mod(args[0][0], d), 0.0), np.where(same, np.mod(args[0][1], d), d)
    if op == "where":
        (never, always), (a_low, a_high), (b_low, b_high) = args
        low = np.where(never > 0, a_low, np.where(always < 1, b_low, np.minimum(a_low, b_low)))
        return low, np.where(never > 0, a_high, np.where(always < 1, b_high, np.maximum(a_high, b_high)))
    if node.kind == BOOL and op in ("and", "or", "invert"):
        return _LOGIC[op](*args)
    return _MAYBE if node.kind == BOOL else _ANYTHING


def _product(a: Interval, b: Interval) -> Interval:
    corners = [x * y for x in a for y in b]
    return np.minimum.reduce(np.broadcast_arrays(*corners)), np.maximum.reduce(np.broadcast_arrays(*corners))


def _absolute(a: Interval) -> Interval:
    low, high = a
    return np.maximum(np.maximum(low, -high), 0.0), np.maximum(np.abs(low), np.abs(high))


def _less(a: Interval, b: Interval) -> Interval:
    return (a[1] < b[0]) * 1.0, (a[0] < b[1]) * 1.0


def _less_equal(a: Interval, b: Interval) -> Interval:
    return (a[1] <= b[0]) * 1.0, (a[0] <= b[1]) * 1.0


def _equal(a: Interval, b: Interval) -> Interval:
    apart = (a[1] < b[0]) | (b[1] < a[0])
    same = (a[0] == a[1]) & (b[0] == b[1]) & (a[0] == b[0])
    return same * 1.0, ~apart * 1.0


def _not(a: Interval) -> Interval:
    return 1.0 - a[1], 1.0 - a[0]


_ARITHMETIC: dict[str, Any] = {
    "add": lambda a, b: (a[0] + b[0], a[1] + b[1]),
    "sub": lambda a, b: (a[0] - b[1], a[1] - b[0]),
    "mul": _product,
    "neg": lambda a: (-a[1], -a[0]),
    "abs": _absolute,
    "minimum": lambda a, b: (np.minimum(a[0], b[0]), np.minimum(a[1], b[1])),
    "maximum": lambda a, b: (np.maximum(a[0], b[0]), np.maximum(a[1], b[1])),
    "lt": _less,
    "le": _less_equal,
    "gt": lambda a, b: _less(b, a),
    "ge": lambda a, b: _less_equal(b, a),
    "eq": _equal,
    "ne": lambda a, b: _not(_equal(a, b)),
}
_LOGIC: dict[str, Any] = {
    "and": lambda a, b: (np.minimum(a[0], b[0]), np.minimum(a[1], b[1])),
    "or": lambda a, b: (np.maximum(a[0], b[0]), np.maximum(a[1], b[1])),
    "invert": _not,
}

#: Pieces that a tile's range of keys is cut into, and pieces of all tiles together that a plan looks at.
_PIECES, _MOST = 64, 1 << 17


def trim(
    root: Node, scalars: Mapping[str, float], begin: Array, end: Array, tile_kv: int, qo_first: Array, qo_last: Array,
    request: Array, qo_len: Array, kv_len: Array,
) -> tuple[Array, Array]:  # fmt: skip
    """Narrow the keys ``[begin, end)`` of every tile to the pieces that the mask `root` may show.

    Parameters
    ----------
    root : Node
        A traced mask.
    scalars : name -> value
        The variant's numbers, as far as they are known.
    begin, end : int [tiles]
        Keys; begin a multiple of `tile_kv`, and it stays one. (0, 0) where nothing is seen.
    qo_first, qo_last : int [tiles]
        Query tokens of each tile, both included.
    request, qo_len, kv_len : int [tiles]
        The tile's request, and its lengths.
    """
    tiles = len(begin)
    longest = int((end - begin).max(initial=0))
    if longest <= tile_kv or tiles * _PIECES > _MOST:
        return begin, end
    width = -(-longest // (_PIECES * tile_kv)) * tile_kv
    first = begin[:, None] + np.arange(-(-longest // width)) * width
    last = np.minimum(first + width, end[:, None]) - 1
    known: dict[str, Interval] = {name: (float(x), float(x)) for name, x in scalars.items()}
    for name, value in (("batch", request), ("qo_len", qo_len), ("kv_len", kv_len)):
        known[name] = (value[:, None].astype(float),) * 2
    known["qo_idx"] = qo_first[:, None].astype(float), qo_last[:, None].astype(float)
    known["kv_idx"] = first.astype(float), last.astype(float)
    known["qo_head"] = known["kv_head"] = (0.0, np.inf)
    _, possible = bounds(root, known)
    seen = (first <= last) & (np.broadcast_to(possible, first.shape) > 0)
    some = seen.any(axis=1)
    rows = np.arange(tiles)
    new_begin = first[rows, seen.argmax(axis=1)]
    new_end = np.minimum(first[rows, seen.shape[1] - 1 - seen[:, ::-1].argmax(axis=1)] + width, end)
    return np.where(some, new_begin, 0), np.where(some, new_end, 0)
