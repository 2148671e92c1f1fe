"""Attention variants: what a user adds between the product of queries and keys, the softmax and the output.

A function of a variant is plain Python (traced once, see `fi_cupy.jit.ops`) or CUDA text. The same Python runs on the
NumPy reference, so a variant is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device
from fi_cupy.dtypes import DType, float32, float64, int32
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError
from fi_cupy.jit.emit import RECIPROCAL
from fi_cupy.jit.lower import RESERVED, SCALAR_KINDS, STAGES, TENSOR_KINDS, Lowered, is_name, is_variable, lower
from fi_cupy.jit.trace import FLOAT

Function = str | Callable[..., Any]

_MASK_MODES = {
    "full": "full", "none": "full", "non_causal": "full", "causal": "causal", "custom": "custom",
    "0": "full", "1": "causal", "2": "custom",
}  # fmt: skip
#: Keyword arguments of `VariantKernel.run`, which a variant's own names must not hide.
_RUN_OPTIONS = frozenset(
    ("return_lse", "custom_mask", "packed_custom_mask", "kv_layout", "window_left", "logits_soft_cap", "lse",
     "pos_encoding_mode", "k_scale", "v_scale", "out", "self")
)  # fmt: skip


@dataclass(frozen=True)
class AttentionVariant:
    """One variant; made by `define_variant`, which documents the fields. Equal variants compile once."""

    name: str
    mask_mode: str = "full"
    score_fn: Function | None = None
    mask_fn: Function | None = None
    query_fn: Function | None = None
    key_fn: Function | None = None
    post_process_fn: Function | None = None
    use_softmax: bool = True
    tensors: tuple[tuple[str, DType], ...] = ()
    scalars: tuple[tuple[str, DType, float | int | None], ...] = ()

    def lowered(self) -> Lowered:
        """The variant as CUDA."""
        return _lower(self)

    def bind(
        self, op: str, args: tuple[Any, ...], named: Mapping[str, Any], like: View, **_: float
    ) -> BoundVariant:  # fmt: skip
        """The variant with the arrays and numbers of one call.

        Parameters
        ----------
        op : str
            Starts the messages.
        args : tuple
            Values in the order of `tensors`, then `scalars`, as far as they go.
        named : mapping
            Values by name.
        like : View
            The queries: arrays must lie on their device.
        """
        return BoundVariant(self, _values(op, self, args, named, like), like.is_cpu)

    def by_name(self, op: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of one call by name; `ArgumentError` for one too many, unknown or given twice."""
        return _by_name(f"{op}: variant {self.name}", self, args, named)


