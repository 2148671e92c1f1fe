"""Fixtures of both test folders."""

from __future__ import annotations

import os
import zlib

# Test processes share the cores: BLAS threads of each on top make matrix products several times slower.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import pytest

SEED = int(os.environ.get("FI_CUPY_TEST_SEED") or int.from_bytes(os.urandom(3), "little"))
os.environ["FI_CUPY_TEST_SEED"] = str(SEED)  # pytest-xdist's workers draw from the same seed


def pytest_report_header() -> str:
    return f"random inputs: FI_CUPY_TEST_SEED={SEED} repeats them"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Fresh random inputs in every run, different in every test, repeatable by FI_CUPY_TEST_SEED."""
    return np.random.default_rng([SEED, zlib.crc32(request.node.nodeid.encode())])
