"""Custom operators of torch from rows of the tables: schema, implementation and fake.

Implementations are made from source text, as `dataclasses` does it, so that a call copies no arguments about.
"""

from __future__ import annotations

import inspect
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fi_cupy.dtypes import DType
from fi_cupy.errors import UnsupportedError
from fi_cupy.interop.dry_run import Shaped, check, known_dtype
from fi_cupy.interop.row import MADE, UNKNOWN, Operator, Result
from fi_cupy.interop.wrappers import PlannedWrapper

#: Parameters that may be a pair of arrays.
_PAIRS = ("paged_kv_cache", "kv_cache", "unique_kv_cache", "paged_kv_cache_d")
#: Parameters of FlashInfer that no kernel honours, and those that a schema cannot hold.
_LEFT_OUT = ("kv_cache_sf", "variant", "profiler_buffer", "skip_softmax_threshold_scale_factor")
_TYPES = {
    "float": "float", "int": "int", "bool": "bool", "str": "str", "SfLayout": "int", "Granularity": "int[]",
    "tuple[int, ...]": "SymInt[]",
}  # fmt: skip
#: Static parameters that are dtypes.
DTYPES = ("out_dtype", "output_dtype", "o_dtype", "dtype", "dst_dtype", "quantize_dtype")
#: Numbers beside arrays that are integers.
_INTEGERS = ("top_k", "seed", "offset")
#: Outputs that are arguments only where given. A part of `PODWithPagedKVCacheWrapper`'s results has no such argument.
OUTS = {"top_k_page_table_transform": ("out", "out_raw_indices"), "PODWithPagedKVCacheWrapper": ()}
#: Counters that are added to: a sum of torch's, so that the operator itself changes nothing.
_COUNTERS = ("maybe_output_accepted_token_num", "maybe_output_emitted_draft_token_num")
#: Integers that become extents of results.
_EXTENTS = ("nnz", "k")


