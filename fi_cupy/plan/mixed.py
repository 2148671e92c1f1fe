"""Mixed schedule: which requests of a batch are prefill tiles and which are decode items, and who begins with what.

The two lists are two queues of one launch (kernels/attention/mixed.cuh). Each lies longest first; their tasks
interleave at run time, since half of the CTAs begin with tiles and the other half with decode items, and a CTA whose
queue is empty goes on with the other. So a multiprocessor computes and reads memory at the same time as long as there
is work of both kinds, and the last tasks to start are the shortest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fi_cupy.plan.decode import DecodePlan, plan_decode
from fi_cupy.plan.prefill import Ints, PrefillPlan, plan_prefill


class MixedPlan(NamedTuple):
    """A schedule: the first column of both lists is the request's first row of q."""

    tiles: PrefillPlan
    items: DecodePlan


def plan_mixed(
    qo_indptr: Ints,
    kv_len: Ints,
    page_begin: Ints,
    *,
    group: int,
    num_kv_heads: int,
    tile_q: int,
    tile_kv: int,
    num_head_blocks: int,
    slots: int,
    causal: bool,
) -> MixedPlan:
    """Make the two work lists: requests of one query token are decode items, those of more are tiles.

    Parameters
    ----------
    qo_indptr : int64 [batch + 1]
    kv_len, page_begin : int64 [batch]
        Keys of every request, and where its pages start.
    group, num_kv_heads, tile_q, tile_kv, slots, causal
        See `plan_prefill`.
    num_head_blocks : int
        See `plan_decode`.
    """
    lens = np.diff(qo_indptr)
    single, more = np.flatnonzero(lens == 1), np.flatnonzero(lens > 1)
    items = plan_decode(kv_len[single], page_begin[single], num_head_blocks=num_head_blocks, slots=slots)
    items.items[:, 0] = qo_indptr[single][items.items[:, 0]]
    indptr = np.zeros(len(more) + 1, np.int64)
    np.cumsum(lens[more], out=indptr[1:])
    tiles = plan_prefill(
        indptr, kv_len[more], page_begin[more], group=group, num_kv_heads=num_kv_heads, tile_q=tile_q, tile_kv=tile_kv,
        slots=slots, causal=causal,
    )  # fmt: skip
    rows = tiles.items.copy()
    request = more[rows[:, 10]]
    rows[:, 0], rows[:, 10] = qo_indptr[request], request
    return MixedPlan(replace(tiles, items=rows), items)


def grid(slots: int, tile_tasks: int, item_tasks: int) -> tuple[int, int]:
    """(CTAs, those of them that begin with a tile): half of them, as long as there are tasks of either kind."""
    ctas = min(slots, tile_tasks + item_tasks)
    return ctas, min(max(-(-ctas // 2), ctas - item_tasks), tile_tasks)
