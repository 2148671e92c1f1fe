"""Segments with a weight each: `SegmentGEMMWrapper` against a loop of cuBLAS products; fused epilogues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fi_cupy.device import DeviceInfo
from fi_cupy.gemm import SegmentGEMMWrapper, mm_bf16, mm_bf16_swiglu
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

SEGMENTS = ((8, 1024), (8, 200), (8, 64), (8, 8))
GATED = ((1, 14336, 4096), (16, 14336, 4096), (64, 14336, 4096), (1, 1536, 576), (4096, 14336, 4096))
RESIDUAL = ((1, 4096, 14336), (64, 4096, 14336), (4096, 4096, 4096))


def _inputs(count: int, rows: int, n: int, k: int) -> Callable[[int], dict[str, Any]]:
    def make(i: int) -> dict[str, Any]:
        import cupy

        x, w = random_array((count * rows, k), "bfloat16", 2 * i), random_array((count, n, k), "bfloat16", 2 * i + 1)
        return {"x": x, "w": w, "out": cupy.empty((count * rows, n), x.dtype), "indptr": cupy.arange(count + 1) * rows}

    return make


def _segments(count: int, rows: int, n: int = 4096, k: int = 4096) -> BenchCase:
    wrapper: list[SegmentGEMMWrapper] = []

    def run(s: dict[str, Any]) -> None:
        if not wrapper:
            import cupy

            wrapper.append(SegmentGEMMWrapper(cupy.empty(1024, "uint8")))
        wrapper[0].run(s["x"], s["w"], count, True, s["out"], seg_indptr=s["indptr"])

    def cublas(s: dict[str, Any]) -> None:
        import torch

        for i in range(count):
            part = slice(i * rows, (i + 1) * rows)
            torch.mm(s["x"][part], s["w"][i].T, out=s["out"][part])

    compute_bound = rows >= 256
    total = count * rows
    work: dict[str, Any] = (
        {"flops": 2 * total * n * k} if compute_bound else {"bytes": 2 * (total * (n + k) + count * n * k)}
    )
    return bench_case(
        f"segment_gemm {count}x{rows}x{n}x{k} bf16", run, make_inputs=_inputs(count, rows, n, k),
        peers={f"{count} cublas": cublas}, recorded=f"segment_gemm {count}x{rows}x{n}x{k} bf16",
        interleave=compute_bound, limit=None if compute_bound else "read", **work,
    )  # fmt: skip


def _dense(kind: str, m: int, n: int, k: int) -> BenchCase:
    """A product with its epilogue fused, against cuBLAS and torch's elementwise operators."""
    columns = 2 * n if kind == "swiglu" else n

    def make(i: int) -> dict[str, Any]:
        return {
            "x": random_array((m, k), "bfloat16", 4 * i), "w": random_array((columns, k), "bfloat16", 4 * i + 1),
            "r": random_array((m, n), "bfloat16", 4 * i + 2), "out": random_array((m, n), "bfloat16", 4 * i + 3),
            "both": random_array((m, columns), "bfloat16", 4 * i + 3),
        }  # fmt: skip

    def run(s: dict[str, Any]) -> None:
        if kind == "swiglu":
            mm_bf16_swiglu(s["x"], s["w"].T, out=s["out"])
        else:
            mm_bf16(s["x"], s["w"].T, out=s["out"], residual=s["r"])

    def cublas(s: dict[str, Any]) -> None:
        import torch

        if kind == "swiglu":
            torch.mm(s["x"], s["w"].T, out=s["both"])
            gate = torch.nn.functional.silu(s["both"][:, :n])
            torch.mul(gate, s["both"][:, n:], out=s["out"])
        else:
            torch.addmm(s["r"], s["x"], s["w"].T, out=s["out"])

    compute_bound = m >= 512
    work: dict[str, Any] = (
        {"flops": 2 * m * columns * k} if compute_bound else {"bytes": 2 * (m * (k + n) + columns * k)}
    )
    return bench_case(
        f"mm_bf16 {kind} m{m} n{n} k{k}", run, make_inputs=make, peers={"cublas": cublas}, interleave=compute_bound,
        limit=None if compute_bound else "read", **work,
    )  # fmt: skip


def cases(device: DeviceInfo) -> list[BenchCase]:
    """Segments of many and of few rows, and products with a fused activation or residual."""
    table = [_segments(*shape) for shape in SEGMENTS]
    table += [_dense("swiglu", *shape) for shape in GATED]
    return table + [_dense("residual", *shape) for shape in RESIDUAL]
