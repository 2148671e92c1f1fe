"""What `plan` reads on the host: index arrays of any framework with one synchronisation, and page tables, checked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_ndim, check_shape
from fi_cupy.dtypes import INDEX_TYPES, int32
from fi_cupy.errors import ArgumentError, UnsupportedError
from fi_cupy.plan.decode import page_lengths
from fi_cupy.workspace import copy_to_host

Ints = np.ndarray[Any, np.dtype[Any]]
_INT64 = np.dtype(np.int64)
_PLAIN = (np.dtype(np.int32), _INT64)


def read_ints(op: str, given: dict[str, Any]) -> dict[str, Ints]:
    """The values of 1-D index arrays as int64.

    Host arrays cost no synchronisation. GPU arrays are gathered into one pinned buffer by asynchronous copies on the
    stream of their framework, and waited for once.

    Parameters
    ----------
    op : str
        Starts the messages.
    given : mapping
        Lists, tuples or arrays of int32 or int64 by argument name.
    """
    values: dict[str, Ints] = {}
    others: dict[str, View] = {}
    for name, x in given.items():
        if type(x) is np.ndarray and x.ndim == 1 and x.dtype in _PLAIN:  # what a server passes at every step
            values[name] = x.astype(_INT64)
            continue
        others[name] = _index_view(op, name, x)
    if not others:
        return values
    for name, host in zip(others, host_values(list(others.values())), strict=True):
        values[name] = host.astype(_INT64)
    return {name: values[name] for name in given}


def host_values(arrays: Sequence[View]) -> list[np.ndarray[Any, Any]]:
    """The values of small arrays: CPU arrays themselves, those on a GPU after one wait for all."""
    on_gpu = [x for x in arrays if not x.is_cpu]
    copied = iter(copy_to_host(on_gpu) if on_gpu else ())
    return [x.numpy() if x.is_cpu else next(copied) for x in arrays]


def _index_view(op: str, name: str, x: Any) -> View:
    v = view(np.asarray(x, None if len(x) else _INT64) if isinstance(x, (list, tuple)) else x, op, name)
    check_ndim(op, name, v, 1)
    check_dtype(op, name, v, INDEX_TYPES)
    return v


def check_offsets(op: str, name: str, indptr: Ints) -> Ints:
    """The lengths between offsets, which must start at >= 0 and not decrease."""
    lens = indptr[1:] - indptr[:-1]
    if len(indptr) == 0 or indptr[0] < 0 or (len(lens) and np.minimum.reduce(lens) < 0):
        shown = np.array2string(indptr, threshold=12)
        raise ArgumentError(f"{op}: {name} must start at >= 0 and not decrease, got {shown}")
    return lens


class PageTable(NamedTuple):
    """A checked page table.

    Attributes
    ----------
    indptr, last_page_len, kv_len : int64 [batch + 1], [batch], [batch]
        Where each request's pages start, keys on its last page, and all its keys.
    indices : View
        As given.
    host_indices : int32, or None
        The page numbers up to ``indptr[-1]`` where the host has them; the caller's own memory if that is int32.
    max_index : int
        The largest of them, else -1.
    """

    indptr: Ints
    last_page_len: Ints
    kv_len: Ints
    indices: View
    host_indices: Ints | None
    max_index: int


def read_page_table(
    op: str, names: tuple[str, str, str], indptr: Any, indices: Any, last_page_len: Any, seq_lens: Any, page_size: int,
    **others: Any,
) -> tuple[PageTable, dict[str, Ints]]:  # fmt: skip
    """Read and check a page table.

    Parameters
    ----------
    op : str
        Starts the messages.
    names : (str, str, str)
        What the caller calls `indptr`, `indices` and `last_page_len`.
    indptr, indices, last_page_len
        Of any framework; `indices` stays where it is.
    seq_lens : int [batch], optional
        Keys of every request, instead of `last_page_len`, which is then not looked at.
    page_size : int
        With 1, `last_page_len` is not looked at either.
    **others
        Further index arrays by name, read along.

    Returns
    -------
    (PageTable, values of `others`)
    """
    if page_size < 1:
        raise ArgumentError(f"{op}: page_size is {page_size}, expected at least 1")
    given = {names[0]: indptr, **others}
    if seq_lens is not None:
        given["seq_lens"] = seq_lens
    elif page_size > 1:
        given[names[2]] = last_page_len
    host = read_ints(op, given)
    pointers = host.pop(names[0])
    batch = len(pointers) - 1
    if batch < 0:
        raise ArgumentError(f"{op}: {names[0]} is empty, expected batch + 1 entries")
    lens = host.pop("seq_lens", None)
    if lens is not None:
        _check_length(op, "seq_lens", lens, batch, names[0])
        if (-(-lens // page_size) != pointers[1:] - pointers[:-1]).any():
            raise ArgumentError(f"{op}: seq_lens and {names[0]} disagree on the number of pages")
        last = np.where(lens > 0, (lens - 1) % page_size + 1, 1)
    elif page_size == 1:
        last = np.ones(batch, np.int64)
    else:
        last = host.pop(names[2])
        _check_length(op, names[2], last, batch, names[0])
    numbers = _index_view(op, names[1], indices)
    kv_len = page_lengths(op, pointers, last, page_size, numbers.shape[0], names)
    copied, highest = _read_indices(op, names[1], numbers, int(pointers[0]), int(pointers[-1]))
    return PageTable(pointers, last, kv_len, numbers, copied, highest), host


def check_hints(
    op: str, qo_indptr: Ints, kv_len: Ints, given: dict[str, Ints], max_token_per_sequence: int | None,
    max_sequence_kv: int | None,
) -> None:  # fmt: skip
    """Raise `ArgumentError` for lengths that contradict the offsets; the schedule follows from the offsets alone."""
    qo_len = qo_indptr[1:] - qo_indptr[:-1]
    for name, lens in (("seq_lens_q", qo_len), ("seq_lens", kv_len)):
        if name in given and not np.array_equal(given[name], lens):
            shown, wanted = (np.array2string(x, threshold=12) for x in (given[name], lens))
            raise ArgumentError(f"{op}: {name} is {shown}, expected {wanted} as the offsets say")
    for name, most, lens in (
        ("max_token_per_sequence", max_token_per_sequence, qo_len), ("max_sequence_kv", max_sequence_kv, kv_len)
    ):  # fmt: skip
        if most is not None and len(lens) and most < lens.max():
            raise ArgumentError(f"{op}: {name} is {most}, expected at least {lens.max()}, the longest of the batch")


def _check_length(op: str, name: str, x: Ints, batch: int, indptr: str) -> None:
    if len(x) != batch:
        check_shape(op, name, view(x), (batch,), f"= len({indptr}) - 1")


def _read_indices(op: str, name: str, indices: View, first: int, used: int) -> tuple[Ints | None, int]:
    """(page numbers, the largest that is used) where the host has them."""
    if not indices.is_cpu:
        return None, -1
    host = indices.numpy()[:used]
    highest = -1
    if used > first and len(host) == used:  # else the table is refused for its length
        # One pass: as unsigned numbers the negative ones are the largest.
        highest = int(np.maximum.reduce(host[first:].view(f"u{host.itemsize}")))
        if highest >= 1 << 31:
            lowest = int(host[first:].min())
            what = f"a negative page number ({lowest})" if lowest < 0 else f"page {highest}, which 32 bits do not hold"
            raise ArgumentError(f"{op}: {name} holds {what}")
    return host.astype(np.int32, copy=False), highest


def read_numbers(op: str, name: str, indices: Any, first: int, used: int) -> tuple[View, Ints | None, int]:
    """(view, page numbers, the largest of entries `first` to `used`); the host's part is (None, -1) for a GPU array."""
    numbers = _index_view(op, name, indices)
    return numbers, *_read_indices(op, name, numbers, first, used)


