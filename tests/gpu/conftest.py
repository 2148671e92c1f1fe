"""GPU tests: skipped without a GPU; a whole run of them on one leaves a receipt."""

from __future__ import annotations

import os
import time
from itertools import islice
from pathlib import Path

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
    # `--dist worksteal` deals the list out in pieces of these sizes: long tests come first, and end with the others.
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if num_devices() and processes > 1:
        long, others = ([x for x in items if (x.get_closest_marker("long") is not None) == y] for y in (True, False))
        rest, left = iter(others), len(items)
        items.clear()
        for i in range(processes):
            size = left // (processes - i)
            items += (*long[i::processes], *islice(rest, size - len(long[i::processes])))
            left -= size


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
