"""fp8, rotary embedding and factors a head in the prefill kernel: the same call on the CPU reference and on the GPU."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from paged_cases import ROPE_LSE

from fi_cupy import attention, decode, jit, prefill, sparse
from fi_cupy.dtypes import dtype as to_dtype
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
Paged, Ragged = prefill.BatchPrefillWithPagedKVCacheWrapper, prefill.BatchPrefillWithRaggedKVCacheWrapper
Decode = decode.BatchDecodeWithPagedKVCacheWrapper
#: (query tokens, keys): a prompt, a chunk of one, fully masked rows, no keys, no queries, single tokens.
LENS = [(150, 150), (40, 203), (5, 3), (3, 0), (0, 40), (1, 129), (1, 1)]
SHORT = [(37, 70), (5, 3), (3, 0), (0, 9), (20, 130)]
ROPE = {"pos_encoding_mode": "ROPE_LLAMA", "rope_theta": 5e5, "rope_scale": 2.0}


def scratch(on_device, nbytes=32 << 20):
    return cupy.full((nbytes,), 0xFF, cupy.uint8) if on_device else np.zeros(64, np.uint8)


def indptr_of(lens):
    return np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)


def compare(got, want, rope=False):
    """Values, and the lse; rows that see nothing are exactly 0 and -inf."""
    out, lse = got
    wanted, want_lse = (np.asarray(x).astype(np.float64) for x in want)
    values, kind = to_float64(out), out.dtype
    if kind == np.uint8:
        kind = "float8_e4m3fn"
        values = out.get().view(to_dtype(kind).np).astype(np.float64)
    elif kind == np.float32:
        kind = "float16"  # what was multiplied
    assert_close(values, wanted, to_dtype(kind), "rotated" if rope else "product")
    seen, got_lse = np.isfinite(want_lse), to_float64(lse)
    assert (np.isneginf(got_lse) == ~seen).all()
    assert (values[~seen] == 0).all()
    allowed = ROPE_LSE if rope else 2e-5
    assert (np.abs(got_lse - want_lse)[seen] <= allowed * np.maximum(np.abs(want_lse[seen]), 10)).all()


class Batch:
    """Random requests, contiguous and in pages, with NaN wherever a page holds no key."""

    def __init__(self, rng, lens, heads, dims, q="bfloat16", kv="float8_e4m3fn", page_size=16, layout="NHD"):
        self.types, self.layout, self.page_size = {"q_data_type": q, "kv_data_type": kv}, layout, page_size
        (self.heads, self.kv_heads), self.dims = heads, dims if isinstance(dims, tuple) else (dims, dims)
        self.qo, self.kv = (indptr_of([x[i] for x in lens]) for i in (0, 1))
        self.q = normal(rng, (int(self.qo[-1]), self.heads, self.dims[0]), q)
        keys = np.diff(self.kv)
        indptr = indptr_of(-(-keys // page_size))
        indices = rng.permutation(int(indptr[-1]) + 3)[: indptr[-1]].astype(np.int32)
        self.table = indptr, indices, np.where(keys > 0, (keys - 1) % page_size + 1, 1).astype(np.int32)
        self.rows, self.cache = [], []
        for dim in self.dims:
            rows = normal(rng, (int(self.kv[-1]), self.kv_heads, dim), kv)
            cache = np.full((int(indptr[-1]) + 3, page_size, self.kv_heads, dim), np.nan, rows.dtype)
            for b, n in enumerate(keys):
                j = np.arange(n)
                cache[indices[indptr[b] + j // page_size], j % page_size] = rows[self.kv[b] : self.kv[b + 1]]
            hnd = layout == "HND"
            self.rows.append(np.ascontiguousarray(rows.swapaxes(0, 1)) if hnd else rows)
            self.cache.append(np.ascontiguousarray(cache.swapaxes(1, 2)) if hnd else cache)

    def run(self, kind, on_device, plan=None, out_type=None, args=(), **options):
        """(out, lse) of the paged or ragged wrapper on one side."""
        move = on_gpu if on_device else (lambda x: x)
        out_type = out_type if on_device else "float32"
        wrapper = kind(scratch(on_device), self.layout)
        if kind is Ragged:
            where, sizes, arrays = (self.qo, self.kv), (self.heads, self.kv_heads, *self.dims), self.rows
        else:
            where = (self.qo, *self.table)
            sizes, arrays = (self.heads, self.kv_heads, self.dims[0], self.page_size, self.dims[1]), self.cache
        wrapper.plan(*where, *sizes, **self.types, o_data_type=out_type, **(plan or {}))
        arrays = tuple(move(x) for x in arrays)
        rows = self.q.shape[:2]
        if on_device:
            out = poisoned((*rows, self.dims[1]), out_type or self.types["q_data_type"])
            options.update(out=out, lse=poisoned(rows, "float32"))
        options = {name: move(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
        arguments = arrays if kind is Ragged else (arrays,)
        return wrapper.run(move(self.q), *arguments, *(move(x) for x in args), return_lse=True, **options)

    def check(self, kind=Paged, plan=None, out_type=None, args=(), **options):
        rope = (plan or {}).get("pos_encoding_mode") == "ROPE_LLAMA"
        want = self.run(kind, False, plan, args=args, **options)
        compare(self.run(kind, True, plan, out_type, args, **options), want, rope)


def factors(rng, n, signed=False):
    x = rng.uniform(0.5, 1.5, n).astype(np.float32)
    return np.where(np.arange(n) % 2, -x, x).astype(np.float32) if signed else x


@pytest.mark.parametrize(("q", "kv"), [("bfloat16", "float8_e4m3fn"), ("float16", "float8_e5m2")])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("page_size", [1, 3, 16])
def test_fp8_pages(rng, q, kv, layout, page_size):
    batch = Batch(rng, LENS, (4, 2), 128, q, kv, page_size, layout)
    batch.check(plan={"causal": True}, k_scale=1.5, v_scale=0.25)


@pytest.mark.parametrize(("q", "kv"), [("bfloat16", "float8_e5m2"), ("float16", "float8_e4m3fn")])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_fp8_ragged(rng, q, kv, layout):
    batch = Batch(rng, LENS, (4, 2), 64, q, kv, layout=layout)
    for plan in ({"causal": True}, {"causal": True, "window_left": 20}, {"window_left": 0}, {}):
        batch.check(Ragged, plan, q_scale=0.5, k_scale=1.5, v_scale=0.25)


@pytest.mark.parametrize("dims", [8, 40, 72, 80, 96, 112, (192, 128), (64, 72)])
def test_fp8_head_dims(rng, dims):
    Batch(rng, SHORT, (4, 2), dims, page_size=5).check(plan={"causal": True})


@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (9, 3), (40, 1)])
def test_fp8_groups(rng, heads):
    batch = Batch(rng, SHORT, heads, 64)
    batch.check(plan={"causal": True})
    batch.check(plan={"causal": True, "sm_scale": 0.2}, sinks=normal(rng, heads[:1], "float32"))


@pytest.mark.parametrize(
    "plan",
    [
        {"logits_soft_cap": 5.0}, {"pos_encoding_mode": "ALIBI"}, {"sm_scale": -0.1},
        {"pos_encoding_mode": "ALIBI", "logits_soft_cap": 8.0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("scaled", [False, True])
def test_fp8_logits(rng, plan, scaled):
    batch = Batch(rng, SHORT, (9, 3), 64)
    options = {"q_scale": factors(rng, 9), "k_scale": factors(rng, 3, signed=True)} if scaled else {"k_scale": 1.5}
    batch.check(plan={"causal": True, **plan}, **options)


def masks_of(rng, lens):
    masks = [rng.random((m, n)) < 0.5 for m, n in lens]
    masks[0][3] = False
    return np.concatenate([m.reshape(-1) for m in masks])


@pytest.mark.parametrize("plan", [{}, ROPE])
def test_custom_mask(rng, plan):
    batch = Batch(rng, SHORT, (4, 2), 64)
    batch.check(plan={"custom_mask": masks_of(rng, SHORT), "window_left": 30, **plan})


@pytest.mark.parametrize("lens", [[(5, 9000), (3, 4000)], [(1, 20000)], [(200, 6000)]])
def test_fp8_split(rng, lens):
    batch = Batch(rng, lens, (8, 2), 128)
    batch.check(plan={"causal": True}, v_scale=0.5)
    scales = {"q_scale": factors(rng, 8, signed=True), "k_scale": factors(rng, 2), "v_scale": factors(rng, 2, True)}
    batch.check(plan={"causal": True}, **scales)


@pytest.mark.older_archs
@pytest.mark.parametrize(("dim", "plan"), [(64, {}), (40, {}), (64, ROPE)])
def test_older_fp8(rng, dim, plan):
    Batch(rng, SHORT, (4, 2), dim, "float16").check(plan={"causal": True, **plan})


# -- factors a head ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Paged, Ragged])
@pytest.mark.parametrize("kv", ["bfloat16", "float8_e4m3fn"])
def test_head_scales(rng, kind, kv):
    batch = Batch(rng, LENS, (6, 2), 64, kv=kv)
    q, k, v = factors(rng, 6, signed=True), factors(rng, 2, signed=True), factors(rng, 2, signed=True)
    plan = {"causal": True}
    batch.check(kind, plan, q_scale=q, k_scale=k, v_scale=v)
    batch.check(kind, plan, k_scale=k)
    batch.check(kind, plan, q_scale=0.5, v_scale=v)  # the logits are the plain kernel's
    batch.check(kind, plan, q_scale=q[:1], k_scale=k[:1], v_scale=v[:1])  # on the GPU: one factor for all heads
    batch.check(kind, plan, q_scale=q, sinks=normal(rng, (6,), "float32"))


def test_one_factor_on_the_gpu(rng):
    batch = Batch(rng, SHORT, (6, 2), 64, kv="bfloat16")
    wrapper = Paged(scratch(True))
    wrapper.plan(batch.qo, *batch.table, 6, 2, 64, 16, causal=True, **batch.types)
    q, cache = on_gpu(batch.q), tuple(map(on_gpu, batch.cache))
    one = cupy.full(1, 0.5, cupy.float32)
    got = wrapper.run(q, cache, q_scale=one, k_scale=one, v_scale=one[0], return_lse=True)
    compare(got, batch.run(Paged, False, {"causal": True}, q_scale=0.5, k_scale=0.5, v_scale=0.5))


@pytest.mark.parametrize(("kind", "out"), [(Paged, "bfloat16"), (Paged, "float32"), (Paged, None), (Ragged, "float16")])
def test_fp8_queries(rng, kind, out):
    """By position, as FlashInfer has it; without o_data_type the output is fp8 like q."""
    batch = Batch(rng, LENS, (6, 2), 64, "float8_e4m3fn")
    args = factors(rng, 6), factors(rng, 2), factors(rng, 2)
    batch.check(kind, {"causal": True}, out, args)
    batch.check(kind, {"causal": True}, out, v_scale=2.0)


@pytest.mark.parametrize("dims", [72, (192, 128)])
def test_fp8_queries_of_other_dims(rng, dims):
    Batch(rng, SHORT, (4, 2), dims, "float8_e5m2", "float8_e5m2").check(plan={"causal": True}, out_type="bfloat16")


def test_fp8_outputs_saturate(rng):
    batch = Batch(rng, SHORT, (4, 2), 64, "float8_e4m3fn")
    got, _ = batch.run(Paged, True, {"causal": True}, v_scale=1e4)
    want, _ = batch.run(Paged, False, {"causal": True}, v_scale=1e4)
    values = got.get().view(to_dtype("float8_e4m3fn").np).astype(np.float64)
    assert np.abs(values).max() == 448 and not np.isnan(values).any()
    assert (np.sign(values) == np.sign(want))[np.abs(want) > 448].all()


@pytest.mark.parametrize(("dtype", "out"), [("bfloat16", "float32"), ("float16", "bfloat16")])
@pytest.mark.parametrize("lens", [SHORT, [(5, 9000)]])
def test_other_outputs(rng, dtype, out, lens):
    batch = Batch(rng, lens, (4, 2), 64, dtype, dtype)
    want, _ = batch.run(Paged, False, {"causal": True})
    got, _ = batch.run(Paged, True, {"causal": True}, out)
    assert got.dtype == to_dtype(out).np
    assert_close(to_float64(got), want.astype(np.float64), "bfloat16" if "bfloat16" in (dtype, out) else out, "product")


# -- rotary embedding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Paged, Ragged])
@pytest.mark.parametrize(("q", "kv"), [("bfloat16", "bfloat16"), ("bfloat16", "float8_e4m3fn")])
@pytest.mark.parametrize("plan", [{"causal": True}, {}, {"causal": True, "window_left": 20}])
def test_rope(rng, kind, q, kv, plan):
    """Without causality the queries of (5, 3) are at negative positions."""
    Batch(rng, LENS, (6, 2), 128, q, kv).check(kind, {**plan, **ROPE})


@pytest.mark.parametrize("dims", [16, 80, 112, 256, (192, 128)])
def test_rope_head_dims(rng, dims):
    Batch(rng, SHORT, (4, 2), dims, kv="bfloat16", page_size=3).check(plan={"causal": True, **ROPE})


@pytest.mark.parametrize("lens", [[(5, 9000)], [(300, 20000)]])
def test_rope_far_positions(rng, lens):
    """Positions of five digits: the angle's fraction of a turn is exact."""
    plan = {"causal": True, "pos_encoding_mode": "ROPE_LLAMA"}
    Batch(rng, lens, (8, 2), 128, kv="bfloat16").check(plan=plan)


