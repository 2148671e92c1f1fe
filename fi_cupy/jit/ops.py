"""Element-wise functions for attention variants, on traced values and on NumPy (or CuPy) arrays alike.

A function of a variant that uses these, arithmetic, comparisons and ``& | ~`` becomes CUDA when it is traced, and runs
as it is on the NumPy reference. NumPy's own element-wise functions work on traced values as well.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fi_cupy.jit.trace import BOOL, FLOAT, INT, Traced, apply

__all__ = [
    "abs", "arctan", "bool_", "ceil", "clip", "cos", "erf", "exp", "exp2", "expm1", "float32", "floor", "int32", "log",
    "log1p", "log2", "logical_and", "logical_not", "logical_or", "maximum", "minimum", "pow", "relu", "rint", "rsqrt",
    "sigmoid", "silu", "sin", "softplus", "sqrt", "square", "tan", "tanh", "trunc", "where",
]  # fmt: skip


def _unary(name: str, on_arrays: Any, text: str) -> Any:
    def function(x: Any) -> Any:
        return apply(name, x) if isinstance(x, Traced) else on_arrays(x)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = text
    return function


_erf = np.vectorize(math.erf, otypes=[np.float64])

abs = _unary("abs", np.absolute, "``|x|``.")
exp = _unary("exp", np.exp, "``e^x``.")
exp2 = _unary("exp2", np.exp2, "``2^x``.")
expm1 = _unary("expm1", np.expm1, "``e^x - 1`` without cancellation.")
log = _unary("log", np.log, "Natural logarithm.")
log2 = _unary("log2", np.log2, "Logarithm to base 2.")
log1p = _unary("log1p", np.log1p, "``log(1 + x)`` without cancellation.")
sqrt = _unary("sqrt", np.sqrt, "Square root.")
rsqrt = _unary("rsqrt", lambda x: 1 / np.sqrt(x), "``1 / sqrt(x)``.")
tanh = _unary("tanh", np.tanh, "Hyperbolic tangent, to 1e-7 absolute.")
sigmoid = _unary("sigmoid", lambda x: 0.5 * (1 + np.tanh(0.5 * x)), "``1 / (1 + e^-x)``.")
sin = _unary("sin", np.sin, "Sine of radians, to 1e-6 absolute in kernels.")
cos = _unary("cos", np.cos, "Cosine of radians, to 1e-6 absolute in kernels.")
tan = _unary("tan", np.tan, "Tangent of radians.")
arctan = _unary("arctan", np.arctan, "Inverse tangent.")
erf = _unary("erf", _erf, "Error function.")
floor = _unary("floor", np.floor, "Largest whole number not above x, as a float.")
ceil = _unary("ceil", np.ceil, "Smallest whole number not below x, as a float.")
trunc = _unary("trunc", np.trunc, "Whole part of x, as a float.")
rint = _unary("rint", np.rint, "Nearest whole number, ties to even, as a float.")


def where(condition: Any, a: Any, b: Any) -> Any:
    """`a` where `condition` holds, else `b`. Both are computed."""
    traced = any(isinstance(x, Traced) for x in (condition, a, b))
    return apply("where", condition, a, b) if traced else np.where(condition, a, b)


def _binary(name: str, on_arrays: Any, text: str) -> Any:
    def function(a: Any, b: Any) -> Any:
        return apply(name, a, b) if isinstance(a, Traced) or isinstance(b, Traced) else on_arrays(a, b)

    function.__name__ = function.__qualname__ = name
    function.__doc__ = text
    return function


minimum = _binary("minimum", np.minimum, "The smaller of two values.")
maximum = _binary("maximum", np.maximum, "The larger of two values.")
pow = _binary("pow", np.power, "``a ** b``.")


def clip(x: Any, low: Any, high: Any) -> Any:
    """`x` held to ``[low, high]``."""
    return minimum(maximum(x, low), high)


def square(x: Any) -> Any:
    """``x * x``."""
    return x * x


def relu(x: Any) -> Any:
    """``max(x, 0)``."""
    return maximum(x, 0)


def silu(x: Any) -> Any:
    """``x * sigmoid(x)``."""
    return x * sigmoid(x)


def softplus(x: Any) -> Any:
    """``log(1 + e^x)`` without overflow."""
    return maximum(x, 0.0) + log1p(exp(-abs(x)))


def float32(x: Any) -> Any:
    """`x` as a float."""
    return apply(FLOAT, x) if isinstance(x, Traced) else np.asarray(x).astype(np.float32)


def int32(x: Any) -> Any:
    """`x` as an integer; a float is cut towards zero."""
    return apply(INT, x) if isinstance(x, Traced) else np.asarray(x).astype(np.int32)


def bool_(x: Any) -> Any:
    """Whether `x` is not zero."""
    return apply(BOOL, x) if isinstance(x, Traced) else np.asarray(x).astype(np.bool_)


def logical_and(a: Any, b: Any) -> Any:
    """``a & b`` of conditions."""
    return bool_(a) & bool_(b)


def logical_or(a: Any, b: Any) -> Any:
    """``a | b`` of conditions."""
    return bool_(a) | bool_(b)


def logical_not(a: Any) -> Any:
    """``~a`` of a condition."""
    return ~bool_(a)
