"""The cascade and shared-prefix wrappers on CPU arrays, against plain loops over the whole sequences."""

from __future__ import annotations

import numpy as np
import pytest
from naive_attention import Pages, attend, seen

import fi_cupy
from fi_cupy import cascade, cascade_attention, errors
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

Cascade = cascade_attention.MultiLevelCascadeAttentionWrapper
HEADS, KV_HEADS, DIM = 4, 2, 16


def workspace():
    return np.zeros(1 << 12, np.uint8)


def keys(rng, n, dtype="float32"):
    return normal(rng, (n, KV_HEADS, DIM), dtype), normal(rng, (n, KV_HEADS, DIM), dtype)


class Tree:
    """Levels of shared keys over requests with `qo_lens` queries; `lens[i]` and `sizes[i]` describe level i."""

    def __init__(self, rng, qo_lens, lens, sizes, page_size=4, layout="NHD", dtype="float32"):
        self.dtype, self.page_size, self.layout = dtype, page_size, layout
        self.q = normal(rng, (sum(qo_lens), HEADS, DIM), dtype)
        pages = Pages(rng, 60, page_size, KV_HEADS, DIM, self.q.dtype, layout)
        qo_ends = np.concatenate([[0], np.cumsum(qo_lens)])
        self.whole = [[] for _ in qo_lens]  # (k, v) of every request on every level
        self.plan = ([], [], [], [])
        for level_lens, level_sizes in zip(lens, sizes, strict=True):
            sequences = [keys(rng, n, dtype) for n in level_lens]
            ends = np.concatenate([[0], np.cumsum(level_sizes)])
            for sequence, a, b in zip(sequences, ends[:-1], ends[1:], strict=True):
                for r in range(a, b):
                    self.whole[r].append(sequence)
            for part, value in zip(self.plan, (qo_ends[ends].astype(np.int32), *pages.add(sequences)), strict=True):
                part.append(value)
        self.cache, self.qo_ends = pages.cache, qo_ends

    def expect(self, causal=False, window=-1, **options):
        parts = []
        for r, levels in enumerate(self.whole):
            k, v = (np.concatenate([level[i] for level in levels]) for i in (0, 1))
            q = self.q[self.qo_ends[r] : self.qo_ends[r + 1]]
            parts.append(attend(q, k, v, seen(len(q), len(k), causal, window), **options))
        return tuple(np.concatenate([p[i] for p in parts]) for i in (0, 1))

    def wrapper(self, *args, **options):
        made = Cascade(len(self.plan[0]), workspace(), self.layout, *args)
        made.plan(*self.plan, HEADS, KV_HEADS, DIM, self.page_size, q_data_type=self.dtype, **options)
        return made


def two_levels(rng, qo_lens=(3, 1, 5), own=(4, 7, 0), **options):
    return Tree(rng, qo_lens, [[9, 6], own], [[2, 1], [1, 1, 1]], **options)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_two_levels(rng, layout, page_size, causal):
    # A causal level with fewer keys than queries would hide keys of the prefix, which the naive mask does not mean.
    tree = two_levels(rng, own=(4, 7, 6), layout=layout, page_size=page_size)
    wrapper = tree.wrapper(causal=causal)
    want, want_lse = tree.expect(causal)
    out, lse = wrapper.run(tree.q, tree.cache, return_lse=True)
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")
    given, given_lse = np.full_like(tree.q, np.nan), np.full(tree.q.shape[:2], np.nan, np.float32)
    packed = np.stack(tree.cache, axis=1)
    assert wrapper.run(tree.q, packed, out=given, lse=given_lse) is given
    assert_close(given, want, "float32", "product")
    assert_close(given_lse, want_lse, "float32", "product")
    assert_close(wrapper.forward(tree.q, tree.cache), want, "float32", "product")


