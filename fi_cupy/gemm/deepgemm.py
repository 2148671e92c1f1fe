"""DeepGEMM's two layouts of grouped fp8 products: rows with a group's number each, and groups padded to one length."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fi_cupy import reference
from fi_cupy.arrays import View
from fi_cupy.checks import check_device, check_shape
from fi_cupy.dtypes import int32, int64
from fi_cupy.errors import ArgumentError, LayoutError, ShapeError
from fi_cupy.gemm.fp8_blocks import Granularity, _granularity, _operands, _run, _scale, _up
from fi_cupy.gemm.operands import check_columns, check_operand, fp8_view, index_view, output, scale_view
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec

_PARAMS = ParamsStruct(
    "RunsParams",
    [
        ("numbers", "ptr"), ("indptr", "ptr"), ("weights", "ptr"), ("rows", "u32"), ("groups", "u32"), ("most", "u32"),
        ("wide", "u32"),
    ],
)  # fmt: skip
_THREADS = 1024
#: Rows that fit the offsets of a launch.
_MAX_ROWS = (1 << 31) - 1


@lru_cache(maxsize=2)
def runs_spec(function: str) -> KernelSpec:
    """``row_runs`` or ``masked_runs`` of ``kernels/gemm/runs.cuh``."""
    return KernelSpec(
        symbol=function,
        header="gemm/runs.cuh",
        function=function,
        params=_PARAMS,
        config=(("kThreads", _THREADS), ("kItems", 8)),
        threads=_THREADS,
    )


def runs_specs() -> list[KernelSpec]:
    """The canonical instances."""
    return [runs_spec("row_runs"), runs_spec("masked_runs")]


def most_runs(rows: int, groups: int) -> int:
    """Runs of equal numbers that a launch has room for: whatever order few rows have, else DeepGEMM's layouts."""
    return max(2 * groups + 1, 2 * _up(rows, 128), min(rows, 512))


def _runs(function: str, numbers: View, rows: int, groups: int, most: int) -> tuple[View, View]:
    """(indptr, weights) of the segments."""
    indptr, weights = numbers.empty((most + 1,), int32), numbers.empty((most,), int32)
    load_kernel(runs_spec(function), numbers.device).launch(
        1, numbers.stream(), numbers.ptr, indptr.ptr, weights.ptr, rows, groups, most, int(numbers.dtype is int64)
    )
    return indptr, weights


def _sizes(op: str, value: Any, k: int) -> Granularity:
    sizes = _granularity(op, value)
    if sizes[0] != 1:
        raise ArgumentError(f"{op}: scale_granularity_mnk is {value!r}, expected 1 row: a_scale has one for each")
    return sizes


def group_deepgemm_fp8_nt_groupwise(
    a: Any, b: Any, a_scale: Any, b_scale: Any, m_indices: Any, scale_granularity_mnk: Granularity = (1, 128, 128),
    out: Any = None, out_dtype: Any = None,
) -> Any:  # fmt: skip
    """``out[i] = dequant(a[i]) @ dequant(b[m_indices[i]]).T``: grouped rows, each with its group's number.

    The rows of a group lie together. DeepGEMM wants every group to start on a multiple of 128 rows; here it may start
    anywhere. No host looks at `m_indices`: a kernel makes runs of equal numbers of it.

    Parameters
    ----------
    a : array, [m, k], float8_e4m3fn or float8_e5m2 (uint8: bytes of e4m3)
        k is a multiple of 16.
    b : array, [groups, n, k], fp8
        n is a multiple of 8.
    a_scale : array, float32 [m, ceil(k / gk)]
        Any strides.
    b_scale : array, float32 [groups, ceil(n / gn), ceil(k / gk)]
    m_indices : array, int32 or int64 [m]
        The group of every row; -1 (or any number that is no group's) for padding, whose rows of the result are left
        as they are. On a GPU runs of equal numbers beyond max(2 groups + 1, 2 ceil(m / 128), min(m, 512)) are, too:
        what neither layout produces.
    scale_granularity_mnk : (1, gn, gk)
        gk is a multiple of 128; on Hopper e4m3 with gn = gk = 128 takes the fast kernel.
    out : array, [m, n], optional
    out_dtype : dtype, optional
        bfloat16 (default), float16 or float32.

    Returns
    -------
    array
        ``[m, n]``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.gemm.group_deepgemm_fp8_nt_groupwise; DeepGEMM's m_grouped_fp8_gemm_nt_contiguous.
    """
    op = "group_deepgemm_fp8_nt_groupwise"
    x, w = _operands(op, a, b, 3)
    (m, k), (groups, n) = x.shape, w.shape[:2]
    _, gn, gk = sizes = _sizes(op, scale_granularity_mnk, k)
    numbers = index_view(op, "m_indices", m_indices, x, m, "= a.shape[:1]")
    sa = _scale(op, "a_scale", a_scale, x, "K", m, _up(k, gk), None)
    sb = _scale(op, "b_scale", b_scale, x, "K", _up(n, gn), _up(k, gk), groups)
    o = output(op, x, (m, n), out, out_dtype)
    if x.is_cpu:
        o.write(
            reference.gemm.grouped_rows(
                x.numpy(), w.numpy(), sa.numpy(), sb.numpy(), numbers.numpy(), sizes, o.numpy()
            )
        )  # fmt: skip
    elif m and groups:
        indptr, weights = _runs("row_runs", numbers, m, groups, most_runs(m, groups))
        _run(o, x, w, sa, sb, sizes, "K", indptr, weights, _up(m, groups))
    return o.result() if out is None else out


