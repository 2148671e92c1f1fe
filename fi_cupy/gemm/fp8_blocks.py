"""Products of fp8 operands with a multiplier for every block of rows, columns and k, DeepSeek-V3's for example."""

from __future__ import annotations

from typing import Any

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import as_sizes, check_device, check_dtype, check_ndim, check_shape
from fi_cupy.device import device_info
from fi_cupy.dtypes import FP8_TYPES, HALF_TYPES, float8_e4m3fn, uint8
from fi_cupy.errors import ArgumentError, ShapeError
from fi_cupy.gemm import few_fp8
from fi_cupy.gemm.group import SCALE_STEP, Scales, launch_group
from fi_cupy.gemm.hopper import launch_hopper_fp8_blocks
from fi_cupy.gemm.hopper_rows import launch_rows_fp8_blocks
from fi_cupy.gemm.operands import (
    check_choice,
    check_columns,
    check_operand,
    fp8_view,
    index_view,
    output,
    scale_view,
    swapped,
)
from fi_cupy.gemm.quantise import expand_scales, quantise_rows
from fi_cupy.gemm.route import on_hopper
from fi_cupy.gemm.select import HOPPER_ROWS_MAX

Granularity = tuple[int, int, int]


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _granularity(op: str, value: Any) -> Granularity:
    """(rows of a, rows of b, elements of k) under one scale."""
    sizes = tuple(as_sizes(op, **{f"scale_granularity_mnk[{i}]": x for i, x in enumerate(value)}))
    if len(sizes) != 3 or max(sizes) >= 1 << 31 or sizes[2] % SCALE_STEP:
        raise ArgumentError(
            f"{op}: scale_granularity_mnk is {value!r}, expected three positive sizes, the last "
            f"a multiple of {SCALE_STEP}"
        )
    return sizes[0], sizes[1], sizes[2]


def _scale(op: str, name: str, scale: Any, like: View, major: str, rows: int, blocks_k: int, lead: int | None) -> View:
    """A scale array checked, as [(weights,) rows, blocks of k] whatever its major mode."""
    v = scale_view(op, name, scale, like)
    check_ndim(op, name, v, 2 if lead is None else 3)
    if major == "MN":
        v = swapped(v)
    got_rows, got_k = v.shape[-2:]
    padded = major == "MN" and lead is None  # FlashInfer pads the rows of an MN-major a_scale to a multiple of 4
    rows_fit = got_rows >= rows if padded else got_rows == rows
    if got_k != blocks_k or not rows_fit or (lead is not None and v.shape[0] != lead):
        wanted = (rows, blocks_k) if major == "K" else (blocks_k, rows)
        full = wanted if lead is None else (lead, *wanted)
        shape = view(scale).shape
        raise ShapeError(f"{op}: {name} has shape {shape}, expected {full} for scale_major_mode {major!r}")
    return v


def _run(
    out: View, a: View, w: View, sa: View, sb: View, sizes: Granularity, major: str, indptr: View | None,
    weight_indices: View | None = None, rows: int = 0,
) -> None:  # fmt: skip
    """`rows` of a segment to expect where the number of segments does not tell; indices are for GPU arrays."""
    gm, gn, gk = sizes
    if a.is_cpu:
        out.write(
            reference.gemm.gemm_fp8_nt_groupwise(
                a.numpy(), w.numpy(), sa.numpy(), sb.numpy(), "K", sizes, out.dtype.np,
                None if indptr is None else indptr.numpy(), None if indptr is None else out.numpy(),
            )
        )  # fmt: skip
        return
    k, device = a.shape[1], device_info(a.device)
    plain = a.dtype is w.dtype is float8_e4m3fn and (gn, gk) == (SCALE_STEP, SCALE_STEP) and k % SCALE_STEP == 0
    few = plain and indptr is None and few_fp8.takes(device, a.shape[0], w.shape[-2])
    if few or (plain and a.shape[0] and on_hopper(device, w.shape[-2], a, w, out)):
        stored = (swapped(sa), swapped(sb)) if major == "MN" else (sa, sb)
        if gm != 1:  # the Hopper kernels read a multiplier a row, MN-major best
            stored, major = (expand_scales(a, sa, gm), swapped(sb)), "MN"
        if few:
            few_fp8.launch_few_fp8_blocks(out, a, w, *stored, scale_major_mode=major)
        elif indptr is None and a.shape[0] <= HOPPER_ROWS_MAX:
            launch_rows_fp8_blocks(out, a, w, *stored, scale_major_mode=major)
        else:
            launch_hopper_fp8_blocks(
                out, a, w, *stored, scale_major_mode=major, indptr=indptr, weight_indices=weight_indices, rows=rows
            )
        return
    launch_group(
        out, a, w, indptr=indptr, weight_indices=weight_indices, scale="blocks", scale_k=gk,
        a_scale=Scales(sa.ptr, sa.strides[0], sa.strides[1], 0, gm),
        b_scale=Scales(sb.ptr, sb.strides[-2], sb.strides[-1], sb.strides[0] if sb.ndim == 3 else 0, gn),
    )  # fmt: skip


