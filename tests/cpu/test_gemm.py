"""mm_bf16 and bmm_bf16 on CPU arrays, the choice of kernels, and a Python emulation of their subtle index maps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy import errors
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16, float16, float32
from fi_cupy.gemm import bmm_bf16, kernel_specs, mm_bf16
from fi_cupy.gemm.select import (
    FEW_MAX,
    H100,
    ROWS_MAX,
    STREAM_MAX,
    TILES,
    few_config,
    rows_config,
    select_mm_kernel,
    stream_once,
    tiled_config,
)
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

A100 = DeviceInfo(80, "80", 108, 163 << 10, 164 << 10, 40 << 20)
RTX4090 = DeviceInfo(89, "89", 128, 99 << 10, 100 << 10, 72 << 20)
T4 = DeviceInfo(75, "75", 40, 64 << 10, 64 << 10, 4 << 20)
DEVICES = [H100, A100, RTX4090, T4]
EIGHTS = st.integers(1, 3000).map(lambda i: 8 * i)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("m", [0, 1, 5])
def test_values(rng, dtype, m):
    a, weight, bias = normal(rng, (m, 64), dtype), normal(rng, (24, 64), dtype), normal(rng, (24,), dtype)
    want = a.astype(np.float64) @ weight.astype(np.float64).T
    got = mm_bf16(a, weight.T)
    assert got.dtype == a.dtype and got.shape == (m, 24)
    assert_close(got, want, dtype, "product")
    assert_close(mm_bf16(a, np.ascontiguousarray(weight.T)), want, dtype, "product")
    out = np.full((m, 24), np.nan, np.float32)
    assert mm_bf16(a, weight.T, bias, out=out) is out
    assert_close(out, want + bias.astype(np.float64), "float32", "product")
    assert mm_bf16(a, weight.T, out_dtype="float16").dtype == np.float16
    assert (mm_bf16(a, weight.T, backend="cudnn") == got).all()


def test_batched_values(rng):
    a, w = normal(rng, (3, 5, 16)), normal(rng, (3, 8, 16))
    want = a.astype(np.float64) @ w.astype(np.float64).swapaxes(1, 2)
    assert_close(bmm_bf16(a, w.swapaxes(1, 2), out_dtype=np.float32), want, "float32", "product")
    assert bmm_bf16(a[:0], w[:0].swapaxes(1, 2)).shape == (0, 5, 8)


def test_torch_arrays(rng):
    torch = pytest.importorskip("torch")
    a, w = torch.randn(3, 16, dtype=torch.bfloat16), torch.randn(8, 16, dtype=torch.bfloat16)
    got = mm_bf16(a, w.T, out_dtype=torch.float32)
    assert got.dtype == torch.float32
    assert_close(got.numpy(), a.double().numpy() @ w.double().numpy().T, "float32", "product")


def test_jax_arrays(rng):
    jnp = pytest.importorskip("jax.numpy")
    a, w = normal(rng, (3, 16)), normal(rng, (8, 16))
    got = mm_bf16(jnp.asarray(a), jnp.asarray(w).T)
    assert_close(np.asarray(got), a.astype(np.float64) @ w.astype(np.float64).T, "bfloat16", "product")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda a, b: mm_bf16(a[0], b), errors.ShapeError, "mm_bf16: a is 1-D"),
        (lambda a, b: mm_bf16(a, b[0]), errors.ShapeError, "mm_bf16: b is 1-D"),
        (lambda a, b: mm_bf16(a, b[:8]), errors.ShapeError, "mm_bf16: b has shape (8, 24), expected (16, 24)"),
        (lambda a, b: mm_bf16(a[:, :12], b[:12]), errors.ShapeError, "mm_bf16: a has shape (3, 12), expected a last"),
        (lambda a, b: mm_bf16(a, b[:, :12]), errors.ShapeError, "mm_bf16: b has shape (16, 12), expected a last"),
        (lambda a, b: mm_bf16(a.T.copy().T, b), errors.LayoutError, "mm_bf16: a has inner stride 3, expected 1"),
        (
            lambda a, b: mm_bf16(a, np.repeat(b, 2, 0)[::2, ::3]),
            errors.LayoutError,
            "pass weight.T",
        ),
        (lambda a, b: mm_bf16(a.astype(np.float64), b), errors.DTypeError, "mm_bf16: a has dtype float64"),
        (lambda a, b: mm_bf16(a, b.astype(np.float64)), errors.DTypeError, "mm_bf16: b has dtype float64"),
        (lambda a, b: mm_bf16(a, b, a[0, :8]), errors.ShapeError, "mm_bf16: bias has shape (8,), expected (24,)"),
        (lambda a, b: mm_bf16(a, b, out=np.empty((3, 16))), errors.ShapeError, "mm_bf16: out has shape (3, 16)"),
        (
            lambda a, b: mm_bf16(a, b, out=np.empty((3, 24), np.float16), out_dtype="bfloat16"),
            errors.DTypeError,
            "mm_bf16: out has dtype float16, expected bfloat16 = out_dtype",
        ),
        (lambda a, b: mm_bf16(a, b, out_dtype="int8"), errors.DTypeError, "mm_bf16: out_dtype is int8"),
        (lambda a, b: mm_bf16(a, b, backend="x"), errors.ArgumentError, "backend is 'x', expected 'auto' or 'cudnn'"),
        (lambda a, b: bmm_bf16(a, b), errors.ShapeError, "bmm_bf16: a is 2-D"),
        (lambda a, b: bmm_bf16(a[None], b[None][[0, 0]]), errors.ShapeError, "bmm_bf16: b has shape (2, 16, 24)"),
    ],
)
def test_errors_name_operator_argument_got_and_wanted(rng, call, error, text):
    a, b = normal(rng, (3, 16), "float16"), normal(rng, (24, 16), "float16").T
    with pytest.raises(error) as caught:
        call(a, b)
    assert text in str(caught.value)


def test_read_only_out_is_refused(rng):
    out = np.empty((3, 8), np.float16)
    out.flags.writeable = False
    with pytest.raises(errors.ImmutableArrayError, match="mm_bf16: out is a read-only"):
        mm_bf16(normal(rng, (3, 16), "float16"), normal(rng, (8, 16), "float16").T, out=out)


@settings(max_examples=300, deadline=None)
@given(
    m=st.integers(1, 5000), n=EIGHTS, k=EIGHTS, batch=st.integers(1, 9), device=st.sampled_from(DEVICES),
    dtype=st.sampled_from([bfloat16, float16]), out=st.sampled_from([bfloat16, float32]), row_major=st.booleans(),
)  # fmt: skip
def test_every_choice_covers_the_matrix_and_fits_the_device(m, n, k, batch, device, dtype, out, row_major):
    spec, grid = select_mm_kernel(m, n, k, device, dtype, out, row_major_b=row_major, batch=batch)
    config = dict(spec.config)
    assert spec.supports(device.arch) and spec.smem_bytes <= device.smem_per_block
    assert config["Out"] is out
    if "hopper" in spec.function:  # tests/cpu/test_gemm_hopper.py
        assert device is H100 and config["kRowMajorB"] == row_major
        spec, grid = select_mm_kernel(m, n, k, device, dtype, out, row_major_b=row_major, batch=batch, portable=True)
        config = dict(spec.config)
    assert grid[2] == batch and grid[1] <= 65535 and 32 <= spec.threads <= 1024
    assert config["T"] is dtype and config["Out"] is out
    if spec.function == "gemm_tiled":
        rows = -(-m // config["kBlockM"])
        assert grid[0] == rows * -(-n // config["kBlockN"]) and config["kRowMajorB"] == row_major
        return
    assert not row_major
    warps_k, depth = config["kWarpsK"], config["kDepth"]
    if spec.function == "gemm_rows":
        columns, rows, step = config["kWarpsN"] * config["kRows"] * (32 // config["kLanes"]), config["kM"], 8
        assert spec.threads == 32 * warps_k * config["kWarpsN"] and rows >= m
        step = 8 * config["kLanes"]
    elif spec.function == "gemm_few":
        columns, rows, step = 16 * config["kWTiles"], 8 * config["kATiles"], 64
        assert warps_k * rows * (columns + 2) * 4 <= 48 << 10 and rows >= m
    else:
        columns, rows, step = 8 * config["kNTiles"], 16 * config["kMTiles"], 64
        parts = warps_k * rows * (columns + 8 * (config["kNTiles"] > 1)) * 4
        assert parts <= 48 << 10 or (warps_k % 2 == 0 and parts <= 96 << 10)
    assert grid[0] == -(-n // columns) and grid[1] == (1 if spec.function == "gemm_rows" else -(-m // rows))
    # No warp without work, and no register slot that is never filled.
    assert (warps_k - 1) * step < k and (depth - 1) * warps_k * step < k
    # All of k in one round of loads: only where that round holds it.
    held = warps_k * depth * step
    assert k <= held if config["kOnce"] else spec.function == "gemm_stream" or k > held


def test_the_measured_configurations():
    assert rows_config(4096) == (32, 1, 2, 8, 1)
    assert rows_config(14336) == (32, 1, 4, 8, 1)
    assert rows_config(576) == (16, 1, 2, 3, 2)
    assert rows_config(1536) == (16, 1, 4, 3, 2)
    assert few_config(4, 4096, 4096) == few_config(8, 4096, 14336) == (1, 1, 2, 8, True, True)
    assert few_config(16, 4096, 4096) == (2, 1, 2, 8, False, True)
    assert few_config(16, 14336, 4096) == (2, 1, 2, 4, True, True)
    assert few_config(8, 576, 576) == (1, 1, 1, 9, False, False)
    assert few_config(8, 49152, 576) == (1, 1, 1, 9, True, True)
    assert few_config(8, 576, 1536) == (1, 1, 2, 12, False, False)
    assert tiled_config(4096, 4096, H100) == (128, 128, 64, 3, 16)


def test_more_rows_go_from_rows_to_few_to_stream_to_tiled():
    def function(m, n=4096, k=4096, **options):
        return select_mm_kernel(m, n, k, H100, portable=True, **options)[0].function

    assert [function(m) for m in (1, ROWS_MAX, ROWS_MAX + 1, FEW_MAX)] == ["gemm_rows"] * 2 + ["gemm_few"] * 2
    assert function(STREAM_MAX + 1) == function(4096) == "gemm_tiled"
    assert function(64, 3072, 576) == "gemm_stream"  # the rows of a stay in L1
    for m, n, k, name in ((16, 576, 576, "16x8_d2_w5a_once"), (64, 576, 1536, "16x32_d2_w12a_once")):
        assert select_mm_kernel(m, n, k, H100)[0].symbol == f"gemm_stream_bf16_{name}"
    assert stream_once(16, 576, 4096, H100, bfloat16, bfloat16) is None  # more than registers hold
    assert stream_once(64, 3072, 576, H100, bfloat16, bfloat16) is None  # more than a wave
    assert function(64, 49152, 576) == "gemm_tiled"  # tiles fill the device
    assert function(1, row_major_b=True) == "gemm_tiled"
    # Turing has no bf16 tensor cores.
    assert select_mm_kernel(4, 576, 576, T4)[0].function == "gemm_rows"
    assert select_mm_kernel(16, 576, 576, T4)[0].function == "gemm_tiled"
    assert select_mm_kernel(8, 576, 576, T4, float16, float16)[0].function == "gemm_few"


def test_small_products_take_small_tiles():
    assert tiled_config(4096, 4096, H100)[:2] == (128, 128)
    assert tiled_config(512, 576, H100)[:2] == (64, 64)
    assert tiled_config(512, 6144, H100) == (128, 64, 64, 3, 16)  # three CTAs a multiprocessor are one wave
    assert tiled_config(256, 4096, H100) == (64, 64, 64, 4, 16)  # they are one wave either way
    for tile in TILES:
        assert tile[0] % 32 == tile[1] % 64 == 0


def test_kernel_specs_are_distinct():
    specs = kernel_specs()
    assert len({s.symbol for s in specs}) == len(specs) <= 69
    assert sum("hopper" not in s.function for s in specs) <= 42  # these are compiled for every architecture


def fragment_of_c64(w, lane, half):
    """What lane holds of eight rows of 64 elements: row lane / 4, eight elements from 32 half + 8 (lane % 4)."""
    return w[lane >> 2, 32 * half + 8 * (lane & 3) :][:8]


def mma(a_lanes, b_lanes):
    """m16n8k16 on fragments, PTX's layout: a_lanes[32][4] and b_lanes[32][2] pairs -> [16, 8]."""
    a, b = np.zeros((16, 16)), np.zeros((16, 8))
    for lane in range(32):
        g, t = lane >> 2, lane & 3
        for i, (row, k) in enumerate(((g, 0), (g + 8, 0), (g, 8), (g + 8, 8))):
            a[row, k + 2 * t : k + 2 * t + 2] = a_lanes[lane][i]
        for i in range(2):
            b[8 * i + 2 * t : 8 * i + 2 * t + 2, g] = b_lanes[lane][i]
    return a @ b


