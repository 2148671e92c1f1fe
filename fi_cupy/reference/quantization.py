"""Bit packing of boolean masks, and fp8/int8 quantisation with block scales."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fi_cupy.reference._common import E4M3, FP8_MAX, Array, compute_dtype, repeat_index, round_to, upcast

BitOrder = Literal["big", "little"]


def packbits(x: Array, bitorder: BitOrder = "big") -> Array:
    """Eight booleans a byte, uint8 `[(n + 7) // 8]`; any dtype counts as true where it is not 0.

    `bitorder` "big" puts the first element in the most significant bit, "little" in the least.

    Source: flashinfer.quantization.packbits.
    """
    return np.packbits(np.asarray(x).astype(bool, copy=False).reshape(-1), bitorder=bitorder)


def segment_packbits(x: Array, indptr: Array, bitorder: BitOrder = "big") -> tuple[Array, Array]:
    """`packbits` of every segment, each padded to whole bytes.

    Parameters
    ----------
    x : [n]
    indptr : int [segments + 1]
        In elements.
    bitorder : "big" or "little"
        Attention masks are little.

    Returns
    -------
    (packed, new_indptr)
        uint8 `[new_indptr[-1]]`, and offsets in bytes with the dtype of `indptr`,
        ``new_indptr[i + 1] - new_indptr[i] = (len_i + 7) // 8``.

    Source: flashinfer.quantization.segment_packbits.
    """
    indptr = np.asarray(indptr)
    new_indptr = np.zeros_like(indptr)
    np.cumsum((np.diff(indptr) + 7) // 8, out=new_indptr[1:])
    segment = repeat_index(indptr)
    source = int(indptr[0]) + np.arange(len(segment))
    bits = np.zeros(int(new_indptr[-1]) * 8, dtype=bool)
    bits[source - indptr[segment] + new_indptr[segment].astype(np.int64) * 8] = np.asarray(x)[source]
    return np.packbits(bits, bitorder=bitorder), new_indptr


def unpack_segments(packed: Array, lengths: Array, bitorder: BitOrder = "little") -> list[Array]:
    """Inverse of `segment_packbits`: one boolean array of ``lengths[i]`` elements a segment."""
    out, start = [], 0
    for length in np.asarray(lengths).tolist():
        stop = start + (length + 7) // 8
        out.append(np.unpackbits(packed[start:stop], count=length, bitorder=bitorder).astype(bool))
        start = stop
    return out


def _ceil_power_of_two(x: Array) -> Array:
    """Smallest power of two >= x > 0, exactly; NaN stays."""
    mantissa, exponent = np.frexp(x)
    return np.where(np.isnan(x), x, np.ldexp(np.ones_like(x), np.where(mantissa == 0.5, exponent - 1, exponent)))


def _group_scale(amax: Array, limit: float, power_of_two: bool) -> Array:
    """``amax / limit``, perhaps rounded up to a power of two; there an infinite amax counts as 2^128."""
    scale = amax / limit
    if power_of_two:
        scale = np.where(np.isinf(scale), 2.0 ** (128 - math.floor(math.log2(limit))), _ceil_power_of_two(scale))
    return scale.astype(amax.dtype)


def _codes(x: Array, dtype: np.dtype) -> Array:
    """Round to the storage type; an integer has no NaN: 0."""
    if dtype.kind == "i":
        x = np.where(np.isnan(x), 0, np.clip(x, -127, 127))
    return round_to(x, dtype)


def _axis_blocks(shape: tuple[int, ...], tile_shape: tuple[int, ...]) -> tuple[Array, ...]:
    """Block number of every element as an open mesh."""
    return np.ix_(*[np.arange(n) // t for n, t in zip(shape, tile_shape, strict=True)])


def _block_amax(x: Array, tile_shape: tuple[int, ...]) -> Array:
    """Largest magnitude of every block; the last block of a dimension may be partial."""
    amax = np.abs(x)
    if amax.size == 0:
        return np.zeros([-(-n // t) for n, t in zip(x.shape, tile_shape, strict=True)], x.dtype)
    for axis, tile in enumerate(tile_shape):
        amax = np.maximum.reduceat(amax, np.arange(0, x.shape[axis], tile), axis=axis)
    return amax


def quantize_fp8(
    x: Array,
    tile_shape: tuple[int, ...],
    scale_major_mode: str = "K",
    *,
    power_of_two: bool = True,
    dtype: DTypeLike = E4M3,
) -> tuple[Array, Array]:
    """Quantise blocks of `tile_shape` with a scale each, ``x ~ q * scale``, ``scale = max(amax, 1e-4) / fp8_max``.

    Parameters
    ----------
    x : 2-D or 3-D
    tile_shape : one size a dimension
    scale_major_mode : "K" or "MN"
        "K": scales lie as the blocks do. "MN": the last two axes of the scales are swapped.
    power_of_two : bool
        Round the scale up to a power of two (UE8M0).
    dtype : fp8 type

    Returns
    -------
    (q, scale)
        fp8 of the shape of `x`, and float32 (float64) scales.

    Source: flashinfer.testing.utils.quantize_fp8.
    """
    x = upcast(x, compute_dtype(x))
    scale = _group_scale(np.maximum(_block_amax(x, tile_shape), 1e-4), FP8_MAX[np.dtype(dtype)], power_of_two)
    with np.errstate(invalid="ignore"):
        q = round_to(x / scale[_axis_blocks(x.shape, tile_shape)], dtype)
    return q, scale if scale_major_mode == "K" else np.ascontiguousarray(scale.swapaxes(-1, -2))


def dequantize_fp8(x: Array, scale: Array, tile_shape: tuple[int, ...], scale_major_mode: str = "K") -> Array:
    """``x * scale`` with the block scales of `quantize_fp8`, float32 (float64 when the scales are)."""
    ct = compute_dtype(x, scale)
    scale = upcast(scale if scale_major_mode == "K" else scale.swapaxes(-1, -2), ct)
    return upcast(x, ct) * scale[_axis_blocks(x.shape, tile_shape)]


def per_token_cast_to_fp8(x: Array) -> tuple[Array, Array]:
    """fp8 with a power-of-two scale for each 128 features of a token: ``[m, n] -> ([m, n], [m, n / 128])``."""
    return quantize_fp8(x, (1, 128))


def per_block_cast_to_fp8(x: Array) -> tuple[Array, Array]:
    """fp8 with a power-of-two scale for each 128 x 128 block: ``[m, n] -> ([m, n], [ceil(m/128), ceil(n/128)])``."""
    return quantize_fp8(x, (128, 128))


def per_token_group_quant_8bit(
    x: Array,
    group_size: int,
    eps: float = 1e-10,
    dst_dtype: DTypeLike = E4M3,
    column_major_scales: bool = False,
    scale_tma_aligned: bool = False,
    scale_ue8m0: bool = False,
) -> tuple[Array, Array]:
    """Quantise groups of the last dimension, ``scale = max(amax, eps) / max(dst)``, ``q = clamp(x / scale)``.

    Parameters
    ----------
    x : [..., n], n divisible by `group_size`
    group_size : int
    eps : float
        Lower bound of the group's largest magnitude.
    dst_dtype : fp8 type or int8
    column_major_scales : bool
        The scales' token dimension is the contiguous one; same shape, other strides.
    scale_tma_aligned : bool
        With `column_major_scales`: the stride between groups is rounded up to 16 bytes (4 tokens).
    scale_ue8m0 : bool
        Round the scales up to powers of two.

    Returns
    -------
    (q, scales)
        `x`'s shape in `dst_dtype`, and float32 (float64) ``[..., n / group_size]``.

    Source: SGLang per_token_group_quant_8bit; flashinfer.quantization.
    """
    dst_dtype = np.dtype(dst_dtype)
    limit = FP8_MAX.get(dst_dtype) or float(np.iinfo(dst_dtype).max)
    groups = upcast(x, compute_dtype(x)).reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    amax = np.maximum(np.abs(groups).max(axis=-1, initial=0), np.asarray(eps, groups.dtype))
    scale = _group_scale(amax, limit, scale_ue8m0)
    with np.errstate(invalid="ignore"):
        q = _codes(groups / scale[..., None], dst_dtype).reshape(x.shape)
    if column_major_scales:
        tokens = scale.shape[-2]
        padded = -(-tokens // 4) * 4 if scale_tma_aligned else tokens
        buffer = np.zeros((*scale.shape[:-2], scale.shape[-1], padded), dtype=scale.dtype)
        buffer[..., :tokens] = scale.swapaxes(-1, -2)
        scale = buffer[..., :tokens].swapaxes(-1, -2)
    return q, scale


def static_quant(x: Array, scale: ArrayLike, dtype: DTypeLike = E4M3) -> Array:
    """``round(x / scale)``, saturating, with a given scale. Source: SGLang static_quant_fp8."""
    ct = compute_dtype(x)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return _codes(upcast(x, ct) / np.asarray(scale, np.float32).astype(ct), np.dtype(dtype))
