"""Bit packing: bytes equal to NumPy's."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import errors, quantization
from fi_cupy.reference import quantization as reference
from fi_cupy.testing.generators import normal, on_gpu

cupy = pytest.importorskip("cupy")
DTYPES = ["bool", "uint8", "int8", "float16", "bfloat16", "int32", "float32", "int64", "float64"]


def mask(rng, n, dtype):
    """Half zeros (negative ones among them), and values whose bits lie anywhere in the element."""
    if dtype == "bool":
        return rng.integers(0, 2, n).astype(bool)
    zero = rng.integers(0, 2, n).astype(bool)
    if "float" in dtype:
        values = normal(rng, (n,), dtype) if dtype != "float64" else rng.standard_normal(n)
        values[zero] *= 0  # signed zeros
        return values
    info = np.iinfo(dtype)
    values = rng.integers(info.min, info.max, n, dtype=dtype, endpoint=True)
    values[zero] = 0
    return values


@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_trap_13_packbits(rng, dtype, bitorder):
    for n in (0, 1, 7, 8, 9, 15, 16, 17, 1000, 20011):
        x = mask(rng, n, dtype)
        assert (quantization.packbits(on_gpu(x), bitorder).get() == reference.packbits(x, bitorder)).all(), n
    x = mask(rng, 5100, dtype)
    for start in range(1, 18):  # every alignment; windows at both ends of the array
        got = quantization.packbits(on_gpu(x)[start : 5100 - start // 3], bitorder).get()
        assert (got == reference.packbits(x[start : 5100 - start // 3], bitorder)).all(), start


@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_trap_12_13_segment_packbits(rng, dtype, bitorder, index):
    for lens in ([], [0], [5], [0, 1, 0, 8, 9, 16, 17, 0], list(rng.integers(0, 40, 300)), [30000, 3, 20001, 0, 40007]):
        for first in (0, 3):
            indptr = (np.concatenate([[0], np.cumsum(lens)]) + first).astype(index)
            x = mask(rng, int(indptr[-1]) + 5, dtype)
            want = reference.segment_packbits(x, indptr, bitorder)
            for given in (on_gpu(indptr), indptr):
                y, new = quantization.segment_packbits(on_gpu(x), given, bitorder)
                assert y.dtype == np.uint8 and new.dtype == index
                assert (new.get() == want[1]).all() and (y.get() == want[0]).all(), lens


@pytest.mark.older_archs
def test_default_bit_order_is_big(rng):
    x = on_gpu(np.array([1, 0, 0, 0, 0, 0, 0, 0, 1], bool))
    assert quantization.packbits(x).get().tolist() == [128, 128]
    assert quantization.segment_packbits(x, np.array([0, 9]))[0].get().tolist() == [128, 128]


def test_offsets_that_leave_the_array_are_refused(rng):
    x = on_gpu(np.ones(8, bool))
    for indptr in ([0, 9], [-1, 4], [4, 2]):
        with pytest.raises(errors.ArgumentError, match="segment_packbits: indptr"):
            quantization.segment_packbits(x, on_gpu(np.array(indptr)))
