"""Views of arrays on the CPU: every framework, every type, strides, results in the caller's framework, error texts."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import fi_cupy
from fi_cupy import dtypes, errors
from fi_cupy.arrays import view
from fi_cupy.testing.generators import normal, to_float64
from fi_cupy.testing.tolerances import assert_close


class Producer:
    """Any object that speaks DLPack."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def oracle(x, w):
    x, w = x.astype(np.float64), w.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w


# --- NumPy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", dtypes.ALL, ids=lambda d: d.name)
def test_numpy_of_every_type(kind):
    a = np.zeros((3, 4), kind.np)
    v = view(a)
    assert (v.shape, v.strides, v.dtype, v.device) == ((3, 4), (4, 1), kind, -1)
    assert v.is_cpu and v.contiguous and v.ndim == 2 and v.size == 12 and v.framework == "numpy"
    assert v.numpy() is a and v.host() is a
    made = v.empty((2, 5), dtypes.float32)
    assert made.result().shape == (2, 5) and made.result().dtype == np.float32


@pytest.mark.parametrize(
    ("make", "shape", "strides", "contiguous"),
    [
        (lambda a: a, (4, 6), (6, 1), True),
        (lambda a: a.T, (6, 4), (1, 6), False),
        (lambda a: a[::2, 1:4], (2, 3), (12, 1), False),
        (lambda a: a[::-1], (4, 6), (-6, 1), False),
        (lambda a: a[1:2, :], (1, 6), (6, 1), True),
        (lambda a: a[0, 0], (), (), True),
        (lambda a: np.broadcast_to(a[0], (4, 6)), (4, 6), (0, 1), False),
        (lambda a: a[:0], (0, 6), None, True),
        (lambda a: a[:, :0], (4, 0), None, True),
    ],
    ids=["plain", "transposed", "sliced", "reversed", "one_row", "zero_dim", "broadcast", "no_rows", "no_columns"],
)
def test_numpy_strides_are_in_elements(make, shape, strides, contiguous):
    a = make(np.arange(24, dtype=ml_dtypes.bfloat16).reshape(4, 6))
    v = view(np.asarray(a))
    assert v.shape == shape and v.contiguous is contiguous
    assert strides is None or v.strides == strides
    assert v.size == int(np.prod(shape))


def test_numpy_subclasses_and_memory_maps(tmp_path, rng):
    mapped = np.memmap(tmp_path / "x.bin", np.float32, "w+", shape=(3, 8))
    mapped[:] = normal(rng, (3, 8), "float32")
    assert view(mapped).framework == "numpy"
    w = normal(rng, (8,), "float32")
    assert_close(fi_cupy.rmsnorm(mapped, w), oracle(np.asarray(mapped), w), "float32")


@pytest.mark.parametrize(
    ("array", "error", "text"),
    [
        (np.zeros(3, ">f4"), errors.DTypeError, "op: x has the foreign byte order of '>f4'"),
        (np.zeros(3, np.complex64), errors.DTypeError, "op: x has dtype complex64, expected one of float32, float16"),
        (np.array(["a"]), errors.DTypeError, "op: x has dtype <U1"),
        (np.array([None]), errors.DTypeError, "op: x has dtype object"),
        (np.zeros(3, "datetime64[s]"), errors.DTypeError, "op: x has dtype datetime64[s]"),
        (np.zeros(4, [("a", "f4"), ("b", "u1")])["a"], errors.LayoutError, "op: x has strides of (5,) bytes"),
        (np.ma.masked_array([1.0, 2.0], [0, 1]), errors.FrameworkError, "op: x is a masked array"),
        ([1.0, 2.0], errors.FrameworkError, "op: x is a builtins.list, expected an array: NumPy, CuPy, torch, JAX"),
        (1.0, errors.FrameworkError, "op: x is a builtins.float"),
        (np.float32(1.0), errors.FrameworkError, "op: x is a numpy.float32"),
        (None, errors.FrameworkError, "op: x is a builtins.NoneType"),
    ],
    ids=["byteorder", "complex", "text", "object", "date", "packed_field", "masked", "list", "float", "scalar", "none"],
)
def test_what_is_refused(array, error, text):
    with pytest.raises(error) as caught:
        view(array, "op", "x")
    assert text in str(caught.value)
    with pytest.raises(error) as caught:  # the second time the reader is known already
        view(array)
    assert str(caught.value).startswith("array ")


def test_writable():
    a = np.zeros((2, 3), np.float32)
    assert view(a).writable("op", "out").numpy() is a
    a.flags.writeable = False
    with pytest.raises(errors.ImmutableArrayError, match=r"op: out is a read-only NumPy array.*pass a copy"):
        view(a).writable("op", "out")
    overlapping = np.lib.stride_tricks.as_strided(np.zeros(3, np.float32), (2, 3), (0, 4))
    with pytest.raises(
        errors.LayoutError, match=r"op: out has strides \(0, 1\), expected elements that do not overlap"
    ):
        view(overlapping).writable("op", "out")
    for harmless in (np.zeros((1, 3), np.float32)[:, :], np.zeros((0, 3), np.float32), np.zeros((), np.float32)):
        view(harmless).writable("op", "out")


