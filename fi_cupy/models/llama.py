"""The Llama forward pass on fi_cupy's operators, the same code for CPU and GPU arrays.

One pass takes a list of tokens that may belong to many requests (a prompt's tokens, or one token of each request),
adds their keys and values to the paged cache, and leaves the last hidden states. Every intermediate has its place in
a `Workspace`, so that a pass allocates nothing and can be recorded in a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fi_cupy import gemm, lookup, norm, rope
from fi_cupy.gemm.dense import takes_rms
from fi_cupy.models.backend import NumpyBackend
from fi_cupy.models.loader import GGUFModel, LlamaConfig

Array = Any


def padded_vocab(size: int) -> int:
    """Columns of the output projection: a multiple of 8, as the matrix product wants."""
    return -(-size // 8) * 8


@dataclass(frozen=True)
class Layer:
    """One block's weights on the device; a projection is the transposed view ``[in, out]`` of ``[out, in]`` memory.

    The weights of the two norms are in `qkv` and `gate_up`, whose inputs they would multiply.
    """

    qkv: Array
    attn_output: Array
    gate_up: Array
    down: Array


@dataclass(frozen=True)
class Batch:
    """The tokens of one pass, and where their keys and values go.

    `kv_indptr` and `kv_indices` name the pages *after* this pass, as `fi_cupy.page.append_paged_kv_cache` wants it, and
    `cache_positions` count from the first of them: less than `positions` by what a cascade has on its first level.
    A batch index of -1 marks a row of padding.
    """

    tokens: Array  # [n] int32
    positions: Array  # [n] int32
    cache_positions: Array  # [n] int32
    batch_indices: Array  # [n] int32
    kv_indptr: Array
    kv_indices: Array
    attention: Any  # a planned decode, cascade or prefill wrapper


class Workspace:
    """Memory for the intermediates of a pass over at most `rows` tokens."""

    def __init__(self, backend: NumpyBackend, config: LlamaConfig, rows: int) -> None:
        c = config
        self.rows = rows
        self.residual = backend.empty((rows, c.hidden_size))
        self.hidden = backend.empty((rows, c.hidden_size))
        self.qkv = backend.empty((rows, c.qkv_size))
        self.attention = backend.empty((rows, c.num_qo_heads, c.head_dim))
        self.activation = backend.empty((rows, c.intermediate_size))

    def first(self, rows: int) -> Workspace:
        """The same memory, for a pass over `rows` tokens."""
        view = object.__new__(Workspace)
        view.rows = rows
        for name, array in vars(self).items():
            if name != "rows":
                setattr(view, name, array[:rows])
        return view


class Llama:
    """A Llama model on one device.

    Parameters
    ----------
    config : LlamaConfig
    backend : NumpyBackend
    embedding : [vocab_size, hidden_size]
    layers : list of Layer
    output_norm : [hidden_size]
    lm_head : [hidden_size, padded_vocab_size]
        Transposed view; columns past the vocabulary are ignored.

    Examples
    --------
    >>> model = Llama.load(GGUFModel(path), NumpyBackend())     # doctest: +SKIP
    """

    def __init__(
        self,
        config: LlamaConfig,
        backend: NumpyBackend,
        embedding: Array,
        layers: list[Layer],
        output_norm: Array,
        lm_head: Array,
    ) -> None:
        self.config = config
        self.backend = backend
        self.layers = layers
        self.output_norm = output_norm
        self.lm_head = lm_head
        self._embedding = embedding
        self._cos_sin = self._cos_sin_cache()
        self._ones = backend.weight(np.ones(config.hidden_size, np.float32))

    @classmethod
    def load(cls, gguf: GGUFModel, backend: NumpyBackend) -> Llama:
        """Dequantise the weights of a GGUF file and put them on the backend's device, one layer at a time."""

        def projection(values: Any) -> Array:
            return backend.weight(values).T

        with backend.active():
            layers = []
            for i in range(gguf.config.num_layers):
                w = gguf.layer(i)
                layers.append(
                    Layer(
                        qkv=projection(w.qkv * w.attn_norm),
                        attn_output=projection(w.attn_output),
                        gate_up=projection(w.gate_up * w.ffn_norm),
                        down=projection(w.down),
                    )
                )
            embedding = backend.weight(gguf.embedding())
            head = gguf.lm_head()
            vocab = gguf.config.vocab_size
            if head is None and padded_vocab(vocab) == vocab:
                lm_head = embedding.T
            else:
                rows = gguf.embedding() if head is None else head
                lm_head = projection(np.pad(rows, ((0, padded_vocab(vocab) - vocab), (0, 0))))
            model = cls(gguf.config, backend, embedding, layers, backend.weight(gguf.output_norm()), lm_head)
            backend.synchronize()
        return model

    def _cos_sin_cache(self) -> Array:
        """Cosines and sines of every position, ``[context_length, head_dim]`` float32."""
        c = self.config
        frequencies = c.rope_theta ** (-np.arange(0, c.head_dim, 2) / c.head_dim)
        if c.rope_factors is not None:
            frequencies = frequencies / np.array(c.rope_factors)
        angles = np.arange(c.context_length)[:, None] / c.rope_scale * frequencies
        return self.backend.array(np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))

    def gather_rows(self, source: Array, rows: Array, out: Array) -> None:
        """``out[i] = source[rows[i]]``."""
        lookup.gather_rows(source, rows, out=out, enable_pdl=self.backend.pdl)

    def forward(self, batch: Batch, kv_cache: list[tuple[Array, Array]], ws: Workspace) -> Array:
        """Run every layer over the tokens of `batch`.

        Parameters
        ----------
        batch : Batch
        kv_cache : list of (k, v)
            For each layer a pair of ``[num_pages, page_size, num_kv_heads, head_dim]``; written.
        ws : Workspace
            Of ``len(batch.tokens)`` rows; overwritten.

        Returns
        -------
        Array
            ``[n, hidden_size]``: the normalised last hidden states, in `ws`.
        """
        c = self.config
        n, qo, kv, d = ws.rows, c.num_qo_heads, c.num_kv_heads, c.head_dim
        pdl, eps = self.backend.pdl, c.rms_norm_eps
        q, k, v = (
            ws.qkv[:, start * d : (start + heads) * d].reshape(n, heads, d)
            for start, heads in ((0, qo), (qo, kv), (qo + kv, kv))
        )
        attention = ws.attention.reshape(n, qo * d)
        residual, x = ws.residual, ws.hidden
        self.gather_rows(self._embedding, batch.tokens, residual)
        # Products of few rows normalise their input and add to the residual themselves; to those of many rows the norm
        # comes normalised, by a kernel that adds, too.
        few = takes_rms(residual)
        source, norm_eps, added = (residual, eps, residual) if few else (x, None, None)
        if not few:
            norm.rmsnorm(residual, self._ones, eps, out=x, enable_pdl=pdl)
        for layer, cache in zip(self.layers, kv_cache, strict=True):
            gemm.mm_bf16(source, layer.qkv, pdl=pdl, out=ws.qkv, rms_eps=norm_eps)
            # The tables were on the device before the pass began, so they may be read ahead of the projection's end.
            rope.rope_append_paged_kv_cache(
                q, k, None, None, v, self._cos_sin, batch.positions, cache, batch.kv_indices, batch.kv_indptr,
                batch.batch_indices, batch.cache_positions, page_size=cache[0].shape[1], q_rope_out=q, enable_pdl=pdl,
            )  # fmt: skip
            batch.attention.run(q, cache, out=ws.attention)
            gemm.mm_bf16(attention, layer.attn_output, pdl=pdl, out=source, residual=added)
            if not few:
                norm.fused_add_rmsnorm(x, residual, self._ones, eps, enable_pdl=pdl)
            gemm.mm_bf16_swiglu(source, layer.gate_up, pdl=pdl, out=ws.activation, rms_eps=norm_eps)
            gemm.mm_bf16(ws.activation, layer.down, pdl=pdl, out=source, residual=added)
            if not few and layer is not self.layers[-1]:
                norm.fused_add_rmsnorm(x, residual, self._ones, eps, enable_pdl=pdl)
        if few:
            norm.rmsnorm(residual, self.output_norm, eps, out=x, enable_pdl=pdl)
        else:
            norm.fused_add_rmsnorm(x, residual, self.output_norm, eps, enable_pdl=pdl)
        return x

    def logits(self, hidden: Array, out: Array) -> Array:
        """Logits in float32, since bf16 would make ties of near neighbours.

        Parameters
        ----------
        hidden : [rows, hidden_size]
        out : [rows, padded_vocab_size] float32
            Overwritten.

        Returns
        -------
        Array
            ``[rows, vocab_size]``, in `out`.
        """
        return gemm.mm_bf16(hidden, self.lm_head, pdl=self.backend.pdl, out=out)[:, : self.config.vocab_size]
