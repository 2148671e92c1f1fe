"""From kernel specification to a launch: render, compile, cache, load."""

from __future__ import annotations

from fi_cupy.jit.build import BuildStats, build_many, cache
from fi_cupy.jit.build import stats as _stats
from fi_cupy.jit.kernel import Kernel, load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.render import render
from fi_cupy.jit.spec import ARCHS, CppType, CppValue, KernelSpec, UserSource

__all__ = [
    "ARCHS",
    "BuildStats",
    "CppType",
    "CppValue",
    "Kernel",
    "KernelSpec",
    "ParamsStruct",
    "UserSource",
    "build_many",
    "cache",
    "load_kernel",
    "render",
    "stats",
]


def stats() -> BuildStats:
    """What this process has compiled and taken from the cache so far."""
    return _stats
