"""Rows by number and the argmax of rows on CPU arrays."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import errors, lookup
from fi_cupy.testing.generators import normal


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int32"])
def test_rows_and_zeros_outside(rng, dtype):
    table = normal(rng, (5, 6)).astype(np.float32).astype(dtype) if dtype != "bfloat16" else normal(rng, (5, 6))
    got = lookup.gather_rows(table, np.int64([4, 0, 5, -1, 4]))
    assert got.dtype == table.dtype
    assert (got[[0, 1, 4]] == table[[4, 0, 4]]).all() and not got[[2, 3]].any()


def test_argmax_takes_the_lowest_of_equals_and_never_nan():
    x = np.float32([[1, 3, 3], [np.nan, -2, np.nan], [np.nan] * 3, [-np.inf] * 3])
    assert lookup.argmax(x).tolist() == [1, 1, 0, 0]


def test_select_leaves_the_other_rows():
    out = np.int32([9, 9])
    assert lookup.argmax(np.float32([[0, 1], [0, 1]]), out=out, select=np.int32([0, 7])) is out
    assert out.tolist() == [9, 1]


def test_errors(rng):
    x = normal(rng, (3, 4), "float32")
    with pytest.raises(errors.DTypeError, match="gather_rows: rows has dtype float32"):
        lookup.gather_rows(x, x[0])
    with pytest.raises(errors.ShapeError, match=r"gather_rows: out has shape \(2, 4\)"):
        lookup.gather_rows(x, np.int32([1]), out=x[:2])
    with pytest.raises(errors.ShapeError, match="argmax: x has shape"):
        lookup.argmax(x[:, :0])
    with pytest.raises(errors.ArgumentError, match="argmax: out is None"):
        lookup.argmax(x, select=np.int32([1, 1, 1]))


def test_argmax_takes_clusters_for_few_long_rows():
    assert lookup._argmax_cluster(1, 49152, 4, True) == lookup._argmax_cluster(16, 128256, 2, True) == 8
    assert lookup._argmax_cluster(17, 49152, 4, True) == lookup._argmax_cluster(1, 16000, 4, True) == 1
    assert lookup._argmax_cluster(1, 49152, 4, False) == 1
