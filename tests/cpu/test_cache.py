"""The cubin cache under everything that can happen to a folder: each case must end in the right kernel."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from kernel_jobs import ROOT, python, run_python, slow_job, toy_job

from fi_cupy.errors import CompileError, MissingKernelError
from fi_cupy.jit import sources
from fi_cupy.jit.build import build_job, job_for, stats
from fi_cupy.jit.cache import SCHEMA, CachedKernel, KernelCache, job_key
from fi_cupy.jit.compiler import CompileJob, compile_job, nvrtc_version

pytest.importorskip("cupy", reason="compiling needs CuPy's NVRTC binding")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A cold cache of this test's own, and the warning about unwritable folders armed again."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FI_CUPY_CACHE_DIR", str(folder))
    monkeypatch.delenv("FI_CUPY_NO_COMPILE", raising=False)
    monkeypatch.delenv("FLASHINFER_DISABLE_JIT", raising=False)
    monkeypatch.setattr(KernelCache, "_warned", False)
    return folder


@pytest.fixture(scope="module")
def expected() -> bytes:
    """The machine code of `toy_job()`, compiled without any cache."""
    return compile_job(toy_job()).code


def _compiled(job: CompileJob) -> tuple[CachedKernel, int]:
    """`build_job`, and how many compilations it took."""
    before = stats.compiled
    kernel = build_job(job)
    return kernel, stats.compiled - before


def _entry(root: Path, symbol: str = "toy") -> Path:
    (folder,) = (root / "80").glob(f"{symbol}-*")
    return folder


def _assert_clean(root: Path) -> None:
    """No half-made entry is left, and every entry holds together."""
    assert not list(root.glob("*/.tmp-*"))
    assert all(kernel is not None for _, kernel in KernelCache(root).entries())


# --- the plain way -------------------------------------------------------------------------------------------------


def test_second_build_compiles_nothing(root, expected):
    first, compiled = _compiled(toy_job())
    assert compiled == 1
    assert first.code == expected
    assert first.path is not None
    assert first.path.read_bytes() == expected
    again, compiled = _compiled(toy_job())
    assert compiled == 0
    assert again == first
    folder = _entry(root)
    assert sorted(p.name for p in folder.iterdir()) == ["kernel.cu", "kernel.cubin", "kernel.json"]
    assert (folder / "kernel.cu").read_text() == toy_job().source
    meta = json.loads((folder / "kernel.json").read_text())
    assert meta["symbol"] == "toy"
    assert meta["registers"] > 0
    assert meta["spill_bytes"] == 0
    assert meta["seconds"] > 0
    assert meta["nvrtc"] == "{}.{}".format(*nvrtc_version())
    _assert_clean(root)


def test_refused_source_leaves_no_entry(root):
    for _ in range(2):
        with pytest.raises(CompileError):
            build_job(replace(toy_job(), source="nonsense"))
    assert list(KernelCache(root).entries()) == []


@pytest.mark.parametrize("variable", ["FI_CUPY_NO_COMPILE", "FLASHINFER_DISABLE_JIT"])
def test_no_compile_raises_and_names_the_kernel_and_the_command(root, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    with pytest.raises(MissingKernelError, match=r"^toy: .*fi-cupy warmup --arch 80") as caught:
        build_job(toy_job())
    assert str(root) in str(caught.value)
    monkeypatch.delenv(variable)
    build_job(toy_job())
    monkeypatch.setenv(variable, "1")
    assert _compiled(toy_job())[1] == 0


# --- the key -------------------------------------------------------------------------------------------------------


def test_key_changes_with_everything_the_compiler_sees():
    job = replace(toy_job(), headers=(("a.cuh", b"1"), ("b.cuh", b"2")))
    jobs = [
        job,
        replace(job, symbol="toy2"),
        replace(job, source=job.source + " "),
        replace(job, arch="86"),
        replace(job, options=(*job.options, "-lineinfo")),
        replace(job, options=job.options[::-1]),
        replace(job, headers=(("a.cuh", b"1"), ("b.cuh", b"3"))),
        replace(job, headers=(("a.cuh", b"1"), ("c.cuh", b"2"))),
        replace(job, headers=(("a.cuh", b"1"),)),
        replace(job, headers=(("a.cuh", b"1b.cuh"), ("", b"2"))),  # the same bytes, cut elsewhere
    ]
    keys = [job_key(j, (13, 0)) for j in jobs] + [job_key(job, (13, 1)), job_key(job, (12, 0))]
    assert len(set(keys)) == len(keys)
    assert job_key(job, (13, 0)) == job_key(replace(job), (13, 0))


def test_schema_is_part_of_the_key(monkeypatch):
    before = job_key(toy_job(), (13, 0))
    monkeypatch.setattr(sys.modules[KernelCache.__module__], "SCHEMA", SCHEMA + 1)
    assert job_key(toy_job(), (13, 0)) != before


def test_header_edit_changes_the_key(tmp_path, monkeypatch):
    from fi_cupy import norm

    kernels = tmp_path / "kernels"
    shutil.copytree(sources.kernel_root(), kernels)
    monkeypatch.setattr(sources, "kernel_root", lambda: kernels)
    sources._read.cache_clear()
    spec = norm.kernel_specs()[0]

    def key() -> str:
        return job_key(job_for(spec, "80"), (13, 0))

    original = key()
    for name in ("norm.cuh", "common/base.cuh"):  # the kernel's own header, and one that others include
        header = kernels / name
        text = header.read_bytes()
        header.write_bytes(text + b"// edited\n")
        assert key() != original, name
        header.write_bytes(text)
        assert key() == original, name
    unrelated = kernels / "rope.cuh"
    unrelated.write_bytes(unrelated.read_bytes() + b"// edited\n")
    assert key() == original
    sources._read.cache_clear()


# --- many processes ------------------------------------------------------------------------------------------------

_CROWD = """
import hashlib, json, os, sys, time
from kernel_jobs import toy_job
from fi_cupy.jit.build import build_job, stats
print("ready", flush=True)
while not os.path.exists(sys.argv[1]):
    time.sleep(0.001)
