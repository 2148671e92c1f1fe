"""The operators as other frameworks' machinery has to know them: one row an operator.

A row says which parameters are arrays, which are overwritten, and what comes back; the rest of the parameters are
static. `fi_cupy.interop.jax` and `fi_cupy.interop.torch` make their forms of every operator from these rows, and the
signatures and texts of the functions themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fi_cupy.dtypes import DType, bool_, dtype, float8_e4m3fn, float32, int32, int64, uint8
from fi_cupy.interop.row import UNKNOWN, Into, Operator, Result, Rule, made


def _like(*names: str) -> Rule:
    return lambda a: tuple(Result(a[name].shape, a[name].dtype) for name in names)


def _overwritten(*names: str) -> Rule:
    return lambda a: tuple(name for name in names if a[name] is not None)


#: ``out`` of a cast that keeps the shape, or of one that halves the last dimension.
_CAST = (Into("out", lambda a: a["input"].shape),)
_GATED_CAST = (Into("out", lambda a: (*a["input"].shape[:-1], a["input"].shape[-1] // 2)),)


def _typed(value: Any, default: DType) -> DType:
    return default if value is None else dtype(value)


# --- activation, norm, rope -----------------------------------------------------------------------------------------


def _halved(a: Mapping[str, Any]) -> tuple[Result]:
    x = a["input"]
    return (Result((*x.shape[:-1], x.shape[-1] // 2), x.dtype),)


def _activation(name: str) -> Operator:
    return Operator("activation", name, ("input",), _halved, out=("out",))


def _norms() -> list[Operator]:
    x, xr = ("input", "weight"), ("input", "residual", "weight")
    return [
        Operator("norm", "rmsnorm", x, _like("input"), out=("out",)),
        Operator("norm", "gemma_rmsnorm", x, _like("input"), out=("out",)),
        Operator("norm", "fused_add_rmsnorm", xr, _overwritten("input", "residual"), mutated=("input", "residual")),
        Operator(
            "norm", "gemma_fused_add_rmsnorm", xr, _overwritten("input", "residual"), mutated=("input", "residual")
        ),
        Operator("norm", "layernorm", ("input", "gemma", "beta"), _like("input")),
        Operator("norm", "rmsnorm_quant", ("out", *x), lambda a: ("out",), either=("scale",), into=_CAST),
        Operator(
            "norm", "fused_add_rmsnorm_quant", ("out", *xr), lambda a: ("out", "residual"), either=("scale",),
            mutated=("residual",), into=_CAST,
        ),
    ]  # fmt: skip


def _ropes() -> list[Operator]:
    rows = []
    for stem in ("apply_rope", "apply_llama31_rope"):
        for tail, where in (("", ("indptr", "offsets")), ("_pos_ids", ("pos_ids",))):
            arrays = ("q", "k", *where)
            rows.append(Operator("rope", stem + tail, arrays, _like("q", "k")))
            rows.append(Operator("rope", f"{stem}{tail}_inplace", arrays, _overwritten("q", "k"), mutated=("q", "k")))
    arrays, qk = ("positions", "query", "key", "cos_sin_cache"), ("query", "key")
    rows.append(Operator("rope", "apply_rope_with_cos_sin_cache", arrays, _like(*qk)))
    rows.append(Operator("rope", "apply_rope_with_cos_sin_cache_inplace", arrays, _overwritten(*qk), mutated=qk))
    return rows


# --- cache, masks ---------------------------------------------------------------------------------------------------


def _packed(a: Mapping[str, Any]) -> tuple[Result]:
    return (Result(((a["x"].shape[0] + 7) // 8,), uint8),)


def _packed_segments(a: Mapping[str, Any]) -> tuple[Result, Result]:
    return Result((UNKNOWN,), uint8), Result(a["indptr"].shape, a["indptr"].dtype)


def _pages() -> list[Operator]:
    table = ("batch_indices", "positions")
    pages = ("kv_indices", "kv_indptr", "kv_last_page_len")
    mla = ("ckv_cache", "kpe_cache")
    return [
        Operator(
            "page", "get_seq_lens", ("kv_indptr", "kv_last_page_len"),
            lambda a: (Result(a["kv_last_page_len"].shape, int32),),
        ),
        Operator(
            "page", "get_batch_indices_positions", ("append_indptr", "seq_lens"),
            lambda a: (Result((a["nnz"],), int32),) * 2, out=table,
        ),
        Operator(
            "page", "append_paged_kv_cache", ("append_key", "append_value", *table, "paged_kv_cache", *pages),
            _overwritten("paged_kv_cache"), mutated=("paged_kv_cache",),
        ),
        Operator(
            "page", "append_paged_mla_kv_cache", ("append_ckv", "append_kpe", *table, *mla, *pages),
            _overwritten(*mla), mutated=mla,
        ),
        Operator("quantization", "packbits", ("x",), _packed),
        Operator("quantization", "segment_packbits", ("x", "indptr"), _packed_segments),
    ]  # fmt: skip


# --- sampling, top-k ------------------------------------------------------------------------------------------------

_RANDOM = ("seed", "offset")
_HOST = ("generator", "check_nan")


def _tokens(a: Mapping[str, Any]) -> tuple[Result, ...]:
    x, indices = a.get("logits") or a.get("probs"), a["indices"]
    rows, kind = (x.shape[0], int32) if indices is None else (indices.shape[0], indices.dtype)  # type: ignore[union-attr]
    tokens = Result((rows,), kind)
    return (tokens, Result((rows,), bool_)) if a["return_valid"] else (tokens,)


def _sampler(name: str, *filters: str) -> Operator:
    source = "logits" if name.endswith("logits") else "probs"
    return Operator("sampling", name, (source, "indices"), _tokens, either=(*filters, *_RANDOM), host=_HOST)


def _filter(name: str, source: str, parameter: str) -> Operator:
    return Operator("sampling", name, (source,), _like(source), either=(parameter,))


def _chain(a: Mapping[str, Any]) -> tuple[Result | str, ...]:
    batch, n = a["draft_probs"].shape[:2]
    counters = ("maybe_output_accepted_token_num", "maybe_output_emitted_draft_token_num")
    counts = (Result((batch,), int32) if a[name] is None else name for name in counters)
    return (Result((batch, n + 1), a["draft_token_ids"].dtype), *counts)


def _samplers() -> list[Operator]:
    counters = ("maybe_output_accepted_token_num", "maybe_output_emitted_draft_token_num")
    draft = ("draft_probs", "draft_token_ids", "target_probs")
    return [
        Operator(
            "sampling", "softmax", ("logits",), lambda a: (Result(a["logits"].shape, float32),), either=("temperature",)
        ),
        _sampler("sampling_from_logits"),
        _sampler("sampling_from_probs"),
        _sampler("top_p_sampling_from_probs", "top_p"),
        _sampler("top_k_sampling_from_probs", "top_k"),
        _sampler("min_p_sampling_from_probs", "min_p"),
        _sampler("top_k_top_p_sampling_from_logits", "top_k", "top_p"),
        _sampler("top_k_top_p_sampling_from_probs", "top_k", "top_p"),
        _filter("top_p_renorm_probs", "probs", "top_p"),
        _filter("top_k_renorm_probs", "probs", "top_k"),
        _filter("top_k_mask_logits", "logits", "top_k"),
        Operator(
            "speculative", "chain_speculative_sampling", (*draft, *counters), _chain, either=_RANDOM,
            mutated=counters, host=("generator",),
        ),
    ]  # fmt: skip


def _best(a: Mapping[str, Any]) -> tuple[Result, Result]:
    shape = (a["input"].shape[0], a["k"])
    return Result(shape, a["input"].dtype), Result(shape, int64)


def _indices(a: Mapping[str, Any]) -> tuple[Result]:
    return (Result((a["input"].shape[0], a["k"]), int32),)


def _page_table(a: Mapping[str, Any]) -> tuple[Result | str, ...]:
    raw = () if a["out_raw_indices"] is None else ("out_raw_indices",)
    return (*_indices(a), *raw)


def _topks() -> list[Operator]:
    return [
        Operator("topk", "top_k", ("input",), _best),
        Operator(
            "topk", "top_k_page_table_transform",
            ("input", "src_page_table", "lengths", "row_to_batch", "row_starts", "page_table_row_starts",
             "out_raw_indices"),
            _page_table, mutated=("out_raw_indices",), out=("out",),
        ),
        Operator(
            "topk", "top_k_ragged_transform", ("input", "offsets", "lengths", "row_starts"), _indices, out=("out",)
        ),
    ]  # fmt: skip


# --- products, look-ups, attention ----------------------------------------------------------------------------------


def _product(first: str, second: str) -> Rule:
    def rule(a: Mapping[str, Any]) -> tuple[Result]:
        x, y = a[first], a[second]
        return (Result((*x.shape[:-1], y.shape[-1]), _typed(a["out_dtype"], x.dtype)),)

    return rule


def _gathered(a: Mapping[str, Any]) -> tuple[Result]:
    return (Result((a["rows"].shape[0], a["source"].shape[1]), a["source"].dtype),)


def _merged(a: Mapping[str, Any]) -> tuple[Result, Result]:
    n, _, heads, dim = a["v"].shape
    return Result((n, heads, dim), a["v"].dtype), Result((n, heads), float32)


def with_lse(out: Result, wanted: Any) -> tuple[Result, ...]:
    """An attention result, and its log-sum-exp where that is wanted."""
    return (out, Result(out.shape[:-1], float32)) if wanted else (out,)


def _as_fp8(kind: DType) -> DType:
    """Queries of bytes are e4m3, and so is their output."""
    return float8_e4m3fn if kind is uint8 else kind


def _decoded(a: Mapping[str, Any]) -> tuple[Result, ...]:
    q = a["q"]
    return with_lse(Result(q.shape, _as_fp8(q.dtype)), a["return_lse"])


def _prefilled(a: Mapping[str, Any]) -> tuple[Result, ...]:
    q, v = a["q"], a["v"]
    return with_lse(Result((*q.shape[:2], v.shape[2]), _typed(a["o_dtype"], _as_fp8(q.dtype))), a["return_lse"])


def _products() -> list[Operator]:
    states, scales = ("v_a", "s_a", "v_b", "s_b"), ("q_scale", "k_scale", "v_scale")
    return [
        Operator("gemm", "mm_bf16", ("a", "b", "bias"), _product("a", "b"), out=("out",)),
        Operator("gemm", "bmm_bf16", ("A", "B"), _product("A", "B"), out=("out",)),
        Operator("lookup", "gather_rows", ("source", "rows"), _gathered, out=("out",)),
        Operator("lookup", "argmax", ("x", "select"), lambda a: (Result(a["x"].shape[:1], int32),), out=("out",)),
        Operator("cascade", "merge_state", states, _like("v_a", "s_a")),
        Operator(
            "cascade", "merge_state_in_place", ("v", "s", "v_other", "s_other", "mask"), _overwritten("v", "s"),
            mutated=("v", "s"),
        ),
        Operator("cascade", "merge_states", ("v", "s"), _merged),
        Operator(
            "decode", "single_decode_with_kv_cache", ("q", "k", "v"), _decoded, either=scales,
            recordable=False,
        ),
        Operator(
            "prefill", "single_prefill_with_kv_cache",
            ("q", "k", "v", "scale_q", "scale_k", "scale_v", "custom_mask", "packed_custom_mask"), _prefilled,
            either=("k_scale", "v_scale"), recordable=False,
        ),
    ]  # fmt: skip


# --- 8 and 4 bits ---------------------------------------------------------------------------------------------------


def _grouped_cast(a: Mapping[str, Any]) -> tuple[Result, Result]:
    *rows, n = a["x"].shape
    width = n // 2 if a["fuse_silu_and_mul"] else n
    scales: tuple[int, ...] = (*rows, width // a["group_size"])
    strides = None
    if a["column_major_scales"]:
        strides = (1, -(-rows[0] // 4) * 4 if a["scale_tma_aligned"] else rows[0])
    return Result((*rows, width), _typed(a["dst_dtype"], float8_e4m3fn)), Result(scales, float32, strides)


def _quantizers() -> list[Operator]:
    scaled: dict[str, Any] = {"either": ("scale",)}

    def cast(name: str, x: str = "x", *either: str) -> Operator:
        return Operator("quantization", name, (x,), made, either=either)

    return [
        Operator(
            "activation", "silu_and_mul_quant", ("out", "input"), lambda a: ("out",), into=_GATED_CAST, **scaled
        ),
        Operator(
            "norm", "layernorm_quant", ("out", "input", "gemma", "beta"), lambda a: ("out",), into=_CAST, **scaled
        ),
        cast("block_scale_interleave", "unswizzled_sf"),
        cast("nvfp4_block_scale_interleave", "unswizzled_sf"),
        cast("mxfp8_quantize", "input"),
        cast("fp4_quantize", "input", "global_scale"),
        cast("nvfp4_quantize", "a", "a_global_sf"),
        cast("mxfp4_quantize", "a"),
        cast("silu_and_mul_nvfp4_quantize", "input", "global_scale"),
        Operator("quantization", "per_token_group_quant_8bit", ("x",), _grouped_cast),
        cast("per_token_quant_fp8"),
        cast("per_token_quant_int8"),
        cast("per_tensor_quant_fp8", "x", "scale"),
        cast("quantize_fp8"),
        cast("per_token_cast_to_fp8"),
        cast("per_block_cast_to_fp8"),
        Operator("quantization", "dequantize_fp8", ("x", "x_scale"), made),
        Operator(
            "quantization", "e2m1_and_ufp8sf_scale_to_float", ("e2m1_tensor", "ufp8_scale_tensor"), made,
            either=("global_scale_tensor",),
        ),
        Operator("quantization", "mxfp4_dequantize", ("a_fp4", "a_sf"), made),
        Operator("quantization", "mxfp8_dequantize_host", ("input", "scale_tensor"), made),
    ]  # fmt: skip


_ROTATED = ("q_rope", "k_rope", "q_nope", "k_nope")


def _rotated_cast(a: Mapping[str, Any]) -> tuple[Result | None, ...]:
    kind = _typed(a["quantize_dtype"], float8_e4m3fn)
    return tuple(None if a[n] is None else Result(a[n].shape, kind) for n in _ROTATED)


def _rotated_append(a: Mapping[str, Any]) -> tuple[Result | str | None, ...]:
    kind = _typed(a["quantize_dtype"], _as_fp8(a["paged_kv_cache"][0].dtype))
    made = (None if a[n] is None else Result(a[n].shape, kind) for n in ("q_rope", "q_nope"))
    return (*made, "paged_kv_cache")


def _rotated_kept(a: Mapping[str, Any]) -> tuple[Result | str | None, ...]:
    kept = (None if a[n] is None else Result(a[n].shape, a[n].dtype) for n in ("q_rope", "q_nope"))
    return (*kept, "paged_kv_cache")


def _rotating_casts() -> list[Operator]:
    arrays, nope = (*_ROTATED, "cos_sin_cache", "pos_ids"), ("q_nope", "k_nope")
    pages = ("kv_indices", "kv_indptr", "batch_indices", "positions")
    return [
        *(
            Operator(
                "rope", name, arrays, _rotated_cast, out=tuple(f"{n}_out" for n in _ROTATED), optional=nope,
                absent=_ROTATED,
            )
            for name in ("rope_quantize_fp8", "mla_rope_quantize_fp8")
        ),
        *(
            Operator(
                "rope", name, (*arrays, "v", "paged_kv_cache", *pages), made, mutated=("paged_kv_cache",),
                out=("q_rope_out", "q_nope_out"), optional=(*nope, "v"), absent=("q_rope", "q_nope"),
            )
            for name, made in (
                ("rope_quantize_fp8_append_paged_kv_cache", _rotated_append),
                ("rope_append_paged_kv_cache", _rotated_kept),
            )
        ),
    ]  # fmt: skip


def _small_products() -> list[Operator]:
    scales = ("a_scale", "b_scale")
    return [
        # A first call makes the multiplier 1, which it waits for.
        Operator(
            "gemm", "mm_fp8", ("a", "b", "alpha", *scales, "bias"), made, out=("out",), columns=("b",),
            recordable=False,
        ),
        Operator("gemm", "bmm_fp8", ("A", "B", "A_scale", "B_scale"), made, out=("out",), columns=("B",)),
        Operator("gemm", "mm_bf16_swiglu", ("a", "b", "bias"), made, out=("out",), columns=("b",)),
        Operator("gemm", "gemm_fp8_nt_groupwise", ("a", "b", *scales), made, out=("out",)),
        Operator("gemm", "gemm_fp8_nt_blockscaled", ("a", "b", *scales), made, out=("out",)),
        Operator(
            "gemm", "fp8_blockscale_gemm_sm90", ("input", "weight", "input_scale", "weight_scale"), made, out=("out",)
        ),
        Operator("gemm", "group_gemm", ("a", "b", "m_indptr", "weight_indices", "bias"), made, out=("out",)),
        Operator("gemm", "group_gemm_fp8_nt_groupwise", ("a", "b", *scales, "m_indptr"), made, out=("out",)),
        Operator("gemm", "group_deepgemm_fp8_nt_groupwise", ("a", "b", *scales, "m_indices"), made, out=("out",)),
        Operator("gemm", "batch_deepgemm_fp8_nt_groupwise", ("a", "b", *scales, "masked_m"), made, out=("out",)),
    ]  # fmt: skip


# --- mixture of experts ---------------------------------------------------------------------------------------------


def _chosen(a: Mapping[str, Any]) -> tuple[int, int]:
    return a["scores"].shape[0], a["topk"]


def _experts() -> list[Operator]:
    chosen = (Into("topk_values", _chosen, float32), Into("topk_indices", _chosen, int32))
    return [
        Operator(
            "fused_moe", "fused_topk_deepseek", ("scores", "bias", "topk_values", "topk_indices"),
            lambda a: ("topk_values", "topk_indices"), into=chosen,
        ),
        Operator(
            "fused_moe", "cutlass_fused_moe",
            ("input", "token_selected_experts", "token_final_scales", "fc1_expert_weights", "fc2_expert_weights",
             "quant_scales", "fc1_expert_biases", "fc2_expert_biases"),
            made, out=("output",), lists=("quant_scales",),
        ),
    ]  # fmt: skip


#: Every operator by its name.
OPERATORS: dict[str, Operator] = {
    row.name: row
    for row in (
        *(_activation(name) for name in ("silu_and_mul", "gelu_and_mul", "gelu_tanh_and_mul")),
        *_norms(), *_ropes(), *_pages(), *_samplers(), *_topks(), *_products(),
        *_quantizers(), *_rotating_casts(), *_small_products(), *_experts(),
    )
}  # fmt: skip

#: Other names of operators, FlashInfer's among them.
ALIASES = {
    "top_p_renorm_prob": "top_p_renorm_probs", "top_k_renorm_prob": "top_k_renorm_probs", "topk": "top_k",
}  # fmt: skip

#: `single_prefill_with_kv_cache` that returns the log-sum-exp as well.
WITH_LSE = "single_prefill_with_kv_cache_return_lse"
