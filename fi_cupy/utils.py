"""Names that callers pass as numbers, small helpers, and questions about a GPU.

Source: flashinfer.utils.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np

from fi_cupy.arrays import view
from fi_cupy.checks import check_inner
from fi_cupy.device import device_info, num_devices
from fi_cupy.dtypes import FP8_TYPES, INDEX_TYPES, int64
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, CudaUnavailableError, DeviceError, DTypeError, ShapeError, UnsupportedError
from fi_cupy.errors import GPUArchitectureError as GPUArchitectureError
from fi_cupy.reference.attention import get_alibi_slopes as get_alibi_slopes
from fi_cupy.requirements import backend_requirement as backend_requirement
from fi_cupy.requirements import supported_compute_capability as supported_compute_capability

__all__ = [
    "BackendSupportedError",
    "GPUArchitectureError",
    "LibraryError",
    "MaskMode",
    "PosEncodingMode",
    "TensorLayout",
    "backend_requirement",
    "ceil_div",
    "check_shape_dtype_device",
    "device_support_pdl",
    "get_alibi_slopes",
    "get_compute_capability",
    "get_indptr",
    "is_float8",
    "is_sm12x_supported",
    "is_sm90a_supported",
    "is_sm100a_supported",
    "is_sm110a_supported",
    "is_sm120a_supported",
    "is_sm121a_supported",
    "next_positive_power_of_2",
    "round_up",
    "set_log_level",
    "supported_compute_capability",
]

#: FlashInfer's names of what fi_cupy raises where a library is missing, and where no kernel takes a backend.
LibraryError = CudaUnavailableError
BackendSupportedError = UnsupportedError

_LEVELS = {
    "trace": 5, "debug": logging.DEBUG, "info": logging.INFO, "warn": logging.WARNING, "warning": logging.WARNING,
    "error": logging.ERROR, "critical": logging.CRITICAL,
}  # fmt: skip


class MaskMode(IntEnum):
    """Which keys a query may see, for the functions that take it as a number."""

    NON_CAUSAL = 0
    CAUSAL = 1
    CUSTOM = 2
    MULTIITEMSCORING = 3


class PosEncodingMode(IntEnum):
    """Position encoding inside attention; the functions that take it as text take the member's name."""

    NONE = 0
    ROPE_LLAMA = 1
    ALIBI = 2


class TensorLayout(IntEnum):
    """Order of a page's tokens (N), heads (H) and elements (D)."""

    NHD = 0
    HND = 1


# --- numbers --------------------------------------------------------------------------------------------------------


