"""Prefill tiles whose keys are split: joined inside the launch, whatever the order in which the chunks arrive."""

from __future__ import annotations

import numpy as np
import pytest
from paged_cases import Pages, bits, check, indptr_of

from fi_cupy import prefill
from fi_cupy.reference.attention import attention
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.usefixtures("kernel")  # both prefill kernels
Paged = prefill.BatchPrefillWithPagedKVCacheWrapper
PAGE = 16


def workspace(nbytes=64 << 20):
    return cupy.full((nbytes,), 0xFF, cupy.uint8)


class Batch:
    def __init__(self, rng, lens, heads=8, kv_heads=2, dim=128, dtype="bfloat16"):
        self.args, self.dtype = (heads, kv_heads, dim, PAGE), dtype
        self.qo = indptr_of([m for m, _ in lens])
        kv = [n for _, n in lens]
        pages = Pages(rng, sum(-(-n // PAGE) for n in kv) + 2, PAGE, kv_heads, dim, dtype)
        self.table, self.sequences = pages.add(kv)
        self.q = normal(rng, (int(self.qo[-1]), heads, dim), dtype)
        self.gpu_q, self.gpu_kv = on_gpu(self.q), pages.gpu()

    def plan(self, wrapper, **options):
        wrapper.plan(self.qo, *self.table, *self.args, causal=True, q_data_type=self.dtype, **options)
        return wrapper

    def outputs(self):
        return poisoned(self.q.shape, self.dtype), poisoned(self.q.shape[:2], "float32")

    def run(self, wrapper, out=None, **options):
        out, lse = self.outputs() if out is None else out
        wrapper.run(self.gpu_q, self.gpu_kv, out=out, lse=lse, return_lse=True, **options)
        return out, lse

    def expect(self, **options):
        parts = []
        for b, (k, v) in enumerate(self.sequences):
            q, k, v = (x.astype(np.float64) for x in (self.q[self.qo[b] : self.qo[b + 1]], k, v))
            parts.append(attention(q, k, v, causal=True, **options))
        return tuple(np.concatenate([p[i] for p in parts]) for i in (0, 1))


def same(got, want):
    return all((bits(x) == bits(y)).all() for x, y in zip(got, want, strict=True))


@pytest.mark.older_archs
@pytest.mark.parametrize("rows", [3, 12, 70])  # tiles of 16, 64 and 128 packed rows, the last ones not full
@pytest.mark.parametrize("chunks", [2, 3, 4, 5, 9, 16, 17, 40])
def test_any_number_of_chunks(rng, rows, chunks):
    """40 chunks are three levels; 5, 9 and 17 leave a child without siblings."""
    batch = Batch(rng, [(rows, 64 * chunks - 5)], dtype="float16")
    wrapper = batch.plan(Paged(workspace()), fixed_split_size=64 // PAGE)
    # Every tile whose rows see more than one chunk is split; the first of several may see one.
    tiles = -(-rows * 4 // wrapper._planned.geometry.tiles.tile_q)
    assert max(1, tiles - 1) <= wrapper._planned.work.num_split <= tiles
    first = batch.run(wrapper)
    check(*first, *batch.expect())
    assert same(batch.run(wrapper, enable_pdl=False), first)


@pytest.mark.parametrize("dim", [24, 40, 64, 80, 192, 256])
@pytest.mark.parametrize("rows", [2, 40])
def test_any_head_dim(rng, dim, rows):
    batch = Batch(rng, [(rows, 900), (1, 300), (rows, 0)], dim=dim, dtype="float16")
    wrapper = batch.plan(Paged(workspace()), fixed_split_size=8)
    check(*batch.run(wrapper), *batch.expect())


@pytest.mark.parametrize("lens", [[(3, 40000)], [(100, 20000)], [(4, 9000), (200, 9000), (1, 40), (130, 130)]])
def test_launches_repeat_bit_for_bit(rng, lens):
    """Fifty launches one after the other: the counters are back at zero, and the order of arrival shows nowhere."""
    batch = Batch(rng, lens)
    wrapper = batch.plan(Paged(workspace()))
    assert wrapper._planned.work.num_split > 0
    sinks = normal(rng, (8,), "float32")
    first = batch.run(wrapper, sinks=on_gpu(sinks))
    check(*first, *batch.expect(sinks=sinks))
    for i in range(50):
        assert same(batch.run(wrapper, sinks=on_gpu(sinks), enable_pdl=i % 2 == 0), first)


def test_rows_that_see_nothing_in_some_chunk_or_anywhere(rng):
    """With a window the early chunks are empty for late rows; more queries than keys leave rows without any key."""
    batch = Batch(rng, [(90, 1000), (40, 20)])
    wrapper = batch.plan(Paged(workspace()), fixed_split_size=4, window_left=70)
    check(*batch.run(wrapper), *batch.expect(window_left=70))


def test_two_streams_at_once(rng):
    batches = [Batch(rng, [(3, 20000)]), Batch(rng, [(100, 12000), (2, 3000)])]
    wrappers = [batch.plan(Paged(workspace())) for batch in batches]
    outputs = [[batch.outputs() for _ in range(12)] for batch in batches]
    streams = [new_stream() for _ in batches]
    for i in range(12):
        for batch, wrapper, stream, out in zip(batches, wrappers, streams, outputs, strict=True):
            with stream:
                batch.run(wrapper, out[i])
    for batch, stream, out in zip(batches, streams, outputs, strict=True):
        stream.synchronize()
        check(*out[0], *batch.expect())
        assert all(same(o, out[0]) for o in out)


def test_two_wrappers_on_one_workspace(rng):
    """In one stream they may share it: a launch leaves nothing that a later one needs."""
    shared = workspace()
    batches = [Batch(rng, [(3, 20000)]), Batch(rng, [(100, 12000), (2, 3000)])]
    wrappers = [batch.plan(Paged(shared)) for batch in batches]
    results = [[batch.run(wrapper) for batch, wrapper in zip(batches, wrappers, strict=True)] for _ in range(6)]
    for i, batch in enumerate(batches):
        check(*results[0][i], *batch.expect())
        assert all(same(result[i], results[0][i]) for result in results)


@pytest.mark.parametrize("dim", [64, 128])
def test_graph_follows_plans_with_other_splits(rng, dim):
    lens = ([(3, 30000), (5, 100)], [(8, 700), (0, 40)], [(4, 9000), (4, 9000)], [(1, 5), (7, 60000)])
    most = 61000 // PAGE
    buffers = [cupy.zeros(n, cupy.int32) for n in (3, 3, most, 2)]
    wrapper = Paged(workspace(), "NHD", True, *buffers)
    cache = cupy.zeros((most + 8, 2, PAGE, 2, dim), cupy.uint16)
    q = poisoned((8, 8, dim), "bfloat16")
    out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
    stream, graph, splits = new_stream(), None, set()
    typed = cache.view(q.dtype)
    with stream:
        for case in lens:
            batch = Batch(rng, case, dim=dim)
            rows = batch.q.shape[0]
            batch.plan(wrapper)
            splits.add(wrapper._planned.work.num_split)
            cache[: batch.gpu_kv.shape[0]] = batch.gpu_kv.view("u2")
            q.view("u2")[:rows] = batch.gpu_q.view("u2")
            if graph is None:
                wrapper.run(q, typed, out=out, lse=lse, return_lse=True)
                stream.begin_capture()
                wrapper.run(q, typed, out=out, lse=lse, return_lse=True)
                graph = stream.end_capture()
            for _ in range(3):
                out.view("u2")[...] = 0xFFFF
                lse.view("u4")[...] = 0xFFFFFFFF
                graph.launch()
                stream.synchronize()
                check(out[:rows], lse[:rows], *batch.expect())
                assert np.isnan(to_float64(out[rows:])).all()
    assert len(splits) > 1


@pytest.mark.parametrize("rows", [2, 60])
def test_single_on_two_streams(rng, rows):
    """Functions without a plan have partial results and counters of their own on each stream."""
    cases = [[normal(rng, (n, h, 128)) for n, h in ((rows, 8), (kv, 2), (kv, 2))] for kv in (9000, 17000)]
    gpu = [[on_gpu(x) for x in case] for case in cases]
    streams = [new_stream() for _ in cases]
    results = [[], []]
    for _ in range(10):
        for stream, arrays, made in zip(streams, gpu, results, strict=True):
            with stream:
                made.append(prefill.single_prefill_with_kv_cache(*arrays, causal=True, return_lse=True))
    for stream, case, made in zip(streams, cases, results, strict=True):
        stream.synchronize()
        check(*made[0], *attention(*(x.astype(np.float64) for x in case), causal=True))
        assert all(same(x, made[0]) for x in made)