def test_rope_is_exact_where_rounding_does_not_matter(rng):
    """One-hot queries and keys: the logits are cosines and sines of position differences, to fp16's precision."""
    n = 700
    q, k = np.zeros((1, 1, 64), np.float16), np.zeros((n, 1, 64), np.float16)
    q[0, 0, 0], k[:, 0, 0] = 1, 1
    v = normal(rng, (n, 1, 64), "float16")
    options = {"pos_encoding_mode": "ROPE_LLAMA", "sm_scale": 4.0, "return_lse": True}
    out, lse = prefill.single_prefill_with_kv_cache(*map(on_gpu, (q, k, v)), **options)
    angle = n - 1 - np.arange(n)  # the first frequency is 1
    s = 4.0 * np.cos(angle.astype(np.float64))
    p = np.exp(s)
    assert abs(float(lse[0, 0]) - np.log2(p.sum())) < 2e-3
    assert_close(to_float64(out)[0, 0], p @ v[:, 0].astype(np.float64) / p.sum(), "float16", "product")


def test_rope_and_logits(rng):
    batch = Batch(rng, SHORT, (6, 2), 64)
    scales = {"q_scale": factors(rng, 6), "k_scale": factors(rng, 2), "v_scale": factors(rng, 2)}
    plan = {"causal": True, "logits_soft_cap": 6.0, **ROPE}
    batch.check(plan=plan, sinks=normal(rng, (6,), "float32"), **scales)


