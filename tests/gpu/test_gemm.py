"""mm_bf16 and bmm_bf16 against the float64 product, through every kernel and every tile."""

from __future__ import annotations

import numpy as np
import pytest

import fi_cupy
from fi_cupy import errors, reference
from fi_cupy.device import DeviceInfo, device_info
from fi_cupy.dtypes import bfloat16, float16
from fi_cupy.gemm import bmm_bf16, mm_bf16
from fi_cupy.gemm.select import H100, select_mm_kernel
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
ROWS = [1, 2, 3, 7, 16, 17, 64, 65, 200]
NK = [(8, 8), (72, 200), (576, 576), (136, 1544), (264, 4104)]
OTHER_GPUS = [
    DeviceInfo(80, "80", 108, 163 << 10, 164 << 10, 40 << 20),
    DeviceInfo(89, "89", 128, 99 << 10, 100 << 10, 72 << 20),
    DeviceInfo(75, "75", 40, 64 << 10, 64 << 10, 4 << 20),
]


def padded(rng, rows: int, columns: int, dtype, pad: int = 8):
    """Random values inside a wider array of NaN, on the GPU and in NumPy: what lies beside a row must not leak."""
    base = np.full((rows + 1, columns + 2 * pad), np.nan, normal(rng, (1,), dtype).dtype)
    base[:rows, pad : pad + columns] = normal(rng, (rows, columns), dtype)
    return on_gpu(base)[:rows, pad : pad + columns], base[:rows, pad : pad + columns].astype(np.float64)


def launch(spec, grid, a, b, out, m: int, n: int, k: int) -> None:
    strides = [x.strides[0] // x.itemsize for x in (a, b, out)]
    load_kernel(spec, 0).launch(grid, 0, a.data.ptr, b.data.ptr, 0, out.data.ptr, *strides, 0, 0, 0, m, n, k, 0, 0, 0)


def same_bits(x, y) -> bool:
    return bool((x.view("uint8") == y.view("uint8")).all())


@pytest.mark.parametrize("nk", NK, ids=str)
@pytest.mark.parametrize("m", ROWS)
def test_values(rng, m, nk):
    n, k = nk
    a, a64 = padded(rng, m, k, "bfloat16")
    w, w64 = padded(rng, n, k, "bfloat16")
    bias = normal(rng, (n,))
    out = poisoned((m, n), "bfloat16")
    assert mm_bf16(a, w.T, on_gpu(bias), out=out) is out
    assert_close(to_float64(out), a64 @ w64.T + bias.astype(np.float64), "bfloat16", "product")
    again = poisoned((m, n), "bfloat16")
    mm_bf16(a, w.T, on_gpu(bias), out=again)
    assert same_bits(out, again)


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("m", [1, 2, 8, 16, 17, 64, 200])
def test_residual_in_place_behind_its_writer(rng, m, out_dtype):
    """A dependent launch asks for the residual as soon as it may: not before the kernel in front has written it."""
    for n, k in [(8, 8), (576, 576), (576, 1536), (264, 4104), (4096, 4096)]:
        a, a64 = padded(rng, m, k, "bfloat16")
        w, w64 = padded(rng, n, k, "bfloat16")
        bias, residual = normal(rng, (n,), "bfloat16"), on_gpu(normal(rng, (m, n), out_dtype))
        want = a64 @ w64.T + bias.astype(np.float64) + to_float64(residual)
        for pdl in (False, True):
            out = cupy.zeros_like(residual)
            for _ in range(2):
                out[...] = residual
                mm_bf16(a, w.T, on_gpu(bias), pdl=pdl, out=out, residual=out)
            assert_close(to_float64(out), want, out_dtype, "product")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("m", [1, 3, 8, 9, 16])
def test_rows_over_their_root_mean_square(rng, m, dtype):
    """Rows of very different sizes, the residual in place; a dependent launch right behind what writes the rows."""
    for n, k in [(8, 8), (72, 200), (960, 576), (576, 576), (136, 1544), (264, 4104), (49152, 576)]:
        _, a64 = padded(rng, m, k, dtype)
        w, w64 = padded(rng, 2 * n, k, dtype)
        size = on_gpu((4.0 ** rng.integers(-4, 4, (m, 1))).astype(np.float32))
        rows, bias = on_gpu((a64 * size.get()).astype(normal(rng, (1,), dtype).dtype)), normal(rng, (n,), dtype)
        sized = to_float64(rows)
        normed = sized / np.sqrt((sized**2).mean(axis=1, keepdims=True) + 1e-5)
        residual = normal(rng, (m, n), dtype)
        want = normed @ w64[:n].T + bias.astype(np.float64) + residual.astype(np.float64)
        gate, up = normed @ w64[:n].T, normed @ w64[n:].T
        gated = gate / (1 + np.exp(-gate)) * up
        for pdl in (False, True):
            x, out, both = cupy.zeros_like(rows), on_gpu(residual), poisoned((m, n), dtype)
            x[...] = rows
            mm_bf16(x, w[:n].T, on_gpu(bias), pdl=pdl, out=out, residual=out, rms_eps=1e-5)
            assert_close(to_float64(out), want, dtype, "product")
            x[...] = rows
            fi_cupy.gemm.mm_bf16_swiglu(x, w.T, pdl=pdl, out=both, rms_eps=1e-5)
            assert_close(to_float64(both), gated, dtype, "product")
            wide = mm_bf16(x, w[:n].T, pdl=pdl, out_dtype="float32", rms_eps=1e-5)
            assert_close(to_float64(wide), gate, "float32", "product")


@pytest.mark.parametrize("m", [1, 3, 16, 17, 65, 200])
@pytest.mark.parametrize("out_dtype", ["float16", "float32"])
def test_float16_and_output_types(rng, m, out_dtype):
    (a, a64), (w, w64) = padded(rng, m, 328, "float16"), padded(rng, 72, 328, "float16")
    wide = poisoned((m, 88), out_dtype)
    got = mm_bf16(a, w.T, out=wide[:, 8:80])  # strided rows of out, and nothing beside them is written
    assert_close(to_float64(got), a64 @ w64.T, out_dtype, "product")
    assert np.isnan(to_float64(wide)[:, :8]).all() and np.isnan(to_float64(wide)[:, 80:]).all()
    made = mm_bf16(a, w.T, out_dtype=out_dtype)
    assert made.dtype == np.dtype(out_dtype)
    np.testing.assert_array_equal(to_float64(made), to_float64(got))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(1, 72, 200), (17, 8, 8), (65, 136, 584), (200, 264, 328), (600, 1096, 72)])
