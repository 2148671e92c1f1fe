"""fi_cupy: kernels for LLM serving, compiled at run time through CuPy."""

from __future__ import annotations

__version__ = "0.1.0"
