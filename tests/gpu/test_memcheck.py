"""compute-sanitizer's memcheck over small runs of memcheck_cases.py: no access outside of an allocation."""

from __future__ import annotations

import re

import memcheck_cases
import pytest
from sanitizer import TOOL, sanitize

pytest.importorskip("cupy")


@pytest.mark.long
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("case", memcheck_cases.CASES)
def test_no_access_outside(case):
    # What the program asks the driver and is refused (whether a function is there) is no error.
    said = sanitize("memcheck", ["--report-api-errors", "no"], memcheck_cases.__file__, case)
    summary = re.search(r"ERROR SUMMARY: (\d+) error", said)
    assert summary is not None, said[-3000:]
    assert int(summary[1]) == 0, said[-6000:]
