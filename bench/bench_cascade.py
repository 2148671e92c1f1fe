"""Merging attention states, each read once and the result written once; and attention over a shared prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
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


SHARED, REQUESTS, OWN, KV_HEADS, PAGE = 8192, 64, 256, 8, 16


def _tables(order: Any) -> tuple[list[Any], ...]:
    """A prefix that all requests share, and keys of their own, on pages in random order."""
    prefix, own = SHARED // PAGE, OWN // PAGE
    each = np.arange(REQUESTS + 1, dtype=np.int32)
    last = [np.full(1, PAGE, np.int32), np.full(REQUESTS, PAGE, np.int32)]
    return [each[[0, -1]], each], [np.int32([0, prefix]), each * own], [order[:prefix], order[prefix:]], last


def _prefix_inputs(i: int) -> dict[str, Any]:
    import cupy

    pages = (SHARED + REQUESTS * OWN) // PAGE
    order = np.random.default_rng(i).permutation(pages).astype(np.int32)
    wrapper = cascade.MultiLevelCascadeAttentionWrapper(2, cupy.empty((64 << 20,), cupy.uint8))
    wrapper.plan(*_tables(order), HEADS, KV_HEADS, HEAD_DIM, PAGE, q_data_type="bfloat16")
    q = random_array((REQUESTS, HEADS, HEAD_DIM), "bfloat16", 2 * i)
    cache = random_array((pages, 2, PAGE, KV_HEADS, HEAD_DIM), "bfloat16", 2 * i + 1)
    return {"q": q, "cache": cache, "out": cupy.empty_like(q), "wrapper": wrapper}


def _shared_prefix() -> BenchCase:
    return bench_case(
        f"cascade: {SHARED} shared keys, {REQUESTS} requests with {OWN} more, {HEADS}/{KV_HEADS} d{HEAD_DIM} bf16",
        lambda x: x["wrapper"].run(x["q"], x["cache"], out=x["out"]),
        make_inputs=_prefix_inputs,
        bytes=(SHARED + REQUESTS * OWN) * 2 * KV_HEADS * HEAD_DIM * ITEMSIZE,
        limit="read",
        recorded=f"cascade shared{SHARED} + {REQUESTS}x{OWN} h{HEADS}/{KV_HEADS}",
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """Two states, in place and not, and eight of them; a shared prefix."""
    pairs = [_pair(rows, in_place) for rows in (64, 4096) for in_place in (False, True)]
    return [*pairs, _states(64, 8), _states(4096, 8), _shared_prefix()]
