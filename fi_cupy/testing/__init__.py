"""Generators, tolerances and the bench harness, for tests and benches; nothing in the library imports it.

FlashInfer's names (`bench_gpu_time`, `attention_tflops_per_sec` …) are those of `fi_cupy.testing.utils`.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "attention_flops",
    "attention_flops_with_actual_seq_lens",
    "attention_tb_per_sec",
    "attention_tb_per_sec_with_actual_seq_lens",
    "attention_tflops_per_sec",
    "attention_tflops_per_sec_with_actual_seq_lens",
    "bench_gpu_time",
    "set_seed",
]


def __getattr__(name: str) -> Any:
    """The names of `utils`, imported on first use."""
    import importlib

    if name == "utils" or not name.startswith("_"):
        utils = importlib.import_module("fi_cupy.testing.utils")
        if name == "utils":
            return utils
        if name in utils.__all__:
            return getattr(utils, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