def define_variant(
    name: str = "",
    mask_mode: str | int = "full",
    score_fn: Function | None = None,
    mask_fn: Function | None = None,
    query_fn: Function | None = None,
    key_fn: Function | None = None,
    post_process_fn: Function | None = None,
    use_softmax: bool = True,
    tensors: Mapping[str, Any] | Iterable[Any] | None = None,
    scalars: Mapping[str, Any] | Iterable[Any] | None = None,
) -> AttentionVariant:
    """Define an attention variant. Its Python functions are traced now, so their errors appear here.

    Every function is Python or CUDA text. Python gets ``ctx`` with the indices ``batch, qo_idx, kv_idx, qo_head,
    kv_head``, the lengths ``qo_len, kv_len``, ``sm_scale``, and the user's tensors and scalars by name; ``query_fn``,
    ``key_fn`` and ``post_process_fn`` work on single elements at ``dim_idx``. Text is an expression or statements that
    return, with the same names in scope; a tensor is indexed ``bias(qo_head, kv_idx)``. Indices beyond an array are
    clamped to it.

    Parameters
    ----------
    name : str
        An identifier: part of the kernel's name, and of the file name in compiler messages, ``variant:<name>``.
    mask_mode : "full", "causal" or "custom"
        The built-in mask, which `mask_fn` adds to: none, bottom-right causal, or a mask array given to ``run``.
    score_fn : ``(score, ctx) -> score``
        On ``sm_scale * q k``, before the softmax.
    mask_fn : ``(ctx) -> bool``
        True where the key is seen.
    query_fn, key_fn : ``(q, ctx) -> q``, ``(k, ctx) -> k``
        On each element, before the product; rounded to the type of q and k again.
    post_process_fn : ``(out, ctx) -> out``
        On each element of the output.
    use_softmax : bool
        False: masked scores count 0, ``out = sum(score * v)``, and there is no lse.
    tensors : names, (name, dtype) pairs, or mapping name -> dtype
        Arrays given to ``run``: float32 (the default), float16, bfloat16, int32, uint8 or bool.
    scalars : names, or mapping name -> dtype or default value
        Numbers given to ``run``: float32 (the default) or int32. A default value makes the argument optional.

    Returns
    -------
    AttentionVariant

    Raises
    ------
    TracingError
        A Python function does what cannot become a kernel; the message names file and line.
    ArgumentError, DTypeError

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> from fi_cupy.jit import ops
    >>> def soft_cap(score, ctx):
    ...     return ctx.cap * ops.tanh(score / ctx.cap)
    >>> cap = fi_cupy.jit.define_variant(name="cap", score_fn=soft_cap, scalars=["cap"])
    >>> q, k = np.ones((5, 8, 64), np.float32), np.ones((9, 2, 64), np.float32)
    >>> fi_cupy.jit.compile(cap).run(q, k, k, cap=30.0).shape
    (5, 8, 64)
    """
    if not is_name(name):
        raise ArgumentError(f"define_variant: name is {name!r}, expected an identifier (letters, digits, _)")
    mode = _MASK_MODES.get(str(getattr(mask_mode, "value", mask_mode)).lower())
    if mode is None:
        raise ArgumentError(f"define_variant: mask_mode is {mask_mode!r}, expected 'full', 'causal' or 'custom'")
    given = {
        "score_fn": score_fn, "mask_fn": mask_fn, "query_fn": query_fn, "key_fn": key_fn,
        "post_process_fn": post_process_fn,
    }  # fmt: skip
    for key, function in given.items():
        if function is not None and not isinstance(function, str) and not callable(function):
            raise ArgumentError(f"define_variant: {key} is {function!r}, expected a Python function or CUDA text")
        if isinstance(function, str) and not function.strip():
            raise ArgumentError(f"define_variant: {key} is empty text; leave it out")
    variant = AttentionVariant(
        name, mode, **given, use_softmax=bool(use_softmax), tensors=_tensors(tensors), scalars=_scalars(scalars)
    )  # fmt: skip
    names = [t for t, _ in variant.tensors] + [s for s, _, _ in variant.scalars]
    for n in names:
        if not is_variable(n):
            raise ArgumentError(f"define_variant: {n!r} cannot be the name of a tensor or scalar")
        if n in RESERVED or n in _RUN_OPTIONS:
            raise ArgumentError(f"define_variant: {n} has a meaning of its own; give the tensor or scalar another name")
        if n.endswith(RECIPROCAL) and n.removesuffix(RECIPROCAL) in names:
            raise ArgumentError(f"define_variant: {n} is the name of a reciprocal; give it another name")
        if names.count(n) > 1:
            raise ArgumentError(f"define_variant: {n} is declared twice")
    variant.lowered()
    return variant


def _pairs(given: Mapping[str, Any] | Iterable[Any] | None) -> list[tuple[Any, Any]]:
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Mapping):
        return list(given.items())
    return [(x, float32) if isinstance(x, str) else x for x in given or ()]


def _tensors(given: Mapping[str, Any] | Iterable[Any] | None) -> tuple[tuple[str, DType], ...]:
    result = []
    for name, kind in _pairs(given):
        dtype = to_dtype(kind)
        if dtype not in TENSOR_KINDS:
            known = ", ".join(d.name for d in TENSOR_KINDS)
            raise DTypeError(f"define_variant: tensor {name} has dtype {dtype.name}, expected one of {known}")
        result.append((name, dtype))
    return tuple(result)


def _scalars(given: Mapping[str, Any] | Iterable[Any] | None) -> tuple[tuple[str, DType, float | int | None], ...]:
    result: list[tuple[str, DType, float | int | None]] = []
    for name, kind in _pairs(given):
        if isinstance(kind, (int, np.integer)):  # a bool is an int
            result.append((name, int32, int(kind)))
        elif isinstance(kind, (float, np.floating)):
            result.append((name, float32, float(kind)))
        else:
            dtype = to_dtype(kind)
            if dtype not in SCALAR_KINDS:
                raise DTypeError(f"define_variant: scalar {name} has dtype {dtype.name}, expected float32 or int32")
            result.append((name, dtype, None))
    return tuple(result)


@lru_cache(maxsize=256)
def _lower(variant: AttentionVariant) -> Lowered:
    functions = {f.name: getattr(variant, f.name) for f in fields(variant) if f.name in STAGES}
    return lower(
        variant.name,
        {key: function for key, function in functions.items() if function is not None},
        variant.use_softmax,
        variant.tensors,
        tuple((name, dtype) for name, dtype, _ in variant.scalars),
    )


