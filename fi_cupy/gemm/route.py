"""Whether a product goes to the Hopper kernels."""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import DType


@lru_cache(maxsize=4096)
def hopper_refusal(device: DeviceInfo, dtype: DType, n: int, k: int) -> str:
    """Why the Hopper kernels do not take a product with these extents; "" if they do."""
    if device.arch != "90a":
        return f"the device runs sm_{device.arch} code"
    if find_spec("fi_cupy.gemm.hopper") is None:
        return "there is no Hopper kernel"
    from fi_cupy.gemm import hopper

    return hopper.hopper_refusal(device, dtype, n, k)
