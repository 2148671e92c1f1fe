"""fi_cupy's custom operators of torch on the CPU: torch.compile without a graph break, opcheck, values."""

from __future__ import annotations

import os
import subprocess
import sys

import ml_dtypes  # noqa: F401  (NumPy learns bfloat16)
import numpy as np
import pytest
from interop_cases import CASES, WRAPPER_KEYS, Case, copied, flat, kept_order, received, wrapper_cases

import fi_cupy
from fi_cupy import errors
from fi_cupy.interop.table import OPERATORS
from fi_cupy.interop.wrappers import WRAPPERS

torch = pytest.importorskip("torch")
ft = pytest.importorskip("fi_cupy.interop.torch")


def tensor(value):
    """Torch's copy of arguments."""
    if isinstance(value, tuple):
        return tuple(tensor(v) for v in value)
    return kept_order(value, dense_tensor) if isinstance(value, np.ndarray) else value


def dense_tensor(value):
    raw = {"bfloat16": np.int16, "float8_e4m3fn": np.uint8, "float8_e5m2": np.uint8}.get(value.dtype.name)
    if raw is None:
        return torch.from_numpy(value.copy())
    return torch.from_numpy(value.view(raw).copy()).view(getattr(torch, value.dtype.name))


def tensors(kwargs):
    return {k: tensor(v) for k, v in kwargs.items()}


def case_of(key, rng):
    row = OPERATORS[key[0]]
    kwargs = CASES[key](Case(rng, "bfloat16" if key[0].startswith("silu") else "float32"))
    kwargs |= received(row, kwargs, fi_cupy.dtypes.float8_e4m3fn.np)
    return row, kwargs


def outcome(function, kwargs, changed):
    """What a call returns, and the arguments that it overwrites."""
    made = function(**kwargs)
    return [x for x in flat((made, *(kwargs.get(n) for n in changed))) if x is not None]


def same(got, want):
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape and g.dtype == w.dtype
        torch.testing.assert_close(g.to(torch.float64), w.to(torch.float64), rtol=0, atol=0, equal_nan=True)


def as_bytes(value):
    """fp8 arguments as bytes."""
    if isinstance(value, tuple):
        return tuple(map(as_bytes, value))
    return value.view(np.uint8) if getattr(value, "dtype", None) == fi_cupy.dtypes.float8_e4m3fn.np else value


