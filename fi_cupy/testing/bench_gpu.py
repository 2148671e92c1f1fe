"""The timer of the bench harness: CUDA graphs of CuPy's and torch's launches, on one stream, timed with events."""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from fi_cupy.device import device_info
from fi_cupy.dtypes import DType, bfloat16, bool_, float8_e4m3fn, float8_e5m2, float16, float32
from fi_cupy.dtypes import dtype as to_dtype

_GIB = 1 << 30
_VERSIONS = (
    "numpy",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "cuda-bindings",
    "torch",
    "jax",
    "nvidia-cuda-nvrtc",
    "flashinfer-python",
)

#: Fields of a 32-bit word of each type: kept (sign and mantissa) bits, the two random bits that choose the exponent,
#: the lowest exponent, and how far the exponent is shifted. Values lie in ±[1/8, 2) with a random mantissa.
_PATTERNS: dict[DType, tuple[int, int, int, int]] = {
    bfloat16: (0x807F807F, 0x00030003, 0x007C007C, 7),
    float16: (0x83FF83FF, 0x00030003, 0x000C000C, 10),
    float32: (0x807FFFFF, 0x00000003, 0x0000007C, 23),
    float8_e4m3fn: (0x87878787, 0x03030303, 0x04040404, 3),
    float8_e5m2: (0x83838383, 0x03030303, 0x0C0C0C0C, 2),
}


def pattern_words(words: np.ndarray[Any, Any], kind: DType) -> np.ndarray[Any, Any]:
    """The device's arithmetic in NumPy: random uint32 words to words that hold values of `kind`."""
    keep, choice, base, shift = _PATTERNS[kind]
    exponent = ((words >> np.uint32(shift)) & np.uint32(choice)) + np.uint32(base)
    return (words & np.uint32(keep)) | (exponent << np.uint32(shift))


@lru_cache(maxsize=1)
def _hash_kernel() -> Any:
    import cupy

    return cupy.ElementwiseKernel(
        "uint32 seed, uint32 keep, uint32 choice, uint32 base, uint32 shift",
        "uint32 out",
        """
        unsigned int h = (unsigned int)i * 2654435761u + seed;
        h ^= h >> 16; h *= 0x85ebca6bu; h ^= h >> 13; h *= 0xc2b2ae35u; h ^= h >> 16;
        out = (h & keep) | ((((h >> shift) & choice) + base) << shift);
        """,
        "fi_cupy_bench_random",
    )


