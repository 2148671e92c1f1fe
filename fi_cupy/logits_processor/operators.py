"""The steps of a pipeline: single ones, and the fused ones that each are one kernel."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_cupy import sampling
from fi_cupy.errors import ArgumentError
from fi_cupy.logits_processor.types import ParameterizedOp, TaggedTensor, TensorType
from fi_cupy.sampling_launch import draw_tokens, filtered_rows, is_scalar

LOGITS, PROBS, INDICES = TensorType.LOGITS, TensorType.PROBS, TensorType.INDICES


def _temperature(value: Any) -> Any:
    if is_scalar(value) and not (isinstance(value, (float, np.floating)) and value > 0):
        raise ArgumentError("Temperature must be positive float or a tensor array")
    return value


def _top_k(value: Any) -> Any:
    if is_scalar(value) and not (not isinstance(value, float) and value > 0):
        raise ArgumentError("top_k must be a positive integer or a tensor array")
    return value


def _probability(name: str, value: Any) -> Any:
    if is_scalar(value) and not 0 < value <= 1:
        raise ArgumentError(f"{name} must be float in (0, 1] or a tensor array")
    return value


def _checked(name: str, value: Any) -> Any:
    if name == "temperature":
        return _temperature(value)
    return _top_k(value) if name == "top_k" else _probability(name, value)


class TemperatureOp(ParameterizedOp):
    """``logits / temperature``, dtype of the logits. Parameter: temperature, a positive float or an array, [batch]."""

    IN, OUT = LOGITS, LOGITS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        output = self._validate_input_type(tensor)
        t = _temperature(self._get_param("temperature", kwargs))
        if not is_scalar(t):
            t = t.reshape(-1, 1) if len(t.shape) == 1 else t
        scaled = tensor.data / t
        dtype = tensor.data.dtype
        if scaled.dtype != dtype:  # a wide temperature does not widen the logits
            scaled = scaled.to(dtype) if hasattr(scaled, "to") else scaled.astype(dtype)
        return TaggedTensor(scaled, output)


class SoftmaxOp(ParameterizedOp):
    """Softmax, to float32."""

    IN, OUT = LOGITS, PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        output = self._validate_input_type(tensor)
        return TaggedTensor(sampling.softmax(tensor.data, None, self.default_params.get("enable_pdl")), output)


class FusedTemperatureSoftmaxOp(ParameterizedOp):
    """Temperature and softmax in one kernel."""

    IN, OUT = LOGITS, PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        output = self._validate_input_type(tensor)
        t = _temperature(self._get_param("temperature", kwargs))
        return TaggedTensor(sampling.softmax(tensor.data, t, self.default_params.get("enable_pdl")), output)


class LogitsTopKOp(ParameterizedOp):
    """Logits below the k-th largest to -inf. Parameter: top_k."""

    IN, OUT = LOGITS, LOGITS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        output = self._validate_input_type(tensor)
        return TaggedTensor(sampling.top_k_mask_logits(tensor.data, _top_k(self._get_param("top_k", kwargs))), output)


class ProbsTopKOp(ParameterizedOp):
    """Probabilities below the k-th largest to 0, the rest renormalised. Parameter: top_k."""

    IN, OUT = PROBS, PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        output = self._validate_input_type(tensor)
        return TaggedTensor(sampling.top_k_renorm_probs(tensor.data, _top_k(self._get_param("top_k", kwargs))), output)


class TopPOp(ParameterizedOp):
    """Probabilities outside the top-p set to 0, the rest renormalised. Parameter: top_p."""

    IN, OUT = PROBS, PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        output = self._validate_input_type(tensor)
        p = _probability("top_p", self._get_param("top_p", kwargs))
        return TaggedTensor(sampling.top_p_renorm_probs(tensor.data, p), output)


class MinPOp(ParameterizedOp):
    """Probabilities below ``min_p * max`` to 0, the rest renormalised. Parameter: min_p."""

    IN, OUT = PROBS, PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        output = self._validate_input_type(tensor)
        p = _probability("min_p", self._get_param("min_p", kwargs))
        return TaggedTensor(filtered_rows("MinP", "probs", tensor.data, None, None, p), output)


class _Sampling(ParameterizedOp):
    """One token a row after the filters named in `default_params["filters"]`, all in one kernel."""

    OUT = INDICES

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        output = self._validate_input_type(tensor)
        filters: tuple[str, ...] = self.default_params.get("filters", ())
        given = {name: _checked(name, self._get_param(name, kwargs)) for name in filters}
        drawn = {name: self._get_param(name, kwargs, False) for name in ("indices", "generator", "seed", "offset")}
        tokens = draw_tokens(
            type(self).__name__, "logits" if self.IN is LOGITS else "probs", tensor.data,
            joint=self._joint(filters), **given, **drawn,
        )  # fmt: skip
        return TaggedTensor(tokens, output)

    def _joint(self, filters: tuple[str, ...]) -> bool:
        """Whether top-p's mass is that of the row as it came: without top-k, probabilities need not sum to 1."""
        return "top_k" not in filters or bool(self.default_params.get("joint_topk_topp", False))


class LogitsSampleOp(_Sampling):
    """One token a row from logits. Parameters: indices, generator, seed, offset, all optional."""

    IN = LOGITS


class ProbsSampleOp(_Sampling):
    """One token a row from probabilities. Parameters: as `LogitsSampleOp`."""

    IN = PROBS


class FusedLogitsSampleOp(LogitsSampleOp):
    """Temperature, top-k, softmax, top-p, min-p and the draw, as far as the pipeline has them, in one kernel."""


class FusedProbsSampleOp(ProbsSampleOp):
    """Top-k, top-p, min-p and the draw, as far as the pipeline has them, in one kernel."""


class FusedFilterOp(ParameterizedOp):
    """Several filters of probabilities and the renormalisation in one kernel."""

    IN, OUT = PROBS, PROBS

    def __call__(self, tensor: TaggedTensor, **kwargs: Any) -> TaggedTensor:
        output = self._validate_input_type(tensor)
        filters = self.default_params["filters"]
        given = {name: _checked(name, self._get_param(name, kwargs)) for name in filters}
        k, p, m = given.get("top_k"), given.get("top_p"), given.get("min_p")
        joint = "top_k" not in filters or bool(self.default_params.get("joint_topk_topp", False))
        return TaggedTensor(filtered_rows("LogitsPipe", "probs", tensor.data, k, p, m, joint), output)
