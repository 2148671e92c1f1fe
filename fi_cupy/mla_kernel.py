"""The latent attention kernels as the wrappers see them: their instances, shapes, parameters and launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fi_cupy.dtypes import FP8_TYPES, HALF_TYPES, DType, bfloat16, float8_e4m3fn, float8_e5m2, float16, float32
from fi_cupy.errors import DTypeError, ShapeError, UnsupportedError
from fi_cupy.jit.driver import has_driver_binding, tensor_map
from fi_cupy.jit.kernel import Kernel, load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import CppType, CppValue, KernelSpec
from fi_cupy.plan.mla import Costs
from fi_cupy.plan.workspace import WorkspaceLayout
from fi_cupy.prefill_hopper import map_step
from fi_cupy.prefill_params import PARAMS as PREFILL_PARAMS

if TYPE_CHECKING:
    from fi_cupy.arrays import View
    from fi_cupy.device import DeviceInfo
    from fi_cupy.jit.lower import Lowered

#: Columns of a latent row: values (and keys without position), and rotated keys.
CKV, KPE = 512, 64
#: Columns of ckv that share a factor of `ckv_scale_arr`.
SCALE_COLUMNS = 128

PARAMS = ParamsStruct(
    "MlaParams",
    [
        *PREFILL_PARAMS.fields,
        ("q_pe", "ptr"),
        ("token_scales", "ptr"),
        ("q_pe_stride_n", "i64"),
        ("q_pe_stride_h", "i64"),
        ("pe_ratio", "f32"),
        ("lse_factor", "f32"),
        ("table_ready", "u32"),
    ],
)
#: The same, then 32 frequencies as opaque blocks of 16.
ROPE_PARAMS = ParamsStruct("MlaRopeParams", [*PARAMS.fields, *((f"turns[{i}]", "tensormap") for i in (0, 16))])
HOPPER_PARAMS = ParamsStruct(
    "MlaHopperParams", [*PARAMS.fields, ("ckv_map", "tensormap"), ("kpe_map", "tensormap"), ("box_rows", "u32")]
)


class MlaTiles(NamedTuple):
    """Shape of a CTA of the portable kernel: warps of rows and of columns, keys a tile, tiles in flight."""

    row_warps: int
    col_warps: int
    tile_kv: int
    stages: int
    smem_bytes: int

    @property
    def tile_q(self) -> int:
        """Packed rows of a CTA."""
        return 16 * self.row_warps

    @property
    def threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.row_warps * self.col_warps


class MlaHopperTiles(NamedTuple):
    """Shape of a CTA of the Hopper kernel. columns: those of a product of weights and values, 128 or 256."""

    tile_q: int = 64
    tile_kv: int = 64
    smem_bytes: int = 3 * 9 * 64 * 128 + 1280  # q, two tiles, struct MlaHopperShared
    columns: int = 128


HOPPER_TILES = MlaHopperTiles()
#: For chunks of prompts. The others' loads are what takes longest, and those begin sooner after narrow products.
HOPPER_WIDE = HOPPER_TILES._replace(columns=256)


def smem_bytes(row_warps: int, col_warps: int, tile_kv: int, stages: int, fp8: bool) -> int:
    """Dynamic shared memory of kernels/attention/mla.cuh: struct MlaShape."""
    rows, row_bytes = 16 * row_warps, 2 * (CKV + KPE)
    tile = tile_kv * row_bytes
    p_row = (tile_kv // 8 | 1) * 16  # TileLayout<32>
    latent = stages * (tile // 2) + tile if fp8 else stages * tile
    return rows * row_bytes + latent + rows * p_row + 4 * col_warps * rows + 80


@lru_cache(maxsize=256)
def choose_tiles(packed_rows: int, smem_per_block: int, fp8: bool) -> MlaTiles:
    """The CTA shape for requests of about `packed_rows` (query token, head) pairs.

    16 rows are four warps of 128 columns, 64 rows eight warps of 256: those need 73 KB for q alone, so GPUs with 99 KB
    of shared memory keep to 16. Tiles of 32 keys; as many in flight as fit, up to 5 (184 KB, which a multiprocessor
    has to have in flight to read at full rate).
    """
    # Last: fp8 on Turing, where bytes and widened tile of 32 keys do not fit.
    shapes = [(4, 2, 32)] * (packed_rows > 16) + [(1, 4, 32), (1, 2, 16)]
    for row_warps, col_warps, tile_kv in shapes:
        for stages in range(5, 0, -1):
            size = smem_bytes(row_warps, col_warps, tile_kv, stages, fp8)
            if size <= smem_per_block and (stages > 1 or row_warps == 1):
                return MlaTiles(row_warps, col_warps, tile_kv, stages, size)
    raise UnsupportedError(f"latent attention: a CTA has {smem_per_block} bytes of shared memory, 48 KB are needed")


@lru_cache(maxsize=256)
def mla_spec(
    dtype: DType, tiles: MlaTiles, *, kv: DType | None = None, out: DType | None = None, token_scales: bool = False,
    rope: bool = False, soft_cap: bool = False, positive_scale: bool = True,
) -> KernelSpec:  # fmt: skip
    """The portable kernel.

    `kv`: `dtype` or an fp8 type; `token_scales`: fp8 with a factor for each 128 columns of a token.
    """
    kv, out = kv or dtype, out or dtype
    types = dtype.tag + "".join(f"_{n}{t.tag}" for n, t in (("kv", kv), ("o", out)) if t is not dtype)
    options = (("tokens", token_scales), ("rope", rope), ("cap", soft_cap), ("neg", not positive_scale))
    suffix = "".join(f"_{name}" for name, on in options if on)
    flags = ", ".join("true" if on else "false" for on in (False, soft_cap, positive_scale, False))
    return KernelSpec(
        symbol=f"mla_{types}_q{tiles.tile_q}k{tiles.tile_kv}x{tiles.stages}{suffix}",
        header="attention/mla.cuh",
        function="mla",
        params=ROPE_PARAMS if rope else PARAMS,
        config=(
            ("T", dtype),
            ("KV", kv),
            ("O", out),
            ("kRowWarps", tiles.row_warps),
            ("kColWarps", tiles.col_warps),
            ("kTileKv", tiles.tile_kv),
            ("kStages", tiles.stages),
            ("kTokenScales", token_scales),
            ("kRope", rope),
            ("Logits", CppType(f"fi::PrefillLogits<{flags}>")),
        ),
        threads=tiles.threads,
        min_blocks=1,
        smem_bytes=tiles.smem_bytes,
        min_arch=75 if tiles.smem_bytes <= 64 * 1024 else 80,  # Turing has 64 KB of shared memory
    )


@lru_cache(maxsize=64)
def hopper_spec(
    dtype: DType, *, kv: DType | None = None, out: DType | None = None, gather: bool = False,
    token_scales: bool = False, soft_cap: bool = False, positive_scale: bool = True, columns: int = 128,
) -> KernelSpec:  # fmt: skip
    """The Hopper kernel. `gather`: 16-bit rows are copied one by one, since pages are no multiple of 8 tokens."""
    kv, out = kv or dtype, out or dtype
    load = "kFp8" if kv is not dtype else "kRows" if gather else "kBoxes"
    options = (
        (f"kv{kv.tag}", kv is not dtype), (f"o{out.tag}", out is not dtype), ("gather", load == "kRows"),
        ("wide", columns == 256), ("tokens", token_scales), ("cap", soft_cap), ("neg", not positive_scale),
    )  # fmt: skip
    suffix = "".join(f"_{name}" for name, on in options if on)
    flags = ", ".join("true" if on else "false" for on in (False, soft_cap, positive_scale, False))
    return KernelSpec(
        symbol=f"mla_hopper_{dtype.tag}{suffix}",
        header="attention/mla_hopper.cuh",
        function="mla_hopper",
        params=HOPPER_PARAMS,
        config=(
            ("T", dtype),
            ("KV", kv),
            ("O", out),
            ("kLoad", CppValue(f"fi::MlaLoad::{load}")),
            ("kColumns", columns),
            ("kTokenScales", token_scales),
            ("Logits", CppType(f"fi::PrefillLogits<{flags}>")),
        ),
        threads=384 if kv is dtype else 512,
        min_blocks=1,
        smem_bytes=HOPPER_TILES.smem_bytes,
        spills=""
        if kv is dtype
        else "50 to 400 bytes: 512 threads start with 128 registers each, and half a tile waits in the producers'",
        min_arch=90,
        max_arch=90,
    )


def refusal(p: Problem, device: DeviceInfo) -> str:
    """Why the Hopper kernel does not take this problem; empty if it does. The one rule for falling back."""
    if device.arch != "90a":
        return f"the target is {device.arch}, not 90a"
    if not has_driver_binding():
        return "cuda-bindings, which encodes tensor maps, is not installed"
    if p.rope:
        return "keys have to be rotated, which the copy engine cannot"
    return ""


class Problem(NamedTuple):
    """What decides the kernel of a batch, apart from the lengths: hashable."""

    num_heads: int
    dtype: DType  # of q
    kv: DType
    page_size: int
    soft_cap: bool = False
    rope: bool = False
    variant: Lowered | None = None
    backend: str = "auto"  # "fa2": the portable kernel, "fa3": the Hopper kernel or an error


#: In tiles of 32 keys (1.6 us of a multiprocessor's share of the memory): parts of 32 KB, written and read at 4 TB/s.
PORTABLE_COSTS = Costs(start=1.5, part=2.0, add=0.05, traffic=0.02)
#: In tiles of 64 keys (about 1.8 us): parts of 128 KB, tiles of 74 KB at 2.5 TB/s.
HOPPER_COSTS = Costs(start=1.5, part=1.5, add=0.025, traffic=0.037, memory=0.0163)


class Call(NamedTuple):
    """What a `run` adds to the choice of the instance."""

    positive_scale: bool = True
    out: DType | None = None  # None: that of q
    token_scales: bool = False


@dataclass(frozen=True)
class Geometry:
    """Kernel and grid factors of a `Problem` on a device.

    Attributes
    ----------
    problem : Problem
    tiles : MlaTiles or MlaHopperTiles
    choice : str
        Which kernel it is, and why.
    slots : int
        CTAs the device runs at once.
    """

    problem: Problem
    tiles: MlaTiles | MlaHopperTiles
    choice: str
    slots: int

    @property
    def hopper(self) -> bool:
        """Whether it is the Hopper kernel."""
        return isinstance(self.tiles, MlaHopperTiles)

    def spec(self, call: Call) -> KernelSpec:
        """The instance for a call."""
        p, positive = self.problem, call.positive_scale or self.problem.variant is not None
        if isinstance(self.tiles, MlaHopperTiles):
            plain = hopper_spec(
                p.dtype, kv=p.kv, out=call.out, gather=gathers(p.page_size), token_scales=call.token_scales,
                soft_cap=p.soft_cap, positive_scale=positive, columns=self.tiles.columns,
            )  # fmt: skip
        else:
            plain = mla_spec(
                p.dtype, self.tiles, kv=p.kv, out=call.out, token_scales=call.token_scales, rope=p.rope,
                soft_cap=p.soft_cap, positive_scale=positive,
            )  # fmt: skip
        return plain if p.variant is None else p.variant.specialise(plain, False, p.soft_cap)

    @property
    def group(self) -> int:
        """Query heads that share the keys: all."""
        return self.problem.num_heads

    @property
    def num_kv_heads(self) -> int:
        """The latent cache has one."""
        return 1

    def grid(self, num_items: int) -> tuple[int, int, int]:
        """Grid of the kernel: a CTA an item."""
        return num_items, 1, 1

    @property
    def costs(self) -> Costs:
        """For the schedule."""
        return HOPPER_COSTS if self.hopper else PORTABLE_COSTS

    def load(self, call: Call, device: int) -> Kernel:
        """The loaded kernel for a call."""
        return load_kernel(self.spec(call), device)

    def kernel(self, scale: float, device: int) -> Kernel:
        """The loaded kernel of a plan's usual call."""
        return self.load(Call(scale > 0), device)

    def workspace(self, num_slots: int, most_slots: int = 0) -> WorkspaceLayout:
        """Layout of the partial results of `num_slots` chunks; room for (m, d) of `most_slots` keeps the offsets."""
        layout = WorkspaceLayout()
        layout.add("partial_md", max(num_slots, most_slots) * self.tiles.tile_q * 8)
        layout.add("partial_o", num_slots * self.tiles.tile_q * CKV * 4)
        return layout

    def num_counters(self, num_slots: int) -> int:
        """Zeroed words that the kernel wants for `num_slots` chunks, and leaves zero."""
        return 2 * num_slots


