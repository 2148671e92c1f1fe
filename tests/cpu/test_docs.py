"""The documentation's examples run, page by page, and its navigation names every page."""

from __future__ import annotations

import re
import runpy

import pytest
from kernel_jobs import ROOT

PAGES = ROOT / "docs" / "pages"
ON_A_GPU = {"tutorials/cuda_graphs.md"}
NEEDS = {"tutorials/jax.md": "jax", "tutorials/torch.md": "torch"}


def blocks(text):
    """Python blocks; what is taken from another file has a fence of another form."""
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


PAGE_NAMES = sorted(str(p.relative_to(PAGES)) for p in PAGES.rglob("*.md"))


@pytest.mark.parametrize("page", [n for n in PAGE_NAMES if n not in ON_A_GPU and blocks((PAGES / n).read_text())])
def test_examples_run(page):
    if page in NEEDS:
        pytest.importorskip(NEEDS[page])
    code = "\n".join(blocks((PAGES / page).read_text()))
    if "transformers" in code:
        code = "\n".join(b for b in blocks((PAGES / page).read_text()) if "transformers" not in b)
    exec(compile(code, page, "exec", dont_inherit=True), {"__name__": "example"})


def test_the_navigation_names_every_page():
    config = (ROOT / "docs" / "mkdocs.yml").read_text()
    assert set(PAGE_NAMES) == set(re.findall(r": ([\w/]+\.md)$", config, re.M)) - {"performance.md"}


def test_every_public_module_has_a_page_of_the_api():
    pytest.importorskip("mkdocs")
    hooks = runpy.run_path(str(ROOT / "docs" / "hooks.py"))
    pages = {m: hooks["_page"](m, names) for m, names in hooks["public_names"]().items()}
    assert "::: fi_cupy.norm.rmsnorm" in pages["norm"]
    assert all("::: " in text for text in pages.values())
