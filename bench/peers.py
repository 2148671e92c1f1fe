"""What torch (and FlashInfer, where it is installed) do for the same operator, for the bench files beside this.

The harness hands each peer its input set with torch tensors, and reports a peer as missing when it raises ImportError.
"""

from __future__ import annotations

import functools
from typing import Any


@functools.lru_cache(maxsize=1)
def torch() -> Any:
    """The torch module, imported when a peer first runs."""
    import torch

    return torch


@functools.lru_cache(maxsize=1)
def flashinfer() -> Any:
    """The FlashInfer module, imported when a peer first runs."""
    import flashinfer

    return flashinfer


def rms_norm(x: Any, weight: Any, eps: float = 1e-6) -> Any:
    """torch's own RMSNorm."""
    return torch().nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


def fused_add_rms_norm(x: Any, residual: Any, weight: Any, eps: float = 1e-6) -> Any:
    """The residual's addition in place, then RMSNorm: two operators in torch."""
    residual.add_(x)
    return rms_norm(residual, weight, eps)


def layer_norm(x: Any, weight: Any, bias: Any, eps: float = 1e-6) -> Any:
    """torch's LayerNorm, which wants weight and bias in the input's type."""
    return torch().nn.functional.layer_norm(x, x.shape[-1:], weight, bias, eps)


def silu_and_mul(x: Any) -> Any:
    """SiLU of the first half times the second half: two operators in torch."""
    half = x.shape[-1] // 2
    return torch().nn.functional.silu(x[..., :half]) * x[..., half:]


def matmul(a: Any, b: Any, out: Any = None) -> Any:
    """cuBLAS through torch; b is [k, n] (pass the transpose of an [n, k] weight)."""
    return torch().mm(a, b, out=out) if out is not None else torch().mm(a, b)


def attention(q: Any, k: Any, v: Any, *, causal: bool, backend: str = "cudnn") -> Any:
    """torch's scaled_dot_product_attention on [batch, heads, length, head_dim]; backend "cudnn" or "flash"."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}[backend]
    with sdpa_kernel(chosen):
        return torch().nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
        )
