"""Typed errors: each message names the operator, the argument, what it got and what it wanted."""

from __future__ import annotations


class FiCupyError(Exception):
    """Base of every error that fi_cupy raises on purpose."""


class ArgumentError(FiCupyError, ValueError):
    """An argument has a value that the operator cannot take."""


class ShapeError(ArgumentError):
    """An array has the wrong number of dimensions or the wrong extents."""


class DTypeError(ArgumentError, TypeError):
    """An array has an element type that the operator does not take."""


class LayoutError(ArgumentError):
    """An array has strides or an alignment that the operator cannot read."""


class DeviceError(ArgumentError):
    """Arrays live on different devices, or on one that cannot run the operator."""


class FrameworkError(ArgumentError, TypeError):
    """An object is no array of a known framework and speaks no DLPack."""


class ImmutableArrayError(ArgumentError, TypeError):
    """An in-place operator got an array that must not be written (JAX, read-only NumPy)."""


class PlanError(FiCupyError, RuntimeError):
    """``run()`` came before ``plan()``, or contradicts what was planned."""


class WorkspaceError(ArgumentError):
    """A workspace buffer is too small; the message holds the exact size needed."""


class UnsupportedError(FiCupyError, NotImplementedError):
    """A combination of options that no kernel provides; the message says what would work."""


class GPUArchitectureError(UnsupportedError):
    """The device's compute capability is below what the kernel needs."""


class CudaUnavailableError(FiCupyError, RuntimeError):
    """CuPy, NVRTC or the CUDA headers are missing, or no GPU is present."""


class CacheError(FiCupyError, OSError):
    """A cache pack or folder cannot be read or written by a command that was asked to."""


class PackError(CacheError):
    """A cubin pack is broken, none of fi_cupy's, or cannot be written; nothing of it has been taken."""


class CompileError(FiCupyError, RuntimeError):
    """NVRTC refused or crashed on a source.

    Attributes
    ----------
    symbol : str
        The kernel instance that was compiled.
    source : str
        The rendered translation unit.
    log : str
        NVRTC's whole log; empty when the compiler crashed.
    """

    def __init__(self, message: str, *, symbol: str = "", source: str = "", log: str = "") -> None:
        super().__init__(message)
        self.symbol = symbol
        self.source = source
        self.log = log


class TracingError(CompileError, TypeError):
    """A Python function of an attention variant does what cannot become a kernel; the message holds file and line."""


class MissingKernelError(FiCupyError, RuntimeError):
    """Compilation is switched off and the kernel is not in the cache.

    Attributes
    ----------
    spec : KernelSpec, JitSpec or None
        What is missing.
    """

    def __init__(self, message: str, spec: object = None) -> None:
        super().__init__(message)
        self.spec = spec


MissingJITCacheError = MissingKernelError
