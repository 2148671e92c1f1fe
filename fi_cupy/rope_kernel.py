"""The rope kernel as an operator sees it: its instances, its frequencies, and its launch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np

from fi_cupy import rope_quantize_kernel
from fi_cupy.arrays import View
from fi_cupy.dtypes import DType, bfloat16, float16, float32, int32, int64
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.reference import rope as reference

#: Pairs of features that the parameter struct has frequencies for.
MAX_PAIRS = 128
#: The frequencies travel in the parameters, as opaque blocks of 16: no device table to make, keep or copy.
_BLOCKS = MAX_PAIRS // 16

_PARAMS = ParamsStruct(
    "RopeParams",
    [
        *((f"turns[{16 * i}]", "tensormap") for i in range(_BLOCKS)),
        ("q", "ptr"),
        ("k", "ptr"),
        ("q_out", "ptr"),
        ("k_out", "ptr"),
        ("positions", "ptr"),
        ("indptr", "ptr"),
        ("cos_sin", "ptr"),
        ("q_stride_n", "i64"),
        ("q_stride_h", "i64"),
        ("k_stride_n", "i64"),
        ("k_stride_h", "i64"),
        ("q_out_stride_n", "i64"),
        ("q_out_stride_h", "i64"),
        ("k_out_stride_n", "i64"),
        ("k_out_stride_h", "i64"),
        ("cos_sin_stride", "i64"),
        ("num_qo_heads", "u32"),
        ("num_kv_heads", "u32"),
        ("batch", "u32"),
    ],
)
_NO_TURNS = (bytes(128),) * _BLOCKS
#: Up to this many a thread's own instructions, not the memory, are what takes the time.
_FEW_TOKENS = 256


@lru_cache(maxsize=256)
def rope_spec(
    dtype: DType,
    index: DType,
    rotary_dim: int,
    vec: int,
    threads: int,
    unroll: int = 2,
    *,
    rest: int = 0,
    interleave: bool = False,
    segments: bool = False,
    cache: bool = False,
) -> KernelSpec:
    """The kernel for `rotary_dim` features read `vec` at a time; `rest` features after them are copied.

    A thread takes `unroll` units (two vectors each) of a token at a time.
    """
    form = ("_interleave" if interleave else "") + ("_segments" if segments else "") + ("_cache" if cache else "")
    form += f"_{dtype.tag}_{index.tag}_d{rotary_dim}" + (f"r{rest}" if rest else "")
    return KernelSpec(
        symbol=f"rope{form}_v{vec}_t{threads}u{unroll}",
        header="rope.cuh",
        function="rope",
        params=_PARAMS,
        config=(
            ("T", dtype),
            ("I", index),
            ("kRotaryDim", rotary_dim),
            ("kVec", vec),
            ("kRest", rest),
            ("kThreads", threads),
            ("kUnroll", unroll),
            ("kInterleave", interleave),
            ("kSegments", segments),
            ("kCache", cache),
        ),
        threads=threads,
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances."""
    specs = []
    for dtype, shapes in ((bfloat16, ((64, 12), (128, 40))), (float16, ((128, 40),))):
        for dim, heads in shapes:
            threads = threads_of(heads * dim // 16)
            specs.append(rope_spec(dtype, int32, dim, 8, threads))
            if dtype is float16:  # the same code but for the conversions
                continue
            specs.append(rope_spec(dtype, int64, dim, 8, threads))
            specs.append(rope_spec(dtype, int32, dim, 8, threads, interleave=True))
            specs.append(rope_spec(dtype, int32, dim, 8, threads, segments=True))
            specs.append(rope_spec(dtype, int64, dim, 8, threads, cache=True))
            specs.append(rope_spec(dtype, int64, dim, 8, threads, cache=True, interleave=True))
    specs.append(rope_spec(bfloat16, int32, 128, 8, *shape_of(1, 320)[:2]))
    specs.append(rope_spec(float32, int32, 128, 4, 256))
    specs.append(rope_spec(bfloat16, int32, 64, 8, 96, rest=64))
    return specs + rope_quantize_kernel.kernel_specs()


def threads_of(units: int) -> int:
    """Threads of a token's CTA: two units a thread, as few rounds as 256 threads allow, all of them full."""
    rounds = max(1, -(-units // 512))
    return max(32, -(-units // (64 * rounds)) * 32)


def shape_of(tokens: int, units: int) -> tuple[int, int, int]:
    """(threads, units a thread at a time, CTAs a token). Few tokens: small CTAs of one unit a thread, many a token."""
    if tokens <= _FEW_TOKENS:
        return 64, 1, -(-units // 64)
    return threads_of(units), 2, 1


def model_specs(rotary_dim: int, units: int) -> list[KernelSpec]:
    """The kernels of few and of many tokens that a bf16 model takes."""
    return [rope_spec(bfloat16, int32, rotary_dim, 8, *shape_of(n, units)[:2]) for n in (1, _FEW_TOKENS + 1)]


#: rotary_dim, rope_scale, rope_theta, and Llama 3.1's (low_freq_factor, high_freq_factor, old_context_len) or None.
Frequencies = tuple[int, float, float, "tuple[float, float, int] | None"]


def radians(frequencies: Frequencies) -> Any:
    """Radians a position of every pair, float64."""
    dim, scale, theta, blend = frequencies
    if blend is None:
        return reference.rope_frequencies(dim, scale, theta)
    return reference.llama31_frequencies(dim, scale, theta, *blend)


@lru_cache(maxsize=512)
def turns_of(frequencies: Frequencies) -> tuple[bytes, ...]:
    """Frequencies as turns a position in units of 2^-64, modulo one turn, in blocks of 128 bytes.

    A float64 frequency has a relative error of 1e-16, so at position 2^20 the angle is good to 1e-10 radians.
    """
    turns = np.zeros(MAX_PAIRS, np.uint64)
    for i, f in enumerate(radians(frequencies).tolist()):
        turns[i] = round(f / (2 * math.pi) * 2.0**64) % 2**64
    data = turns.tobytes()
    return tuple(data[i : i + 128] for i in range(0, len(data), 128))


def launch(
    q: View,
    k: View,
    q_out: View,
    k_out: View,
    head_strides: tuple[int, int, int, int],
    heads: tuple[int, int, int],
    rotary_dim: int,
    interleave: bool,
    positions: View,
    *,
    indptr: View | None = None,
    cos_sin: View | None = None,
    turns: tuple[bytes, ...] = _NO_TURNS,
) -> None:
    """Launch over all tokens; `heads` is (q heads, k heads, head_dim), `head_strides` in elements."""
    num_q, num_k, head_dim = heads
    size = q.dtype.itemsize
    half = rotary_dim // 2
    rest = 0 if q_out is q else head_dim - rotary_dim
    qs, ks, qos, kos = head_strides
    qn, kn, qon, kon = q.strides[0], k.strides[0], q_out.strides[0], k_out.strides[0]
    # The largest power of two, up to 16 bytes, that divides every address.
    steps = half | rest | qs | ks | qos | kos | qn | kn | qon | kon
    common = q.ptr | k.ptr | q_out.ptr | k_out.ptr | steps * size | 16
    vec = (common & -common) // size or 1
    threads, unroll, parts = shape_of(q.shape[0], (num_q + num_k) * (half // vec))
    spec = rope_spec(
        q.dtype, positions.dtype, rotary_dim, vec, threads, unroll, rest=rest,
        interleave=interleave, segments=indptr is not None, cache=cos_sin is not None,
    )  # fmt: skip
    load_kernel(spec, q.device).launch(
        (q.shape[0], parts, 1), q.stream(), *turns, q.ptr, k.ptr, q_out.ptr, k_out.ptr, positions.ptr,
        0 if indptr is None else indptr.ptr, 0 if cos_sin is None else cos_sin.ptr,
        qn, qs, kn, ks, qon, qos, kon, kos, 0 if cos_sin is None else cos_sin.strides[0],
        num_q, num_k, 0 if indptr is None else positions.shape[0], pdl=None,
    )  # fmt: skip
