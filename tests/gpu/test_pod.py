"""POD attention against the float64 reference, and against the two functions it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from paged_cases import Pages, bits, check

from fi_cupy import decode, pod, prefill
from fi_cupy.reference.attention import attention
from fi_cupy.testing.generators import normal, on_gpu, poisoned

cupy = pytest.importorskip("cupy")
HEADS, KV_HEADS, DIM, PAGE = 8, 2, 128, 16
LENS = [700, 0, 1, 3000, 16, 129]


def workspace(nbytes=8 << 20):
    return cupy.full((nbytes,), 0xFF, cupy.uint8)


class Case:
    def __init__(self, rng, qo_len, kv_len, lens=LENS, layout="NHD", num_pages=0):
        self.q_p = normal(rng, (qo_len, HEADS, DIM))
        self.k_p, self.v_p = (normal(rng, (kv_len, KV_HEADS, DIM)) for _ in range(2))
        self.q_d = normal(rng, (len(lens), HEADS, DIM))
        pages = Pages(rng, num_pages or sum(-(-n // PAGE) for n in lens) + 2, PAGE, KV_HEADS, DIM, layout=layout)
        self.table, self.sequences = pages.add(lens)
        self.gpu_p = [on_gpu(x) for x in (self.q_p, self.k_p, self.v_p)]
        self.gpu_d = [on_gpu(self.q_d), pages.gpu()]

    def plan(self, wrapper, **options):
        wrapper.plan(*self.table, HEADS, KV_HEADS, DIM, PAGE, q_data_type="bfloat16", **options)
        return wrapper

    def expect_p(self, **options):
        return attention(*(x.astype(np.float64) for x in (self.q_p, self.k_p, self.v_p)), **options)

    def expect_d(self, **options):
        parts = [
            attention(self.q_d[b : b + 1].astype(np.float64), k.astype(np.float64), v.astype(np.float64), **options)
            for b, (k, v) in enumerate(self.sequences)
        ]
        return tuple(np.concatenate([p[i] for p in parts]) for i in (0, 1))


@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize(("qo_len", "kv_len"), [(300, 300), (20, 5000)])
def test_both_parts(rng, layout, qo_len, kv_len):
    case = Case(rng, qo_len, kv_len, layout=layout)
    wrapper = case.plan(pod.PODWithPagedKVCacheWrapper(workspace(), layout), window_left=500)
    out_d, lse_d = poisoned(case.q_d.shape, "bfloat16"), poisoned(case.q_d.shape[:2], "float32")
    (o_p, s_p), (o_d, s_d) = wrapper.run(
        *case.gpu_p, *case.gpu_d, causal_p=True, window_left_p=200, return_lse_p=True, return_lse_d=True, q_scale=0.5,
        v_scale=2.0, out_d=out_d, lse_d=lse_d,
    )  # fmt: skip
    assert o_d is out_d and s_d is lse_d
    check(o_p, s_p, *case.expect_p(causal=True, window_left=200))
    check(o_d, s_d, *case.expect_d(window_left=500, q_scale=0.5, v_scale=2.0))
    alone = prefill.single_prefill_with_kv_cache(*case.gpu_p, causal=True, window_left=200)
    assert (bits(alone) == bits(o_p)).all()
    single = case.plan(decode.BatchDecodeWithPagedKVCacheWrapper(workspace(), layout), window_left=500)
    assert (bits(single.run(*case.gpu_d, q_scale=0.5, v_scale=2.0)) == bits(o_d)).all()


def test_trap_28_graph_follows_later_plans(rng):
    pages = 400
    buffers = [cupy.zeros(n, cupy.int32) for n in (len(LENS) + 1, pages, len(LENS))]
    wrapper = pod.PODWithPagedKVCacheWrapper(workspace(), "NHD", True, *buffers)
    first = Case(rng, 200, 260, num_pages=pages)
    arrays = [*first.gpu_p, *first.gpu_d]
    out_d, lse_d = poisoned(first.q_d.shape, "bfloat16"), poisoned(first.q_d.shape[:2], "float32")
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.deviceSynchronize()
    graph = None
    with stream:
        for lens in (LENS, [1, 1, 1, 1, 1, 1], [0, 6000, 5, 0, 0, 17]):
            case = Case(rng, 200, 260, lens, num_pages=pages)
            for mine, given in zip(arrays, (*case.gpu_p, *case.gpu_d), strict=True):
                mine.view("u2")[...] = given.view("u2")
            case.plan(wrapper)
            if graph is None:
                wrapper.run(*arrays, causal_p=True, return_lse_p=True, out_d=out_d, lse_d=lse_d)
                stream.begin_capture()
                (o_p, s_p), _ = wrapper.run(*arrays, causal_p=True, return_lse_p=True, out_d=out_d, lse_d=lse_d)
                graph = stream.end_capture()
            for x in (out_d, o_p):
                x.view("u2")[...] = 0xFFFF
            for x in (lse_d, s_p):
                x[...] = np.nan
            graph.launch()
            stream.synchronize()
            check(o_p, s_p, *case.expect_p(causal=True))
            check(out_d, lse_d, *case.expect_d())
