"""The cascade and shared-prefix wrappers against the float64 reference over the whole sequences."""

from __future__ import annotations

import numpy as np
import pytest
from paged_cases import Pages, bits, check, indptr_of

from fi_cupy import cascade, errors
from fi_cupy.reference.attention import attention
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.usefixtures("kernel")  # both prefill kernels


def workspace(nbytes=32 << 20):
    return cupy.full((nbytes,), 0xFF, cupy.uint8)


class Tree:
    """Requests with `qo_lens` queries; level i has sequences of ``lens[i]`` keys for ``sizes[i]`` requests each."""

    def __init__(
        self, rng, qo_lens, lens, sizes, heads=8, kv_heads=2, dim=128, page_size=16, layout="NHD", dtype="bfloat16",
        num_pages=0,
    ):  # fmt: skip
        self.dtype, self.layout, self.qo_lens = dtype, layout, qo_lens
        self.args = (heads, kv_heads, dim, page_size)
        self.q = normal(rng, (sum(qo_lens), heads, dim), dtype)
        needed = sum(-(-n // page_size) for level in lens for n in level) + 2
        pages = Pages(rng, num_pages or needed, page_size, kv_heads, dim, dtype, layout)
        ends = indptr_of(qo_lens)
        self.whole = [[] for _ in qo_lens]
        self.tables = ([], [], [], [])
        for level_lens, level_sizes in zip(lens, sizes, strict=True):
            table, sequences = pages.add(level_lens)
            for i, (sequence, a) in enumerate(zip(sequences, indptr_of(level_sizes)[:-1], strict=True)):
                for r in range(a, a + level_sizes[i]):
                    self.whole[r].append(sequence)
            for part, value in zip(self.tables, (ends[indptr_of(level_sizes)], *table), strict=True):
                part.append(value)
        self.gpu_q, self.gpu_cache = on_gpu(self.q), pages.gpu()

    def plan(self, wrapper, on_device=False, **options):
        tables = [[cupy.asarray(x) if on_device else x for x in part] for part in self.tables]
        wrapper.plan(*tables, *self.args, q_data_type=self.dtype, **options)
        return wrapper

    def wrapper(self, *args, **options):
        made = cascade.MultiLevelCascadeAttentionWrapper(len(self.tables[0]), workspace(), self.layout, *args)
        return self.plan(made, **options)

    def run(self, wrapper, **options):
        out, lse = poisoned(self.q.shape, self.dtype), poisoned(self.q.shape[:2], "float32")
        got = wrapper.run(self.gpu_q, self.gpu_cache, out=out, lse=lse, return_lse=True, **options)
        assert got[0] is out and got[1] is lse
        return out, lse

    def expect(self, **options):
        parts, start = [], 0
        for m, levels in zip(self.qo_lens, self.whole, strict=True):
            k, v = (np.concatenate([level[i] for level in levels]).astype(np.float64) for i in (0, 1))
            parts.append(attention(self.q[start : start + m].astype(np.float64), k, v, **options))
            start += m
        return tuple(np.concatenate([p[i] for p in parts]) for i in (0, 1))


def decode_tree(rng, **options):
    return Tree(rng, [1] * 6, [[3000], [40, 0, 16, 1, 700, 90]], [[6], [1] * 6], **options)


def prefill_tree(rng, **options):
    return Tree(rng, [70, 1, 20], [[500, 90], [100, 3, 20]], [[2, 1], [1, 1, 1]], **options)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("make", [decode_tree, prefill_tree])
def test_two_levels(rng, dtype, layout, make):
    tree = make(rng, dtype=dtype, layout=layout)
    wrapper = tree.wrapper()
    assert wrapper._levels[1].uses_decode == (make is decode_tree)
    out, lse = tree.run(wrapper)
    check(out, lse, *tree.expect())
    tree.plan(wrapper, on_device=True)
    again, again_lse = tree.run(wrapper)
    assert (bits(again) == bits(out)).all() and (bits(again_lse) == bits(lse)).all()
    assert (bits(wrapper.run(tree.gpu_q, tree.gpu_cache)) == bits(out)).all()  # with its own lse


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "page_size"), [(9, 3, 64, 5), (4, 4, 256, 1), (7, 1, 80, 16)])
def test_three_levels_and_shapes(rng, heads, kv_heads, dim, page_size):
    tree = Tree(
        rng, [1, 5, 1, 30], [[300], [50, 0], [40, 9, 0, 33]], [[4], [1, 3], [1] * 4], heads, kv_heads, dim, page_size
    )
    wrapper = tree.wrapper(sm_scale=0.2, logits_soft_cap=6.0)
    scales = {"q_scale": 0.5, "k_scale": 1.5, "v_scale": 0.25}
    got = tree.run(wrapper, **scales)
    check(*got, *tree.expect(sm_scale=0.2, logits_soft_cap=6.0, **scales))


def test_causal_on_the_last_level(rng):
    tree = prefill_tree(rng)
    check(*tree.run(tree.wrapper(causal=True)), *tree.expect(causal=True))


