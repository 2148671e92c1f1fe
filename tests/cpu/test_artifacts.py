"""Cubin packs: what goes in comes out, and nothing that was changed on the way is taken."""

from __future__ import annotations

import json
import random
import zipfile
from pathlib import Path

import pytest
from kernel_jobs import ROOT, toy_job

from fi_cupy import aot, artifacts, autotuner
from fi_cupy.compilation_context import CompilationContext
from fi_cupy.device import num_devices
from fi_cupy.errors import ArgumentError, CacheError, CudaUnavailableError, PackError, UnsupportedError
from fi_cupy.jit import env
from fi_cupy.jit.build import build_job
from fi_cupy.jit.cache import KernelCache
from fi_cupy.profiles import MODULES
from fi_cupy.tuning import file as choices

pytest.importorskip("cupy", reason="compiling needs CuPy's NVRTC binding")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A cold cache of this test's own."""
    for variable in env.ALL:
        for name in variable.names:
            monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FI_CUPY_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def packed(root, tmp_path) -> Path:
    """A pack of three kernels for sm_80, one for sm_86, and a tuned choice."""
    for value in range(3):
        build_job(toy_job(f"toy{value}", value=value))
    build_job(toy_job("toy86", arch="86"))
    _tune("here")
    file = tmp_path / "pack.zip"
    made = artifacts.pack(file)
    assert len(made.kernels) == 4
    assert made.tuned
    return file


def _tune(key: str) -> None:
    target = autotuner.default_file()
    assert target is not None
    choices.merge_into(target, {(("gpu", "a"),): {key: choices.Entry("R", "t", 1.0, 2.0)}})


def _files(folder: Path) -> set[Path]:
    return {p for p in folder.rglob("*") if p.is_file() and not p.name.endswith(".lock")}


@pytest.fixture
def elsewhere(packed, tmp_path, monkeypatch) -> Path:
    """Another machine's cold cache."""
    monkeypatch.setenv("FI_CUPY_CACHE_DIR", str(tmp_path / "elsewhere"))
    return tmp_path / "elsewhere"


def test_pack_and_unpack(packed, elsewhere, monkeypatch):
    _tune("there")
    for _ in range(2):  # taking it in again changes nothing
        made = artifacts.unpack(packed)
        assert {(k["symbol"], k["arch"]) for k in made.kernels} == {
            ("toy0", "80"), ("toy1", "80"), ("toy2", "80"), ("toy86", "86")
        }  # fmt: skip
    monkeypatch.setenv("FI_CUPY_NO_COMPILE", "1")
    for value in range(3):
        assert build_job(toy_job(f"toy{value}", value=value)).path is not None
    build_job(toy_job("toy86", arch="86"))
    (table,) = choices.read(autotuner.default_file()).values()
    assert set(table) == {"here", "there"}
    assert not list(elsewhere.rglob(".tmp-*"))
    assert all(kernel is not None for _, kernel in KernelCache(elsewhere).entries())


def test_pack_takes_only_whole_entries_of_the_targets_named(packed, root, tmp_path):
    (folder,) = (root / "80").glob("toy1-*")
    (folder / "kernel.cubin").write_bytes(b"broken")
    made = artifacts.pack(tmp_path / "some.zip", ["80"], tuned=False)
    assert sorted(k["symbol"] for k in made.kernels) == ["toy0", "toy2"]
    assert not made.tuned
    assert artifacts.verify_pack(tmp_path / "some.zip") == made


def test_checksums_are_those_of_the_members(packed):
    sums = artifacts.CheckSumHash(packed).map_checksums
    with zipfile.ZipFile(packed) as archive:
        assert set(sums) == set(archive.namelist()) - {"manifest.json"}
    assert len(sums) == 4 * 3 + 1
    assert artifacts.ArtifactPath.TUNED in sums


def _rewritten(packed: Path, change, signed: bool = True) -> Path:
    """The pack with `change(name, data) → (name, data) or None` applied to every member; `signed` with a new sum."""
    file = packed.with_name("rewritten.zip")
    with zipfile.ZipFile(packed) as old, zipfile.ZipFile(file, "w") as new:
        new.comment = old.comment
        for name in old.namelist():
            member = change(name, old.read(name))
            if member is not None:
                new.writestr(*member)
                if name == "manifest.json" and signed:
                    new.comment = artifacts._manifest_sum(member[1])
    return file


def _refused(file: Path, folder: Path, match: str) -> None:
    before = _files(folder.parent)
    with pytest.raises(PackError, match=match) as caught:
        artifacts.unpack(file)
    assert isinstance(caught.value, CacheError)
    assert str(file) in str(caught.value)
    assert _files(folder.parent) == before


