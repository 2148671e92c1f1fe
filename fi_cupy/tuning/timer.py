"""How long a tactic takes on the current GPU: CUDA-graph replays over rotated inputs, timed with events.

The inputs are copied until together they outrun the L2 cache, as the weights of a model do between two calls. Tactics
are timed in turn, round after round, so that a clock that falls while the chip warms meets them all alike.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fi_cupy.arrays import cupy_dtype
from fi_cupy.device import device_info
from fi_cupy.dtypes import FLOAT_TYPES, FP8_TYPES, DType
from fi_cupy.tuning.types import ArraySpec

MAX_SETS = 256
#: A replay lasts at least this long, so that the events' resolution (0.5 µs) and the launch do not matter.
MIN_REPLAY_US = 300.0
_BLOCK = 1 << 18  # elements of random data that an array is filled with, over and over

Call = Callable[[list[Any]], Any]


@dataclass
class Prepared:
    """`launch` runs `launches` calls on the timer's stream; `mode` is "graph" or "loop"."""

    launch: Callable[[], Any]
    launches: int
    mode: str


def capturing() -> bool:
    """Whether the caller's stream (CuPy's, or torch's where that is loaded) is being captured."""
    import cupy

    if cupy.cuda.runtime.streamIsCapturing(cupy.cuda.get_current_stream().ptr):
        return True
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_available() and bool(torch.cuda.is_current_stream_capturing())


class GraphTimer:
    """Measures on the current GPU. Use inside ``with timer.session():``, which owns the memory."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._device = cupy.cuda.Device()
        self.l2_bytes = device_info(self._device.id).l2_bytes
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._blocks: dict[DType, Any] = {}

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Everything made inside lives in a pool of its own, given back at the end."""
        cupy = self._cupy
        cupy.cuda.runtime.deviceSynchronize()  # inputs may still be written on the caller's stream
        pool = cupy.cuda.MemoryPool()
        torch = sys.modules.get("torch")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._device)
            stack.enter_context(self._stream)
            stack.enter_context(cupy.cuda.using_allocator(pool.malloc))
            if torch is not None and torch.cuda.is_available():  # a runner may be torch's
                side = torch.cuda.ExternalStream(self._stream.ptr, device=self._device.id)
                stack.enter_context(torch.cuda.stream(side))
            try:
                yield
            finally:
                self._stream.synchronize()
                self._blocks.clear()
        pool.free_all_blocks()

    def make(self, spec: ArraySpec) -> Any:
        """A CuPy array of random values (fp8 as bytes): normal floats, integers 0 and 1."""
        cupy = self._cupy
        dtype = cupy_dtype(spec.dtype)
        array = cupy.empty(spec.shape, dtype)
        if spec.dtype not in self._blocks:
            random = np.random.default_rng(0)
            if spec.dtype in FLOAT_TYPES or spec.dtype in FP8_TYPES:
                values = random.standard_normal(_BLOCK, np.float32).astype(spec.dtype.np)
            else:
                values = random.integers(0, 2, _BLOCK).astype(spec.dtype.np)
            block = cupy.empty((values.nbytes,), np.uint8)
            block.set(np.ascontiguousarray(values).view(np.uint8))
            self._blocks[spec.dtype] = block
        block, copy = self._blocks[spec.dtype], cupy.cuda.runtime.memcpyAsync
        to, left = array.data.ptr, array.nbytes
        while left > 0:
            step = min(left, block.nbytes)
            copy(to, block.data.ptr, step, cupy.cuda.runtime.memcpyDeviceToDevice, self._stream.ptr)
            to, left = to + step, left - step
        return array

    def rotate(self, inputs: list[Any], cold: bool) -> list[list[Any]]:
        """`inputs` and copies of them, as many as it takes to outrun the L2 cache and as memory allows."""
        nbytes = sum(int(x.nbytes) for x in inputs if hasattr(x, "nbytes") and hasattr(x, "shape"))
        if not cold or nbytes == 0:
            return [inputs]
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        wanted = math.ceil(4 * self.l2_bytes / nbytes)
        count = max(1, min(wanted, int(0.4 * free) // nbytes + 1, MAX_SETS))
        return [inputs] + [[_copy(x) for x in inputs] for _ in range(count - 1)]

    def prepare(self, call: Call, sets: list[list[Any]], use_graph: bool) -> Prepared:
        """Ready `call` for timing; it is run once first, so that what it loads and compiles is there."""
        cupy = self._cupy
        call(sets[0])
        self._stream.synchronize()
        us = self._elapsed(lambda: call(sets[-1]))
        launches = len(sets) * max(1, min(math.ceil(MIN_REPLAY_US / max(us, 2.0) / len(sets)), 16))

        def loop() -> None:
            for i in range(launches):
                call(sets[i % len(sets)])

        if not use_graph:
            return Prepared(loop, launches, "loop")
        self._stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
        try:
            loop()
        except BaseException:
            with contextlib.suppress(Exception):
                self._stream.end_capture()
            raise
        graph = self._stream.end_capture()
        graph.upload(self._stream)
        return Prepared(lambda: graph.launch(self._stream), launches, "graph")

    def _elapsed(self, launch: Callable[[], Any]) -> float:
        event = self._cupy.cuda.Event
        before, after = event(), event()
        before.record(self._stream)
        launch()
        after.record(self._stream)
        after.synchronize()
        return 1e3 * float(self._cupy.cuda.get_elapsed_time(before, after))

    def time(self, prepared: Sequence[Prepared], rounds: int) -> list[list[float]]:
        """Microseconds a call, for each of `prepared` in each round; all in turn in every round."""
        event, stream = self._cupy.cuda.Event, self._stream
        marks: list[list[tuple[Any, Any]]] = [[] for _ in prepared]
        for _ in range(rounds):
            for p, found in zip(prepared, marks, strict=True):
                before, after = event(), event()
                before.record(stream)
                p.launch()
                after.record(stream)
                found.append((before, after))
            stream.synchronize()
        elapsed = self._cupy.cuda.get_elapsed_time
        return [[1e3 * elapsed(a, b) / p.launches for a, b in found] for p, found in zip(prepared, marks, strict=True)]


def _copy(x: Any) -> Any:
    for name in ("clone", "copy"):  # torch's name; CuPy's, NumPy's and JAX's
        if hasattr(x, "shape") and hasattr(x, name):
            return getattr(x, name)()
    return x
