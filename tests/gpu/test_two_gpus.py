"""Two GPUs: every operator on the one that is not current, both at once from two threads, a model's heads over both."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from interop_cases import CASES, WRAPPER_KEYS, Case, copied, flat, has_arrays, kept_order, received, wrapper_cases

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import fi_cupy
from fi_cupy import errors
from fi_cupy.device import num_devices
from fi_cupy.interop.table import OPERATORS
from fi_cupy.interop.wrappers import WRAPPERS
from fi_cupy.testing.generators import normal, on_gpu, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
pytestmark = pytest.mark.skipif(num_devices() < 2, reason="needs two GPUs")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def current():
    """Whatever runs, the first GPU stays the current one."""
    cupy.cuda.Device(0).use()
    yield
    assert cupy.cuda.runtime.getDevice() == 0
    for device in (0, 1):
        with cupy.cuda.Device(device):
            cupy.cuda.runtime.deviceSynchronize()


def placed(value, device):
    """CuPy copies of NumPy arguments on a GPU."""
    if isinstance(value, (tuple, list)):
        return type(value)(placed(v, device) for v in value)
    if not isinstance(value, np.ndarray):
        return value
    with cupy.cuda.Device(device):
        made = kept_order(value, on_gpu)
        cupy.cuda.get_current_stream().synchronize()
        return made


def arguments(key, rng):
    row = OPERATORS[key[0]]
    kwargs = CASES[key](Case(rng, "bfloat16"))
    return row, kwargs | received(row, kwargs)


def results(row, kwargs):
    """What a call returns or overwrites."""
    made = row.function(**kwargs)
    changed = [kwargs[n] for n in (*row.receivers, *row.mutated) if kwargs.get(n) is not None]
    return [x for x in flat((made, *changed)) if x is not None]


def on_host(arrays):
    """(device, values) of results; waits for each device."""
    found = []
    for x in arrays:
        with cupy.cuda.Device(x.device.id):
            cupy.cuda.runtime.deviceSynchronize()
            found.append((x.device.id, np.ascontiguousarray(cupy.asnumpy(x))))
    return found


def same_on_both(first, second):
    assert [d for d, _ in first] == [0] * len(first) and [d for d, _ in second] == [1] * len(second)
    assert len(first) == len(second) > 0
    for (_, a), (_, b) in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8))


@pytest.mark.parametrize("key", list(CASES), ids="-".join)
def test_operator_on_the_gpu_that_is_not_current(rng, key):
    row, kwargs = arguments(key, rng)
    got = [
        on_host(results(row, {n: placed(copied(v), device) for n, v in kwargs.items()}))
        for device in (0, 1)
    ]  # fmt: skip
    same_on_both(*got)


@pytest.mark.parametrize("key", WRAPPER_KEYS, ids="-".join)
def test_wrapper_on_the_gpu_that_is_not_current(rng, key):
    case = wrapper_cases("bfloat16")[key]
    kwargs, own, got = case.run(Case(rng, "bfloat16")), key[0] == "BatchAttention", []
    for device in (0, 1):
        options = case.options | ({"device": f"cuda:{device}"} if own else {})
        first = () if own else (placed(np.zeros(32 << 20, np.uint8), device),)
        wrapper = WRAPPERS[key[0]].cls(*case.before, *first, **options)
        plan = {k: v for k, v in case.plan.items() if k != "args"}
        getattr(wrapper, WRAPPERS[key[0]].plan_name)(*copied(case.plan["args"]), **plan)
        got.append(on_host(flat(wrapper.run(**{n: placed(copied(v), device) for n, v in kwargs.items()}))))
    same_on_both(*got)


def has_several(key):
    """Whether a case has arrays to disagree; `segment_packbits` reads its offsets on the host, wherever they are."""
    _, kwargs = arguments(key, np.random.default_rng(0))
    return key[0] != "segment_packbits" and sum(map(has_arrays, kwargs.values())) > 1


@pytest.mark.parametrize("key", list(filter(has_several, CASES)), ids="-".join)
def test_arrays_of_both_gpus_are_refused(rng, key):
    """No kernel is launched that would read over there, or fault where the GPUs are not peers."""
    row, kwargs = arguments(key, rng)
    arrays = [n for n, v in kwargs.items() if has_arrays(v)]
    for elsewhere in arrays:
        with pytest.raises(errors.DeviceError, match=r"cuda:\d"):
            row.function(**{n: placed(copied(v), int(n == elsewhere)) for n, v in kwargs.items()})


def test_a_mask_is_reordered_where_it_lies():
    mask = np.arange(3 * 2 * 4).reshape(3, 2, 4) % 3 == 0
    got = fi_cupy.sparse.convert_bsr_mask_layout(placed(mask, 1), [0, 2, 3])
    want = fi_cupy.sparse.convert_bsr_mask_layout(mask, [0, 2, 3])
    ((where, values),) = on_host([got])
    assert where == 1 and (values == want).all()


def test_both_gpus_at_once_from_two_threads(rng):
    """Caches of kernels, plans and scratch memory are of one device each."""
    keys = [("rmsnorm", ""), ("append_paged_kv_cache", "packed"), ("sampling_from_probs", "valid"), ("top_k", ""),
            ("mm_bf16", ""), ("single_prefill_with_kv_cache", ""), ("single_decode_with_kv_cache", "")]  # fmt: skip
    rows = [arguments(key, rng) for key in keys]
    want = [on_host(results(row, {n: placed(copied(v), 0) for n, v in kw.items()})) for row, kw in rows]
    failures = []

    def work(device):
        try:
            with cupy.cuda.Device(1 - device):  # not even the thread's own device
                for _ in range(10):
                    for (row, kw), wanted in zip(rows, want, strict=True):
                        got = on_host(results(row, {n: placed(copied(v), device) for n, v in kw.items()}))
                        for (_, a), (where, b) in zip(wanted, got, strict=True):
                            assert where == device, row.name
                            np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8), row.name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(device,)) for device in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures, failures
    assert not any(thread.is_alive() for thread in threads)


def test_draws_without_a_seed(rng):
    """The default generator belongs to no device."""
    probs = placed(np.full((64, 40), 1 / 40, np.float32), 1)
    first, second = (fi_cupy.sampling_from_probs(probs) for _ in range(2))
    (where, a), (_, b) = on_host([first, second])
    assert where == 1 and (a != b).any() and a.min() >= 0 and a.max() < 40


def test_multipliers_of_one_live_on_their_device(rng):
    """`mm_fp8` keeps a constant on each device."""
    a, b = normal(rng, (32, 256), "float8_e4m3fn"), normal(rng, (64, 256), "float8_e4m3fn")
    got = []
    for device in (1, 0):
        x, w, alpha = (placed(v, device) for v in (a.view(np.uint8), b.view(np.uint8), np.float32([0.5])))
        got.append(on_host([fi_cupy.mm_fp8(x, w.T, alpha)]))
    same_on_both(got[1], got[0])
    want = a.astype(np.float64) @ b.astype(np.float64).T / 2
    assert_close(got[0][0][1].astype(np.float64), want, "bfloat16", "product")


# --- torch ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def torch():
    module = pytest.importorskip("torch")
    if module.cuda.device_count() < 2:
        pytest.skip("torch sees fewer than two GPUs")
    with module.no_grad():
        yield module
    assert module.cuda.current_device() == 0


def test_torch_tensors_on_the_second_gpu(torch, rng):
    """Results on the tensors' device and stream, compiled and captured there, while the first GPU is current."""
    from fi_cupy.interop import torch as ft

    x, w = normal(rng, (64, 1024), "float16"), normal(rng, (1024,), "float16")
    tw, fresh = torch.from_numpy(w).to("cuda:1"), torch.from_numpy(x).to("cuda:1")
    want = to_float64(fi_cupy.rmsnorm(torch.from_numpy(x).cuda(), torch.from_numpy(w).cuda()))
    compiled = torch.compile(lambda a: ft.rmsnorm(a, tw), fullgraph=True, backend="aot_eager")
    for run in (lambda a: fi_cupy.rmsnorm(a, tw), lambda a: ft.rmsnorm(a, tw), compiled):
        run(fresh)
        tx = torch.full_like(fresh, float("nan"))
        stream = torch.cuda.Stream("cuda:1")
        stream.wait_stream(torch.cuda.current_stream("cuda:1"))
        with torch.cuda.device(1), torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            tx.copy_(fresh)
            late = run(tx)
        stream.synchronize()
        assert late.device == tx.device
        np.testing.assert_array_equal(to_float64(late), want)
    out = torch.empty_like(fresh)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(1), torch.cuda.graph(graph, stream=torch.cuda.Stream("cuda:1")):
        ft.rmsnorm(tx, tw, out=out)
    tx.copy_(fresh)
    graph.replay()
    torch.cuda.synchronize("cuda:1")
    np.testing.assert_array_equal(to_float64(out), want)
    with pytest.raises(errors.DeviceError, match="weight is on cuda:0, expected cuda:1"):
        ft.rmsnorm(fresh, torch.from_numpy(w).cuda())


