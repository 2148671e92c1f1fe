"""The one table of tolerances, and the comparison that every test of values uses."""

from __future__ import annotations

from typing import Any

import numpy as np

#: dtype name -> (relative L2 error, largest error of one element relative to the largest reference value).
#: One rounding to a type of p bits gives a relative L2 error near 2^-p / 2.4, and up to 2^-p where values are few.
ELEMENTWISE = {
    "float32": (2e-6, 4e-6),
    "float16": (6e-4, 1.2e-3),
    "bfloat16": (4.2e-3, 9e-3),
    "float8_e4m3fn": (4e-2, 7e-2),
    "float8_e5m2": (8e-2, 1.4e-1),
    "float64": (1e-12, 1e-12),
}
#: Products and attention round their operands (the softmax weights among them) once more.
PRODUCT = {
    "float32": (2e-5, 1e-4),
    "float16": (8e-4, 4e-3),
    "bfloat16": (6e-3, 3e-2),
    "float8_e4m3fn": (6e-2, 2e-1),
    "float8_e5m2": (1e-1, 3e-1),
    "float64": (1e-12, 1e-12),
}
#: Attention with ROPE_LLAMA rounds q and k a second time, once rotated, which the reference does not do.
ROTATED = {name: (1.5 * rel_l2, rel_max) for name, (rel_l2, rel_max) in PRODUCT.items()}
_TABLES = {"elementwise": ELEMENTWISE, "product": PRODUCT, "rotated": ROTATED}


def assert_close(actual: Any, expected: Any, dtype: Any, kind: str = "elementwise", what: str = "") -> None:
    """Compare values with a float64 reference.

    Parameters
    ----------
    actual : array-like
        What the operator gave (any NumPy dtype, ml_dtypes' included).
    expected : array-like, float64
        The reference. Infinities must agree exactly; NaN never passes.
    dtype
        The type whose rounding is allowed for: of the output, or of the operands where that is coarser.
    kind : {"elementwise", "product", "rotated"}
        The row of the table.
    what : str
        Said first in the message.
    """
    name = getattr(dtype, "name", None) or str(dtype).removeprefix("torch.")
    rel_l2, rel_max = _TABLES[kind][name]
    got = np.asarray(actual).astype(np.float64)
    want = np.asarray(expected).astype(np.float64)
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    if got.size == 0:
        return
    assert not np.isnan(got).any(), f"{what}: {np.isnan(got).sum()} of {got.size} values are NaN"
    infinite = np.isinf(want)
    assert (got[infinite] == want[infinite]).all() and not np.isinf(got[~infinite]).any(), f"{what}: infinities differ"
    got, want = got[~infinite], want[~infinite]
    if got.size == 0:
        return
    scale = np.abs(want).max()
    if scale == 0:
        assert (got == 0).all(), f"{what}: got {np.abs(got).max():.3g}, expected all zeros"
        return
    norm = np.linalg.norm(got - want) / np.linalg.norm(want)
    worst = int(np.abs(got - want).argmax())
    largest = abs(got.flat[worst] - want.flat[worst]) / scale
    assert norm <= rel_l2 and largest <= rel_max, (
        f"{what}: relative L2 error {norm:.2e} (allowed {rel_l2:.1e}), largest {largest:.2e} (allowed {rel_max:.1e}) "
        f"at flat index {worst}: got {got.flat[worst]:.6g}, expected {want.flat[worst]:.6g}"
    )
