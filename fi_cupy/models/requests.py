"""What the host knows of the requests: each one, the running batch in arrays, and the inputs it sends a step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from fi_cupy.models import sampler
from fi_cupy.models.backend import NumpyBackend
from fi_cupy.models.kv_cache import Int32, page_tables
from fi_cupy.models.sampler import Mode, SamplingParams

Array = Any


@dataclass(eq=False)
class Request:
    """A prompt and what has become of it.

    `finish_reason` is None while it runs, then 'stop' (end-of-text token), 'length' (`max_tokens`) or 'context'.
    """

    prompt_ids: list[int]
    params: SamplingParams
    on_token: Callable[[Request, int], None] | None = None
    output_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    pages: list[int] = field(default_factory=list, repr=False)
    #: Prompt tokens in the cache once all that is launched has run.
    prefilled: int = field(default=0, repr=False)
    #: Of these, tokens on pages that another request has filled.
    shared: int = 0
    #: Most tokens that will be drawn, by `max_tokens` and the context.
    limit: int = field(default=0, repr=False)


class Inputs:
    """Small arrays that the host writes for every step, in one piece of memory and so in one copy.

    There are several host sides, used in turn: a copy may still be reading one while the host writes the next.
    """

    def __init__(self, backend: NumpyBackend, fields: dict[str, tuple[DTypeLike, int]]) -> None:
        self._backend = backend
        self._spans: dict[str, tuple[int, int, np.dtype[Any]]] = {}
        size = 0
        for name, (dtype, length) in fields.items():
            nbytes = length * np.dtype(dtype).itemsize
            self._spans[name] = (size, size + nbytes, np.dtype(dtype))
            size += -(-nbytes // 16) * 16
        self._memory = backend.zeros((max(size, 16),), np.uint8)
        self.device: dict[str, Array] = self._views(self._memory)
        buffers = [backend.host_buffer(max(size, 16)) for _ in range(backend.lookahead + 2)]
        self._turns = itertools.cycle([(buffer, self._views(buffer)) for buffer in buffers])
        self._current: tuple[NDArray[np.uint8], dict[str, NDArray[Any]]] = next(self._turns)

    def _views(self, memory: Any) -> dict[str, Any]:
        return {name: memory[start:stop].view(dtype) for name, (start, stop, dtype) in self._spans.items()}

    def host(self) -> dict[str, NDArray[Any]]:
        """Arrays to write; `push` sends them."""
        self._current = next(self._turns)
        return self._current[1]

    @property
    def current(self) -> dict[str, NDArray[Any]]:
        """What `host` gave last."""
        return self._current[1]

    def push(self) -> None:
        """Copy what was written to the device, in stream order."""
        self._backend.upload(self._current[0], self._memory)


def sampling_fields(rows: int) -> dict[str, tuple[DTypeLike, int]]:
    """The inputs that `fi_cupy.models.sampler.sample` reads."""
    return {name: (dtype, rows) for name, dtype in sampler.FIELDS.items()}


class RunningBatch:
    """What the host knows of the running requests, a row each, in arrays: a decode step costs no loop over requests."""

    def __init__(self, max_batch: int, num_pages: int, vocab_size: int, page_size: int) -> None:
        self.requests: list[Request] = []
        #: What the requests need of the sampler together.
        self.mode = Mode()
        #: Whether requests have come or gone since this was set to False.
        self.changed = False
        self._page_size = page_size
        self._vocab_size = vocab_size
        #: Tokens in the cache, and tokens drawn, once all that is launched has run.
        self._kv_len = np.zeros(max_batch, np.int32)
        self._drawn = np.zeros(max_batch, np.int64)
        self._limit = np.zeros(max_batch, np.int64)
        self._pages = np.zeros((max_batch, num_pages), np.int32)
        self._columns: dict[str, NDArray[Any]] = {
            name: np.zeros(max_batch, dtype) for name, dtype in sampler.FIELDS.items()
        }

    def __len__(self) -> int:
        return len(self.requests)

    def _arrays(self) -> list[NDArray[Any]]:
        return [self._kv_len, self._drawn, self._limit, self._pages, *self._columns.values()]

    def join(self, request: Request) -> int:
        """Add a request whose prompt is in the cache and whose first token is drawn; the row it gets."""
        row = len(self)
        self.requests.append(request)
        self._kv_len[row] = len(request.prompt_ids)
        self._drawn[row] = 1
        self._limit[row] = request.limit
        self._pages[row, : len(request.pages)] = request.pages
        request.params.write(self._columns, row, 1, self._vocab_size)
        self.mode = sampler.mode_of(self._columns, len(self), self._vocab_size)
        self.changed = True
        return row

    def leave(self, request: Request) -> tuple[int, int]:
        """Remove a request; the last row moves into its place. The two rows, equal if nothing moved."""
        row, last = self.requests.index(request), len(self) - 1
        self.requests[row] = self.requests[last]
        self.requests.pop()
        for array in self._arrays():
            array[row] = array[last]
        self.mode = sampler.mode_of(self._columns, last, self._vocab_size)
        self.changed = True
        return row, last

    def pages(self) -> tuple[Int32, Int32]:
        """(the pages of every row, how many of them are full)."""
        n = len(self)
        width = max((len(request.pages) for request in self.requests), default=0)
        return self._pages[:n, :width], self._kv_len[:n] // self._page_size

    def reorder(self, order: Int32) -> None:
        """Make row ``order[i]`` row i."""
        self.requests = [self.requests[row] for row in order]
        for array in self._arrays():
            array[: len(order)] = array[order]

    def advance(self) -> list[Request]:
        """Count one more token for everybody; the requests that have all they may draw."""
        n = len(self)
        self._kv_len[:n] += 1
        self._drawn[:n] += 1
        self._columns["offset"][:n] += np.uint64(sampler.OFFSET_STRIDE)
        return [self.requests[row] for row in np.flatnonzero(self._drawn[:n] == self._limit[:n])]

    def write(self, host: dict[str, NDArray[Any]], rows: int, skip: Int32 | None = None) -> tuple[Int32, Int32, Int32]:
        """Fill the inputs of a step of `rows` rows and return the page tables that hold with the newest tokens in.

        `skip` says how many pages of each request the tables leave out at the front.
        """
        n = len(self)
        host["positions"][:n] = host["cache_positions"][:n] = self._kv_len[:n]
        if skip is not None:
            host["cache_positions"][:n] -= skip * self._page_size
        host["positions"][n:] = host["cache_positions"][n:] = 0
        host["batch_indices"][:n] = np.arange(n)
        host["batch_indices"][n:] = -1
        for name, column in self._columns.items():
            host[name][:n] = column[:n]
            host[name][n:] = 1
        return page_tables(self._pages[:n], self._kv_len[:n] + 1, self._page_size, rows, skip)
