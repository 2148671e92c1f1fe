"""The mixed schedule: every visible (row, key) once, two queues that give every task once, and CTAs that fit."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy import decode_kernel, mixed, prefill_kernel
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16, float8_e4m3fn, float16
from fi_cupy.jit.render import render
from fi_cupy.plan.mixed import grid, plan_mixed

GROUP, KV_HEADS, TILE_Q, TILE_KV = 4, 2, 128, 64


def device(arch):
    num_sms, smem_per_block, smem_per_sm = decode_kernel._GPUS[arch]
    return DeviceInfo(arch, str(arch), num_sms, smem_per_block, smem_per_sm, 0)


@settings(max_examples=100, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(0, 300) | st.just(1), st.integers(0, 3000)), min_size=0, max_size=12),
    slots=st.integers(1, 400),
    causal=st.booleans(),
)
def test_every_row_sees_its_keys_once(lens, slots, causal):
    qo = np.concatenate([[0], np.cumsum([m for m, _ in lens])]).astype(np.int64)
    kv = np.array([n for _, n in lens], np.int64)
    base = np.concatenate([[0], np.cumsum(kv)])[:-1]
    plan = plan_mixed(
        qo, kv, base, group=GROUP, num_kv_heads=KV_HEADS, tile_q=TILE_Q, tile_kv=TILE_KV, num_head_blocks=KV_HEADS,
        slots=slots, causal=causal,
    )  # fmt: skip
    covered = {}
    for q_row, qo_len, start, kv_len, tile, begin, end, *rest in plan.tiles.items.tolist():
        b = rest[3]
        assert (q_row, qo_len, start, kv_len) == (qo[b], lens[b][0], base[b], kv[b]) and qo_len > 1
        for row in range(tile * TILE_Q, min((tile + 1) * TILE_Q, qo_len * GROUP)):
            covered.setdefault(q_row * GROUP + row, []).append((begin, end))
    for q_row, begin, end, start, _, _, _, kv_len in plan.items.items.tolist():
        b = int(np.searchsorted(qo, q_row, "right")) - 1
        assert lens[b] == (1, kv_len) and start == base[b]
        for head in range(GROUP):
            covered.setdefault(q_row * GROUP + head, []).append((begin, end))
    for b, (m, n) in enumerate(lens):
        for row in range(m * GROUP):
            ranges = sorted(covered.pop(int(qo[b]) * GROUP + row))
            assert ranges[0][0] == 0 and all(x[1] == y[0] for x, y in pairwise(ranges))
            assert ranges[-1][1] >= (min(n, n - m + row // GROUP + 1) if causal else n)
    assert not covered
    for rows, first, last in ((plan.tiles.items, 5, 6), (plan.items.items, 1, 2)):  # both longest first
        lengths = -(-(rows[:, last] - rows[:, first]) // TILE_KV) if last == 6 else rows[:, last] - rows[:, first]
        assert (np.diff(lengths) <= 0).all()


class Launch:
    """The queues as kernels/attention/mixed.cuh keeps them; `step` lets one CTA finish its task."""

    def __init__(self, slots, tasks, counters):
        self.tasks, self.counters = tasks, counters
        self.ctas, self.tile_ctas = grid(slots, *tasks)
        self.begun = (self.tile_ctas, self.ctas - self.tile_ctas)
        self.done = ([], [])
        self.turns = [[0, i, 2] if i < self.tile_ctas else [1, i - self.tile_ctas, 2] for i in range(self.ctas)]

    def step(self, cta):
        kind, task, left = self.turns[cta]
        self.done[kind].append(task)
        while left:
            limit = self.tasks[kind] - self.begun[kind] + self.ctas - 1
            old = self.counters[kind]
            self.counters[kind] = 0 if old >= limit else old + 1
            if self.begun[kind] + old < self.tasks[kind]:
                self.turns[cta] = [kind, self.begun[kind] + old, left]
                return True
            kind, left = 1 - kind, left - 1
        return False


@settings(max_examples=200, deadline=None)
@given(
    slots=st.integers(1, 40), tasks=st.tuples(st.integers(0, 120), st.integers(0, 120)), seed=st.integers(0, 1 << 30)
)
def test_queues_give_every_task_once_and_end_at_zero(slots, tasks, seed):
    rng, counters = np.random.default_rng(seed), [0, 0]
    for _ in range(2):
        launch = Launch(slots, tasks, counters)
        assert launch.ctas == min(slots, sum(tasks))
        assert 0 <= launch.tile_ctas <= tasks[0] and 0 <= launch.ctas - launch.tile_ctas <= tasks[1]
        running = list(range(launch.ctas))
        while running:
            cta = running[rng.integers(len(running))]
            if not launch.step(cta):
                running.remove(cta)
        assert [sorted(done) for done in launch.done] == [list(range(n)) for n in tasks]
        assert counters == [0, 0]


def test_both_kinds_begin_on_every_multiprocessor():
    assert grid(264, 1000, 1000) == (264, 132)
    assert grid(264, 10, 1000) == (264, 10)
    assert grid(264, 1000, 10) == (264, 254)
    assert grid(264, 3, 2) == (5, 3)
    assert grid(264, 0, 0) == (0, 0)


def test_tile_tasks_are_every_item_and_head_once():
    """`run_tile` of the kernel: sections of eight kv heads, inside of a section all heads of an item."""
    for tiles, heads in ((1, 1), (7, 3), (5, 8), (3, 11), (4, 32)):
        pairs = []
        for task in range(tiles * heads):
            first = task // (tiles * 8) * 8
            width, rest = min(8, heads - first), task - first * tiles
            pairs.append((rest // width, first + rest % width))
        assert sorted(pairs) == [(item, head) for item in range(tiles) for head in range(heads)]


@pytest.mark.parametrize("arch", [75, 80, 86, 90])
@pytest.mark.parametrize("dim", [8, 64, 72, 80, 96, 128, 160, 192, 248, 256])
@pytest.mark.parametrize("group", [1, 4, 16, 30])
def test_every_head_dim_has_a_mixed_kernel_that_fits(arch, dim, group):
    d = device(arch)
    problem = prefill_kernel.Problem(2 * group, 2, dim, dim, float16, True, False, False, False)
    for kv in (float16, float8_e4m3fn) if dim % 16 == 0 else (float16,):
        g = mixed.geometry(problem, mixed.Decode(2, group, dim, float16, kv, float16, True, False, False), d)
        assert g is not None
        for spec in (g.spec, g.negative_spec):
            assert spec.smem_bytes <= d.smem_per_block
            assert spec.min_blocks * (spec.smem_bytes + 1024) <= d.smem_per_sm + 1024 * (spec.min_blocks == 1)
            assert g.slots == spec.min_blocks * d.num_sms
            config = dict(spec.config)
            assert dict(config["Prefill"])["kWarps"] == dict(config["Decode"])["kWarps"] == spec.threads // 32
        assert g.decode.num_head_blocks * g.decode.heads_per_block >= 2 * group


def test_no_mixed_kernel_for_parts_that_differ():
    d = device(90)
    part = mixed.Decode(2, 4, 128, bfloat16, bfloat16, bfloat16, True, False, False)
    problem = prefill_kernel.Problem(8, 2, 128, 128, bfloat16, True, False, False, False)
    assert mixed.geometry(problem, part, d) is not None
    for change in ({"head_dim_vo": 64}, {"dtype": float16}, {"head_dim_qk": 64, "head_dim_vo": 64}):
        assert mixed.geometry(problem._replace(**change), part, d) is None


def test_the_source_names_both_parts():
    spec = mixed.kernel_specs()[0]
    text = render(spec)
    assert re.search(r"struct Prefill \{ using T = __nv_bfloat16;.* static constexpr int kTileKv = 64;", text)
    assert re.search(r"struct Decode \{ .*static constexpr int kStages = \d;.* \};", text)
    assert "FI_OFFSETOF(fi::MixedParams, decode.q)" in text
    header = (Path(__file__).parents[2] / "kernels" / "attention" / "mixed.cuh").read_text()
    assert "kSectionHeads = 8;" in header  # as above


@pytest.mark.parametrize(
    ("prompts", "decoding", "apart"),
    [  # (requests, queries, keys) and (requests, keys) of 32/8 heads of 128 dims, as measured on an H100
        ((1, 2048, 2048), (64, 4096), False),  # 400 us in one launch, 440 in two
        ((1, 512, 16384), (64, 2048), True),  # 515, 401
        ((1, 4096, 4096), (16, 4096), True),  # 423, 299
        ((8, 512, 4096), (0, 0), True),  # 768, 403
        ((2, 1024, 1024), (64, 4096), False),  # 404, 390
        ((0, 0, 0), (64, 4096), False),  # 368, 460
        ((1, 300, 300), (4, 1000), False),
    ],
)
def test_long_prompts_leave_the_mixed_kernel(prompts, decoding, apart):
    problem = prefill_kernel.Problem(32, 8, 128, 128, bfloat16, True, False, False, False)
    count, qo_len, kv_len = prompts
    operations = mixed.prompt_operations(np.full(count, qo_len), np.full(count, kv_len), problem, True, -1)
    assert mixed.apart_is_faster(operations, decoding[0] * decoding[1] * 8 * 128 * 4) is apart


@settings(max_examples=200, deadline=None)
@given(
    lens=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 60)), max_size=3), causal=st.booleans(),
    window=st.integers(-1, 50),
)  # fmt: skip
def test_operations_are_those_of_the_visible_pairs(lens, causal, window):
    pairs = 0
    for qo_len, kv_len in lens:
        row, key = np.arange(kv_len - qo_len, kv_len)[:, None], np.arange(kv_len)
        seen = np.ones((qo_len, kv_len), bool)
        if causal:
            seen &= key <= row
        if window >= 0:
            seen &= key >= row - window
        pairs += seen.sum()
    problem = prefill_kernel.Problem(8, 2, 128, 64, bfloat16, True, False, False, False)
    qo, kv = (np.array([x[i] for x in lens], np.int64) for i in (0, 1))
    assert mixed.prompt_operations(qo, kv, problem, causal, window) == 2 * pairs * 8 * (128 + 64)
