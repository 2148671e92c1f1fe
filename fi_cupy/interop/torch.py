"""fi_cupy inside ``torch.compile``: every operator and every wrapper's ``run`` as a `torch.library` custom operator.

The functions and classes have the names, parameters and results of ``fi_cupy``'s own, for torch tensors; what they call
are operators ``torch.ops.fi_cupy.*`` with fake implementations and annotated mutation. So ``torch.compile`` keeps them
in one graph (``fullgraph=True``), and CUDA graphs record them. CUDA tensors run the kernels on torch's current stream,
CPU tensors the NumPy reference. While a function is compiled, the operators' own checks raise their own errors.

Differences from ``fi_cupy``'s own functions:

* Without ``seed``, sampling draws one with `torch.randint` (from ``generator``, or torch's default one), so that
  compiled and captured calls draw anew each time.
* Operators have no derivative: `backward` raises. Use `torch.no_grad` or `torch.inference_mode`.
* ``variant=`` belongs to a wrapper's constructor, and its extra arguments to ``variant_args``.

Examples
--------
>>> import torch
>>> from fi_cupy.interop import torch as ft
>>> norm = torch.compile(lambda x, w: ft.rmsnorm(x, w) + 1, fullgraph=True, backend="eager")
>>> norm(torch.tensor([[3.0, 4.0]]), torch.ones(2)).round(decimals=4)
tensor([[1.8485, 2.1314]])
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

from fi_cupy.interop._torch_functions import make_function, make_pipe, make_wrapper
from fi_cupy.interop.table import ALIASES, OPERATORS, WITH_LSE
from fi_cupy.interop.wrappers import WRAPPER_ALIASES, WRAPPERS

__all__ = sorted(itertools.chain(OPERATORS, ALIASES, WRAPPERS, WRAPPER_ALIASES, ["LogitsPipe", WITH_LSE]))

for _name, _row in OPERATORS.items():
    globals()[_name] = make_function(_row)
for _name, _planned in WRAPPERS.items():
    globals()[_name] = make_wrapper(_planned)
LogitsPipe = make_pipe()
globals()[WITH_LSE] = functools.partial(globals()["single_prefill_with_kv_cache"], return_lse=True)
for _name, _target in (*ALIASES.items(), *WRAPPER_ALIASES.items()):
    globals()[_name] = globals()[_target]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
