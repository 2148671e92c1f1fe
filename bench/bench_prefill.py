"""Prefill attention: 4 * (visible query-key pairs) * heads * head_dim flops, counted as the kernels need them."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import peers

from fi_cupy import jit, prefill
from fi_cupy.device import DeviceInfo
from fi_cupy.jit import ops
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

PAGE = 16


class Shape(NamedTuple):
    """A uniform batch of prompts, or of chunks at the end of longer prompts (kv_len > qo_len)."""

    batch: int
    qo_len: int
    kv_len: int
    heads: int = 32
    kv_heads: int = 32
    dim: int = 128
    causal: bool = True
    window: int = -1
    cap: float = 0.0
    alibi: bool = False
    kv: str = "bfloat16"
    rope: bool = False
    backend: str = "auto"


S16K, S4K, S1K = 16384, 4096, 1024
SINGLE = [
    Shape(1, S16K, S16K),
    Shape(1, S16K, S16K, causal=False),
    Shape(1, S4K, S4K),
    Shape(1, S1K, S1K),
    Shape(1, S16K, S16K, 32, 8),
    Shape(1, S16K, S16K, dim=64),
    Shape(1, S16K, S16K, 16, 16, 256),
    Shape(1, S16K, S16K, window=1024),
    Shape(1, S16K, S16K, cap=30.0),
    Shape(1, S16K, S16K, alibi=True),
]
RAGGED = [
    *(Shape(16384 // n, n, n) for n in (256, 512, S1K, 2048, S4K, 8192)),
    Shape(16, S1K, S1K, 32, 8),
    Shape(8, 128, 128),  # short: one or two tiles of keys an item
    Shape(16, 64, 64, 32, 8),
]
PAGED = [
    Shape(16, 512, S4K, 32, 8),
    Shape(1, S4K, S16K, 32, 8),
    Shape(16, S1K, S1K, 32, 8),
    Shape(1, S1K, 32768, 32, 8),  # fewer items than multiprocessors times three: the last ones are split
    Shape(1, 16, 65536, 32, 8),  # a few tokens over a long prompt: split keys
    Shape(8, 128, 128, 9, 3, 64),  # SmolLM2-135M: the demo's shape
    Shape(16, 512, S4K, 32, 8, kv="float8_e4m3fn"),  # keys and values are widened in shared memory,
    Shape(16, 512, S4K, 32, 8, rope=True),  # or rotated there: against the first row
]
#: Again by the portable kernel where "auto" has another one to choose (Hopper GPUs).
BOTH_SINGLE, BOTH_PAGED = [*SINGLE[:2], *SINGLE[3:7]], PAGED[:3]


def flops(s: Shape) -> int:
    """Two products over the visible pairs."""
    own = np.arange(s.kv_len - s.qo_len, s.kv_len)
    last = own if s.causal else np.full(s.qo_len, s.kv_len - 1)
    first = np.maximum(own - s.window, 0) if s.window >= 0 else 0
    return int(4 * s.batch * s.heads * s.dim * (last - first + 1).sum())


def name_of(s: Shape, kind: str) -> str:
    """The row's name."""
    length = str(s.qo_len) if s.qo_len == s.kv_len else f"q{s.qo_len}/kv{s.kv_len}"
    options = (" window" if s.window >= 0 else "") + (" cap" if s.cap else "") + (" alibi" if s.alibi else "")
    options += (f" {s.kv}" if s.kv != "bfloat16" else "") + (" rope" if s.rope else "")
    options += f" {s.backend}" if s.backend != "auto" else ""
    return f"{kind} {s.batch}x{length} {s.heads}/{s.kv_heads} d{s.dim} {'causal' if s.causal else 'full'}{options}"


def _soft_cap(score: Any, ctx: Any) -> Any:
    return ctx.cap * ops.tanh(score / ctx.cap)


def _alibi(score: Any, ctx: Any) -> Any:
    return score + ctx.slopes[ctx.qo_head] * (ctx.kv_idx - ctx.qo_idx)


#: Variants as a user writes them: what they cost is the ratio to the plain row of the same shape.
VARIANTS = {
    "soft cap": (jit.define_variant("soft_cap", "causal", score_fn=_soft_cap, scalars=["cap"]), "softcap30"),
    "ALiBi": (jit.define_variant("alibi", "causal", score_fn=_alibi, tensors=["slopes"]), "alibi"),
}


