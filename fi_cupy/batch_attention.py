"""Attention of a batch that mixes prompts, chunks and single tokens over a paged KV cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from fi_cupy import mixed, reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import as_sizes, check_shape
from fi_cupy.choice_log import log_wrapper
from fi_cupy.decode_kernel import logit_floats
from fi_cupy.device import device_info, require_gpu
from fi_cupy.dtypes import float32, uint8
from fi_cupy.errors import ArgumentError, PlanError, UnsupportedError
from fi_cupy.kv_cache import check_layout, check_paged_kv, paged_kv, token_strides
from fi_cupy.page_table import read_ints
from fi_cupy.plan.decode import TILE
from fi_cupy.plan.mixed import plan_mixed
from fi_cupy.plan.prefill import PrefillPlan
from fi_cupy.prefill import BatchPrefillWithPagedKVCacheWrapper
from fi_cupy.prefill_kernel import fast_div
from fi_cupy.prefill_plan import Ints, Work, launch, launch_values, outputs, refuse
from fi_cupy.scales import Scales
from fi_cupy.variants import AttentionVariant, BoundVariant, variant_of
from fi_cupy.workspace import PlanBuffer

_OP = "BatchAttention"
#: First size of the workspace; it grows to what a plan needs.
_FIRST_BYTES = 1 << 20


class Planned(NamedTuple):
    """What a plan leaves for the mixed kernel."""

    geometry: mixed.Geometry
    tiles: Work
    num_items: int
    items_ptr: int
    indices_ptr: int  # 0: the caller's array is read
    partial_out: int
    partial_md: int
    counters: int  # of the decode items
    queues: int


class _Batch(BatchPrefillWithPagedKVCacheWrapper):
    """The batch as the paged prefill wrapper sees it: its checks, and its one launch where there is no mixed kernel."""

    _op = _OP

    def __init__(self, owner: BatchAttention, workspace: Any, kv_layout: str, variant: AttentionVariant | None) -> None:
        super().__init__(workspace, kv_layout, variant=variant)
        self._owner = owner
        self.both: Planned | None = None

    def plan_batch(self, kv_len: Ints, table: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Make and send the schedule; `table` and `options` are those of the wrapper's plan."""
        p = self._prepare(f"{_OP}.plan", *table, **options)
        p.kv_len = kv_len  # it comes in tokens, and the page table may hold more pages than they need
        self._planned = self.both = None
        if self.device >= 0:
            problem, group = p.problem, p.problem.num_qo_heads // p.problem.num_kv_heads
            part = mixed.Decode(
                problem.num_kv_heads, group, problem.head_dim_qk, problem.dtype, problem.kv, problem.out,
                p.page_size % TILE == 0, problem.soft_cap, False,
            )  # fmt: skip
            # Decode items know no variants.
            both = None if self._variant is not None else mixed.geometry(problem, part, device_info(self.device))
            if both is None or self._apart(p):
                self._finish(p, p.indptr[:-1], p.host_indices, non_blocking=True)
            else:
                self.both = self._plan_both(p, both)
        self._planned = p

    def _apart(self, p: Any) -> bool:
        """Whether the one kernel had better be the Hopper kernel, whose tiles take the decoding requests, too."""
        if self._geometry(p).hopper is None:
            return False
        qo_len = np.diff(p.qo_indptr)
        prompts, o = qo_len > 1, p.options
        operations = mixed.prompt_operations(qo_len[prompts], p.kv_len[prompts], p.problem, o.causal, o.window_left)
        keys = int(p.kv_len[~prompts].sum())
        return mixed.apart_is_faster(
            operations, 2 * keys * p.problem.num_kv_heads * p.problem.head_dim_qk * p.problem.kv.itemsize
        )

    def _schedule(self, p: Any, kv_base: Ints) -> tuple[PrefillPlan, int]:
        schedule, slots = super()._schedule(p, kv_base)
        self._attach(self._owner._grown(p.geometry.workspace(schedule.num_slots, slots).size))
        return schedule, slots

    def _plan_both(self, p: Any, both: mixed.Geometry) -> Planned:
        """Tiles, decode items and page numbers in one copy; counters and queues in front of them."""
        g, d = both.prefill, both.decode
        plan = plan_mixed(
            p.qo_indptr, p.kv_len, p.indptr[:-1], group=g.group, num_kv_heads=g.num_kv_heads, tile_q=g.tiles.tile_q,
            tile_kv=g.tiles.tile_kv, num_head_blocks=d.num_head_blocks, slots=both.slots, causal=p.options.causal,
        )  # fmt: skip
        tiles, items = plan.tiles.items, plan.items.items
        layouts = g.workspace(plan.tiles.num_slots), d.workspace(plan.items.num_slots)
        self._attach(self._owner._grown(layouts[0].size + layouts[1].size))
        both.kernel(p.options.sm_scale, self.device)
        indices = np.zeros(0, np.int32) if p.host_indices is None else p.host_indices
        words = tiles.size + items.size + len(indices)
        tile_counters = plan.tiles.num_slots * g.num_kv_heads
        if self._plan_buffer is None:
            self._plan_buffer = PlanBuffer(self.device, 4 * words)
        buffer = self._plan_buffer
        buffer.reserve(
            4 * words, mixed.QUEUE_WORDS + tile_counters + plan.items.num_slots * d.num_head_blocks
        )  # fmt: skip
        staged = buffer.stage(words)
        np.concatenate([tiles.reshape(-1), items.reshape(-1), indices], out=staged)
        address = buffer.upload(staged, self._workspace.stream())
        counters = buffer.counters_ptr + 4 * mixed.QUEUE_WORDS
        partials = [
            self._workspace.ptr + start + layout.offsets[name]
            for start, layout, name in (
                (0, layouts[0], "partial_o"), (0, layouts[0], "partial_md"),
                (layouts[0].size, layouts[1], "partial_out"), (layouts[0].size, layouts[1], "partial_md"),
            )
        ]  # fmt: skip
        return Planned(
            both, Work(address, len(tiles), plan.tiles.num_split, partials[0], partials[1], counters), len(items),
            address + tiles.nbytes, 0 if p.host_indices is None else address + tiles.nbytes + items.nbytes,
            partials[2], partials[3], counters + 4 * tile_counters, buffer.counters_ptr,
        )  # fmt: skip

    def launch_batch(
        self,
        x: View,
        k: View,
        v: View,
        o: View,
        s: View,
        scales: Scales,
        pdl: bool | None,
        bound: BoundVariant | None,
    ) -> None:
        """Queue the one kernel."""
        p, both = self._planned, self.both
        strides = token_strides(k, self._layout), token_strides(v, self._layout)
        if both is None:
            launch(
                p.geometry, p.work, x, k, v, *strides, o, s, p.options, scales, page_size=p.page_size,
                kv_indices=p.indices.ptr if p.indices_offset is None else p.work.items + p.indices_offset, pdl=pdl,
                kv_extent=k.shape[0], variant_values=() if bound is None else bound.kernel_values(),
            )  # fmt: skip
            return
        indices = both.indices_ptr or p.indices.ptr
        g, d = both.geometry, both.geometry.decode
        scale = p.options.sm_scale * scales.logit
        tiles = launch_values(
            g.prefill, both.tiles, x, k, v, *strides, o, s, p.options, scales, indices, p.page_size, 0, 0
        )
        items = (
            x.ptr, k.ptr, v.ptr, o.ptr, s.ptr, both.items_ptr, indices, 0, both.partial_out, both.partial_md,
            both.counters, x.strides[0], x.strides[1], o.strides[0], o.strides[1], *strides[0], *strides[1],
            *fast_div(p.page_size), d.num_head_blocks, d.blocks_per_kv, d.heads_per_block, d.group_size, 1, 0, 0,
            0, 0, 0, 0, *logit_floats(scale, p.options.logits_soft_cap), scales.output, *scales.kernel_values(),
        )  # fmt: skip
        mixed.launch(
            g, x.device, x.stream(), scale, scales.on_logits, tiles, items, both.queues, both.tiles.num_items,
            g.prefill.num_kv_heads, both.num_items, d.num_head_blocks, pdl,
        )  # fmt: skip


