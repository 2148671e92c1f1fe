"""Calls as files: what went in, what came out, and the way back. See `fi_cupy.api_logging`.

A call is a folder ``<number>_pid<pid>_<function>`` with ``call.json`` (the function, and arguments and result as a
tree) and the arrays' values, ``inputs.npz`` and ``outputs.npz``. The inputs are on disk before the function runs, so a
crash leaves the call that caused it.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np

from fi_cupy.arrays import view
from fi_cupy.dtypes import FP8_TYPES, HALF_TYPES, DType
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.errors import ArgumentError, CacheError, FiCupyError
from fi_cupy.jit import env

CALL, INPUTS, OUTPUTS = "call.json", "inputs.npz", "outputs.npz"
_FOLDER = re.compile(r"(\d+)_pid(\d+)_.*")
#: Folder of the snapshots that `flush_graph_dumps` makes.
FLUSHES = "graph_flushes"


# --- trees -----------------------------------------------------------------------------------------------------------


def is_array(value: Any) -> bool:
    """Whether a value is an array of some framework, not a scalar."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, (np.generic, type))


def encode(value: Any, arrays: dict[str, Any], path: str) -> Any:
    """A value as JSON; arrays go into `arrays` under their path. A workspace counts by its size alone."""
    if is_array(value):
        found = view(value)
        if "workspace" not in path:
            arrays[path] = value
        return {
            "array": path, "dtype": found.dtype.name, "shape": list(found.shape), "strides": list(found.strides),
            "framework": found.framework, "device": found.device,
        }  # fmt: skip
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.value if isinstance(value, Enum) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (list, tuple)):
        items = [encode(x, arrays, f"{path}.{i}") for i, x in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, Mapping):
        return {"mapping": {str(k): encode(x, arrays, f"{path}.{k}") for k, x in value.items()}}
    try:
        return {"dtype": to_dtype(value).name}
    except FiCupyError:
        return {"opaque": f"{type(value).__module__}.{type(value).__qualname__}", "repr": repr(value)[:200]}


def decode(tree: Any, make: Callable[[dict[str, Any]], Any]) -> Any:
    """The value of a tree; `make` gives its arrays.

    Raises
    ------
    ArgumentError
        It holds something that was not kept.
    """
    if isinstance(tree, list):
        return [decode(x, make) for x in tree]
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return make(tree)
    if "tuple" in tree:
        return tuple(decode(x, make) for x in tree["tuple"])
    if "mapping" in tree:
        return {k: decode(x, make) for k, x in tree["mapping"].items()}
    if "dtype" in tree:
        return tree["dtype"]
    raise ArgumentError(f"replay: an argument was a {tree['opaque']}, which is not kept: {tree['repr']}")


# --- values ----------------------------------------------------------------------------------------------------------


def _bytes(value: Any) -> np.ndarray[Any, Any]:
    """An array's values in C order as bytes: what a file of NumPy's can hold of any type."""
    host = np.ascontiguousarray(view(value).host())
    return host.reshape(-1).view(np.uint8)


def _save(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())


def _load(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    if not path.is_file():
        return {}
    with np.load(path) as kept:
        return {name: kept[name] for name in kept.files}


def _placed(values: np.ndarray[Any, Any] | None, tree: Mapping[str, Any], device: str) -> Any:
    """An array with the recorded strides: torch's where it was, else NumPy's on the CPU and CuPy's on a GPU."""
    kind, shape, strides = to_dtype(tree["dtype"]), tuple(tree["shape"]), tuple(tree["strides"])
    # Overlapping or backward strides are not worth a copy that is as wrong: such an array comes back in C order.
    plain = any(s <= 0 for n, s in zip(shape, strides, strict=True) if n > 1) or 0 in shape
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if not plain else int(np.prod(shape))
    base = np.zeros(span, kind.np)
    there = base.reshape(shape) if plain else np.lib.stride_tricks.as_strided(
        base, shape, tuple(s * kind.itemsize for s in strides)
    )  # fmt: skip
    if values is not None:
        there[...] = values.view(kind.np).reshape(shape)
    if tree["framework"] == "torch":
        return _as_torch(base, kind, shape, None if plain else strides, device)
    if device == "cpu":
        return there
    import cupy

    with cupy.cuda.Device(int(device.partition(":")[2] or 0)):
        stored = np.dtype(np.uint8) if kind in FP8_TYPES else kind.np
        moved = cupy.asarray(base.view(np.uint8)).view(stored)
        return moved.reshape(shape) if plain else cupy.lib.stride_tricks.as_strided(
            moved, shape, tuple(s * kind.itemsize for s in strides)
        )  # fmt: skip


def _as_torch(
    base: np.ndarray[Any, Any], kind: DType, shape: tuple[int, ...], strides: tuple[int, ...] | None, device: str
) -> Any:
    import torch

    flat = torch.from_numpy(base.view(np.uint8)).view(getattr(torch, kind.name)).to(device)
    return flat.reshape(shape) if strides is None else flat.as_strided(shape, strides)


def _same(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any], kind: DType) -> bool:
    """Whether bytes of one type mean the same numbers, up to the rounding of another GPU."""
    if found.shape != wanted.shape:
        return False
    a, b = found.view(kind.np), wanted.view(kind.np)
    if "float" not in kind.name:
        return bool((a == b).all())
    tolerance = 0.13 if kind in FP8_TYPES else 2e-2 if kind in HALF_TYPES else 1e-3
    x, y = a.astype(np.float64), b.astype(np.float64)
    size = np.abs(y[np.isfinite(y)]).max(initial=0.0)
    return bool(np.allclose(x, y, rtol=tolerance, atol=1e-2 * tolerance * size, equal_nan=True))


