"""Prefill schedule: which CTA computes which query rows over which keys, and the shape of a CTA.

Query rows are *packed*: row ``qo_idx * group + head_in_group`` of one kv head. A work item is one tile of packed rows
of one request over a range of keys; every item runs once a kv head, so n items are a grid of ``n * num_kv_heads``
CTAs. Ranges are trimmed to what causality and the sliding window leave visible, and items lie longest first, so that
the last ones to start are the shortest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

Ints = np.ndarray[Any, np.dtype[Any]]

#: int32 words of a work item (struct PrefillItem).
ITEM_WORDS = 16
#: Shortest chunk of a split tile, keys: writing and joining a partial result must stay small beside computing it.
MIN_CHUNK_KEYS = 512
#: The same for tiles of 16 rows, whose partial results are eight times smaller.
MIN_CHUNK_KEYS_NARROW = 256


class PrefillTiles(NamedTuple):
    """Shape of a CTA: warps, 16-row tiles a warp, keys a tile, CTAs that share a multiprocessor, bytes of smem."""

    warps: int
    row_tiles: int
    tile_kv: int
    ctas_per_sm: int
    smem_bytes: int

    @property
    def tile_q(self) -> int:
        """Packed query rows of a CTA."""
        return self.warps * self.row_tiles * 16


def _row_bytes(dim: int) -> int:
    """Bytes of a tile's row, as TileLayout in kernels/attention/smem_tile.cuh."""
    chunks = -(-dim // 16) * 2
    return (chunks if chunks % 8 == 0 else chunks | 1) * 16


class TileKind(NamedTuple):
    """What changes the shared memory of a CTA: fp8 keys and values, and frequencies of ROPE_LLAMA."""

    fp8: bool = False
    rope: bool = False


PLAIN = TileKind()


def smem_bytes(
    warps: int, row_tiles: int, tile_kv: int, head_dim_qk: int, head_dim_vo: int, kind: TileKind = PLAIN
) -> int:
    """Dynamic shared memory of kernels/attention/prefill.cuh.

    Q, two buffers of K and V (fp8: one and the bytes of the next tile), ranges, item, page offsets, frequencies.
    """
    qk, vo = _row_bytes(head_dim_qk), _row_bytes(head_dim_vo)
    kv = tile_kv * (qk + vo + head_dim_qk + head_dim_vo) if kind.fp8 else 2 * tile_kv * (qk + vo)
    turns = 4 * head_dim_qk if kind.rope else 0
    return 16 * warps * row_tiles * max(qk, vo) + kv + 16 * warps + 96 + 2 * tile_kv * 16 + turns


def _shape(tile_q: int, head_dim_vo: int) -> tuple[int, int]:
    """(warps, row tiles) for `tile_q` rows: 32 rows a warp while their accumulators fit the registers, else 16."""
    if tile_q == 128:
        return (4, 2) if head_dim_vo <= 128 else (8, 1)
    return tile_q // 16, 1


def _ctas_per_sm(warps: int, row_tiles: int, tile_kv: int, head_dim_vo: int, smem: int, smem_per_sm: int) -> int:
    """CTAs that share a multiprocessor: 1 KB of shared memory a CTA is the system's, and 64 K registers are there."""
    registers = min(row_tiles * (head_dim_vo + tile_kv) // 2 + 40, 256)
    return max(1, min(smem_per_sm // (smem + 1024), 65536 // (registers * 32 * warps), 16))


@lru_cache(maxsize=1024)
def choose_tiles(
    packed_rows: int, head_dim_qk: int, head_dim_vo: int, smem_per_block: int, smem_per_sm: int,
    kind: TileKind = PLAIN,
) -> PrefillTiles:  # fmt: skip
    """The CTA shape for requests of about `packed_rows` packed query rows.

    The keys of a tile depend on the head dims, the kind and the device alone, so a row is computed with the same
    sequence of operations whatever the batch around it.
    """
    tile_kv, most_rows = _key_tile(head_dim_qk, head_dim_vo, smem_per_block, smem_per_sm, kind)
    wanted = 16 if packed_rows <= 16 else 64 if packed_rows <= 64 else 128
    warps, row_tiles = _shape(min(wanted, most_rows), head_dim_vo)
    smem = smem_bytes(warps, row_tiles, tile_kv, head_dim_qk, head_dim_vo, kind)
    ctas = _ctas_per_sm(warps, row_tiles, tile_kv, head_dim_vo, smem, smem_per_sm)
    return PrefillTiles(warps, row_tiles, tile_kv, ctas, smem)


def narrow_tiles(tiles: PrefillTiles, head_dim_qk: int, head_dim_vo: int, kind: TileKind = PLAIN) -> PrefillTiles:
    """The same rows and keys with one 16-row tile a warp: half the registers, twice the shared-memory reads."""
    warps = tiles.warps * tiles.row_tiles
    return PrefillTiles(
        warps, 1, tiles.tile_kv, 1, smem_bytes(warps, 1, tiles.tile_kv, head_dim_qk, head_dim_vo, kind)
    )  # fmt: skip


def _key_tile(
    head_dim_qk: int, head_dim_vo: int, smem_per_block: int, smem_per_sm: int, kind: TileKind
) -> tuple[int, int]:
    """(keys a tile, largest query tile): as many rows as fit; then 64 keys unless 32 let more CTAs share an SM."""
    for keys in ((64, 32), (16,)):
        for tile_q in (128, 64, 32):
            warps, row_tiles = _shape(tile_q, head_dim_vo)
            found: tuple[int, int] | None = None
            for tile_kv in keys:
                smem = smem_bytes(warps, row_tiles, tile_kv, head_dim_qk, head_dim_vo, kind)
                if smem <= smem_per_block:
                    ctas = _ctas_per_sm(warps, row_tiles, tile_kv, head_dim_vo, smem, smem_per_sm)
                    if found is None or ctas > found[0]:
                        found = ctas, tile_kv
            if found is not None:
                return found[1], tile_q
    raise ValueError(f"head dims {head_dim_qk}, {head_dim_vo} do not fit {smem_per_block} bytes of shared memory")


@dataclass(frozen=True)
class PrefillPlan:
    """A schedule.

    Attributes
    ----------
    items : int32 [num_items, ITEM_WORDS]
        Struct PrefillItem: q_row, qo_len, kv_base, kv_len, q_tile, kv_begin, kv_end, first_slot, mask_low, mask_high,
        request, chunk, num_chunks, row_shift, unused.
    num_slots : int
        Partial results a kv head.
    num_split : int
        Tiles whose keys are split.
    """

    items: Ints
    num_slots: int
    num_split: int


def max_items(max_rows: int, batch: int, group: int, tile_q: int, slots_per_head: int) -> int:
    """Items that no plan of `batch` requests with `max_rows` query tokens exceeds without a fixed split."""
    return max_rows * group // tile_q + batch + slots_per_head


def plan_prefill(
    qo_indptr: Ints,
    kv_len: Ints,
    kv_base: Ints,
    *,
    group: int,
    num_kv_heads: int,
    tile_q: int,
    tile_kv: int,
    slots: int,
    causal: bool = False,
    window_left: int = -1,
    split_keys: int | None = None,
    disable_split: bool = False,
    mask_offsets: Ints | None = None,
    narrow: Callable[..., tuple[Ints, Ints]] | None = None,
    block_keys: int | None = None,
    align_end: bool = False,
    split_tail: int = 0,
) -> PrefillPlan:
    """Make the work list.

    Parameters
    ----------
    qo_indptr : int64 [batch + 1]
        Rows of q of every request.
    kv_len, kv_base : int64 [batch]
        Keys of every request, and where they start (first page slot, or first token).
    group, num_kv_heads : int
        Query heads a kv head; kv heads.
    tile_q, tile_kv : int
        Packed rows and keys a tile, see `choose_tiles`.
    slots : int
        CTAs the device runs at once.
    causal, window_left
        As the kernel applies them; pass ``causal=False`` with a custom mask.
    split_keys : int, optional
        Keys of every chunk, at multiples of it from key 0: a row's result does not depend on the batch.
    disable_split : bool
        One chunk a tile.
    mask_offsets : int64 [batch], optional
        Byte offset of each request's packed custom mask.
    narrow : callable, optional
        ``narrow(begin, end, tile_kv, qo_first, qo_last, request, qo_len, kv_len) -> (begin, end)`` drops the keys of
        each tile that a variant's mask can never show.
    block_keys : int, optional
        Requests with this many keys together have their items side by side (longest first among themselves), those with
        the most keys in front, so that what runs at a time reads keys that the L2 holds. None: longest first of all.
    align_end : bool
        A request's last tile is full, and its first one may not be: under a causal mask that one sees the fewest keys
        (1024 rows in tiles of 192 over tiles of 80 keys: 43 of them instead of 51). The Hopper kernel reads row_shift.
    split_tail : int
        So many items may be added by splitting those that start last, when not every multiprocessor has one more to do
        (see `_tail_chunks`).
    """
    # Every request's fields once, then a copy of the row for each of its tiles: few NumPy calls of about 1 us each.
    batch = len(kv_len)
    qo_len = qo_indptr[1:] - qo_indptr[:-1]
    tiles = (qo_len * group + (tile_q - 1)) // tile_q
    table = np.zeros((batch, ITEM_WORDS), np.int32)
    table[:, 0], table[:, 1], table[:, 2], table[:, 3] = qo_indptr[:-1], qo_len, kv_base, kv_len
    table[:, 4] = tiles - tiles.cumsum()  # less the number of the request's first tile
    table[:, 10], table[:, 12] = np.arange(batch), 1
    if mask_offsets is not None:
        table[:, 8:10] = mask_offsets[:batch].astype("<i8").view("<i4").reshape(-1, 2)
    if align_end:
        table[:, 13] = np.where(tiles > 1, tiles * tile_q - qo_len * group, 0)
    items: Ints = table.repeat(tiles, axis=0)
    q_tile, rows, keys, request = items[:, 4], items[:, 1], items[:, 3], items[:, 10]
    q_tile += np.arange(len(items), dtype=np.int32)
    first = q_tile * tile_q - items[:, 13]  # packed row
    begin, end = _visible(first, rows, keys, group, tile_q, tile_kv, causal, window_left)
    if narrow is not None:
        first_row, last_row = np.maximum(first, 0) // group, np.minimum((first + (tile_q - 1)) // group, rows - 1)
        begin, end = narrow(begin, end, tile_kv, first_row, last_row, request, rows, keys)
    whole, split = _chunks(begin, end, num_kv_heads, tile_q, tile_kv, slots, split_keys, disable_split)
    items[:, 5], items[:, 6] = begin, end
    block: Ints | int = 0
    if block_keys is not None and batch > 1:
        block = _blocks(kv_len, block_keys, int(np.maximum.reduce(whole, initial=0)) + 1)[request]
    place = block - whole
    if split is None and split_tail and split_keys is None and not disable_split:
        split = _tail_chunks(whole, place, begin, num_kv_heads, tile_kv, slots, split_tail)
    num_slots = num_split = 0
    if split is not None:
        if not isinstance(block, int):
            block = block.repeat(split[2])
        items, num_slots, num_split = _split(items, *split)
        place = block - (items[:, 6] - items[:, 5] + (tile_kv - 1)) // tile_kv
    if len(items) and (place != place[0]).any():
        items = items.take(place.argsort(kind="stable"), axis=0)
    return PrefillPlan(items, num_slots, num_split)


def _blocks(kv_len: Ints, block_keys: int, step: int) -> Ints:
    """`step` times the number of each request's block, for `block_keys` of `plan_prefill`.

    A block is as many requests as have `block_keys` keys together, or one. Those with the fewest keys come last: they
    are what the multiprocessors end with.
    """
    order = (-kv_len).argsort(kind="stable")
    block, at, total = np.empty(len(kv_len), np.int32), 0, 0
    numbers = []
    for keys in kv_len[order].tolist():
        if total and total + keys > block_keys:
            at, total = at + step, 0
        total += keys
        numbers.append(at)
    block[order] = numbers
    return block


def _split(items: Ints, first: Ints, chunk: Ints, chunks: Ints) -> tuple[Ints, int, int]:
    """(an item for each chunk of each tile, partial results, tiles that are split) from `_chunks`."""
    is_split = chunks > 1
    counts = np.where(is_split, chunks, 0)
    ends = counts.cumsum()
    items[:, 7], items[:, 12] = np.where(is_split, ends - counts, 0), chunks
    items[:, 11] = chunks - chunks.cumsum()  # less the number of the tile's first chunk
    tile = np.arange(len(items)).repeat(chunks)
    items = items.take(tile, axis=0)
    items[:, 11] += np.arange(len(tile), dtype=np.int32)
    length = chunk[tile]
    start = first[tile] + items[:, 11] * length
    items[:, 5], items[:, 6] = np.maximum(start, items[:, 5]), np.minimum(start + length, items[:, 6])
    return items, int(ends[-1]) if len(ends) else 0, int(np.count_nonzero(is_split))


def _visible(
    first: Ints, qo_len: Ints, kv_len: Ints, group: int, tile_q: int, tile_kv: int, causal: bool, window_left: int
) -> tuple[Ints, Ints]:
    """Keys that some row of each tile sees, [begin, end), begin a multiple of `tile_kv`; (0, 0) if there are none.

    `first` is the first packed row of each tile, which may lie before the request.
    """
    end = kv_len
    if causal:  # up to the last row's own key
        rows = np.minimum((first + (tile_q - 1 + group)) // group, qo_len)
        end = np.maximum(rows + (kv_len - qo_len), 0)
    if window_left < 0:
        return np.zeros(len(end), np.int32), end
    # In 64 bits: a window may be any number.
    begin = (
        np.maximum(np.maximum(first, 0) // np.int64(group) + (kv_len - qo_len) - window_left, 0) // tile_kv * tile_kv
    )
    seen = begin < end
    return np.where(seen, begin, 0), np.where(seen, end, 0)


def _chunks(
    begin: Ints, end: Ints, num_kv_heads: int, tile_q: int, tile_kv: int, slots: int, split_keys: int | None,
    disable_split: bool,
) -> tuple[Ints, tuple[Ints, Ints, Ints] | None]:  # fmt: skip
    """Key tiles of every item, and (where the first chunk starts, keys a chunk, chunks) of each if some are split.

    A tile is split when it alone would take twice as long as the whole work spread evenly over the device: splitting
    costs a write and a read of fp32 results. Then its chunks are as long as that even share.
    """
    tiles = (end - begin + (tile_kv - 1)) // tile_kv
    if disable_split or len(tiles) == 0:
        return tiles, None
    if split_keys is not None:
        chunk = min(-(-split_keys // tile_kv) * tile_kv, 1 << 30)  # fits 32 bits
        first = begin // chunk
        return tiles, (first * chunk, np.full_like(end, chunk), np.where(end > begin, -(-end // chunk) - first, 1))
    least = (MIN_CHUNK_KEYS_NARROW if tile_q == 16 else MIN_CHUNK_KEYS) // tile_kv
    share = max(-(-int(np.add.reduce(tiles, dtype=np.int64)) * num_kv_heads // slots), least)
    if int(np.maximum.reduce(tiles)) < 2 * share:
        return tiles, None
    chunks = np.maximum(-(-tiles // share), 1)
    chunk = np.maximum(-(-tiles // chunks), 1)  # equal chunks
    return tiles, (begin, chunk * tile_kv, np.maximum(-(-tiles // chunk), 1))


#: What splitting an item costs, in tiles of keys: so many, and again so many a chunk.
TAIL_COST, TAIL_CHUNK_COST = 4, 2
_MOST_TAIL_CHUNKS = 8
#: More kv heads are handed out some at a time (`prefill_hopper.heads_together`), and the last items are not all heads'.
TAIL_HEADS = 8


def _tail_chunks(
    tiles: Ints, place: Ints, begin: Ints, num_kv_heads: int, tile_kv: int, slots: int, most: int
) -> tuple[Ints, Ints, Ints] | None:
    """(where the first chunk starts, keys a chunk, chunks) of every item, if those that start last are to be split.

    No more than `most` items are added.

    `slots` multiprocessors take items of about the same length; when every one has had as many as there are whole
    rounds, some have one more to do and the others wait: 688 items of a 4096-token chunk of a prompt on 132 take the
    time of 6 rounds, not of 5.2. The last items are cut into as many chunks as make that round shortest.
    """
    over = len(tiles) * num_kv_heads % slots
    longest = int(np.maximum.reduce(tiles, initial=0))
    if not over or 2 * int(np.minimum.reduce(tiles)) < longest:
        return None
    count = min(-(-over // num_kv_heads), len(tiles))
    pieces = count * num_kv_heads
    share = len(tiles) * num_kv_heads * longest / slots
    best, chunks = longest * -(-pieces // slots) - share / 64, 1
    for n in range(2, _MOST_TAIL_CHUNKS + 1):
        if longest * tile_kv < n * MIN_CHUNK_KEYS or count * (n - 1) > most:
            break
        time = -(-longest // n) * -(-pieces * n // slots) + TAIL_COST + TAIL_CHUNK_COST * n
        if time < best:
            best, chunks = time, n
    if chunks == 1:
        return None
    last = place.argsort(kind="stable")[len(tiles) - count :]
    length, number = np.maximum(tiles, 1), np.ones(len(tiles), np.int32)
    length[last] = np.maximum(-(-tiles[last] // chunks), 1)
    number[last] = np.maximum(-(-tiles[last] // length[last]), 1)
    return begin, length * tile_kv, number


def pad(rows: Ints, count: int) -> Ints:
    """`rows` with zero rows up to `count`: items of zeros are no-ops."""
    padded = np.zeros((count, rows.shape[1]), np.int32)
    padded[: len(rows)] = rows
    return padded
