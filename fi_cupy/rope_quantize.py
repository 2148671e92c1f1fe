"""Rotary position embedding fused with a cast to fp8, and with writing the keys and values into a paged cache."""

from __future__ import annotations

from typing import Any

from fi_cupy import rope_quantize_kernel as kernel
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.dtypes import FLOAT_TYPES, FP8_TYPES, HALF_TYPES, INDEX_TYPES, DType, float8_e4m3fn, float32, int32, uint8
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, ShapeError
from fi_cupy.kv_cache import check_layout, token_strides
from fi_cupy.page_table import check_host_table
from fi_cupy.reference import rope as reference


def _out_like(op: str, name: str, given: Any, x: View, kind: DType) -> View:
    if given is None:
        return x.empty(x.shape, kind)
    o = view(given, op, name).writable(op, name)
    check_shape(op, name, o, x.shape)
    check_dtype(op, name, o, (kind, uint8) if kind in FP8_TYPES else (kind,))
    check_inner(op, name, o)
    check_device(op, x, **{name: o})
    return o.typed(kind)


def _kind(op: str, quantize_dtype: Any, given: tuple[Any, ...]) -> DType:
    """The type named, else that of the first output, else e4m3."""
    if quantize_dtype is None:
        for out in given:
            found = None if out is None else view(out, op, "out").dtype
            if found in FP8_TYPES:
                return found
        return float8_e4m3fn
    kind = to_dtype(quantize_dtype)
    if kind not in FP8_TYPES:
        raise ArgumentError(f"{op}: quantize_dtype is {kind.name}, expected float8_e4m3fn or float8_e5m2")
    return kind


def _inputs(
    op: str, arrays: dict[str, Any], cos_sin_cache: Any, pos_ids: Any, kinds: tuple[DType, ...] = HALF_TYPES
) -> tuple[dict[str, View], View, View]:
    """The arrays that there are (the first is q_rope), the cache of cosines, and the positions; checked."""
    views = {n: view(x, op, n) for n, x in arrays.items() if x is not None or n.endswith("rope")}
    q = views["q_rope"]
    check_ndim(op, "q_rope", q, 3)
    check_dtype(op, "q_rope", q, kinds)
    table, pos = view(cos_sin_cache, op, "cos_sin_cache"), view(pos_ids, op, "pos_ids")
    for name, x in views.items():
        check_ndim(op, name, x, *((3,) if name.startswith("q") else (2, 3)))
        check_dtype(op, name, x, (q.dtype,), "like q_rope")
        check_inner(op, name, x)
        check_device(op, q, **{name: x})
        if x.shape[0] != q.shape[0]:
            raise ShapeError(f"{op}: {name} has {x.shape[0]} tokens, expected {q.shape[0]} = q_rope.shape[0]")
        partner = views.get(name.replace("nope", "rope"))
        if partner is not None and x.shape[:-1] != partner.shape[:-1]:
            raise ShapeError(
                f"{op}: {name} has shape {x.shape}, expected {partner.shape[:-1]} before its last dimension"
            )
        if x.shape[-1] % 2:
            raise ShapeError(f"{op}: {name} has shape {x.shape}, expected an even last dimension")
    k, dim = views["k_rope"], q.shape[2]
    if k.shape[-1] != dim:
        raise ShapeError(f"{op}: k_rope has {k.shape[-1]} features, expected {dim} = q_rope.shape[-1]")
    check_ndim(op, "cos_sin_cache", table, 2)
    check_dtype(op, "cos_sin_cache", table, (float32,))
    check_inner(op, "cos_sin_cache", table)
    check_shape(op, "cos_sin_cache", table, (table.shape[0], dim), "= (positions, q_rope.shape[-1])")
    check_shape(op, "pos_ids", pos, (q.shape[0],), "= q_rope.shape[:1]")
    check_dtype(op, "pos_ids", pos, INDEX_TYPES)
    check_inner(op, "pos_ids", pos)
    check_device(op, q, cos_sin_cache=table, pos_ids=pos)
    return views, table, pos


