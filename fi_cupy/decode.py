"""Decode attention: one query token a request over a paged KV cache (plan/run wrappers), or over contiguous keys."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partialmethod
from typing import Any

from fi_cupy.choice_log import log_wrapper
from fi_cupy.customize import single_decode_with_kv_cache_with_jit_module
from fi_cupy.decode_call import DecodeCalls
from fi_cupy.decode_fallback import prefill_plan
from fi_cupy.decode_kernel import Problem, kernel_specs
from fi_cupy.decode_plan import Buffers, Planned, keep_on_host, prepare
from fi_cupy.decode_single import single_decode_with_kv_cache
from fi_cupy.dtypes import FP8_TYPES
from fi_cupy.errors import ArgumentError, PlanError, UnsupportedError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.kv_cache import check_layout
from fi_cupy.mla import BatchDecodeMlaWithPagedKVCacheWrapper
from fi_cupy.prefill_plan import check_backend
from fi_cupy.variants import AttentionVariant, variant_of
from fi_cupy.workspace import PlanBuffer

__all__ = [
    "BatchDecodeMlaWithPagedKVCacheWrapper", "BatchDecodeWithPagedKVCacheWrapper", "BatchDecodeWrapper",
    "CUDAGraphBatchDecodeWithPagedKVCacheWrapper",
    "fast_decode_plan", "kernel_specs", "single_decode_with_kv_cache", "single_decode_with_kv_cache_with_jit_module",
]  # fmt: skip

_OP = "BatchDecodeWithPagedKVCacheWrapper"


class BatchDecodeWithPagedKVCacheWrapper(DecodeCalls):
    """Batch decode attention over a paged KV cache: `plan` once for the lengths of a step, `run` for every layer.

    Parameters
    ----------
    float_workspace_buffer : array
        Scratch memory for the partial results of split requests, of any dtype, contiguous. Its device decides where
        the wrapper works: a CPU array selects the NumPy reference. 32 MB serve any batch of ordinary size;
        `workspace_size` gives the exact figure, and a buffer that is too small raises `WorkspaceError` at `plan`.
    kv_layout : "NHD" or "HND"
        Cache ``[pages, (2,) page_size, heads, dim]`` or ``[pages, (2,) heads, page_size, dim]``.
    use_cuda_graph : bool
        Keep every address and the grid fixed so that a captured `run` follows later plans. The batch size is that of
        `paged_kv_last_page_len_buffer`; lengths may change freely within ``len(paged_kv_indices_buffer)`` pages.
    use_tensor_cores : bool
        Accepted and returned by the property. There is one kernel, which always uses the tensor cores.
    paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer : int32 arrays
        CUDA-graph mode: `plan` copies the page table into them. If the first plan gets its indices as a host array (or
        an array other than the buffer), the captured kernel reads the wrapper's own copy, so page numbers that are
        later written into the buffer take effect at the next `plan`.
    backend : "auto" or "fa2"
        There is one implementation.
    jit_args : tuple, optional
        A variant in FlashInfer's form: the arguments of ``gen_customize_batch_decode_module``.
    variant : AttentionVariant, optional
        See `fi_cupy.jit.define_variant`. Runs in the prefill kernel: the cache has the type of q.
    workspace_buffer : array, optional
        Another name of `float_workspace_buffer`.

    Source
    ------
    flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper; split keys as in Flash-Decoding (Dao et al. 2023).

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.decode.BatchDecodeWithPagedKVCacheWrapper(np.empty(1 << 20, np.uint8))
    >>> wrapper.plan([0, 2], [5, 1], [3], 8, 2, 64, 16, q_data_type="float32")        # one request, 16 + 3 keys
    >>> q, cache = np.ones((1, 8, 64), np.float32), np.ones((6, 2, 16, 2, 64), np.float32)
    >>> wrapper.run(q, cache).shape
    (1, 8, 64)
    """

    def __init__(
        self,
        float_workspace_buffer: Any = None,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Any = None,
        paged_kv_indices_buffer: Any = None,
        paged_kv_last_page_len_buffer: Any = None,
        backend: str = "auto",
        jit_args: Any = None,
        *,
        workspace_buffer: Any = None,
        variant: AttentionVariant | None = None,
    ) -> None:
        if float_workspace_buffer is None:
            float_workspace_buffer = workspace_buffer
        elif workspace_buffer is not None:
            raise ArgumentError(f"{_OP}: float_workspace_buffer and workspace_buffer name the same thing, expected one")
        if float_workspace_buffer is None:
            raise ArgumentError(f"{_OP}: float_workspace_buffer is missing")
        check_backend(_OP, backend)
        self._layout = check_layout(_OP, kv_layout)
        self._use_tensor_cores = use_tensor_cores
        self._graph = use_cuda_graph
        self._buffers: Buffers | None = None
        self._problem: Problem | None = None
        self._geometry: Any = None
        self._planned: Planned | None = None
        self._plan_buffer: PlanBuffer | None = None
        self._graph_state: tuple[Any, ...] | None = None
        self._attach(float_workspace_buffer)
        if use_cuda_graph:
            self._attach_graph_buffers(paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer)
        self._variant = variant_of(_OP, variant, jit_args, None)
        self._prefill: Any = None  # made when first needed
        self._by_prefill: Any = None  # the same, where the plan runs in the prefill kernel
        self._why_prefill = ""

    @property
    def use_tensor_cores(self) -> bool:
        """What the constructor was given."""
        return self._use_tensor_cores

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another scratch buffer from the next `plan` on. The wrapper owns its integer buffer: pass None for it."""
        super().reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)
        if self._prefill is not None:
            self._prefill.reset_workspace_buffer(float_workspace_buffer)

    def plan(
        self,
        indptr: Any,
        indices: Any,
        last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Any = None,
        seq_lens: Any = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        *,
        window_right: int = 0,
        indptr_host: Any = None,
    ) -> None:
        """Make the schedule for the current lengths and send it to the GPU (one asynchronous copy).

        Parameters
        ----------
        indptr : int [batch + 1]
            Request b has pages ``indices[indptr[b] : indptr[b + 1]]``. Host arrays cost no synchronisation; GPU arrays
            are copied back first, all of a plan's together.
        indices : int32 [pages in use]
            Page numbers. A GPU array is read in place by `run`, so it must stay as it is until then.
        last_page_len : int [batch]
            Keys on each request's last page, 1..page_size.
        num_qo_heads, num_kv_heads, head_dim, page_size : int
            Any group size; head_dim a multiple of 8 up to 256. An fp8 cache with other than multiples of 16 takes the
            prefill kernel.
        pos_encoding_mode : "NONE", "ALIBI" or "ROPE_LLAMA"
            ROPE_LLAMA rotates halves of q and of the (unrotated) cached keys; head_dim a multiple of 16. Others than
            multiples of 32 (fp8: 64) take the prefill kernel.
        window_left : int
            Keys to the left of the newest that are seen; -1: all.
        logits_soft_cap : float, optional
            ``cap * tanh(logit / cap)``; None or <= 0 is off.
        q_data_type, kv_data_type, o_data_type : dtype
            q: float16, bfloat16, or an fp8 type (in the prefill kernel). The cache has the type of q (the default) or
            an fp8 type. o: the type of q, or any float.
        data_type : dtype, optional
            Deprecated: type of q and cache together.
        sm_scale : float, optional
            Default ``1 / sqrt(head_dim)``.
        non_blocking : bool
            False: wait until the schedule has arrived.
        seq_lens : int [batch], optional
            Keys of every request; if given, `last_page_len` is not read back from the GPU.
        fixed_split_size : int, optional
            Pages of every chunk, so that a request's bits do not depend on the rest of the batch.
        disable_split_kv : bool
            One chunk a request, with the same property.
        q_len_per_req : int
            Query tokens of every request, at the end of its keys: ``q [batch * q_len_per_req, ...]``, causal. More than
            one takes the prefill kernel.
        indptr_host : int [batch + 1], optional
            A host copy of a GPU `indptr`.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, WorkspaceError, UnsupportedError, PlanError
        """
        p, kv_len = prepare(
            f"{_OP}.plan", self.device, self._buffers, indptr, indices, last_page_len, num_qo_heads, num_kv_heads,
            head_dim, page_size, pos_encoding_mode, window_left, logits_soft_cap, q_data_type, kv_data_type,
            o_data_type, data_type, sm_scale, rope_scale, rope_theta, non_blocking, block_tables, seq_lens,
            fixed_split_size, disable_split_kv, q_len_per_req, window_right=window_right, indptr_host=indptr_host,
        )  # fmt: skip
        by_prefill, why = self._route(f"{_OP}.plan", p)
        if by_prefill is not None:
            args, options = prefill_plan(p)
            by_prefill.plan(*args, **options, non_blocking=non_blocking)
        elif self.device < 0:
            keep_on_host(f"{_OP}.plan", self._buffers, p)
        else:
            schedule, num_slots = self._schedule(p, kv_len)
            layout = p.geometry.workspace(num_slots)
            layout.check(f"{_OP}.plan", self._workspace_bytes)
            p.partial_out = self._workspace.ptr + layout.offsets["partial_out"]
            p.partial_md = self._workspace.ptr + layout.offsets["partial_md"]
            p.kernel = load_kernel(p.geometry.spec, self.device)
            self._upload(p, schedule, num_slots)
            if not non_blocking:
                from cupy.cuda import runtime

                runtime.streamSynchronize(self._workspace.stream())
        self._planned, self._by_prefill, self._why_prefill = p, by_prefill, why
        log_wrapper(self, f"{_OP}.plan")

    begin_forward = plan

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(float bytes, int bytes) that `plan` with these arguments needs; the wrapper owns the integer part.

        The arguments are those of `plan`. Nothing is sent to the GPU.
        """
        p, kv_len = prepare(f"{_OP}.workspace_size", self.device, self._buffers, *args, **kwargs)
        if self.device < 0:
            return 0, 0
        by_prefill, _ = self._route(f"{_OP}.workspace_size", p)
        if by_prefill is not None:
            plan_args, options = prefill_plan(p)
            size: tuple[int, int] = by_prefill.workspace_size(*plan_args, **options)
            return size
        schedule, num_slots = self._schedule(p, kv_len)
        int_bytes = schedule.items.nbytes + 4 * int(p.indptr[-1]) + 4 * num_slots * p.geometry.num_head_blocks
        return p.geometry.workspace(num_slots).size, int_bytes

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
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
        variant_args: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attention of the planned batch; no synchronisation, and no allocation with `out` (and `lse`).

        Parameters
        ----------
        q : array, [batch * q_len_per_req, num_qo_heads, head_dim]
            Rows and heads may be strided.
        paged_kv_cache : array, or (keys, values)
            ``[pages, 2, page_size, num_kv_heads, head_dim]`` (NHD) or ``[pages, 2, num_kv_heads, page_size, head_dim]``
            (HND), or a pair without dimension 1; any strides that are multiples of 16 bytes, inner stride 1.
        q_scale, k_scale, v_scale : float, or float32 array [heads], optional
            Dequantisation factors: the first two multiply `sm_scale`, the last the output. An array (of query heads, kv
            heads, kv heads) holds one a head.
        out : array, [rows of q, num_qo_heads, head_dim], optional
        lse : float32 array, [rows of q, num_qo_heads], contiguous, optional
            Log-sum-exp of the scaled logits in base 2; -inf for a request without keys (whose output is 0).
        return_lse : bool
        enable_pdl : bool, optional
            Programmatic dependent launch; None: where the device has it. It does not change results.
        window_left : int, optional
            Must be the planned one.
        sinks : float32 array, [num_qo_heads], optional
            Raw logits that join the denominator.
        q_len_per_req : int, optional
            Must be the planned one.
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
        p = self._planned
        if p is None:
            raise PlanError(f"{_OP}.run: plan() must come first")
        op = f"{_OP}.run"
        if self._variant is None and p.dtype in FP8_TYPES and len(args) == 3:
            if any(s is not None for s in (q_scale, k_scale, v_scale)):
                raise ArgumentError(f"{op}: scales are given by position and by name, expected one of the two")
            (q_scale, k_scale, v_scale), args = args, ()
        if self._variant is None and (args or variant_args):
            raise UnsupportedError(f"{op}: extra arguments belong to a variant; give one to the constructor (variant=)")
        if skip_softmax_threshold_scale_factor is not None or kv_cache_sf is not None:
            raise UnsupportedError(f"{op}: skip_softmax_threshold_scale_factor and kv_cache_sf are not supported")
        if q_len_per_req not in (None, p.q_len_per_req):
            raise PlanError(
                f"{op}: q_len_per_req is {q_len_per_req}, planned {p.q_len_per_req}; pass it to plan()"
            )  # fmt: skip
        if window_left is not None and max(window_left, -1) != p.window_left:
            raise PlanError(f"{op}: window_left is {window_left}, planned {p.window_left}; pass it to plan()")
        if self._by_prefill is not None:
            return self._by_prefill.run(
                q, paged_kv_cache, *args, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, out=out, lse=lse,
                return_lse=return_lse, enable_pdl=enable_pdl, sinks=sinks, variant_args=variant_args,
            )  # fmt: skip
        c = self._checked(op, p, q, paged_kv_cache, q_scale, k_scale, v_scale, out, lse, return_lse, sinks)
        if c.x.is_cpu:
            self._run_cpu(p, c)
        else:
            kernel = load_kernel(p.geometry.heads_spec, self.device) if c.scales.on_logits else p.kernel
            kernel.launch(
                p.grid, c.x.stream(), *self._values(p, c), *p.turns, pdl=enable_pdl
            )  # fmt: skip
        return c.result(out, lse, return_lse)

    run_return_lse = partialmethod(run, return_lse=True)

    def forward(
        self, q: Any, paged_kv_cache: Any, pos_encoding_mode: str = "NONE", q_scale: Any = None,
        k_scale: Any = None, v_scale: Any = None, window_left: int = -1,
        logits_soft_cap: float | None = None, sm_scale: float | None = None, rope_scale: float | None = None,
        rope_theta: float | None = None, *, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        """Deprecated form of `run`. Options that differ from the plan raise `PlanError` instead of being ignored."""
        p = self._planned
        if p is None:
            raise PlanError(f"{_OP}.forward: plan() must come first")
        given = {
            "pos_encoding_mode": (pos_encoding_mode, "NONE", p.options["pos_encoding_mode"]),
            "window_left": (max(window_left, -1), -1, p.window_left),
            "logits_soft_cap": (max(logits_soft_cap or 0.0, 0.0), 0.0, p.logits_soft_cap),
            "sm_scale": (sm_scale, None, p.sm_scale),
            "rope_scale": (rope_scale, None, p.options["rope_scale"]),
            "rope_theta": (rope_theta, None, p.options["rope_theta"]),
        }
        for name, (value, default, planned) in given.items():
            if value not in (default, planned):
                raise PlanError(f"{_OP}.forward: {name} is {value}, planned {planned}; pass it to plan()")
        return self.run(q, paged_kv_cache, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, return_lse=return_lse)

    forward_return_lse = partialmethod(forward, return_lse=True)


BatchDecodeWrapper = BatchDecodeWithPagedKVCacheWrapper


class CUDAGraphBatchDecodeWithPagedKVCacheWrapper(BatchDecodeWithPagedKVCacheWrapper):
    """`BatchDecodeWithPagedKVCacheWrapper` in CUDA-graph mode; the batch size is ``len(last_page_len_buffer)``.

    Source: flashinfer.decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper.
    """

    def __init__(
        self,
        workspace_buffer: Any,
        indptr_buffer: Any,
        indices_buffer: Any,
        last_page_len_buffer: Any,
        kv_layout: str = "NHD",
        use_tensor_cores: bool = False,
    ) -> None:
        super().__init__(
            workspace_buffer, kv_layout, True, use_tensor_cores, indptr_buffer, indices_buffer, last_page_len_buffer
        )


def fast_decode_plan(
    self: BatchDecodeWithPagedKVCacheWrapper,
    *args: Any,
    global_override_indptr_cpu: Any = None,
    **kwargs: Any,
) -> None:
    """`plan` without reading `indptr` back; bind it as ``wrapper.plan = partial(fast_decode_plan, wrapper)``.

    Parameters
    ----------
    self : BatchDecodeWithPagedKVCacheWrapper
    *args, **kwargs
        The arguments of `plan`.
    global_override_indptr_cpu : int [batch + 1], optional
        Host copy of `indptr`. With ``page_size`` 1 or `seq_lens` on the host nothing at all is read back.

    Source
    ------
    flashinfer.decode.fast_decode_plan.
    """
    BatchDecodeWithPagedKVCacheWrapper.plan(self, *args, indptr_host=global_override_indptr_cpu, **kwargs)
