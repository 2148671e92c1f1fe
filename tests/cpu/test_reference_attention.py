"""Reference attention against Python loops in float64. `trap_NN` names the semantic that a test pins down."""

from __future__ import annotations

import math
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_attention import naive, slope

from fi_cupy.reference import attention as ra
from fi_cupy.reference import masks

LN2 = math.log(2.0)


def random_qkv(rng, qo, kv, hq=4, hkv=2, d=4, dv=4, dtype=np.float64):
    return (
        rng.normal(size=(qo, hq, d)).astype(dtype),
        rng.normal(size=(kv, hkv, d)).astype(dtype),
        rng.normal(size=(kv, hkv, dv)).astype(dtype),
    )


def assert_same(got, expected, tol=1e-10):
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        np.testing.assert_allclose(g.astype(np.float64), e, rtol=tol, atol=tol)


# --- the core ---------------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    qo=st.integers(0, 4),
    kv=st.integers(0, 6),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (6, 2)]),
    dv=st.sampled_from([2, 4]),
    causal=st.booleans(),
    window=st.sampled_from([-1, 0, 1, 3]),
    cap=st.sampled_from([0.0, 0.7, 30.0]),
    mode=st.sampled_from(["NONE", "ROPE_LLAMA", "ALIBI"]),
    use_mask=st.booleans(),
    use_sinks=st.booleans(),
    sm_scale=st.sampled_from([None, 0.3]),
)
def test_attention_matches_loops(seed, qo, kv, heads, dv, causal, window, cap, mode, use_mask, use_sinks, sm_scale):
    rng = np.random.default_rng(seed)
    q, k, v = random_qkv(rng, qo, kv, *heads, dv=dv)
    mask = rng.random((qo, kv)) < 0.6 if use_mask else None
    sinks = rng.normal(size=heads[0]) if use_sinks else None
    got = ra.attention(
        q, k, v, causal=causal, window_left=window, logits_soft_cap=cap, pos_encoding_mode=mode, custom_mask=mask,
        sinks=sinks, sm_scale=sm_scale,
    )  # fmt: skip
    expected = naive(
        q, k, v, causal=causal, window_left=window, cap=cap, mode=mode, mask=mask, sinks=sinks, sm_scale=sm_scale
    )
    assert_same(got, expected)


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_left": 2}, {"causal": True, "window_left": 3}])
def test_blocks_of_rows_change_nothing(monkeypatch, options):
    q, k, v = random_qkv(np.random.default_rng(1), 9, 13)
    monkeypatch.setattr(ra, "_BLOCK_ELEMENTS", 4 * 13 * 2)
    assert_same(ra.attention(q, k, v, **options), naive(q, k, v, **options))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_dtype_rule(dtype):
    q, k, v = random_qkv(np.random.default_rng(2), 3, 5, dtype=dtype)
    out, lse = ra.attention(q, k, v)
    assert out.dtype == dtype and lse.dtype == np.float32
    exact = ra.attention(*(t.astype(np.float64) for t in (q, k, v)))
    assert exact[0].dtype == np.float64 and exact[1].dtype == np.float64
    half_ulp = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(out.astype(np.float64), exact[0], rtol=half_ulp, atol=1e-6)
    np.testing.assert_allclose(lse, exact[1], rtol=1e-5, atol=1e-5)


def test_fp8_kv_and_out_dtype():
    rng = np.random.default_rng(3)
    q, k, v = random_qkv(rng, 2, 5, dtype=np.float32)
    k, v = k.astype(ml_dtypes.float8_e4m3fn), v.astype(ml_dtypes.float8_e5m2)
    out, _ = ra.attention(q, k, v, out_dtype=np.float16)
    assert out.dtype == np.float16
    expected, _ = naive(q.astype(np.float64), k.astype(np.float64), v.astype(np.float64))
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=2e-3, atol=1e-3)


