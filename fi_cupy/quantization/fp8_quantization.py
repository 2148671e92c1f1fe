"""Casts to 8 bits: scales for groups, tokens, blocks or a whole array, in fp32 or as powers of two."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import as_sizes, check_device, check_dtype, check_inner, check_ndim
from fi_cupy.dtypes import FP8_TYPES, DType, float8_e4m3fn, float32, int8, uint8
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, ShapeError, UnsupportedError
from fi_cupy.quantization import kernels
from fi_cupy.reference import activation
from fi_cupy.reference import quantization as reference

#: Lower bounds of eps: the scale's reciprocal must be a number.
_LEAST_EPS = 1e-30


def byte_type(op: str, dst_dtype: Any, kinds: tuple[DType, ...] = (*FP8_TYPES, int8)) -> DType:
    """The type a cast gives; None is e4m3."""
    kind = float8_e4m3fn if dst_dtype is None else to_dtype(dst_dtype)
    if kind not in kinds:
        raise ArgumentError(f"{op}: dtype is {kind.name}, expected {' or '.join(k.name for k in kinds)}")
    return kind


def _check_eps(op: str, eps: float) -> float:
    if not _LEAST_EPS <= eps < float("inf"):
        raise ArgumentError(f"{op}: eps is {eps}, expected a number from {_LEAST_EPS} on")
    return float(eps)


def per_token_group_quant_8bit(
    x: Any,
    group_size: int,
    eps: float = 1e-10,
    dst_dtype: Any = None,
    column_major_scales: bool = False,
    scale_tma_aligned: bool = False,
    scale_ue8m0: bool = False,
    *,
    fuse_silu_and_mul: bool = False,
) -> tuple[Any, Any]:
    """Cast groups of the last dimension: ``scale = max(max |group|, eps) / max(dst)``, ``q = round(x / scale)``.

    Parameters
    ----------
    x : array, [..., n], float16, bfloat16 or float32
        n divisible by `group_size`; the leading dimensions must lie as one (a slice of columns does).
    group_size : int
    eps : float
        Lower bound of a group's largest magnitude, at least 1e-30.
    dst_dtype : dtype, optional
        float8_e4m3fn (None), float8_e5m2 or int8. With CuPy, fp8 comes back as uint8 bytes.
    column_major_scales : bool
        Two-dimensional `x` only: the scales' token dimension is the contiguous one; same shape, other strides.
    scale_tma_aligned : bool
        With `column_major_scales`: the stride between groups is rounded up to 4 tokens (16 bytes, what TMA needs).
    scale_ue8m0 : bool
        Round the scales up to powers of two (still float32).
    fuse_silu_and_mul : bool
        `x` is [..., 2 * n], gate and up: cast ``silu(gate) * up``, computed in fp32 and not rounded before.

    Returns
    -------
    (q, scales)
        ``[..., n]`` of `dst_dtype`, rounded to nearest even, and float32 ``[..., n / group_size]``: ``x ~ q * scale``.
        A group that holds NaN has a NaN scale.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, LayoutError

    Source
    ------
    SGLang and FlashInfer: per_token_group_quant_8bit.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.quantization import per_token_group_quant_8bit
    >>> q, scale = per_token_group_quant_8bit(np.float32([[1, -2, 254, 0]]), 2, dst_dtype="int8")
    >>> q.tolist(), scale[0, 1].tolist()
    ([[64, -127, 127, 0]], 2.0)
    """
    op = "per_token_group_quant_8bit"
    v, kind = kernels.float_input(op, x), byte_type(op, dst_dtype)
    width = v.shape[-1] // 2 if fuse_silu_and_mul else v.shape[-1]
    (group_size,) = as_sizes(op, group_size=group_size)
    if width % group_size or (fuse_silu_and_mul and v.shape[-1] % 2):
        raise ShapeError(
            f"{op}: x has shape {v.shape}, expected a last dimension divisible by {group_size}"
            f"{' twice' if fuse_silu_and_mul else ''}"
        )
    if scale_tma_aligned and not column_major_scales:
        raise ArgumentError(f"{op}: scale_tma_aligned is True, expected column_major_scales=True with it")
    if column_major_scales:
        check_ndim(op, "x", v, 2, meaning="(column_major_scales)")
    eps = _check_eps(op, eps)
    lead, groups = v.shape[:-1], width // group_size
    if column_major_scales:
        tokens = v.shape[0]
        stored = v.empty((groups, -(-tokens // 4) * 4 if scale_tma_aligned else tokens), float32)
        strides = (1, stored.shape[1])
    else:
        stored = v.empty((*lead, groups), float32)
        strides = (groups, 1)
    q = v.empty((*lead, width), kind)
    if v.is_cpu:
        host = activation.silu_and_mul(v.numpy().astype(np.float32)) if fuse_silu_and_mul else v.numpy()
        codes, scale = reference.per_token_group_quant_8bit(host, group_size, eps, kind.np, scale_ue8m0=scale_ue8m0)
        q.write(codes)
        if column_major_scales:
            stored.numpy()[:, :tokens] = scale.T
        else:
            stored.write(scale)
    else:
        kernels.quantize_rows(
            op, v, q, stored, out=kind, mode="power" if scale_ue8m0 else "float", group=group_size,
            scale_strides=strides, eps=eps, gated=fuse_silu_and_mul,
        )  # fmt: skip
    scales = stored.result()
    return q.result(), scales[:, :tokens].T if column_major_scales else scales


def _per_token(op: str, x: Any, kind: DType) -> tuple[Any, Any]:
    v = kernels.float_input(op, x)
    q, s = v.empty(v.shape, kind), v.empty((*v.shape[:-1], 1), float32)
    if v.is_cpu:
        if v.size:
            codes, scale = reference.per_token_group_quant_8bit(v.numpy(), v.shape[-1], dst_dtype=kind.np)
            q.write(codes)
            s.write(scale)
    else:
        kernels.quantize_rows(
            op, v, q, s, out=kind, mode="float", group=v.shape[-1], scale_strides=(1, 0), eps=1e-10
        )  # fmt: skip
    return q.result(), s.result()


def per_token_quant_fp8(x: Any, dtype: Any = None) -> tuple[Any, Any]:
    """Cast every token (row) to fp8 with a scale of its own: ``scale = max(max |row|, 1e-10) / max(fp8)``.

    Parameters
    ----------
    x : array, [..., n], float16, bfloat16 or float32
    dtype : dtype, optional
        float8_e4m3fn (None) or float8_e5m2.

    Returns
    -------
    (q, scales)
        ``[..., n]`` fp8, and float32 ``[..., 1]``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, LayoutError

    Source
    ------
    SGLang: per_token_quant_fp8.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.quantization import per_token_quant_fp8
    >>> per_token_quant_fp8(np.float32([[1, 448], [0, 896]]))[1].tolist()
    [[1.0], [2.0]]
    """
    return _per_token("per_token_quant_fp8", x, byte_type("per_token_quant_fp8", dtype, FP8_TYPES))


def per_token_quant_int8(x: Any) -> tuple[Any, Any]:
    """`per_token_quant_fp8` to int8: ``scale = max(max |row|, 1e-10) / 127``. Source: SGLang's per_token_quant_int8."""
    return _per_token("per_token_quant_int8", x, int8)


