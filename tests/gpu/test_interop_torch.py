"""fi_cupy's custom operators of torch on the GPU: torch.compile with inductor, CUDA-graph trees, streams."""

from __future__ import annotations

import numpy as np
import pytest
from interop_cases import CASES, WRAPPER_KEYS, Case, copied, flat, kept_order, received, wrapper_cases

import fi_cupy
from fi_cupy import errors
from fi_cupy.interop.table import OPERATORS
from fi_cupy.interop.wrappers import WRAPPERS
from fi_cupy.testing.generators import normal, to_float64
from fi_cupy.testing.tolerances import assert_close

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch has no CUDA", allow_module_level=True)
ft = pytest.importorskip("fi_cupy.interop.torch")


def tensor(value):
    if isinstance(value, tuple):
        return tuple(tensor(v) for v in value)
    return kept_order(value, dense_tensor) if isinstance(value, np.ndarray) else value


def dense_tensor(value):
    raw = {"bfloat16": np.int16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}.get(value.dtype.name)
    if raw is None:
        return torch.from_numpy(value.copy()).cuda()
    return torch.from_numpy(value.view(raw).copy()).cuda().view(getattr(torch, value.dtype.name))


def tensors(kwargs):
    return {k: tensor(v) for k, v in kwargs.items()}


def outcome(function, kwargs, changed):
    made = function(**kwargs)
    return [x for x in flat((made, *(kwargs.get(n) for n in changed))) if x is not None]


