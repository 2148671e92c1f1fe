"""Block-sparse attention on CPU arrays, against plain loops over the dense mask."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_attention import attend

import fi_cupy
from fi_cupy import errors, sparse
from fi_cupy.plan import sparse as plan
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

HEADS, KV_HEADS, DIM = 4, 2, 8


def workspace():
    return np.zeros(1 << 12, np.uint8)


class Matrix:
    """A random block-sparse matrix with a mask inside the blocks, and the dense mask, element by element."""

    def __init__(self, rng, mb, nb, r, c, density=0.5, shuffle=True):
        self.sizes = (mb * r, nb * c, r, c)
        self.present = rng.random((mb, nb)) < density
        lists = [np.flatnonzero(row) for row in self.present]
        if shuffle:
            lists = [rng.permutation(x) for x in lists]
        self.indptr = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int32)
        self.indices = np.concatenate(lists).astype(np.int32)
        self.inside = rng.random((len(self.indices), r, c)) < 0.7

    def dense(self, with_inside=False, causal=False):
        m, n, r, c = self.sizes
        mask = np.zeros((m, n), bool)
        for i in range(m):
            for e in range(self.indptr[i // r], self.indptr[i // r + 1]):
                for j in range(self.indices[e] * c, (self.indices[e] + 1) * c):
                    inside = self.inside[e, i % r, j % c] if with_inside else True
                    mask[i, j] = inside and (not causal or j <= i + n - m)
        return mask


def tensors(rng, m, n, dtype="float32"):
    return tuple(normal(rng, shape, dtype) for shape in ((m, HEADS, DIM), (n, KV_HEADS, DIM), (n, KV_HEADS, DIM)))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("mb", "nb", "r", "c"), [(3, 4, 2, 3), (5, 5, 4, 4), (6, 3, 2, 4), (7, 9, 1, 1), (2, 3, 5, 2), (4, 2, 3, 2)]
)
def test_trap_29_block_sparse(rng, mb, nb, r, c, causal, inside):
    matrix = Matrix(rng, mb, nb, r, c)
    m, n, _, _ = matrix.sizes
    q, k, v = tensors(rng, m, n)
    wrapper = fi_cupy.BlockSparseAttentionWrapper(workspace())
    want, want_lse = attend(q, k, v, matrix.dense(inside, causal), scale=0.4, cap=3.0)
    packed = [
        np.packbits(matrix.inside[a:b].transpose(1, 0, 2).reshape(-1), bitorder="little")
        for a, b in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True)
    ]
    masks = [{"mask": matrix.inside}, {"packed_mask": np.concatenate(packed)}] if inside else [{}]
    for given_mask in masks:
        wrapper.plan(
            matrix.indptr, matrix.indices, *matrix.sizes, HEADS, KV_HEADS, DIM, causal=causal, sm_scale=0.4,
            logits_soft_cap=3.0, q_data_type="float32", **given_mask,
        )  # fmt: skip
        out, lse = wrapper.run(q, k, v, return_lse=True)
        assert_close(out, want, "float32", "product")
        assert_close(lse, want_lse, "float32", "product")
        o, s = np.full_like(out, np.nan), np.full_like(lse, np.nan)
        assert wrapper.run(q, k, v, out=o, lse=s) is o
        assert (o == out).all() and (s == lse).all()
        assert (wrapper.forward(q, k, v) == out).all()


def test_aligned_causal_blocks_need_no_mask(rng):
    """The diagonal is the kernel's own business; blocks in the future are dropped."""
    wrapper = sparse.BlockSparseAttentionWrapper(workspace())
    present = np.tri(6, dtype=bool) & (rng.random((6, 6)) < 0.5) | np.eye(6, dtype=bool)
    present[1, 4] = True
    indptr = np.concatenate([[0], np.cumsum(present.sum(1))])
    wrapper.plan(indptr, np.nonzero(present)[1], 24, 24, 4, 4, HEADS, KV_HEADS, DIM, causal=True, q_data_type="float32")
    planned = wrapper._prefill._planned
    assert planned.mask is None and planned.options.causal
    assert planned.indptr[-1] == present.sum() - 1
    q, k, v = tensors(rng, 24, 24)
    dense = np.kron(present, np.ones((4, 4), bool)) & np.tri(24, dtype=bool)
    assert_close(wrapper.run(q, k, v), attend(q, k, v, dense)[0], "float32", "product")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_plain_causal_is_right_whenever_it_is_chosen(data):
    """Property: where no mask is made, the kernel's causal rule over the listed keys is that of the matrix."""
    col_sz = np.array(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=6)))
    row_sz = np.array(data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=6)))
    seen = np.array(
        data.draw(st.lists(st.lists(st.booleans(), min_size=len(col_sz), max_size=len(col_sz)), min_size=len(row_sz),
                           max_size=len(row_sz)))
    )  # fmt: skip
    i, j = np.nonzero(seen)
    starts = np.cumsum(col_sz) - col_sz
    blocks = plan.Blocks(i, starts[j], col_sz[j])
    rows = plan.Rows(np.cumsum(row_sz) - row_sz, row_sz)
    offset = int(col_sz.sum() - row_sz.sum())
    kept = blocks.take(plan.drop_hidden(blocks, rows, offset))
    mask, at = plan.causal_mask(kept, rows, offset), 0
    plain = True
    for r in range(len(row_sz)):
        mine = kept.take(kept.row == r)
        keys = plan.expand(mine.start, mine.length)
        for q in range(row_sz[r]):
            want = [key <= rows.begin[r] + q + offset for key in keys]
            assert mask[at : at + len(keys)].tolist() == want
            at += len(keys)
            plain &= want == [p <= len(keys) - row_sz[r] + q for p in range(len(keys))]
        for s, n in zip(blocks.start[blocks.row == r], blocks.length[blocks.row == r], strict=True):
            visible = row_sz[r] > 0 and s <= rows.begin[r] + row_sz[r] - 1 + offset
            assert visible == (s in mine.start and n in mine.length)
    assert at == len(mask)
    if plan.is_plain_causal(kept, rows, offset):
        assert plain


