"""Merging attention over disjoint sets of keys through their base-2 log-sum-exp."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_inner, check_ndim, check_shape
from fi_cupy.dtypes import FLOAT_TYPES, DType, bfloat16, bool_, float16, float32, uint8
from fi_cupy.errors import DTypeError, ShapeError, UnsupportedError
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.prefill_kernel import fast_div
from fi_cupy.reference import cascade as reference

_PAIR = ParamsStruct(
    "MergePairParams",
    [
        ("v_a", "ptr"),
        ("v_b", "ptr"),
        ("s_a", "ptr"),
        ("s_b", "ptr"),
        ("v_out", "ptr"),
        ("s_out", "ptr"),
        ("mask", "ptr"),
        ("va_stride_n", "i64"),
        ("va_stride_h", "i64"),
        ("vb_stride_n", "i64"),
        ("vb_stride_h", "i64"),
        ("vo_stride_n", "i64"),
        ("vo_stride_h", "i64"),
        ("sa_stride_n", "i64"),
        ("sa_stride_h", "i64"),
        ("sb_stride_n", "i64"),
        ("sb_stride_h", "i64"),
        ("so_stride_n", "i64"),
        ("so_stride_h", "i64"),
        ("items", "u32"),
        ("heads.divisor", "u32"),
        ("heads.magic", "u32"),
        ("heads.shift", "u32"),
    ],
)
_STATES = ParamsStruct(
    "MergeStatesParams",
    [
        ("v", "ptr"),
        ("s", "ptr"),
        ("v_out", "ptr"),
        ("s_out", "ptr"),
        ("v_stride_n", "i64"),
        ("v_stride_i", "i64"),
        ("v_stride_h", "i64"),
        ("s_stride_n", "i64"),
        ("s_stride_i", "i64"),
        ("s_stride_h", "i64"),
        ("items", "u32"),
        ("heads.divisor", "u32"),
        ("heads.magic", "u32"),
        ("heads.shift", "u32"),
        ("states", "u32"),
    ],
)
#: Items (rows times heads) of one of the pair kernel's threads: two, so that four 16-byte loads are in flight; one of
#: so few that a thread's instructions are what takes the time.
_UNROLL = 2
#: States whose values are loaded before the first is used: 64 bytes in flight a thread, and 64 registers. Two take
#: 105.6 us for 4096x8, four 104.5, eight 107 (H100). Eight for so few items that every round of loads is a latency.
_BATCH = 4
_FEW_ITEMS = 4096


def _threads(head_dim: int, vec: int) -> int:
    """128, or as many as one head needs: many small CTAs, so that some load while others compute."""
    threads = 128
    while threads < head_dim // vec:
        threads *= 2
    return threads


@lru_cache(maxsize=256)
def merge_pair_spec(
    dtype: DType, head_dim: int, vec: int, unroll: int = _UNROLL, dense: bool = False
) -> KernelSpec:  # fmt: skip
    """The kernel that merges two states, `unroll` items a thread; `dense`: of dense arrays without a mask."""
    threads = _threads(head_dim, vec)
    return KernelSpec(
        symbol=f"merge_pair_{dtype.tag}_d{head_dim}_v{vec}_u{unroll}{'_dense' if dense else ''}",
        header="cascade.cuh",
        function="merge_pair",
        params=_PAIR,
        config=(
            ("T", dtype),
            ("kHeadDim", head_dim),
            ("kVec", vec),
            ("kThreads", threads),
            ("kUnroll", unroll),
            ("kDense", dense),
        ),
        threads=threads,
    )


@lru_cache(maxsize=256)
def merge_states_spec(dtype: DType, head_dim: int, vec: int, batch: int = _BATCH) -> KernelSpec:
    """The kernel that merges any number of states, `batch` of them at a time."""
    threads = _threads(head_dim, vec)
    return KernelSpec(
        symbol=f"merge_states_{dtype.tag}_d{head_dim}_v{vec}_b{batch}",
        header="cascade.cuh",
        function="merge_states",
        params=_STATES,
        config=(("T", dtype), ("kHeadDim", head_dim), ("kVec", vec), ("kThreads", threads), ("kBatch", batch)),
        threads=threads,
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances."""
    specs = []
    for dtype, vec, dims in ((bfloat16, 8, (64, 128, 256, 512)), (float16, 8, (128,)), (float32, 4, (128,))):
        for dim in dims:
            specs += [merge_pair_spec(dtype, dim, vec), merge_states_spec(dtype, dim, vec)]
    specs += [merge_pair_spec(bfloat16, 128, 8, unroll, dense=True) for unroll in (1, 2)]
    return [*specs, merge_states_spec(bfloat16, 128, 8, 8)]


