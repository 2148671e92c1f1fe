"""The decode step of one batch size: fixed arrays, a planned wrapper, and a capture for each way of sampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fi_cupy.cascade_attention import MultiLevelCascadeAttentionWrapper
from fi_cupy.decode import BatchDecodeWithPagedKVCacheWrapper
from fi_cupy.models import sampler
from fi_cupy.models.backend import Step
from fi_cupy.models.kv_cache import Int32
from fi_cupy.models.llama import Batch
from fi_cupy.models.prefix import Groups
from fi_cupy.models.requests import Inputs, RunningBatch, sampling_fields
from fi_cupy.models.sampler import Mode

if TYPE_CHECKING:
    from fi_cupy.models.engine import Engine

Array = Any


class DecodeStep:
    """One token for each of `rows` requests.

    Parameters
    ----------
    engine : Engine
        Whose cache, tokens and workspaces the step uses.
    rows : int
    parts : int
        Groups of the first level of a cascade (`fi_cupy.models.prefix.Groups.parts`); 0: one level. The page tables of
        a cascade's second level, which also say where new keys go, leave out the pages of the first.
    """

    def __init__(self, engine: Engine, rows: int, parts: int = 0) -> None:
        backend, table_size = engine.backend, max(engine.cache.num_pages, 1)
        self.rows, self.parts = rows, parts
        self._engine = engine
        names = ("positions", "cache_positions", "batch_indices")
        self.inputs = Inputs(backend, {**{name: (np.int32, rows) for name in names}, **sampling_fields(rows)})

        def table(requests: int) -> list[Array]:
            return [backend.zeros((n,), np.int32) for n in (requests + 1, table_size, requests)]

        own = table(rows)
        if parts:
            first = table(parts)
            indptr = [backend.zeros((n + 1,), np.int32) for n in (parts, rows)]
            buffers = [list(pair) for pair in zip(first, own, strict=True)]
            self.wrapper: Any = MultiLevelCascadeAttentionWrapper(
                2, engine.attention_workspace, "NHD", True, indptr, *buffers
            )
        else:
            self.wrapper = BatchDecodeWithPagedKVCacheWrapper(
                engine.attention_workspace,
                use_cuda_graph=True,
                paged_kv_indptr_buffer=own[0],
                paged_kv_indices_buffer=own[1],
                paged_kv_last_page_len_buffer=own[2],
            )
        device = self.inputs.device
        self._batch = Batch(
            tokens=engine.tokens[:rows],
            positions=device["positions"],
            cache_positions=device["cache_positions"],
            batch_indices=device["batch_indices"],
            kv_indptr=own[0],
            kv_indices=own[1],
            attention=self.wrapper,
        )
        self._ws = engine.workspace.first(rows)
        self._replays: dict[Mode, Step] = {}

    def prepare(self, running: RunningBatch, groups: Groups | None = None) -> None:
        """Plan and upload for a step in which each request's newest token enters the cache."""
        engine, c = self._engine, self._engine.model.config
        tables = running.write(self.inputs.host(), self.rows, None if groups is None else groups.skip)
        self.inputs.push()
        shape = (c.num_qo_heads, c.num_kv_heads, c.head_dim, engine.cache.page_size)
        types = {"q_data_type": engine.backend.dtype, "kv_data_type": engine.cache.dtype.name}
        if not self.parts:
            self.wrapper.plan(*tables, *shape, **types)
            return
        assert groups is not None
        first = _first_level(groups, self.rows, engine.cache.page_size)
        queries = [first[0], np.arange(self.rows + 1, dtype=np.int32)]
        self.wrapper.plan(queries, *([a, b] for a, b in zip(first[1:], tables, strict=True)), *shape, **types)

    def _run(self, mode: Mode) -> None:
        engine = self._engine
        hidden = engine.model.forward(self._batch, engine.cache.layers, self._ws)
        logits = engine.model.logits(hidden, engine.logits[: self.rows])
        sampler.sample(logits, self.inputs.device, self._batch.tokens, mode)

    def has(self, mode: Mode) -> bool:
        """Whether the step is captured for a way of sampling."""
        return mode in self._replays

    def replay(self, mode: Mode) -> Step:
        """The step as one call; captured at first use, which leaves the cache and the tokens as they were."""
        if mode not in self._replays:
            backend, tokens = self._engine.backend, self._batch.tokens
            # A plan without requests; the first level of a cascade is as it will be, which decides its kernel.
            cache = self._engine.cache
            self.prepare(RunningBatch(0, 0, 1, cache.page_size), self._typical(cache.num_pages))
            saved = tokens.copy()
            self._replays[mode] = backend.capture(lambda: self._run(mode))
            tokens[...] = saved
            backend.synchronize()
        return self._replays[mode]

    def _typical(self, num_pages: int) -> Groups | None:
        if not self.parts:
            return None
        pages = np.arange(min(num_pages // self.parts, 64), dtype=np.int32)
        sizes = [2] * (self.parts - 1)
        sizes.append(self.rows - sum(sizes))
        return Groups(np.zeros(0, np.int32), tuple(sizes), (pages,) * self.parts)


def _first_level(groups: Groups, rows: int, page_size: int) -> tuple[Int32, Int32, Int32, Int32]:
    """(qo_indptr, kv_indptr, kv_indices, kv_last_page_len): rows without a group, and padding, see no shared page."""
    pages, sizes = list(groups.pages), list(groups.sizes)
    if groups.parts > len(pages):
        pages.append(np.zeros(0, np.int32))
        sizes.append(0)
    sizes[-1] += rows - sum(sizes)  # padding may see what it likes: nobody reads its result
    lengths = [len(p) for p in pages]
    ends: Callable[[list[int]], Int32] = lambda counts: np.cumsum([0, *counts], dtype=np.int32)  # noqa: E731
    last = np.where(np.array(lengths) > 0, page_size, 1).astype(np.int32)
    return ends(sizes), ends(lengths), np.concatenate(pages).astype(np.int32), last
