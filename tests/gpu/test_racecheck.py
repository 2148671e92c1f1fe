"""compute-sanitizer's racecheck over small runs of the attention kernels: no hazard in shared memory."""

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
import race_mla
import race_prefill_hopper

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


def sanitized(tool: str, script: str, cases: list[str], options: list[str]) -> str:
    """What a tool and a script under it say."""
    command = [TOOL, "--tool", tool, "--show-backtrace", "no", *options, sys.executable, script, *cases]
    paths = os.pathsep.join(x for x in (str(Path(script).parents[2]), os.environ.get("PYTHONPATH", "")) if x)
    return output(command, {**os.environ, "PYTHONPATH": paths}, 120)


@pytest.mark.alone
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("case", [*race_prefill_hopper.CASES, "control"])
def test_prefill_hopper(case):
    """ "control" has a race: the tool sees one where there is one."""
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    more = ["--kernel-name", "kernel_substring=prefill_hopper", "--num-cuda-barriers", "64"]
    said = sanitized("racecheck", race_prefill_hopper.__file__, [case], more)
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", said)
    assert summary is not None and "\nright\n" in said, said[-3000:]
    assert (int(summary[1]) > 0) == (case == "control"), said[-6000:]


@pytest.mark.alone
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
def test_mla():
    """The portable kernel. All cases in one process, since the tool's start takes longer than they do.

    Of the Hopper kernel the tool (2025.3) reports hazards where one warpgroup arrives at a named barrier (bar.arrive)
    and the other one waits for it (bar.sync), and where one lane arrives at an mbarrier for its warp. Both are ordered;
    with bar.sync in both places and every lane arriving it reports none in any case (NOTES.md). memcheck has all cases.
    """
    cases = [name for name in race_mla.CASES if "hopper" not in name]
    more = ["--kernel-name", "kernel_substring=mla", "--num-cuda-barriers", "4096"]
    said = sanitized("racecheck", race_mla.__file__, cases, more)
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", said)
    assert summary is not None and "\nall right\n" in said, said[-3000:]
    assert int(summary[1]) == 0, said[-6000:]
