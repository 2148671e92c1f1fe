"""The decode kernel against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import decode, errors
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.reference.attention import batch_decode_paged, single_decode
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
Wrapper = decode.BatchDecodeWithPagedKVCacheWrapper
LENS = [1, 15, 16, 17, 0, 64, 333, 1200]


def workspace(nbytes=8 << 20):
    return cupy.full((nbytes,), 0xFF, cupy.uint8)


class Batch:
    """A random page table and cache on the host and the GPU; rows that belong to no request are NaN."""

    def __init__(self, rng, lens, heads, kv_heads, dim, page_size, layout="NHD", dtype="bfloat16", kv="", scale=1.0):
        self.dtype, self.layout = dtype, layout
        self.kv_dtype = to_dtype(kv or dtype)
        self.args = (heads, kv_heads, dim, page_size)
        pages = np.array([-(-n // page_size) for n in lens])
        indptr = np.concatenate([[0], np.cumsum(pages)])
        num_pages = int(indptr[-1]) + 3
        indices = rng.permutation(num_pages)[: indptr[-1]]
        last = np.array([(n - 1) % page_size + 1 if n else 1 for n in lens])
        self.table = tuple(x.astype(np.int32) for x in (indptr, indices, last))
        self.q = normal(rng, (len(lens), heads, dim), dtype, scale)
        cache = normal(rng, (num_pages, 2, page_size, kv_heads, dim), self.kv_dtype)
        free = np.ones((num_pages, page_size), bool)
        for b, n in enumerate(lens):
            j = np.arange(n)
            free[indices[indptr[b] + j // page_size], j % page_size] = False
        cache.swapaxes(1, 2)[free] = np.nan
        self.cache = cache if layout == "NHD" else np.ascontiguousarray(cache.swapaxes(2, 3))
        self.gpu_q, self.gpu_cache = on_gpu(self.q), on_gpu(self.cache)

    def plan(self, wrapper, on_device=False, **options):
        table = [cupy.asarray(x) for x in self.table] if on_device else self.table
        wrapper.plan(*table, *self.args, q_data_type=self.dtype, kv_data_type=self.kv_dtype, **options)

    def expect(self, **options):
        k, v = (self.cache[:, i].astype(np.float64) for i in (0, 1))
        return batch_decode_paged(self.q.astype(np.float64), k, v, *self.table, kv_layout=self.layout, **options)

    def check(self, out, lse, **options):
        want, want_lse = self.expect(**options)
        assert_close(to_float64(out), want, to_dtype(out.dtype), "product")
        # The log-sum-exp is fp32 from fp32 products: 1e-5 of its size, or of 1 where it is small.
        got, finite = to_float64(lse), np.isfinite(want_lse)
        assert (np.isneginf(got) == ~finite).all()
        assert (np.abs(got - want_lse)[finite] <= 2e-5 * np.maximum(np.abs(want_lse[finite]), 10)).all()

    def run(self, wrapper, out_dtype=None, **options):
        shape = self.q.shape
        out, lse = poisoned(shape, out_dtype or self.dtype), poisoned(shape[:2], "float32")
        assert wrapper.run(self.gpu_q, self.gpu_cache, out=out, lse=lse, **options) is out
        return out, lse


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page_size"), [(9, 3, 64, 16), (8, 2, 128, 16), (8, 2, 128, 5)])
def test_layouts_and_pages(rng, dtype, layout, heads, kv_heads, dim, page_size):
    batch = Batch(rng, LENS, heads, kv_heads, dim, page_size, layout, dtype)
    wrapper = Wrapper(workspace(), layout)
    batch.plan(wrapper)
    out, lse = batch.run(wrapper)
    batch.check(out, lse)
    batch.plan(wrapper, on_device=True)
    again, again_lse = batch.run(wrapper)
    assert (again.view("u2") == out.view("u2")).all() and (again_lse.view("u4") == lse.view("u4")).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (7, 1), (12, 1), (17, 1), (64, 1)])
def test_any_group_size(rng, heads, kv_heads):
    batch = Batch(rng, [5, 700, 90], heads, kv_heads, 64, 16)
    wrapper = Wrapper(workspace())
    batch.plan(wrapper)
    batch.check(*batch.run(wrapper))


@pytest.mark.parametrize("dim", [8, 40, 72, 96, 192, 256])
def test_any_head_dim(rng, dim):
    batch = Batch(rng, [5, 700, 90], 8, 2, dim, 16, scale=2.0)
    wrapper = Wrapper(workspace())
    batch.plan(wrapper)
    batch.check(*batch.run(wrapper))


@pytest.mark.parametrize("page_size", [1, 3, 8, 32, 64])
def test_any_page_size(rng, page_size):
    batch = Batch(rng, LENS, 4, 2, 64, page_size)
    wrapper = Wrapper(workspace())
    batch.plan(wrapper)
    batch.check(*batch.run(wrapper))


@pytest.mark.parametrize("kv", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(("dtype", "dim", "page_size"), [("bfloat16", 128, 16), ("float16", 80, 3)])
def test_fp8_cache_and_scales(rng, kv, dtype, dim, page_size):
    batch = Batch(rng, LENS, 8, 2, dim, page_size, dtype=dtype, kv=kv)
    wrapper = Wrapper(workspace())
    batch.plan(wrapper)
    scales = {"q_scale": 0.5, "k_scale": 1.5, "v_scale": 0.25}
    batch.check(*batch.run(wrapper, **scales), **scales)


FP8 = "float8_e4m3fn"


def planned_pair(wrapper):
    return wrapper._planned.kernel.spec.symbol.endswith("_pair")


@pytest.mark.parametrize("split", [{"fixed_split_size": 5}, {"disable_split_kv": True}])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "pair"),
    [(2, 2, 1), (12, 4, 1), (30, 6, 1), (16, 2, 1), (18, 2, 1), (32, 2, 1), (34, 2, 0), (9, 3, 0), (4, 1, 0)],
)
def test_fp8_pairs_of_heads(rng, split, layout, heads, kv_heads, pair):
    """Neighbouring kv heads share a CTA where they lie side by side, are even in number and fit one."""
    batch = Batch(rng, LENS[:-1], heads, kv_heads, 64, 16, layout, kv=FP8)
    wrapper = Wrapper(workspace(), layout)
    batch.plan(wrapper, **split)
    assert planned_pair(wrapper) == (pair and layout == "NHD")
    batch.check(*batch.run(wrapper))


@pytest.mark.parametrize(
    ("dim", "page_size", "kv"), [(128, 16, FP8), (128, 3, FP8), (80, 1, FP8), (96, 64, "float8_e5m2")]
)
def test_fp8_pairs_pages_and_dims(rng, dim, page_size, kv):
    batch = Batch(rng, LENS, 8, 4, dim, page_size, kv=kv)
    for split in ({"fixed_split_size": -(-200 // page_size)}, {"disable_split_kv": True}):
        wrapper = Wrapper(workspace())
        batch.plan(wrapper, **split)
        assert planned_pair(wrapper)
        out, lse = batch.run(wrapper)
        batch.check(out, lse)
        for pdl in (False, True):
            again, again_lse = batch.run(wrapper, enable_pdl=pdl)
            assert (again.view("u2") == out.view("u2")).all() and (again_lse.view("u4") == lse.view("u4")).all()


@pytest.mark.parametrize(
    "options",
    [
        {"window_left": 15}, {"window_left": 100}, {"logits_soft_cap": 5.0}, {"pos_encoding_mode": "ALIBI"},
        {"pos_encoding_mode": "ROPE_LLAMA"}, {"pos_encoding_mode": "ROPE_LLAMA", "window_left": 70},
    ],
)  # fmt: skip
@pytest.mark.parametrize("heads", [12, 36])
def test_fp8_pairs_with_options(rng, options, heads):
    batch = Batch(rng, LENS, heads, 4, 64, 16, kv=FP8)
    for split in ({"fixed_split_size": 7}, {"disable_split_kv": True}):
        wrapper = Wrapper(workspace())
        batch.plan(wrapper, **options, **split)
        assert planned_pair(wrapper)
        out, lse = batch.run(wrapper)
        if "ROPE_LLAMA" not in options.values():
            batch.check(out, lse, **options)
            continue
        want, want_lse = batch.expect(**options)
        assert_close(to_float64(out), want, "bfloat16", "product")
        assert np.allclose(to_float64(lse), want_lse, atol=3e-3)


def test_fp8_pairs_sinks_and_factors_a_head(rng):
    batch = Batch(rng, LENS, 12, 4, 64, 16, kv=FP8)
    sinks = normal(rng, (12,), "float32")
    factors = {"q_scale": (12,), "k_scale": (4,), "v_scale": (4,)}
    factors = {name: rng.uniform(0.5, 2.0, shape).astype(np.float32) for name, shape in factors.items()}
    for split in ({"fixed_split_size": 7}, {"disable_split_kv": True}):
        wrapper = Wrapper(workspace())
        batch.plan(wrapper, **split)
        assert planned_pair(wrapper)
        out, lse = batch.run(wrapper, sinks=on_gpu(sinks), **{name: on_gpu(x) for name, x in factors.items()})
        batch.check(out, lse, sinks=sinks, **factors)


@pytest.mark.parametrize("lens", [[100] * 40, [3000] * 34, [7, 900, 1, 65, 2500] * 7])
def test_fp8_pairs_in_large_batches(rng, lens):
    """A batch that fills the device takes pairs by itself; a small one does not."""
    batch = Batch(rng, lens, 32, 8, 128, 16, kv=FP8)
    wrapper = Wrapper(workspace(32 << 20))
    batch.plan(wrapper)
    assert planned_pair(wrapper)
    batch.check(*batch.run(wrapper))
    small = Batch(rng, lens[:2], 32, 8, 128, 16, kv=FP8)
    small.plan(wrapper)
    assert not planned_pair(wrapper)
    small.check(*small.run(wrapper))


@pytest.mark.parametrize(
    ("lens", "heads", "kv_heads"),
    [([20000], 8, 2), ([4097, 1, 8000], 32, 8), ([100] * 200, 8, 4), ([3000] * 40, 32, 8)],
)
def test_schedules(rng, lens, heads, kv_heads):
    """Split and unsplit, one wave and many."""
    batch = Batch(rng, lens, heads, kv_heads, 128, 16, scale=3.0)
    wrapper = Wrapper(workspace(32 << 20))
    batch.plan(wrapper)
    out, lse = batch.run(wrapper)
    batch.check(out, lse)
    for pdl in (False, True, None):
        again, again_lse = batch.run(wrapper, enable_pdl=pdl)
        assert (again.view("u2") == out.view("u2")).all() and (again_lse.view("u4") == lse.view("u4")).all()


@pytest.mark.older_archs
def test_trap_3_extreme_logits_and_empty_requests(rng):
    batch = Batch(rng, [0, 700, 0], 8, 2, 64, 16, dtype="float16", scale=300.0)
    wrapper = Wrapper(workspace())
    batch.plan(wrapper)
    out, lse = batch.run(wrapper)
    batch.check(out, lse)
    assert (to_float64(out)[[0, 2]] == 0).all() and np.isneginf(to_float64(lse)[[0, 2]]).all()


@pytest.mark.parametrize("window", [0, 15, 16, 100, 5000])
def test_trap_6_window(rng, window):
    batch = Batch(rng, LENS, 8, 2, 64, 16)
    wrapper = Wrapper(workspace())
    batch.plan(wrapper, window_left=window)
    batch.check(*batch.run(wrapper, window_left=window), window_left=window)


@pytest.mark.parametrize("options", [{"logits_soft_cap": 5.0}, {"pos_encoding_mode": "ALIBI"}, {"sm_scale": 0.3}])
def test_traps_7_8_logits(rng, options):
    batch = Batch(rng, LENS, 9, 3, 64, 16, scale=2.0)
    wrapper = Wrapper(workspace())
    batch.plan(wrapper, **options)
    batch.check(*batch.run(wrapper), **options)


@pytest.mark.older_archs
@pytest.mark.parametrize(
    ("dtype", "kv", "dim", "page_size"),
    [("bfloat16", "", 64, 16), ("float16", "", 128, 5), ("float16", "float8_e4m3fn", 128, 16)],
)
def test_trap_9_rope_inside(rng, dtype, kv, dim, page_size):
    batch = Batch(rng, [*LENS, 40000], 8, 2, dim, page_size, dtype=dtype, kv=kv)
    options = {"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 5e5, "rope_scale": 2.0}
    wrapper = Wrapper(workspace())
    batch.plan(wrapper, **options)
    out, lse = batch.run(wrapper)
    want, want_lse = batch.expect(**options)
    assert_close(to_float64(out), want, dtype, "product")
    # Rotated keys are rounded to the type of the products, which the log-sum-exp sees.
    assert np.allclose(to_float64(lse), want_lse, atol=2e-2 if dtype == "bfloat16" else 3e-3)


@pytest.mark.older_archs
def test_sinks_and_output_types(rng):
    batch = Batch(rng, LENS, 8, 2, 64, 16)
    sinks = normal(rng, (8,), "float32")
    for o in ("bfloat16", "float16", "float32"):
        wrapper = Wrapper(workspace())
        batch.plan(wrapper, o_data_type=o)
        want, _ = batch.expect(sinks=sinks)
        out, _ = batch.run(wrapper, o, sinks=on_gpu(sinks))
        assert_close(to_float64(out), want, "bfloat16", "product")


def test_trap_27_strided_views(rng):
    batch = Batch(rng, LENS, 8, 2, 64, 16)
    wrapper = Wrapper(workspace())
    batch.plan(wrapper)
    pages = batch.cache.shape[0]
    wide = poisoned((pages, 3, 16, 5, 80), "bfloat16")
    view = wide[:, ::2, :, 1:5:2, 8:72]
    wide.view("u2")[:, ::2, :, 1:5:2, 8:72] = batch.gpu_cache.view("u2")
    q = poisoned((len(LENS), 17, 64), "bfloat16")
    q.view("u2")[:, 1::2] = batch.gpu_q.view("u2")
    out, lse = wrapper.run(q[:, 1::2], view, return_lse=True)
    batch.check(out, lse)
    wide_out = poisoned((len(LENS), 16, 64), "bfloat16")
    wrapper.run(q[:, 1::2], (view[:, 0], view[:, 1]), out=wide_out[:, ::2])
    assert (wide_out.view("u2")[:, ::2] == out.view("u2")).all()
    with pytest.raises(errors.LayoutError, match="multiples of 16 bytes"):
        wrapper.run(q[:, 1::2], (wide[:, 0, :, 1:5:2, 4:68], view[:, 1]))


@pytest.mark.parametrize("kv", ["", FP8])
def test_batch_invariance(rng, kv):
    lens = [700, 3, 2000, 64]
    batch = Batch(rng, lens, 8, 2, 64, 16, kv=kv)
    for options in ({"fixed_split_size": 8}, {"disable_split_kv": True}):
        wrapper = Wrapper(workspace())
        batch.plan(wrapper, **options)
        out, lse = batch.run(wrapper)
        batch.check(out, lse)
        indptr, indices, last = batch.table
        for b in range(len(lens)):
            pages = indices[indptr[b] : indptr[b + 1]]
            one = Wrapper(workspace())
            one.plan(
                np.array([0, len(pages)], np.int32),
                pages,
                last[b : b + 1],
                *batch.args,
                q_data_type="bfloat16",
                kv_data_type=batch.kv_dtype,
                **options,
            )
            alone, alone_lse = one.run(batch.gpu_q[b : b + 1], batch.gpu_cache, return_lse=True)
            assert (alone[0].view("u2") == out[b].view("u2")).all() and (alone_lse[0] == lse[b]).all()


def test_replanning_does_not_disturb_queued_runs(rng):
    """Sixteen plans and runs are queued behind a long kernel; each must see its own lengths."""
    wrapper = Wrapper(workspace())
    batches = [Batch(rng, [int(n) for n in rng.integers(1, 900, 6)], 8, 2, 64, 16) for _ in range(16)]
    batches[0].plan(wrapper)
    batches[0].run(wrapper)
    big = cupy.ones((6000, 6000), cupy.float32)
    cupy.matmul(big, big)
    cupy.cuda.runtime.deviceSynchronize()
    cupy.matmul(big, big)
    results = []
    for batch in batches:
        batch.plan(wrapper)
        results.append(batch.run(wrapper))
    for batch, (out, lse) in zip(batches, results, strict=True):
        batch.check(out, lse)


@pytest.mark.parametrize(("on_device", "kv"), [(False, "bfloat16"), (True, "bfloat16"), (False, FP8)])
def test_trap_28_graph_follows_later_plans(rng, on_device, kv):
    size, pages = 4, 200
    buffers = [cupy.zeros(n, cupy.int32) for n in (size + 1, pages, size)]
    wrapper = decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(workspace(), *buffers)
    cases = [[1, 1, 1, 1], [500, 3, 0, 1200], [16, 17, 700, 900], [0, 0, 0, 2500], [800, 800, 800, 790]]
    q, cache = poisoned((size, 8, 64), "bfloat16"), poisoned((pages + 3, 2, 16, 2, 64), kv)
    split = {} if kv == "bfloat16" else {"fixed_split_size": 8}  # fp8: two kv heads a CTA
    out, lse = poisoned(q.shape, "bfloat16"), poisoned((size, 8), "float32")
    stream = new_stream()
    graph = None
    with stream:
        for lens in cases:
            batch = Batch(rng, lens, 8, 2, 64, 16, kv=kv)
            q.view("u2")[...] = batch.gpu_q.view("u2")
            cache.view("u1")[: len(batch.cache)] = batch.gpu_cache.view("u1")
            batch.plan(wrapper, on_device, **split)
            if graph is None:
                wrapper.run(q, cache, out=out, lse=lse)
                stream.begin_capture()
                wrapper.run(q, cache, out=out, lse=lse)
                graph = stream.end_capture()
            for _ in range(2):
                out.view("u2")[...] = 0xFFFF
                lse[...] = np.nan
                graph.launch()
                stream.synchronize()
                batch.check(out, lse)
            for buffer, given in zip(buffers, batch.table, strict=True):
                assert (buffer.get()[: len(given)] == given).all()
        other = Batch(rng, cases[1], 4, 2, 64, 16, kv=kv)
        with pytest.raises(errors.PlanError, match="make another wrapper"):
            other.plan(wrapper, on_device, **split)


@pytest.mark.parametrize("target", ["compute_75", "compute_80"])
@pytest.mark.parametrize(
    ("dtype", "kv"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float8_e4m3fn")]
)
def test_older_architectures(rng, monkeypatch, target, dtype, kv):
    """Their code paths, as PTX on this GPU."""
    from fi_cupy.jit import kernel

    monkeypatch.setenv("FI_CUPY_TARGET", target)
    monkeypatch.setattr(kernel, "_kernels", {})
    batch = Batch(rng, LENS, 8, 2, 64, 16, dtype=dtype, kv=kv)
    wrapper = Wrapper(workspace())
    batch.plan(wrapper)
    batch.check(*batch.run(wrapper))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("n", [0, 1, 17, 1000, 20000])
def test_single_decode(rng, layout, n):
    q, k, v = normal(rng, (9, 64)), normal(rng, (n, 3, 64)), normal(rng, (n, 3, 64))
    if layout == "HND":
        k, v = (np.ascontiguousarray(x.swapaxes(0, 1)) for x in (k, v))
    rope = {"pos_encoding_mode": "ROPE_LLAMA"}
    for options in ({}, {"window_left": 50}, {"logits_soft_cap": 4.0, "v_scale": 2.0}, rope):
        out, lse = decode.single_decode_with_kv_cache(
            on_gpu(q), on_gpu(k), on_gpu(v), layout, return_lse=True, **options
        )
        want, want_lse = single_decode(
            q.astype(np.float64), k.astype(np.float64), v.astype(np.float64), kv_layout=layout, **options
        )
        assert_close(to_float64(out), want, "bfloat16", "product")
        assert np.allclose(to_float64(lse), want_lse, atol=2e-2 if options is rope else 2e-4)


def test_single_decode_in_a_graph(rng):
    q, k, v = (on_gpu(normal(rng, shape)) for shape in ((8, 128), (4000, 2, 128), (4000, 2, 128)))
    want = decode.single_decode_with_kv_cache(q, k, v)
    stream = new_stream()
    with stream:
        stream.begin_capture()  # no scratch memory for this stream yet: it comes from the capture
        out = decode.single_decode_with_kv_cache(q, k, v)
        graph = stream.end_capture()
        for _ in range(3):
            out.view("u2")[...] = 0xFFFF
            graph.launch()
            stream.synchronize()
            assert (out.view("u2") == want.view("u2")).all()


def test_workspace_size_is_exact(rng):
    batch = Batch(rng, [20000, 5], 8, 2, 64, 16)
    need, _ = Wrapper(workspace(16)).workspace_size(*batch.table, *batch.args, q_data_type="bfloat16")
    assert need > 0
    exact = Wrapper(workspace(need))
    batch.plan(exact)
    batch.check(*batch.run(exact))
    with pytest.raises(errors.WorkspaceError, match=rf"has {need - 256} bytes, expected at least {need}"):
        batch.plan(Wrapper(workspace(need - 256)))


def test_unsupported_on_the_gpu(rng):
    batch = Batch(rng, [20], 8, 2, 64, 16)
    wrapper = Wrapper(workspace())
    with pytest.raises(errors.DTypeError, match="float16 or bfloat16"):
        wrapper.plan(*batch.table, *batch.args, q_data_type="float32")
    with pytest.raises(errors.ShapeError, match="head_dim is 60"):
        wrapper.plan(*batch.table, 8, 2, 60, 16)
    with pytest.raises(errors.ShapeError, match="head_dim is 40, expected a multiple of 16"):
        wrapper.plan(*batch.table, 8, 2, 40, 16, pos_encoding_mode="ROPE_LLAMA")
    with pytest.raises(errors.DTypeError, match=r"like q, float8_e4m3fn or float8_e5m2"):
        wrapper.plan(*batch.table, *batch.args, q_data_type="float16", kv_data_type="bfloat16")


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    batch = Batch(rng, LENS, 8, 2, 64, 16, dtype="float16")
    wrapper = Wrapper(torch.empty(8 << 20, dtype=torch.uint8, device="cuda"))
    batch.plan(wrapper)
    q, cache = (torch.from_numpy(x).cuda() for x in (batch.q, batch.cache))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        batch.plan(wrapper)
        out, lse = wrapper.run(q, cache, return_lse=True)
    side.synchronize()
    batch.check(out.cpu().numpy(), lse.cpu().numpy())


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("dim", "kv"), [(128, "bfloat16"), (64, "bfloat16"), (128, FP8)])
@pytest.mark.parametrize("lens", [[4000], [2000] * 40])
def test_keys_that_the_kernel_in_front_writes(rng, layout, dim, kv, lens):
    """L2 is asked for keys while the kernel in front still runs: what that kernel writes of them must be seen."""
    batch = Batch(rng, lens, 8, 4, dim, 16, layout, kv=kv)
    wrapper = Wrapper(workspace(32 << 20), layout)
    batch.plan(wrapper)
    out, lse = batch.run(wrapper)
    batch.check(out, lse)
    cache = batch.gpu_cache
    kept, others, made = cache.copy(), cupy.zeros_like(cache), [poisoned(out.shape, "bfloat16") for _ in range(10)]
    for i, result in enumerate(made):
        cache[...] = kept if i % 2 else others
        wrapper.run(batch.gpu_q, cache, out=result, enable_pdl=True)
    for zeros, again in zip(made[::2], made[1::2], strict=True):
        assert not to_float64(zeros).any()
        assert (again.view("u2") == out.view("u2")).all()


@pytest.mark.parametrize("kv", ["bfloat16", FP8])
@pytest.mark.parametrize("lens", [[9000, 1, 700], [300] * 70])
def test_the_same_bits_every_time(rng, lens, kv):
    """Fifty launches: counters are back at zero, and which CTA joins the chunks shows nowhere."""
    batch = Batch(rng, lens, 8, 2, 128, 16, kv=kv)
    wrapper = Wrapper(workspace(32 << 20))
    batch.plan(wrapper)
    first = batch.run(wrapper)
    batch.check(*first)
    for i in range(50):
        again = batch.run(wrapper, enable_pdl=i % 3 == 0)
        assert all((a.view("u1") == b.view("u1")).all() for a, b in zip(again, first, strict=True))
