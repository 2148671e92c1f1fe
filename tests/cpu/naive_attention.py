"""Attention one row and head at a time in float64, and page tables: what the tests of the wrappers compare with."""

from __future__ import annotations

import numpy as np


def attend(q, k, v, mask, scale=None, cap=0.0, sinks=None, slopes=None):
    """(out [m, heads, dim], base-2 lse [m, heads]) for ``mask [m, n]``, True = seen."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    (m, heads, dim), kv_heads = q.shape, k.shape[1]
    scale = 1 / np.sqrt(dim) if scale is None else scale
    out, lse = np.zeros((m, heads, v.shape[2])), np.full((m, heads), -np.inf)
    for i in range(m):
        keys = np.flatnonzero(mask[i])
        for h in range(heads):
            g = h * kv_heads // heads
            s = k[keys, g] @ q[i, h] * scale
            if slopes is not None:
                s = s + slopes[h] * (keys - i)
            if cap > 0:
                s = cap * np.tanh(s / cap)
            extra = np.array([] if sinks is None else [sinks[h]], float)
            if len(s) + len(extra) == 0:
                continue
            top = max(np.concatenate([s, extra]))
            p = np.exp(s - top)
            d = p.sum() + np.exp(extra - top).sum()
            out[i, h] = p @ v[keys, g] / d
            lse[i, h] = (top + np.log(d)) * np.log2(np.e)
    return out, lse


def naive(
    q, k, v, *, causal=False, window_left=-1, cap=0.0, sm_scale=None, mode="NONE", mask=None, sinks=None,
    rope_scale=1.0, rope_theta=1e4,
):  # fmt: skip
    """`attend` for FlashInfer's options: m queries at the end of n keys; a mask replaces `causal`."""
    (m, heads, _), n = q.shape, len(k)
    keep = seen(m, n, causal and mask is None, window_left)
    if mask is not None:
        keep &= mask
    if mode == "ROPE_LLAMA":
        q = rotated(q, n - m + np.arange(m), rope_theta, rope_scale)
        k = rotated(k, np.arange(n), rope_theta, rope_scale)
    slopes = [slope(h, heads) for h in range(heads)] if mode == "ALIBI" else None
    return attend(q, k, v, keep, sm_scale, cap, sinks, slopes)


def rotated(x, positions, theta=1e4, scale=1.0):
    """Halves of the last dimension of x [n, heads, dim] rotated, by complex numbers."""
    x, half = np.asarray(x).astype(np.float64), x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half) / scale
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def slope(head, heads):
    """ALiBi: 2^(-8 (h + 1) / n) for the largest power of two n <= heads, then every second one of 2n."""
    n = 1 << (heads.bit_length() - 1)
    return 2.0 ** (-8.0 * (head + 1) / n) if head < n else 2.0 ** (-4.0 * (2 * (head - n) + 1) / n)


def seen(m, n, causal=False, window=-1):
    """The mask of m queries at the end of n keys, one pair at a time."""
    mask = np.zeros((m, n), bool)
    for i in range(m):
        for j in range(n):
            own = n - m + i
            mask[i, j] = (not causal or j <= own) and (window < 0 or j >= own - window)
    return mask


class Pages:
    """A paged cache filled request by request, in random page order; unused rows hold NaN."""

    def __init__(self, rng, num_pages, page_size, kv_heads, dim, dtype=np.float32, layout="NHD"):
        self.page_size, self.layout = page_size, layout
        self.free = list(rng.permutation(num_pages))
        self.k, self.v = np.full((2, num_pages, page_size, kv_heads, dim), np.nan).astype(dtype)

    def add(self, sequences):
        """(indptr, indices, last_page_len) of a list of (k, v), whose values are stored."""
        indptr, indices, last = [0], [], []
        for k, v in sequences:
            pages = [int(self.free.pop()) for _ in range(-(-len(k) // self.page_size))]
            for j in range(len(k)):
                page, row = pages[j // self.page_size], j % self.page_size
                self.k[page, row], self.v[page, row] = k[j], v[j]
            indices += pages
            indptr.append(len(indices))
            last.append((len(k) - 1) % self.page_size + 1 if len(k) else 1)
        return tuple(np.array(x, np.int32) for x in (indptr, indices, last))

    @property
    def cache(self):
        """(keys, values) in the layout."""
        if self.layout == "NHD":
            return self.k, self.v
        return tuple(np.ascontiguousarray(x.swapaxes(1, 2)) for x in (self.k, self.v))
