"""NVRTC in child processes: one guarded worker for compilations on demand, a pool of them for bulk work.

A worker is a program (`worker.py`) that stays alive between jobs, so its start (importing CuPy) is paid once. When it
dies, by NVRTC's segfault or by the watchdog, the job's caller gets a `CompileError` and the next job a new worker.
NVRTC takes one lock inside a process: only processes make bulk compilation faster, threads do not.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fi_cupy.errors import CompileError, CudaUnavailableError
from fi_cupy.jit import env
from fi_cupy.jit.cubin import resources
from fi_cupy.jit.sources import kernel_root

_BOOT = "import sys,json,runpy; sys.path[:]=json.loads(sys.argv[1]); runpy.run_path(sys.argv[2], run_name='__main__')"


@dataclass(frozen=True)
class CompileJob:
    """One translation unit: everything NVRTC sees, so that equal jobs give equal code."""

    symbol: str
    source: str
    headers: tuple[tuple[str, bytes], ...]
    arch: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class CompileResult:
    """What came of a job: the cubin (or PTX), ptxas' figures and the time NVRTC took."""

    code: bytes
    log: str
    seconds: float
    registers: int
    stack_bytes: int
    spill_bytes: int


def target_options(arch: str) -> list[str]:
    """NVRTC's options for `arch`: ``"90a"`` is machine code for sm_90a, ``"compute_80"`` is PTX."""
    return [f"-arch={arch if arch.startswith('compute_') else f'sm_{arch}'}"]


@lru_cache(maxsize=1)
def include_dir() -> str:
    """The folder of CUDA's own headers (cuda_fp16.h), from a toolkit or the runtime wheel."""
    try:
        from cuda import pathfinder
    except ImportError:
        raise CudaUnavailableError(_INSTALL_ADVICE) from None
    found = pathfinder.find_nvidia_header_directory("cudart")
    if found is None or not (Path(found) / "cuda_fp16.h").is_file():
        raise CudaUnavailableError(
            "compile: CUDA's headers (cuda_fp16.h) were not found. Install nvidia-cuda-runtime (CUDA 13) or "
            "nvidia-cuda-runtime-cu12, or set CUDA_PATH to a toolkit; `fi-cupy info` lists what is there"
        )
    return found


_INSTALL_ADVICE = "compile: CuPy is not installed. Install fi_cupy[cuda13] or fi_cupy[cuda12] (compiling needs no GPU)"


@lru_cache(maxsize=1)
def nvrtc_version() -> tuple[int, int]:
    """NVRTC's (major, minor).

    Raises
    ------
    CudaUnavailableError
        CuPy or NVRTC is not installed.
    """
    try:
        from cupy.cuda import nvrtc
    except ImportError:
        raise CudaUnavailableError(_INSTALL_ADVICE) from None
    try:
        major, minor = nvrtc.getVersion()
    except Exception as error:
        raise CudaUnavailableError(
            f"compile: NVRTC cannot be loaded ({error}). Install nvidia-cuda-nvrtc (CUDA 13) or nvidia-cuda-nvrtc-cu12"
        ) from None
    return int(major), int(minor)


