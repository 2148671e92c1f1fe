"""The Llama forward pass and the engine on the NumPy backend, against a model computed without fi_cupy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tiny_llama import TinyLlama

from fi_cupy.models import ModelError
from fi_cupy.models.backend import NumpyBackend, select_backend
from fi_cupy.models.engine import Engine
from fi_cupy.models.kv_cache import page_table, page_tables
from fi_cupy.models.llama import Llama
from fi_cupy.models.loader import GGUFModel
from fi_cupy.models.requests import Request
from fi_cupy.models.sampler import SamplingParams

pytest.importorskip("gguf", reason="the package gguf is not installed")

TINY = TinyLlama()
VOCAB = len(TINY.tokens)


@pytest.fixture
def rng() -> np.random.Generator:
    """The same prompts each time: ids are compared, and a near tie in the logits may go either way."""
    return np.random.default_rng(1)


def load(tiny: TinyLlama, folder: Path) -> Llama:
    return Llama.load(GGUFModel(tiny.write(folder / "tiny.gguf")), NumpyBackend())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Llama:
    return load(TINY, tmp_path_factory.mktemp("tiny"))


def prompts(rng: np.random.Generator, lengths: list[int]) -> list[list[int]]:
    return [rng.integers(3, len(TINY.tokens), n).tolist() for n in lengths]


def alone(llama: Llama, ids: list[int], params: SamplingParams, **options: Any) -> Request:
    engine = Engine(llama, max_batch=1, **options)
    request = engine.submit(ids, params)
    engine.run()
    return request


@pytest.mark.parametrize(
    "tiny",
    [
        TinyLlama(seed=1),
        TinyLlama(seed=2, tied=False, heads=4, kv_heads=4, head_dim=8),
        TinyLlama(seed=3, rope_factors=np.array([1, 1, 1.5, 2, 3, 8, 8, 8.0])),
    ],
    ids=["gqa", "untied-mha", "rope-factors"],
)
def test_logits_of_prefill_and_decode(tmp_path: Path, rng: np.random.Generator, tiny: TinyLlama) -> None:
    llama = load(tiny, tmp_path)
    ids = rng.integers(3, len(tiny.tokens), 21).tolist()
    engine = Engine(llama, max_batch=1)
    request = engine.submit(ids, SamplingParams(max_tokens=16))
    text = list(ids)
    while engine.step():
        wanted = tiny.logits(text)[-1]
        np.testing.assert_allclose(engine.logits[0, :VOCAB], wanted, atol=2e-4 * np.abs(wanted).max())
        text = ids + request.output_ids
    assert request.output_ids == tiny.greedy(ids, 16)
    assert request.finish_reason == "length"


def test_bf16_stays_near(tmp_path: Path, rng: np.random.Generator) -> None:
    llama = Llama.load(GGUFModel(TINY.write(tmp_path / "tiny.gguf")), NumpyBackend(ml_dtypes.bfloat16))
    (ids,) = prompts(rng, [17])
    engine = Engine(llama, max_batch=1)
    request = engine.submit(ids, SamplingParams(max_tokens=4))
    while engine.step():
        wanted = TINY.logits(ids + request.output_ids[:-1])[-1]
        assert np.abs(engine.logits[0, :VOCAB] - wanted).max() < 0.05 * np.abs(wanted).max()
    assert llama.layers[0].qkv.dtype == engine.cache.layers[0][0].dtype == ml_dtypes.bfloat16


def e4m3(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def test_fp8_cache(llama: Llama, rng: np.random.Generator) -> None:
    """Logits are those of keys and values rounded to e4m3, in prefill and decode; a quarter of float32's memory."""
    (ids,) = prompts(rng, [17])
    plain, engine = (Engine(llama, max_batch=1, kv_dtype=kind) for kind in ("auto", "fp8"))
    assert engine.cache.layers[0][0].dtype == ml_dtypes.float8_e4m3fn
    assert [4 * half.nbytes for half in engine.cache.layers[0]] == [half.nbytes for half in plain.cache.layers[0]]
    request = engine.submit(ids, SamplingParams(max_tokens=8))
    text = list(ids)
    while engine.step():
        wanted = TINY.logits(text, e4m3)[-1]
        # A number in the middle of two of e4m3's may round either way after float32's arithmetic.
        np.testing.assert_allclose(engine.logits[0, :VOCAB], wanted, atol=0.02 * np.abs(wanted).max())
        assert np.abs(wanted - TINY.logits(text)[-1]).max() > 0.05 * np.abs(wanted).max()
        text = ids + request.output_ids
    assert len(request.output_ids) == 8


def test_weights_are_never_written(llama: Llama, rng: np.random.Generator) -> None:
    before = llama.layers[0].qkv.copy(), llama.lm_head.copy()
    alone(llama, *prompts(rng, [9]), SamplingParams(max_tokens=4))
    np.testing.assert_array_equal(before[0], llama.layers[0].qkv)
    np.testing.assert_array_equal(before[1], llama.lm_head)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("batch_sizes", [None, [4], [2, 8]], ids=str)
@pytest.mark.parametrize("chunk", [1024, 7])
def test_batched_equals_alone(
    llama: Llama, rng: np.random.Generator, lookahead: int, batch_sizes: list[int] | None, chunk: int
) -> None:
    texts = prompts(rng, [1, 15, 16, 17, 30, 5, 8])
    counts = [9, 1, 20, 16, 2, 33, 5]
    wanted = [TINY.greedy(ids, n) for ids, n in zip(texts, counts, strict=True)]
    engine = Engine(llama, max_batch=4, max_prefill_tokens=chunk, batch_sizes=batch_sizes)
    engine.lookahead = lookahead
    requests = []
    for ids, count in zip(texts, counts, strict=True):  # each joins while the earlier ones run
        requests.append(engine.submit(ids, SamplingParams(max_tokens=count)))
        engine.step()
        engine.step()
    engine.run()
    assert [request.output_ids for request in requests] == wanted
    assert engine.cache.free_pages == engine.cache.num_pages
    assert engine.stats.prefill_tokens == sum(map(len, texts))
    assert engine.stats.decode_tokens == sum(counts) - len(counts)


