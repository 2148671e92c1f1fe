"""GPU tests: skipped without a GPU; a whole run of them on one leaves a receipt."""

from __future__ import annotations

from pathlib import Path

import pytest
from gpu_receipt import GPU_TESTS, RECEIPT, Recorder

from fi_cupy.device import num_devices


def pytest_configure(config: pytest.Config) -> None:
    if num_devices():
        config.pluginmanager.register(Recorder(GPU_TESTS, RECEIPT), "fi_cupy_receipt")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if num_devices() == 0:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="no GPU: these tests run where CuPy finds one"))
