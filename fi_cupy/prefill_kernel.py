"""The prefill kernel as an operator sees it: its instances, the shape it runs in, its parameters and its launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from fi_cupy.dtypes import HALF_TYPES, DType, bfloat16, float16
from fi_cupy.errors import ArgumentError, DTypeError, ShapeError
from fi_cupy.jit.kernel import Kernel, load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import CppType, KernelSpec
from fi_cupy.plan.prefill import PrefillTiles, choose_tiles, narrow_tiles
from fi_cupy.plan.workspace import WorkspaceLayout

if TYPE_CHECKING:
    from fi_cupy.device import DeviceInfo
    from fi_cupy.jit.lower import Lowered

LOG2E = math.log2(math.e)
#: window_left that is off: far enough left of any key, and no overflow when it is subtracted.
NO_WINDOW = 1 << 30

_DIVISOR = ("divisor", "magic", "shift")
PARAMS = ParamsStruct(
    "PrefillParams",
    [
        *((name, "ptr") for name in ("q", "k", "v", "o", "lse", "items", "kv_indices", "mask", "sinks")),
        ("partial_o", "ptr"),
        ("partial_md", "ptr"),
        ("counters", "ptr"),
        *((f"{x}_stride_{d}", "i64") for x, ds in (("q", "nh"), ("k", ("page", "n", "h"))) for d in ds),
        *((f"{x}_stride_{d}", "i64") for x, ds in (("v", ("page", "n", "h")), ("o", "nh")) for d in ds),
        *((f"group.{field}", "u32") for field in _DIVISOR),
        *((f"page_size.{field}", "u32") for field in _DIVISOR),
        ("num_qo_heads", "u32"),
        ("causal", "i32"),
        ("window_left", "i32"),
        *((name, "f32") for name in ("sm_scale", "sm_scale_log2", "out_scale", "soft_cap", "soft_cap_rcp")),
    ],
)
_MOST_SPILLED = 64


@lru_cache(maxsize=256)
def fast_div(divisor: int) -> tuple[int, int, int]:
    """(divisor, magic, shift) of kernels/attention/fast_div.cuh."""
    shift = (divisor - 1).bit_length()
    return divisor, ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1, shift


#: Head dim 128: 128 accumulators and 64 logits a thread at 255 registers, two CTAs a multiprocessor; 48 or 32 keys
#: a tile spill nothing and lose 6 and 10 % (H100). Head dim 64: 64 and 64 at 168, three CTAs; two lose 12 %.
_FULL_REGISTERS = "up to 250 bytes, outside the products; which instance spills how much changes with ptxas' version"


@lru_cache(maxsize=512)
def prefill_spec(
    dtype: DType,
    head_dim_qk: int,
    head_dim_vo: int,
    tiles: PrefillTiles,
    *,
    paged: bool,
    custom_mask: bool = False,
    alibi: bool = False,
    soft_cap: bool = False,
    positive_scale: bool = True,
) -> KernelSpec:
    """The prefill kernel for one element type, head dims and CTA shape (`plan.prefill.choose_tiles`).

    Causality and the window are run-time parameters: they cost nothing away from the tiles they cut.
    `positive_scale` False is for sm_scale <= 0, where the scale does not commute with the maximum.
    """
    dims = f"d{head_dim_qk}" + (f"x{head_dim_vo}" if head_dim_vo != head_dim_qk else "")
    options = (
        ("paged", paged),
        ("mask", custom_mask),
        ("alibi", alibi),
        ("cap", soft_cap),
        ("neg", not positive_scale),
    )
    suffix = "".join(f"_{name}" for name, on in options if on)
    flags = ", ".join("true" if on else "false" for on in (alibi, soft_cap, positive_scale))
    return KernelSpec(
        symbol=f"prefill_{dtype.tag}_{dims}_q{tiles.tile_q}k{tiles.tile_kv}{suffix}",
        header="attention/prefill.cuh",
        function="prefill",
        params=PARAMS,
        config=(
            ("T", dtype),
            ("kHeadDimQK", head_dim_qk),
            ("kHeadDimVO", head_dim_vo),
            ("kWarps", tiles.warps),
            ("kRowTiles", tiles.row_tiles),
            ("kTileKv", tiles.tile_kv),
            ("kPaged", paged),
            ("kCustomMask", custom_mask),
            ("Logits", CppType(f"fi::PrefillLogits<{flags}>")),
        ),
        threads=32 * tiles.warps,
        min_blocks=tiles.ctas_per_sm if tiles.row_tiles == 2 else 0,
        smem_bytes=tiles.smem_bytes,
        min_arch=75 if tiles.smem_bytes <= 64 * 1024 else 80,  # Turing has 64 KB of shared memory
        spills=_FULL_REGISTERS if tiles.row_tiles == 2 and tiles.tile_kv == 64 else "",
    )


#: (shared memory a CTA, shared memory a multiprocessor) of the GPUs `kernel_specs` is made for.
_GPUS = {75: (65536, 65536), 80: (166912, 167936), 86: (101376, 102400), 90: (232448, 233472)}


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: what Turing, A100, RTX and Hopper or Blackwell cards run for the usual head dims."""
    specs: dict[KernelSpec, None] = {}

    def add(
        arch: int, dtype: DType, qk: int, vo: int, rows: int = 1024, *, paged: bool = True, **options: bool
    ) -> None:
        tiles = choose_tiles(rows, qk, vo, *_GPUS[arch])
        specs[prefill_spec(dtype, qk, vo, tiles, paged=paged, **options)] = None

    for dtype in (bfloat16, float16):
        for dim in (64, 128, 256):
            add(90, dtype, dim, dim)
        add(90, dtype, 128, 128, paged=False)
        add(75, dtype, 128, 128)
    add(90, bfloat16, 64, 64, paged=False)
    add(90, bfloat16, 64, 64, rows=16)
    add(90, bfloat16, 128, 128, rows=16)
    add(90, bfloat16, 128, 128, rows=64)
    add(80, bfloat16, 128, 128)
    add(86, bfloat16, 256, 256)
    add(75, float16, 256, 256)
    add(90, bfloat16, 192, 128, paged=False)
    add(90, bfloat16, 80, 80)
    add(90, bfloat16, 128, 128, custom_mask=True)
    add(90, bfloat16, 128, 128, paged=False, custom_mask=True, alibi=True, soft_cap=True)
    add(90, bfloat16, 128, 128, paged=False, soft_cap=True)
    add(90, bfloat16, 128, 128, paged=False, alibi=True)
    add(90, bfloat16, 128, 128, paged=False, positive_scale=False)
    return list(specs)


