"""Kernels on the CPU: their own source, compiled by g++ with fibres for threads (emulator/emulator.hpp).

For semantics, barriers and shared memory, not for speed: a cluster of 2,048 threads and a row of 5,000 tokens take some
milliseconds. Arrays made by `device` look like a GPU's to the operators while `emulated` is active.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from kernel_jobs import ROOT

from fi_cupy import arrays
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import DType
from fi_cupy.jit.render import render
from fi_cupy.jit.spec import KernelSpec

HERE = Path(__file__).parent / "emulator"
BUILD = ROOT / "build" / "emulated"
HOPPER = DeviceInfo(90, "90a", 132, 232448, 233472, 50 << 20, "emulated H100")
AMPERE = DeviceInfo(80, "80", 108, 166912, 167936, 40 << 20, "emulated A100")

_CLUSTER = """#pragma once
#include "common/base.cuh"
namespace fi::ptx {
FI_DEVICE uint32_t cluster_rank() { return emulator::current->cta->rank; }
template <typename T>
FI_DEVICE T* cluster_map(T* p, uint32_t rank) { return emulator::cluster_map(p, rank); }
FI_DEVICE void cluster_arrive() { emulator::cluster_arrive(); }
FI_DEVICE void cluster_arrive_relaxed() { emulator::cluster_arrive(); }
FI_DEVICE void cluster_wait() { emulator::cluster_wait(); }
}
"""
_MAILBOX = """#pragma once
#include "ptx/cluster.cuh"
namespace fi::ptx {
FI_DEVICE void mailbox_open(uint64_t* box, uint32_t senders = 1) { emulator::mailbox_open(box, senders); }
FI_DEVICE void mailbox_announce(uint64_t* box, uint32_t bytes, uint32_t rank) {
  emulator::mailbox_announce(box, bytes, rank);
}
FI_DEVICE void mailbox_expect(uint64_t* box, uint32_t bytes) { emulator::mailbox_expect(box, bytes); }
FI_DEVICE void mailbox_wait(uint64_t* box, uint32_t parity) { emulator::mailbox_wait(box, parity); }
template <typename T>
FI_DEVICE void post(T* at, T value, uint64_t* box, uint32_t rank) { emulator::post(at, value, box, rank, false); }
template <typename T>
FI_DEVICE void post_add(T* at, T x, uint64_t* box, uint32_t rank) { emulator::post(at, x, box, rank, true); }
}
"""
_REPLACED = [
    (
        r"extern __shared__ __align__\(\d+\) uint8_t (smem|smem_bytes)\[\];",
        r"uint8_t* const \1 = emulator::shared_memory();",
    ),
    (r"__shared__ (\w+) shared;", r"\1& shared = *reinterpret_cast<\1*>(emulator::fixed_memory());"),
    (
        r"__shared__ (?:__align__\(\d+\) )?float (partial|scratch)((?:\[\w+\])+);",
        r"auto& \1 = *reinterpret_cast<float(*)\2>(emulator::fixed_memory());",
    ),
    (
        r"__shared__ typename Share::Target targets\[kThreads \* kUnroll\];",
        "auto* targets = reinterpret_cast<typename Share::Target*>(emulator::fixed_memory());",
    ),
    (  # of norm
        r"__shared__ float scratch\[2\]\[32\];",
        "auto& scratch = *reinterpret_cast<float(*)[2][32]>(emulator::fixed_memory());",
    ),
    (  # of lookup
        r"__shared__ float values\[32\];",
        "auto& values = *reinterpret_cast<float(*)[32]>(emulator::fixed_memory());",
    ),
    (
        r"__shared__ uint32_t positions\[32\];",
        "auto& positions = *reinterpret_cast<uint32_t(*)[32]>(emulator::fixed_memory() + 128);",
    ),
    (
        r"__shared__ float cluster_values\[kCluster\];",
        "auto& cluster_values = *reinterpret_cast<float(*)[kCluster]>(emulator::fixed_memory() + 256);",
    ),
    (
        r"__shared__ uint32_t cluster_positions\[kCluster\];",
        "auto& cluster_positions = *reinterpret_cast<uint32_t(*)[kCluster]>(emulator::fixed_memory() + 512);",
    ),
    (  # of rope
        r"__shared__ __align__\(16\) float cosines\[kHalf\];",
        "auto& cosines = *reinterpret_cast<float(*)[kHalf]>(emulator::fixed_memory());",
    ),
    (
        r"__shared__ __align__\(16\) float sines\[kHalf\];",
        "auto& sines = *reinterpret_cast<float(*)[kHalf]>(emulator::fixed_memory() + 4 * kHalf);",
    ),
    (  # beside `partial`, which takes 48 KB at most
        r"__shared__ __align__\(16\) float squares((?:\[\w+\])+);",
        r"auto& squares = *reinterpret_cast<float(*)\1>(emulator::fixed_memory() + (48 << 10));",
    ),
    (  # of the matrix products
        r'asm volatile\("cp\.async\.ca\.shared\.global \[%0\], \[%1\], 4.*?: "memory"\);',
        "if (valid) memcpy(to, from, 4); else memset(to, 0, 4);",
    ),
    (
        r'asm volatile\("cp\.async\.mbarrier\.arrive\.noinc.*?"r"\((.*?)\)\s*: "memory"\);',
        r"ptx::mbarrier_arrive(\1);",
    ),
    (
        r'asm volatile\("st\.shared\.v4\.u32 \[%0\], \{%1, %2, %3, %4\}.*?: "memory"\);',
        "memcpy(ptx::smem_at(at), &held[i], 16);",
    ),
    (
        r'asm volatile\("ld\.shared\.v4\.u32 \{%0.*?\[%4\];"\s*: "=r"\(v\.x\).*?: "r"\((.*?)\)\s*: "memory"\);',
        r"memcpy(&v, ptx::smem_at(\1), 16);",
    ),
    (r'asm\("min\.NaN.*?\);', "y = x != x || x < bound ? x : bound;"),
    (r'asm volatile\("st\.(?:cs\.)?v[42]\.u32.*?\);', "memcpy(p, &r, sizeof(r));"),
    (r'asm volatile\("ld\.global\.(?:nc|L1|v4|u32|u64).*?\);', "memcpy(&r, p, sizeof(r));"),
    (r'asm volatile\("st\.global\.v4\.u32.*?\);', "memcpy(p, &x, sizeof(x));"),
    (
        r'asm volatile\("st\.shared\.v4\.u32 \[%0\], \{%1, %1, %1, %1\};" ::"r"\((.*?)\), "r"\(0\)\s*: "memory"\);',
        r"memset(ptx::smem_at(\1), 0, 16);",
    ),
    (r'asm volatile\("cp\.async\.cg\.shared\.global \[.*?\);', "ptx::cp_async<16>(ptx::smem_at(to), from, valid);"),
    (r'asm\("\{ \.reg \.u32 t; sub\.cc.*?\);\n', "n -= a < b;\n"),
    (r'asm\("ex2.*?\);', "y = exp2f(x); if (fabsf(y) < 1.1754944e-38f) y = 0.f;"),
    (r'asm\("lg2.*?\);', "y = log2f(x);"),
    (r'asm\("rcp.*?\);', "y = 1.f / x;"),
    (r'asm\("rsqrt.*?\);', "y = 1.f / sqrtf(x);"),
    (r'asm\("sin.*?\);', "y = sinf(x);"),
    (r'asm\("cos.*?\);', "y = cosf(x);"),
    (r'asm\("tanh.*?\);', "y = tanhf(x);"),
    (r'asm volatile\("mov\.u32 %0, %%tid\.x.*?\);', "x = emulator::current->thread.x;"),
    (r'asm volatile\("bar\.sync %0, 128;" ::"r"\((.*?)\) : "memory"\);', r"emulator::named_barrier(\1, 128, true);"),
    (r"(?s)using int8_t = .*?#else\n", "#else\n"),
]
#: Headers whose instructions have a file of their own here.
_OWN = sorted((HERE / "ptx").glob("*.cuh"))


def available() -> bool:
    return shutil.which("g++") is not None and os.uname().machine == "x86_64"


def _text(path: Path) -> str:
    text = path.read_text()
    if path.name == "cluster.cuh":
        return _CLUSTER
    if path.name == "mailbox.cuh":
        return _MAILBOX
    for pattern, replacement in _REPLACED:
        text = re.sub(pattern, replacement, text, flags=re.S)
    return text.replace("FI_OFFSETOF(type, member) __INTADDR__(&(((type*)0)->member))",
                        "FI_OFFSETOF(type, member) __builtin_offsetof(type, member)")  # fmt: skip


@lru_cache(maxsize=1)
def _headers() -> Path:
    """The kernels with what g++ does not know replaced."""
    kernels = ROOT / "kernels"
    folders = ("common", "ptx", "sampling", "attention", "gemm", "quantization")
    files = [p for name in folders for p in sorted((kernels / name).glob("*.cuh"))]
    files += sorted(kernels.glob("*.cuh"))
    texts = {p.relative_to(kernels): _text(p) for p in files}
    texts |= {p.relative_to(HERE): p.read_text() for p in _OWN}
    digest = hashlib.sha256("".join(texts.values()).encode() + (HERE / "emulator.hpp").read_bytes()).hexdigest()[:16]
    folder = BUILD / digest
    texts |= {Path(name): '#include "emulator.hpp"\n' for name in ("cuda_bf16.h", "cuda_fp16.h", "cuda_fp8.h")}
    for name, text in texts.items():
        if not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            part = folder / f"{name}.{os.getpid()}"  # several processes may write it at once
            part.write_text(text)
            part.replace(folder / name)
    return folder


@lru_cache(maxsize=1)
def _precompiled() -> Path:
    """The folder of emulator.hpp, parsed once for all kernels: two thirds of what compiling a small one takes."""
    text = (HERE / "emulator.hpp").read_bytes()
    folder = BUILD / f"header-{hashlib.sha256(text).hexdigest()[:16]}"
    if not (folder / "emulator.hpp.gch").exists():
        folder.mkdir(parents=True, exist_ok=True)
        part, made = folder / f"{os.getpid()}.hpp", folder / f"{os.getpid()}.gch"
        part.write_bytes(text)
        part.replace(folder / "emulator.hpp")
        _compile("-x", "c++-header", str(folder / "emulator.hpp"), "-o", str(made))
        made.replace(folder / "emulator.hpp.gch")
    return folder


def _compile(*arguments: str) -> None:
    subprocess.run(
        ["g++", "-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing", "-w",
         "-D__CUDACC_RTC__", "-fPIC", *arguments],
        check=True,
    )  # fmt: skip


class EmulatedKernel:
    """What `load_kernel` gives, on the CPU."""

    order = 1  # the seed of the fibres' order
    together = False  # whether all CTAs run at a time; else one cluster after the other

    def __init__(self, spec: KernelSpec) -> None:
        self.spec = spec

    @cached_property
    def _launch(self) -> Any:
        """The compiled kernel; many are loaded and never launched."""
        spec, folder = self.spec, _headers()
        library = folder / f"{spec.symbol}.so"
        if not library.exists():
            source = folder / f"{spec.symbol}.{os.getpid()}.cpp"  # several processes may want it at once
            made = source.with_suffix(".so")
            source.write_text(
                render(spec)
                + f"""
