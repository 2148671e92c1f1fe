"""Every environment variable fi_cupy reads, in one place: ours first, FlashInfer's name as a fallback."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """One environment variable: its names in order of precedence, and what it does."""

    names: tuple[str, ...]
    help: str

    def get(self) -> str | None:
        """The first of the names that is set and not empty."""
        for name in self.names:
            value = os.environ.get(name)
            if value:
                return value
        return None

    def flag(self) -> bool:
        """Whether it is set to something other than 0, false, no or off."""
        value = self.get()
        return value is not None and value.strip().lower() not in ("0", "false", "no", "off")


CACHE_DIR = Variable(
    ("FI_CUPY_CACHE_DIR", "FLASHINFER_WORKSPACE_BASE"),
    "folder of the kernel cache (the second name: a base, fi_cupy is added)",
)
NO_COMPILE = Variable(
    ("FI_CUPY_NO_COMPILE", "FLASHINFER_DISABLE_JIT"), "1: raise instead of compiling a kernel that is not in the cache"
)
ARCH_LIST = Variable(
    ("FI_CUPY_CUDA_ARCH_LIST", "FLASHINFER_CUDA_ARCH_LIST"), 'architectures for warmup, e.g. "7.5 8.0 9.0a 12.0f"'
)
TARGET = Variable(
    ("FI_CUPY_TARGET",), 'compile for this target, not the device\'s own, e.g. "compute_80" (PTX that newer GPUs run)'
)
AUTOTUNE_DIR = Variable(
    ("FI_CUPY_AUTOTUNE_DIR", "FLASHINFER_AUTOTUNE_DIR"),
    'folder of the tuned choices that every process reads; "off": none [default: tuned/ in the kernel cache]',
)
CUBIN_PACK = Variable(("FI_CUPY_CUBIN_PACK",), "cubin packs for `fi-cupy download-cubin`, separated as in PATH")
PRELOAD = Variable(("FI_CUPY_PRELOAD",), "profile to compile and load when fi_cupy is imported")
VERBOSE = Variable(("FI_CUPY_VERBOSE", "FLASHINFER_JIT_VERBOSE"), "1: print each compilation to standard error")
LINEINFO = Variable(("FI_CUPY_LINEINFO", "FLASHINFER_JIT_LINEINFO"), "1: compile with line information for profilers")
DEBUG = Variable(
    ("FI_CUPY_JIT_DEBUG", "FLASHINFER_JIT_DEBUG", "FLASHINFER_DEBUG"),
    "1: compile for cuda-gdb, without optimisation (-G); slow kernels",
)
EXTRA_FLAGS = Variable(
    ("FI_CUPY_EXTRA_NVRTC_FLAGS", "FLASHINFER_EXTRA_CUDAFLAGS"), "further NVRTC options, separated by spaces"
)
COMPILE_TIMEOUT = Variable(("FI_CUPY_COMPILE_TIMEOUT",), "seconds one compilation may take (default 300)")
LOG_LEVEL = Variable(
    ("FI_CUPY_LOGLEVEL", "FLASHINFER_LOGLEVEL"),
    "log every call: 1 names, 3 arguments and results, 5 their figures, 10 files to replay them from",
)
LOG_DEST = Variable(
    ("FI_CUPY_LOGDEST", "FLASHINFER_LOGDEST"), "where calls are logged: stdout (default), stderr or a file, %i: the pid"
)
LOGGING_LEVEL = Variable(
    ("FI_CUPY_LOGGING_LEVEL", "FLASHINFER_LOGGING_LEVEL"), 'level of the logger "fi_cupy": debug, info ...'
)
DUMP_DIR = Variable(("FI_CUPY_DUMP_DIR", "FLASHINFER_DUMP_DIR"), "folder of calls at level 10 [default: fi_cupy_dumps]")
DUMP_MAX_SIZE_GB = Variable(("FI_CUPY_DUMP_MAX_SIZE_GB", "FLASHINFER_DUMP_MAX_SIZE_GB"), "how much, GB (default 20)")
DUMP_MAX_COUNT = Variable(("FI_CUPY_DUMP_MAX_COUNT", "FLASHINFER_DUMP_MAX_COUNT"), "how many calls (default 1000)")
DUMP_INCLUDE = Variable(
    ("FI_CUPY_DUMP_INCLUDE", "FLASHINFER_DUMP_INCLUDE"), 'which calls, e.g. "*decode*,BatchPrefill*.run" (default all)'
)
DUMP_EXCLUDE = Variable(("FI_CUPY_DUMP_EXCLUDE", "FLASHINFER_DUMP_EXCLUDE"), "and which of them not")

ALL: tuple[Variable, ...] = (
    CACHE_DIR, NO_COMPILE, ARCH_LIST, TARGET, AUTOTUNE_DIR, CUBIN_PACK, PRELOAD, VERBOSE, LINEINFO, DEBUG, EXTRA_FLAGS,
    COMPILE_TIMEOUT, LOG_LEVEL, LOG_DEST, LOGGING_LEVEL, DUMP_DIR, DUMP_MAX_SIZE_GB, DUMP_MAX_COUNT,
    DUMP_INCLUDE, DUMP_EXCLUDE,
)  # fmt: skip


def cache_dir() -> Path:
    """The kernel cache's folder: FI_CUPY_CACHE_DIR, or the user's cache folder for fi_cupy."""
    own = os.environ.get("FI_CUPY_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    base = os.environ.get("FLASHINFER_WORKSPACE_BASE")
    if base:
        return Path(base).expanduser() / "fi_cupy"
    import platformdirs

    return Path(platformdirs.user_cache_dir("fi_cupy", appauthor=False))
