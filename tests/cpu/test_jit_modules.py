"""Modules by name: which kernels they hold, building, the registry, CUDA files and activations of the caller's."""

from __future__ import annotations

import numpy as np
import pytest

import fi_cupy
from fi_cupy import activation, aot, errors, jit
from fi_cupy.cli import cli
from fi_cupy.jit.core import JitSpecRegistry
from fi_cupy.jit.modules import register_all
from fi_cupy.profiles import MODULES, family_specs

HALF = ("float16",) * 3
RELU2 = "__device__ float relu2(const float& x) { return x > 0.f ? x * x : 0.f; }"


@pytest.fixture
def cold(tmp_path, monkeypatch):
    """A cold cache of this test's own, and two targets."""
    for variable in ("FI_CUPY_NO_COMPILE", "FLASHINFER_DISABLE_JIT", "FI_CUPY_TARGET", "FLASHINFER_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("FI_CUPY_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("FI_CUPY_CUDA_ARCH_LIST", "8.0 9.0a")
    return tmp_path


def symbols(spec, arch):
    return {s.symbol for s in spec.kernels(arch)}


def test_names_are_flashinfers():
    assert jit.get_single_decode_uri(*HALF, 128, 128, 0, False, True) == (
        "single_decode_with_kv_cache_dtype_q_f16_dtype_kv_f16_dtype_o_f16_head_dim_qk_128_head_dim_vo_128_posenc_0_"
        "use_swa_False_use_logits_cap_True"
    )
    kinds = ("bfloat16", "float8_e4m3fn", np.float32, np.int32)
    assert jit.get_batch_prefill_uri("fa3", *kinds, 192, 128, 2, True, False, False) == (
        "batch_prefill_with_kv_cache_dtype_q_bf16_dtype_kv_e4m3_dtype_o_f32_dtype_idx_i32_head_dim_qk_192_head_dim_vo_"
        "128_posenc_2_use_swa_True_use_logits_cap_False_f16qk_False_sm90"
    )
    assert jit.get_batch_mla_uri("fa2", *HALF, "int32", 512, 64, False).endswith("head_dim_kpe_64_profiler_False")
    assert fi_cupy.jit.get_pod_uri(*HALF, 64, 0, False, False, False, "int32", 1, False, False).endswith("f16qk_False")
    for wrong, text in ((3, "pos_encoding_mode is 3"), ("fa9", "backend is 'fa9'")):
        mode, backend = (wrong, "fa2") if wrong == 3 else (0, wrong)
        with pytest.raises((errors.ArgumentError, errors.UnsupportedError), match=text):
            jit.get_single_prefill_uri(backend, *HALF, 64, 64, mode, False, False, False)


def test_attention_modules_hold_what_their_options_say():
    decode = jit.gen_batch_decode_module(*HALF, "int32", 128, 128)
    found = symbols(decode, "90a")
    assert found and all(s.startswith("batch_decode_f16_f16_f16_d128") or "decode" in s for s in found)
    assert symbols(jit.gen_batch_decode_module(*HALF, "int32", 128, 128, 0, False, True), "90a").isdisjoint(found)
    # Heads that the decode kernel does not take are the prefill kernel's.
    assert all(s.startswith("prefill_") for s in symbols(jit.gen_single_decode_module(*HALF, 192, 128), "80"))
    both = symbols(jit.gen_batch_prefill_module("auto", *HALF, "int32", 128, 128), "90a")
    hopper = symbols(jit.gen_batch_prefill_module("fa3", *HALF, "int32", 128, 128), "90a")
    portable = symbols(jit.gen_batch_prefill_module("fa2", *HALF, "int32", 128, 128), "90a")
    assert hopper and portable and both == hopper | portable
    assert all(s.startswith("prefill_hopper_") for s in hopper)
    assert not symbols(jit.gen_batch_prefill_module("fa3", *HALF, "int32", 128, 128), "80")
    assert {s.split("_")[0] for s in symbols(jit.gen_batch_mla_module("auto", *HALF, "int32", 512, 64), "90a")} == {
        "mla"
    }
    assert any(s.startswith("mixed_") for s in symbols(jit.gen_batch_attention_module(*HALF, "int32", 128, 128), "80"))
    pod = jit.gen_pod_module(*HALF, 128, 0, False, False, False, "int32", 0, False, False)
    assert all(s.startswith("mixed_") for s in symbols(pod, "90a"))
    rotated = jit.gen_pod_module(*HALF, 128, 1, False, False, False, "int32", 1, False, False)
    assert {s.split("_")[0] for s in symbols(rotated, "90a")} == {"prefill", "batch"}
    with pytest.raises(errors.ShapeError, match="head_dim"):
        jit.gen_batch_mla_module("fa2", *HALF, "int32", 256, 64).kernels("90a")
    with pytest.raises(errors.UnsupportedError, match="use_profiler"):
        jit.gen_batch_mla_module("fa2", *HALF, "int32", 512, 64, True)


@pytest.mark.parametrize(
    "module", ["norm", "page", "rope", "sampling", "quantization", "cascade", "topk", "gemm"]
)  # fmt: skip
def test_operators_modules_hold_the_canonical_kernels(module):
    spec = getattr(jit, f"gen_{module}_module")()
    assert list(spec.kernels("80")) == family_specs(module)


def test_building_and_the_registry(cold, capsys, monkeypatch):
    spec = jit.gen_act_and_mul_module("relu2", RELU2)
    assert not spec.is_compiled and not spec.get_library_path().exists()
    monkeypatch.setenv("FI_CUPY_NO_COMPILE", "1")
    with pytest.raises(jit.MissingJITCacheError, match="relu2_and_mul_user_bf16") as caught:
        spec.build()
    assert caught.value.spec is spec
    monkeypatch.delenv("FI_CUPY_NO_COMPILE")
    monkeypatch.setenv("FI_CUPY_CUDA_ARCH_LIST", "8.0")
    jit.build_jit_specs([spec], verbose=True)
    assert capsys.readouterr().out.count("relu2_and_mul_user_") == 5
    assert spec.is_compiled and spec.get_library_path().is_file() and spec.lock_path.parent.name == "locks"
    jit.build_jit_specs([spec], verbose=True)
    assert not capsys.readouterr().out  # nothing is compiled twice
    with pytest.raises(errors.CudaUnavailableError):  # there is no GPU to load it on
        spec.build_and_load()
    registry = JitSpecRegistry()
    for each in (spec, jit.gen_norm_module()):
        registry.register(each)
        registry.register(each)
    assert registry.get_stats() == {"total": 2, "compiled": 1, "not_compiled": 1}
    first, second = registry.get_all_statuses()
    assert (first.status, second.status) == ("Compiled", "Not Compiled") and second.library_path is None
    assert first.library_path == spec.get_library_path() and registry.get_spec_status("x") is None
    jit.clear_cache_dir()
    assert not spec.is_compiled
    with pytest.raises(errors.UnsupportedError, match="skip_prebuilt"):
        jit.build_jit_specs([spec], skip_prebuilt=False)
    assert aot.register_default_modules() == register_all() == len(MODULES)
    assert set(MODULES) <= set(jit.jit_spec_registry.get_all_specs())


def test_check_cuda_arch(cold, monkeypatch):
    jit.check_cuda_arch()
    monkeypatch.setenv("FI_CUPY_CUDA_ARCH_LIST", "7.0")
    with pytest.raises(errors.ArgumentError, match=r"'7\.0' is no architecture from 7\.5 on"):
        jit.check_cuda_arch()


SCALE = """
#include "factor.h"
#include "common/base.cuh"
extern "C" __global__ void scale(const float* x, float* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = FACTOR * x[i] + OFFSET;
}
"""


def test_cuda_files_of_the_callers(cold, monkeypatch):
    monkeypatch.setenv("FI_CUPY_CUDA_ARCH_LIST", "8.0")
    (cold / "inner").mkdir()
    (cold / "inner" / "factor.h").write_text('#include "value.h"\n#define FACTOR VALUE\n')
    (cold / "inner" / "value.h").write_text("#define VALUE 2.f\n")
    (cold / "scale.cu").write_text(SCALE)
    flags = ["-O3", "-use_fast_math", "-DOFFSET=1.f"]
    spec = jit.gen_jit_spec("mine", [cold / "scale.cu"], None, flags, extra_include_paths=[cold / "inner"])
    (job,) = spec.jobs("80")
    names = [name for name, _ in job.headers]
    assert {"factor.h", "value.h", "common/base.cuh"} <= set(names) and "--use_fast_math" in job.options
    spec.build()
    assert spec.is_compiled and b"scale" in spec.get_library_path().read_bytes()
    (cold / "inner" / "value.h").write_text("#define VALUE 3.f\n")
    assert not spec.is_compiled  # a header is part of the key
    (cold / "scale.cu").write_text(SCALE.replace("FACTOR * x[i]", "FACTOR * z[i]"))
    with pytest.raises(errors.CompileError, match=r"mine\.cu:6: error.*\"z\" is undefined"):
        spec.build()


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"name": "a b"}, errors.ArgumentError, "name is 'a b', expected an identifier"),
        ({"sources": []}, errors.ArgumentError, "no sources"),
        ({"sources": ["missing.cu"]}, errors.ArgumentError, r"there is no source .*missing\.cu"),
        ({"sources": ["binding.cc"]}, errors.UnsupportedError, "host code"),
        ({"extra_cflags": ["-O3"]}, errors.UnsupportedError, "extra_cflags"),
        ({"extra_ldflags": ["-lcublas"]}, errors.UnsupportedError, "extra_ldflags"),
        ({"needs_device_linking": True}, errors.UnsupportedError, "needs_device_linking"),
        ({"extra_cuda_cflags": ["-gencode=arch=compute_80,code=sm_80"]}, errors.ArgumentError, "the target is"),
    ],
)
def test_what_is_no_module(tmp_path, given, error, text):
    (tmp_path / "ok.cu").write_text(SCALE)
    with pytest.raises(error, match=text):
        jit.gen_jit_spec(**{"name": "ok", "sources": [tmp_path / "ok.cu"], **given})


