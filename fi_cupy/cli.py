"""The command line: ``fi-cupy`` and ``python -m fi_cupy``. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fi_cupy import __version__
from fi_cupy.errors import CacheError, CompileError, FiCupyError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from fi_cupy.jit.cache import CachedKernel, KernelCache
    from fi_cupy.jit.compiler import CompileJob

    Outcome = tuple[CompileJob, CachedKernel | BaseException]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, package_name="fi-cupy", prog_name="fi-cupy")
def cli() -> None:
    """Kernels for LLM serving, compiled at run time: look at the machine, warm the cache, write text."""


def _add_others() -> None:
    """Commands that live in files of their own; `fi-cupy bench` beside the harness that it runs."""
    from fi_cupy import cli_flashinfer
    from fi_cupy.cli_tune import tune_command
    from fi_cupy.testing.bench_cli import bench_command

    for command in (bench_command, tune_command):
        cli.add_command(command)
    cli_flashinfer.add_to(cli)


def main() -> None:
    """Run the command line; an error that fi_cupy raises on purpose is one line and exit code 1."""
    _add_others()
    try:
        cli(prog_name="fi-cupy")
    except FiCupyError as error:
        click.echo(f"fi-cupy: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:  # the reader (head, less) has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


def _console() -> Console:
    from rich.console import Console

    # Not a terminal: lines are for grep, so nothing is folded to 80 columns.
    return Console(highlight=False, soft_wrap=not sys.stdout.isatty(), width=None if sys.stdout.isatty() else 200)


def _table(*columns: str) -> Table:
    """A table; a column whose name begins with ">" is flush right."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", no_wrap=True)
    return table


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GB"


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Show GPU, driver, CuPy, NVRTC, headers, cache and environment; each problem comes with its mend."""
    from fi_cupy.info import collect

    report = collect()
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    headers, cached = report["headers"], report["cache"]
    rows = [
        ("fi_cupy", f"{report['fi_cupy']} on Python {report['python']}, {report['platform']}"),
        *((f"GPU {g['index']}", _gpu_line(g)) for g in report["gpus"]),
        ("driver", f"CUDA {report['driver']}" if report["driver"] else "none"),
        ("CuPy", report["cupy"] or "none"),
        ("NVRTC", report["nvrtc"] or "none"),
        ("headers", f"{headers['version']} in {headers['path']}" if headers else "none"),
        ("cache", f"{cached['path']}: {cached['kernels']} kernels, {_size(cached['bytes'])}"),
        ("tuned", _tuned_line(report["tuned"])),
        ("packages", ", ".join(f"{name} {version}" for name, version in report["packages"].items())),
    ]
    for name, text in rows:
        click.echo(f"{name:10s} {text}")
    click.echo("\nenvironment variables")
    for variable in report["environment"]:
        value = "-" if variable["value"] is None else variable["value"]
        click.echo(f"  {' / '.join(variable['names'])} = {value}\n      {variable['help']}")
    if not report["problems"]:
        click.echo("\nno problems found")
    for entry in report["problems"]:
        click.echo(f"\nproblem: {entry['problem']}\n   mend: {entry['mend']}")


def _tuned_line(tuned: dict[str, Any]) -> str:
    if tuned["path"] is None:
        return "off"
    return f"{tuned['path']}: {tuned['choices']} choices, {tuned['used']} for this machine"


def _gpu_line(gpu: dict[str, Any]) -> str:
    return (
        f"{gpu['name']}, compute capability {gpu['compute_capability']} (target {gpu['target']}), "
        f"{gpu['multiprocessors']} multiprocessors, {_size(gpu['memory_bytes'])}"
    )


@cli.command("list")
@click.option("--profile", default="all", show_default=True, help="An op family, or several with commas between.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def list_(profile: str, as_json: bool) -> None:
    """List the kernels: symbol, header, architectures, and for which of them the cache holds it."""
    from fi_cupy.jit.build import is_cached
    from fi_cupy.jit.spec import ARCHS
    from fi_cupy.profiles import profile_specs

    rows: list[dict[str, Any]] = []
    for spec in profile_specs(profile):
        top = f"to {spec.max_arch}" if spec.max_arch else "up"
        cached = [arch for arch in ARCHS if spec.supports(arch) and is_cached(spec, arch)]
        rows.append({"symbol": spec.symbol, "header": spec.header, "archs": f"{spec.min_arch} {top}", "cached": cached})
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    table = _table("symbol", "header", "archs", "cached for")
    for row in rows:
        table.add_row(row["symbol"], row["header"], row["archs"], " ".join(row["cached"]) or "-")
    _console().print(table)
    click.echo(f"{len(rows)} kernels")


@cli.command()
@click.option(
    "--arch", help="Targets, e.g. \"8.0 9.0a\", compute_80 or all. [default: the environment's, or the GPU's]"
)
@click.option(
    "--profile", default="all", show_default=True, help="A model or an op family, or several with commas between."
)
@click.option("-j", "--jobs", type=click.IntRange(1, 256), help="Compiler processes. [default: one a CPU, at most 16]")
@click.option("-v", "--verbose", is_flag=True, help="A row a kernel instead of a row a header.")
def warmup(arch: str | None, profile: str, jobs: int | None, verbose: bool) -> None:
    """Compile a profile into the cache; needs no GPU. Exit code 1 if a kernel could not be compiled and stored."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from fi_cupy.jit.build import build_many
    from fi_cupy.jit.compiler import nvrtc_version
    from fi_cupy.profiles import default_archs, default_processes, parse_archs, profile_targets

    archs = parse_archs(arch) if arch else default_archs()
    targets = profile_targets(profile, archs)
    nvrtc_version()  # without NVRTC there is one error, not one a kernel
    begin, outcomes = time.time(), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console(), disable=not sys.stdout.isatty()) as progress:
        task = progress.add_task(f"compiling for {' '.join(archs)}", total=len(targets))
        for outcome in build_many(targets, jobs or default_processes()):
            outcomes.append(outcome)
            progress.update(task, advance=1, description=outcome[0].symbol[:48].ljust(48))
    _warmup_report(outcomes, begin, verbose)


