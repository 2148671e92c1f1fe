"""The schedule of latent attention: every key of every row once, few enough items, and well-chosen chunks."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fi_cupy.jit.sources import header_closure
from fi_cupy.mla_kernel import HOPPER_COSTS, PORTABLE_COSTS
from fi_cupy.plan.mla import EXTRA_ITEMS, WAITS, Costs, best_chunks, plan_mla

COSTS = Costs(1.5, 1.5, 0.025, 0.037)


def covered(plan, qo, kv, tile_q, tile_kv, heads, causal):
    """Count the visits of each (request, packed row, key): all that a row may see exactly once."""
    for b, (rows, keys) in enumerate(zip(np.diff(qo), kv, strict=True)):
        seen = np.zeros((rows * heads, keys), int)
        for item in plan.items[(plan.items[:, 10] == b) & (plan.items[:, 1] > 0)]:
            first = item[4] * tile_q
            assert item[5] % tile_kv == 0 and item[0] == qo[b] and item[3] == keys
            seen[first : first + tile_q, item[5] : item[6]] += 1
        assert seen.max(initial=0) <= 1
        own = np.arange(rows * heads)[:, None] // heads + keys - rows
        visible = (np.arange(keys)[None] <= own) if causal else np.ones_like(seen, bool)
        assert (seen[visible] == 1).all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_every_key_once(seed, causal):
    rng = np.random.default_rng(seed)
    batch, heads = int(rng.integers(1, 9)), int(rng.choice([1, 5, 16, 128]))
    qo = np.concatenate([[0], np.cumsum(rng.integers(0, 4, batch))])
    kv = rng.integers(0, 3000, batch)
    tile_q, tile_kv = ((16, 32), (64, 64))[seed % 2]
    plan = plan_mla(
        qo,
        kv,
        np.zeros(batch, int),
        num_heads=heads,
        tile_q=tile_q,
        tile_kv=tile_kv,
        slots=13,
        costs=COSTS,
        causal=causal,
    )
    covered(plan, qo, kv, tile_q, tile_kv, heads, causal)
    tiles = (-(-np.diff(qo) * heads // tile_q)).sum()
    assert len(plan.items) <= tiles + EXTRA_ITEMS * 13
    lengths = plan.items[:, 6] - plan.items[:, 5]
    assert (-(-lengths[:-1] // tile_kv) >= -(-lengths[1:] // tile_kv)).all()  # longest first


def test_chunks_of_a_split_tile_have_slots_of_their_own():
    plan = plan_mla(np.arange(4), np.array([5000, 100, 3000]), np.zeros(3, int), num_heads=64, tile_q=64, tile_kv=64,
                    slots=40, costs=COSTS)  # fmt: skip
    split = plan.items[plan.items[:, 12] > 1]
    slots = split[:, 7] + split[:, 11]
    assert plan.num_split == 2 and sorted(slots) == list(range(plan.num_slots))
    for request in (0, 2):
        mine = split[split[:, 10] == request]
        assert len(mine) == mine[0, 12] and sorted(mine[:, 11]) == list(range(len(mine)))


@pytest.mark.parametrize(
    ("count", "tiles", "chunks"),
    [
        (128, 64, 1),  # 64x4096, 128 heads: one wave
        (32, 64, 4),  # 16x4096
        (132, 64, 1),
        (133, 1, 1),
        (1, 1, 1),
    ],
)
def test_chunks_of_even_batches(count, tiles, chunks):
    assert best_chunks(count, tiles, 132, COSTS) == chunks


@pytest.mark.parametrize(("share", "chunks"), [(1, 1), (2, 2)])
def test_halves_do_not_read_memory_faster(share, chunks):
    """64 items of 64 tiles fill half of the device, but as many different keys are all that the memory gives."""
    costs = COSTS._replace(memory=0.0163)
    assert best_chunks(64, 64, 132, costs, share) == chunks and best_chunks(64, 64, 132, COSTS) == 2


def test_few_items_are_split_until_joining_costs_more():
    one = best_chunks(2, 64, 132, COSTS)
    assert 16 <= one <= 32
    assert (
        best_chunks(2, 64, 132, COSTS._replace(traffic=0.0))
        > one
        > best_chunks(2, 64, 132, COSTS._replace(traffic=0.5))
    )
    # 140 items on 132 multiprocessors would be two waves, the second nearly empty.
    assert best_chunks(140, 200, 132, Costs(0.5, 0.5, 0.1, 0.0)) > 1


def test_a_disabled_split():
    plan = plan_mla(np.arange(2), np.array([9999]), np.zeros(1, int), num_heads=16, tile_q=16, tile_kv=32, slots=132,
                    costs=COSTS, disable_split=True)  # fmt: skip
    assert len(plan.items) == 1 and plan.num_slots == 0


def test_empty_batches():
    plan = plan_mla(np.array([0]), np.zeros(0, int), np.zeros(0, int), num_heads=16, tile_q=16, tile_kv=32, slots=132,
                    costs=COSTS)  # fmt: skip
    assert len(plan.items) == 0
    plan = plan_mla(np.arange(3), np.zeros(2, int), np.zeros(2, int), num_heads=16, tile_q=16, tile_kv=32, slots=132,
                    costs=COSTS)  # fmt: skip
    assert len(plan.items) == 2 and plan.num_slots == 0


def test_the_word_that_lets_chunks_wait_is_the_one_the_kernel_reads():
    text = header_closure(b'#include "attention/prefill_params.cuh"')["attention/prefill_params.cuh"].decode()
    body = re.sub("//.*", "", re.search(r"struct alignas\(16\) PrefillItem \{(.*?)\};", text, re.S)[1])
    words = [w.strip() for line in re.findall(r"int32_t ([^;]*);", body) for w in line.split(",")]
    assert words.index("unused[2]") == len(words) - 1 == WAITS
    plan = plan_mla(np.arange(2), np.array([4096]), np.zeros(1, int), num_heads=128, tile_q=64, tile_kv=64, slots=132,
                    costs=COSTS)  # fmt: skip
    assert plan.num_split and plan.items[:, WAITS].all() and not plan.items[:, 13].any()


@pytest.mark.parametrize("seed", range(4))
def test_short_cut_equals_the_general_way(seed):
    """Where all rows of a request see the same keys the list is made from numbers a request; a `narrow` that drops
    nothing takes the general way."""
    rng = np.random.default_rng(seed)
    num_split = 0
    for _ in range(150):
        batch = int(rng.choice([1, 2, 3, 16, 64, 100]))
        kv_len = rng.integers(0, rng.choice([50, 600, 5000, 40000]), batch)
        if rng.random() < 0.2:
            kv_len[:] = kv_len[0]
        causal = bool(rng.integers(2))
        qo_len = rng.integers(0, 2 if causal else 6, batch) if rng.random() < 0.5 else np.ones(batch, np.int64)
        options = {
            "num_heads": int(rng.choice([1, 5, 16, 70, 128])), "tile_q": int(rng.choice([16, 64])),
            "tile_kv": int(rng.choice([16, 32, 64])), "slots": int(rng.choice([7, 132, 264])), "causal": causal,
            "disable_split": bool(rng.random() < 0.1),
            "costs": (Costs(0.1, 0.1, 0.01, 0.0), HOPPER_COSTS, PORTABLE_COSTS)[rng.integers(3)],
        }  # fmt: skip
        given = np.concatenate([[0], np.cumsum(qo_len)]), kv_len, np.cumsum(kv_len) + 3
        got = plan_mla(*given, **options)
        want = plan_mla(*given, **options, narrow=lambda begin, end, *_: (begin, end))
        assert got.items.dtype == np.int32 and got.items.flags.c_contiguous
        assert np.array_equal(got.items, want.items)
        assert (got.num_slots, got.num_split) == (want.num_slots, want.num_split)
        num_split += got.num_split > 0
    assert 30 < num_split < 150
