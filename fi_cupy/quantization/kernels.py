"""The kernels of the casts to 8 and 4 bits and back: which instance a call takes, and its launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_shape
from fi_cupy.dtypes import (
    FLOAT_TYPES,
    DType,
    bfloat16,
    float8_e4m3fn,
    float8_e5m2,
    float16,
    float32,
    int8,
    uint8,
)
from fi_cupy.errors import LayoutError, ShapeError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import CppValue, KernelSpec
from fi_cupy.prefill_kernel import fast_div
from fi_cupy.workspace import device_of

#: Two values a byte; no framework has the type, so arrays of it are bytes.
float4_e2m1fn = DType("float4_e2m1fn", "e2m1", "fi::E2m1", 1, uint8.np)
#: What a cast can give, with the bits a value takes.
BITS = {float8_e4m3fn: 8, float8_e5m2: 8, int8: 8, float4_e2m1fn: 4}


def _divisor(name: str) -> list[tuple[str, str]]:
    return [(f"{name}.{field}", "u32") for field in ("divisor", "magic", "shift")]


_ROWS = ParamsStruct(
    "QuantizeParams",
    [
        ("x", "ptr"),
        ("q", "ptr"),
        ("scales", "ptr"),
        ("given", "ptr"),
        ("x_stride", "i32"),
        ("scale_stride_token", "i32"),
        ("scale_stride_group", "i32"),
        ("rows", "u32"),
        *_divisor("groups"),
        ("tokens", "u32"),
        ("width", "u32"),
        ("group", "u32"),
        ("eps", "f32"),
        ("given_value", "f32"),
    ],
)
_BLOCKS = ParamsStruct(
    "QuantizeBlocksParams",
    [
        ("x", "ptr"),
        ("q", "ptr"),
        ("scales", "ptr"),
        ("x_stride_batch", "i64"),
        ("x_stride_row", "i64"),
        ("scale_stride_batch", "i64"),
        ("scale_stride_row", "i64"),
        ("scale_stride_column", "i64"),
        *_divisor("row_blocks"),
        *_divisor("column_blocks"),
        ("rows", "u32"),
        ("columns", "u32"),
        ("eps", "f32"),
    ],
)
_AMAX = ParamsStruct(
    "AbsoluteMaxParams",
    [("x", "ptr"), ("result", "ptr"), ("x_stride", "i64"), ("vectors", "u64"), ("row_vectors", "u32")],
)
_TILE = ParamsStruct(
    "TileScalesParams",
    [
        ("x", "ptr"),
        ("out", "ptr"),
        ("x_stride_batch", "i64"),
        ("x_stride_row", "i64"),
        ("words", "u32"),
        *_divisor("row_words"),
        *_divisor("padded_rows"),
        ("rows", "u32"),
        ("columns", "u32"),
    ],
)
_DEQUANTIZE = ParamsStruct(
    "DequantizeParams",
    [
        ("q", "ptr"),
        ("scales", "ptr"),
        ("out", "ptr"),
        ("given", "ptr"),
        ("q_stride_batch", "i64"),
        ("q_stride_row", "i64"),
        ("scale_stride_batch", "i64"),
        ("scale_stride_row", "i64"),
        ("scale_stride_column", "i64"),
        ("vectors", "u64"),
        *_divisor("row_vectors"),
        ("rows", "u32"),
        ("width", "u32"),
        ("block_rows", "u32"),
        ("block_columns", "u32"),
        ("padded_columns", "u32"),
        ("given_value", "f32"),
    ],
)

#: How a scale comes about -> the enumerator in kernels/quantize.cuh.
_MODES = {
    "float": "kFloat", "power": "kPowerOfTwo", "e8m0": "kE8m0", "e4m3": "kE4m3", "given": "kGiven", "tensor": "kTensor",
}  # fmt: skip
_SCALES = {"float": "kFloat", "e8m0": "kE8m0", "e4m3": "kE4m3"}
_THREADS = 256
#: fast_div's dividends end here.
_MOST = 1 << 31


def _lanes(vectors: int) -> int:
    """Threads of a group: a vector each until 256, then up to four vectors each, then more threads."""
    lanes = 1
    while lanes < vectors and lanes < 256:
        lanes *= 2
    while lanes < 1024 and -(-vectors // lanes) > 4:
        lanes *= 2
    return lanes


def _blocks(threads: int, vecs: int) -> int:
    """CTAs of a group each on a multiprocessor: five of 48 registers a thread; four lose 5 %, seven spill (H100)."""
    return 1280 // threads if vecs <= 2 and threads <= 256 else 0


@lru_cache(maxsize=512)
def rows_spec(
    dtype: DType, out: DType, mode: str, group: int, vec: int, *, tile: int = 0, gated: bool = False, rows: int = 2
) -> KernelSpec:
    """The kernel that casts groups of `group` elements, `vec` an access, `rows` groups a thread.

    Two groups a thread keep 32 bytes in flight, and 32 KB or more a multiprocessor; four gain nothing (H100) but where
    the scale is given, which leaves so many threads that they are slower. Groups of more than a warp are one CTA's,
    which has them in registers up to 32,768 elements.
    """
    vectors = -(-group // vec)
    lanes = _lanes(vectors)
    vecs = 1
    if (
        vectors == 2 and BITS[out] == 4
    ):  # such a group's scale and place cost as much as its values: one thread computes it
        lanes, vecs = 1, 2
    while vecs < 4 and vecs * lanes < vectors:
        vecs *= 2
    threads = _THREADS if lanes <= 32 else lanes
    if lanes > 32:
        rows = 1
    name = ("silu_and_mul_" if gated else "") + f"quantize_{mode}"
    return KernelSpec(
        symbol=f"{name}_{dtype.tag}_{out.tag}{f'_s{tile}' if tile else ''}_v{vec}x{vecs}x{rows}_t{lanes}",
        header="quantize.cuh",
        function="quantize_rows",
        params=_ROWS,
        config=(
            ("T", dtype),
            ("O", out),
            ("kMode", CppValue(f"fi::ScaleMode::{_MODES[mode]}")),
            ("kTile", tile),
            ("kGated", gated),
            ("kVec", vec),
            ("kVecs", vecs),
            ("kRows", rows),
            ("kLanes", lanes),
            ("kThreads", threads),
        ),
        threads=threads,
        min_blocks=_blocks(threads, vecs) if lanes > 32 else 0,
        spills="up to 8 bytes for sm_120, at the registers that are fastest on sm_90" if lanes > 32 else "",
    )


@lru_cache(maxsize=64)
def blocks_spec(dtype: DType, out: DType, mode: str, tile_rows: int, tile_columns: int, vec: int) -> KernelSpec:
    """The kernel that casts tiles, all of one in the registers of 256 threads."""
    return KernelSpec(
        symbol=f"quantize_blocks_{mode}_{dtype.tag}_{out.tag}_{tile_rows}x{tile_columns}_v{vec}",
        header="quantize.cuh",
        function="quantize_blocks",
        params=_BLOCKS,
        config=(
            ("T", dtype),
            ("O", out),
            ("kMode", CppValue(f"fi::ScaleMode::{_MODES[mode]}")),
            ("kTileRows", tile_rows),
            ("kTileColumns", tile_columns),
            ("kVec", vec),
            ("kThreads", _THREADS),
        ),
        threads=_THREADS,
        min_blocks=2,  # said so that ptxas has registers
    )


@lru_cache(maxsize=64)
def amax_spec(dtype: DType, vec: int) -> KernelSpec:
    """The kernel that finds an array's largest magnitude."""
    return KernelSpec(
        symbol=f"absolute_max_{dtype.tag}_v{vec}",
        header="quantize.cuh",
        function="absolute_max",
        params=_AMAX,
        config=(("T", dtype), ("kVec", vec), ("kUnroll", 4), ("kThreads", _THREADS)),
        threads=_THREADS,
    )


