"""fi_cupy's attention for models of the transformers library: ``attn_implementation="fi_cupy"``.

`register` makes the name known. Decoder models then run their attention on fi_cupy's paged kernels: causal, sliding
windows, soft caps, grouped queries, sinks, and static and dynamic caches, which are read where they are (each sequence
of the batch is one page). Where masks are plainly causal, no mask is made: the lengths are planned once a step and all
layers use the plan. Padded batches and other masks run with that mask.

CUDA tensors must be float16 or bfloat16; CPU tensors run the NumPy reference. For inference only.

Examples
--------
>>> from transformers import AutoModelForCausalLM
>>> from fi_cupy.interop import transformers as fi_transformers
>>> fi_transformers.register()
>>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fi_cupy")  # doctest: +SKIP
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np
import torch

from fi_cupy.decode import BatchDecodeWithPagedKVCacheWrapper
from fi_cupy.errors import ArgumentError, UnsupportedError
from fi_cupy.prefill import BatchPrefillWithPagedKVCacheWrapper

NAME = "fi_cupy"
_WORKSPACE_BYTES = 32 << 20
_MOST_WRAPPERS = 32


def register(name: str = NAME) -> None:
    """Make ``attn_implementation=name`` known to transformers; may be called again."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, attention_mask)


# --- masks ----------------------------------------------------------------------------------------------------------


