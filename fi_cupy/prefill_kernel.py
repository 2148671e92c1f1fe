"""The prefill kernel as an operator sees it: its instances, the shape it runs in, its parameters and its launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fi_cupy import prefill_hopper
from fi_cupy.dtypes import FP8_TYPES, HALF_TYPES, DType, bfloat16, float8_e4m3fn, float8_e5m2, float16, float32
from fi_cupy.errors import ArgumentError, DTypeError, ShapeError, UnsupportedError
from fi_cupy.jit.kernel import Kernel, load_kernel
from fi_cupy.jit.spec import CppType, KernelSpec
from fi_cupy.plan.prefill import TAIL_HEADS, PrefillTiles, TileKind, choose_tiles, narrow_tiles
from fi_cupy.plan.workspace import WorkspaceLayout
from fi_cupy.prefill_hopper import (
    HopperTiles,
    Load,
    hopper_spec,
    hopper_tiles,
    refusal,
    too_little,
    wants_fine_tiles,
    wants_short_tiles,
)  # fmt: skip
from fi_cupy.prefill_params import PARAMS, ROPE_PARAMS

if TYPE_CHECKING:
    from fi_cupy.device import DeviceInfo
    from fi_cupy.jit.lower import Lowered

LOG2E = math.log2(math.e)
#: window_left that is off: far enough left of any key, and no overflow when it is subtracted.
NO_WINDOW = 1 << 30

_MOST_SPILLED = 64
_MOST_KV_HEADS = 65535  # the grid's second dimension


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
    rope: bool = False,
    head_scales: bool = False,
    q: DType | None = None,
    kv: DType | None = None,
    out: DType | None = None,
) -> KernelSpec:
    """The prefill kernel for the type that is multiplied, head dims and CTA shape (`plan.prefill.choose_tiles`).

    Causality and the window are run-time parameters: they cost nothing away from the tiles they cut.
    `positive_scale` False is for sm_scale <= 0, where the scale does not commute with the maximum; `head_scales` for
    factors of q or k a head, which only the GPU knows. `q`, `kv`: `dtype` or an fp8 type; `out`: any float.
    """
    q, kv, out = q or dtype, kv or dtype, out or dtype
    types = dtype.tag + "".join(f"_{n}{t.tag}" for n, t in (("q", q), ("kv", kv), ("o", out)) if t is not dtype)
    dims = f"d{head_dim_qk}" + (f"x{head_dim_vo}" if head_dim_vo != head_dim_qk else "")
    options = (
        ("paged", paged),
        ("mask", custom_mask),
        ("alibi", alibi),
        ("cap", soft_cap),
        ("neg", not positive_scale),
        ("rope", rope),
        ("heads", head_scales),
    )
    suffix = "".join(f"_{name}" for name, on in options if on)
    flags = ", ".join("true" if on else "false" for on in (alibi, soft_cap, positive_scale, head_scales))
    return KernelSpec(
        symbol=f"prefill_{types}_{dims}_q{tiles.tile_q}k{tiles.tile_kv}{suffix}",
        header="attention/prefill.cuh",
        function="prefill",
        params=ROPE_PARAMS if rope else PARAMS,
        config=(
            ("T", dtype),
            ("Q", q),
            ("KV", kv),
            ("O", out),
            ("kHeadDimQK", head_dim_qk),
            ("kHeadDimVO", head_dim_vo),
            ("kWarps", tiles.warps),
            ("kRowTiles", tiles.row_tiles),
            ("kTileKv", tiles.tile_kv),
            ("kPaged", paged),
            ("kCustomMask", custom_mask),
            ("kRope", rope),
            ("Logits", CppType(f"fi::PrefillLogits<{flags}>")),
        ),
        threads=32 * tiles.warps,
        # Tile passes and other outputs need a few registers more than the bound leaves without spills.
        min_blocks=tiles.ctas_per_sm if tiles.row_tiles == 2 and not rope and q is kv is out is dtype else 0,
        smem_bytes=tiles.smem_bytes,
        min_arch=75 if tiles.smem_bytes <= 64 * 1024 else 80,  # Turing has 64 KB of shared memory
        spills=_FULL_REGISTERS if tiles.row_tiles == 2 and tiles.tile_kv == 64 else "",
    )


#: (shared memory a CTA, shared memory a multiprocessor) of the GPUs `kernel_specs` is made for.
_GPUS = {75: (65536, 65536), 80: (166912, 167936), 86: (101376, 102400), 90: (232448, 233472)}


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: what Turing, A100, RTX and Hopper or Blackwell cards run for the usual head dims."""
    specs: dict[KernelSpec, None] = {}

    def add(arch: int, dtype: DType, qk: int, vo: int, rows: int = 1024, *, paged: bool = True, **options: Any) -> None:
        kind = TileKind("kv" in options, "rope" in options)
        tiles = choose_tiles(rows, qk, vo, *_GPUS[arch], kind)
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
    add(90, bfloat16, 128, 128, kv=float8_e4m3fn)
    add(90, bfloat16, 128, 128, rows=16, kv=float8_e4m3fn)
    add(90, float16, 128, 128, paged=False, kv=float8_e5m2)
    add(75, float16, 128, 128, kv=float8_e4m3fn)
    add(90, bfloat16, 72, 72, kv=float8_e4m3fn)
    add(90, bfloat16, 128, 128, q=float8_e4m3fn, kv=float8_e4m3fn, head_scales=True)
    add(90, float16, 64, 64, q=float8_e4m3fn, kv=float8_e4m3fn, out=float8_e4m3fn)
    add(90, bfloat16, 128, 128, rope=True)
    add(90, bfloat16, 128, 128, rows=16, rope=True)
    add(90, float16, 64, 64, kv=float8_e4m3fn, rope=True)
    add(90, bfloat16, 64, 64, out=float32)
    return [*specs, *prefill_hopper.kernel_specs()]


