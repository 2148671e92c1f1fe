"""Rotary embedding in place, 32 query and 8 key heads of 128: every feature is read and written once."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import peers

from fi_cupy import rope
from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

QO_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
CACHE_ROWS = 131072
ITEMSIZE = 2


def _positions(tokens: int) -> Any:
    import cupy

    return cupy.arange(tokens, dtype=cupy.int32)


def _inputs(tokens: int, i: int) -> tuple[Any, ...]:
    q = random_array((tokens, QO_HEADS, HEAD_DIM), "bfloat16", 2 * i)
    return q, random_array((tokens, KV_HEADS, HEAD_DIM), "bfloat16", 2 * i + 1), _positions(tokens)


def _bytes(tokens: int) -> int:
    return 2 * tokens * (QO_HEADS + KV_HEADS) * HEAD_DIM * ITEMSIZE


def _pos_ids(tokens: int) -> BenchCase:
    return bench_case(
        f"apply_rope_pos_ids_inplace {tokens} tokens 32/8 d128 bf16",
        lambda s: rope.apply_rope_pos_ids_inplace(*s),
        make_inputs=partial(_inputs, tokens),
        bytes=_bytes(tokens),
        peers={"flashinfer": lambda s: peers.flashinfer().apply_rope_pos_ids_inplace(*s)},
        recorded=f"rope_pos_ids_inplace T{tokens} 32/8",
    )


def _llama31(tokens: int) -> BenchCase:
    return bench_case(
        f"apply_llama31_rope_pos_ids_inplace {tokens} tokens 32/8 d128 bf16",
        lambda s: rope.apply_llama31_rope_pos_ids_inplace(*s),
        make_inputs=partial(_inputs, tokens),
        bytes=_bytes(tokens),
        peers={"flashinfer": lambda s: peers.flashinfer().apply_llama31_rope_pos_ids_inplace(*s)},
        recorded=f"llama31_rope_pos_ids_inplace T{tokens} 32/8",
    )


def _segments(requests: int, tokens: int) -> BenchCase:
    """The ragged form: every CTA looks up its token's request."""

    def make(i: int) -> tuple[Any, ...]:
        import cupy

        q, k, _ = _inputs(requests * tokens, i)
        return q, k, cupy.arange(requests + 1, dtype=cupy.int32) * tokens, cupy.zeros(requests, dtype=cupy.int32)

    return bench_case(
        f"apply_rope_inplace {requests}x{tokens} tokens 32/8 d128 bf16",
        lambda s: rope.apply_rope_inplace(*s),
        make_inputs=make,
        bytes=_bytes(requests * tokens),
    )


@lru_cache(maxsize=1)
def _table() -> Any:
    """One cos/sin cache for all input sets; the positions in use stay in the L2 cache, as they do in a model."""
    return random_array((CACHE_ROWS, HEAD_DIM), "float32", 7)


def _cached(tokens: int) -> BenchCase:
    def make(i: int) -> tuple[Any, ...]:
        q, k, positions = _inputs(tokens, i)
        return positions, q.reshape(tokens, -1), k.reshape(tokens, -1), HEAD_DIM, _table()

    return bench_case(
        f"apply_rope_with_cos_sin_cache_inplace {tokens} tokens 32/8 d128 bf16",
        lambda s: rope.apply_rope_with_cos_sin_cache_inplace(*s),
        make_inputs=make,
        bytes=_bytes(tokens) + tokens * HEAD_DIM * 4,
        peers={"flashinfer": lambda s: peers.flashinfer().apply_rope_with_cos_sin_cache_inplace(*s)},
        recorded=f"rope_cos_sin_cache_inplace T{tokens} 32/8",
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """A decode batch and a prompt in each form."""
    forms = [make(tokens) for make in (_pos_ids, _llama31, _cached) for tokens in (64, 8192)]
    return [*forms, _segments(64, 128)]
