"""A call of one of our operators as a JAX primitive: what is static, what are operands, and how XLA runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fi_cupy import dtypes
from fi_cupy.arrays import CPU, View
from fi_cupy.dtypes import DType
from fi_cupy.errors import ArgumentError, UnsupportedError
from fi_cupy.gemm.operands import swapped
from fi_cupy.interop import _xla
from fi_cupy.interop.dry_run import Shaped, dense, known_dtype

OPTIONS = {"command_buffers": False}

# --- arguments: operands and what is static -------------------------------------------------------------------------


class _Slot(NamedTuple):
    """Operand `number`.

    `words`: 64-bit integers that travel as pairs of 32-bit words. `swapped`: a matrix that lies column by column, which
    travels as its transpose.
    """

    number: int
    words: bool = False
    swapped: bool = False


class _Items(NamedTuple):
    """A mapping of arguments."""

    items: tuple[tuple[str, Any], ...]


def _split(value: Any, operands: list[Any]) -> Any:
    """`value` with its arrays moved to `operands`."""
    if isinstance(value, (jax.Array, np.ndarray)):
        operands.append(jnp.asarray(value))
        return _Slot(len(operands) - 1)
    if isinstance(value, (tuple, list)):
        return tuple(_split(v, operands) for v in value)
    if isinstance(value, Mapping):
        return _Items(tuple((k, _split(v, operands)) for k, v in value.items()))
    return value


def _join(value: Any, arrays: Sequence[Any]) -> Any:
    """The inverse of `_split`."""
    if isinstance(value, _Slot):
        array = arrays[value.number]
        if value.swapped:
            return _xla.Operand(swapped(array.view)) if isinstance(array, _xla.Operand) else array.swapaxes(-1, -2)
        if not value.words:
            return array
        if isinstance(array, np.ndarray):
            return np.ascontiguousarray(array).view(np.uint64)[..., 0]
        if isinstance(array, _xla.Operand):
            v = array.view
            wide = View(v._framework, v.array, v.ptr, v.shape[:-1], v.strides[:-1], dtypes.uint64, v.device)
            wide.strides = dense(wide.shape)
            return _xla.Operand(wide)
        return Shaped(array.shape[:-1], dtypes.uint64, None, array.device, array.kernels)
    if isinstance(value, _Items):
        return {k: _join(v, arrays) for k, v in value.items}
    if isinstance(value, tuple):
        return tuple(_join(v, arrays) for v in value)
    return value


def _slots(value: Any) -> list[int]:
    """The operands in an argument."""
    if isinstance(value, _Slot):
        return [value.number]
    if isinstance(value, _Items):
        return [i for _, v in value.items for i in _slots(v)]
    return [i for v in value for i in _slots(v)] if isinstance(value, tuple) else []


def _words(op: str, name: str, value: Any) -> Any:
    """A seed or offset array as pairs of 32-bit words (JAX has no 64-bit types unless they are enabled)."""
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        return jax.random.bits(value, (1, 2) if value.ndim == 0 else (*value.shape, 2), jnp.uint32)
    kind = known_dtype(op, name, value.dtype)
    if kind in (dtypes.int64, dtypes.uint64):
        return jax.lax.bitcast_convert_type(value, np.uint32) if isinstance(value, jax.Array) else _host_words(value)
    if kind not in (dtypes.int32, dtypes.uint32) or value.ndim != 1:
        raise ArgumentError(
            f"{op}: {name} has dtype {kind.name} and shape {tuple(value.shape)}, expected a JAX key or a 1-D integer "
            "array"
        )
    low = jnp.asarray(value).astype(np.uint32)
    return jnp.stack([low, jnp.zeros_like(low)], -1)


def _host_words(value: np.ndarray[Any, Any]) -> Any:
    return np.ascontiguousarray(value)[..., None].view(np.uint32)


# --- one call -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """The static part of a call; equal calls share a compiled function."""

    target: Any  # an Operator or a _Planned
    positional: tuple[Any, ...]
    named: tuple[tuple[str, Any], ...]
    results: tuple[tuple[tuple[int, ...], DType], ...]  # every result, overwritten operands among them
    aliases: tuple[tuple[int, int], ...]  # (operand, result)
    into: tuple[tuple[str, int], ...]  # (required output parameter, the result that it receives)
    recordable: bool

    @property
    def op(self) -> str:
        return str(self.target.name)

    @cached_property
    def _split_named(self) -> tuple[dict[str, Any], list[tuple[str, int]], list[tuple[str, Any]]]:
        """Named arguments that are static, plain operands, and the others."""
        plain = [(k, v.number) for k, v in self.named if isinstance(v, _Slot) and not (v.words or v.swapped)]
        mixed = [(k, v) for k, v in self.named if _slots(v) and (not isinstance(v, _Slot) or v.words or v.swapped)]
        static = {k: _join(v, ()) for k, v in self.named if not _slots(v)}
        return static, plain, mixed

    def run(self, device: int, arrays: list[Any], results: list[Any]) -> list[Any]:
        """Call the operator; what it returned, for the first results."""
        for operand, result in self.aliases:
            arrays[operand] = results[result]
        static, plain, mixed = self._split_named
        named = dict(static)
        for name, number in plain:
            named[name] = arrays[number]
        for name, value in mixed:
            named[name] = _join(value, arrays)
        for name, result in self.into:
            named[name] = results[result]
        made = self.target.callable(device)(*[_join(v, arrays) for v in self.positional], **named)
        if made is None:
            return []
        return [x for x in _flat(made) if x is not None]


def _flat(made: Any) -> list[Any]:
    return [x for m in made for x in _flat(m)] if isinstance(made, tuple) else [made]


call_p = Primitive("fi_cupy")
call_p.multiple_results = True


def _impl(*operands: Any, call: _Call) -> Any:
    return jax.jit(lambda *xs: call_p.bind(*xs, call=call)).lower(*operands).compile()(*operands)


call_p.def_impl(_impl)


def _jax_type(shape: tuple[int, ...], kind: DType) -> Any:
    """The shape and dtype of a result in JAX; 64-bit ones without x64 travel as pairs of words."""
    if kind.itemsize == 8 and not jax.config.jax_enable_x64:
        return jax.ShapeDtypeStruct((*shape, 2), np.uint32)
    return jax.ShapeDtypeStruct(shape, kind.np)


def _avals(*operands: Any, call: _Call) -> list[Any]:
    varying: frozenset[Any] = frozenset().union(*(getattr(x, "vma", frozenset()) for x in operands))
    made = []
    for shape, kind in call.results:
        like = _jax_type(shape, kind)
        made.append(jax.core.ShapedArray(like.shape, like.dtype, **({"vma": varying} if varying else {})))
    return made


def _no_vmap(args: Any, dims: Any, *, call: _Call) -> Any:
    raise UnsupportedError(_vmap_text(call.op))


def _vmap_text(op: str) -> str:
    return (
        f"{op}: jax.vmap is not supported, operators take their batch as it is; reshape the mapped axis into the rows "
        "(tokens, requests) of the arguments, or loop with jax.lax.map"
    )


def _no_grad(primals: Any, tangents: Any, *, call: _Call) -> Any:
    raise UnsupportedError(
        f"{call.op}: has no derivative, kernels are for inference; put jax.lax.stop_gradient around its arguments, or "
        "give it a derivative with jax.custom_vjp"
    )


batching.primitive_batchers[call_p] = _no_vmap
ad.primitive_jvps[call_p] = _no_grad


def _bind_effects() -> Any:
    """Runs of planned wrappers are an effect, so that `plan` can wait for those that are under way."""
    from jax._src import effects

    class PlannedRun(effects.Effect):  # type: ignore[misc]
        def __str__(self) -> str:
            return "fi_cupy planned run"

    effects.lowerable_effects.add_type(PlannedRun)
    effects.control_flow_allowed_effects.add_type(PlannedRun)
    return PlannedRun()


_PLANNED_RUN = _bind_effects()


def _abstract(*operands: Any, call: _Call) -> Any:
    return _avals(*operands, call=call), ({_PLANNED_RUN} if call.target.planned else set())


call_p.def_effectful_abstract_eval(_abstract)


def _lowering(on_gpu: bool) -> Callable[..., Any]:
    def lower(*operands: Any, call: _Call) -> Any:
        overwritten = {result for _, result in call.aliases} | {result for _, result in call.into}
        ins = [(tuple(x.shape), known_dtype(call.op, "an argument", x.dtype)) for x in operands]
        known = _xla.Signature(ins, call.results, overwritten, getattr(call.target.row, "copies", False))
        runs = lru_cache(lambda device: partial(call.run, device))

        def callback(ctx: Any, outs: Sequence[Any], *buffers: Any) -> None:
            if on_gpu:
                known.on_gpu(ctx.stream, runs, buffers, outs)
            else:
                known.on_cpu(runs(CPU), buffers, outs)

        return buffer_callback(
            callback,
            [_jax_type(shape, kind) for shape, kind in call.results],
            input_output_aliases=dict(call.aliases),
            has_side_effect=call.target.planned,
            command_buffer_compatible=on_gpu and call.recordable,
        )(*operands)

    return mlir.lower_fun(lower, multiple_results=True)


mlir.register_lowering(call_p, _lowering(False), platform="cpu")
mlir.register_lowering(call_p, _lowering(True), platform="cuda")


def _compile(call: _Call, x64: bool) -> Any:
    """The compiled call; jit's own cache hangs on this function."""
    return jax.jit(lambda *operands: call_p.bind(*operands, call=call), inline=True)


_compiled = lru_cache(maxsize=4096)(_compile)
