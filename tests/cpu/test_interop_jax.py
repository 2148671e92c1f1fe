"""fi_cupy inside jax.jit on the CPU: every operator and wrapper against its eager NumPy form, and what is refused."""

from __future__ import annotations

import gc
import os
import weakref

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"

import numpy as np
import pytest
from interop_cases import CASES, NOT_IN_JIT, WRAPPER_KEYS, Case, copied, flat, has_arrays, received, wrapper_cases

import fi_cupy
from fi_cupy import errors
from fi_cupy.interop.table import OPERATORS
from fi_cupy.interop.wrappers import WRAPPERS

jax = pytest.importorskip("jax")
jnp = jax.numpy
fj = pytest.importorskip("fi_cupy.interop.jax")
_call = pytest.importorskip("fi_cupy.interop._jax_call")
_trace = pytest.importorskip("fi_cupy.interop._jax_trace")
_compiled = _call._compiled


def split(kwargs):
    """Arguments that are arrays, and the rest."""
    arrays = {k: v for k, v in kwargs.items() if has_arrays(v)}
    return arrays, {k: v for k, v in kwargs.items() if k not in arrays}


def eager(row, kwargs):
    """What the operator's own function returns or overwrites."""
    kwargs = copied_all(kwargs)
    kwargs |= received(row, kwargs, fi_cupy.dtypes.float8_e4m3fn.np)
    made = row.function(**kwargs)
    overwritten = [kwargs[n] for n in row.receivers + row.mutated if kwargs.get(n) is not None]
    if made is None:
        return flat(tuple(overwritten))
    returned = [x for x in flat(made) if x is not None]
    return returned + [x for x in flat(tuple(overwritten)) if not any(x is y for y in returned)]


def copied_all(kwargs):
    return {k: copied(v) for k, v in kwargs.items()}


def same(got, want):
    got, want = [np.asarray(x) for x in flat(got) if x is not None], [np.asarray(x) for x in want]
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        narrow = {"int64": "int32", "uint64": "uint32"}.get(w.dtype.name, w.dtype.name)
        assert g.shape == w.shape and g.dtype.name == narrow
        np.testing.assert_array_equal(g.astype(np.float64), w.astype(np.float64))


@pytest.mark.parametrize("key", [k for k in CASES if k not in NOT_IN_JIT], ids="-".join)
def test_operator_inside_jit(rng, key):
    row = OPERATORS[key[0]]
    kwargs = CASES[key](Case(rng, "bfloat16" if key[0].startswith("silu") else "float32"))
    arrays, static = split(kwargs)
    got = jax.jit(lambda arrays: getattr(fj, key[0])(**arrays, **static))(arrays)
    same(got, eager(row, kwargs))


@pytest.mark.parametrize("key", WRAPPER_KEYS, ids="-".join)
def test_planned_wrapper_inside_jit(rng, key):
    case = wrapper_cases("float32")[key]
    first = case.before + (() if key[0] == "BatchAttention" else (np.empty(1 << 20, np.uint8),))
    options = case.options | ({"device": "cpu"} if key[0] == "BatchAttention" else {})
    plain = WRAPPERS[key[0]].cls(*first, **options)
    traced = getattr(fj, key[0])(*case.before, *(() if key[0] == "BatchAttention" else (1 << 20,)), **case.options)
    kwargs = case.run(Case(rng, "float32"))
    arrays, static = split(kwargs)
    with pytest.raises(errors.PlanError, match="must come first"):
        jax.jit(lambda a: traced.run(**a, **static))(arrays)
    plan = {k: v for k, v in case.plan.items() if k != "args"}
    for wrapper in (plain, traced):
        getattr(wrapper, WRAPPERS[key[0]].plan_name)(*copied(case.plan["args"]), **plan)
    got = jax.jit(lambda a: traced.run(**a, **static))(arrays)
    same(got, flat(plain.run(**copied_all(kwargs))))


