"""The compiler children: what they return, how they fail, and that they never take their parent down."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
from kernel_jobs import nested_job, run_python, slow_job, toy_job

from fi_cupy.errors import CompileError, CudaUnavailableError, FiCupyError
from fi_cupy.jit.compiler import CompileJob, Worker, compile_job, compile_many, nvrtc_version, ptxas_figures
from fi_cupy.jit.cubin import resources

_OPTIONS = ("-arch=sm_80", "-default-device")
pytest.importorskip("cupy", reason="compiling needs CuPy's NVRTC binding")


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.close()


def _kill_idle(worker: Worker) -> None:
    process = worker._process
    assert process is not None
    process.kill()
    process.wait()


def _pid(worker: Worker) -> int:
    process = worker._process
    assert process is not None
    return process.pid


def _gone(pid: int, seconds: float = 10) -> bool:
    """Whether process `pid` has ended (or is a zombie) within `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("arch", ["75", "80", "90a", "120a"])
def test_result_holds_machine_code_and_figures(worker, arch):
    result = compile_job(toy_job(arch=arch), worker)
    assert result.code[:4] == b"\x7fELF"
    assert b"toy" in result.code
    assert 0 < result.registers < 64
    assert (result.stack_bytes, result.spill_bytes) == (0, 0)
    assert 0 < result.seconds < 60
    assert resources(result.code) == (result.registers, 0)


def test_figures_without_a_report_come_from_the_code(worker, monkeypatch):
    """As where NVRTC answers from a cache of its own, and ptxas says nothing."""
    known = compile_job(toy_job(), worker)
    ask = worker.request
    monkeypatch.setattr(worker, "request", lambda *given: {**ask(*given), "log": ""})
    assert compile_job(toy_job(), worker).registers == known.registers
    assert resources(b"not a cubin") == (0, 0)


def test_compute_target_gives_ptx(worker):
    job = toy_job()
    ptx = CompileJob(job.symbol, job.source, (), "compute_75", ("-arch=compute_75", *job.options[1:]))
    code = compile_job(ptx, worker).code
    assert b".target sm_75" in code
    assert b".entry toy" in code


def test_spills_are_counted(worker):
    source = """extern "C" __global__ void __launch_bounds__(1024) spill(float* out) {
      float v[200];
    #pragma unroll
      for (int i = 0; i < 200; ++i) v[i] = out[i * threadIdx.x];
      __syncthreads();
    #pragma unroll
      for (int i = 0; i < 200; ++i) out[i * 7 + threadIdx.x] = v[i] * v[199 - i];
    }"""
    job = CompileJob("spill", source, (), "80", ("-arch=sm_80", "-std=c++17", "--ptxas-options=-v"))
    result = compile_job(job, worker)
    assert result.spill_bytes > 0
    assert result.registers <= 64


def test_ptxas_figures_take_the_largest():
    log = (
        "  8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\nptxas info: Used 40 registers, 3 barriers\n"
    )
    assert ptxas_figures(log) == (40, 8, 16)
    assert ptxas_figures("") == (0, 0, 0)


@pytest.mark.parametrize(("name", "shown"), [("norm.cuh", "kernels/norm.cuh"), ("callers.cuh", "callers.cuh")])
def test_error_names_the_line_of_a_header(worker, name, shown):
    source = f'#include "{name}"\nextern "C" __global__ void k() {{}}\n'
    job = CompileJob("k", source, ((name, b"#pragma once\n\nint f() { return missing; }\n"),), "80", _OPTIONS)
    with pytest.raises(CompileError, match=rf"^k: {re.escape(shown)}:3: error: .*missing") as caught:
        compile_job(job, worker)
    assert caught.value.source == source
    assert caught.value.symbol == "k"
    assert f"{name}(3)" in caught.value.log
    assert isinstance(caught.value, FiCupyError)


def test_error_names_the_line_of_user_text(worker):
    source = 'int before;\n#line 1 "variant:mine"\nint ok;\nint bad = nothing;\nextern "C" __global__ void k() {}\n'
    with pytest.raises(CompileError, match=r"variant:mine:2: error"):
        compile_job(CompileJob("k", source, (), "80", _OPTIONS), worker)


def test_unknown_option_is_a_compile_error(worker):
    job = toy_job()
    with pytest.raises(CompileError, match="toy: NVRTC refused"):
        compile_job(CompileJob(job.symbol, job.source, (), "80", (*job.options, "--no-such-option")), worker)


@pytest.mark.parametrize(
    "source", ["", "\0", "é€ 漢", '#error "stop"', 'extern "C" __global__ void k(', "#include <nothing.h>"]
)
def test_odd_sources_never_hurt(worker, source):
    job = CompileJob("k", source, (), "80", _OPTIONS)
    try:
        compile_job(job, worker)
    except CompileError as error:
        assert error.source == source
    assert compile_job(toy_job(), worker).registers > 0


def test_nvrtc_segfault_is_a_compile_error():
    # A small stack makes NVRTC's recursive parser overflow for real; the child inherits the limit.
    code = """
import resource
resource.setrlimit(resource.RLIMIT_STACK, (1 << 20, 1 << 20))
from kernel_jobs import nested_job, toy_job
from fi_cupy.errors import CompileError
from fi_cupy.jit.compiler import compile_job
for _ in range(2):
    try:
        compile_job(nested_job())
    except CompileError as error:
        assert error.source == nested_job().source and error.symbol == "nested"
        print(error)
    print(compile_job(toy_job()).registers > 0)
"""
    lines = run_python(code).splitlines()
    assert len(lines) == 4
    for error, alive in zip(lines[::2], lines[1::2], strict=True):
        assert error.startswith("nested: the compiler crashed (SIGSEGV) on this source for 80.")
        assert alive == "True"


def test_nested_source_compiles_on_an_ordinary_stack(worker):
    assert compile_job(nested_job(100), worker).registers > 0


def test_killed_worker_is_a_compile_error_and_replaced(worker):
    compile_job(toy_job(), worker)
    pid = _pid(worker)
    killer = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killer.start()
    with pytest.raises(CompileError, match=r"slow: the compiler crashed \(SIGKILL\)") as caught:
        compile_job(slow_job(length=3000), worker)
    killer.join()
    assert caught.value.source == slow_job(length=3000).source
    assert compile_job(toy_job(), worker).registers > 0
    assert _pid(worker) != pid


def test_worker_that_died_while_idle_is_replaced(worker):
    compile_job(toy_job(), worker)
    _kill_idle(worker)
    assert compile_job(toy_job(), worker).registers > 0


def test_timeout_kills_the_worker(worker, monkeypatch):
    compile_job(toy_job(), worker)
    pid = _pid(worker)
    monkeypatch.setenv("FI_CUPY_COMPILE_TIMEOUT", "0.5")
    with pytest.raises(CompileError, match=r"slow: the compiler took longer than 0\.5 s"):
        compile_job(slow_job(length=3000), worker)
    assert _gone(pid)
    monkeypatch.delenv("FI_CUPY_COMPILE_TIMEOUT")
    assert compile_job(toy_job(), worker).registers > 0


def test_threads_share_one_worker(worker):
    results: dict[int, bytes] = {}

    def compile_value(value: int) -> None:
        results[value] = compile_job(toy_job(f"toy{value}", value=value), worker).code

    threads = [threading.Thread(target=compile_value, args=(v,)) for v in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list(range(8))
    for value, code in results.items():
        assert f"toy{value}".encode() in code  # no thread got another's answer


def test_compile_many_yields_results_and_errors_and_ends_its_children():
    workers = []

    def work(job: CompileJob, worker: Worker):
        result = compile_job(job, worker)
        workers.append(_pid(worker))
        return result

    bad = CompileJob("bad", "nonsense", (), "80", _OPTIONS)
    jobs = [toy_job(f"toy{i}", value=i) for i in range(6)]
    outcomes = dict(compile_many([*jobs, bad], 2, work))
    assert set(outcomes) == {*jobs, bad}
    assert isinstance(outcomes[bad], CompileError)
    for job in jobs:
        assert job.symbol.encode() in outcomes[job].code
    assert len(set(workers)) <= 2
    assert all(_gone(pid) for pid in workers)


def test_fork_gets_a_worker_of_its_own():
    code = """
import os
from kernel_jobs import toy_job
from fi_cupy.jit import compiler
compiler.compile_job(toy_job())
mine = compiler._worker._process.pid
child = os.fork()
if child == 0:
    ok = compiler.compile_job(toy_job()).registers > 0 and compiler._worker._process.pid != mine
    compiler._worker.close()
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0
assert compiler.compile_job(toy_job()).registers > 0 and compiler._worker._process.pid == mine
print("done")
"""
    assert run_python(code).strip() == "done"


def test_worker_ends_with_its_parent():
    code = """
from kernel_jobs import toy_job
from fi_cupy.jit import compiler
compiler.compile_job(toy_job())
print(compiler._worker._process.pid)
"""
    assert _gone(int(run_python(code)))


def test_without_cupy_the_error_says_what_to_install():
    code = """
import sys
sys.modules["cupy"] = None
from kernel_jobs import toy_job
from fi_cupy.errors import CudaUnavailableError
from fi_cupy.jit.build import build_job
try:
    build_job(toy_job())
except CudaUnavailableError as error:
    print(error)
"""
    assert "Install fi_cupy[cuda13] or fi_cupy[cuda12]" in run_python(code)


def test_without_python_executable_the_error_says_so(worker, monkeypatch):
    monkeypatch.setattr("sys.executable", "")
    with pytest.raises(CudaUnavailableError, match=r"sys\.executable is empty"):
        compile_job(toy_job(), worker)


def test_nvrtc_version():
    major, minor = nvrtc_version()
    assert major >= 12
    assert minor >= 0
