"""Normalisation: RMSNorm (Llama, Gemma), its residual-adding and fp8 forms, and LayerNorm."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.dtypes import FLOAT_TYPES, FP8_TYPES, HALF_TYPES, DType, bfloat16, float8_e4m3fn, float16, float32, uint8
from fi_cupy.errors import DTypeError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec

_PARAMS = ParamsStruct(
    "NormParams",
    [
        ("input", "ptr"),
        ("output", "ptr"),
        ("residual", "ptr"),
        ("weight", "ptr"),
        ("bias", "ptr"),
        ("scale", "ptr"),
        ("in_stride_outer", "i64"),
        ("in_stride_inner", "i64"),
        ("out_stride_outer", "i64"),
        ("out_stride_inner", "i64"),
        ("res_stride_outer", "i64"),
        ("res_stride_inner", "i64"),
        ("rows", "u32"),
        ("inner", "u32"),
        ("hidden", "u32"),
        ("eps", "f32"),
        ("weight_bias", "f32"),
        ("scale_value", "f32"),
    ],
)


def _lanes(vectors: int) -> int:
    """Threads of one row: a vector each until 256, then up to two vectors each, then more threads."""
    lanes = 1
    while lanes < vectors and lanes < 256:
        lanes *= 2
    while lanes < 1024 and -(-vectors // lanes) > 2:
        lanes *= 2
    return lanes


def _blocks(residual: bool, layer: bool) -> int:
    """CTAs of 256 threads on a multiprocessor that ptxas is to leave room for."""
    return 4 if residual else 5 if layer else 6


@lru_cache(maxsize=512)
def norm_spec(
    dtype: DType, weight: DType, out: DType, hidden: int, vec: int, *, residual: bool = False, layer: bool = False
) -> KernelSpec:
    """The norm kernel for rows of `hidden` elements read `vec` at a time.

    Lanes and registers are chosen so that a row of up to 64 KB stays in registers: one vector a lane until 256 lanes,
    then two vectors a lane, then more lanes (8192 bf16 elements by 512 threads in 1.75 us, by 256 in 2.2), then four
    vectors. 1,536 threads of a multiprocessor have 48 KB of loads in flight, which reaches the memory's bandwidth. Rows
    of a warp or less (the norm of heads) share a CTA.
    """
    vectors = -(-hidden // vec)
    lanes = _lanes(vectors)
    vecs = 1
    while vecs < 4 and vecs * lanes < vectors:
        vecs *= 2
    threads = 128 if lanes <= 32 else lanes
    name = "layernorm" if layer else ("fused_add_rmsnorm" if residual else "rmsnorm")
    quantize = out in FP8_TYPES
    types = (
        dtype.tag + (f"_w{weight.tag}" if weight is not dtype else "") + (f"_o{out.tag}" if out is not dtype else "")
    )
    return KernelSpec(
        symbol=f"{name}_{types}_v{vec}x{vecs}_t{lanes}",
        header="norm.cuh",
        function="norm",
        params=_PARAMS,
        config=(
            ("T", dtype),
            ("W", weight),
            ("O", out),
            ("kVec", vec),
            ("kVecs", vecs),
            ("kLanes", lanes),
            ("kThreads", threads),
            ("kResidual", residual),
            ("kLayerNorm", layer),
            ("kQuantize", quantize),
        ),
        threads=threads,
        # Left alone, ptxas aims at an occupancy that spills a few registers on some architectures. Without a residual
        # six CTAs are as fast as eight, four lose 10 % (H100, fp8 output).
        min_blocks=_blocks(residual, layer) if threads == 256 else 0,
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances."""
    specs = []
    for dtype, widths in ((bfloat16, (128, 576, 2048, 4096, 8192)), (float16, (4096,))):
        for hidden in widths:
            specs.append(norm_spec(dtype, dtype, dtype, hidden, 8))
            specs.append(norm_spec(dtype, dtype, dtype, hidden, 8, residual=True))
        specs.append(norm_spec(dtype, dtype, float8_e4m3fn, 4096, 8))
        specs.append(norm_spec(dtype, dtype, float8_e4m3fn, 4096, 8, residual=True))
        specs.append(norm_spec(dtype, float32, dtype, 4096, 8, layer=True))
    specs.append(norm_spec(bfloat16, float32, float8_e4m3fn, 4096, 8, layer=True))
    specs.append(norm_spec(float32, float32, float32, 4096, 4))
    return specs


