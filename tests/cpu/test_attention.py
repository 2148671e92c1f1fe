"""Mixed batches, attention sinks and `explain` on CPU arrays, against plain loops."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from naive_attention import Pages, attend, seen

import fi_cupy
from fi_cupy import attention, batch_attention, errors, mixed
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import bfloat16
from fi_cupy.prefill_kernel import Problem
from fi_cupy.prefill_plan import Work
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

HEADS, KV_HEADS, DIM = 4, 2, 16
#: (queries, keys): a prompt, single tokens, fully masked rows, no keys, no queries.
LENS = [(30, 33), (1, 20), (1, 0), (5, 3), (0, 9), (9, 9), (1, 1)]
HOPPER = DeviceInfo(90, "90a", 132, 232448, 233472, 50 << 20)


def workspace():
    return np.zeros(1 << 12, np.uint8)


class Batch:
    def __init__(self, rng, lens=LENS, page_size=4, layout="NHD", dtype="float32"):
        self.lens, self.layout, self.dtype = lens, layout, dtype
        self.q = normal(rng, (sum(m for m, _ in lens), HEADS, DIM), dtype)
        self.sequences = [tuple(normal(rng, (n, KV_HEADS, DIM), dtype) for _ in range(2)) for _, n in lens]
        pages = Pages(rng, 90, page_size, KV_HEADS, DIM, self.q.dtype, layout)
        self.table, self.cache = pages.add(self.sequences), pages.cache
        self.qo = np.concatenate([[0], np.cumsum([m for m, _ in lens])]).astype(np.int32)
        self.kv_len = np.array([n for _, n in lens], np.int32)

    def expect(self, causal=False, window=-1, **options):
        parts = []
        for b, ((m, n), (k, v)) in enumerate(zip(self.lens, self.sequences, strict=True)):
            q = self.q[self.qo[b] : self.qo[b + 1]]
            parts.append(attend(q, k, v, seen(m, n, causal, window), **options))
        return tuple(np.concatenate([p[i] for p in parts]) for i in (0, 1))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("page_size", [1, 4])
def test_mixed_batch(rng, layout, causal, page_size):
    batch = Batch(rng, page_size=page_size, layout=layout)
    wrapper = fi_cupy.BatchAttention(layout, "cpu")
    indptr, indices, _ = batch.table
    wrapper.plan(
        batch.qo, indptr, indices, batch.kv_len, HEADS, KV_HEADS, DIM, DIM, page_size, causal, 0.3, 2.0, "float32",
        "float32",
    )  # fmt: skip
    want, want_lse = batch.expect(causal, scale=0.3 * 2.0, cap=2.0)
    out, lse = np.full_like(batch.q, np.nan), np.full(batch.q.shape[:2], np.nan, np.float32)
    got = wrapper.run(batch.q, batch.cache, out, lse, k_scale=2.0, v_scale=0.5, logits_soft_cap=2.0)
    assert got[0] is out and got[1] is lse
    assert_close(out, want * 0.5, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")
    again, again_lse = wrapper.run(batch.q, np.stack(batch.cache, axis=1), k_scale=2.0, v_scale=0.5)
    assert (again == out).all() and (again_lse == lse).all()


def test_more_pages_than_the_keys_fill(rng):
    batch = Batch(rng, [(2, 9), (3, 0)])
    indptr, indices, _ = batch.table
    spare = np.array([50], np.int32)
    wrapper = attention.BatchAttention(device="cpu")
    wrapper.plan(
        batch.qo, indptr + np.array([0, 1, 2]), np.concatenate([indices, spare, spare]), batch.kv_len, HEADS, KV_HEADS,
        DIM, DIM, 4, True, q_data_type="float32", kv_data_type="float32",
    )  # fmt: skip
    out, lse = wrapper.run(batch.q, batch.cache)
    want, want_lse = batch.expect(True)
    assert_close(out, want, "float32", "product")
    assert_close(lse, want_lse, "float32", "product")


def test_bfloat16_default_torch_and_jax(rng):
    batch = Batch(rng, dtype="bfloat16")
    indptr, indices, _ = batch.table
    plan = (batch.qo, indptr, indices, batch.kv_len, HEADS, KV_HEADS, DIM, DIM, 4)
    wrapper = attention.BatchAttention(device="cpu")
    wrapper.plan(*plan)
    out, _ = wrapper.run(batch.q, batch.cache)
    assert_close(out, batch.expect()[0], "bfloat16", "product")
    torch = pytest.importorskip("torch")
    jnp = pytest.importorskip("jax.numpy")
    batch = Batch(rng)
    for make, kind in ((torch.tensor, "torch"), (jnp.asarray, "jax")):
        wrapper = attention.BatchAttention(device=torch.device("cpu"))
        wrapper.plan(*(make(x) for x in (batch.qo, *batch.table[:2], batch.kv_len)), *plan[4:])
        out, lse = wrapper.run(make(batch.q), tuple(make(x) for x in batch.cache))
        assert type(out).__module__.startswith(kind) and type(lse).__module__.startswith(kind)
        assert_close(np.asarray(out), batch.expect()[0], "float32", "product")


def test_batch_attention_errors(rng):
    batch = Batch(rng)
    indptr, indices, _ = batch.table
    sizes = (HEADS, KV_HEADS, DIM, DIM, 4)
    with pytest.raises(errors.ArgumentError, match="device is tpu"):
        attention.BatchAttention(device="tpu")
    wrapper = attention.BatchAttention(device="cpu")
    with pytest.raises(errors.PlanError, match=r"plan\(\) must come first"):
        wrapper.run(batch.q, batch.cache)
    with pytest.raises(errors.PlanError, match="has no plan yet"):
        attention.explain(wrapper)
    with pytest.raises(errors.ArgumentError, match=r"kv_len_arr\[0\] is 37, expected 0 to 36"):
        wrapper.plan(batch.qo, indptr, indices, np.array([37, *batch.kv_len[1:]]), *sizes)
    with pytest.raises(errors.ShapeError, match="kv_len_arr has shape"):
        wrapper.plan(batch.qo, indptr, indices, batch.kv_len[1:], *sizes)
    with pytest.raises(errors.UnsupportedError, match="use_profiler"):
        wrapper.plan(batch.qo, indptr, indices, batch.kv_len, *sizes, use_profiler=True)
    wrapper.plan(batch.qo, indptr, indices, batch.kv_len, *sizes)
    with pytest.raises(errors.PlanError, match=r"logits_soft_cap is 30\.0, planned 0\.0"):
        wrapper.run(batch.q, batch.cache, logits_soft_cap=30.0)
    with pytest.raises(errors.UnsupportedError, match="profiler_buffer is not supported"):
        wrapper.run(batch.q, batch.cache, profiler_buffer=np.zeros(1))
    with pytest.raises(errors.ArgumentError, match="the cache has 3 pages"):
        wrapper.run(batch.q, tuple(x[:3] for x in batch.cache))


@pytest.mark.parametrize("window", [-1, 4])
def test_trap_15_sinks(rng, window):
    batch = Batch(rng)
    sink = normal(rng, (HEADS,), "float32")
    wrapper = fi_cupy.BatchAttentionWithAttentionSinkWrapper(
        workspace(), q_data_type="float32", kv_data_type="float32", head_dim_qk=DIM, head_dim_vo=DIM, window_left=window
    )
    plan = (batch.qo, *batch.table, HEADS, KV_HEADS, DIM, 4)
    wrapper.plan(*plan, causal=True)
    assert wrapper.workspace_size(*plan, causal=True) == (0, 0)
    want, want_lse = batch.expect(True, window, scale=0.3, sinks=sink)
    for call in (
        lambda: wrapper.run(batch.q, batch.cache, sink, 0.3, return_lse=True),
        lambda: wrapper.run_return_lse(batch.q, batch.cache, sinks=sink, sm_scale=0.3),
    ):
        out, lse = call()
        assert_close(out, want, "float32", "product")
        assert_close(lse, want_lse, "float32", "product")
    default = wrapper.run(batch.q, batch.cache, sink)
    assert_close(default, batch.expect(True, window, sinks=sink)[0], "float32", "product")
    wrapper.begin_forward(*plan, causal=True, window_left=window, q_data_type="float32", kv_data_type="float32")
    assert (wrapper.run(batch.q, batch.cache, sink) == default).all()


def test_sink_errors(rng):
    batch = Batch(rng)
    wrapper = attention.BatchAttentionWithAttentionSinkWrapper(workspace(), q_data_type="float32", window_left=3)
    with pytest.raises(errors.PlanError, match="head_dim_qk is 16, the constructor said 128"):
        wrapper.plan(batch.qo, *batch.table, HEADS, KV_HEADS, DIM, 4)
    with pytest.raises(errors.PlanError, match="window_left is 5, the constructor said 3"):
        wrapper.plan(batch.qo, *batch.table, HEADS, KV_HEADS, 128, 4, window_left=5)
    with pytest.raises(errors.ArgumentError, match="page_size missing"):
        wrapper.plan(batch.qo, *batch.table, HEADS, KV_HEADS, 128)
    with pytest.raises(errors.ArgumentError, match="sink is missing"):
        wrapper.run(batch.q, batch.cache)
    with pytest.raises(errors.PlanError, match=r"plan\(\) must come first"):
        wrapper.run(batch.q, batch.cache, np.zeros(HEADS, np.float32))


def test_sinks_take_a_list_of_scales(rng):
    batch, sink = Batch(rng), normal(rng, (HEADS,), "float32")
    wrapper = fi_cupy.BatchAttentionWithAttentionSinkWrapper(
        workspace(), q_data_type="float32", kv_data_type="float32", head_dim_qk=DIM, head_dim_vo=DIM
    )
    wrapper.plan(batch.qo, *batch.table, HEADS, KV_HEADS, DIM, 4)
    factors = [0.5, 1.0, 2.0, 4.0]
    made = wrapper.run(batch.q, batch.cache, sink, 0.3, q_scale=factors)
    want = wrapper.run(batch.q * np.float32(factors)[:, None], batch.cache, sink, 0.3)
    assert_close(made, want, "float32", "product")


def test_explain_says_the_variant():
    q, k = (np.zeros((n, h, 64), bfloat16.np) for n, h in ((16, 4), (4096, 1)))
    variant = fi_cupy.jit.define_variant(name="near", mask_fn=lambda ctx: ctx.kv_idx < ctx.most, scalars={"most": 100})
    plain, near = (
        attention.explain(fi_cupy.single_prefill_with_kv_cache, q, k, k, variant=v, device=HOPPER)
        for v in (None, variant)
    )
    assert near.launches[0].kernel.endswith("_v_near") and "_v_" not in plain.launches[0].kernel
    assert "split" in plain.launches[0].why and "split" not in near.launches[0].why  # two tiles of keys are left


def test_explain_single_functions():
    q, k = (np.zeros((n, h, 128), bfloat16.np) for n, h in ((2048, 32), (4096, 8)))
    made = attention.explain(fi_cupy.single_prefill_with_kv_cache, q, k, k, causal=True, device=HOPPER)
    (use,) = made.launches
    assert use.kernel == "prefill_hopper_bf16_d128_q192k80" and use.grid == (132, 1, 1) and use.kernel in str(made)
    made = attention.explain(
        fi_cupy.single_prefill_with_kv_cache, q, k, k, causal=True, backend="fa2", device=HOPPER
    )  # fmt: skip
    (use,) = made.launches
    assert use.kernel == "prefill_bf16_d128_q128k64" and use.grid == (64, 8, 1) and "backend='fa2'" in str(made)
    made = attention.explain(fi_cupy.single_prefill_with_kv_cache, q[:1], k, k, None, device=HOPPER)
    assert [u.kernel for u in made.launches] == ["prefill_bf16_d128_q16k64"]
    assert "; 1 row tiles have their keys split" in made.launches[0].why and made.launches[0].grid[0] > 1
    made = attention.explain(
        fi_cupy.single_prefill_with_kv_cache, q, k, k, custom_mask=1, logits_soft_cap=3.0, pos_encoding_mode="ALIBI",
        device=HOPPER,
    )  # fmt: skip
    assert made.launches[0].kernel.endswith("_mask_alibi_cap")
    made = attention.explain(fi_cupy.single_decode_with_kv_cache, q[0], k, k, window_left=5, device=HOPPER)
    assert made.launches[0].kernel.startswith("batch_decode_bf16_d128") and made.launches[0].grid == (8, 1, 1)
    assert "NumPy reference" in str(attention.explain(fi_cupy.single_decode_with_kv_cache, q[0], k, k))
    with pytest.raises(errors.ArgumentError, match="expected a planned wrapper"):
        attention.explain(np.zeros)
    with pytest.raises(errors.DTypeError, match="q has dtype float32"):
        x = np.zeros((4, 1, 64), np.float32)
        attention.explain(fi_cupy.single_prefill_with_kv_cache, x, x, x, device=HOPPER)


def test_explain_wrappers(rng):
    batch = Batch(rng)
    indptr, indices, _ = batch.table
    wrapper = attention.BatchAttention(device="cpu")
    wrapper.plan(batch.qo, indptr, indices, batch.kv_len, HEADS, KV_HEADS, DIM, DIM, 4)
    assert str(attention.explain(wrapper)) == "NumPy reference (arrays in host memory)"
    cascade = attention.MultiLevelCascadeAttentionWrapper(2, workspace())
    with pytest.raises(errors.PlanError, match="has no plan yet"):
        attention.explain(cascade)
    decode = attention.BatchDecodeWithPagedKVCacheWrapper(workspace())
    with pytest.raises(errors.PlanError, match="BatchDecodeWithPagedKVCacheWrapper has no plan yet"):
        attention.explain(decode)
    decode.plan([0, 1], [0], [1], 1, 1, 8, 1)
    assert "NumPy reference" in str(attention.explain(decode))


def test_explain_mixed_launches(rng):
    """What a GPU's plan would leave, made by hand."""
    batch = Batch(rng)
    indptr, indices, _ = batch.table
    wrapper = attention.BatchAttention(device="cpu")
    wrapper.plan(batch.qo, indptr, indices, batch.kv_len, HEADS, KV_HEADS, DIM, DIM, 4)
    problem = Problem(32, 8, 128, 128, bfloat16, True, False, False, False)
    part = mixed.Decode(8, 4, 128, bfloat16, bfloat16, bfloat16, True, False, False)
    g = mixed.geometry(problem, part, HOPPER)
    work = Work(0, 40, 3, 0, 0, 0)
    wrapper._batch.both = batch_attention.Planned(g, work, 10, 0, 0, 0, 0, 0, 0)
    (use,) = attention.explain(wrapper).launches
    assert use.kernel == "mixed_prefill_bf16_d128_q128k64_paged_decode_bf16_d128_h8_w4s3b2"
    assert use.grid == (264, 1, 1) and use.threads == 128
    assert "320 tiles of 128 packed rows (40 work items, 3 row tiles split, times 8 kv heads)" in use.why
    assert "80 decode items (10 ranges of keys times 8 head blocks)" in use.why
    assert "184 CTAs begin with a tile, 80 with a decode item" in use.why


