"""Plain Python functions traced once into an expression graph.

A function of an attention variant is called a single time with `Traced` values. Every operation on them adds a `Node`;
equal nodes are one object, so a common subexpression exists once. Types are float (float32), int (int32) and bool;
bool meets int as int, either meets float as float, and ``/`` gives a float. What has no meaning before the kernel runs
(``if``, ``and``, ``float()``, ``range``) raises `TracingError` with the file and line of the user's source.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from fi_cupy.errors import TracingError

FLOAT, INT, BOOL = "float", "int", "bool"
_RANK = {BOOL: 0, INT: 1, FLOAT: 2}

_PROMOTE = ("add", "sub", "mul", "floordiv", "mod", "minimum", "maximum")
_COMPARE = ("lt", "le", "gt", "ge", "eq", "ne")
_BITWISE = ("and", "or", "xor")
_SHIFT = ("lshift", "rshift")
#: Functions of one number whose result is a float, whatever the argument.
FLOAT_FUNCTIONS = (
    "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid", "sin", "cos", "tan", "arctan",
    "erf", "floor", "ceil", "trunc", "rint",
)  # fmt: skip

_SKIPPED = (os.path.dirname(os.path.abspath(__file__)) + os.sep, os.path.dirname(np.__file__) + os.sep)


class Node:
    """One value: an operation, its operands (nodes), a payload (constant or name) and its kind."""

    __slots__ = ("args", "kind", "op", "value")

    def __init__(self, op: str, args: tuple[Node, ...], value: Any, kind: str) -> None:
        self.op, self.args, self.value, self.kind = op, args, value, kind


class Graph:
    """The nodes of one function, each distinct expression once."""

    def __init__(self, label: str) -> None:
        self.label = label  # "variant name: score_fn", for messages
        self._nodes: dict[Any, Node] = {}

    def node(self, op: str, args: tuple[Node, ...], value: Any, kind: str) -> Node:
        """The node of this expression."""
        key = (op, tuple(map(id, args)), repr(value), kind)
        found = self._nodes.get(key)
        if found is None:
            found = self._nodes[key] = Node(op, args, value, kind)
        return found

    def constant(self, value: Any) -> Node:
        """A Python or NumPy number as a node."""
        if isinstance(value, (bool, np.bool_)):
            return self.node("const", (), bool(value), BOOL)
        if isinstance(value, (int, np.integer)):
            if not -(2**31) <= int(value) < 2**31:
                self.fail(f"the integer {value} does not fit 32 bits")
            return self.node("const", (), int(value), INT)
        if isinstance(value, (float, np.floating)):
            with np.errstate(over="ignore"):
                return self.node("const", (), float(np.float32(value)), FLOAT)
        if isinstance(value, TracedTensor):
            value._not_a_number()
        if isinstance(value, np.ndarray) and value.ndim == 0:
            return self.constant(value[()])
        if isinstance(value, np.ndarray) or hasattr(value, "__cuda_array_interface__"):
            self.fail("an array meets a traced value; declare it in tensors= and index it: ctx.name[...]")
        return self.fail(f"a traced value meets {type(value).__name__} {value!r}, expected a number")

    def convert(self, node: Node, kind: str) -> Node:
        """`node` as a value of `kind`."""
        if node.kind == kind:
            return node
        if node.op == "const":
            return self.constant({FLOAT: float, INT: int, BOOL: bool}[kind](node.value))
        return self.node("cast", (node,), kind, kind)

    def fail(self, text: str) -> NoReturn:
        """Raise `TracingError` for the user's current line."""
        raise TracingError(f"{self.label}: {user_line()}: {text}")


