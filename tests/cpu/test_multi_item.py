"""Multi-item scoring through the prefill wrappers on CPU arrays, against one loop a pair of tokens."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import errors, multi_item, prefill
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

PREFIX = np.array([4, 6, 3], np.uint32)
#: Delimiter 0, then the positions of an item; the requests' keys are prefix + these.
ITEMS = [[0, 1, 2, 3, 0, 1, 0], [0, 1, 0, 1, 2], [0]]
LEN = 9
POSITIONS = np.array([x + [0] * (LEN - len(x)) for x in ITEMS], np.uint16).reshape(-1)
KV = [int(p) + len(x) for p, x in zip(PREFIX, ITEMS, strict=True)]
QO = [KV[0], 5, 4]  # whole sequence, a suffix, whole


def naive_mask(b, window=-1):
    """Which of the keys each query of request b sees, one pair at a time."""
    m, n, prefix = QO[b], KV[b], int(PREFIX[b])
    mask = np.zeros((m, n), bool)
    for i in range(m):
        own = n - m + i
        for j in range(own + 1):
            same_item = own >= prefix and own - j < ITEMS[b][own - prefix]
            mask[i, j] = (own < prefix or j < prefix or same_item) and (window < 0 or j >= own - window)
    return mask


def softmax_attention(q, k, v, mask):
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for i in np.flatnonzero(mask.any(axis=1)):  # the others see nothing: 0
        for h in range(q.shape[1]):
            g = h * k.shape[1] // q.shape[1]
            s = k[mask[i], g] @ q[i, h] / np.sqrt(q.shape[2])
            p = np.exp(s - s.max())
            out[i, h] = p @ v[mask[i], g] / p.sum()
    return out


@pytest.mark.parametrize("window", [-1, 2])
@pytest.mark.parametrize("with_max", [False, True])
def test_trap_31_items_see_the_prefix_and_themselves(rng, window, with_max):
    qo, kv = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (QO, KV))
    q, k, v = (normal(rng, (n[-1], h, 16), "float32") for n, h in ((qo, 4), (kv, 2), (kv, 2)))
    want = np.concatenate(
        [
            softmax_attention(q[qo[b] : qo[b + 1]], k[kv[b] : kv[b + 1]], v[kv[b] : kv[b + 1]], naive_mask(b, window))
            for b in range(3)
        ]
    )
    options = {
        "prefix_len_ptr": PREFIX, "token_pos_in_items_ptr": POSITIONS, "token_pos_in_items_len": LEN,
        "max_item_len_ptr": np.array([3, 2, 0], np.uint16) if with_max else None, "window_left": window,
        "q_data_type": "float32",
    }  # fmt: skip
    ragged = prefill.BatchPrefillWithRaggedKVCacheWrapper(np.zeros(1 << 12, np.uint8))
    ragged.plan(qo, kv, 4, 2, 16, **options)
    assert_close(ragged.run(q, k, v), want, "float32", "product")
    pages = -(-np.array(KV) // 4)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    cache = np.full((2, indptr[-1], 4, 2, 16), np.nan, np.float32)
    for b, n in enumerate(KV):
        j = np.arange(n)
        cache[:, indptr[b] + j // 4, j % 4] = np.stack([k, v])[:, kv[b] : kv[b + 1]]
    paged = prefill.BatchPrefillWithPagedKVCacheWrapper(np.zeros(1 << 12, np.uint8))
    paged.plan(
        qo,
        indptr,
        np.arange(indptr[-1], dtype=np.int32),
        (np.array(KV) - 1) % 4 + 1,
        4,
        2,
        16,
        4,
        causal=True,
        **options,
    )
    assert_close(paged.run(q, tuple(cache)), want, "float32", "product")


@pytest.mark.parametrize("block", [8, 64, 1 << 22])
def test_masks_are_the_same_in_any_blocks(monkeypatch, block):
    monkeypatch.setattr(multi_item, "_BLOCK_ELEMENTS", block)
    items = multi_item.read_multi_item("op", PREFIX, POSITIONS, LEN, None, None, None)
    packed = items.packed_mask("op", np.array(QO), np.array(KV))
    want = np.concatenate([np.packbits(naive_mask(b).reshape(-1), bitorder="little") for b in range(3)])
    assert (packed == want).all()


def test_more_queries_than_keys():
    items = multi_item.read_multi_item("op", [1], [0, 1], 2, None, None, None)
    packed = items.packed_mask("op", np.array([5]), np.array([3]))
    mask = np.unpackbits(packed, bitorder="little")[:15].reshape(5, 3)
    assert mask.tolist() == [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"prefix_len_ptr": None}, errors.ArgumentError, "token_pos_in_items_ptr belongs to multi-item scoring"),
        ({"token_pos_in_items_ptr": None}, errors.ArgumentError, "needs token_pos_in_items_ptr"),
        ({"token_pos_in_items_len": 3}, errors.ShapeError, "has 27 entries, expected 9"),
        ({"prefix_len_ptr": PREFIX[:2], "token_pos_in_items_ptr": POSITIONS[:18]}, errors.ShapeError, "has 2 entries"),
        ({"prefix_len_ptr": PREFIX * 0}, errors.ShapeError, "expected at least 11 = kv_len - prefix_len of request 0"),
        ({"custom_mask": np.ones(1, bool)}, errors.ArgumentError, "no custom_mask beside it"),
        (
            {"max_item_len_ptr": np.array([3, 1, 0], np.uint16)},
            errors.ArgumentError,
            r"max_item_len_ptr is \[3, 1, 0\]",
        ),
    ],
)
def test_errors(change, error, text):
    options = {"prefix_len_ptr": PREFIX, "token_pos_in_items_ptr": POSITIONS, "token_pos_in_items_len": LEN, **change}
    qo, kv = (np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (QO, KV))
    wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(np.zeros(1 << 12, np.uint8))
    with pytest.raises(error, match=text):
        wrapper.plan(qo, kv, 4, 2, 16, q_data_type="float32", **options)
