"""The Hopper prefill kernel (wgmma, TMA): its instances, tile shapes and tensor maps."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fi_cupy.dtypes import HALF_TYPES, DType, bfloat16, float16
from fi_cupy.errors import LayoutError, UnsupportedError
from fi_cupy.jit.driver import has_driver_binding, tensor_map
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import CppType, KernelSpec
from fi_cupy.prefill_params import PARAMS as PORTABLE_PARAMS

if TYPE_CHECKING:
    from fi_cupy.arrays import View
    from fi_cupy.device import DeviceInfo
    from fi_cupy.prefill_kernel import Problem

PARAMS = ParamsStruct(
    "PrefillHopperParams",
    [
        *PORTABLE_PARAMS.fields,
        *((f"{x}_map", "tensormap") for x in "qkv"),
        *((name, "u32") for name in ("num_items", "num_kv_heads", "heads_together")),
        *((f"{name}_rows", "u32") for name in ("kv", "box", "q_box")),
        *((f"{x}_{of}_units", "u32") for x in "kv" for of in ("page", "head", "rows8")),
    ],
)


class HopperTiles(NamedTuple):
    """Shape of a CTA: consumer warpgroups of 64 rows, keys a tile, registers a producer and a consumer thread.

    `stages` tiles of K and of V are in flight. With two `slots` (of an item and its Q) a CTA computes many items, the
    next one's tiles loaded under the current one's end; with one it computes a single item.
    """

    consumers: int
    tile_kv: int
    producer_regs: int
    consumer_regs: int
    stages: int
    slots: int
    head_dim_qk: int
    head_dim_vo: int

    @property
    def tile_q(self) -> int:
        """Packed query rows of a CTA."""
        return 64 * self.consumers

    @property
    def smem_bytes(self) -> int:
        """Q, stages of K and V, and struct HopperShared: barriers and slots of items."""
        keys = self.stages * self.tile_kv * (self.head_dim_qk + self.head_dim_vo)
        barriers = 4 * self.stages + 3 * self.slots + 1
        shared = -(-barriers // 2) * 16 + 16 + 80 * self.slots
        return 2 * (self.slots * self.tile_q * self.head_dim_qk + keys) + shared


#: Head dims -> tiles. A consumer thread holds dim_vo / 2 registers of output, tile_kv / 2 of logits and tile_kv / 4 of
#: packed weights, and needs some 30 more; a thread of every warpgroup together have 512.
TILES = {
    # 32 + 64 + 32 of 160: the exponentials (as long as the products at this head dim) in long runs.
    (64, 64): HopperTiles(3, 128, 32, 160, 4, 2, 64, 64),
    # 64 + 40 + 20 of 160: 96 keys spill and serialise, 64 leave the tensor cores 88 % busy instead of 96 %.
    (128, 128): HopperTiles(3, 80, 32, 160, 3, 2, 128, 128),
    (192, 128): HopperTiles(3, 80, 32, 160, 3, 1, 192, 128),
    # 128 + 40 + 20 of 232: the output leaves room for two warpgroups only; 224 KB of shared memory.
    (256, 256): HopperTiles(2, 80, 40, 232, 2, 1, 256, 256),
}
#: Where a soft cap's four denominators at a time do not fit beside them.
_CAPPED_TILES = {(64, 64): HopperTiles(3, 96, 32, 160, 4, 2, 64, 64)}
#: For short prompts with as many kv heads as query heads (`wants_fine_tiles`), plain logits: 64 rows of a warpgroup and
#: tiles of 64 keys meet on the diagonal, and fewer keys are read that nobody sees. A step is 3 % slower than with 80.
FINE_TILES = {(128, 128): HopperTiles(3, 64, 32, 160, 4, 2, 128, 128)}
#: For short work (`wants_short_tiles`), plain logits.
SHORT_TILES = {
    (64, 64): HopperTiles(2, 128, 40, 232, 4, 2, 64, 64),
    (128, 128): HopperTiles(2, 64, 40, 232, 4, 2, 128, 128),
}
#: Variants have unknown values beside the accumulators: two warpgroups, which have 232 registers each. Not those whose
#: scores are computed as built-in ones are (`Lowered.regular`), but for head dim 256.
_VARIANT_TILES = {
    (64, 64): SHORT_TILES[64, 64],
    (128, 128): HopperTiles(2, 80, 40, 232, 3, 2, 128, 128),
    (192, 128): HopperTiles(2, 80, 40, 232, 3, 1, 192, 128),
    (256, 256): HopperTiles(2, 64, 40, 232, 2, 1, 256, 256),
}


#: A soft cap or ALiBi at head dim 256, or both: up to 48 bytes.
_ITEM_VALUES = "values of the item, stored and loaded once an item"
_ONE_VALUE = "one value, stored and loaded outside the products (NVRTC 13.5; 13.0 needs no memory for it)"


def _spills(tiles: HopperTiles, qk: int, soft_cap: bool, alibi: bool, paged: bool) -> str:
    """Why an instance may spill."""
    if (soft_cap or alibi) and (qk == 256 or (soft_cap and alibi)):
        return _ITEM_VALUES
    return _ONE_VALUE if paged and tiles.consumers == 2 else ""


@lru_cache(maxsize=512)
def hopper_spec(
    dtype: DType,
    tiles: HopperTiles,
    *,
    paged: bool,
    query_boxes: bool = True,
    alibi: bool = False,
    soft_cap: bool = False,
    positive_scale: bool = True,
    head_scales: bool = False,
) -> KernelSpec:
    """The Hopper kernel for one element type and CTA shape.

    `query_boxes`: the group divides the tile, so packed query rows are a box that the copy engine can bring; else the
    consumers gather them. `positive_scale` False is for sm_scale <= 0, `head_scales` for factors of q or k a head.
    """
    qk, vo = tiles.head_dim_qk, tiles.head_dim_vo
    dims = f"d{qk}" + (f"x{vo}" if vo != qk else "")
    options = (
        ("paged", paged),
        ("gather", not query_boxes),
        ("alibi", alibi),
        ("cap", soft_cap),
        ("neg", not positive_scale),
        ("heads", head_scales),
    )
    suffix = "".join(f"_{name}" for name, on in options if on)
    flags = ", ".join("true" if on else "false" for on in (alibi, soft_cap, positive_scale, head_scales))
    return KernelSpec(
        symbol=f"prefill_hopper_{dtype.tag}_{dims}_q{tiles.tile_q}k{tiles.tile_kv}{suffix}",
        header="attention/prefill_hopper.cuh",
        function="prefill_hopper",
        params=PARAMS,
        config=(
            ("T", dtype),
            ("kHeadDimQK", qk),
            ("kHeadDimVO", vo),
            ("kConsumers", tiles.consumers),
            ("kTileKv", tiles.tile_kv),
            ("kStages", tiles.stages),
            ("kSlots", tiles.slots),
            ("kProducerRegs", tiles.producer_regs),
            ("kConsumerRegs", tiles.consumer_regs),
            ("kPaged", paged),
            ("kQueryBoxes", query_boxes),
            ("Logits", CppType(f"fi::PrefillLogits<{flags}>")),
        ),
        threads=128 * (tiles.consumers + 1),
        min_blocks=1,
        spills=_spills(tiles, qk, soft_cap, alibi, paged),
        smem_bytes=tiles.smem_bytes,
        min_arch=90,
        max_arch=90,
    )


class Load(NamedTuple):
    """A batch, as if its requests were alike: how many, and packed rows, query tokens and keys of each."""

    requests: int
    rows: int
    tokens: int
    keys: int
    causal: bool

    def items(self, tile_q: int) -> int:
        """Work items of one kv head."""
        return self.requests * -(-self.rows // tile_q)


def load_of(requests: int, group: int, tokens: int, keys: int, causal: bool, window_left: int) -> Load:
    """The load of so many requests with `tokens` queries and `keys` keys altogether; a window makes items alike."""
    count = max(requests, 1)
    tokens, keys = -(-tokens // count), -(-keys // count)
    if 0 <= window_left < keys - tokens // 2:
        keys, causal = min(keys, window_left + 1 + -(-128 // group)), False
    return Load(requests, tokens * group, tokens, keys, causal)


#: A tile of 128 rows takes so much of the time of one of 192: 1.11 times as long a row (H100, d128 and d64, 16x1024 and
#: 1x16384), two warpgroups hiding less of each other than three.
_SHORT_COST = 0.74
#: The estimate is not better than this: the other kernel must promise as much.
_GAIN = 0.95
#: Items of so many keys take the same time, start and end: whole rounds of them count. 12x128 of 32/8 heads is 2.2
#: rounds of 192 rows or 2.9 of 128: 19.7 us and 17.2.
_ALIKE_KEYS = 256
#: Key tiles are split when a multiprocessor's even share is half of the longest item or less, from so many keys on.
_SPLIT_KEYS = 1024


def wants_short_tiles(load: Load, num_kv_heads: int, slots: int) -> bool:
    """Whether tiles of 128 rows finish before those of 192 do, by the time of the longest item and of the even share.

    Times are in those of a 192-row item that sees every key; a causal one sees them less half the queries on average.
    Measured (H100, 32 heads, causal, 128-row over 192-row): 1x512 0.97, 1x1024 0.83; 4x4096 1.11, 16x1024 over 8 kv
    heads 1.13.
    """
    if load.keys <= _ALIKE_KEYS:
        rounds = [-(-load.items(tile_q) * num_kv_heads // slots) for tile_q in (192, 128)]
        return _SHORT_COST * rounds[1] < _GAIN * rounds[0]
    seen = max(1 - load.tokens / (2 * load.keys), 0.5) if load.causal and load.keys else 1.0
    tall, short = (load.items(tile_q) * num_kv_heads * seen / slots for tile_q in (192, 128))
    if tall <= 0.5 and load.keys >= _SPLIT_KEYS:  # splitting evens it out
        return _SHORT_COST * short < _GAIN * tall
    return _SHORT_COST * max(short, 1) < _GAIN * max(tall, 1)


def wants_fine_tiles(load: Load) -> bool:
    """Whether FINE_TILES finish before TILES do.

    Measured (H100, 32/32 heads, causal): 32x512 1.08 times as fast, 16x1024 1.04, 8x2048 1.02; 16x1024 of 32/8 heads
    0.99.
    """
    return load.causal and load.rows == load.tokens and load.keys <= _FINE_KEYS


_FINE_KEYS = 2048


def too_little(load: Load) -> str:
    """Why the portable kernel is the faster one for a batch that both take; empty if it is not.

    Few keys are no reason: 16x64 of 32/8 heads 12.6 us to 12.8, 32x64 20.3 to 24.0, 8x128 at d64 11.3 to 13.0 (H100).
    """
    if load.rows <= FEW_ROWS:
        return f"{load.rows} packed rows a request would leave most of its tile empty"
    return ""


#: Packed rows a request up to which the portable kernel's tiles of 16 and 64 rows waste less, and split keys better:
#: 1x(16, 65536) of 32/8 heads 114 us to 144. With 64 rows over few keys this one would be ahead (1x(64, 4096) of 32/32
#: heads 1.12, 16x64 1.12), with 32 it depends (16x(8, 4096) of 32/8 heads 1.06, 8x(32, 2048) of 32/32 0.96).
FEW_ROWS = 64


def hopper_tiles(p: Problem, short: bool = False, fine: bool = False) -> HopperTiles:
    """The CTA shape for a problem that `refusal` let pass; `short` and `fine` may be ignored.

    The group must divide a short tile if it divides the tall one: queries are gathered otherwise.
    """
    dims = p.head_dim_qk, p.head_dim_vo
    plain = p.variant is None and not p.soft_cap and not p.alibi
    if short and plain and dims in SHORT_TILES:
        group, tiles = p.num_qo_heads // p.num_kv_heads, SHORT_TILES[dims]
        if tiles.tile_q % group == 0 or TILES[dims].tile_q % group:
            return tiles
    if fine and plain and dims in FINE_TILES:
        return FINE_TILES[dims]
    soft_cap = p.soft_cap
    if p.variant is not None:
        if not p.variant.regular or p.alibi or p.soft_cap or dims == (256, 256):
            return _VARIANT_TILES[dims]
        soft_cap = p.variant.shape == "capped"
    return _CAPPED_TILES.get(dims, TILES[dims]) if soft_cap else TILES[dims]


def refusal(p: Problem, device: DeviceInfo) -> str:
    """Why the Hopper kernel does not take this problem; empty if it does. The one rule for falling back."""
    if device.arch != "90a":
        return f"the target is {device.arch}, not 90a"
    if not has_driver_binding():
        return "cuda-bindings, which encodes tensor maps, is not installed"
    if p.dtype not in HALF_TYPES:
        return f"{p.dtype.name} is not float16 or bfloat16"
    for name, other in (("keys and values of", p.kv), ("outputs of", p.out)):
        if other is not p.dtype:
            return f"{name} {other.name} differ from q, {p.dtype.name}"
    if p.rope:
        return "ROPE_LLAMA rotates keys before they are multiplied, which the copy engine cannot"
    if (p.head_dim_qk, p.head_dim_vo) not in TILES:
        return f"head dims {p.head_dim_qk}, {p.head_dim_vo} are none of {', '.join(map(str, TILES))}"
    if p.custom_mask:
        return "custom masks are bits in global memory"
    if p.variant is not None and p.variant.portable_only:
        return f"variant {p.variant.name}: {p.variant.portable_only}"
    if not p.mappable:
        return "a stride is negative, and the copy engine goes forwards"
    if p.paged and p.page_size % _SWIZZLE_ROWS:
        return f"page_size {p.page_size} is not a multiple of {_SWIZZLE_ROWS}, the rows of a swizzle"
    return ""


#: The 128-byte swizzle repeats after 8 rows, so pages can be put together from boxes of a multiple of 8. Others must
#: not come here, even where 20 rows divide both page and tile: the box is 16, and the tile's barrier waits for ever.
_SWIZZLE_ROWS = 8


def box_rows(page_size: int, tile_kv: int) -> int:
    """Tokens that one copy of a paged cache brings: what divides both the page, a multiple of 8, and the tile."""
    return math.gcd(page_size, tile_kv)


@lru_cache(maxsize=1024)
def heads_together(num_kv_heads: int, head_bytes: int) -> int:
    """kv heads whose work is handed out side by side, longest first: a divisor of `num_kv_heads`.

    Up to 8, or as many as have their keys and values (`head_bytes` each) in half of the L2. 8 of 32 heads are 2 to 3 %
    faster than 4 and 7 % faster than 1 (4x4096, 1x16384 causal; 16x1024 of 8 heads: all within 1 %). Work that is
    small enough for the L2 wants its longest items first whatever their head: at 1x1024 of 32 heads the last ones
    start first and the CTAs end within 2 of 13 tiles of keys, with 4 heads at a time within 8.
    """
    most = max(8, _HALF_L2 // max(head_bytes, 1))
    return max(n for n in range(1, min(num_kv_heads, most) + 1) if num_kv_heads % n == 0)


#: Half the 50 MB of an H100; an H200 has 60.
_HALF_L2 = 25 << 20
#: Keys and values of the requests whose items are handed out side by side: of 4 to 24 MB, 16 were best or within 2 %.
_BLOCK_BYTES = 16 << 20


def block_keys(tiles: HopperTiles, num_kv_heads: int, requests: int, keys: int, slots: int) -> int | None:
    """For ``plan_prefill(block_keys=)``: keys of the requests side by side, or None for longest first of all.

    Longest first puts the tiles of a request's rows as far apart as there are requests times heads together. With half
    as many of those as CTAs or fewer, several tiles of a request run at a time and read the same keys (8x2048 and
    4x4096 of 32 heads lose 4 % in blocks). With more, each tile of rows reads its keys from memory again: blocks
    gain 8 % for 16x1024 of 32 heads, 24 % for 32x512, 29 % for 64x256, 5 % for 16x1024 of 32/8 heads (H100). A block
    is no more requests times heads than half the CTAs: for 64x256 that is 8 MB, 2.3 % faster than 16.
    """
    row = 2 * (tiles.head_dim_qk + tiles.head_dim_vo)
    heads = heads_together(num_kv_heads, row * keys)
    if 2 * requests * heads <= slots or row * keys * heads <= _BLOCK_BYTES:
        return None
    most = max(slots // (2 * heads), 1) * -(-keys // requests)
    return max(min(_BLOCK_BYTES // (row * heads), most), 1)


_encode = lru_cache(maxsize=4096)(tensor_map)


@lru_cache(maxsize=4096)
def map_values(
    tiles: HopperTiles, dtype: str, q: int, num_rows: int, q_strides: tuple[int, ...], group: int, num_kv_heads: int,
    k: int, v: int, k_strides: tuple[int, int, int], v_strides: tuple[int, int, int], kv_extent: int, page_size: int,
) -> tuple[tuple[Any, ...], tuple[int, ...]]:  # fmt: skip
    """Fields of PARAMS behind the portable kernel's: the three tensor maps, and the numbers behind `num_items`.

    Addresses and strides (elements) decide them, so they are kept by those. `page_size` is 0 for contiguous keys and
    values, `kv_extent` their tokens, or the pages. Queries whose group does not divide the tile are not read through
    their map, which then has some valid box.
    """
    n, h = map_step("prefill: q", num_rows, q_strides[0]), map_step("prefill: q", group * num_kv_heads, q_strides[1])
    fit = group if tiles.tile_q % group == 0 else 1
    q_rows = 64 if 64 % fit == 0 else tiles.tile_q
    queries = _encode(
        dtype, q, (64, group, max(num_rows, 1), tiles.head_dim_qk // 64, num_kv_heads), (h, n, 128, group * h),
        (64, fit, q_rows // fit, 1, 1),
    )  # fmt: skip
    rows = box_rows(page_size, tiles.tile_kv) if page_size else tiles.tile_kv
    # Without keys there may be no memory; no box is loaded then.
    sides = (
        ("prefill: k", k if kv_extent else q, tiles.head_dim_qk // 64, k_strides),
        ("prefill: v", v if kv_extent else q, tiles.head_dim_vo // 64, v_strides),
    )
    extent, heads = max(kv_extent, 1), num_kv_heads if kv_extent else 1
    # A cache's pages count whether this batch uses them or not, which is at worst the rule for long prompts.
    head_bytes = 2 * (tiles.head_dim_qk + tiles.head_dim_vo) * kv_extent * max(page_size, 1)
    order = num_kv_heads, heads_together(num_kv_heads, head_bytes), kv_extent, rows, q_rows
    if not page_size:
        keys = [
            _encode(
                dtype, address, (64, extent, panels, num_kv_heads),
                (map_step(name, extent, token), 128, map_step(name, heads, head)), (64, rows, panels, 1),
            )
            for name, address, panels, (_, token, head) in sides
        ]  # fmt: skip
        return (queries, *keys), (*order, *[0] * 6)
    paged = [_paged_map(dtype, *side, extent, heads, page_size, rows) for side in sides]
    maps = queries, paged[0][0], paged[1][0]
    return maps, (*order, *paged[0][1], *paged[1][1])


def mappable(*arrays: View) -> bool:
    """Whether tensor maps describe arrays of the right alignment: `map_step` would not raise."""
    return all(
        min(x.strides) >= 0 or all(s >= 0 or n < 2 for s, n in zip(x.strides, x.shape, strict=True)) for x in arrays
    )


def map_step(name: str, count: int, stride: int) -> int:
    """Bytes from one of `count` rows, heads or pages to the next, as a tensor map can have them.

    Where there is only one its stride means nothing, and need not be a multiple of 16 bytes as a map's has to.
    `name`: the array, behind the operation; both are for the message.

    Raises
    ------
    LayoutError
        The stride is negative, which no map describes.
    """
    if count < 2:
        return 16
    if stride < 0:
        raise LayoutError(
            f"{name} has a stride of {stride} elements, expected none that is negative: the Hopper kernel's "
            "copies go forwards; pass a copy, or backend='fa2' where there is that choice"
        )
    return 2 * stride


def _paged_map(
    dtype: str, name: str, address: int, panels: int, strides: tuple[int, int, int], pages: int, heads: int,
    page_size: int, rows: int,
) -> tuple[bytes, tuple[int, int, int]]:  # fmt: skip
    """The map of a paged cache, and units a page, a head and 8 tokens: one dimension of the five is all of them."""
    page, token, head = (
        map_step(name, count, stride) for count, stride in zip((pages, page_size, heads), strides, strict=True)
    )
    steps = (page, pages), (head, heads), (8 * token, (page_size - rows) // 8 + 1)  # bytes and how many there are
    unit = math.gcd(*(step if count > 1 else 0 for step, count in steps)) or 16
    units = [step // unit if count > 1 else 0 for step, count in steps]
    extent = sum((count - 1) * n for (_, count), n in zip(steps, units, strict=True)) + 1
    if extent >= 1 << 31:
        raise UnsupportedError(
            f"prefill: {pages} pages of {page} bytes and heads of {head} bytes have a common stride of {unit} bytes; "
            "the Hopper kernel's copies count fewer than 2**31 of them; pass backend='fa2'"
        )
    made = _encode(
        dtype, address, (64, 8, panels, page_size // 8, extent), (token, 128, 8 * token, unit),
        (64, 8, panels, rows // 8, 1),
    )  # fmt: skip
    return made, (units[0], units[1], units[2])


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: every tile shape, and every option at head dim 128."""
    specs = [hopper_spec(bfloat16, tiles, paged=paged) for tiles in TILES.values() for paged in (False, True)]
    for table in (SHORT_TILES, FINE_TILES):
        specs += [hopper_spec(bfloat16, tiles, paged=paged) for tiles in table.values() for paged in (False, True)]
    specs += [hopper_spec(float16, TILES[dim, dim], paged=paged) for dim in (64, 128) for paged in (False, True)]
    usual = TILES[128, 128]
    specs.append(hopper_spec(bfloat16, usual, paged=False, query_boxes=False))
    specs.append(hopper_spec(bfloat16, usual, paged=True, query_boxes=False))
    specs.append(hopper_spec(bfloat16, usual, paged=False, positive_scale=False))
    specs.append(hopper_spec(bfloat16, usual, paged=True, head_scales=True))
    for alibi, soft_cap in ((True, False), (False, True), (True, True)):
        specs.append(hopper_spec(bfloat16, usual, paged=False, alibi=alibi, soft_cap=soft_cap))
    specs.append(hopper_spec(bfloat16, _CAPPED_TILES[64, 64], paged=False, soft_cap=True))
    specs.append(hopper_spec(bfloat16, TILES[256, 256], paged=False, soft_cap=True))
    return specs
