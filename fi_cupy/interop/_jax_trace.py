"""From a Python call of an operator to a call of XLA: checks, results, and which operands they share memory with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from fi_cupy import dtypes
from fi_cupy.arrays import CPU
from fi_cupy.dtypes import DType, dtype
from fi_cupy.errors import ArgumentError, UnsupportedError
from fi_cupy.interop import _jax_call
from fi_cupy.interop._jax_call import _Call, _compiled, _Items, _join, _Slot, _split, _vmap_text, _words
from fi_cupy.interop.dry_run import Shaped, check, known_dtype
from fi_cupy.interop.row import MADE, UNKNOWN, Operator, Result
from fi_cupy.interop.wrappers import PlannedWrapper


def on_gpu() -> bool:
    return jax.default_backend() in ("cuda", "gpu")


def _shaped(op: str, x: Any, device: int) -> Shaped:
    return Shaped(tuple(x.shape), known_dtype(op, "an argument", x.dtype), None, device, on_gpu())


class Tracer:
    """Turns Python calls of one operator (or of `run`) into calls of XLA."""

    def __init__(self, row: Operator | PlannedWrapper, op: str) -> None:
        self.row, self.op = row, op
        self.into = {x.name: x for x in getattr(row, "into", ())}
        dropped = {*row.out, *self.into}
        self.parameters = {n: p for n, p in row.parameters.items() if n not in dropped}
        shown = list(self.parameters.values())
        self.asks = any(x.dtype is None for x in self.into.values())
        if self.asks:
            out_dtype = inspect.Parameter(
                "out_dtype", inspect.Parameter.KEYWORD_ONLY, default="float8_e4m3fn", annotation="Any"
            )
            shown.append(out_dtype)
        self.signature = inspect.Signature(shown)
        self.dropped = dropped
        self.host = row.host
        self.columns = getattr(row, "columns", ())
        rest = [n for n, p in self.parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.dynamic = {*row.arrays, *row.either, *rest, "variant_args"}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        for name in self.dropped & kwargs.keys():
            if kwargs[name] is not None:
                instead = "; pass out_dtype=" if self.asks and name in self.into else ""
                raise ArgumentError(
                    f"{self.op}: {name} is given, but JAX arrays cannot be written: use the result{instead}"
                )
            del kwargs[name]
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        for name in self.host:
            if given[name]:
                raise UnsupportedError(f"{self.op}: {name} needs values on the host, which jax.jit does not have")
        return given

    def __call__(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], device: int, check_with: Any) -> Any:
        given = self.bind(args, dict(kwargs))
        out_dtype = dtype(given.pop("out_dtype")) if self.asks else None
        if "seed" in given and getattr(target, "draws", True):
            self._read_random(given)
        operands: list[Any] = []
        split = {}
        for name, value in given.items():
            count = len(operands)
            split[name] = _split(value, operands)
            if len(operands) > count and name not in self.dynamic:
                raise ArgumentError(f"{self.op}: {name} is an array, expected a static value (a Python number)")
            if name in ("seed", "offset") and isinstance(split[name], _Slot):
                split[name] = split[name]._replace(words=True)
            if name in self.columns and isinstance(split[name], _Slot) and operands[-1].ndim > 1:
                operands[-1] = jax.numpy.swapaxes(operands[-1], -1, -2)  # undoes the caller's own transposition
                split[name] = split[name]._replace(swapped=True)
        shaped = [_shaped(self.op, x, device) for x in operands]
        about = {name: _join(value, shaped) for name, value in split.items()}
        positional, named = self._order(about)
        made = {
            name: Shaped(x.shape(about), x.dtype or out_dtype, None, device, on_gpu())  # type: ignore[arg-type]
            for name, x in self.into.items()
        }
        named |= made
        try:
            about[MADE] = check(check_with, tuple(positional), named)
        except ArgumentError:
            if any(type(x).__name__ == "BatchTracer" for x in operands):  # a shape that vmap has cut
                raise UnsupportedError(_vmap_text(self.op)) from None
            raise
        structure = target.rule({**about, **about.get("options", {})})
        return self._bind(target, split, operands, shaped, structure, made)

    def _read_random(self, given: dict[str, Any]) -> None:
        if given["seed"] is None:
            raise ArgumentError(
                f"{self.op}: seed is None, expected an int, a JAX key or an integer array: a jitted function cannot "
                "draw from a generator that moves"
            )
        for name in ("seed", "offset"):
            if isinstance(given[name], (jax.Array, np.ndarray)):
                given[name] = _words(self.op, name, given[name])

    def _order(self, values: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Positional and named arguments: where extra arguments follow by position, everything before them does."""
        positional: list[Any] = []
        named: dict[str, Any] = {}
        star = any(p.kind is p.VAR_POSITIONAL for p in self.parameters.values())
        for name, p in self.row.parameters.items():
            value = values.get(name)  # None for an output parameter
            if p.kind is p.VAR_POSITIONAL:
                positional.extend(value or ())
            elif p.kind is p.VAR_KEYWORD:
                named.update(value.items if isinstance(value, _Items) else value or {})
            elif star and p.kind is p.POSITIONAL_OR_KEYWORD:
                positional.append(value)
            elif name not in self.dropped:
                named[name] = value
        return positional, named

    def _bind(
        self,
        target: Any,
        split: dict[str, Any],
        operands: list[Any],
        shaped: list[Shaped],
        structure: Any,
        made: dict[str, Shaped],
    ) -> Any:
        results: list[tuple[tuple[int, ...], DType]] = []
        aliases: list[tuple[int, int]] = []
        into: list[tuple[str, int]] = []

        def place(item: Any) -> Any:
            if item is None:
                return None
            if isinstance(item, Result):
                if item.strides is not None:
                    raise UnsupportedError(
                        f"{self.op}: a result of shape {item.shape} would have strides {item.strides}, which JAX "
                        "arrays do not have; leave the option out and transpose where it is needed"
                    )
                if UNKNOWN in item.shape:
                    raise UnsupportedError(
                        f"{self.op}: the size of the result depends on values, which jax.jit does not have; "
                        "call it outside, as fi_cupy's own function"
                    )
                results.append((tuple(int(n) for n in item.shape), item.dtype))
                return len(results) - 1
            if isinstance(item, tuple):
                return tuple(place(x) for x in item)
            if item in self.into:
                results.append((made[item].shape, made[item].dtype))
                into.append((item, len(results) - 1))
                return into[-1][1]
            return again(split[item])

        def again(value: Any) -> Any:
            if isinstance(value, tuple) and not isinstance(value, _Slot):
                return tuple(again(v) for v in value)
            results.append((shaped[value.number].shape, shaped[value.number].dtype))
            aliases.append((value.number, len(results) - 1))
            return len(results) - 1

        where = tuple(place(item) for item in structure)
        positional, named = self._order(split)
        # PODWithPagedKVCacheWrapper makes the prompt's schedule in each call.
        recordable = _jax_call.OPTIONS["command_buffers"] and target.recordable and "q_p" not in split
        call = _Call(
            target, tuple(positional), tuple(named.items()), tuple(results), tuple(aliases), tuple(into), recordable
        )  # fmt: skip
        flat = target.compiled(call, jax.config.jax_enable_x64)(*operands)
        narrowed = [_narrow(x, kind) for x, (_, kind) in zip(flat, results, strict=True)]

        def pick(item: Any) -> Any:
            if item is None:
                return None
            return tuple(pick(x) for x in item) if isinstance(item, tuple) else narrowed[item]

        return pick(where[0]) if len(where) == 1 else pick(where)


