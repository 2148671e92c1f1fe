"""From an attention variant to CUDA: ``struct Variant``, the parameters it adds to a kernel's, and its spec."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, NoReturn

from fi_cupy.dtypes import DType, bfloat16, bool_, float16, float32, int32, uint8
from fi_cupy.errors import CompileError
from fi_cupy.jit.emit import RECIPROCAL, scaled_statements, statements
from fi_cupy.jit.intervals import trim
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.score_shape import score_shape
from fi_cupy.jit.spec import CppType, KernelSpec, UserSource
from fi_cupy.jit.trace import BOOL, FLOAT, INT, Node, trace

_ON_SCORES = ("batch", "qo_idx", "kv_idx", "qo_head", "kv_head", "qo_len", "kv_len")
_ON_ROWS = ("batch", "qo_idx", "qo_head", "kv_head", "qo_len", "kv_len", "dim_idx")
_ON_KEYS = ("batch", "kv_idx", "kv_head", "qo_len", "kv_len", "dim_idx")
_EVERY_INDEX = (*_ON_SCORES, "dim_idx")


class Stage(NamedTuple):
    """One kind of function: its argument, result, the indices it has, and its names in the variant struct."""

    argument: str | None
    result: str
    indices: tuple[str, ...]
    method: str
    flag: str


STAGES: dict[str, Stage] = {
    "score_fn": Stage("score", FLOAT, _ON_SCORES, "score", "kHasScore"),
    "mask_fn": Stage(None, BOOL, _ON_SCORES, "mask", "kHasMask"),
    "query_fn": Stage("q", FLOAT, _ON_ROWS, "query", "kHasQuery"),
    "key_fn": Stage("k", FLOAT, _ON_KEYS, "key", "kHasKey"),
    "post_process_fn": Stage("out", FLOAT, _ON_ROWS, "output", "kHasOutput"),
}

#: Element types of a user's array, and what an element is in an expression.
TENSOR_KINDS: dict[DType, str] = {
    float32: FLOAT, float16: FLOAT, bfloat16: FLOAT, int32: INT, uint8: INT, bool_: BOOL,
}  # fmt: skip
SCALAR_KINDS: dict[DType, str] = {float32: FLOAT, int32: INT}
#: Names that a user's array or scalar cannot have: they mean something in a function's text.
RESERVED = frozenset(
    (*_EVERY_INDEX, "score", "q", "k", "v", "out", "params", "ctx", "sm_scale", "ops", "math", "fi", "user")
)
_CPP_WORDS = frozenset(
    "alignas alignof and asm auto bool break case catch char class const constexpr continue default delete do double "
    "else enum explicit extern false float for friend goto if inline int long namespace new not operator or private "
    "protected public register return short signed sizeof static struct switch template this throw true try typedef "
    "typename union unsigned using virtual void volatile while xor half".split()
)
#: Dimensions of an array that only CUDA text uses.
TEXT_RANK = 4


def is_name(name: object) -> bool:
    """Whether `name` is an identifier of Python's and C++'s alphabet."""
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII) is not None


def is_variable(name: object) -> bool:
    """Whether a user's array or number can be called `name`."""
    return is_name(name) and name not in _CPP_WORDS


