"""Products of rows divided by their root mean square: the kernel on the CPU, the reference, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from emulate import HOPPER, available, device, emulated

from fi_cupy import errors, gemm
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16, float16
from fi_cupy.gemm import dense
from fi_cupy.gemm.instances import with_residual
from fi_cupy.gemm.select import FEW_MAX, H100, select_mm_kernel, select_rms_kernel
from fi_cupy.testing.generators import normal

EPS = 1e-5


def exact(x, w, bias=None, residual=None, eps=EPS):
    """``norm(x) @ w.T + bias + residual`` in float64, each row on its own."""
    out = []
    for row in x.astype(np.float64):
        out.append(row / np.sqrt((row**2).sum() / len(row) + eps) @ w.astype(np.float64).T)
    total = np.array(out).reshape(len(x), len(w))
    for term in (bias, residual):
        if term is not None:
            total = total + term.astype(np.float64)
    return total


def swiglu(x, w):
    gate, up = np.split(exact(x, w), 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def close(got, want, tolerance=0.008):
    got = np.asarray(got).astype(np.float64)
    assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-6)


@pytest.mark.skipif(not available(), reason="the emulator needs g++ on x86-64")
@pytest.mark.parametrize("m,n,k,dtype", [(1, 24, 576, "bfloat16"), (5, 40, 72, "float16"), (13, 40, 136, "bfloat16")])
def test_kernel(rng, m, n, k, dtype):
    """Rows of very different sizes, in place of the residual, with and without dependent launch's other shape."""
    x, w, bias = normal(rng, (m, k), dtype), normal(rng, (2 * n, k), dtype), normal(rng, (n,), dtype)
    x = (x.astype(np.float32) * np.float32(4.0) ** rng.integers(-4, 4, (m, 1))).astype(x.dtype)
    residual = normal(rng, (m, n), dtype)
    with emulated(HOPPER, dense):
        for pdl in (False, True):
            out = device(residual.copy())
            gemm.mm_bf16(device(x), device(w[:n]).T, device(bias), pdl=pdl, out=out, residual=out, rms_eps=EPS)
            close(out, exact(x, w[:n], bias, residual))
            close(gemm.mm_bf16_swiglu(device(x), device(w).T, pdl=pdl, rms_eps=EPS), swiglu(x, w))
            wide = gemm.mm_bf16(device(x), device(w[:n]).T, pdl=pdl, out_dtype="float32", rms_eps=EPS)
            close(wide, exact(x, w[:n]), 1e-4)


@pytest.mark.skipif(not available(), reason="the emulator needs g++ on x86-64")
@pytest.mark.parametrize("out", ["bfloat16", "float32"])
@pytest.mark.parametrize("m,n,k", [(1, 40, 1096), (5, 40, 576)], ids=str)
def test_residual_is_asked_for_early(rng, m, n, k, out):
    """By both kernels of few rows, in place and beside the result, with a bias."""
    x, w, bias = normal(rng, (m, k), "bfloat16"), normal(rng, (n, k), "bfloat16"), normal(rng, (n,), "bfloat16")
    residual = normal(rng, (m, n), out)
    want = x.astype(np.float64) @ w.astype(np.float64).T + bias.astype(np.float64) + residual.astype(np.float64)
    with emulated(HOPPER, dense):
        for pdl in (False, True):
            in_place = device(residual.copy())
            gemm.mm_bf16(device(x), device(w).T, device(bias), pdl=pdl, out=in_place, residual=in_place)
            close(in_place, want)
            beside = gemm.mm_bf16(device(x), device(w).T, device(bias), out_dtype=out, residual=device(residual))
            assert np.asarray(beside).tobytes() == np.asarray(in_place).tobytes() or pdl


def test_reference_on_the_cpu(rng):
    x, w = normal(rng, (20, 24), "float32"), normal(rng, (32, 24), "float32")
    close(gemm.mm_bf16(x, w.T, rms_eps=EPS), exact(x, w), 1e-5)
    close(gemm.mm_bf16_swiglu(x, w.T, rms_eps=EPS), swiglu(x, w), 1e-5)
    assert dense.takes_rms(x[:FEW_MAX]) and not dense.takes_rms(x)
    zero = np.zeros((2, 24), np.float32)
    assert not np.asarray(gemm.mm_bf16(zero, w.T, rms_eps=EPS)).any()
    # Without the option nothing is divided, and a large eps divides more.
    close(gemm.mm_bf16(x, w.T), x.astype(np.float64) @ w.T.astype(np.float64), 1e-5)
    close(gemm.mm_bf16(x, w.T, rms_eps=3.0), exact(x, w, eps=3.0), 1e-5)


@pytest.mark.parametrize("eps", [-1e-6, float("nan"), float("inf")])
def test_eps_out_of_range(eps):
    x = np.ones((1, 8), np.float32)
    with pytest.raises(errors.ArgumentError, match=r"mm_bf16: rms_eps is .*, expected a number of at least 0"):
        gemm.mm_bf16(x, np.ones((8, 8), np.float32).T, rms_eps=eps)
    with pytest.raises(errors.ArgumentError, match=r"mm_bf16_swiglu: rms_eps is .*, expected a number of at least 0"):
        gemm.mm_bf16_swiglu(x, np.ones((16, 8), np.float32).T, rms_eps=eps)


def test_instances_with_a_residual():
    for m, k in ((1, 4096), (8, 4096), (64, 4096)):
        spec, _ = select_mm_kernel(m, 4096, k, H100)
        made = with_residual(spec)
        if spec.function in ("gemm_rows", "gemm_few"):
            assert made.symbol == f"{spec.symbol}_residual" and dict(made.config)["kResidual"] is True
            assert dict(spec.config)["kResidual"] is False
        else:
            assert made is spec


def test_what_few_rows_are():
    a10 = DeviceInfo(86, "86", 72, 99 << 10, 100 << 10, 6 << 20)
    t4 = DeviceInfo(75, "75", 40, 64 << 10, 64 << 10, 4 << 20)
    for gpu, dtype, rows in ((H100, bfloat16, FEW_MAX), (a10, bfloat16, FEW_MAX), (t4, float16, FEW_MAX)):
        found = select_rms_kernel(rows, 960, 576, gpu, dtype, dtype, pdl=True)
        assert found is not None and found[0].function == "gemm_few_rms" and found[1] == (60, 1, 1)
        assert select_rms_kernel(rows + 1, 960, 576, gpu, dtype, dtype) is None
    assert select_rms_kernel(1, 960, 576, t4, bfloat16) is None


@pytest.mark.skipif(not available(), reason="the emulator needs g++ on x86-64")
def test_more_rows_are_refused(rng):
    x, w = normal(rng, (17, 16), "bfloat16"), normal(rng, (16, 16), "bfloat16")
    with emulated(HOPPER, dense):
        assert not dense.takes_rms(device(x)) and dense.takes_rms(device(x[:16]))
        with pytest.raises(errors.UnsupportedError, match="mm_bf16: rms_eps is given with 17 rows of bfloat16"):
            gemm.mm_bf16(device(x), device(w).T, rms_eps=EPS)
        with pytest.raises(errors.UnsupportedError, match="mm_bf16_swiglu: rms_eps is given with 17 rows"):
            gemm.mm_bf16_swiglu(device(x), device(w).T, rms_eps=EPS)
        with pytest.raises(errors.LayoutError, match="rms_eps is given with a b dense along n"):
            gemm.mm_bf16(device(x[:4]), device(w), rms_eps=EPS)