def test_activations_of_the_callers(rng, cold, monkeypatch):
    op = activation.define_activation("relu2", RELU2, lambda x: np.maximum(x, 0) ** 2)
    x = rng.standard_normal((3, 5, 32), np.float32)
    want = np.maximum(x[..., :16], 0) ** 2 * x[..., 16:]
    np.testing.assert_allclose(op(x), want, rtol=1e-6)
    out = np.empty((3, 5, 16), np.float16)
    assert op(x.astype(np.float16), out=out) is out
    np.testing.assert_allclose(out, want, rtol=1e-2, atol=1e-2)
    assert op.__name__ == "relu2_and_mul"
    with pytest.raises(errors.UnsupportedError, match="give define_activation a reference"):
        activation.define_activation("relu2", RELU2)(x)
    for name, text, said in (("2x", RELU2, "identifier"), ("other", RELU2, "no function other")):
        with pytest.raises(errors.ArgumentError, match=said):
            activation.define_activation(name, text)
    monkeypatch.setenv("FI_CUPY_CUDA_ARCH_LIST", "8.0")
    with pytest.raises(errors.CompileError, match=r"activation:broken:2: error.*nothing"):
        jit.gen_act_and_mul_module("broken", "__device__ float broken(float x) {\n return nothing; }").build()
    with pytest.raises(errors.ArgumentError, match="'unknown' is none of silu, gelu, gelu_tanh"):
        jit.gen_act_and_mul_module("unknown")


