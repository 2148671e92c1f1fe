"""Products of ragged groups of rows, each with its own weight: `SegmentGEMMWrapper` and `group_gemm`."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_aligned, check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.device import device_info
from fi_cupy.dtypes import FP8_TYPES, HALF_TYPES, bfloat16, float8_e4m3fn, int64, uint8
from fi_cupy.errors import ArgumentError, DTypeError, GPUArchitectureError, ShapeError, UnsupportedError, WorkspaceError
from fi_cupy.gemm.group import launch_group
from fi_cupy.gemm.hopper import launch_hopper_grouped
from fi_cupy.gemm.operands import check_choice, check_columns, check_operand, index_view, output
from fi_cupy.gemm.route import refusal
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec

_OFFSETS = ParamsStruct("OffsetsParams", [("lengths", "ptr"), ("indptr", "ptr"), ("n", "u32"), ("wide", "u32")])
_THREADS = 256


@lru_cache(maxsize=1)
def offsets_spec() -> KernelSpec:
    """The kernel that turns segment lengths into offsets."""
    return KernelSpec(
        symbol="segment_offsets",
        header="gemm/offsets.cuh",
        function="segment_offsets",
        params=_OFFSETS,
        config=(("kThreads", _THREADS),),
        threads=_THREADS,
    )


def _weights(op: str, x: View, weights: Any, column_major: bool) -> tuple[View, int]:
    """The weights' view and the number of output columns."""
    w = view(weights, op, "weights")
    if w.dtype is uint8:
        w = w.typed(float8_e4m3fn)
    check_ndim(op, "weights", w, 3)
    check_device(op, x, weights=w)
    fp8 = x.dtype in FP8_TYPES
    check_dtype(op, "weights", w, FP8_TYPES if fp8 else (x.dtype,), "like x")
    n, k = w.shape[1:] if column_major else (w.shape[2], w.shape[1])
    if k != x.shape[1]:
        shape = (w.shape[0], n, x.shape[1]) if column_major else (w.shape[0], x.shape[1], n)
        check_shape(op, "weights", w, shape, "with d_in = x.shape[1]")
    check_columns(op, "weights", w.shape, n)
    check_inner(op, "weights", w)
    check_aligned(op, "weights", w, 16)
    if fp8 and not column_major and not x.is_cpu:
        raise UnsupportedError(
            f"{op}: weight_column_major is False for fp8, expected True: pass weights [num_weights, d_out, d_in]"
        )
    return w, n


