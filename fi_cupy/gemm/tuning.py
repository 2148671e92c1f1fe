"""The tuner's side of the products: which kernels may multiply a shape, and what `mm_bf16` launches.

`fi_cupy.gemm.select` holds the heuristics; here its configurations become a ranked list with that choice first and
close neighbours behind it, and `choose_mm_kernel` is the question a call asks.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import DType
from fi_cupy.gemm import hopper, hopper_rows, instances, select
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.tuning.choice import Problem, TunableOp, choose
from fi_cupy.tuning.types import (
    ArraySpec,
    ConstraintSpec,
    DynamicTensorSpec,
    OptimizationProfile,
    TunableRunner,
    TuningConfig,
    round_to_nearest_bucket,
)

Grid = tuple[int, int, int]
#: Rows that are measured: the sizes of decode batches one by one where kernels change with every row, then in steps
#: within which a tile is filled alike.
BUCKETS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192, 16384)


class MmProblem(NamedTuple):
    """What decides the kernel of a product ``[batch, m, k] @ [batch, k, n]``."""

    m: int
    n: int
    k: int
    device: DeviceInfo
    dtype: DType
    out: DType
    row_major_b: bool = False
    batch: int = 1
    pdl: bool = False
    portable: bool = False


class Candidate(NamedTuple):
    """A kernel that can multiply; its grid follows from the shape, since one choice serves all rows of a bucket.

    Attributes
    ----------
    spec : KernelSpec
    block_m, block_n : int
        Rows and columns of the result that a CTA (or a cluster that shares k) computes at a time.
    walk : {"plane", "flat", "persistent", "heuristic"}
        How the grid covers the tiles: columns by rows by batch; all of a matrix by batch; as many CTAs as fit the
        device; as the heuristic says, for the shapes where it takes this kernel.
    max_rows : int
        0: any number.
    """

    spec: KernelSpec
    block_m: int
    block_n: int
    walk: str
    max_rows: int = 0

    def launch(self, p: MmProblem) -> tuple[KernelSpec, Grid] | None:
        """The kernel and the grid for a problem, or None if it cannot take it."""
        if self.max_rows and p.m > self.max_rows:
            return None
        if self.walk == "heuristic":
            heuristic = _heuristic(p)
            return heuristic if heuristic[0] == self.spec else None
        tiles_m, tiles_n = -(-p.m // self.block_m), -(-p.n // self.block_n)
        if self.walk == "persistent":
            return self.spec, (min(tiles_m * tiles_n * p.batch, p.device.num_sms), 1, 1)
        if self.walk == "flat":
            return self.spec, (tiles_m * tiles_n, 1, p.batch)
        return self.spec, (tiles_n * max(1, self.spec.cluster), tiles_m, p.batch)


def _heuristic(p: MmProblem) -> tuple[KernelSpec, Grid]:
    return select.select_mm_kernel(
        p.m, p.n, p.k, p.device, p.dtype, p.out, row_major_b=p.row_major_b, batch=p.batch, portable=p.portable,
        pdl=p.pdl,
    )  # fmt: skip


def _rows(p: MmProblem) -> Iterator[Candidate]:
    held = p.m if p.m <= 2 else 4
    lanes, rows, depth, warps_k, warps_n = select.rows_config(p.k)
    shapes = [(lanes, rows, depth, warps_k, warps_n), (lanes, 2 * rows, max(1, depth // 2), warps_k, warps_n)]
    shapes += [(lanes, rows, depth, warps_k, w) for w in (2 * warps_n, 1)]
    if lanes == 32:
        steps = -(-p.k // 256)
        for r, limit, wk, wn in ((1, 2, 8, 1), (2, 2, 8, 1), (2, 4, 4, 2), (1, 7, 8, 1), (4, 2, 4, 2), (1, 4, 4, 2)):
            shapes.append((lanes, r, select._even_depth(-(-steps // wk), limit), wk, wn))
    else:  # narrower pieces of a short row
        steps = -(-p.k // 64)
        shapes += [(8, 1, select._even_depth(-(-steps // w), 4), w, max(1, 4 // w)) for w in (3, 8) if w <= steps]
    for shape in dict.fromkeys(shapes):
        if shape[3] * shape[4] <= 16:
            spec = select._rows(shape, p.m, p.k, p.dtype, p.out)
            yield Candidate(spec, held, shape[4] * shape[1] * (32 // shape[0]), "plane", held)


def _few(p: MmProblem) -> Iterator[Candidate]:
    own = select.few_config(p.m, p.n, p.k, batch=p.batch, pdl=p.pdl)
    steps = -(-p.k // 64)
    shapes = [own]
    for warps_k, depth, wide, ahead in itertools.product((4, 8, 12), (1, 2, 3), (False, True), (False, True)):
        # Neither more warps than steps nor more slots than a warp has steps.
        if warps_k <= steps and depth <= -(-steps // warps_k) and not (wide and depth == 3):
            shapes.append(select.FewConfig(own.a_tiles, 1, depth, warps_k, wide, ahead))
    if own.a_tiles == 2 and steps >= 32:  # half as many reads of a
        shapes += [select.FewConfig(2, 2, depth, warps_k, False, True) for depth in (1, 2) for warps_k in (8, 12)]
    for shape in dict.fromkeys(shapes):
        spec = select._few(shape, p.k, p.dtype, p.out)
        yield Candidate(spec, 8 * shape.a_tiles, 16 * shape.w_tiles, "plane")


def _stream(p: MmProblem) -> Iterator[Candidate]:
    steps = -(-p.k // 64)
    own = select.stream_config(p.m, p.n, p.k, p.device, p.batch)
    splits = dict.fromkeys((own[4], min(8, max(1, -(-steps // 3))), 8 if steps >= 8 else 4, 4))
    shapes = [own]
    for m_tiles, n_tiles in ((1, 1), (1, 2), (2, 1), (2, 2), (4, 2), (2, 4), (4, 4)):
        if m_tiles > 1 and 8 * m_tiles >= p.m:
            continue  # more than half of the tile would be rows that are not there
        single = m_tiles == n_tiles == 1
        depths = (2, 3, 4) if single else (2, 3) if m_tiles * n_tiles < 8 else (2,)
        for warps_k, depth, wide in itertools.product(splits, depths, (False, True) if single else (False,)):
            if depth <= -(-steps // warps_k):
                shapes.append((m_tiles, n_tiles, wide, depth, warps_k))
    for shape in dict.fromkeys(shapes):
        yield Candidate(instances.stream_spec(p.dtype, p.out, *shape), 16 * shape[0], 8 * shape[1], "plane")
    for tiles, depth in itertools.product(((1, 2), (1, 4), (2, 2), (2, 4), (4, 2), (4, 4), (1, 1)), (1, 2, 3)):
        # All of k on its way before the first product: what of both operands fits a thread's registers, and sums 48 KB.
        warps_k, sums = -(-steps // depth), 16 * tiles[0] * (8 * tiles[1] + 8) * 4
        if warps_k > 12 or depth * sum(tiles) > 10 or (tiles[0] > 1 and 8 * tiles[0] >= p.m):
            continue
        if warps_k * sums <= 48 << 10 or warps_k % 2 == 0:
            spec = instances.stream_spec(p.dtype, p.out, *tiles, False, depth, warps_k, ahead=True, once=True)
            yield Candidate(spec, 16 * tiles[0], 8 * tiles[1], "plane")


def _tiled(p: MmProblem, slow: bool) -> Iterator[Candidate]:
    own = select.tiled_config(p.m, p.n, p.device, batch=p.batch, slow_bf16=slow)
    block_k, _, group = own[2:]
    shapes = [own]
    for block_m, block_n, _, _ in instances.TILES[-1:] if slow else instances.TILES:
        if block_m == 128 and p.m <= 64:
            continue
        large = block_m + block_n == 256
        for s in (2,) if p.device.code_number < 80 else (3,) if large else (3, 4):
            shapes += [(block_m, block_n, block_k, s, g) for g in dict.fromkeys((group, 8, 16))]
    for shape in dict.fromkeys(shapes):
        spec = instances.tiled_spec(p.dtype, p.out, *shape, p.row_major_b)
        if spec.supports(p.device.arch) and spec.smem_bytes <= p.device.smem_per_block:
            yield Candidate(spec, shape[0], shape[1], "flat")


def _hopper(p: MmProblem) -> Iterator[Candidate]:
    """Hopper's own kernels: few rows in clusters that share k, and tiles for one or two consumer warpgroups."""
    blocks = -(-p.k * p.dtype.itemsize // 128)
    if p.m <= select.HOPPER_ROWS_MAX:
        rows = next(r for r in (8, 16, 32, 64) if p.m <= r)
        widths, rooms = (
            hopper_rows.widths(False, p.row_major_b, hopper.NONE),
            (hopper_rows._ALONE, hopper_rows._SHARING),
        )
        for block_n, split, room in itertools.product(widths, (1, 2, 4), rooms):
            if block_n % 64 and split > 1:
                continue
            stages = hopper_rows.stages_in(room, rows, block_n, split)
            tile = hopper_rows.RowsTile(rows, block_n, split, stages)
            if split <= max(1, blocks // 4):
                spec = hopper_rows.rows_spec(tile, p.dtype, p.dtype, p.out, row_major_b=p.row_major_b)
                yield Candidate(spec, rows, block_n, "plane")
    elif p.m <= 1024 and p.k < 2048:  # too short for a large tile's prologue: two or three small CTAs a multiprocessor
        for block_n, room in itertools.product((32, 64, 96), (hopper_rows._SHARING, hopper_rows._ALONE)):
            if block_n % 64 and p.row_major_b:
                continue
            tile = hopper_rows.RowsTile(64, block_n, 1, hopper_rows.stages_in(room, 64, block_n, 1))
            spec = hopper_rows.rows_spec(tile, p.dtype, p.dtype, p.out, row_major_b=p.row_major_b)
            yield Candidate(spec, 64, block_n, "plane")
    if p.m > 16:
        tiles = [hopper.LARGE, hopper.BROAD, hopper.MIDDLE, hopper.WIDE, hopper.SMALL, hopper.TINY]
        if p.k < 2048:  # a store through shared memory takes longer from the last product to the end
            tiles += [x._replace(bulk=False) for x in tiles[:3]]
        for shape in tiles:
            columns = shape.block_n // shape.warps_n
            if columns >= 32 * (1 + p.row_major_b) and (shape.block_m == 64 or p.m > 64):
                large = hopper.hopper_spec(shape, p.dtype, p.dtype, p.out, row_major_b=p.row_major_b)
                yield Candidate(large, shape.block_m, shape.block_n, "persistent")


@lru_cache(maxsize=1024)
def mm_candidates(p: MmProblem) -> tuple[Candidate, ...]:
    """Every kernel worth a measurement for a problem: the heuristic's choice first, then close neighbours."""
    default = _heuristic(p)
    slow = select._slow_bf16(p.dtype, p.device)
    found: dict[str, Candidate] = {}
    groups: list[Iterator[Candidate]] = []
    if not p.row_major_b and p.m <= 4:
        groups.append(_rows(p))
    if not p.row_major_b and not slow and p.m <= select.FEW_MAX:
        groups.append(_few(p))
    if not p.row_major_b and not slow and 8 < p.m <= 2 * select.STREAM_MAX:
        groups.append(_stream(p))
    if p.row_major_b or slow or p.m > 8:
        groups.append(_tiled(p, slow))
    if not p.portable and not hopper.hopper_refusal(p.device, p.dtype, p.n, p.k):
        groups.append(_hopper(p))
    for group in groups:
        for candidate in group:
            if candidate.spec.supports(p.device.arch):
                found.setdefault(candidate.spec.symbol, candidate)
    first = found.pop(default[0].symbol, Candidate(default[0], 1, 1, "heuristic"))
    return (first, *found.values())


def _bucket(m: int) -> int:
    return round_to_nearest_bucket(m, BUCKETS, True)


def _buckets_to(m: int) -> tuple[int, ...]:
    """The buckets that `m` rows and fewer fall into: a pass over the largest batch tunes all smaller ones."""
    return BUCKETS[: BUCKETS.index(_bucket(m)) + 1]


class MmRunner(TunableRunner):
    """Multiplies made operands with a kernel named by its symbol."""

    def __init__(self, problem: MmProblem) -> None:
        self.problem = problem
        self.device_info = problem.device

    def at(self, m: int) -> MmProblem:
        """The problem with another number of rows."""
        return self.problem._replace(m=m)

    def get_valid_tactics(self, inputs: Sequence[Any], profile: OptimizationProfile) -> list[str]:
        """Symbols of the kernels, the heuristic's first."""
        return [c.spec.symbol for c in mm_candidates(self.at(profile.get_opt_shapes()[0][-2]))]

    def kernel_specs(self, tactics: Sequence[Any], profile: OptimizationProfile) -> dict[Any, list[KernelSpec]]:
        """The kernel of each symbol."""
        candidates = mm_candidates(self.at(profile.get_opt_shapes()[0][-2]))
        return {c.spec.symbol: [c.spec] for c in candidates if c.spec.symbol in tactics}

    def get_cache_key_extras(self, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """Types, layout and the way of launching."""
        p = self.problem
        layout = ("row-major b" if p.row_major_b else "column-major b") + (", portable" if p.portable else "")
        return (p.dtype.name, p.out.name, layout, "pdl" if p.pdl else "")

    def forward(self, inputs: Sequence[Any], tactic: Any = -1, do_preparation: bool = False, **kwargs: Any) -> Any:
        """``a @ b`` into the third input."""
        from fi_cupy.arrays import view
        from fi_cupy.gemm.dense import _multiply

        if do_preparation:
            return None
        a, b, out = inputs
        problem = self.at(a.shape[-2])
        chosen = MM.default(problem) if tactic == -1 else MM.choice(problem, tactic)
        x, w, o = view(a), view(b if problem.row_major_b else b.swapaxes(-1, -2)), view(out)
        _multiply("mm_bf16", x, w, None, None, o, problem.row_major_b, problem.pdl, a.ndim == 3, chosen=chosen)
        return out


class _MmOp(TunableOp):
    def __init__(self, name: str, batched: bool) -> None:
        rows = 1 if batched else 0
        self.name = name
        self._batched = batched
        self.config = TuningConfig(
            dynamic_tensor_specs=(DynamicTensorSpec((0,), (rows,), _buckets_to, _bucket),),
            constraint_specs=(ConstraintSpec(2, rows, lambda shapes: shapes[0][-2]),),
        )

    def default(self, problem: Problem) -> Any:
        return _heuristic(MmProblem(*problem))

    def choice(self, problem: Problem, tactic: Any) -> Any:
        # The candidates of the bucket that the tactic was measured at hold its symbol, those of fewer rows may not.
        p = MmProblem(*problem)
        for m in dict.fromkeys((p.m, _bucket(p.m), *reversed(BUCKETS))):
            for candidate in mm_candidates(p._replace(m=m)):
                if candidate.spec.symbol == tactic:
                    return candidate.launch(p)
        return None

    def runner(self, problem: Problem) -> MmRunner:
        return MmRunner(MmProblem(*problem))

    def inputs(self, problem: Problem) -> list[ArraySpec]:
        p = MmProblem(*problem)
        front = (p.batch,) if self._batched else ()
        b = (p.k, p.n) if p.row_major_b else (p.n, p.k)
        return [
            ArraySpec((*front, p.m, p.k), p.dtype), ArraySpec((*front, *b), p.dtype),
            ArraySpec((*front, p.m, p.n), p.out),
        ]  # fmt: skip

    def kernels(self, choice: tuple[KernelSpec, Grid]) -> list[KernelSpec]:
        return [choice[0]]

    def device(self, problem: Problem) -> DeviceInfo:
        return MmProblem(*problem).device


MM = _MmOp("mm_bf16", batched=False)
BMM = _MmOp("bmm_bf16", batched=True)


def choose_mm_kernel(op: str, problem: tuple[Any, ...]) -> tuple[KernelSpec, Grid]:
    """What `mm_bf16` or `bmm_bf16` launches for a problem (the fields of `MmProblem`)."""
    chosen: tuple[KernelSpec, Grid] = choose(BMM if op == "bmm_bf16" else MM, problem)
    return chosen