# --- writing ---------------------------------------------------------------------------------------------------------


class Dumper:
    """Writes calls under a folder, up to the environment's limits.

    Raises
    ------
    ArgumentError
        A limit is no number.
    """

    def __init__(self) -> None:
        self.root = Path(env.DUMP_DIR.get() or "fi_cupy_dumps")
        self.most_bytes = _number(env.DUMP_MAX_SIZE_GB, 20.0) * 1e9
        self.most_calls = _number(env.DUMP_MAX_COUNT, 1000.0)
        self.include, self.exclude = _patterns(env.DUMP_INCLUDE), _patterns(env.DUMP_EXCLUDE)
        self.calls, self.bytes = 0, 0.0
        self._lock = threading.Lock()
        self._pending: list[tuple[Path, dict[str, Any]]] = []
        self._flushes = 0

    def wants(self, name: str) -> bool:
        """Whether a call of this function is written."""
        chosen = not self.include or any(fnmatch.fnmatchcase(name, p) for p in self.include)
        return chosen and not any(fnmatch.fnmatchcase(name, p) for p in self.exclude)

    @property
    def full(self) -> bool:
        """Whether a limit is reached."""
        return self.calls >= self.most_calls or self.bytes >= self.most_bytes

    def begin(self, name: str, module: str, tree: dict[str, Any], arrays: dict[str, Any], capturing: bool) -> Path:
        """Write a call's inputs; returns its folder. While a graph is captured, values wait for `flush`."""
        with self._lock:
            folder = self.root / f"{self.calls:06d}_pid{os.getpid()}_{name}"
            self.calls += 1
        folder.mkdir(parents=True, exist_ok=True)
        self._values(folder, INPUTS, arrays, capturing)
        self._write(folder, {"function": name, "module": module, "pid": os.getpid(), "state": "inputs", **tree})
        return folder

    def end(self, folder: Path, result: Any, arrays: dict[str, Any], capturing: bool) -> None:
        """Write a call's result, and the arrays among its inputs that have changed."""
        outputs: dict[str, Any] = {}
        tree = encode(result, outputs, "result")
        if not capturing:
            before = _load(folder / INPUTS)
            changed = {n: x for n, x in arrays.items() if n in before and not np.array_equal(before[n], _bytes(x))}
            outputs |= {f"after.{name}": x for name, x in changed.items()}
        self._values(folder, OUTPUTS, outputs, capturing)
        self._write(folder, {**_read(folder), "state": "done", "result": tree})

    def _values(self, folder: Path, file: str, arrays: dict[str, Any], capturing: bool) -> None:
        if capturing:
            self._pending.append((folder / file, dict(arrays)))
            return
        kept = {name: _bytes(x) for name, x in arrays.items()}
        _save(folder / file, kept)
        self.bytes += sum(x.nbytes for x in kept.values())

    def _write(self, folder: Path, tree: dict[str, Any]) -> None:
        temporary = folder / f".{CALL}"
        temporary.write_text(json.dumps(tree, indent=1))
        os.replace(temporary, folder / CALL)

    def flush(self) -> int:
        """Write what the arrays of captured calls hold now, after a replay of their graph; returns how many files.

        The first time beside the calls, later in a folder of snapshots.
        """
        with self._lock:
            for path, arrays in self._pending:
                target = path
                if path.exists():
                    target = self.root / FLUSHES / f"flush_{self._flushes:04d}" / path.parent.name / path.name
                    target.parent.mkdir(parents=True, exist_ok=True)
                _save(target, {name: _bytes(x) for name, x in arrays.items()})
            self._flushes += 1
            return len(self._pending)


def _number(variable: env.Variable, default: float) -> float:
    text = variable.get()
    try:
        return default if text is None else float(text)
    except ValueError:
        raise ArgumentError(f"{variable.names[0]} is {text!r}, expected a number") from None


def _patterns(variable: env.Variable) -> list[str]:
    return [part.strip() for part in (variable.get() or "").split(",") if part.strip()]


