"""Dense products of 16-bit operands: `mm_bf16` and `bmm_bf16`."""

from __future__ import annotations

from typing import Any

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_aligned, check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.device import device_info
from fi_cupy.dtypes import FLOAT_TYPES, HALF_TYPES
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, DTypeError, LayoutError, ShapeError, UnsupportedError
from fi_cupy.gemm import hopper, hopper_rows
from fi_cupy.gemm.group import launch_group
from fi_cupy.gemm.instances import with_residual
from fi_cupy.gemm.operands import check_choice, swapped
from fi_cupy.gemm.route import on_hopper
from fi_cupy.gemm.select import FEW_MAX, HOPPER_ROWS_MAX, select_gated_kernel, select_rms_kernel
from fi_cupy.gemm.tuning import choose_mm_kernel
from fi_cupy.jit.kernel import load_kernel

_MAX_BATCH = 65535  # the grid's third dimension


def _fits(x: View, ndim: int) -> bool:
    """Whether kernels can read or write x in 16-byte pieces of rows: the question of every call, asked in one go."""
    strides, per_piece = x.strides, 16 // x.dtype.itemsize
    return (
        len(strides) == ndim
        and strides[-1] == 1
        and x.ptr % 16 == 0
        and strides[0] % per_piece == 0
        and (ndim == 2 or strides[1] % per_piece == 0)
    )


def _operands(op: str, a: View, b: View, ndim: int) -> bool:
    """Check both operands; True if b is dense along n ("row-major") instead of along k."""
    if not _fits(a, ndim):  # or it has strides that do not matter
        check_ndim(op, "a", a, ndim)
        check_inner(op, "a", a)
        check_aligned(op, "a", a, 16)
    if len(b.shape) != ndim:
        check_ndim(op, "b", b, ndim)
    if b.dtype is not a.dtype or b.device != a.device or a.dtype not in HALF_TYPES:
        check_dtype(op, "a", a, HALF_TYPES)
        check_dtype(op, "b", b, (a.dtype,), "like a")
        check_device(op, a, b=b)
    k, n = b.shape[-2:]
    if a.shape[-1] != k or a.shape[:-2] != b.shape[:-2]:
        check_shape(op, "b", b, (*a.shape[:-2], a.shape[-1], n), "= (..., a.shape[-1], n)")
    if k % 8 or k == 0:
        raise ShapeError(f"{op}: a has shape {a.shape}, expected a last dimension that is a positive multiple of 8")
    if n % 8 or n == 0:
        raise ShapeError(f"{op}: b has shape {b.shape}, expected a last dimension that is a positive multiple of 8")
    if b.strides[-2] == 1:
        row_major, outer = False, b.strides[-1]
    elif b.strides[-1] == 1:
        row_major, outer = True, b.strides[-2]
    else:
        raise LayoutError(
            f"{op}: b has strides {b.strides} (elements), expected stride 1 along k: pass weight.T (batched: the last "
            "two axes swapped) of a row-major weight [n, k]; stride 1 along n is taken too, slower for few rows"
        )
    if not b.is_cpu and (b.ptr % 16 or outer % 8 or (ndim == 3 and b.shape[0] > 1 and b.strides[0] % 8)):
        raise LayoutError(
            f"{op}: b starts at address ...{b.ptr % 256:#x} with strides {b.strides} (elements), "
            "expected multiples of 16 bytes"
        )
    return row_major


def _output(op: str, a: View, shape: tuple[int, ...], out: Any, out_dtype: Any) -> View:
    kind = None if out_dtype is None else to_dtype(out_dtype)
    if kind is not None and kind not in FLOAT_TYPES:
        raise DTypeError(f"{op}: out_dtype is {kind.name}, expected bfloat16, float16 or float32")
    if out is None:
        return a.empty(shape, kind or a.dtype)
    o = view(out, op, "out").writable(op, "out")
    allowed = FLOAT_TYPES if kind is None else (kind,)
    if o.shape != shape or o.dtype not in allowed or o.device != a.device or not _fits(o, len(shape)):
        check_shape(op, "out", o, shape, "= (..., m, n)")
        if o.dtype not in allowed:
            names = " or ".join(d.name for d in allowed)
            raise DTypeError(f"{op}: out has dtype {o.dtype.name}, expected {names}{' = out_dtype' if kind else ''}")
        check_device(op, a, out=o)
        check_inner(op, "out", o)
        check_aligned(op, "out", o, 16)
    return o


