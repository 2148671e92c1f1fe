"""Decode plans in the prefill kernel: variants, several queries a request, and what the decode kernel lacks."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_cupy.arrays import View
from fi_cupy.decode_plan import Buffers, Planned
from fi_cupy.dtypes import int32


def prefill_wrapper(
    op: str, workspace: View, kv_layout: str, graph: bool, buffers: Buffers | None, variant: Any
) -> Any:
    """The prefill wrapper behind a decode wrapper: tiles of 16 rows, which a group of query heads shares."""
    from fi_cupy.prefill import BatchPrefillWithPagedKVCacheWrapper

    class ByPrefill(BatchPrefillWithPagedKVCacheWrapper):
        _op = op

    fixed: tuple[Any, ...] = ()
    if buffers is not None:
        indptr, indices, last_page_len = buffers
        rows = indptr.empty(indptr.shape, int32).array
        fixed = (rows, indptr.array, indices.array, last_page_len.array)
    return ByPrefill(workspace.array, kv_layout, graph, *fixed, variant=variant)


def prefill_plan(p: Planned) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of that wrapper's plan."""
    split_keys, disable_split = p.split
    args = (
        np.arange(p.batch_size + 1) * p.q_len_per_req, p.indptr, p.indices.array, p.last_page_len, p.num_qo_heads,
        p.num_kv_heads, p.head_dim, p.page_size,
    )  # fmt: skip
    return args, {
        **p.options, "causal": p.q_len_per_req > 1, "sm_scale": p.sm_scale, "q_data_type": p.dtype,
        "kv_data_type": p.kv_dtype, "o_data_type": p.out_dtype, "disable_split_kv": disable_split,
        "fixed_split_size": None if split_keys is None else split_keys // p.page_size,
    }  # fmt: skip
