"""The Llama model on the GPU: bf16 kernels and captured decode steps against the CPU's answers."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "cpu"))
from tiny_llama import TinyLlama

pytest.importorskip("cupy")
pytest.importorskip("gguf", reason="the package gguf is not installed")

from fi_cupy.autotuner import AutoTuner
from fi_cupy.models import ModelError
from fi_cupy.models.backend import CupyBackend, NumpyBackend
from fi_cupy.models.engine import Engine
from fi_cupy.models.generate import run_generate
from fi_cupy.models.llama import Llama
from fi_cupy.models.loader import GGUFModel, default_model_path
from fi_cupy.models.requests import Request
from fi_cupy.models.sampler import SamplingParams
from fi_cupy.tuning.choice import forget

TINY = TinyLlama(heads=6, kv_heads=2, head_dim=64, hidden=128, ffn=256, context=128)
VOCAB = len(TINY.tokens)
RECORDED = json.loads((Path(__file__).parent.parent / "data" / "smollm2_greedy.json").read_text())
#: Distance in logits below which bf16 may rank two tokens of SmolLM2 the other way round.
BF16_MARGIN = 0.5


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GGUFModel:
    return GGUFModel(TINY.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf"))


@pytest.fixture(scope="module")
def llama(tiny: GGUFModel) -> Llama:
    return Llama.load(tiny, CupyBackend())


@pytest.fixture(scope="module")
def smollm2() -> GGUFModel:
    try:
        return GGUFModel(default_model_path())
    except ModelError as error:
        pytest.skip(str(error))


def texts(lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(3, len(TINY.tokens), n).tolist() for n in lengths]


def cpu_steps(tiny: GGUFModel, ids: list[int], tokens: list[int], **options: Any) -> list[np.ndarray]:
    """Logits of the CPU's engine in bf16, step by step, which goes on with these tokens whatever it would take."""
    engine = Engine(Llama.load(tiny, NumpyBackend(ml_dtypes.bfloat16)), max_batch=1, **options)
    engine.submit(ids, SamplingParams(len(tokens)))
    logits = []
    for token in tokens:
        engine.step()
        logits.append(engine.logits[0, :VOCAB].copy())
        engine.tokens[0] = token
    return logits


def test_logits_follow_the_cpu_in_bf16(tiny: GGUFModel, llama: Llama) -> None:
    """Step by step: the GPU's token is fed to both, and every step's logits agree."""
    (ids,) = texts([37])
    gpu = Engine(llama, max_batch=1)
    gpu.lookahead = 0
    request = gpu.submit(ids, SamplingParams(20))
    on_gpu = []
    while gpu.step():
        on_gpu.append(gpu.logits[0, :VOCAB].get())
    on_gpu.append(gpu.logits[0, :VOCAB].get())
    del on_gpu[20:]
    for step, (got, want) in enumerate(zip(on_gpu, cpu_steps(tiny, ids, request.output_ids), strict=True)):
        scale = np.abs(want).max()
        assert np.abs(got - want).max() < 0.03 * scale, f"step {step}"
        assert np.abs(got - TINY.logits(ids + request.output_ids[:step])[-1]).max() < 0.12 * scale, f"step {step}"


