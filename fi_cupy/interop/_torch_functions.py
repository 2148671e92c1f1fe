"""The functions and classes that torch users call: they bring arguments into a schema's form and put results together.

They are made from source text, as `dataclasses` does it, so that a call costs no binding of arguments and
``torch.compile`` can follow it.
"""

from __future__ import annotations

import enum
import inspect
import itertools
from collections.abc import Sequence
from typing import Any

import torch

from fi_cupy import dtypes
from fi_cupy.errors import ArgumentError, UnsupportedError
from fi_cupy.interop._torch_ops import (
    _COUNTERS,
    _WRAPPERS,
    DTYPES,
    OUTS,
    Row,
    _operator,
    _planned,
    torch_dtype,
)  # fmt: skip
from fi_cupy.interop.pipes import PIPE
from fi_cupy.interop.row import Operator
from fi_cupy.interop.wrappers import PlannedWrapper

_numbers = itertools.count()


def split_value(value: Any) -> tuple[Any, Any]:
    """(tensor, None) or (None, number)."""
    return (value, None) if isinstance(value, torch.Tensor) else (None, value)


def split_pair(value: Any) -> tuple[Any, Any]:
    """(array, None) or (keys, values)."""
    return (value[0], value[1]) if isinstance(value, (tuple, list)) else (value, None)


def split_extra(args: Any, named: Any) -> tuple[list[str], list[Any], list[float]]:
    """The arguments of a variant: names (a number for one by position), tensors, numbers."""
    given = {**{str(i): x for i, x in enumerate(args)}, **(named or {})}
    tensors = {k: v for k, v in given.items() if isinstance(v, torch.Tensor)}
    numbers = {k: v for k, v in given.items() if k not in tensors}
    return [*tensors, *numbers], list(tensors.values()), list(numbers.values())


def draw_seed(op: str, like: torch.Tensor, offset: Any, generator: Any) -> torch.Tensor:
    """A seed from torch's generator, on the device."""
    if offset is not None:
        raise ArgumentError(f"{op}: offset is given without seed, expected both or neither")
    if generator is None:
        return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=like.device)
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=like.device, generator=generator)


def as_int64(number: Any) -> Any:
    """A 64-bit unsigned integer as the signed one of the same bits."""
    return None if number is None else (int(number) + 2**63) % 2**64 - 2**63


def refuse(op: str, name: str, value: Any) -> None:
    """Raise for an argument that the operator's schema does not have."""
    raise UnsupportedError(f"{op}: {name} is {value}, which is not supported here; leave it out")


def one_or_all(made: Sequence[Any]) -> Any:
    """A result alone, or all of them."""
    return made[0] if len(made) == 1 else tuple(made)


def copied_into(made: Sequence[Any], outs: Sequence[Any], first: int = 0) -> list[Any]:
    """Results from place `first` on, copied into the `outs` that are given."""
    done = list(made)
    for i, out in enumerate(outs):
        if out is not None:
            made_one = done[first + i]
            if made_one is None:
                raise ArgumentError(f"output {i} is given, but what it would be made of is None")
            is_bytes = out.dtype is torch.uint8 and made_one.dtype.itemsize == 1
            out.copy_(made_one.view(torch.uint8) if is_bytes else made_one)
            done[first + i] = out
    return done


def with_gaps(made: Sequence[Any], given: Sequence[Any]) -> list[Any]:
    """None in the place of each result whose argument is None."""
    rest = iter(made)
    return [None if x is None else next(rest) for x in given]


def kind_of_outs(given: Any, outs: Sequence[Any]) -> Any:
    """The type asked for, else that of the first fp8 output."""
    if given is not None:
        return given
    return next((x.dtype for x in outs if x is not None and x.dtype.is_floating_point), None)


def fp8_like(x: torch.Tensor, kind: Any, cache: torch.Tensor) -> torch.Tensor:
    """A tensor for `x` cast to the type asked for, or the cache's; bytes are e4m3."""
    if kind is None:
        kind = torch.float8_e4m3fn if cache.dtype is torch.uint8 else cache.dtype
    return torch.empty(x.shape, dtype=kind, device=x.device)


def added_to(made: Sequence[Any], counters: Sequence[Any]) -> tuple[Any, ...]:
    """The tokens and the counts, added to the counters that are given."""
    tokens, *counts = made
    return (tokens, *(n if c is None else c.add_(n) for n, c in zip(counts, counters, strict=True)))


#: Names and torch's dtypes: what torch.compile can look up while it traces, whatever else has been looked up before.
_BY_NAME = {name: torch_dtype(kind) for name, kind in dtypes._BY_NAME.items() if hasattr(torch, kind.name)}


