"""Draws in plain NumPy: the same tokens as the GPU kernels for the same seed, bit for bit.

The arithmetic is that of ``kernels/sampling/mass.cuh``: a token's mass is its probability in 43-bit fixed point, made
by fp32 operations that are each rounded once; everything after that is integer. A row is divided into segments of 1024
tokens; logits of which nothing is filtered have their segment's largest value as reference, and a segment has a 63-bit
weight, otherwise the row's largest value is the only reference. Probabilities have one unit for the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fi_cupy.reference._common import Array, round_to, upcast

SEGMENT = 1024
MASS_BITS = 43
_F32 = np.float32
_U64_MAX = (1 << 64) - 1
_LOG2E = _F32(1.44269504088896340736)
#: 2^f on [-1/2, 1/2], highest degree first; the constant term is 1.
_EXP2 = tuple(_F32(c) for c in (0.0013264716, 0.009671514, 0.05550734, 0.24022242, 0.693147, 1.0))


def philox(seed: int, offset: int, row: int, draw: int) -> tuple[int, int, int, int]:
    """Philox4x32-10: four 32-bit words for key `seed` and counter (`offset`, `row`, `draw`)."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = offset & low, offset >> 32 & low, row & low, draw & low
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & low, p0 >> 32 ^ c3 ^ k1, p0 & low
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return c0, c1, c2, c3


def bits64(seed: int, offset: int, row: int, draw: int) -> int:
    """64 random bits: a uniform number is these times 2^-64."""
    words = philox(seed, offset, row, draw)
    return words[0] << 32 | words[1]


