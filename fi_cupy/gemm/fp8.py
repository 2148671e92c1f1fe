"""Products of fp8 operands with dequantisation multipliers: a tensor, a row and a column, or a block of k each."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.device import device_info
from fi_cupy.dtypes import float8_e5m2
from fi_cupy.errors import ArgumentError, DTypeError, LayoutError, ShapeError, UnsupportedError
from fi_cupy.gemm import few_fp8
from fi_cupy.gemm.group import Scales, launch_group
from fi_cupy.gemm.hopper import launch_hopper_fp8
from fi_cupy.gemm.hopper_rows import launch_rows_fp8
from fi_cupy.gemm.operands import (
    check_choice,
    check_columns,
    check_operand,
    fp8_view,
    output,
    swapped,
    vector_scale,
    vector_stride,
)
from fi_cupy.gemm.route import on_hopper
from fi_cupy.gemm.select import HOPPER_ROWS_MAX

_MAX_BATCH = 65535  # the grid's third dimension


def _column_major(op: str, name: str, b: View, ndim: int) -> View:
    """b [.., k, n] with k dense, as it lies in memory: [.., n, k]."""
    check_ndim(op, name, b, ndim)
    if b.strides[-2] != 1 and b.shape[-2] != 1 and b.size:
        raise LayoutError(
            f"{op}: {name} has strides {b.strides} (elements), expected stride 1 along k: pass the transposed view of "
            "a row-major weight [n, k]"
        )
    w = swapped(b)
    check_operand(op, name, w, ndim, 16)
    return w


def _pair(op: str, a: View, w: View) -> None:
    """The operands' types and extents agree."""
    if a.dtype is float8_e5m2 and w.dtype is float8_e5m2:
        raise DTypeError(f"{op}: both operands are float8_e5m2, expected at least one float8_e4m3fn")
    if a.shape[-1] != w.shape[-1] or a.shape[:-2] != w.shape[:-2]:
        raise ShapeError(f"{op}: b has {w.shape[-1]} rows in {w.shape[:-2]} matrices, expected {a.shape[-1]} = "
                         f"a.shape[-1] in {a.shape[:-2]}")  # fmt: skip


def _scaled(
    op: str, out: View, a: View, w: View, a_scale: View, b_scale: View, bias: View | None, fast_accum: bool
) -> None:
    """One multiplier for all, or for each row and column."""
    if a.is_cpu:
        values = reference.gemm.scaled_mm(
            a.numpy(), w.numpy().swapaxes(-1, -2), a_scale.numpy(), b_scale.numpy(),
            None if bias is None else bias.numpy(), out_dtype=out.dtype.np,
        )  # fmt: skip
        out.write(values)
        return
    if out.size == 0:
        return
    if a.ndim == 3 and a.shape[0] > _MAX_BATCH:
        raise UnsupportedError(f"{op}: a has shape {a.shape}, expected a batch of at most {_MAX_BATCH}; split it")
    dense, device = vector_stride(a_scale) in (0, 1) and vector_stride(b_scale) in (0, 1), device_info(a.device)
    if dense and few_fp8.takes(device, a.shape[-2], w.shape[-2]):
        few_fp8.launch_few_fp8(out, a, w, _flat(a_scale), _flat(b_scale), bias=bias)
        return
    if dense and on_hopper(device, w.shape[-2], a, w, out):
        launch = launch_rows_fp8 if a.shape[-2] <= HOPPER_ROWS_MAX else launch_hopper_fp8
        launch(out, a, w, _flat(a_scale), _flat(b_scale), bias=bias, fast_accum=fast_accum)
        return
    launch_group(
        out, a, w, bias=bias, scale="end",
        a_scale=Scales(a_scale.ptr, vector_stride(a_scale)), b_scale=Scales(b_scale.ptr, vector_stride(b_scale)),
    )  # fmt: skip


@lru_cache(maxsize=64)
def _one(device: int) -> View:
    """The multiplier 1 on a device."""
    if device < 0:
        return view(np.ones(1, np.float32))
    import cupy

    with cupy.cuda.Device(device):
        made = cupy.ones(1, np.float32)
        cupy.cuda.get_current_stream().synchronize()  # read from any stream afterwards
    return view(made)


def _flat(scale: View) -> View:
    """A vector of multipliers without its axes of one element."""
    return View(scale._framework, scale.array, scale.ptr, (scale.size,), (1,), scale.dtype, scale.device, scale._host)


