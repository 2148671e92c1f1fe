"""FlashInfer's form of variants: its fa2 structs compile as they are, and what cannot work is refused with a reason."""

from __future__ import annotations

import numpy as np
import pytest

import fi_cupy
from fi_cupy.arrays import view
from fi_cupy.customize import (
    FlashInferVariant,
    gen_customize_batch_decode_module,
    gen_customize_batch_prefill_module,
    gen_customize_single_decode_module,
    gen_customize_single_prefill_module,
    single_prefill_with_kv_cache_with_jit_module,
)
from fi_cupy.errors import ArgumentError, CompileError, UnsupportedError
from fi_cupy.plan.prefill import choose_tiles
from fi_cupy.prefill_kernel import prefill_spec
from fi_cupy.utils import MaskMode

HEAD = """
  uint32_t window_left, qo_len, kv_len;
  float sm_scale_log2;

  template <typename Params>
  __device__ __host__ {name}(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {{
    qo_len = params.get_qo_len(batch_idx);
    kv_len = params.get_kv_len(batch_idx);
    window_left = (params.window_left >= 0) ? params.window_left : kv_len;
    sm_scale_log2 = params.sm_scale * math::log2e;
  }}
"""
SIGMOID = """
struct Sigmoid : AttentionVariantBase {
  static constexpr bool use_softmax = false;
  float scale, bias;

  template <typename Params>
  __device__ __host__ Sigmoid(const Params& params, uint32_t batch_idx, uint8_t* smem_ptr) {
    scale = params.logits_scale * math::log2e;
    bias = params.sigmoid_bias * math::log2e;
  }

  REGISTER_LOGITS_TRANSFORM(params, logits, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    return math::ptx_rcp(1.f + math::ptx_exp2(-float(logits * scale + bias)));
  });

  REGISTER_OUTPUT_TRANSFORM(params, output, batch_idx, qo_idx, qo_head_idx, m, d, scale, {
    return output;
  })
};
"""
MASKED = (
    "struct Masked : AttentionVariantBase {"
    + HEAD.format(name="Masked")
    + """
  REGISTER_LOGITS_MASK(params, batch_idx, qo_idx, kv_idx, qo_head_idx, kv_head_idx, {
    return (params.bits[kv_idx / 8] >> (kv_idx % 8)) & 1;
  })
};
"""
)
SINK = (
    "struct Sink : AttentionVariantBase {"
    + HEAD.format(name="Sink")
    + """
  REGISTER_M_D_UPDATE(params, kv_tile_idx, qo_head_idx, m, d, scale, {
    float log_sink = kv_tile_idx == 0 ? params.sink[qo_head_idx] * math::log2e : -math::inf;
    float m_new = (log_sink > m) ? log_sink : m;
    scale = math::ptx_exp2(m - m_new);
    d = math::ptx_exp2(log_sink - m_new) + d * scale;
    m = m_new;
  })
  REGISTER_OUTPUT_TRANSFORM(params, output, batch_idx, qo_idx, qo_head_idx, m, d, scale, {
    return output * scale * ((m != -math::inf) ? math::ptx_rcp(d) : 0.f);
  });
};
"""
)


def _module(name, text, tensors=(), types=(), scalars=(), **options):
    return gen_customize_single_prefill_module(
        "fa2", f"uri.{name}", "float16", "float16", "float16", 64, 64, list(tensors), list(types), list(scalars),
        ["double"] * len(scalars), name, text, **options,
    ).build_and_load()  # fmt: skip


CASES = {
    "Sigmoid": (SIGMOID, [], [], ["logits_scale", "sigmoid_bias"]),
    "Masked": (MASKED, ["bits"], ["uint8_t"], ["sm_scale"]),
    "Sink": (SINK, ["sink"], ["float"], ["sm_scale"]),
}


def _compile(variant, arch):
    from fi_cupy.jit.build import job_for
    from fi_cupy.jit.compiler import compile_job

    tiles = choose_tiles(16, 64, 64, 65536, 65536)
    spec = prefill_spec(fi_cupy.dtypes.float16, 64, 64, tiles, paged=True)
    return compile_job(job_for(variant.lowered().specialise(spec, False, False), arch))


@pytest.mark.parametrize("arch", ["75", "90a"])
@pytest.mark.parametrize("name", CASES)
def test_fa2_structs_compile(name, arch):
    pytest.importorskip("cupy")
    assert _compile(_module(name, *CASES[name]), arch).code


