"""Attention over one request, and the loops over a batch of paged or ragged requests.

``S = soft_cap(sm_scale * q k^T + alibi)``, ``P = softmax(mask(S))``, ``out = P v``. The log-sum-exp is in base 2 of the
scaled scores. A row that sees no key gives 0 and -inf, never NaN. Blocks of query rows bound the memory, and a block
reads only the keys that causality and the window leave it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from fi_cupy.reference._common import LOG2E, Array, compute_dtype, round_to, upcast
from fi_cupy.reference.masks import kv_range, multi_item_mask, positional_mask
from fi_cupy.reference.page import gather_pages, get_seq_lens
from fi_cupy.reference.quantization import unpack_segments
from fi_cupy.reference.rope import rope_frequencies, rotate

#: Score elements a block may hold: 16 Mi float32 are 64 MiB, and a few temporaries of that size exist at once.
_BLOCK_ELEMENTS = 1 << 24


class ScoreContext:
    """What a variant's functions see: indices that broadcast against the block they are given, and user parameters.

    Attributes
    ----------
    batch : int
    qo_idx, kv_idx, qo_head, kv_head : int arrays
        For scores ``[heads, rows, keys]``: shapes ``[1, rows, 1]``, ``[1, 1, keys]``, ``[heads, 1, 1]`` twice. For
        queries, keys and outputs ``[rows, heads, dim]``: the row index ``[rows, 1, 1]`` and the head ``[1, heads, 1]``;
        an index that has no meaning there is None.
    qo_len, kv_len : int
    sm_scale, logits_soft_cap, window_left : the numbers of the call
    """

    batch: int
    qo_idx: Array | None
    kv_idx: Array | None
    qo_head: Array | None
    kv_head: Array | None
    qo_len: int
    kv_len: int

    def __init__(self, params: Mapping[str, Any] | None = None, **values: Any) -> None:
        self.__dict__.update(params or {})
        self.__dict__.update(values)

    def at(self, **values: Any) -> ScoreContext:
        """The same context at other indices."""
        other = ScoreContext.__new__(ScoreContext)
        other.__dict__.update(self.__dict__)
        other.__dict__.update(values)
        return other


def get_alibi_slopes(n_heads: int) -> Array:
    """ALiBi slopes, float32 `[n_heads]`.

    With n the largest power of two <= n_heads: ``2^(-8 i / n)`` for i = 1..n, then ``2^(-4 (2j - 1) / n)``, j = 1, 2...

    Source: Press et al. 2022; flashinfer.utils.get_alibi_slopes.
    """
    n = 1 << (int(n_heads).bit_length() - 1)
    first = 2.0 ** (-8.0 * np.arange(1, n + 1) / n)
    rest = 2.0 ** (-4.0 * (2 * np.arange(1, n_heads - n + 1) - 1) / n)
    return np.concatenate([first, rest]).astype(np.float32)


def _per_head(scale: Any, heads: int, dtype: np.dtype) -> Array:
    """A scalar or per-head scale as ``[heads]``."""
    return np.broadcast_to(np.asarray(1.0 if scale is None else scale).astype(dtype).reshape(-1), (heads,))


def _call(variant: Any, name: str, *args: Any) -> Any:
    """Result of the variant's function `name`, or None when it has none."""
    function = getattr(variant, name, None)
    return None if function is None else function(*args)


def _transform_qk(q: Array, k: Array, variant: Any, base: ScoreContext, row_ctx: ScoreContext) -> tuple[Array, Array]:
    """Queries and keys after the variant's own transforms."""
    key_ctx = base.at(kv_idx=np.arange(k.shape[0])[:, None, None], kv_head=np.arange(k.shape[1])[None, :, None])
    new_q, new_k = _call(variant, "query_fn", q, row_ctx), _call(variant, "key_fn", k, key_ctx)
    return (q if new_q is None else new_q.astype(q.dtype)), (k if new_k is None else new_k.astype(k.dtype))


def _rotate_qk(q: Array, k: Array, freq: Array) -> tuple[Array, Array]:
    """Rotary embedding by position in the sequence, where the last query is at the last key."""
    qo_len, kv_len = q.shape[0], k.shape[0]
    q_angle = np.arange(kv_len - qo_len, kv_len)[:, None] * freq
    k_angle = np.arange(kv_len)[:, None] * freq
    return rotate(q, np.cos(q_angle), np.sin(q_angle)), rotate(k, np.cos(k_angle), np.sin(k_angle))


