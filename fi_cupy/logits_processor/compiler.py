"""From a list of operators to one of fused operators: type check, validity checks, fusion rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise, product
from typing import NamedTuple

from fi_cupy.errors import ArgumentError
from fi_cupy.logits_processor import operators as o
from fi_cupy.logits_processor.types import Op, ParameterizedOp, TensorType


class CompileError(ArgumentError):
    """The operators are no pipeline."""


ValidityCheck = Callable[[list[Op]], None]


class FusionRule(NamedTuple):
    """Replace operators by one.

    Attributes
    ----------
    pattern : tuple of types
        The operators that stand one behind the other.
    guard : callable
        Whether the rule applies to these operators.
    build : callable
        The operator that replaces them.
    prio : int
        Rules of higher priority are tried first. Those of the project have their pattern's length.
    """

    pattern: tuple[type, ...]
    guard: Callable[[list[Op]], bool]
    build: Callable[[list[Op]], Op]
    prio: int = 0


_NAMES: dict[type, str] = {
    o.TemperatureOp: "temperature",
    o.LogitsTopKOp: "top_k",
    o.ProbsTopKOp: "top_k",
    o.TopPOp: "top_p",
    o.MinPOp: "min_p",
}


def _merged(made: type[ParameterizedOp]) -> Callable[[list[Op]], Op]:
    """An operator with the parameters of all that it replaces."""

    def build(window: list[Op]) -> Op:
        params: dict[str, object] = {}
        for op in window:
            params.update(getattr(op, "default_params", {}))
        params["filters"] = tuple(_NAMES[type(op)] for op in window if type(op) in _NAMES)
        if any(isinstance(op, o.LogitsTopKOp) for op in window):
            params["joint_topk_topp"] = False  # the mask comes before the softmax: it renormalises
        return made(**params)

    return build


def _always(window: list[Op]) -> bool:
    return True


def _patterns(tail: type | None) -> Iterator[tuple[type, ...]]:
    """Filters of probabilities that one kernel does, in the order in which it does them, and what follows."""
    for chosen in product((False, True), repeat=3):
        filters = tuple(f for f, there in zip((o.ProbsTopKOp, o.TopPOp, o.MinPOp), chosen, strict=True) if there)
        yield filters if tail is None else (*filters, tail)


def default_fusion_rules() -> list[FusionRule]:
    """Every pipeline of at most one of each processor, top-k before top-p before min-p, becomes one kernel."""
    rules = [
        FusionRule((o.TemperatureOp, o.SoftmaxOp), _always, _merged(o.FusedTemperatureSoftmaxOp), 2),
        FusionRule((o.MinPOp, o.ProbsTopKOp, o.ProbsSampleOp), _always, _merged(o.FusedProbsSampleOp), 3),
    ]
    for pattern in _patterns(o.ProbsSampleOp):
        if len(pattern) > 1:
            rules.append(FusionRule(pattern, _always, _merged(o.FusedProbsSampleOp), len(pattern)))
    for pattern in _patterns(None):
        if len(pattern) > 1:
            rules.append(FusionRule(pattern, _not_joint, _merged(o.FusedFilterOp), len(pattern)))
    before: list[tuple[type, ...]] = [
        (), (o.TemperatureOp,), (o.LogitsTopKOp,), (o.TemperatureOp, o.LogitsTopKOp), (o.LogitsTopKOp, o.TemperatureOp)
    ]  # fmt: skip
    for first in before:
        for pattern in _patterns(o.ProbsSampleOp):
            if not (o.LogitsTopKOp in first and o.ProbsTopKOp in pattern):
                whole = (*first, o.SoftmaxOp, *pattern)
                rules.append(FusionRule(whole, _always, _merged(o.FusedLogitsSampleOp), len(whole)))
        if first:
            whole = (*first, o.LogitsSampleOp)
            rules.append(FusionRule(whole, _always, _merged(o.FusedLogitsSampleOp), len(whole)))
    return rules


def _not_joint(window: list[Op]) -> bool:
    """Joint top-k and top-p are a matter of pipelines that sample."""
    return not getattr(window[0], "default_params", {}).get("joint_topk_topp", False)


def single_softmax_rule(ops: list[Op]) -> None:
    """Softmax stands once at most."""
    if sum(isinstance(op, o.SoftmaxOp) for op in ops) > 1:
        raise CompileError("Multiple Softmax operators found. Only one Softmax is allowed per pipeline.")


def indices_terminal_rule(ops: list[Op]) -> None:
    """Nothing follows a draw."""
    for op, following in pairwise(ops):
        if op.OUT is TensorType.INDICES:
            raise CompileError(
                f"No operator may follow one that outputs Indices. Found {type(following).__name__} after "
                f"{type(op).__name__} which outputs Indices."
            )


class Compiler:
    """The rules and checks of one compilation."""

    def __init__(self) -> None:
        self.fusion_rules: list[FusionRule] = []
        self.validity_checks: list[ValidityCheck] = [single_softmax_rule, indices_terminal_rule]
        for rule in default_fusion_rules():
            self.register_fusion_rule(rule)

    def register_fusion_rule(self, rule: FusionRule) -> None:
        self.fusion_rules.append(rule)
        self.fusion_rules.sort(key=lambda r: -r.prio)

    def register_validity_check(self, check: ValidityCheck) -> None:
        self.validity_checks.append(check)

    def compile(self, ops: Sequence[Op]) -> list[Op]:
        """Check the operators and fuse them."""
        if not ops:
            raise CompileError("Cannot compile empty operator list")
        made = list(ops)
        for check in self.validity_checks:
            check(made)
        self._check_types(made)
        return self._fuse(made)

    def _check_types(self, ops: list[Op]) -> None:
        if ops[0].IN is TensorType.INDICES:
            raise CompileError(
                f"First operator ({type(ops[0]).__name__}) cannot accept standard pipeline inputs. "
                f"Expected LOGITS or PROBS, but operator accepts: {ops[0].IN}"
            )
        for i in range(1, len(ops)):
            if ops[i].IN is not ops[i - 1].OUT:
                raise CompileError(
                    f"Type mismatch at operator {i} ({type(ops[i]).__name__}). Expected input type: {ops[i - 1].OUT}, "
                    f"but operator accepts: {ops[i].IN}."
                )

    def _fuse(self, ops: list[Op]) -> list[Op]:
        i = 0
        while i < len(ops):
            for rule in self.fusion_rules:
                window = ops[i : i + len(rule.pattern)]
                fits = len(window) == len(rule.pattern) and all(map(_is, window, rule.pattern))
                if fits and rule.guard(window):
                    ops[i : i + len(window)] = [rule.build(window)]
                    i = max(i - 1, 0)
                    break
            else:
                i += 1
        return ops


def _is(op: Op, kind: type) -> bool:
    """An operator is not its subclass: what is fused already has its own parameters."""
    return type(op) is kind


def compile_pipeline(
    ops: Sequence[Op],
    custom_fusion_rules: Sequence[FusionRule] | None = None,
    custom_validity_checks: Sequence[ValidityCheck] | None = None,
) -> list[Op]:
    """Check operators and fuse them by the project's rules and the given ones."""
    compiler = Compiler()
    for rule in custom_fusion_rules or ():
        compiler.register_fusion_rule(rule)
    for check in custom_validity_checks or ():
        compiler.register_validity_check(check)
    return compiler.compile(ops)
