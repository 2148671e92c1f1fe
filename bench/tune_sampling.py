"""Times every launch shape of the sampling kernels: what the thresholds in `sampling_kernels.launch_shape` come from.

python bench/tune_sampling.py [--vocab 128256] [--batches 1,8,64,512] [--json FILE]
python bench/tune_sampling.py --build    # only compiles, in parallel, what `launch_shape` can choose
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any
from unittest import mock

from bench_sampling import SEED, normal_logits

from fi_cupy import sampling, sampling_kernels, sampling_launch, topk
from fi_cupy.device import DeviceInfo, device_info
from fi_cupy.dtypes import DType, bfloat16, float16, float32
from fi_cupy.jit.build import build_many
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.sampling_kernels import (
    LaunchShape,
    filter_spec,
    renorm_spec,
    room,
    sample_spec,
    softmax_spec,
    speculative_spec,
)
from fi_cupy.testing.bench import launch_count, set_count
from fi_cupy.testing.bench_gpu import GpuTimer

AT = {"seed": SEED, "offset": 0}
#: name, kind of the launch, input ("l"ogits or "p"robabilities), call.
OPS: list[tuple[str, str, str, Callable[[Any], Any]]] = [
    ("from_logits", "draw", "l", lambda x: sampling.sampling_from_logits(x, **AT)),
    ("from_probs", "draw", "p", lambda x: sampling.sampling_from_probs(x, **AT)),
    ("topk_topp logits", "select", "l", lambda x: sampling.top_k_top_p_sampling_from_logits(x, 50, 0.9, **AT)),
    ("topk_topp joint", "select", "l",
     lambda x: sampling.top_k_top_p_sampling_from_logits(x, 50, 0.9, filter_apply_order="joint", **AT)),
    ("topp logits", "reject", "l", lambda x: sampling.top_k_top_p_sampling_from_logits(x, 1 << 30, 0.9, **AT)),
    ("topk probs", "select", "p", lambda x: sampling.top_k_sampling_from_probs(x, 50, **AT)),
    ("topp probs", "reject", "p", lambda x: sampling.top_p_sampling_from_probs(x, 0.9, **AT)),
    ("minp probs", "min_p", "p", lambda x: sampling.min_p_sampling_from_probs(x, 0.05, **AT)),
    ("top_k", "top_k", "l", lambda x: topk.top_k(x, 50)),
    ("topk_mask", "fill", "l", lambda x: sampling.top_k_mask_logits(x, 50)),
    ("topk_renorm", "fill", "p", lambda x: sampling.top_k_renorm_probs(x, 50)),
    ("topp_renorm", "renorm", "p", lambda x: sampling.top_p_renorm_probs(x, 0.9)),
    ("softmax", "softmax", "l", lambda x: sampling.softmax(x)),
]  # fmt: skip


def shapes(kind: str, vocab: int) -> Iterator[LaunchShape]:
    """Every shape that a kind of launch may have. Shapes that never paid are left out: softmax with 512 or
    more threads.
    """
    segments = -(-vocab // 1024)
    for cluster, threads in product((1, 2, 4, 8, 16), (256, 512, 1024)):
        holds = kind in ("softmax", "renorm")
        if holds and (threads > 256 or -(-segments // cluster) * 4 > 128):  # does not fit
            continue
        if cluster * threads // 32 > 256 or cluster * threads // 32 >= 2 * max(segments, 32):
            continue
        for blocks in dict.fromkeys((max(512 // threads, 1), 1024 // threads)):
            yield LaunchShape(threads, cluster, blocks, holds)


def spec_of(kind: str, source: str, name: str, dtype: DType, vocab: int, shape: LaunchShape) -> KernelSpec:
    logits, segments = source == "l", room(vocab)
    if kind == "softmax":
        return softmax_spec(dtype, segments, shape)
    if kind == "renorm":
        return renorm_spec(dtype, segments, shape)
    if kind == "fill":
        return filter_spec(dtype, logits, segments, shape, "top_k")
    if kind == "top_k":
        return topk.top_k_spec(dtype, segments, shape)
    filters = {"draw": "none", "reject": "top_p", "min_p": "min_p"}.get(kind)
    if filters is None:
        filters = "top_k" if name == "topk probs" else "top_k_top_p"
    return sample_spec(dtype, logits, filters, segments, shape)


def chosen_specs(device: DeviceInfo) -> Iterator[KernelSpec]:
    """The kernels that the GPU tests and the bench need on a device."""
    tested = [*product((130, 1025, 5003, 32000, 128256), (5,)), (40000, 10), (262144, 2), (524288, 2)]
    benched = [*product((32000, 128256), (1, 64, 512)), (1000, 700), (3000, 256)]
    for dtype in (float32, bfloat16, float16):
        for vocab, rows in [*tested, *(benched if dtype is float32 else benched[3:6] if dtype is bfloat16 else [])]:

            def shape(kind: str, vocab: int = vocab, rows: int = rows) -> LaunchShape:
                return sampling_kernels.launch_shape(kind, rows, vocab, device)

            for logits in (True, False):
                yield sample_spec(dtype, logits, "none", room(vocab), shape("draw"))
                yield sample_spec(dtype, logits, "top_p", room(vocab), shape("reject"))
                yield sample_spec(dtype, logits, "top_k_top_p", room(vocab), shape("select"))
                yield filter_spec(dtype, logits, room(vocab), shape("fill"), "top_k")
            yield sample_spec(dtype, False, "min_p", room(vocab), shape("min_p"))
            yield sample_spec(dtype, False, "top_k", room(vocab), shape("select"))
            for scaled in (False, True):
                yield sample_spec(dtype, True, "all", room(vocab), shape("select"), scaled)
            yield renorm_spec(dtype, room(vocab), shape("renorm"))
            yield softmax_spec(dtype, room(vocab), shape("softmax"))
            yield topk.top_k_spec(dtype, room(vocab), shape("top_k"))
            yield speculative_spec(dtype, room(vocab), shape("speculative"))
    yield from (*sampling_kernels.kernel_specs(), *topk.kernel_specs())


def compile_all(specs: Iterable[KernelSpec], device: DeviceInfo, processes: int) -> None:
    for job, outcome in build_many([(s, device.arch) for s in specs if s.supports(device.arch)], processes=processes):
        if isinstance(outcome, Exception):
            print(f"{job.symbol}: {outcome}")


def inputs(rows: int, vocab: int, source: str, dtype: DType, timer: GpuTimer) -> list[Any]:
    nbytes = rows * vocab * dtype.itemsize
    count = set_count(nbytes, nbytes, timer.l2_bytes, timer.free_bytes())
    made = (normal_logits(rows, vocab, i) for i in range(count))
    return [(x if source == "l" else sampling.softmax(x)).astype(dtype.np) for x in made]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--batches", default="1,8,64,512")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", default="", help="names that contain this")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("--json")
    parser.add_argument("--build", action="store_true", help="only compile what launch_shape can choose")
    options = parser.parse_args()
    vocab, dtype = options.vocab, float32 if options.dtype == "float32" else bfloat16
    ops = [op for op in OPS if options.only in op[0]]
    device = device_info(0)
    if options.build:
        return compile_all(dict.fromkeys(chosen_specs(device)), device, options.processes)
    specs = dict.fromkeys(spec_of(k, s, n, dtype, vocab, shape) for n, k, s, _ in ops for shape in shapes(k, vocab))
    compile_all(specs, device, options.processes)
    timer, table = GpuTimer(), []
    for rows in map(int, options.batches.split(",")):
        for source in "lp":
            sets = inputs(rows, vocab, source, dtype, timer)
            for name, kind, of, call in ops:
                if of == source:
                    table.append({"op": name, "rows": rows, "us": measure(timer, sets, kind, vocab, rows, call)})
                    show(table[-1])
            del sets
            timer.release()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(table, file, indent=1)


def measure(timer: GpuTimer, sets: list[Any], kind: str, vocab: int, rows: int, call: Callable[[Any], Any]) -> Any:
    """Microseconds of each shape; "now" is what `launch_shape` chooses."""
    replays: dict[str, Any] = {}
    now = sampling_kernels.launch_shape(kind, rows, vocab, device_info(0))
    for shape in dict.fromkeys([now, *shapes(kind, vocab)]):
        label = shape.tag + ("*" if shape == now else "")
        with (
            mock.patch.object(sampling_launch, "launch_shape", lambda *_, shape=shape: shape),
            mock.patch.object(topk, "launch_shape", lambda *_, shape=shape: shape),
        ):
            try:
                first = timer.capture(call, sets, len(sets), "fi_cupy")
                us = min(timer.time({label: first}, 2, 0.0)[label]) / first.launches
                replays[label] = timer.capture(call, sets, launch_count(us, len(sets)), "fi_cupy")
            except Exception as error:
                print(f"{label}: {type(error).__name__}: {error}")
    times = timer.time(replays, 5, 0.0)
    return {label: sorted(times[label])[2] / replays[label].launches for label in replays}


def show(row: dict[str, Any]) -> None:
    ranked = sorted(row["us"].items(), key=lambda item: item[1])
    now = next((f"{us:.1f} {label}" for label, us in ranked if label.endswith("*")), "-")
    best = "  ".join(f"{label} {us:.1f}" for label, us in ranked[:5])
    print(f"{row['op']:18} b{row['rows']:<4} now {now:22} best {best}", flush=True)


if __name__ == "__main__":
    main()
