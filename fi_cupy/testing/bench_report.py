"""The page that ``fi-cupy bench --html`` writes: the machine's limits, and for every operator a chart and a table.

Charts are SVG inside the page, drawn by matplotlib (the extra ``bench``); the page needs nothing else and no network.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import jinja2

from fi_cupy.testing.bench_cli import format_rate, format_value

_OURS, _LIMIT = "#7b3fa0", "#d9c9e3"
_PEERS = ("#2c7fb8", "#31a354", "#e08214", "#7f7f7f", "#c0392b")

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>fi_cupy on {{ device.name }}</title>
<style>
 body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
 h1 { font-weight: 600; } h2 { margin-top: 3rem; border-bottom: 2px solid #7b3fa0; font-weight: 600; }
 table { border-collapse: collapse; width: 100%; font-size: 13px; } td, th { padding: .25rem .6rem; text-align: right; }
 td:first-child, th:first-child, td:nth-child(n+5), th:nth-child(n+5) { text-align: left; }
 tr:nth-child(even) td { background: #f7f4f9; } svg { width: 100%; height: auto; } .failed td { color: #c0392b; }
 .limits span { display: inline-block; background: #f3eef6; border-radius: .5rem; padding: .4rem .9rem; margin: .2rem; }
</style></head><body>
<h1>fi_cupy on {{ device.name }}</h1>
<p>{{ date }} · {{ software }}</p>
<p class="limits">Measured limits: {% for limit in limits %}<span>{{ limit }}</span>{% endfor %}</p>
<p>Times are medians of CUDA-graph replays over inputs that the L2 cache does not hold (L2 marks those that fit). Peers
 in the same process ran interleaved; recorded ones ran on {{ recorded }}. Right of the line at 1, fi_cupy is
 faster.</p>
{% for op in ops %}
<h2>{{ op.name }}</h2>
{{ op.chart }}
<table><tr><th>case</th><th>time</th><th>rate</th><th>of the limit</th><th>speedup over</th></tr>
{% for row in op.rows %}<tr class="{{ row.status }}"><td>{{ row.name }}</td><td>{{ row.time }}</td>
<td>{{ row.rate }}</td><td>{{ row.percent }}</td><td>{{ row.peers }}</td></tr>
{% endfor %}</table>
{% endfor %}
</body></html>
"""


def speedups(row: Mapping[str, Any]) -> dict[str, float]:
    """Peer -> how much faster we are; recorded peers are marked so."""
    found = {name: peer["speedup"] for name, peer in row.get("peers", {}).items() if "speedup" in peer}
    found.update({f"{peer['peer']}, recorded": peer["speedup"] for peer in row.get("recorded", [])})
    return found


def _chart(rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> str:
    """The share of the limit as bars, the speedup over each peer as dots, one line a case."""
    from matplotlib.figure import Figure

    names = [row["name"] for row in rows]
    figure = Figure(figsize=(11, 0.7 + 0.26 * len(rows)))
    left, right = figure.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1, 1.4]})
    y = range(len(rows))
    left.barh(y, [100] * len(rows), color=_LIMIT, height=0.7)
    left.barh(y, [row.get("percent") or 0 for row in rows], color=_OURS, height=0.7)
    left.set(xlabel="% of the measured limit", xlim=(0, 120), ylim=(len(rows) - 0.4, -0.6))
    left.set_yticks(y, names, fontsize=7)
    for peer, colour in colours.items():
        points = [(speedups(row)[peer], i) for i, row in enumerate(rows) if peer in speedups(row)]
        if points:
            right.plot(*zip(*points, strict=True), "o", color=colour, label=peer, ms=5)
    right.axvline(1, color="black", lw=1)
    right.set_xscale("log")
    low, high = right.get_xlim()
    low, high = min(low, 0.7), max(high, 1.5)
    ticks = [t for t in (0.1, 0.2, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100) if low <= t <= high]
    right.set_xticks(ticks, [f"{t:g}" for t in ticks], fontsize=8)
    right.minorticks_off()
    right.set(xlabel="speedup over the peer", xlim=(low, high))
    right.grid(axis="x", color="#eeeeee")
    if right.get_legend_handles_labels()[0]:
        right.legend(frameon=False, fontsize=7)
    for axis in (left, right):
        axis.tick_params(length=0)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    peers = ", ".join(f"{name} {ratio:.2f}" for name, ratio in speedups(row).items())
    return {
        "name": row["name"],
        "status": row["status"],
        "time": f"{format_value(row)}{' µs' if row.get('unit') == 'us' else ''}"
        if row["status"] == "ok"
        else row["status"],
        "rate": format_rate(row),
        "percent": f"{row['percent']:.0f} %{' (L2)' if row.get('in_l2') else ''}" if row.get("percent") else "",
        "peers": peers if row["status"] == "ok" else row.get("error", "")[:200],
    }


def report(found: Mapping[str, Any]) -> str:
    """The page, from what ``fi-cupy bench --json`` writes."""
    peers = sorted({peer for row in found["rows"] for peer in speedups(row)})
    colours = {peer: _PEERS[i % len(_PEERS)] for i, peer in enumerate(peers)}
    ops = []
    for op, rows_of_op in groupby(found["rows"], key=lambda row: row["op"]):
        rows = list(rows_of_op)
        measured = [row for row in rows if row["status"] == "ok" and (row.get("percent") or speedups(row))]
        ops.append(
            {
                "name": op,
                "chart": _chart(measured, colours) if measured else "",
                "rows": [_row(row) for row in rows],
            }
        )
    limits = [f"{name} {rate / 1e12:.2f} TB/s" for name, rate in found["limits"].items() if name in ("read", "copy")]
    limits += [
        f"{name} products {rate / 1e12:.0f} TFLOP/s"
        for name, rate in found["limits"].items()
        if name not in ("read", "copy")
    ]
    page = jinja2.Environment(autoescape=True).from_string(_PAGE.replace("{{ op.chart }}", "{{ op.chart | safe }}"))
    recorded = found.get("recorded", {})
    return page.render(
        device=found["device"],
        date=found["date"][:10],
        software=", ".join(f"{name} {version}" for name, version in found["software"].items()),
        limits=limits,
        recorded=f"{recorded.get('device', 'another device')}, {recorded.get('date', '')}",
        ops=ops,
    )
