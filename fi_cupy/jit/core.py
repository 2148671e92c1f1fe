"""Named modules of kernels: fi_cupy's own instances, or CUDA files of the caller's, built, loaded and listed by name.

A `JitSpec` says what a module holds; nothing is compiled before `JitSpec.build` or `JitSpec.build_and_load`. What is
compiled lies in the kernel cache, whose keys cover sources, headers, options, architecture and compiler: a module is
compiled when every kernel of it is there. Operators do not ask for modules, they load what they launch; modules are
for compiling ahead of time, and for kernels of one's own.

Source: flashinfer.jit.core.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from fi_cupy.device import device_info, num_devices, require_gpu
from fi_cupy.errors import ArgumentError, CacheError, GPUArchitectureError, MissingKernelError, UnsupportedError
from fi_cupy.jit import env
from fi_cupy.jit.build import build_job, cache, job_for
from fi_cupy.jit.cache import CachedKernel, job_key
from fi_cupy.jit.compiler import CompileJob, compile_many, nvrtc_version, target_options
from fi_cupy.jit.kernel import Kernel, load_kernel
from fi_cupy.jit.sources import kernel_root
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.profiles import default_archs, default_processes

__all__ = [
    "JitModule",
    "JitSpec",
    "JitSpecRegistry",
    "JitSpecStatus",
    "MissingJITCacheError",
    "build_jit_specs",
    "check_cuda_arch",
    "clear_cache_dir",
    "gen_jit_spec",
    "jit_spec_registry",
]

MissingJITCacheError = MissingKernelError

_NAME = re.compile(r"[A-Za-z_]\w*")
_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*["<]([^">]+)[">]', re.MULTILINE)
#: nvcc's optimisation levels, and how many threads it may use: NVRTC always optimises, on one.
_WITHOUT_EFFECT = re.compile(r"-O[0-3]|--?threads(=\d+)?|-t\d+")


@dataclass(frozen=True)
class JitSpec:
    """A module of kernels.

    Attributes
    ----------
    name : str
        For the instances of fi_cupy FlashInfer's uri.
    kernels : function
        From a compile target ("90a") to the instances of fi_cupy that the module holds there.
    sources : tuple of Path
        CUDA files, each a translation unit of its own.
    extra_cuda_cflags : tuple of str
        Options of NVRTC for them.
    extra_include_dirs : tuple of Path
        Where they look for headers, behind their own folder; fi_cupy's ``kernels/`` comes last.
    functions : tuple of (name, function)
        Python functions that the loaded module has beside its kernels.
    """

    name: str
    kernels: Callable[[str], Sequence[KernelSpec]] = field(default=lambda arch: ())
    sources: tuple[Path, ...] = ()
    extra_cuda_cflags: tuple[str, ...] = ()
    extra_include_dirs: tuple[Path, ...] = ()
    functions: tuple[tuple[str, Callable[..., Any]], ...] = ()
    #: Units are compiled each on its own and never linked.
    needs_device_linking: bool = field(default=False, init=False)

    def jobs(self, arch: str) -> list[CompileJob]:
        """What has to be compiled for a target."""
        own = [job_for(spec, arch) for spec in self.kernels(arch) if spec.supports(arch)]
        return own + [self._source_job(path, arch) for path in self.sources]

    def _source_job(self, path: Path, arch: str) -> CompileJob:
        text = _read(path)
        folders = (path.parent, *self.extra_include_dirs, kernel_root())
        symbol = self.name if len(self.sources) == 1 else f"{self.name}_{path.stem}"
        options = [*target_options(arch), "-std=c++17", "-default-device", "--ptxas-options=-v"]
        if env.DEBUG.flag():
            options.append("-G")
        elif env.LINEINFO.flag():
            options.append("-lineinfo")
        options += [*self.extra_cuda_cflags, *shlex.split(env.EXTRA_FLAGS.get() or "")]
        return CompileJob(symbol, text, tuple(_headers(text, folders).items()), arch, tuple(options))

    def _targets(self) -> tuple[str, ...]:
        """The current GPU's target, else the environment's."""
        if num_devices() == 0:
            return default_archs()
        from cupy.cuda import runtime

        return (device_info(int(runtime.getDevice())).arch,)

    def _all_jobs(self) -> list[CompileJob]:
        return [job for arch in self._targets() for job in self.jobs(arch)]

    @property
    def is_compiled(self) -> bool:
        """Whether the cache holds every kernel, for the current GPU or the environment's targets."""
        return all(_cached(job) is not None for job in self._all_jobs())

    def _first_job(self) -> CompileJob:
        jobs = self._all_jobs()
        if not jobs:
            raise GPUArchitectureError(f"{self.name}: no kernel of it is for {' '.join(self._targets())}")
        return jobs[0]

    def get_library_path(self) -> Path:
        """The code of the module's first kernel in the cache, whether it is there or not."""
        job = self._first_job()
        name = "kernel.ptx" if job.arch.startswith("compute_") else "kernel.cubin"
        return cache().entry_dir(job.arch, job.symbol, _key(job)) / name

    @property
    def lock_path(self) -> Path:
        """The lock that processes take to compile the module's first kernel; every kernel has its own."""
        return cache().root / "locks" / f"{_key(self._first_job())[:16]}.lock"

    def build(self, verbose: bool = False, need_lock: bool = True) -> None:
        """Compile what the cache does not hold; needs no GPU where the environment names targets.

        Parameters
        ----------
        verbose : bool
            Print each kernel.
        need_lock : bool
            Each kernel is compiled under its lock either way.

        Raises
        ------
        MissingJITCacheError
            Compilation is switched off, and something is not in the cache.
        CompileError
            NVRTC refused a source.
        """
        _build([(job, self) for job in self._all_jobs()], verbose)

    def load(self, so_path: Path | None = None, class_name: str | None = None) -> JitModule:
        """The module on the current GPU; its kernels are loaded (and compiled, if need be) when they are asked for.

        `so_path` and `class_name`, FlashInfer's shared library and class, have no counterpart: only None is taken.
        """
        if so_path is not None or class_name is not None:
            raise UnsupportedError(f"{self.name}: load takes no library and no class; a module is its kernels")
        require_gpu(f"{self.name}: load")
        from cupy.cuda import runtime

        return JitModule(self, int(runtime.getDevice()))

    def build_and_load(self, class_name: str | None = None) -> JitModule:
        """`build`, then `load`."""
        self.build(env.VERBOSE.flag())
        return self.load(class_name=class_name)

    def try_load(self) -> JitModule | None:
        """`load` if the module is compiled, else None."""
        return self.load() if self.is_compiled else None


