"""Sampling over the batch size, for the chart: `chart_sampling.py` draws it from the JSON of this bench."""

from __future__ import annotations

from dataclasses import replace

from bench_sampling import BATCHES as RECORDED
from bench_sampling import VOCABS, _rows

from fi_cupy.device import DeviceInfo
from fi_cupy.testing.bench import BenchCase

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
#: The curves of the chart, by the beginnings of their cases' names.
CURVES = (
    "softmax", "sampling_from_logits", "top_p 0.9 from probs", "min_p 0.05 from probs",
    "top_k_top_p 50 0.9 from logits", "top_k_renorm 50", "top_p_renorm 0.9", "top_k 50",
)  # fmt: skip


def curve_of(name: str) -> str | None:
    """The curve that a case belongs to."""
    return next((c for c in CURVES if name.startswith(f"{c} ") and name[len(c) + 1].isdigit()), None)


def cases(device: DeviceInfo) -> list[BenchCase]:
    """Float32, the vocabulary of Llama 3."""
    chosen = [(rows, case) for rows in BATCHES for case in _rows(rows, VOCABS[0]) if curve_of(case.name)]
    # Peers were recorded at three batches.
    return [case if rows in RECORDED else replace(case, recorded=()) for rows, case in chosen]