class Row:
    """What a custom operator is made from: a row of the tables, read as a schema.

    Attributes
    ----------
    fields : list of (name, schema type)
        The operator's parameters.
    refused : list of str
        Parameters of the function that the schema does not have: they must keep their default.
    """

    def __init__(self, row: Operator | PlannedWrapper, with_out: bool) -> None:
        self.row, self.with_out = row, with_out
        self.into: tuple[str, ...] = getattr(row, "receivers", ())
        self.out = OUTS.get(row.name, row.out)
        self.mutated: tuple[str, ...] = self.out if with_out else ()
        if isinstance(row, Operator) and (row.in_place or row.updates):
            self.mutated += (*row.mutated, *self.into)
        #: Whether it returns new tensors.
        self.makes = not with_out and not (isinstance(row, Operator) and row.in_place)
        self.fields: list[tuple[str, str]] = []
        self.pairs: list[str] = []
        self.either: list[str] = []
        self.extra = False
        self.refused = [n for n in row.parameters if n in _LEFT_OUT]
        for name, p in row.parameters.items():
            self._add(name, p)
        self.by_name = dict(self.fields)

    def _add(self, name: str, p: inspect.Parameter) -> None:
        row = self.row
        if p.kind is p.VAR_POSITIONAL or name == "variant_args":
            if not self.extra and isinstance(row, PlannedWrapper):
                self.extra = True
                self.fields += [("extra_names", "str[]"), ("extra_tensors", "Tensor[]"), ("extra_numbers", "float[]")]
        elif p.kind is p.VAR_KEYWORD:
            for inner in ("k_scale", "v_scale"):  # what BatchPrefillWithPagedKVCacheWrapper.run takes besides
                self.either.append(inner)
                self.fields += [(inner, "Tensor?"), (f"{inner}_value", "float?")]
            self.fields += [("return_lse", "bool"), ("enable_pdl", "bool?")]
            self.fields += [(out, "Tensor?") for out in self.out if self.with_out]
        elif name in self.into:
            self.fields.append((name, "Tensor"))
        elif name in (*row.out, *self.out):
            if self.with_out:
                self.fields.append((name, "Tensor?"))
        elif name in _COUNTERS:
            pass
        elif name in _PAIRS:
            self.pairs.append(name)
            self.fields += [(name, "Tensor"), (f"{name}_values", "Tensor?")]
        elif name in row.either:
            self.either.append(name)
            self.fields += [(name, "Tensor?"), (f"{name}_value", "int?" if name in _INTEGERS else "float?")]
        elif name in getattr(row, "lists", ()):
            self.fields.append((name, "Tensor[]?"))
        elif name in row.arrays:
            given = p.default is p.empty and name not in getattr(row, "optional", ())
            self.fields.append((name, "Tensor" if given else "Tensor?"))
        elif name in DTYPES:
            self.fields.append((name, "ScalarType?"))
        elif name not in (*_LEFT_OUT, *_COUNTERS, "generator"):
            text = str(p.annotation)
            kind = _TYPES.get(text.removesuffix(" | None"))
            if kind is None:
                self.refused.append(name)
                return
            kind += "?" if text.endswith(" | None") else ""
            self.fields.append((name, "SymInt" if name in _EXTENTS else kind))

    def schema(self) -> str:
        """The text after the operator's name."""
        returns = "Tensor[]" if self.makes else "()"
        marks, parts = iter("abcdefghij"), []
        for name, kind in self.fields:
            if self._base(name) in self.mutated:
                kind = kind.replace("Tensor", f"Tensor({next(marks)}!)")
            parts.append(f"{kind} {name}")
        if isinstance(self.row, PlannedWrapper):
            parts.insert(0, "str handle")
        return f"({', '.join(parts)}) -> {returns}"

    def _base(self, name: str) -> str:
        """The parameter that a field is a part of."""
        first = name.removesuffix("_values")
        return first if first in self.pairs else name

    def changed(self) -> list[str]:
        """The fields that are overwritten."""
        return [n for n, _ in self.fields if self._base(n) in self.mutated]

    def arguments(self, values: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The operator's arguments by name from the values of the fields, and those of its variant."""
        given = dict(zip((n for n, _ in self.fields), values, strict=True))
        for name in self.pairs:
            second = given.pop(f"{name}_values")
            if second is not None:
                given[name] = (given[name], second)
        for name in self.either:
            number = given.pop(f"{name}_value")
            if given[name] is None:
                given[name] = number
        extra: dict[str, Any] = {}
        if self.extra:
            names = given.pop("extra_names")
            extra = dict(zip(names, (*given.pop("extra_tensors"), *given.pop("extra_numbers")), strict=True))
        return given, extra


def _shaped(op: str, value: Any, device: int | None = None) -> Any:
    if isinstance(value, torch.Tensor):
        kind = known_dtype(op, "an argument", value.dtype)
        on_gpu = value.is_cuda
        index = -1 if device is None or not on_gpu else value.device.index
        return Shaped(tuple(value.shape), kind, tuple(value.stride()), index, on_gpu)
    if isinstance(value, (tuple, list)):
        return tuple(_shaped(op, v, device) for v in value)
    return value


def _flat(made: Any) -> list[Any]:
    return [x for m in made for x in _flat(m)] if isinstance(made, (tuple, list)) else [made]


def _new(results: Any, like: torch.Tensor) -> list[torch.Tensor]:
    """Fake results."""
    made = []
    for item in _results(results):
        shape = tuple(torch.library.get_ctx().new_dynamic_size() if n is UNKNOWN else n for n in item.shape)
        kind = torch_dtype(item.dtype)
        if item.strides is None:
            made.append(torch.empty(shape, dtype=kind, device=like.device))
        else:
            made.append(torch.empty_strided(shape, item.strides, dtype=kind, device=like.device))
    return made


def _results(items: Any) -> list[Any]:
    """The new arrays among what an operator returns, in a row."""
    if isinstance(items, tuple) and not isinstance(items, Result):
        return [r for x in items for r in _results(x)]
    return [items] if isinstance(items, Result) else []


def torch_dtype(kind: DType) -> torch.dtype:
    """torch's dtype of the same name."""
    found: torch.dtype = getattr(torch, kind.name)
    return found


def _returned(made: Any) -> list[torch.Tensor]:
    """Results, dense as their fakes are."""
    if type(made) is torch.Tensor:
        return [made] if made.is_contiguous() else [made.contiguous()]
    return [x.contiguous() for x in _flat(made) if x is not None]


def _returned_as_they_lie(made: Any) -> list[torch.Tensor]:
    return _flat(made)


def _first_tensor(values: Sequence[Any]) -> torch.Tensor:
    return next(x for x in _flat(values) if isinstance(x, torch.Tensor))


#: Operators that only return; those that overwrite are `torch.library.custom_op`s, which tell autograd of it.
_LIBRARY = torch.library.Library("fi_cupy", "FRAGMENT")


def _define(name: str, row: Row, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register one custom operator; `run` and `fake` take the values of the fields. Returns what is to be called."""
    if row.changed():
        op = torch.library.custom_op(f"fi_cupy::{name}", run, mutates_args=row.changed(), schema=row.schema())
        op.register_fake(fake)
        return op._opoverload

    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError(
            f"{name}: has no derivative, kernels are for inference; call it under torch.no_grad(), or wrap it in a "
            "torch.autograd.Function of your own"
        )

    _LIBRARY.define(name + row.schema(), tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"fi_cupy::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"fi_cupy::{name}", backward, lib=_LIBRARY)
    return getattr(torch.ops.fi_cupy, name).default


def _body(row: Row, call: str, names: dict[str, Any]) -> Callable[..., Any]:
    """The implementation as text: the fields in, `call` with the operator's arguments, a list of new tensors out."""
    planned = isinstance(row.row, PlannedWrapper)
    fields = [n for n, _ in row.fields]
    dropped = {f"{n}_values" for n in row.pairs} | {f"{n}_value" for n in row.either}
    dropped |= {"extra_names", "extra_tensors", "extra_numbers"}
    lines = [f"if {n}_values is not None: {n} = ({n}, {n}_values)" for n in row.pairs]
    lines += [f"if {n} is None: {n} = {n}_value" for n in row.either]
    passed = [n for n in fields if n not in dropped]
    if row.extra:
        lines.append("if extra_names: return _with_extra(handle, " + ", ".join(fields) + ")")
    arguments = ", ".join(f"{n}={n}" for n in passed)
    lines.append(f"made = {call}{arguments})")
    lines.append("return _returned(made)" if row.makes else "return None")
    text = f"def run({', '.join((['handle'] if planned else []) + fields)}):\n    " + "\n    ".join(lines) + "\n"
    strided = row.row.name == "per_token_group_quant_8bit"  # column_major_scales
    names = {"_returned": _returned_as_they_lie if strided else _returned, **names}
    exec(compile(text, f"<implementation of fi_cupy::{row.row.name}>", "exec"), names)
    made: Callable[..., Any] = names["run"]
    return made


def _operator(row: Operator, with_out: bool) -> tuple[Any, Row]:
    """The custom operator of a function, with or without its output parameters."""
    r = Row(row, with_out)

    def fake(*values: Any) -> Any:
        given, _ = r.arguments(values)
        about = {k: _shaped(row.name, v) for k, v in given.items()}
        about[MADE] = check(row.function, (), about)
        if not r.makes:
            return None
        missing = dict.fromkeys((*row.out, *r.out, *_COUNTERS))
        return _new(row.rule({**missing, **about}), _first_tensor(values))

    run = _body(r, "_function(", {"_function": row.function})
    return _define(row.name + ("_out" if with_out else ""), r, run, fake), r


#: The wrappers by the name under which a graph calls them.
_WRAPPERS: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def _planned(row: PlannedWrapper, with_out: bool) -> tuple[Any, Row]:
    """The custom operator of a wrapper's `run`."""
    r = Row(row, with_out)
    op_name = f"{row.name}.run"

    def call(given: dict[str, Any], extra: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments by position up to ``*args``, the variant's, and the others by name."""
        positional: list[Any] = []
        kinds = {n: p.kind for n, p in row.parameters.items()}
        if inspect.Parameter.VAR_POSITIONAL in kinds.values():
            before = itertools.takewhile(lambda n: kinds[n] is not inspect.Parameter.VAR_POSITIONAL, kinds)
            positional = [given.pop(n, None) for n in before]
            positional += [extra.pop(str(i)) for i in range(len(extra)) if str(i) in extra]
        return tuple(positional), given | ({"variant_args": extra} if extra else {})

    def with_extra(handle: str, *values: Any) -> Any:
        positional, named = call(*r.arguments(values))
        made = row.cls.run(_WRAPPERS[handle], *positional, **named)
        return None if with_out else _returned(made)

    def fake(handle: str, *values: Any) -> Any:
        wrapper = _WRAPPERS[handle]
        given, extra = r.arguments(values)
        about = {k: _shaped(op_name, v, 0) for k, v in given.items()}
        positional, named = call(dict(about), {k: _shaped(op_name, v, 0) for k, v in extra.items()})
        check(lambda *a, **k: row.cls.run(wrapper, *a, **k), positional, named)
        return None if with_out else _new(row.rule(wrapper, about), _first_tensor(values))

    names = {"_run": row.cls.run, "_WRAPPERS": _WRAPPERS, "_with_extra": with_extra}
    run = _body(r, "_run(_WRAPPERS[handle], ", names)
    return _define(f"{row.name}_run" + ("_out" if with_out else ""), r, run, fake), r
