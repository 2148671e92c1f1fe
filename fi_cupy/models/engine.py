"""Continuous batching: requests join and leave a running batch, step by step.

A prompt is run in chunks by the prefill attention; each running request then gets one token from every decode step.
The decode step of a batch size is captured once (a CUDA graph on the GPU) and replayed. Sampled ids stay on the
device, where the next step reads them; the host looks at them one step late, so that it never keeps the GPU waiting.
What the host must know in time it knows without looking: lengths, pages, and who has reached `max_tokens`. Only an
end-of-text token is seen late, and then the one token drawn after it is thrown away.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fi_cupy.models import ModelError, sampler
from fi_cupy.models.backend import Fetch, Step
from fi_cupy.models.decode_step import DecodeStep
from fi_cupy.models.kv_cache import PagedKVCache, cache_dtype, page_table, page_tables, pages_for
from fi_cupy.models.llama import Batch, Llama, Workspace, padded_vocab
from fi_cupy.models.prefix import Groups, find_groups
from fi_cupy.models.requests import Inputs, Request, RunningBatch, sampling_fields
from fi_cupy.models.sampler import Mode, SamplingParams
from fi_cupy.prefill import BatchPrefillWithPagedKVCacheWrapper

Array = Any
PAGE_SIZE = 16
WORKSPACE_BYTES = 32 << 20


@dataclass
class EngineStats:
    """Tokens and wall-clock seconds of each kind of step; captures are counted apart.

    `shared_tokens` are prompt tokens that another prompt has brought into the cache, `cascade_steps` the decode steps
    that attended to a shared prefix once for all its requests.
    """

    prefill_tokens: int = 0
    shared_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_steps: int = 0
    cascade_steps: int = 0
    decode_seconds: float = 0.0
    captures: int = 0
    capture_seconds: float = 0.0


@dataclass
class _Launch:
    """A step that is under way, and the request of each row of its result."""

    rows: list[Request]
    ids: Fetch
    prompt_tokens: int


class Engine:
    """Runs requests on a model.

    Parameters
    ----------
    model : Llama
    max_batch : int
        Most requests that run at once; others wait.
    num_pages : int, optional
        Of the key-value cache; by default room for `max_batch` sequences of 1024 tokens, or of the whole context
        where that is shorter. A request is admitted when the pages for its prompt and `max_tokens` are free, so a
        running request never lacks memory.
    max_prefill_tokens : int
        Most prompt tokens of one step; longer prompts take several, between which running requests get their turn.
    stop_ids : collection of int
        Tokens that end a text.
    batch_sizes : sequence of int, optional
        Sizes for which a decode step is captured; a batch is padded to the next one. By default powers of two on a
        GPU, every size on the CPU.
    page_size : int
    kv_dtype : {'auto', 'fp8'}
        What the cache holds: see `fi_cupy.models.kv_cache.PagedKVCache`.
    share_prefixes : bool
        Compute the whole pages with which several prompts begin once and keep them for later prompts as long as their
        memory is not needed. Where much is shared, decode attention is a cascade (`fi_cupy.models.prefix`).
    cascade_bytes : int, optional
        In place of `fi_cupy.models.prefix.MIN_SAVED_BYTES`.

    Examples
    --------
    >>> engine = Engine(model, max_batch=8, stop_ids=tokenizer.stop_ids)      # doctest: +SKIP
    >>> request = engine.submit(tokenizer.encode("Once"), SamplingParams(max_tokens=20))      # doctest: +SKIP
    >>> engine.run()                                                          # doctest: +SKIP
    >>> tokenizer.decode(request.output_ids)                                  # doctest: +SKIP
    """

    def __init__(
        self,
        model: Llama,
        *,
        max_batch: int = 8,
        num_pages: int | None = None,
        max_prefill_tokens: int = 1024,
        stop_ids: Sequence[int] | frozenset[int] = (),
        batch_sizes: Sequence[int] | None = None,
        page_size: int = PAGE_SIZE,
        kv_dtype: str = "auto",
        share_prefixes: bool = True,
        cascade_bytes: int | None = None,
    ) -> None:
        if max_batch < 1:
            raise ModelError(f"max_batch is {max_batch}, expected at least 1")
        if max_prefill_tokens < 1:
            raise ModelError(f"max_prefill_tokens is {max_prefill_tokens}, expected at least 1")
        self.model = model
        self.backend = backend = model.backend
        self.stop_ids = frozenset(stop_ids)
        self.max_batch = max_batch
        self.max_prefill_tokens = max_prefill_tokens
        self.lookahead = backend.lookahead
        self.share_prefixes = share_prefixes
        self.cascade_bytes = cascade_bytes
        self.batch_sizes = self._batch_sizes(batch_sizes)
        self.stats = EngineStats()
        config = model.config
        if num_pages is None:
            num_pages = max_batch * pages_for(min(config.context_length, 1024), page_size)
        rows = self.batch_sizes[-1]
        with backend.active():
            self._check_memory(num_pages * page_size, cache_dtype(backend, kv_dtype).itemsize)
            self.cache = PagedKVCache(backend, config, num_pages, page_size, kv_dtype)
            self.workspace = Workspace(backend, config, max(rows, max_prefill_tokens))
            self.attention_workspace = backend.empty((WORKSPACE_BYTES,), np.uint8)
            self.logits = backend.empty((rows, padded_vocab(config.vocab_size)), np.float32)
            self.tokens = backend.zeros((rows,), np.int32)
            self._last_hidden = backend.empty((rows, config.hidden_size))
            self._first_tokens = backend.zeros((rows,), np.int32)
            self._prefill_inputs = Inputs(
                backend,
                {
                    **{name: (np.int32, max_prefill_tokens) for name in ("tokens", "positions", "batch_indices")},
                    "last_rows": (np.int32, max_batch),
                    "kv_indptr": (np.int32, max_batch + 1),
                    "kv_indices": (np.int32, max(num_pages, 1)),
                    **sampling_fields(max_batch),
                },
            )
            self._prefill_wrapper = BatchPrefillWithPagedKVCacheWrapper(self.attention_workspace)
        self._steps: dict[tuple[int, int], DecodeStep] = {}
        self._groups: Groups | None = None
        self._waiting: deque[Request] = deque()
        self._prefilling: list[Request] = []
        self._running = RunningBatch(max_batch, num_pages, config.vocab_size, page_size)
        self._in_flight: deque[_Launch] = deque()
        self._decode_turn = False
        self._mark = (0.0, 0.0)

    def _batch_sizes(self, sizes: Sequence[int] | None) -> list[int]:
        if sizes is None and not self.backend.captures:
            return list(range(1, self.max_batch + 1))
        if sizes is None:
            return [1 << i for i in range((self.max_batch - 1).bit_length() + 1)]
        if not sizes or min(sizes) < 1 or max(sizes) < self.max_batch:
            raise ModelError(f"batch_sizes is {list(sizes)}, expected sizes that reach max_batch = {self.max_batch}")
        return sorted(set(sizes))

    def _check_memory(self, tokens: int, itemsize: int) -> None:
        c, free = self.model.config, self.backend.free_bytes()
        need = tokens * 2 * c.num_layers * c.num_kv_heads * c.head_dim * itemsize
        if free is not None and need > free:
            raise ModelError(
                f"the key-value cache for {tokens} tokens needs {need >> 20} MiB, of the device {free >> 20} MiB "
                "are free; run fewer requests at once or fewer tokens"
            )

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams | None = None,
        on_token: Callable[[Request, int], None] | None = None,
    ) -> Request:
        """Queue a prompt.

        Parameters
        ----------
        prompt_ids : sequence of int
        params : SamplingParams, optional
        on_token : callable, optional
            Called with the request and each token (the one that ends the text included) when the host has it.

        Returns
        -------
        Request
            Filled while `step` or `run` is called.

        Raises
        ------
        ModelError
            An empty prompt, an id out of range, a prompt longer than the context, a request larger than the cache.
        """
        params = params if params is not None else SamplingParams()
        ids, config = [int(i) for i in prompt_ids], self.model.config
        if not ids:
            raise ModelError("the prompt is empty: it has no token to start from")
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise ModelError(f"a prompt id is outside 0 .. {config.vocab_size - 1}, the model's vocabulary")
        if len(ids) > config.context_length:
            raise ModelError(
                f"the prompt has {len(ids)} tokens, more than the model's context of {config.context_length}"
            )
        # The last token drawn never enters the cache, so a text may have one token more than the context.
        limit = min(params.max_tokens, config.context_length - len(ids) + 1)
        pages = pages_for(len(ids) + limit - 1, self.cache.page_size)
        if pages > self.cache.num_pages:
            raise ModelError(
                f"the prompt and max_tokens need {pages} pages of {self.cache.page_size} tokens, "
                f"the cache has {self.cache.num_pages}"
            )
        request = Request(ids, params, on_token, limit=limit)
        self._waiting.append(request)
        return request

    def run(self) -> None:
        """Go on until every request is finished."""
        while self.step():
            pass

    def step(self) -> bool:
        """Launch one prefill or decode step and look at the results that are due.

        Returns
        -------
        bool
            Whether there is anything left to do.
        """
        with self.backend.active():
            if not self._in_flight:
                self._mark = (time.perf_counter(), self.stats.capture_seconds)
            self._admit()
            launched = True
            if self._prefilling and not (self._decode_turn and self._running):
                self._in_flight.append(self._launch_prefill())
                self._decode_turn = True
            elif self._running:
                self._in_flight.append(self._launch_decode())
                self._decode_turn = False
            else:
                launched = False
            while len(self._in_flight) > (self.lookahead if launched else 0):
                self._collect(self._in_flight.popleft())
        return bool(self._in_flight or self._waiting or self._prefilling or self._running)

    def _admit(self) -> None:
        while self._waiting and len(self._prefilling) + len(self._running) < self.max_batch:
            request = self._waiting[0]
            pages = pages_for(len(request.prompt_ids) + request.limit - 1, self.cache.page_size)
            # The last token of a prompt is always run, since its hidden state is wanted.
            shared = self.cache.match(request.prompt_ids[:-1]) if self.share_prefixes else []
            if not self.cache.can_take(shared, pages - len(shared)):
                return
            request.pages = self.cache.take(shared, pages - len(shared))
            request.prefilled = request.shared = len(shared) * self.cache.page_size
            self.stats.shared_tokens += request.shared
            if self.share_prefixes:
                # Prompts run in the order of admission, and each layer caches keys before it attends to them: whoever
                # matches these pages from now on reads them after they are written, be it in the same launch.
                self.cache.register(request.prompt_ids, request.pages)
            self._prefilling.append(self._waiting.popleft())

    def _launch_prefill(self) -> _Launch:
        """Run the next chunk of the prompts that are not in the cache yet, and draw the first token of each done."""
        config, page_size = self.model.config, self.cache.page_size
        requests: list[Request] = []
        counts: list[int] = []
        room = self.max_prefill_tokens
        for request in self._prefilling:
            if room == 0:
                break
            requests.append(request)
            counts.append(min(room, len(request.prompt_ids) - request.prefilled))
            room -= counts[-1]
        total = sum(counts)
        lengths = [request.prefilled + count for request, count in zip(requests, counts, strict=True)]
        done = [i for i, request in enumerate(requests) if lengths[i] == len(request.prompt_ids)]
        qo_indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        indptr, indices, last = page_tables(
            page_table([request.pages for request in requests]), np.array(lengths, np.int32), page_size, len(requests)
        )

        host = self._prefill_inputs.host()
        host["kv_indptr"][: len(indptr)] = indptr
        host["kv_indices"][: len(indices)] = indices
        for i, request in enumerate(requests):
            rows = slice(qo_indptr[i], qo_indptr[i + 1])
            host["tokens"][rows] = request.prompt_ids[request.prefilled : lengths[i]]
            host["positions"][rows] = np.arange(request.prefilled, lengths[i])
            host["batch_indices"][rows] = i
        for row, i in enumerate(done):
            host["last_rows"][row] = qo_indptr[i + 1] - 1
            requests[i].params.write(host, row, 0, config.vocab_size)
        self._prefill_inputs.push()
        self._prefill_wrapper.plan(
            qo_indptr,
            indptr,
            indices,
            last,
            config.num_qo_heads,
            config.num_kv_heads,
            config.head_dim,
            page_size,
            causal=True,
            q_data_type=self.backend.dtype,
            kv_data_type=self.cache.dtype.name,
        )
        device = self._prefill_inputs.device
        batch = Batch(
            tokens=device["tokens"][:total],
            positions=device["positions"][:total],
            cache_positions=device["positions"][:total],
            batch_indices=device["batch_indices"][:total],
            kv_indptr=device["kv_indptr"][: len(indptr)],
            kv_indices=device["kv_indices"][: len(indices)],
            attention=self._prefill_wrapper,
        )
        hidden = self.model.forward(batch, self.cache.layers, self.workspace.first(total))
        for request, length in zip(requests, lengths, strict=True):
            request.prefilled = length
        finished = [requests[i] for i in done]
        if finished:
            self._draw_first_tokens(hidden, finished)
        return _Launch(finished, self.backend.fetch(self._first_tokens[: max(len(finished), 1)]), total)

    def _draw_first_tokens(self, hidden: Array, requests: list[Request]) -> None:
        """Sample after the prompts of `requests`, and let those that want more join the running batch."""
        count, device = len(requests), self._prefill_inputs.device
        last, ids = self._last_hidden[:count], self._first_tokens[:count]
        self.model.gather_rows(hidden, device["last_rows"][:count], last)
        logits = self.model.logits(last, self.logits[:count])
        columns = {name: device[name][:count] for name in sampler.FIELDS}
        mode = sampler.mode_of(self._prefill_inputs.current, count, self.model.config.vocab_size)
        sampler.sample(logits, columns, ids, mode)
        for i, request in enumerate(requests):
            self._prefilling.remove(request)
            if request.limit > 1:
                row = self._running.join(request)
                self.tokens[row : row + 1] = ids[i : i + 1]

    def _launch_decode(self) -> _Launch:
        """One more token for every running request."""
        if self._running.changed:
            self._arrange()
        requests = list(self._running.requests)
        rows = next(size for size in self.batch_sizes if size >= len(requests))
        step, replay = self._captured(rows, self._running.mode, 0 if self._groups is None else self._groups.parts)
        step.prepare(self._running, self._groups)
        replay()
        launch = _Launch(requests, self.backend.fetch(self.tokens[: len(requests)]), 0)
        self.stats.cascade_steps += self._groups is not None
        for request in self._running.advance():
            self._leave(request)
        return launch

    def _arrange(self) -> None:
        """Find the requests that share pages, and put them beside each other if a cascade is to read those once."""
        self._running.changed = False
        self._groups = None
        if not self.share_prefixes:
            return
        c = self.model.config
        token_bytes = 2 * c.num_kv_heads * c.head_dim * self.cache.dtype.itemsize
        found = find_groups(*self._running.pages(), token_bytes, self.cache.page_size, self.cascade_bytes)
        if found is None:
            return
        self._groups, order = found, found.order
        if (order[1:] < order[:-1]).any():
            self._running.reorder(order)
            self.tokens[: len(order)] = self.tokens[: len(order)][self.backend.array(order)]

    def _captured(self, rows: int, mode: Mode, parts: int = 0) -> tuple[DecodeStep, Step]:
        """The step for `rows` requests, and its replay for a way of sampling; made where there is none yet."""
        step = self._steps.get((rows, parts))
        if step is None or not step.has(mode):
            start = time.perf_counter()
            if step is None:
                step = self._steps[rows, parts] = DecodeStep(self, rows, parts)
            step.replay(mode)
            self.stats.captures += 1
            self.stats.capture_seconds += time.perf_counter() - start
        return step, step.replay(mode)

    def _leave(self, request: Request) -> None:
        """Take a request out of the running batch."""
        row, last = self._running.leave(request)
        if row != last:
            self.tokens[row : row + 1] = self.tokens[last : last + 1]

    def _collect(self, launch: _Launch) -> None:
        """Wait for a step and hand out its tokens."""
        ids = launch.ids()
        self._count(launch)
        for request, token in zip(launch.rows, ids.tolist(), strict=False):
            if request.finish_reason is not None:
                continue  # Drawn after the text had ended, before the host could know.
            request.output_ids.append(token)
            if token in self.stop_ids and not request.params.ignore_eos:
                self._finish(request, "stop")
            elif len(request.output_ids) == request.limit:
                self._finish(request, "length" if request.limit == request.params.max_tokens else "context")
            if request.on_token is not None:
                request.on_token(request, token)

    def _finish(self, request: Request, reason: str) -> None:
        request.finish_reason = reason
        if request in self._running.requests:
            self._leave(request)
        # A step under way may still write to these pages; whoever gets them next comes later in the same stream.
        self.cache.release(request.pages)
        request.pages = []

    def _count(self, launch: _Launch) -> None:
        """Give the time since the last result to the step that has just ended, captures left out."""
        s, now = self.stats, time.perf_counter()
        seconds = now - self._mark[0] - (s.capture_seconds - self._mark[1])
        self._mark = (now, s.capture_seconds)
        if launch.prompt_tokens:
            s.prefill_tokens += launch.prompt_tokens
            s.prefill_seconds += seconds
        else:
            s.decode_tokens += sum(request.finish_reason is None for request in launch.rows)
            s.decode_steps += 1
            s.decode_seconds += seconds

    def warm_up(self, requests: Sequence[tuple[Sequence[int], SamplingParams]]) -> None:
        """Run like requests for two tokens each, so that kernels are compiled and steps captured before it counts.

        Steps are captured for smaller batches, too, as texts may end one after the other.
        """
        for ids, p in requests:
            params = SamplingParams(2, p.temperature, p.top_p, p.top_k, p.seed, ignore_eos=True)
            self.submit(ids, params)
        self.run()
        mode = sampler.mode_together([p for _, p in requests], self.model.config.vocab_size)
        with self.backend.active():
            for rows in self.batch_sizes:
                if rows < len(requests):
                    self._captured(rows, mode)
        self.cache.forget()
        self.stats = EngineStats()