codes = {}
for i in range(3):
    kernel = build_job(toy_job(f"toy{i}", value=i))
    codes[f"toy{i}"] = hashlib.sha256(kernel.path.read_bytes()).hexdigest()
print(json.dumps({"codes": codes, "compiled": stats.symbols}))
"""


def test_sixteen_processes_on_a_cold_cache_compile_each_kernel_once(root, tmp_path):
    processes = [python(_CROWD, str(tmp_path / "go")) for _ in range(16)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        (tmp_path / "go").touch()
        reports = []
        for process in processes:
            out, err = process.communicate(timeout=240)
            assert process.returncode == 0, err
            assert err == ""
            reports.append(json.loads(out))
    finally:
        for process in processes:
            process.kill()
    compiled = sorted(symbol for report in reports for symbol in report["compiled"])
    assert compiled == ["toy0", "toy1", "toy2"]
    assert all(report["codes"] == reports[0]["codes"] for report in reports)
    assert len(set(reports[0]["codes"].values())) == 3
    _assert_clean(root)


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_process_killed_while_compiling(root):
    code = "from kernel_jobs import slow_job\nfrom fi_cupy.jit.build import build_job\nbuild_job(slow_job())"
    process = python(code, FI_CUPY_VERBOSE="1")
    assert process.stderr is not None
    assert "compiling slow" in process.stderr.readline()
    until = time.monotonic() + 20
    while not (children := _children(process.pid)) and time.monotonic() < until:
        time.sleep(0.01)
    assert children
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    # Its lock went with it: this does not wait, and compiles the kernel.
    begin = time.monotonic()
    kernel, compiled = _compiled(slow_job())
    assert compiled == 1
    assert kernel.path is not None
    assert time.monotonic() - begin < 120
    _assert_clean(root)
    # The compiler child notices that nobody listens, and ends.
    until = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in children)


@pytest.mark.parametrize("step", ["write_text", "write_bytes", "rename"])
def test_process_killed_while_storing(root, expected, step):
    # Dies in the middle of the entry: before its source, its code, or its final name is there.
    code = f"""
