"""What mkdocs makes beside the written pages: the API reference from `fi_cupy/__init__.pyi`, the page of bench results
with its charts, and the notebooks as they were kept.

A public name without a docstring ends the build.
"""

from __future__ import annotations

import ast
import base64
import importlib
import inspect
import json
import re
import sys
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "data" / "results_h100.json"
#: Public modules whose names are for kernel writers, not for callers; they are described in the README.
_INTERNAL_NAMES = {"kernel_specs"}

sys.path.insert(0, str(ROOT))


def public_modules() -> list[str]:
    """The modules that `fi_cupy/__init__.pyi` exports, in its order."""
    tree = ast.parse((ROOT / "fi_cupy" / "__init__.pyi").read_text())
    return [
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.module is None
        for alias in node.names
    ]


def _re_exported(module: ModuleType) -> list[str]:
    """Names that a module imports as themselves (``from x import f as f``): the convention for exports."""
    assert module.__file__ is not None
    tree = ast.parse(Path(module.__file__).read_text())
    return [
        alias.name
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    ]


def public_names(module: ModuleType) -> list[str]:
    """Functions and classes of a public module: `__all__`, or what it defines and what it exports."""
    names = list(getattr(module, "__all__", ()))
    if not names:
        own = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]
        names = own + _re_exported(module)
    found = []
    for name in dict.fromkeys(names):
        value = getattr(module, name, None)
        callable_ = inspect.isfunction(value) or inspect.isclass(value)
        if callable_ and not name.startswith("_") and name not in _INTERNAL_NAMES and not _is_params(value):
            found.append(name)
    return found


def _is_params(value: Any) -> bool:
    """Mirrors of kernels' parameter structs are not for callers."""
    from fi_cupy.jit.params import ParamsStruct

    return inspect.isclass(value) and issubclass(value, ParamsStruct)


def _identifier(module: ModuleType, name: str) -> str:
    """Where a name is defined: what mkdocstrings reads."""
    value = getattr(module, name)
    return f"{value.__module__}.{value.__qualname__}"


def undocumented(modules: list[str]) -> list[str]:
    """Public names without a docstring."""
    missing = []
    for module_name in modules:
        module = importlib.import_module(f"fi_cupy.{module_name}")
        if not module.__doc__:
            missing.append(f"fi_cupy.{module_name}")
        for name in public_names(module):
            if not inspect.getdoc(getattr(module, name)):
                missing.append(f"fi_cupy.{module_name}.{name}")
    return missing


def _api_page(module_name: str, seen: set[str]) -> str:
    module = importlib.import_module(f"fi_cupy.{module_name}")
    lines = [f"# fi_cupy.{module_name}", "", inspect.cleandoc(module.__doc__ or ""), ""]
    elsewhere = []
    for name in public_names(module):
        identifier = _identifier(module, name)
        if identifier in seen:
            elsewhere.append(f"[`{name}`][{identifier}]")
            continue
        seen.add(identifier)
        lines += [f"::: {identifier}", ""]
    if module_name == "interop":
        lines += _frameworks()
    if elsewhere:
        lines += ["Described elsewhere: " + ", ".join(elsewhere) + ".", ""]
    return "\n".join(lines)


def _frameworks() -> list[str]:
    """The modules of the frameworks, which are read without being imported, and the names that two of them share."""
    from fi_cupy.interop.table import ALIASES, OPERATORS
    from fi_cupy.interop.wrappers import WRAPPERS

    lines = []
    for name in ("jax", "torch", "transformers"):
        members = "[register]" if name == "transformers" else "false"
        lines += [f"::: fi_cupy.interop.{name}", "    options:", f"      members: {members}"]
        lines += ["      show_root_full_path: true", ""]
    modules = sorted({row.module.split(".")[0] for row in OPERATORS.values()})
    lines += ["## In interop.jax and interop.torch", "", "| of | operators |", "|---|---|"]
    for module in modules:
        names = [n for n, row in OPERATORS.items() if row.module.split(".")[0] == module]
        names += [n for n, target in ALIASES.items() if target in names]
        lines.append(f"| [`{module}`]({_page_of(module)}) | {', '.join(f'`{n}`' for n in sorted(names))} |")
    lines += ["", "Planned wrappers: " + ", ".join(f"`{n}`" for n in sorted(WRAPPERS)) + ", and `LogitsPipe`.", ""]
    return lines


def _page_of(module: str) -> str:
    """The API page that describes a module's functions."""
    return {"speculative": "sampling.md"}.get(module, f"{module}.md")


def _api_index(modules: list[str]) -> str:
    lines = ["# API", "", "Every name below can be had as `fi_cupy.MODULE.NAME`, most of them as `fi_cupy.NAME`.", ""]
    lines += ["| module | what it holds |", "|---|---|"]
    for module_name in modules:
        doc = inspect.cleandoc(importlib.import_module(f"fi_cupy.{module_name}").__doc__ or "").splitlines()
        lines.append(f"| [`{module_name}`]({module_name}.md) | {doc[0] if doc else ''} |")
    return "\n".join(lines) + "\n"


