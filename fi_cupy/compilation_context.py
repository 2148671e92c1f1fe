"""Which architectures to compile for: from the environment, else from the GPUs of this machine.

Source: flashinfer.compilation_context.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from fi_cupy.device import default_target, device_info, num_devices
from fi_cupy.errors import ArgumentError, CudaUnavailableError
from fi_cupy.jit import env
from fi_cupy.jit.compiler import target_options

_ARCH = re.compile(r"(\d{1,2})\.(\d)([af]?)")


class CompilationContext:
    """The targets of compilation.

    Attributes
    ----------
    TARGET_CUDA_ARCHS : set of (major, minor)
        ``minor`` is text and may end in "a" or "f" (``(9, "0a")``). From FI_CUPY_CUDA_ARCH_LIST or
        FLASHINFER_CUDA_ARCH_LIST ("7.5 8.0 9.0a 12.0f"), else of the GPUs present; empty where there are none.
    COMMON_NVCC_FLAGS : list of str
        Flags for every build; none.

    Raises
    ------
    ArgumentError
        The environment's list holds something that is no architecture from 7.5 on.

    Examples
    --------
    >>> CompilationContext().TARGET_CUDA_ARCHS                 # doctest: +SKIP
    {(9, '0a')}
    """

    COMMON_NVCC_FLAGS: tuple[str, ...] = ()

    def __init__(self) -> None:
        listed = env.ARCH_LIST.get()
        if listed is not None:
            self.TARGET_CUDA_ARCHS = {_parse(token) for token in re.split(r"[\s,;]+", listed.strip())}
        else:
            numbers = {device_info(i).number for i in range(num_devices())}
            self.TARGET_CUDA_ARCHS = {_normalize(n // 10, n % 10) for n in numbers}

    @property
    def targets(self) -> tuple[str, ...]:
        """The same as fi_cupy's compile targets ("80", "90a"), ascending.

        From sm_90 on that is the architecture-specific one whatever the suffix: what a GPU of that compute capability
        loads.
        """
        numbers = sorted(major * 10 + int(minor[0]) for major, minor in self.TARGET_CUDA_ARCHS)
        return tuple(dict.fromkeys(default_target(n) for n in numbers))

    def get_nvcc_flags_list(self, supported_major_versions: Sequence[int] | None = None) -> list[str]:
        """Flags with which nvcc compiles a source of yours for the same architectures.

        fi_cupy itself uses NVRTC, one architecture at a time: see `get_nvrtc_options`.

        Parameters
        ----------
        supported_major_versions : sequence of int, optional
            Only architectures of these major compute capabilities.

        Raises
        ------
        CudaUnavailableError
            None is left (or there is no GPU and the environment names none).
        """
        chosen = sorted(self._supported(supported_major_versions))
        flags = [f"-gencode=arch=compute_{major}{minor},code=sm_{major}{minor}" for major, minor in chosen]
        return flags + list(self.COMMON_NVCC_FLAGS)

    def get_nvrtc_options(self, supported_major_versions: Sequence[int] | None = None) -> dict[str, list[str]]:
        """The NVRTC options that choose each target: {target: options}; raises as `get_nvcc_flags_list` does."""
        chosen = self._supported(supported_major_versions)
        numbers = sorted(major * 10 + int(minor[0]) for major, minor in chosen)
        return {target: target_options(target) for target in dict.fromkeys(map(default_target, numbers))}

    def _supported(self, majors: Sequence[int] | None) -> list[tuple[int, str]]:
        chosen = [arch for arch in self.TARGET_CUDA_ARCHS if not majors or arch[0] in majors]
        if not chosen:
            have = " ".join(f"{major}.{minor}" for major, minor in sorted(self.TARGET_CUDA_ARCHS)) or "none"
            wanted = "" if not majors else f" of major version {' or '.join(map(str, majors))}"
            raise CudaUnavailableError(
                f"CompilationContext: no architecture{wanted} among the targets ({have}); "
                f"set {' or '.join(env.ARCH_LIST.names)}"
            )
        return chosen


def _parse(token: str) -> tuple[int, str]:
    match = _ARCH.fullmatch(token)
    if match is None or int(match[1]) * 10 + int(match[2]) < 75:
        raise ArgumentError(
            f"CompilationContext: {token!r} in {' / '.join(env.ARCH_LIST.names)} is no architecture from 7.5 on, "
            'expected for example "7.5 8.0 9.0a 12.0f"'
        )
    major, minor = int(match[1]), match[2]
    return (major, minor + match[3]) if match[3] else _normalize(major, int(minor))


def _normalize(major: int, minor: int) -> tuple[int, str]:
    """From 9.0 on the architecture-specific target, as nvcc names it."""
    return (major, f"{minor}a") if major >= 9 else (major, str(minor))
