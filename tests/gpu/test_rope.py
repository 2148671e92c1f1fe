"""The rotary embedding kernel against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import rope
from fi_cupy.reference import rope as reference
from fi_cupy.testing.generators import new_stream, normal, on_gpu, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")

# (tokens, q heads, k heads, head_dim, rotary_dim): 16-byte accesses, narrow ones, one element, several rounds a CTA
CASES = [
    (5, 4, 2, 64, None),
    (3, 32, 8, 128, None),
    (7, 9, 3, 64, None),
    (2, 64, 8, 128, 64),
    (3, 128, 1, 64, None),
    (4, 3, 1, 80, 20),
    (3, 2, 2, 48, 6),
    (2, 5, 1, 256, None),
    (1, 1, 1, 2, None),
    (0, 2, 1, 64, None),
]


def both(array):
    return to_float64(array[0]), to_float64(array[1])


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_pos_ids(rng, dtype, interleave):
    for n, hq, hk, d, dim in CASES:
        q, k = normal(rng, (n, hq, d), dtype), normal(rng, (n, hk, d), dtype)
        pos = rng.integers(0, 5000, n, dtype=np.int32)
        want = reference.apply_rope_pos_ids(q.astype(np.float64), k.astype(np.float64), pos, dim, interleave, 2.0, 3e4)
        args = (on_gpu(pos), dim, interleave, 2.0, 3e4)
        got = rope.apply_rope_pos_ids(on_gpu(q), on_gpu(k), *args)
        gq, gk = on_gpu(q), on_gpu(k)
        assert rope.apply_rope_pos_ids_inplace(gq, gk, *args) is None
        for a, b, w in zip(both(got), both((gq, gk)), want, strict=True):
            assert_close(a, w, dtype, what=f"{(n, hq, hk, d, dim)}")
            assert (a == b).all()


@pytest.mark.parametrize("interleave", [False, True])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_trap_22_segments_start_at_their_offsets(rng, index, interleave):
    """Empty requests, and tokens before and behind the segments, which stay as they are."""
    lens = rng.integers(0, 4, 90)
    lens[rng.integers(0, 90, 40)] = 0
    indptr = (np.concatenate([[0], np.cumsum(lens)]) + 2).astype(index)
    n = int(indptr[-1]) + 3
    offsets = rng.integers(0, 9000, 90).astype(index)
    q, k = normal(rng, (n, 4, 64)), normal(rng, (n, 2, 64))
    wide = (q.astype(np.float64), k.astype(np.float64), indptr, offsets, None, interleave)
    args = (on_gpu(indptr), on_gpu(offsets), None, interleave)
    for name, options in (("apply_rope", ()), ("apply_llama31_rope", (8.0, 5e5, 1.0, 4.0, 8192))):
        want = getattr(reference, name)(*wide, *options)
        got = both(getattr(rope, name)(on_gpu(q), on_gpu(k), *args, *options))
        gq, gk = on_gpu(q), on_gpu(k)
        getattr(rope, name + "_inplace")(gq, gk, *args, *options)
        for a, b, w in zip(got, both((gq, gk)), want, strict=True):
            assert_close(a, w, "bfloat16", what=name)
            assert (a == b).all()
    assert (got[0][:2] == wide[0][:2]).all() and (got[1][-3:] == wide[1][-3:]).all()


@pytest.mark.older_archs
def test_llama31_pos_ids(rng):
    q, k = normal(rng, (6, 4, 128), "float32"), normal(rng, (6, 2, 128), "float32")
    pos = rng.integers(0, 131072, 6)
    wide = (q.astype(np.float64), k.astype(np.float64), pos)
    for options in ((), (128, False, 4.0, 1e4, 1.0, 8.0, 4096)):
        want = reference.apply_llama31_rope_pos_ids(*wide, *options)
        got = both(rope.apply_llama31_rope_pos_ids(on_gpu(q), on_gpu(k), on_gpu(pos), *options))
        gq, gk = on_gpu(q), on_gpu(k)
        rope.apply_llama31_rope_pos_ids_inplace(gq, gk, on_gpu(pos), *options)
        for a, b, w in zip(got, both((gq, gk)), want, strict=True):
            assert_close(a, w, "float32")
            assert (a == b).all()


def test_angles_are_exact_at_large_positions(rng):
    pos = np.concatenate([rng.integers(100_000, 131_073, 20), [131_072, 10**6, 10**7 + 1, 0, -5]])
    q, k = normal(rng, (len(pos), 2, 64), "float32"), normal(rng, (len(pos), 1, 64), "float32")
    for scale in (1.0, 0.03):  # a frequency above one turn a position, too
        want = reference.apply_rope_pos_ids(q.astype(np.float64), k.astype(np.float64), pos, None, False, scale)
        got = both(rope.apply_rope_pos_ids(on_gpu(q), on_gpu(k), on_gpu(pos), None, False, scale))
        for a, w in zip(got, want, strict=True):
            # float64 rounds the reference's own angle, position / scale radians, by 2^-53 of it.
            assert np.abs(a - w).max() < 3e-6 + 3e-16 * np.abs(pos).max() / scale


@pytest.mark.parametrize("is_neox", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_cos_sin_cache(rng, dtype, is_neox):
    for n, hq, hk, d, dim in CASES:
        q, k = normal(rng, (n, hq * d), dtype), normal(rng, (n, hk * d), dtype)
        table = normal(rng, (50, dim or d), "float32")
        pos = rng.integers(0, 50, n)
        wide = (pos, q.astype(np.float64), k.astype(np.float64), d, table.astype(np.float64), is_neox)
        want = reference.apply_rope_with_cos_sin_cache(*wide)
        got = rope.apply_rope_with_cos_sin_cache(on_gpu(pos), on_gpu(q), on_gpu(k), d, on_gpu(table), is_neox)
        gq, gk = on_gpu(q), on_gpu(k)
        rope.apply_rope_with_cos_sin_cache_inplace(on_gpu(pos), gq, gk, d, on_gpu(table), is_neox)
        for a, b, w in zip(both(got), both((gq, gk)), want, strict=True):
            assert_close(a, w, dtype, what=f"{(n, hq, hk, d, dim)}")
            assert (a == b).all()


@pytest.mark.older_archs
def test_views_of_a_fused_qkv_tensor(rng):
    qkv = normal(rng, (5, 32 + 8 + 8, 128))
    pos = rng.integers(0, 3000, 5, dtype=np.int32)
    fused = on_gpu(qkv)
    rope.apply_rope_pos_ids_inplace(fused[:, :32], fused[:, 32:40], on_gpu(pos))
    wide = qkv.astype(np.float64)
    q, k = reference.apply_rope_pos_ids(wide[:, :32], wide[:, 32:40], pos)
    assert_close(to_float64(fused), np.concatenate([q, k, wide[:, 40:]], axis=1), "bfloat16")
    # Strided tokens and a misaligned start of the head, not in place.
    big = normal(rng, (10, 3, 70), "float16")
    got = rope.apply_rope_pos_ids(on_gpu(big)[::2, :2, 3:67], on_gpu(big)[::2, 2:, 6:], on_gpu(pos))
    wide = big.astype(np.float64)
    for a, w in zip(both(got), reference.apply_rope_pos_ids(wide[::2, :2, 3:67], wide[::2, 2:, 6:], pos), strict=True):
        assert_close(a, w, "float16")


def test_same_input_same_bits(rng):
    q, k = on_gpu(normal(rng, (64, 32, 128))), on_gpu(normal(rng, (64, 8, 128)))
    pos = on_gpu(np.arange(64))
    first = rope.apply_rope_pos_ids(q, k, pos)
    second = rope.apply_rope_pos_ids(q, k, pos)
    assert all((a.view("uint16") == b.view("uint16")).all() for a, b in zip(first, second, strict=True))


def test_graph_capture(rng):
    q, k, pos = on_gpu(normal(rng, (4, 4, 64))), on_gpu(normal(rng, (4, 2, 64))), on_gpu(np.arange(4))
    wide_q, wide_k = to_float64(q), to_float64(k)
    rope.apply_rope_pos_ids(q, k, pos)
    rope.apply_rope_pos_ids_inplace(q.copy(), k.copy(), pos)  # compiled and loaded before the capture
    cupy.cuda.get_current_stream().synchronize()
    stream = new_stream()
    with stream:
        stream.begin_capture()
        rope.apply_rope_pos_ids_inplace(q, k, pos)
        graph = stream.end_capture()
        pos[...] = on_gpu(np.array([7, 70, 700, 7000]))
        graph.launch()
        stream.synchronize()
    want = reference.apply_rope_pos_ids(wide_q, wide_k, np.array([7, 70, 700, 7000]))
    for a, w in zip(both((q, k)), want, strict=True):
        assert_close(a, w, "bfloat16")