def test_typed_reads_the_same_memory():
    raw = np.arange(8, dtype=np.uint8)
    v = view(raw).typed(dtypes.float8_e4m3fn)
    assert v.dtype is dtypes.float8_e4m3fn and v.numpy().dtype == ml_dtypes.float8_e4m3fn
    v.numpy()[0] = 1.0
    assert raw[0] == 0x38
    assert v.typed(dtypes.float8_e4m3fn) is v
    with pytest.raises(errors.LayoutError, match="uint8, which cannot be read as float16"):
        view(raw).typed(dtypes.float16)


def test_write_rounds_to_the_type():
    out = np.zeros(2, ml_dtypes.bfloat16)
    view(out).write(np.array([1.0, 1e-3]))
    assert out.astype(np.float32).tolist() == [1.0, np.float32(ml_dtypes.bfloat16(1e-3))]


# --- DLPack ---------------------------------------------------------------------------------------------------------


def test_dlpack_producer(rng):
    x, w = normal(rng, (3, 8), "float32"), normal(rng, (8,), "float32")
    v = view(Producer(x))
    assert v.framework == "dlpack" and np.shares_memory(v.numpy(), x)
    got = fi_cupy.rmsnorm(Producer(x), Producer(w))
    assert type(got) is np.ndarray
    assert_close(got, oracle(x, w), "float32")
    assert view(Producer(x[::2, 2:6])).strides == (16, 1)


def test_dlpack_producer_cannot_be_written(rng):
    x, r, w = (normal(rng, s, "float32") for s in ((3, 8), (3, 8), (8,)))
    with pytest.raises(errors.ImmutableArrayError, match=r"fused_add_rmsnorm: .* is a dlpack array.*functional form"):
        fi_cupy.fused_add_rmsnorm(Producer(x), Producer(r), Producer(w))


def test_dlpack_other_devices_are_named():
    class Elsewhere(Producer):
        def __dlpack_device__(self):
            return (8, 0)  # Metal

    with pytest.raises(errors.DeviceError, match="op: x is on DLPack device type 8, expected 2"):
        view(Elsewhere(np.zeros(3)), "op", "x")


def test_dlpack_types_that_numpy_cannot_import_are_named():
    torch = pytest.importorskip("torch")
    with pytest.raises(errors.DTypeError, match="op: x cannot be imported into NumPy through DLPack"):
        view(Producer(torch.ones(3, dtype=torch.bfloat16)), "op", "x")


# --- torch ----------------------------------------------------------------------------------------------------------

TORCH_TYPES = [d.name for d in dtypes.ALL]


@pytest.mark.parametrize("name", TORCH_TYPES)
def test_torch_of_every_type(name):
    torch = pytest.importorskip("torch")
    if not hasattr(torch, name):
        pytest.skip(f"this torch has no {name}")
    t = torch.zeros((3, 4), dtype=torch.uint8).to(getattr(torch, name))
    v = view(t)
    kind = dtypes.dtype(name)
    assert (v.shape, v.strides, v.dtype, v.device, v.framework) == ((3, 4), (4, 1), kind, -1, "torch")
    assert v.numpy().dtype == kind.np
    v.write(np.ones((3, 4)))
    assert (t.float() == 1).all()  # the same memory
    made = v.empty((2, 2))
    made.write(np.ones((2, 2)))
    assert made.result().dtype is t.dtype and (made.result().float() == 1).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_torch_in_torch_out(rng, dtype):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(normal(rng, (3, 8), "float32")).to(getattr(torch, dtype))
    w = torch.nn.Parameter(torch.from_numpy(normal(rng, (8,), "float32")).to(getattr(torch, dtype)))
    got = fi_cupy.rmsnorm(x, w)
    assert type(got) is torch.Tensor and got.dtype is x.dtype and not got.requires_grad
    assert_close(to_float64(got), oracle(to_float64(x), to_float64(w)), dtype)
    out = torch.full_like(x, float("nan"))
    assert fi_cupy.rmsnorm(x, w, out=out) is out
    assert torch.equal(out, got)
    wide = torch.zeros(3, 20, dtype=x.dtype)
    wide[:, 4:12] = x
    assert torch.equal(fi_cupy.rmsnorm(wide[:, 4:12], w), got)


