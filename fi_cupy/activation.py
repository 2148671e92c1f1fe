"""Gated activations: SiLU, GELU and its tanh form, multiplied with the second half of the input."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_shape
from fi_cupy.dtypes import FLOAT_TYPES, FP8_TYPES, DType, bfloat16, float16, float32, int8
from fi_cupy.errors import ArgumentError, ShapeError, UnsupportedError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import CppType, KernelSpec, UserSource
from fi_cupy.quantization import kernels as quantize

_PARAMS = ParamsStruct(
    "ActivationParams",
    [
        ("input", "ptr"),
        ("output", "ptr"),
        ("in_stride_outer", "i64"),
        ("in_stride_inner", "i64"),
        ("out_stride_outer", "i64"),
        ("out_stride_inner", "i64"),
        ("vectors", "u64"),
        ("rows", "u32"),
        ("inner", "u32"),
        ("hidden", "u32"),
    ],
)

#: Name in the symbol -> functor in kernels/activation.cuh.
_ACTS = {"silu": "fi::Silu", "gelu": "fi::Gelu", "gelu_tanh": "fi::GeluTanh"}
_THREADS = 128
#: From this many vectors on (12 MB moved) there are CTAs enough for two vectors a thread.
_UNROLL_FROM = 1 << 18


@lru_cache(maxsize=256)
def activation_spec(act: str, dtype: DType, vec: int, unroll: int = 2, user: UserSource | None = None) -> KernelSpec:
    """The kernel of one activation: `vec` elements an access, `unroll` vectors a thread; `user`: the caller's text.

    With two, a thread has 64 bytes of loads in flight and a multiprocessor some 100 KB, several times what the
    memory's latency needs.
    """
    return KernelSpec(
        symbol=f"{act}_and_mul_{'user_' if user else ''}{dtype.tag}_v{vec}x{unroll}",
        header="activation.cuh",
        function="act_and_mul",
        params=_PARAMS,
        config=(
            ("T", dtype),
            ("Act", CppType("fi::UserAct" if user else _ACTS[act])),
            ("kVec", vec),
            ("kUnroll", unroll),
            ("kThreads", _THREADS),
        ),
        threads=_THREADS,
        user=user,
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances."""
    halves = [activation_spec(a, t, 8, u) for a in _ACTS for t in (bfloat16, float16) for u in (1, 2)]
    return halves + [activation_spec(a, float32, 4) for a in _ACTS]


def _row_dims(x: View, o: View) -> list[tuple[int, int, int]]:
    """(extent, input stride, output stride) of the leading dimensions, neighbours merged where both arrays allow."""
    dims: list[tuple[int, int, int]] = []
    for extent, a, b in zip(x.shape[:-1], x.strides[:-1], o.strides[:-1], strict=True):
        if extent == 1:
            continue
        if dims and dims[-1][1] == a * extent and dims[-1][2] == b * extent:
            dims[-1] = (dims[-1][0] * extent, a, b)
        else:
            dims.append((extent, a, b))
    return dims


