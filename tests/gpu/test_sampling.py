"""The sampling kernels: tokens equal to the NumPy reference's for the same seed, values against float64."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fi_cupy import sampling, sampling_launch
from fi_cupy.device import device_info
from fi_cupy.reference import sampling as rs
from fi_cupy.reference import sampling_filters as sf
from fi_cupy.sampling_kernels import LaunchShape
from fi_cupy.testing.generators import ROW_KINDS, new_stream, normal, odd_rows, on_gpu, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
DTYPES = ["float32", "bfloat16", "float16"]
INF = np.inf
SEED = int(os.environ["FI_CUPY_TEST_SEED"])  # tests/conftest.py draws it
#: A threshold that no few values of a row sum to, and one that no two values of 8 or 11 bits have as their ratio, up to
#: fp32's rounding.
THIRD, NO_RATIO = float(np.float32(1 / 3)), 0.33336
#: Rows, vocabulary: below a block, one element past a segment, unaligned rows, whole models.
SHAPES = [(5, 1), (7, 3), (9, 130), (6, 1025), (4, 5003), (3, 32000), (2, 128256)]


def check(function, x, expected, **kwargs):
    """GPU tokens of `function` equal the CPU's, twice."""
    device = {k: on_gpu(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
    tokens, valid = function(on_gpu(x), **device, return_valid=True)
    again = function(on_gpu(x), **device)
    want, want_valid = function(x, **kwargs, return_valid=True)
    assert (cupy.asnumpy(valid) == want_valid).all()
    got = cupy.asnumpy(tokens)
    assert got.dtype == want.dtype
    assert (got == want).all(), (
        f"{expected}: rows {np.flatnonzero(got != want)}: {got[got != want]} {want[got != want]}"
    )
    assert (cupy.asnumpy(again) == got).all()


def mixed(rng):
    """Rows of all kinds, in any order."""
    return tuple(map(str, rng.permutation([*ROW_KINDS, "tied"])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_equal_the_reference(rng, dtype, shape):
    rows, vocab = shape
    seed, offset = int(rng.integers(1 << 62)), int(rng.integers(1 << 40))
    logits, probs = (odd_rows(rng, rows, vocab, dtype, x, mixed(rng)) for x in (True, False))
    at = {"seed": seed, "offset": offset}
    check(sampling.sampling_from_logits, logits, "logits", **at)
    check(sampling.sampling_from_probs, probs, "probs", **at)
    check(sampling.min_p_sampling_from_probs, probs, "min_p", min_p=0.05, **at)
    ks = rng.choice([1, 2, 5, 20, 50, 1500, 1 << 30], rows).astype(rng.choice([np.int32, np.int64]))
    ps = rng.choice([0.0, 0.1, 0.5, 0.9, 0.999, 1.0], rows).astype(rng.choice([np.float32, np.float64]))
    check(sampling.top_k_sampling_from_probs, probs, f"top_k {ks}", top_k=ks, **at)
    check(sampling.top_p_sampling_from_probs, probs, f"top_p {ps}", top_p=ps, **at)
    for order in ("top_k_first", "joint"):
        both = {"top_k": ks, "top_p": ps, "filter_apply_order": order, **at}
        check(sampling.top_k_top_p_sampling_from_logits, logits, f"logits {order} {ks} {ps}", **both)
        check(sampling.top_k_top_p_sampling_from_probs, probs, f"probs {order} {ks} {ps}", **both)
    check(sampling.top_k_top_p_sampling_from_logits, logits, "scalars", top_k=40, top_p=0.8, **at)


#: Every kernel is compiled for each of them: bfloat16, whose rows have other blocks, takes some.
LAUNCH_SHAPES = [
    ("float32", LaunchShape(256, 1, 4)), ("float32", LaunchShape(512, 1, 1)), ("float32", LaunchShape(512, 2, 2)),
    ("float32", LaunchShape(1024, 2, 1)), ("float32", LaunchShape(256, 8, 4)), ("float32", LaunchShape(256, 16, 4)),
    ("bfloat16", LaunchShape(512, 1, 2)), ("bfloat16", LaunchShape(1024, 2, 1)), ("bfloat16", LaunchShape(256, 8, 4)),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "shape"), LAUNCH_SHAPES, ids=lambda x: getattr(x, "tag", x))
def test_every_launch_shape_gives_the_same(rng, dtype, shape, monkeypatch):
    """As the reference, and softmax, which it bounds only, as the shape that is chosen: all sizes in one test, since
    they share its kernels.
    """
    if shape.min_arch > device_info(0).code_number:
        pytest.skip(f"{shape.tag} needs sm_{shape.min_arch}")

    def given(kind, rows, vocab, device):
        holds = shape.cluster > 1 and kind in ("softmax", "renorm")
        return shape._replace(cluster=max(shape.cluster, 8), hold=True) if holds else shape

    chosen = sampling_launch.launch_shape
    for size in ((5, 5003), (10, 40000), (5, 128256)):
        logits, probs = (odd_rows(rng, *size, dtype, x, mixed(rng)) for x in (True, False))
        device_logits, device_probs = on_gpu(logits), on_gpu(probs)
        monkeypatch.setattr(sampling_launch, "launch_shape", chosen)
        bits = cupy.asnumpy(sampling.softmax(device_logits))
        monkeypatch.setattr(sampling_launch, "launch_shape", given)
        at = {"seed": int(rng.integers(1 << 62))}
        check(sampling.sampling_from_logits, logits, "logits", **at)
        check(sampling.sampling_from_probs, probs, "probs", **at)
        check(sampling.min_p_sampling_from_probs, probs, "min_p", min_p=0.05, **at)
        check(sampling.top_p_sampling_from_probs, probs, "top_p", top_p=0.9, **at)
        check(sampling.top_k_sampling_from_probs, probs, "top_k", top_k=50, **at)
        for k, p, order in ((50, 0.9, "top_k_first"), (3000, 0.5, "joint"), (1 << 30, 0.9, "joint")):
            both = {"top_k": k, "top_p": p, "filter_apply_order": order, **at}
            check(sampling.top_k_top_p_sampling_from_logits, logits, f"logits {k} {p} {order}", **both)
            check(sampling.top_k_top_p_sampling_from_probs, probs, f"probs {k} {p} {order}", **both)
        for f, x, moved, parameter in (
            (sampling.top_k_renorm_probs, probs, device_probs, 50),
            (sampling.top_p_renorm_probs, probs, device_probs, 0.9),
            (sampling.top_k_mask_logits, logits, device_logits, 50),
        ):
            got, want = to_float64(f(moved, parameter)), f(x, parameter).astype(np.float64)
            assert ((got == 0) == (want == 0)).all(), (size, f.__name__)
            assert_close(got, want, dtype)
        got = cupy.asnumpy(sampling.softmax(device_logits))
        assert_close(got.astype(np.float64), sf.softmax(logits.astype(np.float64)), "float32")
        assert (got == bits).all(), size


def test_many_rows_of_one_launch(rng):
    logits = normal(rng, (700, 1000), "float32", 3.0)
    check(sampling.sampling_from_logits, logits, "logits", seed=3)
    check(sampling.top_k_top_p_sampling_from_logits, logits, "top_k_top_p", top_k=50, top_p=0.9, seed=3)
    long = normal(rng, (40, 32000), "bfloat16", 3.0)  # two waves of clusters
    check(sampling.sampling_from_logits, long, "logits", seed=3)
    check(sampling.top_k_top_p_sampling_from_logits, long, "top_k_top_p", top_k=50, top_p=0.9, seed=3)


@pytest.mark.parametrize("logits", [True, False])
def test_masses_are_the_reference_masses(rng, logits):
    """Many draws from one row step through the whole cumulative distribution."""
    row = odd_rows(rng, 1, 4000, "float32", logits)
    function = sampling.sampling_from_logits if logits else sampling.sampling_from_probs
    draws = 4000
    got = cupy.asnumpy(function(on_gpu(row), cupy.zeros(draws, cupy.int32), seed=11))
    domain = rs.Logits if logits else rs.Probs
    want = [rs.draw_token(row[0], domain, None, rs.bits64(11, 0, i, 0)) for i in range(draws)]
    assert (got == want).all()


@pytest.mark.parametrize("vocab", [262144, 524288])
def test_large_vocabularies(rng, vocab):
    logits = normal(rng, (2, vocab), "bfloat16", 2.0)
    check(sampling.top_k_top_p_sampling_from_logits, logits, "top_k", top_k=20, top_p=0.95, seed=1)
    check(sampling.top_k_top_p_sampling_from_logits, logits, "top_p", top_k=1 << 30, top_p=0.95, seed=1)
    check(sampling.sampling_from_logits, logits, "plain", seed=1)


@pytest.mark.older_archs
def test_trap_18_indices_and_streams(rng):
    probs = odd_rows(rng, 6, 700, "float32", False)
    for kind in (np.int32, np.int64):
        indices = np.array([5, 0, 0, 3, 2], kind)
        ks = np.array([1, 700, 3, 1, 10], np.int32)
        check(sampling.top_k_sampling_from_probs, probs, "indices", top_k=ks, indices=indices, seed=5, offset=4)
    outside = cupy.asarray([0, 6, -1, 2])
    tokens, valid = sampling.sampling_from_probs(on_gpu(probs), outside, seed=1, return_valid=True)
    assert valid.tolist() == [True, False, False, True] and tokens[1] == tokens[2] == 0
    seeds = rng.integers(0, 1 << 63, 6).astype(np.uint64)
    offsets = rng.integers(0, 1 << 40, 6).astype(np.int64)
    check(sampling.sampling_from_probs, probs, "arrays", seed=seeds, offset=offsets)
    check(sampling.sampling_from_probs, probs, "one seed", seed=seeds[:1], offset=offsets)
    check(sampling.sampling_from_probs, probs, "one offset", seed=seeds, offset=7)
    batch = cupy.asnumpy(sampling.sampling_from_probs(on_gpu(probs), seed=on_gpu(seeds), offset=on_gpu(offsets)))
    order = rng.permutation(6)
    moved = sampling.sampling_from_probs(on_gpu(probs[order]), seed=on_gpu(seeds[order]), offset=on_gpu(offsets[order]))
    assert (cupy.asnumpy(moved) == batch[order]).all()


def test_trap_19_invalid_rows(rng):
    for dtype in DTYPES:
        probs = odd_rows(rng, 6, 3000, dtype, False)
        probs[1, 2999] = np.nan
        probs[2] = 0
        probs[3, :] = np.nan
        probs[4, 7] = -1
        check(sampling.sampling_from_probs, probs, "probs", seed=1)
        check(sampling.top_k_top_p_sampling_from_probs, probs, "top_k_top_p", top_k=9, top_p=0.7, seed=1)
        check(sampling.min_p_sampling_from_probs, probs, "min_p", min_p=0.1, seed=1)
        with pytest.raises(ValueError, match="Input probs contains NaN"):
            sampling.sampling_from_probs(on_gpu(probs), check_nan=True, seed=1)
        sampling.sampling_from_probs(on_gpu(probs[4:]), check_nan=True, seed=1)
        renormed = to_float64(sampling.top_k_renorm_probs(on_gpu(probs), 5))
        assert (renormed[1:4] == 0).all()
        logits = odd_rows(rng, 5, 3000, dtype, True)
        logits[0] = -INF
        logits[1, 17] = INF
        logits[2, 0] = np.nan
        check(sampling.sampling_from_logits, logits, "logits", seed=1)
        check(sampling.top_k_top_p_sampling_from_logits, logits, "top_k", top_k=1600, top_p=0.9, seed=1)
        masked = to_float64(sampling.top_k_mask_logits(on_gpu(logits), 5))
        assert np.isneginf(masked[[0, 2]]).all()


def test_denormal_and_huge_probabilities(rng):
    base = rng.integers(0, 9, (4, 2000)).astype(np.float32)
    for scale in (2.0**-149, 2.0**-130, 2.0**100, 3e-39):
        probs = base * np.float32(scale)
        check(sampling.sampling_from_probs, probs, f"scale {scale}", seed=2)
        check(sampling.top_k_sampling_from_probs, probs, f"scale {scale}", top_k=300, seed=2)
        check(sampling.top_k_top_p_sampling_from_probs, probs, f"scale {scale}", top_k=900, top_p=0.4, seed=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_filters_of_rows(rng, dtype, shape):
    rows, vocab = shape
    probs, logits = (odd_rows(rng, rows, vocab, dtype, x, mixed(rng)) for x in (False, True))
    ks = rng.choice([1, 3, 20, 50, 1500, 1 << 30], rows).astype(np.int32)
    ps = rng.choice([0.1, 0.5, 0.9, 1.0], rows).astype(np.float32)
    for function, x, param in (
        (sampling.top_k_renorm_probs, probs, ks),
        (sampling.top_p_renorm_probs, probs, ps),
        (sampling.top_k_mask_logits, logits, ks),
    ):
        got = to_float64(function(on_gpu(x), on_gpu(param)))
        want = function(x, param)  # the same kept set
        assert ((got == 0) == (want == 0)).all()
        assert_close(got, want.astype(np.float64), dtype)
    wide = probs.astype(np.float64)
    exact = sf.renormalise(wide, sf.top_k_mask(wide, ks))
    assert_close(to_float64(sampling.top_k_renorm_probs(on_gpu(probs), on_gpu(ks))), exact, dtype)
    masked = to_float64(sampling.top_k_mask_logits(on_gpu(logits), on_gpu(ks)))
    kept = sf.top_k_mask(logits, ks)
    assert (masked == np.where(kept, logits.astype(np.float64), -INF)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(rng, dtype, shape):
    logits = odd_rows(rng, *shape, dtype, True)
    wide = logits.astype(np.float64)
    assert_close(to_float64(sampling.softmax(on_gpu(logits))), sf.softmax(wide), "float32")
    assert_close(to_float64(sampling.softmax(on_gpu(logits), 0.7)), sf.softmax(wide, np.float64(0.7)), "float32")
    for kind in (np.float32, np.float64):
        t = rng.choice([0.0, 0.5, 1.0, 3.0], shape[0]).astype(kind)
        got = sampling.softmax(on_gpu(logits), on_gpu(t), enable_pdl=True)
        assert got.dtype == np.float32
        assert_close(to_float64(got), sf.softmax(wide, t), "float32")
        assert (cupy.asnumpy(sampling.softmax(on_gpu(logits), on_gpu(t))) == cupy.asnumpy(got)).all()


@pytest.mark.older_archs
def test_trap_21_softmax_special_rows():
    logits = np.full((3, 2500), -INF, np.float32)
    logits[1, :4] = [1, 2, 3, 4]
    logits[2, 5] = np.nan
    got = cupy.asnumpy(sampling.softmax(on_gpu(logits), 0.0))
    assert (got[0] == 0).all() and np.isnan(got[2]).all()
    assert (got[1, :4] == 0.25).all() and (got[1, 4:] == 0).all()
    small = np.float32([[0, -95, -100]])
    assert_close(
        to_float64(sampling.softmax(on_gpu(small)))[:, 1:] * 1e41, np.exp([[-95.0, -100.0]]) * 1e41, "bfloat16"
    )


def test_strided_rows(rng):
    for dtype in DTYPES:
        base = on_gpu(normal(rng, (8, 3100), dtype, 3.0))
        view = base[::2, 37:3037]
        host = cupy.asnumpy(base)[::2, 37:3037]
        got = sampling.top_k_top_p_sampling_from_logits(view, 50, 0.9, seed=6)
        assert (cupy.asnumpy(got) == sampling.top_k_top_p_sampling_from_logits(host, 50, 0.9, seed=6)).all()
        assert_close(to_float64(sampling.softmax(view)), sf.softmax(host.astype(np.float64)), "float32")
        padded = base[:, :3001]  # aligned rows, a vocabulary that is no whole vector
        got = sampling.sampling_from_logits(padded, seed=6)
        assert (cupy.asnumpy(got) == sampling.sampling_from_logits(cupy.asnumpy(padded), seed=6)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 5, 40])
def test_chain_speculative(rng, dtype, n):
    batch, vocab = 12, 1500
    kind = normal(rng, (1,), dtype).dtype
    target = sf.softmax(normal(rng, (batch * (n + 1), vocab), "float32", 2.0)).reshape(batch, n + 1, vocab)
    draft = target[:, :n] * rng.uniform(0.7, 1.3, (batch, n, vocab)).astype(np.float32)
    draft[::3] = target[::3, :n]
    target, draft = target.astype(kind), draft.astype(kind)
    ids = np.argmax(draft.astype(np.float32), axis=-1).astype(rng.choice([np.int32, np.int64]))
    ids[1:2, :1] = vocab  # out of range: rejected
    if n:
        draft[2, 0], target[2, 0], ids[2, 0] = 0.001, 0, 3  # nothing to draw from: token 0
    args = (draft, ids, target)
    for seed in (5, rng.integers(0, 1 << 62, batch)):
        device = on_gpu(seed) if isinstance(seed, np.ndarray) else seed
        counters = cupy.full(batch, 7, cupy.int32), cupy.full(batch, 9, cupy.int32)
        got = sampling.chain_speculative_sampling(*map(on_gpu, args), *counters, seed=device, offset=8)
        fresh = sampling.chain_speculative_sampling(*map(on_gpu, args), seed=device, offset=8)
        want = sampling.chain_speculative_sampling(*args, seed=seed, offset=8)
        assert got[1] is counters[0]
        for g, f, w, start in zip(got, fresh, want, (0, 7, 9), strict=True):
            assert g.dtype == w.dtype
            assert (cupy.asnumpy(g) - start == w).all() and (cupy.asnumpy(f) == w).all()


def test_graph_replay_draws_fresh_tokens(rng):
    rows = 64
    logits = on_gpu(normal(rng, (rows, 2000), "float32", 3.0))
    seed, offset = cupy.asarray(rng.integers(0, 1 << 62, rows)), cupy.zeros(1, cupy.int64)
    sampling.top_k_top_p_sampling_from_logits(logits, 50, 0.9, seed=seed, offset=offset)
    stream = new_stream()
    seen = []
    with stream:
        sampling.top_k_top_p_sampling_from_logits(logits, 50, 0.9, seed=seed, offset=offset)  # memory for the capture
        offset += 0  # the addition is compiled before the capture
        stream.synchronize()
        stream.begin_capture()
        tokens = sampling.top_k_top_p_sampling_from_logits(logits, 50, 0.9, seed=seed, offset=offset)
        offset += 4
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch()
            stream.synchronize()
            seen.append(cupy.asnumpy(tokens))
    assert int(offset[0]) == 12
    for step, got in enumerate(seen):
        want = sampling.top_k_top_p_sampling_from_logits(
            cupy.asnumpy(logits), 50, 0.9, seed=cupy.asnumpy(seed), offset=4 * step
        )
        assert (got == want).all()
    assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()


def million(row, function, **kwargs):
    """Counts of 2^20 draws from one row."""
    draws = 1 << 20
    tokens = function(on_gpu(row[None]), indices=cupy.zeros(draws, cupy.int32), seed=SEED + 12345, **kwargs)
    return cupy.asnumpy(cupy.bincount(tokens, minlength=row.size))


def assert_frequencies(seen, weights):
    """Chi-square that chance exceeds about once in 10^7 (Wilson-Hilferty), over tokens expected 20 times or more."""
    weights = weights / weights.sum()
    assert (seen[weights == 0] == 0).all()
    expected = weights * seen.sum()
    often = expected >= 20
    e = np.append(expected[often], expected[~often].sum() + 1e-9)
    s = np.append(seen[often], seen[~often].sum())
    keep = e >= 20
    e, s = e[keep], s[keep]
    dof = max(len(e) - 1, 1)
    z = (((s - e) ** 2 / e).sum() / dof) ** (1 / 3) - (1 - 2 / (9 * dof))
    assert z / np.sqrt(2 / (9 * dof)) < 5.2


def adversarial_rows(rng, dtype="float32"):
    """Logits that draws may trip over, of a type."""
    spike = np.zeros(1500, np.float32)
    spike[700] = 12
    holes = normal(rng, (1300,), "float32", 1.0)
    holes[rng.random(1300) < 0.5] = -INF
    holes[0] = 1
    rows = {
        "ties": np.round(normal(rng, (2000,), "float32", 1.5) * 4) / 4, "spike": spike, "holes": holes,
        "one": np.float32([0.5]), "three": np.float32([0, 1, 2]), "flat": np.zeros(1025, np.float32),
        "normal": normal(rng, (2000,), "float32", 1.5),
    }  # fmt: skip
    return {name: row.astype(normal(rng, (1,), dtype).dtype) for name, row in rows.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_distributions_by_chi_square(rng, dtype):
    """Native input of every type: rounded to bfloat16 most values of a row stand there many times."""
    for row in adversarial_rows(rng, dtype).values():
        dist = sf.softmax(row[None].astype(np.float64))
        probs = dist[0].astype(row.dtype)
        assert_frequencies(million(row, sampling.sampling_from_logits), dist[0])
        assert_frequencies(million(probs, sampling.sampling_from_probs), probs.astype(np.float64))
        for order in ("top_k_first", "joint"):
            keep = sf.top_k_top_p_mask(dist, 300, THIRD, order)[0]
            seen = million(row, sampling.top_k_top_p_sampling_from_logits, top_k=300, top_p=THIRD,
                           filter_apply_order=order)  # fmt: skip
            assert_frequencies(seen, dist[0] * keep)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_filtered_distributions_by_chi_square(rng, dtype):
    for name, row in adversarial_rows(rng, dtype).items():
        probs = sf.softmax(row[None].astype(np.float64))[0].astype(row.dtype)
        wide = probs[None].astype(np.float64)
        for function, keep, parameters in (
            (sampling.top_k_sampling_from_probs, sf.top_k_mask(wide, 40), {"top_k": 40}),
            (sampling.top_p_sampling_from_probs, sf.top_p_mask(wide, THIRD), {"top_p": THIRD}),
            (sampling.min_p_sampling_from_probs, sf.min_p_mask(wide, NO_RATIO), {"min_p": NO_RATIO}),
            (
                sampling.top_k_top_p_sampling_from_probs, sf.top_k_top_p_mask(wide, 40, THIRD, "joint"),
                {"top_k": 40, "top_p": THIRD, "filter_apply_order": "joint"},
            ),
        ):  # fmt: skip
            assert keep.any(), name
            assert_frequencies(million(probs, function, **parameters), wide[0] * keep[0])


def test_distributions_of_denormals_and_a_huge_vocabulary(rng):
    tiny = (rng.integers(0, 9, 1500) * 2.0**-149).astype(np.float32)
    keep = sf.top_k_mask(tiny[None].astype(np.float64), 300)[0]
    assert_frequencies(million(tiny, sampling.sampling_from_probs), tiny.astype(np.float64))
    seen = million(tiny, sampling.top_k_sampling_from_probs, top_k=300)
    assert_frequencies(seen, tiny.astype(np.float64) * keep)
    row = normal(rng, (262144,), "bfloat16", 4.0)
    dist = sf.softmax(row[None].astype(np.float64))
    assert_frequencies(million(row, sampling.sampling_from_logits), dist[0])
    keep = sf.top_k_top_p_mask(dist, 1 << 30, THIRD, "joint")[0]
    seen = million(row, sampling.top_k_top_p_sampling_from_logits, top_k=1 << 30, top_p=THIRD)
    assert_frequencies(seen, dist[0] * keep)


def test_speculative_marginals_by_chi_square(rng):
    """A million chains: every emitted token is distributed as the target's, however far off the draft is."""
    draws, n, vocab = 1 << 20, 2, 7
    target, draft = (sf.softmax(normal(rng, (n + 1, vocab), "float32", 1.5)) for _ in range(2))
    draft[0, 3], target[1, 2] = 0, 0
    target, draft = (x / x.sum(-1, keepdims=True) for x in (target, draft))
    cumulative = np.cumsum(draft[:n].astype(np.float64), axis=-1)
    u = rng.random((draws, n, 1)) * cumulative[:, -1:]
    ids = (u > cumulative).sum(-1).astype(np.int32)
    p = cupy.broadcast_to(on_gpu(target), (draws, n + 1, vocab)).copy()
    q = cupy.broadcast_to(on_gpu(draft[:n]), (draws, n, vocab)).copy()
    tokens, accepted, emitted = (
        cupy.asnumpy(x) for x in sampling.chain_speculative_sampling(q, on_gpu(ids), p, seed=int(rng.integers(1 << 62)))
    )
    for position in range(n + 1):
        reached = emitted >= position
        assert_frequencies(np.bincount(tokens[reached, position], minlength=vocab), target[position].astype(np.float64))
        assert (tokens[~reached, position] == -1).all() or position == 0
    # The chance of acceptance at each position is the overlap of both distributions.
    overlap = np.minimum(draft[:n], target[:n]).astype(np.float64).sum(-1)
    assert abs(accepted.mean() - overlap.sum()) < 6 * np.sqrt(n / 4 / draws) and (accepted >= emitted).all()
    share = (emitted == n).mean()
    assert abs(share - overlap.prod()) < 6 * np.sqrt(0.25 / draws)


#: Around segments and vectors; larger ones are those of SHAPES, whose kernels are there.
VOCABS = st.one_of(st.integers(1, 3000), st.sampled_from([1023, 1024, 1025, 8191, 32000]))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**62), rows=st.integers(0, 9), vocab=VOCABS, dtype=st.sampled_from(DTYPES),
    top_k=st.one_of(st.integers(1, 60), st.sampled_from([1500, 1 << 30])), top_p=st.floats(0, 1, width=32),
    min_p=st.floats(0, 1, width=32), order=st.sampled_from(["top_k_first", "joint"]), offset=st.integers(0, 2**40),
    as_arrays=st.booleans(), kinds=st.permutations(ROW_KINDS),
)  # fmt: skip
def test_any_shape_and_parameters_draw_the_reference_tokens(
    seed, rows, vocab, dtype, top_k, top_p, min_p, order, offset, as_arrays, kinds
):
    rng = np.random.default_rng(seed)
    at = {"seed": seed, "offset": offset}
    if as_arrays:
        at = {"seed": rng.integers(0, 1 << 62, rows), "offset": rng.integers(0, 1 << 40, rows)}
        top_k, top_p = np.full(rows, top_k, np.int32), np.full(rows, top_p, np.float32)
        min_p = np.full(rows, min_p, np.float32)
    for logits in (True, False):
        x = odd_rows(rng, rows, vocab, dtype, logits, kinds)
        ends = "logits" if logits else "probs"
        both = {"top_k": top_k, "top_p": top_p, "filter_apply_order": order, **at}
        check(getattr(sampling, f"sampling_from_{ends}"), x, "plain", **at)
        check(getattr(sampling, f"top_k_top_p_sampling_from_{ends}"), x, f"{top_k} {top_p} {order}", **both)
    check(sampling.min_p_sampling_from_probs, x, f"min_p {min_p}", min_p=min_p, **at)
    check(sampling.top_p_sampling_from_probs, x, f"top_p {top_p}", top_p=top_p, **at)


def test_frameworks(rng):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    probs = odd_rows(rng, 8, 900, "float32", False)
    tensor = torch.from_numpy(probs).cuda()
    tokens, valid = sampling.top_p_sampling_from_probs(tensor, 0.9, seed=4, return_valid=True)
    assert tokens.dtype is torch.int32 and valid.dtype is torch.bool
    assert (tokens.cpu().numpy() == sampling.top_p_sampling_from_probs(probs, 0.9, seed=4)).all()
    generator = torch.Generator("cuda").manual_seed(31)
    start = generator.get_state().view(torch.int64)[1].item()
    first = sampling.sampling_from_probs(tensor, generator=generator)
    assert generator.get_state().view(torch.int64)[1].item() == start + 4
    assert (first.cpu().numpy() == sampling.sampling_from_probs(probs, seed=31, offset=start)).all()
    assert (sampling.sampling_from_probs(tensor, generator=generator) != first).any()
