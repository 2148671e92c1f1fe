"""The code for sm_75 and sm_80, as PTX that this GPU translates: the tests marked `older_archs`, run once for each."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fi_cupy.device import default_target, device_info
from fi_cupy.dtypes import bfloat16
from fi_cupy.jit import env
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.norm import norm_spec

cupy = pytest.importorskip("cupy")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.older_archs
def test_code_is_made_for_the_target_that_the_environment_names():
    kernel = load_kernel(norm_spec(bfloat16, bfloat16, bfloat16, 576, 8), 0)
    assert kernel.meta.arch == (env.TARGET.get() or default_target(device_info(0).number))


@pytest.mark.long
@pytest.mark.parametrize("target", ["compute_75", "compute_80"])
def test_marked_tests_pass_with_older_code(target):
    if env.TARGET.get():
        pytest.skip(f"{env.TARGET.names[0]} is set already")
    if device_info(0).number <= int(target.removeprefix("compute_")):
        pytest.skip(f"this GPU is no newer than {target}")
    variables = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    variables[env.TARGET.names[0]] = target
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "older_archs", "-q", "-x", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{target}:\n{done.stdout[-6000:]}\n{done.stderr[-2000:]}"
