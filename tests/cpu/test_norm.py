"""The norm operators on CPU arrays: values, in-place rules and error texts."""

from __future__ import annotations

import numpy as np
import pytest

import fi_cupy
from fi_cupy import errors
from fi_cupy.norm import norm_spec
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

DTYPES = ["float16", "bfloat16", "float32"]


def naive_rms(x, w, eps, bias=0.0):
    x, w = x.astype(np.float64), w.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * (w + bias)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 32), (0, 16), (1, 7)])
def test_rmsnorm_values(rng, dtype, shape):
    x, w = normal(rng, shape, dtype), normal(rng, shape[-1:], dtype)
    got = fi_cupy.rmsnorm(x, w, 1e-5)
    assert got.dtype == x.dtype
    assert_close(got, naive_rms(x, w, 1e-5), got.dtype)
    assert_close(fi_cupy.gemma_rmsnorm(x, w), naive_rms(x, w, 1e-6, 1.0), got.dtype)


def test_out_is_honoured_and_returned(rng):
    x, w = normal(rng, (3, 8), "float32"), normal(rng, (8,), "float32")
    out = np.full((3, 8), np.nan, np.float32)
    assert fi_cupy.rmsnorm(x, w, out=out) is out
    assert_close(out, naive_rms(x, w, 1e-6), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_trap_24_norm_uses_the_sum_before_rounding(rng, dtype):
    x, r, w = normal(rng, (4, 32), dtype), normal(rng, (4, 32), dtype), normal(rng, (32,), dtype)
    total = x.astype(np.float64) + r.astype(np.float64)
    want = naive_rms(total, w, 1e-6)
    fi_cupy.fused_add_rmsnorm(x, r, w)
    assert_close(r, total, dtype)
    assert_close(x, want, dtype)


def test_strided_rows(rng):
    base = normal(rng, (6, 48), "float32")
    w = normal(rng, (16,), "float32")
    assert_close(fi_cupy.rmsnorm(base[::2, 16:32], w), naive_rms(base[::2, 16:32], w, 1e-6), "float32")


def test_layernorm(rng):
    x, g, b = normal(rng, (3, 64)), normal(rng, (64,), "float32"), normal(rng, (64,), "float32")
    y = x.astype(np.float64)
    want = (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6) * g + b
    assert_close(fi_cupy.layernorm(x, g, b), want, "bfloat16")


def test_trap_23_quantising_divides_and_clamps(rng):
    import ml_dtypes

    x, w = normal(rng, (3, 64)), normal(rng, (64,))
    out = np.empty((3, 64), ml_dtypes.float8_e4m3fn)
    fi_cupy.norm.rmsnorm_quant(out, x, w, 0.5)
    assert_close(out, naive_rms(x, w, 1e-6) / 0.5, "float8_e4m3fn")
    fi_cupy.norm.rmsnorm_quant(out, x, w, np.array([1e-6], np.float32))
    assert np.abs(out.astype(np.float32)).max() == 448.0


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda x, w: fi_cupy.rmsnorm(x, w[:4]),
            errors.ShapeError,
            "rmsnorm: weight has shape (4,), expected (8,) = input",
        ),
        (lambda x, w: fi_cupy.rmsnorm(x[0], w), errors.ShapeError, "rmsnorm: input is 1-D"),
        (lambda x, w: fi_cupy.rmsnorm(x.astype(np.float64), w), errors.DTypeError, "rmsnorm: input has dtype float64"),
        (lambda x, w: fi_cupy.rmsnorm(x, w.astype(np.float16)), errors.DTypeError, "weight has dtype float16"),
        (lambda x, w: fi_cupy.rmsnorm(x.T.copy().T, w), errors.LayoutError, "rmsnorm: input has inner stride 3"),
        (lambda x, w: fi_cupy.rmsnorm(x, w, out=x[:2]), errors.ShapeError, "rmsnorm: out has shape (2, 8)"),
        (lambda x, w: fi_cupy.rmsnorm([1.0], w), errors.FrameworkError, "rmsnorm: input is a builtins.list"),
        (lambda x, w: fi_cupy.fused_add_rmsnorm(x, x[:, :4], w), errors.ShapeError, "residual has shape"),
    ],
)
def test_errors_name_operator_argument_got_and_wanted(rng, call, error, text):
    x, w = normal(rng, (3, 8), "float32"), normal(rng, (8,), "float32")
    with pytest.raises(error) as caught:
        call(x, w)
    assert text in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_read_only_arrays_are_refused_in_place(rng):
    x, r, w = normal(rng, (3, 8), "float32"), normal(rng, (3, 8), "float32"), normal(rng, (8,), "float32")
    r.flags.writeable = False
    with pytest.raises(errors.ImmutableArrayError, match="read-only NumPy"):
        fi_cupy.fused_add_rmsnorm(x, r, w)


@pytest.mark.parametrize("hidden", [8, 64, 576, 4096, 8192, 16384, 65536])
def test_launch_shape_covers_the_row(hidden):
    from fi_cupy.dtypes import bfloat16

    spec = norm_spec(bfloat16, bfloat16, bfloat16, hidden, 8)
    config = dict(spec.config)
    assert spec.threads <= 1024 and config["kVecs"] <= 4
    in_registers = config["kLanes"] * config["kVecs"] * 8
    assert in_registers >= hidden or (spec.threads == 1024 and config["kVecs"] == 4)
