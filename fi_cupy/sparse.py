"""Block-sparse attention: each block of query rows sees a list of blocks of keys.

Runs through the paged prefill kernel: a block row is a request, the blocks it sees are its pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partialmethod
from typing import Any

import numpy as np

from fi_cupy import reference
from fi_cupy.arrays import View, view
from fi_cupy.checks import as_sizes, check_dtype, check_ndim, check_shape
from fi_cupy.dtypes import uint8
from fi_cupy.errors import ArgumentError, PlanError, ShapeError, UnsupportedError
from fi_cupy.page_table import Ints, check_offsets, read_ints
from fi_cupy.plan.sparse import Blocks, Rows, causal_mask, has_duplicates, keys_per_row, offsets
from fi_cupy.sparse_common import BlockSparse, check_modes, hide_future
from fi_cupy.sparse_variable import VariableBlockSparseAttentionWrapper
from fi_cupy.variants_placed import Places
from fi_cupy.workspace import device_of

__all__ = ["BlockSparseAttentionWrapper", "VariableBlockSparseAttentionWrapper", "convert_bsr_mask_layout"]


def convert_bsr_mask_layout(mask: Any, indptr: Any) -> Any:
    """Masks of the blocks of a block-sparse matrix in the order that custom masks have.

    Parameters
    ----------
    mask : array, [nnz, R, C], any dtype
    indptr : int [block rows + 1]
        Host arrays cost no synchronisation.

    Returns
    -------
    array, [nnz * R * C]
        Each block row's ``[R, blocks * C]``, row-major, one after the other.

    Source
    ------
    flashinfer.sparse.convert_bsr_mask_layout.

    Examples
    --------
    >>> import numpy as np
    >>> from fi_cupy.sparse import convert_bsr_mask_layout
    >>> convert_bsr_mask_layout(np.arange(8).reshape(2, 2, 2), np.array([0, 2]))
    array([0, 1, 4, 5, 2, 3, 6, 7])
    """
    op = "convert_bsr_mask_layout"
    m = view(mask, op, "mask")
    check_ndim(op, "mask", m, 3)
    rows = read_ints(op, {"indptr": indptr})["indptr"]
    check_offsets(op, "indptr", rows)
    nnz, r, c = m.shape
    if rows[0] != 0 or rows[-1] != nnz:
        raise ArgumentError(f"{op}: indptr goes from {rows[0]} to {rows[-1]}, expected 0 to {nnz} = mask.shape[0]")
    if m.framework == "numpy":
        return reference.sparse.convert_bsr_mask_layout(m.numpy(), rows)
    order = np.arange(nnz * r * c).reshape(nnz, r, c)
    order = reference.sparse.convert_bsr_mask_layout(order, rows)
    with device_of(m):
        return mask.reshape(-1)[_like(order, m)]


def _like(index: Ints, like: View) -> Any:
    """An index array that the framework of `like` takes for its own arrays."""
    if like.framework == "torch":
        import torch

        return torch.as_tensor(index, device=like.array.device)
    if like.framework == "cupy":
        import cupy

        return cupy.asarray(index)
    return index


#: The matrix' own indices, found from the kernel's: a block row is a request, the blocks it sees are its pages.
_PLACES: Places = {
    "batch": lambda ctx: ctx.batch * 0,
    "qo_idx": lambda ctx: ctx.batch * ctx.fi_block_rows + ctx.qo_idx,
    "kv_idx": lambda ctx: (
        ctx.fi_pages[ctx.fi_page_begin[ctx.batch] + ctx.kv_idx // ctx.fi_page_size] * ctx.fi_page_size
        + ctx.kv_idx % ctx.fi_page_size
    ),
    "qo_len": lambda ctx: ctx.fi_queries,
    "kv_len": lambda ctx: ctx.fi_keys,
}


class BlockSparseAttentionWrapper(BlockSparse):
    """Attention under a block-sparse matrix with blocks of R queries and C keys, the same for all heads.

    Parameters
    ----------
    float_workspace_buffer : array
        As in `BatchPrefillWithPagedKVCacheWrapper`. A CPU array selects the NumPy reference.
    backend : "auto", "fa2" (the portable kernel) or "fa3" (the Hopper kernel; UnsupportedError where it does not fit)
        There is one implementation.
    variant : AttentionVariant, optional
        See `fi_cupy.jit.define_variant`. Its functions see the indices of the matrix: query 0 to M - 1, key 0 to N - 1.
        CUDA text must not look at positions.

    Source
    ------
    flashinfer.sparse.BlockSparseAttentionWrapper.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.BlockSparseAttentionWrapper(np.empty(1 << 20, np.uint8))
    >>> wrapper.plan([0, 1, 3], [1, 0, 1], 8, 32, 4, 16, 8, 2, 64, q_data_type="float32")
    >>> q, k = np.ones((8, 8, 64), np.float32), np.ones((32, 2, 64), np.float32)
    >>> wrapper.run(q, k, k).shape                     # queries 0-3 see keys 16-31, queries 4-7 all of them
    (8, 8, 64)
    """

    _op = "BlockSparseAttentionWrapper"
    _places = _PLACES
    _place_tensors = ("fi_pages", "fi_page_begin")
    _place_scalars = ("fi_page_size", "fi_block_rows", "fi_queries", "fi_keys")

    def plan(
        self,
        indptr: Any,
        indices: Any,
        M: int,
        N: int,
        R: int,
        C: int,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        mask: Any = None,
        packed_mask: Any = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        block_mask: Any = None,
    ) -> None:
        """Turn the matrix into a page table and make the schedule.

        Parameters
        ----------
        indptr : int [M / R + 1]
            Block row i sees the key blocks ``indices[indptr[i] : indptr[i + 1]]``. Host arrays cost no
            synchronisation; GPU arrays are copied back first, both together.
        indices : int [nnz]
            Numbers of key blocks, each at most once a block row.
        M, N : int
            Queries and keys: multiples of R and C.
        R, C : int
            Queries and keys of a block, any sizes.
        num_qo_heads, num_kv_heads, head_dim : int
        mask : bool [nnz, R, C], optional
            Hides single elements of the blocks; True = visible.
        packed_mask : uint8, optional
            The same as `fi_cupy.segment_packbits` makes it, little-endian, from `convert_bsr_mask_layout`'s order.
        causal : bool
            Query i sees keys up to ``N - M + i`` of the blocks it lists; joined with a mask. Blocks wholly in the
            future are dropped; diagonal blocks are masked by the kernel where all of them are listed, and else through
            a mask of ``R * keys`` bits a block row that is made here.
        pos_encoding_mode : "NONE"
        use_fp16_qk_reduction : bool
            A hint that FlashInfer takes for speed; products are summed in fp32 here.
        logits_soft_cap, sm_scale, rope_scale, rope_theta, q_data_type, kv_data_type, o_data_type, non_blocking
            As in `BatchPrefillWithPagedKVCacheWrapper.plan`. (FlashInfer's o_data_type is float16 by default; here it
            is that of q.)
        block_mask : None
            A mask for each head belongs to `VariableBlockSparseAttentionWrapper`.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, WorkspaceError, UnsupportedError, PlanError
        """
        op = f"{self._op}.plan"
        args, options = self._arguments(
            op, indptr, indices, M, N, R, C, num_qo_heads, num_kv_heads, head_dim, mask, packed_mask, causal,
            pos_encoding_mode, use_fp16_qk_reduction, logits_soft_cap, sm_scale, rope_scale, rope_theta, q_data_type,
            kv_data_type, o_data_type, non_blocking, block_mask,
        )  # fmt: skip
        self._planned = False
        self._prefill.plan(*args, **options)
        self._shape = (M, N, C)
        self._set_places(
            fi_pages=args[2], fi_page_begin=args[1], fi_page_size=C, fi_block_rows=R, fi_queries=M, fi_keys=N
        )
        self._planned = True

    begin_forward = plan

    def _arguments(
        self, op: str, indptr: Any, indices: Any, M: int, N: int, R: int, C: int, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, mask: Any = None, packed_mask: Any = None, causal: bool = False,
        pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False, logits_soft_cap: float | None = None,
        sm_scale: float | None = None, rope_scale: float | None = None, rope_theta: float | None = None,
        q_data_type: Any = "float16", kv_data_type: Any = None, o_data_type: Any = None, non_blocking: bool = True,
        block_mask: Any = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
        """Arguments of the prefill wrapper's plan."""
        if block_mask is not None:
            raise UnsupportedError(
                f"{op}: block_mask is not supported; VariableBlockSparseAttentionWrapper takes one for each kv head"
            )
        check_modes(op, pos_encoding_mode, num_qo_heads, num_kv_heads)
        R, C = as_sizes(op, R=R, C=C)
        if M % R or N % C:
            raise ArgumentError(f"{op}: M = {M} and N = {N}, expected multiples of the block size R = {R}, C = {C}")
        ptr, columns = read_ints(op, {"indptr": indptr, "indices": indices}).values()
        check_offsets(op, "indptr", ptr)
        if len(ptr) != M // R + 1 or ptr[0] != 0 or ptr[-1] > len(columns):
            raise ArgumentError(
                f"{op}: indptr has {len(ptr)} entries from {ptr[0]} to {ptr[-1]}, expected {M // R + 1} = M / R + 1 "
                f"from 0 to at most {len(columns)} = len(indices)"
            )
        columns = columns[: ptr[-1]]
        if len(columns) and (columns.min() < 0 or columns.max() >= N // C):
            raise ArgumentError(
                f"{op}: indices goes from {columns.min()} to {columns.max()}, expected 0 to {N // C - 1} = N / C - 1"
            )
        blocks = Blocks(np.repeat(np.arange(M // R), np.diff(ptr)), columns * C, np.full(len(columns), C))
        if has_duplicates(blocks):
            raise ArgumentError(f"{op}: indices names a key block twice in one block row, expected once")
        rows = Rows(np.arange(M // R) * R, np.full(M // R, R))
        options: dict[str, Any] = {}
        if mask is not None or packed_mask is not None:
            options = _element_mask(op, mask, packed_mask, ptr, blocks, rows, N - M if causal else None, R, C)
        elif causal:
            blocks, options = hide_future(blocks, rows, N - M)
        counts = np.bincount(blocks.row, minlength=M // R)
        options.update(
            use_fp16_qk_reduction=use_fp16_qk_reduction, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap,
            rope_scale=rope_scale, rope_theta=rope_theta, q_data_type=q_data_type, kv_data_type=kv_data_type,
            o_data_type=o_data_type, non_blocking=non_blocking,
        )  # fmt: skip
        table = (np.arange(M // R + 1) * R, offsets(counts), (blocks.start // C).astype(np.int32), np.full(M // R, C))
        return (*table, num_qo_heads, num_kv_heads, head_dim, C), options

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(float bytes, int bytes) that `plan` with these arguments needs; the wrapper owns the integer part."""
        made, options = self._arguments(f"{self._op}.workspace_size", *args, **kwargs)
        return self._prefill.workspace_size(*made, **options)

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        scale_q: Any = None,
        scale_k: Any = None,
        scale_v: Any = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        *args: Any,
        variant_args: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attention under the planned matrix; no synchronisation, and no allocation with `out` (and `lse`).

        Parameters
        ----------
        q : array, [M, num_qo_heads, head_dim]
        k, v : array, [N, num_kv_heads, head_dim]
            Tokens and heads may be strided.
        scale_q, scale_k, scale_v : float, or float32 array [heads], optional
            Dequantisation factors: the first two multiply `sm_scale`, the last the output.
        out : array, [M, num_qo_heads, head_dim], optional
        lse : float32 array, [M, num_qo_heads], contiguous, optional
            Base-2 log-sum-exp; -inf for rows without a visible key (whose output is 0).
        return_lse : bool
        enable_pdl : bool, optional
            As in `BatchPrefillWithPagedKVCacheWrapper.run`.
        *args, variant_args : optional
            The variant's tensors and scalars, in the order of their declaration, and by name.

        Returns
        -------
        out, or (out, lse) with `return_lse`

        Raises
        ------
        PlanError, ShapeError, DTypeError, LayoutError, DeviceError, UnsupportedError
        """
        op = f"{self._op}.run"
        if not self._planned:
            raise PlanError(f"{op}: plan() must come first")
        _, n, c = self._shape
        pages = []
        for name, x in (("k", k), ("v", v)):
            y = view(x, op, name)
            check_ndim(op, name, y, 3)
            if y.shape[0] != n:
                raise ShapeError(f"{op}: {name} has shape {y.shape}, expected ({n}, num_kv_heads, head_dim) = (N, ...)")
            pages.append(x.reshape(n // c, c, *y.shape[1:]))  # splits the first dimension: a view, whatever the strides
        return self._prefill.run(
            q, tuple(pages), q_scale=scale_q, k_scale=scale_k, v_scale=scale_v, out=out, lse=lse, return_lse=return_lse,
            enable_pdl=enable_pdl, **self._variant_args(op, args, variant_args),
        )  # fmt: skip

    run_return_lse = partialmethod(run, return_lse=True)


def _element_mask(
    op: str, mask: Any, packed_mask: Any, ptr: Ints, blocks: Blocks, rows: Rows, offset: int | None, r: int, c: int
) -> dict[str, Any]:
    """A mask inside the blocks as the prefill wrapper's argument, joined with causality where `offset` is given."""
    if packed_mask is not None:
        if offset is None:
            return {"packed_custom_mask": packed_mask}
        p = view(packed_mask, op, "packed_mask")
        check_dtype(op, "packed_mask", p, (uint8,))
        sizes = rows.length * keys_per_row(blocks, len(rows.length))
        need = int(((sizes + 7) // 8).sum())
        if p.ndim != 1 or p.shape[0] < need:
            raise ShapeError(f"{op}: packed_mask has shape {p.shape}, expected at least ({need},)")
        parts = reference.quantization.unpack_segments(p.host(), sizes)
        flat = np.concatenate([x.reshape(-1) for x in parts]).astype(bool) if len(parts) else np.zeros(0, bool)
    else:
        m = view(mask, op, "mask")
        check_shape(op, "mask", m, (int(ptr[-1]), r, c), "= (nnz, R, C)")
        flat = reference.sparse.convert_bsr_mask_layout(m.host().astype(bool), ptr)
    if offset is not None:
        flat = flat & causal_mask(blocks, rows, offset)
    return {"custom_mask": flat}
