"""The front door to attention: every wrapper by name, mixed batches, attention sinks, and which kernel a call takes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partialmethod
from typing import Any, NamedTuple

import numpy as np

from fi_cupy import mixed
from fi_cupy.arrays import view
from fi_cupy.batch_attention import BatchAttention
from fi_cupy.cascade_attention import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    MultiLevelCascadeAttentionWrapper,
)
from fi_cupy.decode import (
    BatchDecodeWithPagedKVCacheWrapper,
    CUDAGraphBatchDecodeWithPagedKVCacheWrapper,
    single_decode_with_kv_cache,
)
from fi_cupy.decode_single import _geometry as single_decode_geometry
from fi_cupy.device import DeviceInfo, device_info
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.dtypes import float8_e4m3fn
from fi_cupy.errors import ArgumentError, PlanError
from fi_cupy.kv_cache import as_fp8
from fi_cupy.plan.decode import TILE, single_chunks
from fi_cupy.plan.mixed import grid
from fi_cupy.plan.prefill import plan_prefill
from fi_cupy.pod import PODWithPagedKVCacheWrapper
from fi_cupy.prefill import (
    BatchPrefillWithPagedKVCacheWrapper,
    BatchPrefillWithRaggedKVCacheWrapper,
    single_prefill_with_kv_cache,
    single_prefill_with_kv_cache_return_lse,
)
from fi_cupy.prefill_batch import BatchPrefill
from fi_cupy.prefill_hopper import load_of, mappable
from fi_cupy.prefill_kernel import Geometry, geometry
from fi_cupy.prefill_plan import Work, make_problem, read_options
from fi_cupy.scales import read_scales
from fi_cupy.sparse import BlockSparseAttentionWrapper, VariableBlockSparseAttentionWrapper

__all__ = [
    "BatchAttention", "BatchAttentionWithAttentionSinkWrapper", "BatchDecodeWithPagedKVCacheWrapper",
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper",
    "BatchPrefillWithRaggedKVCacheWrapper", "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "BlockSparseAttentionWrapper", "CUDAGraphBatchDecodeWithPagedKVCacheWrapper", "Explanation", "KernelUse",
    "MultiLevelCascadeAttentionWrapper", "PODWithPagedKVCacheWrapper", "VariableBlockSparseAttentionWrapper", "explain",
    "single_decode_with_kv_cache", "single_prefill_with_kv_cache", "single_prefill_with_kv_cache_return_lse",
]  # fmt: skip

#: Parameters of the paged prefill wrapper's plan in their order.
_PLAN_NAMES = tuple(inspect.signature(BatchPrefillWithPagedKVCacheWrapper.plan).parameters)[1:]


class BatchAttentionWithAttentionSinkWrapper(BatchPrefillWithPagedKVCacheWrapper):
    """`BatchPrefillWithPagedKVCacheWrapper` with attention sinks: a logit a head that joins the denominator only.

    Parameters
    ----------
    float_workspace_buffer, ..., mask_indptr_buf, backend
        As in `BatchPrefillWithPagedKVCacheWrapper`.
    pos_encoding_mode, q_data_type, kv_data_type, head_dim_qk, head_dim_vo, window_left
        What `plan` takes where it is not told; it must not be told otherwise.
    use_fp16_qk_reduction : bool
        A hint that FlashInfer takes for speed; products are summed in fp32 here.

    Source
    ------
    flashinfer.attention.BatchAttentionWithAttentionSinkWrapper.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.BatchAttentionWithAttentionSinkWrapper(
    ...     np.empty(1 << 20, np.uint8), q_data_type="float32", kv_data_type="float32", head_dim_qk=64, head_dim_vo=64)
    >>> wrapper.plan([0, 7], [0, 2], [5, 1], [3], 8, 2, 64, 16, causal=True)
    >>> q, cache = np.ones((7, 8, 64), np.float32), np.ones((6, 2, 16, 2, 64), np.float32)
    >>> wrapper.run(q, cache, np.zeros(8, np.float32), 0.125).shape
    (7, 8, 64)
    """

    _op = "BatchAttentionWithAttentionSinkWrapper"

    def __init__(
        self,
        float_workspace_buffer: Any,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Any = None,
        paged_kv_indptr_buf: Any = None,
        paged_kv_indices_buf: Any = None,
        paged_kv_last_page_len_buf: Any = None,
        custom_mask_buf: Any = None,
        mask_indptr_buf: Any = None,
        backend: str = "auto",
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        q_data_type: Any = "bfloat16",
        kv_data_type: Any = "bfloat16",
        head_dim_qk: int = 128,
        head_dim_vo: int = 128,
        window_left: int = -1,
    ) -> None:
        super().__init__(
            float_workspace_buffer, kv_layout, use_cuda_graph, qo_indptr_buf, paged_kv_indptr_buf, paged_kv_indices_buf,
            paged_kv_last_page_len_buf, custom_mask_buf, mask_indptr_buf, backend,
        )  # fmt: skip
        self._defaults = {
            "pos_encoding_mode": pos_encoding_mode, "q_data_type": to_dtype(q_data_type),
            "kv_data_type": to_dtype(kv_data_type), "head_dim_qk": head_dim_qk, "head_dim_vo": head_dim_vo,
            "window_left": max(window_left, -1),
        }  # fmt: skip

    def _complete(self, op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """A plan's arguments, the first eight by position, with what the constructor said."""
        given = {**dict(zip(_PLAN_NAMES, args, strict=False)), **kwargs}
        for name, default in self._defaults.items():
            value = given.get(name)
            if value is not None and name.endswith("data_type"):
                value = to_dtype(value)
            if value is not None and value != default:
                raise PlanError(f"{op}: {name} is {value}, the constructor said {default}")
            given[name] = default
        missing = [name for name in _PLAN_NAMES[:8] if name not in given]
        if missing:
            raise ArgumentError(f"{op}: {', '.join(missing)} missing")
        return [given.pop(name) for name in _PLAN_NAMES[:8]], given

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """Make the schedule, with the arguments of `BatchPrefillWithPagedKVCacheWrapper.plan`.

        The types, head_dim_vo, window and position encoding may be left out: the constructor has them.
        """
        first, options = self._complete(f"{self._op}.plan", args, kwargs)
        super().plan(*first, **options)

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(float bytes, int bytes) that `plan` with these arguments needs; the wrapper owns the integer part."""
        first, options = self._complete(f"{self._op}.workspace_size", args, kwargs)
        return super().workspace_size(*first, **options)

    begin_forward = plan

    def run(  # type: ignore[override]
        self,
        q: Any,
        paged_kv_cache: Any,
        sink: Any = None,
        sm_scale: float | None = None,
        *,
        sinks: Any = None,
        q_scale: Any = None,
        **options: Any,
    ) -> Any:
        """Attention of the planned batch.

        Parameters
        ----------
        q, paged_kv_cache
            As in `BatchPrefillWithPagedKVCacheWrapper.run`.
        sink : float32 array, [num_qo_heads]
            Raw logits, not scaled by `sm_scale`; `sinks` is another name of it.
        sm_scale : float, optional
            Default: that of the plan.
        q_scale, **options
            Further keywords of `BatchPrefillWithPagedKVCacheWrapper.run`.

        Returns
        -------
        out, or (out, lse) with `return_lse`; the lse includes the sinks

        Raises
        ------
        ArgumentError, PlanError, ShapeError, DTypeError, LayoutError, DeviceError, UnsupportedError
        """
        op = f"{self._op}.run"
        if (sink is None) == (sinks is None):
            raise ArgumentError(f"{op}: sink is {'missing' if sink is None else 'given twice'}, expected one array")
        if self._planned is None:
            raise PlanError(f"{op}: plan() must come first")
        if sm_scale is not None:
            planned = self._planned.options.sm_scale
            if planned == 0 != sm_scale:
                raise PlanError(f"{op}: sm_scale is {sm_scale}, planned 0; pass it to plan()")
            if isinstance(q_scale, (list, tuple)):
                q_scale = np.asarray(q_scale, np.float32)
            q_scale = (1.0 if q_scale is None else q_scale) * (sm_scale / planned if planned else 1.0)
        return super().run(q, paged_kv_cache, sinks=sink if sinks is None else sinks, q_scale=q_scale, **options)

    run_return_lse = partialmethod(run, return_lse=True)


class KernelUse(NamedTuple):
    """One launch of a call."""

    part: str  # which part of the call: a level, a group of requests
    kernel: str  # the symbol that profilers show, or "NumPy reference"
    grid: tuple[int, int, int]  # CTAs; (0, 0, 0) on the CPU
    threads: int
    smem_bytes: int
    why: str


@dataclass(frozen=True)
class Explanation:
    """The launches of a call in their order; ``str`` says them in a line each."""

    launches: tuple[KernelUse, ...]

    def __str__(self) -> str:
        lines = []
        for use in self.launches:
            part = f"{use.part}: " if use.part else ""
            where = f" <<<{'x'.join(map(str, use.grid))}, {use.threads}, {use.smem_bytes} B>>>" if use.threads else ""
            lines.append(f"{part}{use.kernel}{where} {use.why}".rstrip())
        return "\n".join(lines)


def explain(call: Any, *args: Any, device: DeviceInfo | None = None, **kwargs: Any) -> Explanation:
    """Which kernels a call launches, and why.

    Parameters
    ----------
    call : a wrapper after its `plan`, or one of the `single_*` functions
    *args, **kwargs
        With a function: what it would be called with. Nothing is computed.
    device : DeviceInfo, optional
        With a function: explain for this GPU instead of the arrays' own device.

    Returns
    -------
    Explanation
        Of the attention launches; a cascade merges its levels with `fi_cupy.cascade.merge_state_in_place` besides.

    Raises
    ------
    PlanError
        The wrapper has no plan.
    ArgumentError
        `call` is nothing that computes attention.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> from fi_cupy.attention import explain
    >>> hopper = fi_cupy.device.DeviceInfo(90, "90a", 132, 232448, 233472, 50 << 20)
    >>> q, k = np.ones((2048, 32, 128), np.float16), np.ones((2048, 8, 128), np.float16)
    >>> explain(fi_cupy.single_prefill_with_kv_cache, q, k, k, causal=True, device=hopper).launches[0].kernel
    'prefill_hopper_f16_d128_q192k80'
    """
    if hasattr(call, "_parts"):
        parts = call._parts()
        if not parts:
            raise PlanError(f"explain: {type(call).__name__} has no plan yet")
        launches = [
            use._replace(part=f"{name}; {use.part}".rstrip("; ")) for name, w in parts for use in explain(w).launches
        ]
        return Explanation(tuple(launches))
    if isinstance(call, BatchAttention):
        return _explain_batch(call)
    if isinstance(call, PODWithPagedKVCacheWrapper):
        return _explain_pod(call)
    if isinstance(call, BatchDecodeWithPagedKVCacheWrapper):
        return _explain_decode(call)
    if isinstance(call, BatchPrefill):
        return _explain_prefill(call)
    if call is single_decode_with_kv_cache:
        return _explain_single(call, args, kwargs, device, _single_decode)
    if call in (single_prefill_with_kv_cache, single_prefill_with_kv_cache_return_lse):
        return _explain_single(call, args, kwargs, device, _single_prefill)
    raise ArgumentError(f"explain: got {call!r}, expected a planned wrapper of fi_cupy or a single_* function")


_ON_CPU = Explanation((KernelUse("", "NumPy reference", (0, 0, 0), 0, 0, "(arrays in host memory)"),))


def _explain_decode(wrapper: BatchDecodeWithPagedKVCacheWrapper) -> Explanation:
    p = wrapper._planned
    if p is None:
        raise PlanError(f"explain: {type(wrapper).__name__} has no plan yet")
    if wrapper.device < 0:
        return _ON_CPU
    if wrapper._by_prefill is not None:
        return _since(wrapper._why_prefill, _explain_prefill(wrapper._by_prefill))
    items = p.grid // max(p.geometry.num_head_blocks, 1)
    fixed = " (the fixed number of a captured graph)" if wrapper.is_cuda_graph_enabled else ""
    why = (
        f"one query a request: {p.batch_size} requests in {items} ranges of keys{fixed} times "
        f"{p.geometry.num_head_blocks} blocks of at most {p.geometry.heads_per_block} query heads, on "
        f"{p.geometry.slots} CTA slots; the last CTA of a split request merges"
    )
    spec = p.kernel.spec
    return Explanation((KernelUse("", spec.symbol, (p.grid, 1, 1), spec.threads, spec.smem_bytes, why),))


def _mixed_launch(
    g: mixed.Geometry, scale: float, tiles: Work, num_items: int, head_scales: bool = False
) -> KernelUse:  # fmt: skip
    spec = g.heads_spec if head_scales else g.spec if scale > 0 else g.negative_spec
    num_head_blocks = g.decode.num_head_blocks
    tasks = tiles.num_items * g.prefill.num_kv_heads, num_items * num_head_blocks
    ctas, tile_ctas = grid(g.slots, *tasks)
    why = (
        f"one launch: {tasks[0]} tiles of {g.prefill.tiles.tile_q} packed rows ({tiles.num_items} work items, "
        f"{tiles.num_split} row tiles split, times {g.prefill.num_kv_heads} kv heads) and {tasks[1]} decode items "
        f"({num_items} ranges of keys times {num_head_blocks} head blocks) in two queues; {tile_ctas} CTAs begin with "
        f"a tile, {ctas - tile_ctas} with a decode item"
    )
    return KernelUse("", spec.symbol, (ctas, 1, 1), spec.threads, spec.smem_bytes, why)


def _explain_batch(wrapper: BatchAttention) -> Explanation:
    batch = wrapper._batch
    if batch is None or batch._planned is None:
        raise PlanError("explain: BatchAttention has no plan yet")
    both = batch.both
    if both is None:
        return _explain_prefill(batch)
    return Explanation(
        (_mixed_launch(both.geometry, batch._planned.options.sm_scale, both.tiles, both.num_items),)
    )  # fmt: skip


def _explain_pod(wrapper: PODWithPagedKVCacheWrapper) -> Explanation:
    decode = wrapper._decode
    (part,) = _explain_decode(decode).launches
    made, p = wrapper._launched, decode._planned
    if made is None or p is None:  # no run yet, or on the CPU
        return Explanation((part._replace(part="decode part, to which run() adds the prompt"),))
    if made.mixed is not None:
        num_items = p.grid // p.geometry.num_head_blocks
        return Explanation((_mixed_launch(made.mixed, made.scale, made.work, num_items, made.head_scales),))
    spec = made.prefill.spec if made.scale > 0 else made.prefill.negative_spec
    spec = made.prefill.heads_spec if made.head_scales else spec
    (prompt,) = _prefill_launch(made.prefill, spec, made.work.num_items, made.work.num_split).launches
    why = f"a launch of its own, since {made.why}; {prompt.why}"
    return Explanation((prompt._replace(part="prompt", why=why), part._replace(part="decode part")))


def _explain_prefill(wrapper: BatchPrefill) -> Explanation:
    p = wrapper._planned
    if p is None:
        raise PlanError(f"explain: {type(wrapper).__name__} has no plan yet")
    if wrapper.device < 0:
        return _ON_CPU
    spec = p.geometry.kernel(p.options.sm_scale, wrapper.device).spec
    fixed = " (the fixed number of a captured graph)" if wrapper.is_cuda_graph_enabled else ""
    return _prefill_launch(p.geometry, spec, p.work.num_items, p.work.num_split, fixed)


def _prefill_launch(g: Geometry, spec: Any, num_items: int, num_split: int, fixed: str = "") -> Explanation:
    why = (
        f"{num_items} work items{fixed} of {g.tiles.tile_q} packed rows (query tokens times {g.group} heads a kv head) "
        f"and tiles of {g.tiles.tile_kv} keys, times {g.num_kv_heads} kv heads, on {g.slots} CTA slots; {g.choice}"
    )
    if num_split:
        why += f"; {num_split} row tiles have their keys split to fill the device, the last CTA of a tile writes it"
    return Explanation((KernelUse("", spec.symbol, g.grid(num_items), spec.threads, spec.smem_bytes, why),))


def _explain_single(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], device: DeviceInfo | None,
    of: Callable[[dict[str, Any], DeviceInfo], Explanation],
) -> Explanation:  # fmt: skip
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if device is None:
        q = view(given["q"], "explain", "q")
        if q.is_cpu:
            return _ON_CPU
        device = device_info(q.device)
    return of(given, device)


def _single_decode(given: dict[str, Any], device: DeviceInfo) -> Explanation:
    q, k = (as_fp8(view(given[name], "explain", name), float8_e4m3fn) for name in "qk")
    hnd = given["kv_layout"] == "HND"
    kv_len, kv_heads = k.shape[hnd], k.shape[not hnd]
    scales = read_scales("explain", q, q.shape[0], kv_heads, given["q_scale"], given["k_scale"])
    cap = (given["logits_soft_cap"] or 0.0) > 0
    g, why = single_decode_geometry(
        *q.shape[:1], kv_heads, q.shape[1], q.dtype, k.dtype, cap, given["pos_encoding_mode"], device
    )
    if g is None:
        absent = dict.fromkeys(("custom_mask", "packed_custom_mask", "o_dtype", "scale_q", "scale_k"))
        token = {"q": given["q"][None], "causal": False, "backend": "auto"}
        return _since(why, _single_prefill({**given, **absent, **token}, device))
    window = given["window_left"]
    first = max(kv_len - 1 - window, 0) if window >= 0 else 0
    _, chunks = single_chunks(kv_len - first // TILE * TILE, g.num_head_blocks, g.slots)
    why = f"{chunks} ranges of keys times {g.num_head_blocks} head blocks, on {g.slots} CTA slots"
    grid = (chunks * g.num_head_blocks, 1, 1)
    spec = g.heads_spec if scales.on_logits else g.spec
    return Explanation((KernelUse("", spec.symbol, grid, spec.threads, spec.smem_bytes, why),))


def _since(why: str, by_prefill: Explanation) -> Explanation:
    """A decode call that takes the prefill kernel."""
    first, *rest = by_prefill.launches
    return Explanation((first._replace(why=f"the prefill kernel, since {why}: {first.why}"), *rest))


def _single_prefill(given: dict[str, Any], device: DeviceInfo) -> Explanation:
    q, k, v = (as_fp8(view(given[name], "explain", name), float8_e4m3fn) for name in "qkv")
    hnd = given["kv_layout"] == "HND"
    qo_len, heads, dim = q.shape
    kv_len, kv_heads = k.shape[hnd], k.shape[not hnd]
    has_mask = given["custom_mask"] is not None or given["packed_custom_mask"] is not None
    options = read_options(
        "explain", dim, given["causal"], given["pos_encoding_mode"], given["sm_scale"], given["window_left"],
        given["logits_soft_cap"], given["rope_scale"], given["rope_theta"], has_mask,
    )  # fmt: skip
    problem = make_problem(
        "explain", heads, kv_heads, dim, v.shape[2], q.dtype, k.dtype, given["o_dtype"], options, False, has_mask,
        False, backend=given["backend"], mappable=mappable(q, k, v),
    )  # fmt: skip
    k_scale = given["scale_k"] if given["scale_k"] is not None else given["k_scale"]
    narrow, variant = None, given.get("variant")
    if variant is not None:
        bound = variant.bind("explain", *given["variant_args"], q, sm_scale=options.sm_scale)
        problem, narrow = problem._replace(variant=bound.lowered), bound.narrow()[1]
    scales = read_scales("explain", q, heads, kv_heads, given["scale_q"], k_scale)
    g = geometry(
        problem, qo_len * heads // kv_heads, device,
        load_of(1, heads // kv_heads, qo_len, kv_len, options.causal, options.window_left),
    )  # fmt: skip
    spec = g.spec if options.sm_scale * scales.logit > 0 else g.negative_spec
    spec = g.heads_spec if scales.on_logits else spec
    schedule = plan_prefill(
        np.array([0, qo_len]), np.array([kv_len]), np.array([0]), group=g.group, num_kv_heads=g.num_kv_heads,
        tile_q=g.tiles.tile_q, tile_kv=g.tiles.tile_kv, slots=g.slots, causal=options.causal,
        window_left=options.window_left, disable_split=not g.splittable, narrow=narrow,
        align_end=g.hopper is not None and options.causal, split_tail=g.split_tail(),
    )  # fmt: skip
    return _prefill_launch(g, spec, len(schedule.items), schedule.num_split)