def _warmup_report(outcomes: list[Outcome], begin: float, verbose: bool) -> None:
    """Print the summary of a warmup that began at `begin` (seconds since the epoch); exit 1 where something failed."""
    from fi_cupy.jit.cache import CachedKernel

    kernels = [(job, result) for job, result in outcomes if isinstance(result, CachedKernel)]
    failures = [(job, result) for job, result in outcomes if isinstance(result, BaseException)]
    fresh = [(j, k) for j, k in kernels if k.meta.created >= begin and k.meta.pid == os.getpid()]
    if fresh:
        _console().print(_kernel_table(fresh) if verbose else _header_table(fresh))
    for job, error in failures:
        click.echo(f"failed: {job.symbol} for {job.arch}: {error}", err=True)
        if isinstance(error, CompileError) and error.log and verbose:
            click.echo(error.log, err=True)
    seconds = sum(k.meta.seconds for _, k in fresh)
    click.echo(
        f"{len(kernels)} kernels ready: {len(fresh)} compiled in {time.time() - begin:.1f} s "
        f"({seconds:.1f} s of NVRTC), {len(kernels) - len(fresh)} were in the cache"
        + ("; nothing to compile" if kernels and not fresh and not failures else "")
    )
    for job, kernel in fresh:
        if kernel.meta.spill_bytes:
            click.echo(f"spills: {job.symbol} for {job.arch}: {kernel.meta.spill_bytes} bytes")
    if any(kernel.path is None for _, kernel in kernels):
        raise CacheError("warmup: the kernels were compiled, but the cache cannot be written; see `fi-cupy info`")
    if failures:
        raise CacheError(f"warmup: {len(failures)} of {len(outcomes)} kernels failed")


def _kernel_table(kernels: list[tuple[CompileJob, CachedKernel]]) -> Table:
    table = _table("kernel", "arch", ">seconds", ">registers", ">stack", ">spills", ">size")
    for job, kernel in sorted(kernels, key=lambda pair: (pair[0].symbol, pair[0].arch)):
        m = kernel.meta
        figures = (f"{m.seconds:.2f}", m.registers, m.stack_bytes, m.spill_bytes, _size(m.code_bytes))
        table.add_row(job.symbol, job.arch, *map(str, figures))
    return table


def _header_table(kernels: list[tuple[CompileJob, CachedKernel]]) -> Table:
    """Kernels of one header and architecture on one row: sums of seconds and spills, most registers."""
    groups: dict[tuple[str, str], list[CachedKernel]] = {}
    for job, kernel in kernels:
        header = job.source.split('#include "', 1)[-1].split('"', 1)[0]
        groups.setdefault((header, job.arch), []).append(kernel)
    table = _table("header", "arch", ">kernels", ">seconds", ">max registers", ">spills")
    for (header, arch), group in sorted(groups.items()):
        registers = max(k.meta.registers for k in group)
        seconds, spills = sum(k.meta.seconds for k in group), sum(k.meta.spill_bytes for k in group)
        table.add_row(header, arch, str(len(group)), f"{seconds:.2f}", str(registers), str(spills))
    return table


@cli.group()
def cache() -> None:
    """Look at the kernel cache, check it, carry it to another machine."""


def _cache() -> KernelCache:
    from fi_cupy.jit.build import cache

    return cache()


