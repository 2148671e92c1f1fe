"""The kernel of rope fused with a cast to fp8 and with a paged append: its parameters, instances and launch."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from fi_cupy.arrays import View
from fi_cupy.dtypes import DType, bfloat16, float8_e4m3fn, int32
from fi_cupy.errors import ShapeError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.prefill_kernel import fast_div

_SECTIONS = 5
_SECTION = (
    ("x", "ptr"), ("out", "ptr"), ("x_stride_n", "i64"), ("x_stride_h", "i64"), ("out_stride_n", "i64"),
    ("out_stride_h", "i64"), ("out_stride_row", "i64"), ("units.divisor", "u32"), ("units.magic", "u32"),
    ("units.shift", "u32"), ("end", "u32"), ("scale", "f32"), ("paged", "u32"),
)  # fmt: skip
_PARAMS = ParamsStruct(
    "RopeQuantizeParams",
    [
        *((f"section[{i}].{name}", kind) for i in range(_SECTIONS) for name, kind in _SECTION),
        ("positions", "ptr"),
        ("cos_sin", "ptr"),
        ("cos_sin_stride", "i64"),
        ("batch_indices", "ptr"),
        ("cache_positions", "ptr"),
        ("kv_indices", "ptr"),
        ("kv_indptr", "ptr"),
        *((f"token_units.{name}", "u32") for name in ("divisor", "magic", "shift")),
        ("units", "u32"),
        ("batch", "u32"),
        ("page_size", "u32"),
    ],
)
_THREADS = 128


@lru_cache(maxsize=128)
def rope_quantize_spec(
    dtype: DType, index: DType, out: DType, vec: int, *, interleave: bool = False, paged: bool = False,
    unroll: int = 1, q_out: DType | None = None, early: bool = False,
) -> KernelSpec:  # fmt: skip
    """The kernel that rotates and casts `vec` elements an access, twice `unroll` accesses a thread.

    With more than one, registers leave fewer threads to hide the look-ups: 64 and 82 µs instead of 60 (H100). `q_out`
    is the type of q's outputs, by default `out`; `early` looks tables up before it waits for its predecessor.
    """
    form = ("_interleave" if interleave else "") + ("_append" if paged else "") + ("_early" if early else "")
    form += "" if q_out in (None, out) else f"_q{q_out.tag}"
    return KernelSpec(
        symbol=f"rope_quantize{form}_{dtype.tag}_{index.tag}_{out.tag}_v{vec}x{unroll}",
        header="rope_quantize.cuh",
        function="rope_quantize",
        params=_PARAMS,
        config=(
            ("T", dtype),
            ("I", index),
            ("Q", q_out or out),
            ("O", out),
            ("kVec", vec),
            ("kInterleave", interleave),
            ("kPaged", paged),
            ("kEarly", early),
            ("kUnroll", unroll),
            ("kThreads", _THREADS),
        ),
        threads=_THREADS,
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances."""
    return [
        rope_quantize_spec(bfloat16, int32, float8_e4m3fn, 8, paged=True),
        rope_quantize_spec(bfloat16, int32, float8_e4m3fn, 8, interleave=True),
        *append_specs(bfloat16),
    ]


def append_specs(dtype: DType) -> list[KernelSpec]:
    """What `rope_append_paged_kv_cache` takes for queries of a 16-bit type: a cache of the same, and of fp8."""
    return [
        rope_quantize_spec(dtype, int32, out, 8, paged=True, q_out=dtype, early=True) for out in (dtype, float8_e4m3fn)
    ]


class Section(NamedTuple):
    """One array of the fused kernel: where it comes from and where it goes.

    Attributes
    ----------
    x : View
        [tokens, heads, dim] or [tokens, dim].
    out : View
        The result, or the cache it is written into.
    scale : float
        What it is multiplied by.
    to : (token or page, row, head) strides of `out` in bytes
    offset : int
        Bytes from the start of a cached row.
    paged : bool
    """

    x: View
    out: View
    scale: float
    to: tuple[int, int, int]
    offset: int = 0
    paged: bool = False

    def alignment(self) -> int:
        """Every address and extent ORed together, each as bytes of the input."""
        size, strides = self.x.dtype.itemsize, self.x.strides[:-1]
        both = self.x.ptr | self.x.shape[-1] // 2 * size
        for step in strides:
            both |= step * size
        for step in (self.out.ptr, self.offset, *self.to):
            both |= step * (size // self.out.dtype.itemsize)
        return both


def plain(x: View, out: View, scale: float) -> Section:
    size = out.dtype.itemsize
    head = out.strides[1] * size if len(out.shape) == 3 else 0
    return Section(x, out, scale, (out.strides[0] * size, 0, head))


def launch(
    sections: list[Section | None],
    table: View,
    pos: View,
    kind: DType,
    interleave: bool,
    pages: tuple[View, View, View, View] | None = None,
    page_size: int = 1,
    pdl: bool = False,
    *,
    q_out: DType | None = None,
    early: bool = False,
) -> None:
    """Launch over (q_rope, k_rope, q_nope, k_nope, v); those that are None have no work. See `rope_quantize_spec`."""
    assert sections[0] is not None  # q_rope is always there
    q = sections[0].x
    size = q.dtype.itemsize
    common = 16
    for each in sections:
        common |= 0 if each is None else each.alignment()
    vec = (common & -common) // size or 1
    # Cosines and sines are read in pieces of up to 16 bytes.
    rows = table.ptr | (table.strides[0] | table.shape[1] // 2) * 4 | 16
    vec = min(vec, 8 if rows & -rows == 16 else (rows & -rows) // 4)
    fields: list[Any] = []
    end = 0
    for each in sections:
        if each is None:
            fields += (0, 0, 0, 0, 0, 0, 0, *fast_div(1), end, 1.0, 0)
            continue
        x = each.x
        heads, head_stride = (x.shape[1], x.strides[1]) if len(x.shape) == 3 else (1, 0)
        units = x.shape[-1] // 2 // vec
        end += heads * units
        fields += (
            x.ptr, each.out.ptr + each.offset, x.strides[0], head_stride, each.to[0], each.to[2], each.to[1],
            *fast_div(units or 1), end, each.scale, int(each.paged),
        )  # fmt: skip
    total = q.shape[0] * end
    if total >= 1 << 31:
        raise ShapeError(f"rope_quantize: {q.shape[0]} tokens are {total} units of work, expected less than 2^31")
    spec = rope_quantize_spec(
        q.dtype, pos.dtype, kind, vec, interleave=interleave, paged=pages is not None, q_out=q_out, early=early
    )
    addresses = (0, 0, 0, 0) if pages is None else tuple(p.ptr for p in pages)
    config: dict[str, Any] = dict(spec.config)
    load_kernel(spec, q.device).launch(
        -(-total // (_THREADS * config["kUnroll"])), q.stream(), *fields, pos.ptr, table.ptr, table.strides[0],
        *addresses, *fast_div(end or 1), total, 0 if pages is None else pages[3].shape[0] - 1, page_size, pdl=pdl,
    )  # fmt: skip
