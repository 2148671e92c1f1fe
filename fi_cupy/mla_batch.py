"""What the latent attention wrappers share: page tables by length, the schedule, checks and the launch of `run`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import (
    as_sizes,
    check_aligned,
    check_device,
    check_dtype,
    check_inner,
    check_ndim,
    check_shape,
)
from fi_cupy.decode_kernel import output_view, rope_turns
from fi_cupy.device import device_info
from fi_cupy.dtypes import FP8_TYPES, HALF_TYPES, DType, float32
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, DTypeError, PlanError, ShapeError, UnsupportedError
from fi_cupy.kv_cache import as_fp8
from fi_cupy.mla_kernel import SCALE_COLUMNS, Call, Problem, check_problem, geometry, launch_more
from fi_cupy.page_table import PageTable, check_gpu_indices, check_offsets, read_ints, read_numbers
from fi_cupy.plan.mla import EXTRA_ITEMS, plan_mla
from fi_cupy.plan.prefill import PrefillPlan, max_items, pad
from fi_cupy.prefill_batch import BatchPrefill, Planned
from fi_cupy.prefill_plan import Ints, Options, launch_values
from fi_cupy.scales import Scales
from fi_cupy.workspace import copy_device

LN2 = math.log(2.0)


class MlaPlanned(Planned):
    """What `plan` leaves for `run`."""

    geometry: Any  # mla_kernel.Geometry
    head_dims: tuple[int, int]
    host_indices: np.ndarray[Any, Any] | None
    indices: View
    indptr: Ints
    max_index: int
    page_size: int
    problem: Any  # mla_kernel.Problem
    turns: tuple[bytes, ...]

    def __init__(self, problem: Problem, options: Options, qo_indptr: Ints, kv_len: Ints) -> None:
        self.problem, self.options, self.qo_indptr, self.kv_len, self.mask = problem, options, qo_indptr, kv_len, None
        self.total_rows = int(qo_indptr[-1])
        self.indices_offset = None


def _usable(x: View, dtype: DType, device: int) -> bool:
    """Whether a 3-D array is what the kernels read, without the words of the checks that say why it is not."""
    a, b, c = x.strides
    misaligned = (x.ptr | a * dtype.itemsize | b * dtype.itemsize) & 15
    return x.dtype is dtype and x.device == device and c == 1 and not misaligned


class Outputs(NamedTuple):
    """Output and log-sum-exp of one call."""

    o: View
    s: View | None

    def result(self, out: Any, lse: Any, return_lse: bool) -> Any:
        """What `run` returns: the caller's own arrays where it gave some."""
        made = self.o.result() if out is None else out
        if not return_lse:
            return made
        assert self.s is not None
        return made, (self.s.result() if lse is None else lse)


