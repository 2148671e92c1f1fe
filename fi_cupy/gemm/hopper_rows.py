"""Few rows by Hopper's instructions (``kernels/gemm/hopper_rows.cuh``): limited by reading the weight once."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fi_cupy.device import device_info
from fi_cupy.dtypes import FP8_TYPES, DType, bfloat16, float8_e4m3fn
from fi_cupy.gemm.hopper import BLOCKS, NONE, PARAMS, PROMOTE, VECTORS, _up, block_scales, launch, vector_scale
from fi_cupy.jit.spec import CppValue, KernelSpec

if TYPE_CHECKING:
    from fi_cupy.arrays import View


class RowsTile(NamedTuple):
    """Rows of a (8 to 64) and columns of w a CTA, CTAs a cluster that share k, stages of 128 bytes of k in flight."""

    rows: int
    block_n: int
    split: int
    stages: int

    def smem_bytes(self, scale: str) -> int:
        """Operands, struct HopperGemmShared, and the other ranks' sums."""
        shared = 16 * self.stages + 4 * (self.stages * 64 if scale == BLOCKS else 1) + 4 * self.stages
        inbox = inbox_bytes(self.rows, self.block_n, self.split)
        return 128 * self.stages * (self.rows + self.block_n) + -(-shared // 16) * 16 + inbox


def inbox_bytes(rows: int, block_n: int, split: int) -> int:
    """What the other ranks of a cluster send to one: their part of its columns, in fp32, of whole warps' 16 rows."""
    return (split - 1) * (block_n // split) * 64 * _up(rows, 16)


def stages_in(room: int, rows: int, block_n: int, split: int) -> int:
    """Stages of a ring of `room` bytes, less where the other ranks' sums do not fit beside it; one a lane at most."""
    inbox = max(0, inbox_bytes(rows, block_n, split) - _BESIDE[room])
    return min(32, (room - inbox) // (128 * (rows + block_n)))


@lru_cache(maxsize=512)
def rows_spec(
    tile: RowsTile, a: DType, b: DType, out: DType, *, row_major_b: bool = False, gated: bool = False,
    scale: str = NONE, promote: int = 0,
) -> KernelSpec:  # fmt: skip
    """The kernel for one tile, types and options, as `hopper.hopper_spec`."""
    words = (("rows", row_major_b), ("gated", gated), (scale, scale != NONE), (f"p{promote}", promote > 0))
    suffix = "".join(f"_{word}" for word, on in words if on)
    types = a.tag + (b.tag if b is not a else "") + (f"_o{out.tag}" if out is not a else "")
    return KernelSpec(
        symbol=f"gemm_hopper_rows_{types}_{tile.rows}x{tile.block_n}_k{tile.split}s{tile.stages}{suffix}",
        header="gemm/hopper_rows.cuh",
        function="gemm_hopper_rows",
        params=PARAMS,
        config=(
            ("TA", a), ("TB", b), ("Out", out), ("Bias", out if a in FP8_TYPES else a),
            ("kBlockM", 64), ("kBlockN", tile.block_n), ("kRowsA", tile.rows), ("kStages", tile.stages),
            ("kWarpsM", 1), ("kWarpsN", 1), ("kPromote", promote), ("kScale", CppValue(f"fi::HopperScale::{scale}")),
            ("kRowMajorB", row_major_b), ("kGrouped", False), ("kGated", gated), ("kBulkStore", False),
            ("kSplit", tile.split),
        ),
        threads=160 + 32 * (scale == BLOCKS),
        min_blocks=1,
        smem_bytes=tile.smem_bytes(scale),
        min_arch=90,
        max_arch=90,
        cluster=tile.split if tile.split > 1 else 0,
    )  # fmt: skip


#: Shared memory of a CTA that has its multiprocessor to itself, and of one of two.
_ALONE, _SHARING = 208 << 10, 104 << 10
#: What is left beside such a ring and its barriers (5 KB) of 227 KB, or of half of 226.
_BESIDE = {_ALONE: 14 << 10, _SHARING: 4 << 10}


def widths(gated: bool, row_major_b: bool, sums: str) -> tuple[int, ...]:
    """Columns of w that a tile may have."""
    if gated or row_major_b:  # 32 columns of out, and whole panels of an n-contiguous w, in each half if it is both
        return (128,) if gated and row_major_b else (64, 128)
    return (32, 64, 128) if sums == BLOCKS else (32, 64, 96, 128)


#: Bytes that a multiprocessor takes in while the memory reads one for each: 100 against 23 of 3.05 TB/s a nanosecond.
_INTAKE = 4.35
#: What a cluster costs, as bytes that a multiprocessor would take in meanwhile: 0.7 us for a long k, 1.3 for a short
#: one; four CTAs twice that, and more where many must start together (4096 x 4096 at m = 16: 14.6 us, 10.2 in twos).
_CLUSTER = 130_000


@lru_cache(maxsize=4096)
def rows_tile(
    m: int, n: int, k_bytes: int, sms: int, *, batch: int = 1, gated: bool = False, row_major_b: bool = False,
    sums: str = NONE, pdl: bool = False,
) -> RowsTile:  # fmt: skip
    """The tile for m rows of a: w comes at the memory's rate, or as a multiprocessor takes in its parts of a and w.

    Fp8 on an H100, m = 64: 4096 x 4096 in tiles of 32 columns 9.8 us, 64 9.9, 64 in clusters of two 10.5, 128 10.7;
    14336 x 4096 of 128 columns 23.6, 64 23.8, 32 25.2. A ring that leaves room for another CTA starts sooner: 576 x 576
    at m = 64 3.7 against 4.2, fp8 4096 x 4096 at m = 16 9.4 against 10.6; a long k with more rows wants the deep one
    (1024 x 576 x 1536: 6.9 against 8.2), and so does a dependent launch, which fills it while its predecessor ends
    (2.3 against 2.5), on as many multiprocessors as that one leaves: half.
    """
    rows = next(r for r in (8, 16, 32, 64) if m <= r or r == 64)
    calls = _up(m, rows) * batch
    out_n, blocks = n * (2 if gated else 1), _up(k_bytes, 128)
    memory = batch * out_n * blocks * 128 / sms * _INTAKE
    best: tuple[float, RowsTile] | None = None
    for block_n in widths(gated, row_major_b, sums):
        for split in (1, 2, 4) if block_n % 64 == 0 else (1,):
            # Every rank needs some blocks of k; and where there are CTAs enough, clusters only cost.
            if split > 1 and (split > blocks // 4 or _up(out_n, block_n) * calls >= sms):
                continue
            ctas, share = _up(out_n, block_n) * calls * split, _up(blocks, split)
            intake = _up(2 * ctas if pdl else ctas, sms) * share * (rows + block_n) * 128
            cost = (
                max(memory, intake) + 0.2 * intake + split // 2 * _CLUSTER * (3 if split == 4 and 2 * ctas > sms else 1)
            )
            sharing, alone = (stages_in(room, rows, block_n, split) for room in (_SHARING, _ALONE))
            longer = share > 2 * sharing if rows > 16 else 3 * ctas <= sms
            deep = ctas <= sms and share > sharing and (pdl or longer)
            if best is None or cost < best[0]:
                best = cost, RowsTile(rows, block_n, split, alone if deep else sharing)
    assert best is not None
    return best[1]


def rows_grid(tile: RowsTile, out: tuple[int, ...], batch: int, gated: bool = False) -> tuple[int, int, int]:
    """CTAs for an output of shape `out`."""
    m, n = out[-2:]
    return _up(n, tile.block_n // (2 if gated else 1)) * tile.split, _up(m, tile.rows), batch


def _chosen(out: View, a: View, tile: RowsTile | None, **options: Any) -> tuple[RowsTile, int]:
    """(tile, batch)."""
    batch = a.shape[0] if len(a.shape) == 3 else 1
    if tile is None:
        sms, (m, n) = device_info(a.device).num_sms, out.shape[-2:]
        tile = rows_tile(m, n, a.shape[-1] * a.dtype.itemsize, sms, batch=batch, **options)
    return tile, batch


def launch_rows_mm(
    out: View, a: View, w: View, *, row_major_b: bool = False, bias: View | None = None, residual: View | None = None,
    gated: bool = False, gate_second: bool = False, pdl: bool = False, tile: RowsTile | None = None,
) -> None:  # fmt: skip
    """`hopper.launch_hopper_mm` for few rows. With `pdl` w must be constant."""
    if out.size == 0:
        return
    tile, batch = _chosen(out, a, tile, gated=gated, row_major_b=row_major_b, pdl=pdl)
    launch(
        rows_spec(tile, a.dtype, w.dtype, out.dtype, row_major_b=row_major_b, gated=gated),
        rows_grid(tile, out.shape, batch, gated), out, a, w, batch=batch, bias=bias, residual=residual,
        gate_second=gate_second, pdl=pdl,
    )  # fmt: skip


def launch_rows_fp8(
    out: View, a: View, w: View, a_scale: View, b_scale: View, *, bias: View | None = None, fast_accum: bool = False,
    pdl: bool = False, tile: RowsTile | None = None,
) -> None:  # fmt: skip
    """`hopper.launch_hopper_fp8` for few rows."""
    if out.size == 0:
        return
    tile, batch = _chosen(out, a, tile, sums=VECTORS, pdl=pdl)
    launch(
        rows_spec(tile, a.dtype, w.dtype, out.dtype, scale=VECTORS, promote=0 if fast_accum else PROMOTE),
        rows_grid(tile, out.shape, batch), out, a, w, batch=batch, bias=bias,
        a_scale=vector_scale(a_scale), b_scale=vector_scale(b_scale), pdl=pdl,
    )  # fmt: skip


def launch_rows_fp8_blocks(
    out: View, a: View, w: View, a_scale: View, b_scale: View, *, scale_major_mode: str = "MN", pdl: bool = False,
    tile: RowsTile | None = None,
) -> None:  # fmt: skip
    """`hopper.launch_hopper_fp8_blocks` for few rows of one product."""
    if out.size == 0:
        return
    tile, batch = _chosen(out, a, tile, sums=BLOCKS, pdl=pdl)
    scale_a, scale_b = block_scales(a_scale, b_scale, scale_major_mode)
    launch(
        rows_spec(tile, a.dtype, w.dtype, out.dtype, scale=BLOCKS, promote=1),
        rows_grid(tile, out.shape, batch), out, a, w, batch=batch, a_scale=scale_a, b_scale=scale_b, pdl=pdl,
    )  # fmt: skip


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances."""
    bf, e4 = bfloat16, float8_e4m3fn
    return [
        rows_spec(RowsTile(64, 32, 1, 17), bf, bf, bf),
        rows_spec(RowsTile(64, 64, 2, 13), bf, bf, bf),
        rows_spec(RowsTile(64, 96, 1, 10), bf, bf, bf),
        rows_spec(RowsTile(64, 128, 1, 8), bf, bf, bf),
        rows_spec(RowsTile(16, 64, 2, 20), bf, bf, bf, row_major_b=True),
        rows_spec(RowsTile(16, 128, 1, 11), bf, bf, bf, gated=True),
        rows_spec(RowsTile(64, 32, 1, 17), e4, e4, bf, scale=VECTORS, promote=PROMOTE),
        rows_spec(RowsTile(64, 32, 1, 17), e4, e4, bf, scale=BLOCKS, promote=1),
    ]
