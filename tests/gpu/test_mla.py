"""Latent attention against the reference in float64: every kernel, ragged batches, NaN in page tails, graphs, fp8."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import decode, errors, mla, mla_kernel
from fi_cupy.device import device_info
from fi_cupy.dtypes import FP8_TYPES
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.jit import define_variant, ops
from fi_cupy.reference.mla import mla_paged
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
SCALE = 192**-0.5


@pytest.fixture(params=["portable", "hopper"])
def backend(request):
    """The wrapper's backend; the Hopper kernel takes short requests, too, when it is named."""
    if request.param == "hopper" and device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    return "fa2" if request.param == "portable" else "fa3"


def workspace(nbytes=128 << 20):
    return cupy.full((nbytes,), 0xFF, cupy.uint8)


class Batch:
    """Random queries and a paged cache in random page order, NaN wherever no request has a token."""

    def __init__(self, rng, qo_lens, kv_lens, heads, page_size, dtype="bfloat16", kv=None, q_factor=1.0):
        self.heads, self.page_size, self.dtype, self.kv = heads, page_size, dtype, kv or dtype
        self.qo = np.concatenate([[0], np.cumsum(qo_lens)]).astype(np.int32)
        self.kv_len = np.asarray(kv_lens, np.int32)
        pages = -(-self.kv_len // page_size)
        self.indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
        total = int(self.indptr[-1]) + 2
        self.indices = rng.permutation(total)[: self.indptr[-1]].astype(np.int32)
        n = int(self.qo[-1])
        self.q_nope, self.q_pe = (normal(rng, (n, heads, d), dtype, q_factor) for d in (512, 64))
        self.cache = np.full((total * page_size, 576), np.nan, np.float32).astype(to_dtype(self.kv).np)
        for b, length in enumerate(self.kv_len):
            t = np.arange(length)
            rows = self.indices[self.indptr[b] + t // page_size] * page_size + t % page_size
            self.cache[rows] = normal(rng, (length, 576), self.kv)
        self.cache = self.cache.reshape(total, page_size, 576)

    def plan_args(self, causal=False, sm_scale=SCALE):
        table = (self.qo, self.indptr, self.indices, self.kv_len)
        return (*table, self.heads, 512, 64, self.page_size, causal, sm_scale, self.dtype, self.kv)

    def run_args(self):
        cache = on_gpu(self.cache)
        return on_gpu(self.q_nope), on_gpu(self.q_pe), cache[..., :512], cache[..., 512:]

    def outputs(self, dtype=None):
        shape = self.q_nope.shape
        return {"out": poisoned(shape, dtype or self.dtype), "lse": poisoned(shape[:2], "float32")}

    def reference(self, causal=False, sm_scale=SCALE, **more):
        args = [x.astype(np.float64) for x in (self.q_nope, self.q_pe, self.cache[..., :512], self.cache[..., 512:])]
        return mla_paged(*args, self.qo, self.indptr, self.indices, self.kv_len, causal, sm_scale, **more)


def check(got, want, dtype, kind="product", rel=2e-5):
    (out, lse), (values, log) = got, want
    out, lse = to_float64(out), to_float64(lse)
    assert_close(out, values, to_dtype(dtype), kind)
    seen = np.isfinite(log)
    assert (np.isneginf(lse) == ~seen).all() and (out[~seen] == 0).all()
    assert (np.abs(lse - log)[seen] <= rel * np.maximum(np.abs(log[seen]), 10)).all()


def run(batch, backend, causal=False, sm_scale=SCALE, wrapper=None, **more):
    wrapper = wrapper or mla.BatchMLAPagedAttentionWrapper(workspace(), backend=backend)
    wrapper.plan(*batch.plan_args(causal, sm_scale))
    return wrapper.run(*batch.run_args(), return_lse=True, **batch.outputs(), **more)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("heads", [1, 5, 16, 24, 64, 128])
def test_ragged_batch(rng, backend, heads, causal):
    batch = Batch(rng, [1, 4, 0, 9, 1, 2, 1], [700, 333, 50, 6, 0, 64, 1], heads, 16)
    check(run(batch, backend, causal), batch.reference(causal), "bfloat16")


@pytest.mark.parametrize("page_size", [1, 5, 8, 16, 24, 64, 256])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_page_sizes(rng, backend, page_size, dtype):
    batch = Batch(rng, [1, 2, 1], [1030, 77, 128], 20, page_size, dtype)
    check(run(batch, backend), batch.reference(), dtype)


@pytest.mark.parametrize("kv_len", [63, 64, 65, 1000, 4096, 20000])
@pytest.mark.parametrize("heads", [16, 128])
def test_one_long_request_is_split(rng, backend, heads, kv_len):
    batch = Batch(rng, [1], [kv_len], heads, 64, q_factor=3.0)
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace(), backend=backend)
    want = batch.reference()
    for _ in range(2):  # the counters are back at zero
        check(run(batch, backend, wrapper=wrapper), want, "bfloat16")
    assert kv_len < 4096 or wrapper._planned.work.num_split > 0


@pytest.mark.parametrize("page_size", [1, 64])
def test_causal_chunks(rng, backend, page_size):
    batch = Batch(rng, [100, 33, 257], [100, 500, 300], 16, page_size)
    check(run(batch, backend, True), batch.reference(True), "bfloat16")


def test_rows_without_keys(rng, backend):
    """More queries than keys: the first rows see nothing."""
    batch = Batch(rng, [9, 5], [3, 0], 16, 16)
    check(run(batch, backend, True), batch.reference(True), "bfloat16")


def test_more_chunks_than_multiprocessors(rng, backend):
    """Chunks that do not all run at a time: the last one of a tile joins it alone."""
    batch = Batch(rng, [1] * 70, [2000] * 70, 70, 64)
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace(), backend=backend)
    want = batch.reference()
    for _ in range(2):
        check(run(batch, backend, wrapper=wrapper), want, "bfloat16")
    work = wrapper._planned.work
    assert work.num_split and work.num_items > device_info(0).num_sms