class BatchMla(BatchPrefill):
    """Workspace, CUDA-graph buffers and schedule of a latent attention wrapper."""

    #: Names of the CUDA-graph buffers: offsets of queries (may be empty), of pages, page numbers, lengths.
    _names: tuple[str, str, str, str]

    # -- plan ---------------------------------------------------------------------------------------------------------

    def _prepare_mla(
        self, op: str, qo_indptr: Any, kv_indptr: Any, kv_indices: Any, lengths: Any, num_heads: int,
        head_dims: tuple[int, int], page_size: int, options: Options, q_data_type: Any, kv_data_type: Any,
    ) -> MlaPlanned:  # fmt: skip
        """Check the arguments of a plan. lengths: ``(name, keys of every request)``, or None: `_lengths` gives them."""
        num_heads, page_size, *dims = as_sizes(
            op, num_heads=num_heads, page_size=page_size, head_dim_ckv=head_dims[0], head_dim_kpe=head_dims[1]
        )
        head_dims = dims[0], dims[1]
        dtype = to_dtype(q_data_type)
        kv = dtype if kv_data_type is None else to_dtype(kv_data_type)
        problem = Problem(
            num_heads, dtype, kv, page_size, options.logits_soft_cap > 0, options.pos_encoding_mode != "NONE",
            self._lowered, self._backend,
        )  # fmt: skip
        check_problem(op, problem, *head_dims, self.device < 0)
        qo_name, kv_name, numbers_name, length_name = self._arguments
        given = {kv_name: kv_indptr, length_name: lengths}
        if qo_indptr is not None:
            given[qo_name] = qo_indptr
        host = read_ints(op, given)
        indptr, kv_len = host[kv_name], host[length_name]
        qo = host.get(qo_name)
        if qo is None:
            qo = np.arange(max(len(indptr), 1))
        pages = check_offsets(op, kv_name, indptr)
        check_offsets(op, qo_name, qo)
        if len(indptr) != len(qo):
            raise ArgumentError(f"{op}: {kv_name} has {len(indptr)} entries, expected {len(qo)} = len({qo_name})")
        if len(kv_len) != len(pages):
            check_shape(op, length_name, view(kv_len), (len(pages),), f"= len({kv_name}) - 1")
        kv_len = self._keys(op, kv_len, pages, page_size)
        numbers, copied, highest = read_numbers(op, numbers_name, kv_indices, int(indptr[0]), int(indptr[-1]))
        if int(indptr[-1]) > numbers.shape[0]:
            raise ArgumentError(
                f"{op}: {kv_name} ends at {indptr[-1]}, but {numbers_name} has {numbers.shape[0]} entries"
            )
        p = MlaPlanned(problem, options, qo, kv_len)
        p.page_size, p.indptr, p.indices, p.host_indices, p.max_index = page_size, indptr, numbers, copied, highest
        p.head_dims, p.disable_split, p.fixed_split = head_dims, not self._splittable, None
        p.turns = rope_turns(64, options.rope_scale, options.rope_theta)[:2] if problem.rope else ()
        if copied is None:
            table = PageTable(indptr, kv_len, kv_len, numbers, copied, highest)
            check_gpu_indices(op, numbers_name, table, self._workspace)
        elif self.device < 0:
            p.host_indices = copied.copy()  # `run` reads them
        return p

    #: What the arguments of `plan` are called, in the order of `_names`.
    _arguments: tuple[str, str, str, str]

    def _keys(self, op: str, lengths: Ints, pages: Ints, page_size: int) -> Ints:
        """Keys of every request, held to its pages."""
        wrong = lengths.view(np.uint64) > (pages * page_size).view(np.uint64)  # negative ones are large
        if np.count_nonzero(wrong):
            b = int(np.argmax(wrong))
            raise ArgumentError(
                f"{op}: {self._arguments[3]}[{b}] is {lengths[b]}, expected 0..{pages[b] * page_size}, what its "
                f"{pages[b]} pages of {page_size} tokens hold"
            )
        return lengths

    def _plan_mla(self, p: MlaPlanned, non_blocking: bool = True) -> None:
        if self.device < 0:
            if self._graph:
                self._check_graph(p)
                self._fill_graph_buffers(p, 0)
            self._planned = p
            return
        own = not self._graph and p.host_indices is not None
        self._finish(p, p.indptr[:-1], p.host_indices if own else None, non_blocking)

    def _schedule(self, p: Any, kv_base: Ints) -> tuple[PrefillPlan, int]:
        """(schedule, slots with room for counters and sums); in graph mode padded to what any later plan can need."""
        batch, rows, heads = len(p.kv_len), p.total_rows, p.problem.num_heads
        if self._graph_state is not None:
            p.geometry = self._graph_state[0]
        else:
            p.geometry = geometry(p.problem, max(-(-rows * heads // max(batch, 1)), 1), device_info(self.device))
        g = p.geometry
        schedule = plan_mla(
            p.qo_indptr, p.kv_len, kv_base, num_heads=heads, tile_q=g.tiles.tile_q, tile_kv=g.tiles.tile_kv,
            slots=g.slots, costs=g.costs, causal=p.options.causal, window_left=p.options.window_left,
            disable_split=p.disable_split, narrow=None if self._lowered is None else self._lowered.narrow({}),
        )  # fmt: skip
        if not self._graph:
            return schedule, schedule.num_slots
        if self._graph_state is not None:
            num_items = self._graph_state[1]
        else:
            num_items = max_items(rows, batch, heads, g.tiles.tile_q, EXTRA_ITEMS * g.slots)
        if len(schedule.items) > num_items:
            raise PlanError(
                f"{self._op}.plan: {len(schedule.items)} work items exceed the {num_items} of the first plan; give the "
                "first plan as many query rows as any later one has"
            )
        return replace(schedule, items=pad(schedule.items, num_items)), num_items

    def _graph_entries(self, p: Any) -> dict[str, int]:
        batch = self._buffers[self._names[3]].shape[0]
        if len(p.kv_len) != batch:
            raise PlanError(f"{self._op}.plan: the batch is {len(p.kv_len)}, expected {batch} = len({self._names[3]})")
        entries = dict(zip(self._names, (batch + 1, batch + 1, int(p.indptr[-1]), batch), strict=True))
        entries.pop("", None)
        return entries

    def _fill_graph_buffers(self, p: Any, stream: int) -> None:
        qo, kv, numbers, lengths = self._names
        self._fill(qo, p.qo_indptr, stream)
        self._fill(kv, p.indptr, stream)
        self._fill(lengths, self._length_values(p), stream)
        buffer = self._buffers[numbers]
        if p.host_indices is not None:
            self._fill(numbers, p.host_indices, stream)
        elif p.indices.ptr != buffer.ptr:
            copy_device(buffer.ptr, p.indices.ptr, 4 * int(p.indptr[-1]), stream, self.device)

    def _length_values(self, p: MlaPlanned) -> Ints:
        """What the buffer of lengths holds."""
        return p.kv_len

    # -- run ----------------------------------------------------------------------------------------------------------

    def _queries(self, op: str, p: MlaPlanned, q_nope: Any, q_pe: Any) -> tuple[View, View]:
        views = []
        for name, array, dim in (("q_nope", q_nope, p.head_dims[0]), ("q_pe", q_pe, p.head_dims[1])):
            x = view(array, op, name)
            few = x.shape[0] < p.total_rows if self._graph and x.ndim == 3 else x.shape[:1] != (p.total_rows,)
            if few or x.shape[1:] != (p.problem.num_heads, dim):
                raise ShapeError(
                    f"{op}: {name} has shape {x.shape}, expected ({p.total_rows}, {p.problem.num_heads}, {dim}) = "
                    f"(qo_indptr[-1], num_heads, head_dim_{'ckv' if name == 'q_nope' else 'kpe'}) of the plan"
                )
            if not _usable(x, p.problem.dtype, self.device):
                check_dtype(op, name, x, (p.problem.dtype,), "= q_data_type of the plan")
                check_device(op, self._workspace, **{name: x})
                check_inner(op, name, x)
                check_aligned(op, name, x, 16)
            views.append(x)
        if views[0].shape[0] != views[1].shape[0]:
            raise ShapeError(f"{op}: q_pe has {views[1].shape[0]} rows, expected {views[0].shape[0]} like q_nope")
        return views[0], views[1]

    def _caches(self, op: str, p: MlaPlanned, x: View, given: dict[str, Any]) -> list[View]:
        views = []
        for (name, array), dim in zip(given.items(), p.head_dims, strict=True):
            c = as_fp8(view(array, op, name), p.problem.kv)
            if c.shape[1:] != (p.page_size, dim) or not _usable(c, p.problem.kv, self.device):
                check_ndim(op, name, c, 3)
                check_shape(op, name, c, (c.shape[0], p.page_size, dim), "= [pages, page_size, head_dim] of the plan")
                check_dtype(op, name, c, (p.problem.kv,), "= kv_data_type of the plan")
                check_device(op, x, **{name: c})
                check_inner(op, name, c)
                check_aligned(op, name, c, 16)
            if p.max_index >= c.shape[0]:
                raise ArgumentError(
                    f"{op}: {self._arguments[2]} holds page {p.max_index}, but {name} has {c.shape[0]} pages"
                )
            views.append(c)
        if views[0].shape[0] != views[1].shape[0]:
            first, second = given
            raise ShapeError(f"{op}: {second} has {views[1].shape[0]} pages, expected {views[0].shape[0]} like {first}")
        return views

    def _outputs(self, op: str, x: View, out: Any, lse: Any, return_lse: bool) -> Outputs:
        """Views of output (of the type of q, or the caller's fp8) and log-sum-exp."""
        kind = x.dtype
        if out is not None and getattr(out, "dtype", kind.np) != kind.np:
            given = view(out, op, "out").dtype
            kind = given if given in FP8_TYPES else kind
        o = output_view(op, "out", out, x, x.shape, kind)
        if not _usable(o, kind, x.device):
            check_aligned(op, "out", o, 16 if kind in HALF_TYPES else 4)
        if not return_lse and lse is None:
            return Outputs(o, None)
        s = output_view(op, "lse", lse, x, x.shape[:2], float32)
        if not s.contiguous:
            raise ArgumentError(f"{op}: lse has strides {s.strides}, expected a contiguous array")
        return Outputs(o, s)

    def _run_mla(
        self, op: str, p: MlaPlanned, q: tuple[View, View], caches: list[View], outputs: Outputs, base_e: bool,
        scales: Scales, pe_ratio: float, token_scales: View | None, enable_pdl: bool | None,
        variant_args: Mapping[str, Any] | None,
    ) -> None:  # fmt: skip
        """scales: `logit` for q ckv^T (and, times `pe_ratio`, q_pe kpe^T), `output` for the result."""
        x, x_pe = q
        o, s = outputs
        bound = self._bind(op, (), variant_args, x, scales)
        scale = p.options.sm_scale * scales.logit
        if x.is_cpu:
            assert p.host_indices is not None
            values, log = reference.mla.mla_paged(
                x.numpy(), x_pe.numpy(), caches[0].numpy(), caches[1].numpy(), p.qo_indptr, p.indptr, p.host_indices,
                p.kv_len, p.options.causal, scale, window_left=p.options.window_left,
                logits_soft_cap=p.options.logits_soft_cap, kpe_scale=pe_ratio,
                token_scales=None if token_scales is None else token_scales.numpy(),
                rope=(p.options.rope_scale or 1.0, p.options.rope_theta or 1e4) if p.problem.rope else None,
                variant=bound, params=None if bound is None else bound.params(), out_scale=scales.output,
                out_dtype=o.dtype.np,
            )  # fmt: skip
            o.write(values)
            if s is not None:
                s.write(log * LN2 if base_e else log)
        elif p.work.num_items:
            g = p.geometry
            if self._graph:
                indices = self._buffers[self._names[2]].ptr
            else:
                indices = p.indices.ptr if p.indices_offset is None else p.work.items + p.indices_offset
            strides = [(c.strides[0], c.strides[1], 0) for c in caches]
            fields = launch_values(
                g, p.work, x, caches[0], caches[1], strides[0], strides[1], o, s, p.options, scales, indices,
                p.page_size, 0, 0,
            )  # fmt: skip
            ready = not self._graph and p.indices_offset is not None
            more = launch_more(g, x, x_pe, caches, token_scales, pe_ratio, LN2 if base_e else 1.0, ready, p.turns)
            call = Call(scale > 0, None if o.dtype is x.dtype else o.dtype, token_scales is not None)
            g.load(call, self.device).launch(
                p.work.num_items, x.stream(), *fields, *more, *(() if bound is None else bound.kernel_values()),
                pdl=enable_pdl,
            )  # fmt: skip


def read_fp8_scales(
    op: str, p: MlaPlanned, caches: list[View], ckv_scale: float | None, ckv_scale_arr: Any, kpe_scale: float | None,
    o_scale: float | None, out_is_fp8: bool,
) -> tuple[Scales, float, View | None]:  # fmt: skip
    """(scales, kpe_scale / ckv_scale, factors a token and 128 columns) of a call."""
    given = {"ckv_scale": ckv_scale, "kpe_scale": kpe_scale, "o_scale": o_scale}
    for name, value in given.items():
        if value is not None and not (isinstance(value, (int, float, np.floating)) and 0 < float(value) < math.inf):
            raise ArgumentError(f"{op}: {name} is {value!r}, expected a finite positive number")
    if o_scale is not None and not out_is_fp8:
        raise ArgumentError(f"{op}: o_scale is {o_scale}, but out is no fp8 array, whose values it would scale")
    output = 1.0 / (o_scale or 1.0)
    if p.problem.kv not in FP8_TYPES:
        for name, value in (("ckv_scale", ckv_scale), ("ckv_scale_arr", ckv_scale_arr), ("kpe_scale", kpe_scale)):
            if value is not None:
                raise ArgumentError(
                    f"{op}: {name} is given, but the caches have dtype {p.problem.kv.name}, no fp8 type"
                )
        return Scales(1.0, output), 1.0, None
    if kpe_scale is None or (ckv_scale is None and ckv_scale_arr is None):
        missing = "kpe_scale" if kpe_scale is None else "ckv_scale (or ckv_scale_arr)"
        raise ArgumentError(f"{op}: {missing} is missing, which caches of dtype {p.problem.kv.name} need")
    if ckv_scale_arr is None:
        assert ckv_scale is not None
        return Scales(float(ckv_scale), output * float(ckv_scale)), float(kpe_scale) / float(ckv_scale), None
    if ckv_scale not in (None, 1, 1.0):
        raise ArgumentError(f"{op}: ckv_scale is {ckv_scale} beside ckv_scale_arr, expected one of the two")
    arr = view(ckv_scale_arr, op, "ckv_scale_arr")
    shape = (*caches[0].shape[:2], p.head_dims[0] // SCALE_COLUMNS)
    check_shape(op, "ckv_scale_arr", arr, shape, "= ckv_cache.shape[:2] + (head_dim_ckv / 128,)")
    if arr.dtype is not float32:
        raise DTypeError(f"{op}: ckv_scale_arr has dtype {arr.dtype.name}, expected float32")
    check_device(op, caches[0], ckv_scale_arr=arr)
    if not arr.contiguous:
        raise ArgumentError(f"{op}: ckv_scale_arr has strides {arr.strides}, expected a contiguous array")
    return Scales(1.0, output), float(kpe_scale), arr


def check_variant(op: str, variant: Any) -> None:
    """Raise for a variant whose functions latent attention does not call."""
    if variant is None:
        return
    lowered = variant.lowered()
    others = sorted(lowered.stages - {"score_fn", "mask_fn"})
    if others or not lowered.use_softmax:
        what = others[0] if others else "use_softmax=False"
        raise UnsupportedError(f"{op}: variant {variant.name} has {what}; latent attention takes score_fn and mask_fn")