def _operands(op: str, a: Any, b: Any, ndim_b: int) -> tuple[View, View]:
    x, w = fp8_view(op, "a", a), fp8_view(op, "b", b)
    check_operand(op, "a", x, 2, 16)
    check_operand(op, "b", w, ndim_b, 16)
    check_device(op, x, b=w)
    if x.shape[-1] != w.shape[-1]:
        check_shape(op, "b", w, (*w.shape[:-1], x.shape[-1]), "= (..., n, a.shape[-1])")
    check_columns(op, "b", w.shape, w.shape[-2])
    return x, w


def gemm_fp8_nt_groupwise(
    a: Any, b: Any, a_scale: Any, b_scale: Any, scale_major_mode: str | None = "MN", mma_sm: int = 1,
    scale_granularity_mnk: Granularity = (1, 128, 128), out: Any = None, out_dtype: Any = None, backend: str = "auto",
) -> Any:  # fmt: skip
    """``dequant(a) @ dequant(b).T`` with a multiplier for every block of `scale_granularity_mnk` = (gm, gn, gk).

    Products of gk elements are summed, scaled and added up in fp32.

    Parameters
    ----------
    a : array, [m, k], float8_e4m3fn or float8_e5m2 (uint8: bytes of e4m3)
        k is a multiple of 16.
    b : array, [n, k], fp8
        n is a multiple of 8.
    a_scale : array, float32
        "MN": ``[ceil(k / gk), ceil(m / gm)]``, the second extent may be padded; "K": ``[ceil(m / gm), ceil(k / gk)]``.
    b_scale : array, float32
        "MN": ``[ceil(k / gk), ceil(n / gn)]``; "K": ``[ceil(n / gn), ceil(k / gk)]``.
    scale_major_mode : {"MN", "K"}
        None means "MN".
    mma_sm : {1, 2}
        A tuning hint for FlashInfer's Blackwell kernel; the result does not depend on it.
    scale_granularity_mnk : (int, int, int)
        gk is a multiple of 128; on Hopper e4m3 with gn = gk = 128 takes the fast kernel.
    out : array, [m, n], optional
    out_dtype : dtype, optional
        bfloat16 (default), float16 or float32.
    backend : {"auto", "cutlass", "trtllm"}
        FlashInfer's names are accepted; the kernel follows from the device.

    Returns
    -------
    array
        ``[m, n]``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    DeepSeek-V3 report, section 3.3; flashinfer.gemm.gemm_fp8_nt_groupwise.
    """
    return _dense("gemm_fp8_nt_groupwise", a, b, a_scale, b_scale, scale_major_mode, mma_sm, scale_granularity_mnk, out,
                  out_dtype, backend)  # fmt: skip


def _dense(
    op: str, a: Any, b: Any, a_scale: Any, b_scale: Any, major: str | None, mma_sm: int, sizes: Any, out: Any,
    out_dtype: Any, backend: str,
) -> Any:  # fmt: skip
    major = "MN" if major is None else major
    check_choice(op, "scale_major_mode", major, ("MN", "K"))
    check_choice(op, "mma_sm", mma_sm, (1, 2))
    check_choice(op, "backend", backend, ("auto", "cutlass", "trtllm"))
    x, w = _operands(op, a, b, 2)
    (m, k), n = x.shape, w.shape[0]
    gm, gn, gk = sizes = _granularity(op, sizes)
    sa = _scale(op, "a_scale", a_scale, x, major, _up(m, gm), _up(k, gk), None)
    sb = _scale(op, "b_scale", b_scale, x, major, _up(n, gn), _up(k, gk), None)
    o = output(op, x, (m, n), out, out_dtype)
    _run(o, x, w, sa, sb, sizes, major, None)
    return o.result() if out is None else out


def gemm_fp8_nt_blockscaled(
    a: Any, b: Any, a_scale: Any, b_scale: Any, scale_major_mode: str | None = "MN", mma_sm: int = 1, out: Any = None,
    out_dtype: Any = None,
) -> Any:  # fmt: skip
    """`gemm_fp8_nt_groupwise` with one multiplier for 128 rows, 128 columns and 128 elements of k.

    Parameters, result and errors as there. Source: flashinfer.gemm.gemm_fp8_nt_blockscaled.
    """
    return _dense("gemm_fp8_nt_blockscaled", a, b, a_scale, b_scale, scale_major_mode, mma_sm, (128, 128, 128), out,
                  out_dtype, "auto")  # fmt: skip