def user_line() -> str:
    """``file:line`` of the innermost frame that is neither ours nor NumPy's."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_SKIPPED):
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown line" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"


def apply(op: str, *args: Any) -> Traced:
    """The traced result of `op`; at least one of `args` is traced."""
    graph = next(a._graph for a in args if isinstance(a, Traced))
    nodes = []
    for a in args:
        if isinstance(a, Traced):
            if a._graph is not graph:
                graph.fail("a traced value of another function was kept; functions must not share values")
            nodes.append(a._node)
        else:
            nodes.append(graph.constant(a))
    return Traced(graph, _build(graph, op, nodes))


def _common(graph: Graph, nodes: Sequence[Node]) -> list[Node]:
    kind = max((n.kind for n in nodes), key=_RANK.__getitem__)
    return [graph.convert(n, kind) for n in nodes]


def _build(graph: Graph, op: str, nodes: list[Node]) -> Node:
    kinds = {n.kind for n in nodes}
    if op in FLOAT_FUNCTIONS:
        (x,) = nodes
        return graph.node(op, (graph.convert(x, FLOAT),), None, FLOAT)
    if op in _PROMOTE:
        if kinds == {BOOL}:
            graph.fail(f"{op} of two booleans; use & | ^ for logic, or ops.int32(x) to count")
        nodes = _common(graph, nodes)
        return graph.node(op, tuple(nodes), None, nodes[0].kind)
    if op == "truediv":
        return graph.node(op, tuple(graph.convert(n, FLOAT) for n in nodes), None, FLOAT)
    if op in _COMPARE:
        return graph.node(op, tuple(_common(graph, nodes)), None, BOOL)
    if op in _BITWISE or op in _SHIFT:
        if FLOAT in kinds:
            graph.fail(f"bitwise {op} of a float; compare first: (a < b) & (c < d)")
        nodes = _common(graph, nodes)
        if op in _SHIFT:
            nodes = [graph.convert(n, INT) for n in nodes]
        return graph.node(op, tuple(nodes), None, nodes[0].kind)
    if op == "where":
        test, *branches = nodes
        if test.kind != BOOL:
            graph.fail(f"the condition of where is {test.kind}, expected a comparison")
        branches = _common(graph, branches)
        return graph.node(op, (test, *branches), None, branches[0].kind)
    if op in ("neg", "abs"):
        (x,) = nodes
        if x.kind == BOOL:
            graph.fail(f"{op} of a boolean; use ~ for not")
        return graph.node(op, (x,), None, x.kind)
    if op == "invert":
        (x,) = nodes
        if x.kind == FLOAT:
            graph.fail("~ of a float; compare first")
        return graph.node(op, (x,), None, x.kind)
    if op == "pow":
        return _power(graph, *nodes)
    if op in (FLOAT, INT, BOOL):
        (x,) = nodes
        if op == BOOL and x.kind != BOOL:
            return graph.node("ne", (x, graph.convert(graph.constant(0), x.kind)), None, BOOL)
        return graph.convert(x, op)
    return graph.fail(f"{op} is not supported")


def _power(graph: Graph, base: Node, exponent: Node) -> Node:
    if base.kind == BOOL:
        base = graph.convert(base, INT)
    if exponent.op == "const" and float(exponent.value).is_integer() and abs(exponent.value) <= 8:
        n = int(exponent.value)
        if base.kind == INT and n < 0:
            graph.fail("an integer to a negative power; make it a float first: ops.float32(x)")
        if exponent.kind == FLOAT:
            base = graph.convert(base, FLOAT)
        result = graph.convert(graph.constant(1), base.kind)
        for bit in bin(abs(n))[2:]:  # square and multiply
            if result.op != "const":
                result = graph.node("mul", (result, result), None, base.kind)
            if bit == "1":
                result = base if result.op == "const" else graph.node("mul", (result, base), None, base.kind)
        if n < 0:
            result = graph.node("truediv", (graph.convert(graph.constant(1), FLOAT), result), None, FLOAT)
        return result
    if base.kind == INT and exponent.kind == INT:
        graph.fail("an integer to an unknown integer power; make the base a float: ops.float32(x)")
    base, exponent = graph.convert(base, FLOAT), graph.convert(exponent, FLOAT)
    if exponent.op == "const" and exponent.value in (0.5, -0.5):
        return graph.node("sqrt" if exponent.value > 0 else "rsqrt", (base,), None, FLOAT)
    return graph.node("pow", (base, exponent), None, FLOAT)


#: NumPy's ufuncs by the name of our operation.
_UFUNCS: dict[Any, str] = {
    np.add: "add", np.subtract: "sub", np.multiply: "mul", np.true_divide: "truediv", np.floor_divide: "floordiv",
    np.remainder: "mod", np.power: "pow", np.float_power: "pow", np.negative: "neg", np.absolute: "abs",
    np.fabs: "abs", np.minimum: "minimum", np.maximum: "maximum", np.fmin: "minimum", np.fmax: "maximum",
    np.less: "lt", np.less_equal: "le", np.greater: "gt", np.greater_equal: "ge", np.equal: "eq", np.not_equal: "ne",
    np.bitwise_and: "and", np.bitwise_or: "or", np.bitwise_xor: "xor", np.invert: "invert", np.left_shift: "lshift",
    np.right_shift: "rshift", np.exp: "exp", np.exp2: "exp2", np.expm1: "expm1", np.log: "log", np.log2: "log2",
    np.log1p: "log1p", np.sqrt: "sqrt", np.tanh: "tanh", np.sin: "sin", np.cos: "cos", np.tan: "tan",
    np.arctan: "arctan", np.floor: "floor", np.ceil: "ceil", np.trunc: "trunc", np.rint: "rint",
}  # fmt: skip
_LOGICAL = {np.logical_and: "and", np.logical_or: "or", np.logical_xor: "xor", np.logical_not: "invert"}

_NO_BRANCH = (
    "the truth of a traced value is not known before the kernel runs (if, while, and, or, not, min, max, a < b < c); "
    "use ops.where(condition, a, b), & | ~ on conditions, ops.minimum and ops.maximum"
)
_NO_NUMBER = (
    "a traced value is not a number yet; use fi_cupy.jit.ops (exp, tanh, floor, int32, ...) instead of math, float() "
    "and int()"
)
_NO_INDEX = (
    "a traced value cannot be a Python index or a range; declare arrays in tensors= and index them with ctx.name[...], "
    "and write loops over known numbers"
)

_NO_ARRAY = (
    "a traced value cannot become an array, or index one that is not declared; declare arrays in tensors= and index "
    "them with ctx.name[...]"
)


class Traced:
    """A number that a kernel will compute. Arithmetic, comparisons and NumPy's element-wise functions work on it."""

    __slots__ = ("_graph", "_node")
    __array_priority__ = 1000.0
    __hash__ = object.__hash__

    def __init__(self, graph: Graph, node: Node) -> None:
        self._graph, self._node = graph, node

    def __repr__(self) -> str:
        return f"<traced {self._node.kind} {self._node.op}>"

    def astype(self, dtype: Any, **_: Any) -> Traced:
        """Convert to float32, int32 or bool, as ``ndarray.astype``."""
        kind = {"f": FLOAT, "i": INT, "u": INT, "b": BOOL}.get(np.dtype(dtype).kind)
        return self._graph.fail(f"astype({dtype!r}) is not supported") if kind is None else apply(kind, self)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        graph = self._graph
        op = _UFUNCS.get(ufunc)
        if method == "__call__" and not kwargs:
            if ufunc is np.square:
                return apply("mul", inputs[0], inputs[0])
            if ufunc is np.reciprocal:
                return apply("truediv", 1.0, inputs[0])
            if ufunc in _LOGICAL:
                return apply(_LOGICAL[ufunc], *(apply(BOOL, x) if isinstance(x, Traced) else bool(x) for x in inputs))
            if op is not None:
                return apply(op, *inputs)
        return graph.fail(f"numpy.{ufunc.__name__} is not supported on a traced value; see fi_cupy.jit.ops")

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.where and len(args) == 3 and not kwargs:
            return apply("where", *args)
        if function is np.clip and len(args) == 3 and not kwargs:
            return apply("minimum", apply("maximum", args[0], args[1]), args[2])
        return self._graph.fail(f"numpy.{function.__name__} is not supported on a traced value; see fi_cupy.jit.ops")

    def __bool__(self) -> bool:
        return self._graph.fail(_NO_BRANCH)

    def __float__(self) -> float:
        return self._graph.fail(_NO_NUMBER)

    def __int__(self) -> int:
        return self._graph.fail(_NO_NUMBER)

    def __complex__(self) -> complex:
        return self._graph.fail(_NO_NUMBER)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._graph.fail(_NO_ARRAY)

    def __index__(self) -> int:
        return self._graph.fail(_NO_INDEX)

    def __iter__(self) -> Any:
        return self._graph.fail(_NO_INDEX)

    def __len__(self) -> int:
        return self._graph.fail("a traced value is one number and has no length")

    def __getitem__(self, index: Any) -> Any:
        return self._graph.fail("a traced value is one number and cannot be indexed")

    def __setitem__(self, index: Any, value: Any) -> None:
        self._graph.fail("a traced value cannot be assigned to; return a new one, with ops.where where it must differ")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._graph.fail(f"a traced value is one number and has no attribute {name!r}; see fi_cupy.jit.ops")

    def __round__(self, digits: int | None = None) -> Any:
        return self._graph.fail(_NO_NUMBER) if digits is not None else apply("rint", self)

    def __floor__(self) -> Any:
        return apply("floor", self)

    def __ceil__(self) -> Any:
        return apply("ceil", self)

    def __trunc__(self) -> Any:
        return apply("trunc", self)

    def __pos__(self) -> Traced:
        return self


