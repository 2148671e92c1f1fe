"""`bench_gpu_time`: how long a function's work takes on the GPU, call by call."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fi_cupy.device import require_gpu
from fi_cupy.errors import ArgumentError, UnsupportedError

_OP = "bench_gpu_time"
#: Calls that the first estimate is the average of.
_ESTIMATES = 5


def bench_gpu_time(
    fn: Callable[..., Any],
    dry_run_iters: int | None = None,
    repeat_iters: int | None = None,
    dry_run_time_ms: float = 25,
    repeat_time_ms: float = 100,
    l2_flush: bool | None = None,
    l2_flush_size_mb: int | None = None,
    l2_flush_device: Any = None,
    sleep_after_run: bool = False,
    enable_cupti: bool = False,
    use_cuda_graph: bool = False,
    num_iters_within_graph: int = 10,
    input_args: Sequence[Any] = (),
    input_kwargs: Mapping[str, Any] | None = None,
    cold_l2_cache: bool = True,
) -> list[float]:
    """Time a function on the current GPU with events: milliseconds a call.

    The function runs on a stream of the timer's, which is CuPy's and torch's current one meanwhile. For tables with
    peers and limits see ``fi-cupy bench``.

    Parameters
    ----------
    fn : function
        Called as ``fn(*input_args, **input_kwargs)``; queues its work on CuPy's or torch's current stream.
    dry_run_iters, repeat_iters : int, optional
        Calls before the measurement, and calls (with a graph: replays) that are measured; by default as many as fill
    dry_run_time_ms, repeat_time_ms : float
    sleep_after_run : bool
        Sleep after each measured call for 5 times what it took, at most a second: the chip stays cool.
    enable_cupti : bool
        Not supported: the launch of a short kernel is in its time unless `use_cuda_graph`.
    use_cuda_graph : bool
        Measure replays of a graph of `num_iters_within_graph` calls.
    input_args, input_kwargs
        Arguments of `fn`.
    cold_l2_cache : bool
        Every call finds an L2 cache that does not hold its inputs. Without a graph the cache is written over before
        each; a graph takes copies of `input_args` in turn instead, so without arguments it is warm, with a warning.
    l2_flush, l2_flush_size_mb
        Older names: `cold_l2_cache`, and how much is written over (default: twice the cache).
    l2_flush_device : None
        The current GPU.

    Returns
    -------
    list of float
        Milliseconds of each measured call; with a graph the average of each replay.

    Raises
    ------
    ArgumentError, UnsupportedError, CudaUnavailableError

    Source
    ------
    flashinfer.testing.bench_gpu_time.

    Examples
    --------
    >>> import statistics
    >>> statistics.median(bench_gpu_time(fi_cupy.rmsnorm, input_args=(x, w)))     # doctest: +SKIP
    0.0123
    """
    if enable_cupti:
        raise UnsupportedError(f"{_OP}: enable_cupti is True, expected False; use_cuda_graph=True leaves launches out")
    if l2_flush_device is not None:
        raise UnsupportedError(f"{_OP}: l2_flush_device is {l2_flush_device!r}, expected None: the current GPU")
    counts = (("dry_run_iters", dry_run_iters), ("repeat_iters", repeat_iters))
    for name, value in (*counts, ("num_iters_within_graph", num_iters_within_graph)):
        if value is not None and value < (0 if name == "dry_run_iters" else 1):
            raise ArgumentError(f"{_OP}: {name} is {value}, expected a number of calls")
    require_gpu(_OP)
    from fi_cupy.tuning.timer import GraphTimer

    cold = cold_l2_cache if l2_flush is None else l2_flush
    names, timer = list(input_kwargs or {}), GraphTimer()
    arguments = [*input_args, *(input_kwargs or {}).values()]

    def call(given: list[Any]) -> Any:
        split = len(input_args)
        return fn(*given[:split], **dict(zip(names, given[split:], strict=True)))

    with timer.session():
        if use_cuda_graph:
            sets = timer.rotate(arguments, cold)
            if cold and len(sets) == 1 and not any(hasattr(x, "nbytes") for x in arguments):
                warnings.warn(f"{_OP}: without input_args the graph's calls find a warm cache", stacklevel=2)
            launch = _captured(timer, call, sets, num_iters_within_graph)
            flush, calls = None, num_iters_within_graph
        else:
            launch, calls = (lambda: call(arguments)), 1
            size = 2 * timer.l2_bytes if l2_flush_size_mb is None else l2_flush_size_mb << 20
            flush = _flusher(timer, size) if cold else None
        return _measure(
            timer, launch, flush, calls, dry_run_iters, repeat_iters, dry_run_time_ms, repeat_time_ms, sleep_after_run
        )


def _captured(timer: Any, call: Callable[[list[Any]], Any], sets: list[list[Any]], count: int) -> Callable[[], Any]:
    """The replay of a graph of `count` calls that take the sets in turn."""
    stream = timer._stream
    for given in sets:  # compiles, loads, fills the pool
        call(given)
    stream.synchronize()
    stream.begin_capture(timer._cupy.cuda.runtime.streamCaptureModeRelaxed)
    try:
        for i in range(count):
            call(sets[i % len(sets)])
    finally:
        graph = stream.end_capture()
    graph.upload(stream)
    return lambda: graph.launch(stream)


def _flusher(timer: Any, nbytes: int) -> Callable[[], Any]:
    """Writes over the L2 cache."""
    buffer, runtime = timer._cupy.empty((max(nbytes, 1),), "uint8"), timer._cupy.cuda.runtime
    return lambda: runtime.memsetAsync(buffer.data.ptr, 0, buffer.nbytes, timer._stream.ptr)


def _measure(
    timer: Any, launch: Callable[[], Any], flush: Callable[[], Any] | None, calls: int, dry_run_iters: int | None,
    repeat_iters: int | None, dry_run_time_ms: float, repeat_time_ms: float, sleep_after_run: bool,
) -> list[float]:  # fmt: skip
    """Estimate, warm, measure."""
    event, stream = timer._cupy.cuda.Event, timer._stream

    def timed() -> tuple[Any, Any]:
        if flush is not None:
            flush()
        before, after = event(), event()
        before.record(stream)
        launch()
        after.record(stream)
        return before, after

    def elapsed(marks: list[tuple[Any, Any]]) -> list[float]:
        stream.synchronize()
        return [float(timer._cupy.cuda.get_elapsed_time(a, b)) for a, b in marks]

    launch()
    stream.synchronize()
    estimate = max(sum(elapsed([timed() for _ in range(_ESTIMATES)])) / _ESTIMATES, 1e-4)
    warm = math.ceil(dry_run_time_ms / estimate) if dry_run_iters is None else dry_run_iters
    repeats = max(1, math.ceil(repeat_time_ms / estimate)) if repeat_iters is None else repeat_iters
    for _ in range(warm):
        timed()
    stream.synchronize()
    marks = []
    for _ in range(repeats):
        marks.append(timed())
        if sleep_after_run:
            stream.synchronize()
            time.sleep(min(5e-3 * estimate, 1.0))
    return [ms / calls for ms in elapsed(marks)]
