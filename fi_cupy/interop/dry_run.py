"""An operator's own checks on arrays of which only shape and dtype are known: what a tracer calls before it records.

The operator runs on views without memory. Its checks see everything that they would see later; the first look at a
value ends the run. So a jitted or compiled function raises the same typed errors, with the same texts, as an eager
call, and no check is written twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

from fi_cupy import arrays
from fi_cupy.arrays import CPU, Framework, View
from fi_cupy.dtypes import DType
from fi_cupy.errors import DTypeError


class Shaped:
    """An array of which only shape and dtype are known; C order unless strides are given.

    Parameters
    ----------
    shape : tuple of int
    dtype : DType
    strides : tuple of int, optional
        In elements.
    device : int
        Where a planned wrapper lives: its arrays have to agree with it.
    kernels : bool
        Types are those of the kernels, not those of the NumPy reference, which takes float32 for a 16-bit type, too.
    """

    __slots__ = ("device", "dtype", "kernels", "shape", "strides")

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: DType,
        strides: tuple[int, ...] | None = None,
        device: int = CPU,
        kernels: bool = False,
    ) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype
        self.strides = dense(self.shape) if strides is None else tuple(strides)
        self.device = device
        self.kernels = kernels

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def reshape(self, *shape: int) -> Shaped:
        """Another shape of as many elements, as a copy would have it."""
        return Shaped(shape, self.dtype, None, self.device, self.kernels)

    def swapaxes(self, a: int, b: int) -> Shaped:
        """Two axes exchanged, as a view would have it."""
        shape, strides = list(self.shape), list(self.strides)
        shape[a], shape[b] = shape[b], shape[a]
        strides[a], strides[b] = strides[b], strides[a]
        return Shaped(tuple(shape), self.dtype, tuple(strides), self.device, self.kernels)

    def __getitem__(self, rows: slice) -> Shaped:
        n = len(range(*rows.indices(self.shape[0])))
        return Shaped((n, *self.shape[1:]), self.dtype, self.strides, self.device, self.kernels)


def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
    """C-order strides in elements."""
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


class _Looked(BaseException):
    """A value was asked for: the checks are over. No `Exception`, so that nobody takes it for a failure."""


class _Values:
    """Stands for an array's values: may be sliced, and ends the dry run when anything is read."""

    def __getitem__(self, key: Any) -> _Values:
        return self

    def __getattr__(self, name: str) -> Any:
        raise _Looked

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise _Looked

    def view(self, *args: Any) -> _Values:
        return self

    def swapaxes(self, a: int, b: int) -> _Values:
        return self


def _look(*args: Any) -> Any:
    raise _Looked


for _name in (
    "len", "iter", "bool", "float", "int", "index", "contains", "lt", "le", "eq", "ne", "gt", "ge", "add", "radd",
    "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "mod", "neg", "invert", "and", "or", "matmul",
):  # fmt: skip
    setattr(_Values, f"__{_name}__", _look)

_VALUES = _Values()


class _Unmade(Framework):
    """Makes outputs that have no memory either."""

    name = "shaped"

    def view(self, array: Shaped) -> View:
        return _Meta(self, array, 0, array.shape, array.strides, array.dtype, array.device, _VALUES)  # type: ignore[arg-type]

    def empty(self, shape: tuple[int, ...], dtype: DType, like: View) -> View:
        made = Shaped(shape, dtype, None, like.device, like.array.kernels)
        _made.arrays.append(made)
        return self.view(made)

    def stream(self, device: int) -> int:
        raise _Looked


class _Meta(View):
    """A view that takes the reference's way, where the first thing to happen after the checks is a look at a value."""

    __slots__ = ()

    @property
    def is_cpu(self) -> bool:
        return True

    @property
    def reference_types(self) -> bool:
        return not self.array.kernels


_UNMADE = _Unmade()
arrays._by_type[Shaped] = _UNMADE.view


class _Made(threading.local):
    """What the present dry run has asked memory for."""

    def __init__(self) -> None:
        self.arrays: list[Shaped] = []


_made = _Made()


def check(
    operator: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> tuple[Shaped, ...]:
    """Run the checks of ``operator(*args, **kwargs)``, whose arrays are `Shaped`; raises what the operator raises.

    Returns the arrays that the operator had made when the checks were over.
    """
    _made.arrays = []
    try:
        operator(*args, **(kwargs or {}))
    except _Looked:
        pass
    return tuple(_made.arrays)


def known_dtype(op: str, name: str, given: Any) -> DType:
    """The `DType` of a framework's dtype object, or an error that names operator and argument."""
    from fi_cupy.dtypes import ALL, dtype

    try:
        return dtype(given)
    except DTypeError:
        names = ", ".join(d.name for d in ALL)
        raise DTypeError(f"{op}: {name} has dtype {given}, expected one of {names}") from None
