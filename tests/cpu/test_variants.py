"""Attention variants on NumPy arrays against formulas written out here, their CUDA text, and their errors."""

from __future__ import annotations

import re
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import fi_cupy
from fi_cupy.arrays import view
from fi_cupy.errors import ArgumentError, CompileError, DTypeError, ShapeError, TracingError, UnsupportedError
from fi_cupy.jit import ops
from fi_cupy.variants import AttentionVariant

define = fi_cupy.jit.define_variant


def _inputs(qo_len=11, kv_len=19, heads=6, kv_heads=2, dim=32, seed=0):
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(qo_len, heads, dim)).astype(np.float32)
    k, v = (rng.normal(size=(kv_len, kv_heads, dim)).astype(np.float32) for _ in range(2))
    return q, k, v


def _naive(q, k, v, score=lambda s, i, j, h: s, seen=lambda i, j, h: True, softmax=True):
    """Loops over every element, in float64."""
    qo_len, heads, dim = q.shape
    kv_len, kv_heads, _ = k.shape
    out = np.zeros((qo_len, heads, v.shape[2]))
    for h in range(heads):
        g = h // (heads // kv_heads)
        for i in range(qo_len):
            s = [score(float(q[i, h].astype(float) @ k[j, g].astype(float)) / dim**0.5, i, j, h) for j in range(kv_len)]
            keep = np.array([bool(seen(i, j, h)) for j in range(kv_len)])
            if softmax:
                p = np.where(keep, np.exp(np.array(s) - max(s)), 0)
                p = p / p.sum() if p.sum() else p
            else:
                p = np.where(keep, s, 0)
            out[i, h] = p @ v[:, g].astype(float)
    return out


def _close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=2e-4, atol=2e-5)


def test_soft_cap_is_the_built_in_option():
    q, k, v = _inputs()
    variant = define(name="cap", score_fn=lambda s, ctx: ctx.cap * ops.tanh(s / ctx.cap), scalars=["cap"])
    out, lse = fi_cupy.jit.compile(variant).run(q, k, v, cap=2.0, return_lse=True)
    wanted, wanted_lse = fi_cupy.prefill.single_prefill_with_kv_cache(q, k, v, logits_soft_cap=2.0, return_lse=True)
    _close(out, wanted)
    _close(lse, wanted_lse)


def test_alibi_with_slopes_as_a_tensor():
    q, k, v = _inputs(heads=8)
    slopes = np.asarray(fi_cupy.reference.attention.get_alibi_slopes(8))
    variant = define(
        name="alibi", mask_mode="causal", tensors=["slopes"],
        score_fn=lambda s, ctx: s + ctx.slopes[ctx.qo_head] * (ctx.kv_idx - ctx.qo_idx),
    )  # fmt: skip
    out = fi_cupy.jit.compile(variant).run(q, k, v, slopes)
    _close(out, fi_cupy.prefill.single_prefill_with_kv_cache(q, k, v, causal=True, pos_encoding_mode="ALIBI"))


def test_relative_bias_and_window():
    q, k, v = _inputs()
    bias = np.random.default_rng(3).normal(size=(6, 64)).astype(np.float32)
    variant = define(
        name="relative", tensors={"bias": "float32"}, scalars={"width": 4},
        score_fn=lambda s, ctx: s + ctx.bias[ctx.qo_head, ctx.kv_idx - ctx.qo_idx + 16],
        mask_fn=lambda ctx: abs(ctx.qo_idx - ctx.kv_idx) <= ctx.width,
    )  # fmt: skip
    kernel = fi_cupy.jit.compile(variant)
    for width in (4, 7):
        out = kernel.run(q, k, v, bias=bias, width=width)
        wanted = _naive(
            q, k, v, lambda s, i, j, h: s + bias[h, j - i + 16], lambda i, j, h, w=width: abs(i - j) <= w
        )  # fmt: skip
        _close(out, wanted)
    _close(kernel.run(q, k, v, bias), kernel.run(q, k, v, bias=bias, width=4))


