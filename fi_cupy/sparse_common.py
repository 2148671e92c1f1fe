"""What the block-sparse wrappers share: the prefill wrapper behind them, and causality over listed blocks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partialmethod
from typing import Any

import numpy as np

from fi_cupy.arrays import View
from fi_cupy.checks import as_sizes
from fi_cupy.dtypes import int32
from fi_cupy.errors import ArgumentError, UnsupportedError
from fi_cupy.page_table import Ints
from fi_cupy.plan.sparse import Blocks, Rows, ascending, causal_mask, drop_hidden, is_plain_causal
from fi_cupy.prefill import BatchPrefillWithPagedKVCacheWrapper
from fi_cupy.variants import AttentionVariant, variant_of
from fi_cupy.variants_placed import Places, place
from fi_cupy.workspace import copy_to_device


def check_modes(op: str, pos_encoding_mode: str, num_qo_heads: int, num_kv_heads: int) -> None:
    if pos_encoding_mode != "NONE":
        raise UnsupportedError(
            f"{op}: pos_encoding_mode is {pos_encoding_mode!r}, expected 'NONE': the kernel sees the listed keys "
            "without the gaps between them; rotate q and k with fi_cupy.rope first"
        )
    as_sizes(op, num_qo_heads=num_qo_heads, num_kv_heads=num_kv_heads)
    if num_qo_heads % num_kv_heads:
        raise ArgumentError(
            f"{op}: num_qo_heads is {num_qo_heads}, expected a multiple of num_kv_heads = {num_kv_heads}"
        )


_NOTHING: Places = {}


class BlockSparse:
    """What both wrappers share: the prefill wrapper behind them and FlashInfer's method names."""

    _op = ""

    #: What a variant's functions see in place of the kernel's indices, and the arrays and numbers that say so.
    _places: Places = _NOTHING
    _place_tensors: tuple[str, ...] = ()
    _place_scalars: tuple[str, ...] = ()

    def __init__(
        self, float_workspace_buffer: Any, backend: str = "auto", *, variant: AttentionVariant | None = None
    ) -> None:
        self._variant: AttentionVariant | None = variant_of(self._op, variant, None, None)
        inner = self._variant
        if inner is not None:
            inner = place(self._op, inner, self._places, self._place_tensors, self._place_scalars)
        self._is_placed = inner is not self._variant
        self._place_values: dict[str, Any] = {}
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, backend=backend, variant=inner)
        self._prefill._op = self._op  # the name in its messages
        self._planned = False

    def _set_places(self, **values: Any) -> None:
        """What the variant's functions need to find the matrix' own indices: int32 arrays and ints."""
        if self._is_placed:
            like = self._prefill._workspace
            self._place_values = {n: _sent(x, like) if isinstance(x, np.ndarray) else int(x) for n, x in values.items()}

    def _variant_args(self, op: str, args: tuple[Any, ...], named: Mapping[str, Any] | None) -> dict[str, Any]:
        """Arguments of the prefill wrapper's run."""
        if self._variant is None:
            if args or named:
                raise UnsupportedError(
                    f"{op}: extra arguments belong to a variant; give one to the constructor (variant=)"
                )
            return {}
        return {"variant_args": {**self._variant.by_name(op, args, named or {}), **self._place_values}}

    def reset_workspace_buffer(self, float_workspace_buffer: Any, int_workspace_buffer: Any = None) -> None:
        """Use another scratch buffer from the next `plan` on. The wrapper owns its integer buffer: pass None for it."""
        self._prefill.reset_workspace_buffer(float_workspace_buffer, int_workspace_buffer)
        self._planned = False

    def run(self, q: Any, k: Any, v: Any, *, return_lse: bool = False) -> Any:
        raise NotImplementedError

    def forward(
        self, q: Any, k: Any, v: Any, pos_encoding_mode: str = "NONE", use_fp16_qk_reduction: bool = False,
        logits_soft_cap: float | None = None, sm_scale: float | None = None, rope_scale: float | None = None,
        rope_theta: float | None = None, *, return_lse: bool = False,
    ) -> Any:  # fmt: skip
        """Deprecated form of `run`. Options that differ from the plan raise `PlanError` instead of being ignored."""
        self._prefill._check_forward(False, pos_encoding_mode, -1, logits_soft_cap, sm_scale, rope_scale, rope_theta)
        return self.run(q, k, v, return_lse=return_lse)

    forward_return_lse = partialmethod(forward, return_lse=True)

    def end_forward(self) -> None:
        """Kept for FlashInfer's signature; there is nothing to release."""

    def _parts(self) -> list[tuple[str, Any]]:
        """What `fi_cupy.attention.explain` looks into."""
        return [("block rows as requests, blocks of keys as pages", self._prefill)]


def _sent(values: Ints, like: View) -> Any:
    """Indices as an int32 array beside the workspace; never empty, as the kernels clamp what they read."""
    values = values.astype(np.int32) if len(values) else np.zeros(1, np.int32)
    if like.is_cpu:
        return values
    made = like.empty(values.shape, int32)
    copy_to_device(made.ptr, values, like.stream(), like.device)
    return made.array


def hide_future(blocks: Blocks, rows: Rows, offset: int) -> tuple[Blocks, dict[str, Any]]:
    """The blocks that causality leaves, and how the kernel hides the rest: by its own causal mask, or a custom one."""
    blocks = blocks.take(ascending(blocks))
    blocks = blocks.take(drop_hidden(blocks, rows, offset))
    if is_plain_causal(blocks, rows, offset):
        return blocks, {"causal": True}
    mask = causal_mask(blocks, rows, offset)
    return blocks, {} if mask.all() else {"custom_mask": mask}
