"""Sampling: every function must read the rows once; what writes rows back, or reads them again, pays for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peers

import fi_cupy
from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

#: Batch sizes of the tables; the vocabularies of Llama 3 and Llama 2.
BATCHES = (1, 64, 512)
VOCABS = (128256, 32000)
SEED = 7


def normal_logits(rows: int, vocab: int, i: int, dtype: str = "float32") -> Any:
    """Normal logits of standard deviation 3, made on the device (Box-Muller over hashed bits)."""
    import cupy

    a = random_array((rows, vocab), "uint32", 2 * i)
    b = random_array((rows, vocab), "uint32", 2 * i + 1)
    u = (a.astype(cupy.float32) + 1) * cupy.float32(2.0**-32)
    v = b.astype(cupy.float32) * cupy.float32(6.2831853 * 2.0**-32)
    return (3 * cupy.sqrt(-2 * cupy.log(u)) * cupy.cos(v)).astype(dtype)


def _logits(rows: int, vocab: int, dtype: str, i: int) -> tuple[Any, ...]:
    return (normal_logits(rows, vocab, i, dtype),)


def _probs(rows: int, vocab: int, dtype: str, i: int) -> tuple[Any, ...]:
    return (fi_cupy.softmax(normal_logits(rows, vocab, i)).astype(dtype),)


def _case(
    name: str,
    rows: int,
    vocab: int,
    make: Callable[..., Any],
    call: Callable[[Any, Any], Any],
    *,
    writes: int = 0,
    dtype: str = "float32",
    torch: Callable[[Any], Any] | None = None,
    recorded: str = "",
    recorded_torch: str = "",
) -> BenchCase:
    """`call(module, array)` is ours and FlashInfer's alike; `writes`: bytes written for each token of a row."""
    compared: dict[str, Callable[[Any], Any]] = {"flashinfer": lambda s: call(peers.flashinfer(), s[0])}
    if torch is not None:
        compared["torch"] = lambda s: torch(s[0])
    itemsize = 4 if dtype == "float32" else 2
    return bench_case(
        f"{name} {rows}x{vocab} {'f32' if dtype == 'float32' else 'bf16'}",
        lambda s: call(fi_cupy, s[0]),
        make_inputs=partial(make, rows, vocab, dtype),
        bytes=rows * vocab * (itemsize + writes),
        peers=compared if dtype == "float32" else {},
        recorded=[f"samp {r} V{vocab} b{rows}" for r in (recorded, recorded_torch) if r and dtype == "float32"],
        limit="copy" if writes else "read",
    )


def _softmax(x: Any) -> Any:
    return peers.torch().softmax(x, -1)


def _multinomial(x: Any) -> Any:
    return peers.torch().multinomial(x, 1)


def _rows(rows: int, vocab: int, dtype: str = "float32") -> list[BenchCase]:
    make = partial(_case, rows=rows, vocab=vocab, dtype=dtype)
    seeded = {"seed": SEED, "offset": 0}
    return [
        make("softmax", make=_logits, call=lambda m, x: m.sampling.softmax(x), writes=4, torch=_softmax,
             recorded="softmax", recorded_torch="torch.softmax"),
        make("sampling_from_logits", make=_logits, call=lambda m, x: m.sampling.sampling_from_logits(x, **seeded),
             recorded="from_logits"),
        make("sampling_from_probs", make=_probs, call=lambda m, x: m.sampling.sampling_from_probs(x, **seeded),
             torch=_multinomial, recorded="from_probs"),
        make("top_p 0.9 from probs", make=_probs,
             call=lambda m, x: m.sampling.top_p_sampling_from_probs(x, 0.9, **seeded), recorded="topp_probs .9"),
        make("top_k 50 from probs", make=_probs,
             call=lambda m, x: m.sampling.top_k_sampling_from_probs(x, 50, **seeded), recorded="topk_probs 50"),
        make("min_p 0.05 from probs", make=_probs,
             call=lambda m, x: m.sampling.min_p_sampling_from_probs(x, 0.05, **seeded), recorded="minp_probs .05"),
        make("top_k_top_p 50 0.9 from logits", make=_logits,
             call=lambda m, x: m.sampling.top_k_top_p_sampling_from_logits(x, 50, 0.9, **seeded),
             recorded="topk_topp_logits k50 p.9"),
        make("top_k_top_p 50 0.9 joint from logits", make=_logits,
             call=lambda m, x: m.sampling.top_k_top_p_sampling_from_logits(
                 x, 50, 0.9, filter_apply_order="joint", **seeded),
             recorded="topk_topp_logits joint"),
        make("top_k_top_p 50 0.9 from probs", make=_probs,
             call=lambda m, x: m.sampling.top_k_top_p_sampling_from_probs(x, 50, 0.9, **seeded),
             recorded="topk_topp_probs k50 p.9"),
        make("top_k_renorm 50", make=_probs, call=lambda m, x: m.sampling.top_k_renorm_probs(x, 50),
             writes=4 if dtype == "float32" else 2, recorded="topk_renorm 50"),
        make("top_p_renorm 0.9", make=_probs, call=lambda m, x: m.sampling.top_p_renorm_probs(x, 0.9),
             writes=4 if dtype == "float32" else 2, recorded="topp_renorm .9"),
        make("top_k_mask_logits 50", make=_logits, call=lambda m, x: m.sampling.top_k_mask_logits(x, 50),
             writes=4 if dtype == "float32" else 2, recorded="topk_mask_logits 50"),
        make("top_k 50", make=_logits, call=lambda m, x: m.topk.top_k(x, 50), torch=lambda x: peers.torch().topk(x, 50),
             recorded_torch="torch.topk50"),
    ]  # fmt: skip


