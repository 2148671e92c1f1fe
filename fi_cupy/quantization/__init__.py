"""Bit packing of masks, and casts to 8 and 4 bits with scales."""

from __future__ import annotations

from fi_cupy.jit.spec import KernelSpec
from fi_cupy.quantization import bits, kernels
from fi_cupy.quantization.bits import packbits, segment_packbits
from fi_cupy.quantization.fp4_quantization import (
    block_scale_interleave,
    e2m1_and_ufp8sf_scale_to_float,
    fp4_quantize,
    mxfp4_dequantize,
    mxfp4_quantize,
    nvfp4_block_scale_interleave,
    nvfp4_quantize,
    silu_and_mul_nvfp4_quantize,
)
from fi_cupy.quantization.fp8_quantization import (
    dequantize_fp8,
    per_block_cast_to_fp8,
    per_tensor_quant_fp8,
    per_token_cast_to_fp8,
    per_token_group_quant_8bit,
    per_token_quant_fp8,
    per_token_quant_int8,
    quantize_fp8,
)
from fi_cupy.quantization.layout import SfLayout
from fi_cupy.quantization.mxfp8_quantization import mxfp8_dequantize_host, mxfp8_quantize

__all__ = [
    "SfLayout",
    "block_scale_interleave",
    "dequantize_fp8",
    "e2m1_and_ufp8sf_scale_to_float",
    "fp4_quantize",
    "mxfp4_dequantize",
    "mxfp4_quantize",
    "mxfp8_dequantize_host",
    "mxfp8_quantize",
    "nvfp4_block_scale_interleave",
    "nvfp4_quantize",
    "packbits",
    "per_block_cast_to_fp8",
    "per_tensor_quant_fp8",
    "per_token_cast_to_fp8",
    "per_token_group_quant_8bit",
    "per_token_quant_fp8",
    "per_token_quant_int8",
    "quantize_fp8",
    "segment_packbits",
    "silu_and_mul_nvfp4_quantize",
]


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances of packing and casting."""
    return bits.kernel_specs() + kernels.kernel_specs()
