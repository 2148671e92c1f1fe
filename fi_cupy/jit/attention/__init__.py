"""FlashInfer's names for variants in its own form: the generators, and declarations that come ready made."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """The generators stand above this package: they are imported on first use."""
    if name.startswith("gen_"):
        from fi_cupy import customize

        return getattr(customize, name)
    if name == "variants":
        import importlib

        return importlib.import_module("fi_cupy.jit.attention.variants")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
