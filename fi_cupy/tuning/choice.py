"""The question an operator asks on every call: which kernel? Answered from a dictionary once it has been asked.

An operator whose kernels can be tuned is a `TunableOp`. `choose` gives the operator's own choice (its heuristic) until
the tuner knows a better one, from a file or from having measured inside ``autotune()``. What a call sees of the tuner
is its thread's `Context`: the process's, or that of the innermost ``autotune()`` around it.
"""

from __future__ import annotations

import logging
import threading
import weakref
from abc import ABC, abstractmethod
from typing import Any

from fi_cupy.device import DeviceInfo
from fi_cupy.jit import env
from fi_cupy.jit.build import is_cached
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.tuning.types import ArraySpec, TunableRunner, TuningConfig

log = logging.getLogger("fi_cupy.autotuner")
Problem = tuple[Any, ...]
_MEMO_SIZE = 8192  # problems remembered before the dictionary starts afresh: shapes of a serving process are far fewer


class TunableOp(ABC):
    """An operator that chooses among kernels. Make one object an operator, at module level.

    A *problem* is a tuple of everything the choice depends on, a *choice* what the operator launches, and a *tactic*
    the choice's name in the tuner's file.
    """

    name: str
    config: TuningConfig

    @abstractmethod
    def default(self, problem: Problem) -> Any:
        """The choice where nothing is tuned: a pure function of the problem."""

    @abstractmethod
    def choice(self, problem: Problem, tactic: Any) -> Any:
        """The choice that a tactic names for this problem; None if it cannot take the problem."""

    @abstractmethod
    def runner(self, problem: Problem) -> TunableRunner:
        """What measures the tactics."""

    @abstractmethod
    def inputs(self, problem: Problem) -> list[ArraySpec]:
        """The inputs to measure with; those extents vary that `config` says."""

    @abstractmethod
    def kernels(self, choice: Any) -> list[KernelSpec]:
        """The kernels that a choice launches."""

    @abstractmethod
    def device(self, problem: Problem) -> DeviceInfo:
        """The GPU that the problem is for."""


class Context:
    """What applies to the calls of a thread."""

    __slots__ = ("__weakref__", "buckets", "memo", "round_up", "skip_ops", "tuning")

    def __init__(
        self,
        tuning: bool = False,
        buckets: tuple[int, ...] | None = None,
        round_up: bool | None = None,
        skip_ops: frozenset[str] = frozenset(),
    ) -> None:
        self.tuning = tuning
        self.buckets = buckets
        self.round_up = round_up
        self.skip_ops = skip_ops
        self.memo: dict[tuple[TunableOp, Problem], Any] = {}
        _contexts.add(self)


_contexts: weakref.WeakSet[Context] = weakref.WeakSet()
_BASE = Context()


class _Thread(threading.local):
    context: Context = _BASE


_thread = _Thread()


def current() -> Context:
    """The context of this thread."""
    return _thread.context


def enter(context: Context) -> Context:
    """Make `context` this thread's; return the one before."""
    before = _thread.context
    _thread.context = context
    return before


def forget() -> None:
    """The tuner knows something else than before: every question is asked anew."""
    for context in list(_contexts):
        context.memo = {}  # a new one: a question under way in another thread must not answer into it


def choose(op: TunableOp, problem: Problem) -> Any:
    """What `op` launches for `problem`: the tuned choice where there is one, else the operator's default.

    About 0.5 µs once a problem has been seen (a dictionary hit). Inside ``autotune()`` a problem that no choice covers
    is measured, except while a CUDA graph is being captured.
    """
    context = _thread.context
    memo = context.memo
    key = (op, problem)
    found = memo.get(key)
    if found is None:
        found, final = _resolve(context, op, problem)
        if final:
            if len(memo) >= _MEMO_SIZE:
                memo.clear()
            memo[key] = found
    return found


def _resolve(context: Context, op: TunableOp, problem: Problem) -> tuple[Any, bool]:
    """(choice, whether to remember it)."""
    from fi_cupy.autotuner import AutoTuner

    default = op.default(problem)
    device = op.device(problem)
    tuner = AutoTuner.get()
    if op.name in context.skip_ops or not (context.tuning or tuner.has_choices(op.name, device)):
        return default, True
    runners, inputs, final = [op.runner(problem)], op.inputs(problem), True
    if context.tuning and not tuner.can_measure(device):
        log.debug("%s: not measured now (a capture is under way, or another GPU is current)", op.name)
        final, _, tactic, _ = tuner.search_cache(op.name, runners, tuple(x.shape for x in inputs), op.config)
    else:
        _, tactic = tuner.choose_one(op.name, runners, op.config, list(inputs))
    if type(tactic) is int and tactic == -1:
        return default, final
    chosen = op.choice(problem, tactic)
    if chosen is None:
        log.warning("%s: the tuned choice %s does not take %s; the default runs instead", op.name, tactic, problem)
        return default, True
    if env.NO_COMPILE.flag() and not all(is_cached(spec, device.arch) for spec in op.kernels(chosen)):
        log.warning("%s: the tuned choice %s is not compiled, nor may it be; the default runs instead", op.name, tactic)
        return default, True
    return chosen, True