def test_inputs_are_not_modified():
    q, k, v = random_qkv(np.random.default_rng(4), 3, 5)
    copies = [t.copy() for t in (q, k, v)]
    ra.attention(q, k, v, causal=True, pos_encoding_mode="ROPE_LLAMA", logits_soft_cap=5.0, v_scale=2.0)
    for t, c in zip((q, k, v), copies, strict=True):
        np.testing.assert_array_equal(t, c)


# --- traps ------------------------------------------------------------------------------------------------------------


def test_trap_01_causal_is_bottom_right_aligned():
    keep = masks.positional_mask(np.arange(2)[:, None], np.arange(5)[None], 2, 5, causal=True)
    assert keep.tolist() == [[True] * 4 + [False], [True] * 5]
    q, k, v = random_qkv(np.random.default_rng(5), 5, 2)
    out, lse = ra.attention(q, k, v, causal=True)  # more queries than keys: the first three rows see nothing
    assert np.all(out[:3] == 0) and np.all(np.isneginf(lse[:3])) and np.all(np.isfinite(lse[3:]))
    assert_same((out, lse), naive(q, k, v, causal=True))


def test_trap_02_lse_is_base_2_of_scaled_scores():
    q, k, v = random_qkv(np.random.default_rng(6), 1, 4, hq=1, hkv=1)
    natural = math.log(sum(math.exp(0.25 * float(q[0, 0] @ k[j, 0])) for j in range(4)))
    _, lse = ra.attention(q, k, v, sm_scale=0.25)
    assert lse[0, 0] == pytest.approx(natural * 1.4426950408889634, rel=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_trap_03_fully_masked_rows_are_zero_and_minus_inf(dtype):
    q, k, v = random_qkv(np.random.default_rng(7), 3, 4, dtype=dtype)
    mask = np.ones((3, 4), dtype=bool)
    mask[1] = False
    out, lse = ra.attention(q, k, v, custom_mask=mask)
    assert np.all(out[1] == 0) and np.all(np.isneginf(lse[1]))
    assert np.all(np.isfinite(out.astype(np.float32))) and np.all(np.isfinite(lse[[0, 2]]))
    out, lse = ra.attention(q, k[:0], v[:0])
    assert np.all(out == 0) and np.all(np.isneginf(lse))


@pytest.mark.filterwarnings("error")
def test_trap_03_extreme_negative_logits_are_not_masked():
    q = np.full((1, 1, 4), 1.0, dtype=np.float32)
    k = np.full((3, 1, 4), -1e6, dtype=np.float32)
    v = np.arange(12, dtype=np.float32).reshape(3, 1, 4)
    out, lse = ra.attention(q, k, v, sm_scale=1.0)
    np.testing.assert_allclose(out[0, 0], v[:, 0].mean(axis=0), rtol=1e-6)
    assert lse[0, 0] == pytest.approx(-4e6 / LN2, rel=1e-6)


def test_trap_04_without_softmax_masked_scores_are_zero_and_chunks_add():
    q, k, v = random_qkv(np.random.default_rng(8), 3, 6)
    variant = SimpleNamespace(score_fn=lambda s, ctx: 1 / (1 + np.exp(-s)), use_softmax=False)
    out, lse = ra.attention(q, k, v, causal=True, variant=variant)
    assert lse is None
    expected = np.zeros_like(out)
    for i in range(3):
        for h in range(4):
            for j in range(6):
                if j + 3 <= 6 + i:
                    s = float(q[i, h] @ k[j, h // 2]) / 2.0
                    expected[i, h] += v[j, h // 2] / (1 + math.exp(-s))
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    parts = [ra.attention(q, k[c], v[c], variant=variant)[0] for c in (slice(0, 2), slice(2, 6))]
    np.testing.assert_allclose(sum(parts), ra.attention(q, k, v, variant=variant)[0], rtol=1e-12)


def test_trap_06_window_is_inclusive_and_applies_without_causal():
    keep = masks.positional_mask(np.arange(3)[:, None], np.arange(5)[None], 3, 5, window_left=1)
    # Rows sit at keys 2, 3, 4: their own, one to the left, and all to the right.
    assert keep.tolist() == [
        [False, True, True, True, True],
        [False, False, True, True, True],
        [False, False, False, True, True],
    ]
    assert masks.positional_mask(np.arange(3)[:, None], np.arange(5)[None], 3, 5) is None
    q, k, v = random_qkv(np.random.default_rng(9), 1, 6)
    decode = ra.single_decode(q[0], k, v, window_left=2)
    assert_same(decode, [t[0] for t in ra.attention(q, k[-3:], v[-3:])])
    np.testing.assert_allclose(ra.single_decode(q[0], k, v, window_left=0)[0], np.repeat(v[-1], 2, axis=0))


@given(st.integers(0, 7), st.integers(0, 9), st.booleans(), st.integers(-1, 4), st.data())
@settings(max_examples=150, deadline=None)
def test_trap_06_kv_range_holds_exactly_the_visible_keys(qo_len, kv_len, causal, window, data):
    start = data.draw(st.integers(0, qo_len))
    stop = data.draw(st.integers(start, qo_len))
    lo, hi = masks.kv_range(start, stop, qo_len, kv_len, causal=causal, window_left=window)
    assert 0 <= lo <= hi <= kv_len
    visible = [
        j
        for j in range(kv_len)
        for i in range(start, stop)
        if (not causal or j + qo_len <= kv_len + i) and (window < 0 or j + qo_len + window >= kv_len + i)
    ]
    assert not visible or (lo <= min(visible) and max(visible) < hi)


def test_trap_07_soft_cap_acts_on_the_scaled_score_before_the_mask():
    q, k, v = random_qkv(np.random.default_rng(10), 2, 3)
    out = ra.attention(10 * q, k, v, logits_soft_cap=2.0, causal=True, sm_scale=0.5)
    assert_same(out, naive(10 * q, k, v, cap=2.0, causal=True, sm_scale=0.5))
    plain = ra.attention(q, k, v)
    for off in (None, 0.0, -1.0):
        assert_same(ra.attention(q, k, v, logits_soft_cap=off), plain)


@pytest.mark.parametrize("heads", [1, 2, 3, 5, 8, 12, 40])
def test_trap_08_alibi_slopes(heads):
    np.testing.assert_allclose(ra.get_alibi_slopes(heads), [slope(h, heads) for h in range(heads)], rtol=1e-6)
    assert ra.get_alibi_slopes(heads).dtype == np.float32


def test_trap_08_alibi_uses_raw_indices():
    q, k, v = random_qkv(np.random.default_rng(11), 2, 6, hq=2)
    raw = ra.attention(q, k, v, pos_encoding_mode="ALIBI", causal=True)
    assert_same(raw, naive(q, k, v, mode="ALIBI", causal=True))
    # The same bias relative to the query's own position shifts every score of a row: same output, another lse.
    slopes = np.asarray([slope(h, 2) for h in range(2)])
    np.testing.assert_allclose(
        ra.attention(
            q, k, v, causal=True,
            variant=SimpleNamespace(
                score_fn=lambda s, c: s + slopes[c.qo_head] * (c.kv_idx - c.qo_idx - c.kv_len + c.qo_len)
            ),
        )[0],
        raw[0],
        rtol=1e-9,
    )  # fmt: skip
    # sm_scale multiplies q k only.
    zero, _ = ra.attention(0 * q, k, v, pos_encoding_mode="ALIBI", sm_scale=1e-3)
    p = np.exp(slopes[0] * np.arange(6))
    np.testing.assert_allclose(zero[0, 0], (p / p.sum()) @ v[:, 0], rtol=1e-6)


def test_trap_09_rope_positions_inside_attention():
    q, k, v = random_qkv(np.random.default_rng(12), 2, 5)
    got = ra.attention(q, k, v, pos_encoding_mode="ROPE_LLAMA", rope_scale=2.0, rope_theta=500.0)
    assert_same(got, naive(q, k, v, mode="ROPE_LLAMA", rope_scale=2.0, rope_theta=500.0))
    # A decode query is at kv_len - 1, so its own key is at distance 0.
    q1 = np.random.default_rng(13).normal(size=(4, 4))
    _, lse = ra.single_decode(q1, k, v, pos_encoding_mode="ROPE_LLAMA", window_left=0)
    np.testing.assert_allclose(lse * LN2, (q1.reshape(2, 2, 4) @ k[-1][..., None]).reshape(4) / 2.0, rtol=1e-9)


def test_trap_11_scales():
    q, k, v = random_qkv(np.random.default_rng(14), 3, 5)
    scaled = ra.attention(q, k, v, q_scale=2.0, k_scale=0.5, v_scale=3.0, sm_scale=0.7)
    plain = ra.attention(q, k, v, sm_scale=0.7)
    assert_same(scaled, (plain[0] * 3.0, plain[1]))  # v_scale leaves the lse alone
    qs, ks, vs = np.asarray([1.0, 2.0, 0.5, 3.0]), np.asarray([0.25, 4.0]), np.asarray([2.0, 5.0])
    got = ra.attention(q, k, v, q_scale=qs, k_scale=ks, v_scale=vs)
    assert_same(got, naive(q * qs[:, None], k * ks[:, None], v * vs[:, None]))


def test_trap_11_fp8_output_saturates():
    q, k, v = random_qkv(np.random.default_rng(15), 1, 3)
    out, _ = ra.attention(q, k, np.full_like(v, 3.0), v_scale=1000.0, out_dtype=ml_dtypes.float8_e4m3fn)
    assert np.all(out.astype(np.float32) == 448.0)


def test_trap_12_custom_mask_replaces_causal_and_joins_the_window():
    rng = np.random.default_rng(16)
    q, k, v = random_qkv(rng, 3, 5)
    mask = rng.random((3, 5)) < 0.7
    got = ra.attention(q, k, v, custom_mask=mask, causal=True, window_left=1)
    assert_same(got, naive(q, k, v, mask=mask, causal=False, window_left=1))


def pack_little(bits):
    """Bit i in byte i // 8, least significant first."""
    out = np.zeros((len(bits) + 7) // 8, dtype=np.uint8)
    for i, bit in enumerate(bits):
        out[i // 8] |= int(bit) << (i % 8)
    return out


def test_trap_12_packed_masks_are_little_endian_and_start_on_a_byte():
    rng = np.random.default_rng(17)
    qo_lens, kv_lens = [2, 3], [5, 3]
    q, k, v = rng.normal(size=(5, 2, 4)), rng.normal(size=(8, 1, 4)), rng.normal(size=(8, 1, 4))
    requests = [rng.random((m, n)) < 0.6 for m, n in zip(qo_lens, kv_lens, strict=True)]
    flat = np.concatenate([m.reshape(-1) for m in requests])
    packed = np.concatenate([pack_little(m.reshape(-1)) for m in requests])
    got = ra.batch_prefill_ragged(q, k, v, np.array([0, 2, 5]), np.array([0, 5, 8]), packed_custom_mask=packed)
    assert_same(got, ra.batch_prefill_ragged(q, k, v, np.array([0, 2, 5]), np.array([0, 5, 8]), custom_mask=flat))
    assert_same([t[2:] for t in got], naive(q[2:], k[5:], v[5:], mask=requests[1]))
    one = ra.single_prefill(q[:2], k[:5], v[:5], packed_custom_mask=pack_little(requests[0].reshape(-1)))
    assert_same(one, [t[:2] for t in got])


def test_trap_15_a_sink_is_unscaled_and_in_the_denominator_only():
    q, k, v = random_qkv(np.random.default_rng(18), 2, 3)
    sinks = np.asarray([0.5, -1.0, 4.0, 0.0])
    got = ra.attention(q, k, v, sinks=sinks, sm_scale=0.1)
    assert_same(got, naive(q, k, v, sinks=sinks, sm_scale=0.1))
    # As a key of score `sink` with a zero value, merged once.
    out, lse = ra.attention(q, k, v, sm_scale=0.1)
    total = np.exp2(lse) + np.exp(sinks)
    np.testing.assert_allclose(got[0], out * (np.exp2(lse) / total)[..., None], rtol=1e-12)
    _, lse = ra.attention(q, k[:0], v[:0], sinks=sinks)
    np.testing.assert_allclose(lse[0], sinks / LN2)


def test_trap_31_multi_item_scoring_mask():
    # prefix of 3, then: delimiter, two tokens, delimiter, one token, delimiter
    item = np.array([0, 1, 2, 0, 1, 0], dtype=np.uint16)
    prefix, kv_len, qo_len = 3, 9, 7
    mask = masks.multi_item_mask(qo_len, kv_len, prefix, item)
    for i in range(qo_len):
        own = i + kv_len - qo_len
        for j in range(kv_len):
            if own < prefix:
                expected = j <= own
            else:
                expected = j <= own and (j < prefix or own < j + int(item[own - prefix]))
            assert mask[i, j] == expected
    assert mask[-1].tolist() == [True] * 3 + [False] * 6  # the last delimiter sees the prefix alone
    rng = np.random.default_rng(19)
    q, k, v = random_qkv(rng, qo_len, kv_len)
    got = ra.batch_prefill_ragged(
        q, k, v, np.array([0, qo_len]), np.array([0, kv_len]), prefix_len_ptr=np.array([prefix], dtype=np.uint32),
        token_pos_in_items_ptr=np.concatenate([item, [0, 0]]), token_pos_in_items_len=8, causal=True,
    )  # fmt: skip
    assert_same(got, naive(q, k, v, mask=mask))


# --- variants ---------------------------------------------------------------------------------------------------------


def test_variant_functions_and_parameters():
    rng = np.random.default_rng(20)
    q, k, v = random_qkv(rng, 3, 5)
    bias = rng.normal(size=(4, 3, 5))
    variant = SimpleNamespace(
        query_fn=lambda x, ctx: x * (1 + ctx.qo_head),
        key_fn=lambda x, ctx: x + ctx.kv_idx,
        score_fn=lambda s, ctx: s + ctx.bias[ctx.qo_head, ctx.qo_idx, ctx.kv_idx] * ctx.gain - ctx.kv_head,
        mask_fn=lambda ctx: (ctx.kv_idx + ctx.qo_idx) % 2 == ctx.batch,
        post_process_fn=lambda out, ctx: out * ctx.qo_idx,
    )
    out, lse = ra.attention(q, k, v, variant=variant, params={"bias": bias, "gain": 2.0}, batch=1, window_left=3)
    for i in range(3):
        for h in range(4):
            visible = [j for j in range(5) if (j + i) % 2 == 1 and j + 3 + 3 >= 5 + i]
            s = {j: float(q[i, h] * (1 + h) @ (k[j, h // 2] + j)) / 2.0 + 2.0 * bias[h, i, j] - h // 2 for j in visible}
            d = sum(math.exp(t) for t in s.values())
            expected = sum(math.exp(t) / d * v[j, h // 2] for j, t in s.items()) * i
            np.testing.assert_allclose(out[i, h], expected, rtol=1e-9, atol=1e-12)
            assert lse[i, h] == pytest.approx(math.log(d) / LN2)


# --- batches ----------------------------------------------------------------------------------------------------------


def paged_batch(rng, kv_lens, page_size, heads, dim, layout, dtype=np.float64):
    """A shuffled page table over a cache that is NaN wherever no token lives, K and V views of one array."""
    pages = [-(-n // page_size) for n in kv_lens]
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    indices = rng.permutation(int(indptr[-1]) + 2)[: indptr[-1]].astype(np.int32)
    last = np.asarray([(n - 1) % page_size + 1 if n else 1 for n in kv_lens], dtype=np.int32)
    shape = (page_size, heads) if layout == "NHD" else (heads, page_size)
    cache = np.full((int(indptr[-1]) + 2, 2, *shape, dim), np.nan).astype(dtype)
    tokens = []
    for b, n in enumerate(kv_lens):
        kv = rng.normal(size=(2, n, heads, dim)).astype(dtype)
        tokens.append(kv)
        for t in range(n):
            page = indices[indptr[b] + t // page_size]
            row = t % page_size
            for which in range(2):
                if layout == "NHD":
                    cache[page, which, row] = kv[which, t]
                else:
                    cache[page, which, :, row] = kv[which, t]
    return cache[:, 0], cache[:, 1], indptr, indices, last, tokens


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 8])
def test_trap_05_27_batch_decode_paged(layout, page_size):
    rng = np.random.default_rng(21)
    kv_lens = [7, 0, 1, 8]
    k, v, indptr, indices, last, tokens = paged_batch(rng, kv_lens, page_size, 2, 4, layout)
    q = rng.normal(size=(4, 4, 4))
    got = ra.batch_decode_paged(q, k, v, indptr, indices, last, kv_layout=layout, window_left=4)
    for b, kv in enumerate(tokens):
        assert_same([t[b : b + 1] for t in got], naive(q[b : b + 1], kv[0], kv[1], window_left=4))
    assert np.all(got[0][1] == 0) and np.all(np.isneginf(got[1][1]))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_trap_28_decode_of_several_tokens_a_request_is_causal(layout):
    rng = np.random.default_rng(22)
    k, v, indptr, indices, last, tokens = paged_batch(rng, [5, 3], 2, 1, 4, layout)
    q = rng.normal(size=(4, 2, 4))
    got = ra.batch_decode_paged(q, k, v, indptr, indices, last, kv_layout=layout, q_len_per_req=2)
    for b, kv in enumerate(tokens):
        rows = slice(2 * b, 2 * b + 2)
        assert_same([t[rows] for t in got], naive(q[rows], kv[0], kv[1], causal=True))


@pytest.mark.parametrize("by_length", [False, True])
def test_batch_prefill_paged_and_ragged(by_length):
    rng = np.random.default_rng(23)
    qo_indptr, kv_lens = np.array([0, 2, 2, 6], dtype=np.int32), [5, 2, 3]
    k, v, indptr, indices, last, tokens = paged_batch(rng, kv_lens, 2, 2, 4, "NHD")
    q = rng.normal(size=(8, 4, 4))  # two rows of padding
    length = {"kv_len_arr": np.asarray(kv_lens)} if by_length else {"last_page_len": last}
    options = {"causal": True, "logits_soft_cap": 3.0, "pos_encoding_mode": "ROPE_LLAMA"}
    got = ra.batch_prefill_paged(q, k, v, qo_indptr, indptr, indices, **length, **options)
    for b, kv in enumerate(tokens):
        rows = slice(qo_indptr[b], qo_indptr[b + 1])
        expected = naive(q[rows], kv[0], kv[1], causal=True, cap=3.0, mode="ROPE_LLAMA")
        assert_same([t[rows] for t in got], expected)
    assert np.all(got[0][6:] == 0) and np.all(np.isneginf(got[1][6:]))
    ragged = [np.concatenate([kv[i] for kv in tokens]) for i in range(2)]
    kv_indptr = np.concatenate([[0], np.cumsum(kv_lens)])
    assert_same(ra.batch_prefill_ragged(q, *ragged, qo_indptr, kv_indptr, **options), got)


def test_empty_batch():
    out, lse = ra.batch_prefill_ragged(
        np.zeros((0, 4, 8), dtype=np.float16), np.zeros((0, 2, 8)), np.zeros((0, 2, 6)), np.array([0]), np.array([0])
    )
    assert out.shape == (0, 4, 6) and lse.shape == (0, 4)


def test_single_decode_and_prefill_layouts():
    rng = np.random.default_rng(24)
    q, k, v = random_qkv(rng, 3, 5, dv=2)
    expected = ra.attention(q, k, v, causal=True)
    hnd = [np.ascontiguousarray(t.swapaxes(0, 1)) for t in (k, v)]
    assert_same(ra.single_prefill(q, *hnd, kv_layout="HND", causal=True), expected)
    assert_same(ra.single_decode(q[2], *hnd, kv_layout="HND"), [t[2] for t in expected])
