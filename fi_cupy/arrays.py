"""Arrays of any framework as one small `View`: pointer, shape, strides, dtype, device and stream.

Hot paths read a CuPy or torch array through its own attributes (0.2 to 1 µs); DLPack (27 µs for a torch tensor into
CuPy) is the general door for everything else. Outputs are made by the caller's own framework, on the caller's device.
CPU arrays (device −1) run the NumPy reference.

Streams: torch's current stream for torch tensors, CuPy's current stream for everything else. A JAX or other DLPack
array is imported on CuPy's current stream by DLPack's rules (the producer makes that stream wait for its work), and
is kept alive until the work that was queued on it has run.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from fi_cupy import dtypes
from fi_cupy.dtypes import DType, dtype
from fi_cupy.errors import DeviceError, FrameworkError, ImmutableArrayError, LayoutError

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
    def framework(self) -> str:
        """One of "numpy", "cupy", "torch", "jax" or "dlpack"."""
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
        return self

    def typed(self, dtype: DType) -> View:
        """The same memory as another type of the same item size (fp8 that travels as bytes)."""
        if dtype is self.dtype:
            return self
        if dtype.itemsize != self.dtype.itemsize:
            raise LayoutError(f"array has dtype {self.dtype.name}, which cannot be read as {dtype.name}")
        host = None if self._host is None else self._host.view(dtype.np)
        return View(self._framework, self.array, self.ptr, self.shape, self.strides, dtype, self.device, host)


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
        return _cupy_stream(device)

    def check_writable(self, view: View, op: str, name: str) -> None:
        pass

    def to_host(self, view: View) -> np.ndarray[Any, Any]:
        raise NotImplementedError


def _cupy_stream(device: int) -> int:
    from cupy.cuda import get_current_stream

    return int(get_current_stream(device).ptr)


class _NumPy(Framework):
    name = "numpy"

    def view(self, array: Any) -> View:
        kind = dtype(array.dtype)
        itemsize = array.dtype.itemsize
        return View(self, array, 0, array.shape, tuple(s // itemsize for s in array.strides), kind, CPU, array)

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
        kind = dtypes._KNOWN.get(array.dtype) or dtype(array.dtype)
        size = kind.itemsize
        data = array.data
        return View(self, array, data.ptr, array.shape, tuple([s // size for s in array.strides]), kind, data.device_id)

    def empty(self, shape: tuple[int, ...], dtype: DType, like: View) -> View:
        import cupy

        if like.device != cupy.cuda.runtime.getDevice():
            with cupy.cuda.Device(like.device):
                return self.view(cupy.empty(shape, _cupy_dtype(dtype)))
        made = self.view(cupy.empty(shape, _cupy_dtype(dtype)))
        made.dtype = dtype
        return made

    def stream(self, device: int) -> int:
        return self._current(device).ptr  # type: ignore[no-any-return]

    def to_host(self, view: View) -> np.ndarray[Any, Any]:
        return view.array.get().view(view.dtype.np)  # type: ignore[no-any-return]


def _cupy_dtype(kind: DType) -> np.dtype[Any]:
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
        kind = dtypes._KNOWN.get(array.dtype) or dtype(array.dtype)
        if array.is_cuda:
            return View(self, array, array.data_ptr(), tuple(array.shape), array.stride(), kind, array.get_device())
        if array.device.type != "cpu":
            raise DeviceError(f"torch tensor is on {array.device}, expected a CUDA GPU or the CPU")
        host = self._to_numpy(array.detach(), kind)
        return View(self, array, 0, tuple(array.shape), array.stride(), kind, CPU, host)

    def _to_numpy(self, array: Any, kind: DType) -> np.ndarray[Any, Any]:
        torch = self._torch
        if kind is dtypes.bfloat16:
            return array.view(torch.int16).numpy().view(kind.np)  # type: ignore[no-any-return]
        if kind in dtypes.FP8_TYPES:
            return array.view(torch.uint8).numpy().view(kind.np)  # type: ignore[no-any-return]
        return array.numpy()  # type: ignore[no-any-return]

    def empty(self, shape: tuple[int, ...], dtype: DType, like: View) -> View:
        made = self._torch.empty(shape, dtype=self._dtypes[dtype.name], device=like.array.device)
        return self.view(made)

    def stream(self, device: int) -> int:
        if self._stream is not None:
            return self._stream(device)  # type: ignore[no-any-return]
        return self._torch.cuda.current_stream(device).cuda_stream  # type: ignore[no-any-return]

    def to_host(self, view: View) -> np.ndarray[Any, Any]:
        return self._to_numpy(view.array.detach().cpu(), view.dtype)


class _Foreign(Framework):
    """Arrays that come in through DLPack: read only, imported on CuPy's current stream."""

    def _import(self, array: Any) -> View:
        kind_of_device, _ = array.__dlpack_device__()
        if int(kind_of_device) in (1, 3):  # kDLCPU, kDLCUDAHost
            host = np.from_dlpack(array)
            inner = _numpy.view(host)
            return View(self, array, 0, inner.shape, inner.strides, inner.dtype, CPU, host)
        if int(kind_of_device) not in (2, 13):  # kDLCUDA, kDLCUDAManaged
            raise DeviceError(f"array is on DLPack device type {kind_of_device}, expected 2 (CUDA) or 1 (CPU)")
        import cupy

        imported = cupy.from_dlpack(array)
        _pending.append(imported)
        inner = _framework("cupy").view(imported)
        return View(self, imported, inner.ptr, inner.shape, inner.strides, inner.dtype, inner.device)

    def empty(self, shape: tuple[int, ...], dtype: DType, like: View) -> View:
        made = (_numpy if like.is_cpu else _framework("cupy")).empty(shape, dtype, like)
        made._framework = self
        return made

    def check_writable(self, view: View, op: str, name: str) -> None:
        raise ImmutableArrayError(
            f"{op}: {name} is a {self.name} array, which must not be written in place; use the functional form, "
            "or pass a CuPy, torch or NumPy array"
        )

    def to_host(self, view: View) -> np.ndarray[Any, Any]:
        return view.array.get()  # type: ignore[no-any-return]

    def result(self, view: View) -> Any:
        if not view.is_cpu:
            _retire()
        return view.array


