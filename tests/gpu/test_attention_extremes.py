"""Sizes and situations at the edge: ten thousand requests, offsets beyond 32 bits, streams and wrappers that meet."""

from __future__ import annotations

import numpy as np
import pytest
from paged_cases import Pages, bits, check, indptr_of

from fi_cupy import BatchAttention, arrays, cascade_attention, decode, page, prefill
from fi_cupy.reference.attention import batch_decode_paged, batch_prefill_paged, batch_prefill_ragged
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64

cupy = pytest.importorskip("cupy")
DTYPE = "bfloat16"
Decode, Paged = decode.BatchDecodeWithPagedKVCacheWrapper, prefill.BatchPrefillWithPagedKVCacheWrapper
Ragged = prefill.BatchPrefillWithRaggedKVCacheWrapper


def workspace(nbytes=32 << 20):
    return cupy.full((nbytes,), 0xFF, cupy.uint8)


def run(wrapper, q, *keys, **options):
    out, lse = poisoned(q.shape, DTYPE), poisoned(q.shape[:2], "float32")
    wrapper.run(on_gpu(q), *keys, out=out, lse=lse, return_lse=True, **options)
    return out, lse


def wide(cache):
    return [cache[:, i].astype(np.float64) for i in (0, 1)]


# --- ten thousand requests --------------------------------------------------------------------------------------------

MANY = 10_000


@pytest.mark.parametrize("causal", [False, True])
def test_ten_thousand_ragged_requests(rng, causal):
    qo, kv = indptr_of(rng.integers(0, 4, MANY)), indptr_of(rng.integers(0, 7, MANY))
    q = normal(rng, (int(qo[-1]), 2, 64), DTYPE)
    k, v = (normal(rng, (int(kv[-1]), 1, 64), DTYPE) for _ in range(2))
    wrapper = Ragged(workspace())
    wrapper.plan(qo, kv, 2, 1, 64, causal=causal, q_data_type=DTYPE)
    made = run(wrapper, q, on_gpu(k), on_gpu(v))
    check(*made, *batch_prefill_ragged(*(x.astype(np.float64) for x in (q, k, v)), qo, kv, causal=causal))


def test_ten_thousand_paged_requests(rng):
    lens = rng.integers(0, 7, MANY)
    pages = Pages(rng, 20_001, 4, 1, 64, DTYPE)
    table, _ = pages.add(lens)
    cache = pages.gpu()
    q = normal(rng, (MANY, 2, 64), DTYPE)
    wrapper = Decode(workspace())
    wrapper.plan(*table, 2, 1, 64, 4, q_data_type=DTYPE)
    check(*run(wrapper, q, cache), *batch_decode_paged(q.astype(np.float64), *wide(pages.kv), *table))
    qo = indptr_of(rng.integers(0, 4, MANY))
    q = normal(rng, (int(qo[-1]), 2, 64), DTYPE)
    wrapper = Paged(workspace())
    wrapper.plan(qo, *table, 2, 1, 64, 4, causal=True, q_data_type=DTYPE)
    want = batch_prefill_paged(q.astype(np.float64), *wide(pages.kv), qo, *table, causal=True)
    check(*run(wrapper, q, cache), *want)


# --- NaN in a key -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"logits_soft_cap": 30.0}, {"logits_soft_cap": 30.0, "window_left": 9}])
@pytest.mark.parametrize("key", [3, 13, 22, 30])  # the columns of a soft cap take two ways to a reciprocal
def test_a_key_of_nan_reaches_the_rows_that_see_it_and_no_others(rng, options, key):
    q, k, v = (normal(rng, (70, heads, 64), DTYPE) for heads in (4, 2, 2))
    k[key] = np.nan
    out, lse = prefill.single_prefill_with_kv_cache(
        *(on_gpu(x) for x in (q, k, v)), causal=True, return_lse=True, **options
    )
    rows = np.arange(70)
    sees = (rows >= key) & (rows - key <= options.get("window_left", 70))
    for made in (to_float64(out).reshape(70, -1), to_float64(lse)):
        assert (np.isnan(made) == sees[:, None]).all()


@pytest.mark.parametrize("window_left", [-1, 40])
def test_a_key_of_nan_reaches_decoding_that_sees_it(rng, window_left):
    q, k, v = (normal(rng, shape, DTYPE) for shape in ((4, 64), (700, 2, 64), (700, 2, 64)))
    k[600, 1] = np.nan  # of the second kv head
    made = decode.single_decode_with_kv_cache(
        *(on_gpu(x) for x in (q, k, v)), window_left=window_left, return_lse=True
    )  # fmt: skip
    sees = np.array([False, False, True, True]) & (window_left < 0)
    for x in made:
        assert (np.isnan(to_float64(x)).reshape(4, -1) == sees[:, None]).all()


