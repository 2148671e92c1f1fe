"""Block-sparse attention with blocks of any sizes, chosen for each kv head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partialmethod
from typing import Any

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import check_device, check_dtype, check_ndim, check_shape
from fi_cupy.dtypes import INDEX_TYPES, bool_, float32, uint8
from fi_cupy.errors import ArgumentError, PlanError, ShapeError
from fi_cupy.page_table import host_values
from fi_cupy.plan.sparse import Blocks, Rows, expand, keys_per_row, offsets
from fi_cupy.sparse_common import BlockSparse, check_modes, hide_future
from fi_cupy.variants_placed import Places
from fi_cupy.workspace import device_of

#: The matrix' own indices, found from the kernel's: a block row is a request, the blocks it sees are its pages.
_PLACES: Places = {
    "batch": lambda ctx: ctx.batch * 0,
    "kv_head": lambda ctx: ctx.batch // ctx.fi_row_blocks,
    "qo_head": lambda ctx: ctx.batch // ctx.fi_row_blocks * ctx.fi_group + ctx.qo_head,
    "qo_idx": lambda ctx: ctx.fi_row_begin[ctx.batch] + ctx.qo_idx,
    "kv_idx": lambda ctx: (
        ctx.fi_pages[ctx.fi_page_begin[ctx.batch] + ctx.kv_idx // ctx.fi_page_size] * ctx.fi_page_size
        + ctx.kv_idx % ctx.fi_page_size
        - ctx.batch // ctx.fi_row_blocks * ctx.fi_keys
    ),
    "qo_len": lambda ctx: ctx.fi_queries,
    "kv_len": lambda ctx: ctx.fi_keys,
}


class VariableBlockSparseAttentionWrapper(BlockSparse):
    """Attention under a block mask with blocks of any sizes, both for each kv head; heads come first.

    Keys are read in pages of the greatest size that divides all blocks of keys, so sizes that are multiples of 8 or
    more keep the page table short. Queries that share a kv head take a copy of q and of the output (as one head
    a kv head does not).

    Parameters
    ----------
    float_workspace_buffer : array
        As in `BatchPrefillWithPagedKVCacheWrapper`. A CPU array selects the NumPy reference.
    backend : "auto", "fa2" (the portable kernel) or "fa3" (the Hopper kernel; UnsupportedError where it does not fit)
        There is one implementation.
    variant : AttentionVariant, optional
        See `fi_cupy.jit.define_variant`. Its functions see heads and positions of the whole arrays. CUDA text must not
        look at them.

    Source
    ------
    flashinfer.sparse.VariableBlockSparseAttentionWrapper.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.VariableBlockSparseAttentionWrapper(np.empty(1 << 20, np.uint8))
    >>> mask = np.array([[[True, False], [True, True]]] * 2)                            # [kv heads, row, column blocks]
    >>> wrapper.plan(mask, np.array([[3, 5]] * 2), np.array([[7, 9]] * 2), 4, 2, 64, q_data_type="float32")
    >>> q, k = np.ones((4, 8, 64), np.float32), np.ones((2, 16, 64), np.float32)
    >>> wrapper.run(q, k, k).shape
    (4, 8, 64)
    """

    _op = "VariableBlockSparseAttentionWrapper"
    _places = _PLACES
    _place_tensors = ("fi_pages", "fi_page_begin", "fi_row_begin")
    _place_scalars = ("fi_page_size", "fi_row_blocks", "fi_group", "fi_queries", "fi_keys")

    def plan(
        self,
        block_mask_map: Any,
        block_row_sz: Any,
        block_col_sz: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> None:
        """Turn the blocks into a page table and make the schedule.

        Parameters
        ----------
        block_mask_map : bool [num_kv_heads, row blocks, column blocks]
            True = the block of keys is seen by the block of queries. Host arrays cost no synchronisation.
        block_row_sz : int [num_kv_heads, row blocks]
            Queries of each block; every head's sum is qo_len.
        block_col_sz : int [num_kv_heads, column blocks]
            Keys of each block; every head's sum is kv_len.
        num_qo_heads, num_kv_heads, head_dim : int
        causal : bool
            Query i sees keys up to ``kv_len - qo_len + i`` of its blocks.
        pos_encoding_mode : "NONE"
        use_fp16_qk_reduction : bool
            A hint that FlashInfer takes for speed; products are summed in fp32 here.
        logits_soft_cap, sm_scale, rope_scale, rope_theta, non_blocking, q_data_type, kv_data_type
            As in `BatchPrefillWithPagedKVCacheWrapper.plan`.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, WorkspaceError, UnsupportedError, PlanError
        """
        op = f"{self._op}.plan"
        shape, args, options = self._arguments(
            op, block_mask_map, block_row_sz, block_col_sz, num_qo_heads, num_kv_heads, head_dim, causal,
            pos_encoding_mode, use_fp16_qk_reduction, logits_soft_cap, sm_scale, rope_scale, rope_theta, non_blocking,
            q_data_type, kv_data_type,
        )  # fmt: skip
        self._planned = False
        self._prefill.plan(*args, **options)
        self._shape = shape
        heads, group, qo_len, kv_len, _, page = shape
        blocks = (len(args[0]) - 1) // heads
        row_begin = args[0][:-1] - np.arange(heads * blocks) // max(blocks, 1) * qo_len
        self._set_places(
            fi_pages=args[2], fi_page_begin=args[1], fi_row_begin=row_begin,
            fi_page_size=page, fi_row_blocks=blocks, fi_group=group, fi_queries=qo_len, fi_keys=kv_len,
        )  # fmt: skip
        self._planned = True

    begin_forward = plan

    def _arguments(
        self, op: str, block_mask_map: Any, block_row_sz: Any, block_col_sz: Any, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, causal: bool = False, pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None, sm_scale: float | None = None, rope_scale: float | None = None,
        rope_theta: float | None = None, non_blocking: bool = True, q_data_type: Any = "float16",
        kv_data_type: Any = None,
    ) -> tuple[tuple[int, ...], tuple[Any, ...], dict[str, Any]]:  # fmt: skip
        """((kv heads, group, qo_len, kv_len, head_dim, page size), arguments of the prefill wrapper's plan)."""
        check_modes(op, pos_encoding_mode, num_qo_heads, num_kv_heads)
        arrays = (
            _view(op, "block_mask_map", block_mask_map, 3), _view(op, "block_row_sz", block_row_sz, 2),
            _view(op, "block_col_sz", block_col_sz, 2),
        )  # fmt: skip
        seen, row_sz, col_sz = host_values(arrays)
        seen, row_sz, col_sz = seen.astype(bool), row_sz.astype(np.int64), col_sz.astype(np.int64)
        heads, mb, nb = seen.shape
        for name, sizes, blocks_of in (("block_row_sz", row_sz, mb), ("block_col_sz", col_sz, nb)):
            if heads != num_kv_heads or sizes.shape != (num_kv_heads, blocks_of):
                raise ShapeError(
                    f"{op}: block_mask_map has shape {seen.shape} and {name} {sizes.shape}, expected ({num_kv_heads}, "
                    f"{mb}, {nb}) and ({num_kv_heads}, {blocks_of})"
                )
            if (sizes < 0).any() or (sizes.sum(1) != sizes[:1].sum()).any():
                raise ArgumentError(f"{op}: {name} sums to {sizes.sum(1).tolist()}, expected one sum for every kv head")
        qo_len, kv_len = int(row_sz[0].sum()), int(col_sz[0].sum())
        page = int(np.gcd.reduce(col_sz, axis=None)) or 1
        head, i, j = np.nonzero(seen & (col_sz > 0)[:, None])
        blocks = Blocks(head * mb + i, (np.cumsum(col_sz, 1) - col_sz)[head, j], col_sz[head, j])
        rows = Rows((np.cumsum(row_sz, 1) - row_sz).reshape(-1), row_sz.reshape(-1))
        options: dict[str, Any] = {}
        if causal:
            blocks, options = hide_future(blocks, rows, kv_len - qo_len)
        first_page = (blocks.row // max(mb, 1) * kv_len + blocks.start) // page
        table = (
            offsets(rows.length), offsets(keys_per_row(blocks, heads * mb) // page),
            expand(first_page, blocks.length // page).astype(np.int32), np.full(heads * mb, page),
        )  # fmt: skip
        options.update(
            use_fp16_qk_reduction=use_fp16_qk_reduction, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap,
            rope_scale=rope_scale, rope_theta=rope_theta, q_data_type=q_data_type, kv_data_type=kv_data_type,
            non_blocking=non_blocking,
        )  # fmt: skip
        group = num_qo_heads // num_kv_heads
        return (heads, group, qo_len, kv_len, head_dim, page), (*table, group, 1, head_dim, page), options

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(float bytes, int bytes) that `plan` with these arguments needs; the wrapper owns the integer part."""
        _, made, options = self._arguments(f"{self._op}.workspace_size", *args, **kwargs)
        return self._prefill.workspace_size(*made, **options)

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        *args: Any,
        variant_args: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attention under the planned blocks; no synchronisation.

        Parameters
        ----------
        q : array, [num_qo_heads, qo_len, head_dim]
        k, v : array, [num_kv_heads, kv_len, head_dim]
            Contiguous, or they are copied.
        out : array, [num_qo_heads, qo_len, head_dim], optional
            Written in place where it is contiguous and every kv head has one query head, else through a copy.
        lse : float32 array, [num_qo_heads, qo_len], optional
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
        x = view(q, op, "q")
        with device_of(x):  # where CuPy puts the copies
            made = self._run(
                op, q, x, k, v, out, lse, return_lse, enable_pdl, self._variant_args(op, args, variant_args)
            )
        return made if return_lse else made[0]

    run_return_lse = partialmethod(run, return_lse=True)

    def _run(
        self, op: str, q: Any, x: View, k: Any, v: Any, out: Any, lse: Any, return_lse: bool, enable_pdl: bool | None,
        variant_args: dict[str, Any],
    ) -> tuple[Any, ...]:  # fmt: skip
        heads, group, qo_len, kv_len, dim, page = self._shape
        check_shape(op, "q", x, (heads * group, qo_len, dim), "= (num_qo_heads, qo_len, head_dim)")
        pages = []
        for name, y in (("k", k), ("v", v)):
            check_shape(op, name, view(y, op, name), (heads, kv_len, dim), "= (num_kv_heads, kv_len, head_dim)")
            pages.append(y.reshape(heads * kv_len // page, page, 1, dim))
        wants_lse = return_lse or lse is not None
        targets = []
        for name, given, shape in (
            ("out", out, (heads * group, qo_len, dim)), ("lse", lse, (heads * group, qo_len))
        ):  # fmt: skip
            if given is None:
                targets.append((None, False))
                continue
            o = view(given, op, name).writable(op, name)
            check_shape(op, name, o, shape)
            check_dtype(op, name, o, (x.dtype if name == "out" else float32,))
            check_device(op, x, **{name: o})
            targets.append((given, group == 1 and o.contiguous))
        made = self._prefill.run(
            self._rows_first(q), tuple(pages), return_lse=wants_lse, enable_pdl=enable_pdl,
            out=self._rows_first(out) if targets[0][1] else None, lse=self._rows_first(lse) if targets[1][1] else None,
            **variant_args,
        )  # fmt: skip
        results = made if wants_lse else (made,)
        final = []
        for result, (given, in_place) in zip(results, targets, strict=False):
            if given is None:
                final.append(self._heads_first(result))
                continue
            if not in_place:
                given[...] = self._heads_first(result)
            final.append(given)
        return tuple(final)

    def _rows_first(self, x: Any) -> Any:
        """``[qo heads, qo_len, ...]`` as ``[kv heads * qo_len, group, ...]``: a view where group is 1."""
        heads, group, qo_len = self._shape[:3]
        tail = tuple(x.shape[2:])
        if group == 1:
            return x.reshape(heads * qo_len, 1, *tail)
        return x.reshape(heads, group, qo_len, *tail).swapaxes(1, 2).reshape(heads * qo_len, group, *tail)

    def _heads_first(self, x: Any) -> Any:
        """The inverse of `_rows_first`."""
        heads, group, qo_len = self._shape[:3]
        tail = tuple(x.shape[2:])
        if group == 1:
            return x.reshape(heads, qo_len, *tail)
        return x.reshape(heads, qo_len, group, *tail).swapaxes(1, 2).reshape(heads * group, qo_len, *tail)


def _view(op: str, name: str, x: Any, ndim: int) -> View:
    """A small array of any framework: bool, uint8 or an index type."""
    v = view(np.asarray(x) if isinstance(x, (list, tuple)) else x, op, name)
    check_ndim(op, name, v, ndim)
    check_dtype(op, name, v, (bool_, uint8, *INDEX_TYPES))
    return v
