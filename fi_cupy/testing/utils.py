"""FlashInfer's testing helpers that users of block-scaled products call: casts with scales, and back."""

from __future__ import annotations

from fi_cupy.quantization import dequantize_fp8, per_block_cast_to_fp8, per_token_cast_to_fp8, quantize_fp8

__all__ = ["dequantize_fp8", "per_block_cast_to_fp8", "per_token_cast_to_fp8", "quantize_fp8"]
