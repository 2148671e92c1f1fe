"""Names that callers of the attention functions pass as numbers, and the ALiBi slopes.

Source: flashinfer.utils.
"""

from __future__ import annotations

from enum import IntEnum

from fi_cupy.reference.attention import get_alibi_slopes

__all__ = ["MaskMode", "PosEncodingMode", "TensorLayout", "get_alibi_slopes"]


class MaskMode(IntEnum):
    """Which keys a query may see, for the functions that take it as a number."""

    NON_CAUSAL = 0
    CAUSAL = 1
    CUSTOM = 2
    MULTIITEMSCORING = 3


class PosEncodingMode(IntEnum):
    """Position encoding inside attention; the functions that take it as text take the member's name."""

    NONE = 0
    ROPE_LLAMA = 1
    ALIBI = 2


class TensorLayout(IntEnum):
    """Order of a page's tokens (N), heads (H) and elements (D)."""

    NHD = 0
    HND = 1
