"""Device buffers that a plan/run wrapper owns, and the one asynchronous copy by which a plan reaches the GPU."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from fi_cupy.plan.workspace import align_up

_HOST_TO_DEVICE, _DEVICE_TO_HOST, _DEVICE_TO_DEVICE = 1, 2, 3


class PlanBuffer:
    """Device memory for a plan at an address that stays, with pinned staging memory behind it.

    A plan is packed into one int32 array; `upload` copies it with one asynchronous copy on the caller's stream. A
    staging buffer is written again only after its former copy has run, so re-planning while the GPU is behind is safe.
    Growth moves the device address and keeps the old memory alive, since work that reads it may still be queued;
    `frozen` (CUDA-graph mode) forbids it.

    Parameters
    ----------
    device : int
        GPU index.
    nbytes : int
        Initial capacity.
    counters : int
        32-bit words in front of the plan that are zero at the start and that no upload touches (kernels reset them).
    """

    def __init__(self, device: int, nbytes: int, counters: int = 0) -> None:
        self.device = device
        self.capacity = 0
        self.num_counters = 0
        self.frozen = False
        self._memory: Any = None
        self._kept: list[Any] = []  # outgrown device buffers that queued work may still read
        self._staging: list[list[Any]] = []  # [pinned memory, its ndarray, event of its last copy]
        self.reserve(nbytes, counters)

    def reserve(self, nbytes: int, counters: int = 0) -> None:
        """Make room for `nbytes` of plan and `counters` zeroed words; grows by doubling."""
        if nbytes <= self.capacity and counters <= self.num_counters and self._memory is not None:
            return
        if self.frozen:
            from fi_cupy.errors import PlanError

            raise PlanError(
                f"plan: {nbytes} bytes and {counters} counters are needed, but the captured CUDA graph uses a buffer "
                f"of {self.capacity} bytes and {self.num_counters} counters"
            )
        import cupy

        capacity = max(align_up(nbytes), 2 * self.capacity if nbytes > self.capacity else self.capacity, 1 << 14)
        words = max(counters, 2 * self.num_counters if counters > self.num_counters else self.num_counters)
        if self._memory is not None:
            self._kept.append(self._memory)
        with cupy.cuda.Device(self.device):
            # Zeroed and synchronised: the first kernel may run on any stream.
            self._memory = cupy.zeros(align_up(4 * words) + capacity, np.uint8)
            cupy.cuda.get_current_stream().synchronize()
        self.capacity, self.num_counters = capacity, words

    @property
    def counters_ptr(self) -> int:
        """Address of the zeroed words."""
        return int(self._memory.data.ptr)

    @property
    def ptr(self) -> int:
        """Address of the plan."""
        return int(self._memory.data.ptr) + align_up(4 * self.num_counters)

    def stage(self, words: int) -> np.ndarray[Any, Any]:
        """A pinned int32 array of `words` elements to fill, then to hand to `upload`."""
        nbytes = 4 * words
        for i, (memory, _, event) in enumerate(self._staging):
            if memory.size() >= nbytes and event.done:
                self._staging.append(self._staging.pop(i))  # the last entry is the one in use
                array: np.ndarray[Any, Any] = self._staging[-1][1]
                return array[:words]
        import cupy

        with cupy.cuda.Device(self.device):
            memory = cupy.cuda.alloc_pinned_memory(max(align_up(2 * nbytes), 1 << 14))
            event = cupy.cuda.Event(block=False, disable_timing=True)
        array = np.frombuffer(memory, np.int32, memory.size() // 4)
        # Too small ones go (their memory returns to the pool once the copy is done, which the event's wait ensures).
        for old in [s for s in self._staging if s[0].size() < nbytes]:
            old[2].synchronize()
            self._staging.remove(old)
        self._staging.append([memory, array, event])
        return array[:words]

    def upload(self, staged: np.ndarray[Any, Any], stream: int) -> int:
        """Queue the copy of an array from `stage` on `stream`; returns the plan's device address."""
        from cupy.cuda import runtime

        self.reserve(staged.nbytes, self.num_counters)
        _, array, event = self._staging[-1]
        if staged.nbytes:
            with _on(self.device):
                runtime.memcpyAsync(self.ptr, array.ctypes.data, staged.nbytes, _HOST_TO_DEVICE, stream)
                runtime.eventRecord(event.ptr, stream)
        return self.ptr


class _on:
    """Make `device` current, without CuPy's Device object when it is already."""

    __slots__ = ("_before", "device")

    def __init__(self, device: int) -> None:
        self.device = device

    def __enter__(self) -> None:
        from cupy.cuda import runtime

        self._before = runtime.getDevice()
        if self._before != self.device:
            runtime.setDevice(self.device)

    def __exit__(self, *exc: object) -> None:
        from cupy.cuda import runtime

        if self._before != self.device:
            runtime.setDevice(self._before)