class BatchAttention:
    """Attention of a batch that mixes prompts, chunks and single tokens over a paged KV cache, always with the lse.

    `run` is one launch of persistent CTAs: requests of one query token are decode items, those of more are tiles of
    the prefill kernel, in two queues. Half of the CTAs begin with tiles, the others with decode items, and each goes on
    with what is left, so that reading and computing overlap. The decode items take no variant, and no ``head_dim_vo``
    that differs from ``head_dim_qk``: then every request is tiles, in one launch of the prefill kernel. So it is, on a
    Hopper GPU, where that kernel gains more on the prompts than overlapping would (`fi_cupy.mixed.apart_is_faster`);
    `fi_cupy.attention.explain` says which. `run` can be captured in a CUDA graph, which then holds this plan: a later
    `plan` may move what it reads, so it needs a new capture. One wrapper serves one stream at a time.

    Parameters
    ----------
    kv_layout : "NHD" or "HND"
        Cache ``[pages, (2,) page_size, heads, dim]`` or ``[pages, (2,) heads, page_size, dim]``.
    device : str or torch.device
        "cuda", "cuda:<n>", or "cpu" for the NumPy reference. The workspace is the wrapper's own; it is made by torch if
        `plan` gets torch tensors (and so ordered on torch's stream), else by CuPy.
    variant : AttentionVariant, optional
        See `fi_cupy.jit.define_variant`; one with a softmax, as the lse is always returned.

    Source
    ------
    flashinfer.attention.BatchAttention, which is one persistent kernel.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.BatchAttention(device="cpu")
    >>> wrapper.plan([0, 7, 8], [0, 2, 3], [5, 1, 0], [19, 4], 8, 2, 64, 64, 16, causal=True, q_data_type="float32",
    ...              kv_data_type="float32")                       # 7 queries on 19 keys, and one on 4
    >>> q, cache = np.ones((8, 8, 64), np.float32), np.ones((6, 2, 16, 2, 64), np.float32)
    >>> out, lse = wrapper.run(q, cache)
    >>> out.shape, lse.shape
    ((8, 8, 64), (8, 8))
    """

    def __init__(
        self, kv_layout: str = "NHD", device: Any = "cuda", *, variant: AttentionVariant | None = None
    ) -> None:
        self._layout = check_layout(_OP, kv_layout)
        self._variant: AttentionVariant | None = variant_of(_OP, variant, None, None)
        if self._variant is not None and not self._variant.use_softmax:
            raise ArgumentError(
                f"{_OP}: variant {self._variant.name} has no softmax, and without it there is no lse to return; "
                "BatchPrefillWithPagedKVCacheWrapper takes it"
            )
        name, _, index = str(device).partition(":")
        if name not in ("cuda", "cpu") or (index and not index.isdigit()):
            raise ArgumentError(f"{_OP}: device is {device}, expected 'cuda', 'cuda:<n>' or 'cpu'")
        self._on_cpu, self._index = name == "cpu", int(index) if index else None
        self._batch: _Batch | None = None
        self._workspace: Any = None
        self._workspace_bytes = 0
        self._kept: list[Any] = []  # outgrown workspaces that queued work may still use

    def _made(self, like: Any) -> _Batch:
        """The batch, made at the first plan on the framework of its arguments."""
        if self._batch is None:
            if self._on_cpu:
                self._workspace = np.zeros(16, np.uint8)
            else:
                require_gpu(_OP)
                self._workspace = _first_workspace(self._index, type(like).__module__.split(".")[0] == "torch")
                self._workspace_bytes = _FIRST_BYTES
            self._batch = _Batch(self, self._workspace, self._layout, self._variant)
        return self._batch

    def _grown(self, nbytes: int) -> Any:
        """The workspace, with at least so many bytes."""
        if nbytes > self._workspace_bytes:
            self._kept.append(self._workspace)
            self._workspace_bytes = max(nbytes, 2 * self._workspace_bytes)
            self._workspace = view(self._workspace).empty((self._workspace_bytes,), uint8).result()
        return self._workspace

    def plan(
        self,
        qo_indptr: Any,
        kv_indptr: Any,
        kv_indices: Any,
        kv_len_arr: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        head_dim_vo: int,
        page_size: int,
        causal: bool = False,
        sm_scale: float | None = None,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "bfloat16",
        kv_data_type: Any = "bfloat16",
        use_profiler: bool = False,
    ) -> None:
        """Make the schedule for the current lengths and send it to the GPU.

        Parameters
        ----------
        qo_indptr : int [batch + 1]
            Request b has rows ``q[qo_indptr[b] : qo_indptr[b + 1]]``. Host arrays cost no synchronisation; GPU arrays
            are copied back first.
        kv_indptr : int [batch + 1]
            Request b has pages ``kv_indices[kv_indptr[b] : kv_indptr[b + 1]]``, perhaps more than its keys fill.
        kv_indices : int32 [pages]
            Page numbers. A GPU array is read in place by `run`, so it must stay as it is until then.
        kv_len_arr : int [batch]
            Keys of every request.
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_vo, page_size : int
        causal, sm_scale, q_data_type, kv_data_type
            As in `BatchPrefillWithPagedKVCacheWrapper.plan`.
        logits_soft_cap : float, optional
            ``cap * tanh(logit / cap)``; None or <= 0 is off. `run` may repeat it, but not say another.
        use_profiler : False

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, UnsupportedError, PlanError
        """
        op = f"{_OP}.plan"
        if use_profiler:
            raise UnsupportedError(f"{op}: use_profiler is not supported; Nsight Compute shows the kernels by name")
        (page_size,) = as_sizes(op, page_size=page_size)
        read = read_ints(op, {"qo_indptr": qo_indptr, "kv_indptr": kv_indptr, "kv_len_arr": kv_len_arr})
        qo, indptr, kv_len = read.values()
        batch = max(len(qo) - 1, 0)
        check_shape(op, "kv_len_arr", view(kv_len), (batch,), "= len(qo_indptr) - 1")
        check_shape(op, "kv_indptr", view(indptr), (len(qo),), "= len(qo_indptr)")
        too_long = (kv_len < 0) | (kv_len > np.diff(indptr) * page_size)
        if too_long.any():
            b = int(np.argmax(too_long))
            raise ArgumentError(
                f"{op}: kv_len_arr[{b}] is {kv_len[b]}, expected 0 to {(indptr[b + 1] - indptr[b]) * page_size} = its "
                "pages * page_size"
            )
        table = (qo, indptr, kv_indices, np.full(batch, page_size), num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        options = {
            "head_dim_vo": head_dim_vo, "causal": causal, "sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap,
            "q_data_type": q_data_type, "kv_data_type": kv_data_type,
        }  # fmt: skip
        self._made(qo_indptr).plan_batch(kv_len, table, options)
        log_wrapper(self, f"{_OP}.plan")

    begin_forward = plan

    def run(
        self,
        q: Any,
        kv_cache: Any,
        out: Any = None,
        lse: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        logits_soft_cap: float | None = 0.0,
        profiler_buffer: Any = None,
        kv_cache_sf: Any = None,
        *,
        q_scale: Any = None,
        enable_pdl: bool | None = None,
        variant_args: Mapping[str, Any] | None = None,
    ) -> tuple[Any, Any]:
        """Attention of the planned batch; no synchronisation, and no allocation with `out` and `lse`.

        Parameters
        ----------
        q : array, [qo_indptr[-1], num_qo_heads, head_dim_qk]
        kv_cache : array, or (keys, values)
            See `BatchPrefillWithPagedKVCacheWrapper.run`.
        out : array, [qo_indptr[-1], num_qo_heads, head_dim_vo], optional
        lse : float32 array, [qo_indptr[-1], num_qo_heads], contiguous, optional
        q_scale, k_scale, v_scale : float, or float32 array [heads], optional
            Dequantisation factors: the first two multiply `sm_scale`, the last the output.
        logits_soft_cap : float
            0 or what was planned.
        profiler_buffer, kv_cache_sf : None
        enable_pdl : bool, optional
            As in `BatchPrefillWithPagedKVCacheWrapper.run`.
        variant_args : mapping, optional
            The variant's tensors and scalars by name.

        Returns
        -------
        (out, lse)
            lse is the base-2 log-sum-exp, -inf for rows that see no key (whose output is 0).

        Raises
        ------
        PlanError, ShapeError, DTypeError, LayoutError, DeviceError, UnsupportedError
        """
        op = f"{_OP}.run"
        batch = self._batch
        if batch is None or batch._planned is None:
            raise PlanError(f"{op}: plan() must come first")
        refuse(op, profiler_buffer=profiler_buffer, kv_cache_sf=kv_cache_sf)
        p, layout = batch._planned, self._layout
        cap = max(logits_soft_cap or 0.0, 0.0)
        if cap not in (0.0, p.options.logits_soft_cap):
            raise PlanError(f"{op}: logits_soft_cap is {cap}, planned {p.options.logits_soft_cap}; pass it to plan()")
        x = batch._query(op, p, q)
        _, scales = batch._scales(op, p, x, (), (q_scale, k_scale, v_scale))
        bound = batch._bind(op, (), variant_args, x, scales)
        kv = paged_kv(op, kv_cache)
        dtype = float32 if x.is_cpu and kv.k.dtype is float32 else p.problem.kv
        heads, dims = p.problem.num_kv_heads, (p.problem.head_dim_qk, p.problem.head_dim_vo)
        k = check_paged_kv(op, kv._replace(v=kv.k), x, dtype, p.page_size, heads, dims[0], layout).k
        v = check_paged_kv(op, kv._replace(k=kv.v), x, dtype, p.page_size, heads, dims[1], layout).v
        pages = min(k.shape[0], v.shape[0])
        if p.max_index >= pages:
            raise ArgumentError(f"{op}: kv_indices holds page {p.max_index}, but the cache has {pages} pages")
        o, s = outputs(op, x, out, lse, True, p.problem)
        assert s is not None
        if x.is_cpu:
            values, log = reference.attention.batch_prefill_paged(
                x.numpy(), k.numpy(), v.numpy(), p.qo_indptr, p.indptr, p.host_indices, kv_len_arr=p.kv_len,
                kv_layout=layout, sm_scale=p.options.sm_scale * scales.logit, out_dtype=o.dtype.np, variant=bound,
                params=None if bound is None else bound.params(), **scales.reference(), **p.options.reference(),
            )  # fmt: skip
            assert log is not None
            o.write(values)
            s.write(log)
        else:
            batch.launch_batch(x, k, v, o, s, scales, enable_pdl, bound)
        return (o.result() if out is None else out), (s.result() if lse is None else lse)

    forward = run
    run_return_lse = forward_return_lse = run

    def end_forward(self) -> None:
        """Kept for FlashInfer's signature; there is nothing to release."""


def _first_workspace(index: int | None, for_torch: bool) -> Any:
    if for_torch:
        import torch

        return torch.empty(_FIRST_BYTES, dtype=torch.uint8, device="cuda" if index is None else f"cuda:{index}")
    import cupy

    with cupy.cuda.Device(cupy.cuda.runtime.getDevice() if index is None else index):
        return cupy.empty(_FIRST_BYTES, cupy.uint8)
