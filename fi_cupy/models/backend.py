"""The only part of the model that knows where arrays live: NumPy on the CPU, or CuPy on a GPU.

Everything above asks a `Backend` for memory, uploads, downloads and for "run this step again": on the CPU that calls
the step, on the GPU it replays the CUDA graph that was captured from it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike, NDArray

from fi_cupy.arrays import cupy_dtype
from fi_cupy.device import device_info
from fi_cupy.dtypes import DType
from fi_cupy.errors import CudaUnavailableError
from fi_cupy.models import ModelError

Array = Any
Step = Callable[[], None]
Fetch = Callable[[], NDArray[Any]]


class NumpyBackend:
    """Arrays in host memory, every operator from the NumPy reference.

    Parameters
    ----------
    dtype : optional
        Type of weights and activations; bf16 rounds where the GPU does, and is slow.
    """

    name = "numpy"
    xp: Any = np
    #: Steps that may be launched before the result of the oldest is looked at.
    lookahead = 0
    #: Whether a step is captured for each batch size, so that sizes should be few.
    captures = False
    #: Whether to launch kernels so that each may start before its predecessor has ended (it then waits for its inputs).
    pdl = False

    def __init__(self, dtype: DTypeLike = np.float32) -> None:
        self.dtype = np.dtype(dtype)

    @property
    def device_name(self) -> str:
        """What the run is on, for people."""
        return "CPU"

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """Make this backend's device and stream current."""
        return contextlib.nullcontext()

    def weight(self, values: NDArray[np.float32]) -> Array:
        """A float32 array of the host as a weight."""
        return values.astype(self.dtype, copy=False)

    def array(self, values: NDArray[Any]) -> Array:
        """A copy of a small host array on the device."""
        return np.array(values)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Array:
        """Memory with arbitrary contents, of the activations' type unless told."""
        return np.empty(shape, dtype if dtype is not None else self.dtype)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Array:
        """Zeroed memory, of the activations' type unless told."""
        return np.zeros(shape, dtype if dtype is not None else self.dtype)

    def stored(self, kind: DType) -> np.dtype[Any]:
        """The NumPy type of arrays that hold `kind` here."""
        return kind.np

    def host_buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """Host memory that `upload` reads."""
        return np.zeros(nbytes, np.uint8)

    def upload(self, host: NDArray[Any], device: Array) -> None:
        """Copy host to device in stream order, without waiting for the device."""
        device[...] = host

    def fetch(self, device: Array) -> Fetch:
        """Start a copy to the host; the function returned waits for it and gives the values."""
        values = device.copy()
        return lambda: values

    def capture(self, step: Step) -> Step:
        """A function that does what `step` does, on the same arrays."""
        return step

    def synchronize(self) -> None:
        """Wait for the device."""

    def free_bytes(self) -> int | None:
        """Free memory of the device, None where that is no limit worth asking for."""
        return None


