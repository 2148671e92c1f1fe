"""fi_cupy: kernels for LLM serving, compiled at run time through CuPy."""

from __future__ import annotations

from fi_cupy import (
    norm as norm,
)
from fi_cupy.norm import (
    fused_add_rmsnorm,
    gemma_fused_add_rmsnorm,
    gemma_rmsnorm,
    layernorm,
    rmsnorm,
)

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "fused_add_rmsnorm",
    "gemma_fused_add_rmsnorm",
    "gemma_rmsnorm",
    "layernorm",
    "rmsnorm",
]
