"""Segments, groups and scaled fp8 against the float64 product of the operands as they are stored."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import errors, gemm, reference
from fi_cupy.arrays import view
from fi_cupy.device import device_info
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.dtypes import float8_e4m3fn
from fi_cupy.gemm.few_fp8 import launch_few_fp8, launch_few_fp8_blocks
from fi_cupy.gemm.select import FewConfig
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
E4M3, E5M2 = to_dtype("float8_e4m3fn").np, to_dtype("float8_e5m2").np


def f64(x):
    return np.asarray(x).astype(np.float64)


def segment_case(rng, lengths, weights, n, k, dtype="bfloat16", first=0, tail=3):
    indptr = first + np.concatenate([[0], np.cumsum(lengths)])
    x, w = normal(rng, (int(indptr[-1]) + tail, k), dtype), normal(rng, (weights, n, k), dtype)
    return x, w, indptr


def segment_product(x, w, indptr, indices, n):
    want = np.full((x.shape[0], n), np.nan)
    for s in range(len(indptr) - 1):
        rows = slice(indptr[s], indptr[s + 1])
        want[rows] = f64(x[rows]) @ f64(w[s if indices is None else indices[s]]).T
    return want


def check_rows(out, want, dtype, what=""):
    """Rows inside segments hold the product; all others still hold the poison."""
    got, inside = to_float64(out), ~np.isnan(want[:, 0])
    assert_close(got[inside], want[inside], dtype, "product", what)
    assert np.isnan(got[~inside]).all(), f"{what}: rows outside the segments were written"


LENGTHS = [[5], [0, 1, 0, 0, 64, 65, 3], [128, 129, 127], [1] * 70, [0] * 40 + [33, 0, 7], [700, 0, 5, 300]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda x: f"{len(x)}x{sum(x)}")
@pytest.mark.parametrize("column_major", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_segments(rng, lengths, column_major, dtype):
    n, k = 136, 200
    x, w, indptr = segment_case(rng, lengths, len(lengths), n, k, dtype, first=2)
    want = segment_product(x, w, indptr, None, n)
    stored = w if column_major else np.ascontiguousarray(w.swapaxes(1, 2))
    wrapper = gemm.SegmentGEMMWrapper(cupy.empty(4096, np.uint8))
    out = poisoned((x.shape[0], n), dtype)
    got = wrapper.run(on_gpu(x), on_gpu(stored), len(lengths), column_major, out, seg_indptr=on_gpu(indptr))
    assert got is out
    check_rows(out, want, dtype)


@pytest.mark.parametrize("backend", ["auto", "sm80"])
def test_segment_lengths_and_weight_indices(rng, backend):
    lengths, indices = np.array([3, 0, 70, 9, 1]), np.array([2, 0, 1, 2, 2])
    x, w, indptr = segment_case(rng, lengths, 3, 72, 136)
    wrapper = gemm.SegmentGEMMWrapper(cupy.empty(4096, np.uint8), backend)
    for index in (np.int32, np.int64):
        out = poisoned((x.shape[0], 72), "bfloat16")
        wrapper.run(
            on_gpu(x), on_gpu(w), 5, True, out, seg_lens=on_gpu(lengths.astype(index)),
            weight_indices=on_gpu(indices.astype(index)),
        )  # fmt: skip
        check_rows(out, segment_product(x, w, indptr, indices, 72), "bfloat16")
    with pytest.raises(errors.WorkspaceError, match="workspace has 8 bytes, expected 32"):
        small = gemm.SegmentGEMMWrapper(cupy.empty(8, np.uint8))
        small.run(on_gpu(x), on_gpu(w), 3, True, seg_lens=on_gpu(lengths[:3]))


def test_random_segments(rng):
    for _ in range(25):
        groups, n, k = int(rng.integers(1, 80)), 8 * int(rng.integers(1, 50)), 8 * int(rng.integers(1, 60))
        lengths = rng.integers(0, int(rng.integers(1, 150)), groups) * (rng.random(groups) < 0.7)
        x, w, indptr = segment_case(rng, lengths, groups, n, k, tail=int(rng.integers(0, 9)))
        bias = normal(rng, (groups, n))
        want = segment_product(x, w, indptr, None, n)
        for s in range(groups):
            want[indptr[s] : indptr[s + 1]] += f64(bias[s])
        out = poisoned((x.shape[0], n), "float32")
        gemm.group_gemm(on_gpu(x), on_gpu(w), on_gpu(indptr.astype(np.int32)), bias=on_gpu(bias), out=out)
        check_rows(out, want, "float32", f"{groups} groups, n {n}, k {k}")


def test_no_rows_and_no_segments(rng):
    w = on_gpu(normal(rng, (2, 16, 8)))
    wrapper = gemm.SegmentGEMMWrapper(cupy.empty(64, np.uint8))
    assert wrapper.run(on_gpu(normal(rng, (0, 8))), w, 2, True, seg_lens=cupy.zeros(2, np.int64)).shape == (0, 16)
    out = poisoned((3, 16), "bfloat16")
    gemm.group_gemm(on_gpu(normal(rng, (3, 8))), w, cupy.zeros(3, np.int32), out=out)
    assert np.isnan(to_float64(out)).all()


def test_offsets_beyond_the_rows_write_nothing_outside(rng):
    """What indptr says on the device is not trusted: rows past the end and descending offsets are left out."""
    x, w = normal(rng, (20, 64)), normal(rng, (3, 64, 64))
    padded = poisoned((30, 64), "bfloat16")
    gemm.group_gemm(on_gpu(x), on_gpu(w), cupy.array([0, 15, 10, 500], np.int32), out=padded[:20])
    assert np.isnan(to_float64(padded)[20:]).all()


def test_graph_capture_and_changed_segments(rng):
    x, w, _ = segment_case(rng, [4, 60, 0, 9], 4, 64, 128, tail=0)
    gx, gw, lens, out = on_gpu(x), on_gpu(w), on_gpu(np.array([4, 60, 0, 9])), poisoned((73, 64), "bfloat16")
    wrapper = gemm.SegmentGEMMWrapper(cupy.empty(4096, np.uint8))
    wrapper.run(gx, gw, 4, True, out, seg_lens=lens)
    stream = new_stream()
    with stream:
        stream.begin_capture()
        wrapper.run(gx, gw, 4, True, out, seg_lens=lens)
        graph = stream.end_capture()
        lens[...] = cupy.array([30, 1, 42, 0])
        graph.launch()
        stream.synchronize()
    check_rows(out, segment_product(x, w, [0, 30, 31, 73, 73], None, 64), "bfloat16")


# --- fp8 ------------------------------------------------------------------------------------------------------------


def fp8(rng, shape, dtype=E4M3):
    return (rng.standard_normal(shape) * 2).astype(dtype)


def typed(x):
    """An fp8 array on the GPU that carries its type: a torch tensor for e5m2, CuPy's bytes for e4m3."""
    if x.dtype == E4M3:
        return on_gpu(x)
    torch = pytest.importorskip("torch")
    return torch.from_numpy(x.view(np.uint8)).cuda().view(torch.float8_e5m2)