class Problem(NamedTuple):
    """What decides the kernel of a batch, apart from the lengths: hashable, so that re-planning looks it up."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    dtype: DType
    paged: bool
    custom_mask: bool
    alibi: bool
    soft_cap: bool
    variant: Lowered | None = None


@dataclass(frozen=True)
class Geometry:
    """Kernels and grid factors of a `Problem` on a device.

    Attributes
    ----------
    spec, negative_spec : KernelSpec
        For a positive sm_scale, and for any other.
    tiles : PrefillTiles
    group, num_kv_heads : int
    slots : int
        CTAs the device runs at once.
    head_dim_vo : int
    splittable : bool
        Whether a tile's keys may be split: a variant may not be mergeable.
    narrow_spec : KernelSpec or None
        A variant's kernel with twice the warps and half the rows a warp, for when `spec` spills registers.
    """

    spec: KernelSpec
    negative_spec: KernelSpec
    tiles: PrefillTiles
    group: int
    num_kv_heads: int
    slots: int
    head_dim_vo: int
    splittable: bool = True
    narrow_spec: KernelSpec | None = None

    def kernel(self, scale: float, device: int) -> Kernel:
        """The loaded kernel for an sm_scale.

        The wide shape leaves some 60 registers to what is not an accumulator. A few spilled values cost less than its
        two row tiles gain; beyond `_MOST_SPILLED` bytes the narrow shape is taken.
        """
        found = load_kernel(self.spec if scale > 0 else self.negative_spec, device)
        if self.narrow_spec is not None and found.meta.spill_bytes > _MOST_SPILLED:
            found = load_kernel(self.narrow_spec, device)
        return found

    def workspace(self, num_slots: int, most_slots: int = 0) -> WorkspaceLayout:
        """Layout of the partial results of `num_slots` chunks; room for (m, d) of `most_slots` keeps the offsets."""
        states = num_slots * self.num_kv_heads * self.tiles.tile_q
        layout = WorkspaceLayout()
        layout.add("partial_md", max(states, most_slots * self.num_kv_heads * self.tiles.tile_q) * 8)
        layout.add("partial_o", states * -(-self.head_dim_vo // 16) * 16 * 4)
        return layout


@lru_cache(maxsize=1024)
def geometry(problem: Problem, packed_rows: int, device: DeviceInfo) -> Geometry:
    """Kernels for requests of about `packed_rows` packed rows (a tile size is enough) on `device`."""
    p = problem
    narrow: KernelSpec | None = None
    smem_per_block = 65536 if device.code_number < 80 else device.smem_per_block
    tiles = choose_tiles(packed_rows, p.head_dim_qk, p.head_dim_vo, smem_per_block, device.smem_per_sm)
    spec, negative = (
        prefill_spec(
            p.dtype, p.head_dim_qk, p.head_dim_vo, tiles, paged=p.paged, custom_mask=p.custom_mask, alibi=p.alibi,
            soft_cap=p.soft_cap, positive_scale=positive,
        )
        for positive in (True, False)
    )  # fmt: skip
    if p.variant is not None:
        spec = negative = p.variant.specialise(spec, p.alibi, p.soft_cap)
        if tiles.row_tiles == 2:
            narrow = prefill_spec(
                p.dtype, p.head_dim_qk, p.head_dim_vo, narrow_tiles(tiles, p.head_dim_qk, p.head_dim_vo), paged=p.paged,
                custom_mask=p.custom_mask,
            )  # fmt: skip
            narrow = p.variant.specialise(narrow, p.alibi, p.soft_cap)
    return Geometry(
        spec, negative, tiles, p.num_qo_heads // p.num_kv_heads, p.num_kv_heads, device.num_sms * tiles.ctas_per_sm,
        p.head_dim_vo, p.variant is None or p.variant.splittable, narrow,
    )  # fmt: skip


def check_problem(op: str, p: Problem, on_cpu: bool = False) -> None:
    """Raise the typed error for sizes and types that no kernel takes; the CPU takes any head dim and float32."""
    if p.num_kv_heads < 1 or p.num_qo_heads % p.num_kv_heads:
        raise ArgumentError(
            f"{op}: num_qo_heads is {p.num_qo_heads}, expected a multiple of num_kv_heads = {p.num_kv_heads}"
        )
    if on_cpu:
        return
    if p.dtype not in HALF_TYPES:
        raise DTypeError(f"{op}: q has dtype {p.dtype.name}, expected float16 or bfloat16 on the GPU")
    for name, dim in (("head_dim_qk", p.head_dim_qk), ("head_dim_vo", p.head_dim_vo)):
        if dim % 8 or not 0 < dim <= 256:
            raise ShapeError(f"{op}: {name} is {dim}, expected a multiple of 8 up to 256")


def scale_floats(sm_scale: float, out_scale: float, soft_cap: float) -> tuple[float, ...]:
    """The last five fields of PARAMS."""
    return sm_scale, sm_scale * LOG2E, out_scale, soft_cap, 1.0 / soft_cap if soft_cap > 0 else 0.0
