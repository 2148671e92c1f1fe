"""The receipt: what a GPU run of ``tests/gpu`` leaves behind, and what kernels are held against without a GPU.

A run of all of ``tests/gpu`` writes ``tests/gpu/receipt.json`` (FI_CUPY_RECEIPT names another place): device, versions,
counts, failures, the sha256 of every kernel header with all it includes and of every template, and how many kernels of
each header were run. ``tests/cpu/test_receipt.py`` fails when a file has changed since, unless
``tests/gpu/unverified.txt`` names it with a reason (``norm.cuh: reason``).

``python tests/gpu_receipt.py`` prints the lines that ``unverified.txt`` needs now.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
GPU_TESTS = ROOT / "tests" / "gpu"
RECEIPT = Path(os.environ.get("FI_CUPY_RECEIPT") or GPU_TESTS / "receipt.json")
UNVERIFIED = GPU_TESTS / "unverified.txt"
#: Why a test was skipped that `--seconds` left no time for, and the share of such tests that a receipt may have.
NO_TIME = "not begun in the time given"
MOST_NOT_BEGUN = 0.02


def source_hashes() -> dict[str, str]:
    """Name → sha256 of each kernel header with its includes ("norm.cuh"), and of each template ("templates/...")."""
    from fi_cupy.jit.sources import header_closure, kernel_root, template_root

    hashes = {}
    for path in sorted(kernel_root().rglob("*.cuh")):
        name = path.relative_to(kernel_root()).as_posix()
        digest = hashlib.sha256()
        for part, text in header_closure(f'#include "{name}"\n'.encode()).items():
            digest.update(f"{part}\0{len(text)}\0".encode() + text)
        hashes[name] = digest.hexdigest()
    for path in sorted(template_root().iterdir()):
        hashes[f"templates/{path.name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return hashes


def kernel_headers() -> set[str]:
    """The headers that hold kernels (others are only included)."""
    from fi_cupy.profiles import all_specs

    return {spec.header for spec in all_specs()}


def unverified(text: str) -> dict[str, str]:
    """Name → reason, from the text of ``unverified.txt``; empty lines and lines that begin with # do not count."""
    rows = [line.strip() for line in text.splitlines()]
    pairs = [row.partition(":") for row in rows if row and not row.startswith("#")]
    return {name.strip(): reason.strip() for name, _, reason in pairs}


def stale_files(receipt: dict[str, Any], hashes: dict[str, str], headers: set[str]) -> dict[str, str]:
    """Name → why the receipt says nothing about this file as it is now."""
    stale = {}
    for name, sha in hashes.items():
        if name not in receipt.get("sources", {}):
            stale[name] = "not in the receipt"
        elif receipt["sources"][name] != sha:
            stale[name] = "changed since the GPU run, itself or in what it includes"
        elif name in headers and not receipt.get("kernels_run", {}).get(name):
            stale[name] = "none of its kernels was run"
    return stale


def complaints(
    receipt: dict[str, Any], hashes: dict[str, str], headers: set[str], excuses: dict[str, str]
) -> list[str]:
    """What is wrong with the receipt; empty if the kernels as they are have passed on a GPU or are excused."""
    stale = stale_files(receipt, hashes, headers)
    lines = [f"{name}: {why}" for name, why in stale.items() if name not in excuses]
    lines += [f"{name}: named in {UNVERIFIED.name} without a reason" for name, why in excuses.items() if not why]
    for name in excuses:
        if name not in hashes:
            lines.append(f"{name}: named in {UNVERIFIED.name}, but there is no such file")
        elif name not in stale:
            lines.append(f"{name}: verified by the receipt, so take it out of {UNVERIFIED.name}")
    if receipt:
        lines += [f"failed on the GPU: {test}" for test in receipt["failures"]]
        if receipt["counts"]["failed"] and not receipt["failures"]:
            lines.append(f"{receipt['counts']['failed']} tests failed on the GPU")
        if not receipt["counts"]["passed"]:
            lines.append("no test passed on the GPU")
        not_begun = receipt.get("skips", {}).get(NO_TIME, 0)
        if not_begun > MOST_NOT_BEGUN * sum(receipt["counts"].values()):
            lines.append(f"{not_begun} tests were {NO_TIME}")
    return lines


