"""Which kernel a plan or call took, and why, in the log: logger "fi_cupy.attention", level DEBUG.

What is said is `fi_cupy.attention.explain`'s. With the level off a plan pays for one look at it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from fi_cupy.jit import env

_log = logging.getLogger("fi_cupy.attention")


def logging_choices() -> bool:
    """Whether anybody listens."""
    return _log.isEnabledFor(logging.DEBUG)


def log_wrapper(wrapper: Any, method: str) -> None:
    """After a method that decides: say what the wrapper launches. `method`: its full name."""
    if logging_choices():
        from fi_cupy.attention import explain

        _log.debug("%s: %s", method, explain(wrapper))


def log_call(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """After a call of a function with these arguments: say what it launched."""
    from fi_cupy.attention import explain

    _log.debug("%s: %s", function.__name__, explain(function, **given))


def log_as_environment_says() -> None:
    """Set the level that FI_CUPY_LOGGING_LEVEL names, on import; where no handler is, the log goes to standard error.

    Raises
    ------
    ArgumentError
        It names no level.
    """
    from fi_cupy.utils import set_log_level

    level = env.LOGGING_LEVEL.get()
    if level is not None:
        set_log_level(level)
        logger = logging.getLogger("fi_cupy")
        if not logger.hasHandlers():
            logger.addHandler(logging.StreamHandler())
