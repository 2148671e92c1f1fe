"""A key-value cache argument as two views with page, token and head strides: packed or a pair, NHD or HND."""

from __future__ import annotations

from typing import Any, NamedTuple

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_aligned, check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.dtypes import DType, uint8
from fi_cupy.errors import ArgumentError

LAYOUTS = ("NHD", "HND")


def check_layout(op: str, kv_layout: str) -> str:
    """`kv_layout` if it is one of NHD and HND."""
    if not isinstance(kv_layout, str) or kv_layout not in LAYOUTS:
        raise ArgumentError(f"{op}: kv_layout is {kv_layout!r}, expected 'NHD' or 'HND'")
    return kv_layout


class PagedKV(NamedTuple):
    """Keys and values, ``[pages, page_size, heads, dim]`` (NHD) or ``[pages, heads, page_size, dim]`` (HND) each."""

    k: View
    v: View


def as_fp8(x: View, dtype: DType) -> View:
    """`x` with its type where fp8 travels as bytes."""
    return x.typed(dtype) if x.dtype is uint8 and dtype.itemsize == 1 else x


def row_alignment(dtype: DType, dim: int) -> int:
    """Bytes that rows of `dim` elements are aligned to, since kernels read them in pieces of that size."""
    return 16 if dim * dtype.itemsize % 16 == 0 else 8


def half_of(packed: View, index: int) -> View:
    """``packed[:, index]`` without the framework's own indexing (which costs microseconds)."""
    shape, strides = packed.shape, packed.strides
    host = None if not packed.is_cpu else packed.numpy()[:, index]
    return View(
        packed._framework, packed.array, packed.ptr + index * strides[1] * packed.dtype.itemsize,
        (shape[0], *shape[2:]), (strides[0], *strides[2:]), packed.dtype, packed.device, host,
    )  # fmt: skip


def paged_kv(op: str, cache: Any, name: str = "paged_kv_cache") -> PagedKV:
    """Split the cache argument: a 5-D array packed along dimension 1, or a pair of 4-D arrays."""
    if isinstance(cache, (tuple, list)):
        if len(cache) != 2:
            raise ArgumentError(
                f"{op}: {name} is a sequence of {len(cache)}, expected (keys, values) or one packed array"
            )
        k, v = view(cache[0], op, f"{name}[0]"), view(cache[1], op, f"{name}[1]")
        check_ndim(op, f"{name}[0]", k, 4)
        return PagedKV(k, v)
    packed = view(cache, op, name)
    check_ndim(op, name, packed, 5, meaning="(packed keys and values; or pass a pair of 4-D arrays)")
    if packed.shape[1] != 2:
        raise ArgumentError(
            f"{op}: {name} has shape {packed.shape}, expected [pages, 2, ...] with keys and values in dim 1"
        )
    return PagedKV(half_of(packed, 0), half_of(packed, 1))


def token_strides(x: View, kv_layout: str) -> tuple[int, int, int]:
    """(page, token, head) strides in elements."""
    page, a, b, _ = x.strides
    return (page, a, b) if kv_layout == "NHD" else (page, b, a)


def check_paged_kv(
    op: str, kv: PagedKV, like: View, dtype: DType, page_size: int, num_kv_heads: int, head_dim: int, kv_layout: str
) -> PagedKV:
    """Hold both halves to the plan; CuPy's fp8 (bytes) gets its type. Rows are aligned as `row_alignment` says."""
    inner = (page_size, num_kv_heads, head_dim) if kv_layout == "NHD" else (num_kv_heads, page_size, head_dim)
    halves = []
    for name, x in (("keys", kv.k), ("values", kv.v)):
        x = as_fp8(x, dtype)
        if x.shape[1:] != inner:
            check_shape(
                op, f"paged_kv_cache ({name})", x, (x.shape[0], *inner), f"= [pages, ...] in layout {kv_layout}"
            )
        if x.dtype is not dtype:
            check_dtype(op, f"paged_kv_cache ({name})", x, (dtype,), "= kv_data_type of the plan")
        if x.device != like.device:
            check_device(op, like, paged_kv_cache=x)
        check_inner(op, f"paged_kv_cache ({name})", x)
        check_aligned(op, f"paged_kv_cache ({name})", x, row_alignment(dtype, head_dim))
        halves.append(x)
    if halves[0].shape[0] != halves[1].shape[0]:
        raise ArgumentError(
            f"{op}: keys have {halves[0].shape[0]} pages and values {halves[1].shape[0]}, expected the same"
        )
    return PagedKV(*halves)
