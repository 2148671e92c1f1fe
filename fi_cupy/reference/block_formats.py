"""The OCP microscaling formats and NVFP4: codes of 8 or 4 bits with a scale byte for each 32 or 16 of them.

e2m1 has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6; e8m0 is 2^(code - 127), code 255 NaN. Everything is rounded to
nearest even and saturates. Sources: OCP Microscaling Formats (MX) 1.0; flashinfer.quantization.
"""

from __future__ import annotations

import math

import numpy as np

from fi_cupy.reference._common import E4M3, FP8_MAX, Array, compute_dtype, round_to, upcast

#: Values of the eight magnitudes of e2m1, by code.
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1_MAX = 6.0
#: Half way between neighbours, and whether a value there rounds up: to the even code.
_HALFWAY = (E2M1_VALUES[1:] + E2M1_VALUES[:-1]) / 2
_TIE_UP = np.arange(7) % 2 == 1


def e2m1_codes(x: Array) -> Array:
    """Codes 0 to 15 of e2m1, one a byte; NaN has none and becomes the largest magnitude."""
    a = np.fmin(np.abs(x), E2M1_MAX)[..., None]
    magnitude = ((a > _HALFWAY) | ((a == _HALFWAY) & _TIE_UP)).sum(axis=-1)
    return (magnitude | np.signbit(x) * 8).astype(np.uint8)


def e2m1_values(codes: Array) -> Array:
    """float32 values of codes 0 to 15."""
    return np.where(codes & 8, -E2M1_VALUES[codes & 7], E2M1_VALUES[codes & 7])


def pack_nibbles(codes: Array) -> Array:
    """Two codes a byte, the first in the low nibble."""
    return (codes[..., ::2] | codes[..., 1::2] << 4).astype(np.uint8)


def unpack_nibbles(packed: Array) -> Array:
    """Inverse of `pack_nibbles`."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


def e8m0_codes(amax: Array, limit: float) -> Array:
    """Code of the smallest power of two >= amax / limit, from 2^-127 on; infinity counts as 2^128, NaN is 255."""
    mantissa, exponent = np.frexp(np.where(np.isfinite(amax), amax, 1).astype(np.float64))  # mantissa in [0.5, 1)
    limit_mantissa, limit_exponent = math.frexp(limit)
    code = 127 + exponent - limit_exponent + (mantissa > limit_mantissa)
    code = np.where(np.isinf(amax), 255 - (limit_exponent - 1), np.maximum(np.where(amax == 0, 0, code), 0))
    return np.where(np.isnan(amax), 255, code).astype(np.uint8)


def e8m0_values(codes: Array) -> Array:
    """float32 values of e8m0 codes."""
    return np.ldexp(np.where(codes == 255, np.float32(np.nan), np.float32(1)), codes.astype(np.int32) % 255 - 127)


def tile_scales(scales: Array, rows: int) -> Array:
    """Scales [m, n] in tiles of `rows` (8 or 128) by 4, zeros where the tiles stick out, as bytes in memory order.

    Rows r, r + 32, r + 64 and r + 96 of a 128-row tile lie side by side.
    """
    m, n = scales.shape
    padded = np.zeros((-(-m // rows) * rows, -(-n // 4) * 4), scales.dtype)
    padded[:m, :n] = scales
    tiles = padded.reshape(padded.shape[0] // rows, rows // 32 or 1, min(rows, 32), padded.shape[1] // 4, 4)
    return np.ascontiguousarray(tiles.transpose(0, 3, 2, 1, 4)).reshape(padded.shape)


def untile_scales(tiled: Array, rows: int, shape: tuple[int, int]) -> Array:
    """Inverse of `tile_scales`: the scales [m, n] = `shape`."""
    m, n = (-(-shape[0] // rows) * rows, -(-shape[1] // 4) * 4)
    tiles = tiled.reshape(m // rows if m else 0, n // 4, min(rows, 32), rows // 32 or 1, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(m, n)[: shape[0], : shape[1]]


def _groups(x: Array, size: int) -> Array:
    return upcast(x, compute_dtype(x)).reshape(*x.shape[:-1], x.shape[-1] // size, size)


def mxfp8_quantize(x: Array) -> tuple[Array, Array]:
    """e4m3 with an e8m0 scale for each 32 values: ``scale = 2^ceil(log2(amax / 448))``.

    Parameters
    ----------
    x : [..., k], k divisible by 32

    Returns
    -------
    (q, scales)
        float8_e4m3fn ``[..., k]``, uint8 ``[..., k / 32]``.
    """
    groups = _groups(x, 32)
    codes = e8m0_codes(np.abs(groups).max(axis=-1, initial=0), FP8_MAX[E4M3])
    with np.errstate(invalid="ignore"):
        q = round_to(groups * (1 / e8m0_values(codes))[..., None], E4M3)
    return q.reshape(x.shape), codes


def mxfp8_dequantize(q: Array, scales: Array) -> Array:
    """float32 values of `mxfp8_quantize`'s codes."""
    with np.errstate(over="ignore"):
        values = upcast(q, np.float32).reshape(*scales.shape, 32) * e8m0_values(scales)[..., None]
    return values.reshape(q.shape)


def fp4_quantize(
    x: Array, global_scale: float = 1.0, sf_vec_size: int = 16, sf_use_ue8m0: bool = False
) -> tuple[Array, Array]:
    """e2m1 with a scale byte for each 16 or 32 values, ``x ~ value * scale / global_scale``.

    Parameters
    ----------
    x : [..., k], k divisible by `sf_vec_size`
    global_scale : float
        Usually 448 * 6 / max |x|: brings the groups' scales into e4m3's range.
    sf_vec_size : 16 or 32
    sf_use_ue8m0 : bool
        False: ``scale = e4m3(amax * (global_scale / 6))`` (NVFP4). True: the power of two from
        ``global_scale * amax / 6`` on (MXFP4).

    Returns
    -------
    (q, scales)
        uint8 ``[..., k / 2]`` and ``[..., k / sf_vec_size]``.
    """
    groups = _groups(x, sf_vec_size)
    ct = groups.dtype.type
    given = ct(np.float32(global_scale))
    amax = np.abs(groups).max(axis=-1, initial=0)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if sf_use_ue8m0:
            scales = e8m0_codes(amax * given, E2M1_MAX)
            inverse = given * (1 / e8m0_values(scales)).astype(ct)
        else:
            stored = round_to(amax * (given / ct(E2M1_MAX)), E4M3)
            scales, value = stored.view(np.uint8), upcast(stored, ct)
            inverse = np.where(value != 0, given / value, ct(0))
        codes = e2m1_codes(groups * inverse[..., None])
    return pack_nibbles(codes.reshape(x.shape)), scales


def fp4_dequantize(
    q: Array, scales: Array, global_scale: float = 1.0, sf_vec_size: int = 16, sf_use_ue8m0: bool = False
) -> Array:
    """float32 ``value * scale * global_scale``: here the reciprocal of `fp4_quantize`'s global scale."""
    values = e2m1_values(unpack_nibbles(q))
    factor = e8m0_values(scales) if sf_use_ue8m0 else upcast(scales.view(E4M3), np.float32)
    with np.errstate(over="ignore"):
        scaled = values.reshape(*scales.shape, sf_vec_size) * factor[..., None] * np.float32(global_scale)
    return scaled.reshape(values.shape)
