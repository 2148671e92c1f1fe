"""compute-sanitizer's racecheck over small runs of Hopper prefill, products, routing, casts, sampling: no hazard."""

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
import race_gemm
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


def sanitize(tool: str, options: list[str], script: str, *arguments: str) -> str:
    """What the tool and the script say, which ends with "right"."""
    command = [str(TOOL), "--tool", tool, "--show-backtrace", "no", *options, sys.executable, script, *arguments]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(x for x in (root, os.environ.get("PYTHONPATH", "")) if x)
    said = output(command, {**os.environ, "PYTHONPATH": paths}, 120)
    assert "\nright\n" in said, said[-3000:]
    return said


def hazards(said: str) -> int:
    """How many racecheck has found."""
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", said)
    assert summary is not None, said[-3000:]
    return int(summary[1])


@pytest.mark.alone
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("case", [*race_prefill_hopper.CASES, "control"])
def test_prefill_hopper(case):
    """ "control" has a race: the tool sees one where there is one."""
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    options = ["--kernel-name", "kernel_substring=prefill_hopper", "--num-cuda-barriers", "64"]
    said = sanitize("racecheck", options, race_prefill_hopper.__file__, case)
    assert (hazards(said) > 0) == (case == "control"), said[-6000:]


@pytest.mark.alone
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
def test_products_routing_and_casts():
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    said = sanitize("racecheck", ["--num-cuda-barriers", "64"], race_gemm.__file__)
    assert hazards(said) == 0, said[-6000:]


@pytest.mark.alone
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("shape", race_sampling.SHAPES)
def test_sampling(shape):
    """In every launch shape; what it computes is held to the CPU's results as well."""
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    said = sanitize("racecheck", ["--num-cuda-barriers", "64"], race_sampling.__file__, shape)
    assert hazards(said) == 0, said[-6000:]
