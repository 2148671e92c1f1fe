"""From `KernelSpec` to one translation unit. Jinja names things; it never computes them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from fi_cupy.dtypes import DType
from fi_cupy.jit.sources import template_root
from fi_cupy.jit.spec import ConfigValue, CppStruct, CppType, CppValue, KernelSpec


@lru_cache(maxsize=1)
def _environment() -> Any:
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(template_root()),
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,
    )


@lru_cache(maxsize=1024)
def render(spec: KernelSpec) -> str:
    """Render the translation unit of `spec`."""
    config = [(name, _declare(name, value)) for name, value in spec.config]
    bounds = f"__launch_bounds__({spec.threads}{f', {spec.min_blocks}' if spec.min_blocks else ''})"
    if spec.cluster:
        bounds += f" __cluster_dims__({spec.cluster}, 1, 1)"
    return str(_environment().get_template("kernel_inst.cu.jinja").render(spec=spec, config=config, bounds=bounds))


def _declare(name: str, value: ConfigValue) -> str:
    if isinstance(value, DType):
        return f"using {name} = {value.cpp};"
    if isinstance(value, CppType):
        return f"using {name} = {value};"
    if isinstance(value, CppStruct):
        return f"struct {name} {{ {' '.join(_declare(*member) for member in value)} }};"
    if isinstance(value, CppValue):
        return f"static constexpr auto {name} = {value};"
    if isinstance(value, bool):
        return f"static constexpr bool {name} = {'true' if value else 'false'};"
    if isinstance(value, int):
        return f"static constexpr int {name} = {value};"
    return f"static constexpr float {name} = {value!r}f;"
