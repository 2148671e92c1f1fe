"""Options of a call against those of its plan: the planned value is taken, another raises and says what would work."""

from __future__ import annotations

import numpy as np
import pytest
from naive_attention import Pages

import fi_cupy
from fi_cupy import errors

HEADS, KV_HEADS, DIM, PAGE = 4, 2, 8, 4
PLANNED = {"window_left": 3, "logits_soft_cap": 2.5, "sm_scale": 0.4}


def workspace():
    return np.empty(1 << 16, np.uint8)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


class Planned:
    """One request of 3 queries (1 for decode) on 9 keys, planned in every wrapper with options of its own."""

    def __init__(self, rng):
        self.k, self.v = normal(rng, 9, KV_HEADS, DIM), normal(rng, 9, KV_HEADS, DIM)
        pages = Pages(rng, 4, PAGE, KV_HEADS, DIM)
        self.table, self.cache = pages.add([(self.k, self.v)]), pages.cache
        self.q, self.q1 = normal(rng, 3, HEADS, DIM), normal(rng, 1, HEADS, DIM)
        self.sizes = (HEADS, KV_HEADS, DIM)

    def decode(self):
        w = fi_cupy.decode.BatchDecodeWithPagedKVCacheWrapper(workspace())
        w.plan(*self.table, *self.sizes, PAGE, q_data_type="float32", **PLANNED)
        return w, (self.q1, self.cache)

    def paged(self):
        w = fi_cupy.prefill.BatchPrefillWithPagedKVCacheWrapper(workspace())
        w.plan([0, 3], *self.table, *self.sizes, PAGE, causal=True, q_data_type="float32", **PLANNED)
        return w, (self.q, self.cache)

    def ragged(self):
        w = fi_cupy.prefill.BatchPrefillWithRaggedKVCacheWrapper(workspace())
        w.plan([0, 3], [0, 9], *self.sizes, causal=True, q_data_type="float32", **PLANNED)
        return w, (self.q, self.k, self.v)

    def pod(self):
        w = fi_cupy.pod.PODWithPagedKVCacheWrapper(workspace())
        w.plan(*self.table, *self.sizes, PAGE, window_left=3, sm_scale=0.4, q_data_type="float32")
        return w, (self.q, self.k, self.v, self.q1, self.cache)

    def batch_attention(self):
        w = fi_cupy.BatchAttention(device="cpu")
        w.plan([0, 3], self.table[0], self.table[1], [9], *self.sizes, DIM, PAGE, logits_soft_cap=2.5,
               q_data_type="float32", kv_data_type="float32")  # fmt: skip
        return w, (self.q, self.cache)

    def sink(self):
        w = fi_cupy.BatchAttentionWithAttentionSinkWrapper(
            workspace(), q_data_type="float32", kv_data_type="float32", head_dim_qk=DIM, head_dim_vo=DIM, window_left=3
        )
        w.plan([0, 3], *self.table, *self.sizes, PAGE, sm_scale=0.4)
        return w, (self.q, self.cache, np.zeros(HEADS, np.float32))

    def block_sparse(self):
        w = fi_cupy.BlockSparseAttentionWrapper(workspace())
        w.plan([0, 2], [0, 2], 3, 9, 3, 3, *self.sizes, logits_soft_cap=2.5, sm_scale=0.4, q_data_type="float32")
        return w, (self.q, self.k, self.v)

    def variable(self):
        w = fi_cupy.VariableBlockSparseAttentionWrapper(workspace())
        w.plan(np.ones((2, 1, 1), bool), [[3]] * 2, [[9]] * 2, *self.sizes, logits_soft_cap=2.5, sm_scale=0.4,
               q_data_type="float32")  # fmt: skip
        return w, tuple(np.ascontiguousarray(x.swapaxes(0, 1)) for x in (self.q, self.k, self.v))


#: (wrapper, method, option, the planned value, another).
CASES = [
    ("decode", "forward", "window_left", 3, 4), ("decode", "forward", "logits_soft_cap", 2.5, 2.0),
    ("decode", "forward", "sm_scale", 0.4, 1.0),
    ("decode", "forward", "pos_encoding_mode", "NONE", "ALIBI"), ("decode", "forward", "rope_theta", None, 1e5),
    ("decode", "forward", "rope_scale", None, 2.0), ("decode", "run", "window_left", 3, -1),
    ("decode", "run", "window_left", 3, 4), ("decode", "run", "q_len_per_req", 1, 2),
    ("paged", "run", "window_left", 3, -1), ("paged", "run", "window_left", 3, 9),
    ("pod", "run", "window_left_d", 3, 2), ("pod", "run", "sm_scale_d", 0.4, 1.0),
    ("pod", "run", "kv_layout_d", "NHD", "HND"), ("pod", "run", "pos_encoding_mode_d", "NONE", "ALIBI"),
    ("pod", "run", "rope_theta_d", None, 1e5), ("pod", "run", "rope_scale_d", None, 3.0),
    ("batch_attention", "run", "logits_soft_cap", 2.5, 3.0), ("sink", "run", "window_left", 3, 2),
]  # fmt: skip
for wrapper in ("paged", "ragged"):
    CASES += [
        (wrapper, "forward", "causal", True, None), (wrapper, "forward", "window_left", 3, 2),
        (wrapper, "forward", "logits_soft_cap", 2.5, 9.0), (wrapper, "forward", "sm_scale", 0.4, 0.5),
        (wrapper, "forward", "pos_encoding_mode", "NONE", "ALIBI"), (wrapper, "forward", "rope_theta", None, 1e5),
        (wrapper, "forward", "rope_scale", None, 2.0),
    ]  # fmt: skip
