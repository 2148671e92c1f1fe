"""Draw causal prefill at 16,384 tokens over the requests' length: ours beside every peer of a bench run.

    fi-cupy bench --op prefill --json found.json && python bench/chart_prefill.py found.json chart.png

Peers that ran in the same process (solid) are drawn as ours over the ratio of the interleaved rounds; recorded rows of
another device are dashed. Needs matplotlib: the extra `bench`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

_NAME = re.compile(r"(?:ragged|single)_prefill (\d+)x(\d+) 32/32 d128 causal( fa2)?")
TOKENS = 16384
#: Name in the chart -> colour; others get one of matplotlib's own.
_COLOURS = {
    "fi_cupy": "#c0392b",
    "fi_cupy, portable kernel": "#e6a099",
    "cudnn": "#2c7fb8",
    "flash": "#7f7f7f",
    "flashinfer fa3": "#31a354",
}


def series(found: dict[str, Any]) -> tuple[dict[str, dict[int, float]], dict[str, dict[int, float]]]:
    """TFLOP/s over length of everything measured in the run, and of the recorded peers."""
    live: dict[str, dict[int, float]] = defaultdict(dict)
    recorded: dict[str, dict[int, float]] = defaultdict(dict)
    for row in found["rows"]:
        match = _NAME.fullmatch(row["name"])
        if match is None or row["status"] != "ok" or int(match[1]) * int(match[2]) != TOKENS:
            continue
        length, ours = int(match[2]), row["flops"] / row["us"] / 1e6
        live["fi_cupy, portable kernel" if match[3] else "fi_cupy"][length] = ours
        for name, peer in row["peers"].items():
            if "speedup" in peer:
                live[name][length] = ours / peer["speedup"]
        for peer in row["recorded"]:
            backend = peer["name"].split()[0].split(".")[-1]
            recorded[f"{peer['peer']} {backend}, recorded"][length] = row["flops"] / peer["value"] / 1e6
    return dict(live), dict(recorded)


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the chart; the file's suffix decides its format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    live, recorded = series(found)
    if not live:
        raise SystemExit(f"no row of {TOKENS} tokens, 32/32 heads, d128, causal in this run")
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for style, lines in (("o-", live), ("s--", recorded)):
        for name, points in lines.items():
            x, y = zip(*sorted(points.items()), strict=True)
            axes.plot(x, y, style, label=name, color=_COLOURS.get(name), linewidth=2 if name == "fi_cupy" else 1.2)
    axes.set_xscale("log", base=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"tokens a request ({TOKENS} in all)")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"Causal prefill, 32 heads of 128, bf16, {found['device']['name']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("found", type=Path, help="what `fi-cupy bench --op prefill --json` wrote")
    parser.add_argument("chart", type=Path, help="where to write the chart (.png, .svg, .pdf)")
    given = parser.parse_args()
    draw(json.loads(given.found.read_text()), given.chart)


if __name__ == "__main__":
    main()
