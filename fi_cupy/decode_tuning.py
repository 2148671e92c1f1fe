"""The tuner's side of batch decode: which CTA shapes it may take, and what a plan uses.

The kernel of a batch follows from its size, never from its lengths, so that a captured graph keeps it; the tuner
measures with the lengths of `keys_of`. Batch-invariant plans keep the default: a request's bits must not depend on
what was measured for another batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fi_cupy.decode_kernel import Geometry, geometries, geometry
from fi_cupy.decode_kernel import Problem as DecodeProblem
from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import DType
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.tuning.choice import Problem, TunableOp, choose
from fi_cupy.tuning.types import (
    ArraySpec,
    ConstraintSpec,
    DynamicTensorSpec,
    OptimizationProfile,
    Shapes,
    TunableRunner,
    TuningConfig,
    round_to_nearest_bucket,
)

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
#: Tokens of a measured page; half of it where a tile of 16 keys crosses pages.
PAGE = 16
MOST_KEYS = 1 << 19


def keys_of(batch: int) -> int:
    """Keys of every request in a measurement: 4096, in large batches 512K keys in all (2 GB with 8 heads of bf16)."""
    return max(PAGE, min(4096, MOST_KEYS // batch) // PAGE * PAGE)


def _bucket(batch: int) -> int:
    return round_to_nearest_bucket(batch, BUCKETS, True)


def _buckets_to(batch: int) -> tuple[int, ...]:
    return BUCKETS[: BUCKETS.index(_bucket(batch)) + 1]


def _pages(shapes: Shapes) -> int:
    return shapes[0][0] * keys_of(shapes[0][0]) // PAGE


class DecodeRunner(TunableRunner):
    """Decodes made batches with a kernel named by its symbol."""

    def __init__(self, problem: DecodeProblem, device: DeviceInfo) -> None:
        self.problem = problem
        self.device_info = device
        self._wrappers: dict[tuple[int, Any], Any] = {}

    def _geometries(self, profile: OptimizationProfile) -> dict[str, Geometry]:
        batch = profile.get_opt_shapes()[0][0]
        return geometries(self.problem._replace(batch_size=batch), self.device_info)

    def get_valid_tactics(self, inputs: Sequence[Any], profile: OptimizationProfile) -> list[str]:
        """Symbols of the kernels, the heuristic's first."""
        return list(self._geometries(profile))

    def kernel_specs(self, tactics: Sequence[Any], profile: OptimizationProfile) -> dict[Any, list[KernelSpec]]:
        """The kernel of each symbol."""
        return {symbol: [g.spec] for symbol, g in self._geometries(profile).items() if symbol in tactics}

    def get_cache_key_extras(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Everything of the problem but the batch."""
        p = self.problem
        options = [
            name for name in ("tile_in_page", "soft_cap", "alibi", "rope", "heads_adjacent") if getattr(p, name)
        ]  # fmt: skip
        return (p.dtype.name, p.kv.name, p.out.name, *options)

    def forward(self, inputs: Sequence[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
        """Attention of the queries over the cache, into the third input."""
        if do_preparation:
            return None
        q, cache, out = inputs
        key = (q.shape[0], tactic)
        if key not in self._wrappers:
            self._wrappers[key] = self._planned(q.shape[0], tactic)
        return self._wrappers[key].run(q, cache, out=out)

    def _planned(self, batch: int, tactic: Any) -> Any:
        """A wrapper planned for a batch, with one kernel whatever the tuner knows."""
        import cupy

        from fi_cupy.decode import BatchDecodeWithPagedKVCacheWrapper

        p, page = self.problem, PAGE if self.problem.tile_in_page else PAGE // 2
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            cupy.empty((64 << 20,), np.uint8), kv_layout="NHD" if p.heads_adjacent else "HND"
        )

        def chosen(problem: DecodeProblem, device: DeviceInfo) -> Any:
            return geometry(problem, device) if tactic == -1 else DECODE.choice((problem, device), tactic)

        wrapper._choose_geometry = chosen
        pages = keys_of(batch) // PAGE
        indptr = np.arange(batch + 1, dtype=np.int32) * pages
        # Pages in random order, as in a cache that has been in use.
        indices = np.random.default_rng(0).permutation(batch * pages).astype(np.int32)
        wrapper.plan(
            indptr, indices, np.full(batch, page, np.int32), p.num_qo_heads, p.num_kv_heads, p.head_dim, page,
            pos_encoding_mode="ROPE_LLAMA" if p.rope else "ALIBI" if p.alibi else "NONE",
            logits_soft_cap=30.0 if p.soft_cap else None, q_data_type=p.dtype.name, kv_data_type=p.kv.name,
            o_data_type=p.out.name,
        )  # fmt: skip
        return wrapper


class _DecodeOp(TunableOp):
    name = "batch_decode"
    config = TuningConfig(
        dynamic_tensor_specs=(DynamicTensorSpec((0, 2), (0, 0), _buckets_to, _bucket),),
        constraint_specs=(ConstraintSpec(1, 0, _pages),),
    )

    def default(self, problem: Problem) -> Geometry:
        return geometry(*problem)

    def choice(self, problem: Problem, tactic: Any) -> Geometry | None:
        p, device = problem
        # The default of the bucket that the tactic was measured at may be none of this batch's candidates.
        for batch in (p.batch_size, _bucket(p.batch_size), BUCKETS[0], BUCKETS[-1]):
            found = geometries(p._replace(batch_size=batch), device).get(tactic)
            if found is not None:
                return found
        return None

    def runner(self, problem: Problem) -> DecodeRunner:
        return DecodeRunner(*problem)

    def inputs(self, problem: Problem) -> list[ArraySpec]:
        p: DecodeProblem = problem[0]
        page = PAGE if p.tile_in_page else PAGE // 2
        tokens = (page, p.num_kv_heads) if p.heads_adjacent else (p.num_kv_heads, page)
        pages = p.batch_size * keys_of(p.batch_size) // PAGE
        return [
            ArraySpec((p.batch_size, p.num_qo_heads, p.head_dim), p.dtype),
            ArraySpec((pages, 2, *tokens, p.head_dim), p.kv),
            ArraySpec((p.batch_size, p.num_qo_heads, p.head_dim), p.out),
        ]

    def kernels(self, choice: Geometry) -> list[KernelSpec]:
        return [choice.spec]

    def device(self, problem: Problem) -> DeviceInfo:
        info: DeviceInfo = problem[1]
        return info


DECODE = _DecodeOp()


def choose_geometry(problem: DecodeProblem, device: DeviceInfo) -> Geometry:
    """The kernel and grid factors of a batch: the tuned ones where there are any."""
    if problem.batch_invariant:
        return geometry(problem, device)
    chosen: Geometry = choose(DECODE, (problem, device))
    return chosen


def decode_problem(
    batch: int, num_qo_heads: int, num_kv_heads: int, head_dim: int, dtype: DType, kv: DType, page_size: int = PAGE
) -> DecodeProblem:
    """The problem of a plain plan over an NHD cache."""
    return DecodeProblem(
        batch, num_qo_heads, num_kv_heads, head_dim, dtype, kv, dtype, page_size % PAGE == 0, False, False, False,
        False, True,
    )  # fmt: skip
