"""Mixture of experts: routing, and the experts' gated feed-forward layers as grouped products without a host's look."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from functools import lru_cache
from typing import Any

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import as_sizes, check_aligned, check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.device import device_info
from fi_cupy.dtypes import (
    FLOAT_TYPES,
    HALF_TYPES,
    INDEX_TYPES,
    DType,
    bfloat16,
    float8_e4m3fn,
    float16,
    float32,
    int32,
    int64,
    uint8,
)
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, LayoutError, ShapeError, UnsupportedError
from fi_cupy.gemm.group import Scales, launch_group
from fi_cupy.gemm.hopper import launch_hopper_fp8_blocks, launch_hopper_grouped
from fi_cupy.gemm.operands import scale_view
from fi_cupy.gemm.quantise import GROUP, quantise_rows
from fi_cupy.gemm.route import on_hopper
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec

__all__ = ["ActivationType", "cutlass_fused_moe", "fused_topk_deepseek", "kernel_specs"]

_SORT = ParamsStruct(
    "MoeSortParams",
    [
        ("experts", "ptr"), ("indptr", "ptr"), ("source", "ptr"), ("position", "ptr"), ("entries", "u32"),
        ("local", "u32"), ("first", "i32"), ("wide", "u32"),
    ],
)  # fmt: skip
_GATHER = ParamsStruct(
    "MoeGatherParams",
    [("x", "ptr"), ("out", "ptr"), ("source", "ptr"), ("x_stride", "i64"), ("bytes", "u32"), ("top_k", "u32")],
)
_FINISH = ParamsStruct(
    "MoeFinishParams",
    [
        ("y", "ptr"), ("scales", "ptr"), ("position", "ptr"), ("out", "ptr"), ("y_stride", "i64"),
        ("scale_stride", "i64"), ("out_stride", "i64"), ("hidden", "u32"), ("top_k", "u32"),
    ],
)  # fmt: skip
_ROUTING = ParamsStruct(
    "RoutingParams",
    [
        ("scores", "ptr"), ("bias", "ptr"), ("values", "ptr"), ("indices", "ptr"), ("scores_stride", "i64"),
        ("values_stride", "i64"), ("indices_stride", "i64"), ("tokens", "u32"), ("top_groups", "u32"),
        ("factor", "f32"), ("wide", "u32"),
    ],
)  # fmt: skip
_THREADS = 256
_ROUTING_WARPS = 4
#: 32 lanes with 32 experts each; up to 64 where the groups leave lanes without any.
MAX_EXPERTS = 1024


class ActivationType(IntEnum):
    """FlashInfer's numbers of the activations between both products."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4


@lru_cache(maxsize=64)
def _spec(function: str, *types: DType) -> KernelSpec:
    """One of ``kernels/moe.cuh``'s kernels."""
    params = {"moe_sort": _SORT, "moe_gather": _GATHER, "moe_finish": _FINISH}[function]
    threads = 512 if function == "moe_sort" else 128
    return KernelSpec(
        symbol="_".join([function, *(t.tag for t in types)]),
        header="moe.cuh",
        function=function,
        params=params,
        config=(*zip(("T", "Out"), types, strict=False), ("kThreads", threads), *((("kItems", 4),) * (not types))),
        threads=threads,
    )