@pytest.mark.parametrize("page_size", [1, 32])
def test_thousands_of_items(rng, backend, page_size):
    """Waves of CTAs of every length, so that tiles and barriers of many phases are used."""
    batch = Batch(rng, [1] * 300, rng.integers(0, 900, 300), 70, page_size)
    check(run(batch, backend), batch.reference(), "bfloat16")


@pytest.mark.parametrize("kind", ["grows", "falls", "jumps", "equal"])
def test_maxima_that_move(rng, backend, kind):
    """Keys' scales change along the request: weights and output are rescaled rarely, and together."""
    n = 900
    scales = {
        "grows": np.geomspace(0.05, 20, n), "falls": np.geomspace(20, 0.05, n),
        "jumps": np.where(np.arange(n) // 64 % 2, 0.1, 12.0), "equal": np.zeros(n),
    }[kind]  # fmt: skip
    batch = Batch(rng, [1, 1], [n, n - 70], 70, 64)
    for b in range(2):
        t = np.arange(batch.kv_len[b])
        rows = batch.indices[batch.indptr[b] + t // 64] * 64 + t % 64
        flat = batch.cache.reshape(-1, 576)
        flat[rows] = (flat[rows].astype(np.float32) * scales[t, None]).astype(flat.dtype)
    check(run(batch, backend), batch.reference(), "bfloat16")


def test_negative_and_zero_scale(rng, backend):
    batch = Batch(rng, [2], [150], 16, 64)
    for scale in (-0.05, 0.0):
        check(run(batch, backend, sm_scale=scale), batch.reference(sm_scale=scale), "bfloat16")


def test_strided_arguments_and_base_e(rng, backend):
    batch = Batch(rng, [3, 1], [200, 77], 16, 16)
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace(), backend=backend)
    wrapper.plan(*batch.plan_args(True))
    q_nope, q_pe, ckv, kpe = batch.run_args()
    both = cupy.concatenate([q_nope, q_pe], axis=-1)
    wide = poisoned((4, 16, 1024), "bfloat16")
    lse = poisoned((4, 16), "float32")
    wrapper.run(both[..., :512], both[..., 512:], cupy.ascontiguousarray(ckv), kpe, out=wide[..., 512:], lse=lse,
                return_lse_base_on_e=True)  # fmt: skip
    want, log = batch.reference(True)
    check((wide[..., 512:], lse), (want, log * np.log(2.0)), "bfloat16")
    assert cupy.isnan(wide[..., :512]).all()


def test_gpu_page_table_and_new_outputs(rng, backend):
    batch = Batch(rng, [1, 1], [300, 40], 16, 64)
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace(), backend=backend)
    args = batch.plan_args()
    wrapper.plan(*(cupy.asarray(x) for x in args[:4]), *args[4:])
    check(wrapper.run_return_lse(*batch.run_args()), batch.reference(), "bfloat16")