def _install_operators() -> None:
    def binary(op: str) -> Callable[[Any, Any], Any]:
        return lambda self, other: apply(op, self, other)

    def reflected(op: str) -> Callable[[Any, Any], Any]:
        return lambda self, other: apply(op, other, self)

    def unary(op: str) -> Callable[[Any], Any]:
        return lambda self: apply(op, self)

    for op in (*_PROMOTE[:5], "truediv", "pow", *_BITWISE, *_SHIFT):
        setattr(Traced, f"__{op}__", binary(op))
        setattr(Traced, f"__r{op}__", reflected(op))
    for op in _COMPARE:
        setattr(Traced, f"__{op}__", binary(op))
    for op in ("neg", "abs", "invert"):
        setattr(Traced, f"__{op}__", unary(op))


_install_operators()


class TracedTensor:
    """A user's array while tracing: indexing gives one element, and the number of indices is its rank."""

    __slots__ = ("_graph", "_kind", "_name", "_ranks")

    def __init__(self, graph: Graph, name: str, kind: str, ranks: dict[str, int]) -> None:
        self._graph, self._name, self._kind, self._ranks = graph, name, kind, ranks

    def __getitem__(self, index: Any) -> Traced:
        graph, indices = self._graph, index if isinstance(index, tuple) else (index,)
        if not indices or len(indices) > 4:
            graph.fail(f"{self._name} is indexed with {len(indices)} indices, expected 1 to 4")
        if self._ranks.setdefault(self._name, len(indices)) != len(indices):
            graph.fail(f"{self._name} is indexed with {len(indices)} indices, elsewhere with {self._ranks[self._name]}")
        nodes = []
        for i in indices:
            if isinstance(i, (slice, type(None), type(Ellipsis))):
                graph.fail(f"{self._name}[...] takes one integer a dimension, got {i!r}")
            node = i._node if isinstance(i, Traced) else graph.constant(i)
            if node.kind == FLOAT:
                graph.fail(f"an index of {self._name} is a float; convert it: ops.int32(ops.floor(x))")
            nodes.append(graph.convert(node, INT))
        return Traced(graph, graph.node("load", tuple(nodes), self._name, self._kind))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._graph.fail(f"tensor {self._name} has no {name!r} here; index it: ctx.{self._name}[...]")

    def __iter__(self) -> Any:
        return self._graph.fail(f"tensor {self._name} cannot be iterated; index it: ctx.{self._name}[...]")

    def _not_a_number(self, *args: Any, **kwargs: Any) -> Any:
        return self._graph.fail(f"tensor {self._name} is not a number; index it: ctx.{self._name}[...]")

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _not_a_number
    __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = __len__ = __array_ufunc__ = _not_a_number


