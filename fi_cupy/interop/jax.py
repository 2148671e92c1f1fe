"""fi_cupy inside ``jax.jit``: every operator as a function of JAX arrays, and the plan/run wrappers.

The functions have the names and parameters of ``fi_cupy``'s own, without ``out=``: they return new arrays. An operator
that works in place returns what it would have overwritten (``append_paged_kv_cache`` the cache); inside ``jax.jit`` its
operand and its result share memory, so that a donated cache is updated without a copy, and XLA copies only what is
still needed elsewhere.

On a GPU the kernels are launched on XLA's stream and read and write XLA's buffers (`jax.experimental.buffer_callback`);
on the CPU the NumPy reference computes. Shapes and dtypes are checked when the function is traced, with the errors of
the operators. Parameters that are JAX or NumPy arrays are operands; all others are static.

Differences from ``fi_cupy``'s own functions:

* 64-bit results are 32-bit ones unless x64 is enabled, as everywhere in JAX.
* Random numbers: ``seed`` must be given, as an int, a JAX key (``jax.random.key``), or an integer array [1] or [rows].
* ``rmsnorm_quant`` and ``fused_add_rmsnorm_quant`` take ``out_dtype`` (float8_e4m3fn) instead of ``out``.
* `jax.vmap` and `jax.grad` are refused.

Example
-------
>>> import jax, jax.numpy as jnp
>>> from fi_cupy.interop import jax as fj
>>> norm = jax.jit(lambda x, w: fj.rmsnorm(x, w) + 1)
>>> norm(jnp.array([[3.0, 4.0]]), jnp.ones(2)).round(4).tolist()
[[1.8485..., 2.1314...]]
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from fi_cupy import dtypes
from fi_cupy.arrays import CPU, view
from fi_cupy.dtypes import DType, dtype
from fi_cupy.errors import ArgumentError, FrameworkError, UnsupportedError
from fi_cupy.interop import _xla
from fi_cupy.interop.dry_run import Shaped, check, known_dtype
from fi_cupy.interop.table import ALIASES, OPERATORS, UNKNOWN, Operator, Result
from fi_cupy.interop.wrappers import WRAPPER_ALIASES, WRAPPERS, PlannedWrapper

_COMMAND_BUFFERS = False


def command_buffers(enabled: bool) -> None:
    """Let XLA record operators in its command buffers (CUDA graphs); takes effect for functions traced from now on.

    Wrappers are recorded only in CUDA-graph mode (``use_cuda_graph=True``), where later plans keep every address.
    """
    global _COMMAND_BUFFERS
    _COMMAND_BUFFERS = bool(enabled)


# --- arguments: operands and what is static -------------------------------------------------------------------------


class _Slot(NamedTuple):
    """Operand number `index`; `words`: 64-bit integers that travel as pairs of 32-bit words."""

    index: int
    words: bool = False


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
        array = arrays[value.index]
        if not value.words:
            return array
        if isinstance(array, np.ndarray):
            return np.ascontiguousarray(array).view(np.uint64)[..., 0]
        if isinstance(array, _xla.Operand):
            v = array.view
            wide = _xla.View(v._framework, v.array, v.ptr, v.shape[:-1], v.strides[:-1], dtypes.uint64, v.device)
            wide.strides = _xla.dense(wide.shape)
            return _xla.Operand(wide)
        return Shaped(array.shape[:-1], dtypes.uint64, None, array.device, array.kernels)
    if isinstance(value, _Items):
        return {k: _join(v, arrays) for k, v in value.items}
    if isinstance(value, tuple):
        return tuple(_join(v, arrays) for v in value)
    return value


def _slots(value: Any) -> list[int]:
    if isinstance(value, _Slot):
        return [value.index]
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
            f"{op}: {name} has dtype {kind.name} and shape {tuple(value.shape)}, expected a JAX key, or a 1-D integer array"
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
    into: int  # the result that the required output parameter receives, or -1
    recordable: bool

    @property
    def op(self) -> str:
        return str(self.target.name)

    def run(self, device: int, arrays: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        """Call the operator; what it returned for every result (None: already there)."""
        arrays = list(arrays)
        for operand, result in self.aliases:
            arrays[operand] = results[result]
        args = [_join(v, arrays) for v in self.positional]
        named = {k: _join(v, arrays) for k, v in self.named}
        if self.into >= 0:
            named[self.target.into] = results[self.into]
        made = self.target.callable(device)(*args, **named)
        if made is None:
            return [None] * len(results)
        flat = _flat(made)
        flat += [None] * (len(results) - len(flat))
        return flat


def _flat(made: Any) -> list[Any]:
    return [x for m in made for x in _flat(m)] if isinstance(made, tuple) else [made]


call_p = Primitive("fi_cupy")
call_p.multiple_results = True


@call_p.def_impl
def _impl(*operands: Any, call: _Call) -> Any:
    return jax.jit(lambda *xs: call_p.bind(*xs, call=call)).lower(*operands).compile()(*operands)


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

    class PlannedRun(effects.Effect):
        __str__ = lambda self: "fi_cupy planned run"  # noqa: E731

    effects.lowerable_effects.add_type(PlannedRun)
    effects.control_flow_allowed_effects.add_type(PlannedRun)
    return PlannedRun()


_PLANNED_RUN = _bind_effects()


@call_p.def_effectful_abstract_eval
def _abstract(*operands: Any, call: _Call) -> Any:
    return _avals(*operands, call=call), ({_PLANNED_RUN} if isinstance(call.target, _Planned) else set())


def _lowering(on_gpu: bool) -> Callable[..., Any]:
    def callback(call: _Call, ctx: Any, outs: Sequence[Any], *ins: Any) -> None:
        kinds = [kind for _, kind in call.results]
        aliased = {result for _, result in call.aliases} | ({call.into} if call.into >= 0 else set())
        if on_gpu:
            device = _xla._address((outs or ins)[0])[1]
            run = lambda a, r: call.run(device, a, r)  # noqa: E731
            _xla.on_gpu(ctx.stream, run, ins, outs, kinds, aliased, getattr(call.target.row, "copies", False))
        else:
            _xla.on_cpu(lambda a, r: call.run(CPU, a, r), ins, outs, kinds, aliased)

    def lower(*operands: Any, call: _Call) -> Any:
        return buffer_callback(
            lambda ctx, outs, *ins: callback(call, ctx, outs, *ins),
            [_jax_type(shape, kind) for shape, kind in call.results],
            input_output_aliases=dict(call.aliases),
            has_side_effect=isinstance(call.target, _Planned),
            command_buffer_compatible=on_gpu and call.recordable,
        )(*operands)

    return mlir.lower_fun(lower, multiple_results=True)


mlir.register_lowering(call_p, _lowering(False), platform="cpu")
mlir.register_lowering(call_p, _lowering(True), platform="cuda")


@lru_cache(maxsize=4096)
def _compiled(call: _Call, x64: bool) -> Any:
    return jax.jit(lambda *operands: call_p.bind(*operands, call=call), inline=True)


# --- from a Python call to a call of XLA ----------------------------------------------------------------------------


def _on_gpu() -> bool:
    return jax.default_backend() in ("cuda", "gpu")


def _shaped(op: str, x: Any, device: int) -> Shaped:
    return Shaped(tuple(x.shape), known_dtype(op, "an argument", x.dtype), None, device, _on_gpu())


class _Tracer:
    """Turns Python calls of one operator (or of `run`) into calls of XLA."""

    def __init__(self, row: Operator | PlannedWrapper, op: str) -> None:
        self.row, self.op = row, op
        self.into = getattr(row, "into", "")
        dropped = {*row.out, self.into} - {""}
        self.parameters = {n: p for n, p in row.parameters.items() if n not in dropped}
        shown = list(self.parameters.values())
        if self.into:
            out_dtype = inspect.Parameter(
                "out_dtype", inspect.Parameter.KEYWORD_ONLY, default="float8_e4m3fn", annotation="Any"
            )
            shown.append(out_dtype)
        self.signature = inspect.Signature(shown)
        self.dropped = dropped
        self.host = getattr(row, "host", ())
        rest = [n for n, p in self.parameters.items() if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.dynamic = {*row.arrays, *row.either, *rest, "variant_args"}

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments by name."""
        for name in self.dropped & kwargs.keys():
            if kwargs[name] is not None:
                instead = "; pass out_dtype=" if name == self.into else ""
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
        out_dtype = dtype(given.pop("out_dtype")) if self.into else None
        if "seed" in given:
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
        shaped = [_shaped(self.op, x, device) for x in operands]
        about = {name: _join(value, shaped) for name, value in split.items()}
        positional, named = self._order(about)
        made = None
        if out_dtype is not None:
            made = named[self.into] = Shaped(about["input"].shape, out_dtype, None, device, _on_gpu())
        try:
            check(check_with, tuple(positional), named)
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
        self, target: Any, split: dict[str, Any], operands: list[Any], shaped: list[Shaped], structure: Any, made: Any
    ) -> Any:
        results: list[tuple[tuple[int, ...], DType]] = []
        aliases: list[tuple[int, int]] = []
        into = -1

        def place(item: Any) -> Any:
            nonlocal into
            if isinstance(item, Result):
                if UNKNOWN in item.shape:
                    raise UnsupportedError(
                        f"{self.op}: the size of the result depends on values, which jax.jit does not have; "
                        "call it outside, as fi_cupy's own function"
                    )
                results.append((tuple(int(n) for n in item.shape), item.dtype))
                return len(results) - 1
            if isinstance(item, tuple):
                return tuple(place(x) for x in item)
            if item == self.into:
                results.append((made.shape, made.dtype))
                into = len(results) - 1
                return into
            return again(split[item])

        def again(value: Any) -> Any:
            if isinstance(value, tuple) and not isinstance(value, _Slot):
                return tuple(again(v) for v in value)
            results.append((shaped[value.index].shape, shaped[value.index].dtype))
            aliases.append((value.index, len(results) - 1))
            return len(results) - 1

        where = tuple(place(item) for item in structure)
        positional, named = self._order(split)
        recordable = _COMMAND_BUFFERS and target.recordable
        call = _Call(
            target, tuple(positional), tuple(named.items()), tuple(results), tuple(aliases), into, recordable
        )  # fmt: skip
        flat = _compiled(call, jax.config.jax_enable_x64)(*operands)
        narrowed = [_narrow(x, kind) for x, (_, kind) in zip(flat, results, strict=True)]

        def pick(item: Any) -> Any:
            return tuple(pick(x) for x in item) if isinstance(item, tuple) else narrowed[item]

        return pick(where[0]) if len(where) == 1 else pick(where)


