"""What an operator costs on the host through each framework: a small RMSNorm, called one after the other.

``python bench/host_interop.py`` prints microseconds a call; the kernel itself takes about 2.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np

import fi_cupy
from fi_cupy.testing.generators import normal, on_gpu

ROWS, HIDDEN, CHAIN = 8, 1024, 32


def microseconds(step: Callable[[], Any], wait: Callable[[Any], None], calls: int, each: int = 1) -> float:
    """Wall time of a call, with the GPU behind the host at the end; best of five."""
    wait(step())
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            last = step()
        wait(last)
        best = min(best, time.perf_counter() - start)
    return best / calls / each * 1e6


def report(name: str, value: float) -> None:
    print(f"{name:64s} {value:8.1f} us", flush=True)


def cupy_rows(x: Any, w: Any) -> None:
    import cupy

    def wait(_: Any) -> None:
        cupy.cuda.runtime.deviceSynchronize()

    cx, cw = on_gpu(x), on_gpu(w)
    out = cupy.empty_like(cx)
    report("cupy: fi_cupy.rmsnorm(out=)", microseconds(lambda: fi_cupy.rmsnorm(cx, cw, out=out), wait, 1000))
    report("cupy: fi_cupy.rmsnorm", microseconds(lambda: fi_cupy.rmsnorm(cx, cw), wait, 1000))


def torch_rows(x: Any, w: Any) -> None:
    import torch

    from fi_cupy.interop import torch as ft

    def wait(_: Any) -> None:
        torch.cuda.synchronize()

    tx, tw = (torch.from_numpy(a.view(np.int16).copy()).cuda().view(torch.bfloat16) for a in (x, w))

    def chain(norm: Any) -> Any:
        def run(y: Any) -> Any:
            for _ in range(CHAIN):
                y = norm(y, tw)
            return y

        return run

    with torch.no_grad():
        report("torch: fi_cupy.rmsnorm", microseconds(lambda: fi_cupy.rmsnorm(tx, tw), wait, 1000))
        report("torch: interop.torch.rmsnorm", microseconds(lambda: ft.rmsnorm(tx, tw), wait, 1000))
        for mode in ("default", "reduce-overhead"):
            run = torch.compile(chain(ft.rmsnorm), fullgraph=True, mode=mode)
            for _ in range(3):
                run(tx)
            report(f"torch.compile, {mode}, a call of {CHAIN}", microseconds(partial(run, tx), wait, 50, CHAIN))


def jax_rows(x: Any, w: Any) -> None:
    import jax
    import jax.numpy as jnp

    from fi_cupy.interop import jax as fj

    jx, jw = jnp.asarray(x), jnp.asarray(w)

    def wait(y: Any) -> None:
        y.block_until_ready()

    def plain(y: Any, w: Any) -> Any:
        z = y.astype(jnp.float32)
        return (z / jnp.sqrt((z * z).mean(-1, keepdims=True) + 1e-6) * w.astype(jnp.float32)).astype(y.dtype)

    def chain(norm: Any) -> Any:
        def run(y: Any) -> Any:
            for _ in range(CHAIN):
                y = norm(y, jw)
            return y

        return jax.jit(run)

    report("jax: fi_cupy.rmsnorm", microseconds(lambda: fi_cupy.rmsnorm(jx, jw), wait, 300))
    report("jax: interop.jax.rmsnorm, eager", microseconds(lambda: fj.rmsnorm(jx, jw), wait, 300))
    one = jax.jit(lambda y: fj.rmsnorm(y, jw))
    report("jax.jit of one interop.jax.rmsnorm", microseconds(lambda: one(jx), wait, 300))
    one_plain = jax.jit(lambda y: plain(y, jw))
    report("jax.jit of one norm in jax.numpy", microseconds(lambda: one_plain(jx), wait, 300))
    run = chain(fj.rmsnorm)
    report(f"jax.jit of {CHAIN} interop.jax.rmsnorm, a call", microseconds(lambda: run(jx), wait, 50, CHAIN))
    fj.command_buffers(True)
    recorded = chain(fj.rmsnorm)
    report("   in command buffers", microseconds(lambda: recorded(jx), wait, 50, CHAIN))
    fj.command_buffers(False)
    run_plain = chain(plain)
    report(f"jax.jit of {CHAIN} norms in jax.numpy, a norm", microseconds(lambda: run_plain(jx), wait, 50, CHAIN))


def main() -> None:
    rng = np.random.default_rng(0)
    x, w = normal(rng, (ROWS, HIDDEN)), normal(rng, (HIDDEN,))
    for rows in (cupy_rows, torch_rows, jax_rows):
        try:
            rows(x, w)
        except ImportError as error:
            print(f"{rows.__name__}: {error}")


if __name__ == "__main__":
    main()
