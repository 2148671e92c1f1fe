"""fi_cupy inside jax.jit on the GPU: the kernels' own results, on XLA's stream, in XLA's memory."""

from __future__ import annotations

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
import pytest
from interop_cases import (
    CASES,
    NOT_IN_JIT,
    WRAPPER_KEYS,
    Case,
    copied,
    flat,
    has_arrays,
    kept_order,
    llama_notebook,
    received,
    wrapper_cases,
)

import fi_cupy
from fi_cupy import errors
from fi_cupy.arrays import view
from fi_cupy.interop.table import OPERATORS
from fi_cupy.interop.wrappers import WRAPPERS
from fi_cupy.testing.generators import normal, on_gpu, to_float64
from fi_cupy.testing.tolerances import assert_close

cupy = pytest.importorskip("cupy")
jax = pytest.importorskip("jax")
jnp = jax.numpy
if jax.default_backend() != "gpu":
    pytest.skip(f"JAX's backend is {jax.default_backend()}", allow_module_level=True)
fj = pytest.importorskip("fi_cupy.interop.jax")


@pytest.fixture(params=[False, True], ids=["", "command_buffer"])
def recorded(request):
    """Without and with XLA's command buffers."""
    fj.command_buffers(request.param)
    yield request.param
    fj.command_buffers(False)


def device_copy(value):
    if isinstance(value, tuple):
        return tuple(device_copy(v) for v in value)
    return kept_order(value, on_gpu) if isinstance(value, np.ndarray) else value


def split(kwargs):
    arrays = {k: v for k, v in kwargs.items() if has_arrays(v)}
    return arrays, {k: v for k, v in kwargs.items() if k not in arrays}


def bits(x):
    """The values, fp8 as bytes."""
    host = np.asarray(x) if isinstance(x, jax.Array) else cupy.asnumpy(x)
    return host.view(np.uint8) if host.dtype.name.startswith("float8") else host.astype(np.float64)


def same(got, want):
    got, want = [x for x in flat(got) if x is not None], list(want)
    assert len(got) == len(want)
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        np.testing.assert_array_equal(bits(g), bits(w))


def eager(row, kwargs):
    """What the operator's own function returns or overwrites, on CuPy arrays."""
    kwargs = {k: device_copy(copied(v)) for k, v in (kwargs | received(row, kwargs)).items()}
    made = row.function(**kwargs)
    changed = flat(tuple(kwargs[n] for n in (*row.receivers, *row.mutated) if kwargs.get(n) is not None))
    returned = [x for x in flat(made) if x is not None]
    return returned + [x for x in changed if not any(x is y for y in returned)]


#: Operators that run in command buffers as well: one a kind of buffers.
IN_COMMAND_BUFFERS = (
    "fused_add_rmsnorm", "rmsnorm_quant", "apply_rope_inplace", "append_paged_kv_cache", "sampling_from_probs", "top_k",
    "mm_bf16", "chain_speculative_sampling",
)  # fmt: skip
KEYS = [k for k in CASES if k not in NOT_IN_JIT]


@pytest.mark.parametrize(
    ("key", "recorded"),
    [*((k, False) for k in KEYS), *((k, True) for k in KEYS if k[0] in IN_COMMAND_BUFFERS)],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else "recorded" if x else "",
    indirect=["recorded"],
)
def test_operator_inside_jit(rng, key, recorded):
    row = OPERATORS[key[0]]
    kwargs = CASES[key](Case(rng, "bfloat16"))
    want = eager(row, kwargs)
    arrays, static = split(kwargs)
    run = jax.jit(lambda arrays: getattr(fj, key[0])(**arrays, **static))
    on_device = jax.tree.map(jnp.asarray, arrays)
    for _ in range(3):
        same(run(on_device), want)