@lru_cache
def variant():
    return jit.define_variant(
        name="odd_keys", mask_mode="causal", query_fn=lambda q, c: q * 0.5,
        key_fn=lambda k, c: jit.ops.where((c.kv_idx + c.kv_head) % 3 == 0, -k, k),
        score_fn=lambda score, c: score + 0.01 * c.kv_idx,
    )  # fmt: skip


@pytest.mark.parametrize("plan", [{}, ROPE])
@pytest.mark.parametrize("scaled", [False, True])
def test_variant_on_fp8(rng, plan, scaled):
    batch = Batch(rng, SHORT, (4, 2), 64)
    options = {"k_scale": factors(rng, 2), "v_scale": factors(rng, 2)} if scaled else {}
    results = []
    for on_device in (False, True):
        move = on_gpu if on_device else (lambda x: x)
        wrapper = Paged(scratch(on_device), variant=variant())
        out = None if on_device else "float32"
        wrapper.plan(batch.qo, *batch.table, 4, 2, 64, 16, causal=True, **batch.types, o_data_type=out, **plan)
        given = {name: move(x) for name, x in options.items()}
        results.append(wrapper.run(move(batch.q), tuple(map(move, batch.cache)), return_lse=True, **given))
    compare(results[1], results[0], bool(plan))


