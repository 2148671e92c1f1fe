"""Bit packing of masks: whole arrays, and ragged ones segment by segment."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_dtype, check_inner, check_ndim
from fi_cupy.dtypes import INDEX_TYPES, DType, bool_, float16, float32, int32, int64, uint8
from fi_cupy.errors import ArgumentError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.reference import quantization as reference
from fi_cupy.workspace import device_of

_PACK = ParamsStruct("PackbitsParams", [("x", "ptr"), ("y", "ptr"), ("n", "u64")])
_SEGMENT = ParamsStruct(
    "SegmentPackbitsParams",
    [
        ("x", "ptr"),
        ("y", "ptr"),
        ("indptr", "ptr"),
        ("new_indptr", "ptr"),
        ("n", "u64"),
        ("bytes", "u64"),
        ("segments", "u32"),
    ],
)
_THREADS = 256


def _unroll(itemsize: int) -> int:
    """Units of 16 elements a thread: 64 bytes of loads in flight."""
    return max(1, 4 // itemsize)


def _config(dtype: DType, big: bool) -> tuple[tuple[str, Any], ...]:
    return (
        ("kItem", dtype.itemsize),
        ("kFloat", "float" in dtype.name),
        ("kBig", big),
        ("kThreads", _THREADS),
        ("kUnroll", _unroll(dtype.itemsize)),
    )


def _form(dtype: DType, big: bool) -> str:
    return f"{'f' if 'float' in dtype.name else 'i'}{8 * dtype.itemsize}_{'big' if big else 'little'}"


@lru_cache(maxsize=64)
def packbits_spec(dtype: DType, big: bool) -> KernelSpec:
    """The kernel of `packbits`; types that share item size and kind (integer or float) share it."""
    return KernelSpec(
        symbol=f"packbits_{_form(dtype, big)}",
        header="quantization.cuh",
        function="packbits",
        params=_PACK,
        config=_config(dtype, big),
        threads=_THREADS,
        min_blocks=3,  # said so that ptxas has 80 registers: left to itself it spills for sm_100 and sm_120
    )


@lru_cache(maxsize=64)
def segment_packbits_spec(dtype: DType, index: DType, big: bool) -> KernelSpec:
    """The kernel of `segment_packbits` with offsets of type `index`."""
    return KernelSpec(
        symbol=f"segment_packbits_{_form(dtype, big)}_{index.tag}",
        header="quantization.cuh",
        function="segment_packbits",
        params=_SEGMENT,
        config=(*_config(dtype, big), ("I", index)),
        threads=_THREADS,
        min_blocks=3,  # said so that ptxas has 80 registers: left to itself it spills for sm_100 and sm_120
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: booleans and the common number types."""
    specs = []
    specs += [packbits_spec(t, True) for t in (bool_, float16, int32, float32, int64)]
    specs.append(packbits_spec(bool_, False))
    specs += [segment_packbits_spec(bool_, i, big) for i in (int32, int64) for big in (True, False)]
    specs.append(segment_packbits_spec(float32, int32, True))
    return specs


def _checked(op: str, x: Any, bitorder: str) -> tuple[View, bool]:
    if bitorder not in ("big", "little"):
        raise ArgumentError(f"{op}: bitorder is {bitorder!r}, expected 'big' or 'little'")
    v = view(x, op, "x")
    check_ndim(op, "x", v, 1)
    check_inner(op, "x", v)
    return v, bitorder == "big"