def test_errors_come_at_trace_time_with_our_texts():
    x, w = jnp.ones((2, 8)), jnp.ones(8)
    run = jax.jit(fj.rmsnorm)
    with pytest.raises(
        errors.ShapeError, match=r"^rmsnorm: weight has shape \(3,\), expected \(8,\) = input.shape\[-1:\]"
    ):
        jax.eval_shape(run, x, w[:3])
    with pytest.raises(errors.DTypeError, match=r"^rmsnorm: weight has dtype float16, expected float32 like input"):
        jax.eval_shape(run, x, w.astype("float16"))
    with pytest.raises(errors.DTypeError, match=r"^rmsnorm: an argument has dtype complex64"):
        jax.eval_shape(run, x.astype("complex64"), w)
    with pytest.raises(errors.ArgumentError, match=r"^rmsnorm: out is given, but JAX arrays cannot be written"):
        fj.rmsnorm(x, w, out=x)
    with pytest.raises(errors.ArgumentError, match=r"^rmsnorm: eps is an array, expected a static value"):
        run(x, w, 1e-6)
    with pytest.raises(errors.ArgumentError, match=r"^sampling_from_probs: seed is None"):
        fj.sampling_from_probs(x)
    with pytest.raises(errors.ArgumentError, match=r"^sampling_from_probs: seed has dtype float32"):
        fj.sampling_from_probs(x, seed=w)
    with pytest.raises(errors.UnsupportedError, match=r"^sampling_from_probs: check_nan needs values on the host"):
        fj.sampling_from_probs(x, seed=1, check_nan=True)
    with pytest.raises(errors.UnsupportedError, match=r"^segment_packbits: the size of the result depends on values"):
        fj.segment_packbits(x[0] > 0, jnp.array([0, 8]))
    with pytest.raises(errors.FrameworkError, match=r"JAX tracer.*fi_cupy\.interop\.jax"):
        jax.jit(fi_cupy.rmsnorm)(x, w)


def test_weights_that_lie_column_by_column(rng):
    """Where the caller transposes a row-major weight, no transposition is left for XLA to compute."""
    x, w = (jnp.asarray(Case(rng, "float32").x(*s), jnp.float8_e4m3fn) for s in ((8, 64), (32, 64)))
    step = jax.jit(lambda x, w: fj.mm_fp8(x, w.T, jnp.ones(1), out_dtype="float32"))
    assert "transpose" not in step.lower(x, w).compile().as_text()
    want = x.astype("float32") @ w.astype("float32").T
    np.testing.assert_allclose(step(x, w), want, rtol=1e-6, atol=1e-5)
    with pytest.raises(
        errors.ShapeError, match=r"^mm_fp8: b has 32 rows in \(\) matrices, expected 64 = a.shape\[-1\]"
    ):
        jax.eval_shape(lambda x, w: fj.mm_fp8(x, w, jnp.ones(1)), x, w)
    with pytest.raises(errors.UnsupportedError, match=r"^per_token_group_quant_8bit: a result .* would have strides"):
        fj.per_token_group_quant_8bit(jnp.ones((5, 64)), 32, column_major_scales=True)


def test_vmap_and_grad_are_refused():
    x, w = jnp.ones((3, 2, 8)), jnp.ones(8)
    for mapped in (lambda: jax.vmap(fj.rmsnorm, (0, None))(x, w), lambda: jax.vmap(fj.rmsnorm, (0, None))(x[0], w)):
        with pytest.raises(errors.UnsupportedError, match=r"^rmsnorm: jax.vmap is not supported.*jax.lax.map"):
            mapped()
    np.testing.assert_array_equal(jax.lax.map(lambda a: fj.rmsnorm(a, w), x), fj.rmsnorm(x, w))
    with pytest.raises(errors.UnsupportedError, match=r"^rmsnorm: has no derivative.*jax.custom_vjp"):
        jax.grad(lambda a: fj.rmsnorm(a, w).sum())(x[0])
    grad = jax.grad(lambda a: (fj.rmsnorm(jax.lax.stop_gradient(a), w) * a).sum())(x[0])
    np.testing.assert_allclose(grad, fj.rmsnorm(x[0], w))


