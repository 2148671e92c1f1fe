"""Imports go down only: base ← plan, reference ← specification ← execution ← arrays ← operators ← front ends."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_jobs import ROOT, run_python

PACKAGE = ROOT / "fi_cupy"
BASE, NUMPY_ONLY, SPECIFICATION, EXECUTION, ARRAYS, OPERATORS, FRONT = range(7)

#: The layer of each module that is no operator; a package stands for its modules. Everything unnamed is an operator.
LAYERS = {
    "errors": BASE, "dtypes": BASE,
    "plan": NUMPY_ONLY, "reference": NUMPY_ONLY,
    "jit.env": SPECIFICATION, "jit.params": SPECIFICATION, "jit.spec": SPECIFICATION, "jit.sources": SPECIFICATION,
    "jit.render": SPECIFICATION, "jit.trace": SPECIFICATION, "jit.ops": SPECIFICATION, "jit.emit": SPECIFICATION,
    "jit.lower": SPECIFICATION, "jit.intervals": SPECIFICATION, "jit.attention": SPECIFICATION,
    "jit.score_shape": SPECIFICATION, "jit.core": FRONT, "jit.modules": FRONT, "jit.uris": FRONT,
    "jit": EXECUTION, "device": EXECUTION,
    "arrays": ARRAYS, "imported": ARRAYS, "checks": ARRAYS, "workspace": ARRAYS, "kv_cache": ARRAYS,
    "random_state": ARRAYS,
    "interop": FRONT, "models": FRONT, "testing": FRONT, "cli": FRONT, "cli_tune": FRONT, "tune": FRONT,
    "cli_flashinfer": FRONT, "artifacts": FRONT, "aot": FRONT, "compilation_context": FRONT,
    "info": FRONT, "profiles": FRONT, "api_logging": FRONT, "api_dump": FRONT,
    "__main__": FRONT, "": FRONT,
}  # fmt: skip

#: Packages of others that a layer may import at module level; lazily (in a function) the operators may import more.
ALLOWED = {
    BASE: {"numpy", "ml_dtypes"},
    NUMPY_ONLY: {"numpy", "ml_dtypes"},
    SPECIFICATION: {"numpy"},
    EXECUTION: set(),
    ARRAYS: {"numpy", "ml_dtypes"},
    OPERATORS: {"numpy", "ml_dtypes"},
}
#: Never below the execution layer, not even in a function.
DEVICE_PACKAGES = {"cupy", "cupy_backends", "cuda", "torch", "jax"}


def _name(path: Path) -> str:
    """ "jit.cache" for fi_cupy/jit/cache.py, "jit" for the package, "" for fi_cupy itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def _layer(name: str) -> int:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        found = LAYERS.get(".".join(parts[:end]))
        if found is not None:
            return found
    return OPERATORS


def _imports(name: str) -> Iterator[tuple[str, bool]]:
    """(imported module, whether at module level) for each import of a module.

    Left out: typing-only imports, and those in a package's own ``__getattr__``, which hands on names from above.
    """

    def walk(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.FunctionDef) and child.name == "__getattr__" and isinstance(node, ast.Module):
                continue
            if isinstance(child, ast.Import):
                yield from ((alias.name, top) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    package = ["fi_cupy", *name.split(".")] if name else ["fi_cupy"]
                    if FILES[name].name != "__init__.py":
                        package.pop()
                    base = ".".join([*package[: len(package) - child.level + 1], *([base] if base else [])])
                for alias in child.names:
                    inner = f"{base}.{alias.name}".removeprefix("fi_cupy.")
                    is_module = base.split(".")[0] == "fi_cupy" and inner in FILES
                    yield f"fi_cupy.{inner}" if is_module else base, top
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, top and not function)

    yield from walk(ast.parse(FILES[name].read_text()), True)


def _own(module: str) -> str | None:
    """The name inside fi_cupy of an imported module, or None for somebody else's."""
    if module == "fi_cupy":
        return ""
    return module.removeprefix("fi_cupy.") if module.startswith("fi_cupy.") else None


@pytest.mark.parametrize("name", [n for n in FILES if n], ids=str)
def test_imports_go_down(name):
    layer = _layer(name)
    for module, top in _imports(name):
        own = _own(module)
        if own is not None:
            assert own in FILES, f"{name} imports {module}, which is no module"
            assert _layer(own) <= layer, f"{name} (layer {layer}) imports {module} (layer {_layer(own)})"
            continue
        package = module.split(".")[0]
        if package in sys.stdlib_module_names or layer == FRONT:
            continue
        if layer < EXECUTION:
            assert package not in DEVICE_PACKAGES, f"{name} imports {package}, and is below the execution layer"
        if top:
            assert package in ALLOWED[layer], f"{name} imports {package} at module level"


def test_reference_and_plan_know_nothing_else():
    for name in FILES:
        if _layer(name) == NUMPY_ONLY:
            for module, _ in _imports(name):
                own = _own(module)
                allowed = own is None or _layer(own) <= NUMPY_ONLY
                assert allowed, f"{name} imports {module}"
                package = module.split(".")[0]
                assert own is not None or package in ALLOWED[NUMPY_ONLY] | sys.stdlib_module_names


def test_the_compiler_child_imports_nothing_of_ours():
    assert [m for m, _ in _imports("jit.worker") if _own(m) is not None] == []


def test_no_cycles_at_module_level():
    graph = {n: {o for m, top in _imports(n) if top and (o := _own(m)) is not None} - {""} for n in FILES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join([*path[path.index(name) :], name])
        if name not in done:
            for below in graph[name]:
                visit(below, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


_HEAVY = ("cupy", "torch", "jax", "jinja2", "click", "rich", "platformdirs", "filelock", "gguf", "tokenizers")
_MODULES = f"""
import json, sys
print(json.dumps([m for m in {_HEAVY!r} if m in sys.modules]))
"""


def test_import_loads_no_framework():
    assert json.loads(run_python("import fi_cupy" + _MODULES)) == []


def test_numpy_arrays_load_no_framework():
    code = "import numpy as np, fi_cupy; x = np.ones((2, 8), np.float32); fi_cupy.rmsnorm(x, x[0])" + _MODULES
    assert json.loads(run_python(code)) == []


def test_every_public_name_is_there():
    code = """
import fi_cupy
names = [n for n in fi_cupy.__all__]
assert names and sorted(names) == sorted(set(names))
for name in names:
    getattr(fi_cupy, name)
assert set(names) <= set(dir(fi_cupy))
"""
    run_python(code)


def test_reference_works_with_every_cuda_package_missing():
    code = """
import sys
for name in ("cupy", "cupy_backends", "cuda", "torch", "jax"):
    sys.modules[name] = None
import numpy as np, fi_cupy
x = np.full((2, 8), 3.0, np.float32)
print(float(fi_cupy.rmsnorm(x, np.ones(8, np.float32)).max()))
"""
    assert abs(float(run_python(code)) - 1.0) < 1e-5


@pytest.mark.parametrize("use", ["pass", "fi_cupy.rmsnorm"])
def test_import_is_fast(use):
    # CPU time, best of five: what else the machine does must not count. NumPy's own import is not ours.
    code = f"""
import numpy, time
begin = time.process_time()
import fi_cupy
{use}
print(time.process_time() - begin)
"""
    seconds = min(float(run_python(code)) for _ in range(5))
    assert seconds < 0.1
