"""Mixed batches, attention sinks and multi-item scoring against the float64 reference, and what `explain` says."""

from __future__ import annotations

import numpy as np
import pytest
from paged_cases import Pages, bits, check, indptr_of

from fi_cupy import attention, errors
from fi_cupy.device import device_info
from fi_cupy.reference.attention import attention as reference
from fi_cupy.reference.masks import multi_item_mask
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned

cupy = pytest.importorskip("cupy")
#: (queries, keys): prompts, a chunk, single tokens, fully masked rows, no keys, no queries.
MIXED = [(300, 300), (1, 2000), (1, 0), (70, 333), (5, 3), (0, 40), (1, 129), (1, 1), (40, 64), (4, 700)]


def workspace(nbytes=32 << 20):
    return cupy.full((nbytes,), 0xFF, cupy.uint8)


class Batch:
    def __init__(self, rng, lens, heads=8, kv_heads=2, dim=128, page_size=16, layout="NHD", dtype="bfloat16"):
        self.lens, self.layout, self.dtype, self.page_size = lens, layout, dtype, page_size
        self.sizes = (heads, kv_heads, dim)
        self.qo = indptr_of([m for m, _ in lens])
        self.kv_len = np.array([n for _, n in lens], np.int32)
        self.q = normal(rng, (int(self.qo[-1]), heads, dim), dtype)
        pages = Pages(rng, int((-(-self.kv_len // page_size)).sum()) + 3, page_size, kv_heads, dim, dtype, layout)
        self.table, self.sequences = pages.add(self.kv_len)
        self.gpu_q, self.gpu_cache = on_gpu(self.q), pages.gpu()

    def expect(self, masks=None, **options):
        parts = []
        for b, (k, v) in enumerate(self.sequences):
            q, k, v = (x.astype(np.float64) for x in (self.q[self.qo[b] : self.qo[b + 1]], k, v))
            parts.append(reference(q, k, v, custom_mask=None if masks is None else masks[b], **options))
        return tuple(np.concatenate([p[i] for p in parts]) for i in (0, 1))

    def outputs(self):
        return poisoned(self.q.shape, self.dtype), poisoned(self.q.shape[:2], "float32")

    def plan(self, wrapper, on_device=False, **options):
        heads, kv_heads, dim = self.sizes
        arrays = [cupy.asarray(x) if on_device else x for x in (self.qo, *self.table[:2], self.kv_len)]
        types = {"q_data_type": self.dtype, "kv_data_type": self.dtype}
        wrapper.plan(*arrays, heads, kv_heads, dim, dim, self.page_size, **types, **options)
        return wrapper

    def run(self, wrapper, **options):
        out, lse = self.outputs()
        got = wrapper.run(self.gpu_q, self.gpu_cache, out, lse, **options)
        assert got[0] is out and got[1] is lse
        return out, lse


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [True, False])
def test_mixed_batch(rng, dtype, layout, causal):
    batch = Batch(rng, MIXED, layout=layout, dtype=dtype)
    wrapper = batch.plan(attention.BatchAttention(layout), causal=causal)
    assert wrapper._batch.both.tiles.num_items > 0 and wrapper._batch.both.num_items > 0
    out, lse = batch.run(wrapper)
    check(out, lse, *batch.expect(causal=causal))
    batch.plan(wrapper, on_device=True, causal=causal)
    for pdl in (False, True):
        again, again_lse = batch.run(wrapper, enable_pdl=pdl)
        assert (bits(again) == bits(out)).all() and (bits(again_lse) == bits(lse)).all()
    fresh, fresh_lse = wrapper.run(batch.gpu_q, batch.gpu_cache)
    assert (bits(fresh) == bits(out)).all() and (bits(fresh_lse) == bits(lse)).all()


@pytest.mark.parametrize(
    ("lens", "heads", "kv_heads", "dim", "page_size"),
    [
        ([(1, 900)] * 40, 8, 2, 64, 5),  # decoding only
        ([(1, 30000), (2, 9000)], 4, 4, 128, 16),  # a split decode request, a split tile of two rows
        ([(200, 9000)], 8, 8, 128, 16),  # one prompt, split tiles
        ([(500, 4000), (1, 20000)], 16, 4, 128, 16),  # both kinds split: one workspace
        ([(17, 40), (16, 30), (3, 3)], 7, 7, 80, 1),
        ([(0, 5), (0, 0)], 2, 1, 64, 16),
        ([(300, 700), (1, 5000), (1, 3), (2, 900)], 20, 1, 128, 16),  # two head blocks a kv head
        ([(300, 700), (1, 5000), (1, 3), (2, 900)], 8, 2, 256, 16),  # eight warps
        ([(1, 70)] * 120 + [(64, 64)] * 20, 16, 16, 64, 16),  # two sections of heads; many more tasks than CTAs
        ([(1, 100), (9, 100)], 4, 2, 8, 16),
    ],
)
def test_batches(rng, lens, heads, kv_heads, dim, page_size):
    batch = Batch(rng, lens, heads, kv_heads, dim, page_size)
    wrapper = batch.plan(attention.BatchAttention(), causal=True, logits_soft_cap=20.0, sm_scale=0.2)
    scales = {"q_scale": 0.5, "k_scale": 1.5, "v_scale": 0.25}
    got = batch.run(wrapper, logits_soft_cap=20.0, **scales)
    check(*got, *batch.expect(causal=True, logits_soft_cap=20.0, sm_scale=0.2, **scales))
    (use,) = attention.explain(wrapper).launches
    assert use.kernel.startswith(f"mixed_prefill_bf16_d{dim}_")
    for pdl in (False, True, False):
        again = batch.run(wrapper, logits_soft_cap=20.0, enable_pdl=pdl, **scales)
        assert all((bits(x) == bits(y)).all() for x, y in zip(again, got, strict=True))


@pytest.mark.older_archs
def test_mixed_batch_of_float16(rng):
    batch = Batch(rng, MIXED, dtype="float16", dim=64)
    check(*batch.run(batch.plan(attention.BatchAttention(), causal=True)), *batch.expect(causal=True))


def test_launches_repeat_bit_for_bit(rng):
    """Fifty launches: queues and counters are back at zero, and which CTA took which task shows nowhere."""
    batch = Batch(rng, [(500, 4000), (1, 20000), (3, 15000), *MIXED])
    wrapper = batch.plan(attention.BatchAttention(), causal=True)
    assert wrapper._batch.both.tiles.num_split > 0
    first = batch.run(wrapper)
    check(*first, *batch.expect(causal=True))
    for i in range(50):
        got = batch.run(wrapper, enable_pdl=i % 3 == 0)
        assert all((bits(x) == bits(y)).all() for x, y in zip(got, first, strict=True))


def test_a_negative_scale(rng):
    batch = Batch(rng, MIXED)
    wrapper = batch.plan(attention.BatchAttention(), causal=True, sm_scale=-0.1)
    check(*batch.run(wrapper), *batch.expect(causal=True, sm_scale=-0.1))
    assert attention.explain(wrapper).launches[0].kernel.split("_decode")[0].endswith("_neg")


def test_long_prompts_take_the_hopper_kernel(rng):
    """Which has all requests then, in one launch, and is twice as fast on them as the mixed kernel's tiles."""
    batch = Batch(rng, [(2500, 3000), (1, 700), (300, 300), (1, 1)])
    wrapper = batch.plan(attention.BatchAttention(), causal=True)
    check(*batch.run(wrapper), *batch.expect(causal=True))
    (use,) = attention.explain(wrapper).launches
    assert use.kernel.startswith("prefill_hopper" if device_info(0).arch == "90a" else "mixed_")
    batch = Batch(rng, [(1, 900), (5, 40)])  # a plan after it is free to mix again
    batch.plan(wrapper, causal=True)
    check(*batch.run(wrapper), *batch.expect(causal=True))
    assert attention.explain(wrapper).launches[0].kernel.startswith("mixed_")


def test_values_narrower_than_keys_take_tiles_alone(rng):
    """head_dim_vo 64: no decode items, and still one launch."""
    lens = [(1, 2000), (70, 333), (1, 0), (3, 9000)]
    batch = Batch(rng, lens)
    cache = (batch.gpu_cache[:, 0], batch.gpu_cache[:, 1, ..., :64])
    wrapper = attention.BatchAttention()
    wrapper.plan(batch.qo, *batch.table[:2], batch.kv_len, 8, 2, 128, 64, 16, True)
    out, lse = poisoned((*batch.q.shape[:2], 64), "bfloat16"), poisoned(batch.q.shape[:2], "float32")
    wrapper.run(batch.gpu_q, cache, out, lse)
    want, want_lse = batch.expect(causal=True)
    check(out, lse, want[..., :64], want_lse)
    (use,) = attention.explain(wrapper).launches
    assert use.kernel.startswith("prefill_bf16_d128x64_")


def test_two_streams_at_once(rng):
    batches = [Batch(rng, [(300, 9000), (1, 9000), (1, 10)]), Batch(rng, MIXED)]
    wrappers = [batch.plan(attention.BatchAttention(), causal=True) for batch in batches]
    outputs = [[batch.outputs() for _ in range(10)] for batch in batches]
    streams = [new_stream() for _ in batches]
    for i in range(10):
        for batch, wrapper, stream, made in zip(batches, wrappers, streams, outputs, strict=True):
            with stream:
                wrapper.run(batch.gpu_q, batch.gpu_cache, *made[i])
    for batch, stream, made in zip(batches, streams, outputs, strict=True):
        stream.synchronize()
        check(*made[0], *batch.expect(causal=True))
        assert all((bits(x) == bits(y)).all() for pair in made for x, y in zip(pair, made[0], strict=True))


def test_replanning_with_other_batches(rng):
    """The workspace grows while earlier runs are queued."""
    wrapper = attention.BatchAttention()
    batches = [Batch(rng, lens) for lens in (MIXED, [(1, 30000)], MIXED[:3], [(600, 8000)], [(1, 77)] * 9)]
    results = [batch.run(batch.plan(wrapper, causal=True)) for batch in batches]
    for batch, (out, lse) in zip(batches, results, strict=True):
        check(out, lse, *batch.expect(causal=True))


def test_graph_capture(rng):
    batch = Batch(rng, MIXED)
    wrapper = batch.plan(attention.BatchAttention(), causal=True)
    want, want_lse = batch.run(wrapper)
    out, lse = batch.outputs()
    cupy.cuda.runtime.deviceSynchronize()
    stream = new_stream()
    with stream:
        stream.begin_capture()
        wrapper.run(batch.gpu_q, batch.gpu_cache, out, lse)
        graph = stream.end_capture()
        for _ in range(2):
            out.view("u2")[...] = 0xFFFF
            lse[...] = np.nan
            graph.launch()
            stream.synchronize()
            assert (bits(out) == bits(want)).all() and (bits(lse) == bits(want_lse)).all()


def test_torch_tensors_on_their_stream(rng):
    torch = pytest.importorskip("torch")
    batch = Batch(rng, MIXED, dtype="float16")
    heads, kv_heads, dim = batch.sizes
    wrapper = attention.BatchAttention(device=torch.device("cuda"))
    q, cache = (torch.from_numpy(cupy.asnumpy(x)).cuda() for x in (batch.gpu_q, batch.gpu_cache))
    table = [torch.from_numpy(x).cuda() for x in (batch.qo, *batch.table[:2], batch.kv_len)]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        wrapper.plan(*table, heads, kv_heads, dim, dim, 16, True, None, None, torch.float16, torch.float16)
        out, lse = wrapper.run(q, cache)
    side.synchronize()
    check(out.cpu().numpy(), lse.cpu().numpy(), *batch.expect(causal=True))


@pytest.mark.parametrize("window", [-1, 50])
def test_trap_15_sinks(rng, window):
    batch = Batch(rng, [*MIXED, (3, 9000)])
    sink = normal(rng, (8,), "float32")
    heads, kv_heads, dim = batch.sizes
    wrapper = attention.BatchAttentionWithAttentionSinkWrapper(workspace(), window_left=window)
    wrapper.plan(batch.qo, *batch.table, heads, kv_heads, dim, 16, causal=True)
    out, lse = batch.outputs()
    wrapper.run(batch.gpu_q, batch.gpu_cache, on_gpu(sink), 0.07, out=out, lse=lse)
    want = batch.expect(causal=True, window_left=window, sinks=sink.astype(np.float64), sm_scale=0.07)
    check(out, lse, *want)
    with pytest.raises(errors.ArgumentError, match="sink is missing"):
        wrapper.run(batch.gpu_q, batch.gpu_cache)


@pytest.mark.parametrize("on_device", [False, True])
def test_trap_31_multi_item_scoring(rng, on_device):
    prefix, items = [200, 30], [[0, *range(1, 40), 0, *range(1, 90), 0], [0, 1, 2, 0, 1]]
    length = max(map(len, items)) + 3
    positions = np.array([x + [0] * (length - len(x)) for x in items], np.uint16)
    lens = [(p + len(x), p + len(x)) for p, x in zip(prefix, items, strict=True)]
    lens[0] = (len(items[0]), lens[0][1])  # only the items of the first
    batch = Batch(rng, lens)
    heads, kv_heads, dim = batch.sizes
    wrapper = attention.BatchPrefillWithPagedKVCacheWrapper(workspace())
    place = cupy.asarray if on_device else np.asarray
    wrapper.plan(
        batch.qo, *batch.table, heads, kv_heads, dim, 16, q_data_type="bfloat16",
        prefix_len_ptr=place(np.array(prefix, np.uint32)), token_pos_in_items_ptr=place(positions.reshape(-1)),
        token_pos_in_items_len=length, max_item_len_ptr=place(np.array([89, 2], np.uint16)),
    )  # fmt: skip
    out, lse = batch.outputs()
    wrapper.run(batch.gpu_q, batch.gpu_cache, out=out, lse=lse)
    masks = [multi_item_mask(m, n, prefix[b], positions[b]) for b, (m, n) in enumerate(lens)]
    check(out, lse, *batch.expect(masks))


def test_explain_says_what_is_launched(rng):
    batch = Batch(rng, [(1, 9000), (300, 300)])
    wrapper = batch.plan(attention.BatchAttention(), causal=True)
    uses = attention.explain(wrapper).launches
    (use,) = uses
    assert use.kernel.startswith("mixed_prefill_bf16_d128_") and use.grid[0] > 0 and "begin with a tile" in use.why
    decode = attention.BatchDecodeWithPagedKVCacheWrapper(workspace())
    heads, kv_heads, dim = batch.sizes
    decode.plan(*batch.table, heads, kv_heads, dim, 16, q_data_type="bfloat16")
    (use,) = attention.explain(decode).launches
    assert use.kernel.startswith("batch_decode_bf16_d128") and use.grid[0] == decode._planned.grid
    k = on_gpu(normal(rng, (9000, 2, 128)))
    prefill, single = attention.single_prefill_with_kv_cache, attention.single_decode_with_kv_cache
    for function, q in ((prefill, batch.gpu_q[:20]), (single, batch.gpu_q[0])):
        assert attention.explain(function, q, k, k).launches[0].grid[0] > 0
