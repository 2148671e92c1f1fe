"""Where the scale bytes of block formats lie: row by row, or in the tiles that tensor cores of sm_100 read."""

from __future__ import annotations

from enum import Enum

from fi_cupy.errors import ArgumentError


class SfLayout(Enum):
    """Order of scale factors in memory; the tiled ones are padded with zeros to whole tiles."""

    #: Tiles of 128 rows by 4 scales; rows r, r + 32, r + 64 and r + 96 side by side.
    layout_128x4 = 0
    #: Tiles of 8 rows by 4 scales.
    layout_8x4 = 1
    #: Row by row.
    layout_linear = 2


_TILE_ROWS = {SfLayout.layout_128x4: 128, SfLayout.layout_8x4: 8, SfLayout.layout_linear: 0}


def sf_layout(op: str, layout: SfLayout | int | None, swizzled: bool) -> int:
    """Rows of a tile, 0 for none; `layout` overrides `swizzled`."""
    if layout is None:
        return 128 if swizzled else 0
    try:
        return _TILE_ROWS[SfLayout(layout)]
    except ValueError:
        names = " or ".join(f"SfLayout.{each.name}" for each in SfLayout)
        raise ArgumentError(f"{op}: the scales' layout is {layout!r}, expected {names}") from None


def padded_scales(rows: int, columns: int, tile: int) -> tuple[int, int]:
    """(rows, columns) of the scales in memory."""
    return (-(-rows // tile) * tile, -(-columns // 4) * 4) if tile else (rows, columns)
