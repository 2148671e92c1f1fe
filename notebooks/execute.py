"""Run notebooks and keep their outputs: ``python notebooks/execute.py [--out FOLDER] [NOTEBOOK ...]`` (all by default).

Needs nbclient, ipykernel and matplotlib (``pip install nbclient ipykernel matplotlib``), and a GPU for the figures of
the GPU. What differs from run to run without meaning anything (times of execution, the text form of pictures, the
machine's Python version) is left out, so that a diff shows what changed. A notebook that fails is not written.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def tidied(notebook: Any) -> Any:
    """The notebook without what means nothing to a reader."""
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", ()):
            if "image/png" in output.get("data", {}):
                output.data.pop("text/plain", None)
        if "outputs" in cell:  # warnings name paths of the machine
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    notebook.metadata = METADATA
    return notebook


def execute(path: Path, folder: Path) -> float:
    """Run one notebook, write it into `folder`; the seconds it took."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    start = time.perf_counter()
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(tidied(notebook), folder / path.name)
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(HERE.glob("*.ipynb")))
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the executed notebooks (default: in place)")
    given = parser.parse_args()
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    failed = 0
    for path in given.notebooks:
        try:
            print(f"{path.name}: {execute(path, given.out):.1f} s", flush=True)
        except Exception as error:
            failed += 1
            print(f"{path.name}: {type(error).__name__}: {str(error)[-3000:]}", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