def alone(llama: Llama, ids: list[int], params: SamplingParams) -> Request:
    engine = Engine(llama, max_batch=1)
    request = engine.submit(ids, params)
    engine.run()
    return request


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_requests_join_and_leave(llama: Llama, sampled: bool) -> None:
    """Other rows of a batch, padding and pages used before do not change a request's logits beyond rounding."""
    prompts = texts([1, 15, 16, 17, 40, 5, 8])
    counts = [9, 1, 30, 16, 2, 33, 5]
    params = [SamplingParams(n, temperature=0.3 * sampled, top_p=0.95, seed=i) for i, n in enumerate(counts)]
    engine = Engine(llama, max_batch=4, max_prefill_tokens=32)
    requests = []
    for ids, p in zip(prompts, params, strict=True):
        requests.append(engine.submit(ids, p))
        engine.step()
        engine.step()
    engine.run()
    assert [len(request.output_ids) for request in requests] == counts
    assert engine.cache.free_pages == engine.cache.num_pages
    agree = 0
    for ids, p, request in zip(prompts, params, requests, strict=True):
        want = alone(llama, ids, p).output_ids
        same = next((i for i, (a, b) in enumerate(zip(request.output_ids, want, strict=True)) if a != b), len(want))
        agree += same
        if same < len(want) and not sampled:  # another batch size may round differently: only a near tie may flip
            best = np.sort(TINY.logits(ids + want[:same])[-1])
            assert best[-1] - best[-2] < 0.1 * np.abs(best).max()
    assert agree > sum(counts) // 2


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
def test_shared_prefixes_change_nothing(llama: Llama, kv_dtype: str) -> None:
    """Two families of prompts that come and go: own pages, shared pages, and a cascade write the same text."""
    first, second, *tails = texts([50, 34, 5, 9, 3, 20, 8, 1, 30, 2])
    prompts = [(first if i % 3 else second) + tail for i, tail in enumerate(tails)]
    counts = [9, 30, 20, 5, 14, 1, 11, 17]
    written, stats = {}, {}
    for sharing, options in {
        "no": {"share_prefixes": False}, "pages": {"cascade_bytes": 1 << 60}, "cascade": {"cascade_bytes": 0},
    }.items():  # fmt: skip
        engine = Engine(llama, max_batch=6, max_prefill_tokens=64, kv_dtype=kv_dtype, **options)
        requests = []
        for i, (ids, count) in enumerate(zip(prompts, counts, strict=True)):
            requests.append(engine.submit(ids, SamplingParams(count)))
            if i % 3 == 2:
                engine.step()
                engine.step()
        engine.run()
        assert [len(request.output_ids) for request in requests] == counts
        assert engine.cache.free_pages == engine.cache.num_pages
        written[sharing], stats[sharing] = [request.output_ids for request in requests], engine.stats
    assert stats["no"].shared_tokens == stats["pages"].cascade_steps == 0
    assert stats["pages"].shared_tokens == stats["cascade"].shared_tokens == 4 * 48 + 2 * 32
    assert stats["cascade"].cascade_steps > 10
    for sharing in ("pages", "cascade"):
        agree = 0
        for ids, got, want in zip(prompts, written[sharing], written["no"], strict=True):
            same = next((i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b), len(want))
            agree += same
            if same < len(want):  # another order of the sums: only a near tie may flip
                best = np.sort(TINY.logits(ids + want[:same])[-1])
                assert best[-1] - best[-2] < (0.1 if kv_dtype == "auto" else 0.3) * np.abs(best).max()
        assert agree > sum(counts) // 2


@pytest.mark.parametrize("batch", [1, 3])
def test_modes_of_sampling(llama: Llama, batch: int) -> None:
    """What no row needs is left out of the step: the tokens that are drawn do not depend on it."""
    ids = texts([9])[0]
    choices = [
        {}, {"temperature": 0.9}, {"temperature": 0.9, "top_p": 0.8}, {"temperature": 0.9, "top_k": 5},
        {"temperature": 0.9, "top_k": 5, "top_p": 0.8}, {"temperature": 3.0, "top_k": 1},
    ]  # fmt: skip
    greedy = alone(llama, ids, SamplingParams(12)).output_ids
    for choice in choices:
        engine = Engine(llama, max_batch=batch)
        requests = [engine.submit(ids, SamplingParams(12, seed=i, **choice)) for i in range(batch)]
        engine.run()
        for i, request in enumerate(requests):
            if batch == 1:
                again = alone(llama, ids, SamplingParams(12, seed=i, **choice)).output_ids
                assert again == request.output_ids
            if not choice or choice.get("top_k") == 1:
                assert request.output_ids[:4] == greedy[:4]
    mixed = Engine(llama, max_batch=3)
    requests = [mixed.submit(ids, SamplingParams(12, seed=7, **choice)) for choice in choices[:3]]
    mixed.run()
    assert requests[0].output_ids[:4] == greedy[:4]
    assert len({tuple(request.output_ids) for request in requests}) == 3