@pytest.fixture(autouse=True)
def fresh():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("key", list(CASES), ids="-".join)
def test_operator_compiled(rng, key):
    row, kwargs = case_of(key, rng)
    changed = (*row.mutated, *row.receivers)
    compiled = torch.compile(getattr(ft, key[0]), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got = outcome(compiled, tensors(kwargs), changed)
    same(got, outcome(row.function, tensors(kwargs), changed))


@pytest.mark.parametrize("key", list(CASES), ids="-".join)
def test_opcheck(rng, key):
    row, kwargs = case_of(key, rng)
    calls = []
    name = f"fi_cupy::{row.name}"

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.name() in (name, f"{name}_out"):
                calls.append(
                    (op, tuple(x.clone() if isinstance(x, torch.Tensor) else x for x in args), dict(kwargs or {}))
                )
            return op(*args, **(kwargs or {}))

    kwargs |= received(row, kwargs)  # opcheck compares what is overwritten, for which torch has no fp8
    if row.updates:
        given = zip(row.out, row.absent, strict=True)
        casts = "quantize_dtype" in row.parameters
        kwargs |= {
            o: np.zeros(kwargs[x].shape, np.uint8 if casts else kwargs[x].dtype)
            for o, x in given
            if kwargs[x] is not None
        }
    kwargs = {k: as_bytes(v) for k, v in kwargs.items()}
    with Recorder(), torch.no_grad():
        getattr(ft, key[0])(**tensors(kwargs))
    (op, args, named), *more = calls
    assert not more
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    assert set(torch.library.opcheck(op, args, named, test_utils=tests).values()) == {"SUCCESS"}


@pytest.mark.parametrize("key", WRAPPER_KEYS, ids="-".join)
def test_planned_wrapper_compiled(rng, key):
    case, row = wrapper_cases("float32")[key], WRAPPERS[key[0]]
    first = case.before + (() if key[0] == "BatchAttention" else (torch.empty(1 << 20, dtype=torch.uint8),))
    options = case.options | ({"device": "cpu"} if key[0] == "BatchAttention" else {})
    plain, traced = row.cls(*first, **options), getattr(ft, key[0])(*first, **options)
    kwargs = case.run(Case(rng, "float32"))
    plan = {k: v for k, v in case.plan.items() if k != "args"}
    for wrapper in (plain, traced):
        getattr(wrapper, row.plan_name)(*copied(case.plan["args"]), **plan)
    want = flat(plain.run(**tensors(kwargs)))
    with torch.no_grad():
        got = torch.compile(traced.run, fullgraph=True, backend="aot_eager")(**tensors(kwargs))
    same(flat(got), want)
    if "lse" in row.out and "return_lse" in kwargs:  # one output given, the other made
        out = torch.full_like(want[0], float("nan"))
        got = traced.run(**tensors(kwargs), out=out)
        assert got[0] is out
        same(list(got), want)


@pytest.mark.parametrize("with_out", [False, True])
def test_opcheck_of_a_planned_run(rng, with_out):
    wrapper = ft.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    wrapper.plan([0, 2, 3], [4, 1, 2], [1, 3], 4, 2, 64, 4, q_data_type="float32")
    x = Case(rng, "float32")
    q, cache, none = tensor(x.x(2, 4, 64)), tensor(x.x(6, 2, 4, 2, 64)), None
    out, lse = torch.empty_like(q), torch.empty(2, 4)
    args = [wrapper._handle, q, cache, none, [], [], [], none, none, none, none, none, none]
    args += [out, lse] if with_out else []
    args += [True, none, none, none, none]
    op = torch.ops.fi_cupy.BatchDecodeWithPagedKVCacheWrapper_run
    op = torch.ops.fi_cupy.BatchDecodeWithPagedKVCacheWrapper_run_out if with_out else op
    assert set(torch.library.opcheck(op.default, tuple(args)).values()) == {"SUCCESS"}


def test_outputs_that_are_given():
    x, w = torch.randn(3, 64), torch.ones(64)
    out = torch.full_like(x, float("nan"))
    compiled = torch.compile(lambda x, out: ft.rmsnorm(x, w, out=out) + 1, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        same([compiled(x, out) - 1], [fi_cupy.rmsnorm(x, w) + 1 - 1])
    same([out], [fi_cupy.rmsnorm(x, w)])
    assert ft.rmsnorm(x, w, out=out) is out
    indptr, lens = torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([5, 2], dtype=torch.int32)
    positions = torch.empty(4, dtype=torch.int32)
    got = ft.get_batch_indices_positions(indptr, lens, 4, positions=positions)
    assert got[1] is positions
    same(list(got), list(fi_cupy.get_batch_indices_positions(indptr, lens, 4)))
    best = torch.zeros(3, dtype=torch.int32)
    assert ft.argmax(x, best, torch.tensor([1, 0, 1], dtype=torch.int32)) is best
    assert best[1] == 0 and best[0] == x[0].argmax()


@pytest.mark.parametrize("kind", ["float32", np.dtype("float32"), torch.float32, fi_cupy.dtypes.float32], ids=repr)
def test_dtypes_of_any_kind_while_compiling(kind):
    a, b = torch.ones(3, 64), torch.ones(64, 32)
    compiled = torch.compile(lambda a: ft.mm_bf16(a, b, out_dtype=kind), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert compiled(a).dtype is torch.float32


def test_sizes_may_change():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(ft.silu_and_mul, fullgraph=True, backend=backend, dynamic=True)
    for rows in (2, 5, 9):
        x = torch.randn(rows, 64)
        same([compiled(x)], [fi_cupy.silu_and_mul(x)])
    assert len(graphs) == 1


def test_errors_come_while_compiling():
    x, w = torch.ones(2, 8), torch.ones(8)
    compiled = torch.compile(ft.rmsnorm, fullgraph=True, backend="eager")
    with (
        pytest.raises(Exception, match=r"rmsnorm: weight has shape \(3,\), expected \(8,\) = input.shape"),
        torch.no_grad(),
    ):
        compiled(x, w[:3])
    with pytest.raises(errors.ShapeError, match=r"^rmsnorm: weight has shape \(3,\), expected \(8,\)"):
        ft.rmsnorm(x, w[:3])
    wrapper = ft.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    with pytest.raises(errors.PlanError, match="must come first"):
        wrapper.run(x, x)
    with pytest.raises(errors.UnsupportedError, match=r"^rmsnorm: has no derivative.*no_grad"):
        ft.rmsnorm(x.requires_grad_(), w).sum().backward()


def test_sampling_draws_from_torchs_generator():
    probs = torch.softmax(torch.randn(64, 40, generator=torch.Generator().manual_seed(0)), -1)
    draw = torch.compile(ft.sampling_from_probs, fullgraph=True, backend="aot_eager")
    torch.manual_seed(3)
    first, second = draw(probs), draw(probs)
    assert (first != second).any()
    torch.manual_seed(3)
    same([draw(probs)], [first])
    generator = torch.Generator()
    a = ft.sampling_from_probs(probs, generator=generator.manual_seed(1))
    same([ft.sampling_from_probs(probs, generator=generator.manual_seed(1))], [a])
    with pytest.raises(errors.ArgumentError, match="seed and generator are both given"):
        ft.sampling_from_probs(probs, generator=generator, seed=1)
    same([ft.sampling_from_probs(probs, seed=2**64 - 1)], [fi_cupy.sampling.sampling_from_probs(probs, seed=2**64 - 1)])


def test_a_logits_pipe(rng):
    from fi_cupy.logits_processor import LogitsPipe, Sample, Softmax, Temperature, TopK, TopP

    logits, steps = tensor(Case(rng, "float32").f32(5, 40)), [Temperature(), TopK(), Softmax(), TopP(), Sample()]
    options = {"temperature": torch.tensor([0.5, 1, 2, 1, 1]), "top_k": 7, "top_p": 0.8, "seed": 3}
    compiled = torch.compile(ft.LogitsPipe(steps), fullgraph=True, backend="aot_eager")
    same([compiled(logits, **options)], [LogitsPipe(steps)(logits, **options)])


def test_a_variant_and_its_arguments(rng):
    from fi_cupy.jit import define_variant

    soft = define_variant("torch_bias", score_fn=lambda score, ctx: score + ctx.bias, scalars={"bias": "float"})
    x = Case(rng, "float32")
    q, k, v = (tensor(x.x(5, 4, 64)) for _ in range(3))
    for cls in (fi_cupy.BatchPrefillWithRaggedKVCacheWrapper, ft.BatchPrefillWithRaggedKVCacheWrapper):
        wrapper = cls(torch.empty(1 << 20, dtype=torch.uint8), variant=soft)
        wrapper.plan([0, 5], [0, 5], 4, 4, 64, q_data_type="float32")
        run = (
            torch.compile(wrapper.run, fullgraph=True, backend="aot_eager")
            if cls.__module__.endswith("torch")
            else wrapper.run
        )
        with torch.no_grad():
            got = run(q, k, v, variant_args={"bias": 2.0})
        if run == wrapper.run:
            want = got
    same([got], [want])


_TWO_PROCESSES = """
import os, sys, torch, torch.distributed as dist
from fi_cupy.interop import torch as ft
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
g = torch.Generator().manual_seed(0)
x, wq, wo = (torch.randn(*s, generator=g) for s in ((2, 32), (32, 4, 64), (4, 64, 32)))
cache = torch.randn(6, 2, 4, 2, 64, generator=g)
table = ([0, 2, 3], [4, 1, 2], [1, 3])

def layer(wrapper, cache, wq, wo):
    q = torch.einsum("th,hnd->tnd", ft.rmsnorm(x, torch.ones(32)), wq)
    return torch.einsum("tnd,ndh->th", wrapper.run(q, cache), wo)

def wrapper(heads, kv_heads):
    made = ft.BatchDecodeWithPagedKVCacheWrapper(torch.empty(1 << 20, dtype=torch.uint8))
    made.plan(*table, heads, kv_heads, 64, 4, q_data_type="float32")
    return made

with torch.no_grad():
    mine = layer(
        wrapper(2, 1), cache[:, :, :, rank : rank + 1], wq[:, 2 * rank : 2 * rank + 2], wo[2 * rank : 2 * rank + 2])
    dist.all_reduce(mine)
    torch.testing.assert_close(mine, layer(wrapper(4, 2), cache, wq, wo), rtol=2e-4, atol=2e-4)
dist.destroy_process_group()
"""


def test_heads_over_two_processes(tmp_path):
    """Tensor parallelism with torch.distributed: each process has half of the heads, gloo sums the projections."""
    command = [sys.executable, "-c", _TWO_PROCESSES]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        _, text = process.communicate(timeout=120)
        assert process.returncode == 0, text