def _softmax_rows(s: Array, sinks: Array | None) -> tuple[Array, Array, Array]:
    """(unnormalised probabilities, their sum with the sink, base-2 lse) of ``s [Hq, rows, keys]``, written over `s`."""
    m = s.max(axis=-1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        m = np.maximum(m, sinks)
    shift = np.where(np.isneginf(m), 0, m)  # exp(-inf - 0) is 0, exp(-inf + inf) would be NaN
    np.subtract(s, shift, out=s)
    np.exp(s, out=s)
    d = s.sum(axis=-1, keepdims=True)
    if sinks is not None:
        d = d + np.exp(sinks - shift)
    with np.errstate(divide="ignore"):
        return s, d, (m * LOG2E + np.log2(d))[..., 0]


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    sm_scale: float | None = None,
    window_left: int = -1,
    logits_soft_cap: float | None = 0.0,
    pos_encoding_mode: str = "NONE",
    rope_scale: float | None = 1.0,
    rope_theta: float | None = 1e4,
    custom_mask: Array | None = None,
    sinks: Array | None = None,
    variant: Any = None,
    out_dtype: DTypeLike | None = None,
    alibi_slopes: Array | None = None,
    use_softmax: bool = True,
    q_scale: ArrayLike | None = None,
    k_scale: ArrayLike | None = None,
    v_scale: ArrayLike | None = None,
    batch: int = 0,
    params: Mapping[str, Any] | None = None,
) -> tuple[Array, Array | None]:
    """Multi-head attention of one request.

    Parameters
    ----------
    q : [qo_len, num_qo_heads, head_dim_qk]
    k : [kv_len, num_kv_heads, head_dim_qk]
    v : [kv_len, num_kv_heads, head_dim_vo]
        Query head h reads kv head ``h // (num_qo_heads // num_kv_heads)``.
    causal : bool
        Bottom-right aligned, see `masks.positional_mask`. With qo_len > kv_len the first rows see nothing.
    sm_scale : float, optional
        Default ``1 / sqrt(head_dim_qk)``.
    window_left : int
        Keys to the left of the query's own that are kept; negative is off; applies without causal as well.
    logits_soft_cap : float
        ``cap * tanh(s / cap)`` on the scaled (and ALiBi-biased) score, before the mask; <= 0 or None is off.
    pos_encoding_mode : "NONE", "ROPE_LLAMA" or "ALIBI"
        ROPE_LLAMA rotates halves, query i at position ``kv_len - qo_len + i``, key j at j. ALIBI adds
        ``slope * (kv_idx - qo_idx)`` with raw indices, not multiplied by `sm_scale`.
    rope_scale, rope_theta : float
        The frequency is ``theta^(-2i / head_dim) / rope_scale``.
    custom_mask : bool [qo_len, kv_len], optional
        True = visible. Replaces `causal`; the window still applies.
    sinks : [num_qo_heads], optional
        Raw logits (not scaled) that add ``exp(sink)`` to the denominator only; the lse includes them, so that a
        row without keys has ``lse = sink * log2(e)``.
    variant : object, optional
        ``query_fn(q, ctx)``, ``key_fn(k, ctx)``, ``score_fn(score, ctx)`` on the scaled score before the cap,
        ``mask_fn(ctx) -> bool``, ``post_process_fn(out, ctx)``, each optional or None, and ``use_softmax``.
    out_dtype : optional
        Default: dtype of `q`.
    alibi_slopes : [num_qo_heads], optional
        Default `get_alibi_slopes`.
    use_softmax : bool
        False: masked scores become 0 and ``out = S v`` without a denominator; there is no lse (None).
    q_scale, k_scale, v_scale : float or per-head array, optional
        Dequantisation multipliers; q and k scale the scores, v the output.
    batch, params
        Request number and user parameters for the variant's `ScoreContext`.

    Returns
    -------
    (out, lse)
        ``[qo_len, num_qo_heads, head_dim_vo]`` and float32 (float64) ``[qo_len, num_qo_heads]``, base 2.

    Source: Dao et al. 2022; flashinfer.prefill, csrc variants.cuh.
    """
    qo_len, num_qo_heads, head_dim_qk = q.shape
    kv_len, num_kv_heads, head_dim_vo = v.shape
    group = num_qo_heads // num_kv_heads
    ct = compute_dtype(q, k, v)
    out_dtype = q.dtype if out_dtype is None else np.dtype(out_dtype)
    use_softmax = use_softmax and getattr(variant, "use_softmax", True)
    sm_scale = 1.0 / math.sqrt(head_dim_qk) if sm_scale is None else float(sm_scale)
    cap = float(logits_soft_cap or 0.0)
    window_left = int(window_left)
    out = np.zeros((qo_len, num_qo_heads, head_dim_vo), dtype=ct)
    lse = np.full((qo_len, num_qo_heads), -np.inf, dtype=ct)
    if qo_len == 0:
        return round_to(out, out_dtype), lse if use_softmax else None

    q, k, v = upcast(q, ct), upcast(k, ct), upcast(v, ct)
    heads = np.arange(num_qo_heads)
    base = ScoreContext(
        params, batch=batch, qo_idx=None, kv_idx=None, qo_head=None, kv_head=None, qo_len=qo_len, kv_len=kv_len,
        sm_scale=sm_scale, logits_soft_cap=cap, window_left=window_left,
    )  # fmt: skip
    row_ctx = base.at(
        qo_idx=np.arange(qo_len)[:, None, None], qo_head=heads[None, :, None], kv_head=heads[None, :, None] // group
    )
    q, k = _transform_qk(q, k, variant, base, row_ctx)
    if pos_encoding_mode == "ROPE_LLAMA":
        q, k = _rotate_qk(q, k, rope_frequencies(head_dim_qk, rope_scale or 1.0, rope_theta or 1e4))
    slopes = None
    if pos_encoding_mode == "ALIBI":
        slopes = upcast(get_alibi_slopes(num_qo_heads) if alibi_slopes is None else alibi_slopes, ct)[:, None, None]
    if sinks is not None:
        sinks = upcast(sinks, ct).reshape(num_qo_heads, 1, 1)
    score_scale = (
        sm_scale * _per_head(q_scale, num_qo_heads, ct) * np.repeat(_per_head(k_scale, num_kv_heads, ct), group)
    )
    # [Hkv, group * qo, D]: one matrix product a kv head serves its whole group.
    q = (q * score_scale.astype(ct)[None, :, None]).transpose(1, 0, 2)
    k_t, v = k.transpose(1, 2, 0), v.transpose(1, 0, 2)  # strided, but BLAS takes each head as it lies
    causal = causal and custom_mask is None

    rows_per_block = max(1, _BLOCK_ELEMENTS // max(1, num_qo_heads * kv_len))
    for start in range(0, qo_len, rows_per_block):
        stop = min(start + rows_per_block, qo_len)
        rows = stop - start
        lo, hi = kv_range(start, stop, qo_len, kv_len, causal=causal, window_left=window_left)
        q_block = np.ascontiguousarray(q[:, start:stop]).reshape(num_kv_heads, group * rows, head_dim_qk)
        s = (q_block @ k_t[:, :, lo:hi]).reshape(num_qo_heads, rows, hi - lo)
        qo_idx, kv_idx = np.arange(start, stop)[None, :, None], np.arange(lo, hi)[None, None, :]
        ctx = base.at(qo_idx=qo_idx, kv_idx=kv_idx, qo_head=heads[:, None, None], kv_head=heads[:, None, None] // group)
        if slopes is not None:
            s += slopes * (kv_idx - qo_idx).astype(ct)
        new_s = _call(variant, "score_fn", s, ctx)
        if new_s is not None:
            s = np.array(np.broadcast_to(new_s, s.shape), dtype=ct)
        if cap > 0:
            s = cap * np.tanh(s / cap)
        keep = positional_mask(qo_idx, kv_idx, qo_len, kv_len, causal=causal, window_left=window_left)
        custom = None if custom_mask is None else custom_mask[None, start:stop, lo:hi]
        for other in (custom, _call(variant, "mask_fn", ctx)):
            if other is not None:
                other = np.asarray(other, dtype=bool)
                keep = other if keep is None else keep & other
        if keep is not None:
            np.copyto(s, -np.inf if use_softmax else 0.0, where=~keep)
        if use_softmax:
            s, d, block_lse = _softmax_rows(s, sinks)
            lse[start:stop] = block_lse.T
        o = (s.reshape(num_kv_heads, group * rows, hi - lo) @ v[:, lo:hi]).reshape(num_qo_heads, rows, head_dim_vo)
        if use_softmax:
            o /= np.where(d > 0, d, 1)
        out[start:stop] = o.transpose(1, 0, 2)

    if v_scale is not None:
        out *= np.repeat(_per_head(v_scale, num_kv_heads, ct), group)[None, :, None]
    new_out = _call(variant, "post_process_fn", out, row_ctx)
    if new_out is not None:
        out = new_out.astype(ct)
    return round_to(out, out_dtype), lse if use_softmax else None


def _heads_last(x: Array, kv_layout: str) -> Array:
    """``[kv_len, heads, dim]`` of a single request's keys or values."""
    return x if kv_layout == "NHD" else x.swapaxes(0, 1)


def single_prefill(
    q: Array,
    k: Array,
    v: Array,
    *,
    kv_layout: str = "NHD",
    custom_mask: Array | None = None,
    packed_custom_mask: Array | None = None,
    **options: Any,
) -> tuple[Array, Array | None]:
    """`attention` with a kv layout and a possibly packed mask.

    Parameters
    ----------
    q : [qo_len, num_qo_heads, head_dim_qk]
    k, v : [kv_len, num_kv_heads, dim] for NHD, [num_kv_heads, kv_len, dim] for HND
    custom_mask : bool [qo_len, kv_len] or flat
    packed_custom_mask : uint8, optional
        Row-major bits, little-endian in a byte; used when `custom_mask` is None.
    **options
        The other options of `attention`.

    Source: flashinfer.prefill.single_prefill_with_kv_cache.
    """
    k, v = _heads_last(k, kv_layout), _heads_last(v, kv_layout)
    shape = (q.shape[0], k.shape[0])
    if custom_mask is None and packed_custom_mask is not None:
        (custom_mask,) = unpack_segments(packed_custom_mask, np.asarray([shape[0] * shape[1]]))
    mask = None if custom_mask is None else np.asarray(custom_mask).reshape(shape)
    return attention(q, k, v, custom_mask=mask, **options)


def single_decode(
    q: Array, k: Array, v: Array, *, kv_layout: str = "NHD", **options: Any
) -> tuple[Array, Array | None]:
    """`attention` of one query token, ``q [num_qo_heads, head_dim] -> (out [num_qo_heads, dim], lse [num_qo_heads])``.

    Source: flashinfer.decode.single_decode_with_kv_cache.
    """
    out, lse = attention(q[None], _heads_last(k, kv_layout), _heads_last(v, kv_layout), **options)
    return out[0], None if lse is None else lse[0]


def _request_masks(
    qo_lens: Array,
    kv_lens: Array,
    custom_mask: Array | None,
    packed_custom_mask: Array | None,
    prefix_len: Array | None,
    token_pos_in_items: Array | None,
    token_pos_in_items_len: int,
) -> Sequence[Array | None]:
    """One ``[qo_len, kv_len]`` mask a request, from whichever of the three forms is given."""
    shapes = list(zip(qo_lens.tolist(), kv_lens.tolist(), strict=True))
    sizes = qo_lens * kv_lens
    if prefix_len is not None and token_pos_in_items is not None:
        table = np.asarray(token_pos_in_items).reshape(len(shapes), token_pos_in_items_len or -1)
        return [multi_item_mask(m, n, int(prefix_len[b]), table[b]) for b, (m, n) in enumerate(shapes)]
    if custom_mask is not None:
        flat = np.split(np.asarray(custom_mask).reshape(-1)[: int(sizes.sum())], np.cumsum(sizes)[:-1])
    elif packed_custom_mask is not None:
        flat = unpack_segments(np.asarray(packed_custom_mask), sizes)
    else:
        return [None] * len(shapes)
    return [f.reshape(shape) for f, shape in zip(flat, shapes, strict=True)]


def _each_request(
    q: Array,
    qo_indptr: Array,
    kv_of: Callable[[int], tuple[Array, Array]],
    masks: Sequence[Array | None],
    head_dim_vo: int,
    **options: Any,
) -> tuple[Array, Array | None]:
    """Run `attention` for every request; rows of `q` that belong to none (graph padding) give 0 and -inf."""
    out: Array | None = None
    lse: Array | None = None
    for b in range(len(qo_indptr) - 1):
        start, stop = int(qo_indptr[b]), int(qo_indptr[b + 1])
        k, v = kv_of(b)
        o, s = attention(q[start:stop], k, v, custom_mask=masks[b], batch=b, **options)
        if out is None:
            out = np.zeros((q.shape[0], *o.shape[1:]), dtype=o.dtype)
            lse = None if s is None else np.full((q.shape[0], s.shape[1]), -np.inf, dtype=s.dtype)
        out[start:stop] = o
        if lse is not None:
            lse[start:stop] = s
    if out is None:  # an empty batch
        out_dtype = options.get("out_dtype") or q.dtype
        out = np.zeros((q.shape[0], q.shape[1], head_dim_vo), dtype=out_dtype)
        lse = np.full(q.shape[:2], -np.inf, dtype=compute_dtype(q))
    return out, lse


def batch_prefill_paged(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    qo_indptr: Array,
    kv_indptr: Array,
    kv_indices: Array,
    last_page_len: Array | None = None,
    *,
    kv_len_arr: Array | None = None,
    kv_layout: str = "NHD",
    custom_mask: Array | None = None,
    packed_custom_mask: Array | None = None,
    prefix_len_ptr: Array | None = None,
    token_pos_in_items_ptr: Array | None = None,
    token_pos_in_items_len: int = 0,
    **options: Any,
) -> tuple[Array, Array | None]:
    """`attention` of a ragged batch of queries over a paged cache.

    Parameters
    ----------
    q : [qo_indptr[-1], num_qo_heads, head_dim_qk]
    k_cache, v_cache : paged, any strides; see `page`
    qo_indptr, kv_indptr : int [batch + 1]
    kv_indices : int [pages in use]
    last_page_len : int [batch]
    kv_len_arr : int [batch], optional
        Tokens of every request, instead of `last_page_len`.
    kv_layout : "NHD" or "HND"
    custom_mask : bool, optional
        The requests' row-major ``[qo_len, kv_len]`` masks, one after the other.
    packed_custom_mask : uint8, optional
        The same, little-endian bits, every request starting on a byte.
    prefix_len_ptr, token_pos_in_items_ptr, token_pos_in_items_len
        Multi-item scoring, see `masks.multi_item_mask`; positions are padded to ``token_pos_in_items_len`` a request.
    **options
        The other options of `attention`.

    Returns
    -------
    (out, lse)
        As `attention`, rows as in `q`.

    Source: flashinfer.prefill.BatchPrefillWithPagedKVCacheWrapper.
    """
    page_size = k_cache.shape[1 if kv_layout == "NHD" else 2]
    if kv_len_arr is None:
        assert last_page_len is not None
        kv_len_arr = get_seq_lens(kv_indptr, last_page_len, page_size)
    kv_lens = np.asarray(kv_len_arr, dtype=np.int64)
    indices = np.asarray(kv_indices)

    def kv_of(b: int) -> tuple[Array, Array]:
        pages = indices[int(kv_indptr[b]) : int(kv_indptr[b + 1])]
        length = int(kv_lens[b])
        return gather_pages(k_cache, pages, length, kv_layout), gather_pages(v_cache, pages, length, kv_layout)

    masks = _request_masks(
        np.diff(np.asarray(qo_indptr, dtype=np.int64)),
        kv_lens,
        custom_mask,
        packed_custom_mask,
        prefix_len_ptr,
        token_pos_in_items_ptr,
        token_pos_in_items_len,
    )
    return _each_request(q, qo_indptr, kv_of, masks, v_cache.shape[-1], **options)


def batch_prefill_ragged(
    q: Array,
    k: Array,
    v: Array,
    qo_indptr: Array,
    kv_indptr: Array,
    *,
    custom_mask: Array | None = None,
    packed_custom_mask: Array | None = None,
    prefix_len_ptr: Array | None = None,
    token_pos_in_items_ptr: Array | None = None,
    token_pos_in_items_len: int = 0,
    **options: Any,
) -> tuple[Array, Array | None]:
    """`attention` of a ragged batch, ``k, v [kv_indptr[-1], num_kv_heads, dim]``; see `batch_prefill_paged`.

    Source: flashinfer.prefill.BatchPrefillWithRaggedKVCacheWrapper.
    """
    masks = _request_masks(
        np.diff(np.asarray(qo_indptr, dtype=np.int64)),
        np.diff(np.asarray(kv_indptr, dtype=np.int64)),
        custom_mask,
        packed_custom_mask,
        prefix_len_ptr,
        token_pos_in_items_ptr,
        token_pos_in_items_len,
    )

    def kv_of(b: int) -> tuple[Array, Array]:
        rows = slice(int(kv_indptr[b]), int(kv_indptr[b + 1]))
        return k[rows], v[rows]

    return _each_request(q, qo_indptr, kv_of, masks, v.shape[-1], **options)


def batch_decode_paged(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    indptr: Array,
    indices: Array,
    last_page_len: Array | None = None,
    *,
    kv_layout: str = "NHD",
    q_len_per_req: int = 1,
    **options: Any,
) -> tuple[Array, Array | None]:
    """`attention` of `q_len_per_req` query tokens a request over a paged cache; more than one implies causal.

    ``q [batch * q_len_per_req, num_qo_heads, head_dim]``; the rest as in `batch_prefill_paged`.

    Source: flashinfer.decode.BatchDecodeWithPagedKVCacheWrapper.
    """
    qo_indptr = np.arange(len(indptr)) * q_len_per_req
    options["causal"] = options.get("causal", False) or q_len_per_req > 1
    return batch_prefill_paged(
        q, k_cache, v_cache, qo_indptr, indptr, indices, last_page_len, kv_layout=kv_layout, **options
    )