def _values(
    op: str, variant: AttentionVariant, args: tuple[Any, ...], named: Mapping[str, Any], like: View
) -> dict[str, Any]:
    """Every tensor (as a View) and scalar (as a number) by name."""
    label = f"{op}: variant {variant.name}"
    given = _by_name(label, variant, args, named)
    values: dict[str, Any] = {}
    for (name, dtype), (_, _, rank, exact) in zip(variant.tensors, variant.lowered().tensors, strict=True):
        if given.get(name) is None:
            raise ArgumentError(f"{label}: {name} ({dtype.name} array) is missing")
        values[name] = _tensor(label, name, dtype, rank, exact, given[name], like)
    for name, dtype, default in variant.scalars:
        value = given.get(name, default)
        if value is None:
            raise ArgumentError(f"{label}: {name} ({dtype.name} number) is missing")
        if isinstance(value, (np.ndarray, np.generic)) and np.ndim(value) == 0:
            value = value.item()
        if not isinstance(value, (int, float)) or (dtype is int32 and not float(value).is_integer()):
            raise DTypeError(f"{label}: {name} is {value!r}, expected a number of type {dtype.name}")
        values[name] = float(value) if dtype is float32 else int(value)
    return values


def _by_name(label: str, variant: AttentionVariant, args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    order = [t for t, _ in variant.tensors] + [s for s, _, _ in variant.scalars]
    if len(args) > len(order):
        raise ArgumentError(
            f"{label}: got {len(args)} extra arguments, expected at most {len(order)}: {', '.join(order)}"
        )
    given = dict(zip(order, args, strict=False))
    for name, value in named.items():
        if name not in order:
            takes = ", ".join(order) or "no extra arguments"
            raise ArgumentError(f"{label}: {name} is unknown; it takes {takes}")
        if name in given:
            raise ArgumentError(f"{label}: {name} is given twice")
        given[name] = value
    return given


def _tensor(label: str, name: str, dtype: DType, rank: int, exact: bool, value: Any, like: View) -> View:
    x = view(value, label, name)
    same_kind = x.is_cpu and TENSOR_KINDS[dtype] == FLOAT and x.dtype is float64  # an oracle's
    if x.dtype is not dtype and not same_kind:
        raise DTypeError(f"{label}: {name} has dtype {x.dtype.name}, expected {dtype.name}")
    if (exact and x.ndim != rank) or not 1 <= x.ndim <= rank:
        wanted = rank if exact else f"1 to {rank}"
        raise ShapeError(f"{label}: {name} has shape {x.shape}, expected {wanted} dimensions, as it is indexed")
    if x.size == 0:
        raise ShapeError(f"{label}: {name} has shape {x.shape}, expected at least one element")
    check_device(label, like, **{name: x})
    return x


class _Clamped:
    """A user's array on the NumPy reference: indices beyond an extent are clamped, as in the kernels."""

    def __init__(self, values: np.ndarray[Any, Any]) -> None:
        self._values = values

    def __getitem__(self, index: Any) -> Any:
        index = index if isinstance(index, tuple) else (index,)
        clamped = (np.clip(i, 0, n - 1) for i, n in zip(index, self._values.shape, strict=True))
        return self._values[tuple(clamped)]


class BoundVariant:
    """A variant with the arrays and numbers of one call: what a kernel launch or the reference takes.

    The reference finds the functions as attributes (`score_fn`, ...), its ``params`` in `params`.
    """

    def __init__(self, variant: AttentionVariant, values: dict[str, Any], on_cpu: bool) -> None:
        self.variant, self.lowered = variant, variant.lowered()
        self._tensors: list[View] = [values[name] for name, _ in variant.tensors]  # keeps the memory alive
        self.use_softmax = variant.use_softmax
        self._values = values
        if on_cpu:
            for stage in STAGES:
                setattr(self, stage, self._on_reference(stage))

    def params(self) -> dict[str, Any]:
        """User parameters by name for the reference's context."""
        return {name: _Clamped(_host(x)) if isinstance(x, View) else x for name, x in self._values.items()}

    def narrow(self) -> tuple[Any, Callable[..., Any] | None]:
        """(key, function) of the schedule's narrowing: equal keys narrow alike."""
        if self.lowered.mask is None:
            return None, None
        numbers = {name: self._values[name] for name, _ in self.lowered.scalars}
        return (self.lowered, *numbers.values()), self.lowered.narrow(numbers)

    def kernel_values(self) -> tuple[Any, ...]:
        """The fields of ``struct VariantUser`` in order."""
        values: list[Any] = []
        for (_, _, rank, _), x in zip(self.lowered.tensors, self._tensors, strict=True):
            missing = rank - len(x.shape)
            values += [x.ptr, *x.strides, *[0] * missing, *x.shape, *[1] * missing]
        for name, _ in self.lowered.scalars:
            value = self._values[name]
            values.append(value)
            if name in self.lowered.reciprocals:
                values.append(1.0 / value if value else float("inf"))
        return tuple(values)

    def _on_reference(self, stage: str) -> Callable[..., Any] | None:
        function = getattr(self.variant, stage)
        if function is None:
            return None
        if isinstance(function, str):
            raise UnsupportedError(
                f"variant {self.variant.name}: {stage} is CUDA text, which the NumPy reference cannot run; write it in "
                "Python (fi_cupy.jit.ops) to run it on the CPU as well"
            )
        if stage in ("score_fn", "mask_fn"):
            return function

        def on_elements(x: np.ndarray[Any, Any], ctx: Any) -> np.ndarray[Any, Any]:
            ctx = ctx.at(dim_idx=np.arange(x.shape[-1])[None, None, :])
            return np.broadcast_to(np.asarray(function(x, ctx)), x.shape)

        return on_elements


def _host(x: View) -> np.ndarray[Any, Any]:
    values = x.numpy()
    return values.astype(np.float32) if x.dtype.np.kind == "V" or x.dtype.itemsize == 2 else values


class VariantKernel:
    """A variant to run on one request; compiled for an element type and head dims when first called with them."""

    def __init__(self, variant: AttentionVariant) -> None:
        self.variant = variant

    def __repr__(self) -> str:
        return f"VariantKernel({self.variant.name})"

    @property
    def source(self) -> str:
        """The CUDA that the variant became."""
        return self.variant.lowered().text

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        *args: Any,
        sm_scale: float | None = None,
        custom_mask: Any = None,
        packed_custom_mask: Any = None,
        kv_layout: str = "NHD",
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        k_scale: Any = None,
        v_scale: Any = None,
        return_lse: bool = False,
        **extra: Any,
    ) -> Any:
        """Attention of one request with the variant.

        Parameters
        ----------
        q : array, [qo_len, num_qo_heads, head_dim_qk]
        k, v : arrays, [kv_len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, kv_len, head_dim] (HND)
        *args, **extra
            The variant's tensors and scalars: in the order of their declaration, or by name.
        custom_mask, packed_custom_mask : array
            With mask_mode "custom"; see `fi_cupy.prefill.single_prefill_with_kv_cache`, as for the other options.
        return_lse : bool

        Returns
        -------
        out [qo_len, num_qo_heads, head_dim_vo], or (out, lse)
        """
        from fi_cupy.prefill import single_prefill_with_kv_cache

        has_mask = custom_mask is not None or packed_custom_mask is not None
        if has_mask != (self.variant.mask_mode == "custom"):
            raise ArgumentError(
                f"variant {self.variant.name}: mask_mode is {self.variant.mask_mode!r}, but run got "
                f"{'a' if has_mask else 'no'} custom_mask"
            )
        if return_lse and not self.variant.use_softmax:
            raise ArgumentError(f"variant {self.variant.name}: without softmax there is no lse to return")
        return single_prefill_with_kv_cache(
            q, k, v, custom_mask=custom_mask, packed_custom_mask=packed_custom_mask,
            causal=self.variant.mask_mode == "causal", kv_layout=kv_layout, pos_encoding_mode=pos_encoding_mode,
            sm_scale=sm_scale, window_left=window_left, logits_soft_cap=logits_soft_cap, k_scale=k_scale,
            v_scale=v_scale, return_lse=return_lse, variant=self.variant, variant_args=(args, extra),
        )  # fmt: skip


