"""The command line as a user runs it: a process of its own, its output and its exit code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_jobs import ROOT

import fi_cupy
from fi_cupy.device import num_devices
from fi_cupy.jit import env
from fi_cupy.jit.render import render
from fi_cupy.profiles import all_specs, family_specs

needs_nvrtc = pytest.mark.usefixtures("nvrtc")


@pytest.fixture
def nvrtc() -> None:
    pytest.importorskip("cupy", reason="compiling needs CuPy's NVRTC binding")


@pytest.fixture
def cli(tmp_path):
    """Run ``python -m fi_cupy`` with a cold cache; return (exit code, standard output, standard error)."""

    def run(*arguments: str, **environment: str) -> tuple[int, str, str]:
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("FI_CUPY_", "FLASHINFER_"))}
        variables = {"FI_CUPY_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(
            [sys.executable, "-m", "fi_cupy", *arguments],
            cwd=tmp_path, env={**clean, **variables}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stdout, done.stderr

    return run


def _entry(tmp_path: Path) -> Path:
    return sorted((tmp_path / "cache" / "80").iterdir())[0]


@pytest.mark.parametrize(
    "command",
    [[], ["info"], ["list"], ["warmup"], ["render"], ["generate"], ["cache"]]
    + [["cache", name] for name in ("ls", "verify", "prune", "pack", "unpack", "clear")],
    ids=" ".join,
)
def test_help(cli, command):
    code, out, _ = cli(*command, "--help")
    assert code == 0
    assert out.startswith(f"Usage: {' '.join(['fi-cupy', *command])} ")


def test_version_and_unknown_command(cli):
    assert cli("--version")[:2] == (0, f"fi-cupy, version {fi_cupy.__version__}\n")
    code, _, err = cli("frobnicate")
    assert code == 2
    assert "No such command" in err


def test_installed_script_is_the_same_program(tmp_path):
    script = Path(sys.executable).parent / "fi-cupy"
    if not script.exists():
        pytest.skip("fi_cupy is on the path, but not installed")
    done = subprocess.run([str(script), "--version"], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout == f"fi-cupy, version {fi_cupy.__version__}\n"


# --- info ----------------------------------------------------------------------------------------------------------


def test_info_for_people(cli):
    code, out, _ = cli("info", FI_CUPY_NO_COMPILE="1")
    assert code == 0
    for variable in env.ALL:
        for name in variable.names:
            assert name in out
    assert "FI_CUPY_NO_COMPILE / FLASHINFER_DISABLE_JIT = 1" in out
    assert fi_cupy.__version__ in out
    assert out.count("problem: ") == out.count("   mend: ")


@needs_nvrtc
def test_info_for_programs(cli, tmp_path):
    code, out, _ = cli("info", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["fi_cupy"] == fi_cupy.__version__
    assert report["nvrtc"].split(".")[0] == report["headers"]["version"].split(".")[0]
    assert Path(report["headers"]["path"], "cuda_fp16.h").is_file()
    assert report["cache"] == {
        "path": str(tmp_path / "cache"), "writable": True, "kernels": 0, "broken": 0, "bytes": 0,
    }  # fmt: skip
    assert not (tmp_path / "cache").exists()  # looking makes nothing
    assert all(set(p) == {"problem", "mend"} and all(p.values()) for p in report["problems"])
    assert len(report["gpus"]) == num_devices()


def _problems(cli, **environment: str) -> str:
    return json.dumps(json.loads(cli("info", "--json", **environment)[1])["problems"])


def test_info_finds_problems_and_names_the_mend(cli, tmp_path):
    if num_devices() == 0:
        assert "driver" in _problems(cli) or "CuPy is not installed" in _problems(cli)
    (tmp_path / "file").write_text("")
    text = _problems(cli, FI_CUPY_CACHE_DIR=str(tmp_path / "file"))
    assert "cannot be written" in text
    assert "set FI_CUPY_CACHE_DIR to a writable folder" in text
    text = _problems(cli, FI_CUPY_NO_COMPIEL="1")
    assert "FI_CUPY_NO_COMPIEL is set, but fi_cupy reads no such variable" in text
    assert "unset FI_CUPY_NO_COMPIEL" in text
    assert "unset FLASHINFER_DISABLE_JIT" in _problems(cli, FI_CUPY_NO_COMPILE="1", FLASHINFER_DISABLE_JIT="0")


def test_info_without_cupy(tmp_path):
    code = (
        "import sys; sys.modules['cupy'] = None; from fi_cupy.info import collect; r = collect(); print(r['problems'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "CuPy" in done.stdout


# --- list and render -----------------------------------------------------------------------------------------------


@needs_nvrtc
def test_list(cli):
    code, out, _ = cli("list", "--profile", "page", "--json")
    assert code == 0
    rows = json.loads(out)
    assert [row["symbol"] for row in rows] == [spec.symbol for spec in family_specs("page")]
    assert all(row["cached"] == [] for row in rows)
    assert cli("warmup", "--arch", "8.0 9.0", "--profile", "page", "-j", "2")[0] == 0
    rows = json.loads(cli("list", "--profile", "page", "--json")[1])
    assert all(row["cached"] == ["80", "90a"] for row in rows)
    code, out, _ = cli("list", "--profile", "page")
    assert code == 0
    for row in rows:
        (line,) = (text for text in out.splitlines() if text.strip().startswith(f"{row['symbol']} "))
        assert line.split()[-2:] == ["80", "90a"]
    assert out.endswith(f"{len(rows)} kernels\n")


@needs_nvrtc
def test_list_of_everything(cli):
    code, out, _ = cli("list", "--json")
    assert code == 0
    assert len(json.loads(out)) == len(all_specs())


def test_render(cli):
    spec = family_specs("norm")[0]
    assert cli("render", spec.symbol) == (0, render(spec), "")


def test_render_of_no_or_several_kernels(cli):
    code, out, err = cli("render", "no_such_kernel")
    assert (code, out) == (2, "")
    assert "no kernel is called 'no_such_kernel'; `fi-cupy list` shows" in err
    code, out, err = cli("render", "rmsnorm_")
    assert (code, out) == (2, "")
    assert "'rmsnorm_' fits" in err


@needs_nvrtc
def test_render_of_a_cached_kernel_that_is_not_canonical(cli):
    code = (
        "from fi_cupy.dtypes import bfloat16 as t; from fi_cupy.jit.build import build; "
        "from fi_cupy.norm import norm_spec; s = norm_spec(t, t, t, 1000000, 1); build(s, '80'); print(s.symbol)"
    )
    assert cli("cache", "ls")[0] == 0
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "FI_CUPY_CACHE_DIR": str(_cache_dir(cli))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    symbol = done.stdout.strip()
    assert symbol not in {spec.symbol for spec in all_specs()}
    code, out, _ = cli("render", symbol)
    assert code == 0
    assert f"\n{symbol}(" in out


def _cache_dir(cli) -> Path:
    return Path(json.loads(cli("info", "--json")[1])["cache"]["path"])


# --- warmup --------------------------------------------------------------------------------------------------------


@needs_nvrtc
def test_warmup_compiles_once(cli):
    count = len(family_specs("page"))
    code, out, err = cli("warmup", "--arch", "8.0", "--profile", "page", "-j", "2", "--verbose")
    assert (code, err) == (0, "")
    assert f"{count} kernels ready: {count} compiled in " in out
    for spec in family_specs("page"):
        (line,) = (text for text in out.splitlines() if text.strip().startswith(f"{spec.symbol} "))
        _, arch, seconds, registers, stack, spills = line.split()[:6]
        assert arch == "80"
        assert float(seconds) > 0
        assert int(registers) > 0
        assert (stack.isdigit(), spills) == (True, "0")
    code, out, err = cli("warmup", "--arch", "8.0", "--profile", "page")
    assert (code, err) == (0, "")
    assert f"{count} kernels ready: 0 compiled" in out
    assert f"{count} were in the cache; nothing to compile" in out
    # What is warm is enough where compilation is switched off.
    assert cli("warmup", "--arch", "8.0", "--profile", "page", FI_CUPY_NO_COMPILE="1")[0] == 0


@needs_nvrtc
def test_warmup_takes_the_targets_of_the_environment(cli):
    code, out, _ = cli("warmup", "--profile", "page", FLASHINFER_CUDA_ARCH_LIST="8.0;9.0a")
    assert code == 0
    assert f"{2 * len(family_specs('page'))} kernels ready" in out
    rows = json.loads(cli("cache", "ls", "--json")[1])
    assert {row["arch"] for row in rows} == {"80", "90a"}


def test_warmup_refuses_what_it_cannot_do(cli):
    code, _, err = cli("warmup", "--arch", "5.0")
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("fi-cupy: arch: '5.0'")
    code, _, err = cli("warmup", "--arch", "8.0", "--profile", "nothing")
    assert code == 1
    assert err.startswith("fi-cupy: profile: 'nothing' is unknown, expected one of all")
    assert cli("warmup", "--arch", "8.0", "-j", "0")[0] == 2
    if num_devices() == 0:
        code, _, err = cli("warmup")
        assert code == 1
        assert "no GPU is present, so name the targets" in err


@needs_nvrtc
def test_warmup_that_fails_says_so(cli):
    arguments = ("warmup", "--arch", "8.0", "--profile", "page")
    code, out, err = cli(*arguments, FI_CUPY_EXTRA_NVRTC_FLAGS="--no-such-option")
    assert code == 1
    assert "0 kernels ready" in out
    assert err.count("failed: ") == len(family_specs("page"))
    assert f"{len(family_specs('page'))} of {len(family_specs('page'))} kernels failed" in err
    code, _, err = cli(*arguments, FI_CUPY_NO_COMPILE="1")
    assert code == 1
    assert "compilation is switched off" in err


@needs_nvrtc
def test_warmup_into_an_unwritable_cache_fails(cli, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = cli("warmup", "--arch", "8.0", "--profile", "page", FI_CUPY_CACHE_DIR=str(tmp_path / "file"))
    assert code == 1
    assert "the cache cannot be written" in err


# --- cache ---------------------------------------------------------------------------------------------------------


def test_cache_commands_on_no_cache(cli, tmp_path):
    assert cli("cache", "ls")[:2] == (0, f"0 kernels, 0 B of code in {tmp_path / 'cache'}\n")
    assert json.loads(cli("cache", "ls", "--json")[1]) == []
    assert cli("cache", "verify")[:2] == (0, "0 kernels are intact, 0 are broken\n")
    assert cli("cache", "prune")[0] == 0
    assert cli("cache", "clear")[0] == 0


@needs_nvrtc
def test_cache_commands(cli, tmp_path):
    count = len(family_specs("page"))
    assert cli("warmup", "--arch", "8.0", "--profile", "page", "-j", "2")[0] == 0
    code, out, _ = cli("cache", "ls")
    assert code == 0
    assert out.splitlines()[-1].startswith(f"{count} kernels, ")
    assert len(json.loads(cli("cache", "ls", "--json", "--arch", "9.0")[1])) == 0

    pack = tmp_path / "pack.zip"
    assert cli("cache", "pack", str(pack))[1].startswith(f"{count} kernels packed into {pack}")
    elsewhere = {"FI_CUPY_CACHE_DIR": str(tmp_path / "elsewhere")}
    code, out, _ = cli("cache", "unpack", str(pack), **elsewhere)
    assert (code, out) == (
        0,
        f"{count} kernels unpacked into {tmp_path / 'elsewhere'} (made by fi_cupy {fi_cupy.__version__})\n",
    )
    code, out, _ = cli("warmup", "--arch", "8.0", "--profile", "page", FI_CUPY_NO_COMPILE="1", **elsewhere)
    assert code == 0
    assert "nothing to compile" in out

    cubin = _entry(tmp_path) / "kernel.cubin"
    cubin.write_bytes(cubin.read_bytes()[:-100])
    code, out, err = cli("cache", "verify")
    assert code == 1
    assert f"{count - 1} kernels are intact, 1 are broken" in out
    assert str(cubin.parent) in out
    assert "fi-cupy cache prune" in err
    assert json.loads(cli("info", "--json")[1])["cache"]["broken"] == 1
    assert cli("cache", "prune")[1].startswith("1 removed")
    assert cli("cache", "verify")[0] == 0
    assert cli("cache", "prune", "--older-than", "1")[1].startswith("0 removed")
    assert cli("cache", "clear")[1].startswith(f"{count - 1} kernels removed")
    assert cli("cache", "verify")[1] == "0 kernels are intact, 0 are broken\n"


def test_cache_unpack_of_no_pack(cli, tmp_path):
    (tmp_path / "no.zip").write_text("no zip")
    code, _, err = cli("cache", "unpack", str(tmp_path / "no.zip"))
    assert (code, err.count("\n")) == (1, 1)
    assert err.startswith("fi-cupy: cache unpack: ")
    assert cli("cache", "unpack", str(tmp_path / "absent.zip"))[0] == 2
    assert cli("cache", "pack", str(tmp_path / "no" / "such" / "folder.zip"))[0] == 1


# --- generate, pipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [["--max-tokens", "0"], ["--temperature", "-1"], ["--top-p", "0"], ["--top-p", "1.5"], ["--top-k", "-1"]]
    + [["--batch", "0"], ["--backend", "tpu"], ["--seed", "x"]],
    ids=" ".join,
)
def test_generate_refuses_bad_options(cli, arguments):
    code, out, err = cli("generate", "hello", *arguments)
    assert (code, out) == (2, "")
    assert arguments[0] in err


def test_generate_with_a_missing_model_is_one_line(cli):
    pytest.importorskip("gguf")
    code, _, err = cli("generate", "hello", "--model", "no-such-file.gguf", "--backend", "numpy")
    assert (code, err.count("\n")) == (1, 1)
    assert "no-such-file.gguf" in err


def test_a_closed_pipe_is_no_error(tmp_path):
    done = subprocess.run(
        f"{sys.executable} -m fi_cupy render {family_specs('norm')[0].symbol} | head -n 1",
        shell=True, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.startswith("// ")
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# --- tune, FlashInfer's names ----------------------------------------------------------------------------------------


@pytest.mark.skipif(num_devices() > 0, reason="a GPU would be tuned")
def test_tune_says_what_is_missing(cli):
    assert cli("tune", "--profile", "gpt9")[2].startswith("fi-cupy: tune: profile 'gpt9' is unknown, expected one of ")
    assert cli("tune")[::2] == (
        1,
        "fi-cupy: tune: no CUDA GPU is present; CPU arrays run the NumPy reference instead\n",
    )
    assert cli("tune", "--show")[0] == 1
    assert "so name a file to write" in cli("tune", FI_CUPY_AUTOTUNE_DIR="off")[2]


def test_info_shows_the_tuned_choices(cli, tmp_path):
    from fi_cupy.tuning.file import Entry, merge_into

    path = tmp_path / "cache" / "tuned" / "choices.json"
    assert json.loads(cli("info", "--json")[1])["tuned"] == {"path": str(path), "choices": 0, "used": 0}
    merge_into(path, {(("gpu", "another"),): {"key": Entry("R", 1, 1.0, 2.0)}})
    assert f"{path}: 1 choices, 0 for this machine" in cli("info")[1]
    path.write_text("{")
    assert any("is no JSON file" in p["problem"] for p in json.loads(cli("info", "--json")[1])["problems"])
    assert json.loads(cli("info", "--json", FI_CUPY_AUTOTUNE_DIR="off")[1])["tuned"]["path"] is None


@needs_nvrtc
def test_flashinfers_names(cli, tmp_path):
    assert cli("show-config")[1] == cli("info")[1]
    assert json.loads(cli("collect-env", "--json")[1])["fi_cupy"] == fi_cupy.__version__
    assert cli("list-modules", "--profile", "lookup")[1] == cli("list", "--profile", "lookup")[1]
    assert cli("warmup", "--arch", "8.0", "--profile", "lookup")[0] == 0
    count, hopper = (sum(s.supports(arch) for s in family_specs("lookup")) for arch in ("80", "90a"))
    code, out, _ = cli("module-status", "--profile", "lookup", "--arch", "8.0 9.0")
    assert (code, out) == (0, f"80: {count} of {count} kernels compiled\n90a: 0 of {hopper} kernels compiled\n")
    args = ("module-status", "--profile", "lookup", "--arch", "8.0 9.0", "--filter", "not-compiled")
    assert cli(*args)[1].count("not compiled 90a/") == hopper
    assert set(json.loads(cli(*args, "--json")[1]).values()) == {False}
    assert cli("list-cubins")[1] == cli("cache", "ls")[1]
    assert cli("cache", "pack", str(tmp_path / "pack.zip"))[0] == 0
    assert cli("clear-cubin")[1].startswith(f"{count} kernels removed")
    assert cli("download-cubin", str(tmp_path / "pack.zip"))[1] == f"{count} kernels taken in\n"
    assert cli("clear-cache")[1].startswith(f"{count} kernels removed")
    code, _, err = cli("download-cubin")
    assert code == 1
    assert "no server of cubins" in err
    assert cli("module-status", "--profile", "lookup")[0] == (num_devices() == 0)


@needs_nvrtc
def test_export_compile_commands(cli, tmp_path):
    code, out, _ = cli("export-compile-commands", "db.json", "--profile", "lookup", "--arch", "8.0")
    assert code == 0
    entries = json.loads((tmp_path / "db.json").read_text())
    assert out == f"{len(entries)} translation units in db.json\n"
    by_name = {Path(e["file"]).name: Path(e["file"]).read_text() for e in entries}
    assert by_name == {f"{s.symbol}.cu": render(s) for s in family_specs("lookup") if s.supports("80")}
    assert all("--cuda-gpu-arch=sm_80" in e["arguments"] for e in entries)
    assert cli("export-compile-commands", "--arch", "8.0 9.0")[0] == 1
