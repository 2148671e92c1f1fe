"""From kernel specification to a launch: render, compile, cache, load; modules by name; attention variants.

The ``gen_customize_*_module`` of `fi_cupy.customize` are here, too, as in FlashInfer.
"""

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
    "JitModule",
    "JitSpec",
    "JitSpecRegistry",
    "JitSpecStatus",
    "Kernel",
    "KernelSpec",
    "MissingJITCacheError",
    "ParamsStruct",
    "UserSource",
    "attention",
    "build_jit_specs",
    "build_many",
    "cache",
    "check_cuda_arch",
    "clear_cache_dir",
    "compile",
    "define_variant",
    "gen_act_and_mul_module",
    "gen_batch_attention_module",
    "gen_batch_decode_module",
    "gen_batch_mla_module",
    "gen_batch_prefill_module",
    "gen_cascade_module",
    "gen_gemm_module",
    "gen_jit_spec",
    "gen_norm_module",
    "gen_page_module",
    "gen_pod_module",
    "gen_quantization_module",
    "gen_rope_module",
    "gen_sampling_module",
    "gen_single_decode_module",
    "gen_single_prefill_module",
    "gen_topk_module",
    "get_batch_attention_uri",
    "get_batch_decode_uri",
    "get_batch_mla_uri",
    "get_batch_prefill_uri",
    "get_pod_uri",
    "get_single_decode_uri",
    "get_single_prefill_uri",
    "jit_spec_registry",
    "load_kernel",
    "ops",
    "render",
    "stats",
]


def stats() -> BuildStats:
    """What this process has compiled and taken from the cache so far."""
    return _stats


def __getattr__(name: str) -> Any:
    """Variants and modules stand above this package: they are imported on first use."""
    if name in ("compile", "define_variant"):
        from fi_cupy import variants

        return getattr(variants, name)
    if name.startswith(("gen_customize_", "gen_batch_prefill_attention_sink_module")):
        from fi_cupy import customize

        return getattr(customize, name)
    import importlib

    if name in ("attention", "ops", "core", "modules"):
        return importlib.import_module(f"fi_cupy.jit.{name}")
    if name in __all__:
        for place in ("core", "modules"):
            module = importlib.import_module(f"fi_cupy.jit.{place}")
            if name in module.__all__:
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
