"""The cubin cache: content-addressed, shared by any number of processes, never able to break a correct program.

Layout: ``<root>/<arch>/<symbol>-<key16>/{kernel.cu, kernel.cubin | kernel.ptx, kernel.json}``. The key is a sha256 over
the schema version, target, NVRTC version, options, rendered source and every header it includes, so an entry is never
stale, only unused. Entries are made in a temporary folder and renamed into place: a reader sees all of one or nothing.
``kernel.json`` holds the sha256 of the code, checked on every load: whatever does not fit is a miss.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fi_cupy.jit.compiler import CompileJob, CompileResult

SCHEMA = 1
_META = "kernel.json"
_SOURCE = "kernel.cu"
_TEMPORARY = ".tmp-"
_NO_ARCHS = ("locks", "tuned")  # folders under the root that hold no kernels


@dataclass(frozen=True)
class KernelMeta:
    """What is stored beside the code of one kernel."""

    schema: int
    symbol: str
    arch: str
    key: str
    nvrtc: str
    code_sha256: str
    code_bytes: int
    registers: int
    stack_bytes: int
    spill_bytes: int
    seconds: float
    created: float
    pid: int


@dataclass(frozen=True)
class CachedKernel:
    """One compiled kernel: its code, and its file unless it lives in memory only."""

    meta: KernelMeta
    code: bytes
    path: Path | None


def job_key(job: CompileJob, nvrtc: tuple[int, int]) -> str:
    """The content key of `job` under an NVRTC version."""
    digest = hashlib.sha256()
    parts: list[bytes] = [
        str(SCHEMA).encode(), job.symbol.encode(), job.arch.encode(), f"{nvrtc[0]}.{nvrtc[1]}".encode(),
        *(o.encode() for o in job.options), job.source.encode(),
    ]  # fmt: skip
    for name, text in job.headers:
        parts += [name.encode(), text]
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


class KernelCache:
    """The cache under one folder. Every method survives a missing, read-only, full or corrupt folder."""

    _warned = False

    def __init__(self, root: Path) -> None:
        self.root = root

    def entry_dir(self, arch: str, symbol: str, key: str) -> Path:
        """The folder of one entry."""
        return self.root / arch / f"{symbol}-{key[:16]}"

    def get(self, arch: str, symbol: str, key: str) -> CachedKernel | None:
        """The entry with this key, or None if there is none or it does not hold together."""
        return read_entry(self.entry_dir(arch, symbol, key), key)

    def put(self, job: CompileJob, key: str, nvrtc: tuple[int, int], result: CompileResult) -> CachedKernel:
        """Store a result; where the folder cannot be written, warn once and return it from memory."""
        meta = KernelMeta(
            SCHEMA, job.symbol, job.arch, key, f"{nvrtc[0]}.{nvrtc[1]}", hashlib.sha256(result.code).hexdigest(),
            len(result.code), result.registers, result.stack_bytes, result.spill_bytes, round(result.seconds, 4),
            time.time(), os.getpid(),
        )  # fmt: skip
        final = self.entry_dir(job.arch, job.symbol, key)
        name = _code_name(job.arch)
        temporary: str | None = None
        try:
            final.parent.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.mkdtemp(prefix=_TEMPORARY, dir=final.parent)
            folder = Path(temporary)
            folder.chmod(0o755)
            (folder / _SOURCE).write_text(job.source)
            (folder / name).write_bytes(result.code)
            (folder / _META).write_text(json.dumps(asdict(meta), indent=1))
            rename_into_place(folder, final)
            return CachedKernel(meta, result.code, final / name)
        except OSError as error:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            self._warn(error)
            return CachedKernel(meta, result.code, None)

    def _warn(self, error: OSError) -> None:
        if not KernelCache._warned:
            KernelCache._warned = True
            warnings.warn(
                f"fi_cupy: the kernel cache {self.root} cannot be written ({error.strerror or error}); kernels are "
                "compiled again in every process. Set FI_CUPY_CACHE_DIR to a writable folder",
                RuntimeWarning,
                stacklevel=2,
            )

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the lock of one key, so that processes that miss together compile once.

        The lock is the operating system's (flock): it ends with its process, however that ends. Where the folder
        cannot be written there is nothing to share, and no lock is taken.
        """
        import filelock

        lock: Any = None
        try:
            folder = self.root / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(folder / f"{key[:16]}.lock")
            lock.acquire(timeout=600)
        except (OSError, filelock.Timeout, NotImplementedError):
            lock = None
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def entries(self) -> Iterator[tuple[Path, CachedKernel | None]]:
        """Every entry folder with what it holds; None where it does not hold together."""
        try:
            arch_dirs = sorted(
                d for d in self.root.iterdir() if d.is_dir() and d.name not in _NO_ARCHS and d.name[0] != "."
            )
        except OSError:
            return
        for arch_dir in arch_dirs:
            for folder in sorted(arch_dir.iterdir()):
                if folder.is_dir() and not folder.name.startswith(_TEMPORARY):
                    yield folder, read_entry(folder, None)

    def prune(self, keep: set[str] | None = None, older_than: float = 0.0) -> list[Path]:
        """Remove broken entries, abandoned temporary folders, and entries whose key is not in `keep`.

        Parameters
        ----------
        keep : set of str or None
            Keys to keep; None keeps every entry that holds together.
        older_than : float
            Seconds: entries younger than this are kept whatever their key.
        """
        removed = []
        now = time.time()
        for folder, kernel in self.entries():
            stale = kernel is not None and keep is not None and kernel.meta.key not in keep
            if kernel is None or (stale and now - kernel.meta.created >= older_than):
                shutil.rmtree(folder, ignore_errors=True)
                removed.append(folder)
        for temporary in [*self.root.glob(f"*/{_TEMPORARY}*"), *self.root.glob(f"{_TEMPORARY}*")]:
            if now - temporary.stat().st_mtime > 3600:
                shutil.rmtree(temporary, ignore_errors=True)
                removed.append(temporary)
        return removed

    def clear(self) -> int:
        """Remove every entry; return how many there were."""
        count = 0
        for folder, _ in list(self.entries()):
            shutil.rmtree(folder, ignore_errors=True)
            count += 1
        shutil.rmtree(self.root / "locks", ignore_errors=True)
        return count


def _code_name(arch: str) -> str:
    return "kernel.ptx" if arch.startswith("compute_") else "kernel.cubin"


def entry_members(arch: str) -> tuple[str, str, str]:
    """Names of the files of an entry: source, code, metadata."""
    return _SOURCE, _code_name(arch), _META


def read_entry(folder: Path, key: str | None) -> CachedKernel | None:
    """The entry in a folder, or None if it does not hold together or has another key."""
    try:
        meta = KernelMeta(**json.loads((folder / _META).read_text()))
        if meta.schema != SCHEMA or (key is not None and meta.key != key):
            return None
        path = folder / _code_name(meta.arch)
        code = path.read_bytes()
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    if hashlib.sha256(code).hexdigest() != meta.code_sha256:
        return None
    return CachedKernel(meta, code, path)


def rename_into_place(folder: Path, final: Path) -> None:
    """Rename `folder` to `final`; what stands there already (a broken entry, or another process's) is replaced."""
    for _ in range(16):
        try:
            os.rename(folder, final)
            return
        except OSError:
            if not final.exists():
                raise
            # Move the old entry aside first: nobody may find half of one under the final name.
            aside = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=final.parent))
            with contextlib.suppress(OSError):
                os.rename(final, aside / "old")
            shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, final)
