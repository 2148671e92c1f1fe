"""Bit packing on CPU arrays, and the kernel's multiplication trick."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy import errors, quantization
from fi_cupy.testing.generators import normal


def naive(bits, bitorder):
    """One bit at a time."""
    out = [0] * (-(-len(bits) // 8))
    for i, bit in enumerate(bits):
        if bit:
            out[i // 8] |= 1 << (7 - i % 8 if bitorder == "big" else i % 8)
    return out


@pytest.mark.parametrize("bitorder", ["big", "little"])
@pytest.mark.parametrize("n", [0, 1, 8, 9, 31])
def test_trap_13_any_type_counts_as_its_truth(rng, bitorder, n):
    bits = rng.integers(0, 2, n)
    assert quantization.packbits(bits.astype(bool), bitorder).tolist() == naive(bits, bitorder)
    for dtype in ("float16", "bfloat16", "float32"):
        x = normal(rng, (n,), dtype) * bits.astype(normal(rng, (1,), dtype).dtype)  # -0.0 among the zeros
        assert quantization.packbits(x, bitorder).tolist() == naive(x != 0, bitorder)
    wide = bits * rng.integers(1, 2**62, n)
    assert quantization.packbits(wide, bitorder).tolist() == naive(bits, bitorder)


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(0, 3), st.sampled_from(["big", "little"]), st.integers())
@settings(max_examples=80, deadline=None)
def test_trap_12_13_segments_are_padded_to_bytes(lens, first, bitorder, seed):
    rng = np.random.default_rng(abs(seed))
    indptr = (np.concatenate([[0], np.cumsum(lens)]) + first).astype(np.int32)
    x = rng.integers(0, 2, int(indptr[-1]) + 2).astype(bool)
    y, new = quantization.segment_packbits(x, indptr, bitorder)
    assert new.dtype == np.int32 and np.diff(new).tolist() == [(n + 7) // 8 for n in lens]
    want = [b for s, e in itertools.pairwise(indptr) for b in naive(x[s:e], bitorder)]
    assert y.tolist() == want


def test_default_bit_order_is_big():
    x = np.array([1, 0, 0, 0, 0, 0, 0, 0, 1], bool)
    assert quantization.packbits(x).tolist() == [128, 128]
    assert quantization.segment_packbits(x, np.array([0, 9]))[0].tolist() == [128, 128]


def test_errors():
    x = np.ones(8, bool)
    with pytest.raises(errors.ArgumentError, match="packbits: bitorder is 'middle', expected 'big' or 'little'"):
        quantization.packbits(x, "middle")
    with pytest.raises(errors.ShapeError, match="packbits: x is 2-D"):
        quantization.packbits(x[None])
    with pytest.raises(errors.LayoutError, match="packbits: x has inner stride 2"):
        quantization.packbits(x[::2])
    with pytest.raises(errors.DTypeError, match="segment_packbits: indptr has dtype float64"):
        quantization.segment_packbits(x, np.array([0.0, 8.0]))
    for indptr in ([0, 9], [-1, 4], [4, 2]):
        with pytest.raises(errors.ArgumentError, match="segment_packbits: indptr goes from"):
            quantization.segment_packbits(x, np.array(indptr))


def test_multiplication_gathers_a_nibble_without_carries():
    """kernels/quantization.cuh: four bytes of 0 or 1 times a constant have their bits side by side at the top."""
    for bits in itertools.product([0, 1], repeat=4):
        word = sum(b << (8 * i) for i, b in enumerate(bits))
        assert (word * 0x10204080 % 2**32) >> 28 == sum(b << i for i, b in enumerate(bits))
        assert (word * 0x80402010 % 2**32) >> 28 == sum(b << (3 - i) for i, b in enumerate(bits))
