"""The paged key-value cache: its memory, which pages are free, and the page tables that the operators read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fi_cupy.dtypes import DType, float8_e4m3fn
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.models import ModelError
from fi_cupy.models.backend import NumpyBackend
from fi_cupy.models.loader import LlamaConfig

Array = Any
Int32 = NDArray[np.int32]
#: What a cache may hold, by the names that users give.
KV_DTYPES = ("auto", "fp8")


def pages_for(tokens: int, page_size: int) -> int:
    """Pages that hold `tokens` tokens."""
    return -(-tokens // page_size)


class PagedKVCache:
    """Keys and values of every layer in pages of `page_size` tokens.

    Parameters
    ----------
    backend : NumpyBackend
    config : LlamaConfig
    num_pages : int
    page_size : int
    dtype : {'auto', 'fp8'}
        'auto' keeps what the activations are; 'fp8' (float8_e4m3fn) takes half the memory and traffic of bf16. Keys and
        values are cached as they are, without a factor: those of a Llama lie far inside e4m3's ±448, and its relative
        precision does not depend on their size.

    Attributes
    ----------
    dtype : DType
        Of the cached numbers.
    layers : list of (k, v)
        Each ``[num_pages, page_size, num_kv_heads, head_dim]`` (layout NHD).
    """

    def __init__(
        self, backend: NumpyBackend, config: LlamaConfig, num_pages: int, page_size: int, dtype: str = "auto"
    ) -> None:
        self.dtype = cache_dtype(backend, dtype)
        shape = (config.num_layers, 2, num_pages, page_size, config.num_kv_heads, config.head_dim)
        # Zeros: a last page is read whole, and what it holds past the sequence must at least be finite.
        memory = backend.zeros(shape, backend.stored(self.dtype))
        self.layers: list[tuple[Array, Array]] = [(memory[i, 0], memory[i, 1]) for i in range(config.num_layers)]
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        # Full pages of prompts by (page before it or -1, its tokens), and each one's key. A page's number stands for
        # all the text up to its end, since a page leaves these tables before the page in front of it does.
        self._by_text: dict[tuple[int, tuple[int, ...]], int] = {}
        self._text_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # known text, no holder; the longest unused first

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free) + len(self._idle)

    def match(self, ids: Sequence[int]) -> list[int]:
        """The pages that hold the beginning of a text, as many whole pages as are known."""
        found: list[int] = []
        size = self.page_size
        for start in range(0, len(ids) - size + 1, size):
            page = self._by_text.get((found[-1] if found else -1, tuple(ids[start : start + size])))
            if page is None:
                break
            found.append(page)
        return found

    def can_take(self, shared: Sequence[int], count: int) -> bool:
        """Whether `count` pages more are free while somebody holds the pages `shared`, too."""
        return count <= self.free_pages - sum(page in self._idle for page in shared)

    def take(self, shared: Sequence[int], count: int) -> list[int]:
        """Hold the pages `shared` (of `match`) once more, and `count` others; the caller has asked `can_take`."""
        for page in shared:
            self._idle.pop(page, None)
        others: list[int] = []
        while len(others) < count:
            others.append(self._free.pop() if self._free else self._forget_oldest())
        pages = [*shared, *others]
        for page in pages:
            self._holders[page] += 1
        return pages

    def register(self, ids: Sequence[int], pages: Sequence[int]) -> None:
        """Make known what `pages` hold, or will hold before anything launched later reads them: the text `ids`."""
        size, before = self.page_size, -1
        for page, start in zip(pages, range(0, len(ids) - size + 1, size), strict=False):
            key = (before, tuple(ids[start : start + size]))
            if self._by_text.setdefault(key, page) != page:
                return  # another page holds the same text, and what follows would hang on a page that is not ours
            self._text_of[page] = key
            before = page

    def release(self, pages: Sequence[int]) -> None:
        """Give a request's pages up; those of known text serve later requests until their memory is needed."""
        for page in reversed(pages):  # the end of a text is forgotten before its beginning
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._text_of:
                self._idle[page] = None
            else:
                self._free.append(page)

    def _forget_oldest(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._by_text[self._text_of.pop(page)]
        return page

    def forget(self) -> None:
        """Forget the text of all pages that nobody holds."""
        while self._idle:
            self._free.append(self._forget_oldest())


def cache_dtype(backend: NumpyBackend, name: str) -> DType:
    """The type of a cache by the name that users give.

    Raises
    ------
    ModelError
        An unknown name.
    """
    if name not in KV_DTYPES:
        raise ModelError(f"kv_dtype is {name!r}, expected one of {', '.join(KV_DTYPES)}")
    return float8_e4m3fn if name == "fp8" else to_dtype(backend.dtype)


def page_table(pages: Sequence[Sequence[int]]) -> Int32:
    """Lists of pages as one array ``[requests, longest list]``, filled up with page 0."""
    table = np.zeros((len(pages), max(map(len, pages), default=0)), np.int32)
    for row, held in enumerate(pages):
        table[row, : len(held)] = held
    return table


def page_tables(
    table: Int32, lengths: Int32, page_size: int, rows: int, skip: Int32 | None = None
) -> tuple[Int32, Int32, Int32]:
    """The arrays that describe the cache to an operator.

    Parameters
    ----------
    table : [requests, width] int32
        The pages of each request, in order; what lies behind those that its length needs is left out.
    lengths : [requests] int32
        Tokens of each request.
    page_size : int
    rows : int
        At least the number of requests; the rows after these are padding, with no page.
    skip : [requests] int32, optional
        Pages of each request to leave out at the front, less than it has.

    Returns
    -------
    tuple
        ``kv_indptr [rows + 1]``, ``kv_indices [nnz]``, ``kv_last_page_len [rows]``, all int32.
    """
    count = len(lengths)
    used = (lengths + (page_size - 1)) // page_size
    indptr = np.zeros(rows + 1, np.int32)
    np.cumsum(used if skip is None else used - skip, out=indptr[1 : count + 1])
    indptr[count + 1 :] = indptr[count]
    width = int(used.max(initial=0))
    columns = np.arange(width)
    wanted = columns < used[:, None]
    if skip is not None:
        wanted &= columns >= skip[:, None]
    indices = table[:, :width][wanted]
    last = np.ones(rows, np.int32)
    last[:count] = (lengths - 1) % page_size + 1
    return indptr, indices, last
