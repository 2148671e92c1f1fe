"""Small compile jobs, and a way to run Python programs of their own, for the tests of compiler and cache."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from fi_cupy.jit.compiler import CompileJob

_OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v")
ROOT = Path(__file__).resolve().parents[2]


def toy_job(symbol: str = "toy", *, value: int = 1, padding: int = 0, arch: str = "80") -> CompileJob:
    """A kernel that stores `value`; `padding` bytes of comment make its source (and cache entry) larger."""
    source = f"// {'x' * padding}\n" * (padding > 0)
    source += f'extern "C" __global__ void {symbol}(int* out) {{ out[threadIdx.x] = {value}; }}\n'
    return CompileJob(symbol, source, (), arch, (f"-arch=sm_{arch}", *_OPTIONS))


def slow_job(symbol: str = "slow", length: int = 700) -> CompileJob:
    """A kernel that takes NVRTC some seconds: a long unrolled chain of divisions."""
    source = f"""
extern "C" __global__ void {symbol}(float* out) {{
  float x = out[0];
#pragma unroll
  for (int i = 0; i < {length}; ++i) x = x / (out[i] + x);
  out[0] = x;
}}
"""
    return CompileJob(symbol, source, (), "80", ("-arch=sm_80", *_OPTIONS))


def nested_job(depth: int = 30000) -> CompileJob:
    """A source so deeply nested that NVRTC overflows a small stack and dies of a segmentation fault."""
    source = 'extern "C" __global__ void nested(int* out) { out[0] = ' + "- " * depth + "out[1]; }"
    return CompileJob("nested", source, (), "80", ("-arch=sm_80", *_OPTIONS))


def python(code: str, *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start ``python -c code arguments`` with the checkout and this folder on its path; pipes for output."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def run_python(code: str, *arguments: str, timeout: float = 240, **environment: str) -> str:
    """Run a program to its end and return its standard output; a failure shows its standard error."""
    process = python(code, *arguments, **environment)
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, f"exit code {process.returncode}\n{out}\n{err}"
    return out
