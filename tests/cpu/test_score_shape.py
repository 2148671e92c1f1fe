"""Which traced score functions the Hopper kernel computes as built-in ones, and the numbers that it gets of them."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest

from fi_cupy.dtypes import bfloat16
from fi_cupy.jit import define_variant, ops
from fi_cupy.prefill_hopper import _VARIANT_TILES, TILES
from fi_cupy.prefill_kernel import Problem, geometry
from fi_cupy.profiles import TYPICAL

SHIFTED = {
    "alibi": lambda s, c: s + c.slopes[c.qo_head] * (c.kv_idx - c.qo_idx),
    "behind": lambda s, c: 3 - c.slopes[c.qo_head] * c.kv_idx / c.cap - (-s),
    "each row": lambda s, c: c.slopes[c.qo_idx] * c.qo_len + s,
    "integers": lambda s, c: s + (2 * (c.kv_idx + 5) - c.kv_idx * c.qo_head) * 0.25,
    "nothing": lambda s, c: s + 0,
}
CAPPED = {
    "cap": lambda s, c: c.cap * ops.tanh(s / c.cap),
    "negative": lambda s, c: 2 - 3 * ops.tanh(-s * c.cap + 0.5),
    "sigmoid": lambda s, c: 5 * ops.sigmoid(2 * s - c.cap) - 1,
    "bare": lambda s, c: ops.tanh(s),
}
ANY = {
    "two": lambda s, c: 2 * s + c.kv_idx,
    "a distance": lambda s, c: s - c.slopes[c.qo_head] * abs(c.kv_idx - c.qo_idx),
    "by key": lambda s, c: s + c.slopes[c.kv_idx],
    "square": lambda s, c: s + 0.1 * c.kv_idx * c.kv_idx,
    "halves": lambda s, c: s + c.kv_idx // 2,
    "a cap a head": lambda s, c: c.slopes[c.qo_head] * ops.tanh(s),
    "a cap of alibi": lambda s, c: c.cap * ops.tanh(s + 0.5 * c.kv_idx),
    "two caps": lambda s, c: ops.tanh(s) + ops.sigmoid(s),
    "a cap and more": lambda s, c: ops.tanh(s) + s,
    "inside": lambda s, c: ops.tanh(s * s),
}


def lowered(function, **options):
    options = {"tensors": ["slopes"], "scalars": ["cap"], **options}
    return define_variant("shaped", score_fn=function, **options).lowered()


@pytest.mark.parametrize(
    ("shape", "function"),
    [(shape, f) for shape, of in (("shifted", SHIFTED), ("capped", CAPPED), ("any", ANY)) for f in of.values()],
    ids=[*SHIFTED, *CAPPED, *ANY],
)
def test_shapes(shape, function):
    made = lowered(function)
    assert made.shape == shape and made.regular == (shape != "any")
    assert f"kScoreShape = ScoreShape::k{shape.capitalize()};" in made.text
    masked = lowered(function, mask_fn=lambda c: c.kv_idx != 3)
    assert masked.shape == shape and not masked.regular
    assert not lowered(function, use_softmax=False).regular


def test_other_functions_leave_the_scores_plain():
    assert define_variant("a", post_process_fn=lambda out, c: 2 * out).lowered().shape == "plain"
    assert define_variant("b", score_fn="score * 2.f").lowered().shape == "any"


def calculate(text: str, **values) -> object:
    """What the returned expression of a function's text is, in Python's arithmetic."""
    text = re.sub(r"(\d\.\d*(?:e-?\d+)?|\d+\.)f\b", r"\1", text)
    for name, to in (("params.user.", ""), ("math::", ""), ("ctx.", ""), ("ops::reciprocal", "1 / ")):
        text = text.replace(name, to)
    names = {"log2e": math.log2(math.e), "fmaf": lambda a, b, c: a * b + c, **values}
    return eval(text, {"__builtins__": {}, "float": float}, names)


def returned(text: str, function: str) -> str:
    body = text[text.index(f" {function}(") :]
    return re.search(r"return ([^;]*);", body)[1]


@pytest.mark.parametrize("function", SHIFTED.values(), ids=SHIFTED)
def test_the_slope_is_what_a_key_adds(function):
    made, slopes = lowered(function), np.linspace(0.1, 2, 50)
    context = {"qo_idx": 7, "qo_head": 3, "kv_idx": 20, "qo_len": 30, "kv_len": 40, "slopes": slopes, "cap": 1.5}
    at = [function(0.3, SimpleNamespace(**{**context, "kv_idx": kv})) for kv in (20, 21, 90)]
    kept = re.findall(r"v\.(v\d) = ([^;]*);", made.text)
    values = {**context, "slopes": lambda i: slopes[i], "cap_rcp": 1 / 1.5}
    values["v"] = SimpleNamespace(**{name: calculate(text, **values) for name, text in kept})
    values["slopes"] = None  # loaded once a row
    slope = calculate(returned(made.text, "slope"), **values)
    assert calculate(returned(made.text, "bias"), **values) + 0.3 == pytest.approx(at[0])
    assert slope == pytest.approx(at[1] - at[0]) and 70 * slope == pytest.approx(at[2] - at[0])
    assert ("kHasSlope = true" in made.text) == (slope != 0)


@pytest.mark.parametrize("function", CAPPED.values(), ids=CAPPED)
def test_a_cap_has_the_functions_numbers(function):
    text = returned(lowered(function).text, "cap").strip("{}")
    scale, base, cap = 0.125, 1.75, 1.5
    inner, shift, factor, offset = calculate(f"[{text}]", scale=scale, base=base, cap=cap, cap_rcp=1 / cap)
    for qk in (-40.0, -3.0, 0.0, 1.0, 25.0):
        want = base * function(np.float64(scale * qk), SimpleNamespace(cap=cap))
        assert factor / (2 ** (inner * qk + shift) + 1) + offset == pytest.approx(float(want), abs=1e-6)


def test_who_gets_three_warpgroups():
    def tiles(variant, dim=128, **options):
        plain = {"alibi": False, "soft_cap": False, **options}
        p = Problem(32, 8, dim, dim, bfloat16, False, False, variant=variant, **plain)
        return geometry(p, 1024, TYPICAL["90a"]).hopper

    alibi, cap = lowered(SHIFTED["alibi"]), lowered(CAPPED["cap"])
    assert tiles(alibi) is tiles(cap) is TILES[128, 128]
    assert tiles(alibi, 64) is TILES[64, 64] and tiles(cap, 64).tile_kv == 96
    assert tiles(alibi, 256) is _VARIANT_TILES[256, 256]
    for other in (lowered(ANY["two"]), lowered(SHIFTED["alibi"], mask_fn=lambda c: c.kv_idx != 3)):
        assert tiles(other) is _VARIANT_TILES[128, 128]
    assert tiles(alibi, soft_cap=True) is tiles(cap, alibi=True) is _VARIANT_TILES[128, 128]