def same(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype and g.device == w.device
        torch.testing.assert_close(g.to(torch.float64), w.to(torch.float64), rtol=0, atol=0, equal_nan=True)


@pytest.fixture(autouse=True)
def fresh():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("key", list(CASES), ids="-".join)
def test_operator_compiled(rng, key):
    row = OPERATORS[key[0]]
    kwargs = CASES[key](Case(rng, "bfloat16"))
    kwargs |= received(row, kwargs, fi_cupy.dtypes.float8_e4m3fn.np)
    changed = (*row.mutated, *row.receivers)
    compiled = torch.compile(getattr(ft, key[0]), fullgraph=True, backend="aot_eager")
    same(outcome(compiled, tensors(kwargs), changed), outcome(row.function, tensors(kwargs), changed))


@pytest.mark.parametrize("key", WRAPPER_KEYS, ids="-".join)
def test_planned_wrapper_compiled(rng, key):
    case, row = wrapper_cases("bfloat16")[key], WRAPPERS[key[0]]
    first = case.before + (
        () if key[0] == "BatchAttention" else (torch.empty(32 << 20, dtype=torch.uint8, device="cuda"),)
    )
    plain, traced = row.cls(*first, **case.options), getattr(ft, key[0])(*first, **case.options)
    kwargs = case.run(Case(rng, "bfloat16"))
    plan = {k: v for k, v in case.plan.items() if k != "args"}
    for wrapper in (plain, traced):
        getattr(wrapper, row.plan_name)(*copied(case.plan["args"]), **plan)
        got = wrapper.run(**tensors(kwargs)) if wrapper is plain else torch.compile(
            wrapper.run, fullgraph=True, backend="aot_eager"
        )(**tensors(kwargs))  # fmt: skip
        if wrapper is plain:
            want = [x.clone() for x in flat(got)]
    same(flat(got), want)


def layer(wrapper, x, residual, cache, table, w):
    """A piece of a decode step with an in-place cache, in-place norm, and results in the middle."""
    q = (x @ w["q"]).view(x.shape[0], 8, 64)
    k = (x @ w["k"]).view(x.shape[0], 2, 64)
    q, k = ft.apply_rope_pos_ids(q, k, table["positions"])
    ft.append_paged_kv_cache(k, k * 2, table["requests"], table["positions"], cache, table["indices"], table["indptr"],
                             table["last"])  # fmt: skip
    x = wrapper.run(q, cache).reshape(x.shape[0], -1) @ w["o"]
    ft.fused_add_rmsnorm(x, residual, w["norm"])
    return ft.silu_and_mul(x @ w["up"]) @ w["down"] + residual


def problem(rng, use_cuda_graph):
    x = Case(rng, "bfloat16")
    shapes = {"q": (128, 512), "k": (128, 128), "o": (512, 128), "up": (128, 256), "down": (128, 128)}
    w = {n: tensor(normal(rng, s, "bfloat16", scale=s[0] ** -0.5)) for n, s in shapes.items()}
    w["norm"] = tensor(x.x(128))
    host = {"requests": [0, 1], "positions": [4, 2], "indices": [4, 1, 2], "indptr": [0, 2, 3], "last": [1, 3]}
    table = {n: torch.tensor(v, dtype=torch.int32, device="cuda") for n, v in host.items()}
    workspace = torch.empty(32 << 20, dtype=torch.uint8, device="cuda")
    buffers = [torch.zeros(n, dtype=torch.int32, device="cuda") for n in (3, 16, 2)]
    make = lambda cls: cls(workspace.clone(), "NHD", use_cuda_graph, False, *(buffers if use_cuda_graph else ()))  # noqa: E731
    plan = (host["indptr"], host["indices"], host["last"], 8, 2, 64, 4)
    return w, table, make, plan, tensor(x.x(2, 128)), tensor(x.x(2, 128)), tensor(x.x(6, 2, 4, 2, 64))


@pytest.mark.parametrize("mode", ["reduce-overhead"])
def test_a_layer_compiled_by_inductor(rng, mode):
    graph = mode == "reduce-overhead"
    w, table, make, plan, x, residual, cache = problem(rng, graph)
    wrapper = make(ft.BatchDecodeWithPagedKVCacheWrapper)
    wrapper.plan(*plan, q_data_type="bfloat16")
    want_cache, want_residual = cache.clone(), residual.clone()
    want = layer(wrapper, x.clone(), want_residual, want_cache, table, w)
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    start_cache, start_residual = cache.clone(), residual.clone()
    for _ in range(4):
        cache.copy_(start_cache)
        residual.copy_(start_residual)
        got = compiled(wrapper, x, residual, cache, table, w)
        torch.cuda.synchronize()
        assert_close(to_float64(got), to_float64(want), "bfloat16", "product")
        assert_close(to_float64(cache), to_float64(want_cache), "bfloat16")
        assert_close(to_float64(residual), to_float64(want_residual), "bfloat16", "product")


def test_captured_by_hand_and_replanned(rng):
    w, _, make, plan, x, _, cache = problem(rng, True)
    wrapper = make(ft.BatchDecodeWithPagedKVCacheWrapper)
    wrapper.plan(*plan, q_data_type="bfloat16")
    q = (x @ w["q"]).view(2, 8, 64)
    wrapper.run(q, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = wrapper.run(q, cache)
    wrapper.plan([0, 1, 3], [5, 0, 3], [2, 4], 8, 2, 64, 4, q_data_type="bfloat16")
    graph.replay()
    plain = fi_cupy.BatchDecodeWithPagedKVCacheWrapper(torch.empty(32 << 20, dtype=torch.uint8, device="cuda"))
    plain.plan([0, 1, 3], [5, 0, 3], [2, 4], 8, 2, 64, 4, q_data_type="bfloat16")
    assert_close(to_float64(out), to_float64(plain.run(q, cache)), "bfloat16", "product")


def test_side_stream(rng):
    w = tensor(normal(rng, (1024,)))
    fresh = tensor(normal(rng, (64, 1024)))
    x = torch.full_like(fresh, float("nan"))
    compiled = torch.compile(lambda x: ft.rmsnorm(x, w) * 2, fullgraph=True, backend="aot_eager")
    compiled(fresh)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.copy_(fresh)
        got = compiled(x)
    stream.synchronize()
    same([got], [fi_cupy.rmsnorm(fresh, w) * 2])


def test_a_logits_pipe(rng):
    from fi_cupy.logits_processor import LogitsPipe, Sample, Softmax, Temperature, TopK, TopP

    logits, steps = tensor(Case(rng, "bfloat16").f32(5, 4000)), [Temperature(), TopK(), Softmax(), TopP(), Sample()]
    options = {"temperature": torch.tensor([0.5, 1, 2, 1, 1], device="cuda"), "top_k": 7, "top_p": 0.8, "seed": 3}
    compiled = torch.compile(ft.LogitsPipe(steps), fullgraph=True, backend="aot_eager")
    same([compiled(logits, **options)], [LogitsPipe(steps)(logits, **options)])


def test_opcheck_on_the_gpu(rng):
    x, w = tensor(normal(rng, (5, 256))), tensor(normal(rng, (256,)))
    assert set(torch.library.opcheck(torch.ops.fi_cupy.rmsnorm.default, (x, w, 1e-6, None)).values()) == {"SUCCESS"}
    args = (x, x.clone(), w, 1e-6, None)
    assert set(torch.library.opcheck(torch.ops.fi_cupy.fused_add_rmsnorm.default, args).values()) == {"SUCCESS"}


def test_types_of_kernels_are_checked_while_compiling():
    x, w = torch.ones(2, 64, device="cuda"), torch.ones(64, device="cuda")
    with pytest.raises(errors.DTypeError, match="layernorm: input has dtype float32"):
        ft.layernorm(x, w, w)
    compiled = torch.compile(ft.layernorm, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="layernorm: input has dtype float32"):
        compiled(x, w, w)