def as_torch_dtype(kind: Any) -> torch.dtype:
    """torch's dtype of any framework's, or of a name."""
    if isinstance(kind, torch.dtype):
        return kind
    if isinstance(kind, str) and kind in _BY_NAME:
        return _BY_NAME[kind]
    made: torch.dtype = _constant(kind)
    return made


def _resolved(kind: Any) -> torch.dtype:
    return torch_dtype(dtypes.dtype(kind))


_constant: Any = torch.compiler.assume_constant_result(_resolved)


_HELPERS = (
    split_value, split_pair, split_extra, draw_seed, as_int64, refuse, one_or_all, copied_into, added_to,
    as_torch_dtype, with_gaps, kind_of_outs, fp8_like, ArgumentError,
)  # fmt: skip


def _preparation(row: Operator | PlannedWrapper, r: Row, op: str) -> list[str]:
    """Lines that bring the arguments into the schema's form."""
    lines = []
    for name, p in row.parameters.items():
        if name in r.refused or (name == "variant_args" and isinstance(row, Operator)):
            test = f"{name} is not None" if p.default is None else f"{name} != {p.default!r}"
            lines.append(f"if {test}: refuse({op!r}, {name!r}, {name})")
    if "seed" in row.parameters:
        first = next(iter(row.parameters))
        lines += [
            f"if seed is None: seed = draw_seed({op!r}, {first}, offset, generator)",
            f"elif generator is not None: raise ArgumentError('{op}: seed and generator are both given, expected one')",
        ]
    for name in r.either:
        lines.append(f"{name}, {name}_value = split_value({name})")
        if name in ("seed", "offset"):
            lines.append(f"{name}_value = as_int64({name}_value)")
    lines += [f"{name}, {name}_values = split_pair({name})" for name in r.pairs]
    if "quantize_dtype" in r.by_name and isinstance(row, Operator) and not row.updates:
        lines.append(f"quantize_dtype = kind_of_outs(quantize_dtype, ({', '.join(row.out)}))")
    lines += [
        f"if {name} is not None: {name} = as_torch_dtype({name})"
        for name in DTYPES if name in r.by_name
    ]  # fmt: skip
    if r.extra:
        star = any(p.kind is p.VAR_POSITIONAL for p in row.parameters.values())
        lines.append(
            f"extra_names, extra_tensors, extra_numbers = split_extra({'args' if star else '()'}, variant_args)"
        )
    return lines


def _calls(row: Operator | PlannedWrapper, r: Row, out: Row | None) -> list[str]:
    """Lines that call the custom operator and return the results."""
    handle = "self._handle, " if isinstance(row, PlannedWrapper) else ""
    call = f"_op({handle}{', '.join(n for n, _ in r.fields)})"
    if isinstance(row, Operator) and row.in_place:
        return [call]
    if row.name == "chain_speculative_sampling":
        return [f"return added_to({call}, ({', '.join(_COUNTERS)}))"]
    if not row.out:
        return [f"return one_or_all({call})"]
    if isinstance(row, Operator) and row.updates:  # torch does not functionalise an operator that does both
        like = "fp8_like({}, quantize_dtype, paged_kv_cache)"
        if "quantize_dtype" not in r.by_name:  # the queries keep their type; their strides may be a larger tensor's
            like = "torch.empty({0}.shape, dtype={0}.dtype, device={0}.device)"
        made = [f"if {o} is None and {x} is not None: {o} = {like.format(x)}"
                for o, x in zip(row.out, row.absent, strict=True)]  # fmt: skip
        return [*made, call, f"return {', '.join(row.out)}"]
    lines = []
    if out is not None:
        out_call = f"_op_out({handle}{', '.join(n for n, _ in out.fields)})"
        if row.name == "top_k_page_table_transform":
            lines += [
                "if out_raw_indices is not None and out is None: out = torch.empty_like(out_raw_indices)",
                f"if out is not None: {out_call}; return out",
                f"return one_or_all({call})",
            ]
            return lines
        first, rest = row.out[0], row.out[1:]
        everything = " and ".join(f"{n} is not None" for n in row.out)
        if isinstance(row, Operator) and row.absent:
            everything = " and ".join(
                f"({x} is None or {n} is not None)" for n, x in zip(row.out, row.absent, strict=True)
            )
            call = f"with_gaps({call}, ({', '.join(row.absent)}))"
        if "return_lse" in r.by_name:
            everything = f"{first} is not None and " + (
                f"({rest[0]} is not None or not return_lse)" if rest else "not return_lse"
            )
        flag = "return_lse" in r.by_name and bool(rest)
        result = f"one_or_all(({first}, {rest[0]}) if return_lse else ({first},))" if flag else (
            f"one_or_all(({', '.join(row.out)},))"
        )  # fmt: skip
        lines.append(f"if {everything}: {out_call}; return {result}")
    return lines + _copies(row, r, call)


