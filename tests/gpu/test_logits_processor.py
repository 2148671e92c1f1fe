"""Pipelines: one kernel that draws the CPU reference's tokens, with every combination of processors and parameters."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from fi_cupy.logits_processor import LogitsPipe, MinP, Sample, Softmax, Temperature, TensorType, TopK, TopP
from fi_cupy.testing.generators import new_stream, normal, on_gpu, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")


def parameters(rng, rows):
    return {
        "temperature": rng.choice([0.0, 0.3, 1.0, 2.5], rows).astype(rng.choice([np.float32, np.float64])),
        "top_k": rng.choice([1, 5, 50, 1500, 1 << 30], rows).astype(np.int32),
        "top_p": rng.choice([0.1, 0.5, 0.9, 0.999, 1.0], rows).astype(np.float32),
        "min_p": rng.choice([0.001, 0.1, 0.5, 1.0], rows).astype(rng.choice([np.float32, np.float64])),
        "seed": rng.integers(0, 1 << 62, rows),
    }


def device(values):
    return {name: on_gpu(v) if isinstance(v, np.ndarray) else v for name, v in values.items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(5, 130), (8, 5003), (4, 128256)])
def test_pipelines_draw_the_reference_tokens(rng, dtype, shape):
    logits = normal(rng, shape, dtype, 3.0)
    logits[0] = np.round(logits[0].astype(np.float32)).astype(logits.dtype)
    for t, k, p, m in product((False, True), repeat=4):
        steps = [*([Temperature()] * t), Softmax(), *([TopK()] * k), *([TopP()] * p), *([MinP()] * m), Sample()]
        pipe = LogitsPipe(steps)
        assert len(pipe.compiled_ops) == 1
        values = parameters(rng, shape[0])
        want = pipe(logits, **values)
        got = cupy.asnumpy(pipe(on_gpu(logits), **device(values)))
        assert (got == want).all(), (repr(pipe), values)
        scalars = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "seed": 9}
        assert (cupy.asnumpy(pipe(on_gpu(logits), **scalars)) == pipe(logits, **scalars)).all(), repr(pipe)


def test_pipelines_on_probabilities(rng):
    probs = LogitsPipe([Softmax()])(normal(rng, (8, 40000), "float32", 3.0))
    for k, p, m in product((False, True), repeat=3):
        filters = [*([TopK()] * k), *([TopP()] * p), *([MinP()] * m)]
        values = parameters(rng, 8)
        pipe = LogitsPipe([*filters, Sample()], input_type=TensorType.PROBS)
        assert (cupy.asnumpy(pipe(on_gpu(probs), **device(values))) == pipe(probs, **values)).all(), repr(pipe)
        if filters:
            rows = LogitsPipe(filters, input_type=TensorType.PROBS)
            got, want = to_float64(rows(on_gpu(probs), **device(values))), rows(probs, **values)
            assert ((got == 0) == (want == 0)).all()
            assert_close(got, want.astype(np.float64), "float32")


def test_single_steps_agree_with_the_fused_ones(rng):
    logits = on_gpu(normal(rng, (256, 3000), "float32", 3.0))
    steps = [Temperature(), TopK(), Softmax(), TopP(), MinP(), Sample()]
    values = {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "seed": 3}
    a, b = (LogitsPipe(steps, compile=c)(logits, **values) for c in (True, False))
    assert int((a != b).sum()) <= 2  # draws and thresholds within rounding


def test_a_graph_draws_fresh_tokens_from_its_pipeline(rng):
    rows, pipe = 32, LogitsPipe([Temperature(), Softmax(), TopK(), TopP(), MinP(), Sample()])
    logits = on_gpu(normal(rng, (rows, 3000), "bfloat16", 3.0))
    seed, offset = cupy.asarray(rng.integers(0, 1 << 62, rows)), cupy.zeros(1, cupy.int64)
    values = {"temperature": 0.8, "top_k": 50, "top_p": 0.9, "min_p": 0.01}
    stream, seen = new_stream(), []
    with stream:
        pipe(logits, **values, seed=seed, offset=offset)
        offset += 0  # the addition is compiled before the capture
        stream.synchronize()
        stream.begin_capture()
        tokens = pipe(logits, **values, seed=seed, offset=offset)
        offset += 4
        graph = stream.end_capture()
        for _ in range(3):
            graph.launch()
            stream.synchronize()
            seen.append(cupy.asnumpy(tokens))
    for step, got in enumerate(seen):
        want = pipe(cupy.asnumpy(logits), **values, seed=cupy.asnumpy(seed), offset=4 * step)
        assert (got == want).all()
    assert (seen[0] != seen[1]).any() and (seen[1] != seen[2]).any()
