"""The plan/run wrappers as other frameworks' machinery has to know them: one row a class, see `table`."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fi_cupy.dtypes import DType
from fi_cupy.interop.row import Result
from fi_cupy.interop.table import with_lse
from fi_cupy.kv_cache import as_fp8

#: From the wrapper and the arguments of `run` to what that returns; a tuple in the place of a result is a pair.
RunRule = Callable[[Any, Mapping[str, Any]], tuple[Any, ...]]


@dataclass(frozen=True, eq=False)
class PlannedWrapper:
    """One class with `plan` and `run`.

    Attributes
    ----------
    module, name : str
    arrays : tuple of str
        Parameters of `run` that are arrays, or pairs of arrays.
    rule : RunRule
    either : tuple of str
        Parameters that are an array or a number.
    plan_name : str
        The method that plans.
    out : tuple of str
        Optional parameters that take the place of results.
    copies : bool
        `run` rearranges its arrays with their own framework's methods.
    host : tuple of str
        Parameters that need values on the host.
    """

    module: str
    name: str
    arrays: tuple[str, ...]
    rule: RunRule
    either: tuple[str, ...] = ("q_scale", "k_scale", "v_scale")
    plan_name: str = "plan"
    out: tuple[str, ...] = ("out", "lse")
    copies: bool = False
    host: tuple[str, ...] = ()

    @cached_property
    def cls(self) -> Any:
        """The class itself."""
        return getattr(importlib.import_module(f"fi_cupy.{self.module}"), self.name)

    @cached_property
    def parameters(self) -> dict[str, inspect.Parameter]:
        """Parameters of `run` in order, without self."""
        found = dict(inspect.signature(self.cls.run).parameters)
        del found["self"]
        return found


def _out_type(x: Any, planned: DType, out: DType) -> DType:
    """float32 queries on the CPU keep their type."""
    return out if as_fp8(x, planned).dtype is planned else x.dtype


def _decode_result(wrapper: Any, q: Any, return_lse: Any) -> tuple[Result, ...]:
    p = wrapper._planned
    return with_lse(Result(q.shape, _out_type(q, p.dtype, p.out_dtype)), return_lse)


def _prefill_result(wrapper: Any, q: Any, return_lse: Any) -> tuple[Result, ...]:
    problem = wrapper._planned.problem
    kind = _out_type(q, problem.dtype, problem.out)
    return with_lse(Result((*q.shape[:2], problem.head_dim_vo), kind), return_lse)


def _any_result(wrapper: Any, q: Any, return_lse: Any) -> tuple[Result, ...]:
    find = _prefill_result if hasattr(wrapper._planned, "problem") else _decode_result
    return find(wrapper, q, return_lse)


def _decode(wrapper: Any, a: Mapping[str, Any]) -> tuple[Any, ...]:
    return _decode_result(wrapper, a["q"], a["return_lse"])


def _prefill(wrapper: Any, a: Mapping[str, Any]) -> tuple[Any, ...]:
    return _prefill_result(wrapper, a["q"], a["return_lse"])


def _with_sink(wrapper: Any, a: Mapping[str, Any]) -> tuple[Any, ...]:
    return _prefill_result(wrapper, a["q"], a.get("return_lse"))


def _cascade(wrapper: Any, a: Mapping[str, Any]) -> tuple[Any, ...]:
    q = a["q"]
    return _any_result(wrapper._levels[-1].wrapper, q[: wrapper._rows], a["return_lse"])


def _shared_decode(wrapper: Any, a: Mapping[str, Any]) -> tuple[Any, ...]:
    return _decode_result(wrapper._unique, a["q"], a["return_lse"])


def _shared_prefill(wrapper: Any, a: Mapping[str, Any]) -> tuple[Any, ...]:
    return _prefill_result(wrapper._unique[bool(a["causal"])], a["q"], a["return_lse"])


def _blocks(wrapper: Any, a: Mapping[str, Any]) -> tuple[Any, ...]:
    return _prefill_result(wrapper._prefill, a["q"], a["return_lse"])


def _variable(wrapper: Any, a: Mapping[str, Any]) -> tuple[Any, ...]:
    problem = wrapper._prefill._planned.problem
    q = a["q"]
    return with_lse(Result(q.shape, _out_type(q, problem.dtype, problem.out)), a["return_lse"])


def _batch(wrapper: Any, a: Mapping[str, Any]) -> tuple[Any, ...]:
    return _prefill_result(wrapper._batch, a["q"], True)


def _pod(wrapper: Any, a: Mapping[str, Any]) -> tuple[Any, ...]:
    q, v = a["q_p"], a["v_p"]
    prompt = with_lse(Result((*q.shape[:2], v.shape[2]), q.dtype), a["return_lse_p"])
    rows = _decode_result(wrapper._decode, a["q_d"], a["return_lse_d"])
    return tuple(part if len(part) == 2 else part[0] for part in (prompt, rows))


def _mla(wrapper: Any, a: Mapping[str, Any]) -> tuple[Any, ...]:
    q = a["q_nope"]
    return with_lse(Result(q.shape, q.dtype), a["return_lse"])


_PAGED = ("q", "paged_kv_cache", "sinks")
_SHARED = ("q", "k_shared", "v_shared", "unique_kv_cache")
_SPARSE = ("scale_q", "scale_k", "scale_v")

WRAPPERS: dict[str, PlannedWrapper] = {
    row.name: row
    for row in (
        PlannedWrapper("decode", "BatchDecodeWithPagedKVCacheWrapper", _PAGED, _decode),
        PlannedWrapper("decode", "CUDAGraphBatchDecodeWithPagedKVCacheWrapper", _PAGED, _decode),
        PlannedWrapper("prefill", "BatchPrefillWithPagedKVCacheWrapper", _PAGED, _prefill),
        PlannedWrapper("prefill", "BatchPrefillWithRaggedKVCacheWrapper", ("q", "k", "v", "sinks"), _prefill),
        PlannedWrapper(
            "attention", "BatchAttentionWithAttentionSinkWrapper", ("q", "paged_kv_cache", "sink", "sinks"), _with_sink
        ),
        PlannedWrapper("batch_attention", "BatchAttention", ("q", "kv_cache"), _batch),
        PlannedWrapper(
            "pod", "PODWithPagedKVCacheWrapper",
            ("q_p", "k_p", "v_p", "q_d", "paged_kv_cache_d", "custom_mask_p", "packed_custom_mask_p",
             "custom_mask_d", "packed_custom_mask_d", "sinks_d"), _pod,
            out=("out_d", "lse_d"),
        ),
        PlannedWrapper("cascade_attention", "MultiLevelCascadeAttentionWrapper", ("q", "paged_kv_cache"), _cascade),
        PlannedWrapper(
            "cascade_attention", "BatchDecodeWithSharedPrefixPagedKVCacheWrapper", _SHARED, _shared_decode, (),
            "begin_forward", ("out",),
        ),
        PlannedWrapper(
            "cascade_attention", "BatchPrefillWithSharedPrefixPagedKVCacheWrapper", _SHARED, _shared_prefill, (),
            "begin_forward", ("out",),
        ),
        PlannedWrapper(
            "mla", "BatchMLAPagedAttentionWrapper",
            ("q_nope", "q_pe", "ckv_cache", "kpe_cache", "kv_len", "page_table", "ckv_scale_arr"), _mla, (),
        ),
        PlannedWrapper(
            "mla", "BatchDecodeMlaWithPagedKVCacheWrapper", ("q_nope", "q_pe", "paged_ckv_cache", "paged_kpe_cache"),
            _mla, (),
        ),
        PlannedWrapper("sparse", "BlockSparseAttentionWrapper", ("q", "k", "v"), _blocks, _SPARSE, copies=True),
        PlannedWrapper("sparse", "VariableBlockSparseAttentionWrapper", ("q", "k", "v"), _variable, (), copies=True),
    )
}  # fmt: skip

#: Other names.
WRAPPER_ALIASES = {"BatchDecodeWrapper": "BatchDecodeWithPagedKVCacheWrapper"}
