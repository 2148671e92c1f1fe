"""Argument checks and launches of the sampling family. The functions are in `sampling`, the kernels in
`sampling_kernels`.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.device import device_info
from fi_cupy.dtypes import (
    FLOAT_TYPES,
    INDEX_TYPES,
    DType,
    bool_,
    float32,
    float64,
    int32,
    int64,
    uint8,
    uint64,
)
from fi_cupy.errors import ArgumentError, ShapeError, UnsupportedError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.random_state import get_seed_and_offset
from fi_cupy.sampling_kernels import (
    MAX_VOCAB,
    filter_spec,
    launch_shape,
    launched_bytes,
    renorm_spec,
    room,
    sample_spec,
    softmax_spec,
)

_MASK64 = (1 << 64) - 1
# kernels/sampling.cuh: SamplingFlags
INDICES64, _TOP_K64, _P64, _SEED_PER_ROW, _OFFSET_PER_ROW, _JOINT = 1, 2, 4, 8, 16, 32
ALIGNED_IN, _ALIGNED_OUT, NEW_ACCEPTED, NEW_EMITTED = 64, 128, 256, 512
_MIN_P64, _TEMPERATURE64 = 1024, 2048


def checked_rows(op: str, name: str, array: Any) -> View:
    """The checked input matrix."""
    x = view(array, op, name)
    check_ndim(op, name, x, 2)
    check_dtype(op, name, x, FLOAT_TYPES)
    check_inner(op, name, x)
    check_vocab(op, name, x)
    return x


def check_vocab(op: str, name: str, x: View) -> None:
    vocab = x.shape[-1]
    if vocab == 0:
        raise ShapeError(f"{op}: {name} has shape {x.shape}, expected at least one token")
    if vocab > MAX_VOCAB and not x.is_cpu:
        raise UnsupportedError(f"{op}: {name} has a vocabulary of {vocab}, expected at most {MAX_VOCAB} on a GPU")


def aligned_rows(x: View) -> bool:
    """Whether every row starts on 16 bytes."""
    return x.ptr % 16 == 0 and (x.shape[0] < 2 or x.strides[0] * x.dtype.itemsize % 16 == 0)


def is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float, np.generic))


def per_row_param(op: str, name: str, value: Any, rows: int, x: View, allowed: tuple[DType, ...]) -> View:
    """A parameter array with one value an output row."""
    p = view(value, op, name)
    if p.ndim == 0:
        raise ShapeError(
            f"{op}: {name}: Expected a 1D tensor of shape (batch_size,) or scalar for the sampling parameter, "
            f"but got a 0-dimensional tensor."
        )
    if p.ndim > 1:
        raise ShapeError(
            f"{op}: {name}: Expected a 1D tensor or scalar for the sampling parameter, but got a {p.ndim}D tensor."
        )
    if p.shape[0] != rows:
        raise ShapeError(
            f"{op}: {name}: Sampling parameter tensor batch size mismatch: expected length {rows} to match the "
            f"reference tensor batch size, but got length {p.shape[0]}."
        )
    check_dtype(op, name, p, allowed)
    check_inner(op, name, p)
    check_device(op, x, **{name: p})
    return p


def _top_k(op: str, value: Any, rows: int, x: View) -> int | View:
    if not is_scalar(value):
        return per_row_param(op, "top_k", value, rows, x, INDEX_TYPES)
    try:
        k = operator.index(value)
    except TypeError:
        raise ArgumentError(f"{op}: top_k is {value!r}, expected an integer or an integer array") from None
    if k < 1:
        raise ArgumentError(f"{op}: top_k is {k}, expected at least 1 (top_k >= vocabulary keeps all)")
    return min(k, x.shape[-1])


def _probability(op: str, name: str, value: Any, rows: int, x: View) -> float | View:
    if not is_scalar(value):
        return per_row_param(op, name, value, rows, x, (float32, float64))
    p = float(value)
    if not 0 <= p <= 1:
        raise ArgumentError(f"{op}: {name} is {p}, expected 0 to 1")
    return p


class Random:
    """Seed and offset of one call: values, or device arrays."""

    __slots__ = ("flags", "offset", "offset_ptr", "offset_value", "seed", "seed_ptr", "seed_value")

    def __init__(self, op: str, x: View, rows: int, seed: Any, offset: Any, generator: Any) -> None:
        if seed is None:
            if offset is not None:
                raise ArgumentError(f"{op}: offset is given without seed, expected both or neither")
            device = x.array.device if generator is None and x.framework == "torch" else None
            seed, offset = get_seed_and_offset(1, generator, device)
        elif generator is not None:
            raise ArgumentError(f"{op}: seed and generator are both given, expected one of them")
        self.flags = 0
        self.seed, self.seed_ptr, self.seed_value = self._read(op, "seed", seed, rows, x, _SEED_PER_ROW)
        self.offset, self.offset_ptr, self.offset_value = self._read(
            op, "offset", 0 if offset is None else offset, rows, x, _OFFSET_PER_ROW
        )

    def _read(self, op: str, name: str, value: Any, rows: int, x: View, flag: int) -> tuple[Any, int, int]:
        if isinstance(value, (int, np.integer)):
            number = int(value) & _MASK64
            return np.uint64(number), 0, number
        a = view(value, op, name)
        check_ndim(op, name, a, 1)
        if a.shape[0] not in (1, rows):
            check_shape(op, name, a, (rows,), "= one a row, or one element")
        check_dtype(op, name, a, (int64, uint64))
        check_inner(op, name, a)
        check_device(op, x, **{name: a})
        if a.shape[0] == rows:
            self.flags |= flag
        return (a.numpy() if x.is_cpu else None), a.ptr, 0


def _array(value: Any, rows: int, dtype: Any) -> np.ndarray[Any, Any] | None:
    """A parameter as the reference takes it."""
    if value is None:
        return None
    return value.numpy() if isinstance(value, View) else np.full(rows, value, dtype)


def _filter(rows: int, top_k: Any, top_p: Any, min_p: Any, joint: bool) -> Any:
    return reference.sampling.Filter(
        _array(top_k, rows, np.int64), _array(top_p, rows, np.float32), _array(min_p, rows, np.float32), joint
    )


def _real(p: Any, nothing: float, flag: int) -> tuple[int, float, int]:
    """(pointer, value, flag if float64) of a real parameter."""
    if isinstance(p, View):
        return p.ptr, 0.0, flag if p.dtype is float64 else 0
    return 0, nothing if p is None else p, 0


def _param_values(top_k: Any, p: Any, vocab: int) -> tuple[int, int, int, float, int]:
    """(top_k pointer, p pointer, top_k value, p value, flags) of a launch."""
    k_ptr, k_value, flags = 0, vocab, 0
    if isinstance(top_k, View):
        k_ptr, flags = top_k.ptr, _TOP_K64 if top_k.dtype is int64 else 0
    elif top_k is not None:
        k_value = top_k
    p_ptr, p_value, wide = _real(p, 1.0, _P64)
    return k_ptr, p_ptr, k_value, p_value, flags | wide


def draw_tokens(
    op: str,
    name: str,
    array: Any,
    *,
    top_k: Any = None,
    top_p: Any = None,
    min_p: Any = None,
    temperature: Any = None,
    joint: bool = False,
    indices: Any,
    generator: Any,
    check_nan: bool = False,
    seed: Any,
    offset: Any,
    return_valid: bool = False,
) -> Any:
    """Check, draw one token a row, and give the result back; every sampling function ends here."""
    x = checked_rows(op, name, array)
    chosen = None
    if indices is not None:
        chosen = view(indices, op, "indices")
        check_ndim(op, "indices", chosen, 1)
        check_dtype(op, "indices", chosen, INDEX_TYPES)
        check_inner(op, "indices", chosen)
        check_device(op, x, indices=chosen)
    rows = x.shape[0] if chosen is None else chosen.shape[0]
    k = None if top_k is None else _top_k(op, top_k, rows, x)
    p = None if top_p is None else _probability(op, "top_p", top_p, rows, x)
    m = None if min_p is None else _probability(op, "min_p", min_p, rows, x)
    if isinstance(k, int) and k == x.shape[1]:
        k = None
    t = None if temperature is None else _temperature(op, temperature, rows, x)
    random = Random(op, x, rows, seed, offset, generator)
    out = x.empty((rows,), int32 if chosen is None else chosen.dtype)
    valid = x.empty((rows,), bool_) if return_valid else None
    nan = None
    if x.is_cpu:
        index = None if chosen is None else chosen.numpy()
        if index is not None and rows and (index.min() < 0 or index.max() >= x.shape[0]):
            raise ArgumentError(
                f"{op}: indices lie in {index.min()} ... {index.max()}, expected 0 ... {x.shape[0] - 1}"
            )
        domain = reference.sampling.Logits if name == "logits" else reference.sampling.Probs
        tokens, ok, has_nan = reference.sampling.sample(
            x.numpy(), domain, _filter(rows, k, p, m, joint), random.seed, random.offset, index,
            _array(t, rows, np.float64),
        )  # fmt: skip
        out.write(tokens)
        if valid is not None:
            valid.write(ok)
        any_nan = bool(has_nan.any())
    else:
        nan = x.empty((rows,), uint8) if check_nan else None
        logits, scaled = name == "logits", t is not None
        kind = _kind(k is not None, p is not None, m is not None, logits, scaled)
        k_ptr, p_ptr, k_value, p_value, flags = _param_values(k, m if kind == "min_p" else p, x.shape[1])
        m_ptr, m_value, m_wide = _real(m, 0.0, _MIN_P64)
        t_ptr, t_value, t_wide = _real(t, 1.0, _TEMPERATURE64)
        flags |= m_wide | t_wide | random.flags | (INDICES64 if out.dtype is int64 else 0) | (_JOINT if joint else 0)
        shape = launch_shape(
            {"none": "draw", "top_p": "reject", "min_p": "min_p"}.get(kind, "select"),
            rows,
            x.shape[1],
            device_info(x.device),
        )
        spec = sample_spec(x.dtype, logits, kind, room(x.shape[1]), shape, scaled)
        load_kernel(spec, x.device).launch(
            rows * shape.cluster, x.stream(),
            x.ptr, out.ptr, 0 if valid is None else valid.ptr, 0 if nan is None else nan.ptr,
            0 if chosen is None else chosen.ptr, k_ptr, p_ptr, random.seed_ptr, random.offset_ptr,
            random.seed_value, random.offset_value, x.strides[0], x.shape[0], x.shape[1], k_value, p_value,
            flags | (ALIGNED_IN if aligned_rows(x) else 0), m_value, m_ptr, t_ptr, 1.0 / t_value if t_value else 0.0,
        )  # fmt: skip
        any_nan = nan is not None and bool(nan.host().any())
    if check_nan and any_nan:
        raise ArgumentError(f"{op}: Input {name} contains NaN.")
    return out.result() if valid is None else (out.result(), valid.result())


def _kind(top_k: bool, top_p: bool, min_p: bool, logits: bool, scaled: bool) -> str:
    """The filter of the kernel that does it: those of pipelines are compiled with all of them."""
    if min_p:
        return "all" if top_k or top_p or logits else "min_p"
    if not top_k:
        return "top_p" if top_p else "none"
    return "all" if scaled else "top_k_top_p" if top_p else "top_k"


def _temperature(op: str, value: Any, rows: int, x: View) -> float | View:
    if is_scalar(value):
        t = float(value)
        if t != t:
            raise ArgumentError(f"{op}: temperature is {value!r}, expected a number")
        return t
    return per_row_param(op, "temperature", value, rows, x, (float32, float64))


def is_joint(op: str, order: str) -> bool:
    if order not in ("top_k_first", "joint"):
        raise ArgumentError(f"{op}: filter_apply_order is {order!r}, expected 'top_k_first' or 'joint'")
    return order == "joint"


def filtered_rows(op: str, name: str, array: Any, top_k: Any, top_p: Any, min_p: Any = None, joint: bool = True) -> Any:
    """Rows after filters, dtype of the input."""
    x = checked_rows(op, name, array)
    rows, vocab = x.shape
    logits = name == "logits"
    k = None if top_k is None else _top_k(op, top_k, rows, x)
    p = None if top_p is None else _probability(op, "top_p", top_p, rows, x)
    m = None if min_p is None else _probability(op, "min_p", min_p, rows, x)
    o = x.empty(x.shape, x.dtype)
    if x.is_cpu:
        apply = reference.sampling.mask_logits if logits else reference.sampling.renorm_probs
        o.write(apply(x.numpy(), _filter(rows, k, p, m, joint)))
        return o.result()
    k_ptr, p_ptr, k_value, p_value, flags = _param_values(k, p, vocab)
    m_ptr, m_value, m_wide = _real(m, 0.0, _MIN_P64)
    flags |= m_wide | (_JOINT if joint else 0) | (ALIGNED_IN if aligned_rows(x) else 0)
    flags |= _ALIGNED_OUT if aligned_rows(o) else 0
    alone = p is not None and k is None and m is None and not logits
    shape = launch_shape("renorm" if alone else "fill" if k is not None else "keep", rows, vocab, device_info(x.device))
    kind = "all" if m is not None else "top_k" if p is None else "top_k_top_p"
    spec = renorm_spec(x.dtype, room(vocab), shape) if alone else filter_spec(x.dtype, logits, room(vocab), shape, kind)
    load_kernel(spec, x.device).launch(
        rows * shape.cluster, x.stream(),
        x.ptr, o.ptr, 0, 0, 0, k_ptr, p_ptr, 0, 0, 0, 0, x.strides[0], rows, vocab, k_value, p_value, flags,
        m_value, m_ptr, 0, 1.0, smem=launched_bytes(spec, vocab, x.dtype, shape),
    )  # fmt: skip
    return o.result()


def softmax_rows(logits: Any, temperature: Any, enable_pdl: bool | None) -> Any:
    """The body of `sampling.softmax`."""
    op = "softmax"
    x = checked_rows(op, "logits", logits)
    t: float | View | None = None
    if temperature is not None:
        t = _temperature(op, temperature, x.shape[0], x)
    o = x.empty(x.shape, float32)
    if x.is_cpu:
        o.write(reference.sampling_filters.softmax(x.numpy(), t.numpy() if isinstance(t, View) else t))
        return o.result()
    per_row = isinstance(t, View)
    inverse = 1.0 if t is None or per_row else 0.0 if t == 0 else 1.0 / t  # type: ignore[operator]
    rows, vocab = x.shape
    shape = launch_shape("softmax", rows, vocab, device_info(x.device))
    spec = softmax_spec(x.dtype, room(vocab), shape)
    load_kernel(spec, x.device).launch(
        rows * shape.cluster, x.stream(),
        x.ptr, o.ptr, t.ptr if per_row else 0, x.strides[0], x.shape[1],  # type: ignore[union-attr]
        inverse, per_row and t.dtype is float64,  # type: ignore[union-attr]
        aligned_rows(x) + 2 * (vocab % 4 == 0),
        smem=launched_bytes(spec, vocab, x.dtype, shape), pdl=bool(enable_pdl),
    )  # fmt: skip
    return o.result()
