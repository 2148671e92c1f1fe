"""What flows through a pipeline: arrays with a meaning, and the operators between them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, ClassVar

from fi_cupy.errors import ArgumentError


class TensorType(Enum):
    """What the numbers of an array mean."""

    LOGITS = auto()
    PROBS = auto()
    INDICES = auto()

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class TaggedTensor:
    """An array and its meaning."""

    data: Any
    type: TensorType

    @staticmethod
    def logits(t: Any) -> TaggedTensor:
        return TaggedTensor(t, TensorType.LOGITS)

    @staticmethod
    def probs(t: Any) -> TaggedTensor:
        return TaggedTensor(t, TensorType.PROBS)

    @staticmethod
    def indices(t: Any) -> TaggedTensor:
        return TaggedTensor(t, TensorType.INDICES)

    @property
    def shape(self) -> Any:
        return self.data.shape

    @property
    def dtype(self) -> Any:
        return self.data.dtype

    @property
    def device(self) -> Any:
        return self.data.device

    def size(self, dim: int | None = None) -> Any:
        """The shape, or one extent of it."""
        return self.data.shape if dim is None else self.data.shape[dim]


class Op(ABC):
    """One step of a pipeline, from an array of type `IN` to one of type `OUT`."""

    IN: ClassVar[TensorType]
    OUT: ClassVar[TensorType]

    def __init__(self) -> None:
        if not hasattr(self, "IN") or not hasattr(self, "OUT"):
            raise ArgumentError(f"Operator {type(self).__name__} must define IN and OUT tensor types")

    @abstractmethod
    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        """Apply; `kwargs` are the pipeline's run-time parameters."""

    def _validate_input_type(self, tensor: TaggedTensor) -> TensorType:
        if tensor.type is not self.IN:
            raise ArgumentError(
                f"Operator {type(self).__name__} cannot accept input type {tensor.type}. Expected: {self.IN}"
            )
        return self.OUT

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.IN} -> {self.OUT})"


class ParameterizedOp(Op):
    """An operator with parameters: given when it is made, or at run time, which wins."""

    def __init__(self, **default_params: Any) -> None:
        super().__init__()
        self.default_params = default_params

    def _get_param(self, name: str, kwargs: dict[str, Any], required: bool = True) -> Any:
        if name in kwargs:
            return kwargs[name]
        if name in self.default_params:
            return self.default_params[name]
        if required:
            raise ArgumentError(f"Required parameter '{name}' not provided for {type(self).__name__}")
        return None
