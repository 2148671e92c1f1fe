"""The paged key-value cache: its memory, which pages are free, and the page tables that the operators read."""

from __future__ import annotations

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
    scale : float or None
        What `fi_cupy.page.append_paged_kv_cache` gets as `k_scale` and `v_scale`; None where nothing is cast.
    layers : list of (k, v)
        Each ``[num_pages, page_size, num_kv_heads, head_dim]`` (layout NHD).
    """

    def __init__(
        self, backend: NumpyBackend, config: LlamaConfig, num_pages: int, page_size: int, dtype: str = "auto"
    ) -> None:
        self.dtype = cache_dtype(backend, dtype)
        self.scale = 1.0 if dtype == "fp8" else None
        shape = (config.num_layers, 2, num_pages, page_size, config.num_kv_heads, config.head_dim)
        # Zeros: a last page is read whole, and what it holds past the sequence must at least be finite.
        memory = backend.zeros(shape, backend.stored(self.dtype))
        self.layers: list[tuple[Array, Array]] = [(memory[i, 0], memory[i, 1]) for i in range(config.num_layers)]
        self.num_pages = num_pages
        self.page_size = page_size
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """Pages that nobody holds."""
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; the caller has looked at `free_pages`."""
        pages = self._free[len(self._free) - count :]
        del self._free[len(self._free) - count :]
        return pages[::-1]

    def release(self, pages: Sequence[int]) -> None:
        """Give pages back."""
        self._free.extend(reversed(pages))


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


def page_tables(table: Int32, lengths: Int32, page_size: int, rows: int) -> tuple[Int32, Int32, Int32]:
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

    Returns
    -------
    tuple
        ``kv_indptr [rows + 1]``, ``kv_indices [nnz]``, ``kv_last_page_len [rows]``, all int32.
    """
    count = len(lengths)
    used = (lengths + (page_size - 1)) // page_size
    indptr = np.zeros(rows + 1, np.int32)
    np.cumsum(used, out=indptr[1 : count + 1])
    indptr[count + 1 :] = indptr[count]
    width = int(used.max(initial=0))
    indices = table[:, :width][np.arange(width) < used[:, None]]
    last = np.ones(rows, np.int32)
    last[:count] = (lengths - 1) % page_size + 1
    return indptr, indices, last