def _copies(row: Operator | PlannedWrapper, r: Row, call: str) -> list[str]:
    """Lines for outputs of which a part is given: the others are made, and these are copied to."""
    outs = f"({''.join(f'{n}, ' for n in row.out)})"
    if "return_lse_p" in r.by_name:
        return [
            "wanted = return_lse_d",
            "if lse_d is not None: return_lse_d = True",
            "first = 2 if return_lse_p else 1",
            f"made = copied_into({call}, {outs}, first)",
            "return one_or_all(made[:first]), one_or_all(made[first:] if wanted else made[first : first + 1])",
        ]
    if "return_lse" in r.by_name and len(row.out) == 2:
        return [
            "wanted = return_lse",
            f"if {row.out[1]} is not None: return_lse = True",
            f"made = copied_into({call}, {outs})",
            "return one_or_all(made if wanted else made[:1])",
        ]
    return [f"return one_or_all(copied_into({call}, {outs}))"]


def _signature(row: Operator | PlannedWrapper) -> str:
    parts = ["self"] if isinstance(row, PlannedWrapper) else []
    keyword_only = False
    for name, p in row.parameters.items():
        if p.kind is p.VAR_POSITIONAL:
            parts.append(f"*{name}")
            keyword_only = True
        elif p.kind is p.VAR_KEYWORD:
            parts.append("k_scale=None, v_scale=None, return_lse=False, enable_pdl=None, out=None, lse=None")
        else:
            if p.kind is p.KEYWORD_ONLY and not keyword_only:
                parts.append("*")
                keyword_only = True
            parts.append(name if p.default is p.empty else f"{name}={_literal(p.default)}")
    return ", ".join(parts)


def _literal(value: Any) -> str:
    """A default in source text; enumerations by their value."""
    value = value.value if isinstance(value, enum.Enum) else value
    return repr(int(value)) if isinstance(value, int) and not isinstance(value, bool) else repr(value)


def _compose(row: Operator | PlannedWrapper, plain: tuple[Any, Row], out: tuple[Any, Row] | None, name: str) -> Any:
    """The function `name` of which users call `plain`, or `out` where outputs are given."""
    op = f"{row.name}.run" if isinstance(row, PlannedWrapper) else row.name
    lines = _preparation(row, plain[1], op) + _calls(row, plain[1], out and out[1])
    text = f"def {name}({_signature(row)}):\n    " + "\n    ".join(lines) + "\n"
    names: dict[str, Any] = {"torch": torch, **{f.__name__: f for f in _HELPERS}}
    names |= {"_op": plain[0], "_op_out": out and out[0]}
    exec(compile(text, f"<fi_cupy.interop.torch.{op}>", "exec"), names)
    return names[name]


def make_function(row: Operator) -> Any:
    """The function of torch tensors for a row."""
    with_out = _operator(row, True) if row.out else None
    plain = with_out if with_out and row.updates else _operator(row, False)
    made = _compose(row, plain, with_out, row.name)
    made.__module__ = "fi_cupy.interop.torch"
    made.__doc__ = (
        f"`fi_cupy.{row.module}.{row.name}` as the custom operator ``torch.ops.fi_cupy.{row.name}``.\n\n"
        f"{inspect.getdoc(row.function) or ''}"
    )
    return made


def make_wrapper(row: PlannedWrapper) -> Any:
    """A class whose `run` is a custom operator."""
    run = _compose(row, _planned(row, False), _planned(row, True) if OUTS.get(row.name, row.out) else None, "run")
    run.__doc__ = row.cls.run.__doc__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        row.cls.__init__(self, *args, **kwargs)
        self._handle = f"{row.name}-{next(_numbers)}"
        _WRAPPERS[self._handle] = self

    init.__doc__ = row.cls.__init__.__doc__

    def run_return_lse(self: Any, *args: Any, **kwargs: Any) -> Any:
        """`run` with ``return_lse=True``."""
        return self.run(*args, **kwargs, return_lse=True)

    body = {"__init__": init, "run": run, "__module__": "fi_cupy.interop.torch", "__doc__": row.cls.__doc__}
    if "return_lse" in row.parameters:
        body["run_return_lse"] = run_return_lse
    return type(row.name, (row.cls,), body)


def make_pipe() -> Any:
    """`fi_cupy.logits_processor.LogitsPipe` whose call is a custom operator."""
    made = make_wrapper(PIPE)

    def call(self: Any, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """Run on a tensor, [batch, vocab], with the parameters of the processors."""
        result: torch.Tensor = self.run(x, **kwargs)
        return result

    made.__call__ = call
    return made