# --- more than 2^31 elements ------------------------------------------------------------------------------------------

PAGE, KV_HEADS, DIM = 16, 8, 128
#: Pages of 2 * 16 * 8 * 128 elements: number 65,536 begins at element 2^31.
FIRST_FAR, NUM_PAGES = 65_536, 65_600


def empty(shape):
    """An uninitialised array; the test is skipped where the GPU has no room for it."""
    free, _ = cupy.cuda.runtime.memGetInfo()
    nbytes = 2 * int(np.prod(shape))
    if free + cupy.get_default_memory_pool().free_bytes() < nbytes + (1 << 30):
        pytest.skip(f"the GPU has {free >> 20} MB free, expected {nbytes >> 20} MB and 1 GB")
    return cupy.empty(nbytes, cupy.uint8).view(normal(np.random.default_rng(0), (1,), DTYPE).dtype).reshape(shape)


@pytest.fixture
def far(rng):
    """(cache of 4.3 GB, page table of three requests before and behind element 2^31, a small cache of those pages)."""
    lens = np.array([100, 333, 48])
    indptr = indptr_of(-(-lens // PAGE))
    used = int(indptr[-1])
    numbers = np.concatenate([np.arange(FIRST_FAR - 4, FIRST_FAR + 10), rng.permutation(FIRST_FAR - 4)[: used - 20],
                              np.arange(NUM_PAGES - 6, NUM_PAGES)])  # fmt: skip
    numbers = rng.permutation(numbers).astype(np.int32)
    last = ((lens - 1) % PAGE + 1).astype(np.int32)
    near = normal(rng, (used, 2, PAGE, KV_HEADS, DIM), DTYPE)
    cache = empty((NUM_PAGES, 2, PAGE, KV_HEADS, DIM))
    assert cache.size > 1 << 31
    for row, number in zip(near, numbers, strict=True):
        cache[int(number)].view("u2")[...] = on_gpu(row).view("u2")
    yield cache, (indptr, numbers, last), near
    del cache
    cupy.get_default_memory_pool().free_all_blocks()


def test_decode_and_prefill_read_pages_behind_element_2_31(rng, far):
    cache, (indptr, numbers, last), near = far
    table = indptr, np.arange(len(numbers), dtype=np.int32), last  # the same pages in the small cache
    q = normal(rng, (3, 32, DIM), DTYPE)
    wrapper = Decode(workspace())
    wrapper.plan(indptr, numbers, last, 32, KV_HEADS, DIM, PAGE, q_data_type=DTYPE)
    want = batch_decode_paged(q.astype(np.float64), *wide(near), *table)
    check(*run(wrapper, q, cache), *want)
    check(*run(wrapper, q, (cache[:, 0], cache[:, 1])), *want)
    for qo_lens in ([1, 2, 1], [100, 70, 48]):  # low tiles, tall tiles
        qo = indptr_of(qo_lens)
        q = normal(rng, (int(qo[-1]), 32, DIM), DTYPE)
        wrapper = Paged(workspace())
        wrapper.plan(qo, indptr, numbers, last, 32, KV_HEADS, DIM, PAGE, causal=True, q_data_type=DTYPE)
        want = batch_prefill_paged(q.astype(np.float64), *wide(near), qo, *table, causal=True)
        check(*run(wrapper, q, cache), *want)
        mixed = BatchAttention()
        mixed.plan(qo, indptr, numbers, np.int32([100, 333, 48]), 32, KV_HEADS, DIM, DIM, PAGE, causal=True)
        check(*mixed.run(on_gpu(q), cache), *want)


def test_append_writes_pages_behind_element_2_31(rng, far):
    cache, (indptr, numbers, last), near = far
    lens = np.array([100, 333, 48])
    b = np.repeat(np.arange(3), lens).astype(np.int32)
    p = np.concatenate([np.arange(n) for n in lens]).astype(np.int32)
    k, v = (normal(rng, (len(b), KV_HEADS, DIM), DTYPE) for _ in range(2))
    table = [on_gpu(x) for x in (numbers, indptr, last)]
    page.append_paged_kv_cache(on_gpu(k), on_gpu(v), on_gpu(b), on_gpu(p), cache, *table)
    slot = indptr[b] + p // PAGE
    near[slot, 0, p % PAGE], near[slot, 1, p % PAGE] = k, v
    for row, number in zip(near, numbers, strict=True):
        assert (cache[int(number)].view("u2").get() == row.view("u2")).all()


def test_ragged_keys_behind_element_2_31(rng):
    tokens, first = (1 << 21) + 500, (1 << 21) - 100  # 2^21 tokens of 8 * 128 elements
    keys = empty((tokens, KV_HEADS, DIM))
    assert keys.size > 1 << 31
    try:
        near = normal(rng, (600, KV_HEADS, DIM), DTYPE)
        keys[first:].view("u2")[...] = on_gpu(near).view("u2")
        kv, qo = np.array([first, first + 90, tokens], np.int64), indptr_of([5, 130])
        q = normal(rng, (135, 32, DIM), DTYPE)
        wrapper = Ragged(workspace())
        wrapper.plan(qo, kv, 32, KV_HEADS, DIM, causal=True, q_data_type=DTYPE)
        q64, k64 = q.astype(np.float64), near.astype(np.float64)
        check(*run(wrapper, q, keys, keys), *batch_prefill_ragged(q64, k64, k64, qo, kv - first, causal=True))
    finally:
        del keys
        cupy.get_default_memory_pool().free_all_blocks()


# --- streams and wrappers ---------------------------------------------------------------------------------------------


class Step:
    """A step of decode or prefill with long requests that are split, so that the workspace is used."""

    def __init__(self, rng, kind, lens):
        self.kind, self.pages = kind, Pages(rng, 900, 16, 2, 64, DTYPE)
        self.table, _ = self.pages.add(lens)
        self.qo = indptr_of([1 if kind == "decode" else 9] * len(lens))
        self.q, self.cache = normal(rng, (int(self.qo[-1]), 8, 64), DTYPE), self.pages.gpu()
        self.gpu_q = on_gpu(self.q)

    def wrapper(self, buffer):
        return (Decode if self.kind == "decode" else Paged)(buffer)

    def plan(self, wrapper):
        head = () if self.kind == "decode" else (self.qo,)
        options = {} if self.kind == "decode" else {"causal": True}
        wrapper.plan(*head, *self.table, 8, 2, 64, 16, q_data_type=DTYPE, **options)

    def expect(self):
        q, kv = self.q.astype(np.float64), wide(self.pages.kv)
        if self.kind == "decode":
            return batch_decode_paged(q, *kv, *self.table)
        return batch_prefill_paged(q, *kv, self.qo, *self.table, causal=True)


LENS = {"decode": [6000, 40, 2000], "prefill": [5000, 300, 3000]}


def test_two_wrappers_on_one_workspace(rng):
    """Both are planned before either runs; their scratch is used only while they run, one after the other."""
    buffer = workspace()
    steps = [Step(rng, kind, LENS[kind]) for kind in ("decode", "prefill", "decode")]
    wrappers = [s.wrapper(buffer) for s in steps]
    for s, w in zip(steps, wrappers, strict=True):
        s.plan(w)
    for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):
        made = {i: run(wrappers[i], steps[i].q, steps[i].cache) for i in order}
        for i, result in made.items():
            check(*result, *steps[i].expect())


def test_two_streams_at_once(rng):
    """Each stream plans and runs its own wrapper while the other does: forty results that no mixture may change."""
    kinds = ("decode", "prefill")
    batches = {k: [Step(rng, k, [int(n) for n in rng.integers(1, 4000, 3)]) for _ in range(4)] for k in kinds}
    buffers = {k: workspace() for k in kinds}
    outs = {k: [[poisoned(s.q.shape, DTYPE) for _ in range(5)] for s in batches[k]] for k in kinds}
    wrappers = {k: batches[k][0].wrapper(buffers[k]) for k in kinds}
    streams = {k: new_stream() for k in kinds}
    for turn in range(5):
        for b in range(4):
            for k in kinds:
                with streams[k]:
                    batches[k][b].plan(wrappers[k])
                    wrappers[k].run(batches[k][b].gpu_q, batches[k][b].cache, out=outs[k][b][turn])
    cupy.cuda.Device().synchronize()
    for k in kinds:
        for b, step in enumerate(batches[k]):
            want, want_lse = step.expect()
            for out in outs[k][b]:
                assert (bits(out) == bits(outs[k][b][0])).all()
            lse = poisoned(step.q.shape[:2], "float32")
            step.plan(wrappers[k])
            wrappers[k].run(step.gpu_q, step.cache, out=outs[k][b][1], lse=lse, return_lse=True)
            assert (bits(outs[k][b][0]) == bits(outs[k][b][1])).all()
            check(outs[k][b][0], lse, want, want_lse)


@pytest.mark.parametrize("masked", [False, True])
def test_a_ragged_graph_follows_later_plans(rng, masked):
    """The masks of a later plan are copied into the buffer that the captured kernel reads, like everything else."""
    cases = [[(60, 2000), (30, 31), (9, 800)], [(1, 5), (90, 300), (0, 7)], [(33, 2500), (2, 0), (60, 60)]]
    most_rows, most_keys = 99, 3000
    buffers = [cupy.zeros(4, cupy.int32), cupy.zeros(4, cupy.int32), cupy.zeros(40_000, cupy.uint8),
               cupy.zeros(4, cupy.int32)]  # fmt: skip
    wrapper = Ragged(workspace(), "NHD", True, *(buffers if masked else buffers[:2]))
    q, out = poisoned((most_rows, 8, 64), DTYPE), poisoned((most_rows, 8, 64), DTYPE)
    k, v, lse = *(poisoned((most_keys, 2, 64), DTYPE) for _ in "kv"), poisoned((most_rows, 8), "float32")
    stream, graph = new_stream(), None
    for lens in cases:
        qo, kv = (indptr_of([x[i] for x in lens]) for i in (0, 1))
        rows = int(qo[-1])
        host = [normal(rng, (n, h, 64), DTYPE) for n, h in ((rows, 8), (int(kv[-1]), 2), (int(kv[-1]), 2))]
        masks = [rng.random(m * n) < 0.5 for m, n in lens]
        options = {"custom_mask": np.concatenate(masks)} if masked else {"causal": True}
        with stream:
            wrapper.plan(qo, kv, 8, 2, 64, q_data_type=DTYPE, **options)
            for target, values in zip((q, k, v), host, strict=True):
                target.view("u2")[: len(values)] = on_gpu(values).view("u2")
            out.view("u2")[...], lse.view("u4")[...] = 0xFFFF, 0xFFFFFFFF
            if graph is None:
                wrapper.run(q, k, v, out=out, lse=lse, return_lse=True)  # kernels are loaded before the capture
                stream.begin_capture()
                wrapper.run(q, k, v, out=out, lse=lse, return_lse=True)
                graph = stream.end_capture()
            graph.launch(stream)
            stream.synchronize()
        reference = {"causal": True}
        if masked:
            reference = {
                "packed_custom_mask": np.concatenate([np.packbits(m, bitorder="little") for m in masks]),
                "causal": False,
            }  # fmt: skip
        want = batch_prefill_ragged(*(x.astype(np.float64) for x in host), qo, kv, **reference)
        check(out[:rows], lse[:rows], *want)
        assert np.isnan(to_float64(out[rows:])).all()


# --- one wait a plan --------------------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch):
    """What a plan waits for, by name."""
    counted = []
    for name in ("streamSynchronize", "deviceSynchronize", "eventSynchronize", "memcpy"):
        inner = getattr(cupy.cuda.runtime, name)
        monkeypatch.setattr(cupy.cuda.runtime, name, lambda *a, n=name, f=inner: (counted.append(n), f(*a))[1])
    for framework in (arrays._CuPy, arrays._Torch):
        inner = framework.to_host
        monkeypatch.setattr(framework, "to_host", lambda self, v, f=inner: (counted.append("to_host"), f(self, v))[1])
    return counted


@pytest.mark.parametrize("framework", ["cupy", "torch"])
def test_arrays_on_the_gpu_cost_one_wait_a_plan(rng, waits, framework):
    step, convert, buffer = Step(rng, "prefill", [300, 20, 500]), cupy.asarray, workspace()
    if framework == "torch":
        torch = pytest.importorskip("torch")
        buffer = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")

        def convert(x):
            return torch.as_tensor(x, device="cuda")

    table, qo = [convert(x) for x in step.table], convert(step.qo)
    lens = convert(np.int32([300, 20, 500]))
    kv = convert(indptr_of([300, 20, 500]))
    sizes, kind = (8, 2, 64), {"q_data_type": DTYPE}
    decodes, paged, ragged = Decode(buffer), Paged(buffer), Ragged(buffer)
    levels = cascade_attention.MultiLevelCascadeAttentionWrapper(2, buffer)
    mixed = BatchAttention()
    plans = {
        "mixed": lambda: mixed.plan(qo, *table[:2], lens, 8, 2, 64, 64, 16, **kind, kv_data_type=DTYPE),
        "decode": lambda: decodes.plan(*table, *sizes, 16, **kind),
        "lengths": lambda: paged.plan(qo, *table, *sizes, 16, seq_lens=lens, **kind),
        "ragged": lambda: ragged.plan(qo, kv, *sizes, **kind),
        "cascade": lambda: levels.plan([qo] * 2, *([x] * 2 for x in table), *sizes, 16, **kind),
        "prefill": lambda: paged.plan(qo, *table, *sizes, 16, causal=True, **kind),
    }
    for name, plan in plans.items():
        plan()  # kernels are loaded, buffers made
        waits.clear()
        plan()
        assert waits == ["streamSynchronize"], name
    if framework == "cupy":  # what was read back is what was sent
        check(*run(paged, step.q, step.cache), *step.expect())
