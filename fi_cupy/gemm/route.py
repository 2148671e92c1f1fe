"""Whether a product goes to the Hopper kernels."""

from __future__ import annotations

from functools import lru_cache

from fi_cupy.arrays import View
from fi_cupy.device import DeviceInfo
from fi_cupy.gemm import hopper

_refusal = lru_cache(maxsize=4096)(hopper.hopper_refusal)


def refusal(device: DeviceInfo, n: int, a: View, *others: View) -> str:
    """Why the Hopper kernels do not take the product of `a` with n columns; "" if they do."""
    text = _refusal(device, a.dtype, n, a.shape[-1])
    if not text and not all(map(hopper.mappable, (a, *others))):
        return "strides overlap or are negative"
    return text


def on_hopper(device: DeviceInfo, n: int, a: View, *others: View) -> bool:
    """Whether the Hopper kernels take it."""
    return not refusal(device, n, a, *others)
