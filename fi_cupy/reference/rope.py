"""Rotary position embedding: plain, Llama 3.1 scaled, from a cos/sin cache, and fused with fp8 quantisation.

Angles are always computed in float64: at position 100 000 a float32 angle is already wrong in the third digit.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import DTypeLike

from fi_cupy.reference._common import E4M3, Array, compute_dtype, repeat_index, round_to, upcast
from fi_cupy.reference.page import append_paged_kv_cache_, append_paged_mla_kv_cache_


def rope_frequencies(rotary_dim: int, rope_scale: float = 1.0, rope_theta: float = 1e4) -> Array:
    """Radians per position, ``theta^(-2i/rotary_dim) / rope_scale``, float64 `[rotary_dim / 2]`."""
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
    return float(rope_theta) ** -exponents / float(rope_scale)


def llama31_frequencies(
    rotary_dim: int,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 8192,
) -> Array:
    """Llama 3.1 frequencies: long wavelengths divided by `rope_scale`, short ones kept, a linear blend between.

    ``s = clamp((f * old_context_len / 2pi - low) / (high - low), 0, 1)``, ``f' = (1 - s) * f / rope_scale + s * f``.
    """
    freq = rope_frequencies(rotary_dim, 1.0, rope_theta)
    turns = freq * float(old_context_len) / (2 * math.pi)
    smooth = np.clip((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0, 1.0)
    return (1.0 - smooth) * freq / float(rope_scale) + smooth * freq


def rotate(x: Array, cos: Array, sin: Array, interleave: bool = False) -> Array:
    """Rotate the first ``2 * cos.shape[-1]`` features of `x` and copy the rest; unrounded, in the type of `x`.

    Parameters
    ----------
    x : [n, heads, head_dim]
    cos, sin : [n, rotary_dim / 2]
    interleave : bool
        False pairs feature i with i + rotary_dim / 2 (NeoX), True pairs 2i with 2i + 1 (GPT-J).
    """
    half = cos.shape[-1]
    c, s = cos[:, None, :].astype(x.dtype), sin[:, None, :].astype(x.dtype)
    out = x.copy()
    if interleave:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    else:
        first, second = slice(0, half), slice(half, 2 * half)
    a, b = x[..., first], x[..., second]
    out[..., first] = a * c - b * s
    out[..., second] = b * c + a * s
    return out


def _rotate_pair(q: Array, k: Array, cos: Array, sin: Array, interleave: bool) -> tuple[Array, Array]:
    ct = compute_dtype(q, k)
    return (
        round_to(rotate(upcast(q, ct), cos, sin, interleave), q.dtype),
        round_to(rotate(upcast(k, ct), cos, sin, interleave), k.dtype),
    )


def _segment_positions(nnz: int, indptr: Array, offsets: Array) -> Array:
    """Position ``offsets[b] + i`` of every token; 0, which leaves it as it is, for tokens outside the segments."""
    indptr = np.asarray(indptr, dtype=np.int64)
    segment = repeat_index(indptr)
    tokens = indptr[0] + np.arange(len(segment))
    positions = np.zeros(nnz, dtype=np.int64)
    positions[tokens] = np.asarray(offsets, dtype=np.int64)[segment] + tokens - indptr[segment]
    return positions


def _apply(q: Array, k: Array, pos_ids: Array, freq: Array, interleave: bool) -> tuple[Array, Array]:
    angle = np.asarray(pos_ids, dtype=np.float64)[:, None] * freq
    return _rotate_pair(q, k, np.cos(angle), np.sin(angle), interleave)


def _apply_segments(
    q: Array, k: Array, indptr: Array, offsets: Array, freq: Array, interleave: bool
) -> tuple[Array, Array]:
    return _apply(q, k, _segment_positions(q.shape[0], indptr, offsets), freq, interleave)


def apply_rope(
    q: Array,
    k: Array,
    indptr: Array,
    offsets: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> tuple[Array, Array]:
    """Rotary embedding of a ragged batch; token i of request b has position ``offsets[b] + i``.

    Parameters
    ----------
    q : [nnz, num_qo_heads, head_dim]
    k : [nnz, num_kv_heads, head_dim]
    indptr : int [batch + 1]
    offsets : int [batch]
    rotary_dim : int, optional
        Features that rotate; the rest are copied. None rotates all.
    interleave : bool
        See `rotate`.
    rope_scale : float
        Divides the frequency.
    rope_theta : float

    Returns
    -------
    (q_out, k_out)
        Shapes and dtypes of `q` and `k`.

    Source: Su et al. 2021; flashinfer.rope.apply_rope.
    """
    freq = rope_frequencies(rotary_dim or q.shape[-1], rope_scale, rope_theta)
    return _apply_segments(q, k, indptr, offsets, freq, interleave)


def apply_rope_pos_ids(
    q: Array,
    k: Array,
    pos_ids: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> tuple[Array, Array]:
    """`apply_rope` with the position of every token given, `pos_ids` int32 or int64 `[nnz]`."""
    freq = rope_frequencies(rotary_dim or q.shape[-1], rope_scale, rope_theta)
    return _apply(q, k, pos_ids, freq, interleave)


def apply_llama31_rope(
    q: Array,
    k: Array,
    indptr: Array,
    offsets: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 8192,
) -> tuple[Array, Array]:
    """`apply_rope` with the frequencies of `llama31_frequencies`."""
    freq = llama31_frequencies(
        rotary_dim or q.shape[-1], rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len
    )
    return _apply_segments(q, k, indptr, offsets, freq, interleave)


def apply_llama31_rope_pos_ids(
    q: Array,
    k: Array,
    pos_ids: Array,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 8192,
) -> tuple[Array, Array]:
    """`apply_rope_pos_ids` with the frequencies of `llama31_frequencies`."""
    freq = llama31_frequencies(
        rotary_dim or q.shape[-1], rope_scale, rope_theta, low_freq_factor, high_freq_factor, old_context_len
    )
    return _apply(q, k, pos_ids, freq, interleave)


def _cached_cos_sin(cos_sin_cache: Array, positions: Array) -> tuple[Array, Array]:
    rows = cos_sin_cache[np.asarray(positions)]
    half = rows.shape[-1] // 2
    return rows[:, :half], rows[:, half:]


def apply_rope_with_cos_sin_cache(
    positions: Array, query: Array, key: Array, head_size: int, cos_sin_cache: Array, is_neox: bool = True
) -> tuple[Array, Array]:
    """Rotary embedding with precomputed cosines and sines.

    Parameters
    ----------
    positions : int [nnz]
    query : [nnz, num_qo_heads * head_size]
    key : [nnz, num_kv_heads * head_size]
    head_size : int
    cos_sin_cache : float32 [max_position, rotary_dim]
        First half cosines, second half sines; features past rotary_dim are copied.
    is_neox : bool
        True means ``interleave=False``.

    Returns
    -------
    (query_out, key_out)

    Source: flashinfer.rope.apply_rope_with_cos_sin_cache.
    """
    cos, sin = _cached_cos_sin(cos_sin_cache, positions)
    q, k = (t.reshape(t.shape[0], t.shape[1] // head_size, head_size) for t in (query, key))
    q_out, k_out = _rotate_pair(q, k, cos, sin, not is_neox)
    return q_out.reshape(query.shape), k_out.reshape(key.shape)


def rope_quantize_fp8(
    q_rope: Array,
    k_rope: Array,
    q_nope: Array | None,
    k_nope: Array | None,
    cos_sin_cache: Array,
    pos_ids: Array,
    is_neox: bool = True,
    quantize_dtype: DTypeLike | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
) -> tuple[Array, Array, Array | None, Array | None]:
    """Rotate the rope parts and cast everything to fp8, ``clamp(x * quant_scale)``: the scale *multiplies*.

    Parameters
    ----------
    q_rope : [nnz, num_qo_heads, rope_dim]
    k_rope : [nnz, num_kv_heads, rope_dim], or [nnz, rope_dim] for MLA
    q_nope, k_nope : same ranks, any last dimension, or None
    cos_sin_cache : float32 [max_position, rope_dim]
    pos_ids : int [nnz]
    is_neox : bool
    quantize_dtype : fp8 type, default float8_e4m3fn
    quant_scale_q, quant_scale_kv : float

    Returns
    -------
    (q_rope_out, k_rope_out, q_nope_out, k_nope_out)
        fp8, in the shapes of the inputs.

    Source: flashinfer.rope.rope_quantize_fp8, mla_rope_quantize_fp8.
    """
    out_dtype = np.dtype(E4M3 if quantize_dtype is None else quantize_dtype)
    ct = compute_dtype(q_rope, k_rope, q_nope, k_nope)
    cos, sin = _cached_cos_sin(cos_sin_cache, pos_ids)

    def quantise(x: Array | None, scale: float, rotated: bool) -> Array | None:
        if x is None:
            return None
        y = upcast(x, ct)
        if rotated:
            y = rotate(y if y.ndim == 3 else y[:, None], cos, sin, not is_neox).reshape(y.shape)
        return round_to(y * float(scale), out_dtype)

    q_rope_out, k_rope_out = quantise(q_rope, quant_scale_q, True), quantise(k_rope, quant_scale_kv, True)
    assert q_rope_out is not None and k_rope_out is not None  # for the type checker: the rope parts are never None
    return q_rope_out, k_rope_out, quantise(q_nope, quant_scale_q, False), quantise(k_nope, quant_scale_kv, False)


def rope_quantize_fp8_append_paged_kv_cache_(
    q_rope: Array,
    k_rope: Array,
    q_nope: Array | None,
    k_nope: Array | None,
    v: Array | None,
    cos_sin_cache: Array,
    pos_ids: Array,
    paged_kv_cache: tuple[Array, Array],
    kv_indices: Array,
    kv_indptr: Array,
    batch_indices: Array,
    positions: Array,
    is_neox: bool = True,
    quantize_dtype: DTypeLike | None = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    kv_layout: str = "NHD",
    q_dtype: DTypeLike | None = None,
) -> tuple[Array, Array | None]:
    """`rope_quantize_fp8`, and the keys and values written into a paged fp8 cache in place.

    With `v` (GQA) the cache is (k, v) and a cached key is ``[rope | nope]``; without (MLA) it is (ckv, kpe), which
    receive `k_nope` and `k_rope`. Returns (q_rope_out, q_nope_out), of type `q_dtype` where it is given.

    Source: flashinfer.rope.rope_quantize_fp8_append_paged_kv_cache.
    """
    fp8 = np.dtype(paged_kv_cache[0].dtype if quantize_dtype is None else quantize_dtype)
    q_rope_out, k_rope_out, q_nope_out, k_nope_out = rope_quantize_fp8(
        q_rope, k_rope, q_nope, k_nope, cos_sin_cache, pos_ids, is_neox, fp8, quant_scale_q, quant_scale_kv
    )
    if q_dtype is not None:
        q_rope_out, _, q_nope_out, _ = rope_quantize_fp8(
            q_rope, k_rope, q_nope, None, cos_sin_cache, pos_ids, is_neox, q_dtype, quant_scale_q
        )
    where = (batch_indices, positions)
    if v is None:
        ckv = k_nope_out if k_nope_out is None else k_nope_out.reshape(len(k_nope_out), -1)
        append_paged_mla_kv_cache_(
            ckv, k_rope_out.reshape(len(k_rope_out), -1), *where, *paged_kv_cache, kv_indices, kv_indptr
        )
    else:
        keys = k_rope_out if k_nope_out is None else np.concatenate([k_rope_out, k_nope_out], axis=-1)
        values = round_to(upcast(v, compute_dtype(v)) * float(quant_scale_kv), fp8)
        append_paged_kv_cache_(keys, values, *where, *paged_kv_cache, kv_indices, kv_indptr, kv_layout=kv_layout)
    return q_rope_out, q_nope_out