class JitModule:
    """A module's functions and kernels on one GPU, as attributes by their names.

    An instance of fi_cupy comes as a `fi_cupy.jit.Kernel`. A function of the caller's own CUDA files, which must be
    ``extern "C" __global__``, comes as CuPy launches it: ``module.scale((blocks,), (threads,), (x, y, n))``.
    """

    def __init__(self, spec: JitSpec, device: int) -> None:
        self._spec, self._device = spec, device

    @cached_property
    def _instances(self) -> dict[str, KernelSpec]:
        arch = device_info(self._device).arch
        return {spec.symbol: spec for spec in self._spec.kernels(arch) if spec.supports(arch)}

    @cached_property
    def _units(self) -> list[Any]:
        import cupy

        found = []
        for path in self._spec.sources:
            made = build_job(self._spec._source_job(path, device_info(self._device).arch))
            if made.path is None:
                raise CacheError(f"{self._spec.name}: the kernel cache cannot be written, so {path} cannot be loaded")
            with cupy.cuda.Device(self._device):
                found.append(cupy.RawModule(path=str(made.path)))
        return found

    def get_function(self, symbol: str) -> Any:
        """A kernel by its symbol."""
        if symbol in self._instances:
            return load_kernel(self._instances[symbol], self._device)
        import cupy

        for unit in self._units:
            try:
                with cupy.cuda.Device(self._device):
                    made = unit.get_function(symbol)
                    _ = made.kernel.ptr  # looks for it now
                return made
            except cupy.cuda.driver.CUDADriverError:
                continue
        raise ArgumentError(f"{self._spec.name}: there is no kernel {symbol!r} in it")

    def __getattr__(self, symbol: str) -> Any:
        if symbol.startswith("_"):
            raise AttributeError(symbol)
        for name, function in self._spec.functions:
            if name == symbol:
                return function
        try:
            return self.get_function(symbol)
        except ArgumentError as error:
            raise AttributeError(str(error)) from None

    def __dir__(self) -> list[str]:
        return [*(name for name, _ in self._spec.functions), *self._instances, "get_function", "kernels"]

    def kernels(self) -> list[Kernel]:
        """Every instance of fi_cupy in the module, loaded."""
        return [load_kernel(spec, self._device) for spec in self._instances.values()]


# --- building --------------------------------------------------------------------------------------------------------


