"""The plan/run wrappers for JAX: planned on the host, run inside jax.jit."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import jax
import numpy as np

from fi_cupy.arrays import CPU, view
from fi_cupy.errors import ArgumentError, FrameworkError, UnsupportedError
from fi_cupy.interop._jax_call import _compile
from fi_cupy.interop._jax_trace import Tracer, on_gpu
from fi_cupy.interop.pipes import PIPE
from fi_cupy.interop.wrappers import PlannedWrapper


class Planned:
    """A plan/run wrapper of fi_cupy whose `run` may be called inside `jax.jit`.

    Constructor and `plan` take the arguments of ``fi_cupy``'s class, with two additions: the workspace may be a number
    of bytes (and the buffers of CUDA-graph mode numbers of elements), of which every device in `devices` (default: all
    local ones of JAX's default backend) gets its own, for use inside `jax.shard_map`; and `plan` takes JAX arrays,
    which are read to the host.

    `plan` waits until the runs that were dispatched before it have ended, since they read the former plan. Plan outside
    of `jax.jit`, once a step, and `run` in every layer.
    """

    row: PlannedWrapper
    planned = True

    def __init__(self, *args: Any, devices: Sequence[Any] | None = None, **kwargs: Any) -> None:
        self.name = f"{self.row.name}.run"
        self._tracer = Tracer(self.row, self.name)
        self.compiled = lru_cache(maxsize=256)(_compile)  # its own, so that it goes with the wrapper
        arguments = inspect.signature(self.row.cls).bind(*args, **kwargs).arguments
        key = next((n for n in ("float_workspace_buffer", "workspace_buffer") if n in arguments), None)
        self._wrappers: dict[int, Any] = {}
        if key is not None and isinstance(arguments[key], (int, np.integer)):
            sizes = {
                k: int(v) for k, v in arguments.items() if k.endswith("_buffer") and isinstance(v, (int, np.integer))
            }
            for device in _indices(devices):
                own = {k: _memory(n, device, np.uint8 if k == key else np.int32) for k, n in sizes.items()}
                self._wrappers[device] = self.row.cls(**{**arguments, **own})
            return
        if devices is not None:
            raise ArgumentError(
                f"{self.row.name}: devices are given, expected a number of bytes as workspace with them"
            )
        if key is not None and isinstance(arguments[key], jax.Array):
            raise FrameworkError(
                f"{self.row.name}: {key} is a JAX array, which cannot be written; pass a number of bytes, or a CuPy or "
                "NumPy array"
            )
        if key is None:  # BatchAttention makes its own
            on_cpu = str(arguments.setdefault("device", "cuda" if on_gpu() else "cpu")) == "cpu"
            index = CPU if on_cpu else _indices(None)[0]
        else:
            index = view(arguments[key], self.row.name, key).device
        self._wrappers[index] = self.row.cls(**arguments)

    @property
    def recordable(self) -> bool:
        """Whether a recorded run follows later plans."""
        return all(getattr(w, "is_cuda_graph_enabled", False) for w in self._wrappers.values())

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """`plan` of fi_cupy's class on every device; waits for earlier runs to end, and for the plan to arrive."""
        if not _at_top_level():
            raise UnsupportedError(f"{self.row.name}.{self.row.plan_name}: called inside jax.jit, expected outside")
        jax.effects_barrier()
        args = tuple(_to_host(x) for x in args)
        kwargs = {k: _to_host(v) for k, v in kwargs.items()}
        for device, wrapper in self._wrappers.items():
            if device < 0:
                getattr(wrapper, self.row.plan_name)(*args, **kwargs)
                continue
            import cupy

            with cupy.cuda.Device(device):
                getattr(wrapper, self.row.plan_name)(*args, **kwargs)
                cupy.cuda.get_current_stream().synchronize()

    begin_forward = plan

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """`run` of fi_cupy's class as a function of JAX arrays."""
        device, wrapper = next(iter(self._wrappers.items()))
        return self._tracer(self, args, kwargs, device, wrapper.run)

    def run_return_lse(self, *args: Any, **kwargs: Any) -> Any:
        """`run` with ``return_lse=True``."""
        return self.run(*args, return_lse=True, **kwargs)

    def rule(self, about: Mapping[str, Any]) -> tuple[Any, ...]:
        """What `run` returns for arguments of these shapes and dtypes."""
        return self.row.rule(next(iter(self._wrappers.values())), {"return_lse": False, **about})

    def callable(self, device: int) -> Any:
        wrapper = self._wrappers.get(device)
        if wrapper is None:
            places = ", ".join("the CPU" if d < 0 else f"cuda:{d}" for d in self._wrappers)
            raise ArgumentError(
                f"{self.name}: the arrays are on {'the CPU' if device < 0 else f'cuda:{device}'}, planned for {places}"
            )
        return wrapper.run

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As in fi_cupy's class."""
        wrapper = next(iter(self._wrappers.values()))
        size: tuple[int, int] = wrapper.workspace_size(*map(_to_host, args), **kwargs)
        return size


class LogitsPipe:
    """`fi_cupy.logits_processor.LogitsPipe` for use inside `jax.jit`; the rules must fuse it into one operator.

    Constructor and call take the arguments of fi_cupy's class. A pipeline that draws needs ``seed``.
    """

    row = PIPE
    name, planned, recordable = "LogitsPipe", False, True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._pipe = PIPE.cls(*args, **kwargs)
        self.draws = self._pipe.draws
        self._tracer = Tracer(PIPE, self.name)
        self.compiled = lru_cache(maxsize=256)(_compile)

    def rule(self, about: Mapping[str, Any]) -> tuple[Any, ...]:
        """What a call with arguments of these shapes and dtypes returns."""
        return self.row.rule(self._pipe, about)

    def callable(self, device: int) -> Any:
        return self._pipe.run

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        return self._tracer(self, (x,), kwargs, CPU, self._pipe.run)


def _at_top_level() -> bool:
    from jax._src import core

    return bool(core.trace_ctx.is_top_level())


def _to_host(x: Any) -> Any:
    if isinstance(x, jax.Array):
        return np.asarray(x)
    return type(x)(map(_to_host, x)) if isinstance(x, (list, tuple)) else x


def _indices(devices: Sequence[Any] | None) -> list[int]:
    """GPU indices of JAX devices (or ints); -1 for the CPU."""
    found = []
    for d in jax.local_devices() if devices is None else devices:
        index = d if isinstance(d, int) else CPU if d.platform == "cpu" else d.local_hardware_id
        if index not in found:
            found.append(index)
    return found


def _memory(size: int, device: int, dtype: Any) -> Any:
    if device < 0:
        return np.empty(size, dtype)
    import cupy

    with cupy.cuda.Device(device):
        return cupy.empty(size, dtype)
