"""The latent attention kernels run on the CPU (emulate.py), results equal the reference's in float64.

Barriers, shared memory, fragments and descriptors are the kernel's own; what this cannot show is the hardware's timing.
"""

from __future__ import annotations

import ctypes
import os

import emulate
import ml_dtypes
import numpy as np
import pytest

from fi_cupy import decode, mla, mla_batch, mla_kernel, prefill_batch
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.dtypes import float32
from fi_cupy.errors import PlanError
from fi_cupy.mla_kernel import (
    FEW_FP8,
    HOPPER_TILES,
    HOPPER_WIDE,
    Call,
    Costs,
    Geometry,
    Problem,
    choose_tiles,
    launch_more,
)
from fi_cupy.plan.mla import WAITS, plan_mla
from fi_cupy.prefill_plan import Options, Work, launch_values
from fi_cupy.reference.mla import mla_paged
from fi_cupy.scales import Scales
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

pytestmark = pytest.mark.skipif(not emulate.available(), reason="emulating kernels needs g++ on x86-64")
EVERYTHING = os.environ.get("FI_CUPY_EMULATE") == "all"
SCALE = 192**-0.5


def view(x):
    return emulate._Emulated().view(emulate.device(x))


class Batch:
    """Random queries and a paged cache in random page order, NaN wherever no request has a token."""

    def __init__(self, rng, qo_lens, kv_lens, heads, page_size, dtype="bfloat16", kv=None):
        self.rng, self.heads, self.page_size, self.dtype = rng, heads, page_size, dtype
        self.qo = np.concatenate([[0], np.cumsum(qo_lens)])
        self.kv_len = np.asarray(kv_lens)
        pages = -(-self.kv_len // page_size)
        self.indptr = np.concatenate([[0], np.cumsum(pages)])
        total = int(self.indptr[-1]) + 2
        self.indices = rng.permutation(total)[: self.indptr[-1]].astype(np.int32)
        n = int(self.qo[-1])
        self.q_nope, self.q_pe = normal(rng, (n, heads, 512), dtype), normal(rng, (n, heads, 64), dtype)
        kind = to_dtype(kv or dtype).np
        self.cache = np.full((total, page_size, 576), np.nan, np.float32).astype(kind)
        for b, length in enumerate(self.kv_len):
            for t in range(length):
                self.cache[self.indices[self.indptr[b] + t // page_size], t % page_size] = normal(rng, (576,), kind)

    @property
    def ckv(self):
        return self.cache[..., :512]

    @property
    def kpe(self):
        return self.cache[..., 512:]

    def reference(self, options, **more):
        args = [x.astype(np.float64) for x in (self.q_nope, self.q_pe, self.ckv, self.kpe)]
        return mla_paged(
            *args, self.qo, self.indptr, self.indices, self.kv_len, options.causal, options.sm_scale,
            window_left=options.window_left, logits_soft_cap=options.logits_soft_cap, **more,
        )  # fmt: skip


#: Splitting costs next to nothing: short requests are split, too.
CHEAP, UNSCALED = Costs(0.1, 0.1, 0.01, 0.0), Scales()


def run(batch, g, options, *, slots=7, costs=CHEAP, scales=UNSCALED, ratio=1.0, token_scales=None, out_dtype=None,
        lse_factor=1.0, turns=(), launches=2):  # fmt: skip
    """(out, lse) of the emulated kernel; the second launch finds the counters as the first has left them."""
    plan = plan_mla(
        batch.qo, batch.kv_len, batch.indptr[:-1], num_heads=batch.heads, tile_q=g.tiles.tile_q,
        tile_kv=g.tiles.tile_kv, slots=slots, costs=costs, causal=options.causal, window_left=options.window_left,
    )  # fmt: skip
    layout = g.workspace(plan.num_slots, plan.num_slots)
    workspace = view(np.full(layout.size + 256, 0xFF, np.uint8))
    counters = view(np.zeros(g.num_counters(plan.num_slots) + 1, np.uint32))
    items, indices = view(plan.items), view(batch.indices)
    work = Work(items.ptr, len(plan.items), plan.num_split, workspace.ptr + layout.offsets["partial_o"],
                workspace.ptr + layout.offsets["partial_md"], counters.ptr)  # fmt: skip
    cache = view(batch.cache)
    size = cache.dtype.itemsize
    parts = [type(cache)(cache._framework, cache.array, cache.ptr + at * size, (*cache.shape[:2], n), cache.strides,
                         cache.dtype, 0, None) for at, n in ((0, 512), (512, 64))]  # fmt: skip
    x, x_pe = view(batch.q_nope), view(batch.q_pe)
    kind = to_dtype(out_dtype or batch.dtype)
    for _ in range(launches):
        out = x.empty(x.shape, kind)
        lse = x.empty(x.shape[:2], float32)
        strides = [(c.strides[0], c.strides[1], 0) for c in parts]
        values = launch_values(
            g, work, x, *parts, *strides, out, lse, options, scales, indices.ptr, batch.page_size, 0, 0
        )
        tokens = None if token_scales is None else view(token_scales)
        more = launch_more(g, x, x_pe, parts, tokens, ratio, lse_factor, launches > 1, turns)
        spec = g.spec(Call(options.sm_scale > 0, kind if out_dtype else None, token_scales is not None))
        emulate._kernel(spec, 0).launch(work.num_items, 0, *values, *more)
        assert not counters.array.any()
    return np.asarray(out.array), np.asarray(lse.array), plan


def check(out, lse, want, want_lse, kind):
    assert_close(out, want, kind, "product")
    seen = np.isfinite(want_lse)
    assert (np.isneginf(lse) == ~seen).all() and (out.astype(np.float64)[~seen] == 0).all()
    assert (np.abs(lse[seen] - want_lse[seen]) <= 2e-5 * np.maximum(np.abs(want_lse[seen]), 10)).all()


def geometry(heads, page_size, tiles, dtype="bfloat16", kv=None, **more):
    problem = Problem(heads, to_dtype(dtype), to_dtype(kv or dtype), page_size, **more)
    return Geometry(problem, tiles, "under test", 7)


PLAIN = Options(False, -1, 0.0, SCALE, "NONE", None, None)
FEW, TALL, ONE = choose_tiles(16, 232448, False), choose_tiles(64, 166912, False), choose_tiles(16, 65536, False)


@pytest.mark.parametrize("tiles", [FEW, TALL, ONE], ids=["q16x5", "q64x2", "q16x1"])
@pytest.mark.parametrize("causal", [False, True])
def test_ragged_batch(rng, tiles, causal):
    dtype = "float16" if tiles is ONE else "bfloat16"
    batch = Batch(rng, [1, 3, 0, 9, 1], [70, 40, 33, 6, 0], 5, 16, dtype)
    options = PLAIN._replace(causal=causal)
    out, lse, _ = run(batch, geometry(5, 16, tiles, dtype), options)
    check(out, lse, *batch.reference(options), dtype)


@pytest.fixture(params=["alone", "together"])
def ctas(request, monkeypatch):
    """CTAs run one after the other, and the last one joins all; or all at a time, and each joins a slice."""
    monkeypatch.setattr(emulate.EmulatedKernel, "together", request.param == "together")


@pytest.mark.parametrize("tiles", [FEW, TALL], ids=["q16x5", "q64x2"])
@pytest.mark.parametrize("page_size", [1, 64])
@pytest.mark.parametrize("slots", [7, 40])
def test_split_keys(rng, tiles, page_size, slots, ctas):
    batch = Batch(rng, [1, 2], [330, 200], 16, page_size)
    out, lse, plan = run(batch, geometry(16, page_size, tiles), PLAIN, slots=slots)
    assert plan.num_slots >= 2 and (plan.items[:, WAITS] == (len(plan.items) <= slots)).all()
    check(out, lse, *batch.reference(PLAIN), "bfloat16")


def test_more_chunks_than_slices(rng, ctas):
    batch = Batch(rng, [1], [32 * 40 - 5], 16, 64)
    out, lse, plan = run(batch, geometry(16, 64, FEW), PLAIN, slots=40)
    assert plan.num_slots == 40
    check(out, lse, *batch.reference(PLAIN), "bfloat16")


@pytest.fixture
def maps(monkeypatch):
    monkeypatch.setattr(mla_kernel, "encode_map", emulate.tensor_map)
    mla_kernel.hopper_maps.cache_clear()
    yield
    mla_kernel.hopper_maps.cache_clear()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [1, 5, 8, 64])
def test_hopper_ragged_batch(rng, maps, causal, page_size):
    batch = Batch(rng, [1, 3, 0, 20], [70, 130, 33, 18], 5, page_size)
    options = PLAIN._replace(causal=causal)
    out, lse, _ = run(batch, geometry(5, page_size, HOPPER_TILES), options, slots=1)
    check(out, lse, *batch.reference(options), "bfloat16")


@pytest.mark.parametrize("page_size", [5, 16])
def test_hopper_products_of_all_columns_and_tall_tiles(rng, maps, page_size):
    """What chunks of prompts take, where pages allow it: more rows than a tile has, three tiles of keys."""
    batch = Batch(rng, [2, 1], [133, 70], 40, page_size)
    tiles = HOPPER_TILES if page_size == 5 else HOPPER_WIDE
    out, lse, _ = run(batch, geometry(40, page_size, tiles), PLAIN, slots=1)
    check(out, lse, *batch.reference(PLAIN), "bfloat16")


def test_hopper_split_keys(rng, maps, ctas):
    batch = Batch(rng, [1, 1], [450, 200], 70, 16)
    out, lse, plan = run(batch, geometry(70, 16, HOPPER_TILES), PLAIN, slots=40)
    assert plan.num_slots > 4 and plan.items[0, 12] > 4
    check(out, lse, *batch.reference(PLAIN), "bfloat16")


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("tiles", [FEW_FP8, HOPPER_TILES], ids=["portable", "hopper"])
def test_fp8(rng, tiles, tokens):
    batch = Batch(rng, [1, 2], [50, 271], 7, 8, kv="float8_e4m3fn")
    scales = rng.uniform(0.5, 2.0, (*batch.cache.shape[:2], 4)).astype(np.float32) if tokens else None
    g = geometry(7, 8, tiles, kv="float8_e4m3fn")
    factor = 1.0 if tokens else 0.5
    out, lse, _ = run(batch, g, PLAIN, scales=Scales(factor, factor), ratio=3.0 / factor, token_scales=scales)
    want, want_lse = batch.reference(PLAIN, ckv_scale=factor, kpe_scale=3.0, token_scales=scales)
    assert_close(out, want, "bfloat16", "rotated")
    # Scaled values are rounded to 16 bits, which the reference does not do.
    exact = not tokens and tiles is not HOPPER_TILES
    assert (np.abs(lse - want_lse) < (2e-5 if exact else 3e-3) * np.maximum(np.abs(want_lse), 10)).all()


def test_fp8_output_and_base_e(rng):
    batch = Batch(rng, [2], [45], 5, 16, "float16")
    g = geometry(5, 16, FEW, "float16")
    out, lse, _ = run(batch, g, PLAIN, scales=Scales(1.0, 1 / 0.01), out_dtype="float8_e4m3fn", lse_factor=np.log(2.0))
    want, want_lse = batch.reference(PLAIN)
    assert_close(out.view(ml_dtypes.float8_e4m3fn).astype(np.float64) * 0.01, want, "float8_e4m3fn", "product")
    np.testing.assert_allclose(lse, want_lse * np.log(2.0), rtol=2e-5, atol=2e-4)


def test_window_soft_cap_and_rope(rng):
    from fi_cupy.decode_kernel import rope_turns

    batch = Batch(rng, [1, 1], [90, 7], 3, 16)
    options = PLAIN._replace(window_left=50, logits_soft_cap=2.0, pos_encoding_mode="ROPE_LLAMA", rope_theta=1e3)
    g = geometry(3, 16, FEW, soft_cap=True, rope=True)
    out, lse, _ = run(batch, g, options, turns=rope_turns(64, None, 1e3)[:2])
    want, want_lse = batch.reference(options, rope=(1.0, 1e3))
    assert_close(out, want, "bfloat16", "rotated")
    assert np.abs(lse - want_lse).max() < 3e-2


class HostBuffer:
    """A plan buffer in host memory."""

    def __init__(self, device, nbytes, counters=0):
        self.frozen = False
        self._words = np.zeros(1 << 16, np.int32)
        self._counters = np.zeros(1 << 12, np.uint32)

    ptr = property(lambda self: self._words.ctypes.data)
    counters_ptr = property(lambda self: self._counters.ctypes.data)

    def reserve(self, nbytes, counters=0):
        assert nbytes <= self._words.nbytes and counters <= len(self._counters)

    def stage(self, words):
        return np.zeros(words, np.int32)

    def upload(self, staged, stream):
        self._words[: len(staged)] = staged
        return self.ptr


@pytest.fixture
def gpu(maps, monkeypatch):
    """The wrappers on an emulated H100."""
    monkeypatch.setattr(prefill_batch, "PlanBuffer", HostBuffer)
    monkeypatch.setattr(mla_batch, "device_info", lambda index: emulate.HOPPER)
    move = lambda to, x, *_: ctypes.memmove(to, x.ctypes.data, x.nbytes)  # noqa: E731
    monkeypatch.setattr(prefill_batch, "copy_to_device", move)
    with emulate.emulated(emulate.HOPPER, mla_kernel):
        yield emulate.device


@pytest.mark.parametrize("heads", [5, 20])
def test_wrapper(rng, gpu, heads):
    """Plan and run, with the kernel that is chosen: 5 heads are few rows, 20 are the Hopper kernel's."""
    batch = Batch(rng, [1, 1, 1], [90, 0, 300], heads, 16)
    wrapper = mla.BatchMLAPagedAttentionWrapper(gpu(np.zeros(1 << 24, np.uint8)))
    table = batch.qo, batch.indptr, batch.indices, batch.kv_len
    wrapper.plan(*table, heads, 512, 64, 16, False, SCALE, "bfloat16", "bfloat16")
    assert wrapper._planned.geometry.hopper == (heads == 20) and wrapper._planned.work.num_split
    cache = gpu(batch.cache)
    ckv, kpe = cache[..., :512], cache[..., 512:]
    q = gpu(batch.q_nope), gpu(batch.q_pe)
    out, lse = wrapper.run(*q, ckv, kpe, return_lse=True)
    want, log = batch.reference(PLAIN)
    check(np.asarray(out), np.asarray(lse), want, log, "bfloat16")
    out, lse = wrapper.run(*q, ckv, kpe, return_lse=True, return_lse_base_on_e=True, enable_pdl=False)
    check(np.asarray(out), np.asarray(lse), want, log * np.log(2.0), "bfloat16")


def test_wrapper_in_graph_mode(rng, gpu):
    buffers = [gpu(np.zeros(n, np.int32)) for n in (4, 4, 60, 3)]
    wrapper = mla.BatchMLAPagedAttentionWrapper(gpu(np.zeros(1 << 24, np.uint8)), True, *buffers)
    grids = []
    for lens in ([300, 17, 1], [40, 0, 500], [0, 0, 0]):
        batch = Batch(rng, [1, 1, 1], lens, 20, 16)
        table = batch.qo, batch.indptr, batch.indices, batch.kv_len
        wrapper.plan(*table, 20, 512, 64, 16, False, SCALE, "bfloat16", "bfloat16")
        assert (np.asarray(buffers[2])[: len(batch.indices)] == batch.indices).all()
        assert (np.asarray(buffers[3]) == batch.kv_len).all()
        grids.append(wrapper._planned.work.num_items)
        cache = gpu(batch.cache)
        out, lse = wrapper.run(gpu(batch.q_nope), gpu(batch.q_pe), cache[..., :512], cache[..., 512:], return_lse=True)
        check(np.asarray(out), np.asarray(lse), *batch.reference(PLAIN), "bfloat16")
    assert len(set(grids)) == 1
    with pytest.raises(PlanError, match="keeps kernel, grid and options"):
        wrapper.plan(*table, 20, 512, 64, 16, True, SCALE, "bfloat16", "bfloat16")


def test_older_wrapper(rng, gpu):
    batch = Batch(rng, [1, 1, 1], [90, 0, 33], 5, 16)
    last = np.where(batch.kv_len > 0, (batch.kv_len - 1) % 16 + 1, 1)
    wrapper = decode.BatchDecodeMlaWithPagedKVCacheWrapper(gpu(np.zeros(1 << 24, np.uint8)))
    wrapper.plan(batch.indptr, batch.indices, last, 5, 512, 16, SCALE, 40, 3.0, "bfloat16", rope_theta=1e4)
    cache = gpu(batch.cache)
    args = gpu(batch.q_nope), gpu(batch.q_pe), cache[..., :512], cache[..., 512:]
    out, lse = wrapper.run(*args, q_scale=0.5, v_scale=2.0, return_lse=True)
    options = PLAIN._replace(sm_scale=0.5 * SCALE, window_left=40, logits_soft_cap=3.0)
    want, log = batch.reference(options, rope=(1.0, 1e4))
    assert_close(np.asarray(out), 2.0 * want, "bfloat16", "rotated")
    assert (np.isneginf(lse) == np.isneginf(log)).all()
