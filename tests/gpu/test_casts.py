"""Casts to 8 and 4 bits, alone and fused: bit for bit the reference's where nothing but the cast is computed."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_cupy
from fi_cupy import activation, norm, page, quantization, rope
from fi_cupy.quantization import kernels
from fi_cupy.reference import block_formats
from fi_cupy.reference import norm as reference_norm
from fi_cupy.reference import page as reference_page
from fi_cupy.reference import quantization as reference
from fi_cupy.reference import rope as reference_rope
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned

cupy = pytest.importorskip("cupy")
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
KINDS = {"float8_e4m3fn": E4M3, "float8_e5m2": E5M2, "int8": np.int8}
I32 = np.int32


def same(got, want):
    """Equal bit for bit, but for which NaN it is; fp8 comes from CuPy as bytes."""
    got, want = got.get() if hasattr(got, "get") else np.asarray(got), np.asarray(want)
    assert got.shape == want.shape
    got = got.view(want.dtype) if got.dtype.itemsize == want.dtype.itemsize else got
    assert got.dtype == want.dtype
    if got.dtype.kind in "iu":
        np.testing.assert_array_equal(got, want)
    else:
        wide = [a.astype(np.float64) for a in (got, want)]
        np.testing.assert_array_equal(*wide)
        assert (np.signbit(wide[0]) == np.signbit(wide[1]))[~np.isnan(wide[0])].all()


def nearly(got, want, kind=E4M3, share=0.004):
    """Codes that differ by one, rarely: fp32 products before the cast may differ in the last bit, or a zero's sign."""
    got = got.get() if hasattr(got, "get") else np.asarray(got)
    assert got.shape == want.shape
    got, want = (np.ascontiguousarray(x).view(np.uint8).astype(int) for x in (got, want))
    if kind is np.int8:
        got, want = (np.where(x > 127, x - 256, x) for x in (got, want))
    else:  # sign and magnitude: -0 is 0
        got, want = (np.where(x >= 128, 128 - x, x) for x in (got, want))
    assert np.abs(got - want).max(initial=0) <= 1 and (got != want).sum() <= max(1, share * got.size)


def near_halves(values):
    """fp32 numbers at, just below and just above every number half way between neighbours, and the neighbours."""
    values = np.unique(np.abs(values[np.isfinite(values)])).astype(np.float64)
    halves = np.concatenate([(values[1:] + values[:-1]) / 2, values, [values[-1] * 1.06, values[-1] * 2]])
    halves = halves.astype(np.float32)
    near = np.concatenate([halves, np.nextafter(halves, 0), np.nextafter(halves, np.inf), [np.inf, np.nan]])
    near = np.concatenate([near, -near]).astype(np.float32)
    return near[: len(near) // 16 * 16].reshape(-1, 16)


@pytest.mark.older_archs
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_codes_at_every_half_and_its_neighbours(kind):
    x = near_halves(np.arange(256, dtype=np.uint8).view(KINDS[kind]).astype(np.float32))
    q, scale = quantization.per_tensor_quant_fp8(on_gpu(x), 1.0, kind)
    same(q, reference.static_quant(x, 1.0, KINDS[kind]))
    assert float(scale[0]) == 1


@pytest.mark.older_archs
def test_e2m1_codes_at_every_half_and_its_neighbours():
    x = near_halves(np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]))
    x = np.clip(np.where(np.isfinite(x), x, 0), -6, 6)
    x[:, -1] = 6
    q, scales = quantization.fp4_quantize(on_gpu(x), 1.0, is_sf_swizzled_layout=False)
    assert (scales.get() == 0x38).all()
    clipped = x.astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(block_formats.unpack_nibbles(q.get()), clipped.view(np.uint8))


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("power", [False, True])
def test_groups(rng, kind, dtype, power):
    for shape, size in (((5, 512), 128), ((3, 7, 64), 16), ((130, 4096), 128), ((4, 7168), 64), ((3, 960), 320)):
        x = normal(rng, shape, dtype, 3.0)
        flat = x.reshape(-1, shape[-1])
        flat[1, :size], flat[2, 5] = 0, np.nan
        flat[2, size + 2] = np.inf
        got = quantization.per_token_group_quant_8bit(on_gpu(x), size, dst_dtype=kind, scale_ue8m0=power)
        want = reference.per_token_group_quant_8bit(x, size, dst_dtype=KINDS[kind], scale_ue8m0=power)
        same(got[1], want[1])
        same(got[0], want[0])