def test_expand():
    assert plan.expand(np.array([5, 0, 9]), np.array([2, 0, 3])).tolist() == [5, 6, 9, 10, 11]
    assert plan.expand(np.array([], int), np.array([], int)).tolist() == []


def test_convert_bsr_mask_layout(rng):
    matrix = Matrix(rng, 4, 5, 2, 3)
    want = [
        matrix.inside[e, i, j]
        for row in range(4)
        for i in range(2)
        for e in range(matrix.indptr[row], matrix.indptr[row + 1])
        for j in range(3)
    ]
    assert sparse.convert_bsr_mask_layout(matrix.inside, matrix.indptr).tolist() == want
    torch = pytest.importorskip("torch")
    got = sparse.convert_bsr_mask_layout(torch.tensor(matrix.inside), torch.tensor(matrix.indptr))
    assert isinstance(got, torch.Tensor) and got.tolist() == want
    with pytest.raises(errors.ArgumentError, match="expected 0 to"):
        sparse.convert_bsr_mask_layout(matrix.inside, np.array([0, 99]))


def variable(rng, kv_heads, row_sz, col_sz, density=0.6):
    seen = rng.random((kv_heads, len(row_sz[0]), len(col_sz[0]))) < density
    return seen, np.array(row_sz, np.int32), np.array(col_sz, np.int32)


