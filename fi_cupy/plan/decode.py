"""Decode schedule: which CTA reads which keys, and with how many warps and how much memory in flight.

The unit is a tile of 16 keys. A work item is a range of one request's keys; every item runs once a *head block* (the
query heads that one CTA serves), so a schedule of n items is a grid of ``n * num_head_blocks`` CTAs. Numbers with a
reason in this file were measured on an H100 (132 multiprocessors, 3.08 TB/s) with head_dim 128 and bf16.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from fi_cupy.errors import ArgumentError

TILE = 16
#: int32 words of a work item (struct DecodeItem).
ITEM_WORDS = 8
#: A chunk has at least this many tiles: 1x1024 took 5.4 us in chunks of 8 and 9.1 us in chunks of 2.
MIN_CHUNK_TILES = 8
#: Ragged batches: about this many items a CTA slot. 1 to 2 differ by 1-3 %; finer costs 0.6-1 us an item and SM.
ITEMS_PER_SLOT = 1.5
#: Most shared memory of a multiprocessor's one CTA in a single wave.
WAVE_BYTES = 150_000
#: A uniform batch is split no further once its last wave leaves at most this share of the slots idle.
GOOD_FILL = 0.8


class DecodeTiles(NamedTuple):
    """Shape of a CTA: warps, ring slots a warp, CTAs that share a multiprocessor, dynamic shared memory in bytes.

    With `head_pair` the CTA serves two neighbouring kv heads, each with half of the warps.
    """

    warps: int
    stages: int
    ctas_per_sm: int
    smem_bytes: int
    head_pair: bool = False


def head_blocks(group_size: int, head_dim: int) -> tuple[int, int, int]:
    """How the query heads of a kv head are dealt to CTAs.

    Returns
    -------
    (blocks_per_kv, heads_per_block, column_tiles)
        A column tile is 8 heads. Up to two fit the registers for head_dim <= 128, one above. Larger groups take several
        CTAs, whose second reading of the keys comes from L2.
    """
    most = 16 if head_dim <= 128 else 8
    blocks = -(-group_size // most)
    heads = -(-group_size // blocks)
    return blocks, heads, -(-heads // 8)


def smem_bytes(warps: int, stages: int, head_dim: int, kv_itemsize: int, column_tiles: int, rope: bool = False) -> int:
    """Dynamic shared memory of the kernel; the same arithmetic as DecodeTraits in kernels/attention/decode.cuh."""
    dim = -(-head_dim // (16 if kv_itemsize == 2 else 32)) * (16 if kv_itemsize == 2 else 32)
    tile = TILE * (dim * kv_itemsize // 16 | 1) * 16
    heads = 8 * column_tiles
    return max(warps * stages * 2 * tile, warps * heads * (dim + 4) * 4) + 2 * warps * heads * 4 + 16 + rope * dim * 4


def choose_tiles(
    groups: int,
    head_dim: int,
    kv_itemsize: int,
    column_tiles: int,
    *,
    arch: int,
    num_sms: int,
    smem_per_block: int,
    smem_per_sm: int,
    batch_invariant: bool = False,
    rope: bool = False,
    may_pair: bool = False,
) -> DecodeTiles:
    """The CTA's shape for a device.

    Parameters
    ----------
    groups : int
        Requests times head blocks (of one kv head each). It does not change with the lengths, so neither does the
        kernel of a captured graph.
    arch : int
        Compute capability times ten of the code that runs.
    batch_invariant : bool
        One shape for every batch, so that a request's bits do not depend on the others.
    rope : bool
        Rotary embedding inside the kernel, whose frequencies take shared memory.
    may_pair : bool
        The kv heads are even in number and lie side by side in the cache, and one CTA holds a whole group.

    Notes
    -----
    A multiprocessor needs 64 KB in flight from 8 warps for full bandwidth and 128-192 KB for the last percent
    (measured: 16 KB 1063 us, 32 KB 785, 64 KB 722, 128 KB 717, 192 KB 714 on a floor of 697). Four warps on two CTAs
    cover each other's merges in long runs; eight warps on one CTA halve the partials of a single wave, whose slots are
    all asked for at its start: 140 KB then are better than 210 (16x4096 95.3 against 96.1 us, 1x4096 10.2 against
    10.3; with fp8 53.4 against 54.5 and 7.8 against 7.9).

    An fp8 row of up to 128 dims is at most 128 bytes, and reading such pieces limits 64x8192 to 381 us by any method.
    Two neighbouring heads a CTA make 256 of them: 365 us. Small batches lose by it (1x4096: 8.3 against 7.5 us), since
    a pair has half as many CTAs. Two CTAs of 4 warps and 2 slots take 377 us where those of 8 and 3 take 385.

    Rows of up to 128 bytes are so short that more warps, not more slots, hide what a tile costs beside its bytes: see
    `_narrow_tiles`.
    """

    def bytes_of(warps: int, stages: int) -> int:
        return smem_bytes(warps, stages, head_dim, kv_itemsize, column_tiles, rope)

    def most_stages(warps: int, limit: int) -> int:
        # More than 6 slots a warp never helps: 6 tiles of even 64 dims are 27 KB a warp.
        return next((s for s in range(6, 0, -1) if bytes_of(warps, s) <= limit), 0)

    if arch < 80:  # loads are synchronous there: more slots would only cost memory
        warps = next(w for w in (4, 2, 1) if bytes_of(w, 1) <= smem_per_block)
        size = bytes_of(warps, 1)
        return DecodeTiles(warps, 1, max(1, min(4, smem_per_sm // (size + 1024))), size)
    # The driver keeps 1 KB of every CTA's share.
    half = min(smem_per_block, smem_per_sm // 2 - 1024)
    if arch >= 90 and head_dim * kv_itemsize <= 128 and column_tiles == 1 and not rope:
        narrow = _narrow_tiles(groups, head_dim, kv_itemsize, num_sms, batch_invariant, may_pair)
        if narrow is not None:
            warps, stages, ctas, with_pair = narrow
            return DecodeTiles(warps, stages, ctas, bytes_of(warps, stages), with_pair)
    pair = may_pair and kv_itemsize == 1 and head_dim <= 128 and (groups > num_sms or batch_invariant)
    if pair and column_tiles == 1 and not rope:  # the registers of twice as many threads
        stages = min(most_stages(4, half), 2)
        if stages >= 2:
            return DecodeTiles(4, stages, 2, bytes_of(4, stages), True)
    if groups <= num_sms and not batch_invariant:
        stages = most_stages(8, min(smem_per_block, WAVE_BYTES))
        if stages >= 2:
            return DecodeTiles(8, stages, 1, bytes_of(8, stages))
    stages = most_stages(4, half)
    if stages >= 2:
        return DecodeTiles(4, stages, 2, bytes_of(4, stages), pair)
    stages = most_stages(4, smem_per_block)
    if stages >= 1:
        return DecodeTiles(4, stages, 1, bytes_of(4, stages), pair)
    return DecodeTiles(2, most_stages(2, smem_per_block), 1, bytes_of(2, most_stages(2, smem_per_block)))


def _narrow_tiles(
    groups: int, head_dim: int, kv_itemsize: int, num_sms: int, batch_invariant: bool, may_pair: bool
) -> tuple[int, int, int, bool] | None:
    """(warps, slots a warp, CTAs a multiprocessor, pair) for rows of up to 128 bytes; None: as for wide ones.

    64 dims: two CTAs of 8 warps on a multiprocessor, with one slot a warp in bf16 and two with fp8. In us, before and
    now: 64x4096 with three kv heads 85 and 78 (fp8 50.6 and 43.6), 64x512 13.4 and 12.2 (10.2 and 7.8), 64x1024 with
    eight fp8 36.8 and 27.9. The same, of 128 dims of fp8 too, where one CTA a multiprocessor would leave many idle:
    16x4096 with three heads of 64 25.1 and 21.9 (18.2 and 13.9), 6x4096 with eight of 128 fp8 29.4 and 22.3.
    Fewer CTAs each want a multiprocessor for themselves: 8x512 with three heads takes 5.0 us, and 5.3 beside others.
    The fewest of all do better with one slot a warp (4x4096 with three heads 8.2 us, with four slots 9.3).
    On 24 shapes of 64 dims each choice was within 10 % of the best of some 60 shapes and chunk lengths.
    """
    fp8 = kv_itemsize == 1
    filled = 0 < groups <= num_sms and num_sms // groups * groups >= GOOD_FILL * num_sms
    if head_dim > 64:
        return (8, 2, 2, False) if groups <= num_sms and not filled and not batch_invariant else None
    few = groups <= num_sms // 4 if fp8 else filled
    if few and not batch_invariant:
        return (8, 1, 1, False) if not fp8 and groups <= num_sms // 8 else None
    return 8, 3 - kv_itemsize, 2, may_pair and fp8


def tile_candidates(
    head_dim: int,
    kv_itemsize: int,
    column_tiles: int,
    *,
    arch: int,
    smem_per_block: int,
    smem_per_sm: int,
    rope: bool = False,
    may_pair: bool = False,
) -> list[DecodeTiles]:
    """Shapes of a CTA that the device can hold and that may be faster than what `choose_tiles` takes, for the tuner.

    The parameters are those of `choose_tiles`. Turing, whose loads are synchronous, has none.
    """
    if arch < 80:
        return []
    pairs = (False, True) if may_pair and kv_itemsize == 1 and head_dim <= 128 and column_tiles == 1 else (False,)
    found = []
    for pair in pairs:
        for warps, ctas in ((4, 1), (4, 2), (4, 3), (8, 1), (8, 2)):
            if (pair and warps * ctas > 16) or (rope and pair and warps == 8):
                continue
            limit = min(smem_per_block, smem_per_sm // ctas - 1024)
            sizes = {s: smem_bytes(warps, s, head_dim, kv_itemsize, column_tiles, rope) for s in range(2, 7)}
            stages = [s for s, size in sizes.items() if size <= limit]
            # The deepest ring, one less, and the shallowest that keeps 64 KB a multiprocessor in flight.
            enough = [s for s in stages if ctas * sizes[s] >= 64 * 1024][:1]
            for s in dict.fromkeys([*stages[-2:], *enough]):
                found.append(DecodeTiles(warps, s, ctas, sizes[s], pair))
    return found


def choose_chunk(tiles: np.ndarray[Any, Any], num_head_blocks: int, slots: int) -> int:
    """Tiles of one chunk, for requests of `tiles` tiles each, on `slots` CTA slots.

    Uniform batches get equal chunks that fill whole waves: as many as still fit one wave if that leaves few slots
    idle, one if the batch itself fills its waves well (64x8192: unsplit 705 us, 64-page chunks 722), else the best
    number within the item budget (items just above a wave are the worst case: 1x65536 took 95 us as 128 items and 107
    as 136). Ragged batches get ``total / (1.5 slots)``, sorted longest first.
    """
    longest = int(tiles.max(initial=0))
    if longest <= MIN_CHUNK_TILES:
        return max(longest, 1)
    total = int(tiles.sum())
    busy = int(np.count_nonzero(tiles))
    groups = busy * num_head_blocks
    if longest * busy > 1.1 * total:
        return max(MIN_CHUNK_TILES, int(np.ceil(total * num_head_blocks / (ITEMS_PER_SLOT * slots))))

    def fill(n: int) -> float:
        return n * groups / (-(-n * groups // slots) * slots)

    n = max(1, slots // groups)
    if fill(n) < GOOD_FILL:
        n = max(range(1, int(1 + ITEMS_PER_SLOT * slots / groups) + 1), key=lambda k: (round(fill(k), 2), -k))
    return max(MIN_CHUNK_TILES, -(-longest // n))


def max_items(batch_size: int, num_head_blocks: int, slots: int) -> int:
    """No schedule of `choose_chunk` has more items than this, whatever the lengths: the grid of a captured graph."""
    return batch_size + int(np.ceil(ITEMS_PER_SLOT * slots / num_head_blocks))


@dataclass(frozen=True)
class DecodePlan:
    """A schedule.

    Attributes
    ----------
    items : int32 [num_items, 8]
        Longest first; see struct DecodeItem in kernels/attention/decode.cuh. A request of -1 is padding.
    num_slots : int
        Partial results of split requests; each needs ``heads * (head_dim + 2)`` floats.
    """

    items: np.ndarray[Any, Any]
    num_slots: int

    @property
    def num_items(self) -> int:
        return len(self.items)


def kv_lengths(
    indptr: np.ndarray[Any, Any], last_page_len: np.ndarray[Any, Any], page_size: int
) -> np.ndarray[Any, Any]:
    """Keys of every request, int64 [batch]: ``(pages - 1) * page_size + last_page_len``, 0 without pages."""
    pages = np.diff(indptr)
    return np.where(pages > 0, (pages - 1) * page_size + last_page_len, 0)


def page_lengths(
    op: str, indptr: np.ndarray[Any, Any], last_page_len: np.ndarray[Any, Any], page_size: int, num_indices: int,
    names: tuple[str, str, str] = ("indptr", "indices", "last_page_len"),
) -> np.ndarray[Any, Any]:  # fmt: skip
    """`kv_lengths` of int64 arrays that are checked: `ArgumentError` for a bad indptr or last page."""
    pages = indptr[1:] - indptr[:-1]
    fewest = int(np.minimum.reduce(pages)) if len(pages) else 0
    if indptr[0] < 0 or fewest < 0:
        shown = np.array2string(indptr, threshold=12)
        raise ArgumentError(f"{op}: {names[0]} must start at >= 0 and not decrease, got {shown}")
    if indptr[-1] > num_indices:
        raise ArgumentError(f"{op}: {names[0]} ends at {indptr[-1]}, but {names[1]} has {num_indices} entries")
    # Anything out of range is the largest here, as an unsigned number.
    if len(pages) and np.maximum.reduce((last_page_len - 1).view(np.uint64)) >= page_size:
        bad = ((last_page_len < 1) | (last_page_len > page_size)) & (pages > 0)
        if bad.any():
            b = int(np.argmax(bad))
            raise ArgumentError(f"{op}: {names[2]}[{b}] is {last_page_len[b]}, expected 1..{page_size} = page_size")
    kv_len = (pages - 1) * page_size + last_page_len
    return kv_len if fewest > 0 else np.where(pages > 0, kv_len, 0)


def plan_decode(
    kv_len: np.ndarray[Any, Any],
    page_begin: np.ndarray[Any, Any],
    *,
    num_head_blocks: int,
    slots: int,
    window_left: int = -1,
    split_keys: int | None = None,
    disable_split: bool = False,
    pad_to: int | None = None,
) -> DecodePlan:
    """Make the work list.

    Parameters
    ----------
    kv_len : int64 [batch]
    page_begin : int [batch]
        Where each request's pages start in `indices`.
    num_head_blocks : int
        CTAs an item takes.
    slots : int
        CTAs that the device runs at once.
    window_left : int
        Keys to the left of the last that are read; negative: all.
    split_keys : int, optional
        Keys of every chunk (``fixed_split_size * page_size``); default: `choose_chunk`.
    disable_split : bool
        One chunk a request.
    pad_to : int, optional
        Add empty items up to this number.
    """
    batch = len(kv_len)
    begin: Any = 0
    base: Any = np.zeros(1, np.int64)
    span = kv_len
    if window_left >= 0:
        begin = np.maximum(kv_len - (1 + window_left), 0)
        # Whole tiles from the first on; a fixed split counts from the first key, so that no chunk is empty.
        base = begin & -TILE if split_keys is None else begin
        span = kv_len - base
    if disable_split:
        chunks, step = None, span
    elif split_keys is not None:
        chunks, step = np.maximum(-(-span // split_keys), 1), np.full(batch, split_keys, np.int64)
    else:
        tiles = (span + (TILE - 1)) // TILE
        chunk = choose_chunk(tiles, num_head_blocks, slots)
        if chunk >= tiles.max(initial=0):
            chunks, step = None, span
        else:
            chunks = np.maximum(-(-tiles // chunk), 1)
            step = -(-tiles // chunks) * TILE  # equal chunks within a request

    rows = np.zeros((batch, ITEM_WORDS), np.int32)
    rows[:, 0], rows[:, 1], rows[:, 2], rows[:, 3] = np.arange(batch), begin, kv_len, page_begin
    rows[:, 5], rows[:, 7] = 1, kv_len
    num_slots = 0
    if chunks is not None:
        slot_count = np.where(chunks > 1, chunks, 0)
        ends = slot_count.cumsum()
        num_slots = int(ends[-1]) if batch else 0
        rows[:, 4], rows[:, 5] = ends - slot_count, chunks
        rows[:, 6] = chunks - chunks.cumsum()  # less the number of the request's first chunk
        rows = rows.repeat(chunks, axis=0)
        rows[:, 6] += np.arange(len(rows), dtype=np.int32)
        owner = rows[:, 0]
        length = step[owner]
        start = rows[:, 6] * length + (base[owner] if window_left >= 0 else base)
        rows[:, 1], rows[:, 2] = np.maximum(start, rows[:, 1]), np.minimum(start + length, rows[:, 7])
    # Longest first: 128 random requests took 733 us sorted and 751 unsorted.
    lengths = rows[:, 2] - rows[:, 1]
    items = rows
    if len(rows) and (lengths != lengths[0]).any():
        items = rows.take((-lengths).argsort(kind="stable"), axis=0)
    if pad_to is not None and pad_to > len(items):
        padding = np.zeros((pad_to - len(items), ITEM_WORDS), np.int32)
        padding[:, 0] = -1
        items = np.concatenate([items, padding])
    return DecodePlan(items, num_slots)


def single_chunks(span: int, num_head_blocks: int, slots: int) -> tuple[int, int]:
    """(keys of a chunk, chunks) of one request with `span` keys from a multiple of 16 on; `choose_chunk` for one."""
    tiles = -(-span // TILE)
    if tiles <= MIN_CHUNK_TILES:
        return max(tiles, 1) * TILE, 1
    chunk = choose_chunk(np.array([tiles]), num_head_blocks, slots)
    chunks = -(-tiles // chunk)
    return -(-tiles // chunks) * TILE, chunks
