"""Kernel instances of the sampling family, its argument checks and launches. The functions are in `sampling`."""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.device import DeviceInfo, device_info
from fi_cupy.dtypes import (
    FLOAT_TYPES,
    INDEX_TYPES,
    DType,
    bfloat16,
    bool_,
    float16,
    float32,
    float64,
    int32,
    int64,
    uint8,
    uint64,
)
from fi_cupy.errors import ArgumentError, ShapeError, UnsupportedError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import CppType, KernelSpec
from fi_cupy.random_state import get_seed_and_offset

#: The largest vocabulary of the GPU kernels: 512 segments of 1024 tokens (their sums lie in shared memory).
MAX_VOCAB = 1 << 19
_MASK64 = (1 << 64) - 1
# kernels/sampling.cuh: SamplingFlags
INDICES64, _TOP_K64, _P64, _SEED_PER_ROW, _OFFSET_PER_ROW, _JOINT = 1, 2, 4, 8, 16, 32
ALIGNED_IN, _ALIGNED_OUT, NEW_ACCEPTED, NEW_EMITTED = 64, 128, 256, 512
_MIN_P64, _TEMPERATURE64 = 1024, 2048

_PARAMS = ParamsStruct(
    "SamplingParams",
    [
        ("input", "ptr"),
        ("output", "ptr"),
        ("valid", "ptr"),
        ("nan", "ptr"),
        ("indices", "ptr"),
        ("top_k", "ptr"),
        ("p", "ptr"),
        ("seed", "ptr"),
        ("offset", "ptr"),
        ("seed_value", "u64"),
        ("offset_value", "u64"),
        ("stride", "i64"),
        ("rows", "u32"),
        ("vocab", "u32"),
        ("top_k_value", "i32"),
        ("p_value", "f32"),
        ("flags", "u32"),
        ("min_p_value", "f32"),
        ("min_p", "ptr"),
        ("temperature", "ptr"),
        ("inverse_value", "f32"),
    ],
)
_SOFTMAX_PARAMS = ParamsStruct(
    "SoftmaxParams",
    [
        ("input", "ptr"),
        ("output", "ptr"),
        ("temperature", "ptr"),
        ("stride", "i64"),
        ("vocab", "u32"),
        ("inverse_value", "f32"),
        ("temperature64", "u32"),
        ("aligned", "u32"),
    ],
)
_SPECULATIVE_PARAMS = ParamsStruct(
    "SpeculativeParams",
    [
        ("draft_probs", "ptr"),
        ("draft_token_ids", "ptr"),
        ("target_probs", "ptr"),
        ("output", "ptr"),
        ("accepted", "ptr"),
        ("emitted", "ptr"),
        ("seed", "ptr"),
        ("offset", "ptr"),
        ("seed_value", "u64"),
        ("offset_value", "u64"),
        ("num_draft", "u32"),
        ("vocab", "u32"),
        ("flags", "u32"),
    ],
)


#: Shared memory for the segments that a CTA holds, bytes at most.
MOST_HELD = 128 * 1024
#: Most elements that a filter kernel lists before it searches the whole row instead.
_LIST = 4096


class LaunchShape(NamedTuple):
    """How the CTAs of a launch share out the rows.

    Attributes
    ----------
    threads : int
        A CTA.
    cluster : int
        CTAs a row.
    min_blocks : int
        CTAs that one multiprocessor should hold; 0 leaves the registers to the compiler.
    hold : bool
        Rows that are written stay on chip between reading and writing.
    """

    threads: int = 512
    cluster: int = 1
    min_blocks: int = 2
    hold: bool = False

    @property
    def tag(self) -> str:
        return f"t{self.threads}c{self.cluster}" + ("h" if self.hold else "") + f"m{self.min_blocks}"

    @property
    def min_arch(self) -> int:
        return 75 if self.cluster == 1 and not self.hold else 90

    @property
    def max_arch(self) -> int:
        """Rows are held where a CTA may have 227 KB of shared memory; for sm_120 code takes more registers."""
        return 110 if self.hold or self.min_blocks > 1 or (self.threads > 256 and self.cluster > 1) else 0


