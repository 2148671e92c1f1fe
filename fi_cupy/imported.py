"""Arrays of JAX, and of whoever speaks DLPack or ``__cuda_array_interface__``: how they are lent, and how long kept."""

from __future__ import annotations

import sys
import threading
from collections import deque
from typing import Any

import numpy as np

from fi_cupy import dtypes
from fi_cupy.arrays import CPU, Framework, View, cupy_dtype, cupy_stream, framework, kind_of
from fi_cupy.dtypes import DType
from fi_cupy.errors import DeviceError, DTypeError, FrameworkError, ImmutableArrayError


class _Imported(View):
    """Memory that another framework lends through DLPack, kept until the work queued on it has run.

    An operator's views die when it returns, after its launch: that is when the end of the work can be marked. Giving
    the memory back earlier would let its owner use it again on a stream of its own.
    """

    __slots__ = ()

    def __del__(self) -> None:
        if not sys.is_finalizing():
            _hold(self.array, self.device)


class _Foreign(Framework):
    """Arrays that come in through DLPack: read only, imported on CuPy's current stream."""

    def _import(self, array: Any) -> View:
        kind_of_device, _ = array.__dlpack_device__()
        if int(kind_of_device) in (1, 3):  # kDLCPU, kDLCUDAHost
            try:
                host = np.from_dlpack(array)
            except (RuntimeError, BufferError) as error:  # NumPy's import knows no bf16 and no fp8
                raise DTypeError(f"cannot be imported into NumPy through DLPack: {error}") from None
            inner = framework("numpy").view(host)
            return View(self, array, 0, inner.shape, inner.strides, inner.dtype, CPU, host)
        if int(kind_of_device) not in (2, 13):  # kDLCUDA, kDLCUDAManaged
            raise DeviceError(f"is on DLPack device type {int(kind_of_device)}, expected 2 (CUDA) or 1 (CPU)")
        import cupy

        imported = cupy.from_dlpack(array)
        inner = framework("cupy").view(imported)
        _fence_torch(inner.device)
        return _Imported(self, imported, inner.ptr, inner.shape, inner.strides, inner.dtype, inner.device)

    def empty(self, shape: tuple[int, ...], dtype: DType, like: View) -> View:
        return framework("numpy" if like.is_cpu else "cupy").empty(shape, dtype, like)

    def check_writable(self, view: View, op: str, name: str) -> None:
        raise ImmutableArrayError(
            f"{op}: {name} is a {self.name} array, which must not be written in place; use the functional form, "
            "or pass a CuPy, torch or NumPy array"
        )

    def to_host(self, view: View) -> np.ndarray[Any, Any]:
        return view.array.get().view(view.dtype.np)


class DLPack(_Foreign):
    name = "dlpack"

    def view(self, array: Any) -> View:
        return self._import(array)


class CudaArray(_Foreign):
    """Arrays that have only ``__cuda_array_interface__``, Numba's for example: memory that may be written.

    CuPy waits for the stream that the array names before it hands the memory over.
    """

    name = "cuda_array_interface"

    def __init__(self, writable: bool = True) -> None:
        self._writable = writable

    def view(self, array: Any) -> View:
        import cupy

        imported = cupy.asarray(array)
        inner = framework("cupy").view(imported)
        _fence_torch(inner.device)
        read_only = bool(array.__cuda_array_interface__["data"][1])
        owner = CudaArray(False) if read_only else self
        return _Imported(owner, imported, inner.ptr, inner.shape, inner.strides, inner.dtype, inner.device)

    def check_writable(self, view: View, op: str, name: str) -> None:
        if not self._writable:
            raise ImmutableArrayError(f"{op}: {name} is a read-only array, expected a writable one; pass a copy")


