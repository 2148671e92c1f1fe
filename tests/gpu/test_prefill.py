"""The prefill kernels against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest
from paged_cases import bits, check, indptr_of

from fi_cupy import errors, prefill
from fi_cupy.reference.attention import batch_prefill_paged, batch_prefill_ragged, single_prefill
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64

cupy = pytest.importorskip("cupy")
Paged, Ragged = prefill.BatchPrefillWithPagedKVCacheWrapper, prefill.BatchPrefillWithRaggedKVCacheWrapper
#: (query tokens, keys): a prompt, a chunk of one, fully masked rows, no keys, no queries, single tokens.
LENS = [(300, 300), (70, 333), (5, 3), (3, 0), (0, 40), (1, 129), (1, 1), (64, 64)]
SHORT = [(37, 70), (5, 3), (3, 0), (0, 9), (20, 130)]


pytestmark = pytest.mark.usefixtures("kernel")


def workspace(nbytes=32 << 20):
    return cupy.full((nbytes,), 0xFF, cupy.uint8)


class Base:
    def run(self, wrapper, q=None, **options):
        rows = self.q.shape[:2]
        out, lse = poisoned((*rows, self.dims[1]), self.dtype), poisoned(rows, "float32")
        q = self.gpu_q if q is None else q
        got = wrapper.run(q, *self.gpu_kv, out=out, lse=lse, return_lse=True, **options)
        assert got[0] is out and got[1] is lse
        return out, lse


class PagedBatch(Base):
    """A random page table and cache on the host and the GPU; rows that belong to no request are NaN."""

    def __init__(self, rng, lens, heads, kv_heads, dim, page_size=16, layout="NHD", dtype="bfloat16", scale=1.0):
        self.dtype, self.layout, self.dims, self.args = dtype, layout, (dim, dim), (heads, kv_heads, dim, page_size)
        self.qo, kv = indptr_of([m for m, _ in lens]), np.array([n for _, n in lens])
        pages = -(-kv // page_size)
        indptr = indptr_of(pages)
        num_pages = int(indptr[-1]) + 3
        indices = rng.permutation(num_pages)[: indptr[-1]].astype(np.int32)
        last = np.where(kv > 0, (kv - 1) % page_size + 1, 1).astype(np.int32)
        self.table = (indptr, indices, last)
        self.q = normal(rng, (int(self.qo[-1]), heads, dim), dtype, scale)
        cache = normal(rng, (num_pages, 2, page_size, kv_heads, dim), dtype)
        free = np.ones((num_pages, page_size), bool)
        for b, n in enumerate(kv):
            j = np.arange(n)
            free[indices[indptr[b] + j // page_size], j % page_size] = False
        cache.swapaxes(1, 2)[free] = np.nan
        self.cache = cache if layout == "NHD" else np.ascontiguousarray(cache.swapaxes(2, 3))
        self.gpu_q, self.gpu_kv = on_gpu(self.q), (on_gpu(self.cache),)

    def plan(self, wrapper, on_device=False, **options):
        table = [cupy.asarray(x) if on_device else x for x in (self.qo, *self.table)]
        wrapper.plan(*table, *self.args, q_data_type=self.dtype, **options)

    def expect(self, **options):
        k, v = (self.cache[:, i].astype(np.float64) for i in (0, 1))
        return batch_prefill_paged(
            self.q.astype(np.float64), k, v, self.qo, *self.table, kv_layout=self.layout, **options
        )


class RaggedBatch(Base):
    def __init__(self, rng, lens, heads, kv_heads, dims, dtype="bfloat16", scale=1.0):
        self.dtype, self.dims, self.args = dtype, dims, (heads, kv_heads, *dims)
        self.qo, self.kv = (indptr_of([x[i] for x in lens]) for i in (0, 1))
        self.q = normal(rng, (int(self.qo[-1]), heads, dims[0]), dtype, scale)
        self.k, self.v = (normal(rng, (int(self.kv[-1]), kv_heads, d), dtype) for d in dims)
        self.gpu_q, self.gpu_kv = on_gpu(self.q), (on_gpu(self.k), on_gpu(self.v))

    def plan(self, wrapper, **options):
        wrapper.plan(self.qo, self.kv, *self.args, q_data_type=self.dtype, **options)

    def expect(self, **options):
        return batch_prefill_ragged(
            *(x.astype(np.float64) for x in (self.q, self.k, self.v)), self.qo, self.kv, **options
        )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page_size"), [(9, 3, 64, 16), (8, 2, 128, 16), (4, 4, 128, 5)])
def test_traps_1_3_5_10_paged(rng, dtype, layout, causal, heads, kv_heads, dim, page_size):
    batch = PagedBatch(rng, LENS, heads, kv_heads, dim, page_size, layout, dtype)
    wrapper = Paged(workspace(), layout)
    batch.plan(wrapper, causal=causal)
    out, lse = batch.run(wrapper)
    check(out, lse, *batch.expect(causal=causal))
    batch.plan(wrapper, on_device=True, causal=causal)
    again, again_lse = batch.run(wrapper, enable_pdl=not causal)
    assert (bits(again) == bits(out)).all() and (bits(again_lse) == bits(lse)).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (256, 256), (192, 128), (128, 256)])
def test_ragged(rng, dtype, causal, dims):
    batch = RaggedBatch(rng, LENS, 4, 2, dims, dtype)
    wrapper = Ragged(workspace())
    batch.plan(wrapper, causal=causal)
    check(*batch.run(wrapper), *batch.expect(causal=causal))


@pytest.mark.parametrize("dim", [8, 16, 24, 40, 72, 80, 96, 112, 160, 248])
def test_any_head_dim(rng, dim):
    batch = PagedBatch(rng, SHORT, 4, 2, dim)
    wrapper = Paged(workspace())
    batch.plan(wrapper, causal=True)
    check(*batch.run(wrapper), *batch.expect(causal=True))


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (7, 1), (12, 4), (64, 1), (150, 1)])
def test_any_group_size(rng, heads, kv_heads):
    batch = PagedBatch(rng, SHORT, heads, kv_heads, 64)
    wrapper = Paged(workspace())
    batch.plan(wrapper, causal=True)
    check(*batch.run(wrapper), *batch.expect(causal=True))


@pytest.mark.parametrize("page_size", [1, 3, 8, 64, 100])
def test_any_page_size(rng, page_size):
    batch = PagedBatch(rng, LENS, 4, 2, 64, page_size)
    wrapper = Paged(workspace())
    batch.plan(wrapper, causal=True)
    check(*batch.run(wrapper), *batch.expect(causal=True))


@pytest.mark.parametrize(
    "lens", [[(5, 9000), (3, 4000)], [(1, 20000)], [(200, 6000)], [(17, 17)] * 300, [(1000, 1000), (1, 7000)]]
)
def test_schedules(rng, lens):
    """Split and unsplit, one wave and many, rows of 16, 64 and 128."""
    batch = PagedBatch(rng, lens, 8, 2, 128, scale=2.0)
    wrapper = Paged(workspace(64 << 20))
    batch.plan(wrapper, causal=True)
    out, lse = batch.run(wrapper)
    check(out, lse, *batch.expect(causal=True))
    for pdl in (False, True, None):
        again, again_lse = batch.run(wrapper, enable_pdl=pdl)
        assert (bits(again) == bits(out)).all() and (bits(again_lse) == bits(lse)).all()


@pytest.mark.parametrize("options", [{"disable_split_kv": True}, {"fixed_split_size": 16}])
def test_rows_do_not_depend_on_the_batch(rng, options):
    """The same request, alone and among others that change the tile: the same bits."""
    big = PagedBatch(rng, [(5, 3000), (400, 500), (40, 40)], 8, 2, 128)
    wrapper = Paged(workspace(64 << 20))
    big.plan(wrapper, causal=True, **options)
    out, lse = big.run(wrapper)
    check(out, lse, *big.expect(causal=True))
    indptr, indices, last = big.table
    wrapper.plan(
        big.qo[:2],
        indptr[:2],
        indices[: indptr[1]],
        last[:1],
        *big.args,
        causal=True,
        q_data_type="bfloat16",
        **options,
    )
    alone, alone_lse = wrapper.run(big.gpu_q[:5], *big.gpu_kv, return_lse=True)
    assert (bits(alone) == bits(out[:5])).all() and (bits(alone_lse) == bits(lse[:5])).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 63, 64, 100, 5000])
def test_trap_6_window(rng, window, causal):
    batch = PagedBatch(rng, LENS, 4, 2, 64)
    wrapper = Paged(workspace())
    batch.plan(wrapper, causal=causal, window_left=window)
    check(*batch.run(wrapper, window_left=window), *batch.expect(causal=causal, window_left=window))


@pytest.mark.parametrize(
    "options",
    [
        {"logits_soft_cap": 5.0},
        {"pos_encoding_mode": "ALIBI"},
        {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 8.0},
        {"sm_scale": 0.3},
        {"sm_scale": -0.1},
        {"sm_scale": 0.0},
    ],
)
def test_traps_7_8_logits(rng, options):
    batch = RaggedBatch(rng, LENS, 9, 3, (128, 128), scale=2.0)
    wrapper = Ragged(workspace())
    batch.plan(wrapper, causal=True, **options)
    check(*batch.run(wrapper), *batch.expect(causal=True, **options))


@pytest.mark.older_archs
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_trap_3_extreme_logits(rng, dtype):
    batch = PagedBatch(rng, SHORT, 4, 2, 64, dtype=dtype, scale=300.0)
    wrapper = Paged(workspace())
    batch.plan(wrapper, causal=True)
    check(*batch.run(wrapper), *batch.expect(causal=True))


@pytest.mark.older_archs
@pytest.mark.parametrize(("dim", "page_size"), [(128, 16), (256, 3)])
def test_older_tiles(rng, dim, page_size):
    batch = PagedBatch(rng, LENS, 4, 2, dim, page_size, dtype="float16")
    wrapper = Paged(workspace())
    batch.plan(wrapper, causal=True)
    check(*batch.run(wrapper), *batch.expect(causal=True))


@pytest.mark.parametrize("window", [-1, 20])
def test_trap_12_custom_mask(rng, window):
    masks = [rng.random((m, n)) < 0.5 for m, n in SHORT]
    masks[0][3] = False
    flat = np.concatenate([m.reshape(-1) for m in masks])
    packed = np.concatenate([np.packbits(m.reshape(-1), bitorder="little") for m in masks])
    for batch, wrapper in (
        (PagedBatch(rng, SHORT, 4, 2, 128), Paged(workspace())),
        (RaggedBatch(rng, SHORT, 4, 2, (64, 64)), Ragged(workspace())),
    ):
        want = batch.expect(custom_mask=flat, window_left=window)
        for given in (flat, cupy.asarray(flat)):
            batch.plan(wrapper, custom_mask=given, causal=True, window_left=window)
            check(*batch.run(wrapper), *want)
        for given in (packed, cupy.asarray(packed)):
            batch.plan(wrapper, packed_custom_mask=given, window_left=window)
            check(*batch.run(wrapper), *want)


def test_traps_11_15_scales_and_sinks(rng):
    sinks = normal(rng, (8,), "float32")
    for lens in (SHORT, [(5, 4000), (2, 30)]):
        batch = PagedBatch(rng, lens, 8, 2, 64)
        wrapper = Paged(workspace())
        batch.plan(wrapper, causal=True)
        scales = {"q_scale": 0.5, "k_scale": 1.5, "v_scale": 0.25}
        got = batch.run(wrapper, sinks=on_gpu(sinks), **scales)
        check(*got, *batch.expect(causal=True, sinks=sinks, **scales))


@pytest.mark.older_archs
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("qo_len", "kv_len", "options"), [
    (100, 177, {"causal": True}), (128, 128, {"causal": True, "window_left": 30}), (1, 700, {}), (40, 3000, {}),
    (7, 0, {}), (0, 5, {}),
])  # fmt: skip
def test_single(rng, layout, qo_len, kv_len, options):
    q, k, v = (normal(rng, (n, h, d), "float16") for n, h, d in ((qo_len, 6, 64), (kv_len, 2, 64), (kv_len, 2, 32)))
    want = single_prefill(*(x.astype(np.float64) for x in (q, k, v)), **options)
    if layout == "HND":
        k, v = (np.ascontiguousarray(x.swapaxes(0, 1)) for x in (k, v))
    for _ in range(2):  # the second call finds its schedule
        out, lse = prefill.single_prefill_with_kv_cache_return_lse(
            on_gpu(q), on_gpu(k), on_gpu(v), kv_layout=layout, **options
        )
        check(out, lse, *want)


def test_single_custom_mask_and_error(rng):
    q, k, v = (normal(rng, (n, 2, 128)) for n in (50, 90, 90))
    mask = rng.random((50, 90)) < 0.3
    want = single_prefill(*(x.astype(np.float64) for x in (q, k, v)), custom_mask=mask)
    for given in (mask, cupy.asarray(mask)):
        got = prefill.single_prefill_with_kv_cache(*map(on_gpu, (q, k, v)), custom_mask=given, return_lse=True)
        check(*got, *want)
    with pytest.raises(errors.ArgumentError, match="qo_len is 50 with causal=True"):
        prefill.single_prefill_with_kv_cache(on_gpu(q), on_gpu(k[:20]), on_gpu(v[:20]), causal=True)


def test_trap_27_strided_views(rng):
    batch = PagedBatch(rng, SHORT, 8, 2, 64)
    wrapper = Paged(workspace())
    batch.plan(wrapper, causal=True)
    pages, rows = batch.cache.shape[0], batch.q.shape[0]
    wide = poisoned((pages, 3, 16, 5, 80), "bfloat16")
    wide.view("u2")[:, ::2, :, 1:5:2, 8:72] = batch.gpu_kv[0].view("u2")
    q = poisoned((rows, 17, 64), "bfloat16")
    q.view("u2")[:, 1::2] = batch.gpu_q.view("u2")
    wide_out = poisoned((rows, 16, 64), "bfloat16")
    out, lse = wrapper.run(q[:, 1::2], wide[:, ::2, :, 1:5:2, 8:72], out=wide_out[:, ::2], return_lse=True)
    check(cupy.ascontiguousarray(out), lse, *batch.expect(causal=True))
    assert np.isnan(to_float64(wide_out[:, 1::2])).all()


def test_trap_28_graph_follows_later_plans(rng):
    first = PagedBatch(rng, [(40, 3000), (100, 200), (20, 700)], 8, 2, 128)
    buffers = [cupy.zeros(n, cupy.int32) for n in (4, 4, 2000, 3)]
    wrapper = Paged(workspace(), "NHD", True, *buffers)
    first.plan(wrapper, causal=True)
    out, lse = first.run(wrapper)
    check(out, lse, *first.expect(causal=True))
    pages = max(first.cache.shape[0], 2000)
    cache = cupy.zeros((pages, *first.cache.shape[1:]), cupy.uint16).view(first.gpu_kv[0].dtype)
    stream = new_stream()
    with stream:
        stream.begin_capture()
        wrapper.run(first.gpu_q, cache, out=out, lse=lse, return_lse=True)
        graph = stream.end_capture()
    # One long request alone (split), many rows in one (unsplit), and one without keys.
    for lens in ([(40, 3000), (100, 200), (20, 700)], [(3, 20000), (1, 5), (0, 0)], [(0, 0), (160, 160), (0, 7)]):
        batch = PagedBatch(rng, lens, 8, 2, 128)
        rows = batch.q.shape[0]
        with stream:
            batch.plan(wrapper, causal=True)
            cache.view("u2")[: batch.cache.shape[0]] = batch.gpu_kv[0].view("u2")
            first.gpu_q.view("u2")[:rows] = batch.gpu_q.view("u2")
            out.view("u2")[...] = 0xFFFF
            lse.view("u4")[...] = 0xFFFFFFFF
            graph.launch()
            stream.synchronize()
        check(out[:rows], lse[:rows], *batch.expect(causal=True))
        assert np.isnan(to_float64(out[rows:])).all()
    with pytest.raises(errors.PlanError, match="exceed"):
        PagedBatch(rng, [(9000, 9000), (1, 1), (1, 1)], 8, 2, 128).plan(wrapper, causal=True)


def test_single_in_a_graph(rng):
    q, k, v = (on_gpu(normal(rng, shape)) for shape in ((30, 8, 128), (4000, 2, 128), (4000, 2, 128)))
    stream = new_stream()
    prefill.single_prefill_with_kv_cache(q[:29], k, v)  # kernels loaded; not this schedule
    with stream:
        stream.begin_capture()
        out = prefill.single_prefill_with_kv_cache(q, k, v)
        graph = stream.end_capture()
        want = bits(prefill.single_prefill_with_kv_cache(q, k, v))
        for _ in range(3):
            out.view("u2")[...] = 0xFFFF
            graph.launch()
            stream.synchronize()
            assert (bits(out) == want).all()


def test_replanning_while_the_gpu_is_behind(rng):
    batches = [PagedBatch(rng, [(int(m), int(m + 50)) for m in rng.integers(1, 90, 5)], 4, 2, 64) for _ in range(12)]
    wrapper = Paged(workspace())
    results = []
    for batch in batches:
        batch.plan(wrapper, causal=True)
        results.append(batch.run(wrapper))
    for batch, got in zip(batches, results, strict=True):
        check(*got, *batch.expect(causal=True))


def test_workspace_size_is_exact(rng):
    batch = PagedBatch(rng, [(5, 9000)], 8, 2, 64)
    need, _ = Paged(workspace(16)).workspace_size(
        batch.qo, *batch.table, *batch.args, causal=True, q_data_type="bfloat16"
    )
    assert need > 0
    exact = Paged(workspace(need))
    batch.plan(exact, causal=True)
    check(*batch.run(exact), *batch.expect(causal=True))
    with pytest.raises(errors.WorkspaceError, match=rf"has {need - 256} bytes, expected at least {need}"):
        batch.plan(Paged(workspace(need - 256)), causal=True)


def test_unsupported_on_the_gpu(rng):
    batch = PagedBatch(rng, SHORT, 8, 2, 64)
    wrapper = Paged(workspace())
    table = (batch.qo, *batch.table)
    with pytest.raises(errors.DTypeError, match="float16 or bfloat16"):
        wrapper.plan(*table, *batch.args, q_data_type="float32")
    with pytest.raises(errors.ShapeError, match="head_dim_qk is 60"):
        wrapper.plan(*table, 8, 2, 60, 16)
    with pytest.raises(errors.DTypeError, match="keys and values have dtype bfloat16, expected float16 like q"):
        wrapper.plan(*table, *batch.args, q_data_type="float16", kv_data_type="bfloat16")
    batch.plan(wrapper)
    with pytest.raises(errors.LayoutError, match="multiples of 16 bytes"):
        wide = poisoned((batch.q.shape[0], 8, 65), "bfloat16")
        wrapper.run(wide[:, :, 1:], *batch.gpu_kv)


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    batch = PagedBatch(rng, SHORT, 8, 2, 64, dtype="float16")
    wrapper = Paged(torch.empty(8 << 20, dtype=torch.uint8, device="cuda"))
    q, cache = (torch.from_numpy(x).cuda() for x in (batch.q, batch.cache))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        batch.plan(wrapper, causal=True)
        out, lse = wrapper.run(q, cache, return_lse=True)
    side.synchronize()
    check(out.cpu().numpy(), lse.cpu().numpy(), *batch.expect(causal=True))