def _flat(rows: int, vocab: int) -> list[BenchCase]:
    """All tokens tied: nothing narrows the search."""

    def make(rows: int, vocab: int, dtype: str, i: int) -> tuple[Any, ...]:
        import cupy

        return (cupy.full((rows, vocab), 1.0 / vocab, dtype),)

    return [
        _case("top_k 50 from flat probs", rows, vocab, make,
              lambda m, x: m.sampling.top_k_sampling_from_probs(x, 50, seed=SEED, offset=0)),
        _case("top_p 0.9 from flat probs", rows, vocab, make,
              lambda m, x: m.sampling.top_p_sampling_from_probs(x, 0.9, seed=SEED, offset=0)),
        _case("top_k 50 of flat probs", rows, vocab, make, lambda m, x: m.topk.top_k(x, 50),
              torch=lambda x: peers.torch().topk(x, 50)),
        _case("top_k_renorm 50 of flat probs", rows, vocab, make, lambda m, x: m.sampling.top_k_renorm_probs(x, 50),
              writes=4),
        _case("top_p_renorm 0.9 of flat probs", rows, vocab, make, lambda m, x: m.sampling.top_p_renorm_probs(x, 0.9),
              writes=4),
    ]  # fmt: skip


def _spiked(rows: int, vocab: int) -> list[BenchCase]:
    """One token has nearly all of the mass, and the rest is wide and thin."""

    def make(rows: int, vocab: int, dtype: str, i: int) -> tuple[Any, ...]:
        logits = normal_logits(rows, vocab, i, dtype)
        logits[:, 12345 % vocab] += 40
        return (logits,)

    return [
        _case("top_k_top_p 50 0.9 from spiked logits", rows, vocab, make,
              lambda m, x: m.sampling.top_k_top_p_sampling_from_logits(x, 50, 0.9, seed=SEED, offset=0)),
        _case("top_p 0.9 from spiked logits", rows, vocab, make,
              lambda m, x: m.sampling.top_k_top_p_sampling_from_logits(x, vocab, 0.9, seed=SEED, offset=0)),
    ]  # fmt: skip


def _pipeline(rows: int, vocab: int) -> BenchCase:
    """Temperature, softmax, top-k, top-p, min-p and a token: one kernel of ours."""

    def pipe(module: Any, x: Any) -> Any:
        p = module.logits_processor
        made = p.LogitsPipe([p.Temperature(), p.Softmax(), p.TopK(), p.TopP(), p.MinP(), p.Sample()])
        return made(x, temperature=0.8, top_k=50, top_p=0.9, min_p=0.02)

    return _case("LogitsPipe T k p min_p", rows, vocab, _logits, pipe)


def _speculative(rows: int, n: int, vocab: int) -> BenchCase:
    def make(i: int) -> tuple[Any, ...]:
        import cupy

        draft = fi_cupy.softmax(normal_logits(rows * n, vocab, 2 * i)).reshape(rows, n, vocab)
        target = fi_cupy.softmax(normal_logits(rows * (n + 1), vocab, 2 * i + 1)).reshape(rows, n + 1, vocab)
        ids = (random_array((rows, n), "uint32", i) % vocab).astype(cupy.int32)
        return draft, ids, target

    return bench_case(
        f"chain_speculative n{n} {rows}x{vocab} f32",
        lambda s: fi_cupy.chain_speculative_sampling(*s, seed=SEED, offset=0),
        make_inputs=make,
        bytes=2 * rows * vocab * 4,
        peers={"flashinfer": lambda s: peers.flashinfer().chain_speculative_sampling(*s, seed=SEED, offset=0)},
        recorded=f"chain_spec n{n} V{vocab} b{rows}",
        limit="read",
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """The sampling table: float32 at every batch and vocabulary, bf16 at the larger one, ties, speculation."""
    table = [case for vocab in VOCABS for rows in BATCHES for case in _rows(rows, vocab)]
    table += [case for rows in BATCHES for case in _rows(rows, VOCABS[0], "bfloat16")]
    table += _flat(64, VOCABS[0]) + _spiked(64, VOCABS[0])
    table += [_pipeline(rows, VOCABS[0]) for rows in BATCHES]
    return table + [_speculative(rows, 5, 32000) for rows in (64, 512)]
