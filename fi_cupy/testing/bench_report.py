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
_PEERS = ("#31a354", "#2c7fb8", "#e08214", "#c0392b", "#7f7f7f", "#17becf", "#8c564b", "#bcbd22", "#e377c2", "#1f3b73")

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
 faster. Rows of "host" are times on the host's clock, those of "end_to_end" tokens a second.</p>
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


def chart(rows: Sequence[Mapping[str, Any]]) -> str:
    """One operator's rows as SVG: shares of the limit as bars, speedups over peers as dots, one line a case; or ""."""
    rows = [row for row in rows if row["status"] == "ok" and (row.get("percent") or speedups(row))]
    if not rows:
        return ""
    from matplotlib.figure import Figure

    peers = sorted({peer for row in rows for peer in speedups(row)})
    bars = any(row.get("percent") for row in rows)
    figure = Figure(figsize=(11, 0.9 + 0.26 * len(rows)), facecolor="white")
    widths = [*([1] if bars else []), *([1.4] if peers else [])]
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    panels[0].set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)
    if bars:
        _draw_bars(panels[0], rows)
    if peers:
        _draw_dots(panels[-1], rows, dict(zip(peers, _PEERS * len(peers), strict=False)))
    for axis in panels:
        axis.tick_params(length=0)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _draw_bars(axis: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    shares = [row.get("percent") or 0 for row in rows]
    axis.barh(range(len(rows)), [100] * len(rows), color=_LIMIT, height=0.7)
    axis.barh(range(len(rows)), shares, color=_OURS, height=0.7)
    axis.set(xlabel="% of the measured limit", xlim=(0, max(105, *shares)))


def _draw_dots(right: Any, rows: Sequence[Mapping[str, Any]], colours: Mapping[str, str]) -> None:
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
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
    right.legend(frameon=False, fontsize=7, ncols=4, handletextpad=0, columnspacing=1.2, **place)


def _time(row: Mapping[str, Any]) -> str:
    text = format_value(row).replace("us host", "µs")
    return f"{text} µs" if row.get("unit") == "us" else text


def _row(row: Mapping[str, Any]) -> dict[str, str]:
    peers = ", ".join(f"{name} {ratio:.2f}" for name, ratio in speedups(row).items())
    return {
        "name": row["name"],
        "status": row["status"],
        "time": _time(row) if row["status"] == "ok" else row["status"],
        "rate": format_rate(row),
        "percent": f"{row['percent']:.0f} %{' (L2)' if row.get('in_l2') else ''}" if row.get("percent") else "",
        "peers": peers if row["status"] == "ok" else row.get("error", "")[:200],
    }


def report(found: Mapping[str, Any]) -> str:
    """The page, from what ``fi-cupy bench --json`` writes."""
    ops = []
    for op, rows_of_op in groupby(found["rows"], key=lambda row: row["op"]):
        rows = list(rows_of_op)
        ops.append({"name": op, "chart": chart(rows), "rows": [_row(row) for row in rows]})
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
