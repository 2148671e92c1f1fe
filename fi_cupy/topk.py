"""The k largest elements of rows: alone, through a page table, or with an offset.

Rules that hold for every function here:

* Exactly k elements are taken. Of those that tie at the k-th, `tie_break` says which: the smallest indices (also for
  `TopKTieBreak.NONE`) or the largest. NaN counts as the largest value, as in ``torch.topk``.
* Results are deterministic whether or not `deterministic` asks for it, and the same for every launch shape. They may be
  captured in a CUDA graph whether or not `dsa_graph_safe` asks for it: no host value depends on the data.
"""

from __future__ import annotations

import operator
from enum import IntEnum
from functools import lru_cache
from typing import Any

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.device import device_info
from fi_cupy.dtypes import DType, bfloat16, float16, float32, int32, int64
from fi_cupy.errors import ArgumentError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.sampling_kernels import NARROW, LaunchShape, launch_shape, room, row_shared, row_spec, spills
from fi_cupy.sampling_launch import checked_rows

# kernels/topk.cuh: TopKFlags
_LARGE_TIES, _SORTED = 1, 2

_PARAMS = ParamsStruct(
    "TopKParams",
    [
        ("input", "ptr"),
        ("values", "ptr"),
        ("indices", "ptr"),
        ("output", "ptr"),
        ("raw", "ptr"),
        ("lengths", "ptr"),
        ("row_starts", "ptr"),
        ("offsets", "ptr"),
        ("table", "ptr"),
        ("table_starts", "ptr"),
        ("row_to_batch", "ptr"),
        ("stride", "i64"),
        ("table_stride", "i64"),
        ("vocab", "u32"),
        ("k", "u32"),
        ("page_size", "u32"),
        ("flags", "u32"),
    ],
)
_SORT_PARAMS = ParamsStruct("SortParams", [("values", "ptr"), ("indices", "ptr"), ("k", "u32"), ("flags", "u32")])


class TopKTieBreak(IntEnum):
    """Which of the elements that tie at the k-th are taken."""

    NONE = 0
    SMALL = 1
    LARGE = 2


@lru_cache(maxsize=64)
def top_k_spec(dtype: DType, segments: int = 256, shape: LaunchShape = NARROW) -> KernelSpec:
    """Top-k of rows of up to 1024 * `segments` elements."""
    listed, size = row_shared(segments, "sorted", shape)
    return row_spec(
        f"top_k_{dtype.tag}_s{segments}_{shape.tag}",
        "topk.cuh",
        "top_k",
        _PARAMS,
        ("T", dtype),
        shape=shape,
        room=segments,
        listed=listed,
        shared=size,
        spills=spills("top_k", shape),
    )


