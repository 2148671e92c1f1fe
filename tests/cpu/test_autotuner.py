"""The autotuner with a stand-in for the GPU's clock: what is measured, what is kept, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from kernel_jobs import run_python

from fi_cupy import autotuner as at
from fi_cupy import gemm
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16, float32
from fi_cupy.errors import ArgumentError, CacheError
from fi_cupy.gemm.select import H100, select_mm_kernel
from fi_cupy.gemm.tuning import BUCKETS, MM, MmProblem, choose_mm_kernel, mm_candidates
from fi_cupy.jit import env
from fi_cupy.tuning import choice, file

GPU = DeviceInfo(90, "90a", 132, 227 << 10, 228 << 10, 50 << 20, "Test GPU")


class Clock:
    """Times tactics by a table instead of running them; a tactic that raises is one that cannot run."""

    def __init__(self, us) -> None:
        self.us = us if callable(us) else us.__getitem__
        self.prepared: list[tuple[object, tuple]] = []
        self.sessions = 0

    @contextlib.contextmanager
    def session(self):
        self.sessions += 1
        yield

    def make(self, spec):
        return np.zeros(spec.shape, spec.dtype.np)

    def rotate(self, inputs, cold):
        return [inputs]

    def prepare(self, call, sets, use_graph):
        tactic = call(sets[0])
        self.prepared.append((tactic, tuple(np.shape(x) for x in sets[0])))
        return tactic

    def time(self, prepared, rounds):
        return [[float(self.us(t))] * rounds for t in prepared]


class Runner(at.TunableRunner):
    def __init__(self, tactics=("own", "fast", "slow"), broken=()) -> None:
        self.tactics, self.broken = tactics, broken
        self.prepared = 0
        self.profiles: list[tuple] = []

    def get_valid_tactics(self, inputs, profile):
        self.profiles.append(profile.get_opt_shapes())
        return self.tactics

    def forward(self, inputs, tactic=-1, do_preparation=False, **kwargs):
        if do_preparation:
            assert tactic == -1
            self.prepared += 1
            return None
        if tactic in self.broken:
            raise RuntimeError(f"{tactic} is broken")
        return tactic


class Other(Runner):
    pass


US = {"own": 10.0, "fast": 6.0, "slow": 20.0, "o1": 5.0}
ROWS = at.TuningConfig(
    dynamic_tensor_specs=(at.DynamicTensorSpec((0,), (0,), (4, 1, 16, 4), at.make_bucket_mapper((1, 4, 16), True)),)
)


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    monkeypatch.setenv("FI_CUPY_CACHE_DIR", str(tmp_path / "cache"))
    for name in env.AUTOTUNE_DIR.names:
        monkeypatch.delenv(name, raising=False)
    made = at.AutoTuner(Clock(US), GPU)
    monkeypatch.setattr(at.AutoTuner, "_instance", made)
    choice.forget()
    yield made
    choice.forget()


def x(rows: int, columns: int = 8) -> np.ndarray:
    return np.zeros((rows, columns), np.float32)


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 2, 4, 5, 15, 16, 17, 100])
def test_buckets_against_a_scan(value):
    buckets = (2, 4, 16)
    below = max([b for b in buckets if b <= value], default=2)
    above = min([b for b in buckets if b >= value], default=16)
    assert at.round_to_nearest_bucket(value, buckets) == below
    assert at.round_to_nearest_bucket(value, buckets, round_map=True) == above
    assert at.make_bucket_mapper((16, 2, 4, 2))(value) == below
    assert at.make_bucket_mapper((16, 2, 4), True)(value) == above


def test_profiles_are_every_combination(tuner):
    config = at.TuningConfig(
        dynamic_tensor_specs=(
            at.DynamicTensorSpec((0, 1), (0, 0), lambda n: range(1, n + 1), lambda n: n),
            at.DynamicTensorSpec((0,), (1,), (8, 32), lambda n: n),
        ),
        constraint_specs=(at.ConstraintSpec(1, 1, lambda shapes: shapes[0][0] * shapes[0][1]),),
    )
    runner = Runner()
    with at.autotune():
        tuner.choose_one("op", [runner], config, [x(2), x(2), 5, None])
    expected = [((m, n), (m, m * n), (0,), (0,)) for m in (1, 2) for n in (8, 32)]
    assert runner.profiles == expected
    assert {shapes for _, shapes in tuner._timer.prepared} == {((m, n), (m, m * n), (), ()) for m, n in
                                                              [(1, 8), (1, 32), (2, 8), (2, 32)]}  # fmt: skip


def test_dims_name_their_range(tuner):
    seen = []

    class Looks(Runner):
        def get_valid_tactics(self, inputs, profile):
            seen.append(profile.shapes[0][0])
            return ()

    with at.autotune():
        tuner.choose_one("op", [Looks()], ROWS, [x(3)])
    assert seen == [at.DynamicDim(1, 1, 4), at.DynamicDim(4, 4, 16), at.DynamicDim(16, 16, float("inf"))]


def test_initializers_and_hook_make_the_inputs(tuner):
    spec = at.DynamicTensorSpec(
        (0,), (0,), (2,), lambda n: 2, (lambda shape, dtype, device: np.full(shape, 7, dtype),)
    )  # fmt: skip
    seen = []

    def hook(arrays):
        seen.append([a.copy() for a in arrays])
        return [arrays[0], np.ones((3, 3))]

    own = x(5)
    config = at.TuningConfig(dynamic_tensor_specs=(spec,), inputs_pre_hook=hook)
    with at.autotune():
        tuner.choose_one("op", [Runner(("own",))], config, [x(9), own])
    assert (seen[0][0] == np.full((2, 8), 7)).all()
    assert seen[0][0].dtype == np.float32
    assert seen[0][1].shape == own.shape
    assert tuner._timer.prepared == [("own", ((2, 8), (3, 3)))]


# --- choosing --------------------------------------------------------------------------------------------------------


def test_nothing_is_measured_outside(tuner):
    runner = Runner()
    assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, -1)
    assert tuner._timer.sessions == 0
    assert tuner.stats.cache_misses == 1
    assert tuner.stats.cache_miss_config_collection == {"op": {((3, 8),)}}


def test_the_fastest_tactic_of_all_runners(tuner):
    a, b = Runner(), Other(("o1",))
    with at.autotune():
        assert tuner.is_tuning_mode
        assert tuner.choose_one("op", [a, b], ROWS, [x(3)], extra=1) == (b, "o1")
    assert not tuner.is_tuning_mode
    assert tuner.choose_one("op", [a, b], ROWS, [x(2)]) == (b, "o1")
    assert tuner.choose_one("op", [b, a], ROWS, [x(2)]) == (b, "o1")  # by name, not by position
    assert tuner.choose_one("op", [a], ROWS, [x(2)]) == (a, -1)  # the runner is not there
    assert tuner.choose_one("other", [a, b], ROWS, [x(2)]) == (a, -1)
    assert (a.prepared, b.prepared) == (3, 3)  # once a bucket
    assert tuner._timer.sessions == 3
    assert tuner.stats.tuned_op_successful_configs == {"op": 3}
    hit, runner_id, tactic, profile = tuner.search_cache("op", [a, b], ((3, 8),), ROWS)
    assert (hit, runner_id, tactic, profile.get_opt_shapes()) == (True, 1, "o1", ((4, 8),))
    with at.autotune():
        tuner.choose_one("op", [a, b], ROWS, [x(16)])
    assert tuner._timer.sessions == 3  # known


def test_a_choice_needs_a_margin(tuner):
    tuner._timer.us = {"own": 10.0, "fast": 9.95, "slow": 10.2}.__getitem__
    runner = Runner()
    with at.autotune():
        assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, "own")
    tuner._timer.us = {"own": 10.0, "fast": 9.8, "slow": 10.2}.__getitem__
    tuner.clear_cache()
    with at.autotune():
        assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, "fast")
        assert tuner.rank_tactics("op", [runner], ROWS, [x(3)], 2) == ["fast", "own"]
    (entry,) = {e for e in tuner.choices().values()}
    assert (entry.us, entry.fallback_us) == (9.8, 10.0)


def test_rank_without_measurement_is_the_runners_order(tuner):
    assert tuner.rank_tactics("op", [Runner()], ROWS, [x(3)], k=2) == ["own", "fast"]


def test_the_final_overrules_the_screening(tuner):
    """A disturbed first look must not decide between close tactics, nor bring back what was far off."""
    looks = iter([{"own": 10.0, "fast": 9.5, "slow": 30.0}, {"own": 9.0, "fast": 9.6, "slow": 1.0}])

    def timed(prepared, rounds):
        table = next(looks)
        return [[table[t]] * rounds for t in prepared]

    tuner._timer.time = timed
    runner = Runner()
    with at.autotune(tuning_buckets=[4]):
        assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, "own")


def test_broken_tactics_are_left_out_and_counted(tuner):
    runner = Runner(broken=("fast",))
    with at.autotune(tuning_buckets=[4]):
        assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, "own")
    assert tuner.stats.failed_profiling_count == {"op": {"Runner fast at ((4, 8),)"}}
    assert "1 tactics failed" in str(tuner.stats)
    tuner.reset_statistics()
    assert tuner.stats.failed_profiling_count == {}
    tuner.clear_cache()
    broken = Runner(broken=("own", "fast", "slow"))
    with at.autotune():
        assert tuner.choose_one("op", [broken], ROWS, [x(3)]) == (broken, -1)
    assert not tuner.choices()


def test_own_choice_broken_leaves_no_time_of_it(tuner):
    runner = Runner(broken=("own",))
    with at.autotune(tuning_buckets=[4]):
        assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, "fast")
    (entry,) = tuner.choices().values()
    assert entry.fallback_us != entry.fallback_us


def test_extras_keep_choices_apart(tuner):
    class Typed(Runner):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind

        def get_cache_key_extras(self, inputs):
            return (self.kind,)

    with at.autotune():
        tuner.choose_one("op", [Typed("a")], ROWS, [x(3)])
    assert tuner.search_cache("op", [Typed("a")], ((3, 8),), ROWS)[0]
    assert not tuner.search_cache("op", [Typed("b")], ((3, 8),), ROWS)[0]


def test_buckets_round_up_and_nesting(tuner):
    runner = Runner()
    with at.autotune(tuning_buckets=(300, 100), round_up=False):
        tuner.choose_one("op", [runner], ROWS, [x(3)])
        assert [s[0][0] for s in runner.profiles] == [100, 300]
        assert tuner.search_cache("op", [runner], ((299, 8),), ROWS)[3].get_opt_shapes() == ((100, 8),)
        with at.autotune(False, round_up=True):
            assert tuner.is_tuning_mode  # the outer context's
            assert tuner.search_cache("op", [runner], ((101, 8),), ROWS)[3].get_opt_shapes() == ((300, 8),)
        assert tuner.search_cache("op", [runner], ((101, 8),), ROWS)[3].get_opt_shapes() == ((100, 8),)
    assert not tuner.search_cache("op", [runner], ((100, 8),), ROWS)[0]  # the operator's own buckets have no 100


def test_skip_ops_add_up(tuner):
    runner = Runner()
    with at.autotune(skip_ops={"a"}), at.autotune(skip_ops=["b"]):
        assert tuner.choose_one("a", [runner], ROWS, [x(3)]) == (runner, -1)
        assert tuner.choose_one("b", [runner], ROWS, [x(3)]) == (runner, -1)
        assert tuner.choose_one("c", [runner], ROWS, [x(3)]) == (runner, "fast")


def test_contexts_belong_to_their_thread(tuner):
    seen = []
    with at.autotune():
        thread = threading.Thread(target=lambda: seen.append(tuner.is_tuning_mode))
        thread.start()
        thread.join()
    assert seen == [False]


def test_the_context_ends_with_an_exception(tuner):
    with contextlib.suppress(KeyError), at.autotune(skip_ops={"a"}):
        raise KeyError
    assert not tuner.is_tuning_mode
    assert not choice.current().skip_ops


@pytest.mark.parametrize("buckets", [(), (0,), (4, -1), (2.5,)])
def test_bad_buckets(tuner, buckets):
    with pytest.raises(ArgumentError, match="autotune: tuning_buckets"), at.autotune(tuning_buckets=buckets):
        pass


def test_bad_specs(tuner):
    with pytest.raises(ArgumentError, match="input_idx has 2 entries and dim_idx 1"):
        at.DynamicTensorSpec((0, 1), (0,), (1,), int)
    with pytest.raises(ArgumentError, match="tensor_initializers has 1 entries, expected 2"):
        at.DynamicTensorSpec((0, 1), (0, 0), (1,), int, (lambda *_: None,))
    with pytest.raises(ArgumentError, match="choose_one: runners"):
        tuner.choose_one("op", [], ROWS, [x(1)])
    with pytest.raises(ArgumentError, match="choose_one: runners"):
        tuner.choose_one("op", ["no runner"], ROWS, [x(1)])
    with pytest.raises(ArgumentError, match="buckets is empty"):
        at.make_bucket_mapper(())


# --- files -----------------------------------------------------------------------------------------------------------


def tuned(path: Path, device: DeviceInfo = GPU, op: str = "op", tactics=("own", "fast"), rows: int = 3) -> None:
    """Write a file as a process with this GPU does that measures one operator."""
    other = at.AutoTuner(Clock(US), device)
    with_tuner = at.AutoTuner._instance
    at.AutoTuner._instance = other
    try:
        with at.autotune(cache=path, tuning_buckets=[rows]):
            other.choose_one(op, [Runner(tactics)], ROWS, [x(rows)])
    finally:
        at.AutoTuner._instance = with_tuner


def found(tuner, op: str = "op", rows: int = 3):
    with at.autotune(False, tuning_buckets=[rows]):
        return tuner.choose_one(op, [Runner()], ROWS, [x(rows)])[1]


def test_save_and_load(tuner, tmp_path):
    path = tmp_path / "deep" / "choices.json"
    tuned(path)
    document = json.loads(path.read_text())
    (section,) = document["sections"]
    assert section["environment"]["gpu"] == "Test GPU"
    assert set(section["environment"]) >= {"fi_cupy", "gpu", "multiprocessors", "target", "driver", "cuda", "nvrtc"}
    assert found(tuner) == -1
    assert tuner.load_configs(path) is True
    assert found(tuner) == "fast"
    assert sorted(p.name for p in path.parent.iterdir() if not p.name.endswith(".lock")) == ["choices.json"]


def test_tactics_survive_json(tuner, tmp_path):
    path = tmp_path / "choices.json"
    tactic = ("a", 3, ("b", 1.5))
    tuner._timer.us = lambda t: 1.0 if t == tactic else 5.0
    with at.autotune(cache=path, tuning_buckets=[3]):
        tuner.choose_one("op", [Runner(("own", tactic))], ROWS, [x(3)])
    tuner.clear_cache()
    assert tuner.load_configs(path)
    assert found(tuner) == tactic


@pytest.mark.parametrize("change", [{"name": "Another GPU"}, {"num_sms": 114}, {"arch": "compute_80"}], ids=str)
def test_another_device_is_refused(tuner, tmp_path, caplog, change):
    path = tmp_path / "choices.json"
    tuned(path, replace(GPU, **change))
    caplog.set_level(logging.INFO)
    assert tuner.load_configs(path) is False
    assert found(tuner) == -1
    assert "are not used: they were measured with" in caplog.text
    assert str(next(iter(change.values()))) in caplog.text
    # Its choices stay when ours are added, and both are found by whom they belong to.
    tuned(path)
    assert len(json.loads(path.read_text())["sections"]) == 2
    assert tuner.load_configs(path) is True
    assert found(tuner) == "fast"


@pytest.mark.parametrize("name", ["fi_cupy", "driver", "cuda", "nvrtc"])
def test_other_versions_are_refused(tuner, tmp_path, caplog, name):
    path = tmp_path / "choices.json"
    tuned(path)
    document = json.loads(path.read_text())
    document["sections"][0]["environment"][name] = "0.0.0-other"
    path.write_text(json.dumps(document))
    assert tuner.load_configs(path) is False
    assert found(tuner) == -1
    assert f"{name} 0.0.0-other instead of" in caplog.text


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b'{"schema": 99, "sections": []}', b'{"schema": 1}', b"\xff\xfe",
     b'{"schema": 1, "sections": [{"environment": {}, "choices": {"k": {"runner": "r"}}}]}',
     b'{"schema": 1, "sections": [{"environment": {}, "choices": {"k": []}}]}', b"[" * 100_000],
    ids=range(10),
)  # fmt: skip
def test_corrupt_files_are_not_used_and_get_replaced(tuner, tmp_path, caplog, content):
    path = tmp_path / "choices.json"
    path.write_bytes(content)
    assert tuner.load_configs(path) is False
    assert "it is not used" in caplog.text
    tuned(path)
    assert "it is replaced" in caplog.text
    assert tuner.load_configs(path) is True
    assert found(tuner) == "fast"


def test_a_missing_file(tuner, tmp_path):
    with pytest.raises(CacheError, match="there is no file"):
        tuner.load_configs(tmp_path / "none.json")
    with at.autotune(False, cache=tmp_path / "none.json"):
        pass
    assert not (tmp_path / "none.json").exists()


def test_a_folder_that_cannot_be_written(tuner, tmp_path, monkeypatch):
    """Choices stay in the process, with a warning; an explicit save is a typed error."""
    runner = Runner()
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "choices.json"  # no folder can be made there
    with pytest.warns(RuntimeWarning, match="cannot be written"), at.autotune(cache=path):
        tuner.choose_one("op", [runner], ROWS, [x(3)])
    assert tuner.choose_one("op", [runner], ROWS, [x(3)]) == (runner, "fast")
    with pytest.raises(CacheError, match="cannot be written"):
        tuner.save_configs(path)

    def full(*given, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    good = tmp_path / "choices.json"
    tuned(good)
    before = good.read_bytes()
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(CacheError, match="No space left"):
        tuner.save_configs(good)
    assert good.read_bytes() == before
    assert not list(tmp_path.glob(".tmp-*"))


def test_measured_counts_more_than_read_and_read_replaces_nothing(tuner, tmp_path):
    path = tmp_path / "choices.json"
    tuned(path)
    tuner.load_configs(path)
    # Meanwhile another process measures again and finds something else.
    document = json.loads(path.read_text())
    (key,) = document["sections"][0]["choices"]
    document["sections"][0]["choices"][key]["tactic"] = "newer"
    path.write_text(json.dumps(document))
    with at.autotune(tuning_buckets=[5]):
        tuner.choose_one("op", [Runner()], ROWS, [x(5)])
    tuner.save_configs(path)
    choices = json.loads(path.read_text())["sections"][0]["choices"]
    assert {c["tactic"] for c in choices.values()} == {"newer", "fast"}


_WRITER = """
import sys
from pathlib import Path
from fi_cupy.tuning import file
env = (("gpu", "one"),)
path, name = Path(sys.argv[1]), sys.argv[2]
for i in range(25):
    file.merge_into(path, {env: {f"{name}{i}": file.Entry("R", i, 1.0, 2.0)}})