def _recorded(s: Shape, kind: str) -> tuple[str, ...]:
    """Rows of the recorded peers."""
    if s.window >= 0 or s.cap or s.alibi or s.rope or s.kv != "bfloat16":
        return ()
    rest = f"h{s.heads}/{s.kv_heads} d{s.dim} "
    lengths = f"s{s.qo_len}" if kind == "sprefill" else f"b{s.batch} s{s.qo_len}"
    if kind == "paged":
        lengths, rest = f"b{s.batch} q{s.qo_len} kv{s.kv_len}", f"{rest}p{PAGE} "
    return tuple(f"{kind}.{backend} {lengths} {rest}{'c' if s.causal else 'f'}" for backend in ("fa2", "fa3"))


def _offsets(s: Shape) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    steps = np.arange(s.batch + 1)
    return (steps * s.qo_len).astype(np.int32), (steps * s.kv_len).astype(np.int32)


def _contiguous(s: Shape, i: int) -> dict[str, Any]:
    q = random_array((s.batch * s.qo_len, s.heads, s.dim), "bfloat16", 3 * i)
    k, v = (random_array((s.batch * s.kv_len, s.kv_heads, s.dim), "bfloat16", 3 * i + j) for j in (1, 2))
    return {"q": q, "k": k, "v": v, "seed": i}


def _single(s: Shape) -> BenchCase:
    options = {"causal": s.causal, "window_left": s.window, "logits_soft_cap": s.cap or None}
    options["pos_encoding_mode"] = "ALIBI" if s.alibi else "NONE"

    def flashinfer(backend: str, x: dict[str, Any]) -> None:
        run = peers.flashinfer().single_prefill_with_kv_cache
        run(x["q"], x["k"], x["v"], backend=backend, **options)

    def torch(backend: str, x: dict[str, Any]) -> None:
        peers.attention(*(x[n].transpose(0, 1)[None] for n in "qkv"), causal=s.causal, backend=backend)

    plain = s.window < 0 and not s.cap and not s.alibi and s.backend == "auto"
    rivals: dict[str, Any] = {}
    if s.backend == "auto":  # the portable kernel's peers are in the row before
        rivals = {f"flashinfer {b}": partial(flashinfer, b) for b in ("fa2", "fa3")}
    if plain:
        rivals["flash"] = partial(torch, "flash")
    if plain and s.dim <= 128:
        rivals["cudnn"] = partial(torch, "cudnn")
    return bench_case(
        name_of(s, "single_prefill"),
        lambda x: prefill.single_prefill_with_kv_cache(x["q"], x["k"], x["v"], backend=s.backend, **options),
        make_inputs=partial(_contiguous, s),
        flops=flops(s),
        peers=rivals,
        recorded=_recorded(s, "sprefill"),
        interleave=True,
    )


def _variant(name: str) -> BenchCase:
    s = Shape(1, S16K, S16K)
    variant, recorded = VARIANTS[name]
    kernel = jit.compile(variant)
    cap = {"cap": 30.0} if name == "soft cap" else {}

    def make(i: int) -> dict[str, Any]:
        slopes = {} if cap else {"slopes": random_array((s.heads,), "float32", 7)}
        return {**_contiguous(s, i), "extra": slopes}

    return bench_case(
        f"{name_of(s, 'single_prefill')}, Python variant {name}",
        lambda x: kernel.run(x["q"], x["k"], x["v"], **cap, **x["extra"]),
        make_inputs=make,
        flops=flops(s),
        recorded=(f"flex b1 s{s.qo_len} h{s.heads} d{s.dim} causal+{recorded}",),
        interleave=True,
    )


def _ragged_inputs(s: Shape, i: int) -> dict[str, Any]:
    import cupy

    wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(cupy.empty((64 << 20,), cupy.uint8), backend=s.backend)
    wrapper.plan(*_offsets(s), s.heads, s.kv_heads, s.dim, causal=s.causal, q_data_type="bfloat16")
    inputs = _contiguous(s, i)
    return {**inputs, "out": cupy.empty_like(inputs["q"]), "wrapper": wrapper}


