"""fused_moe on CPU arrays against formulas of the test's own, its errors, and its kernels in the emulator."""

from __future__ import annotations

import emulate
import numpy as np
import pytest

from fi_cupy import errors, fused_moe, reference
from fi_cupy.fused_moe import cutlass_fused_moe, fused_topk_deepseek
from fi_cupy.gemm import fp8_blocks, group, quantise
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close


def f64(x):
    return np.asarray(x).astype(np.float64)


def layer(rng, tokens, top_k, experts, hidden, inter, dtype="bfloat16", other=2):
    """Random tokens, choices (some of experts that are not here) and 16-bit weights."""
    x = normal(rng, (tokens, hidden), dtype)
    chosen = np.argsort(rng.random((tokens, experts + other)), axis=1)[:, :top_k].astype(np.int32)
    scales = rng.random((tokens, top_k)).astype(np.float32)
    fc1 = normal(rng, (experts, 2 * inter, hidden), dtype, hidden**-0.5)
    return x, chosen, scales, fc1, normal(rng, (experts, hidden, inter), dtype, inter**-0.5)


def one_by_one(x, chosen, scales, fc1, fc2, b1=None, b2=None):
    """Every token and slot for itself, in float64."""
    out = np.zeros(x.shape)
    inter = fc2.shape[2]
    for t, row in enumerate(chosen):
        for slot, e in enumerate(row):
            if not 0 <= e < len(fc1):
                continue
            both = f64(fc1[e]) @ f64(x[t]) + (0 if b1 is None else f64(b1[e]))
            up, gate = both[:inter], both[inter:]
            y = f64(fc2[e]) @ (gate / (1 + np.exp(-gate)) * up) + (0 if b2 is None else f64(b2[e]))
            out[t] += scales[t, slot] * y
    return out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values(rng, dtype):
    args = layer(rng, 9, 3, 5, 64, 40, dtype)
    got = cutlass_fused_moe(*args, dtype)
    assert got.dtype == args[0].dtype
    assert_close(got, one_by_one(*args), dtype, "product")
    b1, b2 = normal(rng, (5, 80), dtype), normal(rng, (5, 64), dtype)
    out = np.full((9, 64), np.nan, np.float32)
    got = cutlass_fused_moe(*args, np.float32, None, b1, b2, output=out)
    assert got is out
    assert_close(out, one_by_one(*args, b1, b2), "float32", "product")


