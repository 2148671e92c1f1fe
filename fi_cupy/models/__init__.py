"""A Llama-architecture language model written against fi_cupy's public functions.

The modules are imported by name, since they need the packages of the `demo` extra (gguf, tokenizers)::

    from fi_cupy.models.generate import run_generate
"""

from __future__ import annotations

from fi_cupy.errors import FiCupyError


class ModelError(FiCupyError):
    """A model file, its tokenizer or a request to generate text cannot be used; the message says why."""


__all__ = ["ModelError"]
