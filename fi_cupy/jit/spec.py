"""`KernelSpec`: what identifies one compiled kernel. It is frozen and hashable: it *is* the compile key."""

from __future__ import annotations

from dataclasses import dataclass, field

from fi_cupy.dtypes import DType
from fi_cupy.jit.params import ParamsStruct


class CppType(str):
    """A C++ type as text: rendered as ``using name = ...``."""

    __slots__ = ()


class CppValue(str):
    """A C++ constant expression as text (an enumerator): rendered as ``static constexpr auto name = ...``."""

    __slots__ = ()


class CppStruct(tuple[tuple[str, "ConfigValue"], ...]):
    """Members of a nested struct, as those of `KernelSpec.config`: rendered as ``struct name { ... };``."""

    __slots__ = ()


ConfigValue = DType | CppType | CppValue | CppStruct | bool | int | float


@dataclass(frozen=True)
class UserSource:
    """CUDA text that a user wrote, compiled in front of the kernel under ``#line 1 "<kind>:<name>"``."""

    kind: str
    name: str
    text: str


@dataclass(frozen=True)
class KernelSpec:
    """One kernel instance.

    Attributes
    ----------
    symbol : str
        The ``extern "C"`` name: in the profiler, the cache folder, error texts and test ids.
    header : str
        The kernel's header, relative to ``kernels/``.
    function : str
        The device function template in namespace ``fi`` that takes ``<Config>`` and the parameter struct.
    params : ParamsStruct
        The mirror of the parameter struct.
    config : tuple of (name, value)
        The members of ``struct Config``: a DType or CppType becomes ``using``, a CppStruct a nested struct, anything
        else ``static constexpr``.
    threads : int
        Threads a CTA (one-dimensional blocks).
    min_blocks : int
        Second argument of ``__launch_bounds__``; 0 leaves it out.
    smem_bytes : int
        Dynamic shared memory, bytes: the default at launch, and the limit set when the kernel is loaded.
    min_arch, max_arch : int
        Compute capability times ten; ``max_arch`` 0 means no upper end. A kernel with Hopper instructions is 90..90.
    cluster : int
        CTAs a cluster along x, fixed at compile time; 0 for none.
    user : UserSource or None
        A variant's or activation's text; such kernels are compiled from untrusted source.
    spills : str
        Why this instance may spill registers; empty means it must not.
    """

    symbol: str
    header: str
    function: str
    params: ParamsStruct
    config: tuple[tuple[str, ConfigValue], ...]
    threads: int
    min_blocks: int = 0
    smem_bytes: int = 0
    min_arch: int = 75
    max_arch: int = 0
    cluster: int = 0
    user: UserSource | None = None
    spills: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.symbol, self.header, self.function, self.config, self.user)))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def supports(self, arch: str) -> bool:
        """Whether the kernel can be compiled for `arch` ("75", "90a", "compute_80", ...)."""
        number = arch_number(arch)
        in_range = number >= self.min_arch and (self.max_arch == 0 or number <= self.max_arch)
        # PTX runs on any later GPU, whose shared memory is what counts.
        return in_range and (arch.startswith("compute_") or self.smem_bytes <= shared_memory(number))


#: The architectures every kernel is compiled for by the tests and by ``warmup --arch all``.
ARCHS: tuple[str, ...] = ("75", "80", "86", "89", "90a", "100a", "120a")


def shared_memory(number: int) -> int:
    """Shared memory that one CTA can have at a compute capability (times ten), bytes (CUDA programming guide)."""
    kilobytes = {75: 64, 80: 163, 87: 163}.get(number, 227 if 90 <= number < 120 else 99)
    return kilobytes * 1024


def arch_number(arch: str) -> int:
    """Compute capability times ten: ``"90a"`` → 90, ``"compute_75"`` → 75."""
    return int("".join(c for c in arch if c.isdigit()))
