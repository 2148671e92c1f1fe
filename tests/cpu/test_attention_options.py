"""fp8, factors a head, rotation and several queries a request on the CPU against loops, and which kernel takes what."""

from __future__ import annotations

import numpy as np
import pytest
from naive_attention import Pages, attend, seen

from fi_cupy import decode, errors, prefill
from fi_cupy.attention import explain
from fi_cupy.decode_kernel import Problem as DecodeProblem
from fi_cupy.decode_kernel import why_not
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16, float8_e4m3fn, float8_e5m2, float16, float32
from fi_cupy.jit.render import render
from fi_cupy.plan.prefill import TileKind, smem_bytes
from fi_cupy.prefill_kernel import Problem, check_problem, geometry, kernel_specs
from fi_cupy.scales import read_scales
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

HOPPER = DeviceInfo(90, "90a", 132, 232448, 233472, 50 << 20)
Q, K, V = (np.array(x, np.float32) for x in ([0.5, -1.5, 2.0, 1.0, 0.25, 3.0], [2.0, -0.5], [0.25, -4.0]))


def scaled(q, k, v):
    """Arrays with their factors a head multiplied in: what dequantisation means."""
    return q.astype(np.float64) * Q[:, None], k.astype(np.float64) * K[:, None], v.astype(np.float64) * V[:, None]