# --- replaying -------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> dict[str, Any]:
    try:
        tree: dict[str, Any] = json.loads((folder / CALL).read_text())
    except (OSError, ValueError) as error:
        raise CacheError(f"replay: {folder} holds no call: {error}") from None
    return tree


def _function(tree: Mapping[str, Any]) -> Callable[..., Any]:
    found: Any = importlib.import_module(tree["module"])
    for part in str(tree["function"]).removesuffix(".__init__").split("."):
        found = getattr(found, part)
    return found


def replay_from_dump(
    dump_dir: str | os.PathLike[str],
    compare_outputs: bool = False,
    device: str = "cuda",
    run: bool = False,
    object_registry: dict[tuple[int, int], Any] | None = None,
) -> dict[str, Any]:
    """Read a call that was written at level 10, and make it again.

    Parameters
    ----------
    dump_dir : path
        The call's folder.
    compare_outputs : bool
        Read the result, too, and with `run` compare.
    device : str
        Where the arrays are made: "cuda", "cuda:1" (CuPy's, or torch's where they were) or "cpu" (NumPy's or torch's).
    run : bool
        Call the function.
    object_registry : dict, optional
        Wrappers that earlier calls have made, by (pid, number); a method needs the one it was called on.

    Returns
    -------
    dict
        args, kwargs, metadata; with `run` execution_result, or execution_error where it raised; with `compare_outputs`
        expected_tensors, and with both comparison_match: whether result and changed arguments are the same up to
        rounding.

    Raises
    ------
    CacheError
        The folder holds no call.
    ArgumentError
        An argument was no array, number, text or type; or a method's object is not in the registry.

    Source
    ------
    flashinfer.api_logging.replay_from_dump.
    """
    folder = Path(dump_dir)
    tree = _read(folder)
    values, made = _load(folder / INPUTS), {}

    def make(node: dict[str, Any]) -> Any:
        made[node["array"]] = _placed(values.get(node["array"]), node, device)
        return made[node["array"]]

    args = list(decode(tree["args"], make))
    kwargs = {name: decode(x, make) for name, x in tree["kwargs"].items()}
    found: dict[str, Any] = {"args": args, "kwargs": kwargs, "metadata": tree}
    expected = _load(folder / OUTPUTS) if compare_outputs else {}
    if compare_outputs:
        found["expected_tensors"] = expected
    if not run:
        return found
    function, key = _function(tree), (int(tree["pid"]), int(tree.get("object") or 0))
    objects = {} if object_registry is None else object_registry
    method = "object" in tree and not tree["function"].endswith(".__init__")
    if method:
        if key not in objects:
            raise ArgumentError(f"replay: {folder.name} is a method; replay_sequence makes its object first")
        function = getattr(objects[key], str(tree["function"]).rsplit(".", 1)[1])
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        return {**found, "execution_error": f"{type(error).__name__}: {error}", "comparison_match": False}
    if "object" in tree and not method:
        objects[key], result = result, None
    found["execution_result"] = result
    if compare_outputs:
        found["comparison_match"] = _matches(tree, result, made, expected)
    return found


def _matches(tree: Mapping[str, Any], result: Any, made: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    arrays: dict[str, Any] = {}
    if "result" not in tree:  # it did not come back
        return False
    again = encode(result, arrays, "result")
    arrays |= {f"after.{name}": x for name, x in made.items()}
    if "array" not in json.dumps(tree["result"]) and again != tree["result"]:
        return False
    return all(
        name in arrays and _same(_bytes(arrays[name]), kept, view(arrays[name]).dtype)
        for name, kept in expected.items()
    )


def dumps_of(root: Path) -> Iterator[Path]:
    """The calls under a folder, those of each process in their order."""
    found = [(int(m[2]), int(m[1]), path) for path in root.iterdir() if (m := _FOLDER.fullmatch(path.name))]
    yield from (path for _, _, path in sorted(found, key=lambda x: x[:2]))


def replay_sequence(root_dir: str | os.PathLike[str], device: str = "cuda") -> list[dict[str, Any]]:
    """Make all calls under a folder again, in their order, and compare their results.

    Parameters
    ----------
    root_dir : path
        What FI_CUPY_DUMP_DIR named.
    device : str
        As in `replay_from_dump`.

    Returns
    -------
    list of dict
        As `replay_from_dump` returns, with dump_dir; {"error", "dump_dir"} for a call that could not be read or made.

    Raises
    ------
    CacheError
        There is no such folder.

    Source
    ------
    flashinfer.api_logging.replay_sequence.
    """
    root, results = Path(root_dir), []
    objects: dict[tuple[int, int], Any] = {}
    if not root.is_dir():
        raise CacheError(f"replay: there is no folder {root}")
    for folder in dumps_of(root):
        try:
            found = replay_from_dump(folder, True, device, True, objects)
        except FiCupyError as error:
            found = {"error": str(error)}
        results.append({**found, "dump_dir": str(folder)})
    return results
