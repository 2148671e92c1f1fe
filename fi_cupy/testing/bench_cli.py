"""``fi-cupy bench`` (and ``python -m fi_cupy.testing.bench_cli``): run the bench files, print a table, write JSON."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import click

from fi_cupy.device import DeviceInfo, num_devices
from fi_cupy.testing import bench

#: For `--list`, which needs no GPU: the shape of the device that bench/NOTES.md has the floors of.
H200 = DeviceInfo(90, "90a", 132, 232448, 233472, 62914560, "NVIDIA H200")
NOMINAL_BYTES_PER_S, NOMINAL_FLOPS_PER_S = 4.2e12, 780e12


def bench_folder(given: str | None = None) -> Path:
    """The folder of the bench files: as given, the current folder's, or the one beside the package's source."""
    choices = [Path(given)] if given else [Path.cwd() / "bench", Path(__file__).resolve().parents[2] / "bench"]
    for folder in choices:
        if any(folder.glob("bench_*.py")):
            return folder
    raise click.ClickException(
        f"no bench_*.py in {' or '.join(map(str, choices))}: they come with the source repository; name it with --dir"
    )


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Bench files import `peers` beside them."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"fi_cupy_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def collect(
    folder: Path, ops: Sequence[str], device: DeviceInfo
) -> tuple[list[tuple[str, bench.BenchCase]], list[dict[str, Any]]]:
    """Every case of the chosen operators, and a failed row for each bench file that cannot be read.

    Raises
    ------
    click.ClickException
        No bench file has one of the names.
    """
    files = {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}
    unknown = [op for op in ops if op not in files]
    if unknown:
        raise click.ClickException(f"no bench file for {', '.join(unknown)}; there are {', '.join(files)}")
    cases, failed = [], []
    with _importable(folder):
        for op, path in files.items():
            if ops and op not in ops:
                continue
            try:
                cases += [(op, case) for case in _module(path).cases(device)]
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                failed.append({"op": op, "name": path.name, "unit": "us", "status": "failed", "error": text})
    return cases, failed


def with_peers(cases: Sequence[tuple[str, bench.BenchCase]], names: str | None) -> list[tuple[str, bench.BenchCase]]:
    """The cases with only the named peers ("cudnn,flash"; "none"); all of them by default.

    Raises
    ------
    click.ClickException
        No case has a peer of that name.
    """
    if names is None:
        return list(cases)
    wanted = set() if names == "none" else {name.strip() for name in names.split(",")}
    there = {name for _, case in cases for name in case.peers}
    if wanted - there:
        raise click.ClickException(
            f"no peer {', '.join(sorted(wanted - there))} here; there are {', '.join(sorted(there))}"
        )
    kept = []
    for op, case in cases:
        peers = {name: call for name, call in case.peers.items() if name in wanted}
        kept.append((op, replace(case, peers=peers)))
    return kept


# --- the table ------------------------------------------------------------------------------------------------------


def format_value(row: Mapping[str, Any]) -> str:
    """The measured number with its unit's usual precision."""
    value = row.get("value")
    if value is None:
        return ""
    text = f"{value:,.0f}" if value >= 1000 else (f"{value:.1f}" if value >= 100 else f"{value:.2f}")
    return text if row["unit"] == "us" else f"{text} {row['unit']}"


def format_rate(row: Mapping[str, Any]) -> str:
    """TFLOP/s of a compute-bound row, else GB/s."""
    if row.get("TFLOPs"):
        return f"{row['TFLOPs']:.1f} TFLOP/s"
    return f"{row['TBps'] * 1000:,.0f} GB/s" if row.get("TBps") else ""


def format_peers(row: Mapping[str, Any]) -> str:
    """Each live peer with our speedup over it."""
    parts = []
    for name, peer in row.get("peers", {}).items():
        if "speedup" in peer:
            loop = " (loop)" if peer.get("mode") == "loop" else ""
            parts.append(f"{name} {peer['speedup']:.2f}x{loop}")
        elif "error" in peer:
            parts.append(f"{name} failed")
    return ", ".join(parts)


def format_recorded(row: Mapping[str, Any]) -> str:
    """Each recorded peer's own number, and our speedup over it."""
    return ", ".join(f"{r['peer']} {r['value']:,.4g} ({r['speedup']:.2f}x)" for r in row.get("recorded", []))