def test_errors_point_into_the_text():
    pytest.importorskip("cupy")
    line = SIGMOID.split("\n").index(next(x for x in SIGMOID.split("\n") if "sigmoid_bias" in x)) + 1
    with pytest.raises(CompileError, match=rf'variant:uri_Sigmoid:{line}: .*"sigmoid_bios"'):
        _compile(_module("Sigmoid", SIGMOID.replace("sigmoid_bias", "sigmoid_bios"), *CASES["Sigmoid"][1:]), "80")


def test_what_the_text_says_decides():
    modules = {name: _module(name, *case).lowered() for name, case in CASES.items()}
    assert [m.use_softmax for m in modules.values()] == [False, True, True]
    assert [m.splittable for m in modules.values()] == [False, True, False]
    assert modules["Masked"].fields() == [("user.bits", "ptr"), ("user.sm_scale", "f32")]
    assert modules["Masked"].stages == {"mask"} and modules["Sink"].stages == {"output"}


def test_members_have_no_padding_between():
    variant = FlashInferVariant(
        "x", "X", "", (("a", "float"), ("maybe_b", "uint8_t")), (("n", "int32_t"), ("m", "int64_t"), ("s", "double"))
    )
    assert [kind for _, kind in variant.lowered().fields()] == ["ptr", "ptr", "i64", "i32", "f32"]


@pytest.mark.parametrize(
    "text", ["struct X { GetAttentionUpdater<1> u; };", "struct X { int x = params.additional_params.scale; };"]
)
def test_fa3_text_is_refused(text):
    with pytest.raises(UnsupportedError, match="the form of FlashInfer's fa3 kernels; pass the fa2 form"):
        _module("X", text)
    with pytest.raises(UnsupportedError, match="backend='fa3'"):
        gen_customize_single_prefill_module(
            "fa3", "u", "float16", "float16", "float16", 64, 64, [], [], [], [], "X", "struct X {};"
        )


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [({"pos_encoding_mode": 1}, UnsupportedError, "pos_encoding_mode"), ({"fp8_enabled": True}, UnsupportedError, "_"),
     ({"types": ["float", "float"]}, ArgumentError, "1 names and 2 types"),
     ({"types": ["float4"]}, ArgumentError, "float4 a is no argument"), ({"tensors": ["a b"]}, ArgumentError, "a b")],
)  # fmt: skip
def test_arguments_are_checked(change, error, text):
    options = {"tensors": ["a"], "types": ["float"], **change}
    with pytest.raises(error, match=text):
        _module("X", "struct X {};", **options)
    with pytest.raises(UnsupportedError, match="query and key transforms"):
        _module("X", "struct X { REGISTER_QUERY_TRANSFORM(params, q, { return q; }) };")
    with pytest.raises(UnsupportedError, match="dtype_q, dtype_kv and dtype_o differ"):
        gen_customize_single_decode_module("u", "float16", "bfloat16", "float16", 64, 64, [], [], [], [], "X", "")


def test_every_generator_makes_the_same_module():
    rest = (64, 64, [], [], ["logits_scale", "sigmoid_bias"], ["double", "double"], "Sigmoid", SIGMOID)
    types = ("u", "float16", "float16", "float16")
    modules = {
        gen_customize_single_prefill_module("fa2", *types, *rest),
        gen_customize_batch_prefill_module("fa2", *types, "int32", *rest),
        gen_customize_single_decode_module(*types, *rest),
        fi_cupy.jit.gen_customize_batch_decode_module(*types, "int32", *rest),
    }
    assert len(modules) == 1 and gen_customize_batch_decode_module(*types, "int32", *rest) in modules


def test_the_cpu_cannot_run_them():
    q = np.ones((4, 2, 64), np.float32)
    with pytest.raises(UnsupportedError, match="CUDA text"):
        single_prefill_with_kv_cache_with_jit_module(_module("Sigmoid", *CASES["Sigmoid"]), q, q, q, 0.1, 0.2)
    jit_args = ("u", "float16", "float16", "float16", "int32", 64, 64, [], [], [], [], "Sigmoid", SIGMOID)
    wrapper = fi_cupy.prefill.BatchPrefillWithRaggedKVCacheWrapper(np.empty(4096, np.uint8), jit_args=jit_args)
    wrapper.plan([0, 4], [0, 4], 2, 2, 64, q_data_type="float32")
    with pytest.raises(UnsupportedError, match="CUDA text"):
        wrapper.run(q, q, q, 0.1, 0.2)


