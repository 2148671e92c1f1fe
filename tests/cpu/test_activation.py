"""The gated activations on CPU arrays: values against Python's math, strides, `out`, error texts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fi_cupy import activation, errors
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

SCALAR = {
    "silu_and_mul": lambda x: x / (1 + math.exp(-x)),
    "gelu_and_mul": lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh_and_mul": lambda x: x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def naive(name, x):
    x = x.astype(np.float64)
    half = x.shape[-1] // 2
    return np.vectorize(SCALAR[name], otypes=[np.float64])(x[..., :half]) * x[..., half:]


@pytest.mark.parametrize("name", SCALAR)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 16), (16,), (0, 32)])
def test_trap_25_the_gate_is_the_first_half(rng, name, dtype, shape):
    x = normal(rng, shape, dtype, 2.0)
    got = getattr(activation, name)(x)
    assert got.dtype == x.dtype
    assert_close(got, naive(name, x), dtype)


def test_strided_input_and_out(rng):
    base, out = normal(rng, (6, 40), "float32"), np.full((3, 20), np.nan, np.float32)
    target = out[:, 4:12]
    assert activation.silu_and_mul(base[::2, 8:24], out=target) is target
    assert_close(target, naive("silu_and_mul", base[::2, 8:24]), "float32")
    assert np.isnan(out[:, :4]).all() and np.isnan(out[:, 12:]).all()


def test_torch_and_jax_on_the_cpu(rng):
    x = normal(rng, (3, 64), "float32")
    torch = pytest.importorskip("torch")
    got = activation.gelu_and_mul(torch.from_numpy(x))
    assert isinstance(got, torch.Tensor)
    assert_close(got.numpy(), naive("gelu_and_mul", x), "float32")
    jax = pytest.importorskip("jax")
    assert_close(activation.silu_and_mul(jax.numpy.asarray(x)), naive("silu_and_mul", x), "float32")


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda x: activation.silu_and_mul(x[:, :6]),
            errors.ShapeError,
            "silu_and_mul: input has shape (3, 6) of float32, expected an even last dimension",
        ),
        (lambda x: activation.gelu_and_mul(x.astype(np.float64)), errors.DTypeError, "gelu_and_mul: input has dtype"),
        (lambda x: activation.silu_and_mul(x[:, ::2]), errors.LayoutError, "silu_and_mul: input has inner stride 2"),
        (
            lambda x: activation.gelu_tanh_and_mul(x, out=x),
            errors.ShapeError,
            "gelu_tanh_and_mul: out has shape (3, 16), expected (3, 8) = input.shape with the last dimension halved",
        ),
        (
            lambda x: activation.silu_and_mul(x, out=x[:, :8].astype(np.float16)),
            errors.DTypeError,
            "silu_and_mul: out has dtype float16, expected float32 like input",
        ),
    ],
)
def test_errors(rng, call, error, text):
    with pytest.raises(error) as caught:
        call(normal(rng, (3, 16), "float32"))
    assert text in str(caught.value) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("shape", "axes", "merged"),
    [((4, 5, 8), (0, 1, 2), 1), ((1, 5, 8), (0, 1, 2), 1), ((4, 5, 8), (1, 0, 2), 2), ((2, 3, 4, 8), (2, 1, 0, 3), 3)],
)
def test_row_dimensions_merge_where_both_arrays_allow(shape, axes, merged):
    """Every row must be reached exactly once by (outer, inner) strides and the host's offsets."""
    from fi_cupy.arrays import view

    x = np.arange(np.prod(shape)).reshape(shape).transpose(axes)
    out = np.zeros(x.shape, x.dtype)
    dims = activation._row_dims(view(x), view(out))
    assert len(dims) == merged
    offsets = [(a, b) for a, b in activation._offsets(dims)]
    flat_x, flat_out = np.arange(x.size), out.reshape(-1)
    for a, b in offsets:
        flat_out[b : b + 8] = flat_x[a : a + 8]
    assert (out == x).all()
