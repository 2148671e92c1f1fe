"""Reference paged cache, bit packing and 8-bit quantisation against loops. `trap_NN` names what a test pins down."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy.reference import page, quantization

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2

# --- pages ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_trap_05_seq_lens_invert_the_page_table(lens, page_size):
    indptr = np.concatenate([[0], np.cumsum([-(-n // page_size) for n in lens])]).astype(np.int32)
    last = np.asarray([(n - 1) % page_size + 1 if n else 1 for n in lens], dtype=np.int32)
    got = page.get_seq_lens(indptr, last, page_size)
    assert got.dtype == np.int32 and got.tolist() == lens  # a request without pages has length 0, not last_page_len


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_batch_indices_and_positions(requests, padding):
    appended = [a for a, _ in requests]
    seq_lens = [a + before for a, before in requests]
    indptr = np.concatenate([[0], np.cumsum(appended)]).astype(np.int32)
    nnz = sum(appended) + padding
    batch, positions = page.get_batch_indices_positions(indptr, np.asarray(seq_lens, dtype=np.int32), nnz)
    expected = [(b, before + i) for b, (a, before) in enumerate(requests) for i in range(a)] + [(-1, 0)] * padding
    assert batch.dtype == positions.dtype == np.int32
    assert list(zip(batch.tolist(), positions.tolist(), strict=True)) == expected


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 2, 5])
@pytest.mark.parametrize("dtype", [np.float16, E4M3])
def test_trap_26_27_append_then_gather(layout, page_size, dtype):
    rng = np.random.default_rng(1)
    before, appended, heads, dim = [3, 0, 6, 0], [2, 1, 0, 0], 2, 4
    total = [b + a for b, a in zip(before, appended, strict=True)]
    pages = [-(-n // page_size) for n in total]
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    indices = rng.permutation(int(indptr[-1]) + 3)[: indptr[-1]].astype(np.int32)
    last = np.asarray([(n - 1) % page_size + 1 if n else 1 for n in total], dtype=np.int32)
    inner = (page_size, heads, dim) if layout == "NHD" else (heads, page_size, dim)
    # K and V lie in differently strided views of bigger arrays.
    k_cache = np.zeros((int(indptr[-1]) + 3, 3, *inner), dtype=dtype)[:, 1]
    v_cache = np.zeros((int(indptr[-1]) + 3, *inner[:-1], 2 * dim), dtype=dtype)[..., dim:]

    keys, values = rng.normal(size=(2, 11, heads, dim)).astype(np.float32)
    batch = np.asarray([0, 0, 2, 0, 1, -1, 2, 2, 2, 2, 2], dtype=np.int32)
    positions = np.asarray([3, 4, 0, 1, 0, 0, 5, 4, 3, 2, 1], dtype=np.int32)
    page.append_paged_kv_cache_(keys, values, batch, positions, k_cache, v_cache, indices, indptr, last, layout)

    for cache, new in ((k_cache, keys), (v_cache, values)):
        expected = np.zeros((cache.shape[0], page_size, heads, dim), dtype=dtype)
        for t in range(11):
            if batch[t] >= 0:
                where = indices[indptr[batch[t]] + positions[t] // page_size]
                expected[where, positions[t] % page_size] = new[t].astype(dtype)
        np.testing.assert_array_equal(cache if layout == "NHD" else cache.swapaxes(1, 2), expected)

    gathered = page.gather_paged_kv(k_cache, v_cache, indptr, indices, last, layout)
    assert [len(k) for k, _ in gathered] == total
    for t in range(11):
        if batch[t] >= 0:
            np.testing.assert_array_equal(gathered[batch[t]][0][positions[t]], keys[t].astype(dtype))
            np.testing.assert_array_equal(gathered[batch[t]][1][positions[t]], values[t].astype(dtype))


def test_append_to_an_fp8_cache_saturates():
    cache = np.zeros((1, 2, 1, 4), dtype=E4M3), np.zeros((1, 2, 1, 4), dtype=E5M2)
    new = np.full((1, 1, 4), 1e6, dtype=np.float32)
    page.append_paged_kv_cache_(new, new, np.array([0]), np.array([1]), *cache, np.array([0]), np.array([0, 1]))
    assert np.all(cache[0][0, 1].astype(np.float32) == 448) and np.all(cache[1][0, 1].astype(np.float32) == 57344)
    assert not np.any(cache[0][0, 0].astype(np.float32))


def test_append_mla_writes_both_caches_or_one():
    rng = np.random.default_rng(2)
    ckv, kpe = rng.normal(size=(3, 8)).astype(BF16), rng.normal(size=(3, 4)).astype(BF16)
    where = np.array([1, -1, 0]), np.array([2, 0, 1])
    table = np.array([3, 1, 0]), np.array([0, 1, 3])
    ckv_cache, kpe_cache = np.zeros((4, 2, 8), dtype=BF16), np.zeros((4, 2, 4), dtype=BF16)
    page.append_paged_mla_kv_cache_(ckv, kpe, *where, ckv_cache, None, *table)
    assert not np.any(kpe_cache)
    page.append_paged_mla_kv_cache_(ckv, kpe, *where, ckv_cache, kpe_cache, *table)
    for cache, new in ((ckv_cache, ckv), (kpe_cache, kpe)):
        np.testing.assert_array_equal(cache[0, 0], new[0])
        np.testing.assert_array_equal(cache[3, 1], new[2])
        assert np.count_nonzero(cache.any(axis=-1)) == 2


# --- bits -------------------------------------------------------------------------------------------------------------


def naive_pack(bits, order):
    out = [0] * ((len(bits) + 7) // 8)
    for i, bit in enumerate(bits):
        out[i // 8] += (1 << (i % 8 if order == "little" else 7 - i % 8)) if bit else 0
    return out


@given(st.lists(st.booleans(), max_size=40), st.sampled_from(["big", "little"]))
@settings(max_examples=80, deadline=None)
def test_packbits(bits, order):
    got = quantization.packbits(np.asarray(bits, dtype=bool), order)
    assert got.dtype == np.uint8 and got.tolist() == naive_pack(bits, order)


def test_trap_12_13_packbits_is_big_endian_by_default_and_casts_to_bool():
    assert quantization.packbits(np.asarray([0.5, 0, 0, -3, 0, 0, 0, 0, 7])).tolist() == [0b10010000, 0b10000000]
    assert quantization.packbits(np.asarray([2, 0, 256], dtype=np.int32), "little").tolist() == [0b101]


@given(st.lists(st.lists(st.booleans(), max_size=19), max_size=6), st.sampled_from(["big", "little"]))
@settings(max_examples=80, deadline=None)
def test_trap_13_segments_start_on_a_byte(segments, order):
    indptr = np.concatenate([[0], np.cumsum([len(s) for s in segments])]).astype(np.int32)
    x = np.asarray([b for s in segments for b in s], dtype=bool)
    packed, new_indptr = quantization.segment_packbits(x, indptr, order)
    assert new_indptr.dtype == np.int32
    assert np.diff(new_indptr).tolist() == [(len(s) + 7) // 8 for s in segments]
    assert packed.tolist() == [byte for s in segments for byte in naive_pack(s, order)]
    back = quantization.unpack_segments(packed, np.diff(indptr), order)
    assert [b.tolist() for b in back] == segments


# --- 8-bit quantisation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["K", "MN"])
@pytest.mark.parametrize("tile", [(1, 4), (3, 4), (2, 5)])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_block_quantisation(mode, tile, power_of_two):
    x = np.random.default_rng(3).normal(size=(7, 11)) * np.logspace(-3, 3, 11)
    q, scale = quantization.quantize_fp8(x, tile, mode, power_of_two=power_of_two)
    assert q.dtype == E4M3 and q.shape == x.shape
    blocks = scale if mode == "K" else scale.T
    assert blocks.shape == (-(-7 // tile[0]), -(-11 // tile[1]))
    for i in range(7):
        for j in range(11):
            rows = slice(i // tile[0] * tile[0], (i // tile[0] + 1) * tile[0])
            cols = slice(j // tile[1] * tile[1], (j // tile[1] + 1) * tile[1])
            s = max(np.abs(x[rows, cols]).max(), 1e-4) / 448
            if power_of_two:
                s = 2.0 ** math.ceil(math.log2(s))
            assert blocks[i // tile[0], j // tile[1]] == pytest.approx(s, rel=1e-12)
            assert float(q[i, j]) == float(np.asarray(x[i, j] / s).astype(E4M3))
    back = quantization.dequantize_fp8(q, scale, tile, mode)
    amax = np.repeat(np.repeat(blocks * 448, tile[0], 0)[:7], tile[1], 1)[:, :11]
    assert np.all(np.abs(back - x) <= np.maximum(np.abs(x) / 16, amax * 2.0**-17))


def test_power_of_two_scales_are_exact():
    values = np.asarray([0.25, 0.250001, 1.0, 1.5, 2.0, 3e-5], dtype=np.float32)
    assert quantization._ceil_power_of_two(values).tolist() == [0.25, 0.5, 1.0, 2.0, 2.0, 2.0**-15]


def test_token_and_block_casts():
    x = np.random.default_rng(4).normal(size=(130, 256)).astype(BF16)
    q, scale = quantization.per_token_cast_to_fp8(x)
    assert q.shape == x.shape and scale.shape == (130, 2) and scale.dtype == np.float32
    q, scale = quantization.per_block_cast_to_fp8(x)
    assert q.shape == x.shape and scale.shape == (2, 2)
    back = quantization.dequantize_fp8(q, scale, (128, 128))
    np.testing.assert_allclose(back, x.astype(np.float32), rtol=2.0**-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [E4M3, E5M2, np.int8])
@pytest.mark.parametrize("ue8m0", [False, True])
def test_per_token_group_quant_8bit(dtype, ue8m0):
    x = np.random.default_rng(5).normal(size=(5, 12))
    x[2, 4:8] = 0
    q, scale = quantization.per_token_group_quant_8bit(x, 4, dst_dtype=dtype, scale_ue8m0=ue8m0)
    limit = {np.dtype(E4M3): 448.0, np.dtype(E5M2): 57344.0, np.dtype(np.int8): 127.0}[np.dtype(dtype)]
    assert q.dtype == dtype and q.shape == x.shape and scale.shape == (5, 3)
    for i in range(5):
        for g in range(3):
            group = x[i, 4 * g : 4 * g + 4]
            s = max(np.abs(group).max(), 1e-10) / limit
            s = 2.0 ** math.ceil(math.log2(s)) if ue8m0 else s
            assert scale[i, g] == pytest.approx(s, rel=1e-12)
            for j, t in enumerate(group):
                t = min(max(t / s, -limit), limit)
                expected = round(t) if dtype is np.int8 else float(np.asarray(t).astype(dtype))
                assert float(q[i, 4 * g + j]) == expected


@pytest.mark.parametrize("aligned", [False, True])
def test_column_major_scales_have_the_same_values(aligned):
    x = np.random.default_rng(6).normal(size=(5, 8)).astype(np.float32)
    q, scale = quantization.per_token_group_quant_8bit(x, 4)
    q2, scale2 = quantization.per_token_group_quant_8bit(x, 4, column_major_scales=True, scale_tma_aligned=aligned)
    np.testing.assert_array_equal(q, q2)
    np.testing.assert_array_equal(scale, scale2)
    assert scale2.shape == (5, 2) and scale2.strides == (4, 4 * (8 if aligned else 5))
