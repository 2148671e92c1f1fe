"""A Llama decode step with its heads on several GPUs: JAX's `shard_map`, and torch.distributed with a process a GPU.

``python bench/tensor_parallel.py jax`` (or ``torch``) compares the step on two devices with the step on one, and
prints milliseconds a step. ``--small`` takes a toy model; ``--cpu`` two CPU devices, or two processes and gloo, where
the NumPy reference computes. The collectives are the frameworks' own; attention, norms, rope and cache are fi_cupy's.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

WORLD = 2


class Config(NamedTuple):
    """A model and the batch that it decodes for."""

    layers: int = 4
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    ffn: int = 14336
    vocab: int = 32000
    page_size: int = 16
    batch: int = 16
    length: int = 1024
    theta: float = 5e5
    eps: float = 1e-5

    def shard(self, world: int) -> Config:
        """What one of `world` devices has: its kv heads with their queries, and its part of the feed-forward layer."""
        return self._replace(heads=self.heads // world, kv_heads=self.kv_heads // world, ffn=self.ffn // world)


SMALL = Config(2, 256, 8, 4, 64, 512, 96, 4, 3, 10)


def page_table(c: Config) -> dict[str, Any]:
    """Every request has `length` tokens, the new one among them, in pages that lie all over the cache."""
    import numpy as np

    pages = -(-c.length // c.page_size)
    return {
        "indptr": np.arange(c.batch + 1, dtype=np.int32) * pages,
        "indices": np.random.default_rng(0).permutation(c.batch * pages).astype(np.int32),
        "last": np.full(c.batch, (c.length - 1) % c.page_size + 1, np.int32),
        "positions": np.full(c.batch, c.length - 1, np.int32),
        "requests": np.arange(c.batch, dtype=np.int32),
    }


def shapes(c: Config) -> dict[str, tuple[int, ...]]:
    """Weights of one layer; what is cut is an axis of its own."""
    return {
        "q": (c.hidden, c.heads, c.head_dim), "kv": (c.hidden, 2, c.kv_heads, c.head_dim),
        "o": (c.heads, c.head_dim, c.hidden), "up": (c.hidden, 2, c.ffn), "down": (c.ffn, c.hidden),
    }  # fmt: skip


#: The axis of each weight, and of a cache [pages, 2, page_size, kv_heads, head_dim], that is cut.
AXES = {"q": 1, "kv": 2, "o": 0, "up": 2, "down": 0, "cache": 3}


def report(name: str, value: float, unit: str) -> None:
    print(f"{name:56s} {value:10.4g} {unit}", flush=True)


def check(name: str, got: Any, want: Any, most: float) -> None:
    """Print how far apart the logits are, and fail where that is too far."""
    import numpy as np

    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    apart = float(np.linalg.norm(got - want) / np.linalg.norm(want))
    report(f"{name}: logits apart", apart, "of their size")
    if not apart < most:
        raise SystemExit(f"{name}: logits are apart by {apart:.3g}, expected less than {most}")


# --- JAX ------------------------------------------------------------------------------------------------------------


def jax_step(c: Config, attention: Any, axis: str | None, weights: Any, caches: Any, tokens: Any, t: Any) -> Any:
    """(logits, caches) after one token of every request; `c` is what this device has, `axis` sums over the devices."""
    import jax
    import jax.numpy as jnp

    from fi_cupy.interop import jax as fj

    def reduced(x: Any) -> Any:
        return x if axis is None else jax.lax.psum(x, axis)

    residual, made = weights["embed"][tokens], []
    x = fj.rmsnorm(residual, weights["norm"], c.eps)
    for w, cache in zip(weights["layers"], caches, strict=True):
        q = jnp.einsum("th,hnd->tnd", x, w["q"])
        kv = jnp.einsum("th,hpnd->ptnd", x, w["kv"])
        q, k = fj.apply_rope_pos_ids(q, kv[0], t["positions"], rope_theta=c.theta)
        cache = fj.append_paged_kv_cache(
            k, kv[1], t["requests"], t["positions"], cache, t["indices"], t["indptr"], t["last"]
        )
        made.append(cache)
        x = reduced(jnp.einsum("tnd,ndh->th", attention.run(q, cache), w["o"]))
        x, residual = fj.fused_add_rmsnorm(x, residual, weights["norm"], c.eps)
        gate_up = jnp.einsum("th,hpf->tpf", x, w["up"]).reshape(c.batch, 2 * c.ffn)
        x = reduced(fj.silu_and_mul(gate_up) @ w["down"])
        x, residual = fj.fused_add_rmsnorm(x, residual, weights["norm"], c.eps)
    return x @ weights["embed"].T, tuple(made)


def jax_main(c: Config, cpu: bool, record: bool) -> None:
    if cpu:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={WORLD}"
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from fi_cupy.interop import jax as fj

    fj.command_buffers(record)
    devices, dtype = jax.devices()[:WORLD], "float32" if cpu else "bfloat16"
    if len(devices) < WORLD:
        raise SystemExit(f"{len(devices)} JAX devices, expected {WORLD}")
    host = page_table(c)
    numbers = {n: jnp.asarray(v) for n, v in host.items()}
    tokens = jnp.arange(c.batch, dtype=jnp.int32) % c.vocab

    def random(key: int, shape: tuple[int, ...], size: float) -> Any:
        return (jax.random.normal(jax.random.key(key), shape) * size).astype(dtype)

    weights = {
        "embed": random(0, (c.vocab, c.hidden), c.hidden**-0.5), "norm": jnp.ones(c.hidden, dtype),
        "layers": [
            {
                name: random(10 * i + j + 1, s, (s[0] * s[1] if name == "o" else s[0]) ** -0.5)
                for j, (name, s) in enumerate(shapes(c).items())
            }
            for i in range(c.layers)
        ],
    }  # fmt: skip
    cache_shape = (len(host["indices"]), 2, c.page_size, c.kv_heads, c.head_dim)
    caches = tuple(random(1000 + i, cache_shape, 1.0) for i in range(c.layers))

    def wrapper(part: Config, on: Any) -> Any:
        sizes = {
            "use_cuda_graph": True,
            "paged_kv_indptr_buffer": c.batch + 1,
            "paged_kv_last_page_len_buffer": c.batch,
        }
        sizes["paged_kv_indices_buffer"] = len(host["indices"])
        made = fj.BatchDecodeWithPagedKVCacheWrapper(64 << 20, devices=on, **(sizes if record else {}))
        plan = (host["indptr"], host["indices"], host["last"], part.heads, part.kv_heads, c.head_dim, c.page_size)
        made.plan(*plan, q_data_type=dtype, kv_data_type=dtype)
        return made

    def cut(name: str, ndim: int) -> Any:
        return P(*("tp" if i == AXES.get(name, -1) else None for i in range(ndim)))

    mesh = Mesh(np.array(devices), ("tp",))
    layer = {name: cut(name, len(s)) for name, s in shapes(c).items()}
    specs = ({"embed": P(), "norm": P(), "layers": [layer] * c.layers}, (cut("cache", 5),) * c.layers, P(), P())
    part = c.shard(WORLD)
    steps = {
        "one device": partial(jax_step, c, wrapper(c, devices[:1]), None),
        "two devices": jax.shard_map(
            partial(jax_step, part, wrapper(part, devices), "tp"), mesh=mesh, in_specs=specs, out_specs=(P(), specs[1])
        ),
    }  # fmt: skip
    logits = {}
    for name, step in steps.items():
        given: Any = (weights, caches, tokens, numbers)
        if name == "two devices":
            given = jax.tree.map(
                lambda s, x: jax.tree.map(lambda y: jax.device_put(y, NamedSharding(mesh, s)), x), specs, given,
                is_leaf=lambda s: isinstance(s, P),
            )  # fmt: skip
        else:
            given = jax.tree.map(jnp.array, given)  # a copy: the caches are donated
        run, state = jax.jit(step, donate_argnums=1), [given[1]]

        def once(run: Any = run, state: list[Any] = state, given: Any = given) -> Any:
            out, state[0] = run(given[0], state[0], *given[2:])
            return out

        start = time.perf_counter()
        logits[name] = np.asarray(once(), np.float32)
        report(f"jax, {name}: first call, with compilation", time.perf_counter() - start, "s")
        report(f"jax, {name}: a step", milliseconds(once, jax.block_until_ready), "ms")
    check("jax", logits["two devices"], logits["one device"], 1e-4 if cpu else 0.05)


def milliseconds(step: Any, wait: Any, calls: int = 20) -> float:
    """Wall time of a step, with the devices behind the host at the end; best of three."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(calls):
            last = step()
        wait(last)
        best = min(best, time.perf_counter() - start)
    return best / calls * 1e3


