"""How an operator says what can be tuned: shapes that vary, tactics, and the runner that executes one.

Names and meaning are flashinfer.autotuner's.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fi_cupy.dtypes import DType
from fi_cupy.errors import ArgumentError
from fi_cupy.jit.spec import KernelSpec

#: Makes one input of a profile: ``initializer(shape, dtype, device) → array``.
Initializer = Callable[[tuple[int, ...], Any, Any], Any]
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class ArraySpec:
    """An input by shape and type only: the tuner makes an array of it, on the GPU, when it measures."""

    shape: tuple[int, ...]
    dtype: DType


@dataclass(frozen=True)
class StaticDim:
    """An extent that does not vary."""

    val: int

    def _opt(self) -> int:
        return self.val


@dataclass(frozen=True)
class DynamicDim:
    """An extent that varies from `min` up to (not including, unless equal) `max`, measured at `opt`."""

    min: int
    opt: int
    max: float

    def _opt(self) -> int:
        return self.opt


Dim = StaticDim | DynamicDim


@dataclass
class OptimizationProfile:
    """The extents of every input at one point of measurement."""

    shapes: list[list[Dim]]
    tensor_initializers: list[Initializer | None]

    def get_opt_shapes(self) -> Shapes:
        """The shapes that are measured."""
        return tuple(tuple(d._opt() for d in dims) for dims in self.shapes)

    def get_hash_key(self) -> Shapes:
        """What tells this profile from others."""
        return self.get_opt_shapes()


@dataclass(frozen=True)
class DynamicTensorSpec:
    """An extent that varies from call to call, and the values of it that are measured.

    Attributes
    ----------
    input_idx, dim_idx : sequence of int
        The inputs that have this extent, and in which dimension: equally many.
    gen_tuning_buckets : sequence of int, or function
        The values to measure; a function gets the extent of the call at hand and returns them.
    map_to_tuning_buckets : function
        From an extent to the bucket whose choice it takes.
    tensor_initializers : sequence of functions, optional
        For each of the inputs ``(shape, dtype, device) → array``; random values by default.
    """

    input_idx: Sequence[int]
    dim_idx: Sequence[int]
    gen_tuning_buckets: Sequence[int] | Callable[[int], Sequence[int]]
    map_to_tuning_buckets: Callable[[int], int]
    tensor_initializers: Sequence[Initializer] | None = None

    def __post_init__(self) -> None:
        if len(self.input_idx) != len(self.dim_idx) or not self.input_idx:
            raise ArgumentError(
                f"DynamicTensorSpec: input_idx has {len(self.input_idx)} entries and dim_idx {len(self.dim_idx)}, "
                "expected equally many and at least one"
            )
        if self.tensor_initializers is not None and len(self.tensor_initializers) != len(self.input_idx):
            raise ArgumentError(
                f"DynamicTensorSpec: tensor_initializers has {len(self.tensor_initializers)} entries, "
                f"expected {len(self.input_idx)} = len(input_idx)"
            )

    def buckets(self, extent: int) -> tuple[int, ...]:
        """The values to measure, ascending, each once."""
        given = self.gen_tuning_buckets
        found = tuple(sorted(set(given(extent) if callable(given) else given)))
        if not found:
            raise ArgumentError("DynamicTensorSpec: gen_tuning_buckets is empty, expected at least one value")
        return found


@dataclass(frozen=True)
class ConstraintSpec:
    """An extent that follows from the others.

    Attributes
    ----------
    input_idx, dim_idx : int
        Of the input and its dimension.
    infer_shape : function
        From the shapes of all inputs to the extent.
    """

    input_idx: int
    dim_idx: int
    infer_shape: Callable[[Shapes], int]


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """What varies from call to call, and how to measure.

    Attributes
    ----------
    dynamic_tensor_specs, constraint_specs : tuples
    use_cold_l2_cache : bool
        Rotate over copies of the inputs that together outrun the L2 cache, as a model's weights do.
    use_cuda_graph : bool
        Measure replays of a captured graph; a runner that cannot be captured is measured in a loop.
    inputs_pre_hook : function, optional
        Gets the list of inputs made for a profile, returns those to measure with.
    """

    dynamic_tensor_specs: tuple[DynamicTensorSpec, ...] = ()
    constraint_specs: tuple[ConstraintSpec, ...] = ()
    use_cold_l2_cache: bool = True
    use_cuda_graph: bool = True
    inputs_pre_hook: Callable[[list[Any]], Sequence[Any]] | None = None

    def nearest_shapes(self, shapes: Shapes) -> Shapes:
        """`shapes` with every extent that varies replaced by its bucket, and by -1 what follows from others."""
        dims = [list(shape) for shape in shapes]
        for spec in self.dynamic_tensor_specs:
            bucket = spec.map_to_tuning_buckets(dims[spec.input_idx[0]][spec.dim_idx[0]])
            for i, d in zip(spec.input_idx, spec.dim_idx, strict=True):
                dims[i][d] = bucket
        for constraint in self.constraint_specs:
            dims[constraint.input_idx][constraint.dim_idx] = -1
        return tuple(map(tuple, dims))


class TunableRunner(ABC):
    """One implementation of an operator, with tactics to choose from.

    A tactic is whatever names one way of running (a number, a kernel's symbol, a tuple of such). -1 is the fallback,
    which every runner takes for every input: what runs where nothing has been tuned.

    Examples
    --------
    >>> class Doubler(TunableRunner):
    ...     def get_valid_tactics(self, inputs, profile):
    ...         return [0, 1]
    ...     def forward(self, inputs, tactic=-1, do_preparation=False):
    ...         return inputs[0] * 2 if tactic < 1 else inputs[0] + inputs[0]
    """

    @abstractmethod
    def get_valid_tactics(self, inputs: list[Any], profile: OptimizationProfile) -> Sequence[Any]:
        """The tactics that can run these inputs; the runner's own choice for them comes first."""

    @abstractmethod
    def forward(self, inputs: list[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
        """Run with a tactic; with `do_preparation` (once a measurement, before the tactics) only what is done once."""

    def get_cache_key_extras(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What tells choices apart beside the shapes (types, layout): hashable, the same for real and made inputs."""
        return ()

    def kernel_specs(self, tactics: Sequence[Any], profile: OptimizationProfile) -> dict[Any, list[KernelSpec]]:
        """The kernels each tactic launches, where the runner knows: they are compiled together before measuring."""
        return {}

    def __call__(self, inputs: list[Any], **kwargs: Any) -> Any:
        return self.forward(inputs, **kwargs)


@dataclass
class AutoTunerStatistics:
    """What the tuner has done since it was made or reset.

    Attributes
    ----------
    cache_misses : int
        Calls outside tuning that found nothing and took the fallback.
    cache_miss_config_collection : {operator: shapes}
        Of those calls.
    tuned_op_total_configs, tuned_op_successful_configs : {operator: int}
        Profiles measured, and those that gave a choice.
    failed_profiling_count : {operator: set}
        Tactics that could not be compiled or run, as text.
    """

    cache_misses: int = 0
    cache_miss_config_collection: dict[str, set[Shapes]] = field(default_factory=dict)
    failed_profiling_count: dict[str, set[str]] = field(default_factory=dict)
    tuned_op_total_configs: dict[str, int] = field(default_factory=dict)
    tuned_op_successful_configs: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"Cache misses: {self.cache_misses}"]
        for op, shapes in sorted(self.cache_miss_config_collection.items()):
            lines += [f"  {op}: {shape}" for shape in sorted(shapes)]
        for op, total in sorted(self.tuned_op_total_configs.items()):
            good, failed = self.tuned_op_successful_configs.get(op, 0), self.failed_profiling_count.get(op, ())
            lines.append(f"{op}: {total} profiles, {good} tuned, {len(failed)} tactics failed")
            lines += [f"  {what}" for what in sorted(failed)]
        return "\n".join(lines)


def round_to_nearest_bucket(x: int, buckets: Sequence[int], round_map: bool = False) -> int:
    """The bucket of `x`: the largest not above it, or with `round_map` the smallest not below; clamped to the ends.

    Parameters
    ----------
    x : int
    buckets : sequence of int
        Ascending, not empty.
    round_map : bool

    Examples
    --------
    >>> round_to_nearest_bucket(200, (128, 256, 512)), round_to_nearest_bucket(200, (128, 256, 512), True)
    (128, 256)
    """
    if not buckets:
        raise ArgumentError("round_to_nearest_bucket: buckets is empty, expected at least one value")
    index = bisect_left(buckets, x) if round_map else bisect_right(buckets, x) - 1
    return buckets[min(max(index, 0), len(buckets) - 1)]


def make_bucket_mapper(buckets: Sequence[int], round_map: bool = False) -> Callable[[int], int]:
    """A function from an extent to its bucket, as `round_to_nearest_bucket`; `buckets` in any order.

    Examples
    --------
    >>> make_bucket_mapper((512, 128, 256))(200)
    128
    """
    ascending = tuple(sorted(set(buckets)))
    if not ascending:
        raise ArgumentError("make_bucket_mapper: buckets is empty, expected at least one value")

    def mapper(x: int) -> int:
        return round_to_nearest_bucket(x, ascending, round_map)

    return mapper


def overridden(config: TuningConfig, buckets: tuple[int, ...] | None, round_up: bool | None) -> TuningConfig:
    """`config` under ``autotune(tuning_buckets=..., round_up=...)``; None leaves the operator's own way."""
    if buckets is None and round_up is None:
        return config
    specs = []
    for spec in config.dynamic_tensor_specs:
        given: Any = buckets if buckets is not None else spec.gen_tuning_buckets
        mapper = _follow(given, bool(round_up)) if callable(given) else make_bucket_mapper(given, bool(round_up))
        specs.append(DynamicTensorSpec(spec.input_idx, spec.dim_idx, given, mapper, spec.tensor_initializers))
    return TuningConfig(
        dynamic_tensor_specs=tuple(specs), constraint_specs=config.constraint_specs,
        use_cold_l2_cache=config.use_cold_l2_cache, use_cuda_graph=config.use_cuda_graph,
        inputs_pre_hook=config.inputs_pre_hook,
    )  # fmt: skip


def _follow(generate: Callable[[int], Sequence[int]], round_up: bool) -> Callable[[int], int]:
    return lambda x: make_bucket_mapper(generate(x), round_up)(x)


def upper_end(buckets: Sequence[int], bucket: int) -> float:
    """The bucket after this one, or infinity."""
    index = bisect_right(buckets, bucket)
    return buckets[index] if index < len(buckets) else math.inf
