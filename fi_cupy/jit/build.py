"""From a specification to machine code: render, look in the cache, compile if allowed, store."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from fi_cupy.errors import GPUArchitectureError, MissingKernelError
from fi_cupy.jit import env
from fi_cupy.jit.cache import CachedKernel, KernelCache, job_key
from fi_cupy.jit.compiler import CompileJob, Worker, compile_job, compile_many, nvrtc_version, target_options
from fi_cupy.jit.render import render
from fi_cupy.jit.sources import header_closure
from fi_cupy.jit.spec import KernelSpec

_OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v", "-diag-suppress=177")


def job_for(spec: KernelSpec, arch: str) -> CompileJob:
    """Everything the compiler needs for `spec` on `arch`."""
    source = render(spec)
    options = [*target_options(arch), *_OPTIONS]
    if env.DEBUG.flag():
        options.append("-G")  # holds line information, too
    elif env.LINEINFO.flag():
        options.append("-lineinfo")
    options += shlex.split(env.EXTRA_FLAGS.get() or "")
    return CompileJob(spec.symbol, source, tuple(header_closure(source.encode()).items()), arch, tuple(options))


@dataclass
class BuildStats:
    """What this process has compiled and taken from the cache so far."""

    compiled: int = 0
    cached: int = 0
    compile_seconds: float = 0.0
    symbols: list[str] = field(default_factory=list)


stats = BuildStats()


def cache() -> KernelCache:
    """The cache that the environment names."""
    return KernelCache(env.cache_dir())


def is_cached(spec: KernelSpec, arch: str) -> bool:
    """Whether the cache holds `spec` for `arch`."""
    return cache().get(arch, spec.symbol, job_key(job_for(spec, arch), nvrtc_version())) is not None


def build(spec: KernelSpec, arch: str, worker: Worker | None = None) -> CachedKernel:
    """Return the code of `spec` for `arch`, from the cache or newly compiled.

    Raises
    ------
    UnsupportedError
        `arch` is below (or above) what the kernel is written for.
    MissingKernelError
        Compilation is switched off and the cache does not have it.
    CompileError
        NVRTC refused or crashed on the source.
    """
    if not spec.supports(arch):
        wanted = f"sm_{spec.min_arch} or later" if not spec.max_arch else f"sm_{spec.min_arch} to sm_{spec.max_arch}"
        if spec.smem_bytes > 48 * 1024:
            wanted += f" with {spec.smem_bytes} bytes of shared memory a CTA"
        raise GPUArchitectureError(f"{spec.symbol}: got target {arch}, expected {wanted}")
    try:
        return build_job(job_for(spec, arch), worker)
    except MissingKernelError as error:
        error.spec = spec
        raise


def build_job(job: CompileJob, worker: Worker | None = None) -> CachedKernel:
    """`build` for a job that is rendered already."""
    version = nvrtc_version()
    key = job_key(job, version)
    store = cache()
    found = store.get(job.arch, job.symbol, key)
    if found is not None:
        stats.cached += 1
        return found
    if env.NO_COMPILE.flag():
        raise MissingKernelError(
            f"{job.symbol}: not in the cache {store.root} for {job.arch}, and compilation is switched off "
            f"({' / '.join(env.NO_COMPILE.names)}). Warm the cache: fi-cupy warmup --arch {job.arch} --profile all"
        )
    with store.lock(key):
        found = store.get(job.arch, job.symbol, key)  # another process may have been first
        if found is not None:
            stats.cached += 1
            return found
        if env.VERBOSE.flag():
            print(f"fi_cupy: compiling {job.symbol} for {job.arch}", file=sys.stderr, flush=True)
        result = compile_job(job, worker)
        stats.compiled += 1
        stats.compile_seconds += result.seconds
        stats.symbols.append(job.symbol)
        return store.put(job, key, version, result)


def build_many(
    targets: Iterable[tuple[KernelSpec, str]], processes: int
) -> Iterator[tuple[CompileJob, CachedKernel | BaseException]]:
    """Build every (spec, arch), which `spec` must support, on `processes` compiler children; yield each as it ends."""
    yield from compile_many([job_for(spec, arch) for spec, arch in targets], processes, build_job)