# --- torch ----------------------------------------------------------------------------------------------------------


def torch_step(c: Config, attention: Any, weights: Any, caches: Any, tokens: Any, t: Any, reduced: Any) -> Any:
    """Logits after one token of every request, whose keys and values are written to `caches`."""
    import torch

    from fi_cupy.interop import torch as ft

    residual = weights["embed"][tokens]
    x = ft.rmsnorm(residual, weights["norm"], c.eps)
    for w, cache in zip(weights["layers"], caches, strict=True):
        q = (x @ w["q"].flatten(1)).view(c.batch, c.heads, c.head_dim)
        k, v = (x @ w["kv"].flatten(1)).view(c.batch, 2, c.kv_heads, c.head_dim).unbind(1)
        ft.apply_rope_pos_ids_inplace(q, k, t["positions"], rope_theta=c.theta)
        ft.append_paged_kv_cache(k, v, t["requests"], t["positions"], cache, t["indices"], t["indptr"], t["last"])
        x = reduced(attention.run(q, cache).flatten(1) @ w["o"].flatten(0, 1))
        ft.fused_add_rmsnorm(x, residual, weights["norm"], c.eps)
        x = reduced(ft.silu_and_mul(x @ w["up"].flatten(1)) @ w["down"])
        ft.fused_add_rmsnorm(x, residual, weights["norm"], c.eps)
    return torch.mm(x, weights["embed"].T)


