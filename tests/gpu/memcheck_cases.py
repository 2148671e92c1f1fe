"""Small runs of sampling, top-k, decode and products for compute-sanitizer, each held to the reference.

    compute-sanitizer --tool memcheck --report-api-errors no python tests/gpu/memcheck_cases.py sampling decode gemm

Every array is an allocation of its own, of odd sizes: an access behind its end is seen.
"""

from __future__ import annotations

import sys

import numpy as np
import race_gemm

from fi_cupy import decode, gemm, sampling, topk
from fi_cupy.reference.attention import batch_decode_paged
from fi_cupy.testing.generators import normal, odd_rows, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

#: Unaligned rows, one element past a segment and past a vector, and more CTAs a row than one.
ROWS = ((5, 3), (4, 1025), (3, 5003), (2, 32001))


def run_sampling(rng: np.random.Generator) -> None:
    for rows, vocab in ROWS:
        logits, probs = (odd_rows(rng, rows, vocab, "float32", x) for x in (True, False))
        device_logits, device_probs = on_gpu(logits), on_gpu(probs)
        at = {"seed": 5, "offset": 8}
        for function, x, moved, given in (
            (sampling.sampling_from_logits, logits, device_logits, {}),
            (sampling.top_p_sampling_from_probs, probs, device_probs, {"top_p": 0.9}),
            (sampling.min_p_sampling_from_probs, probs, device_probs, {"min_p": 0.05}),
            (sampling.top_k_top_p_sampling_from_logits, logits, device_logits, {"top_k": 40, "top_p": 0.8}),
            (sampling.top_k_top_p_sampling_from_probs, probs, device_probs, {"top_k": 2000, "top_p": 0.8}),
        ):
            assert (function(moved, **given, **at).get() == function(x, **given, **at)).all(), function.__name__
        for function, x, moved, parameter in (
            (sampling.top_p_renorm_probs, probs, device_probs, 0.9),
            (sampling.top_k_renorm_probs, probs, device_probs, 40),
            (sampling.top_k_mask_logits, logits, device_logits, 40),
            (sampling.softmax, logits, device_logits, 0.7),
        ):
            got, want = to_float64(function(moved, parameter)), function(x, parameter).astype(np.float64)
            assert ((got == 0) == (want == 0)).all()
            assert_close(got, want, "float32")
        k = min(700, vocab)
        _, indices = topk.top_k(device_logits, k, sorted=True)
        assert (indices.get() == topk.top_k(logits, k, sorted=True)[1]).all()
    target = odd_rows(rng, 12, 1001, "float32", False, ("normal",)).reshape(3, 4, 1001)
    ids = rng.integers(0, 1001, (3, 3)).astype(np.int32)
    given = np.ascontiguousarray(target[:, :3][:, ::-1]), ids, target
    got, want = (sampling.chain_speculative_sampling(*x, seed=1) for x in (map(on_gpu, given), given))
    assert all((g.get() == w).all() for g, w in zip(got, want, strict=True))


def run_decode(rng: np.random.Generator) -> None:
    for heads, kv_heads, dim, page_size, kv in (
        (8, 2, 128, 16, "bfloat16"), (5, 1, 72, 5, "bfloat16"), (8, 2, 64, 16, "float8_e4m3fn")
    ):  # fmt: skip
        lens = np.array([1, 700, 0, 33])
        indptr = np.concatenate([[0], np.cumsum(-(-lens // page_size))]).astype(np.int32)
        table = indptr, rng.permutation(indptr[-1]).astype(np.int32), np.where(lens, (lens - 1) % page_size + 1, 1)
        q = normal(rng, (4, heads, dim))
        cache = normal(rng, (int(indptr[-1]), 2, page_size, kv_heads, dim), kv)
        wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(poisoned((8 << 20,), "uint8"))
        wrapper.plan(*table, heads, kv_heads, dim, page_size, q_data_type="bfloat16", kv_data_type=kv)
        out = poisoned(q.shape, "bfloat16")
        wrapper.run(on_gpu(q), on_gpu(cache), out=out)
        want = batch_decode_paged(q.astype(np.float64), *(cache[:, i].astype(np.float64) for i in (0, 1)), *table)
        assert_close(to_float64(out), want[0], "bfloat16", "product")


def run_gemm(rng: np.random.Generator) -> None:
    for m in (1, 5, 17, 70, 200):
        a, w = normal(rng, (m, 136)), normal(rng, (264, 136))
        out = poisoned((m, 264), "bfloat16")
        gemm.mm_bf16(on_gpu(a), on_gpu(w).T, out=out)
        assert_close(to_float64(out), a.astype(np.float64) @ w.astype(np.float64).T, "bfloat16", "product")
    x, weights = normal(rng, (130, 136)), normal(rng, (3, 264, 136))
    indptr = np.array([0, 70, 70, 130])
    got = gemm.group_gemm(on_gpu(x), on_gpu(weights), on_gpu(indptr))
    parts = [x[indptr[g] : indptr[g + 1]].astype(np.float64) @ weights[g].astype(np.float64).T for g in range(3)]
    assert_close(to_float64(got), np.concatenate(parts), "bfloat16", "product")
    for m in (3, 100):
        a, b = normal(rng, (m, 256), "float8_e4m3fn"), normal(rng, (136, 256), "float8_e4m3fn")
        scales = rng.uniform(0.5, 2, (m, 2)).astype(np.float32), rng.uniform(0.5, 2, (2, 2)).astype(np.float32)
        got = gemm.gemm_fp8_nt_groupwise(on_gpu(a), on_gpu(b), *map(on_gpu, scales), "K")
        wide_a = a.astype(np.float64) * np.repeat(scales[0], 128, 1)
        wide_b = b.astype(np.float64) * np.repeat(np.repeat(scales[1], 128, 0)[:136], 128, 1)
        assert_close(to_float64(got), wide_a @ wide_b.T, "bfloat16", "product")


def run_kernels(_: np.random.Generator) -> None:
    """Each kernel of products, routing and casts, as racecheck runs them."""
    for family in race_gemm.FAMILIES.values():
        for _, case in family():
            case(np.random.default_rng(0))


CASES = {"sampling": run_sampling, "decode": run_decode, "gemm": run_gemm, "kernels": run_kernels}


def main() -> None:
    import cupy

    cupy.cuda.set_allocator(None)  # allocations of their own: memcheck sees where each one ends
    cupy.cuda.set_pinned_memory_allocator(None)
    for name in sys.argv[1:]:
        CASES[name](np.random.default_rng(0))
        print(f"{name}: right", flush=True)
    cupy.cuda.runtime.deviceSynchronize()
    print("all right", flush=True)


if __name__ == "__main__":
    main()