def rotated(x, positions, theta, scale):
    """Halves of the last dimension rotated, by complex numbers."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * theta ** (-np.arange(half) / half) / scale
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def arrays(rng, m, n, kv="float8_e4m3fn", q="bfloat16", dim=16):
    return normal(rng, (m, 6, dim), q), normal(rng, (n, 2, dim), kv), normal(rng, (n, 2, dim), kv)


@pytest.mark.parametrize("kv", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("q_type", ["bfloat16", "float8_e4m3fn"])
def test_single_fp8_with_factors_a_head(rng, kv, q_type):
    q, k, v = arrays(rng, 5, 9, kv, q_type)
    want, want_lse = attend(*scaled(q, k, v), seen(5, 9, causal=True))
    out, lse = prefill.single_prefill_with_kv_cache(q, k, v, Q, K, V, "float32", causal=True, return_lse=True)
    assert out.dtype == np.float32
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")
    again = prefill.single_prefill_with_kv_cache(q, k, v, Q, o_dtype="float32", causal=True, k_scale=K, v_scale=V)
    assert (again == out).all()


def test_uint8_is_e4m3(rng):
    q, k, v = arrays(rng, 5, 9)
    given = [x.view(np.uint8) for x in (k, v)]
    want = prefill.single_prefill_with_kv_cache(q, k, v)
    assert (prefill.single_prefill_with_kv_cache(q, *given) == want).all()
    assert (decode.single_decode_with_kv_cache(q[0], *given) == decode.single_decode_with_kv_cache(q[0], k, v)).all()


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_batch_wrappers(rng, layout):
    parts = [arrays(rng, m, n) for m, n in ((3, 7), (2, 0), (5, 12))]
    masks = [seen(len(q), len(k), causal=True) for q, k, _ in parts]
    wants = [attend(*scaled(*x), mask) for x, mask in zip(parts, masks, strict=True)]
    want, want_lse = (np.concatenate([w[i] for w in wants]) for i in (0, 1))
    q = np.concatenate([x[0] for x in parts])
    qo, kv = (np.cumsum([0, *(len(x[i]) for x in parts)]) for i in (0, 1))
    pages = Pages(rng, 9, 4, 2, 16, float8_e4m3fn.np, layout)
    table = pages.add([x[1:] for x in parts])
    types = {"q_data_type": "bfloat16", "kv_data_type": "float8_e4m3fn", "o_data_type": "float32"}
    paged = prefill.BatchPrefillWithPagedKVCacheWrapper(np.zeros(16, np.uint8), layout)
    paged.plan(qo, *table, 6, 2, 16, 4, causal=True, **types)
    ragged = prefill.BatchPrefillWithRaggedKVCacheWrapper(np.zeros(16, np.uint8))
    ragged.plan(qo, kv, 6, 2, 16, causal=True, **types)
    k, v = (np.concatenate([x[i] for x in parts]) for i in (1, 2))
    factors = {"q_scale": Q, "k_scale": K, "v_scale": V}
    for out, lse in (
        paged.run(q, pages.cache, return_lse=True, **factors),
        paged.run(q, tuple(x.view(np.uint8) for x in pages.cache), return_lse=True, **factors),
        ragged.run(q, k, v, return_lse=True, **factors),
    ):
        assert_close(out, want, "float32", "product")
        assert_close(lse, want_lse, "float32", "product")
    halved = ragged.run(q, k, v, o_scale=2.0, **factors)
    assert_close(halved, want / 2, "float32", "product")


def test_fp8_queries_take_factors_by_position(rng):
    q, k, v = arrays(rng, 4, 9, q="float8_e4m3fn")
    want, _ = attend(*scaled(q, k, v), seen(4, 9))
    wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(np.zeros(16, np.uint8))
    wrapper.plan([0, 4], [0, 9], 6, 2, 16, q_data_type="float8_e4m3fn", o_data_type="float32")
    assert_close(wrapper.run(q, k, v, Q, K, V), want, "float32", "product")
    with pytest.raises(errors.ArgumentError, match="by position and by name"):
        wrapper.run(q, k, v, Q, K, V, v_scale=2.0)
    with pytest.raises(errors.UnsupportedError, match="extra arguments"):
        wrapper.run(q, k, v, Q, K)
    wrapper.plan([0, 4], [0, 9], 6, 2, 16, q_data_type="float8_e4m3fn")
    out = wrapper.run(q, k, v, v_scale=1e5)
    assert out.dtype == float8_e4m3fn.np and np.abs(out.astype(np.float32)).max() == 448  # saturated, not NaN


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("kv", ["bfloat16", "float8_e5m2"])
def test_trap_28_several_queries_a_request_are_causal(rng, count, kv):
    parts = [arrays(rng, count, n, kv) for n in (7, 0, 1, 20)]
    wants = [attend(*scaled(*x), seen(count, len(x[1]), causal=True)) for x in parts]
    pages = Pages(rng, 20, 3, 2, 16, parts[0][1].dtype)
    table = pages.add([x[1:] for x in parts])
    wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(np.zeros(16, np.uint8))
    wrapper.plan(*table, 6, 2, 16, 3, q_data_type="bfloat16", kv_data_type=kv, o_data_type="float32",
                 q_len_per_req=count)  # fmt: skip
    q = np.concatenate([x[0] for x in parts])
    out, lse = wrapper.run(q, pages.cache, q_scale=Q, k_scale=K, v_scale=V, q_len_per_req=count, return_lse=True)
    assert_close(out, np.concatenate([w[0] for w in wants]), "float32", "product")
    assert_close(lse, np.concatenate([w[1] for w in wants]), "float32", "product")
    with pytest.raises(errors.PlanError, match=f"q_len_per_req is 1, planned {count}"):
        wrapper.run(q, pages.cache, q_len_per_req=1)
    with pytest.raises(errors.ShapeError, match=r"= \(batch \* q_len_per_req"):
        wrapper.run(q[1:], pages.cache)


def test_trap_9_rotation_of_early_and_late_queries(rng):
    """More queries than keys, without causality: the first are at negative positions."""
    q, k, v = arrays(rng, 9, 4, "float32", "float32")
    options = {"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 500.0, "rope_scale": 2.0}
    want, want_lse = attend(
        rotated(q.astype(np.float64), np.arange(-5, 4), 500.0, 2.0),
        rotated(k.astype(np.float64), np.arange(4), 500.0, 2.0), v, seen(9, 4),
    )  # fmt: skip
    out, lse = prefill.single_prefill_with_kv_cache_return_lse(q, k, v, **options)
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")


def test_scales_join_or_stay():
    from fi_cupy.arrays import view

    x = view(np.zeros((1, 6, 8), np.float32))
    plain = read_scales("op", x, 6, 2)
    assert plain.kernel_values() == (0,) * 7 and not plain.on_logits
    numbers = read_scales("op", x, 6, 2, 2.0, np.float32(3.0), np.array([0.5], np.float32))
    assert (numbers.logit, numbers.output, numbers.on_logits) == (6.0, 0.5, False)
    both = read_scales("op", x, 6, 2, Q, 0.5, V)
    assert (both.logit, both.output, both.on_logits) == (0.5, 1.0, True)
    assert both.kernel_values()[3:] == (1, 0, 1, 0)
    assert not read_scales("op", x, 6, 2, None, 2.0, V).on_logits
    assert read_scales("op", x, 6, 2, [1.0] * 6).q.dtype is float32
    for value, error in ((np.ones(3, np.float32), errors.ShapeError), (np.ones((2, 1), np.float32), errors.ShapeError)):
        with pytest.raises(error, match=r"op: k_scale has shape .*, expected a number or \(2,\) factors, one a head"):
            read_scales("op", x, 6, 2, k_scale=value)


def problem(q=bfloat16, kv=None, out=None, dim=64, rope=False, **changes):
    made = Problem(8, 2, dim, dim, q, True, False, False, False)
    return made._replace(rope=rope, kv_dtype=kv, out_dtype=out, **changes)


@pytest.mark.parametrize(
    ("given", "symbol"),
    [
        ({"backend": "fa2"}, "prefill_bf16_d64_q128k64_paged"),
        ({"kv": float8_e4m3fn}, "prefill_bf16_kve4m3_d64_q128k64_paged"),
        ({"q": float8_e4m3fn}, "prefill_f16_qe4m3_kve4m3_oe4m3_d64_q128k64_paged"),
        ({"q": float8_e5m2, "out": bfloat16}, "prefill_bf16_qe5m2_kve5m2_d64_q128k64_paged"),
        ({"q": float8_e5m2, "kv": float16}, "prefill_f16_qe5m2_oe5m2_d64_q128k64_paged"),
        ({"out": float32}, "prefill_bf16_of32_d64_q128k64_paged"),
        ({"rope": True}, "prefill_bf16_d64_q128k64_paged_rope"),
    ],
)
def test_instances(given, symbol):
    p = problem(**given)
    check_problem("op", p)
    g = geometry(p, 128, HOPPER)
    assert g.spec.symbol == symbol and g.heads_spec.symbol == symbol + "_heads"
    assert f"using KV = {p.kv.cpp};" in render(g.spec)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        ({"kv": float16}, errors.DTypeError, "keys and values have dtype float16, expected bfloat16 like q"),
        ({"q": float32}, errors.DTypeError, "q has dtype float32"),
        ({"dim": 60, "kv": float8_e4m3fn}, errors.ShapeError, "head_dim_qk is 60, expected a multiple of 8"),
        ({"dim": 40, "rope": True}, errors.ShapeError, "head_dim_qk is 40, expected a multiple of 16 with ROPE_LLAMA"),
    ],
)
def test_refused(given, error, text):
    with pytest.raises(error, match=text):
        check_problem("op", problem(**given))


def test_shared_memory_of_fp8_and_rotation():
    plain = smem_bytes(4, 2, 64, 128, 128)
    # One 16-bit buffer of K and V instead of two, and their bytes.
    assert plain - smem_bytes(4, 2, 64, 128, 128, TileKind(fp8=True)) == 64 * 256 * 2 - 64 * 256
    assert smem_bytes(4, 2, 64, 128, 128, TileKind(rope=True)) == plain + 64 * 8
    assert {"rope", "heads"} <= {part for s in kernel_specs() for part in s.symbol.split("_")}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({}, ""),
        ({"kv": float8_e4m3fn}, ""),
        ({"kv": float8_e4m3fn, "head_dim": 40}, "head_dim 40 is no multiple of 16 (float8_e4m3fn keys)"),
        ({"rope": True, "head_dim": 80}, "head_dim 80 is no multiple of 32 (bfloat16 keys with ROPE_LLAMA)"),
        ({"rope": True, "head_dim": 64}, ""),
        ({"dtype": float8_e4m3fn, "kv": float8_e4m3fn}, "q is float8_e4m3fn"),
        ({"out": float8_e5m2}, "the output is float8_e5m2"),
        ({"head_dim": 60}, ""),  # no kernel takes it: the decode kernel's own error
    ],
)
def test_what_the_decode_kernel_leaves_to_the_prefill_kernel(given, why):
    p = DecodeProblem(4, 8, 2, 64, bfloat16, bfloat16, bfloat16, True, False, False, False, False)
    assert why_not(p._replace(**given)) == why


def test_explain_names_the_kernel_that_decodes(rng):
    q = normal(rng, (6, 40))
    k = normal(rng, (900, 2, 40), "float8_e4m3fn")
    single = decode.single_decode_with_kv_cache
    (use, *_) = explain(single, q, k, k, device=HOPPER).launches
    assert use.kernel.startswith("prefill_bf16_kve4m3_d40_q16")
    assert use.why.startswith("the prefill kernel, since head_dim 40 is no multiple of 16 (float8_e4m3fn keys): ")
    q, k = normal(rng, (6, 64)), normal(rng, (900, 2, 64))
    assert explain(single, q, k, k, device=HOPPER).launches[0].kernel.startswith("batch_decode_bf16_d64")
    (use,) = explain(single, q, k, k, k_scale=K, device=HOPPER).launches
    assert use.kernel.endswith("_heads")
    (use, *_) = explain(prefill.single_prefill_with_kv_cache, q[None], k, k, K[:1], K, device=HOPPER).launches
    assert use.kernel.endswith("_heads")
