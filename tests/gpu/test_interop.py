"""Arrays of torch, CuPy and JAX on the GPU: results in the caller's framework, on the caller's device and stream.

A stream is tested by queueing work behind a kernel that spins for some 30 ms: whoever launches elsewhere reads the NaN
that the array held before.
"""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take most of the memory for itself

import fi_cupy
from fi_cupy import dtypes, errors, imported, reference
from fi_cupy.arrays import view
from fi_cupy.device import num_devices
from fi_cupy.testing.generators import normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
ROWS, HIDDEN = 64, 1024
SPIN = 50_000_000  # clock cycles


@functools.cache
def spin_kernel():
    source = """extern "C" __global__ void spin(long long cycles) {
        long long start = clock64();
        while (clock64() - start < cycles) {}
    }"""
    return cupy.RawKernel(source, "spin")


def spin(cycles=SPIN):
    """Keep CuPy's current stream busy."""
    spin_kernel()((1,), (1,), (np.int64(cycles),))


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("torch has no CUDA")
    return module


@pytest.fixture
def jax():
    module = pytest.importorskip("jax")
    if module.default_backend() != "gpu":
        pytest.skip(f"JAX's backend is {module.default_backend()}")
    return module


@pytest.fixture
def data(rng):
    """Rows, weight and the expected norm; the kernel is loaded, so that no compilation hides a race."""
    x, w = normal(rng, (ROWS, HIDDEN)), normal(rng, (HIDDEN,))
    fi_cupy.rmsnorm(on_gpu(x), on_gpu(w))
    spin(1000)
    cupy.cuda.runtime.deviceSynchronize()
    return x, w, oracle(x, w)


def oracle(x, w):
    return reference.norm.rmsnorm(np.asarray(x).astype(np.float64), np.asarray(w).astype(np.float64))


def to_torch(torch, array):
    """A torch copy of a NumPy array on the GPU, bf16 and fp8 included."""
    kind = dtypes.dtype(array.dtype)
    raw = np.ascontiguousarray(array).view({1: np.uint8, 2: np.int16, 4: np.int32}[kind.itemsize])
    return torch.from_numpy(raw.copy()).cuda().view(getattr(torch, kind.name))


# --- torch ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_torch_in_torch_out(torch, rng, dtype):
    x, w = normal(rng, (5, 256), dtype), normal(rng, (256,), dtype)
    tx, tw = to_torch(torch, x), torch.nn.Parameter(to_torch(torch, w))
    got = fi_cupy.rmsnorm(tx, tw)
    assert type(got) is torch.Tensor and got.device == tx.device and got.dtype is tx.dtype and not got.requires_grad
    assert_close(to_float64(got), oracle(x, w), dtype)
    out = torch.full_like(tx, float("nan"))
    assert fi_cupy.rmsnorm(tx, tw, out=out) is out
    assert torch.equal(out, got)
    wide = torch.zeros((5, 512), dtype=tx.dtype, device="cuda")
    wide[:, 128:384] = tx
    assert torch.equal(fi_cupy.rmsnorm(wide[:, 128:384], tw), got)
    assert fi_cupy.rmsnorm(tx[:0], tw).shape == (0, 256)


def test_torch_side_stream(torch, data):
    x, w, want = data
    fresh, tw = to_torch(torch, x), to_torch(torch, w)
    tx = torch.full_like(fresh, float("nan"))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SPIN)
        tx.copy_(fresh)
        got = fi_cupy.rmsnorm(tx, tw)
        doubled = got * 2  # torch's next operator on the stream sees the result
    stream.synchronize()
    assert_close(to_float64(got), want, "bfloat16")
    assert_close(to_float64(doubled), 2 * want, "bfloat16")


def test_torch_graph(torch, data):
    x, w, want = data
    tx, tw = torch.full((ROWS, HIDDEN), float("nan"), dtype=torch.bfloat16, device="cuda"), to_torch(torch, w)
    out = torch.empty_like(tx)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fi_cupy.rmsnorm(tx, tw, out=out)
        made = fi_cupy.rmsnorm(out, tw)  # allocated in the graph's pool
    tx.copy_(to_torch(torch, x))
    graph.replay()
    torch.cuda.synchronize()
    assert_close(to_float64(out), want, "bfloat16")
    assert_close(to_float64(made), oracle(to_float64(out), w), "bfloat16")