def test_document_mask_with_integers():
    q, k, v = _inputs(qo_len=19)
    ids = np.repeat(np.arange(5), 4)[:19].astype(np.int32)
    variant = define(
        name="document", mask_mode="causal", tensors={"ids": np.int32},
        mask_fn=lambda ctx: ctx.ids[ctx.qo_idx] == ctx.ids[ctx.kv_idx],
    )  # fmt: skip
    out = fi_cupy.jit.compile(variant).run(q, k, v, ids=ids)
    _close(out, _naive(q, k, v, seen=lambda i, j, h: ids[i] == ids[j] and j <= i))


def test_sigmoid_without_softmax():
    q, k, v = _inputs()
    variant = define(
        name="sigmoid", use_softmax=False, scalars={"bias": -0.5}, score_fn=lambda s, ctx: ops.sigmoid(s + ctx.bias),
        mask_fn=lambda ctx: ctx.kv_idx != 3,
    )  # fmt: skip
    kernel = fi_cupy.jit.compile(variant)
    wanted = _naive(
        q, k, v, lambda s, i, j, h: 1 / (1 + np.exp(0.5 - s)), lambda i, j, h: j != 3, softmax=False
    )  # fmt: skip
    _close(kernel.run(q, k, v), wanted)
    with pytest.raises(ArgumentError, match="no lse"):
        kernel.run(q, k, v, return_lse=True)


def test_element_functions():
    q, k, v = _inputs()
    gain = np.linspace(0.5, 1.5, 32).astype(np.float32)
    variant = define(
        name="elements", tensors=["gain"],
        query_fn=lambda q, ctx: q * ctx.gain[ctx.dim_idx] * (ctx.qo_head + 1),
        key_fn=lambda k, ctx: ops.where(ctx.kv_idx % 2 == 0, k, -k) * (ctx.kv_head + 1),
        post_process_fn=lambda out, ctx: ops.silu(out) + ctx.qo_idx,
    )  # fmt: skip
    out = fi_cupy.jit.compile(variant).run(q, k, v, gain)
    changed_q = q * gain * (np.arange(6)[None, :, None] + 1)
    changed_k = k * np.where(np.arange(19) % 2 == 0, 1, -1)[:, None, None] * (np.arange(2)[None, :, None] + 1)
    wanted = _naive(changed_q.astype(np.float32), changed_k.astype(np.float32), v)
    wanted = wanted / (1 + np.exp(-wanted)) + np.arange(11)[:, None, None]
    np.testing.assert_allclose(out, wanted, rtol=1e-3, atol=1e-4)


def test_custom_mask_and_options_combine():
    q, k, v = _inputs()
    mask = np.random.default_rng(5).random((11, 19)) < 0.6
    variant = define(name="even", mask_mode="custom", mask_fn=lambda ctx: ctx.kv_idx % 2 == 0)
    kernel = fi_cupy.jit.compile(variant)
    out = kernel.run(q, k, v, custom_mask=mask, window_left=6)
    wanted = _naive(q, k, v, seen=lambda i, j, h: mask[i, j] and j % 2 == 0 and j + 6 >= i + 8)
    _close(out, wanted)
    with pytest.raises(ArgumentError, match="no custom_mask"):
        kernel.run(q, k, v)
    with pytest.raises(ArgumentError, match="a custom_mask"):
        fi_cupy.jit.compile(define(name="plain")).run(q, k, v, custom_mask=mask)


def test_indices_beyond_an_array_are_clamped():
    q, k, v = _inputs()
    bias = np.arange(3, dtype=np.float32)
    variant = define(name="clamped", tensors=["bias"], score_fn=lambda s, ctx: s + ctx.bias[ctx.kv_idx - 8])
    wanted = _naive(q, k, v, lambda s, i, j, h: s + bias[min(max(j - 8, 0), 2)])
    _close(fi_cupy.jit.compile(variant).run(q, k, v, bias), wanted)


def test_torch_arrays_and_bfloat16():
    torch = pytest.importorskip("torch")
    q, k, v = _inputs()
    variant = define(name="table", tensors={"bias": "bfloat16"}, score_fn=lambda s, ctx: s * ctx.bias[ctx.qo_head])
    bias = np.linspace(0.5, 2, 6).astype(ml_dtypes.bfloat16)
    wanted = _naive(q, k, v, lambda s, i, j, h: s * float(bias[h]))
    kernel = fi_cupy.jit.compile(variant)
    _close(kernel.run(q, k, v, bias), wanted)
    out = kernel.run(*map(torch.from_numpy, (q, k, v)), torch.from_numpy(bias.astype(np.float32)).to(torch.bfloat16))
    assert isinstance(out, torch.Tensor)
    _close(out.numpy(), wanted)


