"""Sampling on CPU arrays: fixed-point arithmetic, exact thresholds, distributions, random streams and error texts.

`trap_NN` names the semantic a test pins down.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import fi_cupy
from fi_cupy import errors, sampling
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.reference import sampling as rs
from fi_cupy.reference import sampling_filters as sf
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

INF = np.inf


def probs_of(rng, rows, vocab, scale=3.0, dtype="float32"):
    return sf.softmax(normal(rng, (rows, vocab), "float32", scale)).astype(to_dtype(dtype).np)


def assert_frequencies(seen, weights):
    """Counts against relative weights: a chi-square that chance exceeds once in 10^7 (Wilson-Hilferty)."""
    weights = weights.astype(np.float64)
    assert (seen[weights == 0] == 0).all()
    seen, weights = seen[weights > 0], weights[weights > 0]
    expected = seen.sum() * weights / weights.sum()
    dof = len(seen) - 1
    if dof:
        statistic = ((seen - expected) ** 2 / expected).sum()
        z = ((statistic / dof) ** (1 / 3) - (1 - 2 / (9 * dof))) / math.sqrt(2 / (9 * dof))
        assert z < 5.2, (seen, expected)


def test_philox_known_answers():
    assert rs.philox(0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = (1 << 64) - 1
    assert rs.philox(ones, ones, ones, ones) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    # key a4093822 299f31d0, counter 243f6a88 85a308d3 13198a2e 03707344
    got = rs.philox(0x299F31D0A4093822, 0x85A308D3243F6A88, 0x13198A2E, 0x03707344)
    assert got == (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)


def test_exp_fixed_is_exp(rng):
    d = -rng.uniform(0, 25, 200_000).astype(np.float32)
    got = rs.exp_fixed(d, 63).astype(np.float64) / 2.0**63
    want = np.exp(d.astype(np.float64))
    assert np.abs(got / want - 1).max() < 2e-7 + 25 * 2.0**-24 * 1.5
    assert rs.exp_fixed(np.float32([0, -INF]), 43).tolist() == [1 << 43, 0]
    near = -np.logspace(-9, 0, 2000).astype(np.float32)
    assert rs.exp_fixed(near, 43).max() <= 1 << 43


def test_fma_rounds_once(rng):
    a, b, c = (rng.standard_normal(3000).astype(np.float32) * np.exp2(rng.integers(-9, 9, 3000)) for _ in range(3))
    a, b, c = (v.astype(np.float32) for v in (a, b, c))
    c[:1500] = (-a * b)[:1500]  # cancellation
    c[2000:] = np.exp2(np.round(np.log2(np.abs(a * b)))[2000:] + 24)  # near ties
    for x, y, z, got in zip(a, b, c, rs._fma(a, b, c), strict=True):
        exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        below, above = np.nextafter(got, np.float32(-INF)), np.nextafter(got, np.float32(INF))
        error = abs(Fraction(float(got)) - exact)
        assert error <= abs(Fraction(float(below)) - exact) and error <= abs(Fraction(float(above)) - exact)
        if error == abs(Fraction(float(below)) - exact) or error == abs(Fraction(float(above)) - exact):
            assert got.view(np.int32) % 2 == 0


def test_masses_of_probabilities_are_exact_down_to_denormals():
    row = np.float32([2.0**-149, 3 * 2.0**-149, 0, -1])
    assert rs.Probs.mass(row, row.max()).tolist() == [1 << 42, 3 << 42, 0, 0]
    row = np.float32([1.5, 0.75, 2.0**-43, 2.0**-44])
    assert rs.Probs.mass(row, row.max()).tolist() == [3 << 42, 3 << 41, 1, 0]


@given(st.floats(0, 1, width=32, exclude_max=True), st.integers(0, 2**62))
def test_share_is_the_exact_ceiling(p, total):
    exact = Fraction(p) * total
    if p >= 2.0**-40:
        assert rs.share(p, total) == math.ceil(exact)


def test_scaled_is_the_high_product(rng):
    a, b = rng.integers(0, 2**55, 1000).astype(np.uint64), rng.integers(0, 2**63, 1000).astype(np.uint64)
    assert rs.scaled(a, b).tolist() == [(int(x) * 2 * int(y)) >> 64 for x, y in zip(a, b, strict=True)]


counts = st.lists(st.integers(0, 16), min_size=1, max_size=12).filter(any)


@given(counts, st.integers(1, 14), st.integers(0, 64))
@settings(max_examples=200, deadline=None)
def test_trap_16_thresholds_keep_ties(row, k, p):
    x = np.float32([row]) / 64
    exact = [Fraction(float(v)) for v in x[0]]
    limit = Fraction(p, 64)
    in_k = [sum(q > t for q in exact) < k for t in exact]
    in_p = [sum(q for q in exact if q > t) < limit for t in exact]
    if p == 64:
        in_p = [True] * len(row)
    if not any(in_p):
        in_p = [t == max(exact) for t in exact]
    kept_k = sampling.top_k_renorm_probs(x, k)[0] > 0
    kept_p = sampling.top_p_renorm_probs(x, p / 64)[0] > 0
    assert kept_k.tolist() == [a and t > 0 for a, t in zip(in_k, exact, strict=True)]
    assert kept_p.tolist() == [a and t > 0 for a, t in zip(in_p, exact, strict=True)]
    assert (np.isfinite(sampling.top_k_mask_logits(x, k)[0])).tolist() == in_k


@given(counts, st.integers(1, 14), st.integers(1, 64), st.integers(0, 16), st.booleans(), st.integers(0, 2**62))
@settings(max_examples=200, deadline=None)
def test_all_filters_together_are_exact(row, k, p, m, joint, seed):
    """Top-k, top-p of what it left (or of all), min-p: in rational numbers; draws come from what is kept."""
    exact = [Fraction(c, 64) for c in row]
    top = max(exact)
    in_k = [sum(q > t for q in exact) < k for t in exact]
    mass = Fraction(1) if joint else sum(q for q, a in zip(exact, in_k, strict=True) if a)
    rest = [q if a or joint else 0 for q, a in zip(exact, in_k, strict=True)]
    in_p = [p == 64 or sum(q for q in rest if q > t) < Fraction(p, 64) * mass for t in exact]
    in_m = [t >= Fraction(m, 16) * top for t in exact]
    kept = [bool(t) and a and b and c for t, a, b, c in zip(exact, in_k, in_p, in_m, strict=True)]
    x = np.float32([row]) / 64
    from fi_cupy import sampling_launch

    filters = {"top_k": k, "top_p": p / 64, "min_p": m / 16, "joint": joint}
    assert (sampling_launch.filtered_rows("all", "probs", x, *filters.values())[0] > 0).tolist() == kept
    token = sampling_launch.draw_tokens(
        "all", "probs", x, **filters, indices=None, generator=None, seed=seed, offset=None
    )  # fmt: skip
    assert kept[token[0]]


@pytest.mark.parametrize("order", ["top_k_first", "joint"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_trap_17_kept_sets_agree_with_fp64_sorting(rng, dtype, order):
    probs = probs_of(rng, 6, 5000, 4.0, dtype)
    logits = normal(rng, (6, 5000), dtype, 4.0)
    exact = sf.softmax(logits.astype(np.float64))
    for k, p in ((50, 0.9), (5000, 0.7), (3, 0.999), (700, 0.2), (1 << 30, 1.0), (1, 0.0)):
        ks, ps = np.full(6, k), np.full(6, p, np.float32)
        keep = rs.Filter(ks, ps, None, order == "joint")
        for x, domain, dist in ((probs, rs.Probs, probs.astype(np.float64)), (logits, rs.Logits, exact)):
            relative = dist if order == "joint" and domain is rs.Probs else dist / dist.sum(-1, keepdims=True)
            want = sf.top_k_top_p_mask(relative, ks, ps, order)  # type: ignore[arg-type]
            for i in range(6):
                row = x[i].astype(np.float32)
                threshold = keep.threshold(row, domain, i)
                if p == 1.0:
                    assert threshold is None
                    continue
                got = row >= threshold
                # Mass between the two thresholds: none, or less than rounding can move.
                moved = dist[i][got != want[i]].sum()
                near = dist[i][row == row[got].min()].max()
                assert moved == 0 or moved <= 3 * near, (k, p, moved)
                above = relative[i][row > row[got].min()].sum()
                if order == "joint" or k >= 5000:
                    assert above < p + 1e-6 or p == 0


def frequencies(rng, function, row, weights, draws=2500):
    rows = np.broadcast_to(row, (draws, row.size))
    tokens = function(rows, seed=int(rng.integers(1 << 62)))
    assert_frequencies(np.bincount(tokens, minlength=row.size), weights)


@pytest.mark.parametrize(
    "row",
    [
        np.float32([0.1, 0.2, 0.3, 0.4]),
        np.float32([1, 1, 1]),
        np.float32([5]),
        np.float32([0, 0, 7, 0]),
        np.float32([1e-42, 3e-42, 0, 2e-42]),
        np.float32([0.25] * 8 + [0] * 8),
        np.float32([1e30, 1e30, 2e30]),
        np.float32([-1, 0.5, 0.25]),
    ],
    ids=["plain", "flat", "one", "spike", "denormal", "ties", "huge", "negative"],
)
def test_distributions_from_probs(rng, row):
    weights = np.maximum(row.astype(np.float64), 0)
    frequencies(rng, sampling.sampling_from_probs, row, weights)
    p = row / row.max() / 16
    keep = sf.top_k_mask(p[None], 2)[0]
    frequencies(rng, lambda x, seed: sampling.top_k_sampling_from_probs(x, 2, seed=seed), row, weights * keep)
    keep = sf.min_p_mask(p[None], 0.6)[0]
    frequencies(rng, lambda x, seed: sampling.min_p_sampling_from_probs(x, 0.6, seed=seed), row, weights * keep)
    if 0.9 < weights.sum() < 1.1:
        keep = sf.top_p_mask(row[None], 0.65)[0]
        frequencies(rng, lambda x, seed: sampling.top_p_sampling_from_probs(x, 0.65, seed=seed), row, weights * keep)


@pytest.mark.parametrize("offset", [0.0, 1000.0, -50000.0])
def test_distributions_from_logits(rng, offset):
    row = np.float32([0, 1, 2, -INF, 1, -200]) + np.float32(offset)
    dist = np.exp(row.astype(np.float64) - row.max())
    frequencies(rng, sampling.sampling_from_logits, row, np.where(dist < 1e-20, 0, dist))
    for order in ("top_k_first", "joint"):
        keep = sf.top_k_top_p_mask((dist / dist.sum())[None], 3, 0.8, order)[0]  # type: ignore[arg-type]
        frequencies(
            rng,
            lambda x, seed, order=order: sampling.top_k_top_p_sampling_from_logits(
                x, 3, 0.8, filter_apply_order=order, seed=seed
            ),
            row,
            dist * keep,
        )


def test_every_token_of_a_long_row_has_its_interval(rng):
    """The draw as a function of the random bits is monotone, and steps where the exact distribution does."""
    row = normal(rng, (5000,), "float32", 3.0)
    exact = np.cumsum(np.exp(row.astype(np.float64) - row.max()))
    exact /= exact[-1]
    u = np.sort(rng.random(400))
    tokens = [rs.draw_token(row, rs.Logits, None, int(v * 2.0**64)) for v in u]
    assert tokens == sorted(tokens)
    for v, token in zip(u, tokens, strict=True):
        assert (exact[token - 1] if token else 0) - 1e-6 <= v <= exact[token] + 1e-6
    assert exact[rs.draw_token(row, rs.Logits, None, (1 << 64) - 1)] > 1 - 1e-7
    assert rs.draw_token(row, rs.Logits, None, 0) == 0


def test_trap_17_logits_and_probs_draw_the_same(rng):
    logits = normal(rng, (200, 3000), "float32", 3.0)
    probs = sampling.softmax(logits)
    for order in ("top_k_first", "joint"):
        a = sampling.top_k_top_p_sampling_from_logits(logits, 40, 0.8, filter_apply_order=order, seed=3)
        b = sampling.top_k_top_p_sampling_from_probs(probs, 40, 0.8, filter_apply_order=order, seed=3)
        assert (a != b).sum() <= 1  # a draw within rounding of a boundary
    assert (sampling.sampling_from_logits(logits, seed=3) != sampling.sampling_from_probs(probs, seed=3)).sum() <= 1


def test_trap_18_indices_and_streams(rng):
    probs = probs_of(rng, 5, 300)
    indices = np.array([4, 0, 0, 2], np.int64)
    got = sampling.sampling_from_probs(probs, indices, seed=11, offset=8)
    assert got.dtype == np.int64
    assert (got == sampling.sampling_from_probs(probs[indices], seed=11, offset=8)).all()
    # Parameters belong to the output row.
    k = np.array([1, 300, 1, 300], np.int32)
    got = sampling.top_k_sampling_from_probs(probs, k, indices, seed=11)
    assert got[0] == probs[4].argmax() and got[2] == probs[0].argmax()
    seeds, offsets = np.array([5, 6, 5, 7], np.uint64), np.array([0, 4, 0, 4], np.int64)
    batch = sampling.sampling_from_probs(probs[:4], seed=seeds, offset=offsets)
    for i in range(4):
        alone = sampling.sampling_from_probs(probs[i : i + 1], seed=seeds[i : i + 1], offset=offsets[i : i + 1])
        assert alone[0] == batch[i]
    same = np.full((64, 300), 1 / 300, np.float32)
    assert len(set(sampling.sampling_from_probs(same, seed=1).tolist())) > 8  # rows differ under one seed
    assert len(set(sampling.sampling_from_probs(same, seed=np.full(64, 9)).tolist())) == 1
    one = np.array([1], np.int64)
    assert (sampling.sampling_from_probs(same, seed=one) == sampling.sampling_from_probs(same, seed=1)).all()


def test_trap_19_invalid_rows_and_no_filter(rng):
    probs = probs_of(rng, 4, 50)
    probs[1, 7] = np.nan
    probs[2] = 0
    tokens, valid = sampling.top_k_sampling_from_probs(probs, 1 << 30, seed=1, return_valid=True)
    assert valid.dtype == bool and valid.tolist() == [True, False, False, True]
    assert tokens[1] == tokens[2] == 0
    logits = np.full((3, 9), -INF, np.float32)
    logits[1, 4] = -3
    logits[2, 2] = INF
    tokens, valid = sampling.sampling_from_logits(logits, seed=1, return_valid=True)
    assert valid.tolist() == [False, True, True] and tokens.tolist() == [0, 4, 2]
    with pytest.raises(ValueError, match=r"Input probs contains NaN"):
        sampling.sampling_from_probs(probs, check_nan=True)
    assert (sampling.top_k_renorm_probs(probs, 50)[1] == 0).all()
    assert_close(sampling.top_p_renorm_probs(probs, 1.0)[0], probs[0] / probs[0].sum(dtype=np.float64), "float32")


def test_trap_21_temperature_zero_is_uniform():
    logits = np.float32([[1, 2, 3, -INF], [4, 4, 4, 4]])
    assert_close(sampling.softmax(logits, 0.0), np.array([[1, 1, 1, 0], [0.75] * 4]) / 3, "float32")
    mixed = sampling.softmax(logits, np.array([0.0, 2.0], np.float32))
    assert_close(mixed, np.array([[1, 1, 1, 0], [0.75] * 4]) / 3, "float32")


@pytest.mark.parametrize("vocab", [1, 3, 262144])
def test_vocabularies(rng, vocab):
    logits = normal(rng, (1, vocab), "bfloat16", 2.0)
    token = int(sampling.top_k_top_p_sampling_from_logits(logits, 20, 0.95, seed=0)[0])
    assert 0 <= token < vocab
    x = logits.astype(np.float32)[0]
    assert (x > x[token]).sum() < 20


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_renorm_values(rng, dtype):
    probs = probs_of(rng, 5, 700, 2.0, dtype)
    wide = probs.astype(np.float64)
    for k in (1, 20, 700):
        assert_close(sampling.top_k_renorm_probs(probs, k), sf.renormalise(wide, sf.top_k_mask(wide, k)), dtype)
    got = sampling.top_p_renorm_probs(probs, np.full(5, 0.6, np.float32))
    assert got.dtype == probs.dtype
    assert_close(got, sf.renormalise(wide, sf.top_p_mask(wide, np.float32(0.6))), dtype)
    assert sampling.top_k_renorm_prob is sampling.top_k_renorm_probs


def test_trap_20_speculative_counts_and_marginals(rng):
    vocab, n, batch = 4, 2, 3000
    target, draft = probs_of(rng, n + 1, vocab, 1.0), probs_of(rng, n, vocab, 1.0)
    ids = np.stack([rng.choice(vocab, batch, p=q / q.sum(dtype=np.float64)) for q in draft.astype(np.float64)], axis=1)
    ids = ids.astype(np.int32)
    q = np.broadcast_to(draft, (batch, n, vocab)).copy()
    p = np.broadcast_to(target, (batch, n + 1, vocab)).copy()
    accepted, emitted = np.full(batch, 10, np.int32), np.full(batch, 20, np.int32)
    tokens, a, e = sampling.chain_speculative_sampling(q, ids, p, accepted, emitted, seed=int(rng.integers(1 << 60)))
    assert a is accepted and e is emitted
    a, e = a - 10, e - 20
    assert tokens.dtype == np.int32 and (a >= e).all() and a.max() <= n
    for b in range(batch):
        assert (tokens[b, : e[b]] == ids[b, : e[b]]).all() and (tokens[b, e[b] + 1 :] == -1).all()
        assert 0 <= tokens[b, e[b]] < vocab
    # Every emitted token is distributed as the target's.
    assert_frequencies(np.bincount(tokens[:, 0], minlength=vocab), target[0])
    second = tokens[e >= 1, 1]
    assert_frequencies(np.bincount(second, minlength=vocab), target[1])
    expected = np.minimum(draft, target[:n]).sum(-1)
    assert abs(a.mean() - expected.sum()) < 6 * math.sqrt(n / 4 / batch) + 1e-3
    # Strictly: a draft token that the target gives nothing is never taken; equal rows always are.
    point = np.float32([[[0, 1, 0]]]), np.array([[1]], np.int64), np.float32([[[1, 0, 0], [0, 0, 1]]])
    tokens, _, e = sampling.chain_speculative_sampling(*point, seed=4)
    assert tokens.tolist() == [[0, -1]] and e.tolist() == [0] and tokens.dtype == np.int64
    equal = np.float32([[[0, 1, 0]]]), np.array([[1]], np.int32), np.float32([[[0, 1, 0], [0, 0, 1]]])
    assert sampling.chain_speculative_sampling(*equal, seed=4)[0].tolist() == [[1, 2]]


def test_generators(rng):
    torch = pytest.importorskip("torch")
    g = sampling.Generator(5)
    assert sampling.get_seed_and_offset(5, g) == (5, 0) and g.advance(1) == (5, 8)
    probs = probs_of(rng, 8, 500)
    first, second = (sampling.sampling_from_probs(probs, generator=g) for _ in range(2))
    assert (first != second).any()
    assert (
        sampling.sampling_from_probs(probs, generator=sampling.Generator(3))
        == sampling.sampling_from_probs(probs, seed=3)
    ).all()
    numpy_draws = [sampling.sampling_from_probs(probs, generator=np.random.default_rng(1)) for _ in range(2)]
    assert (numpy_draws[0] == numpy_draws[1]).all()
    tensor = torch.from_numpy(probs)
    torch.manual_seed(7)
    first = sampling.sampling_from_probs(tensor)
    torch.manual_seed(7)
    assert (sampling.sampling_from_probs(tensor) == first).all()
    assert (sampling.sampling_from_probs(tensor) != first).any()
    sampling.manual_seed(9)
    first = sampling.sampling_from_probs(probs)
    assert (first == sampling.sampling_from_probs(probs, seed=9)).all()
    with pytest.raises(errors.ArgumentError, match=r"generator is a builtins\.str, expected"):
        sampling.sampling_from_probs(probs, generator="x")


P = np.full((4, 8), 0.125, np.float32)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: sampling.sampling_from_probs(P[0]), errors.ShapeError, "sampling_from_probs: probs is 1-D"),
        (lambda: sampling.sampling_from_probs(P[:, :0]), errors.ShapeError, "expected at least one token"),
        (lambda: sampling.sampling_from_probs(P.astype(int)), errors.DTypeError, "probs has dtype int64"),
        (lambda: sampling.softmax(P.T), errors.LayoutError, "softmax: logits has inner stride"),
        (
            lambda: sampling.top_p_sampling_from_probs(P, np.array(0.5, np.float32)),
            ValueError,
            r"Expected a 1D tensor of shape \(batch_size,\) or scalar.*0-dimensional tensor",
        ),
        (
            lambda: sampling.min_p_sampling_from_probs(P, np.full((4, 1), 0.5, np.float32)),
            ValueError,
            "Expected a 1D tensor or scalar.*got a 2D tensor",
        ),
        (
            lambda: sampling.top_k_sampling_from_probs(P, np.array([1, 2, 3])),
            ValueError,
            "Sampling parameter tensor batch size mismatch: expected length 4 .*got length 3",
        ),
        (lambda: sampling.top_k_sampling_from_probs(P, 0), errors.ArgumentError, "top_k is 0, expected at least 1"),
        (lambda: sampling.top_k_renorm_probs(P, 2.5), errors.ArgumentError, "top_k is 2.5, expected an integer"),
        (lambda: sampling.top_p_renorm_probs(P, 1.5), errors.ArgumentError, "top_p is 1.5, expected 0 to 1"),
        (lambda: sampling.min_p_sampling_from_probs(P, math.nan), errors.ArgumentError, "min_p is nan, expected 0 to"),
        (lambda: sampling.softmax(P, math.nan), errors.ArgumentError, "temperature is nan, expected a number"),
        (
            lambda: sampling.top_k_top_p_sampling_from_probs(P, 2, 0.5, filter_apply_order="x"),
            errors.ArgumentError,
            "filter_apply_order is 'x'",
        ),
        (lambda: sampling.sampling_from_probs(P, offset=4), errors.ArgumentError, "offset is given without seed"),
        (
            lambda: sampling.sampling_from_probs(P, seed=1, generator=sampling.Generator()),
            errors.ArgumentError,
            "seed and generator are both given",
        ),
        (lambda: sampling.sampling_from_probs(P, seed=np.zeros(3, np.int64)), errors.ShapeError, "seed has shape"),
        (lambda: sampling.sampling_from_probs(P, seed=np.zeros(4, np.int32)), errors.DTypeError, "seed has dtype"),
        (lambda: sampling.sampling_from_probs(P, np.array([0, 4])), errors.ArgumentError, r"indices lie in 0 \.\.\. 4"),
        (
            lambda: sampling.chain_speculative_sampling(P[None, :2], np.zeros((1, 2), int), P[None, :2]),
            errors.ShapeError,
            r"target_probs has shape \(1, 2, 8\), expected \(1, 3, 8\)",
        ),
    ],
)
def test_error_texts(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_empty_batches_and_torch_results():
    torch = pytest.importorskip("torch")
    assert sampling.sampling_from_probs(P[:0], seed=1).shape == (0,)
    assert sampling.softmax(P[:0]).shape == (0, 8)
    tokens, valid = sampling.sampling_from_probs(torch.from_numpy(P), seed=1, return_valid=True)
    assert tokens.dtype is torch.int32 and valid.dtype is torch.bool
    assert tokens.numpy().tolist() == fi_cupy.sampling_from_probs(P, seed=1).tolist()
