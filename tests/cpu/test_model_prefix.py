"""Prompts that begin alike: their pages are shared and attended to once, and nothing that is written changes by it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import TinyLlama

from fi_cupy.models.backend import NumpyBackend
from fi_cupy.models.engine import Engine
from fi_cupy.models.generate import run_generate
from fi_cupy.models.kv_cache import PagedKVCache, page_table, page_tables
from fi_cupy.models.llama import Llama
from fi_cupy.models.loader import GGUFModel, LlamaConfig
from fi_cupy.models.prefix import MIN_SAVED_BYTES, Groups, find_groups
from fi_cupy.models.sampler import SamplingParams

pytest.importorskip("gguf", reason="the package gguf is not installed")

TINY = TinyLlama(context=128)
PAGE = 8


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return Llama.load(GGUFModel(TINY.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")), NumpyBackend())


def prompts() -> list[list[int]]:
    """Three families: 40 tokens shared by four (two of them share 16 more), 24 by three, and one that is alone."""
    rng = np.random.default_rng(1)

    def text(n: int) -> list[int]:
        return rng.integers(3, len(TINY.tokens), n).tolist()

    first, second, deeper = text(40), text(24), text(16)
    return [
        first + text(5), second + text(9), first + deeper + text(3), text(20), first + deeper + text(8),
        second + text(1), first, second + text(30),
    ]  # fmt: skip


COUNTS = [9, 12, 20, 5, 14, 1, 11, 17]


@pytest.fixture(scope="module")
def greedy() -> list[list[int]]:
    return [TINY.greedy(ids, n) for ids, n in zip(prompts(), COUNTS, strict=True)]


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("batch_sizes", [None, [8], [2, 4, 8]], ids=str)
@pytest.mark.parametrize("chunk", [1024, 13])
@pytest.mark.parametrize("sharing", ["no", "pages", "cascade"])
def test_the_same_ids_with_and_without_sharing(
    llama: Llama, greedy: list[list[int]], sharing: str, chunk: int, batch_sizes: list[int] | None, lookahead: int
) -> None:
    """Requests join while others run, and leave one after the other; more wait than may run."""
    engine = Engine(
        llama, max_batch=6, max_prefill_tokens=chunk, batch_sizes=batch_sizes, page_size=PAGE,
        share_prefixes=sharing != "no", cascade_bytes=0 if sharing == "cascade" else 1 << 40,
    )  # fmt: skip
    engine.lookahead = lookahead
    requests = []
    for i, (ids, count) in enumerate(zip(prompts(), COUNTS, strict=True)):
        requests.append(engine.submit(ids, SamplingParams(max_tokens=count)))
        if i % 3 == 2:
            engine.step()
            engine.step()
    engine.run()
    assert [request.output_ids for request in requests] == greedy
    assert engine.cache.free_pages == engine.cache.num_pages
    stats, total = engine.stats, sum(map(len, prompts()))
    assert stats.prefill_tokens + stats.shared_tokens == total
    # 40 tokens thrice (once with 16 more; a prompt's last token is run, so all of `first` but a page), 24 twice.
    assert stats.shared_tokens == (0 if sharing == "no" else 40 + 56 + 32 + 24 + 24)
    assert (stats.cascade_steps > 5) == (sharing == "cascade")
    assert sum(request.shared for request in requests) == stats.shared_tokens


@pytest.mark.parametrize("cascade_bytes", [0, 1 << 40])
def test_copies_of_a_prompt(llama: Llama, cascade_bytes: int) -> None:
    """All of a prompt's whole pages are computed once; sampled copies differ as their seeds do."""
    ids = prompts()[4]
    params = [SamplingParams(8, temperature=0.9 * (i > 1), top_p=0.9, seed=i) for i in range(5)]
    alone = []
    for p in params:
        engine = Engine(llama, max_batch=1, page_size=PAGE)
        alone.append(engine.submit(ids, p))
        engine.run()
    engine = Engine(llama, max_batch=5, page_size=PAGE, cascade_bytes=cascade_bytes)
    together = [engine.submit(ids, p) for p in params]
    engine.run()
    assert [r.output_ids for r in together] == [r.output_ids for r in alone]
    whole = (len(ids) - 1) // PAGE * PAGE
    assert engine.stats.prefill_tokens == len(ids) + 4 * (len(ids) - whole)


def test_pages_serve_later_prompts_until_memory_is_needed(llama: Llama, greedy: list[list[int]]) -> None:
    texts = prompts()
    engine = Engine(llama, max_batch=1, num_pages=10, page_size=PAGE)
    shared = []
    for i in (0, 2, 1, 6):
        request = engine.submit(texts[i], SamplingParams(COUNTS[i]))
        engine.run()
        assert request.output_ids == greedy[i]
        shared.append(request.shared)
    # The third prompt's six pages, with a cache of ten, cost the end of the second's text, not its beginning.
    assert shared == [0, 40, 0, 32]
    engine.cache.forget()
    assert engine.cache.match(texts[6]) == []