def torch_main(c: Config, cpu: bool) -> None:
    """Start a process a device, and wait for both."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "torch", "--store", str(Path(folder) / "store")]
        command += ["--cpu"] * cpu + ["--small"] * (c == SMALL)
        ranks = [subprocess.Popen([*command, "--rank", str(rank)]) for rank in range(WORLD)]
        if any([process.wait() for process in ranks]):
            raise SystemExit("torch: a process failed")


def torch_rank(c: Config, cpu: bool, rank: int, store: str) -> None:
    """One process: its part of the model, and in the first one the whole model to compare with."""
    import torch
    import torch.distributed as dist

    from fi_cupy.interop import torch as ft

    device, dtype = ("cpu", torch.float32) if cpu else (f"cuda:{rank}", torch.bfloat16)
    if not cpu:
        torch.cuda.set_device(rank)
    dist.init_process_group("gloo" if cpu else "nccl", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    host = page_table(c)
    t = {n: torch.from_numpy(v).to(device) for n, v in host.items()}
    tokens = torch.arange(c.batch, device=device) % c.vocab
    draw = torch.Generator(device).manual_seed(0)  # the same numbers in every process

    def random(shape: tuple[int, ...], size: float) -> Any:
        return torch.randn(shape, generator=draw, device=device, dtype=dtype) * size

    whole: dict[str, Any] = {"embed": random((c.vocab, c.hidden), c.hidden**-0.5)}
    whole["norm"] = torch.ones(c.hidden, device=device, dtype=dtype)
    whole["layers"] = [
        {n: random(s, (s[0] * s[1] if n == "o" else s[0]) ** -0.5) for n, s in shapes(c).items()}
        for _ in range(c.layers)
    ]
    cache_shape = (len(host["indices"]), 2, c.page_size, c.kv_heads, c.head_dim)
    caches = [random(cache_shape, 1.0) for _ in range(c.layers)]

    def mine(name: str, x: Any) -> Any:
        return x.chunk(WORLD, AXES[name])[rank].contiguous()

    def wrapper(part: Config) -> Any:
        made = ft.BatchDecodeWithPagedKVCacheWrapper(torch.empty(64 << 20, dtype=torch.uint8, device=device))
        plan = (host["indptr"], host["indices"], host["last"], part.heads, part.kv_heads, c.head_dim, c.page_size)
        made.plan(*plan, q_data_type=dtype, kv_data_type=dtype)
        return made

    def summed(x: Any) -> Any:
        dist.all_reduce(x)
        return x

    part = c.shard(WORLD)
    own = {**whole, "layers": [{n: mine(n, x) for n, x in layer.items()} for layer in whole["layers"]]}
    own_caches = [mine("cache", x) for x in caches]
    runs = {"two devices": partial(torch_step, part, wrapper(part), own, own_caches, tokens, t, summed)}
    if rank == 0:
        runs["one device"] = partial(torch_step, c, wrapper(c), whole, caches, tokens, t, lambda x: x)
    logits = {}
    with torch.no_grad():
        for name, run in runs.items():
            start = time.perf_counter()
            logits[name] = run().cpu().float().numpy()
            if rank == 0:
                report(f"torch, {name}: first call", time.perf_counter() - start, "s")
            torch_times(f"torch, {name}", run, cpu, rank == 0)
    if rank == 0:
        check("torch", logits["two devices"], logits["one device"], 1e-4 if cpu else 0.05)
    dist.barrier()
    dist.destroy_process_group()


def torch_times(name: str, run: Any, cpu: bool, print_them: bool) -> None:
    """Milliseconds a step, called and replayed; all processes time together."""
    import torch

    def wait(_: Any) -> None:
        if not cpu:
            torch.cuda.synchronize()

    found = {"a step": milliseconds(run, wait)}
    if not cpu:
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # as torch wants it before a capture
            run()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
        found["a step, as a CUDA graph"] = milliseconds(graph.replay, wait)
    if print_them:
        for what, ms in found.items():
            report(f"{name}: {what}", ms, "ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("framework", choices=("jax", "torch"))
    parser.add_argument("--small", action="store_true", help="a toy model")
    parser.add_argument("--cpu", action="store_true", help="two CPU devices (JAX), two processes and gloo (torch)")
    parser.add_argument("--record", action="store_true", help="JAX: operators may go into command buffers")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    given = parser.parse_args()
    c = SMALL if given.small else Config()
    if given.framework == "jax":
        jax_main(c, given.cpu, given.record)
    elif given.rank is None:
        torch_main(c, given.cpu)
    else:
        torch_rank(c, given.cpu, given.rank, given.store)


if __name__ == "__main__":
    main()
