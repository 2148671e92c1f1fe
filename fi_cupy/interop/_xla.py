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
from fi_cupy.dtypes import DType
from fi_cupy.errors import UnsupportedError
from fi_cupy.interop.dry_run import dense
from fi_cupy.workspace import _on


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


#: From operands and results to what the operator returned, for the first results.
Run = Callable[[list[Any], list[Any]], list[Any]]


class Signature:
    """What is known of a call's buffers when it is compiled.

    Parameters
    ----------
    ins, outs : sequence of (shape, DType)
        Of the operands and of the results.
    overwritten : set of int
        Results whose memory the operator writes itself, as an argument.
    copies : bool
        The operator rearranges its arrays with their own framework's methods: it gets CuPy arrays.
    """

    def __init__(
        self, ins: Sequence[tuple[tuple[int, ...], DType]], outs: Sequence[tuple[tuple[int, ...], DType]],
        overwritten: set[int], copies: bool,
    ) -> None:  # fmt: skip
        self.ins = [(shape, dense(shape), kind) for shape, kind in ins]
        self.outs = [(shape, dense(shape), kind) for shape, kind in outs]
        self.overwritten = overwritten
        self.copies = copies

    def on_cpu(self, run: Run, ins: Sequence[Any], outs: Sequence[Any]) -> None:
        """Compute with the reference."""
        results = [_host_result(np.asarray(b), kind) for b, (_, _, kind) in zip(outs, self.outs, strict=True)]
        for i, made in enumerate(run([np.asarray(b) for b in ins], results)):
            if i not in self.overwritten:
                np.copyto(results[i], made)

    def on_gpu(self, stream: int, runs: Callable[[int], Run], ins: Sequence[Any], outs: Sequence[Any]) -> None:
        """Launch on XLA's stream: no synchronisation, and no copy unless the operator made its result elsewhere."""
        call = _Call(stream)
        places = [_address(b) for b in (*ins, *outs)]
        device = places[0][1]
        views = [
            View(call, None, ptr, shape, strides, kind, device)
            for (ptr, _), (shape, strides, kind) in zip(places, (*self.ins, *self.outs), strict=True)
        ]
        given, targets = views[: len(self.ins)], views[len(self.ins) :]
        for i, target in enumerate(targets):
            if i not in self.overwritten:
                call.offer(target)
        with _on(device), _external(stream, device):
            wrap: Callable[[View], Any] = _as_cupy if self.copies else Operand
            made = runs(device)([wrap(v) for v in given], [wrap(v) for v in targets])
            for i, result in enumerate(made):
                if i not in self.overwritten:
                    _store(arrays.view(result), targets[i], stream)


def _host_result(array: np.ndarray[Any, Any], kind: DType) -> np.ndarray[Any, Any]:
    """64-bit results travel as pairs of 32-bit words where JAX has no 64-bit types."""
    return array.view(kind.np)[..., 0] if kind.itemsize == 8 and array.itemsize == 4 else array.view(kind.np)


def _as_cupy(v: View) -> Any:
    """A CuPy array of the same memory, for operators that rearrange their arrays."""
    import cupy

    from fi_cupy.arrays import cupy_dtype

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