@pytest.mark.parametrize("kinds", [(E4M3, E4M3), (E5M2, E4M3), (E4M3, E5M2)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 8, 16), (3, 70, 136, 208), (2, 130, 264, 1040)])
def test_bmm_fp8(rng, kinds, shape):
    batch, m, n, k = shape
    a, b = fp8(rng, (batch, m, k), kinds[0]), fp8(rng, (batch, n, k), kinds[1])
    sa, sb = np.array([0.37], np.float32), np.array([1.9], np.float32)
    want = f64(a) @ f64(b).swapaxes(1, 2) * float(sa[0]) * float(sb[0])
    torch = pytest.importorskip("torch") if E5M2 in kinds else None
    x, w = (typed(a), typed(b)) if torch is None else (
        torch.from_numpy(v.view(np.uint8)).cuda().view(torch.float8_e5m2 if v.dtype == E5M2 else torch.float8_e4m3fn)
        for v in (a, b)
    )  # fmt: skip
    scales = (on_gpu(sa), on_gpu(sb)) if torch is None else (torch.from_numpy(s).cuda() for s in (sa, sb))
    got = gemm.bmm_fp8(x, w.swapaxes(1, 2) if torch is None else w.transpose(1, 2), *scales, "bfloat16")
    assert_close(to_float64(got), want, "bfloat16", "product")


