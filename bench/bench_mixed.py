"""Prefill tiles and decode items in one launch, beside the same parts in launches of their own.

The floor is the larger of both parts' own: operations of the prompts, keys and values of the decoding requests.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np

from fi_cupy import attention
from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

HEADS, KV_HEADS, DIM, PAGE, ITEMSIZE = 32, 8, 128, 16, 2
_WORKSPACE = 64 << 20


class Shape(NamedTuple):
    """Prompts of `qo_len` tokens whose last one sees `kv_len` keys, and decoding requests of `decode_len` keys."""

    prompts: int
    qo_len: int
    kv_len: int
    decoding: int
    decode_len: int

    @property
    def flops(self) -> int:
        pairs = self.prompts * sum(self.kv_len - self.qo_len + i + 1 for i in range(self.qo_len))
        return 4 * pairs * HEADS * DIM

    @property
    def nbytes(self) -> int:
        keys = self.prompts * self.kv_len + self.decoding * self.decode_len
        return 2 * keys * KV_HEADS * DIM * ITEMSIZE

    @property
    def name(self) -> str:
        return (
            f"{self.prompts}x({self.qo_len}, {self.kv_len}) + {self.decoding}x{self.decode_len} "
            f"{HEADS}/{KV_HEADS} d{DIM} bf16"
        )


def _table(lens: Any, seed: int) -> tuple[Any, Any, Any]:
    pages = -(-np.asarray(lens) // PAGE)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    order = np.random.default_rng(seed).permutation(int(indptr[-1])).astype(np.int32)
    return indptr, order, ((np.asarray(lens) - 1) % PAGE + 1).astype(np.int32)


def _workspace() -> Any:
    import cupy

    return cupy.empty((_WORKSPACE,), cupy.uint8)


def _pod_inputs(s: Shape, i: int) -> dict[str, Any]:
    import cupy

    table = _table([s.decode_len] * s.decoding, i)
    pod = attention.PODWithPagedKVCacheWrapper(_workspace())
    decode = attention.BatchDecodeWithPagedKVCacheWrapper(_workspace())
    for wrapper in (pod, decode):
        wrapper.plan(*table, HEADS, KV_HEADS, DIM, PAGE, q_data_type="bfloat16")
    q_d = random_array((s.decoding, HEADS, DIM), "bfloat16", 5 * i)
    return {
        "prompt": (
            random_array((s.qo_len, HEADS, DIM), "bfloat16", 5 * i + 1),
            *(random_array((s.kv_len, KV_HEADS, DIM), "bfloat16", 5 * i + j) for j in (2, 3)),
        ),
        "q_d": q_d,
        "cache": random_array((int(table[0][-1]), 2, PAGE, KV_HEADS, DIM), "bfloat16", 5 * i + 4),
        "out": cupy.empty_like(q_d),
        "pod": pod,
        "decode": decode,
    }


def _two_launches(x: dict[str, Any]) -> None:
    attention.single_prefill_with_kv_cache(*x["prompt"], causal=True)
    x["decode"].run(x["q_d"], x["cache"], out=x["out"])


def _pod(s: Shape) -> BenchCase:
    return bench_case(
        f"POD {s.name}",
        lambda x: x["pod"].run(*x["prompt"], x["q_d"], x["cache"], causal_p=True, out_d=x["out"]),
        make_inputs=partial(_pod_inputs, s),
        bytes=s.nbytes,
        flops=s.flops or None,
        peers={
            "cupy two launches": _two_launches,
            "cupy prompt": lambda x: attention.single_prefill_with_kv_cache(*x["prompt"], causal=True),
            "cupy decode": lambda x: x["decode"].run(x["q_d"], x["cache"], out=x["out"]),
        },
    )


def _batch_inputs(s: Shape, i: int) -> dict[str, Any]:
    import cupy

    qo = np.concatenate([[0], np.cumsum([s.qo_len] * s.prompts + [1] * s.decoding)]).astype(np.int32)
    lens = np.int32([s.kv_len] * s.prompts + [s.decode_len] * s.decoding)
    indptr, indices, last = _table(lens, i)
    mixed, tiles = attention.BatchAttention(), attention.BatchPrefillWithPagedKVCacheWrapper(_workspace())
    mixed.plan(qo, indptr, indices, lens, HEADS, KV_HEADS, DIM, DIM, PAGE, causal=True)
    tiles.plan(qo, indptr, indices, last, HEADS, KV_HEADS, DIM, PAGE, causal=True, q_data_type="bfloat16")
    q = random_array((int(qo[-1]), HEADS, DIM), "bfloat16", 2 * i)
    return {
        "q": q,
        "cache": random_array((int(indptr[-1]), 2, PAGE, KV_HEADS, DIM), "bfloat16", 2 * i + 1),
        "out": cupy.empty_like(q),
        "lse": cupy.empty(q.shape[:2], cupy.float32),
        "mixed": mixed,
        "tiles": tiles,
    }


def _batch(s: Shape) -> BenchCase:
    return bench_case(
        f"BatchAttention {s.name}",
        lambda x: x["mixed"].run(x["q"], x["cache"], x["out"], x["lse"]),
        make_inputs=partial(_batch_inputs, s),
        bytes=s.nbytes,
        flops=s.flops or None,
        peers={"cupy tiles alone": lambda x: x["tiles"].run(x["q"], x["cache"], out=x["out"], lse=x["lse"])},
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """A prompt beside many decoding requests, a chunk of a long one, and batches of one kind."""
    pod = [Shape(1, 2048, 2048, 64, 4096), Shape(1, 512, 16384, 64, 2048), Shape(1, 4096, 4096, 16, 4096)]
    batch = [Shape(2, 1024, 1024, 64, 4096), Shape(0, 0, 0, 64, 4096), Shape(8, 512, 4096, 0, 0)]
    return [*map(_pod, pod), *map(_batch, batch)]
