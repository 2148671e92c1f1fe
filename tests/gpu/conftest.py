"""GPU tests: skipped without a GPU; a whole run of them on one leaves a receipt."""

from __future__ import annotations

import os
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import IO

import pytest
from gpu_receipt import GPU_TESTS, NO_TIME, RECEIPT, Recorder

from fi_cupy import prefill_kernel
from fi_cupy.device import device_info, num_devices

BEGAN = time.monotonic()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seconds", type=float, help="begin no test of tests/gpu after this long; the receipt counts those left out"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    if rank(item) != 1:
        Phase.end()
    limit = item.config.getoption("--seconds", None)
    if limit is not None and Path(__file__).parent in item.path.parents and time.monotonic() - BEGAN > limit:
        pytest.skip(NO_TIME)


def pytest_configure(config: pytest.Config) -> None:
    if num_devices():
        config.pluginmanager.register(Recorder(GPU_TESTS, RECEIPT), "fi_cupy_receipt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if num_devices() == 0:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no GPU: these tests run where CuPy finds one"))
    # `--dist worksteal` deals the list out in pieces of these sizes: each begins with tests that want the GPU to
    # themselves, then with long ones, which end with the others.
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if num_devices() and processes > 1:
        first = sorted(filter(rank, items), key=rank)
        others = iter([x for x in items if not rank(x)])
        left = len(items)
        items.clear()
        for i in range(processes):
            size = left // (processes - i)
            items += (*first[i::processes], *islice(others, size - len(first[i::processes])))
            left -= size
        if any(rank(x) == 1 for x in first):
            Phase.begin()


def rank(item: pytest.Item) -> int:
    """1 and 2 for tests that come first, 0 for the others."""
    return 1 if item.get_closest_marker("alone") else 2 if item.get_closest_marker("long") else 0


class Phase:
    """Keeps other tests waiting until those marked `alone` have ended in all processes of a run.

    Each process holds a lock that it shares with the others until its own have ended; who gets it alone knows that all
    have. compute-sanitizer does not come to an end beside a dozen processes that use the GPU.
    """

    lock: IO[bytes] | None = None

    @classmethod
    def begin(cls) -> None:
        import fcntl

        cls.lock = open(Path(tempfile.gettempdir()) / f"fi_cupy_{os.environ['PYTEST_XDIST_TESTRUNUID']}", "wb")
        fcntl.flock(cls.lock, fcntl.LOCK_SH)

    @classmethod
    def end(cls) -> None:
        if cls.lock is not None:
            import fcntl

            fcntl.flock(cls.lock, fcntl.LOCK_UN)
            fcntl.flock(cls.lock, fcntl.LOCK_EX)
            cls.lock.close()
            cls.lock = None


@pytest.fixture(params=["portable", "hopper"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Each prefill kernel in turn, as far as the Hopper kernel goes: short requests, too, take it then."""
    if request.param == "portable":
        monkeypatch.setattr(prefill_kernel, "refusal", lambda problem, device: "the portable kernel is under test")
    elif device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    else:
        monkeypatch.setattr(prefill_kernel, "too_little", lambda *given: "")
        # test_prefill_hopper.py runs both heights of tiles.
        monkeypatch.setattr(prefill_kernel, "wants_short_tiles", lambda *given: False)
    prefill_kernel.geometry.cache_clear()
    yield request.param
    prefill_kernel.geometry.cache_clear()
