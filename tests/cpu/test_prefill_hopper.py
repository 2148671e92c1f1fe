"""What the host decides for the Hopper prefill kernel: shapes, tensor maps, and who gets which kernel."""

from __future__ import annotations

import itertools

import pytest

from fi_cupy import prefill_hopper
from fi_cupy.dtypes import bfloat16, float8_e4m3fn
from fi_cupy.errors import UnsupportedError
from fi_cupy.prefill_hopper import (
    FINE_TILES,
    SHORT_TILES,
    TILES,
    Load,
    block_keys,
    box_rows,
    heads_together,
    load_of,
    map_values,
    too_little,
)
from fi_cupy.prefill_kernel import Problem, geometry
from fi_cupy.profiles import TYPICAL

USUAL = TILES[128, 128]


@pytest.fixture
def encoded(monkeypatch):
    """The arguments of every encoded map, in place of the driver's 128 bytes."""
    calls = []

    def encode(*args):
        calls.append(args)
        return bytes([len(calls)]) * 128

    monkeypatch.setattr(prefill_hopper, "_encode", encode)
    map_values.cache_clear()
    yield calls
    map_values.cache_clear()


def test_every_shape_fits_a_multiprocessor():
    tables = (TILES, SHORT_TILES, FINE_TILES, prefill_hopper._CAPPED_TILES, prefill_hopper._VARIANT_TILES)
    for tiles in (tiles for table in tables for tiles in table.values()):
        assert tiles.smem_bytes <= 227 * 1024
        registers = tiles.producer_regs + tiles.consumers * tiles.consumer_regs
        assert registers * 128 <= 65536 and tiles.producer_regs % 8 == tiles.consumer_regs % 8 == 0
        assert tiles.tile_kv % 16 == 0 and tiles.stages >= 2


@pytest.mark.parametrize(
    ("strides", "heads"),
    [
        ((2 * 16 * 8 * 128, 8 * 128, 128), 8),  # NHD, keys and values in one cache
        ((16 * 8 * 128, 128, 16 * 128), 8),  # HND
        ((16 * 3 * 128, 3 * 128, 128), 3),
        ((17 * 4 * 128 + 8, 4 * 128, 128), 3),  # pages 16 bytes off
        ((16 * 128, 128, 77 * 8), 1),  # one head: its stride means nothing
    ],
)
@pytest.mark.parametrize("page_size", [8, 16, 24, 64, 80])
def test_a_paged_maps_units_reach_every_box(encoded, strides, heads, page_size):
    pages, rows = 40, box_rows(page_size, USUAL.tile_kv)
    _, numbers = map_values(
        USUAL, "bfloat16", 1 << 20, 100, (heads * 128, 128, 1), 1, heads, 2 << 20, 3 << 20, strides, strides, pages,
        page_size,
    )  # fmt: skip
    page_units, head_units, rows8_units = numbers[5:8]
    assert numbers[:5] == (heads, heads, pages, rows, 64) and numbers[8:] == numbers[5:8]
    (name, address, extents, steps, box), values = encoded[1], encoded[2]
    assert (name, address, values[1]) == ("bfloat16", 2 << 20, 3 << 20) and box == (64, 8, 2, rows // 8, 1)
    assert all(step % 16 == 0 for step in steps) and extents[:4] == (64, 8, 2, page_size // 8)
    for page, head, token in itertools.product((0, 1, pages - 1), range(heads), range(0, page_size - rows + 1, rows)):
        unit = page * page_units + head * head_units + token // 8 * rows8_units
        assert unit < extents[4] and unit * steps[3] == 2 * (page * strides[0] + head * strides[2] + token * strides[1])


@pytest.mark.parametrize(("group", "rows"), [(1, 64), (4, 64), (64, 64), (3, 192), (96, 192), (5, 64)])
def test_queries_come_64_rows_at_a_time_if_the_group_divides_them(encoded, group, rows):
    strides = 0, 128, 128
    _, numbers = map_values(
        USUAL, "bfloat16", 1 << 20, 9, (group * 128, 128, 1), group, 1, 1, 1, strides, strides, 9, 0
    )
    fit = 1 if group == 5 else group  # which does not divide the tile: gathered
    assert numbers[4] == rows and encoded[0][4] == (64, fit, rows // fit, 1, 1)


def test_pages_without_a_usable_common_stride_are_refused(encoded):
    strides = ((1 << 34) + 8, 128, 16 * 128)
    with pytest.raises(UnsupportedError, match="common stride of 16 bytes"):
        map_values(USUAL, "bfloat16", 1 << 20, 1, (128, 128, 1), 1, 2, 1, 1, strides, strides, 1 << 10, 16)


@pytest.mark.parametrize("dims", TILES)
def test_boxes_are_whole_swizzles_that_fill_pages_and_tiles(dims):
    """Otherwise a tile's barrier waits for bytes that no copy brings."""
    device = TYPICAL["90a"]
    for size in range(1, 330):
        p = problem(page_size=size)._replace(head_dim_qk=dims[0], head_dim_vo=dims[1])
        tiles = geometry(p, 1 << 14, device).hopper
        assert (tiles is None) == (size % 8 != 0), size
        if tiles is not None:
            rows = box_rows(size, tiles.tile_kv)
            assert rows % 8 == size % rows == tiles.tile_kv % rows == 0


def test_a_box_is_the_common_part_of_page_and_tile():
    assert [box_rows(p, 80) for p in (8, 16, 24, 40, 64, 80, 256)] == [8, 16, 8, 40, 16, 80, 16]


def problem(**other):
    given = {"paged": True, "page_size": 16, "kv_dtype": None, "rope": False, "custom_mask": False, **other}
    return Problem(32, 8, 128, 128, bfloat16, alibi=False, soft_cap=False, **given)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"custom_mask": True}, "custom masks"),
        ({"rope": True}, "ROPE_LLAMA"),
        ({"kv_dtype": float8_e4m3fn}, "keys and values of float8_e4m3fn differ from q, bfloat16"),
        ({"out_dtype": float8_e4m3fn}, "outputs of float8_e4m3fn differ"),
        ({"page_size": 12}, "page_size 12 is not a multiple of 8"),
        ({"page_size": 300}, "page_size 300 is not a multiple of 8"),  # though 20 rows divide it and a tile of 80
    ],
)
def test_what_goes_to_the_portable_kernel(other, reason):
    device = TYPICAL["90a"]
    assert geometry(problem(), 128, device).hopper is USUAL
    auto = geometry(problem(**other), 128, device)
    assert auto.hopper is None and reason in auto.choice
    with pytest.raises(UnsupportedError, match=reason):
        geometry(problem(backend="fa3", **other), 128, device)


