"""The run side of batch decode: arguments held to the plan, the kernel's parameters, and the reference on the CPU."""

from __future__ import annotations

from typing import Any, NamedTuple

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_aligned, check_device, check_dtype, check_inner, check_shape
from fi_cupy.decode_kernel import logit_floats, output_view, shares_of, sinks_view
from fi_cupy.decode_plan import Planned
from fi_cupy.decode_schedule import DecodeSchedule
from fi_cupy.dtypes import float32
from fi_cupy.errors import ArgumentError
from fi_cupy.kv_cache import PagedKV, as_fp8, check_paged_kv, paged_kv, token_strides
from fi_cupy.scales import Scales, read_scales


class Call(NamedTuple):
    """The checked arguments of one `run`."""

    x: View
    kv: PagedKV
    o: View
    s: View | None
    sink: View | None
    scales: Scales

    def result(self, out: Any, lse: Any, return_lse: bool) -> Any:
        """What `run` returns: the caller's own arrays where it gave some."""
        made = self.o.result() if out is None else out
        if not return_lse:
            return made
        assert self.s is not None
        return made, (self.s.result() if lse is None else lse)


class DecodeCalls(DecodeSchedule):
    """What `run` of a batch decode wrapper does around the launch."""

    def _checked(
        self, op: str, p: Planned, q: Any, paged_kv_cache: Any, q_scale: Any, k_scale: Any, v_scale: Any,
        out: Any, lse: Any, return_lse: bool, sinks: Any,
    ) -> Call:  # fmt: skip
        """The arguments of `run` held to the plan, and its outputs."""
        x = as_fp8(view(q, op, "q"), p.dtype)
        shape = (p.batch_size * p.q_len_per_req, p.num_qo_heads, p.head_dim)
        if x.shape != shape:
            check_shape(op, "q", x, shape, "= (batch * q_len_per_req, num_qo_heads, head_dim) of the plan")
        if x.dtype is not p.dtype:
            check_dtype(op, "q", x, (p.dtype,), "= q_data_type of the plan")
        if x.device != self.device:
            check_device(op, self._workspace, q=x)
        check_inner(op, "q", x)
        check_aligned(op, "q", x, 4)  # it is read in pairs
        kv = paged_kv(op, paged_kv_cache)
        kv_dtype = p.kv_dtype if kv.k.dtype is not float32 or not x.is_cpu else float32
        kv = check_paged_kv(op, kv, x, kv_dtype, p.page_size, p.num_kv_heads, p.head_dim, self._layout)
        if p.max_index >= kv.k.shape[0]:
            raise ArgumentError(f"{op}: indices holds page {p.max_index}, but the cache has {kv.k.shape[0]} pages")
        o = output_view(op, "out", out, x, shape, p.out_dtype if x.dtype is p.dtype else x.dtype)
        s = output_view(op, "lse", lse, x, shape[:2], float32) if return_lse or lse is not None else None
        if s is not None and not s.contiguous:
            raise ArgumentError(f"{op}: lse has strides {s.strides}, expected a contiguous array")
        sink = None if sinks is None else sinks_view(op, sinks, x, p.num_qo_heads)
        return Call(x, kv, o, s, sink, read_scales(op, x, p.num_qo_heads, p.num_kv_heads, q_scale, k_scale, v_scale))

    def _values(self, p: Planned, c: Call) -> tuple[Any, ...]:
        """The fields of DecodeParams."""
        if p.copied_indices:
            indices, ready = p.items_ptr + 4 * p.copied_indices, 1
        elif self._buffers is not None:
            indices, ready = self._buffers[1].ptr, 0
        else:
            indices, ready = p.indices.ptr, 0
        assert self._plan_buffer is not None
        x, kv, o, g = c.x, c.kv, c.o, p.geometry
        k, v = token_strides(kv.k, self._layout), token_strides(kv.v, self._layout)
        return (
            x.ptr, kv.k.ptr, kv.v.ptr, o.ptr, 0 if c.s is None else c.s.ptr, p.items_ptr, indices,
            0 if c.sink is None else c.sink.ptr, p.partial_out, p.partial_md, self._plan_buffer.counters_ptr,
            x.strides[0], x.strides[1], o.strides[0], o.strides[1],
            *k, *v, *p.counts, ready, g.slots, shares_of(k, v, p.num_kv_heads, p.head_dim, g.blocks_per_kv), 0, 0, 0, 0,
            *logit_floats(p.sm_scale * c.scales.logit, p.logits_soft_cap),
            c.scales.output, *c.scales.kernel_values(),
        )  # fmt: skip

    def _run_cpu(self, p: Planned, c: Call) -> None:
        values, lse = reference.attention.batch_decode_paged(
            c.x.numpy(), c.kv.k.numpy(), c.kv.v.numpy(), p.indptr, p.indices, p.last_page_len, kv_layout=self._layout,
            sm_scale=p.sm_scale * c.scales.logit, sinks=None if c.sink is None else c.sink.numpy(),
            out_dtype=c.o.dtype.np, q_len_per_req=p.q_len_per_req, **c.scales.reference(), **p.options,
        )  # fmt: skip
        c.o.write(values)
        if c.s is not None and lse is not None:
            c.s.write(lse)
