"""Normalisation: every shape reads its rows once and writes them once; the weight stays in the cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import peers

import fi_cupy
from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

#: Rows, hidden size. One token and a small batch (latency), then prompts (memory).
RMSNORM = [(1, 4096), (128, 4096), (4096, 4096), (4096, 8192), (16384, 4096), (16384, 8192)]
FUSED = [(1, 4096), (128, 4096), (4096, 4096), (16384, 4096), (16384, 8192)]
ITEMSIZE = 2


def _rmsnorm_inputs(rows: int, hidden: int, i: int) -> tuple[Any, ...]:
    x = random_array((rows, hidden), "bfloat16", 3 * i)
    return x, random_array((hidden,), "bfloat16", 3 * i + 1), random_array((rows, hidden), "bfloat16", 3 * i + 2)


def _rmsnorm(rows: int, hidden: int) -> BenchCase:
    return bench_case(
        f"rmsnorm {rows}x{hidden} bf16",
        lambda s: fi_cupy.rmsnorm(s[0], s[1], out=s[2]),
        make_inputs=partial(_rmsnorm_inputs, rows, hidden),
        bytes=(2 * rows * hidden + hidden) * ITEMSIZE,
        peers={
            "torch": lambda s: peers.rms_norm(s[0], s[1]),
            "flashinfer": lambda s: peers.flashinfer().rmsnorm(s[0], s[1], out=s[2]),
        },
        recorded=f"rmsnorm T{rows} H{hidden}",
    )


def _fused_add_rmsnorm(rows: int, hidden: int) -> BenchCase:
    return bench_case(
        f"fused_add_rmsnorm {rows}x{hidden} bf16",
        lambda s: fi_cupy.fused_add_rmsnorm(s[0], s[2], s[1]),
        make_inputs=partial(_rmsnorm_inputs, rows, hidden),
        bytes=(4 * rows * hidden + hidden) * ITEMSIZE,
        peers={
            "torch": lambda s: peers.fused_add_rms_norm(s[0], s[2], s[1]),
            "flashinfer": lambda s: peers.flashinfer().fused_add_rmsnorm(s[0], s[2], s[1]),
        },
        recorded=f"fused_add_rmsnorm T{rows} H{hidden}",
    )


def _qk_norm(tokens: int, heads: int, head_dim: int) -> BenchCase:
    """The query heads of a fused projection [tokens, heads + 16, head_dim], normalised in place."""

    def make(i: int) -> tuple[Any, ...]:
        return random_array((tokens, heads + 16, head_dim), "bfloat16", i), random_array((head_dim,), "bfloat16", i)

    def run(s: Any) -> None:
        q = s[0][:, :heads]
        fi_cupy.rmsnorm(q, s[1], out=q)

    return bench_case(
        f"rmsnorm heads {tokens}x{heads}x{head_dim} bf16, strided",
        run,
        make_inputs=make,
        bytes=2 * tokens * heads * head_dim * ITEMSIZE,
        peers={"torch": lambda s: peers.rms_norm(s[0][:, :heads], s[1])},
    )


def _layernorm(rows: int, hidden: int) -> BenchCase:
    def make(i: int) -> dict[str, Any]:
        return {
            "x": random_array((rows, hidden), "bfloat16", i),
            "gamma": random_array((hidden,), "float32", i),
            "beta": random_array((hidden,), "float32", i + 1),
            "gamma_bf16": random_array((hidden,), "bfloat16", i),
            "beta_bf16": random_array((hidden,), "bfloat16", i + 1),
        }

    return bench_case(
        f"layernorm {rows}x{hidden} bf16",
        lambda s: fi_cupy.layernorm(s["x"], s["gamma"], s["beta"]),
        make_inputs=make,
        bytes=(2 * ITEMSIZE * rows + 8) * hidden,
        peers={"torch": lambda s: peers.layer_norm(s["x"], s["gamma_bf16"], s["beta_bf16"])},
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """The norm operators at the shapes of bench/NOTES.md."""
    return [
        *(_rmsnorm(*shape) for shape in RMSNORM),
        *(_fused_add_rmsnorm(*shape) for shape in FUSED),
        _qk_norm(8192, 32, 128),
        _layernorm(16384, 4096),
    ]
