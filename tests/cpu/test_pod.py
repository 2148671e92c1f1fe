"""POD attention on CPU arrays, against plain loops."""

from __future__ import annotations

import numpy as np
import pytest
from naive_attention import Pages, attend, seen

import fi_cupy
from fi_cupy import attention, errors, pod
from fi_cupy.testing.generators import normal
from fi_cupy.testing.tolerances import assert_close

HEADS, KV_HEADS, DIM = 4, 2, 16


def workspace():
    return np.zeros(1 << 12, np.uint8)


class Case:
    def __init__(self, rng, layout="NHD"):
        self.q_p = normal(rng, (5, HEADS, DIM), "float32")
        self.k_p, self.v_p = (normal(rng, (9, KV_HEADS, DIM), "float32") for _ in range(2))
        self.sequences = [tuple(normal(rng, (n, KV_HEADS, DIM), "float32") for _ in range(2)) for n in (6, 0, 11)]
        self.q_d = normal(rng, (3, HEADS, DIM), "float32")
        pages = Pages(rng, 20, 4, KV_HEADS, DIM, np.float32, layout)
        self.table, self.cache = pages.add(self.sequences), pages.cache
        self.sizes = (HEADS, KV_HEADS, DIM, 4)

    def arrays(self):
        return self.q_p, self.k_p, self.v_p, self.q_d, self.cache

    def decode(self, window=-1, **options):
        parts = [
            attend(self.q_d[b : b + 1], k, v, seen(1, len(k), True, window), **options)
            for b, (k, v) in enumerate(self.sequences)
        ]
        return tuple(np.concatenate([p[i] for p in parts]) for i in (0, 1))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_both_parts(rng, layout):
    case = Case(rng, layout)
    wrapper = fi_cupy.PODWithPagedKVCacheWrapper(workspace(), layout)
    wrapper.plan(*case.table, *case.sizes, window_left=4, q_data_type="float32", sm_scale=0.3, logits_soft_cap=5.0)
    assert wrapper.workspace_size(*case.table, *case.sizes, window_left=4) == (0, 0)
    (o_p, s_p), (o_d, s_d) = wrapper.run(
        *case.arrays(), causal_p=True, window_left_p=3, sm_scale_p=0.4, logits_soft_cap_p=2.0, return_lse_p=True,
        return_lse_d=True, kv_layout_d=layout, sm_scale_d=0.3, window_left_d=4, q_scale=0.5, k_scale=3.0, v_scale=2.0,
    )  # fmt: skip
    want, want_lse = attend(case.q_p, case.k_p, case.v_p, seen(5, 9, True, 3), scale=0.4, cap=2.0)
    assert_close(o_p, want, "float32", "product")
    assert_close(s_p, want_lse, "float32", "product")
    want, want_lse = case.decode(4, scale=0.3 * 1.5, cap=5.0)
    assert_close(o_d, want * 2.0, "float32", "product")
    assert_close(s_d, want_lse, "float32", "product")


@pytest.mark.parametrize("packed", [False, True])
def test_custom_mask_of_the_prompt(rng, packed):
    case = Case(rng)
    mask = rng.random((5, 9)) < 0.5
    options = {"custom_mask_p": mask}
    if packed:
        options = {"packed_custom_mask_p": np.packbits(mask.reshape(-1), bitorder="little")}
    wrapper = pod.PODWithPagedKVCacheWrapper(workspace())
    wrapper.begin_forward(*case.table, *case.sizes, q_data_type="float32")
    out_d, lse_d = np.full_like(case.q_d, np.nan), np.full(case.q_d.shape[:2], np.nan, np.float32)
    o_p, o_d = wrapper.forward(*case.arrays(), **options, out_d=out_d, lse_d=lse_d, causal_d=True, enable_pdl=False)
    assert o_d is out_d
    assert_close(o_p, attend(case.q_p, case.k_p, case.v_p, mask)[0], "float32", "product")
    want, want_lse = case.decode()
    assert_close(out_d, want, "float32", "product")
    assert_close(lse_d, want_lse, "float32", "product")
    assert str(attention.explain(wrapper)).startswith("decode part")


def test_graph_buffers_and_errors(rng):
    case = Case(rng)
    buffers = [np.zeros(n, np.int32) for n in (4, 10, 3)]
    wrapper = pod.PODWithPagedKVCacheWrapper(workspace(), "NHD", True, *buffers)
    assert wrapper.is_cuda_graph_enabled
    with pytest.raises(errors.PlanError, match=r"plan\(\) must come first"):
        wrapper.run(*case.arrays())
    wrapper.plan(*case.table, *case.sizes, q_data_type="float32")
    assert (buffers[0] == case.table[0]).all()
    for change, error, text in (
        (
            {"custom_mask_d": np.ones(1, bool)},
            errors.UnsupportedError,
            "BatchPrefillWithPagedKVCacheWrapper takes masks",
        ),
        ({"kv_layout_d": "HND"}, errors.PlanError, "kv_layout_d is HND, planned NHD"),
        ({"window_left_d": 7}, errors.PlanError, "window_left_d is 7, planned -1"),
        ({"pos_encoding_mode_d": "ALIBI"}, errors.PlanError, "pos_encoding_mode_d is ALIBI, planned NONE"),
        ({"sm_scale_d": 0.9}, errors.PlanError, r"sm_scale_d is 0\.9, planned 0\.25"),
    ):
        with pytest.raises(error, match=text):
            wrapper.run(*case.arrays(), **change)
    with pytest.raises(errors.ArgumentError, match="jit_args has 1 entries"):
        pod.PODWithPagedKVCacheWrapper(workspace(), jit_args=[1])
    other = pod.PODWithPagedKVCacheWrapper(workspace())
    other.plan(*case.table, *case.sizes, q_data_type="float32")
    other.reset_workspace_buffer(workspace())
    with pytest.raises(errors.PlanError, match=r"plan\(\) must come first"):
        other.run(*case.arrays())