def _multiply(
    op: str, a: View, b: View, bias: View | None, residual: View | None, out: View, row_major_b: bool, pdl: bool,
    batched: bool, chosen: Any = None,
) -> None:  # fmt: skip
    """Launch what `chosen` (a kernel and its grid) says, by default what the tuner or the heuristic chooses."""
    m, k = a.shape[-2:]
    n = b.shape[-1]
    batch = a.shape[0] if batched else 1
    if m == 0 or batch == 0:
        return
    if batch > _MAX_BATCH:
        raise UnsupportedError(f"{op}: a has shape {a.shape}, expected a batch of at most {_MAX_BATCH}; split it")
    w = b if row_major_b else swapped(b)
    portable = not (hopper.mappable(a) and hopper.mappable(out) and hopper.mappable(w))
    spec, grid = chosen or choose_mm_kernel(
        op, (m, n, k, device_info(a.device), a.dtype, out.dtype, row_major_b, batch, pdl, portable)
    )
    if spec.params is hopper.PARAMS:
        hopper.launch(spec, grid, out, a, w, batch=batch, bias=bias, residual=residual, pdl=pdl)
        return
    load_kernel(spec if residual is None else with_residual(spec), a.device).launch(
        grid, a.stream(),
        a.ptr, b.ptr, 0 if bias is None else bias.ptr, out.ptr,
        a.strides[-2], b.strides[-2] if row_major_b else b.strides[-1], out.strides[-2],
        a.strides[0] if batched else 0, b.strides[0] if batched else 0, out.strides[0] if batched else 0,
        m, n, k, 0 if residual is None else residual.ptr, 0 if residual is None else residual.strides[-2], 0, pdl=pdl,
    )  # fmt: skip


def _multiply_rms(
    op: str, a: View, w: View, bias: View | None, residual: View | None, out: View, rms_eps: float, gated: bool,
    pdl: bool,
) -> None:  # fmt: skip
    """Rows of a divided by their root mean square; w: [n, k], or [2 n, k] if gated."""
    (m, k), n, device = a.shape, out.shape[1], device_info(a.device)
    if m == 0:
        return
    chosen = select_rms_kernel(m, n, k, device, a.dtype, out.dtype, gated=gated, pdl=pdl)
    if chosen is None:
        raise UnsupportedError(
            f"{op}: rms_eps is given with {m} rows of {a.dtype.name} on {device.arch}, expected at most {FEW_MAX}, "
            "and tensor cores that have the type; apply fi_cupy.norm.rmsnorm first"
        )
    spec, grid = chosen
    load_kernel(spec, a.device).launch(
        grid, a.stream(), a.ptr, w.ptr, 0 if bias is None else bias.ptr, out.ptr, a.strides[0], w.strides[0],
        out.strides[0], 0, 0, 0, m, n, k, 0 if residual is None else residual.ptr,
        0 if residual is None else residual.strides[0], 0, rms_eps, pdl=pdl,
    )  # fmt: skip


def takes_rms(a: Any) -> bool:
    """Whether products of `a` should normalise its rows themselves: where a GPU's kernel does.

    CPU arrays, for which `rms_eps` is never refused, follow the usual GPU, so that both round at the same places.
    """
    x = view(a, "takes_rms", "a")
    if x.is_cpu:
        return x.shape[0] <= FEW_MAX
    return select_rms_kernel(max(x.shape[0], 1), 8, 8, device_info(x.device), x.dtype) is not None


def _rms_eps(op: str, rms_eps: float | None, row_major_b: bool) -> float | None:
    if rms_eps is None:
        return None
    if not 0 <= rms_eps < float("inf"):
        raise ArgumentError(f"{op}: rms_eps is {rms_eps}, expected a number of at least 0")
    if row_major_b:
        raise LayoutError(f"{op}: rms_eps is given with a b dense along n, expected stride 1 along k: pass weight.T")
    return float(rms_eps)


#: FlashInfer's names; the kernel follows from shapes and device whatever the name.
_BACKENDS = ("auto", "cudnn", "cutlass", "cublaslt", "tgv")


def _bias(op: str, bias: Any, like: View, n: int, meaning: str) -> View | None:
    if bias is None:
        return None
    add = view(bias, op, "bias")
    check_shape(op, "bias", add, (n,), meaning)
    check_dtype(op, "bias", add, (like.dtype,), "like a")
    check_device(op, like, bias=add)
    check_inner(op, "bias", add)
    return add


