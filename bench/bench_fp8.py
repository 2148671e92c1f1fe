"""fp8 products against cuBLAS (torch._scaled_mm): one multiplier, one a row and column, and blocks of 128.

The share of the limit is that of the bf16 rate: fp8 may reach 200 %.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fi_cupy.device import DeviceInfo
from fi_cupy.gemm import (
    batch_deepgemm_fp8_nt_groupwise,
    gemm_fp8_nt_blockscaled,
    gemm_fp8_nt_groupwise,
    group_deepgemm_fp8_nt_groupwise,
    group_gemm_fp8_nt_groupwise,
    mm_fp8,
)
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

SHAPES = (
    (8192, 8192, 8192),
    (4096, 4096, 4096),
    (4096, 7168, 2048),
    (64, 4096, 4096),
    (16, 14336, 4096),
    (1, 4096, 4096),
)


def _make(m: int, n: int, k: int, per_row: bool = False) -> Callable[[int], dict[str, Any]]:
    def make(i: int) -> dict[str, Any]:
        import cupy

        rows, columns = (m, n) if per_row else (1, 1)
        padded = -(-m // 4) * 4
        return {
            "a": random_array((m, k), "float8_e4m3fn", 2 * i), "w": random_array((n, k), "float8_e4m3fn", 2 * i + 1),
            "sa": cupy.full((rows, 1), 0.5, "float32"), "sb": cupy.full((1, columns), 0.5, "float32"),
            "ga": cupy.full((k // 128, padded), 0.5, "float32"),
            "gb": cupy.full((k // 128, -(-n // 128)), 0.5, "float32"),
            "ba": cupy.full((k // 128, -(-m // 128)), 0.5, "float32"), "out": random_array((m, n), "bfloat16", i),
        }  # fmt: skip

    return make


def _scaled_mm(fast: bool) -> Callable[[dict[str, Any]], None]:
    def peer(s: dict[str, Any]) -> None:
        import torch

        a, w = (s[name].view(torch.float8_e4m3fn) for name in ("a", "w"))
        torch._scaled_mm(
            a, w.T, s["sa"].reshape(-1, 1) if s["sa"].numel() > 1 else s["sa"].reshape(()),
            s["sb"].reshape(1, -1) if s["sb"].numel() > 1 else s["sb"].reshape(()), out_dtype=torch.bfloat16,
            use_fast_accum=fast, out=s["out"],
        )  # fmt: skip

    return peer


def _case(kind: str, m: int, n: int, k: int) -> BenchCase:
    run: dict[str, Callable[[dict[str, Any]], Any]] = {
        "tensor": lambda s: mm_fp8(s["a"], s["w"].T, out=s["out"], a_scale=s["sa"], b_scale=s["sb"]),
        "tensor fast": lambda s: mm_fp8(
            s["a"], s["w"].T, out=s["out"], a_scale=s["sa"], b_scale=s["sb"], fast_accum=True
        ),
        "row": lambda s: mm_fp8(s["a"], s["w"].T, out=s["out"], a_scale=s["sa"], b_scale=s["sb"]),
        "1x128": lambda s: gemm_fp8_nt_groupwise(s["a"], s["w"], s["ga"], s["gb"], out=s["out"]),
        "128x128": lambda s: gemm_fp8_nt_blockscaled(s["a"], s["w"], s["ba"], s["gb"], out=s["out"]),
    }
    compute_bound = m >= 512
    work: dict[str, Any] = {"flops": 2 * m * n * k} if compute_bound else {"bytes": m * k + n * k + 2 * m * n}
    name = "cublas tensor" if "128" in kind else "cublas"
    return bench_case(
        f"fp8 {kind} m{m} n{n} k{k}", run[kind], make_inputs=_make(m, n, k, kind == "row"),
        peers={name: _scaled_mm(kind != "tensor")}, interleave=compute_bound,
        limit=None if compute_bound else "read", **work,
    )  # fmt: skip


def _grouped(groups: int, rows: int, n: int, k: int) -> BenchCase:
    def make(i: int) -> tuple[Any, ...]:
        import cupy

        m = groups * rows
        return (
            random_array((m, k), "float8_e4m3fn", 2 * i), random_array((groups, n, k), "float8_e4m3fn", 2 * i + 1),
            cupy.full((k // 128, m), 0.5, "float32"), cupy.full((groups, k // 128, n // 128), 0.5, "float32"),
            cupy.arange(groups + 1, dtype="int32") * rows, random_array((m, n), "bfloat16", i),
        )  # fmt: skip

    compute_bound = rows >= 256
    total = groups * rows
    work: dict[str, Any] = (
        {"flops": 2 * total * n * k} if compute_bound else {"bytes": total * (k + 2 * n) + groups * n * k}
    )
    return bench_case(
        f"group_gemm_fp8_nt_groupwise {groups}x{rows}x{n}x{k}",
        lambda s: group_gemm_fp8_nt_groupwise(*s[:5], out=s[5]), make_inputs=make, interleave=compute_bound,
        limit=None if compute_bound else "read", **work,
    )  # fmt: skip


def _deepgemm(masked: bool, groups: int, rows: int, n: int, k: int) -> BenchCase:
    """DeepGEMM's layouts: a number a row, or a number of rows a group."""
    run, name = (
        (batch_deepgemm_fp8_nt_groupwise, "batch") if masked else (group_deepgemm_fp8_nt_groupwise, "group")
    )  # fmt: skip

    def make(i: int) -> tuple[tuple[Any, ...], Any]:
        import cupy

        m = groups * rows
        lead = (groups, rows) if masked else (m,)
        numbers = cupy.full(groups, rows, "int32") if masked else cupy.arange(m, dtype="int32") // rows
        operands = (
            random_array((*lead, k), "float8_e4m3fn", 2 * i), random_array((groups, n, k), "float8_e4m3fn", 2 * i + 1),
            cupy.full((*lead, k // 128), 0.5, "float32"), cupy.full((groups, n // 128, k // 128), 0.5, "float32"),
            numbers, *((rows,) if masked else ()),
        )  # fmt: skip
        return operands, random_array((*lead, n), "bfloat16", i)

    return bench_case(
        f"{name}_deepgemm_fp8_nt_groupwise {groups}x{rows}x{n}x{k}", lambda s: run(*s[0], out=s[1]), make_inputs=make,
        interleave=True, flops=2 * groups * rows * n * k,
    )  # fmt: skip


def cases(device: DeviceInfo) -> list[BenchCase]:
    """Large squares, a DeepSeek projection, few rows, and groups."""
    table = [_case(kind, *SHAPES[0]) for kind in ("tensor fast", "tensor", "row", "1x128")]
    table += [_case(kind, *shape) for shape in SHAPES[1:] for kind in ("tensor", "1x128")]
    table += [_case("tensor fast", *SHAPES[1]), _case("128x128", *SHAPES[1])]
    table += [_grouped(8, 1024, 4096, 4096), _grouped(32, 64, 4096, 4096)]
    return table + [_deepgemm(masked, 8, 1024, 4096, 4096) for masked in (False, True)]
