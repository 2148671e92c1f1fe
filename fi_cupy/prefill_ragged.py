"""Prefill attention of a ragged batch over contiguous keys and values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partialmethod
from typing import Any

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import view
from fi_cupy.checks import as_sizes, check_device
from fi_cupy.choice_log import log_wrapper
from fi_cupy.dtypes import int32, uint8
from fi_cupy.errors import ArgumentError, PlanError
from fi_cupy.kv_cache import as_fp8, check_layout
from fi_cupy.multi_item import read_multi_item
from fi_cupy.page_table import check_hints, check_offsets, read_ints
from fi_cupy.prefill_batch import BatchPrefill, Planned
from fi_cupy.prefill_plan import (
    Ints,
    Strides,
    check_rows,
    make_problem,
    read_options,
    refuse,
)
from fi_cupy.variants import AttentionVariant, variant_of


class _RaggedPlan(Planned):
    kv_indptr: Ints


class BatchPrefillWithRaggedKVCacheWrapper(BatchPrefill):
    """Attention of a ragged batch of queries over ragged keys and values: `plan` once, `run` for every layer.

    Parameters
    ----------
    float_workspace_buffer, kv_layout, use_cuda_graph, backend, jit_args, jit_kwargs
        As in `BatchPrefillWithPagedKVCacheWrapper`. Keys: ``[tokens, heads, dim]`` (NHD) or ``[heads, tokens, dim]``.
    qo_indptr_buf, kv_indptr_buf : int32 arrays
        CUDA-graph mode: `plan` copies its offsets into them. The batch size is ``len(kv_indptr_buf) - 1``.
    custom_mask_buf : uint8 array, mask_indptr_buf : int32 array, optional
        CUDA-graph mode with a custom mask.

    Source
    ------
    flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper; Dao 2023 (FlashAttention-2).

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.prefill.BatchPrefillWithRaggedKVCacheWrapper(np.empty(1 << 20, np.uint8))
    >>> wrapper.plan([0, 3, 7], [0, 5, 9], 8, 2, 64, causal=True, q_data_type="float32")
    >>> q, k = np.ones((7, 8, 64), np.float32), np.ones((9, 2, 64), np.float32)
    >>> wrapper.run(q, k, k).shape
    (7, 8, 64)
    """

    _op = "BatchPrefillWithRaggedKVCacheWrapper"

    def __init__(
        self,
        float_workspace_buffer: Any,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Any = None,
        kv_indptr_buf: Any = None,
        custom_mask_buf: Any = None,
        mask_indptr_buf: Any = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
        *,
        variant: AttentionVariant | None = None,
    ) -> None:
        self._layout = check_layout(self._op, kv_layout)
        super().__init__(
            float_workspace_buffer,
            use_cuda_graph,
            {
                "qo_indptr_buf": (qo_indptr_buf, int32),
                "kv_indptr_buf": (kv_indptr_buf, int32),
                "custom_mask_buf": (custom_mask_buf, uint8),
                "mask_indptr_buf": (mask_indptr_buf, int32),
            },
            variant_of(self._op, variant, jit_args, jit_kwargs),
            backend,
        )

    def plan(
        self,
        qo_indptr: Any,
        kv_indptr: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int | None = None,
        custom_mask: Any = None,
        packed_custom_mask: Any = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        prefix_len_ptr: Any = None,
        token_pos_in_items_ptr: Any = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Any = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        seq_lens: Any = None,
        seq_lens_q: Any = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        v_indptr: Any = None,
        o_indptr: Any = None,
    ) -> None:
        """Make the schedule for the current lengths and send it to the GPU (one asynchronous copy).

        Parameters
        ----------
        qo_indptr, kv_indptr : int [batch + 1]
            Request b has rows ``q[qo_indptr[b] : qo_indptr[b + 1]]`` and keys ``k[kv_indptr[b] : kv_indptr[b + 1]]``.
        prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr : optional
            Multi-item scoring, see `BatchPrefillWithPagedKVCacheWrapper.plan`.
        fixed_split_size : int, optional
            Keys of every chunk.
        seq_lens, seq_lens_q, max_token_per_sequence, max_sequence_kv : optional
            Hints of other backends, which must agree with the offsets.
        v_indptr, o_indptr : None
            Values and output lie as keys and queries do.
        num_qo_heads, ... : as in `BatchPrefillWithPagedKVCacheWrapper.plan`

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, WorkspaceError, UnsupportedError, PlanError
        """
        op = f"{self._op}.plan"
        p = self._prepare(
            op, qo_indptr, kv_indptr, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, custom_mask,
            packed_custom_mask, causal, pos_encoding_mode, use_fp16_qk_reduction, window_left, logits_soft_cap,
            sm_scale, rope_scale, rope_theta, q_data_type, kv_data_type, o_data_type, non_blocking, prefix_len_ptr,
            token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr, fixed_split_size, disable_split_kv,
            seq_lens, seq_lens_q, max_token_per_sequence, max_sequence_kv, v_indptr, o_indptr,
        )  # fmt: skip
        if self.device < 0:
            if self._graph:
                self._check_graph(p)
                self._fill_graph_buffers(p, 0)
            self._planned = p
            log_wrapper(self, f"{self._op}.plan")
            return
        self._finish(p, p.kv_indptr[:-1], None, non_blocking)
        log_wrapper(self, f"{self._op}.plan")

    begin_forward = plan

    def _prepare(
        self, op: str, qo_indptr: Any, kv_indptr: Any, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
        head_dim_vo: int | None = None, custom_mask: Any = None, packed_custom_mask: Any = None, causal: bool = False,
        pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False, window_left: int = -1,
        logits_soft_cap: float | None = None, sm_scale: float | None = None, rope_scale: float | None = None,
        rope_theta: float | None = None, q_data_type: Any = "float16", kv_data_type: Any = None,
        o_data_type: Any = None, non_blocking: bool = True, prefix_len_ptr: Any = None,
        token_pos_in_items_ptr: Any = None, token_pos_in_items_len: int = 0, max_item_len_ptr: Any = None,
        fixed_split_size: int | None = None, disable_split_kv: bool = False, seq_lens: Any = None,
        seq_lens_q: Any = None, max_token_per_sequence: int | None = None, max_sequence_kv: int | None = None,
        v_indptr: Any = None, o_indptr: Any = None,
    ) -> _RaggedPlan:  # fmt: skip
        refuse(op, v_indptr=v_indptr, o_indptr=o_indptr)
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo = as_sizes(
            op, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_qk if head_dim_vo is None else head_dim_vo,
        )  # fmt: skip
        items = read_multi_item(
            op, prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len, max_item_len_ptr, custom_mask,
            packed_custom_mask,
        )  # fmt: skip
        has_mask = custom_mask is not None or packed_custom_mask is not None or items is not None
        options = read_options(
            op, head_dim_qk, causal, pos_encoding_mode, sm_scale, window_left, logits_soft_cap, rope_scale, rope_theta,
            has_mask,
        )  # fmt: skip
        problem = make_problem(
            op, num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, q_data_type, kv_data_type, o_data_type, options,
            False, has_mask, self.device < 0, self._lowered, backend=self._backend,
        )  # fmt: skip
        hints = {n: x for n, x in (("seq_lens", seq_lens), ("seq_lens_q", seq_lens_q)) if x is not None}
        read = read_ints(op, {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr, **hints})
        qo, kv = read["qo_indptr"], read["kv_indptr"]
        kv_len = check_offsets(op, "kv_indptr", kv)
        if len(kv) != len(qo):
            raise ArgumentError(f"{op}: kv_indptr has {len(kv)} entries, expected {len(qo)} = len(qo_indptr)")
        p = _RaggedPlan(problem, options, qo, kv_len, None)
        p.mask = self._pack_mask(op, p, custom_mask, packed_custom_mask, items)
        if hints or max_token_per_sequence is not None or max_sequence_kv is not None:
            check_hints(op, qo, kv_len, read, max_token_per_sequence, max_sequence_kv)
        p.kv_indptr, p.disable_split = kv, disable_split_kv or not self._splittable
        p.fixed_split = int(fixed_split_size) if fixed_split_size and fixed_split_size > 0 else None
        return p

    def _most_keys(self, p: _RaggedPlan) -> int:
        return int(p.kv_len.max(initial=0))

    def _graph_entries(self, p: Any) -> dict[str, int]:
        batch = self._buffers["kv_indptr_buf"].shape[0] - 1
        if len(p.kv_len) != batch:
            raise PlanError(f"{self._op}.plan: the batch is {len(p.kv_len)}, expected {batch} = len(kv_indptr_buf) - 1")
        return {"qo_indptr_buf": batch + 1, "kv_indptr_buf": batch + 1}

    def _fill_graph_buffers(self, p: Any, stream: int) -> None:
        super()._fill_graph_buffers(p, stream)
        self._fill("qo_indptr_buf", p.qo_indptr, stream)
        self._fill("kv_indptr_buf", p.kv_indptr, stream)

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(float bytes, int bytes) that `plan` with these arguments needs; the wrapper owns the integer part."""
        p = self._prepare(f"{self._op}.workspace_size", *args, **kwargs)
        return (0, 0) if self.device < 0 else self._workspace_size(p, p.kv_indptr[:-1], 0)

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        *args: Any,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        o_scale: float | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        kv_cache_sf: Any = None,
        sinks: Any = None,
        variant_args: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attention of the planned batch; no synchronisation, and no allocation with `out` (and `lse`).

        Parameters
        ----------
        q : array, [qo_indptr[-1], num_qo_heads, head_dim_qk]
        k : array, [kv_indptr[-1], num_kv_heads, head_dim_qk]; v : array, [kv_indptr[-1], num_kv_heads, head_dim_vo]
            HND: ``[num_kv_heads, tokens, dim]``. More tokens than planned are allowed and not read. The Hopper kernel
            takes no negative strides.
        q_scale, k_scale, v_scale : float, or float32 array [heads], optional
            Dequantisation factors: the first two multiply `sm_scale`, the last the output.
        o_scale : float, optional
            Divides the output.
        out, lse, return_lse, enable_pdl, sinks, *args, variant_args
            As in `BatchPrefillWithPagedKVCacheWrapper.run`.

        Returns
        -------
        out, or (out, lse) with `return_lse`

        Raises
        ------
        PlanError, ShapeError, DTypeError, LayoutError, DeviceError, UnsupportedError
        """
        op = f"{self._op}.run"
        p: _RaggedPlan | None = self._planned
        if p is None:
            raise PlanError(f"{op}: plan() must come first")
        refuse(op, kv_cache_sf=kv_cache_sf)
        x = self._query(op, p, q)
        args, scales = self._scales(op, p, x, args, (q_scale, k_scale, v_scale))
        bound = self._bind(op, args, variant_args, x, scales)
        kx, vx = (as_fp8(view(y, op, name), p.problem.kv) for name, y in (("k", k), ("v", v)))
        hnd, tokens = self._layout == "HND", int(p.kv_indptr[-1])
        for name, y, dim in (("k", kx, p.problem.head_dim_qk), ("v", vx, p.problem.head_dim_vo)):
            have = y.shape[1 if hnd else 0] if y.ndim == 3 else tokens
            n, heads = max(have, tokens), p.problem.num_kv_heads
            shape = (heads, n, dim) if hnd else (n, heads, dim)
            check_rows(op, name, y, shape, p.problem.kv, f"= [tokens, num_kv_heads, head_dim] in {self._layout}")
        check_device(op, x, k=kx, v=vx)
        if o_scale is not None:
            if not isinstance(o_scale, (int, float, np.floating)) or not math.isfinite(o_scale) or not o_scale:
                raise ArgumentError(f"{op}: o_scale is {o_scale!r}, expected a finite number that is not 0")
            scales = scales._replace(output=scales.output / o_scale)
        strides: list[Strides] = [(0, y.strides[hnd], y.strides[not hnd]) for y in (kx, vx)]
        return self._run(
            op, p, x, kx, vx, strides[0], strides[1], scales, out, lse, return_lse, enable_pdl,
            sinks, 1, 0, bound, kx.shape[hnd],
        )  # fmt: skip

    run_return_lse = partialmethod(run, return_lse=True)

    def _reference(self, p: _RaggedPlan, q: Ints, k: Ints, v: Ints, **options: Any) -> tuple[Ints, Any]:
        if self._layout == "HND":
            k, v = k.swapaxes(0, 1), v.swapaxes(0, 1)
        return reference.attention.batch_prefill_ragged(q, k, v, p.qo_indptr, p.kv_indptr, **options)

    def forward(
        self, q: Any, k: Any, v: Any, causal: bool = False, pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False, window_left: int = -1, logits_soft_cap: float | None = None,
        sm_scale: float | None = None, rope_scale: float | None = None, rope_theta: float | None = None, *,
        return_lse: bool = False,
    ) -> Any:  # fmt: skip
        """Deprecated form of `run`. Options that differ from the plan raise `PlanError` instead of being ignored."""
        self._check_forward(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, k, v, return_lse=return_lse)

    forward_return_lse = partialmethod(forward, return_lse=True)