@pytest.mark.parametrize("lookahead", [0, 1])
def test_sampled_tokens_do_not_depend_on_the_company(llama: Llama, rng: np.random.Generator, lookahead: int) -> None:
    texts = prompts(rng, [4, 11, 19])
    params = [
        SamplingParams(12, temperature=0.8, top_p=0.9, top_k=20, seed=5),
        SamplingParams(7),
        SamplingParams(15, temperature=1.5, seed=6),
    ]
    wanted = [alone(llama, ids, p).output_ids for ids, p in zip(texts, params, strict=True)]
    engine = Engine(llama, max_batch=3)
    engine.lookahead = lookahead
    requests = [engine.submit(ids, p) for ids, p in zip(texts, params, strict=True)]
    engine.run()
    assert [request.output_ids for request in requests] == wanted
    assert wanted[1] == TINY.greedy(texts[1], 7)


def test_seed_decides(llama: Llama, rng: np.random.Generator) -> None:
    (ids,) = prompts(rng, [6])
    runs = [alone(llama, ids, SamplingParams(20, temperature=2.0, seed=seed)).output_ids for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert len(set(runs[0])) > 4


@pytest.mark.parametrize(
    "params",
    [SamplingParams(10, temperature=3.0, top_k=1), SamplingParams(10, temperature=3.0, top_p=1e-6)],
    ids=["top_k", "top_p"],
)
def test_filters_that_leave_one_token_are_greedy(llama: Llama, rng: np.random.Generator, params: Any) -> None:
    (ids,) = prompts(rng, [6])
    assert alone(llama, ids, params).output_ids == TINY.greedy(ids, 10)


@pytest.mark.parametrize("lookahead", [0, 1])
@pytest.mark.parametrize("at", [0, 1, 5])
def test_end_of_text(llama: Llama, rng: np.random.Generator, lookahead: int, at: int) -> None:
    texts = prompts(rng, [10, 20])
    greedy = TINY.greedy(texts[0], 12)
    stop = greedy[at]
    first = greedy.index(stop)
    engine = Engine(llama, max_batch=2, stop_ids=[stop])
    engine.lookahead = lookahead
    seen: list[tuple[Request, int]] = []
    request = engine.submit(texts[0], SamplingParams(12), on_token=lambda r, token: seen.append((r, token)))
    other = engine.submit(texts[1], SamplingParams(12, ignore_eos=True))
    engine.run()
    assert request.finish_reason == "stop"
    assert request.output_ids == greedy[: first + 1] == [token for _, token in seen]
    assert all(r is request for r, _ in seen)
    assert other.finish_reason == "length" and other.output_ids == TINY.greedy(texts[1], 12)
    assert engine.cache.free_pages == engine.cache.num_pages


def test_pages_of_a_finished_request_serve_the_next(llama: Llama, rng: np.random.Generator) -> None:
    texts = prompts(rng, [20, 20, 20, 9])
    engine = Engine(llama, max_batch=4, num_pages=3)  # one request of 20 + 12 tokens at a time
    engine.lookahead = 1
    requests = [engine.submit(ids, SamplingParams(13)) for ids in texts]
    engine.run()
    assert [request.output_ids for request in requests] == [TINY.greedy(ids, 13) for ids in texts]


def test_context_ends_the_text(llama: Llama, rng: np.random.Generator) -> None:
    (ids,) = prompts(rng, [60])
    request = alone(llama, ids, SamplingParams(100))
    assert request.finish_reason == "context"
    assert request.output_ids == TINY.greedy(ids, 5)  # positions 60 .. 63, and one token more that is not fed back
    (full,) = prompts(rng, [64])
    assert alone(llama, full, SamplingParams(100)).output_ids == TINY.greedy(full, 1)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "prompt is empty"),
        ([3] * 65, "the prompt has 65 tokens, more than the model's context of 64"),
        ([3, 10**6], "outside 0"),
        ([-1], "outside 0"),
    ],
)
def test_prompts_that_are_refused(llama: Llama, ids: list[int], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Engine(llama, max_batch=1).submit(ids)


def test_request_larger_than_the_cache(llama: Llama) -> None:
    with pytest.raises(ModelError, match="need 3 pages of 16 tokens, the cache has 2"):
        Engine(llama, max_batch=1, num_pages=2).submit([3] * 30, SamplingParams(10))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_parameters_out_of_range(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize(
    "options",
    [{"max_batch": 0}, {"max_prefill_tokens": 0}, {"max_batch": 4, "batch_sizes": [1, 2]}, {"kv_dtype": "fp4"}],
    ids=str,
)
def test_engine_options_out_of_range(llama: Llama, options: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="expected"):
        Engine(llama, **options)


def test_page_tables() -> None:
    table = page_table([[4, 2, 7], [5], [1, 3]])
    indptr, indices, last = page_tables(table, np.array([5, 2, 8], np.int32), 4, rows=5)
    assert indptr.tolist() == [0, 2, 3, 5, 5, 5]
    assert indices.tolist() == [4, 2, 5, 1, 3]
    assert last.tolist() == [1, 2, 4, 1, 1]
    assert {a.dtype for a in (indptr, indices, last)} == {np.dtype(np.int32)}


def test_unknown_backend() -> None:
    with pytest.raises(ModelError, match="unknown backend 'tpu'"):
        select_backend("tpu")
