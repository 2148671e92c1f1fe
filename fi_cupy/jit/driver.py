"""What CuPy has no call for: launches with an attribute, and tensor maps, which need the package ``cuda-bindings``."""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from fi_cupy.errors import CudaUnavailableError


@lru_cache(maxsize=1)
def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError:
        raise CudaUnavailableError(
            "launch: tensor maps need the package cuda-bindings; it comes with fi_cupy[cuda12] and fi_cupy[cuda13]"
        ) from None
    return driver


@lru_cache(maxsize=1)
def has_driver_binding() -> bool:
    """Whether cuda-bindings is installed."""
    try:
        _driver()
    except CudaUnavailableError:
        return False
    return True


def _check(result: tuple[Any, ...], what: str) -> None:
    driver = _driver()
    if result[0] != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{what}: {driver.cuGetErrorName(result[0])[1]!r}")


class _LaunchRecord(threading.local):
    """A CUlaunchConfig of this thread and its one attribute, filled in anew for each launch.

    Made through the binding's objects it takes longer than the launch. Layouts and numbers are those of cuda.h.
    """

    CONFIG = struct.Struct("=7I4xQQI4x")  # grid, block, shared memory, stream, attributes, how many
    ATTRIBUTE = struct.Struct("=I4xI60x")  # id, value (a union of 64 bytes)
    PROGRAMMATIC_STREAM_SERIALIZATION = 6

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(self.CONFIG.size + self.ATTRIBUTE.size + 8)
        self.address = ctypes.addressof(self._memory) + 7 & -8
        self.config = memoryview(self._memory).cast("B")[self.address - ctypes.addressof(self._memory) :]
        self.attributes = self.address + self.CONFIG.size
        self.ATTRIBUTE.pack_into(self.config, self.CONFIG.size, self.PROGRAMMATIC_STREAM_SERIALIZATION, 1)


_record = _LaunchRecord()


@lru_cache(maxsize=1)
def _launch_kernel_ex() -> Any:
    """cuLaunchKernelEx of the driver library itself."""
    function = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1").cuLaunchKernelEx
    function.argtypes, function.restype = (ctypes.c_void_p,) * 4, ctypes.c_int
    return function


def launch_pdl(
    function: int, grid: tuple[int, int, int], threads: int, smem: int, stream: int, params_address: int
) -> None:
    """cuLaunchKernelEx with programmatic stream serialisation: this grid may start before the former one ends."""
    record = _record
    record.CONFIG.pack_into(record.config, 0, *grid, threads, 1, 1, smem, stream, record.attributes, 1)
    result = _launch_kernel_ex()(record.address, function, params_address, None)
    if result:
        from cupy_backends.cuda.api.driver import CUDADriverError

        raise CUDADriverError(result)  # as of a plain launch


def tensor_map(
    dtype: str,
    address: int,
    extents: Sequence[int],
    strides_bytes: Sequence[int],
    box: Sequence[int],
    *,
    swizzle: int = 128,
) -> bytes:
    """Encode a CUtensorMap, 128 bytes for a ``tensormap`` field.

    Parameters
    ----------
    dtype : str
        One of uint8, float16, bfloat16, float32.
    address : int
        Device pointer, 16-byte aligned.
    extents, box : sequence of int
        Elements, innermost dimension first.
    strides_bytes : sequence of int
        Bytes, one fewer than `extents` (the innermost is dense), multiples of 16.
    swizzle : int
        Bytes of the shared-memory swizzle: 0, 32, 64 or 128.
    """
    driver = _driver()
    types = driver.CUtensorMapDataType
    kind = {
        "uint8": types.CU_TENSOR_MAP_DATA_TYPE_UINT8,
        "float16": types.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        "bfloat16": types.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        "float32": types.CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
    }[dtype]
    swizzles = driver.CUtensorMapSwizzle
    pattern = {
        0: swizzles.CU_TENSOR_MAP_SWIZZLE_NONE,
        32: swizzles.CU_TENSOR_MAP_SWIZZLE_32B,
        64: swizzles.CU_TENSOR_MAP_SWIZZLE_64B,
        128: swizzles.CU_TENSOR_MAP_SWIZZLE_128B,
    }[swizzle]
    rank = len(extents)
    result = driver.cuTensorMapEncodeTiled(
        kind, rank, address,
        [driver.cuuint64_t(e) for e in extents], [driver.cuuint64_t(s) for s in strides_bytes],
        [driver.cuuint32_t(b) for b in box], [driver.cuuint32_t(1)] * rank,
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE, pattern,
        driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
    )  # fmt: skip
    _check(result, "cuTensorMapEncodeTiled")
    return b"".join(int(word).to_bytes(8, "little") for word in result[1].opaque)