def per_tensor_quant_fp8(x: Any, scale: Any = None, dtype: Any = None) -> tuple[Any, Any]:
    """Cast an array to fp8 with one scale: ``q = round(x / scale)``, saturating.

    Parameters
    ----------
    x : array, [..., n], float16, bfloat16 or float32
    scale : float or array of one float32, optional
        None: ``max(max |x|, 1e-10) / max(fp8)``, found by a second pass over the array, without a wait.
    dtype : dtype, optional
        float8_e4m3fn (None) or float8_e5m2.

    Returns
    -------
    (q, scale)
        fp8 in the shape of `x`, and float32 ``[1]``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    SGLang: per_tensor_quant_fp8; vLLM: scaled_fp8_quant.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.quantization import per_tensor_quant_fp8
    >>> per_tensor_quant_fp8(np.float32([[1, 1000]]), 2.0)[0]
    array([[0.5, 448]], dtype='float8_e4m3fn')
    """
    op = "per_tensor_quant_fp8"
    v, kind = kernels.float_input(op, x), byte_type(op, dtype, FP8_TYPES)
    given = None if scale is None else kernels.one_number(op, "scale", scale, v)
    q, s = v.empty(v.shape, kind), v.empty((1,), float32)
    if v.is_cpu:
        amax = np.abs(v.numpy().astype(np.float32)).max(initial=1e-10)
        found = np.float32(amax / np.float32(448.0 if kind is float8_e4m3fn else 57344.0))
        used = float(found) if given is None else kernels.host_number(given)
        q.write(reference.static_quant(v.numpy(), used, kind.np))
        s.write(np.array([used], np.float32))
        return q.result(), s.result()
    if given is None:
        given, mode = kernels.absolute_max(op, v), "tensor"
    else:
        mode = "given"
    kernels.quantize_rows(op, v, q, s, out=kind, mode=mode, group=128, given=given, eps=1e-10)
    return q.result(), s.result()


