"""Where kernels and templates lie, and which headers a source includes. The one file that knows both places."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent
_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)


@lru_cache(maxsize=1)
def kernel_root() -> Path:
    """The include root: ``fi_cupy/_kernels`` in an installed wheel, ``kernels/`` in a checkout."""
    return _either("_kernels", "kernels")


@lru_cache(maxsize=1)
def template_root() -> Path:
    """The Jinja templates: ``fi_cupy/_templates`` in an installed wheel, ``templates/`` in a checkout."""
    return _either("_templates", "templates")


def _either(installed: str, checkout: str) -> Path:
    for candidate in (_PACKAGE / installed, _PACKAGE.parent / checkout):
        if candidate.is_dir():
            return candidate
    raise FileNotFoundError(f"fi_cupy: neither {_PACKAGE / installed} nor {_PACKAGE.parent / checkout} exists")


@lru_cache(maxsize=256)
def _read(name: str, mtime_ns: int, size: int) -> bytes:
    return (kernel_root() / name).read_bytes()


def read_header(name: str) -> bytes:
    """The bytes of ``kernels/<name>``; read again when the file has changed."""
    stat = (kernel_root() / name).stat()
    return _read(name, stat.st_mtime_ns, stat.st_size)


def header_closure(source: bytes) -> dict[str, bytes]:
    """Every header of ours that `source` includes, transitively, as name → bytes, sorted by name.

    Quoted includes are relative to the include root; angle brackets are CUDA's own and belong to the toolkit's version.
    """
    found: dict[str, bytes] = {}
    pending = [m.decode() for m in _INCLUDE.findall(source)]
    while pending:
        name = pending.pop()
        if name not in found:
            found[name] = read_header(name)
            pending += [m.decode() for m in _INCLUDE.findall(found[name])]
    return dict(sorted(found.items()))
