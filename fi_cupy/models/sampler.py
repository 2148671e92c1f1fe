"""From logits to token ids: greedy or sampled, chosen request by request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fi_cupy import lookup
from fi_cupy.logits_processor import LogitsPipe, Sample, Softmax, Temperature, TensorType, TopK, TopP
from fi_cupy.models import ModelError

Array = Any

#: Step of the generator's offset from one token of a request to the next: `fi_cupy.sampling` draws one number a row
#: from (seed, offset), four offsets apart, so that a request draws the same numbers whatever else is in the batch.
OFFSET_STRIDE = 4

#: Columns of the per-request parameters that a step reads.
FIELDS: dict[str, type] = {
    "temperature": np.float32,
    "top_p": np.float32,
    "top_k": np.int32,
    "seed": np.uint64,
    "offset": np.uint64,
    "greedy": np.int32,
}


class Mode(NamedTuple):
    """What the rows of a batch need together: a captured step holds the kernels of one mode."""

    random: bool = False
    #: Besides random rows there are greedy ones.
    mixed: bool = False
    top_k: bool = False
    top_p: bool = False


@dataclass(frozen=True)
class SamplingParams:
    """How one request picks its tokens and when it stops.

    Parameters
    ----------
    max_tokens : int
        Most tokens to generate; fewer where the context ends first.
    temperature : float
        0 takes the likeliest token; else logits are divided by it.
    top_p : float
        Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    top_k : int
        Keep this many likeliest tokens; 0 keeps all. Applied before `top_p`.
    seed : int
        Of this request's random numbers.
    ignore_eos : bool
        Go on after the end-of-text token.

    Raises
    ------
    ModelError
        A value out of range.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ModelError(f"max_tokens is {self.max_tokens}, expected at least 1")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ModelError(f"temperature is {self.temperature}, expected a number >= 0")
        if not 0 < self.top_p <= 1:
            raise ModelError(f"top_p is {self.top_p}, expected 0 < top_p <= 1")
        if self.top_k < 0:
            raise ModelError(f"top_k is {self.top_k}, expected >= 0 (0 keeps every token)")
        if not 0 <= self.seed < 2**63:
            raise ModelError(f"seed is {self.seed}, expected 0 <= seed < 2**63")

    @property
    def greedy(self) -> bool:
        """Whether no random number is used."""
        return self.temperature == 0

    def write(self, columns: dict[str, NDArray[Any]], row: int, step: int, vocab_size: int) -> None:
        """Put the parameters for token number `step` into row `row` of the columns."""
        columns["greedy"][row] = self.greedy
        columns["temperature"][row] = 1.0 if self.greedy else self.temperature
        columns["top_p"][row] = 1.0 if self.greedy else self.top_p
        columns["top_k"][row] = vocab_size if self.greedy or not self.top_k else self.top_k
        columns["seed"][row] = self.seed
        columns["offset"][row] = step * OFFSET_STRIDE


def mode_of(columns: dict[str, NDArray[Any]], rows: int, vocab_size: int) -> Mode:
    """The mode of the first `rows` rows of the columns on the host."""
    greedy = columns["greedy"][:rows]
    if greedy.all():
        return Mode()
    top_k, top_p = columns["top_k"][:rows] < vocab_size, columns["top_p"][:rows] < 1
    return Mode(True, bool(greedy.any()), bool(top_k.any()), bool(top_p.any()))


def mode_together(params: Sequence[SamplingParams], vocab_size: int) -> Mode:
    """The mode of a batch of requests."""
    columns: dict[str, NDArray[Any]] = {name: np.zeros(len(params), dtype) for name, dtype in FIELDS.items()}
    for row, each in enumerate(params):
        each.write(columns, row, 0, vocab_size)
    return mode_of(columns, len(params), vocab_size)


@lru_cache(maxsize=4)
def _pipe(top_k: bool, top_p: bool) -> LogitsPipe:
    """Temperature, the filters that some row wants, and the draw: one kernel that reads the logits once."""
    steps = [Temperature(), *([TopK()] if top_k else []), Softmax(), *([TopP()] if top_p else []), Sample()]
    return LogitsPipe(steps, input_type=TensorType.LOGITS)


def sample(logits: Array, columns: dict[str, Array], out: Array, mode: Mode) -> None:
    """Write one token id a row to `out`; nothing waits for the device, which holds all that a row depends on.

    Parameters
    ----------
    logits : [rows, vocab], float32
    columns : dict
        One array ``[rows]`` for each of `FIELDS`, on the device.
    out : [rows], int32
    mode : Mode
        What the rows need; what none of them needs is left out.
    """
    if not mode.random:
        lookup.argmax(logits, out=out)
        return
    filters = {name: columns[name] for name, used in (("top_k", mode.top_k), ("top_p", mode.top_p)) if used}
    out[...] = _pipe(mode.top_k, mode.top_p)(
        logits, temperature=columns["temperature"], seed=columns["seed"], offset=columns["offset"], **filters
    )
    if mode.mixed:
        lookup.argmax(logits, out=out, select=columns["greedy"])
