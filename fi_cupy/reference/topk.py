"""The k largest elements of rows, in plain NumPy, with ties by rule."""

from __future__ import annotations

import numpy as np

from fi_cupy.reference._common import Array, upcast


def ranked(row: Array, k: int, large_ties: bool) -> Array:
    """Indices of the k largest elements, largest first; NaN counts as the largest value, and -0 equals 0.

    Of equal elements those with the smallest indices come first, with `large_ties` those with the largest.
    """
    x = upcast(row, np.float32)
    index = np.arange(x.size)
    nan = np.isnan(x)
    order = np.lexsort((-index if large_ties else index, -np.where(nan, np.float32(0), x), ~nan))
    return order[:k]


def top_k(x: Array, k: int, large_ties: bool) -> tuple[Array, Array]:
    """(values, int64 indices) of every row's k largest, largest first.

    Source: flashinfer.topk.top_k.
    """
    indices = np.array([ranked(row, k, large_ties) for row in x], np.int64).reshape(len(x), k)
    return np.take_along_axis(x, indices, 1), indices


def window_indices(x: Array, lengths: Array, starts: Array | None, k: int, large_ties: bool) -> Array:
    """Indices of the k largest of ``x[i, starts[i] :][: lengths[i]]``, from its start, int32, -1 behind the last.

    A window of at most k elements is given in index order.
    """
    out = np.full((len(x), k), -1, np.int32)
    for i, row in enumerate(x):
        first = 0 if starts is None else min(max(int(starts[i]), 0), row.size)
        window = row[first:][: max(int(lengths[i]), 0)]
        chosen = np.arange(window.size) if window.size <= k else ranked(window, k, large_ties)
        out[i, : chosen.size] = chosen
    return out