def table_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of one row: case, µs, spread, rate, % of limit, peers, recorded peers."""
    if row["status"] != "ok":
        return (row["name"], row["status"], "", "", "", row.get("error", "")[:200], "")
    percent = f"{row['percent']:.0f} % {row['limit']}" if row.get("percent") else ""
    notes = " loop" if row.get("mode") == "loop" else ""
    notes += " L2" if row.get("in_l2") and row.get("bytes") else ""
    spread = f"{100 * row['spread']:.1f} %{notes}" if "spread" in row else ""
    return (
        row["name"], format_value(row), spread, format_rate(row), percent, format_peers(row), format_recorded(row),
    )  # fmt: skip


def print_table(rows: Iterable[Mapping[str, Any]], provenance: Mapping[str, Any]) -> None:
    """One table an operator."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=190)
    device = provenance.get("device", "another device").split(",")[0]
    table = Table(title=None, header_style="bold", pad_edge=False)
    for title in ("case", "µs", "spread", "rate", "of limit", "speedup over", f"recorded µs on {device} (speedup)"):
        table.add_column(title, justify="right" if title in ("µs", "spread", "rate", "of limit") else "left")
    op = None
    for row in rows:
        if op is not None and row["op"] != op:
            table.add_section()
        op = row["op"]
        style = {"failed": "red", "skipped": "dim"}.get(row["status"])
        table.add_row(*(escape(cell) for cell in table_cells(row)), style=style)
    console.print(table)
    if provenance:
        console.print(
            f"speedup: above 1 we are faster. Recorded peers ran on another device ({provenance.get('device')}, "
            f"{provenance.get('date')}). L2: the inputs fit in the cache.",
            style="dim",
            highlight=False,
        )


def _print_limits(timer_name: str, limits: Mapping[str, float]) -> None:
    parts = [f"{name} {rate / 1e12:.2f} TB/s" for name, rate in limits.items() if name in ("read", "copy")]
    parts += [f"bf16 product {limits['bf16'] / 1e12:.0f} TFLOP/s"] if "bf16" in limits else []
    click.echo(f"{timer_name}: {', '.join(parts)}")


def _print_list(cases: Sequence[tuple[str, bench.BenchCase]]) -> None:
    for op, case in cases:
        floors = [case.bytes / NOMINAL_BYTES_PER_S if case.bytes else 0]
        floors.append(case.flops / NOMINAL_FLOPS_PER_S if case.flops else 0)
        floor = f"floor {max(floors) * 1e6:,.2f} us" if max(floors) else ""
        click.echo(f"{op:12} {case.name:52} {floor:20} {', '.join(case.peers)}".rstrip())


@click.command("bench")
@click.option("--op", "ops", multiple=True, help="Only this operator (bench_<op>.py); may be repeated.")
@click.option("--quick", is_flag=True, help="Fewer rounds and shorter warm-up.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False), help="Write every number here.")
@click.option("--html", "html_path", type=click.Path(dir_okay=False), help="Write a page with charts (extra: bench).")
@click.option("--peers", "peers", help="Only these peers, with commas between; 'none' for none.")
@click.option("--max-seconds", type=float, default=150.0, show_default=True, help="Start no case after this long.")
@click.option("--dir", "folder", type=click.Path(exists=True, file_okay=False), help="Folder of the bench files.")
@click.option("--list", "only_list", is_flag=True, help="Print the cases and their floors on an H200; needs no GPU.")
@click.pass_context
def bench_command(
    context: click.Context,
    ops: tuple[str, ...],
    quick: bool,
    json_path: str | None,
    html_path: str | None,
    peers: str | None,
    max_seconds: float,
    folder: str | None,
    only_list: bool,
) -> None:
    """Time the operators on this GPU beside their peers.

    A case that fails is reported and the run goes on; the exit code is 1 then.
    """
    where = bench_folder(folder)
    if html_path and importlib.util.find_spec("matplotlib") is None:
        raise click.ClickException("--html draws with matplotlib: pip install 'fi-cupy[bench]'")
    if only_list:
        cases, failed = collect(where, ops, H200)
        cases = with_peers(cases, peers)
        _print_list(cases)
        for row in failed:
            click.echo(f"{row['name']}: {row['error']}", err=True)
        context.exit(1 if failed else 0)
    if num_devices() == 0:
        raise click.ClickException("no CUDA GPU is present; --list shows the cases")
    from fi_cupy.testing.bench_gpu import GpuTimer

    start = time.perf_counter()
    timer = GpuTimer()
    options = bench.Options(quick, max_seconds)
    limits = timer.limits(quick)
    _print_limits(timer.info.name, limits)
    provenance, recorded = bench.load_recorded(where / "data" / "peers_h100.json")
    cases, failed = collect(where, ops, timer.info)
    cases = with_peers(cases, peers)

    def progress(row: Mapping[str, Any]) -> None:
        cells = table_cells(row)
        click.echo(f"  {cells[0]}: {cells[1]} {cells[3]} {cells[5]}".rstrip())

    rows = failed + bench.run_all(cases, timer, limits, recorded, options, progress)
    seconds = time.perf_counter() - start
    found = bench.document(rows, limits, timer.environment(), provenance, options, seconds)
    if json_path:
        Path(json_path).write_text(json.dumps(found, indent=1) + "\n")
    if html_path:
        from fi_cupy.testing.bench_report import report

        Path(html_path).write_text(report(found))
    print_table(rows, provenance)
    count = {status: sum(row["status"] == status for row in rows) for status in ("ok", "failed", "skipped")}
    click.echo(f"{count['ok']} ok, {count['failed']} failed, {count['skipped']} skipped, {seconds:.0f} s")
    context.exit(1 if count["failed"] else 0)


if __name__ == "__main__":
    bench_command(prog_name="fi-cupy bench")