def test_the_front_door_has_every_name():
    for name in attention.__all__:
        assert hasattr(attention, name)
        if name not in ("Explanation", "KernelUse", "explain"):
            assert getattr(fi_cupy, name) is getattr(attention, name)


def test_the_log_says_which_kernel_a_plan_or_call_took(caplog):
    q, k = np.ones((7, 8, 64), np.float32), np.ones((7, 2, 64), np.float32)

    def calls():
        fi_cupy.single_prefill_with_kv_cache(q, k, k, causal=True)
        fi_cupy.single_decode_with_kv_cache(q[0], k, k)
        decode = fi_cupy.BatchDecodeWithPagedKVCacheWrapper(np.empty(1 << 20, np.uint8))
        decode.plan([0, 2], [5, 1], [3], 8, 2, 64, 16, q_data_type="float32")
        prefill = fi_cupy.BatchPrefillWithPagedKVCacheWrapper(np.empty(1 << 20, np.uint8))
        prefill.plan([0, 7], [0, 2], [5, 1], [3], 8, 2, 64, 16, q_data_type="float32")
        ragged = fi_cupy.BatchPrefillWithRaggedKVCacheWrapper(np.empty(1 << 20, np.uint8))
        ragged.plan([0, 7], [0, 7], 8, 2, 64, q_data_type="float32")
        both = fi_cupy.BatchAttention(device="cpu")
        both.plan([0, 7], [0, 1], [5], [7], 8, 2, 64, 64, 16, q_data_type="float32", kv_data_type="float32")
        pod = fi_cupy.PODWithPagedKVCacheWrapper(np.empty(1 << 20, np.uint8))
        pod.plan([0, 2], [5, 1], [3], 8, 2, 64, 16, q_data_type="float32")
        pod.run(q, k, k, q[:1], np.ones((6, 2, 16, 2, 64), np.float32))

    with caplog.at_level(logging.INFO, "fi_cupy.attention"):
        calls()
    assert caplog.messages == []
    with caplog.at_level(logging.DEBUG, "fi_cupy.attention"):
        calls()
    who = [
        "single_prefill_with_kv_cache", "single_decode_with_kv_cache", "BatchDecodeWithPagedKVCacheWrapper.plan",
        "BatchPrefillWithPagedKVCacheWrapper.plan", "BatchPrefillWithRaggedKVCacheWrapper.plan", "BatchAttention.plan",
    ]  # fmt: skip
    on_cpu = "NumPy reference (arrays in host memory)"
    *before, planned, run = caplog.messages
    assert before == [f"{name}: {on_cpu}" for name in who]
    assert planned == f"BatchDecodeWithPagedKVCacheWrapper.plan: {on_cpu}"
    assert run.startswith("PODWithPagedKVCacheWrapper.run: decode part")
