"""Attention over keys that requests share level by level: each level is read once for all its queries, then merged.

``out = merge_i(attention(q, keys of level i))`` through the base-2 log-sum-exp of every level, see `fi_cupy.cascade`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partialmethod
from typing import Any

import numpy as np

from fi_cupy.arrays import View, view
from fi_cupy.checks import as_sizes
from fi_cupy.decode import BatchDecodeWithPagedKVCacheWrapper
from fi_cupy.dtypes import DType, float32
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, PlanError, ShapeError, UnsupportedError
from fi_cupy.page_table import Ints, check_offsets, read_ints
from fi_cupy.plan.decode import kv_lengths
from fi_cupy.prefill import BatchPrefillWithPagedKVCacheWrapper
from fi_cupy.shared_prefix import (
    BatchDecodeWithSharedPrefixPagedKVCacheWrapper,
    BatchPrefillWithSharedPrefixPagedKVCacheWrapper,
    merge_into,
)
from fi_cupy.variants import AttentionVariant, variant_of
from fi_cupy.variants_placed import check_mergeable
from fi_cupy.workspace import copy_to_device

__all__ = [
    "BatchDecodeWithSharedPrefixPagedKVCacheWrapper", "BatchPrefillWithSharedPrefixPagedKVCacheWrapper",
    "MultiLevelCascadeAttentionWrapper",
]  # fmt: skip

_OP = "MultiLevelCascadeAttentionWrapper"
#: (positional arguments, keyword arguments) of a level's `plan`.
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Level:
    """One level: the paged prefill wrapper, or the decode wrapper where every request has exactly one query."""

    def __init__(
        self, workspace: Any, kv_layout: str, buffers: tuple[Any, ...] | None, variant: AttentionVariant | None
    ) -> None:  # fmt: skip
        self._workspace, self._layout, self._buffers, self._variant = workspace, kv_layout, buffers, variant
        self._prefill: BatchPrefillWithPagedKVCacheWrapper | None = None
        self._decode: BatchDecodeWithPagedKVCacheWrapper | None = None
        self.uses_decode: bool | None = None  # in CUDA-graph mode what the first plan chose

    @property
    def wrapper(self) -> Any:
        """The wrapper of the chosen kernel family, made when first needed."""
        graph = self._buffers is not None
        if self.uses_decode:
            if self._decode is None:
                buffers = self._buffers[1:] if self._buffers is not None else ()
                self._decode = BatchDecodeWithPagedKVCacheWrapper(
                    self._workspace, self._layout, graph, True, *buffers, variant=self._variant
                )
            return self._decode
        if self._prefill is None:
            self._prefill = BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, self._layout, graph, *(self._buffers or ()), variant=self._variant
            )
        return self._prefill

    def reset(self, workspace: Any, int_workspace: Any) -> None:
        """Use another float workspace from the next plan on."""
        for wrapper in (self._prefill, self._decode):
            if wrapper is not None:
                wrapper.reset_workspace_buffer(workspace, int_workspace)
        self._workspace = workspace

    def choose(self, op: str, number: int, single_queries: bool) -> None:
        """Take the decode kernel for single queries; a captured graph keeps its first choice."""
        if self._buffers is not None and self.uses_decode not in (None, single_queries):
            if self.uses_decode:
                raise PlanError(
                    f"{op}: level {number} was first planned with one query a request, which a CUDA-graph wrapper keeps"
                )
            return  # the prefill kernel serves single queries as well
        self.uses_decode = single_queries

    def fill_qo_indptr(self, values: Ints) -> None:
        """CUDA-graph mode: the decode wrapper has no such buffer, but the caller may look at it."""
        if self._buffers is None or not self.uses_decode or self._buffers[0] is None:
            return
        b = view(self._buffers[0], _OP, "qo_indptr_buf")
        if b.shape[0] < len(values):
            raise ArgumentError(f"{_OP}.plan: qo_indptr_buf has {b.shape[0]} entries, expected {len(values)}")
        if b.is_cpu:
            b.numpy()[: len(values)] = values
        else:
            copy_to_device(b.ptr, values.astype(np.int32), b.stream(), b.device)


class MultiLevelCascadeAttentionWrapper:
    """Attention of queries over several levels of paged keys, the first shared by the most requests.

    The sequence of a query is the keys of its request on level 0, then those on level 1, and so on; the last level
    usually holds one request's own keys. A level where every request has one query runs the decode kernel, any other
    the paged prefill kernel; the levels follow each other on the caller's stream.

    Parameters
    ----------
    num_levels : int
    float_workspace_buffer : array
        Scratch memory that all levels share, of any dtype, contiguous. A CPU array selects the NumPy reference.
    kv_layout : "NHD" or "HND"
    use_cuda_graph : bool
        Keep every address and grid fixed so that a captured `run` follows later plans.
    qo_indptr_buf_arr, paged_kv_indptr_buf_arr, paged_kv_indices_buf_arr, paged_kv_last_page_len_buf_arr
        CUDA-graph mode: for each of the arguments of `plan` one int32 array a level.
    variant : AttentionVariant, optional
        See `fi_cupy.jit.define_variant`. With more than one level it must be one that parts can be merged of: softmax,
        no `post_process_fn`, and functions that look at heads and values but not at positions.

    Source
    ------
    flashinfer.cascade.MultiLevelCascadeAttentionWrapper; Juravsky et al. 2024 (arXiv:2402.05099).

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.MultiLevelCascadeAttentionWrapper(2, np.empty(1 << 20, np.uint8))
    >>> wrapper.plan([[0, 3], [0, 1, 2, 3]], [[0, 2], [0, 1, 2, 3]], [[4, 5], [0, 1, 2]], [[16], [3, 1, 9]],
    ...              8, 2, 64, 16, q_data_type="float32")           # 32 shared keys, then 3, 1 and 9 of a request's own
    >>> q, cache = np.ones((3, 8, 64), np.float32), np.ones((6, 2, 16, 2, 64), np.float32)
    >>> wrapper.run(q, cache).shape
    (3, 8, 64)
    """

    def __init__(
        self,
        num_levels: int,
        float_workspace_buffer: Any,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf_arr: Sequence[Any] | None = None,
        paged_kv_indptr_buf_arr: Sequence[Any] | None = None,
        paged_kv_indices_buf_arr: Sequence[Any] | None = None,
        paged_kv_last_page_len_buf_arr: Sequence[Any] | None = None,
        *,
        variant: AttentionVariant | None = None,
    ) -> None:
        if num_levels < 1:
            raise ArgumentError(f"{_OP}: num_levels is {num_levels}, expected at least 1")
        variant = variant_of(_OP, variant, None, None)
        if num_levels > 1:
            check_mergeable(_OP, variant)
        buffers: list[tuple[Any, ...] | None] = [None] * num_levels
        if use_cuda_graph:
            given = {
                "qo_indptr_buf_arr": qo_indptr_buf_arr, "paged_kv_indptr_buf_arr": paged_kv_indptr_buf_arr,
                "paged_kv_indices_buf_arr": paged_kv_indices_buf_arr,
                "paged_kv_last_page_len_buf_arr": paged_kv_last_page_len_buf_arr,
            }  # fmt: skip
            for name, arrays in given.items():
                _check_levels(_OP, name, arrays or (), num_levels)
            buffers = list(zip(*(arrays or () for arrays in given.values()), strict=True))
        self._graph = use_cuda_graph
        self._levels = [_Level(float_workspace_buffer, kv_layout, b, variant) for b in buffers]
        self._workspace: View = self._levels[-1].wrapper._workspace  # made now, so that its arguments are checked now
        self._rows: int | None = None
        self._scratch: tuple[Any, Any, Any] | None = None  # a level's out and lse, and the lse of the result
        self._scratch_key: tuple[Any, ...] = ()
        self._kept: list[Any] = []  # outgrown scratch that queued work may still use

    @property
    def is_cuda_graph_enabled(self) -> bool:
        """Whether the wrapper keeps addresses and grids fixed."""
        return self._graph

    def reset_workspace_buffer(
        self, float_workspace_buffer: Any, int_workspace_buffers: Sequence[Any] | None = None
    ) -> None:
        """Use another scratch buffer from the next `plan` on; the wrapper owns its integer buffers."""
        others = int_workspace_buffers or [None] * len(self._levels)
        _check_levels(f"{_OP}.reset_workspace_buffer", "int_workspace_buffers", others, len(self._levels))
        for level, other in zip(self._levels, others, strict=True):
            level.reset(float_workspace_buffer, other)
        self._workspace = self._levels[-1].wrapper._workspace
        self._rows = None

    def plan(
        self,
        qo_indptr_arr: Sequence[Any],
        paged_kv_indptr_arr: Sequence[Any],
        paged_kv_indices_arr: Sequence[Any],
        paged_kv_last_page_len: Sequence[Any],
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        *,
        non_blocking: bool = True,
        fixed_split_size: int | Sequence[int | None] | None = None,
        disable_split_kv: bool = False,
    ) -> None:
        """Make the schedules of all levels and send them to the GPU.

        Parameters
        ----------
        qo_indptr_arr : list of int [requests of the level + 1]
            Which queries share each request of the level; all end at the number of queries.
        paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len : lists
            The page table of each level, as in `BatchPrefillWithPagedKVCacheWrapper.plan`.
        num_qo_heads, num_kv_heads, head_dim, page_size : int
        causal : bool
            On the last level only: the levels before it hold what comes before every query.
        pos_encoding_mode : "NONE"
            With one level also the others. More levels know no position in the whole sequence: apply
            `fi_cupy.rope` to q and to the keys before they enter the cache.
        use_fp16_qk_reduction : bool
            A hint that FlashInfer takes for speed; products are summed in fp32 here.
        sm_scale, logits_soft_cap, rope_scale, rope_theta, q_data_type, kv_data_type, non_blocking
            As in `BatchPrefillWithPagedKVCacheWrapper.plan`.
        window_left : int
            Keys to the left of the query's own, in the whole sequence, that are seen; -1: all. Levels before the last
            that it cuts take a custom mask of ``queries * keys`` bits, made here on the host.
        fixed_split_size, disable_split_kv
            As in `BatchPrefillWithPagedKVCacheWrapper.plan`, for each level; a sequence of sizes has one a level.

        Raises
        ------
        ArgumentError, ShapeError, DTypeError, WorkspaceError, UnsupportedError, PlanError
        """
        op = f"{_OP}.plan"
        num_qo_heads, head_dim = as_sizes(op, num_qo_heads=num_qo_heads, head_dim=head_dim)
        qo, arguments = self._arguments(
            op, qo_indptr_arr, paged_kv_indptr_arr, paged_kv_indices_arr, paged_kv_last_page_len, num_qo_heads,
            num_kv_heads, head_dim, page_size, causal, pos_encoding_mode, use_fp16_qk_reduction, sm_scale, window_left,
            logits_soft_cap, rope_scale, rope_theta, q_data_type, kv_data_type, non_blocking=non_blocking,
            fixed_split_size=fixed_split_size, disable_split_kv=disable_split_kv,
        )  # fmt: skip
        self._rows = None
        self._reserve(op, int(qo[0][-1]), num_qo_heads, head_dim, to_dtype(q_data_type))
        for level, (args, options), qo_indptr in zip(self._levels, arguments, qo, strict=True):
            level.wrapper.plan(*args, **options)
            level.fill_qo_indptr(qo_indptr)
        self._rows = int(qo[0][-1])

    begin_forward = plan

    def _arguments(
        self, op: str, qo_indptr_arr: Sequence[Any], kv_indptr_arr: Sequence[Any], kv_indices_arr: Sequence[Any],
        last_page_len_arr: Sequence[Any], num_qo_heads: int, num_kv_heads: int, head_dim: int, page_size: int,
        causal: bool = False, pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None, window_left: int = -1, logits_soft_cap: float | None = None,
        rope_scale: float | None = None, rope_theta: float | None = None, q_data_type: Any = "float16",
        kv_data_type: Any = None, **common: Any,
    ) -> tuple[list[Ints], list[_Arguments]]:  # fmt: skip
        """(offsets of the queries, arguments of the plan) of every level; chooses each level's kernel."""
        count = len(self._levels)
        tables = {
            "qo_indptr_arr": qo_indptr_arr, "paged_kv_indptr_arr": kv_indptr_arr,
            "paged_kv_indices_arr": kv_indices_arr, "paged_kv_last_page_len": last_page_len_arr,
        }  # fmt: skip
        for name, arrays in tables.items():
            _check_levels(op, name, arrays, count)
        splits = common.get("fixed_split_size")
        if not isinstance(splits, Sequence):
            splits = [splits] * count
        _check_levels(op, "fixed_split_size", splits, count)
        if count > 1 and pos_encoding_mode != "NONE":
            raise UnsupportedError(
                f"{op}: pos_encoding_mode is {pos_encoding_mode!r}, expected 'NONE': a level does not know positions "
                "in the whole sequence; rotate q and k with fi_cupy.rope before they enter the cache"
            )
        if count > 1 and window_left >= 0 and self._graph:
            raise UnsupportedError(
                f"{op}: window_left is {window_left}, expected -1 with use_cuda_graph=True and more than one level "
                "(levels cut by a window take masks, which a captured graph cannot gain or lose)"
            )
        del tables["paged_kv_indices_arr"]
        named = {f"{name}[{i}]": x for name, arrays in tables.items() for i, x in enumerate(arrays)}
        read = list(read_ints(op, named).values())  # of all levels at once
        qo, kv_indptr, last = read[:count], read[count : 2 * count], read[2 * count :]
        _check_queries(op, qo)
        masks: list[Ints | None] = [None] * count
        if window_left >= 0 and count > 1:
            masks = _window_masks(qo, [kv_lengths(i, n, page_size) for i, n in zip(kv_indptr, last, strict=True)],
                                  window_left)  # fmt: skip
        common.update(
            pos_encoding_mode=pos_encoding_mode, sm_scale=sm_scale, logits_soft_cap=logits_soft_cap,
            rope_scale=rope_scale, rope_theta=rope_theta, q_data_type=q_data_type, kv_data_type=kv_data_type,
        )  # fmt: skip
        arguments: list[_Arguments] = []
        for i, level in enumerate(self._levels):
            level.choose(op, i, masks[i] is None and bool((np.diff(qo[i]) == 1).all()))
            is_last = i == count - 1
            options = {**common, "window_left": window_left if is_last else -1, "fixed_split_size": splits[i]}
            args: tuple[Any, ...] = (
                kv_indptr[i],
                kv_indices_arr[i],
                last[i],
                num_qo_heads,
                num_kv_heads,
                head_dim,
                page_size,
            )
            if not level.uses_decode:
                args = (qo[i], *args)
                options.update(causal=causal and is_last, use_fp16_qk_reduction=use_fp16_qk_reduction)
                if masks[i] is not None:
                    options["custom_mask"] = masks[i]
            arguments.append((args, options))
        return qo, arguments

    def _reserve(self, op: str, rows: int, heads: int, head_dim: int, dtype: DType) -> None:
        """Scratch for one level's result and for the log-sum-exp of the whole, at an address that stays."""
        if self._workspace.is_cpu or len(self._levels) == 1:
            return
        key = (self._workspace.device, heads, head_dim, dtype)
        if self._scratch is not None and self._scratch_key == key and self._scratch[0].shape[0] >= rows:
            return
        if self._scratch is not None:
            if self._graph:
                raise PlanError(
                    f"{op}: {rows} queries of {heads} heads exceed the first plan's; give the first plan as many "
                    "queries as any later one has (make another wrapper for other sizes)"
                )
            self._kept.append(self._scratch)
            if self._scratch_key == key:
                rows = max(rows, 2 * self._scratch[0].shape[0])
        w = self._workspace
        self._scratch = (
            w.empty((rows, heads, head_dim), dtype).result(), w.empty((rows, heads), float32).result(),
            w.empty((rows, heads), float32).result(),
        )  # fmt: skip
        self._scratch_key = key

    def workspace_size(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        """(float bytes, int bytes) that `plan` with these arguments needs; the wrapper owns the integer part."""
        op = f"{_OP}.workspace_size"
        chosen = [level.uses_decode for level in self._levels]
        try:
            _, arguments = self._arguments(op, *args, **kwargs)
            sizes = [x.wrapper.workspace_size(*a, **o) for x, (a, o) in zip(self._levels, arguments, strict=True)]
        finally:
            for level, before in zip(self._levels, chosen, strict=True):
                level.uses_decode = before
        return max(size[0] for size in sizes), sum(size[1] for size in sizes)

    def run(
        self,
        q: Any,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        variant_args: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attention over all levels; no synchronisation, and no allocation with `out`.

        Parameters
        ----------
        q : array, [queries, num_qo_heads, head_dim]
            CUDA-graph mode takes more rows, too; those past the plan are neither read nor written.
        paged_kv_cache : array, or (keys, values)
            One cache for all levels, see `BatchPrefillWithPagedKVCacheWrapper.run`.
        q_scale, k_scale, v_scale, enable_pdl
            As in `BatchPrefillWithPagedKVCacheWrapper.run`.
        out : array, [queries, num_qo_heads, head_dim], optional
        lse : float32 array, [queries, num_qo_heads], contiguous, optional
            Base-2 log-sum-exp over all levels.
        return_lse : bool
        *args, variant_args : optional
            The variant's tensors and scalars, in the order of their declaration, and by name.

        Returns
        -------
        out, or (out, lse) with `return_lse`

        Raises
        ------
        PlanError, ShapeError, DTypeError, LayoutError, DeviceError, UnsupportedError
        """
        op, rows = f"{_OP}.run", self._rows
        if rows is None:
            raise PlanError(f"{op}: plan() must come first")
        x = view(q, op, "q")
        if x.ndim != 3 or x.shape[0] != rows:
            if x.ndim != 3 or x.shape[0] < rows or not self._graph:
                raise ShapeError(f"{op}: q has shape {x.shape}, expected ({rows}, num_qo_heads, head_dim) of the plan")
            q, out, lse = (None if a is None else a[:rows] for a in (q, out, lse))
        options = {
            "q_scale": q_scale, "k_scale": k_scale, "v_scale": v_scale, "enable_pdl": enable_pdl,
            "variant_args": variant_args,
        }  # fmt: skip
        last, before = self._levels[-1].wrapper, self._levels[:-1]
        if not before:
            return last.run(q, paged_kv_cache, *args, out=out, lse=lse, return_lse=return_lse, **options)
        part_out = part_lse = total_lse = None
        if self._scratch is not None:
            part_out, part_lse, total_lse = (a if a.shape[0] == rows else a[:rows] for a in self._scratch)
        if lse is None and not return_lse:
            lse = total_lse
        o, s = last.run(q, paged_kv_cache, *args, out=out, lse=lse, return_lse=True, **options)
        for level in before:
            o_i, s_i = level.wrapper.run(
                q, paged_kv_cache, *args, out=part_out, lse=part_lse, return_lse=True, **options
            )
            o, s = merge_into(x.framework, o, s, o_i, s_i)
        return (o, s) if return_lse else o

    run_return_lse = partialmethod(run, return_lse=True)
    forward = run
    forward_return_lse = partialmethod(run, return_lse=True)

    def end_forward(self) -> None:
        """Kept for FlashInfer's signature; there is nothing to release."""

    def _parts(self) -> list[tuple[str, Any]]:
        """What `fi_cupy.attention.explain` looks into."""
        return [(f"level {i}", level.wrapper) for i, level in enumerate(self._levels)]


def _check_levels(op: str, name: str, arrays: Sequence[Any], count: int) -> None:
    if len(arrays) != count:
        raise ArgumentError(f"{op}: {name} has {len(arrays)} entries, expected {count} = num_levels")


def _check_queries(op: str, qo: list[Ints]) -> None:
    """Every level must divide the same queries among its requests."""
    for i, indptr in enumerate(qo):
        check_offsets(op, f"qo_indptr_arr[{i}]", indptr)
        if indptr[0] != 0 or indptr[-1] != qo[0][-1]:
            raise ArgumentError(
                f"{op}: qo_indptr_arr[{i}] goes from {indptr[0]} to {indptr[-1]}, expected 0 to {qo[0][-1]} "
                "like level 0"
            )


def _window_masks(qo: list[Ints], kv_len: list[Ints], window_left: int) -> list[Ints | None]:
    """Custom masks of the levels before the last that the window cuts; None where it hides nothing.

    A query sees key j of level i if at most `window_left` keys of the whole sequence lie between it and the query's
    own: ``j >= kv_len_i + (keys of later levels) - 1 - (queries behind it) - window_left``.
    """
    owner = [np.repeat(np.arange(len(x) - 1), np.diff(x)) for x in qo]
    last = len(qo) - 1
    behind = qo[last][owner[last] + 1] - 1 - np.arange(len(owner[last]))
    later = kv_len[last][owner[last]]
    masks: list[Ints | None] = [None] * len(qo)
    for i in range(last - 1, -1, -1):
        keys = kv_len[i][owner[i]]
        first = keys + later - 1 - behind - window_left
        if (np.minimum(first, keys) > 0).any():
            parts = [
                (np.arange(n) >= first[a:b, None]).reshape(-1)
                for n, a, b in zip(kv_len[i].tolist(), qo[i][:-1].tolist(), qo[i][1:].tolist(), strict=True)
            ]
            masks[i] = np.concatenate(parts)
        later = later + keys
    return masks
