"""POD attention against the float64 reference, and against the two functions it stands for."""

from __future__ import annotations

import numpy as np
import pytest
from paged_cases import Pages, bits, check

from fi_cupy import attention, pod
from fi_cupy.device import device_info
from fi_cupy.reference.attention import attention as reference
from fi_cupy.testing.generators import new_stream, normal, on_gpu, poisoned

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
        return reference(*(x.astype(np.float64) for x in (self.q_p, self.k_p, self.v_p)), **options)

    def expect_d(self, **options):
        parts = [
            reference(self.q_d[b : b + 1].astype(np.float64), k.astype(np.float64), v.astype(np.float64), **options)
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
    (use,) = attention.explain(wrapper).launches
    assert use.kernel.startswith("mixed_prefill_bf16_d128_") and "_decode_bf16_d128_" in use.kernel


@pytest.mark.parametrize(
    ("qo_len", "kv_len", "lens"),
    [
        (1000, 1000, [1] * 3),  # a few decode items
        (1, 10, [2000] * 24),  # one tile
        (700, 700, [150] * 200),  # many more tasks than CTAs
        (0, 5, LENS),
        (3, 0, LENS),
        (40, 40, [0, 0]),
        (200, 30000, [30000]),  # both split
    ],
)
def test_shapes(rng, qo_len, kv_len, lens):
    case = Case(rng, qo_len, kv_len, lens)
    wrapper = case.plan(pod.PODWithPagedKVCacheWrapper(workspace(64 << 20)))
    runs = []
    for pdl in (None, False, True):
        out_d, lse_d = poisoned(case.q_d.shape, "bfloat16"), poisoned(case.q_d.shape[:2], "float32")
        (o_p, s_p), _ = wrapper.run(
            *case.gpu_p, *case.gpu_d, return_lse_p=True, out_d=out_d, lse_d=lse_d, enable_pdl=pdl
        )  # fmt: skip
        runs.append((o_p, s_p, out_d, lse_d))
    check(*runs[0][:2], *case.expect_p())
    check(*runs[0][2:], *case.expect_d())
    assert all((bits(x) == bits(y)).all() for run in runs for x, y in zip(run, runs[0], strict=True))


def test_launches_repeat_bit_for_bit(rng):
    case = Case(rng, 130, 9000)
    wrapper = case.plan(pod.PODWithPagedKVCacheWrapper(workspace()))
    options = {"causal_p": True, "return_lse_p": True, "return_lse_d": True}
    first = wrapper.run(*case.gpu_p, *case.gpu_d, **options)
    assert wrapper._launched.work.num_split > 0
    check(*first[0], *case.expect_p(causal=True))
    check(*first[1], *case.expect_d())
    for _ in range(50):
        for part, want in zip(wrapper.run(*case.gpu_p, *case.gpu_d, **options), first, strict=True):
            assert all((bits(x) == bits(y)).all() for x, y in zip(part, want, strict=True))


def test_each_part_has_its_own_options(rng):
    case = Case(rng, 90, 500)
    mask, sinks = rng.random((90, 500)) < 0.5, normal(rng, (HEADS,), "float32")
    wrapper = case.plan(pod.PODWithPagedKVCacheWrapper(workspace()), sm_scale=0.2, logits_soft_cap=9.0, window_left=99)
    (o_p, s_p), (o_d, s_d) = wrapper.run(
        *case.gpu_p, *case.gpu_d, custom_mask_p=mask, sm_scale_p=-0.1, return_lse_p=True, return_lse_d=True,
        sinks_d=on_gpu(sinks), k_scale=0.5,
    )  # fmt: skip
    check(o_p, s_p, *case.expect_p(custom_mask=mask, sm_scale=-0.1))
    check(o_d, s_d, *case.expect_d(sm_scale=0.1, logits_soft_cap=9.0, window_left=99, sinks=sinks))
    (use,) = attention.explain(wrapper).launches
    assert "_mask_neg_decode_" in use.kernel and use.kernel.endswith("_cap")


def test_parts_that_one_kernel_cannot_hold(rng):
    case = Case(rng, 60, 60)
    wrapper = case.plan(pod.PODWithPagedKVCacheWrapper(workspace()))
    q, k, v = (normal(rng, (60, h, 64)) for h in (4, 4, 4))
    (o_p, s_p), (o_d, s_d) = wrapper.run(
        *map(on_gpu, (q, k, v)), *case.gpu_d, causal_p=True, return_lse_p=True, return_lse_d=True
    )  # fmt: skip
    check(o_p, s_p, *reference(*(x.astype(np.float64) for x in (q, k, v)), causal=True))
    check(o_d, s_d, *case.expect_d())
    prompt, decode = attention.explain(wrapper).launches
    assert "the parts differ in type or head dims" in prompt.why and decode.part == "decode part"
    case.plan(wrapper, pos_encoding_mode="ROPE_LLAMA")
    (o_p, s_p), _ = wrapper.run(*case.gpu_p, *case.gpu_d, causal_p=True, return_lse_p=True)
    check(o_p, s_p, *case.expect_p(causal=True))
    assert "ROPE_LLAMA" in attention.explain(wrapper).launches[0].why


@pytest.mark.parametrize("captured", [False, True])
def test_a_long_prompt_takes_its_own_kernel(rng, captured):
    """On Hopper, whose own kernel is twice as fast as the mixed one's tiles."""
    case = Case(rng, 3000, 4000)
    wrapper = case.plan(pod.PODWithPagedKVCacheWrapper(workspace()))
    out_d, lse_d = poisoned(case.q_d.shape, "bfloat16"), poisoned(case.q_d.shape[:2], "float32")

    def run():
        return wrapper.run(*case.gpu_p, *case.gpu_d, causal_p=True, return_lse_p=True, out_d=out_d, lse_d=lse_d)

    (o_p, s_p), _ = run()
    if captured:
        stream = cupy.cuda.Stream(non_blocking=True)
        cupy.cuda.Device().synchronize()
        with stream:
            run()
            stream.synchronize()
            stream.begin_capture()
            (o_p, s_p), _ = run()
            graph = stream.end_capture()
            for x in (o_p, out_d):
                x.view("u2")[...] = 0xFFFF
            graph.launch(stream)
            stream.synchronize()
    check(o_p, s_p, *case.expect_p(causal=True))
    check(out_d, lse_d, *case.expect_d())
    launches = attention.explain(wrapper).launches
    if device_info(0).arch == "90a":
        assert [x.kernel.startswith("prefill_hopper") for x in launches] == [True, False]
        assert "the Hopper kernel gains more" in launches[0].why
    else:
        assert len(launches) == 1


def test_two_wrappers_on_two_streams_and_on_one_workspace(rng):
    cases = [Case(rng, 200, 9000), Case(rng, 30, 300, [5000, 1, 20])]
    shared = workspace(64 << 20)
    streams = [new_stream() for _ in cases]
    for buffers in ([shared, shared], [workspace(), workspace()]):
        wrappers = [
            case.plan(pod.PODWithPagedKVCacheWrapper(buffer)) for case, buffer in zip(cases, buffers, strict=True)
        ]
        runs = [[], []]
        cupy.cuda.runtime.deviceSynchronize()
        for _ in range(8):
            for i, (case, wrapper) in enumerate(zip(cases, wrappers, strict=True)):
                with streams[0 if buffers[0] is shared else i]:
                    made = wrapper.run(*case.gpu_p, *case.gpu_d, causal_p=True, return_lse_p=True, return_lse_d=True)
                    runs[i].append((*made[0], *made[1]))
        for stream in streams:
            stream.synchronize()
        for case, made in zip(cases, runs, strict=True):
            check(*made[0][:2], *case.expect_p(causal=True))
            check(*made[0][2:], *case.expect_d())
            assert all((bits(x) == bits(y)).all() for run in made for x, y in zip(run, made[0], strict=True))


def test_trap_28_graph_follows_later_plans(rng):
    pages = 400
    buffers = [cupy.zeros(n, cupy.int32) for n in (len(LENS) + 1, pages, len(LENS))]
    wrapper = pod.PODWithPagedKVCacheWrapper(workspace(), "NHD", True, *buffers)
    first = Case(rng, 200, 260, num_pages=pages)
    arrays = [*first.gpu_p, *first.gpu_d]
    out_d, lse_d = poisoned(first.q_d.shape, "bfloat16"), poisoned(first.q_d.shape[:2], "float32")
    stream = new_stream()
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
