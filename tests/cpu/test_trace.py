"""Tracing Python into CUDA expressions: equivalence with NumPy through a C++ compiler, and the errors' texts."""

from __future__ import annotations

import ctypes
import linecache
import math
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fi_cupy.errors import CompileError, TracingError
from fi_cupy.jit import ops
from fi_cupy.jit.emit import literal, statements
from fi_cupy.jit.trace import BOOL, FLOAT, INT, Node, trace

INDICES = ("batch", "qo_idx", "kv_idx", "qo_head", "kv_head", "qo_len", "kv_len")
TENSORS = {"bias": FLOAT, "ids": INT, "flags": BOOL}
SCALARS = {"cap": FLOAT, "width": INT}

#: The device functions that generated text calls, for the host.
PRELUDE = r"""
#include <cmath>
#include <cstdlib>
#include <algorithm>
using namespace std;
#define FI_INF INFINITY
namespace math {
static float ptx_exp2(float x) { return exp2f(x); }
static float ptx_log2(float x) { return log2f(x); }
static float rsqrt(float x) { return 1.f / sqrtf(x); }
}
namespace ops {
static float exp(float x) { return expf(x); }
static float log(float x) { return logf(x); }
static float tanh(float x) { return tanhf(x); }
static float reciprocal(float x) { return 1.f / x; }
static float sin(float x) { return sinf(x); }
static float cos(float x) { return cosf(x); }
static float tan(float x) { return tanf(x); }
static float sigmoid(float x) { return 1.f / (1.f + expf(-x)); }
static int floor_div(int a, int b) {
  if (b == 0) return 0;
  return a / b - (a % b != 0 && (a < 0) != (b < 0));
}
static int floor_mod(int a, int b) {
  if (b == 0) return 0;
  int r = a % b;
  return r != 0 && (r < 0) != (b < 0) ? r + b : r;
}
static float floor_mod(float a, float b) {
  float r = fmodf(a, b);
  return r != 0.f && (r < 0.f) != (b < 0.f) ? r + b : r;
}
static float floor_div(float a, float b) {
  float q = (a - floor_mod(a, b)) / b, down = floorf(q);
  return q - down > 0.5f ? down + 1.f : down;
}
}
struct Ctx { int batch, qo_idx, kv_idx, qo_head, kv_head, qo_len, kv_len; };
struct User {
  float cap; int width; float cap_rcp = 1.f / cap, width_rcp = 1.f / float(width);
  static float bias(int i, int j) { return float(i) - 0.25f * float(j); }
  static int ids(int i) { return i / 3; }
  static bool flags(int i) { return i % 2 == 1; }
};
struct Params { float sm_scale; User user; };
"""


