"""Byte-level BPE built from the tokenizer section of a GGUF file, a streaming decoder and the chat template."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable, Sequence
from typing import Any

from fi_cupy.models import ModelError
from fi_cupy.models.loader import TokenizerData, import_extra

#: GGUF token types (gguf.TokenType).
CONTROL, USER_DEFINED = 3, 4
#: Control tokens that end a turn or a text in the Llama family; a file may name only one of them as its EOS.
END_TOKENS = frozenset({"<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "</s>"})
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _pre_tokenizer(tokenizers: Any, pre: str) -> Any:
    pt = tokenizers.pre_tokenizers
    if pre == "smollm":
        # Every digit alone, then GPT-2's pattern: the two expressions that llama.cpp has under this name.
        return pt.Sequence([pt.Digits(individual_digits=True), pt.ByteLevel(add_prefix_space=False, use_regex=True)])
    if pre in ("default", "gpt-2"):
        return pt.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre == "llama-bpe":
        split = pt.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated")
        return pt.Sequence([split, pt.ByteLevel(add_prefix_space=False, use_regex=False)])
    raise ModelError(f"tokenizer: pre-tokenizer {pre!r} is not supported, only 'smollm', 'gpt-2' and 'llama-bpe'")


class Tokenizer:
    """Text to token ids and back.

    Parameters
    ----------
    data : TokenizerData
        From `fi_cupy.models.loader.GGUFModel.tokenizer`.

    Raises
    ------
    ModelError
        Another kind of vocabulary than byte-level BPE, or an unknown pre-tokenizer.

    Examples
    --------
    >>> tokenizer = Tokenizer(GGUFModel(path).tokenizer)             # doctest: +SKIP
    >>> tokenizer.decode(tokenizer.encode("Hello, world!"))          # doctest: +SKIP
    'Hello, world!'
    """

    def __init__(self, data: TokenizerData) -> None:
        if data.model != "gpt2":
            raise ModelError(f"tokenizer: vocabulary {data.model!r} is not supported, only 'gpt2' (byte-level BPE)")
        tokenizers = import_extra("tokenizers")
        self._data = data
        vocab = {token: i for i, token in enumerate(data.tokens)}
        try:
            merges = [(left, right) for left, right in (merge.split(" ") for merge in data.merges)]
            bpe = tokenizers.models.BPE(vocab=vocab, merges=merges, ignore_merges=data.pre == "llama-bpe")
        except Exception as error:  # tokenizers raises bare Exception: a merge of tokens that do not exist, ...
            raise ModelError(f"tokenizer: the merges in the file are damaged: {error}") from error
        self._tokenizer = tokenizers.Tokenizer(bpe)
        self._tokenizer.pre_tokenizer = _pre_tokenizer(tokenizers, data.pre)
        self.special_ids = frozenset(i for i, kind in enumerate(data.token_types) if kind == CONTROL)
        added = tokenizers.AddedToken
        self._tokenizer.add_special_tokens(
            [added(data.tokens[i], special=True, normalized=False) for i in sorted(self.special_ids)]
        )
        self._tokenizer.add_tokens(
            [added(data.tokens[i], normalized=False) for i, kind in enumerate(data.token_types) if kind == USER_DEFINED]
        )
        ends = {i for i in self.special_ids if data.tokens[i] in END_TOKENS}
        self.stop_ids = frozenset(ends | {i for i in (data.eos_id, data.eot_id) if i is not None})

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._data.tokens)

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of `text`, after the begin-of-text token where the file asks for one.

        Parameters
        ----------
        text : str
        parse_special : bool
            Whether the spelling of a control token (``<|im_end|>``) means that token, or its characters.
        """
        self._tokenizer.encode_special_tokens = not parse_special
        ids = list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        bos = self._data.bos_id
        if self._data.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for; they need not be whole characters."""
        if not 0 <= token_id < len(self._data.tokens):
            return b""
        token = self._data.tokens[token_id]
        if self._data.token_types[token_id] in (CONTROL, USER_DEFINED):
            return token.encode()
        table = _byte_of_char()
        return b"".join(bytes([table[c]]) if c in table else c.encode() for c in token)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        data = b"".join(self.token_bytes(i) for i in ids if not (skip_special and i in self.special_ids))
        return data.decode(errors="replace")

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes ids one at a time."""
        return StreamDecoder(self, skip_special)

    def apply_chat_template(self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
        """The conversation as the text that the model was trained on, by the template in the file.

        Parameters
        ----------
        messages : sequence of {"role": ..., "content": ...}
        add_generation_prompt : bool
            Whether to open the assistant's turn at the end.

        Raises
        ------
        ModelError
            The file has no template, or the template fails or refuses the messages.
        """
        if self._data.chat_template is None:
            raise ModelError("chat: the model file has no chat template; give a plain prompt")
        import jinja2.sandbox

        def refuse(message: str) -> None:
            raise jinja2.TemplateError(message)

        def text(token_id: int | None) -> str:
            return "" if token_id is None else self._data.tokens[token_id]

        # The template comes with the weights, so it is somebody else's program: the sandbox keeps it to text.
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self._data.chat_template).render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                bos_token=text(self._data.bos_id),
                eos_token=text(self._data.eos_id),
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"chat: the template in the model file failed: {error}") from error


class StreamDecoder:
    """Turns a growing list of token ids into text, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, possibly empty."""
        if self._skip_special and token_id in self._tokenizer.special_ids:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """What is left: U+FFFD where the ids ended within a character."""
        return self._utf8.decode(b"", final=True)