def random_array(shape: tuple[int, ...], dtype: Any = "bfloat16", seed: int = 0) -> Any:
    """A CuPy array of random values made on the device at memory speed.

    Floats lie in ±[1/8, 2) with random signs and mantissas; integers are random bits and bools random 0 or 1. fp8
    comes as bytes, which is how it travels through CuPy.
    """
    import cupy

    kind = to_dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    words = cupy.empty((-(-nbytes // 4),), np.uint32)
    keep, choice, base, shift = _PATTERNS.get(kind, (0x01010101 if kind is bool_ else 0xFFFFFFFF, 0, 0, 0))
    seeded = np.uint32((seed * 0x9E3779B9 + 0x7F4A7C15) & 0xFFFFFFFF)
    if words.size:
        _hash_kernel()(seeded, np.uint32(keep), np.uint32(choice), np.uint32(base), np.uint32(shift), words)
    stored = np.dtype(np.uint8) if kind in (float8_e4m3fn, float8_e5m2) else kind.np
    return words.view(np.uint8)[:nbytes].view(stored).reshape(shape)


def map_arrays(inputs: Any, convert: Callable[[Any], Any]) -> Any:
    """The same tuples, lists and dictionaries with each leaf converted."""
    if isinstance(inputs, Mapping):
        return {key: map_arrays(value, convert) for key, value in inputs.items()}
    if isinstance(inputs, tuple) and hasattr(inputs, "_fields"):
        return type(inputs)(*(map_arrays(value, convert) for value in inputs))
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(map_arrays(value, convert) for value in inputs)
    return convert(inputs)


@dataclass
class _Replay:
    """`launch` queues `launches` launches; `mode` says how: "graph", or "loop" where the capture was refused."""

    launch: Callable[[], Any]
    launches: int
    mode: str
    keep: Any = None


class GpuTimer:
    """Measures on the current GPU, on one non-blocking stream that CuPy and torch share."""

    def __init__(self) -> None:
        import cupy

        self._cupy = cupy
        self._device = cupy.cuda.Device()
        self.info = device_info(self._device.id)
        self.l2_bytes = self.info.l2_bytes
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self._torch: Any = None
        with contextlib.suppress(ImportError):
            import torch

            if torch.cuda.is_available():
                self._torch = torch
                self._torch_stream = torch.cuda.ExternalStream(self.stream.ptr, device=self._device.id)

    def environment(self) -> dict[str, Any]:
        """Device and software, for the JSON document."""
        runtime = self._cupy.cuda.runtime
        versions = {}
        for name in _VERSIONS:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[name] = importlib.metadata.version(name)
        from fi_cupy import __version__

        return {
            "device": {
                "name": self.info.name,
                "compute_capability": self.info.number / 10,
                "target": self.info.arch,
                "num_sms": self.info.num_sms,
                "l2_bytes": self.l2_bytes,
                "memory_bytes": int(runtime.memGetInfo()[1]),
                "driver_cuda": runtime.driverGetVersion(),
            },
            "software": {"fi_cupy": __version__, "python": platform.python_version(), **versions},
        }

    def free_bytes(self) -> int:
        """Free device memory, what CuPy's pool holds unused included."""
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        return int(free) + int(self._cupy.get_default_memory_pool().free_bytes())

    def release(self) -> None:
        """Wait for everything; where memory gets short, give what the pools keep back to the device."""
        self.stream.synchronize()
        free, total = self._cupy.cuda.runtime.memGetInfo()
        if free < total // 2:
            gc.collect()
            self._cupy.get_default_memory_pool().free_all_blocks()
            if self._torch is not None:
                self._torch.cuda.empty_cache()

    def as_peer_inputs(self, inputs: Any, peer: str) -> Any:
        """The input set as a peer wants it: torch tensors that share the memory, unless the peer is CuPy itself."""
        if peer.startswith("cupy"):
            return inputs
        if self._torch is None:
            raise ImportError("torch with CUDA is not installed")
        cupy, torch = self._cupy, self._torch
        return map_arrays(inputs, lambda x: torch.from_dlpack(x) if isinstance(x, cupy.ndarray) else x)

    def capture(self, fn: Callable[[Any], Any], sets: Sequence[Any], launches: int, peer: str) -> _Replay:
        """A graph of `launches` launches that takes the sets in turn."""
        self._cupy.cuda.runtime.deviceSynchronize()  # the sets were made on other streams
        if peer == "fi_cupy" or peer.startswith("cupy"):
            return self._capture_cupy(fn, sets, launches)
        return self._capture_torch(fn, sets, launches)

    def _capture_cupy(self, fn: Callable[[Any], Any], sets: Sequence[Any], launches: int) -> _Replay:
        cupy, stream = self._cupy, self.stream
        # What the launches allocate belongs to the graph: a pool of its own, which lives as long.
        pool = cupy.cuda.MemoryPool()
        with self._device, stream, cupy.cuda.using_allocator(pool.malloc):
            for inputs in sets:  # compiles, loads, fills the pool
                fn(inputs)
            stream.synchronize()
            stream.begin_capture()
            refused = None
            try:
                for i in range(launches):
                    fn(sets[i % len(sets)])
            except Exception as error:
                refused = error
            try:
                graph = stream.end_capture()
            except Exception as error:
                refused = refused or error
            if refused is None:
                graph.upload(stream)
                stream.synchronize()
                return _Replay(lambda: graph.launch(stream), launches, "graph", (graph, pool, sets))

        def loop() -> None:
            with self._device, stream, cupy.cuda.using_allocator(pool.malloc):
                for i in range(launches):
                    fn(sets[i % len(sets)])

        return _Replay(loop, launches, "loop", (pool, sets))

    def _capture_torch(self, fn: Callable[[Any], Any], sets: Sequence[Any], launches: int) -> _Replay:
        torch = self._torch
        if torch is None:
            raise ImportError("torch with CUDA is not installed")

        def loop() -> None:
            with torch.no_grad(), torch.cuda.stream(self._torch_stream):
                for i in range(launches):
                    fn(sets[i % len(sets)])

        with torch.no_grad():
            with torch.cuda.stream(self._torch_stream):
                for inputs in sets:
                    fn(inputs)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode="relaxed"):
                    for i in range(launches):
                        fn(sets[i % len(sets)])
            except Exception:  # an operator that synchronises or allocates outside the pool
                torch.cuda.synchronize()
                return _Replay(loop, launches, "loop", sets)

        def replay() -> None:
            with torch.cuda.stream(self._torch_stream):
                graph.replay()

        return _Replay(replay, launches, "graph", (graph, sets))

    def time(self, replays: Mapping[str, _Replay], rounds: int, warm_seconds: float) -> dict[str, list[float]]:
        """Microseconds of each replay in each round, one replay after the other in every round."""
        event, stream = self._cupy.cuda.Event, self.stream
        start = time.perf_counter()
        while True:
            for replay in replays.values():
                replay.launch()
            if time.perf_counter() - start >= warm_seconds:
                break
            stream.synchronize()  # or thousands of replays would pile up
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in replays}
        for _ in range(rounds):
            for name, replay in replays.items():
                before, after = event(), event()
                before.record(stream)
                replay.launch()
                after.record(stream)
                marks[name].append((before, after))
        stream.synchronize()
        elapsed = self._cupy.cuda.get_elapsed_time
        return {name: [1e3 * elapsed(a, b) for a, b in pairs] for name, pairs in marks.items()}

    def limits(self, quick: bool) -> dict[str, float]:
        """What this device reaches today: bytes read a second, bytes copied (read + written), bf16 operations."""
        nbytes = _GIB // 2 if quick else _GIB
        found = {"copy": self._copy_rate(nbytes)}
        self.release()
        if self._torch is None:
            return {"read": found["copy"], **found}
        found["read"] = self._read_rate(2 * nbytes)
        self.release()
        found["bf16"] = self._matmul_rate(8192)
        self.release()
        return found

    def _copy_rate(self, nbytes: int) -> float:
        source = random_array((nbytes,), "uint8")
        target = self._cupy.empty_like(source)
        to, frm, stream = target.data.ptr, source.data.ptr, self.stream.ptr
        runtime = self._cupy.cuda.runtime
        copy, kind = runtime.memcpyAsync, runtime.memcpyDeviceToDevice
        sets = [(source, target)]
        best = self._rate("cupy", lambda s: copy(to, frm, nbytes, kind, stream), sets, 2 * nbytes)
        if self._torch is None:
            return best
        # The driver's copy of an H100 moved 2.4 TB/s where elementwise kernels move 2.9.
        torch = self._torch
        words = [tuple(torch.from_dlpack(x.view("float32")) for x in sets[0])]
        return max(best, self._rate("torch", lambda s: torch.neg(s[0], out=s[1]), words, 2 * nbytes))

    def _read_rate(self, nbytes: int) -> float:
        x = self._torch.from_dlpack(random_array((nbytes // 2,), "bfloat16"))
        return self._rate("torch", self._torch.sum, [x], nbytes)

    def _matmul_rate(self, n: int) -> float:
        torch = self._torch
        a, b = (torch.from_dlpack(random_array((n, n), "bfloat16", seed)) for seed in (1, 2))
        sets = [(a, b, torch.empty_like(a))]
        return self._rate("torch", lambda s: torch.mm(s[0], s[1], out=s[2]), sets, 2 * n**3)

    def _rate(self, peer: str, fn: Callable[[Any], Any], sets: Sequence[Any], amount: int) -> float:
        replay = self.capture(fn, sets, 2, peer)
        samples = self.time({peer: replay}, 9, 0.1)[peer]
        return amount * replay.launches / (float(np.median(samples)) * 1e-6)