@pytest.mark.parametrize("key", WRAPPER_KEYS, ids="-".join)
def test_planned_wrapper_inside_jit(rng, key):
    case = wrapper_cases("bfloat16")[key]
    own = key[0] == "BatchAttention"
    plain = WRAPPERS[key[0]].cls(*case.before, *(() if own else (cupy.empty(32 << 20, np.uint8),)), **case.options)
    traced = getattr(fj, key[0])(*case.before, *(() if own else (32 << 20,)), **case.options)
    kwargs = case.run(Case(rng, "bfloat16"))
    plan = {k: v for k, v in case.plan.items() if k != "args"}
    for wrapper in (plain, traced):
        getattr(wrapper, WRAPPERS[key[0]].plan_name)(*copied(case.plan["args"]), **plan)
    want = flat(plain.run(**{k: device_copy(copied(v)) for k, v in kwargs.items()}))
    arrays, static = split(kwargs)
    run = jax.jit(lambda a: traced.run(**a, **static))
    for _ in range(3):
        same(run(arrays), want)


def test_fp8_caches_and_outputs(rng):
    q = normal(rng, (8, 128))
    k, v = (normal(rng, (50, 2, 128), "float8_e4m3fn") for _ in range(2))
    got = jax.jit(fj.single_decode_with_kv_cache)(q, k, v)
    same([got], [fi_cupy.single_decode_with_kv_cache(on_gpu(q), on_gpu(k), on_gpu(v))])


def test_a_logits_pipe(rng):
    from fi_cupy.logits_processor import LogitsPipe, Sample, Softmax, Temperature, TopK, TopP

    logits, steps = Case(rng, "bfloat16").f32(5, 4000), [Temperature(), TopK(), Softmax(), TopP(), Sample()]
    run = jax.jit(lambda x, t: fj.LogitsPipe(steps)(x, temperature=t, top_k=7, top_p=0.8, seed=3))
    t = np.float32([0.5, 1, 2, 1, 1])
    want = LogitsPipe(steps)(on_gpu(logits), temperature=on_gpu(t), top_k=7, top_p=0.8, seed=3)
    same([run(logits, t)], [want])


def test_types_of_kernels_are_checked_at_trace_time():
    x, w = jnp.ones((2, 64)), jnp.ones(64)
    with pytest.raises(errors.DTypeError, match=r"layernorm: input has dtype float32, expected float16 or bfloat16"):
        jax.eval_shape(fj.layernorm, x, w, w)
    with pytest.raises(errors.ShapeError, match=r"^rmsnorm: weight has shape \(3,\)"):
        jax.eval_shape(fj.rmsnorm, x, w[:3])


@pytest.mark.parametrize("pair", [False, True])
def test_a_donated_cache_is_overwritten_in_place(rng, pair, recorded):
    """The cache's address stays, its other pages too, and a cache that is not donated is not touched."""
    shape = (2048, 16, 8, 128)
    new, cache = jnp.asarray(normal(rng, (4, 8, 128))), jnp.zeros(shape, "bfloat16") + 3
    cache = (cache, cache * 2) if pair else jnp.stack([cache, cache * 2], 1)
    host = ([0, 1, 2, 3], [17, 0, 31, 5], np.arange(8), [0, 2, 4, 6, 8], [2, 1, 16, 6])
    table = [jnp.array(x, "int32") for x in host]

    def append(cache, new):
        return fj.append_paged_kv_cache(new, -new, table[0], table[1], cache, *table[2:])

    kept = jax.tree.map(jnp.array, cache)
    places = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    step = jax.jit(append, donate_argnums=0)
    lowered = step.lower(cache, new).compile().memory_analysis()
    assert lowered.temp_size_in_bytes < 1 << 20  # no copy of the cache anywhere
    for _ in range(3):
        cache = step(cache, new)
        assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)] == places
    again = jax.jit(append)(kept, new)
    same(again, flat(cache) if pair else [cache])
    untouched = np.asarray(kept[0] if pair else kept[:, 0])
    assert (untouched == 3).all()
    keys = np.asarray(cache[0] if pair else cache[:, 0])
    assert (keys[1, 1] == np.asarray(new)[0]).all() and (keys[100:] == 3).all()


