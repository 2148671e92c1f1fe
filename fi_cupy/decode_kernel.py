"""The decode kernel as an operator sees it: its instances, the shape it runs in for a batch, and its parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_aligned, check_device, check_dtype, check_inner, check_shape
from fi_cupy.dtypes import FP8_TYPES, HALF_TYPES, DType, bfloat16, float8_e4m3fn, float8_e5m2, float16, float32
from fi_cupy.errors import ArgumentError, DTypeError, ShapeError
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.kv_cache import as_fp8
from fi_cupy.plan.decode import DecodeTiles, choose_tiles, head_blocks, smem_bytes, tile_candidates
from fi_cupy.plan.workspace import WorkspaceLayout
from fi_cupy.reference.rope import rope_frequencies

if TYPE_CHECKING:
    from fi_cupy.device import DeviceInfo

LOG2E = math.log2(math.e)

_POINTERS = ("q", "k", "v", "out", "lse", "items", "indices", "sinks", "partial_out", "partial_md", "counters")
_STRIDES = (
    "q_stride_row", "q_stride_head", "out_stride_row", "out_stride_head", "k_stride_page", "k_stride_token",
    "k_stride_head", "v_stride_page", "v_stride_token", "v_stride_head",
)  # fmt: skip
_COUNTS = (
    "page_size.divisor", "page_size.magic", "page_size.shift", "num_head_blocks", "blocks_per_kv",
    "heads_per_block", "group_size", "table_ready", "resident", "shares",
)  # fmt: skip
_SINGLE = ("kv_len", "first_key", "chunk_keys", "num_chunks")
_FLOATS = ("logit_scale", "logit_cap", "slope_scale", "out_scale")
_FIELDS = [
    *((name, "ptr") for name in _POINTERS),
    *((name, "i64") for name in _STRIDES),
    *((name, "u32") for name in _COUNTS),
    *((name, "i32") for name in _SINGLE),
    *((name, "f32") for name in _FLOATS),
    *((f"scales.{name}", "ptr") for name in "qkv"),
    *((f"scales.{name}", "u32") for name in ("q_step", "k_step", "v_step", "unused")),
]
PARAMS = ParamsStruct("DecodeParams", _FIELDS)
#: The same, then 128 frequencies as opaque blocks of 16: they travel with the launch, so there is no table to keep.
ROPE_PARAMS = ParamsStruct(
    "DecodeRopeParams",
    [*((f"base.{name}", kind) for name, kind in _FIELDS), *((f"turns[{i}]", "tensormap") for i in range(0, 128, 16))],
)


@lru_cache(maxsize=512)
def decode_spec(
    dtype: DType,
    kv: DType,
    out: DType,
    head_dim: int,
    column_tiles: int,
    warps: int,
    stages: int,
    min_blocks: int = 1,
    *,
    tile_in_page: bool = True,
    soft_cap: bool = False,
    alibi: bool = False,
    rope: bool = False,
    head_scales: bool = False,
    head_pair: bool = False,
    shared_rows: bool = False,
) -> KernelSpec:
    """The decode kernel for queries of `dtype` over a cache of `kv`.

    Parameters
    ----------
    column_tiles : int
        Blocks of 8 query heads that one CTA serves (1 or 2).
    warps, stages, min_blocks : int
        See `plan.decode.choose_tiles`; `min_blocks` bounds the registers.
    tile_in_page : bool
        16 keys from a multiple of 16 on never cross a page: the page size is a multiple of 16, or the keys are
        contiguous.
    head_scales : bool
        There are factors of q or k a head, which only the GPU knows.
    head_pair : bool
        A CTA serves two neighbouring kv heads.
    shared_rows : bool
        The query heads of a kv head are more than one CTA's: several read a key, and L2 should keep it.
    """
    size = smem_bytes(warps, stages, head_dim, kv.itemsize, column_tiles, rope)
    types = dtype.tag + (f"_kv{kv.tag}" if kv is not dtype else "") + (f"_o{out.tag}" if out is not dtype else "")
    options = ("" if tile_in_page else "_rows") + ("_cap" if soft_cap else "") + ("_alibi" if alibi else "")
    options += ("_rope" if rope else "") + ("_heads" if head_scales else "") + ("_pair" if head_pair else "")
    options += "_shared" if shared_rows else ""
    return KernelSpec(
        symbol=f"batch_decode_{types}_d{head_dim}_h{8 * column_tiles}_w{warps}s{stages}b{min_blocks}{options}",
        header="attention/decode.cuh",
        function="batch_decode_rope" if rope else "batch_decode",
        params=ROPE_PARAMS if rope else PARAMS,
        config=(
            ("T", dtype),
            ("KV", kv),
            ("O", out),
            ("kHeadDim", head_dim),
            ("kTilesN", column_tiles),
            ("kWarps", warps),
            ("kStages", stages),
            ("kSmemBytes", size),
            ("kTileInPage", tile_in_page),
            ("kSoftCap", soft_cap),
            ("kAlibi", alibi),
            ("kRope", rope),
            ("kHeadScales", head_scales),
            ("kHeadPair", head_pair),
            ("kSharedRows", shared_rows),
        ),
        threads=32 * warps,
        min_blocks=min_blocks,
        smem_bytes=size,
        min_arch=75 if size <= 64 * 1024 else 80,  # Turing has 64 KB of shared memory
    )


#: (arch, multiprocessors, shared memory a CTA, shared memory a multiprocessor) of the GPUs `kernel_specs` is made for.
_GPUS = {75: (40, 65536, 65536), 80: (108, 166912, 167936), 86: (84, 101376, 102400), 90: (132, 232448, 233472)}


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: what a Turing, A100, RTX and Hopper or Blackwell card runs for the usual head dims."""
    specs: dict[KernelSpec, None] = {}

    def add(
        arch: int, dtype: DType, kv: DType, dim: int, group: int, groups: int, pair: bool = False, **options: bool
    ) -> None:  # fmt: skip
        sms, block, sm = _GPUS[arch]
        _, _, columns = head_blocks(group, dim)
        tiles = choose_tiles(
            groups,
            dim,
            kv.itemsize,
            columns,
            arch=arch,
            num_sms=sms,
            smem_per_block=block,
            smem_per_sm=sm,
            rope=options.get("rope", False),
            may_pair=pair,
        )
        specs[spec_of(tiles, dtype, kv, dtype, dim, columns, **options)] = None

    for dtype in (bfloat16, float16):
        for dim in (64, 128, 256):
            add(90, dtype, dtype, dim, 4, 1000)
    for dim in (64, 128):
        add(90, bfloat16, bfloat16, dim, 4, 8)
        add(90, bfloat16, float8_e4m3fn, dim, 4, 1000)
        for arch in (75, 80, 86):
            add(arch, bfloat16, bfloat16, dim, 4, 1000)
    add(75, float16, float16, 256, 4, 1000)
    add(86, bfloat16, bfloat16, 64, 4, 8)
    add(90, float16, float8_e5m2, 128, 4, 1000)
    add(90, bfloat16, bfloat16, 128, 16, 1000)
    add(90, bfloat16, bfloat16, 128, 16, 1000, tile_in_page=False, soft_cap=True, alibi=True)
    add(90, bfloat16, bfloat16, 80, 4, 1000, tile_in_page=False)
    add(90, bfloat16, bfloat16, 128, 4, 1000, soft_cap=True)
    add(90, bfloat16, bfloat16, 128, 4, 1000, alibi=True)
    add(90, bfloat16, bfloat16, 128, 4, 1000, rope=True)
    add(90, float16, float8_e4m3fn, 64, 4, 1000, rope=True, tile_in_page=False)
    for pair in (False, True):
        add(90, bfloat16, float8_e4m3fn, 128, 4, 1000, pair, head_scales=True)
    for dim in (64, 128):
        add(90, bfloat16, float8_e4m3fn, dim, 4, 1000, True)
    for arch in (80, 86):
        add(arch, float16, float8_e5m2, 128, 4, 1000, True)
    add(90, bfloat16, float8_e4m3fn, 128, 16, 1000, True)
    add(90, bfloat16, float8_e4m3fn, 80, 4, 1000, True, tile_in_page=False, soft_cap=True, alibi=True)
    add(90, bfloat16, float8_e4m3fn, 128, 4, 1000, True, rope=True)
    return list(specs)


