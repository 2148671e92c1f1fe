"""Segments and scaled fp8 on CPU arrays, their errors, and the portable kernels in the emulator."""

from __future__ import annotations

import emulate
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy import errors, gemm, reference
from fi_cupy.arrays import view
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16, float8_e4m3fn, float16, float32
from fi_cupy.gemm import dense, few_fp8, fp8, fp8_blocks, group, quantise, segment
from fi_cupy.gemm.group import Group, group_grid, group_spec, group_tile
from fi_cupy.gemm.instances import few_spec, rows_spec, stream_spec, tiled_spec, with_residual
from fi_cupy.gemm.select import H100, FewConfig
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
T4 = DeviceInfo(75, "75", 40, 64 << 10, 64 << 10, 4 << 20)
A10 = DeviceInfo(86, "86", 72, 99 << 10, 100 << 10, 6 << 20)


def f64(x):
    return np.asarray(x).astype(np.float64)


def fp8_values(rng, shape, dtype=E4M3):
    return (rng.standard_normal(shape) * 2).astype(dtype)


def wrapper(place=lambda x: x, backend="auto"):
    return gemm.SegmentGEMMWrapper(place(np.zeros(4096, np.uint8)), backend)


def segments(rng, lengths, weights, n, k, dtype="bfloat16"):
    indptr = np.concatenate([[2], 2 + np.cumsum(lengths)])
    return normal(rng, (int(indptr[-1]) + 3, k), dtype), normal(rng, (weights, n, k), dtype), indptr


def check_segments(out, x, w, indptr, indices, poison, dtype="bfloat16"):
    inside = np.zeros(len(x), bool)
    for s in range(len(indptr) - 1):
        rows = slice(indptr[s], indptr[s + 1])
        inside[rows] = True
        assert_close(out[rows], f64(x[rows]) @ f64(w[s if indices is None else indices[s]]).T, dtype, "product")
    assert (f64(out)[~inside] == poison).all()


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column_major", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_segments(rng, column_major, dtype):
    x, w, indptr = segments(rng, [3, 0, 7, 1], 4, 24, 40, dtype)
    stored = w if column_major else np.ascontiguousarray(w.swapaxes(1, 2))
    out = np.full((len(x), 24), 7, x.dtype)
    assert wrapper().run(x, stored, 4, column_major, out, seg_indptr=indptr) is out
    check_segments(out, x, w, indptr, None, 7, dtype)
    indices = np.array([3, 3, 0, 1])
    got = wrapper().run(x, stored, 4, column_major, seg_lens=np.array([5, 0, 3, 8]), weight_indices=indices)
    want = np.concatenate([f64(x[a:b]) @ f64(w[i]).T for a, b, i in ((0, 5, 3), (5, 8, 0), (8, 16, 1))])
    assert_close(got, want, dtype, "product")


def test_group_gemm_with_bias(rng):
    x, w, indptr = segments(rng, [3, 0, 7], 3, 24, 40)
    bias = normal(rng, (3, 24))
    got = gemm.group_gemm(x[2:-3], w, indptr - 2, bias=bias, out_dtype="float32")
    want = np.concatenate([f64(x[2:5]) @ f64(w[0]).T + f64(bias[0]), f64(x[5:12]) @ f64(w[2]).T + f64(bias[2])])
    assert_close(got, want, "float32", "product")


def test_fp8_segments_come_back_as_bf16(rng):
    x, w = fp8_values(rng, (5, 32)), fp8_values(rng, (2, 8, 32))
    got = wrapper().run(x, w, 2, True, seg_lens=np.array([2, 3]))
    assert got.dtype == bfloat16.np
    assert_close(got, np.concatenate([f64(x[:2]) @ f64(w[0]).T, f64(x[2:]) @ f64(w[1]).T]), "bfloat16", "product")


@pytest.mark.parametrize("kinds", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=str)
def test_bmm_fp8(rng, kinds):
    a, b = fp8_values(rng, (2, 5, 32), kinds[0]), fp8_values(rng, (2, 24, 32), kinds[1])
    sa, sb = np.array([0.5], np.float32), np.array([[3.0]], np.float32)
    got = gemm.bmm_fp8(a, b.swapaxes(1, 2), sa, sb, "float32", backend="cublas")
    assert_close(got, 1.5 * f64(a) @ f64(b).swapaxes(1, 2), "float32", "product")


