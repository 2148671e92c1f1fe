"""Rotary embedding on CPU arrays, and the fixed-point angles that the kernel uses."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from fi_cupy import errors, rope, rope_kernel
from fi_cupy.dtypes import bfloat16, int32
from fi_cupy.reference import rope as reference
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close


def naive(x, positions, freq, interleave=False):
    """Complex multiplication, one pair at a time."""
    out = x.astype(np.float64)
    half = len(freq)
    for t, position in enumerate(positions):
        for i, f in enumerate(freq):
            a, b = (2 * i, 2 * i + 1) if interleave else (i, i + half)
            z = (out[t, :, a] + 1j * out[t, :, b]) * np.exp(1j * int(position) * f)
            out[t, :, a], out[t, :, b] = z.real, z.imag
    return out


def plain(dim, scale=1.0, theta=1e4):
    return [theta ** (-2 * i / dim) / scale for i in range(dim // 2)]


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("rotary_dim", [None, 8])
def test_pos_ids_in_place_and_not(rng, dtype, interleave, rotary_dim):
    q, k = normal(rng, (5, 4, 16), dtype), normal(rng, (5, 2, 16), dtype)
    pos = rng.integers(0, 1000, 5, dtype=np.int32)
    freq = plain(rotary_dim or 16, 2.0, 5e3)
    want = naive(q, pos, freq, interleave), naive(k, pos, freq, interleave)
    got = rope.apply_rope_pos_ids(q, k, pos, rotary_dim, interleave, 2.0, 5e3)
    assert rope.apply_rope_pos_ids_inplace(q, k, pos.astype(np.int64), rotary_dim, interleave, 2.0, 5e3) is None
    for a, b, w in zip(got, (q, k), want, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, w, dtype)
        assert (a == b).all()


def test_trap_22_segment_positions_start_at_the_offsets(rng):
    q, k = normal(rng, (7, 2, 8), "float32"), normal(rng, (7, 1, 8), "float32")
    indptr, offsets = np.array([1, 3, 3, 6]), np.array([10, 99, 200])
    positions = [0, 10, 11, 200, 201, 202, 0]
    got = rope.apply_rope(q, k, indptr, offsets)
    assert_close(got[0], naive(q, positions, plain(8)), "float32")
    assert_close(got[1], naive(k, positions, plain(8)), "float32")
    rope.apply_rope_inplace(q, k, indptr, offsets)
    assert (q == got[0]).all() and (k == got[1]).all()


def test_llama31_blends_frequencies(rng):
    def blended(dim, scale, theta, low, high, old):
        out = []
        for f in plain(dim, 1.0, theta):
            smooth = min(max((old * f / (2 * math.pi) - low) / (high - low), 0.0), 1.0)
            out.append((1 - smooth) * f / scale + smooth * f)
        return out

    q, k = normal(rng, (3, 2, 64), "float32"), normal(rng, (3, 1, 64), "float32")
    pos = np.array([5, 9000, 100_000])
    got = rope.apply_llama31_rope_pos_ids(q, k, pos)
    assert_close(got[0], naive(q, pos, blended(64, 8.0, 5e5, 1.0, 4.0, 8192)), "float32")
    by_segment = rope.apply_llama31_rope(q, k, np.array([0, 1, 2, 3]), pos)
    assert (by_segment[1] == got[1]).all()
    options = (64, False, 4.0, 1e4, 2.0, 8.0, 2048)
    want = naive(k, pos, blended(64, 4.0, 1e4, 2.0, 8.0, 2048))
    assert_close(rope.apply_llama31_rope_pos_ids(q, k, pos, *options)[1], want, "float32")
    rope.apply_llama31_rope_inplace(q.copy(), k, np.array([0, 1, 2, 3]), pos, *options)
    assert_close(k, want, "float32")


@pytest.mark.parametrize("is_neox", [True, False])
def test_cos_sin_cache(rng, is_neox):
    freq = plain(8)
    angles = np.arange(30)[:, None] * np.array(freq)
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    q, k, pos = normal(rng, (4, 3 * 12), "float16"), normal(rng, (4, 12), "float16"), np.array([0, 29, 7, 7])
    want = [naive(x.reshape(4, -1, 12), pos, freq, not is_neox).reshape(x.shape) for x in (q, k)]
    got = rope.apply_rope_with_cos_sin_cache(pos, q, k, 12, table, is_neox)
    rope.apply_rope_with_cos_sin_cache_inplace(pos, q, k, 12, table, is_neox)
    for a, b, w in zip(got, (q, k), want, strict=True):
        assert_close(a, w, "float16")
        assert (a == b).all()


def test_views_of_a_fused_tensor(rng):
    qkv = normal(rng, (3, 6, 8), "float32")
    before, pos = qkv.copy(), np.array([3, 1, 2])
    rope.apply_rope_pos_ids_inplace(qkv[:, :3], qkv[:, 3:5], pos)
    assert_close(qkv[:, :5], naive(before[:, :5], pos, plain(8)), "float32")
    assert (qkv[:, 5] == before[:, 5]).all()


def test_read_only_arrays_are_refused_in_place(rng):
    q, k = normal(rng, (1, 1, 8), "float32"), normal(rng, (1, 1, 8), "float32")
    k.flags.writeable = False
    with pytest.raises(errors.ImmutableArrayError, match="apply_rope_pos_ids_inplace: k is a read-only NumPy"):
        rope.apply_rope_pos_ids_inplace(q, k, np.array([0]))


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda q, k, p: rope.apply_rope_pos_ids(q, k, p[:2]),
            errors.ShapeError,
            "pos_ids has shape (2,), expected (3,)",
        ),
        (lambda q, k, p: rope.apply_rope_pos_ids(q, k, p * 1.0), errors.DTypeError, "pos_ids has dtype float64"),
        (lambda q, k, p: rope.apply_rope_pos_ids(q, k[:2], p), errors.ShapeError, "k has 2 tokens, expected 3"),
        (lambda q, k, p: rope.apply_rope_pos_ids(q, k[..., :4], p), errors.ShapeError, "k has head_dim 4, expected 8"),
        (lambda q, k, p: rope.apply_rope_pos_ids(q[0], k, p), errors.ShapeError, "q is 2-D (2, 8), expected 3-D"),
        (lambda q, k, p: rope.apply_rope_pos_ids(q, k.astype(np.float16), p), errors.DTypeError, "k has dtype float16"),
        (
            lambda q, k, p: rope.apply_rope_pos_ids(q, k, p, 10),
            errors.ArgumentError,
            "rotary_dim is 10, expected an even",
        ),
        (
            lambda q, k, p: rope.apply_rope_pos_ids(q, k, p, 3),
            errors.ArgumentError,
            "rotary_dim is 3, expected an even",
        ),
        (lambda q, k, p: rope.apply_rope_pos_ids(q, k, p, rope_theta=0), errors.ArgumentError, "rope_theta is 0"),
        (
            lambda q, k, p: rope.apply_rope(q, k, p, p),
            errors.ShapeError,
            "apply_rope: indptr has shape (3,), expected (4,)",
        ),
        (
            lambda q, k, p: rope.apply_rope(q, k, np.array([0, 2, 1, 3]), p),
            errors.ArgumentError,
            "apply_rope: indptr is [0, 2, 1, 3], expected ascending offsets",
        ),
        (
            lambda q, k, p: rope.apply_llama31_rope_pos_ids(q, k, p, high_freq_factor=1.0),
            errors.ArgumentError,
            "high_freq_factor equals low_freq_factor",
        ),
        (
            lambda q, k, p: rope.apply_rope_with_cos_sin_cache(
                p + 9, q[:, 0], k[:, 0], 8, np.ones((10, 8), np.float32)
            ),
            errors.ArgumentError,
            "positions are 9 to 11, expected 0 to 9",
        ),
        (
            lambda q, k, p: rope.apply_rope_with_cos_sin_cache(p, q[:, 0], k[:, 0], 5, np.ones((10, 8), np.float32)),
            errors.ShapeError,
            "query has shape (3, 8), expected a multiple of head_size = 5",
        ),
        (
            lambda q, k, p: rope.apply_rope_with_cos_sin_cache(p, q[:, 0], k[:, 0], 8, np.ones((10, 8))),
            errors.DTypeError,
            "cos_sin_cache has dtype float64, expected float32",
        ),
    ],
)
def test_errors(rng, call, error, text):
    with pytest.raises(error) as caught:
        call(normal(rng, (3, 2, 8), "float32"), normal(rng, (3, 1, 8), "float32"), np.arange(3))
    assert text in str(caught.value)


@pytest.mark.parametrize("scale", [1.0, 8.0, 0.03])
def test_fixed_point_turns_give_exact_angles(rng, scale):
    """What the kernel computes from the table: position * turns modulo 2^64, its top 32 bits as half turns."""
    turns = np.frombuffer(b"".join(rope_kernel.turns_of((64, scale, 1e4, None))), np.uint64)
    assert len(turns) == rope_kernel.MAX_PAIRS
    freq = reference.rope_frequencies(64, scale, 1e4)
    for position in [0, 1, 77, 131_072, 10**6, 10**7 + 1, -5, *rng.integers(100_000, 131_072, 30).tolist()]:
        top = np.array([(position * int(t)) % 2**64 >> 32 for t in turns[:32]], np.uint32).view(np.int32)
        angle = top.astype(np.float32).astype(np.float64) * 2.0**-31 * math.pi
        # Pi as a fraction of 40 digits, so that the true angle is reduced without rounding.
        pi = Fraction(31415926535897932384626433832795028841972, 10**40)
        true = np.array([float(Fraction(f) * position % (2 * pi)) for f in freq.tolist()])
        assert np.abs(np.exp(1j * angle) - np.exp(1j * true)).max() < 1e-6


@pytest.mark.parametrize("units", [1, 8, 48, 96, 320, 513, 576, 1040, 1056, 5000])
def test_threads_of_a_token(units):
    threads = rope_kernel.threads_of(units)
    assert threads % 32 == 0 and 32 <= threads <= 256
    assert rope.rope_spec(bfloat16, int32, 128, 8, threads).threads == threads
    rounds = -(-units // (2 * threads))
    assert rounds == max(1, -(-units // 512)) and (units <= 32 or units > (2 * threads - 64) * rounds)
