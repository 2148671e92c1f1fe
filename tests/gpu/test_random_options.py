"""Options drawn together at random on the GPU, against the float64 reference.

The types and dims are fixed, and so is what changes a kernel (a cap, a bias, a mask, the height of a tile): some thirty
instances. Everything else is drawn freely.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from paged_cases import check, indptr_of

from fi_cupy import decode, prefill
from fi_cupy.reference.attention import batch_decode_paged, batch_prefill_paged, batch_prefill_ragged
from fi_cupy.testing.generators import normal, on_gpu, poisoned

cupy = pytest.importorskip("cupy")
DTYPE, HEADS, KV_HEADS, DIM = "bfloat16", 8, 2, 64
bounded = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))

#: (logits_soft_cap, pos_encoding_mode): what changes the kernel.
LOGITS = st.sampled_from([(None, "NONE"), (3.0, "NONE"), (50.0, "ALIBI")])
PLAN = {
    "window_left": st.sampled_from([-1, 0, 7, 100, 5000]),
    "sm_scale": st.sampled_from([None, 0.05, 0.3]),
    "disable_split_kv": st.booleans(),
    "fixed_split_size": st.sampled_from([None, None, 1, 4]),
}
RUN = {
    "q_scale": st.sampled_from([None, 0.5]), "k_scale": st.sampled_from([None, 2.0]),
    "v_scale": st.sampled_from([None, 0.25]), "enable_pdl": st.sampled_from([None, True, False]),
}  # fmt: skip


class Case:
    """One drawn batch: keys in pages of random order with NaN behind each request's last, queries with gaps between."""

    def __init__(self, seed, qo_lens, kv_lens, page_size, layout):
        self.rng = rng = np.random.default_rng(seed)
        self.page_size, self.layout = page_size, layout
        self.qo, kv = indptr_of(qo_lens), np.asarray(kv_lens)
        self.kv = indptr_of(kv)
        indptr = indptr_of(-(-kv // page_size))
        pages = int(indptr[-1]) + 2
        indices = rng.permutation(pages)[: indptr[-1]].astype(np.int32)
        self.table = (indptr, indices, np.where(kv > 0, (kv - 1) % page_size + 1, 1).astype(np.int32))
        self.cache = np.full((pages, 2, page_size, KV_HEADS, DIM), np.nan, normal(rng, (1,), DTYPE).dtype)
        self.keys = normal(rng, (int(self.kv[-1]), 2, KV_HEADS, DIM), DTYPE)
        for b, n in enumerate(kv):
            j = np.arange(n)
            self.cache[indices[indptr[b] + j // page_size], :, j % page_size] = self.keys[self.kv[b] : self.kv[b + 1]]
        self.q = normal(rng, (int(self.qo[-1]), HEADS, DIM), DTYPE)

    def gpu_q(self, strided):
        if not strided:
            return on_gpu(self.q)
        wide = poisoned((len(self.q), HEADS + 1, 2 * DIM), DTYPE)
        wide.view("u2")[:, 1:, :DIM] = on_gpu(self.q).view("u2")
        return wide[:, 1:, :DIM]

    def gpu_cache(self, as_pair):
        cache = self.cache if self.layout == "NHD" else np.ascontiguousarray(self.cache.swapaxes(2, 3))
        packed = on_gpu(cache)
        return (packed[:, 0], packed[:, 1]) if as_pair else packed

    def host(self):
        """Queries and the caches in the reference's form."""
        return self.q.astype(np.float64), *(self.cache[:, i].astype(np.float64) for i in (0, 1))

    def run(self, wrapper, *keys, strided=False, sinks=None, **options):
        out, lse = poisoned(self.q.shape, DTYPE), poisoned(self.q.shape[:2], "float32")
        sinks = None if sinks is None else on_gpu(sinks)
        got = wrapper.run(self.gpu_q(strided), *keys, out=out, lse=lse, return_lse=True, sinks=sinks, **options)
        assert got[0] is out and got[1] is lse
        return out, lse


def scaled(plan, run):
    """(sm_scale, v_scale) that the reference takes for what plan and run were given."""
    scale = (plan["sm_scale"] or DIM**-0.5) * (run["q_scale"] or 1.0) * (run["k_scale"] or 1.0)
    return {"sm_scale": scale, "v_scale": run["v_scale"] or 1.0}


def workspace():
    return cupy.full((64 << 20,), 0xFF, cupy.uint8)


@bounded
@given(
    seed=st.integers(0, 2**31),
    lens=st.lists(st.sampled_from([0, 1, 2, 15, 16, 17, 300, 3000]), min_size=1, max_size=6),
    page_size=st.sampled_from([16, 5]), layout=st.sampled_from(["NHD", "HND"]), on_device=st.booleans(),
    logits=st.one_of(LOGITS, st.just((None, "ROPE_LLAMA"))), plan=st.fixed_dictionaries(PLAN),
    run=st.fixed_dictionaries(RUN), with_sinks=st.booleans(), as_pair=st.booleans(), strided=st.booleans(),
    rope=st.sampled_from([{}, {"rope_theta": 500.0, "rope_scale": 2.0}]),
)  # fmt: skip
def test_decode(
    seed, lens, page_size, layout, on_device, logits, plan, run, with_sinks, as_pair, strided, rope
):  # fmt: skip
    case = Case(seed, [1] * len(lens), lens, page_size, layout)
    wrapper = decode.BatchDecodeWithPagedKVCacheWrapper(workspace(), layout)
    table = [cupy.asarray(x) if on_device else x for x in case.table]
    same = {"window_left": plan["window_left"], "logits_soft_cap": logits[0], "pos_encoding_mode": logits[1], **rope}
    wrapper.plan(*table, HEADS, KV_HEADS, DIM, page_size, q_data_type=DTYPE, **{**plan, **same})
    sinks = normal(case.rng, (HEADS,), "float32") if with_sinks else None
    out, lse = case.run(wrapper, case.gpu_cache(as_pair), strided=strided, sinks=sinks, **run)
    want = batch_decode_paged(*case.host(), *case.table, sinks=sinks, **same, **scaled(plan, run))
    check(out, lse, *want, rope=logits[1] == "ROPE_LLAMA")


@bounded
@given(
    seed=st.integers(0, 2**31), tall=st.booleans(), requests=st.integers(1, 5), paged=st.booleans(),
    page_size=st.sampled_from([16, 5, 1]), layout=st.sampled_from(["NHD", "HND"]), on_device=st.booleans(),
    causal=st.booleans(), logits=LOGITS, plan=st.fixed_dictionaries(PLAN), run=st.fixed_dictionaries(RUN),
    masked=st.sampled_from(["", "", "custom_mask", "packed_custom_mask"]), with_sinks=st.booleans(),
    as_pair=st.booleans(), strided=st.booleans(), hints=st.booleans(),
)  # fmt: skip
def test_prefill(
    seed, tall, requests, paged, page_size, layout, on_device, causal, logits, plan, run, masked, with_sinks, as_pair,
    strided, hints,
):  # fmt: skip
    rng = np.random.default_rng(seed)
    # An average of 16 packed rows or fewer takes the low tiles, over 64 the tall ones.
    qo_lens = rng.choice([40, 150, 17] if tall else [1, 2, 3, 4], requests)
    kv_lens = np.where(
        rng.random(requests) < 0.8, qo_lens + rng.choice([0, 1, 500], requests), rng.integers(0, 9, requests)
    )
    case = Case(seed, qo_lens, kv_lens, page_size, layout)
    masks = [rng.random((m, n)) < 0.6 for m, n in zip(qo_lens, kv_lens, strict=True)] if masked and paged else None
    mask = {}
    if masks is not None:
        bits = [np.packbits(m.reshape(-1), bitorder="little") for m in masks]
        flat = np.concatenate(bits if "packed" in masked else [m.reshape(-1) for m in masks])
        mask = {masked: cupy.asarray(flat) if on_device else flat}
        packed = np.concatenate(bits)
    same = {
        "causal": causal, "window_left": plan["window_left"], "logits_soft_cap": logits[0],
        "pos_encoding_mode": logits[1],
    }  # fmt: skip
    options = {**plan, **same, **mask, "q_data_type": DTYPE}
    if hints:
        options["seq_lens_q"], options["max_sequence_kv"] = qo_lens.astype(np.int32), 10**6
        options["seq_lens"] = kv_lens.astype(np.int32)
    sinks = normal(rng, (HEADS,), "float32") if with_sinks else None
    oracle = {**same, **scaled(plan, run), "sinks": sinks}
    if masks is not None:
        oracle |= {"packed_custom_mask": packed, "causal": False}
    if paged:
        wrapper = prefill.BatchPrefillWithPagedKVCacheWrapper(workspace(), layout)
        table = [cupy.asarray(x) if on_device else x for x in (case.qo, *case.table)]
        wrapper.plan(*table, HEADS, KV_HEADS, DIM, page_size, **options)
        out, lse = case.run(wrapper, case.gpu_cache(as_pair), strided=strided, sinks=sinks, **run)
        check(out, lse, *batch_prefill_paged(*case.host(), case.qo, *case.table, **oracle))
        return
    wrapper = prefill.BatchPrefillWithRaggedKVCacheWrapper(workspace(), layout)
    wrapper.plan(*(cupy.asarray(x) if on_device else x for x in (case.qo, case.kv)), HEADS, KV_HEADS, DIM, **options)
    k, v = (
        np.ascontiguousarray(case.keys[:, i] if layout == "NHD" else case.keys[:, i].swapaxes(0, 1)) for i in (0, 1)
    )
    out, lse = case.run(wrapper, on_gpu(k), on_gpu(v), strided=strided, sinks=sinks, **run)
    k64, v64 = (case.keys[:, i].astype(np.float64) for i in (0, 1))
    check(out, lse, *batch_prefill_ragged(case.q.astype(np.float64), k64, v64, case.qo, case.kv, **oracle))
