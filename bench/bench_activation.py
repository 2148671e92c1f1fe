"""Gated activations: the input's rows are read once and half as much is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peers

from fi_cupy import activation
from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

#: Rows, hidden size (of the output). One token and a small batch (latency), then prompts (memory).
SHAPES = [(1, 14336), (128, 14336), (4096, 14336), (16384, 14336)]
ITEMSIZE = 2


def _inputs(rows: int, hidden: int, i: int) -> tuple[Any, ...]:
    return random_array((rows, 2 * hidden), "bfloat16", 2 * i), random_array((rows, hidden), "bfloat16", 2 * i + 1)


def _case(name: str, fn: Callable[..., Any], rows: int, hidden: int) -> BenchCase:
    others: dict[str, Callable[[Any], Any]] = {
        "flashinfer": lambda s: getattr(peers.flashinfer(), name)(s[0], out=s[1]),
    }
    if name == "silu_and_mul":
        others["torch"] = lambda s: peers.silu_and_mul(s[0])
    return bench_case(
        f"{name} {rows}x{hidden} bf16",
        lambda s: fn(s[0], out=s[1]),
        make_inputs=partial(_inputs, rows, hidden),
        bytes=3 * rows * hidden * ITEMSIZE,
        peers=others,
        recorded=f"{name} T{rows} H{hidden}",
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """silu_and_mul at the shapes of bench/NOTES.md, and one shape of each other activation."""
    return [
        *(_case("silu_and_mul", activation.silu_and_mul, *shape) for shape in SHAPES),
        _case("gelu_and_mul", activation.gelu_and_mul, 4096, 14336),
        _case("gelu_tanh_and_mul", activation.gelu_tanh_and_mul, 4096, 14336),
    ]