def test_hnd_layout():
    q, k, v = _inputs()
    kernel = fi_cupy.jit.compile(define(name="half", score_fn=lambda s, ctx: s / 2))
    out = kernel.run(q, k.swapaxes(0, 1).copy(), v.swapaxes(0, 1).copy(), kv_layout="HND")
    _close(out, kernel.run(q, k, v))


def test_the_same_definition_is_equal_and_compiles_once():
    def score(s, ctx):
        return s * 2

    a, b = (define(name="twice", score_fn=score, tensors={"x": "int32"}) for _ in range(2))
    assert a == b and hash(a) == hash(b) and a.lowered() is b.lowered()
    assert isinstance(a, AttentionVariant)
    with pytest.raises(AttributeError):
        a.name = "other"
    # Another function object with the same meaning gives the same text, which is the key of the compiled kernel.
    pairs = (lambda s, ctx: s * 2, lambda x, c: x * 2.0)
    first, second = (define(name="twice", score_fn=f) for f in pairs)
    assert first != second and first.lowered() == second.lowered()


def test_generated_source():
    variant = define(
        name="shown", tensors={"bias": "float16"}, scalars={"cap": 30.0, "width": 4},
        score_fn=lambda s, ctx: ctx.cap * ops.tanh(s / ctx.cap) + ctx.bias[ctx.qo_head, ctx.kv_idx],
        mask_fn=lambda ctx: ctx.qo_idx - ctx.kv_idx < ctx.width,
    )  # fmt: skip
    source = fi_cupy.jit.compile(variant).source
    assert "TensorRef<__half, 2> bias;" in source and "float cap;" in source and "int width;" in source
    assert "rcp_exp2_plus_1(qk * ((scale * params.user.cap_rcp) * (2.f * math::log2e)), unit)" in source
    assert "params.user.bias(ctx.qo_head, ctx.kv_idx)" in source
    assert "kHasMask = true" in source and "kHasQuery = false" in source and "kUseSoftmax = true" in source


def test_kernel_values_follow_the_struct():
    variant = define(
        name="packed", tensors=["a", "b"], scalars={"n": 3, "x": "float32"},
        score_fn=lambda s, ctx: s + ctx.a[ctx.qo_idx, ctx.kv_idx] + ctx.b[0] * ctx.n + ctx.x,
    )  # fmt: skip
    a, b = np.zeros((4, 6), np.float32)[:, ::2], np.zeros(7, np.float32)
    bound = variant.bind("op", (a, b), {"x": 0.5}, view(a))
    assert bound.kernel_values() == (0, 6, 2, 4, 3, 0, 1, 7, 3, 0.5)
    kinds = [kind for _, kind in variant.lowered().fields()]
    assert kinds == ["ptr", *["i64"] * 4, "ptr", *["i64"] * 2, "i32", "f32"]


def test_cuda_text_runs_on_gpus_only():
    q, k, v = _inputs()
    variant = define(name="text", score_fn="score * 2.f")
    with pytest.raises(UnsupportedError, match="score_fn is CUDA text"):
        fi_cupy.jit.compile(variant).run(q, k, v)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"name": "two words"}, "identifier"), ({"name": ""}, "identifier"), ({"mask_mode": "diagonal"}, "'diagonal'"),
     ({"score_fn": 3}, "score_fn is 3"), ({"score_fn": "  "}, "empty text"),
     ({"tensors": ["kv_idx"]}, "kv_idx has a meaning"),
     ({"tensors": ["a"], "scalars": ["a"]}, "declared twice"), ({"tensors": ["a b"]}, "'a b'"),
     ({"scalars": ["return_lse"]}, "return_lse"), ({"scalars": ["float"]}, "'float'")],
)  # fmt: skip
def test_definition_errors(options, text):
    with pytest.raises(ArgumentError, match=text):
        define(**{"name": "x", **options})


@pytest.mark.parametrize(
    "options", [{"tensors": {"a": "float64"}}, {"tensors": {"a": "what"}}, {"scalars": {"a": "int64"}}]
)
def test_definition_dtype_errors(options):
    with pytest.raises(DTypeError):
        define(name="x", **options)


