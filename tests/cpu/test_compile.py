"""Every canonical kernel compiles for every architecture it claims, without a GPU and without unexplained spills."""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from pathlib import Path

import pytest
from kernel_jobs import ROOT, run_python

import fi_cupy
from fi_cupy.errors import ArgumentError, CompileError, GPUArchitectureError, MissingKernelError
from fi_cupy.jit.build import build, build_many, stats
from fi_cupy.jit.cache import CachedKernel
from fi_cupy.jit.cubin import _sections
from fi_cupy.jit.render import render
from fi_cupy.jit.sources import header_closure, kernel_root
from fi_cupy.jit.spec import ARCHS, KernelSpec, UserSource, arch_number
from fi_cupy.profiles import (
    LATENT_MODELS,
    MODELS,
    MODULES,
    all_specs,
    default_archs,
    family_specs,
    parse_archs,
    preload,
    profile_specs,
    profile_targets,
)

pytest.importorskip("cupy", reason="compiling needs CuPy's NVRTC binding")

#: Kept between runs: a key covers all that matters, so only what has changed is compiled again.
COMPILED = Path(os.environ.get("FI_CUPY_TEST_CACHE") or ROOT / "build" / "test-kernels")

#: Dynamic shared memory that one CTA can have, bytes (CUDA programming guide, compute capabilities).
SHARED_MEMORY = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}

#: Threads that one multiprocessor holds (CUDA programming guide, compute capabilities).
MULTIPROCESSOR_THREADS = {75: 1024, 80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048, 120: 1536}


#: Headers whose code differs between sm_86 and sm_89: those that convert and multiply fp8.
OF_SM89 = {"ptx/mma_fp8.cuh", "quantization/formats.cuh"}


def is_compiled_for(spec: KernelSpec, arch: str) -> bool:
    """Left out: kernels for sm_86 whose code is that for sm_89, which has the same registers and shared memory."""
    if arch != "86" or not spec.supports("89"):
        return spec.supports(arch)
    source = render(spec)
    return spec.supports(arch) and ("__nv_fp8" in source or not OF_SM89.isdisjoint(header_closure(source.encode())))