@pytest.mark.parametrize("wide", [False, True])
def test_streamed_fragments_need_no_shuffle(rng, wide):
    """The k permutation of kernels/gemm/stream.cuh: 16-byte pieces as fragments of two k16 steps."""
    x, w = rng.standard_normal((16, 64)), rng.standard_normal((8, 64))
    want = x @ w.T
    acc = np.zeros((2, 2, 16, 8))  # load i, half
    for half in range(2):
        pieces = [(fragment_of_c64(x[:8], lane, half), fragment_of_c64(x[8:], lane, half)) for lane in range(32)]
        for i in range(2) if wide else (half,):
            if wide:
                loaded = [w[4 * i + lane // 8, 8 * (lane % 8) :][:8] for lane in range(32)]
            else:
                loaded = [fragment_of_c64(w, lane, i) for lane in range(32)]
            for s in range(2):
                first, second = slice(4 * s, 4 * s + 2), slice(4 * s + 2, 4 * s + 4)
                a_lanes = [(lo[first], hi[first], lo[second], hi[second]) for lo, hi in pieces]
                acc[i, half] += mma(a_lanes, [(v[first], v[second]) for v in loaded])
    if wide:  # row r of load i: column 2 r of half 0 and column 2 r + 1 of half 1
        got = np.concatenate([acc[i, 0][:, 0::2] + acc[i, 1][:, 1::2] for i in range(2)], axis=1)
    else:
        got = acc[0, 0] + acc[1, 1]
    np.testing.assert_allclose(got, want)


@pytest.mark.parametrize("width", [32, 64, 128])
def test_swizzle_is_a_permutation_without_bank_conflicts(width):
    def swizzled(row, chunk):
        return row * width + (chunk ^ ((row >> 1) & 3 if width == 32 else row & 7)) * 8

    rows, chunks = 64, width // 8
    assert {swizzled(r, c) for r in range(rows) for c in range(chunks)} == set(range(0, rows * width, 8))
    for first in range(0, rows, 8):
        for chunk in range(chunks):
            banks = {swizzled(first + r, chunk) * 2 // 16 % 8 for r in range(8)}  # 16-byte columns of the 128-byte line
            assert len(banks) == 8


def test_quad_transpose():
    """transpose_quad of kernels/gemm/tiled.cuh: word j of lane t becomes word t of lane j."""
    v = [[(t, j) for j in range(4)] for t in range(4)]

    def exchange(send, mask):
        return [send[t ^ mask] for t in range(4)]

    odd, high = [t & 1 for t in range(4)], [t & 2 for t in range(4)]
    r0 = exchange([v[t][0] if odd[t] else v[t][1] for t in range(4)], 1)
    r1 = exchange([v[t][2] if odd[t] else v[t][3] for t in range(4)], 1)
    a = [(r0[t], v[t][1], r1[t], v[t][3]) if odd[t] else (v[t][0], r0[t], v[t][2], r1[t]) for t in range(4)]
    s0 = exchange([a[t][0] if high[t] else a[t][2] for t in range(4)], 2)
    s1 = exchange([a[t][1] if high[t] else a[t][3] for t in range(4)], 2)
    out = [(s0[t], s1[t], a[t][2], a[t][3]) if high[t] else (a[t][0], a[t][1], s0[t], s1[t]) for t in range(4)]
    assert out == [tuple((j, t) for j in range(4)) for t in range(4)]
