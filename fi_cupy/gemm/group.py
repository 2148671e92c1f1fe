"""The portable kernel of segments, experts, batches and scaled fp8 (``kernels/gemm/group.cuh``) and its launch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fi_cupy.arrays import View
from fi_cupy.device import DeviceInfo, device_info
from fi_cupy.dtypes import DType, bfloat16, float8_e4m3fn, float16, int64
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import CppValue, KernelSpec

PARAMS = ParamsStruct(
    "GroupParams",
    [
        ("a", "ptr"), ("b", "ptr"), ("bias", "ptr"), ("residual", "ptr"), ("out", "ptr"), ("indptr", "ptr"),
        ("indices", "ptr"), ("a_scale", "ptr"), ("b_scale", "ptr"),
        ("a_stride", "i64"), ("b_stride", "i64"), ("a_batch", "i64"), ("b_batch", "i64"),
        ("out_stride", "i64"), ("out_batch", "i64"), ("residual_stride", "i64"), ("residual_batch", "i64"),
        ("bias_batch", "i64"),
        ("a_scale_row", "i64"), ("a_scale_k", "i64"), ("a_scale_batch", "i64"),
        ("b_scale_column", "i64"), ("b_scale_k", "i64"), ("b_scale_batch", "i64"),
        ("m", "u32"), ("n", "u32"), ("k", "u32"), ("groups", "u32"), ("a_scale_rows", "u32"),
        ("b_scale_columns", "u32"), ("scale_steps", "u32"), ("wide", "u32"),
    ],
)  # fmt: skip

#: Elements of k that one step of the block-scaled kernel multiplies: a scale covers a multiple of it.
SCALE_STEP = 128


@dataclass(frozen=True)
class Scales:
    """Where the multiplier of element (row, k) of an operand lies: strides in elements, 0 where one scale serves all.

    Attributes
    ----------
    ptr : int
    row, k, batch : int
        Elements between the scales of neighbouring row blocks, k blocks and matrices.
    rows : int
        Rows that one scale covers.
    """

    ptr: int = 0
    row: int = 0
    k: int = 0
    batch: int = 0
    rows: int = 1


@dataclass(frozen=True)
class Group:
    """What one instance of the kernel is made for.

    Attributes
    ----------
    a, b, out : DType
    scale : str
        "none", "end" or "blocks".
    segments : bool
        Rows are bounded by an indptr; else the matrices of a batch.
    row_major_b : bool
        16-bit b is dense along n.
    gated, gate_second : bool
        ``silu(gate) * up`` of the two halves of b's columns, and whether the gate is the second.
    """

    a: DType
    b: DType
    out: DType
    scale: str = "none"
    segments: bool = False
    row_major_b: bool = False
    gated: bool = False
    gate_second: bool = False


#: (block_m, block_n, warps_m, warps_n) for up to 64 rows a group, and for more. Two products and their sums of the
#: block-scaled kernel take the registers of the larger tile.
_TILES = {
    "small": (64, 64, 2, 2),
    "small_gated": (64, 64, 4, 1),
    "large": (128, 128, 2, 2),
    "fp8": (64, 128, 4, 2),
    "fp8_small": (64, 64, 4, 1),
}


@lru_cache(maxsize=256)
def group_spec(group: Group, tile: str, block_k: int, stages: int) -> KernelSpec:
    """One instance; `block_k` in units of two bytes of a row."""
    block_m, block_n, warps_m, warps_n = _TILES[tile]
    smem = stages * (block_m + block_n) * block_k * 2
    if group.scale == "blocks":
        smem += (stages + 1) * (block_m + block_n) * 4
    kinds = group.a.tag if group.b is group.a else f"{group.a.tag}_{group.b.tag}"
    words = [kinds, f"o{group.out.tag}", {"none": "", "end": "scaled", "blocks": "blocks"}[group.scale]]
    words += ["seg"] * group.segments + ["rowb"] * group.row_major_b
    words += ["gated2" if group.gate_second else "gated"] * group.gated
    words.append(f"{block_m}x{block_n}x{block_k}_s{stages}")
    slow = group.a is bfloat16  # emulated on Turing, in small tiles only
    turing = smem <= 64 * 1024 and (not slow or tile.startswith("small"))
    blocks = {"small": 2 if turing else 4, "small_gated": 2 if turing else 4, "large": 2}.get(tile, 1)
    return KernelSpec(
        symbol="gemm_group_" + "_".join(w for w in words if w),
        header="gemm/group.cuh",
        function="gemm_group",
        params=PARAMS,
        config=(
            ("A", group.a), ("B", group.b), ("Out", group.out),
            ("Bias", group.a if group.scale == "none" else group.out),
            ("kScale", CppValue(f"fi::GroupScale::k{group.scale.title()}")), ("kSegments", group.segments),
            ("kGated", group.gated), ("kGateSecond", group.gate_second), ("kBlockM", block_m), ("kBlockN", block_n),
            ("kBlockK", block_k), ("kStages", stages), ("kWarpsM", warps_m), ("kWarpsN", warps_n), ("kGroup", 8),
            ("kRowMajorB", group.row_major_b),
        ),
        threads=32 * warps_m * warps_n,
        min_blocks=blocks,
        smem_bytes=smem,
        min_arch=75 if turing else 80,
    )  # fmt: skip


def group_tile(group: Group, rows: int, n: int, groups: int, device: DeviceInfo) -> tuple[str, int, int]:
    """(tile, block_k in units of two bytes, stages) for `groups` groups of `rows` rows on average and n columns."""
    fp8 = group.a.itemsize == 1
    if fp8:
        # Half the columns where tiles of 128 would leave multiprocessors without one.
        columns = 64 if group.gated else 128
        tile = "fp8" if groups * -(-rows // 64) * -(-n // columns) >= device.num_sms else "fp8_small"
    elif rows <= 64 or (group.a is bfloat16 and device.code_number < 80):
        # A tile of 64 rows reads the weight as often as one of 128 and wastes less of it on rows that are not there.
        tile = "small_gated" if group.gated else "small"
    else:
        tile = "large"
    kilobytes = device.smem_per_sm >> 10
    if device.code_number < 80:
        return tile, 32, 2
    if kilobytes >= 200 or fp8:  # fp8: a step is one scale block of 128
        return tile, 64, 4 if "small" in tile else 3
    return tile, 32, 4 if kilobytes >= 128 or tile != "large" else 3


def group_grid(spec: KernelSpec, m: int, n: int, groups: int, segments: bool, batch: int = 1) -> tuple[int, int, int]:
    """CTAs: column tiles times the most row tiles that `groups` segments of `m` rows in all can have."""
    config: dict[str, Any] = dict(spec.config)
    block_m, columns = config["kBlockM"], config["kBlockN"] // (2 if config["kGated"] else 1)
    tiles_m = m // block_m + min(groups, m) if segments else -(-m // block_m)
    return tiles_m * -(-n // columns), 1, batch


def _units(x: View, axis: int) -> int:
    """The stride of an axis in units of two bytes."""
    return x.strides[axis] * x.dtype.itemsize // 2


def launch_group(
    out: View, a: View, w: View, *, indptr: View | None = None, weight_indices: View | None = None,
    row_major_b: bool = False, bias: View | None = None, residual: View | None = None, gated: bool = False,
    gate_second: bool = False, scale: str = "none", a_scale: Scales | None = None, b_scale: Scales | None = None,
    scale_k: int = SCALE_STEP, pdl: bool = False,
) -> None:  # fmt: skip
    """Launch the kernel; the caller has checked shapes, types, devices and alignment.

    Parameters
    ----------
    out : View, [m, n] or [batch, m, n]
    a : View, [m, k] or [batch, m, k]
    w : View, [n, k], [weights, n, k], or [weights, k, n] if `row_major_b`; 2 n columns if `gated`
    indptr : View, [segments + 1], int32 or int64, optional
        Rows of each segment; `a` and `out` are matrices then.
    weight_indices : View, [segments], int32 or int64, optional
    bias : View, [columns] or [weights, columns], optional
    residual : View like `out`, optional
    gated, gate_second : bool
    scale : {"none", "end", "blocks"}
    a_scale, b_scale : Scales
        Of the rows of `a`, and of the rows of `w`.
    scale_k : int
        "blocks": elements of k under one scale, a multiple of 128.
    pdl : bool
    """
    group = Group(a.dtype, w.dtype, out.dtype, scale, indptr is not None, row_major_b, gated, gate_second)
    m, k = a.shape[-2:]
    n = out.shape[-1]
    batch = a.shape[0] if a.ndim == 3 else 1
    groups = batch if indptr is None else indptr.shape[0] - 1
    if m == 0 or groups <= 0:
        return
    device = device_info(a.device)
    rows = m if indptr is None else -(-m // groups)
    spec = group_spec(group, *group_tile(group, rows, n, groups, device))
    config: dict[str, Any] = dict(spec.config)
    block = 2 * config["kBlockK"]  # elements of fp8 in a step
    sa, sb = a_scale or Scales(), b_scale or Scales()
    weights = w.ndim == 3
    wide = sum(bit for bit, x in ((1, indptr), (2, weight_indices)) if x is not None and x.dtype is int64)
    load_kernel(spec, a.device).launch(
        group_grid(spec, m, n, groups, indptr is not None, batch), a.stream(),
        a.ptr, w.ptr, _ptr(bias), _ptr(residual), out.ptr, _ptr(indptr), _ptr(weight_indices), sa.ptr, sb.ptr,
        _units(a, -2), _units(w, -2), _units(a, 0) if a.ndim == 3 else 0, _units(w, 0) if weights else 0,
        out.strides[-2], out.strides[0] if out.ndim == 3 else 0,
        0 if residual is None else residual.strides[-2],
        residual.strides[0] if residual is not None and residual.ndim == 3 else 0,
        bias.strides[0] if bias is not None and bias.ndim == 2 else 0,
        sa.row, sa.k, sa.batch, sb.row, sb.k, sb.batch,
        m, n, k * a.dtype.itemsize // 2, groups, sa.rows, sb.rows, max(1, scale_k // block), wide, pdl=pdl,
    )  # fmt: skip


def _ptr(x: View | None) -> int:
    return 0 if x is None else x.ptr


def group_specs() -> list[KernelSpec]:
    """The canonical instances, as chosen for a GPU with 227 KB of shared memory a CTA and for Turing."""
    bf16, e4m3 = bfloat16, float8_e4m3fn
    segments, experts = Group(bf16, bf16, bf16, segments=True), Group(e4m3, e4m3, bf16, "blocks", segments=True)
    return [
        group_spec(segments, "small", 64, 4),
        group_spec(Group(bf16, bf16, bf16, segments=True, row_major_b=True), "small", 64, 4),
        group_spec(Group(bf16, bf16, bf16, segments=True, gated=True, gate_second=True), "small_gated", 64, 4),
        group_spec(Group(float16, float16, float16, segments=True), "small", 32, 2),
        group_spec(Group(e4m3, e4m3, bf16, "end"), "fp8", 64, 3),
        group_spec(Group(e4m3, e4m3, float16, "end"), "fp8", 32, 2),
        group_spec(experts, "fp8", 64, 3),
    ]