def _narrow(x: Any, kind: DType) -> Any:
    """The low word of a 64-bit result that came as two."""
    if kind.itemsize == 8 and x.dtype == np.uint32:
        return jax.lax.bitcast_convert_type(x[..., 0], np.int32 if kind is dtypes.int64 else np.uint32)
    return x


class _Function:
    """An operator as a function of JAX arrays."""

    def __init__(self, row: Operator) -> None:
        self.row, self.name, self.rule = row, row.name, row.rule
        self.into, self.recordable = row.into, True
        self._tracer = _Tracer(row, row.name)
        self.__name__ = self.__qualname__ = row.name
        self.__module__ = __name__
        self.__signature__ = self._tracer.signature
        self.__doc__ = _doc(row)

    def callable(self, device: int) -> Any:
        return self.row.function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tracer(self, args, kwargs, CPU, self.row.function)

    def __repr__(self) -> str:
        return f"<function {__name__}.{self.name}>"


def _doc(row: Operator) -> str:
    text = inspect.getdoc(row.function) or ""
    overwritten = ", ".join((*row.mutated,))
    first = f"`fi_cupy.{row.module}.{row.name}` for JAX arrays, also inside `jax.jit`."
    if overwritten:
        first += f" Returns instead of overwriting: {overwritten}."
    return f"{first}\n\n{text}"