def packbits(x: Any, bitorder: str = "big") -> Any:
    """Eight booleans a byte.

    Parameters
    ----------
    x : array, [n], any dtype
        An element counts as true where it is not 0.
    bitorder : "big" or "little"
        "big" puts the first element in the most significant bit, "little" (attention masks) in the least.

    Returns
    -------
    array
        uint8 ``[(n + 7) // 8]``; missing elements of the last byte are 0.

    Raises
    ------
    ArgumentError, ShapeError, LayoutError

    Source
    ------
    numpy.packbits; flashinfer.quantization.packbits.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.quantization import packbits
    >>> packbits(np.array([True, False, True, True]))
    array([176], dtype=uint8)
    """
    v, big = _checked("packbits", x, bitorder)
    n = v.shape[0]
    y = v.empty(((n + 7) // 8,), uint8)
    if v.is_cpu:
        y.write(reference.packbits(v.numpy(), "big" if big else "little"))
    else:
        units = -(-n // 16)
        load_kernel(packbits_spec(v.dtype, big), v.device).launch(
            -(-units // (_THREADS * _unroll(v.dtype.itemsize))), v.stream(), v.ptr, y.ptr, n
        )
    return y.result()


def _host_offsets(op: str, indptr: View, n: int) -> np.ndarray[Any, Any]:
    host = np.ascontiguousarray(indptr.host())
    if len(host) == 0 or host[0] < 0 or host[-1] > n or (host[1:] < host[:-1]).any():
        raise ArgumentError(
            f"{op}: indptr goes from {host[0] if len(host) else 'nothing'} to {host[-1] if len(host) else 'nothing'}, "
            f"expected ascending offsets from 0 to at most {n} = len(x)"
        )
    return host


def _upload(values: np.ndarray[Any, Any], like: View, dtype: DType) -> View:
    """Host values as a new device array of the caller's framework.

    The copy is ordered on the caller's stream; from pageable memory the driver has read `values` when it returns.
    """
    from cupy.cuda import runtime

    made = like.empty(values.shape, dtype)
    if values.size:
        with device_of(like):
            runtime.memcpyAsync(made.ptr, values.ctypes.data, values.nbytes, runtime.memcpyHostToDevice, like.stream())
    return made


def segment_packbits(x: Any, indptr: Any, bitorder: str = "big") -> tuple[Any, Any]:
    """`packbits` of every segment of a ragged array, each padded to whole bytes.

    The size of the result depends on the values of `indptr`: on a GPU they are copied to the host, which waits for the
    work before it. Pass `indptr` as a NumPy array to avoid that wait.

    Parameters
    ----------
    x : array, [n], any dtype
        An element counts as true where it is not 0.
    indptr : array, [segments + 1], int32 or int64
        Offsets of the segments in elements; on the device of `x` or on the CPU.
    bitorder : "big" or "little"
        As in `packbits`; attention masks are little.

    Returns
    -------
    (y, new_indptr)
        uint8 ``[new_indptr[-1]]``, and offsets in bytes, ``new_indptr[i + 1] - new_indptr[i] = (len_i + 7) // 8``, with
        the dtype of `indptr`, both on the device of `x`.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, LayoutError

    Source
    ------
    flashinfer.quantization.segment_packbits.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.quantization import segment_packbits
    >>> segment_packbits(np.ones(12, bool), np.array([0, 2, 12]), "little")
    (array([  3, 255,   3], dtype=uint8), array([0, 1, 3]))
    """
    op = "segment_packbits"
    v, big = _checked(op, x, bitorder)
    ip = view(indptr, op, "indptr")
    check_ndim(op, "indptr", ip, 1)
    check_dtype(op, "indptr", ip, INDEX_TYPES)
    check_inner(op, "indptr", ip)
    n = v.shape[0]
    host = _host_offsets(op, ip, n)
    if v.is_cpu:
        packed, offsets = reference.segment_packbits(v.numpy(), host, "big" if big else "little")
        y, new = v.empty(packed.shape, uint8), v.empty(offsets.shape, ip.dtype)
        y.write(packed)
        new.write(offsets)
        return y.result(), new.result()
    offsets = np.zeros_like(host)
    np.cumsum((np.diff(host) + 7) // 8, out=offsets[1:])
    total = int(offsets[-1])
    y = v.empty((total,), uint8)
    new = _upload(offsets, v, ip.dtype)
    on_device = ip if ip.device == v.device else _upload(host, v, ip.dtype)
    load_kernel(segment_packbits_spec(v.dtype, ip.dtype, big), v.device).launch(
        -(-total // (2 * _THREADS * _unroll(v.dtype.itemsize))), v.stream(), v.ptr, y.ptr, on_device.ptr, new.ptr,
        n, total, len(host) - 1,
    )  # fmt: skip
    return y.result(), new.result()