@pytest.mark.parametrize("suffix", [".cubin", ".cu", ".json", "manifest.json", "choices.json"])
@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_refuses_the_pack(packed, elsewhere, suffix, seed):
    def damage(name: str, data: bytes):
        if not name.endswith(suffix) or ("toy1" not in name and suffix[0] == "."):
            return name, data
        out = bytearray(data)
        bit = random.Random(seed).randrange(len(out) * 8)
        out[bit // 8] ^= 1 << bit % 8
        return name, bytes(out)

    _refused(_rewritten(packed, damage, signed=False), elsewhere, "cache unpack")


@pytest.mark.parametrize("seed", range(12))
def test_a_flipped_byte_of_the_file_is_never_taken_silently(packed, elsewhere, seed):
    """Wherever it lies: either the pack is refused, or what comes out is what went in."""
    data = bytearray(packed.read_bytes())
    data[random.Random(seed).randrange(len(data))] ^= 0xFF
    packed.write_bytes(data)
    try:
        artifacts.unpack(packed)
    except PackError:
        assert not _files(elsewhere)
        return
    kernels = [kernel for _, kernel in KernelCache(elsewhere).entries()]
    assert len(kernels) == 4
    assert all(kernel is not None for kernel in kernels)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda n, d: None if n.endswith("manifest.json") else (n, d), "it has no manifest.json"),
        (lambda n, d: (n, d.replace(b"fi_cupy cubin pack", b"another pack")), "its format is 'another pack'"),
        (lambda n, d: (n, d.replace(b'"cache_schema": ', b'"cache_schema": 9')), "pack it anew"),
        (lambda n, d: (n, b"{" if n == "manifest.json" else d), "broken manifest"),
        (lambda n, d: (n, b"[]" if n == "manifest.json" else d), "broken manifest"),
        (lambda n, d: None if n.endswith("toy1.cu") or ("toy1" in n and n.endswith(".cu")) else (n, d), "differ by"),
        (lambda n, d: (n.replace("toy1-", "toy9-"), d), "differ by"),
        (lambda n, d: (n, d.replace(b'"symbol": "toy1"', b'"symbol": "../x"')), "no name"),
    ],
    ids=range(8),
)  # fmt: skip
def test_foreign_and_incomplete_packs_are_refused(packed, elsewhere, change, match):
    _refused(_rewritten(packed, change), elsewhere, match)


def test_a_whole_entry_under_another_name_is_refused(packed, elsewhere):
    """Even with a manifest that agrees, an entry must be the kernel that its own metadata says."""
    import hashlib

    with zipfile.ZipFile(packed) as old:
        members = {n.replace("toy1-", "toy9-"): old.read(n) for n in old.namelist()}
    manifest = json.loads(members["manifest.json"].replace(b"toy1", b"toy9"))
    manifest["sha256"] = {n: hashlib.sha256(d).hexdigest() for n, d in members.items() if n != "manifest.json"}
    file = packed.with_name("renamed.zip")
    members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(file, "w") as new:
        new.comment = artifacts._manifest_sum(members["manifest.json"])
        for name, data in members.items():
            new.writestr(name, data)
    _refused(file, elsewhere, "is not the kernel that its manifest says")


@pytest.mark.parametrize("where", ["../../evil", "/evil", "..", ".hidden", "80/../../evil", "C:\\evil"])
def test_unpack_stays_inside_the_cache(packed, elsewhere, where):
    def change(name: str, data: bytes):
        if name == "manifest.json":
            return name, data.replace(b'"80', json.dumps(where)[:-1].encode()).replace(b"80/", where.encode() + b"/")
        return name.replace("80", where, 1), data

    _refused(_rewritten(packed, change), elsewhere, "cache unpack")


@pytest.mark.parametrize("content", [b"", b"no zip", None])
def test_unpack_of_no_pack(elsewhere, tmp_path, content):
    file = tmp_path / "file.zip"
    if content is not None:
        file.write_bytes(content)
    _refused(file, elsewhere, r"cache unpack: .*file\.zip")


def test_truncated_pack(packed, elsewhere):
    data = packed.read_bytes()
    for left_off, match in ((1, "does not have its checksum"), (400, "cannot be read")):
        packed.write_bytes(data[:-left_off])
        _refused(packed, elsewhere, match)


