# %% [markdown]
# # A Llama decode step in JAX
#
# One `jax.jit` holds a whole decode step: fi_cupy's norms, rope, paged cache and attention between JAX's own products.
# The cache is donated, so the new keys and values are written where they belong and nothing is copied. The plan is made
# outside, once a step; all layers use it.

# %%
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fi_cupy.interop import jax as fj


class Config(NamedTuple):
    layers: int = 2
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    ffn: int = 256
    vocab: int = 96
    page_size: int = 4
    theta: float = 1e4
    eps: float = 1e-5


def random_weights(key: Any, c: Config, dtype: Any) -> dict[str, Any]:
    """Weights of every layer in one array each."""
    shapes = {
        "q": (c.layers, c.hidden, c.heads * c.head_dim), "kv": (c.layers, c.hidden, 2 * c.kv_heads * c.head_dim),
        "o": (c.layers, c.heads * c.head_dim, c.hidden), "up": (c.layers, c.hidden, 2 * c.ffn),
        "down": (c.layers, c.ffn, c.hidden), "embed": (c.vocab, c.hidden),
    }  # fmt: skip
    keys = jax.random.split(key, len(shapes))
    made = {
        name: (jax.random.normal(k, shape) / np.sqrt(shape[-2])).astype(dtype)
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    return made | {"norms": jnp.ones((c.layers, 2, c.hidden), dtype), "last_norm": jnp.ones(c.hidden, dtype)}


class Table(NamedTuple):
    """The page table of a step, in which the new token of every request already counts."""

    indptr: Any
    indices: Any
    last_page_len: Any
    positions: Any  # of the new tokens


# %% [markdown]
# ## The step with fi_cupy
#
# In-place operators are functions here: `fused_add_rmsnorm` returns the normed sum and the sum, `append_paged_kv_cache`
# the cache. XLA lets operand and result share memory.


# %%
def decode_step(c: Config, attention: Any, weights: dict[str, Any], caches: Any, tokens: Any, table: Table) -> Any:
    """(logits, caches) after one token of every request; `caches` is a tuple with a paged cache a layer."""
    batch = tokens.shape[0]
    requests = jnp.arange(batch, dtype=jnp.int32)
    residual = weights["embed"][tokens]
    x, made = fj.rmsnorm(residual, weights["norms"][0, 0], c.eps), []
    for i in range(c.layers):
        q = (x @ weights["q"][i]).reshape(batch, c.heads, c.head_dim)
        k, v = jnp.split((x @ weights["kv"][i]).reshape(batch, 2 * c.kv_heads, c.head_dim), 2, axis=1)
        q, k = fj.apply_rope_pos_ids(q, k, table.positions, rope_theta=c.theta)
        cache = fj.append_paged_kv_cache(
            k, v, requests, table.positions, caches[i], table.indices, table.indptr, table.last_page_len
        )
        made.append(cache)
        x = attention.run(q, cache).reshape(batch, -1) @ weights["o"][i]
        x, residual = fj.fused_add_rmsnorm(x, residual, weights["norms"][i, 1], c.eps)
        x = fj.silu_and_mul(x @ weights["up"][i]) @ weights["down"][i]
        after = weights["norms"][i + 1, 0] if i + 1 < c.layers else weights["last_norm"]
        x, residual = fj.fused_add_rmsnorm(x, residual, after, c.eps)
    return x @ weights["embed"].T, tuple(made)


# %% [markdown]
# ## The same in plain `jax.numpy`


# %%
def plain_step(c: Config, weights: dict[str, Any], caches: Any, tokens: Any, positions: Any, pages: Any) -> Any:
    """`decode_step` without fi_cupy, in float32; request b has the pages ``pages[b]``, not all of them full."""

    def norm(x: Any, w: Any) -> Any:
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + c.eps) * w

    def rope(x: Any) -> Any:
        half = c.head_dim // 2
        angle = positions[:, None, None] * c.theta ** (-jnp.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)

    weights, caches = jax.tree.map(lambda w: w.astype(jnp.float32), (weights, caches))
    batch, made = tokens.shape[0], []
    page = jnp.take_along_axis(pages, positions[:, None] // c.page_size, 1)[:, 0]
    hidden = jnp.arange(pages.shape[1] * c.page_size) > positions[:, None]
    residual = weights["embed"][tokens]
    for i in range(c.layers):
        x = norm(residual, weights["norms"][i, 0])
        q = rope((x @ weights["q"][i]).reshape(batch, c.heads, c.head_dim))
        k, v = jnp.split((x @ weights["kv"][i]).reshape(batch, 2 * c.kv_heads, c.head_dim), 2, axis=1)
        cache = caches[i].at[page, :, positions % c.page_size].set(jnp.stack([rope(k), v], 1))
        keys, values = (cache[pages][:, :, j].reshape(batch, -1, c.kv_heads, c.head_dim) for j in (0, 1))
        grouped = q.reshape(batch, c.kv_heads, -1, c.head_dim)
        scores = jnp.einsum("bhgd,bnhd->bhgn", grouped, keys) / np.sqrt(c.head_dim)
        weight = jax.nn.softmax(jnp.where(hidden[:, None, None], -jnp.inf, scores), -1)
        out = jnp.einsum("bhgn,bnhd->bhgd", weight, values).reshape(batch, -1)
        made.append(cache)
        residual = residual + out @ weights["o"][i]
        gate, up = jnp.split(norm(residual, weights["norms"][i, 1]) @ weights["up"][i], 2, axis=-1)
        residual = residual + (jax.nn.silu(gate) * up) @ weights["down"][i]
    return norm(residual, weights["last_norm"]) @ weights["embed"].T, tuple(made)


# %% [markdown]
# ## Decoding
#
# Requests with 5, 1 and 9 tokens in their caches get four more each. The host knows every length in advance, so it
# plans with host arrays; the table of a step goes to the device with the other arguments.


# %%
def table_of(c: Config, lengths: Any, pages: Any) -> tuple[Table, tuple[Any, Any, Any]]:
    """The table for lengths that include the new tokens, on the device and for `plan`."""
    counts = -(-lengths // c.page_size)
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    indices = np.concatenate([row[:n] for row, n in zip(pages, counts, strict=True)]).astype(np.int32)
    last = ((lengths - 1) % c.page_size + 1).astype(np.int32)
    room = np.zeros(pages.size, np.int32)  # a fixed size, so that no step is traced again
    room[: indices.size] = indices
    host = (indptr, indices, last)
    return Table(*map(jnp.asarray, (indptr, room, last, (lengths - 1).astype(np.int32)))), host


def run(steps: int = 4, dtype: Any = "float32", c: Config = Config()) -> tuple[list[Any], list[Any]]:  # noqa: B008
    """Logits of every step, with fi_cupy and without; checks that the donated caches stay where they are."""
    lengths = np.array([5, 1, 9])
    pages = np.random.default_rng(0).permutation(15).reshape(3, 5)
    weights = random_weights(jax.random.key(0), c, dtype)
    shape = (pages.size, 2, c.page_size, c.kv_heads, c.head_dim)
    plain_caches = tuple(jax.random.normal(jax.random.key(i + 1), shape).astype(dtype) for i in range(c.layers))
    caches = tuple(jnp.array(x) for x in plain_caches)
    attention = fj.BatchDecodeWithPagedKVCacheWrapper(32 << 20)
    step = jax.jit(partial(decode_step, c, attention), donate_argnums=1)
    plain_fn = jax.jit(partial(plain_step, c))
    places = [x.unsafe_buffer_pointer() for x in caches]
    tokens, got, want = jnp.array([1, 2, 3]), [], []
    for _ in range(steps):
        lengths = lengths + 1
        table, host = table_of(c, lengths, pages)
        attention.plan(
            *host,
            c.heads,
            c.kv_heads,
            c.head_dim,
            c.page_size,
            q_data_type=jnp.dtype(dtype),
            kv_data_type=jnp.dtype(dtype),
        )
        plain, plain_caches = plain_fn(weights, plain_caches, tokens, table.positions, jnp.asarray(pages))
        logits, caches = step(weights, caches, tokens, table)
        assert [x.unsafe_buffer_pointer() for x in caches] == places
        got.append(np.asarray(logits, np.float32))
        want.append(np.asarray(plain))
        tokens = jnp.asarray(want[-1].argmax(-1).astype(np.int32))
    return got, want


# %%
if __name__ == "__main__":
    for i, (ours, theirs) in enumerate(zip(*run(), strict=True)):
        print(
            f"step {i}: largest difference of logits {np.abs(ours - theirs).max():.1e}, next tokens {ours.argmax(-1)}"
        )