def test_three_levels_with_empty_requests_and_options(rng):
    tree = Tree(rng, (2, 1, 1, 3), [[8], [5, 0], [3, 2, 0, 4]], [[4], [1, 3], [1, 1, 1, 1]])
    wrapper = tree.wrapper(sm_scale=0.3, logits_soft_cap=2.0)
    out, lse = wrapper.run_return_lse(tree.q, tree.cache, q_scale=2.0, k_scale=0.5, v_scale=3.0)
    want, want_lse = tree.expect(scale=0.3, cap=2.0)
    assert_close(out, want * 3.0, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")


@pytest.mark.parametrize("window", [0, 1, 3, 6, 8, 12, 100])
@pytest.mark.parametrize("causal", [False, True])
def test_trap_6_window_over_the_whole_sequence(rng, window, causal):
    tree = Tree(rng, (2, 1, 1, 3), [[8], [5, 2], [3, 2, 1, 4]], [[4], [1, 3], [1, 1, 1, 1]])
    out, lse = tree.wrapper(window_left=window, causal=causal).run(tree.q, tree.cache, return_lse=True)
    want, want_lse = tree.expect(causal, window)
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")


def test_single_queries_take_the_decode_kernel(rng):
    tree = two_levels(rng, qo_lens=(1, 1, 1))
    wrapper = tree.wrapper()
    assert [level.uses_decode for level in wrapper._levels] == [False, True]
    out, lse = wrapper.run(tree.q, tree.cache, return_lse=True)
    want, want_lse = tree.expect()
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")
    other = two_levels(rng)
    wrapper.plan(*other.plan, HEADS, KV_HEADS, DIM, 4, q_data_type="float32")
    assert_close(wrapper.run(other.q, other.cache), other.expect()[0], "float32", "product")


def test_one_level_takes_positions(rng):
    tree = Tree(rng, (1, 1), [[5, 7]], [[1, 1]])
    rope = tree.wrapper(pos_encoding_mode="ROPE_LLAMA").run(tree.q, tree.cache)
    paged = fi_cupy.BatchPrefillWithPagedKVCacheWrapper(workspace())
    paged.plan(
        *(x[0] for x in tree.plan), HEADS, KV_HEADS, DIM, 4, pos_encoding_mode="ROPE_LLAMA", q_data_type="float32"
    )
    assert_close(rope, paged.run(tree.q, tree.cache), "float32", "product")


def test_bfloat16_and_torch(rng):
    tree = two_levels(rng, dtype="bfloat16")
    out = tree.wrapper().run(tree.q, tree.cache)
    assert out.dtype == tree.q.dtype
    assert_close(out, tree.expect()[0], "bfloat16", "product")
    torch = pytest.importorskip("torch")
    tree = two_levels(rng)
    wrapper = Cascade(2, torch.empty(1 << 12, dtype=torch.uint8))
    arrays = [[torch.tensor(x) for x in part] for part in tree.plan]
    wrapper.plan(*arrays, HEADS, KV_HEADS, DIM, 4, q_data_type=torch.float32)
    out = wrapper.run(torch.tensor(tree.q), tuple(torch.tensor(x) for x in tree.cache))
    assert isinstance(out, torch.Tensor)
    assert_close(out.numpy(), tree.expect()[0], "float32", "product")


def test_jax_arrays(rng):
    jnp = pytest.importorskip("jax.numpy")
    tree = two_levels(rng)
    out = tree.wrapper().run(jnp.asarray(tree.q), tuple(jnp.asarray(x) for x in tree.cache))
    assert type(out).__module__.startswith("jax")
    assert_close(np.asarray(out), tree.expect()[0], "float32", "product")


@pytest.mark.parametrize("qo_lens", [(3, 1, 5), (1, 1, 1)])
def test_graph_buffers_are_filled(rng, qo_lens):
    tree = two_levels(rng, qo_lens)
    buffers = [[np.full(len(x) + 2 * (i == 2), -1, np.int32) for x in part] for i, part in enumerate(tree.plan)]
    wrapper = tree.wrapper(True, *buffers)
    assert wrapper.is_cuda_graph_enabled
    for part, given in zip(buffers, tree.plan, strict=True):
        for buffer, values in zip(part, given, strict=True):
            assert (buffer[: len(values)] == values).all()
    assert_close(wrapper.run(tree.q, tree.cache), tree.expect()[0], "float32", "product")
    padded = np.concatenate([tree.q, np.full_like(tree.q[:2], np.nan)])
    assert_close(wrapper.run(padded, tree.cache), tree.expect()[0], "float32", "product")
    assert wrapper.workspace_size(*tree.plan, HEADS, KV_HEADS, DIM, 4) == (0, 0)
    other = two_levels(rng, (2, 1, 0) if qo_lens[0] == 1 else (1, 1, 1))
    if qo_lens[0] == 1:
        with pytest.raises(errors.PlanError, match="level 1 was first planned with one query a request"):
            wrapper.plan(*other.plan, HEADS, KV_HEADS, DIM, 4, q_data_type="float32")
    else:
        wrapper.plan(*other.plan, HEADS, KV_HEADS, DIM, 4, q_data_type="float32")
        assert_close(wrapper.run(other.q, other.cache), other.expect()[0], "float32", "product")


def test_errors(rng):
    tree = two_levels(rng)
    wrapper = Cascade(2, workspace())
    sizes = (HEADS, KV_HEADS, DIM, 4)
    with pytest.raises(errors.PlanError, match=r"run: plan\(\) must come first"):
        wrapper.run(tree.q, tree.cache)
    with pytest.raises(errors.ArgumentError, match="num_levels is 0"):
        Cascade(0, workspace())
    with pytest.raises(errors.ArgumentError, match="qo_indptr_arr has 1 entries, expected 2 = num_levels"):
        wrapper.plan(tree.plan[0][:1], *tree.plan[1:], *sizes)
    with pytest.raises(errors.ArgumentError, match=r"qo_indptr_arr\[1\] goes from 0 to 8, expected 0 to 9"):
        wrapper.plan([tree.plan[0][0], np.array([0, 3, 4, 8])], *tree.plan[1:], *sizes)
    for mode in ("ALIBI", "ROPE_LLAMA"):
        with pytest.raises(errors.UnsupportedError, match=r"rotate q and k with fi_cupy\.rope"):
            wrapper.plan(*tree.plan, *sizes, pos_encoding_mode=mode)
    with pytest.raises(errors.ArgumentError, match="qo_indptr_buf_arr has 0 entries"):
        Cascade(2, workspace(), "NHD", True)
    buffers = [[np.zeros(len(x), np.int32) for x in part] for part in tree.plan]
    with pytest.raises(errors.UnsupportedError, match="window_left is 3, expected -1 with use_cuda_graph"):
        tree.wrapper(True, *buffers, window_left=3)
    wrapper.plan(*tree.plan, *sizes, q_data_type="float32")
    with pytest.raises(errors.ShapeError, match=r"q has shape \(8, 4, 16\), expected \(9,"):
        wrapper.run(tree.q[:8], tree.cache)
    with pytest.raises(errors.ArgumentError, match="int_workspace_buffers has 1 entries"):
        wrapper.reset_workspace_buffer(workspace(), [None])
    wrapper.reset_workspace_buffer(workspace(), [np.zeros(1), np.zeros(1)])
    with pytest.raises(errors.PlanError, match=r"plan\(\) must come first"):
        wrapper.run(tree.q, tree.cache)


def test_names_are_flashinfers():
    for name in cascade_attention.__all__:
        assert getattr(cascade, name) is getattr(cascade_attention, name) is getattr(fi_cupy, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = cascade.nothing


def shared_batch(rng, qo_lens, own, layout="NHD", dtype="float32"):
    q = normal(rng, (sum(qo_lens), HEADS, DIM), dtype)
    shared = keys(rng, 11, dtype)
    sequences = [keys(rng, n, dtype) for n in own]
    pages = Pages(rng, 20, 4, KV_HEADS, DIM, q.dtype, layout)
    return q, shared, sequences, pages.add(sequences), pages.cache


def expect_shared(q, shared, sequences, qo_lens, causal=False, **options):
    parts, start = [], 0
    for m, own in zip(qo_lens, sequences, strict=True):
        k, v = (np.concatenate([a, b]) for a, b in zip(shared, own, strict=True))
        mask = seen(m, len(k), causal)
        mask[:, : len(shared[0])] = True
        parts.append(attend(q[start : start + m], k, v, mask, **options))
        start += m
    return tuple(np.concatenate([p[i] for p in parts]) for i in (0, 1))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_decode_with_shared_prefix(rng, layout):
    q, shared, sequences, table, cache = shared_batch(rng, (1, 1, 1), (4, 0, 7), layout)
    wrapper = cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(workspace(), layout)
    k, v = shared if layout == "NHD" else (x.swapaxes(0, 1) for x in shared)
    with pytest.raises(errors.PlanError, match=r"begin_forward\(\) must come first"):
        wrapper.forward(q, k, v, cache)
    wrapper.begin_forward(*table, HEADS, KV_HEADS, DIM, 4, "float32")
    assert wrapper.workspace_size(*table, HEADS, KV_HEADS, DIM, 4, "float32") == (0, 0)
    k, v = shared if layout == "NHD" else (x.swapaxes(0, 1) for x in shared)
    for scale in (None, 0.4):
        want, want_lse = expect_shared(q, shared, sequences, (1, 1, 1), scale=scale)
        given = np.full_like(q, np.nan)
        out, lse = wrapper.forward_return_lse(q, k, v, cache, sm_scale=scale, out=given)
        assert out is given
        assert_close(out, want, "float32", "product")
        assert_close(lse, want_lse, "float32", "product")
    with pytest.raises(errors.UnsupportedError, match="nothing is rotated inside"):
        wrapper.forward(q, k, v, cache, rope_theta=1e4)
    wrapper.end_forward()


@pytest.mark.parametrize("causal", [False, True])
def test_prefill_with_shared_prefix(rng, causal):
    qo_lens = (3, 1, 5)
    q, shared, sequences, table, cache = shared_batch(rng, qo_lens, (4, 3, 7))
    wrapper = cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(workspace())
    qo = np.concatenate([[0], np.cumsum(qo_lens)]).astype(np.int32)
    wrapper.begin_forward(qo, *table, HEADS, KV_HEADS, DIM, 4, q_data_type="float32")
    want, want_lse = expect_shared(q, shared, sequences, qo_lens, causal)
    out, lse = wrapper.forward(q, *shared, cache, causal=causal, return_lse=True)
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")
    wrapper.begin_forward(qo, *table, HEADS, KV_HEADS, DIM, 4, q_data_type="float32", causal=causal)
    assert_close(wrapper.forward(q, *shared, cache, causal=causal), want, "float32", "product")
    with pytest.raises(errors.PlanError, match=f"causal is {not causal}, planned {causal}"):
        wrapper.forward(q, *shared, cache, causal=not causal)


def test_a_split_size_a_level(rng):
    tree = two_levels(rng)
    wrapper = tree.wrapper(fixed_split_size=[2, None])
    assert [level.wrapper._planned.fixed_split for level in wrapper._levels] == [2 * tree.page_size, None]
    assert_close(wrapper.run(tree.q, tree.cache), tree.expect()[0], "float32", "product")
    both = tree.wrapper(fixed_split_size=3)
    assert [level.wrapper._planned.fixed_split for level in both._levels] == [3 * tree.page_size] * 2
    with pytest.raises(errors.ArgumentError, match="fixed_split_size has 3 entries, expected 2 = num_levels"):
        tree.wrapper(fixed_split_size=[1, 2, 3])