def spec_of(
    tiles: DecodeTiles, dtype: DType, kv: DType, out: DType, head_dim: int, column_tiles: int, **options: bool
) -> KernelSpec:
    """`decode_spec` for a CTA shape."""
    return decode_spec(
        dtype, kv, out, head_dim, column_tiles, tiles.warps, tiles.stages, tiles.ctas_per_sm,
        head_pair=tiles.head_pair, **options,
    )  # fmt: skip


class Problem(NamedTuple):
    """What decides the kernel of a batch, apart from the lengths: hashable, so that re-planning looks it up."""

    batch_size: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: DType
    kv: DType
    out: DType
    tile_in_page: bool
    soft_cap: bool
    alibi: bool
    rope: bool
    batch_invariant: bool
    heads_adjacent: bool = False  # a token's kv heads lie side by side in the cache (NHD)


@dataclass(frozen=True)
class Geometry:
    """Kernel and grid factors of a `Problem` on a device.

    Attributes
    ----------
    spec, heads_spec : KernelSpec
        Without and with factors of q or k a head.
    num_head_blocks, blocks_per_kv, heads_per_block, group_size : int
        See `plan.decode.head_blocks`; the first counts those of all kv heads. Where a CTA serves a pair of kv heads
        there are half as many blocks, of twice as many heads.
    slots : int
        CTAs the device runs at once.
    head_dim : int
    """

    spec: KernelSpec
    heads_spec: KernelSpec
    num_head_blocks: int
    blocks_per_kv: int
    heads_per_block: int
    group_size: int
    slots: int
    head_dim: int

    def workspace(self, num_slots: int) -> WorkspaceLayout:
        """Layout of the partial results of `num_slots` chunks in the float workspace."""
        states = num_slots * self.num_head_blocks * self.heads_per_block
        layout = WorkspaceLayout()
        layout.add("partial_out", states * self.head_dim * 4)
        layout.add("partial_md", states * 8)
        return layout