@pytest.mark.parametrize("window", [5, 60, 150, 4000])
@pytest.mark.parametrize("causal", [False, True])
def test_trap_6_window_over_the_whole_sequence(rng, window, causal):
    tree = prefill_tree(rng)
    check(*tree.run(tree.wrapper(window_left=window, causal=causal)), *tree.expect(window_left=window, causal=causal))


def test_a_long_prefix_under_many_requests(rng):
    """The shape the wrapper is for: many tiles split over the prefix, and the decode kernel below it."""
    tree = Tree(rng, [1] * 64, [[8192], [256] * 64], [[64], [1] * 64])
    wrapper, want = tree.wrapper(), tree.expect()
    check(*tree.run(wrapper), *want)
    for options in ({"fixed_split_size": 32}, {"disable_split_kv": True}):
        tree.plan(wrapper, **options)
        check(*tree.run(wrapper), *want)


def test_workspace_size_is_exact(rng):
    tree = decode_tree(rng)
    need, _ = tree.wrapper().workspace_size(*tree.tables, *tree.args, q_data_type="bfloat16")
    assert need > 0
    exact = cascade.MultiLevelCascadeAttentionWrapper(2, workspace(need))
    check(*tree.run(tree.plan(exact)), *tree.expect())
    with pytest.raises(errors.WorkspaceError, match=f"expected at least {need}"):
        tree.plan(cascade.MultiLevelCascadeAttentionWrapper(2, workspace(need - 256)))


@pytest.mark.parametrize("queries", [1, 3])
def test_trap_28_graph_follows_later_plans(rng, queries):
    size, pages = 4, 300
    shape = ([queries] * size, [[size], [1] * size])
    buffers = [
        [cupy.zeros(n, cupy.int32) for n in part] for part in ((2, size + 1), (2, size + 1), (pages, pages), (1, size))
    ]
    wrapper = cascade.MultiLevelCascadeAttentionWrapper(2, workspace(64 << 20), "NHD", True, *buffers)
    q = poisoned((queries * size, 8, 128), "bfloat16")
    cache = poisoned((pages, 2, 16, 2, 128), "bfloat16")
    out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
    stream = new_stream()
    graph = None
    with stream:
        for lens in ([[2000], [9, 1, 300, 40]], [[17], [700, 0, 0, 1]], [[0], [3, 3, 3, 3]], [[3000], [0, 5, 0, 1200]]):
            tree = Tree(rng, shape[0], lens, shape[1], num_pages=pages)
            q.view("u2")[...] = tree.gpu_q.view("u2")
            cache.view("u2")[...] = tree.gpu_cache.view("u2")
            tree.plan(wrapper)
            if graph is None:
                wrapper.run(q, cache, out=out, lse=lse)
                stream.begin_capture()
                wrapper.run(q, cache, out=out, lse=lse)
                graph = stream.end_capture()
            out.view("u2")[...] = 0xFFFF
            lse[...] = np.nan
            graph.launch()
            stream.synchronize()
            check(out, lse, *tree.expect())
            for part, values in zip(buffers, tree.tables, strict=True):
                for buffer, given in zip(part, values, strict=True):
                    assert (buffer.get()[: len(given)] == given).all()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("decode", [True, False])
def test_shared_prefix_wrappers(rng, layout, decode):
    tree = (decode_tree if decode else prefill_tree)(rng, layout=layout)
    lens = [len(levels[1][0]) for levels in tree.whole]
    k, v = tree.whole[0][0]
    tree.whole = [[(k, v), levels[1]] for levels in tree.whole]  # the first prefix under all of them
    shared = [on_gpu(x if layout == "NHD" else np.ascontiguousarray(x.swapaxes(0, 1))) for x in (k, v)]
    table = [part[1] for part in tree.tables[1:]]
    assert [len(x[1][0]) for x in tree.whole] == lens
    for scale in (None, 0.3):
        out = poisoned(tree.q.shape, "bfloat16")
        if decode:
            wrapper = cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace(), layout)
            wrapper.begin_forward(*table, *tree.args, "bfloat16")
            got = wrapper.forward(tree.gpu_q, *shared, tree.gpu_cache, sm_scale=scale, out=out, return_lse=True)
            check(*got, *tree.expect(sm_scale=scale))
            continue
        wrapper = cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace(), layout)
        wrapper.begin_forward(tree.tables[0][1], *table, *tree.args, q_data_type="bfloat16")
        for causal in (False, True):
            got = wrapper.forward(
                tree.gpu_q, *shared, tree.gpu_cache, causal=causal, sm_scale=scale, out=out, return_lse=True
            )
            check(*got, *tree.expect(causal=causal, sm_scale=scale))


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    tree = decode_tree(rng, dtype="float16")
    wrapper = cascade.MultiLevelCascadeAttentionWrapper(2, torch.empty(32 << 20, dtype=torch.uint8, device="cuda"))
    q, cache = (torch.from_numpy(cupy.asnumpy(x)).cuda() for x in (tree.gpu_q, tree.gpu_cache))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tree.plan(wrapper)
        out, lse = wrapper.run(q, cache, return_lse=True)
    side.synchronize()
    check(out.cpu().numpy(), lse.cpu().numpy(), *tree.expect())
