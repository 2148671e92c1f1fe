"""Compile ahead of time: every kernel of a profile into the cache, and from there into a pack.

Source: the names are flashinfer.aot's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fi_cupy import artifacts
from fi_cupy.compilation_context import CompilationContext
from fi_cupy.errors import ArgumentError, CacheError
from fi_cupy.jit.build import job_for
from fi_cupy.jit.cache import KernelCache, job_key
from fi_cupy.jit.compiler import compile_many, nvrtc_version
from fi_cupy.jit.sources import kernel_root
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.profiles import default_archs, default_processes, parse_archs, profile_specs, profile_targets


def gen_all_modules(profile: str = "all") -> list[KernelSpec]:
    """The kernels of a profile (`fi_cupy.profiles.profile_specs`)."""
    return profile_specs(profile)


def register_default_modules() -> int:
    """Name a module for every family of operators in `fi_cupy.jit.jit_spec_registry`; returns how many there are."""
    from fi_cupy.jit.modules import register_all

    return register_all()


def compile_and_package_modules(
    out_dir: str | os.PathLike[str],
    build_dir: str | os.PathLike[str] | None = None,
    project_root: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | None = None,
    verbose: bool = False,
    skip_prebuilt: bool = True,
) -> Path:
    """Compile a profile and write it as a cubin pack. Needs no GPU where `config` or the environment names targets.

    Parameters
    ----------
    out_dir : path
        Folder of the pack; made if need be.
    build_dir : path, optional
        Cache folder to compile in; by default ``build`` in `out_dir`, so that the pack holds this profile only.
    project_root : path, optional
        The checkout; must be the one that this fi_cupy runs from.
    config : mapping, optional
        ``{"profile": "llama3-8b", "archs": "8.0 9.0a"}``; by default all kernels, for the environment's targets
        or those of the GPUs present.
    verbose : bool
        Print each kernel.
    skip_prebuilt : bool
        Do not compile again what `build_dir` holds.

    Returns
    -------
    Path
        The pack, ``fi_cupy-<profile>-<archs>.zip``.

    Raises
    ------
    ArgumentError
        An unknown key, profile or architecture; no target; another project root.
    CompileError, CudaUnavailableError
        The first kernel that could not be compiled.
    PackError, CacheError
        A folder cannot be written.
    """
    options = dict(config or {})
    profile, archs = options.pop("profile", "all"), options.pop("archs", None)
    if options:
        raise ArgumentError(f"compile_and_package_modules: config has {sorted(options)}, expected profile and archs")
    if project_root is not None and Path(project_root).resolve() != kernel_root().parent:
        raise ArgumentError(
            f"compile_and_package_modules: project_root is {project_root}, but this fi_cupy has its kernels in "
            f"{kernel_root()}; leave it out, or run that checkout's fi_cupy"
        )
    targets = parse_archs(archs) if archs else (CompilationContext().targets or default_archs())
    out = Path(out_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(f"compile_and_package_modules: {out} cannot be made: {error}") from None
    store = KernelCache(Path(build_dir) if build_dir is not None else out / "build")
    _compile(store, profile_targets(profile, targets), verbose, skip_prebuilt)
    file = out / f"fi_cupy-{profile.replace(',', '+')}-{'+'.join(targets)}.zip"
    artifacts.pack(file, targets, tuned=False, root=store.root)
    return file


def _compile(store: KernelCache, targets: list[tuple[KernelSpec, str]], verbose: bool, skip_prebuilt: bool) -> None:
    version = nvrtc_version()
    jobs = {}
    for spec, arch in targets:
        job = job_for(spec, arch)
        key = job_key(job, version)
        if not (skip_prebuilt and store.get(arch, job.symbol, key) is not None):
            jobs[job] = key
    failure: BaseException | None = None
    for job, outcome in compile_many(jobs, default_processes()):
        if isinstance(outcome, BaseException):
            failure = failure or outcome
            continue
        if store.put(job, jobs[job], version, outcome).path is None:
            raise CacheError(f"compile_and_package_modules: {store.root} cannot be written")
        if verbose:
            print(f"{job.arch:>6s} {outcome.seconds:6.2f} s  {job.symbol}")
    if failure is not None:
        raise failure


__all__ = ["compile_and_package_modules", "gen_all_modules", "register_default_modules"]
