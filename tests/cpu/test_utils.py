"""`fi_cupy.utils`, requirements in front of operators, results of cuda-bindings, and attention's figures."""

from __future__ import annotations

import enum
import functools
import logging
import os
import subprocess
import sys

import numpy as np
import pytest

from fi_cupy import cuda_utils, errors, testing, utils


def test_numbers():
    assert [utils.ceil_div(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [utils.round_up(n, 4) for n in (0, 1, 4, 5)] == [0, 4, 4, 8]
    assert [utils.next_positive_power_of_2(n) for n in (-1, 0, 1, 2, 3, 1024, 1025)] == [1, 1, 1, 2, 4, 1024, 2048]


def test_offsets_of_lengths():
    assert utils.get_indptr(np.array([2, 0, 3], np.int32)).tolist() == [0, 2, 2, 5]
    assert utils.get_indptr(np.array([], np.int64)).tolist() == [0]
    torch = pytest.importorskip("torch")
    made = utils.get_indptr(torch.tensor([1, 1]))
    assert made.dtype is torch.int64 and made.tolist() == [0, 1, 2]
    with pytest.raises(errors.DTypeError, match="x has dtype float32"):
        utils.get_indptr(np.ones(2, np.float32))


def test_arrays_are_checked():
    x = np.ones((2, 3), np.float16)
    utils.check_shape_dtype_device(x, (2, 3), "float16", "cpu", "x")
    utils.check_shape_dtype_device(x, None, None, None, "x")
    for shape, dtype, device, error, text in (
        ((3, 2), "float16", "cpu", errors.ShapeError, r"x has shape \(2, 3\), expected \(3, 2\)"),
        ((2, 3), np.float32, "cpu", errors.DTypeError, "x has dtype float16, expected float32"),
        ((2, 3), "float16", "cuda:1", errors.DeviceError, "x is on the CPU, expected cuda:1"),
    ):
        with pytest.raises(error, match=text):
            utils.check_shape_dtype_device(x, shape, dtype, device, "x")
    import ml_dtypes

    assert utils.is_float8(x.astype(ml_dtypes.float8_e5m2)) and not utils.is_float8(x)


class FakeDevice:
    """A GPU of some compute capability."""

    def __init__(self, number):
        self.number = number


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(utils, "device_info", lambda index: FakeDevice((75, 90, 100, 121)[index]))


def test_questions_about_a_gpu(gpu):
    assert [utils.get_compute_capability(i) for i in range(4)] == [(7, 5), (9, 0), (10, 0), (12, 1)]
    assert utils.get_compute_capability("cuda:1") == (9, 0)
    assert [utils.device_support_pdl(i) for i in range(4)] == [False, True, True, True]
    assert [utils.is_sm90a_supported(i) for i in range(4)] == [False, True, False, False]
    assert [utils.is_sm100a_supported(i) for i in range(4)] == [False, False, True, False]
    assert [utils.is_sm12x_supported(i) for i in range(4)] == [False, False, False, True]
    assert not utils.is_sm110a_supported(1) and not utils.is_sm120a_supported(3) and utils.is_sm121a_supported(3)
    with pytest.raises(errors.DeviceError, match="device is the CPU"):
        utils.get_compute_capability("cpu")
    with pytest.raises(errors.ArgumentError, match="got 'hopper'"):
        utils.get_compute_capability("hopper")
    torch = pytest.importorskip("torch")
    assert utils.get_compute_capability(torch.device("cuda", 2)) == (10, 0)
    with pytest.raises(errors.DeviceError):
        utils.get_compute_capability(torch.zeros(1))


def test_log_level():
    log = logging.getLogger("fi_cupy")
    before = log.level
    try:
        utils.set_log_level("debug")
        assert logging.getLogger("fi_cupy.attention").isEnabledFor(logging.DEBUG)
        utils.set_log_level("critical")
        assert not logging.getLogger("fi_cupy.autotuner").isEnabledFor(logging.ERROR)
        with pytest.raises(errors.ArgumentError, match="lvl_str is 'loud', expected trace, debug"):
            utils.set_log_level("loud")
    finally:
        log.setLevel(before)


@pytest.mark.parametrize("name", ["FI_CUPY_LOGGING_LEVEL", "FLASHINFER_LOGGING_LEVEL"])
def test_the_environments_log_level_shows_records_on_standard_error(name):
    code = "import fi_cupy, logging; logging.getLogger('fi_cupy.attention').debug('a kernel')"
    run = functools.partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=False)
    clean = {key: value for key, value in os.environ.items() if not key.endswith("_LOGGING_LEVEL")}
    assert run(env=clean | {name: "DEBUG"}).stderr == "a kernel\n"
    assert run(env=clean | {name: "warning"}).stderr == ""
    wrong = run(env=clean | {name: "loud"})
    assert wrong.returncode == 1
    assert "lvl_str is 'loud'" in wrong.stderr


# --- requirements ---------------------------------------------------------------------------------------------------


@utils.supported_compute_capability([90])
def fits_cutlass(x, n=1, backend="auto"):
    if n > 2:
        raise ValueError("n is too large for cutlass")
    return True


@utils.supported_compute_capability([80, 90])
def fits_cudnn(x, n=1, backend="auto"):
    return n != 7


def newest_first(suitable, x, n, backend):
    return sorted(suitable)


@utils.backend_requirement({"cutlass": fits_cutlass, "cudnn": fits_cudnn}, heuristic_func=newest_first)
def product(x, n=1, backend="auto"):
    return n, backend


def test_backends_are_checked():
    x = np.ones(3)
    assert product(x) == (1, "auto") and product.suitable_auto_backends == ["cudnn", "cutlass"]
    assert product(x, n=3) == (3, "auto") and product.suitable_auto_backends == ["cudnn"]
    assert product(x, 2, backend="cutlass") == (2, "cutlass") and product.suitable_auto_backends == []
    with pytest.raises(ValueError, match="too large for cutlass"):
        product(x, 3, "cutlass")
    with pytest.raises(errors.ArgumentError, match="'cudnn' does not take these arguments"):
        product(x, 7, "cudnn")
    with pytest.raises(utils.BackendSupportedError, match="no backend takes these arguments"):
        product(x, 7)
    with pytest.raises(utils.BackendSupportedError, match="backend is 'triton', expected 'cutlass' or 'cudnn'"):
        product(x, 1, "triton")
    assert product(x, 7, "triton", skip_check=True) == (7, "triton")
    assert product.has_backend("cudnn") and not product.has_backend("x") and product.has_backend_choices()
    assert product.is_backend_supported("cutlass", 90) and not product.is_backend_supported("cutlass", 80)
    assert product.is_compute_capability_supported(80) and not product.is_compute_capability_supported(75)
    with pytest.raises(errors.ArgumentError, match="expected a parameter called backend"):
        utils.backend_requirement({"a": fits_cudnn})(lambda x: x)
    with pytest.raises(errors.ArgumentError, match="'90' is no integer"):
        utils.supported_compute_capability(["90"])


def test_the_gpu_of_the_arrays_decides(monkeypatch):
    from fi_cupy import requirements

    for capability, text in ((80, "backend 'cutlass' does not support compute capability 8.0"),
                             (75, "product: compute capability 7.5 is not supported")):  # fmt: skip
        monkeypatch.setattr(requirements, "_capability", lambda given, c=capability: c)
        with pytest.raises(utils.GPUArchitectureError, match=text):
            product(np.ones(2), 1, "cutlass")
    monkeypatch.setattr(requirements, "_capability", lambda given: 80)
    product(np.ones(2))
    assert product.suitable_auto_backends == ["cudnn"]


def test_a_check_for_all():
    @utils.backend_requirement({}, common_check=lambda x: x < 5)
    def double(x):
        return 2 * x

    assert double(4) == 8 and not double.has_backend_choices()
    with pytest.raises(errors.ArgumentError, match="double: its requirements are not met"):
        double(5)


# --- cuda-bindings and figures --------------------------------------------------------------------------------------


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1


def test_results_of_cuda_bindings():
    good = CUresult.CUDA_SUCCESS
    assert cuda_utils.checkCudaErrors((good,)) is None
    assert cuda_utils.checkCudaErrors((good, 3)) == 3 and cuda_utils.checkCudaErrors((good, 3, 4)) == (3, 4)
    with pytest.raises(RuntimeError, match="CUDA error 1: CUDA_ERROR_INVALID_VALUE") as caught:
        cuda_utils.checkCudaErrors((CUresult.CUDA_ERROR_INVALID_VALUE, 0))
    assert caught.value.code == 1 and caught.value.name == "CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(TypeError, match="expected a CUresult"):
        cuda_utils.get_error_name(3)


def test_attentions_figures():
    # Causal, by counting: query i sees keys up to kv - qo + i.
    qo, kv, d = 5, 9, 8
    pairs = sum(kv - qo + i + 1 for i in range(qo))
    exact = 2 * pairs * (d + d)
    assert abs(testing.attention_flops(1, qo, kv, d, d, 1, True) - exact) <= 2 * qo * (d + d)  # half of the diagonal
    assert testing.attention_flops(2, qo, kv, d, 4, 3, False) == 2 * 2 * 3 * qo * kv * (d + 4)
    lens = np.array([3, 5]), [4, 9]
    one = sum(testing.attention_flops(1, m, n, d, d, 2, True) for m, n in zip(*lens, strict=True))
    assert testing.utils.attention_flops_with_actual_seq_lens(*lens, d, d, 2, True) == one
    assert testing.attention_tflops_per_sec(1, 4096, 4096, 128, 128, 32, False, 0.5) == pytest.approx(549.755813888)
    assert testing.attention_tflops_per_sec(1, 8, 8, 8, 8, 1, False, float("nan")) == 0
    assert testing.attention_tb_per_sec(1, 1, 1000, 128, 128, 8, 8, 1e-3, *["float32"] * 4) == pytest.approx(
        4 * 8 * 128 * (2 + 2000) / 1e6
    )
    with pytest.raises(errors.ArgumentError, match="more queries than keys"):
        testing.attention_flops(1, 9, 5, d, d, 1, True)


def test_times_need_a_gpu():
    with pytest.raises(errors.CudaUnavailableError):
        testing.bench_gpu_time(lambda: None)
    with pytest.raises(errors.UnsupportedError, match="enable_cupti"):
        testing.bench_gpu_time(lambda: None, enable_cupti=True)
    with pytest.raises(errors.ArgumentError, match="repeat_iters is 0"):
        testing.bench_gpu_time(lambda: None, repeat_iters=0)


def test_seeds():
    from fi_cupy import sampling

    probs = np.full((8, 50), 0.02, np.float32)
    testing.utils.set_seed(5)
    first = sampling.sampling_from_probs(probs), np.random.random()
    testing.utils.set_seed(5)
    assert (sampling.sampling_from_probs(probs) == first[0]).all() and np.random.random() == first[1]
