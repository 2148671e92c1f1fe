"""A thousand random batches each for the Hopper prefill kernel and for decode, against float64 computed on the GPU.

What makes a kernel instance (head dims, pages or not, a cap) comes from a short list; lengths, heads, page size, mask,
window and scale are drawn freely. Keys and values behind each request's last one are NaN, outputs are poisoned.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from fi_cupy import decode, prefill
from fi_cupy.device import device_info
from fi_cupy.dtypes import bfloat16
from fi_cupy.testing.generators import poisoned
from fi_cupy.testing.tolerances import PRODUCT

cupy = pytest.importorskip("cupy")
SEEDS, BATCHES = range(10), 100
L2, LARGEST = PRODUCT["bfloat16"]


def normal16(rng, shape, scale=1.0):
    """bfloat16 bits of normal values."""
    bits = (rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def wide(bits):
    """float64 of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def padded(x, indptr, n):
    """Rows of every request, [batch, n, ..]; zeros behind its last."""
    rows = indptr[:-1, None] + np.arange(n)
    there = rows < indptr[1:, None]
    found = wide(x[cupy.asarray(np.where(there, rows, 0))]) if len(x) else cupy.zeros((*rows.shape, *x.shape[1:]))
    return cupy.where(cupy.asarray(there)[(..., *[None] * (x.ndim - 1))], found, 0.0)


def reference(q, k, v, qo, kv, sm_scale, causal, window, cap):
    """(out, base-2 lse) in float64: padded requests in one batch of products."""
    qo_len, kv_len = np.diff(qo), np.diff(kv)
    m, n, kv_heads = max(qo_len.max(), 1), max(kv_len.max(), 1), k.shape[1]
    group, batch = q.shape[1] // kv_heads, len(qo_len)
    x = padded(q, qo, m).reshape(batch, m, kv_heads, group, -1).transpose(0, 2, 1, 3, 4)
    s = cupy.matmul(x.reshape(batch, kv_heads, m * group, -1), padded(k, kv, n).transpose(0, 2, 3, 1)) * sm_scale
    if cap:
        s = cap * cupy.tanh(s / cap)
    own = np.arange(m)[None, :, None] + (kv_len - qo_len)[:, None, None]
    key = np.arange(n)[None, None]
    seen = np.broadcast_to(key < kv_len[:, None, None], (batch, m, n)).copy()
    if causal:
        seen &= key <= own
    if window >= 0:
        seen &= key >= own - window
    s = s.reshape(batch, kv_heads, m, group, n)
    s[~cupy.broadcast_to(cupy.asarray(seen)[:, None, :, None], s.shape)] = -np.inf
    top = s.max(axis=-1, keepdims=True)
    cupy.exp(s - cupy.where(cupy.isinf(top), 0, top), out=s)
    d = s.sum(axis=-1, keepdims=True)
    o = cupy.matmul(s.reshape(batch, kv_heads, m * group, n), padded(v, kv, n).transpose(0, 2, 1, 3))
    o = o.reshape(batch, kv_heads, m, group, -1) / cupy.where(d == 0, 1, d)
    lse = (top * math.log2(math.e) + cupy.log2(d))[..., 0]
    rows = cupy.asarray(np.concatenate([b * m + np.arange(c) for b, c in enumerate(qo_len)]))
    heads = q.shape[1]
    o = o.transpose(0, 2, 1, 3, 4).reshape(batch * m, heads, -1)[rows]
    return o, lse.transpose(0, 2, 1, 3).reshape(batch * m, heads)[rows]


def check(out, lse, want, want_lse, what):
    """As `assert_close` and `paged_cases.check`, on the GPU: NaN never passes, rows that see nothing are 0 and -inf."""
    if want.size == 0:
        return
    got, seen = wide(out.view(np.uint16)), cupy.isfinite(want_lse)
    off = cupy.abs(got - want)
    size = cupy.abs(want).max()
    lse_off = cupy.abs(cupy.where(seen, lse - want_lse, 0.0)) / cupy.maximum(
        cupy.abs(cupy.where(seen, want_lse, 0)), 10
    )
    right = cupy.where(seen, ~cupy.isinf(lse), cupy.isneginf(lse) & (got == 0).all(axis=-1)).all()
    found = cupy.stack([x.astype(np.float64) for x in (
        cupy.sqrt((off * off).sum()), cupy.sqrt((want * want).sum()), off.max(), size, lse_off.max(), right
    )]).get()  # fmt: skip
    norm, full, largest, size, worst_lse, right = found.tolist()
    # Each comparison is false for NaN.
    assert right and norm <= L2 * full and largest <= LARGEST * size and worst_lse <= 2e-5, (
        f"{what}: relative L2 {norm / max(full, 1e-300):.2e}, largest {largest / max(size, 1e-300):.2e}, "
        f"lse {worst_lse:.1e}, unseen rows right: {bool(right)}"
    )


def offsets(lens):
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)


