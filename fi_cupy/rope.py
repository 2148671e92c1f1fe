"""Rotary position embedding of q and k: plain, Llama 3.1 scaled, and from a cos/sin cache; in place and not."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import as_sizes, check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.dtypes import FLOAT_TYPES, INDEX_TYPES, float32
from fi_cupy.errors import ArgumentError, ShapeError, UnsupportedError
from fi_cupy.reference import rope as reference
from fi_cupy.rope_kernel import MAX_PAIRS, Frequencies, launch, radians, turns_of
from fi_cupy.rope_kernel import kernel_specs as kernel_specs
from fi_cupy.rope_kernel import rope_spec as rope_spec
from fi_cupy.rope_quantize import (
    mla_rope_quantize_fp8 as mla_rope_quantize_fp8,
)
from fi_cupy.rope_quantize import (
    rope_append_paged_kv_cache as rope_append_paged_kv_cache,
)
from fi_cupy.rope_quantize import (
    rope_quantize_fp8 as rope_quantize_fp8,
)
from fi_cupy.rope_quantize import (
    rope_quantize_fp8_append_paged_kv_cache as rope_quantize_fp8_append_paged_kv_cache,
)


def _check_qk(op: str, q: View, k: View, names: tuple[str, str], inplace: bool) -> None:
    check_dtype(op, names[0], q, FLOAT_TYPES)
    check_dtype(op, names[1], k, (q.dtype,), f"like {names[0]}")
    check_inner(op, names[0], q)
    check_inner(op, names[1], k)
    if k.shape[0] != q.shape[0]:
        raise ShapeError(
            f"{op}: {names[1]} has {k.shape[0]} tokens, expected {q.shape[0]} = {names[0]}.shape[0] "
            f"(shapes {k.shape} and {q.shape})"
        )
    if inplace:
        q.writable(op, names[0])
        k.writable(op, names[1])


def _check_index(op: str, name: str, x: View, shape: tuple[int, ...], meaning: str, like: View | None = None) -> None:
    check_shape(op, name, x, shape, meaning)
    check_dtype(op, name, x, INDEX_TYPES if like is None else (like.dtype,), "" if like is None else "like indptr")
    check_inner(op, name, x)


def _rotary_dim(op: str, rotary_dim: int | None, head_dim: int) -> int:
    dim = head_dim if rotary_dim is None else int(rotary_dim)
    if dim < 2 or dim % 2 or dim > head_dim:
        raise ArgumentError(f"{op}: rotary_dim is {dim}, expected an even number from 2 to head_dim = {head_dim}")
    return dim


def _apply(
    op: str,
    q: Any,
    k: Any,
    positions: Any,
    indptr: Any,
    rotary_dim: int | None,
    interleave: bool,
    scale: float,
    theta: float,
    blend: tuple[float, float, int] | None,
    inplace: bool,
) -> Any:
    """The forms with frequencies: `indptr` None means that `positions` has one position a token, else one a request."""
    qv, kv, pos = view(q, op, "q"), view(k, op, "k"), view(positions, op, "pos_ids" if indptr is None else "offsets")
    check_ndim(op, "q", qv, 3)
    check_ndim(op, "k", kv, 3)
    _check_qk(op, qv, kv, ("q", "k"), inplace)
    head_dim = qv.shape[2]
    if kv.shape[2] != head_dim:
        raise ShapeError(f"{op}: k has head_dim {kv.shape[2]}, expected {head_dim} = q.shape[2]")
    if scale <= 0 or theta <= 0:
        raise ArgumentError(f"{op}: rope_scale is {scale} and rope_theta is {theta}, expected positive numbers")
    dim = _rotary_dim(op, rotary_dim, head_dim)
    ip = None
    if indptr is None:
        _check_index(op, "pos_ids", pos, qv.shape[:1], "= q.shape[:1]")
        check_device(op, qv, k=kv, pos_ids=pos)
    else:
        ip = view(indptr, op, "indptr")
        check_ndim(op, "offsets", pos, 1)
        _check_index(op, "indptr", ip, (pos.shape[0] + 1,), "= len(offsets) + 1")
        _check_index(op, "offsets", pos, pos.shape, "", ip)
        check_device(op, qv, k=kv, indptr=ip, offsets=pos)
    frequencies = (dim, float(scale), float(theta), blend)
    if qv.is_cpu:
        new = _on_cpu(op, qv, kv, pos, ip, frequencies, interleave)
        return _cpu_results(qv, kv, *new, inplace)
    if dim > 2 * MAX_PAIRS:
        raise UnsupportedError(f"{op}: rotary_dim is {dim}, expected at most {2 * MAX_PAIRS}; use a cos/sin cache")
    qo, ko = (qv, kv) if inplace else (qv.empty(qv.shape), kv.empty(kv.shape))
    launch(
        qv, kv, qo, ko, (qv.strides[1], kv.strides[1], qo.strides[1], ko.strides[1]),
        (qv.shape[1], kv.shape[1], head_dim), dim, bool(interleave), pos, indptr=ip, turns=turns_of(frequencies),
    )  # fmt: skip
    return None if inplace else (qo.result(), ko.result())


def _on_cpu(
    op: str, q: View, k: View, positions: View, indptr: View | None, frequencies: Frequencies, interleave: bool
) -> tuple[Any, Any]:
    freq = radians(frequencies)
    if indptr is None:
        return reference._apply(q.numpy(), k.numpy(), positions.numpy(), freq, interleave)
    offsets = indptr.numpy().astype(np.int64)
    if offsets[0] < 0 or offsets[-1] > q.shape[0] or (np.diff(offsets) < 0).any():
        raise ArgumentError(f"{op}: indptr is {offsets.tolist()}, expected ascending offsets up to {q.shape[0]} tokens")
    return reference._apply_segments(q.numpy(), k.numpy(), offsets, positions.numpy(), freq, interleave)


def _cpu_results(q: View, k: View, q_new: Any, k_new: Any, inplace: bool) -> Any:
    qo, ko = (q, k) if inplace else (q.empty(q.shape), k.empty(k.shape))
    qo.write(q_new)
    ko.write(k_new)
    return None if inplace else (qo.result(), ko.result())


def apply_rope(
    q: Any,
    k: Any,
    indptr: Any,
    offsets: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> Any:
    """Rotate q and k of a ragged batch; token i of request b has position ``offsets[b] + i``.

    A pair of features (a, b) becomes ``(a cos - b sin, b cos + a sin)`` with the angle
    ``position * rope_theta^(-2 pair / rotary_dim) / rope_scale``.

    Parameters
    ----------
    q : array, [nnz, num_qo_heads, head_dim], float16, bfloat16 or float32
    k : array, [nnz, num_kv_heads, head_dim], dtype of `q`
        Both may be views of one fused tensor: all strides but the innermost are free.
    indptr : array, [batch + 1], int32 or int64
        Ragged offsets of the requests' tokens; tokens outside them are copied.
    offsets : array, [batch], dtype of `indptr`
        Position of every request's first token.
    rotary_dim : int, optional
        The first `rotary_dim` features rotate, the others are copied. None rotates all; at most 256 on a GPU.
    interleave : bool
        False pairs feature i with i + rotary_dim / 2 (NeoX), True pairs 2i with 2i + 1 (GPT-J).
    rope_scale : float
        Divides the frequency.
    rope_theta : float

    Returns
    -------
    (q_rope, k_rope)
        New arrays with the shapes and the dtype of `q` and `k`. Computed in fp32 with exactly reduced angles: the
        error does not grow with the position.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError, UnsupportedError

    Source
    ------
    Su et al. 2021 (arXiv:2104.09864); flashinfer.rope.apply_rope.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.rope import apply_rope
    >>> q = np.ones((1, 1, 2), np.float32)
    >>> apply_rope(q, q, np.array([0, 1]), np.array([1]))[0].round(4)
    array([[[-0.3012,  1.3818]]], dtype=float32)
    """
    return _apply(
        "apply_rope", q, k, offsets, indptr, rotary_dim, interleave, rope_scale, rope_theta, None, False
    )  # fmt: skip


def apply_rope_inplace(
    q: Any,
    k: Any,
    indptr: Any,
    offsets: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope` that overwrites `q` and `k`. Source: flashinfer.rope.apply_rope_inplace."""
    _apply(
        "apply_rope_inplace", q, k, offsets, indptr, rotary_dim, interleave, rope_scale, rope_theta, None, True
    )  # fmt: skip


