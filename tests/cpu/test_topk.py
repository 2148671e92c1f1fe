"""Top-k on CPU arrays: ties by rule, windows, page tables and error texts."""

from __future__ import annotations

import numpy as np
import pytest

import fi_cupy
from fi_cupy import errors, topk

INF = np.inf
X = np.float32([[1, 3, 3, 2, 3], [-INF, np.nan, INF, np.nan, -0.0]])


def test_ties_go_by_rule():
    for tie_break, want in ((0, [1, 2]), (1, [1, 2]), (2, [4, 2])):
        values, indices = topk.top_k(X[:1], 2, sorted=True, tie_break=tie_break)
        assert indices.tolist() == [want] and values.tolist() == [[3, 3]]
    assert topk.top_k(X[:1], 5, sorted=True)[1].tolist() == [[1, 2, 4, 3, 0]]
    assert topk.top_k(X[:1], 5, sorted=True, tie_break=topk.TopKTieBreak.LARGE)[1].tolist() == [[4, 2, 1, 3, 0]]


def test_nan_is_the_largest():
    values, indices = topk.top_k(X[1:], 4, sorted=True)
    assert indices.tolist() == [[1, 3, 2, 4]] and indices.dtype == np.int64
    assert np.isnan(values[0, :2]).all() and values[0, 2] == INF
    assert fi_cupy.top_k is topk.top_k and topk.topk is topk.top_k


def test_agrees_with_torch(rng):
    torch = pytest.importorskip("torch")
    x = rng.standard_normal((4, 300)).astype(np.float32)
    values, indices = topk.top_k(torch.from_numpy(x), 17, sorted=True)
    want = torch.topk(torch.from_numpy(x), 17)
    assert torch.equal(values, want.values) and torch.equal(indices, want.indices)


def test_transforms():
    x = np.float32([[5, 1, 9, 7], [1, 2, 3, 4]])
    lengths = np.array([4, 1], np.int32)
    ragged = topk.top_k_ragged_transform(x, np.array([10, 20], np.int32), lengths, 2)
    assert np.sort(ragged, 1).tolist() == [[12, 13], [-1, 20]]
    table = np.arange(100, 110, dtype=np.int32)[None]
    lines, starts = np.zeros(2, np.int32), np.array([1, 0], np.int32)
    raw = np.empty((2, 2), np.int32)
    out = topk.top_k_page_table_transform(x, table, lengths, 2, lines, row_starts=starts, out_raw_indices=raw)
    assert np.sort(raw, 1).tolist() == [[1, 2], [-1, 0]]
    assert np.sort(out, 1).tolist() == [[102, 103], [-1, 100]]
    paged = topk.top_k_page_table_transform(x, table, lengths, 2, lines, page_size=2)
    assert np.sort(paged, 1).tolist() == [[2 * 101, 2 * 101 + 1], [-1, 200]]


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: topk.top_k(X, 6), errors.ArgumentError, "top_k: k is 6, expected 1 to 5"),
        (lambda: topk.top_k(X, 0), errors.ArgumentError, "k is 0"),
        (lambda: topk.top_k(X, 1.5), errors.ArgumentError, "k is 1.5, expected an integer"),
        (lambda: topk.top_k(X, 1, tie_break=3), errors.ArgumentError, "tie_break is 3"),
        (lambda: topk.top_k(X[0], 1), errors.ShapeError, "input is 1-D"),
        (lambda: topk.top_k(X[:1].astype(int), 1), errors.DTypeError, "input has dtype int64"),
        (
            lambda: topk.top_k_ragged_transform(X, np.zeros(2, np.int32), np.zeros(3, np.int32), 1),
            errors.ShapeError,
            r"lengths has shape \(3,\), expected \(2,\)",
        ),
        (
            lambda: topk.top_k_page_table_transform(X, np.zeros((1, 5), np.int32), np.zeros(2, np.int32), 1),
            errors.ShapeError,
            "src_page_table has shape",
        ),
        (
            lambda: topk.top_k_page_table_transform(
                X, np.zeros((2, 5), np.int32), np.zeros(2, np.int32), 1, page_size=0
            ),
            errors.ArgumentError,
            "page_size is 0",
        ),
    ],
)
def test_error_texts(call, error, text):
    with pytest.raises(error, match=text):
        call()