def test_a_donated_cache_is_overwritten_in_place(rng):
    new, cache = Case(rng, "float32").x(1, 2, 64), jnp.zeros((6, 2, 4, 2, 64))
    table = [jnp.array(v, "int32") for v in ([0], [1], [5], [0, 1], [2])]

    def append(cache, new):
        return fj.append_paged_kv_cache(new, -new, table[0], table[1], cache, *table[2:])

    kept, place = jnp.array(cache), cache.unsafe_buffer_pointer()
    donated = jax.jit(append, donate_argnums=0)(cache, new)
    assert donated.unsafe_buffer_pointer() == place and cache.is_deleted()
    assert (np.asarray(donated)[5, :, 1] == np.concatenate([new, -new])).all() and (donated != 0).sum() == new.size * 2
    again = jax.jit(append)(kept, new)  # not donated: the caller's array stays
    np.testing.assert_array_equal(again, donated)
    assert not np.asarray(kept).any()


def test_random_seeds():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(64, 40)), "float32")
    draw = jax.jit(lambda seed: fj.sampling_from_logits(logits, seed=seed))
    want = fi_cupy.sampling.sampling_from_logits(np.asarray(logits), seed=9)
    np.testing.assert_array_equal(draw(jnp.array([9])), want)
    np.testing.assert_array_equal(draw(np.array([9], np.uint32)), want)
    a, b = draw(jax.random.key(0)), draw(jax.random.key(1))
    assert (a != b).any()
    rows = np.arange(64, dtype=np.int32)
    per_row = fi_cupy.sampling.sampling_from_logits(np.asarray(logits), seed=rows.astype(np.int64))
    np.testing.assert_array_equal(draw(jnp.asarray(rows)), per_row)


def test_what_xla_may_record(monkeypatch):
    """Only what neither allocates nor copies from the host in a first call; wrappers in CUDA-graph mode."""
    calls = []
    real = _call._Call
    monkeypatch.setattr(_trace, "_Call", lambda *a: (calls.append(real(*a)), calls[-1])[1])
    x, table = jnp.ones((2, 64)), ([0, 1, 2], [1, 0], [4, 4])
    buffers = [np.zeros(n, np.int32) for n in (3, 4, 2)]
    plain = fj.BatchDecodeWithPagedKVCacheWrapper(1 << 20)
    graph = fj.CUDAGraphBatchDecodeWithPagedKVCacheWrapper(np.empty(1 << 20, np.uint8), *buffers)
    for wrapper in (plain, graph):
        wrapper.plan(*table, 1, 1, 64, 4, q_data_type="float32")
    for enabled in (True, False):
        fj.command_buffers(enabled)
        fj.rmsnorm(x, x[0])
        fj.single_decode_with_kv_cache(x, x[:, None], x[:, None])
        for wrapper in (plain, graph):
            wrapper.run(x[:, None], jnp.ones((2, 2, 4, 1, 64)))
    assert [c.recordable for c in calls] == [True, False, False, True] + 4 * [False]


def test_a_logits_pipe(rng):
    from fi_cupy.logits_processor import LogitsPipe, Sample, Softmax, Temperature, TopK, TopP

    logits, steps = Case(rng, "float32").f32(5, 40), [Temperature(), TopK(), Softmax(), TopP(), Sample()]
    run = jax.jit(lambda x, t: fj.LogitsPipe(steps)(x, temperature=t, top_k=7, top_p=0.8, seed=3))
    t = np.float32([0.5, 1, 2, 1, 1])
    same(run(logits, t), [LogitsPipe(steps)(logits, temperature=t, top_k=7, top_p=0.8, seed=3)])
    probs = fj.LogitsPipe([Temperature(), Softmax()])(jnp.asarray(logits), temperature=0.5)
    same(probs, [LogitsPipe([Temperature(), Softmax()])(logits, temperature=0.5)])
    with pytest.raises(errors.UnsupportedError, match=r"^LogitsPipe: 2 operators remain"):
        fj.LogitsPipe([Softmax(), TopK()], compile=False)
    with pytest.raises(errors.ArgumentError, match=r"^LogitsPipe: seed is None"):
        fj.LogitsPipe(steps)(jnp.asarray(logits), temperature=0.5, top_k=7, top_p=0.8)