def test_a_python_variant_is_a_module_as_well():
    q = np.random.default_rng(0).normal(size=(4, 2, 64)).astype(np.float32)
    variant = fi_cupy.jit.define_variant(name="scaled", score_fn=lambda s, ctx: s * ctx.x, scalars=["x"])
    out = single_prefill_with_kv_cache_with_jit_module(variant, q, q, q, 2.0, mask_mode=1)
    wanted = fi_cupy.prefill.single_prefill_with_kv_cache(q, q, q, causal=True, sm_scale=2.0 / 8)
    np.testing.assert_allclose(out, wanted, rtol=1e-5)
    named = single_prefill_with_kv_cache_with_jit_module(variant, q, q, q, 2.0, mask_mode=MaskMode.CAUSAL)
    np.testing.assert_array_equal(named, out)


@pytest.mark.parametrize("mode", [MaskMode.MULTIITEMSCORING, 4, -1, "causal"])
def test_a_mask_mode_that_no_kernel_has_is_refused(mode):
    q = np.ones((4, 2, 64), np.float32)
    variant = fi_cupy.jit.define_variant(name="plain")
    with pytest.raises(ArgumentError, match=r"mask_mode is .*expected 0"):
        single_prefill_with_kv_cache_with_jit_module(variant, q, q, q, mask_mode=mode)


@pytest.mark.parametrize("arch", ["75", "90a"])
def test_attention_sinks_in_flashinfers_form(arch):
    pytest.importorskip("cupy")
    types = ("float16", "float16", "float16", "int32", 64, 64)
    module = fi_cupy.jit.attention.gen_batch_prefill_attention_sink_module("fa2", *types, 0, True)
    assert module == fi_cupy.jit.gen_batch_prefill_attention_sink_module("auto", *types)
    text = fi_cupy.jit.attention.variants.attention_sink_decl["fa2"]
    assert module.text == text and (module.tensors, module.scalars) == ((("sink", "float"),), (("sm_scale", "double"),))
    assert _compile(module, arch).code
    for call in (
        lambda: fi_cupy.jit.attention.variants.attention_sink_decl["fa3"],
        lambda: fi_cupy.jit.attention.gen_batch_prefill_attention_sink_module("fa3", *types),
    ):
        with pytest.raises(UnsupportedError, match="backend is 'fa3', expected 'fa2'"):
            call()
    with pytest.raises(UnsupportedError, match="pos_encoding_mode"):
        fi_cupy.jit.attention.gen_batch_prefill_attention_sink_module("fa2", *types, 2)


def written(name, text, scalars):
    return FlashInferVariant(name, name, text, (), tuple((scalar, "double") for scalar in scalars))


def on_gpu():
    """Queries as a view that says to be on a GPU: binding looks at nothing else."""
    x = view(np.zeros((4, 2, 64), np.float16))
    x.device = 0
    return x


def test_named_arguments_are_checked():
    variant = written("Scaled", "float x = params.sm_scale;", scalars=("sm_scale", "bias"))
    assert variant.bind("op", (0.5, 2.0), {}, on_gpu()).kernel_values() == (0.5, 2.0)
    assert variant.bind("op", (0.5,), {}, on_gpu(), sm_scale=9.0).kernel_values() == (9.0, 0.5)
    with pytest.raises(ArgumentError, match=r"op: variant .*: bais is unknown; it takes sm_scale, bias"):
        variant.bind("op", (0.5, 2.0), {"bais": 3.0}, on_gpu())
    with pytest.raises(ArgumentError, match="bias is given twice"):
        variant.bind("op", (0.5, 2.0), {"bias": 3.0}, on_gpu())


def test_scales_as_numbers_reach_the_text():
    own = written("Own", "float x = params.sm_scale;", scalars=("sm_scale",))
    assert own.bind("op", (0.5,), {}, on_gpu(), logit_scale=4.0).kernel_values() == (2.0,)
    planned = written("Planned", "float x = params.sm_scale;", scalars=())
    assert planned.bind("op", (), {}, on_gpu(), logit_scale=4.0).kernel_values() == ()
    other = written("Other", "float x = params.logits_scale;", scalars=("logits_scale",))
    with pytest.raises(UnsupportedError, match=r"does not read params.sm_scale, .* pass them as arrays"):
        other.bind("op", (0.5,), {}, on_gpu(), logit_scale=4.0)