def _window_of(function: Any) -> int | None:
    """`window_left` of a causal mask function (-1: all keys), or None where it is something else."""
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return -1
    parts = [c.cell_contents for c in getattr(function, "__closure__", None) or ()]
    inner = next((p for p in parts if isinstance(p, tuple) and len(p) == 2), None)
    if inner is None or inner[1] is not masking_utils.causal_mask_function:
        return None
    overlay = inner[0]
    if not getattr(overlay, "__qualname__", "").startswith("sliding_window_overlay."):
        return None
    (window,) = (c.cell_contents for c in overlay.__closure__)
    return int(window) - 1


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_mask(
    *, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: Any = 0, mask_function: Any = None,
    attention_mask: torch.Tensor | None = None, **options: Any,
) -> torch.Tensor:  # fmt: skip
    """What `attention_forward` gets as its mask.

    Plainly causal: int32 ``[1, 1, 1, 2]`` on the CPU with the number of keys up to the last query and `window_left`.
    Everything else: the bool mask that sdpa gets, ``[batch, 1, q_length, kv_length]``.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    function = causal_mask_function if mask_function is None else mask_function
    window = _window_of(function)
    if window is not None and (attention_mask is None or bool(attention_mask.all())):
        keys = int(q_offset) + int(q_length) - int(kv_offset)
        if 0 <= keys <= kv_length:
            return torch.tensor([[[[keys, window]]]], dtype=torch.int32)
    options["allow_is_causal_skip"] = options["allow_is_bidirectional_skip"] = False
    made: torch.Tensor = sdpa_mask(
        q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset, mask_function=function,
        attention_mask=attention_mask, **options,
    )  # fmt: skip
    return made


# --- attention ------------------------------------------------------------------------------------------------------


class _Kind(NamedTuple):
    """Layers that share a wrapper and its plans."""

    device: torch.device
    dtype: torch.dtype
    num_qo_heads: int
    num_kv_heads: int
    head_dim_qk: int
    head_dim_vo: int
    sm_scale: float
    logits_soft_cap: float
    window_left: int
    causal: bool
    masked: bool
    decode: bool


class _Planned:
    """One wrapper and what it is planned for."""

    def __init__(self, kind: _Kind) -> None:
        self.kind = kind
        workspace = torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=kind.device)
        cls = BatchDecodeWithPagedKVCacheWrapper if kind.decode else BatchPrefillWithPagedKVCacheWrapper
        self.wrapper: Any = cls(workspace, "HND")
        self._sizes: tuple[int, ...] | None = None
        self._mask: torch.Tensor | None = None

    def plan(self, batch: int, queries: int, page_size: int, keys: int, mask: torch.Tensor | None) -> None:
        """Plan for `batch` sequences of one page each, unless that is the present plan."""
        sizes = (batch, queries, page_size, keys)
        if sizes == self._sizes and mask is self._mask:
            return
        k, one = self.kind, np.arange(batch + 1, dtype=np.int32)
        table = (one, one[:-1], np.full(batch, keys, np.int32))
        name = str(k.dtype).removeprefix("torch.")
        options: dict[str, Any] = {
            "sm_scale": k.sm_scale, "logits_soft_cap": k.logits_soft_cap, "window_left": k.window_left,
            "q_data_type": name, "kv_data_type": name,
        }  # fmt: skip
        if k.decode:
            self.wrapper.plan(*table, k.num_qo_heads, k.num_kv_heads, k.head_dim_qk, page_size, **options)
        else:
            flat = None
            if mask is not None:
                seen = mask if mask.dtype == torch.bool else mask == 0
                flat = seen[:, 0, :, :keys].expand(batch, queries, keys).reshape(-1)
            self.wrapper.plan(
                one * queries, *table, k.num_qo_heads, k.num_kv_heads, k.head_dim_qk, page_size,
                head_dim_vo=k.head_dim_vo, causal=k.causal, custom_mask=flat, **options,
            )  # fmt: skip
        self._sizes, self._mask = sizes, mask


_planned: OrderedDict[_Kind, _Planned] = OrderedDict()


def _wrapper(kind: _Kind) -> _Planned:
    found = _planned.get(kind)
    if found is None:
        found = _planned[kind] = _Planned(kind)
        if len(_planned) > _MOST_WRAPPERS:
            _planned.popitem(last=False)
    _planned.move_to_end(kind)
    return found


def _check(module: Any, mask: torch.Tensor | None, dropout: float, options: dict[str, Any]) -> None:
    op = "fi_cupy attention"
    if dropout and module.training:
        raise UnsupportedError(f"{op}: dropout is {dropout} in training, kernels are for inference; call model.eval()")
    for name in ("position_bias", "head_mask", "cache"):
        if options.get(name) is not None:
            raise UnsupportedError(f"{op}: {name} is given, which no kernel takes; use attn_implementation='sdpa'")
    if options.get("output_attentions"):
        raise UnsupportedError(f"{op}: output_attentions is on, but kernels keep no weights; use 'eager' for them")
    if mask is not None and mask.dtype != torch.int32 and (mask.ndim != 4 or mask.shape[1] != 1):
        raise ArgumentError(f"{op}: attention_mask has shape {tuple(mask.shape)}, expected (batch, 1, queries, keys)")


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer in transformers' form.

    Parameters
    ----------
    module
        The attention layer.
    query : tensor, [batch, num_qo_heads, queries, head_dim_qk]
    key, value : tensor, [batch, num_kv_heads, keys, head_dim]
        New keys and the cache's together, as caches return them.
    attention_mask : tensor, optional
        What the function of that name in this module returns, or a mask of sdpa's. None: `is_causal` says.
    scaling : float, optional
        Default ``1 / sqrt(head_dim_qk)``.
    sliding_window : int, optional
        Newest keys that a query sees, itself among them; read where there is no mask.
    softcap : float, optional
    is_causal : bool, optional
        Default: the module's.
    s_aux : tensor, [num_qo_heads], optional
        Attention sinks.

    Returns
    -------
    (tensor [batch, queries, num_qo_heads, head_dim_vo], None)

    Raises
    ------
    UnsupportedError, ArgumentError, DTypeError, ShapeError
    """
    _check(module, attention_mask, dropout, options)
    batch, heads, queries, dim = query.shape
    keys, mask = key.shape[2], attention_mask
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = -1 if sliding_window is None or not causal else sliding_window - 1
    if mask is not None and mask.dtype == torch.int32:
        (keys, window), mask, causal = mask.flatten().tolist(), None, True
    elif mask is not None:
        window, causal = -1, False  # the mask says all
    kind = _Kind(
        query.device, query.dtype, heads, key.shape[1], dim, value.shape[3], scaling or dim**-0.5, softcap or 0.0,
        window, bool(causal), mask is not None, queries == 1 and mask is None and dim == value.shape[3],
    )  # fmt: skip
    planned = _wrapper(kind)
    planned.plan(batch, queries, key.shape[2], keys, mask)
    rows = query.transpose(1, 2).reshape(batch * queries, heads, dim)
    sinks = None if s_aux is None else s_aux.float()
    out = planned.wrapper.run(rows.detach(), (key.detach(), value.detach()), sinks=sinks)
    return _guarded(out.view(batch, queries, heads, value.shape[3]), query, key, value), None


def _guarded(out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
    """The output; asking for a gradient through it raises."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        guarded: torch.Tensor = _NoDerivative.apply(out, *inputs)
        return guarded
    return out


class _NoDerivative(torch.autograd.Function):  # type: ignore[misc]
    """The output as it is; raises where a gradient would otherwise silently be missing."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise UnsupportedError("fi_cupy attention: has no derivative, kernels are for inference; train with 'sdpa'")
