"""Host time: microseconds of Python between the call of an operator and its return, and of plan().

The queue of launches is drained between the rounds, so that a full queue never makes the host wait for the GPU.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import fi_cupy
from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase, BenchSkip, host_case, random_array

CALLS, ROUNDS = 200, 15
HIDDEN = 4096


def host_us(call: Callable[[], Any], calls: int = CALLS, rounds: int = ROUNDS) -> float:
    """Median over rounds of the mean host time of a call, microseconds."""
    import cupy

    for _ in range(20):
        call()
    samples = []
    for _ in range(rounds):
        cupy.cuda.runtime.deviceSynchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls * 1e6)
    cupy.cuda.runtime.deviceSynchronize()
    return statistics.median(samples)


def _cupy_arrays() -> tuple[Any, Any, Any]:
    return (
        random_array((1, HIDDEN), "bfloat16", 1),
        random_array((HIDDEN,), "bfloat16", 2),
        random_array((1, HIDDEN), "bfloat16", 3),
    )


def _torch_arrays() -> tuple[Any, Any, Any]:
    import torch

    if not torch.cuda.is_available():
        raise BenchSkip("torch has no CUDA")
    x, w, out = (torch.from_dlpack(a) for a in _cupy_arrays())
    return x, w, out


def _bare_launch() -> float:
    """The same kernel through CuPy's RawKernel with its parameters ready: what any CuPy launch costs."""
    from fi_cupy.dtypes import bfloat16
    from fi_cupy.jit.kernel import load_kernel
    from fi_cupy.norm import norm_spec

    x, w, out = _cupy_arrays()
    spec = norm_spec(bfloat16, bfloat16, bfloat16, HIDDEN, 8)
    known = {
        "input": x.data.ptr, "output": out.data.ptr, "weight": w.data.ptr, "in_stride_inner": HIDDEN,
        "out_stride_inner": HIDDEN, "inner": 1, "hidden": HIDDEN, "eps": 1e-6, "scale_value": 1.0,
    }  # fmt: skip
    packed = spec.params.pack(*(known.get(name, 0) for name, _ in spec.params.fields))
    record = np.frombuffer(bytearray(packed), dtype=np.dtype((np.void, spec.params.size)))[0]
    kernel = load_kernel(spec, x.data.device_id).raw
    grid, block = (1,), (spec.threads,)
    return host_us(lambda: kernel(grid, block, (record,)))


def _rmsnorm(arrays: Callable[[], tuple[Any, Any, Any]], with_out: bool) -> float:
    x, w, out = arrays()
    if with_out:
        return host_us(lambda: fi_cupy.rmsnorm(x, w, out=out))
    return host_us(lambda: fi_cupy.rmsnorm(x, w))


def _jax_rmsnorm() -> float:
    try:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or JAX takes most of the memory for itself
        import jax
    except ImportError as error:
        raise BenchSkip(str(error)) from error
    if jax.default_backend() != "gpu":
        raise BenchSkip(f"JAX's backend is {jax.default_backend()}")
    x, w = jax.numpy.ones((1, HIDDEN), "bfloat16"), jax.numpy.ones((HIDDEN,), "bfloat16")
    return host_us(lambda: fi_cupy.rmsnorm(x, w), calls=50)


def _torch_add() -> float:
    x, _, out = _torch_arrays()
    return host_us(lambda: out.add_(x))


def _torch_rms_norm() -> float:
    import torch

    x, w, _ = _torch_arrays()
    return host_us(lambda: torch.nn.functional.rms_norm(x, (HIDDEN,), w))