def ceil_div(x: int, y: int) -> int:
    """``x / y`` rounded up, for y > 0.

    Examples
    --------
    >>> ceil_div(9, 4)
    3
    """
    return -(-x // y)


def round_up(x: int, y: int) -> int:
    """The smallest multiple of `y` that is at least `x`.

    Examples
    --------
    >>> round_up(9, 4)
    12
    """
    return -(-x // y) * y


def next_positive_power_of_2(x: int) -> int:
    """The smallest power of two that is at least `x`; 1 for x below 1.

    Examples
    --------
    >>> next_positive_power_of_2(9), next_positive_power_of_2(0)
    (16, 1)
    """
    return 1 if x < 1 else 1 << (x - 1).bit_length()


# --- arrays ---------------------------------------------------------------------------------------------------------


def is_float8(x: Any) -> bool:
    """Whether the array's elements are float8_e4m3fn or float8_e5m2 (CuPy's bytes are uint8, and are not)."""
    return view(x, "is_float8", "x").dtype in FP8_TYPES


def get_indptr(x: Any) -> Any:
    """The offsets that lengths make: ``[0, x[0], x[0] + x[1], ...]``, int64.

    Parameters
    ----------
    x : array, int32 or int64 [n]

    Returns
    -------
    array, int64 [n + 1]
        In the framework and on the device of `x`; no host looks at the lengths.

    Raises
    ------
    ShapeError, DTypeError, LayoutError

    Examples
    --------
    >>> import numpy as np
    >>> get_indptr(np.array([2, 0, 3]))
    array([0, 2, 2, 5])
    """
    lengths = view(x, "get_indptr", "x")
    if lengths.ndim != 1:
        raise ShapeError(f"get_indptr: x is {lengths.ndim}-D {lengths.shape}, expected 1-D")
    if lengths.dtype not in INDEX_TYPES:
        raise DTypeError(f"get_indptr: x has dtype {lengths.dtype.name}, expected int32 or int64")
    out = lengths.empty((lengths.shape[0] + 1,), int64)
    if lengths.is_cpu:
        out.write(np.concatenate([[0], np.cumsum(np.maximum(lengths.numpy(), 0), dtype=np.int64)]))
        return out.result()
    from fi_cupy.gemm.segment import offsets_spec
    from fi_cupy.jit.kernel import load_kernel

    check_inner("get_indptr", "x", lengths)
    load_kernel(offsets_spec(), lengths.device).launch(
        1, lengths.stream(), lengths.ptr, out.ptr, lengths.shape[0], int(lengths.dtype is int64)
    )
    return out.result()


def check_shape_dtype_device(
    x: Any, expected_shape: Sequence[int] | None, expected_dtype: Any, expected_device: Any, name: str
) -> None:
    """Raise unless an array is what the caller expects; an expectation of None is not looked at.

    Parameters
    ----------
    x : array
    expected_shape : sequence of int, optional
    expected_dtype : dtype of any framework, or a name, optional
    expected_device : device of any framework, "cpu", "cuda:1" or a GPU's index, optional
    name : str
        What the message calls `x`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
    """
    found = view(x, "check_shape_dtype_device", name)
    if expected_shape is not None and found.shape != tuple(expected_shape):
        raise ShapeError(f"{name} has shape {found.shape}, expected {tuple(expected_shape)}")
    if expected_dtype is not None and found.dtype is not to_dtype(expected_dtype):
        raise DTypeError(f"{name} has dtype {found.dtype.name}, expected {to_dtype(expected_dtype).name}")
    if expected_device is not None:
        wanted = _index(expected_device)
        if found.device != wanted:
            raise DeviceError(f"{name} is on {_place(found.device)}, expected {_place(wanted)}")


def _place(index: int) -> str:
    return "the CPU" if index < 0 else f"cuda:{index}"


# --- devices --------------------------------------------------------------------------------------------------------


def _index(device: Any) -> int:
    """A GPU's index, or -1 for the CPU, from any framework's device, a number, text, an array, or None."""
    if device is None:
        return _current()
    if isinstance(device, (int, np.integer)) and not isinstance(device, bool):
        return int(device)
    if hasattr(device, "shape"):
        return view(device, "device", "array").device
    if isinstance(device, str):
        kind, _, number = device.partition(":")
        if kind in ("cuda", "gpu") and (not number or number.isdigit()):
            return int(number) if number else _current()
        if kind == "cpu":
            return -1
    elif type(device).__module__.split(".", 1)[0] == "torch" and hasattr(device, "index"):  # torch.device
        if device.type == "cuda":
            return _current() if device.index is None else int(device.index)
        if device.type == "cpu":
            return -1
    elif hasattr(device, "platform") and hasattr(device, "local_hardware_id"):  # a JAX device
        return int(device.local_hardware_id) if device.platform == "gpu" else -1
    elif hasattr(device, "compute_capability") and hasattr(device, "id"):  # CuPy's
        return int(device.id)
    raise ArgumentError(f"device: got {device!r}, expected a GPU's index, 'cuda:0', a device object or an array")


def _current() -> int:
    if num_devices() == 0:
        raise CudaUnavailableError("device: no CUDA GPU is present")
    from cupy.cuda import runtime

    return int(runtime.getDevice())


def get_compute_capability(device: Any = None) -> tuple[int, int]:
    """(major, minor) of a GPU.

    Parameters
    ----------
    device : optional
        A GPU's index, "cuda:1", a device object of CuPy, torch or JAX, or an array on it; by default the current GPU.

    Raises
    ------
    DeviceError
        It is the CPU.
    CudaUnavailableError
        There is no GPU.

    Examples
    --------
    >>> get_compute_capability(0)                              # doctest: +SKIP
    (9, 0)
    """
    index = _index(device)
    if index < 0:
        raise DeviceError("get_compute_capability: device is the CPU, expected a GPU")
    return divmod(device_info(index).number, 10)


def _is_supported(device: Any, numbers: tuple[int, ...], nvrtc: tuple[int, int]) -> bool:
    """Whether a GPU's compute capability (times ten) is one of these, and NVRTC can compile for it."""
    from fi_cupy.jit.compiler import nvrtc_version

    major, minor = get_compute_capability(device)
    return 10 * major + minor in numbers and nvrtc_version() >= nvrtc


def is_sm90a_supported(device: Any = None) -> bool:
    """Whether a GPU runs code for sm_90a, and NVRTC compiles it. `device`: as in `get_compute_capability`."""
    return _is_supported(device, (90,), (12, 0))


def is_sm100a_supported(device: Any = None) -> bool:
    """Whether a GPU runs code for sm_100a, and NVRTC compiles it."""
    return _is_supported(device, (100,), (12, 8))


def is_sm110a_supported(device: Any = None) -> bool:
    """Whether a GPU runs code for sm_110a, and NVRTC compiles it."""
    return _is_supported(device, (110,), (13, 0))


def is_sm120a_supported(device: Any = None) -> bool:
    """Whether a GPU runs code for sm_120a, and NVRTC compiles it."""
    return _is_supported(device, (120,), (12, 8))


def is_sm121a_supported(device: Any = None) -> bool:
    """Whether a GPU runs code for sm_121a, and NVRTC compiles it."""
    return _is_supported(device, (121,), (12, 9))


def is_sm12x_supported(device: Any = None) -> bool:
    """Whether `is_sm120a_supported` or `is_sm121a_supported`."""
    return is_sm120a_supported(device) or is_sm121a_supported(device)


def device_support_pdl(device: Any = None) -> bool:
    """Whether a GPU has programmatic dependent launch: compute capability 9.0 and later."""
    return get_compute_capability(device) >= (9, 0)


# --- the log --------------------------------------------------------------------------------------------------------


def set_log_level(lvl_str: str) -> None:
    """Set the level of the logger "fi_cupy", under which everything is logged.

    Parameters
    ----------
    lvl_str : {"trace", "debug", "info", "warn", "warning", "error", "critical"}
        At "debug" attention says which kernel each plan or call takes, and why. Where no handler is configured,
        Python shows warnings and worse alone: ``logging.basicConfig()`` shows the rest.

    Raises
    ------
    ArgumentError
        Another word.
    """
    level = _LEVELS.get(lvl_str.lower())
    if level is None:
        raise ArgumentError(f"set_log_level: lvl_str is {lvl_str!r}, expected {', '.join(_LEVELS)}")
    logging.getLogger("fi_cupy").setLevel(level)


#: The base-2 logarithm of e: log-sum-exps in base 2 are those in base e times this.
log2e = math.log2(math.e)