class Problem(NamedTuple):
    """What decides the kernel of a batch, apart from the lengths: hashable, so that re-planning looks it up."""

    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    dtype: DType  # of q
    paged: bool
    custom_mask: bool
    alibi: bool
    soft_cap: bool
    variant: Lowered | None = None
    rope: bool = False
    kv_dtype: DType | None = None  # None: that of q
    out_dtype: DType | None = None
    page_size: int = 0  # of a paged cache; 0: unknown
    backend: str = "auto"  # "fa2": the portable kernel, "fa3": the Hopper kernel or an error
    mappable: bool = True  # no stride is known to be negative (`prefill_hopper.mappable`)

    @property
    def kv(self) -> DType:
        """Type of keys and values."""
        return self.kv_dtype or self.dtype

    @property
    def out(self) -> DType:
        """Type of the output."""
        return self.out_dtype or self.dtype

    @property
    def math(self) -> DType:
        """The 16-bit type that is multiplied: of q, k, the output or float16; both hold any fp8 value."""
        return next((t for t in (self.dtype, self.kv, self.out) if t in HALF_TYPES), float16)

    @property
    def kind(self) -> TileKind:
        """What decides the CTA's shared memory beside the head dims."""
        return TileKind(self.kv in FP8_TYPES, self.rope)


