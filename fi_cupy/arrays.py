"""Arrays of any framework as one small `View`: pointer, shape, strides, dtype, device and stream.

Hot paths read a CuPy or torch array through its own attributes (0.2 to 1 µs); DLPack (27 µs for a torch tensor into
CuPy) is the general door for everything else, ``__cuda_array_interface__`` for what has only that (Numba). Outputs are
made by the caller's own framework, on the caller's device.
CPU arrays (device −1) run the NumPy reference.

Streams: an operator launches on the stream of its first array: torch's current stream for torch tensors, CuPy's for
everything else. A JAX or other DLPack array is imported by DLPack's rules (the producer makes the stream wait for its
work) and is kept alive until the work that was queued on it has run. Arrays of two frameworks in one call are ordered
by the caller, as torch and CuPy streams are among themselves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from fi_cupy import dtypes
from fi_cupy.dtypes import DType, dtype
from fi_cupy.errors import (
    ArgumentError,
    DeviceError,
    DTypeError,
    FrameworkError,
    ImmutableArrayError,
    LayoutError,
)

CPU = -1


class View:
    """What an operator needs to know of an array, without a copy.

    Attributes
    ----------
    ptr : int
        Address of the first element (0 for CPU arrays, which are read through `numpy`).
    shape, strides : tuple of int
        Extents and strides, both in elements.
    dtype : DType
        Element type.
    device : int
        GPU index, or -1 for the CPU.
    array
        The framework's own array.
    """

    __slots__ = ("_framework", "_host", "array", "device", "dtype", "ptr", "shape", "strides")

    def __init__(
        self,
        framework: Framework,
        array: Any,
        ptr: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        dtype: DType,
        device: int,
        host: np.ndarray[Any, Any] | None = None,
    ) -> None:
        self._framework = framework
        self.array = array
        self.ptr = ptr
        self.shape = shape
        self.strides = strides
        self.dtype = dtype
        self.device = device
        self._host = host

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        n = 1
        for extent in self.shape:
            n *= extent
        return n

    @property
    def is_cpu(self) -> bool:
        return self.device < 0

    @property
    def reference_types(self) -> bool:
        """Whether the NumPy reference computes, which takes float32 where kernels take 16-bit types."""
        return self.device < 0

    @property
    def framework(self) -> str:
        """One of "numpy", "cupy", "torch", "jax", "dlpack" or "cuda_array_interface"."""
        return self._framework.name

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie in C order without gaps."""
        expected = 1
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1:
                if stride != expected:
                    return self.size == 0
                expected *= extent
        return True

    def numpy(self) -> np.ndarray[Any, Any]:
        """The CPU array's memory as an ndarray (bf16 and fp8 with ml_dtypes' dtypes)."""
        if self._host is None:
            raise DeviceError("array is on a GPU, expected the CPU")
        return self._host

    def host(self) -> np.ndarray[Any, Any]:
        """The values as an ndarray: the CPU array itself, or a copy that waits for the GPU."""
        return self._host if self._host is not None else self._framework.to_host(self)

    def write(self, values: np.ndarray[Any, Any]) -> None:
        """Copy values into a CPU array."""
        np.copyto(self.numpy(), values, casting="unsafe")

    def empty(self, shape: tuple[int, ...], dtype: DType | None = None) -> View:
        """A new C-order array of the caller's framework on the same device."""
        return self._framework.empty(shape, dtype or self.dtype, self)

    def result(self) -> Any:
        """The array to hand back to the caller."""
        return self._framework.result(self)

    def stream(self) -> int:
        """The raw ``cudaStream_t`` that the caller's work is on."""
        return self._framework.stream(self.device)

    def writable(self, op: str, name: str) -> View:
        """This view, or an error if the array must not be written."""
        self._framework.check_writable(self, op, name)
        if 0 in self.strides and any(s == 0 and n > 1 for s, n in zip(self.strides, self.shape, strict=True)):
            if self.size:
                raise LayoutError(
                    f"{op}: {name} has strides {self.strides}, expected elements that do not overlap; pass a copy"
                )
        return self

    def typed(self, dtype: DType) -> View:
        """The same memory as another type of the same item size (fp8 that travels as bytes)."""
        if dtype is self.dtype:
            return self
        if dtype.itemsize != self.dtype.itemsize:
            raise LayoutError(f"array has dtype {self.dtype.name}, which cannot be read as {dtype.name}")
        host = None if self._host is None else self._host.view(dtype.np)
        return type(self)(self._framework, self.array, self.ptr, self.shape, self.strides, dtype, self.device, host)


