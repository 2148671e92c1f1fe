"""Pipelines on CPU arrays: legalisation, fusion into one kernel, the same tokens as one step behind the other."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

import fi_cupy
from fi_cupy import sampling
from fi_cupy.logits_processor import (
    CompileError,
    FusionRule,
    LegalizationError,
    LogitsPipe,
    MinP,
    ParameterizedOp,
    Sample,
    Softmax,
    TaggedTensor,
    Temperature,
    TensorType,
    TopK,
    TopP,
    compile_pipeline,
    legalize_processors,
)
from fi_cupy.testing.generators import normal

PARAMETERS = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05}
AT = {"seed": 5, "offset": 4}


def names(pipe):
    return [type(op).__name__ for op in pipe.compiled_ops]


def legal_pipelines():
    for t, before, soft, after, p, m in product((False, True), repeat=6):
        if (before and after) or ((after or p or m) and not soft):
            continue
        steps = [Temperature()] * t + [TopK()] * before + [Softmax()] * soft + [TopK()] * after
        yield [*steps, *([TopP()] * p), *([MinP()] * m), Sample()]


@pytest.mark.parametrize("steps", list(legal_pipelines()), ids=lambda s: "-".join(type(x).__name__ for x in s))
def test_a_legal_pipeline_is_one_kernel_that_draws_the_same(rng, steps):
    logits = normal(rng, (400, 300), "float32", 3.0)
    fused = LogitsPipe(steps, input_type=TensorType.LOGITS)
    single = LogitsPipe(steps, compile=False, input_type=TensorType.LOGITS)
    assert len(fused.compiled_ops) == 1
    a, b = (pipe(logits, **PARAMETERS, **AT) for pipe in (fused, single))
    assert a.dtype == np.int32
    kinds = {type(step) for step in steps}
    if TopP in kinds and not kinds & {TopK, MinP}:  # fused, it draws by rejection: other tokens of the same ones
        scaled = logits / np.float32(PARAMETERS["temperature"]) if Temperature in kinds else logits
        kept = sampling.top_p_renorm_probs(sampling.softmax(scaled), PARAMETERS["top_p"])
        assert (kept[np.arange(400), a] == 0).sum() <= 2 and 0.5 < (a == b).mean() < 1
    else:
        assert (a != b).sum() <= 2  # draws and thresholds within rounding


@pytest.mark.parametrize("filters", [f for f in product((False, True), repeat=3) if any(f)])
def test_filters_of_probabilities(rng, filters):
    probs = sampling.softmax(normal(rng, (50, 300), "float32", 3.0))
    steps = [step for step, there in zip((TopK(), TopP(), MinP()), filters, strict=True) if there]
    fused, single = (LogitsPipe(steps, c, TensorType.PROBS) for c in (True, False))
    assert len(fused.compiled_ops) == 1
    a, b = fused(probs, **PARAMETERS), single(probs, **PARAMETERS)
    assert ((a > 0) != (b > 0)).sum() <= 2
    np.testing.assert_allclose(a.sum(-1), 1, rtol=1e-5)
    drawn = LogitsPipe([*steps, Sample()], input_type=TensorType.PROBS)
    assert len(drawn.compiled_ops) == 1
    tokens = drawn(probs, **PARAMETERS, **AT)
    assert (a[np.arange(50), tokens] > 0).all()


def test_orders_that_one_kernel_does_not_do(rng):
    logits = normal(rng, (300, 200), "float32", 2.0)
    steps = [Softmax(), MinP(), TopP(), Sample()]
    fused, single = LogitsPipe(steps), LogitsPipe(steps, compile=False)
    assert len(fused.compiled_ops) > 1
    probs = sampling.softmax(logits)
    after = LogitsPipe([Softmax(), MinP()])(logits, min_p=PARAMETERS["min_p"])
    tokens = fused(logits, **PARAMETERS, **AT)
    assert (tokens == sampling.top_p_sampling_from_probs(after, PARAMETERS["top_p"], **AT)).all()
    drawn = single(logits, **PARAMETERS, **AT)  # by another way to the same distribution
    kept = sampling.top_p_renorm_probs(after, PARAMETERS["top_p"])[np.arange(300)[:, None], np.c_[tokens, drawn]]
    assert (kept > 0).all()
    pipe = LogitsPipe([TopK(joint_topk_topp=True), TopP(), Sample()], input_type=TensorType.PROBS)
    want = sampling.top_k_top_p_sampling_from_probs(probs, 20, 0.8, filter_apply_order="joint", **AT)
    assert (pipe(probs, top_k=20, top_p=0.8, **AT) == want).all()
    assert names(LogitsPipe([Temperature(), Softmax()])) == ["FusedTemperatureSoftmaxOp"]


def test_parameters_of_each_row(rng):
    logits = normal(rng, (6, 500), "bfloat16", 3.0)
    t = np.array([0.0, 0.5, 1, 2, 1, 1], np.float32)
    k = np.array([1, 500, 3, 7, 1 << 30, 2], np.int32)
    pipe = LogitsPipe([Temperature(), Softmax(), TopK(), TopP(), MinP(), Sample()])
    seeds = np.arange(6, dtype=np.int64)
    parameters = {"temperature": t, "top_k": k, "top_p": np.full(6, 0.9, np.float32), "min_p": np.full(6, 0.1)}
    tokens = pipe(logits, **parameters, seed=seeds)
    for i in range(6):
        own = {name: value[i : i + 1] for name, value in parameters.items()}
        assert pipe(logits[i : i + 1], **own, seed=seeds[i : i + 1])[0] == tokens[i]
    assert LogitsPipe([Temperature()])(logits, temperature=t[1:] + 1 if len(t) == 5 else t + 1).dtype == logits.dtype
    indices = np.array([5, 5, 0], np.int64)
    assert LogitsPipe([Softmax(), Sample()])(logits, indices=indices, seed=1).dtype == np.int64
    wide = logits.astype(np.float32)
    drawn = LogitsPipe([Softmax(), TopK(top_k=1), Sample()])(logits)  # one of the largest, which may be ties
    assert (wide[np.arange(6), drawn] == wide.max(-1)).all()


def test_temperature_is_division_of_the_logits(rng):
    logits = normal(rng, (64, 700), "float32", 3.0)
    inverse = np.float32(1 / 0.7)
    tokens = LogitsPipe([Temperature(), Softmax(), Sample()])(logits, temperature=0.7, **AT)
    assert (tokens == sampling.sampling_from_logits(logits * inverse, **AT)).all()


def test_custom_processors_rules_and_checks(rng):
    class Halve(ParameterizedOp):
        IN = OUT = TensorType.LOGITS

        def __call__(self, tensor, **kwargs):
            return TaggedTensor(tensor.data * np.float32(0.5), self._validate_input_type(tensor))

    class Half(fi_cupy.logits_processor.LogitsProcessor):
        def legalize(self, input_type):
            return [Halve()]

    logits = normal(rng, (4, 50), "float32")
    pipe = LogitsPipe([Half(), Half(), Softmax()], input_type=TensorType.LOGITS)
    np.testing.assert_allclose(pipe(logits, anything=3), sampling.softmax(logits * np.float32(0.25)), rtol=1e-6)
    rule = FusionRule((Halve, Halve), lambda window: True, lambda window: Halve(), 50)
    assert names(LogitsPipe([Half(), Half()], True, TensorType.LOGITS, [rule])) == ["Halve"]

    def never(ops):
        raise CompileError("not today")

    with pytest.raises(ValueError, match="not today"):
        LogitsPipe([Softmax()], custom_validity_checks=[never])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: LogitsPipe([]), "Pipeline cannot be empty"),
        (lambda: LogitsPipe([TopK(), Sample()]), "Cannot infer input type: TopK can accept both LOGITS and PROBS"),
        (lambda: LogitsPipe([Softmax(), Softmax()]), "Failed to legalize processor 1"),
        (lambda: LogitsPipe([TopP(), Temperature()]), "Temperature can only be applied to LOGITS, got PROBS"),
        (lambda: LogitsPipe([Softmax(), Sample(), TopK()]), "TopK cannot be applied to INDICES"),
        (lambda: LogitsPipe([Temperature()])(np.ones((1, 2), np.float32)), "'temperature' not provided"),
        (
            lambda: LogitsPipe([Temperature(), Softmax()])(np.ones((1, 2), np.float32), temperature=-1.0),
            "Temperature must be positive float",
        ),
        (lambda: LogitsPipe([Softmax()])(np.ones((1, 2), np.float32), top_q=1), "got 'top_q', expected parameters"),
        (lambda: compile_pipeline([]), "Cannot compile empty"),
    ],
)
def test_error_texts(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_other_errors_stay_what_they_are(monkeypatch):
    from fi_cupy.errors import CompileError as NvrtcError

    def broken(*args, **kwargs):
        raise NvrtcError("no such header")

    pipe = LogitsPipe([Softmax()])
    monkeypatch.setattr(sampling, "softmax", broken)
    with pytest.raises(NvrtcError, match="no such header"):
        pipe(np.ones((1, 2), np.float32))


def test_tags_and_legalisation():
    ops = legalize_processors([Temperature(), TopK(), Softmax()])
    assert [str(op) for op in ops][1] == "LogitsTopKOp(LOGITS -> LOGITS)"
    with pytest.raises(LegalizationError):
        legalize_processors([TopP()])
    tagged = TaggedTensor.probs(np.ones((2, 3), np.float32))
    assert tagged.shape == (2, 3) and tagged.size(1) == 3 and tagged.type is TensorType.PROBS
    with pytest.raises(ValueError, match="cannot accept input type PROBS"):
        LogitsPipe([Softmax()])(tagged)
    assert repr(LogitsPipe([Softmax(), Sample()])) == (
        "LogitsPipe([Softmax -> Sample], ops=[SoftmaxOp -> ProbsSampleOp], compiled_ops=[FusedLogitsSampleOp])"
    )