def group_gemm_fp8_nt_groupwise(
    a: Any, b: Any, a_scale: Any, b_scale: Any, m_indptr: Any, scale_granularity_mnk: Granularity = (1, 128, 128),
    scale_major_mode: str = "MN", mma_sm: int = 1, out: Any = None, out_dtype: Any = None,
) -> Any:  # fmt: skip
    """Groups of rows, each with its own fp8 weight, and block multipliers, in one launch.

    Parameters
    ----------
    a : array, [cum_m, k], fp8
    b : array, [groups, n, k], fp8
    a_scale : array, float32
        "MN": ``[ceil(k / gk), cum_m]`` (may be padded); "K": ``[cum_m, ceil(k / gk)]``; blocks of gm rows are counted
        from row 0 of `a`.
    b_scale : array, float32
        "MN": ``[groups, ceil(k / gk), ceil(n / gn)]``; "K": ``[groups, ceil(n / gn), ceil(k / gk)]``.
    m_indptr : array, int32 or int64 [groups + 1]
        Rows of each group; read on the device, any lengths.
    scale_granularity_mnk, scale_major_mode, mma_sm, out_dtype
        As in `gemm_fp8_nt_groupwise`.
    out : array, [cum_m, n], optional
        Rows outside every group are left as they are.

    Returns
    -------
    array
        ``[cum_m, n]``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.gemm.group_gemm_fp8_nt_groupwise.
    """
    op = "group_gemm_fp8_nt_groupwise"
    check_choice(op, "scale_major_mode", scale_major_mode, ("MN", "K"))
    check_choice(op, "mma_sm", mma_sm, (1, 2))
    x, w = _operands(op, a, b, 3)
    (m, k), (groups, n) = x.shape, w.shape[:2]
    gm, gn, gk = sizes = _granularity(op, scale_granularity_mnk)
    indptr = index_view(op, "m_indptr", m_indptr, x, groups + 1, "= (b.shape[0] + 1,)")
    sa = _scale(op, "a_scale", a_scale, x, scale_major_mode, _up(m, gm), _up(k, gk), None)
    sb = _scale(op, "b_scale", b_scale, x, scale_major_mode, _up(n, gn), _up(k, gk), groups)
    o = output(op, x, (m, n), out, out_dtype)
    _run(o, x, w, sa, sb, sizes, scale_major_mode, indptr)
    return o.result() if out is None else out


def fp8_blockscale_gemm_sm90(
    input: Any, weight: Any, input_scale: Any = None, weight_scale: Any = None, out: Any = None, out_dtype: Any = None
) -> Any:
    """Block-scaled product that quantises 16-bit operands itself: ``input @ weight.T``.

    Parameters
    ----------
    input : array, [m, k], bfloat16, float16 or float8_e4m3fn
        16-bit rows are quantised here, a multiplier for each 128 elements. k is a multiple of 128.
    weight : array, [n, k], bfloat16, float16 or float8_e4m3fn
        16-bit weights are quantised here in the same way, which costs their reading: better once, beforehand.
    input_scale : array, float32 [m, k / 128]
        With an fp8 `input`, and only then.
    weight_scale : array, float32 [ceil(n / 128), k / 128] or [n, k / 128]
        With an fp8 `weight`, and only then.
    out : array, [m, n], optional
    out_dtype : dtype, optional
        bfloat16 (default), float16 or float32.

    Returns
    -------
    array
        ``[m, n]``. Runs on every architecture, in spite of the name.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.gemm.fp8_blockscale_gemm_sm90.
    """
    op = "fp8_blockscale_gemm_sm90"
    x, sa = _scaled_operand(op, "input", input, input_scale)
    w, sb = _scaled_operand(op, "weight", weight, weight_scale)
    check_device(op, x, weight=w)
    (m, k), n = x.shape, w.shape[0]
    check_shape(op, "weight", w, (n, k), "= (n, input.shape[1])")
    check_columns(op, "weight", w.shape, n)
    if sa is not None:
        check_shape(op, "input_scale", sa, (m, k // 128), "= (m, k / 128)")
    gn = 1 if (sb is None or sb.shape[0] == n) and n != _up(n, 128) else 128
    if sb is not None:
        check_shape(op, "weight_scale", sb, (_up(n, gn), k // 128), "= (ceil(n / 128), k / 128)")
    o = output(op, x, (m, n), out, out_dtype)
    x, sa = (x, sa) if sa is not None else quantise_rows(x)
    w, sb = (w, sb) if sb is not None else quantise_rows(w)
    _run(o, x, w, sa, sb, (1, gn, 128), "K", None)
    return o.result() if out is None else out


def _scaled_operand(op: str, name: str, x: Any, scale: Any) -> tuple[View, View | None]:
    """An fp8 operand and its multipliers, or a 16-bit one, which has none yet."""
    v = view(x, op, name)
    if v.dtype is uint8:
        v = v.typed(float8_e4m3fn)
    if v.dtype in FP8_TYPES:
        check_dtype(op, name, v, (float8_e4m3fn,))
        check_operand(op, name, v, 2, 128)
        if scale is None:
            raise ArgumentError(f"{op}: {name}_scale is None, expected float32 multipliers of the fp8 {name}")
        made = scale_view(op, f"{name}_scale", scale, v)
        check_ndim(op, f"{name}_scale", made, 2)
        return v, made
    check_dtype(op, name, v, HALF_TYPES)
    check_operand(op, name, v, 2, 128)
    if scale is not None:
        raise ArgumentError(
            f"{op}: {name}_scale is given for a {v.dtype.name} {name}, expected None: it is quantised here"
        )
    return v, None
