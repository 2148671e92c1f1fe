"""Index arrays and page tables as `plan` reads them: checked, of any framework, and waited for once."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from fi_cupy import arrays, decode, errors, prefill, workspace
from fi_cupy.arrays import View
from fi_cupy.dtypes import dtype
from fi_cupy.page_table import read_ints, read_page_table

NAMES = ("indptr", "indices", "last_page_len")


class Distant:
    """An array that says it is on GPU 0; its memory is the host's."""

    def __init__(self, values, kind=np.int32):
        self.values = np.asarray(values, kind)


class _Pretended(arrays.Framework):
    name = "cupy"

    def view(self, array):
        x = array.values
        strides = tuple(s // x.itemsize for s in x.strides)
        return View(self, array, x.ctypes.data, x.shape, strides, dtype(x.dtype), 0)

    def stream(self, device):
        return 7

    def to_host(self, view):
        self.single_copies += 1
        return view.array.values.copy()


@pytest.fixture
def gpu(monkeypatch):
    """Counts what a plan asks of the driver."""
    runtime = pytest.importorskip("cupy.cuda.runtime")
    pretended = _Pretended()
    pretended.single_copies = pretended.copies = pretended.waits = 0

    def copy(target, source, nbytes, kind, stream):
        pretended.copies += 1
        assert (kind, stream) == (2, 7)
        ctypes.memmove(target, source, nbytes)

    def wait(stream):
        pretended.waits += 1

    monkeypatch.setattr(runtime, "memcpyAsync", copy)
    monkeypatch.setattr(runtime, "streamSynchronize", wait)
    monkeypatch.setattr(runtime, "getDevice", lambda: 0)
    monkeypatch.setattr(workspace, "_pinned", lambda nbytes: np.full(nbytes, 0xAB, np.uint8))
    monkeypatch.setitem(arrays._by_type, Distant, pretended.view)
    return pretended


def test_arrays_of_a_gpu_are_waited_for_once_together(gpu):
    given = {"a": Distant([1, 2, 3]), "b": [4], "c": Distant([5, -6], np.int64), "d": Distant([]), "e": Distant([7])}
    read = read_ints("op", given)
    assert {name: x.tolist() for name, x in read.items()} == {"a": [1, 2, 3], "b": [4], "c": [5, -6], "d": [], "e": [7]}
    assert list(read) == list(given) and all(x.dtype == np.int64 for x in read.values())
    assert (gpu.copies, gpu.waits, gpu.single_copies) == (4 - 1, 1, 0)  # nothing is copied of an empty one


def test_a_strided_array_of_a_gpu_comes_by_itself(gpu):
    x = Distant([0])
    x.values = np.arange(6, dtype=np.int32)[::2]
    assert read_ints("op", {"x": x, "y": Distant([9])})["x"].tolist() == [0, 2, 4]
    assert (gpu.copies, gpu.waits, gpu.single_copies) == (1, 1, 1)


def test_host_arrays_cost_no_wait(gpu):
    table, others = read_page_table(
        "op", NAMES, np.int32([0, 2, 3]), Distant([4, 5, 6]), np.int32([3, 16]), None, 16, qo_indptr=[0, 1, 9]
    )
    assert gpu.waits == gpu.copies == gpu.single_copies == 0
    assert table.kv_len.tolist() == [19, 16] and others["qo_indptr"].tolist() == [0, 1, 9]
    assert table.host_indices is None and table.max_index == -1


@pytest.mark.parametrize("lens", [False, True])
def test_a_page_table_on_a_gpu_is_one_wait(gpu, lens):
    table, others = read_page_table(
        "op", NAMES, Distant([0, 2, 3]), Distant([4, 5, 6]), Distant([3, 16]), Distant([19, 16]) if lens else None, 16,
        qo_indptr=Distant([0, 1, 9]),
    )  # fmt: skip
    assert (gpu.waits, gpu.single_copies) == (1, 0)
    assert table.kv_len.tolist() == [19, 16] and table.last_page_len.tolist() == [3, 16]
    assert others["qo_indptr"].tolist() == [0, 1, 9]


def test_values_do_not_change_with_the_callers_array():
    indptr = np.array([0, 2])
    read = read_ints("op", {"x": indptr})["x"]
    indptr[:] = 9
    assert read.tolist() == [0, 2]


@pytest.mark.parametrize("wrapper", ["decode", "prefill"])
def test_a_plan_on_the_cpu_keeps_its_own_page_numbers(rng, wrapper):
    indices, cache = np.int32([2, 0]), rng.standard_normal((3, 2, 4, 2, 8), np.float32)
    q = rng.standard_normal((1, 4, 8), np.float32)
    if wrapper == "decode":
        w = decode.BatchDecodeWithPagedKVCacheWrapper(np.empty(16, np.uint8))
        w.plan([0, 2], indices, [3], 4, 2, 8, 4, q_data_type="float32")
    else:
        w = prefill.BatchPrefillWithPagedKVCacheWrapper(np.empty(16, np.uint8))
        w.plan([0, 1], [0, 2], indices, [3], 4, 2, 8, 4, q_data_type="float32")
    before = w.run(q, cache)
    indices[:] = 1
    assert (w.run(q, cache) == before).all()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"indptr": [0, 3, 2]}, errors.ArgumentError, "indptr must start at >= 0 and not decrease"),
        ({"indptr": []}, errors.ArgumentError, "indptr is empty"),
        ({"indptr": np.zeros((1, 3), np.int32)}, errors.ShapeError, "indptr is 2-D"),
        ({"indptr": [0.0, 2.0, 3.0]}, errors.DTypeError, "indptr has dtype float64"),
        ({"indptr": [0, 2, 4]}, errors.ArgumentError, "indptr ends at 4, but indices has 3"),
        ({"indices": [0, -4, 1]}, errors.ArgumentError, r"indices holds a negative page number \(-4\)"),
        ({"indices": np.array([0, 1 << 32, 1])}, errors.ArgumentError, "indices holds page 4294967296, which 32 bits"),
        ({"indices": np.array([0, -1, 1])}, errors.ArgumentError, r"indices holds a negative page number \(-1\)"),
        ({"indices": [0.5, 1.0, 2.0]}, errors.DTypeError, "indices has dtype float64"),
        ({"last_page_len": [1]}, errors.ShapeError, r"last_page_len has shape \(1,\), expected \(2,\)"),
        ({"last_page_len": [17, 1]}, errors.ArgumentError, r"last_page_len\[0\] is 17, expected 1..16"),
        ({"last_page_len": [1, -(1 << 62)]}, errors.ArgumentError, r"last_page_len\[1\] is -4611686018427387904"),
        ({"seq_lens": [19]}, errors.ShapeError, "seq_lens has shape"),
        ({"seq_lens": [40, 16]}, errors.ArgumentError, "seq_lens and indptr disagree"),
        ({"page_size": 0}, errors.ArgumentError, "page_size is 0"),
    ],
)
def test_errors_name_what_is_wrong(change, error, words):
    good = {
        "indptr": [0, 2, 3], "indices": [4, 5, 6], "last_page_len": [3, 16], "seq_lens": None, "page_size": 16
    }  # fmt: skip
    read_page_table("op", NAMES, **good)
    with pytest.raises(error, match=f"op: {words}"):
        read_page_table("op", NAMES, **{**good, **change})