class Keys:
    """K and V of a batch, contiguous or in pages of random order; NaN behind a request's last key."""

    def __init__(self, rng, kv_len, kv_heads, dims, page_size=0, layout="NHD"):
        self.kv = offsets(kv_len)
        self.k, self.v = (normal16(gpu(rng), (int(self.kv[-1]), kv_heads, d)) for d in dims)
        if not page_size:
            return
        pages = -(-kv_len // page_size)
        indptr = offsets(pages)
        total = int(indptr[-1]) + 1
        indices = rng.permutation(total)[: indptr[-1]].astype(np.int32)
        request = np.repeat(np.arange(len(kv_len)), kv_len)
        j = np.arange(self.kv[-1]) - self.kv[request]
        at = [cupy.asarray(x) for x in (indices[indptr[request] + j // page_size], j % page_size)]
        self.cache = []
        for x in (self.k, self.v):
            cache = cupy.full((total, page_size, *x.shape[1:]), 0x7FFF, np.uint16)
            cache[at[0], at[1]] = x
            self.cache.append(as_bfloat16(cache if layout == "NHD" else cupy.ascontiguousarray(cache.swapaxes(1, 2))))
        self.table = indptr, indices, np.where(kv_len > 0, (kv_len - 1) % page_size + 1, 1).astype(np.int32)


def gpu(rng):
    return cupy.random.default_rng(int(rng.integers(1 << 62)))


def as_bfloat16(bits):
    return bits.view(bfloat16.np)


def lengths(rng, most):
    """From 0 to `most`, short ones and multiples of tiles more often than not."""
    tiles = rng.choice([64, 80, 128, 160, 192, 256])
    return min(int([rng.integers(0, most + 1), rng.integers(0, 20), tiles, most][rng.integers(4)]), most)


@pytest.mark.parametrize("seed", SEEDS)
def test_prefill(seed):
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    rng, space = np.random.default_rng(seed), cupy.full((64 << 20,), 0xFF, cupy.uint8)
    for number in range(BATCHES):
        dims = [(64, 64), (128, 128), (128, 128), (192, 128), (256, 256)][rng.integers(5)]
        cap = [0.0, 0.0, 20.0][rng.integers(3)]
        # Groups that divide a tile; others have a kernel of their own.
        odd = dims == (128, 128) and not cap and rng.integers(4) == 0
        group = int(rng.choice([5, 7] if odd else [1, 2, 4, 8, 16]))
        kv_heads = int(rng.integers(1, max(16 // group, 1) + 1))
        long = rng.integers(6) == 0  # few rows over many keys: split
        batch, most = int(rng.integers(1, 5)), (40, 5000) if long else (400, 700)
        qo_len, kv_len = (np.array([lengths(rng, n) for _ in range(batch)]) for n in most)
        causal, window = bool(rng.integers(2)), int(rng.choice([-1, -1, -1, 0, 17, 79, 80, 200, 3000]))
        page_size, layout = int(rng.choice([0, 8, 16, 24, 64, 80, 256])), str(rng.choice(["NHD", "HND"]))
        sm_scale = float(rng.choice([1.0, 0.3])) / math.sqrt(dims[0])
        what = f"seed {seed}, batch {number}: {dims} {qo_len.tolist()} over {kv_len.tolist()} heads {kv_heads}x{group} "
        what += f"page {page_size} {layout} causal {causal} window {window} cap {cap}"
        keys = Keys(rng, kv_len, kv_heads, dims, page_size, layout)
        qo = offsets(qo_len)
        q = normal16(gpu(rng), (int(qo[-1]), kv_heads * group, dims[0]), float(rng.choice([1, 4])))
        out, lse = poisoned((*q.shape[:2], dims[1]), "bfloat16"), poisoned(q.shape[:2], "float32")
        options = {
            "causal": causal, "window_left": window, "logits_soft_cap": cap, "sm_scale": sm_scale,
            "q_data_type": "bfloat16",
        }  # fmt: skip
        if page_size:
            wrapper = prefill.BatchPrefillWithPagedKVCacheWrapper(space, layout, backend="fa3")
            wrapper.plan(qo, *keys.table, kv_heads * group, kv_heads, dims[0], page_size, dims[1], **options)
            wrapper.run(as_bfloat16(q), tuple(keys.cache), out=out, lse=lse)
        else:
            wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(space, backend="fa3")
            wrapper.plan(qo, keys.kv, kv_heads * group, kv_heads, *dims, **options)
            wrapper.run(as_bfloat16(q), as_bfloat16(keys.k), as_bfloat16(keys.v), out=out, lse=lse)
        check(out, lse, *reference(q, keys.k, keys.v, qo, keys.kv, sm_scale, causal, window, cap), what)


@pytest.mark.parametrize("seed", SEEDS)
def test_decode(seed):
    rng, space = np.random.default_rng(100 + seed), cupy.full((64 << 20,), 0xFF, cupy.uint8)
    for number in range(BATCHES):
        dim, cap = int(rng.choice([64, 128, 256])), [0.0, 0.0, 20.0][rng.integers(3)]
        group = int(rng.choice([1, 2, 4, 8]))
        kv_heads = int(rng.integers(1, max(8 // group, 1) + 1))
        batch = int(rng.choice([1, 2, 5, 33]))
        kv_len = np.array([lengths(rng, 300 if batch > 5 else 6000) for _ in range(batch)])
        window, page_size = int(rng.choice([-1, -1, -1, 0, 17, 200, 3000])), int(rng.choice([1, 5, 8, 16, 64]))
        layout, sm_scale = str(rng.choice(["NHD", "HND"])), float(rng.choice([1.0, 0.3])) / math.sqrt(dim)
        what = f"seed {seed}, batch {number}: d{dim} {kv_len.tolist()} heads {kv_heads}x{group} page {page_size} "
        what += f"{layout} window {window} cap {cap}"
        keys = Keys(rng, kv_len, kv_heads, (dim, dim), page_size, layout)
        q = normal16(gpu(rng), (batch, kv_heads * group, dim), float(rng.choice([1, 4])))
        out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
        wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(space, layout)
        wrapper.plan(
            *keys.table, kv_heads * group, kv_heads, dim, page_size, window_left=window, logits_soft_cap=cap,
            sm_scale=sm_scale, q_data_type="bfloat16",
        )  # fmt: skip
        wrapper.run(as_bfloat16(q), tuple(keys.cache), out=out, lse=lse, return_lse=True)
        want = reference(q, keys.k, keys.v, np.arange(batch + 1, dtype=np.int32), keys.kv, sm_scale, False, window, cap)
        check(out, lse, *want, what)
