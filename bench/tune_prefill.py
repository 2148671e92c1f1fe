"""Times the Hopper prefill kernel's orders of work and tiles of rows beside cuDNN, interleaved: what the rules of
`fi_cupy.prefill_hopper` come from.

python bench/tune_prefill.py [--only 16x1024] [--rounds 9] [--pages]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import bench_prefill
import peers
from bench_prefill import Shape, flops, page_table

from fi_cupy import prefill, prefill_batch, prefill_hopper, prefill_kernel
from fi_cupy.plan.prefill import plan_prefill
from fi_cupy.testing.bench import random_array
from fi_cupy.testing.bench_gpu import GpuTimer

RAGGED = [
    Shape(16, 1024, 1024),
    Shape(32, 512, 512),
    Shape(64, 256, 256),
    Shape(16, 1024, 1024, 32, 8),
    Shape(8, 2048, 2048),
    Shape(4, 4096, 4096),
    Shape(16, 512, 4096, 32, 8),
    Shape(16, 1024, 1024, dim=64),
]
PAGED = [Shape(1, 4096, 16384, 32, 8), Shape(16, 512, 4096, 32, 8), Shape(16, 1024, 1024, 32, 8)]
PAGES = (8, 16, 64, 80)


def order(megabytes: float | None, heads: int | None = None, short: bool | None = None) -> list[Any]:
    """Patches: bytes of keys and values that are handed out side by side, heads side by side, tiles of 128 rows."""
    patches: list[Any] = []
    if megabytes is None:
        patches.append(mock.patch.object(prefill_batch, "block_keys", lambda *_: None))
    else:
        patches.append(mock.patch.object(prefill_hopper, "_BLOCK_BYTES", int(megabytes * (1 << 20))))
    if heads is not None:
        patches.append(mock.patch.object(prefill_hopper, "heads_together", lambda n, _: min(n, heads)))
    if short is not None:
        patches.append(mock.patch.object(prefill_kernel, "wants_short_tiles", lambda *_: short))
    return patches


def _from_row_0(*args: Any, align_end: bool, **options: Any) -> Any:
    return plan_prefill(*args, **options)


ORDERS: dict[str, list[Any]] = {
    "now": [],
    "from row 0": [mock.patch.object(prefill_batch, "plan_prefill", _from_row_0)],
    "longest first, from row 0": [*order(None), mock.patch.object(prefill_batch, "plan_prefill", _from_row_0)],
    "longest first": order(None),
    **{f"{m:g} MB": order(m) for m in (4, 8, 12, 24)},
    "4 heads": order(16, 4),
    "16 heads": order(16, 16),
    "q128": order(16, short=True),
    "q192": order(16, short=False),
}


def patched(patches: list[Any], make: Callable[[], Any]) -> Any:
    """What `make` makes under patches; captured launches keep what they were launched with."""
    caches = (prefill_kernel.geometry, prefill_hopper.map_values, prefill_hopper.heads_together)
    for cached in caches:
        cached.cache_clear()
    for patch in patches:
        patch.start()
    try:
        return make()
    finally:
        for patch in patches:
            patch.stop()
        for cached in caches:
            cached.cache_clear()


def ragged(timer: GpuTimer, s: Shape, count: int) -> Any:
    import cupy

    inputs = bench_prefill._contiguous(s, 0)
    out = cupy.empty_like(inputs["q"])

    def make() -> Any:
        wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(cupy.empty((64 << 20,), cupy.uint8))
        wrapper.plan(*bench_prefill._offsets(s), s.heads, s.kv_heads, s.dim, causal=s.causal, q_data_type="bfloat16")
        call = partial(wrapper.run, inputs["q"], inputs["k"], inputs["v"], out=out)
        return timer.capture(lambda _: call(), [(wrapper, call)], count, "fi_cupy")

    replays = {name: patched(patches, make) for name, patches in ORDERS.items()}
    if s.qo_len == s.kv_len:
        shared = timer.as_peer_inputs(inputs, "torch")
        q, k, v = (shared[n].view(s.batch, -1, *shared[n].shape[1:]).transpose(1, 2) for n in "qkv")
        for name in ("cudnn",):
            call = partial(peers.attention, q, k, v, causal=s.causal, backend=name)
            replays[name] = timer.capture(lambda _, call=call: call(), [inputs], count, name)
    return replays


def paged(timer: GpuTimer, s: Shape, count: int) -> Any:
    """Pages of several sizes in random order, and the same work on contiguous keys."""
    import cupy

    inputs = bench_prefill._contiguous(s, 0)
    qo, kv = bench_prefill._offsets(s)
    space, out = cupy.empty((64 << 20,), cupy.uint8), cupy.empty_like(inputs["q"])

    def make_ragged() -> Any:
        wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(space)
        wrapper.plan(qo, kv, s.heads, s.kv_heads, s.dim, causal=s.causal, q_data_type="bfloat16")
        call = partial(wrapper.run, inputs["q"], inputs["k"], inputs["v"], out=out)
        return timer.capture(lambda _: call(), [(wrapper, call)], count, "fi_cupy")

    def make(page: int) -> Any:
        wrapper = prefill.BatchPrefillWithPagedKVCacheWrapper(space)
        with mock.patch.object(bench_prefill, "PAGE", page):
            table = page_table(s, 0)
        wrapper.plan(*table, s.heads, s.kv_heads, s.dim, page, causal=s.causal, q_data_type="bfloat16")
        cache = random_array((len(table[2]), 2, page, s.kv_heads, s.dim), "bfloat16", 5)
        call = partial(wrapper.run, inputs["q"], cache, out=out)  # a replay keeps it, and with it the cache
        return timer.capture(lambda _: call(), [(wrapper, call)], count, "fi_cupy")

    replays = {"contiguous": make_ragged()} | {f"page {p}": make(p) for p in PAGES}
    replays["longest first, contiguous"] = patched(order(None), make_ragged)
    replays["longest first, page 16"] = patched(order(None), lambda: make(16))
    return replays


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated: batch x keys")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--pages", action="store_true", help="pages against contiguous keys")
    options = parser.parse_args()
    only, timer = [name for name in options.only.split(",") if name], GpuTimer()
    for s in PAGED if options.pages else RAGGED:
        if only and f"{s.batch}x{s.kv_len}" not in only:
            continue
        count = max(1, int(1.2e-3 * 5e14 // flops(s)))
        replays = (paged if options.pages else ragged)(timer, s, count)
        times = timer.time(replays, options.rounds, 0.5)
        us = {name: sorted(t)[len(t) // 2] / replays[name].launches for name, t in times.items()}
        peer = us.get("cudnn", us.get("contiguous"))
        length = f"{s.qo_len}" if s.qo_len == s.kv_len else f"({s.qo_len}, {s.kv_len})"
        print(f"{s.batch}x{length} {s.heads}/{s.kv_heads} d{s.dim}:", end=" ")
        for name, value in sorted(us.items(), key=lambda item: item[1]):
            ratio = f" {peer / value:.3f}" if peer else ""
            print(f"{name} {value:.1f} ({flops(s) / value / 1e6:.0f}{ratio});", end=" ")
        print(flush=True)
        timer.release()


if __name__ == "__main__":
    main()
