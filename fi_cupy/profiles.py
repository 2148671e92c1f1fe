"""Named sets of kernels: what `warmup` compiles, `list` shows and `preload` loads."""

from __future__ import annotations

import fnmatch
import importlib
import os
import re
from collections.abc import Iterable

from fi_cupy.device import default_target, device_info, num_devices
from fi_cupy.errors import ArgumentError
from fi_cupy.jit import env
from fi_cupy.jit.cache import CachedKernel
from fi_cupy.jit.spec import ARCHS, KernelSpec

#: The modules that hold kernels, each with ``kernel_specs()``.
MODULES: tuple[str, ...] = (
    "norm", "lookup", "activation", "rope", "page", "quantization", "cascade", "sampling", "decode", "prefill", "gemm",
)  # fmt: skip


def family_specs(module: str) -> list[KernelSpec]:
    """The canonical kernels of one op module, e.g. "norm"."""
    specs: list[KernelSpec] = importlib.import_module(f"fi_cupy.{module}").kernel_specs()
    return specs


def all_specs() -> list[KernelSpec]:
    """The canonical kernels of every op module, each once."""
    return list(dict.fromkeys(spec for module in MODULES for spec in family_specs(module)))


def names() -> tuple[str, ...]:
    """Every profile's name."""
    return ("all", *MODULES)


def profile_specs(name: str) -> list[KernelSpec]:
    """The kernels of a profile: "all", an op module's name, or several of them with commas between.

    Raises
    ------
    ArgumentError
        There is no such profile.
    """
    specs: list[KernelSpec] = []
    for part in (p.strip() for p in name.split(",")):
        if part == "all":
            specs += all_specs()
        elif part in MODULES:
            specs += family_specs(part)
        else:
            raise ArgumentError(f"profile: {part!r} is unknown, expected one of {', '.join(names())}")
    return list(dict.fromkeys(specs))


def find_specs(pattern: str) -> list[KernelSpec]:
    """The canonical kernels whose symbol is `pattern`, or matches it as a shell pattern, or begins with it."""
    specs = all_specs()
    for matches in (
        [s for s in specs if s.symbol == pattern],
        [s for s in specs if fnmatch.fnmatchcase(s.symbol, pattern)],
        [s for s in specs if s.symbol.startswith(pattern)],
    ):
        if matches:
            return matches
    return []


_ARCH = re.compile(r"(?:sm_)?(\d{1,2})\.?(\d)([af]?)")


def parse_archs(text: str) -> tuple[str, ...]:
    """Compile targets from text: ``"8.0 9.0a sm_120f compute_80"`` → ("80", "90a", "120a", "compute_80").

    From sm_90 on the target is the architecture-specific one whatever the suffix, since that is what a GPU of that
    compute capability loads. "all" stands for every architecture the tests compile for; separators are blanks,
    commas or semicolons.

    Raises
    ------
    ArgumentError
        A token is no architecture, or one below 7.5.
    """
    targets: list[str] = []
    for token in re.split(r"[\s,;]+", text.strip()):
        if token == "all":
            targets += ARCHS
            continue
        match = _ARCH.fullmatch(token)
        if token.startswith("compute_") and token[8:].isdigit() and int(token[8:]) >= 75:
            targets.append(token)
        elif match and int(match[1] + match[2]) >= 75:
            targets.append(default_target(int(match[1] + match[2])))
        else:
            raise ArgumentError(
                f"arch: {token!r} is no architecture from 7.5 on, expected for example 8.0, 9.0a, compute_80 or all"
            )
    return tuple(dict.fromkeys(targets))


def default_archs() -> tuple[str, ...]:
    """The targets meant when none is named: FI_CUPY_TARGET's, the environment's list, else those of the GPUs present.

    Raises
    ------
    ArgumentError
        The environment names none and there is no GPU.
    """
    listed = env.TARGET.get() or env.ARCH_LIST.get()
    if listed:
        return parse_archs(listed)
    found = tuple(dict.fromkeys(device_info(i).arch for i in range(num_devices())))
    if not found:
        raise ArgumentError(
            'arch: no GPU is present, so name the targets: --arch "8.0 9.0a" (or all), '
            f"or set {' / '.join(env.ARCH_LIST.names)}"
        )
    return found


def preload(profile: str | Iterable[KernelSpec] = "all", arch: str | None = None, processes: int | None = None) -> int:
    """Compile a profile in parallel, and load it on the current GPU where there is one that can run it.

    Parameters
    ----------
    profile : str or iterable of KernelSpec
        A name as in `fi_cupy.profiles.profile_specs`, or kernels.
    arch : str, optional
        Targets as for ``fi-cupy warmup --arch``; by default the current GPU's, else the
        environment's list.
    processes : int, optional
        Compiler processes; by default one a CPU, at most 16.

    Returns
    -------
    int
        How many kernels are ready.

    Raises
    ------
    ArgumentError
        Unknown profile or architecture, or no GPU and no `arch`.
    CompileError, MissingKernelError
        The first kernel that could not be had, after all others were tried.

    Examples
    --------
    >>> import fi_cupy
    >>> fi_cupy.preload("norm", arch="9.0a")  # doctest: +SKIP
    """
    from fi_cupy.jit.build import build_many

    specs = profile_specs(profile) if isinstance(profile, str) else list(profile)
    device = _current_device()
    if arch is None and device is not None:
        targets: tuple[str, ...] = (device_info(device).arch,)
    else:
        targets = parse_archs(arch) if arch else default_archs()
    ready = 0
    failure: BaseException | None = None
    for _, outcome in build_many(specs, targets, processes or default_processes()):
        if isinstance(outcome, CachedKernel):
            ready += 1
        else:
            failure = failure or outcome
    if failure is not None:
        raise failure
    if device is not None and device_info(device).arch in targets:
        from fi_cupy.jit.kernel import load_kernel

        for spec in specs:
            if spec.supports(device_info(device).arch):
                load_kernel(spec, device)
    return ready


def _current_device() -> int | None:
    if num_devices() == 0:
        return None
    from cupy.cuda import runtime

    return int(runtime.getDevice())


def default_processes() -> int:
    """Compiler processes for bulk work: one a CPU that this process may use, at most 16."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(16, len(affinity(0)) if affinity else os.cpu_count() or 1)


def preload_from_environment() -> None:
    """What importing fi_cupy does last: `preload` the profile that FI_CUPY_PRELOAD names."""
    name = env.PRELOAD.get()
    if name:
        preload(name)