@lru_cache(maxsize=1024)
def geometry(problem: Problem, packed_rows: int, device: DeviceInfo) -> Geometry:
    """Kernel for requests of about `packed_rows` packed rows on `device`.

    The Hopper kernel is taken where `refusal` has nothing against it and there are rows for more than a quarter of its
    tile; "fa2" and "fa3" insist on one.

    Raises
    ------
    UnsupportedError
        backend="fa3" for what the Hopper kernel does not take.
    """
    reason = "backend='fa2'" if problem.backend == "fa2" else refusal(problem, device)
    if problem.backend == "fa3" and reason:
        raise UnsupportedError(f"latent attention: backend is 'fa3', but the Hopper kernel is not for this: {reason}")
    if not reason and problem.backend == "auto" and packed_rows <= FEW_ROWS:
        reason = f"{packed_rows} rows a request would leave most of its tile empty"
    if not reason:
        boxes = problem.kv is problem.dtype and not gathers(problem.page_size)
        hopper = HOPPER_WIDE if boxes and packed_rows > WIDE_ROWS else HOPPER_TILES
        return Geometry(problem, hopper, "the Hopper kernel (wgmma, TMA)", device.num_sms)
    fp8 = problem.kv in FP8_TYPES
    smem_per_block = 65536 if device.code_number < 80 else device.smem_per_block
    tiles, ctas = choose_tiles(min(packed_rows, 64), smem_per_block, fp8), 1
    if fp8 and packed_rows <= FEW_ROWS and 2 * (FEW_FP8.smem_bytes + 1024) <= device.smem_per_sm:
        tiles, ctas = FEW_FP8, 2  # one CTA widens while the other one multiplies
    return Geometry(problem, tiles, f"the portable kernel (mma.sync): {reason}", ctas * device.num_sms)


