"""Attention of a batch that mixes prompts, chunks and single tokens over a paged KV cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import view
from fi_cupy.checks import check_shape
from fi_cupy.device import device_info, require_gpu
from fi_cupy.dtypes import float32, uint8
from fi_cupy.errors import ArgumentError, PlanError, UnsupportedError
from fi_cupy.kv_cache import check_layout, check_paged_kv, paged_kv, token_strides
from fi_cupy.plan.prefill import plan_prefill
from fi_cupy.prefill import BatchPrefillWithPagedKVCacheWrapper
from fi_cupy.prefill_kernel import geometry
from fi_cupy.prefill_plan import Ints, host_ints, launch, outputs, refuse

_OP = "BatchAttention"
#: Requests of at most so many packed rows (query tokens times heads a kv head) take tiles of this height.
_NARROW_ROWS = 16
#: First size of the workspace; it grows to what a plan needs.
_FIRST_BYTES = 1 << 20


class _Group(BatchPrefillWithPagedKVCacheWrapper):
    """Those requests of the batch that suit one tile height: their schedule, on the whole batch's q, out and lse."""

    _op = _OP

    def __init__(self, owner: BatchAttention, workspace: Any, kv_layout: str, narrow: bool) -> None:
        super().__init__(workspace, kv_layout)
        self._owner, self.narrow = owner, narrow
        self.requests: Ints = np.zeros(0, np.int64)

    def plan_requests(self, requests: Ints, kv_len: Ints, table: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Make and send the schedule of some requests; `table` and `options` are those of the wrapper's plan."""
        op = f"{_OP}.plan"
        p = self._prepare(op, *table, **options)
        # The lengths come in tokens, and the page table may hold more pages than they need.
        p.kv_len, self.requests = kv_len, requests
        if self.device < 0:
            self._planned = p
        else:
            self._finish(p, p.indptr[:-1], p.host_indices, non_blocking=True)

    def _schedule(self, p: Any, kv_base: Ints) -> tuple[Ints, Ints, int, int]:
        mine = self.requests
        lens = np.diff(p.qo_indptr)[mine]
        group = p.problem.num_qo_heads // p.problem.num_kv_heads
        average = -(-int(lens.sum()) * group // max(len(mine), 1))
        rows = _NARROW_ROWS if self.narrow else min(max(average, _NARROW_ROWS + 1), 128)
        g = p.geometry = geometry(p.problem, rows, device_info(self.device))
        indptr = np.zeros(len(mine) + 1, np.int64)
        np.cumsum(lens, out=indptr[1:])
        schedule = plan_prefill(
            indptr, p.kv_len[mine], kv_base[mine], group=g.group, num_kv_heads=g.num_kv_heads, tile_q=g.tiles.tile_q,
            tile_kv=g.tiles.tile_kv, slots=g.slots, causal=p.options.causal,
        )  # fmt: skip
        first_rows = p.qo_indptr[mine]
        for rows_of in (schedule.items, schedule.merges):  # the first column is the request's first row of q
            rows_of[:, 0] = first_rows[np.searchsorted(indptr, rows_of[:, 0], "right") - 1]
        self._attach(self._owner._grown(g.workspace(schedule.num_slots).size))
        return schedule.items, schedule.merges, schedule.num_slots, 0


class BatchAttention:
    """Attention of a batch that mixes prompts, chunks and single tokens over a paged KV cache, always with the lse.

    Requests are dealt to one or two groups by their number of packed rows (query tokens times query heads a kv head):
    up to 16 rows take the prefill kernel's 16-row tiles, which read keys as fast as decoding does, the others its tall
    ones. A batch of one kind is one launch (two if some tile is split), a mixed one a launch for each group, one after
    the other on the caller's stream. `run` can be captured in a CUDA graph, which then holds this plan: a later `plan`
    may move what it reads, so it needs a new capture.

    Parameters
    ----------
    kv_layout : "NHD" or "HND"
        Cache ``[pages, (2,) page_size, heads, dim]`` or ``[pages, (2,) heads, page_size, dim]``.
    device : str or torch.device
        "cuda", "cuda:<n>", or "cpu" for the NumPy reference. The workspace is the wrapper's own; it is made by torch if
        `plan` gets torch tensors (and so ordered on torch's stream), else by CuPy.

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

    def __init__(self, kv_layout: str = "NHD", device: Any = "cuda") -> None:
        self._layout = check_layout(_OP, kv_layout)
        name, _, index = str(device).partition(":")
        if name not in ("cuda", "cpu") or (index and not index.isdigit()):
            raise ArgumentError(f"{_OP}: device is {device}, expected 'cuda', 'cuda:<n>' or 'cpu'")
        self._on_cpu, self._index = name == "cpu", int(index) if index else None
        self._groups: tuple[_Group, _Group] | None = None
        self._workspace: Any = None
        self._workspace_bytes = 0
        self._kept: list[Any] = []  # outgrown workspaces that queued work may still use
        self._active: tuple[_Group, ...] = ()
        self._pdl: bool | None = None

    def _make_groups(self, like: Any) -> tuple[_Group, _Group]:
        if self._groups is None:
            if self._on_cpu:
                self._workspace = np.zeros(16, np.uint8)
            else:
                require_gpu(_OP)
                self._workspace = _first_workspace(self._index, type(like).__module__.split(".")[0] == "torch")
                self._workspace_bytes = _FIRST_BYTES
            wide, narrow = (_Group(self, self._workspace, self._layout, narrow) for narrow in (False, True))
            self._groups = wide, narrow
        return self._groups

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
        _, qo = host_ints(op, "qo_indptr", qo_indptr)
        _, indptr = host_ints(op, "kv_indptr", kv_indptr)
        v, kv_len = host_ints(op, "kv_len_arr", kv_len_arr)
        batch = max(len(qo) - 1, 0)
        check_shape(op, "kv_len_arr", v, (batch,), "= len(qo_indptr) - 1")
        check_shape(op, "kv_indptr", view(indptr), (len(qo),), "= len(qo_indptr)")
        too_long = (kv_len < 0) | (kv_len > np.diff(indptr) * page_size)
        if too_long.any():
            b = int(np.argmax(too_long))
            raise ArgumentError(
                f"{op}: kv_len_arr[{b}] is {kv_len[b]}, expected 0 to {(indptr[b + 1] - indptr[b]) * page_size} = its "
                "pages * page_size"
            )
        wide, narrow = self._make_groups(qo_indptr)
        table = (qo, indptr, kv_indices, np.full(batch, page_size), num_qo_heads, num_kv_heads, head_dim_qk, page_size)
        options = {
            "head_dim_vo": head_dim_vo, "causal": causal, "sm_scale": sm_scale, "logits_soft_cap": logits_soft_cap,
            "q_data_type": q_data_type, "kv_data_type": kv_data_type,
        }  # fmt: skip
        rows = np.diff(qo) * (num_qo_heads // max(num_kv_heads, 1))
        is_narrow = rows <= _NARROW_ROWS
        groups: list[_Group] = []
        self._active = ()
        for group, mine in ((wide, ~is_narrow & (rows > 0)), (narrow, is_narrow & (rows > 0))):
            if mine.any() or (group is narrow and not groups):
                group.plan_requests(np.flatnonzero(mine), kv_len, table, options)
                groups.append(group)
        self._active = tuple(groups)

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

        Returns
        -------
        (out, lse)
            lse is the base-2 log-sum-exp, -inf for rows that see no key (whose output is 0).

        Raises
        ------
        PlanError, ShapeError, DTypeError, LayoutError, DeviceError, UnsupportedError
        """
        op = f"{_OP}.run"
        if not self._active:
            raise PlanError(f"{op}: plan() must come first")
        refuse(op, profiler_buffer=profiler_buffer, kv_cache_sf=kv_cache_sf)
        first = self._active[0]
        p, layout = first._planned, self._layout
        cap = max(logits_soft_cap or 0.0, 0.0)
        if cap not in (0.0, p.options.logits_soft_cap):
            raise PlanError(f"{op}: logits_soft_cap is {cap}, planned {p.options.logits_soft_cap}; pass it to plan()")
        x = first._query(op, p, q)
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
        _, scales = first._scales(op, p, x, (), (q_scale, k_scale, v_scale))
        if x.is_cpu:
            values, log = reference.attention.batch_prefill_paged(
                x.numpy(), k.numpy(), v.numpy(), p.qo_indptr, p.indptr, p.host_indices, kv_len_arr=p.kv_len,
                kv_layout=layout, sm_scale=p.options.sm_scale * scales.logit, out_dtype=o.dtype.np,
                **scales.reference(), **p.options.reference(),
            )  # fmt: skip
            assert log is not None
            o.write(values)
            s.write(log)
        else:
            for group in self._active:
                p = group._planned
                launch(
                    p.geometry, p.work, x, k, v, token_strides(k, layout), token_strides(v, layout), o, s, p.options,
                    scales, page_size=p.page_size,
                    kv_indices=p.indices.ptr if p.indices_offset is None else p.work.items + p.indices_offset,
                    pdl=group._pdl if enable_pdl is None else bool(enable_pdl),
                )  # fmt: skip
        return (o.result() if out is None else out), (s.result() if lse is None else lse)

    forward = run
    run_return_lse = forward_return_lse = run

    def end_forward(self) -> None:
        """Kept for FlashInfer's signature; there is nothing to release."""

    def _parts(self) -> list[tuple[str, Any]]:
        """What `fi_cupy.attention.explain` looks into."""
        return [
            (f"{len(g.requests)} requests of {'at most' if g.narrow else 'more than'} {_NARROW_ROWS} packed rows", g)
            for g in self._active
        ]


def _first_workspace(index: int | None, for_torch: bool) -> Any:
    if for_torch:
        import torch

        return torch.empty(_FIRST_BYTES, dtype=torch.uint8, device="cuda" if index is None else f"cuda:{index}")
    import cupy

    with cupy.cuda.Device(cupy.cuda.runtime.getDevice() if index is None else index):
        return cupy.empty(_FIRST_BYTES, cupy.uint8)
