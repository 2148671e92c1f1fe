"""Instances of the kernels of 16-bit products that run on any architecture: what each can be made as.

`fi_cupy.gemm.select` says which one a product gets.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from fi_cupy.dtypes import DType, bfloat16, float16
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import ConfigValue, CppType, KernelSpec

PARAMS = ParamsStruct(
    "GemmParams",
    [
        ("a", "ptr"),
        ("b", "ptr"),
        ("bias", "ptr"),
        ("out", "ptr"),
        ("a_stride", "i64"),
        ("b_stride", "i64"),
        ("out_stride", "i64"),
        ("a_batch", "i64"),
        ("b_batch", "i64"),
        ("out_batch", "i64"),
        ("m", "u32"),
        ("n", "u32"),
        ("k", "u32"),
        ("residual", "ptr"),
        ("residual_stride", "i64"),
        ("residual_batch", "i64"),
    ],
)
RMS_PARAMS = ParamsStruct(
    "GemmRmsParams", [*((f"product.{name}", kind) for name, kind in PARAMS.fields), ("eps", "f32")]
)


def _spec(
    name: str, function: str, dtype: DType, out: DType, threads: int, config: tuple[tuple[str, ConfigValue], ...],
    *, smem: int = 0, min_blocks: int = 0, min_arch: int = 75, params: ParamsStruct = PARAMS,
) -> KernelSpec:  # fmt: skip
    return KernelSpec(
        symbol=f"{function}_{dtype.tag}{'' if out is dtype else f'_o{out.tag}'}_{name}",
        header=f"gemm/{function.removeprefix('gemm_')}.cuh",
        function=function,
        params=params,
        config=(
            ("T", dtype),
            ("Out", out),
            ("Epilogue", CppType(f"fi::BiasEpilogue<{dtype.cpp}, {out.cpp}>")),
            *config,
        ),
        threads=threads,
        min_blocks=min_blocks,
        smem_bytes=smem,
        min_arch=min_arch,
    )


@lru_cache(maxsize=256)
def rows_spec(
    dtype: DType, out: DType, m: int, lanes: int, rows: int, depth: int, warps_k: int, warps_n: int,
    ahead: bool = False, once: bool = False,
) -> KernelSpec:  # fmt: skip
    """The CUDA-core kernel for `m` rows of a; the other numbers are ``kernels/gemm/rows.cuh``'s Config."""
    return _spec(
        f"m{m}_l{lanes}r{rows}d{depth}_w{warps_k}x{warps_n}{'a' * ahead}{'_once' * once}", "gemm_rows", dtype, out,
        32 * warps_k * warps_n,
        (
            ("kM", m), ("kLanes", lanes), ("kRows", rows), ("kDepth", depth), ("kWarpsK", warps_k),
            ("kWarpsN", warps_n), ("kAhead", ahead), ("kResidual", False), ("kOnce", once),
        ),
    )  # fmt: skip


@lru_cache(maxsize=256)
def few_spec(
    dtype: DType, out: DType, a_tiles: int, w_tiles: int, depth: int, warps_k: int, *, wide: bool = False,
    ahead: bool = False, gated: bool = False, min_blocks: int = 0, rms: bool = False, once: bool = False,
) -> KernelSpec:  # fmt: skip
    """The tensor-core kernel with the weight as left operand; Config of ``kernels/gemm/few.cuh``.

    `rms`: rows of a are divided by their root mean square (``kernels/gemm/few_rms.cuh``).
    """
    return _spec(
        f"{8 * a_tiles}x{16 * w_tiles}{'w' * wide}_d{depth}_w{warps_k}{'a' * ahead}{'_gated' * gated}{'_once' * once}"
        f"{f'_b{min_blocks}' if min_blocks else ''}", "gemm_few" + "_rms" * rms, dtype, out, 32 * warps_k,
        (
            ("kATiles", a_tiles), ("kWTiles", w_tiles), ("kWide", wide), ("kGated", gated), ("kAhead", ahead),
            ("kDepth", depth), ("kWarpsK", warps_k), ("kResidual", False), ("kOnce", once),
        ),
        min_blocks=min_blocks,
        min_arch=80 if dtype is bfloat16 else 75,  # Turing's tensor cores have no bf16
        params=RMS_PARAMS if rms else PARAMS,
    )  # fmt: skip


@lru_cache(maxsize=256)
def with_residual(spec: KernelSpec) -> KernelSpec:
    """The kernel for a call that has a residual: one of few rows asks for it early, where others would wait at the end.

    Its registers would cost the plain product some of its loads in flight, so it is an instance of its own.
    """
    if spec.function not in ("gemm_rows", "gemm_few", "gemm_stream"):
        return spec
    config = tuple((name, True if name == "kResidual" else value) for name, value in spec.config)
    return replace(spec, symbol=f"{spec.symbol}_residual", config=config)


@lru_cache(maxsize=256)
def stream_spec(
    dtype: DType, out: DType, m_tiles: int, n_tiles: int, wide: bool, depth: int, warps_k: int, *,
    ahead: bool = False, once: bool = False,
) -> KernelSpec:  # fmt: skip
    """The tensor-core kernel without shared memory for the operands; Config of ``kernels/gemm/stream.cuh``."""
    return _spec(
        f"{16 * m_tiles}x{8 * n_tiles}{'w' if wide else ''}_d{depth}_w{warps_k}{'a' * ahead}{'_once' * once}",
        "gemm_stream", dtype, out, 32 * warps_k,
        (
            ("kMTiles", m_tiles), ("kNTiles", n_tiles), ("kWide", wide), ("kAhead", ahead), ("kDepth", depth),
            ("kWarpsK", warps_k), ("kResidual", False), ("kOnce", once),
        ),
        min_arch=80 if dtype is bfloat16 else 75,  # Turing's tensor cores have no bf16
    )  # fmt: skip


#: block_m, block_n, CTAs a multiprocessor that registers allow, and the throughput of a full multiprocessor relative to
#: the first: a warp of 64 x 64 reads 4 KB of shared memory for 32 mma, one of 32 x 32 half of that for 8.
TILES: tuple[tuple[int, int, int, float], ...] = (
    (128, 128, 2, 1.0),
    (128, 64, 3, 0.85),
    (64, 128, 3, 0.85),
    (64, 64, 4, 0.7),
)
MIN_BLOCKS = {(m, n): blocks for m, n, blocks, _ in TILES}


@lru_cache(maxsize=256)
def tiled_spec(
    dtype: DType, out: DType, block_m: int, block_n: int, block_k: int, stages: int, group: int, row_major_b: bool
) -> KernelSpec:
    """The shared-memory kernel: 2 x 2 warps; Config of ``kernels/gemm/tiled.cuh``."""
    smem = stages * (block_m + block_n) * block_k * dtype.itemsize
    # Turing has 64 KB of shared memory, and emulated bf16 does not fit its registers in larger tiles.
    turing = smem <= 64 * 1024 and (dtype is float16 or (block_m, block_n, block_k) == (64, 64, 32))
    return _spec(
        f"{block_m}x{block_n}x{block_k}_s{stages}_g{group}{'_rowb' if row_major_b else ''}", "gemm_tiled", dtype, out,
        128,
        (
            ("kBlockM", block_m), ("kBlockN", block_n), ("kBlockK", block_k), ("kStages", stages), ("kWarpsM", 2),
            ("kWarpsN", 2), ("kGroup", group), ("kRowMajorB", row_major_b),
        ),
        smem=smem,
        min_blocks=MIN_BLOCKS[block_m, block_n] if dtype is float16 or not turing else 2,
        min_arch=75 if turing else 80,
    )  # fmt: skip