class _DLPack(_Foreign):
    name = "dlpack"

    def view(self, array: Any) -> View:
        return self._import(array)


class _Jax(_Foreign):
    name = "jax"

    def view(self, array: Any) -> View:
        import jax

        if isinstance(array, jax.core.Tracer):
            raise FrameworkError(
                "array is a JAX tracer, expected a concrete array: operators run outside jax.jit, grad and vmap"
            )
        if len(array.devices()) != 1:
            raise DeviceError(f"jax array lies on {len(array.devices())} devices, expected one (use jax.shard_map)")
        kind = dtype(array.dtype)
        if next(iter(array.devices())).platform == "cpu":
            host = np.asarray(array)
            inner = _numpy.view(host)
            return View(self, array, 0, inner.shape, inner.strides, kind, CPU, host)
        if kind in dtypes.FP8_TYPES or kind is dtypes.bool_:  # refused by CuPy's DLPack import: travel as bytes
            fp8 = kind in dtypes.FP8_TYPES
            bytes_ = jax.lax.bitcast_convert_type(array, np.uint8) if fp8 else array.astype(np.uint8)
            return self._import(bytes_).typed(kind)
        return self._import(array)

    def result(self, view: View) -> Any:
        import jax

        if view.is_cpu:
            return jax.numpy.asarray(view.numpy())
        _retire()
        made = jax.dlpack.from_dlpack(view.array)
        return jax.lax.bitcast_convert_type(made, view.dtype.np) if view.dtype in dtypes.FP8_TYPES else made


#: Imported arrays whose work is not queued yet, and those queued with the event that ends it.
_pending: list[Any] = []
_retired: deque[tuple[Any, list[Any]]] = deque()


def _retire() -> None:
    """Hold what was imported until the current stream has passed this point."""
    from cupy.cuda import Event

    while _retired and _retired[0][0].done:
        _retired.popleft()
    if _pending:
        event = Event(disable_timing=True)
        event.record()
        _retired.append((event, _pending.copy()))
        _pending.clear()


_numpy = _NumPy()
_frameworks: dict[str, Framework] = {"numpy": _numpy}
_FACTORIES: dict[str, Callable[[], Framework]] = {"cupy": _CuPy, "torch": _Torch, "jax": _Jax, "dlpack": _DLPack}


def _framework(name: str) -> Framework:
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
    DTypeError, DeviceError
        Its type or device is none of ours.
    """
    reader = _by_type.get(type(array))
    if reader is None:
        reader = _reader(array, op, name)
    return reader(array)


def _reader(array: Any, op: str, name: str) -> Callable[[Any], View]:
    kind = type(array)
    for base in kind.__mro__:
        root = base.__module__.split(".", 1)[0]
        if root in ("numpy", "cupy", "torch") and base.__name__ in ("ndarray", "Tensor"):
            chosen = _framework(root)
            break
    else:
        jax = sys.modules.get("jax")
        if jax is not None and isinstance(array, jax.Array):
            chosen = _framework("jax")
        elif hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__"):
            chosen = _framework("dlpack")
        else:
            raise FrameworkError(
                f"{op}: {name} is a {kind.__module__}.{kind.__qualname__}, expected an array: "
                "NumPy, CuPy, torch, JAX or anything that speaks DLPack"
            )
    _by_type[kind] = chosen.view
    return chosen.view
