"""Variants in every wrapper against attention a pair at a time: functions see the user's own heads and positions."""

from __future__ import annotations

import numpy as np
import pytest
from naive_attention import Pages, seen

import fi_cupy
from fi_cupy import errors
from fi_cupy.jit import ops
from fi_cupy.testing.tolerances import assert_close

define = fi_cupy.jit.define_variant
HEADS, KV_HEADS, DIM = 4, 2, 16


def by_pairs(q, k, v, mask, score):
    """(out, base-2 lse) with ``score(s, row, key, head)`` on each scaled product; mask [rows, keys(, heads)]."""
    rows, heads, dim = q.shape
    out, lse = np.zeros((rows, heads, v.shape[2])), np.full((rows, heads), -np.inf)
    for i in range(rows):
        for h in range(heads):
            g = h * k.shape[1] // heads
            keys = np.flatnonzero(mask[i] if mask.ndim == 2 else mask[i, :, h])
            if len(keys):
                s = np.array([score(float(q[i, h] @ k[j, g]) / np.sqrt(dim), i, j, h) for j in keys])
                p = np.exp(s - s.max())
                out[i, h], lse[i, h] = p @ v[keys, g] / p.sum(), (s.max() + np.log(p.sum())) / np.log(2)
    return out, lse


def check(made, want):
    for x, y in zip(made, want, strict=True):
        assert_close(np.asarray(x), y, "float32", "product")


def workspace():
    return np.empty(1 << 16, np.uint8)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


#: A variant that any part of the keys can be computed with: heads, values and numbers.
BY_HEAD = define(
    name="by_head", score_fn=lambda s, c: c.cap * ops.tanh(s * c.gain[c.qo_head] / c.cap), tensors=["gain"],
    scalars={"cap": 2.0},
)  # fmt: skip
GAIN = np.float32([0.5, 1.0, 2.0, 3.0])


def by_head(s, i, j, h):
    return 2.0 * np.tanh(s * GAIN[h] / 2.0)


@pytest.mark.parametrize("own", [(4, 7, 0), (1, 1, 1)])
@pytest.mark.parametrize("single", [False, True])
def test_cascade(rng, own, single):
    rows = (1, 1, 1) if single else (3, 1, 5)
    pages = Pages(rng, 12, 4, KV_HEADS, DIM)
    shared = (normal(rng, 9, KV_HEADS, DIM), normal(rng, 9, KV_HEADS, DIM))
    parts = [(normal(rng, n, KV_HEADS, DIM), normal(rng, n, KV_HEADS, DIM)) for n in own]
    tables = [pages.add([shared]), pages.add(parts)]
    qo = np.concatenate([[0], np.cumsum(rows)])
    q = normal(rng, sum(rows), HEADS, DIM)
    w = fi_cupy.MultiLevelCascadeAttentionWrapper(2, workspace(), variant=BY_HEAD)
    table = [[t[i] for t in tables] for i in range(3)]
    w.plan([[0, sum(rows)], qo], *table, HEADS, KV_HEADS, DIM, 4, causal=True, q_data_type="float32")
    want = [
        by_pairs(
            q[a:b], np.concatenate([shared[0], k]), np.concatenate([shared[1], v]),
            np.concatenate([np.ones((b - a, 9), bool), seen(b - a, len(k), causal=True)], 1), by_head,
        )
        for (k, v), a, b in zip(parts, qo[:-1], qo[1:], strict=True)
    ]  # fmt: skip
    want = [np.concatenate(x) for x in zip(*want, strict=True)]
    check(w.run(q, pages.cache, GAIN, return_lse=True), want)
    check(w.run(q, pages.cache, variant_args={"gain": GAIN}, return_lse=True), want)


