"""What a sampler may draw: softmax, the kept sets of top-k, top-p and min-p, and renormalisation.

A kept set is decided by probability *values*, so ties at the threshold are all kept. A row that contains NaN keeps
nothing. Parameters are scalars or one value a row.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from fi_cupy.reference._common import Array, compute_dtype, per_row, round_to, upcast


def softmax(logits: Array, temperature: ArrayLike | None = None) -> Array:
    """``softmax(logits / temperature)`` of every row, float32 (float64 for float64 logits).

    Parameters
    ----------
    logits : [batch, vocab]
    temperature : float or [batch], optional
        0 means an inverse temperature of 0: the *uniform* distribution over the tokens that are not at -inf.

    Returns
    -------
    Array
        ``[batch, vocab]``. A row of -inf gives zeros; a row with NaN gives NaN.

    Source: flashinfer.sampling.softmax.
    """
    ct = compute_dtype(logits)
    x = upcast(logits, ct)
    if temperature is not None:
        t = per_row(temperature, x.shape[0], np.float64)
        inverse = np.divide(1.0, t, out=np.zeros_like(t), where=t != 0).astype(ct)[:, None]
        x = np.multiply(x, inverse, out=x.copy(), where=~np.isneginf(x))  # -inf * 0 would be NaN
    top = x.max(axis=-1, keepdims=True)
    e = np.exp(x - np.where(np.isneginf(top), 0, top))
    total = e.sum(axis=-1, keepdims=True)
    return e / np.where(total == 0, 1, total)


def _kth_largest(x: Array, k: ArrayLike) -> Array:
    """The k-th largest value of every row, ``[rows, 1]``, -inf where k >= vocab (no filter), NaN where x has NaN."""
    rows, vocab = x.shape
    ks = per_row(k, rows, np.int64)
    out = np.full((rows, 1), -np.inf, dtype=x.dtype)
    for row in np.flatnonzero(ks < vocab):
        index = vocab - max(int(ks[row]), 1)
        out[row] = np.partition(x[row], index)[index]
    out[np.isnan(x).any(axis=-1)] = np.nan
    return out


def top_k_mask(probs: Array, k: ArrayLike) -> Array:
    """Tokens with fewer than `k` strictly likelier tokens, ``count(p > p_t) < k``, bool ``[batch, vocab]``.

    All tokens tied with the k-th are kept, so more than `k` may survive; ``k >= vocab`` keeps all. Works on
    probabilities and on logits.
    """
    x = upcast(probs, compute_dtype(probs))
    return x >= _kth_largest(x, k)


def top_p_mask(probs: Array, p: ArrayLike) -> Array:
    """Smallest set with mass >= `p`: tokens with ``sum{q : q > p_t} < p``, bool ``[batch, vocab]``.

    Ties at the threshold are all kept, and the likeliest tokens always are (also with p = 0). Sums are float64.
    """
    x = upcast(probs, compute_dtype(probs))
    p_rows = per_row(p, x.shape[0], np.float64)[:, None]
    ordered = -np.sort(-x, axis=-1)
    # Mass ahead of every token in order. It never shrinks, so the accepted tokens are a prefix, and among equal values
    # the first, whose mass ahead is that of the strictly likelier ones, decides for all.
    before = np.zeros(ordered.shape, dtype=np.float64)
    np.cumsum(ordered[:, :-1], axis=-1, dtype=np.float64, out=before[:, 1:])
    last = np.maximum(np.count_nonzero(before < p_rows, axis=-1) - 1, 0)
    threshold = np.take_along_axis(ordered, last[:, None], axis=-1)
    threshold[np.isnan(x).any(axis=-1)] = np.nan
    return x >= threshold


def min_p_mask(probs: Array, min_p: ArrayLike) -> Array:
    """Tokens with ``p_t >= min_p * max(p)``, inclusive, bool ``[batch, vocab]``."""
    x = upcast(probs, compute_dtype(probs))
    return x >= per_row(min_p, x.shape[0], x.dtype)[:, None] * x.max(axis=-1, keepdims=True)


def top_k_top_p_mask(
    probs: Array, k: ArrayLike, p: ArrayLike, filter_apply_order: Literal["top_k_first", "joint"] = "top_k_first"
) -> Array:
    """Kept set of top-k and top-p together.

    "top_k_first": top-k, renormalise, then top-p on the renormalised distribution. "joint": both thresholds on the
    original one.
    """
    keep_k = top_k_mask(probs, k)
    if filter_apply_order == "joint":
        return keep_k & top_p_mask(probs, p)
    return keep_k & top_p_mask(renormalise(probs, keep_k), p)


def renormalise(probs: Array, keep: Array) -> Array:
    """The kept probabilities divided by their sum, 0 elsewhere, unrounded; a row that keeps nothing is all 0."""
    x = np.where(keep, upcast(probs, compute_dtype(probs)), 0)
    total = x.sum(axis=-1, keepdims=True, dtype=np.float64).astype(x.dtype)
    return x / np.where(total == 0, 1, total)


def top_p_renorm_probs(probs: Array, top_p: ArrayLike) -> Array:
    """Renormalise over `top_p_mask`; dtype of `probs`.

    Source: flashinfer.sampling.top_p_renorm_probs.
    """
    return round_to(renormalise(probs, top_p_mask(probs, top_p)), probs.dtype)


def top_k_renorm_probs(probs: Array, top_k: ArrayLike) -> Array:
    """Renormalise over `top_k_mask`; dtype of `probs` (float32, fp16, bf16).

    Source: flashinfer.sampling.top_k_renorm_probs.
    """
    return round_to(renormalise(probs, top_k_mask(probs, top_k)), probs.dtype)


def min_p_renorm_probs(probs: Array, min_p: ArrayLike) -> Array:
    """Renormalise over `min_p_mask`; dtype of `probs`."""
    return round_to(renormalise(probs, min_p_mask(probs, min_p)), probs.dtype)


def top_k_mask_logits(logits: Array, top_k: ArrayLike) -> Array:
    """Logits with everything outside `top_k_mask` at -inf; dtype of `logits`.

    Source: flashinfer.sampling.top_k_mask_logits.
    """
    return np.where(top_k_mask(logits, top_k), logits, np.asarray(-np.inf, dtype=logits.dtype))
