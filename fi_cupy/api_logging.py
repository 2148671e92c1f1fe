"""The log of calls: with FI_CUPY_LOGLEVEL set when fi_cupy is imported, every public call is logged before it runs.

Levels: 1 the name; 3 arguments and results (shape, dtype, strides, device); 5 also figures of the values, which waits
for the GPU; 10 also files from which `replay_from_dump`, or ``fi-cupy replay --dir DIR``, makes the calls again. What
goes in is in the log before the function runs, so that a crash leaves the call that caused it. FI_CUPY_LOGDEST says
where the log goes, FI_CUPY_DUMP_* what is written and how much. FlashInfer's names of the variables are read, too.

Without a level nothing is wrapped, and calls cost what they cost.

Source: flashinfer.api_logging.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import itertools
import logging
import os
import sys
import threading
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import numpy as np

from fi_cupy.api_dump import Dumper, encode, is_array
from fi_cupy.api_dump import replay_from_dump as replay_from_dump
from fi_cupy.api_dump import replay_sequence as replay_sequence
from fi_cupy.arrays import view
from fi_cupy.errors import ArgumentError, UnsupportedError
from fi_cupy.jit import env

__all__ = ["flashinfer_api", "flush_graph_dumps", "install", "replay_from_dump", "replay_sequence"]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_METHODS = (
    "__init__", "plan", "begin_forward", "run", "forward", "run_return_lse", "forward_return_lse", "end_forward",
    "reset_workspace_buffer",
)  # fmt: skip
_log = logging.getLogger("fi_cupy.api")


def log_level() -> int:
    """The environment's level.

    Raises
    ------
    ArgumentError
        It is no number.
    """
    text = env.LOG_LEVEL.get()
    try:
        return 0 if text is None else int(text)
    except ValueError:
        raise ArgumentError(f"{env.LOG_LEVEL.names[0]} is {text!r}, expected 0, 1, 3, 5 or 10") from None


class _State:
    """What the log needs beside its level, made with the first wrapped function."""

    def __init__(self) -> None:
        self.level = log_level()
        self.dumper = Dumper() if self.level >= 10 else None
        self.inside = threading.local()
        self.numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self.count = itertools.count(1)
        self.writes = True
        destination = (env.LOG_DEST.get() or "stdout").replace("%i", str(os.getpid()))
        streams = {"stdout": sys.stdout, "stderr": sys.stderr}
        handler: logging.Handler
        if destination in streams:
            handler = logging.StreamHandler(streams[destination])
        else:
            try:
                handler = logging.FileHandler(destination, mode="a")
            except OSError as error:
                raise ArgumentError(
                    f"{env.LOG_DEST.names[0]} is {destination!r}, which cannot be written ({error}); expected "
                    "'stdout', 'stderr' or a file"
                ) from None
        handler.setFormatter(logging.Formatter("[%(asctime)s] %(message)s"))
        _log.handlers[:] = [handler]
        _log.setLevel(logging.DEBUG)
        _log.propagate = False
        if self.dumper is not None:
            _log.info("calls are written to %s, with the values of all arrays", self.dumper.root.absolute())

    def stop_writing(self, reason: object) -> None:
        """The caller's program goes on when a disk is full."""
        self.writes = False
        _log.warning("%s: no more calls are written", reason)

    def number(self, target: Any) -> int:
        """An object's number: its address may be used again."""
        if target not in self.numbers:
            self.numbers[target] = next(self.count)
        return self.numbers[target]


_state: _State | None = None


def _get_state() -> _State:
    global _state
    if _state is None:
        _state = _State()
    return _state


def _capturing() -> bool:
    """Whether the current stream is being captured: then no value can be read."""
    cupy, torch = sys.modules.get("cupy"), sys.modules.get("torch")
    if cupy is not None and cupy.is_available():
        from fi_cupy.tuning.timer import capturing

        return capturing()
    return torch is not None and torch.cuda.is_available() and bool(torch.cuda.is_current_stream_capturing())


def _describe(value: Any, level: int, figures: bool) -> str:
    """One value as text."""
    if is_array(value):
        x = view(value)
        place = "cpu" if x.is_cpu else f"cuda:{x.device}"
        text = f"{x.framework} {x.dtype.name}{list(x.shape)} strides {list(x.strides)} on {place}"
        if level >= 5 and figures and x.size:
            host = x.host()
            if host.dtype != np.bool_ and "float" not in x.dtype.name:
                return f"{text} min {host.min()} max {host.max()}"
            numbers = host.astype(np.float64)
            known = numbers[np.isfinite(numbers)]
            shown = (
                f"min {known.min():.4g} max {known.max():.4g} mean {known.mean():.4g}" if known.size else "none finite"
            )
            text += f" {shown}, {int(np.isnan(numbers).sum())} nan, {int(np.isinf(numbers).sum())} inf"
        return text
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}({', '.join(_describe(x, level, figures) for x in value)})"
    return repr(value)[:200]


def _wrapped(function: Callable[..., Any], name: str, module: str, method: bool) -> Callable[..., Any]:
    state = _get_state()

    @functools.wraps(function)
    def logged(*args: Any, **kwargs: Any) -> Any:
        if getattr(state.inside, "call", False):  # a call inside another one
            return function(*args, **kwargs)
        state.inside.call = True
        try:
            return _logged_call(state, function, name, module, method, args, kwargs)
        finally:
            state.inside.call = False

    logged._fi_cupy_logged = True  # type: ignore[attr-defined]
    return logged


