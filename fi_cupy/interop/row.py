"""A row of the tables: what a framework's machinery has to know of one operator."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from fi_cupy.dtypes import DType


class Result(NamedTuple):
    """A new array; strides, in elements, where it is not dense."""

    shape: tuple[Any, ...]
    dtype: DType
    strides: tuple[Any, ...] | None = None


class Into(NamedTuple):
    """A required parameter that only receives a result: its shape, and its dtype unless that is the caller's choice."""

    name: str
    shape: Callable[[Mapping[str, Any]], tuple[int, ...]]
    dtype: DType | None = None


#: What comes back: new arrays, None, and the names of overwritten arguments. Arguments of a rule map names to values:
#: arrays have `shape` and `dtype`.
Rule = Callable[[Mapping[str, Any]], tuple["Result | str | None", ...]]

#: Stands in a shape for an extent that depends on values.
UNKNOWN = "unknown"


#: Among a rule's arguments: the arrays that the operator makes before it computes, see `dry_run.check`.
MADE = "(made)"


def made(a: Mapping[str, Any]) -> tuple[Result, ...]:
    """The rule of operators that make their results, in order and nothing else, before they look at a value."""
    assert a[MADE], "the operator looks at a value before it makes its results: it needs a rule of its own"
    return tuple(Result(x.shape, x.dtype) for x in a[MADE])


@dataclass(frozen=True, eq=False)
class Operator:
    """One operator.

    Attributes
    ----------
    module, name : str
        Where it lives: ``fi_cupy.<module>.<name>``.
    arrays : tuple of str
        Parameters that are arrays, or pairs (or other sequences) of arrays, or None.
    rule : Rule
        What it returns. A name stands for the array given under it, after it has been overwritten.
    either : tuple of str
        Parameters that are an array or a number.
    mutated : tuple of str
        Arrays that are read and overwritten.
    out : tuple of str
        Optional parameters that take the place of the first results.
    into : tuple of Into
        Required parameters that only receive results.
    host : tuple of str
        Parameters that need values on the host (a random generator, a check of the result).
    recordable : bool
        A first call neither allocates nor copies from the host, so XLA may record it in a command buffer.
    optional : tuple of str
        Arrays without a default that may be None.
    absent : tuple of str
        Arguments in the order of the results: where one is None, so is its result.
    columns : tuple of str
        Matrices that lie column by column: their last two axes are swapped ones.
    lists : tuple of str
        Sequences of arrays of any number.
    """

    module: str
    name: str
    arrays: tuple[str, ...]
    rule: Rule
    either: tuple[str, ...] = ()
    mutated: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    into: tuple[Into, ...] = ()
    host: tuple[str, ...] = ()
    recordable: bool = True
    optional: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    lists: tuple[str, ...] = ()

    @cached_property
    def function(self) -> Callable[..., Any]:
        """The operator itself."""
        found: Callable[..., Any] = getattr(importlib.import_module(f"fi_cupy.{self.module}"), self.name)
        return found

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """The operator's parameters in order."""
        return dict(inspect.signature(self.function).parameters)

    @cached_property
    def in_place(self) -> bool:
        """Whether it returns nothing, and only overwrites."""
        return inspect.signature(self.function).return_annotation in (None, "None")

    @cached_property
    def updates(self) -> bool:
        """Whether it returns new arrays and overwrites others as well."""
        return bool(self.mutated and self.absent)

    @cached_property
    def receivers(self) -> tuple[str, ...]:
        """The names of `into`."""
        return tuple(x.name for x in self.into)