def _residual(op: str, residual: Any, out: View) -> View | None:
    if residual is None:
        return None
    add = view(residual, op, "residual")
    check_shape(op, "residual", add, out.shape, "= (m, n)")
    if add.dtype is not out.dtype:
        raise DTypeError(f"{op}: residual has dtype {add.dtype.name}, expected {out.dtype.name} like the result")
    check_device(op, out, residual=add)
    check_inner(op, "residual", add)
    check_aligned(op, "residual", add, 16)
    return add


def mm_bf16(
    a: Any, b: Any, bias: Any = None, pdl: bool = False, out: Any = None, out_dtype: Any = None, backend: str = "auto",
    *, residual: Any = None, rms_eps: float | None = None,
) -> Any:  # fmt: skip
    """Matrix product of 16-bit operands: ``a @ b + bias + residual``, accumulated in fp32 and rounded once.

    Parameters
    ----------
    a : array, [m, k], bfloat16 or float16
        Rows may be strided, by multiples of 16 bytes; m may be 0, k is a multiple of 8.
    b : array, [k, n], dtype of `a`
        Column-major: ``weight.T`` of a row-major weight ``[n, k]``. A row-major b is taken as well, through the kernel
        for many rows only, so few rows are slower. n is a multiple of 8.
    bias : array, [n], dtype of `a`, optional
    pdl : bool
        Programmatic dependent launch (sm_90 and later): the kernel starts before its predecessor in the stream has
        ended and reads `b` at once; `a`, `bias` and `out` wait. Only for a constant weight: not for a `b` that the
        predecessor writes, nor one written by a kernel before it, which may still run where the predecessor was
        launched so, too (as norms, rope and others are by default).
    out : array, [m, n], optional
        Written and returned instead of a new array; rows may be strided, by multiples of 16 bytes.
    out_dtype : dtype, optional
        bfloat16, float16 or float32; by default that of `out`, else of `a`.
    backend : {"auto", "cudnn", "cutlass", "cublaslt", "tgv"}
        FlashInfer's names are accepted; the kernel follows from the shape and the device (`fi_cupy.gemm.select`), or
        from what the tuner has measured (`fi_cupy.autotuner`).
    residual : array, [m, n], dtype of the result, optional
        Added before the rounding; may be `out` itself. Rows may be strided, by multiples of 16 bytes.
    rms_eps : float, optional
        Multiply ``a / sqrt(mean(a², of a row) + rms_eps)`` instead of a, unrounded: an RMSNorm whose weight b has taken
        in (``weight * norm_weight``). For a column-major b and, on a GPU, at most 16 rows of a type that its tensor
        cores have (`fi_cupy.gemm.dense.takes_rms`).

    Returns
    -------
    array
        ``[m, n]``. Bit-identical from run to run; the order of summation depends on m, n, k, `pdl`, the
        device and what the tuner knows (`fi_cupy.autotuner`).

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError, UnsupportedError

    Source
    ------
    flashinfer.gemm.mm_bf16.

    Examples
    --------
    >>> import numpy as np, fi_cupy.gemm
    >>> a, weight = np.ones((2, 8), np.float32), np.full((8, 8), 0.5, np.float32)
    >>> fi_cupy.gemm.mm_bf16(a, weight.T)[0, :3]
    array([4., 4., 4.], dtype=float32)
    """
    op = "mm_bf16"
    check_choice(op, "backend", backend, _BACKENDS)
    x, w = view(a, op, "a"), view(b, op, "b")
    row_major_b = _operands(op, x, w, 2)
    n = w.shape[1]
    add = _bias(op, bias, x, n, "= b.shape[1:]")
    o = _output(op, x, (x.shape[0], n), out, out_dtype)
    plus = _residual(op, residual, o)
    eps = _rms_eps(op, rms_eps, row_major_b and not x.is_cpu)
    if x.is_cpu:
        o.write(
            reference.gemm.mm(
                x.numpy(), w.numpy(), None if add is None else add.numpy(), o.dtype.np,
                None if plus is None else plus.numpy(), eps,
            )
        )  # fmt: skip
    elif eps is not None:
        _multiply_rms(op, x, swapped(w), add, plus, o, eps, False, bool(pdl))
    else:
        _multiply(op, x, w, add, plus, o, row_major_b, bool(pdl), batched=False)
    return o.result() if out is None else out