# -- what is built on it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(
    ("q", "kv", "options"),
    [
        ("bfloat16", "float8_e4m3fn", {"causal": True, "k_scale": 2.0, "v_scale": 0.5}),
        ("bfloat16", "float8_e4m3fn", {"scale_q": 6, "scale_k": 2, "scale_v": 2}),
        ("float8_e4m3fn", "float8_e4m3fn", {"causal": True, "o_dtype": "bfloat16", "scale_q": 6, "scale_k": 2}),
        ("float16", "float16", {"causal": True, **ROPE}),
    ],
)
def test_single(rng, layout, q, kv, options):
    shapes = ((50, 6, 64), q), ((177, 2, 64), kv), ((177, 2, 64), kv)
    arrays = [normal(rng, shape, kind) for shape, kind in shapes]
    if layout == "HND":
        arrays[1:] = [np.ascontiguousarray(x.swapaxes(0, 1)) for x in arrays[1:]]
    options = {n: factors(rng, x) if n.startswith("scale_") else x for n, x in options.items()}
    given = {n: on_gpu(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    gpu = list(map(on_gpu, arrays))
    run = prefill.single_prefill_with_kv_cache
    got = run(*gpu, kv_layout=layout, return_lse=True, **given)
    want = run(*arrays, kv_layout=layout, return_lse=True, **{**options, "o_dtype": "float32"})
    compare(got, want, "pos_encoding_mode" in options)


def test_wrappers_take_an_fp8_cache(rng):
    batch = Batch(rng, [(40, 200), (2, 90), (1, 300)], (8, 2), 64)
    kv_len = np.diff(batch.kv)
    sinks, k_scale = normal(rng, (8,), "float32"), factors(rng, 2)
    q, cache = on_gpu(batch.q), tuple(map(on_gpu, batch.cache))
    plan = {"causal": True}
    mixed = attention.BatchAttention()
    mixed.plan(batch.qo, *batch.table[:2], kv_len, 8, 2, 64, 64, 16, causal=True, **batch.types)
    compare(mixed.run(q, cache, k_scale=on_gpu(k_scale)), batch.run(Paged, False, plan, k_scale=k_scale))
    compare(mixed.run(q, cache, v_scale=2.0), batch.run(Paged, False, plan, v_scale=2.0))
    sink = attention.BatchAttentionWithAttentionSinkWrapper(
        scratch(True), kv_data_type="float8_e4m3fn", head_dim_qk=64, head_dim_vo=64
    )
    sink.plan(batch.qo, *batch.table, 8, 2, 64, 16, causal=True)
    compare(sink.run(q, cache, on_gpu(sinks), return_lse=True), batch.run(Paged, False, plan, sinks=sinks))
    levels = attention.MultiLevelCascadeAttentionWrapper(1, scratch(True))
    levels.plan([batch.qo], *([x] for x in batch.table), 8, 2, 64, 16, causal=True, **batch.types)
    compare(levels.run(q, cache, return_lse=True), batch.run(Paged, False, plan))


@pytest.mark.parametrize(("dim", "scaled", "plan"), [(64, False, {}), (64, True, {}), (40, True, {}), (64, True, ROPE)])
def test_pod_takes_fp8_and_other_decode_plans(rng, dim, scaled, plan):
    """One launch where the decode kernel takes the cache, else two; dimension 40 decodes in the prefill kernel."""
    batch = decode_batch(rng, 1, heads=(8, 2), dims=dim)
    prompt = [normal(rng, (n, h, dim), kind) for n, h, kind in ((50, 8, "bfloat16"), *[(90, 2, "float8_e4m3fn")] * 2)]
    scales = {"k_scale": factors(rng, 2), "v_scale": factors(rng, 2)} if scaled else {"k_scale": 2.0}
    results = []
    for on_device in (False, True):
        move = on_gpu if on_device else (lambda x: x)
        wrapper = attention.PODWithPagedKVCacheWrapper(scratch(on_device))
        wrapper.plan(*batch.table, 8, 2, dim, 16, **batch.types, **plan)
        given = {name: move(x) if isinstance(x, np.ndarray) else x for name, x in scales.items()}
        results.append(
            wrapper.run(
                *map(move, prompt), move(batch.q), tuple(map(move, batch.cache)), causal_p=True, return_lse_p=True,
                return_lse_d=True, **given,
            )
        )  # fmt: skip
    for got, want in zip(results[1], results[0], strict=True):
        compare(got, want, bool(plan))


def test_block_sparse_takes_fp8(rng):
    q, k, v = normal(rng, (32, 4, 64)), *(normal(rng, (64, 2, 64), "float8_e4m3fn") for _ in range(2))
    scales = {"scale_q": factors(rng, 4), "scale_k": factors(rng, 2), "scale_v": factors(rng, 2)}
    results = []
    for on_device in (False, True):
        move = on_gpu if on_device else (lambda x: x)
        wrapper = sparse.BlockSparseAttentionWrapper(scratch(on_device))
        wrapper.plan(
            [0, 2, 3], [0, 3, 1], 32, 64, 16, 16, 4, 2, 64, q_data_type="bfloat16", kv_data_type="float8_e4m3fn",
            o_data_type=None if on_device else "float32",
        )  # fmt: skip
        given = {name: move(x) for name, x in scales.items()}
        results.append(wrapper.run(*map(move, (q, k, v)), return_lse=True, **given))
    compare(results[1], results[0])


def test_graph_with_everything(rng):
    """A captured run of fp8, rotation and factors follows a later plan."""
    lens = [(20, 300), (7, 90)]
    batch = Batch(rng, lens, (6, 2), 64)
    buffers = [cupy.zeros(n, cupy.int32) for n in (3, 3, 100, 2)]
    wrapper = Paged(scratch(True), "NHD", True, *buffers)
    scales = {"k_scale": factors(rng, 2), "v_scale": factors(rng, 2)}
    given = {name: on_gpu(x) for name, x in scales.items()}

    def plan(b):
        wrapper.plan(b.qo, *b.table, 6, 2, 64, 16, causal=True, **b.types, **ROPE)

    plan(batch)
    q, cache = on_gpu(batch.q), tuple(map(on_gpu, batch.cache))
    out, lse = wrapper.run(q, cache, return_lse=True, **given)
    stream = new_stream()
    with stream:
        stream.begin_capture()
        wrapper.run(q, cache, out=out, lse=lse, return_lse=True, **given)
        graph = stream.end_capture()
    other = Batch(rng, [(27, 200), (0, 190)], (6, 2), 64)
    with stream:
        plan(other)
        q.view("u2")[...] = on_gpu(other.q).view("u2")
        for mine, theirs in zip(cache, other.cache, strict=True):
            mine[: len(theirs)] = on_gpu(theirs)[: len(mine)]
        graph.launch()
        stream.synchronize()
    compare((out, lse), other.run(Paged, False, {"causal": True, **ROPE}, **scales), rope=True)


# -- decoding ---------------------------------------------------------------------------------------------------------

DECODE_LENS = [1, 3, 16, 17, 0, 64, 333, 1200]


def decode_batch(rng, count, lens=None, **options):
    lens = DECODE_LENS if lens is None else lens
    return Batch(rng, [(count, n) for n in lens], **options)


def run_decode(batch, on_device, count, plan=None, **options):
    move = on_gpu if on_device else (lambda x: x)
    wrapper = Decode(scratch(on_device), batch.layout)
    sizes = batch.heads, batch.kv_heads, batch.dims[0], batch.page_size
    out = None if on_device else "float32"
    wrapper.plan(*batch.table, *sizes, **batch.types, o_data_type=out, q_len_per_req=count, **(plan or {}))
    options = {name: move(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    rows = batch.q.shape[:2]
    if on_device:
        out = poisoned((*rows, batch.dims[1]), batch.types["q_data_type"])
        options.update(out=out, lse=poisoned(rows, "float32"))
    cache = tuple(map(move, batch.cache))
    return wrapper.run(move(batch.q), cache, return_lse=True, q_len_per_req=count, **options)


def check_decode(batch, count=1, plan=None, **options):
    rope = (plan or {}).get("pos_encoding_mode") == "ROPE_LLAMA"
    compare(run_decode(batch, True, count, plan, **options), run_decode(batch, False, count, plan, **options), rope)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("kv", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_several_queries_a_request(rng, count, kv, layout):
    """Causal at the end of the keys; requests with fewer keys than queries have rows that see nothing."""
    batch = decode_batch(rng, count, heads=(8, 2), dims=64, kv=kv, layout=layout)
    check_decode(batch, count)
    check_decode(batch, count, {"window_left": 20}, k_scale=factors(rng, 2), v_scale=0.5)
    check_decode(batch, count, sinks=normal(rng, (8,), "float32"))


@pytest.mark.parametrize(
    ("dims", "kv", "plan"),
    [
        (40, "float8_e4m3fn", {}), (72, "float8_e5m2", {}), (80, "bfloat16", ROPE), (96, "float8_e4m3fn", ROPE),
        (48, "float8_e4m3fn", ROPE),
    ],
)  # fmt: skip
def test_decode_dims_of_the_prefill_kernel(rng, dims, kv, plan):
    batch = decode_batch(rng, 1, heads=(8, 2), dims=dims, kv=kv, page_size=5)
    check_decode(batch, 1, plan, k_scale=0.5)


def test_decode_fp8_queries(rng):
    batch = decode_batch(rng, 1, heads=(8, 2), dims=64, q="float8_e4m3fn")
    check_decode(batch, q_scale=factors(rng, 8), k_scale=factors(rng, 2), v_scale=factors(rng, 2))


@pytest.mark.parametrize("kv", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("plan", [{}, {"logits_soft_cap": 5.0, "pos_encoding_mode": "ALIBI"}, ROPE])
def test_decode_head_scales(rng, kv, plan):
    """In the decode kernel itself, whole and split, with sinks."""
    batch = decode_batch(rng, 1, [*DECODE_LENS, 9000], heads=(20, 2), dims=64, kv=kv)
    scales = {"q_scale": factors(rng, 20, signed=True), "k_scale": factors(rng, 2), "v_scale": factors(rng, 2, True)}
    check_decode(batch, 1, plan, **scales)
    check_decode(batch, 1, plan, v_scale=scales["v_scale"], sinks=normal(rng, (20,), "float32"))
    check_decode(batch, 1, plan, k_scale=scales["k_scale"], q_scale=0.5)


@pytest.mark.parametrize(
    ("q", "kv", "dim", "options"),
    [
        ("bfloat16", "bfloat16", 64, {"q_scale": 6, "k_scale": 2, "v_scale": 2}),
        ("bfloat16", "float8_e4m3fn", 40, {"k_scale": 2, "window_left": 30}),
        ("bfloat16", "float8_e4m3fn", 96, {**ROPE}),
        ("float8_e4m3fn", "float8_e4m3fn", 64, {"q_scale": 6}),
    ],
)
@pytest.mark.parametrize("n", [0, 1, 700])
def test_single_decode(rng, q, kv, dim, options, n):
    arrays = normal(rng, (6, dim), q), normal(rng, (n, 2, dim), kv), normal(rng, (n, 2, dim), kv)
    options = {x: factors(rng, y) if x.endswith("_scale") and x != "rope_scale" else y for x, y in options.items()}
    given = {x: on_gpu(y) if isinstance(y, np.ndarray) else y for x, y in options.items()}
    got = decode.single_decode_with_kv_cache(*map(on_gpu, arrays), return_lse=True, **given)
    wide = [x.astype(np.float32) if x.dtype == arrays[0].dtype else x for x in arrays]
    if q != kv:
        wide = [arrays[0].astype(np.float32), *arrays[1:]]
    want = decode.single_decode_with_kv_cache(*wide, return_lse=True, **options)
    compare(got, want, "pos_encoding_mode" in options)


def test_decode_graph_by_the_prefill_kernel(rng):
    batch = decode_batch(rng, 3, [40, 7, 500], heads=(8, 2), dims=64, kv="bfloat16")
    buffers = [cupy.zeros(n, cupy.int32) for n in (4, 100, 3)]
    wrapper = decode.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(scratch(True), *buffers)
    wrapper.plan(*batch.table, 8, 2, 64, 16, **batch.types, q_len_per_req=3)
    q, cache = on_gpu(batch.q), tuple(map(on_gpu, batch.cache))
    out, lse = wrapper.run(q, cache, return_lse=True)
    stream = new_stream()
    with stream:
        stream.begin_capture()
        wrapper.run(q, cache, out=out, lse=lse, return_lse=True)
        graph = stream.end_capture()
    other = decode_batch(rng, 3, [2, 450, 60], heads=(8, 2), dims=64, kv="bfloat16")
    with stream:
        wrapper.plan(*other.table, 8, 2, 64, 16, **other.types, q_len_per_req=3)
        q.view("u2")[...] = on_gpu(other.q).view("u2")
        for mine, theirs in zip(cache, other.cache, strict=True):
            mine.view("u2")[: len(theirs)] = on_gpu(theirs).view("u2")[: len(mine)]
        graph.launch()
        stream.synchronize()
    compare((out, lse), run_decode(other, False, 3))


def test_explain_says_which_kernel(rng):
    batch = decode_batch(rng, 2, [40, 7], heads=(8, 2), dims=64)
    wrapper = Decode(scratch(True))
    wrapper.plan(*batch.table, 8, 2, 64, 16, **batch.types, q_len_per_req=2)
    (use, *_) = attention.explain(wrapper).launches
    assert use.kernel.startswith("prefill_bf16_kve4m3_d64")
    assert use.why.startswith("the prefill kernel, since q_len_per_req is 2: ")
    wrapper.plan(*batch.table, 8, 2, 64, 16, **batch.types)
    assert attention.explain(wrapper).launches[0].kernel.startswith("batch_decode_bf16_kve4m3_d64")
    q, k = on_gpu(normal(rng, (8, 40))), on_gpu(normal(rng, (9, 2, 40), "float8_e4m3fn"))
    (use, *_) = attention.explain(decode.single_decode_with_kv_cache, q, k, k).launches
    assert use.kernel.startswith("prefill_bf16_kve4m3_d40") and "head_dim 40 is no multiple of 16" in use.why
