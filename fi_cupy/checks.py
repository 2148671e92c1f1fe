"""Checks before a launch: each error names operator, argument, what it got and what it wanted."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any

from fi_cupy.arrays import View
from fi_cupy.dtypes import DType, float32
from fi_cupy.errors import ArgumentError, DeviceError, DTypeError, LayoutError, ShapeError


def as_sizes(op: str, **given: Any) -> list[int]:
    """Numbers of heads, dimensions or tokens as Python's integers; NumPy's own overflow, and lack some methods.

    Raises
    ------
    ArgumentError
        One is no integer, or less than 1.
    """
    sizes = []
    for name, value in given.items():
        try:
            size = index(value)
        except TypeError:
            raise ArgumentError(f"{op}: {name} is {value!r}, expected an integer") from None
        if size < 1:
            raise ArgumentError(f"{op}: {name} is {value}, expected at least 1")
        sizes.append(size)
    return sizes


def check_shape(op: str, name: str, x: View, shape: tuple[int, ...], meaning: str = "") -> None:
    """Raise `ShapeError` unless ``x.shape == shape``; `meaning` says where the expectation comes from."""
    if x.shape != shape:
        raise ShapeError(f"{op}: {name} has shape {x.shape}, expected {shape}{f' {meaning}' if meaning else ''}")


def check_ndim(op: str, name: str, x: View, *ndims: int, meaning: str = "") -> None:
    """Raise `ShapeError` unless x has one of the given numbers of dimensions."""
    if len(x.shape) not in ndims:
        wanted = " or ".join(f"{n}-D" for n in ndims)
        raise ShapeError(f"{op}: {name} is {x.ndim}-D {x.shape}, expected {wanted}{f' {meaning}' if meaning else ''}")


def check_dtype(op: str, name: str, x: View, allowed: Sequence[DType], meaning: str = "") -> None:
    """Raise `DTypeError` unless x's type is allowed. float32 is always allowed on the CPU where a 16-bit type is."""
    if x.dtype in allowed:
        return
    if x.reference_types and x.dtype is float32 and any(d.itemsize == 2 and "float" in d.name for d in allowed):
        return
    names = " or ".join(d.name for d in allowed)
    raise DTypeError(f"{op}: {name} has dtype {x.dtype.name}, expected {names}{f' {meaning}' if meaning else ''}")


def check_device(op: str, reference: View, **others: View | None) -> None:
    """Raise `DeviceError` unless every view is on the device of the first."""
    for name, x in others.items():
        if x is not None and x.device != reference.device:
            wanted = f"{_place(reference.device)} like the first argument"
            raise DeviceError(f"{op}: {name} is on {_place(x.device)}, expected {wanted}")


def check_inner(op: str, name: str, x: View) -> None:
    """Raise `LayoutError` unless the last dimension is dense."""
    if x.strides and x.strides[-1] != 1 and x.shape[-1] != 1 and x.size:
        raise LayoutError(f"{op}: {name} has inner stride {x.strides[-1]}, expected 1 (strides {x.strides} elements)")


def check_aligned(op: str, name: str, x: View, nbytes: int) -> None:
    """Raise `LayoutError` unless the address and every outer stride are multiples of `nbytes` (GPU arrays only)."""
    if x.is_cpu:
        return
    size = x.dtype.itemsize
    if x.ptr % nbytes or any(s * size % nbytes for s, n in zip(x.strides[:-1], x.shape[:-1], strict=True) if n > 1):
        raise LayoutError(
            f"{op}: {name} starts at address ...{x.ptr % 256:#x} with strides {x.strides} (elements of {size} bytes), "
            f"expected multiples of {nbytes} bytes"
        )


def _place(device: int) -> str:
    return "the CPU" if device < 0 else f"cuda:{device}"
