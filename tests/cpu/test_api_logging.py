"""The log of calls: levels, what comes before a crash, files and the calls made again from them."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
from kernel_jobs import run_python

from fi_cupy import api_logging, errors
from fi_cupy.api_dump import Dumper, dumps_of, encode, replay_from_dump, replay_sequence

CALLS = """
import numpy as np, fi_cupy
from fi_cupy import decode, norm
x, r = np.ones((2, 8), np.float32), np.full((2, 8), 2, np.float32)
fi_cupy.rmsnorm(x, x[0])
norm.fused_add_rmsnorm(x, r, np.ones(8, np.float32))
w = decode.BatchDecodeWithPagedKVCacheWrapper(np.empty(1 << 20, np.uint8), "NHD")
w.plan(np.int32([0, 2]), np.int32([4, 1]), np.int32([7]), 8, 2, 64, 16, q_data_type=np.float32)
kv = np.random.default_rng(0).standard_normal((6, 2, 16, 2, 64), np.float32)
out, lse = w.run_return_lse(np.ones((1, 16, 64), np.float32)[:, ::2], kv)
tokens = fi_cupy.top_k_sampling_from_probs(np.full((3, 5), 0.2, np.float32), np.array([2, 5, 1]), seed=3)
"""


def run(code=CALLS, **environment):
    """The log of a program of its own: the level counts when fi_cupy is imported."""
    return run_python(code, **environment)


def test_without_a_level_nothing_is_wrapped():
    code = (
        CALLS + "print(hasattr(fi_cupy.rmsnorm, '_fi_cupy_logged'), 'fi_cupy.api_logging' in __import__('sys').modules)"
    )
    assert run(code).split() == ["False", "False"]

    def double(x):
        return 2 * x

    assert api_logging.flashinfer_api(double) is double and api_logging.flashinfer_api()(double) is double
    assert api_logging.flush_graph_dumps() == 0
    with pytest.raises(errors.UnsupportedError, match="trace"):
        api_logging.flashinfer_api(double, trace=object())


def test_names_and_arguments():
    lines = run(FLASHINFER_LOGLEVEL="1").splitlines()
    said = [line.split("] call ")[1] for line in lines]
    assert said == [
        "rmsnorm", "fused_add_rmsnorm", "BatchDecodeWithPagedKVCacheWrapper.__init__ (object 1)",
        "BatchDecodeWithPagedKVCacheWrapper.plan (object 1)",
        "BatchDecodeWithPagedKVCacheWrapper.run_return_lse (object 1)", "top_k_sampling_from_probs",
    ]  # fmt: skip
    text = run(FI_CUPY_LOGLEVEL="3")
    assert "[0] = numpy float32[2, 8] strides [8, 1] on cpu\n" in text and "seed = 3" in text
    assert "run_return_lse (object 1) -> tuple(numpy float32[1, 8, 64]" in text and " min " not in text
    assert "min 1 max 1 mean 1, 0 nan, 0 inf" in run(FI_CUPY_LOGLEVEL="5")


def test_an_error_and_a_crash_are_behind_their_call(tmp_path):
    code = "import numpy as np, fi_cupy\ntry: fi_cupy.rmsnorm(np.ones((2, 8)), np.ones(8))\nexcept ValueError: pass"
    assert "rmsnorm raised DTypeError: rmsnorm: input has dtype float64" in run(code, FI_CUPY_LOGLEVEL="1")
    crash = (
        "import os, numpy as np, fi_cupy\nfrom fi_cupy import reference\n"
        "reference.norm.rmsnorm = lambda *a, **k: os._exit(0)\n"
        "fi_cupy.rmsnorm(np.ones((2, 8), np.float32), np.ones(8, np.float32))"
    )
    log = tmp_path / "log-%i.txt"
    run(crash, FI_CUPY_LOGLEVEL="10", FI_CUPY_LOGDEST=str(log), FI_CUPY_DUMP_DIR=str(tmp_path / "dumps"))
    (written,) = tmp_path.glob("log-*.txt")
    assert "call rmsnorm" in written.read_text() and "->" not in written.read_text().split("call rmsnorm")[1]
    (folder,) = dumps_of(tmp_path / "dumps")
    assert json.loads((folder / "call.json").read_text())["state"] == "inputs"
    found = replay_from_dump(folder, compare_outputs=True, device="cpu", run=True)
    assert found["execution_result"].shape == (2, 8) and not found["comparison_match"]  # there was no result


def test_calls_are_made_again(tmp_path):
    root = tmp_path / "dumps"
    run(FI_CUPY_LOGLEVEL="10", FI_CUPY_LOGDEST=os.devnull, FI_CUPY_DUMP_DIR=str(root))
    results = replay_sequence(root, "cpu")
    assert len(results) == 6 and all(found["comparison_match"] for found in results), results
    by_name = {found["metadata"]["function"]: found for found in results}
    # What is changed in place is part of the result; the workspace's values are not kept, strides are.
    assert any(name.startswith("after.") for name in by_name["fused_add_rmsnorm"]["expected_tensors"])
    assert by_name["BatchDecodeWithPagedKVCacheWrapper.run_return_lse"]["args"][0].strides == (4096, 512, 4)
    assert sum(path.stat().st_size for path in root.rglob("*.npz")) < 1 << 19
    # A result that differs is found.
    folder = next(f for f in dumps_of(root) if f.name.endswith("rmsnorm"))
    kept = dict(np.load(folder / "outputs.npz"))
    last_bits = {name: x ^ (np.arange(x.size) % 4 == 0).astype(np.uint8) for name, x in kept.items()}
    np.savez(folder / "outputs.npz", **last_bits)
    assert replay_from_dump(folder, True, "cpu", True)["comparison_match"]
    np.savez(folder / "outputs.npz", **{name: np.full_like(x, 64) for name, x in kept.items()})
    assert not replay_from_dump(folder, True, "cpu", True)["comparison_match"]
    method = next(f for f in dumps_of(root) if f.name.endswith(".plan"))
    with pytest.raises(errors.ArgumentError, match="replay_sequence makes its object first"):
        replay_from_dump(method, device="cpu", run=True)
    assert "execution_result" not in replay_from_dump(method, device="cpu")
    with pytest.raises(errors.CacheError, match="holds no call"):
        replay_from_dump(tmp_path, device="cpu")


def test_limits_and_filters(tmp_path, monkeypatch):
    monkeypatch.setenv("FI_CUPY_DUMP_DIR", str(tmp_path))
    monkeypatch.setenv("FI_CUPY_DUMP_INCLUDE", "*decode*, rmsnorm")
    monkeypatch.setenv("FLASHINFER_DUMP_EXCLUDE", "*.plan")
    monkeypatch.setenv("FI_CUPY_DUMP_MAX_COUNT", "1")
    dumper = Dumper()
    assert [dumper.wants(n) for n in ("rmsnorm", "Batchdecode.run", "Batchdecode.plan", "softmax")] == [
        True, True, False, False
    ]  # fmt: skip
    assert not dumper.full
    arrays: dict[str, object] = {}
    tree = {"args": [encode(np.ones(4, np.float16), arrays, "0.x")], "kwargs": {}}
    dumper.begin("rmsnorm", "fi_cupy.norm", tree, arrays, False)
    assert dumper.full and dumper.bytes == 8
    monkeypatch.setenv("FI_CUPY_DUMP_MAX_COUNT", "many")
    with pytest.raises(errors.ArgumentError, match="FI_CUPY_DUMP_MAX_COUNT is 'many'"):
        Dumper()
    monkeypatch.setenv("FI_CUPY_LOGLEVEL", "loud")
    with pytest.raises(errors.ArgumentError, match="FI_CUPY_LOGLEVEL is 'loud'"):
        api_logging.log_level()


def test_what_cannot_be_written(tmp_path):
    """The program goes on without its files; a log without a place is an error that names the variable."""
    (tmp_path / "file").touch()
    text = run(CALLS + "print('end')", FI_CUPY_LOGLEVEL="10", FI_CUPY_DUMP_DIR=str(tmp_path / "file" / "dumps"))
    assert text.count("no more calls are written") == 1 and "Not a directory" in text and text.endswith("end\n")
    code = """
