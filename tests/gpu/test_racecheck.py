"""compute-sanitizer's racecheck over small runs of attention, products, routing, casts and sampling: no hazard."""

from __future__ import annotations

import re

import pytest
import race_gemm
import race_mla
import race_prefill_hopper
import race_sampling
from sanitizer import TOOL, sanitize

from fi_cupy.device import device_info

pytest.importorskip("cupy")


def hazards(said: str) -> int:
    """How many racecheck has found."""
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", said)
    assert summary is not None, said[-3000:]
    return int(summary[1])


@pytest.mark.long
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("case", [*race_prefill_hopper.CASES, "control"])
def test_prefill_hopper(case):
    """ "control" has a race: the tool sees one where there is one."""
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    options = ["--kernel-name", "kernel_substring=prefill_hopper", "--num-cuda-barriers", "64"]
    said = sanitize("racecheck", options, race_prefill_hopper.__file__, case)
    assert (hazards(said) > 0) == (case == "control"), said[-6000:]


@pytest.mark.long
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
def test_products_routing_and_casts():
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    said = sanitize("racecheck", ["--num-cuda-barriers", "64"], race_gemm.__file__)
    assert hazards(said) == 0, said[-6000:]


@pytest.mark.long
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
def test_mla():
    """The portable kernel. All cases in one process, since the tool's start takes longer than they do.

    Of the Hopper kernel the tool (2025.3) reports hazards where one warpgroup arrives at a named barrier (bar.arrive)
    and the other one waits for it (bar.sync), and where one lane arrives at an mbarrier for its warp. Both are ordered;
    with bar.sync in both places and every lane arriving it reports none in any case (NOTES.md). memcheck has all cases.
    """
    cases = [name for name in race_mla.CASES if "hopper" not in name]
    options = ["--kernel-name", "kernel_substring=mla", "--num-cuda-barriers", "4096"]
    said = sanitize("racecheck", options, race_mla.__file__, *cases)
    assert hazards(said) == 0, said[-6000:]


@pytest.mark.long
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("shape", race_sampling.SHAPES)
def test_sampling(shape):
    """In every launch shape; what it computes is held to the CPU's results as well."""
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    said = sanitize("racecheck", ["--num-cuda-barriers", "64"], race_sampling.__file__, shape)
    assert hazards(said) == 0, said[-6000:]
