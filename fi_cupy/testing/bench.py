"""The bench harness: what a case is, how often it runs, what a row says. Nothing here needs a GPU.

A bench file ``bench/bench_<op>.py`` defines ``cases(device: DeviceInfo) -> list[BenchCase]``. The launches of a case
are captured in a CUDA graph that rotates over enough input sets to outrun the L2 cache, and the graph's replays are
timed with events, ours and each peer's in turn. `bench_gpu` does that; a test puts a timer of its own in its place.
"""

from __future__ import annotations

import datetime
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

SCHEMA = 1
#: Bytes that the input sets of one case must span so that the L2 (50 MB on H100, 60 MB on H200) does not serve them.
MIN_ROTATED_BYTES = 220_000_000
#: Making sets costs host time, and a graph of more nodes is slow to instantiate: tiny cases stay partly in the L2.
MAX_SETS = 1024
MAX_LAUNCHES = 4096
MIN_REPLAY_US = 400.0
ROUNDS, QUICK_ROUNDS = 11, 7
WARM_SECONDS, QUICK_WARM_SECONDS = 1.0, 0.2
UNITS = ("us", "us host", "tokens/s")


class BenchSkip(Exception):
    """A case cannot run here; the message says what is missing. Not a failure."""


@dataclass(frozen=True)
class BenchCase:
    """One line of the table; made by `bench_case` or `host_case`."""

    name: str
    fn: Callable[[Any], Any] | None = None
    make_inputs: Callable[[int], Any] | None = None
    rotates: bool = True
    bytes: int | None = None
    flops: int | None = None
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    recorded: tuple[str, ...] = ()
    interleave: bool = False
    limit: str | None = None
    measure: Callable[[], float] | None = None
    unit: str = "us"


def bench_case(
    name: str,
    fn: Callable[[Any], Any],
    *,
    inputs: Any = None,
    make_inputs: Callable[[int], Any] | None = None,
    bytes: int | None = None,
    flops: int | None = None,
    peers: Mapping[str, Callable[[Any], Any]] | None = None,
    recorded: str | Sequence[str] = (),
    interleave: bool = False,
    limit: str | None = None,
) -> BenchCase:
    """A case that is timed on the GPU.

    Parameters
    ----------
    name : str
        Operator, shape and type ("rmsnorm 16384x4096 bf16").
    fn : callable
        ``fn(input_set)`` launches once on CuPy's current stream; no synchronisation, best no allocation.
    inputs, make_inputs
        Either one input set, or ``make_inputs(i)`` that makes set number i (device arrays in a tuple, list or
        dictionary, random data); the harness decides how many sets it needs.
    bytes, flops : int, optional
        What the operator must move through device memory, and compute. The rate and its share of the device's
        measured limit come from `flops` where given, else from `bytes`.
    peers : {name: callable}, optional
        ``peer(input_set)`` does the same work. It gets the set with its CuPy arrays as torch tensors and is captured
        by torch; a name that starts with "cupy" gets the set as it is and is captured as ours is.
    recorded : str or sequence of str
        Rows of ``bench/data/peers_h100.json`` to stand beside this one; names that have no row there are left out.
    interleave : bool
        For compute-bound cases, which slow down as the chip warms: a second of warm-up before the rounds.
    limit : "read", "copy" or "bf16", optional
        The limit to compare with; by default "bf16" for `flops` and "copy" for `bytes`.
    """
    if (inputs is None) == (make_inputs is None):
        raise ValueError(f"{name}: pass either inputs or make_inputs")
    if limit not in (None, "read", "copy", "bf16"):
        raise ValueError(f"{name}: limit is {limit!r}, expected 'read', 'copy' or 'bf16'")
    default = "bf16" if flops else ("copy" if bytes else None)
    return BenchCase(
        name=name,
        fn=fn,
        make_inputs=make_inputs if make_inputs is not None else lambda _: inputs,
        rotates=make_inputs is not None,
        bytes=bytes,
        flops=flops,
        peers=dict(peers or {}),
        recorded=(recorded,) if isinstance(recorded, str) else tuple(recorded),
        interleave=interleave,
        limit=limit or default,
    )


def host_case(
    name: str,
    measure: Callable[[], float],
    *,
    unit: str = "us host",
    peers: Mapping[str, Callable[[], float]] | None = None,
    recorded: str | Sequence[str] = (),
) -> BenchCase:
    """A case that measures itself: `measure` (and each peer) returns one number in `unit`."""
    if unit not in UNITS:
        raise ValueError(f"{name}: unit is {unit!r}, expected one of {UNITS}")
    rows = (recorded,) if isinstance(recorded, str) else tuple(recorded)
    return BenchCase(name=name, measure=measure, unit=unit, peers=dict(peers or {}), recorded=rows)


# --- how often ------------------------------------------------------------------------------------------------------


