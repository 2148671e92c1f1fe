"""fi_cupy: kernels for LLM serving, compiled at run time through CuPy.

The public names are listed in ``__init__.pyi`` and imported on first use: ``import fi_cupy`` costs a few milliseconds.
"""

from __future__ import annotations

import os

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

if os.environ.get("FI_CUPY_LOGGING_LEVEL") or os.environ.get("FLASHINFER_LOGGING_LEVEL"):
    from fi_cupy.choice_log import log_as_environment_says

    log_as_environment_says()

if os.environ.get("FI_CUPY_PRELOAD"):
    from fi_cupy.profiles import preload_from_environment

    preload_from_environment()

if os.environ.get("FI_CUPY_LOGLEVEL") or os.environ.get("FLASHINFER_LOGLEVEL"):
    from fi_cupy.api_logging import install

    install()
