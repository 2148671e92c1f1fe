"""Variants where a kernel's own indices are not the user's: on parts of a sequence, and in sparse blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from fi_cupy.dtypes import int32
from fi_cupy.errors import UnsupportedError
from fi_cupy.jit.lower import STAGES
from fi_cupy.variants import AttentionVariant

#: Indices that say where something lies in the whole sequence.
_POSITIONS = ("batch", "qo_idx", "kv_idx", "qo_len", "kv_len")
#: index -> what it is, given the kernel's own ctx.
Places = Mapping[str, Callable[[Any], Any]]


def check_mergeable(op: str, variant: AttentionVariant | None) -> None:
    """Raise `UnsupportedError` for a variant that has no meaning on parts of the keys, merged by their lse."""
    if variant is None:
        return
    label, lowered = f"{op}: variant {variant.name}", variant.lowered()
    if not variant.use_softmax:
        raise UnsupportedError(f"{label} has no softmax, and parts are merged by their lse; use one level")
    if "post_process_fn" in lowered.stages:
        raise UnsupportedError(
            f"{label} has a post_process_fn, which would act on every part before they are merged; apply it to the "
            "result"
        )
    used = sorted(lowered.indices & set(_POSITIONS))
    if used:
        raise UnsupportedError(
            f"{label} looks at {', '.join(used)}, but a part of the keys does not know positions in the whole "
            "sequence; use heads, values and scalars alone, or one level"
        )


class _PlacedContext:
    """The kernel's ctx with some indices replaced by those of the user's problem."""

    def __init__(self, ctx: Any, places: Places) -> None:
        self._ctx, self._places = ctx, places

    def __getattr__(self, name: str) -> Any:
        place = self._places.get(name)
        return getattr(self._ctx, name) if place is None else place(self._ctx)


def place(
    op: str, variant: AttentionVariant, places: Places, tensors: tuple[str, ...], scalars: tuple[str, ...]
) -> AttentionVariant:
    """A variant whose functions see `places` instead of the kernel's own indices.

    Parameters
    ----------
    op : str
        Starts the message.
    places : mapping
        index -> function of the kernel's ctx, which may read `tensors` (int32 arrays) and `scalars` (int32).
    tensors, scalars : names
        What the caller must add to the arguments of each run.

    Raises
    ------
    UnsupportedError
        CUDA text reads one of these indices.
    """
    used = sorted(variant.lowered().indices & set(places))
    if not used:
        return variant
    functions: dict[str, Any] = {}
    for stage in STAGES:
        function = getattr(variant, stage)
        if isinstance(function, str):
            raise UnsupportedError(
                f"{op}: variant {variant.name} looks at {', '.join(used)}, and its {stage} is CUDA text, which has the "
                "kernel's own indices of blocks; write it in Python"
            )
        functions[stage] = None if function is None else _placed(function, places, STAGES[stage].argument is None)
    return replace(
        variant, **functions, tensors=(*variant.tensors, *((name, int32) for name in tensors)),
        scalars=(*variant.scalars, *((name, int32, None) for name in scalars)),
    )  # fmt: skip


def _placed(function: Callable[..., Any], places: Places, alone: bool) -> Callable[..., Any]:
    if alone:
        return lambda ctx: function(_PlacedContext(ctx, places))
    return lambda x, ctx: function(x, _PlacedContext(ctx, places))
