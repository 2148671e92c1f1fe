"""Hopper's matrix products against float64: every tile and option, ragged segments, fp8 with each kind of scales."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fi_cupy.arrays import View, view
from fi_cupy.device import device_info
from fi_cupy.dtypes import DType, bfloat16, float8_e4m3fn, float8_e5m2, float16, float32
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.gemm import hopper, hopper_rows, mm_bf16
from fi_cupy.gemm.hopper import BROAD, LARGE, MIDDLE, PROMOTED, PROMOTED_SMALL, SMALL, TALL, TINY, WIDE
from fi_cupy.gemm.hopper_rows import RowsTile
from fi_cupy.testing.generators import normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
TILES = {"large": LARGE, "broad": BROAD, "middle": MIDDLE, "wide": WIDE, "small": SMALL, "tiny": TINY}
DIRECT = LARGE._replace(bulk=False)
SHAPES = [(1, 8, 8), (64, 64, 64), (129, 264, 72), (300, 520, 1032), (640, 1032, 200)]
E4, E5 = float8_e4m3fn, float8_e5m2


@pytest.fixture(autouse=True)
def on_hopper():
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")


def operand(rng, shape: tuple[int, ...], dtype=bfloat16, scale: float = 1.0, pad: int = 0) -> tuple[View, np.ndarray]:
    """A view on the GPU, its rows inside wider rows of NaN if `pad`, and the values as float64."""
    kind: DType = to_dtype(dtype)
    values = normal(rng, shape, kind, scale)
    base = values
    if pad:
        base = np.full((*shape[:-1], shape[-1] + 2 * pad), np.nan, kind.np)
        base[..., pad:-pad] = values
    array = on_gpu(base)
    made = view(array[..., pad:-pad] if pad else array).typed(kind)
    return made, values.astype(np.float64)


class Output:
    """An output inside wider rows of NaN, which must stay."""

    def __init__(self, shape: tuple[int, ...], dtype=bfloat16, pad: int = 8) -> None:
        self.kind = to_dtype(dtype)
        self.base = poisoned((*shape[:-1], shape[-1] + 2 * pad), self.kind)
        self.pad, self.view = pad, view(self.base[..., pad:-pad])

    def check(self, want: np.ndarray, what: str = "") -> None:
        wide = to_float64(self.base)
        assert np.isnan(wide[..., : self.pad]).all() and np.isnan(wide[..., -self.pad :]).all()
        assert_close(wide[..., self.pad : -self.pad], want, self.kind, "product", what)


def transposed(w: View) -> View:
    """A copy with the last two axes swapped (16-bit types; CuPy copies them as integers)."""
    bits = w.array.view(np.uint16).swapaxes(-1, -2)
    return view(cupy.ascontiguousarray(bits).view(w.dtype.np))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tile", [*TILES.values(), DIRECT], ids=[*TILES, "direct"])
def test_dense(rng, tile, shape):
    m, n, k = shape
    (a, a64), (w, w64) = operand(rng, (m, k), pad=8), operand(rng, (n, k), pad=8)
    (bias, bias64), (add, add64) = operand(rng, (n,)), operand(rng, (m, n), pad=8)
    out = Output((m, n))
    hopper.launch_hopper_mm(out.view, a, w, bias=bias, residual=add, tile=tile)
    out.check(a64 @ w64.T + bias64 + add64)
    (a, a64), (w, w64) = operand(rng, (m, k), float16, pad=8), operand(rng, (n, k), float16, pad=8)
    out = Output((m, n), float32)
    hopper.launch_hopper_mm(out.view, a, w, tile=tile)
    out.check(a64 @ w64.T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["large", "broad", "middle", "wide", "small"])
def test_n_contiguous_b(rng, name, shape):
    m, n, k = shape
    (a, a64), (b, b64) = operand(rng, (m, k), pad=8), operand(rng, (k, n), pad=8)
    out = Output((m, n))
    hopper.launch_hopper_mm(out.view, a, b, row_major_b=True, tile=TILES[name])
    out.check(a64 @ b64)


@pytest.mark.parametrize("gate_second", [False, True])
@pytest.mark.parametrize("name", ["large", "middle", "wide", "small"])
def test_gated(rng, name, gate_second):
    for m, n, k in ((65, 136, 200), (300, 520, 1032)):
        (a, a64), (w, w64) = operand(rng, (m, k)), operand(rng, (2 * n, k), scale=k**-0.5)
        bias, bias64 = operand(rng, (2 * n,))
        for row_major in (False, True) if TILES[name].block_n // TILES[name].warps_n >= 128 else (False,):
            b = transposed(w) if row_major else w
            out = Output((m, n))
            hopper.launch_hopper_mm(
                out.view, a, b, bias=bias, gated=True, gate_second=gate_second, row_major_b=row_major, tile=TILES[name]
            )
            first, second = np.split(a64 @ w64.T + bias64, 2, axis=1)
            out.check(silu(second) * first if gate_second else silu(first) * second)


@pytest.mark.parametrize("tile", [*TILES.values()], ids=[*TILES])
def test_batched(rng, tile):
    (a, a64), (w, w64) = operand(rng, (3, 130, 136), pad=8), operand(rng, (3, 264, 136), pad=8)
    out = Output((3, 130, 264))
    hopper.launch_hopper_mm(out.view, a, w, tile=tile)
    out.check(a64 @ w64.swapaxes(1, 2))
    # One matrix for the whole batch: a stride of 0.
    shared = view(cupy.broadcast_to(w.array[0], (3, 264, 136)))
    out = Output((3, 130, 264))
    hopper.launch_hopper_mm(out.view, a, shared, tile=tile)
    out.check(a64 @ w64[0].T)


@pytest.mark.parametrize("m", [1650, 1600], ids=["ragged", "empty piece"])
def test_last_round_in_pieces(rng, m):
    """A few tiles more than multiprocessors: the last are shared out in pieces of 64 rows, also one without rows."""
    sms = device_info(0).num_sms
    n, k = (-(-sms // 13) * 256, 72)
    assert hopper.last_round(13 * (n // 256), sms, 2)[1] == 2
    (a, a64), (w, w64), (add, add64) = operand(rng, (m, k)), operand(rng, (n, k)), operand(rng, (m, n))
    bias, bias64 = operand(rng, (n,))
    for plus in (None, add):
        out = Output((m, n))
        hopper.launch_hopper_mm(out.view, a, w, tile=LARGE, bias=bias if plus else None, residual=plus)
        out.check(a64 @ w64.T + (0 if plus is None else add64 + bias64))
    m = m * 192 // 128
    (a, a64), (w, w64) = operand(rng, (m, 256), E4), operand(rng, (n // 2, 256), E4)
    sa, sb = (rng.uniform(0.5, 2, (x, 2)).astype(np.float32) for x in (m, n // 256))
    for tile in (TALL, BROAD, PROMOTED):
        out = Output((m, n // 2))
        hopper.launch_hopper_fp8_blocks(
            out.view, a, w, *(view(on_gpu(x)) for x in (sa, sb)), scale_major_mode="K", tile=tile
        )
        out.check((a64 * spread(sa, 1, 128)) @ (w64 * spread(sb, 128, 128)).T)


def test_residual_in_place_and_same_bits(rng):
    (a, a64), (w, w64), (_, x64) = (operand(rng, s) for s in ((300, 512), (520, 512), (300, 520)))
    want = a64 @ w64.T + x64
    copies = [view(on_gpu(x64.astype(bfloat16.np))) for _ in range(2)]
    for copy in copies:
        hopper.launch_hopper_mm(copy, a, w, residual=copy)
        assert_close(to_float64(copy.array), want, "bfloat16", "product")
    assert bool((copies[0].array.view(np.uint8) == copies[1].array.view(np.uint8)).all())


LENGTHS = {
    "ragged": [0, 5, 0, 130, 64, 1, 0],
    "many": [65, 63, 129, 127, 0, 2] * 12,
    "ones": [1] * 40,
    "empty": [0, 0],
}


@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(
    "tile", [LARGE, DIRECT, MIDDLE, WIDE, SMALL], ids=["large", "direct", "middle", "wide", "small"]
)
def test_grouped(rng, tile, lengths, row_major):
    n, k, weights, skip = 264, 200, 5, 3
    index = np.int64 if row_major else np.int32
    indptr = skip + np.concatenate([[0], np.cumsum(lengths)])
    total = int(indptr[-1]) + 5
    (a, a64), (w, w64) = operand(rng, (total, k)), operand(rng, (weights, n, k))
    bits = a.array.view(np.uint16)
    bits[:skip] = bits[-5:] = 0x7FC0  # rows of no segment: NaN
    which = rng.integers(0, weights, len(lengths))
    out = Output((total, n))
    hopper.launch_hopper_grouped(
        out.view, a, transposed(w) if row_major else w,
        view(cupy.asarray(indptr.astype(index))), weight_indices=view(cupy.asarray(which.astype(index))),
        row_major_b=row_major, tile=tile,
    )  # fmt: skip
    wide = to_float64(out.base)
    assert np.isnan(wide[:skip]).all() and np.isnan(wide[-5:]).all()
    got = wide[skip : total - 5, 8:-8]
    want = np.concatenate(
        [a64[i:j] @ w64[s].T for i, j, s in zip(indptr[:-1], indptr[1:], which, strict=True)] + [np.zeros((0, n))]
    )
    assert_close(got, want, "bfloat16", "product")


def test_grouped_gated(rng):
    n, k, indptr = 256, 512, np.array([0, 100, 100, 164], np.int32)
    (a, a64), (w, w64), (bias, bias64) = (
        operand(rng, (164, k)), operand(rng, (3, 2 * n, k), scale=k**-0.5), operand(rng, (3, 2 * n))
    )  # fmt: skip
    out = Output((164, n))
    hopper.launch_hopper_grouped(out.view, a, w, view(cupy.asarray(indptr)), bias=bias, gated=True)
    sums = [a64[indptr[i] : indptr[i + 1]] @ w64[i].T + bias64[i] for i in range(3)]
    out.check(np.concatenate([silu(s[:, :n]) * s[:, n:] for s in sums]))


def test_segments_share_one_weight(rng):
    """A stride of 0 between weights: whatever the index, it is the same matrix."""
    n, k, indptr = 136, 264, np.array([0, 70, 100, 164], np.int32)
    (a, a64), (w, w64) = operand(rng, (164, k)), operand(rng, (n, k))
    out = Output((164, n))
    hopper.launch_hopper_grouped(out.view, a, view(cupy.broadcast_to(w.array, (3, n, k))), view(cupy.asarray(indptr)))
    out.check(a64 @ w64.T)


@pytest.mark.parametrize("types", [(E4, E4), (E5, E4), (E4, E5), (E5, E5)], ids=str)
@pytest.mark.parametrize("vectors", [False, True])
def test_fp8(rng, types, vectors):
    for m, n, k in ((1, 16, 16), (129, 264, 144), (300, 520, 1040)):
        (a, a64), (w, w64) = operand(rng, (m, k), types[0]), operand(rng, (n, k), types[1])
        sa = rng.uniform(0.5, 2, m if vectors else 1).astype(np.float32)
        sb = rng.uniform(0.5, 2, n if vectors else 1).astype(np.float32)
        bias, bias64 = operand(rng, (n,))
        want = a64 @ w64.T * sa[:, None] * sb + bias64
        for fast, tiles in ((True, (LARGE, SMALL)), (False, (PROMOTED, PROMOTED_SMALL, TALL, BROAD))):
            for tile in tiles:
                out = Output((m, n))
                hopper.launch_hopper_fp8(
                    out.view, a, w, view(on_gpu(sa)), view(on_gpu(sb)), bias=bias, fast_accum=fast, tile=tile
                )
                out.check(want)


def test_fp8_sums_leave_the_tensor_cores(rng):
    """Sums of 16384 positive terms: the tensor cores keep about 14 bits of them, promoted sums start afresh."""
    m, n, k = 128, 128, 16384
    a64, w64 = (np.abs(rng.standard_normal((m, k))).astype(E4.np).astype(np.float64) for _ in range(2))
    a, w = (view(on_gpu(x.astype(E4.np))).typed(E4) for x in (a64, w64))
    one = view(cupy.ones(1, np.float32))
    want, errors = a64 @ w64.T, {}
    for fast in (True, False):
        out = poisoned((m, n), "float32")
        hopper.launch_hopper_fp8(view(out), a, w, one, one, fast_accum=fast)
        errors[fast] = np.linalg.norm(to_float64(out) - want) / np.linalg.norm(want)
    assert errors[False] < 1e-2 and errors[False] < errors[True] / 10  # 0.6 % and 22 % on an H100


def spread(scale: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return np.repeat(np.repeat(scale, rows, 0), columns, 1)


@pytest.mark.parametrize("mode", ["K", "MN"])
@pytest.mark.parametrize("tile", [PROMOTED, PROMOTED_SMALL, TALL, BROAD], ids=["128", "64", "192", "128x192"])
def test_fp8_blocks(rng, tile, mode):
    for m, n, k in ((1, 8, 128), (129, 264, 512), (300, 1032, 1152)):
        (a, a64), (w, w64) = operand(rng, (m, k), E4), operand(rng, (n, k), E4)
        sa = rng.uniform(0.5, 2, (m, k // 128)).astype(np.float32)
        sb = rng.uniform(0.5, 2, (-(-n // 128), k // 128)).astype(np.float32)
        given_a, given_b = sa, sb
        if mode == "MN":  # rows are padded to 16 bytes
            given_a = np.full((k // 128, -(-m // 4) * 4), np.nan, np.float32)
            given_a[:, :m], given_b = sa.T, np.ascontiguousarray(sb.T)
        out = Output((m, n))
        hopper.launch_hopper_fp8_blocks(
            out.view, a, w, view(on_gpu(given_a)), view(on_gpu(given_b)), scale_major_mode=mode, tile=tile
        )
        out.check((a64 * spread(sa, 1, 128)) @ (w64 * spread(sb, 128, 128)[:n]).T)


@pytest.mark.parametrize("mode", ["K", "MN"])
@pytest.mark.parametrize("lengths", [[0, 4, 132, 64, 0, 300], [64] * 40], ids=["ragged", "equal"])
def test_fp8_blocks_grouped(rng, lengths, mode):
    n, k = 392, 512
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    m = int(indptr[-1])
    (a, a64), (w, w64) = operand(rng, (m, k), E4), operand(rng, (len(lengths), n, k), E4)
    sa = rng.uniform(0.5, 2, (m, k // 128)).astype(np.float32)
    sb = rng.uniform(0.5, 2, (len(lengths), -(-n // 128), k // 128)).astype(np.float32)
    given = (sa, sb) if mode == "K" else (np.ascontiguousarray(sa.T), np.ascontiguousarray(sb.swapaxes(1, 2)))
    want = np.concatenate(
        [
            (a64[i:j] * spread(sa[i:j], 1, 128)) @ (w64[s] * spread(sb[s], 128, 128)[:n]).T
            for s, (i, j) in enumerate(itertools.pairwise(indptr))
        ]
    )
    for tile in (PROMOTED, PROMOTED_SMALL, TALL, BROAD):
        out = Output((m, n))
        hopper.launch_hopper_fp8_blocks(
            out.view, a, w, *(view(on_gpu(x)) for x in given), scale_major_mode=mode, indptr=view(cupy.asarray(indptr)),
            tile=tile,
        )  # fmt: skip
        out.check(want)


FEW = [RowsTile(8, 64, 2, 20), RowsTile(16, 64, 2, 20), RowsTile(64, 64, 2, 13), RowsTile(64, 128, 1, 8)]
FEW += [RowsTile(32, 128, 4, 8), RowsTile(64, 64, 1, 6)]
#: Half and one and a half times the columns: k-contiguous weights alone.
ODD = [RowsTile(16, 32, 1, 20), RowsTile(64, 32, 1, 17), RowsTile(64, 96, 1, 5)]


@pytest.mark.parametrize("tile", FEW, ids=str)
def test_few_rows(rng, tile):
    for m, n, k in ((1, 8, 8), (8, 136, 200), (33, 264, 1032), (64, 1032, 4096), (150, 264, 520)):
        (a, a64), (w, w64) = operand(rng, (m, k), pad=8), operand(rng, (n, k), pad=8)
        (bias, bias64), (add, add64) = operand(rng, (n,)), operand(rng, (m, n))
        for pdl in (False, True):
            out = Output((m, n))
            hopper_rows.launch_rows_mm(out.view, a, w, bias=bias, residual=add, pdl=pdl, tile=tile)
            out.check(a64 @ w64.T + bias64 + add64)
        out = Output((m, n), float32 if k < 2048 else bfloat16)  # the tensor cores' additions are not rounded
        hopper_rows.launch_rows_mm(out.view, a, transposed(w), row_major_b=True, tile=tile)
        out.check(a64 @ w64.T)
        w, w64 = operand(rng, (2 * n, k), scale=k**-0.5)
        out = Output((m, n))
        hopper_rows.launch_rows_mm(out.view, a, w, gated=True, tile=tile)
        out.check(silu(a64 @ w64[:n].T) * (a64 @ w64[n:].T))


@pytest.mark.parametrize("tile", ODD, ids=str)
def test_few_rows_in_tiles_of_other_widths(rng, tile):
    for m, n, k in ((1, 8, 8), (8, 136, 200), (33, 264, 1032), (150, 200, 520)):
        (a, a64), (w, w64) = operand(rng, (m, k), pad=8), operand(rng, (n, k), pad=8)
        (bias, bias64), (add, add64) = operand(rng, (n,)), operand(rng, (m, n))
        for pdl in (False, True):
            out = Output((m, n))
            hopper_rows.launch_rows_mm(out.view, a, w, bias=bias, residual=add, pdl=pdl, tile=tile)
            out.check(a64 @ w64.T + bias64 + add64)


@pytest.mark.parametrize("tile", [*FEW[:3], *ODD], ids=str)
def test_few_rows_batched_and_fp8(rng, tile):
    (a, a64), (w, w64) = operand(rng, (3, 7, 264)), operand(rng, (3, 72, 264))
    out = Output((3, 7, 72))
    hopper_rows.launch_rows_mm(out.view, a, w, tile=tile)
    out.check(a64 @ w64.swapaxes(1, 2))
    (a, a64), (w, w64) = operand(rng, (7, 528), E4), operand(rng, (72, 528), E4)
    sa, sb = (rng.uniform(0.5, 2, size).astype(np.float32) for size in (7, 72))
    out = Output((7, 72))
    hopper_rows.launch_rows_fp8(out.view, a, w, view(on_gpu(sa)), view(on_gpu(sb)), tile=tile)
    out.check(a64 @ w64.T * sa[:, None] * sb)
    for m, n, k in ((1, 8, 128), (13, 264, 1152)):
        (a, a64), (w, w64) = operand(rng, (m, k), E4), operand(rng, (n, k), E4)
        sa = rng.uniform(0.5, 2, (m, k // 128)).astype(np.float32)
        sb = rng.uniform(0.5, 2, (-(-n // 128), k // 128)).astype(np.float32)
        for mode in ("K", "MN") if 128 % tile.block_n == 0 else ():
            given = (sa, sb) if mode == "K" else (np.ascontiguousarray(sa.T), np.ascontiguousarray(sb.T))
            out = Output((m, n))
            hopper_rows.launch_rows_fp8_blocks(
                out.view, a, w, *(view(on_gpu(x)) for x in given), scale_major_mode=mode, tile=tile
            )
            out.check((a64 * spread(sa, 1, 128)) @ (w64 * spread(sb, 128, 128)[:n]).T)


def test_a_chain_under_dependent_launch(rng):
    """Each product reads what the one in front of it writes."""
    n = 1024
    x, x64 = operand(rng, (32, n))
    weights = [operand(rng, (n, n), scale=n**-0.5) for _ in range(6)]
    outs = [view(poisoned((32, n), "bfloat16")) for _ in weights]
    for _ in range(10):
        for given, (w, _), out in zip([x, *outs], weights, outs, strict=False):
            hopper_rows.launch_rows_mm(out, given, w, pdl=True)
    for (_, w64), out in zip(weights, outs, strict=True):
        x64 = x64 @ w64.T
        assert_close(to_float64(out.array), x64, "bfloat16", "product")
        x64 = to_float64(out.array)


def test_layouts_that_no_map_describes_go_to_the_portable_kernels(rng):
    a, w = normal(rng, (100, 64)), on_gpu(normal(rng, (72, 64)))
    shape, strides = (100, 64), (16, 2)  # rows overlap
    windows = cupy.lib.stride_tricks.as_strided(on_gpu(a.reshape(-1)), shape, strides)
    same = np.lib.stride_tricks.as_strided(a.reshape(-1), shape, strides).astype(np.float64)
    want = same @ to_float64(w).T
    assert_close(to_float64(mm_bf16(windows, w.T)), want, "bfloat16", "product")