def apply_rope_pos_ids(
    q: Any,
    k: Any,
    pos_ids: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> Any:
    """`apply_rope` with the position of every token given, `pos_ids` int32 or int64 ``[nnz]``.

    Source: flashinfer.rope.apply_rope_pos_ids.
    """
    return _apply(
        "apply_rope_pos_ids", q, k, pos_ids, None, rotary_dim, interleave, rope_scale, rope_theta, None, False
    )  # fmt: skip


def apply_rope_pos_ids_inplace(
    q: Any,
    k: Any,
    pos_ids: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 1.0,
    rope_theta: float = 1e4,
) -> None:
    """`apply_rope_pos_ids` that overwrites `q` and `k`. Source: flashinfer.rope.apply_rope_pos_ids_inplace."""
    _apply(
        "apply_rope_pos_ids_inplace", q, k, pos_ids, None, rotary_dim, interleave, rope_scale, rope_theta, None, True
    )  # fmt: skip


def _llama31(low_freq_factor: float, high_freq_factor: float, old_context_len: int) -> tuple[float, float, int]:
    if high_freq_factor == low_freq_factor:
        raise ArgumentError(f"llama31 rope: high_freq_factor equals low_freq_factor = {low_freq_factor}, expected two")
    return float(low_freq_factor), float(high_freq_factor), int(old_context_len)


def apply_llama31_rope(
    q: Any,
    k: Any,
    indptr: Any,
    offsets: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 8192,
) -> Any:
    """`apply_rope` with Llama 3.1's frequencies: long wavelengths divided by `rope_scale`, short ones kept.

    ``s = clamp((f * old_context_len / 2 pi - low) / (high - low), 0, 1)`` blends ``f / rope_scale`` and ``f``.

    Parameters, result and errors as in `apply_rope`. Source: flashinfer.rope.apply_llama31_rope.
    """
    blend = _llama31(low_freq_factor, high_freq_factor, old_context_len)
    return _apply(
        "apply_llama31_rope", q, k, offsets, indptr, rotary_dim, interleave, rope_scale, rope_theta, blend, False
    )  # fmt: skip


def apply_llama31_rope_inplace(
    q: Any,
    k: Any,
    indptr: Any,
    offsets: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope` that overwrites `q` and `k`. Source: flashinfer.rope.apply_llama31_rope_inplace."""
    blend = _llama31(low_freq_factor, high_freq_factor, old_context_len)
    _apply(
        "apply_llama31_rope_inplace", q, k, offsets, indptr, rotary_dim, interleave, rope_scale, rope_theta, blend, True
    )  # fmt: skip


def apply_llama31_rope_pos_ids(
    q: Any,
    k: Any,
    pos_ids: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 8192,
) -> Any:
    """`apply_llama31_rope` with a position a token. Source: flashinfer.rope.apply_llama31_rope_pos_ids."""
    blend = _llama31(low_freq_factor, high_freq_factor, old_context_len)
    return _apply(
        "apply_llama31_rope_pos_ids", q, k, pos_ids, None, rotary_dim, interleave, rope_scale, rope_theta, blend, False
    )  # fmt: skip


def apply_llama31_rope_pos_ids_inplace(
    q: Any,
    k: Any,
    pos_ids: Any,
    rotary_dim: int | None = None,
    interleave: bool = False,
    rope_scale: float = 8.0,
    rope_theta: float = 5e5,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    old_context_len: int = 8192,
) -> None:
    """`apply_llama31_rope_pos_ids` in place. Source: flashinfer.rope.apply_llama31_rope_pos_ids_inplace."""
    blend = _llama31(low_freq_factor, high_freq_factor, old_context_len)
    _apply(
        "apply_llama31_rope_pos_ids_inplace",
        q, k, pos_ids, None, rotary_dim, interleave, rope_scale, rope_theta, blend, True,
    )  # fmt: skip


def _apply_cached(
    op: str, positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, is_neox: bool, inplace: bool
) -> Any:
    (head_size,) = as_sizes(op, head_size=head_size)
    pos, q, k = view(positions, op, "positions"), view(query, op, "query"), view(key, op, "key")
    table = view(cos_sin_cache, op, "cos_sin_cache")
    check_ndim(op, "query", q, 2)
    check_ndim(op, "key", k, 2)
    _check_qk(op, q, k, ("query", "key"), inplace)
    for name, x in (("query", q), ("key", k)):
        if x.shape[1] % head_size:
            raise ShapeError(
                f"{op}: {name} has shape {x.shape}, expected a multiple of head_size = {head_size} features"
            )
    check_ndim(op, "cos_sin_cache", table, 2)
    if table.dtype is not float32:
        check_dtype(op, "cos_sin_cache", table, (float32,))
    check_inner(op, "cos_sin_cache", table)
    _check_index(op, "positions", pos, (q.shape[0],), "= query.shape[:1]")
    check_device(op, q, key=k, positions=pos, cos_sin_cache=table)
    dim = table.shape[1]
    if dim < 2 or dim % 2 or dim > head_size:
        raise ShapeError(
            f"{op}: cos_sin_cache has shape {table.shape}, expected an even rotary_dim up to head_size = {head_size}"
        )
    if q.is_cpu:
        ids = pos.numpy()
        if ids.size and (ids.min() < 0 or ids.max() >= table.shape[0]):
            raise ArgumentError(
                f"{op}: positions are {ids.min()} to {ids.max()}, expected 0 to {table.shape[0] - 1} (cos_sin_cache)"
            )
        new = reference.apply_rope_with_cos_sin_cache(ids, q.numpy(), k.numpy(), head_size, table.numpy(), is_neox)
        return _cpu_results(q, k, *new, inplace)
    qo, ko = (q, k) if inplace else (q.empty(q.shape), k.empty(k.shape))
    launch(
        q, k, qo, ko, (head_size,) * 4, (q.shape[1] // head_size, k.shape[1] // head_size, head_size), dim,
        not is_neox, pos, cos_sin=table,
    )  # fmt: skip
    return None if inplace else (qo.result(), ko.result())


def apply_rope_with_cos_sin_cache(
    positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, is_neox: bool = True
) -> Any:
    """Rotate with precomputed cosines and sines.

    Parameters
    ----------
    positions : array, [nnz], int32 or int64
        Rows of the cache; values outside it are an error on the CPU and undefined on a GPU.
    query : array, [nnz, num_qo_heads * head_size], float16, bfloat16 or float32
    key : array, [nnz, num_kv_heads * head_size], dtype of `query`
        Rows may be strided.
    head_size : int
    cos_sin_cache : array, [max_position, rotary_dim], float32
        First half cosines, second half sines. Features past rotary_dim are copied.
    is_neox : bool
        True pairs feature i with i + rotary_dim / 2, False pairs 2i with 2i + 1.

    Returns
    -------
    (query_out, key_out)
        New arrays like `query` and `key`.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    vLLM's rotary_embedding; flashinfer.rope.apply_rope_with_cos_sin_cache.
    """
    op = "apply_rope_with_cos_sin_cache"
    return _apply_cached(op, positions, query, key, head_size, cos_sin_cache, is_neox, False)


def apply_rope_with_cos_sin_cache_inplace(
    positions: Any, query: Any, key: Any, head_size: int, cos_sin_cache: Any, is_neox: bool = True
) -> None:
    """`apply_rope_with_cos_sin_cache` that overwrites `query` and `key`.

    Source: flashinfer.rope.apply_rope_with_cos_sin_cache_inplace.
    """
    op = "apply_rope_with_cos_sin_cache_inplace"
    _apply_cached(op, positions, query, key, head_size, cos_sin_cache, is_neox, True)
