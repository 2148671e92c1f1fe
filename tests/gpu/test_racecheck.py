"""Shared-memory races in the Hopper prefill and the decode kernels, by compute-sanitizer in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fi_cupy.device import device_info

#: Small shapes that reach every way data takes through shared memory: both heights of tiles, boxes and gathered rows,
#: one item a CTA and several, ends of requests that are cleared, pages of one and several boxes, split keys, short and
#: long outputs, and the decode kernel's rings and merges.
CASES = """
import cupy, numpy as np
from fi_cupy import decode, prefill, prefill_kernel
from fi_cupy.testing.generators import normal, on_gpu

rng = np.random.default_rng(0)
space = cupy.zeros(16 << 20, cupy.uint8)


def ragged(lens, heads, kv_heads, dims, **options):
    qo, kv = (np.concatenate([[0], np.cumsum([x[i] for x in lens])]) for i in (0, 1))
    q, k, v = (
        on_gpu(normal(rng, (int(n), h, d)))
        for n, h, d in ((qo[-1], heads, dims[0]), (kv[-1], kv_heads, dims[0]), (kv[-1], kv_heads, dims[1]))
    )
    wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(space, backend="fa3")
    wrapper.plan(qo, kv, heads, kv_heads, *dims, causal=True, q_data_type="bfloat16", **options)
    wrapper.run(q, k, v, return_lse=True)
    return wrapper


def paged(lens, heads, kv_heads, dim, page, which=prefill.BatchPrefillWithPagedKVCacheWrapper, kv="bfloat16"):
    pages = [-(-n // page) for _, n in lens]
    indptr = np.concatenate([[0], np.cumsum(pages)])
    table = indptr, rng.permutation(indptr[-1]), np.array([(n - 1) % page + 1 for _, n in lens])
    cache = on_gpu(normal(rng, (int(indptr[-1]), 2, page, kv_heads, dim), kv))
    if which is decode.BatchDecodeWithPagedKVCacheWrapper:
        q, wrapper = on_gpu(normal(rng, (len(lens), heads, dim))), which(space)
        wrapper.plan(*table, heads, kv_heads, dim, page, q_data_type="bfloat16", kv_data_type=kv)
    else:
        qo = np.concatenate([[0], np.cumsum([m for m, _ in lens])])
        q, wrapper = on_gpu(normal(rng, (int(qo[-1]), heads, dim))), which(space, backend="fa3")
        wrapper.plan(qo, *table, heads, kv_heads, dim, page, causal=True, q_data_type="bfloat16")
    wrapper.run(q, cache, return_lse=True)


for short in (False, True):
    prefill_kernel.wants_short_tiles = lambda *_, short=short: short
    prefill_kernel.geometry.cache_clear()
    ragged([(200, 250), (3, 40)], 2, 2, (128, 128))
    ragged([(100, 250)], 2, 1, (64, 64))
for dims in ((192, 128), (256, 256)):
    ragged([(70, 170)], 2, 2, dims)
ragged([(90, 170)], 5, 1, (128, 128))
ragged([(64, 100)], 4, 1, (128, 128), logits_soft_cap=10.0)
many = [(20, 30), (0, 8), (70, 90), (1, 0)] * 36
wrapper = ragged(many, 2, 2, (128, 128))
assert wrapper._planned.geometry.grid(wrapper._planned.work.num_items)[0] < 2 * wrapper._planned.work.num_items
for page in (8, 16, 80):
    paged([(60, 190), (3, 20)], 4, 2, 128, page)
paged([(10, 2000)], 8, 1, 128, 16)  # split keys
for kv in ("bfloat16", "float8_e4m3fn"):
    paged([(1, 300), (1, 17), (1, 2000)], 8, 2, 128, 16, decode.BatchDecodeWithPagedKVCacheWrapper, kv)
cupy.cuda.runtime.deviceSynchronize()
print("all cases ran")
"""


def test_no_races():
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        pytest.skip("no compute-sanitizer")
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")
    command = [tool, "--tool", "racecheck", "--racecheck-report", "all", "--error-exitcode", "9"]
    for name in ("prefill_hopper", "batch_decode"):
        command += ["--kernel-name", f"kns={name}"]
    ran = subprocess.run(
        [*command, sys.executable, "-c", CASES], capture_output=True, text=True, timeout=300, env=dict(os.environ)
    )
    report = f"{ran.stdout[-3000:]}\n{ran.stderr[-2000:]}"
    assert "all cases ran" in ran.stdout, report
    found = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)", ran.stdout)
    assert found is not None and ran.returncode == 0 and found.groups() == ("0", "0", "0"), report
