"""What runs when XLA reaches one of our operators: its buffers as arrays of ours, its stream as the stream of launches.

On the CPU the buffers are NumPy arrays and the reference computes. On a GPU they become views without a copy; where an
operator asks for memory it gets a result's buffer first, so that it writes in place what XLA will read.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fi_cupy import arrays, imported
from fi_cupy.arrays import Framework, View, framework
from fi_cupy.dtypes import DType, dtype
from fi_cupy.errors import UnsupportedError
from fi_cupy.interop.dry_run import dense


class Operand:
    """One of XLA's buffers on a GPU; `fi_cupy.arrays.view` gives its view."""

    __slots__ = ("view",)

    def __init__(self, view: View) -> None:
        self.view = view

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    def reshape(self, *shape: int) -> Operand:
        """The same memory in another shape; one extent may be -1."""
        v = self.view
        if -1 in shape:
            known = -int(np.prod(shape, dtype=np.int64))
            shape = tuple(v.size // known if n == -1 else n for n in shape)
        return Operand(View(v._framework, v.array, v.ptr, shape, dense(shape), v.dtype, v.device))

    def __getitem__(self, rows: slice) -> Operand:
        """The first rows."""
        v, n = self.view, len(range(*rows.indices(self.view.shape[0])))
        if rows.indices(v.shape[0])[::2] != (0, 1):
            raise UnsupportedError(f"rows {rows} of an XLA buffer, expected the first ones")
        return Operand(View(v._framework, v.array, v.ptr, (n, *v.shape[1:]), v.strides, v.dtype, v.device))


arrays._by_type[Operand] = lambda operand: operand.view


class _Call(Framework):
    """XLA's buffers and stream for the time of one call."""

    name = "xla"

    def __init__(self, stream: int) -> None:
        self._stream = stream
        self._results: list[View | None] = []

    def view(self, array: Any) -> View:
        return array.view

    def buffer(self, buffer: Any, kind: DType, shape: tuple[int, ...]) -> View:
        """The view of a buffer."""
        ptr, device = _address(buffer)
        return View(self, None, ptr, shape, dense(shape), kind, device)

    def offer(self, result: View) -> None:
        """Hand this buffer out when the operator asks for memory like it."""
        self._results.append(result)

    def empty(self, shape: tuple[int, ...], dtype: DType, like: View) -> View:
        shape = tuple(shape)
        for i, result in enumerate(self._results):
            if result is not None and result.shape == shape and result.dtype is dtype:
                self._results[i] = None
                return result
        scratch = framework("cupy").empty(shape, dtype, like)
        from cupy.cuda import runtime

        if runtime.streamIsCapturing(self._stream):
            imported._captured.append(scratch.array)  # a command buffer uses it for as long as it lives
        return View(self, scratch.array, scratch.ptr, shape, scratch.strides, dtype, scratch.device)

    def result(self, view: View) -> Operand:
        return Operand(view)

    def stream(self, device: int) -> int:
        return self._stream

    def to_host(self, view: View) -> np.ndarray[Any, Any]:
        raise UnsupportedError("an operator inside jax.jit asks for values on the host, which would wait for the GPU")


_capsule_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_capsule_pointer.restype = ctypes.c_void_p
_capsule_pointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


class _Lent(ctypes.Structure):
    """The head of DLPack's DLTensor. (`__cuda_array_interface__` knows no bf16 and no fp8, and no device.)"""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)
    )  # fmt: skip


def _address(buffer: Any) -> tuple[int, int]:
    """(device pointer, GPU index) of a buffer."""
    capsule = buffer.__dlpack__()
    lent = _Lent.from_address(_capsule_pointer(capsule, b"dltensor"))
    return lent.data or 0, lent.device_id


class _Handle:
    """XLA's stream for CuPy."""

    def __init__(self, stream: int) -> None:
        self._stream = stream

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._stream


@lru_cache(maxsize=64)
def _external(stream: int, device: int) -> Any:
    import cupy

    return cupy.cuda.Stream.from_external(_Handle(stream))


#: What a call is made of: (run, parameter dtypes and shapes, result dtypes and shapes, aliases result -> operand).
Run = Callable[[Sequence[Any], Sequence[Any]], Any]


def on_cpu(run: Run, ins: Sequence[Any], outs: Sequence[Any], out_types: Sequence[DType], aliased: set[int]) -> None:
    """Compute with the reference. `run` gets the operands and the results and returns what the operator returned."""
    given = [np.asarray(buffer) for buffer in ins]
    results = [_host_result(np.asarray(buffer), t) for buffer, t in zip(outs, out_types, strict=True)]
    for i, made in enumerate(run(given, results)):
        if i not in aliased and made is not None:
            np.copyto(results[i], made)


def _host_result(array: np.ndarray[Any, Any], kind: DType) -> np.ndarray[Any, Any]:
    return array.view(kind.np)[..., 0] if kind.itemsize == 8 and array.itemsize == 4 else array.view(kind.np)


def on_gpu(
    stream: int, run: Run, ins: Sequence[Any], outs: Sequence[Any], out_types: Sequence[DType], aliased: set[int],
    copies: bool,
) -> None:  # fmt: skip
    """Launch on XLA's stream; no synchronisation, and no copy unless the operator made its result elsewhere."""
    from cupy.cuda import runtime

    call = _Call(stream)
    operands: list[Any] = [Operand(call.buffer(b, dtype(b.dtype), tuple(b.shape))) for b in ins]
    targets = [call.buffer(b, t, _shape(b, t)) for b, t in zip(outs, out_types, strict=True)]
    some = targets[0] if targets else operands[0].view
    before = runtime.getDevice()
    if before != some.device:
        runtime.setDevice(some.device)
    try:
        with _external(stream, some.device):
            for i, target in enumerate(targets):
                if i not in aliased:
                    call.offer(target)
            results = [Operand(target) for target in targets]
            if copies:
                operands, results = [_as_cupy(x) for x in operands], [_as_cupy(x) for x in results]
            for i, made in enumerate(run(operands, results)):
                if i in aliased or made is None:
                    continue
                _store(arrays.view(made), targets[i], stream)
    finally:
        if before != some.device:
            runtime.setDevice(before)


def _shape(buffer: Any, kind: DType) -> tuple[int, ...]:
    """64-bit results travel as pairs of 32-bit words where JAX has no 64-bit types."""
    shape = tuple(buffer.shape)
    return shape[:-1] if kind.itemsize == 8 and dtype(buffer.dtype).itemsize == 4 else shape


def _as_cupy(operand: Operand) -> Any:
    """A CuPy array of the same memory, for operators that rearrange their arrays."""
    import cupy

    from fi_cupy.arrays import cupy_dtype

    v = operand.view
    memory = cupy.cuda.UnownedMemory(v.ptr, max(v.size * v.dtype.itemsize, 1), None, v.device)
    return cupy.ndarray(v.shape, cupy_dtype(v.dtype), cupy.cuda.MemoryPointer(memory, 0))


def _store(made: View, target: View, stream: int) -> None:
    """Make sure that the target holds what the operator returned."""
    if made.ptr == target.ptr or target.size == 0:
        return
    from cupy.cuda import runtime

    if not made.contiguous:
        made = arrays.view(made.array.copy())
    runtime.memcpyAsync(target.ptr, made.ptr, target.size * target.dtype.itemsize, 3, stream)
