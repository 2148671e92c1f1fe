"""The names of FlashInfer's attention modules: ``get_*_uri``. The modules are `fi_cupy.jit.modules`'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, UnsupportedError


def _types(names: Sequence[str], types: Sequence[Any]) -> str:
    return "_".join(f"dtype_{name}_{to_dtype(t).tag}" for name, t in zip(names, types, strict=True))


def encoding_number(value: Any) -> int:
    """A position encoding's number."""
    from fi_cupy.utils import PosEncodingMode

    try:
        return int(PosEncodingMode(getattr(value, "value", value)))
    except ValueError:
        raise ArgumentError(f"jit: pos_encoding_mode is {value!r}, expected 0 (NONE), 1 (ROPE_LLAMA), 2 (ALIBI)") from (
            None
        )


def _suffix(backend: str) -> str:
    if backend not in ("auto", "fa2", "fa3"):
        raise UnsupportedError(f"jit: backend is {backend!r}, expected 'auto', 'fa2' or 'fa3'")
    return "_sm90" if backend == "fa3" else ""


def get_single_decode_uri(
    dtype_q: Any, dtype_kv: Any, dtype_o: Any, head_dim_qk: int, head_dim_vo: int, pos_encoding_mode: int,
    use_sliding_window: bool, use_logits_soft_cap: bool,
) -> str:  # fmt: skip
    """The name of a single decode module."""
    return (
        f"single_decode_with_kv_cache_{_types(('q', 'kv', 'o'), (dtype_q, dtype_kv, dtype_o))}_"
        f"head_dim_qk_{head_dim_qk}_head_dim_vo_{head_dim_vo}_posenc_{encoding_number(pos_encoding_mode)}_"
        f"use_swa_{use_sliding_window}_use_logits_cap_{use_logits_soft_cap}"
    )


def get_batch_decode_uri(
    dtype_q: Any, dtype_kv: Any, dtype_o: Any, dtype_idx: Any, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int, use_sliding_window: bool, use_logits_soft_cap: bool,
) -> str:  # fmt: skip
    """The name of a batch decode module."""
    return (
        f"batch_decode_with_kv_cache_{_types(('q', 'kv', 'o', 'idx'), (dtype_q, dtype_kv, dtype_o, dtype_idx))}_"
        f"head_dim_qk_{head_dim_qk}_head_dim_vo_{head_dim_vo}_posenc_{encoding_number(pos_encoding_mode)}_"
        f"use_swa_{use_sliding_window}_use_logits_cap_{use_logits_soft_cap}"
    )


def get_single_prefill_uri(
    backend: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int, use_sliding_window: bool, use_logits_soft_cap: bool, use_fp16_qk_reduction: bool,
) -> str:  # fmt: skip
    """The name of a single prefill module."""
    return (
        f"single_prefill_with_kv_cache_{_types(('q', 'kv', 'o'), (dtype_q, dtype_kv, dtype_o))}_"
        f"head_dim_qk_{head_dim_qk}_head_dim_vo_{head_dim_vo}_posenc_{encoding_number(pos_encoding_mode)}_"
        f"use_swa_{use_sliding_window}_use_logits_cap_{use_logits_soft_cap}_f16qk_{use_fp16_qk_reduction}"
        f"{_suffix(backend)}"
    )


def get_batch_prefill_uri(
    backend: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, dtype_idx: Any, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int, use_sliding_window: bool, use_logits_soft_cap: bool, use_fp16_qk_reduction: bool,
) -> str:  # fmt: skip
    """The name of a batch prefill module."""
    return (
        f"batch_prefill_with_kv_cache_{_types(('q', 'kv', 'o', 'idx'), (dtype_q, dtype_kv, dtype_o, dtype_idx))}_"
        f"head_dim_qk_{head_dim_qk}_head_dim_vo_{head_dim_vo}_posenc_{encoding_number(pos_encoding_mode)}_"
        f"use_swa_{use_sliding_window}_use_logits_cap_{use_logits_soft_cap}_f16qk_{use_fp16_qk_reduction}"
        f"{_suffix(backend)}"
    )


def get_batch_mla_uri(
    backend: str, dtype_q: Any, dtype_kv: Any, dtype_o: Any, dtype_idx: Any, head_dim_ckv: int, head_dim_kpe: int,
    use_profiler: bool,
) -> str:  # fmt: skip
    """The name of a latent attention module."""
    return (
        f"batch_mla_attention_{_types(('q', 'kv', 'o', 'idx'), (dtype_q, dtype_kv, dtype_o, dtype_idx))}_"
        f"head_dim_ckv_{head_dim_ckv}_head_dim_kpe_{head_dim_kpe}_profiler_{use_profiler}{_suffix(backend)}"
    )


def get_batch_attention_uri(
    dtype_q: Any, dtype_kv: Any, dtype_o: Any, dtype_idx: Any, head_dim_qk: int, head_dim_vo: int,
    pos_encoding_mode: int, use_logits_soft_cap: bool, use_profiler: bool,
) -> str:  # fmt: skip
    """The name of a module of mixed batches."""
    return (
        f"batch_attention_with_kv_cache_{_types(('q', 'kv', 'o', 'idx'), (dtype_q, dtype_kv, dtype_o, dtype_idx))}_"
        f"head_dim_qk_{head_dim_qk}_head_dim_vo_{head_dim_vo}_posenc_{encoding_number(pos_encoding_mode)}_"
        f"use_logits_soft_cap_{str(use_logits_soft_cap).lower()}_use_profiler_{str(use_profiler).lower()}"
    )


def get_pod_uri(
    dtype_q: Any, dtype_kv: Any, dtype_o: Any, head_dim: int, pos_encoding_mode_p: int, use_sliding_window_p: bool,
    use_logits_soft_cap_p: bool, use_fp16_qk_reduction: bool, dtype_idx: Any, pos_encoding_mode_d: int,
    use_sliding_window_d: bool, use_logits_soft_cap_d: bool,
) -> str:  # fmt: skip
    """The name of a module of a prompt beside decoding requests."""
    return (
        f"pod_with_kv_cache_{_types(('q', 'kv', 'o'), (dtype_q, dtype_kv, dtype_o))}_head_dim_{head_dim}_"
        f"posenc_p_{encoding_number(pos_encoding_mode_p)}_use_swa_p_{use_sliding_window_p}_use_logits_cap_p_"
        f"{use_logits_soft_cap_p}_posenc_d_{encoding_number(pos_encoding_mode_d)}_use_swa_d_{use_sliding_window_d}_"
        f"use_logits_cap_d_{use_logits_soft_cap_d}_{_types(('idx',), (dtype_idx,))}_f16qk_{use_fp16_qk_reduction}"
    )