def set_count(footprint: int, nbytes: int, l2_bytes: int, free_bytes: int) -> int:
    """How many input sets a case rotates over.

    Parameters
    ----------
    footprint : int
        Bytes one launch touches; 0 if unknown.
    nbytes : int
        Bytes of memory one set takes.
    l2_bytes, free_bytes : int
        The device's cache, and its free memory, of which the sets may take 40 %.
    """
    if footprint <= 0:
        return 1
    wanted = math.ceil(max(MIN_ROTATED_BYTES, 3 * l2_bytes) / footprint)
    fitting = int(0.4 * free_bytes) // nbytes if nbytes > 0 else MAX_SETS
    return max(1, min(wanted, fitting, MAX_SETS))


def launch_count(us: float, sets: int) -> int:
    """Launches a graph holds: whole rotations that last `MIN_REPLAY_US` together."""
    rotations = math.ceil(MIN_REPLAY_US / max(us, 1e-3) / sets)
    return sets * max(1, min(rotations, max(1, MAX_LAUNCHES // sets)))


def set_bytes(inputs: Any) -> int:
    """Bytes of the distinct arrays in an input set (tuples, lists and dictionaries are looked into)."""
    seen: dict[int, int] = {}

    def visit(x: Any) -> None:
        if isinstance(x, Mapping):
            for value in x.values():
                visit(value)
        elif isinstance(x, (tuple, list)):
            for value in x:
                visit(value)
        elif hasattr(x, "nbytes") and hasattr(x, "shape"):
            seen[id(x)] = int(x.nbytes)

    visit(inputs)
    return sum(seen.values())


# --- numbers --------------------------------------------------------------------------------------------------------


def summary(samples: Sequence[float]) -> tuple[float, float]:
    """(median, (largest - smallest) / median)."""
    median = statistics.median(samples)
    return median, (max(samples) - min(samples)) / median if median else 0.0


def speedup(ours: float, theirs: float, unit: str) -> float:
    """How many times as fast as the peer we are: above 1 is faster, for times and for rates alike."""
    if unit == "tokens/s":
        return ours / theirs
    return theirs / ours


def throughput(row: dict[str, Any], limits: Mapping[str, float]) -> None:
    """Add the rate, and its share of the measured limit in percent, to a row with "us"."""
    for key, amount in (("TFLOPs", row.get("flops")), ("TBps", row.get("bytes"))):
        if amount:
            row[key] = amount / row["us"] / 1e6
    limit = limits.get(row.get("limit") or "")
    rate = row.get("TFLOPs" if row.get("limit") == "bf16" else "TBps")
    row["percent"] = 100 * rate * 1e12 / limit if limit and rate else None


def load_recorded(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The recorded peers' provenance, and their rows by name; both empty where the file is not there."""
    if not path.exists():
        return {}, {}
    document = json.loads(path.read_text())
    rows = {row["name"]: row for row in document["rows"]}
    return {k: v for k, v in document.items() if k != "rows"}, rows


def recorded_for(case: BenchCase, value: float, rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The recorded rows of a case, those that there are, with our speedup over each."""
    found = [rows[name] for name in case.recorded if name in rows]
    return [{**row, "speedup": speedup(value, row["value"], row["unit"])} for row in found]


# --- running --------------------------------------------------------------------------------------------------------


class Replay(Protocol):
    """A graph (or a loop) of `launches` launches."""

    launches: int
    mode: str


class Timer(Protocol):
    """What measures: the GPU, or a stand-in in a test."""

    l2_bytes: int

    def free_bytes(self) -> int: ...

    def limits(self, quick: bool) -> dict[str, float]: ...

    def as_peer_inputs(self, inputs: Any, peer: str) -> Any: ...

    def capture(self, fn: Callable[[Any], Any], sets: Sequence[Any], launches: int, peer: str) -> Any: ...

    def time(self, replays: Mapping[str, Any], rounds: int, warm_seconds: float) -> dict[str, list[float]]: ...

    def release(self) -> None: ...


@dataclass
class Options:
    """How thorough a run is."""

    quick: bool = False
    max_seconds: float = 150.0

    @property
    def rounds(self) -> int:
        return QUICK_ROUNDS if self.quick else ROUNDS

    @property
    def warm_seconds(self) -> float:
        return QUICK_WARM_SECONDS if self.quick else WARM_SECONDS


OURS = "fi_cupy"


def _captured(timer: Timer, fn: Callable[[Any], Any], sets: Sequence[Any], peer: str) -> Any:
    """A replay of the right length: one rotation says how long a launch takes, then as many as needed."""
    replay = timer.capture(fn, sets, len(sets), peer)
    us = min(timer.time({peer: replay}, 2, 0.0)[peer]) / replay.launches
    launches = launch_count(us, len(sets))
    return replay if launches == replay.launches else timer.capture(fn, sets, launches, peer)


def _measure_on_gpu(case: BenchCase, timer: Timer, options: Options) -> dict[str, Any]:
    assert case.fn is not None and case.make_inputs is not None
    first = case.make_inputs(0)
    nbytes = set_bytes(first)
    footprint = case.bytes or nbytes
    count = set_count(footprint, nbytes, timer.l2_bytes, timer.free_bytes()) if case.rotates else 1
    sets = [first] + [case.make_inputs(i) for i in range(1, count)]
    replays = {OURS: _captured(timer, case.fn, sets, OURS)}
    peers: dict[str, Any] = {}
    for name, fn in case.peers.items():
        try:
            replays[name] = _captured(timer, fn, [timer.as_peer_inputs(s, name) for s in sets], name)
        except ImportError as error:
            peers[name] = {"missing": str(error)}
        except Exception as error:
            peers[name] = {"error": _text(error)}
    samples = timer.time(replays, options.rounds, options.warm_seconds if case.interleave else 0.0)
    per_launch = {name: [us / replays[name].launches for us in samples[name]] for name in replays}
    us, spread = summary(per_launch[OURS])
    for name in replays:
        if name != OURS:
            peer_us, peer_spread = summary(per_launch[name])
            ratio = statistics.median(b / a for a, b in zip(per_launch[OURS], per_launch[name], strict=True))
            peers[name] = {"us": peer_us, "spread": peer_spread, "speedup": ratio, "mode": replays[name].mode}
    return {
        "us": us, "value": us, "spread": spread, "rounds": options.rounds, "launches": replays[OURS].launches,
        "sets": count, "rotated_bytes": count * footprint, "in_l2": count * footprint < 3 * timer.l2_bytes,
        "mode": replays[OURS].mode, "bytes": case.bytes, "flops": case.flops, "limit": case.limit, "peers": peers,
    }  # fmt: skip


def _measure_itself(case: BenchCase) -> dict[str, Any]:
    assert case.measure is not None
    value = float(case.measure())
    peers: dict[str, Any] = {}
    for name, measure in case.peers.items():
        try:
            theirs = float(measure())
            peers[name] = {"value": theirs, "speedup": speedup(value, theirs, case.unit)}
        except (ImportError, BenchSkip) as error:
            peers[name] = {"missing": str(error)}
        except Exception as error:
            peers[name] = {"error": _text(error)}
    return {"value": value, "peers": peers}


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip()


def run_case(
    op: str,
    case: BenchCase,
    timer: Timer,
    limits: Mapping[str, float],
    recorded: Mapping[str, Mapping[str, Any]],
    options: Options,
) -> dict[str, Any]:
    """One row. What goes wrong becomes the row's "error"; the run goes on."""
    row: dict[str, Any] = {"op": op, "name": case.name, "status": "ok", "unit": case.unit}
    start = time.perf_counter()
    try:
        row.update(_measure_on_gpu(case, timer, options) if case.measure is None else _measure_itself(case))
        if "us" in row:
            throughput(row, limits)
        row["recorded"] = recorded_for(case, row["value"], recorded)
    except BenchSkip as error:
        row.update(status="skipped", error=str(error))
    except Exception as error:
        row.update(status="failed", error=_text(error))
    try:
        timer.release()
    except Exception as error:
        row.update(status="failed", error=row.get("error") or f"afterwards: {_text(error)}")
    row["seconds"] = round(time.perf_counter() - start, 3)
    return row


def run_all(
    cases: Sequence[tuple[str, BenchCase]],
    timer: Timer,
    limits: Mapping[str, float],
    recorded: Mapping[str, Mapping[str, Any]],
    options: Options,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Every case in order, until the time is up; those that no time is left for are rows with status "skipped"."""
    start, rows = time.perf_counter(), []
    for op, case in cases:
        if time.perf_counter() - start > options.max_seconds:
            row = {"op": op, "name": case.name, "unit": case.unit, "status": "skipped", "seconds": 0.0}
            row["error"] = f"the run's {options.max_seconds:g} s were over"
        else:
            row = run_case(op, case, timer, limits, recorded, options)
        rows.append(row)
        on_row(row)
    return rows


def document(
    rows: Sequence[dict[str, Any]],
    limits: Mapping[str, float],
    environment: Mapping[str, Any],
    provenance: Mapping[str, Any],
    options: Options,
    seconds: float,
) -> dict[str, Any]:
    """Everything a run found, as it is written to JSON: limits in bytes or operations a second."""
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **environment,
        "quick": options.quick,
        "seconds": round(seconds, 1),
        "limits": dict(limits),
        "recorded": dict(provenance),
        "rows": list(rows),
    }


def random_array(shape: tuple[int, ...], dtype: Any = "bfloat16", seed: int = 0) -> Any:
    """A CuPy array of random values made on the device (fp8 as bytes); see `bench_gpu.random_array`."""
    from fi_cupy.testing.bench_gpu import random_array as make

    return make(shape, dtype, seed)