def _key(job: CompileJob) -> str:
    return job_key(job, nvrtc_version())


def _cached(job: CompileJob) -> CachedKernel | None:
    return cache().get(job.arch, job.symbol, _key(job))


def _build(jobs: Iterable[tuple[CompileJob, JitSpec]], verbose: bool) -> None:
    """Compile what is missing, in parallel; the first failure is raised when all others have been tried."""
    owners = {job: spec for job, spec in jobs if _cached(job) is None}
    if owners and env.NO_COMPILE.flag():
        job, spec = next(iter(owners.items()))
        raise MissingKernelError(
            f"{spec.name}: {job.symbol} is not in the cache {cache().root} for {job.arch}, and compilation is switched "
            f"off ({' / '.join(env.NO_COMPILE.names)})",
            spec,
        )
    failure: BaseException | None = None
    processes = min(default_processes(), max(len(owners), 1))
    for job, outcome in compile_many(owners, processes, build_job):
        if isinstance(outcome, BaseException):
            failure = failure or outcome
        elif verbose:
            print(f"{job.arch:>6s} {outcome.meta.seconds:6.2f} s  {job.symbol}")
    if failure is not None:
        raise failure


def build_jit_specs(specs: Sequence[JitSpec], verbose: bool = False, skip_prebuilt: bool = True) -> None:
    """Compile several modules, all their kernels in parallel.

    Parameters
    ----------
    specs : sequence of JitSpec
    verbose : bool
        Print each kernel.
    skip_prebuilt : bool
        True: what the cache holds is never compiled again. False: not supported; `clear_cache_dir` first.

    Raises
    ------
    MissingJITCacheError, CompileError, UnsupportedError
    """
    if not skip_prebuilt:
        raise UnsupportedError(
            "build_jit_specs: skip_prebuilt is False, expected True: an entry of the cache is never stale; "
            "clear_cache_dir() empties it"
        )
    _build([(job, spec) for spec in specs for job in spec._all_jobs()], verbose)


def check_cuda_arch() -> None:
    """Raise unless there is a target that fi_cupy compiles for: compute capability 7.5 or later.

    Raises
    ------
    ArgumentError
        The environment's list holds something else, or names none and there is no GPU.
    GPUArchitectureError
        The GPU is older.
    """
    default_archs()


def clear_cache_dir() -> None:
    """Remove every kernel from the cache; tuned choices stay."""
    cache().clear()


# --- sources of the caller's -----------------------------------------------------------------------------------------


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"gen_jit_spec: the source {path} cannot be read: {error}") from None


def _headers(source: str, folders: Sequence[Path]) -> dict[str, bytes]:
    """Every header that a source includes from these folders, transitively, under the name it is included by.

    NVRTC gets them in memory, so the cache's key covers what it compiles. Others are CUDA's own.
    """
    found: dict[str, Path] = {}
    pending = [(name, folders) for name in _INCLUDE.findall(source)]
    while pending:
        name, places = pending.pop()
        path = next((folder / name for folder in places if (folder / name).is_file()), None)
        if path is None:
            continue
        path = path.resolve()
        if found.setdefault(name, path) != path:
            raise ArgumentError(f"gen_jit_spec: {name!r} means both {found[name]} and {path}; include one by its path")
        nested = _INCLUDE.findall(_read(path))
        pending += [(inner, (path.parent, *folders)) for inner in nested if inner not in found]
    return {name: path.read_bytes() for name, path in sorted(found.items())}


def _options(flags: Sequence[str]) -> tuple[str, ...]:
    """nvcc's flags as NVRTC takes them."""
    made = []
    for flag in flags:
        if _WITHOUT_EFFECT.fullmatch(flag):
            continue
        if flag.startswith(("-gencode", "--generate-code", "-arch", "--gpu-architecture")):
            raise ArgumentError(
                f"gen_jit_spec: extra_cuda_cflags has {flag!r}; the target is the GPU's, or the environment's "
                f"({' / '.join(env.ARCH_LIST.names)})"
            )
        made.append("--use_fast_math" if flag == "-use_fast_math" else flag)
    return tuple(made)