def test_groups_of_any_size_and_strided_rows(rng):
    host = normal(rng, (6, 1000), "bfloat16")
    wide = on_gpu(host)
    for start, n, size in ((8, 960, 320), (3, 77, 7), (0, 992, 992), (16, 4, 1), (0, 0, 8)):
        got = quantization.per_token_group_quant_8bit(wide[::2, start : start + n], size)
        want = reference.per_token_group_quant_8bit(host[::2, start : start + n], size)
        same(got[1], want[1])
        same(got[0], want[0])


@pytest.mark.parametrize("aligned", [False, True])
def test_column_major_scales(rng, aligned):
    x = normal(rng, (70, 512), "bfloat16")
    q, scale = quantization.per_token_group_quant_8bit(
        on_gpu(x), 128, column_major_scales=True, scale_tma_aligned=aligned, scale_ue8m0=True
    )
    want = reference.per_token_group_quant_8bit(
        x, 128, column_major_scales=True, scale_tma_aligned=aligned, scale_ue8m0=True
    )
    assert scale.strides == want[1].strides
    same(scale, want[1])
    same(q, want[0])


@pytest.mark.older_archs
@pytest.mark.parametrize("n", [8, 100, 4096, 14336, 33000])
def test_tokens(rng, n):
    x = normal(rng, (37, n), "bfloat16")
    for call, kind in ((quantization.per_token_quant_fp8, E4M3), (quantization.per_token_quant_int8, np.int8)):
        for got, want in zip(call(on_gpu(x)), reference.per_token_group_quant_8bit(x, n, dst_dtype=kind), strict=True):
            same(got, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_whole_arrays(rng, dtype):
    for shape in ((1, 1), (3, 100), (300, 4096), (0, 8)):
        x = normal(rng, shape, dtype, 2.0)
        for kind in ("float8_e4m3fn", "float8_e5m2"):
            got, host = quantization.per_tensor_quant_fp8(on_gpu(x), None, kind), x
            want = quantization.per_tensor_quant_fp8(host, None, kind)
            same(got[1], want[1])
            same(got[0], want[0])
            for scale in (0.37, on_gpu(np.array([0.37], np.float32))):
                got = quantization.per_tensor_quant_fp8(on_gpu(x), scale, kind)
                same(got[0], reference.static_quant(x, 0.37, KINDS[kind]))
                assert float(got[1][0]) == np.float32(0.37)
    x = normal(rng, (3, 100), dtype)
    x[1, 7] = np.nan
    q, scale = quantization.per_tensor_quant_fp8(on_gpu(x))
    assert np.isnan(scale.get()).all() and (q.get() & 0x7F == 0x7F).all()


@pytest.mark.parametrize("shape", [(130, 256), (300, 1000), (2, 150, 136), (3, 128, 512)])
@pytest.mark.parametrize("mode", ["K", "MN"])
def test_tiles(rng, shape, mode):
    x = normal(rng, shape, "bfloat16")
    for tile in ((1, 128), (128, 128), (32, 64), (64, 256)):
        tile = (1,) * (len(shape) - 2) + tile
        if tile[-2] == 1 and mode == "MN" and len(shape) == 3:
            continue
        scale_shape = [-(-n // t) for n, t in zip(shape, tile, strict=True)]
        if mode == "MN":
            scale_shape[-2:] = scale_shape[:-3:-1]
        q, scale = quantization.quantize_fp8(on_gpu(x), tuple(scale_shape), tile, mode)
        want = reference.quantize_fp8(x, tile, mode)
        same(scale, want[1])
        same(q, want[0])
        back = quantization.dequantize_fp8(q, scale, mode, tile_shape=tile)
        same(back, reference.dequantize_fp8(*want, tile, mode))
    if len(shape) == 2 and mode == "K":
        same(quantization.per_block_cast_to_fp8(on_gpu(x))[0], reference.per_block_cast_to_fp8(x)[0])
        same(quantization.per_token_cast_to_fp8(on_gpu(x))[1], reference.per_token_cast_to_fp8(x)[1])


@pytest.mark.older_archs
@pytest.mark.parametrize("rows", [1, 130, 1000])
@pytest.mark.parametrize("layout", list(quantization.SfLayout))
def test_mxfp8(rng, rows, layout):
    x = normal(rng, (rows, 416), "bfloat16")
    x = x * np.exp2(rng.integers(-120, 100, (rows, 1))).astype(x.dtype)
    x[0, :32], x[0, 40] = 0, np.nan
    q, scales = quantization.mxfp8_quantize(on_gpu(x), sf_swizzle_layout=layout)
    codes, plain = block_formats.mxfp8_quantize(x)
    tile = {0: 128, 1: 8, 2: 0}[layout.value]
    same(scales, (block_formats.tile_scales(plain, tile) if tile else plain).reshape(-1))
    same(q, codes)
    same(
        quantization.mxfp8_dequantize_host(q, scales, sf_swizzle_layout=layout),
        block_formats.mxfp8_dequantize(codes, plain),
    )


@pytest.mark.older_archs
@pytest.mark.parametrize("size,ue8m0", [(16, False), (32, True), (32, False)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fp4(rng, size, ue8m0, dtype):
    for rows, swizzled in ((20, False), (300, True)):
        x = normal(rng, (rows, 192), dtype)
        x[1, :32], x[2, 3], x[3, 0] = 0, np.nan, np.inf
        given = np.float32(1.0 if ue8m0 else 448 * 6 / 4.5)
        scale = float(given) if swizzled else on_gpu(np.array([given]))
        q, scales = quantization.fp4_quantize(on_gpu(x), scale, size, ue8m0, swizzled)
        codes, plain = block_formats.fp4_quantize(x, given, size, ue8m0)
        same(scales, block_formats.tile_scales(plain, 128) if swizzled else plain)
        usable = np.repeat(plain != (255 if ue8m0 else 127), size // 2, axis=1)
        assert (q.get() == codes)[usable].all()
        back = quantization.e2m1_and_ufp8sf_scale_to_float(q, scales, 1 / given, size, 0 if ue8m0 else 1, swizzled)
        same(back, block_formats.fp4_dequantize(q.get(), plain, 1 / given, size, ue8m0))


@pytest.mark.parametrize("shape", [(1, 1), (130, 9), (3, 200, 8), (0, 4), (5000, 448)])
def test_scales_move_into_tiles(rng, shape):
    scales = rng.integers(1, 255, shape).astype(np.uint8)
    same(quantization.block_scale_interleave(on_gpu(scales)), quantization.block_scale_interleave(scales))
    if len(shape) == 2 and shape[0]:
        tiled = quantization.block_scale_interleave(on_gpu(scales)).get()
        padded = (-(-shape[0] // 128) * 128, -(-shape[1] // 4) * 4)
        np.testing.assert_array_equal(block_formats.untile_scales(tiled.reshape(padded), 128, shape), scales)


@pytest.mark.parametrize("scale", ["e8m0", "e4m3"])
def test_every_scale_byte_and_every_code_dequantises(scale):
    codes = np.arange(256, dtype=np.uint8)
    factors = codes.view(ml_dtypes.float8_e8m0fnu if scale == "e8m0" else E4M3).astype(np.float64)[:, None]
    for code in kernels.BITS:
        q = np.tile(codes, (256, 1))
        raw = block_formats.unpack_nibbles(q).view(ml_dtypes.float4_e2m1fn) if code.tag == "e2m1" else q.view(code.np)
        with np.errstate(over="ignore", invalid="ignore"):
            want = (raw.astype(np.float64) * factors).astype(np.float32)
        out = kernels.view(poisoned(want.shape, "float32"))
        kernels.dequantize(
            "op", kernels.view(on_gpu(q)), kernels.view(on_gpu(codes[:, None])), out, code=code, scale=scale,
            block=(1, want.shape[1]), scale_strides=(0, 1, 1),
        )  # fmt: skip
        same(out.array, want)


# --- fused ------------------------------------------------------------------------------------------------------------


@pytest.mark.older_archs
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_layernorm_quant_divides(rng, dtype):
    for shape in ((3, 64), (5, 4096), (2, 40000), (0, 64)):
        x = normal(rng, shape, dtype)
        g, b = normal(rng, shape[-1:], "float32"), normal(rng, shape[-1:], "float32")
        for scale in (0.25, on_gpu(np.array([0.25], np.float32))):
            out = poisoned(shape, "float8_e4m3fn")
            norm.layernorm_quant(out, on_gpu(x), on_gpu(g), on_gpu(b), scale)
            nearly(out, reference_norm.layernorm_quant(*(a.astype(np.float64) for a in (x, g, b)), 0.25))


def test_a_row_with_nan_is_nan_in_fp8(rng):
    x, w = normal(rng, (4, 256)), normal(rng, (256,))
    x[2, 9] = np.nan
    out = on_gpu(np.zeros((4, 256), np.uint8))
    fi_cupy.rmsnorm_quant(out, on_gpu(x), on_gpu(w), 0.5)
    bad = out.get() & 0x7F == 0x7F
    assert bad[2].all() and not bad[[0, 1, 3]].any()


@pytest.mark.parametrize("kind", list(KINDS))
def test_silu_and_mul_quant(rng, kind):
    for shape in ((7, 200), (3, 5, 4096), (70, 14336)):
        x = normal(rng, (*shape[:-1], 2 * shape[-1]), "bfloat16", 2.0)
        gate, up = np.split(x.astype(np.float64), 2, axis=-1)
        exact = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
        for scale in (0.02, on_gpu(np.array([0.02], np.float32))) if kind != "float8_e5m2" else ():  # bytes are e4m3
            out = on_gpu(np.full(shape, 77, np.int8 if kind == "int8" else np.uint8))
            activation.silu_and_mul_quant(out, on_gpu(x), scale)
            nearly(out, reference.static_quant(exact, 0.02, KINDS[kind]), KINDS[kind])
        size = 128 if shape[-1] % 128 == 0 else 40
        q, scales = quantization.per_token_group_quant_8bit(on_gpu(x), size, dst_dtype=kind, fuse_silu_and_mul=True)
        codes, wanted = reference.per_token_group_quant_8bit(exact, size, dst_dtype=KINDS[kind])
        np.testing.assert_allclose(scales.get(), wanted, rtol=3e-6)
        nearly(q, codes, KINDS[kind], 0.01)


def test_silu_and_mul_nvfp4(rng):
    x = normal(rng, (50, 2 * 512), "bfloat16", 2.0)
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    exact = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
    given = np.float32(448 * 6 / np.abs(exact).max())
    q, scales = quantization.silu_and_mul_nvfp4_quantize(on_gpu(x), on_gpu(np.array([given])))
    codes, plain = block_formats.fp4_quantize(exact, given)
    got = block_formats.untile_scales(scales.get(), 128, plain.shape)
    equal = got == plain
    assert equal.mean() > 0.999
    usable = np.repeat(equal, 8, axis=1)
    assert (q.get() == codes)[usable].mean() > 0.999


def pages_of(rng, lens, new, page_size, padding=2):
    """(batch_indices, positions, indices, indptr, last, number of pages) for the `new` last tokens of each request."""
    pages = [-(-n // page_size) for n in lens]
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(I32)
    indices = rng.permutation(int(indptr[-1]) + 3)[: indptr[-1]].astype(I32)
    last = np.array([(n - 1) % page_size + 1 if n else 1 for n in lens], I32)
    append = np.concatenate([[0], np.cumsum(new)]).astype(I32)
    b, p = reference_page.get_batch_indices_positions(append, np.array(lens, I32), int(append[-1]) + padding)
    return b, p, indices, indptr, last, int(indptr[-1]) + 3


@pytest.mark.older_archs
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("scale", ["number", "heads", "one"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_append_divides_by_the_scale(rng, layout, scale, dtype):
    for heads, dim, page_size, lens, new in (
        (8, 128, 16, [700, 3, 5], [690, 0, 5]), (3, 20, 5, [7, 9], [7, 2]), (8, 128, 16, [3000], [3000])
    ):  # fmt: skip
        b, p, indices, indptr, last, pages = pages_of(rng, lens, new, page_size)
        k, v = normal(rng, (len(b), heads, dim), dtype, 4.0), normal(rng, (len(b), heads, dim), dtype)
        inner = (page_size, heads, dim) if layout == "NHD" else (heads, page_size, dim)
        want = np.zeros((pages, 2, *inner), E4M3)
        per_head = [rng.uniform(0.01, 3, heads).astype(np.float32) for _ in "kv"]
        scales = {"number": (0.5, 3.0), "one": tuple(s[:1] for s in per_head), "heads": tuple(per_head)}[scale]
        cache = on_gpu(want)
        page.append_paged_kv_cache(
            *[on_gpu(a) for a in (k, v, b, p)], cache, *[on_gpu(a) for a in (indices, indptr, last)], layout,
            k_scale=scales[0] if scale == "number" else on_gpu(scales[0]),
            v_scale=scales[1] if scale == "number" else on_gpu(scales[1]),
        )  # fmt: skip
        k8, v8 = (
            reference.static_quant(x, s if np.size(s) == 1 else s[:, None]) for x, s in zip((k, v), scales, strict=True)
        )
        reference_page.append_paged_kv_cache_(k8, v8, b, p, want[:, 0], want[:, 1], indices, indptr, last, layout)
        same(cache, want)


def test_append_mla(rng):
    b, p, indices, indptr, last, pages = pages_of(rng, [700, 30], [600, 1], 64)
    ckv, kpe = normal(rng, (len(b), 512), "bfloat16"), normal(rng, (len(b), 64), "bfloat16")
    args = [on_gpu(a) for a in (indices, indptr, last)]
    for kinds, scales in (((E4M3, "bfloat16"), (0.5, None)), ((E4M3, E4M3), (0.5, 2.0))):
        host = [normal(rng, (pages, 64, n), kind) for n, kind in zip((512, 64), kinds, strict=True)]
        caches = [on_gpu(c) for c in host]
        page.append_paged_mla_kv_cache(
            *[on_gpu(a) for a in (ckv, kpe, b, p)], *caches, *args, ckv_scale=scales[0], kpe_scale=scales[1]
        )
        for x, w, s, got in zip((ckv, kpe), host, scales, caches, strict=True):
            cast = x if s is None else reference.static_quant(x, s, w.dtype)
            reference_page.append_paged_mla_kv_cache_(cast, None, b, p, w, None, indices, indptr)
            same(got, w)


def rope_inputs(rng, tokens, heads, kv_heads, rope_dim, nope_dim, dtype="bfloat16", mla=False):
    k_shape = (tokens,) if mla else (tokens, kv_heads)
    q = normal(rng, (tokens, heads, nope_dim + rope_dim), dtype)
    k = normal(rng, (*k_shape, nope_dim + rope_dim), dtype)
    angle = rng.uniform(0, 6, (500, rope_dim // 2))
    cache = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
    return q, k, cache, rng.integers(0, 500, tokens).astype(np.int64)


@pytest.mark.older_archs
@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_trap_23_rope_quantize_multiplies(rng, is_neox, mla, dtype):
    for tokens, rope_dim, nope_dim in ((5, 16, 48), (100, 64, 512), (0, 64, 64), (7, 6, 10), (700, 128, 0), (9, 2, 0)):
        q, k, cache, pos = rope_inputs(rng, tokens, 16, 2, rope_dim, nope_dim, dtype, mla)
        dq, dk = on_gpu(q), on_gpu(k)
        none = (None, None)
        parts = q[..., nope_dim:], k[..., nope_dim:], *((q[..., :nope_dim], k[..., :nope_dim]) if nope_dim else none)
        on = dq[..., nope_dim:], dk[..., nope_dim:], *((dq[..., :nope_dim], dk[..., :nope_dim]) if nope_dim else none)
        call = rope.mla_rope_quantize_fp8 if mla else rope.rope_quantize_fp8
        got = call(*on, on_gpu(cache), on_gpu(pos), is_neox, None, 0.25, 3.0)
        want = reference_rope.rope_quantize_fp8(*parts, cache, pos, is_neox, None, 0.25, 3.0)
        for g, w in zip(got, want, strict=True):
            if w is None:
                assert g is None
            else:
                nearly(g, w)


@pytest.mark.older_archs
@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_rope_quantize_append(rng, mla, layout):
    page_size, rope_dim, nope_dim, heads = (64, 64, 512, 1) if mla else (16, 64, 64, 2)
    b, p, indices, indptr, _, pages = pages_of(rng, [900, 3, 50], [200, 0, 50], page_size)
    q, k, cache, _ = rope_inputs(rng, len(b), 16, heads, rope_dim, nope_dim, mla=mla)
    v = None if mla else normal(rng, (len(b), heads, 128), "bfloat16")
    pos = (p // 2).astype(I32)
    if mla:
        caches = [normal(rng, (pages, page_size, n), E4M3) for n in (nope_dim, rope_dim)]
    else:
        inner = (page_size, heads) if layout == "NHD" else (heads, page_size)
        caches = [normal(rng, (pages, *inner, n), E4M3) for n in (rope_dim + nope_dim, 128)]
    on_device = tuple(on_gpu(c) for c in caches)
    dq, dk = on_gpu(q), on_gpu(k)
    got = rope.rope_quantize_fp8_append_paged_kv_cache(
        dq[..., nope_dim:], dk[..., nope_dim:], dq[..., :nope_dim], dk[..., :nope_dim], None if mla else on_gpu(v),
        on_gpu(cache), on_gpu(pos), on_device, on_gpu(indices), on_gpu(indptr), on_gpu(b), on_gpu(p),
        quant_scale_q=0.5, quant_scale_kv=2.0, page_size=page_size, kv_layout=layout,
    )  # fmt: skip
    want = reference_rope.rope_quantize_fp8_append_paged_kv_cache_(
        q[..., nope_dim:], k[..., nope_dim:], q[..., :nope_dim], k[..., :nope_dim], v, cache, pos, tuple(caches),
        indices, indptr, b, p, True, None, 0.5, 2.0, layout,
    )  # fmt: skip
    for g, w in zip((*got, *on_device), (*want, *caches), strict=True):
        nearly(g, w)


@pytest.mark.parametrize("dtype,kind", [("bfloat16", None), ("float16", None), ("bfloat16", E4M3), ("float32", None)])
@pytest.mark.parametrize("layout,is_neox", [("NHD", True), ("HND", False)])
def test_rope_append_keeps_queries(rng, dtype, kind, layout, is_neox):
    """q in place, as a slice of a fused projection; launched behind the kernel that writes it, with and without PDL."""
    heads, kv_heads, dim, page_size = 9, 3, 64, 16
    for lens, new in (([900, 3, 50], [200, 0, 50]), ([130], [1]), ([17] * 64, [1] * 64)):
        b, p, indices, indptr, _, pages = pages_of(rng, lens, new, page_size)
        qkv = normal(rng, (len(b), heads + 2 * kv_heads, dim), dtype)
        angle = rng.uniform(0, 6, (1000, dim // 2))
        table = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1).astype(np.float32)
        inner = (page_size, kv_heads) if layout == "NHD" else (kv_heads, page_size)
        caches = [normal(rng, (pages, *inner, dim), kind or dtype) for _ in range(2)]
        on_device, source = tuple(on_gpu(c) for c in caches), on_gpu(qkv)
        want = [c.copy() for c in caches]
        want_q, _ = reference_rope.rope_quantize_fp8_append_paged_kv_cache_(
            qkv[:, :heads], qkv[:, heads : heads + kv_heads], None, None, qkv[:, heads + kv_heads :], table, p,
            tuple(want), indices, indptr, b, p, is_neox, want[0].dtype, 1.0, 1.0, layout, qkv.dtype,
        )  # fmt: skip
        tables = [on_gpu(a) for a in (table, p, indices, indptr, b)]
        for pdl in (False, True):
            x = cupy.zeros_like(source)
            for _ in range(3):  # the copy is the kernel in front
                x[...] = source
                rope.rope_append_paged_kv_cache(
                    x[:, :heads], x[:, heads : heads + kv_heads], None, None, x[:, heads + kv_heads :], tables[0],
                    tables[1], on_device, tables[2], tables[3], tables[4], tables[1], is_neox, 1.0, page_size, layout,
                    x[:, :heads], enable_pdl=pdl,
                )  # fmt: skip
            got = x.get() if dtype != "bfloat16" else x.view(np.uint16).get().view(want_q.dtype)
            assert np.abs(got[:, :heads].astype(np.float32) - want_q.astype(np.float32)).max() <= 0.04
            assert (got[:, heads:] == qkv[:, heads:]).all()
            for g, w, before in zip(on_device, want, caches, strict=True):
                if kind is not None:
                    nearly(g, w)
                else:
                    near = g.get() if dtype != "bfloat16" else g.view(np.uint16).get().view(w.dtype)
                    assert np.abs(near.astype(np.float32) - w.astype(np.float32)).max() <= 0.04
                g[...] = on_gpu(before)


def test_graph_capture(rng):
    x = on_gpu(normal(rng, (64, 512)))
    quantization.per_tensor_quant_fp8(x)  # compiled and loaded before the capture
    stream = new_stream()
    with stream:
        stream.begin_capture()
        q, scale = quantization.per_tensor_quant_fp8(x)
        graph = stream.end_capture()
        x[...] = on_gpu(normal(rng, (64, 512), "bfloat16", 7.0))
        graph.launch()
        stream.synchronize()
    want = quantization.per_tensor_quant_fp8(x.get())
    same(scale, want[1])
    same(q, want[0])


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(normal(rng, (33, 512), "float32")).cuda().bfloat16()
    q, scale = quantization.per_token_group_quant_8bit(x, 128, dst_dtype=torch.float8_e5m2)
    assert q.dtype is torch.float8_e5m2
    want = x.float().reshape(33, 4, 128)
    amax = want.abs().amax(-1, keepdim=True)
    torch.testing.assert_close(scale, amax[..., 0] / 57344, rtol=2e-7, atol=0)  # torch multiplies by 1 / 57344
    assert (q.float() == (want / scale[..., None]).to(torch.float8_e5m2).float().reshape(33, 512)).all()
    q, scales = quantization.mxfp8_quantize(x)
    assert q.dtype is torch.float8_e4m3fn and scales.dtype is torch.uint8
