"""Matrix products."""

from __future__ import annotations

from fi_cupy.gemm.deepgemm import batch_deepgemm_fp8_nt_groupwise, group_deepgemm_fp8_nt_groupwise, runs_specs
from fi_cupy.gemm.dense import bmm_bf16, mm_bf16, mm_bf16_swiglu
from fi_cupy.gemm.few_fp8 import kernel_specs as few_fp8_specs
from fi_cupy.gemm.fp8 import bmm_fp8, mm_fp8
from fi_cupy.gemm.fp8_blocks import (
    fp8_blockscale_gemm_sm90,
    gemm_fp8_nt_blockscaled,
    gemm_fp8_nt_groupwise,
    group_gemm_fp8_nt_groupwise,
)
from fi_cupy.gemm.group import group_specs
from fi_cupy.gemm.quantise import quantise_specs
from fi_cupy.gemm.segment import SegmentGEMMWrapper, group_gemm, offsets_spec
from fi_cupy.gemm.select import kernel_specs as dense_specs
from fi_cupy.jit.spec import KernelSpec

__all__ = [
    "SegmentGEMMWrapper",
    "batch_deepgemm_fp8_nt_groupwise",
    "bmm_bf16",
    "bmm_fp8",
    "fp8_blockscale_gemm_sm90",
    "gemm_fp8_nt_blockscaled",
    "gemm_fp8_nt_groupwise",
    "group_deepgemm_fp8_nt_groupwise",
    "group_gemm",
    "group_gemm_fp8_nt_groupwise",
    "kernel_specs",
    "mm_bf16",
    "mm_bf16_swiglu",
    "mm_fp8",
]


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances of every product."""
    return [*dense_specs(), *few_fp8_specs(), *group_specs(), *quantise_specs(), *runs_specs(), offsets_spec()]
