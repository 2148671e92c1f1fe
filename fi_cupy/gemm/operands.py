"""Checks and views that the scaled and the segmented products share."""

from __future__ import annotations

from typing import Any

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_aligned, check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.dtypes import FLOAT_TYPES, FP8_TYPES, INDEX_TYPES, DType, bfloat16, float8_e4m3fn, float32, uint8
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, DTypeError, LayoutError, ShapeError


def fp8_view(op: str, name: str, x: Any) -> View:
    """An fp8 operand; bytes (uint8) count as e4m3, which is how it travels through CuPy."""
    v = view(x, op, name)
    if v.dtype is uint8:
        v = v.typed(float8_e4m3fn)
    check_dtype(op, name, v, FP8_TYPES, "(or uint8: bytes of e4m3)")
    return v


def swapped(x: View) -> View:
    """The view with its last two axes exchanged."""
    shape = (*x.shape[:-2], x.shape[-1], x.shape[-2])
    strides = (*x.strides[:-2], x.strides[-1], x.strides[-2])
    host = None if x._host is None else x._host.swapaxes(-1, -2)
    return type(x)(x._framework, x.array, x.ptr, shape, strides, x.dtype, x.device, host)


def check_operand(op: str, name: str, x: View, ndim: int, multiple: int) -> None:
    """Rows that a kernel reads in pieces of 16 bytes, of a length that is a positive multiple of `multiple`."""
    check_ndim(op, name, x, ndim)
    if x.shape[-1] == 0 or x.shape[-1] % multiple:
        raise ShapeError(
            f"{op}: {name} has shape {x.shape}, expected a last dimension that is a positive multiple of {multiple}"
        )
    check_inner(op, name, x)
    check_aligned(op, name, x, 16)


def check_columns(op: str, name: str, shape: tuple[int, ...], n: int) -> None:
    """Results leave in pieces of 16 bytes: n is a positive multiple of 8."""
    if n % 8 or n == 0:
        raise ShapeError(f"{op}: {name} has shape {shape}, expected {n} columns to be a positive multiple of 8")


def output(op: str, like: View, shape: tuple[int, ...], out: Any, out_dtype: Any, default: DType = bfloat16) -> View:
    """The array to write: `out` checked, or a new one of `out_dtype` (by default `default`)."""
    kind = None if out_dtype is None else to_dtype(out_dtype)
    if kind is not None and kind not in FLOAT_TYPES:
        raise DTypeError(f"{op}: out_dtype is {kind.name}, expected bfloat16, float16 or float32")
    if out is None:
        return like.empty(shape, kind or default)
    o = view(out, op, "out").writable(op, "out")
    check_shape(op, "out", o, shape, "= (..., m, n)")
    allowed = FLOAT_TYPES if kind is None else (kind,)
    if o.dtype not in allowed:
        names = " or ".join(d.name for d in allowed)
        raise DTypeError(f"{op}: out has dtype {o.dtype.name}, expected {names}{' = out_dtype' if kind else ''}")
    check_device(op, like, out=o)
    check_inner(op, "out", o)
    check_aligned(op, "out", o, 16)
    return o


def scale_view(op: str, name: str, x: Any, like: View) -> View:
    """A float32 array of dequantisation multipliers on the operand's device."""
    v = view(x, op, name)
    check_dtype(op, name, v, (float32,))
    check_device(op, like, **{name: v})
    return v


def index_view(op: str, name: str, x: Any, like: View, size: int | None = None, meaning: str = "") -> View:
    """A dense int32 or int64 vector on the operand's device."""
    v = view(x, op, name)
    check_ndim(op, name, v, 1)
    check_dtype(op, name, v, INDEX_TYPES)
    check_device(op, like, **{name: v})
    if size is not None:
        check_shape(op, name, v, (size,), meaning)
    if not v.contiguous:
        raise LayoutError(f"{op}: {name} has strides {v.strides}, expected a dense vector")
    return v


def vector_scale(op: str, name: str, scale: Any, like: View, size: int, meaning: str) -> View:
    """One multiplier for all, or one for each of `size` rows (columns); any shape with that many elements."""
    v = scale_view(op, name, scale, like)
    if v.size not in (1, size) or sum(n > 1 for n in v.shape) > 1:
        raise ShapeError(f"{op}: {name} has shape {v.shape}, expected 1 element or {size} {meaning}")
    return v


def vector_stride(v: View) -> int:
    """Elements between the multipliers of neighbouring rows: 0 where one serves all."""
    return next((s for n, s in zip(v.shape, v.strides, strict=True) if n > 1), 0)


def check_choice(op: str, name: str, got: Any, allowed: tuple[Any, ...]) -> None:
    if got not in allowed:
        raise ArgumentError(f"{op}: {name} is {got!r}, expected {' or '.join(repr(x) for x in allowed)}")
