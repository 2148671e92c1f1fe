"""Small runs of every product, routing and cast kernel for compute-sanitizer, in one process and held to the reference.

    FI_CUPY_LINEINFO=1 compute-sanitizer --tool racecheck --num-cuda-barriers 64 python tests/gpu/race_gemm.py rows fp8

Families: see FAMILIES; by default all. --seconds: begin no further case after so long, and say which were left out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
import test_casts
import test_gemm
import test_gemm_group
import test_gemm_hopper
import test_moe
import test_quantization

from fi_cupy.dtypes import bfloat16, float16, float32
from fi_cupy.gemm.instances import few_spec, rows_spec, stream_spec, tiled_spec, with_residual
from fi_cupy.jit.kernel import load_kernel
from fi_cupy.jit.spec import KernelSpec
from fi_cupy.testing.generators import normal, on_gpu, poisoned, to_float64
from fi_cupy.testing.tolerances import assert_close

Case = tuple[str, Callable[[np.random.Generator], None]]


def few_rows(spec: KernelSpec, columns: int) -> Callable[[np.random.Generator], None]:
    """Ragged rows, columns and k, with bias and residual, launched dependently; `columns` of a CTA (0: 64 x 64)."""

    def run(rng: np.random.Generator) -> None:
        config: dict = dict(spec.config)
        (n, k), gated, dtype = (40, 648), config.get("kGated", False), config["T"]
        m = config.get("kM") or (8 * config["kATiles"] - 3 if "kATiles" in config else 13)
        x, w = normal(rng, (m, k), dtype), normal(rng, (2 * n if gated else n, k), dtype, k**-0.5)
        bias, residual = normal(rng, (len(w),), dtype), normal(rng, (m, n), config["Out"])
        out = poisoned((m, n), config["Out"])
        grid = -(-n // columns) if columns else -(-n // 64) * -(-m // 64)
        given = [on_gpu(y) for y in (x, w, bias, residual)]
        eps = (0.0,) if spec.function == "gemm_few_rms" else ()
        load_kernel(spec, 0).launch(
            grid, 0, *(y.data.ptr for y in given[:3]), out.data.ptr, k, k, n, 0, 0, 0, m, n, k, given[3].data.ptr, n, 0,
            *eps, pdl=True,
        )  # fmt: skip
        x64 = x.astype(np.float64)
        if eps:
            x64 /= np.sqrt((x64**2).mean(axis=1, keepdims=True))
        want = x64 @ w.astype(np.float64).T + bias.astype(np.float64)
        if gated:
            want = test_gemm_hopper.silu(want[:, :n]) * want[:, n:]
        assert_close(to_float64(out), want + residual.astype(np.float64), config["Out"], "product")

    return run


def _few() -> Iterator[Case]:
    b = bfloat16
    for spec, columns in (
        (rows_spec(b, b, 1, 16, 1, 2, 3, 2, True, True), 4), (rows_spec(b, b, 2, 32, 2, 2, 2, 2), 4),
        (with_residual(rows_spec(b, b, 1, 16, 1, 2, 3, 2, True, True)), 4),
        (few_spec(b, b, 1, 1, 2, 6, ahead=True, once=True), 16), (few_spec(b, b, 2, 1, 2, 4, wide=True), 16),
        (with_residual(few_spec(b, b, 1, 1, 2, 6, ahead=True, once=True)), 16),
        (few_spec(b, b, 1, 1, 2, 8, wide=True, ahead=True, gated=True, rms=True, once=True), 8),
        (few_spec(b, b, 2, 1, 2, 3, ahead=True, rms=True), 16),
        (stream_spec(b, b, 1, 1, True, 2, 4), 8), (stream_spec(b, b, 1, 2, False, 2, 6, ahead=True, once=True), 16),
        (with_residual(stream_spec(b, b, 1, 4, False, 1, 11, ahead=True, once=True)), 32),
        (stream_spec(b, b, 4, 4, False, 2, 8), 32), (tiled_spec(b, b, 64, 64, 32, 3, 8, False), 0),
        (tiled_spec(float16, float32, 64, 64, 64, 4, 8, False), 0),
    ):  # fmt: skip
        yield spec.symbol, few_rows(spec, columns)
    yield "row-major b", lambda rng: test_gemm.test_row_major_b(rng, "bfloat16", (65, 136, 584))


def _hopper() -> Iterator[Case]:
    t = test_gemm_hopper
    for name, tile in {**t.TILES, "direct": t.DIRECT}.items():
        yield f"{name} tile", lambda rng, tile=tile: t.test_dense(rng, tile, (129, 264, 1032))
    for name in ("large", "wide"):
        yield f"{name}, n-contiguous b", lambda rng, name=name: t.test_n_contiguous_b(rng, name, (129, 264, 520))
    yield "gated", lambda rng: t.test_gated(rng, "large", False)
    yield "batched", lambda rng: t.test_batched(rng, t.LARGE)
    ragged = t.LENGTHS["ragged"]
    yield "segments", lambda rng: t.test_grouped(rng, t.LARGE, ragged, False)
    yield "segments, n-contiguous b", lambda rng: t.test_grouped(rng, t.SMALL, ragged, True)
    yield "segments, gated", t.test_grouped_gated
    yield "pieces of a round", lambda rng: t.test_last_round_in_pieces(rng, 1650)


def _rows() -> Iterator[Case]:
    t = test_gemm_hopper
    for tile in (*t.FEW[:3], *t.ODD):
        yield f"{tile}", lambda rng, tile=tile: t.test_few_rows_batched_and_fp8(rng, tile)
    for tile in (t.FEW[4], t.ODD[2]):
        yield f"{tile}, residual", lambda rng, tile=tile: t.test_few_rows_in_tiles_of_other_widths(rng, tile)


def _fp8() -> Iterator[Case]:
    t, g = test_gemm_hopper, test_gemm_group
    yield "one factor", lambda rng: t.test_fp8(rng, (t.E4, t.E4), False)
    yield "a factor a row and column", lambda rng: t.test_fp8(rng, (t.E5, t.E4), True)
    for tile in (t.PROMOTED, t.PROMOTED_SMALL, t.TALL, t.BROAD):
        yield f"blocks {tile}", lambda rng, tile=tile: t.test_fp8_blocks(rng, tile, "MN")
    yield "blocks in groups", lambda rng: t.test_fp8_blocks_grouped(rng, [0, 4, 132, 64, 0, 300], "K")
    yield "few rows", lambda rng: g.test_few_rows_of_fp8(rng, 7, None)
    yield "portable, expanded scales", lambda rng: g.test_groupwise(rng, "K", (1, 1, 128), (77, 264, 640))
    yield "quantised operands", lambda rng: g.test_blockscale_quantises_its_operands(rng, 50)


def _groups() -> Iterator[Case]:
    g = test_gemm_group
    yield "portable segments", lambda rng: g.test_segment_lengths_and_weight_indices(rng, "sm80")
    yield "segments", lambda rng: g.test_segment_lengths_and_weight_indices(rng, "auto")
    yield "a number a row", lambda rng: g.test_rows_with_their_groups_number(rng, False, 256)
    yield "a number a row, portable", lambda rng: g.test_rows_with_their_groups_number(rng, False, 400)
    yield "padded groups", lambda rng: g.test_groups_padded_to_one_length(rng, 1)


def _moe() -> Iterator[Case]:
    yield "experts", lambda rng: test_moe.test_values(rng, 37, "bfloat16")
    yield "experts in fp8", lambda rng: test_moe.test_block_fp8(rng, 50)
    for shape in ((256, 8, 4, 8), (96, 3, 3, 32)):
        yield f"routing {shape}", lambda rng, shape=shape: test_moe.test_routing(rng, shape, "float32")


def _casts() -> Iterator[Case]:
    c, q = test_casts, test_quantization
    yield "groups", lambda rng: c.test_groups_of_any_size_and_strided_rows(rng)
    yield "column-major scales", lambda rng: c.test_column_major_scales(rng, True)
    for n in (100, 33000):
        yield f"rows of {n}", lambda rng, n=n: c.test_tokens(rng, n)
    yield "whole arrays", lambda rng: c.test_whole_arrays(rng, "bfloat16")
    yield "tiles", lambda rng: c.test_tiles(rng, (2, 150, 136), "MN")
    for layout in c.quantization.SfLayout:
        yield f"mxfp8 {layout.name}", lambda rng, layout=layout: c.test_mxfp8(rng, 130, layout)
    yield "fp4", lambda rng: c.test_fp4(rng, 16, False, "bfloat16")
    yield "scales in tiles", lambda rng: c.test_scales_move_into_tiles(rng, (130, 9))
    yield "bits", lambda rng: q.test_trap_13_packbits(rng, "bfloat16", "little")
    yield "bits of segments", lambda rng: q.test_trap_12_13_segment_packbits(rng, "bool", "big", np.int32)


FAMILIES: dict[str, Callable[[], Iterator[Case]]] = {
    "few": _few, "rows": _rows, "hopper": _hopper, "fp8": _fp8, "groups": _groups, "moe": _moe, "casts": _casts,
}  # fmt: skip


def main() -> None:
    """Run the families' cases; the last line is "right" if all of them ran and were."""
    import cupy

    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", help=f"of {', '.join(FAMILIES)}; by default all")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    begin, left_out = time.monotonic(), []
    for family in given.families or FAMILIES:
        for name, case in FAMILIES[family]():
            if time.monotonic() - begin > given.seconds:
                left_out.append(f"{family}: {name}")
                continue
            start = time.monotonic()
            case(np.random.default_rng(0))
            cupy.cuda.runtime.deviceSynchronize()
            print(f"{family}: {name} {time.monotonic() - start:.2f} s", flush=True)
    print("\n".join(["left out:", *left_out]) if left_out else "right", flush=True)
    sys.exit(bool(left_out))


if __name__ == "__main__":
    main()