def test_torch_fp8(torch, rng):
    x, w = normal(rng, (5, 256)), normal(rng, (256,))
    out = torch.empty((5, 256), dtype=torch.uint8, device="cuda").fill_(0x7F).view(torch.float8_e4m3fn)
    fi_cupy.norm.rmsnorm_quant(out, to_torch(torch, x), to_torch(torch, w), 0.5)
    assert_close(view(out).host(), oracle(x, w) / 0.5, "float8_e4m3fn")


def test_torch_tensors_that_cannot_be_read(torch):
    with pytest.raises(errors.LayoutError, match=r"op: x is a Tensor of layout torch.sparse_coo"):
        view(torch.eye(4, device="cuda").to_sparse(), "op", "x")
    with pytest.raises(errors.LayoutError, match="op: x has torch's negative bit"):
        view(torch.ones(4, dtype=torch.complex64, device="cuda").conj().imag, "op", "x")
    assert view(torch.empty((0, 3), device="cuda")).size == 0
    assert view(torch.tensor(1.0, device="cuda")).shape == ()
    with pytest.raises(errors.LayoutError, match="do not overlap"):
        view(torch.zeros((1, 8), device="cuda").expand(4, 8)).writable("op", "out")


def test_torch_temporaries(torch, data):
    _, w, _ = data
    tw = to_torch(torch, w)
    x = torch.randn((512, HIDDEN), device="cuda", dtype=torch.bfloat16)
    errors_ = []
    for i in range(200):
        got = fi_cupy.rmsnorm(x + i, tw)
        y = (x + i).double()
        want = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * tw.double()
        errors_.append((got.double() - want).norm() / want.norm())
    assert torch.stack(errors_).max().item() < 4e-3


# --- CuPy -----------------------------------------------------------------------------------------------------------


def test_cupy_side_stream(data):
    x, w, want = data
    fresh, cw = on_gpu(x), on_gpu(w)
    cx, out = poisoned(x.shape, "bfloat16"), poisoned(x.shape, "bfloat16")
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    with stream:
        spin()
        cx.data.copy_from_device_async(fresh.data, fresh.nbytes, stream)
        assert fi_cupy.rmsnorm(cx, cw, out=out) is out
        made = fi_cupy.rmsnorm(cx, cw)
    stream.synchronize()
    assert_close(to_float64(out), want, "bfloat16")
    assert_close(to_float64(made), want, "bfloat16")