#: The CTA of 16 rows and fp8 keys of which a multiprocessor runs two, where it has the memory.
FEW_FP8 = MlaTiles(1, 4, 32, 2, smem_bytes(1, 4, 32, 2, True))
#: Rows a request up to which the portable kernel's tile of 16 rows is the better one: it reads memory all the time.
FEW_ROWS = 16
#: Rows a request above which its tiles find most keys in L2, and the Hopper kernel's products are wide.
WIDE_ROWS = 512


def check_problem(op: str, p: Problem, head_dim_ckv: int, head_dim_kpe: int, on_cpu: bool) -> None:
    """Raise the typed error for sizes and types that no kernel takes; the CPU takes any head dims and float32."""
    if p.dtype not in HALF_TYPES and not (on_cpu and p.dtype is float32):
        raise DTypeError(f"{op}: q has dtype {p.dtype.name}, expected float16 or bfloat16")
    if p.kv is not p.dtype and p.kv not in FP8_TYPES:
        raise DTypeError(
            f"{op}: the caches have dtype {p.kv.name}, expected {p.dtype.name} like q, float8_e4m3fn or float8_e5m2"
        )
    if not on_cpu and (head_dim_ckv, head_dim_kpe) != (CKV, KPE):
        raise ShapeError(
            f"{op}: head_dim_ckv, head_dim_kpe are {head_dim_ckv}, {head_dim_kpe}, expected {CKV}, {KPE} on the GPU"
        )


