"""Reference norms and activations against Python loops in float64. `trap_NN` names the semantic a test pins down."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy.reference import activation, norm

BF16, E4M3, E5M2 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
HALF_TYPES = [np.float16, BF16]


def naive_rmsnorm(x, weight, eps, bias):
    out = np.zeros(x.shape)
    for row in np.ndindex(x.shape[:-1]):
        values = [float(t) for t in x[row]]
        rms = math.sqrt(sum(t * t for t in values) / len(values) + eps)
        for i, t in enumerate(values):
            out[(*row, i)] = t / rms * (float(weight[i]) + bias)
    return out


def naive_layernorm(x, gamma, beta, eps):
    out = np.zeros(x.shape)
    for row in np.ndindex(x.shape[:-1]):
        values = [float(t) for t in x[row]]
        mean = sum(values) / len(values)
        var = sum((t - mean) ** 2 for t in values) / len(values)
        for i, t in enumerate(values):
            out[(*row, i)] = (t - mean) / math.sqrt(var + eps) * float(gamma[i]) + float(beta[i])
    return out


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 6), (1, 1), (0, 4)])
@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_rmsnorm_matches_loops(shape, bias, eps):
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=shape), rng.normal(size=shape[-1])
    np.testing.assert_allclose(norm.rmsnorm(x, w, eps, weight_bias=bias), naive_rmsnorm(x, w, eps, bias), rtol=1e-12)


@pytest.mark.parametrize("dtype", [*HALF_TYPES, np.float32])
def test_trap_24_norm_computes_in_float32_and_rounds_once(dtype):
    rng = np.random.default_rng(2)
    x, w = rng.normal(size=(5, 64)).astype(dtype), rng.normal(size=64).astype(dtype)
    out = norm.rmsnorm(x, w, weight_bias=1.0)
    assert out.dtype == dtype
    exact = norm.rmsnorm(x.astype(np.float64), w.astype(np.float64), weight_bias=1.0)
    assert exact.dtype == np.float64
    # One rounding is at most half a unit in the last place away from the exact product.
    half_ulp = float(ml_dtypes.finfo(dtype).eps) / 2
    np.testing.assert_allclose(out.astype(np.float64), exact, rtol=half_ulp * 1.01 + 5e-7, atol=1e-7)


@pytest.mark.parametrize("bias", [0.0, 1.0])
@pytest.mark.parametrize("dtype", HALF_TYPES)
def test_trap_24_fused_add_normalises_the_unrounded_sum(bias, dtype):
    rng = np.random.default_rng(3)
    # The residual is 256 times the input: its rounding loses bits the norm must still see.
    x, res = rng.normal(size=(4, 32)).astype(dtype), (256 * rng.normal(size=(4, 32))).astype(dtype)
    w = rng.normal(size=32).astype(dtype)
    normed, new_residual = norm.fused_add_rmsnorm(x, res, w, weight_bias=bias)
    total = x.astype(np.float64) + res.astype(np.float64)
    assert normed.dtype == dtype and new_residual.dtype == dtype
    np.testing.assert_array_equal(new_residual, total.astype(dtype))
    exact = naive_rmsnorm(total, w, 1e-6, bias)
    np.testing.assert_allclose(
        normed.astype(np.float64), exact, rtol=float(ml_dtypes.finfo(dtype).eps) / 2 * 1.01 + 1e-6, atol=1e-7
    )
    from_rounded = naive_rmsnorm(total.astype(dtype), w, 1e-6, bias)
    assert np.abs(exact - from_rounded).max() > np.abs(exact - normed.astype(np.float64)).max() / 100
    assert np.any(from_rounded.astype(dtype) != normed)


def test_fused_add_is_pure():
    x, res, w = np.ones((2, 4)), np.full((2, 4), 2.0), np.ones(4)
    norm.fused_add_rmsnorm(x, res, w)
    assert np.all(x == 1) and np.all(res == 2)


def test_trap_24_layernorm_takes_float32_gamma_and_strided_bf16_rows():
    rng = np.random.default_rng(4)
    wide = rng.normal(size=(5, 40)).astype(BF16)
    x, gamma, beta = wide[:, :24], rng.normal(size=24).astype(np.float32), rng.normal(size=24).astype(np.float32)
    out = norm.layernorm(x, gamma, beta, 1e-5)
    assert out.dtype == BF16
    np.testing.assert_allclose(out.astype(np.float64), naive_layernorm(x, gamma, beta, 1e-5), rtol=4e-3, atol=1e-5)
    x64 = rng.normal(size=(3, 4)) + 100  # a large mean
    np.testing.assert_allclose(
        norm.layernorm(x64, gamma[:4], beta[:4]), naive_layernorm(x64, gamma[:4], beta[:4], 1e-6), rtol=1e-9
    )


@pytest.mark.parametrize(("dtype", "limit"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_trap_23_norm_quant_divides_and_clamps(dtype, limit):
    rng = np.random.default_rng(5)
    x, w = rng.normal(size=(3, 16)), rng.normal(size=16)
    scale = np.asarray([0.25], dtype=np.float32)
    expected = (naive_rmsnorm(x, w, 1e-6, 0.0) / 0.25).astype(dtype)
    np.testing.assert_array_equal(norm.rmsnorm_quant(x, w, scale, out_dtype=dtype), expected)
    tiny = norm.rmsnorm_quant(x, w, 1e-9, out_dtype=dtype).astype(np.float64)
    assert np.all(np.abs(tiny) == limit) and np.all(np.sign(tiny) == np.sign(x * w))
    res = rng.normal(size=(3, 16))
    quantised, new_residual = norm.fused_add_rmsnorm_quant(x, res, w, scale, weight_bias=1.0, out_dtype=dtype)
    np.testing.assert_array_equal(quantised, (naive_rmsnorm(x + res, w, 1e-6, 1.0) / 0.25).astype(dtype))
    np.testing.assert_array_equal(new_residual, x + res)
    got = norm.layernorm_quant(x, w, w, 0.5, out_dtype=dtype)
    np.testing.assert_array_equal(got, (naive_layernorm(x, w, w, 1e-6) / 0.5).astype(dtype))


# --- activations ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-30, 30), min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_erf_and_erfc_are_accurate(values):
    x = np.asarray(values)
    np.testing.assert_allclose(activation.erf(x), [math.erf(t) for t in values], rtol=2e-15)
    expected = np.asarray([math.erfc(t) for t in values])
    np.testing.assert_allclose(activation.erfc(x), expected, rtol=3e-15, atol=1e-305)


@pytest.mark.filterwarnings("error")
def test_erf_on_a_grid_and_at_the_ends():
    x = np.concatenate([np.linspace(-7, 7, 20001), [0.46875, np.nextafter(0.46875, 1), 4.0, np.nextafter(4.0, 5)]])
    np.testing.assert_allclose(activation.erf(x), [math.erf(t) for t in x], rtol=2e-15)
    np.testing.assert_allclose(activation.erfc(x), [math.erfc(t) for t in x], rtol=3e-15)
    ends = np.asarray([-np.inf, np.inf, np.nan, -1e300, 1e300, 0.0])
    np.testing.assert_array_equal(activation.erf(ends), [-1, 1, np.nan, -1, 1, 0])
    np.testing.assert_array_equal(activation.erfc(ends), [2, 0, np.nan, 2, 0, 1])
    single = x.astype(np.float32)
    assert activation.erf(single).dtype == np.float32
    np.testing.assert_allclose(activation.erf(single), [math.erf(t) for t in single], rtol=5e-7)


SCALAR = {
    "silu_and_mul": lambda t: t / (1 + math.exp(-t)),
    "gelu_and_mul": lambda t: 0.5 * t * math.erfc(-t / math.sqrt(2)),
    "gelu_tanh_and_mul": lambda t: 0.5 * t * (1 + math.tanh(math.sqrt(2 / math.pi) * (t + 0.044715 * t**3))),
}


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, *HALF_TYPES])
def test_trap_25_the_gate_is_the_first_half(name, dtype):
    x = (3 * np.random.default_rng(6).normal(size=(2, 3, 10))).astype(dtype)
    out = getattr(activation, name)(x)
    assert out.shape == (2, 3, 5) and out.dtype == dtype
    expected = np.zeros(out.shape)
    for at in np.ndindex(out.shape):
        gate, up = float(x[at]), float(x[(*at[:-1], at[-1] + 5)])
        expected[at] = SCALAR[name](gate) * up
    eps = float(ml_dtypes.finfo(dtype).eps)
    np.testing.assert_allclose(out.astype(np.float64), expected, rtol=max(4 * eps, 1e-12), atol=eps)


def test_trap_25_exact_and_tanh_gelu_differ():
    x = np.asarray([[-2.0, 1.0]])
    difference = activation.gelu_and_mul(x) - activation.gelu_tanh_and_mul(x)
    assert 1e-5 < abs(float(difference[0, 0])) < 1e-3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", SCALAR)
def test_activations_are_finite_at_large_arguments(name):
    x = np.asarray([[-3e4, 3e4, 1.0, 1.0]], dtype=np.float32)
    out = getattr(activation, name)(x)
    assert out[0, 0] == 0 and out[0, 1] == np.float32(3e4)
