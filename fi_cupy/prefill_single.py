"""Prefill attention of one request over contiguous keys: no plan object; schedules are made once and kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_ndim, check_shape
from fi_cupy.choice_log import log_call, logging_choices
from fi_cupy.device import DeviceInfo, device_info
from fi_cupy.dtypes import FLOAT_TYPES, FP8_TYPES, float8_e4m3fn, float32, int32
from fi_cupy.errors import ArgumentError
from fi_cupy.kv_cache import as_fp8, check_layout
from fi_cupy.plan.prefill import PrefillPlan, plan_prefill
from fi_cupy.prefill_hopper import load_of, mappable
from fi_cupy.prefill_kernel import Geometry, Problem, geometry
from fi_cupy.prefill_plan import (
    Mask,
    Options,
    Strides,
    Work,
    check_prefill_backend,
    check_rows,
    launch,
    make_problem,
    pack_mask,
    read_options,
    refuse,
)
from fi_cupy.scales import Scales, read_scales
from fi_cupy.workspace import ScratchPool

if TYPE_CHECKING:
    from fi_cupy.variants import AttentionVariant, BoundVariant

_OP = "single_prefill_with_kv_cache"
#: Partial results of split tiles, one set a (device, stream): calls on one stream run one after the other.
_scratch = ScratchPool()
#: Schedules on the device, least recently used first; a schedule is 64 bytes a tile.
_schedules: OrderedDict[tuple[Any, ...], tuple[Any, int, PrefillPlan]] = OrderedDict()
_MOST_SCHEDULES = 1024
_captured: dict[int, Any] = {}  # schedules that CUDA graphs read, by their id: kept for good
_lock = threading.Lock()


def single_prefill_with_kv_cache(
    q: Any,
    k: Any,
    v: Any,
    scale_q: Any = None,
    scale_k: Any = None,
    scale_v: Any = None,
    o_dtype: Any = None,
    custom_mask: Any = None,
    packed_custom_mask: Any = None,
    causal: bool = False,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_fp16_qk_reduction: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    backend: str = "auto",
    return_lse: bool = False,
    kv_cache_sf: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    *,
    variant: AttentionVariant | None = None,
    variant_args: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {}),
) -> Any:
    """Attention of one request: ``softmax(mask(sm_scale * q k^T)) v``.

    Parameters
    ----------
    q : array, [qo_len, num_qo_heads, head_dim_qk], float16, bfloat16 or fp8 (the CPU takes float32, too)
        uint8 is bytes of float8_e4m3fn. Head dims are multiples of 8 up to 256. Rows and heads may be strided
        (multiples of 16 bytes, or of 8 for fp8 rows that 16 does not divide).
    k : array, [kv_len, num_kv_heads, head_dim_qk] (NHD) or [num_kv_heads, kv_len, head_dim_qk] (HND)
        The type of `q`, or an fp8 type; uint8 is bytes of float8_e4m3fn.
    v : array, as `k` with head_dim_vo, which may differ
    scale_q, scale_k, scale_v : float32 arrays, [num_qo_heads], [num_kv_heads], [num_kv_heads], optional
        Dequantisation factors a head (numbers will do): the first two multiply `sm_scale`, the last the output.
    o_dtype : dtype, optional
        Default: that of `q`; any 16-bit float, fp8 (saturating) or float32.
    custom_mask : bool array, [qo_len, kv_len], optional
        True = visible; replaces `causal`, and the window still applies.
    packed_custom_mask : uint8 array, optional
        The same, row-major little-endian bits.
    causal : bool
        Query i sees keys up to ``kv_len - qo_len + i``; qo_len > kv_len is an error here.
    kv_layout : "NHD" or "HND"
    pos_encoding_mode : "NONE", "ALIBI" or "ROPE_LLAMA"
        ROPE_LLAMA rotates halves of q and k, query i at position ``kv_len - qo_len + i``; head_dim_qk a multiple of 16.
    use_fp16_qk_reduction : bool
        A hint that FlashInfer takes for speed; products are summed in fp32 here.
    sm_scale : float, optional
        Default ``1 / sqrt(head_dim_qk)``.
    window_left : int
        Keys to the left of the query's own that are seen; -1: all.
    logits_soft_cap : float, optional
        ``cap * tanh(logit / cap)``; None or <= 0 is off.
    rope_scale, rope_theta : float, optional
        For ROPE_LLAMA.
    backend : "auto", "fa2" (the portable kernel) or "fa3" (the Hopper kernel; UnsupportedError where it does not fit)
    return_lse : bool
    k_scale, v_scale : float or float32 array [num_kv_heads], optional
        Other names of scale_k and scale_v.
    variant : AttentionVariant, optional
        See `fi_cupy.jit.define_variant`; `causal` and the mask arguments count here, not its `mask_mode`.
    variant_args : (tuple, mapping)
        The variant's tensors and scalars in the order of their declaration, and by name.

    Returns
    -------
    out [qo_len, num_qo_heads, head_dim_vo], or (out, lse float32 [qo_len, num_qo_heads], base 2)

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, LayoutError, DeviceError, UnsupportedError

    Source
    ------
    flashinfer.prefill.single_prefill_with_kv_cache; Dao 2023 (FlashAttention-2).

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> q, k = np.ones((5, 8, 64), np.float32), np.ones((9, 2, 64), np.float32)
    >>> fi_cupy.prefill.single_prefill_with_kv_cache(q, k, k, causal=True).shape
    (5, 8, 64)
    """
    given = dict(locals()) if logging_choices() else None
    refuse(_OP, kv_cache_sf=kv_cache_sf)
    for name, one, other in (("k", scale_k, k_scale), ("v", scale_v, v_scale)):
        if one is not None and other is not None:
            raise ArgumentError(f"{_OP}: scale_{name} and {name}_scale name the same thing, expected one")
    c = prepare(
        _OP, q, k, v, o_dtype, custom_mask, packed_custom_mask, causal, kv_layout, pos_encoding_mode, sm_scale,
        window_left, logits_soft_cap, rope_scale, rope_theta, return_lse, scale_q,
        k_scale if scale_k is None else scale_k, v_scale if scale_v is None else scale_v, variant, variant_args,
        backend,
    )  # fmt: skip
    if c.x.is_cpu:
        run_on_cpu(c, kv_layout)
    else:
        device = device_info(c.x.device)
        g, work = schedule(c, device)
        launch(
            g, work, c.x, c.k, c.v, *c.strides, c.o, c.s, c.options, c.scales,
            mask=0 if c.mask is None else c.mask.packed.ptr, pdl=None,
            variant_values=() if c.bound is None else c.bound.kernel_values(), kv_extent=c.kv_len,
        )  # fmt: skip
    if given is not None:
        log_call(single_prefill_with_kv_cache, given)
    return c.result()


single_prefill_with_kv_cache_return_lse = partial(single_prefill_with_kv_cache, return_lse=True)


class Call(NamedTuple):
    """The checked arguments of one call."""

    x: View
    k: View
    v: View
    strides: tuple[Strides, Strides]  # of k and v
    o: View
    s: View | None
    problem: Problem
    options: Options
    bound: BoundVariant | None
    mask: Mask | None
    scales: Scales
    kv_len: int

    def result(self) -> Any:
        """What the function returns."""
        return self.o.result() if self.s is None else (self.o.result(), self.s.result())


def prepare(
    op: str, q: Any, k: Any, v: Any, o_dtype: Any = None, custom_mask: Any = None, packed_custom_mask: Any = None,
    causal: bool = False, kv_layout: str = "NHD", pos_encoding_mode: str = "NONE", sm_scale: float | None = None,
    window_left: int = -1, logits_soft_cap: float | None = None, rope_scale: float | None = None,
    rope_theta: float | None = None, return_lse: bool = False, scale_q: Any = None,
    scale_k: Any = None, scale_v: Any = None, variant: AttentionVariant | None = None,
    variant_args: tuple[tuple[Any, ...], Mapping[str, Any]] = ((), {}), backend: str = "auto",
) -> Call:  # fmt: skip
    """Check the arguments of `single_prefill_with_kv_cache` and make its outputs."""
    x, kx, vx = (as_fp8(view(y, op, n), float8_e4m3fn) for n, y in (("q", q), ("k", k), ("v", v)))
    check_prefill_backend(op, backend, x.is_cpu)
    hnd = check_layout(op, kv_layout) == "HND"
    for name, y in (("q", x), ("k", kx), ("v", vx)):
        check_ndim(op, name, y, 3)
    check_dtype(op, "q", x, (*FLOAT_TYPES, *FP8_TYPES))
    check_device(op, x, k=kx, v=vx)
    (qo_len, heads, dim_qk), dim_vo = x.shape, vx.shape[2]
    kv_heads, kv_len = kx.shape[not hnd], kx.shape[hnd]
    has_mask = custom_mask is not None or packed_custom_mask is not None
    options = read_options(
        op, dim_qk, causal, pos_encoding_mode, sm_scale, window_left, logits_soft_cap, rope_scale, rope_theta, has_mask
    )
    scales = read_scales(op, x, heads, kv_heads, scale_q, scale_k, scale_v, ("scale_q", "scale_k", "scale_v"))
    bound = None
    if variant is not None:
        bound = variant.bind(op, *variant_args, x, sm_scale=options.sm_scale, logit_scale=scales.logit)
    problem = make_problem(
        op, heads, kv_heads, dim_qk, dim_vo, x.dtype, kx.dtype, o_dtype, options, False, has_mask, x.is_cpu,
        None if bound is None else bound.lowered, backend=backend, mappable=mappable(x, kx, vx),
    )  # fmt: skip
    if options.causal and qo_len > kv_len:
        raise ArgumentError(f"{op}: qo_len is {qo_len} with causal=True, expected at most kv_len = {kv_len}")
    check_rows(op, "q", x, (qo_len, heads, dim_qk), x.dtype, "")
    check_rows(op, "k", kx, (*kx.shape[:2], dim_qk), kx.dtype, "= [.., .., q.shape[-1]]")
    check_rows(op, "v", vx, (*kx.shape[:2], dim_vo), kx.dtype, "= [*k.shape[:2], head_dim_vo]")
    if custom_mask is not None:
        check_shape(op, "custom_mask", view(custom_mask, op, "custom_mask"), (qo_len, kv_len), "= (qo_len, kv_len)")
    mask = pack_mask(op, custom_mask, packed_custom_mask, np.array([qo_len]), np.array([kv_len]), x)
    o = x.empty((qo_len, heads, dim_vo), problem.out)
    s = x.empty((qo_len, heads), float32) if return_lse else None
    strides = [(0, y.strides[hnd], y.strides[not hnd]) for y in (kx, vx)]
    return Call(x, kx, vx, (strides[0], strides[1]), o, s, problem, options, bound, mask, scales, kv_len)


def run_on_cpu(c: Call, kv_layout: str) -> None:
    """The NumPy reference."""
    values, lse = reference.attention.single_prefill(
        c.x.numpy(), c.k.numpy(), c.v.numpy(), kv_layout=kv_layout, sm_scale=c.options.sm_scale * c.scales.logit,
        **c.scales.reference(), out_dtype=c.o.dtype.np,
        packed_custom_mask=None if c.mask is None else c.mask.packed.numpy(), variant=c.bound,
        params=None if c.bound is None else c.bound.params(), **c.options.reference(),
    )  # fmt: skip
    c.o.write(values)
    if c.s is not None and lse is not None:
        c.s.write(lse)


def geometry_of(c: Call, device: DeviceInfo, rows: int = 0) -> Geometry:
    """The kernels of a call; with `rows` the portable one's for so many packed rows."""
    qo_len, options = c.x.shape[0], c.options
    group = c.problem.num_qo_heads // c.problem.num_kv_heads
    if rows:
        return geometry(c.problem._replace(backend="fa2"), rows, device)
    load = load_of(1, group, qo_len, c.kv_len, options.causal, options.window_left)
    return geometry(c.problem, qo_len * group, device, load)


