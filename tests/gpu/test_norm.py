"""The norm kernels against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

import fi_cupy
from fi_cupy import reference
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
SHAPES = [(1, 8), (3, 64), (5, 576), (7, 4096), (2, 8192), (2, 40000), (3, 100), (4, 7), (0, 64), (300, 1000)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rmsnorm(rng, dtype, shape):
    x, w = normal(rng, shape, dtype, 3.0), normal(rng, shape[-1:], dtype)
    out = poisoned(shape, dtype)
    assert fi_cupy.rmsnorm(on_gpu(x), on_gpu(w), 1e-5, out=out) is out
    want = reference.norm.rmsnorm(x.astype(np.float64), w.astype(np.float64), 1e-5)
    assert_close(to_float64(out), want, dtype)
    gemma = fi_cupy.gemma_rmsnorm(on_gpu(x), on_gpu(w))
    assert_close(
        to_float64(gemma), reference.norm.rmsnorm(x.astype(np.float64), w.astype(np.float64), weight_bias=1.0), dtype
    )


@pytest.mark.older_archs
def test_rmsnorm_heads_and_strides(rng):
    qkv = normal(rng, (6, 15, 128))
    w = normal(rng, (128,))
    device = on_gpu(qkv)
    got = fi_cupy.rmsnorm(device[:, 3:9], on_gpu(w))
    want = reference.norm.rmsnorm(qkv[:, 3:9].astype(np.float64), w.astype(np.float64))
    assert_close(to_float64(got), want, "bfloat16")
    rows = on_gpu(normal(rng, (8, 515), "float16"))  # misaligned rows: narrower accesses
    w = on_gpu(normal(rng, (64,), "float16"))
    got = fi_cupy.rmsnorm(rows[::2, 3:67], w)
    want = reference.norm.rmsnorm(to_float64(rows)[::2, 3:67], to_float64(w))
    assert_close(to_float64(got), want, "float16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_fused_add_rmsnorm(rng, dtype, shape):
    x, r, w = normal(rng, shape, dtype), normal(rng, shape, dtype), normal(rng, shape[-1:], dtype)
    gx, gr = on_gpu(x), on_gpu(r)
    fi_cupy.fused_add_rmsnorm(gx, gr, on_gpu(w))
    normed, total = reference.norm.fused_add_rmsnorm(*(a.astype(np.float64) for a in (x, r, w)))
    assert_close(to_float64(gr), total, dtype)
    assert_close(to_float64(gx), normed, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(3, 64), (5, 4096), (2, 40000), (3, 100)])
def test_layernorm(rng, dtype, shape):
    x = normal(rng, shape, dtype) + normal(rng, (shape[0], 1), dtype, 10.0)
    g, b = normal(rng, shape[-1:], "float32"), normal(rng, shape[-1:], "float32")
    got = fi_cupy.layernorm(on_gpu(x), on_gpu(g), on_gpu(b))
    want = reference.norm.layernorm(x.astype(np.float64), g.astype(np.float64), b.astype(np.float64))
    assert_close(to_float64(got), want, dtype)


@pytest.mark.older_archs
def test_quantised_outputs(rng):
    x, r, w = normal(rng, (5, 576)), normal(rng, (5, 576)), normal(rng, (576,))
    for scale in (0.25, cupy.asarray([0.25], dtype=cupy.float32)):
        out = poisoned((5, 576), "float8_e4m3fn")
        fi_cupy.norm.rmsnorm_quant(out, on_gpu(x), on_gpu(w), scale)
        want = reference.norm.rmsnorm(x.astype(np.float64), w.astype(np.float64)) / 0.25
        assert_close(out.get().view(reference.norm.E4M3), want, "float8_e4m3fn")
        gr = on_gpu(r)
        fi_cupy.norm.fused_add_rmsnorm_quant(out, on_gpu(x), gr, on_gpu(w), scale)
        normed, total = reference.norm.fused_add_rmsnorm(*(a.astype(np.float64) for a in (x, r, w)))
        assert_close(out.get().view(reference.norm.E4M3), normed / 0.25, "float8_e4m3fn")
        assert_close(to_float64(gr), total, "bfloat16")


def test_same_input_same_bits_and_pdl(rng):
    x, w = on_gpu(normal(rng, (64, 4096))), on_gpu(normal(rng, (4096,)))
    first = fi_cupy.rmsnorm(x, w)
    for pdl in (False, True, None):
        assert (fi_cupy.rmsnorm(x, w, enable_pdl=pdl).view("uint16") == first.view("uint16")).all()


def test_graph_capture(rng):
    x, w = on_gpu(normal(rng, (4, 256))), on_gpu(normal(rng, (256,)))
    out = poisoned((4, 256), "bfloat16")
    fi_cupy.rmsnorm(x, w, out=out)  # compiled and loaded before the capture
    stream = new_stream()
    with stream:
        stream.begin_capture()
        fi_cupy.rmsnorm(x, w, out=out)
        graph = stream.end_capture()
        x[...] = on_gpu(normal(rng, (4, 256)))
        graph.launch()
        stream.synchronize()
    assert_close(to_float64(out), reference.norm.rmsnorm(to_float64(x), to_float64(w)), "bfloat16")