def gen_jit_spec(
    name: str,
    sources: Sequence[str | Path],
    extra_cflags: Sequence[str] | None = None,
    extra_cuda_cflags: Sequence[str] | None = None,
    extra_ldflags: Sequence[str] | None = None,
    extra_include_paths: Sequence[str | Path] | None = None,
    needs_device_linking: bool = False,
) -> JitSpec:
    """A module of CUDA files of one's own: device code, which NVRTC compiles and CuPy launches.

    Parameters
    ----------
    name : str
        An identifier.
    sources : sequence of paths
        Each a translation unit with ``extern "C" __global__`` functions. They may include ``kernels/`` headers of
        fi_cupy (``#include "common/vec.cuh"``).
    extra_cuda_cflags : sequence of str, optional
        Options of NVRTC: ``-DNAME=1``, ``-use_fast_math``. nvcc's optimisation levels and threads have no effect.
    extra_include_paths : sequence of paths, optional
    extra_cflags, extra_ldflags, needs_device_linking
        For a host compiler and linker: there is none, so only None and False are taken.

    Returns
    -------
    JitSpec

    Raises
    ------
    ArgumentError
        The name is no identifier, there is no source, or a flag chooses a target.
    UnsupportedError
        Something for a host compiler.

    Source
    ------
    flashinfer.jit.gen_jit_spec.

    Examples
    --------
    >>> spec = fi_cupy.jit.gen_jit_spec("mine", ["scale.cu"])            # doctest: +SKIP
    >>> spec.build_and_load().scale((1,), (256,), (x, y, x.size))      # doctest: +SKIP
    """
    if not _NAME.fullmatch(name):
        raise ArgumentError(f"gen_jit_spec: name is {name!r}, expected an identifier")
    files = tuple(Path(source).resolve() for source in sources)
    if not files:
        raise ArgumentError(f"gen_jit_spec: {name} has no sources, expected at least one")
    for path in files:
        if path.suffix in (".cc", ".cpp", ".cxx", ".c"):
            raise UnsupportedError(f"gen_jit_spec: {path} is host code, expected CUDA device code for NVRTC")
        if not path.is_file():
            raise ArgumentError(f"gen_jit_spec: there is no source {path}")
    for argument, given in (
        ("extra_cflags", extra_cflags), ("extra_ldflags", extra_ldflags), ("needs_device_linking", needs_device_linking)
    ):  # fmt: skip
        if given:
            raise UnsupportedError(
                f"gen_jit_spec: {argument} is {given!r}, but there is no host compiler and no linker"
            )
    spec = JitSpec(
        name, sources=files, extra_cuda_cflags=_options(extra_cuda_cflags or ()),
        extra_include_dirs=tuple(Path(path).resolve() for path in extra_include_paths or ()),
    )  # fmt: skip
    jit_spec_registry.register(spec)
    return spec


# --- the list of modules ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JitSpecStatus:
    """What the registry says of a module.

    Attributes
    ----------
    name : str
    created_at : datetime
        When it was registered.
    is_compiled : bool
    library_path : Path, optional
        Of a compiled one.
    sources : tuple of Path
    needs_device_linking : bool
        Never.
    """

    name: str
    created_at: datetime
    is_compiled: bool
    library_path: Path | None
    sources: tuple[Path, ...]
    needs_device_linking: bool

    @property
    def status(self) -> str:
        """ "Compiled" or "Not Compiled"."""
        return "Compiled" if self.is_compiled else "Not Compiled"


class JitSpecRegistry:
    """The modules that this process has named, by name; the first one under a name stays."""

    def __init__(self) -> None:
        self._specs: dict[str, JitSpec] = {}
        self._created: dict[str, datetime] = {}

    def register(self, spec: JitSpec) -> None:
        """Add a module."""
        if spec.name not in self._specs:
            self._specs[spec.name], self._created[spec.name] = spec, datetime.now()

    def get_all_specs(self) -> dict[str, JitSpec]:
        """Every module by its name."""
        return dict(self._specs)

    def get_spec_status(self, name: str) -> JitSpecStatus | None:
        """What is known of one, or None."""
        spec = self._specs.get(name)
        if spec is None:
            return None
        compiled = spec.is_compiled
        path = spec.get_library_path() if compiled else None
        return JitSpecStatus(name, self._created[name], compiled, path, spec.sources, spec.needs_device_linking)

    def get_all_statuses(self) -> list[JitSpecStatus]:
        """What is known of each."""
        return [status for name in self._specs if (status := self.get_spec_status(name)) is not None]

    def get_stats(self) -> dict[str, int]:
        """How many there are: total, compiled, not_compiled."""
        compiled = sum(status.is_compiled for status in self.get_all_statuses())
        return {"total": len(self._specs), "compiled": compiled, "not_compiled": len(self._specs) - compiled}


#: The process's modules.
jit_spec_registry = JitSpecRegistry()
