"""What a kernel choice depends on: plain ints that a test can make by hand."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fi_cupy.errors import CudaUnavailableError, GPUArchitectureError
from fi_cupy.jit import env


@dataclass(frozen=True)
class DeviceInfo:
    """One GPU.

    Attributes
    ----------
    number : int
        Compute capability times ten (90 for Hopper).
    arch : str
        The compile target ("90a", or "compute_80" when FI_CUPY_TARGET says so).
    num_sms : int
        Streaming multiprocessors.
    smem_per_block, smem_per_sm : int
        Shared memory that one CTA may ask for, and that one multiprocessor has, bytes.
    l2_bytes : int
        Second-level cache, bytes.
    name : str
        The product's name.
    """

    number: int
    arch: str
    num_sms: int
    smem_per_block: int
    smem_per_sm: int
    l2_bytes: int
    name: str = ""

    @property
    def code_number(self) -> int:
        """Compute capability times ten of the code that runs: lower than `number` under FI_CUPY_TARGET."""
        return int("".join(c for c in self.arch if c.isdigit()))

    @property
    def has_pdl(self) -> bool:
        """Whether programmatic dependent launch works (sm_90 and later, and code compiled for it)."""
        return self.number >= 90 and self.code_number >= 90


def default_target(number: int) -> str:
    """The compile target of a compute capability: from sm_90 on the architecture-specific one."""
    return f"{number}a" if number >= 90 else str(number)


@lru_cache(maxsize=64)
def _device_info(index: int, target: str | None) -> DeviceInfo:
    from cupy.cuda import runtime

    p = runtime.getDeviceProperties(index)
    number = p["major"] * 10 + p["minor"]
    if number < 75:
        raise GPUArchitectureError(
            f"device {index} ({p['name'].decode()}): got compute capability {number / 10}, expected 7.5 or later"
        )
    return DeviceInfo(
        number, target or default_target(number), p["multiProcessorCount"], p["sharedMemPerBlockOptin"],
        p["sharedMemPerMultiprocessor"], p["l2CacheSize"], p["name"].decode(),
    )  # fmt: skip


def device_info(index: int) -> DeviceInfo:
    """The `DeviceInfo` of GPU `index`; FI_CUPY_TARGET overrides its compile target."""
    return _device_info(index, env.TARGET.get())


def num_devices() -> int:
    """How many GPUs this process sees; 0 without CuPy, driver or GPU."""
    try:
        from cupy.cuda import runtime

        return int(runtime.getDeviceCount())
    except Exception:  # CuPy raises its own error types, which are not importable without it
        return 0


def require_gpu(op: str) -> None:
    """Raise `CudaUnavailableError` when no GPU is present."""
    if num_devices() == 0:
        raise CudaUnavailableError(f"{op}: no CUDA GPU is present; CPU arrays run the NumPy reference instead")
