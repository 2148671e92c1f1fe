"""Reference rotary embedding against Python loops in float64. `trap_NN` names the semantic a test pins down."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from fi_cupy.reference import rope

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def plain_frequency(i, rotary_dim, scale=1.0, theta=1e4):
    return theta ** (-2 * i / rotary_dim) / scale


def llama31_frequency(i, rotary_dim, scale=8.0, theta=5e5, low=1.0, high=4.0, old=8192):
    """As transformers writes it, by wavelength."""
    f = theta ** (-2 * i / rotary_dim)
    wavelength = 2 * math.pi / f
    if wavelength < old / high:
        return f
    if wavelength > old / low:
        return f / scale
    smooth = (old / wavelength - low) / (high - low)
    return (1 - smooth) * f / scale + smooth * f


def naive_rotate(x, positions, frequencies, interleave):
    out = x.astype(np.float64).copy()
    half = len(frequencies)
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(half):
                first, second = (2 * i, 2 * i + 1) if interleave else (i, i + half)
                c, s = math.cos(positions[t] * frequencies[i]), math.sin(positions[t] * frequencies[i])
                a, b = float(x[t, h, first]), float(x[t, h, second])
                out[t, h, first], out[t, h, second] = a * c - b * s, a * s + b * c
    return out


def qk(rng, nnz, dim, dtype=np.float64):
    return rng.normal(size=(nnz, 3, dim)).astype(dtype), rng.normal(size=(nnz, 1, dim)).astype(dtype)


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 4])
@pytest.mark.parametrize("family", ["plain", "llama31"])
@pytest.mark.parametrize("pos_dtype", [np.int32, np.int64])
def test_trap_22_rope_with_position_ids(interleave, rotary_dim, family, pos_dtype):
    rng = np.random.default_rng(1)
    q, k = qk(rng, 5, 8)
    positions = np.asarray([0, 1, 17, 4000, 100_003], dtype=pos_dtype)
    rd = rotary_dim or 8
    if family == "plain":
        options, frequencies = (2.0, 300.0), [plain_frequency(i, rd, 2.0, 300.0) for i in range(rd // 2)]
        got = rope.apply_rope_pos_ids(q, k, positions, rotary_dim, interleave, *options)
    else:
        frequencies = [llama31_frequency(i, rd) for i in range(rd // 2)]
        got = rope.apply_llama31_rope_pos_ids(q, k, positions, rotary_dim, interleave)
    for x, y in zip((q, k), got, strict=True):
        np.testing.assert_allclose(y, naive_rotate(x, positions, frequencies, interleave), rtol=1e-9, atol=1e-9)
        np.testing.assert_array_equal(y[..., rd:], x[..., rd:])


@pytest.mark.parametrize("rotary_dim", [64, 128])
def test_trap_22_llama31_frequencies_blend_in_the_middle(rotary_dim):
    expected = [llama31_frequency(i, rotary_dim, 8.0, 5e5, 1.0, 4.0, 8192) for i in range(rotary_dim // 2)]
    np.testing.assert_allclose(rope.llama31_frequencies(rotary_dim), expected, rtol=1e-12)
    plain = rope.rope_frequencies(rotary_dim, 1.0, 5e5)
    ratio = plain / rope.llama31_frequencies(rotary_dim)
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(8.0) and np.any((ratio > 1.01) & (ratio < 7.99))


@pytest.mark.parametrize("llama31", [False, True])
def test_trap_22_indptr_positions_are_offset_plus_index(llama31):
    rng = np.random.default_rng(2)
    q, k = qk(rng, 7, 8)
    indptr, offsets = np.array([0, 3, 3, 6], dtype=np.int32), np.array([10, 99, 0], dtype=np.int32)
    positions = [10, 11, 12, 0, 1, 2]
    segments = rope.apply_llama31_rope if llama31 else rope.apply_rope
    by_id = rope.apply_llama31_rope_pos_ids if llama31 else rope.apply_rope_pos_ids
    got = segments(q, k, indptr, offsets)
    expected = by_id(q[:6], k[:6], np.asarray(positions))
    for x, y, e in zip((q, k), got, expected, strict=True):
        np.testing.assert_array_equal(y[:6], e)
        np.testing.assert_array_equal(y[6], x[6])  # past indptr[-1]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_angles_stay_exact_at_long_positions(dtype):
    q, k = qk(np.random.default_rng(3), 2, 64, dtype)
    positions = np.asarray([131_071, 1_000_003])
    got = rope.apply_rope_pos_ids(q, k, positions)
    frequencies = [plain_frequency(i, 64) for i in range(32)]
    eps = float(ml_dtypes.finfo(dtype).eps)
    for x, y in zip((q, k), got, strict=True):
        assert y.dtype == dtype
        np.testing.assert_allclose(
            y.astype(np.float64), naive_rotate(x, positions, frequencies, False), rtol=eps, atol=max(eps / 100, 1e-6)
        )


def make_cache(max_pos, rotary_dim, theta=1e4):
    frequencies = np.asarray([plain_frequency(i, rotary_dim, 1.0, theta) for i in range(rotary_dim // 2)])
    angles = np.arange(max_pos)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("rotary_dim", [8, 4])
def test_trap_22_cos_sin_cache_is_cos_then_sin_and_neox_is_not_interleaved(is_neox, rotary_dim):
    rng = np.random.default_rng(4)
    q, k = qk(rng, 4, 8)
    positions = np.asarray([3, 0, 31, 3])
    got = rope.apply_rope_with_cos_sin_cache(
        positions, q.reshape(4, -1), k.reshape(4, -1), 8, make_cache(32, rotary_dim), is_neox
    )
    frequencies = [plain_frequency(i, rotary_dim) for i in range(rotary_dim // 2)]
    for x, y in zip((q, k), got, strict=True):
        assert y.shape == (4, x.shape[1] * 8)
        np.testing.assert_allclose(
            y.reshape(x.shape), naive_rotate(x, positions, frequencies, not is_neox), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("mla", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("is_neox", [True, False])
def test_trap_23_rope_quantize_multiplies_by_the_scale(mla, dtype, is_neox):
    rng = np.random.default_rng(5)
    nnz, positions = 4, np.asarray([0, 5, 9, 2])
    q_rope, q_nope = rng.normal(size=(nnz, 3, 8)), rng.normal(size=(nnz, 3, 6))
    k_rope, k_nope = rng.normal(size=(nnz, 2, 8)), rng.normal(size=(nnz, 2, 6))
    if mla:
        k_rope, k_nope = k_rope[:, 0], k_nope[:, 0]
    cache = make_cache(16, 8)
    got = rope.rope_quantize_fp8(
        q_rope, k_rope, q_nope, k_nope, cache.astype(np.float64), positions, is_neox, dtype, 4.0, 0.5
    )

    def rotated(x):
        three = x if x.ndim == 3 else x[:, None]
        out = three.copy()
        for t in range(nnz):
            for i in range(4):
                a, b = (i, i + 4) if is_neox else (2 * i, 2 * i + 1)
                c, s = float(cache[positions[t], i]), float(cache[positions[t], i + 4])
                out[t, :, a] = three[t, :, a] * c - three[t, :, b] * s
                out[t, :, b] = three[t, :, b] * c + three[t, :, a] * s
        return out.reshape(x.shape)

    expected = (rotated(q_rope) * 4.0, rotated(k_rope) * 0.5, q_nope * 4.0, k_nope * 0.5)
    for g, e in zip(got, expected, strict=True):
        assert g.dtype == dtype and g.shape == e.shape
        np.testing.assert_array_equal(g, e.astype(dtype))
    huge = rope.rope_quantize_fp8(q_rope, k_rope, q_nope, None, cache, positions, is_neox, dtype, 1e9, 1.0)
    assert np.all(np.abs(huge[2].astype(np.float64)) == (448.0 if dtype == E4M3 else 57344.0)) and huge[3] is None


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_rope_quantize_append_gqa(layout):
    rng = np.random.default_rng(6)
    q_rope, k_rope, v = (rng.normal(size=(3, 2, 8)).astype(np.float32) for _ in range(3))
    shape = (4, 2, 2, 8)  # page size 2 and 2 heads
    caches = np.zeros(shape, dtype=E4M3), np.zeros(shape, dtype=E4M3)
    where = np.array([2, 0, 3]), np.array([0, 2, 3]), np.array([0, 1, -1]), np.array([2, 1, 0])
    positions = np.asarray([2, 1, 0])
    q_out, nope = rope.rope_quantize_fp8_append_paged_kv_cache_(
        q_rope, k_rope, None, None, v, make_cache(8, 8), positions, caches, *where, quant_scale_kv=2.0, kv_layout=layout
    )
    expected = rope.rope_quantize_fp8(q_rope, k_rope, None, None, make_cache(8, 8), positions, quant_scale_kv=2.0)
    np.testing.assert_array_equal(q_out, expected[0])
    assert nope is None
    k_nhd, v_nhd = (c if layout == "NHD" else c.swapaxes(1, 2) for c in caches)
    # Request 0, position 2: second page of the request (page 0), row 0. Request 1, position 1: page 3, row 1.
    np.testing.assert_array_equal(k_nhd[0, 0], expected[1][0])
    np.testing.assert_array_equal(k_nhd[3, 1], expected[1][1])
    np.testing.assert_array_equal(v_nhd[3, 1], (v[1] * 2.0).astype(E4M3))
    assert np.count_nonzero(k_nhd.astype(np.float32).any(axis=(2, 3))) == 2


def test_rope_quantize_append_mla():
    rng = np.random.default_rng(7)
    k_rope, k_nope = rng.normal(size=(2, 8)).astype(np.float32), rng.normal(size=(2, 16)).astype(np.float32)
    q = rng.normal(size=(2, 3, 8)).astype(np.float32)
    ckv, kpe = np.zeros((2, 4, 16), dtype=E4M3), np.zeros((2, 4, 8), dtype=E4M3)
    rope.rope_quantize_fp8_append_paged_kv_cache_(
        q, k_rope, q, k_nope, None, make_cache(8, 8), np.array([0, 1]), (ckv, kpe),
        np.array([1]), np.array([0, 1]), np.array([0, 0]), np.array([0, 1]),
    )  # fmt: skip
    np.testing.assert_array_equal(ckv[1, :2], k_nope.astype(E4M3))
    np.testing.assert_array_equal(kpe[1, 0], k_rope[0].astype(E4M3))
    assert not np.any(ckv[0].astype(np.float32)) and not np.any(ckv[1, 2:].astype(np.float32))
