"""Draws sampling times over the batch size from the bench's JSON.

fi-cupy bench --op sampling_batches --json batches.json
python bench/chart_sampling.py batches.json sampling.svg    # matplotlib: the extra `bench`
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from pathlib import Path

from bench_sampling_batches import CURVES, curve_of


def points(document: dict[str, object]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Curve, then who ran it, to (batch, microseconds)."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for row in document["rows"]:  # type: ignore[attr-defined]
        curve = curve_of(row["name"])
        if curve is None or row["status"] != "ok":
            continue
        match = re.search(r" (\d+)x\d+ ", row["name"] + " ")
        assert match is not None, row["name"]
        batch = int(match[1])
        found[curve]["fi_cupy"].append((batch, row["us"]))
        for peer, told in row.get("peers", {}).items():
            if "us" in told:
                found[curve][peer].append((batch, told["us"]))
        for told in row.get("recorded", ()):
            found[curve][f"{told['peer']}, recorded"].append((batch, told["value"]))
    return found


def main(source: str, target: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = points(json.loads(Path(source).read_text()))
    figure, axes = plt.subplots(2, 4, figsize=(16, 7), sharex=True, layout="constrained")
    for axis, curve in zip(axes.flat, CURVES, strict=True):
        for who, values in found[curve].items():
            values.sort()
            style = {"marker": "o", "linewidth": 2.2} if who == "fi_cupy" else {"marker": ".", "linestyle": "--"}
            axis.plot(*zip(*values, strict=True), label=who, **style)
        axis.set(title=curve, xscale="log", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.supxlabel("rows (vocabulary 128256, float32)")
    figure.supylabel("microseconds a call")
    figure.savefig(target, dpi=150)


if __name__ == "__main__":
    main(*sys.argv[1:])