# --- JAX ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def jax():
    module = pytest.importorskip("jax")
    if module.default_backend() != "gpu" or len(module.local_devices()) < 2:
        pytest.skip("JAX sees fewer than two GPUs")
    return module


def test_jax_arrays_on_the_second_gpu(jax, rng):
    """jitted operators run where their arrays are, on that device's stream, and update a donated cache there."""
    from fi_cupy.interop import jax as fj

    second = jax.devices()[1]
    x, w = normal(rng, (64, 1024)), normal(rng, (1024,))
    want = to_float64(fi_cupy.rmsnorm(on_gpu(x), on_gpu(w)))
    jx, jw = (jax.device_put(a, second) for a in (x, w))
    for got in (fi_cupy.rmsnorm(jx, jw), jax.jit(fj.rmsnorm)(jx, jw)):
        assert got.devices() == {second}
        np.testing.assert_array_equal(np.asarray(got).astype(np.float64), want)
    case = CASES["append_paged_kv_cache", "packed"](Case(rng, "bfloat16"))
    cache = jax.device_put(case.pop("paged_kv_cache"), second)
    case = {n: jax.device_put(v, second) for n, v in case.items()}
    place = cache.unsafe_buffer_pointer()
    made = jax.jit(lambda c: fj.append_paged_kv_cache(paged_kv_cache=c, **case), donate_argnums=0)(cache)
    assert made.unsafe_buffer_pointer() == place and made.devices() == {second}
    wrapper = fj.BatchDecodeWithPagedKVCacheWrapper(1 << 20, devices=[second])
    wrapper.plan([0, 2, 3], [4, 1, 2], [1, 3], 4, 2, 64, 4, q_data_type="bfloat16")
    q = jax.device_put(normal(rng, (2, 4, 64)), second)
    assert jax.jit(wrapper.run)(q, made).devices() == {second}
    with pytest.raises(Exception, match="the arrays are on cuda:0, planned for cuda:1"):
        jax.block_until_ready(jax.jit(wrapper.run)(*(jax.device_put(a, jax.devices()[0]) for a in (q, made))))


@pytest.mark.parametrize("command", ["jax", "jax --record", "torch"])
def test_heads_over_both_gpus(command):
    """A decode step with XLA's collectives, and with NCCL and a process a GPU, against the step on one."""
    pytest.importorskip(command.split()[0])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench" / "tensor_parallel.py"), *command.split(), "--small"],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "logits apart" in done.stdout