def test_cuda_graph_follows_later_plans(rng, backend):
    buffers = [cupy.zeros(n, cupy.int32) for n in (5, 5, 400, 4)]
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace(), True, *buffers, backend=backend)
    first = Batch(rng, [1] * 4, [900, 40, 333, 1], 24, 16)
    cache = poisoned((420, 16, 576), "bfloat16")

    def load(batch):
        cache[: len(batch.cache)] = on_gpu(batch.cache)
        q[0][...], q[1][...] = on_gpu(batch.q_nope), on_gpu(batch.q_pe)
        wrapper.plan(*batch.plan_args())

    q = on_gpu(first.q_nope), on_gpu(first.q_pe)
    outputs = first.outputs()
    load(first)
    stream = new_stream()
    with stream:
        stream.begin_capture()
        wrapper.run(*q, cache[..., :512], cache[..., 512:], **outputs)
        graph = stream.end_capture()
    for lens in ([900, 40, 333, 1], [5, 0, 64, 65], [1200, 1100, 1300, 1000], [0, 0, 0, 0]):
        batch = Batch(rng, [1] * 4, lens, 24, 16)
        load(batch)
        outputs["out"].view(np.uint16)[...] = 0xFFFF
        outputs["lse"].view(np.uint32)[...] = 0xFFFFFFFF
        cupy.cuda.runtime.deviceSynchronize()
        graph.launch(stream)
        stream.synchronize()
        check((outputs["out"], outputs["lse"]), batch.reference(), "bfloat16")
    with pytest.raises(errors.PlanError):
        wrapper.plan(*Batch(rng, [1] * 4, [5] * 4, 16, 16).plan_args())


@pytest.mark.parametrize("heads", [16, 128])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("page_size", [1, 16])
def test_fp8_cache(rng, heads, kind, tokens, page_size):
    """Decoding with 16 heads is the portable kernel's; the Hopper kernel rounds scaled values and kpe."""
    batch = Batch(rng, [1] * 3, [600, 77, 1], heads, page_size, kv=kind)
    scales = rng.uniform(0.5, 2.0, size=(*batch.cache.shape[:2], 4)).astype(np.float32)
    given = {"ckv_scale_arr": on_gpu(scales)} if tokens else {"ckv_scale": 0.5}
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace())
    got = run(batch, "auto", True, wrapper=wrapper, kpe_scale=1.3, **given)
    known = {"token_scales": scales} if tokens else {"ckv_scale": 0.5}
    want = batch.reference(True, kpe_scale=1.3, **known)
    assert wrapper._planned.geometry.hopper == (heads == 128 and device_info(0).arch == "90a")
    rounded = tokens or wrapper._planned.geometry.hopper
    check(got, want, "bfloat16", "rotated" if rounded else "product", 3e-3 if rounded else 2e-5)


