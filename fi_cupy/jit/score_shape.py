"""Traced score functions of a shape that the Hopper kernel computes with less than a call an element.

``score + bias`` with a bias that grows by the same amount from key to key (ALiBi, or a bias a row) is one multiply-add
an element. ``a tanh(b score) + c`` or ``a sigmoid(b score) + c`` with numbers a, b, c is what the built-in soft cap is.
Any other function is called element by element.
"""

from __future__ import annotations

from fi_cupy.jit.emit import _POWERS, _bare, _Body, _Scaled, is_uniform, literal
from fi_cupy.jit.trace import FLOAT, INT, Graph, Node

_HEAD = "  template <class Params>\n  FI_DEVICE static"


def score_shape(has_score: bool, root: Node | None) -> tuple[str, list[str]]:
    """The shape ("plain", "shifted", "capped" or "any") and the lines of ``struct Variant`` that say it.

    `root` is the score function's traced expression, None for CUDA text and where there is no such function.
    """
    found: tuple[str, list[str]] = ("any" if has_score else "plain", [])
    if root is not None:
        for shape, lines in (("shifted", _shifted(root)), ("capped", _capped(root))):
            if lines is not None:
                found = shape, lines
                break
    constant = f"  static constexpr ScoreShape kScoreShape = ScoreShape::k{found[0].capitalize()};"
    return found[0], [constant, *found[1]]


def _function(head: str, body: list[str]) -> list[str]:
    return [f"{_HEAD} {head} {{", *(f"    {line}" for line in body), "  }"]


# --- score + bias ---------------------------------------------------------------------------------------------------


class _NotLinear(Exception):
    """The expression is not a + b x of what it was asked for."""


def _depends(node: Node, op: str, value: str | None) -> bool:
    """Whether a leaf (operation and, if given, payload) is below `node`."""
    if node.op == op and value in (None, node.value):
        return True
    return any(_depends(a, op, value) for a in node.args)


def _on_score(node: Node) -> float:
    """The number that the score is multiplied by, 0 for what does not look at it."""
    if node.op == "argument":
        return 1.0
    if not _depends(node, "argument", None):
        return 0.0
    if node.op in ("add", "sub"):
        a, b = map(_on_score, node.args)
        return a + b if node.op == "add" else a - b
    if node.op == "neg":
        return -_on_score(node.args[0])
    raise _NotLinear


def _slope(graph: Graph, node: Node) -> Node:
    """The derivative with respect to ``kv_idx``, of the same kind."""
    zero = graph.convert(graph.constant(0), node.kind)
    if not _depends(node, "index", "kv_idx"):
        return zero
    if node.op == "index":
        return graph.constant(1)
    if node.op == "cast" and node.kind == FLOAT and node.args[0].kind == INT:
        return graph.convert(_slope(graph, node.args[0]), FLOAT)
    if node.op in ("add", "sub", "neg"):
        parts = [_slope(graph, a) for a in node.args]
        if node.op == "add" and zero in parts:
            return parts[parts[0] is zero]
        if node.op == "sub" and parts[1] is zero:
            return parts[0]
        return graph.node(node.op, tuple(parts), None, node.kind)
    if node.op == "mul":
        a, b = node.args
        if _depends(a, "index", "kv_idx"):
            a, b = b, a
        if _depends(a, "index", "kv_idx"):
            raise _NotLinear
        return graph.node("mul", (a, _slope(graph, b)), None, node.kind)
    if node.op == "truediv" and not _depends(node.args[1], "index", "kv_idx"):
        return graph.node("truediv", (_slope(graph, node.args[0]), node.args[1]), None, node.kind)
    raise _NotLinear


#: Elements of arrays that stay the same along a row and are kept in registers: two rows a lane have as many each.
_MOST_KEPT = 2


class _RowBody(_Body):
    """A body in which some loads are members of ``v``, and the score is 0."""

    def __init__(self, root: Node, kept: list[Node]) -> None:
        self._kept = kept
        super().__init__(root)

    def expression(self, node: Node) -> str:
        if node.op == "argument":
            return "0.f"
        return f"v.v{self._kept.index(node)}" if node in self._kept else super().expression(node)

    def statements(self, root: Node) -> list[str]:
        """Lines that end in ``return``."""
        return [*self.lines, f"return {_bare(self.text[id(root)])};"]


def _shifted(root: Node) -> list[str] | None:
    """``values``: what is loaded once a row; ``bias``: the score less its argument; ``slope``: what it gains a key."""
    graph = Graph("score shape")
    try:
        if _on_score(root) != 1.0:
            return None
        slope = _slope(graph, root)
    except _NotLinear:
        return None
    flat = slope.op == "const" and slope.value == 0
    kept = [n for n in _nodes(root) if n.op == "load" and not _depends(n, "index", "kv_idx")][:_MOST_KEPT]
    loads: list[str] = []
    for node in kept:
        body = _Body(node)
        loads.append(f"{{ {' '.join(body.lines)} v.v{len(loads)} = {_bare(body.text[id(node)])}; }}")
    given = "const Params& params, const VariantContext& ctx"
    return [
        f"  static constexpr bool kHasSlope = {'false' if flat else 'true'};",
        "  struct Values {",
        *(f"    {node.kind} v{i};" for i, node in enumerate(kept)),
        "  };",
        *_function(f"Values values({given})", ["Values v;", *loads, "return v;"]),
        *_function(f"float bias({given}, const Values& v)", _RowBody(root, kept).statements(root)),
        *_function(f"float slope({given}, const Values& v)", _RowBody(slope, kept).statements(slope)),
    ]


# --- a tanh(b score) + c --------------------------------------------------------------------------------------------


def _capped(root: Node) -> list[str] | None:
    """``cap``: base-2 logit = factor / (2^(inner qk + shift) + 1) + offset."""
    calls = [n for n in _nodes(root) if n.op in ("tanh", "sigmoid") and not is_uniform(n)]
    if len(calls) != 1:
        return None
    body = _Scaled(root)
    form, argument = body.form(root), body.form(calls[0].args[0])
    if form.inner != body.form(calls[0]).inner or argument.inner != "qk":
        return None
    exponent = body.times(argument, _POWERS[calls[0].op][1])
    outer = body.times(form, "base")
    values = [exponent.factor, exponent.offset, outer.factor, outer.offset]
    # Lines may name these where they are about elements, and then are not used.
    unused = ["const float qk = 0.f;", "const bool unit = true;"]
    result = f"return {{{', '.join(v or literal(0.0, FLOAT) for v in values)}}};"
    return _function("ScoreCap cap(const Params& params, float scale, float base)", [*unused, *body.lines, result])


def _nodes(root: Node) -> list[Node]:
    seen: dict[int, Node] = {}
    pending = [root]
    while pending:
        node = pending.pop()
        if id(node) not in seen:
            seen[id(node)] = node
            pending += node.args
    return list(seen.values())