PORTABLE = LaunchShape(min_blocks=1)
#: Where 512 threads would have too few registers.
NARROW = LaunchShape(256, 1, 1)
_NARROW_KINDS = ("fill", "hold", "top_k", "speculative")


def _shared_bytes(segments: int, selects: bool, listed: int) -> int:
    """sizeof(fi::sampling::RowShared<segments, selects, listed>)."""
    size = 8 * segments + 8 * 32 + 16 * (256 if selects else 1) + 16
    size = -(-size // 16) * 16 + 4 * (4096 if selects else 4)
    size += 4 * segments + 4 * (8 * segments if selects else 1) + 8 * (listed if selects else 1) + 52
    return -(-size // 16) * 16


def _segments(vocab: int) -> int:
    return -(-vocab // 1024)


def room(vocab: int) -> int:
    """Segments that the kernel for this vocabulary has room for."""
    return 256 if vocab <= 1 << 18 else 512


def row_shared(room: int, selects: bool, shape: LaunchShape) -> tuple[int, int]:
    """(kList, bytes): what is listed must leave the portable kernels within the 64 KB of sm_75, and two CTAs that hold
    64 KB of a row each in one multiprocessor.
    """
    short = shape.hold or (room > 256 and shape.cluster == 1)
    listed = 0 if not selects else _LIST // 2 if short else _LIST
    return listed, _shared_bytes(room, selects, listed)


@lru_cache(maxsize=256)
def launch_shape(kind: str, rows: int, vocab: int, device: DeviceInfo) -> LaunchShape:
    """The shape of a launch, by its kind: "draw" (nothing is filtered), "select" (a token of what a filter keeps),
    "top_k", "speculative", "fill" (rows of which few elements are kept), "hold" (rows of which many are) or "softmax".

    Clusters spread few rows over the whole GPU; with many rows, a CTA a row has the least to synchronise. A row that is
    held takes 8 CTAs with 16 segments each for a vocabulary of 128k.
    """
    segments, arch = _segments(vocab), device.code_number
    if arch < 90:
        return (
            LaunchShape(min_blocks=2)
            if kind == "draw"
            else NARROW
            if kind in _NARROW_KINDS and segments <= 256
            else PORTABLE
        )
    holds = kind in ("hold", "softmax") and arch < 110
    largest = 16 if arch < 110 else 8
    cluster = 1  # CTAs that fill the GPU once; each of a CTA's 8 warps has a segment at least
    while cluster < largest and rows * cluster * 2 <= device.num_sms and cluster * 8 < segments:
        cluster *= 2
    while holds and cluster < 8 and cluster * 16 < segments:
        cluster *= 2
    # A multiprocessor with one CTA of 8 warps has too few loads on their way.
    few = arch <= 110 and not holds and cluster * 8 < segments and rows * cluster <= device.num_sms
    wide = few or room(vocab) > 256
    blocks = 1 if arch > 110 else 4 if kind in ("draw", "softmax") else 2
    return LaunchShape(512 if wide else 256, cluster, max(blocks // 2, 1) if wide else blocks, holds)


def launched_bytes(spec: KernelSpec, kind: str, vocab: int, dtype: DType, shape: LaunchShape) -> int:
    """Dynamic shared memory of a launch; softmax keeps one held segment of each warp in registers."""
    if not shape.hold:
        return spec.smem_bytes
    own = -(-_segments(vocab) // shape.cluster)
    if kind == "softmax":
        own = max(own - shape.threads // 32, 0)
    return spec.smem_bytes - MOST_HELD + own * 1024 * dtype.itemsize


_SPILLS = (
    "all filters' parameters live across the loop over the row: some wait in local memory, or a CTA less would fit"
)
#: Filters of the kernels, by name.
_FILTERS = {"none": "NoFilter", "min_p": "MinP", "top_k_top_p": "TopKTopP", "all": "AllFilters"}


@lru_cache(maxsize=256)
def sample_spec(
    dtype: DType, logits: bool, kind: str, room: int = 256, shape: LaunchShape = PORTABLE, scaled: bool = False
) -> KernelSpec:
    """One token a row; `kind` is the filter: "none", "min_p", "top_k_top_p" (top-k and top-p alone as well) or "all";
    `scaled`: by a temperature.
    """
    domain = "Logits" if logits else "Probs"
    listed, size = row_shared(room, kind != "none", shape)
    return KernelSpec(
        symbol=f"sample_{'scaled_' if scaled else ''}{domain.lower()}_{kind}_{dtype.tag}_s{room}_{shape.tag}",
        header="sampling.cuh",
        function="sample",
        params=_PARAMS,
        config=(
            ("T", dtype),
            ("Domain", CppType(f"fi::sampling::{domain}")),
            ("Filter", CppType(f"fi::sampling::{_FILTERS[kind]}")),
            ("kScaled", scaled),
            ("kThreads", shape.threads),
            ("kCluster", shape.cluster),
            ("kSegments", room),
            ("kList", listed),
            ("kSharedBytes", size),
        ),
        threads=shape.threads,
        min_blocks=shape.min_blocks,
        smem_bytes=size,
        min_arch=shape.min_arch,
        max_arch=shape.max_arch,
        cluster=shape.cluster if shape.cluster > 1 else 0,
        spills=_SPILLS if kind == "all" else "",
    )


@lru_cache(maxsize=256)
def filter_spec(
    dtype: DType, logits: bool, room: int = 256, shape: LaunchShape = PORTABLE, kind: str = "top_k_top_p"
) -> KernelSpec:
    """Rows after top-k and top-p (or "all" filters): probabilities renormalised, or logits masked."""
    tail = "" if kind == "top_k_top_p" else f"_{kind}"
    listed, size = row_shared(room, True, shape)
    return KernelSpec(
        symbol=f"{'mask_logits' if logits else 'renorm_probs'}{tail}_{dtype.tag}_s{room}_{shape.tag}",
        header="sampling.cuh",
        function="filter_rows",
        params=_PARAMS,
        config=(
            ("T", dtype),
            ("Domain", CppType(f"fi::sampling::{'Logits' if logits else 'Probs'}")),
            ("Filter", CppType(f"fi::sampling::{_FILTERS[kind]}")),
            ("kThreads", shape.threads),
            ("kCluster", shape.cluster),
            ("kSegments", room),
            ("kList", listed),
            ("kSharedBytes", size),
            ("kHold", shape.hold),
        ),
        threads=shape.threads,
        min_blocks=shape.min_blocks,
        smem_bytes=size + (MOST_HELD if shape.hold else 0),
        min_arch=shape.min_arch,
        max_arch=shape.max_arch,
        cluster=shape.cluster if shape.cluster > 1 else 0,
        spills=_SPILLS if kind == "all" else "",
    )


@lru_cache(maxsize=64)
def softmax_spec(dtype: DType, room: int = 256, shape: LaunchShape = PORTABLE) -> KernelSpec:
    """Softmax with temperature, to float32."""
    return KernelSpec(
        symbol=f"softmax_{dtype.tag}_s{room}_{shape.tag}",
        header="sampling/softmax.cuh",
        function="softmax",
        params=_SOFTMAX_PARAMS,
        config=(
            ("T", dtype),
            ("kThreads", shape.threads),
            ("kCluster", shape.cluster),
            ("kSegments", room),
            ("kHold", shape.hold),
        ),
        threads=shape.threads,
        min_blocks=shape.min_blocks,
        smem_bytes=8 * room + (MOST_HELD if shape.hold else 0),
        min_arch=shape.min_arch,
        max_arch=shape.max_arch,
        cluster=shape.cluster if shape.cluster > 1 else 0,
    )


@lru_cache(maxsize=16)
def speculative_spec(dtype: DType, room: int = 256, shape: LaunchShape = NARROW) -> KernelSpec:
    """Chain speculative sampling."""
    size = _shared_bytes(room, False, 0)
    return KernelSpec(
        symbol=f"chain_speculative_{dtype.tag}_s{room}_{shape.tag}",
        header="sampling/speculative.cuh",
        function="chain_speculative",
        params=_SPECULATIVE_PARAMS,
        config=(
            ("T", dtype),
            ("kThreads", shape.threads),
            ("kCluster", shape.cluster),
            ("kSegments", room),
            ("kSharedBytes", size),
        ),
        threads=shape.threads,
        min_blocks=shape.min_blocks,
        smem_bytes=size,
        min_arch=shape.min_arch,
        max_arch=shape.max_arch,
        cluster=shape.cluster if shape.cluster > 1 else 0,
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: a CTA a row for every architecture, and a cluster a row from sm_90 on."""
    specs = []
    for dtype in (float32, bfloat16, float16):
        draws, selects, fills = [LaunchShape()], [PORTABLE], [NARROW]
        if dtype is not float16:
            draws += [LaunchShape(256, 8, 4), LaunchShape(512, 2, 2)]
            selects += [LaunchShape(256, 8, 2), LaunchShape(512, 2, 1)]
            fills += [LaunchShape(256, 8, 2)]
            specs.append(filter_spec(dtype, False, 256, LaunchShape(256, 8, 2, True)))
            specs.append(softmax_spec(dtype, 256, LaunchShape(256, 8, 4, True)))
            specs += [speculative_spec(dtype, 256, shape) for shape in selects[1:]]
        both = (True, False)
        specs += [sample_spec(dtype, logits, "none", 256, shape) for shape in draws for logits in both]
        specs += [sample_spec(dtype, logits, "top_k_top_p", 256, shape) for shape in selects for logits in both]
        specs += [sample_spec(dtype, False, "min_p", 256, shape) for shape in selects]
        specs += [filter_spec(dtype, logits, 256, shape) for shape in fills for logits in both]
        specs += [
            sample_spec(dtype, True, kind, 256, shape, True)
            for kind, shape in (("none", draws[-1]), ("all", selects[-1]))
        ]
        specs += [sample_spec(dtype, False, "all", 256, selects[-1]), filter_spec(dtype, False, 256, fills[-1], "all")]
        specs += [softmax_spec(dtype), speculative_spec(dtype)]
    return specs


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
        kind = _kind(k is not None or p is not None, m is not None, logits, scaled)
        k_ptr, p_ptr, k_value, p_value, flags = _param_values(k, m if kind == "min_p" else p, x.shape[1])
        m_ptr, m_value, m_wide = _real(m, 0.0, _MIN_P64)
        t_ptr, t_value, t_wide = _real(t, 1.0, _TEMPERATURE64)
        flags |= m_wide | t_wide | random.flags | (INDICES64 if out.dtype is int64 else 0) | (_JOINT if joint else 0)
        shape = launch_shape("draw" if kind == "none" else "select", rows, x.shape[1], device_info(x.device))
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


def _kind(tops: bool, min_p: bool, logits: bool, scaled: bool) -> str:
    """The filter of the kernel that does it: those of pipelines are compiled with all of them."""
    if not tops and not min_p:
        return "none"
    if min_p:
        return "all" if tops or logits else "min_p"
    return "all" if scaled else "top_k_top_p"


def _temperature(op: str, value: Any, rows: int, x: View) -> float | View:
    if is_scalar(value):
        return float(value)
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
    shape = launch_shape("fill" if k is not None else "hold", rows, vocab, device_info(x.device))
    spec = filter_spec(x.dtype, logits, room(vocab), shape, "top_k_top_p" if m is None else "all")
    load_kernel(spec, x.device).launch(
        rows * shape.cluster, x.stream(),
        x.ptr, o.ptr, 0, 0, 0, k_ptr, p_ptr, 0, 0, 0, 0, x.strides[0], rows, vocab, k_value, p_value, flags,
        m_value, m_ptr, 0, 1.0,
        smem=launched_bytes(spec, "hold", vocab, x.dtype, shape),
    )  # fmt: skip
    return o.result()


def softmax_rows(logits: Any, temperature: Any, enable_pdl: bool | None) -> Any:
    """The body of `sampling.softmax`."""
    op = "softmax"
    x = checked_rows(op, "logits", logits)
    t: float | View | None = None
    if temperature is not None:
        if is_scalar(temperature):
            t = float(temperature)
        else:
            t = per_row_param(op, "temperature", temperature, x.shape[0], x, (float32, float64))
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
        smem=launched_bytes(spec, "softmax", vocab, x.dtype, shape), pdl=bool(enable_pdl),
    )  # fmt: skip
    return o.result()