class TraceContext:
    """``ctx`` while tracing: the indices that exist in this function, the user's tensors and scalars."""

    def __init__(self, graph: Graph, members: Mapping[str, Any], absent: Sequence[str]) -> None:
        self.__dict__["_state"] = (graph, members, absent)

    def __getattr__(self, name: str) -> Any:
        graph, members, absent = self.__dict__["_state"]
        if name in members:
            return members[name]
        if name.startswith("__"):
            raise AttributeError(name)
        if name in absent:
            graph.fail(f"ctx.{name} has no meaning in this function; it has {', '.join(members)}")
        return graph.fail(f"ctx.{name} is unknown; ctx has {', '.join(members)} (tensors= and scalars= add names)")

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__["_state"][0].fail(f"ctx.{name} cannot be assigned; use a local variable")


def trace(
    function: Callable[..., Any],
    label: str,
    *,
    argument: str | None,
    indices: Sequence[str],
    absent: Sequence[str] = (),
    tensors: Mapping[str, str] | None = None,
    scalars: Mapping[str, str] | None = None,
    ranks: dict[str, int] | None = None,
    result: str = FLOAT,
) -> Node:
    """Call `function` once with traced arguments and return the node of its result.

    Parameters
    ----------
    function : callable
        ``function(argument, ctx)``, or ``function(ctx)`` without `argument`.
    label : str
        Starts every message.
    argument : str or None
        Name of the first, float argument ("score").
    indices, absent : names
        Integers that ctx has, and those it has in other functions only.
    tensors, scalars : name -> kind
        The user's arrays and numbers.
    ranks : dict
        Filled with the number of indices that each tensor is used with.
    result : str
        Kind of the result: a bool result must be one, a float result may be any number.

    Raises
    ------
    TracingError
    """
    graph = Graph(label)
    ranks = {} if ranks is None else ranks
    members: dict[str, Any] = {name: Traced(graph, graph.node("index", (), name, INT)) for name in indices}
    members["sm_scale"] = Traced(graph, graph.node("sm_scale", (), None, FLOAT))
    for name, kind in (tensors or {}).items():
        members[name] = TracedTensor(graph, name, kind, ranks)
    for name, kind in (scalars or {}).items():
        members[name] = Traced(graph, graph.node("scalar", (), name, kind))
    context = TraceContext(graph, members, absent)
    args = (context,) if argument is None else (Traced(graph, graph.node("argument", (), argument, FLOAT)), context)
    try:
        value = function(*args)
    except TracingError:
        raise
    except Exception as error:
        where = _failed_line(error, function)
        raise TracingError(f"{label}: {where}: {type(error).__name__} while it was traced: {error}") from error
    return _result(graph, function, value, result)


