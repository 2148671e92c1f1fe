"""Choices on disk: one JSON file for any number of machines and processes.

The file holds a section for each environment (GPU, driver, CUDA, NVRTC and fi_cupy versions). Only the section that was
measured in the reader's own environment counts; a choice made on other hardware or by other kernels says nothing.
Writers merge under a lock and replace the file by renaming, so that a reader sees all of one version or another.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fi_cupy.device import DeviceInfo
from fi_cupy.errors import CacheError

log = logging.getLogger("fi_cupy.autotuner")
SCHEMA = 1
#: Where files of tuned choices lie under the kernel cache.
FOLDER = "tuned"
FILE = "choices.json"
Environment = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Entry:
    """A choice and what it is worth.

    Attributes
    ----------
    runner : str
        Class name of the runner.
    tactic
        Numbers, texts and tuples of such.
    us, fallback_us : float
        Measured microseconds of the tactic, and of what runs untuned (NaN if that failed).
    ranking : tuple of (runner, tactic, us)
        The fastest, best first.
    """

    runner: str
    tactic: Any
    us: float
    fallback_us: float
    ranking: tuple[tuple[str, Any, float], ...] = ()


Table = dict[str, Entry]


@lru_cache(maxsize=16)
def environment(device: DeviceInfo) -> Environment:
    """What a choice depends on beside its problem: the GPU and the versions of all that made and ran its kernels."""
    from fi_cupy.jit.compiler import nvrtc_version

    try:
        from cupy.cuda import runtime

        driver, cuda = int(runtime.driverGetVersion()), int(runtime.runtimeGetVersion())
    except Exception:  # no CuPy or no driver: nothing can be measured, but files can be looked at
        driver = cuda = 0
    values = {
        "fi_cupy": sys.modules["fi_cupy"].__version__,  # the package above, which is loaded whenever this is
        "gpu": device.name,
        "multiprocessors": str(device.num_sms),
        "target": device.arch,
        "driver": _version(driver),
        "cuda": _version(cuda),
        "nvrtc": ".".join(map(str, nvrtc_version())),
    }
    return tuple(values.items())


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def read(path: Path) -> dict[Environment, Table]:
    """Every section of a file.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    CacheError
        It cannot be read, or is no file of tuned choices.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CacheError(f"autotuner: {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise CacheError(f"autotuner: {path} is no JSON file: {error}") from None
    try:
        if document["schema"] != SCHEMA:
            raise CacheError(f"autotuner: {path} has schema {document['schema']!r}, expected {SCHEMA}")
        return {
            tuple(section["environment"].items()): {key: _entry(given) for key, given in section["choices"].items()}
            for section in document["sections"]
        }
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CacheError(f"autotuner: {path} is no file of tuned choices ({type(error).__name__}: {error})") from None


def _entry(given: Mapping[str, Any]) -> Entry:
    ranking = tuple((str(r), _tactic(t), float(us)) for r, t, us in given.get("ranking", ()))
    fallback = given["fallback_us"]
    return Entry(
        str(given["runner"]), _tactic(given["tactic"]), float(given["us"]),
        float("nan") if fallback is None else float(fallback), ranking,
    )  # fmt: skip


def _tactic(value: Any) -> Any:
    """A tactic as it was before it became JSON: lists were tuples."""
    return tuple(map(_tactic, value)) if isinstance(value, list) else value


def differences(found: Environment, wanted: Environment) -> str:
    """What tells two environments apart, for people."""
    ours = dict(wanted)
    theirs = dict(found)
    names = [*ours, *(n for n in theirs if n not in ours)]
    return ", ".join(f"{n} {theirs.get(n)} instead of {ours.get(n)}" for n in names if theirs.get(n) != ours.get(n))


def merge_into(path: Path, tables: Mapping[Environment, Mapping[str, Entry]]) -> dict[Environment, Table]:
    """Add choices to a file, which need not exist: those of other processes and machines stay.

    Returns
    -------
    dict
        What the file holds now.

    Raises
    ------
    CacheError
        The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            try:
                sections = read(path)
            except FileNotFoundError:
                sections = {}
            except CacheError as error:
                log.warning("%s; it is replaced", error)
                sections = {}
            for env, table in tables.items():
                sections.setdefault(env, {}).update(table)
            _replace(path, _document(sections))
    except OSError as error:
        raise CacheError(f"autotuner: {path} cannot be written: {error.strerror or error}") from None
    return sections


def _document(sections: Mapping[Environment, Mapping[str, Entry]]) -> str:
    listed = []
    for env, table in sorted(sections.items()):
        choices = {}
        for key, e in sorted(table.items()):
            fallback = None if e.fallback_us != e.fallback_us else round(e.fallback_us, 3)
            ranking = [[r, t, round(us, 3)] for r, t, us in e.ranking]
            choices[key] = {
                "runner": e.runner, "tactic": e.tactic, "us": round(e.us, 3), "fallback_us": fallback,
                "ranking": ranking,
            }  # fmt: skip
        listed.append({"environment": dict(env), "choices": choices})
    return json.dumps({"schema": SCHEMA, "sections": listed}, indent=1) + "\n"


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """The file's lock, as long as there are locks in this folder; without, two writers may lose a choice, no more."""
    import filelock

    lock = filelock.FileLock(path.with_name(path.name + ".lock"))
    taken = False
    try:
        lock.acquire(timeout=60)
        taken = True
    except (filelock.Timeout, NotImplementedError):
        log.warning("autotuner: no lock on %s; writing without", path)
    try:
        yield
    finally:
        if taken:
            lock.release()
