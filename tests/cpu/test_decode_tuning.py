"""Batch decode under the tuner: its candidates, and that a choice steers the plan."""

from __future__ import annotations

import pytest
from tuning_clock import GPU, fresh_tuner

from fi_cupy import autotuner as at
from fi_cupy import decode_tuning
from fi_cupy.decode_kernel import geometries, geometry
from fi_cupy.decode_tuning import DECODE, choose_geometry, decode_problem, keys_of
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16, float8_e4m3fn
from fi_cupy.gemm.select import H100
from fi_cupy.plan.decode import smem_bytes


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    for made in fresh_tuner(monkeypatch, tmp_path):
        monkeypatch.setattr("fi_cupy.tuning.measure.build_many", lambda targets, processes: iter(()))
        monkeypatch.setattr(
            decode_tuning.DecodeRunner, "forward",
            lambda self, inputs, tactic=-1, do_preparation=False: tactic,
        )  # fmt: skip
        made._timer.us = lambda symbol: 1.0 if "_w4s2b2" in symbol else 2.0
        yield made


DEVICES = [
    H100,
    DeviceInfo(80, "80", 108, 163 << 10, 164 << 10, 40 << 20),
    DeviceInfo(89, "89", 128, 99 << 10, 100 << 10, 72 << 20),
    DeviceInfo(75, "75", 40, 64 << 10, 64 << 10, 4 << 20),
]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.arch)
@pytest.mark.parametrize("kv", [bfloat16, float8_e4m3fn], ids=lambda d: d.name)
@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (32, 32, 128), (64, 4, 256)], ids=str)
def test_candidates_fit_the_device(device, kv, heads):
    for batch in (1, 16, 256):
        p = decode_problem(batch, *heads, bfloat16, kv)
        found = geometries(p, device)
        assert next(iter(found.values())) == geometry(p, device)
        assert len(found) >= (5 if device is H100 and heads[2] <= 128 else 1)
        assert device.number >= 80 or len(found) == 1
        for symbol, g in found.items():
            config = dict(g.spec.config)
            assert g.spec.symbol == symbol
            used = smem_bytes(config["kWarps"], config["kStages"], heads[2], kv.itemsize, config["kTilesN"])
            assert used == config["kSmemBytes"] <= g.spec.smem_bytes <= device.smem_per_block
            ctas = g.slots // device.num_sms
            # A pair's CTA asks for more than it uses, so that no more than `ctas` of them share a multiprocessor.
            crowded = (ctas + 1) * (g.spec.smem_bytes + 1024) <= device.smem_per_sm
            assert not crowded if config["kHeadPair"] else g.spec.smem_bytes == used
            assert ctas * (g.spec.smem_bytes + 1024) <= device.smem_per_sm
            assert ctas * g.spec.threads <= 1024
            assert g.num_head_blocks * g.heads_per_block >= heads[0]
            assert g.head_dim == heads[2]


def test_a_tuned_batch_is_planned(tuner):
    p = decode_problem(13, 32, 8, 128, bfloat16, bfloat16)
    assert choose_geometry(p, GPU) == geometry(p, GPU)
    with at.autotune():
        chosen = choose_geometry(p, GPU)
    assert chosen.spec.symbol == "batch_decode_bf16_d128_h8_w4s2b2"
    assert chosen != geometry(p, GPU)
    assert choose_geometry(p._replace(batch_size=16), GPU) == chosen
    assert choose_geometry(p._replace(batch_size=2), GPU) == chosen
    assert len(tuner.choices()) == 5
    for other in (p._replace(batch_size=17), p._replace(soft_cap=True), p._replace(kv=float8_e4m3fn)):
        assert choose_geometry(other, GPU) == geometry(other, GPU)
    assert choose_geometry(p, H100) == geometry(p, H100)


def test_batch_invariant_plans_keep_the_default(tuner):
    p = decode_problem(8, 32, 8, 128, bfloat16, bfloat16)._replace(batch_invariant=True)
    with at.autotune():
        assert choose_geometry(p, GPU) == geometry(p, GPU)
    assert not tuner.choices()


def test_a_bucket_default_is_found_for_its_smaller_batches():
    """The default of a large batch is no candidate of a small one where it pairs heads; it must launch all the same."""
    large = decode_problem(256, 32, 8, 128, bfloat16, float8_e4m3fn)
    tactic = geometry(large, H100).spec.symbol
    assert DECODE.choice((large._replace(batch_size=130), H100), tactic) == geometry(large, H100)
    assert DECODE.choice((large, H100), "batch_decode_of_old_times") is None


@pytest.mark.parametrize("batch", [1, 3, 16, 64, 100, 256, 1000])
def test_measured_lengths(batch):
    keys = keys_of(batch)
    assert keys % 16 == 0
    assert 16 <= keys <= 4096
    assert batch * keys <= 1 << 19
    made = DECODE.inputs((decode_problem(batch, 32, 8, 128, bfloat16, bfloat16), H100))
    assert made[1].shape[0] * 16 == batch * keys
    assert DECODE.config.constraint_specs[0].infer_shape((made[0].shape,)) == made[1].shape[0]
