"""Runs a script under compute-sanitizer."""

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
    """What the tool and the script say; the script prints "right" or "all right" at its end."""
    command = [str(TOOL), "--tool", tool, "--show-backtrace", "no", *options, sys.executable, script, *arguments]
    root = str(Path(__file__).parents[2])
    paths = os.pathsep.join(x for x in (root, os.environ.get("PYTHONPATH", "")) if x)
    said = output(command, {**os.environ, "PYTHONPATH": paths}, 240)
    assert re.search(r"\n(all )?right\n", said), said[-3000:]
    return said