@pytest.mark.parametrize("shape", [(1, 8, 16), (5, 136, 528), (77, 72, 400), (300, 520, 1040)])
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_mm_fp8_scales(rng, shape, out_dtype):
    m, n, k = shape
    a, b = fp8(rng, (m, k)), fp8(rng, (n, k))
    sa, sb = (rng.random(x).astype(np.float32) + 0.1 for x in (m, n))
    bias = normal(rng, (n,), out_dtype)
    out = poisoned((m, n), out_dtype)
    tolerance = "bfloat16" if out_dtype == "bfloat16" else "float16"
    gemm.mm_fp8(
        on_gpu(a), on_gpu(b).T, out=out, a_scale=on_gpu(sa[:, None]), b_scale=on_gpu(sb[None]), bias=on_gpu(bias)
    )
    assert_close(to_float64(out), f64(a) @ f64(b).T * sa[:, None] * sb + f64(bias), tolerance, "product")
    out = poisoned((m, n), out_dtype)
    gemm.mm_fp8(on_gpu(a), on_gpu(b).T, on_gpu(sa[:1]), out=out)
    assert_close(to_float64(out), f64(a) @ f64(b).T * sa[0], tolerance, "product")


@pytest.mark.parametrize("major", ["MN", "K"])
@pytest.mark.parametrize("sizes", [(1, 128, 128), (128, 128, 128), (1, 1, 128), (1, 128, 256)], ids=str)
@pytest.mark.parametrize("shape", [(1, 128, 128), (77, 264, 640), (200, 136, 1024)])
def test_groupwise(rng, major, sizes, shape):
    (m, n, k), (gm, gn, gk) = shape, sizes
    a, b = fp8(rng, (m, k)), fp8(rng, (n, k))
    rows, columns, blocks = -(-m // gm), -(-n // gn), -(-k // gk)
    sa, sb = rng.random((rows, blocks)).astype(np.float32), rng.random((columns, blocks)).astype(np.float32)
    want = reference.gemm.gemm_fp8_nt_groupwise(a, b, f64(sa), f64(sb), "K", sizes, np.float64)
    if major == "MN":  # padded to a multiple of four rows, as FlashInfer does
        padded = np.full((blocks, -(-rows // 4) * 4), np.nan, np.float32)
        padded[:, :rows] = sa.T
        sa, sb = padded, np.ascontiguousarray(sb.T)
    out = poisoned((m, n), "bfloat16")
    gemm.gemm_fp8_nt_groupwise(on_gpu(a), on_gpu(b), on_gpu(sa), on_gpu(sb), major, 1, sizes, out)
    assert_close(to_float64(out), want, "bfloat16", "product")
    if sizes == (128, 128, 128):
        again = gemm.gemm_fp8_nt_blockscaled(on_gpu(a), on_gpu(b), on_gpu(sa), on_gpu(sb), major)
        assert (again.view("uint8") == out.view("uint8")).all()


@pytest.mark.parametrize("major", ["MN", "K"])
@pytest.mark.parametrize("lengths", [[4], [0, 9, 64, 0, 130], [1] * 40], ids=lambda x: f"{len(x)}x{sum(x)}")
def test_group_groupwise(rng, major, lengths):
    n, k, groups = 264, 384, len(lengths)
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    m = int(indptr[-1]) + 2
    a, b = fp8(rng, (m, k)), fp8(rng, (groups, n, k))
    sa, sb = rng.random((m, 3)).astype(np.float32), rng.random((groups, 3, 3)).astype(np.float32)
    nothing = np.full((m, n), np.nan)
    want = reference.gemm.gemm_fp8_nt_groupwise(
        a, b, f64(sa), f64(sb), "K", out_dtype=np.float64, m_indptr=indptr, outside=nothing
    )
    if major == "MN":
        sa, sb = np.ascontiguousarray(sa.T), np.ascontiguousarray(sb.swapaxes(1, 2))
    out = poisoned((m, n), "bfloat16")
    gemm.group_gemm_fp8_nt_groupwise(
        on_gpu(a), on_gpu(b), on_gpu(sa), on_gpu(sb), on_gpu(indptr), scale_major_mode=major, out=out
    )
    check_rows(out, want, "bfloat16")


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("k", [256, 400])
def test_rows_with_their_groups_number(rng, aligned, k):
    """Groups in any order, some without rows, padding between; k = 400 goes to the portable kernel."""
    groups, n, blocks = 12, 264, -(-k // 128)
    order, lengths = rng.permutation(groups), rng.integers(0, 200, groups)
    padding = [int(-c % 128 if aligned else c % 3) for c in lengths]
    numbers = np.repeat(
        np.stack([order, np.full(groups, -1)], 1).ravel(), np.stack([lengths, padding], 1).ravel()
    ).astype(np.int32)
    m = len(numbers)
    a, b = fp8(rng, (m, k)), fp8(rng, (groups, n, k))
    sa, sb = rng.random((m, blocks)).astype(np.float32), rng.random((groups, 3, blocks)).astype(np.float32)
    want = reference.gemm.grouped_rows(a, b, f64(sa), f64(sb), numbers, (1, 128, 128), np.full((m, n), np.nan))
    for scales in (on_gpu(sa), on_gpu(np.ascontiguousarray(sa.T)).T):
        out = poisoned((m, n), "bfloat16")
        gemm.group_deepgemm_fp8_nt_groupwise(on_gpu(a), on_gpu(b), scales, on_gpu(sb), on_gpu(numbers), out=out)
        got, inside = to_float64(out), numbers >= 0
        assert_close(got[inside], want[inside], "bfloat16", "product")
        assert np.isnan(got[~inside]).all(), "rows of no group were written"


@pytest.mark.parametrize("expected", [1, 100])
def test_groups_padded_to_one_length(rng, expected):
    groups, m, n, k = 9, 150, 264, 384
    counts = np.array([0, 150, 1, 64, 65, 149, 400, -3, 128], np.int32)
    a, b = fp8(rng, (groups, m, k)), fp8(rng, (groups, n, k))
    sa, sb = rng.random((groups, m, 3)).astype(np.float32), rng.random((groups, 3, 3)).astype(np.float32)
    numbers = reference.gemm.masked_numbers(counts, m)
    flat = (a.reshape(-1, k), b, f64(sa).reshape(-1, 3), f64(sb), numbers, (1, 128, 128))
    want = reference.gemm.grouped_rows(*flat, np.full((groups * m, n), np.nan))
    out = poisoned((groups, m, n), "bfloat16")
    gemm.batch_deepgemm_fp8_nt_groupwise(*map(on_gpu, (a, b, sa, sb, counts)), expected, out=out)
    check_rows(out.reshape(-1, n), want, "bfloat16")


@pytest.mark.parametrize("m", [1, 7, 8, 9, 16])
@pytest.mark.parametrize("config", [None, FewConfig(2, 1, 2, 8, True, False), FewConfig(1, 1, 3, 4, False, False)])
def test_few_rows_of_fp8(rng, m, config):
    """Factors of both kinds; a longer product than a few tiles; several tiles of rows where one has eight."""
    if device_info(0).code_number < 89:
        pytest.skip("needs the conversions of sm_89")
    for n, k in ((8, 128), (264, 1152), (1032, 4096), (136, 14336)):
        a, b = fp8(rng, (m, k)), fp8(rng, (n, k))
        x, w = (view(on_gpu(v)).typed(float8_e4m3fn) for v in (a, b))
        sa, sb = (rng.random(s).astype(np.float32) + 0.1 for s in (m, n))
        bias, out = normal(rng, (n,)), poisoned((m, n), "bfloat16")
        launch_few_fp8(view(out), x, w, *(view(on_gpu(v)) for v in (sa, sb)), bias=view(on_gpu(bias)), config=config)
        assert_close(to_float64(out), f64(a) @ f64(b).T * sa[:, None] * sb + f64(bias), "bfloat16", "product")
        sa, sb = (rng.random((s, k // 128)).astype(np.float32) for s in (m, -(-n // 128)))
        want = reference.gemm.gemm_fp8_nt_groupwise(a, b, f64(sa), f64(sb), "K", (1, 128, 128), np.float64)
        out = poisoned((m, n), "bfloat16")
        given = (view(on_gpu(np.ascontiguousarray(v.T))) for v in (sa, sb))
        launch_few_fp8_blocks(view(out), x, w, *given, pdl=True, config=config)
        assert_close(to_float64(out), want, "bfloat16", "product")


@pytest.mark.parametrize("m", [1, 50, 140])
def test_blockscale_quantises_its_operands(rng, m):
    x, w = normal(rng, (m, 512)), normal(rng, (264, 512))
    q, sq = reference.quantization.per_token_group_quant_8bit(x, 128)
    p, sp = reference.quantization.per_token_group_quant_8bit(w, 128)
    want = reference.gemm.gemm_fp8_nt_groupwise(q, p, f64(sq), f64(sp), "K", (1, 1, 128), np.float64)
    got = gemm.fp8_blockscale_gemm_sm90(on_gpu(x), on_gpu(w))
    assert_close(to_float64(got), want, "bfloat16", "product")
    p, sp = reference.quantization.quantize_fp8(w, (128, 128))
    want = reference.gemm.gemm_fp8_nt_groupwise(q, p, f64(sq), f64(sp), "K", (1, 128, 128), np.float64)
    got = gemm.fp8_blockscale_gemm_sm90(on_gpu(x), on_gpu(p), weight_scale=on_gpu(sp))
    assert_close(to_float64(got), want, "bfloat16", "product")
    got = gemm.fp8_blockscale_gemm_sm90(on_gpu(q), on_gpu(p), on_gpu(sq), on_gpu(sp), out_dtype="float32")
    assert_close(to_float64(got), want, "bfloat16", "product")


def test_fp8_nan_and_every_byte(rng):
    """Every e4m3 and e5m2 value times one; NaN stays in its row."""
    one = np.zeros((8, 256), E4M3)
    one[np.arange(8), np.arange(8)] = 1
    for kind in (E4M3, E5M2):
        a = np.arange(256, dtype=np.uint8).reshape(32, 8)
        a = np.concatenate([a, np.zeros((32, 248), np.uint8)], 1).view(kind)
        torch = pytest.importorskip("torch")
        name = torch.float8_e4m3fn if kind == E4M3 else torch.float8_e5m2
        x = torch.from_numpy(a.view(np.uint8)).cuda().view(name)
        w = torch.from_numpy(one.view(np.uint8)).cuda().view(torch.float8_e4m3fn)
        got = to_float64(gemm.mm_fp8(x, w.T, torch.ones(1, device="cuda"), "float32"))
        bad = ~np.isfinite(f64(a)).all(1)
        np.testing.assert_array_equal(got[~bad], f64(a)[~bad][:, :8])
        assert not np.isfinite(got[bad]).all(1).any()


# --- fused epilogues ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 2, 7, 16, 17, 100, 300])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_swiglu(rng, m, dtype):
    for n, k in ((8, 8), (136, 328), (576, 576)):
        x, w, bias = normal(rng, (m, k), dtype), normal(rng, (2 * n, k), dtype, 0.2), normal(rng, (2 * n,), dtype)
        out = poisoned((m, n), dtype)
        gemm.mm_bf16_swiglu(on_gpu(x), on_gpu(w).T, out=out)
        assert_close(to_float64(out), reference.gemm.mm_swiglu(f64(x), f64(w).T), dtype, "product")
        got = gemm.mm_bf16_swiglu(on_gpu(x), on_gpu(w).T, bias=on_gpu(bias))
        assert_close(to_float64(got), reference.gemm.mm_swiglu(f64(x), f64(w).T, f64(bias)), dtype, "product")


@pytest.mark.parametrize("m", [1, 2, 7, 16, 33, 100, 300])
def test_residual(rng, m):
    n, k = 264, 328
    x, w, bias, r = normal(rng, (m, k)), normal(rng, (n, k)), normal(rng, (n,)), normal(rng, (m, n), scale=20.0)
    want = f64(x) @ f64(w).T + f64(bias) + f64(r)
    got = gemm.mm_bf16(on_gpu(x), on_gpu(w).T, on_gpu(bias), residual=on_gpu(r))
    assert_close(to_float64(got), want, "bfloat16", "product")
    out = on_gpu(r)  # in place
    gemm.mm_bf16(on_gpu(x), on_gpu(w).T, out=out, residual=out)
    assert_close(to_float64(out), want - f64(bias), "bfloat16", "product")


@pytest.mark.older_archs
def test_one_of_each_by_older_code(rng):
    """Few kernels, because the driver translates each of them from PTX."""
    x, w, indptr = segment_case(rng, [3, 0, 70, 9], 4, 72, 136)
    out = poisoned((len(x), 72), "bfloat16")
    wrapper = gemm.SegmentGEMMWrapper(cupy.empty(4096, np.uint8), "sm80")
    wrapper.run(on_gpu(x), on_gpu(w), 4, True, out, seg_indptr=on_gpu(indptr))
    check_rows(out, segment_product(x, w, indptr, None, 72), "bfloat16")
    a, b = fp8(rng, (77, 400)), fp8(rng, (72, 400))
    sa, sb = rng.random((77, 4)).astype(np.float32), rng.random((1, 4)).astype(np.float32)
    got = gemm.mm_fp8(on_gpu(a), on_gpu(b).T, on_gpu(sa[0, :1]))
    assert_close(to_float64(got), f64(a) @ f64(b).T * sa[0, 0], "bfloat16", "product")
    got = gemm.gemm_fp8_nt_groupwise(on_gpu(a), on_gpu(b), on_gpu(sa), on_gpu(sb), "K")
    want = reference.gemm.gemm_fp8_nt_groupwise(a, b, f64(sa), f64(sb), "K", out_dtype=np.float64)
    assert_close(to_float64(got), want, "bfloat16", "product")
    for dtype, m in (("float16", 5), ("bfloat16", 70)):
        x, w, r = normal(rng, (m, 136), dtype), normal(rng, (48, 136), dtype, 0.2), normal(rng, (m, 48), dtype)
        got = gemm.mm_bf16_swiglu(on_gpu(x), on_gpu(w).T)
        assert_close(to_float64(got), reference.gemm.mm_swiglu(f64(x), f64(w).T), dtype, "product")
        got = gemm.mm_bf16(on_gpu(x), on_gpu(w).T, residual=on_gpu(r))
        assert_close(to_float64(got), f64(x) @ f64(w).T + f64(r), dtype, "product")