def _fma(a: Any, b: Any, c: Any) -> Array:
    """``a * b + c`` of float32 values, rounded once: exact product in float64, sum rounded to odd there."""
    product = np.asarray(a, np.float64) * np.float64(b)
    c = np.asarray(c, np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    # Towards the error where the sum is inexact and its last bit even: the second rounding then cannot go wrong.
    step = np.where((error > 0) == (total > 0), 1, -1)
    odd = np.where((error != 0) & (bits & 1 == 0), bits + step, bits)
    return np.asarray(odd.view(np.float64).astype(_F32))


def exp_fixed(d: Array, bits: int) -> Array:
    """``trunc(e^d * 2^bits)`` of float32 values d <= 0 (NaN counts as 0), uint64."""
    d = np.atleast_1d(np.asarray(d, _F32))
    shape = np.shape(d)
    d = np.where(np.isnan(d), _F32(0), np.clip(d, _F32(-87), _F32(0))).ravel()
    z = _fma(d, _LOG2E, _F32(12582912))
    n = z - _F32(12582912)
    f = _fma(d, _LOG2E, -n)
    p = np.full_like(f, _EXP2[0])
    for c in _EXP2[1:]:
        p = _fma(p, f, np.full_like(f, c))
    return np.ldexp(p, n.astype(np.int32) + bits).astype(np.uint64).reshape(shape)


class Logits:
    """Masses of logits: e^(x - reference)."""

    logits = True

    @staticmethod
    def valid(top: np.float32) -> bool:
        return bool(top > -np.inf)

    @staticmethod
    def mass(x: Array, reference: Any) -> Array:
        return exp_fixed(_minus(x, reference), MASS_BITS)

    @staticmethod
    def weight(part: Array, whole: Any) -> Array:
        return exp_fixed(_minus(part, whole), 63)

    @staticmethod
    def absolute(p: float, total: int, top: Any) -> int:
        return share(p, total)

    @staticmethod
    def min_p_value(min_p: Any, top: Any) -> Any:
        return _F32(top + _F32(np.log(np.float64(min_p))))


class Probs:
    """Masses of probabilities, in units of 2^-43 if the reference lies in [2^lowest, 2), else of 2^-43 of the
    reference's power of two; negative ones count as 0.
    """

    logits = False
    #: A normalised row of 2^19 tokens has a larger one.
    lowest = -20

    @staticmethod
    def valid(top: np.float32) -> bool:
        return bool(0 < top < np.inf)

    @classmethod
    def exponent(cls, reference: Any) -> int:
        e = math.frexp(float(reference) if reference > 0 else 2.0**-149)[1] - 1
        return 0 if cls.lowest <= e <= 0 else e

    @classmethod
    def mass(cls, x: Array, reference: Any) -> Array:
        # Exact in float64: a 24-bit number times a power of two.
        scaled = np.ldexp(np.maximum(x, _F32(0)).astype(np.float64), MASS_BITS - cls.exponent(reference))
        return np.asarray(scaled).astype(np.uint64)

    @classmethod
    def absolute(cls, p: float, total: int, top: Any) -> int:
        return min(math.ceil(math.ldexp(p, MASS_BITS - cls.exponent(top))), _U64_MAX)

    @staticmethod
    def min_p_value(min_p: Any, top: Any) -> Any:
        return _F32(min_p * top)

    @classmethod
    def probability(cls, mass: int, top: Any) -> np.float32:
        return _F32(math.ldexp(float(mass), cls.exponent(top) - MASS_BITS))


class Residuals(Probs):
    """Masses of differences of probabilities, whose sum may be small: then the unit is fine."""

    lowest = -8


Domain = type[Logits] | type[Probs]


def _minus(x: Array, reference: Any) -> Array:
    """x - reference, 0 where they are equal (infinities too)."""
    x = np.asarray(x, _F32)
    with np.errstate(invalid="ignore"):
        return np.where(x == reference, _F32(0), x - np.asarray(reference, _F32))


def share(p: float, total: int) -> int:
    """``ceil(p * total)`` for a float32 p in (0, 1), to 64 fractional bits of p."""
    product = int(math.ldexp(p, 64)) * total
    return (product >> 64) + (product & _U64_MAX != 0)


def _multiply_high(a: Array, b: Array) -> Array:
    """Upper 64 bits of the product of two uint64 arrays."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a0, a1, b0, b1 = a & low, a >> half, b & low, b >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    other = a0 * b1 + (middle & low)
    return a1 * b1 + (middle >> half) + (other >> half)


def scaled(total: Array, weight: Any) -> Array:
    """Sums in a segment's unit brought to the row's unit."""
    return _multiply_high(np.asarray(total, np.uint64) << np.uint64(1), np.asarray(weight, np.uint64))


def _segments(row: Array) -> Array:
    """A row as [segments, 1024], filled up with -inf."""
    count = -(-row.size // SEGMENT)
    padded = np.full(count * SEGMENT, -np.inf, _F32)
    padded[: row.size] = row
    return padded.reshape(count, SEGMENT)


def segment_sums(row: Array, domain: Domain) -> tuple[Array, Array, Array]:
    """(masses in each segment's unit, weights, sums in the row's unit) of a valid row."""
    parts = _segments(row)
    tops = parts.max(axis=1)
    if domain.logits:
        masses, weights = domain.mass(parts, tops[:, None]), Logits.weight(tops, tops.max())
    else:
        masses, weights = domain.mass(parts, tops.max()), np.full(len(parts), 1 << 63, np.uint64)
    return masses, weights, scaled(masses.sum(axis=1, dtype=np.uint64), weights)


def _select(keys: Array, masses: Array, target: int) -> Any:
    """Smallest key such that the masses of strictly larger keys sum to less than `target`; masses sum to < 2^63."""
    order = np.argsort(-keys, kind="stable")
    ordered, sums = keys[order], np.cumsum(masses[order], dtype=np.uint64)
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    above = np.r_[np.uint64(0), sums[first[1:] - 1]]
    return ordered[first[np.flatnonzero(above < target)[-1]]]


@dataclass(frozen=True)
class Filter:
    """What is kept of each row: nothing set keeps all. Parameters are arrays of one value an output row.

    Attributes
    ----------
    top_k : int array, optional
        Below 1 counts as 1; the vocabulary's size or more keeps all.
    top_p : float array, optional
        1 or more keeps all.
    min_p : float array, optional
        Keeps, of what the others left, what has this probability relative to the likeliest token; 0 or less keeps all.
    joint : bool
        top-p looks at the row as it stands, else at what top-k left, renormalised.
    """

    top_k: Array | None = None
    top_p: Array | None = None
    min_p: Array | None = None
    joint: bool = False

    def rejects(self, i: int, vocab: int) -> bool:
        """Whether output row `i` is drawn by rejection: top-p keeps not all, and the others do."""
        if self.top_p is None or (self.top_k is not None and self.top_k[i] < vocab):
            return False
        return not (self.min_p is not None and self.min_p[i] > 0)

    def threshold(self, row: Array, domain: Domain, i: int) -> Any:
        """The smallest kept value of a valid float32 row, for output row `i`; None if its parameters keep all."""
        threshold = self._top_threshold(row, domain, i)
        if self.min_p is None or not self.min_p[i] > 0:
            return threshold
        top = row.max()
        least = min(domain.min_p_value(_F32(self.min_p[i]), top), top)
        return least if threshold is None else max(threshold, least)

    def target(self, p: float, total: int, top: Any, domain: Domain) -> int:
        """The mass that top-p has to reach; the likeliest tokens are always kept."""
        if not p > 0:
            return 1
        return max(1, domain.absolute(p, total, top) if self.joint else share(p, total))

    def _top_threshold(self, row: Array, domain: Domain, i: int) -> Any:
        top = row.max()
        k = row.size if self.top_k is None else min(max(int(self.top_k[i]), 1), row.size)
        p = 1.0 if self.top_p is None else float(_F32(self.top_p[i]))
        threshold = _F32(-np.inf) if k == row.size else np.partition(row, row.size - k)[row.size - k]
        if not p < 1:
            return None if k == row.size else threshold
        kept = row >= threshold
        masses = domain.mass(row, top)
        total = 0
        if k == row.size or (self.joint and domain.logits):
            total = int(segment_sums(row, domain)[2].sum(dtype=np.uint64))
        elif not self.joint:
            total = int(masses[kept].sum(dtype=np.uint64))
        target = self.target(p, total, top, domain)
        if int(masses[kept].sum(dtype=np.uint64)) < target:
            return threshold
        return _select(row[kept], masses[kept], target)


def _first_above(masses: Array, weight: int, rest: int) -> int:
    """First index whose inclusive sum, in the row's unit, exceeds `rest`."""
    sums = scaled(np.cumsum(masses, dtype=np.uint64), np.uint64(weight))
    return int(np.searchsorted(sums, np.uint64(rest), side="right"))


def draw_token(row: Array, domain: Domain, threshold: Any, random: int) -> int:
    """The token that 64 random bits choose from a valid row; `threshold` None: nothing is filtered."""
    if threshold is None:
        masses, weights, sums = segment_sums(row, domain)
    else:
        masses = np.where(row >= threshold, domain.mass(row, row.max()), np.uint64(0))
        pad = -masses.size % SEGMENT
        masses = np.r_[masses, np.zeros(pad, np.uint64)].reshape(-1, SEGMENT)
        weights, sums = np.full(len(masses), 1 << 63, np.uint64), masses.sum(axis=1, dtype=np.uint64)
    ends = np.cumsum(sums, dtype=np.uint64)
    target = random * int(ends[-1]) >> 64
    segment = int(np.searchsorted(ends, np.uint64(target), side="right"))
    rest = target - int(ends[segment] - sums[segment])
    return segment * SEGMENT + _first_above(masses[segment], int(weights[segment]), rest)


def draw_top_p(row: Array, domain: Domain, keep: Filter, i: int, random: Callable[[int], int]) -> int:
    """Top-p alone: a token drawn from all, and as long as top-p does not keep it, from those likelier than it."""
    token = draw_token(row, domain, None, random(0))
    p = float(_F32(keep.top_p[i]))  # type: ignore[index]
    if not p < 1:
        return token
    top = row.max()
    target = keep.target(p, int(segment_sums(row, domain)[2].sum(dtype=np.uint64)), top, domain)
    masses = domain.mass(row, top)
    for round in range(1, row.size + 1):
        likelier = row > row[token]
        if int(masses[likelier].sum(dtype=np.uint64)) < target:
            break
        token = draw_token(row, domain, row[likelier].min(), random(round))
    return token


def streams(rows: int, seed: Any, offset: Any) -> list[tuple[int, int, int]]:
    """(seed, offset, row in the counter) of every output row. One seed a row leaves the row number out."""
    seeds, offsets = (np.atleast_1d(np.asarray(v)).astype(np.uint64) for v in (seed, offset))
    own = len(seeds) == rows
    seeds, offsets = np.broadcast_to(seeds, (rows,)), np.broadcast_to(offsets, (rows,))
    return [(int(seeds[i]), int(offsets[i]), 0 if own else i) for i in range(rows)]


def sample(
    x: Array,
    domain: Domain,
    keep: Filter,
    seed: Any,
    offset: Any,
    indices: Array | None = None,
    temperature: Array | None = None,
) -> tuple[Array, Array, Array]:
    """One token a row.

    Parameters
    ----------
    x : [batch, vocab]
        Logits or probabilities, by `domain`.
    keep : Filter
    seed, offset : int or uint64 array of 1 or `rows`
    indices : [rows], optional
        Row of `x` for each output row.
    temperature : [rows], optional
        Logits are divided by it (multiplied by its inverse) first; 0 is uniform.

    Returns
    -------
    (tokens int64, valid bool, nan bool)
        Each ``[rows]``. An invalid row (NaN, or nothing to draw from) gives token 0.
    """
    chosen = np.arange(len(x)) if indices is None else np.asarray(indices)
    tokens, valid, nan = (np.zeros(len(chosen), t) for t in (np.int64, bool, bool))
    for i, (s, o, r) in enumerate(streams(len(chosen), seed, offset)):
        row = upcast(x[chosen[i]], _F32)
        if temperature is not None:
            t = np.float64(temperature[i])
            with np.errstate(invalid="ignore"):
                row = np.where(np.isneginf(row), row, row * _F32(1 / t if t else 0))
        nan[i] = np.isnan(row).any()
        valid[i] = not nan[i] and domain.valid(row.max())
        if valid[i]:
            if keep.rejects(i, row.size):
                tokens[i] = draw_top_p(row, domain, keep, i, partial(bits64, s, o, r))
            else:
                tokens[i] = draw_token(row, domain, keep.threshold(row, domain, i), bits64(s, o, r, 0))
    return tokens, valid, nan


def _by_row(x: Array, out: Array, domain: Domain, keep: Filter, f: Callable[[Array, Array], Array]) -> Array:
    for i in range(len(x)):
        row = upcast(x[i], _F32)
        if not np.isnan(row).any() and domain.valid(row.max()):
            threshold = keep.threshold(row, domain, i)
            out[i] = round_to(f(row, row >= (-np.inf if threshold is None else threshold)), x.dtype)
    return out


def renorm_probs(probs: Array, keep: Filter) -> Array:
    """Kept probabilities divided by their sum, others 0; an invalid row becomes 0."""

    def renormalise(row: Array, kept: Array) -> Array:
        total = int(Probs.mass(row, row.max())[kept].sum(dtype=np.uint64))
        return np.where(kept, np.maximum(row, _F32(0)) / Probs.probability(total, row.max()), _F32(0))

    return _by_row(probs, np.zeros_like(probs), Probs, keep, renormalise)


def mask_logits(logits: Array, keep: Filter) -> Array:
    """Logits with -inf where nothing is kept; an invalid row becomes -inf."""
    out = np.full_like(logits, -np.inf)
    return _by_row(logits, out, Logits, keep, lambda row, kept: np.where(kept, row, _F32(-np.inf)))


def chain_speculative_sampling(
    draft_probs: Array, draft_token_ids: Array, target_probs: Array, seed: Any, offset: Any
) -> tuple[Array, Array, Array]:
    """Accept a prefix of the draft tokens and draw one more.

    Returns
    -------
    (ids int64 [batch, n + 1], accepted int32 [batch], emitted int32 [batch])
        Source: flashinfer.sampling.chain_speculative_sampling.
    """
    batch, n = draft_token_ids.shape
    vocab = target_probs.shape[-1]
    ids = np.full((batch, n + 1), -1, np.int64)
    accepted, emitted = np.zeros(batch, np.int32), np.zeros(batch, np.int32)
    for b, (s, o, r) in enumerate(streams(batch, seed, offset)):
        passed = np.zeros(n, bool)
        for i, token in enumerate(draft_token_ids[b]):
            if 0 <= token < vocab:
                u = _F32(bits64(s, o, r, i) >> 40) * _F32(2.0**-24)
                passed[i] = u * _F32(draft_probs[b, i, token]) < _F32(target_probs[b, i, token])
        prefix = n if passed.all() else int(np.argmin(passed))
        accepted[b], emitted[b] = passed.sum(), prefix
        ids[b, :prefix] = draft_token_ids[b, :prefix]
        row = upcast(target_probs[b, prefix], _F32)
        if prefix < n:
            rest = row - upcast(draft_probs[b, prefix], _F32)
            rest = np.where(rest < 0, _F32(0), rest)
            row = row if not np.isnan(rest).any() and rest.max() <= 0 else rest
        usable = not np.isnan(row).any() and Residuals.valid(row.max())
        ids[b, prefix] = draw_token(row, Residuals, None, bits64(s, o, r, n)) if usable else 0
    return ids, accepted, emitted