def test_torch_views_and_scalars():
    torch = pytest.importorskip("torch")
    t = torch.arange(24).reshape(4, 6)
    assert view(t.T).strides == (1, 6) and not view(t.T).contiguous
    assert view(t[1:, ::2]).numpy().tolist() == t[1:, ::2].tolist()
    assert view(torch.tensor(2.5, dtype=torch.bfloat16)).numpy().shape == ()
    assert view(torch.empty(0, 5)).contiguous and view(torch.empty(3, 0)).size == 0
    with pytest.raises(errors.LayoutError, match="out has strides"):
        view(torch.zeros(1, 4).expand(3, 4)).writable("op", "out")


def test_torch_tensors_without_plain_memory_are_refused():
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(3)
    refused = [
        (torch.ones(3, device="meta"), errors.DeviceError, "op: x is on meta"),
        (torch.eye(3).to_sparse(), errors.LayoutError, "layout torch.sparse_coo"),
        (torch.ones(3, dtype=torch.complex64), errors.DTypeError, "op: x has dtype torch.complex64"),
        (torch.ones(3, dtype=torch.complex64).conj().imag, errors.LayoutError, "negative bit"),
        (fake, errors.LayoutError, "op: x is a FakeTensor"),
    ]
    for tensor, error, text in refused:
        with pytest.raises(error) as caught:
            view(tensor, "op", "x")
        assert text in str(caught.value)


# --- JAX ------------------------------------------------------------------------------------------------------------

JAX_TYPES = [d.name for d in dtypes.ALL if d.itemsize < 8]


@pytest.fixture
def jax():
    module = pytest.importorskip("jax")
    with module.default_device(module.devices("cpu")[0]):
        yield module


@pytest.mark.parametrize("name", JAX_TYPES)
def test_jax_of_every_type(jax, name):
    a = jax.numpy.zeros((3, 4), name)
    v = view(a)
    assert (v.shape, v.strides, v.dtype, v.device, v.framework) == ((3, 4), (4, 1), dtypes.dtype(name), -1, "jax")
    made = v.empty((2, 2))
    made.write(np.ones((2, 2)))
    result = made.result()
    assert isinstance(result, jax.Array) and result.dtype == a.dtype and result.devices() == a.devices()
    assert (np.asarray(result).astype(np.float32) == 1).all()
    assert view(result).empty((1,)).result().devices() == a.devices()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_jax_in_jax_out(jax, rng, dtype):
    x, w = normal(rng, (3, 8), dtype), normal(rng, (8,), dtype)
    got = fi_cupy.rmsnorm(jax.numpy.asarray(x), jax.numpy.asarray(w))
    assert isinstance(got, jax.Array) and got.dtype == x.dtype
    assert_close(np.asarray(got), oracle(x, w), dtype)
    assert fi_cupy.rmsnorm(jax.numpy.zeros((0, 8), dtype), jax.numpy.asarray(w)).shape == (0, 8)


def test_jax_is_immutable(jax, rng):
    x, w = jax.numpy.ones((3, 8)), jax.numpy.ones(8)
    with pytest.raises(errors.ImmutableArrayError, match=r"fused_add_rmsnorm: .* is a jax array.*functional form"):
        fi_cupy.fused_add_rmsnorm(x, x, w)
    with pytest.raises(errors.ImmutableArrayError, match="rmsnorm: out is a jax array"):
        fi_cupy.rmsnorm(x, w, out=x)


def test_jax_tracers_are_refused(jax):
    with pytest.raises(errors.FrameworkError, match="rmsnorm: input is a JAX tracer, expected a concrete array"):
        jax.jit(lambda x, w: fi_cupy.rmsnorm(x, w))(jax.numpy.ones((3, 8)), jax.numpy.ones(8))


def test_jax_narrows_64_bit_results_unless_x64(jax):
    v = view(jax.numpy.arange(3))
    assert v.dtype is dtypes.int32
    made = v.empty((2,), dtypes.int64)
    made.write(np.array([7, -7]))
    assert made.result().dtype == np.int32 and made.result().tolist() == [7, -7]
    try:
        jax.config.update("jax_enable_x64", True)
        assert view(jax.numpy.arange(3)).dtype is dtypes.int64
        assert made.result().dtype == np.int64
    finally:
        jax.config.update("jax_enable_x64", False)


# --- together -------------------------------------------------------------------------------------------------------


def test_frameworks_may_be_mixed_on_one_device(jax, rng):
    torch = pytest.importorskip("torch")
    x, w = normal(rng, (3, 8), "float32"), normal(rng, (8,), "float32")
    makers = {"numpy": np.asarray, "torch": torch.from_numpy, "jax": jax.numpy.asarray, "dlpack": Producer}
    for first, make_x in makers.items():
        for make_w in makers.values():
            got = fi_cupy.rmsnorm(make_x(x), make_w(w))
            assert view(got).framework == ("numpy" if first == "dlpack" else first)
            assert_close(to_float64(got), oracle(x, w), "float32")
    out = np.empty((3, 8), np.float32)
    assert fi_cupy.rmsnorm(torch.from_numpy(x), w, out=out) is out
    assert_close(out, oracle(x, w), "float32")