def _device_limits(device: DeviceInfo) -> dict[str, int]:
    return {
        "arch": device.code_number, "smem_per_block": device.smem_per_block, "smem_per_sm": device.smem_per_sm
    }  # fmt: skip


def _may_pair(p: Problem) -> bool:
    blocks, _, _ = head_blocks(p.num_qo_heads // p.num_kv_heads, p.head_dim)
    return p.heads_adjacent and p.num_kv_heads % 2 == 0 and blocks == 1


@lru_cache(maxsize=1024)
def geometry(problem: Problem, device: DeviceInfo, tiles: DecodeTiles | None = None) -> Geometry:
    """The kernel and the grid factors for `problem` on `device`, with the CTA shape of `choose_tiles` unless given."""
    p = problem
    group = p.num_qo_heads // p.num_kv_heads
    blocks, heads, columns = head_blocks(group, p.head_dim)
    num_head_blocks = p.num_kv_heads * blocks
    if tiles is None:
        tiles = choose_tiles(
            p.batch_size * num_head_blocks, p.head_dim, p.kv.itemsize, columns, num_sms=device.num_sms,
            batch_invariant=p.batch_invariant, rope=p.rope, may_pair=_may_pair(p), **_device_limits(device),
        )  # fmt: skip
    if tiles.head_pair:
        num_head_blocks, heads = num_head_blocks // 2, 2 * heads
    spec, heads_spec = (
        spec_of(
            tiles, p.dtype, p.kv, p.out, p.head_dim, columns,
            tile_in_page=p.tile_in_page, soft_cap=p.soft_cap, alibi=p.alibi, rope=p.rope, head_scales=scaled,
            shared_rows=blocks > 1,
        )
        for scaled in (False, True)
    )  # fmt: skip
    if tiles.head_pair:
        # So small a CTA leaves room for more of its kind: those of the next launch, which start early, would crowd on
        # the multiprocessors that end first. 64x1024 took 58.8 us, and takes 47.7 with room for `ctas_per_sm`.
        room = device.smem_per_sm // (tiles.ctas_per_sm + 1) - 1023
        spec, heads_spec = (replace(s, smem_bytes=max(s.smem_bytes, room)) for s in (spec, heads_spec))
    slots = device.num_sms * tiles.ctas_per_sm
    return Geometry(spec, heads_spec, num_head_blocks, blocks, heads, group, slots, p.head_dim)


@lru_cache(maxsize=1024)
def geometries(problem: Problem, device: DeviceInfo) -> dict[str, Geometry]:
    """Every geometry worth a measurement by its kernel's symbol; that of `choose_tiles` comes first."""
    p = problem
    _, _, columns = head_blocks(p.num_qo_heads // p.num_kv_heads, p.head_dim)
    shapes = tile_candidates(
        p.head_dim, p.kv.itemsize, columns, rope=p.rope, may_pair=_may_pair(p), **_device_limits(device)
    )
    own = geometry(p, device)
    return {own.spec.symbol: own} | {
        g.spec.symbol: g for g in (geometry(p, device, tiles) for tiles in shapes) if g.spec != own.spec
    }


def why_not(p: Problem) -> str:
    """Why this kernel does not take a problem that the prefill kernel takes; empty if it does, or if neither does."""
    if p.head_dim % (16 if p.rope else 8) or not 0 < p.head_dim <= 256:
        return ""
    if p.dtype in FP8_TYPES:
        return f"q is {p.dtype.name}"
    if p.out not in (*HALF_TYPES, float32):
        return f"the output is {p.out.name}"
    # Rows are whole 16-byte chunks; a rotation's two halves must lie in the same lane's registers.
    step = (8 if p.kv.itemsize == 2 else 16) * (4 if p.rope else 1)
    if p.head_dim % step:
        rotated = " with ROPE_LLAMA" if p.rope else ""
        return f"head_dim {p.head_dim} is no multiple of {step} ({p.kv.name} keys{rotated})"
    return ""


def check_problem(op: str, p: Problem) -> None:
    """Raise the typed error for sizes and types that no kernel takes, once `why_not` says nothing."""
    if p.num_kv_heads < 1 or p.num_qo_heads % p.num_kv_heads:
        raise ArgumentError(
            f"{op}: num_qo_heads is {p.num_qo_heads}, expected a multiple of num_kv_heads = {p.num_kv_heads}"
        )
    if p.dtype not in HALF_TYPES:
        raise DTypeError(f"{op}: q has dtype {p.dtype.name}, expected float16 or bfloat16 on the GPU")
    if p.kv is not p.dtype and p.kv not in FP8_TYPES:
        raise DTypeError(
            f"{op}: the cache has dtype {p.kv.name}, expected {p.dtype.name} like q, float8_e4m3fn or float8_e5m2"
        )
    step, rotated = (16, " with ROPE_LLAMA") if p.rope else (8, "")
    if p.head_dim % step or not 0 < p.head_dim <= 256:
        raise ShapeError(f"{op}: head_dim is {p.head_dim}, expected a multiple of {step} up to 256{rotated}")


def shares_of(k: tuple[int, ...], v: tuple[int, ...], kv_heads: int, head_dim: int, blocks_per_kv: int) -> int:
    """`DecodeParams.shares` for the (page, token, head) strides of keys and values."""
    if blocks_per_kv != 1:
        return 0
    if k[1:] == v[1:] == (kv_heads * head_dim, head_dim):
        return 1
    return 2 if k[1] == v[1] == head_dim else 0


def logit_floats(sm_scale: float, logits_soft_cap: float) -> tuple[float, float, float]:
    """(logit_scale, logit_cap, slope_scale) for kernels/attention/logits.cuh."""
    if logits_soft_cap > 0:
        return sm_scale / logits_soft_cap, logits_soft_cap * LOG2E, 1.0 / logits_soft_cap
    return sm_scale * LOG2E, 0.0, LOG2E


def check_rope(op: str, rope_scale: float | None, rope_theta: float | None) -> None:
    """Raise for numbers that make no frequencies; None and 0 are the defaults."""
    for name, value in (("rope_scale", rope_scale), ("rope_theta", rope_theta)):
        if value is not None and not 0 <= value < math.inf:
            raise ArgumentError(f"{op}: {name} is {value}, expected a positive number")


def check_pos_encoding(op: str, mode: str) -> str:
    """`mode` if it is one of NONE, ROPE_LLAMA and ALIBI."""
    if mode not in ("NONE", "ALIBI", "ROPE_LLAMA"):
        raise ArgumentError(f"{op}: pos_encoding_mode is {mode!r}, expected 'NONE', 'ROPE_LLAMA' or 'ALIBI'")
    return mode


@lru_cache(maxsize=256)
def rope_turns(head_dim: int, rope_scale: float | None, rope_theta: float | None) -> tuple[bytes, ...]:
    """Frequencies for ROPE_LLAMA as turns a position in units of 2^-64, in the blocks of `ROPE_PARAMS`."""
    turns = np.zeros(128, np.uint64)
    for i, f in enumerate(rope_frequencies(head_dim, rope_scale or 1.0, rope_theta or 1e4).tolist()):
        turns[i] = round(f / (2 * math.pi) * 2.0**64) % 2**64
    data = turns.tobytes()
    return tuple(data[i : i + 128] for i in range(0, len(data), 128))


def output_view(op: str, name: str, given: Any, x: View, shape: tuple[int, ...], dtype: DType) -> View:
    """The caller's array after checks, or a new one."""
    if given is None:
        return x.empty(shape, dtype)
    o = as_fp8(view(given, op, name).writable(op, name), dtype)
    if o.shape != shape:
        check_shape(op, name, o, shape)
    if o.dtype is not dtype:
        check_dtype(op, name, o, (dtype,))
    if o.device != x.device:
        check_device(op, x, **{name: o})
    check_inner(op, name, o)
    check_aligned(op, name, o, 4 * dtype.itemsize if len(shape) == 3 else 4)
    return o


def sinks_view(op: str, sinks: Any, x: View, num_qo_heads: int) -> View:
    s = view(sinks, op, "sinks")
    check_shape(op, "sinks", s, (num_qo_heads,), "= (num_qo_heads,)")
    check_dtype(op, "sinks", s, (float32,))
    check_device(op, x, sinks=s)
    check_inner(op, "sinks", s)
    return s
