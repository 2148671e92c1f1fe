"""What the host decides for Hopper's matrix products, and models of the kernel's tile walk and operand layouts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16, float8_e4m3fn, float32
from fi_cupy.gemm import hopper, hopper_rows
from fi_cupy.gemm.hopper import BLOCKS, LARGE, MIDDLE, NONE, SMALL, TINY, VECTORS, WIDE, hopper_spec, hopper_tile
from fi_cupy.gemm.select import H100, select_mm_kernel
from fi_cupy.jit.spec import shared_memory

PROMOTING = (hopper.PROMOTED, hopper.PROMOTED_SMALL, hopper.TALL, hopper.BROAD)
TILES = (LARGE, MIDDLE, WIDE, SMALL, TINY, *PROMOTING)
EIGHTS = st.integers(1, 3000).map(lambda i: 8 * i)


def up(a: int, b: int) -> int:
    return -(-a // b)


def test_every_tile_fits_a_multiprocessor():
    for tile in TILES:
        consumers = tile.warps_m * tile.warps_n
        for scale in (NONE, BLOCKS):
            producer, consumer = tile.registers(scale)
            assert 128 * (producer + consumers * consumer) <= 65536 and producer % 8 == consumer % 8 == 0
        assert tile.block_m == 64 * tile.warps_m and tile.block_n % (32 * tile.warps_n) == 0
        for scale in (VECTORS, BLOCKS) if tile in PROMOTING else (NONE, VECTORS):
            assert tile.smem_bytes(scale) <= shared_memory(90)


@settings(max_examples=300, deadline=None)
@given(m=st.integers(1, 9000), n=EIGHTS, k=EIGHTS, batch=st.integers(1, 9), row_major=st.booleans())
def test_dense_choices_cover_the_matrix(m, n, k, batch, row_major):
    spec, grid = select_mm_kernel(m, n, k, H100, bfloat16, float32, row_major_b=row_major, batch=batch)
    config = dict(spec.config)
    if spec.function == "gemm_hopper_rows":
        assert m <= 64 or (m <= 1024 and k < 2048 and grid[0] * grid[1] * grid[2] <= 132)
        assert grid == (up(n, config["kBlockN"]) * config["kSplit"], up(m, config["kRowsA"]), batch)
        assert spec.cluster == (config["kSplit"] if config["kSplit"] > 1 else 0)
        assert 64 * (config["kBlockN"] + 8) * 4 <= config["kStages"] * (config["kBlockN"] + config["kRowsA"]) * 128
        assert config["kBlockN"] % 64 == 0 or not row_major
    elif spec.function == "gemm_hopper":
        several_waves = k < 1024 and not row_major and up(n, 64) * batch >= 4 * 132  # a wide vocabulary's CTAs stay
        assert m > (32 if several_waves else 64)
        assert grid == (min(132, batch * up(m, config["kBlockM"]) * up(n, config["kBlockN"])), 1, 1)
        assert (config["kBlockN"] // config["kWarpsN"]) % (64 if row_major else 32) == 0
    else:
        assert not row_major and m <= 128
    assert spec.smem_bytes <= H100.smem_per_block


def test_large_products_take_large_tiles_and_few_tiles_are_made_smaller():
    assert hopper_tile(8192, 8192, 16384, 132) is LARGE and hopper_tile(4096, 4096, 8192, 132) is LARGE
    assert hopper_tile(128, 4096, 8192, 132).block_m == 64
    for sums in (VECTORS, BLOCKS):
        assert hopper_tile(8192, 8192, 8192, 132, sums=sums) is hopper.BROAD
        assert hopper_tile(4096, 4096, 4096, 132, sums=sums) is hopper.PROMOTED
        assert hopper_tile(1024, 4096, 4096, 132, sums=sums) is hopper.PROMOTED
    assert hopper_tile(4096, 7168, 2048, 132, sums=BLOCKS) is hopper.TALL
    for m in (100, 500, 1000, 3000):
        for options in ({"gated": True}, {"row_major_b": True}, {"gated": True, "row_major_b": True}):
            tile = hopper_tile(m, 512, 1024, 132, **options)
            assert (tile.block_n // tile.warps_n) % (32 * 2 ** len(options)) == 0


def test_who_is_refused():
    assert not hopper.hopper_refusal(H100, bfloat16, 64, 64)
    assert "80" in hopper.hopper_refusal(DeviceInfo(80, "80", 108, 1, 1, 1), bfloat16, 64, 64)
    assert "float32" in hopper.hopper_refusal(H100, float32, 64, 64)
    assert hopper.hopper_refusal(H100, bfloat16, 60, 64) and hopper.hopper_refusal(H100, bfloat16, 64, 60)
    assert hopper.hopper_refusal(H100, float8_e4m3fn, 64, 72) and not hopper.hopper_refusal(H100, float8_e4m3fn, 64, 80)


def test_symbols_name_every_option():
    specs = [
        hopper_spec(LARGE, bfloat16, bfloat16, bfloat16, row_major_b=r, grouped=g, gated=s)
        for r in (False, True)
        for g in (False, True)
        for s in (False, True)
    ]
    assert len({spec.symbol for spec in specs}) == 8
    assert not dict(hopper_spec(LARGE, bfloat16, bfloat16, float32).config)["kBulkStore"]
    assert hopper_spec(LARGE, bfloat16, bfloat16, float32).smem_bytes == LARGE._replace(bulk=False).smem_bytes(NONE)


# --- maps ----------------------------------------------------------------------------------------------------------


class Matrix:
    """What `mappable` reads of a View."""

    def __init__(self, shape, strides):
        self.shape, self.strides = shape, strides


@pytest.mark.parametrize(
    ("shape", "strides", "extents", "steps"),
    [
        ((5, 64), (72, 1), (64, 5, 1, 1), (144, 16, 16)),
        ((3, 5, 64), (400, 72, 1), (64, 5, 3, 1), (144, 800, 16)),
        ((3, 5, 64), (0, 72, 1), (64, 5, 1, 1), (144, 16, 16)),  # one matrix for all
        ((1, 5, 64), (7, 72, 1), (64, 5, 1, 1), (144, 16, 16)),  # the stride of a single matrix means nothing
        ((1, 64), (3, 1), (64, 1, 1, 1), (16, 16, 16)),  # nor that of a single row
    ],
)
def test_maps_describe_rows_and_batches(monkeypatch, shape, strides, extents, steps):
    calls = []
    monkeypatch.setattr(hopper, "_encode", lambda *args: calls.append(args) or b"")
    hopper._matrix_map(bfloat16, 4096, shape, strides, 64, 32)
    assert calls == [("bfloat16", 4096, extents, steps, (64, 32, 1, 1))]


def test_what_maps_cannot_describe():
    assert hopper.mappable(Matrix((5, 64), (64, 1))) and hopper.mappable(Matrix((1, 64), (8, 1)))
    assert hopper.mappable(Matrix((3, 5, 64), (0, 64, 1)))
    assert not hopper.mappable(Matrix((5, 64), (56, 1)))  # overlapping rows
    assert not hopper.mappable(Matrix((5, 64), (-64, 1))) and not hopper.mappable(Matrix((2, 5, 64), (-320, 64, 1)))


# --- the kernel's walk over tiles, as kernels/gemm/hopper_load.cuh has it ------------------------------------------


def inside(number, tiles_m, tiles_n, raster):
    group, in_group = divmod(number, raster * tiles_n)
    rows = min(tiles_m - group * raster, raster)
    return group * raster + in_group % rows, in_group // rows


@given(tiles_m=st.integers(1, 70), tiles_n=st.integers(1, 40))
def test_raster_visits_every_tile_once(tiles_m, tiles_n):
    seen = {inside(i, tiles_m, tiles_n, hopper.RASTER) for i in range(tiles_m * tiles_n)}
    assert seen == {(i, j) for i in range(tiles_m) for j in range(tiles_n)}


@given(tiles_m=st.integers(1, 70), tiles_n=st.integers(1, 40), warps_m=st.integers(1, 3), short=st.integers(0, 191))
def test_last_round_visits_every_row_once(tiles_m, tiles_n, warps_m, short):
    """HopperGemmWalk.find of dense products: whole tiles, then pieces, none larger than what is left of the matrix."""
    block, ctas, tiles = 64 * warps_m, 132, tiles_m * tiles_n
    m = tiles_m * block - short % block
    whole, pieces = hopper.last_round(tiles, min(ctas, tiles), warps_m)
    assert whole % ctas == 0 or pieces == 1
    assert whole + (tiles - whole) * pieces <= up(tiles, ctas) * ctas, "another round"
    seen = np.zeros((m, tiles_n), int)
    for number in range(whole + (tiles - whole) * pieces):
        above, rows, tile = 0, block, number
        if number >= whole:
            rest = number - whole
            tile, rows = whole + rest // pieces, up(warps_m, pieces) * 64
            above = rest % pieces * rows
            rows = min(rows, block - above)
        row, column = inside(tile, tiles_m, tiles_n, hopper.RASTER)
        first = row * block + above
        seen[first : min(m, first + rows), column] += 1
    assert (seen == 1).all()


class Walk:
    """HopperGemmWalk of a warp: a window of 32 segments, running sums of their tiles."""

    def __init__(self, indptr, block_m, tiles_n):
        self.indptr, self.block_m, self.tiles_n = indptr, block_m, tiles_n
        self.segments, self.window, self.before = len(indptr) - 1, 0, 0
        self.load()

    def load(self):
        self.first, self.end = np.zeros(32, int), np.zeros(32, int)
        for lane in range(32):
            if self.window + lane < self.segments:
                self.first[lane], self.end[lane] = self.indptr[self.window + lane : self.window + lane + 2]
        self.until = self.before + np.cumsum(-(-(self.end - self.first) // self.block_m) * self.tiles_n)

    def find(self, number):
        while not (number < self.until).any():
            self.before = self.until[31]
            self.window += 32
            if self.window >= self.segments:
                return None
            self.load()
        lane = int(np.argmax(number < self.until))
        tiles_m = up(self.end[lane] - self.first[lane], self.block_m)
        start = self.until[lane] - tiles_m * self.tiles_n
        row, column = inside(number - start, tiles_m, self.tiles_n, hopper.RASTER)
        return self.window + lane, self.first[lane] + row * self.block_m, column


@given(
    lengths=st.lists(st.sampled_from([0, 0, 1, 64, 127, 128, 129, 700]), max_size=100),
    ctas=st.sampled_from([1, 7, 132]),
)
def test_grouped_walk_visits_every_tile_of_every_segment_once(lengths, ctas):
    indptr, block_m, tiles_n = [3, *(3 + np.cumsum(lengths)).tolist()], 128, 3
    seen = []
    for cta in range(ctas):
        walk, number = Walk(indptr, block_m, tiles_n), cta
        while (tile := walk.find(number)) is not None:
            seen.append(tile)
            number += ctas
    want = [
        (s, indptr[s] + r * block_m, c)
        for s, length in enumerate(lengths)
        for r in range(up(length, block_m))
        for c in range(tiles_n)
    ]
    assert sorted(seen) == sorted(want)


# --- operands in shared memory: what the copy engine writes is what the descriptors read -------------------------


def swizzled(address):
    return address ^ (address >> 7 & 7) << 4


def copied(matrix):
    """A box of rows of 128 bytes as the copy engine leaves it: bytes by address."""
    rows, columns = matrix.shape
    return {swizzled(r * 128 + c * 2): matrix[r, c] for r in range(rows) for c in range(columns)}


def test_k_contiguous_operands_are_read_in_steps_of_32_bytes():
    matrix = np.arange(256 * 64).reshape(256, 64)
    smem = copied(matrix)
    for step in range(4):
        for row in range(256):
            for k in range(16):  # the descriptor's start is step * 32, 8 rows are 1024 bytes
                assert smem[swizzled(step * 32 + row // 8 * 1024 + row % 8 * 128 + k * 2)] == matrix[row, step * 16 + k]


def test_n_contiguous_operands_are_panels_of_64_columns():
    matrix = np.arange(64 * 256).reshape(64, 256)  # k, n
    smem = {}
    for panel in range(4):
        part = copied(matrix[:, panel * 64 : panel * 64 + 64])
        smem.update({panel * 8192 + address: value for address, value in part.items()})
    for step in range(4):
        for n in range(256):
            for k in range(16):  # 16 rows a step; the next panel 8192 bytes on, the next 8 of k 1024
                at = step * 2048 + n // 64 * 8192 + k // 8 * 1024 + k % 8 * 128 + n % 64 * 2
                assert smem[swizzled(at)] == matrix[step * 16 + k, n]


def test_boxes_of_out_are_written_as_the_copy_engine_reads_them():
    """stmatrix of store_boxes: lane l names row l % 16 of chunk j + l / 16, the place of a row of matrix l / 8."""
    smem = {}
    for warp in range(4):
        for j in range(0, 8, 2):
            for q in range(4):  # matrix: chunk j + q / 2, rows 8 (q % 2) ..
                for i in range(8):
                    lane = 8 * q + i
                    at = (warp * 16 + lane % 16) * 128 + ((j + lane // 16) ^ (lane & 7)) * 16
                    for c in range(8):
                        smem[at + 2 * c] = (warp * 16 + q % 2 * 8 + i, 8 * (j + q // 2) + c)
    want = {swizzled(r * 128 + c * 2): (r, c) for r in range(64) for c in range(64)}
    assert smem == want


# --- few rows ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(m=st.integers(1, 200), n=EIGHTS, k=EIGHTS, batch=st.integers(1, 5))
def test_few_rows_share_k_without_idle_ranks(m, n, k, batch):
    tile = hopper_rows.rows_tile(m, n, 2 * k, 132, batch=batch)
    blocks = up(2 * k, 128)
    assert (
        tile.rows >= min(m, 64) and tile.split <= max(1, blocks // 4) and tile.smem_bytes(BLOCKS) <= shared_memory(90)
    )
    spans = [(blocks * r // tile.split, blocks * (r + 1) // tile.split) for r in range(tile.split)]
    assert spans[0][0] == 0 and spans[-1][1] == blocks and all(a < b for a, b in spans)
    # The fours of columns of a tile are shared out as well.
    fours = min(m, tile.rows) * tile.block_n // 4
    shares = [(fours * r // tile.split, fours * (r + 1) // tile.split) for r in range(tile.split)]
    assert sum(b - a for a, b in shares) == fours


def test_the_measured_few_row_configurations():
    # Both halves of a gated n-contiguous weight are whole panels of 64 columns.
    assert hopper_rows.rows_tile(64, 64, 4096, 132, gated=True, row_major_b=True).block_n == 128
    assert hopper_rows.rows_tile(64, 4096, 4096, 132)[:3] == (64, 32, 1)
    assert hopper_rows.rows_tile(64, 14336, 8192, 132)[:3] == (64, 128, 1)
    assert hopper_rows.rows_tile(64, 4096, 28672, 132)[:3] == (64, 64, 2)
    assert hopper_rows.rows_tile(16, 28672, 8192, 132)[:3] == (16, 128, 1)