class Framework:
    """How one framework's arrays are read and made."""

    name = ""

    def view(self, array: Any) -> View:
        raise NotImplementedError

    def empty(self, shape: tuple[int, ...], dtype: DType, like: View) -> View:
        raise NotImplementedError

    def result(self, view: View) -> Any:
        return view.array

    def stream(self, device: int) -> int:
        return cupy_stream(device)

    def check_writable(self, view: View, op: str, name: str) -> None:
        pass

    def to_host(self, view: View) -> np.ndarray[Any, Any]:
        raise NotImplementedError


def kind_of(obj: Any) -> DType:
    """`dtypes.dtype`, with an error that `view` completes."""
    try:
        return dtype(obj)
    except DTypeError:
        raise DTypeError(f"has dtype {obj}, expected one of {', '.join(d.name for d in dtypes.ALL)}") from None


def cupy_stream(device: int) -> int:
    from cupy.cuda import get_current_stream

    return int(get_current_stream(device).ptr)


class _NumPy(Framework):
    name = "numpy"

    def view(self, array: Any) -> View:
        given = array.dtype
        kind = dtypes._KNOWN.get(given) or kind_of(given)
        if not given.isnative:
            raise DTypeError(f"has the foreign byte order of {given.str!r}, expected the machine's own")
        itemsize, strides = given.itemsize, array.strides
        for s in strides:
            if s % itemsize:
                raise LayoutError(f"has strides of {strides} bytes, expected multiples of its {itemsize}-byte elements")
        return View(self, array, 0, array.shape, tuple([s // itemsize for s in strides]), kind, CPU, array)

    def empty(self, shape: tuple[int, ...], dtype: DType, like: View) -> View:
        return self.view(np.empty(shape, dtype.np))

    def check_writable(self, view: View, op: str, name: str) -> None:
        if not view.array.flags.writeable:
            raise ImmutableArrayError(f"{op}: {name} is a read-only NumPy array, expected a writable one; pass a copy")


class _CuPy(Framework):
    name = "cupy"

    def __init__(self) -> None:
        from cupy.cuda import get_current_stream

        self._current = get_current_stream

    def view(self, array: Any) -> View:
        kind = dtypes._KNOWN.get(array.dtype) or kind_of(array.dtype)
        size = kind.itemsize
        data = array.data
        return View(self, array, data.ptr, array.shape, tuple([s // size for s in array.strides]), kind, data.device_id)

    def empty(self, shape: tuple[int, ...], dtype: DType, like: View) -> View:
        import cupy

        if like.device != cupy.cuda.runtime.getDevice():
            with cupy.cuda.Device(like.device):
                return self.empty(shape, dtype, like)
        made = self.view(cupy.empty(shape, cupy_dtype(dtype)))
        made.dtype = dtype
        return made

    def stream(self, device: int) -> int:
        return self._current(device).ptr

    def to_host(self, view: View) -> np.ndarray[Any, Any]:
        return view.array.get().view(view.dtype.np)


def cupy_dtype(kind: DType) -> np.dtype[Any]:
    """CuPy has no fp8: such arrays are bytes that carry their type in the view."""
    return np.dtype(np.uint8) if kind in dtypes.FP8_TYPES else kind.np


class _Torch(Framework):
    name = "torch"

    def __init__(self) -> None:
        import torch

        self._torch = torch
        self._dtypes = {d.name: getattr(torch, d.name) for d in dtypes.ALL if hasattr(torch, d.name)}
        self._stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def view(self, array: Any) -> View:
        kind = dtypes._KNOWN.get(array.dtype) or kind_of(array.dtype)
        if not array.is_cuda:
            return self._cpu_view(array, kind)
        try:
            ptr = array.data_ptr()
            made = View(self, array, ptr, tuple(array.shape), array.stride(), kind, array.get_device())
        except (RuntimeError, NotImplementedError):
            raise _no_memory(array) from None
        if ptr == 0 and made.size:
            raise _no_memory(array)
        if kind is dtypes.float32 and array.is_neg():
            raise _negated()
        return made

    def _cpu_view(self, array: Any, kind: DType) -> View:
        if array.device.type != "cpu":
            raise DeviceError(f"is on {array.device}, expected a CUDA GPU or the CPU")
        if array.layout is not self._torch.strided:
            raise _no_memory(array)
        if array.is_neg():
            raise _negated()
        try:
            host = self._to_numpy(array.detach(), kind)
        except (RuntimeError, NotImplementedError):
            raise _no_memory(array) from None
        return View(self, array, 0, tuple(array.shape), array.stride(), kind, CPU, host)

    def _to_numpy(self, array: Any, kind: DType) -> np.ndarray[Any, Any]:
        torch = self._torch
        if kind is dtypes.bfloat16:
            return array.view(torch.int16).numpy().view(kind.np)
        if kind in dtypes.FP8_TYPES:
            return array.view(torch.uint8).numpy().view(kind.np)
        return array.numpy()

    def empty(self, shape: tuple[int, ...], dtype: DType, like: View) -> View:
        made = self._torch.empty(shape, dtype=self._dtypes[dtype.name], device=like.array.device)
        return self.view(made)

    def stream(self, device: int) -> int:
        if self._stream is not None:
            return self._stream(device)
        return self._torch.cuda.current_stream(device).cuda_stream

    def to_host(self, view: View) -> np.ndarray[Any, Any]:
        return self._to_numpy(view.array.detach().cpu(), view.dtype)


def _no_memory(array: Any) -> LayoutError:
    return LayoutError(f"is a {type(array).__name__} of layout {array.layout}, expected a strided tensor in memory")


def _negated() -> LayoutError:
    return LayoutError("has torch's negative bit set, expected its values in memory; pass tensor.resolve_neg()")


_numpy = _NumPy()
_frameworks: dict[str, Framework] = {"numpy": _numpy}


def _foreign(name: str) -> Framework:
    from fi_cupy import imported

    kinds: dict[str, Callable[[], Framework]] = {"jax": imported.Jax, "dlpack": imported.DLPack}
    return kinds.get(name, imported.CudaArray)()


_FACTORIES: dict[str, Callable[[], Framework]] = {
    "cupy": _CuPy,
    "torch": _Torch,
    "jax": lambda: _foreign("jax"),
    "dlpack": lambda: _foreign("dlpack"),
    "cuda_array_interface": lambda: _foreign("cuda_array_interface"),
}


def framework(name: str) -> Framework:
    found = _frameworks.get(name)
    if found is None:
        found = _frameworks[name] = _FACTORIES[name]()
    return found


_by_type: dict[type, Callable[[Any], View]] = {np.ndarray: _numpy.view}


def view(array: Any, op: str = "", name: str = "array") -> View:
    """Return the `View` of an array of any framework.

    Raises
    ------
    FrameworkError
        The object is no array: neither NumPy, CuPy, torch nor JAX, and it has no ``__dlpack__``.
    DTypeError, DeviceError, LayoutError
        Its type, device or memory layout is none of ours.
    """
    try:
        return (_by_type.get(type(array)) or _reader(array))(array)
    except ArgumentError as error:
        raise type(error)(f"{op}: {name} {error}" if op else f"{name} {error}") from None


def _reader(array: Any) -> Callable[[Any], View]:
    kind = type(array)
    for base in kind.__mro__:
        root = base.__module__.split(".", 1)[0]
        if root in ("numpy", "cupy", "torch") and base.__name__ in ("ndarray", "Tensor"):
            chosen = framework(root)
            if isinstance(array, np.ma.MaskedArray):
                raise FrameworkError("is a masked array, expected a plain one; pass array.filled(value)")
            break
    else:
        jax = sys.modules.get("jax")
        if jax is not None and isinstance(array, jax.Array):
            chosen = framework("jax")
        elif hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
            chosen = framework("dlpack")
        elif hasattr(array, "__cuda_array_interface__"):
            chosen = framework("cuda_array_interface")
        else:
            raise FrameworkError(
                f"is a {kind.__module__}.{kind.__qualname__}, expected an array: "
                "NumPy, CuPy, torch, JAX or anything that speaks DLPack or __cuda_array_interface__"
            )
    _by_type[kind] = chosen.view
    return chosen.view
