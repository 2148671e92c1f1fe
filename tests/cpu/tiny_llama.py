"""A random Llama of a few thousand weights in a GGUF file, and the same model computed without fi_cupy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

#: GPT-2's alphabet of bytes, written out anew here.
BYTES = [chr(b) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255 else None for b in range(256)]
BYTES = [c or chr(256 + sum(x is None for x in BYTES[:b])) for b, c in enumerate(BYTES)]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or"]
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass
class TinyLlama:
    """Weights as llama.cpp stores them: query and key rows of a head in the order of an interleaved rotation."""

    layers: int = 2
    hidden: int = 64
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    ffn: int = 96
    context: int = 64
    theta: float = 1000.0
    eps: float = 1e-5
    tied: bool = True
    seed: int = 0
    rope_factors: np.ndarray | None = None
    tensors: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.tokens = SPECIAL + BYTES + [merge.replace(" ", "") for merge in MERGES]

        def add(name: str, *shape: int, scale: float = 0.25) -> None:
            self.tensors[name] = (rng.standard_normal(shape) * scale).astype(np.float32)

        qo, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        add("token_embd.weight", len(self.tokens), self.hidden, scale=1.0)
        for i in range(self.layers):
            add(f"blk.{i}.attn_q.weight", qo, self.hidden)
            add(f"blk.{i}.attn_k.weight", kv, self.hidden)
            add(f"blk.{i}.attn_v.weight", kv, self.hidden)
            add(f"blk.{i}.attn_output.weight", self.hidden, qo)
            add(f"blk.{i}.ffn_gate.weight", self.ffn, self.hidden)
            add(f"blk.{i}.ffn_up.weight", self.ffn, self.hidden)
            add(f"blk.{i}.ffn_down.weight", self.hidden, self.ffn)
            add(f"blk.{i}.attn_norm.weight", self.hidden)
            add(f"blk.{i}.ffn_norm.weight", self.hidden)
        add("output_norm.weight", self.hidden)
        if not self.tied:
            add("output.weight", len(self.tokens), self.hidden)
        for name in self.tensors:
            if name.endswith("norm.weight"):
                self.tensors[name] += 1
        if self.rope_factors is not None:
            self.tensors["rope_freqs.weight"] = self.rope_factors.astype(np.float32)

    def write(self, path: Path, *, arch: str = "llama", metadata: dict[str, Any] | None = None) -> Path:
        """Write the GGUF file. `metadata` replaces fields; None leaves one out."""
        import gguf

        fields: dict[str, Any] = {
            "block_count": self.layers,
            "context_length": self.context,
            "embedding_length": self.hidden,
            "feed_forward_length": self.ffn,
            "attention.head_count": self.heads,
            "attention.head_count_kv": self.kv_heads,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "rope.freq_base": self.theta,
            "attention.layer_norm_rms_epsilon": self.eps,
        }
        fields = {f"{arch}.{key}": value for key, value in fields.items()}
        fields |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": self.tokens,
            "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(self.tokens) - len(SPECIAL)),
            "tokenizer.ggml.merges": MERGES,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.chat_template": CHAT,
        }
        writer = gguf.GGUFWriter(path, arch)
        for key, value in (fields | (metadata or {})).items():
            if value is None:
                continue
            if isinstance(value, str):
                writer.add_string(key, value)
            elif isinstance(value, list):
                writer.add_array(key, value)
            elif isinstance(value, bool):
                writer.add_bool(key, value)
            elif isinstance(value, float):
                writer.add_float32(key, value)
            else:
                writer.add_uint32(key, value)
        for name, data in self.tensors.items():
            writer.add_tensor(name, data)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def logits(self, ids: list[int], cached: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> np.ndarray:
        """``[len(ids), vocab]`` in float64: no pages, loops over heads, the rotation on neighbours.

        `cached` is what becomes of keys and values in a cache: a rounding.
        """
        w = {name: data.astype(np.float64) for name, data in self.tensors.items()}
        n, d = len(ids), self.head_dim
        frequency = self.theta ** (-np.arange(0, d, 2) / d)
        if self.rope_factors is not None:
            frequency = frequency / self.rope_factors
        turn = np.exp(1j * np.arange(n)[:, None] * frequency)

        def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps) * weight

        def rotate(x: np.ndarray) -> np.ndarray:
            y = (x[:, 0::2] + 1j * x[:, 1::2]) * turn
            return np.stack([y.real, y.imag], axis=-1).reshape(n, d)

        x = w["token_embd.weight"][ids]
        for i in range(self.layers):
            h = rms(x, w[f"blk.{i}.attn_norm.weight"])
            q, k, v = (h @ w[f"blk.{i}.attn_{part}.weight"].T for part in "qkv")
            heads = []
            for head in range(self.heads):
                group = head // (self.heads // self.kv_heads)
                qh = rotate(q[:, head * d : (head + 1) * d])
                kh = cached(rotate(k[:, group * d : (group + 1) * d]))
                score = np.where(np.tri(n, dtype=bool), qh @ kh.T / np.sqrt(d), -np.inf)
                p = np.exp(score - score.max(-1, keepdims=True))
                heads.append(p / p.sum(-1, keepdims=True) @ cached(v[:, group * d : (group + 1) * d]))
            x = x + np.concatenate(heads, axis=1) @ w[f"blk.{i}.attn_output.weight"].T
            h = rms(x, w[f"blk.{i}.ffn_norm.weight"])
            gate, up = h @ w[f"blk.{i}.ffn_gate.weight"].T, h @ w[f"blk.{i}.ffn_up.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"blk.{i}.ffn_down.weight"].T
        return rms(x, w["output_norm.weight"]) @ w.get("output.weight", w["token_embd.weight"]).T

    def greedy(self, ids: list[int], count: int) -> list[int]:
        """`count` likeliest continuations, each from a pass over the whole text so far."""
        text = list(ids)
        for _ in range(count):
            text.append(int(self.logits(text)[-1].argmax()))
        return text[len(ids) :]
