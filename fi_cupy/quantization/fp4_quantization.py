"""Casts to 4 bits (e2m1): NVFP4 with e4m3 scales and a global one, MXFP4 with e8m0 scales; and back."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import as_sizes, check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.dtypes import float32, uint8
from fi_cupy.errors import ArgumentError, ShapeError, UnsupportedError
from fi_cupy.quantization import kernels
from fi_cupy.quantization.kernels import float4_e2m1fn
from fi_cupy.quantization.layout import SfLayout, padded_scales, sf_layout
from fi_cupy.reference import activation, block_formats


def _cast(
    op: str,
    v: View,
    global_scale: float | View,
    sf_vec_size: int,
    ue8m0: bool,
    tile: int,
    enable_pdl: bool | None,
    gated: bool = False,
    inversed: bool = False,
) -> tuple[Any, Any]:
    """Cast [..., k] (or the gated halves of [..., 2 k]) to e2m1; `inversed`: the scale's reciprocal is given."""
    k = v.shape[-1] // 2 if gated else v.shape[-1]
    if k % sf_vec_size or (gated and v.shape[-1] % 2):
        raise ShapeError(f"{op}: input has shape {v.shape}, expected groups of {sf_vec_size} in the last dimension")
    groups = k // sf_vec_size
    tokens = kernels.token_rows(op, "input", v)[0]
    padded = padded_scales(tokens, groups, tile)
    q, scales = v.empty((*v.shape[:-1], k // 2), uint8), v.empty(padded, uint8)
    if v.is_cpu:
        x = v.numpy()
        x = activation.silu_and_mul(x.astype(np.float32)) if gated else x
        given = kernels.host_number(global_scale)
        codes, values = block_formats.fp4_quantize(x, 1.0 / given if inversed else given, sf_vec_size, ue8m0)
        q.write(codes)
        values = values.reshape(tokens, groups)
        scales.write(block_formats.tile_scales(values, tile) if tile else values)
    else:
        kernels.quantize_rows(
            op, v, q, scales, out=float4_e2m1fn, mode="e8m0" if ue8m0 else "e4m3", group=sf_vec_size,
            scale_strides=(groups, 1), tile=tile, padded=padded, gated=gated,
            given=1.0 / global_scale if inversed else global_scale,  # type: ignore[operator]
            pdl=bool(enable_pdl),
        )  # fmt: skip
    return q.result(), scales.result()


def fp4_quantize(
    input: Any,
    global_scale: Any = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
) -> tuple[Any, Any]:
    """Cast to e2m1, two values a byte, with a scale byte a group: ``x ~ value * scale / global_scale``.

    Parameters
    ----------
    input : array, [..., k], float16, bfloat16 or float32
        k divisible by `sf_vec_size`; rows may be strided.
    global_scale : float or array of one float32, optional
        Usually ``448 * 6 / max |input|``; None is 1.
    sf_vec_size : 16 or 32
    sf_use_ue8m0 : bool
        False: ``scale = e4m3(max |group| * (global_scale / 6))`` (NVFP4). True: the smallest power of two from
        ``global_scale * max |group| / 6`` on, as e8m0 (MXFP4).
    is_sf_swizzled_layout : bool
        Scales in tiles, padded with zeros; else row by row.
    is_sf_8x4_layout : bool
        The tiles have 8 rows instead of 128; see `SfLayout`.
    is_global_scale_inversed : bool
        `global_scale` is the reciprocal (a number, or an array in host memory).
    enable_pdl : bool, optional
        As in `mxfp8_quantize`.
    backend : "cuda"
        Accepted for FlashInfer's sake.

    Returns
    -------
    (q, scales)
        uint8 ``[..., k / 2]``, the first value in the low nibble, rounded to nearest even; and uint8 scales
        ``[rows, k / sf_vec_size]``, both padded to whole tiles. A group that holds NaN has the scale NaN.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError, UnsupportedError

    Source
    ------
    OCP Microscaling Formats (MX) 1.0; flashinfer.fp4_quantize.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.quantization import fp4_quantize
    >>> q, scales = fp4_quantize(np.full((1, 16), 6.0, np.float16), 1.0, is_sf_swizzled_layout=False)
    >>> int(q[0, 0]), int(scales[0, 0])
    (119, 56)
    """
    op = "fp4_quantize"
    (sf_vec_size,) = as_sizes(op, sf_vec_size=sf_vec_size)
    if sf_vec_size not in (16, 32):
        raise UnsupportedError(f"{op}: sf_vec_size is {sf_vec_size}, expected 16 or 32")
    if backend != "cuda":
        raise UnsupportedError(f"{op}: backend is {backend!r}, expected 'cuda'")
    if is_sf_8x4_layout and not is_sf_swizzled_layout:
        raise ArgumentError(f"{op}: is_sf_8x4_layout is True, expected is_sf_swizzled_layout=True with it")
    v = kernels.float_input(op, input, "input")
    given = 1.0 if global_scale is None else kernels.one_number(op, "global_scale", global_scale, v)
    if is_global_scale_inversed and isinstance(given, View) and not given.reference_types:
        raise UnsupportedError(f"{op}: global_scale is on a GPU, expected a number with is_global_scale_inversed")
    if is_global_scale_inversed and (given.numpy() == 0 if isinstance(given, View) else given == 0):
        raise ArgumentError(f"{op}: global_scale is 0 with is_global_scale_inversed=True, expected another number")
    layout = SfLayout.layout_8x4 if is_sf_8x4_layout else None
    return _cast(
        op, v, given, sf_vec_size, bool(sf_use_ue8m0), sf_layout(op, layout, is_sf_swizzled_layout), enable_pdl,
        inversed=bool(is_global_scale_inversed),
    )  # fmt: skip


def nvfp4_quantize(
    a: Any,
    a_global_sf: Any,
    sfLayout: SfLayout = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = 16,
    enable_pdl: bool | None = None,
    backend: str = "cuda",
) -> tuple[Any, Any]:
    """`fp4_quantize` to NVFP4: e4m3 scales for each 16 values, in the layout named.

    `do_shuffle` (rows in the order of TensorRT-LLM's kernels, which fi_cupy has not) must be False.
    Source: flashinfer.nvfp4_quantize.
    """
    if do_shuffle:
        raise UnsupportedError("nvfp4_quantize: do_shuffle is True, expected False")
    tile = sf_layout("nvfp4_quantize", sfLayout, True)
    return fp4_quantize(a, a_global_sf, sf_vec_size, False, tile > 0, tile == 8, False, enable_pdl, backend)


def mxfp4_quantize(a: Any, backend: str = "cuda", enable_pdl: bool | None = None) -> tuple[Any, Any]:
    """`fp4_quantize` to MXFP4: e8m0 scales for each 32 values, in 128x4 tiles. Source: flashinfer.mxfp4_quantize."""
    return fp4_quantize(a, None, 32, True, enable_pdl=enable_pdl, backend=backend)


def block_scale_interleave(unswizzled_sf: Any) -> Any:
    """Scale bytes row by row into tiles of 128 rows by 4 (`SfLayout.layout_128x4`), padded with zeros.

    Parameters
    ----------
    unswizzled_sf : array, [m, n] or [batch, m, n], uint8

    Returns
    -------
    array
        uint8, flat: the batches' ``round_up(m, 128) * round_up(n, 4)`` bytes one after another.

    Raises
    ------
    ShapeError, DTypeError, LayoutError

    Source
    ------
    flashinfer.block_scale_interleave, nvfp4_block_scale_interleave.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.quantization import block_scale_interleave
    >>> block_scale_interleave(np.arange(1, 129, dtype=np.uint8)[:, None])[:16:4].tolist()
    [1, 33, 65, 97]
    """
    op = "block_scale_interleave"
    x = view(unswizzled_sf, op, "unswizzled_sf")
    check_ndim(op, "unswizzled_sf", x, 2, 3)
    check_dtype(op, "unswizzled_sf", x, (uint8,))
    check_inner(op, "unswizzled_sf", x)
    batch = x.shape[0] if x.ndim == 3 else 1
    rows, columns = padded_scales(x.shape[-2], x.shape[-1], 128)
    out = x.empty((batch * rows * columns,), uint8)
    if x.is_cpu:
        each = x.numpy().reshape(batch, *x.shape[-2:])
        out.write(np.array([block_formats.tile_scales(b, 128) for b in each], np.uint8).reshape(-1))
    else:
        kernels.tile_scales(op, x, out)
    return out.result()


#: The name it had first.
nvfp4_block_scale_interleave = block_scale_interleave


def silu_and_mul_nvfp4_quantize(
    input: Any, global_scale: Any, sf_layout_: SfLayout = SfLayout.layout_128x4, enable_pdl: bool | None = None
) -> tuple[Any, Any]:
    """NVFP4 of ``silu(gate) * up``, computed in fp32 and rounded once.

    Parameters
    ----------
    input : array, [..., 2 * k], float16 or bfloat16
        The gate, then up; k divisible by 16.
    global_scale : float or array of one float32
        As in `fp4_quantize`.
    sf_layout_ : SfLayout
    enable_pdl : bool, optional

    Returns
    -------
    (q, scales)
        As `fp4_quantize` of ``[..., k]``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.silu_and_mul_nvfp4_quantize.
    """
    op = "silu_and_mul_nvfp4_quantize"
    v = kernels.float_input(op, input, "input")
    given = kernels.one_number(op, "global_scale", global_scale, v)
    return _cast(op, v, given, 16, False, sf_layout(op, sf_layout_, True), enable_pdl, gated=True)


def e2m1_and_ufp8sf_scale_to_float(
    e2m1_tensor: Any,
    ufp8_scale_tensor: Any,
    global_scale_tensor: Any = None,
    sf_vec_size: int = 16,
    ufp8_type: int = 1,
    is_sf_swizzled_layout: bool = True,
) -> Any:
    """``value * scale * global_scale`` in float32, computed where the arrays are.

    Parameters
    ----------
    e2m1_tensor : array, [m, k / 2], uint8
    ufp8_scale_tensor : array, uint8
        As `fp4_quantize` gives them (any shape of the right size).
    global_scale_tensor : float or array of one float32, optional
        Here the *reciprocal* of `fp4_quantize`'s; None is 1.
    sf_vec_size : 16 or 32
    ufp8_type : int
        0: the scales are e8m0; 1: e4m3.
    is_sf_swizzled_layout : bool
        The scales lie in tiles of 128 x 4.

    Returns
    -------
    array
        float32 ``[m, k]``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.e2m1_and_ufp8sf_scale_to_float.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.quantization import e2m1_and_ufp8sf_scale_to_float, fp4_quantize
    >>> q, scales = fp4_quantize(np.arange(16, dtype=np.float16)[None])
    >>> e2m1_and_ufp8sf_scale_to_float(q, scales)[0, :8].tolist()
    [0.0, 1.25, 2.5, 2.5, 3.75, 5.0, 5.0, 7.5]
    """
    op = "e2m1_and_ufp8sf_scale_to_float"
    if ufp8_type not in (0, 1):
        raise ArgumentError(f"{op}: ufp8_type is {ufp8_type}, expected 0 (e8m0) or 1 (e4m3)")
    if sf_vec_size not in (16, 32):
        raise UnsupportedError(f"{op}: sf_vec_size is {sf_vec_size}, expected 16 or 32")
    q, s = view(e2m1_tensor, op, "e2m1_tensor"), view(ufp8_scale_tensor, op, "ufp8_scale_tensor")
    check_ndim(op, "e2m1_tensor", q, 2)
    check_dtype(op, "e2m1_tensor", q, (uint8,))
    check_inner(op, "e2m1_tensor", q)
    check_dtype(op, "ufp8_scale_tensor", s, (uint8,))
    check_device(op, q, ufp8_scale_tensor=s)
    given = (
        1.0 if global_scale_tensor is None else kernels.one_number(op, "global_scale_tensor", global_scale_tensor, q)
    )
    m, k = q.shape[0], 2 * q.shape[1]
    if k % sf_vec_size:
        raise ShapeError(f"{op}: e2m1_tensor has shape {q.shape}, expected rows of whole groups of {sf_vec_size}")
    tile, groups = 128 if is_sf_swizzled_layout else 0, k // sf_vec_size
    padded = padded_scales(m, groups, tile)
    if s.size != padded[0] * padded[1] or not s.contiguous:
        check_shape(op, "ufp8_scale_tensor", s, padded, "(dense)")
    out = q.empty((m, k), float32)
    if q.is_cpu:
        scales = s.numpy().reshape(padded)
        scales = block_formats.untile_scales(scales, tile, (m, groups)) if tile else scales
        out.write(
            block_formats.fp4_dequantize(
                q.numpy(), np.ascontiguousarray(scales), kernels.host_number(given), sf_vec_size, ufp8_type == 0
            )
        )  # fmt: skip
    else:
        kernels.dequantize(
            op, q, s, out, code=float4_e2m1fn, scale="e4m3" if ufp8_type else "e8m0", block=(1, sf_vec_size),
            scale_strides=(0, groups, 1), tile=tile, padded_columns=padded[1], given=given,
        )  # fmt: skip
    return out.result()


def mxfp4_dequantize(a_fp4: Any, a_sf: Any) -> Any:
    """The float32 values of `mxfp4_quantize`'s codes. Source: flashinfer.mxfp4_dequantize."""
    return e2m1_and_ufp8sf_scale_to_float(a_fp4, a_sf, None, 32, 0, True)
