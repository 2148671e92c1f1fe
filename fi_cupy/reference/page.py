"""Paged key/value cache: where a token lives, writing new tokens, and reading a request back as one array.

Page p of request b is ``indices[indptr[b] + p]``. Layouts: NHD ``[pages, page_size, heads, dim]``, HND
``[pages, heads, page_size, dim]``. Caches are views of any strides, and K and V need not share them.
"""

from __future__ import annotations

import numpy as np

from fi_cupy.reference._common import Array, compute_dtype, repeat_index, round_to, upcast


def get_seq_lens(kv_indptr: Array, kv_last_page_len: Array, page_size: int) -> Array:
    """Tokens of every request, ``(pages - 1) * page_size + last_page_len``, and 0 where a request has no page.

    Parameters
    ----------
    kv_indptr : int [batch + 1]
    kv_last_page_len : int [batch], 1..page_size
    page_size : int

    Returns
    -------
    Array
        int32 `[batch]`. FlashInfer returns last_page_len for a request without pages; here that is 0.

    Source: flashinfer.page.get_seq_lens.
    """
    pages = np.diff(np.asarray(kv_indptr, dtype=np.int64))
    lens = (pages - 1) * int(page_size) + np.asarray(kv_last_page_len, dtype=np.int64)
    return np.where(pages > 0, lens, 0).astype(np.int32)


def get_batch_indices_positions(append_indptr: Array, seq_lens: Array, nnz: int) -> tuple[Array, Array]:
    """Request and absolute position of every appended token.

    Parameters
    ----------
    append_indptr : int [batch + 1]
        Ragged offsets of the tokens that are appended.
    seq_lens : int [batch]
        Length of every request *after* the append: token i of request b has position
        ``seq_lens[b] - append_len[b] + i``.
    nnz : int
        Length of the results; entries past ``append_indptr[-1]`` are -1 and 0.

    Returns
    -------
    (batch_indices, positions)
        int32 `[nnz]` each.

    Source: flashinfer.page.get_batch_indices_positions.
    """
    indptr = np.asarray(append_indptr, dtype=np.int64)
    segment = repeat_index(indptr)
    tokens = np.arange(len(segment)) + indptr[0]
    batch_indices = np.full(nnz, -1, dtype=np.int32)
    positions = np.zeros(nnz, dtype=np.int32)
    keep = tokens < nnz
    tokens, segment = tokens[keep], segment[keep]
    batch_indices[tokens] = segment
    positions[tokens] = np.asarray(seq_lens, dtype=np.int64)[segment] - indptr[segment + 1] + tokens
    return batch_indices, positions


def _slots(
    batch_indices: Array, positions: Array, kv_indices: Array, kv_indptr: Array, page_size: int
) -> tuple[Array, Array, Array]:
    """(token, page, row in page) of every token that is not skipped."""
    batch = np.asarray(batch_indices, dtype=np.int64)
    tokens = np.flatnonzero(batch >= 0)
    batch, position = batch[tokens], np.asarray(positions, dtype=np.int64)[tokens]
    page = np.asarray(kv_indices, dtype=np.int64)[np.asarray(kv_indptr, dtype=np.int64)[batch] + position // page_size]
    return tokens, page, position % page_size


def _stored(x: Array, dtype: np.dtype) -> Array:
    return x if x.dtype == dtype else round_to(upcast(x, compute_dtype(x)), dtype)


def append_paged_kv_cache_(
    append_key: Array,
    append_value: Array,
    batch_indices: Array,
    positions: Array,
    k_cache: Array,
    v_cache: Array,
    kv_indices: Array,
    kv_indptr: Array,
    kv_last_page_len: Array | None = None,
    kv_layout: str = "NHD",
) -> None:
    """Write new keys and values into the paged cache, in place.

    The page table already includes the new tokens; positions are absolute in the sequence.

    Parameters
    ----------
    append_key, append_value : [nnz, num_kv_heads, head_dim]
        Cast to the dtype of the cache (fp8 saturates).
    batch_indices, positions : int [nnz]
        A batch index of -1 skips the token.
    k_cache, v_cache : see the module
    kv_indices : int [pages in use]
    kv_indptr : int [batch + 1]
    kv_last_page_len : ignored, part of FlashInfer's signature
    kv_layout : "NHD" or "HND"

    Source: flashinfer.page.append_paged_kv_cache.
    """
    page_size = k_cache.shape[1 if kv_layout == "NHD" else 2]
    tokens, page, row = _slots(batch_indices, positions, kv_indices, kv_indptr, page_size)
    for cache, new in ((k_cache, append_key), (v_cache, append_value)):
        rows = _stored(new[tokens], cache.dtype)
        if kv_layout == "NHD":
            cache[page, row] = rows
        else:
            cache[page, :, row] = rows


def append_paged_mla_kv_cache_(
    append_ckv: Array | None,
    append_kpe: Array | None,
    batch_indices: Array,
    positions: Array,
    ckv_cache: Array | None,
    kpe_cache: Array | None,
    kv_indices: Array,
    kv_indptr: Array,
    kv_last_page_len: Array | None = None,
) -> None:
    """Write compressed keys/values `[nnz, 512]` and rope keys `[nnz, 64]` into the MLA caches, in place.

    Caches are ``[pages, page_size, dim]``; a cache that is None is not written.

    Source: flashinfer.page.append_paged_mla_kv_cache.
    """
    for cache, new in ((ckv_cache, append_ckv), (kpe_cache, append_kpe)):
        if cache is None or new is None:
            continue
        tokens, page, row = _slots(batch_indices, positions, kv_indices, kv_indptr, cache.shape[1])
        cache[page, row] = _stored(new[tokens], cache.dtype)


def gather_pages(cache: Array, pages: Array, kv_len: int, kv_layout: str = "NHD") -> Array:
    """The first `kv_len` tokens of the listed pages as one contiguous ``[kv_len, heads, dim]`` array.

    Rows past `kv_len` on the last page are never read into the result: they may hold NaN.
    """
    page_size = cache.shape[1 if kv_layout == "NHD" else 2]
    pages = np.asarray(pages, dtype=np.int64)[: -(-kv_len // page_size)]
    block = cache[pages]
    if kv_layout == "HND":
        block = block.swapaxes(1, 2)
    return block.reshape(len(pages) * page_size, *block.shape[2:])[:kv_len]


def gather_paged_kv(
    k_cache: Array,
    v_cache: Array,
    indptr: Array,
    indices: Array,
    last_page_len: Array,
    kv_layout: str = "NHD",
) -> list[tuple[Array, Array]]:
    """Keys and values of every request as contiguous ``[kv_len, num_kv_heads, head_dim]`` arrays.

    Parameters
    ----------
    k_cache, v_cache : see the module
    indptr : int [batch + 1]
    indices : int [pages in use]
    last_page_len : int [batch]
    kv_layout : "NHD" or "HND"

    Returns
    -------
    list of (k, v)
        A request without pages gives two empty arrays.
    """
    page_size = k_cache.shape[1 if kv_layout == "NHD" else 2]
    lens = get_seq_lens(indptr, last_page_len, page_size)
    out = []
    for b, kv_len in enumerate(lens):
        pages = np.asarray(indices)[int(indptr[b]) : int(indptr[b + 1])]
        out.append(tuple(gather_pages(c, pages, int(kv_len), kv_layout) for c in (k_cache, v_cache)))
    return out  # type: ignore[return-value]
