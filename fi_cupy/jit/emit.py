"""From an expression graph (`trace`) to CUDA statements: a value used twice becomes a local."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fi_cupy.jit.trace import BOOL, FLOAT, INT, Node

_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==",
    "ne": "!=", "and": "&", "or": "|", "xor": "^", "lshift": "<<", "rshift": ">>",
}  # fmt: skip
_CALLS = {
    "floordiv": "ops::floor_div", "mod": "ops::floor_mod", "pow": "powf", "exp": "ops::exp", "exp2": "math::ptx_exp2",
    "expm1": "expm1f", "log": "ops::log", "log2": "math::ptx_log2", "log1p": "log1pf", "sqrt": "sqrtf",
    "rsqrt": "math::rsqrt", "tanh": "ops::tanh", "sigmoid": "ops::sigmoid", "sin": "ops::sin", "cos": "ops::cos",
    "tan": "ops::tan", "arctan": "atanf", "erf": "erff", "floor": "floorf", "ceil": "ceilf", "trunc": "truncf",
    "rint": "rintf",
}  # fmt: skip
_BY_KIND = {
    ("minimum", FLOAT): "fminf", ("maximum", FLOAT): "fmaxf", ("minimum", INT): "min", ("maximum", INT): "max",
    ("abs", FLOAT): "fabsf", ("abs", INT): "abs",
}  # fmt: skip
#: Behind a float scalar's name: its reciprocal, which the host computes beside it.
RECIPROCAL = "_rcp"
#: An expression longer than this becomes a local of its own.
_LINE = 72


def literal(value: bool | int | float, kind: str) -> str:
    """A constant as CUDA text."""
    if kind == BOOL:
        return "true" if value else "false"
    if kind == INT:
        if value == -(2**31):
            return "(-2147483647 - 1)"
        return str(int(value)) if value >= 0 else f"({int(value)})"
    if math.isnan(value):
        return "__int_as_float(0x7fc00000)"
    if math.isinf(value):
        return "FI_INF" if value > 0 else "(-FI_INF)"
    text = repr(float(str(np.float32(value))))  # the shortest decimal that is this float
    text = text.removesuffix(".0") + "." if text.endswith(".0") else text
    text += "f"
    return text if math.copysign(1.0, value) > 0 else f"({text})"


def statements(root: Node) -> list[str]:
    """Lines of a function body that ends in ``return``."""
    body = _Body(root)
    return [*body.lines, f"return {_bare(body.text[id(root)])};"]


def scaled_statements(root: Node) -> list[str]:
    """Lines of ``base * root`` where the argument is ``scale * qk``, see `_Scaled`."""
    body = _Scaled(root)
    factor, form = body.times(body.form(root), "base"), body.joined
    return [*body.lines, f"return {_bare(form(factor))};"]


class _Body:
    """Every node of a graph as text, in order: `lines` define the locals that `text` names."""

    def __init__(self, root: Node) -> None:
        self.uses: dict[int, int] = {}
        self.order: list[Node] = []
        self._visit(root)
        self.text: dict[int, str] = {}
        self.lines: list[str] = []
        for node in self.order:
            expression = self.expression(node)
            shared = node is not root and self.uses[id(node)] > 1
            if node.args and (shared or (node is not root and len(expression) > _LINE)):
                expression = self.local(node.kind, expression)
            self.text[id(node)] = expression

    def _visit(self, node: Node) -> None:
        self.uses[id(node)] = self.uses.get(id(node), 0) + 1
        if self.uses[id(node)] == 1:
            for operand in node.args:
                self._visit(operand)
            self.order.append(node)

    def local(self, kind: str, expression: str) -> str:
        """A new local with the expression's value."""
        name = f"t{len(self.lines)}"
        self.lines.append(f"const {kind} {name} = {_bare(expression)};")
        return name

    def expression(self, node: Node) -> str:
        """A node's text from that of its operands."""
        return _expression(node, lambda n: self.text[id(n)])


class _Form(NamedTuple):
    """``factor * inner + offset``, where all but `inner` is the same for all elements; no `inner`: the offset alone."""

    inner: str
    factor: str
    offset: str


