"""Rows by number, and the position of each row's largest value."""

from __future__ import annotations

import numpy as np

from fi_cupy.reference._common import Array, compute_dtype, upcast


def gather_rows(source: Array, rows: Array) -> Array:
    """``out[i] = source[rows[i]]``; zeros where the number lies outside the table.

    Parameters
    ----------
    source : [num_rows, width]
    rows : int [n]
    """
    inside = (rows >= 0) & (rows < source.shape[0])
    out = np.zeros((len(rows), source.shape[1]), source.dtype)
    out[inside] = source[rows[inside]]
    return out


def argmax(x: Array) -> Array:
    """Position of the largest value of every row, the lowest among equals; NaN never wins, a row of NaN gives 0.

    Parameters
    ----------
    x : [rows, columns]

    Returns
    -------
    int32 [rows]
    """
    wide = upcast(x, compute_dtype(x))
    return np.where(np.isnan(wide), -np.inf, wide).argmax(axis=1).astype(np.int32)