def _result(graph: Graph, function: Callable[..., Any], value: Any, result: str) -> Node:
    where = _definition(function)
    if isinstance(value, Traced):
        if value._graph is not graph:
            raise TracingError(f"{graph.label}: {where}: it returns a traced value of another function")
        node = value._node
    elif value is None:
        raise TracingError(f"{graph.label}: {where}: it returns None, expected a value")
    elif isinstance(value, (bool, int, float, np.generic)) or (isinstance(value, np.ndarray) and value.ndim == 0):
        node = graph.constant(value)
    else:
        raise TracingError(f"{graph.label}: {where}: it returns {type(value).__name__}, expected one number")
    if result == BOOL:
        if node.kind != BOOL:
            raise TracingError(
                f"{graph.label}: {where}: it returns {node.kind}, expected a condition (a comparison, or ops.bool_(x))"
            )
        return node
    return graph.convert(node, result)


def _definition(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    return "unknown line" if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _failed_line(error: BaseException, function: Callable[..., Any]) -> str:
    traceback, where = error.__traceback__, _definition(function)
    while traceback is not None:
        filename = traceback.tb_frame.f_code.co_filename
        if not filename.startswith(_SKIPPED):
            where = f"{filename}:{traceback.tb_lineno}"
        traceback = traceback.tb_next
    return where
