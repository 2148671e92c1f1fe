"""What callers build with: modules by name, CUDA files and activations of their own, times, checks, logged calls."""

from __future__ import annotations

import statistics

import numpy as np
import pytest

import fi_cupy
from fi_cupy import activation, api_dump, api_logging, cuda_utils, jit, reference, testing, utils
from fi_cupy.device import device_info
from fi_cupy.testing.generators import normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
SILU = "__device__ float mine(const float& x) { return x / (1.f + __expf(-x)); }"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_activation_of_the_callers(rng, dtype):
    op = activation.define_activation("mine", SILU)
    for shape in ((3, 64), (2, 5, 1152), (300, 2000)):
        x = normal(rng, shape, dtype, 3.0)
        out = poisoned((*shape[:-1], shape[-1] // 2), dtype)
        assert op(on_gpu(x), out=out) is out
        assert_close(to_float64(out), reference.activation.silu_and_mul(x.astype(np.float64)), dtype)
    module = jit.gen_act_and_mul_module("mine", SILU).build_and_load()
    again = poisoned(out.shape, dtype)
    module.mine_and_mul(again, on_gpu(x), True)
    assert (again.view("u1") == out.view("u1")).all()
    assert len(module.kernels()) == 5 and module.mine_and_mul_user_bf16_v8x2.spec.symbol in dir(module)


def test_cuda_files_of_the_callers(rng, tmp_path):
    (tmp_path / "factor.h").write_text("#define FACTOR 2.f\n")
    (tmp_path / "mine.cu").write_text(
        '#include "factor.h"\n#include "common/base.cuh"\n'
        'extern "C" __global__ void scale(const float* x, float* y, int n) {\n'
        "  const int i = blockIdx.x * blockDim.x + threadIdx.x;\n  if (i < n) y[i] = FACTOR * x[i] + ADDED;\n}\n"
    )
    spec = jit.gen_jit_spec("callers", [tmp_path / "mine.cu"], extra_cuda_cflags=["-O3", "-DADDED=1.f"])
    module = spec.build_and_load()
    assert spec.is_compiled and spec.try_load() is not None
    x, y = cupy.asarray(normal(rng, (1000,), "float32")), poisoned((1000,), "float32")
    module.scale((4,), (256,), (x, y, np.int32(1000)))
    assert (y == 2 * x + 1).all()
    with pytest.raises(AttributeError, match="no kernel 'other'"):
        _ = module.other


def test_modules_of_attention_are_what_is_launched(rng):
    spec = jit.gen_batch_decode_module(*["float16"] * 3, "int32", 64, 64)
    names = {k.spec.symbol for k in spec.build_and_load().kernels()}
    wrapper = fi_cupy.BatchDecodeWithPagedKVCacheWrapper(cupy.empty(8 << 20, np.uint8))
    wrapper.plan(np.int32([0, 2]), np.int32([0, 1]), np.int32([7]), 32, 8, 64, 16)
    (use,) = fi_cupy.attention.explain(wrapper).launches
    assert use.kernel in names


def test_times(rng):
    x, w = on_gpu(normal(rng, (4096, 4096))), on_gpu(normal(rng, (4096,)))
    out = cupy.empty_like(x)
    floor_ms = 2 * x.nbytes / 4e12 * 1e3  # faster than any memory there is
    for options in ({}, {"use_cuda_graph": True}, {"cold_l2_cache": False}, {"l2_flush": True, "l2_flush_size_mb": 64}):
        found = testing.bench_gpu_time(
            fi_cupy.rmsnorm, repeat_iters=5, dry_run_iters=2, input_args=(x, w), input_kwargs={"out": out}, **options
        )
        assert len(found) == 5 and floor_ms / 4 < statistics.median(found) < 50, options
    assert_close(to_float64(out), reference.norm.rmsnorm(x.get().astype(np.float64), w.get().astype(np.float64)),
                 "bfloat16")  # fmt: skip
    with pytest.warns(UserWarning, match="warm cache"):
        testing.bench_gpu_time(lambda: fi_cupy.rmsnorm(x, w, out=out), repeat_iters=2, use_cuda_graph=True)


def test_questions_about_this_gpu():
    major, minor = utils.get_compute_capability()
    assert 10 * major + minor == device_info(0).number == 10 * utils.get_compute_capability(cupy.zeros(1))[0] + minor
    assert utils.device_support_pdl("cuda:0") == (major >= 9) and utils.is_sm90a_supported(0) == (major == 9)
    utils.check_shape_dtype_device(cupy.zeros((2, 3), np.float32), (2, 3), "float32", cupy.cuda.Device(0), "x")
    for kind in (np.int32, np.int64):
        lengths = np.arange(3000).astype(kind)
        made = utils.get_indptr(cupy.asarray(lengths))
        assert made.dtype == np.int64 and (made.get() == np.concatenate([[0], np.cumsum(lengths)])).all()
    driver = pytest.importorskip("cuda.bindings.driver")
    assert cuda_utils.checkCudaErrors(driver.cuDeviceGetCount()) >= 1
    with pytest.raises(cuda_utils.CudaError, match="CUDA_ERROR_INVALID_DEVICE"):
        cuda_utils.checkCudaErrors(driver.cuDeviceGet(1 << 20))


def test_calls_are_logged_and_made_again(rng, tmp_path, monkeypatch):
    for name, value in (("LOGLEVEL", "10"), ("LOGDEST", str(tmp_path / "log")), ("DUMP_DIR", str(tmp_path / "dumps"))):
        monkeypatch.setenv(f"FI_CUPY_{name}", value)
    monkeypatch.setattr(api_logging, "_state", None)
    norm = api_logging.flashinfer_api(fi_cupy.norm.rmsnorm)
    x = on_gpu(normal(rng, (4, 512)))[:, 128:384]
    want = norm(x, x[0].copy())
    (found,) = api_dump.replay_sequence(tmp_path / "dumps")
    assert found["comparison_match"] and found["args"][0].strides == x.strides
    assert (found["execution_result"].view("u2") == want.view("u2")).all()
    assert f"cupy bfloat16[4, 256] strides [512, 1] on cuda:{x.device.id} min" in (tmp_path / "log").read_text()
