"""The autotuner: picks the fastest tactic of an operator by measuring, once, and remembers it.

Inside ``with autotune():`` an operator that has tactics (`fi_cupy.gemm.mm_bf16`, batch decode) measures those of every
problem that it has not met, and from then on takes the fastest. With ``cache=`` the choices are kept in a JSON file;
those that ``fi-cupy tune`` has written under the kernel cache are used by every process without asking. Outside, and
where nothing was measured, operators take their heuristic's choice.

Names and semantics are flashinfer.autotuner's. Where it differs: a file is merged under a lock; its choices count only
in the environment they were measured in, and it can hold several; contexts belong to their thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fi_cupy.device import DeviceInfo, device_info, num_devices
from fi_cupy.errors import ArgumentError, CacheError, CudaUnavailableError, GPUArchitectureError
from fi_cupy.jit import env
from fi_cupy.tuning import choice, file, measure
from fi_cupy.tuning.choice import Context
from fi_cupy.tuning.file import Entry, Environment, Table
from fi_cupy.tuning.types import (
    ArraySpec,
    AutoTunerStatistics,
    ConstraintSpec,
    DynamicDim,
    DynamicTensorSpec,
    OptimizationProfile,
    Shapes,
    StaticDim,
    TunableRunner,
    TuningConfig,
    make_bucket_mapper,
    overridden,
    round_to_nearest_bucket,
)

__all__ = [
    "ArraySpec",
    "AutoTuner",
    "AutoTunerStatistics",
    "ConstraintSpec",
    "DynamicDim",
    "DynamicTensorSpec",
    "OptimizationProfile",
    "StaticDim",
    "TunableRunner",
    "TuningConfig",
    "autotune",
    "default_file",
    "make_bucket_mapper",
    "round_to_nearest_bucket",
]

log = logging.getLogger("fi_cupy.autotuner")


def default_file() -> Path | None:
    """The file of choices that every process reads: FI_CUPY_AUTOTUNE_DIR's, or that under the kernel cache.

    None where FI_CUPY_AUTOTUNE_DIR is "off".
    """
    folder = env.AUTOTUNE_DIR.get()
    if folder is not None and folder.strip().lower() in ("off", "0", "none"):
        return None
    return (Path(folder).expanduser() if folder else env.cache_dir() / file.FOLDER) / file.FILE


@contextlib.contextmanager
def autotune(
    tune_mode: bool = True,
    cache: str | os.PathLike[str] | None = None,
    tuning_buckets: Sequence[int] | None = None,
    round_up: bool | None = None,
    skip_ops: Sequence[str] | set[str] | frozenset[str] | None = None,
) -> Iterator[None]:
    """Measure what the operators called inside have not met, and let them take the fastest.

    Parameters
    ----------
    tune_mode : bool
        False: measure nothing, only use what is known and what `cache` holds.
    cache : path, optional
        JSON file: read on entry if it exists; written on exit if something was measured. Where it cannot be written
        there is a RuntimeWarning, and the choices stay in this process.
    tuning_buckets : sequence of int, optional
        Values of the extent that varies (rows of a product, requests of a batch) to measure, in place of the
        operators' own. None inherits from the context around this one.
    round_up : bool, optional
        Whether an extent between two buckets takes the choice of the larger one. None inherits; without either each
        operator has its own way (products round up).
    skip_ops : set of str, optional
        Operators to leave alone; those of the contexts around this one, too.

    Raises
    ------
    ArgumentError
        `tuning_buckets` is empty or holds something else than positive integers.

    Source
    ------
    flashinfer.autotuner.autotune. The context counts for the thread that enters it.

    Examples
    --------
    >>> with autotune(cache="choices.json"):                # doctest: +SKIP
    ...     mm_bf16(x, weight.T)
    """
    if tuning_buckets is not None:
        buckets = tuple(sorted(set(tuning_buckets)))
        if not buckets or any(type(b) is not int or b < 1 for b in buckets):
            raise ArgumentError(
                f"autotune: tuning_buckets is {tuning_buckets!r}, expected at least one positive integer"
            )
    tuner = AutoTuner.get()
    path = None if cache is None else Path(cache)
    if path is not None and path.exists():
        tuner.load_configs(path)
    outer = choice.current()
    inner = Context(
        outer.tuning or bool(tune_mode),
        buckets if tuning_buckets is not None else outer.buckets,
        outer.round_up if round_up is None else bool(round_up),
        outer.skip_ops | frozenset(skip_ops or ()),
    )
    choice.enter(inner)
    try:
        yield
    finally:
        choice.enter(outer)
        if path is not None and tuner.dirty:
            try:
                tuner.save_configs(path)
            except CacheError as error:  # hours of tuning must not end in an exception
                warnings.warn(f"{error}; the choices count in this process only", RuntimeWarning, stacklevel=3)


class AutoTuner:
    """What has been measured or read, and the measuring. Use the process's: ``AutoTuner.get()``.

    Parameters
    ----------
    timer : object, optional
        In place of `fi_cupy.tuning.timer.GraphTimer`.
    device : DeviceInfo, optional
        The GPU that runners without a device of their own are measured on; by default the current one.
    """

    _instance: AutoTuner | None = None
    _class_lock = threading.Lock()

    def __init__(self, timer: Any = None, device: DeviceInfo | None = None) -> None:
        self._timer = timer
        self._device = device
        self._lock = threading.RLock()
        self._tables: dict[Environment, Table] = {}
        self._dirty: set[tuple[Environment, str]] = set()
        self._default_read = False
        self._missed: set[tuple[str, Shapes]] = set()
        self.stats = AutoTunerStatistics()

    @classmethod
    def get(cls) -> AutoTuner:
        """The process's tuner."""
        with cls._class_lock:
            if cls._instance is None:
                cls._instance = AutoTuner()
            return cls._instance

    @property
    def is_tuning_mode(self) -> bool:
        """Whether this thread is inside ``autotune()``."""
        return choice.current().tuning

    @property
    def dirty(self) -> bool:
        """Whether something has been measured since the choices were last saved."""
        return bool(self._dirty)

    # --- what is known -----------------------------------------------------------------------------------------------

    def has_choices(self, custom_op: str, device: DeviceInfo) -> bool:
        """Whether a choice of this operator is known for a GPU; the first question reads the default file."""
        with self._lock:
            if not self._default_read:
                self._default_read = True
                path = default_file()
                if path is not None and path.exists():
                    with contextlib.suppress(CacheError):  # logged; a broken file must not stop a program
                        self.load_configs(path)
            if not self._tables:
                return False
            prefix = _prefix(custom_op)
            return any(key.startswith(prefix) for key in self._tables.get(file.environment(device), ()))

    def choices(self, device: DeviceInfo | None = None) -> Table:
        """Everything known for a GPU (by default the current one), by key."""
        with self._lock:
            return dict(self._tables.get(file.environment(device or self._current()), {}))

    def search_cache(
        self,
        custom_op: str,
        runners: Sequence[TunableRunner],
        input_shapes: Shapes,
        tuning_config: TuningConfig,
        inputs: Sequence[Any] | None = None,
    ) -> tuple[bool, int, Any, OptimizationProfile | None]:
        """What is known for inputs of these shapes.

        Returns
        -------
        (hit, runner_id, tactic, profile)
            ``(False, 0, -1, None)`` where nothing is. The profile is that of the bucket the choice was measured at.
        """
        entry = self._entry(custom_op, runners, input_shapes, tuning_config, inputs)
        if entry is None:
            return False, 0, -1, None
        found, shapes = entry
        names = [type(r).__name__ for r in runners]
        if found.runner not in names:
            log.warning("%s: the tuned choice is of runner %s, which is not there", custom_op, found.runner)
            return False, 0, -1, None
        return True, names.index(found.runner), found.tactic, measure.static_profile(shapes)

    def _entry(
        self, op: str, runners: Sequence[TunableRunner], shapes: Shapes, config: TuningConfig, inputs: Any
    ) -> tuple[Entry, Shapes] | None:
        context = choice.current()
        nearest = overridden(config, context.buckets, context.round_up).nearest_shapes(shapes)
        with self._lock:
            for runner in runners:
                table = self._tables.get(file.environment(self._device_of(runner)))
                if table:
                    found = table.get(_key(op, nearest, runner.get_cache_key_extras(inputs or ())))
                    if found is not None:
                        return found, nearest
        return None

    def choose_one(
        self,
        custom_op: str,
        runners: Sequence[TunableRunner],
        tuning_config: TuningConfig,
        inputs: list[Any],
        **kwargs: Any,
    ) -> tuple[TunableRunner, Any]:
        """The runner and tactic to use for `inputs`.

        Parameters
        ----------
        custom_op : str
            The operator's name: what `skip_ops` and the file call it.
        runners : sequence of TunableRunner
            ``runners[0]`` with tactic -1 runs where nothing is known.
        tuning_config : TuningConfig
        inputs : list
            Arrays, `ArraySpec` (made when measured), or anything else (its shape counts as ``(0,)``).
        **kwargs
            Handed to ``forward``.

        Returns
        -------
        (TunableRunner, tactic)

        Raises
        ------
        ArgumentError
            No runner, or something that is none.
        """
        if not runners or not all(isinstance(r, TunableRunner) for r in runners):
            raise ArgumentError(f"choose_one: runners is {runners!r}, expected at least one TunableRunner")
        context = choice.current()
        if custom_op in context.skip_ops:
            return runners[0], -1
        shapes = measure.shapes_of(inputs)
        config = overridden(tuning_config, context.buckets, context.round_up)
        if context.tuning:
            with self._lock:  # one measurement at a time: two would disturb each other
                self._tune(custom_op, runners, config, inputs, kwargs)
        hit, runner_id, tactic, _ = self.search_cache(custom_op, runners, shapes, tuning_config, inputs)
        if not hit:
            self._miss(custom_op, shapes)
        return runners[runner_id], tactic

    def rank_tactics(
        self,
        custom_op: str,
        runners: Sequence[TunableRunner],
        tuning_config: TuningConfig,
        inputs: list[Any],
        k: int = 1,
        **kwargs: Any,
    ) -> list[Any]:
        """The `k` fastest tactics of ``runners[0]`` for `inputs`, best first (at most 8 are remembered).

        Measures them inside ``autotune()``; where nothing is known the runner's own order counts.
        """
        self.choose_one(custom_op, runners, tuning_config, inputs, **kwargs)
        found = self._entry(custom_op, runners, measure.shapes_of(inputs), tuning_config, inputs)
        name = type(runners[0]).__name__
        ranked = [tactic for runner, tactic, _ in found[0].ranking if runner == name] if found else []
        if not ranked:
            ranked = list(runners[0].get_valid_tactics(inputs, measure.static_profile(measure.shapes_of(inputs))))
        return ranked[:k]

    def _miss(self, op: str, shapes: Shapes) -> None:
        self.stats.cache_misses += 1
        self.stats.cache_miss_config_collection.setdefault(op, set()).add(shapes)
        if (op, shapes) not in self._missed and any(
            key.startswith(_prefix(op)) for table in self._tables.values() for key in table
        ):
            self._missed.add((op, shapes))
            # A file of choices covers some shapes and not others, which is nobody's fault: only who tunes is told.
            level = logging.WARNING if choice.current().tuning else logging.DEBUG
            log.log(level, "%s: no tuned choice covers the shapes %s; the default runs", op, shapes)

    # --- files -------------------------------------------------------------------------------------------------------

    def load_configs(self, path: str | os.PathLike[str]) -> bool:
        """Take in the choices of a file that were measured in this environment; those measured here since count more.

        Returns
        -------
        bool
            False if the file holds none for any GPU of this machine; the log (``fi_cupy.autotuner``) says what differs.

        Raises
        ------
        CacheError
            The file is missing or unreadable. One that is no file of choices is not used: the log says why.
        """
        path = Path(path)
        try:
            sections = file.read(path)
        except FileNotFoundError:
            raise CacheError(f"autotuner: there is no file {path}") from None
        except CacheError as error:
            if not os.access(path, os.R_OK):
                raise
            log.warning("%s; it is not used", error)
            return False
        return self._take_in(path, sections)

    def _take_in(self, path: Path, sections: dict[Environment, Table]) -> bool:
        wanted = {file.environment(d) for d in self._devices()}
        used = 0
        with self._lock:
            for environment in wanted & sections.keys():
                table = self._tables.setdefault(environment, {})
                fresh = {k: e for k, e in sections[environment].items() if (environment, k) not in self._dirty}
                table.update(fresh)
                used += len(fresh)
        if used or wanted & sections.keys():
            choice.forget()
            log.info("%d tuned choices read from %s", used, path)
            return True
        for environment in sections:
            for here in wanted:
                log.warning(
                    "the tuned choices in %s are not used: they were measured with %s", path,
                    file.differences(environment, here),
                )  # fmt: skip
        return False

    def save_configs(self, path: str | os.PathLike[str]) -> None:
        """Add everything known to a file. Choices of other processes and machines in it stay.

        Raises
        ------
        CacheError
            The file cannot be written.
        """
        with self._lock:
            tables = {environment: dict(table) for environment, table in self._tables.items()}
            saved = set(self._dirty)
        # What was only read may be older than what lies there now: it must not replace it.
        mine = {
            environment: {k: e for k, e in table.items() if (environment, k) in saved or not Path(path).exists()}
            for environment, table in tables.items()
        }
        sections = file.merge_into(Path(path), mine)
        with self._lock:
            self._dirty -= saved
        log.info("%d tuned choices in %s", sum(map(len, sections.values())), path)

    def clear_cache(self) -> None:
        """Forget every choice; files stay."""
        with self._lock:
            self._tables.clear()
            self._dirty.clear()
            self._missed.clear()
            self._default_read = True
        choice.forget()

    def reset_statistics(self) -> None:
        """Count anew."""
        self.stats = AutoTunerStatistics()

    # --- measuring ---------------------------------------------------------------------------------------------------

    def can_measure(self, device: DeviceInfo) -> bool:
        """Whether the current GPU is this one and its stream is not being captured."""
        if self._timer is not None:
            return True
        if num_devices() == 0 or device != self._current():
            return False
        from fi_cupy.tuning.timer import capturing

        return not capturing()

    def _current(self) -> DeviceInfo:
        if self._device is not None:
            return self._device
        if num_devices() == 0:
            raise CudaUnavailableError("autotuner: no CUDA GPU is present, so nothing can be measured or looked up")
        from cupy.cuda import runtime

        return device_info(runtime.getDevice())

    def _devices(self) -> list[DeviceInfo]:
        if self._device is not None:
            return [self._device]
        found = []
        for index in range(num_devices()):
            with contextlib.suppress(GPUArchitectureError):
                found.append(device_info(index))
        return found

    def _device_of(self, runner: TunableRunner) -> DeviceInfo:
        own: DeviceInfo | None = getattr(runner, "device_info", None)
        return own if own is not None else self._current()

    def _timing(self) -> Any:
        if self._timer is not None:
            return self._timer
        from fi_cupy.tuning.timer import GraphTimer

        return GraphTimer()

    def _tune(
        self, op: str, runners: Sequence[TunableRunner], config: TuningConfig, inputs: list[Any], kwargs: Any
    ) -> None:
        for profile in measure.profiles(config, inputs):
            nearest = config.nearest_shapes(profile.get_opt_shapes())
            keys = [
                (file.environment(self._device_of(r)), _key(op, nearest, r.get_cache_key_extras(inputs)))
                for r in runners
            ]
            if any(key in self._tables.get(environment, ()) for environment, key in keys):
                continue
            self.stats.tuned_op_total_configs[op] = self.stats.tuned_op_total_configs.get(op, 0) + 1
            made = measure.measure(op, runners, config, profile, inputs, kwargs, self._timing(), self._device_of)
            for what in made.failed:
                self.stats.failed_profiling_count.setdefault(op, set()).add(what)
            if not made.timed:
                log.warning("%s: no tactic could be measured for %s; the default runs", op, nearest)
                continue
            entry, runner_id = measure.decide(runners, made)
            environment, key = keys[runner_id]
            self._tables.setdefault(environment, {})[key] = entry
            self._dirty.add((environment, key))
            choice.forget()
            good = self.stats.tuned_op_successful_configs
            good[op] = good.get(op, 0) + 1
            log.info("%s %s: %s takes %.2f us, untuned %.2f us", op, nearest, entry.tactic, entry.us, entry.fallback_us)


def _prefix(op: str) -> str:
    return f"({op!r}, "


def _key(op: str, nearest: Shapes, extras: tuple[Any, ...]) -> str:
    return str((op, nearest, extras))
