"""Every operator in plain NumPy: the backend for arrays in host memory, and the oracle of the tests.

Functions take and return ndarrays and are pure, except those whose name ends in an underscore, which write into the
caches they are given. They assume valid input; the public layer checks it.
"""

from __future__ import annotations

from fi_cupy.reference import (
    activation,
    attention,
    block_formats,
    cascade,
    gemm,
    lookup,
    masks,
    mla,
    moe,
    norm,
    page,
    quantization,
    rope,
    sampling,
    sampling_filters,
    sparse,
    topk,
)

__all__ = [
    "activation",
    "attention",
    "block_formats",
    "cascade",
    "gemm",
    "lookup",
    "masks",
    "mla",
    "moe",
    "norm",
    "page",
    "quantization",
    "rope",
    "sampling",
    "sampling_filters",
    "sparse",
    "topk",
]
