"""Gated activations, and an error function for NumPy."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fi_cupy.reference._common import Array, compute_dtype, round_to, upcast

# W. J. Cody, "Rational Chebyshev approximation for the error function", Math. Comp. 23 (1969): numerators and
# denominators, highest power first. The relative error is below 1e-15 in each of the three ranges.
_ERF_P = (1.85777706184603153e-1, 3.16112374387056560e0, 1.13864154151050156e2, 3.77485237685302021e2,
          3.20937758913846947e3)  # fmt: skip
_ERF_Q = (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3)
_ERFC_MID_P = (2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594e0, 6.61191906371416295e1,
               2.98635138197400131e2, 8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3,
               1.23033935479799725e3)  # fmt: skip
_ERFC_MID_Q = (1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3,
               3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3)  # fmt: skip
_ERFC_FAR_P = (1.63153871373020978e-2, 3.05326634961232344e-1, 3.60344899949804439e-1, 1.25781726111229246e-1,
               1.60837851487422766e-2, 6.58749161529837803e-4)  # fmt: skip
_ERFC_FAR_Q = (1.0, 2.56852019228982242e0, 1.87295284992346725e0, 5.27905102951428412e-1, 6.05183413124413191e-2,
               2.33520497626869185e-3)  # fmt: skip


def _horner(coefficients: tuple[float, ...], x: Array) -> Array:
    out = np.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        out *= x
        out += c
    return out


def _gauss(y: Array) -> Array:
    """``exp(-y^2)`` with y^2 split so that rounding it does not cost digits."""
    coarse = np.trunc(y * 16) / 16
    return np.exp(-coarse * coarse) * np.exp(-(y - coarse) * (y + coarse))


def erfc(x: Array) -> Array:
    """Complementary error function, accurate in relative terms, float32 or float64 in and out."""
    y = np.abs(x)
    out = np.empty_like(y)
    near, far = y <= 0.46875, y > 4.0
    middle = ~(near | far)  # NaN lands here and stays NaN

    z = x[near]
    square = z * z
    out[near] = 1 - z * (_horner(_ERF_P, square) / _horner(_ERF_Q, square))

    z = y[middle]
    out[middle] = _gauss(z) * (_horner(_ERFC_MID_P, z) / _horner(_ERFC_MID_Q, z))

    z = np.minimum(y[far], 30.0)  # erfc(27) is already below the smallest float64
    inverse = 1 / (z * z)
    tail = inverse * (_horner(_ERFC_FAR_P, inverse) / _horner(_ERFC_FAR_Q, inverse))
    with np.errstate(under="ignore"):
        out[far] = _gauss(z) * (1 / math.sqrt(math.pi) - tail) / z
    return np.where(~near & (x < 0), 2 - out, out)


def erf(x: Array) -> Array:
    """Error function, relative error about 1e-15 in float64."""
    near = np.abs(x) <= 0.46875
    square = np.square(np.where(near, x, 0))
    return np.where(near, x * (_horner(_ERF_P, square) / _horner(_ERF_Q, square)), 1 - erfc(x))


def silu(x: Array) -> Array:
    """``x / (1 + exp(-x))``."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def gelu(x: Array) -> Array:
    """``x / 2 * (1 + erf(x / sqrt 2))``, written with erfc so that the negative tail keeps its digits."""
    return 0.5 * x * erfc(x * -math.sqrt(0.5))


def gelu_tanh(x: Array) -> Array:
    """``x / 2 * (1 + tanh(u))``, ``u = sqrt(2 / pi) * (x + 0.044715 x^3)``.

    Written ``x / (1 + exp(-2 u))``, the same function, so that the negative tail keeps its digits.
    """
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def act_and_mul(x: Array, act: Callable[[Array], Array]) -> Array:
    """``act(gate) * up`` with gate the FIRST half of the last dimension, rounded once.

    Parameters
    ----------
    x : [..., 2 * hidden]
    act : callable on float32 or float64 arrays

    Returns
    -------
    Array
        ``[..., hidden]`` in the dtype of `x`.

    Source: Shazeer 2020; flashinfer.activation.
    """
    half = x.shape[-1] // 2
    ct = compute_dtype(x)
    gate, up = upcast(x[..., :half], ct), upcast(x[..., half:], ct)
    return round_to(act(gate) * up, x.dtype)


def silu_and_mul(x: Array) -> Array:
    """``silu(x[..., :h]) * x[..., h:]``; see `act_and_mul`."""
    return act_and_mul(x, silu)


def gelu_and_mul(x: Array) -> Array:
    """``gelu(x[..., :h]) * x[..., h:]`` with the exact error function; see `act_and_mul`."""
    return act_and_mul(x, gelu)


def gelu_tanh_and_mul(x: Array) -> Array:
    """``gelu_tanh(x[..., :h]) * x[..., h:]``; see `act_and_mul`."""
    return act_and_mul(x, gelu_tanh)
