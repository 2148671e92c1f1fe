"""Products under the tuner: their candidates, and that a choice steers the launch."""

from __future__ import annotations

import time

import pytest
from tuning_clock import GPU, fresh_tuner

from fi_cupy import autotuner as at
from fi_cupy import gemm
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16, float32
from fi_cupy.gemm.select import H100, select_mm_kernel
from fi_cupy.gemm.tuning import BUCKETS, MM, MmProblem, choose_mm_kernel, mm_candidates
from fi_cupy.jit.driver import has_driver_binding
from fi_cupy.tuning import choice, file


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    yield from fresh_tuner(monkeypatch, tmp_path)


SHAPES = [(4096, 4096), (4096, 14336), (576, 576), (49152, 576), (128256, 4096), (8, 8), (72, 200)]
DEVICES = [
    H100,
    DeviceInfo(80, "80", 108, 163 << 10, 164 << 10, 40 << 20),
    DeviceInfo(89, "89", 128, 99 << 10, 100 << 10, 72 << 20),
    DeviceInfo(75, "75", 40, 64 << 10, 64 << 10, 4 << 20),
]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.arch)
@pytest.mark.parametrize("row_major", [False, True])
def test_candidates_cover_the_product(device, row_major):
    """The default comes first; every grid covers m x n once; no candidate needs what the device has not."""
    for n, k in SHAPES:
        for m in (1, 2, 3, 4, 7, 16, 33, 64, 100, 256, 300, 4096):
            p = MmProblem(m, n, k, device, bfloat16, float32 if n == 128256 else bfloat16, row_major)
            candidates = mm_candidates(p)
            default = select_mm_kernel(m, n, k, device, p.dtype, p.out, row_major_b=row_major)
            assert candidates[0].launch(p) == default
            assert MM.default(p) == default
            symbols = [c.spec.symbol for c in candidates]
            assert len(set(symbols)) == len(symbols)
            for c in candidates:
                assert c.spec.supports(device.arch)
                assert c.spec.smem_bytes <= device.smem_per_block
                spec, (gx, gy, gz) = c.launch(p)
                assert spec is c.spec
                config = dict(spec.config)
                tiles = -(-m // c.block_m) * -(-n // c.block_n)
                if c.walk == "persistent":
                    assert (gx, gy, gz) == (min(tiles, device.num_sms), 1, 1)
                else:
                    assert (gx * gy, gz) == (tiles * config.get("kSplit", 1), 1)
                if config.get("kOnce"):
                    assert k <= config["kWarpsK"] * config["kDepth"] * 8 * config.get("kLanes", 8)
                if spec.function == "gemm_rows":
                    assert m <= config["kM"]
                    assert c.block_n == config["kWarpsN"] * config["kRows"] * 32 // config["kLanes"]
                elif spec.function == "gemm_few":
                    assert m <= c.block_m == 8 * config["kATiles"]
                    assert c.block_n == 16 * config["kWTiles"]
                elif spec.function == "gemm_stream":
                    assert (c.block_m, c.block_n) == (16 * config["kMTiles"], 8 * config["kNTiles"])
                elif spec.function == "gemm_hopper_rows":
                    assert (c.block_m, c.block_n) == (config["kRowsA"], config["kBlockN"])
                else:
                    assert (c.block_m, c.block_n) == (config["kBlockM"], config["kBlockN"])


@pytest.mark.skipif(not has_driver_binding(), reason="Hopper's products need cuda-bindings")
def test_hoppers_kernels_are_candidates_where_tensor_maps_describe_the_layout():
    for m, function in ((8, "gemm_hopper_rows"), (64, "gemm_hopper_rows"), (64, "gemm_hopper"), (4096, "gemm_hopper")):
        p = MmProblem(m, 4096, 4096, H100, bfloat16, bfloat16)
        assert function in {c.spec.function for c in mm_candidates(p)}
        assert not any("hopper" in c.spec.function for c in mm_candidates(p._replace(portable=True)))
        assert MM.default(p._replace(portable=True)) == select_mm_kernel(m, 4096, 4096, H100, portable=True)


def _problem(m: int, n: int = 4096, k: int = 4096, device: DeviceInfo = GPU, pdl: bool = False) -> tuple:
    return (m, n, k, device, bfloat16, bfloat16, False, 1, pdl)


@pytest.fixture
def mm_tuner(tuner, monkeypatch):
    """Products are timed by symbol, and neither compiled nor launched."""
    monkeypatch.setattr("fi_cupy.tuning.measure.build_many", lambda targets, processes: iter(()))
    monkeypatch.setattr(
        gemm.tuning.MmRunner, "forward",
        lambda self, inputs, tactic=-1, do_preparation=False: tactic,
    )  # fmt: skip
    tuner._timer.us = lambda symbol: 1.0 if "_d1_w4" in symbol and "few" in symbol else 2.0
    return tuner


def test_a_tuned_product_is_launched(mm_tuner):
    default = select_mm_kernel(16, 4096, 4096, GPU)
    assert choose_mm_kernel("mm_bf16", _problem(16)) == default
    with at.autotune():
        chosen, grid = choose_mm_kernel("mm_bf16", _problem(13))
    assert chosen.symbol == "gemm_few_bf16_16x16_d1_w4"
    assert chosen != default[0]
    assert grid == (256, 1, 1)
    # All rows of the bucket, and the smaller buckets, which were measured in the same go.
    assert choose_mm_kernel("mm_bf16", _problem(16)) == (chosen, (256, 1, 1))
    assert choose_mm_kernel("mm_bf16", _problem(5))[0].symbol == "gemm_few_bf16_8x16_d1_w4"
    assert len(mm_tuner.choices()) == 5
    # Another shape, way of launching or GPU is another problem; so is a batched product.
    for other in (_problem(16, 4104), _problem(16, pdl=True), _problem(16, device=H100), _problem(64)):
        expected = select_mm_kernel(*other[:4], pdl=other[8])
        assert choose_mm_kernel("mm_bf16", other) == expected
    assert choose_mm_kernel("bmm_bf16", _problem(16)) == default
    mm_tuner.clear_cache()
    assert choose_mm_kernel("mm_bf16", _problem(16)) == default


def test_a_skipped_product_keeps_its_default(mm_tuner):
    with at.autotune(skip_ops={"mm_bf16"}):
        assert choose_mm_kernel("mm_bf16", _problem(16)) == select_mm_kernel(16, 4096, 4096, GPU)
    assert not mm_tuner.choices()


def test_no_measurement_while_capturing(mm_tuner, monkeypatch):
    """A capture uses what is known, and what it cannot measure is measured afterwards."""
    default = select_mm_kernel(16, 4096, 4096, GPU)
    with at.autotune():
        with monkeypatch.context() as capturing:
            capturing.setattr(at.AutoTuner, "can_measure", lambda self, device: False)
            assert choose_mm_kernel("mm_bf16", _problem(16)) == default
            assert not mm_tuner.choices()
        chosen = choose_mm_kernel("mm_bf16", _problem(16))
        assert chosen != default
    with at.autotune(), monkeypatch.context() as capturing:
        capturing.setattr(at.AutoTuner, "can_measure", lambda self, device: False)
        assert choose_mm_kernel("mm_bf16", _problem(16)) == chosen


def test_a_choice_that_may_not_be_compiled_gives_the_default(mm_tuner, monkeypatch, caplog):
    with at.autotune():
        chosen = choose_mm_kernel("mm_bf16", _problem(16))
    default = select_mm_kernel(16, 4096, 4096, GPU)
    assert chosen != default
    monkeypatch.setenv("FI_CUPY_NO_COMPILE", "1")
    choice.forget()
    assert choose_mm_kernel("mm_bf16", _problem(16)) == default
    assert "is not compiled, nor may it be" in caplog.text


def test_a_choice_that_does_not_fit_gives_the_default(tuner, tmp_path, caplog):
    """A file may name a kernel that this version does not have, or one for fewer rows."""
    for tactic in ("gemm_of_old_times", "gemm_rows_bf16_m1_l32r2d4_w4x2"):
        runner = MM.runner(_problem(16))
        key = str(("mm_bf16", ((16, 4096), (4096, 4096), (-1, 4096)), runner.get_cache_key_extras(())))
        path = tmp_path / "choices.json"
        table = {file.environment(GPU): {key: file.Entry("MmRunner", tactic, 1.0, 2.0)}}
        file.merge_into(path, table)
        tuner.clear_cache()
        assert tuner.load_configs(path)
        assert choose_mm_kernel("mm_bf16", _problem(16)) == select_mm_kernel(16, 4096, 4096, GPU)
        assert f"the tuned choice {tactic} does not take" in caplog.text


def test_buckets_hold_the_row_kernels_apart():
    assert list(BUCKETS) == sorted(set(BUCKETS))
    assert BUCKETS[:2] == (1, 2)


def test_a_warm_choice_costs_little(mm_tuner):
    problem = _problem(16)
    with at.autotune():
        choose_mm_kernel("mm_bf16", problem)
    choose_mm_kernel("mm_bf16", problem)
    best = min(_seconds(problem) for _ in range(5))
    assert best < 20e-6  # 0.6 us on a quiet machine


def _seconds(problem: tuple) -> float:
    start = time.perf_counter()
    for _ in range(200):
        choose_mm_kernel("mm_bf16", problem)
    return (time.perf_counter() - start) / 200