@lru_cache(maxsize=128)
def dequantize_spec(code: DType, out: DType, scale: str, tile: int, vec: int) -> KernelSpec:
    """The kernel that multiplies codes by their scales."""
    return KernelSpec(
        symbol=f"dequantize_{code.tag}_{scale}{f'_s{tile}' if tile else ''}_{out.tag}_v{vec}",
        header="dequantize.cuh",
        function="dequantize",
        params=_DEQUANTIZE,
        config=(
            ("O", code),
            ("T", out),
            ("kScale", CppValue(f"fi::ScaleType::{_SCALES[scale]}")),
            ("kTile", tile),
            ("kVec", vec),
            ("kUnroll", 4),
            ("kThreads", _THREADS),
        ),
        threads=_THREADS,
    )


@lru_cache(maxsize=1)
def tile_spec() -> KernelSpec:
    """The kernel that moves scales into tiles of 128 rows."""
    return KernelSpec(
        symbol="tile_scales_s128",
        header="quantize.cuh",
        function="tile_scales",
        params=_TILE,
        config=(("kTile", 128), ("kThreads", _THREADS)),
        threads=_THREADS,
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: what a block-scaled fp8 layer takes in bf16, one of each other format."""
    e4m3 = float8_e4m3fn
    return [
        *(rows_spec(bfloat16, e4m3, "float", 128, 8, rows=rows) for rows in (1, 2)),
        rows_spec(bfloat16, e4m3, "float", 128, 8, gated=True),
        rows_spec(bfloat16, e4m3, "float", 4096, 8),
        rows_spec(bfloat16, e4m3, "given", 128, 8, rows=4),
        rows_spec(bfloat16, e4m3, "given", 128, 8, gated=True),
        rows_spec(float16, int8, "float", 128, 8),
        rows_spec(bfloat16, e4m3, "e8m0", 32, 8, tile=128),
        rows_spec(bfloat16, float4_e2m1fn, "e4m3", 16, 8, tile=128),
        blocks_spec(bfloat16, e4m3, "power", 128, 128, 8),
        amax_spec(bfloat16, 8),
        tile_spec(),
        dequantize_spec(float4_e2m1fn, float32, "e4m3", 128, 4),
    ]


def token_rows(op: str, name: str, x: View) -> tuple[int, int]:
    """(tokens, stride between them in elements) of an array whose leading dimensions lie as one."""
    tokens, stride = 1, 0
    for extent, step in zip(reversed(x.shape[:-1]), reversed(x.strides[:-1]), strict=True):
        if extent == 1:
            continue
        if tokens == 1:
            stride = step
        elif step != stride * tokens and x.size:
            raise LayoutError(
                f"{op}: {name} has strides {x.strides} (elements), expected leading dimensions that lie as one; "
                "pass a copy"
            )
        tokens *= extent
    return tokens, stride


def vector(itemsize: int, addresses: int, extents: int, most: int = 16) -> int:
    """Elements an access: the largest power of two, up to `most` bytes, that divides addresses and extents."""
    common = addresses | extents * itemsize | most
    return (common & -common) // itemsize or 1


def _rows(mode: str, gated: bool, small: bool) -> int:
    """Groups a thread: one spreads a decode step over more multiprocessors."""
    if small:
        return 1
    return 4 if mode in ("given", "tensor") and not gated else 2


def quantize_rows(
    op: str,
    x: View,
    q: View,
    scales: View | None,
    *,
    out: DType,
    mode: str,
    group: int,
    scale_strides: tuple[int, int] = (0, 0),
    tile: int = 0,
    padded: tuple[int, int] | None = None,
    gated: bool = False,
    given: View | float = 1.0,
    eps: float = 0.0,
    pdl: bool = False,
) -> None:
    """Cast the rows of `x` to `q` (dense) group by group.

    Parameters
    ----------
    x : [..., width], or [..., 2 * width] where `gated`
    scales : of each group at ``token * scale_strides[0] + group * scale_strides[1]``, or in tiles of `tile` rows
    padded : (tokens, groups) that have a place among the tiles
    given : what the mode takes besides the group's magnitude
    """
    tokens, stride = token_rows(op, "input", x)
    width = x.shape[-1] // 2 if gated else x.shape[-1]
    group = min(group, width) or 1
    groups = -(-width // group)
    padded_tokens, padded_groups = padded or (tokens, groups)
    rows = padded_tokens * padded_groups
    if rows >= _MOST or tokens >= _MOST:
        raise ShapeError(f"{op}: input has {rows} groups in {tokens} rows, expected less than 2^31")
    if max(abs(stride), *scale_strides) >= _MOST:
        raise LayoutError(f"{op}: input has rows {stride} elements apart, expected less than 2^31")
    once = scales is not None and mode in ("given", "tensor")  # written even if there is nothing to cast
    if rows == 0 and not once:
        return
    size = x.dtype.itemsize
    vec = vector(size, x.ptr, stride | width | (group if groups > 1 else 0))
    vec = min(vec, vector(1, q.ptr, 0) * 8 // BITS[out])
    if BITS[out] == 4 and vec == 1:
        raise LayoutError(f"{op}: input starts at address ...{x.ptr % 256:#x}, expected a multiple of {2 * size} bytes")
    small = rows * group * size < 1 << 23
    spec = rows_spec(x.dtype, out, mode, group, vec, tile=tile, gated=gated, rows=_rows(mode, gated, small))
    config: dict[str, Any] = dict(spec.config)
    per_cta = spec.threads // config["kLanes"] * config["kRows"]
    on_device = isinstance(given, View)
    load_kernel(spec, x.device).launch(
        max(-(-rows // per_cta), int(once)), x.stream(), x.ptr, q.ptr, 0 if scales is None else scales.ptr,
        given.ptr if on_device else 0,  # type: ignore[union-attr]
        stride, *scale_strides, rows, *fast_div(max(padded_groups, 1)), tokens, width, group, eps,
        1.0 if on_device else given, pdl=pdl,
    )  # fmt: skip


def quantize_blocks(
    x: View, q: View, scales: View, *, out: DType, mode: str, tile: tuple[int, int], eps: float, transposed: bool
) -> None:
    """Cast [batch, rows, columns] (or two dimensions) tile by tile; `transposed`: the scales' last axes are swapped."""
    batch, rows, columns = (1, *x.shape) if len(x.shape) == 2 else x.shape
    batch_stride, row_stride = (0, x.strides[0]) if len(x.shape) == 2 else x.strides[:2]
    across = (-(-rows // tile[0]), -(-columns // tile[1]))
    if batch * across[0] * across[1] == 0:
        return
    size = x.dtype.itemsize
    vec = vector(size, x.ptr, batch_stride | row_stride | columns)
    vec = min(vec, vector(1, q.ptr, 0))
    load_kernel(blocks_spec(x.dtype, out, mode, *tile, vec), x.device).launch(
        batch * across[0] * across[1], x.stream(), x.ptr, q.ptr, scales.ptr, batch_stride, row_stride,
        across[0] * across[1], 1 if transposed else across[1], across[0] if transposed else 1,
        *fast_div(across[0]), *fast_div(across[1]), rows, columns, eps,
    )  # fmt: skip


def tile_scales(op: str, x: View, out: View) -> None:
    """Move scale bytes [batch, rows, columns] (or two dimensions) into tiles of 128 rows by 4, padded with zeros."""
    batch, rows, columns = (1, *x.shape) if len(x.shape) == 2 else x.shape
    batch_stride, row_stride = (0, x.strides[0]) if len(x.shape) == 2 else x.strides[:2]
    padded_rows, row_words = -(-rows // 128) * 128, -(-columns // 4)
    words = batch * padded_rows * row_words
    if words >= _MOST:
        raise ShapeError(f"{op}: unswizzled_sf has shape {x.shape}, expected less than 2^33 bytes")
    load_kernel(tile_spec(), x.device).launch(
        -(-words // _THREADS), x.stream(), x.ptr, out.ptr, batch_stride, row_stride, words,
        *fast_div(row_words or 1), *fast_div(padded_rows or 1), rows, columns,
    )  # fmt: skip


def absolute_max(op: str, x: View) -> View:
    """The largest magnitude of `x` as one float32 on its device; NaN where x has one."""
    from cupy.cuda import runtime

    tokens, stride = token_rows(op, "input", x)
    result = x.empty((1,), float32)
    with device_of(x):
        runtime.memsetAsync(result.ptr, 0, 4, x.stream())
    launch_absolute_max(x, result, tokens, stride)
    return result


def launch_absolute_max(x: View, result: View, tokens: int, stride: int) -> None:
    """Raise `result`, which holds 0, to the largest magnitude."""
    width = x.shape[-1]
    vec = vector(x.dtype.itemsize, x.ptr, stride | width)
    vectors = tokens * (width // vec)
    load_kernel(amax_spec(x.dtype, vec), x.device).launch(
        -(-vectors // (_THREADS * 4)), x.stream(), x.ptr, result.ptr, stride, vectors, width // vec or 1
    )


def dequantize(
    op: str,
    q: View,
    scales: View,
    out: View,
    *,
    code: DType,
    scale: str,
    block: tuple[int, int],
    scale_strides: tuple[int, int, int] = (0, 0, 0),
    tile: int = 0,
    padded_columns: int = 0,
    given: View | float = 1.0,
) -> None:
    """Write ``code * scale * given`` to `out` (dense, two or three dimensions); `block` is what a scale is for."""
    batch, rows, width = (1, *out.shape) if len(out.shape) == 2 else out.shape
    batch_stride, row_stride = (0, q.strides[0]) if len(q.shape) == 2 else q.strides[:2]
    bits = BITS[code]
    common = q.ptr | batch_stride | row_stride | 8
    most = (common & -common) * 8 // bits
    vec = 16 // out.dtype.itemsize
    while vec > 1 and (width % vec or vec > most or block[1] % vec):
        vec //= 2
    vectors = batch * rows * (width // vec)
    if vectors == 0:
        return
    if vectors >= _MOST:
        raise ShapeError(f"{op}: {out.shape} values are more than the kernel's {_MOST * vec}")
    on_device = isinstance(given, View)
    load_kernel(dequantize_spec(code, out.dtype, scale, tile, vec), q.device).launch(
        -(-vectors // (_THREADS * 4)), q.stream(), q.ptr, scales.ptr, out.ptr,
        given.ptr if on_device else 0,  # type: ignore[union-attr]
        batch_stride, row_stride, *scale_strides, vectors, *fast_div(width // vec), rows, width, *block,
        padded_columns, 1.0 if on_device else given,
    )  # fmt: skip


def float_input(op: str, x: Any, name: str = "x", least: int = 1) -> View:
    """A floating array of at least `least` dimensions, the last one dense."""
    v = view(x, op, name)
    if len(v.shape) < least:
        raise ShapeError(f"{op}: {name} is {v.ndim}-D {v.shape}, expected at least {least}-D")
    check_dtype(op, name, v, FLOAT_TYPES)
    check_inner(op, name, v)
    return v


def one_number(op: str, name: str, value: Any, x: View) -> float | View:
    """A number, or an array of one float32 on the device of `x`."""
    if isinstance(value, (int, float, np.floating)):
        return float(value)
    s = view(value, op, name)
    if s.size != 1:
        check_shape(op, name, s, (1,))
    check_dtype(op, name, s, (float32,))
    check_device(op, x, **{name: s})
    return s


def host_number(given: float | View) -> float:
    """The number, where it is one or lies in an array on the CPU."""
    return float(given.numpy().reshape(-1)[0]) if isinstance(given, View) else given


def dense_out(op: str, name: str, given: Any, shape: tuple[int, ...], kinds: tuple[DType, ...], x: View) -> View:
    """A caller's dense output; bytes stand for the first of `kinds`."""
    o = view(given, op, name).writable(op, name)
    check_shape(op, name, o, shape)
    check_dtype(op, name, o, (*kinds, uint8))
    check_device(op, x, **{name: o})
    check_inner(op, name, o)
    if not o.contiguous:
        raise LayoutError(f"{op}: {name} has strides {o.strides} (elements), expected a dense array")
    return o.typed(kinds[0]) if o.dtype is uint8 and kinds[0].itemsize == 1 else o