def test_one_cta_a_multiprocessor_takes_all_the_work():
    g = geometry(problem(), 128, TYPICAL["90a"])
    assert g.grid(1000) == (g.slots, 1, 1) and g.grid(10) == (80, 1, 1) and g.grid(0) == (0, 1, 1)
    assert g.num_counters(0) == 1 and g.num_counters(5) == 1 + 5 * 8 * 3
    wide = geometry(problem()._replace(head_dim_qk=256, head_dim_vo=256), 128, TYPICAL["90a"])
    assert wide.grid(1000) == (8000, 1, 1)


def test_short_tiles_have_the_keys_and_so_the_bits_of_fine_or_tall_ones():
    for dims, tiles in SHORT_TILES.items():
        tall = FINE_TILES.get(dims, TILES[dims])
        assert tiles.tile_kv == tall.tile_kv and tiles.tile_q == 128 < tall.tile_q == TILES[dims].tile_q


@pytest.mark.parametrize(
    ("shape", "causal", "fine"),
    [
        ((32, 512, 512, 32, 32), True, True),
        ((16, 1024, 1024, 32, 32), True, True),
        ((8, 2048, 2048, 32, 32), True, True),
        ((4, 4096, 4096, 32, 32), True, False),
        ((16, 1024, 1024, 32, 32), False, False),
        ((16, 1024, 1024, 32, 8), True, False),
    ],
)
def test_short_prompts_have_fine_tiles(shape, causal, fine):
    requests, tokens, keys, heads, kv_heads = shape
    load = load_of(requests, heads // kv_heads, requests * tokens, requests * keys, causal, -1)
    p = Problem(heads, kv_heads, 128, 128, bfloat16, False, False, False, False)
    tiles = geometry(p, load.rows, TYPICAL["90a"], load).hopper
    assert tiles is (FINE_TILES if fine else TILES)[128, 128]


@pytest.mark.parametrize(
    ("heads", "head_bytes", "together"),
    [
        (32, 512 << 10, 32),  # 1x1024: all of K and V in half the L2
        (32, 1 << 20, 16),
        (32, 8 << 20, 8),  # 1x16384
        (3, 8 << 20, 3),
        (12, 8 << 20, 6),
        (7, 1 << 30, 7),
        (11, 1 << 30, 1),
    ],
)
def test_heads_that_run_together_divide_all(heads, head_bytes, together):
    assert heads_together(heads, head_bytes) == together and heads % together == 0


def test_keys_that_run_together_fit_the_l2():
    """Requests side by side with 8 heads of 512 bytes a token; none where the L2 holds the batch."""
    assert block_keys(USUAL, 32, 16, 16384, 132) == (16 << 20) // (8 * 512) == 4096
    assert block_keys(USUAL, 32, 64, 16384, 132) == 8 * 256  # 64 requests times heads, half as many as CTAs
    assert block_keys(USUAL, 32, 16, 1024, 132) is None and block_keys(USUAL, 1, 200, 32768, 132) is None
    assert block_keys(TILES[64, 64], 3, 100, 1 << 20, 132) == (16 << 20) // (3 * 256)
    assert block_keys(TILES[256, 256], 8, 100, 1 << 20, 132) * 8 * 1024 <= 16 << 20


def test_few_long_requests_go_longest_first_of_all():
    """Up to half as many requests times heads together as CTAs: several tiles of each run at a time."""
    assert block_keys(USUAL, 32, 8, 16384, 132) is None and block_keys(USUAL, 32, 4, 16384, 132) is None
    assert block_keys(USUAL, 32, 9, 16384, 132) == 4096 and block_keys(USUAL, 32, 8, 16384, 100) == 4096


@pytest.mark.parametrize(
    ("shape", "height"),
    [  # (requests, tokens, keys, query and kv heads, head dim): rows a tile, 0 for the portable kernel
        ((1, 1024, 1024, 32, 32, 128), 128),
        ((1, 512, 512, 32, 32, 128), 128),
        ((8, 128, 128, 32, 32, 128), 128),
        ((1, 2048, 2048, 32, 32, 128), 192),
        ((4, 4096, 4096, 32, 32, 128), 192),
        ((16, 1024, 1024, 32, 8, 128), 192),
        ((1, 16384, 16384, 32, 32, 128), 192),
        ((1, 64, 4096, 32, 8, 128), 128),  # split keys: 256 rows are two short tiles
        ((1, 96, 65536, 32, 8, 128), 192),  # and 384 two tall ones
        ((1, 1024, 1024, 32, 8, 64), 128),
        ((1, 2048, 2048, 9, 3, 64), 192),  # 3 heads a group do not divide 128
        ((16, 64, 64, 32, 8, 128), 128),
        ((12, 128, 128, 32, 8, 128), 128),  # whole rounds of items: 3 of 192 rows, 3 of 128
        ((16, 128, 128, 9, 3, 64), 192),
        ((1, 16, 65536, 32, 8, 128), 0),
        ((1, 1024, 1024, 16, 16, 256), 128),
        ((1, 0, 0, 32, 8, 128), 0),
    ],
)
def test_who_gets_which_tiles(shape, height):
    requests, tokens, keys, heads, kv_heads, dim = shape
    p = Problem(heads, kv_heads, dim, dim, bfloat16, False, False, False, False)
    load = load_of(requests, heads // kv_heads, requests * tokens, requests * keys, True, -1)
    assert load == Load(requests, tokens * heads // kv_heads, tokens, keys, True)
    device = TYPICAL["90a"]
    g = geometry(p, load.rows, device, load)
    assert (g.tiles.tile_q if g.hopper else 0) == height
    assert g is geometry(p, load.rows, device, load)
    # Without a load (a fixed or disabled split) the batch does not count, nor does it on another device's kernel.
    assert geometry(p, load.rows, device).hopper is TILES[dim, dim]
    assert geometry(p, load.rows, TYPICAL["80"], load) is geometry(p, load.rows, TYPICAL["80"])
    if height == 0:
        assert too_little(load) in g.choice
        assert geometry(p._replace(backend="fa3"), load.rows, device, load).hopper is not None


def test_options_keep_the_tall_tiles():
    load, device = load_of(1, 1, 1024, 1024, True, -1), TYPICAL["90a"]
    p = Problem(32, 32, 128, 128, bfloat16, False, False, False, False)
    for options in ({"alibi": True}, {"soft_cap": True}):
        assert geometry(p._replace(**options), 1024, device, load).hopper is TILES[128, 128]


def test_a_window_shortens_the_keys_and_makes_items_alike():
    assert load_of(2, 4, 2000, 8000, True, 100) == Load(2, 4000, 1000, 133, False)
    assert load_of(1, 4, 1000, 1000, True, 700) == Load(1, 4000, 1000, 1000, True)
    assert load_of(0, 4, 0, 0, True, 5) == Load(0, 0, 0, 0, True)
