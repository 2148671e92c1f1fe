"""`LogitsPipe`: from logits to tokens in one call, and where the rules allow it, in one kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fi_cupy.errors import ArgumentError
from fi_cupy.logits_processor.compiler import CompileError, FusionRule, ValidityCheck, compile_pipeline
from fi_cupy.logits_processor.processors import (
    LegalizationError,
    LogitsProcessor,
    infer_initial_type,
    legalize_processors,
)
from fi_cupy.logits_processor.types import Op, TaggedTensor, TensorType

#: What the project's operators take at run time; others may take more.
PARAMETERS = ("temperature", "top_k", "top_p", "min_p", "indices", "generator", "seed", "offset")


class LogitsPipe:
    """Processors applied one behind the other.

    A pipeline that has each processor once, top-k before top-p before min-p, and ends with `Sample` is one kernel:
    the logits are read once, and neither scaled logits nor probabilities exist in memory. Other pipelines are as many
    kernels as the rules leave.

    Parameters
    ----------
    processors : sequence of LogitsProcessor
    compile : bool
        Fuse. Without, every operator is a kernel of its own.
    input_type : TensorType, optional
        LOGITS or PROBS; needed if the first processor takes both (`TopK`, `Sample`).
    custom_fusion_rules : sequence of FusionRule, optional
        Tried beside the project's, by priority.
    custom_validity_checks : sequence of callables, optional
        Called with the operators; they raise if they object.

    Raises
    ------
    ValueError
        The pipeline is empty or illegal, or a check objects.

    Source
    ------
    flashinfer.logits_processor.LogitsPipe.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.logits_processor import LogitsPipe, Sample, Softmax, Temperature, TopK
    >>> pipe = LogitsPipe([Temperature(), Softmax(), TopK(), Sample()])
    >>> pipe(np.array([[0.0, 9.0, 1.0]], np.float32), temperature=0.5, top_k=1, seed=3)
    array([1], dtype=int32)
    """

    def __init__(
        self,
        processors: Sequence[LogitsProcessor],
        compile: bool = True,
        input_type: TensorType | None = None,
        custom_fusion_rules: Sequence[FusionRule] | None = None,
        custom_validity_checks: Sequence[ValidityCheck] | None = None,
    ) -> None:
        if not processors:
            raise ArgumentError("Pipeline cannot be empty")
        self.processors = list(processors)
        self.compiled_ops: list[Op] | None = None
        try:
            self._initial_type = input_type or infer_initial_type(self.processors)
            self.ops = legalize_processors(self.processors, self._initial_type)
        except LegalizationError as error:
            raise ArgumentError(f"Pipeline creation failed: {error}") from error
        if compile:
            self.compile(custom_fusion_rules, custom_validity_checks)

    @property
    def initial_type(self) -> TensorType:
        """LOGITS or PROBS: what the pipeline takes."""
        return self._initial_type

    def compile(
        self,
        custom_fusion_rules: Sequence[FusionRule] | None = None,
        custom_validity_checks: Sequence[ValidityCheck] | None = None,
    ) -> None:
        """Check and fuse the operators."""
        try:
            self.compiled_ops = compile_pipeline(self.ops, custom_fusion_rules, custom_validity_checks)
        except CompileError as error:
            raise ArgumentError(f"Pipeline creation failed: {error}") from error

    def __call__(self, x: Any, **kwargs: Any) -> Any:
        """Run on an array, [batch, vocab] (or a `TaggedTensor`).

        Parameters
        ----------
        **kwargs
            temperature, top_k, top_p, min_p, indices, generator, seed, offset: those that the processors take. Values,
            or arrays of one a row.

        Raises
        ------
        ArgumentError
            A parameter is unknown or missing, or an operator refuses its input; the message names the operator.
        """
        unknown = [name for name in kwargs if name not in PARAMETERS]
        if unknown and all(type(op).__module__.startswith("fi_cupy.") for op in self.ops):
            raise ArgumentError(f"LogitsPipe: got {unknown[0]!r}, expected parameters among {', '.join(PARAMETERS)}")
        tensor = x if isinstance(x, TaggedTensor) else TaggedTensor(x, self._initial_type)
        for i, op in enumerate(self.ops if self.compiled_ops is None else self.compiled_ops):
            try:
                tensor = op(tensor, **kwargs)
            except (ValueError, TypeError) as error:  # others (no compiler, no memory) are nobody's argument
                raise ArgumentError(f"Error executing operator {i} ({type(op).__name__}): {error}") from error
        return tensor.data

    def __repr__(self) -> str:
        def names(items: Sequence[object]) -> str:
            return " -> ".join(type(item).__name__ for item in items)

        return (
            f"LogitsPipe([{names(self.processors)}], ops=[{names(self.ops)}], "
            f"compiled_ops=[{names(self.compiled_ops or [])}])"
        )
