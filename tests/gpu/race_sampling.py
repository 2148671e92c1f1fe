"""One small run of every kernel of sampling, top-k and pipelines for compute-sanitizer, in one launch shape.

    compute-sanitizer --tool racecheck --num-cuda-barriers 64 python tests/gpu/race_sampling.py eight

Shapes: see SHAPES; "compile" builds all that they launch. race_prefill_hopper.py has a race that the tool must see.
With FI_CUPY_EXACT_SIZES=1, arrays are allocated one by one, so that memcheck knows their ends.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

from fi_cupy import logits_processor, sampling, sampling_launch, speculative, topk
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.sampling_kernels import LaunchShape
from fi_cupy.testing.generators import odd_rows, on_gpu

#: CTAs a row and their threads, as launches of few and of many rows have them.
SHAPES = {
    "alone": LaunchShape(256, 1, 1),
    "pair": LaunchShape(512, 2, 1),
    "eight": LaunchShape(256, 8, 2),
}
ROWS, VOCAB = 4, 9001


def calls() -> list[tuple[str, Callable[[], Any], Callable[[], Any]]]:
    """Name, what runs on the GPU, and what the same call says on the CPU."""
    rng = np.random.default_rng(0)
    kinds = ("tied", "coarse", "holes", "normal")
    logits, probs = (odd_rows(rng, ROWS, VOCAB, "float32", x, kinds) for x in (True, False))
    ks, ps = np.array([20, 700, 1 << 30, 50], np.int32), np.array([0.9, 0.5, 0.9, 1.0], np.float32)
    at = {"seed": 5, "offset": 2}
    target = odd_rows(rng, 2 * ROWS, VOCAB, "float32", False, kinds[:1]).reshape(ROWS, 2, VOCAB)
    draft, ids = np.ascontiguousarray(target[::-1, :1]), np.argmax(target[:, :1], -1).astype(np.int32)
    pipe = logits_processor.LogitsPipe(
        [
            logits_processor.Temperature(),
            logits_processor.Softmax(),
            logits_processor.MinP(),
            logits_processor.Sample(),
        ]
    )
    found: list[tuple[str, Callable[[], Any], Callable[[], Any]]] = []

    def add(name: str, function: Callable[..., Any], *args: Any, **options: Any) -> None:
        on = [on_gpu(a) if isinstance(a, np.ndarray) else a for a in args]
        found.append((name, lambda: function(*on, **options), lambda: function(*args, **options)))

    add("from_logits", sampling.sampling_from_logits, logits, **at)
    add("from_probs", sampling.sampling_from_probs, probs, **at)
    add("top_p", sampling.top_p_sampling_from_probs, probs, ps, **at)
    add("min_p", sampling.min_p_sampling_from_probs, probs, 0.05, **at)
    add("top_k", sampling.top_k_sampling_from_probs, probs, ks, **at)
    for order in ("top_k_first", "joint"):
        add(order, sampling.top_k_top_p_sampling_from_logits, logits, ks, ps, filter_apply_order=order, **at)
    add("pipe", lambda x: pipe(x, temperature=0.8, min_p=0.05, **at), logits)
    add("top_k_renorm", sampling.top_k_renorm_probs, probs, ks)
    add("top_p_renorm", sampling.top_p_renorm_probs, probs, ps)
    add("mask", sampling.top_k_mask_logits, logits, ks)
    add("softmax", sampling.softmax, logits, 0.8)
    for k in (20, 700, 5000):
        add(f"top_k {k}", lambda x, k=k: topk.top_k(x, k, sorted=True)[1], logits)
    add("chain", lambda *x: sampling.chain_speculative_sampling(*x, **at)[0], draft, ids, target)
    return found


def shaped(shape: LaunchShape) -> contextlib.ExitStack:
    """Every launch in one shape."""

    def chosen(kind: str, *_: Any) -> LaunchShape:
        return shape._replace(hold=shape.cluster >= 8 and kind in ("softmax", "renorm"))

    stack = contextlib.ExitStack()
    for module in (sampling_launch, speculative, topk):
        stack.enter_context(mock.patch.object(module, "launch_shape", chosen))
    return stack


def run(shape: LaunchShape) -> None:
    """Launch everything once and hold it to what the CPU says."""
    import cupy

    if os.environ.get("FI_CUPY_EXACT_SIZES"):
        cupy.cuda.set_allocator(None)
    for name, on_device, on_host in calls():
        with shaped(shape):
            got = cupy.asnumpy(on_device())
        want = np.asarray(on_host())
        if want.dtype.kind == "f":
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7, err_msg=name)
        else:
            np.testing.assert_array_equal(got, want, err_msg=name)


def compile_all() -> None:
    """Build what the shapes launch: one process records it, several compile."""
    from fi_cupy.jit.build import build_many

    wanted: dict[tuple[KernelSpec, str], None] = {}

    class Recorded:
        def launch(self, *_: Any, **__: Any) -> None: ...

    def load(spec: KernelSpec, device: int) -> Any:
        wanted[spec, "90a"] = None
        return Recorded()

    with contextlib.ExitStack() as stack:
        for module in (sampling_launch, speculative, topk):
            stack.enter_context(mock.patch.object(module, "load_kernel", load))
        for shape in SHAPES.values():
            for _, on_device, _ in calls():
                with shaped(shape):
                    on_device()
    for job, found in build_many(list(wanted), processes=os.cpu_count() or 1):
        if isinstance(found, Exception):
            raise SystemExit(f"{job.symbol}: {found}")
    print(f"{len(wanted)} kernels")


def main() -> None:
    name = sys.argv[1]
    if name == "compile":
        compile_all()
        return
    run(SHAPES[name])
    print("right")


if __name__ == "__main__":
    main()
