"""What mkdocs cannot know: one API page a module, made from the stub of public names, and the performance page.

A public name without a docstring fails the build.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]

#: Modules whose public names the top-level stub does not list.
FURTHER = {
    "jit": ["variants.define_variant", "variants.compile"],
    "attention": ["explain", "Explanation", "KernelUse"],
    "lookup": ["gather_rows", "argmax"],
    "logits_processor": [
        "LogitsPipe", "LogitsProcessor", "Temperature", "Softmax", "TopK", "TopP", "MinP", "Sample", "compile_pipeline",
        "legalize_processors",
    ],
    "errors": [],
    "interop.jax": [],
    "interop.torch": [],
    "interop.transformers": ["register", "attention_forward", "attention_mask"],
}  # fmt: skip
#: Shown as a whole.
WHOLE = ("errors", "interop.jax", "interop.torch")


def public_names() -> dict[str, list[str]]:
    """Module -> names, from ``fi_cupy/__init__.pyi``."""
    tree = ast.parse((ROOT / "fi_cupy" / "__init__.pyi").read_text())
    names: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            names.setdefault(node.module, []).extend(alias.name for alias in node.names)
    for module, more in FURTHER.items():
        mine = names.setdefault(module, [])
        mine.extend(n for n in more if n not in mine)
    return names


def _defined(module: str, name: str) -> str:
    """The dotted place where a name that a module hands on is defined, from the imports in its text."""
    path = ROOT / "fi_cupy" / Path(*module.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    tree = ast.parse(file.read_text())
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            if ast.get_docstring(node) is None:
                raise PluginError(f"fi_cupy.{module}.{name} is public and has no docstring")
            return f"fi_cupy.{module}.{name}"
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return f"fi_cupy.{module}.{name}"
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fi_cupy"):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return _defined(node.module.removeprefix("fi_cupy."), alias.name)
    raise PluginError(f"fi_cupy.{module}.{name} is public and defined nowhere")


def _page(module: str, names: list[str]) -> str:
    lines = [f"# fi_cupy.{module}", ""]
    if module in WHOLE:
        lines += [f"::: fi_cupy.{module}", "    options:", "      show_root_heading: false", ""]
        if module.startswith("interop."):
            lines += ["## Functions and classes", "", *_interop_names(), ""]
        return "\n".join(lines)
    for name in names:
        lines += [f"::: {_defined(*name.rsplit('.', 1)) if '.' in name else _defined(module, name)}", ""]
    return "\n".join(lines)


def _interop_names() -> list[str]:
    """What the interop modules make from the operator tables, with links to the functions themselves."""
    from fi_cupy.interop.table import OPERATORS
    from fi_cupy.interop.wrappers import WRAPPERS

    names = public_names()
    module_of = {name: module for module, names in names.items() if not module.startswith("interop") for name in names}
    lines = []
    for name in (*OPERATORS, *WRAPPERS):
        module = module_of.get(name)
        lines.append(f"- `{name}`" if module is None else f"- [`{name}`][fi_cupy.{_path(module, name)}]")
    return lines


def _path(module: str, name: str) -> str:
    return _defined(module, name).removeprefix("fi_cupy.")


def performance() -> str:
    """Recorded rows of peers and what the notes say of ours."""
    recorded = json.loads((ROOT / "bench" / "data" / "peers_h100.json").read_text())
    lines = [
        "# Performance", "",
        "Our own figures, with floors, predictions and what came of them, are in `bench/NOTES.md` of the repository; "
        "`fi-cupy bench` measures the machine at hand. The peers below were recorded on "
        f"{recorded['device']}, {recorded['date']} ({recorded['method']}).", "",
        "| case | peer | value | |", "|---|---|--:|---|",
    ]  # fmt: skip
    for row in recorded["rows"]:
        rate = next((f"{row[k]:.0f} {k.replace('TFLOPs', 'TFLOP/s')}" for k in ("TFLOPs", "GBs") if row.get(k)), "")
        lines.append(f"| {row['name']} | {row['peer']} | {row['value']:.4g} {row['unit']} | {rate} |")
    return "\n".join(lines) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages."""
    pages = {f"api/{m}.md": _page(m, names) for m, names in sorted(public_names().items())}
    links = "\n".join(f"- [`fi_cupy.{m}`]({m}.md)" for m in sorted(public_names()))
    pages["api/index.md"] = (
        f"# API\n\nEvery public name, by module. `import fi_cupy` offers most of them directly.\n\n{links}\n"
    )
    pages["performance.md"] = performance()
    for uri, text in pages.items():
        files.append(File.generated(config, uri, content=text))
    return files


def on_config(config: Any) -> Any:
    """Put the API pages into the navigation."""
    for entry in config["nav"]:
        if "API" in entry:
            entry["API"] = ["api/index.md", *({f"fi_cupy.{m}": f"api/{m}.md"} for m in sorted(public_names()))]
    return config
