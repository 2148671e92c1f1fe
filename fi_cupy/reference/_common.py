"""Type rules shared by the NumPy reference operators.

Every operator computes in float32, or in float64 as soon as one floating input is float64, and rounds once at the end.
A float64 oracle is therefore the same function called with upcast inputs.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Array = NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E5M2 = np.dtype(ml_dtypes.float8_e5m2)
#: Largest finite magnitude of each fp8 type; larger values saturate to it, as CUDA's conversions do.
FP8_MAX: dict[np.dtype, float] = {E4M3: 448.0, E5M2: 57344.0}

LOG2E = 1.4426950408889634

_ALL_BYTES = np.arange(256, dtype=np.uint8)
_FP8_TABLES = {(t, np.dtype(c)): _ALL_BYTES.view(t).astype(c) for t in (E4M3, E5M2) for c in (np.float32, np.float64)}


def is_fp8(dtype: DTypeLike) -> bool:
    """Whether `dtype` is one of the two fp8 storage types."""
    return np.dtype(dtype) in FP8_MAX


def compute_dtype(*arrays: Any) -> np.dtype:
    """float64 if any of the arrays is float64, else float32; None and Python scalars do not count."""
    for a in arrays:
        if isinstance(a, np.ndarray) and a.dtype == np.float64:
            return np.dtype(np.float64)
    return np.dtype(np.float32)


def upcast(x: ArrayLike, dtype: DTypeLike) -> Array:
    """Convert to the computing type exactly; no copy when `x` already has it. fp8 goes through a 256-entry table."""
    x = np.asarray(x)
    target: Any = np.dtype(dtype)
    table = _FP8_TABLES.get((x.dtype, target))
    if table is not None:
        return table[np.ascontiguousarray(x).view(np.uint8)]
    return x.astype(target, copy=False)


def round_to(x: Array, dtype: DTypeLike) -> Array:
    """Round to the storage type, to nearest even. fp8 and integers saturate, fp16 and bf16 overflow to inf."""
    dtype = np.dtype(dtype)
    if x.dtype == dtype:
        return x
    if dtype in FP8_MAX:
        return np.clip(x, -FP8_MAX[dtype], FP8_MAX[dtype]).astype(dtype)
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        return np.clip(np.rint(x), info.min, info.max).astype(dtype)
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def per_row(value: Any, rows: int, dtype: DTypeLike) -> Array:
    """A scalar or a `[rows]` (or one-element) array as a `[rows]` array."""
    return np.broadcast_to(np.asarray(value).astype(dtype).reshape(-1), (rows,))


def repeat_index(indptr: Array) -> Array:
    """Segment number of every element: `[0, 2, 3]` gives `[0, 0, 1]`."""
    indptr = np.asarray(indptr)
    return np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
