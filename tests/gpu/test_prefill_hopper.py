"""What the Hopper prefill kernel could get wrong and the portable one could not; test_prefill.py runs both."""

from __future__ import annotations

import numpy as np
import pytest

from fi_cupy import attention, errors, prefill, prefill_hopper, prefill_kernel
from fi_cupy.device import device_info
from fi_cupy.dtypes import bfloat16
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.reference.attention import batch_prefill_paged, batch_prefill_ragged, single_prefill
from fi_cupy.testing.generators import normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
Paged, Ragged = prefill.BatchPrefillWithPagedKVCacheWrapper, prefill.BatchPrefillWithRaggedKVCacheWrapper


@pytest.fixture(autouse=True)
def hopper():
    if device_info(0).arch != "90a":
        pytest.skip("no Hopper GPU")


def workspace():
    return cupy.full((64 << 20,), 0xFF, cupy.uint8)


def check(out, lse, want, want_lse):
    got, got_lse = to_float64(out), to_float64(lse)
    assert_close(got, want, to_dtype(out.dtype), "product")
    seen = np.isfinite(want_lse)
    assert (np.isneginf(got_lse) == ~seen).all() and (got[~seen] == 0).all()
    assert (np.abs(got_lse - want_lse)[seen] <= 2e-5 * np.maximum(np.abs(want_lse[seen]), 10)).all()


def single(q, k, v, **options):
    return prefill.single_prefill_with_kv_cache_return_lse(*map(on_gpu, (q, k, v)), backend="fa3", **options)


