"""Matrix products by Hopper's own instructions (``kernels/gemm/hopper.cuh``): instances, tiles, tensor maps, launches.

Dense, batched and grouped products of 16-bit and fp8 operands are one kernel; what differs is in its Config. The
launchers trust their arguments: the public functions check them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from fi_cupy.device import device_info
from fi_cupy.dtypes import FP8_TYPES, HALF_TYPES, DType, bfloat16, float8_e4m3fn, float8_e5m2, float16, float32, int64
from fi_cupy.jit.driver import has_driver_binding, tensor_map
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import CppValue, KernelSpec

if TYPE_CHECKING:
    from fi_cupy.arrays import View
    from fi_cupy.device import DeviceInfo

PARAMS = ParamsStruct(
    "HopperGemmParams",
    [
        *((f"{x}_map", "tensormap") for x in ("a", "b", "out")),
        *((x, "ptr") for x in ("out", "bias", "residual", "a_scale", "b_scale", "indptr", "weight_indices")),
        *((x, "i64") for x in ("out_stride", "out_batch", "residual_stride", "residual_batch", "bias_batch")),
        *((f"a_scale_{x}", "i64") for x in ("batch", "row", "k")),
        *((f"b_scale_{x}", "i64") for x in ("batch", "column", "k")),
        *((x, "u32") for x in ("m", "n", "k", "batch", "a_step", "b_step", "first_half", "second_half")),
        *((x, "u32") for x in ("wide_indptr", "wide_indices", "raster", "early", "whole", "pieces")),
    ],
)
NONE, VECTORS, BLOCKS = "none", "vectors", "blocks"


class HopperTile(NamedTuple):
    """Shape of a CTA: rows, columns, consumer warpgroups along both (64 rows each), stages of 128 bytes of k in flight.

    `bulk`: out leaves through shared memory and the copy engine.
    """

    block_m: int
    block_n: int
    warps_m: int
    warps_n: int
    stages: int
    bulk: bool

    def smem_bytes(self, scale: str) -> int:
        """Operands, store buffers, and struct HopperGemmShared."""
        consumers = self.warps_m * self.warps_n
        rows = self.stages * self.block_m if scale == BLOCKS else 1
        columns = self.stages * (self.block_n // 64 if scale == BLOCKS and self.block_n > 128 else 1)
        shared = 16 * self.stages + 4 * (rows + columns)
        return 128 * self.stages * (self.block_m + self.block_n) + 16384 * consumers * self.bulk + -(-shared // 8) * 8

    def registers(self, scale: str) -> tuple[int, int]:
        """Of a producer and a consumer thread: 512 for the threads of one number in every warpgroup."""
        if self.warps_m * self.warps_n == 3:
            return 32, 160
        return (56, 224) if scale == BLOCKS else (40, 232)  # the producer of scales has addresses of both


LARGE = HopperTile(128, 256, 2, 1, 4, True)
MIDDLE = HopperTile(128, 128, 2, 1, 6, True)
WIDE = HopperTile(64, 256, 1, 2, 5, False)
SMALL = HopperTile(64, 128, 1, 2, 9, False)
TINY = HopperTile(64, 64, 1, 2, 13, False)
#: Sums in full fp32 beside the tensor cores' take as many registers again.
PROMOTED = HopperTile(128, 128, 2, 1, 5, True)
PROMOTED_SMALL = HopperTile(64, 128, 1, 2, 8, False)
TALL = HopperTile(192, 128, 3, 1, 4, True)
BROAD = HopperTile(128, 192, 2, 1, 4, True)
CHOICES = {
    NONE: (LARGE, BROAD, MIDDLE, WIDE, SMALL, TINY),
    VECTORS: (BROAD, PROMOTED, PROMOTED_SMALL),
    BLOCKS: (TALL, BROAD, PROMOTED, PROMOTED_SMALL),
}
#: What tiles reach of the tensor cores' rate where sums leave them (fp8, beside 128 x 256 where they stay). In blocks
#: 192 x 128 and 128 x 192 hide a warpgroup's additions behind others' products, 128 x 128 behind its own.
SPEED: dict[str, dict[HopperTile, float]] = {
    NONE: {},
    VECTORS: {BROAD: 0.90, PROMOTED: 0.885, PROMOTED_SMALL: 0.6},
    BLOCKS: {TALL: 0.73, BROAD: 0.735, PROMOTED: 0.73, PROMOTED_SMALL: 0.5},
}

#: Blocks of 128 of k after which fp8 sums without `fast_accum` leave the tensor cores.
PROMOTE = 4


@lru_cache(maxsize=512)
def hopper_spec(
    tile: HopperTile, a: DType, b: DType, out: DType, *, row_major_b: bool = False, grouped: bool = False,
    gated: bool = False, scale: str = NONE, promote: int = 0,
) -> KernelSpec:  # fmt: skip
    """The kernel for one tile, types and options. A bias has the type of `a`, that of `out` for fp8."""
    bulk = tile.bulk and out.itemsize == 2 and (tile.block_n // tile.warps_n // (1 + gated)) % 64 == 0
    tile = tile._replace(bulk=bulk)
    producer, consumer = tile.registers(scale)
    words = (
        ("rows", row_major_b), ("grouped", grouped), ("gated", gated), (scale, scale != NONE),
        (f"p{promote}", promote > 0), ("direct", not bulk and out.itemsize == 2),
    )  # fmt: skip
    types = a.tag + (b.tag if b is not a else "") + (f"_o{out.tag}" if out is not a else "")
    suffix = "".join(f"_{word}" for word, on in words if on)
    return KernelSpec(
        symbol=f"gemm_hopper_{types}_{tile.block_m}x{tile.block_n}"
        f"w{tile.warps_m}x{tile.warps_n}s{tile.stages}{suffix}",
        header="gemm/hopper.cuh",
        function="gemm_hopper",
        params=PARAMS,
        config=(
            ("TA", a), ("TB", b), ("Out", out), ("Bias", out if a in FP8_TYPES else a),
            ("kBlockM", tile.block_m), ("kBlockN", tile.block_n), ("kRowsA", tile.block_m), ("kStages", tile.stages),
            ("kWarpsM", tile.warps_m), ("kWarpsN", tile.warps_n), ("kPromote", promote),
            ("kScale", CppValue(f"fi::HopperScale::{scale}")),
            ("kRowMajorB", row_major_b), ("kGrouped", grouped), ("kGated", gated), ("kBulkStore", bulk),
            ("kProducerRegs", producer), ("kConsumerRegs", consumer),
        ),
        threads=128 * (tile.warps_m * tile.warps_n + 1),
        min_blocks=1,
        smem_bytes=tile.smem_bytes(scale),
        min_arch=90,
        max_arch=90,
    )  # fmt: skip


def hopper_refusal(device: DeviceInfo, dtype: DType, n: int, k: int) -> str:
    """Why these kernels do not take a product; empty if they do."""
    if device.arch != "90a":
        return f"the target is {device.arch}, not 90a"
    if not has_driver_binding():
        return "cuda-bindings, which encodes tensor maps, is not installed"
    if dtype not in HALF_TYPES and dtype not in FP8_TYPES:
        return f"{dtype.name} is none of the tensor cores' types"
    if n % 8 or k * dtype.itemsize % 16:
        return f"n = {n} is not a multiple of 8, or rows of k = {k} are not whole 16-byte pieces"
    return ""


def _up(a: int, b: int) -> int:
    return -(-a // b)


def last_round(tiles: int, ctas: int, warps_m: int) -> tuple[int, int]:
    """(whole, pieces): tiles from number `whole` on are computed in that many pieces of whole warpgroups' rows.

    A last round of few tiles leaves the other multiprocessors idle: 704 tiles of 192 x 128 on 132 are 5.3 rounds, so
    the last 44 are shared out in pieces of 64 rows.
    """
    rest = tiles % ctas
    if tiles <= ctas or rest == 0:
        return tiles, 1
    if ctas // rest < warps_m or warps_m == 1:  # pieces of several warpgroups take as long as the tile
        return tiles, 1
    return tiles - rest, warps_m


#: Bytes a cycle that shared memory takes in or gives out.
_SMEM_BYTES = 128
#: Cycles of a tile beside its products: the part of prologue and epilogue that nothing hides.
_TILE_CYCLES = 1500


def block_cycles(tile: HopperTile, warpgroups: int = 0) -> float:
    """Cycles of a tile's products over 128 bytes of k: the tensor cores' (4096 FLOP of 16 bits), or shared memory's.

    Every product of 64 rows reads 2 KB of a and its columns of b, and the copy engine writes each operand once:
    128 x 256 just keeps the tensor cores busy, 128 x 192 to 0.92, 192 x 128 to 0.86, 128 x 128 to 0.8 (measured 0.82).
    `warpgroups` that multiply, by default all: a piece of a tile.
    """
    busy, columns = warpgroups or tile.warps_m * tile.warps_n, tile.block_n // tile.warps_n
    reads = 4 * busy * (2048 + columns * 32)
    writes = (64 * _up(busy, tile.warps_n) + tile.block_n) * 128
    return max(busy * 64 * columns / 32, (reads + writes) / _SMEM_BYTES)


#: Cycles between the products of a warpgroup of which others would hide the additions.
_ADDITIONS = {NONE: 0, VECTORS: 60, BLOCKS: 250}


def _cost(tile: HopperTile, tiles: int, blocks: int, sms: int, sums: str) -> float:
    """Cycles of the busiest multiprocessor."""
    speed = SPEED[sums].get(tile)
    cycles = block_cycles(tile) if speed is None else tile.block_m * tile.block_n / 32 / speed
    pieces = last_round(tiles, min(tiles, sms), tile.warps_m)[1]
    rounds = float(_up(tiles, sms))
    if pieces > 1:
        part = block_cycles(tile, 1) + _ADDITIONS[sums]
        rounds += min(1.0, part / cycles) - 1
    return rounds * (blocks * cycles + _TILE_CYCLES)


@lru_cache(maxsize=4096)
def hopper_tile(
    m: int, n: int, k_bytes: int, sms: int, *, batch: int = 1, gated: bool = False, row_major_b: bool = False,
    sums: str = NONE,
) -> HopperTile:  # fmt: skip
    """The tile that finishes first: the busiest multiprocessor decides.

    `sums`: NONE stay in the tensor cores, VECTORS leave them now and then, BLOCKS every 128 of k.
    """
    choices: tuple[HopperTile, ...] = CHOICES[sums]
    # A warpgroup's columns: quads of n8 tiles of out, and whole panels of 64 of an n-contiguous b.
    least = 32 * (1 + gated) * (1 + row_major_b)
    choices = tuple(t for t in choices if t.block_n // t.warps_n >= least and not (gated and t.block_n % 128))
    blocks = _up(k_bytes, 128)

    def cost(tile: HopperTile) -> float:
        columns = tile.block_n // (2 if gated else 1)
        return _cost(tile, _up(m, tile.block_m) * _up(n, columns) * batch, blocks, sms, sums)

    return min(choices, key=cost)


def mappable(x: View) -> bool:
    """Whether a tensor map describes a matrix or batch of rows: no row overlaps the next, no stride is negative.

    A batch may have a stride of 0, one matrix for all.
    """
    shape, strides = x.shape, x.strides
    return (shape[-2] < 2 or strides[-2] >= shape[-1]) and (len(shape) == 2 or strides[0] >= 0)


_encode = lru_cache(maxsize=4096)(tensor_map)


def _matrix_map(
    kind: DType, ptr: int, shape: tuple[int, ...], strides: tuple[int, ...], inner: int, rows: int
) -> bytes:
    """Tensor map of [rows, inner] or [batch, rows, inner] with a box of `rows` times `inner` elements."""
    size = kind.itemsize
    count, step, row = 1, 16, strides[-2] * size
    # A step of 0 (one matrix for all) or of a single matrix is never taken; the encoder wants one of 16 bytes at least.
    if len(shape) == 3 and shape[0] > 1 and strides[0]:
        count, step = shape[0], strides[0] * size
    if shape[-2] == 1:
        row = max(row, 16) // 16 * 16
    name = "uint8" if kind in FP8_TYPES else kind.name
    return _encode(name, ptr, (shape[-1], shape[-2], count, 1), (row, step, 16), (inner, rows, 1, 1))


Matrix = tuple[int, tuple[int, ...], tuple[int, ...]]  # address, shape, strides


@lru_cache(maxsize=4096)
def _maps(
    spec: KernelSpec, a: Matrix, w: Matrix, out: Matrix, batch: int, ctas: int
) -> tuple[bytes, bytes, bytes, int, int, int, int]:
    """Maps of a, b and out for the boxes of `spec`, whether a and b have a matrix for each of a batch, `last_round`."""
    config: dict[str, Any] = dict(spec.config)
    kind_a, kind_b = config["TA"], config["TB"]
    inner = 128 // kind_a.itemsize
    a_map = _matrix_map(kind_a, *a, inner, min(64, config["kRowsA"]))
    if config["kRowMajorB"]:
        b_map = _matrix_map(kind_b, *w, 64, 64)
    else:
        columns = config["kBlockN"] // (2 * config["kWarpsN"] if config["kGated"] else 1)
        b_map = _matrix_map(kind_b, *w, inner, columns)
    out_map = _matrix_map(config["Out"], *out, 64, 64) if config["kBulkStore"] else a_map  # any valid one if not used
    steps = [int(len(shape) == 3 and strides[0] != 0) for _, shape, strides in (a, w)]
    n = config["kBlockN"] // (2 if config["kGated"] else 1)
    tiles = batch * _up(out[1][-2], config["kBlockM"]) * _up(out[1][-1], n)
    return a_map, b_map, out_map, steps[0], steps[1], *last_round(tiles, ctas, config["kWarpsM"])


def _batch_stride(x: View | None) -> int:
    return x.strides[0] if x is not None and len(x.shape) == 3 else 0


Scale = tuple[int, int, int, int]  # address, and elements between batches, rows (columns), blocks of k
_NO_SCALE = (0, 0, 0, 0)


def launch(
    spec: KernelSpec, grid: int | tuple[int, int, int], out: View, a: View, w: View, *, batch: int = 1,
    bias: View | None = None, residual: View | None = None, a_scale: Scale = _NO_SCALE,
    b_scale: Scale = _NO_SCALE, indptr: View | None = None, weight_indices: View | None = None,
    gate_second: bool = False, pdl: bool = False,
) -> None:  # fmt: skip
    """Launch `spec`, whose options the arguments fit; `batch` is that of the matrices, or the number of segments."""
    (m, n), k = out.shape[-2:], a.shape[-1]
    a_map, b_map, out_map, a_step, b_step, whole, pieces = _maps(
        spec,
        (a.ptr, a.shape, a.strides),
        (w.ptr, w.shape, w.strides),
        (out.ptr, out.shape, out.strides),
        batch,
        grid if isinstance(grid, int) else grid[0],
    )
    load_kernel(spec, a.device).launch(
        grid, a.stream(),
        a_map, b_map, out_map,
        out.ptr, 0 if bias is None else bias.ptr, 0 if residual is None else residual.ptr, a_scale[0], b_scale[0],
        0 if indptr is None else indptr.ptr, 0 if weight_indices is None else weight_indices.ptr,
        out.strides[-2], _batch_stride(out),
        0 if residual is None else residual.strides[-2], _batch_stride(residual),
        0 if bias is None or len(bias.shape) < 2 else bias.strides[0],
        *a_scale[1:], *b_scale[1:],
        m, n, k * a.dtype.itemsize, batch, a_step, b_step,
        n if gate_second else 0, 0 if gate_second else n,
        int(indptr is not None and indptr.dtype is int64),
        int(weight_indices is not None and weight_indices.dtype is int64),
        RASTER, _ALL if pdl else 0, whole, pieces, pdl=pdl,
    )  # fmt: skip


#: Tile rows that are handed out together: 132 CTAs then work on 16 tile rows and 8 tile columns.
RASTER = 16
#: More stages than any ring has.
_ALL = 64


def _dense(
    out: View, a: View, tile: HopperTile | None, *, gated: bool = False, **options: Any
) -> tuple[HopperTile, int, int]:
    """(tile, batch, grid) of a dense product; options as of `hopper_tile`."""
    batch = a.shape[0] if len(a.shape) == 3 else 1
    m, n = out.shape[-2:]
    sms = device_info(a.device).num_sms
    if tile is None:
        tile = hopper_tile(m, n, a.shape[-1] * a.dtype.itemsize, sms, batch=batch, gated=gated, **options)
    return tile, batch, min(sms, batch * _up(m, tile.block_m) * _up(n, tile.block_n // (2 if gated else 1)))


def launch_hopper_mm(
    out: View, a: View, w: View, *, row_major_b: bool = False, bias: View | None = None, residual: View | None = None,
    gated: bool = False, gate_second: bool = False, pdl: bool = False, tile: HopperTile | None = None,
) -> None:  # fmt: skip
    """``out = a b + bias + residual``, or gated ``silu(a gate) * (a up) + residual``.

    Parameters
    ----------
    out, residual : View, [m, n] or [batch, m, n]
    a : View, [m, k] or [batch, m, k]
    w : View
        As it lies in memory: ``[n, k]`` or, `row_major_b`, ``[k, n]``; batched with a leading axis. Gated: 2 n columns,
        the gate's first unless `gate_second`.
    bias : View, [n]
    tile : HopperTile, optional
        By default `hopper_tile`'s.
    """
    if out.size == 0:
        return
    tile, batch, grid = _dense(out, a, tile, gated=gated, row_major_b=row_major_b)
    spec = hopper_spec(tile, a.dtype, w.dtype, out.dtype, row_major_b=row_major_b, gated=gated)
    launch(
        spec, grid, out, a, w, batch=batch, bias=bias, residual=residual, gate_second=gate_second, pdl=pdl,
    )  # fmt: skip


def grouped_tile(rows: int, segments: int, n: int, k_bytes: int, sms: int, **options: Any) -> HopperTile:
    """The tile for segments of an average length (their own lengths are on the device); options as of `hopper_tile`."""
    segments = min(segments, rows)  # no more have any: a token for two of eight experts
    return hopper_tile(_up(rows, segments), n, k_bytes, sms, batch=segments, **options)


def launch_hopper_grouped(
    out: View, a: View, w: View, indptr: View, *, weight_indices: View | None = None, row_major_b: bool = False,
    bias: View | None = None, gated: bool = False, gate_second: bool = False, pdl: bool = False,
    tile: HopperTile | None = None,
) -> None:  # fmt: skip
    """Rows ``[indptr[s], indptr[s + 1])`` of a times weight ``weight_indices[s]`` (or s); other rows are not written.

    Parameters
    ----------
    out : View, [rows, n]
    a : View, [rows, k]
    w : View, [weights, n, k], or [weights, k, n] with `row_major_b`
    indptr : View, [segments + 1], int32 or int64
    weight_indices : View, [segments], int32 or int64
    bias : View, [weights, n]
    """
    segments = indptr.shape[0] - 1
    rows, n = out.shape
    if rows == 0 or segments <= 0:
        return
    sms = device_info(a.device).num_sms
    if tile is None:
        k_bytes = a.shape[1] * a.dtype.itemsize
        tile = grouped_tile(rows, segments, n, k_bytes, sms, gated=gated, row_major_b=row_major_b)
    spec = hopper_spec(tile, a.dtype, w.dtype, out.dtype, row_major_b=row_major_b, grouped=True, gated=gated)
    launch(
        spec, sms, out, a, w, batch=segments, bias=bias, indptr=indptr, weight_indices=weight_indices,
        gate_second=gate_second, pdl=pdl,
    )  # fmt: skip


def vector_scale(scale: View | None) -> Scale:
    """A factor a row or column, or one for all, whose steps are 0."""
    if scale is None:
        return _NO_SCALE
    if scale.size == 1:
        return scale.ptr, 0, 0, 0
    return scale.ptr, scale.strides[0] if len(scale.shape) == 2 else 0, scale.strides[-1], 0


def launch_hopper_fp8(
    out: View, a: View, w: View, a_scale: View, b_scale: View, *, bias: View | None = None, fast_accum: bool = False,
    pdl: bool = False, tile: HopperTile | None = None,
) -> None:  # fmt: skip
    """``out = (a b) * a_scale * b_scale + bias`` of fp8 operands; scales are one factor or one a row and a column.

    Parameters
    ----------
    out : View, [m, n] or [batch, m, n]
    a, w : View, [m, k] and [n, k], or batched
    a_scale, b_scale : View, float32
        One element, or ``[m]`` and ``[n]`` (``[batch, m]``, ``[batch, n]``).
    fast_accum : bool
        Sums stay in the tensor cores, which keep about 14 bits of them, over all of k.
    """
    if out.size == 0:
        return
    tile, batch, grid = _dense(out, a, tile, sums=NONE if fast_accum else VECTORS)
    spec = hopper_spec(tile, a.dtype, w.dtype, out.dtype, scale=VECTORS, promote=0 if fast_accum else PROMOTE)
    launch(
        spec, grid, out, a, w, batch=batch, bias=bias, a_scale=vector_scale(a_scale),
        b_scale=vector_scale(b_scale), pdl=pdl,
    )  # fmt: skip


def launch_hopper_fp8_blocks(
    out: View, a: View, w: View, a_scale: View, b_scale: View, *, scale_major_mode: str = "MN",
    indptr: View | None = None, weight_indices: View | None = None, rows: int = 0, pdl: bool = False,
    tile: HopperTile | None = None,
) -> None:  # fmt: skip
    """fp8 product with a factor for 128 of k of every row of a, and for 128 x 128 of w; grouped with `indptr`.

    Parameters
    ----------
    out : View, [m, n]
    a : View, [m, k], k a multiple of 128
    w : View, [n, k]; grouped [weights, n, k]
    a_scale, b_scale : View, float32
        "K": ``[m, k / 128]`` and ``[ceil(n / 128), k / 128]``; "MN": both transposed. Grouped: b_scale with a leading
        axis of weights. Any strides.
    weight_indices : View, [segments], int32 or int64
        Segments of a negative number are left out.
    rows : int
        Of a segment with rows, to expect; 0: all segments are alike.
    """
    m, n = out.shape
    segments = 1 if indptr is None else indptr.shape[0] - 1
    if m == 0 or segments <= 0:
        return
    sms = device_info(a.device).num_sms
    alike = w.shape[0] if rows else segments
    tile = tile or grouped_tile(rows * alike or m, alike, n, a.shape[1], sms, sums=BLOCKS)
    spec = hopper_spec(tile, a.dtype, w.dtype, out.dtype, scale=BLOCKS, promote=1, grouped=indptr is not None)
    scale_a, scale_b = block_scales(a_scale, b_scale, scale_major_mode)
    tiles = _up(m, tile.block_m) * _up(n, tile.block_n)
    launch(
        spec, sms if indptr is not None else min(sms, tiles), out, a, w, batch=segments, a_scale=scale_a,
        b_scale=scale_b, indptr=indptr, weight_indices=weight_indices, pdl=pdl,
    )  # fmt: skip


def block_scales(a_scale: View, b_scale: View, scale_major_mode: str) -> tuple[Scale, Scale]:
    """Factors a row of a and 128 columns of b, each for 128 of k, in either order of axes."""
    k_axis = -1 if scale_major_mode == "K" else -2
    batch = b_scale.strides[0] if len(b_scale.shape) == 3 else 0
    return (
        (a_scale.ptr, 0, a_scale.strides[-3 - k_axis], a_scale.strides[k_axis]),
        (b_scale.ptr, batch, b_scale.strides[-3 - k_axis], b_scale.strides[k_axis]),
    )


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: each tile in bf16, and each option once."""
    e4, e5 = float8_e4m3fn, float8_e5m2
    half = [hopper_spec(tile, bfloat16, bfloat16, bfloat16) for tile in (LARGE, MIDDLE, WIDE, SMALL, TINY)]
    return [
        *half,
        hopper_spec(LARGE, float16, float16, float32),
        hopper_spec(LARGE, bfloat16, bfloat16, bfloat16, row_major_b=True),
        hopper_spec(LARGE, bfloat16, bfloat16, bfloat16, gated=True),
        hopper_spec(LARGE, bfloat16, bfloat16, bfloat16, grouped=True),
        hopper_spec(WIDE, bfloat16, bfloat16, bfloat16, grouped=True, row_major_b=True),
        hopper_spec(LARGE, e4, e4, bfloat16, scale=VECTORS),
        hopper_spec(PROMOTED, e4, e5, bfloat16, scale=VECTORS, promote=PROMOTE),
        hopper_spec(TALL, e4, e4, bfloat16, scale=BLOCKS, promote=1),
        hopper_spec(BROAD, e4, e4, bfloat16, scale=BLOCKS, promote=1),
        hopper_spec(PROMOTED, e4, e4, bfloat16, scale=BLOCKS, promote=1),
        hopper_spec(TALL, e4, e4, bfloat16, scale=BLOCKS, promote=1, grouped=True),
        hopper_spec(PROMOTED_SMALL, e4, e4, bfloat16, scale=BLOCKS, promote=1, grouped=True),
    ]
