"""Casts to 8 and 4 bits on CPU arrays: the formats against ml_dtypes, layouts, and what is refused."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fi_cupy
from fi_cupy import activation, errors, norm, page, quantization, rope
from fi_cupy.quantization import SfLayout
from fi_cupy.quantization.kernels import rows_spec, token_rows, vector
from fi_cupy.reference import block_formats as formats
from fi_cupy.testing import utils
from fi_cupy.testing.generators import normal

E2M1, E4M3, E5M2, E8M0 = (
    ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu
)  # fmt: skip
I32 = np.int32

# --- formats ----------------------------------------------------------------------------------------------------------


def test_e2m1_has_ml_dtypes_values_and_rounding():
    codes = np.arange(16, dtype=np.uint8)
    np.testing.assert_array_equal(formats.e2m1_values(codes), codes.view(E2M1).astype(np.float32))
    x = np.linspace(-6, 6, 4801, dtype=np.float32)
    np.testing.assert_array_equal(formats.e2m1_codes(x), x.astype(E2M1).view(np.uint8))
    assert formats.e2m1_codes(np.float32([7, -1e30, np.inf])).tolist() == [7, 15, 7]  # saturates
    assert (formats.e2m1_codes(formats.e2m1_values(codes)) == codes).all()


def test_e8m0_has_ml_dtypes_values():
    codes = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(formats.e8m0_values(codes), codes.view(E8M0).astype(np.float32))


@pytest.mark.parametrize("limit", [448.0, 6.0])
def test_e8m0_scale_is_the_smallest_power_that_does_not_saturate(limit):
    for exponent in range(-126, 128):
        top = np.float32(2.0) ** np.float32(exponent)
        at_limit = top * np.float32(limit / 2 ** int(np.log2(limit)))
        for amax in (np.nextafter(top, 0), top, np.nextafter(top, np.float32(np.inf)), at_limit):
            if not 0 < amax < np.inf:
                continue
            code = int(formats.e8m0_codes(np.float32(amax), limit))
            assert float(amax) <= limit * 2.0 ** (code - 127)
            assert code == 0 or float(amax) > limit * 2.0 ** (code - 128)
    special = formats.e8m0_codes(np.float32([0, np.nan, np.inf]), limit)
    assert special.tolist() == [0, 255, 255 - int(np.log2(limit))]


def test_mxfp8_round_trips_every_code():
    """All 254 finite codes under every scale that leaves them finite in fp32 come back as they were."""
    codes = np.concatenate([np.arange(0x7F), np.arange(0x80, 0xFF)]).astype(np.uint8)
    groups = np.concatenate([codes, codes[:2]]).reshape(-1, 32).copy()
    groups[:, 31] = 0x7E  # the largest magnitude, so that the scale is the one we mean
    for exponent in (-100, -9, 0, 7, 110):
        x = groups.view(E4M3).astype(np.float32) * np.float32(2.0) ** np.float32(exponent)
        q, scales = formats.mxfp8_quantize(x)
        assert (scales == 127 + exponent).all()
        np.testing.assert_array_equal(q.view(np.uint8), groups)
        np.testing.assert_array_equal(formats.mxfp8_dequantize(q, scales), x)


def test_nvfp4_round_trips_every_pair_of_codes_under_every_scale():
    pairs = np.arange(256, dtype=np.uint8)
    groups = np.concatenate([pairs.reshape(-1, 8), np.full((32, 8), 0x77, np.uint8)], axis=1)[:, 1:9]
    groups[:, 7] = 0x77  # 6 is the largest magnitude
    for scale in range(1, 0x7F):
        scales = np.full((32, 1), scale, np.uint8)
        x = formats.fp4_dequantize(groups, scales)
        q, again = formats.fp4_quantize(x)
        assert (again == scale).all()
        np.testing.assert_array_equal(q, groups)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(16, False), (32, True)]), st.floats(-20, 20))
@settings(max_examples=60, deadline=None)
def test_fp4_is_the_nearest_code_of_its_group(seed, form, size):
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, 64)) * 2.0**size).astype(np.float32)
    given_scale = np.float32(448 * 6 / np.abs(x).max()) if form[0] == 16 else np.float32(1)
    q, scales = formats.fp4_quantize(x, given_scale, *form)
    factor = formats.e8m0_values(scales) if form[1] else scales.view(E4M3).astype(np.float32)
    factor = np.repeat(factor.astype(np.float64) / given_scale, form[0], axis=1)
    grid = np.concatenate([formats.E2M1_VALUES, -formats.E2M1_VALUES]).astype(np.float64)
    best = np.abs(x[..., None] - grid * factor[..., None]).min(axis=-1)
    got = np.abs(x - formats.e2m1_values(formats.unpack_nibbles(q)) * factor)
    assert (got <= best * (1 + 1e-5) + 1e-30).all()


@pytest.mark.parametrize("rows,shape", list(itertools.product((8, 128), ((1, 1), (130, 9), (256, 8), (0, 4)))))
def test_tiles_of_scales_place_each_byte(rows, shape):
    scales = np.random.default_rng(0).integers(1, 255, shape).astype(np.uint8)
    tiled = formats.tile_scales(scales, rows)
    assert tiled.shape == (-(-shape[0] // rows) * rows, -(-shape[1] // 4) * 4)
    flat, columns = tiled.reshape(-1), tiled.shape[1]
    used = np.zeros(flat.size, bool)
    for m in range(shape[0]):
        for n in range(shape[1]):
            inside = (m % 32) * 16 + m % 128 // 32 * 4 + n % 4 if rows == 128 else m % 8 * 4 + n % 4
            place = (m // rows * (columns // 4) + n // 4) * rows * 4 + inside
            assert flat[place] == scales[m, n]
            used[place] = True
    assert not flat[~used].any()
    np.testing.assert_array_equal(formats.untile_scales(tiled, rows, shape), scales)


# --- the public functions on CPU arrays -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_group_quant_on_the_cpu(rng, dtype):
    x = normal(rng, (3, 4, 64), dtype, 5.0)
    q, scale = quantization.per_token_group_quant_8bit(x, 16)
    assert q.dtype == E4M3 and scale.shape == (3, 4, 4) and scale.dtype == np.float32
    wide = x.astype(np.float64).reshape(3, 4, 4, 16)
    np.testing.assert_allclose(scale, np.abs(wide).max(-1) / 448, rtol=1e-6)
    np.testing.assert_allclose(
        q.astype(np.float64).reshape(wide.shape) * scale[..., None], wide, rtol=2**-4, atol=1e-3 * np.abs(wide).max()
    )
    q, scale = quantization.per_token_group_quant_8bit(x[0], 16, 1e-10, "int8", True, True, True)
    assert q.dtype == np.int8 and scale.shape == (4, 4) and scale.strides == (4, 16)
    assert (np.log2(scale) % 1 == 0).all()


def test_fused_silu_on_the_cpu(rng):
    x = normal(rng, (5, 128), "bfloat16")
    gate, up = np.split(x.astype(np.float64), 2, axis=-1)
    y = (gate / (1 + np.exp(-gate)) * up).astype(np.float32)
    for got, want in zip(
        quantization.per_token_group_quant_8bit(x, 32, fuse_silu_and_mul=True),
        quantization.per_token_group_quant_8bit(y, 32), strict=True,
    ):  # fmt: skip
        np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=0.13, atol=1e-6)
    out = np.empty((5, 64), E5M2)
    activation.silu_and_mul_quant(out, x, np.array([0.01], np.float32))
    np.testing.assert_allclose(out.astype(np.float32) * 0.01, y, rtol=2**-3, atol=1e-6)


def test_tokens_and_whole_arrays_on_the_cpu(rng):
    x = normal(rng, (6, 40), "float16")
    x[2] = 0
    q, scale = quantization.per_token_quant_int8(x)
    assert q.dtype == np.int8 and scale.shape == (6, 1) and not q[2].any()
    amax = np.abs(x.astype(np.float32)).max(-1, keepdims=True)
    np.testing.assert_array_equal(np.abs(q).max(-1)[amax[:, 0] > 0], 127)
    q, scale = quantization.per_tensor_quant_fp8(x, dtype="float8_e5m2")
    assert q.dtype == E5M2 and scale == np.abs(x).max().astype(np.float32) / np.float32(57344)
    q, scale = quantization.per_tensor_quant_fp8(x, 0.25)
    np.testing.assert_array_equal(q, (x.astype(np.float32) / 0.25).astype(E4M3))
    assert scale.tolist() == [0.25]
    assert quantization.per_token_quant_fp8(np.empty((0, 8), np.float16))[1].shape == (0, 1)


def test_testing_utils_have_flashinfers_calls(rng):
    x = normal(rng, (256, 256), "float32")
    q, scale = utils.quantize_fp8(x, (2, 256), (1, 128), "MN")
    assert scale.shape == (2, 256)
    np.testing.assert_allclose(utils.dequantize_fp8(q, scale, "MN"), x, rtol=2**-4, atol=1e-2)
    q, scale = utils.per_block_cast_to_fp8(x[:130])
    with pytest.raises(errors.ShapeError, match=r"2 scales for 130 values.*65 or 128; pass tile_shape"):
        utils.dequantize_fp8(q, scale)
    np.testing.assert_allclose(utils.dequantize_fp8(q, scale, tile_shape=(128, 128)), x[:130], rtol=2**-4, atol=1e-2)
    assert utils.per_token_cast_to_fp8(x)[1].shape == (256, 2)


@pytest.mark.parametrize("layout", list(SfLayout))
def test_block_formats_on_the_cpu(rng, layout):
    x = normal(rng, (10, 64), "bfloat16")
    q, scales = fi_cupy.mxfp8_quantize(x, sf_swizzle_layout=layout)
    back = fi_cupy.mxfp8_dequantize_host(q, scales, sf_swizzle_layout=layout)
    np.testing.assert_allclose(back, x.astype(np.float32), rtol=2**-4, atol=2**-9)
    given_scale = np.array([448 * 6 / 4], np.float32)
    q, scales = fi_cupy.nvfp4_quantize(x, given_scale, layout)
    assert q.shape == (10, 32) and q.dtype == scales.dtype == np.uint8
    if layout is not SfLayout.layout_8x4:
        swizzled = layout is SfLayout.layout_128x4
        back = fi_cupy.e2m1_and_ufp8sf_scale_to_float(q, scales, 1 / given_scale, is_sf_swizzled_layout=swizzled)
        amax = np.abs(x.astype(np.float32)).reshape(10, 4, 16).max(-1, keepdims=True)
        assert (np.abs(back - x.astype(np.float32)).reshape(10, 4, 16) <= amax * 0.25).all()


def test_mxfp4_on_the_cpu(rng):
    x = normal(rng, (10, 64), "bfloat16").astype(np.float32)
    q, scales = fi_cupy.mxfp4_quantize(x)
    assert scales.shape == (128, 4)
    back = fi_cupy.mxfp4_dequantize(q, scales)
    assert (
        np.abs(back - x) <= np.abs(x).reshape(10, 2, 32).max(-1, keepdims=True).repeat(32, -1).reshape(10, 64) / 3
    ).all()


def test_global_scale_may_be_inverse_or_an_array(rng):
    x = normal(rng, (4, 32), "float16")
    want = fi_cupy.fp4_quantize(x, 8.0)
    for got in (
        fi_cupy.fp4_quantize(x, np.array([8.0], np.float32)),
        fi_cupy.fp4_quantize(x, 0.125, is_global_scale_inversed=True),
    ):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)


def test_layernorm_quant_on_the_cpu(rng):
    x, g, b = normal(rng, (3, 64)), normal(rng, (64,), "float32"), normal(rng, (64,), "float32")
    wide = x.astype(np.float64)
    normed = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-6) * g + b
    for kind in (E4M3, E5M2):
        out = np.empty(x.shape, kind)
        norm.layernorm_quant(out, x, g, b, np.array([0.5], np.float32))
        np.testing.assert_allclose(out.astype(np.float64), (normed / 0.5).astype(kind).astype(np.float64), rtol=0.26)
    with pytest.raises(errors.DTypeError, match="layernorm_quant: out has dtype float32"):
        norm.layernorm_quant(np.empty(x.shape, np.float32), x, g, b, 1.0)


def test_append_casts_and_checks(rng):
    k = normal(rng, (2, 2, 8), "bfloat16")
    where = (np.array([0, 0], I32), np.array([0, 3], I32))
    table = (np.array([2], I32), np.array([0, 1], I32), np.array([4], I32))
    cache = np.zeros((3, 2, 4, 2, 8), E4M3)
    per_head = np.array([0.5, 2.0], np.float32)
    page.append_paged_kv_cache(k, k, *where, cache, *table, k_scale=0.25, v_scale=per_head)
    np.testing.assert_array_equal(cache[2, 0, 3], (k[1].astype(np.float32) / 0.25).astype(E4M3))
    np.testing.assert_array_equal(cache[2, 1, 0], (k[0].astype(np.float32) / per_head[:, None]).astype(E4M3))
    for more, error, text in (
        ({}, errors.DTypeError, "append_key has dtype bfloat16, expected float8_e4m3fn like its cache, or k_scale"),
        ({"k_scale": 1.0}, errors.DTypeError, "append_value has dtype bfloat16"),
        ({"k_scale": 0.0, "v_scale": 1.0}, errors.ArgumentError, "k_scale is 0.0, expected a positive number"),
        (
            {"k_scale": 1.0, "v_scale": np.ones(3, np.float32)},
            errors.ShapeError,
            "v_scale has shape (3,), expected (1,)",
        ),
        ({"k_scale": 1.0, "v_scale": np.ones(2)}, errors.DTypeError, "v_scale has dtype float64, expected float32"),
    ):
        with pytest.raises(error) as caught:
            page.append_paged_kv_cache(k, k, *where, cache, *table, **more)
        assert text in str(caught.value)
    with pytest.raises(errors.DTypeError, match=r"its cache bfloat16, expected with k_scale"):
        page.append_paged_kv_cache(k, k, *where, cache.astype(k.dtype), *table, k_scale=1.0)
    ckv = np.zeros((3, 4, 16), E4M3)
    new = normal(rng, (2, 16), "float16")
    page.append_paged_mla_kv_cache(new, None, *where, ckv, None, *table, ckv_scale=0.5)
    np.testing.assert_array_equal(ckv[2, 3], (new[1].astype(np.float32) / 0.5).astype(E4M3))
    with pytest.raises(errors.ArgumentError, match="kpe_scale is given, expected kpe_cache"):
        page.append_paged_mla_kv_cache(new, None, *where, ckv, None, *table, ckv_scale=0.5, kpe_scale=1.0)


def rope_arguments(rng, **changes):
    arguments = {
        "q_rope": normal(rng, (3, 4, 8)), "k_rope": normal(rng, (3, 2, 8)), "q_nope": normal(rng, (3, 4, 16)),
        "k_nope": normal(rng, (3, 2, 16)), "cos_sin_cache": rng.standard_normal((10, 8)).astype(np.float32),
        "pos_ids": np.array([0, 9, 3], I32),
    }  # fmt: skip
    return arguments | changes


def test_rope_quantize_on_the_cpu_and_outputs_given(rng):
    arguments = rope_arguments(rng)
    plain = rope.rope_quantize_fp8(*arguments.values(), quant_scale_q=2.0, quant_scale_kv=0.5)
    assert [x.dtype for x in plain] == [E4M3] * 4
    out = np.empty((3, 4, 8), E5M2)
    got = rope.mla_rope_quantize_fp8(*arguments.values(), q_rope_out=out)
    assert got[0] is out and got[1].dtype == E5M2
    np.testing.assert_array_equal(plain[3], (arguments["k_nope"].astype(np.float32) * 0.5).astype(E4M3))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"q_rope": np.zeros((3, 8), np.float16)}, errors.ShapeError, "q_rope is 2-D"),
        ({"k_rope": np.zeros((3, 2, 8), np.float16)}, errors.DTypeError, "k_rope has dtype float16, expected bfloat16"),
        ({"k_rope": np.zeros((2, 2, 8), ml_dtypes.bfloat16)}, errors.ShapeError, "k_rope has 2 tokens, expected 3"),
        ({"k_nope": np.zeros((3, 1, 16), ml_dtypes.bfloat16)}, errors.ShapeError, "k_nope has shape (3, 1, 16)"),
        ({"q_nope": np.zeros((3, 4, 15), ml_dtypes.bfloat16)}, errors.ShapeError, "an even last dimension"),
        ({"cos_sin_cache": np.zeros((10, 6), np.float32)}, errors.ShapeError, "cos_sin_cache has shape (10, 6)"),
        ({"cos_sin_cache": np.zeros((10, 8))}, errors.DTypeError, "cos_sin_cache has dtype float64"),
        ({"pos_ids": np.array([0, 10, 3], I32)}, errors.ArgumentError, "pos_ids leave 0 to 9"),
        ({"quant_scale_q": 0.0}, errors.ArgumentError, "quant_scale_q is 0.0"),
        ({"quantize_dtype": "int8"}, errors.ArgumentError, "quantize_dtype is int8"),
        ({"q_nope": None, "q_nope_out": np.zeros(3)}, errors.ArgumentError, "q_nope_out is given, expected q_nope"),
        ({"q_rope_out": np.zeros((3, 4, 8), np.float32)}, errors.DTypeError, "q_rope_out has dtype float32"),
    ],
)
def test_rope_quantize_errors(rng, changes, error, text):
    with pytest.raises(error) as caught:
        rope.rope_quantize_fp8(**rope_arguments(rng, **changes))
    assert text in str(caught.value) and str(caught.value).startswith("rope_quantize_fp8: ")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: quantization.per_token_group_quant_8bit(x, 24), errors.ShapeError, "divisible by 24"),
        (lambda x: quantization.per_token_group_quant_8bit(x, 32, 0.0), errors.ArgumentError, "eps is 0.0"),
        (lambda x: quantization.per_token_group_quant_8bit(x, 32, float("nan")), errors.ArgumentError, "eps is nan"),
        (
            lambda x: quantization.per_token_group_quant_8bit(x, 32, dst_dtype="float16"),
            errors.ArgumentError,
            "dtype is float16, expected float8_e4m3fn or",
        ),
        (
            lambda x: quantization.per_token_group_quant_8bit(x, 32, scale_tma_aligned=True),
            errors.ArgumentError,
            "expected column_major_scales=True",
        ),
        (
            lambda x: quantization.per_token_group_quant_8bit(x[None], 32, column_major_scales=True),
            errors.ShapeError,
            "x is 3-D",
        ),
        (lambda x: quantization.per_token_group_quant_8bit(x.T, 2), errors.LayoutError, "x has inner stride"),
        (lambda x: quantization.per_token_group_quant_8bit(x.astype(int), 2), errors.DTypeError, "x has dtype int64"),
        (lambda x: quantization.quantize_fp8(x, (4, 3), (1, 32)), errors.ShapeError, "scale_shape is (4, 3)"),
        (lambda x: quantization.quantize_fp8(x, (4, 2), (32,)), errors.ArgumentError, "tile_shape is (32,)"),
        (lambda x: quantization.quantize_fp8(x, (4, 2), (1, 32), "M"), errors.ArgumentError, "scale_major_mode is 'M'"),
        (lambda x: quantization.mxfp8_quantize(x[:, :48]), errors.ShapeError, "divisible by 32"),
        (lambda x: quantization.mxfp8_quantize(x, alignment=128), errors.UnsupportedError, "alignment is 128"),
        (lambda x: quantization.mxfp8_quantize(x, backend="cute-dsl"), errors.UnsupportedError, "backend is"),
        (lambda x: quantization.mxfp8_quantize(x, sf_swizzle_layout=7), errors.ArgumentError, "SfLayout.layout_8x4"),
        (lambda x: quantization.fp4_quantize(x, sf_vec_size=8), errors.UnsupportedError, "sf_vec_size is 8"),
        (lambda x: quantization.fp4_quantize(x, np.ones(2, np.float32)), errors.ShapeError, "global_scale has shape"),
        (lambda x: quantization.fp4_quantize(x, is_sf_swizzled_layout=False, is_sf_8x4_layout=True),
         errors.ArgumentError, "is_sf_8x4_layout"),
        (lambda x: quantization.nvfp4_quantize(x, 1.0, do_shuffle=True), errors.UnsupportedError, "do_shuffle is True"),
        (
            lambda x: quantization.e2m1_and_ufp8sf_scale_to_float(np.zeros((2, 16), np.uint8), np.zeros(4, np.uint8)),
            errors.ShapeError,
            "ufp8_scale_tensor has shape (4,), expected (128, 4)",
        ),
        (lambda x: activation.silu_and_mul_quant(x, x, 1.0), errors.ShapeError, "expected (4, 32)"),
        (
            lambda x: quantization.dequantize_fp8(x.astype(E4M3), np.ones((4, 3), np.float32)),
            errors.ShapeError,
            "3 scales for 64 values",
        ),
    ],
)  # fmt: skip
def test_errors(rng, call, error, text):
    with pytest.raises(error) as caught:
        call(normal(rng, (4, 64), "float16"))
    assert text in str(caught.value)


# --- launches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 8, 16, 100, 128, 256, 300, 4096, 33000])
@pytest.mark.parametrize("vec", [1, 8])
def test_launch_shape_covers_the_group(group, vec):
    from fi_cupy.dtypes import bfloat16, float8_e4m3fn

    spec = rows_spec(bfloat16, float8_e4m3fn, "float", group, vec)
    config = dict(spec.config)
    lanes, held = config["kLanes"], config["kLanes"] * config["kVecs"] * vec
    assert spec.threads % lanes == 0 and spec.threads <= 1024
    assert lanes <= 32 or lanes == spec.threads
    assert held >= group or lanes == 1024  # a part of a warp holds its whole group: the kernel counts on it


def test_rows_and_vectors():
    from fi_cupy.arrays import view

    x = np.zeros((4, 6, 10), np.float16)
    assert token_rows("op", "x", view(x)) == (24, 10)
    assert token_rows("op", "x", view(x[:, :, 2:8])) == (24, 10)
    assert token_rows("op", "x", view(x[:, :1])) == (4, 60)
    with pytest.raises(errors.LayoutError, match="leading dimensions that lie as one"):
        token_rows("op", "x", view(x[:, :4]))
    assert vector(2, 0x1000, 128) == 8 and vector(2, 0x1004, 128) == 2 and vector(4, 0x1000, 6) == 2
