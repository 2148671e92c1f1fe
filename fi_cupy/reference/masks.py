"""Attention masks as boolean arrays, True = the key is seen, and the kv range a block of queries needs."""

from __future__ import annotations

import numpy as np

from fi_cupy.reference._common import Array


def positional_mask(
    qo_idx: Array, kv_idx: Array, qo_len: int, kv_len: int, *, causal: bool = False, window_left: int = -1
) -> Array | None:
    """Causal and sliding-window visibility of the listed indices, broadcast together; None if all is visible.

    Causal is aligned at the bottom right, ``kv_idx + qo_len <= kv_len + qo_idx``: the last query sees every key.
    The window keeps `window_left` keys to the left and the query's own, also without causal,
    ``kv_idx + qo_len + window_left >= kv_len + qo_idx``; a negative value switches it off.
    """
    own = qo_idx + (kv_len - qo_len)
    keep = None
    if causal:
        keep = kv_idx <= own
    if window_left >= 0:
        inside = kv_idx + window_left >= own
        keep = inside if keep is None else keep & inside
    return keep


def kv_range(
    row_start: int, row_stop: int, qo_len: int, kv_len: int, *, causal: bool = False, window_left: int = -1
) -> tuple[int, int]:
    """The smallest ``[start, stop)`` that holds every key visible to the query rows ``[row_start, row_stop)``."""
    offset = kv_len - qo_len
    start = max(0, row_start + offset - window_left) if window_left >= 0 else 0
    stop = min(kv_len, max(0, row_stop + offset)) if causal else kv_len
    return min(start, stop), stop


def multi_item_mask(qo_len: int, kv_len: int, prefix_len: int, token_pos_in_items: Array) -> Array:
    """Mask of multi-item scoring, ``[qo_len, kv_len]``: items see the shared prefix and themselves, causally.

    The sequence is ``prefix, delimiter, item, delimiter, item, ...``; `token_pos_in_items[j]` is the position inside
    its item of token ``prefix_len + j``, 0 for a delimiter. A token at position p of its item sees the prefix and the
    last p tokens including itself, so a delimiter sees the prefix alone.

    Source: flashinfer prefill, MaskMode.MULTIITEMSCORING.
    """
    own = np.arange(qo_len)[:, None] + (kv_len - qo_len)
    kv = np.arange(kv_len)[None, :]
    item = np.asarray(token_pos_in_items, dtype=np.int64)
    in_item = own[:, 0] >= prefix_len
    position = np.zeros((qo_len, 1), dtype=np.int64)
    position[in_item, 0] = item[own[in_item, 0] - prefix_len]
    visible = (kv < prefix_len) | (own < kv + position) | ~in_item[:, None]
    return visible & (kv <= own)