def test_variants_are_compiled_from_a_file(cold, monkeypatch):
    from click.testing import CliRunner

    from fi_cupy.cli import _add_others
    from fi_cupy.jit import modules

    asked = []

    def first(*given):
        asked.append((given, all_of(*given)))
        return asked[-1][1][:1]  # one is enough to compile

    all_of = modules.variant_specs
    monkeypatch.setattr(modules, "variant_specs", first)
    _add_others()
    (cold / "mine.py").write_text(
        "from fi_cupy import jit\n"
        "halved = jit.define_variant(name='halved', mask_mode='causal', score_fn=lambda s, ctx: s * 0.5)\n"
    )
    done = CliRunner().invoke(cli, ["compile-variant", str(cold / "mine.py"), "--arch", "8.0", "--head-dim", "64"])
    assert done.exit_code == 0, done.output
    assert done.output.count("prefill_bf16_d64_") == 1 and "_v_halved" in done.output
    ((given, specs),) = asked
    assert given[1:] == ("80", "bfloat16", (64, 64), 4)
    assert {"paged" in s.symbol for s in specs} == {True, False} and len({s.symbol for s in specs}) >= 4
    missing = CliRunner().invoke(cli, ["compile-variant", str(cold / "mine.py"), "--name", "x", "--arch", "8.0"])
    assert isinstance(missing.exception, errors.ArgumentError) and "it makes halved" in str(missing.exception)
