"""Block-sparse attention as paged attention: block rows are requests, the visible blocks are their pages.

Blocks are listed one by one, ordered by block row: block e belongs to block row ``row[e]`` and holds keys
``start[e] .. start[e] + length[e] - 1``. Block row r has queries ``row_begin[r] .. row_begin[r] + row_len[r] - 1``.
Causality is that of the whole matrix, aligned at the bottom right: query i sees key j if ``j <= i + offset``, offset
being the number of keys less that of queries.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Ints = np.ndarray[Any, np.dtype[Any]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


class Blocks(NamedTuple):
    """Visible blocks in the order of their block rows; all int64."""

    row: Ints
    start: Ints
    length: Ints

    def take(self, which: Any) -> Blocks:
        """The blocks that an index or a mask picks."""
        return Blocks(self.row[which], self.start[which], self.length[which])


class Rows(NamedTuple):
    """Queries of every block row, int64 [block rows]."""

    begin: Ints
    length: Ints


def expand(start: Ints, length: Ints) -> Ints:
    """``[start[0], start[0] + 1, ..., start[1], ...]``: all numbers of the ranges, one range after the other."""
    ends = np.cumsum(length)
    return np.repeat(start - ends + length, length) + np.arange(ends[-1] if len(ends) else 0)


def offsets(counts: Ints) -> Ints:
    """``[0, counts[0], counts[0] + counts[1], ...]``, int64."""
    made = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=made[1:])
    return made


def keys_per_row(blocks: Blocks, num_rows: int) -> Ints:
    """Listed keys of every block row."""
    return np.bincount(blocks.row, blocks.length, num_rows).astype(np.int64)


def drop_hidden(blocks: Blocks, rows: Rows, offset: int) -> Bools:
    """Which blocks causality leaves visible to some query."""
    last = (rows.begin + rows.length - 1 + offset)[blocks.row]
    return (blocks.start <= last) & (rows.length[blocks.row] > 0)


def is_plain_causal(blocks: Blocks, rows: Rows, offset: int) -> bool:
    """Whether the kernel's own causal mask, over the listed keys of each block row, is that of the whole matrix.

    Blocks must be those that `drop_hidden` keeps, ascending in each block row. Of the keys behind the first query's own
    the kernel hides one more from each earlier query, so all ``row_len - 1`` of them must be listed, and none further.
    """
    first = (rows.begin + offset)[blocks.row]  # the last key that the block row's first query sees
    end = blocks.start + blocks.length
    behind = np.maximum(end - np.maximum(blocks.start, first + 1), 0)
    if (end - 1 > first + rows.length[blocks.row] - 1).any():
        return False
    found = np.bincount(blocks.row, behind, len(rows.length)).astype(np.int64)
    busy = np.bincount(blocks.row, minlength=len(rows.length)) > 0
    return bool((found == rows.length - 1)[busy].all())


def causal_mask(blocks: Blocks, rows: Rows, offset: int) -> Bools:
    """The custom mask of causality: each block row's ``[row_len, listed keys]``, flat, one after the other."""
    keys = expand(blocks.start, blocks.length)
    ends = offsets(keys_per_row(blocks, len(rows.length))).tolist()
    own = rows.begin + offset
    parts = [
        (keys[a:b] <= (first + np.arange(n))[:, None]).reshape(-1)
        for first, n, a, b in zip(own.tolist(), rows.length.tolist(), ends[:-1], ends[1:], strict=True)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, bool)


def has_duplicates(blocks: Blocks) -> bool:
    """Whether a block row lists a key block twice."""
    order = np.lexsort((blocks.start, blocks.row))
    row, start = blocks.row[order], blocks.start[order]
    return bool(((row[1:] == row[:-1]) & (start[1:] == start[:-1])).any())


def ascending(blocks: Blocks) -> Ints:
    """The order that sorts the blocks of each block row by key."""
    return np.lexsort((blocks.start, blocks.row))