class CupyBackend(NumpyBackend):
    """Arrays on the current GPU, bf16, every operator a CUDA kernel; steps are captured in CUDA graphs."""

    name = "cuda"
    lookahead = 1
    captures = True

    def __init__(self) -> None:
        reason = cuda_missing()
        if reason is not None:
            raise CudaUnavailableError(f"backend 'cuda': {reason}")
        import cupy

        super().__init__(ml_dtypes.bfloat16)
        self.xp = cupy
        self._device = cupy.cuda.Device()
        self.pdl = device_info(self._device.id).has_pdl
        self._stream = cupy.cuda.Stream(non_blocking=True)
        # What a captured step allocates belongs to its graph for good, so it must come from a pool that nothing else
        # draws from. Graphs of one backend run one after the other and may share it.
        self._graph_pool = cupy.cuda.MemoryPool()

    @property
    def device_name(self) -> str:
        """The GPU's product name."""
        return str(self.xp.cuda.runtime.getDeviceProperties(self._device.id)["name"].decode())

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make this backend's device and stream current."""
        with self._device, self._stream:
            yield

    def weight(self, values: NDArray[np.float32]) -> Array:
        """A float32 array of the host, rounded to bf16, on the device."""
        return self.xp.asarray(values.astype(ml_dtypes.bfloat16).view(np.uint16)).view(self.dtype)

    def array(self, values: NDArray[Any]) -> Array:
        """A copy of a small host array on the device."""
        return self.xp.asarray(values)

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Array:
        """Memory with arbitrary contents, of the activations' type unless told."""
        return self.xp.empty(shape, dtype if dtype is not None else self.dtype)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike | None = None) -> Array:
        """Zeroed memory, of the activations' type unless told."""
        array = self.empty(shape, dtype)
        array.data.memset_async(0, array.nbytes, self._stream)
        return array

    def stored(self, kind: DType) -> np.dtype[Any]:
        """The NumPy type of arrays that hold `kind`: CuPy has no fp8, which travels as bytes."""
        return cupy_dtype(kind)

    def host_buffer(self, nbytes: int) -> NDArray[np.uint8]:
        """Page-locked host memory, which the GPU can read while the host goes on."""
        buffer = self._pinned(nbytes)
        buffer[:] = 0
        return buffer

    def _pinned(self, nbytes: int) -> NDArray[np.uint8]:
        memory = self.xp.cuda.alloc_pinned_memory(nbytes)
        return np.frombuffer(memory, np.uint8, nbytes)

    def upload(self, host: NDArray[Any], device: Array) -> None:
        """Copy page-locked host memory to the device in stream order; `host` must stay as it is until that is done."""
        device.data.copy_from_host_async(host.ctypes.data, host.nbytes, self._stream)

    def fetch(self, device: Array) -> Fetch:
        """Start a copy to the host; the function returned waits for it and gives the values."""
        host = self._pinned(device.nbytes).view(device.dtype).reshape(device.shape)
        device.data.copy_to_host_async(host.ctypes.data, host.nbytes, self._stream)
        done = self.xp.cuda.Event(disable_timing=True)
        done.record(self._stream)

        def wait() -> NDArray[Any]:
            done.synchronize()
            return np.array(host)

        return wait

    def capture(self, step: Step) -> Step:
        """Record `step` in a CUDA graph and return its replay.

        The step runs once before: kernels are compiled and loaded then, and the pool holds the memory that the
        recording will ask for, neither of which may happen while a stream records.
        """
        with self.xp.cuda.using_allocator(self._graph_pool.malloc):
            step()
            self._stream.synchronize()
            self._stream.begin_capture()
            try:
                step()
            finally:
                graph = self._stream.end_capture()
        graph.upload(self._stream)
        return lambda: graph.launch(self._stream)

    def synchronize(self) -> None:
        """Wait for the device."""
        self._stream.synchronize()

    def free_bytes(self) -> int | None:
        """Free memory of the device, the allocator's own reserve included."""
        free, _ = self.xp.cuda.runtime.memGetInfo()
        return int(free) + int(self.xp.get_default_memory_pool().free_bytes())


def cuda_missing() -> str | None:
    """Why no CUDA device can be used, or None when one can."""
    try:
        import cupy
    except Exception as error:  # Besides ImportError: whatever a broken driver or CUDA library causes.
        return f"CuPy cannot be imported ({error})"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        return f"no CUDA device: {error}"
    return None if count else "no CUDA device"


def select_backend(name: str) -> tuple[NumpyBackend, str]:
    """The backend called `name` ('auto', 'cuda' or 'numpy') and a remark on why.

    Raises
    ------
    ModelError
        An unknown name.
    CudaUnavailableError
        'cuda' was asked for and cannot be used.
    """
    if name == "numpy":
        return NumpyBackend(), "asked for"
    if name == "cuda":
        return CupyBackend(), "asked for"
    if name != "auto":
        raise ModelError(f"unknown backend {name!r}: expected 'auto', 'cuda' or 'numpy'")
    reason = cuda_missing()
    if reason is not None:
        return NumpyBackend(), reason
    return CupyBackend(), "a CUDA device is present"