def schedule(c: Call, device: DeviceInfo, rows: int = 0) -> tuple[Geometry, Work]:
    """The kernels, and the schedule on the device: from the cache, or made and uploaded.

    `rows`: choose the portable kernel's tile for so many packed rows, not for those of the call.
    """
    x, qo_len, options = c.x, c.x.shape[0], c.options
    g = geometry_of(c, device, rows)
    stream = x.stream()
    mask_key, narrow = (None, None) if c.bound is None else c.bound.narrow()
    key = (x.device, g, qo_len, c.kv_len, options.causal, options.window_left, mask_key)
    with _lock:
        found = _schedules.get(key)
        if found is None:
            found = _make(g, options, x, qo_len, c.kv_len, stream, key, narrow)
        else:
            _schedules.move_to_end(key)
            _keep_if_captured(found[0], stream)
    _, address, plan = found
    partial_o = partial_md = counters = 0
    if plan.num_slots or g.hopper is not None:
        layout = g.workspace(plan.num_slots)
        base, counters = _scratch.get(x, stream, layout.size, g.num_counters(plan.num_slots))
        partial_o, partial_md = base + layout.offsets["partial_o"], base + layout.offsets["partial_md"]
    return g, Work(address, len(plan.items), plan.num_split, partial_o, partial_md, counters)


