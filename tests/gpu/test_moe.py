"""Mixture of experts and its routing against the float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import reference
from fi_cupy.fused_moe import cutlass_fused_moe, fused_topk_deepseek
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")


def f64(x):
    return np.asarray(x).astype(np.float64)


def choices(rng, tokens, top_k, experts):
    """Distinct experts a token, two of them (the last numbers) on another rank."""
    chosen = np.argsort(rng.random((tokens, experts + 2)), axis=1)[:, :top_k].astype(np.int32)
    return chosen, rng.random((tokens, top_k)).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 700, pytest.param(37, marks=pytest.mark.older_archs)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values(rng, tokens, dtype):
    experts, hidden, inter = 12, 264, 136
    chosen, scales = choices(rng, tokens, 4, experts)
    x = normal(rng, (tokens, hidden), dtype)
    fc1, fc2 = (
        normal(rng, (experts, 2 * inter, hidden), dtype, 0.06),
        normal(rng, (experts, hidden, inter), dtype, 0.08),
    )
    b1, b2 = normal(rng, (experts, 2 * inter), dtype), normal(rng, (experts, hidden), dtype)
    want = reference.moe.fused_moe(f64(x), chosen, f64(scales), f64(fc1), f64(fc2), None, None, f64(b1), f64(b2))
    gpu = [on_gpu(a) for a in (x, chosen, scales, fc1, fc2)]
    out = poisoned((tokens, hidden), dtype)
    got = cutlass_fused_moe(*gpu, dtype, None, on_gpu(b1), on_gpu(b2), output=out)
    assert got is out
    assert_close(to_float64(out), want, dtype, "product")
    gpu[1] = gpu[1].astype(np.int64)
    again = cutlass_fused_moe(*gpu, dtype, None, on_gpu(b1), on_gpu(b2), enable_pdl=True)
    assert (again.view("uint8") == out.view("uint8")).all()


def quantised(rng, shape):
    w, scales = [], []
    for matrix in rng.standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5:
        q, s = reference.quantization.quantize_fp8(matrix, (128, 128))
        w.append(q)
        scales.append(s)
    return np.stack(w), np.stack(scales).astype(np.float32)


@pytest.mark.parametrize("tokens", [1, 300, pytest.param(50, marks=pytest.mark.older_archs)])
def test_block_fp8(rng, tokens):
    experts, hidden, inter = 9, 384, 256
    chosen, scales = choices(rng, tokens, 3, experts)
    x = normal(rng, (tokens, hidden))
    (fc1, s1), (fc2, s2) = quantised(rng, (experts, 2 * inter, hidden)), quantised(rng, (experts, hidden, inter))
    want = reference.moe.fused_moe(x, chosen, scales, fc1, fc2, np.float64, (s1, s2))
    got = cutlass_fused_moe(
        *(on_gpu(a) for a in (x, chosen, scales, fc1, fc2)), "bfloat16", [on_gpu(s1), on_gpu(s2)],
        use_deepseek_fp8_block_scale=True,
    )  # fmt: skip
    # Rounded to bf16 between the products, one activation in 16 falls on the other side of an fp8 step of 6 to 12 %:
    # 2 % of the result, whatever its size.
    error = np.linalg.norm(to_float64(got) - want) / np.linalg.norm(want)
    assert error < 0.04, error


def test_expert_parallel_ranks_add_up(rng):
    chosen, scales = choices(rng, 64, 4, 14)
    x, fc1, fc2 = normal(rng, (64, 128)), normal(rng, (16, 128, 128), scale=0.1), normal(rng, (16, 128, 64), scale=0.1)
    want = reference.moe.fused_moe(f64(x), chosen, f64(scales), f64(fc1), f64(fc2))
    parts = [
        cutlass_fused_moe(
            on_gpu(x), on_gpu(chosen), on_gpu(scales), on_gpu(fc1[i : i + 8]), on_gpu(fc2[i : i + 8]), "float32",
            ep_size=2, ep_rank=i // 8,
        )
        for i in (0, 8)
    ]  # fmt: skip
    assert_close(to_float64(parts[0]) + to_float64(parts[1]), want, "bfloat16", "product")


def test_a_crowded_expert_and_many_entries(rng):
    """Thousands of entries for one expert, none for others."""
    tokens = 5000
    chosen = np.where(rng.random((tokens, 2)) < 0.9, 3, rng.integers(0, 6, (tokens, 2))).astype(np.int32)
    scales = rng.random((tokens, 2)).astype(np.float32)
    x, fc1, fc2 = normal(rng, (tokens, 64)), normal(rng, (6, 64, 64), scale=0.1), normal(rng, (6, 64, 32), scale=0.1)
    want = reference.moe.fused_moe(f64(x), chosen, f64(scales), f64(fc1), f64(fc2))
    got = cutlass_fused_moe(*(on_gpu(a) for a in (x, chosen, scales, fc1, fc2)), "bfloat16")
    assert_close(to_float64(got), want, "bfloat16", "product")


@pytest.mark.parametrize("shape", [(256, 8, 4, 8), (128, 1, 1, 6), (32, 4, 1, 3), (384, 1, 1, 8)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_routing(rng, shape, dtype):
    experts, groups, top_groups, k = shape
    tokens = 333
    scores, bias = normal(rng, (tokens, experts), dtype, 2.0), normal(rng, (experts,), dtype, 0.1)
    values, indices = poisoned((tokens, k), "float32"), cupy.full((tokens, k), -1, np.int32)
    fused_topk_deepseek(on_gpu(scores), on_gpu(bias), groups, top_groups, k, 2.5, values, indices)
    weights, _ = reference.moe.topk_deepseek(f64(scores), f64(bias), groups, top_groups, k, 2.5)
    got = indices.get()
    assert all(len(set(row)) == k for row in got.tolist()) and got.min() >= 0 and got.max() < experts
    # Scores that differ by less than fp32 shows may be chosen in either order: compare what was chosen, not its number.
    np.testing.assert_allclose(np.sort(values.get()), np.sort(weights), rtol=2e-5)


def test_graph_capture(rng):
    chosen, scales = choices(rng, 16, 2, 4)
    x, fc1, fc2 = normal(rng, (16, 64)), normal(rng, (4, 64, 64), scale=0.1), normal(rng, (4, 64, 32), scale=0.1)
    gpu = [on_gpu(a) for a in (x, chosen, scales, fc1, fc2)]
    out = poisoned((16, 64), "bfloat16")
    cutlass_fused_moe(*gpu, "bfloat16", output=out)
    stream = new_stream()
    pool = cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):
        cutlass_fused_moe(*gpu, "bfloat16", output=out)
        stream.begin_capture()
        cutlass_fused_moe(*gpu, "bfloat16", output=out)
        graph = stream.end_capture()
        again = rng.permutation(chosen)
        gpu[1][...] = on_gpu(again)
        graph.launch()
        stream.synchronize()
    want = reference.moe.fused_moe(f64(x), again, f64(scales), f64(fc1), f64(fc2))
    assert_close(to_float64(out), want, "bfloat16", "product")
