"""How far `mm_bf16`'s untuned choice is from the tuned one, on the shapes of ``bench_gemm.py``.

``python bench/tune_gemm.py`` tunes every shape at exactly its number of rows and prints a table; exit code 1 where an
untuned default is more than 10 % slower.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from bench_gemm import LARGE, SMALL

from fi_cupy.autotuner import AutoTuner, autotune
from fi_cupy.device import device_info
from fi_cupy.dtypes import bfloat16
from fi_cupy.gemm.tuning import MmProblem, choose_mm_kernel
from fi_cupy.tune import table

LIMIT = 1.10


def shapes() -> list[tuple[int, int, int, bool]]:
    """(m, n, k, pdl) of the bench table."""
    found = [(m, n, k, False) for n, k in LARGE for m in (1, 4, 16, 64)]
    found += [(m, n, k, pdl) for n, k in SMALL for m in (1, 8, 64) for pdl in (False, True)]
    found += [(m, n, k, False) for n, k in SMALL[:4] for m in (256, 1024)]
    found += [(m, 4096, 4096, False) for m in (128, 256, 1024, 4096)]
    return [*found, (8192, 8192, 8192, False)]


def main() -> None:
    """Tune, print, judge."""
    tuner, device = AutoTuner.get(), device_info(0)
    tuner.clear_cache()
    for m, n, k, pdl in shapes():
        if pdl and not device.has_pdl:
            continue
        with autotune(tuning_buckets=[m]):
            choose_mm_kernel("mm_bf16", tuple(MmProblem(m, n, k, device, bfloat16, bfloat16, pdl=pdl)))
    rows = table(tuner, device)
    print(f"{device.name}: untuned over tuned, {len(rows)} shapes")
    for row in rows:
        a, b = row.shapes.split()[:2]
        pdl = "pdl" if row.extras.endswith("pdl") else ""
        ranking = ", ".join(f"{t.split('_', 3)[-1]} {us:.2f}" for _, t, us in row.entry.ranking[:3])
        mark = " <--" if row.ratio > LIMIT else ""
        print(f"{a:>10s} x {b:11s} {pdl:3s} {row.entry.fallback_us:8.2f} -> {row.entry.us:8.2f} us "
              f"{row.ratio:5.3f}  {ranking}{mark}")  # fmt: skip
    late = [row for row in rows if row.ratio > LIMIT]
    print(f"{len(rows) - len(late)} of {len(rows)} within {LIMIT:.2f}; most {max(r.ratio for r in rows):.3f}")
    sys.exit(1 if late else 0)


if __name__ == "__main__":
    main()