def bmm_fp8(
    A: Any, B: Any, A_scale: Any, B_scale: Any, dtype: Any, out: Any = None, backend: str = "auto", *,
    fast_accum: bool = False,
) -> Any:  # fmt: skip
    """Batched product of fp8 operands: ``A @ B * A_scale * B_scale``, accumulated in fp32 and rounded once.

    Parameters
    ----------
    A : array, [batch, m, k], float8_e4m3fn or float8_e5m2 (uint8: bytes of e4m3)
        k is a multiple of 16.
    B : array, [batch, k, n], fp8
        Column-major: the last two axes swapped of ``[batch, n, k]``. Not e5m2 where A is. n is a multiple of 8.
    A_scale, B_scale : array, float32, one element
        Dequantisation multipliers, on the operands' device.
    dtype : dtype
        Of the result: bfloat16, float16 or float32.
    out : array, [batch, m, n], optional
    backend : {"auto", "cudnn", "cublas", "cutlass"}
        FlashInfer's names are accepted; the kernel follows from the device.
    fast_accum : bool
        On Hopper, leave the sums in the tensor core's own accumulators, which keep about 14 bits: faster, and what
        cuBLAS calls the same. False adds partial sums in fp32, as all other architectures do anyway.

    Returns
    -------
    array
        ``[batch, m, n]``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, UnsupportedError

    Source
    ------
    flashinfer.gemm.bmm_fp8.
    """
    op = "bmm_fp8"
    check_choice(op, "backend", backend, ("auto", "cudnn", "cublas", "cutlass"))
    a, b = fp8_view(op, "A", A), fp8_view(op, "B", B)
    check_operand(op, "A", a, 3, 16)
    check_device(op, a, B=b)
    w = _column_major(op, "B", b, 3)
    _pair(op, a, w)
    check_columns(op, "B", b.shape, w.shape[-2])
    sa, sb = (vector_scale(op, name, s, a, 1, "for the whole tensor") for name, s in
              (("A_scale", A_scale), ("B_scale", B_scale)))  # fmt: skip
    o = output(op, a, (*a.shape[:2], w.shape[1]), out, dtype)
    _scaled(op, o, a, w, sa, sb, None, fast_accum)
    return o.result() if out is None else out


def mm_fp8(
    a: Any, b: Any, alpha: Any = None, out_dtype: Any = None, out: Any = None, backend: str = "auto", *,
    a_scale: Any = None, b_scale: Any = None, bias: Any = None, fast_accum: bool = False,
) -> Any:  # fmt: skip
    """Product of fp8 operands with one multiplier, or one a row of `a` and a column of `b`.

    ``out = (a @ b) * alpha + bias``, or ``(a @ b) * a_scale[:, None] * b_scale[None, :] + bias``.

    Parameters
    ----------
    a : array, [m, k], float8_e4m3fn or float8_e5m2 (uint8: bytes of e4m3)
        k is a multiple of 16.
    b : array, [k, n], fp8
        Column-major: ``weight.T`` of a row-major weight ``[n, k]``. n is a multiple of 8.
    alpha : array, float32, one element, optional
        The product of both tensors' multipliers; or pass the next two.
    out_dtype : dtype, optional
        bfloat16 (default), float16 or float32.
    out : array, [m, n], optional
    backend : {"auto"}
    a_scale, b_scale : array, float32, one element or [m] and [n], optional
    bias : array, [n], dtype of the result, optional
    fast_accum : bool
        On Hopper, leave the sums in the tensor core's own accumulators, which keep about 14 bits: faster, and what
        cuBLAS calls the same. False adds partial sums in fp32, as all other architectures do anyway.

    Returns
    -------
    array
        ``[m, n]``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.gemm.mm_fp8 (one multiplier); torch._scaled_mm (rows and columns).
    """
    op = "mm_fp8"
    check_choice(op, "backend", backend, ("auto",))
    x, y = fp8_view(op, "a", a), fp8_view(op, "b", b)
    check_operand(op, "a", x, 2, 16)
    check_device(op, x, b=y)
    w = _column_major(op, "b", y, 2)
    _pair(op, x, w)
    n = w.shape[0]
    check_columns(op, "b", y.shape, n)
    if (alpha is None) == (a_scale is None and b_scale is None) or (a_scale is None) != (b_scale is None):
        raise ArgumentError(f"{op}: expected either alpha or both of a_scale and b_scale")
    if alpha is not None:
        sa, sb = vector_scale(op, "alpha", alpha, x, 1, "for the whole product"), _one(x.device)
    else:
        sa = vector_scale(op, "a_scale", a_scale, x, x.shape[0], "= a.shape[0]")
        sb = vector_scale(op, "b_scale", b_scale, x, n, "= b.shape[1]")
    o = output(op, x, (x.shape[0], n), out, out_dtype)
    add = None
    if bias is not None:
        add = view(bias, op, "bias")
        check_shape(op, "bias", add, (n,), "= b.shape[1:]")
        check_dtype(op, "bias", add, (o.dtype,), "like the result")
        check_device(op, x, bias=add)
        check_inner(op, "bias", add)
    _scaled(op, o, x, w, sa, sb, add, fast_accum)
    return o.result() if out is None else out