# --- planned wrappers -----------------------------------------------------------------------------------------------


class _Planned:
    """A plan/run wrapper of fi_cupy whose `run` may be called inside `jax.jit`.

    Constructor and `plan` take the arguments of ``fi_cupy``'s class, with two additions: the workspace may be a number
    of bytes, of which every device in `devices` (default: all local ones of JAX's default backend) gets its own, for
    use inside `jax.shard_map`; and `plan` takes JAX arrays, which are read to the host.

    `plan` waits until the runs that were dispatched before it have ended, since they read the former plan. Plan outside
    of `jax.jit`, once a step, and `run` in every layer.
    """

    row: PlannedWrapper

    def __init__(self, *args: Any, devices: Sequence[Any] | None = None, **kwargs: Any) -> None:
        self.name = f"{self.row.name}.run"
        self.into = ""
        self._tracer = _Tracer(self.row, self.name)
        arguments = inspect.signature(self.row.cls).bind(*args, **kwargs).arguments
        key = next((n for n in ("float_workspace_buffer", "workspace_buffer") if n in arguments), None)
        self._wrappers: dict[int, Any] = {}
        if key is not None and isinstance(arguments[key], (int, np.integer)):
            nbytes = int(arguments[key])
            for device in _indices(devices):
                self._wrappers[device] = self.row.cls(**{**arguments, key: _memory(nbytes, device)})
            return
        if devices is not None:
            raise ArgumentError(
                f"{self.row.name}: devices are given, expected a number of bytes as workspace with them"
            )
        if key is not None and isinstance(arguments[key], jax.Array):
            raise FrameworkError(
                f"{self.row.name}: {key} is a JAX array, which cannot be written; pass a number of bytes, or a CuPy or "
                "NumPy array"
            )
        if key is None:  # BatchAttention makes its own
            on_cpu = str(arguments.setdefault("device", "cuda" if _on_gpu() else "cpu")) == "cpu"
            index = CPU if on_cpu else _indices(None)[0]
        else:
            index = view(arguments[key], self.row.name, key).device
        self._wrappers[index] = self.row.cls(**arguments)

    @property
    def recordable(self) -> bool:
        """Whether a recorded run follows later plans."""
        return all(getattr(w, "is_cuda_graph_enabled", False) for w in self._wrappers.values())

    def plan(self, *args: Any, **kwargs: Any) -> None:
        """`plan` of fi_cupy's class on every device; waits for earlier runs to end, and for the plan to arrive."""
        if not _at_top_level():
            raise UnsupportedError(f"{self.row.name}.{self.row.plan_name}: called inside jax.jit, expected outside")
        jax.effects_barrier()
        args = tuple(_to_host(x) for x in args)
        kwargs = {k: _to_host(v) for k, v in kwargs.items()}
        for device, wrapper in self._wrappers.items():
            if device < 0:
                getattr(wrapper, self.row.plan_name)(*args, **kwargs)
                continue
            import cupy

            with cupy.cuda.Device(device):
                getattr(wrapper, self.row.plan_name)(*args, **kwargs)
                cupy.cuda.get_current_stream().synchronize()

    begin_forward = plan

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """`run` of fi_cupy's class as a function of JAX arrays."""
        device, wrapper = next(iter(self._wrappers.items()))
        return self._tracer(self, args, kwargs, device, wrapper.run)

    def run_return_lse(self, *args: Any, **kwargs: Any) -> Any:
        """`run` with ``return_lse=True``."""
        return self.run(*args, return_lse=True, **kwargs)

    def rule(self, about: Mapping[str, Any]) -> tuple[Any, ...]:
        """What `run` returns for arguments of these shapes and dtypes."""
        return self.row.rule(next(iter(self._wrappers.values())), {"return_lse": False, **about})

    def callable(self, device: int) -> Any:
        wrapper = self._wrappers.get(device)
        if wrapper is None:
            places = ", ".join("the CPU" if d < 0 else f"cuda:{d}" for d in self._wrappers)
            raise ArgumentError(
                f"{self.name}: the arrays are on {'the CPU' if device < 0 else f'cuda:{device}'}, planned for {places}"
            )
        return wrapper.run

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """As in fi_cupy's class."""
        wrapper = next(iter(self._wrappers.values()))
        size: tuple[int, int] = wrapper.workspace_size(*map(_to_host, args), **kwargs)
        return size