import os, pathlib, signal
from kernel_jobs import toy_job
from fi_cupy.jit.build import build_job
def die(*a, **k): os.kill(os.getpid(), signal.SIGKILL)
if {step!r} == "rename": os.rename = die
else: pathlib.Path.{step} = die
build_job(toy_job())
"""
    process = python(code)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(list(root.glob("80/.tmp-*"))) == 1
    assert not list(root.glob("80/toy-*"))
    kernel, compiled = _compiled(toy_job())
    assert compiled == 1
    assert kernel.code == expected
    (left,) = root.glob("80/.tmp-*")
    assert KernelCache(root).prune() == []  # it might still be at work
    os.utime(left, (time.time() - 7200,) * 2)
    assert KernelCache(root).prune() == [left]
    assert _compiled(toy_job())[1] == 0


# --- broken entries ------------------------------------------------------------------------------------------------


def _truncate(n):
    return lambda f: (f / "kernel.cubin").write_bytes((f / "kernel.cubin").read_bytes()[:n])


def _flip(seed):
    def flip(folder: Path) -> None:
        code = bytearray((folder / "kernel.cubin").read_bytes())
        bit = random.Random(seed).randrange(len(code) * 8)
        code[bit // 8] ^= 1 << bit % 8
        (folder / "kernel.cubin").write_bytes(code)

    return flip


def _meta_text(text: bytes):
    return lambda f: (f / "kernel.json").write_bytes(text)


def _meta_set(**values):
    def change(folder: Path) -> None:
        meta = json.loads((folder / "kernel.json").read_text())
        (folder / "kernel.json").write_text(json.dumps({**meta, **values}))

    return change


def _meta_without(name: str):
    def change(folder: Path) -> None:
        meta = json.loads((folder / "kernel.json").read_text())
        del meta[name]
        (folder / "kernel.json").write_text(json.dumps(meta))

    return change


def _to_folder(name: str):
    def change(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return change


def _whole_to_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file where the entry should be")


DAMAGE = {
    "cubin-empty": _truncate(0),
    "cubin-half": _truncate(700),
    "cubin-last-byte": _truncate(-1),
    "cubin-longer": lambda f: (f / "kernel.cubin").open("ab").write(b"\0"),
    **{f"cubin-bit-{seed}": _flip(seed) for seed in range(6)},
    "cubin-gone": lambda f: (f / "kernel.cubin").unlink(),
    "cubin-folder": _to_folder("kernel.cubin"),
    "cubin-dangling-link": lambda f: ((f / "kernel.cubin").unlink(), (f / "kernel.cubin").symlink_to("nowhere")),
    "json-empty": _meta_text(b""),
    "json-cut": lambda f: (f / "kernel.json").write_text((f / "kernel.json").read_text()[:50]),
    "json-no-utf8": _meta_text(b"\xff\xfe\x00{"),
    "json-list": _meta_text(b"[1, 2]"),
    "json-null": _meta_text(b"null"),
    "json-number": _meta_text(b"7"),
    "json-other-keys": _meta_text(b'{"a": 1}'),
    "json-deep": _meta_text(b"[" * 100000),
    "json-gone": lambda f: (f / "kernel.json").unlink(),
    "json-folder": _to_folder("kernel.json"),
    "json-no-checksum": _meta_without("code_sha256"),
    "json-other-key": _meta_set(key="0" * 64),
    "json-arch-number": _meta_set(arch=80),
    "json-arch-ptx": _meta_set(arch="compute_80"),
    "json-null-checksum": _meta_set(code_sha256=None),
    "entry-empty": lambda f: [p.unlink() for p in f.iterdir()],
    "entry-is-file": _whole_to_file,
    "schema-older": _meta_set(schema=SCHEMA - 1),
    "schema-newer": _meta_set(schema=SCHEMA + 1, something_new=[1]),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_broken_entry_is_a_miss_and_is_replaced(root, expected, name):
    build_job(toy_job())
    DAMAGE[name](_entry(root))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernel, compiled = _compiled(toy_job())
        assert compiled == 1
        assert kernel.code == expected
        assert kernel.path is not None
        assert kernel.path.read_bytes() == expected
        assert _compiled(toy_job())[1] == 0
    _assert_clean(root)


@pytest.mark.parametrize("name", ["cubin-half", "cubin-bit-0", "json-cut", "json-gone", "schema-newer", "entry-empty"])
def test_broken_entries_are_seen_and_pruned(root, name):
    build_job(toy_job())
    build_job(toy_job("other", value=2))
    DAMAGE[name](_entry(root))
    store = KernelCache(root)
    assert sorted(k is None for _, k in store.entries()) == [False, True]
    assert [p.name.split("-")[0] for p in store.prune()] == ["toy"]
    assert [k.meta.symbol for _, k in store.entries()] == ["other"]


def test_no_compile_does_not_run_a_broken_entry(root, monkeypatch):
    build_job(toy_job())
    _flip(0)(_entry(root))
    monkeypatch.setenv("FI_CUPY_NO_COMPILE", "1")
    with pytest.raises(MissingKernelError):
        build_job(toy_job())


def test_foreign_files_in_the_cache_are_left_alone(root):
    build_job(toy_job())
    (root / "notes.txt").write_text("mine")
    (root / "80" / "README").write_text("mine")
    (root / "v0").mkdir()
    (root / "v0" / "old-layout.bin").write_bytes(b"\0" * 100)
    store = KernelCache(root)
    assert [k.meta.symbol for _, k in store.entries()] == ["toy"]
    assert store.prune() == []
    assert store.clear() == 1
    assert (root / "notes.txt").exists()
    assert (root / "80" / "README").exists()
    assert (root / "v0" / "old-layout.bin").exists()


# --- folders that cannot be written --------------------------------------------------------------------------------


def _assert_in_memory(expected: bytes) -> None:
    """Both builds give the right code from memory, with one warning altogether."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            kernel, compiled = _compiled(toy_job())
            assert compiled == 1
            assert kernel.code == expected
            assert kernel.path is None
    assert [w.category for w in caught] == [RuntimeWarning]
    assert "FI_CUPY_CACHE_DIR" in str(caught[0].message)


