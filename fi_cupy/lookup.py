"""Rows of a table by number (the embedding), and the position of each row's largest value (greedy decoding)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fi_cupy import reference
from fi_cupy.arrays import view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.device import device_info
from fi_cupy.dtypes import FLOAT_TYPES, INDEX_TYPES, DType, bfloat16, float16, float32, int32
from fi_cupy.errors import ArgumentError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec

_GATHER = ParamsStruct(
    "GatherParams",
    [
        ("source", "ptr"),
        ("rows", "ptr"),
        ("out", "ptr"),
        ("source_stride", "i64"),
        ("out_stride", "i64"),
        ("num_rows", "i64"),
        ("vectors", "u32"),
    ],
)
_ARGMAX = ParamsStruct(
    "ArgmaxParams",
    [("x", "ptr"), ("out", "ptr"), ("select", "ptr"), ("stride", "i64"), ("columns", "u32")],
)


@lru_cache(maxsize=64)
def gather_spec(index: DType, vec: int) -> KernelSpec:
    """The kernel that copies rows `vec` bytes at a time."""
    return KernelSpec(
        symbol=f"gather_rows_{index.tag}_v{vec}",
        header="lookup.cuh",
        function="gather_rows",
        params=_GATHER,
        config=(("I", index), ("kVec", vec), ("kThreads", 128)),
        threads=128,
    )


@lru_cache(maxsize=64)
def argmax_spec(dtype: DType, vec: int, cluster: int = 1) -> KernelSpec:
    """The kernel for rows read `vec` elements at a time by a CTA, or by a cluster of them (sm_90 and later).

    1024 threads with four loads each keep 64 KB in flight, 512 threads of eight CTAs twice that.
    """
    threads = 1024 if cluster == 1 else 512
    return KernelSpec(
        symbol=f"argmax_rows_{dtype.tag}_v{vec}{f'_c{cluster}' if cluster > 1 else ''}",
        header="lookup.cuh",
        function="argmax_rows",
        params=_ARGMAX,
        config=(("T", dtype), ("kVec", vec), ("kUnroll", 4), ("kThreads", threads), ("kCluster", cluster)),
        threads=threads,
        min_arch=75 if cluster == 1 else 90,
        cluster=0 if cluster == 1 else cluster,
    )


def _argmax_cluster(rows: int, columns: int, itemsize: int, clusters: bool) -> int:
    """CTAs a row: eight for few rows that are more than one CTA has in flight.

    1 x 49152 float32 takes 3.2 us against 4.5, 64 x 49152 8.7 against 6.6 (H100).
    """
    return 8 if clusters and rows <= 16 and columns * itemsize >= 1 << 16 else 1


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances."""
    return [
        *(gather_spec(index, 16) for index in INDEX_TYPES),
        gather_spec(int32, 2),
        *(argmax_spec(dtype, 16 // dtype.itemsize) for dtype in (float32, bfloat16, float16)),
        argmax_spec(float32, 1),
        argmax_spec(float32, 4, 8),
    ]


def gather_rows(source: Any, rows: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """Rows of a table by number: ``out[i] = source[rows[i]]``.

    Parameters
    ----------
    source : array, [num_rows, width], any dtype
        Rows may be strided; the last dimension must be dense.
    rows : array, [n], int32 or int64
        Numbers outside ``[0, num_rows)`` give zeros.
    out : array, optional
        ``[n, width]``, dtype of `source`; written and returned.
    enable_pdl : bool, optional
        Launch so that this kernel may start before its predecessor has ended, which it waits for before it touches
        memory (sm_90 and later). None: where the device has it.

    Returns
    -------
    array
        ``[n, width]``, dtype of `source`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy import lookup
    >>> lookup.gather_rows(np.float32([[1, 2], [3, 4]]), np.int32([1, 1, 0]))[:, 0]
    array([3., 3., 1.], dtype=float32)
    """
    op = "gather_rows"
    x, r = view(source, op, "source"), view(rows, op, "rows")
    check_ndim(op, "source", x, 2)
    check_inner(op, "source", x)
    check_ndim(op, "rows", r, 1)
    check_dtype(op, "rows", r, INDEX_TYPES)
    check_inner(op, "rows", r)
    check_device(op, x, rows=r)
    n, width = r.shape[0], x.shape[1]
    if out is None:
        o = x.empty((n, width))
    else:
        o = view(out, op, "out").writable(op, "out")
        check_shape(op, "out", o, (n, width), "= (rows.shape[0], source.shape[1])")
        check_dtype(op, "out", o, (x.dtype,), "like source")
        check_inner(op, "out", o)
        check_device(op, x, out=o)
    if x.is_cpu:
        o.write(reference.lookup.gather_rows(x.numpy(), r.numpy()))
        return o.result() if out is None else out
    size = x.dtype.itemsize
    nbytes, x_stride, o_stride = width * size, x.strides[0] * size, o.strides[0] * size
    vec = 16
    while (nbytes | x_stride | o_stride | x.ptr | o.ptr) % vec:
        vec //= 2
    load_kernel(gather_spec(r.dtype, vec), x.device).launch(
        n, x.stream(), x.ptr, r.ptr, o.ptr, x_stride, o_stride, x.shape[0], nbytes // vec, pdl=enable_pdl
    )
    return o.result() if out is None else out


def argmax(x: Any, out: Any = None, select: Any = None, enable_pdl: bool | None = None) -> Any:
    """Position of the largest value of every row, the lowest one among equals.

    Parameters
    ----------
    x : array, [rows, columns], float32, float16 or bfloat16
        Rows may be strided. NaN never wins; a row of only NaN or -inf gives 0.
    out : array, optional
        ``[rows]`` int32; written and returned.
    select : array, optional
        ``[rows]`` int32: only rows with an entry other than 0 are written. It goes with `out`.
    enable_pdl : bool, optional
        As in `gather_rows`.

    Returns
    -------
    array
        ``[rows]`` int32.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy import lookup
    >>> lookup.argmax(np.float32([[1, 3, 3], [7, 2, 5]]))
    array([1, 0], dtype=int32)
    """
    op = "argmax"
    v = view(x, op, "x")
    check_ndim(op, "x", v, 2)
    check_dtype(op, "x", v, FLOAT_TYPES)
    check_inner(op, "x", v)
    n, columns = v.shape
    if columns == 0:
        check_shape(op, "x", v, (n, 1), "or more columns")
    chosen = None
    if select is not None:
        chosen = view(select, op, "select")
        check_shape(op, "select", chosen, (n,), "= x.shape[:1]")
        check_dtype(op, "select", chosen, (int32,))
        check_inner(op, "select", chosen)
        check_device(op, v, select=chosen)
        if out is None:
            raise ArgumentError(f"{op}: out is None, expected an array together with select, whose other rows stay")
    if out is None:
        o = v.empty((n,), int32)
    else:
        o = view(out, op, "out").writable(op, "out")
        check_shape(op, "out", o, (n,), "= x.shape[:1]")
        check_dtype(op, "out", o, (int32,))
        check_inner(op, "out", o)
        check_device(op, v, out=o)
    if v.is_cpu:
        found = reference.lookup.argmax(v.numpy())
        if chosen is not None:
            keep = chosen.numpy() == 0
            found[keep] = o.numpy()[keep]
        o.write(found)
        return o.result() if out is None else out
    size, stride = v.dtype.itemsize, v.strides[0]
    vec = 16 // size
    if v.ptr % 16 or stride % vec:
        vec = 1
    cluster = _argmax_cluster(n, columns, size, device_info(v.device).code_number >= 90)
    load_kernel(argmax_spec(v.dtype, vec, cluster), v.device).launch(
        n * cluster, v.stream(), v.ptr, o.ptr, 0 if chosen is None else chosen.ptr, stride, columns, pdl=enable_pdl
    )
    return o.result() if out is None else out
