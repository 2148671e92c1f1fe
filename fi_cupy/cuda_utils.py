"""Results of cuda-bindings' functions, checked.

Source: flashinfer.cuda_utils.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fi_cupy.errors import FiCupyError

__all__ = ["CudaError", "checkCudaErrors", "get_error_name"]


class CudaError(FiCupyError, RuntimeError):
    """A function of the CUDA driver, the runtime or NVRTC has failed.

    Attributes
    ----------
    code : int
        Its number.
    name : str
        Its name, "CUDA_ERROR_INVALID_VALUE" for example.
    """

    def __init__(self, message: str, code: int, name: str) -> None:
        super().__init__(message)
        self.code, self.name = code, name


def get_error_name(error: Any) -> str:
    """The name of a ``CUresult``, ``cudaError_t`` or ``nvrtcResult`` of cuda-bindings.

    Raises
    ------
    TypeError
        It is none of them.
    """
    if type(error).__name__ not in ("CUresult", "cudaError_t", "nvrtcResult") or not hasattr(error, "name"):
        raise TypeError(f"get_error_name: got {error!r}, expected a CUresult, cudaError_t or nvrtcResult")
    return str(error.name)


def checkCudaErrors(result: Sequence[Any]) -> Any:
    """What a function of cuda-bindings returned behind its status, which must be success.

    Parameters
    ----------
    result : tuple
        The status, then the values.

    Returns
    -------
    None, the value, or a tuple of values

    Raises
    ------
    CudaError
        The status says otherwise.

    Examples
    --------
    >>> from cuda.bindings import driver                                # doctest: +SKIP
    >>> checkCudaErrors(driver.cuDeviceGetCount())                      # doctest: +SKIP
    1
    """
    status, *values = result
    code = int(status)
    if code:
        name = get_error_name(status)
        raise CudaError(f"CUDA error {code}: {name}", code, name)
    if not values:
        return None
    return values[0] if len(values) == 1 else tuple(values)
