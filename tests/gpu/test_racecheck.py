"""compute-sanitizer's racecheck over small runs of the Hopper prefill kernel: no hazard in shared memory."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import race_prefill_hopper

from fi_cupy.device import device_info

pytest.importorskip("cupy")
TOOL = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.long
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("case", [*race_prefill_hopper.CASES, "control"])
def test_prefill_hopper(case):
    """ "control" has a race: the tool sees one where there is one."""
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    command = [
        TOOL, "--tool", "racecheck", "--kernel-name", "kernel_substring=prefill_hopper", "--show-backtrace", "no",
        "--num-cuda-barriers", "64", sys.executable, race_prefill_hopper.__file__, case,
    ]  # fmt: skip
    root = str(Path(race_prefill_hopper.__file__).parents[2])
    paths = os.pathsep.join(x for x in (root, os.environ.get("PYTHONPATH", "")) if x)
    found = subprocess.run(
        command, capture_output=True, text=True, timeout=420, env={**os.environ, "PYTHONPATH": paths}, check=False
    )
    said = found.stdout + found.stderr
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", said)
    assert summary is not None and "\nright\n" in said, said[-3000:]
    assert (int(summary[1]) > 0) == (case == "control"), said[-6000:]
