"""mm_bf16 against cuBLAS (torch.mm), and with ``python bench/bench_gemm.py`` each kernel against its alternatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fi_cupy.arrays import view
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16
from fi_cupy.gemm import hopper, mm_bf16
from fi_cupy.gemm.select import select_mm_kernel
from fi_cupy.gemm.tuning import MmProblem, mm_candidates
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

#: (n, k) of a 4096-wide model, and of the 135M model: qkv, output, gate-up, down, vocabulary.
LARGE = ((4096, 4096), (14336, 4096), (4096, 14336))
SMALL = ((960, 576), (576, 576), (3072, 576), (576, 1536), (49152, 576))

#: The shapes (m, n, k) that ``bench/data/peers_h100.json`` has a row for.
RECORDED = ((1, 4096, 4096), (16, 4096, 4096), (64, 14336, 4096), (1, 576, 576), (1, 49152, 576), (4096, 4096, 4096))


def _inputs(m: int, n: int, k: int) -> Callable[[int], tuple[Any, Any, Any]]:
    def make(i: int) -> tuple[Any, Any, Any]:
        out = random_array((m, n), "bfloat16", 3 * i + 2)
        return random_array((m, k), "bfloat16", 3 * i), random_array((n, k), "bfloat16", 3 * i + 1), out

    return make


def _cublas(inputs: tuple[Any, Any, Any]) -> None:
    import torch

    torch.mm(inputs[0], inputs[1].T, out=inputs[2])


def _case(m: int, n: int, k: int, *, pdl: bool = False, name: str = "", fn: Any = None, peer: bool = True) -> BenchCase:
    compute_bound = m >= 512 and min(n, k) >= 2048
    work: dict[str, Any] = {"flops": 2 * m * n * k} if compute_bound else {"bytes": 2 * (m * k + n * k + m * n)}
    return bench_case(
        name or f"mm_bf16 m{m} n{n} k{k}{' pdl' if pdl else ''}",
        fn or (lambda s: mm_bf16(s[0], s[1].T, pdl=pdl, out=s[2])),
        make_inputs=_inputs(m, n, k),
        peers={"cublas": _cublas} if peer else None,
        recorded=f"cublas mm m{m} n{n} k{k}" if (m, n, k) in RECORDED else (),
        interleave=compute_bound,
        limit=None if compute_bound else "read",
        **work,
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """The table: decode with and without dependent launch, prefill, large squares."""
    table = [_case(m, n, k) for n, k in LARGE for m in (1, 4, 16, 64)]
    table += [_case(m, n, k) for n, k in SMALL for m in (1, 8, 64)]
    if device.has_pdl:
        table += [_case(m, n, k, pdl=True) for n, k in SMALL for m in (1, 64)]
        table += [
            _case(
                m, 960, 576, name=f"mm_bf16 of normalised rows m{m} n960 k576 pdl", peer=False,
                fn=lambda s: mm_bf16(s[0], s[1].T, pdl=True, out=s[2], rms_eps=1e-5),
            )
            for m in (1, 8)
        ]  # fmt: skip
    table += [_case(m, n, k) for n, k in SMALL[:4] for m in (256, 1024)]
    table += [_case(m, 4096, 4096) for m in (128, 256, 1024, 4096)]
    table.append(_case(8192, 8192, 8192))
    return table


def alternatives(device: DeviceInfo, m: int, n: int, k: int) -> dict[str, tuple[KernelSpec, Any]]:
    """Every sensible kernel for one shape, the tuner's candidates: what `select_mm_kernel` chooses, and neighbours."""
    problem = MmProblem(m, n, k, device, bfloat16, bfloat16)
    launches = (candidate.launch(problem) for candidate in mm_candidates(problem))
    return {launch[0].symbol: launch for launch in launches if launch is not None}


def _launcher(spec: KernelSpec, grid: Any, m: int, n: int, k: int) -> Callable[[tuple[Any, Any, Any]], None]:
    def launch(s: tuple[Any, Any, Any]) -> None:
        a, w, out = (view(x) for x in s)
        if spec.params is hopper.PARAMS:
            hopper.launch(spec, grid, out, a, w)
            return
        kernel = load_kernel(spec, a.device)
        kernel.launch(grid, a.stream(), a.ptr, w.ptr, 0, out.ptr, k, k, n, 0, 0, 0, m, n, k, 0, 0, 0)

    return launch


def main() -> None:
    """Print, for every shape, the kernels from fast to slow; the chosen one is marked."""
    import sys

    from fi_cupy.testing.bench import Options, run_case
    from fi_cupy.testing.bench_gpu import GpuTimer

    timer = GpuTimer()
    rows = [int(x) for x in sys.argv[1].split(",")] if len(sys.argv) > 1 else [1, 4, 16, 32, 64, 128, 256]
    shapes = [(int(a), int(b)) for a, b in (x.split("x") for x in sys.argv[2:])] or [*SMALL, (4096, 4096)]
    for n, k in shapes:
        for m in rows:
            chosen = select_mm_kernel(m, n, k, timer.info)[0].symbol
            times = {}
            for symbol, (spec, grid) in alternatives(timer.info, m, n, k).items():
                case = _case(m, n, k, name=symbol, fn=_launcher(spec, grid, m, n, k), peer=symbol == chosen)
                row = run_case("gemm", replace(case, recorded=()), timer, {}, {}, Options(quick=True))
                times[symbol] = row.get("us", float("inf"))
                if symbol == chosen:
                    times["cublas"] = row.get("peers", {}).get("cublas", {}).get("us", float("inf"))
            print(f"m{m} n{n} k{k}")
            for symbol, us in sorted(times.items(), key=lambda item: item[1])[:8]:
                print(f"  {us:9.2f} us  {symbol}{'   <- chosen' if symbol == chosen else ''}", flush=True)
            if times[chosen] > 1.03 * min(us for s, us in times.items() if s != "cublas"):
                print(f"  {times[chosen]:9.2f} us  {chosen}   <- chosen, more than 3 % slower than the best")


if __name__ == "__main__":
    main()