def _at_top_level() -> bool:
    from jax._src import core

    return bool(core.trace_ctx.is_top_level())


def _to_host(x: Any) -> Any:
    if isinstance(x, jax.Array):
        return np.asarray(x)
    return type(x)(map(_to_host, x)) if isinstance(x, (list, tuple)) else x


def _indices(devices: Sequence[Any] | None) -> list[int]:
    """GPU indices of JAX devices (or ints); -1 for the CPU."""
    found = []
    for d in jax.local_devices() if devices is None else devices:
        index = d if isinstance(d, int) else CPU if d.platform == "cpu" else d.local_hardware_id
        if index not in found:
            found.append(index)
    return found


def _memory(nbytes: int, device: int) -> Any:
    if device < 0:
        return np.empty(nbytes, np.uint8)
    import cupy

    with cupy.cuda.Device(device):
        return cupy.empty(nbytes, np.uint8)


# --- names ----------------------------------------------------------------------------------------------------------

__all__ = sorted(itertools.chain(OPERATORS, ALIASES, WRAPPERS, WRAPPER_ALIASES, ["command_buffers"]))


def __getattr__(name: str) -> Any:
    made: Any
    row = OPERATORS.get(ALIASES.get(name, name))
    planned = WRAPPERS.get(WRAPPER_ALIASES.get(name, name))
    if row is not None:
        made = _Function(row) if row.name == name else __getattr__(row.name)
    elif planned is not None:
        doc = f"`fi_cupy.{planned.module}.{planned.name}` for JAX arrays: {(_Planned.__doc__ or '')}"
        made = type(planned.name, (_Planned,), {"row": planned, "__doc__": doc, "__module__": __name__})
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made


def __dir__() -> list[str]:
    return __all__