class Worker:
    """One compiler child. Not shared between threads at the same time: `compile` takes the worker's lock."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        self._lock = threading.Lock()

    def request(self, message: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send one message and wait for the answer.

        Raises
        ------
        WorkerDied
            The child ended before it answered.
        """
        with self._lock:
            process = self._start()
            timed_out = threading.Event()

            def expire() -> None:
                timed_out.set()
                process.kill()

            watchdog = threading.Timer(timeout, expire)
            watchdog.daemon = True
            watchdog.start()
            try:
                assert process.stdin is not None and process.stdout is not None
                blob = pickle.dumps(message)
                process.stdin.write(struct.pack("<Q", len(blob)) + blob)
                process.stdin.flush()
                head = process.stdout.read(8)
                if len(head) == 8:
                    length = struct.unpack("<Q", head)[0]
                    blob = process.stdout.read(length)
                    if len(blob) == length:
                        answer: dict[str, Any] = pickle.loads(blob)
                        return answer
            except OSError:
                pass  # a broken pipe: the child is gone
            finally:
                watchdog.cancel()
            code = process.wait()
            self._process = None
            raise WorkerDied(f"took longer than {timeout:g} s" if timed_out.is_set() else _describe_exit(code))

    def _start(self) -> subprocess.Popen[bytes]:
        process = self._process
        if process is not None and self._owner == os.getpid() and process.poll() is None:
            return process
        if not sys.executable:
            raise CudaUnavailableError("compile: sys.executable is empty, so no compiler process can be started")
        path = [p or os.getcwd() for p in sys.path]
        command = [sys.executable, "-c", _BOOT, json.dumps(path), str(Path(__file__).with_name("worker.py"))]
        # A child of a fork has the parent's pipes: it starts a worker of its own (the owner's pid tells).
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._owner = os.getpid()
        return self._process

    def close(self) -> None:
        """End the child."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    try:
                        pipe.close()
                    except OSError:
                        pass


class WorkerDied(Exception):
    """A compiler child ended before it answered."""


def _describe_exit(code: int) -> str:
    if code < 0:
        import signal

        try:
            return f"crashed ({signal.Signals(-code).name})"
        except ValueError:
            return f"crashed (signal {-code})"
    return f"ended with code {code}"


_worker = Worker()
atexit.register(_worker.close)


def compile_job(job: CompileJob, worker: Worker | None = None) -> CompileResult:
    """Compile `job` in a child process.

    Raises
    ------
    CompileError
        NVRTC refused the source (the message is its first diagnostic), crashed on it, or took too long.
    CudaUnavailableError
        The child has no NVRTC.
    """
    timeout = float(env.COMPILE_TIMEOUT.get() or 300)
    message = {
        "name": f"{job.symbol}.cu",
        "source": job.source,
        "headers": dict(job.headers),
        "options": [*job.options, f"-I{include_dir()}"],
        "ptx": job.arch.startswith("compute_"),
    }
    try:
        answer = (worker or _worker).request(message, timeout)
    except WorkerDied as died:
        text = _USER_TEXT.search(job.source)
        where = f"{text[1]}:1: " if text else ""
        raise CompileError(
            f"{job.symbol}: {where}the compiler {died} on this source for {job.arch}. "
            f"To see the source: `fi-cupy render {job.symbol}`, or this error's .source",
            symbol=job.symbol,
            source=job.source,
        ) from None
    if not answer["ok"]:
        if answer.get("broken"):
            raise CudaUnavailableError(f"compile: the compiler process cannot use NVRTC: {answer['log']}")
        raise CompileError(_diagnose(job, answer["log"]), symbol=job.symbol, source=job.source, log=answer["log"])
    figures = ptxas_figures(answer["log"])
    if not figures[0] and not message["ptx"]:  # NVRTC's own cache answered: ptxas did not run and reports nothing
        registers, frame = resources(answer["code"])
        figures = registers, frame, frame  # without an array of a thread's own, a frame holds what was spilled
    return CompileResult(answer["code"], answer["log"], answer["seconds"], *figures)


_USED = re.compile(r"Used (\d+) registers")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_DIAGNOSTIC = re.compile(
    r"^(?P<file>[^\s(][^(\n]*)\((?P<line>\d+)\): (?P<text>(?:catastrophic )?error.*)$", re.MULTILINE
)
#: What users wrote is compiled under names with a colon, "variant:name".
_USER_TEXT = re.compile(r'^#line 1 "(\w+:[^"]+)"', re.MULTILINE)
_CALLED_FROM = re.compile(r"at line (?P<line>\d+) of (?P<file>\w+:\S+)")


def ptxas_figures(log: str) -> tuple[int, int, int]:
    """(registers, stack frame bytes, spill bytes) of the entry kernel in ptxas' report; zeros for PTX."""
    registers = max((int(m) for m in _USED.findall(log)), default=0)
    stacks = [tuple(map(int, m)) for m in _STACK.findall(log)]
    return registers, max((s[0] for s in stacks), default=0), max((s[1] + s[2] for s in stacks), default=0)


def _diagnose(job: CompileJob, log: str) -> str:
    own = {name for name, _ in job.headers if (kernel_root() / name).is_file()}  # not the caller's
    match = _DIAGNOSTIC.search(log)
    if match is None:
        first = log.strip().splitlines()[0] if log.strip() else "no log"
        return f"{job.symbol}: NVRTC refused the source for {job.arch}: {first}"
    where, line = match["file"], match["line"]
    caller = _CALLED_FROM.search(log)
    if ":" not in where and caller is not None:  # an error inside our functions that the user's text calls
        where, line = caller["file"], caller["line"]
    where = f"kernels/{where}" if where in own else where
    return f"{job.symbol}: {where}:{line}: {match['text']} (target {job.arch}; the whole log: this error's .log)"


def compile_many(
    jobs: Iterable[CompileJob], processes: int, worker_of: Callable[[CompileJob, Worker], Any] | None = None
) -> Iterator[tuple[CompileJob, Any]]:
    """Compile `jobs` on `processes` children; yield (job, result or exception) as each ends.

    ``worker_of(job, worker)`` replaces the plain compilation, so that a caller can put its cache around it.
    """
    work = worker_of or compile_job
    idle: list[Worker] = [Worker() for _ in range(max(1, processes))]
    workers = list(idle)

    def run(job: CompileJob) -> Any:
        worker = idle.pop()
        try:
            return work(job, worker)
        finally:
            idle.append(worker)

    try:
        with ThreadPoolExecutor(max_workers=len(workers)) as pool:
            futures = {pool.submit(run, job): job for job in jobs}
            for future in as_completed(futures):
                error = future.exception()
                yield futures[future], error if error is not None else future.result()
    finally:
        for worker in workers:
            worker.close()