class _Scaled(_Body):
    """A score's text with what is the same for all elements kept apart from what is not, as `_Form`.

    Products, quotients and sums with uniform values are then arithmetic on uniform values, which the compiler does once
    a tile. They reach through tanh, sigmoid and exp, which work on powers of two: ``c tanh(s x)`` costs an element one
    product, ``1 / (2^z + 1)``, and one multiply-add.
    """

    def __init__(self, root: Node) -> None:
        self._forms: dict[int, _Form] = {}
        super().__init__(root)

    def expression(self, node: Node) -> str:
        if node.kind == FLOAT and not is_uniform(node):
            return self.joined(self.form(node))
        return super().expression(node)

    def form(self, node: Node) -> _Form:
        """The node as a form; its operands have been met before."""
        if id(node) not in self._forms:
            self._forms[id(node)] = self._made(node)
        return self._forms[id(node)]

    def _made(self, node: Node) -> _Form:
        plain = super().expression
        if node.kind != FLOAT or node.op == "load":
            return _Form(plain(node), "", "")
        if is_uniform(node):
            return _Form("", "", plain(node))
        if node.op == "argument":
            return _Form("qk", "scale", "")
        if node.op == "neg":
            return self.times(self.form(node.args[0]), "(-1.f)")
        if len(node.args) == 2 and any(map(is_uniform, node.args)):
            x, u = node.args[::-1] if is_uniform(node.args[0]) else node.args
            first, value = self.form(x), self.text[id(u)]
            if node.op == "mul":
                return self.times(first, value)
            if node.op == "truediv" and u is node.args[1]:
                return self.times(first, _reciprocal(u, value))
            if node.op == "add" or (node.op == "sub" and u is node.args[1]):
                return self.plus(first, value if node.op == "add" else f"(-{value})")
            if node.op == "sub":
                return self.plus(self.times(first, "(-1.f)"), value)
        if node.op in _POWERS:
            call, factor, outer, offset = _POWERS[node.op]
            exponent = self.joined(self.times(self.form(node.args[0]), factor))
            return _Form(self.local(FLOAT, call.format(_bare(exponent))), outer, offset)
        return _Form(plain(node), "", "")

    def times(self, form: _Form, factor: str) -> _Form:
        """A form times a uniform value."""

        def product(x: str) -> str:
            return f"({x} * {factor})"

        offset = product(form.offset) if form.offset else ""
        if not form.inner:
            return _Form("", "", offset)
        return _Form(form.inner, product(form.factor) if form.factor else factor, offset)

    def plus(self, form: _Form, offset: str) -> _Form:
        """A form plus a uniform value."""
        return form._replace(offset=f"({form.offset} + {offset})" if form.offset else offset)

    def joined(self, form: _Form) -> str:
        """A form as one expression."""
        if not form.inner:
            return form.offset
        if form.offset:
            return f"fmaf({_bare(form.inner)}, {_bare(form.factor or '1.f')}, {_bare(form.offset)})"
        return f"({form.inner} * {form.factor})" if form.factor else form.inner


#: Functions of x by a power of two: call on x times a factor, then the result times a factor plus an offset.
_POWERS = {
    "tanh": ("rcp_exp2_plus_1({}, unit)", "(2.f * math::log2e)", "(-2.f)", "1.f"),
    "sigmoid": ("rcp_exp2_plus_1({}, unit)", "(-math::log2e)", "", ""),
    "exp": ("math::ptx_exp2({})", "math::log2e", "", ""),
}


def _bare(expression: str) -> str:
    """Without the parentheses around the whole."""
    if not (expression.startswith("(") and expression.endswith(")")):
        return expression
    depth = 0
    for i, c in enumerate(expression):
        depth += (c == "(") - (c == ")")
        if depth == 0 and i < len(expression) - 1:
            return expression
    return expression[1:-1]


def is_uniform(node: Node) -> bool:
    """Whether the value is the same in the whole launch: made of constants and scalars only."""
    pending, seen = [node], {id(node)}
    while pending:
        n = pending.pop()
        if n.op in ("index", "argument", "load"):
            return False
        pending += [a for a in n.args if id(a) not in seen]
        seen.update(map(id, n.args))
    return True


def _expression(node: Node, of: Callable[[Node], str]) -> str:
    op, args = node.op, node.args
    if op == "const":
        return literal(node.value, node.kind)
    if op == "index":
        return f"ctx.{node.value}"
    if op == "scalar":
        return f"params.user.{node.value}"
    if op == "sm_scale":
        return "params.sm_scale"
    if op == "argument":
        return str(node.value)
    if op == "load":
        return f"params.user.{node.value}({', '.join(map(of, args))})"
    if op == "cast":
        return f"{node.kind}({_bare(of(args[0]))})"
    if op == "neg":
        return f"(-{of(args[0])})"
    if op == "invert":
        return f"(!{of(args[0])})" if node.kind == BOOL else f"(~{of(args[0])})"
    if op == "where":
        return f"({of(args[0])} ? {of(args[1])} : {of(args[2])})"
    if op == "truediv" and is_uniform(args[1]) and not is_uniform(args[0]):
        return _times_reciprocal(args, of)
    if op in _INFIX:
        return f"({of(args[0])} {_INFIX[op]} {of(args[1])})"
    name = _CALLS.get(op) or _BY_KIND[op, node.kind]
    return f"{name}({', '.join(_bare(of(a)) for a in args)})"


def _times_reciprocal(args: tuple[Node, ...], of: Callable[[Node], str]) -> str:
    """Division by what is the same for every element: one reciprocal, then a product (2 ulp from the quotient)."""
    x, divisor = args
    return f"({of(x)} * {_reciprocal(divisor, of(divisor))})"


def _reciprocal(divisor: Node, text: str) -> str:
    """One over a uniform value whose text is given."""
    if divisor.op == "const":
        with np.errstate(all="ignore"):
            reciprocal = float(np.float32(1.0) / np.float32(divisor.value))
        if math.isfinite(reciprocal) and abs(reciprocal) >= 2.0**-126:
            return literal(reciprocal, FLOAT)
        return f"(1.f / {text})"
    if divisor.op == "scalar":
        return f"{text}{RECIPROCAL}"
    return f"ops::reciprocal({_bare(text)})"
