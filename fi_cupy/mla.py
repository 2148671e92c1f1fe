"""Multi-head latent attention (DeepSeek) over a paged compressed cache, with the projections absorbed.

``out = softmax(mask(sm_scale * (q_nope ckv^T + q_pe kpe^T))) ckv``: all query heads share the cache's one head, whose
first part is keys and values at once. The CPU runs the NumPy reference. Prefill without absorption (head dims 192 and
128) is `fi_cupy.prefill.BatchPrefillWithRaggedKVCacheWrapper`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partialmethod
from typing import Any

import numpy as np

from fi_cupy.arrays import view
from fi_cupy.checks import check_dtype, check_ndim, check_shape
from fi_cupy.choice_log import log_wrapper
from fi_cupy.decode_kernel import check_rope
from fi_cupy.dtypes import FP8_TYPES, INDEX_TYPES, int32
from fi_cupy.errors import ArgumentError, PlanError, UnsupportedError
from fi_cupy.mla_batch import BatchMla, MlaPlanned, check_variant, read_fp8_scales
from fi_cupy.mla_kernel import KPE, kernel_specs
from fi_cupy.plan.decode import page_lengths
from fi_cupy.prefill_plan import Ints, Options, refuse
from fi_cupy.scales import Scales
from fi_cupy.variants import AttentionVariant, variant_of

__all__ = ["BatchDecodeMlaWithPagedKVCacheWrapper", "BatchMLAPagedAttentionWrapper", "kernel_specs"]


class BatchMLAPagedAttentionWrapper(BatchMla):
    """Latent attention of a ragged batch over a paged cache: decode, chunks and causal prefill with absorption.

    Parameters
    ----------
    float_workspace_buffer : array
        Scratch memory for the partial results of split rows, of any dtype, contiguous. Its device decides where the
        wrapper works: a CPU array selects the NumPy reference. 128 MB serve any batch; `workspace_size` gives the exact
        figure, and a buffer that is too small raises `WorkspaceError` at `plan`.
    use_cuda_graph : bool
        Keep every address and the grid fixed so that a captured `run` follows later plans. The batch size is that of
        `kv_len_arr`; no later plan may have more query rows than the first.
    qo_indptr, kv_indptr, kv_indices, kv_len_arr : int32 arrays
        CUDA-graph mode: `plan` copies its arguments into them; the kernel reads the indices there.
    backend : "auto", "fa2" (the portable kernel), "fa3" (the Hopper kernel) or "cutlass"
        "cutlass": FlashInfer's form without `plan`; `run` takes `kv_len` and `page_table`, and the scale is
        ``1 / sqrt(128 + 64)``.
    variant : AttentionVariant, optional
        `score_fn` and `mask_fn` of `fi_cupy.jit.define_variant`; the kv head is 0. `causal` counts, not its
        `mask_mode`.

    Source
    ------
    flashinfer.mla.BatchMLAPagedAttentionWrapper; DeepSeek-V2 (2024).

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.mla.BatchMLAPagedAttentionWrapper(np.empty(1 << 20, np.uint8))
    >>> wrapper.plan([0, 1], [0, 2], [5, 1], [19], 16, 512, 64, 16, False, 192**-0.5, "float32", "float32")
    >>> q_nope, q_pe = np.ones((1, 16, 512), np.float32), np.ones((1, 16, 64), np.float32)
    >>> wrapper.run(q_nope, q_pe, np.ones((6, 16, 512), np.float32), np.ones((6, 16, 64), np.float32)).shape
    (1, 16, 512)
    """

    _op = "BatchMLAPagedAttentionWrapper"
    _names = _arguments = ("qo_indptr", "kv_indptr", "kv_indices", "kv_len_arr")

    def __init__(
        self,
        float_workspace_buffer: Any,
        use_cuda_graph: bool = False,
        qo_indptr: Any = None,
        kv_indptr: Any = None,
        kv_indices: Any = None,
        kv_len_arr: Any = None,
        backend: str = "auto",
        *,
        variant: AttentionVariant | None = None,
    ) -> None:
        variant = variant_of(self._op, variant, None, None)
        check_variant(self._op, variant)
        self._plans_itself = backend == "cutlass"
        if self._plans_itself and use_cuda_graph:
            raise UnsupportedError(
                f"{self._op}: backend is 'cutlass', whose lengths come with each run, which a CUDA graph cannot "
                "follow; use 'auto' and plan()"
            )
        buffers = {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_indices": kv_indices, "kv_len_arr": kv_len_arr}
        super().__init__(
            float_workspace_buffer, use_cuda_graph, {name: (x, int32) for name, x in buffers.items()}, variant,
            "auto" if self._plans_itself else backend,
        )  # fmt: skip

    def plan(
        self,
        qo_indptr: Any,
        kv_indptr: Any,
        kv_indices: Any,
        kv_len_arr: Any,
        num_heads: int,
        head_dim_ckv: int,
        head_dim_kpe: int,
        page_size: int,
        causal: bool,
        sm_scale: float,
        q_data_type: Any,
        kv_data_type: Any,
        use_profiler: bool = False,
    ) -> None:
        """Make the schedule for the current lengths and send it to the GPU (one asynchronous copy).

        Parameters
        ----------
        qo_indptr : int [batch + 1]
            Request b has rows ``q[qo_indptr[b] : qo_indptr[b + 1]]``: one for decoding. Host arrays cost no
            synchronisation; GPU arrays are copied back first, all of a plan's together.
        kv_indptr : int [batch + 1]
            Request b has pages ``kv_indices[kv_indptr[b] : kv_indptr[b + 1]]``, at least as many as its keys need.
        kv_indices : int32 [pages in use, or more]
            Page numbers. A GPU array is read in place by `run`, so it must stay as it is until then.
        kv_len_arr : int [batch]
            Keys of every request, those of its own queries among them; 0 is legal. What lies behind them in the last
            page is not read.
        num_heads : int
            Query heads, any number.
        head_dim_ckv, head_dim_kpe : int
            512 and 64 on the GPU.
        page_size : int
            Any.
        causal : bool
            Query i sees keys up to ``kv_len - qo_len + i``.
        sm_scale : float
            ``1 / sqrt(128 + 64)`` for DeepSeek: of the head dim before absorption.
        q_data_type, kv_data_type : dtype
            q: float16 or bfloat16 (the CPU takes float32 too). Caches: that of q, or an fp8 type.
        use_profiler : bool
            Not supported.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, WorkspaceError, UnsupportedError, PlanError
        """
        op = f"{self._op}.plan"
        p = self._prepare(
            op, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal,
            sm_scale, q_data_type, kv_data_type, use_profiler,
        )  # fmt: skip
        self._plan_mla(p)
        log_wrapper(self, op)

    def _prepare(
        self, op: str, qo_indptr: Any, kv_indptr: Any, kv_indices: Any, kv_len_arr: Any, num_heads: int,
        head_dim_ckv: int, head_dim_kpe: int, page_size: int, causal: bool, sm_scale: float, q_data_type: Any,
        kv_data_type: Any, use_profiler: bool = False,
    ) -> MlaPlanned:  # fmt: skip
        refuse(op, use_profiler=use_profiler)
        options = Options(bool(causal), -1, 0.0, float(sm_scale), "NONE", None, None)
        return self._prepare_mla(
            op, qo_indptr, kv_indptr, kv_indices, kv_len_arr, num_heads, (head_dim_ckv, head_dim_kpe), page_size,
            options, q_data_type, kv_data_type,
        )  # fmt: skip

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(float bytes, int bytes) that `plan` with these arguments needs; the wrapper owns the integer part."""
        p = self._prepare(f"{self._op}.workspace_size", *args, **kwargs)
        return (0, 0) if self.device < 0 else self._workspace_size(p, p.indptr[:-1], int(p.indptr[-1]))

    def run(
        self,
        q_nope: Any,
        q_pe: Any,
        ckv_cache: Any,
        kpe_cache: Any,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        profiler_buffer: Any = None,
        kv_len: Any = None,
        page_table: Any = None,
        return_lse_base_on_e: bool = False,
        o_scale: float | None = None,
        *,
        ckv_scale: float | None = None,
        ckv_scale_arr: Any = None,
        kpe_scale: float | None = None,
        enable_pdl: bool | None = None,
        variant_args: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attention of the planned batch; no synchronisation, and no allocation with `out` (and `lse`).

        Parameters
        ----------
        q_nope : array, [qo_indptr[-1], num_heads, 512]
            Queries with the key projection absorbed.
        q_pe : array, [qo_indptr[-1], num_heads, 64]
            Rotated queries. Rows and heads of both may be strided (multiples of 16 bytes). CUDA-graph mode takes more
            rows, too; those past ``qo_indptr[-1]`` are neither read nor written.
        ckv_cache, kpe_cache : arrays, [pages, page_size, 512] and [pages, page_size, 64]
            Pages and tokens may be strided (multiples of 16 bytes): slices of one cache of 576 columns will do. fp8 may
            come as uint8.
        out : array, [rows, num_heads, 512], optional
            Of the type of q, or of an fp8 type.
        lse : float32 array, [rows, num_heads], contiguous, optional
            Log-sum-exp of the scaled logits; -inf for rows that see no key (whose output is 0).
        return_lse : bool
        profiler_buffer : None
            Not supported.
        kv_len, page_table : int [batch], int32 [batch, pages]
            With backend "cutlass" alone, which has no `plan`: keys of each request, and its page numbers.
        return_lse_base_on_e : bool
            The lse in base e instead of 2.
        o_scale : float, optional
            fp8 output: a value is what is stored times this.
        ckv_scale, kpe_scale : float, optional
            fp8 caches: a value is what is stored times this. Such caches need kpe_scale and one of ckv_scale and:
        ckv_scale_arr : float32 array, [pages, page_size, 4], contiguous, optional
            A factor for each 128 columns of a token instead of ckv_scale. Products are of the rounded scaled values.
        enable_pdl : bool, optional
            Programmatic dependent launch; None: where the device has it. It does not change results.
        variant_args : mapping, optional
            The variant's tensors and scalars by name.

        Returns
        -------
        out, or (out, lse) with `return_lse`

        Raises
        ------
        PlanError
            No plan, or an argument that contradicts it.
        ArgumentError, ShapeError, DTypeError, LayoutError, DeviceError, UnsupportedError
        """
        op = f"{self._op}.run"
        refuse(op, profiler_buffer=profiler_buffer)
        if self._plans_itself:
            self._plan_for_run(op, q_nope, ckv_cache, kpe_cache, kv_len, page_table)
        elif kv_len is not None or page_table is not None:
            name = "kv_len" if kv_len is not None else "page_table"
            raise ArgumentError(f"{op}: {name} belongs to backend='cutlass'; plan() has the lengths and pages here")
        p: MlaPlanned | None = self._planned
        if p is None:
            raise PlanError(f"{op}: plan() must come first")
        q = self._queries(op, p, q_nope, q_pe)
        caches = self._caches(op, p, q[0], {"ckv_cache": ckv_cache, "kpe_cache": kpe_cache})
        outputs = self._outputs(op, q[0], out, lse, return_lse)
        scales, pe_ratio, token_scales = read_fp8_scales(
            op, p, caches, ckv_scale, ckv_scale_arr, kpe_scale, o_scale, outputs.o.dtype in FP8_TYPES
        )
        self._run_mla(
            op, p, q, caches, outputs, return_lse_base_on_e, scales, pe_ratio, token_scales, enable_pdl, variant_args
        )
        return outputs.result(out, lse, return_lse)

    run_return_lse = partialmethod(run, return_lse=True)

    def _plan_for_run(self, op: str, q_nope: Any, ckv_cache: Any, kpe_cache: Any, kv_len: Any, page_table: Any) -> None:
        """The plan of a run that brings its lengths: one query token a request, as FlashInfer's CUTLASS kernel."""
        if kv_len is None or page_table is None:
            raise ArgumentError(f"{op}: backend='cutlass' needs kv_len and page_table")
        q, ckv, kpe = view(q_nope, op, "q_nope"), view(ckv_cache, op, "ckv_cache"), view(kpe_cache, op, "kpe_cache")
        check_ndim(op, "q_nope", q, 3)
        check_ndim(op, "ckv_cache", ckv, 3)
        check_ndim(op, "kpe_cache", kpe, 3)
        table = view(page_table, op, "page_table")
        check_ndim(op, "page_table", table, 2)
        check_dtype(op, "page_table", table, INDEX_TYPES)
        batch, pages = table.shape
        check_shape(op, "q_nope", q, (batch, *q.shape[1:]), "= page_table.shape[:1] + (num_heads, 512)")
        self.plan(
            np.arange(batch + 1), np.arange(batch + 1) * pages, page_table.reshape(-1), kv_len, q.shape[1], q.shape[2],
            kpe.shape[2], ckv.shape[1], False, 1.0 / math.sqrt(128 + 64), q.dtype, ckv.dtype,
        )  # fmt: skip


class BatchDecodeMlaWithPagedKVCacheWrapper(BatchMla):
    """The older interface to latent decode attention: one query token a request, lengths as the keys on the last page.

    Parameters
    ----------
    float_workspace_buffer : array
        As in `BatchMLAPagedAttentionWrapper`.
    use_cuda_graph : bool
        The batch size is that of `paged_kv_last_page_len_buffer`.
    use_tensor_cores : bool
        Accepted and returned by the property; the kernels always use them.
    paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer : int32 arrays
        CUDA-graph mode: `plan` copies the page table into them.

    Source
    ------
    flashinfer.decode.BatchDecodeMlaWithPagedKVCacheWrapper.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.decode.BatchDecodeMlaWithPagedKVCacheWrapper(np.empty(1 << 20, np.uint8))
    >>> wrapper.plan([0, 2], [5, 1], [3], 16, 512, 16, 192**-0.5, data_type="float32")
    >>> q_nope, q_pe = np.ones((1, 16, 512), np.float32), np.ones((1, 16, 64), np.float32)
    >>> wrapper.run(q_nope, q_pe, np.ones((6, 16, 512), np.float32), np.ones((6, 16, 64), np.float32)).shape
    (1, 16, 512)
    """

    _op = "BatchDecodeMlaWithPagedKVCacheWrapper"
    _names = ("", "paged_kv_indptr_buffer", "paged_kv_indices_buffer", "paged_kv_last_page_len_buffer")
    _arguments = ("qo_indptr", "indptr", "indices", "last_page_len")

    def __init__(
        self,
        float_workspace_buffer: Any,
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Any = None,
        paged_kv_indices_buffer: Any = None,
        paged_kv_last_page_len_buffer: Any = None,
    ) -> None:
        self._use_tensor_cores = use_tensor_cores
        buffers = dict(
            zip(
                self._names[1:],
                (paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer),
                strict=True,
            )
        )
        super().__init__(float_workspace_buffer, use_cuda_graph, {name: (x, int32) for name, x in buffers.items()})

    @property
    def use_tensor_cores(self) -> bool:
        """What the constructor was given."""
        return self._use_tensor_cores

    def plan(
        self,
        indptr: Any,
        indices: Any,
        last_page_len: Any,
        num_qo_heads: int,
        head_dim_compressed_kv: int,
        page_size: int,
        sm_scale: float,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        data_type: Any = "float16",
        q_data_type: Any = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> None:
        """Make the schedule for the current lengths and send it to the GPU.

        Parameters
        ----------
        indptr : int [batch + 1]
            Request b has pages ``indices[indptr[b] : indptr[b + 1]]``.
        indices : int32 [pages in use]
            Page numbers. A GPU array is read in place by `run`.
        last_page_len : int [batch]
            Keys on each request's last page, 1..page_size.
        num_qo_heads, head_dim_compressed_kv, page_size : int
            Any number of heads; 512 on the GPU; any page size.
        sm_scale : float
            ``1 / sqrt(qk_nope_head_dim + qk_rope_head_dim)``.
        window_left : int
            Keys to the left of the newest that are seen; -1: all.
        logits_soft_cap : float, optional
            ``cap * tanh(logit / cap)``; None or <= 0 is off.
        data_type, q_data_type : dtype
            Of the caches, and of q (default: the same; float16 with fp8 caches).
        rope_scale, rope_theta : float, optional
            If one of them is given, q_pe is rotated to the last key's position and the cached kpe to theirs, feature 2i
            against 2i + 1; the other's default is 1 and 1e4. With neither, both are taken as rotated (FlashInfer's
            kernel computes frequencies and does not apply them).

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, WorkspaceError, UnsupportedError, PlanError
        """
        op = f"{self._op}.plan"
        p = self._prepare(
            op, indptr, indices, last_page_len, num_qo_heads, head_dim_compressed_kv, page_size, sm_scale, window_left,
            logits_soft_cap, data_type, q_data_type, rope_scale, rope_theta,
        )  # fmt: skip
        self._plan_mla(p)
        log_wrapper(self, op)

    def _prepare(
        self, op: str, indptr: Any, indices: Any, last_page_len: Any, num_qo_heads: int, head_dim_compressed_kv: int,
        page_size: int, sm_scale: float, window_left: int = -1, logits_soft_cap: float | None = None,
        data_type: Any = "float16", q_data_type: Any = None, rope_scale: float | None = None,
        rope_theta: float | None = None,
    ) -> MlaPlanned:  # fmt: skip
        rope = rope_scale is not None or rope_theta is not None
        check_rope(op, rope_scale, rope_theta)
        options = Options(
            False, max(int(window_left), -1), max(float(logits_soft_cap or 0.0), 0.0), float(sm_scale),
            "ROPE_LLAMA" if rope else "NONE", rope_scale, rope_theta,
        )  # fmt: skip
        return self._prepare_mla(
            op, None, indptr, indices, last_page_len, num_qo_heads, (head_dim_compressed_kv, KPE), page_size, options,
            data_type if q_data_type is None else q_data_type, data_type,
        )  # fmt: skip

    def _keys(self, op: str, lengths: Ints, pages: Ints, page_size: int) -> Ints:
        indptr = np.concatenate([[0], np.cumsum(pages)])
        return page_lengths(op, indptr, lengths, page_size, int(indptr[-1]), self._arguments[1:])

    def _length_values(self, p: MlaPlanned) -> Ints:
        return np.where(p.kv_len > 0, (p.kv_len - 1) % p.page_size + 1, 0)

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(float bytes, int bytes) that `plan` with these arguments needs; the wrapper owns the integer part."""
        p = self._prepare(f"{self._op}.workspace_size", *args, **kwargs)
        return (0, 0) if self.device < 0 else self._workspace_size(p, p.indptr[:-1], int(p.indptr[-1]))

    def run(
        self,
        q_nope: Any,
        q_pe: Any,
        paged_ckv_cache: Any,
        paged_kpe_cache: Any,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
    ) -> Any:
        """Attention of the planned batch.

        Parameters
        ----------
        q_nope, q_pe : arrays, [batch, num_qo_heads, 512] and [batch, num_qo_heads, 64]
        paged_ckv_cache, paged_kpe_cache : arrays, [pages, page_size, 512] and [pages, page_size, 64]
        q_scale, k_scale, v_scale : float, optional
            Dequantisation factors: the first two multiply `sm_scale`, the last the output.
        out, lse, return_lse, enable_pdl
            As in `BatchMLAPagedAttentionWrapper.run`; the lse is in base 2.

        Returns
        -------
        out, or (out, lse) with `return_lse`

        Raises
        ------
        PlanError, ArgumentError, ShapeError, DTypeError, LayoutError, DeviceError
        """
        op = f"{self._op}.run"
        p: MlaPlanned | None = self._planned
        if p is None:
            raise PlanError(f"{op}: plan() must come first")
        for name, value in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
            if value is not None and not (isinstance(value, (int, float, np.floating)) and math.isfinite(value)):
                raise ArgumentError(f"{op}: {name} is {value!r}, expected a finite number")
        q = self._queries(op, p, q_nope, q_pe)
        caches = self._caches(op, p, q[0], {"paged_ckv_cache": paged_ckv_cache, "paged_kpe_cache": paged_kpe_cache})
        logit = float(1.0 if q_scale is None else q_scale) * float(1.0 if k_scale is None else k_scale)
        scales = Scales(logit, float(1.0 if v_scale is None else v_scale))
        outputs = self._outputs(op, q[0], out, lse, return_lse)
        self._run_mla(op, p, q, caches, outputs, False, scales, 1.0, None, enable_pdl, None)
        return outputs.result(out, lse, return_lse)

    run_return_lse = partialmethod(run, return_lse=True)