def test_tracing_errors_appear_at_the_definition():
    with pytest.raises(TracingError, match=r"variant branch: score_fn: .*test_variants\.py:\d+: .*ops\.where"):
        define(name="branch", score_fn=lambda s, ctx: s if s > 0 else 0)
    with pytest.raises(CompileError, match=r"ctx\.bais is unknown"):
        define(name="typo", tensors=["bias"], score_fn=lambda s, ctx: s + ctx.bais[ctx.kv_idx])
    with pytest.raises(TracingError, match="expected a condition"):
        define(name="mask", mask_fn=lambda ctx: ctx.kv_idx - ctx.qo_idx)


@pytest.mark.parametrize(
    ("args", "extra", "error", "text"),
    [((), {}, ArgumentError, "bias .float32 array. is missing"),
     ((np.zeros((6, 4), np.float32),), {}, ArgumentError, "cap .float32 number. is missing"),
     ((np.zeros((6, 4), np.float32), 1.0, 2), {}, ArgumentError, "3 extra arguments"),
     ((np.zeros((6, 4), np.float32), 1.0), {"capp": 1}, ArgumentError, "capp is unknown; it takes bias, cap"),
     ((np.zeros((6, 4), np.float32), 1.0), {"cap": 1}, ArgumentError, "cap is given twice"),
     ((np.zeros((6, 4), np.int32), 1.0), {}, DTypeError, "bias has dtype int32"),
     ((np.zeros(6, np.float32), 1.0), {}, ShapeError, "expected 2 dimensions"),
     ((np.zeros((0, 4), np.float32), 1.0), {}, ShapeError, "at least one element"),
     ((np.zeros((6, 4), np.float32), "3"), {}, DTypeError, "cap is '3'")],
)  # fmt: skip
def test_run_errors(args, extra, error, text):
    variant = define(
        name="strict", tensors=["bias"], scalars=["cap"], score_fn=lambda s, ctx: s + ctx.bias[ctx.qo_head, 0] * ctx.cap
    )  # fmt: skip
    with pytest.raises(error, match=text):
        fi_cupy.jit.compile(variant).run(*_inputs(), *args, **extra)
    with pytest.raises(ArgumentError, match="expected a variant"):
        fi_cupy.jit.compile(args)


TEXT_ERRORS = {
    "syntax": ({"score_fn": "score *\n* 2.f +"}, r"variant:syntax:[23]: error"),
    "parenthesis": ({"score_fn": "1.f +\ntanhf(score"}, r"variant:parenthesis:2: error: '\(' is not closed"),
    "brace": ({"score_fn": "if (kv_idx > 3) {\n  return score;\nreturn 0.f;"}, r"variant:brace:1: error: '{' is not"),
    "escape": ({"score_fn": "score; }\n}"}, r"variant:escape:1: error: '}' closes nothing"),
    "nothing": ({"score_fn": "float x = score;"}, r"variant:nothing:1: error: statements must return"),
    "unknown": ({"score_fn": "score +\n bais(qo_idx)", "tensors": ["bias"]}, r'variant:unknown:2: .*identifier "bais"'),
    "body": ({"score_fn": "\n\nconst float x = y;\nreturn x;"}, r'variant:body:3: error: identifier "y"'),
    "two": ({"score_fn": "score", "mask_fn": "kv_idx < foo"}, r'variant:two\.mask_fn:1: error: identifier "foo"'),
    "rank": ({"score_fn": "score\n + bias(1, 2, 3, 4, 5)", "tensors": ["bias"]}, r"variant:rank:[23]: .*more indices"),
}  # fmt: skip


def _compile(variant, arch="80", **options):
    from fi_cupy.jit.build import job_for
    from fi_cupy.jit.compiler import compile_job
    from fi_cupy.plan.prefill import choose_tiles
    from fi_cupy.prefill_kernel import prefill_spec

    tiles = choose_tiles(16, 64, 64, 65536, 65536)  # few rows: the compiler unrolls less
    spec = prefill_spec(fi_cupy.dtypes.float16, 64, 64, tiles, paged=False)
    return compile_job(job_for(variant.lowered().specialise(spec, False, False), arch))


