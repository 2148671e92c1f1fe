"""Tuned choices on disk: what is kept, merged, refused and shared."""

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

import pytest
from kernel_jobs import run_python
from tuning_clock import GPU, ROWS, US, Clock, Runner, fresh_tuner, x

from fi_cupy import autotuner as at
from fi_cupy.device import DeviceInfo
from fi_cupy.errors import CacheError
from fi_cupy.gemm.select import H100
from fi_cupy.tuning import file


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    yield from fresh_tuner(monkeypatch, tmp_path)


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
