"""Multi-head latent attention (DeepSeek) over a paged compressed cache, with the projections absorbed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fi_cupy.reference._common import Array, compute_dtype, round_to, upcast
from fi_cupy.reference.attention import attention
from fi_cupy.reference.page import gather_pages
from fi_cupy.reference.rope import rope_frequencies, rotate


def mla_paged(
    q_nope: Array,
    q_pe: Array,
    ckv_cache: Array,
    kpe_cache: Array,
    qo_indptr: Array,
    kv_indptr: Array,
    kv_indices: Array,
    kv_len_arr: Array,
    causal: bool,
    sm_scale: float,
    *,
    window_left: int = -1,
    logits_soft_cap: float = 0.0,
    ckv_scale: float = 1.0,
    kpe_scale: float = 1.0,
    token_scales: Array | None = None,
    rope: tuple[float, float] | None = None,
    variant: Any = None,
    params: Mapping[str, Any] | None = None,
    out_scale: float = 1.0,
    out_dtype: DTypeLike | None = None,
) -> tuple[Array, Array]:
    """``softmax(sm_scale * (q_nope ckv^T + q_pe kpe^T)) ckv``: all query heads share one kv head, values are `ckv`.

    Parameters
    ----------
    q_nope : [n, num_heads, head_dim_ckv]
        512 for DeepSeek; the key up-projection is already absorbed.
    q_pe : [n, num_heads, head_dim_kpe]
        64, already rotated.
    ckv_cache : [pages, page_size, head_dim_ckv]
    kpe_cache : [pages, page_size, head_dim_kpe]
    qo_indptr, kv_indptr : int [batch + 1]
    kv_indices : int [pages in use]
    kv_len_arr : int [batch]
        Tokens of every request; 0 is legal. Rows of the last page beyond it are never read.
    causal : bool
        Bottom-right aligned.
    sm_scale : float
        Explicit, ``1 / sqrt(128 + 64)`` for DeepSeek: the head dimension before absorption.
    window_left, logits_soft_cap
        As in `attention`.
    ckv_scale, kpe_scale : float
        Dequantisation multipliers of the two caches.
    token_scales : float32 [pages, page_size, head_dim_ckv / 128], optional
        Multipliers of 128 columns of a token's ckv each.
    rope : (rope_scale, rope_theta), optional
        Rotate q_pe (the last query at the last key) and kpe by position, feature 2i against 2i + 1.
    variant, params
        As in `attention`.
    out_scale : float
        Multiplies the output.
    out_dtype : default dtype of `q_nope`

    Returns
    -------
    (out, lse)
        ``[n, num_heads, head_dim_ckv]`` and float32 (float64) ``[n, num_heads]``, base 2.

    Source: DeepSeek-V2 report; flashinfer.mla.BatchMLAPagedAttentionWrapper.
    """
    ct = compute_dtype(q_nope, q_pe, ckv_cache, kpe_cache)
    q = np.concatenate([upcast(q_nope, ct), upcast(q_pe, ct)], axis=-1)
    dc, freq = q_nope.shape[-1], None if rope is None else rope_frequencies(q_pe.shape[-1], *rope)
    out = np.zeros(q_nope.shape, dtype=ct)
    lse = np.full(q_nope.shape[:2], -np.inf, dtype=ct)
    for b in range(len(qo_indptr) - 1):
        rows = slice(int(qo_indptr[b]), int(qo_indptr[b + 1]))
        pages = np.asarray(kv_indices)[int(kv_indptr[b]) : int(kv_indptr[b + 1])]
        kv_len = int(kv_len_arr[b])
        ckv = upcast(gather_pages(ckv_cache, pages, kv_len), ct) * float(ckv_scale)
        kpe = upcast(gather_pages(kpe_cache, pages, kv_len), ct) * float(kpe_scale)
        if token_scales is not None:
            factors = upcast(gather_pages(token_scales, pages, kv_len), ct)
            ckv *= np.repeat(factors, dc // factors.shape[-1], axis=-1)
        query = q[rows]
        if freq is not None:
            query = np.concatenate(
                [query[..., :dc], _rotated(query[..., dc:], kv_len - len(query) + np.arange(len(query)), freq)], axis=-1
            )
            kpe = _rotated(kpe[:, None], np.arange(kv_len), freq)[:, 0]
        key = np.concatenate([ckv, kpe], axis=-1)[:, None]
        out[rows], lse[rows] = attention(
            query, key, ckv[:, None], causal=causal, sm_scale=sm_scale, window_left=window_left,
            logits_soft_cap=logits_soft_cap, batch=b, variant=variant, params=params,
        )  # fmt: skip
    return round_to(out * out_scale, q_nope.dtype if out_dtype is None else out_dtype), lse


def _rotated(x: Array, positions: Array, freq: Array) -> Array:
    angle = positions[:, None] * freq
    return rotate(x, np.cos(angle), np.sin(angle), interleave=True)