@dataclass(frozen=True)
class Lowered:
    """A variant ready for a kernel.

    Attributes
    ----------
    name : str
    tensors : tuple of (name, dtype, rank, exact)
        Rank in the kernel; `exact` is False where CUDA text indexes it and any rank up to that will do.
    scalars : tuple of (name, dtype)
    reciprocals : frozenset of str
        Scalars that something is divided by: the kernel gets 1 / x beside x.
    text : str
        ``struct VariantUser`` and ``struct Variant``.
    stages : frozenset of str
        The functions it has.
    use_softmax : bool
    mask : Node or None
        The expression of a traced `mask_fn` (equal texts have equal expressions).
    indices : frozenset of str
        The indices that some function looks at ("kv_idx", "qo_head" ...).
    shape : str
        What is known about its scores, see `score_shape`.
    """

    name: str
    tensors: tuple[tuple[str, DType, int, bool], ...]
    scalars: tuple[tuple[str, DType], ...]
    reciprocals: frozenset[str]
    text: str
    stages: frozenset[str]
    use_softmax: bool
    mask: Node | None = field(default=None, compare=False)  # a traced mask_fn; `text` says the same
    indices: frozenset[str] = field(default=frozenset(), compare=False, kw_only=True)
    shape: str = field(default="any", compare=False, kw_only=True)  # of its scores, see `score_shape`

    @property
    def splittable(self) -> bool:
        """Whether partial results over ranges of keys can be merged by their lse afterwards."""
        return self.use_softmax and "post_process_fn" not in self.stages

    @property
    def portable_only(self) -> str:
        """Why the Hopper kernel cannot run it; empty if it can."""
        stages = sorted(self.stages & {"query_fn", "key_fn"})
        return f"{stages[0]} changes what the copy engine brings" if stages else ""

    @property
    def regular(self) -> bool:
        """Whether the Hopper kernel computes its scores as it does built-in ones, without a call an element."""
        return self.shape != "any" and self.use_softmax and "mask_fn" not in self.stages

    def narrow(self, scalars: Mapping[str, float]) -> Callable[..., Any] | None:
        """For ``plan_prefill(narrow=)``: drops keys that the mask can never show, given what numbers are known."""
        return None if self.mask is None else partial(trim, self.mask, scalars)

    def fields(self) -> list[tuple[str, str]]:
        """Fields of ``struct VariantUser``, as `ParamsStruct` lists them."""
        fields: list[tuple[str, str]] = []
        for name, _, rank, _ in self.tensors:
            fields.append((f"user.{name}.data", "ptr"))
            fields += [(f"user.{name}.{part}[{d}]", "i64") for part in ("stride", "extent") for d in range(rank)]
        for name, dtype in self.scalars:
            fields.append((f"user.{name}", "f32" if dtype is float32 else "i32"))
            if name in self.reciprocals:
                fields.append((f"user.{name}{RECIPROCAL}", "f32"))
        return fields

    def specialise(
        self, spec: KernelSpec, alibi: bool, soft_cap: bool, head_scales: bool = False, positive_scale: bool = False
    ) -> KernelSpec:
        """`spec` (of the prefill kernel) with this variant between the product and the softmax.

        Parameters
        ----------
        spec : KernelSpec
            The plain instance: its config member ``Logits`` is replaced, the variant's fields follow its parameters.
        alibi, soft_cap : bool
            The built-in bias comes before, the cap after the variant's score function.
        head_scales : bool
            Factors of q or k a head join sm_scale.
        positive_scale : bool
            For sm_scale > 0 only.
        """
        flags = ", ".join("true" if on else "false" for on in (alibi, soft_cap, head_scales, positive_scale))
        logits = CppType(f"fi::VariantLogits<fi::Variant, {flags}>")
        user = "  VariantUser user;\n" if self.tensors or self.scalars else ""
        params = f"{spec.params.name.removesuffix('Params')}VariantParams"
        text = f"{self.text}\nstruct {params} : {spec.params.name} {{\n{user}}};"
        return replace(
            spec,
            header=f"{spec.header.removesuffix('.cuh')}_variant.cuh",
            symbol=f"{spec.symbol}_v_{self.name}",
            params=ParamsStruct(params, [*spec.params.fields, *self.fields()]),
            config=tuple((n, logits if n == "Logits" else value) for n, value in spec.config),
            user=UserSource("variant", self.name, text),
            spills="a variant's values come on top of a full register file",
        )


def lower(
    name: str,
    functions: Mapping[str, str | Callable[..., object]],
    use_softmax: bool,
    tensors: tuple[tuple[str, DType], ...],
    scalars: tuple[tuple[str, DType], ...],
) -> Lowered:
    """Trace what is Python, wrap what is CUDA text, and make the variant struct.

    Raises
    ------
    TracingError, CompileError
    """
    ranks: dict[str, int] = {}
    bodies: dict[str, str] = {}
    roots: dict[str, Node] = {}
    texts = [stage for stage, f in functions.items() if isinstance(f, str)]
    for stage, function in functions.items():
        if not isinstance(function, str):
            roots[stage] = _traced(name, stage, function, tensors, scalars, ranks)
            write = scaled_statements if stage == "score_fn" else statements
            bodies[stage] = "\n".join("    " + line for line in write(roots[stage]))
    exact = {t: t in ranks for t, _ in tensors}
    for stage in texts:
        file = f"variant:{name}" if len(texts) == 1 else f"variant:{name}.{stage}"
        bodies[stage] = _text_body(file, STAGES[stage], str(functions[stage]), tensors, scalars)
    full = tuple((t, dtype, ranks.get(t, TEXT_RANK), exact[t] and not texts) for t, dtype in tensors)
    members = [f"  TensorRef<{dtype.cpp}, {rank}> {t};" for t, dtype, rank, _ in full]
    code = "\n".join(bodies.values())
    reciprocals = frozenset(s for s, _ in scalars if f"params.user.{s}{RECIPROCAL}" in code)
    for s, dtype in scalars:
        members.append(f"  {'float' if dtype is float32 else 'int'} {s};")
        if s in reciprocals:
            members.append(f"  float {s}{RECIPROCAL};")
    lines = [f'#line 1 "fi_cupy, for variant {name}"']
    if members:
        lines += ["struct VariantUser {", *members, "};"]
    lines += ["struct Variant {"]
    lines += [
        f"  static constexpr bool {stage.flag} = {'true' if key in functions else 'false'};"
        for key, stage in STAGES.items()
    ]
    lines += [f"  static constexpr bool kUseSoftmax = {'true' if use_softmax else 'false'};"]
    shape, shape_lines = score_shape("score_fn" in functions, roots.get("score_fn"))
    lines += shape_lines
    for key, body in bodies.items():
        info = STAGES[key]
        common = "const Params& params, const VariantContext& ctx"
        arguments = f"{common}, float {info.argument}" if info.argument else common
        method = info.method
        if key == "score_fn":
            scaled = f"{common}, float qk, float scale, float base, bool unit"
            if key in roots:
                method, arguments = "logit", scaled
            else:
                call = f"    return base * {method}(params, ctx, scale * qk);"
                lines += ["  template <class Params>", f"  FI_DEVICE static float logit({scaled}) {{", call, "  }"]
        lines += [
            "  template <class Params>",
            f"  FI_DEVICE static {info.result} {method}({arguments}) {{",
            body,
            "  }",
        ]
    lines += ["};"]
    indices: set[str] = set()
    for root in roots.values():
        _collect_indices(root, indices, set())
    for stage in texts:
        code = _NOT_CODE.sub(" ", str(functions[stage]))
        indices.update(i for i in STAGES[stage].indices if re.search(rf"\b{i}\b", code))
    return Lowered(
        name, full, scalars, reciprocals, "\n".join(lines), frozenset(functions), use_softmax, roots.get("mask_fn"),
        indices=frozenset(indices), shape=shape,
    )  # fmt: skip


