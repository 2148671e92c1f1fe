"""Dequantisation factors of attention: numbers, which join other factors on the host, and arrays, one a head."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner
from fi_cupy.dtypes import float32
from fi_cupy.errors import ShapeError


class Scales(NamedTuple):
    """The factors of one call.

    Attributes
    ----------
    logit : float
        Product of the numbers for q and k: multiplies sm_scale.
    output : float
        The number for v: multiplies the output, not the lse.
    q, k, v : View or None
        float32 arrays, one factor a head or one for all.
    """

    logit: float = 1.0
    output: float = 1.0
    q: View | None = None
    k: View | None = None
    v: View | None = None

    @property
    def on_logits(self) -> bool:
        """Whether the GPU alone knows the scale of the logits."""
        return self.q is not None or self.k is not None

    def kernel_values(self) -> tuple[int, ...]:
        """Fields of struct HeadScales (kernels/attention/head_scales.cuh)."""
        if self.q is None and self.k is None and self.v is None:
            return _NONE
        arrays = self.q, self.k, self.v
        pointers = [0 if x is None else x.ptr for x in arrays]
        return (*pointers, *(0 if x is None or x.size == 1 else 1 for x in arrays), 0)

    def reference(self) -> dict[str, Any]:
        """Keyword arguments of the NumPy reference, which takes `logit` as part of sm_scale."""
        q, k, v = (None if x is None else x.numpy() for x in (self.q, self.k, self.v))
        return {"q_scale": q, "k_scale": k, "v_scale": self.output if v is None else self.output * v}


_NONE = (0,) * 7


def read_scales(
    op: str, x: View, num_qo_heads: int, num_kv_heads: int, q_scale: Any = None, k_scale: Any = None,
    v_scale: Any = None, names: tuple[str, str, str] = ("q_scale", "k_scale", "v_scale"),
) -> Scales:  # fmt: skip
    """The factors of a call on the device of `x`.

    Parameters
    ----------
    q_scale, k_scale, v_scale : float, or float32 array [heads] or [1], optional
        An array of one element in host memory counts as a number.
    names : tuple of str
        What the caller calls them.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError
    """
    if q_scale is None and k_scale is None and v_scale is None:
        return _PLAIN
    numbers, arrays = [], []
    for name, value, heads in zip(
        names, (q_scale, k_scale, v_scale), (num_qo_heads, num_kv_heads, num_kv_heads), strict=True
    ):
        number, array = _read(op, name, value, heads, x)
        numbers.append(number)
        arrays.append(array)
    return Scales(numbers[0] * numbers[1], numbers[2], *arrays)


_PLAIN = Scales()


def _read(op: str, name: str, value: Any, heads: int, x: View) -> tuple[float, View | None]:
    if value is None:
        return 1.0, None
    if isinstance(value, (int, float, np.floating, np.integer)):
        return float(value), None
    y = view(np.asarray(value, np.float32) if isinstance(value, (list, tuple)) else value, op, name)
    if y.is_cpu and y.size == 1:
        return float(y.host().reshape(-1)[0]), None
    if y.size != 1 and y.shape != (heads,):
        raise ShapeError(f"{op}: {name} has shape {y.shape}, expected a number or ({heads},) factors, one a head")
    check_dtype(op, name, y, (float32,))
    check_device(op, x, **{name: y})
    check_inner(op, name, y)
    return 1.0, y