class Jax(_Foreign):
    name = "jax"

    def view(self, array: Any) -> View:
        import jax

        if isinstance(array, jax.core.Tracer):
            raise FrameworkError(
                "is a JAX tracer, expected a concrete array; inside jax.jit use the operators of fi_cupy.interop.jax"
            )
        devices = array.devices()
        if len(devices) != 1:
            raise DeviceError(f"lies on {len(devices)} JAX devices, expected one (use jax.shard_map)")
        kind = kind_of(array.dtype)
        (device,) = devices
        if device.platform == "cpu":
            host = np.asarray(array)
            inner = framework("numpy").view(host)
            return View(self, array, 0, inner.shape, inner.strides, kind, CPU, host)
        if array.size == 0:
            strides = framework("numpy").view(np.empty(array.shape, np.uint8)).strides
            return View(self, array, 0, array.shape, strides, kind, device.local_hardware_id)
        if kind in dtypes.FP8_TYPES:  # refused by CuPy's DLPack import: travel as bytes
            return self._import(jax.lax.bitcast_convert_type(array, np.uint8)).typed(kind)
        if kind is dtypes.bool_:
            return self._import(array.astype(np.uint8)).typed(kind)
        return self._import(array)

    def empty(self, shape: tuple[int, ...], dtype: DType, like: View) -> View:
        """Memory of JAX's own allocator, lent to us until `result`.

        JAX reuses its memory in the order of its own stream, which knows who still reads it. CuPy's allocator does
        not: it could hand out a dropped result again while JAX is still computing with it. The memory is asked for
        as bytes, because JAX narrows 64-bit types unless x64 is enabled.
        """
        import jax

        if like.is_cpu:
            host = np.empty(shape, dtype.np)
            return View(self, like.array, 0, shape, framework("numpy").view(host).strides, dtype, CPU, host)
        nbytes = dtype.itemsize
        for extent in shape:
            nbytes *= extent
        if nbytes == 0:
            return View(self, None, 0, shape, (0,) * len(shape), dtype, like.device)
        import cupy

        with jax.default_device(_jax_gpu(like.device)):
            made = jax.lax.empty((nbytes,), np.uint8)
        typed = cupy.from_dlpack(made).view(cupy_dtype(dtype)).reshape(shape)
        inner = framework("cupy").view(typed)
        return _Imported(self, typed, inner.ptr, shape, inner.strides, dtype, like.device)

    def result(self, view: View) -> Any:
        """A JAX array; 64-bit types become 32-bit ones unless x64 is enabled, as everywhere in JAX."""
        import jax

        if view.is_cpu:
            (device,) = view.array.devices()
            return jax.device_put(view.numpy(), device)
        if view.size == 0:
            return jax.device_put(np.empty(view.shape, view.dtype.np), _jax_gpu(view.device))
        made = jax.dlpack.from_dlpack(view.array)
        return jax.lax.bitcast_convert_type(made, view.dtype.np) if view.dtype in dtypes.FP8_TYPES else made

    def to_host(self, view: View) -> np.ndarray[Any, Any]:
        return super().to_host(view) if view.size else np.empty(view.shape, view.dtype.np)


def _jax_gpu(index: int) -> Any:
    import jax

    return next(d for d in jax.local_devices(backend="gpu") if d.local_hardware_id == index)


#: Lent arrays and the events that end the work queued on them; arrays that a recorded CUDA graph reads, for good.
_held: deque[tuple[list[Any], Any]] = deque()
_captured: list[Any] = []
_held_lock = threading.Lock()


def _work_streams(device: int) -> list[int]:
    """The streams an operator may have used: CuPy's current one, and torch's where torch is in use."""
    streams = [cupy_stream(device)]
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        other = framework("torch").stream(device)
        if other != streams[0]:
            streams.append(other)
    return streams


def _fence_torch(device: int) -> None:
    """Let torch's stream wait for what CuPy's stream waits for: a torch tensor may be the operator's first array."""
    streams = _work_streams(device)
    if len(streams) == 1:
        return
    from cupy.cuda import Device, Event, runtime

    with Device(device):
        event = Event(disable_timing=True)
        runtime.eventRecord(event.ptr, streams[0])
        runtime.streamWaitEvent(streams[1], event.ptr)


def _hold(array: Any, device: int) -> None:
    """Keep `array` until the current streams have passed this point."""
    from cupy.cuda import Device, Event, runtime

    if _held_lock.acquire(blocking=False):
        try:
            while _held and all(event.done for event in _held[0][0]):
                _held.popleft()
        finally:
            _held_lock.release()
    events = []
    try:
        with Device(device):
            for stream in _work_streams(device):
                if runtime.streamIsCapturing(stream):
                    _captured.append(array)
                    return
                event = Event(disable_timing=True)
                runtime.eventRecord(event.ptr, stream)
                events.append(event)
    except runtime.CUDARuntimeError:  # a capture elsewhere forbids asking
        _captured.append(array)
        return
    _held.append((events, array))