def _logged_call(
    state: _State, function: Callable[..., Any], name: str, module: str, method: bool, args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:  # fmt: skip
    own = args[0] if method else None
    rest = args[1:] if method else args
    where = f"{name} (object {state.number(own)})" if method else name
    _log.info("call %s", where)
    capturing = state.level >= 5 and _capturing()
    if state.level >= 3:
        for label, value in (*((f"[{i}]", x) for i, x in enumerate(rest)), *kwargs.items()):
            _log.info("  %s = %s", label, _describe(value, state.level, not capturing))
    folder, arrays = _begin_dump(state, function, name, module, own, rest, kwargs, capturing)
    for handler in _log.handlers:
        handler.flush()
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        _log.info("  %s raised %s: %s", where, type(error).__name__, error)
        raise
    if state.level >= 3:
        _log.info("  %s -> %s", where, _describe(result, state.level, not capturing))
    if folder is not None and state.dumper is not None:
        try:
            state.dumper.end(folder, result, arrays, capturing)
        except OSError as error:
            state.stop_writing(error)
    return result


def _begin_dump(
    state: _State, function: Callable[..., Any], name: str, module: str, own: Any, args: tuple[Any, ...],
    kwargs: dict[str, Any], capturing: bool,
) -> Any:  # fmt: skip
    """(folder, arrays among the arguments); (None, {}) where the call is not written."""
    if state.dumper is None or not state.writes or not state.dumper.wants(name):
        return None, {}
    if state.dumper.full:
        state.stop_writing("the limit of FI_CUPY_DUMP_MAX_COUNT or _MAX_SIZE_GB is reached")
        return None, {}
    arrays: dict[str, Any] = {}
    names = [p for p in inspect.signature(function).parameters][1 if own is not None else 0 :]
    labels = [names[i] if i < len(names) else "args" for i in range(len(args))]
    tree = {
        "args": [encode(x, arrays, f"{i}.{label}") for i, (label, x) in enumerate(zip(labels, args, strict=True))],
        "kwargs": {label: encode(x, arrays, label) for label, x in kwargs.items()},
    }
    if own is not None:
        tree["object"] = state.number(own)  # type: ignore[assignment]
    try:
        return state.dumper.begin(name, module, tree, arrays, capturing), arrays
    except OSError as error:
        state.stop_writing(error)
        return None, {}


def flashinfer_api(func: _Function | None = None, *, trace: Any = None) -> Any:
    """Log the calls of a function, or of a wrapper class's methods, as those of fi_cupy's are.

    Without a level the function comes back as it is.

    Parameters
    ----------
    func : function or class, optional
        Without it, a decorator: ``@flashinfer_api()``.
    trace : None
        FlashInfer's trace templates are not there.

    Raises
    ------
    UnsupportedError
        `trace` is given.

    Source
    ------
    flashinfer.api_logging.flashinfer_api.

    Examples
    --------
    >>> @flashinfer_api
    ... def double(x):
    ...     return 2 * x
    >>> double(3)
    6
    """
    if trace is not None:
        raise UnsupportedError("flashinfer_api: trace is given, expected None")
    if func is None:
        return flashinfer_api
    if log_level() == 0 or getattr(func, "_fi_cupy_logged", False):
        return func
    if not inspect.isclass(func):
        return _wrapped(func, getattr(func, "__qualname__", repr(func)), func.__module__, False)
    for name in _METHODS:
        found = inspect.getattr_static(func, name, None)
        if found is None or found is object.__init__ or getattr(found, "_fi_cupy_logged", False):
            continue
        setattr(func, name, _wrapped(_plain(found), f"{func.__qualname__}.{name}", func.__module__, True))
    return func


def _plain(found: Any) -> Callable[..., Any]:
    """A method as a function of its object: a partialmethod is bound at each call."""
    if isinstance(found, FunctionType):
        return found

    def bound(self: Any, *args: Any, **kwargs: Any) -> Any:
        return found.__get__(self, type(self))(*args, **kwargs)

    return bound


def install() -> int:
    """Wrap every function and wrapper that fi_cupy exports, as importing it at a level does; returns how many."""
    import fi_cupy

    if log_level() == 0:
        return 0
    replaced: dict[int, Any] = {}
    for name in vars(fi_cupy)["__all__"]:
        value = getattr(fi_cupy, name)
        if inspect.isclass(value) and hasattr(value, "run"):
            flashinfer_api(value)
            replaced[id(value)] = value
        elif inspect.isfunction(value):
            replaced[id(value)] = flashinfer_api(value)
    for module_name, module in list(sys.modules.items()):
        if module_name == "fi_cupy" or module_name.startswith("fi_cupy."):
            for name, value in list(vars(module).items()):
                if inspect.isfunction(value) and id(value) in replaced:
                    setattr(module, name, replaced[id(value)])
    return len(replaced)


def flush_graph_dumps() -> int:
    """At level 10: write what the arrays of captured calls hold now. Call it after a replay of their graph.

    While a CUDA graph is captured nothing can be read, so the log keeps the arrays. The first flush completes the
    calls' folders; later ones make snapshots in ``graph_flushes``. At exit it is called once.

    Returns
    -------
    int
        How many files were written.

    Source
    ------
    flashinfer.api_logging.flush_graph_dumps.
    """
    return 0 if _state is None or _state.dumper is None else _state.dumper.flush()


if log_level() >= 10:
    atexit.register(flush_graph_dumps)
