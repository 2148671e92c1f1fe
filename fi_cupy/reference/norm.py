"""Normalisation over the last dimension: RMSNorm, residual add + RMSNorm, LayerNorm, and their fp8 outputs."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fi_cupy.reference._common import E4M3, Array, compute_dtype, round_to, upcast


def _rms_scaled(x: Array, weight: Array, eps: float, weight_bias: float) -> Array:
    """``x / sqrt(mean(x^2) + eps) * (weight + weight_bias)`` in the type of `x`, unrounded."""
    mean_square = np.einsum("...i,...i->...", x, x)[..., None] / x.shape[-1]
    return x * (1.0 / np.sqrt(mean_square + float(eps))) * (upcast(weight, x.dtype) + float(weight_bias))


def _layer_scaled(x: Array, gamma: Array, beta: Array, eps: float) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.einsum("...i,...i->...", centred, centred)[..., None] / x.shape[-1]
    return centred * (1.0 / np.sqrt(variance + float(eps))) * upcast(gamma, x.dtype) + upcast(beta, x.dtype)


def _divide_scale(normed: Array, scale: ArrayLike, out_dtype: DTypeLike) -> Array:
    # A one-element array is the device-tensor form of the scale.
    return round_to(normed / float(np.asarray(scale).reshape(-1)[0]), out_dtype)


def rmsnorm(x: Array, weight: Array, eps: float = 1e-6, *, weight_bias: float = 0.0) -> Array:
    """RMS normalisation, ``x / sqrt(mean(x^2) + eps) * (weight + weight_bias)``, rounded once at the end.

    Parameters
    ----------
    x : [n, hidden] or [n, heads, head_dim]
        The last dimension is normalised.
    weight : [x.shape[-1]]
    eps : float
    weight_bias : float
        0 for Llama, 1 for Gemma.

    Returns
    -------
    Array
        Shape and dtype of `x`.

    Source: Zhang & Sennrich 2019; flashinfer.norm.rmsnorm, gemma_rmsnorm.
    """
    ct = compute_dtype(x, weight)
    return round_to(_rms_scaled(upcast(x, ct), weight, eps, weight_bias), x.dtype)


def fused_add_rmsnorm(
    x: Array, residual: Array, weight: Array, eps: float = 1e-6, *, weight_bias: float = 0.0
) -> tuple[Array, Array]:
    """Add `x` to the residual stream and normalise the sum.

    The new residual is ``round(x + residual)``; the norm uses the sum *before* that rounding.

    Parameters
    ----------
    x, residual : [n, hidden]
    weight : [hidden]
    eps, weight_bias : float
        As in `rmsnorm`.

    Returns
    -------
    (normed, new_residual)
        In the dtypes of `x` and of `residual`.

    Source: flashinfer.norm.fused_add_rmsnorm.
    """
    ct = compute_dtype(x, residual, weight)
    total = upcast(x, ct) + upcast(residual, ct)
    return round_to(_rms_scaled(total, weight, eps, weight_bias), x.dtype), round_to(total, residual.dtype)


def layernorm(x: Array, gamma: Array, beta: Array, eps: float = 1e-6) -> Array:
    """Layer normalisation, ``(x - mean) / sqrt(var + eps) * gamma + beta`` with the biased variance.

    Parameters
    ----------
    x : [..., hidden]
    gamma, beta : [hidden]
        Usually float32 while `x` is bf16.
    eps : float

    Returns
    -------
    Array
        Shape and dtype of `x`.

    Source: Ba et al. 2016; flashinfer.norm.layernorm.
    """
    ct = compute_dtype(x, gamma, beta)
    return round_to(_layer_scaled(upcast(x, ct), gamma, beta, eps), x.dtype)


def rmsnorm_quant(
    x: Array,
    weight: Array,
    scale: ArrayLike,
    eps: float = 1e-6,
    *,
    weight_bias: float = 0.0,
    out_dtype: DTypeLike = E4M3,
) -> Array:
    """RMSNorm with fp8 output, ``clamp(rmsnorm(x) / scale)``: the scale *divides*.

    Parameters
    ----------
    x, weight, eps, weight_bias
        As in `rmsnorm`.
    scale : float or [1]
    out_dtype : float8_e4m3fn (clamp to 448) or float8_e5m2 (57344)

    Source: flashinfer.norm.rmsnorm_quant.
    """
    ct = compute_dtype(x, weight)
    return _divide_scale(_rms_scaled(upcast(x, ct), weight, eps, weight_bias), scale, out_dtype)


def fused_add_rmsnorm_quant(
    x: Array,
    residual: Array,
    weight: Array,
    scale: ArrayLike,
    eps: float = 1e-6,
    *,
    weight_bias: float = 0.0,
    out_dtype: DTypeLike = E4M3,
) -> tuple[Array, Array]:
    """`fused_add_rmsnorm` with the normed output divided by `scale` and cast to fp8: (quantised, new_residual).

    Source: flashinfer.norm.fused_add_rmsnorm_quant.
    """
    ct = compute_dtype(x, residual, weight)
    total = upcast(x, ct) + upcast(residual, ct)
    normed = _rms_scaled(total, weight, eps, weight_bias)
    return _divide_scale(normed, scale, out_dtype), round_to(total, residual.dtype)


def layernorm_quant(
    x: Array, gamma: Array, beta: Array, scale: ArrayLike, eps: float = 1e-6, *, out_dtype: DTypeLike = E4M3
) -> Array:
    """`layernorm` divided by `scale` and cast to fp8.

    Source: flashinfer.norm.layernorm_quant.
    """
    ct = compute_dtype(x, gamma, beta)
    return _divide_scale(_layer_scaled(upcast(x, ct), gamma, beta, eps), scale, out_dtype)
