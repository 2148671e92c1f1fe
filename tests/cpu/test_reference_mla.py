"""Reference multi-head latent attention against Python loops in float64."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from fi_cupy.reference.mla import mla_paged


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, ml_dtypes.bfloat16])
def test_trap_10_mla_shares_one_kv_head_and_never_reads_past_the_length(causal, dtype):
    rng = np.random.default_rng(25)
    heads, dc, dp, page_size, kv_lens = 3, 8, 4, 4, [6, 0, 4]
    qo_indptr = np.array([0, 2, 3, 4])
    kv_indptr, kv_indices = np.array([0, 2, 2, 3]), np.array([4, 0, 2])
    ckv = np.full((5, page_size, dc), np.nan).astype(dtype)
    kpe = np.full((5, page_size, dp), np.nan).astype(dtype)
    for b, n in enumerate(kv_lens):
        for t in range(n):
            page = kv_indices[kv_indptr[b] + t // page_size]
            ckv[page, t % page_size] = rng.normal(size=dc)
            kpe[page, t % page_size] = rng.normal(size=dp)
    q_nope, q_pe = rng.normal(size=(4, heads, dc)).astype(dtype), rng.normal(size=(4, heads, dp)).astype(dtype)
    sm_scale = 1 / math.sqrt(128 + 64)
    out, lse = mla_paged(q_nope, q_pe, ckv, kpe, qo_indptr, kv_indptr, kv_indices, kv_lens, causal, sm_scale)
    assert out.shape == q_nope.shape and out.dtype == dtype
    assert lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
    tol = 1e-10 if dtype == np.float64 else 1e-2
    for b, n in enumerate(kv_lens):
        qo_len = qo_indptr[b + 1] - qo_indptr[b]
        where = [(kv_indices[kv_indptr[b] + t // page_size], t % page_size) for t in range(n)]
        for i in range(qo_len):
            row = qo_indptr[b] + i
            for h in range(heads):
                scores, values = [], []
                for j, at in enumerate(where):
                    if causal and not j + qo_len <= n + i:
                        continue
                    c, p = ckv[at].astype(np.float64), kpe[at].astype(np.float64)
                    s = float(q_nope[row, h].astype(np.float64) @ c) + float(q_pe[row, h].astype(np.float64) @ p)
                    scores.append(math.exp(sm_scale * s))
                    values.append(c)
                if not scores:
                    assert np.all(out[row, h] == 0) and np.isneginf(lse[row, h])
                    continue
                expected = sum(s * c for s, c in zip(scores, values, strict=True)) / sum(scores)
                np.testing.assert_allclose(out[row, h].astype(np.float64), expected, rtol=tol, atol=tol)
                assert lse[row, h] == pytest.approx(math.log2(sum(scores)), abs=1e-5)


def test_trap_10_mla_dequantisation_scales():
    rng = np.random.default_rng(26)
    q_nope, q_pe = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 3, 4))
    ckv, kpe = rng.normal(size=(2, 4, 8)), rng.normal(size=(2, 4, 4))
    table = np.array([0, 2]), np.array([0, 2]), np.array([1, 0]), np.array([7])
    got = mla_paged(q_nope, q_pe, ckv, kpe, *table, True, 0.3, ckv_scale=2.0, kpe_scale=0.5)
    expected = mla_paged(q_nope, q_pe, ckv * 2.0, kpe * 0.5, *table, True, 0.3)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-12)