@lru_cache(maxsize=16)
def sort_spec(dtype: DType) -> KernelSpec:
    """Rows of more results than the kernel lists, sorted in global memory."""
    return KernelSpec(
        symbol=f"sort_rows_{dtype.tag}",
        header="topk.cuh",
        function="sort_rows",
        params=_SORT_PARAMS,
        config=(("T", dtype), ("kThreads", 1024)),
        threads=1024,
        min_blocks=1,
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances."""
    alone = [top_k_spec(dtype) for dtype in (float32, bfloat16, float16)]
    return [*alone, top_k_spec(float32, 256, LaunchShape(512, 2, 1)), sort_spec(float32)]


def _count(op: str, k: Any, most: int | None = None) -> int:
    try:
        value = operator.index(k)
    except TypeError:
        raise ArgumentError(f"{op}: k is {k!r}, expected an integer") from None
    if value < 1 or (most is not None and value > most):
        raise ArgumentError(f"{op}: k is {value}, expected 1 to {'any' if most is None else most}")
    return value


def _tie_flag(op: str, tie_break: Any) -> int:
    try:
        return _LARGE_TIES if TopKTieBreak(tie_break) is TopKTieBreak.LARGE else 0
    except ValueError:
        raise ArgumentError(f"{op}: tie_break is {tie_break!r}, expected a TopKTieBreak (0, 1 or 2)") from None


def _launch(x: View, k: int, flags: int, page_size: int = 1, table_stride: int = 0, **pointers: int) -> int:
    """Launch the kernel; returns how many elements it lists."""
    rows, width = x.shape
    shape = launch_shape("top_k", rows, width, device_info(x.device))
    spec = top_k_spec(x.dtype, room(width), shape)
    names = [name for name, kind in _PARAMS.fields[1:11] if kind == "ptr"]
    load_kernel(spec, x.device).launch(
        rows * shape.cluster, x.stream(),
        x.ptr, *(pointers.get(name, 0) for name in names), x.strides[0], table_stride, width, k, page_size, flags,
    )  # fmt: skip
    return row_shared(room(width), "sorted", shape)[0]


def top_k(
    input: Any,
    k: int,
    sorted: bool = False,
    deterministic: bool = False,
    tie_break: int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
) -> tuple[Any, Any]:
    """The k largest elements of every row.

    Parameters
    ----------
    input : array, [batch, d], float32, float16 or bfloat16
        Rows may be strided.
    k : int
        1 to d.
    sorted : bool
        Largest first, and equal elements in the order of `tie_break`. Without, the order is not specified.
    deterministic, dsa_graph_safe : bool
        Results are deterministic, and calls can be captured, either way.
    tie_break : TopKTieBreak
        Which of the elements that tie at the k-th are taken.

    Returns
    -------
    (values, indices)
        ``[batch, k]``: dtype of `input`, and int64.

    Raises
    ------
    ShapeError, DTypeError, LayoutError, ArgumentError, UnsupportedError

    Source
    ------
    flashinfer.topk.top_k.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> fi_cupy.topk.top_k(np.array([[1.0, 3.0, 3.0, 2.0]], np.float32), 2, sorted=True)[1]
    array([[1, 2]])
    """
    op = "top_k"
    x = checked_rows(op, "input", input)
    k = _count(op, k, x.shape[1])
    flags = _tie_flag(op, tie_break) | (_SORTED if sorted else 0)
    values, indices = x.empty((x.shape[0], k), x.dtype), x.empty((x.shape[0], k), int64)
    if x.is_cpu:
        best, at = reference.topk.top_k(x.numpy(), k, bool(flags & _LARGE_TIES))
        values.write(best)
        indices.write(at)
        return values.result(), indices.result()
    listed = _launch(x, k, flags, values=values.ptr, indices=indices.ptr)
    if sorted and k > listed:
        load_kernel(sort_spec(x.dtype), x.device).launch(x.shape[0], x.stream(), values.ptr, indices.ptr, k, flags)
    return values.result(), indices.result()


topk = top_k


def _per_row(op: str, name: str, array: Any, x: View) -> View | None:
    if array is None:
        return None
    a = view(array, op, name)
    check_shape(op, name, a, (x.shape[0],), "= input.shape[:1]")
    check_dtype(op, name, a, (int32,))
    check_inner(op, name, a)
    check_device(op, x, **{name: a})
    return a


def _output(op: str, name: str, array: Any, x: View, k: int) -> View:
    out = view(array, op, name).writable(op, name)
    check_shape(op, name, out, (x.shape[0], k), "= (input.shape[0], k)")
    check_dtype(op, name, out, (int32,))
    check_device(op, x, **{name: out})
    if not out.contiguous:
        raise ArgumentError(f"{op}: {name} has strides {out.strides}, expected a contiguous array")
    return out


def _pointer(v: View | None) -> int:
    return 0 if v is None else v.ptr


def _host(v: View | None) -> Any:
    return None if v is None else v.numpy()


def top_k_page_table_transform(
    input: Any,
    src_page_table: Any,
    lengths: Any,
    k: int,
    row_to_batch: Any = None,
    deterministic: bool = False,
    tie_break: int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
    row_starts: Any = None,
    page_table_row_starts: Any = None,
    *,
    page_size: int = 1,
    out: Any = None,
    out_raw_indices: Any = None,
) -> Any:
    """The k largest of every row's window, looked up in a page table: the second stage of sparse attention.

    ``out[i, j] = table[start + index // page_size] * page_size + index % page_size`` with the line
    ``table = src_page_table[row_to_batch[i]]`` and ``start = page_table_row_starts[i]``.

    Parameters
    ----------
    input : array, [rows, max_len], float32, float16 or bfloat16
        Scores.
    src_page_table : array, [batch, slots], int32
        Lines may be strided.
    lengths : array, [rows], int32
        Elements of each row's window; it ends with the row at the latest.
    k : int
        At least 1.
    row_to_batch : array, [rows], int32, optional
        Line of the table; by default the row's number.
    row_starts : array, [rows], int32, optional
        First element of each row's window; indices count from there.
    page_table_row_starts : array, [rows], int32, optional
        Slot of the line that index 0 is looked up from; by default `row_starts`, or 0.
    page_size : int
        Elements of a slot.
    out, out_raw_indices : array, [rows, k], int32, optional
        The result, and the indices before the look-up.
    deterministic, tie_break, dsa_graph_safe
        As in `top_k`.

    Returns
    -------
    array, [rows, k], int32
        -1 behind the last; a window of at most k elements is in index order.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ArgumentError, UnsupportedError

    Source
    ------
    flashinfer.topk.top_k_page_table_transform.
    """
    op = "top_k_page_table_transform"
    x = checked_rows(op, "input", input)
    k, page_size = _count(op, k), operator.index(page_size)
    if not 1 <= page_size < 1 << 31:
        raise ArgumentError(f"{op}: page_size is {page_size}, expected at least 1 in 31 bits")
    flags = _tie_flag(op, tie_break)
    table = view(src_page_table, op, "src_page_table")
    check_ndim(op, "src_page_table", table, 2)
    check_dtype(op, "src_page_table", table, (int32,))
    check_inner(op, "src_page_table", table)
    check_device(op, x, src_page_table=table)
    own, starts = _per_row(op, "lengths", lengths, x), _per_row(op, "row_starts", row_starts, x)
    if own is None:
        raise ArgumentError(f"{op}: lengths is None, expected an array")
    table_starts = _per_row(op, "page_table_row_starts", page_table_row_starts, x)
    lines = _per_row(op, "row_to_batch", row_to_batch, x)
    if lines is None and table.shape[0] < x.shape[0]:
        check_shape(op, "src_page_table", table, (x.shape[0], table.shape[1]), "= a line a row, without row_to_batch")
    o = x.empty((x.shape[0], k), int32) if out is None else _output(op, "out", out, x, k)
    raw = None if out_raw_indices is None else _output(op, "out_raw_indices", out_raw_indices, x, k)
    if not x.is_cpu:
        _launch(
            x, k, flags, page_size, table.strides[0], output=o.ptr, raw=_pointer(raw), lengths=own.ptr,
            row_starts=_pointer(starts), table=table.ptr, table_starts=_pointer(table_starts),
            row_to_batch=_pointer(lines),
        )  # fmt: skip
        return o.result()
    index = reference.topk.window_indices(x.numpy(), own.numpy(), _host(starts), k, bool(flags & _LARGE_TIES))
    if raw is not None:
        raw.write(index)
    base, line = _host(table_starts if table_starts is not None else starts), _host(lines)
    result = index.copy()
    for i, row in enumerate(index):
        there = row >= 0
        slot = row[there] // page_size + (0 if base is None else int(base[i]))
        own_line = i if line is None else int(line[i])
        if not 0 <= own_line < table.shape[0]:
            raise ArgumentError(f"{op}: row_to_batch[{i}] is {own_line}, expected 0 to {table.shape[0] - 1}")
        if slot.size and not (0 <= slot.min() and slot.max() < table.shape[1]):
            raise ArgumentError(
                f"{op}: row {i} looks up slots {slot.min()} to {slot.max()} of src_page_table, expected 0 to "
                f"{table.shape[1] - 1}"
            )
        pages = table.numpy()[own_line, slot]
        result[i, there] = pages * page_size + row[there] % page_size
    o.write(result)
    return o.result()


def top_k_ragged_transform(
    input: Any,
    offsets: Any,
    lengths: Any,
    k: int,
    deterministic: bool = False,
    tie_break: int = TopKTieBreak.NONE,
    dsa_graph_safe: bool = False,
    row_starts: Any = None,
    *,
    out: Any = None,
) -> Any:
    """The k largest of every row's window as indices into a ragged cache: ``out[i, j] = index + offsets[i]``.

    ``offsets``: array, [rows], int32. The rest: `top_k_page_table_transform`.
    Source: flashinfer.topk.top_k_ragged_transform.
    """
    op = "top_k_ragged_transform"
    x = checked_rows(op, "input", input)
    k, flags = _count(op, k), _tie_flag(op, tie_break)
    own, starts = _per_row(op, "lengths", lengths, x), _per_row(op, "row_starts", row_starts, x)
    shift = _per_row(op, "offsets", offsets, x)
    if own is None or shift is None:
        raise ArgumentError(f"{op}: {'lengths' if own is None else 'offsets'} is None, expected an array")
    o = x.empty((x.shape[0], k), int32) if out is None else _output(op, "out", out, x, k)
    if not x.is_cpu:
        _launch(x, k, flags, output=o.ptr, lengths=own.ptr, row_starts=_pointer(starts), offsets=shift.ptr)
        return o.result()
    index = reference.topk.window_indices(x.numpy(), own.numpy(), _host(starts), k, bool(flags & _LARGE_TIES))
    o.write((index >= 0) * shift.numpy()[:, None] + index)
    return o.result()
