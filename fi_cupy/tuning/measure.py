"""One measurement: the profiles of a call, their inputs, the tactics compiled and timed, and the decision."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import CompileError, GPUArchitectureError
from fi_cupy.jit.build import build_many
from fi_cupy.jit.cache import CachedKernel
from fi_cupy.tuning.file import Entry
from fi_cupy.tuning.types import (
    ArraySpec,
    Dim,
    DynamicDim,
    OptimizationProfile,
    Shapes,
    StaticDim,
    TunableRunner,
    TuningConfig,
    upper_end,
)

log = logging.getLogger("fi_cupy.autotuner")
#: Every tactic is timed this often first; the fastest time counts, since whatever disturbs only adds.
SCREEN_ROUNDS = 3
#: Of those within this factor of the fastest, the best few and the runner's own choice are timed again in turn.
FINAL_FACTOR, FINAL_COUNT, FINAL_ROUNDS = 1.1, 5, 9
#: A tactic replaces the runner's own choice if it is faster by more than this: the spread of such medians.
MARGIN = 0.01
RANKED = 8

Named = tuple[int, Any]


@dataclass
class Measured:
    """What came of a measurement.

    Attributes
    ----------
    timed : list of (runner_id, tactic, us)
        In the runners' order.
    own : bool
        Whether ``timed[0]`` is the first runner's own choice, what runs untuned.
    failed : list of str
        Tactics that could not be compiled or run.
    """

    timed: list[tuple[int, Any, float]] = field(default_factory=list)
    own: bool = False
    failed: list[str] = field(default_factory=list)


def measure(
    op: str,
    runners: Sequence[TunableRunner],
    config: TuningConfig,
    profile: OptimizationProfile,
    inputs: Sequence[Any],
    kwargs: dict[str, Any],
    timer: Any,
    device_of: Callable[[TunableRunner], DeviceInfo],
) -> Measured:
    """Compile the tactics of all runners in parallel, then time those that can run."""
    result = Measured()

    def failed(i: int, tactic: Any, error: BaseException) -> None:
        if not isinstance(error, Exception):
            raise error
        what = f"{type(runners[i]).__name__} {tactic} at {profile.get_opt_shapes()}"
        result.failed.append(what)
        level = logging.WARNING if isinstance(error, CompileError) else logging.INFO
        log.log(level, "%s: %s cannot be measured: %s: %s", op, what, type(error).__name__, error)

    tactics: list[Named] = []
    broken: set[Named] = set()
    for i, runner in enumerate(runners):
        valid = list(runner.get_valid_tactics(list(inputs), profile))
        tactics += [(i, t) for t in valid]
        for tactic, error in _compile(runner, valid, profile, device_of(runner).arch).items():
            broken.add((i, tactic))
            failed(i, tactic, error)
    with timer.session():
        made = make_inputs(timer, config, profile, inputs)
        for i, runner in enumerate(runners):
            if "do_preparation" in inspect.signature(runner.forward).parameters and any(j == i for j, _ in tactics):
                runner.forward(made, tactic=-1, do_preparation=True, **kwargs)
        sets = timer.rotate(made, config.use_cold_l2_cache)
        ready: list[tuple[int, Any, Any]] = []
        for i, tactic in tactics:
            if (i, tactic) not in broken:
                try:
                    call = _call(runners[i], tactic, kwargs)
                    ready.append((i, tactic, _prepare(timer, call, sets, config.use_cuda_graph)))
                except Exception as error:
                    failed(i, tactic, error)
        result.timed = _times(timer, ready)
    result.own = bool(ready) and ready[0][:2] == tactics[0] and tactics[0][0] == 0
    return result


def _compile(
    runner: TunableRunner, tactics: Sequence[Any], profile: OptimizationProfile, arch: str
) -> dict[Any, BaseException]:
    """Compile what the tactics launch, in processes; return why some cannot be had."""
    specs = runner.kernel_specs(tactics, profile)
    wanted = list(dict.fromkeys(s for found in specs.values() for s in found))
    if not wanted:
        return {}
    supported = [s for s in wanted if s.supports(arch)]
    failures: dict[str, BaseException] = {
        s.symbol: GPUArchitectureError(f"{s.symbol}: not for {arch}") for s in wanted if s not in supported
    }
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for job, outcome in build_many([(s, arch) for s in supported], min(16, cpus, len(wanted))):
        if not isinstance(outcome, CachedKernel):
            failures[job.symbol] = outcome
    lost: dict[Any, BaseException] = {}
    for tactic, found in specs.items():
        for spec in found:
            if spec.symbol in failures:
                lost[tactic] = failures[spec.symbol]
    return lost


def shapes_of(inputs: Sequence[Any]) -> Shapes:
    """The shape of every input; ``(0,)`` for what has none."""
    return tuple(tuple(x.shape) if hasattr(x, "shape") else (0,) for x in inputs)


def static_profile(shapes: Shapes) -> OptimizationProfile:
    """A profile in which nothing varies."""
    return OptimizationProfile([[StaticDim(n) for n in shape] for shape in shapes], [None] * len(shapes))


def profiles(config: TuningConfig, inputs: Sequence[Any]) -> list[OptimizationProfile]:
    """Every combination of buckets of the extents that vary."""
    shapes = shapes_of(inputs)
    grids = [spec.buckets(shapes[spec.input_idx[0]][spec.dim_idx[0]]) for spec in config.dynamic_tensor_specs]
    found = []
    for point in itertools.product(*grids):
        profile = static_profile(shapes)
        dims: list[list[Dim]] = profile.shapes
        for spec, buckets, value in zip(config.dynamic_tensor_specs, grids, point, strict=True):
            for n, (i, d) in enumerate(zip(spec.input_idx, spec.dim_idx, strict=True)):
                dims[i][d] = DynamicDim(value, value, upper_end(buckets, value))
                if spec.tensor_initializers is not None:
                    profile.tensor_initializers[i] = spec.tensor_initializers[n]
        for constraint in config.constraint_specs:
            extent = constraint.infer_shape(profile.get_opt_shapes())
            dims[constraint.input_idx][constraint.dim_idx] = DynamicDim(extent, extent, extent)
        found.append(profile)
    return found


def make_inputs(timer: Any, config: TuningConfig, profile: OptimizationProfile, inputs: Sequence[Any]) -> list[Any]:
    """Arrays of a profile's shapes: what does not vary is the caller's own, unless it was only described."""
    made: list[Any] = []
    for given, dims, initializer in zip(inputs, profile.shapes, profile.tensor_initializers, strict=True):
        varies = any(isinstance(d, DynamicDim) for d in dims)
        if not hasattr(given, "shape") or not (varies or isinstance(given, ArraySpec)):
            made.append(given)
            continue
        shape = tuple(d._opt() for d in dims)
        if initializer is not None:
            made.append(initializer(shape, given.dtype, getattr(given, "device", None)))
            continue
        array = timer.make(ArraySpec(shape, to_dtype(given.dtype)))
        if type(given).__module__.split(".")[0] == "torch":
            import torch

            array = torch.from_dlpack(array)
        made.append(array)
    return list(config.inputs_pre_hook(made)) if config.inputs_pre_hook is not None else made


def _call(runner: TunableRunner, tactic: Any, kwargs: Any) -> Callable[[list[Any]], Any]:
    return lambda inputs: runner.forward(inputs, tactic=tactic, **kwargs)


def _prepare(timer: Any, call: Callable[[list[Any]], Any], sets: list[list[Any]], use_graph: bool) -> Any:
    if use_graph:
        try:
            return timer.prepare(call, sets, True)
        except Exception as error:
            log.debug("a tactic cannot be captured (%s: %s); measured in a loop", type(error).__name__, error)
    return timer.prepare(call, sets, False)


def _times(timer: Any, ready: Sequence[tuple[int, Any, Any]]) -> list[tuple[int, Any, float]]:
    """Screen all, then time the fastest and the first again; (runner_id, tactic, µs) in the order given."""
    if not ready:
        return []
    us = [min(samples) for samples in timer.time([p for _, _, p in ready], SCREEN_ROUNDS)]
    order = sorted(range(len(ready)), key=us.__getitem__)
    again = [i for i in order if us[i] <= FINAL_FACTOR * us[order[0]]][:FINAL_COUNT]
    if 0 not in again:
        again.append(0)
    finals = timer.time([ready[i][2] for i in again], FINAL_ROUNDS)
    for i, samples in zip(again, finals, strict=True):
        us[i] = statistics.median(samples)
    slowest = max(us[i] for i in again if i != 0 or len(again) == 1)
    # What was screened out is slower than what was not, whatever the two ways of timing say.
    return [
        (runner, tactic, t if i in again else max(t, slowest))
        for i, ((runner, tactic, _), t) in enumerate(zip(ready, us, strict=True))
    ]


def decide(runners: Sequence[TunableRunner], measured: Measured) -> tuple[Entry, int]:
    """The entry to keep: the fastest, or the runner's own choice if that is as fast but for noise."""
    timed = measured.timed
    ranked = sorted(timed, key=lambda t: t[2])
    if measured.own and timed[0][2] <= ranked[0][2] * (1 + MARGIN):
        ranked = [timed[0], *(t for t in ranked if t is not timed[0])]
    names = [type(r).__name__ for r in runners]
    ranking = tuple((names[i], tactic, us) for i, tactic, us in ranked[:RANKED])
    best = ranked[0]
    return Entry(names[best[0]], best[1], best[2], timed[0][2] if measured.own else math.nan, ranking), best[0]
