"""Decode attention: every key and value is read once, so the floor is their bytes over the memory's read bandwidth."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import peers

from fi_cupy import decode
from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

DIM, PAGE = 128, 16


class Shape(NamedTuple):
    """A uniform batch, or with `ragged` lengths drawn from 1..kv_len."""

    batch: int
    kv_len: int
    heads: int = 32
    kv_heads: int = 8
    dim: int = DIM
    kv: str = "bfloat16"
    ragged: bool = False


SHAPES = [
    Shape(1, 1024),
    Shape(1, 4096),
    Shape(4, 4096),
    Shape(16, 4096),
    Shape(64, 1024),
    Shape(1, 65536),
    Shape(256, 1024),
    Shape(64, 8192),
    Shape(128, 8192, ragged=True),
    Shape(64, 8192, 64, 8),
    Shape(64, 4096, 32, 32),
    Shape(1, 4096, kv="float8_e4m3fn"),
    Shape(16, 4096, kv="float8_e4m3fn"),
    Shape(64, 8192, kv="float8_e4m3fn"),
    # SmolLM2-135M: the demo's shape
    Shape(1, 512, 9, 3, 64),
    Shape(64, 512, 9, 3, 64),
]


def lengths(s: Shape) -> np.ndarray[Any, Any]:
    """Keys of every request."""
    if s.ragged:
        return np.random.default_rng(0).integers(1, s.kv_len + 1, s.batch)
    return np.full(s.batch, s.kv_len)


def page_table(s: Shape, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """(indptr, indices, last_page_len) with the pages in random order."""
    lens = lengths(s)
    indptr = np.concatenate([[0], np.cumsum(-(-lens // PAGE))]).astype(np.int32)
    indices = np.random.default_rng(seed).permutation(indptr[-1]).astype(np.int32)
    return indptr, indices, ((lens - 1) % PAGE + 1).astype(np.int32)


def nbytes(s: Shape) -> int:
    """Bytes that must move: keys, values, queries and outputs."""
    itemsize = 1 if s.kv.startswith("float8") else 2
    return int(lengths(s).sum()) * 2 * s.kv_heads * s.dim * itemsize + 2 * s.batch * s.heads * s.dim * 2


def _inputs(s: Shape, i: int) -> dict[str, Any]:
    import cupy

    table = page_table(s, i)
    wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(cupy.empty((32 << 20,), cupy.uint8))
    wrapper.plan(*table, s.heads, s.kv_heads, s.dim, PAGE, q_data_type="bfloat16", kv_data_type=s.kv)
    q = random_array((s.batch, s.heads, s.dim), "bfloat16", 2 * i)
    return {
        "q": q,
        "cache": random_array((int(table[0][-1]), 2, PAGE, s.kv_heads, s.dim), s.kv, 2 * i + 1),
        "out": cupy.empty_like(q),
        "wrapper": wrapper,
        "seed": i,
    }


def _flashinfer(s: Shape, tensor_cores: bool) -> Any:
    """FlashInfer's wrapper, planned for a set when it is first called (before the capture)."""
    planned: dict[int, Any] = {}

    def run(inputs: dict[str, Any]) -> None:
        wrapper = planned.get(inputs["seed"])
        if wrapper is None:
            torch = peers.torch()
            wrapper = peers.flashinfer().BatchDecodeWithPagedKVCacheWrapper(
                torch.empty(128 << 20, dtype=torch.uint8, device="cuda"), use_tensor_cores=tensor_cores
            )
            table = [torch.from_numpy(x).cuda() for x in page_table(s, inputs["seed"])]
            kv = getattr(torch, s.kv)
            wrapper.plan(*table, s.heads, s.kv_heads, s.dim, PAGE, q_data_type=torch.bfloat16, kv_data_type=kv)
            planned[inputs["seed"]] = wrapper
        cache = inputs["cache"]
        if s.kv != "bfloat16":
            cache = cache.view(getattr(peers.torch(), s.kv))
        wrapper.run(inputs["q"], cache, out=inputs["out"])

    return run


def _case(s: Shape) -> BenchCase:
    length = f"mix1..{s.kv_len}" if s.ragged else str(s.kv_len)
    heads = f"{s.heads}/{s.kv_heads}"
    fp8 = s.kv != "bfloat16"
    name = f"decode {s.batch}x{length} {heads} d{s.dim} {'fp8 cache' if fp8 else 'bf16'}"
    recorded = f"decode b{s.batch} {'' if s.ragged else 'kv'}{length} "
    recorded += f"MHA h{heads} tc" if s.heads == s.kv_heads else f"h{heads} {'fp8kv ' if fp8 else ''}tc"
    return bench_case(
        name,
        lambda x: x["wrapper"].run(x["q"], x["cache"], out=x["out"]),
        make_inputs=partial(_inputs, s),
        bytes=nbytes(s),
        limit="read",
        peers={"flashinfer": _flashinfer(s, False), "flashinfer tc": _flashinfer(s, True)},
        recorded=(f"{recorded}0", f"{recorded}1") if s.dim == DIM else (),
    )


def _single(kv_len: int) -> BenchCase:
    shape = Shape(1, kv_len)

    def make(i: int) -> tuple[Any, ...]:
        k, v = (random_array((kv_len, shape.kv_heads, DIM), "bfloat16", 3 * i + j) for j in (0, 1))
        return random_array((shape.heads, DIM), "bfloat16", 3 * i + 2), k, v

    return bench_case(
        f"single_decode {kv_len} 32/8 d128 bf16",
        lambda x: decode.single_decode_with_kv_cache(*x),
        make_inputs=make,
        bytes=nbytes(shape),
        limit="read",
        peers={"flashinfer": lambda x: peers.flashinfer().single_decode_with_kv_cache(*x)},
        recorded=f"single_decode kv{kv_len} h32/8",
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """Batch decode over pages of 16 in random order, and one contiguous request."""
    return [*(_case(s) for s in SHAPES), _single(4096), _single(65536)]
