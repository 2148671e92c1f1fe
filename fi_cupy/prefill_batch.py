"""What the paged and the ragged prefill wrapper share: workspace, schedule, upload and the frame of `run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_aligned, check_device, check_dtype, check_inner
from fi_cupy.decode_kernel import sinks_view
from fi_cupy.device import device_info
from fi_cupy.dtypes import FP8_TYPES, DType
from fi_cupy.errors import ArgumentError, PlanError, ShapeError, UnsupportedError
from fi_cupy.kv_cache import as_fp8, row_alignment
from fi_cupy.page_table import check_offsets
from fi_cupy.plan.prefill import PrefillPlan, max_items, pad, plan_prefill
from fi_cupy.plan_run import PlanRun
from fi_cupy.prefill_hopper import block_keys, load_of
from fi_cupy.prefill_kernel import Geometry, Problem, geometry
from fi_cupy.prefill_plan import (
    Ints,
    Mask,
    Options,
    Strides,
    Work,
    check_planned,
    check_prefill_backend,
    launch,
    outputs,
    pack_mask,
)
from fi_cupy.scales import Scales, read_scales
from fi_cupy.workspace import PlanBuffer, copy_device, copy_to_device

if TYPE_CHECKING:
    from fi_cupy.jit.lower import Lowered
    from fi_cupy.multi_item import MultiItem
    from fi_cupy.variants import AttentionVariant, BoundVariant


class Planned:
    """What `plan` leaves for `run`: fixed until the next plan."""

    fixed_split: int | None  # keys
    disable_split: bool
    geometry: Geometry
    indices_offset: int | None  # bytes from the items to the wrapper's own page table; None: the caller's is read
    kv_len: Ints
    mask: Mask | None
    options: Options
    problem: Problem
    qo_indptr: Ints
    total_rows: int
    work: Work

    def __init__(self, problem: Problem, options: Options, qo_indptr: Ints, kv_len: Ints, mask: Mask | None) -> None:
        self.problem, self.options, self.qo_indptr, self.kv_len, self.mask = problem, options, qo_indptr, kv_len, mask
        self.total_rows = int(qo_indptr[-1]) if len(qo_indptr) else 0
        self.indices_offset = None


class BatchPrefill(PlanRun):
    """Workspace, CUDA-graph buffers and schedule of a prefill wrapper."""

    def __init__(
        self,
        float_workspace_buffer: Any,
        use_cuda_graph: bool,
        buffers: dict[str, tuple[Any, DType]],
        variant: AttentionVariant | None = None,
        backend: str = "auto",
    ) -> None:
        self._variant, self._backend = variant, backend
        self._graph = use_cuda_graph
        self._buffers: dict[str, View] = {}
        self._planned: Any = None
        self._plan_buffer: PlanBuffer | None = None
        self._graph_state: tuple[Any, ...] | None = None
        self._attach(float_workspace_buffer)
        check_prefill_backend(self._op, backend, self.device < 0)
        if not use_cuda_graph:
            return
        for name, (buffer, dtype) in buffers.items():
            if buffer is not None or "mask" not in name:
                self._buffers[name] = self._graph_buffer(name, buffer, dtype)

    # -- plan ---------------------------------------------------------------------------------------------------------

    def _pack_mask(
        self, op: str, p: Planned, custom_mask: Any, packed_custom_mask: Any, items: MultiItem | None
    ) -> Mask | None:  # fmt: skip
        """Check the offsets of the queries, and make the mask, if there is one."""
        qo_len = check_offsets(op, "qo_indptr", p.qo_indptr)
        if items is not None:
            packed_custom_mask = items.packed_mask(op, qo_len, p.kv_len)
        return pack_mask(op, custom_mask, packed_custom_mask, qo_len, p.kv_len, self._workspace)

    def _geometry(self, p: Planned) -> Geometry:
        """The kernels of a plan that no captured graph binds."""
        batch, rows, keys = len(p.kv_len), p.total_rows, int(np.add.reduce(p.kv_len, dtype=np.int64))
        group = p.problem.num_qo_heads // p.problem.num_kv_heads
        # Who fixes the split wants bits that do not depend on the batch; so must the choice of the kernel then.
        fixed = p.disable_split or p.fixed_split is not None
        load = load_of(batch, group, rows, keys, p.options.causal, p.options.window_left)
        return geometry(
            p.problem, max(-(-rows * group // max(batch, 1)), 1), device_info(self.device), None if fixed else load
        )

    def _schedule(self, p: Planned, kv_base: Ints) -> tuple[PrefillPlan, int]:
        """(schedule, slots with room for counters and sums); in graph mode padded to what any later plan can need."""
        batch, rows, keys = len(p.kv_len), p.total_rows, int(np.add.reduce(p.kv_len, dtype=np.int64))
        g = p.geometry = self._geometry(p) if self._graph_state is None else self._graph_state[0]
        schedule = plan_prefill(
            p.qo_indptr, p.kv_len, kv_base, group=g.group, num_kv_heads=g.num_kv_heads, tile_q=g.tiles.tile_q,
            tile_kv=g.tiles.tile_kv, slots=g.slots, causal=p.options.causal, window_left=p.options.window_left,
            split_keys=p.fixed_split, disable_split=p.disable_split,
            mask_offsets=None if p.mask is None else p.mask.offsets,
            narrow=None if self._lowered is None else self._lowered.narrow({}),
            block_keys=None if g.hopper is None else block_keys(g.hopper, g.num_kv_heads, batch, keys, g.slots),
            align_end=g.hopper is not None and p.options.causal, split_tail=g.split_tail(1 if self._graph else 2),
        )  # fmt: skip
        if not self._graph:
            return schedule, schedule.num_slots
        if self._graph_state is not None:
            num_items = self._graph_state[1]
        else:
            num_items = max_items(rows, batch, g.group, g.tiles.tile_q, self._most_chunks(p))
        if len(schedule.items) > num_items:
            raise PlanError(
                f"{self._op}.plan: {len(schedule.items)} work items exceed the {num_items} of the first plan; give the "
                "first plan as many query rows as any later one has"
            )
        return replace(schedule, items=pad(schedule.items, num_items)), num_items

    def _most_chunks(self, p: Planned) -> int:
        """Work items beyond one a tile that splitting may add in graph mode."""
        g = p.geometry
        if p.disable_split:
            return 0
        if p.fixed_split is not None:
            tiles = p.total_rows * g.group // g.tiles.tile_q + len(p.kv_len)
            return tiles * (self._most_keys(p) // p.fixed_split + 1)
        return -(-g.slots // g.num_kv_heads)

    def _most_keys(self, p: Any) -> int:
        """Keys that one request may have in graph mode."""
        raise NotImplementedError

    def _finish(self, p: Planned, kv_base: Ints, indices: np.ndarray[Any, Any] | None, non_blocking: bool) -> None:
        """Schedule, check the workspace, load the kernels and send everything to the GPU."""
        schedule, most_slots = self._schedule(p, kv_base)
        items = schedule.items
        layout = p.geometry.workspace(schedule.num_slots, most_slots)
        layout.check(f"{self._op}.plan", self._workspace_bytes)
        p.geometry.kernel(p.options.sm_scale, self.device)
        if p.problem.dtype in FP8_TYPES:  # usually with factors a head
            p.geometry.kernel(p.options.sm_scale, self.device, head_scales=True)
        words, tail = items.size, 0 if indices is None else len(indices)
        if self._plan_buffer is None:
            self._plan_buffer = PlanBuffer(self.device, 4 * (words + tail), 1)
        buffer = self._plan_buffer
        buffer.reserve(4 * (words + tail), p.geometry.num_counters(most_slots))
        staged = buffer.stage(words + tail)
        staged[:words] = items.reshape(-1)
        if indices is not None:
            staged[words:] = indices
            p.indices_offset = 4 * words
        p.work = Work(
            buffer.ptr, len(items), schedule.num_split, self._workspace.ptr + layout.offsets["partial_o"],
            self._workspace.ptr + layout.offsets["partial_md"], buffer.counters_ptr,
        )  # fmt: skip
        state = (p.geometry, len(items), p.problem, p.options, p.work._replace(num_split=0))
        if self._graph:  # before anything is sent: a captured graph goes on with the plan it has
            self._check_graph(p)
            if self._graph_state is not None and state != self._graph_state:
                raise PlanError(
                    f"{self._op}.plan: a CUDA-graph wrapper keeps kernel, grid and options of its first plan; only "
                    "lengths, the page table and the mask may change (make another wrapper for other sizes)"
                )
        stream = self._workspace.stream()
        buffer.upload(staged, stream)
        if self._graph:
            self._graph_state = state
            self._fill_graph_buffers(p, stream)
            buffer.frozen = True
        if not non_blocking:
            from cupy.cuda import runtime

            runtime.streamSynchronize(stream)
        self._planned = p

    def _graph_entries(self, p: Any) -> dict[str, int]:
        """Entries that a plan writes into the caller's fixed buffers, by name."""
        raise NotImplementedError

    def _check_graph(self, p: Any) -> None:
        """Hold a plan to the caller's fixed buffers, before any of them is written."""
        entries = self._graph_entries(p)
        if p.mask is not None:
            buffer, count = self._buffers.get("custom_mask_buf"), int(p.mask.offsets[-1])
            if buffer is None or buffer.shape[0] < count:
                has = "is missing" if buffer is None else f"has {buffer.shape[0]} bytes"
                raise ArgumentError(f"{self._op}.plan: custom_mask_buf {has}, expected at least {count} for this mask")
            entries["mask_indptr_buf"] = len(p.mask.offsets)
        for name, count in entries.items():
            buffer = self._buffers.get(name)
            if buffer is not None and count > buffer.shape[0]:
                raise ArgumentError(f"{self._op}.plan: {name} has {buffer.shape[0]} entries, expected {count}")

    def _fill_graph_buffers(self, p: Any, stream: int) -> None:
        """Copy the mask into the caller's fixed buffer, which the captured kernel reads."""
        if p.mask is None:
            return
        buffer, count = self._buffers["custom_mask_buf"], int(p.mask.offsets[-1])
        if buffer.is_cpu:
            buffer.numpy()[:count] = p.mask.packed.numpy()[:count]
        elif buffer.ptr != p.mask.packed.ptr:
            copy_device(buffer.ptr, p.mask.packed.ptr, count, stream, self.device)
        self._fill("mask_indptr_buf", p.mask.offsets, stream)
        p.mask = p.mask._replace(packed=buffer)

    def _fill(self, name: str, values: Ints, stream: int) -> None:
        """Write index values into a caller's buffer, if there is one of that name."""
        buffer = self._buffers.get(name)
        if buffer is None:
            return
        if buffer.is_cpu:
            buffer.numpy()[: len(values)] = values
        else:
            copy_to_device(buffer.ptr, values.astype(np.int32), stream, self.device)

    def _workspace_size(self, p: Planned, kv_base: Ints, indices: int) -> tuple[int, int]:
        schedule, most_slots = self._schedule(p, kv_base)
        int_bytes = schedule.items.nbytes + 4 * p.geometry.num_counters(most_slots) + 4 * indices
        return p.geometry.workspace(schedule.num_slots, most_slots).size, int_bytes

    # -- variants -----------------------------------------------------------------------------------------------------

    @property
    def _lowered(self) -> Lowered | None:
        return None if self._variant is None else self._variant.lowered()

    @property
    def _splittable(self) -> bool:
        return self._variant is None or self._variant.lowered().splittable

    def _bind(
        self, op: str, args: tuple[Any, ...], named: Mapping[str, Any] | None, x: View, scales: Scales
    ) -> BoundVariant | None:  # fmt: skip
        """The variant with the arguments of one `run`."""
        if self._variant is not None:
            return self._variant.bind(
                op, args, named or {}, x, sm_scale=self._planned.options.sm_scale,
                logits_soft_cap=self._planned.options.logits_soft_cap, logit_scale=scales.logit,
            )  # fmt: skip
        if args or named:
            raise UnsupportedError(f"{op}: extra arguments belong to a variant; give one to the constructor (variant=)")
        return None

    def _scales(
        self, op: str, p: Planned, x: View, args: tuple[Any, ...], given: tuple[Any, Any, Any]
    ) -> tuple[tuple[Any, ...], Scales]:
        """(what of `args` belongs to a variant, the scales): fp8 queries take scale_q, scale_k, scale_v by position."""
        if self._variant is None and p.problem.dtype in FP8_TYPES and len(args) == 3:
            if any(value is not None for value in given):
                raise ArgumentError(f"{op}: scales are given by position and by name, expected one of the two")
            return (), read_scales(op, x, p.problem.num_qo_heads, p.problem.num_kv_heads, *args)
        return args, read_scales(op, x, p.problem.num_qo_heads, p.problem.num_kv_heads, *given)

    # -- run ----------------------------------------------------------------------------------------------------------

    def _query(self, op: str, p: Planned, q: Any) -> View:
        """The view of `q`, held to the plan."""
        x = as_fp8(view(q, op, "q"), p.problem.dtype)
        heads, dim = p.problem.num_qo_heads, p.problem.head_dim_qk
        few = x.shape[0] < p.total_rows if self._graph and x.ndim == 3 else x.shape[:1] != (p.total_rows,)
        if few or x.shape[1:] != (heads, dim):
            raise ShapeError(
                f"{op}: q has shape {x.shape}, expected ({p.total_rows}, {heads}, {dim}) = (qo_indptr[-1], "
                "num_qo_heads, head_dim_qk) of the plan"
            )
        check_dtype(op, "q", x, (p.problem.dtype,), "= q_data_type of the plan")
        if x.device != self.device:
            check_device(op, self._workspace, q=x)
        check_inner(op, "q", x)
        check_aligned(op, "q", x, row_alignment(x.dtype, dim))
        return x

    def _run(
        self, op: str, p: Planned, x: View, k: View, v: View, k_strides: Strides, v_strides: Strides,
        scales: Scales, out: Any, lse: Any, return_lse: bool, enable_pdl: bool | None, sinks: Any,
        page_size: int, kv_indices: int, bound: BoundVariant | None, kv_extent: int,
    ) -> Any:  # fmt: skip
        if bound is not None and not bound.use_softmax and (return_lse or lse is not None):
            raise ArgumentError(f"{op}: variant {bound.variant.name} has no softmax, and without it there is no lse")
        o, s = outputs(op, x, out, lse, return_lse, p.problem)
        sink = None if sinks is None else sinks_view(op, sinks, x, p.problem.num_qo_heads)
        if x.is_cpu:
            values, log = self._reference(
                p, x.numpy(), k.numpy(), v.numpy(), sm_scale=p.options.sm_scale * scales.logit, **scales.reference(),
                sinks=None if sink is None else sink.numpy(), out_dtype=o.dtype.np, **p.options.reference(),
                packed_custom_mask=None if p.mask is None else p.mask.packed.numpy(), variant=bound,
                params=None if bound is None else bound.params(),
            )  # fmt: skip
            o.write(values)
            if s is not None:
                s.write(log)
        else:
            launch(
                p.geometry, p.work, x, k, v, k_strides, v_strides, o, s, p.options, scales,
                kv_indices=kv_indices, page_size=page_size, mask=0 if p.mask is None else p.mask.packed.ptr,
                sinks=0 if sink is None else sink.ptr, pdl=enable_pdl,
                variant_values=() if bound is None else bound.kernel_values(), kv_extent=kv_extent,
            )  # fmt: skip
        result = o.result() if out is None else out
        if not return_lse:
            return result
        assert s is not None
        return result, (s.result() if lse is None else lse)

    def _check_forward(
        self, causal: bool, pos_encoding_mode: str, window_left: int, logits_soft_cap: float | None,
        sm_scale: float | None, rope_scale: float | None, rope_theta: float | None,
    ) -> None:  # fmt: skip
        """Options of the deprecated `forward` must be defaults or the planned ones."""
        op = f"{self._op}.forward"
        if self._planned is None:
            raise PlanError(f"{op}: plan() must come first")
        o: Options = self._planned.options
        check_planned(op, "causal", causal, False, o.causal)
        check_planned(op, "pos_encoding_mode", pos_encoding_mode, "NONE", o.pos_encoding_mode)
        check_planned(op, "window_left", max(window_left, -1), -1, o.window_left)
        check_planned(op, "logits_soft_cap", max(logits_soft_cap or 0.0, 0.0), 0.0, o.logits_soft_cap)
        check_planned(op, "sm_scale", sm_scale, None, o.sm_scale)
        check_planned(op, "rope_scale", rope_scale, None, o.rope_scale)
        check_planned(op, "rope_theta", rope_theta, None, o.rope_theta)

    def _reference(self, p: Any, q: Ints, k: Ints, v: Ints, **options: Any) -> tuple[Ints, Any]:
        raise NotImplementedError
