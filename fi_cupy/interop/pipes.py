"""`fi_cupy.logits_processor.LogitsPipe` as a row of the tables: pipelines that are one operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fi_cupy import logits_processor
from fi_cupy.dtypes import float32, int32
from fi_cupy.errors import UnsupportedError
from fi_cupy.interop.row import Result
from fi_cupy.interop.wrappers import PlannedWrapper
from fi_cupy.logits_processor import TensorType


class LogitsPipe(logits_processor.LogitsPipe):
    """A pipeline that the rules fuse into one operator; `run` names the parameters that a call may have.

    Raises
    ------
    UnsupportedError
        Several operators remain: the frameworks' compilers take them one by one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        remaining = self.ops if self.compiled_ops is None else self.compiled_ops
        if len(remaining) != 1:
            names = ", ".join(type(op).__name__ for op in remaining)
            raise UnsupportedError(
                f"LogitsPipe: {len(remaining)} operators remain ({names}), expected one here; call the functions of "
                "fi_cupy.sampling one after the other"
            )
        self._last = remaining[0]

    @property
    def draws(self) -> bool:
        """Whether the result is tokens."""
        return self._last.OUT is TensorType.INDICES

    def run(
        self,
        x: Any,
        temperature: Any = None,
        top_k: Any = None,
        top_p: Any = None,
        min_p: Any = None,
        indices: Any = None,
        generator: Any = None,
        seed: Any = None,
        offset: Any = None,
    ) -> Any:
        """The call, with the parameters of the pipeline's processors."""
        given = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "indices": indices,
            "generator": generator, "seed": seed, "offset": offset,
        }  # fmt: skip
        return super().__call__(x, **{name: value for name, value in given.items() if value is not None})


def _result(pipe: Any, a: Mapping[str, Any]) -> tuple[Result]:
    x, indices = a["x"], a["indices"]
    if pipe.draws:
        return (Result(x.shape[:1], int32) if indices is None else Result(indices.shape, indices.dtype),)
    becomes_probs = pipe._last.OUT is TensorType.PROBS and pipe._last.IN is TensorType.LOGITS
    return (Result(x.shape, float32 if becomes_probs else x.dtype),)


PIPE = PlannedWrapper(
    "interop.pipes", "LogitsPipe", ("x", "indices"), _result,
    ("temperature", "top_k", "top_p", "min_p", "seed", "offset"), "__init__", (), host=("generator",),
)  # fmt: skip