def device_of(x: Any) -> AbstractContextManager[None]:
    """Make the device of a view current, for what takes the current one; nothing for the CPU."""
    return nullcontext() if x.is_cpu else _on(x.device)


def copy_device(dst: int, src: int, nbytes: int, stream: int, device: int) -> None:
    """Queue a device-to-device copy."""
    from cupy.cuda import runtime

    if nbytes:
        with _on(device):
            runtime.memcpyAsync(dst, src, nbytes, _DEVICE_TO_DEVICE, stream)


def copy_to_device(dst: int, src: np.ndarray[Any, Any], stream: int, device: int) -> None:
    """Queue a copy of a pageable host array; the driver has read `src` when this returns."""
    from cupy.cuda import runtime

    src = np.ascontiguousarray(src)
    if src.nbytes:
        with _on(device):
            runtime.memcpyAsync(dst, src.ctypes.data, src.nbytes, _HOST_TO_DEVICE, stream)


def copy_to_host(arrays: Sequence[Any]) -> list[np.ndarray[Any, Any]]:
    """The values of small GPU arrays (views): asynchronous copies into one pinned buffer, and one wait for them."""
    from cupy.cuda import runtime

    dense = [x for x in arrays if x.contiguous]
    buffer = _pinned(sum(align_up(x.size * x.dtype.itemsize, 8) for x in dense))
    copied: dict[int, np.ndarray[Any, Any]] = {}
    streams: dict[int, int] = {}
    offset = 0
    for x in dense:
        nbytes, stream = x.size * x.dtype.itemsize, x.stream()
        target = buffer[offset : offset + nbytes]
        offset += align_up(nbytes, 8)
        copied[id(x)] = target.view(x.dtype.np).reshape(x.shape)
        if nbytes:
            with _on(x.device):
                runtime.memcpyAsync(target.ctypes.data, x.ptr, nbytes, _DEVICE_TO_HOST, stream)
            streams[stream] = x.device
    for stream, device in streams.items():
        with _on(device):
            runtime.streamSynchronize(stream)
    return [copied[id(x)] if id(x) in copied else x.host() for x in arrays]


def _pinned(nbytes: int) -> np.ndarray[Any, Any]:
    """Page-locked bytes from CuPy's pool; the array keeps them."""
    import cupy

    memory = cupy.cuda.alloc_pinned_memory(max(nbytes, 1))
    return np.frombuffer(memory, np.uint8, nbytes)


class ScratchPool:
    """Scratch memory and zeroed counters for functions without a plan: one set a (device, stream), grown on demand.

    Work on one stream runs in order, so it may share a set. Outgrown sets are kept: a captured graph may hold their
    addresses. It holds those of the stream that it was captured on: graphs captured on one stream must not be replayed
    at the same time as each other, or as other work on that stream.
    """

    def __init__(self) -> None:
        self._sets: dict[tuple[int, int], tuple[Any, int, int]] = {}  # memory, counter words, scratch bytes
        self._kept: list[Any] = []

    def get(self, like: Any, stream: int, nbytes: int, counters: int) -> tuple[int, int]:
        """(scratch address, counters address) for work on `stream` of the view `like`'s device."""
        key = (like.device, stream)
        memory, words, size = self._sets.get(key, (None, 0, 0))
        if nbytes > size or counters > words:
            from cupy.cuda import runtime

            if runtime.streamIsCapturing(stream):
                return self._captured(like, stream, nbytes, counters)
            if memory is not None:
                self._kept.append(memory)
            import cupy

            size, words = max(align_up(nbytes), 2 * size, 1 << 20), max(counters, 2 * words, 1024)
            with cupy.cuda.Device(like.device):
                memory = cupy.zeros(align_up(4 * words) + size, np.uint8)
                cupy.cuda.get_current_stream().synchronize()
            self._sets[key] = (memory, words, size)
        address = int(memory.data.ptr)
        return address + align_up(4 * words), address

    def _captured(self, like: Any, stream: int, nbytes: int, counters: int) -> tuple[int, int]:
        """Inside a capture: memory from the caller's allocator (a graph pool), and a memset that is captured too."""
        from cupy.cuda import runtime

        from fi_cupy.dtypes import uint8

        offset = align_up(4 * counters)
        made = like.empty((offset + nbytes + 256,), uint8)
        self._kept.append(made.array)  # the graph uses it for as long as it lives
        address = align_up(made.ptr)
        with _on(like.device):
            runtime.memsetAsync(address, 0, 4 * counters, stream)
        return address + offset, address