def _narrow(x: Any, kind: DType) -> Any:
    """The low word of a 64-bit result that came as two."""
    if kind.itemsize == 8 and x.dtype == np.uint32:
        return jax.lax.bitcast_convert_type(x[..., 0], np.int32 if kind is dtypes.int64 else np.uint32)
    return x


class Function:
    """An operator as a function of JAX arrays."""

    def __init__(self, row: Operator) -> None:
        self.row, self.name, self.rule = row, row.name, row.rule
        self.recordable, self.planned = row.recordable, False
        self._tracer = Tracer(row, row.name)
        self.__name__ = self.__qualname__ = row.name
        self.__module__ = "fi_cupy.interop.jax"
        self.__signature__ = self._tracer.signature
        self.__doc__ = _doc(row)

    compiled = staticmethod(_compiled)

    def callable(self, device: int) -> Any:
        return self.row.function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer(self, args, kwargs, CPU, self.row.function)

    def __repr__(self) -> str:
        return f"<function fi_cupy.interop.jax.{self.name}>"


def _doc(row: Operator) -> str:
    text = inspect.getdoc(row.function) or ""
    overwritten = ", ".join((*row.mutated,))
    first = f"`fi_cupy.{row.module}.{row.name}` for JAX arrays, also inside `jax.jit`."
    if overwritten:
        first += f" Returns instead of overwriting: {overwritten}."
    return f"{first}\n\n{text}"
