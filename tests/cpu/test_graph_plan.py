"""CUDA-graph mode and kept schedules with a stand-in for the GPU: what a captured graph reads stays as it is."""

from __future__ import annotations

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest

from fi_cupy import errors, prefill, prefill_batch, prefill_single
from fi_cupy.arrays import View
from fi_cupy.device import DeviceInfo

HOPPER = DeviceInfo(90, "90a", 132, 232448, 233472, 50 << 20)


class Buffer:
    """A plan buffer in host memory."""

    ptr, counters_ptr = 1 << 20, 1 << 19

    def __init__(self, device, nbytes, counters=0):
        self.frozen, self.sent = False, []

    def reserve(self, nbytes, counters=0):
        pass

    def stage(self, words):
        return np.zeros(words, np.int32)

    def upload(self, staged, stream):
        self.sent.append(staged)
        return self.ptr


@pytest.fixture(autouse=True)
def no_driver(monkeypatch):
    monkeypatch.setattr(View, "stream", lambda self: 0)


@pytest.fixture
def wrapper(monkeypatch):
    monkeypatch.setattr(prefill_batch, "PlanBuffer", Buffer)
    monkeypatch.setattr(prefill_batch, "device_info", lambda index: HOPPER)
    loaded = []

    def load(self, scale, device, head_scales=False):
        loaded.append(scale)
        return SimpleNamespace(spec=self.spec)  # what a log of the plan looks at

    monkeypatch.setattr(prefill_batch.Geometry, "kernel", load)
    buffers = [np.zeros(n, np.int32) for n in (3, 3, 64, 2)]
    made = prefill.BatchPrefillWithPagedKVCacheWrapper(
        np.zeros(1 << 24, np.uint8), "NHD", True, *buffers, custom_mask_buf=np.zeros(64, np.uint8)
    )
    made.device = 0
    made.loaded, made.buffers = loaded, buffers
    return made


def plan(wrapper, rows=(4, 4), pages=(3, 2), **options):
    qo, kv = np.cumsum([0, *rows]), np.cumsum([0, *pages])
    wrapper.plan(qo, kv, np.arange(kv[-1]), [1] * len(pages), 8, 2, 64, 16, **options)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (errors.PlanError, "keeps kernel, grid and options", {"sm_scale": 0.5}),
        (errors.PlanError, "keeps kernel, grid and options", {"causal": True}),
        (errors.PlanError, "the batch is 3, expected 2", {"rows": (4, 2, 1), "pages": (1, 1, 1)}),
        (errors.ArgumentError, "paged_kv_indices_buf has 64 entries, expected 70", {"pages": (30, 40)}),
    ],
)
def test_a_refused_plan_leaves_the_captured_one(wrapper, error, message, options):
    plan(wrapper)
    before, sent = [b.copy() for b in wrapper.buffers], len(wrapper._plan_buffer.sent)
    planned = wrapper._planned
    with pytest.raises(error, match=message):
        plan(wrapper, **options)
    assert len(wrapper._plan_buffer.sent) == sent and wrapper._planned is planned
    assert all(np.array_equal(a, b) for a, b in zip(before, wrapper.buffers, strict=True))


def test_a_refused_first_plan_fixes_nothing(wrapper):
    with pytest.raises(errors.PlanError, match="the batch is 3, expected 2"):
        plan(wrapper, rows=(4, 2, 1), pages=(1, 1, 1))
    with pytest.raises(errors.ArgumentError, match="custom_mask_buf has 64 bytes, expected at least"):
        plan(wrapper, custom_mask=np.ones(40 * 33 + 40 * 17, bool), rows=(40, 40))
    plan(wrapper)
    assert wrapper._planned is not None and len(wrapper._plan_buffer.sent) == 1


def test_plan_loads_the_kernel_that_run_takes(wrapper):
    plan(wrapper, sm_scale=-0.5)
    assert set(wrapper.loaded) == {-0.5}


def test_a_captured_schedule_outlives_the_cache(monkeypatch):
    import cupy

    made, capturing, memory = OrderedDict(), [False], object()
    monkeypatch.setattr(prefill_single, "_schedules", made)
    monkeypatch.setattr(prefill_single, "_captured", {})
    monkeypatch.setattr(cupy.cuda.runtime, "streamIsCapturing", lambda stream: capturing[0])
    q, k = np.zeros((4, 8, 64), np.float16), np.zeros((16, 2, 64), np.float16)
    call = prefill_single.prepare("op", q, k, k)

    def make(g, options, x, qo_len, kv_len, stream, key, narrow):
        schedule = prefill_single.plan_prefill(
            np.array([0, 4]), np.array([16]), np.array([0]), group=4, num_kv_heads=2, tile_q=16, tile_kv=64, slots=132
        )
        made[key] = memory, 4096, schedule
        return made[key]

    monkeypatch.setattr(prefill_single, "_make", make)
    prefill_single.schedule(call, HOPPER)
    prefill_single.schedule(call, HOPPER)
    assert not prefill_single._captured
    capturing[0] = True
    prefill_single.schedule(call, HOPPER)
    assert list(prefill_single._captured.values()) == [memory]
