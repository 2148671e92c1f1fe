"""Reference block-sparse attention and mixture of experts against loops. `trap_NN` names what a test pins down."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fi_cupy.reference import moe, sparse
from fi_cupy.reference.attention import attention


def masked_attention(q, k, v, visible):
    """One head in float64: ``q [m, d]``, ``k, v [n, d]``, ``visible(i, j)``."""
    out, lse = np.zeros_like(q), np.full(len(q), -np.inf)
    for i in range(len(q)):
        keys = [j for j in range(len(k)) if visible(i, j)]
        weights = [math.exp(float(q[i] @ k[j]) / math.sqrt(q.shape[1])) for j in keys]
        if keys:
            out[i] = sum(w * v[j] for w, j in zip(weights, keys, strict=True)) / sum(weights)
            lse[i] = math.log2(sum(weights))
    return out, lse


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_trap_29_block_sparse(causal, masked):
    rng = np.random.default_rng(1)
    r, c, m, n = 2, 3, 6, 9
    indptr, indices = np.asarray([0, 2, 2, 3]), np.asarray([0, 2, 1])
    mask = rng.random((3, r, c)) < 0.6 if masked else None
    q, k, v = rng.normal(size=(m, 4, 4)), rng.normal(size=(n, 2, 4)), rng.normal(size=(n, 2, 4))
    out, lse = sparse.block_sparse_attention(q, k, v, indptr, indices, r, c, mask, causal)

    def visible(i, j):
        for b in range(indptr[i // r], indptr[i // r + 1]):
            if indices[b] == j // c and (mask is None or mask[b, i % r, j % c]):
                return not causal or j + m <= n + i
        return False

    for h in range(4):
        expected = masked_attention(q[:, h], k[:, h // 2], v[:, h // 2], visible)
        np.testing.assert_allclose(out[:, h], expected[0], rtol=1e-10)
        np.testing.assert_allclose(lse[:, h], expected[1], rtol=1e-10)
    assert np.all(out[2:4] == 0) and np.all(np.isneginf(lse[2:4]))  # a block row without blocks


def test_trap_29_masks_are_laid_out_by_block_row():
    mask, indptr = np.arange(24).reshape(3, 2, 4), np.asarray([0, 2, 2, 3])
    expected = [*range(0, 4), *range(8, 12), *range(4, 8), *range(12, 16), *range(16, 24)]
    assert sparse.convert_bsr_mask_layout(mask, indptr).tolist() == expected
    assert sparse.convert_bsr_mask_layout(mask[:0], np.asarray([0])).shape == (0,)


@pytest.mark.parametrize("causal", [False, True])
def test_trap_29_variable_blocks_are_head_first_and_by_kv_head(causal):
    rng = np.random.default_rng(2)
    m, n = 5, 7
    row_sz, col_sz = np.asarray([[2, 3], [4, 1]]), np.asarray([[1, 0, 6], [3, 2, 2]])
    blocks = np.asarray([[[1, 1, 0], [0, 1, 1]], [[0, 0, 0], [1, 0, 1]]], dtype=bool)
    q, k, v = rng.normal(size=(4, m, 4)), rng.normal(size=(2, n, 4)), rng.normal(size=(2, n, 4))
    out, lse = sparse.variable_block_sparse_attention(q, k, v, blocks, row_sz, col_sz, causal)
    for h in range(4):
        g = h // 2
        row_of = [b for b, size in enumerate(row_sz[g]) for _ in range(size)]
        col_of = [b for b, size in enumerate(col_sz[g]) for _ in range(size)]
        expected = masked_attention(
            q[h], k[g], v[g],
            lambda i, j, g=g, a=row_of, b=col_of: blocks[g, a[i], b[j]] and (not causal or j + m <= n + i),
        )  # fmt: skip
        np.testing.assert_allclose(out[h], expected[0], rtol=1e-10)
        np.testing.assert_allclose(lse[h], expected[1], rtol=1e-10)


def test_all_blocks_are_dense_attention():
    rng = np.random.default_rng(3)
    q, k, v = rng.normal(size=(4, 2, 4)), rng.normal(size=(6, 1, 4)), rng.normal(size=(6, 1, 4))
    got = sparse.block_sparse_attention(q, k, v, np.asarray([0, 2, 4]), np.asarray([0, 1, 0, 1]), 2, 3)
    for g, e in zip(got, attention(q, k, v), strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-12)


def test_trap_25_moe_stacks_up_before_gate():
    rng = np.random.default_rng(4)
    tokens, hidden, inter, experts = 5, 3, 2, 4
    x, fc2 = rng.normal(size=(tokens, hidden)), rng.normal(size=(experts, hidden, inter))
    w1, w3 = rng.normal(size=(2, experts, inter, hidden))
    chosen, scales = rng.integers(0, experts, size=(tokens, 2)), rng.random((tokens, 2)).astype(np.float32)
    chosen[0] = 1  # the same expert twice
    chosen[1, 0] = -1  # an expert of another rank
    out = moe.fused_moe(x, chosen, scales, np.concatenate([w3, w1], axis=1), fc2)
    for t in range(tokens):
        expected = np.zeros(hidden)
        for e, scale in zip(chosen[t], scales[t], strict=True):
            if e >= 0:
                gate, up = w1[e] @ x[t], w3[e] @ x[t]
                expected += float(scale) * (fc2[e] @ (gate / (1 + np.exp(-gate)) * up))
        np.testing.assert_allclose(out[t], expected, rtol=1e-10)