def dense_variable(seen, row_sz, col_sz, head, causal):
    m, n = row_sz[head].sum(), col_sz[head].sum()
    mask = np.zeros((m, n), bool)
    row_of = [b for b, size in enumerate(row_sz[head]) for _ in range(size)]
    col_of = [b for b, size in enumerate(col_sz[head]) for _ in range(size)]
    for i in range(m):
        for j in range(n):
            mask[i, j] = seen[head, row_of[i], col_of[j]] and (not causal or j <= i + n - m)
    return mask


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("row_sz", "col_sz", "page"),
    [
        ([[3, 1, 6], [2, 8, 0]], [[5, 2, 7, 0], [1, 1, 10, 2]], 1),
        ([[4, 4], [5, 3]], [[4, 8, 4], [8, 4, 4]], 4),
        ([[2, 2, 2], [2, 2, 2]], [[2, 2, 2], [2, 2, 2]], 2),
    ],
)
def test_trap_29_variable_blocks(rng, group, causal, row_sz, col_sz, page):
    blocks = variable(rng, 2, row_sz, col_sz)
    m, n = sum(row_sz[0]), sum(col_sz[0])
    q = normal(rng, (2 * group, m, DIM), "float32")
    k, v = (normal(rng, (2, n, DIM), "float32") for _ in range(2))
    parts = []
    for h in range(2):
        mask = dense_variable(*blocks, h, causal)
        mine = q[h * group : (h + 1) * group].swapaxes(0, 1)
        parts.append([x.swapaxes(0, 1) for x in attend(mine, k[h][:, None], v[h][:, None], mask, cap=4.0)])
    want, want_lse = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
    wrapper = fi_cupy.VariableBlockSparseAttentionWrapper(workspace())
    wrapper.plan(*blocks, 2 * group, 2, DIM, causal=causal, logits_soft_cap=4.0, q_data_type="float32")
    assert wrapper._prefill._planned.page_size == page
    out, lse = wrapper.run(q, k, v, return_lse=True)
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")
    o, s = np.full_like(q, np.nan), np.full(q.shape[:2], np.nan, np.float32)
    got = wrapper.run_return_lse(q, k, v, out=o, lse=s)
    assert got[0] is o and got[1] is s and (o == out).all() and (s == lse).all()
    strided = np.full((*q.shape[:2], 2 * DIM), np.nan, np.float32)[..., ::2]
    transposed = np.ascontiguousarray(k.swapaxes(0, 1)).swapaxes(0, 1)
    assert wrapper.run(q, transposed, v, out=strided) is strided
    assert (strided == out).all()
    assert (wrapper.forward(q, k, v) == out).all()


def test_variable_blocks_without_any_block(rng):
    wrapper = sparse.VariableBlockSparseAttentionWrapper(workspace())
    wrapper.plan(np.zeros((1, 2, 2), bool), [[3, 1]], [[2, 2]], 1, 1, DIM, q_data_type="float32")
    q = normal(rng, (1, 4, DIM), "float32")
    out, lse = wrapper.run(q, q, q, return_lse=True)
    assert (out == 0).all() and np.isneginf(lse).all()


