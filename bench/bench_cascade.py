"""Merging attention states: every state is read once, the result written once."""

from __future__ import annotations

from typing import Any

import peers

from fi_cupy import cascade
from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

HEADS, HEAD_DIM = 32, 128
ITEMSIZE = 2


def _state(shape: tuple[int, ...], seed: int) -> tuple[Any, Any]:
    return random_array((*shape, HEADS, HEAD_DIM), "bfloat16", seed), random_array((*shape, HEADS), "float32", seed)


def _pair(rows: int, in_place: bool) -> BenchCase:
    name = "merge_state_in_place" if in_place else "merge_state"
    return bench_case(
        f"{name} {rows} rows 32x128 bf16",
        lambda s: getattr(cascade, name)(*s),
        make_inputs=lambda i: (*_state((rows,), 2 * i), *_state((rows,), 2 * i + 1)),
        bytes=3 * rows * HEADS * (HEAD_DIM * ITEMSIZE + 4),
        peers={"flashinfer": lambda s: getattr(peers.flashinfer(), name)(*s)},
        recorded=f"{name} T{rows} 32x128",
    )


def _states(rows: int, states: int) -> BenchCase:
    return bench_case(
        f"merge_states {rows}x{states} 32x128 bf16",
        lambda s: cascade.merge_states(*s),
        make_inputs=lambda i: _state((rows, states), i),
        bytes=(states + 1) * rows * HEADS * (HEAD_DIM * ITEMSIZE + 4),
        peers={"flashinfer": lambda s: peers.flashinfer().merge_states(*s)},
        recorded=f"merge_states T{rows} n{states} 32x128",
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """Two states, in place and not, and eight of them."""
    pairs = [_pair(rows, in_place) for rows in (64, 4096) for in_place in (False, True)]
    return [*pairs, _states(64, 8), _states(4096, 8)]
