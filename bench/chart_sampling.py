"""Draws sampling times over the batch size from the bench's JSON.

fi-cupy bench --op sampling_batches --json batches.json
python bench/chart_sampling.py batches.json sampling_h100.png    # matplotlib: the extra `bench`
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from bench_sampling import VOCABS
from bench_sampling_batches import CURVES, curve_of

#: Name in the chart -> colour; others get one of matplotlib's own.
_COLOURS = {"fi_cupy": "#c0392b", "FlashInfer, recorded": "#31a354", "torch": "#7f7f7f", "torch, recorded": "#7f7f7f"}


def points(document: dict[str, Any]) -> dict[str, dict[str, dict[int, float]]]:
    """Curve, then who ran it, to microseconds by batch: float32, the vocabulary of the chart."""
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in document["rows"]:
        curve = curve_of(row["name"])
        match = re.search(rf" (\d+)x{VOCABS[0]} f32$", row["name"])
        if curve is None or match is None or row["status"] != "ok":
            continue
        batch = int(match[1])
        found[curve]["fi_cupy"][batch] = row["us"]
        for peer, told in row.get("peers", {}).items():
            if "us" in told:
                found[curve][peer][batch] = told["us"]
        for told in row.get("recorded", ()):
            # What ran beside ours is not shown a second time.
            if told["peer"] not in row.get("peers", {}) or "us" not in row["peers"][told["peer"]]:
                found[curve][f"{told['peer']}, recorded"][batch] = told["value"]
    return found


def main(source: str, target: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    document = json.loads(Path(source).read_text())
    found = points(document)
    figure, axes = plt.subplots(2, 4, figsize=(16, 7), sharex=True, layout="constrained")
    for axis, curve in zip(axes.flat, CURVES, strict=True):
        for who, values in found[curve].items():
            style = {"marker": "o", "linewidth": 2.2} if who == "fi_cupy" else {"marker": ".", "linestyle": "--"}
            axis.plot(*zip(*sorted(values.items()), strict=True), label=who, color=_COLOURS.get(who), **style)
        axis.set(title=curve, xscale="log", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"Sampling, {document['device']['name']}")
    figure.supxlabel(f"rows (vocabulary {VOCABS[0]}, float32)")
    figure.supylabel("microseconds a call")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
