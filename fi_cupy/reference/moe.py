"""Mixture of experts: route every token to its experts' gated feed-forward layers and add the weighted results."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from fi_cupy.reference._common import Array, compute_dtype, round_to, upcast
from fi_cupy.reference.activation import silu


def fused_moe(
    x: Array,
    token_selected_experts: Array,
    token_final_scales: Array,
    fc1_expert_weights: Array,
    fc2_expert_weights: Array,
    out_dtype: DTypeLike | None = None,
) -> Array:
    """``sum_e scale_e * (silu(x w1_e^T) * (x w3_e^T)) w2_e^T`` over the experts selected for each token.

    Parameters
    ----------
    x : [tokens, hidden]
    token_selected_experts : int [tokens, top_k]
        Negative or too large entries select nothing (another rank's experts).
    token_final_scales : float32 [tokens, top_k]
    fc1_expert_weights : [experts, 2 * inter, hidden]
        The UP projection w3 comes first, the gate w1 second: the reverse of `silu_and_mul`.
    fc2_expert_weights : [experts, hidden, inter]
    out_dtype : default dtype of `x`

    Returns
    -------
    Array
        ``[tokens, hidden]``.

    Source: flashinfer.fused_moe.cutlass_fused_moe.
    """
    ct = compute_dtype(x, fc1_expert_weights, fc2_expert_weights)
    experts, inter = np.asarray(token_selected_experts), fc1_expert_weights.shape[1] // 2
    out = np.zeros(x.shape, dtype=ct)
    for e in range(fc1_expert_weights.shape[0]):
        tokens, slots = np.nonzero(experts == e)
        if len(tokens) == 0:
            continue
        hidden = upcast(x[tokens], ct) @ upcast(fc1_expert_weights[e], ct).T
        y = (silu(hidden[:, inter:]) * hidden[:, :inter]) @ upcast(fc2_expert_weights[e], ct).T
        # add.at: one token may select the same expert in two slots.
        np.add.at(out, tokens, y * upcast(token_final_scales, ct)[tokens, slots][:, None])
    return round_to(out, x.dtype if out_dtype is None else out_dtype)