def test_pack_into_nowhere(root, tmp_path):
    with pytest.raises(PackError, match="cache pack"):
        artifacts.pack(tmp_path / "no" / "such" / "folder.zip")
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_cache_that_cannot_be_made(packed, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FI_CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(PackError, match="cannot be read or stored"):
        artifacts.unpack(packed)


def test_download_is_from_files_only(packed, elsewhere, monkeypatch):
    with pytest.raises(UnsupportedError, match=r"no server of cubins.*FI_CUPY_CUBIN_PACK.*fi-cupy warmup"):
        artifacts.download_artifacts()
    with pytest.raises(UnsupportedError, match="is a URL, expected a file"):
        artifacts.download_artifacts("https://example.org/pack.zip")
    monkeypatch.setenv("FI_CUPY_CUBIN_PACK", f"{packed}:{packed}")
    assert artifacts.download_artifacts() == 8
    assert artifacts.download_artifacts(packed) == 4
    assert artifacts.clear_cubin() == 4
    assert autotuner.default_file().exists()


def test_status(root):
    before = artifacts.get_artifacts_status("lookup", "8.0 9.0a")
    assert {name.split("/")[0] for name, _ in before} == {"80", "90a"}
    assert not any(there for _, there in before)
    pack = aot.compile_and_package_modules(
        root.parent / "out", root, ROOT, {"profile": "lookup", "archs": "8.0"}
    )  # fmt: skip
    assert pack.name == "fi_cupy-lookup-80.zip"
    after = artifacts.get_artifacts_status("lookup", "8.0 9.0a")
    assert [name for name, there in after if there] == [name for name, _ in before if name.startswith("80/")]
    assert len(artifacts.verify_pack(pack).kernels) == sum(name.startswith("80/") for name, _ in before)


def test_aot(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "8.0")
    out = tmp_path / "out"
    aot.compile_and_package_modules(out, config={"profile": "lookup"}, verbose=True)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == sum(spec.supports("80") for spec in aot.gen_all_modules("lookup"))
    aot.compile_and_package_modules(out, config={"profile": "lookup"}, verbose=True)
    assert capsys.readouterr().out == ""
    aot.compile_and_package_modules(out, config={"profile": "lookup"}, verbose=True, skip_prebuilt=False)
    assert len(capsys.readouterr().out.splitlines()) == len(lines)
    assert not root.exists()
    assert aot.register_default_modules() == len(MODULES)
    with pytest.raises(ArgumentError, match="config has"):
        aot.compile_and_package_modules(out, config={"profiles": "lookup"})
    with pytest.raises(ArgumentError, match="project_root"):
        aot.compile_and_package_modules(out, project_root=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be made"):
        aot.compile_and_package_modules(tmp_path / "file" / "out", config={"profile": "lookup"})


# --- compilation context ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", env.ARCH_LIST.names)
def test_targets_from_the_environment(root, monkeypatch, name):
    monkeypatch.setenv(name, "7.5 8.0 9.0a 12.0f 10.0")
    context = CompilationContext()
    assert context.TARGET_CUDA_ARCHS == {(7, "5"), (8, "0"), (9, "0a"), (12, "0f"), (10, "0a")}
    assert context.targets == ("75", "80", "90a", "100a", "120a")
    assert context.get_nvcc_flags_list() == [
        "-gencode=arch=compute_75,code=sm_75", "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_100a,code=sm_100a",
        "-gencode=arch=compute_120f,code=sm_120f",
    ]  # fmt: skip
    assert context.get_nvcc_flags_list([9, 12])[0] == "-gencode=arch=compute_90a,code=sm_90a"
    assert list(context.get_nvrtc_options([8, 9])) == ["80", "90a"]
    with pytest.raises(CudaUnavailableError, match="no architecture of major version 11 among the targets"):
        context.get_nvcc_flags_list([11])


def test_ours_comes_before_flashinfers(root, monkeypatch):
    monkeypatch.setenv("FI_CUPY_CUDA_ARCH_LIST", "9.0")
    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "8.0")
    assert CompilationContext().TARGET_CUDA_ARCHS == {(9, "0a")}


@pytest.mark.parametrize("text", ["7.0", "sm_80", "8", "8.0+PTX", "9.0x"])
def test_bad_targets(root, monkeypatch, text):
    monkeypatch.setenv("FI_CUPY_CUDA_ARCH_LIST", f"8.0 {text}")
    with pytest.raises(ArgumentError, match=r"is no architecture from 7\.5 on"):
        CompilationContext()


@pytest.mark.skipif(num_devices() > 0, reason="a GPU gives the targets")
def test_no_gpu_and_no_list(root):
    context = CompilationContext()
    assert context.TARGET_CUDA_ARCHS == set()
    assert context.targets == ()
    with pytest.raises(CudaUnavailableError, match=r"\(none\); set FI_CUPY_CUDA_ARCH_LIST"):
        context.get_nvcc_flags_list()
