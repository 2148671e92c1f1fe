"""Paged caches filled with given sequences, and the comparison of (out, lse) that the tests of the wrappers share."""

from __future__ import annotations

import numpy as np

from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.testing.generators import normal, on_gpu, to_float64
from fi_cupy.testing.tolerances import assert_close


def indptr_of(lens):
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)


#: Rotated q and k are rounded to 16 bits, which the reference does not do: relative to the lse, or to 10. With sm_scale
#: 0.6 and 64 dimensions a score is off by up to 0.04.
ROPE_LSE = 6e-3


def check(out, lse, want, want_lse, rope=False):
    """Values within the table's tolerance; rows that see no key are exactly 0 and -inf."""
    got, allowed = to_float64(out), ROPE_LSE if rope else 2e-5
    assert_close(got, want, to_dtype(out.dtype), "rotated" if rope else "product")
    seen, got_lse = np.isfinite(want_lse), to_float64(lse)
    assert (np.isneginf(got_lse) == ~seen).all()
    assert (got[~seen] == 0).all()
    assert (np.abs(got_lse[seen] - want_lse[seen]) <= allowed * np.maximum(np.abs(want_lse[seen]), 10)).all()


def bits(x):
    return x.view(f"u{x.dtype.itemsize}").copy()


class Pages:
    """A paged cache in random page order; rows that belong to no request are NaN."""

    def __init__(self, rng, num_pages, page_size, kv_heads, dim, dtype="bfloat16", layout="NHD"):
        self.rng, self.page_size, self.layout, self.dtype = rng, page_size, layout, to_dtype(dtype).np
        self.free = rng.permutation(num_pages).astype(np.int32)
        self.kv = np.full((num_pages, 2, page_size, kv_heads, dim), np.nan, self.dtype)

    def add(self, lens):
        """((indptr, indices, last_page_len), [(k, v) of each request]) of new random sequences."""
        lens = np.asarray(lens)
        indptr = indptr_of(-(-lens // self.page_size))
        indices, self.free = self.free[: indptr[-1]], self.free[indptr[-1] :]
        assert len(indices) == indptr[-1], "the cache has too few pages"
        sequences = []
        for b, n in enumerate(lens):
            kv = normal(self.rng, (int(n), 2, *self.kv.shape[3:]), self.dtype)
            j = np.arange(n)
            self.kv[indices[indptr[b] + j // self.page_size], :, j % self.page_size] = kv
            sequences.append((kv[:, 0], kv[:, 1]))
        last = np.where(lens > 0, (lens - 1) % self.page_size + 1, 1).astype(np.int32)
        return (indptr, indices, last), sequences

    def gpu(self):
        """The packed cache in its layout, on the GPU."""
        return on_gpu(self.kv if self.layout == "NHD" else np.ascontiguousarray(self.kv.swapaxes(2, 3)))
