"""Latent attention schedule: which CTA computes which rows over which keys.

Items are those of `plan.prefill` with all query heads as one group: a tile of (query token, head) rows over a range of
keys. What differs is how keys are split: a partial result of 512 columns costs as much as some tiles of keys, and few
rows mean few items, so the number of chunks is the one with the shortest estimated time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from fi_cupy.plan.prefill import Ints, PrefillPlan, _split, plan_prefill


class Costs(NamedTuple):
    """What an item takes besides its tiles of keys, in tiles.

    To start; if it is split, to leave its part and meet the others; for each of these, to add it; for each part of
    the whole batch its way to the workspace and back, which all CTAs share; and for each different tile of keys of the
    batch its way from the device's memory, which they share, too.
    """

    start: float
    part: float
    add: float
    traffic: float
    memory: float = 0.0


#: Word of an item (PrefillItem::unused[0]) that says whether all chunks of its tile run at a time, so that they may
#: wait for each other.
WAITS = 14
#: Most chunks of a tile: their weights lie in the memory of q when they are joined.
MOST_CHUNKS = 256
#: Items that splitting may add, for each CTA slot: captured graphs have room for so many.
EXTRA_ITEMS = 2


def plan_mla(
    qo_indptr: Ints,
    kv_len: Ints,
    kv_base: Ints,
    *,
    num_heads: int,
    tile_q: int,
    tile_kv: int,
    slots: int,
    costs: Costs,
    causal: bool = False,
    window_left: int = -1,
    disable_split: bool = False,
    narrow: Callable[..., tuple[Ints, Ints]] | None = None,
) -> PrefillPlan:
    """Make the work list.

    Parameters
    ----------
    qo_indptr : int64 [batch + 1]
    kv_len, kv_base : int64 [batch]
        Keys of every request, and where its pages start.
    num_heads, tile_q, tile_kv, slots : int
        Query heads; packed rows and keys a tile; CTAs the device runs at once.
    costs : Costs
    causal, window_left, disable_split, narrow
        See `plan_prefill`.

    Returns
    -------
    PrefillPlan
        At most ``EXTRA_ITEMS * slots`` items more than there are tiles of rows.
    """
    whole = plan_prefill(
        qo_indptr, kv_len, kv_base, group=num_heads, num_kv_heads=1, tile_q=tile_q, tile_kv=tile_kv, slots=slots,
        causal=causal, window_left=window_left, disable_split=True, narrow=narrow,
    )  # fmt: skip
    items = whole.items
    if disable_split or len(items) == 0:
        return whole
    begin, end = items[:, 5], items[:, 6]
    tiles = (end - begin + (tile_kv - 1)) // tile_kv  # longest first
    longest, shortest = int(tiles[0]), int(tiles[-1])
    if longest == shortest:
        rows = int(np.count_nonzero(qo_indptr[1:] > qo_indptr[:-1]))
        best = best_chunks(len(tiles), longest, slots, costs, len(tiles) // rows)
        if best == 1:
            return whole
        chunks = np.full(len(tiles), best, np.int32)
    else:
        found = _uneven_chunks(tiles, slots, costs)
        if found is None:
            return whole
        chunks = found
    length = np.maximum(-(-tiles // chunks), 1)  # equal chunks
    chunks = np.maximum(-(-tiles // length), 1)
    items, num_slots, num_split = _split(items, begin.copy(), length * tile_kv, chunks)
    items[:, WAITS] = len(items) <= slots
    parts = (items[:, 6] - items[:, 5] + (tile_kv - 1)) // tile_kv
    if (parts != parts[0]).any():
        items = items.take((-parts).argsort(kind="stable"), axis=0)
    return PrefillPlan(items, num_slots, num_split)


@lru_cache(maxsize=1024)
def best_chunks(count: int, tiles: int, slots: int, costs: Costs, share: int = 1) -> int:
    """Chunks each for `count` items of `tiles` tiles of keys, by the time of all waves of CTAs.

    `share` items have the same keys.
    """
    memory = costs.memory * count * tiles / share

    def time(chunks: int) -> float:
        waves = -(-count * chunks // slots)
        split = 0.0 if chunks == 1 else costs.part + (costs.add + costs.traffic * count) * chunks
        return max(waves * (-(-tiles // chunks) + costs.start), memory) + split

    most = max(min(tiles, MOST_CHUNKS, 1 + EXTRA_ITEMS * slots // count), 1)
    return min(range(1, most + 1), key=time)


#: Chunk lengths that are tried, as shares of the even one.
_SHARES = (1.0, 1.5, 0.7)


def _uneven_chunks(tiles: Ints, slots: int, costs: Costs) -> Ints | None:
    """Chunks of every item of uneven lengths (longest first), or None for one each.

    Handed out longest first, items end within a short one of each other: the time is the longest item's, or the even
    share and half a mean item.
    """
    total, longest, count = float(np.add.reduce(tiles, dtype=np.int64)), float(tiles[0]), len(tiles)

    def time(longest: float, count: int) -> float:
        return max(longest + costs.start, (total + costs.start * count) / slots + 0.5 * total / count)

    best, least = None, time(longest, count)
    for share in _SHARES:
        length = max(total / slots * share, 1.0)
        if length >= longest:
            continue
        chunks = np.ceil(tiles / length).clip(1, MOST_CHUNKS)
        pieces = int(np.add.reduce(chunks))
        if pieces > count + EXTRA_ITEMS * slots:
            continue
        took = time(float(np.maximum.reduce(tiles / chunks)), pieces)
        took += costs.part + costs.add * float(chunks[0]) + costs.traffic * pieces
        if took < least:
            best, least = chunks, took
    return None if best is None else best.astype(np.int32)
