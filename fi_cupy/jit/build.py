"""From a specification to machine code: render, look in the cache, compile if allowed, store."""

from __future__ import annotations

import shlex

from fi_cupy.jit import env
from fi_cupy.jit.compiler import CompileJob, target_options
from fi_cupy.jit.render import render
from fi_cupy.jit.sources import header_closure
from fi_cupy.jit.spec import KernelSpec

_OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v", "-diag-suppress=177")


def job_for(spec: KernelSpec, arch: str) -> CompileJob:
    """Everything the compiler needs for `spec` on `arch`."""
    source = render(spec)
    options = [*target_options(arch), *_OPTIONS]
    if env.LINEINFO.flag():
        options.append("-lineinfo")
    options += shlex.split(env.EXTRA_FLAGS.get() or "")
    return CompileJob(spec.symbol, source, tuple(header_closure(source.encode()).items()), arch, tuple(options))
