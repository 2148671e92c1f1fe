"""The tables of JAX's and torch's forms: every operator is there, and every operator knows its devices."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re

import numpy as np
import pytest
from interop_cases import CASES, WRAPPER_KEYS, Case, has_arrays, received

import fi_cupy
from fi_cupy import dtypes, errors
from fi_cupy.interop.dry_run import Shaped, check
from fi_cupy.interop.table import ALIASES, OPERATORS, WITH_LSE
from fi_cupy.interop.wrappers import WRAPPER_ALIASES, WRAPPERS

#: Modules whose functions take arrays and compute.
FAMILIES = {
    "activation", "attention", "batch_attention", "cascade", "cascade_attention", "decode", "fused_moe", "gemm",
    "lookup", "mla", "norm", "page", "pod", "prefill", "quantization", "rope", "sampling", "sparse", "topk",
}  # fmt: skip
#: All others, and why they have no operators of their own.
NO_OPERATORS = {
    **dict.fromkeys(
        ("aot", "api_logging", "artifacts", "autotuner", "compilation_context", "cuda_utils", "customize", "dtypes",
         "errors", "interop", "jit", "profiles", "reference", "testing", "utils", "variants"),
        "no computation on a caller's arrays",
    ),
    "logits_processor": "LogitsPipe has a form of its own in both frameworks, tested there",
}  # fmt: skip
#: Public functions and classes that no framework's compiler sees.
NOT_TRACED = {
    "ActivationType": "names for numbers",
    "Explanation": "what `explain` returns",
    "KernelUse": "what `explain` returns",
    "SegmentGEMMWrapper": "has no plan; `group_gemm` is the same product as a function",
    "SfLayout": "names for numbers",
    "TopKTieBreak": "names for numbers",
    "convert_bsr_mask_layout": "host arrays, before a plan",
    "define_activation": "makes an operator of a caller's text",
    "explain": "says on the host which kernel would run",
    "fast_decode_plan": "a plan, made on the host",
    "single_decode_with_kv_cache_with_jit_module": "FlashInfer's old form of a variant; the wrappers take `variant=`",
    "single_prefill_with_kv_cache_with_jit_module": "FlashInfer's old form of a variant; the wrappers take `variant=`",
}
KNOWN = {*OPERATORS, *ALIASES, *WRAPPERS, *WRAPPER_ALIASES, WITH_LSE}


def public(module: str) -> set[str]:
    """The functions and classes that a family offers, without its kernels' specifications."""
    loaded = importlib.import_module(f"fi_cupy.{module}")
    names = getattr(loaded, "__all__", None)
    if names is None:
        names = [n for n, x in vars(loaded).items() if getattr(x, "__module__", "") == loaded.__name__]
        names = [n for n in names if not n.startswith("_")]
    found = {n for n in names if callable(getattr(loaded, n)) and not re.search(r"(^|_)specs?$", n)}
    return {n for n in found if "spec" not in n and n not in ("launch", "Planned", "Launched")}


def test_every_public_operator_is_in_the_tables_or_excused():
    missing = {n: m for m in sorted(FAMILIES) for n in public(m) if n not in KNOWN | NOT_TRACED.keys()}
    exported = {n for n in fi_cupy.__all__ if inspect.isfunction(getattr(fi_cupy, n))}
    missing |= {n: "fi_cupy" for n in exported - KNOWN - NOT_TRACED.keys() - {"autotune", "preload"}}
    assert not missing, f"without a row in fi_cupy/interop/table.py or a reason here: {missing}"


def test_every_public_module_is_a_family_or_excused():
    modules = {n for n in fi_cupy.__all__ if inspect.ismodule(getattr(fi_cupy, n))}
    assert modules and modules <= FAMILIES | NO_OPERATORS.keys()
    assert not FAMILIES & NO_OPERATORS.keys()
    files = {m.name for m in pkgutil.iter_modules(fi_cupy.__path__)}
    assert FAMILIES | NO_OPERATORS.keys() <= files


def test_no_excuse_is_stale():
    names = {n for module in FAMILIES for n in public(module)}
    assert NOT_TRACED.keys() <= names and not NOT_TRACED.keys() & KNOWN
    assert all(NOT_TRACED.values())


def test_every_row_has_a_case():
    assert {name for name, _ in CASES} == set(OPERATORS)
    assert {name for name, _ in WRAPPER_KEYS} == set(WRAPPERS) - {"CUDAGraphBatchDecodeWithPagedKVCacheWrapper"}


def test_rows_name_parameters_that_there_are():
    for row in OPERATORS.values():
        named = {*row.arrays, *row.either, *row.mutated, *row.out, *row.receivers, *row.host}
        named |= {*row.optional, *row.absent, *row.columns, *row.lists}
        assert named <= set(row.parameters), row.name
        assert set(row.columns) | set(row.lists) <= set(row.arrays), row.name


def placed(value, device):
    """Arguments of which only shape, dtype and device are known."""
    if isinstance(value, (tuple, list)) and has_arrays(value):
        return tuple(placed(v, device) for v in value)
    if not isinstance(value, np.ndarray):
        return value
    strides = tuple(s // value.itemsize for s in value.strides)
    return Shaped(value.shape, dtypes.dtype(value.dtype), strides, device, True)


def has_several(key):
    """Whether a case has arrays to disagree; `segment_packbits` reads its offsets on the host, wherever they are."""
    kwargs = CASES[key](Case(np.random.default_rng(0), "bfloat16"))
    kwargs |= received(OPERATORS[key[0]], kwargs)
    return key[0] != "segment_packbits" and sum(map(has_arrays, kwargs.values())) > 1


@pytest.mark.parametrize("key", list(filter(has_several, CASES)), ids="-".join)
def test_arrays_of_two_gpus_are_refused(rng, key):
    """Whichever argument lies elsewhere: no kernel is launched that would read another GPU's memory."""
    row, kwargs = OPERATORS[key[0]], CASES[key](Case(rng, "bfloat16"))
    kwargs |= received(row, kwargs, dtypes.float8_e4m3fn.np)
    arrays = [n for n, v in kwargs.items() if has_arrays(v)]
    for elsewhere in arrays:
        if key == ("single_prefill_with_kv_cache", "mask") and elsewhere == "custom_mask":
            continue  # packed first, on its own device: refused after that
        with pytest.raises(errors.DeviceError, match=r"cuda:\d"):
            check(row.function, (), {n: placed(v, int(n == elsewhere)) for n, v in kwargs.items()})