@pytest.mark.parametrize("name", TEXT_ERRORS)
def test_compile_errors_point_into_the_users_text(name):
    pytest.importorskip("cupy")
    options, pattern = TEXT_ERRORS[name]
    with pytest.raises(CompileError, match=pattern):
        _compile(define(name=name, **options))


def test_a_crash_of_the_compiler_is_a_compile_error(monkeypatch):
    from fi_cupy.jit import compiler

    def die(self, message, timeout):
        raise compiler.WorkerDied("crashed (SIGSEGV)")

    monkeypatch.setattr(compiler.Worker, "request", die)
    with pytest.raises(CompileError, match=r"variant:crashing:1: the compiler crashed \(SIGSEGV\)"):
        _compile(define(name="crashing", score_fn="score"))


COMPILED = {
    "traced": {
        "tensors": {"bias": "float16", "ids": "int32", "flags": "bool", "x": "bfloat16", "y": "uint8"},
        "scalars": {"cap": 30.0, "width": 4},
        "score_fn": lambda s, c: c.cap * ops.tanh(s / c.cap) + c.bias[c.qo_head, c.kv_idx] + c.x[0] * c.y[c.kv_head],
        "mask_fn": lambda c: (c.ids[c.qo_idx] == c.ids[c.kv_idx]) & c.flags[c.kv_idx] & (c.qo_idx - c.kv_idx < c.width),
    },
    "elements": {
        "query_fn": lambda q, c: q * ops.cos(c.dim_idx * 0.1),
        "key_fn": lambda k, c: ops.where(c.kv_idx % 2 == 0, k, -k),
        "post_process_fn": lambda out, c: ops.silu(out),
    },
    "everything": {
        "use_softmax": False,
        "score_fn": lambda s, c: (
            ops.exp(s) + ops.exp2(s) + ops.expm1(s) + ops.log(s) + ops.log2(s) + ops.log1p(s) + ops.sqrt(s)
            + ops.rsqrt(s) + ops.sigmoid(s) + ops.sin(s) + ops.tan(s) + ops.arctan(s) + ops.erf(s) + ops.floor(s)
            + ops.ceil(s) + ops.trunc(s) + ops.rint(s) + s**1.5 + s // 2 + s % 2 + c.qo_idx // 3 + c.qo_idx % 3
            + ops.minimum(s, c.kv_idx) + abs(c.qo_idx - c.kv_idx) + (c.batch << 1) + ~c.kv_head + s / c.sm_scale
            + ops.where(~(s > 0) | (c.qo_idx == c.qo_len - 1) ^ (c.kv_len > 3), -s, math_inf)
        ),
    },
    "text": {
        "tensors": ["bias"],
        "scalars": {"cap": 30.0, "width": 4},
        "score_fn": "cap * ops::tanh(score / cap) + bias(qo_head, kv_idx) // a comment",
        "mask_fn": "const int distance = qo_idx - kv_idx;  // }\nreturn distance < width;",
        "query_fn": "q * (dim_idx + 1)",
        "key_fn": "k + kv_head",
        "post_process_fn": "out * batch",
    },
}  # fmt: skip
math_inf = float("inf")


@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.parametrize("arch", ["75", "90a"])
def test_variants_compile(name, arch):
    pytest.importorskip("cupy")
    result = _compile(define(name=name, **COMPILED[name]), arch)
    assert result.code and "error" not in result.log
    assert result.spill_bytes <= 64


def test_plain_kernels_know_nothing_of_variants():
    from fi_cupy.jit.render import render
    from fi_cupy.jit.sources import header_closure

    source = render(fi_cupy.prefill.kernel_specs()[0])
    assert "ariant" not in source
    assert not [name for name in header_closure(source.encode()) if "variant" in name]