@lru_cache(maxsize=64)
def routing_spec(
    scores: DType, bias: DType, out: DType, experts: int, groups: int, top_k: int, vectors: bool
) -> KernelSpec:
    """The kernel of `fused_topk_deepseek` for types and numbers; `vectors`: 16-byte loads can read the rows."""
    shift, per = routing_lanes(experts, groups)
    return KernelSpec(
        symbol=f"routing_topk_{scores.tag}_{bias.tag}_{out.tag}_{groups}x{experts // groups}_{top_k}{'_v' * vectors}",
        header="routing.cuh",
        function="routing_topk",
        params=_ROUTING,
        config=(
            ("T", scores), ("Bias", bias), ("Out", out), ("kWarps", _ROUTING_WARPS), ("kGroups", groups),
            ("kSize", experts // groups), ("kShift", shift), ("kPer", per), ("kTop", top_k), ("kVectors", vectors),
        ),
        threads=32 * _ROUTING_WARPS,
    )  # fmt: skip


def routing_lanes(experts: int, groups: int) -> tuple[int, int]:
    """(shift, per): a group has 2 ** shift lanes of a warp with `per` experts each, a power of two."""
    shift = (32 // groups).bit_length() - 1
    return shift, 1 << (-(-(experts // groups) // (1 << shift)) - 1).bit_length()


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances."""
    return [
        _spec("moe_sort"),
        _spec("moe_gather"),
        _spec("moe_finish", bfloat16, bfloat16),
        _spec("moe_finish", float16, float16),
        routing_spec(float32, float32, float32, 256, 8, 8, True),
    ]


# --- routing --------------------------------------------------------------------------------------------------------


def fused_topk_deepseek(
    scores: Any, bias: Any, n_group: int, topk_group: int, topk: int, routed_scaling_factor: float, topk_values: Any,
    topk_indices: Any, launch_with_pdl: bool = True, routing_replay_out: Any = None,
) -> None:  # fmt: skip
    """DeepSeek-V3's choice of experts: the best groups, then the best experts in them; writes values and indices.

    ``s = sigmoid(scores)``; ``s + bias`` chooses: a group's score is the sum of its two best experts, the best
    `topk_group` groups stay, and of their experts the best `topk`. Equal values: the lower number first. The values
    are ``s / sum(s of the chosen) * routed_scaling_factor``.

    Parameters
    ----------
    scores : array, [tokens, experts], float32, bfloat16 or float16
        Logits; at most 1024 experts.
    bias : array, [experts], float32, bfloat16 or float16
    n_group, topk_group, topk : int
        At most 32 each; experts are a multiple of n_group.
    routed_scaling_factor : float
    topk_values : array, [tokens, topk], float32, bfloat16 or float16
    topk_indices : array, [tokens, topk], int32 or int64
        In falling order of ``s + bias``.
    launch_with_pdl : bool
        Programmatic dependent launch where the device has it.
    routing_replay_out : None
        Not provided.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError, UnsupportedError

    Source
    ------
    DeepSeek-V3 report, section 2.1.2; flashinfer.fused_moe.fused_topk_deepseek.
    """
    op = "fused_topk_deepseek"
    if routing_replay_out is not None:
        raise UnsupportedError(f"{op}: routing_replay_out is given, expected None: topk_indices holds the same numbers")
    s, b = view(scores, op, "scores"), view(bias, op, "bias")
    check_ndim(op, "scores", s, 2)
    check_dtype(op, "scores", s, FLOAT_TYPES)
    check_inner(op, "scores", s)
    tokens, experts = s.shape
    n_group, topk_group, topk = as_sizes(op, n_group=n_group, topk_group=topk_group, topk=topk)
    _check_groups(op, experts, n_group, topk_group, topk)
    check_shape(op, "bias", b, (experts,), "= scores.shape[1:]")
    check_dtype(op, "bias", b, FLOAT_TYPES)
    check_inner(op, "bias", b)
    values = view(topk_values, op, "topk_values").writable(op, "topk_values")
    indices = view(topk_indices, op, "topk_indices").writable(op, "topk_indices")
    check_dtype(op, "topk_values", values, FLOAT_TYPES)
    check_dtype(op, "topk_indices", indices, INDEX_TYPES)
    for name, x in (("topk_values", values), ("topk_indices", indices)):
        check_shape(op, name, x, (tokens, topk), "= (scores.shape[0], topk)")
        check_inner(op, name, x)
    check_device(op, s, bias=b, topk_values=values, topk_indices=indices)
    if s.is_cpu:
        weights, chosen = reference.moe.topk_deepseek(
            s.numpy(), b.numpy(), n_group, topk_group, topk, routed_scaling_factor
        )
        values.write(weights)
        indices.write(chosen)
        return
    pieces = (x.ptr % 16 or experts // n_group * x.dtype.itemsize % 16 for x in (s, b))
    vectors = not (any(pieces) or s.strides[0] * s.dtype.itemsize % 16)
    load_kernel(routing_spec(s.dtype, b.dtype, values.dtype, experts, n_group, topk, vectors), s.device).launch(
        -(-tokens // _ROUTING_WARPS), s.stream(), s.ptr, b.ptr, values.ptr, indices.ptr, s.strides[0],
        values.strides[0], indices.strides[0], tokens, topk_group, routed_scaling_factor, int(indices.dtype is int64),
        pdl=bool(launch_with_pdl),
    )  # fmt: skip


def _check_groups(op: str, experts: int, n_group: int, topk_group: int, topk: int) -> None:
    if not 1 <= experts <= MAX_EXPERTS:
        raise ShapeError(f"{op}: scores has {experts} experts, expected 1 to {MAX_EXPERTS}")
    if not 1 <= n_group <= 32 or experts % n_group or (n_group > 1 and experts // n_group < 2):
        raise ArgumentError(f"{op}: n_group is {n_group}, expected 1 to 32 groups of two or more of {experts} experts")
    if not 1 <= topk_group <= n_group:
        raise ArgumentError(f"{op}: topk_group is {topk_group}, expected 1 to {n_group} = n_group")
    most = min(32, topk_group * (experts // n_group))
    if not 1 <= topk <= most:
        raise ArgumentError(f"{op}: topk is {topk}, expected 1 to {most}, the experts of the chosen groups or 32")


# --- experts --------------------------------------------------------------------------------------------------------


class _Layer:
    """The checked arguments of `cutlass_fused_moe`."""

    def __init__(self, op: str, x: View, fc1: View, fc2: View, scales: tuple[View, View] | None) -> None:
        check_ndim(op, "fc1_expert_weights", fc1, 3)
        check_ndim(op, "fc2_expert_weights", fc2, 3)
        self.hidden = x.shape[1]
        self.experts, twice = fc1.shape[:2]
        self.inter = twice // 2
        check_shape(op, "fc1_expert_weights", fc1, (self.experts, 2 * self.inter, self.hidden), "= (e, 2 i, hidden)")
        check_shape(op, "fc2_expert_weights", fc2, (self.experts, self.hidden, self.inter), "= (e, hidden, i)")
        multiple = 8 if scales is None else GROUP
        for name, n in (("hidden", self.hidden), ("inter", self.inter)):
            if n % multiple or n == 0:
                raise ShapeError(f"{op}: {name} size is {n}, expected a positive multiple of {multiple}")
        for name, w in (("fc1_expert_weights", fc1), ("fc2_expert_weights", fc2)):
            check_dtype(op, name, w, (x.dtype,) if scales is None else (float8_e4m3fn,))
            check_inner(op, name, w)
            check_aligned(op, name, w, 16)
        self.fc1, self.fc2, self.scales = fc1, fc2, scales


def _bias(op: str, name: str, bias: Any, x: View, experts: int, columns: int) -> View | None:
    if bias is None:
        return None
    b = view(bias, op, name)
    check_shape(op, name, b, (experts, columns), "= (experts, columns)")
    check_dtype(op, name, b, (x.dtype,), "like input")
    check_inner(op, name, b)
    return b


def cutlass_fused_moe(
    input: Any, token_selected_experts: Any, token_final_scales: Any, fc1_expert_weights: Any, fc2_expert_weights: Any,
    output_dtype: Any, quant_scales: Sequence[Any] | None = None, fc1_expert_biases: Any = None,
    fc2_expert_biases: Any = None, input_sf: Any = None, swiglu_alpha: Any = None, swiglu_beta: Any = None,
    swiglu_limit: Any = None, tp_size: int = 1, tp_rank: int = 0, ep_size: int = 1, ep_rank: int = 0,
    cluster_size: int = 1, cluster_rank: int = 0, output: Any = None, enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False, use_w4_group_scaling: bool = False, use_mxfp8_act_scaling: bool = False,
    min_latency_mode: bool = False, tune_max_num_tokens: int = 8192, enable_pdl: bool | None = None,
    activation_type: int = ActivationType.Swiglu,
) -> Any:  # fmt: skip
    """Experts' gated feed-forward layers: ``sum_e scale_e * (silu(x w1_e^T) * (x w3_e^T)) w2_e^T``.

    On a GPU: sort by expert, gather, grouped product with the activation, grouped product, and the weighted sum in
    slot order, all launched at once; results repeat bit for bit.

    Parameters
    ----------
    input : array, [tokens, hidden], bfloat16 or float16
    token_selected_experts : array, int32 or int64 [tokens, top_k]
        Global numbers; experts of other ranks (and any number out of range) add nothing.
    token_final_scales : array, float32 [tokens, top_k]
    fc1_expert_weights : array, [experts, 2 * inter, hidden]
        The UP projection w3 first, the gate w1 second. Dtype of `input`, or float8_e4m3fn (uint8: its bytes) with
        `use_deepseek_fp8_block_scale`. `experts` are this rank's.
    fc2_expert_weights : array, [experts, hidden, inter]
    output_dtype : dtype
        bfloat16, float16 or float32.
    quant_scales : sequence of arrays
        With block scales: float32 ``[experts, 2 * inter / 128, hidden / 128]`` and
        ``[experts, hidden / 128, inter / 128]``; else None or empty.
    fc1_expert_biases, fc2_expert_biases : array, [experts, 2 * inter], [experts, hidden], dtype of `input`, optional
        16-bit weights only.
    ep_size, ep_rank : int
        Local expert e is global expert ``ep_rank * experts + e``.
    tp_size, tp_rank, cluster_size, cluster_rank : int
        The weights are this rank's shard already: the result is its partial sum. Ranks are checked.
    output : array, [tokens, hidden], optional
    use_deepseek_fp8_block_scale : bool
        fp8 weights with a multiplier for each 128 x 128 block; activations become fp8 here, one multiplier for each
        128 elements of a token.
    tune_max_num_tokens : int
        FlashInfer's tuning bound; there is nothing to tune here.
    enable_pdl : bool, optional
        Programmatic dependent launch between the steps; None is off.
    activation_type : int
        `ActivationType.Swiglu`.
    input_sf, swiglu_alpha, swiglu_beta, swiglu_limit, enable_alltoall, use_w4_group_scaling, use_mxfp8_act_scaling, \
min_latency_mode
        Only their defaults: other values are refused.

    Returns
    -------
    array
        ``[tokens, hidden]``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError, UnsupportedError

    Source
    ------
    flashinfer.fused_moe.cutlass_fused_moe.
    """
    op = "cutlass_fused_moe"
    for name, value in (
        ("input_sf", input_sf), ("swiglu_alpha", swiglu_alpha), ("swiglu_beta", swiglu_beta),
        ("swiglu_limit", swiglu_limit), ("enable_alltoall", enable_alltoall or None),
        ("use_w4_group_scaling", use_w4_group_scaling or None),
        ("use_mxfp8_act_scaling", use_mxfp8_act_scaling or None), ("min_latency_mode", min_latency_mode or None),
    ):  # fmt: skip
        if value is not None:
            raise UnsupportedError(f"{op}: {name} is given, expected its default")
    if activation_type != ActivationType.Swiglu:
        raise UnsupportedError(f"{op}: activation_type is {activation_type}, expected {ActivationType.Swiglu} (Swiglu)")
    ranks = (("tp", tp_size, tp_rank), ("ep", ep_size, ep_rank), ("cluster", cluster_size, cluster_rank))
    for name, size, rank in ranks:
        if not 0 <= rank < size:
            raise ArgumentError(f"{op}: {name}_rank is {rank}, expected 0 to {size - 1} = {name}_size - 1")
    x = view(input, op, "input")
    check_ndim(op, "input", x, 2)
    check_dtype(op, "input", x, HALF_TYPES)
    check_inner(op, "input", x)
    check_aligned(op, "input", x, 16)
    experts = view(token_selected_experts, op, "token_selected_experts")
    final = view(token_final_scales, op, "token_final_scales")
    check_ndim(op, "token_selected_experts", experts, 2)
    check_dtype(op, "token_selected_experts", experts, INDEX_TYPES)
    check_shape(op, "token_selected_experts", experts, (x.shape[0], experts.shape[1]), "= (tokens, top_k)")
    check_shape(op, "token_final_scales", final, experts.shape, "= token_selected_experts.shape")
    check_dtype(op, "token_final_scales", final, (float32,))
    check_inner(op, "token_final_scales", final)
    if not experts.contiguous:
        raise LayoutError(f"{op}: token_selected_experts has strides {experts.strides}, expected a dense array")
    fc1, fc2 = view(fc1_expert_weights, op, "fc1_expert_weights"), view(fc2_expert_weights, op, "fc2_expert_weights")
    scales = _block_scales(op, x, quant_scales, use_deepseek_fp8_block_scale)
    if scales is not None:
        fc1, fc2 = (w.typed(float8_e4m3fn) if w.dtype is uint8 else w for w in (fc1, fc2))
    layer = _Layer(op, x, fc1, fc2, scales)
    if scales is not None:
        _check_block_scales(op, layer)
    b1 = _bias(op, "fc1_expert_biases", fc1_expert_biases, x, layer.experts, 2 * layer.inter)
    b2 = _bias(op, "fc2_expert_biases", fc2_expert_biases, x, layer.experts, layer.hidden)
    if scales is not None and (b1 is not None or b2 is not None):
        raise UnsupportedError(f"{op}: expert biases are given with block scales, expected None")
    check_device(op, x, token_selected_experts=experts, token_final_scales=final, fc1_expert_weights=fc1,
                 fc2_expert_weights=fc2, fc1_expert_biases=b1, fc2_expert_biases=b2)  # fmt: skip
    o = _output(op, x, output, output_dtype)
    first = ep_rank * layer.experts
    if x.is_cpu:
        o.write(_on_cpu(layer, x, experts, final, b1, b2, first, o))
    elif o.size:
        _on_gpu(layer, x, experts, final, b1, b2, first, o, bool(enable_pdl))
    return o.result() if output is None else output


def _block_scales(op: str, x: View, quant_scales: Sequence[Any] | None, wanted: bool) -> tuple[View, View] | None:
    given = list(quant_scales) if quant_scales is not None else []
    if not wanted:
        if given:
            raise UnsupportedError(
                f"{op}: got {len(given)} quant_scales without use_deepseek_fp8_block_scale, expected none: 16-bit "
                "weights, or fp8 weights with block scales"
            )
        return None
    if len(given) != 2:
        raise ArgumentError(f"{op}: got {len(given)} quant_scales, expected 2: the block scales of fc1 and of fc2")
    return scale_view(op, "quant_scales[0]", given[0], x), scale_view(op, "quant_scales[1]", given[1], x)


def _check_block_scales(op: str, layer: _Layer) -> None:
    assert layer.scales is not None
    h, i = layer.hidden // GROUP, layer.inter // GROUP
    check_shape(op, "quant_scales[0]", layer.scales[0], (layer.experts, 2 * i, h), "= (e, 2 i / 128, hidden / 128)")
    check_shape(op, "quant_scales[1]", layer.scales[1], (layer.experts, h, i), "= (e, hidden / 128, i / 128)")
    for n, s in enumerate(layer.scales):
        check_inner(op, f"quant_scales[{n}]", s)


def _output(op: str, x: View, output: Any, output_dtype: Any) -> View:
    kind = to_dtype(output_dtype)
    if output is None:
        o = x.empty(x.shape, kind)
    else:
        o = view(output, op, "output").writable(op, "output")
        check_shape(op, "output", o, x.shape, "= input.shape")
        check_dtype(op, "output", o, (kind,), "= output_dtype")
        check_device(op, x, output=o)
        check_inner(op, "output", o)
        check_aligned(op, "output", o, 16)
    check_dtype(op, "output", o, FLOAT_TYPES)
    return o


def _on_cpu(
    layer: _Layer, x: View, experts: View, final: View, b1: View | None, b2: View | None, first: int, o: View
) -> Any:
    return reference.moe.fused_moe(
        x.numpy(), experts.numpy().astype("int64") - first, final.numpy(), layer.fc1.numpy(), layer.fc2.numpy(),
        o.dtype.np, None if layer.scales is None else (layer.scales[0].numpy(), layer.scales[1].numpy()),
        None if b1 is None else b1.numpy(), None if b2 is None else b2.numpy(),
    )  # fmt: skip


def _on_gpu(
    layer: _Layer, x: View, experts: View, final: View, b1: View | None, b2: View | None, first: int, o: View, pdl: bool
) -> None:
    tokens, top_k = experts.shape
    rows, stream = tokens * top_k, x.stream()
    indptr, source, position = x.empty((layer.experts + 1,), int32), x.empty((rows,), int32), x.empty((rows,), int32)
    load_kernel(_spec("moe_sort"), x.device).launch(
        layer.experts + 1, stream, experts.ptr, indptr.ptr, source.ptr, position.ptr, rows, layer.experts, first,
        int(experts.dtype is int64), pdl=pdl,
    )  # fmt: skip
    if layer.scales is None:
        y = _half_experts(layer, x, indptr, source, top_k, b1, b2, stream, pdl)
    else:
        y = _fp8_experts(layer, x, indptr, source, top_k, pdl)
    spec = _spec("moe_finish", y.dtype, o.dtype)
    load_kernel(spec, x.device).launch(
        (tokens, -(-layer.hidden // (8 * spec.threads)), 1), stream, y.ptr, final.ptr, position.ptr, o.ptr,
        layer.hidden, final.strides[0], o.strides[0], layer.hidden, top_k, pdl=pdl,
    )  # fmt: skip


def _half_experts(
    layer: _Layer, x: View, indptr: View, source: View, top_k: int, b1: View | None, b2: View | None, stream: int,
    pdl: bool,
) -> View:  # fmt: skip
    rows = source.shape[0]
    gathered = x.empty((rows, layer.hidden))
    spec = _spec("moe_gather")
    nbytes = layer.hidden * x.dtype.itemsize
    load_kernel(spec, x.device).launch(
        (rows, -(-nbytes // (16 * spec.threads)), 1), stream, x.ptr, gathered.ptr, source.ptr,
        x.strides[0] * x.dtype.itemsize, nbytes, top_k, pdl=pdl,
    )  # fmt: skip
    hidden, y = x.empty((rows, layer.inter)), x.empty((rows, layer.hidden))
    if on_hopper(device_info(x.device), layer.inter, gathered, layer.fc1, layer.fc2):
        launch_hopper_grouped(hidden, gathered, layer.fc1, indptr, bias=b1, gated=True, gate_second=True, pdl=pdl)
        launch_hopper_grouped(y, hidden, layer.fc2, indptr, bias=b2, pdl=pdl)
        return y
    launch_group(hidden, gathered, layer.fc1, indptr=indptr, bias=b1, gated=True, gate_second=True, pdl=pdl)
    launch_group(y, hidden, layer.fc2, indptr=indptr, bias=b2, pdl=pdl)
    return y


def _fp8_experts(layer: _Layer, x: View, indptr: View, source: View, top_k: int, pdl: bool) -> View:
    assert layer.scales is not None
    rows = source.shape[0]
    q, scale = quantise_rows(x, source, top_k, pdl=pdl)
    both, y = x.empty((rows, 2 * layer.inter)), x.empty((rows, layer.hidden))
    _fp8_product(both, q, layer.fc1, scale, layer.scales[0], indptr, pdl)
    q, scale = quantise_rows(both, gated=True, pdl=pdl)
    _fp8_product(y, q, layer.fc2, scale, layer.scales[1], indptr, pdl)
    return y


def _fp8_product(out: View, a: View, w: View, a_scale: View, b_scale: View, indptr: View, pdl: bool) -> None:
    if on_hopper(device_info(a.device), w.shape[1], a, w):
        launch_hopper_fp8_blocks(out, a, w, a_scale, b_scale, scale_major_mode="K", indptr=indptr, pdl=pdl)
        return
    launch_group(
        out, a, w, indptr=indptr, scale="blocks", a_scale=Scales(a_scale.ptr, a_scale.strides[0], a_scale.strides[1]),
        b_scale=Scales(b_scale.ptr, b_scale.strides[1], b_scale.strides[2], b_scale.strides[0], GROUP), pdl=pdl,
    )  # fmt: skip