def test_row_major_b(rng, dtype, shape):
    m, n, k = shape
    (a, a64), (b, b64) = padded(rng, m, k, dtype), padded(rng, k, n, dtype)
    out = poisoned((m, n), dtype)
    mm_bf16(a, b, out=out)
    assert_close(to_float64(out), a64 @ b64, dtype, "product")


@pytest.mark.parametrize("shape", [(1, 49152, 576), (13, 49152, 576), (61, 4096, 4096), (300, 3072, 576)])
def test_long_streams_and_large_tiles(rng, shape):
    m, n, k = shape
    a, w = normal(rng, (m, k)), normal(rng, (n, k))
    out = poisoned((m, n), "float32")
    mm_bf16(on_gpu(a), on_gpu(w).T, out=out)
    assert_close(to_float64(out), a.astype(np.float32) @ w.astype(np.float32).T, "float32", "product")


@pytest.mark.parametrize("m", [3, 40, 700])
@pytest.mark.parametrize("device", OTHER_GPUS, ids=lambda d: d.arch)
@pytest.mark.parametrize("dtype", [bfloat16, float16], ids=str)
def test_kernels_chosen_for_other_gpus(rng, m, device, dtype):
    n, k = 1096, 136
    (a, a64), (w, w64) = padded(rng, m, k, dtype), padded(rng, n, k, dtype)
    for row_major in (False, True):
        b = on_gpu(np.ascontiguousarray(w64.T).astype(dtype.np)) if row_major else w
        out = poisoned((m, n), dtype)
        spec, grid = select_mm_kernel(m, n, k, device, dtype, dtype, row_major_b=row_major)
        launch(spec, grid, a, b, out, m, n, k)
        assert_close(to_float64(out), a64 @ w64.T, dtype, "product", spec.symbol)


