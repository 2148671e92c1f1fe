"""compute-sanitizer's memcheck over small runs of sampling, decode and products: no access outside of an allocation."""

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

import memcheck_cases
import pytest

pytest.importorskip("cupy")
TOOL = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


@pytest.mark.alone
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("case", memcheck_cases.CASES)
def test_no_access_outside(case):
    script = Path(memcheck_cases.__file__)
    paths = os.pathsep.join(x for x in (str(script.parents[2]), os.environ.get("PYTHONPATH", "")) if x)
    # What the program asks the driver and is refused (whether a function is there) is no error.
    command = [TOOL, "--tool", "memcheck", "--report-api-errors", "no", sys.executable, str(script), case]
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "PYTHONPATH": paths},
            start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(120)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        out.seek(0)
        said = out.read()
    summary = re.search(r"ERROR SUMMARY: (\d+) error", said)
    assert summary is not None and "\nall right\n" in said, said[-3000:]
    assert int(summary[1]) == 0, said[-6000:]
