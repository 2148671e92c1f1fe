"""Casting new tokens on their way into a paged cache of 8 bits an element: types, scales, and the launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner
from fi_cupy.dtypes import FLOAT_TYPES, FP8_TYPES, DType, bfloat16, float8_e4m3fn, float32, int8, uint8
from fi_cupy.errors import ArgumentError, DTypeError, ShapeError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.reference import quantization as reference

APPEND_FIELDS = [
    ("a", "ptr"),
    ("b", "ptr"),
    ("a_cache", "ptr"),
    ("b_cache", "ptr"),
    ("batch_indices", "ptr"),
    ("positions", "ptr"),
    ("kv_indices", "ptr"),
    ("kv_indptr", "ptr"),
    ("a_stride_n", "i64"),
    ("a_stride_h", "i64"),
    ("b_stride_n", "i64"),
    ("b_stride_h", "i64"),
    ("a_page", "i64"),
    ("a_row", "i64"),
    ("a_head", "i64"),
    ("b_page", "i64"),
    ("b_row", "i64"),
    ("b_head", "i64"),
    ("tokens", "u32"),
    ("token_vectors", "u32"),
    ("heads", "u32"),
    ("batch", "u32"),
    ("page_size", "u32"),
]
_PARAMS = ParamsStruct(
    "AppendQuantizedParams",
    [
        *((f"to.{name}", kind) for name, kind in APPEND_FIELDS),
        ("a_scale", "ptr"),
        ("b_scale", "ptr"),
        ("a_value", "f32"),
        ("b_value", "f32"),
        ("a_scale_head", "u32"),
        ("b_scale_head", "u32"),
    ],
)
_THREADS = 128


def append_shape(tokens: int, token_vectors: int, unroll: int) -> tuple[int, tuple[int, int, int]]:
    """(threads, grid) of an append kernel whose threads have one place in a token each, of `unroll` tokens."""
    threads = _THREADS
    if threads // 2 < token_vectors < threads:
        threads = -(-token_vectors // 32) * 32
    side = max(1, threads // token_vectors)
    return threads, (-(-tokens // (side * unroll)), -(-token_vectors // threads), 1)


def unroll_of(tokens: int, token_vectors: int) -> int:
    """Tokens a thread: eight keep enough bytes in flight, one spreads a decode step's few over the multiprocessors."""
    return 8 if tokens * token_vectors >= 1 << 17 else 1