def test_expert_parallel_ranks_add_up(rng):
    x, chosen, scales, fc1, fc2 = layer(rng, 7, 2, 6, 32, 16, other=0)
    parts = [
        cutlass_fused_moe(x, chosen, scales, fc1[i : i + 3], fc2[i : i + 3], "float32", ep_size=2, ep_rank=i // 3)
        for i in (0, 3)
    ]
    assert_close(parts[0] + parts[1], one_by_one(x, chosen, scales, fc1, fc2), "float32", "product")


def blocks(rng, shape):
    """fp8 weights with 128 x 128 scales, and what they stand for."""
    w, scales = [], []
    for matrix in rng.standard_normal(shape) * shape[-1] ** -0.5:
        q, s = reference.quantization.quantize_fp8(matrix.astype(np.float32), (128, 128))
        w.append(q)
        scales.append(s)
    w, scales = np.stack(w), np.stack(scales).astype(np.float32)
    return w, scales, f64(w) * np.repeat(np.repeat(scales, 128, 1), 128, 2)


def test_block_fp8(rng):
    """Close to the product of the dequantised weights: activations lose what fp8 loses."""
    (fc1, s1, w1), (fc2, s2, w2) = blocks(rng, (4, 512, 256)), blocks(rng, (4, 256, 256))
    x, chosen, scales, *_ = layer(rng, 12, 2, 4, 256, 8)
    got = cutlass_fused_moe(x, chosen, scales, fc1, fc2, "float32", [s1, s2], use_deepseek_fp8_block_scale=True)
    assert_close(got, one_by_one(x, chosen, scales, w1, w2), "float8_e4m3fn", "product")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"input": 0.0}, errors.FrameworkError, "cutlass_fused_moe: input is a builtins.float"),
        ({"swiglu_alpha": 1}, errors.UnsupportedError, "swiglu_alpha is given, expected its default"),
        ({"activation_type": 4}, errors.UnsupportedError, "activation_type is 4, expected 3"),
        ({"ep_rank": 2}, errors.ArgumentError, "ep_rank is 2, expected 0 to 0"),
        ({"quant_scales": [1, 2]}, errors.UnsupportedError, "got 2 quant_scales without use_deepseek_fp8_block_scale"),
        ({"use_deepseek_fp8_block_scale": True}, errors.ArgumentError, "got 0 quant_scales, expected 2"),
        ({"output": np.zeros((9, 8))}, errors.ShapeError, "output has shape (9, 8), expected (9, 64)"),
        ({"token_final_scales": np.zeros((9, 3))}, errors.DTypeError, "token_final_scales has dtype float64"),
        ({"fc1_expert_weights": np.zeros((5, 80, 32), np.float16)}, errors.ShapeError, "expected (5, 80, 64)"),
    ],
)
def test_errors_name_operator_argument_got_and_wanted(rng, change, error, text):
    names = ("input", "token_selected_experts", "token_final_scales", "fc1_expert_weights", "fc2_expert_weights")
    arguments = {**dict(zip(names, layer(rng, 9, 3, 5, 64, 40, "float16"), strict=True)), "output_dtype": "float16"}
    with pytest.raises(error) as caught:
        cutlass_fused_moe(**{**arguments, **change})
    assert text in str(caught.value)


# --- routing --------------------------------------------------------------------------------------------------------


def route(scores, bias, groups, top_groups, k, factor):
    """One token, one decision at a time."""
    s = 1 / (1 + np.exp(-f64(scores)))
    b = s + f64(bias)
    size = len(b) // groups
    best = sorted(range(groups), key=lambda g: (-np.sort(b[g * size : (g + 1) * size])[-2:].sum(), g))[:top_groups]
    allowed = [e for e in range(len(b)) if e // size in best] if groups > 1 else list(range(len(b)))
    chosen = sorted(allowed, key=lambda e: (-b[e], e))[:k]
    return s[chosen] / s[chosen].sum() * factor, chosen


#: The last: lanes with five of eight experts, lanes without any, and rows that 16-byte loads cannot read.
SHAPES = [(256, 8, 4, 8), (64, 1, 1, 6), (32, 4, 1, 3), (96, 3, 3, 32), (85, 17, 6, 9)]


def routed(rng, experts, groups, top_groups, k, tokens=5, place=lambda x: x, dtype=np.int32):
    scores, bias = normal(rng, (tokens, experts), "float32", 2.0), normal(rng, (experts,), "float32", 0.1)
    values, indices = place(np.full((tokens, k), np.nan, np.float32)), place(np.full((tokens, k), -1, dtype))
    fused_topk_deepseek(place(scores), place(bias), groups, top_groups, k, 2.5, values, indices)
    for t in range(tokens):
        weights, chosen = route(scores[t], bias, groups, top_groups, k, 2.5)
        assert indices[t].tolist() == chosen
        np.testing.assert_allclose(values[t], weights, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_routing(rng, shape):
    routed(rng, *shape)


def ties_and_nan(place=lambda x: x):
    values, indices = place(np.empty((2, 3), np.float32)), place(np.empty((2, 3), np.int64))
    scores = np.zeros((2, 16), np.float32)
    scores[1, [0, 5]] = np.nan, 3
    fused_topk_deepseek(place(scores), place(np.zeros(16, np.float32)), 4, 2, 3, 1.0, values, indices)
    assert indices.tolist() == [[0, 1, 2], [5, 1, 2]]
    np.testing.assert_allclose(values[0], 1 / 3, rtol=1e-6)


def test_routing_ties_and_nan():
    ties_and_nan()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((5, 1, 2), "n_group is 5, expected 1 to 32 groups of two or more of 32 experts"),
        ((4, 5, 2), "topk_group is 5, expected 1 to 4 = n_group"),
        ((4, 1, 9), "topk is 9, expected 1 to 8"),
        ((1, 1, 33), "topk is 33, expected 1 to 32"),
    ],
)
def test_routing_errors(arguments, text):
    k = arguments[2]
    with pytest.raises(errors.ArgumentError) as caught:
        fused_topk_deepseek(
            np.zeros((1, 32), np.float32), np.zeros(32, np.float32), *arguments, 1.0, np.zeros((1, k), np.float32),
            np.zeros((1, k), np.int32),
        )  # fmt: skip
    assert text in str(caught.value)


