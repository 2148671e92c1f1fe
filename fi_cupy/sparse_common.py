"""What the block-sparse wrappers share: the prefill wrapper behind them, and causality over listed blocks."""

from __future__ import annotations

from functools import partialmethod
from typing import Any

from fi_cupy.errors import ArgumentError, UnsupportedError
from fi_cupy.plan.sparse import Blocks, Rows, ascending, causal_mask, drop_hidden, is_plain_causal
from fi_cupy.prefill import BatchPrefillWithPagedKVCacheWrapper


def check_modes(op: str, pos_encoding_mode: str, num_qo_heads: int, num_kv_heads: int) -> None:
    if pos_encoding_mode != "NONE":
        raise UnsupportedError(
            f"{op}: pos_encoding_mode is {pos_encoding_mode!r}, expected 'NONE': the kernel sees the listed keys "
            "without the gaps between them; rotate q and k with fi_cupy.rope first"
        )
    if num_kv_heads < 1 or num_qo_heads % num_kv_heads:
        raise ArgumentError(
            f"{op}: num_qo_heads is {num_qo_heads}, expected a multiple of num_kv_heads = {num_kv_heads}"
        )


class BlockSparse:
    """What both wrappers share: the prefill wrapper behind them and FlashInfer's method names."""

    _op = ""

    def __init__(self, float_workspace_buffer: Any, backend: str = "auto") -> None:
        self._prefill = BatchPrefillWithPagedKVCacheWrapper(float_workspace_buffer, backend=backend)
        self._planned = False

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


def hide_future(blocks: Blocks, rows: Rows, offset: int) -> tuple[Blocks, dict[str, Any]]:
    """The blocks that causality leaves, and how the kernel hides the rest: by its own causal mask, or a custom one."""
    blocks = blocks.take(ascending(blocks))
    blocks = blocks.take(drop_hidden(blocks, rows, offset))
    if is_plain_causal(blocks, rows, offset):
        return blocks, {"causal": True}
    mask = causal_mask(blocks, rows, offset)
    return blocks, {} if mask.all() else {"custom_mask": mask}
