"""Times the decode kernel's CTA shapes and chunk lengths: what the rules of `fi_cupy.plan.decode` come from.

python bench/tune_decode.py [--only 16x4096] [--fp8] [--chunks 0.5,1,2] [--json FILE]
python bench/tune_decode.py --build    # only compiles, in parallel and without a GPU
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import bench_decode
from bench_decode import DIM, PAGE, SHAPES, Shape

from fi_cupy import decode, decode_kernel
from fi_cupy.device import DeviceInfo, device_info
from fi_cupy.dtypes import bfloat16, float8_e4m3fn
from fi_cupy.jit.build import build_many
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.plan import decode as plan
from fi_cupy.plan.decode import DecodeTiles
from fi_cupy.profiles import TYPICAL
from fi_cupy.testing.bench import launch_count, random_array, set_count
from fi_cupy.testing.bench_gpu import GpuTimer


def shapes(fp8: bool, column_tiles: int, device: DeviceInfo, dim: int = DIM) -> Iterator[DecodeTiles]:
    """CTA shapes that fit: warps x stages x CTAs a multiprocessor, for fp8 also with two kv heads a CTA."""
    for pair in (False, True) if fp8 else (False,):
        for warps, stages, ctas in (
            (16, 1, 1), (12, 1, 1), (8, 1, 1), (8, 2, 1), (8, 3, 1), (8, 4, 1), (8, 1, 2), (8, 2, 2), (8, 3, 2),
            (4, 1, 3), (4, 2, 2), (4, 3, 2), (4, 2, 3), (4, 2, 4), (2, 3, 4),
        ):  # fmt: skip
            size = plan.smem_bytes(warps, stages, dim, 1 if fp8 else 2, column_tiles)
            fits = ctas * (size + 1024) <= device.smem_per_sm and size <= device.smem_per_block
            if fits and 65536 // (ctas * warps * 32) >= (96 if fp8 or dim <= 64 else 120):  # registers
                yield DecodeTiles(warps, stages, ctas, size, pair)


def spec_of(tiles: DecodeTiles, fp8: bool, dim: int, column_tiles: int = 1) -> KernelSpec:
    kv = float8_e4m3fn if fp8 else bfloat16
    return decode_kernel.spec_of(
        tiles, bfloat16, kv, bfloat16, dim, column_tiles, tile_in_page=True, soft_cap=False, alibi=False, rope=False,
        head_scales=False,
    )  # fmt: skip


def inputs(s: Shape, timer: GpuTimer) -> list[dict[str, Any]]:
    nbytes = bench_decode.nbytes(s)
    made = []
    for i in range(set_count(nbytes, nbytes, timer.l2_bytes, timer.free_bytes())):
        table = bench_decode.page_table(s, i)
        q = random_array((s.batch, s.heads, s.dim), "bfloat16", 2 * i)
        cache = random_array((int(table[0][-1]), 2, PAGE, s.kv_heads, s.dim), s.kv, 2 * i + 1)
        made.append({"table": table, "q": q, "cache": cache, "out": q.copy()})
    return made


def planned(s: Shape, sets: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sets with a wrapper each, planned by the rules of the moment."""
    import cupy

    space, made = cupy.empty((64 << 20,), cupy.uint8), []
    for x in sets:
        wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(space)
        wrapper.plan(*x["table"], s.heads, s.kv_heads, s.dim, PAGE, q_data_type="bfloat16", kv_data_type=s.kv)
        made.append({**x, "wrapper": wrapper})
    return made


def measure(timer: GpuTimer, s: Shape, chunks: list[float]) -> dict[str, float]:
    """Microseconds of every shape and chunk length (a factor on the rule's); "*" marks what the rules choose."""
    device, fp8 = device_info(0), s.kv != "bfloat16"
    sets, replays = inputs(s, timer), {}
    rule = plan.choose_chunk

    def call(x: dict[str, Any]) -> None:
        x["wrapper"].run(x["q"], x["cache"], out=x["out"])

    columns = plan.head_blocks(s.heads // s.kv_heads, s.dim)[2]
    choices: list[DecodeTiles | None] = [None, *shapes(fp8, columns, device, s.dim)]
    for tiles in choices:
        for factor in chunks if tiles is not None else [1.0]:
            label = "now*" if tiles is None else f"w{tiles.warps}s{tiles.stages}c{tiles.ctas_per_sm}"
            label += ("p" if tiles is not None and tiles.head_pair else "") + (f" x{factor:g}" if factor != 1 else "")
            choose = decode_kernel.choose_tiles if tiles is None else lambda *_, tiles=tiles, **__: tiles
            decode_kernel.geometry.cache_clear()
            with (
                mock.patch.object(decode_kernel, "choose_tiles", choose),
                mock.patch.object(plan, "choose_chunk", lambda *a, f=factor: max(int(rule(*a) * f), 1)),
            ):
                try:
                    ready = planned(s, sets)
                    first = timer.capture(call, ready, len(ready), "fi_cupy")
                    us = min(timer.time({label: first}, 2, 0.0)[label]) / first.launches
                    replays[label] = timer.capture(call, ready, launch_count(us, len(ready)), "fi_cupy")
                except Exception as error:
                    print(f"{label}: {type(error).__name__}: {error}")
    decode_kernel.geometry.cache_clear()
    times = timer.time(replays, 7, 0.0)
    return {label: sorted(times[label])[3] / replays[label].launches for label in replays}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comma-separated: batch x keys")
    parser.add_argument("--fp8", action="store_true", help="only fp8 caches, else only bf16")
    parser.add_argument("--chunks", default="1", help="factors on the rule's chunk length")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--json")
    parser.add_argument("--build", action="store_true", help="only compile, for an H100; needs no GPU")
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name]
    device = TYPICAL["90a"] if options.build else device_info(0)
    specs = dict.fromkeys(
        spec_of(t, fp8, dim) for fp8 in (False, True) for dim in (DIM, 64) for t in shapes(fp8, 1, device, dim)
    )
    for job, outcome in build_many([(s, device.arch) for s in specs], processes=options.processes):
        if isinstance(outcome, Exception):
            print(f"{job.symbol}: {outcome}")
    if options.build:
        return
    timer, table = GpuTimer(), {}
    for s in SHAPES:
        name = f"{s.batch}x{s.kv_len}"
        fits = (not only or name in only) and (s.kv != "bfloat16") == options.fp8
        if not fits or s.heads // s.kv_heads > 8:
            continue
        name += f" {s.heads}/{s.kv_heads} d{s.dim}" + (" fp8" if options.fp8 else "") + (" ragged" if s.ragged else "")
        table[name] = measure(timer, s, [float(f) for f in options.chunks.split(",")])
        ranked = sorted(table[name].items(), key=lambda item: item[1])
        floor = bench_decode.nbytes(s) / 3.08e6
        print(f"{name:22} floor {floor:.1f} now {table[name].get('now*', 0):.2f} ", end="")
        print("  ".join(f"{label} {us:.2f}" for label, us in ranked[:8]), flush=True)
        timer.release()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(table, file, indent=1)


if __name__ == "__main__":
    main()
