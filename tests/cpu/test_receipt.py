"""Kernels against the receipt of the last GPU run, and the receipt mechanism itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import gpu_receipt
import pytest
from gpu_receipt import complaints, kernel_headers, source_hashes, stale_files, unverified
from kernel_jobs import ROOT

from fi_cupy.device import num_devices
from fi_cupy.jit import sources


def _receipt() -> dict:
    path = gpu_receipt.RECEIPT
    return json.loads(path.read_text()) if path.exists() else {}


def _excuses() -> dict[str, str]:
    return unverified(gpu_receipt.UNVERIFIED.read_text()) if gpu_receipt.UNVERIFIED.exists() else {}


def test_kernels_have_passed_on_a_gpu_or_are_excused():
    found = complaints(_receipt(), source_hashes(), kernel_headers(), _excuses())
    assert not found, "\n".join(["run tests/gpu on a GPU, or name the file and the reason in unverified.txt:", *found])


def test_receipt_names_no_machine_path():
    text = gpu_receipt.RECEIPT.read_text() if gpu_receipt.RECEIPT.exists() else ""
    assert str(ROOT) not in text
    assert "/home/" not in text


# --- the mechanism -------------------------------------------------------------------------------------------------

HASHES = {"a.cuh": "1", "b.cuh": "2", "common/c.cuh": "3", "templates/t.jinja": "4"}
HEADERS = {"a.cuh", "b.cuh"}
GOOD = {
    "counts": {"passed": 5, "failed": 0, "skipped": 1},
    "failures": [],
    "kernels_run": {"a.cuh": 3, "b.cuh": 1},
    "sources": HASHES,
}


def test_a_good_receipt_has_no_complaints():
    assert complaints(GOOD, HASHES, HEADERS, {}) == []


@pytest.mark.parametrize("name", HASHES)
def test_every_changed_file_is_named_unless_excused(name):
    changed = {**HASHES, name: "edited"}
    assert complaints(GOOD, changed, HEADERS, {}) == [
        f"{name}: changed since the GPU run, itself or in what it includes"
    ]
    assert complaints(GOOD, changed, HEADERS, {name: "no GPU at hand"}) == []
    assert complaints(GOOD, changed, HEADERS, {name: ""}) == [f"{name}: named in unverified.txt without a reason"]


def test_new_files_and_kernels_that_never_ran_are_named():
    assert complaints(GOOD, {**HASHES, "new.cuh": "5"}, HEADERS, {}) == ["new.cuh: not in the receipt"]
    idle = {**GOOD, "kernels_run": {"a.cuh": 3}}
    assert complaints(idle, HASHES, HEADERS, {}) == ["b.cuh: none of its kernels was run"]
    assert set(stale_files({}, HASHES, HEADERS)) == set(HASHES)


def test_excuses_that_are_not_needed_are_named():
    assert complaints(GOOD, HASHES, HEADERS, {"a.cuh": "why"}) == [
        "a.cuh: verified by the receipt, so take it out of unverified.txt"
    ]
    assert complaints(GOOD, HASHES, HEADERS, {"gone.cuh": "why"}) == [
        "gone.cuh: named in unverified.txt, but there is no such file"
    ]


def test_failures_cannot_be_excused():
    bad = {**GOOD, "counts": {"passed": 5, "failed": 1, "skipped": 0}, "failures": ["tests/gpu/test_a.py::test"]}
    assert complaints(bad, HASHES, HEADERS, {}) == ["failed on the GPU: tests/gpu/test_a.py::test"]
    empty = {**GOOD, "counts": {"passed": 0, "failed": 0, "skipped": 9}}
    assert complaints(empty, HASHES, HEADERS, {}) == ["no test passed on the GPU"]


def test_only_a_few_tests_may_be_left_out_for_want_of_time():
    few = {**GOOD, "counts": {"passed": 980, "failed": 0, "skipped": 20}, "skips": {gpu_receipt.NO_TIME: 20}}
    assert complaints(few, HASHES, HEADERS, {}) == []
    many = {**few, "skips": {gpu_receipt.NO_TIME: 21}}
    assert complaints(many, HASHES, HEADERS, {}) == ["21 tests were not begun in the time given"]


def test_unverified_file():
    text = "# comment\n\nnorm.cuh: a reason: with a colon\n  rope.cuh :x\nbare.cuh\n"
    assert unverified(text) == {"norm.cuh": "a reason: with a colon", "rope.cuh": "x", "bare.cuh": ""}


def test_hash_covers_what_a_header_includes(tmp_path, monkeypatch):
    kernels = tmp_path / "kernels"
    shutil.copytree(sources.kernel_root(), kernels)
    monkeypatch.setattr(sources, "kernel_root", lambda: kernels)
    before = source_hashes()
    base = kernels / "common" / "base.cuh"
    base.write_bytes(base.read_bytes() + b"// edited\n")
    after = source_hashes()
    changed = {name for name in before if before[name] != after[name]}
    assert {"common/base.cuh", "norm.cuh"} <= changed
    assert not any(name.startswith("templates/") for name in changed)
    assert before.keys() == after.keys()


_CONFTEST = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from pathlib import Path
from gpu_receipt import Recorder

def pytest_configure(config):
    describe = lambda: {{"device": "made up"}}
    kernels = lambda: {{"norm.cuh": 2}}
    config.pluginmanager.register(Recorder(Path(__file__).parent, Path({receipt!r}), describe, kernels))
"""
_TESTS = """
import pytest
def test_one(): pass
def test_two(): pass
@pytest.mark.skipif(True, reason="not today")
def test_skipped(): pass
"""


