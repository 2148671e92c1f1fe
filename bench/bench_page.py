"""Writing into the paged cache: new keys and values are read once and written once. Packing of masks."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import peers

from fi_cupy import page, quantization
from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

HEADS, HEAD_DIM, PAGE_SIZE = 8, 128, 16
ITEMSIZE = 2
MASK_ELEMENTS = 100_000_000


def _append_inputs(tokens: int, requests: int, i: int) -> tuple[Any, ...]:
    """Keys, values, where they go, a cache just large enough, and its page table in random order."""
    import cupy

    each = tokens // requests
    pages_each = -(-each // PAGE_SIZE)
    pages = requests * pages_each
    return (
        random_array((tokens, HEADS, HEAD_DIM), "bfloat16", 2 * i),
        random_array((tokens, HEADS, HEAD_DIM), "bfloat16", 2 * i + 1),
        cupy.arange(tokens, dtype=cupy.int32) // each,
        cupy.arange(tokens, dtype=cupy.int32) % each,
        random_array((pages, 2, PAGE_SIZE, HEADS, HEAD_DIM), "bfloat16", i),
        cupy.asarray(np.random.default_rng(i).permutation(pages).astype(np.int32)),
        cupy.arange(requests + 1, dtype=cupy.int32) * pages_each,
        cupy.full(requests, (each - 1) % PAGE_SIZE + 1, dtype=cupy.int32),
    )


def _append(tokens: int, requests: int) -> BenchCase:
    return bench_case(
        f"append_paged_kv_cache {tokens} tokens of {requests} 8x128 p16 bf16",
        lambda s: page.append_paged_kv_cache(*s),
        make_inputs=partial(_append_inputs, tokens, requests),
        bytes=4 * tokens * HEADS * HEAD_DIM * ITEMSIZE,
        peers={"flashinfer": lambda s: peers.flashinfer().append_paged_kv_cache(*s)},
        recorded=f"append_paged_kv T{tokens} b{requests} 8x128",
    )


def _batch_positions(tokens: int, requests: int) -> BenchCase:
    def make(i: int) -> tuple[Any, ...]:
        import cupy

        indptr = cupy.arange(requests + 1, dtype=cupy.int32) * (tokens // requests)
        lens = cupy.full(requests, 4096, dtype=cupy.int32)
        return indptr, lens, tokens, cupy.empty(tokens, cupy.int32), cupy.empty(tokens, cupy.int32)

    return bench_case(
        f"get_batch_indices_positions {tokens} tokens of {requests}",
        lambda s: page.get_batch_indices_positions(*s),
        make_inputs=make,
        bytes=8 * tokens,
    )


def _packbits() -> BenchCase:
    return bench_case(
        "packbits 1e8 bool",
        lambda s: quantization.packbits(s[0]),
        make_inputs=lambda i: (random_array((MASK_ELEMENTS,), "bool", i),),
        bytes=MASK_ELEMENTS * 9 // 8,
        peers={"flashinfer": lambda s: peers.flashinfer().packbits(s[0])},
        recorded="packbits 1e8 bool",
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """Append of a prompt batch and of a decode step, index arithmetic, and packing."""
    return [_append(8192, 16), _append(64, 64), _batch_positions(8192, 16), _packbits()]
