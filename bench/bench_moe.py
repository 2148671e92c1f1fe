"""Mixture of experts: `cutlass_fused_moe` in bf16 and block-scaled fp8, and DeepSeek-V3's routing."""

from __future__ import annotations

from typing import Any

from fi_cupy.device import DeviceInfo
from fi_cupy.fused_moe import cutlass_fused_moe, fused_topk_deepseek
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

#: tokens, experts, top_k, hidden, inter: Mixtral 8x7B, and an eighth of DeepSeek-V3.
MIXTRAL = ((1, 8, 2, 4096, 14336), (64, 8, 2, 4096, 14336), (2048, 8, 2, 4096, 14336))
DEEPSEEK = ((1, 32, 8, 7168, 2048), (64, 32, 8, 7168, 2048), (4096, 32, 8, 7168, 2048))


def _selected(tokens: int, experts: int, top_k: int) -> Any:
    import cupy
    import numpy as np

    rng = np.random.default_rng(tokens)
    return cupy.asarray(np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32))


def _layer(tokens: int, experts: int, top_k: int, hidden: int, inter: int, fp8: bool) -> BenchCase:
    dtype, itemsize = ("float8_e4m3fn", 1) if fp8 else ("bfloat16", 2)

    def make(i: int) -> dict[str, Any]:
        import cupy

        made = {
            "x": random_array((tokens, hidden), "bfloat16", 3 * i),
            "out": random_array((tokens, hidden), "bfloat16", i),
            "fc1": random_array((experts, 2 * inter, hidden), dtype, 3 * i + 1),
            "fc2": random_array((experts, hidden, inter), dtype, 3 * i + 2),
            "experts": _selected(tokens, experts, top_k), "scales": cupy.full((tokens, top_k), 1 / top_k, "float32"),
        }  # fmt: skip
        if fp8:
            made["q1"] = cupy.full((experts, 2 * inter // 128, hidden // 128), 0.01, "float32")
            made["q2"] = cupy.full((experts, hidden // 128, inter // 128), 0.01, "float32")
        return made

    def run(s: dict[str, Any]) -> None:
        scales = [s["q1"], s["q2"]] if fp8 else None
        cutlass_fused_moe(
            s["x"], s["experts"], s["scales"], s["fc1"], s["fc2"], "bfloat16", scales, output=s["out"],
            use_deepseek_fp8_block_scale=fp8,
        )  # fmt: skip

    def cublas(s: dict[str, Any]) -> None:
        """The products of equally loaded experts, without routing, permutation and sum."""
        import torch

        rows = tokens * top_k // experts
        x = s["x"].repeat(top_k, 1)
        for e in range(experts):
            both = torch.mm(x[e * rows : (e + 1) * rows], s["fc1"][e].T)
            torch.mm(torch.nn.functional.silu(both[:, inter:]) * both[:, :inter], s["fc2"][e].T)

    compute_bound = tokens * top_k >= 256 * experts
    active = min(experts, tokens * top_k)
    work: dict[str, Any] = (
        {"flops": 6 * tokens * top_k * hidden * inter}
        if compute_bound
        else {"bytes": active * 3 * hidden * inter * itemsize + 4 * tokens * hidden}
    )
    return bench_case(
        f"fused_moe {dtype} t{tokens} e{experts} k{top_k} h{hidden} i{inter}", run, make_inputs=make,
        peers={"cublas products": cublas} if not fp8 and compute_bound else None, interleave=compute_bound,
        limit=None if compute_bound else "read", **work,
    )  # fmt: skip


def _routing(tokens: int, experts: int) -> BenchCase:
    def make(i: int) -> tuple[Any, ...]:
        import cupy

        scores = random_array((tokens, experts), "float32", i)
        return (
            scores, cupy.zeros(experts, "float32"), cupy.empty((tokens, 8), "float32"), cupy.empty((tokens, 8), "int32")
        )  # fmt: skip

    return bench_case(
        f"fused_topk_deepseek {tokens}x{experts} g8 k8",
        lambda s: fused_topk_deepseek(s[0], s[1], 8, 4, 8, 2.5, s[2], s[3], launch_with_pdl=False),
        make_inputs=make,
        bytes=tokens * (experts * 4 + 64),
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """Decode, a batch of decodes, and prefill."""
    table = [_layer(*shape, False) for shape in MIXTRAL] + [_layer(*shape, True) for shape in DEEPSEEK]
    return table + [_routing(tokens, 256) for tokens in (1, 64, 4096)]
