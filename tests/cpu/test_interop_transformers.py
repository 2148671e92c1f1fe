"""attn_implementation="fi_cupy" against transformers' own attention, on tiny random models."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import errors

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
ours = pytest.importorskip("fi_cupy.interop.transformers")

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
#: (configuration, further sizes, what to compare with).
MODELS = {
    "llama": ("LlamaConfig", {}, "sdpa"),
    "mistral": ("MistralConfig", {"sliding_window": 5}, "sdpa"),
    "gemma2": (
        "Gemma2Config",
        {
            "sliding_window": 6,
            "attn_logit_softcapping": 5.0,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": None,
        },
        "eager",  # sdpa knows no soft cap
    ),
}


@pytest.fixture(scope="module", params=list(MODELS))
def models(request):
    """(model with fi_cupy, the same with transformers' attention)."""
    name, sizes, other = MODELS[request.param]
    ours.register()
    torch.manual_seed(0)
    made = []
    for attention in ("fi_cupy", other):
        config = getattr(transformers, name)(**{**SIZES, **sizes})
        made.append(transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval())
    made[1].load_state_dict(made[0].state_dict())
    assert made[0].config._attn_implementation == "fi_cupy"
    return made


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def tokens(*shape):
    return torch.from_numpy(np.random.default_rng(1).integers(2, 96, shape))


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_logits_of_a_batch(models):
    ids = tokens(2, 11)
    got, want = (m(ids).logits for m in models)
    close(got, want)


def test_logits_with_left_padding(models):
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :4] = 0
    got, want = (m(ids, attention_mask=mask).logits for m in models)
    close(got[0, 4:], want[0, 4:])
    close(got[1], want[1])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation(models, cache):
    ids = tokens(2, 7)
    options = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    if cache == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    got, want = (m.generate(ids, attention_mask=torch.ones_like(ids), **options) for m in models)
    assert torch.equal(got.sequences, want.sequences)
    close(torch.stack(got.logits), torch.stack(want.logits))


def test_one_plan_a_step_and_kind_of_layer(models, monkeypatch):
    plans = []
    real = ours._Planned.plan

    def plan(self, *args):
        before = self._sizes
        real(self, *args)
        plans.append(self._sizes is not before)

    monkeypatch.setattr(ours._Planned, "plan", plan)
    ours._planned.clear()
    models[0](tokens(1, 13))
    kinds = len({w.kind for w in ours._planned.values()})
    assert sum(plans) == kinds <= len(plans) == 2


def test_what_is_refused(models):
    layer = models[0].model.layers[0].self_attn
    q = torch.ones(1, 4, 3, 16)
    with pytest.raises(errors.UnsupportedError, match="output_attentions is on"):
        ours.attention_forward(layer, q, q, q, output_attentions=True)
    with pytest.raises(errors.ArgumentError, match=r"attention_mask has shape \(1, 4, 3, 3\)"):
        ours.attention_forward(layer, q, q, q, torch.ones(1, 4, 3, 3, dtype=torch.bool))
    with pytest.raises(errors.UnsupportedError, match="position_bias is given"):
        ours.attention_forward(layer, q, q, q, position_bias=q)
    with torch.enable_grad(), pytest.raises(errors.UnsupportedError, match="has no derivative"):
        models[0](tokens(1, 5)).logits.sum().backward()
