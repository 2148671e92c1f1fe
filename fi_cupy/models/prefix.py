"""Which running requests begin with the same pages, and whether attending to those once for all of them pays.

Requests that share a prompt's beginning hold the same pages of it (`fi_cupy.models.kv_cache.PagedKVCache.match`). Plain
decode attention reads them for every request, from the L2 cache after the first; a cascade reads them once, with the
queries of all requests as one tile, and merges that with the attention to each request's own pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fi_cupy.models.kv_cache import Int32

#: Most groups of one step. More would leave tiles of few queries.
MAX_GROUPS = 4
#: Bytes of keys and values of one layer that a cascade must save from being read again. Those come from the L2 cache,
#: at about 4.5 TB/s; the cascade's two launches more (a tiled one over the prefix, and the merge) take 12 to 20 µs. On
#: an H100, decode and cascade: 64 requests with 9/3 heads of 64 that share 1024 keys (48 MB saved) 19.7 and 21.5 µs,
#: 2048 keys 33.3 and 22.3; with 32/8 heads of 128 and 512 keys (126 MB) 38.5 and 26.4, 16 requests and 2048 keys
#: (120 MB) 31.6 and 33.1.
MIN_SAVED_BYTES = 80 << 20


@dataclass(frozen=True)
class Groups:
    """Rows of a batch by the pages that they share.

    Attributes
    ----------
    order : [rows] int32
        The rows, those of a group beside each other, those that share nothing at the end.
    sizes : tuple of int
        Rows of each group.
    pages : tuple of int32 arrays
        The pages that all rows of the group begin with.
    """

    order: Int32
    sizes: tuple[int, ...]
    pages: tuple[Int32, ...]

    @property
    def skip(self) -> Int32:
        """Shared pages of each row, in the order of `order`."""
        shared = np.zeros(max(len(self.order), sum(self.sizes)), np.int32)
        shared[: sum(self.sizes)] = np.repeat([len(p) for p in self.pages], self.sizes)
        return shared[: len(self.order)]

    @property
    def parts(self) -> int:
        """Groups of a cascade's first level: these, and the rows that share nothing, if there are any."""
        return len(self.sizes) + (sum(self.sizes) < len(self.order))


def _best(pages: Int32, full: Int32, rows: Int32, depth: int) -> tuple[int, list[tuple[Int32, int]]]:
    """(pages that need not be read again, [(rows, shared pages)]) of rows whose first `depth` pages are the same."""
    most = int(full[rows].min())
    while depth < most and (pages[rows, depth] == pages[rows[0], depth]).all():
        depth += 1
    together = (len(rows) - 1) * depth
    longer = rows[full[rows] > depth]
    saved, apart = 0, []
    for page in np.unique(pages[longer, depth]) if len(longer) else ():
        some = longer[pages[longer, depth] == page]
        if len(some) > 1:
            more, found = _best(pages, full, some, depth + 1)
            saved += more
            apart += found
    return (together, [(rows, depth)]) if together >= saved else (saved, apart)


def find_groups(
    pages: Int32, full: Int32, token_bytes: int, page_size: int, minimum: int | None = None
) -> Groups | None:
    """The groups that save the most reading, or None where a cascade does not pay.

    Parameters
    ----------
    pages : [rows, width] int32
        The pages of every row.
    full : [rows] int32
        How many of them are full; the newest token of a row is never on one of these.
    token_bytes : int
        Bytes of a token's keys and values in one layer.
    page_size : int
    minimum : int, optional
        Bytes that must be saved; by default `MIN_SAVED_BYTES`.
    """
    if len(pages) < 2:
        return None
    _, found = _best(pages, full, np.arange(len(pages), dtype=np.int32), 0)
    found = sorted(found, key=lambda group: (1 - len(group[0])) * group[1])[:MAX_GROUPS]
    found = [(rows, depth) for rows, depth in found if depth and len(rows) > 1]
    saved = sum((len(rows) - 1) * depth for rows, depth in found) * page_size * token_bytes
    if not found or saved < (MIN_SAVED_BYTES if minimum is None else minimum):
        return None
    grouped = np.concatenate([rows for rows, _ in found])
    rest = np.setdiff1d(np.arange(len(pages), dtype=np.int32), grouped)
    return Groups(
        np.concatenate([grouped, rest]),
        tuple(len(rows) for rows, _ in found),
        tuple(pages[rows[0], :depth].copy() for rows, depth in found),
    )