def _host_positions(op: str, pos: View, table: View) -> Any:
    """The rows of the cache, on the CPU, where they can be checked."""
    rows = pos.numpy()
    if pos.size and (rows.min() < 0 or rows.max() >= table.shape[0]):
        raise ArgumentError(f"{op}: pos_ids leave 0 to {table.shape[0] - 1}, the rows of cos_sin_cache")
    return rows


def _scales(op: str, quant_scale_q: float, quant_scale_kv: float) -> tuple[float, float]:
    for name, value in (("quant_scale_q", quant_scale_q), ("quant_scale_kv", quant_scale_kv)):
        if not 0 < value < float("inf"):
            raise ArgumentError(f"{op}: {name} is {value}, expected a positive number")
    return float(quant_scale_q), float(quant_scale_kv)


def rope_quantize_fp8(
    q_rope: Any,
    k_rope: Any,
    q_nope: Any,
    k_nope: Any,
    cos_sin_cache: Any,
    pos_ids: Any,
    is_neox: bool = True,
    quantize_dtype: Any = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: Any = None,
    k_rope_out: Any = None,
    q_nope_out: Any = None,
    k_nope_out: Any = None,
    enable_pdl: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """Rotate the rope parts of q and k and cast everything to fp8: ``clamp(x * quant_scale)``.

    Parameters
    ----------
    q_rope : array, [nnz, num_qo_heads, rope_dim], float16 or bfloat16
    k_rope : array, [nnz, num_kv_heads, rope_dim], or [nnz, rope_dim] (MLA), dtype of `q_rope`
    q_nope, k_nope : array, the same shapes with any even last dimension, or None
        What is not rotated. All strides but the innermost are free: parts may be slices of one tensor.
    cos_sin_cache : array, [max_position, rope_dim], float32
        First half cosines, second half sines.
    pos_ids : array, [nnz], int32 or int64
        Rows of the cache; values outside it are an error on the CPU and undefined on a GPU.
    is_neox : bool
        True pairs feature i with i + rope_dim / 2, False pairs 2i with 2i + 1.
    quantize_dtype : dtype, optional
        float8_e4m3fn or float8_e5m2; None is the outputs' type, or e4m3.
    quant_scale_q, quant_scale_kv : float
        Multiplied with q and with k before the cast.
    q_rope_out, k_rope_out, q_nope_out, k_nope_out : array, optional
        Written instead of new arrays; fp8, or its bytes (uint8).
    enable_pdl : bool
        Launch so that this kernel may start before its predecessor has ended (sm_90 and later).

    Returns
    -------
    (q_rope_out, k_rope_out, q_nope_out, k_nope_out)
        fp8 in the shapes of the inputs, None for what is None. Computed in fp32, rounded once to nearest even.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    flashinfer.rope.rope_quantize_fp8.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.rope import rope_quantize_fp8
    >>> q, cache = np.ones((1, 1, 2), np.float16), np.array([[0.0, 1.0]], np.float32)  # a quarter turn
    >>> rope_quantize_fp8(q, q, None, None, cache, np.array([0]), quant_scale_q=2.0)[0]
    array([[[-2, 2]]], dtype='float8_e4m3fn')
    """
    return _rope_quantize(
        "rope_quantize_fp8", (q_rope, k_rope, q_nope, k_nope), cos_sin_cache, pos_ids, is_neox, quantize_dtype,
        quant_scale_q, quant_scale_kv, (q_rope_out, k_rope_out, q_nope_out, k_nope_out), enable_pdl,
    )  # fmt: skip


def mla_rope_quantize_fp8(
    q_rope: Any,
    k_rope: Any,
    q_nope: Any,
    k_nope: Any,
    cos_sin_cache: Any,
    pos_ids: Any,
    is_neox: bool = True,
    quantize_dtype: Any = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    q_rope_out: Any = None,
    k_rope_out: Any = None,
    q_nope_out: Any = None,
    k_nope_out: Any = None,
    enable_pdl: bool = False,
) -> tuple[Any, Any, Any, Any]:
    """`rope_quantize_fp8` under the name it has for MLA. Source: flashinfer.rope.mla_rope_quantize_fp8."""
    return _rope_quantize(
        "mla_rope_quantize_fp8", (q_rope, k_rope, q_nope, k_nope), cos_sin_cache, pos_ids, is_neox, quantize_dtype,
        quant_scale_q, quant_scale_kv, (q_rope_out, k_rope_out, q_nope_out, k_nope_out), enable_pdl,
    )  # fmt: skip


_NAMES = ("q_rope", "k_rope", "q_nope", "k_nope")


def _host(views: dict[str, View], name: str) -> Any:
    return views[name].numpy() if name in views else None


def _rope_quantize(
    op: str, arrays: tuple[Any, ...], cos_sin_cache: Any, pos_ids: Any, is_neox: bool, quantize_dtype: Any,
    quant_scale_q: float, quant_scale_kv: float, given: tuple[Any, ...], enable_pdl: bool,
) -> tuple[Any, Any, Any, Any]:  # fmt: skip
    views, table, pos = _inputs(op, dict(zip(_NAMES, arrays, strict=True)), cos_sin_cache, pos_ids)
    kind = _kind(op, quantize_dtype, given)
    scales = _scales(op, quant_scale_q, quant_scale_kv)
    outs: dict[str, View] = {}
    for name, out in zip(_NAMES, given, strict=True):
        if name in views:
            outs[name] = _out_like(op, f"{name}_out", out, views[name], kind)
        elif out is not None:
            raise ArgumentError(f"{op}: {name}_out is given, expected {name} with it")
    if table.is_cpu:
        rows = _host_positions(op, pos, table)
        a, b, c, d = (_host(views, n) for n in _NAMES)
        results = reference.rope_quantize_fp8(a, b, c, d, table.numpy(), rows, is_neox, kind.np, *scales)
        for name, values in zip(_NAMES, results, strict=True):
            if values is not None:
                outs[name].write(values)
    else:
        sections = [
            kernel.plain(views[n], outs[n], scales[n.startswith("k")]) if n in views else None for n in _NAMES
        ]  # fmt: skip
        kernel.launch([*sections, None], table, pos, kind, not is_neox, pdl=bool(enable_pdl))
    return tuple(
        None if n not in outs else (outs[n].result() if out is None else out)
        for n, out in zip(_NAMES, given, strict=True)
    )  # type: ignore[return-value]


def _page_index(op: str, name: str, x: Any, like: View, shape: tuple[int, ...] | None = None) -> View:
    v = view(x, op, name)
    check_ndim(op, name, v, 1)
    check_dtype(op, name, v, (int32,))
    check_inner(op, name, v)
    check_device(op, like, **{name: v})
    if shape is not None:
        check_shape(op, name, v, shape, "= (tokens,)")
    return v


def _cache_sections(
    op: str, views: dict[str, View], caches: tuple[View, View], scale: float, layout: str
) -> list[kernel.Section | None]:
    """(k_rope, k_nope, v) with their places in the caches: GQA's (keys, values) or MLA's (ckv, kpe)."""
    k_rope, k_nope, v = views["k_rope"], views.get("k_nope"), views.get("v")
    first, second = caches
    size = first.dtype.itemsize
    if v is None:  # MLA: no head dimension in the caches
        ckv, kpe = ((c.strides[0] * size, c.strides[1] * size, 0) for c in caches)
        return [
            kernel.Section(k_rope, second, scale, kpe, paged=True),
            None if k_nope is None else kernel.Section(k_nope, first, scale, ckv, paged=True),
            None,
        ]
    places: list[tuple[int, int, int]] = []
    for c in caches:
        page, token, head = token_strides(c, layout)
        places.append((page * size, token * size, head * size))
    return [
        kernel.Section(k_rope, first, scale, places[0], paged=True),
        None
        if k_nope is None
        else kernel.Section(k_nope, first, scale, places[0], offset=k_rope.shape[-1] * size, paged=True),
        kernel.Section(v, second, scale, places[1], paged=True),
    ]


def _checked_caches(
    op: str, views: dict[str, View], paged_kv_cache: Any, kind: DType | None, page_size: int, layout: str,
    others: tuple[DType, ...] = (),
) -> tuple[View, View]:  # fmt: skip
    """(keys, values), or (ckv, kpe), of `kind` or any fp8 type, or of one of the `others`."""
    if not isinstance(paged_kv_cache, (tuple, list)) or len(paged_kv_cache) != 2:
        raise ArgumentError(f"{op}: paged_kv_cache is a {type(paged_kv_cache).__name__}, expected a pair of arrays")
    q, k, v = views["q_rope"], views["k_rope"], views.get("v")
    nope = views["k_nope"].shape[-1] if "k_nope" in views else 0
    rope = k.shape[-1]
    found = []
    for name, given, dim in zip(
        ("paged_kv_cache[0]", "paged_kv_cache[1]"), paged_kv_cache,
        (nope, rope) if v is None else (rope + nope, v.shape[-1]), strict=True,
    ):  # fmt: skip
        c = view(given, op, name).writable(op, name)
        check_dtype(op, name, c, (*others, *FP8_TYPES, uint8) if kind is None else (kind, uint8))
        check_inner(op, name, c)
        check_device(op, q, **{name: c})
        if v is None:
            inner: tuple[int, ...] = (page_size, dim)
        else:
            heads = k.shape[1] if len(k.shape) == 3 else 1
            inner = (page_size, heads, dim) if layout == "NHD" else (heads, page_size, dim)
        if v is not None or dim or "k_nope" in views:
            check_shape(op, name, c, (c.shape[0], *inner), "= [pages, ...]")
        found.append(c.typed(float8_e4m3fn if kind is None else kind) if c.dtype is uint8 else c)
    if found[0].dtype is not found[1].dtype:
        check_dtype(op, "paged_kv_cache[1]", found[1], (found[0].dtype,), "like paged_kv_cache[0]")
    return found[0], found[1]


def rope_quantize_fp8_append_paged_kv_cache(
    q_rope: Any,
    k_rope: Any,
    q_nope: Any,
    k_nope: Any,
    v: Any,
    cos_sin_cache: Any,
    pos_ids: Any,
    paged_kv_cache: tuple[Any, Any],
    kv_indices: Any,
    kv_indptr: Any,
    batch_indices: Any,
    positions: Any,
    is_neox: bool = True,
    quantize_dtype: Any = None,
    quant_scale_q: float = 1.0,
    quant_scale_kv: float = 1.0,
    page_size: int = 16,
    kv_layout: str = "NHD",
    q_rope_out: Any = None,
    q_nope_out: Any = None,
    enable_pdl: bool = False,
) -> tuple[Any, Any]:
    """`rope_quantize_fp8`, with the keys (and values) written into a paged fp8 cache instead of returned; one launch.

    Parameters
    ----------
    q_rope, k_rope, q_nope, k_nope, cos_sin_cache, pos_ids, is_neox, quant_scale_q, quant_scale_kv, enable_pdl
        As in `rope_quantize_fp8`; quant_scale_kv multiplies v, too.
    v : array, [nnz, num_kv_heads, head_dim], or None
        None means MLA: `k_rope` and `k_nope` have no heads (or one).
    paged_kv_cache : (array, array), fp8 or its bytes (uint8)
        With v: keys ``[pages, page_size, num_kv_heads, rope_dim + nope_dim]`` (NHD; HND swaps the middle two), of
        which the rope part comes first, and values. MLA: ``[pages, page_size, nope_dim]`` (ckv) and
        ``[pages, page_size, rope_dim]`` (kpe).
    kv_indices, kv_indptr, batch_indices, positions : array, int32
        As in `append_paged_kv_cache`: positions in the cache, which need not be pos_ids.
    quantize_dtype : dtype, optional
        None is the cache's type (bytes count as e4m3).
    page_size : int
        What the caches must have.
    kv_layout : "NHD" or "HND"
    q_rope_out, q_nope_out : array, optional

    Returns
    -------
    (q_rope_out, q_nope_out)

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    flashinfer.rope.rope_quantize_fp8_append_paged_kv_cache.
    """
    return _rope_append(
        "rope_quantize_fp8_append_paged_kv_cache", (q_rope, k_rope, q_nope, k_nope, v), cos_sin_cache, pos_ids,
        paged_kv_cache, (batch_indices, positions, kv_indices, kv_indptr), is_neox, quantize_dtype, quant_scale_q,
        quant_scale_kv, page_size, kv_layout, (q_rope_out, q_nope_out), enable_pdl,
    )  # fmt: skip


def rope_append_paged_kv_cache(
    q_rope: Any,
    k_rope: Any,
    q_nope: Any,
    k_nope: Any,
    v: Any,
    cos_sin_cache: Any,
    pos_ids: Any,
    paged_kv_cache: tuple[Any, Any],
    kv_indices: Any,
    kv_indptr: Any,
    batch_indices: Any,
    positions: Any,
    is_neox: bool = True,
    quant_scale_kv: float = 1.0,
    page_size: int = 16,
    kv_layout: str = "NHD",
    q_rope_out: Any = None,
    q_nope_out: Any = None,
    enable_pdl: bool = False,
) -> tuple[Any, Any]:
    """Rotate the rope parts of q and k, and write keys and values into a paged cache; one launch.

    `rope_quantize_fp8_append_paged_kv_cache` for queries that keep their type. What is not said here is as there.

    Parameters
    ----------
    q_rope : array, [nnz, num_qo_heads, rope_dim], float16, bfloat16 or float32
        May be `q_rope_out` itself.
    k_rope, q_nope, k_nope, v, cos_sin_cache, pos_ids, is_neox, page_size, kv_layout
    paged_kv_cache : (array, array)
        Of the type of `q_rope`, or fp8 (or its bytes, uint8).
    kv_indices, kv_indptr, batch_indices, positions : array, int32
    quant_scale_kv : float
        Multiplied with k and v before the cast to fp8; other caches take no factor but 1.
    q_rope_out, q_nope_out : array, optional
        Written instead of new arrays.
    enable_pdl : bool
        Programmatic dependent launch (sm_90 and later): the kernel starts before its predecessor in the stream has
        ended and reads the page table, the positions and `cos_sin_cache` at once; the rest waits. Only for tables that
        neither the predecessor writes nor a kernel in front of it: where that one was launched dependently, too, it
        may still be waiting for its own predecessor.

    Returns
    -------
    (q_rope_out, q_nope_out)
        The type of `q_rope`; None for what is None.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.rope import rope_append_paged_kv_cache
    >>> q, cache = np.ones((1, 1, 2), np.float32), np.zeros((1, 2, 1, 2), np.float32)
    >>> table = np.array([[0.0, 1.0]], np.float32)                                               # a quarter turn
    >>> zero, pages = np.zeros(1, np.int32), np.array([0, 1], np.int32)
    >>> rope_append_paged_kv_cache(q, q, None, None, q, table, zero, (cache, cache.copy()), zero, pages, zero, zero,
    ...                            page_size=2)[0]
    array([[[-1.,  1.]]], dtype=float32)
    >>> cache[0, 0]
    array([[-1.,  1.]], dtype=float32)
    """
    return _rope_append(
        "rope_append_paged_kv_cache", (q_rope, k_rope, q_nope, k_nope, v), cos_sin_cache, pos_ids, paged_kv_cache,
        (batch_indices, positions, kv_indices, kv_indptr), is_neox, None, 1.0, quant_scale_kv, page_size, kv_layout,
        (q_rope_out, q_nope_out), enable_pdl, keep_q=True,
    )  # fmt: skip


def _rope_append(
    op: str, given: tuple[Any, ...], cos_sin_cache: Any, pos_ids: Any, paged_kv_cache: Any, table: tuple[Any, ...],
    is_neox: bool, quantize_dtype: Any, quant_scale_q: float, quant_scale_kv: float, page_size: int, kv_layout: str,
    q_outs: tuple[Any, Any], enable_pdl: bool, keep_q: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Both functions that append. `keep_q`: queries keep their type, and the cache may have it, too."""
    check_layout(op, kv_layout)
    arrays = dict(zip((*_NAMES, "v"), given, strict=True))
    views, angles, pos = _inputs(op, arrays, cos_sin_cache, pos_ids, FLOAT_TYPES if keep_q else HALF_TYPES)
    q, k = views["q_rope"], views["k_rope"]
    if "v" not in views and len(k.shape) == 3 and k.shape[1] != 1:
        raise ShapeError(f"{op}: k_rope has shape {k.shape}, expected one head where v is None (MLA)")
    if "v" in views and views["v"].shape[:-1] != k.shape[:-1]:
        raise ShapeError(f"{op}: v has shape {views['v'].shape}, expected {k.shape[:-1]} before its last dimension")
    named = None if quantize_dtype is None else _kind(op, quantize_dtype, ())
    others = (q.dtype,) if keep_q else ()
    caches = _checked_caches(op, views, paged_kv_cache, named, page_size, kv_layout, others)
    kind, scales = caches[0].dtype, _scales(op, quant_scale_q, quant_scale_kv)
    if kind not in FP8_TYPES and quant_scale_kv != 1:
        raise ArgumentError(f"{op}: quant_scale_kv is {quant_scale_kv}, expected 1 for a cache of {kind.name}")
    q_kind, tokens = q.dtype if keep_q else kind, (q.shape[0],)
    pages = (
        _page_index(op, "batch_indices", table[0], q, tokens),
        _page_index(op, "positions", table[1], q, tokens),
        _page_index(op, "kv_indices", table[2], q),
        _page_index(op, "kv_indptr", table[3], q),
    )
    outs = {
        n: _out_like(op, f"{n}_out", out, views[n], q_kind)
        for n, out in zip(("q_rope", "q_nope"), q_outs, strict=True)
        if n in views
    }
    if "q_nope" not in views and q_outs[1] is not None:
        raise ArgumentError(f"{op}: q_nope_out is given, expected q_nope with it")
    if pages[3].shape[0] < 1:
        raise ShapeError(f"{op}: kv_indptr has shape {pages[3].shape}, expected (requests + 1,)")
    if q.is_cpu:
        rows = _host_positions(op, pos, angles)
        check_host_table(op, pages, page_size, min(c.shape[0] for c in caches))
        a, b, c, d, e = (_host(views, n) for n in (*_NAMES, "v"))
        batch, cached, indices, indptr = (p.numpy() for p in pages)
        results = reference.rope_quantize_fp8_append_paged_kv_cache_(
            a, b, c, d, e, angles.numpy(), rows, (caches[0].numpy(), caches[1].numpy()), indices, indptr, batch,
            cached, is_neox, kind.np, *scales, kv_layout, q_kind.np,
        )  # fmt: skip
        for name, values in zip(("q_rope", "q_nope"), results, strict=True):
            if values is not None:
                outs[name].write(values)
    else:
        k_rope_to, k_nope_to, v_to = _cache_sections(op, views, caches, scales[1], kv_layout)
        q_to = [kernel.plain(views[n], outs[n], scales[0]) if n in outs else None for n in ("q_rope", "q_nope")]
        kernel.launch(
            [q_to[0], k_rope_to, q_to[1], k_nope_to, v_to], angles, pos, kind, not is_neox, pages, page_size,
            bool(enable_pdl), q_out=q_kind, early=keep_q,
        )  # fmt: skip
    return (
        outs["q_rope"].result() if q_outs[0] is None else q_outs[0],
        None if "q_nope" not in views else (outs["q_nope"].result() if q_outs[1] is None else q_outs[1]),
    )
