"""Mixture of experts: route every token to its experts' gated feed-forward layers and add the weighted results."""

from __future__ import annotations

import numpy as np
from numpy.typing import DTypeLike

from fi_cupy.reference._common import Array, compute_dtype, round_to, upcast
from fi_cupy.reference.activation import silu
from fi_cupy.reference.quantization import per_token_group_quant_8bit


def _block_scaled(a: Array, w: Array, scale: Array, ct: np.dtype) -> Array:
    """``quantise(a) @ dequant(w).T``: `a` in fp8 by groups of 128, `w` fp8 with multipliers of 128 x 128 blocks."""
    q, a_scale = per_token_group_quant_8bit(a, 128)
    rows, columns = np.arange(w.shape[0]) // 128, np.arange(w.shape[1]) // 128
    weight = upcast(w, ct) * upcast(scale, ct)[rows[:, None], columns]
    return (upcast(q, ct) * np.repeat(a_scale, 128, axis=1)) @ weight.T


def fused_moe(
    x: Array,
    token_selected_experts: Array,
    token_final_scales: Array,
    fc1_expert_weights: Array,
    fc2_expert_weights: Array,
    out_dtype: DTypeLike | None = None,
    block_scales: tuple[Array, Array] | None = None,
    fc1_expert_biases: Array | None = None,
    fc2_expert_biases: Array | None = None,
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
    block_scales : (float32 [experts, 2 * inter / 128, hidden / 128], [experts, hidden / 128, inter / 128]), optional
        The weights are fp8 then, and the rows of both products are quantised, a multiplier for each 128 elements.
    fc1_expert_biases, fc2_expert_biases : [experts, 2 * inter], [experts, hidden], optional

    Returns
    -------
    Array
        ``[tokens, hidden]``.

    Source: flashinfer.fused_moe.cutlass_fused_moe.
    """
    ct = compute_dtype(x, fc1_expert_weights, fc2_expert_weights)
    experts, inter = np.asarray(token_selected_experts), fc1_expert_weights.shape[1] // 2

    def product(a: Array, weights: Array, e: int, layer: int, biases: Array | None) -> Array:
        if block_scales is not None:
            y = _block_scaled(a, weights[e], block_scales[layer][e], ct)
        else:
            y = upcast(a, ct) @ upcast(weights[e], ct).T
        return y if biases is None else y + upcast(biases[e], ct)

    out = np.zeros(x.shape, dtype=ct)
    for e in range(fc1_expert_weights.shape[0]):
        tokens, slots = np.nonzero(experts == e)
        if len(tokens) == 0:
            continue
        hidden = product(x[tokens], fc1_expert_weights, e, 0, fc1_expert_biases)
        y = product(silu(hidden[:, inter:]) * hidden[:, :inter], fc2_expert_weights, e, 1, fc2_expert_biases)
        # add.at: one token may select the same expert in two slots.
        np.add.at(out, tokens, y * upcast(token_final_scales, ct)[tokens, slots][:, None])
    return round_to(out, x.dtype if out_dtype is None else out_dtype)


def topk_deepseek(
    scores: Array, bias: Array, n_group: int, topk_group: int, topk: int, routed_scaling_factor: float
) -> tuple[Array, Array]:
    """The experts with the best biased sigmoid scores, from the best groups of experts, and their weights.

    Parameters
    ----------
    scores : [tokens, experts]
        Logits.
    bias : [experts]
        Added to the sigmoids for the choice only.
    n_group, topk_group, topk : int
        A group's score is the sum of its two best experts; equal values: the lower number first.
    routed_scaling_factor : float

    Returns
    -------
    (weights, indices)
        float32 (float64) ``[tokens, topk]``: the chosen sigmoids over their sum, times the factor; int64 indices in
        falling order of the biased score.

    Source: DeepSeek-V3 report, section 2.1.2; flashinfer.fused_moe.fused_topk_deepseek.
    """
    ct = compute_dtype(scores, bias)
    with np.errstate(over="ignore"):
        weight = 1 / (1 + np.exp(-upcast(scores, ct)))
    tokens, experts = weight.shape
    biased = weight + upcast(bias, ct)
    biased = np.where(np.isnan(biased), np.finfo(ct).min, biased)
    if n_group > 1:
        grouped = biased.reshape(tokens, n_group, -1)
        group_score = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.argsort(-group_score, axis=1, kind="stable")[:, :topk_group]
        mask = np.zeros((tokens, n_group), bool)
        np.put_along_axis(mask, kept, True, axis=1)
        biased = np.where(np.repeat(mask, experts // n_group, axis=1), biased, -np.inf)
    indices = np.argsort(-biased, axis=1, kind="stable")[:, :topk]
    chosen = np.take_along_axis(weight, indices, axis=1)
    return chosen / (chosen.sum(axis=1, keepdims=True) + 1e-20) * ct.type(routed_scaling_factor), indices
