"""Arguments of prefill: what `plan` checks and keeps for `run`, packed custom masks, and the launch both share."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_aligned, check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.decode_kernel import check_rope, output_view, rope_turns
from fi_cupy.dtypes import DType, float32, uint8
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, PlanError, ShapeError, UnsupportedError
from fi_cupy.kv_cache import row_alignment
from fi_cupy.prefill_hopper import map_values
from fi_cupy.prefill_kernel import NO_WINDOW, Geometry, Problem, check_problem, fast_div, scale_floats
from fi_cupy.scales import Scales
from fi_cupy.workspace import copy_to_device

if TYPE_CHECKING:
    from fi_cupy.jit.lower import Lowered

Ints = np.ndarray[Any, np.dtype[Any]]


class Options(NamedTuple):
    """The numbers of a plan that `run` uses."""

    causal: bool
    window_left: int
    logits_soft_cap: float
    sm_scale: float
    pos_encoding_mode: str
    rope_scale: float | None
    rope_theta: float | None

    def reference(self) -> dict[str, Any]:
        """Keyword arguments of the NumPy reference; `sm_scale` is the call's."""
        options = self._asdict()
        del options["sm_scale"]
        return options


def read_options(
    op: str, head_dim_qk: int, causal: bool, pos_encoding_mode: str, sm_scale: float | None, window_left: int,
    logits_soft_cap: float | None, rope_scale: float | None, rope_theta: float | None, has_mask: bool,
) -> Options:  # fmt: skip
    """Normalise the options; a custom mask replaces `causal`."""
    if pos_encoding_mode not in ("NONE", "ALIBI", "ROPE_LLAMA"):
        raise ArgumentError(
            f"{op}: pos_encoding_mode is {pos_encoding_mode!r}, expected 'NONE', 'ROPE_LLAMA' or 'ALIBI'"
        )
    check_rope(op, rope_scale, rope_theta)
    scale = 1.0 / math.sqrt(max(head_dim_qk, 1)) if sm_scale is None else float(sm_scale)
    return Options(
        bool(causal) and not has_mask, max(int(window_left), -1), max(float(logits_soft_cap or 0.0), 0.0), scale,
        pos_encoding_mode, rope_scale, rope_theta,
    )  # fmt: skip


def make_problem(
    op: str, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int, head_dim_vo: int | None, q_data_type: Any,
    kv_data_type: Any, o_data_type: Any, options: Options, paged: bool, has_mask: bool, on_cpu: bool,
    variant: Lowered | None = None, page_size: int = 0, backend: str = "auto", mappable: bool = True,
) -> Problem:  # fmt: skip
    """The problem of a plan, checked."""
    dtype = to_dtype(q_data_type)
    kv, out = (None if t is None or to_dtype(t) is dtype else to_dtype(t) for t in (kv_data_type, o_data_type))
    problem = Problem(
        num_qo_heads, num_kv_heads, head_dim_qk, head_dim_qk if head_dim_vo is None else head_dim_vo, dtype, paged,
        has_mask, options.pos_encoding_mode == "ALIBI", options.logits_soft_cap > 0, variant,
        options.pos_encoding_mode == "ROPE_LLAMA", kv, out, page_size, backend, mappable,
    )  # fmt: skip
    check_problem(op, problem, on_cpu)
    return problem


class Mask(NamedTuple):
    """A packed custom mask on the device of the work, and the byte offset of every request in it."""

    packed: View
    offsets: Ints  # int64 [batch + 1]


