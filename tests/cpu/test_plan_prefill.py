"""The prefill schedule: every visible (row, key) pair once, trimmed, longest first, and shared memory that fits."""

from __future__ import annotations

import heapq
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy.plan.prefill import ITEM_WORDS, choose_tiles, max_items, pad, plan_prefill, smem_bytes
from fi_cupy.prefill_kernel import _GPUS, Problem, fast_div, geometry, prefill_spec
from fi_cupy.reference.masks import positional_mask


def seen_by(items, num_slots, num_split, group, tile_q, batch, tile_kv, align_end=False):
    """(request, row, key) counts of the work list as the kernel walks it, and checks of its fields."""
    counts, slots, split = {}, [], {}
    for q_row, qo_len, base, kv_len, q_tile, begin, end, first, _, _, _, chunk, chunks, shift, *rest in items.tolist():
        assert rest == [0, 0]
        if qo_len == 0:
            continue
        b = batch.index((q_row, base))
        grid = counts.setdefault(b, np.zeros((qo_len * group, kv_len), int))
        assert begin % tile_kv == 0 or begin >= end
        assert 0 <= begin and end <= kv_len
        tiles = -(-qo_len * group // tile_q)
        assert shift == (tiles * tile_q - qo_len * group if align_end and tiles > 1 else 0) < tile_q
        row = q_tile * tile_q - shift
        grid[max(row, 0) : row + tile_q, begin:end] += 1
        if chunks == 1:
            assert (first, chunk) == (0, 0)
        else:
            slots.append(first + chunk)
            split.setdefault((b, q_tile), []).append((chunk, first, chunks, begin, end))
    assert sorted(slots) == list(range(num_slots)) and len(split) == num_split
    for parts in split.values():  # the chunks are numbered in the order of their keys
        parts.sort()
        assert [part[0] for part in parts] == list(range(parts[0][2])) and len({part[1:3] for part in parts}) == 1
        assert all(a[4] == b[3] for a, b in pairwise(parts))
    return counts


@settings(max_examples=200, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 900)), min_size=1, max_size=6),
    group=st.integers(1, 9),
    kv_heads=st.integers(1, 4),
    tile_q=st.sampled_from([16, 64, 128]),
    tile_kv=st.sampled_from([16, 32, 64]),
    slots=st.integers(1, 500),
    causal=st.booleans(),
    window=st.integers(-1, 400),
    split=st.one_of(st.none(), st.integers(1, 500)),
    disable=st.booleans(),
    align_end=st.booleans(),
    tail=st.integers(0, 100),
)
def test_every_visible_pair_is_computed_once(
    lens, group, kv_heads, tile_q, tile_kv, slots, causal, window, split, disable, align_end, tail
):
    qo = np.concatenate([[0], np.cumsum([q for q, _ in lens])])
    kv = np.concatenate([[0], np.cumsum([k for _, k in lens])])
    # An offset of its own for every request, so that empty ones can be told apart.
    kv_len, base = np.diff(kv), kv[:-1] + 1000 * np.arange(len(lens))
    plan = plan_prefill(
        qo, kv_len, base, group=group, num_kv_heads=kv_heads, tile_q=tile_q, tile_kv=tile_kv, slots=slots,
        causal=causal, window_left=window, split_keys=split, disable_split=disable, align_end=align_end,
        split_tail=tail,
    )  # fmt: skip
    batch = list(zip(qo[:-1].tolist(), base.tolist(), strict=True))
    counts = seen_by(plan.items, plan.num_slots, plan.num_split, group, tile_q, batch, tile_kv, align_end)
    assert set(counts) == {b for b, (q, _) in enumerate(lens) if q > 0}
    for b, grid in counts.items():
        q, k = lens[b]
        assert grid.max(initial=0) <= 1
        visible = positional_mask(
            np.repeat(np.arange(q), group)[:, None], np.arange(k)[None], q, k, causal=causal, window_left=window
        )
        assert grid[np.ones_like(grid, bool) if visible is None else visible].all()
    lengths = -(-(plan.items[:, 6] - plan.items[:, 5]) // tile_kv)
    assert (np.diff(lengths) <= 0).all()
    if disable:
        assert plan.num_slots == 0
    elif split is None:
        most = max(tail, -(-slots // kv_heads))
        assert len(plan.items) <= max_items(int(qo[-1]), len(lens), group, tile_q, most)


def test_a_split_tiles_chunks_are_numbered_in_key_order():
    plan = plan_prefill(
        np.array([0, 4, 8]), np.array([9000, 5000]), np.array([0, 9000]), group=4, num_kv_heads=2, tile_q=16,
        tile_kv=64, slots=64, causal=True,
    )  # fmt: skip
    assert plan.num_split == 2 and plan.num_slots == len(plan.items)
    next_slot = 0
    for q_row in (0, 4):
        parts = plan.items[plan.items[:, 0] == q_row]
        parts = parts[np.argsort(parts[:, 5])]
        chunks = len(parts)
        assert chunks > 1 and (parts[:, 12] == chunks).all() and (parts[:, 7] == next_slot).all()
        assert parts[:, 11].tolist() == list(range(chunks))
        assert (parts[1:, 5] == parts[:-1, 6]).all()
        next_slot += chunks


def test_fixed_split_does_not_depend_on_the_batch():
    def chunks(kv):
        qo = np.arange(len(kv) + 1) * 2
        plan = plan_prefill(
            qo, np.array(kv), np.zeros(len(kv), int), group=4, num_kv_heads=1, tile_q=16, tile_kv=64, slots=264,
            causal=True, split_keys=256,
        )  # fmt: skip
        return sorted(map(tuple, plan.items[plan.items[:, 0] == 0][:, 5:7].tolist()))

    assert chunks([1000]) == chunks([1000, 70000, 3]) == [(0, 256), (256, 512), (512, 768), (768, 1000)]


def test_a_full_device_is_not_split_and_an_empty_one_is():
    def split(batch, kv_heads):
        plan = plan_prefill(
            np.arange(batch + 1) * 512, np.full(batch, 4096), np.arange(batch), group=4, num_kv_heads=kv_heads,
            tile_q=128, tile_kv=64, slots=264, causal=True,
        )  # fmt: skip
        return plan.num_slots

    assert split(16, 8) == 0
    assert split(1, 1) > 0


def _finish(items, kv_heads, slots, tile_kv):
    """When the last of `slots` multiprocessors ends, which take items in their order, over the even share."""
    free = [0] * slots
    lengths = (-(-(items[:, 6] - items[:, 5]) // tile_kv)).tolist()
    for length in lengths:
        for _ in range(kv_heads):
            heapq.heapreplace(free, free[0] + length)
    return max(free) / (sum(lengths) * kv_heads / slots)


@pytest.mark.parametrize(
    "batch", [(1, 4096, 16384), (8, 512, 8192), (1, 2048, 8192), (2, 1024, 16384), (1, 1024, 32768)]
)
def test_the_last_round_of_items_is_split(batch):
    """Chunks of long prompts of 32/8 heads: within 5 % of the even share, where whole items leave 11 to 33 % idle."""
    requests, rows, keys = batch
    finish = []
    for tail in (0, 34):
        plan = plan_prefill(
            np.arange(requests + 1) * rows, np.full(requests, keys), np.arange(requests) * keys, group=4,
            num_kv_heads=8, tile_q=192, tile_kv=80, slots=132, causal=True, align_end=True, split_tail=tail,
        )  # fmt: skip
        finish.append(_finish(plan.items, 8, 132, 80))
    assert finish[0] > 1.1 and finish[1] < 1.05
    assert plan.num_split > 0 and plan.items[-1, 12] > 1


@pytest.mark.parametrize("batch", [(1, 16384, 16384), (4, 4096, 4096), (16, 1024, 1024), (1, 0, 100), (1, 100, 0)])
def test_prompts_that_end_with_short_items_are_not(batch):
    requests, rows, keys = batch
    options = dict(
        group=4, num_kv_heads=8, tile_q=192, tile_kv=80, slots=132, causal=True, align_end=True,
    )  # fmt: skip
    args = np.arange(requests + 1) * rows, np.full(requests, keys), np.arange(requests) * keys
    whole, tail = plan_prefill(*args, **options), plan_prefill(*args, **options, split_tail=34)
    assert tail.num_split == whole.num_split == 0 and (tail.items == whole.items).all()


def test_pad_adds_rows_that_do_nothing():
    padded = pad(np.ones((2, 16), np.int32), 5)
    assert padded.shape == (5, 16) and padded[:2].all() and not padded[2:].any()


def test_mask_offsets_beyond_32_bits():
    plan = plan_prefill(
        np.array([0, 1, 2]), np.array([5, 5]), np.array([0, 5]), group=1, num_kv_heads=1, tile_q=16, tile_kv=64,
        slots=8, mask_offsets=np.array([7, (3 << 32) + 5]),
    )  # fmt: skip
    rows = {r[0]: r[8:10] for r in plan.items.tolist()}
    assert rows == {0: [7, 0], 1: [5, 3]}


@pytest.mark.parametrize("arch", [75, 80, 86, 90])
@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (128, 256)])
def test_tiles_fit_the_device_and_keys_do_not_depend_on_rows(arch, dims):
    tiles = [choose_tiles(rows, *dims, *_GPUS[arch]) for rows in (1, 16, 17, 64, 65, 1000)]
    assert len({t.tile_kv for t in tiles}) == 1
    for t in tiles:
        assert t.smem_bytes <= _GPUS[arch][0]
        assert t.smem_bytes == smem_bytes(t.warps, t.row_tiles, t.tile_kv, *dims)
        assert t.ctas_per_sm >= 1


def test_hopper_and_ampere_run_two_ctas_of_128_rows_at_head_dim_128():
    assert choose_tiles(128, 128, 128, *_GPUS[90])[:4] == (4, 2, 64, 2)
    assert choose_tiles(128, 128, 128, *_GPUS[80])[:4] == (4, 2, 32, 2)


@pytest.mark.parametrize("divisor", [1, 2, 3, 5, 7, 16, 17, 100, 4095, 65537, (1 << 30) + 1, (1 << 31) - 1])
def test_fast_division(divisor):
    d, magic, shift = fast_div(divisor)
    assert d == divisor and magic < 1 << 32
    edges = [0, 1, divisor - 1, divisor, divisor + 1, 2 * divisor - 1, 2 * divisor, (1 << 31) - 1]
    for n in edges + np.random.default_rng(0).integers(0, 1 << 31, 2000).tolist():
        if n < 1 << 31:
            assert (((n * magic) >> 32) + n) >> shift == n // divisor
            assert ((n * magic) >> 32) + n < 1 << 32


def test_kernel_structs_have_the_words_the_plan_writes():
    kernels = Path(__file__).parents[2] / "kernels" / "attention"
    body = re.search(
        r"struct alignas\(16\) PrefillItem {(.*?)\n};", (kernels / "prefill_params.cuh").read_text(), re.S
    )[1]
    fields = re.findall(r"(\w+)(?:\[(\d+)\])?\s*(?=[,;])", re.sub(r"//.*", "", body))
    assert sum(int(n or 1) for _, n in fields) == ITEM_WORDS
    assert [name for name, _ in fields][7:13] == [
        "first_slot", "mask_low", "mask_high", "request", "chunk", "num_chunks",
    ]  # fmt: skip


def test_specs_are_cached_and_named_by_what_they_are():
    from fi_cupy.device import DeviceInfo
    from fi_cupy.dtypes import bfloat16

    device = DeviceInfo(90, "90a", 132, *_GPUS[90], 50 << 20)
    problem = Problem(9, 3, 64, 64, bfloat16, True, False, False, False, backend="fa2")
    g = geometry(problem, 128, device)
    assert g is geometry(problem, 128, device)
    assert g.spec.symbol == "prefill_bf16_d64_q128k64_paged"
    assert g.spec == prefill_spec(bfloat16, 64, 64, g.tiles, paged=True, custom_mask=False, alibi=False, soft_cap=False,
                                  positive_scale=True)  # fmt: skip
    assert g.negative_spec.symbol.endswith("_neg")


def test_ten_thousand_requests():
    rng = np.random.default_rng(3)
    rows, keys = rng.integers(0, 4, 10_000), rng.integers(0, 7, 10_000)
    qo, base = np.concatenate([[0], np.cumsum(rows)]), np.cumsum(keys) - keys
    plan = plan_prefill(
        qo, keys, base, group=2, num_kv_heads=1, tile_q=16, tile_kv=64, slots=264, causal=True, mask_offsets=base
    )
    busy = np.flatnonzero(rows)  # a tile each, which holds all of its rows and keys
    items = plan.items[np.argsort(plan.items[:, 10])]
    assert (plan.num_slots, plan.num_split) == (0, 0)
    wanted = (qo[busy], rows[busy], base[busy], keys[busy], 0, 0, keys[busy], 0, base[busy], 0, busy, 0, 1)
    for column, values in enumerate(wanted):
        assert (items[:, column] == values).all(), column


def test_a_window_and_a_split_of_any_size():
    one = {"group": 1, "num_kv_heads": 1, "tile_q": 16, "tile_kv": 64, "slots": 8}
    plain = plan_prefill(np.array([0, 20]), np.array([300]), np.array([0]), causal=True, **one)
    for options in ({"window_left": 1 << 40}, {"split_keys": 1 << 40}):
        plan = plan_prefill(np.array([0, 20]), np.array([300]), np.array([0]), causal=True, **one, **options)
        assert (plan.items == plain.items).all() and plan.num_slots == 0


def test_a_schedule_of_equal_tiles_keeps_their_order():
    plan = plan_prefill(
        np.arange(9) * 16, np.full(8, 128), np.arange(8), group=1, num_kv_heads=8, tile_q=16, tile_kv=64, slots=8
    )
    assert plan.items[:, 10].tolist() == list(range(8))


@settings(max_examples=100, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(0, 700), st.integers(0, 900)), min_size=1, max_size=9),
    block=st.integers(1, 3000),
    causal=st.booleans(),
    slots=st.sampled_from([1, 500]),
)
def test_blocks_of_requests_are_side_by_side(lens, block, causal, slots):
    """The same items as without blocks; longest first inside one; requests with the most keys in the first."""
    qo, kv_len = np.concatenate([[0], np.cumsum([q for q, _ in lens])]), np.array([k for _, k in lens])
    given = {
        "group": 2, "num_kv_heads": 2, "tile_q": 192, "tile_kv": 80, "slots": slots, "causal": causal,
    }  # fmt: skip
    free, made = (plan_prefill(qo, kv_len, kv_len * 0, **given, block_keys=b) for b in (None, block))
    assert sorted(free.items.tolist()) == sorted(made.items.tolist())
    assert (free.num_slots, free.num_split) == (made.num_slots, made.num_split)
    order = sorted(range(len(lens)), key=lambda b: -kv_len[b])
    blocks, keys = [], block
    for b in order:
        if not blocks or keys + kv_len[b] > block:
            blocks.append([])
            keys = 0
        blocks[-1].append(b)
        keys += kv_len[b]
    number = {b: i for i, members in enumerate(blocks) for b in members}
    tiles = -(-(made.items[:, 6] - made.items[:, 5]) // 80)
    places = [(number[b], -n) for b, n in zip(made.items[:, 10].tolist(), tiles.tolist(), strict=True)]
    assert places == sorted(places)


def test_a_full_last_tile_leaves_fewer_keys_to_the_others():
    given = {"group": 1, "num_kv_heads": 1, "tile_q": 192, "tile_kv": 80, "slots": 1, "causal": True}
    tiles = []
    for align_end in (False, True):
        items = plan_prefill(np.array([0, 1024]), np.array([1024]), np.array([0]), **given, align_end=align_end).items
        tiles.append(sorted((-(-(items[:, 6] - items[:, 5]) // 80)).tolist()))
    assert tiles == [[3, 5, 8, 10, 12, 13], [1, 4, 6, 8, 11, 13]]