class TestWrappers:
    """Batches give what single requests give, with the request's number in ctx.batch."""

    qo, kv = [3, 0, 7, 5], [9, 4, 16, 5]

    def variant(self):
        return define(
            name="batched", tensors=["gain"], scalars={"cap": 4.0},
            score_fn=lambda s, ctx: ctx.cap * ops.tanh(s / ctx.cap) * ctx.gain[ctx.batch],
            mask_fn=lambda ctx: ctx.kv_len - ctx.qo_len + ctx.qo_idx - ctx.kv_idx < 4,
        )  # fmt: skip

    def expect(self, q, k, v, gain, cap=4.0):
        starts = np.cumsum([0, *self.qo]), np.cumsum([0, *self.kv])
        outs = []
        for b, (m, n) in enumerate(zip(self.qo, self.kv, strict=True)):
            qs, ks, vs = q[starts[0][b] :][:m], k[starts[1][b] :][:n], v[starts[1][b] :][:n]
            seen = lambda i, j, h, m=m, n=n: n - m + i - j < 4 and j <= n - m + i  # noqa: E731
            outs.append(_naive(qs, ks, vs, lambda s, i, j, h, b=b: cap * np.tanh(s / cap) * gain[b], seen))
        return np.concatenate(outs)

    def test_ragged(self):
        q, k, v = _inputs(15, 34)
        gain = np.array([1, 2, 3, 0.5], np.float32)
        wrapper = fi_cupy.prefill.BatchPrefillWithRaggedKVCacheWrapper(
            np.empty(1 << 16, np.uint8), variant=self.variant()
        )
        indptr = np.cumsum([0, *self.qo]), np.cumsum([0, *self.kv])
        wrapper.plan(*indptr, 6, 2, 32, causal=True, q_data_type="float32")
        _close(wrapper.run(q, k, v, gain), self.expect(q, k, v, gain))
        out, lse = wrapper.run(q, k, v, gain, 2.0, return_lse=True)
        _close(out, self.expect(q, k, v, gain, 2.0))
        assert lse.shape == (15, 6)
        _close(wrapper.run(q, k, v, variant_args={"gain": gain, "cap": 2.0}), out)
        with pytest.raises(ArgumentError, match=r"gain .float32 array. is missing"):
            wrapper.run(q, k, v)

    def test_paged(self):
        q, k, v = _inputs(15, 34)
        gain = np.array([1, 2, 3, 0.5], np.float32)
        page, pages = 4, [-(-n // 4) for n in self.kv]
        cache = np.full((sum(pages), 2, page, 2, 32), np.nan, np.float32)
        start = np.cumsum([0, *self.kv])
        for b, first in enumerate(np.cumsum([0, *pages])[:-1]):
            for j in range(self.kv[b]):
                cache[first + j // page, :, j % page] = k[start[b] + j], v[start[b] + j]
        wrapper = fi_cupy.prefill.BatchPrefillWithPagedKVCacheWrapper(
            np.empty(1 << 16, np.uint8), variant=self.variant()
        )
        last = [(n - 1) % page + 1 for n in self.kv]
        wrapper.plan(
            np.cumsum([0, *self.qo]), np.cumsum([0, *pages]), np.arange(sum(pages)), last, 6, 2, 32, page, causal=True,
            q_data_type="float32",
        )  # fmt: skip
        _close(wrapper.run(q, cache, gain), self.expect(q, k, v, gain))

    def test_arguments_without_a_variant_are_refused(self):
        q, k, v = _inputs(15, 34)
        wrapper = fi_cupy.prefill.BatchPrefillWithRaggedKVCacheWrapper(np.empty(1 << 16, np.uint8))
        wrapper.plan(np.cumsum([0, *self.qo]), np.cumsum([0, *self.kv]), 6, 2, 32, q_data_type="float32")
        with pytest.raises(UnsupportedError, match="variant="):
            wrapper.run(q, k, v, 3.0)
        with pytest.raises(ArgumentError, match="expected one from define_variant"):
            fi_cupy.prefill.BatchPrefillWithRaggedKVCacheWrapper(np.empty(1 << 16, np.uint8), variant="cap")

    def test_decode(self):
        q, k, v = _inputs(3, 40)
        variant = define(
            name="decoded", tensors=["gain"], mask_fn=lambda ctx: ctx.kv_idx % 3 != 1,
            score_fn=lambda s, ctx: s * ctx.gain[ctx.batch] + (ctx.qo_idx + ctx.qo_len - 1),
        )  # fmt: skip
        gain, lens, page = np.array([1, 0.5, 2], np.float32), [9, 16, 3], 4
        cache = np.full((10, 2, page, 2, 32), np.nan, np.float32)
        pages = np.cumsum([0, *(-(-n // page) for n in lens)])
        wanted = []
        for b, n in enumerate(lens):
            for j in range(n):
                cache[pages[b] + j // page, :, j % page] = k[10 * b + j], v[10 * b + j]
            rows = slice(10 * b, 10 * b + n)
            score = lambda s, i, j, h, b=b: s * gain[b]  # noqa: E731
            wanted.append(_naive(q[b : b + 1], k[rows], v[rows], score, lambda i, j, h: j % 3 != 1))
        wrapper = fi_cupy.decode.BatchDecodeWithPagedKVCacheWrapper(np.empty(1 << 16, np.uint8), variant=variant)
        table = pages, np.arange(10), [(n - 1) % page + 1 for n in lens]
        wrapper.plan(*table, 6, 2, 32, page, q_data_type="float32")
        assert wrapper.workspace_size(*table, 6, 2, 32, page, q_data_type="float32") == (0, 0)
        out, lse = wrapper.run(q, cache, gain, return_lse=True)
        _close(out, np.concatenate(wanted))
        assert lse.shape == (3, 6)
        with pytest.raises(ArgumentError, match=r"BatchDecodeWithPagedKVCacheWrapper.run: variant decoded: gain"):
            wrapper.run(q, cache)
        plain = fi_cupy.decode.BatchDecodeWithPagedKVCacheWrapper(np.empty(1 << 16, np.uint8))
        plain.plan(*table, 6, 2, 32, page, q_data_type="float32")
        with pytest.raises(UnsupportedError, match="variant="):
            plain.run(q, cache, gain)


SCORES = [
    lambda s, ctx: ctx.cap * ops.tanh(s / ctx.cap),
    lambda s, ctx: -(s * 3 - ctx.cap) / ctx.cap + ops.sigmoid(2 - s) * ctx.cap,
    lambda s, ctx: (ctx.cap - ops.tanh(s) * ops.tanh(s)) * 0.5 + ctx.kv_idx * 0.125,
    lambda s, ctx: ops.exp(-s / 4 + 1 / ctx.cap) * 2 - s * s,
    lambda s, ctx: ops.sqrt(ops.abs(s) + ctx.cap) * ctx.slope + (ctx.slope - ctx.cap),
    lambda s, ctx: 1 / (1 + s * s) + (ctx.cap + 1) / 3,
    lambda s, ctx: ctx.cap * 2,
]


@pytest.mark.parametrize("score", SCORES)
def test_what_all_elements_share_is_multiplied_first(score):
    # The text of Variant::logit, read as Python, is base * score(scale * qk).
    variant = define(name="scaled", score_fn=score, scalars=["cap", "slope"])
    text = variant.lowered().text
    body = text[text.index("logit(") :]
    lines = [line.strip().rstrip(";") for line in body[body.index("{") + 1 : body.index("}")].strip().splitlines()]
    cap, slope, qk, scale, base = 7.5, -0.75, np.linspace(-9, 9, 91), 0.3, 1.4426950408889634
    values = {
        "qk": qk, "scale": scale, "base": base, "unit": True, "cap": cap, "slope": slope, "cap_rcp": 1 / cap,
        "slope_rcp": 1 / slope, "kv_idx": 5, "log2e": np.log2(np.e), "float": lambda x: x * 1.0, "fabsf": np.abs,
        "fmaf": lambda a, b, c: a * b + c, "rcp_exp2_plus_1": lambda z, unit: 1 / (np.exp2(z) + 1),
        "ptx_exp2": np.exp2, "sqrtf": np.sqrt, "reciprocal": lambda x: 1 / x,
    }  # fmt: skip
    for line in lines:
        line = re.sub(r"params\.user\.|ctx\.|math::|ops::", "", line)
        line = re.sub(r"(\d\.?\d*(?:e-?\d+)?)f\b", r"\1", line)
        name, _, expression = line.removeprefix("const float ").partition(" = ")
        if line.startswith("return "):
            name, expression = "result", line.removeprefix("return ")
        values[name] = eval(expression, {}, values)
    want = score(scale * qk, SimpleNamespace(cap=cap, slope=slope, kv_idx=5))
    assert np.allclose(values["result"], base * np.broadcast_to(want, qk.shape), rtol=2e-6, atol=1e-6)
