"""Attention over a prefix of contiguous keys that all queries share, and each request's own paged keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partialmethod
from typing import Any

from fi_cupy.arrays import view
from fi_cupy.cascade import merge_state, merge_state_in_place
from fi_cupy.decode import BatchDecodeWithPagedKVCacheWrapper
from fi_cupy.errors import PlanError, UnsupportedError
from fi_cupy.prefill import BatchPrefillWithPagedKVCacheWrapper, single_prefill_with_kv_cache
from fi_cupy.variants import AttentionVariant, variant_of
from fi_cupy.variants_placed import check_mergeable


def merge_into(framework: str, v: Any, s: Any, v_other: Any, s_other: Any) -> tuple[Any, Any]:
    """The first state with the second merged into it; JAX arrays cannot be overwritten."""
    if framework == "jax":
        return merge_state(v, s, v_other, s_other)
    merge_state_in_place(v, s, v_other, s_other)
    return v, s


class _SharedPrefix:
    """One prefix of contiguous keys that every query sees, and paged keys of each request's own."""

    _op = ""

    def __init__(self, kv_layout: str, variant: AttentionVariant | None) -> None:
        self._layout = kv_layout
        self._variant: AttentionVariant | None = variant_of(self._op, variant, None, None)
        check_mergeable(self._op, self._variant)
        self._head_dim: int | None = None

    def _forward(
        self, unique: Any, q: Any, k_shared: Any, v_shared: Any, unique_kv_cache: Any, sm_scale: float | None,
        rope_scale: float | None, rope_theta: float | None, out: Any, return_lse: bool,
        variant_args: Mapping[str, Any] | None,
    ) -> Any:  # fmt: skip
        op = f"{self._op}.forward"
        if self._head_dim is None:
            raise PlanError(f"{op}: begin_forward() must come first")
        if rope_scale is not None or rope_theta is not None:
            raise UnsupportedError(
                f"{op}: rope_scale and rope_theta have no meaning here, as nothing is rotated inside; rotate q and k "
                "with fi_cupy.rope before they enter the caches"
            )
        # The plan has the default scale; another one comes as a factor on it.
        q_scale = None if sm_scale is None else sm_scale * math.sqrt(self._head_dim)
        o, s = unique.run(q, unique_kv_cache, q_scale=q_scale, out=out, return_lse=True, variant_args=variant_args)
        shared = single_prefill_with_kv_cache(
            q, k_shared, v_shared, kv_layout=self._layout, sm_scale=sm_scale, return_lse=True, variant=self._variant,
            variant_args=((), variant_args or {}),
        )  # fmt: skip
        o, s = merge_into(view(q, op, "q").framework, o, s, *shared)
        return (o, s) if return_lse else o

    def end_forward(self) -> None:
        """Kept for FlashInfer's signature; there is nothing to release."""


class BatchDecodeWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Decode attention over one shared prefix of contiguous keys and each request's own paged keys.

    The older form of a cascade of two levels; `MultiLevelCascadeAttentionWrapper` has more options and CUDA graphs.

    Parameters
    ----------
    float_workspace_buffer : array
        As in `BatchDecodeWithPagedKVCacheWrapper`.
    kv_layout : "NHD" or "HND"
        Of the paged cache and of the shared keys.
    variant : AttentionVariant, optional
        As in `MultiLevelCascadeAttentionWrapper` with two levels.

    Source
    ------
    flashinfer.cascade.BatchDecodeWithSharedPrefixPagedKVCacheWrapper.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.BatchDecodeWithSharedPrefixPagedKVCacheWrapper(np.empty(1 << 20, np.uint8))
    >>> wrapper.begin_forward([0, 1, 2], [0, 1], [3, 9], 8, 2, 64, 16, data_type="float32")
    >>> q, shared = np.ones((2, 8, 64), np.float32), np.ones((100, 2, 64), np.float32)
    >>> wrapper.forward(q, shared, shared, np.ones((2, 2, 16, 2, 64), np.float32)).shape
    (2, 8, 64)
    """

    _op = "BatchDecodeWithSharedPrefixPagedKVCacheWrapper"

    def __init__(
        self, float_workspace_buffer: Any, kv_layout: str = "NHD", *, variant: AttentionVariant | None = None
    ) -> None:
        super().__init__(kv_layout, variant)
        self._unique = BatchDecodeWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, variant=variant)

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another scratch buffer from the next `begin_forward` on."""
        self._unique.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)
        self._head_dim = None

    def begin_forward(
        self,
        unique_kv_indptr: Any,
        unique_kv_indices: Any,
        unique_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        data_type: Any = "float16",
    ) -> None:
        """Make the schedule of the requests' own keys, see `BatchDecodeWithPagedKVCacheWrapper.plan`.

        `data_type` is that of q, of the shared keys and of the cache.
        """
        self._unique.plan(
            unique_kv_indptr, unique_kv_indices, unique_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim,
            page_size, q_data_type=data_type, kv_data_type=data_type,
        )  # fmt: skip
        self._head_dim = head_dim

    plan = begin_forward

    def workspace_size(self, *args: Any, data_type: Any = "float16") -> tuple[int, int]:
        """(float bytes, int bytes) that `begin_forward` with these arguments needs."""
        *table, kind = args if len(args) == 8 else (*args, data_type)
        return self._unique.workspace_size(*table, q_data_type=kind, kv_data_type=kind)

    def forward(
        self,
        q: Any,
        k_shared: Any,
        v_shared: Any,
        unique_kv_cache: Any,
        allow_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        out: Any = None,
        return_lse: bool = False,
        variant_args: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attention of every request's query over the shared and its own keys.

        Parameters
        ----------
        q : array, [batch, num_qo_heads, head_dim]
        k_shared, v_shared : array, [shared_len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, shared_len, head_dim]
        unique_kv_cache : array, or (keys, values)
            See `BatchDecodeWithPagedKVCacheWrapper.run`.
        allow_fp16_qk_reduction : bool
            A hint; products are summed in fp32.
        sm_scale : float, optional
            Default ``1 / sqrt(head_dim)``.
        rope_scale, rope_theta : None
            Nothing is rotated inside.
        out : array, optional
        return_lse : bool
        variant_args : mapping, optional
            The variant's tensors and scalars by name.

        Returns
        -------
        out, or (out, lse) with `return_lse`
        """
        return self._forward(
            self._unique, q, k_shared, v_shared, unique_kv_cache, sm_scale, rope_scale, rope_theta, out, return_lse,
            variant_args,
        )  # fmt: skip

    run = forward
    run_return_lse = forward_return_lse = partialmethod(forward, return_lse=True)

    def _parts(self) -> list[tuple[str, Any]]:
        return [("each request's own keys", self._unique)]


class BatchPrefillWithSharedPrefixPagedKVCacheWrapper(_SharedPrefix):
    """Prefill attention over one shared prefix of contiguous keys and each request's own paged keys.

    The older form of a cascade of two levels; `MultiLevelCascadeAttentionWrapper` has more options and CUDA graphs.

    Parameters
    ----------
    float_workspace_buffer : array
        As in `BatchPrefillWithPagedKVCacheWrapper`.
    kv_layout : "NHD" or "HND"
        Of the paged cache and of the shared keys.
    variant : AttentionVariant, optional
        As in `MultiLevelCascadeAttentionWrapper` with two levels.

    Source
    ------
    flashinfer.cascade.BatchPrefillWithSharedPrefixPagedKVCacheWrapper.

    Examples
    --------
    >>> import numpy as np, fi_cupy
    >>> wrapper = fi_cupy.BatchPrefillWithSharedPrefixPagedKVCacheWrapper(np.empty(1 << 20, np.uint8))
    >>> wrapper.begin_forward([0, 2, 5], [0, 1, 2], [0, 1], [3, 9], 8, 2, 64, 16, q_data_type="float32")
    >>> q, shared = np.ones((5, 8, 64), np.float32), np.ones((100, 2, 64), np.float32)
    >>> wrapper.forward(q, shared, shared, np.ones((2, 2, 16, 2, 64), np.float32), causal=True).shape
    (5, 8, 64)
    """

    _op = "BatchPrefillWithSharedPrefixPagedKVCacheWrapper"

    def __init__(
        self, float_workspace_buffer: Any, kv_layout: str = "NHD", *, variant: AttentionVariant | None = None
    ) -> None:
        super().__init__(kv_layout, variant)
        # A plan for each mask, since only `forward` says which: their schedules differ.
        self._unique = {
            causal: BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, kv_layout, variant=variant)
            for causal in (False, True)
        }
        self._planned: tuple[bool, ...] = ()

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another scratch buffer from the next `begin_forward` on."""
        for wrapper in self._unique.values():
            wrapper.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)
        self._head_dim = None

    def begin_forward(
        self,
        qo_indptr: Any,
        paged_kv_indptr: Any,
        paged_kv_indices: Any,
        paged_kv_last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        causal: bool | None = None,
        q_data_type: Any = "float16",
    ) -> None:
        """Make the schedules of the requests' own keys, see `BatchPrefillWithPagedKVCacheWrapper.plan`.

        `causal` says what `forward` will ask for; without it there are two schedules, and the work here doubles.
        """
        self._head_dim = None
        self._planned = (False, True) if causal is None else (bool(causal),)
        for mode in self._planned:
            self._unique[mode].plan(
                qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads,
                head_dim, page_size, causal=mode, q_data_type=q_data_type,
            )  # fmt: skip
        self._head_dim = head_dim

    plan = begin_forward

    def workspace_size(self, *args: Any, causal: bool | None = None, **kwargs: Any) -> tuple[int, int]:
        """(float bytes, int bytes) that `begin_forward` with these arguments needs."""
        modes = (False, True) if causal is None else (causal,)
        sizes = [self._unique[mode].workspace_size(*args, causal=mode, **kwargs) for mode in modes]
        return max(size[0] for size in sizes), sum(size[1] for size in sizes)

    def forward(
        self,
        q: Any,
        k_shared: Any,
        v_shared: Any,
        unique_kv_cache: Any,
        causal: bool = False,
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        *,
        out: Any = None,
        return_lse: bool = False,
        variant_args: Mapping[str, Any] | None = None,
    ) -> Any:
        """Attention of a ragged batch of queries over the shared and their requests' own keys.

        Parameters
        ----------
        q : array, [qo_indptr[-1], num_qo_heads, head_dim]
        k_shared, v_shared : array, [shared_len, num_kv_heads, head_dim] (NHD) or [num_kv_heads, shared_len, head_dim]
        unique_kv_cache : array, or (keys, values)
            See `BatchPrefillWithPagedKVCacheWrapper.run`.
        causal : bool
            On the requests' own keys.
        use_fp16_qk_reduction : bool
            A hint; products are summed in fp32.
        sm_scale : float, optional
            Default ``1 / sqrt(head_dim)``.
        rope_scale, rope_theta : None
            Nothing is rotated inside.
        out : array, optional
        return_lse : bool
        variant_args : mapping, optional
            The variant's tensors and scalars by name.

        Returns
        -------
        out, or (out, lse) with `return_lse`
        """
        if self._head_dim is not None and bool(causal) not in self._planned:
            raise PlanError(f"{self._op}.forward: causal is {causal}, planned {self._planned[0]}")
        return self._forward(
            self._unique[bool(causal)], q, k_shared, v_shared, unique_kv_cache, sm_scale, rope_scale, rope_theta, out,
            return_lse, variant_args,
        )  # fmt: skip

    run = forward
    run_return_lse = forward_return_lse = partialmethod(forward, return_lse=True)

    def _parts(self) -> list[tuple[str, Any]]:
        return [(f"each request's own keys, causal={mode}", self._unique[mode]) for mode in self._planned]
