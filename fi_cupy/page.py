"""Paged key/value cache: writing new tokens into their pages, and the index arithmetic around it."""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

import numpy as np

from fi_cupy import page_quantized
from fi_cupy.arrays import View, view
from fi_cupy.checks import as_sizes, check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.dtypes import int32
from fi_cupy.errors import ArgumentError, ShapeError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.kv_cache import PagedKV, check_layout, paged_kv, token_strides
from fi_cupy.page_table import check_host_table, check_offsets
from fi_cupy.reference import page as reference

_APPEND = ParamsStruct("AppendParams", page_quantized.APPEND_FIELDS)
_POSITIONS = ParamsStruct(
    "PositionsParams",
    [
        ("append_indptr", "ptr"),
        ("seq_lens", "ptr"),
        ("batch_indices", "ptr"),
        ("positions", "ptr"),
        ("nnz", "u32"),
        ("batch", "u32"),
    ],
)
_SEQ_LENS = ParamsStruct(
    "SeqLensParams",
    [
        ("kv_indptr", "ptr"),
        ("kv_last_page_len", "ptr"),
        ("seq_lens", "ptr"),
        ("batch", "u32"),
        ("page_size", "i32"),
    ],
)
_THREADS = 128


@lru_cache(maxsize=256)
def append_spec(bytes_a: int, bytes_b: int, vec: int, unroll: int = 8, threads: int = _THREADS) -> KernelSpec:
    """The kernel that copies rows of `bytes_a` and `bytes_b` bytes a head, `vec` an access, of `unroll` tokens."""
    return KernelSpec(
        symbol=f"append_pages_{bytes_a}_{bytes_b}_v{vec}x{unroll}t{threads}",
        header="page.cuh",
        function="append_pages",
        params=_APPEND,
        config=(
            ("kBytesA", bytes_a),
            ("kBytesB", bytes_b),
            ("kVec", vec),
            ("kThreads", threads),
            ("kUnroll", unroll),
        ),
        threads=threads,
    )