@pytest.mark.parametrize("decode", [False, True])
def test_shared_prefix(rng, decode):
    rows, own = ((1, 1) if decode else (2, 3)), (4, 7)
    pages = Pages(rng, 8, 4, KV_HEADS, DIM)
    shared = (normal(rng, 9, KV_HEADS, DIM), normal(rng, 9, KV_HEADS, DIM))
    parts = [(normal(rng, n, KV_HEADS, DIM), normal(rng, n, KV_HEADS, DIM)) for n in own]
    table, qo = pages.add(parts), np.concatenate([[0], np.cumsum(rows)])
    q = normal(rng, sum(rows), HEADS, DIM)
    if decode:
        w = fi_cupy.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace(), variant=BY_HEAD)
        w.begin_forward(*table, HEADS, KV_HEADS, DIM, 4, data_type="float32")
    else:
        w = fi_cupy.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace(), variant=BY_HEAD)
        w.begin_forward(qo, *table, HEADS, KV_HEADS, DIM, 4, q_data_type="float32")
    want = [
        by_pairs(q[a:b], np.concatenate([shared[0], k]), np.concatenate([shared[1], v]), np.ones((b - a, 9 + len(k)),
                 bool), by_head)
        for (k, v), a, b in zip(parts, qo[:-1], qo[1:], strict=True)
    ]  # fmt: skip
    made = w.forward(q, *shared, pages.cache, return_lse=True, variant_args={"gain": GAIN})
    check(made, [np.concatenate(x) for x in zip(*want, strict=True)])


#: Looks at every index there is.
PLACED = define(
    name="placed",
    score_fn=lambda s, c: s + c.bias[c.qo_idx, c.kv_idx] * (1 + c.qo_head) - 0.1 * c.kv_head + 0.01 * c.batch
    + 0.001 * (c.kv_len - c.qo_len),
    mask_fn=lambda c: (c.qo_idx + 2 * c.kv_idx + c.qo_head) % 5 != 0,
    key_fn=lambda k, c: ops.where(c.kv_idx % 3 == 0, -k, k),
    tensors=["bias"],
)  # fmt: skip