def test_eager_calls_are_compiled_once():
    x, w = jnp.ones((2, 8)), jnp.ones(8)
    fj.rmsnorm(x, w, 1e-5)
    before = _compiled.cache_info()
    fj.rmsnorm(x + 1, w, 1e-5)
    after = _compiled.cache_info()
    assert (after.misses, after.hits) == (before.misses, before.hits + 1)


def test_plan_waits_for_the_runs_before_it():
    """A run that was dispatched earlier reads the former plan, however late it is computed."""
    wrapper = fj.BatchDecodeWithPagedKVCacheWrapper(1 << 20)
    options = {"q_data_type": "float32", "sm_scale": 1.0}
    cache = np.zeros((4, 2, 4, 1, 64), np.float32)
    cache[:, 1] = np.arange(4)[:, None, None, None]
    q, cache = jnp.ones((1, 1, 64)), jnp.asarray(cache)

    @jax.jit
    def late(q, cache):
        m = jax.lax.fori_loop(0, 60, lambda _, m: jnp.tanh(m @ m), jnp.ones((256, 256)))
        return wrapper.run(q + 0 * m[:1, :1, None], cache)

    got = []
    for page in range(4):
        wrapper.plan([0, 1], [page], [4], 1, 1, 64, 4, **options)
        got.append(late(q, cache))
    assert [float(x[0, 0, 0]) for x in got] == [0, 1, 2, 3]
    with pytest.raises(
        errors.UnsupportedError, match=r"BatchDecodeWithPagedKVCacheWrapper.plan: called inside jax.jit"
    ):
        jax.jit(lambda q: wrapper.plan([0, 1], [0], [4], 1, 1, 64, 4))(q)
    with pytest.raises(errors.FrameworkError, match="float_workspace_buffer is a JAX array"):
        fj.BatchDecodeWithPagedKVCacheWrapper(jnp.zeros(1 << 20, "uint8"))


def test_a_dropped_wrapper_is_freed():
    wrapper = fj.BatchDecodeWithPagedKVCacheWrapper(1 << 20)
    wrapper.plan([0, 1], [0], [4], 1, 1, 64, 4, q_data_type="float32")
    wrapper.run(jnp.ones((1, 1, 64)), jnp.ones((1, 2, 4, 1, 64)))
    inner = weakref.ref(wrapper._wrappers[-1])
    del wrapper
    jax.clear_caches()
    gc.collect()
    assert inner() is None


def test_heads_sharded_over_two_devices(rng):
    """Tensor parallelism: each device has its kv heads and their queries; the output projection is summed by XLA."""
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    mesh = Mesh(np.array(jax.devices()[:2]), ("tp",))
    case = Case(rng, "float32")
    x, cache, wq, wo = case.x(2, 32), case.x(6, 2, 4, 2, 64), case.x(32, 4, 64), case.x(4, 64, 32)
    wrapper = fj.BatchDecodeWithPagedKVCacheWrapper(1 << 20)
    whole = fj.BatchDecodeWithPagedKVCacheWrapper(1 << 20)
    table = ([0, 2, 3], [4, 1, 2], [1, 3])
    wrapper.plan(*table, 2, 1, 64, 4, q_data_type="float32")
    whole.plan(*table, 4, 2, 64, 4, q_data_type="float32")

    def layer(wrapper, x, cache, wq, wo):
        q = jnp.einsum("th,hnd->tnd", fj.rmsnorm(x, jnp.ones(32)), wq)
        return jnp.einsum("tnd,ndh->th", wrapper.run(q, cache), wo)

    def sharded(x, cache, wq, wo):
        return jax.lax.psum(layer(wrapper, x, cache, wq, wo), "tp")

    heads = (P(), P(None, None, None, "tp"), P(None, "tp"), P("tp"))
    step = jax.jit(jax.shard_map(sharded, mesh=mesh, in_specs=heads, out_specs=P()))
    placed = [jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip((x, cache, wq, wo), heads, strict=True)]
    want = jax.jit(lambda *a: layer(whole, *a))(x, cache, wq, wo)
    np.testing.assert_allclose(step(*placed), want, rtol=2e-4, atol=2e-4)
    assert "all-reduce" in step.lower(*placed).compile().as_text()