def test_torch_and_jax(rng):
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    matrix = Matrix(rng, 3, 3, 2, 2)
    q, k, v = tensors(rng, 6, 6)
    wrapper = sparse.BlockSparseAttentionWrapper(workspace())
    wrapper.plan(matrix.indptr, matrix.indices, *matrix.sizes, HEADS, KV_HEADS, DIM, q_data_type="float32")
    want = attend(q, k, v, matrix.dense())[0]
    for make, kind in ((torch.tensor, "torch"), (jnp.asarray, "jax")):
        out = wrapper.run(*map(make, (q, k, v)))
        assert type(out).__module__.startswith(kind)
        assert_close(np.asarray(out), want, "float32", "product")
    blocks = variable(rng, KV_HEADS, [[3, 3]] * 2, [[2, 4]] * 2)
    head_first = [np.ascontiguousarray(x.swapaxes(0, 1)) for x in (q, k, v)]
    other = sparse.VariableBlockSparseAttentionWrapper(workspace())
    other.plan(*map(torch.tensor, blocks), HEADS, KV_HEADS, DIM, q_data_type="float32")
    want = other.run(*head_first)
    for make, kind in ((torch.tensor, "torch"), (jnp.asarray, "jax")):
        out = other.run(*map(make, head_first))
        assert type(out).__module__.startswith(kind) and (np.asarray(out) == want).all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"M": 7}, errors.ArgumentError, "M = 7 and N = 6, expected multiples"),
        ({"indptr": [0, 1]}, errors.ArgumentError, "indptr has 2 entries from 0 to 1, expected 4"),
        ({"indices": [0, 3, 1]}, errors.ArgumentError, "indices goes from 0 to 3, expected 0 to 2"),
        ({"indices": [0, 1, 1]}, errors.ArgumentError, "names a key block twice"),
        ({"mask": np.ones((3, 2, 1), bool)}, errors.ShapeError, r"mask has shape \(3, 2, 1\), expected \(3, 2, 2\)"),
        ({"packed_mask": np.ones(1, np.uint8), "causal": True}, errors.ShapeError, "packed_mask has shape"),
        ({"block_mask": np.ones((2, 3, 3), bool)}, errors.UnsupportedError, "VariableBlockSparseAttentionWrapper"),
        ({"pos_encoding_mode": "ALIBI"}, errors.UnsupportedError, "without the gaps between them"),
        ({"num_qo_heads": 3}, errors.ArgumentError, "num_qo_heads is 3"),
        ({"o_data_type": "int32"}, errors.DTypeError, "the output has dtype int32"),
    ],
)
def test_plan_errors(change, error, text):
    values = {
        "indptr": [0, 1, 3, 3], "indices": [0, 1, 2], "M": 6, "N": 6, "R": 2, "C": 2, "num_qo_heads": 4,
        "num_kv_heads": 2, "head_dim": DIM, "q_data_type": "float32", **change,
    }  # fmt: skip
    with pytest.raises(error, match=text):
        sparse.BlockSparseAttentionWrapper(workspace()).plan(**values)


def test_other_errors(rng):
    wrapper = sparse.BlockSparseAttentionWrapper(workspace())
    q, k, v = tensors(rng, 6, 6)
    with pytest.raises(errors.PlanError, match=r"plan\(\) must come first"):
        wrapper.run(q, k, v)
    with pytest.raises(errors.UnsupportedError, match="backend is 'fa3'"):
        sparse.BlockSparseAttentionWrapper(workspace(), "fa3")
    wrapper.plan([0, 1, 3, 3], [0, 1, 2], 6, 6, 2, 2, HEADS, KV_HEADS, DIM, q_data_type="float32")
    assert wrapper.workspace_size([0, 1, 3, 3], [0, 1, 2], 6, 6, 2, 2, HEADS, KV_HEADS, DIM) == (0, 0)
    with pytest.raises(errors.ShapeError, match=r"k has shape \(5, 2, 8\), expected \(6,"):
        wrapper.run(q, k[:5], v)
    with pytest.raises(errors.DTypeError, match="q_scale has dtype float64"):
        wrapper.run(q, k, v, scale_q=np.ones(4))
    with pytest.raises(errors.PlanError, match="sm_scale is 3"):
        wrapper.forward(q, k, v, sm_scale=3.0)
    other = sparse.VariableBlockSparseAttentionWrapper(workspace())
    with pytest.raises(errors.ArgumentError, match=r"block_row_sz sums to \[4, 5\]"):
        other.plan(np.ones((2, 2, 1), bool), [[2, 2], [2, 3]], [[4], [4]], 2, 2, DIM)
    with pytest.raises(errors.ShapeError, match="block_col_sz"):
        other.plan(np.ones((2, 2, 1), bool), [[2, 2], [2, 2]], [[4, 4], [4, 4]], 2, 2, DIM)
    other.plan(np.ones((2, 2, 1), bool), [[2, 2], [2, 2]], [[4], [4]], 2, 2, DIM, q_data_type="float32")
    with pytest.raises(errors.ShapeError, match=r"q has shape \(6, 4, 8\), expected \(2, 4, 8\)"):
        other.run(q, k, v)
