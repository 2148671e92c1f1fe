"""What is in the wheel and the sdist, and that an installed copy works away from the checkout."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from kernel_jobs import ROOT

import fi_cupy

pytest.importorskip("build", reason="needs the test extra (build, hatchling)")
pytest.importorskip("hatchling", reason="needs the test extra (build, hatchling)")


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with the sdist, the wheel built from it, and in direct/ the wheel built from the checkout."""
    folder = tmp_path_factory.mktemp("dist")
    for options in (["-o", str(folder)], ["--wheel", "-o", str(folder / "direct")]):
        done = subprocess.run(
            [sys.executable, "-m", "build", "--no-isolation", *options, str(ROOT)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def _one(folder: Path, pattern: str) -> Path:
    (file,) = folder.glob(pattern)
    return file


@pytest.fixture(scope="module")
def wheel(dist) -> dict[str, bytes]:
    """The members of the wheel that was built from the sdist."""
    with zipfile.ZipFile(_one(dist, "*.whl")) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def _tree(folder: str, pattern: str) -> dict[str, bytes]:
    return {str(p.relative_to(ROOT / folder)): p.read_bytes() for p in (ROOT / folder).rglob(pattern) if p.is_file()}


def test_wheel_is_small(dist):
    assert _one(dist, "*.whl").stat().st_size < 1_000_000
    assert _one(dist, "*.whl").name == f"fi_cupy-{fi_cupy.__version__}-py3-none-any.whl"


def test_wheel_holds_every_kernel_template_and_module(wheel):
    kernels = {f"fi_cupy/_kernels/{name}": text for name, text in _tree("kernels", "*").items()}
    templates = {f"fi_cupy/_templates/{name}": text for name, text in _tree("templates", "*").items()}
    modules = {f"fi_cupy/{name}": text for name, text in _tree("fi_cupy", "*.py*").items() if "__pycache__" not in name}
    assert kernels
    assert templates
    for name, text in {**kernels, **templates, **modules}.items():
        assert wheel.get(name) == text, name
    assert "fi_cupy/py.typed" in wheel


def test_wheel_holds_nothing_else(wheel):
    for name in wheel:
        top = name.split("/")[0]
        assert top == "fi_cupy" or top.endswith(".dist-info"), name
        suffix = Path(name).suffix
        if top == "fi_cupy":
            assert suffix in {".py", ".pyi", ".cuh", ".jinja"} or name == "fi_cupy/py.typed", name


def test_wheel_metadata(wheel):
    info = f"fi_cupy-{fi_cupy.__version__}.dist-info"
    metadata = email.message_from_bytes(wheel[f"{info}/METADATA"])
    assert metadata["Name"] == "fi-cupy"
    assert metadata["Version"] == fi_cupy.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra") or ()) == {
        "bench", "cuda12", "cuda13", "demo", "docs", "frameworks", "test", "transformers"
    }  # fmt: skip
    core = [r for r in metadata.get_all("Requires-Dist") or () if "extra ==" not in r]
    # The core asks for no CUDA library and no framework.
    assert sorted(r.split(">")[0].replace("_", "-") for r in core) == [
        "click", "filelock", "jinja2", "lazy-loader", "ml-dtypes", "numpy", "platformdirs", "rich",
    ]  # fmt: skip
    assert b"fi-cupy = fi_cupy.cli:main" in wheel[f"{info}/entry_points.txt"]
    assert b"Apache License" in wheel[f"{info}/licenses/LICENSE"]


def test_sdist_builds_the_same_wheel(dist, wheel):
    with zipfile.ZipFile(_one(dist / "direct", "*.whl")) as archive:
        assert {name: archive.read(name) for name in archive.namelist()} == wheel


def test_sdist_holds_sources_and_tests(dist):
    with tarfile.open(_one(dist, "*.tar.gz")) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in (
        "pyproject.toml",
        "Makefile",
        "LICENSE",
        "README.md",
        "kernels/norm.cuh",
        "tests/cpu/test_packaging.py",
    ):
        assert name in names
    assert not [n for n in names if n.endswith(".pyc") or n.startswith((".venv", "build", "dist", ".git/"))]


@pytest.fixture(scope="module")
def installed(dist, tmp_path_factory) -> Path:
    """A folder with the wheel's contents, as an installer lays them out."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(_one(dist, "*.whl")) as archive:
        archive.extractall(folder)
    return folder


def _run(installed: Path, cwd: Path, *command: str) -> str:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("FI_CUPY_", "FLASHINFER_"))}
    env |= {"PYTHONPATH": str(installed), "FI_CUPY_CACHE_DIR": str(cwd / "cache"), "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, *command], env=env, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_installed_copy_finds_its_own_kernels(installed, tmp_path):
    code = "from fi_cupy.jit.sources import kernel_root, template_root; print(kernel_root()); print(template_root())"
    roots = _run(installed, tmp_path, "-c", code).splitlines()
    assert roots == [str(installed / "fi_cupy" / "_kernels"), str(installed / "fi_cupy" / "_templates")]


def test_installed_copy_runs_and_compiles(installed, tmp_path):
    code = "import numpy as np, fi_cupy; x = np.ones((2, 8), np.float32); print(fi_cupy.rmsnorm(x, x[0]).sum())"
    assert float(_run(installed, tmp_path, "-c", code)) == pytest.approx(16, rel=1e-4)
    pytest.importorskip("cupy", reason="compiling needs CuPy's NVRTC binding")
    out = _run(installed, tmp_path, "-m", "fi_cupy", "warmup", "--arch", "8.0", "--profile", "page")
    assert "0 were in the cache" in out


def test_editable_install_is_the_checkout_without_copies(tmp_path):
    code = (
        f"import hatchling.build, os; os.chdir({str(ROOT)!r}); print(hatchling.build.build_editable({str(tmp_path)!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(_one(tmp_path, "*.whl")) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        assert len(names) == 1
        assert names[0].endswith(".pth")
        assert Path(archive.read(names[0]).decode().strip()) == ROOT


def test_makefile_and_ci_agree_with_the_package():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test", "lint", "clean"):
        assert f"\n{target}:" in makefile
    ci = ROOT / ".ci" / "run"
    if ci.exists():  # the sdist has none
        assert os.access(ci, os.X_OK)
        assert "set -euo pipefail" in ci.read_text()