def test_operands_that_xla_has_just_computed(rng):
    """Kernels come after what made their inputs and before what reads their results, without a host wait."""
    w = jnp.asarray(normal(rng, (1024,)))
    x = normal(rng, (64, 1024))

    @jax.jit
    def chain(x):
        m = jax.lax.fori_loop(0, 50, lambda _, m: (m @ m) * 0 + 1e-3, jnp.full((2048, 2048), 1e-3, "float32"))
        late = x + (m[0, 0] - 1e-3).astype(x.dtype)
        return fj.rmsnorm(fj.rmsnorm(late, w), w) * 2

    want = to_float64(fi_cupy.rmsnorm(fi_cupy.rmsnorm(on_gpu(x), on_gpu(np.asarray(w))), on_gpu(np.asarray(w)))) * 2
    for _ in range(5):
        assert_close(np.asarray(chain(jnp.asarray(x))), want, "bfloat16")


def test_command_buffers_are_recorded_once(rng, monkeypatch):
    """Where XLA takes the operators into a command buffer, Python runs only when it is recorded."""
    from fi_cupy.interop import _xla

    calls = []
    real = _xla.Signature.on_gpu
    monkeypatch.setattr(_xla.Signature, "on_gpu", lambda *a: (calls.append(1), real(*a))[1])
    fj.command_buffers(True)
    try:
        w = jnp.asarray(normal(rng, (1024,)))

        @jax.jit
        def chain(x):
            for _ in range(8):
                x = fj.rmsnorm(x, w) + x
            return x

        x = jnp.asarray(normal(rng, (64, 1024)))
        first = chain(x)
        for _ in range(30):
            last = chain(x)
        same([last], [first])
    finally:
        fj.command_buffers(False)
    assert len(calls) < 31 * 8, "no operator was recorded"


def test_plan_waits_for_the_runs_before_it():
    wrapper = fj.BatchDecodeWithPagedKVCacheWrapper(32 << 20)
    cache = np.zeros((4, 2, 16, 1, 64), np.float32)
    cache[:, 1] = np.arange(4)[:, None, None, None]
    q, cache = jnp.ones((1, 1, 64), "bfloat16"), jnp.asarray(cache, "bfloat16")

    @jax.jit
    def late(q, cache):
        m = jax.lax.fori_loop(0, 50, lambda _, m: (m @ m) * 0, jnp.ones((2048, 2048), "float32"))
        return wrapper.run(q + m[0, 0].astype(q.dtype), cache)

    got = []
    for page in range(4):
        wrapper.plan([0, 1], [page], [4], 1, 1, 64, 16, q_data_type="bfloat16")
        got.append(late(q, cache))
    assert [float(x[0, 0, 0]) for x in got] == [0, 1, 2, 3]


def test_inside_shard_map(rng):
    from jax.sharding import Mesh
    from jax.sharding import PartitionSpec as P

    x, w = jnp.asarray(normal(rng, (8, 256))), jnp.asarray(normal(rng, (256,)))
    mesh = Mesh(np.array(jax.devices()), ("tp",))
    run = jax.jit(jax.shard_map(fj.rmsnorm, mesh=mesh, in_specs=(P("tp"), P()), out_specs=P("tp")))
    same([run(x, w)], [fi_cupy.rmsnorm(on_gpu(np.asarray(x)), on_gpu(np.asarray(w)))])


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_llama_decode_step(dtype):
    for got, want in zip(*llama_notebook()["run"](steps=2, dtype=dtype), strict=True):
        scale = np.abs(want).max()
        assert np.abs(got - want).max() < 0.06 * scale


def test_buffers_are_views_of_xlas_memory(rng, monkeypatch):
    """Zero copies: the address that the kernel reads is the array's."""
    from fi_cupy.interop import _xla

    seen = []
    real = _xla._address
    monkeypatch.setattr(_xla, "_address", lambda b: (seen.append(real(b)), real(b))[1])
    x, w = jnp.asarray(normal(rng, (64, 1024))), jnp.asarray(normal(rng, (1024,)))
    y = jax.jit(fj.rmsnorm)(x, w)
    y.block_until_ready()
    addresses = {ptr for ptr, _ in seen}
    assert {a.unsafe_buffer_pointer() for a in (x, w, y)} <= addresses
    assert view(x).device == seen[0][1]
