"""A few rows of fp8 (``kernels/gemm/few_fp8.cuh``): the weight straight from memory to the tensor cores' fragments."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fi_cupy.dtypes import DType, bfloat16, float8_e4m3fn
from fi_cupy.gemm.hopper import Scale, block_scales, vector_scale
from fi_cupy.gemm.select import FewConfig
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.params import ParamsStruct
from fi_cupy.jit.spec import KernelSpec

if TYPE_CHECKING:
    from fi_cupy.arrays import View
    from fi_cupy.device import DeviceInfo

PARAMS = ParamsStruct(
    "FewFp8Params",
    [
        *((x, "ptr") for x in ("a", "b", "bias", "out", "a_scale", "b_scale")),
        *((f"{x}_stride", "i64") for x in ("a", "b", "out")),
        *((f"{x}_batch", "i64") for x in ("a", "b", "out")),
        *((x, "i64") for x in ("a_scale_row", "a_scale_k", "b_scale_column", "b_scale_k")),
        *((x, "u32") for x in ("m", "n", "k")),
    ],
)
#: Rows that one tile takes.
FEW_MAX = 16


@lru_cache(maxsize=256)
def few_fp8_spec(config: FewConfig, a: DType, b: DType, out: DType, blocks: bool = False) -> KernelSpec:
    """The kernel for types and ``gemm/few.cuh``'s numbers; `blocks`: factors for every 128 of k."""
    a_tiles, w_tiles, depth, warps_k, wide, ahead = config
    types = a.tag + (b.tag if b is not a else "") + f"_o{out.tag}"
    return KernelSpec(
        symbol=f"gemm_few_fp8_{types}_{8 * a_tiles}x{16 * w_tiles}{'w' * wide}_d{depth}_w{warps_k}{'a' * ahead}"
        f"{'_blocks' * blocks}",
        header="gemm/few_fp8.cuh",
        function="gemm_few_fp8",
        params=PARAMS,
        config=(
            ("TA", a), ("TB", b), ("Out", out), ("kATiles", a_tiles), ("kWTiles", w_tiles), ("kWide", wide),
            ("kGated", False), ("kAhead", ahead), ("kDepth", depth), ("kWarpsK", warps_k), ("kBlocks", blocks),
            ("kOnce", False),
        ),
        threads=32 * warps_k,
        min_arch=89,  # whose tensor cores take fp8, or convert it in an instruction
    )  # fmt: skip


def few_fp8_config(m: int, k: int) -> FewConfig:
    """The numbers of `few_fp8_spec`.

    4096 x 4096 at m = 1: 8.5 us by 8 warps with two slots each, 10.4 with four (a CTA a multiprocessor), 9.4 by 4 warps
    with four, 9.4 without `a` ahead of its use. At m = 16: 9.2 with one slot, 11.4 with two.
    """
    warps_k = min(8, -(-k // 128))
    return FewConfig(1 if m <= 8 else 2, 1, min(2 if m <= 8 else 1, -(-k // (128 * warps_k))), warps_k, False, True)


def takes(device: DeviceInfo, m: int, n: int) -> bool:
    """Whether this kernel is the one for m rows: up to 8, and up to 16 where Hopper has no better one.

    14336 x 4096 at m = 16: 23.3 us by ``gemm_hopper_rows``, 26.5 here.
    """
    return device.code_number >= 89 and m <= (8 if device.arch == "90a" and n > 8192 else FEW_MAX)


def _launch(
    spec: KernelSpec, out: View, a: View, w: View, bias: View | None, a_scale: Scale, b_scale: Scale, pdl: bool
) -> None:
    (m, n), k = out.shape[-2:], a.shape[-1]
    batch = a.shape[0] if a.ndim == 3 else 1
    config: dict[str, Any] = dict(spec.config)
    grid = (-(-n // (16 * config["kWTiles"])), -(-m // (8 * config["kATiles"])), batch)
    load_kernel(spec, a.device).launch(
        grid, a.stream(), a.ptr, w.ptr, 0 if bias is None else bias.ptr, out.ptr, a_scale[0], b_scale[0],
        a.strides[-2], w.strides[-2], out.strides[-2], *(x.strides[0] if x.ndim == 3 else 0 for x in (a, w, out)),
        *a_scale[2:], *b_scale[2:], m, n, k, pdl=pdl,
    )  # fmt: skip


def launch_few_fp8(
    out: View, a: View, w: View, a_scale: View, b_scale: View, *, bias: View | None = None, pdl: bool = False,
    config: FewConfig | None = None,
) -> None:  # fmt: skip
    """`hopper.launch_hopper_fp8` for up to 16 rows, on any architecture from sm_89 on; sums are exact in fp32."""
    if out.size == 0:
        return
    config = config or few_fp8_config(out.shape[-2], a.shape[-1])
    spec = few_fp8_spec(config, a.dtype, w.dtype, out.dtype)
    _launch(spec, out, a, w, bias, vector_scale(a_scale), vector_scale(b_scale), pdl)


def launch_few_fp8_blocks(
    out: View, a: View, w: View, a_scale: View, b_scale: View, *, scale_major_mode: str = "MN", pdl: bool = False,
    config: FewConfig | None = None,
) -> None:  # fmt: skip
    """`hopper.launch_hopper_fp8_blocks` for up to 16 rows of one product."""
    if out.size == 0:
        return
    config = config or few_fp8_config(out.shape[0], a.shape[1])
    spec = few_fp8_spec(config, a.dtype, w.dtype, out.dtype, blocks=True)
    _launch(spec, out, a, w, None, *block_scales(a_scale, b_scale, scale_major_mode), pdl)


def kernel_specs() -> list[KernelSpec]:
    """The canonical instances."""
    e4 = float8_e4m3fn
    return [few_fp8_spec(few_fp8_config(1, 4096), e4, e4, bfloat16, blocks) for blocks in (False, True)]