#: What happens to the running maximum, from the last key (processed first) to the first.
KEY_SCALES = {
    "grows": lambda n: np.geomspace(20, 0.05, n),
    "falls": lambda n: np.geomspace(0.05, 20, n),
    "jumps": lambda n: np.where(np.arange(n) // 80 % 2, 0.1, 12.0),
    "one large key first": lambda n: np.where(np.arange(n) == 0, 40.0, 0.5),
    "equal": lambda n: np.zeros(n),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kind", KEY_SCALES)
def test_lazy_rescaling(rng, kind, dim, causal):
    n = 700
    q, k, v = (normal(rng, (n, 2, dim)) for _ in range(3))
    k = (k.astype(np.float32) * KEY_SCALES[kind](n)[:, None, None]).astype(k.dtype)
    want = single_prefill(*(x.astype(np.float64) for x in (q, k, v)), causal=causal)
    check(*single(q, k, v, causal=causal), *want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_60(rng, dtype):
    """Weights from 2^-86 to 1 in a row, and rows whose maximum lies in the last tile to be processed."""
    n, dim = 500, 128
    q, k = (np.sign(normal(rng, (n, 2, dim), "float32")) for _ in range(2))
    k[::7] = q[::7]
    k[1::7] = -q[1::7]
    q, k, v = q.astype(to_dtype(dtype).np), k.astype(to_dtype(dtype).np), normal(rng, (n, 2, dim), dtype)
    scale = 60 / dim
    want = single_prefill(*(x.astype(np.float64) for x in (q, k, v)), sm_scale=scale)
    check(*single(q, k, v, sm_scale=scale), *want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_nan_behind_a_request_does_not_leak(rng, dims, causal):
    """Requests share a tile's rows in memory with what follows them: here NaN, read only as the end of a tile."""
    lens = [(300, 300), (7, 90), (70, 333), (7, 90), (64, 75), (8, 90), (9, 160), (1, 90), (20, 0), (3, 100)]
    qo, kv = (np.concatenate([[0], np.cumsum([x[i] for x in lens])]) for i in (0, 1))
    q = normal(rng, (int(qo[-1]), 6, dims[0]))
    k, v = (normal(rng, (int(kv[-1]), 2, d)) for d in dims)
    dirty = [x.copy() for x in (k, v)]
    for x in dirty:
        for b in range(1, len(lens), 2):
            x[kv[b] : kv[b + 1]] = np.nan
    wrapper = Ragged(workspace(), backend="fa3")
    wrapper.plan(qo, kv, 6, 2, *dims, causal=causal, q_data_type="bfloat16")
    out, lse = poisoned((len(q), 6, dims[1]), "bfloat16"), poisoned((len(q), 6), "float32")
    wrapper.run(on_gpu(q), *map(on_gpu, dirty), out=out, lse=lse)
    want, want_lse = batch_prefill_ragged(*(x.astype(np.float64) for x in (q, k, v)), qo, kv, causal=causal)
    rows = np.concatenate([np.arange(qo[b], qo[b + 1]) for b in range(0, len(lens), 2)])
    check(out[rows], lse[rows], want[rows], want_lse[rows])


@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("dim", [64, 128])
def test_many_items_a_cta(rng, dim, group):
    """Several hundred pieces of work of every length on one grid, some without keys or rows; 3, 4 and 12 kv heads."""
    kv_heads = {1: 12, 4: 4, 7: 3}[group]
    lens = [(300, 300), (7, 90), (0, 40), (700, 700), (64, 64), (3, 0), (1, 900), (193, 80)] * 8
    qo, kv = (np.concatenate([[0], np.cumsum([x[i] for x in lens])]) for i in (0, 1))
    q = normal(rng, (int(qo[-1]), kv_heads * group, dim))
    k, v = (normal(rng, (int(kv[-1]), kv_heads, dim)) for _ in range(2))
    wrapper = Ragged(workspace(), backend="fa3")
    wrapper.plan(qo, kv, kv_heads * group, kv_heads, dim, causal=True, q_data_type="bfloat16")
    geometry, work = wrapper._planned.geometry, wrapper._planned.work
    assert geometry.grid(work.num_items)[0] < work.num_items * kv_heads
    want = batch_prefill_ragged(*(x.astype(np.float64) for x in (q, k, v)), qo, kv, causal=True)
    gpu = [on_gpu(x) for x in (q, k, v)]
    for i in range(5):  # the counter of the work handed out is back at zero each time
        out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
        wrapper.run(*gpu, out=out, lse=lse, enable_pdl=i % 2 == 0)
        check(out, lse, *want)


def test_padding_of_a_graph_is_handed_out_and_done_nothing_with(rng):
    """A graph's first plan has many items, the later one few: CTAs find padding and an end."""
    buffers = [cupy.zeros(n, cupy.int32) for n in (65, 65)]
    wrapper = Ragged(workspace(), "NHD", True, *buffers, backend="fa3")
    q, k, v = (normal(rng, (6400, h, 128)) for h in (8, 2, 2))
    gpu = [on_gpu(x) for x in (q, k, v)]
    out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
    for rows in (100, 3, 0, 64):
        indptr = np.arange(65) * rows
        wrapper.plan(indptr, indptr, 8, 2, 128, causal=True, q_data_type="bfloat16")
        wrapper.run(*gpu, out=out, lse=lse)
        used = int(indptr[-1])
        want = batch_prefill_ragged(*(x[:used].astype(np.float64) for x in (q, k, v)), indptr, indptr, causal=True)
        check(out[:used], lse[:used], *want)


@pytest.mark.parametrize("page_size", [8, 16, 24, 64, 80, 96, 256])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (192, 128), (256, 256)])
def test_pages_of_many_strides(rng, dims, page_size):
    """Keys and values apart, each a slice of a larger cache: pages and heads have no simple common stride."""
    lens, heads, kv_heads = [(150, 700), (3, 40), (64, 333)], 6, 3
    pages = [-(-n // page_size) for _, n in lens]
    indptr = np.concatenate([[0], np.cumsum(pages)]).astype(np.int32)
    total = int(indptr[-1]) + 2
    table = rng.permutation(total)[: indptr[-1]].astype(np.int32)
    last = np.array([(n - 1) % page_size + 1 for _, n in lens], np.int32)
    qo = np.concatenate([[0], np.cumsum([m for m, _ in lens])])
    caches = [
        normal(rng, (total + 1, page_size + 1, kv_heads + extra, d)) for extra, d in zip((1, 2), dims, strict=True)
    ]
    k, v = (x[:total, 1:, 1 : kv_heads + 1] for x in caches)
    q = normal(rng, (int(qo[-1]), heads, dims[0]))
    wrapper = Paged(workspace(), backend="fa3")
    args = (qo, indptr, table, last)
    wrapper.plan(*args, heads, kv_heads, dims[0], page_size, dims[1], causal=True, q_data_type="bfloat16")
    out, lse = poisoned((len(q), heads, dims[1]), "bfloat16"), poisoned((len(q), heads), "float32")
    gpu = [on_gpu(x)[:total, 1:, 1 : kv_heads + 1] for x in caches]
    wrapper.run(on_gpu(q), tuple(gpu), out=out, lse=lse)
    check(out, lse, *batch_prefill_paged(*(x.astype(np.float64) for x in (q, k, v)), *args, causal=True))


def test_factors_a_head(rng):
    """They are known to the GPU alone, so the logits are scaled one by one."""
    q, k, v = (normal(rng, (400, h, 128)) for h in (8, 2, 2))
    factors = [rng.uniform(0.5, 2, n).astype(np.float32) for n in (8, 2, 2)]
    gpu = [on_gpu(x) for x in (q, k, v, *factors)]
    got = prefill.single_prefill_with_kv_cache_return_lse(*gpu, causal=True, backend="fa3")
    want = single_prefill(
        *(x.astype(np.float64) * f[:, None] for x, f in zip((q, k, v), factors, strict=True)), causal=True
    )
    check(*got, *want)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("dim", "heads", "kv_heads"), [(64, 6, 6), (128, 12, 4), (128, 8, 4), (256, 12, 4)])
def test_alibi_of_any_number_of_heads(rng, dim, heads, kv_heads, causal):
    """A lane's bias counts from its own column, and the lanes of a row must agree on the maximum; slopes up to 0.7."""
    qo, kv = np.array([0, 300, 370, 375, 376]), np.array([0, 300, 633, 636, 765])
    q, k, v = (normal(rng, (n, h, dim)) for n, h in ((376, heads), (765, kv_heads), (765, kv_heads)))
    options = {"causal": causal, "pos_encoding_mode": "ALIBI"}
    wrapper = Ragged(workspace(), backend="fa3")
    wrapper.plan(qo, kv, heads, kv_heads, dim, q_data_type="bfloat16", **options)
    out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
    wrapper.run(*map(on_gpu, (q, k, v)), out=out, lse=lse)
    check(out, lse, *batch_prefill_ragged(*(x.astype(np.float64) for x in (q, k, v)), qo, kv, **options))


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("dim", [64, 128])
def test_both_heights_of_tiles_give_the_same_bits(rng, monkeypatch, dim, group):
    lens = [(300, 300), (7, 90), (440, 440), (64, 64), (3, 0), (1, 400), (193, 80)]  # too few keys to be split
    qo, kv = (np.concatenate([[0], np.cumsum([x[i] for x in lens])]) for i in (0, 1))
    q, k, v = (normal(rng, (int(n), h, dim)) for n, h in ((qo[-1], 3 * group), (kv[-1], 3), (kv[-1], 3)))
    want = batch_prefill_ragged(*(x.astype(np.float64) for x in (q, k, v)), qo, kv, causal=True)
    gpu, results, heights = [on_gpu(x) for x in (q, k, v)], [], []
    monkeypatch.setattr(prefill_kernel, "wants_fine_tiles", lambda load: True)  # with the keys of the short ones
    for short in (False, True):
        monkeypatch.setattr(prefill_kernel, "wants_short_tiles", lambda *given, short=short: short)
        prefill_kernel.geometry.cache_clear()
        wrapper = Ragged(workspace(), backend="fa3")
        wrapper.plan(qo, kv, 3 * group, 3, dim, causal=True, q_data_type="bfloat16")
        out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
        wrapper.run(*gpu, out=out, lse=lse)
        check(out, lse, *want)
        assert wrapper._planned.work.num_split == 0
        heights.append(wrapper._planned.geometry.tiles.tile_q)
        results.append((out.view("u2"), lse.view("u4")))
    prefill_kernel.geometry.cache_clear()
    assert heights == [192, 128] and all((a == b).all() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("megabytes", [0, 0.5, 1000])
@pytest.mark.parametrize("page_size", [0, 8])
def test_requests_side_by_side_give_the_same_bits(rng, monkeypatch, page_size, megabytes):
    """Blocks of one request, of several, and none: the same items in another order, split ones among them."""
    lens = [(300, 300), (7, 90), (900, 1900), (64, 64), (3, 0), (100, 900), (193, 80)] * 5
    qo, kv = (np.concatenate([[0], np.cumsum([x[i] for x in lens])]) for i in (0, 1))
    q = on_gpu(normal(rng, (int(qo[-1]), 8, 128)))

    def run():
        out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
        if page_size:
            wrapper = Paged(workspace(), backend="fa3")
            wrapper.plan(qo, *table, 8, 2, 128, page_size, causal=True, q_data_type="bfloat16")
            wrapper.run(q, cache, out=out, lse=lse)
        else:
            wrapper = Ragged(workspace(), backend="fa3")
            wrapper.plan(qo, kv, 8, 2, 128, causal=True, q_data_type="bfloat16")
            wrapper.run(q, k, v, out=out, lse=lse)
        return out.view("u2"), lse.view("u4"), wrapper._planned.work.num_split

    if page_size:
        pages = [-(-n // page_size) for _, n in lens]
        indptr = np.concatenate([[0], np.cumsum(pages)])
        table = indptr, rng.permutation(indptr[-1]), np.array([(n - 1) % page_size + 1 for _, n in lens])
        cache = on_gpu(normal(rng, (int(indptr[-1]), 2, page_size, 2, 128)))
    else:
        k, v = (on_gpu(normal(rng, (int(kv[-1]), 2, 128))) for _ in range(2))
    want = run()
    monkeypatch.setattr(prefill_hopper, "_BLOCK_BYTES", int(megabytes * (1 << 20)))
    # 35 requests of 2 heads: more than half the CTAs.
    assert (prefill_hopper.block_keys(prefill_hopper.TILES[128, 128], 2, 35, int(kv[-1]), 132) is None) == (
        megabytes > 1
    )
    got = run()
    assert want[2] == got[2] and all((a == b).all() for a, b in zip(got[:2], want[:2], strict=True))


@pytest.mark.parametrize("dim", [64, 128])
def test_the_last_round_of_items_is_split(rng, dim):
    """1,024 tokens over 8,192 keys, 22 tiles of rows of 8 kv heads: values as of whole items, always the same bits."""
    pages, page = 512, 16
    q, cache = on_gpu(normal(rng, (1024, 32, dim))), on_gpu(normal(rng, (pages, 2, page, 8, dim)))
    table, results = rng.permutation(pages), []
    for whole in (True, False):
        wrapper = Paged(workspace(), backend="fa3")
        wrapper.plan(
            [0, 1024], [0, pages], table, [page], 32, 8, dim, page, causal=True, q_data_type="bfloat16",
            disable_split_kv=whole,
        )  # fmt: skip
        plan = wrapper._planned.work
        assert (plan.num_split == 0) if whole else (0 < plan.num_split < 22)
        for _ in range(1 if whole else 50):
            out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
            wrapper.run(q, cache, out=out, lse=lse)
            results.append((out.view("u2"), lse.view("u4")))
    check(out, lse, to_float64(results[0][0].view(out.dtype)), to_float64(results[0][1].view("f4")))
    assert all((a == b).all() for got in results[2:] for a, b in zip(got, results[1], strict=True))


@pytest.mark.parametrize("options", [{}, {"logits_soft_cap": 10.0}, {"pos_encoding_mode": "ALIBI"}])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_same_bits_every_time(rng, dim, options):
    """50 runs, so that a barrier that is passed too early shows."""
    q, k, v = (on_gpu(normal(rng, (3000, h, dim))) for h in (16, 4, 4))
    run = prefill.single_prefill_with_kv_cache_return_lse
    first = [x.view(f"u{x.dtype.itemsize}").copy() for x in run(q, k, v, causal=True, backend="fa3", **options)]
    for _ in range(50):
        for got, want in zip(run(q, k, v, causal=True, backend="fa3", **options), first, strict=True):
            assert (got.view(want.dtype) == want).all()


@pytest.mark.parametrize("page_size", [10, 20, 60, 300])
def test_pages_of_no_whole_swizzles_go_to_the_portable_kernel(rng, page_size):
    """Of 20 rows, which divide a tile of 80, no box can be made."""
    lens = [(300, 300), (90, 470), (700, 700)]
    qo, pages = [0, 300, 390, 1090], [-(-n // page_size) for _, n in lens]
    indptr = np.concatenate([[0], np.cumsum(pages)])
    table = indptr, rng.permutation(indptr[-1]), np.array([(n - 1) % page_size + 1 for _, n in lens])
    q, cache = normal(rng, (1090, 8, 128)), normal(rng, (int(indptr[-1]), 2, page_size, 2, 128))
    wrapper = Paged(workspace())
    wrapper.plan(qo, *table, 8, 2, 128, page_size, causal=True, q_data_type="bfloat16", logits_soft_cap=20.0)
    out, lse = poisoned(q.shape, "bfloat16"), poisoned(q.shape[:2], "float32")
    wrapper.run(on_gpu(q), on_gpu(cache), out=out, lse=lse)
    kv = (cache[:, i].astype(np.float64) for i in (0, 1))
    check(out, lse, *batch_prefill_paged(q.astype(np.float64), *kv, qo, *table, causal=True, logits_soft_cap=20.0))


def test_what_it_does_not_take(rng):
    q, k, v = (on_gpu(normal(rng, (200, 2, 128))) for _ in range(3))
    mask = cupy.ones((200, 200), bool)
    with pytest.raises(errors.UnsupportedError, match=r"backend is 'fa3', but .*custom masks"):
        prefill.single_prefill_with_kv_cache(q, k, v, custom_mask=mask, backend="fa3")
    made = attention.explain(prefill.single_prefill_with_kv_cache, q, k, v, custom_mask=mask)
    assert "portable kernel (mma.sync): custom masks" in str(made)
    odd = on_gpu(normal(rng, (200, 2, 96)))
    with pytest.raises(errors.UnsupportedError, match="head dims 96, 96 are none of"):
        prefill.single_prefill_with_kv_cache(odd, odd, odd, backend="fa3")
    wrapper = Paged(workspace(), backend="fa3")
    with pytest.raises(errors.UnsupportedError, match="page_size 5 is not a multiple of 8"):
        wrapper.plan([0, 200], [0, 40], np.arange(40), [5], 2, 2, 128, 5, q_data_type=bfloat16.name)


@pytest.mark.parametrize("lens", [[], [(0, 0)], [(0, 40), (0, 0)], [(3, 0)]])
def test_nothing_to_do(rng, lens):
    """Arrays without elements have no address; no keys are zeros and -inf."""
    qo, kv = (np.concatenate([[0], np.cumsum([x[i] for x in lens])]).astype(np.int64) for i in (0, 1))
    q, k, v = (normal(rng, (int(n), 2, 128)) for n in (qo[-1], kv[-1], kv[-1]))
    wrapper = Ragged(workspace(), backend="fa3")
    wrapper.plan(qo, kv, 2, 2, 128, causal=True, q_data_type="bfloat16")
    out, lse = wrapper.run(*map(on_gpu, (q, k, v)), return_lse=True)
    assert out.shape == q.shape and (to_float64(out) == 0).all() and np.isneginf(to_float64(lse)).all()
