"""Rows to fp8 with a multiplier for each 128 elements, for the products that quantise their own operands."""

from __future__ import annotations

from functools import lru_cache

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.dtypes import DType, bfloat16, float8_e4m3fn, float16, float32
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec

_PARAMS = ParamsStruct(
    "QuantiseParams",
    [
        ("x", "ptr"), ("q", "ptr"), ("scale", "ptr"), ("rows", "ptr"), ("x_stride", "i64"), ("q_stride", "i64"),
        ("scale_stride", "i64"), ("m", "u32"), ("k", "u32"), ("divisor", "u32"),
    ],
)  # fmt: skip
_EXPAND = ParamsStruct(
    "ExpandScalesParams",
    [("scale", "ptr"), ("out", "ptr"), ("scale_row", "i64"), ("scale_k", "i64"), ("m", "u32"), ("rows", "u32")],
)
_THREADS = 256
#: Elements under one multiplier.
GROUP = 128


@lru_cache(maxsize=8)
def quantise_spec(dtype: DType, gated: bool = False) -> KernelSpec:
    """The kernel for rows of `dtype`, or for ``silu(gate) * up`` of rows [up, gate]."""
    return KernelSpec(
        symbol=f"quantise_rows_{dtype.tag}{'_gated' * gated}",
        header="gemm/quantise.cuh",
        function="quantise_rows",
        params=_PARAMS,
        config=(("T", dtype), ("kGated", gated), ("kThreads", _THREADS)),
        threads=_THREADS,
    )


@lru_cache(maxsize=1)
def expand_spec() -> KernelSpec:
    """The kernel that writes a block's multiplier once for each of its rows."""
    return KernelSpec(
        symbol="expand_scales",
        header="gemm/expand_scales.cuh",
        function="expand_scales",
        params=_EXPAND,
        config=(("kThreads", _THREADS),),
        threads=_THREADS,
    )


def quantise_specs() -> list[KernelSpec]:
    """The canonical instances."""
    return [quantise_spec(bfloat16), quantise_spec(float16), quantise_spec(bfloat16, True), expand_spec()]


def expand_scales(like: View, scale: View, rows: int) -> View:
    """Multipliers ``[m / rows, blocks]`` of the rows of `like` [m, k] as ``[blocks, m]``, one for each row."""
    m, blocks = like.shape[0], scale.shape[1]
    out = like.empty((blocks, m), float32)
    load_kernel(expand_spec(), like.device).launch(
        (-(-m // _THREADS), blocks, 1), like.stream(), scale.ptr, out.ptr, scale.strides[0], scale.strides[1], m, rows
    )
    return out


def quantise_rows(
    x: View, rows: View | None = None, divisor: int = 1, *, gated: bool = False, pdl: bool = False
) -> tuple[View, View]:
    """e4m3 rows and their multipliers ``[m, k / 128]``: ``scale = max(amax, 1e-10) / 448``, ``q = x / scale``.

    Parameters
    ----------
    x : View, [*, k], bfloat16 or float16 (float32 on the CPU)
        k is a multiple of 128; rows start on 16 bytes.
    rows : View, int32 [m], optional
        Row r of the result is made of row ``rows[r] // divisor`` of `x`; negative entries leave theirs undefined.
    divisor : int
    gated : bool
        `x` is [*, 2 k], up first, and ``silu(gate) * up`` is what becomes fp8 (GPU arrays only).
    pdl : bool
    """
    m, k = x.shape[0] if rows is None else rows.shape[0], x.shape[1] // (2 if gated else 1)
    if x.is_cpu:
        chosen = x.numpy() if rows is None else x.numpy()[rows.numpy().clip(0) // divisor]
        made, scales = reference.quantization.per_token_group_quant_8bit(chosen, GROUP)
        return view(made), view(scales.astype(float32.np))
    q, scale = x.empty((m, k), float8_e4m3fn), x.empty((m, k // GROUP), float32)
    load_kernel(quantise_spec(x.dtype, gated), x.device).launch(
        -(-m * (k // GROUP) * 16 // _THREADS), x.stream(), x.ptr, q.ptr, scale.ptr, 0 if rows is None else rows.ptr,
        x.strides[0], k, k // GROUP, m, k, divisor, pdl=pdl,
    )  # fmt: skip
    return q, scale
