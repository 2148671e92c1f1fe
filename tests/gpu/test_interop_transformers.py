"""attn_implementation="fi_cupy" on the GPU against transformers' own attention, in bf16."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not torch.cuda.is_available():
    pytest.skip("torch has no CUDA", allow_module_level=True)
ours = pytest.importorskip("fi_cupy.interop.transformers")

SIZES = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 1024, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": ("LlamaConfig", {}, "sdpa"),
    "mistral": ("MistralConfig", {"sliding_window": 40}, "sdpa"),
    "gemma2": (
        "Gemma2Config",
        {"sliding_window": 50, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 64, "head_dim": 128},
        "eager",
    ),
}


@pytest.fixture(scope="module", params=list(MODELS))
def models(request):
    """Models with fi_cupy and with transformers' attention, and the latter in float32."""
    name, sizes, other = MODELS[request.param]
    ours.register()
    torch.manual_seed(0)
    made = []
    for attention, dtype in (("fi_cupy", torch.bfloat16), (other, torch.bfloat16), (other, torch.float32)):
        config = getattr(transformers, name)(**{**SIZES, **sizes})
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        made.append(model.eval().to("cuda"))
        made[-1].load_state_dict(made[0].state_dict())
        made[-1].to(dtype)
    return made


@pytest.fixture(autouse=True)
def inference():
    with torch.no_grad():
        yield


def tokens(*shape):
    return torch.from_numpy(np.random.default_rng(1).integers(2, 512, shape)).cuda()


def distance(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def no_worse(got, want, exact):
    """Both bf16 models are as far from the float32 model, up to a factor."""
    ours_, theirs = distance(got, exact), distance(want, exact)
    assert ours_ < 1.5 * theirs + 1e-3, f"{ours_} from float32, transformers' own {theirs}"


@pytest.mark.parametrize("shape", [(1, 1), (2, 11), (3, 300)])
def test_logits(models, shape):
    no_worse(*(m(tokens(*shape)).logits for m in models))


def test_left_padding(models):
    ids, mask = tokens(3, 129), torch.ones(3, 129, dtype=torch.long, device="cuda")
    mask[0, :60] = 0
    mask[1, :1] = 0
    no_worse(*(m(ids, attention_mask=mask).logits[mask.bool()] for m in models))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_steps_with_a_cache(models, cache):
    """Teacher-forced decoding: the same tokens for all models, so that rounding cannot send them apart."""
    ids, logits = tokens(2, 72), []
    for m in models:
        past = (
            transformers.DynamicCache(config=m.config) if cache == "dynamic"
            else transformers.StaticCache(config=m.config, max_cache_len=128)
        )  # fmt: skip
        first = m(ids[:, :60], past_key_values=past, cache_position=torch.arange(60, device="cuda")).logits
        steps = [first[:, -1]]
        for i in range(60, 72):
            at = torch.tensor([i], device="cuda")
            steps.append(m(ids[:, i : i + 1], past_key_values=past, cache_position=at).logits[:, -1])
        logits.append(torch.stack(steps))
    no_worse(*logits)


def test_generate(models):
    ids = tokens(2, 30)
    got = models[0].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert got.shape == (2, 50) and torch.equal(got[:, :30], ids)


def test_compiled_static_generation(models):
    """generate() compiles the step for a static cache; planning stays outside of the graphs."""
    if models[0].config.model_type != "llama":
        pytest.skip("compiling is slow, and the same for all")
    ids = tokens(2, 30)
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    plain = models[0].generate(ids, **options)
    static = models[0].generate(ids, cache_implementation="static", **options)
    assert (static == plain).float().mean() > 0.9