def test_mm_fp8(rng):
    a, b, bias = fp8_values(rng, (5, 32)), fp8_values(rng, (24, 32)), normal(rng, (24,), "float16")
    sa, sb = rng.random(5).astype(np.float32), rng.random(24).astype(np.float32)
    got = gemm.mm_fp8(a, b.T, out_dtype="float16", a_scale=sa[:, None], b_scale=sb, bias=bias)
    assert_close(got, f64(a) @ f64(b).T * sa[:, None] * sb + f64(bias), "float16", "product")
    got = gemm.mm_fp8(a.view(np.uint8), b.view(np.uint8).T, sa[:1])
    assert got.dtype == bfloat16.np
    assert_close(got, f64(a) @ f64(b).T * sa[0], "bfloat16", "product")


def blocked(x, scale, rows, k):
    """Element by element: x times the multiplier of its block."""
    out = f64(x)
    for i in range(x.shape[0]):
        for j in range(x.shape[1]):
            out[i, j] *= scale[i // rows, j // k]
    return out


@pytest.mark.parametrize("major", ["MN", "K", None])
@pytest.mark.parametrize("sizes", [(1, 128, 128), (128, 128, 128), (1, 1, 256)], ids=str)
def test_groupwise(rng, major, sizes):
    (m, n, k), (gm, gn, gk) = (5, 136, 272), sizes
    a, b = fp8_values(rng, (m, k)), fp8_values(rng, (n, k))
    blocks = -(-k // gk)
    sa, sb = (rng.random((-(-e // g), blocks)).astype(np.float32) for e, g in ((m, gm), (n, gn)))
    want = blocked(a, sa, gm, gk) @ blocked(b, sb, gn, gk).T
    args = (sa, sb) if major == "K" else (np.ascontiguousarray(np.pad(sa.T, ((0, 0), (0, 3)))), sb.T)
    got = gemm.gemm_fp8_nt_groupwise(a, b, *args, major, 1, sizes, out_dtype="float32", backend="cutlass")
    assert_close(got, want, "float32", "product")
    if sizes == (128, 128, 128):
        got = gemm.gemm_fp8_nt_blockscaled(a, b, *args, major, out_dtype="float32")
        assert_close(got, want, "float32", "product")


def test_group_groupwise(rng):
    a, b, indptr = fp8_values(rng, (9, 128)), fp8_values(rng, (3, 8, 128)), np.array([1, 4, 4, 8], np.int32)
    sa, sb = rng.random((9, 1)).astype(np.float32), rng.random((3, 1, 1)).astype(np.float32)
    out = np.full((9, 8), 7, bfloat16.np)
    gemm.group_gemm_fp8_nt_groupwise(a, b, sa, sb, indptr, scale_major_mode="K", out=out)
    for g, rows in ((0, slice(1, 4)), (2, slice(4, 8))):
        assert_close(out[rows], f64(a[rows]) * sa[rows] @ f64(b[g]).T * sb[g], "bfloat16", "product")
    assert (f64(out)[[0, 8]] == 7).all()


def test_blockscale_quantises_its_operands(rng):
    x, w = normal(rng, (3, 256)), normal(rng, (136, 256))
    got = gemm.fp8_blockscale_gemm_sm90(x, w, out_dtype="float32")
    assert_close(got, f64(x) @ f64(w).T, "float8_e4m3fn", "product")
    q, s = reference.quantization.quantize_fp8(w, (128, 128))
    got = gemm.fp8_blockscale_gemm_sm90(x, q, weight_scale=s.astype(np.float32), out_dtype="float32")
    assert_close(got, f64(x) @ f64(w).T, "float8_e4m3fn", "product")


def test_swiglu_and_residual(rng):
    x, w, r = normal(rng, (3, 16)), normal(rng, (48, 16)), normal(rng, (3, 48))
    both = f64(x) @ f64(w).T
    gate, up = both[:, :24], both[:, 24:]
    assert_close(gemm.mm_bf16_swiglu(x, w.T), gate / (1 + np.exp(-gate)) * up, "bfloat16", "product")
    assert_close(gemm.mm_bf16(x, w.T, residual=r), both + f64(r), "bfloat16", "product")


# --- errors ---------------------------------------------------------------------------------------------------------


def _case():
    rng = np.random.default_rng(0)
    return {
        "x": normal(rng, (6, 16), "float16"), "w": normal(rng, (2, 8, 16), "float16"), "lens": np.array([2, 4]),
        "a": fp8_values(rng, (6, 32)), "b": fp8_values(rng, (8, 32)), "one": np.ones(1, np.float32),
        "sa": np.ones((1, 6), np.float32), "sb": np.ones((1, 1), np.float32),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda c: wrapper().run(c["x"], c["w"], 2, True), errors.ArgumentError, "got neither of seg_lens and seg_ind"),
        (lambda c: wrapper(backend="cutlass"), errors.ArgumentError, "backend is 'cutlass', expected 'auto' or 'sm80'"),
        (
            lambda c: wrapper().run(c["x"], c["w"], 3, True, seg_lens=c["lens"]),
            errors.ShapeError,
            "weights has shape (2, 8, 16), expected at least 3 weights = batch_size",
        ),
        (
            lambda c: wrapper().run(c["x"], c["w"], 2, True, seg_lens=c["lens"] + 1),
            errors.ArgumentError,
            "segments are [0, 3, 8], expected ascending offsets between 0 and 6 rows",
        ),
        (
            lambda c: wrapper().run(c["x"], c["w"], 2, True, seg_lens=c["lens"], weight_indices=np.array([0, 2])),
            errors.ArgumentError,
            "weight_indices is [0, 2], expected 0 to 1",
        ),
        (
            lambda c: gemm.group_gemm(c["x"], c["w"], np.array([0, 1, 2]), weight_indices=np.array([-1, 0])),
            errors.ArgumentError,
            "group_gemm: weight_indices is [-1, 0], expected 0 to 1",
        ),
        (
            lambda c: wrapper().run(c["x"], c["w"], 2, False, seg_lens=c["lens"]),
            errors.ShapeError,
            "weights has shape (2, 8, 16), expected (2, 16, 16)",
        ),
        (lambda c: gemm.group_gemm(c["a"], c["b"][None], c["lens"]), errors.DTypeError, "a has dtype float8_e4m3fn"),
        (
            lambda c: gemm.mm_fp8(c["a"].astype(E5M2), c["b"].astype(E5M2).T, c["one"]),
            errors.DTypeError,
            "mm_fp8: both operands are float8_e5m2, expected at least one float8_e4m3fn",
        ),
        (
            lambda c: gemm.bmm_fp8(c["a"][None], c["b"].T.copy()[None], c["one"], c["one"], "float16"),
            errors.LayoutError,
            "8, 1) (elements), expected stride 1 along k: pass the transposed view",
        ),
        (lambda c: gemm.mm_fp8(c["a"], c["b"].T), errors.ArgumentError, "mm_fp8: expected either alpha or both of"),
        (
            lambda c: gemm.mm_fp8(c["a"], c["b"].T, a_scale=np.ones(5, np.float32), b_scale=c["one"]),
            errors.ShapeError,
            "mm_fp8: a_scale has shape (5,), expected 1 element or 6 = a.shape[0]",
        ),
        (
            lambda c: gemm.gemm_fp8_nt_groupwise(c["a"], c["b"], c["sa"], c["sb"], "N"),
            errors.ArgumentError,
            "scale_major_mode is 'N', expected 'MN' or 'K'",
        ),
        (
            lambda c: gemm.gemm_fp8_nt_groupwise(c["a"], c["b"], c["sa"], c["sb"], "K"),
            errors.ShapeError,
            "a_scale has shape (1, 6), expected (6, 1) for scale_major_mode 'K'",
        ),
        (
            lambda c: gemm.gemm_fp8_nt_groupwise(
                c["a"], c["b"], c["sa"], c["sb"], scale_granularity_mnk=(1, 128, 64)
            ),
            errors.ArgumentError,
            "scale_granularity_mnk is (1, 128, 64), expected three positive sizes, the last a multiple of 128",
        ),
        (
            lambda c: gemm.gemm_fp8_nt_groupwise(c["a"], c["b"], f64(c["sa"]), c["sb"]),
            errors.DTypeError,
            "gemm_fp8_nt_groupwise: a_scale has dtype float64, expected float32",
        ),
        (
            lambda c: gemm.fp8_blockscale_gemm_sm90(c["x"].repeat(8, 1), c["x"].repeat(8, 1), c["sa"]),
            errors.ArgumentError,
            "input_scale is given for a float16 input, expected None: it is quantised here",
        ),
        (
            lambda c: gemm.mm_bf16_swiglu(c["x"], c["w"][0].T),
            errors.ShapeError,
            "mm_bf16_swiglu: b has shape (16, 8), expected a last dimension that is a multiple of 16",
        ),
        (
            lambda c: gemm.mm_bf16(c["x"], c["w"][0].T, residual=c["x"]),
            errors.ShapeError,
            "mm_bf16: residual has shape (6, 16), expected (6, 8)",
        ),
    ],
)  # fmt: skip
def test_errors_name_operator_argument_got_and_wanted(call, error, text):
    with pytest.raises(error) as caught:
        call(_case())
    assert text in str(caught.value)


# --- plans ----------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=60), n=st.integers(1, 400).map(lambda i: 8 * i),
    device=st.sampled_from([H100, A10, T4]), kind=st.sampled_from([bfloat16, float16, float8_e4m3fn]),
    gated=st.booleans(),
)  # fmt: skip
def test_the_grid_holds_every_tile_of_every_segment(lengths, n, device, kind, gated):
    scale = "none" if kind.itemsize == 2 else "blocks"
    made = Group(kind, kind, bfloat16, scale, segments=True, gated=gated)
    m = sum(lengths)
    spec = group_spec(made, *group_tile(made, -(-m // len(lengths)), n, len(lengths), device))
    assert spec.supports(device.arch) and spec.smem_bytes <= device.smem_per_block
    config = dict(spec.config)
    columns = config["kBlockN"] // (2 if gated else 1)
    tiles = sum(-(-length // config["kBlockM"]) for length in lengths) * -(-n // columns)
    assert tiles <= group_grid(spec, m, n, len(lengths), True)[0]


# --- the kernels in the emulator ------------------------------------------------------------------------------------

needs_emulator = pytest.mark.skipif(not emulate.available(), reason="g++ on x86-64 is needed")


@pytest.fixture
def place():
    with emulate.emulated(emulate.AMPERE, dense, few_fp8, fp8, fp8_blocks, group, quantise, segment):
        yield emulate.device


@needs_emulator
@pytest.mark.parametrize("column_major", [True, False])
@pytest.mark.parametrize("lengths", [[3, 0, 65, 1], [0, 1] * 20], ids=len)
def test_segment_kernel(rng, place, column_major, lengths):
    x, w, indptr = segments(rng, lengths, 5, 72, 136)
    indices = rng.integers(0, 5, len(lengths)).astype(np.int32)
    stored = w if column_major else w.swapaxes(1, 2)
    out = place(np.full((len(x), 72), 7, x.dtype))
    wrapper(place).run(
        place(x),
        place(stored),
        len(lengths),
        column_major,
        out,
        seg_indptr=place(indptr),
        weight_indices=place(indices),
    )
    check_segments(np.asarray(out), x, w, indptr, indices, 7)


@needs_emulator
def test_length_kernel(rng, place):
    lengths = rng.integers(0, 9, 700).astype(np.int32)
    offsets = wrapper(lambda x: place(np.zeros(8000, np.uint8)))._offsets("op", view(place(lengths)))
    got = np.frombuffer(np.asarray(offsets.array).tobytes()[: 8 * 701], np.int64)
    assert got.tolist() == [0, *np.cumsum(lengths).tolist()]


@needs_emulator
def test_scaled_kernels(rng, place):
    a, b = fp8_values(rng, (2, 70, 160)), fp8_values(rng, (2, 136, 160), E5M2)
    one = [place(np.array([x], np.float32)) for x in (0.5, 3.0)]
    got = gemm.bmm_fp8(place(a), place(b).swapaxes(1, 2), *one, "bfloat16")
    assert_close(got, 1.5 * f64(a) @ f64(b).swapaxes(1, 2), "bfloat16", "product")
    sa, sb = rng.random(70).astype(np.float32), rng.random(136).astype(np.float32)
    bias = normal(rng, (136,), "float32")
    got = gemm.mm_fp8(
        place(a[0]), place(b[0]).T, out_dtype="float32", a_scale=place(sa), b_scale=place(sb), bias=place(bias)
    )
    assert_close(got, f64(a[0]) @ f64(b[0]).T * sa[:, None] * sb + bias, "float32", "product")


@needs_emulator
@pytest.mark.parametrize("sizes", [(1, 128, 128), (128, 128, 256), (1, 1, 128)], ids=str)
def test_block_kernel(rng, place, sizes):
    (m, n, k), (gm, gn, gk) = (75, 136, 400), sizes
    a, b = fp8_values(rng, (m, k)), fp8_values(rng, (n, k))
    blocks = -(-k // gk)
    sa, sb = (rng.random((-(-e // g), blocks)).astype(np.float32) for e, g in ((m, gm), (n, gn)))
    want = reference.gemm.gemm_fp8_nt_groupwise(a, b, f64(sa), f64(sb), "K", sizes, np.float64)
    got = gemm.gemm_fp8_nt_groupwise(*map(place, (a, b, sa.T, sb.T)), scale_granularity_mnk=sizes, out_dtype="float32")
    assert_close(got, want, "float32", "product")


FEW_FP8 = [FewConfig(1, 1, 2, 3, False, True), FewConfig(1, 1, 2, 2, True, False), FewConfig(2, 1, 1, 4, False, True)]


@needs_emulator
@pytest.mark.parametrize("config", FEW_FP8, ids=str)
def test_few_rows_of_fp8(rng, place, config):
    """Rows and columns past the end, a k that is no multiple of a step, factors of both kinds in either order."""
    m, n, k = 8 * config.a_tiles - 3, 136, 656
    a, b = fp8_values(rng, (m, k)), fp8_values(rng, (n, k), E5M2)
    sa, sb = (rng.random(x).astype(np.float32) + 0.1 for x in (m, n))
    bias, out = normal(rng, (n,), "float32"), place(np.full((m + 1, n), 7, np.float32))
    x, w, *rest = (view(place(v)) for v in (a, b, sa, sb, bias))
    few_fp8.launch_few_fp8(view(out[:m]), x, w, *rest[:2], bias=rest[2], config=config)
    assert_close(out[:m], f64(a) @ f64(b).T * sa[:, None] * sb + bias, "float32", "product")
    assert (out[m] == 7).all()
    b, k = b.astype(np.float32).astype(E4M3), 640
    sa, sb = rng.random((m, 5)).astype(np.float32), rng.random((2, 5)).astype(np.float32)
    want = reference.gemm.gemm_fp8_nt_groupwise(a[:, :k], b[:, :k], f64(sa), f64(sb), "K", (1, 128, 128), np.float64)
    x, w = view(place(a[:, :k])), view(place(b[:, :k]))
    for mode in ("K", "MN"):
        given = (view(place(v if mode == "K" else v.T)) for v in (sa, sb))
        few_fp8.launch_few_fp8_blocks(view(out[:m]), x, w, *given, scale_major_mode=mode, config=config)
        assert_close(out[:m], want, "float32", "product")
        out[:m] = np.nan


@needs_emulator
def test_quantising_kernel(rng, place):
    x = normal(rng, (5, 384))
    x[2] = 0
    q, s = quantise.quantise_rows(view(place(x)))
    want, scales = reference.quantization.per_token_group_quant_8bit(x, 128)
    assert (np.asarray(q.array).view(np.uint8) == want.view(np.uint8)).all()
    np.testing.assert_array_equal(np.asarray(s.array), scales.astype(np.float32))


@needs_emulator
def test_expanding_kernel(rng, place):
    scale = rng.random((3, 5)).astype(np.float32)
    got = quantise.expand_scales(view(place(np.zeros((300, 16), np.uint8))), view(place(scale)), 128)
    np.testing.assert_array_equal(np.asarray(got.array), np.repeat(scale, 128, axis=0)[:300].T)


def _up(a, b):
    return -(-a // b)


FEW = [
    (few_spec(bfloat16, bfloat16, 1, 1, 2, 4), 16), (few_spec(bfloat16, bfloat16, 1, 2, 2, 3, ahead=True), 32),
    (few_spec(bfloat16, bfloat16, 2, 1, 2, 4, wide=True), 16), (few_spec(float16, float32, 2, 2, 1, 2), 32),
    (few_spec(bfloat16, bfloat16, 1, 1, 2, 4, gated=True), 8),
    (few_spec(bfloat16, bfloat16, 1, 2, 2, 2, wide=True, ahead=True, gated=True), 16),
    (rows_spec(bfloat16, bfloat16, 2, 8, 1, 3, 3, 1, True), 4), (rows_spec(bfloat16, bfloat16, 1, 32, 2, 2, 2, 2), 4),
    (stream_spec(bfloat16, bfloat16, 1, 1, True, 2, 4), 8),
    (few_spec(bfloat16, bfloat16, 1, 1, 2, 6, ahead=True, once=True), 16),
    (few_spec(bfloat16, bfloat16, 2, 1, 2, 6, wide=True, ahead=True, gated=True, once=True), 8),
    (rows_spec(bfloat16, bfloat16, 1, 16, 1, 2, 3, 2, True, True), 4),
    (stream_spec(bfloat16, bfloat16, 1, 2, False, 1, 11, ahead=True, once=True), 16),
    (stream_spec(float16, float32, 2, 1, False, 3, 2, ahead=True), 8),
    (with_residual(stream_spec(bfloat16, bfloat16, 1, 4, False, 1, 11, ahead=True, once=True)), 32),
    (with_residual(stream_spec(bfloat16, float32, 2, 4, False, 1, 4)), 32),
    (tiled_spec(bfloat16, bfloat16, 64, 64, 32, 2, 8, False), 0),
]  # fmt: skip


@needs_emulator
@pytest.mark.parametrize(("spec", "columns"), FEW, ids=lambda s: getattr(s, "symbol", ""))
@pytest.mark.parametrize("shape", [(24, 72), (40, 648)], ids=str)
def test_dense_kernels_with_bias_and_residual(rng, spec, columns, shape):
    """Ragged n and k, fewer rows than the kernel has, and nothing written beside the result."""
    config: dict = dict(spec.config)
    (n, k), gated = shape, config.get("kGated", False)
    m = config.get("kM") or (8 * config["kATiles"] - 3 if "kATiles" in config else 13)
    dtype, out_dtype = config["T"], config["Out"]
    x, w = normal(rng, (m, k), dtype), normal(rng, (2 * n if gated else n, k), dtype)
    bias, residual = normal(rng, (len(w),), dtype), normal(rng, (m, n), out_dtype)
    out = np.full((m + 1, n + 8), 7, out_dtype.np)
    grid = _up(n, columns) if columns else _up(n, 64) * _up(m, 64)
    emulate.EmulatedKernel(spec).launch(
        grid, 0, x.ctypes.data, w.ctypes.data, bias.ctypes.data, out.ctypes.data, k, k, n + 8, 0, 0, 0, m, n, k,
        residual.ctypes.data, n, 0,
    )  # fmt: skip
    want = f64(x) @ f64(w).T + f64(bias)
    if gated:
        want = want[:, :n] / (1 + np.exp(-want[:, :n])) * want[:, n:]
    assert_close(out[:m, :n], want + f64(residual), out_dtype, "product")
    assert (f64(out[m]) == 7).all() and (f64(out[:, n:]) == 7).all()


def test_fp8_to_halves_is_exact():
    """The bit arithmetic of kernels/ptx/mma_fp8.cuh for every byte."""
    code = np.arange(256, dtype=np.uint32) << 8  # the byte in the upper half of a 16-bit word
    half = (code & 0x8000) | ((code & 0x7F00) >> 1)
    nan = ((code & 0x7F00) + 0x0100) & 0x8000
    scaled = half.astype(np.uint16).view(np.float16) * np.float16(256)
    got = (scaled.view(np.uint16) | (nan - (nan >> 15)).astype(np.uint16)).view(np.float16)
    want = np.arange(256, dtype=np.uint8).view(E4M3).astype(np.float16)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(
        code.astype(np.uint16).view(np.float16), np.arange(256, dtype=np.uint8).view(E5M2).astype(np.float16)
    )
