"""Matrix products."""

from __future__ import annotations

from fi_cupy.gemm.dense import bmm_bf16, mm_bf16
from fi_cupy.gemm.select import kernel_specs

__all__ = ["bmm_bf16", "kernel_specs", "mm_bf16"]
