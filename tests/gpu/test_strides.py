"""Attention of arrays with strides that tensor maps do not have, of sizes of other types, and of nothing."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import attention, decode, errors, mla, prefill
from fi_cupy.device import device_info
from fi_cupy.reference.attention import batch_decode_paged, single_prefill
from fi_cupy.testing.generators import normal, on_gpu, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
Decode, Ragged = decode.BatchDecodeWithPagedKVCacheWrapper, prefill.BatchPrefillWithRaggedKVCacheWrapper
Paged, Mla = prefill.BatchPrefillWithPagedKVCacheWrapper, mla.BatchMLAPagedAttentionWrapper
BACKWARDS = "expected none that is negative"


@pytest.fixture
def hopper():
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")


def workspace():
    return cupy.full((64 << 20,), 0xFF, cupy.uint8)


def check(made, want):
    (out, lse), (want, want_lse) = ([to_float64(x) for x in pair] for pair in (made, want))
    assert_close(out, want, "bfloat16", "product")
    assert (np.abs(lse - want_lse) <= 2e-5 * np.maximum(np.abs(want_lse), 10)).all()


def expanded(x, axis):
    """One row of `x` for all, on the host and, with a stride of 0, on the GPU."""
    row = np.take(x, [0], axis)
    return np.repeat(row, x.shape[axis], axis), cupy.broadcast_to(on_gpu(row), x.shape)


def backwards(x, axis):
    where = tuple(np.s_[::-1] if i == axis else np.s_[:] for i in range(x.ndim))
    return x, on_gpu(np.ascontiguousarray(x[where]))[where]


def odd(x, axis):
    """The stride of an axis with one element means nothing: 6 bytes."""
    made = on_gpu(x)
    return x, cupy.ndarray(
        x.shape, made.dtype, made.data, tuple(6 if i == axis else s for i, s in enumerate(made.strides))
    )


@pytest.mark.parametrize(
    ("names", "heads", "how", "axis"),
    [
        ("kv", (4, 4), expanded, 1),
        ("kv", (4, 4), expanded, 0),
        ("q", (4, 2), expanded, 1),
        ("kv", (4, 1), odd, 1),
        ("q", (1, 1), odd, 1),
        ("kv", (4, 2), backwards, 0),
        ("q", (4, 2), backwards, 1),
    ],
)
def test_contiguous(rng, hopper, names, heads, how, axis):
    shapes = {"q": (300, heads[0], 128), "k": (400, heads[1], 128), "v": (400, heads[1], 128)}
    made = {n: normal(rng, shape) for n, shape in shapes.items()}
    pairs = [how(x, axis) if n in names else (x, on_gpu(x)) for n, x in made.items()]
    given = [on for _, on in pairs]
    want = single_prefill(*(x.astype(np.float64) for x, _ in pairs), causal=True)
    check(prefill.single_prefill_with_kv_cache_return_lse(*given, causal=True), want)
    chosen = str(attention.explain(prefill.single_prefill_with_kv_cache, *given, causal=True))
    wrapper = Ragged(workspace())
    wrapper.plan([0, 300], [0, 400], *heads, 128, causal=True, q_data_type="bfloat16")
    if how is backwards:
        assert chosen.startswith("prefill_bf16") and "a stride is negative" in chosen
        with pytest.raises(errors.UnsupportedError, match="a stride is negative"):
            prefill.single_prefill_with_kv_cache(*given, causal=True, backend="fa3")
        with pytest.raises(errors.LayoutError, match=BACKWARDS):
            wrapper.run(*given)
    else:
        assert chosen.startswith("prefill_hopper")
        check(wrapper.run(*given, return_lse=True), want)


@pytest.mark.parametrize("axis", range(3))
def test_pages_backwards(rng, hopper, axis):
    """A cache that goes backwards along its pages, its tokens or its heads."""
    wrapper = Paged(workspace())
    wrapper.plan([0, 300], [0, 10], np.arange(10), [16], 4, 2, 128, 32, causal=True, q_data_type="bfloat16")
    _, cache = backwards(normal(rng, (10, 32, 2, 128)), axis)
    with pytest.raises(errors.LayoutError, match=BACKWARDS):
        wrapper.run(on_gpu(normal(rng, (300, 4, 128))), (cache, cache))


def test_latent_pages_backwards_and_none(rng, hopper):
    wrapper = Mla(workspace(), backend="fa3")
    q = [on_gpu(normal(rng, (2, 64, dim))) for dim in (512, 64)]
    options = {"causal": True, "sm_scale": 0.1, "q_data_type": "bfloat16", "kv_data_type": "bfloat16"}
    wrapper.plan([0, 2], [0, 2], [1, 0], [30], 64, 512, 64, 16, **options)
    with pytest.raises(errors.LayoutError, match=BACKWARDS):
        wrapper.run(*q, *(backwards(normal(rng, (3, 16, dim)), 0)[1] for dim in (512, 64)))
    wrapper.plan([0, 2], [0, 0], [], [0], 64, 512, 64, 16, **options)
    out = wrapper.run(*q, *(on_gpu(normal(rng, (0, 16, dim))) for dim in (512, 64)))
    assert (to_float64(out) == 0).all()


def test_a_wide_window(rng):
    q, k, v = (normal(rng, (100, 2, 128)) for _ in range(3))
    want = single_prefill(*(x.astype(np.float64) for x in (q, k, v)), causal=True)
    options = {"causal": True, "window_left": 1 << 40}
    check(prefill.single_prefill_with_kv_cache_return_lse(*map(on_gpu, (q, k, v)), **options), want)


def test_decode_of_no_requests(rng):
    wrapper, cache = Decode(workspace()), on_gpu(normal(rng, (3, 2, 16, 2, 64)))
    for _ in range(2):
        wrapper.plan([0], [], [], 8, 2, 64, 16, q_data_type="bfloat16")
        out, lse = wrapper.run(on_gpu(normal(rng, (0, 8, 64))), cache, return_lse=True)
        assert out.shape == (0, 8, 64) and lse.shape == (0, 8)


@pytest.mark.parametrize("integer", [int, np.int32, np.int64])
def test_decode_of_shifted_queries(rng, integer):
    """Queries are read in pairs; sizes may be NumPy's."""
    table = np.array([0, 3, 4]), np.array([2, 0, 1, 3]), np.array([8, 3])
    q, cache = normal(rng, (2, 4, 64)), normal(rng, (4, 2, 16, 2, 64))
    wide = cupy.zeros((2, 4, 66), on_gpu(q).dtype)
    wrapper = Decode(workspace())
    wrapper.plan(*table, *map(integer, (4, 2, 64, 16)), q_data_type="bfloat16")
    with pytest.raises(errors.LayoutError, match=r"q starts at address .* expected multiples of 4 bytes"):
        wrapper.run(wide[..., 1:65], on_gpu(cache))
    wide[..., 2:] = on_gpu(q)
    k, v = (cache[:, i].astype(np.float64) for i in (0, 1))
    want = batch_decode_paged(q.astype(np.float64), k, v, *table)
    check(wrapper.run(wide[..., 2:], on_gpu(cache), return_lse=True), want)