def _collect_indices(node: Node, found: set[str], seen: set[int]) -> None:
    if id(node) in seen:
        return
    seen.add(id(node))
    if node.op == "index":
        found.add(node.value)
    for operand in node.args:
        _collect_indices(operand, found, seen)


def _traced(
    name: str,
    stage: str,
    function: Callable[..., object],
    tensors: tuple[tuple[str, DType], ...],
    scalars: tuple[tuple[str, DType], ...],
    ranks: dict[str, int],
) -> Node:
    info = STAGES[stage]
    return trace(
        function,
        f"variant {name}: {stage}",
        argument=info.argument,
        indices=info.indices,
        absent=[i for i in _EVERY_INDEX if i not in info.indices],
        tensors={t: TENSOR_KINDS[dtype] for t, dtype in tensors},
        scalars={s: SCALAR_KINDS[dtype] for s, dtype in scalars},
        ranks=ranks,
        result=info.result,
    )


_NOT_CODE = re.compile(r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.DOTALL)
_CLOSES = {")": "(", "]": "[", "}": "{"}


def _check_text(file: str, text: str) -> bool:
    """Whether `text` is statements, not an expression. What would break out of its function is an error here.

    The compiler would report an open bracket behind the text, somewhere in code that the user has not written.
    """

    def fail(line: int, what: str) -> NoReturn:
        raise CompileError(f"{file}:{line}: error: {what}", source=text)

    code = _NOT_CODE.sub(lambda m: " " + "\n" * m[0].count("\n"), text)
    open_at: list[tuple[str, int]] = []
    for line, content in enumerate(code.split("\n"), 1):
        for c in content:
            if c in "([{":
                open_at.append((c, line))
            elif c in _CLOSES:
                if not open_at or open_at[-1][0] != _CLOSES[c]:
                    fail(line, f"'{c}' closes nothing")
                open_at.pop()
    if open_at:
        fail(open_at[-1][1], f"'{open_at[-1][0]}' is not closed")
    statement = ";" in code or re.search(r"\breturn\b", code) is not None
    if statement and re.search(r"\breturn\b", code) is None:
        fail(code.count("\n") + 1, "statements must return a value; write an expression, or return")
    return statement


def _text_body(
    file: str, stage: Stage, text: str, tensors: tuple[tuple[str, DType], ...], scalars: tuple[tuple[str, DType], ...]
) -> str:
    """The user's CUDA text with its names in scope: an expression, or statements that return.

    No line marker follows the text before its function is closed: an error that the compiler meets only behind the
    text (a parenthesis left open) still points into it.
    """
    lines = [f"    const int {i} = ctx.{i};" for i in stage.indices]
    lines += [f"    const auto& {t} = params.user.{t};" for t, _ in tensors]
    lines += [f"    const {'float' if dtype is float32 else 'int'} {s} = params.user.{s};" for s, dtype in scalars]
    statement = _check_text(file, text)
    lines.append("    {" if statement else f"    return {stage.result}(")
    lines += [f'#line 1 "{file}"', text, "    }" if statement else "    );"]
    return "\n".join(lines)
