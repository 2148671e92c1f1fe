"""Prefill attention: many query tokens a request, over contiguous keys, a ragged batch, or a paged KV cache.

``out = softmax(mask(cap(sm_scale * q k^T + bias))) v`` on the tensor cores; the CPU runs the NumPy reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partialmethod
from typing import Any

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import View
from fi_cupy.checks import as_sizes
from fi_cupy.choice_log import log_wrapper
from fi_cupy.customize import single_prefill_with_kv_cache_with_jit_module
from fi_cupy.dtypes import float32, int32, uint8
from fi_cupy.errors import ArgumentError, PlanError
from fi_cupy.kv_cache import check_layout, check_paged_kv, paged_kv, token_strides
from fi_cupy.multi_item import read_multi_item
from fi_cupy.page_table import check_gpu_indices, check_hints, read_page_table
from fi_cupy.prefill_batch import BatchPrefill, Planned
from fi_cupy.prefill_kernel import kernel_specs
from fi_cupy.prefill_plan import (
    Ints,
    check_planned,
    make_problem,
    read_options,
    refuse,
)
from fi_cupy.prefill_ragged import BatchPrefillWithRaggedKVCacheWrapper
from fi_cupy.prefill_single import single_prefill_with_kv_cache, single_prefill_with_kv_cache_return_lse
from fi_cupy.variants import AttentionVariant, variant_of
from fi_cupy.workspace import copy_device

__all__ = [
    "BatchPrefillWithPagedKVCacheWrapper", "BatchPrefillWithRaggedKVCacheWrapper", "kernel_specs",
    "single_prefill_with_kv_cache", "single_prefill_with_kv_cache_return_lse",
    "single_prefill_with_kv_cache_with_jit_module",
]  # fmt: skip


_NAMES = ("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len")


class _PagedPlan(Planned):
    page_size: int
    indptr: Ints
    indices: View
    host_indices: np.ndarray[Any, Any] | None
    last_page_len: Ints
    max_index: int


class BatchPrefillWithPagedKVCacheWrapper(BatchPrefill):
    """Attention of a ragged batch of queries over a paged KV cache: `plan` once for a step's lengths, `run` a layer.

    Parameters
    ----------
    float_workspace_buffer : array
        Scratch memory for the partial results of split tiles, of any dtype, contiguous. Its device decides where the
        wrapper works: a CPU array selects the NumPy reference. 64 MB serve any batch; `workspace_size` gives the exact
        figure, and a buffer that is too small raises `WorkspaceError` at `plan`.
    kv_layout : "NHD" or "HND"
        Cache ``[pages, (2,) page_size, heads, dim]`` or ``[pages, (2,) heads, page_size, dim]``.
    use_cuda_graph : bool
        Keep every address and the grid fixed so that a captured `run` follows later plans. The batch size is that of
        `paged_kv_last_page_len_buf`; no later plan may have more query rows than the first.
    qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf, paged_kv_last_page_len_buf : int32 arrays
        CUDA-graph mode: `plan` copies its arguments into them; the kernel reads the indices there.
    custom_mask_buf : uint8 array, mask_indptr_buf : int32 array, optional
        CUDA-graph mode with a custom mask: room for the packed mask and for its offsets.
    backend : "auto", "fa2" (the portable kernel) or "fa3" (the Hopper kernel; UnsupportedError where it does not fit)
        There is one implementation.
    jit_args, jit_kwargs : tuple, mapping, optional
        A variant in FlashInfer's form: the arguments of ``gen_customize_batch_prefill_module`` after `backend`.
    variant : AttentionVariant, optional
        See `fi_cupy.jit.define_variant`. `causal` and the masks given to `plan` count, not its `mask_mode`.

    Source
    ------
    flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper; Dao 2023 (FlashAttention-2).

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.prefill.BatchPrefillWithPagedKVCacheWrapper(np.empty(1 << 20, np.uint8))
    >>> wrapper.plan([0, 7], [0, 2], [5, 1], [3], 8, 2, 64, 16, causal=True, q_data_type="float32")
    >>> q, cache = np.ones((7, 8, 64), np.float32), np.ones((6, 2, 16, 2, 64), np.float32)
    >>> wrapper.run(q, cache).shape                                                     # 7 queries, 16 + 3 keys
    (7, 8, 64)
    """

    _op = "BatchPrefillWithPagedKVCacheWrapper"

    def __init__(
        self,
        float_workspace_buffer: Any,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Any = None,
        paged_kv_indptr_buf: Any = None,
        paged_kv_indices_buf: Any = None,
        paged_kv_last_page_len_buf: Any = None,
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
                "paged_kv_indptr_buf": (paged_kv_indptr_buf, int32),
                "paged_kv_indices_buf": (paged_kv_indices_buf, int32),
                "paged_kv_last_page_len_buf": (paged_kv_last_page_len_buf, int32),
                "custom_mask_buf": (custom_mask_buf, uint8),
                "mask_indptr_buf": (mask_indptr_buf, int32),
            },
            variant_of(self._op, variant, jit_args, jit_kwargs),
            backend,
        )

    def plan(
        self,
        qo_indptr: Any,
        paged_kv_indptr: Any,
        paged_kv_indices: Any,
        paged_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Any = None,
        packed_custom_mask: Any = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
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
        seq_lens: Any = None,
        seq_lens_q: Any = None,
        block_tables: Any = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Make the schedule for the current lengths and send it to the GPU (one asynchronous copy).

        Parameters
        ----------
        qo_indptr : int [batch + 1]
            Request b has rows ``q[qo_indptr[b] : qo_indptr[b + 1]]``. Host arrays cost no synchronisation; GPU arrays
            are copied back first, all of a plan's together.
        paged_kv_indptr : int [batch + 1]
            Request b has pages ``paged_kv_indices[indptr[b] : indptr[b + 1]]``.
        paged_kv_indices : int32 [pages in use]
            Page numbers. A GPU array is read in place by `run`, so it must stay as it is until then.
        paged_kv_last_page_len : int [batch]
            Keys on each request's last page, 1..page_size.
        num_qo_heads, num_kv_heads, head_dim_qk, page_size : int
            Any group size; head dims a multiple of 8 up to 256.
        head_dim_vo : int, optional
            Default `head_dim_qk`.
        custom_mask : bool, optional
            The requests' row-major ``[qo_len, kv_len]`` masks one after the other, True = visible. Replaces `causal`;
            the window still applies; one mask for all heads.
        packed_custom_mask : uint8, optional
            The same in little-endian bits, each request from a byte on.
        causal : bool
            Query i sees keys up to ``kv_len - qo_len + i``. With qo_len > kv_len the first rows see nothing: 0, -inf.
        pos_encoding_mode : "NONE", "ALIBI" or "ROPE_LLAMA"
            ROPE_LLAMA rotates halves of q and of the (unrotated) cached keys; head_dim_qk a multiple of 16.
        use_fp16_qk_reduction : bool
            A hint that FlashInfer takes for speed; products are summed in fp32 here.
        sm_scale : float, optional
            Default ``1 / sqrt(head_dim_qk)``.
        window_left : int
            Keys to the left of the query's own that are seen; -1: all. Applies without `causal` as well.
        logits_soft_cap : float, optional
            ``cap * tanh(logit / cap)``; None or <= 0 is off.
        q_data_type, kv_data_type, o_data_type : dtype
            q: float16, bfloat16 or an fp8 type (the CPU takes float32 too). kv: that of q (the default), or an fp8
            type. o: that of q (the default), or any 16-bit float, fp8 type (saturating) or float32.
        non_blocking : bool
            False: wait until the schedule has arrived.
        prefix_len_ptr : int [batch], optional
            Multi-item scoring: the keys of each request are a prefix of so many tokens, then delimiters and items. A
            token sees the prefix and its own item, causally; a delimiter the prefix alone. Becomes a custom mask of
            ``qo_len * kv_len`` bits, made on the host.
        token_pos_in_items_ptr : int [batch * token_pos_in_items_len], optional
            Position of each token behind the prefix inside its item, 0 for a delimiter; padded a request.
        max_item_len_ptr : int [batch], optional
            Longest item; a hint of FlashInfer's kernels.
        seq_lens : int [batch], optional
            Keys of every request; if given, `paged_kv_last_page_len` is not read back from the GPU.
        seq_lens_q, max_token_per_sequence, max_sequence_kv : optional
            Hints of other backends, which must agree with the offsets.
        fixed_split_size : int, optional
            Pages of every chunk, so that a row's bits do not depend on the rest of the batch.
        disable_split_kv : bool
            One chunk a tile, with the same property.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, WorkspaceError, UnsupportedError, PlanError
        """
        op = f"{self._op}.plan"
        p = self._prepare(
            op, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
            head_dim_qk, page_size, head_dim_vo, custom_mask, packed_custom_mask, causal, pos_encoding_mode,
            use_fp16_qk_reduction, sm_scale, window_left, logits_soft_cap, rope_scale, rope_theta, q_data_type,
            kv_data_type, o_data_type, non_blocking, prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len,
            max_item_len_ptr, seq_lens, seq_lens_q, block_tables, max_token_per_sequence, max_sequence_kv,
            fixed_split_size, disable_split_kv,
        )  # fmt: skip
        if self.device < 0:
            if self._graph:
                self._check_graph(p)
                self._fill_graph_buffers(p, 0)
            self._planned = p
            log_wrapper(self, f"{self._op}.plan")
            return
        own = not self._graph and p.host_indices is not None
        self._finish(p, p.indptr[:-1], p.host_indices if own else None, non_blocking)
        log_wrapper(self, f"{self._op}.plan")

    begin_forward = plan

    def _prepare(
        self, op: str, qo_indptr: Any, kv_indptr: Any, kv_indices: Any, last_page_len: Any, num_qo_heads: int,
        num_kv_heads: int, head_dim_qk: int, page_size: int, head_dim_vo: int | None = None, custom_mask: Any = None,
        packed_custom_mask: Any = None, causal: bool = False, pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False, sm_scale: float | None = None, window_left: int = -1,
        logits_soft_cap: float | None = None, rope_scale: float | None = None, rope_theta: float | None = None,
        q_data_type: Any = "float16", kv_data_type: Any = None, o_data_type: Any = None, non_blocking: bool = True,
        prefix_len_ptr: Any = None, token_pos_in_items_ptr: Any = None, token_pos_in_items_len: int = 0,
        max_item_len_ptr: Any = None, seq_lens: Any = None, seq_lens_q: Any = None, block_tables: Any = None,
        max_token_per_sequence: int | None = None, max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None, disable_split_kv: bool = False,
    ) -> _PagedPlan:  # fmt: skip
        refuse(op, block_tables=block_tables)
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size = as_sizes(
            op, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads, head_dim_qk=head_dim_qk,
            head_dim_vo=head_dim_qk if head_dim_vo is None else head_dim_vo, page_size=page_size,
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
            True, has_mask, self.device < 0, self._lowered, page_size, self._backend,
        )  # fmt: skip
        hints = {} if seq_lens_q is None else {"seq_lens_q": seq_lens_q}
        table, others = read_page_table(
            op, _NAMES, kv_indptr, kv_indices, last_page_len, seq_lens, page_size, qo_indptr=qo_indptr, **hints
        )
        qo, indptr = others["qo_indptr"], table.indptr
        if len(indptr) != len(qo):
            raise ArgumentError(f"{op}: paged_kv_indptr has {len(indptr)} entries, expected {len(qo)} = len(qo_indptr)")
        p = _PagedPlan(problem, options, qo, table.kv_len, None)
        p.mask = self._pack_mask(op, p, custom_mask, packed_custom_mask, items)
        if hints or max_token_per_sequence is not None or max_sequence_kv is not None:
            check_hints(op, qo, p.kv_len, others, max_token_per_sequence, max_sequence_kv)
        p.page_size, p.indptr, p.indices, p.last_page_len = page_size, indptr, table.indices, table.last_page_len
        p.host_indices, p.max_index = table.host_indices, table.max_index
        if p.host_indices is None:
            check_gpu_indices(op, _NAMES[1], table, self._workspace)
        elif self.device < 0:
            p.host_indices = p.host_indices.copy()  # `run` reads them
        p.disable_split = disable_split_kv or not self._splittable
        p.fixed_split = int(fixed_split_size) * page_size if fixed_split_size and fixed_split_size > 0 else None
        return p

    def _most_keys(self, p: _PagedPlan) -> int:
        return self._buffers["paged_kv_indices_buf"].shape[0] * p.page_size

    def _graph_entries(self, p: Any) -> dict[str, int]:
        batch = self._buffers["paged_kv_last_page_len_buf"].shape[0]
        if len(p.kv_len) != batch:
            raise PlanError(f"{self._op}.plan: the batch is {len(p.kv_len)}, expected {batch} = len(last_page_len_buf)")
        return {
            "qo_indptr_buf": batch + 1, "paged_kv_indptr_buf": batch + 1, "paged_kv_last_page_len_buf": batch,
            "paged_kv_indices_buf": int(p.indptr[-1]),
        }  # fmt: skip

    def _fill_graph_buffers(self, p: Any, stream: int) -> None:
        super()._fill_graph_buffers(p, stream)
        self._fill("qo_indptr_buf", p.qo_indptr, stream)
        self._fill("paged_kv_indptr_buf", p.indptr, stream)
        self._fill("paged_kv_last_page_len_buf", p.last_page_len, stream)
        buffer = self._buffers["paged_kv_indices_buf"]
        if p.host_indices is not None:
            self._fill("paged_kv_indices_buf", p.host_indices, stream)
        elif p.indices.ptr != buffer.ptr:
            copy_device(buffer.ptr, p.indices.ptr, 4 * int(p.indptr[-1]), stream, self.device)

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(float bytes, int bytes) that `plan` with these arguments needs; the wrapper owns the integer part."""
        p = self._prepare(f"{self._op}.workspace_size", *args, **kwargs)
        return (0, 0) if self.device < 0 else self._workspace_size(p, p.indptr[:-1], int(p.indptr[-1]))

    def run(
        self,
        q: Any,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Any = None,
        kv_cache_sf: Any = None,
        variant_args: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attention of the planned batch; no synchronisation, and no allocation with `out` (and `lse`).

        Parameters
        ----------
        q : array, [qo_indptr[-1], num_qo_heads, head_dim_qk]
            Rows and heads may be strided (multiples of 16 bytes). CUDA-graph mode takes more rows, too; those past
            ``qo_indptr[-1]`` are neither read nor written.
        paged_kv_cache : array, or (keys, values)
            ``[pages, 2, page_size, num_kv_heads, head_dim]`` (NHD) or ``[pages, 2, num_kv_heads, page_size, head_dim]``
            (HND), or a pair without dimension 1; any strides that are multiples of 16 bytes (8 for fp8 rows that 16
            does not divide), none of them negative in the Hopper kernel, inner stride 1. fp8 may come as uint8.
        q_scale, k_scale, v_scale : float, or float32 array [heads], optional
            Dequantisation factors: the first two multiply `sm_scale`, the last the output. An array (of query heads, kv
            heads, kv heads) holds one a head.
        out : array, [rows of q, num_qo_heads, head_dim_vo], optional
        lse : float32 array, [rows of q, num_qo_heads], contiguous, optional
            Log-sum-exp of the scaled logits in base 2; -inf for rows that see no key (whose output is 0).
        return_lse : bool
        enable_pdl : bool, optional
            Programmatic dependent launch; None: where the device has it. It does not change results.
        window_left : int, optional
            Must be the planned one.
        sinks : float32 array, [num_qo_heads], optional
            Raw logits that join the denominator.
        *args, variant_args : optional
            The variant's tensors and scalars, in the order of their declaration, and by name. With fp8 queries and no
            variant: scale_q, scale_k, scale_v.

        Returns
        -------
        out, or (out, lse) with `return_lse`

        Raises
        ------
        PlanError
            No plan, or an argument that contradicts it.
        ShapeError, DTypeError, LayoutError, DeviceError, UnsupportedError
        """
        op = f"{self._op}.run"
        p: _PagedPlan | None = self._planned
        if p is None:
            raise PlanError(f"{op}: plan() must come first")
        refuse(op, kv_cache_sf=kv_cache_sf)
        if window_left is not None:
            check_planned(op, "window_left", max(window_left, -1), p.options.window_left, p.options.window_left)
        x = self._query(op, p, q)
        args, scales = self._scales(op, p, x, args, (q_scale, k_scale, v_scale))
        bound = self._bind(op, args, variant_args, x, scales)
        kv = paged_kv(op, paged_kv_cache)
        dtype = float32 if x.is_cpu and kv.k.dtype is float32 else p.problem.kv
        heads, layout = p.problem.num_kv_heads, self._layout
        if p.problem.head_dim_qk == p.problem.head_dim_vo:
            kv = check_paged_kv(op, kv, x, dtype, p.page_size, heads, p.problem.head_dim_qk, layout)
        else:
            k = check_paged_kv(op, kv._replace(v=kv.k), x, dtype, p.page_size, heads, p.problem.head_dim_qk, layout).k
            v = check_paged_kv(op, kv._replace(k=kv.v), x, dtype, p.page_size, heads, p.problem.head_dim_vo, layout).v
            kv = kv._replace(k=k, v=v)
        if p.max_index >= kv.k.shape[0]:
            raise ArgumentError(
                f"{op}: paged_kv_indices holds page {p.max_index}, but the cache has {kv.k.shape[0]} pages"
            )
        if self._graph:
            indices = self._buffers["paged_kv_indices_buf"].ptr
        else:
            indices = p.indices.ptr if p.indices_offset is None else p.work.items + p.indices_offset
        return self._run(
            op, p, x, kv.k, kv.v, token_strides(kv.k, layout), token_strides(kv.v, layout),
            scales, out, lse, return_lse, enable_pdl, sinks, p.page_size, indices, bound, kv.k.shape[0],
        )  # fmt: skip

    run_return_lse = partialmethod(run, return_lse=True)

    def _reference(self, p: _PagedPlan, q: Ints, k: Ints, v: Ints, **options: Any) -> tuple[Ints, Any]:
        assert p.host_indices is not None
        return reference.attention.batch_prefill_paged(
            q, k, v, p.qo_indptr, p.indptr, p.host_indices, p.last_page_len, kv_layout=self._layout, **options
        )

    def forward(
        self, q: Any, paged_kv_cache: Any, causal: bool = False, pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False, k_scale: Any = None, v_scale: Any = None,
        window_left: int = -1, logits_soft_cap: float | None = None, sm_scale: float | None = None,
        rope_scale: float | None = None, rope_theta: float | None = None, *, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        """Deprecated form of `run`. Options that differ from the plan raise `PlanError` instead of being ignored."""
        self._check_forward(causal, pos_encoding_mode, window_left, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, paged_kv_cache, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = partialmethod(forward, return_lse=True)