def describe_device() -> dict[str, Any]:
    """GPU, driver and versions of this machine."""
    import importlib.metadata
    import platform

    import cupy
    from cupy.cuda import runtime

    from fi_cupy.device import device_info
    from fi_cupy.jit.compiler import nvrtc_version

    def cuda(number: int) -> str:
        return f"{number // 1000}.{number % 1000 // 10}"

    frameworks = {}
    for name in ("torch", "jax"):
        try:
            frameworks[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            frameworks[name] = "not installed"
    info = device_info(0)
    return {
        "device": info.name,
        "compute_capability": f"{info.number // 10}.{info.number % 10}",
        "driver_cuda": cuda(runtime.driverGetVersion()),
        "runtime_cuda": cuda(runtime.runtimeGetVersion()),
        "nvrtc": ".".join(map(str, nvrtc_version())),
        "cupy": cupy.__version__,
        **frameworks,
        "python": platform.python_version(),
    }


def loaded_kernels() -> dict[str, int]:
    """Header → kernels of it that this process has loaded on a GPU."""
    module = sys.modules.get("fi_cupy.jit.kernel")
    if module is None:
        return {}
    return dict(Counter(spec.header for spec, _ in module._kernels))


class Recorder:
    """A pytest plugin that counts outcomes and writes the receipt when all of `folder` has run.

    Parameters
    ----------
    folder : Path
        The tests that have to run for a receipt.
    path : Path
        Where it is written.
    describe : callable
        Gives device and versions.
    kernels : callable
        Gives header → number of kernels run.
    """

    def __init__(
        self,
        folder: Path,
        path: Path,
        describe: Callable[[], dict[str, Any]] = describe_device,
        kernels: Callable[[], dict[str, int]] = loaded_kernels,
    ) -> None:
        self.folder, self.path, self.describe, self.kernels = folder, path, describe, kernels
        self.outcomes: dict[str, str] = {}
        self.skips: Counter[str] = Counter()
        self.deselected = 0
        self.run: Counter[str] = Counter()
        self.written = False

    def pytest_deselected(self, items: list[Any]) -> None:
        self.deselected += len(items)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
        elif report.skipped:
            self._skip(report)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.outcomes[report.nodeid] = "failed"
        elif report.skipped:
            self.outcomes.setdefault(report.nodeid, "skipped")
            self._skip(report)
        elif report.when == "call":
            self.outcomes.setdefault(report.nodeid, "passed")

    def _skip(self, report: Any) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        self.skips[reason.removeprefix("Skipped: ")] += 1

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any, error: object) -> None:
        """A worker of pytest-xdist has ended: take over what it has run."""
        output = getattr(node, "workeroutput", {})
        self.run.update(output.get("fi_cupy_kernels", {}))
        self.deselected += output.get("fi_cupy_deselected", 0)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            output["fi_cupy_kernels"] = dict(self.kernels())
            output["fi_cupy_deselected"] = self.deselected
            return
        self.run.update(self.kernels())
        if self._complete(session, exitstatus):
            self.write()

    def _complete(self, session: pytest.Session, exitstatus: int) -> bool:
        """Whether all of the folder ran: no selection, no interruption, no stop at a first failure."""
        whole = [
            Path(argument.partition("::")[0]).resolve() for argument in session.config.args if "::" not in argument
        ]
        covers = any(path == self.folder or path in self.folder.parents for path in whole)
        stopped = bool(session.shouldstop or session.shouldfail)
        return covers and not self.deselected and not stopped and exitstatus in (0, 1) and bool(self.outcomes)

    def write(self) -> None:
        """Write the receipt."""
        counts = Counter(self.outcomes.values())
        receipt = {
            **self.describe(),
            "date": time.strftime("%Y-%m-%d", time.gmtime()),
            "counts": {name: counts[name] for name in ("passed", "failed", "skipped")},
            "failures": sorted(test for test, outcome in self.outcomes.items() if outcome == "failed"),
            "skips": dict(sorted(self.skips.items())),
            "kernels_run": dict(sorted(self.run.items())),
            "sources": source_hashes(),
        }
        self.path.write_text(json.dumps(receipt, indent=1) + "\n")
        self.written = True

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        text = f"receipt written to {self.path}" if self.written else "no receipt: not all of tests/gpu ran on a GPU"
        terminalreporter.write_line(text)


def main() -> None:
    """Print a line for each file that the receipt does not vouch for."""
    receipt = json.loads(RECEIPT.read_text()) if RECEIPT.exists() else {}
    for name, why in stale_files(receipt, source_hashes(), kernel_headers()).items():
        print(f"{name}: {why}")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