class _Tensor:
    """The same arrays as `User`'s on the NumPy side."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, index):
        return self.function(*index) if isinstance(index, tuple) else self.function(index)


class _Context:
    def __init__(self, **values):
        self.__dict__.update(values)


def _traced(function, result=FLOAT, argument="score"):
    return trace(
        function, "variant t: score_fn", argument=argument, indices=INDICES, absent=("dim_idx",), tensors=TENSORS,
        scalars=SCALARS, result=result,
    )  # fmt: skip


def _numpy_context(values, cap, width):
    return _Context(
        **values, cap=cap, width=width, sm_scale=0.125,
        bias=_Tensor(lambda i, j: np.asarray(i, float) - 0.25 * np.asarray(j, float)),
        ids=_Tensor(lambda i: np.fix(np.asarray(i) / 3).astype(np.int64)),
        flags=_Tensor(lambda i: np.fmod(np.asarray(i), 2) == 1),
    )  # fmt: skip


def _compile(folder, functions):
    """Build the traced functions as one shared library; a list of callables ``(score, index arrays) -> array``."""
    code = [PRELUDE]
    for i, function in enumerate(functions):
        body = "\n".join("  " + line for line in statements(_traced(function)))
        code.append(f"static float f{i}(const Params& params, const Ctx& ctx, float score) {{\n{body}\n}}")
        code.append(
            f'extern "C" void run{i}(int n, const float* s, const int* x, float cap, int width, float* out) {{\n'
            "  Params params{0.125f, {cap, width}};\n  for (int i = 0; i < n; ++i) {\n"
            "    const int* p = x + 7 * i;\n    Ctx ctx{p[0], p[1], p[2], p[3], p[4], p[5], p[6]};\n"
            f"    out[i] = f{i}(params, ctx, s[i]);\n  }}\n}}"
        )
    source, library = folder / "t.cpp", folder / "t.so"
    source.write_text("\n".join(code))
    subprocess.run(
        ["g++", "-O0", "-w", "-std=c++17", "-ffp-contract=off", "-shared", "-fPIC", "-o", library, source], check=True
    )
    loaded = ctypes.CDLL(str(library))

    def caller(i):
        entry = getattr(loaded, f"run{i}")

        def call(score, table, cap, width):
            out = np.empty(len(score), np.float32)
            pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (score, table, out)]
            entry(len(score), pointers[0], pointers[1], ctypes.c_float(cap), ctypes.c_int(width), pointers[2])
            return out

        return call

    return [caller(i) for i in range(len(functions))]


def _inputs(seed, n=64):
    rng = np.random.default_rng(seed)
    score = rng.normal(0, 3, n).astype(np.float32)
    table = rng.integers(0, 40, (n, 7)).astype(np.int32)
    return score, table, {name: table[:, i].astype(np.int64) for i, name in enumerate(INDICES)}


def _slope(ctx):
    return ops.exp2(-8.0 * (ctx.qo_head + 1) / 32)


FUNCTIONS = {
    "soft_cap": lambda s, c: 30.0 * np.tanh(s / 30.0),
    "soft_cap_scalar": lambda s, c: c.cap * ops.tanh(s / c.cap),
    "alibi": lambda s, c: s + _slope(c) * (c.kv_idx - c.qo_idx),
    "relative_bias": lambda s, c: s + c.bias[c.qo_head, c.kv_idx - c.qo_idx],
    "document": lambda s, c: np.where(c.ids[c.qo_idx] == c.ids[c.kv_idx], s, -1.0),
    "flags": lambda s, c: ops.where(c.flags[c.kv_idx] & ~c.flags[c.qo_idx], s, 0),
    "window": lambda s, c: ops.where(abs(c.qo_idx - c.kv_idx) <= c.width, s, -math.inf),
    "sigmoid": lambda s, c: ops.sigmoid(s + c.cap),
    "silu": lambda s, c: ops.silu(s),
    "softplus": lambda s, c: ops.softplus(s) + ops.relu(s),
    "powers": lambda s, c: s**3 + s**-2 + abs(s) ** 0.5 + s**0 + (c.qo_idx + 1) ** 2 + 2.0**s,
    "power_half": lambda s, c: (abs(s) + 1) ** -0.5,
    "integer_division": lambda s, c: (c.qo_idx - c.kv_idx) // 7 + (c.qo_idx - c.kv_idx) % 7 + s,
    "negative_divisor": lambda s, c: (c.qo_idx - c.kv_idx) // -5 + (c.qo_idx - c.kv_idx) % -5 + 0 * s,
    "float_division": lambda s, c: s // 0.75 + s % 0.75 + (-s) % -1.5,
    "true_division": lambda s, c: (c.qo_idx / (c.kv_idx + 1)) * s + 1 / (c.qo_idx + 2),
    "bits": lambda s, c: ((c.qo_idx & 12) | (c.kv_idx ^ 3)) + (c.qo_idx << 2) + (c.kv_idx >> 1) + ~c.qo_head + s,
    "rounding": lambda s, c: ops.floor(s) + 2 * ops.ceil(s) + 4 * ops.trunc(s) + 8 * ops.rint(s),
    "transcendental": lambda s, c: ops.exp(-abs(s)) + ops.log(abs(s) + 1) + np.log2(abs(s) + 2) + np.sin(s) - np.cos(s),
    "more": lambda s, c: ops.expm1(s / 8) + ops.log1p(abs(s)) + ops.erf(s) + ops.arctan(s) + ops.rsqrt(abs(s) + 1),
    "casts": lambda s, c: ops.int32(s) + ops.float32(c.qo_idx) / 3 + (s > 0).astype(np.int32) + ops.bool_(c.kv_idx) * 2,
    "minmax": lambda s, c: np.minimum(s, 1) + np.maximum(c.qo_idx, c.kv_idx) + np.clip(s, -0.5, 0.5),
    "logic": lambda s, c: np.where(np.logical_or(s > 1, np.logical_not(c.qo_idx > 5)) ^ (c.kv_idx == 3), 1, s),
    "numpy_scalars": lambda s, c: np.float32(0.1) * s + np.int64(3) - np.float64(0.5),
    "mixed_bool": lambda s, c: (s > 0) + c.qo_idx + (s > 1) * 0.5 + (s > 0) * s,
    "constant": lambda s, c: 2,
    "sm_scale": lambda s, c: s / c.sm_scale,
    "shared": lambda s, c: (s * s + 1) / (s * s + 2) + (s * s + 1),
    "reflected": lambda s, c: 1 - s + 2.0 / (abs(s) + 1) + 7 // (c.qo_idx + 1) + 7 % (c.qo_idx + 1),
    "reflected_power": lambda s, c: 2 ** ops.float32(c.kv_idx % 3) + s,
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    return dict(zip(FUNCTIONS, _compile(tmp_path_factory.mktemp("trace"), FUNCTIONS.values()), strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_generated_text_computes_what_numpy_does(compiled, name):
    score, table, values = _inputs(1)
    actual = compiled[name](score, table, 5.0, 9)
    with np.errstate(all="ignore"):
        wanted = FUNCTIONS[name](score.astype(np.float64), _numpy_context(values, 5.0, 9))
    np.testing.assert_allclose(actual, np.broadcast_to(wanted, score.shape), rtol=3e-5, atol=3e-5)


# Random expressions. Comparisons are made of integers alone: a float compared within rounding could go either way.
_ints = st.deferred(
    lambda: (
        st.sampled_from([("index", n) for n in INDICES])
        | st.integers(-9, 9).map(lambda v: ("const", v))
        | st.tuples(st.sampled_from(["add", "sub", "minimum", "maximum"]), _ints, _ints)
        | st.tuples(st.sampled_from(["floordiv", "mod"]), _ints, st.integers(1, 9).map(lambda v: ("const", v)))
        | st.tuples(st.just("where"), _bools, _ints, _ints)
        | st.tuples(st.just("load"), _ints)
    )
)
_bools = st.deferred(
    lambda: (
        st.tuples(st.sampled_from(["lt", "le", "gt", "ge", "eq", "ne"]), _ints, _ints)
        | st.tuples(st.sampled_from(["and", "or", "xor"]), _bools, _bools)
        | st.tuples(st.just("not"), _bools)
    )
)
_floats = st.deferred(
    lambda: (
        st.just(("score",))
        | st.just(("cap",))
        | st.sampled_from([0.5, -2.0, 3.25]).map(lambda v: ("const", v))
        | st.tuples(st.sampled_from(["add", "sub", "minimum", "maximum"]), _floats, _floats | _ints)
        | st.tuples(st.sampled_from(["tanh", "sigmoid", "abs", "neg", "sin"]), _floats)
        | st.tuples(st.just("where"), _bools, _floats, _floats)
        | st.tuples(st.just("half"), _floats)
    )
)

_BINARY = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "minimum": ops.minimum, "maximum": ops.maximum,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "and": lambda a, b: a & b, "or": lambda a, b: a | b, "xor": lambda a, b: a ^ b,
}  # fmt: skip
_UNARY = {
    "tanh": ops.tanh, "sigmoid": ops.sigmoid, "abs": ops.abs, "neg": lambda x: -x, "sin": ops.sin,
    "half": lambda x: x / 2.0, "not": ops.logical_not,
}  # fmt: skip


def _evaluate(tree, score, ctx):
    head, *rest = tree
    if head == "score":
        return score
    if head == "cap":
        return ctx.cap
    if head == "index":
        return getattr(ctx, rest[0])
    if head == "const":
        return rest[0]
    values = [_evaluate(t, score, ctx) for t in rest]
    if head == "load":
        return ctx.ids[values[0]]
    if head == "where":
        return ops.where(*values)
    return _UNARY[head](*values) if len(values) == 1 else _BINARY[head](*values)


def test_random_expressions(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler here")
    trees = []

    @settings(max_examples=120, deadline=None, database=None)
    @given(_floats)
    def draw(tree):
        trees.append(tree)

    draw()
    calls = _compile(tmp_path, [lambda s, c, tree=tree: _evaluate(tree, s, c) for tree in trees])
    score, table, values = _inputs(2)
    ctx = _numpy_context(values, 5.0, 9)
    for tree, call in zip(trees, calls, strict=True):
        wanted = np.broadcast_to(_evaluate(tree, score.astype(np.float64), ctx), score.shape)
        actual = call(score, table, 5.0, 9)
        # sin of a sum far from zero magnifies the sum's rounding
        np.testing.assert_allclose(actual, wanted, rtol=1e-4, atol=1e-3, err_msg=str(tree))


def test_common_subexpressions_become_locals():
    lines = statements(_traced(lambda s, c: (s * s + 1) * (s * s + 1) + s * s))
    assert lines == ["const float t0 = score * score;", "const float t1 = t0 + 1.f;", "return (t1 * t1) + t0;"]


def test_equal_expressions_are_one_node():
    root = _traced(lambda s, c: ops.exp(s) * ops.exp(s))
    assert isinstance(root, Node) and root.args[0] is root.args[1]


def test_division_by_what_is_uniform_is_a_product():
    assert statements(_traced(lambda s, c: s / 4)) == ["return score * 0.25f;"]
    assert statements(_traced(lambda s, c: s / c.cap)) == ["return score * params.user.cap_rcp;"]
    assert statements(_traced(lambda s, c: s / (c.kv_idx + 1))) == ["return score / float(ctx.kv_idx + 1);"]


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [(1.0, FLOAT, "1.f"), (-0.5, FLOAT, "(-0.5f)"), (0.1, FLOAT, "0.1f"), (1e30, FLOAT, "1e+30f"), (3, INT, "3"),
     (-3, INT, "(-3)"), (-(2**31), INT, "(-2147483647 - 1)"), (True, BOOL, "true"), (math.inf, FLOAT, "FI_INF"),
     (-math.inf, FLOAT, "(-FI_INF)"), (math.nan, FLOAT, "__int_as_float(0x7fc00000)"), (-0.0, FLOAT, "(-0.f)")],
)  # fmt: skip
def test_literals(value, kind, text):
    assert literal(value, kind) == text


def _branch(score, ctx):
    doubled = score * 2
    if doubled > 3:
        return doubled
    return score


ERRORS = {
    "if": (_branch, "ops.where"),
    "and": (lambda s, c: (s > 1) and s, "& | ~"),
    "or": (lambda s, c: (s > 1) or s, "& | ~"),
    "not": (lambda s, c: not s, "& | ~"),
    "chain": (lambda s, c: ops.where(0 < s < 1, s, 0), "& | ~"),
    "min": (lambda s, c: min(s, 1), "ops.minimum"),
    "float": (lambda s, c: float(s), "fi_cupy.jit.ops"),
    "int": (lambda s, c: int(c.qo_idx), "fi_cupy.jit.ops"),
    "math": (lambda s, c: math.exp(s), "fi_cupy.jit.ops"),
    "range": (lambda s, c: sum(range(c.kv_idx)), "a range"),
    "list": (lambda s, c: [1, 2, 3][c.kv_idx], "tensors="),
    "array": (lambda s, c: np.arange(4)[c.kv_idx], "tensors="),
    "array_operand": (lambda s, c: np.arange(4.0) * s, "tensors="),
    "iterate": (lambda s, c: sum(s), "a range"),
    "attribute": (lambda s, c: s.sum(), "'sum'"),
    "unknown": (lambda s, c: c.bais[0], "ctx.bais is unknown; ctx has batch"),
    "absent": (lambda s, c: c.dim_idx, "ctx.dim_idx has no meaning"),
    "numpy": (lambda s, c: np.cumsum(s), "numpy.cumsum"),
    "reduction": (lambda s, c: np.add.reduce(s), "numpy.add"),
    "tensor": (lambda s, c: s + c.bias, "ctx.bias[...]"),
    "tensor_slice": (lambda s, c: c.bias[c.qo_head, :], "one integer a dimension"),
    "tensor_rank": (lambda s, c: c.bias[0] + c.bias[0, 1], "elsewhere"),
    "tensor_float": (lambda s, c: c.bias[s, 0], "ops.int32"),
    "bool_sum": (lambda s, c: (s > 0) + (s > 1), "two booleans"),
    "bitwise_float": (lambda s, c: s & 1, "of a float"),
    "condition": (lambda s, c: ops.where(s, 1, 2), "expected a comparison"),
    "none": (lambda s, c: None, "returns None"),
    "text": (lambda s, c: "x", "returns str"),
    "tuple": (lambda s, c: (s, s), "returns tuple"),
    "big": (lambda s, c: c.qo_idx + 2**40, "32 bits"),
    "set": (lambda s, c: setattr(c, "x", s), "local variable"),
    "python": (lambda s, c: 1 / 0, "ZeroDivisionError"),
    "arguments": (lambda s: s, "TypeError"),
    "integer_power": (lambda s, c: c.qo_idx**-1, "ops.float32"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_the_line_and_the_remedy(name):
    function, text = ERRORS[name]
    with pytest.raises(TracingError) as caught:
        _traced(function)
    message = str(caught.value)
    assert text in message and message.startswith("variant t: score_fn: ")
    assert f"{__file__}:" in message
    assert isinstance(caught.value, (CompileError, TypeError))
    line = int(message.split(f"{__file__}:")[1].split(":")[0])
    source = linecache.getline(__file__, line)
    assert "if doubled > 3" in source if name == "if" else "lambda" in source


def test_mask_must_be_a_condition():
    with pytest.raises(TracingError, match="expected a condition"):
        _traced(lambda c: c.kv_idx - c.qo_idx, result=BOOL, argument=None)
    assert _traced(lambda c: c.kv_idx <= c.qo_idx, result=BOOL, argument=None).kind == BOOL
    assert _traced(lambda c: True, result=BOOL, argument=None).op == "const"


def test_a_value_of_another_function_is_refused():
    kept = []
    _traced(lambda s, c: kept.append(s) or s)
    with pytest.raises(TracingError, match="another function"):
        _traced(lambda s, c: s + kept[0])


def test_ops_run_on_numpy():
    x = np.linspace(-2, 2, 9)
    np.testing.assert_allclose(ops.sigmoid(x), 1 / (1 + np.exp(-x)))
    np.testing.assert_allclose(ops.softplus(x), np.log1p(np.exp(x)))
    np.testing.assert_allclose(ops.erf(x), [math.erf(v) for v in x])
    np.testing.assert_array_equal(ops.where(x > 0, x, 0), np.where(x > 0, x, 0))
    assert ops.int32(x).dtype == np.int32 and ops.float32(x).dtype == np.float32
    assert not ops.logical_and(x > 0, x < 0).any()
