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

from fi_cupy.plan.prefill import ITEM_WORDS, Ints, PrefillPlan, _split, plan_prefill


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
    qo_len = qo_indptr[1:] - qo_indptr[:-1]
    # All tiles of a request see all of its keys (under a causal mask the rows of a single token do).
    same = narrow is None and window_left < 0 and (not causal or int(np.maximum.reduce(qo_len, initial=0)) <= 1)
    if same:
        return _plan_requests(
            qo_indptr, qo_len, kv_len, kv_base, (qo_len * num_heads + (tile_q - 1)) // tile_q, tile_kv, slots,
            None if disable_split else costs,
        )  # fmt: skip
    whole = plan_prefill(
        qo_indptr, kv_len, kv_base, group=num_heads, num_kv_heads=1, tile_q=tile_q, tile_kv=tile_kv, slots=slots,
        causal=causal, window_left=window_left, disable_split=True, narrow=narrow,
    )  # fmt: skip
    items = whole.items
    if disable_split or len(items) == 0:
        return whole
    begin, end = items[:, 5], items[:, 6]
    tiles = (end - begin + (tile_kv - 1)) // tile_kv  # longest first
    found = _chunks(tiles, np.ones_like(tiles), len(tiles) // int(np.count_nonzero(qo_len)), slots, costs)
    if found is None:
        return whole
    length, chunks = (np.full(len(tiles), x, np.int32) if isinstance(x, int) else x.astype(np.int32) for x in found)
    items, num_slots, num_split = _split(items, begin.copy(), length * tile_kv, chunks)
    items[:, WAITS] = len(items) <= slots
    parts = (items[:, 6] - items[:, 5] + (tile_kv - 1)) // tile_kv
    if (parts != parts[0]).any():
        items = items.take((-parts).argsort(kind="stable"), axis=0)
    return PrefillPlan(items, num_slots, num_split)


def _plan_requests(
    qo_indptr: Ints, qo_len: Ints, kv_len: Ints, kv_base: Ints, rows: Ints, tile_kv: int, slots: int,
    costs: Costs | None,
) -> PrefillPlan:  # fmt: skip
    """The same list where the `rows` tiles of rows of a request have the same keys: mostly numbers a request.

    A server plans at each step, for 64 or 256 requests: NumPy calls (1 to 2 us each) are what counts, not elements.
    """
    batch = len(kv_len)
    tiles = (kv_len + (tile_kv - 1)) // tile_kv
    order = (-tiles).argsort(kind="stable")  # longest first
    tiles, rows = tiles[order], rows[order]
    if np.count_nonzero(rows) < batch:
        used = rows > 0
        order, tiles, rows = order[used], tiles[used], rows[used]
    table = np.zeros((batch, ITEM_WORDS), np.int32)
    table[:, 0], table[:, 1], table[:, 2], table[:, 3] = qo_indptr[:-1], qo_len, kv_base, kv_len
    table[:, 6], table[:, 10], table[:, 12] = kv_len, _count(batch), 1
    table = table.take(order, axis=0)
    found = None
    if costs is not None and len(order):
        found = _chunks(tiles, rows, int(np.add.reduce(rows)) // len(order), slots, costs)
    if found is None:
        return PrefillPlan(_number(table, rows)[0], 0, 0)
    table[:, 13], table[:, 12] = found
    items, number = _number(table, rows * table[:, 12])
    chunks, length = items[:, 12], items[:, 13]
    q_tile = items[:, 4] // chunks
    chunk = items[:, 4] - q_tile * chunks
    length *= tile_kv
    begin = chunk * length
    end = np.minimum(begin + length, items[:, 3])
    items[:, 4], items[:, 5], items[:, 6], items[:, 11] = q_tile, begin, end, chunk
    # Longer ones have more chunks: what is split lies in front.
    num_slots = int(np.count_nonzero(chunks > 1))
    chunk = chunk[:num_slots]
    items[:num_slots, 7] = number[:num_slots] - chunk
    items[:, 13], items[:, WAITS] = 0, len(items) <= slots
    return PrefillPlan(
        items.take(((begin - end) // tile_kv).argsort(kind="stable"), axis=0), num_slots,
        num_slots - int(np.count_nonzero(chunk)),
    )  # fmt: skip


#: For `_count`, read-only.
_COUNT = np.arange(1 << 12, dtype=np.int32)
_COUNT.flags.writeable = False


def _count(n: int) -> Ints:
    """0, 1, ... n - 1."""
    return _COUNT[:n] if n <= len(_COUNT) else np.arange(n, dtype=np.int32)


def _number(table: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """(`counts[i]` items from row i of `table`, numbered in column 4 from 0; the numbers of all)."""
    table[:, 4] = counts.cumsum() - counts
    items: Ints = table.take(_count(len(table)).repeat(counts), axis=0)
    number = _count(len(items))
    items[:, 4] = number - items[:, 4]
    return items, number


def _chunks(tiles: Ints, rows: Ints, share: int, slots: int, costs: Costs) -> tuple[Ints | int, Ints | int] | None:
    """(Tiles a chunk, chunks) of `rows[i]` items of `tiles[i]` tiles of keys each, longest first; None for one each.

    About `share` items have the same keys.
    """
    longest = int(tiles[0])
    if longest != int(tiles[-1]):
        return _uneven_chunks(tiles, rows, slots, costs)
    best = best_chunks(int(np.add.reduce(rows)), longest, slots, costs, share)
    length = max(-(-longest // best), 1)  # equal chunks
    return None if best == 1 else (length, max(-(-longest // length), 1))


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
_SHARES = np.array([[1.0], [1.5], [0.7]])


def _uneven_chunks(tiles: Ints, rows: Ints, slots: int, costs: Costs) -> tuple[Ints, Ints] | None:
    """`_chunks` for different `tiles`.

    Handed out longest first, items end within a short one of each other: the time is the longest item's, or the even
    share and half a mean item.
    """
    keys, each = tiles.astype(np.float64), rows.astype(np.float64)
    total, longest, count = float(keys @ each), float(keys[0]), int(np.add.reduce(rows))

    def time(longest: float, count: int) -> float:
        return max(longest + costs.start, (total + costs.start * count) / slots + 0.5 * total / count)

    lengths = np.maximum(_SHARES * (total / slots), 1.0)
    chunks = np.ceil(keys / lengths)
    if keys[-1] == 0 or chunks[2, 0] > MOST_CHUNKS:
        chunks = chunks.clip(1, MOST_CHUNKS)
    parts = keys / chunks
    pieces, most = (chunks @ each).tolist(), np.maximum.reduce(parts, axis=1).tolist()
    best, least = None, time(longest, count)
    for i, length in enumerate(lengths[:, 0].tolist()):
        if length >= longest or pieces[i] > count + EXTRA_ITEMS * slots:
            continue
        took = time(most[i], int(pieces[i]))
        took += costs.part + costs.add * float(chunks[i, 0]) + costs.traffic * pieces[i]
        if took < least:
            best, least = i, took
    if best is None:
        return None
    even = np.ceil(parts[best])  # equal chunks
    if keys[-1] == 0:
        even = np.maximum(even, 1)
    return even, np.maximum(np.ceil(keys / even), 1)
