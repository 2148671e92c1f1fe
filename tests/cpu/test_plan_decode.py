"""The decode schedule: every key once, longest first, within bounds, and independent of the batch where promised."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy.decode_kernel import Problem, geometry
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16, float8_e4m3fn
from fi_cupy.errors import ArgumentError, WorkspaceError
from fi_cupy.plan.decode import (
    MIN_CHUNK_TILES,
    TILE,
    choose_chunk,
    choose_tiles,
    head_blocks,
    kv_lengths,
    max_items,
    page_lengths,
    plan_decode,
    single_chunks,
    smem_bytes,
)
from fi_cupy.plan.workspace import WorkspaceLayout

lengths = st.lists(
    st.one_of(st.integers(0, 40), st.integers(0, 3000), st.sampled_from([0, 1, 15, 16, 17, 4096])),
    min_size=1,
    max_size=40,
)


def plan(lens, **options):
    kv_len = np.array(lens, np.int64)
    options = {"num_head_blocks": 8, "slots": 264, **options}
    return plan_decode(kv_len, np.cumsum(kv_len) - kv_len, **options)


def check_cover(lens, schedule, window_left=-1):
    real = schedule.items[schedule.items[:, 0] >= 0]
    sizes = real[:, 2] - real[:, 1]
    assert (np.diff(sizes) <= 0).all(), "not longest first"
    used = np.zeros(schedule.num_slots, int)
    starts = np.cumsum(lens) - lens
    for b, n in enumerate(lens):
        mine = real[real[:, 0] == b]
        mine = mine[np.argsort(mine[:, 6])]
        assert (mine[:, 6] == np.arange(len(mine))).all() and (mine[:, 5] == len(mine)).all()
        assert (mine[:, 7] == n).all() and (mine[:, 3] == starts[b]).all()
        begin = max(n - 1 - window_left, 0) if window_left >= 0 else 0
        assert mine[0, 1] == begin and mine[-1, 2] == n
        assert (mine[1:, 1] == mine[:-1, 2]).all()
        assert (mine[:, 2] > mine[:, 1]).all() or n == 0
        assert len(set(mine[:, 4])) == 1
        if len(mine) > 1:
            used[mine[0, 4] : mine[0, 4] + len(mine)] += 1
    assert (used == 1).all(), "partial slots overlap or lie idle"


@settings(max_examples=150, deadline=None)
@given(lengths, st.sampled_from([1, 3, 8, 32]), st.sampled_from([4, 80, 132, 264]), st.sampled_from([-1, 0, 5, 1000]))
def test_every_key_once(lens, heads, slots, window):
    schedule = plan(lens, num_head_blocks=heads, slots=slots, window_left=window)
    check_cover(lens, schedule, window)
    assert schedule.num_items <= max_items(len(lens), heads, slots)


@settings(max_examples=60, deadline=None)
@given(lengths, st.sampled_from([16, 48, 7, 160]), st.sampled_from([-1, 30]))
def test_fixed_split_does_not_depend_on_the_batch(lens, split, window):
    together = plan(lens, split_keys=split, window_left=window)
    check_cover(lens, together, window)
    for b, n in enumerate(lens):
        alone = plan([n], split_keys=split, window_left=window).items
        mine = together.items[together.items[:, 0] == b]
        assert sorted(map(tuple, mine[:, [1, 2, 5, 6]])) == sorted(map(tuple, alone[:, [1, 2, 5, 6]]))


@given(lengths)
@settings(max_examples=40, deadline=None)
def test_disable_split_and_padding(lens):
    schedule = plan(lens, disable_split=True, pad_to=len(lens) + 5)
    assert schedule.num_items == len(lens) + 5 and schedule.num_slots == 0
    assert (schedule.items[-5:, 0] == -1).all() and (schedule.items[:-5, 0] >= 0).all()
    check_cover(lens, schedule)


def test_empty_batch():
    schedule = plan([])
    assert schedule.num_items == 0 and schedule.num_slots == 0


@pytest.mark.parametrize(
    ("batch", "length", "heads", "slots", "items"),
    [
        (64, 8192, 8, 264, 64),  # two waves: unsplit
        (256, 1024, 8, 264, 256),
        (1, 4096, 8, 132, 16),  # 128 CTAs in one wave
        (1, 65536, 8, 132, 16),
        (1, 1024, 8, 132, 8),  # chunks of at least 8 tiles
        (16, 4096, 8, 132, 16),  # 128 of 132 slots
        (4, 4096, 8, 132, 16),
        (1, 100, 8, 132, 1),
    ],
)
def test_chunk_rule(batch, length, heads, slots, items):
    assert plan([length] * batch, num_head_blocks=heads, slots=slots).num_items == items


def test_ragged_chunk_is_the_mean_load():
    tiles = np.array([100, 4000, 50, 2000])
    assert choose_chunk(tiles, 8, 264) == -(-6150 * 8 // int(1.5 * 264))
    assert choose_chunk(np.array([3]), 8, 264) == 3
    assert choose_chunk(np.array([30, 1]), 8, 10**6) == MIN_CHUNK_TILES


@given(st.integers(0, 10**6), st.integers(1, 64), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_single_request(span, heads, slots):
    keys, chunks = single_chunks(span, heads, slots)
    assert keys % TILE == 0 and keys * chunks >= span and (chunks == 1 or keys * (chunks - 1) < span)


@pytest.mark.parametrize("group", range(1, 65))
@pytest.mark.parametrize("dim", [64, 256])
def test_any_group_size(group, dim):
    blocks, heads, columns = head_blocks(group, dim)
    assert blocks * heads >= group > (blocks - 1) * heads and heads <= 8 * columns <= 16


GPUS = {75: (65536, 65536), 80: (166912, 167936), 86: (101376, 102400), 89: (101376, 102400), 90: (232448, 233472)}


@pytest.mark.parametrize("arch", GPUS)
@pytest.mark.parametrize("dim", [8, 64, 72, 128, 192, 256])
@pytest.mark.parametrize("itemsize", [1, 2])
@pytest.mark.parametrize("group", [1, 8, 9, 16, 40])
def test_cta_shape_fits_the_device(arch, dim, itemsize, group):
    block, sm = GPUS[arch]
    columns = head_blocks(group, dim)[2]
    for groups in (1, 10**4):
        tiles = choose_tiles(
            groups, dim, itemsize, columns, arch=arch, num_sms=100, smem_per_block=block, smem_per_sm=sm
        )
        assert tiles.smem_bytes == smem_bytes(tiles.warps, tiles.stages, dim, itemsize, columns) <= block
        assert tiles.ctas_per_sm * (tiles.smem_bytes + 1024) <= sm or tiles.ctas_per_sm == 1
        assert tiles.ctas_per_sm * tiles.warps * 32 * 128 <= 65536 * 2  # at least 128 registers a thread


def test_same_shape_for_every_batch_when_invariant():
    def shape(groups):
        return choose_tiles(
            groups, 128, 2, 1, arch=90, num_sms=132, smem_per_block=232448, smem_per_sm=233472, batch_invariant=True
        )

    assert shape(1) == shape(10**4)
    # 8 KB tiles: three slots a warp, 8 warps a multiprocessor, about 200 KB in flight.
    assert shape(1)[:3] == (4, 3, 2)


HOPPER = {"arch": 90, "num_sms": 132, "smem_per_block": 232448, "smem_per_sm": 233472}


@pytest.mark.parametrize("group", [1, 8, 9, 16])
@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
def test_fp8_takes_pairs_of_heads_in_batches_that_fill_the_device(dim, rope, group):
    columns = head_blocks(group, dim)[2]
    for arch, sms, block, sm in ((80, 108, 166912, 167936), (86, 84, 101376, 102400), (90, 132, 232448, 233472)):
        options = {"arch": arch, "num_sms": sms, "smem_per_block": block, "smem_per_sm": sm, "rope": rope}
        tiles = choose_tiles(sms + 1, dim, 1, columns, may_pair=True, **options)
        assert tiles.head_pair and tiles.warps % 2 == 0
        assert tiles.smem_bytes == smem_bytes(tiles.warps, tiles.stages, dim, 1, columns, rope) <= block
        assert tiles.ctas_per_sm * (tiles.smem_bytes + 1024) <= sm
        assert tiles.ctas_per_sm * tiles.warps <= (
            16 if columns == 1 and not rope else 8
        )  # 128 registers a thread, or 255
        few = sms // 4 if arch == 90 and dim <= 64 and columns == 1 and not rope else sms
        alone = choose_tiles(few, dim, 1, columns, may_pair=True, **options)
        assert alone == choose_tiles(few, dim, 1, columns, **options) and not alone.head_pair
        one, many = (
            choose_tiles(n, dim, 1, columns, may_pair=True, batch_invariant=True, **options) for n in (1, 10**4)
        )
        assert one == many and one.head_pair, "the batch decides"


def test_narrow_heads_take_more_warps_unless_there_are_few_ctas():
    def shape(groups, itemsize, **options):
        return choose_tiles(groups, 64, itemsize, 1, **options, **HOPPER)[:3]

    many = {1: (8, 2, 2), 2: (8, 1, 2)}
    for itemsize, shapes in many.items():
        assert shape(10**4, itemsize) == shape(192, itemsize) == shapes
        assert shape(48, itemsize) == shapes, "two chunks of 48 leave a quarter of the device idle"
        assert shape(3, itemsize)[2] == 1
        assert shape(3, itemsize, batch_invariant=True) == shape(10**4, itemsize, batch_invariant=True) == shapes
    assert shape(64, 2)[2] == 1 and shape(64, 1) == (8, 2, 2)
    assert shape(12, 2) == (8, 1, 1) and shape(24, 2)[1] > 1
    wide = choose_tiles(48, 128, 1, 1, may_pair=True, **HOPPER)
    assert wide[:3] == (8, 2, 2) and not wide.head_pair
    assert choose_tiles(48, 128, 2, 1, **HOPPER)[2] == 1


def test_who_never_takes_pairs():
    assert choose_tiles(10**4, 128, 1, 1, may_pair=True, **HOPPER)[:3] == (4, 2, 2)
    assert not choose_tiles(10**4, 128, 2, 1, may_pair=True, **HOPPER).head_pair  # rows of 256 bytes
    assert not choose_tiles(10**4, 256, 1, 1, may_pair=True, **HOPPER).head_pair
    assert not choose_tiles(10**4, 128, 1, 1, **HOPPER).head_pair
    turing = {"arch": 75, "num_sms": 40, "smem_per_block": 65536, "smem_per_sm": 65536}
    assert not choose_tiles(10**4, 128, 1, 1, may_pair=True, **turing).head_pair


@pytest.mark.parametrize(
    ("change", "pair"),
    [
        ({}, True), ({"heads_adjacent": False}, False), ({"num_kv_heads": 7, "num_qo_heads": 28}, False),
        ({"num_qo_heads": 8 * 16}, True), ({"num_qo_heads": 8 * 17}, False), ({"kv": bfloat16}, False),
        ({"batch_size": 16}, False), ({"batch_size": 1, "batch_invariant": True}, True),
    ],
)  # fmt: skip
def test_pairs_in_the_geometry(change, pair):
    options = (True, False, False, False, False, True)
    problem = Problem(64, 32, 8, 128, bfloat16, float8_e4m3fn, bfloat16, *options)._replace(**change)
    g = geometry(problem, DeviceInfo(90, "90a", 132, 232448, 233472, 50 << 20))
    assert g.spec.symbol.endswith("_pair") == g.heads_spec.symbol.endswith("_pair") == pair
    assert g.num_head_blocks * g.heads_per_block >= problem.num_qo_heads
    assert g.group_size == problem.num_qo_heads // problem.num_kv_heads
    if pair:
        assert (g.num_head_blocks, g.blocks_per_kv, g.heads_per_block) == (4, 1, 2 * g.group_size)
    assert g.slots == 132 * g.spec.min_blocks


def test_trap_5_lengths_from_pages():
    indptr, last = np.array([0, 2, 2, 3]), np.array([5, 99, 16])  # the length of no last page is not looked at
    assert kv_lengths(indptr, last, 16).tolist() == page_lengths("op", indptr, last, 16, 3).tolist() == [21, 0, 16]


@pytest.mark.parametrize(
    ("indptr", "last", "words"),
    [
        ([0, 3, 2], [1, 1], "not decrease"),
        ([-1, 2], [1], "not decrease"),
        ([0, 9], [1], "indices has 4"),
        ([0, 2], [17], r"last_page_len\[0\] is 17, expected 1..16"),
        ([0, 2], [0], r"last_page_len\[0\] is 0"),
    ],
)
def test_bad_page_table(indptr, last, words):
    with pytest.raises(ArgumentError, match=words):
        page_lengths("op", np.array(indptr), np.array(last), 16, 4)


def test_workspace_layout():
    layout = WorkspaceLayout()
    assert (layout.add("a", 1000), layout.add("b", 0), layout.add("c", 8), layout.size) == (0, 1024, 1024, 1280)
    layout.check("op", 1280)
    with pytest.raises(WorkspaceError, match="has 1279 bytes, expected at least 1280"):
        layout.check("op", 1279)


def test_ten_thousand_requests():
    lens = np.random.default_rng(3).integers(0, 7, 10_000)
    schedule = plan(lens, num_head_blocks=1)
    items = schedule.items[np.argsort(schedule.items[:, 0])]
    starts = np.cumsum(lens) - lens
    for column, values in enumerate((np.arange(10_000), 0, lens, starts, 0, 1, 0, lens)):
        assert (items[:, column] == values).all(), column
