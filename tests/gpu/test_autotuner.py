"""Real tuning of small products: right values from every candidate, choices that steer, files between processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fi_cupy import autotuner as at
from fi_cupy.arrays import view
from fi_cupy.decode import BatchDecodeWithPagedKVCacheWrapper
from fi_cupy.decode_kernel import geometries
from fi_cupy.decode_tuning import DECODE, decode_problem
from fi_cupy.device import device_info
from fi_cupy.dtypes import bfloat16, dtype, float16
from fi_cupy.gemm import bmm_bf16, mm_bf16
from fi_cupy.gemm.dense import _multiply
from fi_cupy.gemm.tuning import MmProblem, choose_mm_kernel, mm_candidates
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close
from fi_cupy.tuning import choice, file

cupy = pytest.importorskip("cupy")


@pytest.fixture
def tuner(monkeypatch, tmp_path):
    """A tuner that knows nothing, and no file that it would read."""
    monkeypatch.setenv("FI_CUPY_AUTOTUNE_DIR", str(tmp_path / "tuned"))
    made = at.AutoTuner()
    monkeypatch.setattr(at.AutoTuner, "_instance", made)
    choice.forget()
    yield made
    choice.forget()


@pytest.mark.parametrize("kind", [bfloat16, float16], ids=lambda d: d.name)
@pytest.mark.parametrize("row_major", [False, True])
@pytest.mark.parametrize(
    "mnk", [(1, 264, 2056), (3, 136, 576), (16, 72, 1544), (50, 264, 328), (200, 136, 72)], ids=str
)
def test_every_candidate_is_right(rng, mnk, row_major, kind):
    m, n, k = mnk
    a, w = normal(rng, (m, k), kind), normal(rng, (n, k), kind)
    expected = a.astype(np.float64) @ w.astype(np.float64).T
    problem = MmProblem(m, n, k, device_info(0), kind, kind, row_major)
    x = view(on_gpu(a))
    b = view(on_gpu(np.ascontiguousarray(w.T)) if row_major else on_gpu(w).T)
    candidates = mm_candidates(problem)
    assert len(candidates) >= 4
    for candidate in candidates:
        out = poisoned((m, n), kind.name)
        _multiply("mm_bf16", x, b, None, None, view(out), row_major, False, False, chosen=candidate.launch(problem))
        assert_close(to_float64(out), expected, kind.name, "product", candidate.spec.symbol)


def test_tuning_steers_the_product(rng, tuner, tmp_path):
    m, n, k = 13, 1024, 2048
    a, w = normal(rng, (m, k)), normal(rng, (n, k))
    expected = a.astype(np.float64) @ w.astype(np.float64).T
    a, w = on_gpu(a), on_gpu(w)
    path = tmp_path / "choices.json"
    with at.autotune(cache=path, tuning_buckets=[4, 16], round_up=True):
        assert_close(to_float64(mm_bf16(a, w.T)), expected, "bfloat16", "product", "inside")
        problem = (m, n, k, device_info(0), bfloat16, bfloat16, False, 1, False)
        spec, _ = choose_mm_kernel("mm_bf16", problem)
    choices = tuner.choices()
    assert len(choices) == 2
    for entry in choices.values():
        assert 0.5 < entry.us <= 1.011 * entry.fallback_us < 100
        assert [us for _, _, us in entry.ranking[1:]] == sorted(us for _, _, us in entry.ranking[1:])
    assert not tuner.stats.failed_profiling_count
    entry = next(e for key, e in choices.items() if "(16, 2048)" in key)
    assert spec.symbol == entry.tactic
    # The operator's own buckets hold 16, too: the choice counts outside. Every ranked tactic gives the right product.
    document = json.loads(path.read_text())
    for runner, tactic, _ in entry.ranking:
        (key,) = [k for k in document["sections"][0]["choices"] if "(16, 2048)" in k]
        document["sections"][0]["choices"][key].update(runner=runner, tactic=tactic)
        path.write_text(json.dumps(document))
        tuner.clear_cache()
        assert tuner.load_configs(path)
        assert choose_mm_kernel("mm_bf16", problem)[0].symbol == tactic
        out = poisoned((m, n), "bfloat16")
        mm_bf16(a, w.T, out=out)
        assert_close(to_float64(out), expected, "bfloat16", "product", tactic)


_READER = """
import cupy, ml_dtypes
from fi_cupy.device import device_info
from fi_cupy.dtypes import bfloat16
from fi_cupy.gemm.tuning import choose_mm_kernel
print(choose_mm_kernel("mm_bf16", (5, 512, 1024, device_info(0), bfloat16, bfloat16, False, 1, False))[0].symbol)
"""


def test_another_process_reads_the_default_file(rng, tuner, tmp_path):
    a, w = on_gpu(normal(rng, (5, 1024))), on_gpu(normal(rng, (512, 1024)))
    with at.autotune(cache=at.default_file()):
        mm_bf16(a, w.T)
    slowest = max(tuner.choices().values(), key=lambda e: len(e.ranking)).ranking[-1][1]
    document = json.loads(at.default_file().read_text())
    for entry in document["sections"][0]["choices"].values():
        entry["tactic"] = slowest if not slowest.startswith("gemm_rows") else entry["tactic"]
    at.default_file().write_text(json.dumps(document))
    (wanted,) = {e["tactic"] for k, e in document["sections"][0]["choices"].items() if "((8, 1024)" in k}
    done = subprocess.run([sys.executable, "-c", _READER], capture_output=True, text=True, env=dict(os.environ))
    assert done.stdout.strip() == wanted, done.stderr


def test_batched_and_other_frameworks(rng, tuner):
    a, b = normal(rng, (3, 40, 64)), normal(rng, (3, 72, 64))
    with at.autotune(tuning_buckets=[40]):
        out = bmm_bf16(on_gpu(a), on_gpu(b).swapaxes(1, 2))
    expected = a.astype(np.float64) @ b.astype(np.float64).swapaxes(1, 2)
    assert_close(to_float64(out), expected, "bfloat16", "product", "batched")
    (key,) = tuner.choices()
    assert key.startswith("('bmm_bf16', ((3, 40, 64), (3, 72, 64), (3, -1, 72))")
    torch = pytest.importorskip("torch")
    x = torch.randn(40, 64, device="cuda", dtype=torch.bfloat16)
    with at.autotune(tuning_buckets=[40]):
        y = mm_bf16(x, torch.as_tensor(on_gpu(b[0]).view("uint16").get().view("int16")).cuda().view(torch.bfloat16).T)
    assert torch.isfinite(y).all()
    assert len(tuner.choices()) == 2


def test_no_measurement_inside_a_capture(rng, tuner):
    a, w = on_gpu(normal(rng, (16, 256))), on_gpu(normal(rng, (64, 256)))
    out = poisoned((16, 64), "bfloat16")
    mm_bf16(a, w.T, out=out)
    expected = to_float64(out)
    out[...] = float("nan")
    stream = new_stream()
    with at.autotune(), stream:
        stream.begin_capture()
        mm_bf16(a, w.T, out=out)
        graph = stream.end_capture()
    assert not tuner.choices()
    graph.launch(stream)
    stream.synchronize()
    assert (to_float64(out) == expected).all()


def test_a_runner_of_torchs(tuner):
    torch = pytest.importorskip("torch")

    class Chunks(at.TunableRunner):
        """A product in as many pieces as the tactic says: more pieces are slower."""

        def get_valid_tactics(self, inputs, profile):
            return [64, 1]

        def forward(self, inputs, tactic=-1, do_preparation=False):
            a, b, out = inputs
            for rows in range(0, len(a), len(a) // abs(tactic)):
                piece = slice(rows, rows + len(a) // abs(tactic))
                torch.mm(a[piece], b, out=out[piece])
            return out

    runner = Chunks()
    inputs = [torch.randn(256, 256, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    config = at.TuningConfig(
        dynamic_tensor_specs=(at.DynamicTensorSpec((0, 2), (0, 0), (256, 512), at.make_bucket_mapper((256, 512))),)
    )
    with at.autotune():
        assert tuner.choose_one("chunks", [runner], config, inputs) == (runner, 1)
    assert tuner.rank_tactics("chunks", [runner], config, inputs, 2) == [1, 64]
    torch.cuda.synchronize()


@pytest.mark.parametrize("kv", ["bfloat16", "float8_e4m3fn"])
def test_decode_candidates_are_right_and_steer(rng, tuner, kv):
    """Every kernel that the tuner may choose gives the default's output; a choice is what a plan launches."""
    batch, heads, kv_heads, dim, page = 6, 32, 8, 128, 16
    lens = np.array([1, 16, 100, 300, 513, 777])
    indptr = np.concatenate([[0], np.cumsum(-(-lens // page))]).astype(np.int32)
    indices = rng.permutation(indptr[-1]).astype(np.int32)
    plan = (indptr, indices, ((lens - 1) % page + 1).astype(np.int32), heads, kv_heads, dim, page)
    cache = on_gpu(normal(rng, (int(indptr[-1]), 2, page, kv_heads, dim), kv))
    q = on_gpu(normal(rng, (batch, heads, dim)))

    def run() -> tuple[np.ndarray, str]:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(cupy.empty((32 << 20,), cupy.uint8))
        wrapper.plan(*plan, q_data_type="bfloat16", kv_data_type=kv)
        out = poisoned((batch, heads, dim), "bfloat16")
        wrapper.run(q, cache, out=out)
        return to_float64(out), wrapper._planned.geometry.spec.symbol

    expected, default = run()
    device = device_info(0)
    problem = decode_problem(batch, heads, kv_heads, dim, bfloat16, dtype(kv))
    candidates = geometries(problem, device)
    assert next(iter(candidates)) == default
    assert len(candidates) >= 5
    key = str(("batch_decode", DECODE.config.nearest_shapes(tuple(s.shape for s in DECODE.inputs((problem, device)))),
               DECODE.runner((problem, device)).get_cache_key_extras(())))  # fmt: skip
    for symbol in candidates:
        tuner._tables = {file.environment(device): {key: file.Entry("DecodeRunner", symbol, 1.0, 1.0)}}
        choice.forget()
        found, launched = run()
        assert launched == symbol
        assert_close(found, expected, "bfloat16", "product", symbol)
    tuner.clear_cache()
    with at.autotune(tuning_buckets=[8], round_up=True):
        found, launched = run()
    assert_close(found, expected, "bfloat16", "product", launched)
    (entry,) = tuner.choices().values()
    assert launched == entry.tactic
    assert 1 < entry.us <= 1.011 * entry.fallback_us
