"""From logits to token ids: greedy or sampled, chosen request by request."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fi_cupy import lookup, sampling
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
        columns["top_p"][row] = self.top_p
        columns["top_k"][row] = self.top_k or vocab_size
        columns["seed"][row] = self.seed
        columns["offset"][row] = step * OFFSET_STRIDE


def sample(logits: Array, columns: dict[str, Array], out: Array, *, greedy: bool) -> None:
    """Write one token id a row to `out`.

    Parameters
    ----------
    logits : [rows, vocab], float32
    columns : dict
        One array ``[rows]`` for each of `FIELDS`, on the device.
    out : [rows], int32
    greedy : bool
        Whether every row is greedy; the random part is left out then.
    """
    if greedy:
        lookup.argmax(logits, out=out)
        return
    probs = sampling.softmax(logits, temperature=columns["temperature"])
    drawn = sampling.top_k_top_p_sampling_from_probs(
        probs, columns["top_k"], columns["top_p"], seed=columns["seed"], offset=columns["offset"]
    )
    out[...] = drawn
    lookup.argmax(logits, out=out, select=columns["greedy"])
