"""fi_cupy inside ``jax.jit``: every operator as a function of JAX arrays, and the plan/run wrappers.

The functions have the names and parameters of ``fi_cupy``'s own, without ``out=``: they return new arrays. An operator
that works in place returns what it would have overwritten (``append_paged_kv_cache`` the cache); inside ``jax.jit`` its
operand and its result share memory, so that a donated cache is updated without a copy, and XLA copies only what is
still needed elsewhere.

On a GPU the kernels are launched on XLA's stream and read and write XLA's buffers (`jax.experimental.buffer_callback`);
on the CPU the NumPy reference computes. Shapes and dtypes are checked when the function is traced, with the errors of
the operators. Parameters that are JAX or NumPy arrays are operands; all others are static.

Differences from ``fi_cupy``'s own functions:

* 64-bit results are 32-bit ones unless x64 is enabled, as everywhere in JAX.
* Random numbers: ``seed`` must be given, as an int, a JAX key (``jax.random.key``), or an integer array [1] or [rows].
* Functions that fill required outputs return them: the ``*_quant`` casts take ``out_dtype`` (float8_e4m3fn) instead of
  ``out``, ``fused_topk_deepseek`` returns float32 values and int32 indices.
* Weights that lie column by column (``mm_fp8``, ``bmm_fp8``, ``mm_bf16_swiglu``): pass ``weight.T`` of a row-major one
  inside the jitted function, and nothing is transposed.
* `jax.vmap` and `jax.grad` are refused.

Examples
--------
>>> import jax, jax.numpy as jnp
>>> from fi_cupy.interop import jax as fj
>>> norm = jax.jit(lambda x, w: fj.rmsnorm(x, w) + 1)
>>> tuple(round(float(x), 3) for x in norm(jnp.array([[3.0, 4.0]]), jnp.ones(2))[0])
(1.849, 2.131)
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from fi_cupy.interop._jax_call import OPTIONS
from fi_cupy.interop._jax_planned import LogitsPipe as LogitsPipe
from fi_cupy.interop._jax_planned import Planned
from fi_cupy.interop._jax_trace import Function
from fi_cupy.interop.table import ALIASES, OPERATORS, WITH_LSE
from fi_cupy.interop.wrappers import WRAPPER_ALIASES, WRAPPERS


def command_buffers(enabled: bool) -> None:
    """Let XLA record operators in its command buffers (CUDA graphs); takes effect for functions traced from now on.

    Wrappers are recorded only in CUDA-graph mode (``use_cuda_graph=True``), where later plans keep every address, and
    ``single_decode_with_kv_cache`` and ``single_prefill_with_kv_cache``, which make their schedule in the call, never.
    """
    OPTIONS["command_buffers"] = bool(enabled)


__all__ = sorted(
    itertools.chain(OPERATORS, ALIASES, WRAPPERS, WRAPPER_ALIASES, ["LogitsPipe", WITH_LSE, "command_buffers"])
)


def __getattr__(name: str) -> Any:
    made: Any
    row = OPERATORS.get(ALIASES.get(name, name))
    planned = WRAPPERS.get(WRAPPER_ALIASES.get(name, name))
    if row is not None:
        made = Function(row) if row.name == name else __getattr__(row.name)
    elif name == WITH_LSE:
        made = functools.partial(__getattr__("single_prefill_with_kv_cache"), return_lse=True)
    elif planned is not None:
        doc = f"`fi_cupy.{planned.module}.{planned.name}` for JAX arrays: {(Planned.__doc__ or '')}"
        made = type(planned.name, (Planned,), {"row": planned, "__doc__": doc, "__module__": __name__})
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = made
    return made


def __dir__() -> list[str]:
    return __all__
