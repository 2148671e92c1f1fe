"""NumPy-free mirrors of the kernels' parameter structs.

A kernel takes one struct by value. `ParamsStruct` lists its fields as the C struct does, packs them into a buffer in
one call (`struct.Struct.pack_into`, the cheapest way Python has), and renders ``static_assert`` lines that compare
every offset and the size with the C side at compile time.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

#: kind -> (struct format, size, alignment)
_KINDS: dict[str, tuple[str, int, int]] = {
    "ptr": ("Q", 8, 8),
    "i64": ("q", 8, 8),
    "u64": ("Q", 8, 8),
    "f64": ("d", 8, 8),
    "i32": ("i", 4, 4),
    "u32": ("I", 4, 4),
    "f32": ("f", 4, 4),
    "u16": ("H", 2, 2),
    "u8": ("B", 1, 1),
    "tensormap": ("128s", 128, 64),  # CUtensorMap: opaque, 64-byte aligned
}


class ParamsStruct:
    """One C struct: its name and its fields in order.

    Parameters
    ----------
    name : str
        The struct's C++ name, without namespace ``fi::``.
    fields : sequence of (name, kind)
        kind is one of ptr, i64, u64, f64, i32, u32, f32, u16, u8, tensormap.
    """

    __slots__ = ("_hash", "_struct", "alignment", "fields", "name", "offsets", "size")

    def __init__(self, name: str, fields: Sequence[tuple[str, str]]) -> None:
        self.name = name
        self.fields = tuple(fields)
        offset, alignment, fmt, offsets = 0, 1, "<", []
        for _, kind in self.fields:
            code, size, align = _KINDS[kind]
            pad = -offset % align
            fmt += f"{pad}x" * (pad > 0) + code
            offset += pad
            offsets.append(offset)
            offset += size
            alignment = max(alignment, align)
        pad = -offset % alignment
        self._struct = struct.Struct(fmt + f"{pad}x" * (pad > 0))
        self.size = offset + pad
        self.alignment = alignment
        self.offsets = tuple(offsets)
        self._hash = hash((name, self.fields))

    def pack_into(self, buffer: bytearray | memoryview, *values: object) -> None:
        """Write `values`, one a field in order, at the start of `buffer`."""
        self._struct.pack_into(buffer, 0, *values)

    def pack(self, *values: object) -> bytes:
        """Return the packed struct."""
        return self._struct.pack(*values)

    def asserts(self) -> list[str]:
        """C++ ``static_assert`` lines that hold the C struct to this mirror."""
        lines = [f'static_assert(sizeof(fi::{self.name}) == {self.size}, "{self.name}: size");']
        for (field, _), offset in zip(self.fields, self.offsets, strict=True):
            lines.append(f'static_assert(FI_OFFSETOF(fi::{self.name}, {field}) == {offset}, "{self.name}.{field}");')
        return lines

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ParamsStruct) and self.name == other.name and self.fields == other.fields

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"ParamsStruct({self.name}, {self.size} bytes)"
