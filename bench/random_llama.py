"""A Llama of SmolLM2-135M's sizes with random weights on the GPU: the speed of the real one without its file."""

from __future__ import annotations

from typing import Any

import numpy as np

from fi_cupy.models.backend import NumpyBackend
from fi_cupy.models.llama import Layer, Llama
from fi_cupy.models.loader import LlamaConfig

SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=30, num_qo_heads=9, num_kv_heads=3,
    head_dim=64, context_length=8192, rms_norm_eps=1e-5, rope_theta=100000.0, name="random SmolLM2-135M",
)  # fmt: skip


def random_llama(backend: NumpyBackend, config: LlamaConfig = SMOLLM2, *, logit_scale: float = 3.0) -> Llama:
    """A model whose logits have about the deviation `logit_scale`, so that sampling has something to choose from."""
    c, rng = config, np.random.default_rng(0)

    def weight(rows: int, columns: int, scale: float) -> Any:
        return backend.weight(rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(scale))

    with backend.active():
        small = c.hidden_size**-0.5
        layers = [
            Layer(
                qkv=weight(c.qkv_size, c.hidden_size, small).T,
                attn_output=weight(c.hidden_size, c.num_qo_heads * c.head_dim, small).T,
                gate_up=weight(2 * c.intermediate_size, c.hidden_size, small).T,
                down=weight(c.hidden_size, c.intermediate_size, small).T,
            )
            for _ in range(c.num_layers)
        ]
        embedding = weight(c.vocab_size, c.hidden_size, logit_scale * small)
        norm = backend.weight(np.ones(c.hidden_size, np.float32))
        model = Llama(c, backend, embedding, layers, norm, embedding.T)
        backend.synchronize()
    return model