extern "C" void emulator_launch(const void* p, uint32_t x, uint32_t y, uint32_t z, uint32_t threads, uint32_t cluster,
                                uint64_t bytes, uint64_t seed) {{
  const auto& params = *static_cast<const fi::{spec.params.name}*>(p);
  emulator::run([&] {{ {spec.symbol}(params); }}, {{x, y, z}}, threads, cluster, bytes, seed);
}}
"""
            )
            _compile(
                f"-I{_precompiled()}",
                f"-I{folder}",
                "-include",
                "emulator.hpp",
                "-shared",
                "-o",
                str(made),
                str(source),
            )
            made.replace(library)
        function = ctypes.CDLL(str(library)).emulator_launch
        function.argtypes = [ctypes.c_void_p] + [ctypes.c_uint32] * 5 + [ctypes.c_uint64] * 2
        function.restype = None
        return function

    def launch(
        self, grid: int | tuple[int, int, int], stream: int, *values: Any, smem: int | None = None, pdl: bool = False
    ) -> None:
        x, y, z = (grid, 1, 1) if isinstance(grid, int) else grid
        if x * y * z == 0:
            return
        raw = ctypes.create_string_buffer(self.spec.params.pack(*values))
        cluster = x if type(self).together else max(self.spec.cluster, 1)
        assert x % cluster == 0
        bytes_ = self.spec.smem_bytes if smem is None else smem
        assert bytes_ <= self.spec.smem_bytes
        self._launch(raw, x, y, z, self.spec.threads, cluster, bytes_, type(self).order)


def tensor_map(
    dtype: str, address: int, extents: Sequence[int], strides_bytes: Sequence[int], box: Sequence[int]
) -> bytes:
    """What `jit.driver.tensor_map` gives, for emulator/ptx/tma.cuh."""
    size = {"uint8": 1, "float32": 4}.get(dtype, 2)
    # What the driver of an H100 refuses.
    assert address % 16 == 0 and all(0 <= s < 1 << 40 and s % 16 == 0 for s in strides_bytes)
    assert all(1 <= n <= 1 << 32 for n in extents) and all(1 <= n <= 256 for n in box) and box[0] * size <= 128
    rank = len(extents)

    def five(values: Sequence[int], fill: int) -> list[int]:
        return [*values, *[fill] * (5 - len(values))]

    return struct.pack(
        "<QII5I5I5Q24x", address, rank, size, *five(extents, 1), *five(box, 1), *five([*strides_bytes], 0)
    )


class Device(np.ndarray[Any, Any]):
    """An array that counts as a GPU's."""


