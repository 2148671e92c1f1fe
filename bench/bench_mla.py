"""Latent attention (DeepSeek): with 16 heads the cache's bytes are the floor, with 128 the products."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import peers

from fi_cupy import mla
from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

CKV, KPE = 512, 64
SCALE = (128 + 64) ** -0.5


class Shape(NamedTuple):
    """A uniform batch of decoding requests; qo_len > 1 is a causal chunk."""

    batch: int
    kv_len: int
    heads: int
    page: int = 64
    qo_len: int = 1
    kv: str = "bfloat16"


SHAPES = [
    Shape(64, 4096, 128),
    Shape(16, 4096, 128),
    Shape(1, 4096, 128),
    Shape(128, 2048, 128),
    Shape(64, 4096, 128, page=16),
    Shape(64, 4096, 128, page=1),
    Shape(64, 4096, 64),
    Shape(64, 4096, 16),
    Shape(16, 4096, 16),
    Shape(1, 4096, 16),
    Shape(64, 4096, 16, page=1),
    Shape(64, 4096, 16, kv="float8_e4m3fn"),
    Shape(64, 4096, 128, kv="float8_e4m3fn"),
    Shape(4, 4096, 16, qo_len=512),
]


def _table(s: Shape, seed: int) -> tuple[Any, ...]:
    pages = -(-s.kv_len // s.page)
    indices = np.random.default_rng(seed).permutation(s.batch * pages).astype(np.int32)
    indptr = np.arange(s.batch + 1, dtype=np.int32)
    return indptr * s.qo_len, indptr * pages, indices, np.full(s.batch, s.kv_len, np.int32)


def _inputs(s: Shape, i: int) -> dict[str, Any]:
    import cupy

    wrapper = mla.BatchMLAPagedAttentionWrapper(cupy.empty((160 << 20,), cupy.uint8))
    table = _table(s, i)
    wrapper.plan(*table, s.heads, CKV, KPE, s.page, s.qo_len > 1, SCALE, "bfloat16", s.kv)
    rows = s.batch * s.qo_len
    q_nope = random_array((rows, s.heads, CKV), "bfloat16", 3 * i)
    return {
        "q_nope": q_nope,
        "q_pe": random_array((rows, s.heads, KPE), "bfloat16", 3 * i + 1),
        "cache": random_array((len(table[2]), s.page, CKV + KPE), s.kv, 3 * i + 2),
        "out": cupy.empty_like(q_nope),
        "wrapper": wrapper,
        "seed": i,
    }


def _scales(s: Shape) -> dict[str, float]:
    return {} if s.kv == "bfloat16" else {"ckv_scale": 1.0, "kpe_scale": 1.0}


def _run(s: Shape, x: dict[str, Any]) -> None:
    cache = x["cache"]
    x["wrapper"].run(x["q_nope"], x["q_pe"], cache[..., :CKV], cache[..., CKV:], out=x["out"], **_scales(s))


def _flashinfer(s: Shape) -> Any:
    """FlashInfer's wrapper, planned for a set when it is first called (before the capture)."""
    planned: dict[int, Any] = {}

    def run(x: dict[str, Any]) -> None:
        wrapper, torch = planned.get(x["seed"]), peers.torch()
        if wrapper is None:
            wrapper = peers.flashinfer().mla.BatchMLAPagedAttentionWrapper(
                torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
            )
            table = [torch.from_numpy(t).cuda() for t in _table(s, x["seed"])]
            wrapper.plan(
                *table, s.heads, CKV, KPE, s.page, s.qo_len > 1, SCALE, torch.bfloat16, getattr(torch, s.kv)
            )  # fmt: skip
            planned[x["seed"]] = wrapper
        cache = x["cache"]
        wrapper.run(x["q_nope"], x["q_pe"], cache[..., :CKV], cache[..., CKV:], out=x["out"])

    return run


def _case(s: Shape) -> BenchCase:
    pairs = s.kv_len if s.qo_len == 1 else s.qo_len * (s.kv_len - s.qo_len) + s.qo_len * (s.qo_len + 1) // 2
    flops = 2 * s.batch * pairs * s.heads * (2 * CKV + KPE)
    itemsize = 2 if s.kv == "bfloat16" else 1
    rows = s.batch * s.qo_len * s.heads
    nbytes = s.batch * s.kv_len * (CKV + KPE) * itemsize + 2 * rows * (2 * CKV + KPE)
    kind = "bf16" if itemsize == 2 else "fp8 cache"
    few = s.heads * s.qo_len <= 16
    chunk = "" if s.qo_len == 1 else f" q{s.qo_len}"
    recorded = s.page == 64 and s.qo_len == 1 and itemsize == 2 and s.heads in (16, 128)
    return bench_case(
        f"mla {s.batch}x{s.kv_len}{chunk} {s.heads} heads p{s.page} {kind}",
        partial(_run, s),
        make_inputs=partial(_inputs, s),
        bytes=nbytes,
        flops=None if few else flops,
        limit="read" if few else None,
        interleave=not few,
        peers={"flashinfer": _flashinfer(s)},
        recorded=f"mla.fa3 b{s.batch} kv{s.kv_len} h{s.heads} p64" if recorded else (),
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """Decoding requests of one length over pages in random order, and a causal chunk."""
    return [_case(s) for s in SHAPES]