def append_specs(bytes_a: int, bytes_b: int, heads: int) -> list[KernelSpec]:
    """The copying kernels of few and of many tokens of `heads` heads."""
    threads, _ = page_quantized.append_shape(1, heads * (bytes_a + bytes_b) // 16, 1)
    return [append_spec(bytes_a, bytes_b, 16, unroll, threads) for unroll in (1, 8)]


@lru_cache(maxsize=1)
def positions_spec() -> KernelSpec:
    """The kernel of `get_batch_indices_positions`."""
    return KernelSpec(
        symbol="batch_positions",
        header="page.cuh",
        function="batch_positions",
        params=_POSITIONS,
        config=(("kThreads", _THREADS),),
        threads=_THREADS,
    )


@lru_cache(maxsize=1)
def seq_lens_spec() -> KernelSpec:
    """The kernel of `get_seq_lens`."""
    return KernelSpec(
        symbol="page_seq_lens",
        header="page.cuh",
        function="page_seq_lens",
        params=_SEQ_LENS,
        config=(("kThreads", _THREADS),),
        threads=_THREADS,
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: head dims 64, 128 and 256 of 16-bit types, 128 of fp8, and MLA's 512 + 64."""
    rows = [(n, n, 8) for n in (128, 256, 512)] + [(1024, 128, 1)]
    copies = [spec for row in rows for spec in append_specs(*row)]
    return [*copies, *page_quantized.kernel_specs(), positions_spec(), seq_lens_spec()]


def _caches(op: str, paged_kv_cache: Any, kv_layout: str) -> PagedKV:
    """Keys and values of the cache argument, checked against each other."""
    check_layout(op, kv_layout)
    k, v = cache = paged_kv(op, paged_kv_cache)
    check_ndim(op, "paged_kv_cache (values)", v, 4)
    if v.shape[:3] != k.shape[:3]:
        raise ShapeError(f"{op}: paged_kv_cache has keys {k.shape} and values {v.shape}, expected like {k.shape[:3]}")
    check_dtype(op, "paged_kv_cache (values)", v, (k.dtype,), "like the keys")
    check_device(op, k, paged_kv_cache=v)
    check_inner(op, "paged_kv_cache (keys)", k)
    check_inner(op, "paged_kv_cache (values)", v)
    k.writable(op, "paged_kv_cache")
    v.writable(op, "paged_kv_cache")
    return cache


def _index(op: str, name: str, x: Any, like: View | None = None) -> View:
    """A dense one-dimensional int32 array on the device of `like`."""
    v = view(x, op, name)
    if len(v.shape) != 1 or v.dtype is not int32 or v.strides != (1,):
        check_ndim(op, name, v, 1)
        check_dtype(op, name, v, (int32,))
        check_inner(op, name, v)
    if like is not None and v.device != like.device:
        check_device(op, like, **{name: v})
    return v


def get_seq_lens(kv_indptr: Any, kv_last_page_len: Any, page_size: int) -> Any:
    """Tokens of every request: ``(pages - 1) * page_size + last_page_len``, 0 where a request has no page.

    Parameters
    ----------
    kv_indptr : array, [batch + 1], int32
        Offsets into the page list.
    kv_last_page_len : array, [batch], int32
        Tokens on the last page, 1 to `page_size`.
    page_size : int

    Returns
    -------
    array
        int32 ``[batch]``. (FlashInfer returns last_page_len for a request without pages.)

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.page.get_seq_lens.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.page import get_seq_lens
    >>> get_seq_lens(np.array([0, 2, 2], np.int32), np.array([3, 1], np.int32), 16)
    array([19,  0], dtype=int32)
    """
    op = "get_seq_lens"
    indptr = _index(op, "kv_indptr", kv_indptr)
    last = _index(op, "kv_last_page_len", kv_last_page_len, indptr)
    check_shape(op, "kv_last_page_len", last, (max(0, indptr.shape[0] - 1),), "= len(kv_indptr) - 1")
    (page_size,) = as_sizes(op, page_size=page_size)
    if page_size >= 1 << 31:
        raise ArgumentError(f"{op}: page_size is {page_size}, expected a number of 31 bits")
    out = indptr.empty(last.shape, int32)
    if indptr.is_cpu:
        out.write(reference.get_seq_lens(indptr.numpy(), last.numpy(), page_size))
    else:
        batch = last.shape[0]
        load_kernel(seq_lens_spec(), indptr.device).launch(
            -(-batch // _THREADS), indptr.stream(), indptr.ptr, last.ptr, out.ptr, batch, page_size
        )
    return out.result()


def get_batch_indices_positions(
    append_indptr: Any, seq_lens: Any, nnz: int, batch_indices: Any = None, positions: Any = None
) -> tuple[Any, Any]:
    """Request and absolute position of every appended token.

    Token i of request b has position ``seq_lens[b] - append_len[b] + i``.

    Parameters
    ----------
    append_indptr : array, [batch + 1], int32
        Ragged offsets of the appended tokens.
    seq_lens : array, [batch], int32
        Length of every request *after* the append.
    nnz : int
        Length of the results; entries past ``append_indptr[-1]`` are -1 and 0.
    batch_indices, positions : array, [nnz], int32, optional
        Written and returned instead of new arrays.

    Returns
    -------
    (batch_indices, positions)
        int32 ``[nnz]`` each. One kernel, no synchronisation.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    flashinfer.page.get_batch_indices_positions.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.page import get_batch_indices_positions
    >>> get_batch_indices_positions(np.array([0, 1, 3], np.int32), np.array([5, 2], np.int32), 4)
    (array([ 0,  1,  1, -1], dtype=int32), array([4, 0, 1, 0], dtype=int32))
    """
    op = "get_batch_indices_positions"
    indptr = _index(op, "append_indptr", append_indptr)
    lens = _index(op, "seq_lens", seq_lens, indptr)
    check_shape(op, "seq_lens", lens, (max(0, indptr.shape[0] - 1),), "= len(append_indptr) - 1")
    nnz = operator.index(nnz)
    if nnz < 0:
        raise ArgumentError(f"{op}: nnz is {nnz}, expected at least 0")
    outs = []
    for name, given in (("batch_indices", batch_indices), ("positions", positions)):
        if given is None:
            outs.append(indptr.empty((nnz,), int32))
            continue
        out = _index(op, name, given, indptr).writable(op, name)
        check_shape(op, name, out, (nnz,), "= (nnz,)")
        outs.append(out)
    b, p = outs
    if indptr.is_cpu:
        if len(indptr.numpy()):
            check_offsets(op, "append_indptr", indptr.numpy().astype(np.int64))
        for out, values in zip(
            outs, reference.get_batch_indices_positions(indptr.numpy(), lens.numpy(), nnz), strict=True
        ):
            out.write(values)
    else:
        load_kernel(positions_spec(), indptr.device).launch(
            -(-nnz // _THREADS), indptr.stream(), indptr.ptr, lens.ptr, b.ptr, p.ptr, nnz, lens.shape[0]
        )
    return (
        b.result() if batch_indices is None else batch_indices,
        p.result() if positions is None else positions,
    )


def _table(
    op: str, nnz: int, like: View, batch_indices: Any, positions: Any, kv_indices: Any, kv_indptr: Any, last: Any
) -> tuple[View, View, View, View]:
    b = _index(op, "batch_indices", batch_indices, like)
    p = _index(op, "positions", positions, like)
    indices = _index(op, "kv_indices", kv_indices, like)
    indptr = _index(op, "kv_indptr", kv_indptr, like)
    if b.shape != (nnz,):
        check_shape(op, "batch_indices", b, (nnz,), "= (appended tokens,)")
    if p.shape != (nnz,):
        check_shape(op, "positions", p, (nnz,), "= (appended tokens,)")
    if last is not None:  # the positions say all that it could, but a wrong length shows a wrong call
        check_shape(
            op, "kv_last_page_len", _index(op, "kv_last_page_len", last, like), (max(0, indptr.shape[0] - 1),),
            "= len(kv_indptr) - 1",
        )  # fmt: skip
    return b, p, indices, indptr


def _append(
    pairs: list[tuple[page_quantized.Cast, int, int, int]],
    heads: int,
    page_size: int,
    table: tuple[View, View, View, View],
) -> None:
    """One launch for what is copied and one for each pair of types that are cast; strides of page, row and head."""
    for members in page_quantized.launches([c for c, *_ in pairs]):
        chosen = [pairs[i] for i in members]
        if chosen[0][0].scale is not None:
            page_quantized.launch(chosen, heads, page_size, table)
        else:
            places = [(c.new, c.cache, a, b, h) for c, a, b, h in chosen]
            _launch(places[0], places[1] if len(places) == 2 else None, heads, page_size, table)


def _launch(
    first: tuple[View, View, int, int, int],
    second: tuple[View, View, int, int, int] | None,
    heads: int,
    page_size: int,
    table: tuple[View, View, View, View],
) -> None:
    """Launch for one or two (new, cache, stride of page, row, head) tensors; strides in elements."""
    a, a_cache, *a_to = first
    b, b_cache, *b_to = (a, a_cache, 0, 0, 0) if second is None else second
    size, size_b = a.dtype.itemsize, b.dtype.itemsize
    row_a, row_b = a.shape[-1] * size, 0 if second is None else b.shape[-1] * size_b
    sa = (a.strides[0] * size, a.strides[1] * size if len(a.shape) == 3 else 0, *[s * size for s in a_to])
    sb = (b.strides[0] * size_b, b.strides[1] * size_b if len(b.shape) == 3 else 0, *[s * size_b for s in b_to])
    # The largest power of two, up to 16, that divides every address.
    common = row_a | row_b | a.ptr | b.ptr | a_cache.ptr | b_cache.ptr | 16
    for step in sa + sb:
        common |= step
    vec = common & -common
    batch_indices, positions, indices, indptr = table
    nnz = a.shape[0]
    token_vectors = heads * ((row_a + row_b) // vec)
    if nnz * token_vectors == 0:
        return
    unroll = page_quantized.unroll_of(nnz, token_vectors)
    threads, grid = page_quantized.append_shape(nnz, token_vectors, unroll)
    load_kernel(append_spec(row_a, row_b, vec, unroll, threads), a.device).launch(
        grid, a.stream(), a.ptr, b.ptr, a_cache.ptr, b_cache.ptr,
        batch_indices.ptr, positions.ptr, indices.ptr, indptr.ptr, sa[0], sa[1], sb[0], sb[1], *sa[2:], *sb[2:],
        nnz, token_vectors, heads, indptr.shape[0] - 1, page_size, pdl=None,
    )  # fmt: skip


def append_paged_kv_cache(
    append_key: Any,
    append_value: Any,
    batch_indices: Any,
    positions: Any,
    paged_kv_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
    kv_layout: str = "NHD",
    *,
    k_scale: Any = None,
    v_scale: Any = None,
) -> None:
    """Write new keys and values into the paged cache, in place, casting them where the cache has 8 bits.

    Token t goes to row ``positions[t] % page_size`` of page ``kv_indices[kv_indptr[b] + positions[t] // page_size]``
    of request ``b = batch_indices[t]``; the page table already includes the new tokens.

    Parameters
    ----------
    append_key, append_value : array, [nnz, num_kv_heads, head_dim]
        Dtype of the cache (fp8 may come as uint8 bytes), or float16, bfloat16 or float32 with a scale; tokens and
        heads may be strided.
    batch_indices, positions : array, [nnz], int32
        See `get_batch_indices_positions`. A negative batch index skips its token.
    paged_kv_cache : array or (array, array)
        ``[pages, 2, page_size, num_kv_heads, head_dim]`` (NHD) or ``[pages, 2, num_kv_heads, page_size, head_dim]``
        (HND), or a pair of such arrays without the 2, each with its own strides; the innermost must be dense.
    kv_indices : array, [pages in use], int32
    kv_indptr : array, [batch + 1], int32
    kv_last_page_len : array, [batch], int32
        The positions already say where tokens go; only its shape is checked.
    kv_layout : "NHD" or "HND"
    k_scale, v_scale : float, or float32 array [1] or [num_kv_heads], optional
        For a fp8 or int8 cache: what attention multiplies the cached numbers by. The cache gets
        ``round(append_key / k_scale)``, saturating; uint8 counts as float8_e4m3fn.

    Raises
    ------
    ArgumentError
        On the CPU also for indices outside the page table. A GPU skips positions past a request's last page.
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    flashinfer.page.append_paged_kv_cache.
    """
    op = "append_paged_kv_cache"
    k_cache, v_cache = _caches(op, paged_kv_cache, kv_layout)
    k, v = view(append_key, op, "append_key"), view(append_value, op, "append_value")
    page_size, heads = k_cache.shape[1:3] if kv_layout == "NHD" else k_cache.shape[2:0:-1]
    for name, x, cache in (("append_key", k, k_cache), ("append_value", v, v_cache)):
        check_ndim(op, name, x, 3)
        check_shape(op, name, x, (k.shape[0], heads, cache.shape[3]), "= (tokens, heads, head_dim) of the cache")
        check_inner(op, name, x)
    check_device(op, k_cache, append_key=k, append_value=v)
    casts = [
        page_quantized.cast(op, "append_key", k, k_cache, "k_scale", k_scale, heads),
        page_quantized.cast(op, "append_value", v, v_cache, "v_scale", v_scale, heads),
    ]
    table = _table(op, k.shape[0], k_cache, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    if k_cache.is_cpu:
        check_host_table(op, table, page_size, k_cache.shape[0])
        reference.append_paged_kv_cache_(
            casts[0].host(), casts[1].host(), table[0].numpy(), table[1].numpy(), casts[0].cache.numpy(),
            casts[1].cache.numpy(), table[2].numpy(), table[3].numpy(), kv_layout=kv_layout,
        )  # fmt: skip
        return
    _append([(c, *token_strides(c.cache, kv_layout)) for c in casts], heads, page_size, table)


def append_paged_mla_kv_cache(
    append_ckv: Any,
    append_kpe: Any,
    batch_indices: Any,
    positions: Any,
    ckv_cache: Any,
    kpe_cache: Any,
    kv_indices: Any,
    kv_indptr: Any,
    kv_last_page_len: Any,
    *,
    ckv_scale: Any = None,
    kpe_scale: Any = None,
) -> None:
    """Write compressed keys/values and rope keys into the MLA caches, in place, casting them where those have 8 bits.

    Parameters
    ----------
    append_ckv : array, [nnz, 512], dtype of `ckv_cache`
    append_kpe : array, [nnz, 64], dtype of `kpe_cache`
    batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len
        As in `append_paged_kv_cache`.
    ckv_cache : array, [pages, page_size, 512], or None
    kpe_cache : array, [pages, page_size, 64], or None
        A cache that is None is not written. Other last dimensions work as well.
    ckv_scale, kpe_scale : float, or float32 array [1], optional
        As `k_scale` in `append_paged_kv_cache`: the cache gets ``round(append_ckv / ckv_scale)``.

    Raises
    ------
    ArgumentError, ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    flashinfer.page.append_paged_mla_kv_cache.
    """
    op = "append_paged_mla_kv_cache"
    pairs = []
    for name, new, cache, scale in (
        ("ckv", append_ckv, ckv_cache, ckv_scale), ("kpe", append_kpe, kpe_cache, kpe_scale)
    ):  # fmt: skip
        if cache is None:
            if scale is not None:
                raise ArgumentError(f"{op}: {name}_scale is given, expected {name}_cache with it")
            continue
        if new is None:
            raise ArgumentError(f"{op}: append_{name} is None, expected an array like {name}_cache")
        c = view(cache, op, f"{name}_cache").writable(op, f"{name}_cache")
        x = view(new, op, f"append_{name}")
        check_ndim(op, f"{name}_cache", c, 3)
        check_inner(op, f"{name}_cache", c)
        check_ndim(op, f"append_{name}", x, 2)
        check_shape(op, f"append_{name}", x, (x.shape[0], c.shape[2]), f"= (tokens, {name}_cache.shape[2])")
        check_inner(op, f"append_{name}", x)
        check_device(op, c, **{f"append_{name}": x})
        pairs.append(page_quantized.cast(op, f"append_{name}", x, c, f"{name}_scale", scale, 1))
    if not pairs:
        raise ArgumentError(f"{op}: ckv_cache and kpe_cache are both None, expected at least one")
    x0, c0 = pairs[0].new, pairs[0].cache
    for x, c, _ in pairs:
        check_device(op, c0, append=x, cache=c)
        if x.shape[0] != x0.shape[0] or c.shape[:2] != c0.shape[:2]:
            raise ShapeError(
                f"{op}: append_kpe {x.shape} and kpe_cache {c.shape} differ from append_ckv {x0.shape} and ckv_cache "
                f"{c0.shape} in tokens, pages or page size"
            )
    page_size = c0.shape[1]
    table = _table(op, x0.shape[0], c0, batch_indices, positions, kv_indices, kv_indptr, kv_last_page_len)
    if c0.is_cpu:
        check_host_table(op, table, page_size, c0.shape[0])
        for each in pairs:
            reference.append_paged_mla_kv_cache_(
                each.host(), None, table[0].numpy(), table[1].numpy(), each.cache.numpy(), None, table[2].numpy(),
                table[3].numpy(),
            )  # fmt: skip
        return
    _append([(c, c.cache.strides[0], c.cache.strides[1], 0) for c in pairs], 1, page_size, table)