def _paged_inputs(s: Shape, i: int) -> dict[str, Any]:
    import cupy

    wrapper = prefill.BatchPrefillWithPagedKVCacheWrapper(cupy.empty((64 << 20,), cupy.uint8), backend=s.backend)
    table = page_table(s, i)
    wrapper.plan(
        *table, s.heads, s.kv_heads, s.dim, PAGE, causal=s.causal, q_data_type="bfloat16", kv_data_type=s.kv,
        pos_encoding_mode="ROPE_LLAMA" if s.rope else "NONE",
    )  # fmt: skip
    q = random_array((s.batch * s.qo_len, s.heads, s.dim), "bfloat16", 2 * i)
    cache = random_array((len(table[2]), 2, PAGE, s.kv_heads, s.dim), s.kv, 2 * i + 1)
    return {"q": q, "cache": cache, "out": cupy.empty_like(q), "wrapper": wrapper, "seed": i}


def page_table(s: Shape, seed: int) -> tuple[np.ndarray[Any, Any], ...]:
    """(qo_indptr, indptr, indices, last_page_len) with the pages in random order."""
    pages = -(-s.kv_len // PAGE)
    indptr = (np.arange(s.batch + 1) * pages).astype(np.int32)
    indices = np.random.default_rng(seed).permutation(s.batch * pages).astype(np.int32)
    return _offsets(s)[0], indptr, indices, np.full(s.batch, (s.kv_len - 1) % PAGE + 1, np.int32)


def _flashinfer_batch(s: Shape, backend: str, paged: bool) -> Any:
    """FlashInfer's wrapper, planned for a set when it is first called (before the capture)."""
    planned: dict[int, Any] = {}

    def run(x: dict[str, Any]) -> None:
        wrapper = planned.get(x["seed"])
        if wrapper is None:
            torch, fi = peers.torch(), peers.flashinfer()
            space = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
            kind = fi.BatchPrefillWithPagedKVCacheWrapper if paged else fi.BatchPrefillWithRaggedKVCacheWrapper
            wrapper = planned[x["seed"]] = kind(space, backend=backend)
            table = [torch.from_numpy(a).cuda() for a in (page_table(s, x["seed"]) if paged else _offsets(s))]
            tail = (PAGE,) if paged else ()
            wrapper.plan(
                *table, s.heads, s.kv_heads, s.dim, *tail, causal=s.causal,
                q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16,
            )  # fmt: skip
        wrapper.run(x["q"], *([x["cache"]] if paged else [x["k"], x["v"]]), out=x["out"])

    return run


def _batch(s: Shape, paged: bool) -> BenchCase:
    kind = "paged_prefill" if paged else "ragged_prefill"
    rivals: dict[str, Any] = {}
    if not s.rope and s.kv == "bfloat16" and s.backend == "auto":
        rivals = {f"flashinfer {b}": _flashinfer_batch(s, b, paged) for b in ("fa2", "fa3")}

    def torch(backend: str, x: dict[str, Any]) -> None:
        q, k, v = (x[n].view(s.batch, -1, *x[n].shape[1:]).transpose(1, 2) for n in "qkv")
        peers.attention(q, k, v, causal=s.causal, backend=backend)

    if not paged and s.backend == "auto":  # requests of one length are a batch to torch
        rivals |= {backend: partial(torch, backend) for backend in ("flash", "cudnn")}
    return bench_case(
        name_of(s, kind),
        (lambda x: x["wrapper"].run(x["q"], x["cache"], out=x["out"]))
        if paged
        else (lambda x: x["wrapper"].run(x["q"], x["k"], x["v"], out=x["out"])),
        make_inputs=partial(_paged_inputs if paged else _ragged_inputs, s),
        flops=flops(s),
        peers=rivals,
        recorded=_recorded(s, "paged" if paged else "ragged"),
        interleave=True,
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """One contiguous request, ragged batches, and batches over pages of 16 in random order."""

    def kernels(shapes: list[Shape], both: list[Shape]) -> list[Shape]:
        again = both if device.arch == "90a" else []
        return [t for s in shapes for t in ([s, s._replace(backend="fa2")] if s in again else [s])]

    singles = [*map(_single, kernels(SINGLE, BOTH_SINGLE)), *map(_variant, VARIANTS)]
    ragged = [_batch(s, False) for s in kernels(RAGGED, RAGGED)]
    return [*singles, *ragged, *(_batch(s, True) for s in kernels(PAGED, BOTH_PAGED))]