@pytest.fixture
def session(tmp_path):
    """Run pytest on a folder of three made-up tests with a `Recorder`; return (exit code, receipt or None, output)."""
    folder = tmp_path / "suite"
    folder.mkdir()
    receipt = tmp_path / "receipt.json"
    text = _CONFTEST.format(root=str(ROOT), tests=str(ROOT / "tests"), receipt=str(receipt))
    (folder / "conftest.py").write_text(text)
    (folder / "test_it.py").write_text(_TESTS)
    (folder / "pytest.ini").write_text("[pytest]\n")

    def run(*arguments: str, extra: str = ""):
        (folder / "test_it.py").write_text(_TESTS + extra)
        env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
            cwd=folder, env=env, capture_output=True, text=True,
        )  # fmt: skip
        return done.returncode, json.loads(receipt.read_text()) if receipt.exists() else None, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("arguments", [[], ["."], ["-n", "2"]])
def test_a_whole_run_writes_the_receipt(session, arguments):
    if "-n" in arguments:
        pytest.importorskip("xdist")
    code, receipt, output = session(*arguments)
    assert code == 0, output
    assert receipt is not None, output
    assert receipt["device"] == "made up"
    assert receipt["counts"] == {"passed": 2, "failed": 0, "skipped": 1}
    assert receipt["failures"] == []
    assert receipt["skips"] == {"not today": 1}
    assert receipt["kernels_run"]["norm.cuh"] >= 2
    assert receipt["sources"] == source_hashes()
    assert "receipt written to" in output


@pytest.mark.parametrize("arguments", [["-k", "one"], ["test_it.py::test_one"], ["test_it.py"], ["--collect-only"]])
def test_a_part_of_the_tests_writes_no_receipt(session, arguments):
    code, receipt, output = session(*arguments)
    assert code == 0, output
    assert receipt is None
    assert arguments == ["--collect-only"] or "no receipt" in output


def test_a_run_that_stops_early_writes_no_receipt(session):
    extra = "\ndef test_bad(): assert False\ndef test_more(): pass\n"
    assert session("-x", extra=extra)[1] is None


@pytest.mark.parametrize(
    "extra,test",
    [
        ("def test_bad(): assert False", "test_bad"),
        ("@pytest.fixture\ndef broken(): 1 / 0\ndef test_setup(broken): pass", "test_setup"),
        ("@pytest.fixture\ndef broken():\n yield\n 1 / 0\ndef test_teardown(broken): pass", "test_teardown"),
    ],
)
def test_failures_are_written_down(session, extra, test):
    code, receipt, output = session(extra="\n" + extra + "\n")
    assert code == 1
    assert receipt is not None, output
    assert receipt["counts"] == {"passed": 2, "failed": 1, "skipped": 1}
    assert receipt["failures"] == [f"test_it.py::{test}"]


@pytest.mark.skipif(num_devices() > 0, reason="this machine has a GPU")
def test_gpu_tests_skip_with_a_reason_without_a_gpu():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-rs", "-p", "no:cacheprovider"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    assert "no GPU" in done.stdout
    assert " passed" not in done.stdout
