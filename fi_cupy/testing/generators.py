"""Random inputs for tests and benches, the same on every backend for the same seed."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_cupy.dtypes import DType
from fi_cupy.dtypes import dtype as to_dtype


def normal(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = "bfloat16", scale: float = 1.0) -> Any:
    """Normal values of standard deviation `scale`, rounded to `dtype` (NumPy, ml_dtypes)."""
    return (rng.standard_normal(shape, dtype=np.float32) * scale).astype(to_dtype(dtype).np)


#: Kinds of rows that filters and draws may trip over.
ROW_KINDS = ("normal", "flat", "coarse", "spike", "holes")


def odd_rows(
    rng: np.random.Generator,
    rows: int,
    vocab: int,
    dtype: Any,
    logits: bool = True,
    kinds: tuple[str, ...] = ROW_KINDS,
) -> Any:
    """Rows of logits of several kinds in turn, or their probabilities.

    "normal" (deviation 3), "flat", "coarse" (few distinct values), "spike" (one token has nearly all), "holes" (half at
    -inf), "nan" (one, of more than 100 elements), "nans" (one of a hundred), "zeros" (of both signs, the rest -inf),
    "tied" (about eight tokens above a value that all others have but for some at -inf).
    """
    from fi_cupy.reference.sampling_filters import softmax

    x = normal(rng, (rows, vocab), "float32", 3.0)
    for i in range(rows):
        kind = kinds[i % len(kinds)]
        if kind == "flat":
            x[i] = 1.5
        elif kind == "coarse":
            x[i] = np.round(x[i])
        elif kind == "spike":
            x[i, rng.integers(vocab)] += 25
        elif kind == "holes":
            x[i, rng.random(vocab) < 0.5] = -np.inf
            x[i, rng.integers(vocab)] = 0.5
        elif kind == "nan" and vocab > 100:
            x[i, rng.integers(vocab)] = np.nan
        elif kind == "nans":
            x[i, rng.random(vocab) < 0.01] = np.nan
        elif kind == "zeros":
            x[i] = -np.inf
            x[i, :2] = [-0.0, 0.0][:vocab]
        elif kind == "tied":
            x[i] = np.where(rng.random(vocab) * vocab < 8, np.abs(x[i]), -0.5)
            x[i, : vocab // 3] = -np.inf
    return (x if logits else softmax(x)).astype(to_dtype(dtype).np)


def on_gpu(array: np.ndarray[Any, Any]) -> Any:
    """A CuPy copy; fp8 becomes bytes, which is how it travels through CuPy.

    The copy has arrived: a non-blocking stream, which does not wait for the current one, may read it.
    """
    import cupy

    if array.dtype.name.startswith("float8"):
        array = array.view(np.uint8)
    copy = cupy.asarray(array)
    cupy.cuda.get_current_stream().synchronize()
    return copy


def poisoned(shape: tuple[int, ...], dtype: Any) -> Any:
    """A CuPy array full of NaN (0xff bytes), for outputs that a kernel must write in full."""
    import cupy

    kind: DType = to_dtype(dtype)
    n = int(np.prod(shape)) * kind.itemsize
    raw = cupy.full((n,), 0xFF, dtype=cupy.uint8)
    cupy.cuda.get_current_stream().synchronize()  # before another stream writes it
    return raw.view(np.uint8 if kind.name.startswith("float8") else kind.np).reshape(shape)


def new_stream() -> Any:
    """A CuPy stream for a test to capture or run on, behind all that was queued before.

    Non-blocking streams do not wait for the default stream: without the wait here, what made a test's arrays could
    still run after what the test does with them, and did where many processes shared a GPU.
    """
    import cupy

    cupy.cuda.runtime.deviceSynchronize()
    return cupy.cuda.Stream(non_blocking=True)


def to_float64(array: Any) -> np.ndarray[Any, Any]:
    """Any framework's array as float64 on the CPU."""
    from fi_cupy.arrays import view

    return view(array).host().astype(np.float64)
