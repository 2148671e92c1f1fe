"""Casts with scales, alone and fused: every element is read once, a byte (or half of one) is written."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import peers

from fi_cupy import activation, norm, page, quantization, rope
from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, bench_case, random_array

TOKENS, HIDDEN = 16384, 4096


def _rows(i: int, tokens: int = TOKENS, width: int = HIDDEN) -> tuple[Any, ...]:
    return (random_array((tokens, width), "bfloat16", i),)


def _cast(name: str, fn: Callable[[Any], Any], per_element: float, tokens: int = TOKENS, **more: Any) -> BenchCase:
    return bench_case(
        f"{name} {tokens}x{HIDDEN} bf16",
        lambda s: fn(s[0]),
        make_inputs=partial(_rows, tokens=tokens),
        bytes=int(tokens * HIDDEN * per_element),
        **more,
    )


def _torch_group(x: Any) -> Any:
    """What eager torch needs for per_token_group_quant_8bit: several passes."""
    torch = peers.torch()
    groups = x.view(x.shape[0], -1, 128).float()
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    return (groups / scale).to(torch.float8_e4m3fn).view(x.shape), scale


def _silu(name: str, fn: Callable[[Any], Any], per_element: float) -> BenchCase:
    return bench_case(
        f"{name} 4096x14336 bf16",
        fn,
        make_inputs=lambda i: (
            random_array((4096, 2 * 14336), "bfloat16", i),
            random_array((4096, 14336), "float8_e4m3fn", i),
        ),
        bytes=int(4096 * 14336 * per_element),
    )


def _table(tokens: int, requests: int, page_size: int, i: int) -> dict[str, Any]:
    import cupy

    each = tokens // requests
    pages_each = -(-each // page_size)
    pages = requests * pages_each
    return {
        "b": cupy.arange(tokens, dtype=cupy.int32) // each,
        "p": cupy.arange(tokens, dtype=cupy.int32) % each,
        "indices": cupy.asarray(np.random.default_rng(i).permutation(pages).astype(np.int32)),
        "indptr": cupy.arange(requests + 1, dtype=cupy.int32) * pages_each,
        "last": cupy.full(requests, (each - 1) % page_size + 1, dtype=cupy.int32),
        "pages": pages,
    }


def _append(tokens: int) -> BenchCase:
    def make(i: int) -> dict[str, Any]:
        t = _table(tokens, 16, 16, i)
        return t | {
            "k": random_array((tokens, 8, 128), "bfloat16", i),
            "v": random_array((tokens, 8, 128), "bfloat16", i + 1),
            "cache": random_array((t["pages"], 2, 16, 8, 128), "float8_e4m3fn", i),
        }

    return bench_case(
        f"append_paged_kv_cache {tokens} tokens of 16 8x128 p16 bf16 to e4m3",
        lambda s: page.append_paged_kv_cache(
            s["k"], s["v"], s["b"], s["p"], s["cache"], s["indices"], s["indptr"], s["last"], k_scale=0.5, v_scale=0.5
        ),
        make_inputs=make,
        bytes=2 * tokens * 8 * 128 * 3,
    )


def _cos_sin(rows: int, dim: int) -> Any:
    import cupy

    angle = cupy.random.default_rng(0).random((rows, dim // 2), dtype=cupy.float32) * 6
    return cupy.concatenate([cupy.cos(angle), cupy.sin(angle)], axis=-1)


def _rope_append(tokens: int) -> BenchCase:
    def make(i: int) -> dict[str, Any]:
        t = _table(tokens, 16, 16, i)
        return t | {
            "q": random_array((tokens, 32, 128), "bfloat16", i),
            "k": random_array((tokens, 8, 128), "bfloat16", i + 1),
            "v": random_array((tokens, 8, 128), "bfloat16", i + 2),
            "k_cache": random_array((t["pages"], 16, 8, 128), "float8_e4m3fn", i),
            "v_cache": random_array((t["pages"], 16, 8, 128), "float8_e4m3fn", i),
            "cos_sin": _cos_sin(tokens, 128),
        }

    return bench_case(
        f"rope_quantize_fp8_append {tokens} tokens 32/8 heads d128 bf16",
        lambda s: rope.rope_quantize_fp8_append_paged_kv_cache(
            s["q"], s["k"], None, None, s["v"], s["cos_sin"], s["p"], (s["k_cache"], s["v_cache"]), s["indices"],
            s["indptr"], s["b"], s["p"],
        ),
        make_inputs=make,
        bytes=tokens * 48 * 128 * 3,
    )  # fmt: skip


def _rope_append_step(tokens: int) -> BenchCase:
    def make(i: int) -> dict[str, Any]:
        t = _table(tokens, tokens, 16, i)
        caches = [random_array((t["pages"], 16, 3, 64), "bfloat16", i + j) for j in range(2)]
        qkv = random_array((tokens, 15, 64), "bfloat16", i)
        return t | {"qkv": qkv, "caches": tuple(caches), "cos_sin": _cos_sin(8192, 64)}

    def run(s: dict[str, Any]) -> Any:
        x = s["qkv"]
        return rope.rope_append_paged_kv_cache(
            x[:, :9], x[:, 9:12], None, None, x[:, 12:], s["cos_sin"], s["p"], s["caches"], s["indices"], s["indptr"],
            s["b"], s["p"], q_rope_out=x[:, :9], enable_pdl=True,
        )  # fmt: skip

    return bench_case(
        f"rope_append {tokens} tokens 9/3 heads d64 bf16 pdl", run, make_inputs=make, bytes=2 * tokens * 15 * 64 * 2
    )


def _mla_rope(tokens: int) -> BenchCase:
    def make(i: int) -> tuple[Any, ...]:
        import cupy

        return (
            random_array((tokens, 128, 64), "bfloat16", i), random_array((tokens, 64), "bfloat16", i),
            random_array((tokens, 128, 512), "bfloat16", i), random_array((tokens, 512), "bfloat16", i),
            _cos_sin(4096, 64), cupy.arange(tokens, dtype=cupy.int32),
        )  # fmt: skip

    return bench_case(
        f"mla_rope_quantize_fp8 {tokens} tokens 128 heads 512+64 bf16",
        lambda s: rope.mla_rope_quantize_fp8(*s),
        make_inputs=make,
        bytes=tokens * 129 * 576 * 3,
    )


def _norm(name: str, residual: bool) -> BenchCase:
    def run(s: Any) -> None:
        if residual:
            norm.fused_add_rmsnorm_quant(s[3], s[0], s[2], s[1], 0.5)
        else:
            norm.rmsnorm_quant(s[3], s[0], s[1], 0.5)

    return bench_case(
        f"{name} {TOKENS}x{HIDDEN} bf16 to e4m3",
        run,
        make_inputs=lambda i: (
            random_array((TOKENS, HIDDEN), "bfloat16", i), random_array((HIDDEN,), "bfloat16", i),
            random_array((TOKENS, HIDDEN), "bfloat16", i + 1), random_array((TOKENS, HIDDEN), "float8_e4m3fn", i),
        ),
        bytes=TOKENS * HIDDEN * (7 if residual else 3),
    )  # fmt: skip


def _layernorm() -> BenchCase:
    return bench_case(
        f"layernorm_quant {TOKENS}x{HIDDEN} bf16 to e4m3",
        lambda s: norm.layernorm_quant(s[3], s[0], s[1], s[2], 0.5),
        make_inputs=lambda i: (
            random_array((TOKENS, HIDDEN), "bfloat16", i), random_array((HIDDEN,), "float32", i),
            random_array((HIDDEN,), "float32", i + 1), random_array((TOKENS, HIDDEN), "float8_e4m3fn", i),
        ),
        bytes=TOKENS * HIDDEN * 3,
    )  # fmt: skip


def _dequantize() -> BenchCase:
    return bench_case(
        f"nvfp4 to float32 {TOKENS}x{HIDDEN}",
        lambda s: quantization.e2m1_and_ufp8sf_scale_to_float(s[0], s[1]),
        make_inputs=lambda i: (
            random_array((TOKENS, HIDDEN // 2), "uint8", i), random_array((TOKENS, HIDDEN // 16), "uint8", i)
        ),
        bytes=int(TOKENS * HIDDEN * (4 + 0.5 + 1 / 16)),
    )  # fmt: skip


def cases(device: DeviceInfo) -> list[BenchCase]:
    """The casts at the shapes of bench/NOTES.md."""
    group = partial(quantization.per_token_group_quant_8bit, group_size=128)
    return [
        _cast("per_token_group_quant_8bit 128 e4m3", group, 3 + 4 / 128, peers={"torch": lambda s: _torch_group(s[0])}),
        _cast("per_token_group_quant_8bit 128 e4m3", group, 3 + 4 / 128, tokens=64),
        _cast("per_token_group_quant_8bit 128 int8", partial(group, dst_dtype="int8"), 3 + 4 / 128),
        _cast("per_token_quant_fp8", quantization.per_token_quant_fp8, 3),
        _cast("per_tensor_quant_fp8 static", lambda x: quantization.per_tensor_quant_fp8(x, 0.5), 3),
        _cast("per_tensor_quant_fp8 dynamic", quantization.per_tensor_quant_fp8, 5),
        _cast("per_block_cast_to_fp8", quantization.per_block_cast_to_fp8, 3),
        _cast("mxfp8_quantize", quantization.mxfp8_quantize, 3 + 1 / 32),
        _cast("nvfp4_quantize", lambda x: quantization.nvfp4_quantize(x, 500.0), 2.5 + 1 / 16),
        _dequantize(),
        _silu("silu_and_mul_quant", lambda s: activation.silu_and_mul_quant(s[1], s[0], 0.5), 5),
        _silu("silu_and_mul + group quant 128", lambda s: group(s[0], fuse_silu_and_mul=True), 5 + 4 / 128),
        _append(8192),
        _rope_append(8192),
        *(_rope_append_step(tokens) for tokens in (1, 64)),
        _mla_rope(2048),
        _mla_rope(64),
        _norm("rmsnorm_quant", False),
        _norm("fused_add_rmsnorm_quant", True),
        _layernorm(),
    ]
