"""Rows by number and the argmax of rows on the GPU: exact."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import lookup, reference
from fi_cupy.testing.generators import normal, on_gpu, poisoned

cupy = pytest.importorskip("cupy")


@pytest.mark.older_archs
@pytest.mark.parametrize(("dtype", "width"), [("bfloat16", 576), ("float32", 7), ("float16", 129), ("bfloat16", 4096)])
def test_gather_rows(rng, dtype, width):
    table = normal(rng, (50, width + 8), dtype)
    rows = rng.integers(-2, 52, 33)
    for index in (np.int32, np.int64):
        out = poisoned((33, width), dtype)
        device = on_gpu(table)[:, 3 : 3 + width]
        lookup.gather_rows(device, on_gpu(rows.astype(index)), out=out)
        assert (out.get() == reference.lookup.gather_rows(table[:, 3 : 3 + width], rows)).all()
    assert lookup.gather_rows(on_gpu(table), on_gpu(rows[:0])).shape == (0, width + 8)


@pytest.mark.older_archs
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("columns", [1, 3, 1000, 49152, 128256])
def test_argmax(rng, dtype, columns):
    x = normal(rng, (7, columns + 1), dtype, 3.0)
    x[1] = x[2, 0]  # all equal
    x[3, ::2] = np.nan
    x[4] = -np.inf
    x[5] = np.nan
    for view in (x[:, :columns], x[:, 1:]):  # aligned or not
        want = reference.lookup.argmax(view)
        device = on_gpu(x)
        device = device[:, :columns] if view.base is not None and (view.ctypes.data == x.ctypes.data) else device[:, 1:]
        assert (lookup.argmax(device).get() == want).all()
        out = cupy.full(7, 123, cupy.int32)
        select = np.int32([0, 1, 0, 2, 1, -1, 0])
        lookup.argmax(device, out=out, select=on_gpu(select))
        assert (out.get() == np.where(select != 0, want, 123)).all()
