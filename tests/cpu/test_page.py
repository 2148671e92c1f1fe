"""The paged cache operators on CPU arrays: where tokens land, what is refused."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fi_cupy import errors, page
from fi_cupy.testing.generators import normal

I32 = np.int32


def table(lens, page_size, rng):
    """(indices, indptr, last_page_len) of requests of these lengths, pages in random order, and the number of pages."""
    pages = [-(-n // page_size) for n in lens]
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(I32)
    last = np.array([(n - 1) % page_size + 1 if n else 1 for n in lens], I32)
    return rng.permutation(int(indptr[-1]) + 2)[: indptr[-1]].astype(I32), indptr, last, int(indptr[-1]) + 2


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float8_e4m3fn"])
def test_trap_26_27_append_writes_each_token_and_nothing_else(rng, layout, packed, dtype):
    page_size, heads, dim = 4, 3, 8
    new, lens = [2, 0, 5], [7, 3, 5]
    indices, indptr, last, pages = table(lens, page_size, rng)
    append = np.concatenate([[0], np.cumsum(new)]).astype(I32)
    b, p = page.get_batch_indices_positions(append, np.array(lens, I32), 9)
    k, v = normal(rng, (9, heads, dim), dtype), normal(rng, (9, heads, dim), dtype)
    inner = (page_size, heads, dim) if layout == "NHD" else (heads, page_size, dim)
    if packed:
        cache = normal(rng, (pages, 2, *inner), dtype)
        k_cache, v_cache = cache[:, 0], cache[:, 1]
    else:  # views with different strides
        k_cache = normal(rng, (pages, 2, *inner), dtype)[:, 1]
        v_cache = normal(rng, (pages, *inner[:-1], 2 * dim), dtype)[..., dim:]
        cache = (k_cache, v_cache)
    want = [c.copy() for c in (k_cache, v_cache)]
    assert page.append_paged_kv_cache(k, v, b, p, cache, indices, indptr, last, layout) is None
    for w, x in zip(want, (k, v), strict=True):
        for t in range(7):  # the last two are padding
            target = w[indices[indptr[b[t]] + p[t] // page_size]]
            if layout == "NHD":
                target[p[t] % page_size] = x[t]
            else:
                target[:, p[t] % page_size] = x[t]
    for got, w in zip((k_cache, v_cache), want, strict=True):
        assert got.tobytes() == w.tobytes()


def test_fp8_may_come_as_bytes(rng):
    k = normal(rng, (1, 1, 8), "float8_e4m3fn")
    one = np.array([0], I32)
    args = (one, one, np.zeros((1, 2, 1, 1, 8), np.uint8), one, np.array([0, 1], I32), np.array([1], I32))
    page.append_paged_kv_cache(k, k, *args)
    assert args[2][0, 0].tobytes() == k.tobytes()


def test_append_mla(rng):
    ckv, kpe = normal(rng, (3, 512)), normal(rng, (3, 64))
    ckv_cache, kpe_cache = np.zeros((2, 2, 512), ckv.dtype), np.zeros((2, 2, 64), ckv.dtype)
    where = np.array([0, -1, 0], I32), np.array([2, 0, 1], I32)
    table_ = np.array([1, 0], I32), np.array([0, 2], I32), np.array([1], I32)
    page.append_paged_mla_kv_cache(ckv, kpe, *where, ckv_cache, None, *table_)
    assert (ckv_cache[0, 0] == ckv[0]).all() and (ckv_cache[1, 1] == ckv[2]).all() and not kpe_cache.any()
    page.append_paged_mla_kv_cache(None, kpe, *where, None, kpe_cache, *table_)
    assert (kpe_cache[0, 0] == kpe[0]).all() and (kpe_cache[1, 1] == kpe[2]).all() and not kpe_cache[1, 0].any()
    with pytest.raises(errors.ArgumentError, match="ckv_cache and kpe_cache are both None"):
        page.append_paged_mla_kv_cache(ckv, kpe, *where, None, None, *table_)


def test_batch_indices_positions_into_given_arrays():
    outs = np.full(4, 9, I32), np.full(4, 9, I32)
    got = page.get_batch_indices_positions(np.array([0, 1, 1, 3], I32), np.array([5, 7, 2], I32), 4, *outs)
    assert got[0] is outs[0] and got[1] is outs[1]
    assert outs[0].tolist() == [0, 2, 2, -1] and outs[1].tolist() == [4, 0, 1, 0]


def test_trap_05_a_request_without_pages_has_length_0():
    assert page.get_seq_lens(np.array([0, 2, 2, 3], I32), np.array([3, 1, 16], I32), 16).tolist() == [19, 0, 16]


def _append(key=None, value=None, b=None, p=None, cache=None, indices=None, indptr=None, last=None, layout="NHD"):
    given = (key, value, b, p, cache, indices, indptr, last)
    base = (
        np.zeros((1, 2, 8), np.float16), np.zeros((1, 2, 8), np.float16), np.array([0], I32), np.array([0], I32),
        np.zeros((3, 2, 4, 2, 8), np.float16), np.array([2], I32), np.array([0, 1], I32), np.array([1], I32),
    )  # fmt: skip
    page.append_paged_kv_cache(*(d if g is None else g for g, d in zip(given, base, strict=True)), layout)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"layout": "NDH"}, errors.ArgumentError, "kv_layout is 'NDH'"),
        ({"layout": "HND"}, errors.ShapeError, "append_key has shape (1, 2, 8), expected (1, 4, 8)"),
        (
            {"key": np.zeros((1, 2, 8), ml_dtypes.bfloat16)},
            errors.DTypeError,
            "append_key has dtype bfloat16",
        ),
        (
            {"value": np.zeros((2, 2, 8), np.float16)},
            errors.ShapeError,
            "append_value has shape (2, 2, 8)",
        ),
        ({"b": np.array([0], np.int64)}, errors.DTypeError, "batch_indices has dtype int64, expected int32"),
        ({"b": np.array([0, 0], I32)}, errors.ShapeError, "batch_indices has shape (2,), expected (1,)"),
        ({"b": np.array([1], I32)}, errors.ArgumentError, "batch_indices has 1, expected less than 1 requests"),
        (
            {"p": np.array([4], I32)},
            errors.ArgumentError,
            "position 4 of request 0 lies outside its 1 pages of 4",
        ),
        ({"p": np.array([-1], I32)}, errors.ArgumentError, "position -1 of request 0 lies outside"),
        ({"indices": np.array([3], I32)}, errors.ArgumentError, "kv_indices go from 3 to 3, expected 0 to 2"),
        ({"last": np.array([1, 1], I32)}, errors.ShapeError, "kv_last_page_len has shape (2,), expected (1,)"),
        ({"cache": np.zeros((3, 4, 2, 8), np.float16)}, errors.ShapeError, "expected 5-D"),
        ({"cache": (np.zeros((3, 4, 2, 8), np.float16),)}, errors.ArgumentError, "a sequence of 1"),
        (
            {"cache": (np.zeros((3, 4, 2, 8), np.float16), np.zeros((3, 4, 1, 8), np.float16))},
            errors.ShapeError,
            "keys (3, 4, 2, 8) and values (3, 4, 1, 8)",
        ),
    ],
)
def test_errors(arguments, error, text):
    with pytest.raises(error) as caught:
        _append(**arguments)
    assert text in str(caught.value) and str(caught.value).startswith("append_paged_kv_cache: ")


def test_read_only_caches_are_refused():
    cache = np.zeros((3, 2, 4, 2, 8), np.float16)
    cache.flags.writeable = False
    with pytest.raises(errors.ImmutableArrayError, match="paged_kv_cache is a read-only NumPy array"):
        _append(cache=cache)