@dataclass(frozen=True)
class Geometry:
    """Kernels and grid factors of a `Problem` on a device.

    Attributes
    ----------
    spec, negative_spec : KernelSpec
        For a positive sm_scale, and for any other.
    heads_spec : KernelSpec
        For factors of q or k a head.
    tiles : PrefillTiles or HopperTiles
    choice : str
        Which kernel it is, and why.
    group, num_kv_heads : int
    slots : int
        CTAs the device runs at once.
    head_dim_vo : int
    splittable : bool
        Whether a tile's keys may be split: a variant may not be mergeable.
    narrow_spec : KernelSpec or None
        A variant's kernel with twice the warps and half the rows a warp, for when `spec` spills registers.
    paged : bool
        Whether keys and values lie in pages.
    """

    spec: KernelSpec
    negative_spec: KernelSpec
    heads_spec: KernelSpec
    tiles: PrefillTiles | HopperTiles
    choice: str
    group: int
    num_kv_heads: int
    slots: int
    head_dim_vo: int
    splittable: bool = True
    narrow_spec: KernelSpec | None = None
    narrow_heads_spec: KernelSpec | None = None
    paged: bool = False

    def kernel(self, scale: float, device: int, head_scales: bool = False) -> Kernel:
        """The loaded kernel for an sm_scale, or for factors of q or k a head.

        The wide shape leaves some 60 registers to what is not an accumulator. A few spilled values cost less than its
        two row tiles gain; beyond `_MOST_SPILLED` bytes the narrow shape is taken.
        """
        spec, narrow = self.spec if scale > 0 else self.negative_spec, self.narrow_spec
        if head_scales:
            spec, narrow = self.heads_spec, self.narrow_heads_spec
        found = load_kernel(spec, device)
        if narrow is not None and found.meta.spill_bytes > _MOST_SPILLED:
            found = load_kernel(narrow, device)
        return found

    def workspace(self, num_slots: int, most_slots: int = 0) -> WorkspaceLayout:
        """Layout of the partial results of `num_slots` chunks; room for (m, d) of `most_slots` keeps the offsets."""
        states = num_slots * self.num_kv_heads * self.tiles.tile_q
        layout = WorkspaceLayout()
        layout.add("partial_md", max(states, most_slots * self.num_kv_heads * self.tiles.tile_q) * 8)
        layout.add("partial_o", states * -(-self.head_dim_vo // 16) * 16 * 4)
        return layout

    def num_counters(self, num_slots: int) -> int:
        """Zeroed words that the kernel wants for `num_slots` chunks, and leaves zero."""
        if self.hopper is None:
            return num_slots * self.num_kv_heads
        return 1 + num_slots * self.num_kv_heads * self.hopper.consumers  # one for the work handed out

    @property
    def hopper(self) -> HopperTiles | None:
        """The Hopper kernel's tiles, or None for the portable kernel."""
        return self.tiles if isinstance(self.tiles, HopperTiles) else None

    def split_tail(self, rounds: int = 2) -> int:
        """For ``plan_prefill(split_tail=)``: as many items as are so many rounds of all multiprocessors."""
        if self.hopper is None or self.num_kv_heads > TAIL_HEADS:
            return 0
        return rounds * -(-self.slots // self.num_kv_heads)

    def grid(self, num_items: int) -> tuple[int, int, int]:
        """Grid of the kernel: every item once a kv head; the Hopper kernel's CTAs may take many."""
        if self.hopper is None:
            return num_items, self.num_kv_heads, 1
        work = num_items * self.num_kv_heads
        return (min(work, self.slots) if self.hopper.slots > 1 else work), 1, 1


@lru_cache(maxsize=4096)
def geometry(problem: Problem, packed_rows: int, device: DeviceInfo, load: Load | None = None) -> Geometry:
    """Kernels for requests of about `packed_rows` packed rows on `device`.

    The Hopper kernel is taken where `prefill_hopper.refusal` has nothing against it and, if there is a `load`,
    `prefill_hopper.too_little` has not either; "fa2" and "fa3" insist on one. The load also decides the height of its
    tiles. Without one the choice is the same for every batch.

    Raises
    ------
    UnsupportedError
        backend="fa3" for what the Hopper kernel does not take.
    """
    p = problem
    reason = "backend='fa2'" if p.backend == "fa2" else refusal(p, device)
    if p.backend == "fa3" and reason:
        raise UnsupportedError(f"prefill: backend is 'fa3', but the Hopper kernel is not for this: {reason}")
    short = fine = False
    if not reason and load is not None:
        short, fine = wants_short_tiles(load, p.num_kv_heads, device.num_sms), wants_fine_tiles(load)
        if p.backend == "auto":
            reason = too_little(load)
    return _portable(p, min(packed_rows, 128), device, reason) if reason else _hopper(p, device, short, fine)


@lru_cache(maxsize=1024)
def _hopper(p: Problem, device: DeviceInfo, short: bool, fine: bool) -> Geometry:
    group = p.num_qo_heads // p.num_kv_heads
    tiles = hopper_tiles(p, short, fine)

    def spec_of(positive: bool = True, heads: bool = False) -> KernelSpec:
        plain = hopper_spec(
            p.dtype, tiles, paged=p.paged, query_boxes=tiles.tile_q % group == 0, alibi=p.alibi, soft_cap=p.soft_cap,
            positive_scale=positive, head_scales=heads,
        )  # fmt: skip
        return plain if p.variant is None else p.variant.specialise(plain, p.alibi, p.soft_cap, heads, positive)

    return Geometry(
        spec_of(), spec_of(False), spec_of(heads=True), tiles, "the Hopper kernel (wgmma, TMA)", group,
        p.num_kv_heads, device.num_sms, p.head_dim_vo, p.variant is None or p.variant.splittable, paged=p.paged,
    )  # fmt: skip


@lru_cache(maxsize=1024)
def _portable(p: Problem, packed_rows: int, device: DeviceInfo, reason: str) -> Geometry:
    smem_per_block = 65536 if device.code_number < 80 else device.smem_per_block
    tiles = choose_tiles(packed_rows, p.head_dim_qk, p.head_dim_vo, smem_per_block, device.smem_per_sm, p.kind)

    def spec_of(tiles: PrefillTiles, positive: bool = True, heads: bool = False) -> KernelSpec:
        plain = prefill_spec(
            p.math, p.head_dim_qk, p.head_dim_vo, tiles, paged=p.paged, custom_mask=p.custom_mask, rope=p.rope,
            alibi=p.alibi, soft_cap=p.soft_cap, positive_scale=positive, head_scales=heads, q=p.dtype, kv=p.kv,
            out=p.out,
        )  # fmt: skip
        return plain if p.variant is None else p.variant.specialise(plain, p.alibi, p.soft_cap, heads)

    spec, negative, heads = spec_of(tiles), spec_of(tiles, False), spec_of(tiles, heads=True)
    narrow = narrow_heads = None
    if p.variant is not None:
        negative = spec
        if tiles.row_tiles == 2:
            slim = narrow_tiles(tiles, p.head_dim_qk, p.head_dim_vo, p.kind)
            narrow, narrow_heads = spec_of(slim), spec_of(slim, heads=True)
    return Geometry(
        spec, negative, heads, tiles, f"the portable kernel (mma.sync): {reason}", p.num_qo_heads // p.num_kv_heads,
        p.num_kv_heads, device.num_sms * tiles.ctas_per_sm, p.head_dim_vo, p.variant is None or p.variant.splittable,
        narrow, narrow_heads, p.paged,
    )  # fmt: skip


def check_problem(op: str, p: Problem, on_cpu: bool = False) -> None:
    """Raise the typed error for sizes and types that no kernel takes; the CPU takes any head dim and float32."""
    if p.num_kv_heads < 1 or p.num_qo_heads % p.num_kv_heads:
        raise ArgumentError(
            f"{op}: num_qo_heads is {p.num_qo_heads}, expected a multiple of num_kv_heads = {p.num_kv_heads}"
        )
    if min(p.num_qo_heads, p.head_dim_qk, p.head_dim_vo) < 1:
        raise ShapeError(
            f"{op}: {p.num_qo_heads} query heads of head_dim_qk {p.head_dim_qk}, head_dim_vo {p.head_dim_vo}, expected "
            "at least 1 of each"
        )
    if p.dtype not in (*HALF_TYPES, *FP8_TYPES) and not (on_cpu and p.dtype is float32):
        raise DTypeError(
            f"{op}: q has dtype {p.dtype.name}, expected float16 or bfloat16 (float8_e4m3fn, float8_e5m2) on the GPU"
        )
    same = p.dtype if on_cpu and p.dtype is float32 else p.math
    if p.kv not in FP8_TYPES and p.kv is not same:
        raise DTypeError(
            f"{op}: keys and values have dtype {p.kv.name}, expected {same.name} like q, float8_e4m3fn or float8_e5m2"
        )
    if p.out not in (*HALF_TYPES, *FP8_TYPES, float32):
        raise DTypeError(f"{op}: the output has dtype {p.out.name}, expected a 16-bit or fp8 float, or float32")
    if on_cpu:
        return
    for name, dim in (("head_dim_qk", p.head_dim_qk), ("head_dim_vo", p.head_dim_vo)):
        if dim % 8 or not 0 < dim <= 256:
            raise ShapeError(f"{op}: {name} is {dim}, expected a multiple of 8 up to 256")
    if p.num_kv_heads > _MOST_KV_HEADS:
        raise UnsupportedError(f"{op}: num_kv_heads is {p.num_kv_heads}, expected at most {_MOST_KV_HEADS}")
    if p.rope and p.head_dim_qk % 16:
        raise ShapeError(f"{op}: head_dim_qk is {p.head_dim_qk}, expected a multiple of 16 with ROPE_LLAMA")


def scale_floats(sm_scale: float, out_scale: float, soft_cap: float) -> tuple[float, ...]:
    """The last five fields of PARAMS."""
    return sm_scale, sm_scale * LOG2E, out_scale, soft_cap, 1.0 / soft_cap if soft_cap > 0 else 0.0