def test_a_page_is_never_taken_for_another_text() -> None:
    """Random traffic: what `match` gives is what was written there, pages of holders are never given away."""
    rng = np.random.default_rng(0)
    size, pages = 2, 24
    config = LlamaConfig(8, 8, 8, 1, 1, 1, 8, 64, 1e-5, 1e4)
    cache = PagedKVCache(NumpyBackend(), config, pages, size)
    written: dict[int, tuple[int, ...]] = {}  # page -> all the text up to its end
    held: list[list[int]] = []
    hits = 0
    for _ in range(4000):
        if held and (rng.random() < 0.4 or len(held) > 6):
            cache.release(held.pop(rng.integers(len(held))))
            continue
        text = tuple(rng.integers(0, 2, rng.integers(1, 14)).tolist())
        shared = cache.match(text[:-1])
        for i, page in enumerate(shared):
            assert written[page] == text[: (i + 1) * size]
        need = -(-len(text) // size) + 1
        if not cache.can_take(shared, need - len(shared)):
            continue
        got = cache.take(shared, need - len(shared))
        assert got[: len(shared)] == shared and len(set(got)) == need
        assert not set(got[len(shared) :]) & {page for each in held for page in each}
        for i, page in enumerate(got[len(shared) :], start=len(shared)):
            written[page] = text[: (i + 1) * size]
        cache.register(text, got)
        held.append(got)
        hits += len(shared)
        assert cache.free_pages == pages - len({page for each in held for page in each})
    assert hits > 1000
    for each in held:
        cache.release(each)
    assert cache.free_pages == pages


def groups_of(table: list[list[int]], full: list[int], minimum: int = 0) -> Groups | None:
    return find_groups(page_table(table), np.array(full, np.int32), 1, 1, minimum)


def test_groups() -> None:
    a, b, c = [1, 2, 3], [1, 2, 4], [9, 8, 7]
    assert groups_of([a, c], [3, 3]) is None
    assert groups_of([a], [3]) is None
    found = groups_of([a, c, b], [3, 3, 3])
    assert found is not None and found.order.tolist() == [0, 2, 1] and found.sizes == (2,)
    assert found.pages[0].tolist() == [1, 2] and found.skip.tolist() == [2, 2, 0] and found.parts == 2
    # A page that is not full yet belongs to its request.
    found = groups_of([a, a, a], [3, 1, 2])
    assert found is not None and found.pages[0].tolist() == [1] and found.parts == 1
    # Two pairs that share three pages each save more than four rows that share one.
    found = groups_of([[1, 2, 3], [1, 5, 6], [1, 2, 3], [1, 5, 6]], [3] * 4)
    assert found is not None and found.sizes == (2, 2) and [len(p) for p in found.pages] == [3, 3]
    # And four rows that share two pages save more than one pair that shares three.
    found = groups_of([[1, 2, 3], [1, 2, 3], [1, 2, 4], [1, 2, 5]], [3] * 4)
    assert found is not None and found.sizes == (4,) and found.pages[0].tolist() == [1, 2]
    # The largest four of six pairs.
    found = groups_of([[i, i + 10, i + 20][: 1 + i // 2] for i in range(6) for _ in range(2)], [1, 1, 1, 1, 2, 2] * 2)
    assert found is not None and len(found.sizes) == 4 and found.parts == 5


def test_a_cascade_must_save_enough() -> None:
    prefix = list(range(128))
    table, full = page_table([[*prefix, 1000 + i] for i in range(64)]), np.full(64, 128, np.int32)
    token = 2 * 3 * 64 * 2  # SmolLM2 in bf16
    saved = 63 * 2048 * token
    assert find_groups(table, full, token, 16) is not None and saved > MIN_SAVED_BYTES
    assert find_groups(table, full, token, 16, saved) is not None
    assert find_groups(table, full, token, 16, saved + 1) is None
    assert find_groups(table[:2], full[:2], token, 16) is None


def test_page_tables_without_the_first_level() -> None:
    table, lengths = page_table([[4, 2, 7], [5, 6], [1, 3]]), np.array([5, 3, 4], np.int32)
    skip = np.array([1, 0, 1], np.int32)
    indptr, indices, last = page_tables(table, lengths, 2, rows=4, skip=skip)
    assert indptr.tolist() == [0, 2, 4, 5, 5]
    assert indices.tolist() == [2, 7, 5, 6, 3]
    assert last.tolist() == [1, 1, 2, 1]


def test_generate_reports_what_is_shared(tmp_path: Path) -> None:
    path, written = str(TINY.write(tmp_path / "tiny.gguf")), []
    for share in (True, False):
        out = io.StringIO()
        stats = run_generate(
            "hello world" * 12, max_tokens=6, batch=3, backend="numpy", model=path, share_prefix=share, stream=out
        )
        assert stats.shared_tokens == (2 * 32 if share else 0) and stats.cascade_steps == 0
        assert (f"tokens ({stats.shared_tokens} shared), " in out.getvalue()) == share
        written.append(stats.token_ids)
    assert written[0] == written[1] and len(written[0]) == 3