def check_host_table(op: str, table: tuple[View, View, View, View], page_size: int, num_pages: int) -> None:
    """Refuse what points outside; `table`: batch_indices, positions, kv_indices and kv_indptr."""
    batch, position, indices, indptr = (t.numpy().astype(np.int64) for t in table)
    keep = batch >= 0
    batch, position = batch[keep], position[keep]
    if batch.size == 0:
        return
    if batch.max() >= len(indptr) - 1:
        raise ArgumentError(f"{op}: batch_indices has {batch.max()}, expected less than {len(indptr) - 1} requests")
    slot = indptr[batch] + position // max(page_size, 1)
    wrong = (position < 0) | (slot < 0) | (slot >= indptr[batch + 1]) | (slot >= len(indices)) | (page_size < 1)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise ArgumentError(
            f"{op}: position {position[i]} of request {batch[i]} lies outside its "
            f"{indptr[batch[i] + 1] - indptr[batch[i]]} pages of {page_size} tokens"
        )
    pages = indices[slot]
    if pages.min() < 0 or pages.max() >= num_pages:
        raise ArgumentError(f"{op}: kv_indices go from {pages.min()} to {pages.max()}, expected 0 to {num_pages - 1}")


def check_gpu_indices(op: str, name: str, table: PageTable, like: View) -> None:
    """Hold page numbers on a GPU to what the kernels read: dense int32 on the device of the work."""
    v, used = table.indices, int(table.indptr[-1])
    check_device(op, like, **{name: v})
    if v.dtype is not int32 or (used > 1 and v.strides[0] != 1):
        raise UnsupportedError(
            f"{op}: {name} on the GPU has dtype {v.dtype.name}, stride {v.strides[0]}, expected contiguous int32"
        )
