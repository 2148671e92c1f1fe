"""The plan side of batch decode: which kernel takes a batch, its work list, and the copy of it on the GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_cupy.checks import check_shape
from fi_cupy.decode_fallback import prefill_wrapper
from fi_cupy.decode_kernel import Geometry, Problem, check_problem, why_not
from fi_cupy.decode_plan import Buffers, Planned, fill_graph_buffers
from fi_cupy.decode_tuning import choose_geometry
from fi_cupy.device import device_info
from fi_cupy.dtypes import int32
from fi_cupy.errors import PlanError
from fi_cupy.page_table import check_gpu_indices
from fi_cupy.plan.decode import ITEM_WORDS, MIN_CHUNK_TILES, TILE, DecodePlan, max_items, plan_decode
from fi_cupy.plan_run import PlanRun
from fi_cupy.prefill_kernel import fast_div
from fi_cupy.variants import AttentionVariant
from fi_cupy.workspace import PlanBuffer, copy_device

_OP = "BatchDecodeWithPagedKVCacheWrapper"


class DecodeSchedule(PlanRun):
    """What `plan` of a batch decode wrapper does behind its checks."""

    _op = _OP
    #: CTAs may serve two kv heads.
    _pairs = True
    #: (problem, device) → Geometry.
    _choose_geometry: Any = staticmethod(choose_geometry)

    _layout: str
    _buffers: Buffers | None  # of CUDA-graph mode
    _problem: Problem | None
    _geometry: Any
    _plan_buffer: PlanBuffer | None
    _variant: AttentionVariant | None
    _prefill: Any  # made when first needed
    _by_prefill: Any  # the same, where the plan runs in the prefill kernel

    def _route(self, op: str, p: Planned) -> tuple[Any, str]:
        """The prefill wrapper, and why, where the decode kernel does not take a plan; else (None, "")."""
        why, problem = "", self._problem_of(p)
        if self._variant is not None:
            why = f"variant {self._variant.name} is applied there"
        elif self.device >= 0 and p.q_len_per_req > 1:
            why = f"q_len_per_req is {p.q_len_per_req}"
        elif self.device >= 0 and problem != self._problem:  # else the decode kernel took it before
            why = why_not(problem)
        if self._graph and self._planned is not None and bool(why) != (self._by_prefill is not None):
            raise PlanError(f"{op}: a CUDA-graph wrapper keeps the kernel of its first plan; make another wrapper")
        if why and self._prefill is None:
            self._prefill = prefill_wrapper(
                _OP, self._workspace, self._layout, self._graph, self._buffers, self._variant
            )
        return (self._prefill if why else None), why

    def _attach_graph_buffers(self, indptr: Any, indices: Any, last_page_len: Any) -> None:
        given = {"indptr": indptr, "indices": indices, "last_page_len": last_page_len}
        a, b, c = (self._graph_buffer(f"paged_kv_{name}_buffer", x, int32) for name, x in given.items())
        check_shape(_OP, "paged_kv_indptr_buffer", a, (c.shape[0] + 1,), "= len(last_page_len_buffer) + 1")
        self._buffers = (a, b, c)

    def _problem_of(self, p: Planned) -> Problem:
        split_keys, disable_split = p.split
        return Problem(
            p.batch_size, p.num_qo_heads, p.num_kv_heads, p.head_dim, p.dtype, p.kv_dtype, p.out_dtype,
            p.page_size % TILE == 0, p.logits_soft_cap > 0, p.alibi, p.rope, disable_split or split_keys is not None,
            self._pairs and self._layout == "NHD",
        )  # fmt: skip

    def _schedule(self, p: Planned, kv_len: np.ndarray[Any, Any]) -> tuple[DecodePlan, int]:
        """The work list, and the partial slots to reserve (in graph mode those of the worst case)."""
        split_keys, disable_split = p.split
        problem = self._problem_of(p)
        if problem != self._problem:
            check_problem(f"{_OP}.plan", problem)
        if problem != self._problem or not self._graph:  # a captured graph keeps its kernel, whatever is tuned since
            self._geometry = self._choose_geometry(problem, device_info(self.device))
            self._problem = problem
        g = p.geometry = self._geometry
        bound = self._item_bound(p, g, split_keys, disable_split) if self._graph else None
        schedule = plan_decode(
            kv_len, p.indptr[:-1], num_head_blocks=g.num_head_blocks, slots=g.slots, window_left=p.window_left,
            split_keys=split_keys, disable_split=disable_split, pad_to=bound,
        )  # fmt: skip
        if bound is not None and schedule.num_items > bound:
            raise PlanError(f"{_OP}.plan: {schedule.num_items} work items exceed the captured grid's {bound}")
        p.grid = schedule.num_items * g.num_head_blocks
        p.counts = (*fast_div(p.page_size), g.num_head_blocks, g.blocks_per_kv, g.heads_per_block, g.group_size)
        return schedule, schedule.num_slots if bound is None else bound

    def _item_bound(self, p: Planned, g: Geometry, split_keys: int | None, disable_split: bool) -> int:
        """Work items of the fixed grid: no lengths that fit the indices buffer need more."""
        assert self._buffers is not None
        most_keys = self._buffers[1].shape[0] * p.page_size
        if disable_split:
            return p.batch_size
        if split_keys is not None:
            return p.batch_size + most_keys // split_keys
        return min(
            max_items(p.batch_size, g.num_head_blocks, g.slots),
            p.batch_size + -(-most_keys // (TILE * MIN_CHUNK_TILES)),
        )

    def _upload(self, p: Planned, schedule: DecodePlan, num_slots: int) -> None:
        """One copy of the work items (and host page numbers) to the GPU; in graph mode the caller's buffers too."""
        indices = p.indices
        stream = self._workspace.stream()
        own = indices.is_cpu
        if self._graph_state is not None:
            own = self._graph_state[-1]
        elif self._buffers is not None and not own:
            own = indices.ptr != self._buffers[1].ptr
        if self._buffers is not None:
            state = (p.kernel, p.grid, p.turns, p.sm_scale, p.logits_soft_cap, p.counts, p.partial_md, own)
            if self._graph_state is not None and state != self._graph_state:
                raise PlanError(
                    f"{_OP}.plan: a CUDA-graph wrapper keeps kernel, grid and scales of its first plan; only the page "
                    "table may change (make another wrapper for other sizes)"
                )
            self._graph_state = state
        words = schedule.num_items * ITEM_WORDS
        used = int(p.indptr[-1])
        room = 0 if not own else (used if self._buffers is None else self._buffers[1].shape[0])
        if self._plan_buffer is None:
            self._plan_buffer = PlanBuffer(self.device, 4 * (words + room))
        buffer = self._plan_buffer
        buffer.reserve(4 * (words + room), num_slots * p.geometry.num_head_blocks)
        from_host = own and indices.is_cpu
        staged = buffer.stage(words + (used if from_host else 0))
        staged[:words] = schedule.items.reshape(-1)
        if from_host:
            staged[words:] = p.table.host_indices
        p.items_ptr = buffer.upload(staged, stream)
        p.copied_indices = words if own else 0
        if not indices.is_cpu:
            check_gpu_indices(f"{_OP}.plan", "indices", p.table, self._workspace)
            if own:
                copy_device(p.items_ptr + 4 * words, indices.ptr, 4 * used, stream, self.device)
        if self._buffers is not None:
            fill_graph_buffers(self._buffers, p, self.device, stream)
            buffer.frozen = True
