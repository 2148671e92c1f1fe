"""The casting kernels run on the CPU, with the formats' integer arithmetic, equal to the reference code for code.

Each instance takes g++ a second or two: a selection by default, all with FI_CUPY_EMULATE=all in the environment.
"""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest
from emulate import HOPPER, EmulatedKernel, available, device, emulated

from fi_cupy import quantization
from fi_cupy.dtypes import bfloat16, float8_e4m3fn, float8_e5m2, int8
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.quantization import kernels
from fi_cupy.reference import block_formats
from fi_cupy.reference import quantization as reference
from fi_cupy.testing.generators import normal

pytestmark = pytest.mark.skipif(not available(), reason="the emulator needs g++ on x86-64")
EVERYTHING = os.environ.get("FI_CUPY_EMULATE") == "all"
TYPES = {float8_e4m3fn: ml_dtypes.float8_e4m3fn, float8_e5m2: ml_dtypes.float8_e5m2}


@pytest.fixture(autouse=True)
def _on_the_emulator():
    with emulated(HOPPER, kernels):
        yield


def same(got, want):
    """Equal bit for bit, NaN like NaN."""
    got, want = np.asarray(got), np.asarray(want)
    assert got.shape == want.shape and got.dtype == want.dtype
    if got.dtype.kind in "iu":
        assert (got == want).all()
    else:
        wide = [a.astype(np.float64) for a in (got, want)]
        np.testing.assert_array_equal(*wide)
        assert (np.signbit(wide[0]) == np.signbit(wide[1]))[~np.isnan(wide[0])].all()


