"""The real model on the NumPy backend: greedy ids against those recorded from transformers."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from fi_cupy.errors import CudaUnavailableError
from fi_cupy.models import ModelError
from fi_cupy.models.backend import NumpyBackend, cuda_missing
from fi_cupy.models.engine import Engine
from fi_cupy.models.generate import run_generate
from fi_cupy.models.llama import Llama
from fi_cupy.models.loader import GGUFModel, default_model_path
from fi_cupy.models.sampler import SamplingParams
from fi_cupy.models.tokenizer import Tokenizer

pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
try:
    PATH = default_model_path()
except ModelError as error:
    pytest.skip(str(error), allow_module_level=True)

RECORDED = json.loads((Path(__file__).parent.parent / "data" / "smollm2_greedy.json").read_text())


def test_the_file_is_the_recorded_one() -> None:
    assert hashlib.sha256(PATH.read_bytes()).hexdigest() == RECORDED["provenance"]["gguf_sha256"]


def test_greedy_ids_of_all_prompts_in_one_batch() -> None:
    gguf = GGUFModel(PATH)
    tokenizer = Tokenizer(gguf.tokenizer)
    rows: list[dict[str, Any]] = RECORDED["generations"]
    engine = Engine(Llama.load(gguf, NumpyBackend()), max_batch=5, stop_ids=[gguf.tokenizer.eos_id or 0])
    requests = [engine.submit(row["prompt_ids"], SamplingParams(len(row["margins"]))) for row in rows]
    engine.run()
    for row, request in zip(rows, requests, strict=True):
        assert request.output_ids == row["output_ids"], row["prompt"]
        assert request.finish_reason == ("stop" if row["output_ids"][-1] == gguf.tokenizer.eos_id else "length")
    assert tokenizer.decode(requests[0].output_ids) == rows[0]["output_text"]


def test_run_generate_streams_and_reports() -> None:
    row = next(row for row in RECORDED["generations"] if row["chat"])
    out = io.StringIO()
    stats = run_generate(row["prompt"], chat=True, max_tokens=6, batch=2, backend="numpy", stream=out)
    assert stats.token_ids == (tuple(row["output_ids"][:6]),) * 2
    assert stats.backend == "numpy" and stats.finish_reasons == ("length", "length")
    assert stats.generated_tokens == 12 and stats.prompt_tokens == 2 * len(row["prompt_ids"])
    head, *body, same, tail = out.getvalue().splitlines()
    assert "backend numpy (asked for)" in head
    assert "\n".join(body) == stats.texts[0]
    assert "the other 1 copies are the same" in same
    assert "tokens/s" in tail and "compiled: 0 kernels" in tail
    assert stats.decode_tokens_per_second > 0 and stats.prefill_tokens_per_second > 0


def test_fp8_cache() -> None:
    row = RECORDED["generations"][0]
    out = io.StringIO()
    stats = run_generate(row["prompt"], max_tokens=8, backend="numpy", kv_dtype="fp8", stream=out)
    assert stats.token_ids[0] == tuple(row["output_ids"][:8])  # the margins there are wide


def test_prompt_longer_than_the_context() -> None:
    with pytest.raises(ModelError, match=r"the prompt has \d+ tokens, more than the model's context of 8192"):
        run_generate("word " * 8300, backend="numpy", stream=io.StringIO())


def test_refusals_come_before_any_loading() -> None:
    for options in (
        {"batch": 0},
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"backend": "abacus"},
        {"kv_dtype": "int3"},
    ):
        with pytest.raises(ModelError, match="expected"):
            run_generate("x", stream=io.StringIO(), **options)
    with pytest.raises(ModelError, match="tune is set, but backend numpy"):
        run_generate("x", backend="numpy", tune=True, stream=io.StringIO())
    with pytest.raises(ModelError, match="no such model file"):
        run_generate("x", backend="numpy", model="/nowhere.gguf", stream=io.StringIO())
    with pytest.raises(ModelError, match="prompt is empty"):
        run_generate("", backend="numpy", stream=io.StringIO())


def test_cuda_asked_for_without_a_gpu() -> None:
    if cuda_missing() is None:
        pytest.skip("a GPU is present")
    with pytest.raises(CudaUnavailableError, match="backend 'cuda'"):
        run_generate("x", backend="cuda", stream=io.StringIO())