def test_file_in_place_of_the_cache(root, expected):
    root.write_text("a file")
    _assert_in_memory(expected)
    assert root.read_text() == "a file"
    assert list(KernelCache(root).entries()) == []
    assert KernelCache(root).prune() == []
    assert KernelCache(root).clear() == 0


def test_file_in_place_of_a_parent_folder(tmp_path, root, expected, monkeypatch):
    (tmp_path / "file").write_text("a file")
    monkeypatch.setenv("FI_CUPY_CACHE_DIR", str(tmp_path / "file" / "cache"))
    _assert_in_memory(expected)


def test_file_in_place_of_the_arch_and_lock_folders(root, expected):
    root.mkdir()
    (root / "80").write_text("a file")
    (root / "locks").write_text("a file")
    _assert_in_memory(expected)


def _failing(monkeypatch, owner, name, error_number):
    def fail(*args, **kwargs):
        raise OSError(error_number, os.strerror(error_number))

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("error_number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("owner,name", [(Path, "write_text"), (Path, "write_bytes"), (Path, "mkdir"), (os, "rename")])
def test_every_write_may_fail(root, expected, monkeypatch, owner, name, error_number):
    with monkeypatch.context() as patch:
        _failing(patch, owner, name, error_number)
        _assert_in_memory(expected)
    if root.exists():
        _assert_clean(root)
    assert _compiled(toy_job())[0].path is not None  # there is room again


_MOUNT = "mount -t tmpfs -o size={size} none {folder} && {then}exec {python} -c '{code}'"
_REPORT = """
import hashlib, json, warnings
from kernel_jobs import toy_job
from fi_cupy.jit.build import build_job, stats
rows = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for job in (toy_job("small", value=3), toy_job(padding=400000), toy_job(padding=400000)):
        kernel = build_job(job)
        rows.append([job.symbol, kernel.path is None, hashlib.sha256(kernel.code).hexdigest()])
print(json.dumps({"rows": rows, "compiled": stats.symbols, "warnings": [w.category.__name__ for w in caught]}))
"""


def _in_namespace(root: Path, size: str, then: str) -> dict:
    """Run `_REPORT` with a tmpfs of `size` as the cache, in a mount namespace of its own."""
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    root.mkdir()
    probe = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "mount", "-t", "tmpfs", "none", str(root)], capture_output=True
    )
    if probe.returncode != 0:
        pytest.skip(f"no mount namespace here: {probe.stderr.decode().strip()}")
    code = _REPORT.replace("'", '"')
    script = _MOUNT.format(size=size, folder=root, then=then, python=sys.executable, code=code)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{Path(__file__).parent}"}
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _hashes() -> list[str]:
    import hashlib

    jobs = (toy_job("small", value=3), toy_job(padding=400000), toy_job(padding=400000))
    return [hashlib.sha256(compile_job(job).code).hexdigest() for job in jobs]


def test_full_disk(root):
    # 200 KB hold the small kernel, not the one whose source has 400 KB.
    report = _in_namespace(root, "200k", "")
    assert [row[1] for row in report["rows"]] == [False, True, True]
    assert [row[2] for row in report["rows"]] == _hashes()
    assert report["compiled"] == ["small", "toy", "toy"]
    assert report["warnings"] == ["RuntimeWarning"]


def test_read_only_disk(root, tmp_path):
    # The small kernel was cached before the file system became read-only, and is still taken from there.
    warm = tmp_path / "warm"
    code = 'import kernel_jobs as k; from fi_cupy.jit.build import build_job; build_job(k.toy_job("small", value=3))'
    run_python(code, FI_CUPY_CACHE_DIR=str(warm))
    report = _in_namespace(root, "4m", f"cp -r {warm}/. {root} && mount -o remount,ro {root} && ")
    assert [row[1] for row in report["rows"]] == [False, True, True]
    assert [row[2] for row in report["rows"]] == _hashes()
    assert report["compiled"] == ["toy", "toy"]
    assert report["warnings"] == ["RuntimeWarning"]


# --- upkeep --------------------------------------------------------------------------------------------------------


def test_prune_by_key_and_age(root):
    kernels = [build_job(toy_job(f"toy{value}", value=value)) for value in range(3)]
    store = KernelCache(root)
    assert store.prune() == []
    assert store.prune(set(), older_than=3600) == []
    removed = store.prune({kernels[0].meta.key, kernels[1].meta.key})
    assert [p.name.split("-")[0] for p in removed] == ["toy2"]
    assert len(store.prune(set())) == 2
    assert list(store.entries()) == []


def test_clear(root):
    build_job(toy_job())
    assert KernelCache(root).clear() == 1
    assert KernelCache(root).clear() == 0
    assert _compiled(toy_job())[1] == 1