def launch_more(
    g: Geometry, x: View, x_pe: View, caches: list[View], token_scales: View | None, pe_ratio: float,
    lse_factor: float, table_ready: bool, turns: tuple[bytes, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """The fields of the kernel's struct behind those of the prefill kernel's.

    `table_ready`: whether the page numbers came with the work items, and not from a kernel in front.
    """
    more: tuple[Any, ...] = turns
    if g.hopper:
        ckv, kpe = ((c.ptr, c.strides[0], c.strides[1]) for c in caches)
        boxes = caches[0].dtype is x.dtype and not gathers(g.problem.page_size)
        more = hopper_maps(x.dtype.name, g.problem.page_size, caches[0].shape[0], ckv, kpe) if boxes else NO_MAPS
    return (
        x_pe.ptr, 0 if token_scales is None else token_scales.ptr, x_pe.strides[0], x_pe.strides[1], pe_ratio,
        lse_factor, int(table_ready), *more,
    )  # fmt: skip


#: Where rows are gathered nobody reads the maps.
NO_MAPS = bytes(128), bytes(128), 0


@lru_cache(maxsize=1024)
def hopper_maps(
    dtype: str, page_size: int, pages: int, ckv: tuple[int, int, int], kpe: tuple[int, int, int]
) -> tuple[Any, ...]:
    """The tensor maps of the caches, (address, page and token stride in elements) each, and the rows of a box."""
    rows = math.gcd(page_size, HOPPER_TILES.tile_kv)
    maps = []
    for name, (address, page, token), panels in (("ckv", ckv, CKV // 64), ("kpe", kpe, 1)):
        step = map_step(f"latent attention: {name}", page_size, token)
        extents = (64, 8, panels, page_size // 8, max(pages, 1))
        strides = (step, 128, 8 * step, map_step(f"latent attention: {name}", pages, page))
        maps.append(encode_map(dtype, address, extents, strides, (64, 8, 1, rows // 8, 1)))
    return (*maps, rows)


def gathers(page_size: int) -> bool:
    """Whether the Hopper kernel copies rows one by one: the swizzle repeats after 8, so boxes are multiples of 8."""
    return page_size % 8 != 0


def encode_map(*args: Any) -> bytes:
    """`tensor_map`, in the place where tests put their own."""
    return tensor_map(*args)


#: (shared memory a CTA) of the GPUs `kernel_specs` is made for.
_SMEM = {75: 65536, 80: 166912, 86: 101376, 90: 232448}


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: 16 and 64 rows on every kind of GPU, the Hopper kernel, and every option once."""
    from fi_cupy.variants import define_variant

    biased = define_variant(
        name="canonical_bias",
        score_fn=lambda score, ctx: score + ctx.bias[ctx.qo_head] * (ctx.kv_idx - ctx.qo_idx),
        mask_fn=lambda ctx: ctx.kv_idx % 2 == 0,
        tensors={"bias": "float32"},
    ).lowered()
    few = {arch: choose_tiles(16, size, False) for arch, size in _SMEM.items()}
    with_variant = Problem(128, float16, float8_e5m2, 16, variant=biased)
    call = Call(out=float8_e4m3fn, token_scales=True)
    specs = [
        mla_spec(float16, few[75]),
        mla_spec(bfloat16, few[86]),
        mla_spec(bfloat16, few[90]),
        mla_spec(bfloat16, choose_tiles(64, _SMEM[80], False)),
        mla_spec(bfloat16, choose_tiles(64, _SMEM[90], True), kv=float8_e4m3fn),
        Geometry(with_variant, FEW_FP8, "", 264).spec(call),
        mla_spec(bfloat16, few[90], rope=True, soft_cap=True),
        hopper_spec(bfloat16),
        hopper_spec(bfloat16, columns=256),
        hopper_spec(bfloat16, gather=True),
        hopper_spec(bfloat16, kv=float8_e4m3fn),
        Geometry(with_variant, HOPPER_TILES, "", 132).spec(call),
    ]
    return list(dict.fromkeys(specs))
