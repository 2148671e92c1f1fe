"""Block-sparse attention: the blocks become one boolean mask for the dense reference."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_cupy.reference._common import Array, repeat_index
from fi_cupy.reference.attention import attention


def convert_bsr_mask_layout(mask: Array, indptr: Array) -> Array:
    """Masks of blocks, ``[nnz, R, C]``, as each block row's ``[R, blocks * C]`` mask, flat, one after the other.

    Source: flashinfer.sparse.convert_bsr_mask_layout.
    """
    parts = [mask[int(indptr[i]) : int(indptr[i + 1])].transpose(1, 0, 2).reshape(-1) for i in range(len(indptr) - 1)]
    return np.concatenate(parts) if parts else np.zeros(0, dtype=mask.dtype)


def bsr_to_mask(
    indptr: Array, indices: Array, num_rows: int, num_cols: int, r: int, c: int, mask: Array | None = None
) -> Array:
    """Dense ``[num_rows, num_cols]`` mask of a block-sparse matrix with ``[r, c]`` blocks.

    `indptr` ``[num_rows / r + 1]`` and `indices` ``[nnz]`` list the block columns of every block row; `mask`
    ``[nnz, r, c]`` hides elements inside the blocks.
    """
    blocks = np.zeros((num_rows // r, num_cols // c, r, c), dtype=bool)
    inside = True if mask is None else np.asarray(mask).astype(bool)
    blocks[repeat_index(indptr), np.asarray(indices, dtype=np.int64)] = inside
    return blocks.transpose(0, 2, 1, 3).reshape(num_rows, num_cols)


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    indptr: Array,
    indices: Array,
    r: int,
    c: int,
    mask: Array | None = None,
    causal: bool = False,
    **options: Any,
) -> tuple[Array, Array | None]:
    """`attention` restricted to the listed blocks, the same for all heads; rows without a block give 0 and -inf.

    Parameters
    ----------
    q : [M, num_qo_heads, head_dim]
    k, v : [N, num_kv_heads, head_dim]
    indptr, indices, r, c, mask
        See `bsr_to_mask`.
    causal : bool
        Joined with the blocks, bottom-right aligned in the dense matrix.
    **options
        The other options of `attention`.

    Source: flashinfer.sparse.BlockSparseAttentionWrapper.
    """
    dense = bsr_to_mask(indptr, indices, q.shape[0], k.shape[0], r, c, mask)
    if causal:
        dense &= np.tri(q.shape[0], k.shape[0], k.shape[0] - q.shape[0], dtype=bool)
    return attention(q, k, v, custom_mask=dense, **options)


def variable_block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    block_mask_map: Array,
    block_row_sz: Array,
    block_col_sz: Array,
    causal: bool = False,
    **options: Any,
) -> tuple[Array, Array | None]:
    """Block-sparse attention with a mask and block sizes for every kv head; heads come first.

    Parameters
    ----------
    q : [num_qo_heads, qo_len, head_dim]
    k, v : [num_kv_heads, kv_len, head_dim]
    block_mask_map : bool [num_kv_heads, row_blocks, col_blocks]
    block_row_sz : int [num_kv_heads, row_blocks]
        Sums to qo_len for every head.
    block_col_sz : int [num_kv_heads, col_blocks]
        Sums to kv_len for every head.
    causal : bool
    **options
        The other options of `attention`.

    Returns
    -------
    (out, lse)
        ``[num_qo_heads, qo_len, head_dim]`` and ``[num_qo_heads, qo_len]``; a row without a block gives 0 and -inf.

    Source: flashinfer.sparse.VariableBlockSparseAttentionWrapper.
    """
    num_kv_heads, group = k.shape[0], q.shape[0] // k.shape[0]
    outs, lses = [], []
    for h in range(num_kv_heads):
        rows = np.repeat(np.asarray(block_mask_map[h]).astype(bool), np.asarray(block_row_sz[h]), axis=0)
        dense = np.repeat(rows, np.asarray(block_col_sz[h]), axis=1)
        if causal:
            dense &= np.tri(q.shape[1], k.shape[1], k.shape[1] - q.shape[1], dtype=bool)
        q_head = q[h * group : (h + 1) * group].swapaxes(0, 1)
        out, lse = attention(q_head, k[h][:, None], v[h][:, None], custom_mask=dense, **options)
        outs.append(out.swapaxes(0, 1))
        lses.append(None if lse is None else lse.T)
    return np.concatenate(outs), None if lses[0] is None else np.concatenate(lses)  # type: ignore[arg-type]
