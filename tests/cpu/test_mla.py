"""The latent attention wrappers on the CPU: values against a formula of their own, errors, who gets which kernel."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from fi_cupy import decode, errors, mla, mla_kernel
from fi_cupy.attention import explain
from fi_cupy.dtypes import bfloat16, float8_e4m3fn
from fi_cupy.jit import define_variant
from fi_cupy.mla_kernel import (
    FEW_FP8,
    HOPPER_TILES,
    HOPPER_WIDE,
    Call,
    Problem,
    choose_tiles,
    geometry,
    hopper_maps,
    smem_bytes,
)
from fi_cupy.profiles import TYPICAL

SCALE, HEADS, PAGE = 192**-0.5, 3, 4
QO, INDPTR, INDICES, KV_LEN = (
    [0, 2, 3, 4],
    [0, 2, 2, 4],
    [4, 0, 2, 5],
    [6, 0, 3],
)  # the last request has a page too many
PLAN = (QO, INDPTR, INDICES, KV_LEN, HEADS, 8, 4, PAGE, True, SCALE, "float32", "float32")


@pytest.fixture
def arrays(rng):
    q_nope, q_pe = (rng.normal(size=(4, HEADS, d)).astype(np.float32) for d in (8, 4))
    cache = rng.normal(size=(6, PAGE, 12)).astype(np.float32)
    cache[5], cache[0, 2:], cache[2, 3:] = np.nan, np.nan, np.nan  # behind the last tokens
    return q_nope, q_pe, cache[..., :8], cache[..., 8:]


def wrapper(**more):
    return mla.BatchMLAPagedAttentionWrapper(np.empty(16, np.uint8), **more)


def naive(q_nope, q_pe, ckv, kpe, causal=True, bias=None):
    """Row by row in float64: (out, lse in base e)."""
    out, lse = np.zeros((*q_nope.shape[:2], ckv.shape[-1])), np.full(q_nope.shape[:2], -np.inf)
    for b, n in enumerate(KV_LEN):
        rows = np.arange(QO[b], QO[b + 1])
        keys = [(INDICES[INDPTR[b] + t // PAGE], t % PAGE) for t in range(n)]
        for i, r in enumerate(rows):
            for h in range(q_nope.shape[1]):
                seen = [t for t in range(n) if not causal or t + len(rows) <= n + i]
                if not seen:
                    continue
                c = np.array([ckv[keys[t]] for t in seen], np.float64)
                p = np.array([kpe[keys[t]] for t in seen], np.float64)
                s = SCALE * (c @ q_nope[r, h].astype(np.float64) + p @ q_pe[r, h].astype(np.float64))
                if bias is not None:
                    s = s + np.array([bias(h, t) for t in seen])
                lse[r, h] = np.log(np.exp(s).sum())
                out[r, h] = np.exp(s - lse[r, h]) @ c
    return out, lse


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_both_bases_of_the_lse(arrays, causal):
    w = wrapper()
    w.plan(*PLAN[:8], causal, *PLAN[9:])
    want, log = naive(*arrays, causal)
    out, lse = w.run(*arrays, return_lse=True)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(lse, log / math.log(2), rtol=1e-5, atol=1e-6)
    mine = np.empty_like(out), np.empty_like(lse)
    assert w.run(*arrays, *mine, True, return_lse_base_on_e=True)[0] is mine[0]
    np.testing.assert_allclose(mine[1], log, rtol=1e-5, atol=1e-6)
    assert explain(w).launches[0].kernel == "NumPy reference"


def test_variant_and_its_arguments(arrays):
    variant = define_variant(name="bias", score_fn=lambda s, ctx: s + ctx.a * ctx.qo_head * ctx.kv_idx, scalars=["a"])
    w = wrapper(variant=variant)
    w.plan(*PLAN)
    out = w.run(*arrays, variant_args={"a": 0.25})
    np.testing.assert_allclose(out, naive(*arrays, bias=lambda h, t: 0.25 * h * t)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(errors.ArgumentError, match=r"a .* is missing"):
        w.run(*arrays)
    for other in ({"post_process_fn": lambda out, ctx: out}, {"query_fn": lambda q, ctx: q}, {"use_softmax": False}):
        with pytest.raises(errors.UnsupportedError, match="takes score_fn and mask_fn"):
            wrapper(variant=define_variant(name="other", **other))


def test_cutlass_form_has_no_plan(arrays):
    w = wrapper(backend="cutlass")
    table = np.array([[4, 0], [1, 1], [2, 3], [4, 0]], np.int32)
    kv_len = np.array([6, 0, 3, 2])
    out = w.run(*arrays, kv_len=kv_len, page_table=table)
    for b, n in enumerate(kv_len):
        one = wrapper()
        one.plan([0, 1], [0, 2], table[b], [n], HEADS, 8, 4, PAGE, False, SCALE, "float32", "float32")
        np.testing.assert_allclose(out[b : b + 1], one.run(*(x[b : b + 1] for x in arrays[:2]), *arrays[2:]), rtol=1e-6)
    with pytest.raises(errors.ArgumentError, match="needs kv_len and page_table"):
        w.run(*arrays)
    plain = wrapper()
    plain.plan(*PLAN)
    with pytest.raises(errors.ArgumentError, match="page_table belongs to backend='cutlass'"):
        plain.run(*arrays, page_table=table)


def test_fp8_scales(arrays, rng):
    q_nope, q_pe, ckv, kpe = arrays
    small = [x.astype(ml_dtypes.float8_e4m3fn) for x in (ckv, kpe)]
    w = wrapper()
    w.plan(*PLAN[:11], "float8_e4m3fn")
    got = w.run(q_nope, q_pe, *small, ckv_scale=0.5, kpe_scale=2.0)
    wide = small[0].astype(np.float32) * 0.5, small[1].astype(np.float32) * 2
    np.testing.assert_allclose(got, naive(q_nope, q_pe, *wide)[0], rtol=1e-4, atol=1e-5)
    for given, message in (
        ({}, "kpe_scale is missing"),
        ({"kpe_scale": 1.0}, r"ckv_scale \(or ckv_scale_arr\) is missing"),
        ({"kpe_scale": 1.0, "ckv_scale": 0.0}, "ckv_scale is 0.0, expected a finite positive number"),
        ({"kpe_scale": math.nan, "ckv_scale": 1.0}, "kpe_scale is nan"),
        ({"kpe_scale": 1.0, "ckv_scale": 2.0, "ckv_scale_arr": np.ones((6, PAGE, 0), np.float32)}, "one of the two"),
        ({"kpe_scale": 1.0, "ckv_scale_arr": np.ones((6, 5, 1), np.float32)}, "ckv_scale_arr has shape"),
        ({"kpe_scale": 1.0, "ckv_scale": 1.0, "o_scale": 2.0}, "out is no fp8 array"),
    ):
        with pytest.raises(errors.ArgumentError, match=message):
            w.run(q_nope, q_pe, *small, **given)
    plain = wrapper()
    plain.plan(*PLAN)
    with pytest.raises(errors.ArgumentError, match="ckv_scale is given, but the caches have dtype float32"):
        plain.run(*arrays, ckv_scale=1.0)


def test_factors_of_128_columns(rng):
    q_nope, q_pe = (rng.normal(size=(1, 2, d)).astype(np.float32) for d in (256, 4))
    ckv, kpe = (rng.normal(size=(2, PAGE, d)).astype(ml_dtypes.float8_e4m3fn) for d in (256, 4))
    factors = rng.uniform(0.5, 2, size=(2, PAGE, 2)).astype(np.float32)
    wide = ckv.astype(np.float32) * factors.repeat(128, axis=-1)
    outs = []
    for kind, caches, more in (
        ("float8_e4m3fn", (ckv, kpe), {"ckv_scale_arr": factors, "kpe_scale": 2.0}),
        ("float32", (wide, kpe.astype(np.float32) * 2), {}),
    ):
        w = wrapper()
        w.plan([0, 1], [0, 2], [1, 0], [7], 2, 256, 4, PAGE, False, SCALE, "float32", kind)
        outs.append(w.run(q_nope, q_pe, *caches, **more))
    np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-6)


def test_fp8_output(arrays):
    w = wrapper()
    w.plan(*PLAN)
    out = np.empty((4, HEADS, 8), ml_dtypes.float8_e4m3fn)
    w.run(*arrays, out=out, o_scale=0.01)
    np.testing.assert_allclose(out.astype(np.float64) * 0.01, naive(*arrays)[0], rtol=0.07, atol=1e-4)


@pytest.mark.parametrize("rope", [None, 100.0])
def test_older_wrapper(rng, rope):
    q_nope, q_pe = rng.normal(size=(2, HEADS, 8)), rng.normal(size=(2, HEADS, 64))
    ckv, kpe = rng.normal(size=(3, PAGE, 8)), rng.normal(size=(3, PAGE, 64))
    arrays = [x.astype(np.float32) for x in (q_nope, q_pe, ckv, kpe)]
    w = decode.BatchDecodeMlaWithPagedKVCacheWrapper(np.empty(16, np.uint8), use_tensor_cores=True)
    w.plan([0, 2, 2], [1, 2], [3, 1], HEADS, 8, PAGE, SCALE, 2, 5.0, "float32", rope_theta=rope)
    out, lse = w.run(*arrays, q_scale=2.0, v_scale=0.5, return_lse=True)
    assert w.use_tensor_cores and (out[1] == 0).all() and np.isneginf(lse[1]).all()
    keys = np.arange(4, 7)  # 7 keys, the newest and two to its left
    pages = np.array([1, 2])[keys // PAGE], keys % PAGE
    c, k, q = ckv[pages], kpe[pages], q_pe[0]
    if rope:
        angle = lambda at: np.exp(1j * np.asarray(at)[:, None] * rope ** (-np.arange(32) / 32))  # noqa: E731
        turn = lambda x, at: (x.reshape(*x.shape[:-1], 32, 2) @ [1, 1j]) * angle(at)  # noqa: E731
        s = np.real(turn(q, [6]) @ np.conj(turn(k, keys)).T)
    else:
        s = q @ k.T
    s = 5 * np.tanh(2 * SCALE * (s + q_nope[0] @ c.T) / 5)
    p = np.exp(s)
    np.testing.assert_allclose(out[0], 0.5 * (p / p.sum(1, keepdims=True)) @ c, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(lse[0], np.log2(p.sum(1)), rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({3: [9, 0, 3]}, errors.ArgumentError, r"kv_len_arr\[0\] is 9, expected 0..8"),
        ({3: [6, -1, 3]}, errors.ArgumentError, r"kv_len_arr\[1\] is -1"),
        ({3: [6, 0]}, errors.ShapeError, "kv_len_arr has shape"),
        ({1: [0, 2, 1, 4]}, errors.ArgumentError, "kv_indptr must start at >= 0 and not decrease"),
        ({0: [0, 2, 1, 4]}, errors.ArgumentError, "qo_indptr must start"),
        ({0: [0, 4]}, errors.ArgumentError, "kv_indptr has 4 entries, expected 2"),
        ({2: [4, 0]}, errors.ArgumentError, "kv_indptr ends at 4, but kv_indices has 2 entries"),
        ({2: [4, 0, -2, 1]}, errors.ArgumentError, "negative page number"),
        ({4: 0}, errors.ArgumentError, "num_heads is 0"),
        ({7: 0}, errors.ArgumentError, "page_size is 0"),
        ({10: "float8_e4m3fn"}, errors.DTypeError, "q has dtype float8_e4m3fn"),
        ({11: "float16"}, errors.DTypeError, "the caches have dtype float16"),
        ({12: True}, errors.UnsupportedError, "use_profiler"),
    ],
)
def test_errors_of_plan(change, error, message):
    args = [*PLAN, False]
    for i, value in change.items():
        args[i] = value
    with pytest.raises(error, match=message):
        wrapper().plan(*args)


def test_errors_of_run(arrays):
    w = wrapper()
    with pytest.raises(errors.PlanError, match="plan"):
        w.run(*arrays)
    w.plan(*PLAN)
    q_nope, q_pe, ckv, kpe = arrays
    for args, error, message in (
        ((q_nope[:3], q_pe, ckv, kpe), errors.ShapeError, "q_nope has shape"),
        ((q_nope, q_pe[..., :3], ckv, kpe), errors.ShapeError, "q_pe has shape"),
        ((q_nope, q_pe, ckv[:, :2], kpe), errors.ShapeError, "ckv_cache has shape"),
        ((q_nope, q_pe, ckv, kpe[:5]), errors.ArgumentError, "kv_indices holds page 5"),
        ((q_nope, q_pe, ckv.astype(np.float64), kpe), errors.DTypeError, "ckv_cache has dtype float64"),
        ((q_nope, q_pe, ckv[..., ::-1], kpe), errors.LayoutError, "inner stride"),
    ):
        with pytest.raises(error, match=message):
            w.run(*args)
    with pytest.raises(errors.UnsupportedError, match="profiler_buffer"):
        w.run(*arrays, profiler_buffer=np.zeros(1))
    with pytest.raises(errors.UnsupportedError, match="backend is 'trtllm'"):
        wrapper(backend="trtllm")
    with pytest.raises(errors.UnsupportedError, match="CUDA graph"):
        wrapper(backend="cutlass", use_cuda_graph=True)


def test_graph_mode_fills_the_buffers(arrays):
    buffers = [np.full(n, -1, np.int32) for n in (4, 4, 8, 3)]
    w = mla.BatchMLAPagedAttentionWrapper(np.empty(16, np.uint8), True, *buffers)
    w.plan(*PLAN)
    assert [list(b) for b in buffers] == [QO, INDPTR, [*INDICES, -1, -1, -1, -1], KV_LEN]
    np.testing.assert_allclose(w.run(*arrays), naive(*arrays)[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(errors.PlanError, match="the batch is 1, expected 3"):
        w.plan([0, 1], [0, 1], [1], [3], *PLAN[4:])


# --- kernels ---------------------------------------------------------------------------------------------------------


def problem(**other):
    return Problem(**{"num_heads": 128, "dtype": bfloat16, "kv": bfloat16, "page_size": 64, **other})


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("rows", [16, 64])
def test_shapes_fit_every_gpu(rows, fp8):
    for arch, device in TYPICAL.items():
        room = 65536 if device.code_number < 80 else device.smem_per_block
        tiles = choose_tiles(rows, room, fp8)
        assert tiles.smem_bytes <= room and tiles.tile_q <= rows
        assert tiles.smem_bytes == smem_bytes(*tiles[:4], fp8)
        assert (tiles.stages > 1) == (arch != "75" or fp8)
    assert HOPPER_TILES.smem_bytes <= 227 * 1024


def test_chunks_of_prompts_have_wide_products():
    device = TYPICAL["90a"]
    assert geometry(problem(), 512, device).tiles == HOPPER_TILES  # decoding, speculating
    wide = geometry(problem(), 2048, device)
    assert wide.tiles == HOPPER_WIDE and wide.spec(Call()).symbol == "mla_hopper_bf16_wide"
    for other in ({"page_size": 1}, {"kv": float8_e4m3fn}):  # their producers need registers
        assert geometry(problem(**other), 2048, device).tiles == HOPPER_TILES


def test_gpus_with_little_shared_memory_keep_to_16_rows():
    assert choose_tiles(64, 101376, False).tile_q == 16 and choose_tiles(64, 166912, False).tile_q == 64
    with pytest.raises(errors.UnsupportedError, match="shared memory"):
        choose_tiles(16, 32 << 10, False)


@pytest.mark.parametrize(
    ("other", "rows", "reason"),
    [
        ({}, 16, "16 rows a request"),
        ({"rope": True}, 128, "have to be rotated"),
        ({"backend": "fa2"}, 128, "backend='fa2'"),
    ],
)
def test_what_goes_to_the_portable_kernel(other, rows, reason):
    device = TYPICAL["90a"]
    assert geometry(problem(), 128, device).hopper and geometry(problem(page_size=24), 17, device).hopper
    g = geometry(problem(**other), rows, device)
    assert not g.hopper and reason in g.choice
    if "backend" not in other and rows > 16:
        with pytest.raises(errors.UnsupportedError, match=reason):
            geometry(problem(**other, backend="fa3"), rows, device)
    assert not geometry(problem(), 128, TYPICAL["100a"]).hopper


def test_few_rows_of_fp8_run_two_ctas_a_multiprocessor():
    fp8 = problem(kv=float8_e4m3fn)
    g = geometry(fp8, 16, TYPICAL["90a"])
    assert not g.hopper and g.tiles == FEW_FP8 and g.slots == 2 * TYPICAL["90a"].num_sms
    assert 2 * (g.tiles.smem_bytes + 1024) <= TYPICAL["90a"].smem_per_sm
    assert geometry(fp8, 16, TYPICAL["80"]).slots == TYPICAL["80"].num_sms  # not enough memory for two
    assert geometry(problem(), 16, TYPICAL["90a"]).slots == TYPICAL["90a"].num_sms


@pytest.mark.parametrize(("page_size", "rows"), [(8, 8), (16, 16), (24, 8), (64, 64), (96, 32), (256, 64)])
def test_maps_of_the_caches(monkeypatch, page_size, rows):
    calls = []
    monkeypatch.setattr(mla_kernel, "encode_map", lambda *args: calls.append(args) or b"")
    hopper_maps.cache_clear()
    assert (
        hopper_maps("bfloat16", page_size, 7, (1 << 20, page_size * 576, 576), (2 << 20, page_size * 64, 64))[-1]
        == rows
    )
    (_, address, extents, strides, box), kpe = calls
    assert (address, extents) == (1 << 20, (64, 8, 8, page_size // 8, 7)) and box == (64, 8, 1, rows // 8, 1)
    assert strides == (1152, 128, 8 * 1152, page_size * 1152)
    assert kpe[2:] == ((64, 8, 1, page_size // 8, 7), (128, 128, 1024, page_size * 128), (64, 8, 1, rows // 8, 1))
    hopper_maps.cache_clear()
