"""From kernel specification to a launch: render, compile, cache, load."""

from __future__ import annotations

from typing import Any

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
    "attention",
    "build_many",
    "cache",
    "compile",
    "define_variant",
    "load_kernel",
    "ops",
    "render",
    "stats",
]


def stats() -> BuildStats:
    """What this process has compiled and taken from the cache so far."""
    return _stats


def __getattr__(name: str) -> Any:
    """Variants stand above this package: they are imported on first use."""
    if name in ("compile", "define_variant"):
        from fi_cupy import variants

        return getattr(variants, name)
    if name.startswith(("gen_customize_", "gen_batch_prefill_attention_sink_module")):
        from fi_cupy import customize

        return getattr(customize, name)
    if name in ("attention", "ops"):
        import importlib

        return importlib.import_module(f"fi_cupy.jit.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