def device(array: np.ndarray[Any, Any]) -> Any:
    return np.ascontiguousarray(array).view(Device)


class _Emulated(arrays._NumPy):
    name = "emulated"

    def view(self, array: Any) -> arrays.View:
        v = super().view(array)
        return arrays.View(self, array, array.ctypes.data, v.shape, v.strides, v.dtype, 0, array)

    def empty(self, shape: tuple[int, ...], dtype: DType, like: arrays.View) -> arrays.View:
        made = np.empty(shape, dtype.np)
        made.view(np.uint8)[...] = 0xA5
        return self.view(made.view(Device))

    def stream(self, device: int) -> int:
        return 0


@lru_cache(maxsize=256)
def _kernel(spec: KernelSpec, device: int) -> EmulatedKernel:
    return EmulatedKernel(spec)


@contextlib.contextmanager
def emulated(info: DeviceInfo, *modules: Any) -> Any:
    """Launches of `modules` run here, as on the device `info`."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(arrays._by_type, {Device: _Emulated().view}))
        for module in modules:
            if hasattr(module, "load_kernel"):
                stack.enter_context(mock.patch.object(module, "load_kernel", _kernel))
            if hasattr(module, "device_info"):
                stack.enter_context(mock.patch.object(module, "device_info", lambda index: info))
        yield