def pack_mask(
    op: str, custom_mask: Any, packed_custom_mask: Any, qo_len: Ints, kv_len: Ints, like: View
) -> Mask | None:
    """The custom mask in the kernel's form: bits little-endian, each request's ``[qo_len, kv_len]`` from a byte on."""
    if custom_mask is None and packed_custom_mask is None:
        return None
    bits = np.zeros(len(qo_len) + 1, np.int64)
    np.cumsum(qo_len * kv_len, out=bits[1:])
    offsets = np.zeros_like(bits)
    np.cumsum((np.diff(bits) + 7) // 8, out=offsets[1:])
    if custom_mask is None:
        packed = view(packed_custom_mask, op, "packed_custom_mask")
        check_ndim(op, "packed_custom_mask", packed, 1)
        check_dtype(op, "packed_custom_mask", packed, (uint8,))
        if packed.shape[0] < offsets[-1]:
            raise ShapeError(
                f"{op}: packed_custom_mask has {packed.shape[0]} bytes, expected {offsets[-1]} "
                "= sum((qo_len * kv_len + 7) // 8)"
            )
        if packed.is_cpu and not like.is_cpu:
            packed = _upload(np.ascontiguousarray(packed.numpy()[: offsets[-1]]), like)
    else:
        mask = view(custom_mask, op, "custom_mask")
        if mask.size != bits[-1]:
            raise ShapeError(f"{op}: custom_mask has {mask.size} elements, expected {bits[-1]} = sum(qo_len * kv_len)")
        if mask.is_cpu:
            host, _ = reference.quantization.segment_packbits(mask.numpy().reshape(-1), bits, "little")
            packed = view(host) if like.is_cpu else _upload(host, like)
        else:
            from fi_cupy.quantization import segment_packbits

            flat = custom_mask if mask.ndim == 1 else custom_mask.reshape(-1)
            packed = view(segment_packbits(flat, bits, "little")[0])
    check_inner(op, "packed_custom_mask", packed)
    check_device(op, like, custom_mask=packed)
    return Mask(packed, offsets)


def _upload(values: np.ndarray[Any, Any], like: View) -> View:
    made = like.empty(values.shape, uint8)
    copy_to_device(made.ptr, values, like.stream(), like.device)
    return made


def check_rows(op: str, name: str, x: View, shape: tuple[int, ...], dtype: DType, meaning: str) -> None:
    """Hold a 3-D array to the plan; GPU rows are read in pieces of 16 bytes, or of 8 where 16 do not divide a row."""
    if x.shape != shape:
        check_shape(op, name, x, shape, meaning)
    if x.dtype is not dtype:
        check_dtype(op, name, x, (dtype,), f"= {'q' if name == 'q' else 'kv'}_data_type of the plan")
    check_inner(op, name, x)
    check_aligned(op, name, x, row_alignment(dtype, shape[-1]))


def outputs(op: str, x: View, out: Any, lse: Any, return_lse: bool, p: Problem) -> tuple[View, View | None]:
    """The output and, where asked for, the log-sum-exp; float32 queries on the CPU keep their type."""
    shape = (x.shape[0], x.shape[1], p.head_dim_vo)
    o = output_view(op, "out", out, x, shape, p.out if x.dtype is p.dtype else x.dtype)
    if o.dtype.itemsize == 2:
        check_aligned(op, "out", o, 16)
    if not return_lse and lse is None:
        return o, None
    s = output_view(op, "lse", lse, x, shape[:2], float32)
    if not s.contiguous:
        raise ArgumentError(f"{op}: lse has strides {s.strides}, expected a contiguous array")
    return o, s


def refuse(op: str, **values: Any) -> None:
    """Raise `UnsupportedError` for arguments of FlashInfer that no kernel honours."""
    for name, value in values.items():
        if value is not None and value is not False and not (name.endswith("_len") and value == 0):
            raise UnsupportedError(f"{op}: {name} is not supported; leave it out")


def check_backend(op: str, backend: str) -> None:
    """Of an operation that has one implementation."""
    if backend not in ("auto", "fa2"):
        raise UnsupportedError(f"{op}: backend is {backend!r}, expected 'auto' (there is one implementation)")


def check_prefill_backend(op: str, backend: str, on_cpu: bool) -> None:
    """Raise for a backend that is not there: "fa2" is the portable kernel, "fa3" the Hopper kernel, "auto" chooses."""
    if backend not in ("auto", "fa2", "fa3"):
        raise UnsupportedError(f"{op}: backend is {backend!r}, expected 'auto', 'fa2' or 'fa3'")
    if backend == "fa3" and on_cpu:
        raise UnsupportedError(f"{op}: backend is 'fa3', the kernel of Hopper GPUs, but the arrays are on the CPU")


class Work(NamedTuple):
    """Where a schedule and its partial results lie on the device."""

    items: int
    num_items: int
    num_split: int  # tiles whose keys are split
    partial_o: int
    partial_md: int
    counters: int  # zero between launches: a word a slot and kv head (Geometry.num_counters)


#: (page, token, head) strides in elements of keys or values.
Strides = tuple[int, int, int]


def launch(
    g: Geometry, work: Work, x: View, k: View, v: View, k_strides: Strides, v_strides: Strides, o: View,
    s: View | None, options: Options, scales: Scales, *, kv_indices: int = 0, page_size: int = 1,
    mask: int = 0, sinks: int = 0, variant_values: tuple[Any, ...] = (), pdl: bool | None = False, kv_extent: int = 0,
) -> None:  # fmt: skip
    """Queue the kernel.

    `variant_values` are a variant's own parameters; `kv_extent` is the tokens of contiguous k and v, or their pages.
    """
    if not work.num_items:
        return
    values = launch_values(
        g, work, x, k, v, k_strides, v_strides, o, s, options, scales, kv_indices, page_size, mask, sinks
    )
    more: tuple[Any, ...] = ()
    if options.pos_encoding_mode == "ROPE_LLAMA":
        more = rope_turns(x.shape[2], options.rope_scale, options.rope_theta)
    elif g.hopper is not None:
        q = x.ptr if x.shape[0] else work.items  # an empty array has no address, which a map must have
        encoded, numbers = map_values(
            g.hopper, x.dtype.name, q, x.shape[0], x.strides, g.group, g.num_kv_heads, k.ptr, v.ptr, k_strides,
            v_strides, kv_extent, page_size if g.paged else 0,
        )  # fmt: skip
        more = *encoded, work.num_items, *numbers
    g.kernel(options.sm_scale * scales.logit, x.device, scales.on_logits).launch(
        g.grid(work.num_items), x.stream(), *values, *more, *variant_values, pdl=pdl
    )  # fmt: skip


def launch_values(
    g: Geometry, work: Work, x: View, k: View, v: View, k_strides: Strides, v_strides: Strides, o: View,
    s: View | None, options: Options, scales: Scales, kv_indices: int, page_size: int, mask: int, sinks: int,
) -> tuple[Any, ...]:  # fmt: skip
    """The fields of the portable kernel's PARAMS, with which every kernel's begin."""
    return (
        x.ptr, k.ptr, v.ptr, o.ptr, 0 if s is None else s.ptr, work.items, kv_indices, mask, sinks,
        work.partial_o, work.partial_md, work.counters,
        x.strides[0], x.strides[1], *k_strides, *v_strides, o.strides[0], o.strides[1],
        *fast_div(g.group), *fast_div(page_size), x.shape[1], options.causal,
        min(options.window_left, NO_WINDOW) if options.window_left >= 0 else NO_WINDOW,
        *scale_floats(options.sm_scale * scales.logit, scales.output, options.logits_soft_cap), *scales.kernel_values(),
    )  # fmt: skip


def check_planned(op: str, name: str, value: Any, default: Any, planned: Any) -> None:
    """Raise `PlanError` for a run-time option that contradicts the plan."""
    if value != default and value != planned:
        raise PlanError(f"{op}: {name} is {value}, planned {planned}; pass it to plan()")
