"""The two things that need NVIDIA's driver binding (``cuda-bindings``): launch attributes and tensor maps."""

from __future__ import annotations

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
            "launch: programmatic dependent launch and tensor maps need the package cuda-bindings; "
            "it comes with fi_cupy[cuda12] and fi_cupy[cuda13]"
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


def launch_pdl(
    function: int, grid: tuple[int, int, int], threads: int, smem: int, stream: int, params_address: int
) -> None:
    """cuLaunchKernelEx with programmatic stream serialisation: this grid may start before the former one ends."""
    driver = _driver()
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes = smem
    config.hStream = driver.CUstream(stream)
    config.attrs = [attribute]
    config.numAttrs = 1
    _check(driver.cuLaunchKernelEx(config, driver.CUfunction(function), params_address, 0), "cuLaunchKernelEx")


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