def test_end_of_text_is_seen_one_step_late(llama: Llama) -> None:
    (ids,) = texts([10])
    tokens = alone(llama, ids, SamplingParams(12)).output_ids
    stop = tokens[4]
    engine = Engine(llama, max_batch=2, stop_ids=[stop])
    seen: list[int] = []
    request = engine.submit(ids, SamplingParams(12), on_token=lambda _, token: seen.append(token))
    engine.run()
    assert request.output_ids == seen == tokens[: tokens.index(stop) + 1]
    assert request.finish_reason == "stop"


def test_seed_decides(llama: Llama) -> None:
    (ids,) = texts([6])
    runs = [alone(llama, ids, SamplingParams(20, temperature=2.0, seed=seed)).output_ids for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("batch", [1, 5])
def test_smollm2_greedy_ids(smollm2: GGUFModel, batch: int) -> None:
    """Ids recorded from transformers in float32; bf16 may leave them only where two tokens are almost as likely."""
    rows: list[dict[str, Any]] = RECORDED["generations"]
    engine = Engine(Llama.load(smollm2, CupyBackend()), max_batch=batch, stop_ids=[smollm2.tokenizer.eos_id or 0])
    requests = [engine.submit(row["prompt_ids"], SamplingParams(len(row["margins"]))) for row in rows]
    engine.run()
    agree = 0
    for row, request in zip(rows, requests, strict=True):
        pairs = zip(request.output_ids, row["output_ids"], strict=False)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(row["output_ids"]))
        agree += same
        if same < len(row["output_ids"]):
            assert row["margins"][same] < BF16_MARGIN, f"{row['prompt']!r} leaves the recorded text at token {same}"
    assert agree > sum(len(row["output_ids"]) for row in rows) // 3


def test_fp8_cache_follows_the_cpu(tiny: GGUFModel, llama: Llama) -> None:
    """Prefill and decode over a fp8 cache: the logits of the CPU's engine over the same kind of cache."""
    (ids,) = texts([37])
    gpu = Engine(llama, max_batch=1, kv_dtype="fp8")
    gpu.lookahead = 0
    assert gpu.cache.layers[0][0].dtype == np.uint8
    request = gpu.submit(ids, SamplingParams(12))
    on_gpu = []
    while gpu.step():
        on_gpu.append(gpu.logits[0, :VOCAB].get())
    on_gpu.append(gpu.logits[0, :VOCAB].get())
    steps = zip(on_gpu[:12], cpu_steps(tiny, ids, request.output_ids, kv_dtype="fp8"), strict=True)
    for step, (got, want) in enumerate(steps):
        # A key that lies between two e4m3 numbers may round either way where the two sides' bf16 differ.
        assert np.abs(got - want).max() < 0.1 * np.abs(want).max(), f"step {step}"


def test_generate_tunes_and_keeps_its_choices(
    smollm2: GGUFModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FI_CUPY_AUTOTUNE_DIR", str(tmp_path))
    tuner = AutoTuner()
    monkeypatch.setattr(AutoTuner, "_instance", tuner)
    forget()
    plain = run_generate("The capital of France is", max_tokens=8, kv_dtype="fp8", stream=io.StringIO())
    assert plain.texts[0].startswith(" Paris")
    tuned = run_generate("The capital of France is", max_tokens=8, kv_dtype="fp8", tune=True, stream=io.StringIO())
    assert tuned.texts[0].startswith(" Paris")
    assert any(key.startswith("('mm_bf16', ((1, 576)") for key in tuner.choices())
    assert any(key.startswith("('batch_decode', ((1, 9, 64)") for key in tuner.choices())
    assert (tmp_path / "choices.json").exists()
    forget()


def test_run_generate(smollm2: GGUFModel) -> None:
    out = io.StringIO()
    stats = run_generate("The capital of France is", max_tokens=8, batch=3, backend="auto", stream=out)
    assert stats.backend == "cuda" and stats.generated_tokens == 24
    assert stats.texts[0].startswith(" Paris")
    again = run_generate("The capital of France is", max_tokens=8, batch=3, backend="cuda", stream=io.StringIO())
    assert again.kernels_compiled == 0 and again.token_ids == stats.token_ids