def quantize_fp8(
    x: Any, scale_shape: tuple[int, ...], tile_shape: tuple[int, ...], scale_major_mode: str = "K"
) -> tuple[Any, Any]:
    """Cast tiles to float8_e4m3fn with power-of-two scales: ``scale = 2^ceil(log2(max(max |tile|, 1e-4) / 448))``.

    Parameters
    ----------
    x : array, two or three dimensions, float16, bfloat16 or float32
    scale_shape : tuple of int
        What the scales' shape must come to.
    tile_shape : tuple of int
        Size of a tile in each dimension; the last tile of a dimension may stick out. On a GPU all but the last are
        1, or the last two are (128, 128) or other powers of two whose product is 2,048 to 32,768, before them 1.
    scale_major_mode : "K" or "MN"
        "K": scales lie as the tiles do; "MN": their last two axes are swapped.

    Returns
    -------
    (q, scales)
        fp8 in the shape of `x`, and float32 of `scale_shape`.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, LayoutError, UnsupportedError

    Source
    ------
    flashinfer.testing.utils.quantize_fp8.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.quantization import quantize_fp8
    >>> quantize_fp8(np.float32([[448, 1], [100, 900]]), (2, 1), (1, 2))[1].tolist()
    [[1.0], [4.0]]
    """
    op = "quantize_fp8"
    if scale_major_mode not in ("K", "MN"):
        raise ArgumentError(f"{op}: scale_major_mode is {scale_major_mode!r}, expected 'K' or 'MN'")
    v = kernels.float_input(op, x)
    check_ndim(op, "x", v, 2, 3)
    if len(tile_shape) != v.ndim or min(tile_shape) < 1:
        raise ArgumentError(f"{op}: tile_shape is {tile_shape}, expected {v.ndim} sizes of at least 1")
    shape = tuple(-(-n // t) for n, t in zip(v.shape, tile_shape, strict=True))
    if scale_major_mode == "MN":
        shape = (*shape[:-2], shape[-1], shape[-2])
    if tuple(scale_shape) != shape:
        raise ShapeError(f"{op}: scale_shape is {tuple(scale_shape)}, expected {shape} for x {v.shape}")
    q, scales = v.empty(v.shape, float8_e4m3fn), v.empty(shape, float32)
    if v.is_cpu:
        codes, values = reference.quantize_fp8(v.numpy(), tuple(tile_shape), scale_major_mode)
        q.write(codes)
        scales.write(values)
    else:
        _quantize_tiles(op, v, q, scales, tuple(tile_shape), scale_major_mode == "MN")
    return q.result(), scales.result()


def _quantize_tiles(op: str, v: View, q: View, scales: View, tile: tuple[int, ...], transposed: bool) -> None:
    if set(tile[:-1]) == {1} and not (transposed and v.ndim == 3):
        groups = -(-v.shape[-1] // tile[-1])
        strides = (1, v.shape[0]) if transposed else (groups, 1)
        kernels.quantize_rows(
            op, v, q, scales, out=float8_e4m3fn, mode="power", group=tile[-1], scale_strides=strides, eps=1e-4
        )
        return
    height, width = tile[-2:]
    product = height * width
    powers = height & (height - 1) == 0 and width & (width - 1) == 0
    if set(tile[:-2]) > {1} or not powers or width < 16 or width > 2048 or not 2048 <= product <= 32768:
        raise UnsupportedError(
            f"{op}: tile_shape is {tile}, expected ones before the last size, or before two powers of two with a "
            "product of 2048 to 32768"
        )
    kernels.quantize_blocks(
        v, q, scales, out=float8_e4m3fn, mode="power", tile=(height, width), eps=1e-4, transposed=transposed
    )


def per_token_cast_to_fp8(x: Any) -> tuple[Any, Any]:
    """`quantize_fp8` with a scale for each 128 features of a token: ``[m, n] -> ([m, n], [m, ceil(n / 128)])``.

    Source: DeepGEMM; flashinfer.testing.utils.per_token_cast_to_fp8.
    """
    v = kernels.float_input("per_token_cast_to_fp8", x)
    check_ndim("per_token_cast_to_fp8", "x", v, 2)
    return quantize_fp8(x, (v.shape[0], -(-v.shape[1] // 128)), (1, 128))


def per_block_cast_to_fp8(x: Any) -> tuple[Any, Any]:
    """`quantize_fp8` with a scale for each 128 x 128 block: ``[m, n] -> ([m, n], [ceil(m / 128), ceil(n / 128)])``.

    Source: DeepGEMM; flashinfer.testing.utils.per_block_cast_to_fp8.
    """
    v = kernels.float_input("per_block_cast_to_fp8", x)
    check_ndim("per_block_cast_to_fp8", "x", v, 2)
    return quantize_fp8(x, (-(-v.shape[0] // 128), -(-v.shape[1] // 128)), (128, 128))


def _tile_extent(op: str, extent: int, blocks: int) -> int:
    """Size of a tile: the extent cut into equal blocks, or into blocks of 128 of which the last sticks out."""
    sizes = {extent // blocks} if blocks and extent % blocks == 0 else set()
    if blocks == -(-extent // 128) and blocks > 1:
        sizes.add(128)
    if len(sizes) != 1:
        raise ShapeError(
            f"{op}: {blocks} scales for {extent} values, expected tiles whose size follows from the shapes, not "
            f"{' or '.join(map(str, sorted(sizes))) or 'none'}; pass tile_shape"
        )
    return sizes.pop()


def dequantize_fp8(
    x: Any, x_scale: Any, scale_major_mode: str = "K", *, tile_shape: tuple[int, ...] | None = None
) -> Any:
    """``x * scale`` of each tile in float32: the inverse of `quantize_fp8`.

    Parameters
    ----------
    x : array, two or three dimensions, float8_e4m3fn, float8_e5m2, int8, or uint8 (bytes of e4m3)
    x_scale : array, float32
        One scale a tile.
    scale_major_mode : "K" or "MN"
        As in `quantize_fp8`.
    tile_shape : tuple of int, optional
        None: follows from the shapes, as an equal part of each dimension, or 128 where the number of scales is
        ceil(extent / 128); an error where both would do and differ.

    Returns
    -------
    array
        float32 in the shape of `x`.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.testing.utils.dequantize_fp8.
    """
    op = "dequantize_fp8"
    if scale_major_mode not in ("K", "MN"):
        raise ArgumentError(f"{op}: scale_major_mode is {scale_major_mode!r}, expected 'K' or 'MN'")
    q, s = view(x, op, "x"), view(x_scale, op, "x_scale")
    check_ndim(op, "x", q, 2, 3)
    check_dtype(op, "x", q, (*FP8_TYPES, int8, uint8))
    check_inner(op, "x", q)
    check_ndim(op, "x_scale", s, q.ndim, meaning="like x")
    check_dtype(op, "x_scale", s, (float32,))
    check_device(op, q, x_scale=s)
    q = q.typed(float8_e4m3fn) if q.dtype is uint8 else q
    swapped = scale_major_mode == "MN"
    order = (*range(q.ndim - 2), q.ndim - 1, q.ndim - 2) if swapped else tuple(range(q.ndim))
    shape, strides = [s.shape[i] for i in order], [s.strides[i] for i in order]
    if q.size == 0:
        return q.empty(q.shape, float32).result()
    if tile_shape is None:
        tile = tuple(_tile_extent(op, n, b) for n, b in zip(q.shape, shape, strict=True))
    else:
        tile = tuple(as_sizes(op, **{f"tile_shape[{i}]": n for i, n in enumerate(tile_shape)}))
        if len(tile) != q.ndim or [-(-n // t) for n, t in zip(q.shape, tile, strict=True)] != shape:
            raise ShapeError(f"{op}: x_scale has shape {s.shape}, expected a scale a tile of {tile} in x {q.shape}")
    out = q.empty(q.shape, float32)
    if q.is_cpu:
        out.write(reference.dequantize_fp8(q.numpy(), s.numpy(), tile, scale_major_mode))
        return out.result()
    if tile[:-2] not in ((), (1,)):
        raise UnsupportedError(f"{op}: x_scale has shape {s.shape}, expected a scale of its own for each x[i]")
    kernels.dequantize(
        op, q, s, out, code=q.dtype, scale="float", block=(tile[-2], tile[-1]),
        scale_strides=(0, *strides) if q.ndim == 2 else tuple(strides),  # type: ignore[arg-type]
    )  # fmt: skip
    return out.result()
