"""Top-k and its transforms: the same elements as the NumPy reference, ties by rule, in every launch shape."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import topk
from fi_cupy.device import device_info
from fi_cupy.sampling_kernels import LaunchShape
from fi_cupy.testing.generators import normal, odd_rows, on_gpu

cupy = pytest.importorskip("cupy")
DTYPES = ["float32", "bfloat16", "float16"]


def rows_of(rng, rows, width, dtype):
    return odd_rows(rng, rows, width, dtype, kinds=("normal", "flat", "coarse", "holes", "nans", "zeros", "tied"))


def check(x, k, tie_break):
    _, want = topk.top_k(x, k, sorted=True, tie_break=tie_break)
    for is_sorted in (True, False):
        values, indices = topk.top_k(on_gpu(x), k, sorted=is_sorted, tie_break=tie_break)
        values, indices = cupy.asnumpy(values), cupy.asnumpy(indices)
        assert indices.dtype == np.int64 and values.dtype == x.dtype
        wide = np.take_along_axis(x, indices, 1).astype(np.float32)
        assert np.array_equal(values.astype(np.float32), wide, equal_nan=True)
        assert (np.sort(indices, 1) == np.sort(want, 1)).all(), (x.shape, k, tie_break, is_sorted)
        if is_sorted:
            assert (indices == want).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 3, 130, 1025, 4096, 5003, 32001, 128256])
def test_top_k(rng, dtype, width):
    x = rows_of(rng, 7, width, dtype)
    for k in sorted({1, *(min(k, width) for k in (2, 20, 50, 300, 700, 2048, 4500))}):
        for tie_break in (topk.TopKTieBreak.SMALL, topk.TopKTieBreak.LARGE):
            check(x, k, tie_break)


def test_every_launch_shape_gives_the_same(rng, monkeypatch):
    for width in (5003, 128256):
        x = rows_of(rng, 12, width, "bfloat16")
        for k in (1, 50, 700, 5000):
            _, want = topk.top_k(x, k, sorted=True, tie_break=topk.TopKTieBreak.LARGE)
            for shape in (
                LaunchShape(256, 1, 1),
                LaunchShape(512, 2, 2),
                LaunchShape(1024, 2, 1),
                LaunchShape(256, 8, 4),
                LaunchShape(256, 16, 4),
            ):
                if shape.min_arch > device_info(0).code_number:
                    continue
                monkeypatch.setattr(topk, "launch_shape", lambda *_, shape=shape: shape)
                _, got = topk.top_k(on_gpu(x), k, sorted=True, tie_break=topk.TopKTieBreak.LARGE)
                assert (cupy.asnumpy(got) == want).all(), (shape.tag, width, k)


@pytest.mark.parametrize("width", [262144, 524288])
def test_large_rows_and_all_of_them(rng, width):
    check(rows_of(rng, 2, width, "float32"), 64, topk.TopKTieBreak.SMALL)
    check(rows_of(rng, 6, 20000, "bfloat16"), 20000, topk.TopKTieBreak.SMALL)


def test_many_rows(rng):
    check(normal(rng, (600, 3000), "float32"), 20, topk.TopKTieBreak.SMALL)


@pytest.mark.older_archs
@pytest.mark.parametrize("dtype", DTYPES)
def test_transforms(rng, dtype):
    rows, width = 12, 9001
    x = rows_of(rng, rows, width, dtype)
    table = rng.integers(0, 1000, (4, 2 * width)).astype(np.int32)
    lengths, starts, lines, offsets, slots = (
        rng.integers(0, most, rows).astype(np.int32) for most in (width + 5, 300, 4, 1000, 50)
    )
    lengths[0] = 0
    for k in (1, 64, 2048, 6000):
        for tie_break in (1, 2):
            for window in ({}, {"row_starts": starts}):
                got = topk.top_k_ragged_transform(
                    on_gpu(x), on_gpu(offsets), on_gpu(lengths), k, tie_break=tie_break,
                    **{n: on_gpu(v) for n, v in window.items()},
                )  # fmt: skip
                want = topk.top_k_ragged_transform(x, offsets, lengths, k, tie_break=tie_break, **window)
                assert (np.sort(cupy.asnumpy(got), 1) == np.sort(want, 1)).all()
                for more in ({}, {"page_table_row_starts": slots}):
                    raw, out = cupy.empty((rows, k), np.int32), cupy.empty((rows, k), np.int32)
                    raw_want = np.empty((rows, k), np.int32)
                    got = topk.top_k_page_table_transform(
                        on_gpu(x), on_gpu(table), on_gpu(lengths), k, on_gpu(lines), tie_break=tie_break,
                        page_size=3, out=out, out_raw_indices=raw,
                        **{n: on_gpu(v) for n, v in {**window, **more}.items()},
                    )  # fmt: skip
                    want = topk.top_k_page_table_transform(
                        x, table, lengths, k, lines, tie_break=tie_break, page_size=3, out_raw_indices=raw_want,
                        **window, **more,
                    )  # fmt: skip
                    assert got is out
                    assert (np.sort(cupy.asnumpy(got), 1) == np.sort(want, 1)).all()
                    assert (np.sort(cupy.asnumpy(raw), 1) == np.sort(raw_want, 1)).all()