def mm_bf16_swiglu(
    a: Any, b: Any, *, pdl: bool = False, out: Any = None, bias: Any = None, out_dtype: Any = None,
    rms_eps: float | None = None,
) -> Any:  # fmt: skip
    """Gated product in one launch: ``silu(a @ gate) * (a @ up)`` with ``gate, up = b[:, :n], b[:, n:]``.

    Parameters
    ----------
    a : array, [m, k], bfloat16 or float16
        Rows may be strided, by multiples of 16 bytes; k is a multiple of 8.
    b : array, [k, 2 * n], dtype of `a`
        Column-major: ``weight.T`` of a row-major weight ``[2 * n, k]``, the gate's rows first. n is a multiple of 8.
    pdl : bool
        As in `mm_bf16`.
    out : array, [m, n], optional
    bias : array, [2 * n], dtype of `a`, optional
        Added to both products before the activation.
    out_dtype : dtype, optional
        By default that of `out`, else of `a`.
    rms_eps : float, optional
        As in `mm_bf16`.

    Returns
    -------
    array
        ``[m, n]``, computed in fp32 and rounded once.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError, UnsupportedError

    Source
    ------
    Shazeer 2020 (arXiv:2002.05202); flashinfer.gemm.mm_bf16_swiglu.
    """
    op = "mm_bf16_swiglu"
    x, w = view(a, op, "a"), view(b, op, "b")
    if _operands(op, x, w, 2):
        raise LayoutError(f"{op}: b has strides {w.strides} (elements), expected stride 1 along k: pass weight.T")
    n, odd = divmod(w.shape[1], 2)
    if odd or n % 8:
        raise ShapeError(f"{op}: b has shape {w.shape}, expected a last dimension that is a multiple of 16")
    add = _bias(op, bias, x, 2 * n, "= b.shape[1:]")
    o = _output(op, x, (x.shape[0], n), out, out_dtype)
    eps = _rms_eps(op, rms_eps, False)
    if x.is_cpu:
        o.write(reference.gemm.mm_swiglu(x.numpy(), w.numpy(), None if add is None else add.numpy(), o.dtype.np, eps))
    elif eps is not None:
        _multiply_rms(op, x, swapped(w), add, None, o, eps, True, bool(pdl))
    elif x.shape[0]:
        _multiply_gated(x, swapped(w), add, o, bool(pdl))
    return o.result() if out is None else out


def _multiply_gated(a: View, w: View, bias: View | None, out: View, pdl: bool) -> None:
    """w: [2 n, k]."""
    (m, k), n, device = a.shape, out.shape[1], device_info(a.device)
    chosen = select_gated_kernel(m, n, k, device, a.dtype, out.dtype)
    if chosen is not None:
        spec, grid = chosen
        load_kernel(spec, a.device).launch(
            grid, a.stream(), a.ptr, w.ptr, 0 if bias is None else bias.ptr, out.ptr, a.strides[0], w.strides[0],
            out.strides[0], 0, 0, 0, m, n, k, 0, 0, 0, pdl=pdl,
        )  # fmt: skip
    elif on_hopper(device, n, a, w, out):
        launch = hopper_rows.launch_rows_mm if m <= HOPPER_ROWS_MAX else hopper.launch_hopper_mm
        launch(out, a, w, bias=bias, gated=True, pdl=pdl)
    else:
        launch_group(out, a, w, bias=bias, gated=True, pdl=pdl)


def bmm_bf16(A: Any, B: Any, out: Any = None, out_dtype: Any = None, backend: str = "auto") -> Any:
    """Batched matrix product of 16-bit operands: ``A @ B``, accumulated in fp32 and rounded once.

    Parameters
    ----------
    A : array, [batch, m, k], bfloat16 or float16
    B : array, [batch, k, n], dtype of `A`
        Column-major (the last two axes swapped of ``[batch, n, k]``) or row-major, as in `mm_bf16`.
    out : array, [batch, m, n], optional
    out_dtype, backend
        As in `mm_bf16`.

    Returns
    -------
    array
        ``[batch, m, n]``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError, UnsupportedError

    Source
    ------
    flashinfer.gemm.bmm_bf16.
    """
    op = "bmm_bf16"
    check_choice(op, "backend", backend, _BACKENDS)
    x, w = view(A, op, "a"), view(B, op, "b")
    row_major_b = _operands(op, x, w, 3)
    o = _output(op, x, (x.shape[0], x.shape[1], w.shape[2]), out, out_dtype)
    if x.is_cpu:
        o.write(reference.gemm.bmm(x.numpy(), w.numpy(), out_dtype=o.dtype.np))
    else:
        _multiply(op, x, w, None, None, o, row_major_b, pdl=False, batched=True)
    return o.result() if out is None else out