def _vec(op: str, head_dim: int, itemsize: int, addresses: int, steps: int) -> int:
    """Elements an access: the largest power of two, up to 16 bytes, that divides all addresses and steps (ORed)."""
    common = addresses | (head_dim | steps) * itemsize | 16
    vec = (common & -common) // itemsize or 1
    if head_dim > 1024 * vec:
        raise UnsupportedError(f"{op}: head_dim is {head_dim} in accesses of {vec}, expected at most 1024 of them")
    return vec


def _items(op: str, rows: int, heads: int) -> int:
    if rows * heads >= 1 << 31:
        raise UnsupportedError(f"{op}: {rows} rows of {heads} heads are too many, expected fewer than 2^31 in all")
    return rows * heads


def _state(op: str, v: Any, s: Any, names: tuple[str, str], like: View | None = None) -> tuple[View, View]:
    vv, sv = view(v, op, names[0]), view(s, op, names[1])
    if like is None:
        check_ndim(op, names[0], vv, 3)
        check_dtype(op, names[0], vv, FLOAT_TYPES)
    else:
        check_shape(op, names[0], vv, like.shape, "like the first state")
        check_dtype(op, names[0], vv, (like.dtype,), "like the first state")
    check_inner(op, names[0], vv)
    check_shape(op, names[1], sv, vv.shape[:2], f"= {names[0]}.shape[:2]")
    _check_lse(op, names[1], sv)
    check_device(op, vv if like is None else like, **{names[0]: vv, names[1]: sv})
    return vv, sv


def _check_lse(op: str, name: str, s: View) -> None:
    if s.dtype is not float32:
        raise DTypeError(f"{op}: {name} has dtype {s.dtype.name}, expected float32 (base-2 log-sum-exp)")