def near_halves(values):
    """fp32 numbers at, just below and just above every number half way between neighbours, and the neighbours."""
    values = np.unique(np.abs(values[np.isfinite(values)])).astype(np.float64)
    halves = np.concatenate([(values[1:] + values[:-1]) / 2, values, [values[-1] * 1.06, values[-1] * 2]])
    halves = halves.astype(np.float32)
    near = np.concatenate([halves, np.nextafter(halves, 0), np.nextafter(halves, np.inf), [np.inf, np.nan]])
    near = np.concatenate([near, -near]).astype(np.float32)
    return near[: len(near) // 16 * 16].reshape(-1, 16)


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_fp8_codes_at_every_half_and_its_neighbours(kind):
    x = near_halves(np.arange(256, dtype=np.uint8).view(TYPES[kind]).astype(np.float32))
    q, scale = quantization.per_tensor_quant_fp8(device(x), 1.0, kind)
    same(q, reference.static_quant(x, 1.0, TYPES[kind]))
    assert scale[0] == 1
    limit = 448.0 if kind is float8_e4m3fn else 57344.0
    finite = np.clip(np.where(np.isnan(x), 0, x), -limit, limit)
    same(quantization.per_tensor_quant_fp8(device(finite), 1.0, kind)[0], finite.astype(TYPES[kind]))  # ml_dtypes' own


def test_e2m1_codes_at_every_half_and_its_neighbours():
    x = near_halves(np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]))
    x = np.clip(np.where(np.isfinite(x), x, 0), -6, 6)
    x[:, -1] = 6  # the group's scale becomes 1
    q, scales = quantization.fp4_quantize(device(x), 1.0, is_sf_swizzled_layout=False)
    assert (np.asarray(scales) == 0x38).all()
    clipped = np.clip(x, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    np.testing.assert_array_equal(block_formats.unpack_nibbles(np.asarray(q)), clipped.view(np.uint8))


GROUPS = [(float8_e4m3fn, "bfloat16", False), (int8, "float16", False), (float8_e5m2, "float32", True)]
if EVERYTHING:
    kinds = (float8_e4m3fn, float8_e5m2, int8)
    GROUPS = [(k, t, p) for k in kinds for t in ("bfloat16", "float16", "float32") for p in (False, True)]


@pytest.mark.parametrize("kind,dtype,power", GROUPS, ids=str)
def test_groups(rng, kind, dtype, power):
    x = normal(rng, (5, 512), dtype, 3.0)
    x[1, :128] = 0
    x[2, 5] = np.nan
    x[3, 130] = np.inf
    for size in (128, 16, 64):
        got = quantization.per_token_group_quant_8bit(device(x), size, dst_dtype=kind, scale_ue8m0=power)
        want = reference.per_token_group_quant_8bit(x, size, dst_dtype=kind.np, scale_ue8m0=power)
        same(got[1], want[1])
        same(got[0], want[0])


def test_groups_of_any_size_and_strided_rows(rng):
    wide = device(normal(rng, (6, 1000), "bfloat16"))
    for start, n, size in ((8, 960, 320), (3, 77, 7), (0, 992, 992), (16, 4, 1))[: 4 if EVERYTHING else 2]:
        x = wide[::2, start : start + n]
        got = quantization.per_token_group_quant_8bit(x, size)
        want = reference.per_token_group_quant_8bit(np.asarray(x), size)
        same(got[1], want[1])
        same(got[0], want[0])


@pytest.mark.parametrize("aligned", [False, True])
def test_column_major_scales(rng, aligned):
    x = normal(rng, (6, 256), "bfloat16")
    q, scale = quantization.per_token_group_quant_8bit(
        device(x), 64, column_major_scales=True, scale_tma_aligned=aligned
    )
    want = reference.per_token_group_quant_8bit(x, 64, column_major_scales=True, scale_tma_aligned=aligned)
    assert scale.strides == want[1].strides
    same(scale, want[1])
    same(q, want[0])


def test_rows_longer_than_registers(rng):
    x = normal(rng, (3, 33000), "bfloat16")
    for got, want in zip(
        quantization.per_token_quant_fp8(device(x)), reference.per_token_group_quant_8bit(x, 33000), strict=True
    ):
        same(got, want)


def test_largest_magnitude(rng):
    x = normal(rng, (3, 700), "bfloat16")
    for put in (None, (1, 3, -77.0), (2, 699, np.inf), (0, 1, np.nan)):
        if put:
            x[put[:2]] = put[2]
        result = device(np.zeros(1, np.float32))
        v = kernels.view(device(x))
        kernels.launch_absolute_max(v, kernels.view(result), *kernels.token_rows("op", "x", v))
        same(result, np.abs(x.astype(np.float32)).max(keepdims=True).reshape(-1))


@pytest.mark.parametrize(
    "shape,mode",
    [(s, m) for s in ((130, 256), (2, 5, 200), (2, 150, 130)) for m in ("K", "MN")]
    if EVERYTHING
    else [((130, 256), "K"), ((2, 150, 136), "MN")],
)
def test_tiles(rng, shape, mode):
    x = normal(rng, shape, "bfloat16")
    for tile in ((1, 128), (128, 128), (32, 64))[: 3 if EVERYTHING else 2]:
        tile = (1,) * (len(shape) - 2) + tile
        if tile[-2] == 1 and mode == "MN" and len(shape) == 3:
            continue
        scale_shape = [-(-n // t) for n, t in zip(shape, tile, strict=True)]
        if mode == "MN":
            scale_shape[-2:] = scale_shape[:-3:-1]
        q, scale = quantization.quantize_fp8(device(x), tuple(scale_shape), tile, mode)
        want = reference.quantize_fp8(x, tile, mode)
        same(scale, want[1])
        same(q, want[0])
        back = quantization.dequantize_fp8(q, scale, mode, tile_shape=tile)
        same(back, reference.dequantize_fp8(np.asarray(q), np.asarray(scale), tile, mode))


@pytest.mark.parametrize("rows", [1, 130] if EVERYTHING else [130])
@pytest.mark.parametrize("layout", list(quantization.SfLayout))
def test_mxfp8(rng, rows, layout):
    x = normal(rng, (rows, 160), "bfloat16") * np.exp2(rng.integers(-120, 100, (rows, 1))).astype(bfloat16.np)
    x[0, :32], x[0, 40] = 0, np.nan
    q, scales = quantization.mxfp8_quantize(device(x), sf_swizzle_layout=layout)
    codes, plain = block_formats.mxfp8_quantize(x)
    tile = {0: 128, 1: 8, 2: 0}[layout.value]
    same(scales, (block_formats.tile_scales(plain, tile) if tile else plain).reshape(-1))
    same(q, codes)
    back = quantization.mxfp8_dequantize_host(q, scales, sf_swizzle_layout=layout)
    same(back, block_formats.mxfp8_dequantize(codes, plain))


@pytest.mark.parametrize("size,ue8m0", [(16, False), (32, True), (32, False)][: 3 if EVERYTHING else 2])
@pytest.mark.parametrize("swizzled", [False, True])
def test_fp4(rng, size, ue8m0, swizzled):
    x = normal(rng, (20, 192), "float16")
    x[1, :32], x[2, 3], x[3, 0] = 0, np.nan, np.inf
    given = np.float32(1.0 if ue8m0 else 448 * 6 / 4.5)
    q, scales = quantization.fp4_quantize(device(x), float(given), size, ue8m0, swizzled)
    codes, plain = block_formats.fp4_quantize(x, given, size, ue8m0)
    same(scales, block_formats.tile_scales(plain, 128) if swizzled else plain)
    usable = np.repeat(plain != (255 if ue8m0 else 127), size // 2, axis=1)
    assert (np.asarray(q) == codes)[usable].all()
    back = quantization.e2m1_and_ufp8sf_scale_to_float(q, scales, 1 / given, size, 0 if ue8m0 else 1, swizzled)
    same(back, block_formats.fp4_dequantize(np.asarray(q), plain, 1 / given, size, ue8m0))


@pytest.mark.parametrize("shape", [(1, 1), (130, 9), (3, 200, 8), (0, 4)])
def test_scales_move_into_tiles(rng, shape):
    scales = rng.integers(1, 255, shape).astype(np.uint8)
    same(quantization.block_scale_interleave(device(scales)), quantization.block_scale_interleave(scales))


@pytest.mark.parametrize("scale,codes", [("e8m0", 256), ("e4m3", 256)])
def test_every_scale_byte_and_every_code_dequantises(scale, codes):
    """All pairs of a code and a scale byte, against products in double."""
    for code, kind in ((float8_e4m3fn, ml_dtypes.float8_e4m3fn), (float8_e5m2, ml_dtypes.float8_e5m2),
                       (kernels.float4_e2m1fn, None)):  # fmt: skip
        q = np.tile(np.arange(256, dtype=np.uint8), (codes, 1))
        scales = np.arange(codes, dtype=np.uint8)[:, None]
        values = (
            block_formats.unpack_nibbles(q).view(ml_dtypes.float4_e2m1fn) if kind is None else q.view(kind)
        ).astype(np.float64)
        factors = scales.view(ml_dtypes.float8_e8m0fnu if scale == "e8m0" else ml_dtypes.float8_e4m3fn)
        with np.errstate(over="ignore", invalid="ignore"):
            want = (values * factors.astype(np.float64)).astype(np.float32)
        out = kernels.view(device(np.zeros_like(want)))
        kernels.dequantize(
            "op", kernels.view(device(q)), kernels.view(device(scales)), out, code=code, scale=scale,
            block=(1, want.shape[1]), scale_strides=(0, 1, 1),
        )  # fmt: skip
        same(np.asarray(out.array), want)


def test_one_kernel_of_each_kind_is_deterministic_in_any_order_of_threads(rng):
    x = normal(rng, (5, 512), "bfloat16")
    first = None
    for seed in (1, 2, 3):
        EmulatedKernel.order = seed
        got = [np.asarray(a).tobytes() for a in quantization.per_token_group_quant_8bit(device(x), 512)]
        first = first or got
        assert got == first
    EmulatedKernel.order = 1
    assert to_dtype("bfloat16") is bfloat16