import os
from fi_cupy import api_logging, errors
os.environ["FI_CUPY_LOGLEVEL"] = "1"
try:
    api_logging.install()
except errors.ArgumentError as error:
    print(error)
"""
    text = run(code, FI_CUPY_LOGDEST=str(tmp_path / "no" / "log"))
    assert "FI_CUPY_LOGDEST" in text and "cannot be written" in text


def test_captured_calls_wait_for_the_flush(tmp_path, monkeypatch):
    monkeypatch.setenv("FI_CUPY_DUMP_DIR", str(tmp_path))
    dumper, arrays = Dumper(), {}
    x, y = np.zeros(4, np.float32), np.zeros(4, np.float32)
    tree = {"args": [encode(x, arrays, "0.input"), encode(y, arrays, "1.weight")], "kwargs": {}}
    folder = dumper.begin("rmsnorm", "fi_cupy.norm", tree, arrays, capturing=True)
    dumper.end(folder, x, arrays, capturing=True)
    assert not list(tmp_path.rglob("*.npz"))
    for value in (1, 2):  # two replays
        x[:] = value
        assert dumper.flush() == 2
    first, second = np.load(folder / "inputs.npz"), np.load(next((tmp_path / "graph_flushes").rglob("inputs.npz")))
    assert first["0.input"].view(np.float32).tolist() == [1] * 4
    assert second["0.input"].view(np.float32).tolist() == [2] * 4


def test_what_is_not_kept(tmp_path):
    arrays: dict[str, object] = {}
    tree = encode({"a": [1, None, "x", np.float32(2)], "b": (np.int8, object())}, arrays, "x")
    assert tree["mapping"]["a"] == [1, None, "x", 2.0] and tree["mapping"]["b"]["tuple"][0] == {"dtype": "int8"}
    (tmp_path / "call.json").write_text(json.dumps({"args": [tree], "kwargs": {}}))
    with pytest.raises(errors.ArgumentError, match=r"an argument was a builtins\.object, which is not kept"):
        replay_from_dump(tmp_path, device="cpu")
