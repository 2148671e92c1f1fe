"""FlashInfer's testing helpers that users call: GPU times, what attention multiplies and moves, casts with scales."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fi_cupy.arrays import view
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError
from fi_cupy.quantization import dequantize_fp8 as dequantize_fp8
from fi_cupy.quantization import per_block_cast_to_fp8 as per_block_cast_to_fp8
from fi_cupy.quantization import per_token_cast_to_fp8 as per_token_cast_to_fp8
from fi_cupy.quantization import quantize_fp8 as quantize_fp8
from fi_cupy.testing.gpu_time import bench_gpu_time as bench_gpu_time

__all__ = [
    "attention_flops",
    "attention_flops_with_actual_seq_lens",
    "attention_tb_per_sec",
    "attention_tb_per_sec_with_actual_seq_lens",
    "attention_tflops_per_sec",
    "attention_tflops_per_sec_with_actual_seq_lens",
    "bench_gpu_time",
    "dequantize_fp8",
    "per_block_cast_to_fp8",
    "per_token_cast_to_fp8",
    "quantize_fp8",
    "set_seed",
]


def attention_flops(
    batch_size: int, qo_seqlen: int, kv_seqlen: int, head_dim_qk: int, head_dim_vo: int, num_qo_heads: int, causal: bool
) -> int:
    """Operations of both products of attention over requests of one length, multiplications and additions counted.

    Causal: half of the square in front of the last key, all of what lies before it.

    Raises
    ------
    ArgumentError
        Causal, and more queries than keys.

    Examples
    --------
    >>> attention_flops(1, 4096, 4096, 128, 128, 32, True)
    137438953472
    """
    return attention_flops_with_actual_seq_lens(
        [qo_seqlen], [kv_seqlen], head_dim_qk, head_dim_vo, batch_size * num_qo_heads, causal
    )


def attention_flops_with_actual_seq_lens(
    actual_seq_lens_q: Any, actual_seq_lens_kv: Any, head_dim_qk: int, head_dim_vo: int, num_qo_heads: int, causal: bool
) -> int:
    """`attention_flops` of requests of these lengths (arrays or lists)."""
    q, kv = _lengths(actual_seq_lens_q), _lengths(actual_seq_lens_kv)
    if len(q) != len(kv):
        raise ArgumentError(f"attention_flops: {len(q)} lengths of queries and {len(kv)} of keys, expected as many")
    if causal and any(m > n for m, n in zip(q, kv, strict=True)):
        raise ArgumentError("attention_flops: causal is True and a request has more queries than keys")
    pairs = sum((2 * n - m) * m if causal else 2 * m * n for m, n in zip(q, kv, strict=True))
    return pairs * num_qo_heads * (head_dim_qk + head_dim_vo)


def _lengths(given: Any) -> list[int]:
    values = view(given).host() if hasattr(given, "shape") else np.asarray(given)
    return [int(n) for n in values.reshape(-1)]


def _rate(amount: float, ms: float, unit: float) -> float:
    """Units a second; 0 where there is no time."""
    return 0.0 if math.isnan(ms) else amount / (ms * 1e-3) / unit


def attention_tflops_per_sec(
    batch_size: int, qo_seqlen: int, kv_seqlen: int, head_dim_qk: int, head_dim_vo: int, num_qo_heads: int,
    causal: bool, time: float,
) -> float:  # fmt: skip
    """TFLOP/s of attention that took `time` milliseconds; 0 for NaN. The rest: `attention_flops`."""
    flops = attention_flops(batch_size, qo_seqlen, kv_seqlen, head_dim_qk, head_dim_vo, num_qo_heads, causal)
    return _rate(flops, time, 1e12)


def attention_tflops_per_sec_with_actual_seq_lens(
    actual_seq_lens_q: Any, actual_seq_lens_kv: Any, head_dim_qk: int, head_dim_vo: int, num_qo_heads: int,
    causal: bool, ms: float,
) -> float:  # fmt: skip
    """`attention_tflops_per_sec` of requests of these lengths."""
    flops = attention_flops_with_actual_seq_lens(
        actual_seq_lens_q, actual_seq_lens_kv, head_dim_qk, head_dim_vo, num_qo_heads, causal
    )
    return _rate(flops, ms, 1e12)


def attention_tb_per_sec(
    batch_size: int, qo_seqlen: int, kv_seqlen: int, head_dim_qk: int, head_dim_vo: int, num_qo_heads: int,
    num_kv_heads: int, time: float, q_dtype: Any = "bfloat16", k_dtype: Any = "bfloat16", v_dtype: Any = "bfloat16",
    o_dtype: Any = "bfloat16",
) -> float:  # fmt: skip
    """TB/s of attention that took `time` milliseconds: q, k and v read once, the output written once; 0 for NaN.

    Examples
    --------
    >>> attention_tb_per_sec(64, 1, 8192, 128, 128, 32, 8, 1.0)
    2.148532224
    """
    return attention_tb_per_sec_with_actual_seq_lens(
        [batch_size * qo_seqlen], [batch_size * kv_seqlen], head_dim_qk, head_dim_vo, num_qo_heads, num_kv_heads, time,
        q_dtype, k_dtype, v_dtype, o_dtype,
    )  # fmt: skip


def attention_tb_per_sec_with_actual_seq_lens(
    actual_seq_lens_q: Any, actual_seq_lens_kv: Any, head_dim_qk: int, head_dim_vo: int, num_qo_heads: int,
    num_kv_heads: int, time: float, q_dtype: Any = "bfloat16", k_dtype: Any = "bfloat16", v_dtype: Any = "bfloat16",
    o_dtype: Any = "bfloat16",
) -> float:  # fmt: skip
    """`attention_tb_per_sec` of requests of these lengths."""
    rows, keys = sum(_lengths(actual_seq_lens_q)), sum(_lengths(actual_seq_lens_kv))
    q, k, v, o = (to_dtype(t).itemsize for t in (q_dtype, k_dtype, v_dtype, o_dtype))
    read = rows * num_qo_heads * head_dim_qk * q + keys * num_kv_heads * (head_dim_qk * k + head_dim_vo * v)
    return _rate(read + rows * num_qo_heads * head_dim_vo * o, time, 1e12)


def set_seed(random_seed: int) -> None:
    """Seed fi_cupy's default generator, Python's and NumPy's, and torch's and CuPy's where they are loaded."""
    import random
    import sys

    from fi_cupy.sampling import manual_seed

    manual_seed(random_seed)
    random.seed(random_seed)
    np.random.seed(random_seed % (1 << 32))
    torch, cupy = sys.modules.get("torch"), sys.modules.get("cupy")
    if torch is not None:
        torch.manual_seed(random_seed)  # of its GPUs, too
    if cupy is not None and cupy.is_available():
        cupy.random.seed(random_seed % (1 << 32))
