"""Where random numbers come from: a seed and an offset, from our own counter-based generator or the caller's.

Draws are Philox4x32-10 of (seed, offset, row, draw number), so a generator is two integers, and drawing from it only
moves the offset: no state lives on the device.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

from fi_cupy.errors import ArgumentError

_MASK = (1 << 64) - 1


class Generator:
    """A seed and a position.

    Parameters
    ----------
    seed : int
        Any integer; its low 64 bits count.

    Examples
    --------
    >>> import fi_cupy
    >>> g = fi_cupy.sampling.Generator(7)
    >>> g.advance(1), g.advance(1)
    ((7, 0), (7, 4))
    """

    def __init__(self, seed: int = 0) -> None:
        self._lock = threading.Lock()
        self.manual_seed(seed)

    def manual_seed(self, seed: int) -> Generator:
        """Start again from `seed`, offset 0."""
        self.seed = int(seed) & _MASK
        self.offset = 0
        return self

    def advance(self, increment: int) -> tuple[int, int]:
        """The present (seed, offset); moves the offset on by `increment` rounded up to a multiple of 4."""
        with self._lock:
            offset = self.offset
            self.offset = (offset + _rounded(increment)) & _MASK
        return self.seed, offset


#: The generator of calls that name neither seed nor generator. Like torch's, it starts from a fixed seed.
default_generator = Generator(67280421310721)


def manual_seed(seed: int) -> Generator:
    """Seed the process-wide default generator, and return it."""
    return default_generator.manual_seed(seed)


def _rounded(increment: int) -> int:
    return (int(increment) + 3) // 4 * 4


def get_seed_and_offset(increment: int, generator: Any = None, device: Any = None) -> tuple[int, int]:
    """Take (seed, offset) from a generator and advance it.

    Parameters
    ----------
    increment : int
        How far the offset moves, rounded up to a multiple of 4. Draws of one call use one offset, so 1 is enough.
    generator : Generator, torch.Generator, numpy.random.Generator, cupy.random.Generator, optional
        None: torch's default generator of `device` if that is a torch device, else the process-wide default. A CUDA
        torch.Generator's Philox offset is advanced; one of another kind gives a fresh 64-bit seed with offset 0 (for
        CuPy's, this waits for the GPU).
    device : torch.device, optional

    Returns
    -------
    (int, int)
        Seed and offset, both below 2^64.

    Raises
    ------
    ArgumentError
        The generator is none of these.

    Source
    ------
    flashinfer.sampling.get_seed_and_offset.
    """
    if generator is None:
        if type(device).__module__ != "torch":
            return default_generator.advance(increment)
        generator = _torch_default(device)
    if isinstance(generator, Generator):
        return generator.advance(increment)
    root = type(generator).__module__.split(".", 1)[0]
    if root == "torch":
        return _from_torch(generator, increment)
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(0, 1 << 63)), 0
    if root == "cupy" and hasattr(generator, "integers"):
        return int(generator.integers(0, (1 << 63) - 1, dtype=np.int64)), 0
    raise ArgumentError(
        f"get_seed_and_offset: generator is a {type(generator).__module__}.{type(generator).__qualname__}, expected "
        "fi_cupy.sampling.Generator, torch.Generator, numpy.random.Generator or cupy.random.Generator"
    )


def _torch_default(device: Any) -> Any:
    import torch

    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index if device.index is not None else torch.cuda.current_device()]
    return torch.default_generator


def _from_torch(generator: Any, increment: int) -> tuple[int, int]:
    import torch

    if generator.device.type != "cuda":
        return int(torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64, generator=generator)), 0
    state = generator.get_state()  # CPU bytes: seed, offset
    seed, offset = (int(v) & _MASK for v in state.view(torch.int64).tolist())
    moved = (offset + _rounded(increment)) & _MASK
    words = np.array([seed, moved], dtype=np.uint64).view(np.uint8)
    generator.set_state(torch.from_numpy(words.copy()))
    return seed, offset
