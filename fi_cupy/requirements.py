"""What an operator with several implementations needs of its inputs and its GPU, checked in front of it.

For operators that a user writes in FlashInfer's manner. fi_cupy's own check their arguments themselves and choose the
kernel without a word from the caller. Source: flashinfer.utils.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from fi_cupy.errors import ArgumentError, GPUArchitectureError, UnsupportedError

_Function = TypeVar("_Function", bound=Callable[..., Any])
Check = Callable[..., Any]


def supported_compute_capability(supported_ccs: Iterable[int]) -> Callable[[_Function], _Function]:
    """Note on a check which compute capabilities (times ten) its backend runs on, for `backend_requirement`.

    Parameters
    ----------
    supported_ccs : iterable of int
        ``[80, 86, 89, 90]``, for example.

    Raises
    ------
    ArgumentError
        Something in it is no integer.

    Examples
    --------
    >>> @supported_compute_capability([90, 100])
    ... def check(x):
    ...     return x.shape[-1] <= 256
    >>> check.is_compute_capability_supported(80)
    False
    """
    numbers = frozenset(supported_ccs)
    odd = [n for n in numbers if type(n) is not int]
    if odd:
        raise ArgumentError(f"supported_compute_capability: {odd[0]!r} is no integer, expected for example 90")

    def decorate(function: _Function) -> _Function:
        function._supported_ccs = numbers  # type: ignore[attr-defined]
        function.is_compute_capability_supported = numbers.__contains__  # type: ignore[attr-defined]
        return function

    return decorate


def _runs_on(check: Check, capability: int) -> bool:
    numbers = getattr(check, "_supported_ccs", None)
    return numbers is None or capability in numbers


def _capability(given: Mapping[str, Any]) -> int | None:
    """Compute capability (times ten) of the first argument that is an array on a GPU; None where none is."""
    from fi_cupy.arrays import view
    from fi_cupy.utils import get_compute_capability

    for value in given.values():
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            index = view(value).device
            if index >= 0:
                major, minor = get_compute_capability(index)
                return 10 * major + minor
    return None


class _Requirement:
    """The checks in front of one function."""

    def __init__(
        self, function: Callable[..., Any], backend_checks: Mapping[str, Check], common_check: Check | None,
        heuristic_func: Callable[..., Sequence[str]] | None,
    ) -> None:  # fmt: skip
        self.name, self.checks = function.__name__, dict(backend_checks)
        self.common, self.heuristic = common_check, heuristic_func
        self.signature = inspect.signature(function)
        if self.checks and "backend" not in self.signature.parameters:
            raise ArgumentError(f"backend_requirement: {self.name} has backends, expected a parameter called backend")

    def is_backend_supported(self, backend: str, cc: int | None = None) -> bool:
        check = self.checks.get(backend)
        return check is not None and (cc is None or _runs_on(check, cc))

    def is_compute_capability_supported(self, cc: int) -> bool:
        if self.common is not None and not _runs_on(self.common, cc):
            return False
        return not self.checks or any(_runs_on(check, cc) for check in self.checks.values())

    def suitable(self, given: dict[str, Any], capability: int | None) -> list[str]:
        """The backends that take these arguments, the heuristic's choice first."""
        found = []
        for backend, check in self.checks.items():
            if capability is not None and not _runs_on(check, capability):
                continue
            try:
                if check(**{**given, "backend": backend}) is not False:
                    found.append(backend)
            except (ValueError, NotImplementedError):
                continue
        if found and self.heuristic is not None:
            found = list(self.heuristic(found, **given))
        return found

    def check(self, bound: inspect.BoundArguments) -> list[str]:
        """Raise what stands against the call; returns the suitable backends of backend="auto"."""
        given = dict(bound.arguments)
        capability = _capability(given)
        if capability is not None and not self.is_compute_capability_supported(capability):
            raise GPUArchitectureError(f"{self.name}: compute capability {capability / 10} is not supported")
        if self.common is not None and self.common(**given) is False:
            raise ArgumentError(f"{self.name}: its requirements are not met by these arguments")
        if not self.checks:
            return []
        backend = given["backend"]
        if backend == "auto" and self.heuristic is not None:
            found = self.suitable(given, capability)
            if not found:
                raise UnsupportedError(f"{self.name}: no backend takes these arguments; there are {self._names()}")
            return found
        check = self.checks.get(backend)
        if check is None:
            raise UnsupportedError(f"{self.name}: backend is {backend!r}, expected {self._names()}")
        if capability is not None and not _runs_on(check, capability):
            raise GPUArchitectureError(
                f"{self.name}: backend {backend!r} does not support compute capability {capability / 10}"
            )
        if check(**given) is False:
            raise ArgumentError(f"{self.name}: backend {backend!r} does not take these arguments")
        return []

    def _names(self) -> str:
        return " or ".join(map(repr, self.checks))


def backend_requirement(
    backend_checks: Mapping[str, Check],
    common_check: Check | None = None,
    heuristic_func: Callable[..., Sequence[str]] | None = None,
) -> Callable[[_Function], _Function]:
    """Check a function's arguments, and that the GPU of its arrays can run the backend, in front of every call.

    The function gets a keyword more, ``skip_check=False``, and these attributes: ``is_backend_supported(backend,
    cc=None)``, ``is_compute_capability_supported(cc)``, ``has_backend(backend)``, ``has_backend_choices()``, and
    ``suitable_auto_backends``, what the last call with ``backend="auto"`` found, best first.

    Parameters
    ----------
    backend_checks : mapping
        Backend to a check that takes the function's arguments by name; False or a ValueError refuses them. May be
        empty.
    common_check : function, optional
        A check for every backend.
    heuristic_func : function, optional
        ``(suitable backends, **arguments)`` to those backends in the order of preference; with it the function takes
        ``backend="auto"``.

    Raises
    ------
    ArgumentError
        When decorating: there are backends, and the function has no parameter `backend`. When called: a check refused.
    UnsupportedError
        When called: an unknown backend, or none that is suitable.
    GPUArchitectureError
        When called: the GPU is none that the checks name (`supported_compute_capability`).

    Source
    ------
    flashinfer.utils.backend_requirement.

    Examples
    --------
    >>> def narrow(x, backend):
    ...     return x <= 256
    >>> @backend_requirement({"small": narrow, "large": lambda x, backend: True},
    ...                      heuristic_func=lambda suitable, x, backend: suitable)
    ... def double(x, backend="auto"):
    ...     return 2 * x
    >>> double(300), double.suitable_auto_backends
    (600, ['large'])
    """

    def decorate(function: _Function) -> _Function:
        wanted = _Requirement(function, backend_checks, common_check, heuristic_func)

        @functools.wraps(function)
        def checked(*args: Any, skip_check: bool = False, **kwargs: Any) -> Any:
            if not skip_check:
                bound = wanted.signature.bind(*args, **kwargs)
                bound.apply_defaults()
                checked.suitable_auto_backends = wanted.check(bound)  # type: ignore[attr-defined]
            return function(*args, **kwargs)

        checked.is_backend_supported = wanted.is_backend_supported  # type: ignore[attr-defined]
        checked.is_compute_capability_supported = (  # type: ignore[attr-defined]
            wanted.is_compute_capability_supported
        )
        checked.has_backend = wanted.checks.__contains__  # type: ignore[attr-defined]
        checked.has_backend_choices = lambda: bool(wanted.checks)  # type: ignore[attr-defined]
        checked.suitable_auto_backends = []  # type: ignore[attr-defined]
        return checked  # type: ignore[return-value]

    return decorate