def variant_of(op: str, variant: Any, jit_args: Any, jit_kwargs: Any) -> Any:
    """The variant that a wrapper was given, in one of the two forms."""
    if jit_args is None:
        if jit_kwargs:
            raise ArgumentError(f"{op}: jit_kwargs without jit_args")
        if variant is not None and not isinstance(variant, AttentionVariant):
            raise ArgumentError(f"{op}: variant is {type(variant).__name__}, expected one from define_variant")
        return variant
    if variant is not None:
        raise ArgumentError(f"{op}: variant and jit_args are two forms of the same thing, expected one")
    if len(jit_args) != 13:
        raise ArgumentError(
            f"{op}: jit_args has {len(jit_args)} entries, expected 13: uri, dtype_q, dtype_kv, dtype_o, idtype, "
            "head_dim_qk, head_dim_vo, tensor names, types, scalar names, types, variant_name, variant_decl"
        )
    from fi_cupy.customize import gen_customize_batch_prefill_module

    return gen_customize_batch_prefill_module("fa2", *jit_args, **(jit_kwargs or {}))


def compile(variant: AttentionVariant) -> VariantKernel:
    """The kernel of a variant, ready to run; NVRTC is called at the first run with an element type and head dims."""
    if not isinstance(variant, AttentionVariant):
        raise ArgumentError(f"compile: got {type(variant).__name__}, expected a variant from define_variant")
    return VariantKernel(variant)
