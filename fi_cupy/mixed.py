"""The mixed kernel as an operator sees it: prefill tiles and decode items in one launch of persistent CTAs."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fi_cupy import decode_kernel, prefill_kernel
from fi_cupy.dtypes import DType, bfloat16, float16
from fi_cupy.jit.kernel import Kernel, load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import CppStruct, KernelSpec
from fi_cupy.plan.decode import head_blocks, smem_bytes
from fi_cupy.plan.mixed import grid
from fi_cupy.plan.prefill import PrefillTiles
from fi_cupy.prefill_params import PARAMS as PREFILL_PARAMS

if TYPE_CHECKING:
    from fi_cupy.device import DeviceInfo

PARAMS = ParamsStruct(
    "MixedParams",
    [
        *((f"prefill.{name}", kind) for name, kind in PREFILL_PARAMS.fields),
        *((f"decode.{name}", kind) for name, kind in decode_kernel.PARAMS.fields),
        ("queues", "ptr"),
        *((name, "u32") for name in ("num_kv_heads", "num_tiles", "num_items", "tile_ctas")),
    ],
)
#: Zeroed words of a launch: how far the two queues are.
QUEUE_WORDS = 2
_FULL_REGISTERS = "96 and more accumulators a thread: on some architectures ptxas keeps a few values in local memory"
#: struct MixedTurn.
_TURN_BYTES = 16


def decode_stages(tiles: PrefillTiles, head_dim: int, kv_itemsize: int, device: DeviceInfo) -> int:
    """Ring slots a warp of the decode items, at most six: what the shared memory beside `ctas_per_sm` CTAs holds.

    0 if there is not even room for one.
    """
    per_block = 65536 if device.code_number < 80 else device.smem_per_block
    room = min(per_block, device.smem_per_sm // tiles.ctas_per_sm - 1024) - _TURN_BYTES
    columns = head_blocks(16, head_dim)[2]  # as many as there can be: the group size must not decide
    most = 1 if device.code_number < 80 else 6  # loads are synchronous there
    return next(
        (s for s in range(most, 0, -1) if smem_bytes(tiles.warps, s, head_dim, kv_itemsize, columns) <= room), 0
    )


@lru_cache(maxsize=512)
def mixed_spec(prefill: KernelSpec, decode: KernelSpec, ctas_per_sm: int) -> KernelSpec:
    """The mixed kernel of a prefill and a decode instance of the same number of threads."""
    turn_offset = -(-max(prefill.smem_bytes, decode.smem_bytes) // 16) * 16
    size = turn_offset + _TURN_BYTES
    members = dict(prefill.config)
    accumulators = int(members["kRowTiles"]) * int(members["kHeadDimVO"]) // 2  # type: ignore[arg-type]
    return KernelSpec(
        symbol=f"mixed_{prefill.symbol}_{decode.symbol.removeprefix('batch_')}",
        header="attention/mixed.cuh",
        function="mixed",
        params=PARAMS,
        config=(
            ("Prefill", CppStruct(prefill.config)),
            ("Decode", CppStruct(decode.config)),
            ("kTurnOffset", turn_offset),
        ),
        threads=prefill.threads,
        min_blocks=ctas_per_sm,
        smem_bytes=size,
        min_arch=75 if size <= 64 * 1024 else 80,
        spills=_FULL_REGISTERS if accumulators >= 96 else "",
    )


class Decode(NamedTuple):
    """What decides the decode part's instance: hashable."""

    num_kv_heads: int
    group: int  # query heads a kv head
    head_dim: int
    dtype: DType
    kv: DType
    out: DType
    tile_in_page: bool
    soft_cap: bool
    alibi: bool


class Geometry(NamedTuple):
    """Kernels of a mixed launch: for a positive sm_scale of the tiles, for any other, for factors of q or k a head."""

    spec: KernelSpec
    negative_spec: KernelSpec
    heads_spec: KernelSpec
    prefill: prefill_kernel.Geometry
    decode: decode_kernel.Geometry
    rows: int  # what `prefill_kernel.geometry` was asked for
    slots: int  # CTAs the device runs at once

    def kernel(self, scale: float, device: int, head_scales: bool = False) -> Kernel:
        """The loaded kernel for an sm_scale, or for factors of q or k a head."""
        spec = self.spec if scale > 0 else self.negative_spec
        return load_kernel(self.heads_spec if head_scales else spec, device)


