"""A GPU made of the host's memory, on which everything runs: wrappers, plans and kernels (emulate.py).

CuPy's place is taken by a module with the few functions that fi_cupy calls. Arrays of `on_gpu` count as a GPU's, number
`DEVICE`, so that what functions keep for a GPU is none of a real one's. They lie at the end of memory, in front of a
page that cannot be touched, and what is made for results is filled with garbage.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import emulate
import numpy as np

from fi_cupy import arrays, mla_kernel, prefill_hopper
from fi_cupy.gemm import hopper

DEVICE = 9
_protect = ctypes.CDLL(None).mprotect
_protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int


def memory(nbytes: int, fill: int) -> np.ndarray[Any, Any]:
    """Bytes between two pages that cannot be touched, which begin at a multiple of 16 and end close to the second."""
    page, room = mmap.PAGESIZE, -(-nbytes // 16) * 16
    size = -(-max(room, 1) // page) * page
    whole = np.frombuffer(mmap.mmap(-1, size + 2 * page), np.uint8)  # which keeps it
    whole[page : page + size] = fill
    made = whole[page + size - room :][:nbytes]
    for at in (0, page + size):
        assert _protect(whole.ctypes.data + at, page, 0) == 0
    return made


def _array(shape: Any, dtype: Any, fill: int) -> Any:
    count = int(np.prod(shape))
    made = memory(count * np.dtype(dtype).itemsize, fill).view(dtype)
    return made.reshape(shape)


def on_gpu(x: Any) -> Any:
    """A copy that counts as a GPU's; of tuples, one of each; other things as they are. Columns stay columns."""
    if isinstance(x, tuple):
        return tuple(map(on_gpu, x))
    if not isinstance(x, np.ndarray):
        return x
    order = sorted(range(x.ndim), key=lambda axis: -abs(x.strides[axis]))
    made = _array([x.shape[axis] for axis in order], x.dtype, 0xFF).transpose(np.argsort(order))
    made[...] = x
    return made.view(emulate.Device)


class _Memory(np.ndarray[Any, Any]):
    """An array of CuPy's."""

    data = property(lambda self: SimpleNamespace(ptr=self.ctypes.data, device_id=DEVICE))


class _Pinned(bytearray):
    size = bytearray.__len__
    ptr = property(lambda self: ctypes.addressof((ctypes.c_char * len(self)).from_buffer(self)))


class _Device:
    def __init__(self, index: int = 0) -> None:
        self.id = index

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def _modules() -> dict[str, Any]:
    def nothing(*args: Any) -> None:
        pass

    def copy(to: int, source: int, nbytes: int, *rest: Any) -> None:
        ctypes.memmove(to, source, nbytes)

    def fill(to: int, value: int, nbytes: int, *rest: Any) -> None:
        ctypes.memset(to, value, nbytes)

    cupy, cuda, runtime = (ModuleType(name) for name in ("cupy", "cupy.cuda", "cupy.cuda.runtime"))
    vars(cupy).update(
        cuda=cuda, ndarray=_Memory, uint8=np.uint8, int32=np.int32, float32=np.float32, __version__="14.0",
        zeros=lambda shape, dtype: _array(shape, dtype, 0).view(_Memory),
        empty=lambda shape, dtype: _array(shape, dtype, 0xA5).view(_Memory),
        ones=lambda shape, dtype: np.ones(shape, dtype).view(_Memory),
    )  # fmt: skip
    vars(cuda).update(
        runtime=runtime, Device=_Device, alloc_pinned_memory=lambda n: _Pinned(max(n, 1)),
        get_current_stream=lambda device=0: SimpleNamespace(ptr=0, synchronize=nothing),
        Event=lambda **options: SimpleNamespace(ptr=0, done=True, synchronize=nothing),
    )  # fmt: skip
    vars(runtime).update(
        memcpyAsync=copy, memsetAsync=fill, getDevice=lambda: DEVICE, streamIsCapturing=lambda stream: False,
        memcpyHostToDevice=1, memcpyDeviceToHost=2, memcpyDeviceToDevice=3,
        **dict.fromkeys(("streamSynchronize", "deviceSynchronize", "setDevice", "eventRecord"), nothing),
    )  # fmt: skip
    return {module.__name__: module for module in (cupy, cuda, runtime)}


class _Emulated(emulate._Emulated):
    def view(self, array: Any) -> Any:
        made = super().view(array)
        made.device = DEVICE
        return made

    def empty(self, shape: Any, dtype: Any, like: Any) -> Any:
        return self.view(_array(shape, dtype.np, 0xA5).view(emulate.Device))

    def to_host(self, view: Any) -> Any:
        return np.asarray(view.array)


def _kernel(spec: Any, device: int) -> Any:
    made: Any = emulate._kernel(spec, device)
    made.meta = SimpleNamespace(spill_bytes=0)
    return made


@contextlib.contextmanager
def fake_gpu(info: Any = emulate.HOPPER) -> Any:
    """Everything runs as on the device `info`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(sys.modules, _modules()))
        kinds = dict.fromkeys((emulate.Device, _Memory), _Emulated().view)
        stack.enter_context(mock.patch.dict(arrays._by_type, kinds))
        replaced = {"load_kernel": _kernel, "device_info": lambda index: info, "has_driver_binding": lambda: True}
        replaced["num_devices"] = lambda: DEVICE + 1
        for name, module in list(sys.modules.items()):
            if not name.startswith("fi_cupy"):
                continue
            for function in replaced.keys() & vars(module).keys():
                stack.enter_context(mock.patch.object(module, function, replaced[function]))
        maps = (prefill_hopper, "_encode"), (mla_kernel, "encode_map"), (hopper, "_encode")
        for place, name in maps:
            stack.enter_context(mock.patch.object(place, name, emulate.tensor_map))
        kept = prefill_hopper.map_values, mla_kernel.hopper_maps, hopper._maps
        for cached in kept:
            cached.cache_clear()
        yield
        for cached in kept:
            cached.cache_clear()
