"""Text to ids and back: against recorded ids, by hand on a small vocabulary, and as a stream."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import TinyLlama

from fi_cupy.models import ModelError
from fi_cupy.models.loader import GGUFModel, TokenizerData, default_model_path
from fi_cupy.models.tokenizer import Tokenizer

pytest.importorskip("gguf", reason="the package gguf is not installed")
pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

RECORDED = json.loads((Path(__file__).parent.parent / "data" / "smollm2_greedy.json").read_text())
TEXTS = [
    "",
    "plain",
    "  two spaces  1234  and 5\t6\n",
    "naïve Ελληνικά 日本語 🙂👩‍👩‍👧‍👦",
    "\x00\x01\x7f\u00a0\u200b\ufeff",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TokenizerData:
    return GGUFModel(TinyLlama().write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")).tokenizer


@pytest.fixture(scope="module")
def tiny(data: TokenizerData) -> Tokenizer:
    return Tokenizer(data)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    try:
        path = default_model_path()
    except ModelError as error:
        pytest.skip(str(error))
    return Tokenizer(GGUFModel(path).tokenizer)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer._data.tokens[i] for i in tokenizer.encode(text)]


def test_merges_apply_in_order(tiny: Tokenizer) -> None:
    assert pieces(tiny, "hello world") == ["hello", "Ġwor", "l", "d"]


def test_digits_are_split_before_spaces_are(tiny: Tokenizer, data: TokenizerData) -> None:
    tokens = [*data.tokens, "ĠĠ", "12"]
    kinds = [*data.token_types, 1, 1]
    merges = ["Ġ Ġ", "1 2", *data.merges]
    split = Tokenizer(dataclasses.replace(data, tokens=tokens, token_types=kinds, merges=merges))
    assert pieces(split, "  12") == ["ĠĠ", "1", "2"]
    whole = Tokenizer(dataclasses.replace(data, tokens=tokens, token_types=kinds, merges=merges, pre="gpt-2"))
    assert pieces(whole, "  12") == ["Ġ", "Ġ", "12"]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tiny: Tokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text)) == text


def test_control_tokens_in_text(tiny: Tokenizer) -> None:
    assert tiny.encode("<|im_start|>h<|im_end|>")[::2] == [1, 2]
    spelled = tiny.encode("<|im_end|>", parse_special=False)
    assert 2 not in spelled and tiny.decode(spelled) == "<|im_end|>"
    assert tiny.decode([1, 2, *tiny.encode("h")]) == "h"
    assert tiny.decode([2, *tiny.encode("h")], skip_special=False) == "<|im_end|>h"


def test_begin_of_text_is_added_once_where_the_file_asks(data: TokenizerData) -> None:
    tokenizer = Tokenizer(dataclasses.replace(data, add_bos=True))
    assert tokenizer.encode("h")[0] == 1 and tokenizer.encode("h")[1] != 1
    assert tokenizer.encode("<|im_start|>h").count(1) == 1


def test_stop_tokens(tiny: Tokenizer) -> None:
    assert tiny.stop_ids == {0, 2}


@pytest.mark.parametrize("text", ["naïve", "日本語 and 🙂 done", "👩‍👩‍👧‍👦"])
def test_stream_never_gives_half_a_character(tiny: Tokenizer, text: str) -> None:
    stream, parts = tiny.stream(), []
    for token in tiny.encode(text):
        parts.append(stream.push(token))
        parts[-1].encode()
        assert "\ufffd" not in parts[-1]
        assert text.startswith("".join(parts))
    assert "".join(parts) + stream.finish() == text


def test_stream_that_ends_within_a_character(tiny: Tokenizer) -> None:
    stream = tiny.stream()
    ids = tiny.encode("a🙂")[:-1]
    assert "".join(map(stream.push, ids)) == "a" and stream.finish() == "\ufffd"
    assert tiny.decode(ids) == "a\ufffd"


def test_stream_goes_on_after_bytes_that_are_no_text(tiny: Tokenizer) -> None:
    stream = tiny.stream()
    ids = [*tiny.encode("🙂")[:2], *tiny.encode("b")]
    assert "".join(map(stream.push, ids)) + stream.finish() == "\ufffdb" == tiny.decode(ids)


def test_stream_leaves_control_tokens_out(tiny: Tokenizer) -> None:
    assert tiny.stream().push(2) == ""
    assert tiny.stream(skip_special=False).push(2) == "<|im_end|>"


def test_id_out_of_range_is_no_text(tiny: Tokenizer) -> None:
    assert tiny.decode([10**6, -1]) == ""


def test_chat_template(tiny: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    assert tiny.apply_chat_template(messages) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tiny.apply_chat_template(messages, add_generation_prompt=False) == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% for %}", "failed"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_chat_templates_that_are_refused(data: TokenizerData, template: str | None, message: str) -> None:
    tokenizer = Tokenizer(dataclasses.replace(data, chat_template=template))
    with pytest.raises(ModelError, match=message):
        tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "llama"}, "vocabulary 'llama' is not supported"),
        ({"pre": "tekken"}, "pre-tokenizer 'tekken' is not supported"),
        ({"merges": ["no such", "tokens here"]}, "merges in the file are damaged"),
        ({"merges": ["three words here"]}, "merges in the file are damaged"),
    ],
)
def test_tokenizers_that_are_refused(data: TokenizerData, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        Tokenizer(dataclasses.replace(data, **change))


@pytest.mark.parametrize("row", RECORDED["tokenizer"], ids=lambda row: row["text"][:12].strip())
def test_recorded_ids(smollm2: Tokenizer, row: dict[str, Any]) -> None:
    assert smollm2.encode(row["text"]) == row["ids"]
    assert smollm2.decode(row["ids"], skip_special=False) == row["text"]


@pytest.mark.parametrize("row", RECORDED["generations"], ids=lambda row: row["prompt"][:12])
def test_recorded_prompts_and_answers(smollm2: Tokenizer, row: dict[str, Any]) -> None:
    text = row["prompt"]
    if row["chat"]:
        text = smollm2.apply_chat_template([{"role": "user", "content": text}])
    assert smollm2.encode(text) == row["prompt_ids"]
    assert smollm2.decode(row["output_ids"]) == row["output_text"]


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_round_trip(smollm2: Tokenizer, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text)) == text