def _operand(op: str, name: str, x: Any) -> View:
    v = view(x, op, name)
    if v.dtype is uint8:
        v = v.typed(float8_e4m3fn)
    check_dtype(op, name, v, (*HALF_TYPES, *FP8_TYPES))
    check_operand(op, name, v, 2, 16 // v.dtype.itemsize)
    return v


def _check_segments(op: str, indptr: np.ndarray[Any, Any], rows: int) -> None:
    """Host arrays can be checked at no cost; the kernels clip what they find on the device."""
    if (np.diff(indptr) < 0).any() or indptr[0] < 0 or indptr[-1] > rows:
        raise ArgumentError(
            f"{op}: segments are {indptr.tolist()}, expected ascending offsets between 0 and {rows} rows"
        )


def _indices(op: str, weight_indices: Any, x: View, w: View, size: int, meaning: str) -> View:
    """The weight of each segment; the host's are held to the weights that there are."""
    indices = index_view(op, "weight_indices", weight_indices, x, size, meaning)
    if x.is_cpu and ((indices.numpy() < 0) | (indices.numpy() >= w.shape[0])).any():
        raise ArgumentError(f"{op}: weight_indices is {indices.numpy().tolist()}, expected 0 to {w.shape[0] - 1}")
    return indices


def _run(
    op: str, out: View, x: View, w: View, indptr: View, indices: View | None, column_major: bool, backend: str,
    bias: View | None = None, pdl: bool = False,
) -> None:  # fmt: skip
    if x.is_cpu:
        offsets = indptr.numpy()
        _check_segments(op, offsets, x.shape[0])
        chosen = None if indices is None else indices.numpy()
        start, stop = int(offsets[0]), int(offsets[-1])
        added = None if bias is None else bias.numpy()
        values = reference.gemm.segment_gemm(
            x.numpy(), w.numpy(), offsets, chosen, column_major, out_dtype=out.dtype.np, bias=added
        )
        out.numpy()[start:stop] = values[start:stop]
        return
    scale = "end" if x.dtype in FP8_TYPES else "none"
    if backend != "sm80" and scale == "none" and _hopper(op, out, x, w, backend):
        launch_hopper_grouped(
            out, x, w, indptr, weight_indices=indices, row_major_b=not column_major, bias=bias, pdl=pdl
        )
        return
    launch_group(
        out, x, w, indptr=indptr, weight_indices=indices, row_major_b=not column_major, bias=bias, scale=scale, pdl=pdl
    )


def _hopper(op: str, out: View, x: View, w: View, backend: str) -> bool:
    """Whether the Hopper kernel takes it; an error where it was asked for and does not."""
    text = refusal(device_info(x.device), out.shape[1], x, w, out)
    if text and backend == "sm90":
        raise GPUArchitectureError(f"{op}: backend is 'sm90', expected 'auto' or 'sm80': {text}")
    return not text


class SegmentGEMMWrapper:
    """Matrix products of segments of rows, each with its own weight, in one launch (LoRA, mixture of experts).

    Parameters
    ----------
    float_workspace_buffer : array
        Holds the offsets that `run` makes of `seg_lens`: 8 bytes a segment, and 8 more.
    backend : {"auto", "sm80", "sm90"}
        "sm80": the portable kernel; "sm90": the Hopper kernel (an error where there is none); "auto" picks.

    Source
    ------
    flashinfer.gemm.SegmentGEMMWrapper.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.gemm.SegmentGEMMWrapper(np.empty(1024, np.uint8))
    >>> x, weights = np.ones((3, 8), np.float16), np.ones((2, 8, 8), np.float16)
    >>> wrapper.run(x, weights, 2, True, seg_lens=np.array([1, 2]))[:, 0]
    array([8., 8., 8.], dtype=float16)
    """

    def __init__(self, float_workspace_buffer: Any, backend: str = "auto") -> None:
        check_choice("SegmentGEMMWrapper", "backend", backend, ("auto", "sm80", "sm90"))
        self._backend = backend
        self.reset_workspace_buffer(float_workspace_buffer)

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another workspace; an integer one, where given, holds the offsets instead of the float one."""
        chosen = float_workspace_buffer if int_workspace_buffer is None else int_workspace_buffer
        self._workspace = view(chosen, "SegmentGEMMWrapper", "workspace buffer")

    def run(
        self, x: Any, weights: Any, batch_size: int, weight_column_major: bool, out: Any = None, seg_lens: Any = None,
        seg_indptr: Any = None, weight_indices: Any = None,
    ) -> Any:  # fmt: skip
        """Multiply every segment of `x` with its weight.

        Parameters
        ----------
        x : array, [rows, d_in], bfloat16, float16 or fp8
            d_in is a multiple of 8 (fp8: 16).
        weights : array, [num_weights, d_out, d_in] if `weight_column_major`, else [num_weights, d_in, d_out]
            Dtype of `x`; fp8 on a GPU only column-major. d_out is a multiple of 8.
        batch_size : int
            Segments.
        weight_column_major : bool
        out : array, [rows, d_out], optional
            Rows outside every segment are left as they are.
        seg_lens : array, int64 or int32 [batch_size], optional
            Rows of each segment; they start at row 0.
        seg_indptr : array, int64 or int32 [batch_size + 1], optional
            Offsets instead of lengths.
        weight_indices : array, int64 or int32 [batch_size], optional
            The weight of each segment; by default segment i has weight i.

        Returns
        -------
        array
            ``[rows, d_out]`` in the dtype of `x`, bfloat16 for fp8 `x`.

        Raises
        ------
        ShapeError, DTypeError, DeviceError, LayoutError, WorkspaceError, UnsupportedError, GPUArchitectureError
        """
        op = "SegmentGEMMWrapper.run"
        v = _operand(op, "x", x)
        w, n = _weights(op, v, weights, weight_column_major)
        if (seg_lens is None) == (seg_indptr is None):
            got = "neither" if seg_lens is None else "both"
            raise ArgumentError(f"{op}: got {got} of seg_lens and seg_indptr, expected one of them")
        indices = None
        if weight_indices is not None:
            indices = _indices(op, weight_indices, v, w, batch_size, "= (batch_size,)")
        elif w.shape[0] < batch_size:
            raise ShapeError(f"{op}: weights has shape {w.shape}, expected at least {batch_size} weights = batch_size")
        if seg_indptr is not None:
            indptr = index_view(op, "seg_indptr", seg_indptr, v, batch_size + 1, "= (batch_size + 1,)")
        else:
            indptr = self._offsets(op, index_view(op, "seg_lens", seg_lens, v, batch_size, "= (batch_size,)"))
        o = output(op, v, (v.shape[0], n), out, None, bfloat16 if v.dtype in FP8_TYPES else v.dtype)
        _run(op, o, v, w, indptr, indices, weight_column_major, self._backend)
        return o.result() if out is None else out

    forward = run

    def _offsets(self, op: str, lengths: View) -> View:
        """Offsets of segments that start at row 0, in the workspace; on the device, without a host's look at them."""
        n = lengths.shape[0]
        if lengths.is_cpu:
            return view(np.concatenate([[0], np.cumsum(lengths.numpy())]).astype(np.int64))
        work = self._workspace
        check_device(op, lengths, workspace=work)
        got = work.size * work.dtype.itemsize
        if got < 8 * (n + 1) or work.ptr % 8 or not work.contiguous:
            raise WorkspaceError(f"{op}: the workspace has {got} bytes, expected {8 * (n + 1)} dense ones on 8 bytes")
        load_kernel(offsets_spec(), lengths.device).launch(
            1, lengths.stream(), lengths.ptr, work.ptr, n, int(lengths.dtype is int64)
        )
        return View(lengths._framework, work.array, work.ptr, (n + 1,), (1,), int64, lengths.device)


def group_gemm(
    a: Any, b: Any, m_indptr: Any, *, weight_indices: Any = None, bias: Any = None, out: Any = None,
    out_dtype: Any = None, pdl: bool = False,
) -> Any:  # fmt: skip
    """Products of groups of rows: ``out[rows of g] = a[rows of g] @ b[g].T + bias[g]``, 16-bit operands.

    Parameters
    ----------
    a : array, [rows, k], bfloat16 or float16
    b : array, [weights, n, k], dtype of `a`
    m_indptr : array, int32 or int64 [groups + 1]
        Rows ``m_indptr[g]`` to ``m_indptr[g + 1]`` are group g; read on the device.
    weight_indices : array, int32 or int64 [groups], optional
        The weight of each group; by default its own number.
    bias : array, [weights, n], dtype of `a`, optional
    out : array, [rows, n], optional
        Rows outside every group are left as they are.
    out_dtype : dtype, optional
        By default that of `a`.
    pdl : bool
        Programmatic dependent launch (sm_90 and later), for weights that the kernel before does not write.

    Returns
    -------
    array
        ``[rows, n]``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    flashinfer.gemm (group GEMM); `group_gemm_fp8_nt_groupwise` is its sibling for fp8.
    """
    op = "group_gemm"
    v = _operand(op, "a", a)
    if v.dtype in FP8_TYPES:
        raise DTypeError(f"{op}: a has dtype {v.dtype.name}, expected bfloat16 or float16; "
                         "group_gemm_fp8_nt_groupwise takes fp8")  # fmt: skip
    w, n = _weights(op, v, b, True)
    indptr = index_view(op, "m_indptr", m_indptr, v)
    groups = indptr.shape[0] - 1
    if groups < 0:
        raise ShapeError(f"{op}: m_indptr has shape {indptr.shape}, expected (groups + 1,)")
    indices = None
    if weight_indices is not None:
        indices = _indices(op, weight_indices, v, w, groups, "= (groups,)")
    elif w.shape[0] < groups:
        raise ShapeError(f"{op}: b has shape {w.shape}, expected at least {groups} weights = len(m_indptr) - 1")
    add = None
    if bias is not None:
        add = view(bias, op, "bias")
        check_shape(op, "bias", add, (w.shape[0], n), "= (weights, n)")
        check_dtype(op, "bias", add, (v.dtype,), "like a")
        check_device(op, v, bias=add)
        check_inner(op, "bias", add)
    o = output(op, v, (v.shape[0], n), out, out_dtype, v.dtype)
    _run(op, o, v, w, indptr, indices, True, "auto", add, bool(pdl))
    return o.result() if out is None else out
