"""Which kernel multiplies: pure functions of the shape and the device, with the reason beside each threshold.

Four kernels share one parameter struct (``kernels/gemm/gemm.cuh``):

- ``gemm_rows``: one row on the CUDA cores, limited by reading the weight once;
- ``gemm_few``: up to 16 rows on the tensor cores, the weight straight from global memory to left fragments;
- ``gemm_stream``: some more rows, the weight straight to right fragments;
- ``gemm_tiled``: everything else, through shared memory.

Hopper has two of its own with another struct (`fi_cupy.gemm.hopper`): ``gemm_hopper_rows`` for few rows, and
``gemm_hopper``.

The times in the comments were measured on an H100 with bf16 weights that do not fit in L2, in CUDA graphs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from fi_cupy.device import DeviceInfo
from fi_cupy.dtypes import DType, bfloat16, float16, float32
from fi_cupy.gemm import group, hopper, hopper_rows
from fi_cupy.gemm.instances import MIN_BLOCKS, TILES, few_spec, rows_spec, stream_spec, tiled_spec
from fi_cupy.jit.spec import KernelSpec

Grid = tuple[int, int, int]

#: From two rows on the tensor cores read the weight as fast as the CUDA cores do, and cost nothing per row.
ROWS_MAX = 1
#: Rows of a fragment of `gemm_few`; and those that it always takes where k is long, two fragments: beyond, each CTA
#: reads more of `a` than of `b`.
FEW_TILE, FEW_MAX = 8, 16
#: Rows of `a` up to this size stay in every multiprocessor's L1 (128 KB or more beside the partial sums on most GPUs),
#: so that reading them once a CTA is cheap.
STREAM_A_BYTES = 96 * 1024
STREAM_MAX = 128
#: With dependent launch one row of a k below this goes to `gemm_few`.
DEPENDENT_K = 1024


def _up(a: int, b: int) -> int:
    return -(-a // b)


def _even_depth(steps: int, limit: int) -> int:
    """The fewest slots that need as few rounds as `limit` slots do: 8 steps in at most 7 slots are two rounds of 4."""
    return _up(steps, _up(steps, limit))


def _slow_bf16(dtype: DType, device: DeviceInfo) -> bool:
    """Turing multiplies bf16 on the CUDA cores."""
    return dtype is bfloat16 and device.code_number < 80


def rows_config(k: int) -> tuple[int, int, int, int, int]:
    """(lanes, rows, depth, warps_k, warps_n) of `rows_spec` for rows of k elements; `a` is always requested ahead.

    One or two columns a CTA: thousands of small CTAs stream better than few large ones (4096 x 4096 in 64 CTAs of 64
    columns: 16.4 µs against 12.7). Without `a` ahead of its use every share of it costs a latency: 14.6.
    """
    if k < 2048:
        # A row is too short for 32 lanes x 16 bytes x several warps: 16 lanes read 256 bytes of it, two rows a warp.
        # 2.1 µs at 576 x 576, 20.3 at 49152 x 576, 2.65 at 576 x 1536; 8 lanes are within 2 %.
        steps = _up(k, 128)
        warps_k = min(3, steps)
        return 16, 1, _even_depth(_up(steps, warps_k), 4), warps_k, 2
    # 512 contiguous bytes a row and load: 12.7 µs at 4096 x 4096, 38.9 at 14336 x 4096, 39.5 at 4096 x 14336.
    return 32, 1, _even_depth(_up(_up(k, 256), 8), 4), 8, 1


class FewConfig(NamedTuple):
    """The numbers of `few_spec`."""

    a_tiles: int
    w_tiles: int
    depth: int
    warps_k: int
    wide: bool
    ahead: bool


def few_config(m: int, n: int, k: int, *, batch: int = 1, pdl: bool = False) -> FewConfig:
    """Up to 16 rows: the numbers of ``kernels/gemm/few.cuh``'s Config.

    Loads of 128 contiguous bytes ("wide") win on long streams: 14336 x 4096 at m = 8 in 40.4 µs against 42.2, 4096 x
    4096 in 13.5 against 14.5. With 16 rows of a their second product and its registers cost more where rows are few:
    4096 x 4096 14.6 against 15.7, but 14336 x 4096 42.1 against 43.9. Short weights end before that matters.
    """
    steps, long = _up(k, 64), n * k * 2 * batch >= 40 << 20
    a_tiles = 1 if m <= 8 else 2
    if k >= 2048:
        if a_tiles == 1 or n >= 8192:
            return FewConfig(a_tiles, 1, 2, 8 if a_tiles == 1 else 4, True, True)
        return FewConfig(2, 1, 1, 12, False, True) if pdl else FewConfig(2, 1, 2, 8, False, True)
    if pdl and not long and a_tiles == 1 and k < 1024:
        # The weight is in registers before the predecessor ends; what counts is how soon the rest follows a. Narrow
        # loads need no second product and no shuffles: with 30 of n, k = 3072, 576, gated, a step of the demo model
        # takes 312 us against 337 with wide ones.
        return FewConfig(1, 1, min(2, steps), _up(steps, 2), False, True)
    # As many warps as there are steps: n, k = 576, 576 at m = 8 in 2.4 µs by 9 warps against 2.7 by 3 warps of 3 steps.
    depth = min(2 if a_tiles == 1 else 3, _up(steps, 12 if a_tiles == 1 else 9))
    warps_k = min(_up(steps, depth), 12 if a_tiles == 1 else 9)
    return FewConfig(a_tiles, 1, depth, warps_k, long and a_tiles == 1, long or pdl or (a_tiles == 2 and depth == 1))


def stream_config(m: int, n: int, k: int, device: DeviceInfo, batch: int = 1) -> tuple[int, int, bool, int, int]:
    """(m_tiles, n_tiles, wide, depth, warps_k) of `stream_spec`."""
    m_tiles = 1 if m <= 16 else 2 if m <= 32 else 4
    n_tiles = m_tiles  # 16 and 8 rows a tile: as many bytes of a as two thirds of all a CTA reads
    # At least 0.7 CTAs a multiprocessor, else smaller tiles, the longer side first: the operands are then read more
    # often, from L2, by multiprocessors that had nothing to do.
    while m_tiles * n_tiles > 1 and _up(m, 16 * m_tiles) * _up(n, 8 * n_tiles) * batch < 0.7 * device.num_sms:
        if 16 * m_tiles > 8 * n_tiles and m_tiles > 1:
            m_tiles //= 2
        elif n_tiles > 1:
            n_tiles //= 2
        else:
            m_tiles //= 2
    # Loads of 128 contiguous bytes win on long streams (14336 x 4096: 41.4 against 44.1 µs; 49152 x 576: 20.6 against
    # 21.2) and lose on short ones (4096 x 4096: 15.3 against 14.0).
    wide = m_tiles == n_tiles == 1 and n * k * 2 * batch >= 40 << 20
    steps = _up(k, 64)
    # 3072 x 576 at m = 64: 6.3 us by 8 warps of two steps, 8.0 by 3 of three. (Never an odd number above 4:
    # sums of more than 48 KB are folded in halves.)
    warps_k = 8 if steps >= 8 else max(1, _up(steps, 3))
    share = _up(steps, warps_k)
    # All of a warp's share in registers where it is three steps; beyond 110 registers fewer warps fit, which costs more
    # than the depth gives.
    limit = {1: 2 if wide and share > 3 else 4, 2: 3, 4: 2}[n_tiles]
    return m_tiles, n_tiles, wide, _even_depth(share, limit), warps_k


def tiled_config(
    m: int, n: int, device: DeviceInfo, *, batch: int = 1, slow_bf16: bool = False
) -> tuple[int, int, int, int, int]:
    """(block_m, block_n, block_k, stages, group) of `tiled_spec`.

    The busiest multiprocessor decides: its number of tiles times their area, over the tile's throughput. One CTA alone
    has a warp a scheduler and waits for its own latencies: it counts as 1.7, two at a time hide each other's.
    """
    tiles = TILES[-1:] if slow_bf16 else TILES

    def cost(tile: tuple[int, int, int, float]) -> float:
        block_m, block_n, _, speed = tile
        ctas = _up(m, block_m) * _up(n, block_n) * batch
        return max(1.7, _up(ctas, device.num_sms)) * block_m * block_n / speed

    block_m, block_n, _, _ = min(tiles, key=cost)
    # Two 128 x 128 CTAs a multiprocessor, so that one computes in the other's prologue and epilogue.
    large = block_m + block_n == 256
    kilobytes = device.smem_per_sm >> 10
    if (
        device.code_number < 80
    ):  # Turing's code: 64 KB and no asynchronous copies, more than two stages would hide nothing
        block_k, stages = 32, 2
    elif kilobytes >= 200:  # sm_90, sm_100: 2 x 96 KB; half the barriers with 64 columns a stage
        # A stage less lets one CTA more share a multiprocessor: 384 tiles of 128 x 64 on 132 multiprocessors are one
        # wave of three then, instead of two of two (512 x 6144 x 4096: 68 us against 91).
        ctas = _up(m, block_m) * _up(n, block_n) * batch
        registers = MIN_BLOCKS[block_m, block_n]

        def waves(stages: int) -> int:
            together = min(registers, kilobytes // ((block_m + block_n) * stages // 8 + 1))
            return together * _up(ctas, together * device.num_sms)

        block_k, stages = 64, 3 if large or waves(3) < waves(4) else 4
    elif kilobytes >= 128:  # sm_80, sm_87: 2 x 64 KB
        block_k, stages = 32, 4
    else:  # sm_86, sm_89, sm_120: 2 x 48 KB
        block_k, stages = 32, 3 if large else 4
    # About 2 CTAs a multiprocessor run at a time; groups of the square root of that many tile rows read the fewest
    # distinct rows of a and columns of b: 16 of 264 on 132 multiprocessors.
    return block_m, block_n, block_k, stages, 16 if device.num_sms >= 64 else 8


@lru_cache(maxsize=8192)
def select_mm_kernel(
    m: int,
    n: int,
    k: int,
    device: DeviceInfo,
    dtype: DType = bfloat16,
    out: DType = bfloat16,
    *,
    row_major_b: bool = False,
    batch: int = 1,
    portable: bool = False,
    pdl: bool = False,
) -> tuple[KernelSpec, Grid]:
    """The kernel and the grid for ``[batch, m, k] @ [batch, k, n]``.

    Parameters
    ----------
    m, n, k : int
        Extents; k and n are positive multiples of 8.
    device : DeviceInfo
    dtype, out : DType
        Of the operands and of the result.
    row_major_b : bool
        b is dense along n instead of along k.
    batch : int
    portable : bool
        Leave out the kernels with Hopper's instructions, whose tensor maps do not describe every layout.
    pdl : bool
        The launch is a dependent one: it hides the prologue of ``gemm_hopper_rows``.

    Returns
    -------
    (KernelSpec, (x, y, z))
    """
    found = None if row_major_b else stream_once(m, n, k, device, dtype, out, batch=batch, pdl=pdl)
    if found is not None:
        return found
    if not portable and not hopper.hopper_refusal(device, dtype, n, k):
        found = _hopper_kernel(m, n, k, device, dtype, out, row_major_b, batch, pdl)
        if found is not None:
            return found
    slow = _slow_bf16(dtype, device)
    if not row_major_b:
        dependent = pdl and device.has_pdl and k < DEPENDENT_K and not slow
        if m <= (4 if slow else 0 if dependent else ROWS_MAX):
            lanes, rows, _, _, warps_n = config = rows_config(k)
            return _rows(config, m, k, dtype, out), (_up(n, warps_n * rows * (32 // lanes)), 1, batch)
        if m <= FEW_MAX and not slow:
            few = few_config(m, n, k, batch=batch, pdl=pdl and device.has_pdl)
            return _few(few, k, dtype, out), (_up(n, 16 * few.w_tiles), 1, batch)
        if not slow and _streams(m, n, k, device, batch):
            config = stream_config(m, n, k, device, batch)
            return stream_spec(dtype, out, *config), (_up(n, 8 * config[1]), _up(m, 16 * config[0]), batch)
    config_tiled = tiled_config(m, n, device, batch=batch, slow_bf16=slow)
    spec = tiled_spec(dtype, out, *config_tiled, row_major_b)
    return spec, (_up(m, config_tiled[0]) * _up(n, config_tiled[1]), 1, batch)


def _rows(config: tuple[int, int, int, int, int], m: int, k: int, dtype: DType, out: DType) -> KernelSpec:
    lanes, rows, depth, warps_k, warps_n = config
    once = k <= 8 * lanes * depth * warps_k  # all of k is in registers before the first product
    return rows_spec(dtype, out, m if m <= 2 else 4, lanes, rows, depth, warps_k, warps_n, True, once)


def _few(config: FewConfig, k: int, dtype: DType, out: DType, *, gated: bool = False, rms: bool = False) -> KernelSpec:
    a_tiles, w_tiles, depth, warps_k, wide, ahead = config
    once = k <= 64 * depth * warps_k
    return few_spec(
        dtype, out, a_tiles, w_tiles, depth, warps_k, wide=wide, ahead=ahead, gated=gated, rms=rms, once=once
    )


def select_rms_kernel(
    m: int, n: int, k: int, device: DeviceInfo, dtype: DType = bfloat16, out: DType = bfloat16, *,
    gated: bool = False, pdl: bool = False,
) -> tuple[KernelSpec, Grid] | None:  # fmt: skip
    """The kernel and the grid for a product of few rows that are divided by their root mean square; None for others."""
    if m > FEW_MAX or _slow_bf16(dtype, device):
        return None
    c = few_config(m, 2 * n if gated else n, k, pdl=pdl and device.has_pdl)
    spec = _few(c, k, dtype, out, gated=gated, rms=True)
    return spec, (_up(n, (8 if gated else 16) * c.w_tiles), 1, 1)


def select_gated_kernel(
    m: int, n: int, k: int, device: DeviceInfo, dtype: DType = bfloat16, out: DType = bfloat16
) -> tuple[KernelSpec, Grid] | None:
    """The kernel and the grid for ``silu(a gate) * (a up)`` of few rows; None where shared tiles are better."""
    if m > FEW_MAX or _slow_bf16(dtype, device):
        return None
    few = few_config(m, 2 * n, k)
    return _few(few, k, dtype, out, gated=True), (_up(n, 8 * few.w_tiles), 1, 1)


def gated_spec(
    m: int, n: int, k: int, device: DeviceInfo, dtype: DType = bfloat16, out: DType = bfloat16
) -> KernelSpec:
    """The kernel that `mm_bf16_swiglu` takes, to have it compiled beforehand."""
    chosen = select_gated_kernel(m, n, k, device, dtype, out)
    if chosen is not None:
        return chosen[0]
    if hopper.hopper_refusal(device, dtype, n, k):
        made = group.Group(dtype, dtype, out, gated=True)
        return group.group_spec(made, *group.group_tile(made, m, n, 1, device))
    if m <= HOPPER_ROWS_MAX:
        few = hopper_rows.rows_tile(m, n, 2 * k, device.num_sms, gated=True)
        return hopper_rows.rows_spec(few, dtype, dtype, out, gated=True)
    tile = hopper.hopper_tile(m, n, 2 * k, device.num_sms, gated=True)
    return hopper.hopper_spec(tile, dtype, dtype, out, gated=True)


#: Rows from which Hopper's kernels are ahead of `gemm_stream`.
HOPPER_ROWS = 17
#: Rows that ``gemm_hopper_rows`` takes in one tile; beyond, `hopper_tile` balances rows and columns.
HOPPER_ROWS_MAX = 64


def _hopper_kernel(
    m: int, n: int, k: int, device: DeviceInfo, dtype: DType, out: DType, row_major_b: bool, batch: int, pdl: bool
) -> tuple[KernelSpec, Grid] | None:
    if m < HOPPER_ROWS and not row_major_b:
        # With two fragments of a, `gemm_few` is behind where k is long, and where a dependent launch hides the other's
        # prologue (4096 x 14336 at m = 16: 43.9 us against 42.8 and 40.5; 4096 x 4096 14.6, so 13.2 against 14.1).
        if m <= 8 or k < 2048 or not (k >= 8192 or (pdl and n >= 8192)):
            return None
    tiles_64 = _up(m, 64) * _up(n, 64) * batch
    if not row_major_b and 1024 <= k < 2048 and n <= 2048 and m <= STREAM_MAX and 2 * tiles_64 < device.num_sms:
        # Too long for few CTAs with a ring each, unless a dependent launch hides their start: 576 x 1536 at m = 16
        # takes `gemm_stream` 3.3 us, 4.8 here, with dependent launch 4.1 and 3.4.
        if not pdl or m > HOPPER_ROWS_MAX:
            return None
    few = hopper_rows.rows_tile(m, n, 2 * k, device.num_sms, batch=batch, row_major_b=row_major_b, pdl=pdl)
    # More rows, too, where k is so short that a large tile is all prologue and epilogue, and small ones are one wave:
    # 256 x 576 x 576 3.7 us against 4.4, 1024 x 576 x 576 4.6 against 5.0.
    ctas = _up(n, few.block_n) * few.split * _up(m, 64) * batch
    small = k < 2048 and m <= 1024 and ctas <= device.num_sms
    # Many waves of short products: CTAs that stay have the next tile's operands on their way while they store this one.
    # 64 x 49152 x 576: 25.8 us against 26.3, with dependent launch 24.0 against 25.5.
    waves = k < 1024 and 32 < m <= 64 and not row_major_b and _up(n, 64) * batch >= 4 * device.num_sms
    if (m <= HOPPER_ROWS_MAX and not waves) or (small and not row_major_b):
        spec = hopper_rows.rows_spec(few, dtype, dtype, out, row_major_b=row_major_b)
        return spec, hopper_rows.rows_grid(few, (m, n), batch)
    tile = hopper.hopper_tile(m, n, 2 * k, device.num_sms, batch=batch, row_major_b=row_major_b)
    if waves:
        tile = hopper.TINY
    if k < 2048:  # through shared memory a store takes longer to its end: 1024 x 3072 x 576 in 9.9 us against 9.4
        tile = tile._replace(bulk=False)
    tiles = _up(m, tile.block_m) * _up(n, tile.block_n) * batch
    return hopper.hopper_spec(tile, dtype, dtype, out, row_major_b=row_major_b), (min(tiles, device.num_sms), 1, 1)


def stream_once(
    m: int, n: int, k: int, device: DeviceInfo, dtype: DType, out: DType, *, batch: int = 1, pdl: bool = False
) -> tuple[KernelSpec, Grid] | None:
    """``gemm_stream`` with all of k on its way before the first product, where that is one wave of CTAs.

    64 x 576 x 576: 2.8 us against 3.4 by ``gemm_hopper_rows``, 2.1 against 2.3 with dependent launch, 64 x 576 x 1536
    2.8 against 3.7 so; 16 x 576 x 1536 3.0 against 3.8 by ``gemm_few``.
    """
    steps = _up(k, 64)
    if not FEW_TILE < m <= 64 or steps > 24 or _slow_bf16(dtype, device):
        return None
    # The narrowest tiles that are one wave, which read the least of the weight each: 32 x 576 x 576 2.6 us in 16 x 16,
    # 3.1 in 16 x 32. Beside a predecessor that has not ended fewer CTAs are better: 1.9 and 1.8, 16 x 960 x 576 2.0 in
    # 16 x 8 and 1.65 in 16 x 32.
    sms = device.num_sms
    room = {1: sms, 2: sms, 4: sms}
    if pdl and device.has_pdl:
        room = {4: sms} if m > 16 else {1 if k < 1024 else 2: sms * 3 // 5, 4: sms}
    for tiles, most in room.items():
        grid = _up(n, 8 * tiles), _up(m, 16), batch
        if grid[0] * grid[1] * batch <= most:
            depth = max(_up(steps, 12), 2 if tiles == 1 and steps > 1 else 1)
            return stream_spec(dtype, out, 1, tiles, False, depth, _up(steps, depth), ahead=True, once=True), grid
    return None


def _streams(m: int, n: int, k: int, device: DeviceInfo, batch: int) -> bool:
    if m > STREAM_MAX:
        return False
    # Not where tiles of 64 x 64 fill the device twice: 49152 x 576 at m = 64 takes 28 us in tiles, 50 here.
    if m <= 64 and m * k * 2 <= STREAM_A_BYTES and _up(n, 64) * batch < 2 * device.num_sms:
        return True
    # Split k inside the CTA rather than leave more than half of the multiprocessors without a tile.
    return _up(m, 64) * _up(n, 64) * batch * 2 < device.num_sms


#: GPUs that `kernel_specs` is made for.
H100 = DeviceInfo(90, "90a", 132, 227 << 10, 228 << 10, 50 << 20)
_B200 = DeviceInfo(100, "100a", 148, 227 << 10, 228 << 10, 126 << 20)
_A10 = DeviceInfo(86, "86", 72, 99 << 10, 100 << 10, 6 << 20)
_T4 = DeviceInfo(75, "75", 40, 64 << 10, 64 << 10, 4 << 20)


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances: a 576-wide and a 4096-wide model in bf16, and each kernel in the other types."""
    specs: list[KernelSpec] = []

    def add(m: int, n: int, k: int, device: DeviceInfo = H100, dtype: DType = bfloat16, **options: Any) -> None:
        options.setdefault("out", dtype)
        specs.append(select_mm_kernel(m, n, k, device, dtype, **options)[0])

    for m in (1, 2, 16, 64, 1024):
        for n, k in ((960, 576), (576, 576), (3072, 576), (576, 1536)):
            add(m, n, k, _B200)  # no Hopper instructions: the kernels of every architecture
    for m in (1, 16, 64):
        add(m, 49152, 576)
        add(m, 49152, 576, out=float32)
    for m in (1, 16, 64, 4096):
        add(m, 4096, 4096)
    add(1, 14336, 4096)
    add(1, 4096, 14336)
    specs.append(few_spec(bfloat16, bfloat16, 1, 1, 2, 8, wide=True, ahead=True, gated=True, rms=True, once=True))
    add(4096, 4096, 4096, _B200, row_major_b=True)
    for m in (1, 16, 4096):
        add(m, 4096, 4096, _B200, float16)
    add(4096, 4096, 4096, _A10)
    add(4096, 4096, 4096, _T4, float16)
    add(4096, 4096, 4096, _T4)
    return list(dict.fromkeys(specs + hopper.kernel_specs() + hopper_rows.kernel_specs()))
