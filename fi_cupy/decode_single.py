"""Decode attention of one request over contiguous keys: no plan, no upload, one launch."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_aligned, check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.choice_log import log_call, logging_choices
from fi_cupy.decode_kernel import (
    Geometry,
    Problem,
    check_pos_encoding,
    check_problem,
    check_rope,
    geometry,
    logit_floats,
    rope_turns,
    shares_of,
    why_not,
)
from fi_cupy.device import DeviceInfo, device_info
from fi_cupy.dtypes import FLOAT_TYPES, FP8_TYPES, DType, float8_e4m3fn, float32
from fi_cupy.errors import ArgumentError, ShapeError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.kv_cache import as_fp8, check_layout
from fi_cupy.plan.decode import TILE, single_chunks
from fi_cupy.prefill_kernel import fast_div
from fi_cupy.scales import Scales, read_scales
from fi_cupy.workspace import ScratchPool

_OP = "single_decode_with_kv_cache"
#: Partial results and their counters, one set a (device, stream): calls on one stream run one after the other.
_scratch = ScratchPool()


@lru_cache(maxsize=256)
def _geometry(
    heads: int, kv_heads: int, dim: int, dtype: DType, kv: DType, cap: bool, mode: str, device: DeviceInfo
) -> tuple[Geometry | None, str]:
    """The decode kernel and grid factors, or None and why the prefill kernel takes the call."""
    problem = Problem(
        1, heads, kv_heads, dim, dtype, kv, dtype, True, cap, mode == "ALIBI", mode == "ROPE_LLAMA", False
    )
    why = why_not(problem)
    if why:
        return None, why
    check_problem(_OP, problem)
    return geometry(problem, device), ""


def single_decode_with_kv_cache(
    q: Any,
    k: Any,
    v: Any,
    kv_layout: str = "NHD",
    pos_encoding_mode: str = "NONE",
    use_tensor_cores: bool = False,
    q_scale: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    window_left: int = -1,
    logits_soft_cap: float | None = None,
    sm_scale: float | None = None,
    rope_scale: float | None = None,
    rope_theta: float | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of one query token over contiguous keys and values: ``softmax(sm_scale * q k^T) v``.

    Parameters
    ----------
    q : array, [num_qo_heads, head_dim], float16 or bfloat16 (or fp8, in the prefill kernel)
    k, v : array, [kv_len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, kv_len, head_dim] (HND)
        The type of `q`, float8_e4m3fn, float8_e5m2, or uint8 (bytes of e4m3). kv_len 0 gives 0 and -inf.
    kv_layout : "NHD" or "HND"
    pos_encoding_mode : "NONE", "ALIBI" or "ROPE_LLAMA"
        ROPE_LLAMA rotates halves of q and k; head_dim a multiple of 16. Others than multiples of 32 (with fp8 keys: 64)
        take the prefill kernel.
    use_tensor_cores : bool
        Accepted; the one kernel always uses them.
    q_scale, k_scale, v_scale : float, or float32 array [heads], optional
        Dequantisation factors: the first two multiply `sm_scale`, the last the output. An array (of query heads, kv
        heads, kv heads) holds one a head.
    window_left : int
        Keys to the left of the newest that are seen; -1: all.
    logits_soft_cap : float, optional
        ``cap * tanh(logit / cap)``; None or <= 0 is off.
    sm_scale : float, optional
        Default ``1 / sqrt(head_dim)``.
    rope_scale, rope_theta : float, optional
        For ROPE_LLAMA.
    return_lse : bool

    Returns
    -------
    out [num_qo_heads, head_dim], or (out, lse float32 [num_qo_heads], base 2)

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, LayoutError, DeviceError, UnsupportedError

    Source
    ------
    flashinfer.decode.single_decode_with_kv_cache; split keys as in Flash-Decoding (Dao et al. 2023).

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> q, k = np.ones((8, 64), np.float32), np.ones((100, 2, 64), np.float32)
    >>> fi_cupy.decode.single_decode_with_kv_cache(q, k, k).shape
    (8, 64)
    """
    given = dict(locals()) if logging_choices() else None
    x, kx, vx = (as_fp8(view(y, _OP, n), float8_e4m3fn) for n, y in (("q", q), ("k", k), ("v", v)))
    check_layout(_OP, kv_layout)
    check_ndim(_OP, "q", x, 2)
    check_ndim(_OP, "k", kx, 3)
    check_dtype(_OP, "q", x, (*FLOAT_TYPES, *FP8_TYPES))
    heads, dim = x.shape
    kv_len, kv_heads = kx.shape[:2] if kv_layout == "NHD" else (kx.shape[1], kx.shape[0])
    check_shape(_OP, "k", kx, (*kx.shape[:2], dim), "= [.., .., q.shape[-1]]")
    check_shape(_OP, "v", vx, kx.shape, "= k.shape")
    check_dtype(_OP, "k", kx, (x.dtype, *FP8_TYPES), "like q, or fp8")
    check_dtype(_OP, "v", vx, (kx.dtype,), "like k")
    check_device(_OP, x, k=kx, v=vx)
    if kv_heads < 1 or heads % kv_heads:
        raise ArgumentError(f"{_OP}: q has {heads} heads, expected a multiple of num_kv_heads = {kv_heads}")
    check_pos_encoding(_OP, pos_encoding_mode)
    check_rope(_OP, rope_scale, rope_theta)
    if heads < 1 or dim < 1:
        raise ShapeError(f"{_OP}: q has shape {x.shape}, expected at least 1 head of 1 dimension")
    window, cap = max(int(window_left), -1), max(float(logits_soft_cap or 0.0), 0.0)
    scale = 1.0 / math.sqrt(dim) if sm_scale is None else float(sm_scale)
    g = None
    if not x.is_cpu:
        device = device_info(x.device)
        g, why = _geometry(heads, kv_heads, dim, x.dtype, kx.dtype, cap > 0, pos_encoding_mode, device)
        if why:
            return _by_prefill(
                q, k, v, q_scale, k_scale, v_scale, return_lse, kv_layout=kv_layout, sm_scale=scale,
                pos_encoding_mode=pos_encoding_mode, window_left=window, logits_soft_cap=cap, rope_scale=rope_scale,
                rope_theta=rope_theta,
            )  # fmt: skip
    scales = read_scales(_OP, x, heads, kv_heads, q_scale, k_scale, v_scale)
    o = x.empty(x.shape)
    s = x.empty((heads,), float32) if return_lse else None
    if g is None:
        values, lse = reference.attention.single_decode(
            x.numpy(), kx.numpy(), vx.numpy(), kv_layout=kv_layout, sm_scale=scale * scales.logit, **scales.reference(),
            window_left=window, logits_soft_cap=cap, pos_encoding_mode=pos_encoding_mode, rope_scale=rope_scale,
            rope_theta=rope_theta,
        )  # fmt: skip
        o.write(values)
        if s is not None and lse is not None:
            s.write(lse)
    else:
        for name, y in (("q", x), ("k", kx), ("v", vx)):
            check_inner(_OP, name, y)
            check_aligned(_OP, name, y, 4 if y is x else 16)
        turns = rope_turns(dim, rope_scale, rope_theta) if pos_encoding_mode == "ROPE_LLAMA" else ()
        _launch(g, x, kx, vx, o, s, kv_len, kv_layout, window, cap, scale, scales, turns)
    if given is not None:
        log_call(single_decode_with_kv_cache, given)
    return o.result() if s is None else (o.result(), s.result())


