"""Measure a profile's operators on this GPU and keep the choices: the body of ``fi-cupy tune``."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from fi_cupy import autotuner
from fi_cupy.decode_tuning import choose_geometry, decode_problem
from fi_cupy.device import DeviceInfo, device_info, require_gpu
from fi_cupy.dtypes import DType, bfloat16, float32
from fi_cupy.errors import ArgumentError
from fi_cupy.gemm.tuning import MmProblem, choose_mm_kernel
from fi_cupy.profiles import MODELS, ModelShape
from fi_cupy.tuning.file import Entry

MAX_ROWS = 4096
MAX_BATCH = 256


@dataclass(frozen=True)
class TunedRow:
    """One choice, for a table: what was measured and how the untuned default compares."""

    op: str
    shapes: str
    extras: str
    entry: Entry

    @property
    def ratio(self) -> float:
        """Time of the untuned default over that of the choice."""
        return self.entry.fallback_us / self.entry.us


def model_products(shape: ModelShape) -> list[tuple[int, int, DType]]:
    """(n, k, output type) of the products of a model: qkv, attention output, gate-up, down, vocabulary."""
    h, d = shape.hidden, shape.head_dim
    qkv = (shape.num_qo_heads + 2 * shape.num_kv_heads) * d
    return [
        (qkv, h, bfloat16), (h, shape.num_qo_heads * d, bfloat16), (2 * shape.intermediate, h, bfloat16),
        (h, shape.intermediate, bfloat16), (shape.vocab, h, float32),
    ]  # fmt: skip


def heads(shape: ModelShape) -> tuple[int, int, int]:
    """(num_qo_heads, num_kv_heads, head_dim)."""
    return shape.num_qo_heads, shape.num_kv_heads, shape.head_dim


def model_problems(shape: ModelShape, device: DeviceInfo, rows: int, pdl: bool) -> Iterator[MmProblem]:
    """The products of a model's pass over `rows` tokens; logits are wanted for a decode batch only."""
    for n, k, out in model_products(shape):
        m = min(rows, MAX_BATCH) if out is float32 else rows
        for dependent in (False, True) if pdl else (False,):
            yield MmProblem(m, n, k, device, bfloat16, out, pdl=dependent)


def tune_profile(
    profile: str,
    path: Path | None = None,
    rows: int = MAX_ROWS,
    progress: Callable[[str], None] = lambda text: None,
) -> list[TunedRow]:
    """Measure a model's products for 1 to `rows` rows, and its batch decode, on the current GPU; write the choices.

    Parameters
    ----------
    profile : str
        One of `fi_cupy.profiles.MODELS`, or several with commas between.
    path : Path, optional
        The JSON file; by default that which every process reads (`fi_cupy.autotuner.default_file`).
    rows : int
        Most tokens of a pass.
    progress : function
        Called with a line before each operator.

    Returns
    -------
    list of TunedRow
        What is known of the profile's operators now, measured before included.

    Raises
    ------
    ArgumentError
        No such model, or choices are switched off and no path is given.
    CudaUnavailableError
        No GPU.
    CacheError
        The file cannot be written; what was measured counts in this process.
    """
    names = [name.strip() for name in profile.split(",")]
    for name in names:
        if name not in MODELS:
            raise ArgumentError(f"tune: profile {name!r} is unknown, expected one of {', '.join(MODELS)}")
    if rows < 1:
        raise ArgumentError(f"tune: rows is {rows}, expected at least 1")
    target = path if path is not None else autotuner.default_file()
    if target is None:
        raise ArgumentError("tune: FI_CUPY_AUTOTUNE_DIR is off, so name a file to write")
    require_gpu("tune")
    from cupy.cuda import runtime

    device = device_info(runtime.getDevice())
    tuner = autotuner.AutoTuner.get()
    if target.exists():
        tuner.load_configs(target)
    with autotuner.autotune():
        for name in names:
            for p in model_problems(MODELS[name], device, rows, device.has_pdl):
                progress(f"{name}: product n {p.n}, k {p.k}, up to {p.m} rows{', dependent launch' * p.pdl}")
                choose_mm_kernel("mm_bf16", tuple(p))
            shape, batch = MODELS[name], min(rows, MAX_BATCH)
            progress(f"{name}: decode, up to {batch} requests")
            choose_geometry(decode_problem(batch, *heads(shape), bfloat16, bfloat16, shape.page_size), device)
    tuner.save_configs(target)
    return table(tuner, device)


def table(tuner: autotuner.AutoTuner, device: DeviceInfo) -> list[TunedRow]:
    """Everything a tuner knows for a GPU."""
    found = []
    for key, entry in tuner.choices(device).items():
        op, shapes, extras = ast.literal_eval(key)
        text = " ".join("x".join(map(str, shape)) for shape in shapes)
        found.append((op, shapes, TunedRow(op, text, " ".join(str(e) for e in extras if e), entry)))
    return [row for _, _, row in sorted(found, key=lambda f: (f[0], f[1][1:], f[2].extras, f[1]))]
