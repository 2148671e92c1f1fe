"""The documentation's own examples run, on NumPy arrays, in the order in which a page shows them."""

from __future__ import annotations

import logging
import re

import pytest
from kernel_jobs import ROOT

PAGES = [
    "index.md",
    "tutorials/kv_cache.md",
    "tutorials/logging.md",
    "tutorials/recipes.md",
    "tutorials/tuning.md",
    "tutorials/variants.md",
]


def blocks(text: str) -> list[str]:
    """The Python blocks of a page, those in tabs too, without the tabs of other frameworks."""
    found = []
    for match in re.finditer(r"(?ms)^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```", text):
        indent = match["indent"]
        found.append("\n".join(line.removeprefix(indent) for line in match["code"].splitlines()))
    return [code for code in found if not re.search(r"import (cupy|torch|jax)", code)]


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_examples_of_a_framework_run(framework):
    pytest.importorskip(framework)
    code = re.findall(r"(?ms)^```python\n(.*?)^```", (ROOT / "docs" / "tutorials" / f"{framework}.md").read_text())
    code = [block for block in code if "transformers" not in block]
    exec(compile("\n".join(code), framework, "exec", dont_inherit=True), {"__name__": "docs"})


@pytest.fixture
def log_levels():
    """The levels of the loggers as they were: one page sets them."""
    loggers = [logging.getLogger(name) for name in ("fi_cupy", "fi_cupy.attention")]
    before = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


@pytest.mark.usefixtures("log_levels")
@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page):
    code = blocks((ROOT / "docs" / page).read_text())
    assert code
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in code:
        exec(compile(block, page, "exec"), namespace)