for wrapper in ("block_sparse", "variable"):
    CASES += [
        (wrapper, "forward", "logits_soft_cap", 2.5, 9.0), (wrapper, "forward", "sm_scale", 0.4, 0.5),
        (wrapper, "forward", "pos_encoding_mode", "NONE", "ALIBI"), (wrapper, "forward", "rope_theta", None, 1e5),
        (wrapper, "forward", "rope_scale", None, 2.0),
    ]  # fmt: skip


def first(x):
    while isinstance(x, tuple):
        x = x[-1] if isinstance(x[0], tuple) else x[0]
    return x


@pytest.mark.parametrize(("wrapper", "method", "option", "planned", "other"), CASES)
def test_the_planned_value_or_an_error(rng, wrapper, method, option, planned, other):
    w, args = getattr(Planned(rng), wrapper)()
    plain = first(w.run(*args))
    call = getattr(w, method)
    assert (first(call(*args, **{option: planned})) == plain).all()
    if other is not None:
        with pytest.raises(errors.PlanError, match=rf"{option} is .*, planned .*; pass it to plan\(\)"):
            call(*args, **{option: other})


@pytest.mark.parametrize("wrapper", ["paged", "ragged"])
def test_causal_cannot_be_added_at_the_call(rng, wrapper):
    p = Planned(rng)
    w, args = getattr(p, wrapper)()
    if wrapper == "paged":
        w.plan([0, 3], *p.table, *p.sizes, PAGE, q_data_type="float32")
    else:
        w.plan([0, 3], [0, 9], *p.sizes, q_data_type="float32")
    with pytest.raises(errors.PlanError, match=r"causal is True, planned False; pass it to plan\(\)"):
        w.forward(*args, causal=True)


def test_a_scale_of_the_call_that_is_honoured(rng):
    p = Planned(rng)
    w, args = p.sink()
    other, _ = p.sink()
    other.plan([0, 3], *p.table, *p.sizes, PAGE, sm_scale=0.9)
    assert np.allclose(w.run(*args, 0.9), other.run(*args), atol=1e-6)


@pytest.mark.parametrize("wrapper", ["paged", "ragged"])
@pytest.mark.parametrize(
    ("hints", "words"),
    [
        ({"seq_lens_q": [2]}, r"seq_lens_q is \[2\], expected \[3\] as the offsets say"),
        ({"seq_lens": [8]}, r"seq_lens is \[8\], expected \[9\]|seq_lens and paged_kv_indptr disagree"),
        ({"max_token_per_sequence": 2}, "max_token_per_sequence is 2, expected at least 3"),
        ({"max_sequence_kv": 8}, "max_sequence_kv is 8, expected at least 9"),
    ],
)
def test_hints_must_agree_with_the_offsets(rng, wrapper, hints, words):
    p = Planned(rng)
    w, args = getattr(p, wrapper)()

    def plan(**options):
        head = ([0, 3], *p.table) if wrapper == "paged" else ([0, 3], [0, 9])
        w.plan(*head, *p.sizes, *([PAGE] if wrapper == "paged" else []), q_data_type="float32", **options)

    plan()
    plain = w.run(*args)
    plan(seq_lens_q=[3], seq_lens=[9], max_token_per_sequence=3, max_sequence_kv=9)
    assert (w.run(*args) == plain).all()
    with pytest.raises(errors.ArgumentError, match=words):
        plan(**hints)


BACKENDS = {
    "decode": lambda b: fi_cupy.decode.BatchDecodeWithPagedKVCacheWrapper(workspace(), backend=b),
    "paged": lambda b: fi_cupy.prefill.BatchPrefillWithPagedKVCacheWrapper(workspace(), backend=b),
    "ragged": lambda b: fi_cupy.prefill.BatchPrefillWithRaggedKVCacheWrapper(workspace(), backend=b),
    "sink": lambda b: fi_cupy.BatchAttentionWithAttentionSinkWrapper(workspace(), backend=b),
    "block_sparse": lambda b: fi_cupy.BlockSparseAttentionWrapper(workspace(), b),
    "variable": lambda b: fi_cupy.VariableBlockSparseAttentionWrapper(workspace(), b),
}


@pytest.mark.parametrize("wrapper", BACKENDS)
def test_backends(wrapper):
    for name in ("auto", "fa2"):
        BACKENDS[wrapper](name)
    for name in ("trtllm-gen", "cudnn"):
        with pytest.raises(errors.UnsupportedError, match=rf"Wrapper: backend is '{name}', expected"):
            BACKENDS[wrapper](name)


#: What no kernel honours yet, by the call that takes it.
REFUSED = [
    ("decode", {"kv_cache_sf": 1}), ("decode", {"skip_softmax_threshold_scale_factor": 1.0}),
    ("paged", {"kv_cache_sf": 1}), ("ragged", {"kv_cache_sf": 1}), ("batch_attention", {"kv_cache_sf": 1}),
    ("batch_attention", {"profiler_buffer": 1}), ("pod", {"custom_mask_d": 1}), ("pod", {"packed_custom_mask_d": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("wrapper", "options"), REFUSED)
def test_what_is_not_honoured_is_refused(rng, wrapper, options):
    w, args = getattr(Planned(rng), wrapper)()
    with pytest.raises(errors.UnsupportedError, match=f"run: .*{next(iter(options)).removeprefix('packed_')}"):
        w.run(*args, **options)
