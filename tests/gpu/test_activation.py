"""The gated activations against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import activation, reference
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")

ACTS = ["silu", "gelu", "gelu_tanh"]
SHAPES = [(1, 16), (3, 64), (0, 32), (5, 1152), (300, 2000), (2, 3, 128), (8,), (1, 28672)]


def run(act, x, **kwargs):
    return getattr(activation, f"{act}_and_mul")(x, **kwargs)


def want(act, x):
    return getattr(reference.activation, f"{act}_and_mul")(x.astype(np.float64))


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values(rng, act, dtype):
    for shape in SHAPES:
        x = normal(rng, shape, dtype, 3.0)
        out = poisoned((*shape[:-1], shape[-1] // 2), dtype)
        assert run(act, on_gpu(x), out=out) is out
        assert_close(to_float64(out), want(act, x), dtype, what=str(shape))


@pytest.mark.parametrize("act", ACTS)
def test_two_vectors_a_thread(rng, act):
    x = normal(rng, (170, 2 * 12344))  # over 2^18 vectors, and CTAs that span rows
    assert_close(to_float64(run(act, on_gpu(x))), want(act, x), "bfloat16")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_large_arguments_do_not_overflow(act, dtype):
    gate = np.array([-3e4, -1e3, -100, -20, -5, -0.0, 5, 20, 100, 1e3, 3e4, 1, 2, 3, 4, 5], np.float32)
    x = np.concatenate([gate, np.ones_like(gate)])[None].astype(normal(np.random.default_rng(0), (1,), dtype).dtype)
    assert_close(to_float64(run(act, on_gpu(x))), want(act, x), dtype)


@pytest.mark.older_archs
def test_strided_rows_in_and_out(rng):
    base = normal(rng, (9, 3, 96))
    out = poisoned((5, 3, 40), "bfloat16")
    run("silu", on_gpu(base)[::2, :, 16:80], out=out[..., 8:])
    assert_close(to_float64(out[..., 8:]), want("silu", base[::2, :, 16:80]), "bfloat16")
    assert np.isnan(to_float64(out[..., :8])).all()


def test_row_dimensions_that_do_not_merge(rng):
    base = normal(rng, (4, 4, 6, 32), "float16")
    view = base.transpose(1, 0, 2, 3)[::3, ::2, ::2]
    got = run("gelu", on_gpu(base).transpose(1, 0, 2, 3)[::3, ::2, ::2])
    assert_close(to_float64(got), want("gelu", view), "float16")


@pytest.mark.older_archs
def test_misaligned_rows(rng):
    base = normal(rng, (6, 131), "float16")
    for start, width in ((1, 64), (2, 128), (3, 16)):  # the second has halves of 64, at 4 bytes
        got = run("silu", on_gpu(base)[:, start : start + width])
        assert_close(to_float64(got), want("silu", base[:, start : start + width]), "float16")
    odd = normal(rng, (3, 24), "float16")  # halves of 12 elements: the second starts at 8 bytes
    assert_close(to_float64(run("silu", on_gpu(odd))), want("silu", odd), "float16")


def test_same_bits_with_and_without_pdl(rng):
    x = on_gpu(normal(rng, (64, 4096)))
    first = run("silu", x)
    for pdl in (False, True, None):
        assert (run("silu", x, enable_pdl=pdl).view("uint16") == first.view("uint16")).all()


def test_graph_capture(rng):
    x, out = on_gpu(normal(rng, (4, 256))), poisoned((4, 128), "bfloat16")
    run("silu", x, out=out)  # compiled and loaded before the capture
    cupy.cuda.get_current_stream().synchronize()
    stream = new_stream()
    with stream:
        stream.begin_capture()
        run("silu", x, out=out)
        graph = stream.end_capture()
        x[...] = on_gpu(normal(rng, (4, 256)))
        graph.launch()
        stream.synchronize()
    assert_close(to_float64(out), reference.activation.silu_and_mul(to_float64(x)), "bfloat16")
