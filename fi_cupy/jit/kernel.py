"""A loaded kernel and its launch: the hot path from an operator to the driver.

A launch packs the parameters into a buffer of this thread and hands its address to cuLaunchKernel through CuPy's raw
driver binding: about half the host time of calling a CuPy RawKernel, and any stream will do.
"""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
from pathlib import Path
from typing import Any

from fi_cupy import device as devices  # as a module: device.py imports this package
from fi_cupy.jit import driver
from fi_cupy.jit.build import build
from fi_cupy.jit.cache import CachedKernel, KernelMeta
from fi_cupy.jit.spec import KernelSpec

_PARAM_BYTES = 4096  # the driver's limit on kernel parameters before CUDA 12.1 and on sm_75..89


class _Scratch(threading.local):
    """One parameter buffer a thread: the driver copies parameters during the launch call."""

    def __init__(self) -> None:
        raw = ctypes.create_string_buffer(_PARAM_BYTES + 64)
        base = ctypes.addressof(raw)
        offset = -base % 64
        self.buffer = memoryview(raw).cast("B")[offset : offset + _PARAM_BYTES]
        self._pointers = (ctypes.c_void_p * 1)(base + offset)
        self.address = ctypes.addressof(self._pointers)


_scratch = _Scratch()


class Kernel:
    """One cubin loaded on one device.

    Attributes
    ----------
    spec : KernelSpec
        What it is.
    meta : KernelMeta
        Registers, spills and compile time.
    device : int
        The GPU's index.
    """

    __slots__ = ("_current_device", "_launch", "_module", "_pack", "_pdl", "device", "meta", "ptr", "raw", "spec")

    def __init__(self, spec: KernelSpec, cached: CachedKernel, device: int) -> None:
        import cupy
        from cupy_backends.cuda.api import driver as cupy_driver

        self.spec = spec
        self.meta: KernelMeta = cached.meta
        self.device = device
        with cupy.cuda.Device(device):
            self._module, self.raw = _load(cached, spec.symbol)
            if spec.smem_bytes > 48 * 1024:
                self.raw.max_dynamic_shared_size_bytes = spec.smem_bytes
            if spec.cluster > 8:
                _allow_large_clusters(self.raw.kernel.ptr)
            self.ptr: int = self.raw.kernel.ptr
        self._pack = spec.params._struct.pack_into
        self._launch = cupy_driver.launchKernel
        self._current_device = cupy.cuda.runtime.getDevice
        self._pdl = devices.device_info(device).has_pdl

    def launch(
        self,
        grid: int | tuple[int, int, int],
        stream: int,
        *values: Any,
        smem: int | None = None,
        pdl: bool | None = False,
    ) -> None:
        """Launch on `stream` with the parameter struct's fields in order; an empty grid launches nothing.

        Parameters
        ----------
        grid : int or (x, y, z)
            CTAs.
        stream : int
            A raw ``cudaStream_t``.
        *values
            One value a field of ``spec.params``.
        smem : int, optional
            Dynamic shared memory in bytes, at most (and by default) ``spec.smem_bytes``.
        pdl : bool, optional
            Programmatic dependent launch where the device has it. The kernel then waits (griddepcontrol.wait) itself.
            None: the same, for the default of an operator whose kernel reads nothing early that others may still write.
        """
        x, y, z = (grid, 1, 1) if type(grid) is int else grid  # type: ignore[misc]
        if x == 0 or y == 0 or z == 0:
            return
        if self._current_device() != self.device:
            import cupy

            with cupy.cuda.Device(self.device):
                return self.launch(grid, stream, *values, smem=smem, pdl=pdl)
        scratch = _scratch
        self._pack(scratch.buffer, 0, *values)
        if smem is None:
            smem = self.spec.smem_bytes
        if self._pdl and (pdl is None or pdl):
            driver.launch_pdl(self.ptr, (x, y, z), self.spec.threads, smem, stream, scratch.address)
        else:
            self._launch(self.ptr, x, y, z, self.spec.threads, 1, 1, smem, stream, scratch.address, 0)

    def occupancy(self, smem: int | None = None) -> int:
        """CTAs of this kernel that one multiprocessor holds at a time."""
        from cupy_backends.cuda.api import driver as cupy_driver

        bytes_ = self.spec.smem_bytes if smem is None else smem
        return int(cupy_driver.occupancyMaxActiveBlocksPerMultiprocessor(self.ptr, self.spec.threads, bytes_))


def _load(cached: CachedKernel, symbol: str) -> tuple[Any, Any]:
    """RawModule from the cache's file; code that has no file goes through memory (or a temporary file)."""
    import cupy

    if cached.path is not None:
        module = cupy.RawModule(path=str(cached.path))
        return module, _function(module, symbol)
    suffix = ".ptx" if cached.meta.arch.startswith("compute_") else ".cubin"
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(symbol + suffix)
        try:
            os.write(descriptor, cached.code)
            module = cupy.RawModule(path=f"/proc/self/fd/{descriptor}")
            return module, _function(module, symbol)
        finally:
            os.close(descriptor)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / (symbol + suffix)
        path.write_bytes(cached.code)
        module = cupy.RawModule(path=str(path))
        return module, _function(module, symbol)


def _function(module: Any, symbol: str) -> Any:
    raw = module.get_function(symbol)
    _ = raw.kernel.ptr  # loads the module now, while its file is there
    return raw


def _allow_large_clusters(function: int) -> None:
    """Clusters above 8 CTAs need CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED (14)."""
    from cupy_backends.cuda.api import driver as cupy_driver

    cupy_driver.funcSetAttribute(function, 14, 1)


_kernels: dict[tuple[KernelSpec, int], Kernel] = {}
#: One a device: loading may wait for the device's work, which may be a collective that waits for another device, whose
#: thread must then be able to load what it needs to get there.
_locks: dict[int, threading.RLock] = {}


def load_kernel(spec: KernelSpec, device: int) -> Kernel:
    """The kernel of `spec` on GPU `device`: a dictionary hit when warm, else from the cache, else compiled."""
    kernel = _kernels.get((spec, device))
    if kernel is None:
        with _locks.setdefault(device, threading.RLock()):
            kernel = _kernels.get((spec, device))
            if kernel is None:
                kernel = _kernels[spec, device] = Kernel(spec, build(spec, devices.device_info(device).arch), device)
    return kernel
