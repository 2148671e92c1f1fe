"""Merging attention over disjoint sets of keys through their base-2 log-sum-exp.

``w_i = 2^(s_i - max s)``, ``v = sum w_i v_i / sum w_i``, ``s = max s + log2 sum w_i``. A state with s = -inf has seen
no key: it weighs nothing, and merging only such states gives 0 and -inf.
"""

from __future__ import annotations

import numpy as np

from fi_cupy.reference._common import Array, compute_dtype, round_to, upcast


def merge_states(v: Array, s: Array) -> tuple[Array, Array]:
    """Merge `num_states` attention states a row.

    Parameters
    ----------
    v : [n, num_states, heads, dim]
    s : float32 [n, num_states, heads]
        Base-2 log-sum-exp.

    Returns
    -------
    (v, s)
        ``[n, heads, dim]`` in the dtype of `v`, and float32 (float64) ``[n, heads]``. No states: 0 and -inf.

    Source: Juravsky et al. 2024; flashinfer.cascade.merge_states.
    """
    ct = compute_dtype(v, s)
    s = upcast(s, ct)
    top = s.max(axis=1, keepdims=True, initial=-np.inf)
    weight = np.exp2(s - np.where(np.isneginf(top), 0, top))
    total = weight.sum(axis=1)
    # The value of a state that saw nothing may be anything, NaN included.
    values = np.where((weight > 0)[..., None], upcast(v, ct), 0)
    merged = np.einsum("nsh,nshd->nhd", weight, values) / np.where(total > 0, total, 1)[..., None]
    with np.errstate(divide="ignore"):
        return round_to(merged.astype(ct, copy=False), v.dtype), top[:, 0] + np.log2(total)


def merge_state(v_a: Array, s_a: Array, v_b: Array, s_b: Array) -> tuple[Array, Array]:
    """Merge two attention states, ``v [n, heads, dim]`` and ``s [n, heads]`` each; see `merge_states`.

    Source: flashinfer.cascade.merge_state.
    """
    merged, s = merge_states(np.stack([v_a, v_b.astype(v_a.dtype, copy=False)], axis=1), np.stack([s_a, s_b], axis=1))
    return merged, s


def merge_state_in_place(
    v: Array, s: Array, v_other: Array, s_other: Array, mask: Array | None = None
) -> tuple[Array, Array]:
    """`merge_state` for the rows where `mask` (bool or uint8 `[n]`) is set; other rows keep (v, s). Returns new arrays.

    Source: flashinfer.cascade.merge_state_in_place.
    """
    merged_v, merged_s = merge_state(v, s, v_other, s_other)
    merged_s = merged_s.astype(s.dtype, copy=False)
    if mask is None:
        return merged_v, merged_s
    rows = np.asarray(mask).astype(bool)
    return np.where(rows[:, None, None], merged_v, v), np.where(rows[:, None], merged_s, s)