# --- the kernels in the emulator ------------------------------------------------------------------------------------

needs_emulator = pytest.mark.skipif(not emulate.available(), reason="g++ on x86-64 is needed")


@pytest.fixture
def on_device():
    with emulate.emulated(emulate.AMPERE, fused_moe, group, quantise, fp8_blocks):
        yield emulate.device


@needs_emulator
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_routing_kernel(rng, shape, on_device):
    routed(rng, *shape, place=on_device, dtype=np.int64)


@needs_emulator
def test_routing_kernel_ties_and_nan(on_device):
    ties_and_nan(on_device)


@needs_emulator
@pytest.mark.parametrize("entries", [1, 300, 3000])
def test_sort_kernel(rng, on_device, entries):
    """A stable counting sort with the entries of no local expert behind all others."""
    experts, first = 5, 2
    chosen = rng.integers(-1, 9, entries).astype(np.int32)
    indptr, source, position = (np.full(n, 99, np.int32) for n in (experts + 1, entries, entries))
    emulate.EmulatedKernel(fused_moe._spec("moe_sort")).launch(
        experts + 1, 0, chosen.ctypes.data, indptr.ctypes.data, source.ctypes.data, position.ctypes.data, entries,
        experts, first, 0,
    )  # fmt: skip
    local = chosen - first
    here = (local >= 0) & (local < experts)
    order = np.argsort(np.where(here, local, experts), kind="stable")
    count = int(here.sum())
    assert indptr.tolist() == np.concatenate([[0], np.cumsum(np.bincount(local[here], minlength=experts))]).tolist()
    assert source.tolist() == np.where(np.arange(entries) < count, order, -1).tolist()
    want = np.full(entries, -1)
    want[order[:count]] = np.arange(count)
    assert position.tolist() == want.tolist()


@needs_emulator
def test_layer_kernels(rng, on_device):
    args = layer(rng, 9, 3, 5, 64, 40)
    b1, b2 = normal(rng, (5, 80)), normal(rng, (5, 64))
    got = cutlass_fused_moe(*map(on_device, args), "bfloat16", None, on_device(b1), on_device(b2))
    assert_close(got, one_by_one(*args, b1, b2), "bfloat16", "product")


@needs_emulator
def test_block_fp8_kernels(rng, on_device):
    (fc1, s1, _), (fc2, s2, _) = blocks(rng, (3, 256, 128)), blocks(rng, (3, 128, 128))
    x, chosen, scales, *_ = layer(rng, 5, 2, 3, 128, 8)
    want = reference.moe.fused_moe(x, chosen, scales, fc1, fc2, np.float64, (s1, s2))
    device = [on_device(a) for a in (x, chosen, scales, fc1, fc2)]
    quant_scales = [on_device(s1), on_device(s2)]
    got = cutlass_fused_moe(*device, "bfloat16", quant_scales, use_deepseek_fp8_block_scale=True)
    # Rounded to bf16 between the products, one activation in 16 falls on the other side of an fp8 step of 6 to 12 %:
    # 2 % of the result, whatever its size.
    assert np.linalg.norm(f64(got) - want) / np.linalg.norm(want) < 0.04
