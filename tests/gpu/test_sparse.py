"""Block-sparse attention against the float64 reference."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from paged_cases import bits, check

from fi_cupy import errors, sparse
from fi_cupy.reference.sparse import block_sparse_attention, variable_block_sparse_attention
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.usefixtures("kernel")  # both prefill kernels


def workspace(nbytes=32 << 20):
    return cupy.full((nbytes,), 0xFF, cupy.uint8)


def bsr(rng, mb, nb, density=0.5):
    present = rng.random((mb, nb)) < density
    present[mb // 2] = False  # a block row without blocks
    lists = [rng.permutation(np.flatnonzero(row)) for row in present]
    indptr = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int32)
    return indptr, np.concatenate(lists).astype(np.int32)


def tensors(rng, m, n, heads, kv_heads, dim, dtype="bfloat16"):
    return [normal(rng, shape, dtype) for shape in ((m, heads, dim), (n, kv_heads, dim), (n, kv_heads, dim))]


def run(wrapper, arrays):
    q, k, v = map(on_gpu, arrays)
    out = poisoned(q.shape, arrays[0].dtype)
    lse = poisoned(q.shape[:2], "float32")
    got = wrapper.run(q, k, v, out=out, lse=lse, return_lse=True)
    assert got[0] is out and got[1] is lse
    return out, lse


@pytest.mark.parametrize("inside", ["", "mask", "packed"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("mb", "nb", "r", "c", "dtype"),
    [(6, 8, 64, 64, "bfloat16"), (9, 5, 16, 48, "float16"), (40, 33, 1, 7, "bfloat16"), (3, 4, 130, 1, "float16")],
)
def test_trap_29_block_sparse(rng, mb, nb, r, c, dtype, causal, inside):
    m, n, heads, kv_heads, dim = mb * r, nb * c, 8, 2, 64
    indptr, indices = bsr(rng, mb, nb)
    q, k, v = tensors(rng, m, n, heads, kv_heads, dim, dtype)
    mask = (rng.random((len(indices), r, c)) < 0.7) if inside else None
    options = {}
    if inside == "mask":
        options = {"mask": on_gpu(mask)}
    elif inside:
        rows = [mask[a:b].transpose(1, 0, 2).reshape(-1) for a, b in pairwise(indptr)]
        options = {"packed_mask": on_gpu(np.concatenate([np.packbits(x, bitorder="little") for x in rows]))}
    wrapper = sparse.BlockSparseAttentionWrapper(workspace())
    wrapper.plan(
        on_gpu(indptr), on_gpu(indices), m, n, r, c, heads, kv_heads, dim, causal=causal, logits_soft_cap=8.0,
        q_data_type=dtype, **options,
    )  # fmt: skip
    out, lse = run(wrapper, (q, k, v))
    wide = (x.astype(np.float64) for x in (q, k, v))
    want = block_sparse_attention(*wide, indptr, indices, r, c, mask, causal=causal, logits_soft_cap=8.0)
    check(out, lse, *want)
    again, again_lse = run(wrapper, (q, k, v))
    assert (bits(again) == bits(out)).all() and (bits(again_lse) == bits(lse)).all()


def test_aligned_causal_blocks_use_the_kernels_own_mask(rng):
    present = np.tri(12, dtype=bool) & (rng.random((12, 12)) < 0.4) | np.eye(12, dtype=bool)
    indptr = np.concatenate([[0], np.cumsum(present.sum(1))]).astype(np.int32)
    indices = np.nonzero(present)[1].astype(np.int32)
    arrays = tensors(rng, 768, 768, 4, 4, 128)
    wrapper = sparse.BlockSparseAttentionWrapper(workspace())
    wrapper.plan(indptr, indices, 768, 768, 64, 64, 4, 4, 128, causal=True, q_data_type="bfloat16")
    assert wrapper._prefill._planned.mask is None
    wide = (x.astype(np.float64) for x in arrays)
    check(*run(wrapper, arrays), *block_sparse_attention(*wide, indptr, indices, 64, 64, causal=True))


def test_strided_keys_are_not_copied(rng):
    indptr, indices = bsr(rng, 4, 6)
    arrays = tensors(rng, 128, 96, 4, 2, 64)
    wrapper = sparse.BlockSparseAttentionWrapper(workspace())
    wrapper.plan(indptr, indices, 128, 96, 32, 16, 4, 2, 64, q_data_type="bfloat16")
    out, _ = run(wrapper, arrays)
    q, k, v = map(on_gpu, arrays)
    both = poisoned((96, 5, 64), "bfloat16")
    both.view("u2")[:, :2], both.view("u2")[:, 3:] = k.view("u2"), v.view("u2")
    assert (bits(wrapper.run(q, both[:, :2], both[:, 3:])) == bits(out)).all()


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("step", [1, 16])
def test_trap_29_variable_blocks(rng, group, causal, step):
    kv_heads, mb, nb, dim = 3, 5, 7, 128

    def sizes(blocks, total):
        cuts = np.sort(rng.integers(0, total + 1, (kv_heads, blocks - 1)), axis=1)
        edges = np.concatenate([np.zeros((kv_heads, 1), int), cuts, np.full((kv_heads, 1), total)], axis=1)
        return np.diff(edges, axis=1).astype(np.int32)

    row_sz, col_sz = sizes(mb, 200), sizes(nb, 26) * step
    m, n = 200, 26 * step
    seen = rng.random((kv_heads, mb, nb)) < 0.6
    seen[0, 2] = False
    q = normal(rng, (kv_heads * group, m, dim))
    k, v = (normal(rng, (kv_heads, n, dim)) for _ in range(2))
    wrapper = sparse.VariableBlockSparseAttentionWrapper(workspace())
    wrapper.plan(
        on_gpu(seen), on_gpu(row_sz), on_gpu(col_sz), kv_heads * group, kv_heads, dim, causal=causal,
        sm_scale=0.1, q_data_type="bfloat16",
    )  # fmt: skip
    assert wrapper._prefill._planned.page_size % step == 0
    out, lse = run(wrapper, (q, k, v))
    wide = (x.astype(np.float64) for x in (q, k, v))
    want = variable_block_sparse_attention(*wide, seen, row_sz, col_sz, causal=causal, sm_scale=0.1)
    check(out, lse, *want)
    assert (bits(wrapper.run(*map(on_gpu, (q, k, v)))) == bits(out)).all()


def test_graph_capture(rng):
    indptr, indices = bsr(rng, 6, 8)
    arrays = tensors(rng, 384, 512, 8, 2, 128)
    wrapper = sparse.BlockSparseAttentionWrapper(workspace())
    wrapper.plan(indptr, indices, 384, 512, 64, 64, 8, 2, 128, q_data_type="bfloat16")
    want, want_lse = run(wrapper, arrays)
    q, k, v = map(on_gpu, arrays)
    out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
    cupy.cuda.runtime.deviceSynchronize()
    stream = new_stream()
    with stream:
        stream.begin_capture()
        wrapper.run(q, k, v, out=out, lse=lse)
        graph = stream.end_capture()
        graph.launch()
        stream.synchronize()
    assert (bits(out) == bits(want)).all() and (bits(lse) == bits(want_lse)).all()


def test_workspace_size_and_mask_layout(rng):
    indptr, indices = np.array([0, 40, 40], np.int32), np.arange(40, dtype=np.int32)
    sizes = (32, 5120, 16, 128, 8, 2, 128)
    need, _ = sparse.BlockSparseAttentionWrapper(workspace(16)).workspace_size(
        indptr, indices, *sizes, q_data_type="bfloat16"
    )
    assert need > 0
    with pytest.raises(errors.WorkspaceError, match=f"expected at least {need}"):
        sparse.BlockSparseAttentionWrapper(workspace(need - 256)).plan(indptr, indices, *sizes, q_data_type="bfloat16")
    mask = rng.random((40, 16, 128)) < 0.5
    flat = sparse.convert_bsr_mask_layout(on_gpu(mask), indptr)
    assert isinstance(flat, cupy.ndarray)
    assert (flat.get() == sparse.convert_bsr_mask_layout(mask, indptr)).all()


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    indptr, indices = bsr(rng, 6, 8)
    arrays = tensors(rng, 96, 128, 8, 2, 64, "float16")
    wrapper = sparse.BlockSparseAttentionWrapper(torch.empty(8 << 20, dtype=torch.uint8, device="cuda"))
    wrapper.plan(torch.tensor(indptr).cuda(), torch.tensor(indices).cuda(), 96, 128, 16, 16, 8, 2, 64)
    out, lse = wrapper.run(*(torch.from_numpy(x).cuda() for x in arrays), return_lse=True)
    wide = (x.astype(np.float64) for x in arrays)
    want = block_sparse_attention(*wide, indptr, indices, 16, 16)
    check(out.cpu().numpy(), lse.cpu().numpy(), *want)
