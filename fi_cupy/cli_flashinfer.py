"""The commands of ``python -m flashinfer`` by their names there; most are ours under another name."""

from __future__ import annotations

import json
from pathlib import Path

import click


def add_to(group: click.Group) -> None:
    """Add the commands to fi-cupy's group; the ones that only rename ours are left out of its help."""
    for name, ours in (
        ("show-config", ("info",)),
        ("collect-env", ("info",)),
        ("list-modules", ("list",)),
        ("list-cubins", ("cache", "ls")),
        ("clear-cache", ("cache", "clear")),
        ("clear-cubin", ("cache", "clear")),
    ):
        command: click.Command = group
        for part in ours:
            assert isinstance(command, click.Group)
            command = command.commands[part]
        renamed = click.Command(
            name, callback=command.callback, params=list(command.params), help=command.help, hidden=True,
            epilog=f"The same as: fi-cupy {' '.join(ours)}",
        )  # fmt: skip
        group.add_command(renamed)
    for added in (module_status, download_cubin, export_compile_commands, compile_variant, replay):
        group.add_command(added)


@click.command("module-status")
@click.option("--profile", default="all", show_default=True, help="A model or an op family, or several with commas.")
@click.option("--arch", help="Targets, e.g. \"8.0 9.0a\" or all. [default: the environment's, or the GPU's]")
@click.option("--detailed", is_flag=True, help="A line a kernel.")
@click.option(
    "--filter", "which", type=click.Choice(["all", "compiled", "not-compiled"]), default="all", show_default=True,
    help="Which kernels to list.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: kernel to whether it is compiled.")
def module_status(profile: str, arch: str | None, detailed: bool, which: str, as_json: bool) -> None:
    """Show which kernels of a profile are compiled and in the cache."""
    from fi_cupy.artifacts import get_artifacts_status

    status = get_artifacts_status(profile, arch)
    shown = [(name, there) for name, there in status if which == "all" or there == (which == "compiled")]
    if as_json:
        click.echo(json.dumps(dict(shown), indent=1))
        return
    if detailed or which != "all":
        for name, there in shown:
            click.echo(f"{'compiled    ' if there else 'not compiled'} {name}")
    archs = list(dict.fromkeys(name.split("/")[0] for name, _ in status))
    for target in archs:
        mine = [there for name, there in status if name.split("/")[0] == target]
        click.echo(f"{target}: {sum(mine)} of {len(mine)} kernels compiled")


@click.command("download-cubin")
@click.argument("pack", required=False, type=click.Path(path_type=str))
def download_cubin(pack: str | None) -> None:
    """Take in the cubin PACK, or those that FI_CUPY_CUBIN_PACK names; there is no server to load from."""
    from fi_cupy.artifacts import download_artifacts

    click.echo(f"{download_artifacts(pack)} kernels taken in")


@click.command("export-compile-commands")
@click.argument("path", default="compile_commands.json", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--profile", default="all", show_default=True, help="A model or an op family, or several with commas.")
@click.option("--arch", default="9.0a", show_default=True, help="One target.")
def export_compile_commands(path: Path, profile: str, arch: str) -> None:
    """Write a compilation database for clangd: the kernels' translation units beside PATH, and how to compile them."""
    from fi_cupy.errors import ArgumentError, CacheError
    from fi_cupy.jit.compiler import include_dir
    from fi_cupy.jit.render import render
    from fi_cupy.jit.sources import kernel_root
    from fi_cupy.profiles import parse_archs, profile_targets

    targets = parse_archs(arch)
    if len(targets) != 1 or targets[0].startswith("compute_"):
        raise ArgumentError(f"export-compile-commands: --arch is {arch!r}, expected one target such as 9.0a")
    folder = path.resolve().parent / "compile_commands"
    common = ["clang++", "-x", "cuda", "-std=c++17", f"--cuda-gpu-arch=sm_{targets[0]}", "--cuda-device-only",
              "-nocudalib", f"-I{kernel_root()}", f"-I{include_dir()}"]  # fmt: skip
    entries = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for spec, _ in profile_targets(profile, targets):
            unit = folder / f"{spec.symbol}.cu"
            unit.write_text(render(spec))
            entries.append(
                {"directory": str(folder), "file": str(unit), "arguments": [*common, "-fsyntax-only", str(unit)]}
            )
        path.write_text(json.dumps(entries, indent=1) + "\n")
    except OSError as error:
        raise CacheError(f"export-compile-commands: {path} cannot be written: {error}") from None
    click.echo(f"{len(entries)} translation units in {path}")


@click.command("compile-variant")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--name", help="Only this variant. [default: every one that the file makes]")
@click.option("--arch", help="Targets, e.g. \"8.0 9.0a\" or all. [default: the environment's, or the GPU's]")
@click.option("--dtype", default="bfloat16", show_default=True, help="Of q, k and v.")
@click.option("--head-dim", "dims", default="128", show_default=True, help="One, or those of q and v: 192/128.")
@click.option("--group", default=4, show_default=True, type=click.IntRange(1), help="Query heads a kv head.")
def compile_variant(file: Path, name: str | None, arch: str | None, dtype: str, dims: str, group: int) -> None:
    """Compile the attention variants that the Python FILE makes into the cache; needs no GPU."""
    import runpy

    from fi_cupy.errors import ArgumentError
    from fi_cupy.jit.build import build
    from fi_cupy.jit.modules import variant_specs
    from fi_cupy.profiles import default_archs, parse_archs
    from fi_cupy.variants import AttentionVariant

    sizes = dims.split("/")
    if not all(size.isdigit() for size in sizes) or len(sizes) > 2:
        raise ArgumentError(f"compile-variant: --head-dim is {dims!r}, expected for example 128 or 192/128")
    made = [value for value in runpy.run_path(str(file)).values() if isinstance(value, AttentionVariant)]
    chosen = {v.name: v for v in made if name in (None, v.name)}
    if not chosen:
        there = ", ".join(v.name for v in made) or "none"
        raise ArgumentError(f"compile-variant: {file} has no variant {name or 'at its top level'}; it makes {there}")
    for variant in chosen.values():
        for target in parse_archs(arch) if arch else default_archs():
            for spec in variant_specs(variant, target, dtype, (int(sizes[0]), int(sizes[-1])), group):
                m = build(spec, target).meta
                click.echo(f"{target:>6s} {m.seconds:6.2f} s {m.registers:4d} registers  {spec.symbol}")


@click.command("replay")
@click.option("--dir", "folder", required=True, type=click.Path(path_type=Path), help="What FI_CUPY_DUMP_DIR named.")
@click.option("--device", default="cuda", show_default=True, help="cuda, cuda:1 or cpu.")
def replay(folder: Path, device: str) -> None:
    """Make the calls again that FI_CUPY_LOGLEVEL=10 has written; exit code 1 if one ends otherwise than it did."""
    from fi_cupy.api_logging import replay_sequence
    from fi_cupy.errors import CacheError

    results = replay_sequence(folder, device)
    failed = 0
    for found in results:
        said = found.get("error") or found.get("execution_error")
        good = not said and found["comparison_match"]
        failed += not good
        click.echo(
            f"{'same     ' if good else 'different'} {Path(found['dump_dir']).name}{f': {said}' if said else ''}"
        )
    click.echo(f"{len(results)} calls, {len(results) - failed} the same")
    if failed:
        raise CacheError(f"replay: {failed} of {len(results)} calls ended otherwise")