def _launch_pair(
    op: str, a: tuple[View, View], b: tuple[View, View], out: tuple[View, View], mask: View | None
) -> None:
    (va, sa), (vb, sb), (vo, so) = a, b, out
    rows, heads, dim = va.shape
    strides = (*va.strides[:2], *vb.strides[:2], *vo.strides[:2])
    steps = 0
    for stride in strides:
        steps |= stride
    vec = _vec(op, dim, va.dtype.itemsize, va.ptr | vb.ptr | vo.ptr, steps)
    items = _items(op, rows, heads)
    unroll = 1 if items <= _FEW_ITEMS else _UNROLL
    dense = (
        mask is None
        and va.strides[:2] == vb.strides[:2] == vo.strides[:2] == (heads * dim, dim)
        and sa.strides == sb.strides == so.strides == (heads, 1)
    )
    spec = merge_pair_spec(va.dtype, dim, vec, unroll, dense)
    per_cta = spec.threads // (dim // vec) * unroll
    load_kernel(spec, va.device).launch(
        -(-items // per_cta), va.stream(), va.ptr, vb.ptr, sa.ptr, sb.ptr, vo.ptr, so.ptr,
        0 if mask is None else mask.ptr, *strides, *sa.strides, *sb.strides, *so.strides, items,
        *fast_div(max(heads, 1)), pdl=None,
    )  # fmt: skip


def merge_state(v_a: Any, s_a: Any, v_b: Any, s_b: Any) -> tuple[Any, Any]:
    """Merge two attention states over disjoint keys.

    ``s = log2(2^s_a + 2^s_b)``, ``v = (2^s_a v_a + 2^s_b v_b) / 2^s``. A state with s = -inf has seen no key and weighs
    nothing, whatever its v holds; two of them give 0 and -inf.

    Parameters
    ----------
    v_a, v_b : array, [n, num_heads, head_dim], float16, bfloat16 or float32
        Attention outputs, of one dtype; rows and heads may be strided.
    s_a, s_b : array, [n, num_heads], float32
        Their base-2 log-sum-exp.

    Returns
    -------
    (v, s)
        ``[n, num_heads, head_dim]`` in the dtype of `v_a`, and float32 ``[n, num_heads]``.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    Juravsky et al. 2024 (arXiv:2402.05099); flashinfer.cascade.merge_state.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.cascade import merge_state
    >>> v, s = np.ones((1, 1, 2), np.float32), np.zeros((1, 1), np.float32)
    >>> merge_state(v, s, 3 * v, s)
    (array([[[2., 2.]]], dtype=float32), array([[1.]], dtype=float32))
    """
    op = "merge_state"
    va, sa = _state(op, v_a, s_a, ("v_a", "s_a"))
    vb, sb = _state(op, v_b, s_b, ("v_b", "s_b"), va)
    v, s = va.empty(va.shape), va.empty(sa.shape, float32)
    if va.is_cpu:
        merged = reference.merge_state(va.numpy(), sa.numpy(), vb.numpy(), sb.numpy())
        v.write(merged[0])
        s.write(merged[1])
    else:
        _launch_pair(op, (va, sa), (vb, sb), (v, s), None)
    return v.result(), s.result()


def merge_state_in_place(v: Any, s: Any, v_other: Any, s_other: Any, mask: Any = None) -> None:
    """`merge_state` of (v, s) and (v_other, s_other) that overwrites `v` and `s`.

    Parameters
    ----------
    v, v_other : array, [n, num_heads, head_dim]
    s, s_other : array, [n, num_heads], float32
    mask : array, [n], bool or uint8, optional
        Rows where it is 0 are left as they are.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError, ImmutableArrayError

    Source
    ------
    flashinfer.cascade.merge_state_in_place.
    """
    op = "merge_state_in_place"
    va, sa = _state(op, v, s, ("v", "s"))
    vb, sb = _state(op, v_other, s_other, ("v_other", "s_other"), va)
    va.writable(op, "v")
    sa.writable(op, "s")
    m = None
    if mask is not None:
        m = view(mask, op, "mask")
        check_shape(op, "mask", m, va.shape[:1], "= v.shape[:1]")
        check_dtype(op, "mask", m, (bool_, uint8))
        check_inner(op, "mask", m)
        check_device(op, va, mask=m)
    if va.is_cpu:
        merged = reference.merge_state_in_place(
            va.numpy(), sa.numpy(), vb.numpy(), sb.numpy(), None if m is None else m.numpy()
        )
        va.write(merged[0])
        sa.write(merged[1])
    else:
        _launch_pair(op, (va, sa), (vb, sb), (va, sa), m)


def merge_states(v: Any, s: Any) -> tuple[Any, Any]:
    """Merge any number of attention states a row; see `merge_state`.

    Parameters
    ----------
    v : array, [n, num_states, num_heads, head_dim], float16, bfloat16 or float32
    s : array, [n, num_states, num_heads], float32
        Base-2 log-sum-exp.

    Returns
    -------
    (v, s)
        ``[n, num_heads, head_dim]`` in the dtype of `v`, and float32 ``[n, num_heads]``. No states: 0 and -inf.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, LayoutError

    Source
    ------
    flashinfer.cascade.merge_states.
    """
    op = "merge_states"
    vv, sv = view(v, op, "v"), view(s, op, "s")
    check_ndim(op, "v", vv, 4)
    check_dtype(op, "v", vv, FLOAT_TYPES)
    check_inner(op, "v", vv)
    check_shape(op, "s", sv, vv.shape[:3], "= v.shape[:3]")
    _check_lse(op, "s", sv)
    check_device(op, vv, s=sv)
    rows, states, heads, dim = vv.shape
    if dim < 1:
        raise ShapeError(f"{op}: v has shape {vv.shape}, expected a head_dim of at least 1")
    out, lse = vv.empty((rows, heads, dim)), vv.empty((rows, heads), float32)
    if vv.is_cpu:
        merged = reference.merge_states(vv.numpy(), sv.numpy())
        out.write(merged[0])
        lse.write(merged[1])
    else:
        sn, si, sh = vv.strides[:3]
        vec = _vec(op, dim, vv.dtype.itemsize, vv.ptr, sn | si | sh)
        items = _items(op, rows, heads)
        batch = 2 * _BATCH if states > _BATCH and items <= _FEW_ITEMS else _BATCH
        spec = merge_states_spec(vv.dtype, dim, vec, batch)
        per_cta = spec.threads // (dim // vec)
        load_kernel(spec, vv.device).launch(
            -(-items // per_cta), vv.stream(), vv.ptr, sv.ptr, out.ptr, lse.ptr, sn, si, sh, *sv.strides,
            items, *fast_div(max(heads, 1)), states,
        )  # fmt: skip
    return out.result(), lse.result()


#: Wrappers that build on this module, under FlashInfer's address.
_WRAPPERS = (
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper", "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
)  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _WRAPPERS:
        from fi_cupy import cascade_attention

        return getattr(cascade_attention, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
