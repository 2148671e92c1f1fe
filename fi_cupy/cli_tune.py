"""``fi-cupy tune``."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fi_cupy.tune import TunedRow


@click.command("tune")
@click.option("--profile", default="llama3-8b", show_default=True, help="A model, or several with commas between.")
@click.option("--rows", type=click.IntRange(1), default=4096, show_default=True, help="Most tokens of a pass.")
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write. [default: tuned/choices.json in the kernel cache, which every process reads]",
)  # fmt: skip
@click.option("--show", is_flag=True, help="Measure nothing; print what is known for this GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def tune_command(profile: str, rows: int, output: Path | None, show: bool, as_json: bool) -> None:
    """Measure a model's products on this GPU and keep the fastest kernels; needs the GPU to itself."""
    from fi_cupy import autotuner, tune
    from fi_cupy.device import device_info, require_gpu

    path = output if output is not None else autotuner.default_file()
    if show:
        require_gpu("tune")
        tuner = autotuner.AutoTuner.get()
        if path is not None and path.exists():
            tuner.load_configs(path)
        from cupy.cuda import runtime

        found = tune.table(tuner, device_info(runtime.getDevice()))
    else:
        found = tune.tune_profile(profile, output, rows, lambda text: click.echo(text, err=True))
    if as_json:
        click.echo(json.dumps([{**asdict(row), "ratio": None if math.isnan(row.ratio) else row.ratio} for row in found], indent=1))  # fmt: skip  # noqa: E501
        return
    _print(found)
    click.echo(f"{len(found)} choices" + (f" in {path}" if path is not None else ""))


def _print(rows: list[TunedRow]) -> None:
    from fi_cupy.cli import _console, _table

    listing = _table("operator", "shapes", "types", "choice", ">us", ">untuned us", ">ratio")
    for row in rows:
        e = row.entry
        figures = (f"{e.us:.2f}", f"{e.fallback_us:.2f}", f"{row.ratio:.2f}")
        listing.add_row(row.op, row.shapes, row.extras, str(e.tactic), *figures)
    if rows:
        _console().print(listing)
        ratios = sorted(row.ratio for row in rows if not math.isnan(row.ratio))
        if ratios:
            over = sum(r > 1.1 for r in ratios)
            click.echo(
                f"untuned over tuned: median {ratios[len(ratios) // 2]:.3f}, most {ratios[-1]:.3f}, above 1.10: {over}"
            )