def test_every_tile(rng):
    """Each tile of the shared-memory kernel on one odd shape, both layouts of b."""
    from fi_cupy.gemm.instances import TILES, tiled_spec

    m, n, k = 333, 200, 168
    (a, a64), (w, w64) = padded(rng, m, k, "bfloat16"), padded(rng, n, k, "bfloat16")
    transposed = on_gpu(np.ascontiguousarray(w64.T).astype(bfloat16.np))
    for block_m, block_n, _, _ in TILES:
        for block_k, stages, row_major in ((64, 3, False), (32, 2, True)):
            spec = tiled_spec(bfloat16, bfloat16, block_m, block_n, block_k, stages, 2, row_major)
            out = poisoned((m, n), "bfloat16")
            launch(spec, -(-m // block_m) * -(-n // block_n), a, transposed if row_major else w, out, m, n, k)
            assert_close(to_float64(out), a64 @ w64.T, "bfloat16", "product", spec.symbol)


@pytest.mark.older_archs
@pytest.mark.parametrize("m", [1, 5, 100])
def test_batched(rng, m):
    a, w = normal(rng, (3, m, 72)), normal(rng, (3, 40, 72))
    want = a.astype(np.float64) @ w.astype(np.float64).swapaxes(1, 2)
    ga, gw = on_gpu(a), on_gpu(w)
    out = poisoned((3, m, 40), "bfloat16")
    assert bmm_bf16(ga, gw.swapaxes(1, 2), out=out) is out
    assert_close(to_float64(out), want, "bfloat16", "product")
    got = bmm_bf16(ga, on_gpu(np.ascontiguousarray(w.swapaxes(1, 2))), out_dtype="float32")
    assert_close(to_float64(got), want, "float32", "product")
    heads = on_gpu(np.ascontiguousarray(a.swapaxes(0, 1))).swapaxes(0, 1)  # [m, batch, k] memory
    assert_close(to_float64(bmm_bf16(heads, gw.swapaxes(1, 2))), want, "bfloat16", "product")


def test_no_rows(rng):
    w = on_gpu(normal(rng, (16, 8)))
    assert mm_bf16(on_gpu(normal(rng, (0, 8))), w.T).shape == (0, 16)
    assert bmm_bf16(on_gpu(normal(rng, (2, 0, 8))), on_gpu(normal(rng, (2, 16, 8))).swapaxes(1, 2)).shape == (2, 0, 16)


def test_values_that_are_not_finite_stay_in_their_row_and_column(rng):
    a, w = normal(rng, (20, 64)), normal(rng, (48, 64))
    a[3, 5], w[7, 9] = np.inf, np.nan
    for m in (1, 20):
        got = to_float64(mm_bf16(on_gpu(a[:m]), on_gpu(w).T))
        bad = np.zeros((m, 48), bool)
        bad[3:4], bad[:, 7] = True, True
        assert np.isfinite(got[~bad]).all() and np.isnan(got[:, 7]).all() and not np.isfinite(got[3:4]).any()


def test_misaligned_rows_are_refused(rng):
    x, w = on_gpu(normal(rng, (4, 80))), on_gpu(normal(rng, (16, 64)))
    with pytest.raises(errors.LayoutError, match="mm_bf16: a starts at address"):
        mm_bf16(x[:, 3:67], w.T)
    with pytest.raises(errors.LayoutError, match="mm_bf16: b starts at address"):
        mm_bf16(x[:, :64], on_gpu(normal(rng, (16, 68)))[:, :64].T)
    with pytest.raises(errors.LayoutError, match="mm_bf16: out starts at address"):
        mm_bf16(x[:, :64], w.T, out=poisoned((4, 20), "bfloat16")[:, :16])
    with pytest.raises(errors.DTypeError, match="mm_bf16: a has dtype float32"):
        mm_bf16(on_gpu(normal(rng, (4, 64), "float32")), w.T)


@pytest.mark.parametrize("m", [1, 16, 64, 200])
def test_dependent_launch_gives_the_same_bits(rng, m):
    """A chain in which every launch may begin before its predecessor ends, against one that waits for each."""
    x, scale, w = on_gpu(normal(rng, (m, 576))), on_gpu(normal(rng, (576,))), on_gpu(normal(rng, (576, 576)))
    waiting, chained = x.copy(), x.copy()
    for _ in range(20):
        waiting = fi_cupy.rmsnorm(waiting, scale)
        cupy.cuda.get_current_stream().synchronize()
        waiting = mm_bf16(waiting, w.T, pdl=True)
        cupy.cuda.get_current_stream().synchronize()
        chained = mm_bf16(fi_cupy.rmsnorm(chained, scale, enable_pdl=True), w.T, pdl=True)
    assert same_bits(waiting, chained)


@pytest.mark.parametrize("m", [1, 16, 200])
def test_graph_capture(rng, m):
    a, w = on_gpu(normal(rng, (m, 256))), on_gpu(normal(rng, (128, 256)))
    out = poisoned((m, 128), "bfloat16")
    mm_bf16(a, w.T, out=out)  # compiled and loaded before the capture
    stream = new_stream()
    with stream:
        stream.begin_capture()
        mm_bf16(a, w.T, out=out)
        graph = stream.end_capture()
        a[...] = on_gpu(normal(rng, (m, 256)))
        graph.launch()
        stream.synchronize()
    assert_close(to_float64(out), reference.gemm.mm(to_float64(a), to_float64(w).T), "bfloat16", "product")


def test_torch_tensors(rng):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch has no CUDA")
    a = torch.randn(5, 64, dtype=torch.bfloat16, device="cuda")
    layer = torch.nn.Linear(64, 24, dtype=torch.bfloat16, device="cuda")
    got = mm_bf16(a, layer.weight.detach().T, layer.bias.detach())
    want = a.double() @ layer.weight.detach().double().T + layer.bias.detach().double()
    assert_close(got.float().cpu().numpy(), want.cpu().numpy(), "bfloat16", "product")


def test_the_device_here_is_like_the_one_the_table_was_made_for():
    """On Hopper the choice must equal the measured one; elsewhere there is nothing to compare."""
    device = device_info(0)
    if (device.number, device.num_sms) != (H100.number, H100.num_sms):
        pytest.skip("not a Hopper GPU with 132 multiprocessors")
    for m, n, k in ((1, 4096, 4096), (16, 14336, 4096), (4096, 4096, 4096)):
        assert select_mm_kernel(m, n, k, device) == select_mm_kernel(m, n, k, H100)
