"""DeepGEMM's two layouts of grouped products on CPU arrays, their errors, and the kernels in the emulator."""

from __future__ import annotations

import emulate
import ml_dtypes
import numpy as np
import pytest

from fi_cupy import errors, gemm
from fi_cupy.arrays import view
from fi_cupy.gemm import deepgemm, fp8_blocks, group
from fi_cupy.testing.tolerances import assert_close

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)


def f64(x):
    return np.asarray(x).astype(np.float64)


def fp8_values(rng, shape):
    return (rng.standard_normal(shape) * 2).astype(E4M3)


def blocks_of(rng, groups, n, k):
    return fp8_values(rng, (groups, n, k)), rng.random((groups, -(-n // 128), -(-k // 128))).astype(np.float32)


def one_row(a, sa, b, sb):
    """A row and its factors times a weight and its own, one block of k after the other."""
    total = np.zeros(len(b))
    for i, scale in enumerate(sa):
        part = slice(128 * i, 128 * i + 128)
        total += f64(b[:, part]) @ f64(a[part]) * float(scale) * np.repeat(f64(sb[:, i]), 128)[: len(b)]
    return total


#: Groups that start on 128 rows with padding; in any order, anywhere; rows of no group at both ends; one group for all.
INDICES = {
    "aligned": [*[2] * 100, *[-1] * 28, *[0] * 3],
    "ragged": [1, 1, 1, 0, 2, 2, 2, 2, 2],
    "outside": [-1, 0, 0, 7, 1, 3, -5],
    "one": [1] * 5,
}


def by_numbers(rng, numbers, place=lambda x: x, dtype=np.int32, **options):
    m, n, k, groups = len(numbers), 136, 256, 3
    a, sa = fp8_values(rng, (m, k)), rng.random((m, 2)).astype(np.float32)
    b, sb = blocks_of(rng, groups, n, k)
    out = place(np.full((m, n), 7, np.float32))
    numbers = np.array(numbers, dtype)
    got = gemm.group_deepgemm_fp8_nt_groupwise(*map(place, (a, b, sa, sb, numbers)), out=out, **options)
    assert got is out
    for i, g in enumerate(numbers):
        want = one_row(a[i], sa[i], b[g], sb[g]) if 0 <= g < groups else np.full(n, 7.0)
        assert_close(np.asarray(out[i]), want, "float32", "product")


def masked(rng, counts, place=lambda x: x, m=9, **options):
    n, k, groups = 72, 256, len(counts)
    a, sa = fp8_values(rng, (groups, m, k)), rng.random((groups, m, 2)).astype(np.float32)
    b, sb = blocks_of(rng, groups, n, k)
    out = place(np.full((groups, m, n), 7, np.float32))
    gemm.batch_deepgemm_fp8_nt_groupwise(*map(place, (a, b, sa, sb, np.array(counts, np.int64))), 4, out=out, **options)
    for g, i in np.ndindex(groups, m):
        want = one_row(a[g, i], sa[g, i], b[g], sb[g]) if i < counts[g] else np.full(n, 7.0)
        assert_close(np.asarray(out[g, i]), want, "float32", "product")


@pytest.mark.parametrize("numbers", INDICES.values(), ids=INDICES)
def test_rows_with_their_groups_number(rng, numbers):
    by_numbers(rng, numbers)


def test_groups_padded_to_one_length(rng):
    masked(rng, [3, 0, 9, -2, 40])


def test_deepgemm_refuses(rng):
    b, sb = blocks_of(rng, 2, 64, 128)
    a, sa, numbers = fp8_values(rng, (4, 128)), np.ones((4, 1), np.float32), np.zeros(4, np.int32)
    with pytest.raises(errors.ArgumentError, match=r"scale_granularity_mnk is \(4, 128, 128\), expected 1 row"):
        gemm.group_deepgemm_fp8_nt_groupwise(a, b, sa, sb, numbers, (4, 128, 128))
    with pytest.raises(errors.ShapeError, match="m_indices has shape"):
        gemm.group_deepgemm_fp8_nt_groupwise(a, b, sa, sb, numbers[:3])
    with pytest.raises(errors.DTypeError, match="m_indices"):
        gemm.group_deepgemm_fp8_nt_groupwise(a, b, sa, sb, numbers.astype(np.float32))
    batch = (a.reshape(2, 2, 128), b, sa.reshape(2, 2, 1), sb)
    with pytest.raises(errors.ArgumentError, match="expected_m is -1"):
        gemm.batch_deepgemm_fp8_nt_groupwise(*batch, numbers[:2], -1)
    with pytest.raises(errors.ShapeError, match="a_scale has shape"):
        gemm.batch_deepgemm_fp8_nt_groupwise(*batch[:2], np.ones((2, 3, 1), np.float32), sb, numbers[:2], 2)
    apart = np.zeros((2, 3, 128), E4M3)[:, :2]
    with pytest.raises(errors.LayoutError, match="expected 256 between groups"):
        gemm.batch_deepgemm_fp8_nt_groupwise(apart, *batch[1:], numbers[:2], 2)


def test_no_rows_of_no_group(rng):
    b, sb = blocks_of(rng, 2, 64, 128)
    got = gemm.group_deepgemm_fp8_nt_groupwise(
        np.zeros((0, 128), E4M3), b, np.zeros((0, 1), np.float32), sb, np.zeros(0, np.int32)
    )
    assert got.shape == (0, 64)


# --- the kernels in the emulator ------------------------------------------------------------------------------------

needs_emulator = pytest.mark.skipif(not emulate.available(), reason="g++ on x86-64 is needed")


@pytest.fixture
def place():
    with emulate.emulated(emulate.AMPERE, deepgemm, fp8_blocks, group):
        yield emulate.device


@needs_emulator
@pytest.mark.parametrize("numbers", INDICES.values(), ids=INDICES)
def test_kernels_for_rows_with_their_groups_number(rng, place, numbers):
    by_numbers(rng, numbers, place, np.int64)


@needs_emulator
def test_kernels_for_groups_padded_to_one_length(rng, place):
    masked(rng, [3, 0, 9, -2, 40], place)


@needs_emulator
@pytest.mark.parametrize("rows", [1, 8192, 20000])
def test_runs_kernel(rng, place, rows):
    """Many runs, more than there is room for, and rounds of the kernel's loop."""
    numbers = np.repeat(rng.integers(-1, 4, rows), rng.integers(1, 90, rows))[:rows].astype(np.int32)
    group = np.where(numbers < 3, numbers, -1)
    starts = np.flatnonzero(np.diff(group, prepend=-9))
    for most in (len(starts) + 40, len(starts), max(1, len(starts) // 2)):
        made = deepgemm._runs("row_runs", view(place(numbers)), rows, 3, most)
        indptr, weights = (np.asarray(v.array).view(np.int32) for v in made)
        runs = min(most, len(starts))
        assert indptr[: runs + 1].tolist() == [*starts, rows][: runs + 1]
        assert weights[:runs].tolist() == group[starts[:runs]].tolist()
        assert (indptr[runs + 1 :] == rows).all() and (weights[runs:] == -1).all()
