"""Small runs of the latent attention kernels for compute-sanitizer, each held to the reference.

    compute-sanitizer --tool racecheck --kernel-name kernel_substring=mla python tests/gpu/race_mla.py all

Instances: see CASES; "all" is all of them in one process, "compile" builds them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from test_mla import Batch, check

from fi_cupy import mla, mla_batch, mla_kernel
from fi_cupy.device import device_info
from fi_cupy.plan.mla import Costs


class Case(NamedTuple):
    """Kernel, heads, page size, type of the cache, multiprocessors to be used, and (queries, keys) of the requests."""

    backend: str = "fa2"
    heads: int = 16
    page_size: int = 16
    kv: str = "bfloat16"
    multiprocessors: int = 2
    lens: tuple[tuple[int, int], ...] = ((1, 70), (2, 133), (1, 0))
    causal: bool = False


MANY = ((1, 330), (2, 200))
CASES = {
    "portable": Case(),
    "portable_tall": Case(heads=40),
    "portable_fp8": Case(kv="float8_e4m3fn"),
    "portable_split": Case(lens=MANY, multiprocessors=16),  # chunks that meet
    "portable_last": Case(lens=MANY),  # more chunks than run at a time: the last one joins all
    "hopper": Case("fa3", 40),
    "hopper_causal": Case("fa3", 16, lens=((9, 140),), causal=True),
    "hopper_gathered": Case("fa3", 40, 5),
    "hopper_fp8": Case("fa3", 40, kv="float8_e5m2"),
    "hopper_split": Case("fa3", 40, 64, lens=MANY, multiprocessors=16),
    "hopper_last": Case("fa3", 40, 64, lens=MANY),
}
#: Splitting costs next to nothing, so that short requests are split; or so much that none is.
CHEAP, DEAR = Costs(0.1, 0.1, 0.01, 0.0), Costs(1.0, 1e6, 1.0, 0.0)


def run(name: str) -> None:
    """Launch it once and hold it to the reference."""
    import cupy

    c, rng = CASES[name], np.random.default_rng(0)
    mla_batch.device_info = lambda index: replace(device_info(index), num_sms=c.multiprocessors)
    splits = "split" in name or "last" in name
    mla_kernel.PORTABLE_COSTS = mla_kernel.HOPPER_COSTS = CHEAP if splits else DEAR
    fp8 = {"ckv_scale": 0.5, "kpe_scale": 1.5} if c.kv != "bfloat16" else {}
    batch = Batch(rng, *zip(*c.lens, strict=True), c.heads, c.page_size, kv=c.kv)
    wrapper = mla.BatchMLAPagedAttentionWrapper(cupy.full((16 << 20,), 0xFF, cupy.uint8), backend=c.backend)
    wrapper.plan(*batch.plan_args(c.causal))
    work = wrapper._planned.work
    assert (work.num_split > 0) == splits
    got = wrapper.run(*batch.run_args(), return_lse=True, **batch.outputs(), **fp8)
    loose = ("rotated", 3e-3) if fp8 else ()
    check(got, batch.reference(c.causal, **fp8), "bfloat16", *loose)
    print(
        f"{name}: {wrapper._planned.geometry.choice}, {work.num_items} items, {work.num_split} split: right", flush=True
    )


def compile_all() -> None:
    """Put what the cases need into the cache."""
    from fi_cupy.dtypes import dtype
    from fi_cupy.jit.build import build_many

    specs = []
    for c in CASES.values():
        problem = mla_kernel.Problem(c.heads, dtype("bfloat16"), dtype(c.kv), c.page_size, backend=c.backend)
        rows = sum(q for q, _ in c.lens) * c.heads // len(c.lens)
        specs.append(mla_kernel.geometry(problem, rows, device_info(0)).spec(mla_kernel.Call()))
    for job, found in build_many([(spec, "90a") for spec in dict.fromkeys(specs)], 8):
        if isinstance(found, Exception):
            raise SystemExit(f"{job.symbol}: {found}")


def main() -> None:
    names = sys.argv[1:]
    if names == ["compile"]:
        compile_all()
        return
    import cupy

    cupy.cuda.set_allocator(None)  # allocations of their own: memcheck sees where each one ends
    cupy.cuda.set_pinned_memory_allocator(None)
    for name in CASES if names == ["all"] else names:
        run(name)
    cupy.cuda.runtime.deviceSynchronize()
    print("right", flush=True)


if __name__ == "__main__":
    main()
