"""From an expression graph (`trace`) to CUDA statements: a value used twice becomes a local."""

from __future__ import annotations

import math
from collections.abc import Callable

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
    uses: dict[int, int] = {}
    order: list[Node] = []

    def visit(node: Node) -> None:
        uses[id(node)] = uses.get(id(node), 0) + 1
        if uses[id(node)] == 1:
            for operand in node.args:
                visit(operand)
            order.append(node)

    visit(root)
    text: dict[int, str] = {}
    lines: list[str] = []
    for node in order:
        expression = _expression(node, lambda n: text[id(n)])
        leaf = not node.args
        if node is not root and not leaf and (uses[id(node)] > 1 or len(expression) > _LINE):
            name = f"t{len(lines)}"
            lines.append(f"const {node.kind} {name} = {_bare(expression)};")
            expression = name
        text[id(node)] = expression
    lines.append(f"return {_bare(text[id(root)])};")
    return lines


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
    if divisor.op == "const":
        with np.errstate(all="ignore"):
            reciprocal = float(np.float32(1.0) / np.float32(divisor.value))
        if math.isfinite(reciprocal) and abs(reciprocal) >= 2.0**-126:
            return f"({of(x)} * {literal(reciprocal, FLOAT)})"
        return f"({of(x)} / {of(divisor)})"
    if divisor.op == "scalar":
        return f"({of(x)} * {of(divisor)}{RECIPROCAL})"
    return f"({of(x)} * ops::reciprocal({_bare(of(divisor))}))"