def _format(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


#: Said where the limit that a copy sets was passed.
_OVER = (
    " Shares above 100 %: the limit of copies is that of the driver's own copy, which kernels pass; fp8 products are "
    "held against bf16's."
)


def _performance_pages() -> dict[str, str]:
    """The page of bench results, and a chart an operator."""
    from fi_cupy.testing.bench_report import chart

    found = json.loads(RESULTS.read_text())
    device, limits = found["device"], found["limits"]
    software = ", ".join(f"{name} {version}" for name, version in found["software"].items())
    lines = [
        "# How fast",
        "",
        f"Measured by `fi-cupy bench` on {device['name']}, {found['date'][:10]}. Limits, measured in the same run: "
        f"{limits['read'] / 1e12:.2f} TB/s read, {limits['copy'] / 1e12:.2f} TB/s copied (read and written), "
        f"{limits['bf16'] / 1e12:.0f} TFLOP/s of bf16 products by cuBLAS.",
        "",
        "Times are medians of CUDA-graph replays over inputs that the L2 cache does not hold. Peers in the column "
        "*here* ran interleaved in the same process, *recorded* ones on another H100. A factor above 1 means that "
        "fi_cupy is faster. How each figure was predicted, and which kernels changed after that day, stands in the "
        "repository's `bench/NOTES.md`."
        + (_OVER if any((row.get("percent") or 0) > 105 for row in found["rows"]) else ""),
        "",
        f"Software: {software}.",
    ]
    pages = {}
    for op, group in groupby(found["rows"], key=lambda row: row["op"]):
        rows = [row for row in group if row["status"] == "ok"]
        lines += ["", f"## {op}", ""]
        drawn = chart(rows)
        if drawn:
            pages[f"performance/{op}.svg"] = drawn
            lines += [f"![{op}: shares of the limit, and speedups](performance/{op}.svg)", ""]
        unit = {row["unit"] for row in rows}
        lines += [f"| case | {_heading(unit)} | rate | of the limit | here | recorded |", "|---|--:|--:|--:|---|---|"]
        lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    pages["performance.md"] = "\n".join(lines) + "\n"
    return pages


def _heading(unit: set[str]) -> str:
    return {"us": "time, µs", "us host": "host time, µs"}.get(unit.pop(), "tokens/s") if len(unit) == 1 else "value"


def _notebook_pages() -> dict[str, str | bytes]:
    """Every notebook as a page, its pictures as files."""
    pages: dict[str, str | bytes] = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        lines = []
        for cell in json.loads(path.read_text())["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                lines += [re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", source), ""]
                continue
            lines += ["```python", source, "```", ""]
            for number, output in enumerate(cell["outputs"]):
                picture = output.get("data", {}).get("image/png")
                if picture is not None:
                    name = f"{path.stem}-{cell['id']}-{number}.png"
                    pages[f"notebooks/{name}"] = base64.b64decode(picture)
                    lines += [f"![output]({name})", ""]
                elif output["output_type"] == "stream":
                    lines += ["``` { .text .output }", "".join(output["text"]).rstrip("\n"), "```", ""]
        lines += [f"*This page is the notebook `notebooks/{path.name}` of the repository, as it ran.*", ""]
        pages[f"notebooks/{path.stem}.md"] = "\n".join(lines)
    return pages


def _cells(row: dict[str, Any]) -> list[str]:
    rate = ""
    if row.get("TFLOPs"):
        rate = f"{row['TFLOPs']:.0f} TFLOP/s"
    elif row.get("TBps"):
        rate = f"{row['TBps']:.2f} TB/s"
    share = f"{row['percent']:.0f} %" if row.get("percent") else ""
    live = ", ".join(f"{name} {peer['speedup']:.2f}" for name, peer in row["peers"].items() if "speedup" in peer)
    past = ", ".join(f"{peer['peer']} {peer['speedup']:.2f}" for peer in row.get("recorded", []))
    return [row["name"], _format(row["value"]), rate, share, live, past]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """One entry a public module in the navigation."""
    pages: list[Any] = ["api/index.md", *({name: f"api/{name}.md"} for name in public_modules())]
    config.nav = [{"API": pages} if entry == {"API": "api/"} else entry for entry in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages, once every public name is documented."""
    modules = public_modules()
    missing = undocumented(modules)
    if missing:
        raise PluginError("public names without a docstring: " + ", ".join(missing))
    seen: set[str] = set()
    pages: dict[str, str | bytes] = {f"api/{name}.md": _api_page(name, seen) for name in modules}
    pages["api/index.md"] = _api_index(modules)
    pages |= _performance_pages() | _notebook_pages()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files