def batch_deepgemm_fp8_nt_groupwise(
    a: Any, b: Any, a_scale: Any, b_scale: Any, masked_m: Any, expected_m: int,
    scale_granularity_mnk: Granularity = (1, 128, 128), out: Any = None, out_dtype: Any = None,
) -> Any:  # fmt: skip
    """``out[g, :masked_m[g]] = dequant(a[g, :masked_m[g]]) @ dequant(b[g]).T``: groups padded to one length.

    Parameters
    ----------
    a : array, [groups, m, k], float8_e4m3fn or float8_e5m2 (uint8: bytes of e4m3)
        k is a multiple of 16; the groups lie one behind the other.
    b : array, [groups, n, k], fp8
        n is a multiple of 8.
    a_scale : array, float32 [groups, m, ceil(k / gk)]
        The groups' rows at one distance.
    b_scale : array, float32 [groups, ceil(n / gn), ceil(k / gk)]
    masked_m : array, int32 or int64 [groups]
        Rows of each group that are computed, read on the device; less than 0 counts as 0, more than m as m. The other
        rows of the result are left as they are.
    expected_m : int
        Rows of a group to expect: the shape of the kernel's tiles follows it, the result does not.
    scale_granularity_mnk, out_dtype
        As in `group_deepgemm_fp8_nt_groupwise`.
    out : array, [groups, m, n], optional

    Returns
    -------
    array
        ``[groups, m, n]``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.gemm.batch_deepgemm_fp8_nt_groupwise; DeepGEMM's m_grouped_fp8_gemm_nt_masked.
    """
    op = "batch_deepgemm_fp8_nt_groupwise"
    x, w = fp8_view(op, "a", a), fp8_view(op, "b", b)
    check_operand(op, "a", x, 3, 16)
    check_operand(op, "b", w, 3, 16)
    check_device(op, x, b=w)
    groups, m, k = x.shape
    n = w.shape[1]
    check_shape(op, "b", w, (groups, n, k), "= (a.shape[0], n, a.shape[2])")
    check_device(op, x, b=w)
    check_columns(op, "b", w.shape, n)
    _, gn, gk = sizes = _sizes(op, scale_granularity_mnk, k)
    if not isinstance(expected_m, int) or expected_m < 0:
        raise ArgumentError(f"{op}: expected_m is {expected_m!r}, expected a number of rows")
    if groups * m > _MAX_ROWS:
        raise ShapeError(f"{op}: a has shape {x.shape}, expected at most {_MAX_ROWS} rows in all")
    counts = index_view(op, "masked_m", masked_m, x, groups, "= a.shape[:1]")
    sa = scale_view(op, "a_scale", a_scale, x)
    check_shape(op, "a_scale", sa, (groups, m, _up(k, gk)), "= (groups, m, ceil(k / gk))")
    sb = _scale(op, "b_scale", b_scale, x, "K", _up(n, gn), _up(k, gk), groups)
    o = output(op, x, (groups, m, n), out, out_dtype)
    flat = [_flat(op, name, v) for name, v in (("out", o), ("a", x), ("a_scale", sa))]
    if x.is_cpu:
        number = reference.gemm.masked_numbers(counts.numpy(), m)
        flat[0].write(
            reference.gemm.grouped_rows(
                flat[1].numpy(), w.numpy(), flat[2].numpy(), sb.numpy(), number, sizes, flat[0].numpy()
            )
        )  # fmt: skip
    elif groups * m:
        indptr, weights = _runs("masked_runs", counts, m, groups, 2 * groups)
        _run(flat[0], flat[1], w, flat[2], sb, sizes, "K", indptr, weights, max(1, min(expected_m, m)))
    return o.result() if out is None else out


def _flat(op: str, name: str, x: View) -> View:
    """[groups, m, columns] as [groups * m, columns], without a copy."""
    groups, m, columns = x.shape
    outer, row, inner = x.strides
    if m == 1:
        row = outer
    elif groups > 1 and outer != m * row:
        raise LayoutError(f"{op}: {name} has strides {x.strides} (elements), expected {m * row} between groups")
    host = None if x._host is None else x._host.reshape(groups * m, columns)
    return View(x._framework, x.array, x.ptr, (groups * m, columns), (row, inner), x.dtype, x.device, host)
