"""The processors that a pipeline is written in, and their translation to operators."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from fi_cupy.errors import ArgumentError
from fi_cupy.logits_processor.operators import (
    LogitsSampleOp,
    LogitsTopKOp,
    MinPOp,
    ProbsSampleOp,
    ProbsTopKOp,
    SoftmaxOp,
    TemperatureOp,
    TopPOp,
)
from fi_cupy.logits_processor.types import Op, TensorType


class LegalizationError(ArgumentError):
    """A processor cannot stand where it does."""


class LogitsProcessor(ABC):
    """A step as the user writes it; `legalize` gives the operators that do it for an input of one type.

    Parameters
    ----------
    **params
        Values of the operators' parameters that are not given at run time.
    """

    def __init__(self, **params: Any) -> None:
        self.params = params

    @abstractmethod
    def legalize(self, input_type: TensorType) -> list[Op]:
        """The operators for an input of `input_type`; ArgumentError if there are none."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v}' for k, v in self.params.items())})"


def _only(name: str, wanted: TensorType, got: TensorType) -> None:
    if got is not wanted:
        raise ArgumentError(f"{name} can only be applied to {wanted}, got {got}")


class Temperature(LogitsProcessor):
    """Logits divided by a temperature. Run time: temperature, a positive float or an array, [batch]."""

    def legalize(self, input_type: TensorType) -> list[Op]:
        _only("Temperature", TensorType.LOGITS, input_type)
        return [TemperatureOp(**self.params)]


class Softmax(LogitsProcessor):
    """Logits to probabilities, once in a pipeline.

    Parameters
    ----------
    enable_pdl : bool, optional
        Launch by programmatic dependent launch where that works.
    """

    def __init__(self, enable_pdl: bool | None = None, **params: Any) -> None:
        super().__init__(enable_pdl=enable_pdl, **params)

    def legalize(self, input_type: TensorType) -> list[Op]:
        _only("Softmax", TensorType.LOGITS, input_type)
        return [SoftmaxOp(**self.params)]


class TopK(LogitsProcessor):
    """The k largest, ties kept: other logits become -inf; other probabilities 0, the rest renormalised.

    Run time: top_k, a positive int or an array, [batch].

    Parameters
    ----------
    joint_topk_topp : bool
        On probabilities, a `TopP` and a `Sample` that follow look at the whole distribution, not at what top-k left.
    """

    def __init__(self, joint_topk_topp: bool = False, **params: Any) -> None:
        super().__init__(joint_topk_topp=joint_topk_topp, **params)

    def legalize(self, input_type: TensorType) -> list[Op]:
        if input_type is TensorType.LOGITS:
            return [LogitsTopKOp(**self.params)]
        if input_type is TensorType.PROBS:
            return [ProbsTopKOp(**self.params)]
        raise ArgumentError(f"TopK cannot be applied to {input_type}")


class TopP(LogitsProcessor):
    """The likeliest tokens that have the mass top_p together. Run time: top_p, in (0, 1], or an array, [batch]."""

    def legalize(self, input_type: TensorType) -> list[Op]:
        _only("TopP", TensorType.PROBS, input_type)
        return [TopPOp(**self.params)]


class MinP(LogitsProcessor):
    """Tokens of at least ``min_p * max``. Run time: min_p, in (0, 1], or an array, [batch]."""

    def legalize(self, input_type: TensorType) -> list[Op]:
        _only("MinP", TensorType.PROBS, input_type)
        return [MinPOp(**self.params)]


class Sample(LogitsProcessor):
    """One token a row; the last processor. Run time: indices, generator, seed, offset, all optional.

    Parameters
    ----------
    deterministic : bool
        Results are deterministic either way.
    """

    def __init__(self, deterministic: bool = True, **params: Any) -> None:
        super().__init__(deterministic=deterministic, **params)

    def legalize(self, input_type: TensorType) -> list[Op]:
        if input_type is TensorType.LOGITS:
            return [LogitsSampleOp(**self.params)]
        if input_type is TensorType.PROBS:
            return [ProbsSampleOp(**self.params)]
        raise ArgumentError(f"Sampling cannot be applied to {input_type}")


def legalize_processors(
    processors: Sequence[LogitsProcessor], initial_type: TensorType = TensorType.LOGITS
) -> list[Op]:
    """The operators of processors that stand one behind the other."""
    if not processors:
        raise LegalizationError("Cannot legalize empty processor list")
    ops: list[Op] = []
    current = initial_type
    for i, processor in enumerate(processors):
        name = type(processor).__name__
        try:
            made = processor.legalize(current)
        except Exception as error:
            raise LegalizationError(f"Failed to legalize processor {i} ({name}): {error}") from error
        if not made:
            raise LegalizationError(f"Failed to legalize processor {i} ({name}): Processor {name} produced no ops")
        ops += made
        current = made[-1].OUT
    return ops


def infer_initial_type(processors: Sequence[LogitsProcessor]) -> TensorType:
    """The type of a pipeline's input, if its first processor takes only one."""
    possible = []
    for kind in (TensorType.LOGITS, TensorType.PROBS):
        try:
            processors[0].legalize(kind)
        except ValueError:
            continue
        possible.append(kind)
    name = type(processors[0]).__name__
    if len(possible) > 1:
        raise LegalizationError(
            f"Cannot infer input type: {name} can accept both LOGITS and PROBS. "
            "Please specify input_type explicitly when creating the LogitsPipe."
        )
    if not possible:
        raise LegalizationError(f"Processor {name} cannot accept standard pipeline inputs (LOGITS or PROBS)")
    return possible[0]
