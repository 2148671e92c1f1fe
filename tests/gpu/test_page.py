"""The paged cache kernels: bytes must land exactly where the reference puts them, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import errors, page
from fi_cupy.reference import page as reference
from fi_cupy.testing.generators import new_stream, normal, on_gpu

cupy = pytest.importorskip("cupy")


def as_bytes(array):
    """Host copy as raw bytes: NaN and fp8 compare too."""
    host = array.get() if hasattr(array, "get") else array
    return np.ascontiguousarray(host).view(np.uint8)


def batch(rng, requests, page_size, spare=5):
    """(nnz, page table, batch_indices, positions): random requests, some empty, tokens shuffled, some skipped."""
    before = rng.integers(0, 3 * page_size, requests)
    new = rng.integers(0, 2 * page_size + 1, requests)
    new[rng.integers(0, requests, requests // 3)] = 0
    lens = before + new
    pages = -(-lens // page_size)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    indices = rng.permutation(int(indptr[-1]) + spare)[: indptr[-1]].astype(np.int32)
    last = np.where(lens > 0, (lens - 1) % page_size + 1, 1).astype(np.int32)
    append = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    where = reference.get_batch_indices_positions(append, lens.astype(np.int32), int(append[-1]) + 4)
    order = rng.permutation(len(where[0]))
    return len(order), (indices, indptr, last), where[0][order], where[1][order], int(indptr[-1]) + spare


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("form", ["packed", "pair", "views"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn"])
def test_trap_26_27_append(rng, dtype, form, layout):
    for heads, dim, page_size in ((8, 128, 16), (3, 64, 5), (1, 80, 1), (2, 6, 3)):
        n, (indices, indptr, last), b, p, pages = batch(rng, 7, page_size)
        k, v = normal(rng, (n, heads, dim), dtype), normal(rng, (n, heads, dim), dtype)
        inner = (page_size, heads, dim) if layout == "NHD" else (heads, page_size, dim)
        if form == "packed":
            host = normal(rng, (pages, 2, *inner), dtype)
            device = cache = on_gpu(host)
            host_k, host_v = host[:, 0], host[:, 1]
        elif form == "pair":
            host = [normal(rng, (pages, *inner), dtype) for _ in "kv"]
            cache = tuple(on_gpu(h) for h in host)
            device = cache
            host_k, host_v = host
        else:  # strided views of bigger arrays, K and V with different strides
            host = [normal(rng, (pages, 3, *inner), dtype), normal(rng, (pages, *inner[:-1], dim + 16), dtype)]
            device = [on_gpu(h) for h in host]
            cache = (device[0][:, 1], device[1][..., 16:])
            host_k, host_v = host[0][:, 1], host[1][..., 16:]
        reference.append_paged_kv_cache_(k, v, b, p, host_k, host_v, indices, indptr, last, layout)
        args = [on_gpu(x) for x in (k, v, b, p)] + [cache] + [on_gpu(x) for x in (indices, indptr, last)]
        assert page.append_paged_kv_cache(*args, layout) is None
        if form == "packed":
            assert (as_bytes(device) == as_bytes(host)).all()
        else:
            assert all((as_bytes(d) == as_bytes(h)).all() for d, h in zip(device, host, strict=True))


@pytest.mark.older_archs
def test_append_from_a_fused_tensor_with_many_vectors(rng):
    n, heads, dim, page_size = 2100, 4, 128, 16  # over 2^17 vectors: four a thread
    qkv = normal(rng, (n, 3 * heads, dim))
    pages = -(-n // page_size)
    cache = np.zeros((pages, 2, page_size, heads, dim), qkv.dtype)
    indices = rng.permutation(pages).astype(np.int32)
    b, p = np.zeros(n, np.int32), np.arange(n, dtype=np.int32)
    table = (indices, np.array([0, pages], np.int32), np.array([(n - 1) % page_size + 1], np.int32))
    device, fused = on_gpu(cache), on_gpu(qkv)
    new = fused[:, heads : 2 * heads], fused[:, 2 * heads :]
    page.append_paged_kv_cache(*new, on_gpu(b), on_gpu(p), device, *[on_gpu(t) for t in table])
    k, v = qkv[:, heads : 2 * heads], qkv[:, 2 * heads :]
    reference.append_paged_kv_cache_(k, v, b, p, cache[:, 0], cache[:, 1], *table)
    assert (as_bytes(device) == as_bytes(cache)).all()


def test_positions_outside_the_pages_write_nothing(rng):
    cache = on_gpu(normal(rng, (4, 2, 2, 1, 8)))
    before = as_bytes(cache).copy()
    new = on_gpu(normal(rng, (4, 1, 8)))
    b, p = on_gpu(np.array([0, 0, 7, -1], np.int32)), on_gpu(np.array([4, -1, 0, 0], np.int32))
    table = on_gpu(np.arange(4, dtype=np.int32)), on_gpu(np.array([0, 2, 4], np.int32)), on_gpu(np.ones(2, np.int32))
    page.append_paged_kv_cache(new, new, b, p, cache, *table)
    assert (as_bytes(cache) == before).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_append_mla(rng, dtype):
    n, (indices, indptr, last), b, p, pages = batch(rng, 6, 4)
    ckv, kpe = normal(rng, (n, 512), dtype), normal(rng, (n, 64), dtype)
    host = normal(rng, (pages, 4, 576), dtype)
    device = on_gpu(host)
    table = (indices, indptr, last)
    where = [on_gpu(x) for x in (b, p)]
    args = (device[..., :512], device[..., 512:], *[on_gpu(t) for t in table])
    page.append_paged_mla_kv_cache(on_gpu(ckv), on_gpu(kpe), *where, *args)
    reference.append_paged_mla_kv_cache_(ckv, kpe, b, p, host[..., :512], host[..., 512:], *table)
    assert (as_bytes(device) == as_bytes(host)).all()
    for only in (0, 1):
        ckv, kpe = normal(rng, (n, 512), dtype), normal(rng, (n, 64), dtype)
        caches, hosts = [None, None], [None, None]
        caches[only], hosts[only] = args[only], (host[..., :512], host[..., 512:])[only]
        page.append_paged_mla_kv_cache(on_gpu(ckv), on_gpu(kpe), *where, *caches, *args[2:])
        reference.append_paged_mla_kv_cache_(ckv, kpe, b, p, *hosts, *table)
        assert (as_bytes(device) == as_bytes(host)).all()


@pytest.mark.older_archs
def test_batch_indices_positions(rng):
    for requests, padding in ((1, 0), (5, 3), (700, 100), (3, 1000)):
        new = rng.integers(0, 9, requests)
        new[rng.integers(0, requests, requests // 2)] = 0
        lens = (new + rng.integers(0, 50, requests)).astype(np.int32)
        indptr = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
        nnz = int(indptr[-1]) + padding
        want = reference.get_batch_indices_positions(indptr, lens, nnz)
        got = page.get_batch_indices_positions(on_gpu(indptr), on_gpu(lens), nnz)
        outs = on_gpu(np.full(nnz, 77, np.int32)), on_gpu(np.full(nnz, 77, np.int32))
        again = page.get_batch_indices_positions(on_gpu(indptr), on_gpu(lens), nnz, *outs)
        assert again[0] is outs[0] and again[1] is outs[1]
        for w, g, o in zip(want, got, outs, strict=True):
            assert (as_bytes(g) == as_bytes(w)).all() and (as_bytes(o) == as_bytes(w)).all()


def test_trap_05_seq_lens(rng):
    pages = rng.integers(0, 4, 300)
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    last = rng.integers(1, 17, 300).astype(np.int32)
    got = page.get_seq_lens(on_gpu(indptr), on_gpu(last), 16)
    assert (as_bytes(got) == as_bytes(reference.get_seq_lens(indptr, last, 16))).all()


def test_devices_must_agree(rng):
    new = on_gpu(normal(rng, (1, 1, 8)))
    cache = on_gpu(normal(rng, (1, 2, 1, 1, 8)))
    one = np.zeros(1, np.int32)
    with pytest.raises(errors.DeviceError, match="batch_indices is on the CPU"):
        page.append_paged_kv_cache(
            new, new, one, on_gpu(one), cache, on_gpu(one), on_gpu(np.array([0, 1], np.int32)), on_gpu(one + 1)
        )


def test_graph_capture(rng):
    new, cache = on_gpu(normal(rng, (2, 1, 8))), on_gpu(np.zeros((2, 2, 2, 1, 8), normal(rng, (1,)).dtype))
    b, p = on_gpu(np.array([0, 1], np.int32)), on_gpu(np.array([0, 0], np.int32))
    table = on_gpu(np.array([1, 0], np.int32)), on_gpu(np.array([0, 1, 2], np.int32)), on_gpu(np.ones(2, np.int32))
    page.append_paged_kv_cache(new, new, b, p, cache, *table)  # compiled and loaded before the capture
    cache[...] = 0
    cupy.cuda.get_current_stream().synchronize()
    stream = new_stream()
    with stream:
        stream.begin_capture()
        page.append_paged_kv_cache(new, new, b, p, cache, *table)
        graph = stream.end_capture()
        p[...] = 1
        graph.launch()
        stream.synchronize()
    assert (as_bytes(cache[1, 0, 1]) == as_bytes(new[0])).all() and (as_bytes(cache[0, 1, 1]) == as_bytes(new[1])).all()
    assert not as_bytes(cache[:, :, 0]).any()