def _page_table(batch: int, kv_len: int, page_size: int = 16) -> tuple[Any, Any, Any]:
    """indptr, indices and last_page_len on the host, the pages in random order."""
    pages = -(-kv_len // page_size)
    indptr = np.arange(batch + 1, dtype=np.int32) * pages
    indices = np.random.default_rng(0).permutation(batch * pages).astype(np.int32)
    return indptr, indices, np.full(batch, kv_len - (pages - 1) * page_size, np.int32)


def _wrapper(module: str, name: str) -> Any:
    """A wrapper with its own 32 MB workspace."""
    import importlib

    import cupy

    try:
        kind = getattr(importlib.import_module(f"fi_cupy.{module}"), name)
    except (ImportError, AttributeError) as error:
        raise BenchSkip(f"{name} is not there: {error}") from error
    return kind(cupy.empty(32 << 20, np.uint8))


def _on_gpu(arrays: tuple[Any, ...]) -> tuple[Any, ...]:
    import cupy

    return tuple(cupy.asarray(x) for x in arrays)


def _decode_plan(batch: int, kv_len: int, on_gpu: bool = False) -> float:
    wrapper, table = _wrapper("decode", "BatchDecodeWithPagedKVCacheWrapper"), _page_table(batch, kv_len)
    table = _on_gpu(table) if on_gpu else table
    return host_us(lambda: wrapper.plan(*table, 32, 8, 128, 16, q_data_type="bfloat16"), calls=20, rounds=9)


def _decode_run() -> float:
    wrapper, table = _wrapper("decode", "BatchDecodeWithPagedKVCacheWrapper"), _page_table(1, 4096)
    wrapper.plan(*table, 32, 8, 128, 16, q_data_type="bfloat16")
    q, out = random_array((1, 32, 128), "bfloat16", 1), random_array((1, 32, 128), "bfloat16", 2)
    cache = random_array((256, 2, 16, 8, 128), "bfloat16", 3)
    return host_us(lambda: wrapper.run(q, cache, out=out))


def _prefill_plan(batch: int, qo_len: int, kv_len: int, on_gpu: bool = False) -> float:
    wrapper = _wrapper("prefill", "BatchPrefillWithPagedKVCacheWrapper")
    table = (np.arange(batch + 1, dtype=np.int32) * qo_len, *_page_table(batch, kv_len))
    table = _on_gpu(table) if on_gpu else table
    return host_us(
        lambda: wrapper.plan(*table, 32, 8, 128, 16, causal=True, q_data_type="bfloat16"),
        calls=10,
        rounds=9,
    )


def _ragged_plan(batch: int, length: int) -> float:
    wrapper = _wrapper("prefill", "BatchPrefillWithRaggedKVCacheWrapper")
    indptr = np.arange(batch + 1, dtype=np.int32) * length
    return host_us(
        lambda: wrapper.plan(indptr, indptr, 32, 8, 128, causal=True, q_data_type="bfloat16"), calls=10, rounds=9
    )


def cases(device: DeviceInfo) -> list[BenchCase]:
    """Launches first, then run() and plan()."""
    out_row, new_row = "host rmsnorm T1 H4096 (out=)", "host rmsnorm T1 H4096 (alloc)"
    torch_peers = {"torch.add_": _torch_add, "torch rms_norm": _torch_rms_norm}
    return [
        host_case("bare CuPy RawKernel launch", _bare_launch),
        host_case(
            "rmsnorm 1x4096, CuPy, out=",
            lambda: _rmsnorm(_cupy_arrays, True),
            peers={"bare launch": _bare_launch},
            recorded=out_row,
        ),
        host_case(
            "rmsnorm 1x4096, torch, out=",
            lambda: _rmsnorm(_torch_arrays, True),
            peers={"bare launch": _bare_launch, **torch_peers},
            recorded=[out_row, "host torch.add_ T1 H4096"],
        ),
        host_case("rmsnorm 1x4096, CuPy, new array", lambda: _rmsnorm(_cupy_arrays, False), recorded=new_row),
        host_case("rmsnorm 1x4096, torch, new array", lambda: _rmsnorm(_torch_arrays, False), recorded=new_row),
        host_case("rmsnorm 1x4096, JAX", _jax_rmsnorm),
        host_case("decode run(), 1x4096, out=", _decode_run, recorded="host run decode b1 kv4096 h32/8 tc1"),
        host_case("decode plan(), 1x4096", lambda: _decode_plan(1, 4096), recorded="plan decode b1 kv4096 h32/8 tc1"),
        host_case(
            "decode plan(), 64x8192", lambda: _decode_plan(64, 8192), recorded="plan decode b64 kv8192 h32/8 tc1"
        ),
        host_case(
            "decode plan(), 256x1024", lambda: _decode_plan(256, 1024), recorded="plan decode b256 kv1024 h32/8 tc1"
        ),
        host_case(
            "prefill plan(), 16 x (512, 4096)",
            lambda: _prefill_plan(16, 512, 4096),
            recorded="plan paged.fa2 b16 q512 kv4096 h32/8 d128 p16 c",
        ),
        host_case(
            "prefill plan(), 1 x (4096, 16384)",
            lambda: _prefill_plan(1, 4096, 16384),
            recorded="plan paged.fa2 b1 q4096 kv16384 h32/8 d128 p16 c",
        ),
        host_case("prefill plan(), ragged 16x1024", lambda: _ragged_plan(16, 1024)),
        host_case("decode plan(), 64x8192, page table on the GPU", lambda: _decode_plan(64, 8192, True)),
        host_case(
            "prefill plan(), 16 x (512, 4096), page table on the GPU", lambda: _prefill_plan(16, 512, 4096, True)
        ),
    ]
