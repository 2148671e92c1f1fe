"""The bench harness without a GPU: counts, statistics, rows, recorded peers, JSON, the command."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import click
import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from fi_cupy import dtypes
from fi_cupy.testing import bench, bench_cli, bench_gpu

BENCH = Path(__file__).resolve().parents[2] / "bench"
L2 = 60 << 20
ROW_KEYS = {"op", "name", "status", "unit", "seconds"}
GPU_KEYS = {
    "us", "value", "spread", "rounds", "launches", "sets", "rotated_bytes", "in_l2", "mode", "bytes", "flops", "limit",
    "percent", "peers", "recorded",
}  # fmt: skip


@dataclass
class FakeReplay:
    us: float
    launches: int
    mode: str = "graph"


class FakeTimer:
    """Launches that last as long as their function says (`fn(set)` returns microseconds)."""

    l2_bytes = L2

    def __init__(self, free=100 << 30):
        self.free, self.calls, self.released = free, [], 0

    def free_bytes(self):
        return self.free

    def limits(self, quick):
        return {"read": 4e12, "copy": 4e12, "bf16": 800e12}

    def as_peer_inputs(self, inputs, peer):
        return inputs

    def capture(self, fn, sets, launches, peer):
        self.calls.append((peer, len(sets), launches))
        return FakeReplay(fn(sets[0]), launches)

    def time(self, replays, rounds, warm_seconds):
        # every round is a little slower than the one before
        return {n: [r.us * r.launches * (1 + 0.01 * i) for i in range(rounds)] for n, r in replays.items()}

    def release(self):
        self.released += 1


def run(case, timer=None, recorded=None, **options):
    timer = timer or FakeTimer()
    return bench.run_case("op", case, timer, timer.limits(False), recorded or {}, bench.Options(**options))


# --- counts ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 1 << 36), st.integers(0, 1 << 36), st.integers(1 << 20, 200 << 20), st.integers(0, 200 << 30))
def test_set_count_outruns_the_cache_within_memory(footprint, nbytes, l2, free):
    count = bench.set_count(footprint, nbytes, l2, free)
    assert 1 <= count <= bench.MAX_SETS
    if count > 1:
        assert count * nbytes <= 0.4 * free + 1
        assert (count - 1) * footprint < max(3 * l2, bench.MIN_ROTATED_BYTES)
    fits = nbytes == 0 or (count + 1) * nbytes <= 0.4 * free
    if fits and count < bench.MAX_SETS:
        assert count * footprint >= max(3 * l2, bench.MIN_ROTATED_BYTES)


def test_set_count_of_known_shapes():
    assert bench.set_count(16384 * 4096 * 4, 16384 * 4096 * 4, L2, 100 << 30) == 1
    assert bench.set_count(4096 * 4096 * 4, 4096 * 4096 * 4, L2, 100 << 30) == 4
    assert bench.set_count(24576, 24576, L2, 100 << 30) == bench.MAX_SETS
    assert bench.set_count(0, 0, L2, 100 << 30) == 1


@given(st.floats(1e-4, 1e6), st.integers(1, bench.MAX_SETS))
def test_launch_count_is_whole_rotations_of_enough_length(us, sets):
    launches = bench.launch_count(us, sets)
    assert launches % sets == 0 and launches >= sets
    assert launches <= max(bench.MAX_LAUNCHES, sets)
    if launches + sets <= bench.MAX_LAUNCHES:
        assert launches * us >= bench.MIN_REPLAY_US * 0.999
    assert launches == sets or (launches - sets) * us < bench.MIN_REPLAY_US * 1.001


def test_set_bytes_counts_each_array_once():
    a, b = np.zeros(10, np.float32), np.zeros(5, np.int64)
    assert bench.set_bytes({"x": (a, b), "again": [a], "n": 3, "f": None}) == 80
    assert bench.set_bytes(object()) == 0


# --- numbers --------------------------------------------------------------------------------------------------------


def test_summary_and_speedup():
    assert bench.summary([1.0, 2.0, 4.0]) == (2.0, 1.5)
    assert bench.speedup(2.0, 4.0, "us") == 2.0
    assert bench.speedup(2.0, 4.0, "us host") == 2.0
    assert bench.speedup(200.0, 100.0, "tokens/s") == 2.0


def test_throughput_against_the_right_limit():
    limits = {"read": 4e12, "copy": 2e12, "bf16": 800e12}
    row = {"us": 100.0, "bytes": 200_000_000, "limit": "copy"}
    bench.throughput(row, limits)
    assert row["TBps"] == pytest.approx(2.0) and row["percent"] == pytest.approx(100.0) and "TFLOPs" not in row
    row = {"us": 100.0, "bytes": 200_000_000, "flops": 4 * 10**10, "limit": "bf16"}
    bench.throughput(row, limits)
    assert row["TFLOPs"] == pytest.approx(400.0) and row["percent"] == pytest.approx(50.0)
    row = {"us": 100.0, "bytes": 200_000_000, "limit": "copy"}
    bench.throughput(row, {})
    assert row["percent"] is None


@pytest.mark.parametrize("kind", bench_gpu._PATTERNS, ids=lambda d: d.name)
def test_random_bits_are_values_of_moderate_size(rng, kind):
    words = rng.integers(0, 1 << 32, 4096, dtype=np.uint32)
    values = bench_gpu.pattern_words(words, kind).view(kind.np).astype(np.float64)
    assert values.size == 4096 * 4 // kind.itemsize
    assert np.isfinite(values).all() and np.abs(values).min() >= 0.125 and np.abs(values).max() < 2.0
    assert 0.4 < (values > 0).mean() < 0.6 and len(np.unique(values)) >= min(30, values.size)
    if kind is dtypes.bfloat16:
        assert values.astype(ml_dtypes.bfloat16).view(np.uint16).tolist() == (
            bench_gpu.pattern_words(words, kind).view(np.uint16).tolist()
        )


def test_map_arrays_keeps_the_structure():
    got = bench_gpu.map_arrays({"a": (1, [2]), "b": None}, lambda x: (x,))
    assert got == {"a": ((1,), [(2,)]), "b": (None,)}


# --- rows -----------------------------------------------------------------------------------------------------------


def test_a_row_of_a_memory_bound_case():
    nbytes = 64 << 20
    made = []

    def make(i):
        made.append(i)
        return (np.zeros(0, np.uint8), i)

    case = bench.bench_case(
        "x", lambda s: 20.0, make_inputs=make, bytes=nbytes, peers={"torch": lambda s: 30.0}, recorded="theirs"
    )
    timer = FakeTimer()
    recorded = {"theirs": {"name": "theirs", "peer": "FlashInfer", "value": 44.0, "unit": "us"}}
    row = run(case, timer, recorded)
    assert ROW_KEYS | GPU_KEYS <= row.keys()
    assert row["status"] == "ok" and made == [0, 1, 2, 3] and row["sets"] == 4
    assert row["us"] == pytest.approx(20.0 * 1.05) and row["spread"] == pytest.approx(0.1 / 1.05)
    assert row["launches"] == 20 and row["mode"] == "graph" and row["rounds"] == bench.ROUNDS and not row["in_l2"]
    assert row["TBps"] == pytest.approx(nbytes / 21e-6 / 1e12) and row["limit"] == "copy"
    assert row["percent"] == pytest.approx(100 * row["TBps"] / 4)
    assert row["peers"]["torch"]["speedup"] == pytest.approx(1.5)
    assert row["recorded"][0]["speedup"] == pytest.approx(44 / 21)
    assert timer.calls == [("fi_cupy", 4, 4), ("fi_cupy", 4, 20), ("torch", 4, 4), ("torch", 4, 16)]
    assert timer.released == 1


def test_fixed_inputs_do_not_rotate_and_long_launches_are_captured_once():
    timer = FakeTimer()
    row = run(bench.bench_case("x", lambda s: 5000.0, inputs=[1], flops=10**12), timer, quick=True)
    assert row["sets"] == 1 and row["launches"] == 1 and row["limit"] == "bf16"
    assert row["rounds"] == bench.QUICK_ROUNDS and timer.calls == [("fi_cupy", 1, 1)]


def test_what_goes_wrong_is_in_the_row():
    def broken(s):
        raise ValueError("no such kernel")

    def absent(s):
        raise ImportError("No module named 'flashinfer'")

    row = run(bench.bench_case("x", broken, inputs=[1]))
    assert row["status"] == "failed" and row["error"] == "ValueError: no such kernel"
    peers = {"torch": broken, "flashinfer": absent}
    row = run(bench.bench_case("x", lambda s: 1.0, inputs=[1], peers=peers))
    assert row["status"] == "ok"
    assert row["peers"] == {
        "torch": {"error": "ValueError: no such kernel"},
        "flashinfer": {"missing": "No module named 'flashinfer'"},
    }
    assert bench_cli.format_peers(row) == "torch failed"
    row = run(bench.bench_case("x", lambda s: 1.0, inputs=[1], recorded="nothing"))
    assert row["status"] == "ok" and row["recorded"] == []


def test_host_cases():
    row = run(bench.host_case("tokens", lambda: 300.0, unit="tokens/s", peers={"slow": lambda: 100.0}))
    assert row["value"] == 300.0 and row["peers"]["slow"]["speedup"] == 3.0 and "us" not in row
    assert bench_cli.table_cells(row)[:2] == ("tokens", "300.0 tokens/s")

    def unavailable():
        raise bench.BenchSkip("no model")

    row = run(bench.host_case("x", unavailable))
    assert (row["status"], row["error"]) == ("skipped", "no model")
    row = run(bench.host_case("x", lambda: 1.0, peers={"p": unavailable}))
    assert row["peers"]["p"] == {"missing": "no model"}


def test_cases_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match="either inputs or make_inputs"):
        bench.bench_case("x", print)
    with pytest.raises(ValueError, match="limit is 'fp4'"):
        bench.bench_case("x", print, inputs=[1], limit="fp4")
    with pytest.raises(ValueError, match="unit is 'hours'"):
        bench.host_case("x", lambda: 1.0, unit="hours")


def test_a_run_stops_starting_cases_when_its_time_is_over():
    cases = [("op", bench.host_case(str(i), lambda: 1.0)) for i in range(3)]
    seen = []
    rows = bench.run_all(cases, FakeTimer(), {}, {}, bench.Options(max_seconds=-1), seen.append)
    assert [row["status"] for row in rows] == ["skipped"] * 3 and seen == rows
    rows = bench.run_all(cases, FakeTimer(), {}, {}, bench.Options())
    assert [row["status"] for row in rows] == ["ok"] * 3


def test_the_document_is_json_and_complete():
    timer = FakeTimer()
    row = run(bench.bench_case("x", lambda s: 20.0, inputs=[np.zeros(8)], bytes=64, flops=10))
    failed = run(bench.host_case("y", lambda: 1 / 0))
    environment = {"device": {"name": "NVIDIA H200"}, "software": {"fi_cupy": "0.1"}}
    found = bench.document([row, failed], timer.limits(True), environment, {"date": "2026"}, bench.Options(), 3.21)
    found = json.loads(json.dumps(found))
    assert found["schema"] == bench.SCHEMA and found["seconds"] == 3.2 and found["quick"] is False
    assert found.keys() == {
        "schema", "date", "device", "software", "quick", "seconds", "limits", "recorded", "rows",
    }  # fmt: skip
    assert found["rows"][0]["name"] == "x" and found["rows"][1]["error"].startswith("ZeroDivisionError")


def test_table_cells():
    row = {
        "op": "norm", "name": "rmsnorm", "status": "ok", "unit": "us", "value": 64.25, "us": 64.25, "spread": 0.02,
        "TBps": 4.178, "percent": 97.6, "limit": "copy", "mode": "graph", "in_l2": False, "bytes": 1,
        "peers": {"torch": {"speedup": 1.5}}, "recorded": [{"peer": "FlashInfer", "value": 98.08, "speedup": 1.527}],
    }  # fmt: skip
    assert bench_cli.table_cells(row) == (
        "rmsnorm", "64.25", "2.0 %", "4,178 GB/s", "98 % copy", "torch 1.50x", "FlashInfer 98.08 (1.53x)",
    )  # fmt: skip
    assert bench_cli.table_cells({**row, "mode": "loop", "in_l2": True})[2] == "2.0 % loop L2"
    assert bench_cli.format_rate({"TFLOPs": 512.34, "TBps": 1.0}) == "512.3 TFLOP/s"
    assert bench_cli.format_value({"value": 12345.6, "unit": "us"}) == "12,346"
    bench_cli.print_table([row, {**row, "status": "failed", "error": "[x] broke"}], {"device": "NVIDIA H100, 132 SMs"})


# --- files and command ----------------------------------------------------------------------------------------------


def test_recorded_peers_have_provenance_and_known_units():
    provenance, rows = bench.load_recorded(BENCH / "data" / "peers_h100.json")
    assert provenance.keys() == {"schema", "device", "software", "date", "method"}
    assert len(rows) > 100
    for row in rows.values():
        assert row["peer"] and row["unit"] in bench.UNITS and row["value"] > 0
    assert rows["rmsnorm T16384 H4096"]["value"] == 98.08
    assert bench.load_recorded(BENCH / "nothing.json") == ({}, {})


@pytest.mark.parametrize("op", sorted(p.stem.removeprefix("bench_") for p in BENCH.glob("bench_*.py")))
def test_every_bench_file_makes_its_cases_without_a_gpu(op):
    _, rows = bench.load_recorded(BENCH / "data" / "peers_h100.json")
    cases, failed = bench_cli.collect(BENCH, [op], bench_cli.H200)
    assert failed == [] and cases
    names = [case.name for _, case in cases]
    assert len(set(names)) == len(names)
    naming = [case for _, case in cases if case.recorded]
    found = [case for case in naming if rows.keys() & set(case.recorded)]
    assert 2 * len(found) >= len(naming), "most names of recorded rows are misspelt"


def test_a_bench_file_that_cannot_be_read_is_one_failed_row(tmp_path):
    (tmp_path / "bench_bad.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "bench_good.py").write_text(
        "from fi_cupy.testing.bench import bench_case\n"
        "def cases(device):\n    return [bench_case('x', print, inputs=[device.num_sms], bytes=4_200_000)]\n"
    )
    cases, failed = bench_cli.collect(tmp_path, [], bench_cli.H200)
    assert [(op, case.name) for op, case in cases] == [("good", "x")]
    assert failed[0]["op"] == "bad" and "nothing_of_this_name" in failed[0]["error"]
    result = CliRunner().invoke(bench_cli.bench_command, ["--dir", str(tmp_path), "--list"])
    assert result.exit_code == 1 and "floor 1.00 us" in result.output


def test_the_command_names_what_is_missing(tmp_path):
    result = CliRunner().invoke(bench_cli.bench_command, ["--dir", str(tmp_path)])
    assert result.exit_code == 1 and "no bench_*.py in" in result.output
    result = CliRunner().invoke(bench_cli.bench_command, ["--dir", str(BENCH), "--list", "--op", "nothing"])
    assert result.exit_code == 1 and "no bench file for nothing; there are" in result.output


def test_a_whole_run_with_a_stand_in_for_the_gpu(tmp_path, monkeypatch):
    (tmp_path / "bench_one.py").write_text(
        "from fi_cupy.testing.bench import bench_case, host_case\n"
        "def cases(device):\n"
        "    return [bench_case('fast', lambda s: 2.0, inputs=[1], bytes=1000), host_case('bad', lambda: 1 / 0)]\n"
    )

    class Gpu(FakeTimer):
        info = bench_cli.H200

        def environment(self):
            return {"device": {"name": "stand-in"}, "software": {}}

    monkeypatch.setattr(bench_gpu, "GpuTimer", Gpu)
    monkeypatch.setattr(bench_cli, "num_devices", lambda: 1)
    path = tmp_path / "out.json"
    page = tmp_path / "out.html"
    arguments = ["--dir", str(tmp_path), "--quick", "--json", str(path), "--html", str(page)]
    result = CliRunner().invoke(bench_cli.bench_command, arguments)
    assert result.exit_code == 1, result.output
    assert "1 ok, 1 failed, 0 skipped" in result.output
    found = json.loads(path.read_text())
    assert [row["status"] for row in found["rows"]] == ["ok", "failed"] and found["device"]["name"] == "stand-in"
    text = page.read_text()
    assert "<h1>fi_cupy on stand-in</h1>" in text and "<svg" in text and "ZeroDivisionError" in text
    assert ">fast</td><td>" in text


def test_peers_can_be_chosen():
    case = bench.bench_case("x", lambda s: 1.0, inputs=[1], peers={"torch": lambda s: 2.0, "cudnn": lambda s: 3.0})
    cases = [("op", case)]
    assert [list(c.peers) for _, c in bench_cli.with_peers(cases, None)] == [["torch", "cudnn"]]
    assert [list(c.peers) for _, c in bench_cli.with_peers(cases, "cudnn")] == [["cudnn"]]
    assert [list(c.peers) for _, c in bench_cli.with_peers(cases, "none")] == [[]]
    with pytest.raises(click.ClickException, match="no peer flash here; there are cudnn, torch"):
        bench_cli.with_peers(cases, "flash,torch")


def test_the_sampling_chart_reads_a_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import chart_sampling

    recorded = [{"peer": "FlashInfer", "value": 50.0}, {"peer": "torch", "value": 62.0}]
    rows = [
        {"name": "softmax 64x128256 f32", "status": "ok", "us": 26.0, "peers": {"torch": {"us": 61.0}},
         "recorded": recorded},
        {"name": "softmax 4x128256 f32", "status": "ok", "us": 5.0, "peers": {"flashinfer": {"missing": "no"}}},
        {"name": "softmax 64x32000 f32", "status": "ok", "us": 8.0},  # another vocabulary
        {"name": "softmax 64x128256 bf16", "status": "ok", "us": 17.0},
        {"name": "softmax 8x128256 f32", "status": "failed", "error": "no"},
        {"name": "rmsnorm 64x128256 f32", "status": "ok", "us": 3.0},
    ]  # fmt: skip
    assert chart_sampling.points({"rows": rows}) == {
        "softmax": {"fi_cupy": {64: 26.0, 4: 5.0}, "torch": {64: 61.0}, "FlashInfer, recorded": {64: 50.0}}
    }


def test_the_prefill_chart_reads_a_run(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import chart_prefill

    def row(name, **more):
        return {"name": name, "status": "ok", "us": 500.0, "flops": 3.5e11, "peers": {}, "recorded": []} | more

    peers = {"cudnn": {"us": 1.0, "speedup": 1.25}, "flash": {"missing": "no torch"}}
    recorded = [{"name": "ragged.fa3 b4 s4096 h32/32 d128 c", "peer": "FlashInfer", "value": 700.0}]
    rows = [
        row("ragged_prefill 4x4096 32/32 d128 causal", peers=peers, recorded=recorded),
        row("single_prefill 1x16384 32/32 d128 causal"),
        row("single_prefill 1x16384 32/32 d128 causal fa2", us=1000.0),
        row("single_prefill 1x16384 32/32 d128 causal cap"),  # another problem
        row("single_prefill 1x4096 32/32 d128 causal"),  # fewer tokens
        row("ragged_prefill 16x1024 32/8 d128 causal"),  # other heads
        {"name": "ragged_prefill 16x1024 32/32 d128 causal", "status": "failed", "error": "no"},
    ]
    live, old = chart_prefill.series({"rows": rows})
    ours = {"fi_cupy": {4096: 700.0, 16384: 700.0}, "fi_cupy, portable kernel": {16384: 350.0}}
    assert live == ours | {"cudnn": {4096: 560.0}}
    assert old == {"FlashInfer fa3, recorded": {4096: 500.0}}