@pytest.fixture
def cold(tmp_path, monkeypatch) -> Path:
    """A cold cache of this test's own."""
    monkeypatch.setenv("FI_CUPY_CACHE_DIR", str(tmp_path / "cache"))
    for variable in ("FI_CUPY_NO_COMPILE", "FLASHINFER_DISABLE_JIT", "FI_CUPY_TARGET", "FI_CUPY_CUDA_ARCH_LIST"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path / "cache"


def bad_code(cubin: bytes, symbol: str) -> str:
    """What the machine code of an sm_90a kernel shows and no report says; empty if nothing.

    ptxas puts a wait behind each warpgroup product where registers are short (C7511, in a log that few read), and can
    make an illegal instruction of a cp.async with an L2 hint (kernels/ptx/cp_async_once.cuh).
    """
    products = waits = illegal = 0
    for code in _sections(cubin, b".text." + symbol.encode()):
        for word, _ in struct.iter_unpack("<2Q", code):
            opcode = word & 0xFFF
            products += opcode in (0x9F0, 0x9F3)  # HGMMA, QGMMA
            waits += opcode == 0x9C5 and word >> 47 & 1  # WARPGROUP.DEPBAR, not .ARRIVE
            illegal += opcode == 0xDAE  # LDGSTS [R + UR]; [R + immediate] is 0xFAE
    if illegal:
        return f"{illegal} copies (LDGSTS) that no sm_90 executes"
    if "_hopper" in symbol and waits >= products:  # none of either is wrong, too
        return f"{waits} waits for {products} warpgroup products"
    return ""


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("module", MODULES)
def test_every_kernel_compiles_without_spills(module, arch, monkeypatch, record_property):
    monkeypatch.setenv("FI_CUPY_CACHE_DIR", str(COMPILED))
    monkeypatch.delenv("FI_CUPY_NO_COMPILE", raising=False)
    specs = {spec.symbol: spec for spec in family_specs(module)}
    problems = []
    for job, outcome in build_many([(s, arch) for s in specs.values() if is_compiled_for(s, arch)], processes=1):
        if not isinstance(outcome, CachedKernel):
            problems.append(f"{outcome}\n{outcome.log[-2000:] if isinstance(outcome, CompileError) else ''}")
            continue
        meta = outcome.meta
        record_property(f"{job.symbol}-{arch}", f"{meta.registers} registers, {meta.spill_bytes} B of spills")
        if meta.spill_bytes and not specs[job.symbol].spills:
            problems.append(f"{job.symbol} for {arch}: {meta.spill_bytes} bytes of spills, {meta.registers} registers")
        if arch == "90a" and (found := bad_code(outcome.code, job.symbol)):
            problems.append(f"{job.symbol} for {arch}: {found}")
        threads = specs[job.symbol].threads
        # More CTAs than a multiprocessor has threads for are no demand on registers: ptxas passes over them.
        blocks = min(max(1, specs[job.symbol].min_blocks), MULTIPROCESSOR_THREADS[arch_number(arch)] // threads)
        if meta.registers * threads * blocks > 65536:
            problems.append(f"{job.symbol} for {arch}: {meta.registers} registers a thread do not fit")
    assert not problems, "\n".join(problems)


def test_illegal_copies_are_seen(monkeypatch):
    """In a kernel whose copies have a hint, one of them changed to the form that ptxas makes of uniform addresses."""
    monkeypatch.setenv("FI_CUPY_CACHE_DIR", str(COMPILED))
    monkeypatch.delenv("FI_CUPY_NO_COMPILE", raising=False)
    spec = next(spec for spec in family_specs("decode") if "_bf16_d128" in spec.symbol)
    code = build(spec, "90a").code
    (text,) = _sections(code, b".text." + spec.symbol.encode())
    words = [word for word, _ in struct.iter_unpack("<2Q", text)]
    assert any(word & 0xFFF == 0x882 and word >> 32 == 0x12F00000 for word in words)  # UMOV: the hint
    copies = [i for i, word in enumerate(words) if word & 0xFFF == 0xFAE]
    assert copies and not bad_code(code, spec.symbol)
    at = code.index(text) + 16 * copies[-1] + 1  # the byte with the opcode's upper four bits
    assert bad_code(code[:at] + bytes([code[at] - 2]) + code[at + 1 :], spec.symbol).startswith("1 copies")


def test_where_sm86_and_sm89_differ():
    """No other header asks for an architecture between both, and kernels on either side of the line are there."""
    asked = {
        (str(path.relative_to(kernel_root())), int(number))
        for path in kernel_root().rglob("*.cuh")
        for number in re.findall(r"(?:FI_ARCH|__CUDA_ARCH__)\s*[<>=!]+\s*(\d+)", path.read_text())
    }
    assert {number for _, number in asked} == {800, 890, 900}
    assert {name for name, number in asked if number == 890} == OF_SM89
    both = [spec for spec in all_specs() if spec.supports("86")]
    assert len({is_compiled_for(spec, "86") for spec in both}) == 2
    assert all(is_compiled_for(spec, "89") for spec in both if spec.supports("89"))


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("arch", ARCHS)
def test_a_models_profile_holds_a_kernel_of_every_step(name, arch):
    targets = profile_targets(name, [arch])
    assert {a for _, a in targets} == {arch}
    headers = {spec.header.split("/")[0] for spec, _ in targets}
    assert {"norm.cuh", "lookup.cuh", "rope.cuh", "page.cuh", "gemm", "attention"} <= headers
    assert {spec.header for spec, _ in targets} >= {"attention/decode.cuh", "attention/prefill.cuh"}


@pytest.mark.parametrize("name", sorted(LATENT_MODELS))
@pytest.mark.parametrize("arch", ARCHS)
def test_a_latent_models_profile_holds_both_forms_of_its_attention(name, arch):
    targets = profile_targets(name, [arch])
    headers = {spec.header for spec, _ in targets}
    assert {"norm.cuh", "rope.cuh", "page.cuh"} <= headers
    hopper = arch == "90a"
    assert "attention/mla.cuh" in headers and ("attention/mla_hopper.cuh" in headers) == hopper
    assert any(spec.symbol.startswith("prefill_") and "d192x128" in spec.symbol for spec, _ in targets)


def test_every_module_has_kernels():
    for module in MODULES:
        assert family_specs(module), module


def test_symbols_are_unique():
    # The symbol is in the cache folder's name, the profiler and error texts: two kernels must not share one.
    assert [s for s, n in Counter(spec.symbol for spec in all_specs()).items() if n > 1] == []
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", spec.symbol) for spec in all_specs())


@pytest.mark.parametrize("module", MODULES)
def test_launch_limits_hold_on_every_architecture(module):
    for spec in family_specs(module):
        assert spec.threads % 32 == 0
        assert 32 <= spec.threads <= 1024, spec.symbol
        assert spec.params.size <= 4096, spec.symbol
        for arch in filter(spec.supports, ARCHS):
            limit = SHARED_MEMORY[arch_number(arch)] * 1024
            assert spec.smem_bytes <= limit, (
                f"{spec.symbol} asks for {spec.smem_bytes} bytes on {arch}: {limit} at most"
            )


def test_every_header_belongs_to_a_kernel():
    used = {name for spec in all_specs() for name in header_closure(render(spec).encode())}
    there = {str(path.relative_to(kernel_root())) for path in kernel_root().rglob("*.cuh")}
    assert there - used == set()


def test_no_compile_names_the_kernel_and_the_command(cold, monkeypatch):
    monkeypatch.setenv("FI_CUPY_NO_COMPILE", "1")
    spec = family_specs("norm")[0]
    with pytest.raises(MissingKernelError, match=rf"^{spec.symbol}: .*fi-cupy warmup --arch 90a"):
        build(spec, "90a")
    assert not cold.exists()


def test_unsupported_architecture_is_refused(cold):
    from dataclasses import replace

    spec = replace(family_specs("norm")[0], min_arch=80, max_arch=90)
    for arch, text in (("75", "sm_80 to sm_90"), ("100a", "sm_80 to sm_90")):
        with pytest.raises(GPUArchitectureError, match=f"got target {arch}, expected {text}"):
            build(spec, arch)
    assert build(spec, "80").code


def test_struct_that_does_not_match_is_a_compile_error(cold):
    from dataclasses import replace

    from fi_cupy.jit.params import ParamsStruct

    spec = family_specs("norm")[0]
    fields = list(spec.params.fields)
    fields[0], fields[-1] = fields[-1], fields[0]
    with pytest.raises(CompileError, match=r"NormParams"):
        build(replace(spec, params=ParamsStruct("NormParams", fields)), "80")


def test_user_text_errors_point_into_the_users_own_lines(cold):
    from dataclasses import replace

    spec = replace(family_specs("norm")[0], user=UserSource("variant", "mine", "int ok;\nint bad = nothing;"))
    with pytest.raises(CompileError, match=r"variant:mine:2: error.*nothing") as caught:
        build(spec, "80")
    assert "int bad = nothing;" in caught.value.source


def test_ptx_for_an_older_architecture(cold):
    kernel = build(family_specs("norm")[0], "compute_75")
    assert kernel.path is not None
    assert kernel.path.name == "kernel.ptx"
    assert b".target sm_75" in kernel.code


# --- profiles and preload ------------------------------------------------------------------------------------------


def test_profiles():
    assert set(profile_specs("norm,rope")) == {*family_specs("norm"), *family_specs("rope")}
    assert profile_specs("norm, norm") == profile_specs("norm")
    assert profile_specs("all") == all_specs()
    assert all(isinstance(spec, KernelSpec) for spec in all_specs())
    with pytest.raises(ArgumentError, match=r"profile: 'nothing' is unknown, expected one of all, smollm2"):
        profile_specs("nothing")


@pytest.mark.parametrize(
    "text,targets",
    [
        ("8.0 9.0a", ("80", "90a")),
        ("7.5,8.6;8.9", ("75", "86", "89")),
        ("9.0 10.0 12.0f", ("90a", "100a", "120a")),
        ("sm_90a sm_120 80", ("90a", "120a", "80")),
        ("compute_80", ("compute_80",)),
        ("9.0 90a sm_90", ("90a",)),
        ("all", ARCHS),
    ],
)
def test_architecture_lists(text, targets):
    assert parse_archs(text) == targets


@pytest.mark.parametrize("text", ["", "5.0", "hopper", "9.0+PTX", "compute_70", "compute_x", "8"])
def test_bad_architectures_are_refused(text):
    with pytest.raises(ArgumentError, match="arch: "):
        parse_archs(text)


def test_default_architectures_come_from_the_environment(cold, monkeypatch):
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "8.0")
    assert default_archs() == ("80",)
    monkeypatch.setenv("FI_CUPY_CUDA_ARCH_LIST", "9.0a 12.0f")
    assert default_archs() == ("90a", "120a")
    monkeypatch.setenv("FI_CUPY_TARGET", "compute_75")
    assert default_archs() == ("compute_75",)


def test_preload_compiles_once(cold):
    count = len(family_specs("page"))
    before = stats.compiled
    assert preload("page", arch="8.0", processes=2) == count
    assert stats.compiled - before == count
    assert preload(family_specs("page")[:2], arch="8.0") == 2
    assert stats.compiled - before == count
    assert fi_cupy.preload is preload


def test_preload_raises_what_failed_after_trying_all(cold, monkeypatch):
    assert preload(family_specs("page")[:1], arch="8.0") == 1
    monkeypatch.setenv("FI_CUPY_NO_COMPILE", "1")
    with pytest.raises(MissingKernelError):
        preload(family_specs("page")[:3], arch="8.0")


def test_preload_at_import(cold):
    code = "import fi_cupy; from fi_cupy.jit.build import stats; print(stats.compiled, stats.cached)"
    environment = {"FI_CUPY_PRELOAD": "page", "FI_CUPY_CUDA_ARCH_LIST": "8.0"}
    count = len(family_specs("page"))
    assert run_python(code, **environment).split() == [str(count), "0"]
    assert run_python(code, **environment).split() == ["0", str(count)]
    # A second process that may not compile imports too, and one that lacks a kernel says which.
    assert run_python(code, **environment, FI_CUPY_NO_COMPILE="1").split() == ["0", str(count)]
    text = run_python(
        "try:\n import fi_cupy\nexcept Exception as error:\n print(type(error).__name__, error)",
        FI_CUPY_PRELOAD="norm", FI_CUPY_CUDA_ARCH_LIST="8.0", FI_CUPY_NO_COMPILE="1",
    )  # fmt: skip
    assert text.startswith("MissingKernelError")
