"""Where the time of a decode step goes, and what the engine makes of it: random weights, SmolLM2-135M's sizes.

``python bench/profile_step.py [speed] [drain] [parts] [kernels] [prefix] [levels] [shared]``; by default all.

* speed: tokens a second of the engine, greedy and sampled, and the captured step replayed without the host.
* drain: texts that end one after the other.
* parts: the captured step with one operator left out at a time; the difference is what it costs.
* kernels: every kernel of a step by CUPTI, through torch's profiler.
* prefix: attention over a shared prefix in one decode launch and as a cascade.
* levels: the parts of such a cascade.
* shared: what the engine makes of requests that share their prompt.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np
from random_llama import random_llama

from fi_cupy import cascade, gemm, lookup, norm, rope
from fi_cupy.cascade_attention import MultiLevelCascadeAttentionWrapper
from fi_cupy.decode import BatchDecodeWithPagedKVCacheWrapper
from fi_cupy.models.backend import CupyBackend
from fi_cupy.models.engine import Engine, EngineStats
from fi_cupy.models.llama import Llama
from fi_cupy.models.sampler import SamplingParams
from fi_cupy.prefill import BatchPrefillWithPagedKVCacheWrapper
from fi_cupy.testing.bench import random_array

PROMPT, NEW = 40, 128


def _start(model: Llama, batch: int, params: SamplingParams, **options: Any) -> Engine:
    """An engine with `batch` requests that decode."""
    engine = Engine(model, max_batch=batch, max_prefill_tokens=2048, **options)
    rng = np.random.default_rng(0)
    for i in range(batch):
        p = SamplingParams(NEW, params.temperature, params.top_p, params.top_k, i, ignore_eos=True)
        engine.submit(rng.integers(3, model.config.vocab_size, PROMPT).tolist(), p)
    return engine


def _replay_time(engine: Engine, step: Callable[[], None], count: int = 200) -> float:
    """Microseconds of a captured step, launched back to back."""
    with engine.backend.active():
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        for _ in range(20):
            step()
        begin.record()
        for _ in range(count):
            step()
        end.record()
        end.synchronize()
    return cupy.cuda.get_elapsed_time(begin, end) * 1000 / count


def _one_step(engine: Engine) -> Any:
    """Run the prompts and a few steps; the decode step that the engine then uses."""
    while not engine.stats.decode_steps:
        engine.step()
    engine.step()
    return next(iter(engine._steps.values()))


def speed(model: Llama) -> None:
    for name, params in {
        "greedy": SamplingParams(),
        "temperature 0.8": SamplingParams(temperature=0.8),
        "temperature 0.8, top-p 0.95": SamplingParams(temperature=0.8, top_p=0.95),
        "temperature 0.8, top-k 50, top-p 0.95": SamplingParams(temperature=0.8, top_p=0.95, top_k=50),
    }.items():
        row = []
        for batch in (1, 8, 64):
            if batch == 8 and not params.greedy:
                continue
            best = 0.0
            for _ in range(3):
                engine = _start(model, batch, params)
                _one_step(engine)  # the capture of the decode step
                engine.stats.decode_tokens, engine.stats.decode_seconds = 0, 0.0
                engine.run()
                best = max(best, engine.stats.decode_tokens / engine.stats.decode_seconds)
            step = next(iter(engine._steps.values()))
            replay = next(iter(step._replays.values()))
            us = _replay_time(engine, replay)
            row.append(f"{batch}: {best:8,.0f} tok/s ({batch * 1e6 / best:5.0f} us; replayed {us:5.0f})")
        print(f"{name:38s} {' | '.join(row)}", flush=True)
    engine = _start(model, 64, SamplingParams())
    step = _one_step(engine)
    with engine.backend.active():
        start = time.perf_counter()
        for _ in range(200):
            step.prepare(engine._running)
        host = (time.perf_counter() - start) / 200
        engine.backend.synchronize()
    print(f"host: prepare of 64 rows {host * 1e6:.0f} us", flush=True)


def drain(model: Llama) -> None:
    """64 drawn texts that end after 80 tokens on average, at most 256: steps captured beforehand, and when met."""
    vocab = model.config.vocab_size
    stops = np.random.default_rng(0).permutation(vocab)[: vocab // 80].tolist()
    for prepared in (True, False):
        engine = Engine(model, max_batch=64, max_prefill_tokens=2048, stop_ids=stops)
        ids = np.random.default_rng(1).integers(3, vocab, PROMPT).tolist()
        params = [SamplingParams(256, temperature=1.0, seed=i) for i in range(64)]
        if prepared:
            engine.warm_up([(ids, p) for p in params])
        for p in params:
            engine.submit(ids, p)
        start = time.perf_counter()
        engine.run()
        s, seconds = engine.stats, time.perf_counter() - start
        when, rate = "before" if prepared else "when met", s.decode_tokens / s.decode_seconds
        print(
            f"texts that end, captured {when}: {s.decode_tokens} tokens in {s.decode_steps} steps, {rate:,.0f} tok/s, "
            f"{s.captures} captures {s.capture_seconds:.2f} s, {seconds:.2f} s in all",
            flush=True,
        )


def _without(targets: list[tuple[Any, str]], keep: Callable[..., bool], run: Callable[[], float]) -> float:
    """`run` with calls of the functions skipped for which `keep` is False."""
    saved = [(owner, name, getattr(owner, name)) for owner, name in targets]

    def skipping(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return real(*args, **kwargs) if keep(*args, **kwargs) else kwargs.get("out")

        return call

    for owner, name, real in saved:
        setattr(owner, name, skipping(real))
    try:
        return run()
    finally:
        for owner, name, real in saved:
            setattr(owner, name, real)


def parts(model: Llama) -> None:
    c = model.config
    decode = BatchDecodeWithPagedKVCacheWrapper
    for batch in (1, 64):
        engine = _start(model, batch, SamplingParams())
        step = _one_step(engine)

        def run(engine: Engine = engine, step: Any = step) -> float:
            with engine.backend.active():
                graph = engine.backend.capture(lambda: step._run(next(iter(step._replays))))
            return _replay_time(engine, graph)

        whole = run()
        never: Callable[..., bool] = lambda *a, **k: False  # noqa: E731
        by_in = lambda n, k: lambda a, w, *x, **y: tuple(w.shape) != (k, n)  # noqa: E731
        cases: dict[str, tuple[list[tuple[Any, str]], Callable[..., bool]]] = {
            "attention": ([(decode, "run"), (MultiLevelCascadeAttentionWrapper, "run")], never),
            "rope+append": ([(rope, "rope_append_paged_kv_cache")], never),
            "add+norm": ([(norm, "fused_add_rmsnorm")], never),
            "swiglu": ([(gemm, "mm_bf16_swiglu")], never),
            "argmax": ([(lookup, "argmax")], never),
        }
        for name, (n, k) in {
            "qkv": (c.qkv_size, c.hidden_size), "output": (c.hidden_size, c.num_qo_heads * c.head_dim),
            "down": (c.hidden_size, c.intermediate_size), "lm_head": (c.vocab_size, c.hidden_size),
        }.items():  # fmt: skip
            cases[name] = ([(gemm, "mm_bf16")], by_in(n, k))
        row = [f"{name} {whole - _without(*case, run):.0f}" for name, case in cases.items()]
        print(f"step of {batch}: {whole:.0f} us; left out, it is shorter by: {', '.join(row)}", flush=True)


def kernels(model: Llama) -> None:
    import torch

    for batch in (1, 64):
        engine = _start(model, batch, SamplingParams())
        step = _one_step(engine)
        replay = next(iter(step._replays.values()))
        steps = 20
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            with engine.backend.active():
                for _ in range(steps):
                    replay()
                engine.backend.synchronize()
            torch.cuda.synchronize()
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            profile.export_chrome_trace(file.name)
            events = [e for e in json.load(open(file.name))["traceEvents"] if e.get("cat") == "kernel"]
        events.sort(key=lambda e: e["ts"] + e["dur"])
        spent: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
        before = None
        for e in events:
            end = e["ts"] + e["dur"]
            row = spent[e["name"]]
            row[0] += 1
            row[1] += end - before if before is not None else e["dur"]
            row[2] += e["dur"]
            before = end
        total = sum(row[1] for row in spent.values()) / steps
        print(f"step of {batch}: {len(events) / steps:.0f} kernels, {total:.0f} us from end to end", flush=True)
        for name, (count, us, dur) in sorted(spent.items(), key=lambda x: -x[1][1]):
            each = f"{count / steps:4.0f} x {us / count:6.2f} us = {us / steps:6.1f} us ({dur / count:5.2f})"
            print(f"  {each}  {name[:90]}")


def _graph_time(run: Callable[[], Any], repeat: int = 20, rounds: int = 20) -> float:
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        run()
        stream.synchronize()
        stream.begin_capture()
        for _ in range(repeat):
            run()
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch(stream)
        begin, end = cupy.cuda.Event(), cupy.cuda.Event()
        begin.record(stream)
        for _ in range(rounds):
            graph.launch(stream)
        end.record(stream)
        end.synchronize()
    return cupy.cuda.get_elapsed_time(begin, end) * 1000 / (repeat * rounds)


def _floats(x: Any) -> Any:
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def prefix() -> None:
    """Requests that share `shared` keys and have 128 of their own: one decode launch, and a cascade."""
    page, own = 16, 128
    for qo, kv, d in ((9, 3, 64), (32, 8, 128)):
        for batch in (4, 16, 64):
            row = []
            for shared in (256, 512, 1024, 2048, 4096):
                pages = shared // page + batch * (own // page)
                cache = random_array((pages, 2, page, kv, d), "bfloat16", 1)
                q = random_array((batch, qo, d), "bfloat16", 2)
                first = np.arange(shared // page)
                mine = shared // page + np.arange(batch * (own // page)).reshape(batch, -1)
                each = np.arange(batch + 1, dtype=np.int32)
                full = np.full(batch, page, np.int32)
                work = cupy.empty((64 << 20,), np.uint8)
                plain = BatchDecodeWithPagedKVCacheWrapper(work)
                table = np.concatenate([np.concatenate([first, m]) for m in mine]).astype(np.int32)
                plain.plan(each * (len(table) // batch), table, full, qo, kv, d, page, q_data_type="bfloat16")
                both = MultiLevelCascadeAttentionWrapper(2, work)
                both.plan(
                    [each[[0, -1]], each], [np.int32([0, len(first)]), each * mine.shape[1]],
                    [first.astype(np.int32), mine.reshape(-1).astype(np.int32)], [np.int32([page]), full],
                    qo, kv, d, page, q_data_type="bfloat16",
                )  # fmt: skip
                out, out2 = cupy.empty_like(q), cupy.empty_like(q)
                a = _graph_time(lambda p=plain, q=q, c=cache, o=out: p.run(q, c, out=o))
                b = _graph_time(lambda p=both, q=q, c=cache, o=out2: p.run(q, c, out=o))
                error = float(cupy.abs(_floats(out) - _floats(out2)).max())
                row.append(f"{shared}: {a:6.1f} {b:6.1f}{'' if error < 0.02 else f' WRONG {error}'}")
            print(f"{qo}/{kv} d{d}, {batch:2d} requests, decode / cascade us: {', '.join(row)}", flush=True)


def levels() -> None:
    """The parts of a cascade alone: the first level with chunks of so many pages, the second level, the merge."""
    page, own, work = 16, 128, cupy.empty((64 << 20,), np.uint8)
    for qo, kv, d in ((9, 3, 64), (32, 8, 128)):
        for batch in (16, 64):
            for shared in (1024, 4096):
                pages = shared // page
                cache = random_array((pages + batch * own // page, 2, page, kv, d), "bfloat16", 1)
                q = random_array((batch, qo, d), "bfloat16", 2)
                out, other = cupy.empty_like(q), cupy.empty_like(q)
                lse = cupy.empty((batch, qo), np.float32)
                row = []
                for split in (None, 64, 32, 16, 8):
                    first = BatchPrefillWithPagedKVCacheWrapper(work)
                    first.plan(
                        [0, batch], [0, pages], np.arange(pages, dtype=np.int32), [page], qo, kv, d, page,
                        q_data_type="bfloat16", fixed_split_size=split,
                    )  # fmt: skip
                    us = _graph_time(lambda w=first, q=q, c=cache, o=out, s=lse: w.run(q, c, out=o, lse=s))
                    row.append(f"{split}: {us:.1f}")
                last = BatchDecodeWithPagedKVCacheWrapper(work)
                n = own // page
                last.plan(
                    np.arange(batch + 1, dtype=np.int32) * n, pages + np.arange(batch * n, dtype=np.int32),
                    np.full(batch, page, np.int32), qo, kv, d, page, q_data_type="bfloat16",
                )  # fmt: skip
                us = _graph_time(lambda w=last, q=q, c=cache, o=other, s=lse: w.run(q, c, out=o, lse=s))
                merge = _graph_time(lambda a=out, b=other, s=lse: cascade.merge_state_in_place(a, s, b, s))
                text = f"first level {', '.join(row)}; second {us:.1f}; merge {merge:.1f} us"
                print(f"{qo}/{kv} d{d}, {batch} requests, {shared} shared: {text}", flush=True)


def shared(model: Llama) -> None:
    """64 requests that share a prompt of so many tokens: tokens a second without sharing, with, and as a cascade."""
    for length in (256, 1024, 2048, 4096):
        rng, row = np.random.default_rng(0), []
        ids = rng.integers(3, model.config.vocab_size, length).tolist()
        for name, options in {
            "no": {"share_prefixes": False}, "pages": {"cascade_bytes": 1 << 60}, "cascade": {"cascade_bytes": 0},
        }.items():  # fmt: skip
            engine = Engine(
                model, max_batch=64, max_prefill_tokens=8192, num_pages=64 * (length + NEW + 16) // 16, **options
            )
            for i in range(64):
                engine.submit([*ids, 5 + i], SamplingParams(NEW, ignore_eos=True))
            start = time.perf_counter()
            while engine._waiting or engine._prefilling or len(engine._in_flight) > 1:
                engine._decode_turn = False  # prompts first, so that every decode step has 64 rows
                engine.step()
            engine.backend.synchronize()
            prompts = time.perf_counter() - start
            engine.step()  # the capture
            step = next(reversed(engine._steps.values()))
            with engine.backend.active():
                engine.backend.synchronize()
                start = time.perf_counter()
                for _ in range(50):
                    step.prepare(engine._running, engine._groups)
                host = (time.perf_counter() - start) / 50
            engine.stats = EngineStats()
            engine.run()
            s = engine.stats
            rate = s.decode_tokens / s.decode_seconds
            row.append(f"{name} {rate:,.0f} tok/s (host {host * 1e6:.0f} us), prompts {prompts * 1e3:.0f} ms")
        print(f"64 requests, {length} tokens shared: {'; '.join(row)}", flush=True)


def main() -> None:
    wanted = sys.argv[1:] or ["speed", "drain", "parts", "kernels", "prefix", "levels", "shared"]
    model = random_llama(CupyBackend())
    for name in wanted:
        try:
            functions = {"speed": speed, "parts": parts, "kernels": kernels, "shared": shared, "drain": drain}
            {"prefix": prefix, "levels": levels}[name]() if name in ("prefix", "levels") else functions[name](model)
        except Exception as error:
            print(f"{name}: {type(error).__name__}: {error}", flush=True)


if __name__ == "__main__":
    main()
