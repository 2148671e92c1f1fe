"""MXFP8: float8_e4m3fn with an e8m0 scale for each 32 values; and back."""

from __future__ import annotations

from typing import Any

from fi_cupy.arrays import view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.dtypes import float8_e4m3fn, float32, uint8
from fi_cupy.errors import ShapeError, UnsupportedError
from fi_cupy.quantization import kernels
from fi_cupy.quantization.layout import SfLayout, padded_scales, sf_layout
from fi_cupy.reference import block_formats


def mxfp8_quantize(
    input: Any,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
    sf_swizzle_layout: SfLayout | None = None,
) -> tuple[Any, Any]:
    """Cast to MXFP8: float8_e4m3fn with an e8m0 scale for each 32 values, ``scale = 2^ceil(log2(max |group| / 448))``.

    Parameters
    ----------
    input : array, [..., k], float16 or bfloat16
        k divisible by 32.
    is_sf_swizzled_layout : bool
        Scales in tiles of 128 rows by 4 (see `SfLayout`), padded with zeros; else row by row.
    alignment : int
        k is not padded: a divisor of k.
    enable_pdl : bool, optional
        Launch so that this kernel may start before its predecessor has ended (sm_90 and later); None is off.
    backend : "cuda"
        Accepted for FlashInfer's sake.
    sf_swizzle_layout : SfLayout, optional
        Overrides `is_sf_swizzled_layout`.

    Returns
    -------
    (q, scales)
        float8_e4m3fn ``[..., k]``, and uint8 bytes of e8m0, flat. A group that holds NaN has the scale NaN (255).

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, LayoutError

    Source
    ------
    OCP Microscaling Formats (MX) 1.0; flashinfer.mxfp8_quantize (whose scales, like these, are rounded up so that
    nothing saturates).

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.quantization import mxfp8_quantize
    >>> q, scales = mxfp8_quantize(np.full((1, 32), 3.0, np.float16), False)
    >>> float(q[0, 0]), int(scales[0])
    (384.0, 120)
    """
    op = "mxfp8_quantize"
    v = kernels.float_input(op, input, "input")
    k = v.shape[-1]
    if k % 32:
        raise ShapeError(f"{op}: input has shape {v.shape}, expected a last dimension divisible by 32")
    if alignment < 1 or k % alignment:
        raise UnsupportedError(f"{op}: alignment is {alignment}, expected a divisor of {k} = input.shape[-1]")
    if backend != "cuda":
        raise UnsupportedError(f"{op}: backend is {backend!r}, expected 'cuda'")
    tile = sf_layout(op, sf_swizzle_layout, is_sf_swizzled_layout)
    tokens = kernels.token_rows(op, "input", v)[0]
    padded = padded_scales(tokens, k // 32, tile)
    q, scales = v.empty(v.shape, float8_e4m3fn), v.empty((padded[0] * padded[1],), uint8)
    if v.is_cpu:
        codes, values = block_formats.mxfp8_quantize(v.numpy())
        q.write(codes)
        values = values.reshape(tokens, k // 32)
        scales.write((block_formats.tile_scales(values, tile) if tile else values).reshape(-1))
    else:
        kernels.quantize_rows(
            op, v, q, scales, out=float8_e4m3fn, mode="e8m0", group=32, scale_strides=(k // 32, 1), tile=tile,
            padded=padded, pdl=bool(enable_pdl),
        )  # fmt: skip
    return q.result(), scales.result()


def mxfp8_dequantize_host(
    input: Any, scale_tensor: Any, is_sf_swizzled_layout: bool = True, sf_swizzle_layout: SfLayout | None = None
) -> Any:
    """The float32 values of `mxfp8_quantize`'s codes, computed where the arrays are.

    Parameters
    ----------
    input : array, [m, k], float8_e4m3fn or its bytes (uint8)
    scale_tensor : array, uint8
        As `mxfp8_quantize` gives them.
    is_sf_swizzled_layout, sf_swizzle_layout
        As in `mxfp8_quantize`.

    Returns
    -------
    array
        float32 ``[m, k]``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.mxfp8_dequantize_host.
    """
    op = "mxfp8_dequantize_host"
    q, s = view(input, op, "input"), view(scale_tensor, op, "scale_tensor")
    check_ndim(op, "input", q, 2)
    check_dtype(op, "input", q, (float8_e4m3fn, uint8))
    check_inner(op, "input", q)
    check_dtype(op, "scale_tensor", s, (uint8,))
    check_device(op, q, scale_tensor=s)
    m, k = q.shape
    if k % 32:
        raise ShapeError(f"{op}: input has shape {q.shape}, expected a last dimension divisible by 32")
    tile = sf_layout(op, sf_swizzle_layout, is_sf_swizzled_layout)
    padded = padded_scales(m, k // 32, tile)
    if s.size != padded[0] * padded[1] or not s.contiguous:
        check_shape(op, "scale_tensor", s, (padded[0] * padded[1],), "(dense)")
    out = q.empty((m, k), float32)
    if q.is_cpu:
        scales = s.numpy().reshape(padded)
        scales = block_formats.untile_scales(scales, tile, (m, k // 32)) if tile else scales
        out.write(block_formats.mxfp8_dequantize(q.typed(float8_e4m3fn).numpy(), scales))
    else:
        kernels.dequantize(
            op, q, s, out, code=float8_e4m3fn, scale="e8m0", block=(1, 32), scale_strides=(0, k // 32, 1), tile=tile,
            padded_columns=padded[1],
        )  # fmt: skip
    return out.result()