def test_two_streams_at_once(rng, data):
    _, w, _ = data
    cw = on_gpu(w)
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(2)]
    xs = [[normal(rng, (ROWS, HIDDEN)) for _ in range(10)] for _ in streams]
    fresh = [[on_gpu(x) for x in row] for row in xs]
    inputs = [[poisoned((ROWS, HIDDEN), "bfloat16") for _ in row] for row in xs]
    cupy.cuda.runtime.deviceSynchronize()
    got = [[], []]
    for i in range(10):
        for k, stream in enumerate(streams):
            with stream:
                if i == 0:
                    spin(SPIN // (k + 1))
                inputs[k][i].data.copy_from_device_async(fresh[k][i].data, fresh[k][i].nbytes, stream)
                got[k].append(fi_cupy.rmsnorm(inputs[k][i], cw))
    cupy.cuda.runtime.deviceSynchronize()
    for k in range(2):
        for x, result in zip(xs[k], got[k], strict=True):
            assert_close(to_float64(result), oracle(x, w), "bfloat16")


def test_cupy_views(rng):
    a = on_gpu(normal(rng, (6, 8), "float32"))
    assert (view(a).strides, view(a.T).strides, view(a[::2, 1:5]).strides) == ((8, 1), (1, 8), (16, 1))
    assert view(a[0, 0]).shape == () and view(a[:0]).size == 0 and view(a).device == a.device.id
    assert view(a).framework == "cupy" and not view(a).is_cpu and view(a).ptr == a.data.ptr
    assert view(cupy.zeros(3, bool)).dtype is dtypes.bool_
    with pytest.raises(errors.DTypeError, match="op: x has dtype complex64"):
        view(cupy.zeros(3, cupy.complex64), "op", "x")
    with pytest.raises(errors.DeviceError, match="on a GPU"):
        view(a).numpy()
    fp8 = view(a).empty((4,), dtypes.float8_e4m3fn)
    assert fp8.dtype is dtypes.float8_e4m3fn and fp8.result().dtype == np.uint8


def test_dlpack_producer_gives_cupy(data):
    class Producer:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    x, w, want = data
    got = fi_cupy.rmsnorm(Producer(on_gpu(x)), Producer(on_gpu(w)))  # nothing else keeps the arrays
    assert isinstance(got, cupy.ndarray)
    assert_close(to_float64(got), want, "bfloat16")


# --- Numba, Warp, nvmath --------------------------------------------------------------------------------------------


@pytest.fixture
def plain(rng):
    """Rows, weight and the expected norm in a type that every library has."""
    x, w = normal(rng, (ROWS, HIDDEN), "float32"), normal(rng, (HIDDEN,), "float32")
    fi_cupy.rmsnorm(on_gpu(x), on_gpu(w))
    return x, w, oracle(x, w)


def test_cuda_array_interface_gives_cupy(plain):
    class Producer:
        def __init__(self, array, read_only=False):
            data = {**array.__cuda_array_interface__}
            data["data"] = (data["data"][0], read_only)
            self.array, self.__cuda_array_interface__ = array, data

    x, w, want = plain
    got = fi_cupy.rmsnorm(Producer(on_gpu(x)), Producer(on_gpu(w)))  # nothing else keeps the arrays
    assert isinstance(got, cupy.ndarray)
    assert_close(to_float64(got), want, "float32")
    out = Producer(poisoned(x.shape, "float32"))
    assert fi_cupy.rmsnorm(Producer(on_gpu(x)), Producer(on_gpu(w)), out=out) is out
    assert_close(to_float64(out.array), want, "float32")
    with pytest.raises(errors.ImmutableArrayError, match="rmsnorm: out is a read-only array"):
        fi_cupy.rmsnorm(on_gpu(x), on_gpu(w), out=Producer(on_gpu(x), read_only=True))


def test_numba_arrays(plain):
    numba_cuda = pytest.importorskip("numba.cuda")
    x, w, want = plain
    nx, nw = numba_cuda.to_device(x), numba_cuda.to_device(w)
    got = fi_cupy.rmsnorm(nx, nw)
    assert_close(numba_cuda.as_cuda_array(got).copy_to_host(), want, "float32")
    out = numba_cuda.device_array_like(nx)
    assert fi_cupy.rmsnorm(nx, nw, out=out) is out
    assert_close(out.copy_to_host(), want, "float32")
    residual = numba_cuda.to_device(x)
    fi_cupy.fused_add_rmsnorm(nx, residual, nw)  # in place
    assert_close(residual.copy_to_host(), 2.0 * x, "float32")
    stream = numba_cuda.stream()
    late = numba_cuda.to_device(x, stream=stream)  # still being copied: the array names its stream
    assert_close(to_float64(fi_cupy.rmsnorm(late, nw)), want, "float32")


def test_warp_arrays(plain):
    warp = pytest.importorskip("warp")
    x, w, want = plain
    wx, ww = (warp.array(a, dtype=warp.float32, device="cuda:0") for a in (x, w))
    got = fi_cupy.rmsnorm(wx, ww)
    cupy.cuda.runtime.deviceSynchronize()
    assert_close(warp.from_dlpack(got).numpy(), want, "float32")


def test_nvmath_results(plain):
    """nvmath computes on CuPy's arrays, and its results go on."""
    advanced = pytest.importorskip("nvmath.linalg.advanced")
    x, w, _ = plain
    weights = normal(np.random.default_rng(0), (HIDDEN, HIDDEN), "float32", scale=HIDDEN**-0.5)
    product = advanced.matmul(on_gpu(x), on_gpu(weights))
    want = oracle(x.astype(np.float64) @ weights.astype(np.float64), w)
    assert np.abs(to_float64(fi_cupy.rmsnorm(product, on_gpu(w))) - want).max() < 1e-2 * np.abs(want).max()


# --- JAX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_jax_in_jax_out(jax, rng, dtype):
    x, w = normal(rng, (5, 256), dtype), normal(rng, (256,), dtype)
    jx, jw = jax.numpy.asarray(x), jax.numpy.asarray(w)
    got = fi_cupy.rmsnorm(jx, jw)
    assert isinstance(got, jax.Array) and got.devices() == jx.devices() and got.dtype == jx.dtype
    assert_close(np.asarray(got), oracle(x, w), dtype)
    assert_close(np.asarray(jax.jit(lambda a: a * 2)(got)), 2 * oracle(x, w), dtype)
    assert fi_cupy.rmsnorm(jx[:0], jw).shape == (0, 256)
    with pytest.raises(errors.ImmutableArrayError):
        fi_cupy.rmsnorm(jx, jw, out=jx)


def test_jax_without_synchronisation(jax, data):
    x, w, want = data
    jw = jax.numpy.asarray(w)

    @jax.jit
    def slow(a):  # a long chain of products that leaves its first argument as it is
        m = jax.numpy.full((2048, 2048), 1e-3, "float32")
        m = jax.lax.fori_loop(0, 50, lambda _, m: (m @ m) * 0 + 1e-3, m)
        return a + (m[0, 0] - 1e-3).astype(a.dtype)

    jx = jax.numpy.asarray(x)
    slow(jx).block_until_ready()
    assert_close(np.asarray(fi_cupy.rmsnorm(slow(jx), jw)), want, "bfloat16")
    with cupy.cuda.Stream(non_blocking=True):
        got = fi_cupy.rmsnorm(slow(jx), jw)
    assert_close(np.asarray(got), want, "bfloat16")


def test_jax_temporaries(jax, data):
    """Inputs that nobody but the operator holds: JAX must not get their memory back before the kernel has run."""
    _, w, _ = data
    jnp = jax.numpy
    jw = jnp.asarray(w)
    x = jax.random.normal(jax.random.key(0), (512, HIDDEN), "float32").astype("bfloat16")

    @jax.jit
    def distance(got, y):
        y = y.astype("float32")
        want = y / jnp.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * jw.astype("float32")
        return jnp.linalg.norm(got.astype("float32") - want) / jnp.linalg.norm(want)

    steps = [jnp.asarray(i, "bfloat16") for i in range(200)]
    fi_cupy.rmsnorm(x + steps[0], jw).block_until_ready()
    spin()  # our kernels queue up behind it while JAX goes on and looks for memory
    got = [fi_cupy.rmsnorm(x + step, jw) for step in steps]
    found = [distance(y, x + step) for y, step in zip(got, steps, strict=True)]
    assert np.asarray(jnp.stack(found)).max() < 4e-3
    cupy.cuda.runtime.deviceSynchronize()
    fi_cupy.rmsnorm(x, jw)
    assert len(imported._held) <= 6  # what was lent has been given back


def test_jax_results_that_are_dropped_while_jax_reads_them(jax, data):
    """A result's memory may be used again only after JAX has read it."""
    _, w, _ = data
    jnp = jax.numpy
    jw = jnp.asarray(w)
    xs = [jax.random.normal(jax.random.key(i), (2048, HIDDEN), "float32").astype("bfloat16") for i in range(12)]

    @jax.jit
    def slow_sum(y):
        m = jax.lax.fori_loop(0, 20, lambda _, m: (m @ m) * 0 + 1.0, jnp.ones((2048, 2048), "float32"))
        return (y.astype("float32") * m[0, 0]).sum(0)

    apart = []
    for x in xs:
        y = fi_cupy.rmsnorm(x, jw)
        y.block_until_ready()
        apart.append(np.asarray(slow_sum(y)))
    together = [slow_sum(fi_cupy.rmsnorm(x, jw)) for x in xs]
    for got, want in zip(together, apart, strict=True):
        np.testing.assert_allclose(np.asarray(got), want, rtol=1e-4, atol=1e-2)


def test_jax_fp8_and_bool_travel_as_bytes(jax, rng):
    values = normal(rng, (3, 16), "float8_e4m3fn")
    v = view(jax.numpy.asarray(values))
    assert v.dtype is dtypes.float8_e4m3fn and v.device >= 0
    assert (v.host().view(np.uint8) == values.view(np.uint8)).all()
    made = v.empty((3, 16))
    made.array[...] = on_gpu(values)
    result = made.result()
    assert isinstance(result, jax.Array) and result.dtype == values.dtype
    assert (np.asarray(result).view(np.uint8) == values.view(np.uint8)).all()
    flags = rng.random((5, 7)) < 0.5
    assert view(jax.numpy.asarray(flags)).dtype is dtypes.bool_
    assert (view(jax.numpy.asarray(flags)).host() == flags).all()


def test_jax_64_bit_results_are_narrowed(jax):
    made = view(jax.numpy.arange(4)).empty((4,), dtypes.int64)
    made.array[...] = cupy.arange(4)
    result = made.result()
    assert result.dtype == np.int32 and result.tolist() == [0, 1, 2, 3]


def test_jax_arrays_on_the_cpu_stay_there(jax, rng):
    x, w = normal(rng, (3, 8), "float32"), normal(rng, (8,), "float32")
    cpu = jax.devices("cpu")[0]
    got = fi_cupy.rmsnorm(jax.device_put(x, cpu), jax.device_put(w, cpu))
    assert got.devices() == {cpu}
    assert_close(np.asarray(got), oracle(x, w), "float32")


# --- together -------------------------------------------------------------------------------------------------------


def test_bf16_between_the_frameworks(torch, jax, data):
    x, w, want = data
    makers = {"cupy": on_gpu, "torch": lambda a: to_torch(torch, a), "jax": jax.numpy.asarray}
    for first, make_x in makers.items():
        for make_w in makers.values():
            got = fi_cupy.rmsnorm(make_x(x), make_w(w))
            cupy.cuda.runtime.deviceSynchronize()
            assert view(got).framework == first
            assert_close(to_float64(got), want, "bfloat16")
    out = poisoned(x.shape, "bfloat16")
    assert fi_cupy.rmsnorm(to_torch(torch, x), jax.numpy.asarray(w), out=out) is out
    cupy.cuda.runtime.deviceSynchronize()
    assert_close(to_float64(out), want, "bfloat16")


def test_jax_weight_on_a_torch_side_stream(torch, jax, data):
    """torch's stream decides, and it waits for JAX to have made the weight."""
    x, w, want = data
    jw = jax.numpy.asarray(w)

    @jax.jit
    def slow(a):
        m = jax.lax.fori_loop(0, 50, lambda _, m: (m @ m) * 0, jax.numpy.zeros((2048, 2048), "float32"))
        return a + m[0, 0].astype(a.dtype)

    slow(jw).block_until_ready()
    tx = to_torch(torch, x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = fi_cupy.rmsnorm(tx, slow(jw))
    stream.synchronize()
    assert_close(to_float64(got), want, "bfloat16")


def test_cpu_and_gpu_do_not_mix(rng):
    x, w = normal(rng, (3, 8), "float32"), normal(rng, (8,), "float32")
    with pytest.raises(errors.DeviceError, match=r"rmsnorm: weight is on the CPU, expected cuda:0"):
        fi_cupy.rmsnorm(on_gpu(x), w)
    with pytest.raises(errors.DeviceError, match=r"rmsnorm: weight is on cuda:0, expected the CPU"):
        fi_cupy.rmsnorm(x, on_gpu(w))
    with pytest.raises(errors.DeviceError, match="rmsnorm: out is on the CPU"):
        fi_cupy.rmsnorm(on_gpu(x), on_gpu(w), out=np.empty_like(x))


@pytest.mark.skipif(num_devices() < 2, reason="needs two GPUs")
def test_the_arrays_device_decides_not_the_current_one(rng):
    x, w = normal(rng, (5, 256)), normal(rng, (256,))
    with cupy.cuda.Device(1):
        cx, cw = on_gpu(x), on_gpu(w)
    got = fi_cupy.rmsnorm(cx, cw)
    assert got.device.id == 1 and cupy.cuda.Device().id == 0
    assert view(cx).empty((4,), dtypes.float8_e4m3fn).dtype is dtypes.float8_e4m3fn
    with cupy.cuda.Device(1):
        cupy.cuda.runtime.deviceSynchronize()
    assert_close(to_float64(got), oracle(x, w), "bfloat16")
    with pytest.raises(errors.DeviceError, match="weight is on cuda:0, expected cuda:1"):
        fi_cupy.rmsnorm(cx, on_gpu(w))