def _keep_if_captured(memory: Any, stream: int) -> None:
    """Keep a schedule that a graph being captured on `stream` reads, whatever becomes of the cache."""
    from cupy.cuda import runtime

    if id(memory) not in _captured and runtime.streamIsCapturing(stream):
        _captured[id(memory)] = memory


def _drop_half() -> None:
    """Drop the schedules that were used least recently, once nothing that still runs reads them."""
    import cupy

    oldest = list(_schedules)[: _MOST_SCHEDULES // 2]
    for index in {key[0] for key in oldest}:
        with cupy.cuda.Device(index):
            cupy.cuda.runtime.deviceSynchronize()
    for key in oldest:
        del _schedules[key]


def _make(
    g: Geometry, options: Options, x: View, qo_len: int, kv_len: int, stream: int, key: tuple[Any, ...],
    narrow: Callable[..., Any] | None,
) -> tuple[Any, int, PrefillPlan]:  # fmt: skip
    import cupy
    from cupy.cuda import runtime

    plan = plan_prefill(
        np.array([0, qo_len]), np.array([kv_len]), np.array([0]), group=g.group, num_kv_heads=g.num_kv_heads,
        tile_q=g.tiles.tile_q, tile_kv=g.tiles.tile_kv, slots=g.slots, causal=options.causal,
        window_left=options.window_left, mask_offsets=np.array([0]), disable_split=not g.splittable, narrow=narrow,
        align_end=g.hopper is not None and options.causal, split_tail=g.split_tail(),
    )  # fmt: skip
    rows = plan.items.reshape(-1)
    with cupy.cuda.Device(x.device):
        pinned = cupy.cuda.alloc_pinned_memory(max(rows.nbytes, 16))
        np.frombuffer(pinned, np.int32, rows.size)[:] = rows
        capturing = runtime.streamIsCapturing(stream)
        # In a capture the copy becomes part of the graph, which reads the pinned memory at each replay.
        memory = x.empty((rows.size,), int32).array if capturing else cupy.empty(max(rows.size, 4), np.int32)
        address = view(memory, _OP, "schedule").ptr
        runtime.memcpyAsync(address, pinned.ptr, rows.nbytes, 1, stream)  # 1: host to device
        if capturing:
            _captured[id(memory)] = pinned, memory
            return memory, address, plan
        runtime.streamSynchronize(stream)  # once a schedule: any stream may use it from here on
    if len(_schedules) >= _MOST_SCHEDULES:
        _drop_half()
    _schedules[key] = memory, address, plan
    return _schedules[key]