def test_fp8_output(rng, backend):
    batch = Batch(rng, [1, 3], [200, 90], 16, 64)
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace(), backend=backend)
    wrapper.plan(*batch.plan_args())
    from fi_cupy.arrays import view

    out = poisoned(batch.q_nope.shape, "float8_e4m3fn")
    torch = pytest.importorskip("torch")
    out = torch.from_dlpack(out).view(torch.float8_e4m3fn)
    wrapper.run(*batch.run_args(), out=out, o_scale=0.02)
    assert view(out).dtype in FP8_TYPES
    assert_close(to_float64(out) * 0.02, batch.reference()[0], "float8_e4m3fn", "product")


@pytest.mark.parametrize("rope", [None, 1e4])
def test_older_decode_wrapper(rng, rope):
    batch = Batch(rng, [1] * 3, [400, 0, 33], 20, 16)
    last = np.where(batch.kv_len > 0, (batch.kv_len - 1) % 16 + 1, 1)
    wrapper = decode.BatchDecodeMlaWithPagedKVCacheWrapper(workspace())
    more = {"window_left": 100, "logits_soft_cap": 3.0, "data_type": "bfloat16", "rope_theta": rope}
    wrapper.plan(batch.indptr, batch.indices, last, 20, 512, 16, SCALE, **more)
    got = wrapper.run(*batch.run_args(), q_scale=0.5, v_scale=2.0, return_lse=True, **batch.outputs())
    want, log = batch.reference(sm_scale=SCALE * 0.5, window_left=100, logits_soft_cap=3.0,
                                rope=None if rope is None else (1.0, rope))  # fmt: skip
    check(got, (want * 2.0, log), "bfloat16", "rotated", 3e-3 if rope else 2e-5)


def test_variant(rng, backend):
    """A bias a head and key, and a mask: in both kernels, split or not."""
    variant = define_variant(
        name="biased",
        score_fn=lambda s, ctx: s + ctx.strength * ops.where(ctx.kv_idx % 3 == 0, 1.0, -0.5) * ctx.qo_head,
        mask_fn=lambda ctx: ctx.kv_idx % 7 != ctx.qo_head % 7, scalars=["strength"],
    )  # fmt: skip
    batch = Batch(rng, [1, 2], [1500, 90], 16, 16)
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace(), backend=backend, variant=variant)
    got = run(batch, backend, True, wrapper=wrapper, variant_args={"strength": 0.2})
    cpu = mla.BatchMLAPagedAttentionWrapper(np.empty(16, np.uint8), variant=variant)
    args = batch.plan_args(True)
    cpu.plan(*args[:-2], "float32", "float32")
    host = [x.astype(np.float32) for x in (batch.q_nope, batch.q_pe, batch.cache[..., :512], batch.cache[..., 512:])]
    check(got, cpu.run(*host, return_lse=True, variant_args={"strength": 0.2}), "bfloat16", rel=1e-4)


def test_cutlass_form(rng):
    batch = Batch(rng, [1] * 3, [100, 5, 128], 128, 64)
    table = np.zeros((3, 2), np.int32)
    for b in range(3):
        pages = batch.indices[batch.indptr[b] : batch.indptr[b + 1]]
        table[b, : len(pages)] = pages
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace(), backend="cutlass")
    got = wrapper.run(*batch.run_args(), kv_len=on_gpu(batch.kv_len), page_table=on_gpu(table), return_lse=True)
    check(got, batch.reference(), "bfloat16")


def test_bits_do_not_change_between_runs(rng, backend):
    batch = Batch(rng, [1] * 3, [3000, 50, 700], 128, 64)
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace(), backend=backend)
    first = [to_float64(x) for x in run(batch, backend, wrapper=wrapper)]
    for _ in range(50):
        again = [to_float64(x) for x in run(batch, backend, wrapper=wrapper)]
        assert all((a == b).all() for a, b in zip(first, again, strict=True))


def test_which_kernel(rng):
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    batch = Batch(rng, [1], [64], 128, 64)
    wrapper = mla.BatchMLAPagedAttentionWrapper(workspace())
    wrapper.plan(*batch.plan_args())
    assert "Hopper" in wrapper._planned.geometry.choice
    assert wrapper._planned.geometry.kernel(SCALE, 0).spec in mla_kernel.kernel_specs()