def _narrow_vec(vec: int, itemsize: int, addresses: int, extents: int) -> int:
    """Elements an access where 16 bytes do not fit: `addresses` and `extents` are ORed together."""
    while vec > 1 and (extents % vec or addresses % (vec * itemsize)):
        vec //= 2
    return vec


def _row_strides(x: View) -> tuple[int, int]:
    """(outer, inner) row strides in elements of a 2-D or 3-D array."""
    strides = x.strides
    return (strides[0], strides[1]) if len(strides) == 3 else (0, strides[0])


def _launch(
    x: View,
    weight: View,
    out: View,
    eps: float,
    pdl: bool | None,
    *,
    residual: View | None = None,
    bias: View | None = None,
    weight_bias: float = 0.0,
    scale: float | View = 1.0,
) -> None:
    shape = x.shape
    hidden = shape[-1]
    size = x.dtype.itemsize
    x_outer, x_inner = _row_strides(x)
    o_outer, o_inner = _row_strides(out)
    r_outer, r_inner = (0, 0) if residual is None else _row_strides(residual)
    residual_ptr = 0 if residual is None else residual.ptr
    bias_ptr = 0 if bias is None else bias.ptr
    strides = x_outer | x_inner | o_outer | o_inner | r_outer | r_inner
    addresses = x.ptr | out.ptr | weight.ptr | residual_ptr | bias_ptr
    vec = 16 // size
    if addresses & 15 or (hidden | strides) % vec:
        vec = _narrow_vec(vec, size, addresses, hidden | strides)
    spec = norm_spec(
        x.dtype, weight.dtype, out.dtype, hidden, vec, residual=residual is not None, layer=bias is not None
    )
    kernel = load_kernel(spec, x.device)
    rows, inner = (shape[0], shape[0]) if len(shape) == 2 else (shape[0] * shape[1], shape[1])
    on_device = isinstance(scale, View)
    rows_per_cta = 1 if hidden > 32 * vec else spec.threads // _lanes(-(-hidden // vec))
    kernel.launch(
        -(-rows // rows_per_cta), x.stream(),
        x.ptr, out.ptr, residual_ptr, weight.ptr, bias_ptr,
        scale.ptr if on_device else 0,  # type: ignore[union-attr]
        x_outer, x_inner, o_outer, o_inner, r_outer, r_inner, rows, inner or 1, hidden, eps, weight_bias,
        1.0 if on_device else scale, pdl=pdl,
    )  # fmt: skip


def _rms(op: str, input: Any, weight: Any, eps: float, out: Any, enable_pdl: bool | None, weight_bias: float) -> Any:
    x = view(input, op, "input")
    w = view(weight, op, "weight")
    shape = x.shape
    if not 2 <= len(shape) <= 3:
        check_ndim(op, "input", x, 2, 3)
    check_dtype(op, "input", x, FLOAT_TYPES)
    check_inner(op, "input", x)
    if w.shape != shape[-1:] or w.dtype is not x.dtype or w.device != x.device or w.strides != (1,):
        check_shape(op, "weight", w, shape[-1:], "= input.shape[-1:]")
        check_dtype(op, "weight", w, (x.dtype,), "like input")
        check_device(op, x, weight=w)
        check_inner(op, "weight", w)
    o = x.empty(shape, x.dtype) if out is None else _checked_out(op, x, out)
    if x.is_cpu:
        o.write(reference.norm.rmsnorm(x.numpy(), w.numpy(), eps, weight_bias=weight_bias))
    else:
        _launch(x, w, o, eps, enable_pdl, weight_bias=weight_bias)
    return o.result() if out is None else out


def _checked_out(op: str, x: View, out: Any) -> View:
    o = view(out, op, "out").writable(op, "out")
    if o.shape == x.shape and o.dtype is x.dtype and o.device == x.device and o.strides == x.strides:
        return o
    check_shape(op, "out", o, x.shape, "= input.shape")
    check_dtype(op, "out", o, (x.dtype,), "like input")
    check_device(op, x, out=o)
    check_inner(op, "out", o)
    return o


def rmsnorm(input: Any, weight: Any, eps: float = 1e-6, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """RMS normalisation of the last dimension: ``input / sqrt(mean(input^2) + eps) * weight``.

    Parameters
    ----------
    input : array, [n, hidden] or [n, heads, head_dim], float16, bfloat16 or float32
        Rows may be strided; the last dimension must be dense.
    weight : array, [input.shape[-1]], dtype of `input`
    eps : float
        Added to the mean square.
    out : array, optional
        Written and returned instead of a new array; shape and dtype of `input`.
    enable_pdl : bool, optional
        Launch so that this kernel may start before its predecessor has ended, which it waits for before it touches
        memory (sm_90 and later). None: where the device has it.

    Returns
    -------
    array
        Shape and dtype of `input`; computed in fp32, rounded once.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    Zhang and Sennrich 2019 (arXiv:1910.07467); flashinfer.norm.rmsnorm.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> x = np.array([[3.0, 4.0]], np.float32)
    >>> fi_cupy.rmsnorm(x, np.ones(2, np.float32)).round(4)
    array([[0.8485, 1.1314]], dtype=float32)
    """
    return _rms("rmsnorm", input, weight, eps, out, enable_pdl, 0.0)


def gemma_rmsnorm(input: Any, weight: Any, eps: float = 1e-6, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """Gemma's RMS normalisation: ``input / sqrt(mean(input^2) + eps) * (1 + weight)``.

    Parameters, result and errors as in `rmsnorm`. Source: flashinfer.norm.gemma_rmsnorm.
    """
    return _rms("gemma_rmsnorm", input, weight, eps, out, enable_pdl, 1.0)


def _fused_views(op: str, input: Any, residual: Any, weight: Any) -> tuple[View, View, View]:
    x = view(input, op, "input")
    r = view(residual, op, "residual").writable(op, "residual")
    w = view(weight, op, "weight")
    check_ndim(op, "input", x, 2)
    check_dtype(op, "input", x, FLOAT_TYPES)
    check_inner(op, "input", x)
    check_shape(op, "residual", r, x.shape, "= input.shape")
    check_dtype(op, "residual", r, (x.dtype,), "like input")
    check_inner(op, "residual", r)
    check_shape(op, "weight", w, x.shape[-1:], "= input.shape[-1:]")
    check_dtype(op, "weight", w, (x.dtype,), "like input")
    check_inner(op, "weight", w)
    check_device(op, x, residual=r, weight=w)
    return x, r, w


def _fused(
    op: str, input: Any, residual: Any, weight: Any, eps: float, enable_pdl: bool | None, weight_bias: float
) -> None:
    x, r, w = _fused_views(op, input, residual, weight)
    x.writable(op, "input")
    if x.is_cpu:
        normed, total = reference.norm.fused_add_rmsnorm(x.numpy(), r.numpy(), w.numpy(), eps, weight_bias=weight_bias)
        x.write(normed)
        r.write(total)
    else:
        _launch(x, w, x, eps, enable_pdl, residual=r, weight_bias=weight_bias)


def fused_add_rmsnorm(
    input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """Add `input` to the residual stream and normalise the sum, both in place.

    ``residual += input; input = residual / sqrt(mean(residual^2) + eps) * weight``. The norm uses the fp32 sum before
    it is rounded to the residual's type.

    Parameters
    ----------
    input : array, [n, hidden], float16, bfloat16 or float32
        Overwritten with the normalised sum.
    residual : array, [n, hidden], dtype of `input`
        Overwritten with the sum.
    weight : array, [hidden], dtype of `input`
    eps : float
    enable_pdl : bool, optional
        As in `rmsnorm`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    flashinfer.norm.fused_add_rmsnorm.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> x, r = np.ones((1, 2), np.float32), np.array([[2.0, 3.0]], np.float32)
    >>> fi_cupy.fused_add_rmsnorm(x, r, np.ones(2, np.float32)); r
    array([[3., 4.]], dtype=float32)
    """
    _fused("fused_add_rmsnorm", input, residual, weight, eps, enable_pdl, 0.0)


def gemma_fused_add_rmsnorm(
    input: Any, residual: Any, weight: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """`fused_add_rmsnorm` with Gemma's ``1 + weight``. Source: flashinfer.norm.gemma_fused_add_rmsnorm."""
    _fused("gemma_fused_add_rmsnorm", input, residual, weight, eps, enable_pdl, 1.0)


def layernorm(input: Any, gemma: Any, beta: Any, eps: float = 1e-6) -> Any:
    """Layer normalisation: ``(input - mean) / sqrt(var + eps) * gemma + beta``, with the biased variance.

    Parameters
    ----------
    input : array, [n, hidden], float16 or bfloat16
    gemma, beta : array, [hidden], float32
        The factors (gamma everywhere but in FlashInfer, whose name for them this is) and what is added.
    eps : float

    Returns
    -------
    array
        Shape and dtype of `input`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    Ba et al. 2016 (arXiv:1607.06450); flashinfer.norm.layernorm.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> x = np.array([[1.0, 3.0]], np.float16)
    >>> fi_cupy.layernorm(x, np.ones(2, np.float32), np.zeros(2, np.float32))
    array([[-1.,  1.]], dtype=float16)
    """
    x, g, b = _layer_views("layernorm", input, gemma, beta)
    o = x.empty(x.shape)
    if x.is_cpu:
        o.write(reference.norm.layernorm(x.numpy(), g.numpy(), b.numpy(), eps))
    else:
        _launch(x, g, o, eps, False, bias=b)
    return o.result()


def _layer_views(op: str, input: Any, gemma: Any, beta: Any) -> tuple[View, View, View]:
    x, g, b = view(input, op, "input"), view(gemma, op, "gemma"), view(beta, op, "beta")
    check_ndim(op, "input", x, 2)
    check_dtype(op, "input", x, HALF_TYPES)
    check_inner(op, "input", x)
    for name, p in (("gemma", g), ("beta", b)):
        check_shape(op, name, p, x.shape[-1:], "= input.shape[-1:]")
        check_dtype(op, name, p, (float32,))
        check_inner(op, name, p)
    check_device(op, x, gemma=g, beta=b)
    return x, g, b


def _fp8_out(op: str, out: Any, x: View) -> View:
    """The fp8 output: bytes (CuPy has no fp8) count as e4m3."""
    o = view(out, op, "out").writable(op, "out")
    check_shape(op, "out", o, x.shape, "= input.shape")
    if o.dtype not in (*FP8_TYPES, uint8):  # not check_dtype, which lets float32 stand for 16 bits on the CPU
        raise DTypeError(f"{op}: out has dtype {o.dtype.name}, expected float8_e4m3fn, float8_e5m2 or uint8")
    check_inner(op, "out", o)
    check_device(op, x, out=o)
    return o.typed(float8_e4m3fn) if o.dtype is uint8 else o


def _scale(op: str, scale: Any, x: View) -> float | View:
    if isinstance(scale, (int, float)):
        return float(scale)
    s = view(scale, op, "scale")
    if s.size != 1:
        check_shape(op, "scale", s, (1,))
    check_dtype(op, "scale", s, (float32,))
    check_device(op, x, scale=s)
    return s


def _host_scale(scale: float | View) -> float:
    return float(scale.numpy().reshape(-1)[0]) if isinstance(scale, View) else scale


def rmsnorm_quant(
    out: Any, input: Any, weight: Any, scale: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """RMS normalisation with fp8 output: ``out = clamp(rmsnorm(input) / scale)``.

    Parameters
    ----------
    out : array, [n, hidden], float8_e4m3fn, float8_e5m2, or uint8 (bytes of e4m3)
        Overwritten.
    input : array, [n, hidden], float16 or bfloat16
    weight : array, [hidden], dtype of `input`
    scale : float, or array of one float32 on the device of `input`
        The quantisation step: the result is *divided* by it.
    eps, enable_pdl
        As in `rmsnorm`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    flashinfer.norm.rmsnorm_quant.
    """
    op = "rmsnorm_quant"
    x, w = view(input, op, "input"), view(weight, op, "weight")
    check_ndim(op, "input", x, 2)
    check_dtype(op, "input", x, HALF_TYPES)
    check_inner(op, "input", x)
    check_shape(op, "weight", w, x.shape[-1:], "= input.shape[-1:]")
    check_dtype(op, "weight", w, (x.dtype,), "like input")
    check_inner(op, "weight", w)
    check_device(op, x, weight=w)
    o, s = _fp8_out(op, out, x), _scale(op, scale, x)
    if x.is_cpu:
        o.write(reference.norm.rmsnorm_quant(x.numpy(), w.numpy(), _host_scale(s), eps, out_dtype=o.dtype.np))
    else:
        _launch(x, w, o, eps, enable_pdl, scale=s)


def fused_add_rmsnorm_quant(
    out: Any, input: Any, residual: Any, weight: Any, scale: Any, eps: float = 1e-6, enable_pdl: bool | None = None
) -> None:
    """`fused_add_rmsnorm` with fp8 output: the residual is updated in place, `input` is left as it is.

    Parameters as in `rmsnorm_quant`, and ``residual``: array, [n, hidden], dtype of `input`.
    Source: flashinfer.norm.fused_add_rmsnorm_quant.
    """
    op = "fused_add_rmsnorm_quant"
    x, r, w = _fused_views(op, input, residual, weight)
    check_dtype(op, "input", x, HALF_TYPES)
    o, s = _fp8_out(op, out, x), _scale(op, scale, x)
    if x.is_cpu:
        normed, total = reference.norm.fused_add_rmsnorm_quant(
            x.numpy(), r.numpy(), w.numpy(), _host_scale(s), eps, out_dtype=o.dtype.np
        )
        o.write(normed)
        r.write(total)
    else:
        _launch(x, w, o, eps, enable_pdl, residual=r, scale=s)


def layernorm_quant(out: Any, input: Any, gemma: Any, beta: Any, scale: Any, eps: float = 1e-6) -> None:
    """Layer normalisation with fp8 output: ``out = clamp(layernorm(input) / scale)``.

    Parameters
    ----------
    out, scale
        As in `rmsnorm_quant`: the result is *divided* by the scale.
    input, gemma, beta, eps
        As in `layernorm`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    flashinfer.norm.layernorm_quant.

    Examples
    --------
    >>> import ml_dtypes, numpy as np, fi_cupy
    >>> out = np.empty((1, 2), ml_dtypes.float8_e4m3fn)
    >>> x, ones, zeros = np.array([[1.0, 3.0]], np.float16), np.ones(2, np.float32), np.zeros(2, np.float32)
    >>> fi_cupy.layernorm_quant(out, x, ones, zeros, 0.5); out
    array([[-2, 2]], dtype='float8_e4m3fn')
    """
    op = "layernorm_quant"
    x, g, b = _layer_views(op, input, gemma, beta)
    o, s = _fp8_out(op, out, x), _scale(op, scale, x)
    if x.is_cpu:
        o.write(
            reference.norm.layernorm_quant(x.numpy(), g.numpy(), b.numpy(), _host_scale(s), eps, out_dtype=o.dtype.np)
        )
    else:
        _launch(x, g, o, eps, False, bias=b, scale=s)