def placed(q, k, v, mask, bias):
    (rows, heads, _), keys = q.shape, len(k)
    i, j, h = np.ogrid[:rows, :keys, :heads]
    mask = (mask if mask.ndim == 3 else mask[..., None]) & ((i + 2 * j + h) % 5 != 0)
    k = np.where((np.arange(keys) % 3 == 0)[:, None, None], -k, k)
    group = heads // k.shape[1]

    def score(s, i, j, h):
        return s + bias[i, j] * (1 + h) - 0.1 * (h // group) + 0.001 * (keys - rows)

    return by_pairs(q, k, v, mask, score)


@pytest.mark.parametrize("causal", [False, True])
def test_block_sparse(rng, causal):
    (m, n, r, c), indptr, indices = (12, 20, 4, 5), [0, 2, 2, 5], [3, 1, 0, 3, 2]
    q, k, v = normal(rng, m, HEADS, DIM), normal(rng, n, KV_HEADS, DIM), normal(rng, n, KV_HEADS, DIM)
    bias = normal(rng, m, n)
    mask = np.zeros((m, n), bool)
    for row in range(3):
        for column in indices[indptr[row] : indptr[row + 1]]:
            mask[row * r : (row + 1) * r, column * c : (column + 1) * c] = True
    if causal:
        mask &= seen(m, n, causal=True)
    w = fi_cupy.BlockSparseAttentionWrapper(workspace(), variant=PLACED)
    w.plan(indptr, indices, m, n, r, c, HEADS, KV_HEADS, DIM, causal=causal, q_data_type="float32")
    check(w.run(q, k, v, variant_args={"bias": bias}, return_lse=True), placed(q, k, v, mask, bias))
    w.plan([0, 0, 0, 0], [], m, n, r, c, HEADS, KV_HEADS, DIM, q_data_type="float32")
    assert not w.run(q, k, v, variant_args={"bias": bias}).any()


@pytest.mark.parametrize("causal", [False, True])
def test_variable_block_sparse(rng, causal):
    rows, columns = np.array([[3, 5, 4], [2, 0, 10]]), np.array([[4, 8, 4, 4], [8, 4, 8, 0]])
    blocks = rng.random((2, 3, 4)) < 0.7
    q, k, v = normal(rng, HEADS, 12, DIM), normal(rng, 2, 20, DIM), normal(rng, 2, 20, DIM)
    bias = normal(rng, 12, 20)
    mask = np.stack([np.repeat(np.repeat(blocks[h // 2], rows[h // 2], 0), columns[h // 2], 1) for h in range(4)], 2)
    if causal:
        mask &= seen(12, 20, causal=True)[..., None]
    w = fi_cupy.VariableBlockSparseAttentionWrapper(workspace(), variant=PLACED)
    w.plan(blocks, rows, columns, HEADS, KV_HEADS, DIM, causal=causal, q_data_type="float32")
    out, lse = w.run(q, k, v, None, None, True, None, bias)
    want = placed(*(x.swapaxes(0, 1) for x in (q, k, v)), mask, bias)
    check((out.swapaxes(0, 1), lse.T), want)


def test_a_variant_that_no_index_decides_needs_no_places(rng):
    w = fi_cupy.BlockSparseAttentionWrapper(workspace(), variant=BY_HEAD)
    w.plan([0, 1], [0], 4, 5, 4, 5, HEADS, KV_HEADS, DIM, q_data_type="float32")
    q, k = normal(rng, 4, HEADS, DIM), normal(rng, 5, KV_HEADS, DIM)
    check(w.run(q, k, k, None, None, None, None, None, True, None, GAIN),
          by_pairs(q, k, k, np.ones((4, 5), bool), by_head))  # fmt: skip


@pytest.mark.parametrize("by_position", [False, True])
def test_pod(rng, by_position):
    pages = Pages(rng, 8, 4, KV_HEADS, DIM)
    parts = [(normal(rng, n, KV_HEADS, DIM), normal(rng, n, KV_HEADS, DIM)) for n in (5, 9)]
    table, q_d = pages.add(parts), normal(rng, 2, HEADS, DIM)
    q_p, k_p, v_p = normal(rng, 3, HEADS, DIM), normal(rng, 7, KV_HEADS, DIM), normal(rng, 7, KV_HEADS, DIM)
    w = fi_cupy.PODWithPagedKVCacheWrapper(workspace(), variant=PLACED)
    w.plan(*table, HEADS, KV_HEADS, DIM, 4, q_data_type="float32")
    bias = normal(rng, 7, 9)
    arguments = (q_p, k_p, v_p, q_d, pages.cache)
    if by_position:  # behind FlashInfer's thirty parameters
        made = w.run(*arguments, None, None, True, "NHD", "NONE", None, -1, None, None, True, None, None, False, "NHD",
                     "NONE", None, -1, None, None, None, None, None, True, False, None, bias)  # fmt: skip
    else:
        made = w.run(*arguments, causal_p=True, return_lse_p=True, return_lse_d=True, variant_args={"bias": bias})
    check(made[0], placed(q_p, k_p, v_p, seen(3, 7, causal=True), bias))
    single = [placed(q_d[b : b + 1], k, v, np.ones((1, len(k)), bool), bias) for b, (k, v) in enumerate(parts)]
    want = [np.concatenate(x) for x in zip(*single, strict=True)]
    want[0][1], want[1][1] = placed_of_batch_1(q_d[1:], *parts[1], bias)
    check(made[1], want)


def placed_of_batch_1(q, k, v, bias):
    """PLACED adds 0.01 a request, which moves the lse but not the output."""
    out, lse = placed(q, k, v, np.ones((1, len(k)), bool), bias)
    return out[0], lse[0] + 0.01 / np.log(2)


def test_batch_attention(rng):
    rows, lens = (3, 1, 0, 2), (9, 4, 3, 2)
    pages = Pages(rng, 12, 4, KV_HEADS, DIM)
    parts = [(normal(rng, n, KV_HEADS, DIM), normal(rng, n, KV_HEADS, DIM)) for n in lens]
    indptr, indices, _ = pages.add(parts)
    qo = np.concatenate([[0], np.cumsum(rows)])
    q = normal(rng, int(qo[-1]), HEADS, DIM)
    w = fi_cupy.BatchAttention(device="cpu", variant=BY_HEAD)
    w.plan(qo, indptr, indices, lens, HEADS, KV_HEADS, DIM, DIM, 4, causal=True, q_data_type="float32",
           kv_data_type="float32")  # fmt: skip
    want = [by_pairs(q[a:b], k, v, seen(b - a, len(k), causal=True), by_head)
            for (k, v), a, b in zip(parts, qo[:-1], qo[1:], strict=True)]  # fmt: skip
    made = w.run(q, pages.cache, variant_args={"gain": GAIN})
    check(made, [np.concatenate(x) for x in zip(*want, strict=True)])
    with pytest.raises(errors.ArgumentError, match=r"gain .* is missing"):
        w.run(q, pages.cache)
    with pytest.raises(errors.ArgumentError, match="BatchAttention: variant bad has no softmax"):
        fi_cupy.BatchAttention(device="cpu", variant=define(name="bad", use_softmax=False))
    plain = fi_cupy.BatchAttention(device="cpu")
    plain.plan(qo, indptr, indices, lens, HEADS, KV_HEADS, DIM, DIM, 4, q_data_type="float32", kv_data_type="float32")
    with pytest.raises(errors.UnsupportedError, match="extra arguments belong to a variant"):
        plain.run(q, pages.cache, variant_args={"gain": GAIN})


WRAPPERS = {
    "cascade": lambda v: fi_cupy.MultiLevelCascadeAttentionWrapper(2, workspace(), variant=v),
    "shared decode": lambda v: fi_cupy.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace(), variant=v),
    "shared prefill": lambda v: fi_cupy.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace(), variant=v),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_parts_cannot_be_merged_of_is_refused(wrapper):
    make = WRAPPERS[wrapper]
    for options, words in (
        ({"use_softmax": False, "score_fn": lambda s, c: s}, "no softmax"),
        ({"post_process_fn": lambda o, c: o * 2}, "post_process_fn"),
        ({"score_fn": lambda s, c: s + c.kv_idx}, "kv_idx"),
        ({"mask_fn": "kv_idx <= qo_idx"}, "kv_idx, qo_idx"),
        ({"key_fn": lambda k, c: k * ops.where(c.batch == 0, 1.0, 2.0)}, "batch"),
    ):
        with pytest.raises(errors.UnsupportedError, match=rf"Wrapper: variant bad .*{words}"):
            make(define(name="bad", **options))
    make(define(name="good", score_fn="score * qo_head // kv_idx in a comment\n"))
    with pytest.raises(errors.ArgumentError, match="variant is str, expected one from define_variant"):
        make("soft_cap")


def test_one_level_takes_any_variant():
    fi_cupy.MultiLevelCascadeAttentionWrapper(
        1, workspace(), variant=define(name="any", score_fn=lambda s, c: s + c.kv_idx, post_process_fn=lambda o, c: -o)
    )


def test_sparse_errors(rng):
    for make in (fi_cupy.BlockSparseAttentionWrapper, fi_cupy.VariableBlockSparseAttentionWrapper):
        with pytest.raises(errors.UnsupportedError, match=r"variant text looks at kv_idx.*CUDA text"):
            make(workspace(), variant=define(name="text", score_fn="score + kv_idx"))
        make(workspace(), variant=define(name="text", score_fn="score * 2"))
        with pytest.raises(errors.ArgumentError, match="variant is int"):
            make(workspace(), variant=3)
    w = fi_cupy.BlockSparseAttentionWrapper(workspace(), variant=PLACED)
    w.plan([0, 1], [0], 4, 5, 4, 5, HEADS, KV_HEADS, DIM, q_data_type="float32")
    q, k = normal(rng, 4, HEADS, DIM), normal(rng, 5, KV_HEADS, DIM)
    with pytest.raises(errors.ArgumentError, match=r"bias .* is missing"):
        w.run(q, k, k)
    with pytest.raises(errors.ArgumentError, match="gain is unknown; it takes bias"):
        w.run(q, k, k, variant_args={"gain": GAIN})
    plain = fi_cupy.BlockSparseAttentionWrapper(workspace())
    plain.plan([0, 1], [0], 4, 5, 4, 5, HEADS, KV_HEADS, DIM, q_data_type="float32")
    with pytest.raises(errors.UnsupportedError, match="extra arguments belong to a variant"):
        plain.run(q, k, k, variant_args={"gain": GAIN})