@cache.command("ls")
@click.option("--arch", help="Only these targets.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def cache_ls(arch: str | None, as_json: bool) -> None:
    """List the entries."""
    from dataclasses import asdict

    from fi_cupy.profiles import parse_archs

    wanted = set(parse_archs(arch)) if arch else None
    store = _cache()
    rows = [(f, k) for f, k in store.entries() if wanted is None or f.parent.name in wanted]
    if as_json:
        listed = [{"path": str(f), "broken": k is None, **(asdict(k.meta) if k else {})} for f, k in rows]
        click.echo(json.dumps(listed, indent=1))
        return
    table = _table("arch", "entry", ">size", ">registers", ">seconds", "made")
    for folder, kernel in rows:
        if kernel is None:
            table.add_row(folder.parent.name, folder.name, "broken")
            continue
        m = kernel.meta
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(m.created))
        table.add_row(m.arch, folder.name, _size(m.code_bytes), str(m.registers), f"{m.seconds:.2f}", made)
    if rows:
        _console().print(table)
    size = sum(k.meta.code_bytes for _, k in rows if k)
    click.echo(f"{len(rows)} kernels, {_size(size)} of code in {store.root}")


@cache.command("verify")
def cache_verify() -> None:
    """Check every entry against its checksum; exit code 1 if one is broken."""
    good = broken = 0
    for folder, kernel in _cache().entries():
        if kernel is None:
            broken += 1
            click.echo(f"broken: {folder}")
        else:
            good += 1
    click.echo(f"{good} kernels are intact, {broken} are broken")
    if broken:
        raise CacheError(
            f"cache verify: {broken} broken entries (they count as misses); `fi-cupy cache prune` removes them"
        )


@cache.command("prune")
@click.option("--older-than", type=click.FloatRange(0), metavar="DAYS", help="Also remove entries made before that.")
def cache_prune(older_than: float | None) -> None:
    """Remove broken entries and abandoned temporary folders, and with --older-than old ones."""
    store = _cache()
    removed = store.prune() if older_than is None else store.prune(set(), older_than * 86400)
    click.echo(f"{len(removed)} removed from {store.root}")


@cache.command("pack")
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--arch", help="Only these targets.")
@click.option("--tuned/--no-tuned", default=True, show_default=True, help="Put in the choices of `fi-cupy tune`.")
def cache_pack(file: Path, arch: str | None, tuned: bool) -> None:
    """Write the entries into one FILE, for a container image or another machine."""
    from fi_cupy.artifacts import pack
    from fi_cupy.profiles import parse_archs

    made = pack(file, parse_archs(arch) if arch else None, tuned)
    choices = " and the tuned choices" if made.tuned else ""
    click.echo(f"{len(made.kernels)} kernels{choices} packed into {file} ({_size(file.stat().st_size)})")


@cache.command("unpack")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def cache_unpack(file: Path) -> None:
    """Check a pack and take it in; a broken one is refused as a whole, with exit code 1."""
    from fi_cupy.artifacts import unpack

    made = unpack(file)
    choices = " and the tuned choices" if made.tuned else ""
    click.echo(f"{len(made.kernels)} kernels{choices} unpacked into {_cache().root} (made by fi_cupy {made.fi_cupy})")


@cache.command("clear")
def cache_clear() -> None:
    """Remove every entry."""
    store = _cache()
    click.echo(f"{store.clear()} kernels removed from {store.root}")


@cli.command()
@click.argument("spec")
def render(spec: str) -> None:
    """Print the translation unit of the kernel SPEC: a symbol from `list`, or the beginning of one."""
    from fi_cupy.jit.render import render as render_spec
    from fi_cupy.profiles import find_specs

    found = find_specs(spec)
    if len(found) == 1:
        click.echo(render_spec(found[0]), nl=False)
        return
    if found:
        names = ", ".join(s.symbol for s in found[:8]) + (", ..." if len(found) > 8 else "")
        raise click.UsageError(f"{spec!r} fits {len(found)} kernels: {names}")
    # A kernel that a program has made with sizes of its own: its source is kept beside its code.
    for folder, kernel in _cache().entries():
        if kernel is not None and kernel.meta.symbol == spec:
            click.echo((folder / "kernel.cu").read_text(), nl=False)
            return
    raise click.UsageError(f"no kernel is called {spec!r}; `fi-cupy list` shows those there are")


@cli.command()
@click.argument("prompt")
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--max-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 keeps all tokens.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Copies of the prompt to run at once."
)
@click.option("--backend", type=click.Choice(["auto", "cuda", "numpy"]), default="auto", show_default=True)
@click.option("--kv-dtype", type=click.Choice(["auto", "fp8"]), default="auto", show_default=True, help="Of the cache.")
@click.option(
    "--share-prefix/--no-share-prefix", default=True, show_default=True, help="Compute a batch's common prompt once."
)
@click.option("--ignore-eos", is_flag=True, help="Go on to --max-tokens, for measurements.")
@click.option("--tune", is_flag=True, help="Measure this run's kernels first, and keep the choices.")
@click.option("--model", type=click.Path(path_type=str), help="A GGUF file. [default: SmolLM2-135M-Instruct]")
def generate(prompt: str, **options: Any) -> None:
    """Write text with a language model whose every operation is fi_cupy's."""
    from fi_cupy.models.generate import run_generate

    run_generate(prompt, **options, stream=sys.stdout)


if __name__ == "__main__":
    main()