def _launch(act: str, x: View, o: View, enable_pdl: bool | None, user: UserSource | None) -> None:
    hidden = o.shape[-1]
    size = x.dtype.itemsize
    dims = [(x.shape[0], x.strides[0], o.strides[0])] if len(x.shape) == 2 else _row_dims(x, o)
    rows, steps = 1, hidden
    for _, a, b in dims:
        steps |= a | b
    for extent, _, _ in dims[-2:]:
        rows *= extent
    # The largest power of two, up to 16 bytes, that divides every address.
    common = x.ptr | o.ptr | steps * size | 16
    vec = (common & -common) // size or 1
    vectors = rows * (hidden // vec)
    unroll = 2 if vectors >= _UNROLL_FROM else 1
    kernel = load_kernel(activation_spec(act, x.dtype, vec, unroll, user), x.device)
    grid = -(-vectors // (_THREADS * unroll))
    stream, pdl = x.stream(), enable_pdl
    inner, x_inner, o_inner = dims[-1] if dims else (1, 0, 0)
    _, x_outer, o_outer = dims[-2] if len(dims) > 1 else (1, 0, 0)
    for x_offset, o_offset in _offsets(dims[:-2]):
        kernel.launch(
            grid, stream, x.ptr + x_offset * size, o.ptr + o_offset * size, x_outer, x_inner, o_outer, o_inner,
            vectors, rows, inner, hidden, pdl=pdl,
        )  # fmt: skip


def _offsets(dims: list[tuple[int, int, int]]) -> list[tuple[int, int]]:
    """(input, output) offsets of all indices of `dims`: a kernel walks two row dimensions, the host any others."""
    offsets = [(0, 0)]
    for extent, a, b in dims:
        offsets = [(x + i * a, o + i * b) for x, o in offsets for i in range(extent)]
    return offsets


def _act_and_mul(
    act: str, run: Callable[[Any], Any], input: Any, out: Any, enable_pdl: bool | None, user: UserSource | None = None
) -> Any:
    op = f"{act}_and_mul"
    x = view(input, op, "input")
    shape = x.shape
    if not shape or shape[-1] % 2 or shape[-1] * x.dtype.itemsize % 16:
        raise ShapeError(
            f"{op}: input has shape {shape} of {x.dtype.name}, expected an even last dimension whose bytes are a "
            "multiple of 16"
        )
    check_dtype(op, "input", x, FLOAT_TYPES)
    check_inner(op, "input", x)
    out_shape = (*shape[:-1], shape[-1] // 2)
    if out is None:
        o = x.empty(out_shape)
    else:
        o = view(out, op, "out").writable(op, "out")
        check_shape(op, "out", o, out_shape, "= input.shape with the last dimension halved")
        check_dtype(op, "out", o, (x.dtype,), "like input")
        check_device(op, x, out=o)
        check_inner(op, "out", o)
    if x.is_cpu:
        o.write(run(x.numpy()))
    else:
        _launch(act, x, o, enable_pdl, user)
    return o.result() if out is None else out


def silu_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """SiLU of the first half of the last dimension times the second: ``x * sigmoid(x) * up``.

    Parameters
    ----------
    input : array, [..., 2 * hidden], float16, bfloat16 or float32
        ``input[..., :hidden]`` is the gate x, ``input[..., hidden:]`` is up. Rows may be strided; the last dimension
        must be dense, and its bytes a multiple of 16.
    out : array, [..., hidden], optional
        Written and returned instead of a new array; dtype of `input`, rows may be strided.
    enable_pdl : bool, optional
        Launch so that this kernel may start before its predecessor has ended, which it waits for before it touches
        memory (sm_90 and later). None: where the device has it.

    Returns
    -------
    array
        ``[..., hidden]`` in the dtype of `input`; computed in fp32, rounded once.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    Shazeer 2020 (arXiv:2002.05202); flashinfer.activation.silu_and_mul.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.activation import silu_and_mul
    >>> x = np.array([[1.0, -1.0, 2.0, 2.0]], np.float32)
    >>> silu_and_mul(x).round(4)
    array([[ 1.4621, -0.5379]], dtype=float32)
    """
    return _act_and_mul("silu", reference.activation.silu_and_mul, input, out, enable_pdl)


def gelu_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """Exact GELU of the first half times the second: ``x / 2 * (1 + erf(x / sqrt(2))) * up``.

    Parameters, result and errors as in `silu_and_mul`. Source: flashinfer.activation.gelu_and_mul.
    """
    return _act_and_mul("gelu", reference.activation.gelu_and_mul, input, out, enable_pdl)


def gelu_tanh_and_mul(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
    """Tanh GELU of the first half times the second: ``x / 2 * (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) * up``.

    Parameters, result and errors as in `silu_and_mul`. Source: flashinfer.activation.gelu_tanh_and_mul.
    """
    return _act_and_mul("gelu_tanh", reference.activation.gelu_tanh_and_mul, input, out, enable_pdl)


def _user_source(name: str, cuda: str) -> UserSource:
    """The functor that calls the caller's function."""
    if not name.isascii() or not name.isidentifier():
        raise ArgumentError(f"define_activation: name is {name!r}, expected an identifier")
    if not re.search(rf"\b{name}\s*\(", cuda):
        raise ArgumentError(f"define_activation: cuda has no function {name}, expected __device__ float {name}(float)")
    functor = f"template <bool> FI_DEVICE static float apply(float x) {{ return {name}(x); }}"
    return UserSource("activation", name, f'{cuda}\n#line 1 "fi_cupy, for {name}"\nstruct UserAct {{ {functor} }};')


def act_specs(name: str, cuda: str | None = None) -> list[KernelSpec]:
    """The canonical instances of one activation; `cuda` as in `define_activation`."""
    if cuda is None and name not in _ACTS:
        raise ArgumentError(f"act_and_mul: {name!r} is none of {', '.join(_ACTS)}, and its CUDA text is missing")
    user = None if cuda is None else _user_source(name, cuda)
    halves = [activation_spec(name, t, 8, unroll, user) for t in (bfloat16, float16) for unroll in (1, 2)]
    return [*halves, activation_spec(name, float32, 4, 2, user)]


def define_activation(
    name: str, cuda: str, reference: Callable[[np.ndarray[Any, Any]], Any] | None = None
) -> Callable[..., Any]:
    """A gated activation of one's own: an operator like `silu_and_mul`, its activation given as CUDA text.

    Parameters
    ----------
    name : str
        Of the function in the text; the operator is called ``<name>_and_mul``.
    cuda : str
        ``__device__ float <name>(const float& x) {...}``, and whatever it needs; ``math::tanh``, ``math::ptx_exp2``,
        ``math::log2e`` and the like are there. An error in it is a `CompileError` that names its line.
    reference : function, optional
        The same in NumPy, of and to float32 arrays, for CPU arrays; without it those raise `UnsupportedError`.

    Returns
    -------
    function
        ``(input, out=None, enable_pdl=None)``: ``f(input[..., :hidden]) * input[..., hidden:]``, as `silu_and_mul`.

    Raises
    ------
    ArgumentError
        The name is no identifier, or the text has no such function.

    Source
    ------
    flashinfer.jit.gen_act_and_mul_module.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.activation import define_activation
    >>> text = "__device__ float relu2(const float& x) { return x > 0.f ? x * x : 0.f; }"
    >>> relu2_and_mul = define_activation("relu2", text, lambda x: np.maximum(x, 0) ** 2)
    >>> relu2_and_mul(np.array([[3.0, -1.0, 2.0, 2.0]], np.float32))
    array([[18.,  0.]], dtype=float32)
    """
    source = _user_source(name, cuda)

    def run(x: np.ndarray[Any, Any]) -> Any:
        if reference is None:
            raise UnsupportedError(
                f"{name}_and_mul: it is CUDA text, which CPU arrays cannot run; give define_activation a reference"
            )
        gate, up = np.split(x.astype(np.float32), 2, axis=-1)
        return (np.asarray(reference(gate), np.float32) * up).astype(x.dtype)

    def operator(input: Any, out: Any = None, enable_pdl: bool | None = None) -> Any:
        return _act_and_mul(name, run, input, out, enable_pdl, source)

    operator.__name__ = operator.__qualname__ = f"{name}_and_mul"
    operator.__doc__ = f"{name} of the first half of the last dimension times the second; see `silu_and_mul`."
    return operator


def silu_and_mul_quant(out: Any, input: Any, scale: Any, enable_pdl: bool | None = None) -> None:
    """`silu_and_mul` cast to 8 bits with one scale: ``out = clamp(silu(gate) * up / scale)``.

    For a scale a group see `quantization.per_token_group_quant_8bit` with ``fuse_silu_and_mul=True``, for NVFP4
    `quantization.silu_and_mul_nvfp4_quantize`.

    Parameters
    ----------
    out : array, [..., hidden], float8_e4m3fn, float8_e5m2, int8, or uint8 (bytes of e4m3), dense
        Overwritten.
    input : array, [..., 2 * hidden], float16, bfloat16 or float32
        The gate, then up; the leading dimensions must lie as one.
    scale : float, or array of one float32 on the device of `input`
        The quantisation step: the result is *divided* by it.
    enable_pdl : bool, optional
        As in `silu_and_mul`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    vLLM: silu_and_mul_quant.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.activation import silu_and_mul_quant
    >>> out = np.empty((1, 2), np.int8)
    >>> silu_and_mul_quant(out, np.array([[1.0, -1.0, 2.0, 2.0]], np.float32), 0.25); out
    array([[ 6, -2]], dtype=int8)
    """
    op = "silu_and_mul_quant"
    x = view(input, op, "input")
    shape = x.shape
    if not shape or shape[-1] % 2:
        raise ShapeError(f"{op}: input has shape {shape}, expected an even last dimension")
    check_dtype(op, "input", x, FLOAT_TYPES)
    check_inner(op, "input", x)
    o = quantize.dense_out(op, "out", out, (*shape[:-1], shape[-1] // 2), (*FP8_TYPES, int8), x)
    given = quantize.one_number(op, "scale", scale, x)
    if x.is_cpu:
        y = reference.activation.silu_and_mul(x.numpy().astype(np.float32))
        o.write(reference.quantization.static_quant(y, quantize.host_number(given), o.dtype.np))
    else:
        quantize.quantize_rows(
            op, x, o, None, out=o.dtype, mode="given", group=128, given=given, gated=True, pdl=bool(enable_pdl)
        )
