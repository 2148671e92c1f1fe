"""compute-sanitizer over small runs of Hopper prefill and of sampling: no hazard in shared memory."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import race_prefill_hopper
import race_sampling

from fi_cupy.device import device_info

pytest.importorskip("cupy")
TOOL = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def output(command: list[str], variables: dict[str, str], seconds: float) -> str:
    """What it prints; with its children it is ended after that time."""
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=variables, start_new_session=True)
        try:
            process.wait(seconds)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        out.seek(0)
        return out.read()


def hazards_of(script, case, *options):
    """How many hazards racecheck sees in a run of a script, and everything that was printed."""
    command = [
        TOOL, "--tool", "racecheck", *options, "--show-backtrace", "no",
        "--num-cuda-barriers", "64", sys.executable, script, case,
    ]  # fmt: skip
    root = str(Path(script).parents[2])
    paths = os.pathsep.join(x for x in (root, os.environ.get("PYTHONPATH", "")) if x)
    said = output(command, {**os.environ, "PYTHONPATH": paths}, 120)
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", said)
    assert summary is not None and "\nright\n" in said, said[-3000:]
    return int(summary[1]), said


@pytest.mark.alone
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("case", [*race_prefill_hopper.CASES, "control"])
def test_prefill_hopper(case):
    """ "control" has a race: the tool sees one where there is one."""
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    hazards, said = hazards_of(race_prefill_hopper.__file__, case, "--kernel-name", "kernel_substring=prefill_hopper")
    assert (hazards > 0) == (case == "control"), said[-6000:]


@pytest.mark.alone
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("case", [*race_sampling.SHAPES, "control"])
def test_sampling(case):
    """In every launch shape, what it computes is held to the CPU's results as well."""
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    hazards, said = hazards_of(race_sampling.__file__, case)
    assert (hazards > 0) == (case == "control"), said[-6000:]