@lru_cache(maxsize=512)
def geometry(prefill: prefill_kernel.Problem, decode: Decode, device: DeviceInfo) -> Geometry | None:
    """The mixed kernel of two problems, or None where there is none and the parts need a launch each.

    There is one if both parts have one type of q and one head dim (head_dim_vo equals head_dim_qk), the decode kernel
    takes the decode part, and nothing is rotated (ROPE_LLAMA) and no variant applied in the tiles. Tiles are as tall
    as shared memory allows beside a ring for as many warps: a warp without rows in a tile idles, so short prompts cost
    little more than their loads.
    """
    p, d = prefill._replace(backend="fa2"), decode
    if p.dtype is not d.dtype or not p.head_dim_qk == p.head_dim_vo == d.head_dim or p.variant is not None or p.rope:
        return None
    one = decode_kernel.Problem(
        1, d.num_kv_heads * d.group, d.num_kv_heads, d.head_dim, d.dtype, d.kv, d.out, d.tile_in_page, d.soft_cap,
        d.alibi, False, False,
    )  # fmt: skip
    if decode_kernel.why_not(one):
        return None
    for rows in (128, 64, 16):
        g = prefill_kernel.geometry(p, rows, device)
        # Three or more CTAs are the prefill kernel's own; decode items need the registers of two.
        assert isinstance(g.tiles, PrefillTiles)  # of the portable kernel
        tiles = g.tiles._replace(ctas_per_sm=min(g.tiles.ctas_per_sm, 2))
        stages = decode_stages(tiles, d.head_dim, d.kv.itemsize, device)
        if stages > 0:
            break
    else:
        return None
    blocks, heads, columns = head_blocks(d.group, d.head_dim)
    part, scaled = (
        decode_kernel.decode_spec(
            d.dtype, d.kv, d.out, d.head_dim, columns, tiles.warps, stages, tiles.ctas_per_sm,
            tile_in_page=d.tile_in_page, soft_cap=d.soft_cap, alibi=d.alibi, head_scales=head_scales,
        )
        for head_scales in (False, True)
    )  # fmt: skip
    pairs = (g.spec, part), (g.negative_spec, part), (g.heads_spec, scaled)
    specs = [mixed_spec(*pair, tiles.ctas_per_sm) for pair in pairs]
    slots = device.num_sms * tiles.ctas_per_sm
    items = decode_kernel.Geometry(part, scaled, d.num_kv_heads * blocks, blocks, heads, d.group, slots, d.head_dim)
    return Geometry(specs[0], specs[1], specs[2], g, items, rows, slots)


#: What `apart_is_faster` reckons with, of an H100: operations a second of a long prompt in the Hopper kernel and in
#: tiles of the mixed one, bytes a second of decode items, and the share of the tiles' rate that is left beside those.
_HOPPER, _TILES, _READ, _BESIDE = 620e12, 320e12, 2.86e12, 0.6
#: Seconds by which the estimate must be better: it is one of long prompts, and short ones do not reach these rates.
_MARGIN = 25e-6


def apart_is_faster(operations: float, nbytes: float) -> bool:
    """Whether prompts that the Hopper kernel takes had better not share a launch with the decoding requests.

    Parameters
    ----------
    operations : float
        Of the prompts: two a multiplication.
    nbytes : float
        Keys and values of the decoding requests.

    Notes
    -----
    The mixed kernel's tiles are the portable kernel's, at half of the Hopper kernel's rate, but they compute while the
    decode items read. H100, 32/8 heads of 128 dims, us: 2048 tokens beside 64x4096 keys 400 in one launch and 440 in
    two; (512, 16384) beside 64x2048 515 and 401; 4096 beside 16x4096 423 and 299. A `BatchAttention` of 8x(512, 4096)
    768 as mixed tiles and 403 in the Hopper kernel.
    """
    # Either takes the time of the reads and, apart, the prompts' own; together, what of theirs the reads do not hide.
    return operations / _HOPPER + _MARGIN < operations / _TILES - _BESIDE * nbytes / _READ


def prompt_operations(
    qo_len: Any, kv_len: Any, problem: prefill_kernel.Problem, causal: bool, window_left: int
) -> float:
    """Operations of prompts of `qo_len` queries on `kv_len` keys each (numbers or arrays)."""
    qo_len, kv_len = np.asarray(qo_len, np.float64), np.asarray(kv_len, np.float64)

    def seen(window: float) -> Any:
        """Pairs of a causal mask and a window of so many keys."""

        def first(rows: Any) -> Any:  # as many rows of a square mask
            full = np.minimum(rows, window)
            return full * (full + 1) / 2 + (rows - full) * full

        return first(kv_len) - first(np.maximum(kv_len - qo_len, 0))

    window = window_left + 1.0 if window_left >= 0 else np.inf
    pairs = seen(window) if causal else qo_len * kv_len - seen(np.inf) + seen(window)
    return 2 * float(np.sum(pairs)) * problem.num_qo_heads * (problem.head_dim_qk + problem.head_dim_vo)


def launch(
    g: Geometry, device: int, stream: int, scale: float, head_scales: bool, tiles: tuple[Any, ...],
    items: tuple[Any, ...], queues: int, num_tiles: int, num_kv_heads: int, num_items: int, num_head_blocks: int,
    pdl: bool | None,
) -> None:  # fmt: skip
    """Queue the kernel: `tiles` and `items` are the fields of the two parts' own parameter structs."""
    ctas, tile_ctas = grid(g.slots, num_tiles * num_kv_heads, num_items * num_head_blocks)
    g.kernel(scale, device, head_scales).launch(
        ctas, stream, *tiles, *items, queues, num_kv_heads, num_tiles, num_items, tile_ctas, pdl=pdl
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: POD and mixed batches on Turing, A100, RTX and Hopper or Blackwell cards."""
    from fi_cupy.device import DeviceInfo

    specs: dict[KernelSpec, None] = {}

    def add(arch: int, dtype: DType, dim: int, paged: bool, **options: bool) -> None:
        problem = prefill_kernel.Problem(8, 2, dim, dim, dtype, paged, options.get("mask", False), False, False)
        decode = Decode(2, 4, dim, dtype, dtype, dtype, True, options.get("soft_cap", False), False)
        num_sms, smem_per_block, smem_per_sm = decode_kernel._GPUS[arch]
        g = geometry(problem, decode, DeviceInfo(arch, str(arch), num_sms, smem_per_block, smem_per_sm, 0))
        assert g is not None
        specs[g.spec] = None

    for dim in (64, 128):
        for paged in (True, False):
            add(90, bfloat16, dim, paged)
        for arch in (75, 80, 86):
            add(arch, bfloat16, dim, True)
    add(90, float16, 128, True)
    add(90, bfloat16, 256, True)
    add(90, bfloat16, 128, False, mask=True, soft_cap=True)
    return list(specs)
