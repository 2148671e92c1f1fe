"""One small run of the Hopper prefill kernel for compute-sanitizer, on a few CTAs that each take several items.

    FI_CUPY_LINEINFO=1 compute-sanitizer --tool racecheck --kernel-name kernel_substring=prefill_hopper \
        python tests/gpu/race_prefill_hopper.py ragged

Instances: see CASES; "compile" builds them all, "control" is a kernel with a race that the tool must see.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fi_cupy import prefill, prefill_batch, prefill_hopper, prefill_kernel
from fi_cupy.device import device_info
from fi_cupy.dtypes import bfloat16
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.reference.attention import batch_prefill_paged, batch_prefill_ragged
from fi_cupy.testing.generators import normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close


class Case(NamedTuple):
    """Head dims, group, page size (0: contiguous), the least rows of a tile, and multiprocessors to be used."""

    dims: tuple[int, int] = (128, 128)
    group: int = 2
    page_size: int = 0
    cap: float = 0.0
    short: bool = False
    multiprocessors: int = 2
    lens: tuple[tuple[int, int], ...] = ((100, 100), (7, 90), (3, 0), (130, 190), (64, 64))


CASES = {
    "ragged": Case(),
    "fine": Case(group=1),
    "gathered": Case(group=5),
    "page8": Case(page_size=8),
    "page16": Case(page_size=16),
    "short": Case(short=True),
    "split": Case(page_size=16, multiprocessors=8, lens=((40, 2100), (70, 1500))),
    "d64": Case((64, 64)),
    "cap": Case(cap=20.0),
    "d192": Case((192, 128)),
    "d256": Case((256, 256), page_size=16),
}
HEADS = 2  # of keys and values


def spec_of(c: Case):
    kinds = prefill_hopper.TILES, prefill_hopper.SHORT_TILES, prefill_hopper.FINE_TILES
    tiles = kinds[1 if c.short else 2 if c.group == 1 else 0][c.dims]
    return prefill_hopper.hopper_spec(
        bfloat16, tiles, paged=c.page_size > 0, query_boxes=tiles.tile_q % c.group == 0, soft_cap=c.cap > 0
    )


def run(c: Case) -> None:
    """Launch it once and hold it to the reference."""
    import cupy

    prefill_batch.device_info = lambda index: replace(device_info(index), num_sms=c.multiprocessors)
    prefill_kernel.wants_short_tiles = lambda *_: c.short
    rng = np.random.default_rng(0)
    qo, kv = (np.concatenate([[0], np.cumsum([x[i] for x in c.lens])]).astype(np.int32) for i in (0, 1))
    q = normal(rng, (int(qo[-1]), HEADS * c.group, c.dims[0]))
    space = cupy.full((32 << 20,), 0xFF, cupy.uint8)
    out, lse = poisoned((*q.shape[:2], c.dims[1]), "bfloat16"), poisoned(q.shape[:2], "float32")
    options = {"causal": True, "logits_soft_cap": c.cap}
    if c.page_size:
        lens = np.diff(kv)
        indptr = np.concatenate([[0], np.cumsum(-(-lens // c.page_size))]).astype(np.int32)
        table = (
            indptr,
            rng.permutation(indptr[-1]).astype(np.int32),
            np.where(lens > 0, (lens - 1) % c.page_size + 1, 1),
        )
        k, v = (normal(rng, (int(indptr[-1]), c.page_size, HEADS, d)) for d in c.dims)
        wrapper = prefill.BatchPrefillWithPagedKVCacheWrapper(space, backend="fa3")
        wrapper.plan(
            qo, *table, q.shape[1], HEADS, c.dims[0], c.page_size, c.dims[1], q_data_type="bfloat16", **options
        )
        wrapper.run(on_gpu(q), (on_gpu(k), on_gpu(v)), out=out, lse=lse)
        want = batch_prefill_paged(*(x.astype(np.float64) for x in (q, k, v)), qo, *table, **options)
    else:
        k, v = (normal(rng, (int(kv[-1]), HEADS, d)) for d in c.dims)
        wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(space, backend="fa3")
        wrapper.plan(qo, kv, q.shape[1], HEADS, *c.dims, q_data_type="bfloat16", **options)
        wrapper.run(*map(on_gpu, (q, k, v)), out=out, lse=lse)
        want = batch_prefill_ragged(*(x.astype(np.float64) for x in (q, k, v)), qo, kv, **options)
    planned = wrapper._planned
    assert planned.geometry.spec == spec_of(c)
    print(
        f"{planned.work.num_items} items, {planned.work.num_split} split, grid",
        planned.geometry.grid(planned.work.num_items),
    )
    assert_close(to_float64(out), want[0], to_dtype("bfloat16"), "product")


def control() -> None:
    """Threads read what others have written, with nothing in between."""
    import cupy

    code = """extern "C" __global__ void prefill_hopper_control(int* out) {
        __shared__ int shared[64];
        shared[threadIdx.x] = threadIdx.x;
        out[threadIdx.x] = shared[63 - threadIdx.x];
    }"""
    out = cupy.zeros(64, cupy.int32)
    cupy.RawKernel(code, "prefill_hopper_control")((1,), (64,), (out,))
    cupy.cuda.runtime.deviceSynchronize()


def main() -> None:
    name = sys.argv[1]
    if name == "control":
        control()
        print("right")
        return
    if name == "compile":
        from fi_cupy.jit.build import build_many

        for job, found in build_many([(spec, "90a") for spec in dict.fromkeys(map(spec_of, CASES.values()))], 8):
            if isinstance(found, Exception):
                raise SystemExit(f"{job.symbol}: {found}")
        return
    run(CASES[name])
    print("right")


if __name__ == "__main__":
    main()