def _by_prefill(
    q: Any, k: Any, v: Any, q_scale: Any, k_scale: Any, v_scale: Any, return_lse: bool, **options: Any
) -> Any:
    """One query token in the prefill kernel, for what the decode kernel does not take."""
    from fi_cupy.prefill_single import single_prefill_with_kv_cache

    made = single_prefill_with_kv_cache(
        q[None], k, v, scale_q=q_scale, scale_k=k_scale, scale_v=v_scale, return_lse=return_lse, **options
    )
    return (made[0][0], made[1][0]) if return_lse else made[0]


def _launch(
    g: Geometry, x: View, k: View, v: View, o: View, s: View | None, kv_len: int, kv_layout: str, window: int,
    cap: float, scale: float, scales: Scales, turns: tuple[bytes, ...],
) -> None:  # fmt: skip
    first = max(kv_len - 1 - window, 0) if window >= 0 else 0
    chunk, num_chunks = single_chunks(kv_len - first // TILE * TILE, g.num_head_blocks, g.slots)
    stream = x.stream()
    partial_out = partial_md = counters = 0
    if num_chunks > 1:
        layout = g.workspace(num_chunks)
        base, counters = _scratch.get(x, stream, layout.size, g.num_head_blocks)
        partial_out, partial_md = base + layout.offsets["partial_out"], base + layout.offsets["partial_md"]

    def strides(y: View) -> tuple[int, int, int]:  # page (there is one), token, head
        return (0, y.strides[0], y.strides[1]) if kv_layout == "NHD" else (0, y.strides[1], y.strides[0])

    load_kernel(g.heads_spec if scales.on_logits else g.spec, x.device).launch(
        num_chunks * g.num_head_blocks, stream,
        x.ptr, k.ptr, v.ptr, o.ptr, 0 if s is None else s.ptr, 0, 0, 0, partial_out, partial_md, counters,
        0, x.strides[0], 0, o.strides[0], *strides(k), *strides(v),
        *fast_div(max(kv_len, 1)), g.num_head_blocks, g.blocks_per_kv, g.heads_per_block, g.group_size, 1, g.slots,
        shares_of(strides(k), strides(v), g.num_head_blocks, g.head_dim, g.blocks_per_kv), kv_len, first, chunk,
        num_chunks, *logit_floats(scale * scales.logit, cap), scales.output,
        *scales.kernel_values(), *turns,
        pdl=None,
    )  # fmt: skip