@lru_cache(maxsize=256)
def append_spec(
    dtype: DType, cache: DType, dim_a: int, dim_b: int, vec: int, unroll: int, threads: int = _THREADS
) -> KernelSpec:
    """The kernel that casts rows of `dim_a` and `dim_b` elements a head, `vec` an access; `unroll` tokens a thread."""
    return KernelSpec(
        symbol=f"append_quantized_{dtype.tag}_{cache.tag}_{dim_a}_{dim_b}_v{vec}u{unroll}t{threads}",
        header="page.cuh",
        function="append_quantized",
        params=_PARAMS,
        config=(
            ("T", dtype),
            ("O", cache),
            ("kDimA", dim_a),
            ("kDimB", dim_b),
            ("kVec", vec),
            ("kThreads", threads),
            ("kUnroll", unroll),
        ),
        threads=threads,
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: a head dimension of 128, and MLA's 512 + 64."""
    return [
        append_spec(bfloat16, float8_e4m3fn, 128, 128, 8, 8),
        append_spec(bfloat16, float8_e4m3fn, 512, 64, 8, 1, 96),
    ]


class Cast(NamedTuple):
    """One of a call's arrays and its cache, typed; `scale` None copies bytes."""

    new: View
    cache: View
    scale: float | View | None

    def host(self) -> np.ndarray[Any, Any]:
        """The new tokens in the cache's type (arrays in host memory)."""
        x = self.new.numpy()
        if self.scale is None:
            return x
        scale = self.scale.numpy()[:, None] if isinstance(self.scale, View) else self.scale
        return reference.static_quant(x, scale, self.cache.dtype.np)


def cast(op: str, name: str, new: View, cache: View, scale_name: str, scale: Any, heads: int) -> Cast:
    """How `new` gets into its cache: as it is where the types agree (fp8 may travel as bytes), else by a scale."""
    if scale is None:
        if new.dtype is cache.dtype:
            return Cast(new, cache, None)
        if {new.dtype, cache.dtype} <= {uint8, *FP8_TYPES} and uint8 in (new.dtype, cache.dtype):
            return Cast(new.typed(cache.dtype), cache, None)
        raise DTypeError(
            f"{op}: {name} has dtype {new.dtype.name}, expected {cache.dtype.name} like its cache, or {scale_name} "
            "with a cache of 8 bits"
        )
    if new.dtype not in FLOAT_TYPES or cache.dtype not in (*FP8_TYPES, int8, uint8):
        raise DTypeError(
            f"{op}: {name} has dtype {new.dtype.name} and its cache {cache.dtype.name}, expected with {scale_name} "
            "float16, bfloat16 or float32 and float8_e4m3fn, float8_e5m2, int8 or uint8"
        )
    return Cast(
        new, cache.typed(float8_e4m3fn) if cache.dtype is uint8 else cache, _scale(op, scale_name, scale, new, heads)
    )


def _scale(op: str, name: str, value: Any, x: View, heads: int) -> float | View:
    if isinstance(value, (int, float, np.floating)):
        if not 0 < value < float("inf"):
            raise ArgumentError(f"{op}: {name} is {value}, expected a positive number")
        return float(value)
    s = view(value, op, name)
    if s.size != 1 and s.shape != (heads,):
        raise ShapeError(f"{op}: {name} has shape {s.shape}, expected (1,) or ({heads},), one a head")
    check_dtype(op, name, s, (float32,))
    check_device(op, x, **{name: s})
    check_inner(op, name, s)
    return float(s.numpy().reshape(-1)[0]) if s.is_cpu and s.size == 1 else s


def launches(casts: list[Cast]) -> list[list[int]]:
    """Which of a call's arrays share a launch: those copied, and those cast between the same types."""
    groups: dict[Any, list[int]] = {}
    for i, each in enumerate(casts):
        groups.setdefault(each.scale is not None and (each.new.dtype, each.cache.dtype), []).append(i)
    return list(groups.values())


def launch(
    pairs: list[tuple[Cast, int, int, int]], heads: int, page_size: int, table: tuple[View, View, View, View]
) -> None:
    """Launch for one or two arrays with the cache's strides of page, row and head, all of the same types."""
    size = pairs[0][0].new.dtype.itemsize
    dims: list[int] = []
    new_strides: list[int] = []
    cache_strides: list[int] = []
    pointers: list[tuple[int, int]] = []
    common = 16
    for c, *to in pairs:
        dim = c.new.shape[-1]
        strides = (c.new.strides[0] * size, c.new.strides[1] * size if len(c.new.shape) == 3 else 0)
        dims.append(dim)
        new_strides += strides
        cache_strides += to
        pointers.append((c.new.ptr, c.cache.ptr))
        # A cache is written in pieces of a byte an element: `size` times its addresses must be as aligned.
        common |= c.new.ptr | strides[0] | strides[1] | dim * size | c.cache.ptr * size
        for step in to:
            common |= step * size
    vec = (common & -common) // size or 1
    if len(pairs) == 1:
        dims.append(0)
        new_strides += (0, 0)
        cache_strides += (0, 0, 0)
        pointers.append(pointers[0])
    batch_indices, positions, indices, indptr = table
    x = pairs[0][0].new
    tokens, token_vectors = x.shape[0], heads * (sum(dims) // vec)
    if x.shape[0] * token_vectors == 0:
        return
    unroll = unroll_of(tokens, token_vectors)
    threads, grid = append_shape(tokens, token_vectors, unroll)
    scales = [c.scale for c, *_ in pairs] + [1.0] * (2 - len(pairs))
    arrays = [s if isinstance(s, View) else None for s in scales]
    load_kernel(append_spec(x.dtype, pairs[0][0].cache.dtype, *dims, vec, unroll, threads), x.device).launch(
        grid, x.stream(), pointers[0][0], pointers[1][0], pointers[0][1], pointers[1][1],
        batch_indices.ptr, positions.ptr, indices.ptr, indptr.ptr, *new_strides, *cache_strides,
        tokens, token_vectors, heads, indptr.shape[0] - 1, page_size,
        *(0 if s is None else s.ptr for s in arrays), *(1.0 if isinstance(s, View) else s for s in scales),
        *(int(s is not None and s.size > 1) for s in arrays),
    )  # fmt: skip