"""


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "choices.json"
    threads = [threading.Thread(target=run_python, args=(_WRITER, str(path), name)) for name in "abc"]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads):
        with contextlib.suppress(FileNotFoundError):
            file.read(path)  # raises on half a file
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    (table,) = file.read(path).values()
    assert sorted(table) == sorted(f"{name}{i}" for name in "abc" for i in range(25))


def test_the_default_file_is_read_once(tuner, tmp_path, monkeypatch):
    assert at.default_file() == tmp_path / "cache" / "tuned" / "choices.json"
    tuned(at.default_file())
    assert tuner.has_choices("op", GPU)
    assert not tuner.has_choices("o", GPU)
    assert not tuner.has_choices("op", H100)
    monkeypatch.setenv("FLASHINFER_AUTOTUNE_DIR", str(tmp_path / "elsewhere"))
    assert at.default_file() == tmp_path / "elsewhere" / "choices.json"
    monkeypatch.setenv("FI_CUPY_AUTOTUNE_DIR", "off")
    assert at.default_file() is None
    assert not at.AutoTuner(Clock(US), GPU).has_choices("op", GPU)


def test_a_corrupt_default_file_stops_nobody(tuner):
    path = at.default_file()
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert not tuner.has_choices("op", GPU)


# --- products --------------------------------------------------------------------------------------------------------

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
                tiles = -(-m // c.block_m) * -(-n // c.block_n)
                assert (gx * gy, gz) == (tiles, 1)
                config = dict(spec.config)
                if spec.function == "gemm_rows":
                    assert m <= config["kM"]
                    assert c.block_n == config["kWarpsN"] * config["kRows"] * 32 // config["kLanes"]
                elif spec.function == "gemm_stream":
                    assert (c.block_m, c.block_n) == (16 * config["kMTiles"], 8 * config["kNTiles"])
                else:
                    assert (c.block_m, c.block_n) == (config["kBlockM"], config["kBlockN"])


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
    tuner._timer.us = lambda symbol: 1.0 if symbol.startswith("gemm_stream_bf16_16x8w_d4") else 2.0
    return tuner


def test_a_tuned_product_is_launched(mm_tuner):
    default = select_mm_kernel(16, 4096, 4096, GPU)
    assert choose_mm_kernel("mm_bf16", _problem(16)) == default
    with at.autotune():
        chosen, grid = choose_mm_kernel("mm_bf16", _problem(13))
    assert chosen.symbol == "gemm_stream_bf16_16x8w_d4_w8"
    assert chosen != default[0]
    assert grid == (512, 1, 1)
    # All rows of the bucket, and the smaller buckets, which were measured in the same go.
    assert choose_mm_kernel("mm_bf16", _problem(16)) == (chosen, (512, 1, 1))
    assert choose_mm_kernel("mm_bf16", _problem(5))[0] == chosen
    assert len(mm_tuner.choices()) == 5
    # Another shape, way of launching or GPU is another problem; so is a batched product.
    for other in (_problem(16, 4104), _problem(16, pdl=True), _problem(16, device=H100), _problem(64)):
        expected = select_mm_kernel(other[0], other[1], other[2], other[3])
        assert choose_mm_kernel("mm_bf16", other) == expected
    assert choose_mm_kernel("bmm_bf16", _problem(16)) == default
    mm_tuner.clear_cache()
    assert choose_mm_kernel("mm_bf16", _problem(16)) == default


def test_a_skipped_product_keeps_its_default(mm_tuner):
    with at.autotune(skip_ops={"mm_bf16"}):
        assert choose_mm_kernel("mm_bf16", _problem(16)) == select_mm_kernel(16, 4096, 4096, GPU)
    assert not mm_tuner.choices()


def test_no_measurement_while_capturing(mm_tuner, monkeypatch):
    monkeypatch.setattr(at.AutoTuner, "can_measure", lambda self, device: False)
    with at.autotune():
        assert choose_mm_kernel("mm_bf16", _problem(16)) == select_mm_kernel(16, 4096, 4096, GPU)
        monkeypatch.undo()
        assert not mm_tuner.choices()


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
