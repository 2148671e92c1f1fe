"""Small inputs for every operator and planned wrapper that `fi_cupy.interop` knows, as NumPy arrays."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from fi_cupy.testing.generators import normal


class Case:
    """Makes the arguments of one call; `dtype` is the type of activations."""

    def __init__(self, rng: np.random.Generator, dtype: str) -> None:
        self.rng, self.dtype = rng, dtype

    def x(self, *shape: int) -> np.ndarray:
        return normal(self.rng, shape, self.dtype)

    def f32(self, *shape: int) -> np.ndarray:
        return normal(self.rng, shape, "float32")

    def probs(self, *shape: int) -> np.ndarray:
        p = self.rng.random(shape).astype(np.float32) ** 4
        return p / p.sum(-1, keepdims=True)

    def ids(self, *values: Any) -> np.ndarray:
        return np.asarray(values, np.int32)


def _rope(c: Case) -> dict[str, Any]:
    return {"q": c.x(5, 4, 64), "k": c.x(5, 2, 64)}


def _append(c: Case, pair: bool) -> dict[str, Any]:
    cache = (c.x(6, 4, 2, 64), c.x(6, 4, 2, 64)) if pair else c.x(6, 2, 4, 2, 64)
    return {
        "append_key": c.x(3, 2, 64), "append_value": c.x(3, 2, 64), "batch_indices": c.ids(0, 0, 1),
        "positions": c.ids(3, 4, 2), "paged_kv_cache": cache, "kv_indices": c.ids(4, 1, 2), "kv_indptr": c.ids(0, 2, 3),
        "kv_last_page_len": c.ids(1, 3),
    }  # fmt: skip


def _mla(c: Case) -> dict[str, Any]:
    return {
        "append_ckv": c.x(3, 512), "append_kpe": c.x(3, 64), "batch_indices": c.ids(0, 0, 1),
        "positions": c.ids(3, 4, 2), "ckv_cache": c.x(6, 4, 512), "kpe_cache": c.x(6, 4, 64),
        "kv_indices": c.ids(4, 1, 2), "kv_indptr": c.ids(0, 2, 3), "kv_last_page_len": c.ids(1, 3),
    }  # fmt: skip


def _half(c: Case, *shape: int) -> np.ndarray:
    return normal(c.rng, shape, "float16" if c.dtype == "float32" else c.dtype)


def _quant(c: Case) -> dict[str, Any]:
    return {"input": _half(c, 3, 64), "weight": _half(c, 64), "scale": np.float32([0.5])}


def _chain(c: Case, counted: bool) -> dict[str, Any]:
    made = {
        "draft_probs": c.probs(2, 3, 32), "draft_token_ids": c.ids([1, 2, 3], [4, 5, 6]),
        "target_probs": c.probs(2, 4, 32), "seed": 7, "offset": 1,
    }  # fmt: skip
    names = ("maybe_output_accepted_token_num", "maybe_output_emitted_draft_token_num")
    return made | ({name: c.ids(10, 20) for name in names} if counted else {})


def _window(c: Case) -> dict[str, Any]:
    return {"input": c.f32(3, 40), "lengths": c.ids(40, 3, 17), "k": 5}


#: (operator, label) -> arguments by name.
CASES: dict[tuple[str, str], Any] = {
    **{(n, ""): lambda c: {"input": c.x(3, 128)} for n in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")},
    **{(n, ""): lambda c: {"input": c.x(3, 64), "weight": c.x(64)} for n in ("rmsnorm", "gemma_rmsnorm")},
    ("rmsnorm", "heads"): lambda c: {"input": c.x(3, 2, 64), "weight": c.x(64), "eps": 1e-5},
    **{
        (n, ""): lambda c: {"input": c.x(3, 64), "residual": c.x(3, 64), "weight": c.x(64)}
        for n in ("fused_add_rmsnorm", "gemma_fused_add_rmsnorm")
    },
    ("layernorm", ""): lambda c: {"input": _half(c, 3, 64), "gemma": c.f32(64), "beta": c.f32(64)},
    ("rmsnorm_quant", ""): _quant,
    ("fused_add_rmsnorm_quant", ""): lambda c: _quant(c) | {"residual": _half(c, 3, 64), "scale": 0.25},
    **{
        (f"apply_{s}rope{t}", ""): lambda c: _rope(c) | {"indptr": c.ids(0, 2, 5), "offsets": c.ids(3, 7)}
        for s in ("", "llama31_") for t in ("", "_inplace")
    },
    **{
        (f"apply_{s}rope_pos_ids{t}", ""): lambda c: _rope(c) | {"pos_ids": c.ids(0, 9, 4, 2, 7), "rotary_dim": 32}
        for s in ("", "llama31_") for t in ("", "_inplace")
    },
    **{
        (f"apply_rope_with_cos_sin_cache{t}", ""): lambda c: {
            "positions": c.ids(0, 9, 4), "query": c.x(3, 256), "key": c.x(3, 128), "head_size": 64,
            "cos_sin_cache": c.f32(16, 64),
        }
        for t in ("", "_inplace")
    },
    ("get_seq_lens", ""): lambda c: {"kv_indptr": c.ids(0, 2, 3), "kv_last_page_len": c.ids(1, 3), "page_size": 4},
    ("get_batch_indices_positions", ""): lambda c: {
        "append_indptr": c.ids(0, 1, 3), "seq_lens": c.ids(5, 2), "nnz": 4
    },
    ("append_paged_kv_cache", "packed"): lambda c: _append(c, False),
    ("append_paged_kv_cache", "pair"): lambda c: _append(c, True),
    ("append_paged_mla_kv_cache", ""): _mla,
    ("packbits", ""): lambda c: {"x": c.rng.random(13) < 0.5, "bitorder": "little"},
    ("segment_packbits", ""): lambda c: {"x": c.rng.random(13) < 0.5, "indptr": c.ids(0, 3, 13)},
    ("softmax", ""): lambda c: {"logits": c.f32(3, 40)},
    ("softmax", "rows"): lambda c: {"logits": c.f32(3, 40), "temperature": np.float32([0.5, 1, 2])},
    ("sampling_from_logits", ""): lambda c: {"logits": c.f32(3, 40), "seed": 5},
    ("sampling_from_probs", "valid"): lambda c: {
        "probs": c.probs(3, 40), "indices": c.ids(2, 0, 0, 1), "seed": 5, "return_valid": True
    },
    ("top_p_sampling_from_probs", ""): lambda c: {"probs": c.probs(3, 40), "top_p": 0.8, "seed": 5},
    ("top_k_sampling_from_probs", ""): lambda c: {"probs": c.probs(3, 40), "top_k": c.ids(3, 1, 9), "seed": 5},
    ("min_p_sampling_from_probs", ""): lambda c: {
        "probs": c.probs(3, 40), "min_p": np.float32([0.1, 0.2, 0.5]), "seed": 5
    },
    **{
        (f"top_k_top_p_sampling_from_{s}", ""): lambda c, s=s: {
            s: c.probs(3, 40), "top_k": 7, "top_p": np.float32([0.5, 0.9, 1.0]), "seed": 5, "offset": 4
        }
        for s in ("logits", "probs")
    },
    ("top_p_renorm_probs", ""): lambda c: {"probs": c.probs(3, 40), "top_p": 0.7},
    ("top_k_renorm_probs", ""): lambda c: {"probs": c.probs(3, 40), "top_k": c.ids(3, 1, 9)},
    ("top_k_mask_logits", ""): lambda c: {"logits": c.f32(3, 40), "top_k": 4},
    ("chain_speculative_sampling", ""): lambda c: _chain(c, False),
    ("chain_speculative_sampling", "counters"): lambda c: _chain(c, True),
    ("top_k", ""): lambda c: {"input": c.f32(3, 40), "k": 4, "sorted": True},
    ("top_k_page_table_transform", ""): lambda c: _window(c) | {
        "src_page_table": c.rng.permutation(120).reshape(3, 40).astype(np.int32)
    },
    ("top_k_page_table_transform", "raw"): lambda c: _window(c) | {
        "src_page_table": c.rng.permutation(120).reshape(3, 40).astype(np.int32), "row_to_batch": c.ids(2, 0, 0),
        "out_raw_indices": np.zeros((3, 5), np.int32),
    },
    ("top_k_ragged_transform", ""): lambda c: _window(c) | {"offsets": c.ids(0, 100, 200)},
    ("mm_bf16", ""): lambda c: {"a": c.x(3, 64), "b": c.x(64, 32), "bias": c.x(32)},
    ("mm_bf16", "float32"): lambda c: {"a": c.x(3, 64), "b": c.x(64, 32), "out_dtype": "float32"},
    ("bmm_bf16", ""): lambda c: {"A": c.x(2, 3, 64), "B": c.x(2, 64, 32)},
    ("gather_rows", ""): lambda c: {"source": c.x(7, 64), "rows": c.ids(6, 0, 3)},
    ("argmax", ""): lambda c: {"x": c.f32(3, 40)},
    ("merge_state", ""): lambda c: {
        "v_a": c.x(3, 2, 64), "s_a": c.f32(3, 2), "v_b": c.x(3, 2, 64), "s_b": c.f32(3, 2)
    },
    ("merge_state_in_place", ""): lambda c: {
        "v": c.x(3, 2, 64), "s": c.f32(3, 2), "v_other": c.x(3, 2, 64), "s_other": c.f32(3, 2),
        "mask": np.array([True, False, True]),
    },
    ("merge_states", ""): lambda c: {"v": c.x(3, 5, 2, 64), "s": c.f32(3, 5, 2)},
    ("single_decode_with_kv_cache", ""): lambda c: {
        "q": c.x(4, 64), "k": c.x(9, 2, 64), "v": c.x(9, 2, 64), "logits_soft_cap": 5.0, "return_lse": True
    },
    ("single_prefill_with_kv_cache", ""): lambda c: {
        "q": c.x(5, 4, 64), "k": c.x(9, 2, 64), "v": c.x(9, 2, 64), "causal": True, "window_left": 3
    },
    ("single_prefill_with_kv_cache", "mask"): lambda c: {
        "q": c.x(5, 4, 64), "k": c.x(9, 2, 64), "v": c.x(9, 2, 64), "custom_mask": c.rng.random((5, 9)) < 0.7,
        "return_lse": True,
    },
}  # fmt: skip


def _fp8(c: Case, *shape: int) -> np.ndarray:
    return normal(c.rng, shape, "float8_e4m3fn")


def _groupwise(c: Case, block: int = 1) -> dict[str, Any]:
    return {
        "a": _fp8(c, 8, 256), "b": _fp8(c, 128, 256), "a_scale": np.abs(c.f32(8 // block if block == 1 else 1, 2)),
        "b_scale": np.abs(c.f32(1, 2)), "scale_major_mode": "K",
    }  # fmt: skip


CASES |= {
    ("silu_and_mul_quant", ""): lambda c: {"input": _half(c, 3, 128), "scale": np.float32([0.5])},
    ("layernorm_quant", ""): lambda c: {
        "input": _half(c, 3, 64), "gemma": c.f32(64), "beta": c.f32(64), "scale": np.float32([0.5])
    },
    **{
        (n, ""): lambda c: {"unswizzled_sf": c.rng.integers(0, 255, (130, 6)).astype(np.uint8)}
        for n in ("block_scale_interleave", "nvfp4_block_scale_interleave")
    },
    ("mxfp8_quantize", ""): lambda c: {"input": _half(c, 5, 64)},
    ("gemm_fp8_nt_groupwise", ""): lambda c: _groupwise(c),
    ("gemm_fp8_nt_blockscaled", ""): lambda c: _groupwise(c, 128),
    ("group_gemm", ""): lambda c: {"a": c.x(8, 64), "b": c.x(2, 32, 64), "m_indptr": c.ids(0, 3, 8)},
    ("group_gemm_fp8_nt_groupwise", ""): lambda c: _groupwise(c) | {
        "b": _fp8(c, 2, 128, 256), "b_scale": np.abs(c.f32(2, 1, 2)), "m_indptr": c.ids(0, 3, 8)
    },
    ("group_deepgemm_fp8_nt_groupwise", ""): lambda c: {
        "a": _fp8(c, 8, 256), "b": _fp8(c, 2, 128, 256), "a_scale": np.abs(c.f32(8, 2)),
        "b_scale": np.abs(c.f32(2, 1, 2)), "m_indices": c.ids(1, 1, 1, 0, 0, 0, 0, 0),
    },
    ("batch_deepgemm_fp8_nt_groupwise", ""): lambda c: {
        "a": _fp8(c, 2, 8, 256), "b": _fp8(c, 2, 128, 256), "a_scale": np.abs(c.f32(2, 8, 2)),
        "b_scale": np.abs(c.f32(2, 1, 2)), "masked_m": c.ids(8, 8), "expected_m": 8,
    },
    ("gemm_fp8_nt_groupwise", "MN"): lambda c: {
        "a": _fp8(c, 8, 256), "b": _fp8(c, 128, 256), "a_scale": np.abs(c.f32(2, 8)), "b_scale": np.abs(c.f32(2, 1)),
    },
    ("fp8_blockscale_gemm_sm90", ""): lambda c: {"input": _half(c, 8, 256), "weight": _half(c, 128, 256)},
    ("fp8_blockscale_gemm_sm90", "fp8"): lambda c: {
        "input": _half(c, 8, 256), "weight": _fp8(c, 128, 256), "weight_scale": np.abs(c.f32(1, 2)),
        "out_dtype": "float32",
    },
    ("mm_fp8", ""): lambda c: {"a": _fp8(c, 8, 64), "b": _fp8(c, 32, 64).T, "alpha": np.float32([0.5])},
    ("mm_fp8", "rows"): lambda c: {
        "a": _fp8(c, 8, 64), "b": _fp8(c, 32, 64).T, "a_scale": np.abs(c.f32(8)), "b_scale": np.abs(c.f32(32)),
        "bias": c.f32(32), "out_dtype": "float32",
    },
    ("bmm_fp8", ""): lambda c: {
        "A": _fp8(c, 2, 8, 64), "B": _fp8(c, 2, 32, 64).swapaxes(1, 2), "A_scale": np.float32([0.5]),
        "B_scale": np.float32([2]), "dtype": "bfloat16",
    },
    ("mm_bf16_swiglu", ""): lambda c: {"a": c.x(3, 64), "b": c.x(32, 64).T, "bias": c.x(32)},
}  # fmt: skip


def _rotated(c: Case, **more: Any) -> dict[str, Any]:
    return {
        "q_rope": _half(c, 3, 4, 32), "k_rope": _half(c, 3, 2, 32), "q_nope": _half(c, 3, 4, 64),
        "k_nope": _half(c, 3, 2, 64), "cos_sin_cache": c.f32(16, 32), "pos_ids": c.ids(0, 9, 4),
        "quant_scale_q": 0.5, **more,
    }  # fmt: skip


def _rotated_pages(c: Case, mla: bool, cached: Any = _fp8) -> dict[str, Any]:
    shapes = ((6, 4, 64), (6, 4, 32)) if mla else ((6, 4, 2, 96), (6, 4, 2, 64))
    made = _rotated(
        c, v=None if mla else _half(c, 3, 2, 64), paged_kv_cache=tuple(cached(c, *s) for s in shapes),
        kv_indices=c.ids(4, 1, 2), kv_indptr=c.ids(0, 2, 3), batch_indices=c.ids(0, 0, 1), positions=c.ids(3, 4, 2),
        page_size=4,
    )  # fmt: skip
    return made | ({"k_rope": _half(c, 3, 32), "k_nope": _half(c, 3, 64), "q_nope": None} if mla else {})


def _kept(made: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in made.items() if name != "quant_scale_q"}


def _moe(c: Case, fp8: bool) -> dict[str, Any]:
    hidden, inter = (128, 128) if fp8 else (64, 32)
    weights = _fp8 if fp8 else _half
    made = {
        "input": _half(c, 5, hidden), "token_selected_experts": c.rng.integers(0, 3, (5, 2)).astype(np.int32),
        "token_final_scales": c.rng.random((5, 2)).astype(np.float32),
        "fc1_expert_weights": weights(c, 3, 2 * inter, hidden), "fc2_expert_weights": weights(c, 3, hidden, inter),
        "output_dtype": "bfloat16",
    }  # fmt: skip
    scales = (np.abs(c.f32(3, 2, 1)), np.abs(c.f32(3, 1, 1)))
    return made | ({"quant_scales": scales, "use_deepseek_fp8_block_scale": True} if fp8 else {})


CASES |= {
    ("fp4_quantize", ""): lambda c: {"input": _half(c, 5, 64), "global_scale": np.float32([40])},
    ("fp4_quantize", "mx"): lambda c: {
        "input": _half(c, 5, 64), "global_scale": 0.5, "sf_vec_size": 32, "sf_use_ue8m0": True,
        "is_sf_swizzled_layout": False, "is_global_scale_inversed": True,
    },
    ("nvfp4_quantize", ""): lambda c: {"a": _half(c, 5, 64), "a_global_sf": np.float32([40])},
    ("mxfp4_quantize", ""): lambda c: {"a": _half(c, 5, 64)},
    ("silu_and_mul_nvfp4_quantize", ""): lambda c: {"input": _half(c, 5, 128), "global_scale": 9.0},
    ("per_token_group_quant_8bit", ""): lambda c: {"x": _half(c, 5, 64), "group_size": 32},
    ("per_token_group_quant_8bit", "gated"): lambda c: {
        "x": _half(c, 5, 128), "group_size": 32, "dst_dtype": "int8", "fuse_silu_and_mul": True
    },
    ("per_token_group_quant_8bit", "columns"): lambda c: {
        "x": _half(c, 5, 64), "group_size": 32, "column_major_scales": True, "scale_tma_aligned": True
    },
    ("per_token_quant_fp8", ""): lambda c: {"x": _half(c, 5, 64), "dtype": "float8_e5m2"},
    ("per_token_quant_int8", ""): lambda c: {"x": _half(c, 2, 5, 64)},
    ("per_tensor_quant_fp8", ""): lambda c: {"x": _half(c, 5, 64)},
    ("per_tensor_quant_fp8", "given"): lambda c: {"x": _half(c, 5, 64), "scale": np.float32([0.25])},
    ("quantize_fp8", ""): lambda c: {"x": _half(c, 5, 256), "scale_shape": (2, 5), "tile_shape": (1, 128),
                                     "scale_major_mode": "MN"},
    ("per_token_cast_to_fp8", ""): lambda c: {"x": _half(c, 5, 256)},
    ("per_block_cast_to_fp8", ""): lambda c: {"x": _half(c, 130, 256)},
    ("dequantize_fp8", ""): lambda c: {"x": _fp8(c, 5, 256), "x_scale": np.abs(c.f32(5, 2))},
    ("dequantize_fp8", "tiles"): lambda c: {
        "x": _fp8(c, 2, 6, 256), "x_scale": np.abs(c.f32(2, 3, 2)), "tile_shape": (1, 2, 128)
    },
    ("e2m1_and_ufp8sf_scale_to_float", ""): lambda c: {
        "e2m1_tensor": c.rng.integers(0, 256, (3, 32)).astype(np.uint8),
        "ufp8_scale_tensor": c.rng.integers(0, 120, (3, 4)).astype(np.uint8), "global_scale_tensor": np.float32([0.5]),
        "is_sf_swizzled_layout": False,
    },
    ("mxfp4_dequantize", ""): lambda c: {
        "a_fp4": c.rng.integers(0, 256, (3, 32)).astype(np.uint8),
        "a_sf": c.rng.integers(100, 140, (128, 4)).astype(np.uint8),
    },
    ("mxfp8_dequantize_host", ""): lambda c: {
        "input": _fp8(c, 3, 64), "scale_tensor": c.rng.integers(100, 140, 512).astype(np.uint8)
    },
    ("rope_quantize_fp8", ""): _rotated,
    ("rope_quantize_fp8", "no nope"): lambda c: _rotated(c, q_nope=None, k_nope=None, quantize_dtype="float8_e5m2"),
    ("mla_rope_quantize_fp8", ""): lambda c: _rotated(c, k_rope=_half(c, 3, 32), k_nope=_half(c, 3, 64)),
    ("rope_quantize_fp8_append_paged_kv_cache", ""): lambda c: _rotated_pages(c, False),
    ("rope_quantize_fp8_append_paged_kv_cache", "mla"): lambda c: _rotated_pages(c, True),
    ("rope_append_paged_kv_cache", ""): lambda c: _kept(_rotated_pages(c, False, _half)),
    ("rope_append_paged_kv_cache", "fp8"): lambda c: _kept(_rotated_pages(c, False)),
    ("fused_topk_deepseek", ""): lambda c: {
        "scores": c.f32(5, 32), "bias": c.f32(32), "n_group": 4, "topk_group": 2, "topk": 3,
        "routed_scaling_factor": 2.5,
    },
    ("cutlass_fused_moe", ""): lambda c: _moe(c, False),
    ("cutlass_fused_moe", "fp8"): lambda c: _moe(c, True),
}  # fmt: skip

#: Results whose size depends on values, and results with strides: nothing that XLA has.
NOT_IN_JIT = {("segment_packbits", ""), ("per_token_group_quant_8bit", "columns")}


class WrapperCase:
    """Constructor arguments after the workspace, plan arguments, and those of `run`."""

    def __init__(
        self, plan: dict[str, Any], run: Any, before: tuple[Any, ...] = (), options: dict[str, Any] | None = None
    ) -> None:
        self.plan, self.run, self.before, self.options = plan, run, before, options or {}


def _types(dtype: str) -> dict[str, Any]:
    return {"q_data_type": dtype, "kv_data_type": dtype}


_TABLE = ([0, 2, 3], [4, 1, 2], [1, 3])  # page size 4: 5 and 3 keys
_HEADS = (4, 2, 64, 4)


def wrapper_cases(dtype: str) -> dict[tuple[str, str], WrapperCase]:
    """(class, label) -> case."""
    types = _types(dtype)
    qo = [0, 2, 5]

    def cache(c: Case) -> np.ndarray:
        return c.x(6, 2, 4, 2, 64)

    def paged(c: Case, rows: int, **more: Any) -> dict[str, Any]:
        return {"q": c.x(rows, 4, 64), "paged_kv_cache": cache(c), **more}

    def shared(c: Case, rows: int) -> dict[str, Any]:
        return {
            "q": c.x(rows, 4, 64), "k_shared": c.x(9, 2, 64), "v_shared": c.x(9, 2, 64), "unique_kv_cache": cache(c)
        }  # fmt: skip

    decode = {"args": (*_TABLE, *_HEADS), **types}
    prefill = {"args": (qo, *_TABLE, *_HEADS), **types, "causal": True}
    flags = np.array([[True, False, True], [False, True, True]])
    return {
        ("BatchDecodeWithPagedKVCacheWrapper", ""): WrapperCase(decode, lambda c: paged(c, 2)),
        ("BatchDecodeWithPagedKVCacheWrapper", "pair, lse, sinks"): WrapperCase(
            decode,
            lambda c: {
                "q": c.x(2, 4, 64), "paged_kv_cache": (c.x(6, 4, 2, 64), c.x(6, 4, 2, 64)), "return_lse": True,
                "sinks": c.f32(4), "k_scale": 0.5, "v_scale": np.float32([2.0, 0.5]),
            },
        ),
        ("BatchPrefillWithPagedKVCacheWrapper", ""): WrapperCase(prefill, lambda c: paged(c, 5, return_lse=True)),
        ("BatchPrefillWithRaggedKVCacheWrapper", ""): WrapperCase(
            {"args": (qo, [0, 4, 9], 4, 2, 64), "causal": True, **types},
            lambda c: {"q": c.x(5, 4, 64), "k": c.x(9, 2, 64), "v": c.x(9, 2, 64)},
        ),
        ("BatchAttention", ""): WrapperCase(
            {"args": (qo, [0, 2, 3], [4, 1, 2], [5, 3], 4, 2, 64, 64, 4), "causal": True, **types},
            lambda c: {"q": c.x(5, 4, 64), "kv_cache": cache(c)},
        ),
        ("PODWithPagedKVCacheWrapper", ""): WrapperCase(
            decode,
            lambda c: {
                "q_p": c.x(3, 4, 64), "k_p": c.x(7, 2, 64), "v_p": c.x(7, 2, 64), "q_d": c.x(2, 4, 64),
                "paged_kv_cache_d": cache(c), "causal_p": True, "return_lse_d": True,
            },
        ),
        ("MultiLevelCascadeAttentionWrapper", ""): WrapperCase(
            {
                "args": ([[0, 5], qo], [[0, 2], [0, 1, 3]], [[5, 0], [4, 1, 2]], [[4], [3, 2]], *_HEADS),
                "causal": True, **types,
            },
            lambda c: paged(c, 5), before=(2,),
        ),
        ("BatchDecodeWithSharedPrefixPagedKVCacheWrapper", ""): WrapperCase(
            {"args": (*_TABLE, *_HEADS), "data_type": dtype}, lambda c: shared(c, 2)
        ),
        ("BatchPrefillWithSharedPrefixPagedKVCacheWrapper", ""): WrapperCase(
            {"args": (qo, *_TABLE, *_HEADS), "q_data_type": dtype},
            lambda c: {**shared(c, 5), "causal": True, "return_lse": True},
        ),
        ("BatchAttentionWithAttentionSinkWrapper", ""): WrapperCase(
            {"args": (qo, *_TABLE, *_HEADS), "causal": True, **types}, lambda c: paged(c, 5, sink=c.f32(4)),
            options={**types, "head_dim_qk": 64, "head_dim_vo": 64},
        ),
        ("BatchMLAPagedAttentionWrapper", ""): WrapperCase(
            {"args": (qo, [0, 2, 3], [4, 1, 2], [5, 3], 16, 512, 64, 4, True, 0.1, dtype, dtype)},
            lambda c: {
                "q_nope": c.x(5, 16, 512), "q_pe": c.x(5, 16, 64), "ckv_cache": c.x(6, 4, 512),
                "kpe_cache": c.x(6, 4, 64), "return_lse": True,
            },
        ),
        ("BatchDecodeMlaWithPagedKVCacheWrapper", ""): WrapperCase(
            {"args": (*_TABLE, 16, 512, 4, 0.1), "data_type": dtype, "q_data_type": dtype},
            lambda c: {
                "q_nope": c.x(2, 16, 512), "q_pe": c.x(2, 16, 64), "paged_ckv_cache": c.x(6, 4, 512),
                "paged_kpe_cache": c.x(6, 4, 64),
            },
        ),
        ("BlockSparseAttentionWrapper", ""): WrapperCase(
            {"args": ([0, 2, 3], [0, 2, 1], 8, 12, 4, 4, 4, 2, 64), **types},
            lambda c: {"q": c.x(8, 4, 64), "k": c.x(12, 2, 64), "v": c.x(12, 2, 64), "return_lse": True},
        ),
        ("VariableBlockSparseAttentionWrapper", ""): WrapperCase(
            {
                "args": (
                    np.stack([flags, ~flags]), np.tile(np.int32([3, 5]), (2, 1)), np.tile(np.int32([4, 2, 6]), (2, 1)),
                    4, 2, 64,
                ),
                **types,
            },
            lambda c: {"q": c.x(4, 8, 64), "k": c.x(2, 12, 64), "v": c.x(2, 12, 64), "return_lse": True},
        ),
    }  # fmt: skip


WRAPPER_KEYS = list(wrapper_cases("float32"))


def flat(value: Any) -> list[Any]:
    """The arrays of a nested result."""
    return [x for v in value for x in flat(v)] if isinstance(value, (tuple, list)) else [value]


def received(row: Any, kwargs: dict[str, Any], cast: Any = np.uint8) -> dict[str, np.ndarray]:
    """Arrays for required output parameters; casts write `cast`."""
    return {x.name: np.zeros(x.shape(kwargs), cast if x.dtype is None else x.dtype.np) for x in row.into}


def has_arrays(value: Any) -> bool:
    """Whether an argument is an array or a sequence of them."""
    return isinstance(value, np.ndarray) or (isinstance(value, (tuple, list)) and any(map(has_arrays, value)))


def copied(value: Any) -> Any:
    """A deep copy of arguments, which lies as they do."""
    if isinstance(value, tuple):
        return tuple(copied(v) for v in value)
    return value.copy(order="K") if isinstance(value, np.ndarray) else value


def kept_order(value: np.ndarray, make: Any) -> Any:
    """``make(value)``, a copy in another framework, column by column where `value` is so."""
    by_columns = value.ndim > 1 and value.strides[-1] > value.strides[-2]
    return make(value.swapaxes(-1, -2)).swapaxes(-1, -2) if by_columns else make(value)


def llama_notebook() -> dict[str, Any]:
    """What the notebook of the Llama decode step in JAX defines before the cell that runs it."""
    path = Path(__file__).parents[1] / "notebooks" / "05_llama_decode_in_jax.ipynb"
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    names: dict[str, Any] = {"__name__": "notebook"}
    first = next(i for i, c in enumerate(cells) if any("*run(steps" in line for line in c["source"]))
    for cell in cells[:first]:
        exec(compile("".join(cell["source"]), path.name, "exec", dont_inherit=True), names)
    return names
